"""A saga's definition drawn as Mermaid: pure functions from the definition to text."""

from __future__ import annotations

import re
from collections.abc import Iterator

from django_saga.definition import Definition
from django_saga.steps import Fallback, SagaStepHandler, StepType


def flowchart(definition: Definition, name: str) -> str:
    """The steps on their way to COMPLETED, and from each the way back to FAILED or STUCK."""
    numbers = range(len(definition.plan))
    lines = ["flowchart TD", f"    saga([{_quoted(name)}])"]
    for number in numbers:
        for node, step in _nodes(definition, number):
            lines.append(f"    {node}[{_quoted(step.name, *_notes(step))}]")
    lines += ['    completed(["COMPLETED"])', "    saga --> s0"]
    for number in numbers:
        lines += _forward(definition, number)
    for number in reversed(numbers):
        if _is_undone(definition, number):
            lines.append(f"    u{number}[/{_quoted(*_undoing(definition, number))}/]")
    lines.append('    failed(["FAILED"])')
    for number in numbers:
        lines += _backward(definition, number)
    for number in reversed(numbers):
        if _is_undone(definition, number):
            lines.append(f"    u{number} --> {_undone_before(number)}")
    if _is_undone(definition, 0):
        lines += ['    stuck(["STUCK"])', f"    u0 -.->|{_quoted('a compensation failed')}| stuck"]
    return "\n".join(lines) + "\n"


def sequence(definition: Definition, name: str) -> str:
    """The calls that the saga makes: the acts, and the compensations when one fails."""
    numbers = range(len(definition.plan))
    participants = [("saga", name)]
    for number in numbers:
        participants += [(node, step.name) for node, step in _nodes(definition, number)]
    lines = ["sequenceDiagram"]
    lines += [f"    participant {node} as {_escaped(text)}" for node, text in participants]
    for number in numbers:
        lines += _acts(definition, number)
    lines += ["    alt every step is done", "        Note over saga: COMPLETED"]
    lines.append("    else a step failed, what is done is undone, the latest first")
    for number in reversed(numbers):
        lines += _compensations(definition, number)
    lines += ["        Note over saga: FAILED, or STUCK if a compensation failed", "    end"]
    return "\n".join(lines) + "\n"


# What the definition says


def _nodes(definition: Definition, number: int) -> Iterator[tuple[str, StepType]]:
    """A step of the plan, and its fallback, with their names in the diagram."""
    for prefix, step in zip("sf", definition.plan[number], strict=False):
        yield f"{prefix}{number}", definition.steps[step]


def _fallback(definition: Definition, number: int) -> Fallback | None:
    return definition.fallbacks.get(definition.plan[number][0])


def _is_last(definition: Definition, number: int) -> bool:
    return number == len(definition.plan) - 1


def _is_undone(definition: Definition, number: int) -> bool:
    """The last step is compensated only for an unknown outcome, which an atomic one never has."""
    steps = [step for _, step in _nodes(definition, number)]
    return not _is_last(definition, number) or not all(step.atomic for step in steps)


def _undone_before(number: int) -> str:
    return f"u{number - 1}" if number else "failed"


def _notes(step: StepType) -> list[str]:
    notes = ["atomic"] if step.atomic else []
    if step.retry.attempts > 1:
        notes.append(f"up to {step.retry.attempts} attempts")
    if step.timeout is not None:
        notes.append(f"timeout {step.timeout:g} s")
    return [", ".join(notes)] if notes else []


def _stands_in_for(fallback: Fallback) -> str:
    errors = [error.__name__ for error in fallback.failure_exceptions] or ["any error but Abort"]
    if fallback.circuit_breaker is not None:
        errors.append("circuit open")
    return ", ".join(errors)


# Flow chart


def _forward(definition: Definition, number: int) -> list[str]:
    following = "completed" if _is_last(definition, number) else f"s{number + 1}"
    lines = [f"    {node} --> {following}" for node, _ in _nodes(definition, number)]
    fallback = _fallback(definition, number)
    if fallback is not None:
        lines.append(f"    s{number} -->|{_quoted(_stands_in_for(fallback))}| f{number}")
    return lines


def _backward(definition: Definition, number: int) -> list[str]:
    """A known failure undoes what came before; an unknown outcome is itself undone first."""
    lines = []
    fallback = _fallback(definition, number)
    for node, step in _nodes(definition, number):
        failed, unknown = "failed", "outcome unknown"
        if fallback is not None and step is fallback.step:
            failed = "any other error" if fallback.failure_exceptions else "Abort"
        lines.append(f"    {node} -.->|{_quoted(failed)}| {_undone_before(number)}")
        if not step.atomic and failed != "Abort":  # else it is undone, and the fallback begins
            lines.append(f"    {node} -.->|{_quoted(unknown)}| u{number}")
    return lines


def _undoing(definition: Definition, number: int) -> list[str]:
    steps = [step for _, step in _nodes(definition, number)]
    lines = [f"undo {' or '.join(step.name for step in steps)}"]
    if all(step.compensate is SagaStepHandler.compensate for step in steps):
        lines.append("nothing to do")
    return lines


# Sequence diagram


def _acts(definition: Definition, number: int) -> list[str]:
    lines = []
    fallback = _fallback(definition, number)
    for node, step in _nodes(definition, number):
        act = f"    saga->>{node}: {_escaped(', '.join(['act', *_notes(step)]))}"
        if fallback is not None and step is fallback.fallback:
            why = _escaped(f"{fallback.step.name} failed, {_stands_in_for(fallback)}")
            lines += [f"    opt {why}", f"    {act}", "    end"]
        else:
            lines.append(act)
    return lines


def _compensations(definition: Definition, number: int) -> list[str]:
    if not _is_undone(definition, number):
        return []
    text = "compensate"
    if _is_last(definition, number):
        text += ", if its outcome is unknown"
    elif _fallback(definition, number) is not None:
        text += ", if it was done"
    nodes = [node for node, step in _nodes(definition, number)]
    return [f"        saga->>{node}: {text}" for node in reversed(nodes)]


# Text


def _quoted(*lines: str) -> str:
    return '"' + "<br/>".join(map(_escaped, lines)) + '"'


def _escaped(text: str) -> str:
    """Text in which Mermaid sees no syntax and no markdown; it turns the ``#65;`` back itself."""
    printable = "".join(c if c.isprintable() else " " for c in text).strip()
    return _SYNTAX.sub(lambda match: f"#{ord(match[0])};", printable or "(no name)")


# What is no word, space, dot or comma; and the dot that would make a number a list's.
_SYNTAX = re.compile(r"[^\w .,]|(?<=\d)\.(?= |$)")
