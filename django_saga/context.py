"""The typed state that the steps of a saga share, and how it becomes JSON and comes back."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from math import isfinite
from typing import Any, Generic, TypeVar, get_type_hints

import msgspec

from django_saga.exceptions import InvalidContext, InvalidDefinition


class SagaContext:
    """The base of every context; derive from it and decorate with ``@dataclass``.

    Fields may hold whatever msgspec carries through JSON and back with its type: numbers, str,
    Decimal, UUID, date, datetime, time, timedelta, Enum, bytes, set, tuple, list, dict, Optional
    and nested dataclasses. Store the ids that a compensation needs.
    """


ContextT = TypeVar("ContextT", bound=SagaContext)


class ContextCodec(Generic[ContextT]):
    """Stores and restores contexts of one class."""

    def __init__(self, context_type: Any) -> None:
        if not dataclasses.is_dataclass(context_type):
            raise InvalidDefinition(
                f"The context {context_type!r} is not a dataclass; decorate it with @dataclass."
            )
        self.context_type: type[ContextT] = context_type
        self._fields: list[str] = [field.name for field in dataclasses.fields(context_type) if field.init]
        try:
            self._decoder: msgspec.json.Decoder[ContextT] = msgspec.json.Decoder(context_type)
        except (TypeError, NameError) as error:
            raise InvalidDefinition(
                f"The context {context_type.__qualname__} has a field that cannot be stored: "
                f"{error}"
            ) from error

    def encode(self, context: ContextT, *, limit: int) -> str:
        """The JSON of a context, proven to come back.

        Raises :class:`InvalidContext`, naming the field, for what could not be restored later or
        takes more than ``limit`` bytes.
        """
        if not isinstance(context, self.context_type):
            raise InvalidContext(
                f"Expected a {self.context_type.__qualname__}, got {type(context).__qualname__}."
            )
        try:
            encoded = _ENCODER.encode(context)
            # Decoded here, not first after a crash: what a handler put into a field of another
            # type would otherwise be found when nobody can mend it any more.
            self._decoder.decode(encoded)
            if b"null" in encoded:
                _refuse_non_finite(msgspec.to_builtins(context))
        except (*_UNSTORABLE, msgspec.MsgspecError) as error:
            raise InvalidContext(f"{self._culprit(context)} cannot be stored: {error}") from error
        if len(encoded) > limit:
            name, size = self._largest(context)
            raise InvalidContext(
                f"The context takes {len(encoded)} bytes, the limit is {limit} "
                f"(CONTEXT_LIMIT); its field {name!r} alone takes {size}."
            )
        return encoded.decode()

    def decode(self, stored: str) -> ContextT:
        """The context from its JSON; raises :class:`InvalidContext`, naming the field."""
        try:
            return self._decoder.decode(stored)
        except (msgspec.MsgspecError, *_UNSTORABLE) as error:
            raise InvalidContext(
                f"The stored context no longer fits {self.context_type.__qualname__}: {error}"
            ) from error

    def restore(self, context: ContextT, stored: str) -> None:
        """Give a live context, that the caller may hold too, its stored values again."""
        saved = self.decode(stored)
        for name in self._fields:
            object.__setattr__(context, name, getattr(saved, name))

    def salvage(self, context: ContextT, stored: str, *, limit: int) -> str:
        """Keep each field that can be stored, and give the others their stored values again."""
        saved = self.decode(stored)
        for name in self._fields:
            value = getattr(context, name, None)
            try:
                trial = dataclasses.replace(saved, **{name: value})  # type: ignore[type-var]
                self.encode(trial, limit=limit)
                saved = trial
            except InvalidContext:
                object.__setattr__(context, name, getattr(saved, name))
        return self.encode(saved, limit=limit)

    def _culprit(self, context: ContextT) -> str:
        for name in self._fields:
            try:
                value = getattr(context, name)
                _decoder_of(self.context_type, name).decode(_ENCODER.encode(value))
                _refuse_non_finite(msgspec.to_builtins(value, str_keys=True))
            except AttributeError:
                return f"The context's field {name!r}, which is missing,"
            except (msgspec.MsgspecError, *_UNSTORABLE):
                value = getattr(context, name)
                return f"The context's field {name!r} (a {type(value).__qualname__})"
        return "The context"

    def _largest(self, context: ContextT) -> tuple[str, int]:
        sizes = {name: len(_ENCODER.encode(getattr(context, name))) for name in self._fields}
        name = max(sizes, key=sizes.__getitem__, default="")
        return name, sizes.get(name, 0)


def _refuse_non_finite(value: object) -> None:
    """JSON has no NaN and no infinity: they would come back as None."""
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{value} has no form in JSON")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _refuse_non_finite(item)


_ENCODER = msgspec.json.Encoder(decimal_format="string", uuid_format="canonical")
_UNSTORABLE = (TypeError, ValueError, OverflowError, RecursionError, AttributeError)


@lru_cache(maxsize=256)
def _decoder_of(context_type: Any, name: str) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(get_type_hints(context_type, include_extras=True)[name])
