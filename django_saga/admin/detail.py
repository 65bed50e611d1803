"""What the page of one execution shows."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.contrib.admin.models import LogEntry
from django.contrib.contenttypes.models import ContentType
from django.http import HttpRequest
from django.utils.timezone import is_aware, localtime
from django.utils.translation import gettext as _

from django_saga import registry
from django_saga.admin.drawn import drawings
from django_saga.admin.formats import JSON_LIMIT, pretty, span, status_badge
from django_saga.exceptions import UnknownSaga
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.story import attempts, comes_next, fates, happened

if TYPE_CHECKING:
    from django.db.models import QuerySet

RECORDS = 50  # on one page
OTHERS = 20  # retries and log entries that are shown


def context_of(request: HttpRequest, execution: SagaExecution) -> dict[str, Any]:
    """The template's context for an execution that was read with the database's clock."""
    now: datetime = execution.db_now  # type: ignore[attr-defined]
    alias = execution._state.db
    rows = SagaExecution.objects.using(alias).only("id", "saga", "status", "created_at")
    retries = list(rows.filter(retry_of=execution).order_by("created_at")[:OTHERS])
    records = SagaStepRecord.objects.using(alias).filter(execution=execution)
    plan = fates(execution, now, attempts(records))
    history = _history(request, records)
    return {
        "execution": execution,
        "now": now,
        "badge": status_badge(execution),
        "happened": happened(execution, now),
        "next": comes_next(execution, now, bool(retries)),
        "undefined": _undefined(execution),
        "plan": plan,
        "undo_error": _undo_error(execution, records),
        "facts": _facts(execution, now),
        "origin": rows.filter(pk=execution.retry_of_id).first() if execution.retry_of_id else None,
        "retries": retries,
        "log": _log(execution),
        "contexts": _contexts(execution),
        "json_limit": JSON_LIMIT,
        **history,
        **drawings(execution, now, plan, history["records"], to_now=not history["is_earlier"]),
    }


def _undo_error(
    execution: SagaExecution, records: QuerySet[SagaStepRecord]
) -> SagaStepRecord | None:
    """Why the latest compensation of a stuck execution failed; its own error is the act's."""
    if execution.status != SagaExecution.Status.STUCK:
        return None
    undone = records.filter(action="compensate", step=execution.step).exclude(outcome="DONE")
    return undone.defer("traceback").order_by("-pk").first()


def _undefined(execution: SagaExecution) -> str:
    """What the code no longer defines of it, so that it could not be driven."""
    try:
        saga = registry.find_saga(execution.saga)
        if execution.is_active or execution.status == "STUCK":
            saga.definition.require([name for entry in execution.state.plan for name in entry])
    except UnknownSaga as error:
        return str(error)
    return ""


def _history(request: HttpRequest, records: QuerySet[SagaStepRecord]) -> dict[str, Any]:
    """The newest records, or those before the one that is asked for; oldest on top."""
    before = request.GET.get("before", "")
    if before.isdecimal() and len(before) < 19:
        records = records.filter(pk__lt=int(before))
    else:
        before = ""
    newest = list(records.order_by("-pk")[: RECORDS + 1])
    page = newest[:RECORDS][::-1]
    for record in page:
        record.took = span(record.duration)  # type: ignore[attr-defined]
    return {
        "records": page,
        "earlier": page[0].pk if len(newest) > RECORDS else None,
        "is_earlier": bool(before),
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


def _contexts(execution: SagaExecution) -> list[dict[str, Any]]:
    now, now_cut = pretty(execution.context)
    original, cut = pretty(execution.initial_context)
    contexts = [{"title": _("as stored now"), "text": now, "cut": now_cut, "open": True}]
    if execution.context != execution.initial_context:
        contexts.append({"title": _("as it was at the start"), "text": original, "cut": cut})
    return contexts


def _log(execution: SagaExecution) -> list[LogEntry]:
    """What operators did, newest first."""
    entries = LogEntry.objects.filter(
        content_type=ContentType.objects.get_for_model(SagaExecution), object_id=str(execution.pk)
    )
    return list(entries.select_related("user").order_by("-pk")[:OTHERS])
