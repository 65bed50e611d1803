"""Where executions stand, as the database tells it: by its clock, for one of them or for all.

Whether an execution can be acted on is said here once, as a :class:`Verdict`; the operations obey
it, and the counts on a confirmation page are made of it.
"""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.models import Case, Exists, F, OuterRef, Q, Value, When
from django.db.models.functions import Now
from django.utils.translation import npgettext_lazy

from django_saga.interventions import CANCELLED
from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution, SagaPause

Status = SagaExecution.Status


class DatabaseNow(Now):
    """The clock by which leases are given; Django's own is in the server's zone on MariaDB."""

    def as_mysql(self, compiler: Any, connection: Any, **extra: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **extra)


class Verdict(models.TextChoices):
    """Whether a verb can be done to an execution, and what it would do there, or why it cannot."""

    ANEW = (
        "anew",
        npgettext_lazy(
            "saga verdict",
            "starts anew with the original context",
            "start anew with the original context",
            "number",
        ),
    )
    AGAIN = (
        "again",
        npgettext_lazy(
            "saga verdict", "tries the compensation again", "try the compensation again", "number"
        ),
    )
    NOW = (
        "now",
        npgettext_lazy("saga verdict", "is cancelled now", "are cancelled now", "number"),
    )
    SOON = (
        "soon",
        npgettext_lazy(
            "saga verdict",
            "is cancelled when the step in hand ends",
            "are cancelled when the step in hand ends",
            "number",
        ),
    )
    FORWARD = (
        "forward",
        npgettext_lazy(
            "saga verdict",
            "goes forward from where it stands",
            "go forward from where they stand",
            "number",
        ),
    )
    ON = (
        "on",
        npgettext_lazy(
            "saga verdict",
            "is driven on from where it stands",
            "are driven on from where they stand",
            "number",
        ),
    )
    RETRIED = (
        "retried",
        npgettext_lazy(
            "saga verdict", "has been retried already", "have been retried already", "number"
        ),
    )
    CANCELLED = (
        "cancelled",
        npgettext_lazy(
            "saga verdict", "was cancelled on purpose", "were cancelled on purpose", "number"
        ),
    )
    SETTLED = (
        "settled",
        npgettext_lazy(
            "saga verdict", "has been settled by hand", "have been settled by hand", "number"
        ),
    )
    BLANKED = (
        "blanked",
        npgettext_lazy(
            "saga verdict",
            "has lost its context to retention",
            "have lost their contexts to retention",
            "number",
        ),
    )
    COMPLETED = (
        "completed",
        npgettext_lazy("saga verdict", "is completed", "are completed", "number"),
    )
    ACTIVE = (
        "active",
        npgettext_lazy("saga verdict", "has not ended", "have not ended", "number"),
    )
    STUCK = (
        "stuck",
        npgettext_lazy("saga verdict", "is stuck", "are stuck", "number"),
    )
    FAILED = (
        "failed",
        npgettext_lazy(
            "saga verdict", "has failed and is undone", "have failed and are undone", "number"
        ),
    )
    TURNED = (
        "turned",
        npgettext_lazy(
            "saga verdict", "has turned back already", "have turned back already", "number"
        ),
    )
    PAUSED = (
        "paused",
        npgettext_lazy("saga verdict", "is paused", "are paused", "number"),
    )
    FREE = (
        "free",
        npgettext_lazy("saga verdict", "is held by nobody", "are held by nobody", "number"),
    )
    DRIVEN = (
        "driven",
        npgettext_lazy("saga verdict", "is being driven", "are being driven", "number"),
    )
    WAITING = (
        "waiting",
        npgettext_lazy(
            "saga verdict", "waits for its next attempt", "wait for their next attempt", "number"
        ),
    )

    def of(self, number: int) -> str:
        """What is said of so many, after their number."""
        return str(self.label % {"number": number})


def unsettled() -> Q:
    """Failed or stuck for a cause, and no operator has dealt with it yet."""
    ended = Q(status__in=[Status.FAILED, Status.STUCK], settled_at=None)
    return ended & ~Q(failure_group="")


def dealt_with() -> Q:
    """Failed or stuck for a cause, and an operator has dealt with it."""
    return Q(settled_at__isnull=False) & ~Q(failure_group="")


def paused() -> Exists:
    """Whether an execution's saga is paused, or the step at which it stands."""
    here = Q(step="") | Q(step=OuterRef("step"))
    return Exists(SagaPause.objects.filter(here, saga=OuterRef("saga")))


def free() -> Q:
    """Active, and nobody holds its lease."""
    active = Q(status__in=[status.value for status in ACTIVE])
    return active & (Q(lease_until=None) | Q(lease_until__lte=DatabaseNow()))


def undriven() -> Q:
    """Active, could go on now, is not paused, and nobody holds its lease."""
    return free() & (Q(wake_at=None) | Q(wake_at__lte=DatabaseNow())) & Q(~paused())


def overdue() -> Q:
    """Undriven, and not just handed over either: its driver was lost, or nobody came."""
    left = Q(lease_until__isnull=False) | Q(grace_until=None) | Q(grace_until__lte=DatabaseNow())
    return undriven() & left & ~waiting()


def waiting() -> Q:
    """It goes forward only with a place among those that may run at once, and has none yet."""
    forward = Q(status__in=[Status.PENDING, Status.RUNNING])
    return forward & Q(limit_key__isnull=False, slot=None)


def needs_attention() -> Q:
    """Failed or stuck, and not dealt with; or left without a driver."""
    return unsettled() | overdue()


def _case(*cases: When, otherwise: Verdict) -> Case:
    return Case(*cases, default=Value(otherwise.value), output_field=models.CharField())


def retry_verdict() -> Case:
    """The verdict on retrying each execution."""
    return _case(
        When(status=Status.STUCK, settled_at=None, then=Value(Verdict.AGAIN.value)),
        When(status=Status.STUCK, settled_at__isnull=False, then=Value(Verdict.SETTLED.value)),
        When(status=Status.FAILED, settled_at__isnull=False, then=Value(Verdict.RETRIED.value)),
        When(status=Status.FAILED, blanked_at__isnull=False, then=Value(Verdict.BLANKED.value)),
        When(status=Status.FAILED, error_type=CANCELLED, then=Value(Verdict.CANCELLED.value)),
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
        _driven(),
        When(Q(paused()), then=Value(Verdict.PAUSED.value)),
        otherwise=Verdict.WAITING,
    )


def cancel_verdict() -> Case:
    """The verdict on cancelling each execution."""
    forward = Q(status__in=[Status.PENDING, Status.RUNNING])
    return _case(
        When(free() & forward, then=Value(Verdict.NOW.value)),
        When(forward, then=Value(Verdict.SOON.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        When(status=Status.STUCK, then=Value(Verdict.STUCK.value)),
        otherwise=Verdict.TURNED,
    )


def forward_verdict() -> Case:
    """The verdict on going forward from where each execution got stuck."""
    stuck = Q(status=Status.STUCK, settled_at=None)
    return _case(
        When(stuck & Q(action="act"), then=Value(Verdict.FORWARD.value)),
        When(status=Status.STUCK, settled_at__isnull=False, then=Value(Verdict.SETTLED.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        When(status__in=[Status.PENDING, Status.RUNNING], then=Value(Verdict.ACTIVE.value)),
        otherwise=Verdict.TURNED,
    )


def skip_verdict() -> Case:
    """The verdict on skipping the step at which each execution stands."""
    forward = Q(status__in=[Status.PENDING, Status.RUNNING], action="act") & free()
    return _case(
        When(forward, then=Value(Verdict.FORWARD.value)),
        _driven(),
        When(status=Status.STUCK, settled_at=None, action="act", then=Value(Verdict.FORWARD.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        otherwise=Verdict.TURNED,
    )


def by_hand_verdict() -> Case:
    """The verdict on changing each execution by hand."""
    return _case(
        When(free(), then=Value(Verdict.NOW.value)),
        _driven(),
        When(status=Status.STUCK, settled_at=None, then=Value(Verdict.AGAIN.value)),
        When(status=Status.STUCK, then=Value(Verdict.SETTLED.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        otherwise=Verdict.FAILED,
    )


def release_verdict() -> Case:
    """The verdict on taking the lease of each execution from its driver."""
    return _case(
        _driven(),
        When(free(), then=Value(Verdict.FREE.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        When(status=Status.STUCK, then=Value(Verdict.STUCK.value)),
        otherwise=Verdict.FAILED,
    )


def resolve_verdict() -> Case:
    """The verdict on closing each stuck execution."""
    return _case(
        When(status=Status.STUCK, settled_at=None, then=Value(Verdict.AGAIN.value)),
        When(status=Status.STUCK, then=Value(Verdict.SETTLED.value)),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        When(status=Status.FAILED, then=Value(Verdict.FAILED.value)),
        otherwise=Verdict.ACTIVE,
    )


def abandon_verdict() -> Case:
    """The verdict on ending each execution where it stands."""
    return _case(
        When(free(), then=Value(Verdict.NOW.value)),
        _driven(),
        When(status=Status.COMPLETED, then=Value(Verdict.COMPLETED.value)),
        When(status=Status.STUCK, then=Value(Verdict.STUCK.value)),
        otherwise=Verdict.FAILED,
    )


def _driven() -> When:
    active = Q(status__in=[status.value for status in ACTIVE])
    return When(active & Q(lease_until__gt=DatabaseNow()), then=Value(Verdict.DRIVEN.value))


def stands_at() -> Case:
    """The step at which an execution stands: the one that failed, once all is undone."""
    return Case(When(step="", then=F("failed_step")), default=F("step"))
