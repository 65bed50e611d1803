"""What recovery takes: executions that are due, of each saga an equal share, its oldest."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from django.db import transaction

from django_saga.exceptions import SagaLimitReached
from django_saga.storage.base import Claim
from django_saga.storage.places import acquire_place, free_places
from django_saga.storage.reading import rows, take
from django_saga.storage.sql import EXECUTIONS
from django_saga.storage.writing import sql_of

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


class Terms(NamedTuple):
    """On which executions are taken: leased, left alone for some time, or only read."""

    driver: str
    lease: float | None
    grace: float | None

    @property
    def only_reads(self) -> bool:
        return self.lease is None and self.grace is None


class Source(NamedTuple):
    """Where executions that are due are taken from, in turn."""

    saga: str
    key: str | None = None  # of a limit
    waits: bool = False  # for a place
    most: int = sys.maxsize


def sources_of(saga: str, keys: Iterable[tuple[str, bool, bool, int]]) -> Iterator[Source]:
    for key, is_due, waits, running in keys:
        if is_due:
            yield Source(saga, key)
        if waits and (free := free_places(saga, running)):
            yield Source(saga, key, True, free)


def claim_due(
    connection: BaseDatabaseWrapper, limit: int, terms: Terms, saga: str | None
) -> list[Claim]:
    """See :meth:`~django_saga.storage.base.SagaStorage.due`."""
    claims: list[Claim] = []
    read: dict[Source, list[Claim | None]] = {}
    found = dict.fromkeys(_sources(connection, saga), 0)
    left = list(found)
    random.shuffle(left)  # there may be more of them than the limit
    while left and len(claims) < limit:
        share = -(-(limit - len(claims)) // len(left))
        for source in tuple(left):
            most = min(share, limit - len(claims), source.most - found[source])
            if not most:
                left.remove(source)
                continue
            if terms.only_reads:  # what is only read would be met again by the next statement
                if source not in read:
                    read[source] = _claim(connection, source, limit, terms)
                taken = read[source][found[source] :][:most]
            else:
                taken = _claim(connection, source, most, terms)
            # What cannot be read is claimed too, so others come instead.
            claims += filter(None, taken)
            found[source] += len(taken)
            if len(taken) < most:
                left.remove(source)
    return sorted(claims, key=lambda claim: claim.execution.created_at)  # type: ignore[union-attr]


def _sources(connection: BaseDatabaseWrapper, only: str | None) -> list[Source]:
    """The sagas, and the keys of limits, of which something is due."""
    sql, found = sql_of(connection), []
    with connection.cursor() as cursor:
        cursor.execute(sql.sagas, ())  # for its %%
        for saga, is_due, limit_key in cursor.fetchall():
            if only not in (None, saga):
                continue
            if is_due:
                found.append(Source(saga))
            if limit_key is not None:
                cursor.execute(sql.keys, (saga,) * sql.keys.count("%s"))
                found += sources_of(saga, cursor.fetchall())
    return found


def _claim(
    connection: BaseDatabaseWrapper, source: Source, limit: int, terms: Terms
) -> list[Claim | None]:
    sql = sql_of(connection)
    saga, key, waits, _ = source
    due, which = sql.due, (saga, saga, limit)
    if key is not None:
        due, which = sql.due_placed, (saga, key, limit)
    if waits:
        due = sql.due_unplaced
    if terms.only_reads:
        return _read(connection, due, which)
    if terms.lease is None:
        grace = terms.grace or 0.0
        return _take(connection, due, which, sql.leave_alone, (grace, 10 * grace))
    lease = (terms.lease, terms.driver)
    if waits:
        return _take_with_places(connection, due, which, lease)
    return _take(connection, due, which, sql.take, lease)


def _take(
    connection: BaseDatabaseWrapper,
    due: str,
    which: tuple[Any, ...],
    change: str,
    values: tuple[Any, ...],
) -> list[Claim | None]:
    """Change those that are due; in one statement, where it can return what it changed."""
    sql = sql_of(connection)
    if sql.dialect.returns_updates:
        # Materialized, or the planner may run the sub-select again and claim more.
        update = (
            f"WITH due AS MATERIALIZED ({due}) UPDATE {EXECUTIONS} SET {change} "
            "WHERE id IN (SELECT id FROM due)"
        )
        return rows(connection, f"{update} RETURNING {sql.row}", (*which, *values))
    with transaction.atomic(using=connection.alias):
        with connection.cursor() as cursor:
            cursor.execute(due, which)
            ids = [id for (id,) in cursor.fetchall()]
        if not ids:
            return []
        marks = ", ".join(["%s"] * len(ids))
        update = f"UPDATE {EXECUTIONS} SET {change} WHERE id IN ({marks})"
        return take(connection, update, (*values, *ids), ids)


def _take_with_places(
    connection: BaseDatabaseWrapper,
    due: str,
    which: tuple[Any, ...],
    lease: tuple[float, str],
) -> list[Claim | None]:
    """Lease those that waited longest for a place, each with one."""
    claims: list[Claim | None] = []
    for claim in filter(None, _read(connection, due, which)):
        try:
            claims += acquire_place(connection, claim, lease)
        except SagaLimitReached:
            break
    return claims


def _read(connection: BaseDatabaseWrapper, due: str, which: tuple[Any, ...]) -> list[Claim | None]:
    sql = sql_of(connection)
    query = due.replace("SELECT id", f"SELECT {sql.row}")
    return rows(connection, query.replace(sql.dialect.skip_locked, ""), which)
