"""Recovery: driving what lost its driver, what waits, and what was handed over in vain."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django_saga import engine, registry
from django_saga.backends import get_backend
from django_saga.conf import conf
from django_saga.drivers import AsyncDriver, drive
from django_saga.errors import secrets_of
from django_saga.exceptions import LeaseLost, SagaError, UnknownSaga
from django_saga.flow import Do, Flow, Run, driver_name
from django_saga.keeper import keeper
from django_saga.saga import Saga, _uuid, default_storage
from django_saga.texts import told, traced

if TYPE_CHECKING:
    from django_saga.models import SagaExecution
    from django_saga.storage.base import Claim, SagaStorage

logger = logging.getLogger("django_saga.recovery")


def recover_saga(saga_id: UUID | str, *, storage: SagaStorage | None = None) -> SagaExecution:
    """Drive an execution on from where it stands, and return it however it ends.

    Raises SagaNotFound, SagaAlreadyRunning while another driver holds its lease, SagaLimitReached
    while it waits for its turn, InsideTransaction.
    """
    return drive(_recover(saga_id, storage or default_storage()))


async def arecover_saga(
    saga_id: UUID | str, *, storage: SagaStorage | None = None
) -> SagaExecution:
    """As :func:`recover_saga`, in the running event loop."""
    return await AsyncDriver().drive(_recover(saga_id, storage or default_storage()))


@dataclass(frozen=True)
class Recovered:
    """What became of one execution in a sweep."""

    saga: str
    saga_id: UUID
    status: str
    """Its status now, or HANDED_OVER, or LEASE_LOST."""
    error: str = ""
    """Why it is STUCK or could not be driven; empty where all is well."""


HANDED_OVER = "handed over"  # the backend was told
LEASE_LOST = "lease lost"  # another driver has it
BATCH = 20  # executions that one statement claims


def sweep(
    *,
    limit: int | None = None,
    saga: str | None = None,
    inline: bool | None = None,
    storage: SagaStorage | None = None,
) -> Generator[Recovered, None, None]:
    """Claim what is due, oldest first, and drive it here, or hand it over to the backend.

    ``inline``: drive here; default: unless the backend's own workers do. Each execution is isolated
    from the others; any number of sweeps may run at once, in any number of processes. Closed early,
    it releases what it had claimed beyond the execution that it yielded last.

    Raises StorageUnavailable where the database is away, InsideTransaction.
    """
    storage = storage or default_storage()
    here = inline or (inline is None and not get_backend().queues)
    while limit is None or limit > 0:
        batch = BATCH if limit is None else min(limit, BATCH)
        if here:
            claims = storage.due(batch, driver=driver_name(), lease=conf.LEASE, saga=saga)
            yield from _drive_all(claims, storage)
        else:
            claims = storage.due(batch, grace=conf.LEASE, saga=saga)
            if not (yield from _hand_over_all(claims, storage)):
                return
        # What has ended since may have given its place to another.
        if len(claims) < batch and all(claim.limit_key is None for claim in claims):
            return
        if limit is not None:
            limit -= len(claims)


def _drive_all(claims: list[Claim], storage: SagaStorage) -> Generator[Recovered, None, None]:
    """Drive one after the other, keeping the leases of those that wait for their turn.

    Those that lost a driver before come last: they may take this one down too.
    """
    claims = sorted(claims, key=lambda claim: claim.state.recoveries)
    waiting = deque(Run(_Lost(name=c.saga, storage=storage), c, None) for c in claims)
    try:
        for run in waiting:
            keeper.watch(run)
        while waiting:
            keeper.forget(waiting[0])
            claim = waiting.popleft().claim
            recovered = _drive_one(claim, storage)
            yield recovered
            if recovered.error:
                # Raises where the fault is not this execution's: the database itself is away.
                storage.renew([run.key for run in waiting], lease=conf.LEASE)
    finally:
        try:
            _forget(waiting)
        finally:
            _forget(waiting)  # an interruption may have struck the first: it strikes but once
        _release([run.claim for run in waiting], storage)


def _forget(runs: Iterable[Run]) -> None:
    """The keeper would renew for ever what it is not told to forget."""
    for run in runs:
        keeper.forget(run)


def _drive_one(claim: Claim, storage: SagaStorage) -> Recovered:
    about = {"saga": claim.saga, "execution": str(claim.id)}
    try:
        execution = drive(_go_on(claim, storage))
    except LeaseLost as error:
        logger.warning("Saga %s %s: %s", claim.saga, claim.id, told(error), extra=about)
        return Recovered(claim.saga, claim.id, LEASE_LOST)
    except (Exception, CancelledError) as error:  # that one only leaks out of an async handler
        why = told(error, secrets := _secrets(claim, storage))
        if not (known := isinstance(error, SagaError)):
            why = f"{type(error).__qualname__}: {why}"
        logger.error(
            "Saga %s %s was not recovered: %s",
            claim.saga,
            claim.id,
            why if known else traced(error, secrets),
            extra=about,
        )
        return Recovered(claim.saga, claim.id, claim.state.status.value, why)
    return Recovered(claim.saga, claim.id, execution.status, execution.stuck_reason)


def _secrets(claim: Claim, storage: SagaStorage) -> set[str]:
    try:
        saga, _ = _saga_of(claim, storage)
        return secrets_of(Run(saga, claim, None))
    except Exception:  # the saga's definition is what failed
        from django_saga.masking import sensitive_values

        return sensitive_values(claim.state.context)


def _hand_over_all(claims: list[Claim], storage: SagaStorage) -> Generator[Recovered, None, bool]:
    """Tell the backend of each; False, and the others left as they were, once it cannot be told."""
    waiting = deque(claims)
    try:
        while waiting:
            claim = waiting[0]
            saga, _ = _saga_of(claim, storage)
            try:
                saga.backend.send(saga, claim.id, 0.0)
            except Exception as error:
                why = told(error)
                logger.error("The backend cannot be told of what is due: %s", why)
                yield Recovered(claim.saga, claim.id, claim.state.status.value, why)
                return False
            waiting.popleft()
            yield Recovered(claim.saga, claim.id, HANDED_OVER)
    finally:
        _release(list(waiting), storage)
    return True


def _release(claims: list[Claim], storage: SagaStorage) -> None:
    """Let go of what was claimed and not touched, so that the next sweep need not wait for it."""
    try:
        for claim in claims:
            storage.release(claim.id, claim.token)
    except SagaError as error:
        logger.warning("Some leases could not be released and run out: %s", told(error))


def _recover(saga_id: UUID | str, storage: SagaStorage) -> Flow[SagaExecution]:
    id = _uuid(saga_id)
    if id is None:
        raise SagaError("A saga_id is a UUID, not None.")
    claim = yield Do(
        lambda: storage.acquire(id, driver=driver_name(), lease=conf.LEASE),
        storage.blocking,
    )
    return (yield from _go_on(claim, storage))


def _go_on(claim: Claim, storage: SagaStorage) -> Flow[SagaExecution]:
    saga, lost = _saga_of(claim, storage)
    if lost is not None:
        run = yield from engine.strand(claim, saga, lost)
    else:
        run = yield from engine.take_over(saga, claim)
    return (yield from engine.go_on(run))


def _saga_of(claim: Claim, storage: SagaStorage) -> tuple[Saga[Any], UnknownSaga | None]:
    try:
        return registry.find_saga(claim.saga)(storage=storage), None
    except UnknownSaga as error:
        return _Lost(name=claim.saga, storage=storage), error


class _Lost(Saga[Any]):
    """Stands for a saga by its name alone, to keep its lease or to end it as STUCK."""

    def __init__(self, *, name: str, storage: SagaStorage) -> None:
        self.name = name  # type: ignore[misc]
        self.storage = storage
        self.definition = None  # type: ignore[assignment]
