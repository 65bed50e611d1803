"""A connection lost around a checkpoint, and zombies: nothing is doubled, nothing undone."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.contrib.auth.models import Group
from django.db import OperationalError, connection, connections, transaction
from django.db.backends.utils import CursorWrapper
from django.test import TestCase

from django_saga import (
    Fallback,
    LeaseLost,
    RetryLater,
    Saga,
    SagaError,
    SagaFailed,
    SagaNotFound,
    SagaStepHandler,
    StorageUnavailable,
    current_step,
    machine,
    operations,
    recover_saga,
    signals,
)
from django_saga.conf import conf
from django_saga.flow import Run
from django_saga.keeper import Keeper
from django_saga.models import SagaExecution
from django_saga.recovery import BATCH, sweep
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage
from django_saga.storage.sql import EXECUTIONS
from tests.steps import Calls, Log, make_step, raises

pytestmark = pytest.mark.usefixtures("committing_databases")


@pytest.fixture
def calls() -> Calls:
    return Calls()


def write_group(context: Log) -> None:
    Group.objects.create(name=f"group of {context.number}")


def delete_group(context: Log) -> None:
    Group.objects.filter(name=f"group of {context.number}").delete()


def mixed_saga(calls: Calls, *, fail: bool = False) -> Saga[Any]:
    """An atomic step between two others, the last of which may fail."""
    steps = [
        make_step("A", calls),
        make_step("B", calls, act=write_group, compensate=delete_group, atomic=True),
        make_step("C", calls, act=raises(RuntimeError("no")) if fail else None),
    ]
    return Saga(steps=steps, name="tests.faults")


class Fault:
    """Loses the connection around the n-th statement on executions, before or after it ran."""

    def __init__(self, at: int, after: bool) -> None:
        self.left, self.after, self.fired = at, after, False

    def __call__(
        self, execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any
    ) -> Any:
        ours = EXECUTIONS in sql and not sql.startswith("INSERT")
        self.left -= ours
        if not ours or self.left or self.fired:
            return execute(sql, params, many, context)
        self.fired = True
        if self.after:
            execute(sql, params, many, context)
        cursor: CursorWrapper = context["cursor"]
        terminate(cursor.connection.info.backend_pid)
        if self.after:
            raise OperationalError("the connection is lost")
        return execute(sql, params, many, context)


def terminate(pid: int) -> None:
    """End a session of the server's from another connection."""
    other = connections.create_connection("default")
    with other.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
    other.close()


@contextmanager
def losing_the_connection(at: int, after: bool) -> Iterator[Fault]:
    fault = Fault(at, after)
    with connection.execute_wrapper(fault):
        yield fault


@pytest.mark.parametrize("after", [False, True], ids=["lost before", "lost after"])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("driver", ["sync", "async"])
def test_a_lost_connection_at_a_checkpoint_doubles_and_undoes_nothing(
    calls: Calls, at: int, after: bool, driver: str
) -> None:
    saga, context = mixed_saga(calls), Log(number=at)
    with losing_the_connection(at, after) as fault:
        execution = saga.run(context) if driver == "sync" else async_to_sync(saga.arun)(context)
    assert fault.fired
    assert execution.status == "COMPLETED"
    assert Group.objects.filter(name=f"group of {at}").count() == 1
    assert calls.count("act A") == calls.count("act C") == 1
    assert not [call for call in calls if call.startswith("compensate")]
    Group.objects.all().delete()


@pytest.mark.parametrize("after", [False, True], ids=["lost before", "lost after"])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_lost_connection_while_compensating_leaves_all_undone(
    calls: Calls, at: int, after: bool
) -> None:
    with losing_the_connection(at, after) as fault, pytest.raises(SagaFailed):
        mixed_saga(calls, fail=True).run(Log(number=at))
    assert fault.fired
    assert not Group.objects.exists()
    assert calls.count("compensate A") == 1


def test_a_zombie_writes_nothing_and_its_atomic_writes_roll_back(calls: Calls) -> None:
    def act(context: Log) -> None:
        write_group(context)
        other = connections.create_connection("default")
        with other.cursor() as cursor:
            cursor.execute(f"UPDATE {EXECUTIONS} SET token = token + 1 WHERE status = 'RUNNING'")
        other.close()

    with pytest.raises(LeaseLost, match="was taken over while step A"):
        Saga(steps=[make_step("A", calls, act=act, atomic=True)], name="tests.zombie").run(Log())
    assert not Group.objects.exists()


def test_a_lease_that_ran_out_is_taken_over_and_the_lost_attempt_is_recorded(calls: Calls) -> None:
    class Takeover(Saga[Log]):
        name = "tests.takeover"
        steps = [make_step("A", calls), make_step("B", calls)]

    storage = DjangoSagaStorage()
    transaction = Takeover().transaction(Log())
    next(iter(transaction))
    SagaExecution.objects.filter(pk=transaction.saga_id).update(lease_until="2020-01-01T00:00Z")
    execution = recover_saga(transaction.saga_id)
    assert execution.status == "COMPLETED"
    outcomes = [(r.step, r.attempt, r.outcome) for r in storage.history(execution.id)]
    assert outcomes == [("A", 1, "DONE"), ("B", 1, "INTERRUPTED"), ("B", 2, "DONE")]
    with pytest.raises(LeaseLost):
        next(iter(transaction))
    assert calls == ["act A", "act B", "act B"], "the zombie was called, and wrote nothing"


def test_the_keeper_renews_the_lease_of_a_long_step(calls: Calls, settings: Any) -> None:
    settings.DJANGO_SAGA = {"LEASE": 0.6}

    def act(context: Log) -> None:
        seen: set[Any] = set()
        while len(seen) < 4:  # the first lease, and three renewals
            other = connections.create_connection("default")
            with other.cursor() as cursor:
                query = f"SELECT lease_until FROM {EXECUTIONS} WHERE id = %s"
                cursor.execute(query, [current_step().saga_id])
                seen.add(cursor.fetchone())
            other.close()

    saga = Saga(steps=[make_step("A", calls, act=act)], name="tests.long")
    assert saga.run(Log()).status == "COMPLETED"
    assert conf.LEASE == 0.6


@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
def test_the_keeper_renews_the_lease_while_a_checkpoint_waits(
    calls: Calls, settings: Any, is_async: bool
) -> None:
    """The handler's time is over then, but not its driver's."""
    settings.DJANGO_SAGA = {"LEASE": 0.6}
    leases: set[Any] = set()

    def hold_up(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        while sql.startswith("WITH execution") and len(leases) < 3:
            other = connections.create_connection("default")
            with other.cursor() as cursor:
                query = f"SELECT lease_until, lease_until < now() FROM {EXECUTIONS} WHERE saga = %s"
                cursor.execute(query, ["tests.held_up"])
                lease, lapsed = cursor.fetchone()
            other.close()
            assert not lapsed
            leases.add(lease)
        return execute(sql, *rest)

    step = make_step("A", calls, is_async=is_async, timeout=600)
    with connection.execute_wrapper(hold_up):
        execution = Saga(steps=[step], name="tests.held_up").run(Log())
    assert execution.status == "COMPLETED"


@pytest.mark.parametrize("caught", [False, True], ids=["plainly", "as an error of its own"])
def test_an_atomic_step_whose_handler_meets_the_lost_connection_is_run_again(
    calls: Calls, caught: bool
) -> None:
    def act(context: Log) -> None:
        if current_step().attempt == 1:
            terminate(connection.connection.info.backend_pid)
        try:
            write_group(context)
        except OperationalError as error:
            raise RuntimeError("what now") if caught else error from error

    step = make_step("A", calls, act=act, compensate=delete_group, atomic=True)
    execution = Saga(steps=[step], name="tests.session").run(Log(number=6))
    assert execution.status == "COMPLETED"
    assert Group.objects.filter(name="group of 6").count() == 1
    outcomes = [r.outcome for r in DjangoSagaStorage().history(execution.id)]
    assert outcomes == ["INTERRUPTED", "DONE"]
    Group.objects.all().delete()


def test_a_driver_that_lost_its_connection_does_not_take_anothers_end_for_its_own(
    calls: Calls,
) -> None:
    class Overtaken(Saga[Log]):
        name = "tests.overtaken"
        steps = [make_step("A", calls, act=write_group, compensate=delete_group, atomic=True)]

    ends: list[object] = []

    def note_end(sender: object, **_: object) -> None:
        ends.append(sender)

    def finish_elsewhere() -> None:
        rows = SagaExecution.objects.filter(saga=Overtaken.name)
        rows.update(lease_until="2020-01-01T00:00Z")
        recover_saga(rows.get().id)
        connections.close_all()

    def overtake(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        if sql.startswith("WITH execution") and not ends:
            terminate(connection.connection.info.backend_pid)
            thread = Thread(target=finish_elsewhere)
            thread.start()
            thread.join()
        return execute(sql, *rest)

    signals.saga_completed.connect(note_end, sender=Overtaken)
    with connection.execute_wrapper(overtake), pytest.raises(LeaseLost):
        Overtaken().run(Log(number=5))
    assert ends == [Overtaken], "the other driver told of it"
    assert Group.objects.filter(name="group of 5").count() == 1
    Group.objects.all().delete()


def test_a_driver_that_hears_of_its_start_after_its_lease_calls_nothing(
    calls: Calls, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"LEASE": 0.5}
    saga = Saga(steps=[make_step("A", calls)], name="tests.late")

    def hold_up(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        answer = execute(sql, *rest)
        while sql.startswith("INSERT") and not has_lapsed():
            time.sleep(0.01)
        return answer

    def has_lapsed() -> bool:
        other = connections.create_connection("default")
        with other.cursor() as cursor:
            cursor.execute(
                f"SELECT lease_until < now() FROM {EXECUTIONS} WHERE saga = 'tests.late'"
            )
            (lapsed,) = cursor.fetchone()
        other.close()
        return bool(lapsed)

    with connection.execute_wrapper(hold_up), pytest.raises(LeaseLost, match="ran out before"):
        saga.run(Log())
    assert calls == []


def test_a_database_that_goes_away_in_a_transaction_is_no_failure_of_the_consumer(
    calls: Calls, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"INLINE_WAIT": 0}
    steps = mixed_saga(calls).transaction(Log(number=77))
    away = False

    def fail(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        if away and EXECUTIONS in sql:
            raise OperationalError("the database is away")
        return execute(sql, *rest)

    def consume() -> None:
        nonlocal away
        with steps:
            for result in steps:
                away = result.step_type.__name__ == "B"

    with connection.execute_wrapper(fail), pytest.raises(StorageUnavailable):
        consume()
    storage = DjangoSagaStorage()
    SagaExecution.objects.filter(pk=steps.saga_id).update(lease_until=None)
    assert SagaExecution.objects.get(pk=steps.saga_id).status == "RUNNING"
    assert "compensate A" not in calls
    execution = mixed_saga(calls).run(Log(), saga_id=steps.saga_id)
    assert execution.status == "COMPLETED"
    outcomes = [(r.step, r.attempt, r.outcome) for r in storage.history(execution.id)]
    assert outcomes[-2:] == [("C", 1, "INTERRUPTED"), ("C", 2, "DONE")]
    Group.objects.all().delete()


def test_a_failing_on_commit_callback_of_an_atomic_step_leaves_the_step_done(
    calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    def act(context: Log) -> None:
        transaction.on_commit(lambda: 1 / 0)

    step = make_step("A", calls, act=act, atomic=True)
    execution = Saga(steps=[step, make_step("B", calls)], name="tests.on_commit").run(Log())
    assert execution.status == "COMPLETED"
    assert calls == ["act A", "act B"]
    assert "on_commit() callback" in caplog.text


def test_a_checkpoint_that_alone_fails_is_given_up(calls: Calls, settings: Any) -> None:
    settings.DJANGO_SAGA = {"INLINE_WAIT": 0.2}

    def fail(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        if sql.startswith("WITH execution"):
            raise OperationalError("no space left on device")
        return execute(sql, *rest)

    with connection.execute_wrapper(fail), pytest.raises(StorageUnavailable, match="no space"):
        mixed_saga(calls).run(Log())
    assert calls == ["act A"]


def test_what_another_driver_stored_meanwhile_is_not_taken_for_ones_own(calls: Calls) -> None:
    """A's checkpoint is lost, and its driver freezes. Another takes over, does A again and dies
    in B, when the row stands where the first would have put it, with one attempt of B too many."""
    lost = False

    def act(context: Log) -> None:
        raise KeyboardInterrupt if calls.count("act B") == 1 else RuntimeError("not now")

    class Meanwhile(Saga[Log]):
        name = "tests.meanwhile"
        steps = [make_step("A", calls), make_step("B", calls, act=act)]

    def lose(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        nonlocal lost
        if lost or not sql.startswith("WITH execution"):
            return execute(sql, *rest)
        lost = True
        SagaExecution.objects.filter(saga=Meanwhile.name).update(lease_until=None)
        with pytest.raises(KeyboardInterrupt):
            recover_saga(SagaExecution.objects.get(saga=Meanwhile.name).id)
        raise OperationalError("the connection is lost")

    with connection.execute_wrapper(lose), pytest.raises(LeaseLost, match="taken over"):
        Meanwhile().run(Log())
    assert calls == ["act A", "act A", "act B"]
    SagaExecution.objects.filter(saga=Meanwhile.name).update(lease_until=None)
    execution = recover_saga(SagaExecution.objects.get(saga=Meanwhile.name).id)
    assert execution.status == "FAILED"
    assert calls[3:] == ["act B", "compensate B", "compensate A"]


def test_a_row_that_was_spoilt_by_hand_does_not_stand_in_the_way_of_others(calls: Calls) -> None:
    class Spoilt(Saga[Log]):
        name = "tests.spoilt"
        steps = [make_step("A", calls)]

    bad, good = (Spoilt().enqueue(Log(), delay=1000).id for _ in range(2))
    SagaExecution.objects.filter(pk__in=[bad, good]).update(wake_at=None)
    SagaExecution.objects.filter(pk=bad).update(plan={"no": "plan"})
    assert [(r.saga_id, r.status) for r in sweep(saga="tests.spoilt")] == [(good, "COMPLETED")]
    SagaExecution.objects.filter(pk=bad).update(effects="nonsense", lease_until=None)
    with pytest.raises(SagaNotFound, match="No saga execution"):
        recover_saga(bad)
    SagaExecution.objects.filter(pk=bad).delete()


def test_a_spoilt_row_raises_a_value_error_whatever_msgspec_s_own_errors_are() -> None:
    with pytest.raises(ValueError, match="SPLENDID") as raised:
        SagaExecution(status="SPLENDID").state  # noqa: B018
    assert type(raised.value) is ValueError, "msgspec's are none up to its 0.20"


def test_a_context_to_go_back_to_that_is_spoilt_is_stuck_before_anything_is_called_again(
    calls: Calls,
) -> None:
    class Waits(Saga[Log]):
        name = "tests.waits"
        steps = [
            Fallback(
                step=make_step("Card", calls, act=raises(RetryLater(3600))),
                fallback=make_step("Wallet", calls),
            )
        ]

    execution = Waits().run(Log())
    rows = SagaExecution.objects.filter(pk=execution.pk)
    assert rows.update(fallback_context='{"number": "one"}', wake_at=None) == 1
    stuck = recover_saga(execution.pk)
    assert (stuck.status, calls) == ("STUCK", ["act Card"])
    assert "number" in stuck.stuck_reason


@pytest.mark.parametrize("was_atomic", [False, True])
def test_a_lost_attempt_counts_as_the_code_that_began_it_had_declared_the_step(
    calls: Calls, was_atomic: bool
) -> None:
    """Made atomic meanwhile, its remote effect would be forgotten; no longer atomic, invented."""
    lost = make_step("B", calls, act=raises(KeyboardInterrupt()), atomic=was_atomic)
    refused = make_step("B", calls, act=raises(RuntimeError("no")), atomic=not was_atomic)
    before, after = (
        Saga(steps=[make_step("A", calls), step], name="tests.declared") for step in (lost, refused)
    )
    saga_id = uuid.uuid4()
    with pytest.raises(KeyboardInterrupt):
        before.run(Log(), saga_id=saga_id)
    with pytest.raises(SagaFailed):
        after.run(Log(), saga_id=saga_id)
    undone = ["compensate A"] if was_atomic else ["compensate B", "compensate A"]
    assert calls == ["act A", "act B", "act B", *undone]


def test_what_has_ended_stays_as_it_ended_when_its_saga_is_gone(calls: Calls) -> None:
    """A late job of an execution whose saga was deleted since."""
    completed = Saga(steps=[make_step("A", calls)], name="tests.gone").run(Log())
    refused = make_step("A", calls, act=raises(RuntimeError("no")))
    with pytest.raises(SagaFailed) as failure:
        Saga(steps=[refused], name="tests.gone").run(Log())
    assert recover_saga(completed.pk).status == "COMPLETED"
    assert recover_saga(failure.value.execution.pk).status == "FAILED"
    assert SagaExecution.objects.get(pk=completed.pk).status == "COMPLETED"


# Rows that were edited by hand


def interrupted(saga: type[Saga[Log]], alias: str = "default") -> uuid.UUID:
    """An execution whose driver is gone in its first step, due at once."""
    transaction = saga(storage=DjangoSagaStorage(alias)).transaction(Log())
    next(iter(transaction))
    rows(alias).filter(pk=transaction.saga_id).update(lease_until=None)
    return transaction.saga_id


def rows(alias: str) -> Any:
    return SagaExecution.objects.using(alias)


@pytest.fixture
def edited(calls: Calls) -> type[Saga[Log]]:
    class Edited(Saga[Log]):
        name = "tests.edited"
        steps = [make_step("A", calls), make_step("B", calls)]

    return Edited


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("alias", django_settings.DATABASES)
def test_rows_that_cannot_be_read_do_not_use_up_a_sweep(
    alias: str, inline: bool, edited: type[Saga[Log]]
) -> None:
    spoilt = [interrupted(edited, alias) for _ in range(BATCH + 1)]
    rows(alias).filter(pk__in=spoilt).update(plan={"no": "plan"})
    well = interrupted(edited, alias)
    swept = list(sweep(inline=inline, storage=DjangoSagaStorage(alias), saga="tests.edited"))
    assert [recovered.saga_id for recovered in swept] == [well]
    limited = list(sweep(limit=1, storage=DjangoSagaStorage(alias), saga="tests.edited"))
    assert limited == []
    rows(alias).filter(saga="tests.edited").delete()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("step", "Nowhere"),
        ("plan", []),
        ("plan", [[]]),
        ("plan", [["A"], ["B"], ["B"]]),
        ("plan", [["A", "B", "C"]]),
        ("status", "COMPENSATING"),
        ("action", "compensate"),
        ("effects", [["A", "DONE"], ["A", "DONE"]]),
        ("effects", [["A", "DONE"], ["B", "DONE", "DONE"]]),
        ("recoveries", 2**31 - 1),
        ("attempt", 2**31 - 1),
    ],
)
@pytest.mark.parametrize("alias", ["default", "sqlite"])
def test_a_row_that_contradicts_itself_is_stuck_before_anything_is_called(
    alias: str, column: str, value: Any, edited: type[Saga[Log]], calls: Calls
) -> None:
    id = interrupted(edited, alias)
    assert rows(alias).filter(pk=id).update(**{column: value}) == 1
    stuck = recover_saga(id, storage=DjangoSagaStorage(alias))
    assert (stuck.status, calls) == ("STUCK", ["act A"])
    assert "contradicts itself" in stuck.stuck_reason


def test_a_row_that_is_to_undo_what_its_plan_does_not_name_is_stuck_too(
    edited: type[Saga[Log]], calls: Calls
) -> None:
    id = interrupted(edited)
    away = {"action": "compensate", "step": "Nowhere", "effects": [["Nowhere", "DONE"]]}
    rows("default").filter(pk=id).update(**away)
    stuck = recover_saga(id)
    assert (stuck.status, calls) == ("STUCK", ["act A"])
    assert "contradicts itself" in stuck.stuck_reason
    assert "'Nowhere', which its plan does not name" in stuck.stuck_reason


def test_times_that_python_cannot_read_do_not_end_a_sweep(edited: type[Saga[Log]]) -> None:
    """PostgreSQL knows infinity, and people use it."""
    endless, well = interrupted(edited), interrupted(edited)
    with connection.cursor() as cursor:
        query = f"UPDATE {EXECUTIONS} SET wake_at = '-infinity' WHERE id = %s"
        cursor.execute(query, [endless])
    swept = list(sweep(saga="tests.edited"))
    assert [(recovered.saga_id, recovered.status) for recovered in swept] == [(well, "COMPLETED")]
    for use in (recover_saga, operations.recover, operations.retry):
        with pytest.raises(SagaError, match="cannot be read"):
            use(endless)
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {EXECUTIONS} SET wake_at = NULL WHERE id = %s", [endless])


@pytest.mark.parametrize("alias", django_settings.DATABASES)
def test_a_token_that_cannot_be_raised_does_not_end_a_sweep(
    alias: str, edited: type[Saga[Log]]
) -> None:
    last, well = interrupted(edited, alias), interrupted(edited, alias)
    rows(alias).filter(pk=last).update(token=2**63 - 1)
    storage = DjangoSagaStorage(alias)
    assert [r.saga_id for r in sweep(storage=storage, saga="tests.edited")] == [well]
    with pytest.raises(SagaError, match="cannot be leased; was its row edited"):
        recover_saga(last, storage=storage)
    rows(alias).filter(pk=last).delete()


def test_a_lease_that_is_no_time_is_told(edited: type[Saga[Log]]) -> None:
    id = interrupted(edited, "sqlite")
    with connections["sqlite"].cursor() as cursor:
        query = f"UPDATE {EXECUTIONS} SET lease_until = 'tomorrow' WHERE id = %s"
        cursor.execute(query, [id.hex])
    with pytest.raises(SagaError, match="cannot be leased"):
        recover_saga(id, storage=DjangoSagaStorage("sqlite"))
    with pytest.raises(SagaError, match="a time that cannot be read"):
        operations.recover(id, storage=DjangoSagaStorage("sqlite"))


def test_operators_are_told_of_a_row_that_cannot_be_read(edited: type[Saga[Log]]) -> None:
    id = interrupted(edited)
    rows("default").filter(pk=id).update(status="SPLENDID")
    for use in (operations.recover, operations.retry):
        with pytest.raises(SagaError, match=r"cannot be read, was its row edited.*SPLENDID"):
            use(id)


def test_a_backend_that_cannot_be_told_of_a_retry_is_logged(
    settings: Any, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(Saga[Log]):
        name = "tests.stuck"
        steps = [make_step("A", calls)]

    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.DeadBackend"}
    id = interrupted(Stuck)
    rows("default").filter(pk=id).update(status="STUCK", effects=[["A", "DONE"]])
    assert operations.retry(id).status == "COMPENSATING"
    assert "nobody answers" in caplog.text
    assert calls == ["act A"]


@pytest.mark.parametrize("how", ["atomic", "autocommit"])
@pytest.mark.parametrize("driver", ["sync", "async"])
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_transaction_that_a_handler_leaves_open_is_rolled_back_and_told(
    calls: Calls, how: str, driver: str, raises: bool
) -> None:
    def leave_open(context: Log) -> None:
        if how == "atomic":
            transaction.atomic().__enter__()
        else:
            transaction.set_autocommit(False)
        Group.objects.create(name="left open")
        if raises:
            raise RuntimeError("no")

    steps = [make_step("A", calls), make_step("B", calls, act=leave_open)]
    saga = Saga(steps=steps, name="tests.left_open")
    with pytest.raises(SagaFailed, match="RuntimeError" if raises else "act of step B left a tr"):
        saga.run(Log()) if driver == "sync" else async_to_sync(saga.arun)(Log())
    undone = ["compensate A"] if raises else ["compensate B", "compensate A"]
    assert calls == ["act A", "act B", *undone]
    assert not Group.objects.filter(name="left open").exists()
    assert connection.get_autocommit(), "whatever comes next in this thread is not in its way"
    Saga(steps=[make_step("A", calls)], name="tests.next").run(Log())


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_transaction_left_open_in_the_thread_that_sagas_share_is_nobody_else_s_fault(
    calls: Calls, raises: bool
) -> None:
    left_open, asked = Event(), Event()

    def leave_open(context: Log) -> None:
        transaction.atomic().__enter__()
        left_open.set()
        # Whoever asks for the thread now is served next, before this saga asks again.
        assert asked.wait(30)
        if raises:
            raise RuntimeError("no")

    async def end_soon() -> None:
        for _ in range(20):  # turns of the loop, in which the other's checkpoint is asked for
            await asyncio.sleep(0)
        asked.set()

    class Innocent(SagaStepHandler[Log]):
        async def act(self, context: Log) -> None:
            while not left_open.is_set():
                await asyncio.sleep(0.01)
            tasks.append(asyncio.ensure_future(end_soon()))

    tasks: list[Any] = []
    guilty = Saga(steps=[make_step("A", calls, act=leave_open)], name="tests.guilty")
    innocent = Saga(steps=[Innocent], name="tests.innocent")

    async def both() -> list[Any]:
        runs = [guilty.arun(Log()), innocent.arun(Log())]
        return await asyncio.gather(*runs, return_exceptions=True)

    failed, done = async_to_sync(both)()
    assert isinstance(failed, SagaFailed)
    assert ("RuntimeError" if raises else "act of step A left a transaction open") in str(failed)
    assert done.status == "COMPLETED"


@pytest.mark.parametrize("using", django_settings.DATABASES)
@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_an_atomic_step_that_leaves_a_transaction_open_in_its_own_is_not_taken_for_done(
    calls: Calls, using: str, raises: bool
) -> None:
    def leave_open(context: Log) -> None:
        transaction.atomic(using=using).__enter__()
        transaction.atomic(using=using, savepoint=False).__enter__()
        Group.objects.using(using).create(name="left open inside")
        if raises:
            raise RuntimeError("no")

    steps = [make_step("A", calls), make_step("B", calls, act=leave_open, atomic=True)]
    saga = Saga(steps=steps, name="tests.left_open", storage=DjangoSagaStorage(using))
    with pytest.raises(SagaFailed, match="RuntimeError" if raises else "left a transaction open"):
        saga.run(Log())
    assert calls == ["act A", "act B", "compensate A"]
    assert not connections[using].in_atomic_block
    assert not Group.objects.using(using).filter(name="left open inside").exists()


class TestHandlersInATestCase(TestCase):
    """Its own transaction is around every test; a handler's must not end it."""

    def test_a_transaction_that_a_handler_leaves_open_ends_and_the_test_s_own_does_not(
        self,
    ) -> None:
        def leave_open(context: Log) -> None:
            transaction.atomic().__enter__()
            Group.objects.create(name="left open in a test")

        Group.objects.create(name="before")
        blocks = list(connection.atomic_blocks)
        for atomic in (False, True):
            step = make_step("A", Calls(), act=leave_open, atomic=atomic)
            with pytest.raises(SagaFailed, match="left a transaction open"):
                Saga(steps=[step], name="tests.left_open").run(Log())
            assert connection.atomic_blocks == blocks
        assert [group.name for group in Group.objects.all()] == ["before"]


def test_a_storage_that_is_away_does_not_keep_the_leases_of_another_from_being_renewed(
    calls: Calls,
) -> None:
    class Away(MemorySagaStorage):
        def renew(self, *args: Any, **options: Any) -> Any:
            raise StorageUnavailable("away")

    runs = []
    for storage in (Away(), MemorySagaStorage()):
        saga = Saga(steps=[make_step("A", calls)], storage=storage, name="tests.away")
        state = machine.start(saga.definition.plan, "{}")
        claim = storage.create(uuid.uuid4(), saga.name, state, lease=60)
        assert claim is not None
        runs.append(Run(saga, claim, None))
        runs[-1].renewed_at -= 30
    before = [run.renewed_at for run in runs]
    Keeper()._renew(runs)
    assert [run.renewed_at > at for run, at in zip(runs, before, strict=True)] == [False, True]


def test_the_keeper_renews_all_leases_in_the_projects_database_in_one_statement(
    calls: Calls,
) -> None:
    runs = []
    for _ in range(3):
        saga = Saga(steps=[make_step("A", calls)], name="tests.renewed")
        state = machine.start(saga.definition.plan, "{}")
        claim = saga.storage.create(uuid.uuid4(), saga.name, state, lease=60)
        assert claim is not None
        runs.append(Run(saga, claim, None))
        runs[-1].renewed_at -= 30
    statements: list[str] = []

    def note(execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        statements.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(note):
        Keeper()._renew(runs)
    assert len(statements) == 1
