"""The typed state that the steps of a saga share, and how it becomes JSON and comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec

from django_saga.exceptions import InvalidContext, InvalidDefinition
from django_saga.texts import said_by


class SagaContext:
    """The base of every context; derive from it and decorate with ``@dataclass``.

    Fields may hold whatever msgspec carries through JSON and back with its type: numbers, str,
    Decimal, UUID, date, datetime, time, timedelta, Enum, bytes, set, tuple, list, dict, Optional
    and nested dataclasses. Store the ids that a compensation needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A dataclass brings its own; this is met only where the decorator was forgotten.
        if args or kwargs:
            raise InvalidDefinition(
                f"The context {type(self).__qualname__} is not a dataclass; "
                "decorate it with @dataclass."
            )


SENSITIVE = msgspec.Meta(extra={"sensitive": True})
"""Marks a field whose value must not be told: ``card: Annotated[str, SENSITIVE]``.

It is stored with the context like any other, and masked in errors, logs and on screens. A name that
is marked once, in a nested dataclass too, counts wherever it occurs in the context.
"""

ContextT = TypeVar("ContextT", bound=SagaContext)


class ContextCodec(Generic[ContextT]):
    """Stores and restores contexts of one class."""

    def __init__(self, context_type: Any) -> None:
        self.context_type: type[ContextT] = context_type
        # One that only inherits from a dataclass would lose its own fields without a word.
        if "__dataclass_fields__" not in vars(context_type):
            raise InvalidDefinition(
                f"The context {context_type.__qualname__} is not a dataclass; "
                "decorate it with @dataclass."
            )
        self._fields: list[str] = [field.name for field in dataclasses.fields(context_type)]
        try:
            self._decoder: msgspec.json.Decoder[ContextT] = msgspec.json.Decoder(context_type)
        except (TypeError, NameError) as error:
            raise InvalidDefinition(
                f"The context {self.context_type.__qualname__} has a field that cannot be stored: "
                f"{error}"
            ) from error

    @property
    def sensitive(self) -> frozenset[str]:
        """The names of the fields that are marked as :data:`SENSITIVE`."""
        from django_saga.marked import sensitive_fields  # once there is something to mask

        return sensitive_fields(self.context_type)  # type: ignore[arg-type]

    def encode(self, context: ContextT, *, limit: int) -> str:
        """The JSON of a context, proven to come back.

        Raises :class:`InvalidContext`, naming the field, for what could not be restored later or
        takes more than ``limit`` bytes.
        """
        if type(context) is not self.context_type:
            raise InvalidContext(
                f"Expected a {self.context_type.__qualname__}, got {type(context).__qualname__}."
            )
        try:
            encoded = _prove(context, self._decoder)
        except Exception as error:  # also from a __post_init__
            if not _fails(_prove, context, self._decoder):
                raise
            culprit = self._culprit(context)
            raise InvalidContext(f"{culprit} cannot be stored: {said_by(error)}") from error
        if len(encoded) > limit:
            name, size = self._largest(context)
            raise InvalidContext(
                f"The context takes {len(encoded)} bytes, the limit is {limit} "
                f"(CONTEXT_LIMIT); its field {name!r} alone takes {size}."
            )
        return encoded.decode()

    def decode(self, stored: str) -> ContextT:
        """The context from its JSON; raises :class:`InvalidContext`, naming the field."""
        if not stored:
            raise InvalidContext(
                f"The stored context no longer fits {self.context_type.__qualname__}: "
                "it is empty, as retention leaves it"
            )
        try:
            return self._decoder.decode(stored)
        except Exception as error:  # also from a __post_init__
            if not _fails(self._decoder.decode, stored):
                raise
            raise InvalidContext(
                f"The stored context no longer fits {self.context_type.__qualname__}: "
                f"{said_by(error)}"
            ) from error

    def restore(self, context: ContextT, stored: str) -> None:
        """Give a live context, that the caller may hold too, its stored values again."""
        saved = self.decode(stored)
        for name in self._fields:
            object.__setattr__(context, name, getattr(saved, name))

    def salvage(self, context: ContextT, stored: str, *, limit: int) -> str:
        """Keep each field that can be stored, and give the others their stored values again."""
        try:
            saved, kept = self.decode(stored), stored
        except InvalidContext:  # it did when it was stored
            return stored
        for name in self._fields:
            before = getattr(saved, name)
            try:
                object.__setattr__(saved, name, getattr(context, name))
                kept = self.encode(saved, limit=limit)
            except Exception:  # missing, not to be stored, or it raises when it is read
                object.__setattr__(saved, name, before)
                object.__setattr__(context, name, before)
        return kept

    def _culprit(self, context: ContextT) -> str:
        for name in self._fields:
            try:
                value = getattr(context, name)
            except AttributeError:
                return f"The context's field {name!r}, which is missing,"
            except Exception:
                return f"The context's field {name!r}, which cannot be read,"
            try:
                _prove(value, _decoder_of(self.context_type, name))  # type: ignore[arg-type]
            except Exception:
                return f"The context's field {name!r} (a {type(value).__qualname__})"
        return "The context"

    def _largest(self, context: ContextT) -> tuple[str, int]:
        sizes = {name: len(_ENCODER.encode(getattr(context, name))) for name in self._fields}
        name = max(sizes, key=sizes.__getitem__, default="")
        return name, sizes.get(name, 0)


def _fails(function: Callable[..., object], *args: Any) -> bool:
    """Whether it fails again: what does not was no fault of the context's.

    A signal handler, such as RQ's timeout, raises anywhere, and memory can run out anywhere.
    """
    try:
        function(*args)
    except Exception:
        return True
    return False


def _prove(value: Any, decoder: msgspec.json.Decoder[Any]) -> bytes:
    """Encode, and decode here rather than first after a crash, when nobody can mend it any more."""
    encoded = _ENCODER.encode(value)
    decoded = decoder.decode(encoded)
    if decoded != value:
        _refuse_other_types(value, decoded)
    return encoded


def _refuse_other_types(value: Any, decoded: Any) -> None:
    """Raise for a UUID that comes back as a str, a NaN that comes back as None, and the like."""
    if type(value) is not type(decoded):
        if value != decoded:
            raise TypeError(f"{value!r:.100} would come back as {decoded!r:.100}")
    elif isinstance(value, (list, tuple)):
        for pair in zip(value, decoded, strict=True):
            _refuse_other_types(*pair)
    elif isinstance(value, dict):
        _refuse_other_types(list(value), list(decoded))
        _refuse_other_types(list(value.values()), list(decoded.values()))
    elif isinstance(value, (set, frozenset)):
        _refuse_other_types(sorted(value, key=repr), sorted(decoded, key=repr))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _refuse_other_types(getattr(value, field.name), getattr(decoded, field.name))


_ENCODER = msgspec.json.Encoder(decimal_format="string", uuid_format="canonical")


@lru_cache(maxsize=256)
def _decoder_of(context_type: Any, name: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(get_type_hints(context_type, include_extras=True)[name])
