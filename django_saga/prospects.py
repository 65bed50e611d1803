"""What a verb would do to an execution, or why it cannot: said before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from django.utils.translation import gettext as _

from django_saga import registry
from django_saga.exceptions import UnknownSaga
from django_saga.machine import Action
from django_saga.models import SagaExecution
from django_saga.story import _facts, _in_order
from django_saga.verdicts import Verdict


def will_run(execution: SagaExecution, verdict: str, verb: str = "") -> str:
    """What a verb does to this execution, said before it is done; retry and recover by default."""
    facts = _what_runs(execution)
    if verb in _WILL:
        return _WILL[verb](execution, verdict) % facts
    match verdict:
        case Verdict.ANEW | Verdict.CANCELLED:
            return _("A new execution starts with the original context, at the first step.")
        case Verdict.AGAIN if facts["undo"]:
            return _("It tries to undo %(undo)s, with the same idempotency keys.") % facts
        case Verdict.AGAIN:
            return _("Nothing is left to undo: it ends as failed.")
        case Verdict.ON if execution.in_flight:
            return (
                _("%(action)s of %(step)s runs again, as attempt %(next)s, with the same %(key)s.")
                % facts
            )
        case Verdict.ON:
            return (
                _("It goes on with %(action)s of %(step)s, attempt %(attempt)s, with the %(key)s.")
                % facts
            )
    return ""


def _what_runs(execution: SagaExecution) -> dict[str, Any]:
    key = f"{execution.pk}:{execution.step}:{execution.action}"
    return {
        "step": execution.step,
        "action": execution.action,
        "attempt": execution.attempt,
        "next": execution.attempt + 1,
        "key": _("idempotency key %(key)s") % {"key": key},
        "undo": _in_order(execution.state),
        "driver": execution.driver or _("nobody"),
    }


def _will_cancel(execution: SagaExecution, verdict: str) -> str:
    if verdict == Verdict.SOON:
        return _("%(driver)s has it in hand: it turns back when %(action)s of %(step)s has ended.")
    if execution.in_flight and execution.step not in _in_order(execution.state):
        return _(
            "It turns back: %(step)s, whose outcome is not known, is undone first; then what was "
            "done before. It ends as failed."
        )
    if _in_order(execution.state):
        return _("It turns back and undoes %(undo)s; it ends as failed.")
    return _("Nothing is done yet, so nothing is undone: it ends as failed.")


def _will_mark(execution: SagaExecution, verdict: str) -> str:
    if execution.action == Action.ACT:
        return _("%(step)s counts as done, and the saga goes on with the step after it.")
    if verdict == Verdict.AGAIN:
        return _("The step counts as undone. Nothing runs before it is retried.")
    return _("%(step)s counts as undone, and the saga goes on undoing.")


def _will_abandon(execution: SagaExecution, verdict: str) -> str:
    if _in_order(execution.state):
        return _("Nothing runs any more. These effects stand from then on: %(undo)s.")
    return _("Nothing runs any more.")


def _will_edit(execution: SagaExecution, verdict: str) -> str:
    if verdict == Verdict.AGAIN:
        return _("Nothing runs by it; a retry gets the new context.")
    return _("It goes on with the new context: the next attempt is %(action)s of %(step)s.")


def drives(verb: str, verdict: str) -> bool:
    """Whether this has the execution driven on at once."""
    if verb in ("release", "resolve", "abandon") or verdict == Verdict.SOON:
        return False
    return verb not in ("mark_done", "edit_context") or verdict != Verdict.AGAIN


_WILL: dict[str, Callable[[SagaExecution, str], str]] = {
    "cancel": _will_cancel,
    "resume_forward": lambda *_seen: _("%(action)s of %(step)s runs again, with the same %(key)s."),
    "skip": lambda *_seen: _("act of %(step)s does not run; the saga goes on with the next step."),
    "mark_done": _will_mark,
    "edit_context": _will_edit,
    "release": lambda *_seen: _(
        "%(driver)s loses the lease and writes nothing more. If it still lives, it may be calling "
        "%(step)s while %(action)s of it runs again, with the same %(key)s."
    ),
    "resolve": lambda *_seen: _("Nothing runs. It stays stuck, but asks for nobody's attention."),
    "abandon": _will_abandon,
}


def why_never(execution: SagaExecution, verb: str) -> str:
    """What the saga's own definition does not allow; empty where it allows the verb."""
    if verb != "edit_context":
        return ""
    try:
        saga = registry.find_saga(execution.saga)
    except UnknownSaga as error:
        return str(error)
    if not saga.context_editable:
        return _("The saga does not allow it: its context_editable is False.")
    return ""


def why_not(execution: SagaExecution, verdict: str, now: datetime) -> str:
    """Why a verb that is not possible under this verdict cannot be done."""
    facts = _facts(execution, now) | {"status": execution.get_status_display()}
    match verdict:
        case Verdict.DRIVEN:
            text = _("It is being driven by %(driver)s, whose lease lasts for %(lease)s more.")
        case Verdict.WAITING:
            text = _("It waits, and goes on by itself in %(wake)s.")
        case Verdict.COMPLETED:
            text = _("It is completed; there is nothing to do.")
        case Verdict.ACTIVE:
            text = _("It has not ended: it is %(status)s.")
        case Verdict.STUCK | Verdict.FAILED if execution.settled_at:
            text = _("It has ended, as %(status)s, and was dealt with already.")
        case Verdict.STUCK | Verdict.FAILED:
            text = _("It has ended, as %(status)s; retry it.")
        case Verdict.RETRIED:
            text = _("It has been retried already.")
        case Verdict.TURNED:
            text = _("It is %(status)s, and never goes forward again.")
        case Verdict.PAUSED:
            text = _("It is paused; resume its saga and its step first.")
        case Verdict.SETTLED:
            text = _("It was settled by hand already.")
        case Verdict.BLANKED:
            text = _("Its context was removed by retention, so it cannot be started anew.")
        case Verdict.FREE:
            text = _("Nobody holds it; there is no lease to release.")
        case _other:
            text = _("It is %(status)s.")
    return text % facts
