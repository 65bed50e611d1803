"""What a step changed in the context, as its record keeps it, and what a person changes there."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import msgspec

from django_saga.exceptions import InvalidContext

LARGEST = 2_000  # bytes of a value that is kept


def changes(before: str, after: str, sensitive: Collection[str] = ()) -> str:
    """The fields that differ, with their new values, as JSON; a field that is gone is null.

    What is ``sensitive``, or looks like a secret, is masked.
    """
    from django_saga.masking import mask_json

    old, new = _fields(before), _fields(after)
    changed: dict[str, object] = {
        name: _short(value) for name, value in new.items() if old.get(name) != value
    }
    changed |= dict.fromkeys(old.keys() - new.keys())
    return mask_json(msgspec.json.encode(changed).decode(), sensitive)


def unknown_fields(context: str, known: str) -> list[str]:
    """The fields of a context that this one, which is known to be right, has not."""
    return sorted(_fields(context).keys() - _fields(known).keys())


def unmasked(text: str, stored: str, sensitive: Collection[str] = ()) -> str:
    """The JSON that somebody made of a masked context; what was left masked stays as stored.

    Raises InvalidContext where it is no JSON, or has a mask and it is not known for what.
    """
    from django.utils.translation import gettext as _

    from django_saga.masking import MASK, mask_json

    try:
        given = json.loads(text)
        if MASK not in json.dumps(given):
            return text
        plain, masked = _parsed(stored), _parsed(mask_json(stored, sensitive))
        return json.dumps(_filled(given, masked, plain))
    except _StrayMask:
        why = _("There is a mask where nothing was masked; give the value itself.")
        raise InvalidContext(why) from None
    except (ValueError, RecursionError) as error:
        raise InvalidContext(_("This is no JSON: %(error)s.") % {"error": error}) from error


class _StrayMask(Exception):
    """A mask of which nobody knows what it stands for."""


def _parsed(context: str) -> Any:
    try:
        return json.loads(context)
    except (ValueError, RecursionError):
        return None  # its row was edited, and all of it is to be given


def _filled(given: Any, masked: Any, stored: Any) -> Any:
    if _same(given, masked):
        return stored
    match given, masked, stored:
        # Two names may look alike with a mask; then nobody knows which is which.
        case dict(), dict(), dict() if len(masked) == len(stored):
            names = dict(zip(masked, stored, strict=True))
            return {
                names[name] if name in names else _unmasked(name): _filled(
                    value, masked.get(name), stored.get(names.get(name))
                )
                for name, value in given.items()
            }
        # In another order, or changed, an item may be another than the one that stands there.
        case list(), list(), list() if len(given) == len(masked):
            each = zip(given, masked, stored, strict=True)
            return [was if _same(now, mask) else _unmasked(now) for now, mask, was in each]
    return _unmasked(given)


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _unmasked(value: Any) -> Any:
    from django_saga.masking import MASK

    if MASK in json.dumps(value):
        raise _StrayMask
    return value


def _fields(context: str) -> dict[str, msgspec.Raw]:
    try:
        return _FIELDS.decode(context)
    except msgspec.DecodeError:
        return {}  # its row was edited: all that follows on it is new


def _short(value: msgspec.Raw) -> object:
    size = len(value)
    return value if size <= LARGEST else f"… ({size} bytes)"


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
