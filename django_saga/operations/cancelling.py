"""Stopping: an execution that is not wanted any more, and a driver that is known to be dead."""

from __future__ import annotations

from typing import Unpack
from uuid import UUID

from django.db.models import F

from django_saga import interventions
from django_saga.exceptions import LeaseLost
from django_saga.machine import ACTIVE, StepRules, Transition
from django_saga.models import SagaAuditEntry, SagaExecution
from django_saga.operations.asking import Asked, reason_of, who
from django_saga.operations.executing import change, operate
from django_saga.operations.verbs import CANCEL, RELEASE
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Claim
from django_saga.verdicts import Verdict


def cancel(saga_id: UUID | str, **asked: Unpack[Asked]) -> SagaExecution:
    """Undo what is done, and end it as FAILED; an attempt whose outcome is unknown is undone too.

    What is being driven turns back at its next checkpoint, unless that is its last.
    """
    why = _by(asked)

    def now(claim: Claim) -> Transition:
        return interventions.cancel(claim.state, why, StepRules(atomic=claim.state.atomic))

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        if execution.verdict == Verdict.NOW:  # type: ignore[attr-defined]
            change(execution, storage, now)
            return execution.id
        forward = [SagaExecution.Status.PENDING, SagaExecution.Status.RUNNING]
        rows = SagaExecution.objects.using(storage.alias).filter(status__in=forward)
        if not rows.filter(pk=execution.id).update(cancel_reason=why):
            raise LeaseLost("It has turned back, or ended.")
        entry.detail = "It is being driven, and turns back when the step in hand has ended."
        return execution.id

    return operate(CANCEL, saga_id, asked, work)


def release(saga_id: UUID | str, **asked: Unpack[Asked]) -> SagaExecution:
    """Take the lease from its driver, whose later checkpoints write nothing; recovery goes on.

    The attempt in flight counts as lost. Do this only where the driver is known to be dead: one
    that lives may still be calling its handler while the next driver begins.
    """

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        rows = SagaExecution.objects.using(storage.alias)
        held = rows.filter(pk=execution.id, token=execution.token, lease_until__isnull=False)
        active = held.filter(status__in=[status.value for status in ACTIVE])
        if not active.update(token=F("token") + 1, lease_until=None, grace_until=None):
            raise LeaseLost("Its lease has changed hands.")
        entry.detail = f"Taken from {execution.driver}."
        return execution.id

    return operate(RELEASE, saga_id, asked, work)


def _by(asked: Asked) -> str:
    """The reason as the execution's error tells it."""
    return f"by {who(asked)}: {reason_of(asked)}"
