from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.faults.children import Nursery
from tests.faults.ledger import Ledger
from tests.faults.options import FIGURES, Figures, Size
from tests.faults.victims import Victim


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether this is the full run, whose figures go into the docs."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def size(request: pytest.FixtureRequest, full: bool) -> Size:
    """How many: ``size("kills", everyday=15, full_run=500)``; ``--size kills=50`` rules."""
    given = dict(pair.split("=", 1) for pair in request.config.getoption("--size"))

    def choose(name: str, everyday: int, full_run: int) -> int:
        return int(given.get(name, full_run if full else everyday))

    return choose


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Random choices that ``--seed`` repeats, each test with its own."""
    seed = request.config.getoption("--seed")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds to what the battery reports: ``figure("kill", points=12, violations=0)``."""
    figures: Figures = request.config.stash[FIGURES]

    def add(battery: str, **numbers: float) -> None:
        for name, number in numbers.items():
            figures[battery][name] += number

    return add


@pytest.fixture(scope="session")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """The witness of this run."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    yield ledger
    ledger.end()


@pytest.fixture(scope="session")
def nurseries(child_environment: dict[str, str]) -> Iterator[Callable[[str], Nursery]]:
    """What forks processes whose default database is the one of that alias."""
    started: dict[str, Nursery] = {}

    def nursery(database: str) -> Nursery:
        if database not in started:
            ours = {"DJANGO_SETTINGS_MODULE": "tests.recovery_settings", "RECOVER_ON": database}
            started[database] = Nursery({**child_environment, **ours})
        return started[database]

    yield nursery
    for one in started.values():
        one.end()


@pytest.fixture(params=["default", "sqlite"])
def victim(
    request: pytest.FixtureRequest, nurseries: Callable[[str], Nursery], ledger: Ledger
) -> Callable[..., Victim]:
    """A new execution, on each database; without a rule, if one is named."""
    return lambda *rule: Victim(nurseries(request.param), request.param, ledger, *rule)
