"""Executions and records in the database of the Django project."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.db import (
    DatabaseError,
    IntegrityError,
    connections,
    router,
    transaction,
)

from django_saga.exceptions import (
    LeaseLost,
    SagaAlreadyRunning,
    SagaError,
    SagaNotFound,
    SagaPaused,
    StorageUnavailable,
    TransactionLeftOpen,
)
from django_saga.machine import State
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.storage.base import Checkpoint, Claim, Creation, SagaStorage, Saved, Written
from django_saga.storage.cursors import fetch, kept_cursors
from django_saga.storage.places import (
    DUPLICATE_KEY,
    acquire_place,
    free_places,
    insert,
    insert_limited,
    store_all,
    taken,
    takes_place,
)
from django_saga.storage.reading import columns_of_claim, is_held, is_leased, rows, take
from django_saga.storage.sql import EXECUTIONS
from django_saga.storage.sweeping import Terms, claim_due
from django_saga.storage.transactions import (
    is_testcase_s,
    refuse_transaction,
    roll_back_after,
    together,
)
from django_saga.storage.translating import translated
from django_saga.storage.writing import (
    at_once,
    came_of,
    created,
    save,
    saved_by,
    sql_of,
    statement_of,
    taken_over,
    to_json,
    uuid_of,
)
from django_saga.texts import traced

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


logger = logging.getLogger("django_saga.storage")


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
            refuse_transaction(connection)
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
        with translated(connection):
            if limit_key is None:
                row = insert(connection, creation)
            else:
                row = insert_limited(connection, creation)
        return created(creation, row)

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
        alike = (saga, to_json(state.plan), state.step, grace)
        new = dict(contexts)
        with translated(connection):
            while new:
                try:
                    stored = store_all(connection, new, keys, alike)
                except IntegrityError as error:
                    if error.args[0] != DUPLICATE_KEY:
                        raise
                    for id in taken(connection, new):
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
            refuse_transaction(connection)
        pk = uuid_of(saga_id, connection)
        params = (lease, driver, pk, saga or "", saga is None, by_hand, token)
        query = f"SELECT {sql_of(connection).row} FROM {EXECUTIONS} WHERE id = %s"
        for _ in range(_TRIES):
            with translated(connection):
                claims = take(connection, sql_of(connection).acquire, params, [saga_id])
                if claims and claims[0]:
                    return claims[0]
                claim = next(iter(rows(connection, query, [pk])), None)
            if claim is None:
                raise SagaNotFound(f"No saga execution has the id {saga_id}.")
            if saga is not None and claim.saga != saga:
                raise SagaNotFound(
                    f"The id {saga_id} belongs to an execution of {claim.saga!r}, not of {saga!r}."
                )
            if not claim.state.active:
                return claim
            if claim.paused and not is_held(claim):
                raise SagaPaused(
                    f"Saga {claim.saga} {saga_id} waits: it is paused before {claim.state.action} "
                    f"of step {claim.state.step}, and goes on when that is resumed."
                )
            if is_leased(claim):
                assert claim.execution is not None
                raise SagaAlreadyRunning(
                    f"Saga {claim.saga} {saga_id} is being driven by {claim.execution.driver}, in "
                    f"{claim.state.action} of step {claim.state.step}; its lease lasts until "
                    f"{claim.execution.lease_until:%Y-%m-%d %H:%M:%S} UTC."
                )
            if claim.place is False:
                with translated(connection):
                    claims = acquire_place(connection, claim, (lease, driver))
                if claims and claims[0]:
                    return claims[0]
            # It was released between the two statements.
        raise SagaError(f"Saga execution {saga_id} cannot be leased; was its row edited?")

    def checkpoint(self, checkpoint: Checkpoint, *, inside: bool = False) -> Saved:
        connection = self._connection
        if not inside:
            refuse_transaction(connection)
        sql = sql_of(connection)
        with translated(connection):
            if sql.dialect.one_statement:
                saved = saved_by(fetch(connection, *at_once(connection, checkpoint)))
            elif checkpoint.record is None and checkpoint.cause is None:
                saved = save(connection, sql, checkpoint)
            else:
                with transaction.atomic(using=self.alias, savepoint=False):
                    saved = save(connection, sql, checkpoint)
        if saved is None:
            raise taken_over(checkpoint)
        return saved

    def write_together(self, writes: Sequence[Checkpoint | Creation]) -> list[Written]:
        if len(writes) == 1 or any(map(takes_place, writes)):
            return super().write_together(writes)
        connection = self._connection
        outcomes: list[Written] = []
        try:
            refuse_transaction(connection)
            with translated(connection), together(connection):
                outcomes = self._write_all(connection, writes)
        except StorageUnavailable as error:
            if outcomes:  # the commit's answer was lost: each must look what became of it
                return [error] * len(writes)
        except (SagaError, DatabaseError, ValueError):
            outcomes = []  # though all were: a deferred constraint refused the commit
        # Where one could not be written, none was: it must not be in the way of the others.
        return outcomes or super().write_together(writes)

    def _write_all(
        self, connection: BaseDatabaseWrapper, writes: Sequence[Checkpoint | Creation]
    ) -> list[Written]:
        if not sql_of(connection).dialect.one_statement:
            return [self._write_or_lost(write) for write in writes]
        statements = [statement_of(connection, write) for write in writes]
        with ExitStack() as stack:
            cursors = kept_cursors(connection, len(writes)) or [
                stack.enter_context(connection.cursor()) for _ in writes
            ]
            for cursor, statement in zip(cursors, statements, strict=True):
                cursor.execute(*statement)
            rows = [cursor.fetchone() for cursor in cursors]
        return [came_of(write, row) for write, row in zip(writes, rows, strict=True)]

    def _write_or_lost(self, write: Checkpoint | Creation) -> Written:
        try:
            return self.write(write)
        except LeaseLost as lost:  # nothing was written, which is no reason to roll back
            return lost

    def renew(self, leases: Sequence[tuple[UUID, int]], *, lease: float) -> set[UUID]:
        if not leases:
            return set()
        connection = self._connection
        sql = sql_of(connection)
        which = sql.dialect.leases.format(", ".join(["(%s, %s)"] * len(leases)))
        held = [value for id, token in leases for value in (uuid_of(id, connection), token)]
        with translated(connection):
            with connection.cursor() as cursor:
                cursor.execute(f"{sql.renew} {which}", [lease, *held])
                if cursor.rowcount == len(leases):
                    return {id for id, _ in leases}
            query = f"SELECT {sql.row} FROM {EXECUTIONS} WHERE {which}"
            found = filter(None, rows(connection, query, held))
            return {claim.id for claim in found if claim.state.active and is_leased(claim)}

    def release(
        self, saga_id: UUID, token: int, *, unstarted: bool = False, grace: float | None = None
    ) -> None:
        connection = self._connection
        refuse_transaction(connection)  # it would lock the row there instead
        with translated(connection), connection.cursor() as cursor:
            params = (not unstarted, grace, uuid_of(saga_id, connection), token)
            cursor.execute(sql_of(connection).release, params)

    def due(
        self,
        limit: int,
        *,
        driver: str = "",
        lease: float | None = None,
        grace: float | None = None,
        saga: str | None = None,
    ) -> list[Claim]:
        connection = self._connection
        if lease is not None:
            refuse_transaction(connection)
        with translated(connection):
            return claim_due(connection, limit, Terms(driver, lease, grace), saga)

    def next_waiting(self, saga: str, limit_key: str, limit: int) -> list[UUID]:
        connection = self._connection
        with translated(connection):
            limit = min(limit, free_places(saga, self.running(saga, limit_key)))
            if limit <= 0:
                return []
            with connection.cursor() as cursor:
                cursor.execute(sql_of(connection).next_waiting, (saga, limit_key, limit))
                return [UUID(str(id)) for (id,) in cursor.fetchall()]

    def running(self, saga: str, limit_key: str) -> int:
        connection = self._connection
        with translated(connection):
            return int(fetch(connection, sql_of(connection).running, (saga, limit_key))[0])

    def history(self, saga_id: UUID) -> list[SagaStepRecord]:
        with translated(self._connection):
            return list(SagaStepRecord.objects.using(self.alias).filter(execution_id=saga_id))

    @contextmanager
    def atomic(self, lease: float) -> Iterator[None]:
        connection = self._connection
        refuse_transaction(connection)
        committed: list[bool] = []
        session: Any = None
        try:
            with translated(connection), transaction.atomic(using=self.alias):
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
                    left = roll_back_after(block, connection)
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
        refuse_transaction(self._connection)

    def end_transaction(self) -> None:
        connection = self._connection
        if blocks := list(filter(is_testcase_s, connection.atomic_blocks)):
            roll_back_after(blocks[-1], connection)
        else:
            connection.close()
            connection.connect()  # which also forgets the blocks that were open

    def execution(self, claim: Claim, state: State, at: datetime, leased: bool) -> SagaExecution:
        if claim.execution is None:
            claim.execution = SagaExecution.of(self.alias, columns_of_claim(claim), state)
        else:
            claim.execution.assign(state)
        execution = claim.execution
        execution.token, execution.updated_at = claim.token, at
        execution.finished_at = None if state.active else execution.finished_at or at
        if not leased:
            execution.lease_until = None
        return execution


_TRIES = 5  # to acquire what is released again and again
