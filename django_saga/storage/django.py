"""Executions and records in the database of the Django project."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from django.db import (
    DatabaseError,
    DataError,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
    ProgrammingError,
    connections,
    router,
    transaction,
)
from django.db.transaction import Atomic

from django_saga import registry
from django_saga.exceptions import (
    InsideTransaction,
    LeaseLost,
    SagaAlreadyRunning,
    SagaError,
    SagaLimitReached,
    SagaNotFound,
    SagaPaused,
    StorageUnavailable,
    TransactionLeftOpen,
)
from django_saga.limits import reached
from django_saga.machine import State, Status
from django_saga.models import SagaExecution, SagaStepRecord, changed_columns
from django_saga.storage.base import Checkpoint, Claim, Creation, SagaStorage, Saved, Written
from django_saga.storage.sql import ASKED, CAUSE, EXECUTIONS, STATEMENTS, Statements
from django_saga.texts import storable, told, traced

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    from django_saga.causes import Cause


logger = logging.getLogger("django_saga.storage")

T = TypeVar("T")


class _Source(NamedTuple):
    """Where executions that are due are taken from, in turn."""

    saga: str
    key: str | None = None  # of a limit
    waits: bool = False  # for a place
    most: int = sys.maxsize


class DjangoSagaStorage(SagaStorage):
    """The default storage. ``using`` is a database alias; default: where the router writes."""

    def __init__(self, using: str | None = None) -> None:
        self._using = using

    @property
    def alias(self) -> str:
        """The database that holds the rows; it is also read from, never a replica."""
        return self._using or router.db_for_write(SagaExecution)

    @property
    def _connection(self) -> BaseDatabaseWrapper:
        return connections[self.alias]

    def create(
        self,
        saga_id: UUID,
        saga: str,
        state: State,
        *,
        driver: str = "",
        lease: float | None = None,
        wake: float | None = None,
        grace: float | None = None,
        retry_of: UUID | None = None,
        limit_key: str | None = None,
    ) -> Claim | None:
        connection = self._connection
        if lease is not None:
            _refuse_transaction(connection)
        creation = Creation(
            id=saga_id,
            saga=saga,
            state=state,
            driver=driver,
            lease=lease,
            wake=wake,
            grace=grace,
            retry_of=retry_of,
            limit_key=limit_key,
        )
        with _translated(connection):
            if limit_key is None:
                row = _insert(connection, creation)
            else:
                row = _insert_limited(connection, creation)
        return _created(creation, row)

    def create_many(
        self,
        saga: str,
        state: State,
        contexts: Mapping[UUID, str],
        *,
        grace: float | None = None,
        limit_keys: Mapping[UUID, str] | None = None,
    ) -> list[UUID]:
        connection, keys = self._connection, limit_keys or {}
        alike = (saga, _json(state.plan), state.step, grace)
        new = dict(contexts)
        with _translated(connection):
            while new:
                try:
                    stored = _store_all(connection, new, keys, alike)
                except IntegrityError as error:
                    if error.args[0] != _DUPLICATE_KEY:
                        raise
                    for id in _taken(connection, new):
                        del new[id]
                else:
                    return [id for id in new if id in stored]
        return []

    def acquire(
        self,
        saga_id: UUID,
        *,
        driver: str,
        lease: float,
        saga: str | None = None,
        token: int | None = None,
        by_hand: bool = False,
    ) -> Claim:
        connection = self._connection
        if not by_hand:
            _refuse_transaction(connection)
        pk = _uuid(saga_id, connection)
        params = (lease, driver, pk, saga or "", saga is None, by_hand, token)
        query = f"SELECT {_sql(connection).row} FROM {EXECUTIONS} WHERE id = %s"
        for _ in range(_TRIES):
            with _translated(connection):
                claims = self._take(connection, _sql(connection).acquire, params, [saga_id])
                if claims and claims[0]:
                    return claims[0]
                claim = next(iter(self._rows(query, [pk])), None)
            if claim is None:
                raise SagaNotFound(f"No saga execution has the id {saga_id}.")
            if saga is not None and claim.saga != saga:
                raise SagaNotFound(
                    f"The id {saga_id} belongs to an execution of {claim.saga!r}, not of {saga!r}."
                )
            if not claim.state.active:
                return claim
            if claim.paused and not _is_held(claim):
                raise SagaPaused(
                    f"Saga {claim.saga} {saga_id} waits: it is paused before {claim.state.action} "
                    f"of step {claim.state.step}, and goes on when that is resumed."
                )
            if _is_leased(claim):
                assert claim.execution is not None
                raise SagaAlreadyRunning(
                    f"Saga {claim.saga} {saga_id} is being driven by {claim.execution.driver}, in "
                    f"{claim.state.action} of step {claim.state.step}; its lease lasts until "
                    f"{claim.execution.lease_until:%Y-%m-%d %H:%M:%S} UTC."
                )
            if claim.place is False:
                claims = self._acquire_place(connection, claim, (lease, driver))
                if claims and claims[0]:
                    return claims[0]
            # It was released between the two statements.
        raise SagaError(f"Saga execution {saga_id} cannot be leased; was its row edited?")

    def _acquire_place(
        self, connection: BaseDatabaseWrapper, claim: Claim, lease: tuple[float, str]
    ) -> list[Claim | None]:
        assert claim.limit_key is not None
        update, pk = _sql(connection).acquire_place, _uuid(claim.id, connection)

        def take(place: int | None) -> list[Claim | None]:
            return self._take(connection, update, (*lease, place, pk), [claim.id])

        try:
            return _with_place(connection, claim.saga, claim.limit_key, take)
        except SagaLimitReached as full:
            raise SagaLimitReached(f"Saga {claim.saga} {claim.id} waits: {full}.") from None

    def checkpoint(self, checkpoint: Checkpoint, *, inside: bool = False) -> Saved:
        connection = self._connection
        if not inside:
            _refuse_transaction(connection)
        sql = _sql(connection)
        with _translated(connection):
            if sql.dialect.one_statement:
                saved = _saved(_fetch(connection, *_at_once(connection, checkpoint)))
            elif checkpoint.record is None and checkpoint.cause is None:
                saved = _save(connection, sql, checkpoint)
            else:
                with transaction.atomic(using=self.alias, savepoint=False):
                    saved = _save(connection, sql, checkpoint)
        if saved is None:
            raise _taken_over(checkpoint)
        return saved

    def write_together(self, writes: Sequence[Checkpoint | Creation]) -> list[Written]:
        if len(writes) == 1 or any(map(_takes_place, writes)):
            return super().write_together(writes)
        connection = self._connection
        outcomes: list[Written] = []
        try:
            _refuse_transaction(connection)
            with _translated(connection), _Together(self.alias, savepoint=True, durable=False):
                outcomes = self._write_all(connection, writes)
        except StorageUnavailable as error:
            if outcomes:  # the commit's answer was lost: each must look what became of it
                return [error] * len(writes)
        except (SagaError, DatabaseError, ValueError):
            if outcomes:
                raise
        # Where one could not be written, none was: it must not be in the way of the others.
        return outcomes or super().write_together(writes)

    def _write_all(
        self, connection: BaseDatabaseWrapper, writes: Sequence[Checkpoint | Creation]
    ) -> list[Written]:
        if not _sql(connection).dialect.one_statement:
            return [self._write_or_lost(write) for write in writes]
        statements = [_statement(connection, write) for write in writes]
        with ExitStack() as stack:
            stack.enter_context(connection.wrap_database_errors)
            if pipeline := getattr(connection.connection, "pipeline", None):  # not in psycopg 2
                stack.enter_context(pipeline())
            cursors = [stack.enter_context(connection.cursor()) for _ in writes]
            for cursor, statement in zip(cursors, statements, strict=True):
                cursor.execute(*statement)
            rows = [cursor.fetchone() for cursor in cursors]
        return [_came_of(write, row) for write, row in zip(writes, rows, strict=True)]

    def _write_or_lost(self, write: Checkpoint | Creation) -> Written:
        try:
            return self.write(write)
        except LeaseLost as lost:  # nothing was written, which is no reason to roll back
            return lost

    def renew(self, leases: Sequence[tuple[UUID, int]], *, lease: float) -> set[UUID]:
        if not leases:
            return set()
        connection = self._connection
        sql = _sql(connection)
        which = sql.dialect.leases.format(", ".join(["(%s, %s)"] * len(leases)))
        held = [value for id, token in leases for value in (_uuid(id, connection), token)]
        with _translated(connection):
            with connection.cursor() as cursor:
                cursor.execute(f"{sql.renew} {which}", [lease, *held])
                if cursor.rowcount == len(leases):
                    return {id for id, _ in leases}
            query = f"SELECT {sql.row} FROM {EXECUTIONS} WHERE {which}"
            found = filter(None, self._rows(query, held))
            return {claim.id for claim in found if claim.state.active and _is_leased(claim)}

    def release(
        self, saga_id: UUID, token: int, *, unstarted: bool = False, grace: float | None = None
    ) -> None:
        connection = self._connection
        _refuse_transaction(connection)  # it would lock the row there instead
        with _translated(connection), connection.cursor() as cursor:
            params = (not unstarted, grace, _uuid(saga_id, connection), token)
            cursor.execute(_sql(connection).release, params)

    def due(
        self,
        limit: int,
        *,
        driver: str = "",
        lease: float | None = None,
        grace: float | None = None,
        saga: str | None = None,
    ) -> list[Claim]:
        if lease is not None:
            self.refuse_transaction()
        claims: list[Claim] = []
        found = dict.fromkeys(self._sources(saga), 0)
        left = list(found)
        random.shuffle(left)  # there may be more of them than the limit
        while left and len(claims) < limit:
            share = -(-(limit - len(claims)) // len(left))
            for source in tuple(left):
                most = min(share, limit - len(claims), source.most - found[source])
                if not most:
                    left.remove(source)
                    continue
                # What is only read, not claimed, would be met again.
                passed = found[source] if lease is None and grace is None else 0
                rows = self._due(source, most, passed, driver, lease, grace)
                # What cannot be read is claimed too, so others come instead.
                claims += filter(None, rows)
                found[source] += len(rows)
                if len(rows) < most:
                    left.remove(source)
        return _oldest_first(claims)

    def _sources(self, only: str | None) -> list[_Source]:
        """The sagas, and the keys of limits, of which something is due."""
        connection = self._connection
        sql, found = _sql(connection), []
        with _translated(connection), connection.cursor() as cursor:
            cursor.execute(sql.sagas, ())  # for its %%
            for saga, is_due, limit_key in cursor.fetchall():
                if only not in (None, saga):
                    continue
                if is_due:
                    found.append(_Source(saga))
                if limit_key is not None:
                    cursor.execute(sql.keys, (saga,) * sql.keys.count("%s"))
                    found += _sources_of(saga, cursor.fetchall())
        return found

    def _due(
        self,
        source: _Source,
        limit: int,
        passed: int,
        driver: str,
        lease: float | None,
        grace: float | None,
    ) -> list[Claim | None]:
        connection = self._connection
        sql = _sql(connection)
        saga, key, waits, _ = source
        due, which = sql.due, (saga, saga, limit, passed)
        if key is not None:
            due, which = sql.due_placed, (saga, key, limit, passed)
        if waits:
            due = sql.due_unplaced
        if waits and lease is not None:
            return self._acquire_due(connection, due, which, (lease, driver))
        take = (sql.take, (lease, driver))
        change, times = (sql.leave_alone, (grace, 10 * (grace or 0))) if lease is None else take
        with _translated(connection):
            if lease is None and grace is None:
                return self._read_due(connection, due, which)
            if sql.dialect.returns_updates:
                # Materialized, or the planner may run the sub-select again and claim more.
                update = (
                    f"WITH due AS MATERIALIZED ({due}) UPDATE {EXECUTIONS} SET {change} "
                    "WHERE id IN (SELECT id FROM due)"
                )
                return self._rows(f"{update} RETURNING {sql.row}", (*which, *times))
            with transaction.atomic(using=self.alias):
                with connection.cursor() as cursor:
                    cursor.execute(due, which)
                    ids = [id for (id,) in cursor.fetchall()]
                if not ids:
                    return []
                marks = ", ".join(["%s"] * len(ids))
                update = f"UPDATE {EXECUTIONS} SET {change} WHERE id IN ({marks})"
                return self._take(connection, update, (*times, *ids), ids)

    def _acquire_due(
        self,
        connection: BaseDatabaseWrapper,
        due: str,
        which: tuple[Any, ...],
        lease: tuple[float, str],
    ) -> list[Claim | None]:
        """Lease those that waited longest for a place, each with one."""
        claims: list[Claim | None] = []
        with _translated(connection):
            for claim in filter(None, self._read_due(connection, due, which)):
                try:
                    claims += self._acquire_place(connection, claim, lease)
                except SagaLimitReached:
                    break
        return claims

    def _read_due(
        self, connection: BaseDatabaseWrapper, due: str, which: tuple[Any, ...]
    ) -> list[Claim | None]:
        sql = _sql(connection)
        query = due.replace("SELECT id", f"SELECT {sql.row}")
        return self._rows(query.replace(sql.dialect.skip_locked, ""), which)

    def next_waiting(self, saga: str, limit_key: str, limit: int) -> list[UUID]:
        connection = self._connection
        with _translated(connection):
            limit = min(limit, _free(saga, self.running(saga, limit_key)))
            if limit <= 0:
                return []
            with connection.cursor() as cursor:
                cursor.execute(_sql(connection).next_waiting, (saga, limit_key, limit))
                return [UUID(str(id)) for (id,) in cursor.fetchall()]

    def running(self, saga: str, limit_key: str) -> int:
        connection = self._connection
        with _translated(connection):
            return int(_fetch(connection, _sql(connection).running, (saga, limit_key))[0])

    def history(self, saga_id: UUID) -> list[SagaStepRecord]:
        with _translated(self._connection):
            return list(SagaStepRecord.objects.using(self.alias).filter(execution_id=saga_id))

    @contextmanager
    def atomic(self, lease: float) -> Iterator[None]:
        connection = self._connection
        _refuse_transaction(connection)
        committed: list[bool] = []
        session: Any = None
        try:
            with _translated(connection), transaction.atomic(using=self.alias):
                block, session = connection.atomic_blocks[-1], connection.connection
                # The first callback: what is raised after it comes from one of the handler's.
                transaction.on_commit(lambda: committed.append(True), using=self.alias)
                if connection.vendor == "postgresql":
                    # A driver that freezes in here would otherwise keep its rows locked for ever.
                    with connection.cursor() as cursor:
                        cursor.execute(
                            "SELECT set_config('idle_in_transaction_session_timeout', %s, true)",
                            [str(int(lease * 1000))],
                        )
                try:
                    yield
                finally:
                    # Else ours would only release the savepoint of one that the handler left open.
                    left = _roll_back_after(block, connection)
                if left:
                    raise TransactionLeftOpen(
                        f"An atomic step left a transaction open on {self.alias!r}. It was rolled "
                        "back; let every atomic() block end within the handler."
                    )
        except Exception as error:
            if not committed and connection.connection is not session:
                # Whatever the handler made of that, it did not fail: its transaction was lost.
                raise StorageUnavailable(
                    f"The database {self.alias!r}: an atomic step lost its session ({error!r})"
                ) from error
            if not committed:
                raise
            trace = traced(error)
            logger.error("An on_commit() callback of an atomic step failed; it is done\n%s", trace)

    def on_commit(self, function: Callable[[], object]) -> None:
        # As a function of its own: Django names what failed, and a partial has no name.
        transaction.on_commit(lambda: function(), using=self.alias, robust=True)

    def refuse_transaction(self) -> None:
        _refuse_transaction(self._connection)

    def end_transaction(self) -> None:
        connection = self._connection
        if blocks := list(filter(_is_testcase_s, connection.atomic_blocks)):
            _roll_back_after(blocks[-1], connection)
        else:
            connection.close()
            connection.connect()  # which also forgets the blocks that were open

    def execution(self, claim: Claim, state: State, at: datetime, leased: bool) -> SagaExecution:
        if claim.execution is None:
            claim.execution = SagaExecution.of(self.alias, _columns(claim), state)
        else:
            claim.execution.assign(state)
        execution = claim.execution
        execution.token, execution.updated_at = claim.token, at
        execution.finished_at = None if state.active else execution.finished_at or at
        if not leased:
            execution.lease_until = None
        return execution

    def _take(
        self,
        connection: BaseDatabaseWrapper,
        update: str,
        params: Sequence[Any],
        ids: Sequence[Any],
    ) -> list[Claim | None]:
        """Run an UPDATE and read the rows that it changed."""
        sql = _sql(connection)
        if sql.dialect.returns_updates:
            return self._rows(f"{update} RETURNING {sql.row}", params)
        with transaction.atomic(using=self.alias):
            with connection.cursor() as cursor:
                cursor.execute(update, params)
                if not cursor.rowcount:
                    return []
            marks = ", ".join(["%s"] * len(ids))
            query = f"SELECT {sql.row} FROM {EXECUTIONS} WHERE id IN ({marks})"
            return self._rows(query, [_uuid(id, connection) for id in ids])

    def _rows(self, query: str, params: Sequence[Any]) -> list[Claim | None]:
        """What the query finds; None for each row that cannot be read."""
        try:
            rows = SagaExecution.objects.using(self.alias).raw(query, tuple(params))
            return [_claim(row) for row in rows]
        except DataError as error:
            raise SagaError(f"What is stored cannot be read, was it edited? {error}") from error


def _refuse_transaction(connection: BaseDatabaseWrapper) -> None:
    if connection.in_atomic_block:
        # TestCase's own blocks stand for "no transaction", as they do for Django's durable.
        inside = not all(
            _is_testcase_s(block) or isinstance(block, _Together)
            for block in connection.atomic_blocks
        )
    else:
        inside = connection.connection is not None and not connection.autocommit
    if inside:
        raise InsideTransaction(
            f"A saga cannot be driven inside an open transaction on {connection.alias!r}: its "
            "checkpoints would not be durable. Call enqueue() there, which joins the "
            "transaction and starts on commit; under ATOMIC_REQUESTS decorate the view with "
            "django.db.transaction.non_atomic_requests."
        )


def _takes_place(write: Checkpoint | Creation) -> bool:
    """Whether it may have to wait for somebody else's transaction, or be tried again."""
    return isinstance(write, Creation) and write.limit_key is not None


class _Together(Atomic):
    """The transaction of several writes, each of which is as durable as one of its own."""


def _is_testcase_s(block: Atomic) -> bool:
    return getattr(block, "_from_testcase", False)


def _roll_back_after(block: Atomic, connection: BaseDatabaseWrapper) -> list[Atomic]:
    """End the blocks within this one that were left open; returns them."""
    blocks = connection.atomic_blocks
    left = blocks[blocks.index(block) + 1 :] if block in blocks else []
    for inner in reversed(left):
        inner.__exit__(TransactionLeftOpen, TransactionLeftOpen(), None)
    return left


def _insert(connection: BaseDatabaseWrapper, creation: Creation, place: int | None = None) -> Any:
    """Its row, or None where its id is taken."""
    try:
        return _fetch(connection, *_creation(connection, creation, place))
    except IntegrityError as error:
        if error.args[0] != _DUPLICATE_KEY or not _taken(connection, [creation.id]):
            raise
        return None


def _insert_limited(connection: BaseDatabaseWrapper, creation: Creation) -> Any:
    if creation.lease is None:  # it waits for its turn
        return _insert(connection, creation)
    saga, key = creation.saga, creation.limit_key
    assert key is not None
    try:
        return _with_place(connection, saga, key, partial(_insert, connection, creation))
    except SagaLimitReached as full:
        if _taken(connection, [creation.id]):
            return None
        hint = "nothing is stored. enqueue() it, which waits for its turn, or try again later"
        raise SagaLimitReached(f"Saga {saga} was not started: {full}; {hint}.") from None


def _with_place(
    connection: BaseDatabaseWrapper, saga: str, key: str, use: Callable[[int | None], T]
) -> T:
    """Call it with the number of a place that is free, and again where another was faster.

    Raises SagaLimitReached where there is none; None is as good as one where there is no limit.
    """
    most, tries = registry.limit_of(saga), 0
    while True:
        place = None
        if most is not None:
            place, running = _fetch(connection, _sql(connection).place, (saga, key) * 3)
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


def _sources_of(saga: str, keys: Iterable[tuple[str, bool, bool, int]]) -> Iterator[_Source]:
    for key, is_due, waits, running in keys:
        if is_due:
            yield _Source(saga, key)
        if waits and (free := _free(saga, running)):
            yield _Source(saga, key, True, free)


def _free(saga: str, running: int) -> int:
    most = registry.limit_of(saga)
    return sys.maxsize if most is None else max(0, most - int(running))


def _claim(row: SagaExecution) -> Claim | None:
    try:
        state = row.state
        if not (isinstance(row.created_at, datetime) and isinstance(row.updated_at, datetime)):
            raise ValueError("a time is missing")
    except ValueError as error:
        # Somebody edited it by hand; it must not stand in the way of the others.
        logger.error("Saga execution %s cannot be read: %s", row.pk, told(error))
        return None
    at = _utc(row.db_now)  # type: ignore[attr-defined]
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


def _columns(claim: Claim) -> dict[str, Any]:
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


def _is_leased(claim: Claim) -> bool:
    return claim.execution is not None and claim.execution.lease_until is not None


def _is_held(claim: Claim) -> bool:
    """Whether its lease lasts still; a past one does not keep an execution from being paused."""
    until = claim.execution.lease_until if claim.execution else None
    return until is not None and until > claim.at


def _oldest_first(claims: list[Claim]) -> list[Claim]:
    return sorted(claims, key=lambda claim: claim.execution.created_at)  # type: ignore[union-attr]


def _sql(connection: BaseDatabaseWrapper) -> Statements:
    try:
        return STATEMENTS[connection.vendor]
    except KeyError:
        raise SagaError(
            f"django-saga does not know the database {connection.vendor!r}; "
            "it runs on PostgreSQL, SQLite and MariaDB."
        ) from None


def _store_all(
    connection: BaseDatabaseWrapper,
    contexts: Mapping[UUID, str],
    keys: Mapping[UUID, str],
    alike: tuple[Any, ...],
) -> set[UUID]:
    sql, ids = _sql(connection), [_uuid(id, connection) for id in contexts]
    columns = (ids, list(contexts.values()), [keys.get(id) for id in contexts])
    params = columns if sql.dialect.arrays else chain.from_iterable(zip(*columns, strict=True))
    given = sql.dialect.given.format(", ".join(["(%s, %s, %s)"] * len(ids)))
    with connection.cursor() as cursor:
        cursor.execute(sql.create_many.format(given), [*params, *alike])
        return {UUID(str(id)) for (id,) in cursor.fetchall()}


def _taken(connection: BaseDatabaseWrapper, ids: Iterable[UUID]) -> list[UUID]:
    """Which of them there are."""
    params = [_uuid(id, connection) for id in ids]
    marks = ", ".join(["%s"] * len(params))
    with connection.cursor() as cursor:
        cursor.execute(_sql(connection).taken.format(marks), params)
        return [UUID(str(id)) for (id,) in cursor.fetchall()]


def _fetch(connection: BaseDatabaseWrapper, sql: str, params: Sequence[Any]) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()


def _creation(
    connection: BaseDatabaseWrapper, creation: Creation, place: int | None = None
) -> Statement:
    state, retry_of, sql = creation.state, creation.retry_of, _sql(connection)
    limited = creation.limit_key is not None
    return sql.create_limited if limited else sql.create, (
        _uuid(creation.id, connection),
        creation.saga,
        _json(state.plan),
        state.context,
        retry_of and _uuid(retry_of, connection),
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


def _created(creation: Creation, row: Any) -> Claim | None:
    if row is None:
        return None
    return Claim(
        creation.id,
        creation.saga,
        1,
        creation.state,
        _utc(row[0]),
        wait=creation.wake or 0.0,
        driver=creation.driver,
        retry_of=creation.retry_of,
        paused=bool(row[1]),
        limit_key=creation.limit_key,
        place=None if creation.limit_key is None else creation.lease is not None,
    )


def _at_once(connection: BaseDatabaseWrapper, checkpoint: Checkpoint) -> Statement:
    """All of a checkpoint in one statement."""
    kind, params = _update_of(checkpoint, connection)
    record, cause = checkpoint.record, checkpoint.cause
    about = None if record is None else _kind_of(checkpoint)
    if cause is not None:
        params += _cause_params(cause)
    if record is not None:
        params += _record_params(checkpoint)
    return _sql(connection).checkpoint(kind, about, cause is not None), params


def _saved(row: Any) -> Saved | None:
    return None if row is None else Saved(_utc(row[1]), row[0], row[2], row[3])


def _statement(connection: BaseDatabaseWrapper, write: Checkpoint | Creation) -> Statement:
    if isinstance(write, Creation):
        return _creation(connection, write)
    return _at_once(connection, write)


def _came_of(write: Checkpoint | Creation, row: Any) -> Written:
    if isinstance(write, Creation):
        return _created(write, row)
    return _saved(row) or _taken_over(write)


def _taken_over(checkpoint: Checkpoint) -> LeaseLost:
    return LeaseLost(
        f"Saga execution {checkpoint.id} was taken over while step {checkpoint.before.step} was "
        f"in {checkpoint.before.action}; nothing was written."
    )


def _save(connection: BaseDatabaseWrapper, sql: Statements, checkpoint: Checkpoint) -> Saved | None:
    """The same in several statements, of which the first changes the row, or nothing is done."""
    id = _uuid(checkpoint.id, connection)
    kind, params = _update_of(checkpoint, connection)
    update, at, record_id = sql.update(*kind), datetime.now(UTC), None
    with connection.cursor() as cursor:
        if sql.dialect.returns_updates:
            cursor.execute(f"{update} RETURNING {ASKED}", params)
            asked = cursor.fetchone()
        else:
            cursor.execute(update, params)
            asked = _fetch(connection, sql.asked, [id]) if cursor.rowcount else None
    if asked is None:
        return None
    if checkpoint.record is not None:
        statement = sql.record(*_kind_of(checkpoint))
        record_id, created_at = _fetch(connection, statement, (*_record_params(checkpoint), id))
        at = _utc(created_at)
    if checkpoint.cause is not None:
        with connection.cursor() as cursor:
            cursor.execute(sql.group, _cause_params(checkpoint.cause))
    return Saved(at, record_id, asked[0], bool(asked[1]))


def _update_of(
    checkpoint: Checkpoint, connection: BaseDatabaseWrapper
) -> tuple[tuple[tuple[str, ...], bool, bool, bool], tuple[Any, ...]]:
    """Which update it is, and its parameters: only what changed is sent and logged."""
    before, after = checkpoint.before, checkpoint.after
    changed = changed_columns(before, after)
    if "effects" in changed:
        changed["effects"] = _json(changed["effects"])
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
        _uuid(checkpoint.id, connection),
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


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _uuid(value: UUID, connection: BaseDatabaseWrapper) -> Any:
    return SagaExecution._meta.pk.get_db_prep_value(value, connection)


def _utc(value: Any) -> datetime:
    """A time as each database returns it: seconds of the epoch, ISO 8601, a datetime."""
    if isinstance(value, float):
        return datetime.fromtimestamp(value, UTC)
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    assert isinstance(moment, datetime)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


class _translated:
    """Tell a database that is away, or not migrated, from a fault in what was asked."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        away = (OperationalError, InterfaceError, ProgrammingError)
        if isinstance(error, away) or is_read_only(error):
            assert isinstance(error, Exception)
            _raise_translated(error, self._connection)


def _raise_translated(error: Exception, connection: BaseDatabaseWrapper) -> None:
    if _is_outdated(error):
        raise SagaError(
            f"The database {connection.alias!r} has no tables of django-saga, or older ones; "
            f"run: manage.py migrate django_saga --database {connection.alias} ({error})"
        ) from error
    if isinstance(error, ProgrammingError):
        return
    if not connection.in_atomic_block:
        connection.close()  # what is left of it must not serve the next statement
    raise StorageUnavailable(f"The database {connection.alias!r}: {error}") from error


def is_read_only(error: BaseException | None) -> bool:
    """Whether the server takes no writes any more, as after a failover; the next one may."""
    return isinstance(error, InternalError) and _sqlstate(error) == "25006"


def _sqlstate(error: Exception) -> str | None:
    return getattr(error.__cause__, "sqlstate", None)  # psycopg has it


def _is_outdated(error: Exception) -> bool:
    """Whether a table or a column is missing; asks nothing of a transaction that is broken."""
    code = error.args[0] if error.args else None  # MariaDB; SQLite has its text there
    return (
        _sqlstate(error) in ("42P01", "42703")
        or code in (1146, 1054)
        or any(lack in str(code) for lack in _SQLITE_LACKS)
    )


Statement = tuple[str, tuple[Any, ...]]  # and its parameters

_FASTER = 1_000  # times that others take the place that was free
_TRIES = 5  # to acquire what is released again and again
_SQLITE_LACKS = ("no such table", "no such column", "has no column named")
_DEADLOCK = 1213  # MariaDB's, of two that would take one place
_DUPLICATE_KEY = 1062  # MariaDB's; the others skip duplicates by themselves
