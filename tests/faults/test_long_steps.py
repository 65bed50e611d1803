"""Battery 11: steps that take longer than their lease, while somebody wants it all the time.

The recoverer is this process; each driver is another. A long step ends when it was tried in vain
often enough after its first lease would have run out, by the clock of the database.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import new_class
from typing import Any

import pytest
from django.db.models.functions import Now

from django_saga import LeaseLost, Saga, SagaAlreadyRunning, SagaStepHandler, recover_saga
from django_saga.models import SagaExecution
from django_saga.recovery import sweep
from django_saga.steps import current_step
from django_saga.storage import DjangoSagaStorage
from tests.faults.children import Child, Nursery, wait_for
from tests.faults.driving import GAVE_UP, RUNNERS, drive
from tests.faults.ledger import Ledger
from tests.faults.options import Size
from tests.faults.sagas import D1, JUDGED, R2, AsyncRemote, Remote, Trial, case, note
from tests.faults.victims import Victim

LEASE = 3.0  # seconds; short, but no pause of a busy machine
LEASES = 3  # how long a long step takes at least, counted in leases
DATABASES = ("default", "sqlite")
TRIES = 5  # in vain, at least, once its first lease would have run out

__all__ = ["drive"]  # called by name, so that a process that drives knows these sagas

pytestmark = pytest.mark.usefixtures("committing_databases", "no_leftovers")


# The steps


def gate(address: str, saga_id: object) -> Path:
    """What is there once the long step of an execution may end."""
    return Path(f"{address}.{saga_id}")


def may_end(context: Trial) -> bool:
    """Also where it was called again: nobody opens the gate then."""
    step = current_step()
    return step.attempt > 1 or gate(context.ledger, step.saga_id).exists()


class Long(Remote):
    """Waits in the way of its subclass until it may end."""

    def act(self, context: Trial) -> None:
        note(context)
        while not may_end(context):
            self.wait()

    def wait(self) -> None:
        time.sleep(0.01)


class Computing(Long):
    """Never lets go of the interpreter by itself."""

    def wait(self) -> None:
        sum(number * number for number in range(20_000))


class Forking(Long):
    def wait(self) -> None:
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        super().wait()


class Calling(Long):
    """Has another program do it."""

    def wait(self) -> None:
        subprocess.run(["sleep", "0.05"], check=True)


class AsyncLong(AsyncRemote):
    async def act(self, context: Trial) -> None:
        note(context)
        while not may_end(context):
            await asyncio.sleep(0.01)


class Limited(Long):
    """Hangs, and has a timeout."""

    timeout = LEASES * LEASE


class AsyncLimited(AsyncLong):
    timeout = LEASES * LEASE


class ShortlyLimited(Limited):
    timeout = LEASE / 2


def around(step: type[SagaStepHandler[Any]]) -> type[Saga[Trial]]:
    """A saga with that step in its middle."""
    body = {
        "__module__": __name__,
        "name": f"faults.{step.__name__.lower()}",
        "steps": [D1, step, R2],
    }
    return new_class(f"{step.__name__}Saga", (Saga[Trial],), exec_body=lambda of: of.update(body))


LONG = (Long, Computing, Forking, Calling, AsyncLong)
EVERYDAY = [
    [
        (Long, "rq"),
        (AsyncLong, "async"),
        (Computing, "sync"),
        (Forking, "sync"),
        (Calling, "async"),
    ]
]
FULL = [[(step, runner) for step in LONG] for runner in RUNNERS]
HANGING = [(Limited, "sync"), (Limited, "rq"), (AsyncLimited, "sync"), (AsyncLimited, "async")]
SAGAS = {step: around(step) for step in (*LONG, Limited, AsyncLimited, ShortlyLimited)}
JUDGED |= {
    saga.name: case(saga) if step in (Limited, AsyncLimited) else case(saga, "D1", step.name, "R2")
    for step, saga in SAGAS.items()
}


class Wanted:
    """An execution that one process drives, and this one wants."""

    def __init__(self, victim: Victim, child: Child, database: str, gate: Path) -> None:
        self.victim, self.child = victim, child
        self.tries, self.was_taken, self.is_long = 0, False, False
        self._storage, self._gate = DjangoSagaStorage(database), gate

    def await_long_step(self) -> None:
        """Wait until it has been called."""
        wait_for(lambda: any(call.action == "act" for call in self.victim.entries))
        row = self._row
        self._token, self._saga, self._until = row.token, row.saga, row.lease_until

    def want(self) -> None:
        """Try to get it, by its id and in a sweep."""
        now = self._row.now
        self.is_long = now > self._until + timedelta(seconds=(LEASES - 1) * LEASE)
        try:
            recover_saga(self.victim.id, storage=self._storage)
        except SagaAlreadyRunning:
            self.tries += now > self._until
        swept = [one.saga_id for one in sweep(saga=self._saga, storage=self._storage)]
        self.was_taken |= bool(swept) or self._row.token != self._token

    @property
    def is_over(self) -> bool:
        tried = self.is_long and self.tries >= TRIES
        return tried or self.was_taken or self.victim.has_ended

    def let_end(self) -> int | str:
        """The status with which its driver ends."""
        self._gate.touch()
        return self.child.wait()

    def judge(self) -> list[str]:
        """What is wrong with it, which nobody may have got, once it is over."""
        status, found = self.let_end(), self.victim.wrongs
        if self.was_taken or self._row.token != self._token:
            found.append("it was taken over")
        if status != 0:
            found.append(f"its driver ended with {status}")
        calls = Counter(self.victim.entries)
        return found + [f"{times} times: {call}" for call, times in calls.items() if times > 1]

    @property
    def _row(self) -> Any:
        """The row, and what the database's clock says."""
        rows = SagaExecution.objects.using(self._storage.alias)
        return rows.annotate(now=Now()).get(pk=self.victim.id)


Begin = Callable[..., "list[Wanted]"]


@pytest.fixture
def begin(nurseries: Callable[..., Nursery], ledger: Ledger, settings: Any) -> Iterator[Begin]:
    """Has processes drive the saga around a step, up to that: one on each of the databases, so that
    one wait does for both."""
    settings.DJANGO_SAGA = {"LEASE": LEASE}  # of the recoverer
    begun: list[Wanted] = []

    def begin(
        step: type[SagaStepHandler[Any]],
        runner: str,
        without: str = "",
        databases: Sequence[str] = DATABASES,
    ) -> list[Wanted]:
        several = [begin_on(database, step, runner, without) for database in databases]
        begun.extend(several)
        return several

    def begin_on(
        database: str, step: type[SagaStepHandler[Any]], runner: str, without: str
    ) -> Wanted:
        nursery = nurseries(database, RECOVER_WITH=json.dumps(settings.DJANGO_SAGA))
        victim = Victim(nursery, database, ledger)
        child = nursery.start(
            f"{__name__}.drive",
            saga=SAGAS[step].name,
            saga_id=str(victim.id),
            ledger=ledger.address,
            runner=runner,
            queue=f"faults-{victim.id}",
            without=without,
        )
        return Wanted(victim, child, database, gate(ledger.address, victim.id))

    yield begin
    for wanted in begun:
        wanted.child.signal(signal.SIGKILL)


def want_all(several: Sequence[Wanted]) -> None:
    """Want each of them again and again, until each is over."""
    for one in several:
        one.await_long_step()

    def are_over() -> bool:
        left = [one for one in several if not one.is_over]
        for one in left:
            one.want()
        return not left

    wait_for(are_over)


@pytest.mark.parametrize("database", DATABASES)  # not both at once: these steps work
def test_nobody_gets_a_saga_in_a_long_step_whatever_that_does(
    begin: Begin, database: str, full: bool, size: Size, figure: Callable[..., None]
) -> None:
    for _ in range(size("long_steps", everyday=1, full_run=10)):
        for some in FULL if full else EVERYDAY:
            several = [
                one for step, runner in some for one in begin(step, runner, databases=[database])
            ]
            want_all(several)
            assert not [wrong for one in several for wrong in one.judge()]
            assert all(one.tries >= TRIES for one in several)
            tries = sum(one.tries for one in several)
            figure("long steps", steps=len(several), tries=tries, wrongs=0)


def test_nobody_gets_a_saga_whose_step_hangs_until_its_timeout_ends_that(
    begin: Begin, figure: Callable[..., None]
) -> None:
    """It does under an event loop, and in the main thread."""
    several = [one for step, runner in HANGING for one in begin(step, runner)]
    want_all(several)
    assert not [wrong for one in several for wrong in one.judge()]
    assert all(one.tries for one in several), "the timeout came before its lease was past"
    figure("long steps", ended_by_a_timeout=len(several), wrongs=0)


def test_a_saga_is_taken_over_after_the_timeout_of_a_step_that_nothing_can_end(
    begin: Begin, figure: Callable[..., None]
) -> None:
    """In a thread that is not the main one; what comes of it in the end is not written any more."""
    several = begin(ShortlyLimited, "async")
    want_all(several)
    for one in several:
        assert one.was_taken
        assert one.victim.has_ended
        stored = one.victim.stored
        assert one.let_end() == GAVE_UP[LeaseLost]
        assert one.victim.stored == stored
        assert not one.victim.wrongs
        acts = [call.key for call in one.victim.entries if call.step == ShortlyLimited.name]
        assert acts == [f"{one.victim.id}:{ShortlyLimited.name}:act"] * 2
    figure("long steps", taken_over_after_a_timeout=len(several), wrongs=0)


def test_canary_without_the_keeper_it_is_seen(begin: Begin) -> None:
    rule = "a long steps lease is renewed"
    several = [one for step in (Long, AsyncLong) for one in begin(step, "sync", rule)]
    want_all(several)
    for one in several:
        found = one.judge()
        assert "it was taken over" in found
        assert any("2 times" in wrong for wrong in found)
