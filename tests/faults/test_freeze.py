"""Battery 7: a driver frozen by SIGSTOP at a statement or call, taken over, and woken by SIGCONT.

On SQLite a driver that is frozen while it writes or reads holds the whole database: nobody can take
over until it goes on, and then its checkpoint is in time.
"""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from django_saga import LeaseLost
from tests.faults.children import STOPPED, Child, Nursery, wait_for
from tests.faults.driving import GAVE_UP
from tests.faults.ledger import Ledger
from tests.faults.options import Size
from tests.faults.sagas import CASES
from tests.faults.victims import Place, Victim
from tests.faults.zombies import outlive, outwait, wake_first

EVERYDAY = [("faults.mixed", "sync"), ("faults.hardly_undone", "async")]
FULL = [(saga, runner) for saga in CASES for runner in ("sync", "async")]
LEASE = 0.5  # seconds; after it the server ends what a zombie keeps open in an atomic step
TRIES = 20

Freezer = Callable[..., "Frozen | None"]

pytestmark = pytest.mark.usefixtures("committing_databases", "no_leftovers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" in metafunc.fixturenames:
        cases = FULL if metafunc.config.getoption("--full") else EVERYDAY
        metafunc.parametrize(("saga", "runner"), cases)


class Frozen:
    """An execution, and the driver of it that was stopped."""

    def __init__(self, victim: Victim, child: Child) -> None:
        self.victim, self._child, self._since = victim, child, time.monotonic()

    def lapse(self) -> None:
        """Let its lease run out. Frozen in the middle of a commit it keeps even readers of SQLite
        away, so that is not looked up there."""
        wait_for(lambda: time.monotonic() > self._since + LEASE)

    def judge(self) -> list[str]:
        """What it does wrong once another process has taken over, if one can."""
        if self.victim.is_locked:
            self.lapse()
            return outwait(self.victim, self.wake)
        return outlive(self.victim, self.wake)

    def judge_past_its_lease(self) -> list[str]:
        self.lapse()
        if self.victim.is_locked:
            return outwait(self.victim, self.wake)
        return outlive(self.victim, self.wake, may_call=False)

    def judge_alone(self) -> list[str]:
        """What it does wrong once its lease is past and nobody has taken over."""
        self.lapse()
        return wake_first(self.victim, self.wake)

    def wake(self) -> int | str:
        self._child.signal(signal.SIGCONT)
        return self._child.wait()


@pytest.fixture(params=["default", "sqlite"])
def freeze(
    request: pytest.FixtureRequest, nurseries: Callable[..., Nursery], ledger: Ledger
) -> Iterator[Freezer]:
    """Freezes the driver of a new execution at a place; None once there is no such place."""
    short = nurseries(request.param, RECOVER_WITH=json.dumps({"LEASE": LEASE}))
    children: list[Child] = []

    def frozen(
        saga: str, runner: str, place: Place, where: str = "statement", without: str = ""
    ) -> Frozen | None:
        for _ in range(TRIES):
            victim = Victim(nurseries(request.param), request.param, ledger, without)
            child = victim.start(saga, runner, [*place, "freeze", where], short)
            children.append(child)
            status = child.wait()
            if status == STOPPED:
                return Frozen(victim, child)
            if status == 0:
                return None
            # On a busy machine so short a lease may run out before it gets there.
            assert status == GAVE_UP[LeaseLost]
        raise AssertionError(f"no driver got as far as {place}")

    yield frozen
    for child in children:
        child.signal(signal.SIGKILL)


def places(step: int = 1, first: int = 0) -> Iterator[Place]:
    """Before the first statement, after it, before the second, ...; or every so many of them."""
    everywhere = ((at, after) for at in count(1) for after in (False, True))
    return (place for number, place in enumerate(everywhere) if number % step == first)


def test_a_driver_that_was_frozen_at_any_statement_and_taken_over_writes_nothing_more(
    freeze: Freezer,
    saga: str,
    runner: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    step = size("freeze_every", everyday=10, full_run=1)
    frozen = 0
    for place in places(step, dice.randrange(step)):
        zombie = freeze(saga, runner, place)
        if zombie is None:
            break
        assert not zombie.judge(), place
        frozen += 1
    assert frozen >= 12 // step, f"{saga} makes more statements than that"
    figure("freeze", zombies=frozen, wrongs=0)


def test_a_driver_that_was_frozen_past_its_lease_at_any_statement_calls_nothing_more(
    freeze: Freezer,
    saga: str,
    runner: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    step = size("lapse_every", everyday=12, full_run=1)
    frozen = 0
    for place in places(step, dice.randrange(step)):
        zombie = freeze(saga, runner, place)
        if zombie is None:
            break
        assert not zombie.judge_past_its_lease(), place
        frozen += 1
    assert frozen >= 12 // step, f"{saga} makes more statements than that"
    figure("freeze", past_their_lease=frozen, wrongs=0)


def test_a_driver_that_was_frozen_past_its_lease_and_not_taken_over_fails_nothing(
    freeze: Freezer,
    saga: str,
    runner: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    step = size("alone_every", everyday=12, full_run=1)
    frozen = 0
    for place in places(step, dice.randrange(step)):
        zombie = freeze(saga, runner, place)
        if zombie is None:
            break
        assert not zombie.judge_alone(), place
        frozen += 1
    assert frozen >= 12 // step, f"{saga} makes more statements than that"
    figure("freeze", not_taken_over=frozen, wrongs=0)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_driver_that_was_frozen_at_a_call_makes_it_once_with_its_key_and_writes_nothing(
    freeze: Freezer, after: bool, figure: Callable[..., None]
) -> None:
    for at in count(1):
        zombie = freeze("faults.undone", "sync", (at, after), "call")
        if zombie is None:
            break
        assert not zombie.judge(), at
        figure("freeze", at_calls=1, wrongs=0)
    assert at == 5, "two acts and two compensations"


def test_canary_without_token_and_place_a_zombie_is_seen_to_write(freeze: Freezer) -> None:
    assert "the zombie wrote" in found_without(freeze, "a checkpoint names its token and its place")


@pytest.mark.parametrize("rule", ["a checkpoint names its token", "a checkpoint names its place"])
def test_either_token_or_place_alone_holds_a_zombie_off(freeze: Freezer, rule: str) -> None:
    assert not list(found_without(freeze, rule))


def found_without(freeze: Freezer, rule: str) -> Iterator[str]:
    for place in places():
        zombie = freeze("faults.undone", "sync", place, without=rule)
        if zombie is None:
            break
        if zombie.victim.is_locked:
            zombie.wake()  # nobody can take over
        else:
            yield from zombie.judge()
