"""What a person may do to a saga's state, in every state that there can be.

All states are walked through that a saga of two steps can come to: by the machine's own rules, by a
loss at any moment, and by what operators do, in any order. A ledger knows what stands in the world.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from django_saga import Retry, SagaError, interventions, machine
from django_saga.machine import (
    Action,
    Effect,
    Error,
    Outcome,
    Plan,
    Record,
    Report,
    State,
    Status,
    StepRules,
    Transition,
)

WHY = Error("RuntimeError", "why")
TWICE = Retry(attempts=2, delay=0)
PLANS: list[Plan] = [(("A",), ("B",)), (("A", "F"),), (("A",), ("B", "F"))]
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class World:
    """A saga's state, and what is true of it that the state may not know."""

    state: State
    stands: frozenset[str] = frozenset()
    turned: bool = False
    skipped: frozenset[str] = frozenset()

    def become(self, transition: Transition, **changes: object) -> World:
        state = transition.state
        turned = self.turned or "saga_compensating" in transition.events
        turned = turned or state.status in (Status.COMPENSATING, Status.FAILED)
        kept = replace(state, context="", error=WHY if state.error else None)
        values = {"stands": self.stands, "skipped": self.skipped, **changes}
        return World(kept, turned=turned, **values)  # type: ignore[arg-type]

    def happened(self, effect: bool) -> frozenset[str]:
        """What stands, if the attempt in flight had its effect."""
        here = frozenset({self.state.step})
        if not effect:
            return self.stands
        return self.stands | here if self.state.action is Action.ACT else self.stands - here


def rules_of(atomic: bool) -> StepRules:
    return StepRules(retry=TWICE, compensation_retry=TWICE, atomic=atomic)


def driven(world: World, atomic: bool) -> Iterator[World]:
    """What may come next where no operator meddles."""
    state, rules = world.state, rules_of(atomic)
    if not state.active:
        return
    if state.attempt < MOST_ATTEMPTS and not state.in_flight:
        begun = machine.begin(state)
        yield world.become(replace(begun, state=replace(begun.state, atomic=atomic)))
    if state.in_flight and state.attempt < MOST_ATTEMPTS:
        for outcome in (Outcome.DONE, Outcome.FAILED, Outcome.UNKNOWN):
            error = None if outcome is Outcome.DONE else WHY
            settled = machine.settle(state, Report(outcome=outcome, context="", error=error), rules)
            noted = replace(settled, state=replace(settled.state, atomic=atomic))
            for effect in effects_of(outcome, atomic):
                yield world.become(noted, stands=world.happened(effect))
        for effect in effects_of(Outcome.UNKNOWN, atomic):
            yield world.become(machine.interrupt(state, rules, 1), stands=world.happened(effect))
    for effect in lost(world):
        yield world.become(machine.stick(state, "lost code", None), stands=world.happened(effect))


def effects_of(outcome: Outcome, atomic: bool) -> tuple[bool, ...]:
    if outcome is Outcome.UNKNOWN and not atomic:
        return (False, True)
    return (outcome is Outcome.DONE,)


def lost(world: World) -> tuple[bool, ...]:
    """Whether what was in flight had an effect: unknown, but for what its transaction held."""
    return (False, True) if world.state.in_flight and not world.state.atomic else (False,)


@dataclass(frozen=True)
class Deed:
    """An operator's verb, the state it was done to, and what came of it."""

    verb: str
    step: str
    before: World
    transition: Transition
    after: World


def deeds(world: World) -> Iterator[Deed]:
    """All that an operator can do; whatever else than a refusal is raised fails the test."""
    state, rules = world.state, StepRules(atomic=world.state.atomic)
    names = [name for entry in state.plan for name in entry]
    verbs: list[tuple[str, str, Callable[[], Transition]]] = []
    if state.active:
        verbs.append(("abandon", "", lambda: interventions.abandon(state, "why", rules)))
    if state.status in (Status.PENDING, Status.RUNNING):
        verbs.append(("cancel", "", lambda: interventions.cancel(state, "why", rules)))
    if state.active or state.status is Status.STUCK:
        verbs.append(("edit", "", lambda: interventions.edit_context(state, "{}", 0.0)))
        verbs.append(("skip", "", lambda: interventions.skip(state)))
        verbs += [("mark", n, lambda n=n: interventions.mark_done(state, n)) for n in names]
    if state.status is Status.STUCK:
        verbs.append(("forward", "", lambda: interventions.resume_forward(state)))
        verbs.append(("again", "", lambda: machine.compensate_again(state)))
    for verb, step, do in verbs:
        try:
            transition = do()
        except SagaError:
            continue
        for effect in lost(world):
            stands, skipped = world.happened(effect), world.skipped
            if verb == "skip":
                if state.step in stands:
                    continue  # nobody could vouch for it
                skipped |= {state.step}
            if verb == "mark":
                forward = state.action is Action.ACT
                stands = stands | {step} if forward else stands - {step}
            if verb == "edit" and effect:
                continue  # it is in flight still
            after = world.become(transition, stands=stands, skipped=skipped)
            yield Deed(verb, step, world, transition, after)


def everything(plan: Plan, atomic: bool) -> tuple[set[World], list[Deed]]:
    first = machine.start(plan, "")
    begin = World(replace(first, atomic=atomic)), World(machine.start(plan, "", pending=True))
    seen, done, left = set(begin), [], deque(begin)
    while left:
        world = left.popleft()
        meddled = list(deeds(world))
        done += meddled
        for after in (*driven(world, atomic), *(deed.after for deed in meddled)):
            if after not in seen:
                seen.add(after)
                left.append(after)
    return seen, done


@pytest.fixture(scope="module", params=[(p, a) for p in PLANS for a in (False, True)], ids=str)
def all_there_is(request: pytest.FixtureRequest) -> tuple[set[World], list[Deed]]:
    worlds, done = everything(*request.param)
    assert len(worlds) > 200
    assert {d.verb for d in done} == {
        *("abandon", "cancel", "edit", "skip", "mark", "forward", "again")
    }
    return worlds, done


def test_once_turned_back_nothing_goes_forward(
    all_there_is: tuple[set[World], list[Deed]],
) -> None:
    for world in all_there_is[0]:
        if world.turned:
            assert world.state.status in (Status.COMPENSATING, Status.FAILED, Status.STUCK)
            assert world.state.action is Action.COMPENSATE, world


def test_what_may_stand_stays_named(all_there_is: tuple[set[World], list[Deed]]) -> None:
    for world in all_there_is[0]:
        named = set(interventions.standing_steps(world.state))
        if world.state.in_flight and world.state.action is Action.ACT:
            named.add(world.state.step)
        assert world.stands <= named, world


def test_what_ended_as_failed_left_nothing(all_there_is: tuple[set[World], list[Deed]]) -> None:
    for world in all_there_is[0]:
        if world.state.status is Status.FAILED:
            assert not world.stands, world
            assert world.state.stuck_reason == ""


def test_what_is_completed_is_done_or_was_skipped(
    all_there_is: tuple[set[World], list[Deed]],
) -> None:
    for world in all_there_is[0]:
        if world.state.status is Status.COMPLETED:
            for entry in world.state.plan:
                assert {*entry} & (world.stands | world.skipped), world


def test_no_row_contradicts_itself(all_there_is: tuple[set[World], list[Deed]]) -> None:
    for world in all_there_is[0]:
        if world.state.active:
            assert machine.flaw(world.state) == "", world
            assert world.state.stuck_reason == ""
            if world.state.status is Status.RUNNING and world.state.action is Action.COMPENSATE:
                assert machine._fallback(world.state), world


def test_nothing_is_in_flight_when_an_operator_is_done(
    all_there_is: tuple[set[World], list[Deed]],
) -> None:
    for deed in all_there_is[1]:
        in_flight = deed.before.state.in_flight if deed.verb == "edit" else False
        assert deed.transition.state.in_flight is in_flight, deed


def test_the_attempt_that_was_lost_is_recorded(
    all_there_is: tuple[set[World], list[Deed]],
) -> None:
    for deed in all_there_is[1]:
        state = deed.before.state
        record = None
        if state.in_flight and deed.verb != "edit":
            record = Record(
                step=state.step,
                action=state.action,
                attempt=state.attempt,
                outcome=Outcome.INTERRUPTED,
            )
        assert deed.transition.record == record, deed


def test_an_edit_of_the_context_changes_nothing_else(
    all_there_is: tuple[set[World], list[Deed]],
) -> None:
    for deed in all_there_is[1]:
        if deed.verb == "edit":
            assert deed.transition.state == replace(deed.before.state, context="{}")


def test_what_is_abandoned_is_stuck_and_undoes_nothing(
    all_there_is: tuple[set[World], list[Deed]],
) -> None:
    for deed in all_there_is[1]:
        if deed.verb == "abandon":
            after = deed.transition.state
            assert after.status is Status.STUCK
            undone = [e.step for e in deed.before.state.effects if e.undo is Outcome.DONE]
            assert [e.step for e in after.effects if e.undo is Outcome.DONE] == undone


def test_each_end_is_told_once(all_there_is: tuple[set[World], list[Deed]]) -> None:
    ends = {
        Status.COMPLETED: "saga_completed",
        Status.FAILED: "saga_failed",
        Status.STUCK: "saga_stuck",
    }
    for deed in all_there_is[1]:
        before, after = deed.before.state, deed.transition.state
        told = [event for event in deed.transition.events if event in ends.values()]
        stays = before.status is after.status is Status.STUCK
        assert told == ([ends[after.status]] if after.status in ends and not stays else []), deed


def test_a_stuck_one_says_what_is_left(all_there_is: tuple[set[World], list[Deed]]) -> None:
    for deed in all_there_is[1]:
        after = deed.transition.state
        if deed.verb == "mark" and after.status is Status.STUCK:
            for step in interventions.standing_steps(after):
                assert step in after.stuck_reason, deed
            assert deed.step not in after.stuck_reason, deed


# What the walk above does not say


def running(*effects: Effect, **values: object) -> State:
    state = machine.start((("A", "F"), ("B",)), "{}")
    return replace(state, effects=effects, in_flight=False, **values)  # type: ignore[arg-type]


def test_undone_by_hand_the_fallback_comes_next() -> None:
    """Not the end of the saga: it stands before its fallback, not behind a failure."""
    undoing = running(
        Effect("A", Outcome.UNKNOWN),
        action=Action.COMPENSATE,
        context='{"n": 2}',
        fallback_context='{"n": 1}',
    )
    after = interventions.mark_done(undoing, "A").state
    assert (after.status, after.step, after.action) == (Status.RUNNING, "F", Action.ACT)
    assert after.context == '{"n": 1}'
    assert after.effects == (Effect("A", Outcome.UNKNOWN, Outcome.DONE),)


def test_what_was_never_tried_is_not_said_to_have_failed() -> None:
    state = machine.start((("A",), ("B",), ("C",)), "{}")
    effects = (Effect("A", Outcome.DONE), Effect("B", Outcome.DONE), Effect("C", Outcome.DONE))
    turned = replace(state, effects=effects, status=Status.COMPENSATING, step="C")
    stuck = machine.stick(replace(turned, action=Action.COMPENSATE), "The code is lost.").state
    after = interventions.mark_done(stuck, "C").state
    assert after.stuck_reason == "Not undone yet: A, B."
    failed = replace(stuck, effects=(Effect("A", Outcome.DONE, Outcome.FAILED), *effects[1:]))
    after = interventions.mark_done(failed, "C").state
    assert after.stuck_reason.startswith("The compensation of A failed; ")
    assert after.stuck_reason.endswith("Not undone yet: B.")


@pytest.mark.parametrize("step", ["B", "F", "nowhere", ""])
def test_only_the_step_at_which_it_stands_is_marked_forward(step: str) -> None:
    with pytest.raises(SagaError, match=f"it stands at A, not at {step}"):
        interventions.mark_done(running(), step)


def test_only_what_stands_is_marked_undone() -> None:
    effects = (Effect("A", Outcome.DONE), Effect("B", Outcome.DONE, Outcome.FAILED))
    back = running(*effects, status=Status.COMPENSATING, action=Action.COMPENSATE, step="A")
    for step in ("B", "F"):
        with pytest.raises(SagaError, match=f"{step} is not what it has to undo now"):
            interventions.mark_done(back, step)


@pytest.mark.parametrize(
    "do",
    [
        interventions.resume_forward,
        interventions.skip,
        lambda state: interventions.mark_done(state, state.step),
    ],
)
@pytest.mark.parametrize("step", ["renamed", ""])
def test_a_row_that_contradicts_itself_is_refused(
    do: Callable[[State], Transition], step: str
) -> None:
    edited = machine.stick(running(step=step), "Its row contradicts itself").state
    with pytest.raises(SagaError, match="contradicts itself"):
        do(edited)


def test_what_has_not_begun_is_told_to_have_started_when_a_step_is_skipped() -> None:
    pending = machine.start((("A",),), "{}", pending=True)
    assert interventions.skip(pending).events == ("saga_started", "saga_completed")
    assert interventions.skip(replace(pending, status=Status.RUNNING)).events == ("saga_completed",)


def test_a_skipped_step_is_not_compensated_later() -> None:
    unknown = running(Effect("A", Outcome.UNKNOWN))
    after = interventions.skip(unknown).state
    assert (after.step, after.effects) == ("B", ())


def test_a_cancelled_one_keeps_the_reason_as_its_error() -> None:
    after = interventions.cancel(running(), "by Ada: a mistake", StepRules()).state
    assert after.status is Status.FAILED
    assert after.error == Error(interventions.CANCELLED, "by Ada: a mistake")
    assert after.failed_step == ""


def test_one_that_goes_forward_again_has_no_failure_behind_it() -> None:
    stuck = machine.stick(running(failures=1, attempt=2, recoveries=4), "The code is lost.").state
    after = interventions.resume_forward(stuck).state
    assert (after.status, after.attempt, after.failures) == (Status.RUNNING, 1, 0)
    assert (after.error, after.failed_step, after.stuck_reason) == (None, "", "")
    assert after.recoveries == 0
