from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from django.db import connections

from tests.faults.children import Nursery, wait_for
from tests.faults.fleets import Fleet
from tests.faults.ledger import Ledger
from tests.faults.options import FIGURES, Figures, Size, add
from tests.faults.redis_server import RedisServer
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

    return lambda battery, **numbers: add(figures, battery, numbers)


@pytest.fixture(scope="session")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """The witness of this run."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    yield ledger
    ledger.end()


class Nurseries:
    """What forks processes, for every environment that was asked for."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._started: dict[object, Nursery] = {}

    def __call__(self, database: str, **others: str) -> Nursery:
        """Whose default database is the one of that alias; others: environment variables."""
        which = (database, *sorted(others.items()))
        if which not in self._started:
            ours = {"DJANGO_SETTINGS_MODULE": "tests.recovery_settings", "RECOVER_ON": database}
            environment = {**self._environment, **ours, **others}
            self._started[which] = Nursery(environment, "tests.faults.driving")
        return self._started[which]

    @property
    def running(self) -> list[int]:
        return [pid for nursery in self._started.values() for pid in nursery.running]

    def end(self) -> None:
        for nursery in self._started.values():
            nursery.end()


@pytest.fixture(scope="session")
def nurseries(child_environment: dict[str, str]) -> Iterator[Nurseries]:
    nurseries = Nurseries(child_environment)
    yield nurseries
    nurseries.end()


@pytest.fixture(scope="module")
def no_leftovers(
    committing_databases: None, nurseries: Nurseries, ledger: Ledger
) -> Iterator[None]:
    """L6: after the module no process, thread or session is left that it started."""
    threads, before = threading.active_count(), sessions()
    yield
    wait_for(lambda: not nurseries.running)
    wait_for(lambda: threading.active_count() <= threads)
    wait_for(lambda: sessions() <= before)


def sessions() -> int:
    """How many connections the test database has beside ours."""
    with connections["default"].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


@pytest.fixture(params=["default", "sqlite"])
def victim(
    request: pytest.FixtureRequest, nurseries: Nurseries, ledger: Ledger
) -> Callable[..., Victim]:
    """A new execution, on each database; without a rule, if one is named."""
    return lambda *rule: Victim(nurseries(request.param), request.param, ledger, *rule)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A Redis of this test alone."""
    with TemporaryDirectory(prefix="saga-") as home:  # a socket's path must be short
        server = RedisServer(Path(home))
        yield server
        server.stop()


@pytest.fixture
def fleet(
    nurseries: Callable[[str], Nursery],
    ledger: Ledger,
    redis_server: RedisServer,
    tmp_path: Path,
) -> Callable[..., Fleet]:
    """A new fleet on a database, for one ``with`` block: ``fleet("default", lease=1.0)``."""

    def made(database: str, **options: Any) -> Fleet:
        alive = tmp_path / "alive"
        return Fleet(nurseries(database), database, ledger, redis_server, alive, **options)

    return made
