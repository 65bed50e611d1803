"""Proofs that a saga does all or nothing, whatever becomes of its process and its steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from django_saga.exceptions import CircuitOpen
from django_saga.machine import Status
from django_saga.saga import Saga
from django_saga.testing.effects import changes, snapshot
from django_saga.testing.faults import (
    Fault,
    call_twice,
    crash_after,
    crash_at,
    crash_before,
    fail_at,
)
from django_saga.testing.runner import SagaRun, SagaRunner

if TYPE_CHECKING:
    from django_saga import SagaContext
    from django_saga.storage import DjangoSagaStorage


def assert_saga_is_crash_safe(
    saga: Saga[Any] | type[Saga[Any]],
    context: SagaContext | Callable[[], SagaContext],
    *,
    effects: Callable[[], Any],
    storage: DjangoSagaStorage | None = None,
) -> None:
    """Assert that a saga does all or nothing wherever its process dies.

    It is run again and again: dying before and after each checkpoint, that is, before and after
    each call of a handler; calling each handler twice with the same key; and failing as
    :func:`assert_compensates_fully` has it. All of that on the way where it completes, where all of
    it is compensated, and where each Fallback steps in. Where it ends COMPLETED, its effects must
    be those of an undisturbed run; where FAILED, there must be none.

    ``effects`` tells what stands outside: counts, lists, or dicts of them, without ids that are
    new in each run. It is called before and after each run, and what changed is judged, so nothing
    need be reset. ``context`` is copied for each run, or is called before each to make a fresh one;
    that is also the place to reset a fake, or to make the rows that a run uses up.

    Executions are kept in memory, or in ``storage``. An ``atomic`` step is not called twice, since
    its transaction excludes that; :class:`SagaRunner` says what is proven of it in memory. Not
    proven: what a driver does that comes back to life, two deaths in a row at every two places.

    Raises AssertionError naming the step and its action, the moment, and how to see it again.
    """
    with _quiet():
        proof = _Proof(saga, context, effects, storage)
        proof.disturb()
        proof.fail_each_step()
        for way in proof.other_ways():
            proof.disturb(*way)


def assert_compensates_fully(
    saga: Saga[Any] | type[Saga[Any]],
    context: SagaContext | Callable[[], SagaContext],
    *,
    effects: Callable[[], Any],
    storage: DjangoSagaStorage | None = None,
) -> None:
    """Assert that nothing stands where a step fails, whichever it is.

    Each step, a Fallback's too, fails in turn: known to have done nothing; and with an unknown
    outcome, its answer lost with its process, having acted and not. An ``atomic`` step's outcome is
    never unknown. The arguments are those of :func:`assert_saga_is_crash_safe`.
    """
    with _quiet():
        _Proof(saga, context, effects, storage).fail_each_step()


class _Proof:
    """``wanted`` is what an undisturbed run changes outside."""

    def __init__(
        self,
        saga: Saga[Any] | type[Saga[Any]],
        context: SagaContext | Callable[[], SagaContext],
        effects: Callable[[], Any],
        storage: DjangoSagaStorage | None,
    ) -> None:
        self.context, self.effects, self.storage = context, effects, storage
        self.saga = copy.copy(SagaRunner(storage).made(saga))
        given = self.saga.definition
        # So many failures would open a breaker, for the runs to come as well.
        fallbacks = {k: replace(f, circuit_breaker=None) for k, f in given.fallbacks.items()}
        self.saga.definition = self.definition = replace(given, fallbacks=fallbacks)

        run, self.wanted = self.run()
        if run.status is not Status.COMPLETED:
            raise AssertionError(
                f"Undisturbed, {given.owner} is {run.status}: {run}. Give a context with which it "
                "completes: the failures are made by the proof."
            )
        if self.wanted is None:
            raise AssertionError(
                "effects() is the same before and after an undisturbed run: it does not see what "
                f"{given.owner} does."
            )
        run, again = self.run()
        if again != self.wanted:
            raise AssertionError(
                f"Two undisturbed runs differ: the first changed {self.wanted!r}, the second, "
                f"{run.status}, {again!r}. Leave ids out of effects(), and let context be a "
                "function that makes all that a run needs anew."
            )

    def run(self, *faults: Fault) -> tuple[SagaRun, Any]:
        context = self.context() if callable(self.context) else copy.deepcopy(self.context)
        before = snapshot(self.effects())
        run = SagaRunner(self.storage).start(self.saga, context, *faults).finish()
        return run, changes(before, snapshot(self.effects()))

    def disturb(self, *way: Fault) -> None:
        """Crash at each moment of a way, and call each handler on it twice."""
        usual, changed = self.run(*way)
        wanted = changed if usual.status is Status.COMPLETED else self.wanted
        self.judge("It leaves something behind", usual, changed, wanted)
        for number, (moment, fault) in enumerate(usual.crash_points, 1):
            why = f"{fault}.\n\nThe process died {moment}"
            self.prove(why, wanted, crash_at(number), *way)
        for step, action in dict.fromkeys((call.step, call.action) for call in usual.calls):
            if not self.definition.steps[step].atomic:
                why = f"{step}.{action} is not idempotent: it was called twice with the same key"
                self.prove(why, wanted, call_twice(step, action=action), *way)

    def fail_each_step(self) -> None:
        """Known failures and unknown outcomes of each step in turn."""
        for entry in self.definition.plan:
            for name in entry:
                ahead = [] if name == entry[0] else [_fall_back(entry[0])]
                why = f"{{done}}.compensate leaves something behind when {name} fails"
                self.prove(why, None, fail_at(name), *ahead)
                if self.definition.steps[name].atomic:
                    continue
                why = (
                    f"{name}.compensate does not undo an act whose answer was lost, and with it "
                    "what act noted in the context. What it needs must be stored before act runs; "
                    "or undo by current_step().act_idempotency_key"
                )
                self.prove(why, None, *_unknown(name), *ahead)
                why = f"{name}.compensate does not bear that act did nothing, as nobody could tell"
                self.prove(why, None, crash_before(name), fail_at(name, skip=1), *ahead)

    def other_ways(self) -> Iterator[tuple[Fault, ...]]:
        """All is compensated; the fallbacks step in; the fallbacks are compensated."""
        plan = self.definition.plan
        yield _unknown(plan[-1][0])
        if doubtful := [entry[0] for entry in plan if len(entry) > 1]:
            yield tuple(f for name in doubtful for f in (crash_after(name), _fall_back(name, 1)))
            yield (*map(_fall_back, doubtful), *_unknown(plan[-1][-1]))

    def prove(self, why: str, wanted: Any, fault: Fault, *others: Fault) -> None:
        run, changed = self.run(fault, *others)
        if not run.faults[0].fired:
            raise AssertionError(
                f"{fault} never fired: the saga went another way than before, {run}. Let context "
                "be a function that makes all that a run needs anew."
            )
        self.judge(why, run, changed, wanted)

    def judge(self, why: str, run: SagaRun, changed: Any, wanted: Any) -> None:
        right = wanted if run.status is Status.COMPLETED else None
        if run.status is Status.STUCK or changed != right:
            faults = ", ".join(["context", *map(str, run.faults)])
            done = run.acted[-1] if run.acted else "Some step"
            ended = f"It ended {run.status}: {run.stuck_reason}".rstrip(": ")
            raise AssertionError(
                f"{why.replace('{done}', done)}.\n"
                f"{ended}\n"
                f"Changed outside:      {_told(changed)}\n"
                f"Should have changed:  {_told(right)}\n"
                f"What happened:        {run}\n"
                f"See it again with:    saga_runner.run({type(self.saga).__name__}, {faults})"
            )


def _told(change: Any) -> str:
    return "nothing" if change is None else repr(change)


def _unknown(step: str) -> tuple[Fault, ...]:
    return crash_after(step), fail_at(step, skip=1)


def _fall_back(step: str, skip: int = 0) -> Fault:
    # Every Fallback stands in for this, whatever its failure_exceptions.
    return fail_at(step, CircuitOpen("made to fall back"), skip=skip)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hundreds of failures that were asked for are no news."""
    logger = logging.getLogger("django_saga")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
