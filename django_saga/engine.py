"""The way of a saga from its start to its end, as flows for either driver.

It decides nothing that :mod:`django_saga.machine` could: it carries outcomes there and
transitions to the storage.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django_saga import limits, machine
from django_saga.announcing import announce
from django_saga.attempts import attempt
from django_saga.checkpoints import noted, save, spacing
from django_saga.conf import conf
from django_saga.errors import describe, secrets_of
from django_saga.exceptions import (
    InvalidContext,
    LeaseLost,
    SagaFailed,
    SagaStuck,
    StorageUnavailable,
    UnknownSaga,
)
from django_saga.flow import Do, Flow, Pause, Run, Write, driver_name
from django_saga.interventions import CANCELLED
from django_saga.machine import Error, Status, StepRules
from django_saga.steps import SagaStepResult
from django_saga.storage.base import Claim, Creation
from django_saga.texts import told

if TYPE_CHECKING:
    from django_saga.models import SagaExecution
    from django_saga.saga import Saga

logger = logging.getLogger("django_saga.engine")


# Beginning


def start(saga: Saga[Any], context: Any, saga_id: UUID | None) -> Flow[Run]:
    """Store a new execution, already running; one that exists is resumed instead."""
    from django_saga.models import new_id

    encoded = saga.definition.codec.encode(context, limit=conf.CONTEXT_LIMIT)
    state = noted(machine.start(saga.definition.plan, encoded), saga.definition)
    storage = saga.storage
    creation = Creation(
        id=saga_id or new_id(),
        saga=saga.name,
        state=state,
        driver=driver_name(),
        lease=conf.LEASE,
        limit_key=limits.key_of(saga, context),
    )
    asked_at = time.monotonic()
    claim = yield Write(storage, creation)
    if claim is None:
        assert saga_id is not None
        return (yield from resume(saga, saga_id, context))
    run = Run(saga, claim, context)
    run.renewed_at = asked_at
    yield from announce(run, ("saga_started",), None)
    return run


def resume(saga: Saga[Any], saga_id: UUID, context: Any = None) -> Flow[Run]:
    """Acquire an execution; the stored context rules, and a given one is brought up to it."""
    storage = saga.storage
    acquire = partial(
        storage.acquire, saga_id, driver=driver_name(), lease=conf.LEASE, saga=saga.name
    )
    claim = yield Do(acquire, storage.blocking)
    return (yield from take_over(saga, claim, context))


def take_over(saga: Saga[Any], claim: Claim, context: Any = None) -> Flow[Run]:
    """Make an acquired execution ready to be driven, or STUCK where code or context are lost."""
    run = Run(saga, claim, context)
    codec = run.definition.codec
    if run.leased and (flaw := machine.flaw(claim.state)):
        reason = f"Its row contradicts itself, it must have been edited: {flaw}."
        yield from save(run, machine.stick(claim.state, reason, _as_it_began(claim)))
        return run
    try:
        if context is None or not isinstance(context, run.definition.context_type):
            run.context = codec.decode(claim.state.context)
        else:
            codec.restore(context, claim.state.context)
        if claim.state.fallback_context is not None:
            codec.decode(claim.state.fallback_context)  # a Fallback may have to go back there
        if run.leased:
            run.definition.require(machine.needed_steps(claim.state))
    except (InvalidContext, UnknownSaga) as error:
        if run.leased:
            reason = told(error, secrets_of(run))
            yield from save(run, machine.stick(claim.state, reason, _as_it_began(claim)))
        return run
    if run.leased and claim.state.in_flight:
        lost = machine.interrupt(claim.state, _as_it_began(claim), conf.MAX_RECOVERIES)
        yield from save(run, lost)
    return run


def strand(claim: Claim, saga: Saga[Any], error: Exception) -> Flow[Run]:
    """End as STUCK what no code is known for any more; ``saga`` only says where it is stored."""
    run = Run(saga, claim, None)
    if run.leased:  # what has ended stays as it ended
        reason = told(error, secrets_of(run))
        yield from save(run, machine.stick(claim.state, reason, _as_it_began(claim)))
    return run


def _as_it_began(claim: Claim) -> StepRules:
    """Whether the lost attempt was atomic: the code that began it knew, today's may differ."""
    return StepRules(atomic=claim.state.atomic)


# Driving


def advance(run: Run) -> Flow[SagaStepResult | None]:
    """Go on until an act is done; None when nothing more is to be done here."""
    run.resting = False
    try:
        while run.leased:
            if run.cancel_reason and run.state.status is Status.RUNNING:
                cancelled = Error(CANCELLED, run.cancel_reason)
                yield from save(run, machine.turn_back(run.state, cancelled))
                continue
            if run.paused:
                yield from let_go(run)
                return None
            if run.stopping:
                yield from let_go(run, hand_over=True)
                return None
            if not run.state.in_flight:
                if not (yield from _wait(run)):
                    return None
                continue  # its checkpoint may have told of what operators ask
            result = yield from attempt(run)
            if result is not None:
                run.resting = True
                return result
    except GeneratorExit:
        raise
    except BaseException as error:
        if isinstance(error, LeaseLost):
            run.leased = False
        # While a handler may be running the lease must run out; in_flight says what was lost.
        if run.leased and not run.abandoned and not isinstance(error, StorageUnavailable):
            yield from let_go(run, unstarted=False)
        raise
    return None


def finish(run: Run) -> Flow[SagaExecution]:
    """As :func:`go_on`, and raise how it ended."""
    yield from _to_the_end(run)
    return outcome(run)


def start_and_finish(saga: Saga[Any], context: Any, saga_id: UUID | None) -> Flow[SagaExecution]:
    """All of :meth:`Saga.run`."""
    run = yield from start(saga, context, saga_id)
    return (yield from finish(run))


def resume_and_go_on(saga: Saga[Any], saga_id: UUID) -> Flow[SagaExecution]:
    """Acquire an execution and drive it as far as it goes, however it ends."""
    run = yield from resume(saga, saga_id)
    return (yield from go_on(run))


def go_on(run: Run) -> Flow[SagaExecution]:
    """Drive to the end, or until the execution is handed over, however it ends."""
    yield from _to_the_end(run)
    return run.execution


def _to_the_end(run: Run) -> Flow[None]:
    while (yield from advance(run)) is not None:
        pass


def outcome(run: Run) -> SagaExecution:
    """The execution; raises SagaFailed or SagaStuck for one that ended so."""
    execution = run.execution
    state = run.state
    why = f"{state.error.type}: {state.error.message}" if state.error else "no error was recorded"
    if state.status is Status.FAILED:
        where = f"step {state.failed_step} failed" if state.failed_step else "it was abandoned"
        if state.error and state.error.type == CANCELLED:
            where = "it was cancelled"
        message = f"Saga {execution.saga} {run.id}: {where} and all was compensated. {why}"
        raise SagaFailed(message, execution) from run.error
    if state.status is Status.STUCK:
        since = (
            f"It turned back since step {state.failed_step} failed" if state.failed_step else "Why"
        )
        message = f"Saga {execution.saga} {run.id} is stuck: {state.stuck_reason} {since}: {why}"
        raise SagaStuck(message, execution) from run.error
    return execution


def turn_back(run: Run, error: Exception) -> Flow[None]:
    """The consumer raised between two steps: compensate what is done."""
    if not run.leased or run.state.status is not Status.RUNNING:
        yield from let_go(run)
        return
    run.error = error
    yield from save(run, machine.turn_back(run.state, describe(error, secrets_of(run))))
    yield from _to_the_end(run)


def let_go(run: Run, *, unstarted: bool = True, hand_over: bool = False) -> Flow[None]:
    """Release the lease, so that whoever comes next need not wait for it to run out."""
    if not run.leased or run.abandoned:
        return
    run.leased = False
    hand_over = hand_over and run.saga.backend.queues
    if hand_over:
        grace = run.saga.backend.grace(0.0)
    else:
        grace = None if unstarted else spacing(run, run.state)
    try:
        yield run.do(run.storage.release, *run.key, unstarted=unstarted, grace=grace)
    except Exception:
        logger.warning("Saga %s: its lease could not be released and runs out", run.id)
        return
    if hand_over:
        yield run.do(run.saga.backend.hand_over, run.saga, run.id, 0.0)


def give_up(run: Run) -> Flow[None]:
    """Let go of an execution for which nobody waits any more; the backend goes on with it."""
    return let_go(run, hand_over=True)


def _wait(run: Run) -> Flow[bool]:
    """Sleep through a short wait and put the next attempt in flight; hand a long one over."""
    seconds = run.wakes_at - time.monotonic()
    if seconds > conf.INLINE_WAIT:
        yield run.do(run.storage.release, *run.key, grace=run.saga.backend.grace(seconds))
        run.leased = False
        yield run.do(run.saga.backend.hand_over, run.saga, run.id, seconds)
        return False
    if seconds > 0:
        yield Pause(seconds)
    if not run.stopping:
        yield from save(run, machine.begin(run.state))
    return True
