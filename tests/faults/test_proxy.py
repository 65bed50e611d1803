"""Battery 6: a request to PostgreSQL, or its reply, is lost or late, at every commit.

Late means that another process took over meanwhile.
Lost is what was said and the connection with it. A driver cannot tell the two apart, so it looks
what is stored before it goes on. In full every request is met, the reads and the writes inside of a
transaction too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pytest
from django.db import connections

from django_saga import LeaseLost, StorageUnavailable
from tests.faults.children import Child, Nursery, wait_for
from tests.faults.driving import GAVE_UP
from tests.faults.ledger import Ledger
from tests.faults.proxy import KINDS, Proxy
from tests.faults.sagas import CASES
from tests.faults.victims import Victim
from tests.faults.zombies import outlive

EVERYDAY = [("faults.mixed", "sync"), ("faults.mixed", "async")]
FULL = [(saga, runner) for saga in CASES for runner in ("sync", "async")]
LEASE = 1.0  # seconds; after it the server ends what a late driver keeps open in an atomic step
TRIES = 20

pytestmark = pytest.mark.usefixtures("committing_databases", "no_leftovers")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "runner" in metafunc.fixturenames:
        cases = FULL if metafunc.config.getoption("--full") else EVERYDAY
        metafunc.parametrize(("saga", "runner"), cases)


@pytest.fixture(scope="module")
def proxy(no_leftovers: None) -> Iterator[Proxy]:
    with TemporaryDirectory(prefix="saga-") as folder:
        proxy = Proxy(Path(folder), connections["default"].settings_dict)
        yield proxy
        proxy.end()


def database_behind(proxy: Proxy) -> str:
    """The URL of the test database for who is to reach it through the proxy."""
    server = connections["default"].settings_dict
    login = f"{quote(server['USER'])}:{quote(server['PASSWORD'])}"
    name, folder = quote(server["NAME"]), quote(str(proxy.folder))
    return f"postgres://{login}@/{name}?host={folder}"


class Line:
    """New executions, whose drivers speak to the database through the proxy."""

    def __init__(
        self, proxy: Proxy, nurseries: Callable[..., Nursery], ledger: Ledger, commits: bool
    ) -> None:
        self._proxy, self._nurseries, self._ledger = proxy, nurseries, ledger
        self._commits = commits
        self._url = database_behind(proxy)

    def wrongs(
        self, saga: str, runner: str, at: int, kind: str, rule: str = ""
    ) -> list[str] | None:
        """What goes wrong when that befalls the n-th request; None if there are not so many."""
        for _ in range(TRIES):
            victim = Victim(self._nurseries("default"), "default", self._ledger, rule)
            self._proxy.arm(at, kind, commits=self._commits)
            child = self._start(victim, saga, runner, late=kind.endswith("late"))
            self._wait(child)
            if self._proxy.struck.is_set():
                return self._judge(victim, child, kind)
            if child.wait() == 0:
                return None
            # On a busy machine so short a lease may run out before it gets there.
            assert child.wait() == GAVE_UP[LeaseLost]
        raise AssertionError(f"no driver got as far as {at}")

    def _start(self, victim: Victim, saga: str, runner: str, late: bool) -> Child:
        lease = {"RECOVER_WITH": json.dumps({"LEASE": LEASE})} if late else {}
        nursery = self._nurseries("default", DATABASE_URL=self._url, **lease)
        return victim.start(saga, runner, nursery=nursery)

    def _wait(self, child: Child) -> None:
        """Until the fault has struck, or cannot any more."""
        wait_for(lambda: self._proxy.struck.is_set() or isinstance(child.poll(), int))

    def _judge(self, victim: Victim, child: Child, kind: str) -> list[str]:
        def go_on() -> int | str:
            self._proxy.go_on()
            return child.wait()

        if kind.endswith("late"):
            return outlive(victim, go_on)
        status = child.wait()
        if status == GAVE_UP[StorageUnavailable] and not victim.has_begun:
            victim.recover()  # its caller was told that nobody knows whether it was started
            return victim.wrongs
        return [*victim.wrongs, *([f"it ended with {status}"] if status else [])]


@pytest.fixture
def line(proxy: Proxy, nurseries: Callable[..., Nursery], ledger: Ledger, full: bool) -> Line:
    return Line(proxy, nurseries, ledger, commits=not full)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_or_late_on_the_way_to_the_database_does_no_harm(
    line: Line, saga: str, runner: str, kind: str, figure: Callable[..., None]
) -> None:
    for at in count(1):
        found = line.wrongs(saga, runner, at, kind)
        if found is None:
            break
        assert not found, at
        figure("proxy", **{kind.replace(" ", "_"): 1, "wrongs": 0})
    assert at > 3, f"{saga} makes more commits than that"


def test_canary_where_a_lost_connection_counts_as_a_failure_it_is_seen(line: Line) -> None:
    rule = "a lost connection is no failure"
    for at in count(1):
        wrongs = line.wrongs("faults.mixed", "sync", at, "request lost", rule)
        assert wrongs is not None, "nothing was seen, whichever was lost"
        if any("L3" in wrong for wrong in wrongs):
            break
