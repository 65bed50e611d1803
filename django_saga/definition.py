"""What a saga's class declares, checked once and in the form that drivers and recovery use."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from django_saga.context import ContextCodec, SagaContext
from django_saga.exceptions import Abort, InvalidDefinition, RetryLater, UnknownSaga
from django_saga.machine import Plan, StepRules
from django_saga.steps import Fallback, SagaStepHandler, StepType, context_type_of, rules_of


@dataclass(frozen=True)
class Definition:
    """The steps of a saga by name, aliases and retired steps included."""

    owner: str  # how messages call the saga
    plan: Plan
    steps: dict[str, StepType]
    rules: dict[str, StepRules]
    fallbacks: dict[str, Fallback]  # by every name of the step that they stand in for
    context_type: type[SagaContext]

    @cached_property
    def codec(self) -> ContextCodec[Any]:
        """Built when first needed: annotations may name what is defined after the saga."""
        return ContextCodec(self.context_type)

    def require(self, names: Sequence[str]) -> None:
        """Raise UnknownSaga unless every one of the steps is still defined."""
        missing = sorted({name for name in names if name not in self.steps})
        if missing:
            raise UnknownSaga(
                f"{self.owner} no longer defines {', '.join(missing)}, which this execution's plan "
                "names. Bring the step back in retired_steps, or name it in the aliases of the "
                "step that replaced it; then resume it forward, or retry to undo it."
            )


def define(
    owner: str,
    steps: object,
    retired_steps: Sequence[StepType] = (),
    context_type: object = None,
) -> Definition:
    """Check a declaration; raises :class:`InvalidDefinition` naming saga, position and step."""
    entries, retired = _entries(owner, steps), _retired(owner, retired_steps)
    positions = _positions(owner, entries)
    for where, step in positions + retired:
        _check_step(where, step)
    context = _context_type(owner, positions, context_type)
    by_name: dict[str, StepType] = {}
    fallbacks: dict[str, Fallback] = {}
    for where, step in positions:
        _check_context(where, step, context)
        for name in (step.name, *step.aliases):
            if name in by_name:
                raise InvalidDefinition(f"{where}: the step name {name!r} is already taken.")
            by_name[name] = step
    for where, step in retired:
        _check_context(where, step, context)
        for name in (step.name, *step.aliases):
            by_name.setdefault(name, step)
    for entry in entries:
        if isinstance(entry, Fallback):
            fallbacks |= dict.fromkeys((entry.step.name, *entry.step.aliases), entry)
    return Definition(
        owner=owner,
        plan=tuple(tuple(step.name for step in _members(entry)) for entry in entries),
        steps=by_name,
        rules={name: rules_of(step) for name, step in by_name.items()},
        fallbacks=fallbacks,
        context_type=context,
    )


def _entries(owner: str, steps: object) -> tuple[StepType | Fallback, ...]:
    if not isinstance(steps, (list, tuple)) or not steps:
        raise InvalidDefinition(f"{owner}: steps must be a list with at least one step handler.")
    return tuple(steps)


def _members(entry: StepType | Fallback) -> tuple[StepType, ...]:
    return (entry.step, entry.fallback) if isinstance(entry, Fallback) else (entry,)


def _positions(owner: str, entries: tuple[StepType | Fallback, ...]) -> list[tuple[str, StepType]]:
    found = []
    for number, entry in enumerate(entries):
        where = f"{owner}, steps[{number}]"
        if isinstance(entry, Fallback):
            _check_fallback(where, entry)
        found += [(where, step) for step in _members(entry)]
    return found


def _retired(owner: str, steps: object) -> list[tuple[str, StepType]]:
    if not isinstance(steps, (list, tuple)):
        raise InvalidDefinition(f"{owner}: retired_steps must be a list of step handlers.")
    for number, step in enumerate(steps):
        if isinstance(step, Fallback):
            raise InvalidDefinition(
                f"{owner}, retired_steps[{number}]: list the Fallback's step and its fallback "
                "themselves; the plan of each execution says how they belong together."
            )
    return [(f"{owner}, retired_steps[{number}]", step) for number, step in enumerate(steps)]


def _check_calls(where: str, step: StepType) -> None:
    for action in ("act", "compensate"):
        method = inspect.getattr_static(step, action)
        if not inspect.isfunction(method):
            continue
        if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
            raise InvalidDefinition(
                f"{where}: {action} of {step.__qualname__} contains a yield, so calling it runs "
                "nothing of it; write it as def or async def without yield."
            )
        try:
            inspect.signature(method).bind("self", "context")
        except TypeError:
            raise InvalidDefinition(
                f"{where}: {action} of {step.__qualname__} must take self and the context, "
                f"it is {action}{inspect.signature(method)}."
            ) from None


def _check_fallback(where: str, entry: Fallback) -> None:
    if Fallback in map(type, _members(entry)):
        raise InvalidDefinition(f"{where}: a Fallback cannot hold another Fallback.")
    if entry.step is entry.fallback:
        raise InvalidDefinition(f"{where}: {entry.step!r} cannot be its own fallback.")
    errors = entry.failure_exceptions
    if not isinstance(errors, tuple) or not all(
        isinstance(error, type) and issubclass(error, Exception) for error in errors
    ):
        raise InvalidDefinition(
            f"{where}: failure_exceptions must be a tuple of exception types, not {errors!r}."
        )
    if never := [error.__name__ for error in errors if issubclass(error, (Abort, RetryLater))]:
        raise InvalidDefinition(
            f"{where}: failure_exceptions has {', '.join(never)}, which never leads to the "
            "fallback: after Abort what is done is undone, after RetryLater the step is called "
            "again. Let the step raise an error of its own."
        )
    breaker = entry.circuit_breaker
    if breaker is not None and not callable(getattr(breaker, "calling", None)):
        raise InvalidDefinition(f"{where}: the circuit_breaker {breaker!r} has no calling().")


def _check_step(where: str, step: object) -> None:
    if (
        not isinstance(step, type)
        or not issubclass(step, SagaStepHandler)
        or step is SagaStepHandler
    ):
        raise InvalidDefinition(
            f"{where}: expected a SagaStepHandler class or a Fallback, got {step!r}."
        )
    _check_calls(where, step)
    aliases: object = step.aliases
    if not isinstance(aliases, (list, tuple)) or not all(isinstance(a, str) for a in aliases):
        raise InvalidDefinition(f"{where}: the aliases of {step.__qualname__} must be texts.")


def _check_context(where: str, step: StepType, context: type[SagaContext]) -> None:
    wants = context_type_of(step)
    if isinstance(wants, type) and wants is not Any and not issubclass(context, wants):
        raise InvalidDefinition(
            f"{where}: {step.__qualname__} takes a {wants.__qualname__}, "
            f"but the saga's context is {context.__qualname__}."
        )


def _context_type(
    owner: str, positions: list[tuple[str, StepType]], declared: object
) -> type[SagaContext]:
    found = declared
    for _, step in positions:
        if found is None or found is Any:
            found = context_type_of(step)
    if not isinstance(found, type) or not issubclass(found, SagaContext):
        raise InvalidDefinition(
            f"{owner}: its context must derive from SagaContext, got {found!r}; "
            "write class MySaga(Saga[MyContext])."
        )
    return found
