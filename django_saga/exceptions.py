"""Every error of django-saga; the docstring says what it means and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from django_saga.models import SagaExecution


class SagaError(Exception):
    """The base of all errors of django-saga."""


class InvalidDefinition(SagaError):
    """A saga or a step is declared wrongly; the message names saga, position and step."""


class TransactionLeftOpen(InvalidDefinition):
    """A handler returned inside a transaction; it is rolled back, and what else it did is undone.

    The step counts as one whose outcome is unknown: it is compensated, and not tried again. That of
    an ``atomic`` step is known: with its transaction all that it wrote is gone.
    """


class InvalidContext(SagaError):
    """A context cannot be stored or restored; the message names the field."""


class InvalidSettings(SagaError):
    """A value in the ``DJANGO_SAGA`` setting cannot be used; the message names the key."""


class SagaNotFound(SagaError):
    """No execution has this id, or the id belongs to another saga."""


class SagaAlreadyRunning(SagaError):
    """Another driver holds the lease of this execution; wait for it, or for the lease's end."""


class SagaPaused(SagaError):
    """An operator paused this saga, or the step that comes next; it goes on once resumed."""


class SagaLimitReached(SagaError):
    """As many executions run as ``max_running`` of the saga allows; one that is stored waits."""


class LeaseLost(SagaError):
    """Another driver took the execution over; this one stopped and wrote nothing."""


class InsideTransaction(SagaError):
    """A saga was driven inside an open transaction, where its checkpoints would not be durable."""


class StorageUnavailable(SagaError):
    """The database did not answer; whether its last statement took effect is not known."""


class UnknownSaga(SagaError):
    """A stored execution names a saga or a step that the code no longer defines."""


class CircuitOpen(SagaError):
    """The circuit breaker of a step is open; its handler was not called."""


class _Ended(SagaError):
    """An execution that did not complete, with the facts of its end."""

    def __init__(self, message: str, execution: SagaExecution) -> None:
        super().__init__(message)
        self.execution = execution


class SagaFailed(_Ended):
    """A step failed and everything done before it was compensated.

    ``execution`` is the :class:`~django_saga.models.SagaExecution`, ``step`` the name of the step
    that failed. ``__cause__`` is the step's own error when it was raised in this process.
    """

    @property
    def step(self) -> str:
        """The name of the step that failed."""
        return self.execution.failed_step


class SagaStuck(_Ended):
    """It cannot go on by itself; ``execution.stuck_reason`` says why. Retry it in the admin."""


class Abort(SagaError):
    """Raised by a handler: a known failure. No retry, no fallback, compensate now."""


class RetryLater(SagaError):
    """Raised by a handler: nothing was done, call me again in ``seconds``.

    It uses up none of the step's attempts: a handler may poll with it. To give up, look at
    ``current_step().attempt`` and raise :class:`Abort`.
    """

    def __init__(self, seconds: float, why: str = "") -> None:
        if not 0 <= seconds <= 366 * 86400:
            raise ValueError(f"RetryLater takes between 0 seconds and a year, not {seconds!r}.")
        super().__init__(why or f"asked to be called again in {seconds:g} s")
        self.seconds = float(seconds)
