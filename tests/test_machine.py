"""Each rule of the machine, one transition at a time."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from django_saga import InvalidDefinition, Retry, machine
from django_saga.machine import (
    Effect,
    Error,
    Outcome,
    Plan,
    Report,
    State,
    Status,
    StepRules,
    Transition,
)

ABC: Plan = (("A",), ("B",), ("C",))
PLAIN = StepRules(compensation_retry=Retry(attempts=1))
ATOMIC = StepRules(atomic=True, compensation_retry=Retry(attempts=1))
THRICE = Retry(attempts=3, delay=1.0, backoff=2.0)
WHY = Error("RuntimeError", "why")

DONE, FAILED, UNKNOWN = Outcome.DONE, Outcome.FAILED, Outcome.UNKNOWN


def report(outcome: Outcome, **more: Any) -> Report:
    error = None if outcome is DONE else WHY
    return Report(**{"outcome": outcome, "context": "{}", "error": error, **more})


def settle(state: State, outcome: Outcome, rules: StepRules = PLAIN, **more: Any) -> Transition:
    return machine.settle(state, report(outcome, **more), rules)


def after(state: State, *outcomes: Outcome, rules: StepRules = PLAIN) -> State:
    for outcome in outcomes:
        state = settle(state, outcome, rules).state
    return state


def place(state: State) -> tuple[str, str, str, int]:
    return state.status.value, state.action.value, state.step, state.attempt


# Forward


def test_a_saga_starts_running_with_its_first_step_in_flight() -> None:
    state = machine.start(ABC, '{"a":1}')
    assert place(state) == ("RUNNING", "act", "A", 1)
    assert (state.in_flight, state.active, state.effects) == (True, True, ())
    assert (state.context, state.plan) == ('{"a":1}', ABC)


def test_a_stored_saga_waits_for_its_driver_and_has_begun_nothing() -> None:
    state = machine.start(ABC, "{}", pending=True)
    assert place(state) == ("PENDING", "act", "A", 1)
    assert not state.in_flight
    begun = machine.begin(state)
    assert place(begun.state) == ("RUNNING", "act", "A", 1)
    assert begun.state.in_flight
    assert begun.events == ("saga_started",)
    assert begun.record is None


def test_begin_after_a_wait_changes_nothing_but_that_the_attempt_is_in_flight() -> None:
    waiting = settle(machine.start(ABC, "{}"), FAILED, StepRules(retry=THRICE)).state
    begun = machine.begin(waiting)
    assert begun.state == replace(waiting, in_flight=True)
    assert begun.events == ()


def test_a_done_step_puts_the_next_in_flight_and_the_last_completes_the_saga() -> None:
    state = machine.start(ABC, "{}")
    first = settle(state, DONE, context='{"a":1}')
    assert place(first.state) == ("RUNNING", "act", "B", 1)
    assert first.state.in_flight
    assert first.state.context == '{"a":1}'
    assert first.events == ("step_completed",)
    assert first.record is not None
    assert (first.record.step, first.record.attempt, first.record.outcome) == ("A", 1, DONE)
    last = settle(after(first.state, DONE), DONE)
    assert place(last.state) == ("COMPLETED", "act", "", 0)
    assert (last.state.active, last.state.in_flight, last.state.error) == (False, False, None)
    assert last.events == ("step_completed", "saga_completed")
    assert [effect.step for effect in machine.standing(last.state)] == ["A", "B", "C"]


# Strict backward recovery


def test_a_failed_step_turns_the_saga_back_in_the_transition_that_records_it() -> None:
    failed = settle(after(machine.start(ABC, "{}"), DONE, DONE), FAILED)
    assert place(failed.state) == ("COMPENSATING", "compensate", "B", 1)
    assert failed.state.in_flight
    assert (failed.state.failed_step, failed.state.error) == ("C", WHY)
    assert failed.record is not None
    assert (failed.record.outcome, failed.record.error) == (FAILED, WHY)
    assert failed.events == ("step_failed", "saga_compensating")


def test_a_step_that_failed_is_not_compensated_and_the_others_are_in_reverse() -> None:
    state = after(machine.start(ABC, "{}"), DONE, DONE, FAILED)
    undone = settle(state, DONE)
    assert place(undone.state) == ("COMPENSATING", "compensate", "A", 1)
    assert undone.events == ("step_compensated",)
    last = settle(undone.state, DONE)
    assert place(last.state) == ("FAILED", "compensate", "", 0)
    assert last.events == ("step_compensated", "saga_failed")
    assert machine.standing(last.state) == ()
    assert (last.state.failed_step, last.state.error) == ("C", WHY)


def test_a_first_step_that_fails_ends_the_saga_at_once() -> None:
    failed = settle(machine.start(ABC, "{}"), FAILED)
    assert place(failed.state) == ("FAILED", "compensate", "", 0)
    assert failed.events == ("step_failed", "saga_compensating", "saga_failed")
    assert failed.state.in_flight is False


def test_a_step_whose_outcome_is_unknown_is_compensated_first() -> None:
    state = after(machine.start(ABC, "{}"), DONE, UNKNOWN)
    assert place(state) == ("COMPENSATING", "compensate", "B", 1)
    assert state.effects == (Effect("A", DONE), Effect("B", UNKNOWN))
    assert place(after(state, DONE)) == ("COMPENSATING", "compensate", "A", 1)


def test_an_unknown_outcome_stays_unknown_when_a_later_attempt_fails_for_certain() -> None:
    rules = StepRules(retry=Retry(attempts=2))
    state = after(machine.start(ABC, "{}"), UNKNOWN, FAILED, rules=rules)
    assert place(state) == ("COMPENSATING", "compensate", "A", 1)
    assert state.effects == (Effect("A", UNKNOWN),)


def test_an_interrupted_outcome_stays_unknown_when_a_later_attempt_fails_for_certain() -> None:
    lost = machine.interrupt(machine.start(ABC, "{}"), PLAIN, 5).state
    assert place(after(lost, FAILED)) == ("COMPENSATING", "compensate", "A", 1)


def test_an_unknown_outcome_becomes_done_when_a_later_attempt_is_and_keeps_its_place() -> None:
    rules = StepRules(retry=Retry(attempts=2))
    state = after(machine.start(ABC, "{}"), UNKNOWN, DONE, rules=rules)
    assert state.effects == (Effect("A", DONE),)
    assert place(state) == ("RUNNING", "act", "B", 1)


def test_an_atomic_step_is_never_unknown() -> None:
    first = machine.start(ABC, "{}")
    failed = settle(first, UNKNOWN, ATOMIC)
    assert failed.state.status is Status.FAILED
    assert failed.state.effects == ()
    assert failed.record is not None
    assert failed.record.outcome is FAILED
    assert machine.interrupt(first, ATOMIC, 5).state.effects == ()
    assert machine.interrupt(first, ATOMIC, 0).state.effects == ()
    assert machine.stick(first, "lost", ATOMIC).state.effects == ()


def test_an_act_whose_context_cannot_be_stored_is_compensated_with_the_rest() -> None:
    error = Error("InvalidContext", "field 'x'")
    state = after(machine.start(ABC, "{}"), DONE)
    turned = settle(state, DONE, error=error)
    assert place(turned.state) == ("COMPENSATING", "compensate", "B", 1)
    assert turned.state.effects == (Effect("A", DONE), Effect("B", DONE))
    assert (turned.state.failed_step, turned.state.error) == ("B", error)
    assert turned.record is not None
    assert (turned.record.outcome, turned.record.error) == (DONE, error)
    assert turned.events == ("step_completed", "saga_compensating")


def test_a_compensation_whose_context_cannot_be_stored_is_done_all_the_same() -> None:
    state = after(machine.start(ABC, "{}"), DONE, FAILED)
    ended = settle(state, DONE, error=Error("InvalidContext", "field 'x'"))
    assert ended.state.status is Status.FAILED
    assert ended.state.error == WHY, "why the saga turned back is what the step said"


def test_a_consumers_error_compensates_what_is_done_and_not_what_never_began() -> None:
    state = after(machine.start(ABC, "{}"), DONE, DONE)
    assert state.in_flight, "C was put in flight with B's checkpoint"
    turned = machine.turn_back(state, Error("ValueError", "consumer"))
    assert place(turned.state) == ("COMPENSATING", "compensate", "B", 1)
    assert [effect.step for effect in turned.state.effects] == ["A", "B"]
    assert (turned.state.failed_step, turned.state.error) == ("", Error("ValueError", "consumer"))
    assert turned.state.in_flight is True
    nothing_done = machine.turn_back(machine.start(ABC, "{}"), WHY).state
    assert (nothing_done.status, nothing_done.in_flight) == (Status.FAILED, False)
    assert turned.record is None
    assert turned.events == ("saga_compensating",)


# Retries


def test_the_acts_budget_counts_failures_and_the_waits_grow() -> None:
    rules = StepRules(retry=THRICE)
    first = settle(machine.start(ABC, "{}"), FAILED, rules)
    assert place(first.state) == ("RUNNING", "act", "A", 2)
    assert (first.delay, first.state.in_flight, first.state.failures) == (1.0, False, 1)
    assert first.events == ("step_failed",)
    second = settle(machine.begin(first.state).state, FAILED, rules)
    assert place(second.state) == ("RUNNING", "act", "A", 3)
    assert second.delay == 2.0
    third = settle(machine.begin(second.state).state, FAILED, rules)
    assert third.state.status is Status.FAILED
    assert third.delay == 0


def test_a_retry_without_a_delay_is_in_flight_at_once() -> None:
    again = settle(machine.start(ABC, "{}"), FAILED, StepRules(retry=Retry(delay=0)))
    assert (again.state.attempt, again.state.in_flight, again.delay) == (2, True, 0)


def test_each_step_and_each_action_has_a_budget_of_its_own() -> None:
    rules = StepRules(retry=Retry(attempts=2), compensation_retry=Retry(attempts=2))
    state = after(machine.start(ABC, "{}"), FAILED, DONE, rules=rules)
    assert place(state) == ("RUNNING", "act", "B", 1)
    assert state.failures == 0
    state = after(state, FAILED, FAILED, rules=rules)
    assert place(state) == ("COMPENSATING", "compensate", "A", 1)
    assert state.failures == 0
    state = after(state, FAILED, rules=rules)
    assert place(state) == ("COMPENSATING", "compensate", "A", 2)
    assert after(state, DONE, rules=rules).status is Status.FAILED


def test_an_unknown_outcome_uses_the_same_budget() -> None:
    rules = StepRules(retry=Retry(attempts=2, delay=3))
    again = settle(machine.start(ABC, "{}"), UNKNOWN, rules)
    assert place(again.state) == ("RUNNING", "act", "A", 2)
    assert again.delay == 3
    assert after(again.state, UNKNOWN, rules=rules).status is Status.COMPENSATING


@pytest.mark.parametrize("turned", [False, True], ids=["act", "compensate"])
def test_retry_later_is_obeyed_and_uses_no_budget(turned: bool) -> None:
    state = machine.start(ABC, "{}")
    if turned:
        state = after(state, DONE, FAILED)
    for number in range(2, 50):
        later = settle(state, FAILED, retry_after=7.5)
        assert (later.delay, later.state.in_flight, later.state.failures) == (7.5, False, 0)
        assert (later.state.attempt, later.state.step) == (number, "A")
        state = machine.begin(later.state).state
    assert settle(state, FAILED, retry_after=0.0).state.in_flight


def test_an_interruption_uses_no_budget_and_runs_the_same_action_again() -> None:
    rules = StepRules(retry=Retry(attempts=2))
    state = after(machine.start(ABC, "{}"), FAILED, rules=rules)
    lost = machine.interrupt(machine.begin(state).state, rules, 5)
    assert place(lost.state) == ("RUNNING", "act", "A", 3)
    assert (lost.state.in_flight, lost.state.failures, lost.state.recoveries) == (True, 1, 1)
    assert lost.record is not None
    assert (lost.record.attempt, lost.record.outcome) == (2, Outcome.INTERRUPTED)
    assert lost.events == ("saga_recovered",)


def test_the_last_failure_is_why_the_saga_turned_back() -> None:
    rules = StepRules(retry=Retry(attempts=2, delay=0))
    state = settle(machine.start(ABC, "{}"), FAILED, rules, error=Error("E", "first")).state
    state = settle(state, FAILED, rules, error=Error("E", "second")).state
    assert state.error == Error("E", "second")


@pytest.mark.parametrize(
    ("retry", "failures", "seconds"),
    [
        (Retry(), 1, 1.0),
        (Retry(), 3, 4.0),
        (Retry(delay=0.5, backoff=1), 9, 0.5),
        (Retry(delay=10, backoff=10, max_delay=99), 2, 99),
        (Retry(), 10_000, 3600.0),
        (Retry(backoff=10), 10_000, 3600.0),
        (Retry(delay=0), 10_000, 0.0),
        (Retry(delay=0, backoff=10), 10_000, 0.0),
        (Retry(delay=0, backoff=float("inf")), 2, 0.0),
        (Retry(backoff=float("inf")), 2, 3600.0),
    ],
)
def test_a_wait_grows_by_the_backoff_up_to_its_limit(
    retry: Retry, failures: int, seconds: float
) -> None:
    assert retry.delay_after(failures) == seconds


@pytest.mark.parametrize(
    "values",
    [
        {"attempts": 0},
        {"attempts": -1},
        {"attempts": 1.5},
        {"attempts": True},
        {"attempts": "3"},
        {"delay": -1},
        {"delay": float("nan")},
        {"delay": None},
        {"backoff": 0.5},
        {"backoff": float("nan")},
        {"max_delay": -1},
        {"max_delay": 366 * 86400 + 1},
        {"max_delay": float("inf")},
        {"max_delay": float("nan")},
    ],
)
def test_a_retry_of_impossible_values_is_refused_and_shown(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidDefinition, match=r"Retry\(.*must be"):
        Retry(**values)


def test_a_retry_may_wait_always_as_long_or_not_at_all_or_a_year() -> None:
    assert Retry(backoff=1).delay_after(9) == 1.0
    assert Retry(max_delay=0).delay_after(9) == 0.0
    assert Retry(delay=10**9, max_delay=366 * 86400).delay_after(1) == 366 * 86400


# Abort


def test_abort_neither_retries_nor_falls_back() -> None:
    state = after(machine.start((("A",), ("P", "F")), "{}"), DONE)
    aborted = settle(state, FAILED, StepRules(retry=THRICE), abort=True)
    assert place(aborted.state) == ("COMPENSATING", "compensate", "A", 1)
    assert (aborted.state.failed_step, aborted.state.fallback_context) == ("P", None)


def test_abort_after_an_unknown_attempt_compensates_that_attempt() -> None:
    rules = StepRules(retry=Retry(delay=0))
    state = settle(machine.start(ABC, "{}"), UNKNOWN, rules).state
    assert place(settle(state, FAILED, rules, abort=True).state)[:3] == (
        "COMPENSATING",
        "compensate",
        "A",
    )


def test_abort_in_a_compensation_gives_it_up_at_once() -> None:
    state = after(machine.start(ABC, "{}"), DONE, FAILED)
    given_up = settle(state, FAILED, StepRules(), abort=True)
    assert given_up.state.status is Status.STUCK


# Fallback

PF: Plan = (("A",), ("P", "F"), ("C",))


def primary(context: str = '"before"') -> State:
    return settle(machine.start(PF, "{}"), DONE, context=context).state


def test_a_fallback_stands_in_with_the_context_from_before_its_step() -> None:
    fallen = settle(primary(), FAILED, context='"spoilt"')
    assert place(fallen.state) == ("RUNNING", "act", "F", 1)
    assert fallen.state.in_flight
    assert fallen.state.context == '"before"'
    assert fallen.state.fallback_context is None
    assert (fallen.state.failed_step, fallen.state.error) == ("", None)
    assert fallen.events == ("step_failed",)


def test_the_context_restored_is_that_from_before_the_first_attempt() -> None:
    rules = StepRules(retry=Retry(attempts=2, delay=0))
    again = settle(primary(), FAILED, rules, context='"spoilt"').state
    assert again.context == '"spoilt"'
    fallen = settle(again, FAILED, rules, context='"worse"').state
    assert (fallen.step, fallen.context) == ("F", '"before"')


def test_a_step_that_is_done_after_a_retry_keeps_its_context_and_forgets_the_other() -> None:
    rules = StepRules(retry=Retry(attempts=2, delay=0))
    again = settle(primary(), FAILED, rules, context='"spoilt"').state
    done = settle(again, DONE, rules, context='"good"').state
    assert place(done) == ("RUNNING", "act", "C", 1)
    assert (done.context, done.fallback_context) == ('"good"', None)


@pytest.mark.parametrize("how", ["unknown", "interrupted"])
def test_a_primary_of_unknown_outcome_is_compensated_before_its_fallback_acts(how: str) -> None:
    rules = StepRules(retry=Retry(attempts=1), compensation_retry=Retry(attempts=1))
    if how == "unknown":
        state = settle(primary(), UNKNOWN, rules, context='"spoilt"').state
    else:
        lost = machine.interrupt(primary(), rules, 5).state
        state = settle(lost, FAILED, rules, context='"spoilt"').state
    assert place(state) == ("RUNNING", "compensate", "P", 1)
    assert state.context == '"spoilt"', "compensate sees what act left"
    undone = settle(state, DONE, rules, context='"undone"')
    assert place(undone.state) == ("RUNNING", "act", "F", 1)
    assert (undone.state.context, undone.state.fallback_context) == ('"before"', None)
    assert undone.events == ("step_compensated",)
    assert undone.state.effects[1] == Effect("P", UNKNOWN, DONE)


def test_an_undone_primary_is_not_undone_again_when_the_saga_fails_later() -> None:
    state = after(primary(), UNKNOWN, DONE, DONE, FAILED)
    assert place(state) == ("COMPENSATING", "compensate", "F", 1)
    assert place(after(state, DONE)) == ("COMPENSATING", "compensate", "A", 1)
    assert after(state, DONE, DONE).status is Status.FAILED


def test_a_primary_that_cannot_be_undone_gets_no_fallback_and_ends_stuck() -> None:
    unknown = after(primary(), UNKNOWN)
    late = Error("ConnectionError", "it could not be undone")
    state = settle(unknown, FAILED, error=late).state
    assert place(state) == ("COMPENSATING", "compensate", "A", 1)
    assert (state.failed_step, state.error) == ("P", late)
    stuck = after(state, DONE)
    assert stuck.status is Status.STUCK
    assert "P" in stuck.stuck_reason
    assert [effect.step for effect in machine.standing(stuck)] == ["P"]


def test_an_interrupted_undoing_of_a_primary_runs_again_and_then_falls_back() -> None:
    lost = machine.interrupt(after(primary(), UNKNOWN), PLAIN, 5).state
    assert place(lost) == ("RUNNING", "compensate", "P", 2)
    assert place(after(lost, DONE)) == ("RUNNING", "act", "F", 1)


def test_an_error_that_the_fallback_does_not_stand_in_for_turns_the_saga_back() -> None:
    assert place(settle(primary(), FAILED, falls_back=False).state) == (
        "COMPENSATING",
        "compensate",
        "A",
        1,
    )


def test_a_fallback_has_a_budget_of_its_own() -> None:
    twice = StepRules(retry=Retry(attempts=2, delay=0))
    state = after(primary(), FAILED, FAILED, rules=twice)
    assert place(state) == ("RUNNING", "act", "F", 1)
    assert place(after(state, FAILED, rules=twice)) == ("RUNNING", "act", "F", 2)


def test_what_is_found_out_of_a_fallback_says_nothing_of_its_primary() -> None:
    twice = StepRules(retry=Retry(attempts=2, delay=0))
    state = after(primary(), UNKNOWN, DONE)
    state = after(state, UNKNOWN, DONE, rules=twice)
    assert state.effects[1:] == (Effect("P", UNKNOWN, DONE), Effect("F", DONE))


def test_without_a_context_to_restore_a_fallback_goes_on_with_what_there_is() -> None:
    undoing = replace(after(primary(), UNKNOWN), fallback_context=None)
    assert settle(undoing, DONE, context='"kept"').state.context == '"kept"'


def test_a_compensation_stores_its_context() -> None:
    state = after(machine.start(ABC, "{}"), DONE, DONE, FAILED)
    assert settle(state, DONE, context='"undone"').state.context == '"undone"'


def test_a_fallback_has_no_fallback_and_is_compensated_like_any_step() -> None:
    fallback = after(primary(), FAILED)
    failed = after(fallback, FAILED)
    assert place(failed) == ("COMPENSATING", "compensate", "A", 1)
    assert failed.failed_step == "F"
    done = after(fallback, DONE, FAILED)
    assert place(done) == ("COMPENSATING", "compensate", "F", 1)


def test_an_atomic_primary_of_unknown_outcome_falls_back_without_being_undone() -> None:
    assert place(settle(primary(), UNKNOWN, ATOMIC).state) == ("RUNNING", "act", "F", 1)


# Compensations that fail


def test_compensation_goes_on_past_a_failing_one_and_ends_stuck_naming_it() -> None:
    state = after(machine.start(ABC, "{}"), DONE, DONE, FAILED)
    past = settle(state, FAILED)
    assert place(past.state) == ("COMPENSATING", "compensate", "A", 1)
    assert past.events == ("step_failed",)
    assert past.record is not None
    assert past.record.error == WHY
    stuck = settle(past.state, DONE)
    assert stuck.state.status is Status.STUCK
    assert "B" in stuck.state.stuck_reason
    assert "A" not in stuck.state.stuck_reason.split()
    assert machine.standing(stuck.state) == (Effect("B", DONE, FAILED),)
    assert stuck.events == ("step_compensated", "saga_stuck")
    assert (stuck.state.failed_step, stuck.state.error) == ("C", WHY)
    assert place(stuck.state) == ("STUCK", "compensate", "B", 1)
    assert stuck.state.in_flight is False


@pytest.mark.parametrize("outcome", [FAILED, UNKNOWN])
def test_a_compensation_whose_outcome_is_not_done_is_never_shown_as_clean(
    outcome: Outcome,
) -> None:
    state = after(machine.start(ABC, "{}"), DONE, FAILED)
    assert after(state, outcome).status is Status.STUCK


def test_every_effect_that_could_not_be_undone_is_named() -> None:
    state = after(machine.start(ABC, "{}"), DONE, DONE, UNKNOWN, FAILED, FAILED, FAILED)
    assert state.status is Status.STUCK
    assert "A, B, C" in state.stuck_reason
    assert [effect.step for effect in machine.standing(state)] == ["A", "B", "C"]


# Interruptions


def test_an_interrupted_act_is_in_doubt_and_runs_again_as_the_next_attempt() -> None:
    lost = machine.interrupt(machine.start(ABC, '"kept"'), PLAIN, 5).state
    assert place(lost) == ("RUNNING", "act", "A", 2)
    assert lost.effects == (Effect("A", UNKNOWN),)
    assert lost.context == '"kept"'


def test_an_interrupted_compensation_runs_again_as_the_next_attempt() -> None:
    state = after(machine.start(ABC, "{}"), DONE, FAILED)
    lost = machine.interrupt(state, PLAIN, 5).state
    assert place(lost) == ("COMPENSATING", "compensate", "A", 2)
    assert lost.effects == state.effects


@pytest.mark.parametrize("turned", [False, True], ids=["act", "compensate"])
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_what_keeps_losing_its_driver_ends_stuck(limit: int, turned: bool) -> None:
    state = machine.start(ABC, "{}")
    if turned:
        state = after(state, DONE, FAILED)
    for _ in range(limit):
        state = machine.interrupt(state, PLAIN, limit).state
        assert state.active
    stuck = machine.interrupt(state, PLAIN, limit)
    assert stuck.state.status is Status.STUCK
    assert "A" in stuck.state.stuck_reason
    assert str(limit + 1) in stuck.state.stuck_reason
    assert [effect.step for effect in machine.standing(stuck.state)] == ["A"]
    assert stuck.record is not None
    assert (stuck.record.attempt, stuck.record.outcome) == (limit + 1, Outcome.INTERRUPTED)
    assert stuck.events == ("saga_stuck",)
    assert stuck.state.error is not None
    assert stuck.state.failed_step == ("B" if turned else "A")


@pytest.mark.parametrize("turned", [False, True], ids=["act", "compensate"])
@pytest.mark.parametrize("outcome", [DONE, FAILED, UNKNOWN])
def test_an_attempt_that_came_to_an_end_is_progress(outcome: Outcome, turned: bool) -> None:
    state = machine.start(ABC, "{}")
    if turned:
        state = after(state, DONE, DONE, FAILED)
    for _ in range(5):
        state = machine.interrupt(state, PLAIN, 5).state
    assert state.recoveries == 5
    rules = StepRules(retry=THRICE, compensation_retry=THRICE)
    assert settle(state, outcome, rules).state.recoveries == 0


# Stuck, and an operator's retry


def test_what_was_in_flight_when_the_definition_was_lost_stands_in_doubt() -> None:
    state = after(machine.start(ABC, "{}"), DONE)
    stuck = machine.stick(state, "no B any more")
    assert stuck.state.status is Status.STUCK
    assert stuck.state.stuck_reason == "no B any more"
    assert (stuck.state.in_flight, stuck.state.error) == (
        False,
        Error("SagaStuck", "no B any more"),
    )
    assert machine.standing(stuck.state) == (Effect("A", DONE), Effect("B", UNKNOWN))
    assert stuck.events == ("saga_stuck",)


def test_the_attempt_that_was_lost_with_the_definition_is_recorded_as_interrupted() -> None:
    stuck = machine.stick(after(machine.start(ABC, "{}"), DONE), "no B any more")
    assert stuck.record is not None
    assert (stuck.record.step, stuck.record.outcome) == ("B", Outcome.INTERRUPTED)
    assert machine.stick(machine.start(ABC, "{}", pending=True), "lost").record is None


def test_what_had_not_begun_when_the_definition_was_lost_does_not_stand() -> None:
    assert machine.stick(machine.start(ABC, "{}", pending=True), "lost").state.effects == ()
    waiting = settle(machine.start(ABC, "{}"), FAILED, StepRules(retry=THRICE)).state
    assert machine.stick(waiting, "lost").state.effects == ()


def test_getting_stuck_while_compensating_keeps_why_it_turned_back() -> None:
    state = after(machine.start(ABC, "{}"), DONE, FAILED)
    stuck = machine.stick(state, "no A any more").state
    assert (stuck.error, stuck.failed_step) == (WHY, "B")
    assert stuck.effects == (Effect("A", DONE),)


def test_an_operators_retry_undoes_in_reverse_what_still_stands_and_only_that() -> None:
    rules = StepRules(compensation_retry=Retry(attempts=1))
    stuck = after(machine.start(ABC, "{}"), DONE, DONE, UNKNOWN, FAILED, DONE, FAILED, rules=rules)
    assert [effect.step for effect in machine.standing(stuck)] == ["A", "C"]
    again = machine.compensate_again(stuck)
    assert place(again.state)[:3] == ("COMPENSATING", "compensate", "C")
    assert (again.state.in_flight, again.state.stuck_reason) == (False, "")
    assert again.record is None
    first = settle(machine.begin(again.state).state, DONE)
    assert first.state.step == "A"
    ended = settle(first.state, DONE)
    assert ended.state.status is Status.FAILED
    assert machine.standing(ended.state) == ()
    assert (ended.state.error, ended.state.failed_step) == (stuck.error, "C")


def test_an_operators_retry_that_fails_again_ends_stuck_again() -> None:
    stuck = after(machine.start(ABC, "{}"), DONE, FAILED, FAILED)
    again = machine.begin(machine.compensate_again(stuck).state).state
    assert after(again, FAILED).status is Status.STUCK


def test_an_operators_retry_after_poison_undoes_what_is_in_doubt_and_starts_counting_anew() -> None:
    state = after(machine.start(ABC, "{}"), DONE)
    again = machine.compensate_again(machine.interrupt(state, PLAIN, 0).state).state
    assert place(again)[:3] == ("COMPENSATING", "compensate", "B")
    assert again.recoveries == 0


def test_an_operators_retry_with_nothing_to_undo_ends_the_saga() -> None:
    stuck = machine.stick(machine.start(ABC, "{}", pending=True), "no such saga").state
    ended = machine.compensate_again(stuck)
    assert ended.state.status is Status.FAILED
    assert ended.events == ("saga_failed",)


# What is still needed of the code


def test_going_forward_needs_the_steps_ahead_and_those_to_undo() -> None:
    state = machine.start(PF, "{}")
    assert machine.needed_steps(state) == ("A", "P", "F", "C")
    assert machine.needed_steps(after(state, DONE, DONE)) == ("A", "P", "C")


def test_a_step_that_is_not_in_the_plan_is_named() -> None:
    astray = replace(machine.start(ABC, "{}"), step="X")
    with pytest.raises(ValueError, match="'X' is not in the plan"):
        machine.needed_steps(astray)


def test_a_step_that_its_fallback_stands_in_for_is_not_needed_any_more() -> None:
    assert set(machine.needed_steps(after(primary(), FAILED))) == {"A", "F", "C"}
    assert set(machine.needed_steps(after(primary(), UNKNOWN))) == {"A", "P", "F", "C"}
    assert set(machine.needed_steps(after(primary(), UNKNOWN, DONE))) == {"A", "F", "C"}


def test_going_back_needs_only_what_is_not_undone() -> None:
    state = after(machine.start(ABC, "{}"), DONE, DONE, FAILED)
    assert set(machine.needed_steps(state)) == {"A", "B"}
    assert set(machine.needed_steps(after(state, DONE))) == {"A"}
    assert set(machine.needed_steps(after(state, FAILED))) == {"A"}


# Rows that were edited by hand


B_NEXT = after(machine.start(ABC, "{}"), DONE)
A_DONE, NOWHERE_DONE = Effect("A", DONE), Effect("Nowhere", DONE)
UNCOUNTABLE = 2**31 - 999
COMPENSATE = machine.Action.COMPENSATE


@pytest.mark.parametrize(
    ("edit", "flaw"),
    [
        ({"plan": ()}, "its plan is no list of steps"),
        ({"plan": (("A",), (), ("B",))}, "its plan is no list of steps"),
        ({"plan": (("A",), ("B", "C", "D"))}, "its plan is no list of steps"),
        ({"plan": (("A",), ("B",), ("B",))}, "a step is named twice"),
        ({"effects": (A_DONE, A_DONE)}, "a step is named twice"),
        ({"action": COMPENSATE}, "it is to compensate 'B', which has done nothing"),
        (
            {"action": COMPENSATE, "effects": (A_DONE, Effect("B", UNKNOWN, DONE))},
            "it is to compensate 'B', which has done nothing",
        ),
        (
            {"action": COMPENSATE, "step": "Nowhere", "effects": (A_DONE, NOWHERE_DONE)},
            "it is to go on after 'Nowhere', which its plan does not name",
        ),
        ({"step": "Nowhere"}, "it is to act in 'Nowhere', which does not come next"),
        ({"status": Status.COMPENSATING}, "it is to act in 'B', which does not come next"),
        (
            {"effects": (A_DONE, Effect("B", UNKNOWN, DONE))},
            "it is to act in 'B', which is undone",
        ),
        ({"attempt": UNCOUNTABLE}, "it has been attempted more often than can be counted"),
        ({"failures": UNCOUNTABLE}, "it has been attempted more often than can be counted"),
        ({"recoveries": UNCOUNTABLE}, "it has been attempted more often than can be counted"),
    ],
)
def test_what_contradicts_itself_in_a_state_is_named(edit: dict[str, Any], flaw: str) -> None:
    assert machine.flaw(replace(B_NEXT, **edit)) == flaw


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"plan": (("A",), ("B", "C"))},
        {"effects": (A_DONE, Effect("B", UNKNOWN))},
        {"effects": (A_DONE, Effect("C", UNKNOWN, DONE))},
        {"action": COMPENSATE, "effects": (A_DONE, Effect("B", UNKNOWN))},
        {"status": Status.COMPENSATING, "action": COMPENSATE, "step": "A"},
        {
            "status": Status.COMPENSATING,
            "action": COMPENSATE,
            "step": "Nowhere",
            "effects": (NOWHERE_DONE,),
        },
        {"attempt": UNCOUNTABLE - 1, "failures": UNCOUNTABLE - 1, "recoveries": UNCOUNTABLE - 1},
    ],
)
def test_a_state_that_can_go_on_has_no_flaw(edit: dict[str, Any]) -> None:
    """Going back needs no plan: what is to be undone stands in the effects."""
    assert machine.flaw(replace(B_NEXT, **edit)) == ""
