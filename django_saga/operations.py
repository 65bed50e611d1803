"""What an operator can have done to an execution; for code, the admin and commands alike.

Each function looks at permission and state itself, where the work is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Protocol
from uuid import UUID, uuid5

from django.core.exceptions import PermissionDenied
from django.db import DataError
from django.db.models import Case, Q

from django_saga import machine, registry
from django_saga.announcing import announce
from django_saga.backends import get_backend
from django_saga.drivers import drive
from django_saga.exceptions import LeaseLost, SagaAlreadyRunning, SagaError, SagaNotFound
from django_saga.flow import Run
from django_saga.models import SagaExecution
from django_saga.recovery import _saga_of, recover_saga
from django_saga.saga import _delay, _uuid, enqueue
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Checkpoint, Claim
from django_saga.verdicts import DatabaseNow, Verdict, recover_verdict, retry_verdict

Status = SagaExecution.Status


class Operator(Protocol):
    """Who has something done: a user, as the project's authentication knows them."""

    def has_perm(self, perm: str) -> bool:
        """Whether they may."""
        ...


def retry(
    saga_id: UUID | str,
    *,
    user: Operator | None = None,
    status: str | None = None,
    delay: float = 0.0,
    storage: DjangoSagaStorage | None = None,
) -> SagaExecution:
    """Start a FAILED execution anew, or try the compensation of a STUCK one again.

    A FAILED one is started as a new execution, linked by ``retry_of``, with the original context
    and the steps that the saga has now; that one is returned. It can be done once: what failed
    again is retried itself. A STUCK one is handed to the backend, and returned as it then stands.

    With a ``status``, refuses an execution that is no longer in it. Begins in ``delay`` seconds at
    the earliest. Joins an open transaction. Raises PermissionDenied where a given ``user`` lacks
    ``retry_sagaexecution``; SagaNotFound, UnknownSaga, InvalidContext; SagaError saying why not.
    """
    _permit(user, "retry")
    delay = _delay(delay, "retry()")
    storage = storage or DjangoSagaStorage()
    execution = _read(saga_id, storage, retry_verdict())
    if status is not None and execution.status != status:
        raise SagaError(f"{_name(execution)} changed meanwhile and is {execution.status} now.")
    match _verdict_of(execution):
        case Verdict.ANEW:
            return _start_anew(execution, storage, delay)
        case Verdict.AGAIN:
            return _compensate_again(execution, storage, delay)
        case Verdict.RETRIED:
            raise _retried_already(execution, storage)
        case Verdict.COMPLETED:
            raise SagaError(f"{_name(execution)} is completed; there is nothing to retry.")
        case _:
            raise SagaError(
                f"{_name(execution)} has not ended, it is {execution.status}; recover it "
                "if nobody drives it."
            )


def recover(
    saga_id: UUID | str, *, user: Operator | None = None, storage: DjangoSagaStorage | None = None
) -> SagaExecution:
    """Have the backend drive on now what has lost its driver, or never got one.

    Raises PermissionDenied where a given ``user`` lacks ``recover_sagaexecution``; SagaNotFound,
    SagaAlreadyRunning, InsideTransaction (the in-process backend), and SagaError saying why not.
    """
    _permit(user, "recover")
    storage = storage or DjangoSagaStorage()
    execution = _read(saga_id, storage, recover_verdict())
    match _verdict_of(execution):
        case Verdict.ON:
            return _send(execution, storage)
        case Verdict.DRIVEN:
            raise SagaAlreadyRunning(
                f"{_name(execution)} is being driven by {execution.driver}; its lease lasts until "
                f"{_moment(execution.lease_until)}."
            )
        case Verdict.WAITING:
            raise SagaError(
                f"{_name(execution)} waits until {_moment(execution.wake_at)} for "
                f"attempt {execution.attempt} of {execution.step}; it goes on by itself then."
            )
        case Verdict.COMPLETED:
            raise SagaError(f"{_name(execution)} is completed; there is nothing to recover.")
        case _:
            raise SagaError(f"{_name(execution)} has ended, it is {execution.status}; retry it.")


@dataclass(frozen=True)
class Verb:
    """One of the functions above, with what is to be known before it is called."""

    name: str
    function: Callable[..., SagaExecution]
    verdict: Callable[[], Case]
    """The expression that gives each execution's :class:`Verdict`."""
    possible: tuple[Verdict, ...]
    """The verdicts under which it can be done."""

    @property
    def permission(self) -> str:
        """The permission that it takes, with its app label."""
        return _permission(self.name)


RETRY = Verb("retry", retry, retry_verdict, (Verdict.ANEW, Verdict.AGAIN))
RECOVER = Verb("recover", recover, recover_verdict, (Verdict.ON,))
VERBS = {verb.name: verb for verb in (RETRY, RECOVER)}


def _permission(verb: str) -> str:
    return f"django_saga.{verb}_sagaexecution"


def _permit(user: Operator | None, verb: str) -> None:
    if user is not None and not user.has_perm(_permission(verb)):
        raise PermissionDenied(f"This takes the permission {_permission(verb)}.")


def _read(
    saga_id: UUID | str, storage: DjangoSagaStorage, verdict: Case | None = None
) -> SagaExecution:
    rows = SagaExecution.objects.using(storage.alias).filter(pk__in=[_uuid(saga_id)])
    annotations = {"verdict": verdict} if verdict else {}
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


def _verdict_of(execution: SagaExecution) -> Verdict:
    return Verdict(execution.verdict)  # type: ignore[attr-defined]


def _claim(execution: SagaExecution) -> Claim:
    return Claim(
        execution.id,
        execution.saga,
        execution.token,
        execution.state,
        execution.db_now,  # type: ignore[attr-defined]
        execution=execution,
    )


def _moment(time: datetime | None) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC" if time else "a time that cannot be read"


def _name(execution: SagaExecution) -> str:
    return f"Saga {execution.saga} {execution.id}"


def retry_id(saga_id: UUID) -> UUID:
    """The id of the execution that retries this one: the primary key lets only one be started."""
    return uuid5(saga_id, "retry")


def _start_anew(
    execution: SagaExecution, storage: DjangoSagaStorage, delay: float
) -> SagaExecution:
    saga = registry.find_saga(execution.saga)(storage=storage)
    context = saga.definition.codec.decode(execution.initial_context)
    new = retry_id(execution.id)
    try:
        enqueue(saga, context, saga_id=new, delay=delay, retry_of=execution.id)
    except SagaAlreadyRunning:
        raise _retried_already(execution, storage) from None
    return _read(new, storage)


def _retried_already(execution: SagaExecution, storage: DjangoSagaStorage) -> SagaError:
    rows = SagaExecution.objects.using(storage.alias)
    other = rows.filter(Q(retry_of=execution.id) | Q(pk=retry_id(execution.id))).first()
    what = f"as execution {other.id}, which is {other.status}" if other else "meanwhile"
    hint = " Retry that one." if other and other.status in (Status.FAILED, Status.STUCK) else ""
    return SagaError(f"{_name(execution)} has been retried already, {what}.{hint}")


def _compensate_again(
    execution: SagaExecution, storage: DjangoSagaStorage, delay: float
) -> SagaExecution:
    """Put a stuck execution back, if it is stuck as it was read, and hand it over.

    The token is the stuck one until a driver acquires the execution. That is safe: who held it
    wrote STUCK as its last word, and every earlier driver's token is lower.
    """
    claim = _claim(execution)
    backend = get_backend()
    transition = machine.compensate_again(claim.state)
    again = transition.state.active
    checkpoint = Checkpoint(
        id=claim.id,
        token=claim.token,
        before=claim.state,
        after=transition.state,
        wake=(delay or None) if again else None,
        grace=backend.grace(delay) if again else None,
    )
    try:
        storage.checkpoint(checkpoint, inside=True)
    except LeaseLost:
        raise SagaError(f"{_name(execution)} is being retried already.") from None
    if again:
        storage.on_commit(partial(_ring, claim, storage, delay))
    else:  # nothing was left to undo
        run = Run(_saga_of(claim, storage)[0], claim, None)
        run.state = transition.state
        storage.on_commit(lambda: drive(announce(run, transition.events, None)))
    return _read(execution.id, storage)


def _send(execution: SagaExecution, storage: DjangoSagaStorage) -> SagaExecution:
    try:
        _ring(_claim(execution), storage, 0.0)
    except SagaError:
        raise
    except Exception as error:
        raise SagaError(
            f"{_name(execution)} could not be handed to the backend; recover_sagas will find it. "
            f"{type(error).__name__}: {error}"
        ) from error
    return _read(execution.id, storage)


def _ring(claim: Claim, storage: DjangoSagaStorage, delay: float) -> None:
    """Tell the backend; one that drives here cannot tell of a saga that the code has lost."""
    backend = get_backend()
    saga, lost = _saga_of(claim, storage)
    if lost is None or backend.queues:
        backend.send(saga, claim.id, delay)
    elif delay <= 0:
        recover_saga(claim.id, storage=storage)
