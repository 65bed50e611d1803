"""Battery 10: a client that goes away at every await of an async view, and over real sockets.

The view is cancelled as any task of its loop begins to wait, a turn of the loop later, or as it
goes on. A client that goes away cancels the view alone: then all must be as if nobody had gone. A
server that ends cancels every task, the handlers too: what they did is not known then.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.cookies import SimpleCookie
from inspect import iscoroutinefunction
from itertools import count
from pathlib import Path
from types import CoroutineType
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import connections

from django_saga import Retry, Saga, SagaFailed, recover_saga
from django_saga.drivers import AsyncDriver
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.steps import current_step
from django_saga.storage import DjangoSagaStorage
from testproject.services import ACTS, UNDOS
from tests.faults.children import PATIENCE, wait_for
from tests.faults.conftest import sessions
from tests.faults.driving import expire
from tests.faults.fleets import until_none
from tests.faults.judge import wrongs
from tests.faults.ledger import Ledger
from tests.faults.options import Size
from tests.faults.rules import SWITCH_OFF
from tests.faults.sagas import (
    A1,
    CASES,
    D2,
    JUDGED,
    R3,
    AsyncRemote,
    Refused,
    Trial,
    case,
    tell_it_no_more,
    tell_the_ledger,
)
from tests.test_demo import standing
from tests.test_shop_browser import OPENER, Served, serving

MOMENTS = ("as it waits", "a turn later", "as it goes on", "again and again")
CLIENTS = 12  # at once
SURE, MOST = 15, 400  # awaits of one view, at least and at most
Point = tuple[int, str]  # the await, counted over all tasks of the view, and the moment

pytestmark = pytest.mark.usefixtures("committing_databases", "told", "no_session_is_left")


class Hesitant(AsyncRemote):
    """Done at the second attempt, after a wait in the driver."""

    retry = Retry(attempts=2, delay=0.02)

    async def act(self, context: Trial) -> None:
        if current_step().attempt == 1:
            raise ValueError("not yet")
        await super().act(context)


class Waiting(Saga[Trial]):
    """One that waits between two attempts."""

    name = "faults.waiting"
    steps = [A1, Hesitant, D2, R3]


class WaitingUndone(Saga[Trial]):
    name = "faults.waiting_undone"
    steps = [A1, Hesitant, D2, Refused]


OURS = [case(Waiting, "A1", "Hesitant", "D2", "R3"), case(WaitingUndone)]
JUDGED |= {one.saga.name: one for one in OURS}
EVERYDAY = [
    ("faults.waiting", "arun"),
    ("faults.waiting_undone", "transaction"),
    ("faults.mixed", "transaction"),
    ("faults.hardly_undone", "arun"),
    ("faults.async", "transaction"),
]
EACH = EVERYDAY[0]  # struck at every await, once at least, every day
FULL = [
    (saga, way)
    for saga in (*CASES, *(one.saga.name for one in OURS))
    for way in ("arun", "transaction")
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        cases = FULL if metafunc.config.getoption("--full") else EVERYDAY
        metafunc.parametrize(("saga", "way"), cases)


@pytest.fixture(scope="module")
def told(ledger: Ledger) -> Iterator[None]:
    tell_the_ledger(ledger.address)
    yield
    tell_it_no_more(ledger.address)


@pytest.fixture(scope="module")
def no_session_is_left(committing_databases: None) -> Iterator[None]:
    """L6, of connections."""
    before = sessions()
    yield
    wait_for(lambda: sessions() <= before)


class Watch:
    """A container: makes handlers that wait more often, and knows which of them run."""

    def __init__(self) -> None:
        self.running = 0

    def resolve(self, step: type[Any]) -> Any:
        handler = step()
        for action in ("act", "compensate"):
            setattr(handler, action, self._watched(getattr(handler, action)))
        return handler

    def _watched(self, method: Callable[[Trial], Any]) -> Callable[[Trial], Any]:
        def call(context: Trial) -> Any:
            with self._at_work():
                return method(context)

        async def acall(context: Trial) -> Any:
            with self._at_work():
                await asyncio.sleep(0)
                await sync_to_async(threading.get_ident)()
                answer = await method(context)
                await asyncio.sleep(0)
                return answer

        return acall if iscoroutinefunction(method) else call

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class Wary(DjangoSagaStorage):
    """Sees a lease that is given up while a handler runs."""

    def __init__(self, database: str, watch: Watch) -> None:
        super().__init__(database)
        self._watch, self.found = watch, list[str]()

    def release(self, *args: Any, **kwargs: Any) -> None:
        if self._watch.running:
            self.found.append("the lease was released while a handler ran")
        super().release(*args, **kwargs)


class Leaving:
    """Cancels at one await of all that the tasks of a loop make."""

    def __init__(self, point: Point, cancel: Callable[[], bool]) -> None:
        self._at, self._moment = point
        self._cancel, self._waits, self._wakes = cancel, 0, 0
        self.reached = False

    def make(self, loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        """The loop's factory of tasks."""
        return asyncio.Task(Watched(coroutine, self), loop=loop, **options)

    def waits(self) -> None:
        self._waits += 1
        if self._waits == self._at and self._moment == "as it waits":
            self._strike()
        if 0 <= self._waits - self._at < 3 and self._moment == "again and again":
            self._strike()
        if self._waits == self._at and self._moment == "a turn later":
            asyncio.get_running_loop().call_soon(self._strike)

    def goes_on(self) -> None:
        self._wakes += 1
        if self._wakes == self._at and self._moment == "as it goes on":
            self._strike()

    def _strike(self) -> None:
        self.reached |= self._cancel()


class Watched(Coroutine[Any, Any, Any]):
    """A coroutine that tells where it waits and goes on."""

    def __init__(self, coroutine: Any, leaving: Leaving) -> None:
        self.coroutine, self._leaving = coroutine, leaving

    def send(self, value: Any) -> Any:
        self._leaving.goes_on()
        waited_for = self.coroutine.send(value)
        self._leaving.waits()
        return waited_for

    def throw(self, *error: Any) -> Any:
        waited_for = self.coroutine.throw(*error)
        self._leaving.waits()
        return waited_for

    def close(self) -> None:
        self.coroutine.close()

    def __await__(self) -> Any:
        raise NotImplementedError  # a task only sends


class View:
    """An async view that drives a saga, as a server calls it, and what is left of it."""

    def __init__(self, saga: str, way: str, database: str, ledger: Ledger) -> None:
        self.id = uuid4()
        self._saga, self._way, self._database, self._ledger = saga, way, database, ledger
        self._watch = Watch()
        self._storage = Wary(database, self._watch)
        self.found = self._storage.found

    def serve(self, point: Point, *, all_tasks: bool = False) -> bool:
        """Call it, and have its client go away at that point, or the server end; whether the view
        got as far as that."""
        threads = lasting_threads()
        reached = asyncio.run(self._serve(point, all_tasks))
        if lasting_threads() - threads:
            self.found.append("L6 a thread is left")
        return reached

    async def _serve(self, point: Point, all_tasks: bool) -> bool:
        loop, server = asyncio.get_running_loop(), asyncio.current_task()
        async with ThreadSensitiveContext():  # a thread for each request, as under ASGI

            def go() -> bool:
                others = asyncio.all_tasks() - {server, view} if all_tasks else set()
                return cancel(view, others)

            leaving = Leaving(point, go)
            loop.set_task_factory(leaving.make)
            view = loop.create_task(self._call())
            await asyncio.wait({view})
            loop.set_task_factory(None)
            if leaving.reached and not view.cancelled():
                self.found.append("no CancelledError came out")
            elif not leaving.reached:
                view.result()
            if self._watch.running:
                self.found.append("a handler runs on")
            # An async generator that was left early is closed by a task of the loop's own.
            left = {task for task in asyncio.all_tasks() - {server} if not is_closing(task)}
            self.found += [f"L6 a task is left: {task}" for task in left]
            await sync_to_async(connections.close_all)()
        return leaving.reached

    async def _call(self) -> None:
        saga = JUDGED[self._saga].saga(storage=self._storage, container=self._watch)
        context = Trial(self._ledger.address, self._database)
        try:
            if self._way == "arun":
                await saga.arun(context, saga_id=self.id)
                return
            async with saga.transaction(context, saga_id=self.id) as transaction:
                async for _ in transaction:
                    await asyncio.sleep(0)
        except (SagaFailed, ValueError):
            assert JUDGED[self._saga].ends == {"FAILED"}

    def judge(self, undisturbed: Story | None) -> list[str]:
        """What is wrong with what it left, and once that is recovered.

        ``undisturbed``: what must have happened in the end; None where that is not known.
        """
        found = self.found
        row = SagaExecution.objects.using(self._database).filter(pk=self.id).first()
        if row is None:
            return [*found, *wrongs(self.id, self._database, self._ledger.entries(self.id))]
        if undisturbed is not None and row.lease_until is not None:
            found.append("its lease is not free")
        if undisturbed is not None and row.in_flight:
            found.append("a step in flight was not finished")
        if JUDGED[self._saga].ends == {"COMPLETED"} and self._was_compensated:
            found.append("it was compensated")
        expire(self.id, self._database)
        recover_saga(self.id, storage=DjangoSagaStorage(self._database))
        found += wrongs(self.id, self._database, self._ledger.entries(self.id))
        if undisturbed is not None and self.story != undisturbed:
            found.append(f"{self.story} is not as if nobody had gone")
        return found

    @property
    def _was_compensated(self) -> bool:
        records = SagaStepRecord.objects.using(self._database).filter(execution=self.id)
        return records.filter(action="compensate").exists()

    @property
    def story(self) -> Story:
        """Its history, and the calls that were made."""
        records = SagaStepRecord.objects.using(self._database).filter(execution=self.id)
        fields = records.order_by("id").values_list("step", "action", "attempt", "outcome")
        calls = [(entry.step, entry.action) for entry in self._ledger.entries(self.id)]
        return list(fields), calls


Story = tuple[list[tuple[Any, ...]], list[tuple[str, str]]]


def cancel(view: asyncio.Task[Any], others: set[asyncio.Task[Any]]) -> bool:
    """Whether the view had not ended before."""
    for task in others:
        task.cancel()
    return view.cancel()


def is_closing(task: asyncio.Task[Any]) -> bool:
    coroutine: Any = task.get_coro()
    inner = coroutine.coroutine if isinstance(coroutine, Watched) else coroutine
    return not isinstance(inner, CoroutineType)


def lasting_threads() -> set[threading.Thread]:
    """Those that are not there for the whole process, as the keeper is."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


Serve = Callable[[Point], "View | None"]


def steps_of(saga: str, way: str, step: int) -> dict[str, int]:
    """How many awaits to go on from one that is struck to the next, at each moment."""
    steps = dict.fromkeys(MOMENTS, step)
    return steps | {MOMENTS[0]: 1} if (saga, way) == EACH else steps


def everywhere(
    serve: Serve, steps: dict[str, int], dice: random.Random
) -> Iterator[tuple[Point, View]]:
    """A view that met the fault, for each await in such steps, at each moment."""
    for moment, step in steps.items():
        for at in count(1 + dice.randrange(min(step, SURE)), step):
            assert at < MOST, "more awaits than that"
            view = serve((at, moment))
            if view is None:
                break
            yield (at, moment), view


@pytest.fixture(params=["default", "sqlite"])
def view(request: pytest.FixtureRequest, ledger: Ledger) -> Callable[[str, str], View]:
    """A new execution of a saga, in a view of that kind, on each database."""
    return lambda saga, way: View(saga, way, request.param, ledger)


def story(view: View) -> Story:
    """What happens where nobody goes away."""
    assert not view.serve((MOST, MOMENTS[0]))
    assert not view.judge(None)
    return view.story


def test_a_client_that_goes_away_at_any_await_changes_nothing(
    view: Callable[[str, str], View],
    saga: str,
    way: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    undisturbed = story(view(saga, way))
    gone, steps = 0, steps_of(saga, way, size("disconnect_every", everyday=20, full_run=1))

    def serve(point: Point) -> View | None:
        one = view(saga, way)
        return one if one.serve(point) else None

    for point, one in everywhere(serve, steps, dice):
        assert not one.judge(undisturbed), point
        gone += 1
    figure("disconnects", points=gone, wrongs=0)
    assert gone >= len(MOMENTS)


def test_a_server_that_ends_at_any_await_loses_and_doubles_nothing(
    view: Callable[[str, str], View],
    saga: str,
    way: str,
    size: Size,
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    ended, steps = 0, steps_of(saga, way, size("end_every", everyday=20, full_run=1))

    def serve(point: Point) -> View | None:
        one = view(saga, way)
        return one if one.serve(point, all_tasks=True) else None

    for point, one in everywhere(serve, steps, dice):
        assert not one.judge(None), point
        ended += 1
    figure("disconnects", points_of_a_server_that_ends=ended, wrongs=0)
    assert ended >= len(MOMENTS)


def test_canary_without_the_shield_it_is_seen(
    view: Callable[[str, str], View], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = story(view("faults.waiting", "arun"))
    monkeypatch.setattr(AsyncDriver, "drive", AsyncDriver.drive)  # to have it back
    SWITCH_OFF["a step in flight outlives its driver"]()
    for at in count(1):
        one = view("faults.waiting", "arun")
        assert one.serve((at, MOMENTS[0])), "nothing was seen"
        if any("INTERRUPTED" in wrong for wrong in one.judge(undisturbed)):
            break


# Over sockets


class Shop:
    """The demo shop as it is served, and clients that leave it."""

    def __init__(self, served: Served) -> None:
        self._served = served
        with OPENER.open(served.url) as page:
            self._token = SimpleCookie(page.headers["Set-Cookie"])["csrftoken"].value

    def leave(self, bytes: int, *, reset: bool, **more: str) -> bool:
        """Order, read so many bytes of the answer and go away; whether that was before its end."""
        order = {"product": "1", "quantity": "1", "address": "1 Main Street", **more}
        body = urlencode(order)
        lines = (
            "POST /stream/ HTTP/1.1",
            f"Host: 127.0.0.1:{self._served.port}",
            f"Cookie: csrftoken={self._token}",
            f"X-CSRFToken: {self._token}",
            "Content-Type: application/x-www-form-urlencoded",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        with socket.create_connection(("127.0.0.1", self._served.port), PATIENCE) as client:
            client.sendall("\r\n".join((*lines, "", body)).encode())
            while bytes > 0:
                part = client.recv(bytes)
                if not part:
                    return False
                bytes -= len(part)
            if reset:
                linger = struct.pack("ii", 1, 0)  # for no time: what is unsent is dropped
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return True

    @property
    def unsettled(self) -> int:
        """How many executions have not ended."""
        ended = "('COMPLETED', 'FAILED', 'STUCK')"
        query = f"SELECT count(*) FROM django_saga_sagaexecution WHERE status NOT IN {ended}"
        return int(self._served.rows(query)[0][0])

    @property
    def recovered(self) -> int:
        """How many executions two processes have driven."""
        drivers = "SELECT execution_id FROM django_saga_sagasteprecord GROUP BY execution_id"
        query = f"SELECT count(*) FROM ({drivers} HAVING count(DISTINCT driver) > 1)"
        return int(self._served.rows(query)[0][0])

    @property
    def wrongs(self) -> list[str]:
        """Held against the services' ledger and the stock. An order that nobody began to drive, its
        client being gone, has no execution."""
        found, sold, effects = [], Counter[int](), standing(self._served.environment)
        orders = self._served.rows(
            "SELECT o.id, o.product_id, o.quantity, e.status FROM shop_order o "
            "LEFT JOIN django_saga_sagaexecution e ON e.id = o.saga_id"
        )
        for order, product, quantity, status in orders:
            done = int(status == "COMPLETED")
            sold[product] += done * quantity
            stands = [effects.pop((order, service), 0) for service in ("payments", "courier")]
            if status not in ("COMPLETED", "FAILED", None) or stands != [done, done]:
                found.append(f"order {order} is {status}, and {stands} stand")
        found += [f"{effect} of no order" for effect in effects]
        products = self._served.rows("SELECT id, supplied, in_stock FROM shop_product")
        for product, supplied, in_stock in products:
            if in_stock != supplied - sold[product]:
                found.append(f"{in_stock} of {supplied} in stock, {sold[product]} sold")
        return found


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with serving(tmp_path) as served:
        for path in (*ACTS, *UNDOS):
            served.services.behave(path, delay=0.1)  # seconds, so that one can leave meanwhile
        yield Shop(served)


def test_clients_that_go_away_over_real_sockets_lose_and_double_nothing(
    shop: Shop, size: Size, dice: random.Random, figure: Callable[..., None]
) -> None:
    wanted = size("disconnects", everyday=5, full_run=300)
    before = shop.recovered

    def leave(seed: float) -> bool:
        own = random.Random(seed)
        more = {"no_courier": "yes"} if own.random() < 0.3 else {}
        return shop.leave(own.randrange(1_400), reset=own.random() < 0.5, **more)

    def enough() -> bool:
        nonlocal left
        with ThreadPoolExecutor(CLIENTS) as clients:
            left += sum(clients.map(leave, [dice.random() for _ in range(wanted)]))
        until_none(lambda: shop.unsettled, "L0 orders do not end")
        return left >= wanted and shop.recovered > before

    left = 0
    wait_for(enough)
    assert not shop.wrongs
    recovered = shop.recovered - before
    figure("disconnects", over_sockets=left, taken_over_half_way=recovered, wrongs=0)
