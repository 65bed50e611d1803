"""The one way in which anything is done to an execution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID, uuid5

from django.db import DataError
from django.db.models import F, Q

from django_saga.announcing import announce
from django_saga.backends import get_backend
from django_saga.causes import cause_of, stripped
from django_saga.conf import conf
from django_saga.drivers import drive
from django_saga.exceptions import (
    LeaseLost,
    SagaAlreadyRunning,
    SagaError,
    SagaLimitReached,
    SagaNotFound,
    SagaPaused,
)
from django_saga.flow import Run, driver_name
from django_saga.interventions import CANCELLED
from django_saga.limits import hand_on
from django_saga.machine import State, Status, Transition
from django_saga.models import SagaAuditEntry, SagaExecution, SagaFailureGroup
from django_saga.operations.asking import Asked, audited, authorize, need_reason
from django_saga.operations.verbs import Verb
from django_saga.recovery import _saga_of, recover_saga
from django_saga.saga import _uuid
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Checkpoint, Claim
from django_saga.verdicts import DatabaseNow, Verdict

Work = Callable[[SagaExecution, DjangoSagaStorage, SagaAuditEntry], UUID]


def operate(verb: Verb, saga_id: UUID | str, asked: Asked, work: Work) -> SagaExecution:
    """Do this work, if the user may and the execution is fit for it; returns what came of it.

    Raises PermissionDenied, SagaNotFound, and SagaError saying why not.
    """
    with audited(verb.name, verb.permission, asked, execution_id=_known(saga_id)) as (
        entry,
        storage,
    ):
        execution = read(saga_id, storage, verb)
        entry.saga = execution.saga
        entry.step = execution.step or execution.failed_step
        authorize(asked.get("user"), verb.name, execution)
        if verb.needs_reason:
            need_reason(asked)
        _refuse_changed(execution, asked)
        verdict = Verdict(execution.verdict)
        if verdict not in verb.allowed:
            raise _refusal(execution, verdict, storage)
        try:
            result = work(execution, storage, entry)
        except LeaseLost as error:
            raise SagaError(f"{name(execution)} is being changed by somebody else.") from error
    return read(result, storage)  # type: ignore[no-any-return]


def read(saga_id: UUID | str, storage: DjangoSagaStorage, verb: Verb | None = None) -> Any:
    """An execution with the database's clock; with a verb locked, and with the verdict on it.

    A driver's next checkpoint, and another operator, wait for the lock; what was read holds.
    """
    rows = SagaExecution.objects.using(storage.alias).filter(pk__in=[_uuid(saga_id)])
    annotations = {"verdict": verb.verdict()} if verb else {}
    if verb is not None:
        rows = rows.select_for_update()
    try:
        execution = rows.annotate(db_now=DatabaseNow(), **annotations).first()
        if execution is not None:
            execution.state  # noqa: B018
    except (DataError, ValueError) as error:
        raise SagaError(
            f"Saga execution {saga_id} cannot be read, was its row edited? {error}"
        ) from error
    if execution is None:
        raise SagaNotFound(f"No saga execution has the id {saga_id}.")
    return execution


def change(
    execution: SagaExecution, storage: DjangoSagaStorage, to: Callable[[Claim], Transition]
) -> State:
    """Bring it into another state under its lease, within the open transaction; then let it go on.

    Each change takes the next token: a driver that had it writes nothing more, and what was read
    under the former token is told from what it is now.
    """
    rows = SagaExecution.objects.using(storage.alias).filter(pk=execution.id)
    if not execution.is_active:  # else acquiring it does that
        rows.filter(token__lt=2**63 - 1).update(token=F("token") + 1)
    claim = storage.acquire(execution.id, driver=driver_name(), lease=conf.LEASE, by_hand=True)
    transition = to(claim)
    after, grace = transition.state, get_backend().grace(transition.delay)
    is_stuck = claim.state.status is Status.STUCK  # else an operator's own doing is no failure
    group = _group_of_act(claim, storage) if is_stuck else ""
    storage.checkpoint(
        Checkpoint(
            id=claim.id,
            token=claim.token,
            before=claim.state,
            after=after,
            record=transition.record,
            wake=transition.delay or None,
            grace=grace if after.active else None,
            cause=cause_of(claim.saga, claim.state, transition) if is_stuck and not group else None,
            place=claim.place,
        ),
        inside=True,
    )
    if execution.failure_group and after.status is Status.RUNNING:
        rows.update(failure_group="")  # what it fails of next, if anything, is another cause
    elif group and after.status is not Status.STUCK:
        rows.update(failure_group=group)
    storage.on_commit(partial(_go_on, claim, storage, transition))
    return after


def _group_of_act(claim: Claim, storage: DjangoSagaStorage) -> str:
    """The group in which it was before it got stuck in a compensation; empty where there is none.

    Its own row tells of the act's error, but not of the frame that raised it.
    """
    error = claim.state.error
    if error is None or error.type == CANCELLED:
        return ""
    groups = SagaFailureGroup.objects.using(storage.alias).filter(
        saga=claim.saga, step=claim.state.failed_step, action="act", error_type=error.type
    )
    said = stripped(error.message)
    alike = (group.id for group in groups[:100] if stripped(group.message) == said)
    return next(alike, "")


def _go_on(claim: Claim, storage: DjangoSagaStorage, transition: Transition) -> None:
    run = Run(_saga_of(claim, storage)[0], claim, None)
    run.state, run.delay, run.leased = transition.state, transition.delay, False
    drive(announce(run, transition.events, None))
    if claim.limit_key is not None and not transition.state.active:
        hand_on(run.saga, claim.limit_key)
    if transition.state.active:
        # It goes on when resumed, or when it has a place, or does already.
        with suppress(SagaPaused, SagaLimitReached, SagaAlreadyRunning):
            ring(claim, storage, transition.delay)


def ring(claim: Claim, storage: DjangoSagaStorage, delay: float) -> None:
    """Tell the backend; one that drives here cannot tell of a saga that the code has lost."""
    backend = get_backend()
    saga, lost = _saga_of(claim, storage)
    if lost is None or backend.queues:
        backend.send(saga, claim.id, delay)
    elif delay <= 0:
        recover_saga(claim.id, storage=storage)


def claim_of(execution: Any) -> Claim:
    """The execution as the storage gives it, under no lease."""
    state: State = execution.state
    return Claim(
        execution.id,
        execution.saga,
        execution.token,
        state,
        execution.db_now,
        execution=execution,
    )


def _refusal(execution: SagaExecution, verdict: Verdict, storage: DjangoSagaStorage) -> SagaError:
    if verdict is Verdict.RETRIED:
        return SagaError(why_retried(execution, storage))
    kind = SagaAlreadyRunning if verdict is Verdict.DRIVEN else SagaError
    return kind(f"{name(execution)} {_why_not(execution, verdict)}.")


def _why_not(execution: SagaExecution, verdict: Verdict) -> str:
    match verdict:
        case Verdict.DRIVEN:
            why = (
                f"is being driven by {execution.driver}; its lease lasts until "
                f"{_moment(execution.lease_until)}"
            )
        case Verdict.WAITING:
            why = (
                f"waits until {_moment(execution.wake_at)} for attempt {execution.attempt} of "
                f"{execution.step}; it goes on by itself then"
            )
        case Verdict.COMPLETED:
            why = "is completed; there is nothing to do"
        case Verdict.ACTIVE:
            why = f"has not ended, it is {execution.status}; recover it if nobody drives it"
        case Verdict.STUCK | Verdict.FAILED if execution.settled_at:
            why = f"has ended, it is {execution.status}, and was dealt with already"
        case Verdict.STUCK | Verdict.FAILED:
            why = f"has ended, it is {execution.status}; retry it"
        case Verdict.TURNED:
            why = f"is {execution.status}, and never goes forward again"
        case Verdict.PAUSED:
            why = "is paused; resume its saga and its step first"
        case Verdict.SETTLED:
            why = f"was settled by hand at {_moment(execution.settled_at)}"
        case Verdict.BLANKED:
            why = "cannot be started anew: its context was removed by retention"
        case Verdict.FREE:
            why = "is held by nobody; there is no lease to release"
        case _:
            why = f"is {execution.status}"
    return why


def why_retried(execution: SagaExecution, storage: DjangoSagaStorage) -> str:
    """Why it cannot be retried: as what it was."""
    rows = SagaExecution.objects.using(storage.alias)
    other = rows.filter(Q(retry_of=execution.id) | Q(pk=retry_id(execution.id))).first()
    what = f"as execution {other.id}, which is {other.status}" if other else "meanwhile"
    again = other and other.status in (SagaExecution.Status.FAILED, SagaExecution.Status.STUCK)
    hint = " Retry that one." if again else ""
    return f"{name(execution)} has been retried already, {what}.{hint}"


def retry_id(saga_id: UUID) -> UUID:
    """The id of the execution that retries this one: the primary key lets only one be started."""
    return uuid5(saga_id, "retry")


def _known(saga_id: UUID | str) -> UUID | None:
    """The id, for the audit; None where it is none."""
    with suppress(SagaError):
        return _uuid(saga_id)
    return None


def _refuse_changed(execution: SagaExecution, asked: Asked) -> None:
    token, status = asked.get("token"), asked.get("status")
    if (token is not None and execution.token != token) or (
        status is not None and execution.status != status
    ):
        raise SagaError(f"{name(execution)} changed meanwhile and is {execution.status} now.")


def _moment(time: datetime | None) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC" if time else "a time that cannot be read"


def name(execution: SagaExecution) -> str:
    """How an execution is called in a message."""
    return f"Saga {execution.saga} {execution.id}"
