"""Exceptions that no handler raised: Ctrl-C, a signal handler's, a lack of memory, in our lines.

``tests/faults/test_interrupts.py`` raises them at every line; here are the faults that it found.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from django_saga import (
    Retry,
    Saga,
    SagaAlreadyRunning,
    SagaNotFound,
    SagaStepHandler,
    current_step,
    drivers,
    recover_saga,
    signals,
)
from django_saga.drivers import AsyncDriver, drive
from django_saga.flow import Do
from django_saga.storage import MemorySagaStorage, SagaStorage
from django_saga.timeouts import time_limit
from tests.faults.strikes import striking
from tests.steps import Calls, Log, make_step

pytestmark = pytest.mark.usefixtures("committing_databases")


@pytest.fixture
def calls() -> Calls:
    return Calls()


class Unlucky:
    """A response at which looking raises, as where memory runs out just then."""

    @property
    def __class__(self) -> Any:
        raise MemoryError


@pytest.mark.parametrize("atomic", [False, True])
def test_what_strikes_once_the_handler_has_returned_is_no_failure_of_the_step(
    storage: SagaStorage, calls: Calls, atomic: bool
) -> None:
    """It was called, so its effect may stand: it is called again, and nothing is undone."""
    keys = []

    def act(context: Log) -> Any:
        keys.append(current_step().idempotency_key)
        return Unlucky() if len(keys) == 1 else None

    class Struck(Saga[Log]):
        name = "tests.struck"
        steps = [make_step("A", calls, act=act, atomic=atomic)]

    saga_id = uuid.uuid4()
    with pytest.raises(MemoryError):
        Struck(storage=storage).run(Log(), saga_id=saga_id)
    assert recover_saga(saga_id, storage=storage).status == "COMPLETED"
    assert calls == ["act A", "act A"]
    assert len(set(keys)) == 1
    assert [r.outcome for r in storage.history(saga_id)] == ["INTERRUPTED", "DONE"]


def test_a_handler_that_raises_the_like_itself_has_failed(
    storage: SagaStorage, calls: Calls
) -> None:
    def act(context: Log) -> None:
        raise MemoryError

    saga = Saga(steps=[make_step("A", calls, act=act)], storage=storage, name="tests.struck")
    saga_id = uuid.uuid4()
    with pytest.raises(Exception, match="step A failed"):
        saga.run(Log(), saga_id=saga_id)
    assert [r.outcome for r in storage.history(saga_id)] == ["FAILED"]


def test_an_interrupted_driver_leaves_no_flow_behind() -> None:
    """Its traceback may live on, and the keeper would go on to renew a lease for it."""
    lines = at = 0
    while at <= lines:
        flow = asking()
        with striking(at or None, within="drivers.py") as strike, suppress(KeyboardInterrupt):
            drive(flow)
        assert inspect.getgeneratorstate(flow) != inspect.GEN_SUSPENDED, strike.fired
        lines, at = max(lines, strike.lines), at + 1
    assert lines > 10


class Plain(SagaStepHandler[Log]):
    def act(self, context: Log) -> None: ...


class Initialized(Plain):
    def __init__(self) -> None:
        self.ready = True


class Asynchronous(SagaStepHandler[Log]):
    async def act(self, context: Log) -> None: ...


class Container:
    def resolve(self, step: type[Any]) -> Any:
        return step()


class AsyncContainer:
    def __init__(self) -> None:
        self.begun: list[Any] = []

    def resolve(self, step: type[Any]) -> Any:
        self.begun.append(self.made(step))
        return self.begun[-1]

    async def made(self, step: type[Any]) -> Any:
        return step()

    def close(self) -> None:
        """What was struck before it was awaited would be told as such, sooner or later."""
        while self.begun:
            self.begun.pop().close()


@pytest.mark.parametrize(
    ("driver", "step", "container"),
    [
        ("sync", Plain, None),
        ("sync", Initialized, None),
        ("sync", Plain, Container()),
        ("sync", Plain, AsyncContainer()),
        ("async", Asynchronous, None),
        ("async", Asynchronous, AsyncContainer()),
    ],
)
@pytest.mark.parametrize("within", ["calling.py", "drivers.py"])
def test_an_error_that_strikes_our_own_lines_is_no_failure_of_a_step(
    driver: str, step: type[SagaStepHandler[Log]], container: Any, within: str
) -> None:
    """As where memory runs out there. In another thread, where some are called, it cannot."""
    storage = MemorySagaStorage()
    saga = Saga(steps=[step], storage=storage, container=container, name="tests.lines")
    lines = at = 0
    while at <= lines:
        saga_id = uuid.uuid4()
        with striking(at or None, MemoryError, within=within) as strike:
            try:
                if driver == "sync":
                    saga.run(Log(), saga_id=saga_id)
                else:
                    asyncio.run(saga.arun(Log(), saga_id=saga_id))
            except MemoryError:
                assert strike.fired
        if isinstance(container, AsyncContainer):
            container.close()
        with suppress(SagaNotFound):
            outcomes = [record.outcome for record in storage.history(saga_id)]
            assert outcomes in ([], ["DONE"]), strike.fired
        lines, at = max(lines, strike.lines), at + 1
    assert lines > 10


def asking() -> Any:
    yield Do(lambda: 1, False)
    yield Do(lambda: 2, False)


def test_an_interruption_at_any_line_of_a_timeout_puts_the_alarm_back() -> None:
    def other(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGALRM, other)
    try:
        lines = at = 0
        while at <= lines:
            with (
                striking(at or None, within="timeouts.py") as strike,
                suppress(KeyboardInterrupt),
                time_limit(600),
            ):
                pass
            assert signal.getsignal(signal.SIGALRM) is other, strike.fired
            assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, strike.fired
            lines, at = max(lines, strike.lines), at + 1
        assert lines > 10
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_checkpoint_in_memory_is_stored_as_a_whole_or_not_at_all(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, saga_id = MemorySagaStorage(), uuid.uuid4()
    saga = Saga(steps=[make_step("A", calls)], storage=storage, name="tests.struck")
    checkpoint = storage.checkpoint

    def struck(*args: Any, **options: Any) -> Any:
        for at in range(1, 100):
            with striking(at, within="storage/memory.py") as strike:
                try:
                    return checkpoint(*args, **options)
                except KeyboardInterrupt:
                    claim = storage.acquire(saga_id, driver="", lease=60, token=1)
                    recorded = bool(storage.history(saga_id))
                    assert recorded is not claim.state.active, strike.fired
                    storage._rows[saga_id].token = 1
                    if recorded:
                        raise
        raise AssertionError

    monkeypatch.setattr(storage, "checkpoint", struck)
    with pytest.raises(KeyboardInterrupt):
        saga.run(Log(), saga_id=saga_id)
    assert saga.run(Log(), saga_id=saga_id).status == "COMPLETED"


def test_a_wait_lasts_until_it_is_over_or_interrupted(
    storage: SagaStorage, calls: Calls, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"INLINE_WAIT": 3600}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def act(context: Log) -> None:
        raise OSError("down")

    def wait(**_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    step = make_step("A", calls, act=act, retry=Retry(attempts=2, delay=600))
    saga, saga_id = Saga(steps=[step], storage=storage, name="tests.waits"), uuid.uuid4()
    before = signal.signal(signal.SIGALRM, interrupt)
    signals.step_failed.connect(wait)
    try:
        with pytest.raises(KeyboardInterrupt):
            saga.run(Log(), saga_id=saga_id)
    finally:
        signals.step_failed.disconnect(wait)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls == ["act A"]
    claim = storage.acquire(saga_id, driver="another", lease=60)
    assert not claim.state.in_flight
    assert claim.wait > 0, "the lease was released, and the wait goes on"


Begin = tuple[threading.Event, threading.Event, Callable[[Log], None]]


@pytest.fixture
def slow() -> Begin:
    """When a handler has begun, when it may end, and what it does."""
    begun, may_end = threading.Event(), threading.Event()

    def act(context: Log) -> None:
        begun.set()
        assert may_end.wait(30)

    return begun, may_end, act


def strike_a_wait(
    monkeypatch: pytest.MonkeyPatch, which: str, when: threading.Event, then: Callable[[], None]
) -> None:
    """Have MemoryError raised once where the driver waits in the method ``which``."""
    wait, struck = asyncio.wait, []

    async def waiting(tasks: Any) -> Any:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        if frame.f_back.f_code.co_name == which and not struck:
            while not (when.is_set() or all(task.done() for task in tasks)):
                await asyncio.sleep(0.001)
            if when.is_set():
                struck.append(True)
                asyncio.get_running_loop().call_soon(then)
                raise MemoryError
        return await wait(tasks)

    monkeypatch.setattr(drivers.asyncio, "wait", waiting)


def test_a_driver_that_is_struck_while_it_waits_lets_the_step_in_flight_finish(
    storage: SagaStorage, calls: Calls, slow: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else may drive before, and the loop must not go on with it unseen."""
    begun, may_end, act = slow
    steps = [make_step("A", calls, act=act), make_step("B", calls)]
    saga, saga_id = Saga(steps=steps, storage=storage, name="tests.struck"), uuid.uuid4()
    monkeypatch.setattr(type(storage), "blocking", True)

    async def view() -> None:
        strike_a_wait(monkeypatch, "drive", begun, may_end.set)
        with pytest.raises(MemoryError):
            await saga.arun(Log(), saga_id=saga_id)
        assert len(asyncio.all_tasks()) <= 2, "this one, and the one that runs it"

    asyncio.run(view())
    monkeypatch.undo()
    assert [r.outcome for r in storage.history(saga_id)] == ["DONE"]
    assert saga.run(Log(), saga_id=saga_id).status == "COMPLETED", "the lease was released"
    assert calls == ["act A", "act B"]


def test_the_lease_is_kept_while_a_thread_goes_on_that_nobody_waits_for_any_more(
    storage: SagaStorage, calls: Calls, slow: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, act = slow
    saga = Saga(steps=[make_step("A", calls, act=act)], storage=storage, name="tests.struck")
    saga_id = uuid.uuid4()

    async def view() -> None:
        strike_a_wait(monkeypatch, "_outlast", begun, lambda: None)
        with pytest.raises(MemoryError):
            await saga.arun(Log(), saga_id=saga_id)
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as pool, pytest.raises(SagaAlreadyRunning):
            pool.submit(acquired).result()
        may_end.set()

    def acquired() -> None:
        from django.db import connections

        try:
            storage.acquire(saga_id, driver="another", lease=60)
        finally:
            connections.close_all()

    asyncio.run(view())


def test_the_lease_is_kept_while_an_async_handler_goes_on_whose_sync_driver_was_interrupted(
    storage: SagaStorage, calls: Calls
) -> None:
    may_end, ended = threading.Event(), threading.Event()

    class Goes(SagaStepHandler[Log]):
        async def act(self, context: Log) -> None:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
            await asyncio.to_thread(may_end.wait, 30)
            ended.set()

    saga, saga_id = Saga(steps=[Goes], storage=storage, name="tests.goes"), uuid.uuid4()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            saga.run(Log(), saga_id=saga_id)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(SagaAlreadyRunning):
        storage.acquire(saga_id, driver="another", lease=60)
    may_end.set()
    assert ended.wait(30)


def test_a_thread_that_is_struck_before_it_begins_its_work_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Struck(Future[Any]):
        def set_running_or_notify_cancel(self) -> bool:
            raise MemoryError

    monkeypatch.setattr(drivers, "Future", Struck)

    def work() -> None:
        async_to_sync(AsyncDriver()._finished)(lambda: None)

    with ThreadPoolExecutor(1) as pool, pytest.raises(MemoryError):
        pool.submit(work).result(60)


def test_a_thread_that_is_struck_as_it_tells_of_an_error_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what it left is raised once, not told again as an error that nobody saw."""

    class Struck(Future[Any]):
        tries = 0

        def set_exception(self, exception: Any) -> None:
            self.tries += 1
            if self.tries == 1:
                raise asyncio.CancelledError
            super().set_exception(exception)

    monkeypatch.setattr(drivers, "Future", Struck)

    def work() -> Any:
        return async_to_sync(AsyncDriver()._finished)(lambda: 1 / 0)

    with ThreadPoolExecutor(1) as pool, pytest.raises(asyncio.CancelledError):
        pool.submit(work).result(60)
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt])
def test_what_strikes_a_thread_once_its_work_is_done_is_raised_on(
    storage: SagaStorage,
    calls: Calls,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Struck(Future[Any]):
        strikes = [error]

        def set_result(self, result: Any) -> None:
            super().set_result(result)
            if calls and self.strikes:
                raise self.strikes.pop()

    monkeypatch.setattr(drivers, "Future", Struck)
    steps = [make_step("A", calls), make_step("B", calls)]
    saga, saga_id = Saga(steps=steps, storage=storage, name="tests.struck"), uuid.uuid4()
    with pytest.raises(error):
        async_to_sync(saga.arun)(Log(), saga_id=saga_id)
    assert [r.outcome for r in storage.history(saga_id)] == ["DONE"]
    assert saga.run(Log(), saga_id=saga_id).status == "COMPLETED", "the lease was released"
    assert calls == ["act A", "act B"]


def test_a_thread_that_is_struck_once_it_has_told_its_result_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Struck(Future[Any]):
        def set_result(self, result: Any) -> None:
            super().set_result(result)
            raise MemoryError

    monkeypatch.setattr(drivers, "Future", Struck)

    def work() -> Any:
        return async_to_sync(AsyncDriver()._finished)(lambda: 42)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result(60) == 42


def test_a_driver_whose_own_task_is_cancelled_says_so(
    storage: SagaStorage, calls: Calls, slow: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that shuts down cancels every task: the iteration must not end as if all was done."""
    begun, may_end, act = slow
    steps = [make_step("A", calls, act=act), make_step("B", calls)]
    saga = Saga(steps=steps, storage=storage, name="tests.struck")

    async def iterate() -> None:
        async with saga.transaction(Log()) as transaction:
            async for _ in transaction:
                pass

    async def view() -> None:
        iterating = asyncio.create_task(iterate())
        await asyncio.to_thread(begun.wait, 30)
        for task in asyncio.all_tasks():
            if getattr(task.get_coro(), "__name__", "") == "_drive":
                task.cancel()
        await asyncio.sleep(0)
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await iterating

    async_to_sync(view)()
    assert calls == ["act A"]
