"""An exception at every executed line of django_saga, while a saga is driven in every way.

KeyboardInterrupt, SystemExit and CancelledError are interruptions: raised on, and nothing is
compensated because of them. MemoryError, and what RQ raises from a signal handler, are errors that
no handler raised. After any of them the connection serves, and recovery ends the saga as ever.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Group
from django.db import DatabaseError, connections
from rq.timeouts import JobTimeoutException

from django_saga import calling, engine, machine, recover_saga
from django_saga.flow import HandlerRaised
from django_saga.keeper import keeper
from django_saga.models import SagaExecution
from django_saga.recovery import sweep
from django_saga.rq import run_saga
from django_saga.storage import DjangoSagaStorage, SagaStorage
from tests.faults.conftest import Size
from tests.faults.noted import (
    CALLS,
    Trip,
    TripSaga,
    heal,
    let_the_lease_run_out,
    make_storage,
    until,
    violations,
)
from tests.faults.strikes import Strike, striking

pytestmark = pytest.mark.usefixtures("committing_databases")

INTERRUPTIONS = (KeyboardInterrupt, SystemExit, asyncio.CancelledError)
ERRORS = (JobTimeoutException, MemoryError)
STORAGES = ["memory", "sqlite", "default"]

Drive = Callable[["Case"], None]


@dataclass
class Case:
    """One execution that is driven while something strikes."""

    storage: SagaStorage
    fails: bool
    saga_id: UUID = field(default_factory=uuid4)
    others: list[UUID] = field(default_factory=list)
    """Executions that the same sweep claims."""

    @property
    def alias(self) -> str:
        return self.storage.alias if isinstance(self.storage, DjangoSagaStorage) else ""

    @property
    def context(self) -> Trip:
        return Trip(self.alias, self.fails)

    @property
    def saga(self) -> TripSaga:
        return TripSaga(storage=self.storage)


def store(case: Case) -> None:
    """As enqueue() does, but told to nobody."""
    encoded = TripSaga.definition.codec.encode(case.context, limit=10_000)
    state = machine.start(TripSaga.definition.plan, encoded, pending=True)
    for saga_id in (case.saga_id, *case.others):
        assert case.storage.create(saga_id, TripSaga.name, state) is not None


def store_three(case: Case) -> None:
    case.others += [uuid4(), uuid4()]
    store(case)


def lose(case: Case) -> None:
    """A driver that dies while the second step is in flight."""
    steps = case.saga.transaction(case.context, saga_id=case.saga_id)
    next(iter(steps))


def by_run(case: Case) -> None:
    case.saga.run(case.context, saga_id=case.saga_id)


def by_transaction(case: Case) -> None:
    with case.saga.transaction(case.context, saga_id=case.saga_id) as transaction:
        for _ in transaction:
            pass


def by_arun(case: Case) -> None:
    """In a loop in this thread; storage and sync handlers are called in another."""
    asyncio.run(case.saga.arun(case.context, saga_id=case.saga_id))


async def iterate(case: Case) -> None:
    async with case.saga.transaction(case.context, saga_id=case.saga_id) as transaction:
        async for _ in transaction:
            pass


def by_async_transaction(case: Case) -> None:
    asyncio.run(iterate(case))


def beneath_arun(case: Case) -> None:
    """With the loop in another thread; storage and sync handlers are called in this one."""
    async_to_sync(case.saga.arun)(case.context, saga_id=case.saga_id)


def by_recover_saga(case: Case) -> None:
    recover_saga(case.saga_id, storage=case.storage)


def by_sweep(case: Case) -> None:
    for _ in sweep(storage=case.storage, saga=TripSaga.name, inline=True):
        pass


def by_sweep_of_three(case: Case) -> None:
    by_sweep(case)


def by_worker(case: Case) -> None:
    run_saga(str(case.saga_id))


DRIVES: dict[Drive, Callable[[Case], None] | None] = {  # and what comes before
    by_run: None,
    by_transaction: None,
    by_arun: None,
    by_async_transaction: None,
    beneath_arun: None,
    by_recover_saga: lose,
    by_sweep: store,
    by_sweep_of_three: store_three,
    by_worker: store,
}
IN_A_LOOP = (by_arun, by_async_transaction)
# A worker looks nowhere else, and a sweep of three is struck by itself below.
ONLY_ON = {by_worker: "default", by_sweep_of_three: ""}
SWEEPS = (by_sweep, by_sweep_of_three)
STEP_BY_STEP = (by_transaction, by_async_transaction)
COMBINATIONS = [
    pytest.param(name, drive, id=f"{name}-{drive.__name__}")
    for name in STORAGES
    for drive in DRIVES
    if ONLY_ON.get(drive, name) == name
]


class Battery:
    """Strikes one combination at any of its lines, and looks at what is left."""

    def __init__(self, name: str, drive: Drive, fails: bool) -> None:
        self.name, self.drive, self.fails = name, drive, fails
        self.storage = make_storage(name)
        self.points = self.found = self.poisoned = self.run_out = 0
        self.report: list[str] = []
        self.observer = None if name == "memory" else connections.create_connection(name)
        if self.observer is not None:
            self.observer.inc_thread_sharing()  # one thread looks after the other
        self._undisturbed()  # it fills caches; and starting the keeper takes some lines more
        undisturbed = min((self._undisturbed() for _ in range(3)), key=lambda strike: strike.lines)
        self.lines, self.places = undisturbed.lines, undisturbed.places
        self.threads = threads()

    def _undisturbed(self) -> Strike:
        case = self._case()
        saga_ids = (case.saga_id, *case.others)
        with striking(None, phase=lambda: sum(len(CALLS[id]) for id in saga_ids)) as strike:
            self._driven(case)
        assert not self._violations(case, KeyboardInterrupt)
        return strike

    def _case(self) -> Case:
        case = Case(self.storage, self.fails)
        before = DRIVES[self.drive]
        if before is not None:
            before(case)
            if before is lose:
                let_the_lease_run_out(case.saga_id, self.storage)
        return case

    def _driven(self, case: Case) -> BaseException | None:
        try:
            self.drive(case)
        except BaseException as error:
            return error
        return None

    def strike(self, at: int, error: type[BaseException], within: str = "") -> None:
        for _ in range(30):  # the lines are not quite the same each time: a wait may be over
            case = self._case()
            with striking(at, error, within) as strike:
                raised = self._driven(case)
            if strike.fired:
                break
            self._healed(case)
        assert strike.fired, f"nothing struck at {at} of {self.lines}"
        self.points += 1
        found = self._left_behind(case)
        # A sweep goes on to the next where an async handler lets a CancelledError out.
        swallowed = self.drive in SWEEPS and error is asyncio.CancelledError
        if error in INTERRUPTIONS and not swallowed and not isinstance(raised, error):
            found.append(f"it was not raised on, but {raised!r} was")
        raised = None  # its traceback holds all that was being done
        found += self._violations(case, error)
        self.found += len(found)
        self.report += [f"{error.__name__} at {strike.fired} ({at}): {what}" for what in found]

    def _violations(self, case: Case, error: type[BaseException]) -> list[str]:
        status = self._healed(case)
        turned = self.drive in STEP_BY_STEP and error in ERRORS
        return violations(
            case.saga_id, self.storage, status, fails=self.fails, may_turn_back=turned
        )

    def _healed(self, case: Case) -> str:
        for other in case.others:
            heal(other, self.storage)
        return heal(case.saga_id, self.storage)

    def _left_behind(self, case: Case) -> list[str]:
        found = []
        if signal.getitimer(signal.ITIMER_REAL)[0] or signal.getsignal(signal.SIGALRM) != RINGS:
            found.append("an alarm was left behind")
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, RINGS)
        if any(run.leased for run in keeper._watched.values()):
            keeper._watched.clear()
            found.append("the keeper goes on to renew the lease of what nobody drives")
        if case.alias:
            if not self._looked(partial(self._serves, case)):
                self.poisoned += 1
                found.append("the connection is poisoned")
            rows = SagaExecution.objects.using(case.alias).filter(pk=case.saga_id)
            active = rows.filter(status__in=machine.ACTIVE)
            self.run_out += active.filter(lease_until__isnull=False).count()
        return found

    def _looked(self, serves: Callable[[], bool]) -> bool:
        async def look() -> bool:
            return await sync_to_async(serves)()

        return asyncio.run(look()) if self.drive in IN_A_LOOP else serves()

    def _serves(self, case: Case) -> bool:
        """Whether a write on this thread's connection is there for others at once."""
        connection = connections[case.alias]
        name = f"after {case.saga_id}"
        try:
            Group.objects.using(case.alias).create(name=name)
            assert self.observer is not None
            with self.observer.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM auth_group WHERE name = %s", [name])
                (there,) = cursor.fetchone()
            return bool(there) and connection.get_autocommit() and not connection.in_atomic_block
        except DatabaseError:
            return False
        finally:
            if connection.in_atomic_block or not connection.get_autocommit():
                connection.in_atomic_block = False
                connection.close()

    def close(self) -> None:
        """Wait until the keeper has ended, and all that the struck calls left running."""
        if self.observer is not None:
            self.observer.close()
        until(keeper_ended)
        until(lambda: not threads() - self.threads or gc.collect() < 0)  # a traceback may hold one


def keeper_ended() -> bool:
    """Once it has, which it does some looks after nothing is watched any more."""
    until(lambda: keeper._sooner.set() or keeper._thread is None)  # type: ignore[func-returns-value]
    return not keeper._watched


RINGS = signal.getsignal(signal.SIGALRM)


def threads() -> set[threading.Thread]:
    """All but the keeper, which ends by itself."""
    return {t for t in threading.enumerate() if t.name != "django-saga-keeper"}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is written, every line of it, and not kept: its tracebacks hold a loop's thread."""
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda logger, record: None)


def told(battery: Battery, figure: Any) -> None:
    figure(
        f"interrupts on {battery.name}",
        points=battery.points,
        violations=battery.found,
        poisoned_connections=battery.poisoned,
        leaked_threads=0,  # or closing the battery would have failed
        leases_left_to_run_out=battery.run_out,
    )
    assert not battery.report, "\n".join(battery.report)


@pytest.mark.parametrize(("name", "drive"), COMBINATIONS)
def test_an_exception_at_any_line_leaves_nothing_poisoned_and_the_saga_to_recovery(
    name: str, drive: Drive, size: Size, dice: random.Random, figure: Any
) -> None:
    fails, ends = Battery(name, drive, True), Battery(name, drive, False)
    # Up to where one of the two fails they are the same.
    points = [(fails, at) for at in fails.places.values()]
    points += [(ends, at) for place, at in ends.places.items() if place not in fails.places]
    every = [(*point, error) for error in (*INTERRUPTIONS, *ERRORS) for point in points]
    for battery, at, error in dice.sample(every, min(len(every), size("lines", 8, len(every)))):
        battery.strike(at, error)
    for battery in (fails, ends):
        battery.close()
        told(battery, figure)


def test_ctrl_c_at_every_line_of_a_run_leaves_nothing_behind(figure: Any) -> None:
    battery = Battery("memory", by_run, False)
    for at in range(1, battery.lines + 1):
        battery.strike(at, KeyboardInterrupt)
    battery.close()
    told(battery, figure)


def test_ctrl_c_at_every_line_of_the_start_of_the_keeper_leaves_nothing_behind(figure: Any) -> None:
    battery = Battery("memory", by_run, False)
    keeper_ended()
    with striking(None, within="keeper.py") as strike:
        by_run(battery._case())
    for at in range(1, strike.lines + 1):
        keeper_ended()
        battery.strike(at, KeyboardInterrupt, "keeper.py")
    battery.close()
    told(battery, figure)


def test_ctrl_c_at_every_line_of_a_sweep_leaves_nothing_behind(figure: Any) -> None:
    """The keeper goes on to renew, for ever, the lease of whatever it is not told to forget."""
    battery = Battery("memory", by_sweep_of_three, False)
    case = battery._case()
    with striking(None, within="recovery.py") as strike:
        by_sweep(case)
    for at in range(1, strike.lines + 1):
        battery.strike(at, KeyboardInterrupt, "recovery.py")
    battery.close()
    told(battery, figure)


# Canaries: with one rule switched off, the battery must see it


def sees(what: str, name: str, error: type[BaseException]) -> bool:
    battery = Battery(name, by_run, False)
    for at in range(1, battery.lines + 1, 11):
        battery.strike(at, error)
        if any(what in line for line in battery.report):
            break
    battery.close()
    return any(what in line for line in battery.report)


def test_the_battery_sees_an_interruption_that_is_taken_for_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = calling.call_handler

    def failing(*args: Any) -> Any:
        try:
            return call(*args)
        except KeyboardInterrupt as error:
            raise HandlerRaised(RuntimeError()) from error

    monkeypatch.setattr(calling, "call_handler", failing)
    assert sees("it ended as FAILED", "memory", KeyboardInterrupt)


def test_the_battery_sees_an_error_of_our_own_lines_that_is_taken_for_the_handlers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calling, "_raised_by", lambda called, error: HandlerRaised(error))
    assert sees("it ended as FAILED", "memory", MemoryError)


def test_the_battery_sees_an_attempt_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = engine.let_go

    def forgetful(run: Any, **options: Any) -> Any:
        return let_go(run, **{**options, "unstarted": True})

    monkeypatch.setattr(engine, "let_go", forgetful)
    assert sees("called twice", "memory", SystemExit)


def test_the_battery_sees_a_connection_that_is_left_in_a_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def half_way(self: DjangoSagaStorage, checkpoint: Any, *, inside: bool = False) -> Any:
        if inside:
            return whole(self, checkpoint, inside=inside)
        connection = self._connection
        connection.set_autocommit(False)
        saved = whole(self, checkpoint, inside=True)
        connection.commit()
        connection.set_autocommit(True)
        return saved

    whole = DjangoSagaStorage.checkpoint
    monkeypatch.setattr(DjangoSagaStorage, "checkpoint", half_way)
    assert sees("poisoned", "default", KeyboardInterrupt)
