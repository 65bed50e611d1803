"""What the command reads, as documents."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Q, QuerySet

from django_saga import groups as causes
from django_saga.console.asking import asked, permit_to_see
from django_saga.console.choosing import all_executions, filtered
from django_saga.counts import CAP
from django_saga.documents import (
    AUDIT,
    EXECUTION,
    GROUP,
    PAUSE,
    RECORD,
    Document,
    context_of,
    document,
)
from django_saga.machine import standing
from django_saga.masking import mask_text
from django_saga.models import SagaAuditEntry, SagaExecution, SagaFailureGroup, SagaPause
from django_saga.operations import VERBS
from django_saga.operations.asking import audited
from django_saga.operations.executing import read
from django_saga.prospects import why_never
from django_saga.storage import DjangoSagaStorage
from django_saga.story import asked_to_cancel, attempts, comes_next, fates, happened, pause_of
from django_saga.troubles import troubles_of

RECORDS = 200  # of an execution's history, the latest
OTHERS = 20  # retries and audit entries of one execution
VIEW_CONTEXT = "django_saga.view_context_sagaexecution"


def listed(options: dict[str, Any]) -> Document:
    """Executions that the filters choose, newest first, and whether there are more."""
    permit_to_see(options, "sagaexecution")
    rows = filtered(options, default="attention").order_by("-created_at").only(*EXECUTION)
    found = list(rows[: options["limit"] + 1])
    shown = [document(row, EXECUTION) for row in found[: options["limit"]]]
    return {"executions": shown, "more": len(found) > len(shown)}


def shown(options: dict[str, Any]) -> Document:
    """One execution: its story, its steps, its history, and what operators did to it."""
    permit_to_see(options, "sagaexecution")
    storage = DjangoSagaStorage()
    execution: SagaExecution = read(options["id"], storage)
    now: datetime = execution.db_now  # type: ignore[attr-defined]
    retries = all_executions().filter(retry_of=execution).only(*EXECUTION)[:OTHERS]
    found = {
        "execution": document(execution, EXECUTION),
        "happened": mask_text(happened(execution, now)),
        "next": mask_text(comes_next(execution, now, bool(retries), pause_of(execution))),
        "cancelled": mask_text(asked_to_cancel(execution)),
        "errors": _errors(execution, storage),
        "possible": _possible(execution),
        "standing": [effect.step for effect in standing(execution.state)],
        **_steps(execution, now, storage, sees=_sees_contexts(options)),
        "retries": [document(retry, ("id", "status", "created_at")) for retry in retries],
        "audit": _audit(Q(execution_id=execution.pk), OTHERS, options)["entries"],
    }
    if options["context"]:
        found["context"] = _context(execution, options)
    return found


def _sees_contexts(options: dict[str, Any]) -> bool:
    user = asked(options).get("user")
    return user is None or user.has_perm(VIEW_CONTEXT)


def _steps(
    execution: SagaExecution, now: datetime, storage: DjangoSagaStorage, *, sees: bool
) -> Document:
    records = execution.records.using(storage.alias)
    steps = fates(execution, now, attempts(records))
    latest = records.defer("traceback").order_by("-pk")[: RECORDS + 1]
    history = [document(record, RECORD) for record in latest]
    for record in history if not sees else ():
        record["changes"] = ""
    keys = ("step", "fallback_of", "kind", "fate", "acts", "compensations", "took")
    return {
        "steps": [{key: getattr(step, key) for key in keys} for step in steps],
        "history": history[:RECORDS][::-1],
        "history_cut": len(history) > RECORDS,
    }


def _errors(execution: SagaExecution, storage: DjangoSagaStorage) -> list[Document]:
    """What is to be mended now first, then why it turned back."""
    return [
        {
            "step": trouble.step,
            "action": trouble.action,
            "error_type": trouble.type,
            "error_message": mask_text(trouble.message),
        }
        for trouble in troubles_of(execution, execution.records.using(storage.alias))
    ]


def _possible(execution: SagaExecution) -> list[str]:
    verdicts = {name: verb.verdict() for name, verb in VERBS.items()}
    row = all_executions().filter(pk=execution.pk).values_list(*verdicts.values()).first()
    if row is None:
        return []
    return [
        verb.name
        for verb, verdict in zip(VERBS.values(), row, strict=True)
        if verdict in verb.allowed and not why_never(execution, verb.name)
    ]


def _context(execution: SagaExecution, options: dict[str, Any]) -> Any:
    about = {"saga": execution.saga, "execution_id": execution.pk}
    with audited("view_context", VIEW_CONTEXT, asked(options), **about) as (entry, _):
        entry.detail = "Masked."
        return context_of(execution)


def groups(options: dict[str, Any]) -> Document:
    """Causes with executions that nobody has dealt with, those seen last first."""
    permit_to_see(options, "sagafailuregroup")
    rows, limit = all_executions(), options["limit"]
    ids = causes.live(rows)
    which = SagaFailureGroup.objects.using(rows.db).filter(pk__in=ids)
    found = causes.seen(which, rows)
    return {"groups": _groups(found[:limit], rows), "more": len(found) > limit}


def _groups(found: list[causes.Seen], rows: QuerySet[SagaExecution]) -> list[Document]:
    if not found:
        return []
    numbers = causes.numbers(rows, [seen.group.pk for seen in found], found[0].now)
    return [
        {
            **document(seen.group, GROUP),
            "count": min(numbers[seen.group.pk].total, CAP),
            "count_is_more": numbers[seen.group.pk].total > CAP,
            "last_hour": numbers[seen.group.pk].last_hour,
            "last_day": numbers[seen.group.pk].last_day,
            "oldest": seen.oldest and seen.oldest.isoformat(),
            "newest": seen.newest and seen.newest.isoformat(),
            "next": causes.next_action(seen.group),
        }
        for seen in found
    ]


def pauses(options: dict[str, Any]) -> Document:
    """What is paused."""
    permit_to_see(options, "sagapause")
    rows = SagaPause.objects.using(DjangoSagaStorage().alias)
    return {"pauses": [document(row, PAUSE) for row in rows.all()]}


def audit(options: dict[str, Any]) -> Document:
    """What was asked, newest first; of one execution or batch where an id is given."""
    permit_to_see(options, "sagaauditentry")
    id = options["id"]
    which = Q(execution_id=id) | Q(batch_id=id) if id else Q()
    return _audit(which, options["limit"], options)


def _audit(which: Q, limit: int, options: dict[str, Any]) -> Document:
    rows = SagaAuditEntry.objects.using(DjangoSagaStorage().alias).filter(which)
    found = list(rows.order_by("-pk")[: limit + 1])
    for row in found if not _sees_contexts(options) else ():
        row.detail = "" if row.tells_context else row.detail
    return {"entries": [document(row, AUDIT) for row in found[:limit]], "more": len(found) > limit}
