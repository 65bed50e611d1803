"""Random sagas, driven through random outcomes and losses, judged by a ledger of their own.

The ledger knows what the world looks like (which step's effect stands) from what the simulated
handlers did, and nothing of the machine's state.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from django_saga import Retry, machine
from django_saga.machine import (
    Action,
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
MAX_RECOVERIES = 3

# What may become of an attempt. "lost": its driver dies. "!" after it: the effect is there.
FATES = (
    "done",
    "done, not storable",
    "failed",
    "failed for good",
    "abort",
    "later",
    "unknown",
    "unknown!",
    "lost",
    "lost!",
)
FINAL_EVENTS = {"saga_completed", "saga_failed", "saga_stuck"}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = iter("ABCDEFGHIJ")
    pairs = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    return tuple((next(names), next(names)) if pair else (next(names),) for pair in pairs)


rules = st.builds(
    StepRules,
    retry=st.builds(Retry, attempts=st.integers(1, 3), delay=st.sampled_from([0.0, 1.0])),
    compensation_retry=st.builds(
        Retry, attempts=st.integers(1, 3), delay=st.sampled_from([0.0, 1.0])
    ),
    atomic=st.booleans(),
)


@dataclass
class World:
    """A driver and its surroundings: the ledger, and notes of every call."""

    rules: dict[str, StepRules]
    state: State
    stands: set[str] = field(default_factory=set)
    calls: list[tuple[str, str, Status]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    spent: Counter[tuple[str, str]] = field(default_factory=Counter)
    ever: set[str] = field(default_factory=set)  # steps that had, or may have had, an effect
    contexts: dict[str, str] = field(default_factory=dict)  # of a step's first attempt
    number: int = 0

    def become(self, transition: Transition) -> None:
        self.state = transition.state
        self.events += transition.events
        if transition.record is not None:
            self.records.append(transition.record)

    def attempt(self, fate: str) -> None:
        state, step = self.state, self.state.step
        assert state.in_flight
        assert step in machine.needed_steps(state), "what is called was said to be needed"
        assert machine.flaw(state) == "", "what comes about by the rules does not contradict itself"
        self.calls.append((state.action.value, step, state.status))
        if state.action is Action.ACT:
            self.contexts.setdefault(step, state.context)
        rules = self.rules[step]
        if fate.startswith("lost"):
            self.happen(fate, "!" in fate and not rules.atomic)
            self.become(machine.interrupt(state, rules, MAX_RECOVERIES))
            return
        self.number += 1
        context = f"{self.number}"
        done = fate.startswith("done")
        outcome = Outcome.DONE if done else Outcome.FAILED
        if fate.startswith("unknown"):
            outcome = Outcome.UNKNOWN
        self.happen(fate, done or ("!" in fate and not rules.atomic))
        if not done and fate != "later":
            self.spent[state.action.value, step] += 1
        report = Report(
            outcome=outcome,
            context=context,
            error=None if fate == "done" else WHY,
            retry_after=1.0 if fate == "later" else None,
            abort=fate == "abort",
            falls_back=fate != "failed for good",
        )
        self.become(machine.settle(state, report, rules))

    def happen(self, fate: str, takes_effect: bool) -> None:
        step = self.state.step
        if self.state.action is Action.ACT:
            if takes_effect:
                self.stands.add(step)
            if takes_effect or (fate[:4] in ("lost", "unkn") and not self.rules[step].atomic):
                self.ever.add(step)
        elif takes_effect:
            self.stands.discard(step)

    def between_steps(self) -> bool:
        return (
            self.state.status is Status.RUNNING
            and bool(self.records)
            and self.records[-1].outcome is Outcome.DONE
            and self.records[-1].action is Action.ACT
        )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A saga that was driven to its end; hypothesis draws each attempt's fate."""
    plan = draw(plans())
    names = [name for entry in plan for name in entry]
    state = machine.start(plan, "0", pending=draw(st.booleans()))
    world = World({name: draw(rules) for name in names}, state)
    fates = draw(st.lists(st.sampled_from(("done",) * 6 + FATES), max_size=25))
    consumer = draw(st.integers(0, 40))
    for fate in [*fates, *["done"] * 40]:
        if not world.state.active:
            return world
        if not world.state.in_flight:
            world.become(machine.begin(world.state))
        if world.between_steps() and len(world.records) >= consumer:
            consumer = 1000
            world.become(machine.turn_back(world.state, WHY))
            continue
        world.attempt(fate)
    assert not world.state.active, "a saga whose every attempt is done comes to an end"
    return world


thorough = settings(max_examples=250, deadline=None, database=None)


@thorough
@given(worlds())
def test_the_final_status_says_what_stands_in_the_world(world: World) -> None:
    state = world.state
    said = {effect.step for effect in machine.standing(state)}
    assert world.stands <= said, "nothing stands that the saga does not know of"
    if state.status is Status.COMPLETED:
        assert said == world.stands
        assert [len(world.stands & set(entry)) for entry in state.plan] == [1] * len(state.plan)
    elif state.status is Status.FAILED:
        assert world.stands == set()
        assert said == set()
    else:
        assert state.status is Status.STUCK
        assert state.stuck_reason
        for effect in state.effects:
            if effect.undo is Outcome.FAILED and state.recoveries <= MAX_RECOVERIES:
                assert effect.step in state.stuck_reason
    assert said <= world.ever, "nobody is told of effects that cannot be"


@thorough
@given(worlds())
def test_compensations_come_in_the_strict_reverse_order_of_the_acts(world: World) -> None:
    acted = list(dict.fromkeys(step for action, step, _ in world.calls if action == "act"))
    undone = list(
        dict.fromkeys(
            step
            for action, step, status in world.calls
            if action == "compensate" and status is Status.COMPENSATING
        )
    )
    assert undone == sorted(undone, key=acted.index, reverse=True)


@thorough
@given(worlds())
def test_only_what_had_or_may_have_had_an_effect_is_compensated(world: World) -> None:
    compensated = {step for action, step, _ in world.calls if action == "compensate"}
    assert compensated <= world.ever
    if world.state.status is Status.FAILED:
        assert compensated == world.ever


@thorough
@given(worlds())
def test_once_compensating_no_act_is_called_again(world: World) -> None:
    turned = False
    for action, _, status in world.calls:
        turned = turned or status is Status.COMPENSATING
        assert not (turned and action == "act")


@thorough
@given(worlds())
def test_what_is_undone_is_never_done_or_undone_again(world: World) -> None:
    over: set[str] = set()
    for record in world.records:
        assert record.step not in over
        if record.action is Action.COMPENSATE and record.outcome is Outcome.DONE:
            over.add(record.step)


@thorough
@given(worlds())
def test_every_attempt_is_recorded_and_their_numbers_have_no_gap(world: World) -> None:
    assert [(r.action.value, r.step) for r in world.records] == [c[:2] for c in world.calls]
    numbers: Counter[tuple[str, str]] = Counter()
    for record in world.records:
        numbers[record.action, record.step] += 1
        assert record.attempt == numbers[record.action, record.step]


@thorough
@given(worlds())
def test_no_action_has_more_failures_than_its_budget(world: World) -> None:
    for (action, step), spent in world.spent.items():
        rules = world.rules[step]
        retry = rules.retry if action == "act" else rules.compensation_retry
        assert spent <= retry.attempts


@thorough
@given(worlds())
def test_a_fallback_begins_with_the_context_that_its_step_began_with(world: World) -> None:
    for entry in world.state.plan:
        if entry[-1] in world.contexts:
            assert world.contexts[entry[-1]] == world.contexts[entry[0]]


@thorough
@given(worlds())
def test_there_is_one_final_signal_and_at_most_one_turn(world: World) -> None:
    assert [name for name in world.events if name in FINAL_EVENTS] == world.events[-1:]
    assert world.events.count("saga_compensating") <= 1
    assert world.events.count("saga_started") <= 1
    if world.state.status is Status.COMPLETED:
        assert "saga_compensating" not in world.events


@thorough
@given(worlds(), st.data())
def test_operators_retries_undo_what_stands_and_end_a_stuck_saga(
    world: World, data: st.DataObject
) -> None:
    tries = 0
    while world.state.status is Status.STUCK:
        tries += 1
        before = set(world.stands)
        world.become(machine.compensate_again(world.state))
        fate = st.sampled_from(FATES if tries < 4 else ("done",))
        while world.state.active:
            if not world.state.in_flight:
                world.become(machine.begin(world.state))
            assert world.state.action is Action.COMPENSATE
            world.attempt(data.draw(fate))
        assert world.stands <= before
    if tries:
        assert world.state.status is Status.FAILED
        assert world.stands == set()
        assert machine.standing(world.state) == ()
