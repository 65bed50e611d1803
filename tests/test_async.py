"""Cancellation, concurrency, timeouts, the mixing of both kinds of code, and signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings as django_settings
from django.db import connections
from django.test import override_settings

from django_saga import (
    LeaseLost,
    Retry,
    Saga,
    SagaAlreadyRunning,
    SagaFailed,
    StorageUnavailable,
    arecover_saga,
    current_step,
    machine,
    recover_saga,
    signals,
)
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage, SagaStorage
from django_saga.storage.base import Creation
from django_saga.together import Turn, turn_of
from tests.steps import Calls, Log, make_step, raises

pytestmark = pytest.mark.usefixtures("committing_databases")


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture(params=list(django_settings.DATABASES))
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def adhoc(storage: SagaStorage, *steps: Any) -> Saga[Any]:
    return Saga(steps=steps, storage=storage, name="tests.async")


@pytest.mark.parametrize("waited", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
def test_a_cancelled_driver_finishes_the_step_in_flight_and_compensates_nothing(
    storage: SagaStorage, calls: Calls, is_async: bool, waited: bool
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def act(context: Log) -> None:
        begun.set()
        assert may_end.wait(30)

    refuse = raises(OSError("down"), times=1 if waited else 0)
    first = make_step("Z", calls, act=refuse, retry=Retry(attempts=2, delay=0.01))
    step = make_step("A", calls, act=act)
    if is_async:

        async def aact(self: Any, context: Log) -> None:
            calls.note()
            begun.set()
            await asyncio.to_thread(may_end.wait, 30)

        step.act = aact  # type: ignore[method-assign]
    saga = adhoc(storage, first, step, make_step("B", calls))
    saga_id = uuid.uuid4()

    async def view() -> None:
        running = asyncio.create_task(saga.arun(Log(), saga_id=saga_id))
        await asyncio.to_thread(begun.wait, 30)
        running.cancel()
        await asyncio.sleep(0)
        running.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    async_to_sync(view)()
    assert calls[-2:] == ["act Z", "act A"]
    assert [r.outcome for r in storage.history(saga_id)][-2:] == ["DONE", "DONE"]
    assert saga.run(Log(), saga_id=saga_id).status == "COMPLETED", "the lease was released"
    assert calls[-3:] == ["act Z", "act A", "act B"]


@pytest.mark.parametrize("way", ["arun", "transaction"])
def test_a_driver_that_is_cancelled_while_it_starts_gives_up_its_lease(
    storage: SagaStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The row is stored, but nobody is left to drive it: others need not wait for the lease."""
    begun, may_end = threading.Event(), threading.Event()
    create = storage.create

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert may_end.wait(30)
        return create(*args, **kwargs)

    saga, saga_id = adhoc(storage, make_step("A", calls)), uuid.uuid4()
    monkeypatch.setattr(storage, "create", slow)
    monkeypatch.setattr(type(storage), "blocking", True)  # in a thread, whatever the storage

    async def iterate() -> None:
        async with saga.transaction(Log(), saga_id=saga_id) as transaction:
            async for _ in transaction:
                pass

    async def view() -> None:
        starting = saga.arun(Log(), saga_id=saga_id) if way == "arun" else iterate()
        running = asyncio.create_task(starting)
        await asyncio.to_thread(begun.wait, 30)
        running.cancel()
        await asyncio.sleep(0)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    async_to_sync(view)()
    monkeypatch.undo()
    assert calls == []
    assert saga.run(Log(), saga_id=saga_id).status == "COMPLETED", "the lease was released"
    assert calls == ["act A"]
    assert [r.outcome for r in storage.history(saga_id)] == ["DONE"]


def test_a_cancelled_wait_ends_at_once_and_hands_over(
    storage: SagaStorage, calls: Calls, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"INLINE_WAIT": 3600}
    step = make_step("A", calls, act=raises(OSError("x")), retry=Retry(attempts=9, delay=600))
    saga, saga_id = adhoc(storage, step), uuid.uuid4()

    async def view() -> None:
        running = asyncio.create_task(saga.arun(Log(), saga_id=saga_id))
        while not await sync_to_async(storage.history)(saga_id):
            await asyncio.sleep(0.01)
        for _ in range(20):  # turns in which it could go on, if it did not wait
            await sync_to_async(storage.history)(saga_id)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    async_to_sync(view)()
    assert calls == ["act A"]
    claim = storage.acquire(saga_id, driver="test", lease=60)
    assert not claim.state.in_flight
    assert claim.wait > 0


@pytest.mark.parametrize("when", ["acquires", "acts"])
def test_a_recovery_that_is_cancelled_ends_at_its_next_checkpoint(
    storage: SagaStorage, calls: Calls, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It has no run yet while it acquires, and is told of one only by the first call."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert may_end.wait(30)
        return acquire(*args, **kwargs) if when == "acquires" else None

    class Recovered(Saga[Log]):
        name = "tests.cancelled"
        steps = [
            make_step("A", calls),
            make_step("B", calls, act=slow if when == "acts" else None),
            make_step("C", calls),
        ]

    with Recovered(storage=storage).transaction(Log()) as transaction:
        next(iter(transaction))
    acquire = storage.acquire
    if when == "acquires":
        monkeypatch.setattr(storage, "acquire", slow)
    monkeypatch.setattr(type(storage), "blocking", True)  # in a thread, whatever the storage

    async def view() -> None:
        recovering = asyncio.create_task(arecover_saga(transaction.saga_id, storage=storage))
        await asyncio.to_thread(begun.wait, 30)
        recovering.cancel()
        await asyncio.sleep(0)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await recovering

    async_to_sync(view)()
    monkeypatch.undo()
    assert calls == ["act A", "act B"]
    assert recover_saga(transaction.saga_id, storage=storage).status == "COMPLETED"
    assert calls == ["act A", "act B", "act C"]


def test_many_sagas_of_both_kinds_share_a_loop(storage: SagaStorage, calls: Calls) -> None:
    steps = [make_step(f"S{n}", calls, is_async=bool(n % 2)) for n in range(4)]
    saga = adhoc(storage, *steps)

    async def view() -> list[Any]:
        return await asyncio.gather(*[asyncio.wait_for(saga.arun(Log()), 60) for _ in range(20)])

    executions = async_to_sync(view)()
    assert [execution.status for execution in executions] == ["COMPLETED"] * 20
    assert len(calls) == 80


def test_sagas_in_a_loop_write_together(calls: Calls, database: str) -> None:
    storage = Counting(database)
    saga = adhoc(storage, *(make_step(f"S{n}", calls, is_async=True) for n in range(3)))

    async def view() -> list[Any]:
        return await asyncio.gather(*[saga.arun(Log()) for _ in range(20)])

    executions = async_to_sync(view)()
    assert [execution.status for execution in executions] == ["COMPLETED"] * 20
    assert sum(storage.sizes) < 80, "who comes first writes alone"
    assert max(storage.sizes) > 1
    for execution in executions:
        assert [r.step for r in storage.history(execution.id)] == ["S0", "S1", "S2"]
        stored = SagaExecution.objects.using(database).get(pk=execution.id)
        assert (stored.status, stored.updated_at) == ("COMPLETED", execution.updated_at)


def test_what_is_written_together_goes_where_the_router_sends_each(calls: Calls) -> None:
    """A router may look at who is served, which a context variable tells."""
    storage, tenant = DjangoSagaStorage(), ContextVar("tenant", default="default")

    class Router:
        def db_for_write(self, model: Any, **hints: Any) -> str:
            return tenant.get()

    saga = adhoc(storage, *(make_step(f"S{n}", calls, is_async=True) for n in range(3)))

    async def serve(alias: str) -> tuple[str, uuid.UUID]:
        tenant.set(alias)
        return alias, (await saga.arun(Log())).id

    async def view() -> list[tuple[str, uuid.UUID]]:
        return await asyncio.gather(*map(serve, ("default", "sqlite") * 10))

    with override_settings(DATABASE_ROUTERS=[Router()]):
        served = async_to_sync(view)()
    for alias, saga_id in served:
        assert SagaExecution.objects.using(alias).get(pk=saga_id).status == "COMPLETED"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_closed_leaves_nothing_behind_that_waits(calls: Calls) -> None:
    async def wait(self: Any, context: Log) -> None:
        calls.note()
        await asyncio.Event().wait()

    step = make_step("A", calls)
    step.act = wait  # type: ignore[method-assign]
    driving = adhoc(MemorySagaStorage(), step).arun(Log())

    async def begin() -> None:
        tasks.append(asyncio.ensure_future(driving))
        while not calls:
            await asyncio.sleep(0)

    tasks: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    driving.close()  # as the garbage collector does
    tasks.clear()
    gc.collect()
    assert calls == ["act A"]


class Counting(DjangoSagaStorage):
    """Notes how many writes share a transaction."""

    def __init__(self, alias: str) -> None:
        super().__init__(alias)
        self.sizes: list[int] = []

    def write_together(self, writes: Any) -> Any:
        self.sizes.append(len(writes))
        return super().write_together(writes)


def test_a_storage_that_loses_an_answer_fails_what_waits_for_it(calls: Calls) -> None:
    class Forgetful(DjangoSagaStorage):
        def write_together(self, writes: Any) -> Any:
            return super().write_together(writes)[1:]

    saga = adhoc(Forgetful(), make_step("A", calls, is_async=True))

    async def view() -> list[Any]:
        both = (saga.arun(Log()) for _ in range(3))
        return await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 60)

    assert any(isinstance(came, ValueError) for came in async_to_sync(view)())


def test_who_waits_for_the_thread_is_not_waited_for_in_it(storage: SagaStorage) -> None:
    """A sync handler holds the thread for which the others' writes wait, and drives a saga."""
    calls = Calls()
    inner = adhoc(storage, make_step("In", calls, is_async=True))

    def nested(context: Log) -> None:
        async_to_sync(inner.arun)(Log())

    outer = adhoc(storage, make_step("Out", calls, act=nested), make_step("Next", calls))
    other = adhoc(storage, *(make_step(f"S{n}", calls, is_async=True) for n in range(4)))

    async def view() -> None:
        both = (saga.arun(Log()) for saga in (outer, other) for _ in range(5))
        await asyncio.wait_for(asyncio.gather(*both), 60)

    asyncio.run(view())
    assert calls.count("act In") == 5


def test_a_turn_whose_task_is_cancelled_before_it_begins_is_taken_by_another() -> None:
    """As a loop that shuts down cancels every task."""
    storage = MemorySagaStorage()
    state = machine.start((("A",),), "{}")

    async def in_thread(function: Any) -> Any:
        return function()

    async def view() -> Any:
        turn = Turn(storage, in_thread)
        with turn:
            assert turn_of(storage) is turn
            came = turn.wait(Creation(id=uuid.uuid4(), saga="tests.async", state=state))
        (task,) = asyncio.all_tasks() - {asyncio.current_task()}
        task.cancel()
        claim = await asyncio.wait_for(came, 60)
        async with asyncio.timeout(60):
            while turn_of(storage) is not None:
                await asyncio.sleep(0)
        return claim

    assert asyncio.run(view()).token == 1


def test_sync_and_async_code_nest_without_deadlock(storage: SagaStorage, calls: Calls) -> None:
    inner = adhoc(storage, make_step("In", calls), make_step("Ain", calls, is_async=True))

    def nested(context: Log) -> None:
        inner.run(Log())

    async def nested_async(self: Any, context: Log) -> None:
        await inner.arun(Log())
        await sync_to_async(inner.run)(Log())

    outer = adhoc(
        storage,
        make_step("Out", calls, act=nested),
        make_step("Aout", calls, is_async=True),
    )
    outer.definition.steps["Aout"].act = nested_async  # type: ignore[method-assign]

    async def view() -> None:
        await outer.arun(Log())
        await sync_to_async(outer.run)(Log())

    outer.run(Log())
    async_to_sync(view)()
    assert calls.count("act In") == calls.count("act Ain") == 9


def test_a_handler_whose_lease_ran_out_while_it_waited_for_a_thread_is_not_called(
    calls: Calls, settings: Any
) -> None:
    """Another may drive by now: sync code of a whole loop shares one thread, which may be busy."""
    settings.DJANGO_SAGA = {"LEASE": 0.1}

    class Unrenewed(MemorySagaStorage):
        def renew(self, *args: Any, **options: Any) -> Any:
            raise StorageUnavailable("away")

    storage, saga_id = Unrenewed(), uuid.uuid4()
    busy, stored = threading.Event(), threading.Event()

    def until_it_is_taken_over() -> None:
        busy.set()
        assert stored.wait(30)
        while True:
            with suppress(SagaAlreadyRunning):
                storage.acquire(saga_id, driver="another", lease=60)
                return
            time.sleep(0.01)

    async def view() -> None:
        occupying = asyncio.create_task(sync_to_async(until_it_is_taken_over)())
        await asyncio.to_thread(busy.wait, 30)
        running = asyncio.create_task(
            adhoc(storage, make_step("A", calls)).arun(Log(), saga_id=saga_id)
        )
        while saga_id not in storage._rows:
            await asyncio.sleep(0)
        stored.set()
        with pytest.raises(LeaseLost) as lost:
            await running
        assert str(lost.value) == (
            f"Saga execution {saga_id}: its lease ran out while step A waited for a thread."
        )
        await occupying

    asyncio.run(view())
    assert calls == []


def test_a_timeout_ends_an_async_handler_under_both_drivers(
    storage: SagaStorage, calls: Calls
) -> None:
    async def hang(self: Any, context: Log) -> None:
        calls.note()
        await asyncio.sleep(600)

    step = make_step("A", calls, is_async=True, timeout=0.05)
    step.act = hang  # type: ignore[method-assign]
    with pytest.raises(SagaFailed, match="TimeoutError"):
        adhoc(storage, step).run(Log())
    with pytest.raises(SagaFailed, match="TimeoutError"):
        async_to_sync(adhoc(storage, step).arun)(Log())
    assert calls == ["act A", "compensate A"] * 2, "its outcome is unknown"


def test_a_timeout_ends_a_sync_handler_in_the_main_thread(
    storage: SagaStorage, calls: Calls
) -> None:
    def hang(context: Log) -> None:
        try:
            time.sleep(600)
        except Exception:  # what a careless handler does must not swallow it
            calls.append("swallowed")

    step = make_step("A", calls, act=hang, timeout=0.05)
    with pytest.raises(SagaFailed, match=r"longer than its timeout of 0.05 s"):
        adhoc(storage, step).run(Log())
    assert calls == ["act A", "compensate A"]


def test_a_late_sync_handler_in_another_thread_is_logged_and_done(
    storage: SagaStorage, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    def slow(context: Log) -> None:
        deadline = current_step().deadline
        while deadline is not None and time.monotonic() < deadline:
            pass

    steps = [make_step("A", calls, timeout=600), make_step("B", calls, act=slow, timeout=0.05)]
    saga = adhoc(storage, *steps)
    # Not by async_to_sync: that runs sync handlers in this thread, where the alarm can ring.
    with caplog.at_level(logging.WARNING, "django_saga"), ThreadPoolExecutor(1) as pool:
        execution = pool.submit(saga.run, Log()).result()
        pool.submit(connections.close_all).result()
    assert execution.status == "COMPLETED"
    (late,) = [line for line in caplog.records if line.name == "django_saga.calling"]
    assert late.getMessage() == (
        f"Saga {execution.id}: act of step B took longer than its timeout of 0.05 s, and is done"
    )


def test_the_alarm_spares_the_database_layer_and_keeps_the_connection_sound(calls: Calls) -> None:
    from django.db import connection

    def in_query(context: Log) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.3)")
        calls.append("query done")
        time.sleep(600)

    with pytest.raises(SagaFailed):
        adhoc(DjangoSagaStorage(), make_step("A", calls, act=in_query, timeout=0.05)).run(Log())
    assert calls == ["act A", "query done", "compensate A"]
    assert connection.is_usable()
    assert not connection.in_atomic_block


@pytest.fixture
def events() -> Iterator[list[tuple[str, str]]]:
    """The signals that were sent, to a sync and to an async receiver."""
    seen: list[tuple[str, str]] = []

    def receive(sender: Any, signal: Any, execution: Any, **extra: Any) -> None:
        record = extra.get("record")
        seen.append((names[signal], str(record) if record else execution.status))

    async def areceive(sender: Any, signal: Any, **extra: Any) -> None:
        seen.append((names[signal], "async"))

    def broken(**extra: Any) -> None:
        raise RuntimeError("a receiver that fails")

    names = {
        value: key
        for key, value in vars(signals).items()
        if key.startswith("s") and key != "signals"
    }
    for signal in names:
        signal.connect(receive)
        signal.connect(areceive)
        signal.connect(broken)
    yield seen
    for signal in names:
        signal.disconnect(receive)
        signal.disconnect(areceive)
        signal.disconnect(broken)


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_signals_are_sent_after_each_commit_to_receivers_of_both_kinds_robustly(
    storage: SagaStorage,
    calls: Calls,
    events: list[tuple[str, str]],
    driver: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saga = adhoc(
        storage, make_step("A", calls), make_step("B", calls, act=raises(RuntimeError("no")))
    )
    with pytest.raises(SagaFailed):
        saga.run(Log()) if driver == "sync" else async_to_sync(saga.arun)(Log())
    assert [event for event in events if event[1] != "async"] == [
        ("saga_started", "RUNNING"),
        ("step_completed", "A.act #1 DONE"),
        ("step_failed", "B.act #1 FAILED"),
        ("saga_compensating", "COMPENSATING"),
        ("step_compensated", "A.compensate #1 DONE"),
        ("saga_failed", "FAILED"),
    ]
    assert len(events) == 12
    faults = [line for line in caplog.records if line.name == "django_saga.drivers"]
    assert len(faults) == 6
    for line, (name, _) in zip(faults, events[::2], strict=True):
        told = rf"A receiver of {name} failed: <function .*broken at 0x\w+>\nTraceback "
        assert re.match(told, line.getMessage())
        assert "RuntimeError: a receiver that fails" in line.getMessage()


@pytest.mark.parametrize("driver", ["sync", "async"])
def test_the_sender_of_a_signal_is_the_class_of_its_saga(
    storage: SagaStorage, calls: Calls, driver: str
) -> None:
    class Heard(Saga[Log]):
        name = "tests.heard"
        steps = [make_step("A", calls)]

    class Unheard(Saga[Log]):
        name = "tests.unheard"
        steps = [make_step("A", calls)]

    ended: list[Any] = []

    def receive(sender: Any, execution: Any, **extra: Any) -> None:
        ended.append((sender, execution.saga))

    signals.saga_completed.connect(receive, sender=Heard)
    for saga in (Unheard(storage=storage), Heard(storage=storage)):
        saga.run(Log()) if driver == "sync" else async_to_sync(saga.arun)(Log())
    signals.saga_completed.disconnect(receive, sender=Heard)
    assert ended == [(Heard, "tests.heard")]
