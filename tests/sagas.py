"""Sagas for the worker processes that tests start, found by autodiscovery as a project's are.

Each call of a handler is a line of a ledger, a file outside of every database that the context
names.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path

from django.db.models import F

from django_saga import RetryLater, Saga, SagaContext, SagaStepHandler, current_step
from django_saga.models import SagaExecution

PATIENCE = 60  # seconds until a handler that waits in vain gives up


@dataclass
class Journey(SagaContext):
    ledger: str
    gate: str = ""
    """The file that BookHotel waits for; empty: it does not wait."""
    full: bool = False
    """Whether BookTrain fails."""


class Booking(SagaStepHandler[Journey]):
    """Notes every call: action, step, idempotency key, process."""

    def act(self, context: Journey) -> None:
        note(context)

    def compensate(self, context: Journey) -> None:
        note(context)


class BookFlight(Booking):
    pass


class BookHotel(Booking):
    def act(self, context: Journey) -> None:
        note(context)
        deadline = time.monotonic() + PATIENCE
        while context.gate and not Path(context.gate).exists():
            if time.monotonic() > deadline:
                raise AssertionError("nobody opened the gate")
            time.sleep(0.01)


class BookTrain(Booking):
    async def act(self, context: Journey) -> None:
        note(context)
        if context.full:
            raise ValueError("no seats")


class SleepTooLong(Booking):
    timeout = 0.3

    def act(self, context: Journey) -> None:
        note(context)
        time.sleep(PATIENCE)
        note(context)


class AwaitTooLong(Booking):
    timeout = 0.3

    async def act(self, context: Journey) -> None:
        note(context)
        await asyncio.sleep(PATIENCE)
        note(context)


class TakeLonger(Booking):
    """Longer than the timeout that a test gives RQ's job, a second."""

    def act(self, context: Journey) -> None:
        note(context)
        time.sleep(1.5)


class LoseLease(Booking):
    """While it is called another driver takes the execution over."""

    def act(self, context: Journey) -> None:
        note(context)
        execution = SagaExecution.objects.filter(pk=current_step().saga_id)
        execution.update(token=F("token") + 1, driver="another")


class ComeBack(Booking):
    def act(self, context: Journey) -> None:
        note(context)
        if current_step().attempt == 1:
            raise RetryLater(1)


class Visit(Booking):
    """Notes that somebody comes in, and that he leaves, after a moment."""

    def act(self, context: Journey) -> None:
        note(context)
        time.sleep(0.02)
        note(context)


class Guided(Saga[Journey]):
    """Two at once, and no more."""

    steps = [Visit]
    max_running = 2


class Alone(Saga[Journey]):
    steps = [BookFlight, BookHotel]
    max_running = 1


class Travel(Saga[Journey]):
    steps = [BookFlight, BookHotel, BookTrain]


class Stroll(Saga[Journey]):
    steps = [BookFlight]


class SleepSaga(Saga[Journey]):
    steps = [BookFlight, SleepTooLong]


class AwaitSaga(Saga[Journey]):
    steps = [BookFlight, AwaitTooLong]


class LongerSaga(Saga[Journey]):
    steps = [BookFlight, TakeLonger]


class LoseLeaseSaga(Saga[Journey]):
    steps = [BookFlight, LoseLease, BookTrain]


class ComeBackSaga(Saga[Journey]):
    steps = [ComeBack, BookTrain]


def note(context: Journey) -> None:
    step = current_step()
    with open(context.ledger, "a") as ledger:
        ledger.write(f"{step.action} {step.step} {step.idempotency_key} {os.getpid()}\n")


def intrude(*arguments: object, **options: object) -> None:
    """What a job that was forged in Redis would have a worker call: it leaves a mark."""
    Path(os.environ["INTRUDED"]).touch()
