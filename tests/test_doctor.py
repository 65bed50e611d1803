"""``sagas doctor``: each thing that can be amiss is found, and nothing where all is well."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.conf import settings as django_settings
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.db.migrations.recorder import MigrationRecorder
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django_rq import get_queue
from pytest_django import Settings
from redis import Redis
from rq import SimpleWorker

from django_saga.doctor import Finding, database, examine, executions
from django_saga.models import SagaBatch, SagaHeartbeat
from django_saga.operations import resolve
from django_saga.storage import DjangoSagaStorage
from tests.operated import (
    TripSaga,
    changed,
    completed_trip,
    driven_trip,
    lost_trip,
    pending_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def alias(alias: str, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> str:
    """Each database in turn is the one that holds the executions."""
    settings.SILENCED_SYSTEM_CHECKS = ["django_saga.W002"]  # atomic steps elsewhere
    monkeypatch.setattr("django.db.router.db_for_write", lambda model, **hints: alias)
    return alias


def beat(age: float = 1.0, every: float | None = None, alias: str = "default") -> None:
    at = timezone.now() - timedelta(seconds=age)
    SagaHeartbeat.objects.using(alias).update_or_create(
        name="recovery", defaults={"at": at, "every": every, "driver": "web-1:7"}
    )


def levels() -> dict[str, str]:
    """The worst level of each examination that is not ok."""
    return {finding.name: finding.level for finding in examine() if finding.level != "ok"}


def found(name: str) -> list[Finding]:
    return [finding for finding in examine() if finding.name == name]


def test_where_all_is_well_nothing_is_amiss(alias: str) -> None:
    beat(alias=alias)
    for make in (completed_trip, driven_trip, pending_trip):
        make(alias=alias)
    assert levels() == {}
    names = {finding.name for finding in examine()}
    expected = {"checks", "backend", "migrations", "clock", "recovery", "leases", "stuck"}
    assert expected | {"names", "rows", "batches"} <= names


@pytest.mark.parametrize(
    ("age", "every", "level"), [(60, None, "ok"), (7200, None, "error"), (7200, 3600.0, "ok")]
)
def test_recovery_that_is_late_is_an_error(
    alias: str, age: float, every: float | None, level: str
) -> None:
    beat(age, every, alias)
    assert [finding.level for finding in found("recovery")] == [level]


def test_recovery_that_never_ran_is_an_error() -> None:
    assert levels() == {"recovery": "error"}
    assert "never" in found("recovery")[0].what
    assert "recover_sagas" in found("recovery")[0].todo


def test_a_clock_that_is_off_is_a_warning(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(alias=alias)
    there = database._database_now
    for seconds, amiss in ((-60, True), (60, True), (2, False)):
        with monkeypatch.context() as patch:
            off = timedelta(seconds=seconds)
            patch.setattr(database, "_database_now", lambda off=off: there() + off)
            assert (levels() == {"clock": "warning"}) is amiss


@pytest.mark.parametrize("alias", ["sqlite"], indirect=True)
def test_sqlite_whose_transactions_are_deferred_is_a_warning(
    alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat(alias=alias)
    options = {**connections[alias].settings_dict["OPTIONS"], "transaction_mode": "DEFERRED"}
    monkeypatch.setitem(connections[alias].settings_dict, "OPTIONS", options)
    assert levels() == {"transactions": "warning"}
    assert "IMMEDIATE" in found("transactions")[0].todo


def test_unprepared_checkpoints_are_hinted_at(monkeypatch: pytest.MonkeyPatch) -> None:
    [hint] = found("prepared_statements")
    assert (hint.level, "prepare_threshold" in hint.what) == ("ok", True)
    options = {"server_side_binding": True, "prepare_threshold": 5}
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
    assert found("prepared_statements")[0].todo == ""


def test_settings_that_cannot_be_used_are_an_error(settings: Settings) -> None:
    beat()
    settings.DJANGO_SAGA = {"LEES": 3}
    assert levels() == {"checks": "error"}
    settings.DJANGO_SAGA = {"BACKEND": "nowhere.Backend"}
    assert levels() == {"checks": "error", "backend": "error"}


def test_migrations_that_are_not_applied_are_an_error() -> None:
    recorder = MigrationRecorder(connection)
    rows = recorder.migration_qs.filter(app="django_saga")
    names = list(rows.values_list("name", flat=True))
    rows.delete()
    try:
        assert levels() == {"migrations": "error"}
        assert "0001_initial" in found("migrations")[0].what
    finally:
        for name in names:
            recorder.record_applied("django_saga", name)


def test_a_lost_driver_is_a_warning(alias: str) -> None:
    beat(alias=alias)
    lost_trip(alias=alias)
    assert levels() == {"leases": "warning"}


def test_a_stuck_one_is_a_warning_until_somebody_resolves_it(alias: str) -> None:
    beat(alias=alias)
    stuck = stuck_trip(alias=alias)
    assert levels() == {"stuck": "warning"}
    resolve(stuck.pk, ["Pack"], reason="seen", storage=DjangoSagaStorage(alias))
    assert levels() == {}


def test_sagas_and_steps_that_the_code_lost_are_errors(alias: str) -> None:
    beat(alias=alias)
    changed(driven_trip(alias=alias), saga="gone.Saga")
    changed(driven_trip(alias=alias), plan=[["Pack"], ["Fly"]])
    changed(completed_trip(alias=alias), saga="old.Saga")
    assert levels() == {"names": "error"}
    texts = "\n".join(finding.what for finding in found("names"))
    assert "gone.Saga" in texts
    assert "Fly" in texts
    assert "old.Saga" not in texts


def test_a_row_that_somebody_edited_is_an_error(alias: str) -> None:
    beat(alias=alias)
    driven_trip(alias=alias)
    spoilt = changed(driven_trip(alias=alias), effects={"not": "a list"})
    assert levels() == {"rows": "error"}
    assert str(spoilt.pk) in found("rows")[0].what


@pytest.mark.parametrize("alias", ["sqlite"], indirect=True)
def test_a_plan_that_is_no_json_spoils_its_own_row_alone(alias: str) -> None:
    beat(alias=alias)
    driven_trip(alias=alias)
    spoilt = driven_trip(alias=alias)
    with connections[alias].cursor() as cursor:
        cursor.execute("PRAGMA ignore_check_constraints = ON")
        cursor.execute(
            "UPDATE django_saga_sagaexecution SET plan = '[[' WHERE id = %s", [spoilt.pk.hex]
        )
        cursor.execute("PRAGMA ignore_check_constraints = OFF")
    assert levels() == {"rows": "error"}
    assert found("rows")[0].what.startswith("1 active")


def test_a_batch_that_nobody_drives_is_a_warning(alias: str) -> None:
    beat(alias=alias)
    now = timezone.now()
    batches = SagaBatch.objects.using(alias)
    batch = batches.create(verb="retry", reason="", title="all")
    assert levels() == {}
    rows = batches.filter(pk=batch.pk)
    rows.update(created_at=now - timedelta(hours=1))
    assert levels() == {"batches": "warning"}
    rows.update(lease_until=now + timedelta(minutes=1))
    assert levels() == {}
    rows.update(lease_until=now - timedelta(hours=1))
    assert levels() == {"batches": "warning"}
    rows.update(status=SagaBatch.Status.HELD)
    assert levels() == {}


def test_what_cannot_be_examined_is_an_error_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beat()
    monkeypatch.setattr(executions, "NAMED", "many")
    assert levels() == {"names": "error"}


def test_it_reads_a_bounded_number_of_rows() -> None:
    beat()
    driven_trip()
    with CaptureQueriesContext(
        connection,
    ) as queries:
        examine()
    reading = [
        query["sql"] for query in queries if 'FROM "django_saga_sagaexecution"' in query["sql"]
    ]
    unbounded = [sql for sql in reading if "LIMIT" not in sql and " IN (" not in sql]
    assert unbounded == []
    assert len(queries) < 30


# RQ


@pytest.fixture
def queue(settings: Settings) -> Iterator[Any]:
    name = f"sagas-{uuid4().hex[:8]}"
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, name: {"URL": os.environ["REDIS_URL"]}}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": name}
    beat()
    queue = get_queue(name)
    with closing(queue.connection), policy(queue.connection, "noeviction"):
        yield queue


@contextmanager
def policy(redis: Redis, name: str) -> Iterator[None]:
    before = redis.config_get("maxmemory-policy")["maxmemory-policy"]
    redis.config_set("maxmemory-policy", name)
    try:
        yield
    finally:
        redis.config_set("maxmemory-policy", before)


@contextmanager
def working(*queues: Any) -> Iterator[None]:
    """A worker that has told Redis of its queues."""
    worker = SimpleWorker(list(queues), connection=queues[0].connection)
    worker.register_birth()
    try:
        yield
    finally:
        worker.register_death()


def test_a_queue_with_a_worker_is_well(queue: Any) -> None:
    with working(queue):
        assert levels() == {}
        assert "SagaJob" in found("workers")[0].todo


def test_a_queue_without_a_worker_is_an_error(queue: Any) -> None:
    queue.enqueue("math.sqrt", 4)
    assert levels() == {"workers": "error"}
    assert "1 jobs wait" in found("workers")[0].what
    queue.empty()


def test_a_worker_on_several_queues_is_a_warning(queue: Any) -> None:
    with working(queue, get_queue("default")):
        assert levels() == {"queues": "warning"}


def test_every_queue_that_sagas_name_wants_a_worker(
    queue: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"{queue.name}-own"
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, own: {"URL": os.environ["REDIS_URL"]}}
    monkeypatch.setattr(TripSaga, "queue", own)
    with working(queue):
        assert levels() == {"workers": "error"}
        assert [own in finding.what for finding in found("workers")] == [False, True]
    with working(queue, get_queue(own)):
        assert levels() == {}, "they are all for sagas"
        assert len(found("redis")) == 1, "one server has both"


def test_a_redis_that_evicts_is_a_warning(queue: Any) -> None:
    with working(queue), policy(queue.connection, "allkeys-lru"):
        assert levels() == {"eviction": "warning"}


def test_a_redis_that_does_not_answer_is_an_error(queue: Any, settings: Settings) -> None:
    name = django_settings.DJANGO_SAGA["QUEUE"]
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, name: {"URL": "unix:///nowhere/redis.sock"}}
    assert levels() == {"redis": "error"}


def test_a_queue_that_is_not_defined_is_an_error(settings: Settings) -> None:
    beat()
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "undefined"}
    assert levels()["backend"] == "error"
    assert "RQ_QUEUES" in found("backend")[0].what


# The command


def test_the_command_tells_and_its_exit_status_is_1_with_an_error() -> None:
    out = io.StringIO()
    with pytest.raises(CommandError) as caught:
        call_command("sagas", "doctor", stdout=out)
    assert caught.value.returncode == 1
    assert "ERROR   Recovery has never run." in out.getvalue()
    beat()
    stuck_trip()
    out = io.StringIO()
    call_command("sagas", "doctor", "--json", stdout=out)
    document = json.loads(out.getvalue())
    assert document["worst"] == "warning"
    assert {"name", "level", "what", "todo"} == set(document["findings"][0])


def test_a_database_that_does_not_answer_is_told_without_a_traceback(
    child_environment: dict[str, str],
) -> None:
    environment = {**child_environment, "DATABASE_URL": "postgres://nobody@127.0.0.1:1/nowhere"}
    command = [sys.executable, "-m", "django", "sagas", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    findings = {f["name"]: f["level"] for f in json.loads(done.stdout)["findings"]}
    assert findings["migrations"] == "error"
