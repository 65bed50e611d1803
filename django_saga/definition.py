"""What a saga's class declares, checked once and in the form that drivers and recovery use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from django_saga.context import ContextCodec, SagaContext
from django_saga.exceptions import InvalidDefinition, UnknownSaga
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
                "step that replaced it; then retry."
            )


def define(
    owner: str,
    steps: object,
    retired_steps: Sequence[StepType] = (),
    context_type: object = None,
) -> Definition:
    """Check a declaration; raises :class:`InvalidDefinition` naming saga, position and step."""
    entries = _entries(owner, steps)
    context = _context_type(owner, entries, context_type)
    by_name: dict[str, StepType] = {}
    fallbacks: dict[str, Fallback] = {}
    for where, step in _positions(owner, entries):
        _check_step(where, step, context)
        for name in (step.name, *step.aliases):
            if name in by_name:
                raise InvalidDefinition(f"{where}: the step name {name!r} is already taken.")
            by_name[name] = step
    for number, step in enumerate(retired_steps):
        where = f"{owner}, retired_steps[{number}]"
        _check_step(where, step, context)
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
    return [
        (f"{owner}, steps[{number}]", step)
        for number, entry in enumerate(entries)
        for step in _members(entry)
    ]


def _check_step(where: str, step: object, context: type[SagaContext]) -> None:
    if isinstance(step, Fallback):
        raise InvalidDefinition(f"{where}: a Fallback cannot hold another Fallback.")
    if not isinstance(step, type) or not issubclass(step, SagaStepHandler):
        raise InvalidDefinition(
            f"{where}: expected a SagaStepHandler class or a Fallback, got {step!r}."
        )
    wants = context_type_of(step)
    if isinstance(wants, type) and not issubclass(context, wants):
        raise InvalidDefinition(
            f"{where}: {step.__qualname__} takes a {wants.__qualname__}, "
            f"but the saga's context is {context.__qualname__}."
        )


def _context_type(
    owner: str, entries: tuple[StepType | Fallback, ...], declared: object
) -> type[SagaContext]:
    found = declared
    for _, step in _positions(owner, entries):
        if found is None and isinstance(step, type) and issubclass(step, SagaStepHandler):
            found = context_type_of(step)
    if not isinstance(found, type) or not issubclass(found, SagaContext):
        raise InvalidDefinition(
            f"{owner}: its context must derive from SagaContext, got {found!r}; "
            "write class MySaga(Saga[MyContext])."
        )
    return found
