"""Sagas whose handlers note every call outside of all storage, and what must be true of the notes.

The notes are lists in this process: for faults that the process survives.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID

from django.contrib.auth.models import Group

from django_saga import (
    Retry,
    Saga,
    SagaContext,
    SagaNotFound,
    SagaStepHandler,
    current_step,
    recover_saga,
)
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage, SagaStorage


class Note(NamedTuple):
    """One call of a handler."""

    action: str
    step: str
    attempt: int
    key: str


CALLS: dict[UUID, list[Note]] = defaultdict(list)
EFFECTS: dict[UUID, list[Note]] = defaultdict(list)  # of those calls that came to have one


@dataclass
class Trip(SagaContext):
    alias: str = ""
    """The database where the atomic step writes; empty: nowhere."""
    fails: bool = False
    seats: int = 0


def called() -> None:
    _note(CALLS)


def acted() -> None:
    _note(EFFECTS)


def _note(where: dict[UUID, list[Note]]) -> None:
    step = current_step()
    where[step.saga_id].append(
        Note(step.action.value, step.step, step.attempt, step.idempotency_key)
    )


class Write(SagaStepHandler[Trip]):
    atomic = True

    def act(self, context: Trip) -> None:
        called()
        if context.alias:
            Group.objects.using(context.alias).create(name=str(current_step().saga_id))
        context.seats += 1
        acted()

    def compensate(self, context: Trip) -> None:
        called()
        if context.alias:
            groups = Group.objects.using(context.alias)
            groups.get(name=str(current_step().saga_id)).delete()
        acted()


class Book(SagaStepHandler[Trip]):
    """Its compensation is refused at first."""

    compensation_retry = Retry(attempts=3, delay=0)

    async def act(self, context: Trip) -> None:
        called()
        acted()

    async def compensate(self, context: Trip) -> None:
        called()
        if current_step().attempt == 1:
            raise ConnectionRefusedError
        acted()


class Charge(SagaStepHandler[Trip]):
    """Refused at first, and where it fails each time; its timeout takes an alarm in a main thread.

    It comes last, so that a saga that fails meets it all: each step more makes what is to be struck
    longer, and every strike take longer too.
    """

    retry = Retry(attempts=2, delay=0.005)  # so long that a busy machine has to wait, too
    timeout = 600

    def act(self, context: Trip) -> None:
        called()
        if current_step().attempt == 1:
            raise ConnectionRefusedError
        if context.fails:
            raise ValueError("no seats")
        acted()

    def compensate(self, context: Trip) -> None:
        called()
        acted()


class TripSaga(Saga[Trip]):
    name = "tests.trip"
    steps = [Write, Book, Charge]


class Clock:
    """A memory storage's, which can be put forward."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def make_storage(name: str) -> SagaStorage:
    """The storage ``memory``, or the one on a database alias."""
    return MemorySagaStorage(Clock()) if name == "memory" else DjangoSagaStorage(name)


def let_the_lease_run_out(saga_id: UUID, storage: SagaStorage) -> None:
    if isinstance(storage, MemorySagaStorage):
        storage._clock.now += 100_000  # type: ignore[attr-defined]
    else:
        rows = SagaExecution.objects.using(storage.alias).filter(pk=saga_id)
        rows.update(lease_until=None, wake_at=None, grace_until=None)


def heal(saga_id: UUID, storage: SagaStorage) -> str:
    """Recover an execution until it has ended; its status, empty where it was never stored."""
    for _ in range(20):
        let_the_lease_run_out(saga_id, storage)
        try:
            execution = recover_saga(saga_id, storage=storage)
        except SagaNotFound:
            return ""
        if execution.is_final:
            break
    return str(execution.status)


def violations(
    saga_id: UUID, storage: SagaStorage, status: str, *, fails: bool, may_turn_back: bool = False
) -> list[str]:
    """What is wrong with an execution that was healed, by the notes of its calls.

    ``may_turn_back``: an exception that its consumer met may have turned it back.
    """
    expected = {"FAILED"} if fails else {"COMPLETED", "FAILED"} if may_turn_back else {"COMPLETED"}
    calls, found = CALLS[saga_id], []
    if not status:
        return ["a call of what was never stored"] if calls else []
    if status not in expected:
        found.append(f"it ended as {status}")
    return found + _of_history(saga_id, storage, calls) + _of_effects(saga_id, storage, status)


def _of_history(saga_id: UUID, storage: SagaStorage, calls: list[Note]) -> list[str]:
    found = []
    records = [(r.action, r.step, r.attempt, r.outcome) for r in storage.history(saga_id)]

    def way(entry: Any) -> tuple[str, str]:
        return entry[0], entry[1]

    for (action, step), entries in groupby(sorted(records, key=way), key=way):
        attempts = [attempt for _, _, attempt, _ in entries]
        if attempts != list(range(1, len(attempts) + 1)):
            found.append(f"the history of {action} {step} has the attempts {attempts}")
    for (action, step), entries in groupby(sorted(calls, key=way), key=way):
        notes = list(entries)
        if len({note.attempt for note in notes}) < len(notes):
            found.append(f"an attempt of {action} {step} was called twice")
        if len({note.key for note in notes}) > 1:
            found.append(f"{action} {step} was called with several keys")
    recorded = {record[:3] for record in records}
    found += [f"the call {note} is forgotten" for note in calls if note[:3] not in recorded]
    done = [way(record) for record in records if record[3] == "DONE"]
    if len(set(done)) < len(done):
        found.append(f"recorded as done twice: {done}")
    return found


def _of_effects(saga_id: UUID, storage: SagaStorage, status: str) -> list[str]:
    found, effects = [], EFFECTS[saga_id]
    acts = unique(note.step for note in effects if note.action == "act")
    undone = unique(note.step for note in effects if note.action == "compensate")
    if status == "COMPLETED":
        if undone or any(note.action == "compensate" for note in CALLS[saga_id]):
            found.append(f"completed, and yet compensated: {undone}")
        if acts != [step.name for step in TripSaga.steps]:  # type: ignore[union-attr]
            found.append(f"completed with the effects of {acts}")
    else:
        found += [f"{step} stands" for step in acts if step not in undone and step != "Write"]
        order = [step for step in undone if step in acts]
        if order != sorted(order, key=acts.index, reverse=True):
            found.append(f"{acts} were undone in the order {order}")
        late = [n.step for n in effects[_last_act(effects) :] if n.action == "compensate"]
        found += [f"{step} was done again once undone" for step in undone if step not in late]
    if isinstance(storage, DjangoSagaStorage):
        written = Group.objects.using(storage.alias).filter(name=str(saga_id)).count()
        if written != (status == "COMPLETED"):
            found.append(f"{status}, and the atomic step's row is there {written} times")
    return found


def _last_act(effects: list[Note]) -> int:
    return max((i for i, note in enumerate(effects) if note.action == "act"), default=0)


def unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, with a deadline that only a failure meets."""
    deadline = time.monotonic() + 60
    while not (met := condition()):
        assert time.monotonic() < deadline, "what the test waits for did not come about"
        time.sleep(0.005)
    return met
