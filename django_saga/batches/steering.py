"""What becomes of a batch that is under way: only who may do its verb decides about that."""

from __future__ import annotations

from typing import Any, Unpack

from django_saga.batches.creating import ring_on_commit
from django_saga.exceptions import SagaError
from django_saga.models import SagaBatch
from django_saga.operations import VERBS, Asked
from django_saga.operations.asking import audited, reason_of, who
from django_saga.verdicts import DatabaseNow

Status = SagaBatch.Status
GOING = (Status.RUNNING, Status.HELD, Status.PAUSED)


def allow(batch: SagaBatch, more: int | None, **asked: Unpack[Asked]) -> SagaBatch:
    """Let it be done to so many more of its items (None: to all), and go on with that.

    ``batch`` is as it was looked at: raises SagaError where somebody has allowed more since, and
    for one that is paused or has ended; PermissionDenied where a given user lacks the permission
    of its verb. So do the others here.
    """
    if more is not None and more < 1:
        raise SagaError("At least one more must be allowed.")
    allowed = None if more is None or batch.allowed is None else batch.allowed + more
    changes = {"status": Status.RUNNING, "allowed": allowed}
    given = {"allowed": batch.allowed}
    return _steer("allow", batch, (Status.RUNNING, Status.HELD), changes, asked, given)


def pause(batch: SagaBatch, **asked: Unpack[Asked]) -> SagaBatch:
    """Let it rest until it is resumed; the item in hand is finished."""
    changes = {"status": Status.PAUSED, "why": _by("paused", asked)}
    return _steer("pause", batch, (Status.RUNNING, Status.HELD), changes, asked)


def resume(batch: SagaBatch, **asked: Unpack[Asked]) -> SagaBatch:
    """Go on with one that is paused, as far as is allowed."""
    return _steer("resume", batch, (Status.PAUSED,), {"status": Status.RUNNING, "why": ""}, asked)


def stop(batch: SagaBatch, **asked: Unpack[Asked]) -> SagaBatch:
    """End it; the item in hand is finished, what waits is left alone for ever."""
    changes = {"status": Status.STOPPED, "why": _by("stopped", asked), "finished_at": DatabaseNow()}
    return _steer("stop", batch, GOING, changes, asked)


def _steer(
    what: str,
    batch: SagaBatch,
    fit: tuple[SagaBatch.Status, ...],
    changes: dict[str, Any],
    asked: Asked,
    given: dict[str, Any] | None = None,
) -> SagaBatch:
    asked = {**asked, "batch_id": batch.pk}
    if batch.verb not in VERBS:
        raise SagaError(f"The code no longer has a verb {batch.verb!r}.")
    permission = VERBS[batch.verb].permission
    with audited(f"{what}_batch", permission, asked) as (entry, storage):
        rows = SagaBatch.objects.using(storage.alias).filter(pk=batch.pk)
        if not rows.filter(status__in=fit, **(given or {})).update(**changes):
            raise SagaError(_why_not(rows.first()))
        entry.detail = f"{batch.verb}: {batch.title}"
        if changes["status"] == Status.RUNNING:
            ring_on_commit(batch.pk, storage)
    return rows.get()


def _why_not(batch: SagaBatch | None) -> str:
    if batch is None:
        return "This batch is not there any more."
    return f"This batch changed meanwhile, or cannot be changed so: it is {batch.status} now."


def _by(what: str, asked: Asked) -> str:
    return f"{what} by {who(asked)}: {reason_of(asked)}".removesuffix(": ")[:500]
