"""A saga whose steps fail as they are told, for the tests of operators' doings."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

from django_saga import (
    SENSITIVE,
    Retry,
    Saga,
    SagaContext,
    SagaError,
    SagaStepHandler,
    SagaStuck,
    current_step,
)
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage


class Sorry(Exception):
    """What a step raises that is told to fail."""


class World:
    """What goes wrong out there, and the calls that were made, outside of every database."""

    def __init__(self) -> None:
        self.trouble: dict[str, str] = {}  # "act Pay": what its error says
        self.calls: list[str] = []
        self.interlude: Callable[[], None] | None = None  # done in the middle of the next call

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def call(self) -> None:
        step = current_step()
        call = f"{step.action} {step.step}"
        self.calls.append(call)
        if self.interlude:
            self.interlude()
        if call in self.trouble:
            raise Sorry(self.trouble[call])


WORLD = World()


@dataclass
class Trip(SagaContext):
    traveller: str = "Ada"
    seen: list[str] = field(default_factory=list)


class _Step(SagaStepHandler[Trip]):
    compensation_retry = Retry(attempts=1)

    def act(self, context: Trip) -> None:
        WORLD.call()
        context.seen.append(type(self).name)

    def compensate(self, context: Trip) -> None:
        WORLD.call()


class Pack(_Step):
    """The first step."""


class Pay(_Step):
    """The second step."""


class Leave(_Step):
    """The third step."""


class TripSaga(Saga[Trip]):
    name = "tests.TripSaga"
    steps = [Pack, Pay, Leave]


def run_trip(*, alias: str = "default", traveller: str = "Ada", **trouble: str) -> SagaExecution:
    """Run a trip to its end; ``act_Pay="no money"`` makes a step fail."""
    WORLD.trouble = {key.replace("_", " "): text for key, text in trouble.items()}
    saga_id = uuid.uuid4()
    try:
        TripSaga(storage=DjangoSagaStorage(alias)).run(Trip(traveller), saga_id=saga_id)
    except SagaError as error:
        if not hasattr(error, "execution"):
            raise
    WORLD.reset()
    return SagaExecution.objects.using(alias).get(pk=saga_id)


def completed_trip(**kwargs: Any) -> SagaExecution:
    """One that completed."""
    return run_trip(**kwargs)


def failed_trip(**kwargs: Any) -> SagaExecution:
    """One that failed in Pay, and whose Pack is undone."""
    return run_trip(act_Pay="no money", **kwargs)


def stuck_trip(**kwargs: Any) -> SagaExecution:
    """One that failed in Leave, whose Pay is undone, and whose Pack could not be."""
    return run_trip(act_Leave="fog", compensate_Pack="bag lost", **kwargs)


def pending_trip(*, alias: str = "default", delay: float = 3600.0) -> SagaExecution:
    """One that waits."""
    saga = TripSaga(storage=DjangoSagaStorage(alias))
    execution = saga.enqueue(Trip(), delay=delay)
    return SagaExecution.objects.using(alias).get(pk=execution.pk)


def due_trip(*, alias: str = "default") -> SagaExecution:
    """One that could begin, and that nobody drives."""
    return changed(pending_trip(alias=alias), wake_at=None)


def lost_trip(*, alias: str = "default") -> SagaExecution:
    """One whose driver was killed in its first step, and whose lease ran out since."""
    claim = _begin(alias, lease=0.0)
    return SagaExecution.objects.using(alias).get(pk=claim)


def driven_trip(*, alias: str = "default") -> SagaExecution:
    """One that another process drives."""
    claim = _begin(alias, lease=3600.0)
    return SagaExecution.objects.using(alias).get(pk=claim)


def halted_trip(*, alias: str = "default") -> SagaExecution:
    """One that got stuck in its first act, before it had turned back."""
    from django_saga.recovery import recover_saga

    lost = changed(lost_trip(alias=alias), recoveries=1_000)
    recover_saga(lost.pk, storage=DjangoSagaStorage(alias))
    return SagaExecution.objects.using(alias).get(pk=lost.pk)


def compensating_trip(*, alias: str = "default") -> SagaExecution:
    """One that waits to undo its Pack, the last that stands."""
    from django_saga.operations import retry

    stuck = stuck_trip(alias=alias)
    retry(stuck.pk, delay=3600, storage=DjangoSagaStorage(alias))
    return SagaExecution.objects.using(alias).get(pk=stuck.pk)


def undoing_trip(*, alias: str = "default") -> SagaExecution:
    """One whose compensation another process drives."""
    from django.utils import timezone

    lease = timezone.now() + timedelta(hours=1)
    waiting = compensating_trip(alias=alias)
    return changed(waiting, wake_at=None, lease_until=lease, driver="web-2:4711", in_flight=True)


def resolved_trip(*, alias: str = "default") -> SagaExecution:
    """A stuck one that somebody has dealt with."""
    stuck = stuck_trip(alias=alias)
    return changed(stuck, settled_at=stuck.updated_at)


def retried_trip(*, alias: str = "default") -> SagaExecution:
    """A failed one that was started anew."""
    failed = failed_trip(alias=alias)
    return changed(failed, settled_at=failed.updated_at)


STATES: dict[str, Callable[..., SagaExecution]] = {
    "completed": completed_trip,
    "failed": failed_trip,
    "retried": retried_trip,
    "stuck": stuck_trip,
    "halted": halted_trip,
    "resolved": resolved_trip,
    "waiting": pending_trip,
    "due": due_trip,
    "driven": driven_trip,
    "lost": lost_trip,
    "compensating": compensating_trip,
    "undoing": undoing_trip,
}
POSSIBLE = {
    "retry": {"failed", "stuck", "halted"},
    "recover": {"due", "lost"},
    "cancel": {"waiting", "due", "driven", "lost"},
    "resume_forward": {"halted"},
    "skip": {"waiting", "due", "lost", "halted"},
    "mark_done": {"waiting", "due", "lost", "halted", "stuck", "compensating"},
    "edit_context": {"waiting", "due", "lost", "halted", "stuck", "compensating"},
    "release": {"driven", "undoing"},
    "resolve": {"stuck", "halted"},
    "abandon": {"waiting", "due", "lost", "compensating"},
}
EDITED = '{"traveller":"Grace","seen":[]}'


def arguments(verb: str, execution: SagaExecution) -> dict[str, Any]:
    """What a verb takes of its own, as it is right for this execution."""
    standing = [effect[0] for effect in execution.effects if len(effect) < 3 or effect[2] != "DONE"]
    return {
        "mark_done": {"step": execution.step},
        "edit_context": {"context": EDITED},
        "resolve": {"standing": standing},
        "abandon": {"confirm": str(execution.pk)},
    }.get(verb, {})


def changed(execution: SagaExecution, **columns: Any) -> SagaExecution:
    """The execution with other values in its row."""
    alias = execution._state.db
    SagaExecution.objects.using(alias).filter(pk=execution.pk).update(**columns)
    return SagaExecution.objects.using(alias).get(pk=execution.pk)


def _begin(alias: str, lease: float) -> uuid.UUID:
    from django_saga import machine

    state = machine.start(TripSaga.definition.plan, '{"traveller":"Ada","seen":[]}')
    claim = DjangoSagaStorage(alias).create(
        uuid.uuid4(), TripSaga.name, state, driver="web-2:4711", lease=lease
    )
    assert claim is not None
    return claim.id


@dataclass
class GuardedTrip(Trip):
    """One with something that must not be told."""

    passport: Annotated[str, SENSITIVE] = "P-4711-0815"


class GuardedSaga(Saga[GuardedTrip]):
    """Whose context operators may edit."""

    name = "tests.GuardedSaga"
    steps = [Pack, Pay, Leave]
    context_editable = True


def guarded_trip() -> SagaExecution:
    """One that got stuck as :func:`stuck_trip` does."""
    WORLD.trouble = {"act Leave": "fog", "compensate Pack": "bag lost"}
    saga_id = uuid.uuid4()
    with suppress(SagaStuck):
        GuardedSaga(storage=DjangoSagaStorage("default")).run(GuardedTrip(), saga_id=saga_id)
    WORLD.reset()
    return SagaExecution.objects.get(pk=saga_id)
