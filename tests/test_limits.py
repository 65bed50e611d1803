"""Limits of how many executions of a saga run at once, from its declaration to its workers."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections
from pytest_django import Settings

from django_saga import (
    InvalidDefinition,
    Saga,
    SagaError,
    SagaFailed,
    SagaLimitReached,
    machine,
    operations,
    recover_saga,
)
from django_saga.models import SagaExecution
from django_saga.recovery import sweep
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage, SagaStorage
from django_saga.story import comes_next
from django_saga.verdicts import overdue
from tests.recovery_sagas import KeepingBackend
from tests.steps import Calls, Log, make_step, raises

pytestmark = pytest.mark.usefixtures("committing_databases")

PATIENCE = 60  # seconds until a test gives up

Make = Callable[..., type[Saga[Log]]]


class Witness:
    """Counts who is inside a handler at the same time."""

    def __init__(self) -> None:
        self.inside = self.peak = 0
        self.gate = threading.Event()
        self.entered = threading.Event()
        self._lock = threading.Lock()

    def stay(self, context: Log) -> None:
        """For a moment, so that others would come in if they could."""
        with self._lock:
            self.inside += 1
            self.peak = max(self.peak, self.inside)
        time.sleep(0.01)
        with self._lock:
            self.inside -= 1

    def wait(self, context: Log) -> None:
        """Until the gate opens."""
        self.entered.set()
        assert self.gate.wait(PATIENCE)


@pytest.fixture
def witness() -> Iterator[Witness]:
    witness = Witness()
    yield witness
    witness.gate.set()


@pytest.fixture
def calls() -> Calls:
    return Calls()


def maker(storage: SagaStorage, calls: Calls) -> Make:
    """Makes a saga of one step on the storage, of a name of its own."""

    def make(most: int | None = 1, *, act: Any = None, **body: Any) -> type[Saga[Log]]:
        steps = [make_step("A", calls, act=act)]
        name = f"tests.{uuid.uuid4()}"
        ours = {"name": name, "steps": steps, "max_running": most, "storage": storage}
        return type("Limited", (Saga,), {**ours, **body})

    return make


@pytest.fixture
def limited(storage: SagaStorage, calls: Calls) -> Make:
    return maker(storage, calls)


@pytest.fixture
def here(calls: Calls) -> Make:
    """In the project's database, where operators look."""
    return maker(DjangoSagaStorage("default"), calls)


@contextmanager
def running(saga: type[Saga[Log]], witness: Witness, **options: Any) -> Iterator[None]:
    """While one of it is being driven in another thread, in a step that waits for the gate."""

    def run() -> None:
        try:
            saga().run(Log(**options))
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert witness.entered.wait(PATIENCE)
        try:
            yield
        finally:
            witness.gate.set()
        future.result()


def stored(saga: type[Saga[Log]]) -> list[SagaExecution]:
    storage = saga.storage
    if isinstance(storage, MemorySagaStorage):
        rows = [(id, row) for id, row in storage._rows.items() if row.saga == saga.name]
        claims = [storage._claim(id, row, row.updated_at) for id, row in rows]
        return [storage.execution(c, c.state, c.at, leased=False) for c in claims]
    assert isinstance(storage, DjangoSagaStorage)
    return list(SagaExecution.objects.using(storage.alias).filter(saga=saga.name))


def statuses(saga: type[Saga[Log]]) -> list[str]:
    return sorted(execution.status for execution in stored(saga))


def pending(saga: type[Saga[Log]], count: int = 1, **options: Any) -> list[SagaExecution]:
    """They wait, since this backend drives nothing."""
    return [saga().enqueue(Log(**options)) for _ in range(count)]


@pytest.fixture
def kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What a backend of queues is told."""
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.KeepingBackend"}
    monkeypatch.setattr("django_saga.saga._refuse_out_of_reach", lambda saga: None)
    yield KeepingBackend.told
    KeepingBackend.told.clear()


# Declared


@pytest.mark.parametrize("most", [0, -1, "3", 1.5, True])
def test_a_limit_that_is_no_number_from_one_up_is_refused(limited: Make, most: Any) -> None:
    with pytest.raises(InvalidDefinition, match=r"Limited: max_running must be 1 or more, not "):
        limited(most)


@pytest.mark.parametrize("key", [None, 5, "x" * 256, "NUL \x00", "half \ud83d"])
def test_a_key_that_cannot_be_stored_is_refused_and_nothing_stored(limited: Make, key: Any) -> None:
    saga = limited(limit_key=lambda self, context: key)
    for use in (saga().run, saga().enqueue, lambda context: saga().enqueue_many([context])):
        with pytest.raises(SagaError, match=r"limit_key\(\) of tests\..* must return a text"):
            use(Log())
    assert stored(saga) == []


def test_a_limit_key_that_fails_is_told_as_an_error_of_the_saga(limited: Make) -> None:
    saga = limited(limit_key=lambda self, context: 1 / 0)
    for use in (saga().run, saga().enqueue):
        with pytest.raises(SagaError, match=r"limit_key\(\) of tests\..* failed: division by zero"):
            use(Log())
    assert stored(saga) == []


def test_the_key_is_asked_for_once_and_not_at_all_without_a_limit(limited: Make) -> None:
    asked: list[int] = []

    def limit_key(self: Any, context: Log) -> str:
        asked.append(context.number)
        return str(context.number)

    limited(limit_key=limit_key)().run(Log(number=7))
    limited(limit_key=limit_key)().enqueue(Log(number=8))
    limited(limit_key=limit_key)().enqueue_many([Log(number=9), Log(number=10)])
    limited(None, limit_key=limit_key)().run(Log(number=11))
    assert asked == [7, 8, 9, 10]


# Inline


def test_what_is_run_while_no_place_is_free_is_refused_and_not_stored(
    limited: Make, witness: Witness
) -> None:
    saga = limited(act=witness.wait)
    told = f"Saga {saga.name} was not started: 1 of 1 of {saga.name} are running; .*enqueue"
    with running(saga, witness):
        with pytest.raises(SagaLimitReached, match=told):
            saga().run(Log())
        with pytest.raises(SagaLimitReached, match=told):
            asyncio.run(saga().arun(Log()))
        with pytest.raises(SagaLimitReached, match=told):
            list(saga().transaction(Log()))
    assert statuses(saga) == ["COMPLETED"]
    saga().run(Log())
    assert statuses(saga) == ["COMPLETED"] * 2


def test_one_that_has_ended_is_returned_though_no_place_is_free(
    limited: Make, witness: Witness
) -> None:
    saga = limited(act=lambda context: witness.wait(context) if context.number else None)
    ended = saga().run(Log())
    with running(saga, witness, number=1):
        assert saga().run(Log(), saga_id=ended.id).status == "COMPLETED"


def test_each_key_has_its_own_places(limited: Make, witness: Witness) -> None:
    saga = limited(
        act=lambda context: witness.wait(context) if context.number == 1 else None,
        limit_key=lambda self, context: f"customer {context.number}",
    )
    with running(saga, witness, number=1):
        with pytest.raises(SagaLimitReached, match="with its limit_key"):
            saga().run(Log(number=1))
        saga().run(Log(number=2))


def test_a_failure_frees_the_place_once_all_is_compensated(limited: Make) -> None:
    saga = limited(act=raises(ValueError("declined")))
    for _ in range(3):
        with pytest.raises(SagaFailed):
            saga().run(Log())
    assert statuses(saga) == ["FAILED"] * 3


def test_what_is_enqueued_while_no_place_is_free_waits_for_recovery(
    limited: Make, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    saga = limited(act=witness.wait)
    with running(saga, witness), caplog.at_level("INFO"):
        saga().enqueue_many([Log(), Log()])
        assert saga().enqueue(Log()).status == "PENDING"
        assert list(sweep(saga=saga.name, storage=saga.storage)) == []
    assert "waits: 1 of 1" in caplog.text
    assert "WARNING" not in {record.levelname for record in caplog.records}
    assert statuses(saga) == ["COMPLETED", *["PENDING"] * 3]
    assert len(list(sweep(saga=saga.name, storage=saga.storage))) == 3, "one after the other"
    assert statuses(saga) == ["COMPLETED"] * 4


def test_a_sweep_ends_though_one_cannot_be_driven_and_keeps_its_place(limited: Make) -> None:
    saga = limited(act=raises(asyncio.CancelledError()))
    state = machine.start(saga.definition.plan, '{"done":[],"number":0}', pending=True)
    for _ in range(2):
        saga.storage.create(uuid.uuid4(), saga.name, state, limit_key="")
    swept = list(sweep(saga=saga.name, storage=saga.storage, inline=True))
    assert 1 <= len(swept) <= 2
    assert all("CancelledError" in found.error for found in swept)
    assert statuses(saga) == ["PENDING", "RUNNING"]


# Many at once


def test_of_many_threads_never_more_are_inside_than_may_be(
    limited: Make, witness: Witness, kept: list[Any]
) -> None:
    saga = limited(3, act=witness.stay)
    waiting = pending(saga, 20)
    one_has_ended = threading.Condition()

    def finish(execution: SagaExecution) -> None:
        try:
            for _ in range(100):
                with suppress(SagaLimitReached):
                    recover_saga(execution.id, storage=saga.storage)
                    return
                with one_has_ended:
                    one_has_ended.wait(1)
            raise AssertionError("its turn never came")
        finally:
            connections.close_all()
            with one_has_ended:
                one_has_ended.notify(3)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(finish, waiting))
    assert statuses(saga) == ["COMPLETED"] * 20
    assert 1 < witness.peak <= 3


# Handed on


def test_what_ends_hands_on_to_the_one_that_waited_longest(limited: Make, kept: list[Any]) -> None:
    saga = limited(limit_key=lambda self, context: str(context.number))
    first, second, third = pending(saga, 3)
    [other] = pending(saga, number=1)
    assert [told[2] for told in kept] == [first.id, second.id, third.id, other.id]
    kept.clear()
    recover_saga(first.id, storage=saga.storage)
    assert [told[2] for told in kept] == [second.id]
    recover_saga(other.id, storage=saga.storage)
    assert [told[2] for told in kept] == [second.id], "nothing waits for a place of its key"
    recover_saga(third.id, storage=saga.storage)
    assert [told[2] for told in kept] == [second.id] * 2


def test_without_a_limit_nobody_is_asked_who_waits(limited: Make, kept: list[Any]) -> None:
    saga = limited(None)
    first, _ = pending(saga, 2)
    kept.clear()
    recover_saga(first.id, storage=saga.storage)
    assert kept == []


# Operators


def test_a_place_is_kept_by_what_lost_its_driver_until_it_has_ended(limited: Make) -> None:
    saga = limited(act=raises(SystemExit(1), times=1))
    with pytest.raises(SystemExit):
        saga().run(Log())
    assert statuses(saga) == ["RUNNING"]
    with pytest.raises(SagaLimitReached):
        saga().run(Log())
    assert [found.status for found in sweep(saga=saga.name, storage=saga.storage)] == ["COMPLETED"]
    saga().run(Log())


def test_what_waits_for_its_turn_says_so_and_is_not_overdue(
    here: Make, witness: Witness, capsys: pytest.CaptureFixture[str]
) -> None:
    saga = here(act=witness.wait)
    told = f"It waits for its turn: 1 of 1 of {saga.name} are running."
    rows = SagaExecution.objects.filter(saga=saga.name)
    with running(saga, witness):
        waiting = saga().enqueue(Log())
        waiting.refresh_from_db()
        assert comes_next(waiting, waiting.created_at, False) == told
        call_command("sagas", "show", str(waiting.pk))
        assert f"Next: {told}" in capsys.readouterr().out
        assert not rows.filter(overdue()).exists()
    assert "turn" not in comes_next(waiting, waiting.created_at, False)
    (first,) = rows.filter(status="COMPLETED")
    assert "turn" not in comes_next(first, first.created_at, False)


def test_a_key_is_not_told_to_who_may_not_see_contexts(here: Make, witness: Witness) -> None:
    saga = here(act=witness.wait, limit_key=lambda self, context: "ann@example.org")
    with running(saga, witness):
        waiting = saga().enqueue(Log())
        waiting.refresh_from_db()
        told = comes_next(waiting, waiting.created_at, False)
        assert told == f"It waits for its turn: 1 of 1 of {saga.name} with its key are running."
        with pytest.raises(SagaLimitReached) as refused:
            saga().run(Log())
    assert "ann" not in str(refused.value)


def test_an_operator_who_ends_one_frees_its_place(here: Make, kept: list[Any]) -> None:
    saga = here(act=raises(SystemExit(1)))
    with pytest.raises(SystemExit):
        saga().run(Log())
    (lost,) = stored(saga)
    [waiting] = pending(saga)
    kept.clear()
    operations.abandon(lost.pk, str(lost.pk), reason="it is dead", user=None)
    assert statuses(saga) == ["PENDING", "STUCK"]
    assert [told[2] for told in kept] == [waiting.id]
    assert saga.storage.running(saga.name, "") == 0
