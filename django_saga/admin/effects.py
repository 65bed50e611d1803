"""The effects of an execution out there: which stand now, and how that is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from django_saga import machine
from django_saga.admin.formats import span
from django_saga.machine import Action, Effect, Outcome
from django_saga.models import SagaExecution


@dataclass(frozen=True)
class Tries:
    """The finished attempts of one action of one step."""

    number: int = 0
    seconds: float = 0.0
    done: bool = False  # whether one of them did it


Attempts = dict[tuple[str, str], Tries]


@dataclass(frozen=True)
class EffectRow:
    """One effect, for the table."""

    step: str
    kind: str  # for its colour
    now: str
    act: str
    undo: str


def words(effect: Effect) -> tuple[str, str]:
    """The kind of what became of an effect, and that in words."""
    known = effect.act is Outcome.DONE
    if effect.undo is Outcome.DONE:
        return "undone", _("undone")
    if effect.undo is Outcome.FAILED:
        if known:
            return "stuck", _("stands: it could not be undone")
        return "stuck", _("may stand: it could not be undone")
    return ("completed", _("done: it stands")) if known else ("unknown", _("unknown: it may stand"))


def effects_of(execution: SagaExecution, attempts: Attempts, driven: bool) -> dict[str, Any]:
    """Each effect in the order in which the acts began, and how many stand."""
    state = execution.state
    rows = [_row(effect, attempts) for effect in state.effects]
    stand = {effect.step for effect in machine.standing(state)}
    if state.active and state.in_flight and state.action is Action.ACT:
        rows = [row for row in rows if row.step != state.step]
        rows.append(_in_flight(state.step, driven))
        stand.add(state.step)
    return {"effects": rows, "stand": _how_many(len(stand))}


def _how_many(number: int) -> str:
    if not number:
        return _("No effect stands.")
    text = ngettext(
        "%(n)s effect stands, or may stand.", "%(n)s effects stand, or may stand.", number
    )
    return text % {"n": number}


def _row(effect: Effect, attempts: Attempts) -> EffectRow:
    acts = attempts.get((effect.step, Action.ACT), Tries())
    undos = attempts.get((effect.step, Action.COMPENSATE), Tries())
    kind, now = words(effect)
    return EffectRow(
        step=effect.step,
        kind=kind,
        now=now,
        act=_told(acts, by_hand=effect.act is Outcome.DONE and not acts.done),
        undo=_told(undos, by_hand=effect.undo is Outcome.DONE and not undos.done),
    )


def _told(tries: Tries, *, by_hand: bool) -> str:
    """How an action ended; what is done without an attempt that did it was marked by hand."""
    said = [_("marked as done by hand")] if by_hand else []
    if tries.number:
        attempts = ngettext("%(n)s attempt", "%(n)s attempts", tries.number)
        said.append(attempts % {"n": tries.number})
        said.append(span(tries.seconds))
    return ", ".join(said)


def _in_flight(step: str, driven: bool) -> EffectRow:
    if driven:
        return EffectRow(step, "running", _("in its act now"), "", "")
    return EffectRow(step, "lost", _("unknown: its driver was lost in it"), "", "")
