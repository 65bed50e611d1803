"""One attempt: call the handler, find out what came of it, checkpoint that."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from django_saga import machine
from django_saga.checkpoints import checkpoint_of, look_again, noting, save, saved_as
from django_saga.conf import conf
from django_saga.errors import describe, report_of, secrets_of
from django_saga.exceptions import InvalidContext, LeaseLost, StorageUnavailable
from django_saga.flow import Call, CallInside, Flow, HandlerRaised, Run
from django_saga.keeper import keeper
from django_saga.machine import Action, Outcome, Report, Status, Transition
from django_saga.steps import CurrentStep, SagaStepResult
from django_saga.storage.base import Saved


def attempt(run: Run) -> Flow[SagaStepResult | None]:
    """Call the handler once, and checkpoint what it came to."""
    state, began = run.state, time.monotonic()
    if began - run.renewed_at > run.lease:
        raise LeaseLost(f"Saga execution {run.id}: its lease ran out before step {state.step}.")
    step = run.definition.steps[state.step]
    rules = run.definition.rules[state.step]
    call = _call(run)
    response: Any = None
    try:
        keeper.watch(run)
        if rules.atomic:
            response = yield from _attempt_inside(run, call, began)
        else:
            response = yield call
            yield from save(run, _settle_done(run), began)
    except HandlerRaised as raised:
        yield from save(run, _settle_failed(run, raised.error), began)
    finally:
        keeper.forget(run)
    done = state.action is Action.ACT and run.last is not None and run.last.outcome is Outcome.DONE
    return SagaStepResult(step, response, run.id) if done and run.error is None else None


def _attempt_inside(run: Run, call: Call, began: float) -> Flow[Any]:
    """Call an atomic step's handler; its writes and its checkpoint commit together."""
    made: list[Transition] = []

    def checkpoint() -> tuple[Transition, Saved]:
        made.append(noting(run, _settle_done(run)))
        run.asked_at = time.monotonic()
        return made[0], run.storage.checkpoint(checkpoint_of(run, made[0], began), inside=True)

    try:
        transaction = partial(run.storage.atomic, run.lease)
        response, (transition, saved) = yield CallInside(call, transaction, checkpoint)
    except StorageUnavailable as error:
        saved = yield from look_again(run, error, made[0] if made else None)
        if saved is None:  # rolled back, the handler's writes included
            rules = run.definition.rules[run.state.step]
            yield from save(run, machine.interrupt(run.state, rules, conf.MAX_RECOVERIES))
            return None
        response, transition = None, made[0]
    yield from saved_as(run, transition, saved)
    return response


def _call(run: Run) -> Call:
    state, act, breaker = run.state, None, None
    if state.action is Action.COMPENSATE:
        act = next(effect.act for effect in state.effects if effect.step == state.step)
    elif state.step in run.definition.fallbacks:
        breaker = run.definition.fallbacks[state.step].circuit_breaker
    info = CurrentStep(run.id, state.step, state.action, state.attempt, act)
    return Call(run, run.definition.steps[state.step], info, breaker)


def _settle_done(run: Run) -> Transition:
    """The act or compensation is done; its effect stands even if its context cannot be stored."""
    error = described = None
    try:
        context = run.definition.codec.encode(run.context, limit=conf.CONTEXT_LIMIT)
    except InvalidContext as invalid:
        error = InvalidContext(f"Saga {run.saga.name} {run.id}, step {run.state.step}: {invalid}")
        context = _salvage(run)
        described = describe(error, secrets_of(run, context))
    report = Report(outcome=Outcome.DONE, context=context, error=described)
    return _settle(run, report, error)


def _settle_failed(run: Run, error: Exception) -> Transition:
    step = run.definition.steps[run.state.step]
    fallback = run.definition.fallbacks.get(run.state.step)
    try:
        context = run.definition.codec.encode(run.context, limit=conf.CONTEXT_LIMIT)
    except InvalidContext:
        context = _salvage(run)
    report = report_of(error, step, fallback, context, secrets_of(run, context))
    return _settle(run, report, error)


def _settle(run: Run, report: Report, error: Exception | None) -> Transition:
    transition = machine.settle(run.state, report, run.definition.rules[run.state.step])
    if transition.state.context is not report.context:  # a Fallback begins where its step began
        run.definition.codec.restore(run.context, transition.state.context)
    if run.state.status is Status.RUNNING and transition.state.status in _TURNED:
        run.error = error
    return transition


_TURNED = frozenset({Status.COMPENSATING, Status.FAILED, Status.STUCK})


def _salvage(run: Run) -> str:
    codec = run.definition.codec
    return codec.salvage(run.context, run.state.context, limit=conf.CONTEXT_LIMIT)
