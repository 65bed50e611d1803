"""The executions: what is late, what is lost, what nobody can drive."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from django.db import DataError
from django.db.models import Q, QuerySet, TextField
from django.db.models.functions import Cast
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from django_saga import registry
from django_saga.conf import conf
from django_saga.counts import CAP
from django_saga.doctor.finding import Finding
from django_saga.exceptions import UnknownSaga
from django_saga.heartbeats import lateness
from django_saga.machine import ACTIVE
from django_saga.models import SagaBatch, SagaExecution
from django_saga.spans import span
from django_saga.storage import DjangoSagaStorage
from django_saga.verdicts import DatabaseNow, overdue, unsettled

NAMED = 50_000  # active rows whose names are looked at, the oldest
READ = 1_000  # active rows that are read as a whole, the oldest
SAID = 5  # names or ids in a finding


def recovery() -> Iterator[Finding]:
    """When recovery ran last."""
    last = lateness()
    todo = _("Run manage.py recover_sagas every minute, or with --watch as a service.")
    if last.age is None:
        yield Finding("recovery", "error", _("Recovery has never run."), todo)
        return
    facts = {"age": span(last.age), "driver": last.driver}
    what = _("Recovery ran %(age)s ago, by %(driver)s.") % facts
    if last.late:
        yield Finding("recovery", "error", what, todo)
    else:
        yield Finding("recovery", "ok", what)


def leases() -> Iterator[Finding]:
    """What lost its driver, or was never taken, and has not been recovered yet."""
    n, count = _counted(_executions().filter(overdue()))
    if not n:
        yield Finding("leases", "ok", _("Every active execution is driven, or waits."))
        return
    what = ngettext(
        "%(n)s active execution has no driver: its lease is past, or nobody came.",
        "%(n)s active executions have no driver: their leases are past, or nobody came.",
        n,
    )
    todo = _("Recovery takes them with its next sweep; do these stay, look why it does not run.")
    yield Finding("leases", "warning", what % {"n": count}, todo)


def stuck() -> Iterator[Finding]:
    """What waits for a person."""
    rows = _executions().filter(unsettled(), status=SagaExecution.Status.STUCK)
    n, count = _counted(rows)
    if not n:
        yield Finding("stuck", "ok", _("No stuck execution waits for a person."))
        return
    what = ngettext(
        "%(n)s stuck execution waits for a person.", "%(n)s stuck executions wait for a person.", n
    )
    todo = _("See manage.py sagas list --status STUCK.")
    yield Finding("stuck", "warning", what % {"n": count}, todo)


def names() -> Iterator[Finding]:
    """Active executions whose saga or steps the code no longer knows: they get stuck."""
    rows = _active().annotate(planned=Cast("plan", TextField()))
    found = set(rows.values_list("saga", "planned")[:NAMED].iterator(chunk_size=2_000))
    lost = sorted({why for saga, plan in found if (why := _unknown(saga, plan))})
    if not lost:
        yield Finding("names", "ok", _("The code knows the steps of every active execution."))
        return
    todo = _(
        "Deploy what defines them, or name them in aliases or retired_steps; else these executions "
        "get stuck when they are driven."
    )
    for why in lost[:SAID]:
        yield Finding("names", "error", why, todo)


def _unknown(saga: str, plan: str) -> str:
    with suppress(ValueError, TypeError):  # what cannot be read is told by rows()
        steps = [str(step) for entry in json.loads(plan) for step in entry]
        try:
            registry.find_saga(saga).definition.require(steps)
        except UnknownSaga as error:
            return str(error)
    return ""


def rows() -> Iterator[Finding]:
    """Active executions that cannot be read: somebody edited the row."""
    ids = list(_active().values_list("pk", flat=True)[:READ])
    spoilt = [str(id) for id in ids if not _is_readable(id)] if not _are_readable(ids) else []
    if not spoilt:
        yield Finding("rows", "ok", _("Every active execution that was looked at can be read."))
        return
    what = ngettext(
        "%(n)s active execution cannot be read: %(ids)s.",
        "%(n)s active executions cannot be read: %(ids)s.",
        len(spoilt),
    )
    facts = {"n": len(spoilt), "ids": ", ".join(spoilt[:SAID])}
    yield Finding("rows", "error", what % facts, _("Put right what was edited in these rows."))


def _is_readable(id: Any) -> bool:
    return _are_readable([id])


def _are_readable(ids: list[Any]) -> bool:
    """Whether all can be; contexts, which may be long, are left out."""
    try:
        for start in range(0, len(ids), 200):
            some: Any = _executions().filter(pk__in=ids[start : start + 200])
            for execution in some.defer("context", "initial_context", "fallback_context"):
                execution.context, execution.fallback_context = "{}", None
                execution.state  # noqa: B018
                if execution.created_at is None or execution.updated_at is None:
                    return False
    except (ValueError, TypeError, DataError):
        return False
    return True


def batches() -> Iterator[Finding]:
    """Batches that run, and that nobody drives."""
    grace = timedelta(seconds=max(60.0, conf.LEASE))
    left = Q(lease_until=None, created_at__lte=DatabaseNow() - grace)
    left |= Q(lease_until__lte=DatabaseNow() - grace)
    running = SagaBatch.objects.using(_alias()).filter(left, status=SagaBatch.Status.RUNNING)
    n, count = _counted(running)
    if not n:
        yield Finding("batches", "ok", _("No batch stands still."))
        return
    what = ngettext(
        "%(n)s batch runs, and nobody drives it.", "%(n)s batches run, and nobody drives them.", n
    )
    todo = _("Recovery drives them on; is it running, and are there workers?")
    yield Finding("batches", "warning", what % {"n": count}, todo)


def _counted(rows: QuerySet[Any]) -> tuple[int, str]:
    """How many there are, up to a limit, as a number and as it is written."""
    number = rows.order_by()[: CAP + 1].count()
    return number, f"{CAP:,}+" if number > CAP else str(number)


def _active() -> QuerySet[SagaExecution]:
    active = [status.value for status in ACTIVE]
    return _executions().filter(status__in=active).order_by("created_at")


def _executions() -> QuerySet[SagaExecution]:
    return SagaExecution.objects.using(_alias())


def _alias() -> str:
    return DjangoSagaStorage().alias
