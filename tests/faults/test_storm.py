"""Battery 4: a storm of SIGKILLs, while sagas stream in.

Whoever works or recovers may be hit, at any moment, and is replaced at once. What a killed worker
had forked goes on without it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import cycle, islice

import pytest

from tests.faults.fleets import Fleet, until
from tests.faults.options import Size
from tests.faults.sagas import CASES

LONGEST = 0.15  # seconds from one kill to the next
WORKERS = ("SimpleWorker", "SimpleWorker", "SimpleWorker", "Worker")

pytestmark = pytest.mark.usefixtures("committing_databases")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("database", ["default", "sqlite"] if full else ["default"])


def storm(fleet: Fleet, sagas: int, kills: int, dice: random.Random) -> int:
    """Enqueue so many and kill so often meanwhile; how many died with an execution in hand."""
    names, in_hand = cycle(CASES), 0
    for kill in range(kills):
        share = sagas * (kill + 1) // kills - sagas * kill // kills
        fleet.enqueue(list(islice(names, share)))
        time.sleep(dice.uniform(0, LONGEST))
        driving = fleet.driving if dice.random() < 0.5 else []
        in_hand += fleet.kill(dice.choice(driving or fleet.members))
    return in_hand


def test_a_storm_of_sigkills_loses_and_doubles_nothing(
    fleet: Callable[..., Fleet],
    database: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    sagas = size("sagas", everyday=100, full_run=5_000)
    kills = size("kills", everyday=15, full_run=500)
    with fleet(database) as one:
        for worker in WORKERS:
            one.add("work", worker=worker)
        for where in ("enqueue", "inline"):
            one.add("recover", where=where)
        in_hand = storm(one, sagas, kills, dice)

        def has_struck() -> bool:
            """A fast machine may be done with each saga before its driver is killed."""
            one.heal()
            if not one.interrupted:
                storm(one, 20, 5, dice)
            return bool(one.interrupted)

        until(has_struck, "nobody was driving when it was killed")
        one.heal()
        assert not one.wrongs
        assert not one.fallen
    figure(f"storm on {database}", sagas=sagas, kills=kills, in_hand=in_hand, wrongs=0)


def test_canary_without_recovery_it_is_seen(
    fleet: Callable[..., Fleet], dice: random.Random
) -> None:
    with fleet("default") as one:
        for worker in WORKERS:
            one.add("work", worker=worker)

        def strands() -> bool:
            storm(one, 8, 1, dice)
            return bool(one.stranded)

        until(strands, "nobody was driving when it was killed")
        assert all("L0" in "".join(one.wrongs_of(id)) for id in one.stranded)
