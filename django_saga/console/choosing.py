"""Which executions the options choose."""

from __future__ import annotations

from typing import Any

from django.db.models import Q, QuerySet

from django_saga import registry
from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution, SagaFailureGroup
from django_saga.operations import Verb
from django_saga.storage import DjangoSagaStorage
from django_saga.verdicts import needs_attention, overdue, stands_at, unsettled

Executions = QuerySet[SagaExecution]
Status = SagaExecution.Status
FILTERS = ("status", "saga", "step", "group")

_ACTIVE = (Status.PENDING, Status.RUNNING, Status.COMPENSATING)
# Where each verb can be possible at all, so that a partial index finds them.
_WHERE = {"retry": (Status.FAILED, Status.STUCK), "resume_forward": (Status.STUCK,)}


def all_executions() -> Executions:
    """Where they are driven, never a replica."""
    return SagaExecution.objects.using(DjangoSagaStorage().alias)


def filtered(options: dict[str, Any], *, default: str) -> Executions:
    """Those that the filters choose; ``default`` is the status where none is given."""
    _refuse_unknown(options["saga"], options["group"])
    rows = all_executions().filter(_status(options["status"] or default))
    if options["saga"]:
        rows = rows.filter(saga=options["saga"])
    if options["group"]:
        rows = rows.filter(unsettled(), failure_group=options["group"])
    if options["step"]:
        rows = rows.alias(at=stands_at()).filter(at=options["step"])
    return rows


def _refuse_unknown(saga: str | None, group: str | None) -> None:
    """What is misspelt must not read as if all were well."""
    alias = DjangoSagaStorage().alias
    known = {known.name for known in registry.all_sagas()}
    rows = SagaExecution.objects.using(alias)
    if saga and saga not in known and not rows.filter(saga=saga).exists():
        raise SagaError(f"No saga is named {saga!r}, and no execution has that name.")
    if group and not SagaFailureGroup.objects.using(alias).filter(pk=group).exists():
        raise SagaError(f"No failure group has the id {group!r}; see manage.py sagas groups.")


def possible(verb: Verb, options: dict[str, Any]) -> Executions:
    """Those of them to which the verb can be done now, oldest first."""
    rows = filtered(options, default="all").filter(status__in=_WHERE.get(verb.name, _ACTIVE))
    able = rows.annotate(verdict=verb.verdict()).filter(verdict__in=verb.possible)
    return able.order_by("created_at", "pk")


def _status(status: str) -> Q:
    match status:
        case "attention":
            return needs_attention()
        case "overdue":
            return overdue()
        case "all":
            return Q()
    return Q(status=status)
