"""Battery 16: executions that one event loop drives at once, so that their writes share commits.

A process that dies at any of its statements, and a connection that loses a request or a reply at
any commit: each execution must end as if it had been driven alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, takewhile
from uuid import UUID

import pytest

from tests.faults.children import Nursery, wait_for
from tests.faults.driving import crowd_of
from tests.faults.judge import wrongs
from tests.faults.ledger import Ledger
from tests.faults.proxy import Proxy
from tests.faults.test_kill import places
from tests.faults.test_proxy import database_behind, proxy
from tests.faults.victims import Place, Victim

__all__ = ["proxy"]  # a fixture

SAGAS = ["faults.async", "faults.async_undone"]
LOST = ["request lost", "reply lost"]

pytestmark = pytest.mark.usefixtures("committing_databases", "no_leftovers")


class Crowd(Victim):
    """Several executions, each of them judged."""

    def drive_together(self, saga: str, place: Place | None = None) -> bool:
        """Whether the process died that drove them."""
        return self.drive(saga, "together", place)

    def recover(self, place: Place | None = None) -> bool:
        mine = self.id
        for self.id in crowd_of(mine):
            super().recover()
        self.id = mine
        return False

    @property
    def wrongs(self) -> list[str]:
        return [wrong for id in crowd_of(self.id) for wrong in self._wrongs_of(id)]

    def _wrongs_of(self, id: UUID) -> list[str]:
        return wrongs(id, self._database, list(self._ledger.entries(id)))


@pytest.fixture(params=["default", "sqlite"])
def crowd(
    request: pytest.FixtureRequest, nurseries: Callable[[str], Nursery], ledger: Ledger
) -> Callable[[], Crowd]:
    return lambda: Crowd(nurseries(request.param), request.param, ledger)


@pytest.mark.parametrize("saga", SAGAS)
def test_a_process_that_dies_while_it_drives_several_loses_and_doubles_nothing(
    crowd: Callable[[], Crowd], saga: str, full: bool, figure: Callable[..., None]
) -> None:
    deaths = 0
    for place in places():
        if not full and place[0] % 4:
            continue
        one = crowd()
        if not one.drive_together(saga, place):
            break
        one.recover()
        assert not one.wrongs, place
        deaths += 1
    assert deaths >= (16 if full else 4), f"{saga} makes more statements than that"
    figure("together", kills=deaths, wrongs=0)


class Line:
    """Crowds whose driver speaks to the database through the proxy."""

    def __init__(self, proxy: Proxy, nurseries: Callable[..., Nursery], ledger: Ledger) -> None:
        self._proxy, self._ledger = proxy, ledger
        self._nursery = nurseries("default")
        self._behind = nurseries("default", DATABASE_URL=database_behind(proxy))

    def wrongs(self, at: int, kind: str, rule: str = "") -> list[str] | None:
        """What goes wrong when the n-th commit meets that; None if there are not so many."""
        one = Crowd(self._nursery, "default", self._ledger, rule)
        self._proxy.arm(at, kind, commits=True)
        child = one.start("faults.async", "together", nursery=self._behind)
        wait_for(lambda: isinstance(child.poll(), int))
        if not self._proxy.struck.is_set():
            return None
        status = child.wait()
        one.recover()
        return [*one.wrongs, *([f"it ended with {status}"] if status else [])]


@pytest.fixture
def line(proxy: Proxy, nurseries: Callable[..., Nursery], ledger: Ledger) -> Line:
    return Line(proxy, nurseries, ledger)


@pytest.mark.parametrize("kind", LOST)
def test_a_connection_that_is_lost_at_a_commit_that_several_share_does_no_harm(
    line: Line, kind: str, figure: Callable[..., None]
) -> None:
    for at in count(1):
        found = line.wrongs(at, kind)
        if found is None:
            break
        assert not found, at
        figure("together", lost=1, wrongs=0)
    assert at > 3, "they make more commits than that"


def test_canary_where_a_lost_commit_counts_as_made_it_is_seen(line: Line) -> None:
    rule = "a lost commit that several share is looked for"
    found = (line.wrongs(at, "request lost", rule) for at in count(1))
    assert any(takewhile(lambda wrongs: wrongs is not None, found))
