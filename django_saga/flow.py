"""What a flow is, what it asks of its driver, and the run that it carries along.

A flow is a generator. It yields what is to be done (:class:`Do`, :class:`Call`, ...), and is sent
what came of it or thrown what was raised; :mod:`django_saga.drivers` does it, blocking or awaiting.
So the way of a saga is written once, for both kinds.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID

from django_saga.causes import Cause
from django_saga.conf import conf
from django_saga.machine import Record, Transition
from django_saga.steps import CircuitBreaker, CurrentStep, StepType
from django_saga.storage.base import Checkpoint, Claim, Creation, SagaStorage, Saved

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from django_saga.models import SagaExecution, SagaStepRecord
    from django_saga.saga import Saga

T = TypeVar("T")


class Do(NamedTuple):
    """Call a function of the storage; it may block."""

    function: Callable[[], Any]
    blocking: bool


class Write(NamedTuple):
    """Write to the storage, maybe together with what other flows write."""

    storage: SagaStorage
    what: Checkpoint | Creation


class Call(NamedTuple):
    """Make a handler and call it: the answer is its response, its error :class:`HandlerRaised`."""

    run: Run
    step: StepType
    info: CurrentStep
    breaker: CircuitBreaker | None


class CallInside(NamedTuple):
    """As :class:`Call`, of a sync handler in the transaction that ``checkpoint`` then completes.

    The answer is the response and what ``checkpoint`` returned.
    """

    call: Call
    transaction: Callable[[], AbstractContextManager[None]]
    checkpoint: Callable[[], tuple[Transition, Saved]]


class Pause(NamedTuple):
    """Wait for some seconds."""

    seconds: float


class Announce(NamedTuple):
    """Send a signal."""

    name: str
    run: Run
    record: SagaStepRecord | None


Ask = Do | Write | Call | CallInside | Pause | Announce
Flow = Generator[Ask, Any, T]


class HandlerRaised(Exception):
    """Tells a handler's own exception from those of this package."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Run:
    """One execution while this process drives it."""

    def __init__(self, saga: Saga[Any], claim: Claim, context: Any) -> None:
        self.saga = saga
        self.definition = saga.definition
        self.storage = saga.storage
        self.claim = claim
        self.id = claim.id
        self.state = claim.state
        self.at = claim.at
        self.context = context
        self.lease = conf.LEASE
        self.leased = claim.state.active
        self.renewed_at = time.monotonic()  # when the lease began to count
        self.asked_at = self.renewed_at  # when the latest statement was sent
        self.delay = claim.wait  # seconds from ``at`` on before the next attempt may begin
        self.wakes_at = self.renewed_at + claim.wait
        self.last: Record | None = None  # of the latest checkpoint
        self.duration: float | None = None  # seconds that its attempt took
        self.cause: Cause | None = None  # why it turned back or got stuck, if it did here
        self.error: Exception | None = None  # the handler's own, that turned the saga back
        self.stopping = False  # asked to stop at the next checkpoint
        self.cancel_reason = claim.cancel_reason  # an operator asked for it
        self.paused = claim.paused  # what comes next must not begin
        self.resting = True  # what is in flight has not begun
        self.until: float | None = None  # monotonic; the keeper renews no longer
        self.abandoned = False  # a handler may still be running where nobody waits for it

    @property
    def execution(self) -> SagaExecution:
        """The model instance as it stands after the latest checkpoint."""
        execution = self.storage.execution(self.claim, self.state, self.at, self.leased)
        execution.cancel_reason = self.cancel_reason
        if self.cause is not None:
            execution.failure_group = self.cause.id
        waits = self.state.active and self.delay
        execution.wake_at = self.at + timedelta(seconds=self.delay) if waits else None
        return execution

    @property
    def key(self) -> tuple[UUID, int]:
        """The lease, as the storage knows it."""
        return self.id, self.claim.token

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Do:
        """A call of this run's storage."""

        def call() -> Any:
            self.asked_at = time.monotonic()
            return function(*args, **kwargs)

        return Do(call, self.storage.blocking)


def driver_name() -> str:
    """Host and process, as operators see who drives an execution."""
    return f"{_HOST}:{os.getpid()}"


_HOST = socket.gethostname()[:200]
