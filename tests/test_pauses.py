"""Pausing a saga or a step: what is in a handler ends, nothing more begins until it is resumed."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Permission, User
from django.core.exceptions import PermissionDenied
from django.db import connections, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_rq import get_queue
from pytest_django import Settings
from rq.serializers import JSONSerializer

from django_saga import Retry, Saga, SagaError, SagaStepHandler
from django_saga.exceptions import SagaPaused
from django_saga.models import SagaAuditEntry, SagaExecution, SagaPause, SagaStepRecord
from django_saga.operations import cancel, pause, recover, resume
from django_saga.recovery import recover_saga, sweep
from django_saga.rq import run_saga
from django_saga.storage import DjangoSagaStorage
from tests.operated import (
    WORLD,
    Pack,
    Pay,
    Trip,
    TripSaga,
    changed,
    compensating_trip,
    due_trip,
    lost_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

TRIP = "tests.TripSaga"
ALL = ["act Pack", "act Pay", "act Leave"]


class Stubborn(Pack):
    """Tries twice, a moment later."""

    retry = Retry(attempts=2, delay=0.01)


class Unhurried(Pack):
    """Tries twice, an hour later."""

    retry = Retry(attempts=2, delay=3600)


class Booked(Pack):
    """Acts in the transaction of its checkpoint."""

    atomic = True


class Called(SagaStepHandler[Trip]):
    async def act(self, context: Trip) -> None:
        WORLD.call()


class StubbornSaga(Saga[Trip]):
    name = "tests.StubbornSaga"
    steps = [Stubborn, Pay]


class UnhurriedSaga(Saga[Trip]):
    name = "tests.UnhurriedSaga"
    steps = [Unhurried, Pay]


class BookedSaga(Saga[Trip]):
    name = "tests.BookedSaga"
    steps = [Booked, Called, Pay]


@pytest.fixture
def storage(alias: str) -> DjangoSagaStorage:
    return DjangoSagaStorage(alias)


def the_row(storage: DjangoSagaStorage) -> SagaExecution:
    return SagaExecution.objects.using(storage.alias).get()


def in_the_middle(call: str, do: Callable[[], Any]) -> None:
    """Have this done while this call is made."""

    def meanwhile() -> None:
        if WORLD.calls[-1] == call:
            WORLD.interlude = None
            do()

    WORLD.interlude = meanwhile


def swept(storage: DjangoSagaStorage) -> list[str]:
    return [recovered.status for recovered in sweep(storage=storage)]


def step_by_step(saga: Saga[Trip]) -> None:
    with saga.transaction(Trip()) as steps:
        for _ in steps:
            pass


async def astep_by_step(saga: Saga[Trip]) -> None:
    async with saga.transaction(Trip()) as steps:
        async for _ in steps:
            pass


WAYS: dict[str, Callable[[Saga[Trip]], Any]] = {
    "run": lambda saga: saga.run(Trip()),
    "arun": lambda saga: async_to_sync(saga.arun)(Trip()),
    "for": step_by_step,
    "async for": lambda saga: async_to_sync(astep_by_step)(saga),
    "enqueue": lambda saga: saga.enqueue(Trip()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", ["", "Pay"])
def test_paused_in_the_middle_it_lets_go_before_the_next_step_and_goes_on_when_resumed(
    way: str, step: str, storage: DjangoSagaStorage
) -> None:
    in_the_middle("act Pack", lambda: pause(TRIP, step, storage=storage))
    WAYS[way](TripSaga(storage=storage))
    row = the_row(storage)
    assert (row.status, row.step, row.attempt) == ("RUNNING", "Pay", 1)
    assert (row.in_flight, row.lease_until) == (False, None)
    assert WORLD.calls == ["act Pack"]
    assert swept(storage) == []
    assert storage.due(10, grace=60) == []
    resume(TRIP, step, storage=storage)
    assert swept(storage) == ["COMPLETED"]
    assert WORLD.calls == ALL
    records = SagaStepRecord.objects.using(storage.alias).values_list("step", "outcome")
    assert list(records) == [("Pack", "DONE"), ("Pay", "DONE"), ("Leave", "DONE")]


@pytest.mark.parametrize("way", WAYS)
def test_what_starts_while_it_is_paused_is_stored_and_waits(
    way: str, storage: DjangoSagaStorage
) -> None:
    pause(TRIP, storage=storage)
    WAYS[way](TripSaga(storage=storage))
    row = the_row(storage)
    assert row.status == ("PENDING" if way == "enqueue" else "RUNNING")
    assert (row.step, row.in_flight, row.lease_until) == ("Pack", False, None)
    assert (WORLD.calls, swept(storage)) == ([], [])
    resume(TRIP, storage=storage)
    assert (swept(storage), WORLD.calls) == (["COMPLETED"], ALL)
    assert not SagaStepRecord.objects.using(storage.alias).filter(outcome="INTERRUPTED").exists()


def test_a_pause_of_something_else_is_none_of_its_business(storage: DjangoSagaStorage) -> None:
    pause("tests.StubbornSaga", storage=storage)
    pause("tests.BookedSaga", "Pay", storage=storage)
    assert TripSaga(storage=storage).run(Trip()).status == "COMPLETED"


def test_the_last_step_ends_the_saga_though_it_is_paused(storage: DjangoSagaStorage) -> None:
    in_the_middle("act Leave", lambda: pause(TRIP, storage=storage))
    assert TripSaga(storage=storage).run(Trip()).status == "COMPLETED"


def test_after_an_atomic_step_and_before_an_async_one_it_lets_go_too(
    storage: DjangoSagaStorage,
) -> None:
    # Not in the middle of Booked: on SQLite its transaction has the whole database.
    pause("tests.BookedSaga", "Called", storage=storage)
    BookedSaga(storage=storage).run(Trip())
    assert (the_row(storage).step, WORLD.calls) == ("Called", ["act Booked"])
    resume("tests.BookedSaga", "Called", storage=storage)
    pause("tests.BookedSaga", "Pay", storage=storage)
    assert swept(storage) == ["RUNNING"]
    assert (the_row(storage).step, WORLD.calls) == ("Pay", ["act Booked", "act Called"])


def test_what_waits_a_moment_for_its_retry_lets_go(storage: DjangoSagaStorage) -> None:
    WORLD.trouble = {"act Stubborn": "no"}
    in_the_middle("act Stubborn", lambda: pause("tests.StubbornSaga", storage=storage))
    StubbornSaga(storage=storage).run(Trip())
    row = the_row(storage)
    assert (row.status, row.attempt, row.in_flight) == ("RUNNING", 2, False)
    assert row.lease_until is None
    WORLD.trouble = {}
    resume("tests.StubbornSaga", storage=storage)
    changed(row, wake_at=None)
    assert swept(storage) == ["COMPLETED"]
    assert WORLD.calls == ["act Stubborn", "act Stubborn", "act Pay"]


def test_what_waits_long_for_its_retry_is_not_claimed_when_it_wakes(
    storage: DjangoSagaStorage,
) -> None:
    WORLD.trouble = {"act Unhurried": "no"}
    UnhurriedSaga(storage=storage).run(Trip())
    pause("tests.UnhurriedSaga", "Unhurried", storage=storage)
    changed(the_row(storage), wake_at=None)
    assert swept(storage) == []
    WORLD.trouble = {}
    resume("tests.UnhurriedSaga", "Unhurried", storage=storage)
    assert swept(storage) == ["COMPLETED"]


@pytest.mark.parametrize("way", ["run", "arun", "enqueue"])
def test_compensations_wait_too(way: str, storage: DjangoSagaStorage) -> None:
    WORLD.trouble = {"act Pay": "no money"}
    in_the_middle("act Pay", lambda: pause(TRIP, "Pack", storage=storage))
    WAYS[way](TripSaga(storage=storage))
    row = the_row(storage)
    assert (row.status, row.step, row.in_flight) == ("COMPENSATING", "Pack", False)
    assert swept(storage) == []
    resume(TRIP, "Pack", storage=storage)
    assert swept(storage) == ["FAILED"]
    assert WORLD.calls == ["act Pack", "act Pay", "compensate Pack"]


def test_a_consumer_of_a_transaction_still_sees_the_steps_own_error(
    storage: DjangoSagaStorage,
) -> None:
    WORLD.trouble = {"act Pay": "no money"}
    in_the_middle("act Pay", lambda: pause(TRIP, storage=storage))
    with pytest.raises(Exception, match="no money"):
        step_by_step(TripSaga(storage=storage))
    assert the_row(storage).status == "COMPENSATING"


def test_what_lost_its_driver_is_not_taken_over_while_it_is_paused(
    storage: DjangoSagaStorage,
) -> None:
    lost = lost_trip(alias=storage.alias)
    pause(TRIP, storage=storage)
    assert swept(storage) == []
    with pytest.raises(SagaPaused, match="paused before act of step Pack"):
        recover_saga(lost.pk, storage=storage)
    with pytest.raises(SagaPaused):
        TripSaga(storage=storage).run(Trip(), saga_id=lost.pk)
    with pytest.raises(SagaError, match="is paused; resume its saga and its step first"):
        recover(lost.pk, storage=storage)
    row = the_row(storage)
    assert (row.token, row.recoveries, row.in_flight) == (lost.token, 0, True)
    resume(TRIP, storage=storage)
    assert swept(storage) == ["COMPLETED"]


def test_what_a_sweep_has_claimed_already_lets_go_too(storage: DjangoSagaStorage) -> None:
    for _ in range(3):
        due_trip(alias=storage.alias)
    in_the_middle("act Pack", lambda: pause(TRIP, storage=storage))
    assert swept(storage) == ["RUNNING", "RUNNING", "RUNNING"]
    assert WORLD.calls == ["act Pack"]
    for row in SagaExecution.objects.using(storage.alias):
        assert (row.in_flight, row.lease_until) == (False, None)
    resume(TRIP, storage=storage)
    assert swept(storage) == ["COMPLETED"] * 3


def test_what_is_cancelled_while_it_is_paused_turns_back_and_waits(
    storage: DjangoSagaStorage,
) -> None:
    in_the_middle("act Pay", lambda: pause(TRIP, storage=storage))
    execution = TripSaga(storage=storage).run(Trip())
    assert cancel(execution.pk, reason="a mistake", storage=storage).status == "COMPENSATING"
    assert (WORLD.calls, swept(storage)) == (["act Pack", "act Pay"], [])
    resume(TRIP, storage=storage)
    assert swept(storage) == ["FAILED"]
    assert WORLD.calls[2:] == ["compensate Pay", "compensate Pack"]


def test_cancelled_and_paused_in_the_same_step_it_turns_back_and_waits(
    storage: DjangoSagaStorage,
) -> None:
    def meanwhile() -> None:
        cancel(the_row(storage).pk, reason="a mistake", storage=storage)
        pause(TRIP, storage=storage)

    in_the_middle("act Pack", meanwhile)
    TripSaga(storage=storage).run(Trip())
    row = the_row(storage)
    assert (row.status, row.in_flight, WORLD.calls) == ("COMPENSATING", False, ["act Pack"])
    resume(TRIP, storage=storage)
    assert swept(storage) == ["FAILED"]


def test_what_nothing_is_to_be_undone_of_is_cancelled_at_once_though_paused(
    storage: DjangoSagaStorage,
) -> None:
    pause(TRIP, storage=storage)
    execution = TripSaga(storage=storage).enqueue(Trip())
    assert cancel(execution.pk, reason="a mistake", storage=storage).status == "FAILED"
    assert WORLD.calls == []


def test_of_two_pauses_either_keeps_it_waiting(storage: DjangoSagaStorage) -> None:
    pause(TRIP, storage=storage)
    pause(TRIP, "Pack", storage=storage)
    due_trip(alias=storage.alias)
    resume(TRIP, storage=storage)
    assert swept(storage) == []
    resume(TRIP, "Pack", storage=storage)
    assert swept(storage) == ["COMPLETED"]


def test_a_pause_says_since_when_by_whom_and_why(storage: DjangoSagaStorage) -> None:
    user = User.objects.create_superuser("grace")
    made = pause(TRIP, "Pay", user=user, reason="the bank is down", storage=storage)
    assert (made.user_name, made.reason) == ("grace", "the bank is down")
    with pytest.raises(SagaError, match=r"TripSaga Pay is paused already, since 20.* by grace"):
        pause(TRIP, "Pay", storage=storage)
    resume(TRIP, "Pay", storage=storage)
    with pytest.raises(SagaError, match=r"tests\.TripSaga Pay is not paused"):
        resume(TRIP, "Pay", storage=storage)
    said = SagaAuditEntry.objects.using(storage.alias).order_by("id")
    assert [(e.verb, e.saga, e.step, e.result) for e in said] == [
        ("pause", TRIP, "Pay", "done"),
        ("pause", TRIP, "Pay", "refused"),
        ("resume", TRIP, "Pay", "done"),
        ("resume", TRIP, "Pay", "refused"),
    ]


@pytest.mark.parametrize(
    ("saga", "step"),
    [("gone.Saga", ""), (TRIP, "Gone"), ("", ""), ("x" * 300, ""), (TRIP, "y" * 300), ("\x00", "")],
)
def test_what_there_is_not_cannot_be_paused(
    saga: str, step: str, storage: DjangoSagaStorage
) -> None:
    with pytest.raises(SagaError, match=r"No saga is named|has no step"):
        pause(saga, step, storage=storage)
    assert SagaAuditEntry.objects.using(storage.alias).get().result == "refused"
    assert not SagaPause.objects.using(storage.alias).exists()


def test_what_the_code_has_lost_can_be_paused_while_there_are_executions_of_it(
    storage: DjangoSagaStorage,
) -> None:
    lost = changed(lost_trip(alias=storage.alias), saga="gone.Saga")
    pause("gone.Saga", storage=storage)
    assert swept(storage) == []
    resume("gone.Saga", storage=storage)
    assert swept(storage) == ["STUCK"]
    assert the_row(storage).pk == lost.pk


@pytest.mark.parametrize("verb", [pause, resume])
def test_pausing_and_resuming_take_the_permission(
    verb: Callable[..., Any], storage: DjangoSagaStorage
) -> None:
    if verb is resume:
        pause(TRIP, storage=storage)
    user = User.objects.create_user("op")
    user.user_permissions.set(Permission.objects.exclude(codename="pause_sagaexecution"))
    with pytest.raises(PermissionDenied, match="pause_sagaexecution"):
        verb(TRIP, user=user, storage=storage)
    assert SagaPause.objects.using(storage.alias).exists() is (verb is resume)
    entry = SagaAuditEntry.objects.using(storage.alias).order_by("-id")[0]
    assert (entry.verb, entry.saga, entry.result) == (verb.__name__, TRIP, "refused")
    user.user_permissions.set(Permission.objects.filter(codename="pause_sagaexecution"))
    verb(TRIP, user=User.objects.get(), storage=storage)
    assert SagaPause.objects.using(storage.alias).exists() is (verb is pause)


def test_a_pause_is_rolled_back_with_the_callers_transaction(storage: DjangoSagaStorage) -> None:
    with transaction.atomic(using=storage.alias):
        pause(TRIP, storage=storage)
        transaction.set_rollback(True, using=storage.alias)
    assert not SagaPause.objects.using(storage.alias).exists()
    assert not SagaAuditEntry.objects.using(storage.alias).exists()


def test_paused_by_several_at_once_it_is_paused_once(storage: DjangoSagaStorage) -> None:
    barrier, came = threading.Barrier(4), []

    def run() -> None:
        barrier.wait()
        try:
            came.append(pause(TRIP, storage=storage))
        except SagaError as error:
            came.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(one).__name__ for one in came) == ["SagaError"] * 3 + ["SagaPause"]


def test_paused_and_resumed_all_the_time_each_step_is_done_once(
    storage: DjangoSagaStorage,
) -> None:
    """A driver that lets go races with the sweep that goes on, again and again."""
    ids = [uuid.uuid4() for _ in range(6)]
    stop = threading.Event()

    def meddle() -> None:
        try:
            while not stop.is_set():
                pause(TRIP, storage=storage)
                resume(TRIP, storage=storage)
        finally:
            connections.close_all()

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        for id in ids:
            TripSaga(storage=storage).run(Trip(), saga_id=id)
            swept(storage)
    finally:
        stop.set()
        meddler.join()
    swept(storage)
    rows = SagaExecution.objects.using(storage.alias)
    assert set(rows.values_list("status", flat=True)) == {"COMPLETED"}
    assert sorted(WORLD.calls) == sorted(ALL * len(ids))


@pytest.mark.parametrize("others", [0, 3])
def test_a_saga_that_runs_costs_no_statement_more_for_it(others: int) -> None:
    for number in range(others):
        SagaPause.objects.create(saga=f"other.{number}")
    saga = TripSaga()
    saga.run(Trip())
    with CaptureQueriesContext(connections["default"]) as captured:
        saga.run(Trip())
    assert [query["sql"].split()[0] for query in captured] == ["INSERT", "WITH", "WITH", "WITH"]


def test_paused_an_rq_job_ends_quietly_and_the_next_sweep_sends_another(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"pauses-{uuid.uuid4().hex[:8]}"
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, name: {"URL": os.environ["REDIS_URL"]}}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": name, "LEASE": 60}
    queue = get_queue(name, serializer=JSONSerializer)
    caplog.set_level("INFO", "django_saga.rq")
    try:
        execution = TripSaga().enqueue(Trip())
        pause(TRIP, "Pay")
        run_saga(str(execution.pk))
        assert WORLD.calls == ["act Pack"]
        run_saga(str(execution.pk))
        assert "paused before act of step Pay" in caplog.text
        assert (WORLD.calls, list(sweep())) == (["act Pack"], [])
        resume(TRIP, "Pay")
        assert [recovered.saga_id for recovered in sweep()] == [execution.pk]
        assert queue.count == 2
        run_saga(str(execution.pk))
        assert WORLD.calls == ALL
    finally:
        queue.empty()
        queue.connection.close()


def test_a_lease_is_not_taken_though_a_pause_is_seen_too_late(storage: DjangoSagaStorage) -> None:
    """By hand one may acquire what is paused; a driver may not."""
    waiting = compensating_trip(alias=storage.alias)
    pause(TRIP, storage=storage)
    with pytest.raises(SagaPaused):
        storage.acquire(waiting.pk, driver="me", lease=60)
    claim = storage.acquire(waiting.pk, driver="me", lease=60, by_hand=True)
    assert claim.paused
    later = timezone.now() + timedelta(seconds=10)
    assert the_row(storage).lease_until > later
