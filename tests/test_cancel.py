"""Cancelling: what is done is undone, wherever the saga is when it is asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.db import connections
from django.test.utils import CaptureQueriesContext

from django_saga import Fallback, Saga, SagaError, SagaFailed, current_step
from django_saga.drivers import drive
from django_saga.interventions import CANCELLED
from django_saga.models import SagaAuditEntry, SagaExecution, SagaFailureGroup, SagaStepRecord
from django_saga.operations import cancel, resume_forward, retry
from django_saga.recovery import _go_on, sweep
from django_saga.signals import saga_started
from django_saga.storage import DjangoSagaStorage
from django_saga.verdicts import unsettled
from tests.operated import (
    STATES,
    WORLD,
    Leave,
    Pack,
    Trip,
    TripSaga,
    _Step,
    changed,
    driven_trip,
    due_trip,
    halted_trip,
    lost_trip,
    pending_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

ALIASES = list(django_settings.DATABASES)
PATIENCE = 60  # seconds until a condition that does not come about fails its test

CHILD = """
import sys
import django
django.setup()
from django_saga.storage import DjangoSagaStorage
from tests.sagas import Journey, Travel
alias, id, ledger, gate = sys.argv[1:]
Travel(storage=DjangoSagaStorage(alias)).run(Journey(ledger, gate), saga_id=id)
"""


class Unsure(_Step):
    """Leaves open whether it had an effect."""

    uncertain = (Exception,)


class FallbackSaga(Saga[Trip]):
    name = "tests.CancelledFallbackSaga"
    steps = [Pack, Fallback(step=Unsure, fallback=Leave)]


@pytest.fixture
def storage(alias: str) -> DjangoSagaStorage:
    return DjangoSagaStorage(alias)


def the_row(storage: DjangoSagaStorage) -> SagaExecution:
    return SagaExecution.objects.using(storage.alias).get()


def cancel_it(storage: DjangoSagaStorage) -> SagaExecution:
    return cancel(the_row(storage).pk, reason="a mistake", storage=storage)


def in_the_middle(call: str, do: Callable[[], Any]) -> None:
    """Have this done while this call is made."""

    def meanwhile() -> None:
        if WORLD.calls[-1] == call:
            WORLD.interlude = None
            do()

    WORLD.interlude = meanwhile


def history(storage: DjangoSagaStorage) -> list[tuple[str, str, str]]:
    records = SagaStepRecord.objects.using(storage.alias).order_by("id")
    return list(records.values_list("action", "step", "outcome"))


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
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_driven_turns_back_when_the_step_in_hand_has_ended(
    way: str, storage: DjangoSagaStorage
) -> None:
    in_the_middle("act Pay", lambda: cancel_it(storage))
    with pytest.raises(SagaFailed, match=r"it was cancelled and all was compensated.*a mistake"):
        WAYS[way](TripSaga(storage=storage))
    row = the_row(storage)
    assert (row.status, row.error_type, row.failed_step) == ("FAILED", CANCELLED, "")
    assert row.error_message == row.cancel_reason == "by code: a mistake"
    assert WORLD.calls == ["act Pack", "act Pay", "compensate Pay", "compensate Pack"]
    assert not SagaFailureGroup.objects.using(storage.alias).exists()
    assert not SagaExecution.objects.using(storage.alias).filter(unsettled()).exists()
    entry = SagaAuditEntry.objects.using(storage.alias).get()
    assert "turns back when the step in hand has ended" in entry.detail


@pytest.mark.parametrize("way", WAYS)
def test_in_its_last_step_it_completes_all_the_same(way: str, storage: DjangoSagaStorage) -> None:
    in_the_middle("act Leave", lambda: cancel_it(storage))
    WAYS[way](TripSaga(storage=storage))
    assert the_row(storage).status == "COMPLETED"
    assert WORLD.calls == ["act Pack", "act Pay", "act Leave"]


def test_cancelled_in_the_step_that_fails_it_is_the_failure_that_counts(
    storage: DjangoSagaStorage,
) -> None:
    WORLD.trouble = {"act Pay": "no money"}
    in_the_middle("act Pay", lambda: cancel_it(storage))
    with pytest.raises(SagaFailed, match="no money"):
        TripSaga(storage=storage).run(Trip())
    row = the_row(storage)
    assert (row.error_type, row.failed_step) == ("Sorry", "Pay")
    assert WORLD.calls == ["act Pack", "act Pay", "compensate Pack"]


@pytest.mark.parametrize("alias", ALIASES, indirect=True)
def test_what_another_process_drives_turns_back_there(
    alias: str,
    storage: DjangoSagaStorage,
    child_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    ledger, gate, id = tmp_path / "ledger", tmp_path / "gate", uuid.uuid4()
    ledger.touch()
    arguments = [alias, str(id), str(ledger), str(gate)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=child_environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            deadline = time.monotonic() + PATIENCE
            while "act BookHotel" not in ledger.read_text():
                assert child.poll() is None, child.stderr and child.stderr.read()
                assert time.monotonic() < deadline, "the hotel was never booked"
                time.sleep(0.02)
            asked = cancel(id, reason="a mistake", storage=storage)
            assert (asked.status, asked.step, asked.in_flight) == ("RUNNING", "BookHotel", True)
            assert asked.driver.endswith(f":{child.pid}")
        finally:
            gate.touch()
        assert child.stderr is not None
        assert "it was cancelled" in child.stderr.read()
    assert the_row(storage).status == "FAILED"
    assert [line.split()[:2] for line in ledger.read_text().splitlines()] == [
        ["act", "BookFlight"],
        ["act", "BookHotel"],
        ["compensate", "BookHotel"],
        ["compensate", "BookFlight"],
    ]


def test_between_its_creation_and_its_first_step_it_turns_back_after_that(
    storage: DjangoSagaStorage,
) -> None:
    def meanwhile(**_: Any) -> None:
        cancel_it(storage)

    saga_started.connect(meanwhile)
    try:
        with pytest.raises(SagaFailed, match="cancelled"):
            TripSaga(storage=storage).run(Trip())
    finally:
        saga_started.disconnect(meanwhile)
    assert WORLD.calls == ["act Pack", "compensate Pack"]


@pytest.mark.parametrize("make", [pending_trip, due_trip])
def test_what_has_not_begun_ends_at_once(
    make: Callable[..., SagaExecution], storage: DjangoSagaStorage
) -> None:
    make(alias=storage.alias)
    row = cancel_it(storage)
    assert (row.status, row.error_type, row.wake_at) == ("FAILED", CANCELLED, None)
    assert (WORLD.calls, history(storage), list(sweep(storage=storage))) == ([], [], [])


def test_what_a_sweep_has_claimed_and_not_begun_begins_no_step(
    storage: DjangoSagaStorage,
) -> None:
    due_trip(alias=storage.alias)
    (claim,) = storage.due(1, driver="me", lease=60)
    assert cancel_it(storage).status == "PENDING"
    drive(_go_on(claim, storage))
    assert (the_row(storage).status, WORLD.calls) == ("FAILED", [])


def test_what_waits_for_its_retry_turns_back_at_once(storage: DjangoSagaStorage) -> None:
    waiting = pending_trip(alias=storage.alias)
    changed(waiting, status="RUNNING", step="Pay", attempt=2, effects=[["Pack", "DONE"]])
    row = cancel_it(storage)
    assert (row.status, WORLD.calls) == ("FAILED", ["compensate Pack"])
    assert history(storage) == [("compensate", "Pack", "DONE")]


@pytest.mark.parametrize("atomic", [False, True])
def test_the_step_that_was_lost_with_its_driver_is_undone_too(
    atomic: bool, storage: DjangoSagaStorage
) -> None:
    """Unless its transaction was lost with it."""
    told: list[Any] = []
    WORLD.interlude = lambda: told.append(current_step().act_outcome)
    lost = changed(lost_trip(alias=storage.alias), atomic=atomic)
    row = cancel_it(storage)
    assert (row.status, row.token > lost.token) == ("FAILED", True)
    assert WORLD.calls == ([] if atomic else ["compensate Pack"])
    assert told == ([] if atomic else ["UNKNOWN"])
    assert history(storage)[0] == ("act", "Pack", "INTERRUPTED")


def test_what_loses_its_driver_once_it_was_asked_for_is_cancelled_by_recovery(
    storage: DjangoSagaStorage,
) -> None:
    driven = driven_trip(alias=storage.alias)
    assert cancel_it(storage).status == "RUNNING"
    changed(driven, lease_until=driven.created_at)
    assert [r.status for r in sweep(storage=storage)] == ["FAILED"]
    assert WORLD.calls == ["compensate Pack"]
    assert history(storage) == [("act", "Pack", "INTERRUPTED"), ("compensate", "Pack", "DONE")]
    assert the_row(storage).error_type == CANCELLED


def test_while_a_step_is_undone_for_its_fallback_it_turns_back(
    storage: DjangoSagaStorage,
) -> None:
    WORLD.trouble = {"act Unsure": "who knows"}
    in_the_middle("compensate Unsure", lambda: cancel_it(storage))
    with pytest.raises(SagaFailed, match="cancelled"):
        FallbackSaga(storage=storage).run(Trip())
    expected = ["act Pack", "act Unsure", "compensate Unsure", "compensate Pack"]
    assert WORLD.calls == expected


def test_cancelled_by_hand_while_a_step_is_undone_for_its_fallback_it_is_undone_first(
    storage: DjangoSagaStorage,
) -> None:
    waiting = pending_trip(alias=storage.alias)
    changed(
        waiting,
        saga=FallbackSaga.name,
        plan=[["Pack"], ["Unsure", "Leave"]],
        status="RUNNING",
        step="Unsure",
        action="compensate",
        effects=[["Pack", "DONE"], ["Unsure", "UNKNOWN"]],
    )
    assert cancel_it(storage).status == "FAILED"
    assert WORLD.calls == ["compensate Unsure", "compensate Pack"]


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("compensating", "is COMPENSATING, and never goes forward again"),
        ("undoing", "is COMPENSATING, and never goes forward again"),
        ("failed", "is FAILED"),
        ("stuck", "is STUCK; retry it"),
        ("completed", "is completed"),
    ],
)
def test_what_has_turned_back_or_ended_is_not_cancelled(
    state: str, why: str, storage: DjangoSagaStorage
) -> None:
    STATES[state](alias=storage.alias)
    with pytest.raises(SagaError, match=why):
        cancel_it(storage)
    assert the_row(storage).cancel_reason == ""


def test_a_compensation_that_fails_leaves_it_stuck_in_a_group_of_its_own(
    storage: DjangoSagaStorage,
) -> None:
    WORLD.trouble = {"compensate Pack": "bag lost"}
    lost_trip(alias=storage.alias)
    row = cancel_it(storage)
    assert (row.status, row.error_type) == ("STUCK", CANCELLED)
    group = SagaFailureGroup.objects.using(storage.alias).get()
    assert (group.id, group.step, group.action) == (row.failure_group, "Pack", "compensate")


def test_what_was_mended_and_is_cancelled_then_leaves_the_group_of_its_former_failure(
    storage: DjangoSagaStorage,
) -> None:
    halted_trip(alias=storage.alias)
    in_the_middle("act Pay", lambda: cancel_it(storage))
    resume_forward(the_row(storage).pk, reason="mended", storage=storage)
    row = the_row(storage)
    assert (row.status, row.error_type, row.failure_group) == ("FAILED", CANCELLED, "")
    assert not SagaExecution.objects.using(storage.alias).filter(unsettled()).exists()


def test_a_cancelled_one_can_be_started_anew(storage: DjangoSagaStorage) -> None:
    lost_trip(alias=storage.alias)
    new = retry(cancel_it(storage).pk, storage=storage)
    assert (new.status, new.cancel_reason) == ("COMPLETED", "")


@pytest.mark.parametrize("alias", ALIASES, indirect=True)
def test_cancelled_at_any_moment_all_is_done_or_all_is_undone(
    alias: str, storage: DjangoSagaStorage
) -> None:
    """An operator's verb races with the driver's checkpoints."""

    def ask() -> None:
        try:
            while not stop.is_set():
                try:
                    cancel(id, reason="a mistake", storage=storage)
                except SagaError as error:
                    came.append(str(error))
                else:
                    came.append("done")
                    return
        finally:
            connections.close_all()

    for _ in range(8):
        id, stop, came = uuid.uuid4(), threading.Event(), list[str]()
        WORLD.reset()
        asker = threading.Thread(target=ask)
        asker.start()
        try:
            TripSaga(storage=storage).run(Trip(), saga_id=id)
            failed = False
        except SagaFailed:
            failed = True
        finally:
            stop.set()
            asker.join()
        assert not failed or came[-1] == "done"
        status = SagaExecution.objects.using(alias).get(pk=id).status
        done = [call.split()[1] for call in WORLD.calls if call.startswith("act")]
        undone = [call.split()[1] for call in WORLD.calls if call.startswith("compensate")]
        assert status in ("COMPLETED", "FAILED")
        assert undone == (done[::-1] if status == "FAILED" else [])


def test_a_cancelled_run_costs_one_statement_for_turning_back() -> None:
    saga = TripSaga()
    saga.run(Trip())
    SagaExecution.objects.all().delete()
    WORLD.reset()

    def ask() -> None:
        SagaExecution.objects.update(cancel_reason="a mistake")

    in_the_middle("act Pay", ask)
    with CaptureQueriesContext(connections["default"]) as captured, pytest.raises(SagaFailed):
        saga.run(Trip())
    statements = [query["sql"].split()[0] for query in captured]
    # created; Pack; asked; Pay; turned back; Pay undone; Pack undone
    assert statements == ["INSERT", "WITH", "UPDATE", "WITH", "UPDATE", "WITH", "WITH"]
