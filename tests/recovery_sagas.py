"""Sagas for recovering processes; each call is a line of a ledger, outside of every database."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

from django_saga import Retry, RetryLater, Saga, SagaContext, SagaStepHandler, current_step
from django_saga.backends import Backend
from django_saga.storage import SagaStorage


@dataclass
class Parcel(SagaContext):
    number: int


class Noted(SagaStepHandler[Parcel]):
    """Notes what is called, and asks a subclass what to do."""

    def act(self, context: Parcel) -> None:
        note()
        self.do()

    def compensate(self, context: Parcel) -> None:
        note()
        self.undo()

    def do(self) -> None:
        """Nothing by default."""

    def undo(self) -> None:
        """Nothing by default."""


class Pack(Noted):
    pass


class Send(Noted):
    pass


class Refuse(Noted):
    def do(self) -> None:
        raise ValueError("no such address")


class Unpackable(Noted):
    compensation_retry = Retry(attempts=1)

    def undo(self) -> None:
        raise ValueError("the tape holds")


class Later(Noted):
    def do(self) -> None:
        if current_step().attempt == 1:
            raise RetryLater(3600)


class Print(Noted):
    def do(self) -> None:
        print("a handler's own words")


class WaitForGate(Noted):
    """Until the test makes the file."""

    def do(self) -> None:
        while not Path(os.environ["GATE"]).exists():
            time.sleep(0.01)


class Die(Noted):
    def do(self) -> None:
        os._exit(9)


class Leave(Noted):
    def do(self) -> None:
        sys.exit(3)


class LeakCancellation(SagaStepHandler[Parcel]):
    async def act(self, context: Parcel) -> None:
        raise asyncio.CancelledError


class Plain(Saga[Parcel]):
    steps = [Pack, Send]


class Failing(Saga[Parcel]):
    steps = [Pack, Refuse]


class Sticking(Saga[Parcel]):
    steps = [Unpackable, Refuse]


class Waiting(Saga[Parcel]):
    steps = [Later, Send]


class Printing(Saga[Parcel]):
    steps = [Print]


class Gated(Saga[Parcel]):
    steps = [WaitForGate, Send]


class Deadly(Saga[Parcel]):
    steps = [Die]


class Leaving(Saga[Parcel]):
    steps = [Leave]


class Leaking(Saga[Parcel]):
    steps = [LeakCancellation]


class LedgerBackend(Backend):
    """Notes what is handed over to it."""

    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        write(f"handed over {saga_id}")


class KeepingBackend(Backend):
    """Keeps what it is told."""

    told: ClassVar[list[tuple[str, SagaStorage, UUID, float]]] = []

    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        self.told.append((saga.name, saga.storage, saga_id, delay))


class DeadBackend(Backend):
    """Nobody answers."""

    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        raise ConnectionError("nobody answers")


def note() -> None:
    step = current_step()
    write(f"{step.action} {step.step} {step.saga_id}")


def write(line: str) -> None:
    with open(os.environ["LEDGER"], "a") as ledger:
        ledger.write(f"{line}\n")
