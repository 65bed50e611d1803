"""What a step changed in the context, as its record keeps it."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

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


def _fields(context: str) -> dict[str, msgspec.Raw]:
    try:
        return _FIELDS.decode(context)
    except msgspec.DecodeError:
        return {}  # its row was edited: all that follows on it is new


def _short(value: msgspec.Raw) -> object:
    size = len(value)
    return value if size <= LARGEST else f"… ({size} bytes)"


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
