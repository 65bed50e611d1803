"""New executions, and the places of sagas that limit how many run at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from django.db import (
    IntegrityError,
    OperationalError,
    transaction,
)

from django_saga import registry
from django_saga.exceptions import SagaLimitReached
from django_saga.limits import reached
from django_saga.storage.base import Checkpoint, Claim, Creation
from django_saga.storage.cursors import fetch
from django_saga.storage.reading import take
from django_saga.storage.writing import (
    creation_of,
    sql_of,
    uuid_of,
)

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


T = TypeVar("T")

DUPLICATE_KEY = 1062  # MariaDB's; the others skip duplicates by themselves


def free_places(saga: str, running: int) -> int:
    most = registry.limit_of(saga)
    return sys.maxsize if most is None else max(0, most - int(running))


def takes_place(write: Checkpoint | Creation) -> bool:
    """Whether it may have to wait for somebody else's transaction, or be tried again."""
    return isinstance(write, Creation) and write.limit_key is not None


def insert(connection: BaseDatabaseWrapper, creation: Creation, place: int | None = None) -> Any:
    """Its row, or None where its id is taken."""
    try:
        return fetch(connection, *creation_of(connection, creation, place))
    except IntegrityError as error:
        if error.args[0] != DUPLICATE_KEY or not taken(connection, [creation.id]):
            raise
        return None


def insert_limited(connection: BaseDatabaseWrapper, creation: Creation) -> Any:
    if creation.lease is None:  # it waits for its turn
        return insert(connection, creation)
    saga, key = creation.saga, creation.limit_key
    assert key is not None
    try:
        return with_place(connection, saga, key, partial(insert, connection, creation))
    except SagaLimitReached as full:
        if taken(connection, [creation.id]):
            return None
        hint = "nothing is stored. enqueue() it, which waits for its turn, or try again later"
        raise SagaLimitReached(f"Saga {saga} was not started: {full}; {hint}.") from None


def with_place(
    connection: BaseDatabaseWrapper, saga: str, key: str, use: Callable[[int | None], T]
) -> T:
    """Call it with the number of a place that is free, and again where another was faster.

    Raises SagaLimitReached where there is none; None is as good as one where there is no limit.
    """
    most, tries = registry.limit_of(saga), 0
    while True:
        place = None
        if most is not None:
            place, running = fetch(connection, sql_of(connection).place, (saga, key) * 3)
            if running >= most:
                raise SagaLimitReached(reached(saga, key, running, most))
        inside = connection.in_atomic_block
        try:
            with transaction.atomic(using=connection.alias) if inside else nullcontext():
                return use(place)
        except (IntegrityError, OperationalError) as error:
            deadlock = error.args[0] == _DEADLOCK and not inside
            if not (isinstance(error, IntegrityError) or deadlock):
                raise
            if (tries := tries + 1) == _FASTER:
                raise


def acquire_place(
    connection: BaseDatabaseWrapper, claim: Claim, lease: tuple[float, str]
) -> list[Claim | None]:
    assert claim.limit_key is not None
    update, pk = sql_of(connection).acquire_place, uuid_of(claim.id, connection)

    def use(place: int | None) -> list[Claim | None]:
        return take(connection, update, (*lease, place, pk), [claim.id])

    try:
        return with_place(connection, claim.saga, claim.limit_key, use)
    except SagaLimitReached as full:
        raise SagaLimitReached(f"Saga {claim.saga} {claim.id} waits: {full}.") from None


def store_all(
    connection: BaseDatabaseWrapper,
    contexts: Mapping[UUID, str],
    keys: Mapping[UUID, str],
    alike: tuple[Any, ...],
) -> set[UUID]:
    sql, ids = sql_of(connection), [uuid_of(id, connection) for id in contexts]
    columns = (ids, list(contexts.values()), [keys.get(id) for id in contexts])
    params = columns if sql.dialect.arrays else chain.from_iterable(zip(*columns, strict=True))
    given = sql.dialect.given.format(", ".join(["(%s, %s, %s)"] * len(ids)))
    with connection.cursor() as cursor:
        cursor.execute(sql.create_many.format(given), [*params, *alike])
        return {UUID(str(id)) for (id,) in cursor.fetchall()}


def taken(connection: BaseDatabaseWrapper, ids: Iterable[UUID]) -> list[UUID]:
    """Which of them there are."""
    params = [uuid_of(id, connection) for id in ids]
    marks = ", ".join(["%s"] * len(params))
    with connection.cursor() as cursor:
        cursor.execute(sql_of(connection).taken.format(marks), params)
        return [UUID(str(id)) for (id,) in cursor.fetchall()]


_FASTER = 1_000  # times that others take the place that was free
_DEADLOCK = 1213  # MariaDB's, of two that would take one place
