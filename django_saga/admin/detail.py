"""What the page of one execution shows."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Count, QuerySet, Sum
from django.http import HttpRequest
from django.utils.timezone import is_aware, localtime
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_saga import registry
from django_saga.admin.addresses import number_of
from django_saga.admin.chain import chain_of
from django_saga.admin.contexts import changes_of, contexts_of, sensitive_of
from django_saga.admin.drawn import drawings
from django_saga.admin.effects import Attempts, Tries, effects_of
from django_saga.admin.formats import JSON_LIMIT, span, status_badge
from django_saga.admin.frames import own_frames
from django_saga.admin.links import links_of
from django_saga.admin.rows import stored
from django_saga.exceptions import UnknownSaga
from django_saga.masking import mask_json
from django_saga.models import SagaAuditEntry, SagaExecution, SagaStepRecord
from django_saga.operations import VERBS
from django_saga.operations.viewing import PERMISSION as VIEW_CONTEXT
from django_saga.story import asked_to_cancel, comes_next, fates, happened, is_driven, pause_of
from django_saga.texts import told
from django_saga.troubles import troubles_of

VIEW_TRACEBACK = "django_saga.view_traceback_sagaexecution"
RECORDS = 50  # on one page
DEEDS = 20  # entries of the audit that are shown
SOON, LATE = 3, 30  # seconds between two looks at what is live

Records = QuerySet[SagaStepRecord]
Executions = QuerySet[SagaExecution]


def unreadable(execution: SagaExecution) -> str:
    """Why nothing can be said of an execution; empty where its row was not spoilt."""
    try:
        execution.state  # noqa: B018
    except ValueError as error:
        return spoilt(error)
    return ""


def spoilt(error: Exception) -> str:
    """That a row cannot be read, in words."""
    return _("Its row cannot be read, was it edited? %(error)s") % {"error": told(error)}


def context_of(
    request: HttpRequest, execution: SagaExecution, rows: Executions, *, masked: bool = True
) -> dict[str, Any]:
    """The template's context for an execution that was read with the database's clock.

    ``rows`` are the executions that the user may see.
    """
    now: datetime = execution.db_now  # type: ignore[attr-defined]
    chain = chain_of(execution, rows)
    records = stored(request, SagaStepRecord.objects.filter(execution=execution))
    traced = request.user.has_perm(VIEW_TRACEBACK)
    attempts = _attempts(records)
    tries = {key: (one.number, one.seconds) for key, one in attempts.items()}
    history = _history(request, records if traced else records.defer("traceback"))
    plan = fates(execution, now, tries)
    deeds = _deeds(execution)
    pause = pause_of(execution)
    return {
        "execution": execution,
        "now": now,
        "badge": status_badge(execution),
        "happened": happened(execution, now),
        "next": comes_next(execution, now, _is_retried(execution, chain), pause),
        "pause": pause,
        "cancelled": asked_to_cancel(execution),
        "undefined": _undefined(execution),
        "troubles": [
            (trouble, own_frames(trouble.traceback))
            for trouble in troubles_of(execution, records, traced=traced)
        ],
        "plan": plan,
        "facts": _facts(execution, now),
        "chain": chain,
        "json_limit": JSON_LIMIT,
        "traced": traced,
        "links": links_of(execution),
        "every": _every(execution, now) if masked and not history["is_earlier"] else 0,
        **effects_of(execution, attempts, is_driven(execution, now)),
        **history,
        **drawings(execution, now, plan, history["records"], to_now=not history["is_earlier"]),
        **_contexts(request, execution, history, deeds, masked),
        "deeds": [_told(deed, execution, request.user.has_perm(VIEW_CONTEXT)) for deed in deeds],
    }


def _is_retried(execution: SagaExecution, chain: list[SagaExecution]) -> bool:
    return bool(chain) and chain[-1].pk != execution.pk


def _every(execution: SagaExecution, now: datetime) -> int:
    """Seconds until a browser may look again; 0: nothing is going to change by itself."""
    if not execution.is_active:
        return 0
    wait = (execution.wake_at - now).total_seconds() if execution.wake_at else 0.0
    return int(min(max(wait / 10, SOON), LATE))


def _undefined(execution: SagaExecution) -> str:
    """What the code no longer defines of it, so that it could not be driven."""
    try:
        saga = registry.find_saga(execution.saga)
        if execution.is_active or execution.status == "STUCK":
            saga.definition.require([name for entry in execution.state.plan for name in entry])
    except UnknownSaga as error:
        return str(error)
    return ""


def _attempts(records: Records) -> Attempts:
    """The attempts of each action of each step, taken together."""
    rows = records.order_by().values_list("step", "action", "outcome")
    found: Attempts = {}
    for step, action, outcome, number, seconds in rows.annotate(n=Count("pk"), s=Sum("duration")):
        before = found.get((step, action), Tries())
        found[step, action] = Tries(
            before.number + number,
            before.seconds + (seconds or 0.0),
            before.done or outcome == SagaStepRecord.Outcome.DONE,
        )
    return found


def _history(request: HttpRequest, records: Records) -> dict[str, Any]:
    """The newest records, or those before the one that is asked for; oldest on top."""
    before = number_of(request.GET.get("before", ""))
    if before is not None:
        records = records.filter(pk__lt=before)
    newest = list(records.order_by("-pk")[: RECORDS + 1])
    page = newest[:RECORDS][::-1]
    for record in page:
        record.took = span(record.duration)  # type: ignore[attr-defined]
    return {
        "records": page,
        "earlier": page[0].pk if len(newest) > RECORDS else None,
        "is_earlier": before is not None,
    }


def _facts(execution: SagaExecution, now: datetime) -> list[tuple[str, Any, str]]:
    """Name, value and remark of what the row says about its driver."""
    lease, wake, grace = execution.lease_until, execution.wake_at, execution.grace_until
    facts: list[tuple[str, Any, str]] = [
        (_("created"), _at(execution.created_at), _ago(execution.created_at, now)),
        (_("latest change"), _at(execution.updated_at), _ago(execution.updated_at, now)),
    ]
    if execution.finished_at:
        facts.append((_("ended"), _at(execution.finished_at), _ago(execution.finished_at, now)))
        facts.append((_("duration"), span(execution.duration), ""))
    if execution.is_active:
        facts += [
            (_("lease until"), _at(lease) or _("free"), _ago(lease, now)),
            (_("wakes at"), _at(wake) or "-", _ago(wake, now)),
            (_("left alone until"), _at(grace) or "-", _ago(grace, now)),
        ]
    driver = _("driver") if execution.is_active else _("last driver")
    return [
        *facts,
        (driver, execution.driver or "-", ""),
        (_("fencing token"), execution.token, ""),
        (_("recoveries without progress"), execution.recoveries, ""),
    ]


def _at(at: datetime | None) -> str:
    if at is None:
        return ""
    return f"{localtime(at) if is_aware(at) else at:%Y-%m-%d %H:%M:%S}"


def _ago(at: datetime | None, now: datetime) -> str:
    if at is None:
        return ""
    if at > now:
        return _("in %(time)s") % {"time": span(at - now)}
    return _("%(time)s ago") % {"time": span(now - at)}


def _contexts(
    request: HttpRequest,
    execution: SagaExecution,
    history: dict[str, Any],
    deeds: list[SagaAuditEntry],
    masked: bool,
) -> dict[str, Any]:
    """Only for who may see contexts: as they are stored, and what each attempt changed."""
    if not request.user.has_perm(VIEW_CONTEXT):
        return {"sees_context": False}
    edits = [deed for deed in deeds if deed.tells_context]
    from_start = not history["earlier"]
    return {
        "sees_context": True,
        "masked": masked,
        "contexts": contexts_of(execution, masked=masked),
        "changes": changes_of(execution, history["records"], edits, from_start=from_start),
    }


def _deeds(execution: SagaExecution) -> list[SagaAuditEntry]:
    """What was asked for, newest first, refusals too."""
    entries = SagaAuditEntry.objects.using(execution._state.db).filter(execution_id=execution.pk)
    return list(entries.order_by("-pk")[:DEEDS])


def _was_done(deed: SagaAuditEntry) -> bool:
    return deed.result == SagaAuditEntry.Result.DONE


def _told(deed: SagaAuditEntry, execution: SagaExecution, sees_context: bool) -> dict[str, Any]:
    verb = VERBS.get(deed.verb)
    detail = mask_json(deed.detail, sensitive_of(execution))
    if deed.tells_context and not sees_context:
        detail = ""
    return {
        "at": deed.at,
        "user": deed.user_name or deed.source,
        "verb": verb.label if verb else _OTHERS.get(deed.verb, deed.verb),
        "result": deed.get_result_display(),
        "kind": "outcome-done" if _was_done(deed) else "outcome-failed",
        "reason": deed.reason,
        "detail": detail,
        "source": deed.source,
        "batch": deed.batch_id,
    }


_OTHERS = {"view_context": gettext_lazy("View the context unmasked")}
