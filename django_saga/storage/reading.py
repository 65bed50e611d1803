"""From rows to claims."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from django.db import DataError, transaction

from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution
from django_saga.storage.base import Claim
from django_saga.storage.sql import EXECUTIONS
from django_saga.storage.writing import sql_of, to_utc, uuid_of
from django_saga.texts import told

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

logger = logging.getLogger("django_saga.storage")


def rows(connection: BaseDatabaseWrapper, query: str, params: Sequence[Any]) -> list[Claim | None]:
    """What the query finds; None for each row that cannot be read."""
    try:
        # Not raw(): it reads row by row, and on SQLite nobody else can write meanwhile; and it
        # leaves the cursor of what failed to the garbage collector, which, run by the thread that
        # writes, waits there for the thread that waits for it.
        with connection.cursor() as cursor:
            cursor.execute(query, params)
            found = cursor.fetchall()
            columns = [column[0] for column in cursor.description]
        return [claim_of(row) for row in executions(connection, columns, found)]
    except DataError as error:
        raise SagaError(f"What is stored cannot be read, was it edited? {error}") from error


def executions(
    connection: BaseDatabaseWrapper, columns: Sequence[str], found: Sequence[Sequence[Any]]
) -> Iterator[SagaExecution]:
    """Models of rows; what else was asked for is an attribute, as the database returned it."""
    fields = SagaExecution._meta.concrete_fields
    names = [field.attname for field in fields]
    places = [columns.index(field.column) for field in fields]
    asked = [place for place in range(len(columns)) if place not in places]
    compiler = SagaExecution.objects.using(connection.alias).query.get_compiler(connection.alias)
    converters = compiler.get_converters([field.cached_col for field in fields])
    stored = ([row[place] for place in places] for row in found)
    for row, values in zip(found, compiler.apply_converters(stored, converters), strict=True):
        execution = SagaExecution.from_db(connection.alias, names, values)
        vars(execution).update((columns[place], row[place]) for place in asked)
        yield execution


def take(
    connection: BaseDatabaseWrapper, update: str, params: Sequence[Any], ids: Sequence[Any]
) -> list[Claim | None]:
    """Run an UPDATE and read the rows that it changed."""
    sql = sql_of(connection)
    if sql.dialect.returns_updates:
        return rows(connection, f"{update} RETURNING {sql.row}", params)
    with transaction.atomic(using=connection.alias):
        with connection.cursor() as cursor:
            cursor.execute(update, params)
            if not cursor.rowcount:
                return []
        marks = ", ".join(["%s"] * len(ids))
        query = f"SELECT {sql.row} FROM {EXECUTIONS} WHERE id IN ({marks})"
        return rows(connection, query, [uuid_of(id, connection) for id in ids])


def claim_of(row: SagaExecution) -> Claim | None:
    try:
        state = row.state
        if not (isinstance(row.created_at, datetime) and isinstance(row.updated_at, datetime)):
            raise ValueError("a time is missing")
    except ValueError as error:
        # Somebody edited it by hand; it must not stand in the way of the others.
        logger.error("Saga execution %s cannot be read: %s", row.pk, told(error))
        return None
    at = to_utc(row.db_now)  # type: ignore[attr-defined]
    wait = max(0.0, (row.wake_at - at).total_seconds()) if row.wake_at else 0.0
    return Claim(
        row.id,
        row.saga,
        row.token,
        state,
        at,
        wait,
        cancel_reason=row.cancel_reason,
        paused=bool(row.paused),  # type: ignore[attr-defined]
        limit_key=row.limit_key,
        place=None if row.limit_key is None else row.slot is not None,
        execution=row,
    )


def columns_of_claim(claim: Claim) -> dict[str, Any]:
    """The columns of an execution that this process created, as it was then."""
    return {
        "id": claim.id,
        "saga": claim.saga,
        "initial_context": claim.state.context,
        "retry_of_id": claim.retry_of,
        "limit_key": claim.limit_key,
        "created_at": claim.at,
        "wake_at": claim.at + timedelta(seconds=claim.wait) if claim.wait else None,
        "driver": claim.driver,
    }


def is_leased(claim: Claim) -> bool:
    return claim.execution is not None and claim.execution.lease_until is not None


def is_held(claim: Claim) -> bool:
    """Whether its lease lasts still; a past one does not keep an execution from being paused."""
    until = claim.execution.lease_until if claim.execution else None
    return until is not None and until > claim.at
