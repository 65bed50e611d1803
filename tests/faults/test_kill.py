"""Battery 1 and 2: a process that dies before or after any SQL statement, and whose recovery does.

Ended by ``os._exit``, which runs nothing more, in the middle of the driver; then recovered, by a
process that may die as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.faults.driving import RUNNERS
from tests.faults.options import Size
from tests.faults.sagas import CASES
from tests.faults.victims import Place, Victim

EVERYDAY = [("faults.mixed", "sync"), ("faults.hardly_undone", "sync")]
FULL = [(saga, runner) for saga in CASES for runner in RUNNERS]
LONGEST = 30  # statements of one process


pytestmark = pytest.mark.usefixtures("committing_databases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" in metafunc.fixturenames:
        cases = FULL if metafunc.config.getoption("--full") else EVERYDAY
        metafunc.parametrize(("saga", "runner"), cases)


def places() -> Iterator[Place]:
    """Before the first statement, after it, before the second, ..."""
    return ((at, after) for at in count(1) for after in (False, True))


def test_a_process_that_dies_at_any_statement_loses_and_doubles_nothing(
    victim: Callable[[], Victim], saga: str, runner: str, figure: Callable[..., None]
) -> None:
    deaths = 0
    for place in places():
        one = victim()
        if not one.drive(saga, runner, place):
            break
        one.recover()
        assert not one.wrongs, place
        deaths += 1
    assert deaths >= 8, f"{saga} makes more statements than that"
    figure("kill", kills=deaths, wrongs=0)


@pytest.mark.parametrize("saga", ["faults.mixed", "faults.hardly_undone"])
def test_a_recovery_that_dies_too_loses_and_doubles_nothing(
    victim: Callable[[], Victim],
    saga: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    share = size("pairs_percent", everyday=3, full_run=100) / 100
    for first in places():
        for second in places():
            if second[0] > LONGEST:
                break
            if dice.random() >= share:
                continue
            one = victim()
            if not one.drive(saga, "sync", first):
                return
            died = one.recover(second)
            one.recover()
            assert not one.wrongs, (first, second)
            if not died:
                break
            figure("double crash", pairs=1, wrongs=0)


@pytest.mark.parametrize(
    ("rule", "saga", "breaks"),
    [
        ("an atomic step and its checkpoint share a transaction", "faults.rows", "L1"),
        ("an actions key is the same at each attempt", "faults.mixed", "L2"),
        ("an act that was lost is undone too", "faults.fickle", "L3"),
    ],
)
def test_canary_without_a_rule_it_is_seen(
    victim: Callable[[str], Victim], rule: str, saga: str, breaks: str
) -> None:
    for place in places():
        one = victim(rule)
        assert one.drive(saga, "sync", place), "nothing was seen, wherever it died"
        one.recover()
        if any(breaks in wrong for wrong in one.wrongs):
            break
