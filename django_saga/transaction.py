"""A saga that is driven by iterating over its steps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Generic
from uuid import UUID

from django_saga import engine, machine
from django_saga.context import ContextT
from django_saga.drivers import AsyncDriver, drive
from django_saga.exceptions import SagaError
from django_saga.flow import Flow, Run
from django_saga.steps import SagaStepResult

if TYPE_CHECKING:
    from django_saga.models import SagaExecution
    from django_saga.saga import Saga


class SagaTransaction(
    AbstractContextManager["SagaTransaction[ContextT]", None],
    AbstractAsyncContextManager["SagaTransaction[ContextT]", None],
    Generic[ContextT],
):
    """A saga that is driven by iterating: each item is the :class:`SagaStepResult` of a done act.

    When a step fails, what was done is compensated and the step's own error is raised. An exception
    of the consumer's between two steps compensates too; leaving early (``break``) does not: the
    saga can be resumed with its ``saga_id``, and recovery resumes it where nobody does. It also
    does where the consumer takes longer than the lease between two steps; the next then raises
    LeaseLost.
    """

    def __init__(self, saga: Saga[ContextT], context: ContextT, saga_id: UUID | None) -> None:
        from django_saga.models import new_id

        self.saga = saga
        self.context = context
        self.saga_id = saga_id or new_id()
        self._given = saga_id is not None
        self._run: Run | None = None
        self._driver = AsyncDriver()

    @property
    def execution(self) -> SagaExecution:
        """The execution as it stands; there is one from the first iteration on."""
        if self._run is None:
            raise SagaError("This transaction has not begun: iterate over it first.")
        return self._run.execution

    def __enter__(self) -> SagaTransaction[ContextT]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._run is not None:
            drive(self._leave(self._run, error))

    def __iter__(self) -> Iterator[SagaStepResult]:
        if self._run is None:
            self._run = drive(engine.start(self.saga, self.context, self.saga_id))
        while True:
            self.saga.storage.refuse_transaction()
            result = drive(engine.advance(self._run))
            if result is None:
                break
            yield result
        self._raise_failure(self._run)

    async def __aenter__(self) -> SagaTransaction[ContextT]:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._run is not None:
            await self._driver.drive(self._leave(self._run, error), self._run)

    async def __aiter__(self) -> AsyncIterator[SagaStepResult]:
        if self._run is None:
            start = engine.start(self.saga, self.context, self.saga_id)
            self._run = await self._driver.drive(start, give_up=engine.give_up)
        while result := await self._driver.drive(engine.advance(self._run), self._run):
            yield result
        self._raise_failure(self._run)

    def _leave(self, run: Run, error: BaseException | None) -> Flow[None]:
        if not run.resting:  # cut short in an attempt: what it did is not known
            return engine.let_go(run, unstarted=False)
        if isinstance(error, Exception) and error is not run.error:
            return engine.turn_back(run, error)
        return engine.let_go(run)

    def _raise_failure(self, run: Run) -> None:
        if run.error is None:
            engine.outcome(run)
            return
        if run.state.status is machine.Status.STUCK:
            run.error.add_note(f"Saga {self.saga.name} {run.id} is stuck: {run.state.stuck_reason}")
        raise run.error
