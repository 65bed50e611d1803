"""Trying again: what has ended badly, and what has lost its driver."""

from __future__ import annotations

from typing import Unpack
from uuid import UUID

from django_saga import machine, registry
from django_saga.exceptions import LeaseLost, SagaAlreadyRunning, SagaError, StorageUnavailable
from django_saga.models import SagaAuditEntry, SagaExecution
from django_saga.operations.asking import Asked, refuse
from django_saga.operations.executing import (
    change,
    claim_of,
    name,
    operate,
    read,
    retry_id,
    ring,
    why_retried,
)
from django_saga.operations.verbs import RECOVER, RETRY
from django_saga.saga import _delay, enqueue
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Claim
from django_saga.texts import told
from django_saga.verdicts import DatabaseNow


def retry(saga_id: UUID | str, *, delay: float = 0.0, **asked: Unpack[Asked]) -> SagaExecution:
    """Start a FAILED execution anew, or try the compensation of a STUCK one again.

    A FAILED one is started as a new execution, linked by ``retry_of``, with the original context
    and the steps that the saga has now; that one is returned. It can be done once: what failed
    again is retried itself. A STUCK one is handed to the backend, and returned as it then stands.

    Begins in ``delay`` seconds at the earliest. Joins an open transaction. Raises PermissionDenied
    where a given user lacks ``retry_sagaexecution``; SagaNotFound, UnknownSaga, InvalidContext;
    SagaError saying why not.
    """
    delay = _delay(delay, "retry()")

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        if execution.status == SagaExecution.Status.FAILED:
            new = _start_anew(execution, storage, delay)
            entry.detail = f"Started anew as {new}."
            return new

        def again(claim: Claim) -> machine.Transition:
            return machine.compensate_again(claim.state, delay)

        change(execution, storage, again)
        return execution.id

    return operate(RETRY, saga_id, asked, work)


def recover(saga_id: UUID | str, **asked: Unpack[Asked]) -> SagaExecution:
    """Have the backend drive on now what has lost its driver, or never got one.

    Raises PermissionDenied where a given user lacks ``recover_sagaexecution``; SagaNotFound,
    SagaAlreadyRunning, InsideTransaction (the in-process backend), and SagaError saying why not.
    """

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        sent.append((claim_of(execution), storage))
        return execution.id

    sent: list[tuple[Claim, DjangoSagaStorage]] = []
    execution = operate(RECOVER, saga_id, asked, work)
    claim, storage = sent[0]
    try:
        ring(claim, storage, 0.0)
    except (LeaseLost, StorageUnavailable):
        raise
    except Exception as error:
        why = error if isinstance(error, SagaError) else _not_handed_over(execution, error)
        about = {"saga": claim.saga, "step": claim.state.step, "execution_id": claim.id}
        refuse(RECOVER.name, why, asked, storage, **about)
        if why is error:
            raise
        raise why from error
    return read(claim.id, storage)  # type: ignore[no-any-return]


def _not_handed_over(execution: SagaExecution, error: Exception) -> SagaError:
    return SagaError(
        f"{name(execution)} could not be handed to the backend; recover_sagas will find it. "
        f"{type(error).__name__}: {told(error)}"
    )


def _start_anew(execution: SagaExecution, storage: DjangoSagaStorage, delay: float) -> UUID:
    saga = registry.find_saga(execution.saga)(storage=storage)
    context = saga.definition.codec.decode(execution.initial_context)
    new = retry_id(execution.id)
    try:
        enqueue(saga, context, saga_id=new, delay=delay, retry_of=execution.id)
    except SagaAlreadyRunning:
        raise SagaError(why_retried(execution, storage)) from None
    rows = SagaExecution.objects.using(storage.alias).filter(pk=execution.id)
    rows.update(settled_at=DatabaseNow())
    return new
