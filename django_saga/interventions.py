"""What a person may do to a saga's state: pure functions, as those of :mod:`django_saga.machine`.

They hold to its rules: once COMPENSATING never forward again, and what may stand is called undone
only where somebody vouches for it. Nobody drives meanwhile; an attempt that is in flight was lost.
Each but the edit of a context leaves nothing in flight: a driver goes on from there.
"""

from __future__ import annotations

from msgspec.structs import replace

from django_saga import machine
from django_saga.exceptions import SagaError
from django_saga.machine import Action, Effect, Error, Outcome, State, Status, StepRules, Transition

# The error types of what an operator ended; none that a project's own exceptions would have.
CANCELLED = "SagaCancelled"
ABANDONED = "SagaAbandoned"


def cancel(state: State, reason: str, rules: StepRules) -> Transition:
    """Undo what is done, and what the lost attempt may have done; FAILED where there is nothing."""
    lost = replace(state, effects=machine.effects_if_lost(state, rules))
    return _rest(machine.turn_back(lost, Error(CANCELLED, reason)), before=state)


def resume_forward(state: State) -> Transition:
    """A stuck execution that had not turned back begins its step again."""
    _refuse_unless(is_forward(state), "it has turned back, and never goes forward again")
    _refuse_flawed(state)
    return Transition(state=replace(_unstuck(state), attempt=1, failures=0))


def skip(state: State) -> Transition:
    """Go on without the act of its step: somebody vouches that it had no effect, and needs none."""
    _refuse_unless(is_forward(state), "it has turned back; only an act can be skipped")
    _refuse_flawed(state)
    effects = tuple(effect for effect in state.effects if effect.step != state.step)
    return _act_next(state, effects)


def mark_done(state: State, step: str) -> Transition:
    """Somebody did by hand what this step was to do: its act, or else its compensation."""
    if is_forward(state):
        _refuse_unless(step == state.step, f"it stands at {state.step}, not at {step}")
        _refuse_flawed(state)
        return _act_next(state, machine.with_effect(state.effects, step, Outcome.DONE))
    stuck = state.status is Status.STUCK
    _refuse_unless(
        step in standing_steps(state) and (stuck or step == state.step),
        f"{step} is not what it has to undo now",
    )
    effects = tuple(
        replace(effect, undo=Outcome.DONE) if effect.step == step else effect
        for effect in state.effects
    )
    marked = replace(state, effects=effects, stuck_reason="")
    if stuck and standing_steps(marked):  # which are not tried before somebody retries
        return Transition(state=replace(marked, stuck_reason=_what_is_left(marked)))
    return _rest(machine.become(machine.undone_next(marked), before=state), before=state)


def edit_context(state: State, context: str, delay: float) -> Transition:
    """Put another context in the place of the stored one; what waits goes on waiting."""
    return Transition(state=replace(state, context=context), delay=delay)


def abandon(state: State, reason: str, rules: StepRules) -> Transition:
    """End it as STUCK with nothing more undone; what stands remains to be seen."""
    return machine.stick(
        replace(state, error=state.error or Error(ABANDONED, reason)), reason, rules
    )


def standing_steps(state: State) -> tuple[str, ...]:
    """The steps whose effects stand, or may stand."""
    return tuple(effect.step for effect in machine.standing(state))


def is_forward(state: State) -> bool:
    """Whether it is before or in an act, or got stuck there: it has not turned back."""
    forward = state.status in (Status.PENDING, Status.RUNNING, Status.STUCK)
    return forward and state.action is Action.ACT


def _act_next(state: State, effects: tuple[Effect, ...]) -> Transition:
    on = machine.act_next(replace(_unstuck(state), effects=effects))
    after = _rest(machine.become(on, before=state), before=state)
    began = ("saga_started",) if state.status is Status.PENDING else ()
    return replace(after, events=(*began, *after.events))


def _unstuck(state: State) -> State:
    return replace(
        state,
        status=Status.RUNNING,
        in_flight=False,
        recoveries=0,
        failed_step="",
        error=None,
        stuck_reason="",
    )


def _rest(transition: Transition, *, before: State) -> Transition:
    """With nothing in flight; and with the record of the attempt that was lost, if any."""
    return replace(
        transition,
        state=replace(transition.state, in_flight=False),
        record=machine.lost_attempt(before),
    )


def _what_is_left(state: State) -> str:
    """Why it is still stuck: what could not be undone, and what nobody has tried to undo yet."""
    failed = [effect.step for effect in state.effects if effect.undo is Outcome.FAILED]
    untried = [effect.step for effect in state.effects if effect.undo is None]
    reasons = [machine.why_stuck(failed)] if failed else []
    if untried:
        reasons.append(f"Not undone yet: {', '.join(untried)}.")
    return " ".join(reasons)


def _refuse_flawed(state: State) -> None:
    flaw = machine.flaw(replace(state, status=Status.RUNNING))
    _refuse_unless(not flaw, f"its row contradicts itself: {flaw}")


def _refuse_unless(allowed: bool, why: str) -> None:
    if not allowed:
        raise SagaError(f"That cannot be done to it: {why}.")
