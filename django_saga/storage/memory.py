"""Executions and records in this process alone: for tests, and for what need not outlive it."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from django_saga import registry
from django_saga.exceptions import (
    LeaseLost,
    SagaAlreadyRunning,
    SagaLimitReached,
    SagaNotFound,
)
from django_saga.limits import reached
from django_saga.machine import State, Status
from django_saga.storage.base import Checkpoint, Claim, SagaStorage, Saved
from django_saga.texts import traced

if TYPE_CHECKING:
    from django_saga.models import SagaExecution, SagaStepRecord

logger = logging.getLogger("django_saga.storage")


class _Row(Struct):
    saga: str
    initial_context: str
    created_at: float
    updated_at: float
    state: State
    driver: str
    token: int = 1
    lease_until: float | None = None
    wake_at: float | None = None
    grace_until: float | None = None
    finished_at: float | None = None
    retry_of: UUID | None = None
    limit_key: str | None = None
    placed: bool = False  # it counts among those that run at once
    records: list[tuple[Checkpoint, float, str]] = []

    @property
    def lacks_place(self) -> bool:
        return self.state.active and self.limit_key is not None and not self.placed


class MemorySagaStorage(SagaStorage):
    """Keeps all in a dict; thread-safe. ``clock`` gives seconds since the epoch."""

    blocking = False

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._rows: dict[UUID, _Row] = {}
        self._lock = threading.RLock()

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
        now = self._clock()
        row = _Row(saga, state.context, now, now, state, driver, retry_of=retry_of)
        row.limit_key = limit_key
        row.lease_until = _after(now, lease)
        row.wake_at = _after(now, wake)
        row.grace_until = _after(now, grace)
        with self._lock:
            if saga_id in self._rows:
                return None
            if lease is not None and row.lacks_place:
                self._place(
                    row, f"Saga {saga} was not started", "; nothing is stored. enqueue() it"
                )
            self._rows[saga_id] = row
            return self._claim(saga_id, row, now)

    def create_many(
        self,
        saga: str,
        state: State,
        contexts: Mapping[UUID, str],
        *,
        grace: float | None = None,
        limit_keys: Mapping[UUID, str] | None = None,
    ) -> list[UUID]:
        keys = limit_keys or {}
        with self._lock:  # all of them, or none that others could see without the rest
            states = {id: replace(state, context=context) for id, context in contexts.items()}
            return [
                id
                for id, one in states.items()
                if self.create(id, saga, one, grace=grace, limit_key=keys.get(id))
            ]

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
        with self._lock:
            row = self._rows.get(saga_id)
            if row is None:
                raise SagaNotFound(f"No saga execution has the id {saga_id}.")
            if saga is not None and row.saga != saga:
                raise SagaNotFound(
                    f"The id {saga_id} belongs to an execution of {row.saga!r}, not of {saga!r}."
                )
            now = self._clock()
            if not row.state.active:
                return self._claim(saga_id, row, now)
            if not _past(row.lease_until, now) and row.token != token:
                raise SagaAlreadyRunning(
                    f"Saga {row.saga} {saga_id} is being driven by {row.driver}, in "
                    f"{row.state.action} of step {row.state.step}."
                )
            if row.lacks_place and not by_hand and row.token != token:
                self._place(row, f"Saga {row.saga} {saga_id} waits")
            return self._take(saga_id, row, now, driver, lease)

    def checkpoint(self, checkpoint: Checkpoint, *, inside: bool = False) -> Saved:
        before = checkpoint.before
        with self._lock:
            row = self._rows.get(checkpoint.id)
            if (
                row is None
                or row.token != checkpoint.token
                or row.state.status != before.status
                or row.state.step != before.step
                or row.state.action != before.action
                or row.state.attempt != before.attempt
            ):
                raise LeaseLost(
                    f"Saga execution {checkpoint.id} was taken over while step {before.step} was "
                    f"in {before.action}; nothing was written."
                )
            now = self._clock()
            records = row.records
            if checkpoint.record is not None:
                records = [*records, (checkpoint, now, row.driver)]
            turned = checkpoint.after.status is Status.COMPENSATING
            turned_unplaced = turned and not row.placed  # it need not wait for a place
            # All of it at once, or nothing where Ctrl-C comes in between.
            self._rows[checkpoint.id] = replace(
                row,
                state=checkpoint.after,
                updated_at=now,
                lease_until=_after(now, checkpoint.lease),
                wake_at=_after(now, checkpoint.wake),
                grace_until=_after(now, checkpoint.grace),
                finished_at=None if checkpoint.after.active else now,
                placed=row.placed and checkpoint.after.active,
                limit_key=None if turned_unplaced else row.limit_key,
                records=records,
            )
            return Saved(_utc(now), len(records))

    def renew(self, leases: Sequence[tuple[UUID, int]], *, lease: float) -> set[UUID]:
        renewed = set()
        with self._lock:
            for saga_id, token in leases:
                row = self._rows.get(saga_id)
                if row and row.token == token and row.lease_until is not None and row.state.active:
                    row.lease_until = self._clock() + lease
                    renewed.add(saga_id)
        return renewed

    def release(
        self, saga_id: UUID, token: int, *, unstarted: bool = False, grace: float | None = None
    ) -> None:
        with self._lock:
            row = self._rows.get(saga_id)
            if row and row.token == token and row.state.active:
                row.lease_until = None
                row.grace_until = _after(self._clock(), grace)
                if unstarted:
                    row.state = replace(row.state, in_flight=False)

    def due(
        self,
        limit: int,
        *,
        driver: str = "",
        lease: float | None = None,
        grace: float | None = None,
        saga: str | None = None,
    ) -> list[Claim]:
        with self._lock:
            now = self._clock()
            found = [
                (saga_id, row)
                for saga_id, row in self._rows.items()
                if row.state.active
                and (saga is None or row.saga == saga)
                and all(_past(t, now) for t in (row.lease_until, row.wake_at, row.grace_until))
            ]
            found = _shared(self._placeable(sorted(found, key=_age)), limit)
            if lease is not None:
                for _, row in found:
                    row.placed = row.placed or row.lacks_place
                return [self._take(saga_id, row, now, driver, lease) for saga_id, row in found]
            for _, row in found:
                if grace is not None:
                    row.grace_until = now + min(max(grace, now - row.updated_at), 10 * grace)
            return [self._claim(saga_id, row, now) for saga_id, row in found]

    def next_waiting(self, saga: str, limit_key: str, limit: int) -> list[UUID]:
        with self._lock:
            now = self._clock()
            waiting = [
                (saga_id, row)
                for saga_id, row in self._rows.items()
                if (row.saga, row.limit_key) == (saga, limit_key)
                and row.lacks_place
                and _past(row.wake_at, now)
            ]
            found = self._placeable(sorted(waiting, key=_age))
            return [saga_id for saga_id, _ in found[:limit]]

    def running(self, saga: str, limit_key: str) -> int:
        with self._lock:
            rows = self._rows.values()
            return sum(r.placed and (r.saga, r.limit_key) == (saga, limit_key) for r in rows)

    def history(self, saga_id: UUID) -> list[SagaStepRecord]:
        from django_saga.models import SagaStepRecord

        records = []
        row = self._rows.get(saga_id)
        for number, (checkpoint, at, driver) in enumerate(row.records if row else (), 1):
            record = checkpoint.record
            assert record is not None
            error = record.error
            records.append(
                SagaStepRecord(
                    id=number,
                    execution_id=saga_id,
                    step=record.step,
                    action=record.action.value,
                    attempt=record.attempt,
                    outcome=record.outcome.value,
                    error_type=error.type if error else "",
                    error_message=error.message if error else "",
                    traceback=error.traceback if error else "",
                    changes=checkpoint.changes,
                    duration=checkpoint.duration,
                    token=checkpoint.token,
                    driver=driver,
                    created_at=_utc(at),
                )
            )
        return records

    @contextmanager
    def atomic(self, lease: float) -> Iterator[None]:
        """Nothing here can be rolled back; an atomic step's handler runs as any other."""
        yield

    def on_commit(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            logger.error("What was to be done on commit failed: %s", traced(error))

    def refuse_transaction(self) -> None:
        """A caller's transaction is no concern of this storage."""

    def end_transaction(self) -> None:
        """See :meth:`refuse_transaction`."""

    def execution(self, claim: Claim, state: State, at: datetime, leased: bool) -> SagaExecution:
        from django_saga.models import SagaExecution

        row = self._rows[claim.id]
        columns = {
            "id": claim.id,
            "saga": row.saga,
            "plan": msgspec.to_builtins(state.plan),
            "initial_context": row.initial_context,
            "retry_of_id": row.retry_of,
            "limit_key": row.limit_key,
            "created_at": _utc(row.created_at),
            "token": claim.token,
            "driver": row.driver,
            "lease_until": _utc(row.lease_until) if leased and row.lease_until else None,
            "wake_at": _utc(row.wake_at) if row.wake_at else None,
            "updated_at": at,
            "finished_at": _utc(row.finished_at) if row.finished_at else None,
        }
        return SagaExecution.of(None, columns, state)

    def _place(self, row: _Row, what: str, hint: str = "") -> None:
        assert row.limit_key is not None
        most, running = registry.limit_of(row.saga), self.running(row.saga, row.limit_key)
        if most is not None and running >= most:
            why = reached(row.saga, row.limit_key, running, most)
            raise SagaLimitReached(f"{what}: {why}{hint}.")
        row.placed = True

    def _placeable(self, found: list[tuple[UUID, _Row]]) -> list[tuple[UUID, _Row]]:
        """Without those for which there would be no place, if each before them had one."""
        taken: Counter[tuple[str, str]] = Counter()
        placeable = []
        for saga_id, row in found:
            if row.lacks_place:
                key = (row.saga, row.limit_key or "")
                most = registry.limit_of(row.saga)
                if most is not None and self.running(*key) + taken[key] >= most:
                    continue
                taken[key] += 1
            placeable.append((saga_id, row))
        return placeable

    def _take(self, saga_id: UUID, row: _Row, now: float, driver: str, lease: float) -> Claim:
        row.token += 1
        row.driver = driver
        row.lease_until = now + lease
        row.grace_until = None
        return self._claim(saga_id, row, now)

    def _claim(self, saga_id: UUID, row: _Row, now: float) -> Claim:
        wait = max(0.0, row.wake_at - now) if row.wake_at else 0.0
        return Claim(
            saga_id,
            row.saga,
            row.token,
            row.state,
            _utc(now),
            wait,
            limit_key=row.limit_key,
            place=None if row.limit_key is None else row.placed,
        )


def _age(pair: tuple[UUID, _Row]) -> float:
    return pair[1].created_at


def _shared(found: list[tuple[UUID, _Row]], limit: int) -> list[tuple[UUID, _Row]]:
    """The first of each saga, then the second of each, up to the limit; in the order given."""
    seen: Counter[str] = Counter()
    turns = {}
    for saga_id, row in found:
        turns[saga_id] = (seen[row.saga], random.random())  # as there may be more than the limit
        seen[row.saga] += 1
    return sorted(sorted(found, key=lambda pair: turns[pair[0]])[:limit], key=_age)


def _after(now: float, seconds: float | None) -> float | None:
    return None if seconds is None else now + seconds


def _past(moment: float | None, now: float) -> bool:
    return moment is None or moment <= now


def _utc(moment: float) -> datetime:
    return datetime.fromtimestamp(moment, UTC)
