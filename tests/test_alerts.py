"""Being told: whether recovery still comes by, and what somebody must hear of."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core import mail
from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from django_saga import alerts, operations
from django_saga.checks import check_settings
from django_saga.heartbeats import Lateness, beat, lateness
from django_saga.models import SagaAlert, SagaExecution, SagaFailureGroup, SagaHeartbeat
from django_saga.rq import sweep_sagas
from django_saga.signals import saga_alert
from django_saga.storage import DjangoSagaStorage
from django_saga.telling import deliver
from tests.operated import WORLD, changed, due_trip, failed_trip, run_trip, stuck_trip


@pytest.fixture(autouse=True)
def _untold(alone: None) -> None:
    alerts._told_here.clear()


def came(*, seconds_ago: float, every: float | None = None) -> None:
    """Recovery came by that long ago."""
    at = timezone.now() - timedelta(seconds=seconds_ago)
    SagaHeartbeat.objects.update_or_create(name="recovery", defaults={"at": at, "every": every})


def recover(*options: Any) -> str:
    out = StringIO()
    call_command("recover_sagas", *options, stdout=out)
    return out.getvalue()


# Whether recovery comes by


def test_recovery_that_never_came_is_late() -> None:
    assert lateness() == Lateness(limit=timedelta(seconds=300))
    assert lateness().late


def test_a_sweep_notes_when_it_began_by_the_clock_of_the_database(alias: str) -> None:
    storage = DjangoSagaStorage(alias)
    beat(storage=storage)
    first = lateness(storage=storage)
    assert first.at is not None
    assert first.age is not None
    assert timedelta() <= first.age < timedelta(seconds=300)
    assert not first.late
    rows = SagaHeartbeat.objects.using(alias)
    rows.update(at=first.at - timedelta(hours=1))  # two may fall into one millisecond
    beat(storage=storage)
    second = lateness(storage=storage)
    assert second.at is not None
    assert second.at >= first.at
    assert SagaHeartbeat.objects.using(alias).count() == 1


def test_noting_it_takes_one_statement(alias: str) -> None:
    with CaptureQueriesContext(connections[alias]) as seen:
        beat(storage=DjangoSagaStorage(alias))
    changes = [q["sql"] for q in seen.captured_queries if "saga" in q["sql"]]
    assert len(changes) == 1, changes


@pytest.mark.parametrize(
    ("ago", "every", "late"),
    [
        (299, None, False),
        (301, None, True),
        (301, 60, True),
        (301, 200, False),
        (599, 200, False),
        (601, 200, True),
    ],
)
def test_it_is_late_after_three_missed_sweeps_but_not_before_the_setting_says(
    ago: float, every: float | None, late: bool
) -> None:
    came(seconds_ago=ago - 0.5 if not late else ago, every=every)
    assert lateness().late is late


def test_the_setting_says_from_when_on_it_is_late(settings: Settings) -> None:
    settings.DJANGO_SAGA = {"RECOVERY_LATE": 10_000}
    came(seconds_ago=5_000)
    assert not lateness().late
    assert lateness().limit == timedelta(seconds=10_000)


def test_each_sweep_of_the_command_notes_it() -> None:
    assert recover() == "Nothing was due.\n"
    assert lateness().at is not None


def test_a_watch_notes_its_interval_and_a_single_sweep_leaves_that() -> None:
    due_trip()

    def stop() -> None:
        WORLD.interlude = None
        os.kill(os.getpid(), signal.SIGTERM)

    WORLD.interlude = stop
    recover("--watch", "900")
    recover()
    note = SagaHeartbeat.objects.get()
    assert note.every == 900
    assert lateness().limit == timedelta(seconds=2_700)


def test_a_job_of_rq_notes_it_too() -> None:
    due = due_trip()
    sweep_sagas()
    assert changed(due).status == "COMPLETED"
    assert lateness().at is not None


@pytest.mark.parametrize("options", [["--dry-run"], ["--saga", "tests.TripSaga"]])
def test_what_is_no_sweep_of_everything_notes_nothing(options: list[str]) -> None:
    recover(*options)
    assert lateness().at is None


def test_a_sweep_goes_on_though_it_cannot_note_that_it_did(
    caplog: pytest.LogCaptureFixture,
) -> None:
    due = due_trip()
    with connection.schema_editor() as editor:
        editor.alter_db_table(SagaHeartbeat, "django_saga_sagaheartbeat", "elsewhere")
    try:
        recover()
    finally:
        with connection.schema_editor() as editor:
            editor.alter_db_table(SagaHeartbeat, "elsewhere", "django_saga_sagaheartbeat")
    assert changed(due).status == "COMPLETED"
    assert "could not be noted" in caplog.text


# What is told


@pytest.fixture
def heard() -> Iterator[list[alerts.Alert]]:
    """What the signal tells."""
    told: list[alerts.Alert] = []

    def hear(alert: alerts.Alert, **_: Any) -> None:
        told.append(alert)

    saga_alert.connect(hear)
    yield told
    saga_alert.disconnect(hear)


class Hook(ThreadingHTTPServer):
    """A webhook that keeps what it gets."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.status = 200
        super().__init__(("127.0.0.1", 0), Receiver)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?token=secret-token"


class Receiver(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def kinds(told: list[alerts.Alert]) -> list[str]:
    return sorted(alert.kind for alert in told)


def tell_again() -> None:
    """As if what was told had been told an hour ago."""
    SagaAlert.objects.update(created_at=timezone.now() - timedelta(hours=1, seconds=1))


def stranded_trip() -> SagaExecution:
    """One that got stuck before it turned back."""
    execution = due_trip()
    SagaExecution.objects.filter(pk=execution.pk).update(saga="tests.Gone")
    recover_stuck()
    return changed(execution)


def recover_stuck() -> None:
    """A sweep, which ends with a fault if something is stuck."""
    with pytest.raises(CommandError, match="STUCK"):
        recover()


def test_a_failed_compensation_is_told_once_with_a_link(heard: list[alerts.Alert]) -> None:
    stuck = stuck_trip()
    failed_trip()
    for _ in range(3):
        recover()
        tell_again()
    (alert,) = heard
    assert alert.kind == "compensation_failed"
    assert alert.path == f"/admin/django_saga/sagaexecution/{stuck.pk}/change/"
    assert "the compensation of Pack failed" in alert.text
    assert "bag lost" in alert.text
    row = SagaAlert.objects.get()
    assert (row.kind, row.path, row.text) == (alert.kind, alert.path, alert.text)


def test_what_is_stuck_before_it_turned_back_is_told_by_the_sweep_that_found_it(
    heard: list[alerts.Alert],
) -> None:
    stranded = stranded_trip()
    assert stranded.status == "STUCK"
    assert kinds(heard) == ["stuck"]
    assert str(stranded.pk) in heard[0].text


def test_many_of_one_group_are_one_alert_with_a_link_to_the_group(
    heard: list[alerts.Alert],
) -> None:
    stuck, *_ = [stuck_trip() for _ in range(3)]
    alerts.look()
    (alert,) = heard
    assert alert.text.startswith("3 executions are stuck")
    assert alert.path == f"/admin/django_saga/sagafailuregroup/{stuck.failure_group}/change/"


def test_a_group_is_told_of_again_only_for_something_new_and_after_an_hour(
    heard: list[alerts.Alert],
) -> None:
    stuck_trip()
    alerts.look()
    stuck_trip()
    alerts.look()
    assert len(heard) == 1
    tell_again()
    alerts.look()
    assert len(heard) == 2
    tell_again()
    alerts.look()
    assert len(heard) == 2


def test_what_somebody_dealt_with_is_not_told(heard: list[alerts.Alert]) -> None:
    changed(stuck_trip(), settled_at=timezone.now())
    alerts.look()
    assert heard == []


def test_more_failures_than_the_settings_allow_are_told(
    heard: list[alerts.Alert], settings: Settings
) -> None:
    settings.DJANGO_SAGA = {"ALERTS": {"FAILURES": (2, 10)}}
    failures = [failed_trip() for _ in range(2)]
    changed(failed_trip(), finished_at=timezone.now() - timedelta(minutes=11))
    changed(failed_trip(), settled_at=timezone.now())
    alerts.look()
    assert heard == []
    failed_trip()
    alerts.look()
    alerts.look()
    (alert,) = heard
    assert alert.kind == "failures"
    assert alert.text.startswith("3 failures in 10 minutes: Sorry in act of Pay")
    group = failures[0].failure_group
    assert alert.path == f"/admin/django_saga/sagafailuregroup/{group}/change/"


def test_nobody_is_told_of_a_muted_group_until_the_mute_runs_out(
    heard: list[alerts.Alert], settings: Settings
) -> None:
    settings.DJANGO_SAGA = {"ALERTS": {"FAILURES": (0, 10)}}
    for execution in (failed_trip(), stuck_trip()):
        operations.mute(execution.failure_group, 1)
    alerts.look()
    assert heard == []
    SagaFailureGroup.objects.update(muted_until=timezone.now() - timedelta(seconds=1))
    alerts.look()
    assert kinds(heard) == ["compensation_failed", "failures", "failures"]


def test_without_the_setting_no_failures_are_counted(heard: list[alerts.Alert]) -> None:
    for _ in range(5):
        failed_trip()
    alerts.look()
    assert heard == []


def test_the_next_sweep_tells_that_recovery_was_late_once(heard: list[alerts.Alert]) -> None:
    recover()
    assert heard == []  # it never came before: nobody need hear of the first
    came(seconds_ago=4_000)
    recover()
    recover()
    assert kinds(heard) == ["recovery_late"]
    assert "Recovery of sagas is late: it last ran at" in heard[0].text
    assert heard[0].path == "/admin/django_saga/"
    came(seconds_ago=5_000)
    sweep_sagas()
    assert kinds(heard) == ["recovery_late"] * 2


def test_the_overview_tells_it_too_once(heard: list[alerts.Alert]) -> None:
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    for _ in range(2):
        assert client.get("/admin/django_saga/").status_code == 200
    assert [alert.key for alert in heard] == ["recovery_late:never"]
    assert "it has never run" in heard[0].text


def test_a_sweep_tells_no_more_than_so_many_at_once(
    heard: list[alerts.Alert], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "AT_ONCE", 2)
    for step in ("Pack", "Pay"):
        run_trip(act_Leave="fog", **{f"compensate_{step}": f"{step} stays"})
    stranded_trip()
    assert len(heard) == 2
    alerts.look()
    assert len(heard) == 3


# How it is told


def test_a_webhook_gets_it_as_json(hook: Hook, settings: Settings) -> None:
    site = "https://admin.example.com"
    settings.DJANGO_SAGA = {"ALERTS": {"WEBHOOK": hook.address, "SITE": f"{site}/"}}
    stuck = stuck_trip()
    alerts.look()
    ((kind, said),) = hook.posts
    assert kind == "application/json"
    assert said == {
        "kind": "compensation_failed",
        "text": SagaAlert.objects.get().text,
        "url": f"{site}/admin/django_saga/sagaexecution/{stuck.pk}/change/",
        "key": f"compensation_failed:{stuck.failure_group}:{stuck.pk}",
        "saga": "tests.TripSaga",
        "step": "Pack",
        "group": stuck.failure_group,
        "execution": str(stuck.pk),
    }


def test_mail_goes_to_each_with_the_link_and_a_subject_of_one_line(settings: Settings) -> None:
    to = ["ops@example.com", "oncall@example.com"]
    settings.DJANGO_SAGA = {"ALERTS": {"EMAIL": to, "SITE": "https://admin.example.com"}}
    stuck = stuck_trip()
    path = f"/admin/django_saga/sagaexecution/{stuck.pk}/change/"
    assert deliver(alerts.Alert("key", "stuck", "It is stuck\nBcc: all@example.com", path))
    (message,) = mail.outbox
    assert message.to == to
    assert "\n" not in message.subject
    assert "stuck" in message.subject
    assert "https://admin.example.com/admin/django_saga/sagaexecution/" in str(message.body)
    assert message.extra_headers == {}


def test_what_could_not_be_delivered_is_tried_by_the_next_sweep(
    hook: Hook, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.DJANGO_SAGA = {"ALERTS": {"WEBHOOK": hook.address}}
    hook.status = 500
    stuck_trip()
    due = due_trip()
    recover()
    assert changed(due).status == "COMPLETED"
    assert len(hook.posts) == 1
    assert SagaAlert.objects.count() == 0
    assert "could not be sent to the WEBHOOK" in caplog.text
    assert "secret-token" not in caplog.text
    hook.status = 204
    recover()
    recover()
    assert len(hook.posts) == 2
    assert SagaAlert.objects.count() == 1


def test_a_webhook_that_is_away_does_not_keep_the_mail_back(settings: Settings) -> None:
    settings.DJANGO_SAGA = {
        "ALERTS": {"WEBHOOK": "http://127.0.0.1:1/", "EMAIL": ["ops@example.com"]}
    }
    stuck_trip()
    for _ in range(2):
        alerts.look()
    assert len(mail.outbox) == 1


def test_a_webhook_is_no_way_to_read_files(settings: Settings, tmp_path: Any) -> None:
    settings.DJANGO_SAGA = {"ALERTS": {"WEBHOOK": f"file://{tmp_path}/hook"}}
    stuck_trip()
    alerts.look()
    assert SagaAlert.objects.count() == 0


def test_a_receiver_that_raises_keeps_nothing_back(heard: list[alerts.Alert]) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("no pager")

    saga_alert.connect(fail)
    try:
        stuck_trip()
        alerts.look()
    finally:
        saga_alert.disconnect(fail)
    assert SagaAlert.objects.count() == 1
    assert len(heard) == 1


def test_a_fault_in_looking_ends_no_sweep(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.DJANGO_SAGA = {"ALERTS": {"FAILURES": "many"}}
    due = due_trip()
    recover()
    assert changed(due).status == "COMPLETED"
    assert "Alerts could not be looked for" in caplog.text


def test_two_sweeps_at_once_tell_it_once(heard: list[alerts.Alert]) -> None:
    stuck_trip()
    ready = threading.Barrier(4)

    def look() -> None:
        ready.wait()
        alerts.look()
        connections.close_all()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == 1


def test_looking_costs_few_statements(settings: Settings) -> None:
    settings.DJANGO_SAGA = {"ALERTS": {"FAILURES": (1, 10)}}
    for _ in range(3):
        failed_trip()
        stuck_trip()
    alerts.look()
    with CaptureQueriesContext(connection) as seen:
        alerts.look()
    assert len(seen) <= 5


# The setting


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ops@example.com", "must be a dict"),
        ({"PAGER": 1}, "unknown key 'PAGER'"),
        ({"WEBHOOK": "file:///etc/passwd"}, "WEBHOOK must be an address"),
        ({"WEBHOOK": "http://[::1"}, "WEBHOOK must be an address"),
        ({"SITE": "admin.example.com"}, "SITE must be an address"),
        ({"EMAIL": "ops@example.com"}, "EMAIL must be a list"),
        ({"EMAIL": ["ops"]}, "EMAIL must be a list"),
        ({"FAILURES": 5}, "FAILURES must be a pair"),
        ({"FAILURES": (-1, 5)}, "FAILURES must be a pair"),
        ({"FAILURES": (1, 0)}, "FAILURES must be a pair"),
        ({"FAILURES": (1, float("nan"))}, "FAILURES must be a pair"),
    ],
)
def test_a_check_says_what_is_wrong_with_the_setting(
    given: Any, words: str, settings: Settings
) -> None:
    settings.DJANGO_SAGA = {"ALERTS": given}
    (found,) = check_settings()
    assert found.id == "django_saga.E002"
    assert words in found.msg


def test_a_setting_that_is_right_passes_the_check(settings: Settings) -> None:
    settings.DJANGO_SAGA = {
        "ALERTS": {
            "WEBHOOK": "https://hooks.example.com/x",
            "EMAIL": ["ops@example.com"],
            "FAILURES": (10, 5),
            "SITE": "https://admin.example.com",
        }
    }
    assert check_settings() == []
