"""From a checkpoint or a new execution to the statement that stores it, and what came of that."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from django_saga.exceptions import (
    LeaseLost,
    SagaError,
)
from django_saga.machine import Status
from django_saga.models import changed_columns
from django_saga.storage.base import Checkpoint, Claim, Creation, Saved, Written
from django_saga.storage.sql import ASKED, CAUSE, STATEMENTS, Statements
from django_saga.texts import storable

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_saga.causes import Cause

Statement = tuple[str, tuple[Any, ...]]  # and its parameters


def sql_of(connection: BaseDatabaseWrapper) -> Statements:
    try:
        return STATEMENTS[connection.vendor]
    except KeyError:
        raise SagaError(
            f"django-saga does not know the database {connection.vendor!r}; "
            "it runs on PostgreSQL, SQLite and MariaDB."
        ) from None


def statement_of(connection: BaseDatabaseWrapper, write: Checkpoint | Creation) -> Statement:
    if isinstance(write, Creation):
        return creation_of(connection, write)
    return at_once(connection, write)


def came_of(write: Checkpoint | Creation, row: Any) -> Written:
    if isinstance(write, Creation):
        return created(write, row)
    return saved_by(row) or taken_over(write)


def creation_of(
    connection: BaseDatabaseWrapper, creation: Creation, place: int | None = None
) -> Statement:
    state, retry_of, sql = creation.state, creation.retry_of, sql_of(connection)
    limited = creation.limit_key is not None
    return sql.create_limited if limited else sql.create, (
        uuid_of(creation.id, connection),
        creation.saga,
        to_json(state.plan),
        state.context,
        retry_of and uuid_of(retry_of, connection),
        state.status.value,
        state.step,
        state.in_flight,
        state.atomic,
        state.context,
        *((creation.limit_key, place) if limited else ()),
        creation.driver,
        creation.lease,
        creation.wake,
        creation.grace,
    )


def created(creation: Creation, row: Any) -> Claim | None:
    if row is None:
        return None
    return Claim(
        creation.id,
        creation.saga,
        1,
        creation.state,
        to_utc(row[0]),
        wait=creation.wake or 0.0,
        driver=creation.driver,
        retry_of=creation.retry_of,
        paused=bool(row[1]),
        limit_key=creation.limit_key,
        place=None if creation.limit_key is None else creation.lease is not None,
    )


def at_once(connection: BaseDatabaseWrapper, checkpoint: Checkpoint) -> Statement:
    """All of a checkpoint in one statement."""
    kind, params = _update_of(checkpoint, connection)
    record, cause = checkpoint.record, checkpoint.cause
    about = None if record is None else _kind_of(checkpoint)
    if cause is not None:
        params += _cause_params(cause)
    if record is not None:
        params += _record_params(checkpoint)
    return sql_of(connection).checkpoint(kind, about, cause is not None), params


def saved_by(row: Any) -> Saved | None:
    return None if row is None else Saved(to_utc(row[1]), row[0], row[2], row[3])


def taken_over(checkpoint: Checkpoint) -> LeaseLost:
    return LeaseLost(
        f"Saga execution {checkpoint.id} was taken over while step {checkpoint.before.step} was "
        f"in {checkpoint.before.action}; nothing was written."
    )


def save(connection: BaseDatabaseWrapper, sql: Statements, checkpoint: Checkpoint) -> Saved | None:
    """The same in several statements, of which the first changes the row, or nothing is done."""
    id = uuid_of(checkpoint.id, connection)
    kind, params = _update_of(checkpoint, connection)
    update, at, record_id = sql.update(*kind), datetime.now(UTC), None
    with connection.cursor() as cursor:
        if sql.dialect.returns_updates:
            cursor.execute(f"{update} RETURNING {ASKED}", params)
        else:
            cursor.execute(update, params)
            if not cursor.rowcount:
                return None
            cursor.execute(sql.asked, [id])
        asked = cursor.fetchone()
        if asked is None:
            return None
        if checkpoint.record is not None:
            cursor.execute(sql.record(*_kind_of(checkpoint)), (*_record_params(checkpoint), id))
            record_id, created_at = cursor.fetchone()
            at = to_utc(created_at)
        if checkpoint.cause is not None:
            cursor.execute(sql.group, _cause_params(checkpoint.cause))
    return Saved(at, record_id, asked[0], bool(asked[1]))


def _update_of(
    checkpoint: Checkpoint, connection: BaseDatabaseWrapper
) -> tuple[tuple[tuple[str, ...], bool, bool, bool], tuple[Any, ...]]:
    """Which update it is, and its parameters: only what changed is sent and logged."""
    before, after = checkpoint.before, checkpoint.after
    changed = changed_columns(before, after)
    if "effects" in changed:
        changed["effects"] = to_json(changed["effects"])
    if "stuck_reason" in changed:  # it may quote what was stored, or what a context said of itself
        changed["stuck_reason"] = storable(changed["stuck_reason"])
        changed["error_message"] = storable(after.error.message if after.error else "")
    if checkpoint.cause is not None:
        changed["failure_group"] = checkpoint.cause.id
    if checkpoint.place and not after.active:
        changed["slot"] = None
    elif checkpoint.place is False and after.status is Status.COMPENSATING:
        changed["limit_key"] = None  # it need not wait
    wake, grace = checkpoint.wake, checkpoint.grace
    kind = (tuple(changed), wake is not None, grace is not None, not after.active)
    params = (
        *changed.values(),
        checkpoint.lease,
        *(seconds for seconds in (wake, grace) if seconds is not None),
        uuid_of(checkpoint.id, connection),
        checkpoint.token,
        before.status.value,
        before.step,
        before.action.value,
        before.attempt,
    )
    return kind, params


def _record_params(checkpoint: Checkpoint) -> tuple[Any, ...]:
    record = checkpoint.record
    assert record is not None
    params: tuple[Any, ...] = (
        record.step,
        record.action.value,
        record.attempt,
        record.outcome.value,
        checkpoint.duration,
        checkpoint.token,
    )
    if error := record.error:
        params += error.type[:255], error.message, error.traceback
    return (*params, checkpoint.changes) if checkpoint.changes else params


def _kind_of(checkpoint: Checkpoint) -> tuple[bool, bool]:
    assert checkpoint.record is not None
    return checkpoint.record.error is not None, bool(checkpoint.changes)


def _cause_params(cause: Cause) -> tuple[str, ...]:
    return tuple(storable(str(getattr(cause, name))) for name in CAUSE)


def to_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def uuid_of(value: UUID, connection: BaseDatabaseWrapper) -> Any:
    return value if connection.features.has_native_uuid_field else value.hex


def to_utc(value: Any) -> datetime:
    """A time as each database returns it: seconds of the epoch, ISO 8601, a datetime."""
    if isinstance(value, float):
        return datetime.fromtimestamp(value, UTC)
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    assert isinstance(moment, datetime)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
