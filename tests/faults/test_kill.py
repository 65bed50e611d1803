"""Battery 1 and 2: a process that dies before or after any SQL statement, and whose recovery does.

Ended by ``os._exit``, which runs nothing more, in the middle of the driver; then recovered, by a
process that may die as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count
from uuid import uuid4

import pytest

from tests.faults.children import DIED, Nursery
from tests.faults.driving import RUNNERS, expire
from tests.faults.judge import wrongs
from tests.faults.ledger import Ledger
from tests.faults.options import Size
from tests.faults.sagas import CASES

EVERYDAY = [("faults.mixed", "sync"), ("faults.hardly_undone", "sync")]
FULL = [(saga, runner) for saga in CASES for runner in RUNNERS]
LONGEST = 30  # statements of one process
Place = tuple[int, bool]  # the statement, and whether after it


pytestmark = pytest.mark.usefixtures("committing_databases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" in metafunc.fixturenames:
        cases = FULL if metafunc.config.getoption("--full") else EVERYDAY
        metafunc.parametrize(("saga", "runner"), cases)


class Trial:
    """One execution, driven by processes that may die."""

    def __init__(self, nursery: Nursery, database: str, ledger: Ledger, without: str = "") -> None:
        self.id = uuid4()
        self._without = without
        self._nursery, self._database, self._ledger = nursery, database, ledger

    def drive(self, saga: str, runner: str, place: Place | None = None) -> bool:
        """Whether it died."""
        return self._run("drive", place, saga=saga, runner=runner, queue=f"faults-{self.id}")

    def recover(self, place: Place | None = None) -> bool:
        """Whether the recovery died."""
        expire(self.id, self._database)
        return self._run("recover", place)

    def _run(self, function: str, place: Place | None, **arguments: str) -> bool:
        status = self._nursery.run(
            f"tests.faults.driving.{function}",
            saga_id=str(self.id),
            ledger=self._ledger.address,
            fault=None if place is None else [*place, "die"],
            without=self._without,
            **arguments,
        )
        return status == DIED

    @property
    def wrongs(self) -> list[str]:
        return wrongs(self.id, self._database, self._ledger.entries(self.id))


@pytest.fixture(params=["default", "sqlite"])
def trial(
    request: pytest.FixtureRequest, nurseries: Callable[[str], Nursery], ledger: Ledger
) -> Callable[..., Trial]:
    """A new execution, on each database; without a rule, if one is named."""
    return lambda *rule: Trial(nurseries(request.param), request.param, ledger, *rule)


def places() -> Iterator[Place]:
    """Before the first statement, after it, before the second, ..."""
    return ((at, after) for at in count(1) for after in (False, True))


def test_a_process_that_dies_at_any_statement_loses_and_doubles_nothing(
    trial: Callable[[], Trial], saga: str, runner: str, figure: Callable[..., None]
) -> None:
    deaths = 0
    for place in places():
        one = trial()
        if not one.drive(saga, runner, place):
            break
        one.recover()
        assert not one.wrongs, place
        deaths += 1
    assert deaths >= 8, f"{saga} makes more statements than that"
    figure("kill", kills=deaths, wrongs=0)


@pytest.mark.parametrize("saga", ["faults.mixed", "faults.hardly_undone"])
def test_a_recovery_that_dies_too_loses_and_doubles_nothing(
    trial: Callable[[], Trial],
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
            one = trial()
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
    trial: Callable[[str], Trial], rule: str, saga: str, breaks: str
) -> None:
    found: list[str] = []
    for place in places():
        one = trial(rule)
        if not one.drive(saga, "sync", place):
            break
        one.recover()
        found += one.wrongs
    assert any(breaks in wrong for wrong in found)
