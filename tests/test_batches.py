"""Batches: one verb done to many, at a rate, by whoever comes by, as the user who asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.exceptions import PermissionDenied
from django.core.management import call_command
from django.db import connections, transaction
from django.utils import timezone
from django_rq import get_queue
from pytest_django import Settings
from rq.serializers import JSONSerializer

from django_saga import InsideTransaction, SagaError, batches
from django_saga.batches import creating, driving
from django_saga.models import (
    SagaAuditEntry,
    SagaBatch,
    SagaBatchItem,
    SagaExecution,
    SagaStepRecord,
)
from django_saga.operations import BULK, RECOVER, RETRY, VERBS, cancel, retry, retry_id
from django_saga.operations.verbs import CANCEL
from django_saga.recovery import sweep
from django_saga.rq import BATCH_ENTRY_POINT, SagaJob, run_batch
from django_saga.storage import DjangoSagaStorage
from tests.operated import (
    WORLD,
    changed,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    lost_trip,
    pending_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

PATIENCE = 60  # seconds until a condition that does not come about fails its test
LONG = 3600.0  # seconds: as long as it takes


def operator(*rights: str) -> User:
    """Somebody who may do that to executions."""
    user = User.objects.create_user(f"op-{uuid.uuid4()}")
    names = [f"{right}_sagaexecution" for right in rights]
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return User.objects.get(pk=user.pk)


def create(alias: str = "default", verb: Any = RETRY, **options: Any) -> SagaBatch:
    """A batch of all executions, as fast as can be, with all of them allowed."""
    given = {"user": None, "reason": "the bank is back", "title": "all", "source": "code"}
    given |= {"rate": 100.0, "allowed": None, "storage": DjangoSagaStorage(alias)} | options
    executions = given.pop("executions", SagaExecution.objects.using(alias).all())
    return batches.create(verb, executions, **given)


def work(batch: SagaBatch | None = None, alias: str = "default", **options: Any) -> Counter[str]:
    given = {"seconds": LONG, "storage": DjangoSagaStorage(alias)} | options
    return batches.work(batch.pk if batch else None, **given)


def now(batch: SagaBatch) -> SagaBatch:
    """The batch as it is now."""
    return SagaBatch.objects.using(batch._state.db).get(pk=batch.pk)


def items(batch: SagaBatch) -> list[SagaBatchItem]:
    return list(SagaBatchItem.objects.using(batch._state.db).filter(batch=batch).order_by("id"))


def states(batch: SagaBatch) -> list[str]:
    return [item.state for item in items(batch)]


def entries(alias: str = "default") -> list[tuple[str, str, str]]:
    """Verb, result and source of the audit's entries, in order."""
    rows = SagaAuditEntry.objects.using(alias).order_by("id")
    return list(rows.values_list("verb", "result", "source"))


def copies(of: SagaExecution, number: int, **columns: Any) -> list[SagaExecution]:
    """So many rows like this one, with ids of their own."""
    rows = SagaExecution.objects.filter(pk=of.pk)
    made = []
    for _ in range(number):
        row = rows.get()
        row.pk = uuid.uuid4()
        for name, value in columns.items():
            setattr(row, name, value)
        made.append(row)
    return SagaExecution.objects.bulk_create(made)


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.02)
    return answer


# Making one


def test_it_takes_what_the_verb_can_be_done_to_the_oldest_first_as_it_is_now(alias: str) -> None:
    makers = (failed_trip, completed_trip, stuck_trip, driven_trip, failed_trip)
    failed, _, stuck, _, second = (make(alias=alias) for make in makers)
    batch = create(alias, title="those of today", allowed=1)
    facts = [(item.execution_id, item.token, item.status, item.state) for item in items(batch)]
    assert facts == [(e.pk, e.token, e.status, "waiting") for e in (failed, stuck, second)]
    stored = now(batch)
    assert (stored.total, stored.verb, stored.allowed, stored.status) == (3, "retry", 1, "running")
    entry = SagaAuditEntry.objects.using(alias).get()
    assert (entry.verb, entry.result, entry.batch_id) == ("create_batch", "done", batch.pk)
    assert (entry.reason, entry.detail) == (
        "the bank is back",
        "retry, 3 executions: those of today",
    )
    assert WORLD.calls == []


@pytest.mark.parametrize("verb", BULK.values(), ids=lambda verb: verb.name)
def test_a_verb_for_many_can_be_done_in_its_statuses_alone(verb: Any, alias: str) -> None:
    """They are there for the indexes, and must leave out nothing."""
    makers = (failed_trip, completed_trip, stuck_trip, driven_trip, due_trip, lost_trip)
    for make in (*makers, pending_trip):
        make(alias=alias)
    changed(stuck_trip(alias=alias), action="act")
    changed(lost_trip(alias=alias), status="COMPENSATING")
    rows = SagaExecution.objects.using(alias)
    possible = rows.alias(verdict=verb.verdict()).filter(verdict__in=verb.possible)
    assert set(verb.fit(rows.all())) == set(possible)
    assert {row.status for row in possible} == set(verb.among)


def test_a_queryset_without_duplicates_can_be_taken_too(alias: str) -> None:
    failed = failed_trip(alias=alias)
    rows = SagaExecution.objects.using(alias).filter(records__isnull=False).distinct()
    assert [i.execution_id for i in items(create(alias, executions=rows))] == [failed.pk]


@pytest.mark.parametrize("of", ["none", "unfit"])
def test_of_nothing_there_is_no_batch(of: str, alias: str) -> None:
    completed_trip(alias=alias)
    rows = SagaExecution.objects.using(alias)
    with pytest.raises(SagaError, match="none of these"):
        create(alias, executions=rows.none() if of == "none" else rows.all())
    assert not SagaBatch.objects.using(alias).exists()
    assert entries(alias) == [("create_batch", "refused", "code")]


def test_of_too_many_it_takes_the_oldest_and_says_so(
    alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [failed_trip(alias=alias) for _ in range(3)]
    monkeypatch.setattr(creating, "MOST", 2)
    batch = create(alias, title="x" * 500)
    assert [item.execution_id for item in items(batch)] == [made[0].pk, made[1].pk]
    assert now(batch).title.endswith("x (the oldest 2 of more)")
    monkeypatch.setattr(creating, "MOST", 3)
    assert "of more" not in create(alias, title="all of them").title


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"reason": "  "}, "takes a reason"),
        ({"verb": VERBS["abandon"]}, "one execution at a time"),
        ({"rate": 0.0}, "A rate is from"),
        ({"rate": float("nan")}, "A rate is from"),
        ({"rate": 1e9}, "A rate is from"),
        ({"allowed": 0}, "At least one"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], why: str) -> None:
    failed_trip()
    with pytest.raises(SagaError, match=why):
        create(**options)
    assert not SagaBatch.objects.exists()


def test_who_may_not_do_it_to_one_may_not_do_it_to_many() -> None:
    failed_trip()
    for user in (operator("recover", "cancel", "force", "view"), AnonymousUser()):
        with pytest.raises(PermissionDenied, match="retry_sagaexecution"):
            create(user=user)
    assert not SagaBatch.objects.exists()
    assert {result for _, result, _ in entries()} == {"refused"}


def test_a_user_who_cannot_be_loaded_again_is_refused() -> None:
    """Their items would be done as by code, which may do all."""
    failed_trip()
    with pytest.raises(SagaError, match="takes a user of the database"):
        create(user=User(username="made up", is_superuser=True))


def test_made_in_a_transaction_that_is_rolled_back_it_was_never_there() -> None:
    failed_trip()
    with transaction.atomic():
        create()
        transaction.set_rollback(True)
    assert not SagaBatch.objects.exists()
    assert entries() == []


# Driving it


def test_one_then_ten_then_all(alias: str) -> None:
    made = [failed_trip(alias=alias) for _ in range(14)]
    batch = create(alias, allowed=1)
    storage = DjangoSagaStorage(alias)
    assert work(batch, alias) == {"done": 1}
    assert now(batch).status == "held"
    assert work(batch, alias) == {}
    batch = batches.allow(now(batch), 10, storage=storage)
    assert (work(batch, alias), now(batch).status) == ({"done": 10}, "held")
    batch = batches.allow(now(batch), None, storage=storage)
    assert (work(batch, alias), now(batch).status) == ({"done": 3}, "finished")
    assert now(batch).finished_at
    results = [item.result_id for item in items(batch)]
    assert results == [retry_id(execution.pk) for execution in made]
    rows = SagaExecution.objects.using(alias).filter(pk__in=results)
    assert {row.status for row in rows} == {"COMPLETED"}
    assert Counter(WORLD.calls) == dict.fromkeys(("act Pack", "act Pay", "act Leave"), 14)
    assert entries(alias).count(("retry", "done", "batch")) == 14


@pytest.mark.parametrize(
    ("verb", "make", "status"),
    [
        ("retry", stuck_trip, "FAILED"),
        ("recover", lost_trip, "COMPLETED"),
        ("cancel", due_trip, "FAILED"),
        ("cancel", pending_trip, "FAILED"),
    ],
)
def test_every_verb_for_many(
    verb: str, make: Callable[..., SagaExecution], status: str, alias: str
) -> None:
    made = [make(alias=alias) for _ in range(2)]
    batch = create(alias, VERBS[verb])
    assert work(batch, alias) == {"done": 2}
    rows = SagaExecution.objects.using(alias).filter(pk__in=[execution.pk for execution in made])
    assert [row.status for row in rows] == [status, status]


def test_what_changed_since_is_skipped_with_the_reason(alias: str) -> None:
    stuck, failed, other = (
        stuck_trip(alias=alias),
        failed_trip(alias=alias),
        stuck_trip(alias=alias),
    )
    batch = create(alias)
    WORLD.trouble = {"compensate Pack": "still lost"}
    retry(stuck.pk, storage=DjangoSagaStorage(alias))  # stuck again, but for a reason of its own
    retry(failed.pk, storage=DjangoSagaStorage(alias))
    WORLD.reset()
    assert work(batch, alias) == {"done": 1, "skipped": 2}
    first, second, third = items(batch)
    assert first.why == "changed meanwhile and is STUCK now."
    assert second.why.startswith("has been retried already")
    assert (third.execution_id, third.state) == (other.pk, "done")
    assert WORLD.calls == ["compensate Pack"]


def test_what_is_cancelled_may_have_gone_on_meanwhile(alias: str) -> None:
    execution = due_trip(alias=alias)
    batch = create(alias, CANCEL)
    changed(execution, token=execution.token + 1, status="RUNNING")
    assert work(batch, alias) == {"done": 1}
    assert changed(execution).status == "FAILED"


def test_what_was_pruned_meanwhile_is_skipped(alias: str) -> None:
    failed_trip(alias=alias).delete()
    failed = failed_trip(alias=alias)
    batch = create(alias)
    SagaStepRecord.objects.using(alias).filter(execution=failed).delete()
    failed.delete()
    assert work(batch, alias) == {"skipped": 1}
    assert "No saga execution has the id" in items(batch)[0].why


def test_an_error_that_is_none_of_ours_is_logged_and_skips_the_item(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    bad, _ = failed_trip(), failed_trip()

    def authorize(user: Any, verb: str, execution: SagaExecution) -> bool:
        if execution.pk == bad.pk:
            raise RuntimeError("the directory\0 is down: ldap://root:hunter2@here")
        return True

    settings.DJANGO_SAGA = {"AUTHORIZE": authorize}
    batch = create(user=operator("retry"))
    assert work(batch) == {"skipped": 1, "done": 1}
    assert items(batch)[0].why == "RuntimeError: the directory is down: ldap://root:********@here"
    assert "the directory" in caplog.text


def test_what_the_hook_forbids_is_skipped(settings: Settings) -> None:
    mine, other = failed_trip(), failed_trip()
    settings.DJANGO_SAGA = {"AUTHORIZE": lambda user, verb, execution: execution.pk == mine.pk}
    batch = create(user=operator("retry"))
    assert work(batch) == {"done": 1, "skipped": 1}
    assert items(batch)[1].why == "You may not retry this execution."
    assert changed(other).settled_at is None


def withdraw(user: User) -> None:
    user.user_permissions.clear()


def deactivate(user: User) -> None:
    User.objects.filter(pk=user.pk).update(is_active=False)


def delete(user: User) -> None:
    User.objects.filter(pk=user.pk).delete()


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (withdraw, "takes the permission django_saga.retry_sagaexecution"),
        (deactivate, "is not active any more"),
        (delete, "is gone"),
    ],
)
def test_who_loses_the_right_in_the_middle_has_nothing_more_done(
    lose: Callable[[User], None], why: str
) -> None:
    made = [failed_trip() for _ in range(3)]
    user = operator("retry")
    batch = create(user=user)

    def in_the_middle() -> None:
        WORLD.interlude = None
        lose(user)

    WORLD.interlude = in_the_middle
    assert work(batch) == {"done": 1}
    stopped = now(batch)
    assert stopped.status == "stopped"
    assert why in stopped.why
    assert states(batch) == ["done", "waiting", "waiting"]
    assert [changed(execution).settled_at is None for execution in made] == [False, True, True]
    entry = SagaAuditEntry.objects.get(verb="stop_batch")
    assert (entry.source, entry.batch_id) == ("batch", batch.pk)
    assert why in entry.detail
    assert work(batch) == {}


def test_what_was_done_before_a_crash_is_not_done_again(alias: str) -> None:
    """Killed between the verb's commit and the note of it."""
    failed, stuck, lost = failed_trip(alias=alias), stuck_trip(alias=alias), lost_trip(alias=alias)
    storage = DjangoSagaStorage(alias)
    batch = create(alias)
    for execution in (failed, stuck):
        retry(execution.pk, batch_id=batch.pk, source="batch", storage=storage)
    calls = list(WORLD.calls)
    assert work(batch, alias) == {"done": 2}
    assert WORLD.calls == calls
    assert [item.result_id for item in items(batch)] == [retry_id(failed.pk), stuck.pk]
    other = create(alias, RECOVER)
    changed(lost, token=lost.token)
    assert work(other, alias) == {"done": 1}
    assert entries(alias).count(("retry", "done", "batch")) == 2


def test_what_could_be_done_twice_is_not_after_a_crash(alias: str) -> None:
    """A cancellation that waits for its driver could be asked for again."""
    driven = driven_trip(alias=alias)
    batch = create(alias, CANCEL)
    storage = DjangoSagaStorage(alias)
    cancel(driven.pk, reason="x", batch_id=batch.pk, source="batch", storage=storage)
    assert work(batch, alias) == {"done": 1}
    assert entries(alias).count(("cancel", "done", "batch")) == 1


def test_what_another_batch_did_is_not_taken_for_its_own_doing(alias: str) -> None:
    failed = failed_trip(alias=alias)
    first, second = create(alias), create(alias)
    assert work(first, alias) == {"done": 1}
    assert work(second, alias) == {"skipped": 1}
    assert SagaExecution.objects.using(alias).filter(retry_of=failed).count() == 1


def test_workers_at_once_do_each_item_once(alias: str) -> None:
    for _ in range(12):
        failed_trip(alias=alias)
    made = [create(alias, executions=part(alias, n)) for n in range(2)]
    barrier, came = threading.Barrier(4), list[Any]()

    def run() -> None:
        barrier.wait()
        try:
            came.append(work(alias=alias))
        except Exception as error:
            came.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum((c for c in came if isinstance(c, Counter)), Counter()) == {"done": 12}, came
    assert [now(batch).status for batch in made] == ["finished", "finished"]
    assert Counter(WORLD.calls) == dict.fromkeys(("act Pack", "act Pay", "act Leave"), 12)


def part(alias: str, number: int) -> Any:
    """Every second execution."""
    rows = SagaExecution.objects.using(alias)
    ids = list(rows.order_by("created_at").values_list("pk", flat=True))
    return rows.filter(pk__in=ids[number::2])


def test_one_batch_has_one_driver_until_its_lease_runs_out(alias: str) -> None:
    for _ in range(2):
        failed_trip(alias=alias)
    batch = create(alias)
    rows = SagaBatch.objects.using(alias).filter(pk=batch.pk)
    rows.update(lease_until=timezone.now() + timedelta(hours=1), token=7, driver="web-2:1")
    assert work(batch, alias) == work(None, alias) == {}
    rows.update(lease_until=timezone.now() - timedelta(hours=1))
    assert work(None, alias) == {"done": 2}
    assert now(batch).token == 8


def test_a_driver_that_lost_its_lease_does_nothing_more(alias: str) -> None:
    """Frozen in an item, it wakes up when another has finished the batch."""
    for _ in range(3):
        failed_trip(alias=alias)
    batch = create(alias)
    others: list[Any] = []

    def meanwhile() -> None:
        WORLD.interlude = None
        SagaBatch.objects.using(alias).update(lease_until=timezone.now() - timedelta(hours=1))
        others.append(work(batch, alias))

    WORLD.interlude = meanwhile
    assert work(batch, alias) == {}
    assert others == [{"done": 3}]
    assert Counter(WORLD.calls) == dict.fromkeys(("act Pack", "act Pay", "act Leave"), 3)
    assert now(batch).status == "finished"


def test_a_driver_that_lost_its_lease_leaves_the_rest_to_the_next(alias: str) -> None:
    """Frozen in an item, it wakes up while another, who has it now, is not through."""
    for _ in range(3):
        failed_trip(alias=alias)
    batch = create(alias)

    def meanwhile() -> None:
        WORLD.interlude = None
        later = timezone.now() + timedelta(hours=1)
        SagaBatch.objects.using(alias).update(token=7, lease_until=later, driver="web-2:1")

    WORLD.interlude = meanwhile
    assert work(batch, alias) == {"done": 1}
    assert states(batch) == ["done", "waiting", "waiting"]
    kept = now(batch)
    assert (kept.status, kept.token, kept.driver) == ("running", 7, "web-2:1")
    assert kept.lease_until
    assert kept.lease_until > timezone.now()


def test_the_batch_that_has_waited_longest_comes_first() -> None:
    for _ in range(4):
        failed_trip()
    first, second = (create(executions=part("default", n)) for n in range(2))
    for expected in (["done", "waiting"], ["done", "done"]):
        one_each = iter([False, False, True])
        work(stopped=lambda turns=one_each: next(turns, True))  # type: ignore[misc]
        one_each = iter([False, False, True])
        work(stopped=lambda turns=one_each: next(turns, True))  # type: ignore[misc]
        assert states(first) == states(second) == expected


def test_inside_a_transaction_nothing_is_driven(alias: str) -> None:
    failed_trip(alias=alias)
    batch = create(alias)
    with transaction.atomic(using=alias), pytest.raises(InsideTransaction):
        work(batch, alias)
    assert states(batch) == ["waiting"]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def test_it_keeps_to_its_rate_and_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(10):
        failed_trip()
    clock = Clock()
    monkeypatch.setattr(driving, "time", clock)
    batch = create(rate=2.0)
    assert work(batch, seconds=1.9) == {"done": 4}
    assert clock.time == pytest.approx(1.5)  # there is no time to wait for the next
    SagaBatchItem.objects.filter(state="done").update(done_at=timezone.now() + timedelta(hours=1))
    assert work(batch, seconds=1.9) == {}  # another driver, and it begins no sooner
    SagaBatchItem.objects.filter(state="done").update(done_at=timezone.now() - timedelta(hours=1))
    clock.time = 0.0
    assert work(batch) == {"done": 6}
    assert clock.time == pytest.approx(2.5)


def test_what_is_skipped_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [failed_trip() for _ in range(5)]
    clock = Clock()
    batch = create(rate=0.1)
    for execution in made:
        changed(execution, token=7)
    monkeypatch.setattr(driving, "time", clock)
    assert work(batch) == {"skipped": 5}
    assert clock.time == 0.0


# Steering it


def test_paused_in_the_middle_it_rests_until_it_is_resumed(alias: str) -> None:
    for _ in range(3):
        failed_trip(alias=alias)
    batch = create(alias)
    storage = DjangoSagaStorage(alias)

    def in_the_middle() -> None:
        WORLD.interlude = None
        batches.pause(batch, reason="wait", storage=storage)

    WORLD.interlude = in_the_middle
    assert work(batch, alias) == {"done": 1}
    assert (now(batch).status, now(batch).why) == ("paused", "paused by code: wait")
    assert work(batch, alias) == {}
    batches.resume(now(batch), storage=storage)
    assert work(batch, alias) == {"done": 2}
    assert now(batch).why == ""


def test_stopped_in_the_middle_what_waits_is_left_alone_for_ever(alias: str) -> None:
    for _ in range(3):
        failed_trip(alias=alias)
    batch = create(alias)
    storage = DjangoSagaStorage(alias)

    def in_the_middle() -> None:
        WORLD.interlude = None
        batches.stop(batch, storage=storage)

    WORLD.interlude = in_the_middle
    assert work(batch, alias) == {"done": 1}
    assert states(batch) == ["done", "waiting", "waiting"]
    stopped = now(batch)
    assert stopped.status == "stopped"
    assert stopped.finished_at
    for steer in (batches.pause, batches.resume, batches.stop):
        with pytest.raises(SagaError, match="it is stopped now"):
            steer(stopped, storage=storage)
    with pytest.raises(SagaError, match="it is stopped now"):
        batches.allow(stopped, None, storage=storage)
    assert work(batch, alias) == {}


def test_allowed_twice_with_a_double_click_it_is_allowed_once(alias: str) -> None:
    for _ in range(4):
        failed_trip(alias=alias)
    batch = create(alias, allowed=1)
    storage = DjangoSagaStorage(alias)
    work(batch, alias)
    seen = now(batch)
    batches.allow(seen, 1, storage=storage)
    with pytest.raises(SagaError, match="changed meanwhile"):
        batches.allow(seen, 1, storage=storage)
    assert work(batch, alias) == {"done": 1}


def test_more_is_allowed_while_it_runs(alias: str) -> None:
    for _ in range(3):
        failed_trip(alias=alias)
    batch = create(alias, allowed=1)

    def in_the_middle() -> None:
        WORLD.interlude = None
        batches.allow(now(batch), 1, storage=DjangoSagaStorage(alias))

    WORLD.interlude = in_the_middle
    assert work(batch, alias) == {"done": 2}
    assert now(batch).status == "held"


@pytest.mark.parametrize("what", ["allow", "pause", "resume", "stop"])
def test_steering_takes_the_permission_of_the_verb_and_is_audited(what: str) -> None:
    failed_trip()
    batch = create(allowed=1)
    if what == "resume":
        batch = batches.pause(batch)
    arguments = [1] if what == "allow" else []
    steer = getattr(batches, what)
    with pytest.raises(PermissionDenied, match="retry_sagaexecution"):
        steer(batch, *arguments, user=operator("view", "recover", "force"))
    assert now(batch).status == batch.status
    user = operator("retry")
    steer(batch, *arguments, user=user, source="admin", reason="so it is")
    entry, refusal = SagaAuditEntry.objects.filter(verb=f"{what}_batch").order_by("-id")[:2]
    assert (entry.result, entry.user_name, entry.reason) == ("done", user.username, "so it is")
    assert (refusal.result, refusal.batch_id) == ("refused", batch.pk)
    assert entry.batch_id == batch.pk


# Whoever comes by


def recover_sagas(*arguments: str) -> str:
    out = StringIO()
    call_command("recover_sagas", *arguments, stdout=out)
    return out.getvalue()


def test_recover_sagas_drives_batches_after_its_sweep() -> None:
    lost, failed = lost_trip(), failed_trip()
    batch = create()
    assert recover_sagas("--saga", "tests.TripSaga") == "1 execution: 1 COMPLETED.\n"
    assert now(batch).status == "running"
    assert recover_sagas() == "Of batches: 1 done.\n"
    assert now(batch).status == "finished"
    assert changed(lost).status == changed(failed, token=9).retries.get().status == "COMPLETED"
    assert recover_sagas() == "Nothing was due.\n"


def test_recover_sagas_tells_of_batches_in_json() -> None:
    failed_trip()
    create()
    assert json.loads(recover_sagas("--json"))["batches"] == {"done": 1}
    assert json.loads(recover_sagas("--json"))["batches"] == {}
    failed_trip()
    create(executions=SagaExecution.objects.filter(settled_at=None))
    recover_sagas("--dry-run")
    assert SagaBatch.objects.filter(status="running").count() == 1


CHILD = """
import sys
import django
django.setup()
import tests.recovery_sagas
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", *sys.argv[1:]])
"""


def test_a_driver_that_is_killed_leaves_nothing_to_be_done_twice(
    child_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, killed inside a handler of the first of three; another goes on."""
    from tests.recovery_sagas import Gated

    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    ledger.touch()
    monkeypatch.setenv("LEDGER", str(ledger))
    monkeypatch.setenv("GATE", str(gate))
    failed = failed_trip()
    plan = [[step] for step in Gated.definition.steps]
    facts = {"saga": Gated.name, "plan": plan, "initial_context": '{"number": 1}'}
    made = copies(failed, 3, **facts)
    rows = SagaExecution.objects.filter(saga=Gated.name)
    batch = create(executions=rows)
    environment = {
        **child_environment,
        "DJANGO_SETTINGS_MODULE": "tests.recovery_settings",
        "RECOVER_ON": "default",
        "RECOVER_WITH": json.dumps({"LEASE": 1.0}),
        "LEDGER": str(ledger),
        "GATE": str(gate),
    }
    with subprocess.Popen([sys.executable, "-c", CHILD, "recover_sagas"], env=environment) as child:
        try:
            until(ledger.read_text)
        finally:
            child.send_signal(signal.SIGKILL)
    assert states(batch) == ["waiting"] * 3
    begun = ledger.read_text().splitlines()
    gate.touch()
    until(lambda: work(batch))
    assert states(batch) == ["done"] * 3
    assert entries().count(("retry", "done", "batch")) == 3
    assert rows.exclude(retry_of=None).count() == 3
    until(lambda: (list(sweep()), rows.filter(status="RUNNING").count() == 0)[1])
    results = rows.exclude(retry_of=None)
    assert {row.status for row in results} == {"COMPLETED"}
    assert {row.retry_of_id for row in results} == {execution.pk for execution in made}
    # The one that was killed had its step run again, with the same key; all others ran once.
    calls = Counter(ledger.read_text().splitlines())
    assert {call for call, number in calls.items() if number > 1} <= set(begun)


# RQ


@pytest.fixture
def queue(settings: Settings) -> Iterator[Any]:
    name = f"sagas-{uuid.uuid4().hex[:8]}"
    here = {"URL": os.environ["REDIS_URL"]}
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, name: here, f"{name}-cron": here}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": name}
    queue = get_queue(name, serializer=JSONSerializer)
    yield queue
    queue.empty()
    queue.connection.close()


def test_a_real_worker_drives_a_batch_and_its_sagas(
    queue: Any, settings: Settings, child_environment: dict[str, str]
) -> None:
    made = [failed_trip_of_travel() for _ in range(3)]
    queue.empty()
    batch = create(executions=SagaExecution.objects.filter(pk__in=[e.pk for e in made]))
    assert [job.func_name for job in queue.jobs] == [BATCH_ENTRY_POINT]
    environment = {
        **child_environment,
        "DJANGO_SETTINGS_MODULE": "tests.rq_settings",
        "SAGA_SETTINGS": json.dumps(settings.DJANGO_SAGA),
    }
    command = [sys.executable, "-m", "django", "rqworker", queue.name, "--burst"]
    guarded = ["--job-class", "django_saga.rq.SagaJob"]
    guarded += ["--serializer", "rq.serializers.JSONSerializer"]
    assert subprocess.run([*command, *guarded], env=environment, check=False).returncode == 0
    assert now(batch).status == "finished"
    results = SagaExecution.objects.filter(pk__in=[item.result_id for item in items(batch)])
    assert [result.status for result in results] == ["COMPLETED"] * 3
    assert {item.state for item in items(batch)} == {"done"}
    drivers = set(results.values_list("driver", flat=True))
    assert drivers
    assert all(not driver.endswith(f":{os.getpid()}") for driver in drivers)


def failed_trip_of_travel() -> SagaExecution:
    """A failed execution of a saga that a worker knows."""
    from tests.sagas import Journey, Travel

    execution = Travel().enqueue(Journey(os.devnull))
    SagaExecution.objects.filter(pk=execution.pk).update(
        status="FAILED", failed_step="BookHotel", error_type="Sorry", grace_until=None
    )
    return SagaExecution.objects.get(pk=execution.pk)


def test_a_job_rings_again_while_there_is_more_and_what_is_no_id_is_refused(
    queue: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        failed_trip()
    batch = create(allowed=1)
    queue.empty()
    run_batch(str(batch.pk))
    assert (now(batch).status, rung(queue)) == ("held", 0)
    batches.allow(now(batch), 1)
    assert rung(queue) == 1
    batches.pause(now(batch))
    batches.resume(now(batch))
    assert rung(queue) == 2
    queue.empty()
    monkeypatch.setattr("django_saga.rq.is_running", lambda id: True)
    run_batch(str(batch.pk))
    assert rung(queue) == 1
    for nonsense in ("x", "", str(batch.pk).upper(), None):
        with pytest.raises(SagaError, match="takes the id of a batch"):
            run_batch(nonsense)  # type: ignore[arg-type]


def rung(queue: Any) -> int:
    return [job.func_name for job in queue.jobs].count(BATCH_ENTRY_POINT)


def test_where_no_worker_can_be_told_the_batch_is_made_all_the_same(settings: Settings) -> None:
    failed_trip()
    settings.RQ_QUEUES = {"sagas": {"URL": "redis://127.0.0.1:1/0"}}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "sagas"}
    batch = create()
    assert now(batch).status == "running"


def test_what_went_wrong_after_it_was_done_is_told_and_it_counts_as_done(
    settings: Settings,
) -> None:
    """Recovery is entered in the audit, and then no worker can be told."""
    lost_trip()
    settings.RQ_QUEUES = {"sagas": {"URL": "redis://127.0.0.1:1/0"}}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "sagas"}
    batch = create(verb=RECOVER)
    assert work(batch) == {"done": 1}
    assert items(batch)[0].why.startswith("could not be handed to the backend; recover_sagas will")


def test_a_guarded_worker_takes_a_batch_and_nothing_else_of_its_kind(queue: Any) -> None:
    id = str(uuid.uuid4())
    for path, arguments, refused in (
        (BATCH_ENTRY_POINT, (id,), False),
        (BATCH_ENTRY_POINT, (id, "x"), True),
        (BATCH_ENTRY_POINT, ("x",), True),
        ("django_saga.batches.work", (id,), True),
        ("os.system", (id,), True),
    ):
        job = queue.enqueue(path, *arguments)
        fetched = SagaJob.fetch(job.id, connection=queue.connection)
        assert bool(fetched._refusal) is refused
