"""Running a saga in a test: with faults, and with a clock that is moved by hand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.test.utils import override_settings

from django_saga import engine
from django_saga.conf import conf
from django_saga.drivers import drive
from django_saga.flow import Flow
from django_saga.machine import ACTIVE, Action, Error, Outcome, State, Status
from django_saga.saga import Saga
from django_saga.storage import MemorySagaStorage
from django_saga.testing.faults import Crash, Fault
from django_saga.testing.lives import CrashPoint, Life

if TYPE_CHECKING:
    from django_saga import SagaContext
    from django_saga.models import SagaExecution, SagaStepRecord
    from django_saga.steps import CurrentStep
    from django_saga.storage import DjangoSagaStorage

_ROUNDS = 1000  # waits and crashes after which a saga is taken to go on for ever


class Clock:
    """Time that stands still until it is moved; ``now`` is in seconds since the epoch."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class DatabaseClock(Clock):
    """The database keeps its own time: instead, what executions wait for is brought nearer."""

    def __init__(self, alias: str) -> None:
        super().__init__()
        self._alias = alias

    def move(self, seconds: float) -> None:
        """Let time pass for every execution in the database."""
        from django_saga.models import SagaExecution

        super().move(seconds)
        times = ("lease_until", "wake_at", "grace_until")
        passed = timedelta(seconds=seconds, milliseconds=1)  # SQLite's clock has no finer ones
        for row in SagaExecution.objects.using(self._alias).filter(status__in=ACTIVE).only(*times):
            for name in times:
                if moment := getattr(row, name):
                    setattr(row, name, moment - passed)
            row.save(update_fields=times)


class SagaRunner:
    """Runs sagas, each of their drivers as in a process of its own; nothing sleeps.

    Executions are kept in memory, or in the test database: ``SagaRunner(DjangoSagaStorage())``,
    which a TestCase bears too. In memory an ``atomic`` step runs in a transaction of the test
    database, which a crash before its checkpoint rolls back; that its writes commit together with
    its checkpoint, or not at all, is seen only with a DjangoSagaStorage.
    """

    def __init__(self, storage: DjangoSagaStorage | None = None) -> None:
        self.clock = Clock() if storage is None else DatabaseClock(storage.alias)
        self.storage = storage or MemorySagaStorage(clock=self.clock)
        self._runs: list[SagaRun] = []

    def run(
        self, saga: Saga[Any] | type[Saga[Any]], context: SagaContext, *faults: Fault
    ) -> SagaRun:
        """Run a saga to its end, however it ends, over every wait and every crash.

        Raises AssertionError where a fault never fired, ValueError for one at a step that the saga
        does not have.
        """
        run = self.start(saga, context, *faults).finish()
        run.check_faults()
        return run

    def start(
        self, saga: Saga[Any] | type[Saga[Any]], context: SagaContext, *faults: Fault
    ) -> SagaRun:
        """Run a saga to its end, its first wait or its first crash; see :meth:`SagaRun.go_on`."""
        made = self.made(saga)
        self._runs.append(SagaRun(self, made, [fault.placed(made.definition) for fault in faults]))
        return self._runs[-1].start(context)

    def made(self, saga: Saga[Any] | type[Saga[Any]]) -> Saga[Any]:
        """The saga, also where its class is given."""
        return saga if isinstance(saga, Saga) else saga(storage=self.storage)

    def check_faults(self) -> None:
        """Raise AssertionError where a fault never fired."""
        for run in self._runs:
            run.check_faults()


class SagaRun:
    """One execution in a test."""

    def __init__(self, runner: SagaRunner, saga: Saga[Any], faults: list[Fault]) -> None:
        from django_saga.models import new_id

        self.runner, self.saga, self.faults = runner, saga, faults
        self.saga_id = new_id()
        self.calls: list[CurrentStep] = []
        """Each call of a handler, in order: its step, action, attempt, idempotency_key, ..."""
        self.crashed = False
        """Whether its driver died; its lease holds until the clock is moved past it."""
        self.crash_points: list[CrashPoint] = []
        self.execution: SagaExecution | None = None
        """As the latest driver returned it that did not die."""
        self._state: State
        self._due = 0.0  # when another driver may go on, on the runner's clock

    @property
    def status(self) -> Status:
        """As it is stored."""
        return self._state.status

    @property
    def context(self) -> Any:
        """As it is stored, typed."""
        return self.saga.definition.codec.decode(self._state.context)

    @property
    def error(self) -> Error | None:
        """Why it turned back or got stuck: ``type``, ``message``, ``traceback``."""
        return self._state.error

    @property
    def stuck_reason(self) -> str:
        """Why it is STUCK; else empty."""
        return self._state.stuck_reason

    @property
    def wait(self) -> float:
        """Seconds until another driver may go on."""
        return max(0.0, self._due - self.runner.clock.now)

    @property
    def history(self) -> list[SagaStepRecord]:
        """Its finished attempts, oldest first."""
        return self.runner.storage.history(self.saga_id)

    @property
    def acted(self) -> list[str]:
        """The names of the steps whose act is done, in order."""
        return self._done(Action.ACT)

    @property
    def compensated(self) -> list[str]:
        """The names of the steps whose compensation is done, in order."""
        return self._done(Action.COMPENSATE)

    def _done(self, action: Action) -> list[str]:
        done = [record for record in self.history if record.outcome == Outcome.DONE]
        return [record.step for record in done if record.action == action]

    def start(self, context: SagaContext) -> SagaRun:
        """The first driver; :meth:`SagaRunner.start` calls it."""

        def flow(saga: Saga[Any]) -> Flow[SagaExecution]:
            run = yield from engine.start(saga, context, self.saga_id)
            return (yield from engine.go_on(run))

        return self._drive(flow)

    def go_on(self) -> SagaRun:
        """Drive it on, as another process would: to its end, its next wait or its next crash.

        Nothing of a driver that died is used. Raises SagaAlreadyRunning while its lease holds.
        """
        return self._drive(lambda saga: engine.resume_and_go_on(saga, self.saga_id))

    def finish(self) -> SagaRun:
        """Move the clock and drive it on until it has ended."""
        for _ in range(_ROUNDS):
            if not self._state.active and not self.crashed:
                return self
            self.runner.clock.move(self.wait)
            self.go_on()
        raise AssertionError(f"After {_ROUNDS} waits it is still {self.status}: it never ends.")

    def check_faults(self) -> None:
        """Raise AssertionError where a fault never fired."""
        for fault in self.faults:
            if fault.fired < (fault.times or 1):
                often = f"fired only {fault.fired} times" if fault.fired else "never fired"
                raise AssertionError(f"{fault} {often}. The saga is {self.status}: {self}.")

    def stored(self, state: State, wake: float | None = None) -> None:
        """A driver stored this, to go on in ``wake`` seconds."""
        self._state, self._due = state, self.runner.clock.now + (wake or 0.0)

    def _drive(self, flow: Callable[[Saga[Any]], Flow[SagaExecution]]) -> SagaRun:
        saga = copy.copy(self.saga)
        saga.storage = saga._container = Life(self)  # type: ignore[assignment]
        given = getattr(settings, "DJANGO_SAGA", None) or {}
        # Whatever must wait is handed over at once, and to nobody.
        ours = {**given, "INLINE_WAIT": 0, "BACKEND": "inprocess"}
        try:
            with override_settings(DJANGO_SAGA=ours):
                self.execution = drive(flow(saga))
            self.crashed = False
        except Crash:
            self.crashed = True
            self._due = max(self._due, self.runner.clock.now + conf.LEASE)
        return self

    def __str__(self) -> str:
        return "; ".join(map(_told, self.history)) or "no attempt has ended"


def _told(record: SagaStepRecord) -> str:
    error = f" ({record.error_type}: {record.error_message})" if record.error_type else ""
    return f"{record.step}.{record.action} {record.outcome}{error}"
