"""What happened to an execution and what comes next, in sentences; and what became of each step."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db.models import Count, Sum
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from django_saga import machine, registry
from django_saga.interventions import CANCELLED
from django_saga.machine import Action, Effect, Outcome, State
from django_saga.models import SagaExecution, SagaPause
from django_saga.spans import span

Status = SagaExecution.Status


def happened(execution: SagaExecution, now: datetime) -> str:
    """What happened, in a sentence or two."""
    facts = _facts(execution, now)
    match execution.status:
        case Status.PENDING:
            return _("It was stored %(age)s ago and has not begun.") % facts
        case Status.COMPLETED:
            steps = ngettext(
                "Its %(number)s step is done, in %(duration)s.",
                "All its %(number)s steps are done, in %(duration)s.",
                facts["number"],
            )
            return steps % facts
        case Status.FAILED if execution.error_type == CANCELLED:
            return _("It was cancelled %(why)s. All that was done is undone; no effect stands.") % (
                facts
            )
        case Status.FAILED if not execution.failed_step:
            return _("It was abandoned between two steps, and all that was done is undone.")
        case Status.FAILED:
            return (
                _("%(failed)s failed, and all that was done is undone. No effect stands.") % facts
            )
        case Status.STUCK:
            if all(e.step in execution.stuck_reason for e in machine.standing(execution.state)):
                return execution.stuck_reason
            stands = _("These effects stand, or may stand: %(stands)s.") % facts
            return f"{execution.stuck_reason} {stands}"
        case Status.COMPENSATING if execution.error_type == CANCELLED:
            return _("It was cancelled %(why)s; what was done is being undone.") % facts + _where(
                facts
            )
        case Status.COMPENSATING if execution.failed_step:
            return _("%(failed)s failed; what was done is being undone.") % facts + _where(facts)
        case Status.COMPENSATING:
            return _("What was done is being undone.") + _where(facts)
    return _("%(done)s of %(number)s steps are done.") % facts + _where(facts)


def _where(facts: dict[str, Any]) -> str:
    if facts["driven"] and facts["in_flight"]:
        text = _("%(driver)s is in %(action)s of %(step)s, attempt %(attempt)s.")
    elif facts["driven"]:
        text = _("%(driver)s is about to begin attempt %(attempt)s, %(action)s of %(step)s.")
    elif facts["in_flight"]:
        text = _(
            "Its driver %(driver)s was lost in %(action)s of %(step)s, attempt %(attempt)s; "
            "whether that had its effect is not known."
        )
    elif facts["attempt"] > 1:
        text = _("%(action)s of %(step)s did not succeed yet; attempt %(attempt)s is next.")
    else:
        text = _("%(action)s of %(step)s is next.")
    return " " + text % facts


def comes_next(
    execution: SagaExecution, now: datetime, retried: bool, pause: SagaPause | None = None
) -> str:
    """What comes next by itself, and what an operator can do; ``pause``: what holds it up."""
    if pause is None:
        return turn_of(execution) or _comes_next(execution, now, retried)
    text = _is_paused(pause)
    return f"{text} {_comes_next(execution, now, retried)}" if is_driven(execution, now) else text


def _is_paused(pause: SagaPause) -> str:
    if pause.reason:
        text = _("Nothing more begins until %(what)s is resumed; %(user)s paused it: %(why)s")
    else:
        text = _("Nothing more begins until %(what)s is resumed; %(user)s paused it.")
    user = pause.user_name or _("somebody")
    return text % {"what": str(pause), "user": user, "why": pause.reason}


def turn_of(execution: SagaExecution) -> str:
    """That it waits for its turn, and how many run meanwhile; empty where it does not."""
    forward = execution.status in (Status.PENDING, Status.RUNNING)
    if execution.limit_key is None or execution.slot is not None or not forward:
        return ""
    most = registry.limit_of(execution.saga)
    rows = SagaExecution.objects.using(execution._state.db).filter(slot__isnull=False)
    running = rows.filter(saga=execution.saga, limit_key=execution.limit_key).count()
    if most is None or running < most:
        return ""
    facts = {"n": running, "most": most, "saga": execution.saga}
    if execution.limit_key:  # which may tell what the context holds
        text = _("It waits for its turn: %(n)s of %(most)s of %(saga)s with its key are running.")
    else:
        text = _("It waits for its turn: %(n)s of %(most)s of %(saga)s are running.")
    return text % facts


def pause_of(execution: SagaExecution) -> SagaPause | None:
    """What keeps an execution from going on, if anything does."""
    if not execution.is_active:
        return None
    pauses = SagaPause.objects.using(execution._state.db).filter(saga=execution.saga)
    return pauses.filter(step__in=["", execution.step]).order_by("step").first()


def asked_to_cancel(execution: SagaExecution) -> str:
    """That it turns back as soon as the step in hand has ended, by whom and why; else empty."""
    if not execution.cancel_reason or execution.status not in (Status.PENDING, Status.RUNNING):
        return ""
    facts = {"why": execution.cancel_reason, "step": execution.step}
    return _("It is to be cancelled, %(why)s: it turns back when %(step)s has ended.") % facts


def _comes_next(execution: SagaExecution, now: datetime, retried: bool) -> str:
    facts = _facts(execution, now)
    if execution.status == Status.COMPLETED:
        return _("There is nothing to do.")
    if execution.blanked_at and not retried:
        return _("Nothing can be done: its context was removed by retention.")
    if execution.status == Status.FAILED and execution.error_type == CANCELLED and not retried:
        return _("Nothing: it was cancelled on purpose. A retry would start it anew.")
    if execution.status == Status.FAILED:
        if retried:
            return _("It was retried; the new execution is linked here.")
        if execution.settled_at:
            return _("It was dealt with by hand.")
        return _("A retry starts it anew, as a linked execution with the original context.")
    if execution.status == Status.STUCK:
        if execution.settled_at:
            return _("It was settled by hand, and asks for nobody's attention.")
        if execution.action == Action.ACT:
            return _waits_at_act(facts)
        if not facts["undo"]:
            return _("Nothing is left to undo: a retry ends it as failed.")
        text = _(
            "It waits for you. Remove the cause first; a retry then tries again to undo %(undo)s."
        )
        return text % facts
    if facts["driven"]:
        text = _(
            "There is nothing to do. If its driver is lost, another takes over when the lease is "
            "past, in %(lease)s."
        )
        return text % facts
    if execution.wake_at and execution.wake_at > now:
        return _waits(execution) % facts
    if facts["handed_over"]:
        return _("It was handed to the backend, and waits for a worker.")
    if facts["in_flight"]:
        return _(
            "recover_sagas takes over when it runs next; recover it to do that now. The step runs "
            "again, as the next attempt, with the same idempotency key."
        )
    return _("recover_sagas drives it on when it runs next; recover it to do that now.")


def _waits_at_act(facts: dict[str, Any]) -> str:
    text = _("It waits for you. Once the cause is removed it can go forward from %(step)s.")
    back = _("Or a retry undoes %(undo)s.") if facts["undo"] else _("Or a retry ends it as failed.")
    return f"{text} {back}" % facts


def _waits(execution: SagaExecution) -> str:
    if execution.attempt == 1:
        return _("There is nothing to do: it goes on by itself in %(wake)s.")
    if execution.action == Action.ACT:
        return _(
            "Retry of %(step)s in %(wake)s, by itself: attempt %(attempt)s. There is nothing to do."
        )
    return _(
        "The compensation of %(step)s is tried again in %(wake)s, by itself: attempt %(attempt)s."
    )


def _facts(execution: SagaExecution, now: datetime) -> dict[str, Any]:
    state = execution.state
    lease, wake, grace = execution.lease_until, execution.wake_at, execution.grace_until
    return {
        "age": span(now - execution.created_at),
        "duration": span(execution.duration),
        "number": len(state.plan),
        "done": sum(effect.act is Outcome.DONE and effect.undo is None for effect in state.effects),
        "failed": execution.failed_step,
        "why": execution.error_message,
        "step": execution.step,
        "action": execution.action,
        "attempt": execution.attempt,
        "driver": execution.driver or _("nobody"),
        "in_flight": execution.in_flight,
        "driven": is_driven(execution, now),
        "handed_over": lease is None and grace is not None and grace > now,
        "lease": span(lease - now) if lease else "",
        "wake": span(wake - now) if wake else "",
        "stands": ", ".join(e.step for e in machine.standing(state)),
        "undo": _in_order(state),
    }


def _is_done(effect: Effect | None) -> bool:
    return effect is not None and effect.act is Outcome.DONE


def is_driven(execution: SagaExecution, now: datetime) -> bool:
    """Whether somebody holds its lease."""
    return execution.lease_until is not None and execution.lease_until > now


def _in_order(state: State) -> str:
    """What is left to undo, in the order in which that is tried."""
    return _(", then ").join(effect.step for effect in reversed(machine.standing(state)))


@dataclass(frozen=True)
class StepFate:
    """What became of one step of the plan."""

    number: str
    step: str
    fallback_of: str
    kind: str  # for its colour, and its mark in the drawing
    fate: str
    acts: int  # attempts that came to an end
    compensations: int
    took: str


def fates(
    execution: SagaExecution, now: datetime, attempts: dict[tuple[str, str], tuple[int, float]]
) -> list[StepFate]:
    """The plan with each step's fate; ``attempts``: number and seconds by step and action."""
    state = execution.state
    effects = {effect.step: effect for effect in state.effects}
    lost = state.in_flight and not is_driven(execution, now)
    rows = []
    for number, entry in enumerate(state.plan, 1):
        for place, step in enumerate(entry):
            acts, act_seconds = attempts.get((step, Action.ACT), (0, 0.0))
            undos, undo_seconds = attempts.get((step, Action.COMPENSATE), (0, 0.0))
            if lost and step == state.step:
                kind, fate = "lost", _("its driver was lost: not known")
            elif place and _is_done(effects.get(entry[0])):
                kind, fate = "spare", _("not needed")
            else:
                kind, fate = _fate(state, step, effects.get(step), acts)
            rows.append(
                StepFate(
                    number="" if place else str(number),
                    step=step,
                    fallback_of=entry[0] if place else "",
                    kind=kind,
                    fate=fate,
                    acts=acts,
                    compensations=undos,
                    took=span(act_seconds + undo_seconds) if acts or undos else "",
                )
            )
    return rows


def attempts(records: Any) -> dict[tuple[str, str], tuple[int, float]]:
    """How many attempts each action of each step took, and how many seconds, of its records."""
    rows = records.order_by().values_list("step", "action")
    return {
        (step, action): (number, seconds or 0.0)
        for step, action, number, seconds in rows.annotate(n=Count("pk"), s=Sum("duration"))
    }


def _fate(state: State, step: str, effect: Effect | None, acts: int) -> tuple[str, str]:
    here = state.active and state.step == step
    if here and state.action is Action.COMPENSATE:
        if state.in_flight:
            return "compensating", _("being undone")
        return "standing", _("to be undone next")
    if here and state.in_flight:
        return "running", _("in act")
    if here:
        return "pending", _("next") if acts == 0 else _("waits for its next attempt")
    if effect is not None:
        return _effect_fate(state, effect)
    if acts:
        return "failed", _("failed, without effect")
    if state.status in (machine.Status.PENDING, machine.Status.RUNNING) and _is_ahead(state, step):
        return "ahead", _("to come")
    if state.status is machine.Status.COMPLETED:
        return "spare", _("not needed")
    return "unbegun", _("not begun")


def _effect_fate(state: State, effect: Effect) -> tuple[str, str]:
    known = effect.act is Outcome.DONE
    if effect.undo is Outcome.DONE:
        return "undone", _("undone")
    if effect.undo is Outcome.FAILED:
        if known:
            return "stuck", _("stands: its compensation failed")
        return "stuck", _("may stand: its compensation failed")
    if state.status in (machine.Status.COMPENSATING, machine.Status.STUCK):
        return "standing", _("stands, not undone yet") if known else _("may stand, not undone yet")
    return ("completed", _("done")) if known else ("unknown", _("not known"))


def _is_ahead(state: State, step: str) -> bool:
    entries = [i for i, entry in enumerate(state.plan) if state.step in entry]
    return bool(entries) and any(step in entry for entry in state.plan[entries[0] :])
