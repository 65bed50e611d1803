"""The protocol, exhaustively: every interleaving of two drivers and a few faults, in a model.

The tests say what each rule of the protocol is there for. The model makes its moves with the real
machine, and every edge of that stands in a table. To learn the protocol, read :mod:`.protocol`,
then ``BROKEN``, then the table in :mod:`.edges`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from django_saga import machine
from django_saga.machine import Plan, Retry, State, StepRules
from tests.faults.edges import AB, AB_TABLE, APF, APF_TABLE, made, place_of, told
from tests.faults.options import Size
from tests.faults.protocol import (
    BACKWARD,
    ENDS,
    ONCE,
    ONE_END,
    ONE_KEY,
    ORDER,
    TELLS,
    Explored,
    Protocol,
    Rules,
    Step,
    explore,
    step,
)

TWICE = Retry(attempts=2)
FAULTS = {
    "is killed",
    "freezes until its lease has run out",
    "loses the reply: it was stored",
    "loses the reply: it was not stored",
    "loses the reply: it is under way",
    "is asked to stop",
    "has a consumer that raises",
}


def protocol(*steps: Step, plan: Plan | None = None, retries: int = 0) -> Protocol:
    return Protocol(steps, plan or tuple((step.name,) for step in steps), retries=retries)


LAST = protocol(step("A", atomic=True), step("B", "done failed unheard unknown"))
UNDO = protocol(step("A", atomic=True), step("B", "unheard unknown", "done failed"), retries=1)
WAIT = protocol(step("A"), step("B", "done failed unheard", retry=TWICE))
FALLBACK = protocol(
    step("A", atomic=True), step("P", "done failed unheard"), step("F", "done failed"), plan=APF
)
PLANS = {
    "the last step may fail": LAST,
    "a compensation may fail": UNDO,
    "an attempt waits": WAIT,
    "there is a fallback": FALLBACK,
}
THREE = protocol(step("A"), step("B", atomic=True), step("C", "done failed unheard unknown"))
ONE = protocol(step("A", "done failed"))

explored: Callable[[Protocol], Explored] = cache(explore)


def broken(where: Protocol, faults: int, rules: Rules | None = None) -> set[str]:
    return set(explored(where._replace(faults=faults, rules=rules or Rules())).broken)


# The invariants, and what they rest on


@pytest.mark.parametrize("name", PLANS)
def test_every_invariant_holds_wherever_two_drivers_and_their_faults_can_get(
    name: str, size: Size, figure: Callable[..., None]
) -> None:
    faults = size("faults", everyday=2, full_run=3)
    found = explored(PLANS[name]._replace(faults=faults))
    figure("protocol", states=found.states, edges=found.edges, broken=len(found.broken))
    assert found.broken == {}
    assert found.happened >= FAULTS | {"a statement arrives", "a sweep takes it over"}
    assert "an operator orders a retry" in found.happened or not PLANS[name].retries


BROKEN = {  # the rule that is off: where, with how many faults, and what that breaks
    Rules(one_transaction=False): (THREE, 1, {ONCE, ORDER}),
    Rules(stable_key=False): (THREE, 1, {ONE_KEY, TELLS, ORDER}),
    Rules(write_ahead=False): (THREE, 1, {TELLS, ORDER}),
    Rules(undo_unknown=False): (THREE, 1, {TELLS, ORDER}),
    Rules(sweep=False): (THREE, 1, {ENDS}),
    Rules(after_lost_reply="failed"): (THREE, 1, {TELLS, ORDER}),
    Rules(after_lost_reply="stored"): (THREE, 1, {TELLS, ORDER}),
    Rules(alone=False): (ONE, 3, {TELLS}),
    Rules(token=False, compare_and_set=False): (THREE, 1, {ONCE, TELLS, ORDER, ONE_END, BACKWARD}),
    Rules(backward=False): (THREE, 1, {ONCE, TELLS, ORDER, BACKWARD}),
}


@pytest.mark.parametrize("rules", BROKEN, ids=lambda rules: "+".join(off(rules)))
def test_each_rule_that_is_switched_off_breaks_an_invariant(rules: Rules) -> None:
    where, faults, breaks = BROKEN[rules]
    assert broken(where, faults) == set()
    assert broken(where, faults, rules) == breaks


def off(rules: Rules) -> list[str]:
    default = Rules()._asdict()
    return [name for name, value in rules._asdict().items() if value != default[name]]


@pytest.mark.parametrize("name", PLANS)
def test_the_token_alone_fences_off_every_zombie(name: str) -> None:
    assert broken(PLANS[name], 1, Rules(compare_and_set=False)) == set()


@pytest.mark.parametrize(
    ("where", "faults", "breaks"),
    [
        (THREE._replace(stops=False), 1, set()),
        (LAST._replace(stops=False), 2, set()),
        (LAST, 2, {TELLS}),  # a driver let go of what another then began
        (WAIT, 1, {TELLS, ORDER}),  # what waited was begun
        (UNDO._replace(retries=0), 1, set()),
        (UNDO, 1, {ONCE, TELLS}),  # an operator had it compensated again
    ],
)
def test_compare_and_set_alone_fences_off_zombies_unless_a_row_comes_back_to_where_it_was(
    where: Protocol, faults: int, breaks: set[str]
) -> None:
    assert broken(where, faults, Rules(token=False)) == breaks


def test_an_act_that_comes_after_its_compensation_is_all_that_is_forgiven() -> None:
    """Its driver froze between its look at the lease and its call, where no fence can stand."""
    strict = THREE._replace(forgives_late=False)
    assert broken(strict, 1) == {TELLS, ORDER}
    assert broken(strict._replace(freezes_before_calls=False), 1) == set()
    assert broken(strict._replace(refuses_late=True), 1) == set(), "but the service can refuse it"


def test_without_a_look_at_the_lease_before_each_call_any_freeze_makes_an_act_late() -> None:
    strict = THREE._replace(forgives_late=False, freezes_before_calls=False)
    assert broken(strict, 1, Rules(lease_check=False)) == {TELLS, ORDER}


# The machine's edges


@pytest.mark.parametrize("atomic", [False, True], ids=["remote", "atomic"])
@pytest.mark.parametrize(
    "retry",
    [machine.ONCE, Retry(attempts=2, delay=0), TWICE],
    ids=["one attempt", "two at once", "two with a wait"],
)
@pytest.mark.parametrize(
    ("plan", "table"), [(AB, AB_TABLE), (APF, APF_TABLE)], ids=["plain", "fallback"]
)
def test_the_machine_makes_the_edges_of_the_table_all_of_them_and_no_others(
    plan: Plan, table: str, retry: Retry, atomic: bool
) -> None:
    assert made(plan, retry, atomic=atomic) == told(table, retry, atomic=atomic)


@pytest.mark.parametrize("name", PLANS)
def test_no_interleaving_moves_a_row_where_the_table_has_no_edge(name: str) -> None:
    table = APF_TABLE if PLANS[name] is FALLBACK else AB_TABLE
    ways = {
        (before, after)
        for retry in (machine.ONCE, TWICE)
        for atomic in (False, True)
        for before, _, after in told(table, retry, atomic=atomic)
    }
    taken = explored(PLANS[name]._replace(faults=2)).changes
    assert {(place_of(before), place_of(after)) for before, after in taken} <= ways


def test_a_rule_of_the_machine_that_is_switched_off_is_seen_by_the_table_and_by_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forget(state: State, rules: StepRules | None) -> tuple[machine.Effect, ...]:
        return state.effects

    monkeypatch.setattr(machine, "effects_if_lost", forget)
    extra = made(AB, machine.ONCE, atomic=False) - told(AB_TABLE, machine.ONCE, atomic=False)
    assert "(RUNNING act B [A], 'lost again', RUNNING act B [A])" in map(repr, extra)
    assert set(explore(THREE._replace(faults=1)).broken) == {TELLS, ORDER}
