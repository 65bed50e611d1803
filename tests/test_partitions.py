"""The tables in partitions by month, on PostgreSQL: the storage's contract, pruning, and months.

The contract is the one in ``tests.test_storage_contract``, on the same database, converted.
"""

from __future__ import annotations

import inspect
import re
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_saga import SagaError, machine, partitions
from django_saga.doctor.partitions import partitions as doctor
from django_saga.models import SagaAuditEntry, SagaExecution, SagaStepRecord, new_id
from django_saga.operations import retry
from django_saga.partitions import (
    Month,
    add_months,
    convert,
    drop_months,
    is_partitioned,
    months,
)
from django_saga.pruning import Retention, prune
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.sql import EXECUTIONS, RECORDS
from tests import test_storage_contract as contract
from tests.operated import (
    WORLD,
    Trip,
    TripSaga,
    changed,
    completed_trip,
    failed_trip,
    lost_trip,
    pending_trip,
)
from tests.tables import empty
from tests.test_storage_contract import saga

__all__ = ["saga"]

pytestmark = pytest.mark.usefixtures("partitioned")

globals().update(
    (name, test)
    for name, test in vars(contract).items()
    if name.startswith("test_")
    and "storage" in inspect.signature(test).parameters
    and "limited" not in inspect.signature(test).parameters  # which partitions refuse
)

LIMITED = partitions.limited
THIS = Month(timezone.now().year, timezone.now().month)
OLD = Month(2025, 2)
LONG_AGO = timedelta(days=30)


@pytest.fixture(scope="module", autouse=True)
def unlimited() -> Iterator[None]:
    """As if no saga of the tests had max_running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitions, "limited", list)
        patch.setattr("django_saga.doctor.partitions.limited", list)
        yield


@pytest.fixture(scope="module")
def partitioned(
    committing_databases: None, unlimited: None, django_db_blocker: Any
) -> Iterator[None]:
    with django_db_blocker.unblock():
        empty()
        kept = completed_trip()  # ids of version 4: it was there before, and stays where it is
        records = list(
            SagaStepRecord.objects.filter(execution=kept.pk).values_list("pk", flat=True)
        )
        convert()
        assert list(add_months(2)) == [THIS, THIS.next, THIS.next.next]
        partitions._add(OLD, "default", checked=True)
        assert SagaExecution.objects.get(pk=kept.pk).status == "COMPLETED"
        assert list(kept.records.order_by("pk").values_list("pk", flat=True)) == records
        assert completed_trip().records.order_by("pk")[0].pk > records[-1]  # in order, still
        yield
        call_command("migrate", "django_saga", "zero", verbosity=0)
        call_command("migrate", verbosity=0)


@pytest.fixture
def storage() -> DjangoSagaStorage:
    return DjangoSagaStorage()


@pytest.fixture(autouse=True)
def _old_month() -> Iterator[None]:
    """Whatever a test made of it, the next one finds it there, and empty."""
    yield
    WORLD.reset()
    empty()
    for month in (OLD, OLD.next):
        if month in months():
            for table in reversed(partitions.TABLES):
                _execute(f"ALTER TABLE {table} DETACH PARTITION {month.name(table)}")
                _execute(f"DROP TABLE {month.name(table)}")
    partitions._add(OLD, "default", checked=True)


def _execute(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


def old_id(month: Month = OLD) -> uuid.UUID:
    """An id as it was made in the middle of that month."""
    return uuid.UUID(
        int=month.first_id.int + (15 * 86_400_000 << 80) + uuid.uuid4().int % (1 << 80)
    )


def old_trip(month: Month = OLD, **trouble: str) -> SagaExecution:
    """One that began and ended in that month."""
    pk = old_id(month)
    WORLD.trouble = {key.replace("_", " "): text for key, text in trouble.items()}
    try:
        TripSaga().run(Trip(), saga_id=pk)
    except SagaError:
        assert trouble
    WORLD.reset()
    at = month.begin + timedelta(days=15)
    return changed(SagaExecution.objects.get(pk=pk), created_at=at, updated_at=at, finished_at=at)


def lies_in(execution: SagaExecution, table: str = EXECUTIONS) -> set[str]:
    """The partitions that hold the execution, or its records."""
    key = "id" if table == EXECUTIONS else "execution_id"
    with connection.cursor() as cursor:
        query = f"SELECT DISTINCT tableoid::regclass::text FROM {table} WHERE {key} = %s"
        cursor.execute(query, [execution.pk])
        return {name for (name,) in cursor.fetchall()}


def dropped(after: timedelta = LONG_AGO) -> list[tuple[str, int, bool]]:
    return [(str(d.month), d.executions, not d.why_not) for d in drop_months(after)]


# Where things lie


def test_an_execution_and_its_records_lie_in_the_month_of_its_id() -> None:
    trip = TripSaga().run(Trip())
    assert lies_in(trip) == {THIS.name(EXECUTIONS)}
    assert lies_in(trip, RECORDS) == {THIS.name(RECORDS)}
    assert trip.records.count() == 3


def test_an_id_of_the_callers_own_lies_in_the_default_partition_and_is_taken_once() -> None:
    pk = uuid.uuid4()
    first = TripSaga().run(Trip(), saga_id=pk)
    assert lies_in(first) == {f"{EXECUTIONS}_default"}
    calls = list(WORLD.calls)
    assert TripSaga().run(Trip(), saga_id=pk).pk == first.pk
    assert calls == WORLD.calls


def test_a_retry_of_no_execution_is_refused() -> None:
    trip = TripSaga().run(Trip())
    with pytest.raises(IntegrityError), transaction.atomic():
        changed(trip, retry_of=new_id())


def test_every_statement_about_one_execution_looks_into_one_partition() -> None:
    storage = DjangoSagaStorage()
    with CaptureQueriesContext(connection) as queries:
        TripSaga().run(Trip())
        lost = lost_trip()
        claim = storage.acquire(lost.pk, driver="x", lease=60.0)
        storage.renew([(lost.pk, claim.token)], lease=60.0)
        storage.history(lost.pk)
        storage.release(lost.pk, claim.token)
    seen = 0
    for query in queries:
        if query["sql"].startswith(("WITH", "UPDATE", "SELECT")):
            with connection.cursor() as cursor:
                cursor.execute(f"EXPLAIN {query['sql']}")
                plan = "\n".join(line for (line,) in cursor.fetchall())
            for table in (EXECUTIONS, RECORDS):
                names = re.findall(
                    rf"(?:Seq|Heap|(?<!Bitmap )Index|Only) Scan(?: using \S+)? on ({table}_\w+)",
                    plan,
                )
                assert len(set(names)) <= 1, plan
                seen += len(set(names))
    assert seen >= 7


def test_what_is_due_is_found_in_every_partition_oldest_first() -> None:
    storage = DjangoSagaStorage()
    long_ago = changed(pending_trip(), wake_at=None, grace_until=None)
    SagaExecution.objects.filter(pk=long_ago.pk).update(id=(pk := old_id()))
    lost = lost_trip()  # in the default partition
    old = changed(SagaExecution.objects.get(pk=pk), created_at=OLD.begin)
    claims = storage.due(10, driver="x", lease=60.0, saga=TripSaga.name)
    assert [claim.id for claim in claims] == [old.pk, lost.pk]


def test_pruning_takes_from_every_partition_and_leaves_no_record() -> None:
    old_trip()
    own = changed(completed_trip(), finished_at=timezone.now() - timedelta(days=40))
    assert lies_in(own) == {f"{EXECUTIONS}_default"}
    young = TripSaga().run(Trip())
    found = list(prune(Retention(delete_after=LONG_AGO, blank_after=timedelta(days=1))))
    assert sum(part.statuses.total() for part in found) == 2
    assert [execution.pk for execution in SagaExecution.objects.all()] == [young.pk]
    records = SagaStepRecord.objects.values_list("execution_id", flat=True)
    assert Counter(records) == {young.pk: 3}


# Months


def test_an_old_month_is_dropped_with_its_records_and_that_is_audited() -> None:
    old_trip()
    old_trip()
    young = TripSaga().run(Trip())
    (month,) = drop_months(LONG_AGO, user_name="Ann", reason="law")
    assert (month.month, month.executions, month.why_not) == (OLD, 2, "")
    assert OLD not in months()
    assert set(SagaExecution.objects.values_list("pk", flat=True)) == {young.pk}
    assert SagaStepRecord.objects.count() == 3
    (entry,) = SagaAuditEntry.objects.all()
    assert (entry.verb, entry.user_name, entry.reason) == ("prune", "Ann", "law")
    assert entry.detail == "Dropped the month 2025-02 with 2 executions."


def test_what_is_stored_while_a_month_waits_to_be_dropped_is_not_dropped() -> None:
    stored, pk = threading.Event(), old_id()
    waits = f"SELECT count(*) FROM pg_locks WHERE relation = '{OLD.name(EXECUTIONS)}'::regclass"

    def store() -> None:
        state = machine.start(TripSaga.definition.plan, "{}", pending=True)
        try:
            with transaction.atomic():
                DjangoSagaStorage().create(pk, TripSaga.name, state)
                stored.set()
                with connection.cursor() as cursor:
                    for _ in range(300):  # for at most as long as the drop waits
                        cursor.execute(f"{waits} AND NOT granted")
                        if cursor.fetchone()[0]:
                            return
                        cursor.execute("SELECT pg_sleep(0.01)")
                raise AssertionError("it was not waited for")
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(store)
        assert stored.wait(30)
        assert dropped() == [("2025-02", 1, False)]
        storing.result()
    assert SagaExecution.objects.filter(pk=pk).exists()


def test_a_month_is_left_for_as_long_as_one_of_its_executions_stays() -> None:
    old_trip()
    failed = old_trip(act_Pay="no money")
    assert dropped() == [("2025-02", 2, False)]
    assert SagaExecution.objects.count() == 2
    changed(failed, settled_at=failed.finished_at)
    assert dropped() == [("2025-02", 2, True)]


def test_a_month_is_left_for_as_long_as_a_retry_of_one_of_its_failures_is_there() -> None:
    failed = old_trip(act_Pay="no money")
    again = retry(failed.pk)
    assert dropped() == [("2025-02", 1, False)]
    changed(again, finished_at=timezone.now() - timedelta(days=40))
    (part, *_others) = prune(Retention(delete_after=LONG_AGO))  # the retry, then the failure
    assert part.statuses == {"COMPLETED": 1}
    assert dropped() == [("2025-02", 0, True)]


def test_a_retry_that_begins_just_now_keeps_its_month(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is committed after the executions were looked at."""
    failed = changed(old_trip(act_Pay="no money"), failure_group="")
    drop = partitions._drop

    def late(*args: Any) -> Any:
        retry(failed.pk)
        return drop(*args)

    monkeypatch.setattr(partitions, "_drop", late)
    (month,) = drop_months(LONG_AGO)
    assert "referred to" in month.why_not
    assert SagaExecution.objects.get(retry_of=failed.pk).status == "COMPLETED"
    assert failed.records.count() == 3
    assert OLD in months()


def test_only_months_that_are_over_long_enough_are_looked_at() -> None:
    assert dropped(timezone.now() - OLD.next.begin + timedelta(days=1)) == []
    assert dropped(timezone.now() - OLD.next.begin - timedelta(days=1)) == [("2025-02", 0, True)]


def test_what_lies_in_a_dropped_month_by_its_id_lies_in_the_default_partition() -> None:
    dropped()
    assert lies_in(old_trip()) == {f"{EXECUTIONS}_default"}
    assert partitions._in_default(OLD, DjangoSagaStorage())


def test_a_month_of_which_the_default_partition_has_some_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, month in enumerate((OLD.next, OLD.next.next)):
        assert lies_in(old_trip(month)) == {f"{EXECUTIONS}_default"}, number
    monkeypatch.setattr(partitions, "_now", lambda _storage: OLD.begin)
    third = OLD.next.next.next
    assert list(add_months(3)) == [third]
    assert lies_in(old_trip(third)) == {third.name(EXECUTIONS)}
    for table in reversed(partitions.TABLES):
        _execute(f"ALTER TABLE {table} DETACH PARTITION {third.name(table)}")
        _execute(f"DROP TABLE {third.name(table)}")


def test_making_a_month_that_fails_leaves_no_check_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would refuse that month's executions."""
    _execute(f"CREATE TABLE {OLD.next.name(RECORDS)} ()")
    with pytest.raises(Exception, match="exists"):
        partitions._add(OLD.next, "default", checked=True)
    _execute(f"DROP TABLE {OLD.next.name(RECORDS)}")
    assert OLD.next not in months()
    assert lies_in(old_trip(OLD.next)) == {f"{EXECUTIONS}_default"}


def test_who_comes_second_is_told_that_the_tables_were_changed() -> None:
    partitions._add(OLD.next, "default", checked=True)
    with pytest.raises(SagaError, match="were changed by somebody else just now; try again"):
        partitions._add(OLD.next, "default", checked=True)


def test_months_follow_each_other_and_begin_with_their_first_id() -> None:
    assert Month(2025, 12).next == Month(2026, 1)
    assert str(Month(2026, 1)) == "2026-01"
    assert Month(2026, 1).first_id.int >> 80 == datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000
    assert THIS.first_id < new_id() < THIS.next.first_id


def test_what_is_in_use_for_long_is_told_and_nothing_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.test_pruning import in_hand

    monkeypatch.setattr(partitions, "LOCK_SECONDS", "0.1")
    with in_hand("default", old_trip().pk), pytest.raises(SagaError, match="in use"):
        dropped()
    assert SagaStepRecord.objects.count() == 3


def test_the_doctor_tells_when_the_next_month_has_no_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (finding,) = doctor()
    assert (finding.name, finding.level) == ("partitions", "ok")
    last = months()[-1]
    monkeypatch.setattr(partitions, "_now", lambda _storage: last.begin)
    (finding,) = doctor()
    assert (finding.level, str(last.next) in finding.what) == ("warning", True)


# The command


def command(*arguments: str) -> str:
    out = StringIO()
    call_command("partition_sagas", *arguments, stdout=out)
    return out.getvalue()


def test_the_command_adds_what_is_missing_and_drops_what_is_old() -> None:
    old_trip()
    assert command("--months", "2", "--drop-after", "30") == "2025-02: dropped, 1 executions.\n"
    assert command("--months", "2", "--drop-after", "30") == ""
    assert SagaAuditEntry.objects.get().source == "command"


def test_the_command_tells_why_a_month_was_left() -> None:
    old_trip(act_Pay="no money")
    with pytest.raises(CommandError, match="2025-02: left, 1 executions: 1 of its executions"):
        command("--drop-after", "30")


def test_converting_twice_is_refused() -> None:
    with pytest.raises(CommandError, match="partitioned already"):
        command("--convert")


@pytest.mark.parametrize("call", [convert, lambda **w: list(add_months(1, **w))])
def test_no_other_database_has_partitions(call: Any) -> None:
    storage = DjangoSagaStorage("sqlite")
    assert not is_partitioned(storage=storage)
    with pytest.raises(SagaError, match=r"PostgreSQL|not partitioned"):
        call(storage=storage)


def test_a_failed_trip_that_is_retried_is_linked_across_partitions() -> None:
    failed = failed_trip()
    assert retry(failed.pk).retry_of_id == failed.pk


def test_sagas_that_limit_how_many_run_have_no_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constraint that keeps their places apart cannot be made."""
    monkeypatch.setattr(partitions, "limited", LIMITED)
    monkeypatch.setattr("django_saga.doctor.partitions.limited", LIMITED)
    monkeypatch.setattr(partitions, "is_partitioned", lambda **_: False)
    with pytest.raises(SagaError, match=r"saga_tests\.Alone"):
        convert()
    monkeypatch.setattr(partitions, "is_partitioned", lambda **_: True)
    with pytest.raises(SagaError, match=r"saga_tests\.Alone"):
        list(add_months(1))
    assert "error" in {finding.level for finding in doctor()}
