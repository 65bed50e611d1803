"""Where executions stand, as the database tells it: by its clock, for one of them or for all.

Whether an execution can be acted on is said here once, as a :class:`Verdict`; the operations obey
it, and the counts on a confirmation page are made of it.
"""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.models import Case, Exists, F, OuterRef, Q, Value, When
from django.db.models.functions import Now
from django.utils.translation import pgettext_lazy

from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution

Status = SagaExecution.Status


class DatabaseNow(Now):
    """The clock by which leases are given; Django's own is in the server's zone on MariaDB."""

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


class Verdict(models.TextChoices):
    """Whether a verb can be done to an execution, and what it would do there, or why it cannot."""

    ANEW = "anew", pgettext_lazy("saga verdict", "start anew with the original context")
    AGAIN = "again", pgettext_lazy("saga verdict", "try the compensation again")
    ON = "on", pgettext_lazy("saga verdict", "are driven on from where they stand")
    RETRIED = "retried", pgettext_lazy("saga verdict", "have been retried already")
    COMPLETED = "completed", pgettext_lazy("saga verdict", "are completed")
    ACTIVE = "active", pgettext_lazy("saga verdict", "have not ended")
    STUCK = "stuck", pgettext_lazy("saga verdict", "are stuck: retry them")
    FAILED = "failed", pgettext_lazy("saga verdict", "have failed and are undone: retry them")
    DRIVEN = "driven", pgettext_lazy("saga verdict", "are being driven")
    WAITING = "waiting", pgettext_lazy("saga verdict", "wait for their next attempt")


def retried() -> Exists:
    """Whether an execution has been started anew as another."""
    return Exists(SagaExecution.objects.filter(retry_of=OuterRef("pk")))


def undriven() -> Q:
    """Active, could go on now, and nobody holds its lease."""
    active = Q(status__in=[status.value for status in ACTIVE])
    free = Q(lease_until=None) | Q(lease_until__lte=DatabaseNow())
    return active & free & (Q(wake_at=None) | Q(wake_at__lte=DatabaseNow()))


def overdue() -> Q:
    """Undriven, and not just handed over either: its driver was lost, or nobody came."""
    left = Q(lease_until__isnull=False) | Q(grace_until=None) | Q(grace_until__lte=DatabaseNow())
    return undriven() & left


def _case(*cases: When, otherwise: Verdict) -> Case:
    return Case(*cases, default=Value(otherwise.value), output_field=models.CharField())


def retry_verdict() -> Case:
    """The verdict on retrying each execution."""
    return _case(
        When(status=Status.STUCK, then=Value(Verdict.AGAIN.value)),
        When(retried(), status=Status.FAILED, then=Value(Verdict.RETRIED.value)),
        When(status=Status.FAILED, then=Value(Verdict.ANEW.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        otherwise=Verdict.ACTIVE,
    )


def recover_verdict() -> Case:
    """The verdict on recovering each execution."""
    return _case(
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        When(status=Status.FAILED, then=Value(Verdict.FAILED.value)),
        When(status=Status.STUCK, then=Value(Verdict.STUCK.value)),
        When(undriven(), then=Value(Verdict.ON.value)),
        When(lease_until__gt=DatabaseNow(), then=Value(Verdict.DRIVEN.value)),
        otherwise=Verdict.WAITING,
    )


def stands_at() -> Case:
    """The step at which an execution stands: the one that failed, once all is undone."""
    return Case(When(step="", then=F("failed_step")), default=F("step"))
