"""The sagas that the batteries break, and how each must end."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, NamedTuple

from django.contrib.auth.models import Group
from django.dispatch import Signal

from django_saga import Fallback, Retry, Saga, SagaContext, SagaStepHandler, current_step, signals
from django_saga.models import SagaExecution
from tests.faults import ledger

ENDS = ("saga_completed", "saga_failed", "saga_stuck")
AT_ONCE = Retry(attempts=3, delay=0)


@dataclass
class Trial(SagaContext):
    """Where the steps have their effects."""

    ledger: str
    """The address of the ledger's process."""
    database: str = "default"
    """The alias under which the driving process knows the sagas' database."""


class Remote(SagaStepHandler[Trial]):
    """A call to another service."""

    compensation_retry = AT_ONCE

    def act(self, context: Trial) -> None:
        note(context)

    def compensate(self, context: Trial) -> None:
        note(context)


class AsyncRemote(SagaStepHandler[Trial]):
    compensation_retry = AT_ONCE

    async def act(self, context: Trial) -> None:
        note(context)

    async def compensate(self, context: Trial) -> None:
        note(context)


class Row(SagaStepHandler[Trial]):
    """A row of this database; nothing stops it from being written twice but the saga."""

    atomic = True

    def act(self, context: Trial) -> None:
        groups(context.database, current_step().saga_id, current_step().step, create=True)

    def compensate(self, context: Trial) -> None:
        groups(context.database, current_step().saga_id, current_step().step).delete()


class Failing(Remote):
    """Refused each time: known to have no effect."""

    def act(self, context: Trial) -> None:
        raise ValueError("refused")


class AsyncFailing(AsyncRemote):
    async def act(self, context: Trial) -> None:
        raise ValueError("refused")


class FailingTwice(Remote):
    """Undone by the third attempt only."""

    def compensate(self, context: Trial) -> None:
        if current_step().attempt <= 2:
            raise ConnectionError("not now")
        note(context)


class Fickle(Remote):
    """Lets itself be called once; whoever has to ask again is refused."""

    def act(self, context: Trial) -> None:
        if current_step().attempt > 1:
            raise ValueError("refused")
        note(context)


def named(base: type[SagaStepHandler[Any]], name: str) -> type[SagaStepHandler[Any]]:
    return type(name, (base,), {"__module__": __name__})


R1, R2, R3 = (named(Remote, name) for name in ("R1", "R2", "R3"))
A1, A2 = (named(AsyncRemote, name) for name in ("A1", "A2"))
D1, D2, D3 = (named(Row, name) for name in ("D1", "D2", "D3"))
Refused, AsyncRefused = named(Failing, "Refused"), named(AsyncFailing, "AsyncRefused")
Stubborn = named(FailingTwice, "Stubborn")


class Rows(Saga[Trial]):
    name = "faults.rows"
    steps = [D1, D2, D3]


class Mixed(Saga[Trial]):
    name = "faults.mixed"
    steps = [D1, R2, D3]


class Undone(Saga[Trial]):
    name = "faults.undone"
    steps = [R1, R2, Refused]


class HardlyUndone(Saga[Trial]):
    name = "faults.hardly_undone"
    steps = [D1, Stubborn, Refused]


class FallenBack(Saga[Trial]):
    name = "faults.fallen_back"
    steps = [R1, Fallback(step=Refused, fallback=R2), D3]


class FickleLast(Saga[Trial]):
    name = "faults.fickle"
    steps = [D1, R2, Fickle]


class Async(Saga[Trial]):
    name = "faults.async"
    steps = [A1, D2, A2]


class AsyncUndone(Saga[Trial]):
    name = "faults.async_undone"
    steps = [A1, A2, AsyncRefused]


class Case(NamedTuple):
    """A saga, and how it may end, whatever happens on the way."""

    saga: type[Saga[Trial]]
    ends: frozenset[str]
    stands: frozenset[str]  # once it is COMPLETED


def case(saga: type[Saga[Trial]], *stands: str) -> Case:
    return Case(saga, frozenset({"COMPLETED" if stands else "FAILED"}), frozenset(stands))


CASES = {
    one.saga.name: one
    for one in (
        case(Rows, "D1", "D2", "D3"),
        case(Mixed, "D1", "R2", "D3"),
        case(Undone),
        case(HardlyUndone),
        case(FallenBack, "R1", "R2", "D3"),
        Case(FickleLast, frozenset({"COMPLETED", "FAILED"}), frozenset({"D1", "R2", "Fickle"})),
        case(Async, "A1", "D2", "A2"),
        case(AsyncUndone),
    )
}
JUDGED = dict(CASES)
"""What the judge knows; a battery adds what it alone drives."""
ROWS = frozenset(("D1", "D2", "D3"))


def note(context: Trial) -> None:
    step = current_step()
    ledger.note(context.ledger, step.saga_id, step.step, step.action, step.idempotency_key)


def groups(database: str, saga_id: uuid.UUID, step: str, *, create: bool = False) -> Any:
    """The rows that a step wrote, after one more is created."""
    prefix = f"{saga_id}:{step}:"
    if create:
        Group.objects.using(database).create(name=f"{prefix}{uuid.uuid4().hex[:8]}")
    return Group.objects.using(database).filter(name__startswith=prefix)


def tell_the_ledger(address: str) -> None:
    """Have every end that is signalled in this process noted too."""
    for name in ENDS:
        signal: Signal = getattr(signals, name)
        for one in JUDGED.values():
            signal.connect(
                _receiver(address, name), sender=one.saga, weak=False, dispatch_uid=address
            )


def tell_it_no_more(address: str) -> None:
    """Undo that."""
    for name in ENDS:
        for one in JUDGED.values():
            getattr(signals, name).disconnect(sender=one.saga, dispatch_uid=address)


def _receiver(address: str, name: str) -> Any:
    def receive(execution: SagaExecution, **_: object) -> None:
        ledger.note(address, execution.id, name, "signal", name)

    return receive
