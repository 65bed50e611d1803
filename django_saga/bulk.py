"""Storing many sagas at once, and having the backend drive them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django_saga import limits, machine
from django_saga.conf import conf
from django_saga.exceptions import InvalidContext, SagaError

if TYPE_CHECKING:
    from django_saga.saga import Saga

ROWS = 1_000  # executions that one statement stores
SIZE = 2_000_000  # characters of their contexts, from which on a statement stores no more


def enqueue_many(
    saga: Saga[Any], contexts: Iterable[Any], saga_ids: Iterable[UUID | None] | None
) -> list[UUID]:
    """See :meth:`django_saga.saga.Saga.enqueue_many`."""
    state = machine.start(saga.definition.plan, "", pending=True)
    storage, backend = saga.storage, saga.backend
    stored: list[UUID] = []
    try:
        for batch, keys in _batches(saga, contexts, saga_ids):
            grace = backend.grace(0.0)
            new = storage.create_many(saga.name, state, batch, grace=grace, limit_keys=keys)
            if new:
                storage.on_commit(partial(backend.hand_over_many, saga, new))
            stored += new
    except InvalidContext:
        raise  # it says so
    except Exception as error:
        what = f"{len(stored)} executions of saga {saga.name} were stored"
        error.add_note(f"Before that, {what}; in a transaction of yours, once it commits.")
        raise
    return stored


def _batches(
    saga: Saga[Any], contexts: Iterable[Any], saga_ids: Iterable[UUID | None] | None
) -> Iterator[tuple[dict[UUID, str], dict[UUID, str]]]:
    """What one statement stores: contexts as JSON, and the keys of a limit if any, by their ids."""
    from django_saga.models import new_id

    batch: dict[UUID, str] = {}
    keys: dict[UUID, str] = {}
    size = first = 0
    for position, (context, saga_id) in enumerate(_paired(contexts, saga_ids)):
        try:
            encoded = saga.definition.codec.encode(context, limit=conf.CONTEXT_LIMIT)
        except InvalidContext as error:
            before = f"Those before contexts[{first}] are" if first else "Nothing is"
            why = str(error).rstrip(".")
            raise InvalidContext(f"contexts[{position}]: {why}. {before} stored.") from error
        id = saga_id or new_id()
        key = limits.key_of(saga, context)
        if key is not None:
            keys.setdefault(id, key)
        batch.setdefault(id, encoded)
        size += len(encoded)
        if len(batch) == ROWS or size >= SIZE:
            yield batch, keys
            batch, keys, size, first = {}, {}, 0, position + 1
    if batch:
        yield batch, keys


def _paired(
    contexts: Iterable[Any], saga_ids: Iterable[UUID | None] | None
) -> Iterator[tuple[Any, UUID | None]]:
    if saga_ids is None:
        yield from ((context, None) for context in contexts)
        return
    for context, saga_id in zip_longest(contexts, saga_ids, fillvalue=_NONE_LEFT):
        if context is _NONE_LEFT or saga_id is _NONE_LEFT:
            which = "fewer" if saga_id is _NONE_LEFT else "more"
            raise SagaError(f"There are {which} saga_ids than contexts.")
        yield context, saga_id


_NONE_LEFT: Any = object()
