"""Retention: what is blanked, what is deleted, what stays, on every database."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connections, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_saga import InvalidContext, SagaError, pruning
from django_saga.exceptions import InsideTransaction
from django_saga.models import SagaAuditEntry, SagaExecution, SagaStepRecord
from django_saga.operations import edit_context, resolve, retry
from django_saga.pruning import BATCH, Retention, Stage, prunable, prune
from django_saga.storage import DjangoSagaStorage
from tests.operated import (
    EDITED,
    STATES,
    WORLD,
    Trip,
    TripSaga,
    changed,
    completed_trip,
    failed_trip,
    guarded_trip,
    resolved_trip,
    retried_trip,
    run_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

ALIASES = list(settings.DATABASES)
LOCKING = [alias for alias in ALIASES if alias != "sqlite"]  # which locks a database as a whole
PATIENCE = 60  # seconds until a condition that does not come about fails its test
MONTH = Retention(delete_after=timedelta(days=30))
WEEK = Retention(blank_after=timedelta(days=7))
OTHER = "tests.OtherSaga"

# Prunes, and is killed right after the second batch of executions was deleted, before the commit.
KILLED = """
import os, signal, sys
import django
django.setup()
from datetime import timedelta
from django.db import connections
from django_saga import pruning
from django_saga.storage import DjangoSagaStorage
alias, deletions = sys.argv[1], []
def kill(execute, sql, params, many, context):
    answer = execute(sql, params, many, context)
    deletions.extend(["one"] * ("DELETE FROM django_saga_sagaexecution" in sql))
    if len(deletions) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
pruning.BATCH = 2
with connections[alias].execute_wrapper(kill):
    rule = pruning.Retention(delete_after=timedelta(days=30))
    list(pruning.prune(rule, storage=DjangoSagaStorage(alias)))
"""


def aged(execution: SagaExecution, days: float, **columns: Any) -> SagaExecution:
    """The execution as if all of it had been so many days ago."""
    since = timedelta(days=days)
    times = ("created_at", "updated_at", "finished_at", "settled_at")
    known = {name: value for name in times if (value := getattr(execution, name))}
    return changed(execution, **{name: at - since for name, at in known.items()} | columns)


def left(alias: str = "default") -> set[uuid.UUID]:
    return set(SagaExecution.objects.using(alias).values_list("pk", flat=True))


def pruned(rule: Retention, alias: str = "default", **asked: Any) -> Counter[tuple[str, str]]:
    """Prunes; how many of which status were deleted, or blanked."""
    return told(prune(rule, storage=DjangoSagaStorage(alias), **asked))


def told(parts: Iterator[pruning.Pruned]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for part in parts:
        for status, number in part.statuses.items():
            found[str(part.stage), status] += number
    return found


# What goes, and what stays


@pytest.mark.parametrize("rule", [MONTH, WEEK], ids=["delete", "blank"])
def test_only_what_has_ended_and_is_dealt_with_goes_once_it_is_old(
    alias: str, rule: Retention
) -> None:
    old = {state: aged(make(alias=alias), 40) for state, make in STATES.items()}
    young = [aged(STATES[state](alias=alias), 6) for state in ("completed", "retried", "resolved")]
    stage = "delete" if rule is MONTH else "blank"
    assert pruned(rule, alias) == {
        (stage, "COMPLETED"): 1,
        (stage, "FAILED"): 1,
        (stage, "STUCK"): 1,
    }
    rows = SagaExecution.objects.using(alias)
    untouched = set(rows.filter(blanked_at=None).values_list("pk", flat=True))
    gone = {state for state, execution in old.items() if execution.pk not in untouched}
    assert gone == {"completed", "retried", "resolved"}
    assert {execution.pk for execution in young} <= untouched
    assert not pruned(rule, alias)


def test_no_record_stays_behind_and_no_other_goes(alias: str) -> None:
    aged(completed_trip(alias=alias), 31)
    young = aged(completed_trip(alias=alias), 29)
    pruned(MONTH, alias)
    records = SagaStepRecord.objects.using(alias).values_list("execution_id", flat=True)
    assert Counter(records) == {young.pk: 3}


def test_failures_that_nobody_has_dealt_with_go_only_when_asked_for(alias: str) -> None:
    failed = aged(failed_trip(alias=alias), 40)
    cancelled = aged(failed_trip(alias=alias), 40, failure_group="")  # is in nobody's list
    stuck = aged(stuck_trip(alias=alias), 40)
    assert pruned(MONTH, alias) == {("delete", "FAILED"): 1}
    assert left(alias) == {failed.pk, stuck.pk} != {cancelled.pk}
    too = Retention(delete_after=timedelta(days=30), unsettled=True)
    assert pruned(too, alias) == {("delete", "FAILED"): 1}
    assert left(alias) == {stuck.pk}


def test_the_age_of_a_stuck_one_counts_from_when_it_was_settled(alias: str) -> None:
    stuck = aged(stuck_trip(alias=alias), 40, settled_at=timezone.now() - timedelta(days=29))
    assert not pruned(MONTH, alias)
    changed(stuck, settled_at=timezone.now() - timedelta(days=31))
    assert pruned(MONTH, alias) == {("delete", "STUCK"): 1}


def test_what_still_has_a_lease_stays(alias: str) -> None:
    held = aged(completed_trip(alias=alias), 40, lease_until=timezone.now())
    pruned(MONTH, alias)
    assert left(alias) == {held.pk}


def test_only_the_sagas_and_statuses_that_are_asked_for_go(alias: str) -> None:
    mine = [aged(make(alias=alias), 40) for make in (completed_trip, resolved_trip)]
    other = [aged(completed_trip(alias=alias), 40, saga=OTHER) for _ in range(2)]
    age = timedelta(days=30)
    assert pruned(Retention(delete_after=age, sagas=[OTHER]), alias) == {("delete", "COMPLETED"): 2}
    assert left(alias) == {execution.pk for execution in mine}
    stuck = Retention(delete_after=age, statuses=["STUCK"])
    assert pruned(stuck, alias) == {("delete", "STUCK"): 1}
    assert left(alias).isdisjoint(execution.pk for execution in other)
    assert left(alias) == {mine[0].pk}


def test_what_was_retried_stays_for_as_long_as_its_retry_and_goes_with_it(alias: str) -> None:
    storage = DjangoSagaStorage(alias)
    first = failed_trip(alias=alias)
    WORLD.trouble = {"act Pay": "no money"}
    second = retry(first.pk, storage=storage)
    WORLD.reset()
    third = retry(second.pk, storage=storage)
    for execution in SagaExecution.objects.using(alias):
        aged(execution, 40)
    changed(third, finished_at=timezone.now() - timedelta(days=29))
    assert not pruned(MONTH, alias)
    changed(third, finished_at=timezone.now() - timedelta(days=31))
    assert pruned(MONTH, alias) == {("delete", "COMPLETED"): 1, ("delete", "FAILED"): 2}
    assert not left(alias)


def test_more_than_one_batch_goes_in_one_run(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "BATCH", 2)
    kept = [aged(failed_trip(alias=alias), 40 + n) for n in range(3)]
    moment = timezone.now() - timedelta(days=35)
    for _ in range(7):  # at one moment
        changed(completed_trip(alias=alias), finished_at=moment)
    both = Retention(delete_after=timedelta(days=36), blank_after=timedelta(days=30))
    assert pruned(both, alias) == {("blank", "COMPLETED"): 7}
    assert pruned(MONTH, alias) == {("delete", "COMPLETED"): 7}
    assert left(alias) == {execution.pk for execution in kept}


def test_no_more_than_the_rate_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that took no time at all is waited for."""
    monkeypatch.setattr(pruning, "BATCH", 2)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    for _ in range(3):
        aged(completed_trip(), 40)
    pruned(MONTH, rate=4.0)
    assert waited == [0.5, 0.25]
    aged(completed_trip(), 40)
    pruned(MONTH, rate=0)
    assert waited == [0.5, 0.25]


def test_a_dry_run_counts_what_would_go_and_writes_nothing(alias: str) -> None:
    for days in (40, 20, 10, 3):
        aged(completed_trip(alias=alias), days)
    aged(retried_trip(alias=alias), 40)
    aged(failed_trip(alias=alias), 40)
    rule = Retention(delete_after=timedelta(days=30), blank_after=timedelta(days=7))
    before = list(SagaExecution.objects.using(alias).order_by("pk").values())
    with CaptureQueriesContext(connections[alias]) as queries:
        found = told(prunable(rule, storage=DjangoSagaStorage(alias)))
    assert {query["sql"].split()[0] for query in queries} == {"SELECT"}
    assert list(SagaExecution.objects.using(alias).order_by("pk").values()) == before
    assert found == pruned(rule, alias)
    assert found["blank", "COMPLETED"] == 2


@pytest.mark.parametrize(
    "ages",
    [
        {},
        {"delete_after": timedelta()},
        {"blank_after": timedelta(days=2), "delete_after": timedelta(days=2)},
        {"blank_after": timedelta(days=3), "delete_after": timedelta(days=2)},
        {"delete_after": timedelta(days=2), "statuses": ["RUNNING"]},
        {"delete_after": timedelta(days=2), "statuses": []},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(ages: dict[str, Any]) -> None:
    with pytest.raises(SagaError):
        Retention(**ages)


# What is blanked


def test_blanking_removes_contexts_changes_and_what_errors_said(alias: str) -> None:
    """Who did what when, and how it ended, stays."""
    execution = aged(
        run_trip(alias=alias, traveller="Grace", act_Leave="Grace is late", compensate_Pack="no"),
        10,
        settled_at=timezone.now() - timedelta(days=8),
        fallback_context='{"traveller":"Grace"}',
    )
    records = SagaStepRecord.objects.using(alias).filter(execution=execution.pk).order_by("pk")
    before = [(r.step, r.action, r.outcome, r.error_type, r.duration) for r in records]
    assert any("Grace" in r.traceback for r in records)
    pruned(WEEK, alias)
    blanked = SagaExecution.objects.using(alias).get(pk=execution.pk)
    texts = [str(vars(row)) for row in (blanked, *records.all())]
    assert not [text for text in texts if "Grace" in text]
    assert (blanked.context, blanked.initial_context, blanked.fallback_context) == ("", "", None)
    assert blanked.blanked_at is not None
    assert (blanked.status, blanked.error_type) == ("STUCK", execution.error_type)
    assert [
        (r.step, r.action, r.outcome, r.error_type, r.duration) for r in records.all()
    ] == before


def test_what_is_blanked_is_deleted_later(alias: str) -> None:
    aged(completed_trip(alias=alias), 20)
    assert pruned(WEEK, alias) == {("blank", "COMPLETED"): 1}
    both = Retention(blank_after=timedelta(days=7), delete_after=timedelta(days=19))
    assert pruned(both, alias) == {("delete", "COMPLETED"): 1}
    assert not SagaStepRecord.objects.using(alias).exists()


@pytest.mark.parametrize("rule", [MONTH, WEEK], ids=["delete", "blank"])
def test_the_audit_forgets_what_was_edited_but_not_by_whom(rule: Retention) -> None:
    execution = guarded_trip()
    other = guarded_trip()
    for one in (execution, other):
        edit_context(one.pk, EDITED[:-1] + ',"passport":"X"}', reason="typo", user_name="Ann")
    standing = [effect[0] for effect in execution.effects]
    resolve(execution.pk, standing=standing[:1], reason="done")
    aged(SagaExecution.objects.get(pk=execution.pk), 40)
    pruned(rule)
    edit = SagaAuditEntry.objects.get(verb="edit_context", execution_id=execution.pk)
    assert (edit.user_name, edit.reason) == ("Ann", "typo")
    assert "traveller" not in edit.detail
    assert (
        "traveller" in SagaAuditEntry.objects.get(verb="edit_context", execution_id=other.pk).detail
    )


def test_a_blanked_failure_cannot_be_started_anew(alias: str) -> None:
    failed = aged(failed_trip(alias=alias), 10, failure_group="")
    pruned(WEEK, alias)
    with pytest.raises(SagaError, match="its context was removed by retention"):
        retry(failed.pk, storage=DjangoSagaStorage(alias))
    assert left(alias) == {failed.pk}


def test_the_recorded_outcome_of_a_blanked_one_is_still_returned(alias: str) -> None:
    execution = aged(completed_trip(alias=alias), 10)
    pruned(WEEK, alias)
    again = TripSaga(storage=DjangoSagaStorage(alias)).run(Trip(), saga_id=execution.pk)
    assert (again.pk, again.status) == (execution.pk, "COMPLETED")
    assert not WORLD.calls
    with pytest.raises(InvalidContext, match="as retention leaves it"):
        TripSaga.context_of(again)


def test_page_command_and_export_tell_of_a_blanked_one_that_it_is() -> None:
    execution = aged(failed_trip(), 10, failure_group="")
    pruned(WEEK)
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    url = reverse("admin:django_saga_sagaexecution_change", args=[execution.pk])
    page = client.get(url).content.decode()
    blanked = SagaExecution.objects.get(pk=execution.pk).blanked_at
    assert f"were removed by retention on {blanked:%Y-%m-%d %H:%M}" in page
    assert "Nothing can be done: its context was removed by retention." in page
    assert "Show it unmasked" not in page
    out = StringIO()
    call_command("sagas", "show", str(execution.pk), "--context", stdout=out)
    assert "Contexts, their changes and what errors said: removed at" in out.getvalue()
    call_command(
        "sagas", "show", str(execution.pk), "--context", "--json", stdout=(out := StringIO())
    )
    shown = json.loads(out.getvalue())
    assert shown["context"] is None
    assert "retry" not in shown["possible"]
    assert shown["execution"]["blanked_at"].startswith(f"{blanked:%Y-%m-%d}")


# While others work


@pytest.mark.parametrize("alias", LOCKING, indirect=True)
def test_what_somebody_has_in_hand_is_passed_over_and_found_by_the_next_run(alias: str) -> None:
    held, free = (aged(completed_trip(alias=alias), days) for days in (50, 40))
    with in_hand(alias, held.pk):
        assert pruned(MONTH, alias) == {("delete", "COMPLETED"): 1}
        assert left(alias) == {held.pk} != {free.pk}
    assert pruned(MONTH, alias) == {("delete", "COMPLETED"): 1}


@pytest.mark.parametrize("alias", LOCKING, indirect=True)
def test_one_that_is_being_retried_stays(alias: str) -> None:
    """The retry is not committed when the pruning comes by."""
    failed = aged(failed_trip(alias=alias), 40)
    rule = Retention(delete_after=timedelta(days=30), unsettled=True)
    with in_hand(alias, failed.pk, retried=True):
        assert not pruned(rule, alias)
    assert not pruned(rule, alias)
    assert SagaExecution.objects.using(alias).get(retry_of=failed.pk).status == "COMPLETED"


class in_hand:
    """Another session has an execution locked, and may have retried it, until the block ends."""

    def __init__(self, alias: str, pk: uuid.UUID, *, retried: bool = False) -> None:
        self.alias, self.pk, self.retried = alias, pk, retried
        self.locked, self.ended = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.hold)

    def hold(self) -> None:
        try:
            with transaction.atomic(using=self.alias):
                rows = SagaExecution.objects.using(self.alias).filter(pk=self.pk)
                assert rows.select_for_update().first()
                if self.retried:
                    retry(self.pk, storage=DjangoSagaStorage(self.alias))
                self.locked.set()
                assert self.ended.wait(PATIENCE)
        finally:
            connections.close_all()

    def __enter__(self) -> None:
        self.thread.start()
        assert self.locked.wait(PATIENCE)

    def __exit__(self, *_raised: object) -> None:
        self.ended.set()
        self.thread.join(PATIENCE)


@pytest.mark.parametrize("times", [1, 2])
def test_a_batch_that_the_foreign_keys_refuse_is_looked_at_once_more(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a retry is committed between the look and the lock."""
    aged(completed_trip(), 40)
    young = completed_trip()
    work, spoilt = pruning._work, []

    def spoil(*args: Any) -> Any:
        if len(spoilt) < times:
            spoilt.append(True)
            SagaExecution.objects.filter(pk=young.pk).update(retry_of=uuid.uuid4())
        return work(*args)

    monkeypatch.setattr(pruning, "_work", spoil)
    if times == 1:
        assert pruned(MONTH) == {("delete", "COMPLETED"): 1}
    else:
        with pytest.raises(IntegrityError):
            pruned(MONTH)
        assert len(left()) == 2
    assert SagaStepRecord.objects.count() == (3 if times == 1 else 6)


def test_killed_before_a_commit_it_leaves_whole_executions_and_the_next_run_ends_it(
    alias: str, child_environment: dict[str, str]
) -> None:
    for days in range(40, 46):
        aged(completed_trip(alias=alias), days)
    connections[alias].close()
    command = [sys.executable, "-c", KILLED, alias]
    child = subprocess.run(command, env=child_environment, timeout=PATIENCE, check=False)
    assert child.returncode == -signal.SIGKILL
    records = SagaStepRecord.objects.using(alias).values_list("execution_id", flat=True)
    assert Counter(records) == dict.fromkeys(left(alias), 3)
    assert len(left(alias)) == 4
    deadline = time.monotonic() + PATIENCE
    while left(alias):  # the server may take a moment to see that its session is dead
        assert time.monotonic() < deadline
        pruned(MONTH, alias)
    assert not SagaStepRecord.objects.using(alias).exists()


def test_inside_a_transaction_it_is_refused(alias: str) -> None:
    with transaction.atomic(using=alias), pytest.raises(InsideTransaction):
        pruned(MONTH, alias)


def test_an_iterator_that_is_closed_ends_it_and_it_is_audited(
    alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "BATCH", 1)
    for _ in range(3):
        aged(completed_trip(alias=alias), 40)
    parts = prune(MONTH, storage=DjangoSagaStorage(alias), user_name="Ann", reason="law")
    assert next(parts).stage is Stage.DELETE
    parts.close()
    assert len(left(alias)) == 2
    (entry,) = SagaAuditEntry.objects.using(alias)
    assert (entry.verb, entry.user_name, entry.reason) == ("prune", "Ann", "law")
    assert entry.detail == "Deleted 1 that ended more than 30 days ago."


# The command


def command(*arguments: Any, **options: Any) -> str:
    out = StringIO()
    call_command("prune_sagas", *arguments, stdout=out, **options)
    return out.getvalue()


def test_the_command_tells_what_it_did_by_saga_and_status() -> None:
    aged(completed_trip(), 40)
    aged(retried_trip(), 40)
    aged(completed_trip(), 10, saga=OTHER)
    dry = command("--delete-after", "30", "--blank-after", "7", "--dry-run")
    assert dry.splitlines() == [
        "tests.OtherSaga  COMPLETED: 1 to be blanked",
        "tests.TripSaga  COMPLETED: 1 to be deleted",
        "tests.TripSaga  FAILED: 1 to be deleted",
        "Executions: 2 to be deleted, 1 to be blanked. Nothing was touched.",
    ]
    assert len(left()) == 3
    out = command("--delete-after", "30", "--blank-after", "7", "--json", "--reason", "law")
    counts = [tuple(count.values()) for count in json.loads(out)["counts"]]
    assert counts == [
        ("blanked", OTHER, "COMPLETED", 1),
        ("deleted", "tests.TripSaga", "COMPLETED", 1),
        ("deleted", "tests.TripSaga", "FAILED", 1),
    ]
    entry = SagaAuditEntry.objects.get(verb="prune")
    assert (entry.source, entry.reason, bool(entry.user_name)) == ("command", "law", True)
    assert command("--delete-after", "30") == "Executions: 0 deleted, 0 blanked.\n"
    assert SagaAuditEntry.objects.filter(verb="prune").count() == 1


def test_the_command_takes_several_sagas_and_statuses() -> None:
    for saga in (OTHER, "tests.ThirdSaga", TripSaga.name):
        aged(completed_trip(), 40, saga=saga)
        aged(resolved_trip(), 40, saga=saga)
    names = ("--saga", OTHER, "--saga", TripSaga.name)
    command("--delete-after", "30", *names, "--status", "completed", "--status", "failed")
    rows = SagaExecution.objects.values_list("saga", "status")
    assert sorted(rows) == [
        (OTHER, "STUCK"),
        ("tests.ThirdSaga", "COMPLETED"),
        ("tests.ThirdSaga", "STUCK"),
        (TripSaga.name, "STUCK"),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--delete-after", "0"],
        ["--delete-after", "nan"],
        ["--delete-after", "soon"],
        ["--delete-after", "1e99"],
        ["--blank-after", "3", "--delete-after", "2"],
        ["--delete-after", "2", "--status", "RUNNING"],
        ["--delete-after", "2", "--saga", "tests.Misspelt"],
    ],
)
def test_wrong_usage_is_told_by_its_own_exit_status(
    arguments: list[str], child_environment: dict[str, str]
) -> None:
    line = [sys.executable, "-m", "django", "prune_sagas", *arguments]
    child = subprocess.run(line, env=child_environment, capture_output=True, check=False)
    assert child.returncode == 2, child.stderr
    assert b"Traceback" not in child.stderr


def test_a_saga_that_only_the_database_knows_can_be_named() -> None:
    aged(completed_trip(), 40, saga="tests.Gone")
    assert "1 blanked" in command("--blank-after", "30", "--saga", "tests.Gone")
    assert "1 deleted" in command("--delete-after", "30", "--saga", "tests.Gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_transaction_in_hand(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "django_saga.pruning")
    monkeypatch.setattr(pruning, "BATCH", 1)
    for _ in range(3):
        aged(completed_trip(), 40)

    class Raising(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            signal.raise_signal(number)

    logger, handler = logging.getLogger("django_saga.pruning"), Raising()
    logger.addHandler(handler)
    try:
        assert "1 deleted" in command("--delete-after", "30")
    finally:
        logger.removeHandler(handler)
    assert len(left()) == 2


def test_with_more_verbosity_it_tells_of_its_progress_on_stderr() -> None:
    aged(completed_trip(), 40)
    errors = StringIO()
    command("--delete-after", "30", verbosity=2, stderr=errors)
    assert errors.getvalue() == "Executions: 1 deleted, 0 blanked.\n"
    command("--delete-after", "30", verbosity=0)
    assert BATCH == 1_000


def test_a_database_that_is_away_is_told() -> None:
    connection = connections["default"]
    with connection.execute_wrapper(_away), pytest.raises(CommandError, match="is away"):
        command("--delete-after", "30")


def _away(*_call: Any) -> Any:
    from django.db import OperationalError

    raise OperationalError("the server is away")
