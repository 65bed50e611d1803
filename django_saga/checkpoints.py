"""Making a transition durable, whatever the connection does meanwhile."""

from __future__ import annotations

import random
import time
from functools import partial

from msgspec.structs import replace

from django_saga.announcing import announce
from django_saga.causes import cause_of
from django_saga.changes import changes
from django_saga.conf import conf
from django_saga.definition import Definition
from django_saga.exceptions import LeaseLost, SagaAlreadyRunning, StorageUnavailable
from django_saga.flow import Flow, Pause, Run, Write, driver_name
from django_saga.limits import hand_on
from django_saga.machine import State, Transition
from django_saga.storage.base import Checkpoint, Saved


def save(run: Run, transition: Transition, began: float | None = None) -> Flow[None]:
    """Make a transition durable, whatever the connection does meanwhile; then announce it."""
    transition = noting(run, transition)
    saved: Saved | None = None
    deadline = time.monotonic() + conf.INLINE_WAIT
    while saved is None:
        checkpoint = checkpoint_of(run, transition, began)
        try:
            run.asked_at = time.monotonic()
            saved = yield Write(run.storage, checkpoint)
        except StorageUnavailable as error:
            saved = yield from look_again(run, error, transition)
            if saved is None and time.monotonic() > deadline:
                raise  # only this statement fails: disk full, say
            if saved is None:
                yield Pause(random.uniform(0.05, 0.2))
    yield from saved_as(run, transition, saved)


def noting(run: Run, transition: Transition) -> Transition:
    """The transition, with a note whether what it puts in flight is atomic."""
    if not transition.state.in_flight:
        return transition
    state = noted(transition.state, run.definition)
    return transition if state is transition.state else replace(transition, state=state)


def noted(state: State, definition: Definition) -> State:
    atomic = definition.rules[state.step].atomic
    return state if atomic is state.atomic else replace(state, atomic=atomic)


def checkpoint_of(run: Run, transition: Transition, began: float | None) -> Checkpoint:
    after, delay = transition.state, transition.delay
    keep = after.active and delay <= conf.INLINE_WAIT
    grace = None
    if not keep and after.active:
        grace = run.saga.backend.grace(delay)
    elif keep and after.recoveries > 1:
        grace = spacing(run, after)
    run.duration = None if began is None else time.monotonic() - began
    cause = cause_of(run.saga.name, run.state, transition) if after.error else None
    run.cause = cause or run.cause
    return Checkpoint(
        id=run.id,
        token=run.claim.token,
        before=run.state,
        after=after,
        record=transition.record,
        duration=run.duration,
        lease=run.lease + delay if keep else None,
        wake=delay or None,
        grace=grace,
        cause=cause,
        changes=_changes(run, transition),
        place=run.claim.place,
    )


def _changes(run: Run, transition: Transition) -> str:
    """What an attempt changed in the context; empty where it left it as it was."""
    before, after = run.state.context, transition.state.context
    if transition.record is None or after == before:
        return ""
    return changes(before, after, run.definition.codec.sensitive)


def spacing(run: Run, state: State) -> float | None:
    """Seconds between takeovers: what keeps losing its driver is taken over ever more rarely."""
    return run.lease * 2 ** min(state.recoveries - 1, 10) if state.recoveries else None


def saved_as(run: Run, transition: Transition, saved: Saved) -> Flow[None]:
    # The answer may have come late; the lease has counted since the statement was run.
    run.renewed_at = run.asked_at
    run.delay, run.wakes_at = transition.delay, time.monotonic() + transition.delay
    run.state, run.at, run.last = transition.state, saved.at, transition.record
    run.leased = transition.state.active and transition.delay <= conf.INLINE_WAIT
    run.cancel_reason, run.paused = saved.cancel_reason, saved.paused
    yield from announce(run, transition.events, saved)
    if run.claim.limit_key is not None and not transition.state.active:
        yield run.do(hand_on, run.saga, run.claim.limit_key)
    if transition.state.active and not run.leased:
        backend = run.saga.backend
        yield run.do(backend.hand_over, run.saga, run.id, transition.delay)


def look_again(run: Run, error: Exception, transition: Transition | None) -> Flow[Saved | None]:
    """After a lost connection: is the transition stored? None: no, and the lease is ours again.

    The statement may still be about to commit. Acquiring takes the lock of the row, so it waits for
    that; and it raises the token, so that what came too late matches no row any more. It raises it
    by one: if by more, others had the lease meanwhile, and may have brought the row to the very
    same place, so what is stored counts as theirs.
    """
    deadline, pause = time.monotonic() + conf.INLINE_WAIT, 0.05
    acquire = partial(run.storage.acquire, run.id, driver=driver_name(), lease=run.lease)
    while True:
        try:
            claim = yield run.do(acquire, token=run.claim.token)
            break
        except StorageUnavailable:
            if time.monotonic() > deadline:
                raise error from None
            yield Pause(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 1.0)
        except SagaAlreadyRunning as taken:
            raise LeaseLost(str(taken)) from error
    alone = claim.token == run.claim.token + claim.state.active  # what has ended keeps its token
    run.claim.token = claim.token
    if not alone:
        raise LeaseLost(f"Saga execution {run.id} was taken over meanwhile.") from error
    if transition is not None and _place(claim.state) == _place(transition.state):
        return Saved(claim.at, cancel_reason=claim.cancel_reason, paused=claim.paused)
    if _place(claim.state) != _place(run.state):
        raise LeaseLost(f"Saga execution {run.id} was changed by another driver.") from error
    return None


def _place(state: State) -> tuple[object, ...]:
    return state.status, state.step, state.action, state.attempt, state.in_flight, state.effects
