"""Step handlers: what a user writes for each step, and what a handler can ask about its call."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_origin
from uuid import UUID

from msgspec import Struct

from django_saga.context import SagaContext
from django_saga.exceptions import InvalidDefinition, SagaError
from django_saga.machine import ONCE, Action, Outcome, Retry, StepRules

ContextT_contra = TypeVar("ContextT_contra", bound=SagaContext, contravariant=True)


class SagaStepHandler(Generic[ContextT_contra]):
    """One step of a saga: ``act`` does it, ``compensate`` undoes it; each ``def`` or ``async def``.

    Both are called at least once: after a crash the same action runs again, with the same
    ``current_step().idempotency_key``. An exception from ``act`` says that it had no effect, unless
    its type is in ``uncertain``; a step that failed is not compensated, an unknown one is.
    """

    name: ClassVar[str]
    """What the plan and the history call this step; default: the class name."""

    retry: ClassVar[Retry] = ONCE
    """How often ``act`` is attempted; default: once."""

    compensation_retry: ClassVar[Retry] = Retry()
    """How often ``compensate`` is attempted; default: 3 times, after 1 s and 2 s."""

    timeout: ClassVar[float | None] = None
    """Seconds that one attempt may take. It ends an async handler, and a sync one in a main thread;
    elsewhere a late sync handler is only logged. What it ends has an unknown outcome."""

    atomic: ClassVar[bool] = False
    """Run the (sync) handler inside the transaction of its own checkpoint: its writes to the saga's
    database and its completion commit together or not at all."""

    uncertain: ClassVar[tuple[type[Exception], ...]] = (TimeoutError,)
    """Exceptions that leave open whether the step had its effect."""

    aliases: ClassVar[Sequence[str]] = ()
    """Names that this step had in plans that may still be running."""

    def act(self, context: ContextT_contra) -> Any:
        """Do the step; what it returns is the ``response`` of its :class:`SagaStepResult`."""
        raise NotImplementedError(f"{type(self).__qualname__} has no act().")

    def compensate(self, context: ContextT_contra) -> Any:
        """Undo the step, also when it is not known to have happened; default: nothing to undo."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        _validate(cls)


StepType = type[SagaStepHandler[Any]]


class CircuitBreaker(Protocol):
    """What a Fallback needs of a breaker; ``pybreaker.CircuitBreaker`` has it."""

    def calling(self) -> AbstractContextManager[Any]:
        """Guard a call: raises on entry while open, and learns from what leaves the block."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A step, and another that stands in for it when it fails.

    The context is first restored to what it was before ``step``; if the outcome of ``step`` is
    unknown, it is compensated first. ``failure_exceptions`` are the errors that ``fallback`` stands
    in for, all when empty. While ``circuit_breaker`` is open, ``step`` is not called at all.
    """

    step: StepType
    fallback: StepType
    failure_exceptions: tuple[type[Exception], ...] = ()
    circuit_breaker: CircuitBreaker | None = None


class SagaStepResult(Struct, frozen=True):
    """A step that is done, as the iteration of a transaction yields it."""

    step_type: StepType
    response: Any
    saga_id: UUID


class CurrentStep(Struct, frozen=True):
    """The call that is being made, as :func:`current_step` tells it to the handler."""

    saga_id: UUID
    step: str
    action: Action
    attempt: int
    """From 1 up; interrupted attempts count."""
    act_outcome: Outcome | None
    """In ``compensate``: DONE, or UNKNOWN when nobody knows whether the act had its effect."""
    deadline: float | None = None
    """When the step's timeout is over, on the clock of :func:`time.monotonic`."""

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this action; hand it to the service you call."""
        return f"{self.saga_id}:{self.step}:{self.action}"

    @property
    def act_idempotency_key(self) -> str:
        """The key under which ``act`` called; to undo a call whose answer never came."""
        return f"{self.saga_id}:{self.step}:{Action.ACT}"

    @property
    def remaining(self) -> float | None:
        """Seconds left until the deadline; None without a timeout."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


_current: ContextVar[CurrentStep] = ContextVar("django_saga_step")


def current_step() -> CurrentStep:
    """The step whose ``act`` or ``compensate`` is running; raises SagaError outside of one."""
    try:
        return _current.get()
    except LookupError:
        raise SagaError("current_step() was called outside of a saga's step.") from None


def rules_of(step: StepType) -> StepRules:
    """What the machine needs to know of a step."""
    return StepRules(
        retry=step.retry, compensation_retry=step.compensation_retry, atomic=step.atomic
    )


def context_type_of(step: StepType) -> Any:
    """The ``X`` of ``SagaStepHandler[X]``, or None where a handler leaves it open."""
    for base in step.__mro__:
        for generic in getattr(base, "__orig_bases__", ()):
            origin = get_origin(generic)
            if isinstance(origin, type) and issubclass(origin, SagaStepHandler):
                argument = get_args(generic)[0]
                if not isinstance(argument, TypeVar):
                    return argument
    return None


def _validate(step: StepType) -> None:
    where = f"Step {step.__qualname__}"
    if not isinstance(step.name, str) or not 0 < len(step.name) <= 100 or ":" in step.name:
        raise InvalidDefinition(
            f"{where}: its name must be 1 to 100 characters without ':', not {step.name!r}."
        )
    for attribute in ("retry", "compensation_retry"):
        if not isinstance(getattr(step, attribute), Retry):
            raise InvalidDefinition(f"{where}: {attribute} must be a Retry(...).")
    timeout = step.timeout
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise InvalidDefinition(f"{where}: timeout must be seconds above 0, not {timeout!r}.")
    if not isinstance(step.uncertain, tuple) or not all(
        isinstance(error, type) and issubclass(error, Exception) for error in step.uncertain
    ):
        raise InvalidDefinition(f"{where}: uncertain must be a tuple of exception types.")
    if isinstance(step.aliases, str):
        raise InvalidDefinition(f"{where}: aliases must be a list of names, not one string.")
    if step.atomic and any(map(inspect.iscoroutinefunction, (step.act, step.compensate))):
        raise InvalidDefinition(
            f"{where}: an atomic step runs inside a Django transaction, which cannot span an "
            "await; declare act and compensate with plain def, or drop atomic = True."
        )
