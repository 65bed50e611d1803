"""What the command reads, as documents."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Exists, Max, Min, OuterRef, Q

from django_saga.console.asking import asked, permit_to_see
from django_saga.console.choosing import all_executions, filtered
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
from django_saga.storage import DjangoSagaStorage
from django_saga.story import asked_to_cancel, attempts, comes_next, fates, happened, pause_of
from django_saga.verdicts import unsettled

RECORDS = 200  # of an execution's history, the latest
OTHERS = 20  # retries and audit entries of one execution
COUNTED = 10_000  # up to which a group is counted
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
        "possible": _possible(execution),
        "standing": [effect.step for effect in standing(execution.state)],
        **_steps(execution, now, storage),
        "retries": [document(retry, ("id", "status", "created_at")) for retry in retries],
        "audit": _audit(Q(execution_id=execution.pk), OTHERS)["entries"],
    }
    if options["context"]:
        found["context"] = _context(execution, options)
    return found


def _steps(execution: SagaExecution, now: datetime, storage: DjangoSagaStorage) -> Document:
    records = execution.records.using(storage.alias)
    steps = fates(execution, now, attempts(records))
    latest = records.defer("traceback").order_by("-pk")[: RECORDS + 1]
    history = [document(record, RECORD) for record in latest]
    keys = ("step", "fallback_of", "kind", "fate", "acts", "compensations", "took")
    return {
        "steps": [{key: getattr(step, key) for key in keys} for step in steps],
        "history": history[:RECORDS][::-1],
        "history_cut": len(history) > RECORDS,
    }


def _possible(execution: SagaExecution) -> list[str]:
    verdicts = {name: verb.verdict() for name, verb in VERBS.items()}
    row = all_executions().filter(pk=execution.pk).values_list(*verdicts.values()).first()
    if row is None:
        return []
    return [
        verb.name
        for verb, verdict in zip(VERBS.values(), row, strict=True)
        if verdict in verb.possible
    ]


def _context(execution: SagaExecution, options: dict[str, Any]) -> Any:
    about = {"saga": execution.saga, "execution_id": execution.pk}
    with audited("view_context", VIEW_CONTEXT, asked(options), **about) as (entry, _):
        entry.detail = "Masked."
        return context_of(execution)


def groups(options: dict[str, Any]) -> Document:
    """Causes with executions that nobody has dealt with, those seen last first."""
    permit_to_see(options, "sagafailuregroup")
    left = all_executions().filter(unsettled())
    rows = SagaFailureGroup.objects.using(left.db).filter(
        Exists(left.filter(failure_group=OuterRef("pk")))
    )
    found = [_group(row) for row in rows.order_by("-first_seen")[: options["limit"] + 1]]
    return {"groups": found[: options["limit"]], "more": len(found) > options["limit"]}


def _group(group: SagaFailureGroup) -> Document:
    rows = all_executions().filter(unsettled(), failure_group=group.pk)
    times = rows.aggregate(oldest=Min("created_at"), newest=Max("created_at"))
    count = rows.order_by()[: COUNTED + 1].count()
    return {
        **document(group, GROUP),
        "count": min(count, COUNTED),
        "count_is_more": count > COUNTED,
        **{name: at and at.isoformat() for name, at in times.items()},
    }


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
    return _audit(which, options["limit"])


def _audit(which: Q, limit: int) -> Document:
    rows = SagaAuditEntry.objects.using(DjangoSagaStorage().alias).filter(which)
    found = list(rows.order_by("-pk")[: limit + 1])
    return {"entries": [document(row, AUDIT) for row in found[:limit]], "more": len(found) > limit}
