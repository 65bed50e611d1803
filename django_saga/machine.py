"""The rules of a saga, once: pure functions from a state and what happened to the next state.

Nothing here knows Django, a clock, a database or a handler. A driver asks what comes next (the
``step`` and ``action`` of a :class:`State`), does it, and hands what it came to as a
:class:`Report` to :func:`settle`; the :class:`Transition` that comes back is what the storage
makes durable, in one checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from django_saga.exceptions import InvalidDefinition


class Status(StrEnum):
    """Where an execution stands."""

    PENDING = "PENDING"  # stored, not begun
    RUNNING = "RUNNING"  # going forward
    COMPENSATING = "COMPENSATING"  # undoing; never forward again
    COMPLETED = "COMPLETED"  # every step done
    FAILED = "FAILED"  # a step failed, and all that was done is undone
    STUCK = "STUCK"  # a person must look


ACTIVE = frozenset({Status.PENDING, Status.RUNNING, Status.COMPENSATING})


class Action(StrEnum):
    """What is called on a step handler."""

    ACT = "act"
    COMPENSATE = "compensate"


class Outcome(StrEnum):
    """What is known of an attempt."""

    DONE = "DONE"
    FAILED = "FAILED"  # known to have had no effect
    UNKNOWN = "UNKNOWN"  # timed out, or an error that leaves its effect open
    INTERRUPTED = "INTERRUPTED"  # lost with its driver; its effect is open too


class Retry(Struct, frozen=True, kw_only=True):
    """How often an action is attempted, and how long to wait between.

    ``attempts`` counts the first call too. The n-th wait is ``delay * backoff ** (n - 1)`` seconds,
    at most ``max_delay``.
    """

    attempts: int = 3
    delay: float = 1.0
    backoff: float = 2.0
    max_delay: float = 3600.0

    def __post_init__(self) -> None:
        numbers = (self.attempts, self.delay, self.backoff, self.max_delay)
        if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
            raise InvalidDefinition(f"{self!r}: every value must be a number.")
        if not isinstance(self.attempts, int) or self.attempts < 1:
            raise InvalidDefinition(f"{self!r}: attempts must be a whole number from 1 up.")
        if not (self.delay >= 0 and self.backoff >= 1 and 0 <= self.max_delay <= 366 * 86400):
            raise InvalidDefinition(
                f"{self!r}: delay must be 0 or more, backoff 1 or more, max_delay at most a year."
            )

    def delay_after(self, failures: int) -> float:
        """Seconds to wait after the given number of failures (from 1 up)."""
        if not self.delay:
            return 0.0  # however large its factor
        try:
            return min(self.delay * self.backoff ** (failures - 1), self.max_delay)
        except OverflowError:
            return self.max_delay


ONCE = Retry(attempts=1)


class StepRules(Struct, frozen=True, kw_only=True):
    """What a step's definition says to the machine."""

    retry: Retry = ONCE
    compensation_retry: Retry = Retry()
    atomic: bool = False


class Error(Struct, frozen=True, gc=False):
    """An error as it is stored."""

    type: str
    message: str
    traceback: str = ""
    frame: str = ""  # the top one of the project's own code


class Effect(Struct, frozen=True, array_like=True, gc=False):
    """An act that has, or may have, an effect, in the order in which acts began."""

    step: str
    act: Outcome  # DONE or UNKNOWN
    undo: Outcome | None = None  # DONE: undone; FAILED: could not be undone, it stands


Plan = tuple[tuple[str, ...], ...]  # each entry: (step,) or (step, its fallback)


class State(Struct, frozen=True, kw_only=True, gc=False):
    """All that decides how an execution goes on; every field is stored on its row."""

    status: Status
    plan: Plan
    context: str  # JSON
    step: str = ""  # the step that is in flight or next; empty when completed or failed
    action: Action = Action.ACT
    attempt: int = 1  # the number of the attempt that is in flight or next
    failures: int = 0  # attempts of this action that used up the retry budget
    in_flight: bool = False  # the attempt may have begun
    atomic: bool = False  # in the transaction of its checkpoint, which is lost with its driver
    effects: tuple[Effect, ...] = ()
    recoveries: int = 0  # takeovers since the last attempt that came to an end
    fallback_context: str | None = None  # what Fallback restores, once its step changed the context
    failed_step: str = ""
    error: Error | None = None  # why the saga turned back or got stuck
    stuck_reason: str = ""

    @property
    def active(self) -> bool:
        """Whether something is left to do."""
        return self.status in ACTIVE


class Record(Struct, frozen=True, kw_only=True, gc=False):
    """One finished attempt: a row of the history."""

    step: str
    action: Action
    attempt: int
    outcome: Outcome
    error: Error | None = None


class Report(Struct, frozen=True, kw_only=True, gc=False):
    """What an attempt came to, as its driver saw it."""

    outcome: Outcome
    context: str  # JSON, as the handler left it
    error: Error | None = None  # with an act that is DONE: what it left cannot be stored
    retry_after: float | None = None  # seconds; the handler asked to be called again
    abort: bool = False  # the handler asked for compensation at once
    falls_back: bool = True  # the error is one that the step's Fallback stands in for


class Transition(Struct, frozen=True, kw_only=True, gc=False):
    """A change of state, to be made durable in one checkpoint and then announced."""

    state: State
    record: Record | None = None
    delay: float = 0.0  # seconds before the next attempt may begin
    events: tuple[str, ...] = ()  # names of signals, in order


def start(plan: Plan, context: str, *, pending: bool = False) -> State:
    """The first state: the first step already in flight, or waiting for a driver."""
    return State(
        status=Status.PENDING if pending else Status.RUNNING,
        plan=plan,
        context=context,
        step=plan[0][0],
        in_flight=not pending,
    )


def begin(state: State) -> Transition:
    """Put the next attempt in flight, after a wait or a handover."""
    if state.status is Status.PENDING:
        running = replace(state, status=Status.RUNNING, in_flight=True)
        return Transition(state=running, events=("saga_started",))
    return Transition(state=replace(state, in_flight=True))


def interrupt(state: State, rules: StepRules, max_recoveries: int) -> Transition:
    """The driver of the attempt in flight was lost: run it again, unless that keeps happening."""
    lost = replace(state, effects=effects_if_lost(state, rules), recoveries=state.recoveries + 1)
    if lost.recoveries > max_recoveries:
        reason = (
            f"The driver was lost {lost.recoveries} times in a row while {state.step} was in "
            f"{state.action}, as attempt {state.attempt} the last time."
        )
        return stick(lost, reason, rules)
    return Transition(
        state=replace(lost, attempt=state.attempt + 1),
        record=_record(state, Outcome.INTERRUPTED),
        events=("saga_recovered",),
    )


def settle(state: State, report: Report, rules: StepRules) -> Transition:
    """An attempt came to an end."""
    if rules.atomic and report.outcome is Outcome.UNKNOWN:
        # Its writes were rolled back with the transaction that should have recorded them.
        report = replace(report, outcome=Outcome.FAILED)
    if state.action is Action.ACT:
        return _settle_act(state, report, rules)
    return _settle_compensate(state, report, rules)


def turn_back(state: State, error: Error) -> Transition:
    """The consumer of a transaction raised between two steps: compensate what is done."""
    return become(compensate_next(replace(state, error=error)), before=state)


def stick(state: State, reason: str, rules: StepRules | None = None) -> Transition:
    """The execution cannot go on: keep what is known, and wait for a person.

    ``rules`` are None where the step's definition is lost; its attempt then counts as unknown.
    """
    record = lost_attempt(state)
    stuck = replace(
        state,
        status=Status.STUCK,
        in_flight=False,
        effects=effects_if_lost(state, rules),
        stuck_reason=reason,
        failed_step=state.failed_step or state.step,
        error=state.error or Error("SagaStuck", reason),
    )
    return Transition(state=stuck, record=record, events=("saga_stuck",))


def compensate_again(state: State, delay: float = 0.0) -> Transition:
    """An operator retries a stuck execution: undo all that is not undone yet, in some seconds."""
    effects = tuple(
        replace(effect, undo=None) if effect.undo is Outcome.FAILED else effect
        for effect in state.effects
    )
    again = replace(state, effects=effects, stuck_reason="", recoveries=0)
    transition = become(replace(compensate_next(again), in_flight=False), before=state)
    return replace(transition, delay=delay)


def standing(state: State) -> tuple[Effect, ...]:
    """The effects that stand, or may stand, now."""
    return tuple(effect for effect in state.effects if effect.undo is not Outcome.DONE)


def needed_steps(state: State) -> tuple[str, ...]:
    """The names of the steps whose handlers may still be called."""
    undo = tuple(effect.step for effect in state.effects if effect.undo is None)
    if state.status is Status.COMPENSATING:
        return undo
    here, *ahead = state.plan[_position(state) :]
    here = here[here.index(state.step) :]  # a step is over once its fallback acts
    return undo + tuple(name for entry in (here, *ahead) for name in entry)


def flaw(state: State) -> str:
    """What contradicts itself in an active state; empty for each that came about by these rules."""
    names = [name for entry in state.plan for name in entry]
    if not names or not all(1 <= len(entry) <= 2 for entry in state.plan):
        return "its plan is no list of steps"
    acted = [effect.step for effect in state.effects]
    if len({*names}) < len(names) or len({*acted}) < len(acted):
        return "a step is named twice"
    undo = [effect.step for effect in state.effects if effect.undo is None]
    if state.action is Action.COMPENSATE:
        if state.step not in undo:
            return f"it is to compensate {state.step!r}, which has done nothing"
        if state.status is not Status.COMPENSATING and state.step not in names:
            return f"it is to go on after {state.step!r}, which its plan does not name"
    elif state.status is Status.COMPENSATING or state.step not in names:
        return f"it is to act in {state.step!r}, which does not come next"
    elif any(effect.undo and effect.step == state.step for effect in state.effects):
        return f"it is to act in {state.step!r}, which is undone"
    if max(state.attempt, state.failures, state.recoveries) > _MOST:
        return "it has been attempted more often than can be counted"
    return ""


_MOST = 2**31 - 1000  # a column's limit, and room for what is still to come


# An act has ended


def _settle_act(state: State, report: Report, rules: StepRules) -> Transition:
    record = _record(state, report.outcome, report.error)
    after = replace(state, context=report.context, recoveries=0, in_flight=False)
    if report.outcome is Outcome.DONE:
        done = replace(after, effects=with_effect(state.effects, state.step, Outcome.DONE))
        if report.error is None:
            return become(act_next(done), before=state, record=record)
        failed = replace(done, failed_step=state.step, error=report.error)
        return become(compensate_next(failed), before=state, record=record)

    if report.outcome is Outcome.UNKNOWN:
        effects = with_effect(state.effects, state.step, Outcome.UNKNOWN)
        after = replace(after, effects=effects)
    fallback = _fallback(state)
    if fallback and state.fallback_context is None:
        after = replace(after, fallback_context=state.context)

    retry = _retry(after, report, rules.retry, record)
    if retry is not None:
        return retry
    if fallback and report.falls_back and not report.abort:
        return become(_fall_back(after, fallback), before=state, record=record)
    failed = replace(after, failed_step=state.step, error=report.error)
    return become(compensate_next(failed), before=state, record=record)


def act_next(state: State) -> State:
    """Go on with the step after this one; with none left, the saga is completed."""
    following = state.plan[_position(state) + 1 :]
    fresh = replace(state, attempt=1, failures=0, fallback_context=None)
    if not following:
        return replace(fresh, status=Status.COMPLETED, step="", attempt=0)
    return replace(fresh, step=following[0][0], in_flight=True)


def _fall_back(state: State, fallback: str) -> State:
    """Go on with the fallback, once what the step may have done is undone."""
    fresh = replace(state, attempt=1, failures=0, in_flight=True)
    if any(e.step == state.step and e.undo is None for e in state.effects):
        return replace(fresh, action=Action.COMPENSATE)
    context = state.context if state.fallback_context is None else state.fallback_context
    return replace(fresh, step=fallback, action=Action.ACT, context=context, fallback_context=None)


# A compensation has ended


def _settle_compensate(state: State, report: Report, rules: StepRules) -> Transition:
    record = _record(state, report.outcome, report.error)
    after = replace(state, context=report.context, recoveries=0)
    if report.outcome is not Outcome.DONE:
        retry = _retry(after, report, rules.compensation_retry, record)
        if retry is not None:
            return retry

    undone = Outcome.DONE if report.outcome is Outcome.DONE else Outcome.FAILED
    effects = tuple(
        replace(effect, undo=undone) if effect.step == state.step else effect
        for effect in state.effects
    )
    after = replace(after, effects=effects)
    if undone is Outcome.DONE:
        return become(undone_next(after), before=state, record=record)
    if state.status is Status.RUNNING:
        after = replace(after, failed_step=state.step, error=report.error)
    return become(compensate_next(after), before=state, record=record)


def undone_next(state: State) -> State:
    """What follows on an effect that is undone: what else is to be undone, or a fallback."""
    fallback = _fallback(state)
    if state.status is Status.RUNNING and fallback:
        return _fall_back(state, fallback)
    return compensate_next(state)


def compensate_next(state: State) -> State:
    """Undo the latest effect that is not undone; with none left, the saga has ended."""
    back = replace(state, action=Action.COMPENSATE, attempt=1, failures=0, fallback_context=None)
    for effect in reversed(state.effects):
        if effect.undo is None:
            return replace(back, status=Status.COMPENSATING, step=effect.step, in_flight=True)
    stands = [effect.step for effect in state.effects if effect.undo is Outcome.FAILED]
    if stands:
        return replace(
            back,
            status=Status.STUCK,
            step=stands[-1],
            in_flight=False,
            stuck_reason=why_stuck(stands),
        )
    return replace(back, status=Status.FAILED, step="", attempt=0, in_flight=False)


def why_stuck(stands: Sequence[str]) -> str:
    """The reason where the compensations of these steps failed."""
    names = ", ".join(stands)
    return f"The compensation of {names} failed; what {names} did may still stand."


# What both share


def _retry(state: State, report: Report, policy: Retry, record: Record) -> Transition | None:
    """The same action once more, or None when its budget is used up."""
    failures = state.failures if report.retry_after is not None else state.failures + 1
    if report.abort or failures >= policy.attempts:
        return None
    delay = policy.delay_after(failures) if report.retry_after is None else report.retry_after
    again = replace(state, attempt=state.attempt + 1, failures=failures, in_flight=delay == 0)
    return Transition(state=again, record=record, delay=delay, events=("step_failed",))


def lost_attempt(state: State) -> Record | None:
    """What the history says of an attempt that was in flight when its driver was lost."""
    return _record(state, Outcome.INTERRUPTED) if state.in_flight else None


def _record(state: State, outcome: Outcome, error: Error | None = None) -> Record:
    return Record(
        step=state.step,
        action=state.action,
        attempt=state.attempt,
        outcome=outcome,
        error=error,
    )


def with_effect(effects: tuple[Effect, ...], step: str, act: Outcome) -> tuple[Effect, ...]:
    """The effects, and that of this act as one of them."""
    if any(effect.step == step for effect in effects):
        return tuple(replace(e, act=act) if e.step == step else e for e in effects)
    return (*effects, Effect(step, act))


def effects_if_lost(state: State, rules: StepRules | None) -> tuple[Effect, ...]:
    """An act that was in flight when its driver was lost may have had an effect, unless atomic."""
    if state.action is not Action.ACT or not state.in_flight or (rules and rules.atomic):
        return state.effects
    return with_effect(state.effects, state.step, Outcome.UNKNOWN)


def _position(state: State) -> int:
    for position, entry in enumerate(state.plan):
        if state.step in entry:
            return position
    raise ValueError(f"{state.step!r} is not in the plan")


def _fallback(state: State) -> str | None:
    """The fallback of the step in flight, if the plan has one."""
    for entry in state.plan:
        if entry[0] == state.step and len(entry) > 1:
            return entry[1]
    return None


def become(state: State, *, before: State, record: Record | None = None) -> Transition:
    """The transition to this state, with the events that such a change means."""
    events: list[str] = []
    if record is not None:
        done = "step_completed" if record.action is Action.ACT else "step_compensated"
        events.append(done if record.outcome is Outcome.DONE else "step_failed")
    turned = state.status in (Status.COMPENSATING, Status.FAILED, Status.STUCK)
    if turned and before.status not in (Status.COMPENSATING, Status.STUCK):
        events.append("saga_compensating")
    if state.status in _ENDS:
        events.append(_ENDS[state.status])
    return Transition(state=state, record=record, events=tuple(events))


_ENDS = {
    Status.COMPLETED: "saga_completed",
    Status.FAILED: "saga_failed",
    Status.STUCK: "saga_stuck",
}
