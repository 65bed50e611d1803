"""The faults that a test can make: what becomes of the calls of one step's handler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self

from django_saga.exceptions import Abort
from django_saga.machine import Action
from django_saga.steps import StepType

if TYPE_CHECKING:
    from django_saga.definition import Definition


class Crash(BaseException):
    """The process dies here: it does nothing more."""


@dataclass
class Scene:
    """The call in which a fault fires."""

    step: StepType
    die: Callable[[], NoReturn]
    forget: Callable[[], None]  # give the context the values that it had before the call


@dataclass
class Fault:
    """Fires in the calls of one action of a step, but for the first ``skip`` of them, and at most
    ``times``; made by the functions below."""

    text: str  # as a test has it
    step: StepType | str
    action: str
    then: Callable[[Scene], object] | None  # instead of what the handler returned or raised
    calls: int = 0  # of the handler, before that
    skip: int = 0
    times: int | None = None
    met: int = 0
    fired: int = 0

    def placed(self, definition: Definition) -> Self:
        """A copy for one run of a saga; raises ValueError where the saga has no such step."""
        placed = copy.copy(self)
        if self.step:
            name = _name(self.step)
            if name not in definition.steps:
                steps = ", ".join(step for entry in definition.plan for step in entry)
                raise ValueError(f"{self}: {definition.owner} has no step {name!r}, but {steps}.")
            step = definition.steps[name]
            placed.step, placed.action = step.name, Action(self.action)
            if self.then is _lose_answer and not step.uncertain:
                raise ValueError(f"{self}: {name} has no uncertain exceptions; crash_after() it.")
        return placed

    def fires(self, step: str, action: str) -> bool:
        """Whether it fires in this call."""
        if (step, action) != (self.step, self.action):
            return False
        self.met += 1
        fires = self.met > self.skip and (self.times is None or self.fired < self.times)
        self.fired += fires
        return fires

    def __str__(self) -> str:
        return self.text


def fail_at(
    step: StepType | str,
    error: Exception | None = None,
    *,
    action: str = "act",
    skip: int = 0,
    times: int | None = None,
) -> Fault:
    """The handler is not called, and ``error`` is raised; default: an ``Abort``.

    The first ``skip`` calls go well, then all fail, or the next ``times``.
    """
    text = _text("fail_at", step, error, action=action, skip=skip, times=times)
    raised = error or Abort(f"made by {text}")

    def fail(scene: Scene) -> None:
        raise raised.with_traceback(None)  # or it grows with each time

    return Fault(text, step, action, fail, skip=skip, times=times)


def unknown_at(step: StepType | str, *, skip: int = 0, times: int | None = None) -> Fault:
    """``act`` does its work, but its answer is lost, and with it what it noted in the context; an
    exception of the step's ``uncertain`` is raised."""
    text = _text("unknown_at", step, skip=skip, times=times)
    return Fault(text, step, "act", _lose_answer, calls=1, skip=skip, times=times)


def _lose_answer(scene: Scene) -> None:
    scene.forget()
    kind = scene.step.uncertain[0]
    # Derived, so that it can be made whatever arguments the original wants.
    raise type(kind.__name__, (kind,), {"__init__": lambda self, *args: None})("answer lost")


def crash_before(step: StepType | str, *, action: str = "act", skip: int = 0) -> Fault:
    """The process dies when the handler is about to be called."""
    text = _text("crash_before", step, action=action, skip=skip)
    return Fault(text, step, action, lambda scene: scene.die(), skip=skip, times=1)


def crash_after(step: StepType | str, *, action: str = "act", skip: int = 0) -> Fault:
    """The process dies when the handler has returned, or raised, and nothing of that is stored."""
    text = _text("crash_after", step, action=action, skip=skip)
    return Fault(text, step, action, lambda scene: scene.die(), calls=1, skip=skip, times=1)


def crash_at(number: int) -> Fault:
    """The process dies at the crash point of that number, which the message of a proof gives."""
    return Fault(f"crash_at({number})", "", "", None, skip=number - 1, times=1)


def call_twice(step: StepType | str, *, action: str = "act") -> Fault:
    """The handler is called twice in a row, with the same key."""
    return Fault(_text("call_twice", step, action=action), step, action, None, calls=2)


def _text(function: str, step: StepType | str, error: object = None, **options: Any) -> str:
    parts = [repr(_name(step)), *([repr(error)] if error else [])]
    parts += [f"{key}={value!r}" for key, value in options.items() if value and value != "act"]
    return f"{function}({', '.join(parts)})"


def _name(step: StepType | str) -> str:
    return step if isinstance(step, str) else step.name
