"""The overview: its numbers, what it makes red, what it costs, and that it stands by itself."""

from __future__ import annotations

import re
import uuid
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from django_saga import operations
from django_saga.heartbeats import beat
from django_saga.models import (
    SagaBatch,
    SagaExecution,
    SagaFailureGroup,
    SagaHeartbeat,
    SagaPause,
    SagaStepRecord,
)
from tests.operated import (
    TripSaga,
    changed,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    lost_trip,
    pending_trip,
    run_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

PAGE = "/admin/django_saga/"
LIST = "/admin/django_saga/sagaexecution/"
HOSTILE = "<script>alert('&amp;')</script>{{ 7|add:7 }}\" onload=x <b>"


@pytest.fixture
def operator() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


def staff(*codenames: str) -> Client:
    who = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    who.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    client = Client()
    client.force_login(who)
    return client


def overview(client: Client) -> str:
    response = client.get(PAGE)
    assert response.status_code == 200, response.content.decode()
    return response.content.decode()


def text(html: str) -> str:
    """What is there to read."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def cards(html: str) -> dict[str, tuple[str, str]]:
    """Number and query of each card."""
    found = re.findall(
        rf'<a href="{LIST}\?([^"]*)"><span class="saga-number">([^<]*)</span> <span>([^<]*)<', html
    )
    return {label: (number, query) for query, number, label in found}


def statuses(html: str) -> dict[str, tuple[str, str]]:
    """Number and query of each status."""
    rows = re.findall(r"<tr><th scope=\"row\"><span.*?</tr>", html, re.S)
    found = {}
    for row in rows:
        link = re.search(rf'<a href="{LIST}\?status=(\w+)">([^<]*)</a>', row)
        if link:
            found[link[1]] = (link[2], text(row))
    return found


def aged(execution: SagaExecution, **ago: float) -> SagaExecution:
    return changed(execution, created_at=timezone.now() - timedelta(**ago))


def shown(client: Client, query: str) -> int:
    html = client.get(f"{LIST}?{query.replace('&amp;', '&')}").content.decode()
    return len(set(re.findall(r"/sagaexecution/([0-9a-f-]{36})/change/", html)))


def test_each_number_is_that_of_its_list(operator: Client) -> None:
    for make in (stuck_trip, failed_trip, lost_trip, due_trip, driven_trip, completed_trip):
        make()
    failed_trip()
    changed(failed_trip(), settled_at=timezone.now())
    changed(stuck_trip(), settled_at=timezone.now())
    pending_trip()
    html = overview(operator)
    found = cards(html)
    assert {label: number for label, (number, _) in found.items()} == {
        "Stuck": "1",
        "Failed, not dealt with": "2",
        "Without a driver": "2",
        "Expired leases": "1",
    }
    for label in ("Stuck", "Failed, not dealt with", "Without a driver"):
        number, query = found[label]
        assert shown(operator, query) == int(number)
    counts = {status: number for status, (number, _) in statuses(html).items()}
    assert counts == {
        "STUCK": "2",
        "FAILED": "3",
        "COMPLETED": "1",
        "COMPENSATING": "0",
        "RUNNING": "2",
        "PENDING": "2",
    }
    for status, number in counts.items():
        assert shown(operator, f"status={status}") == int(number)


def test_an_execution_counts_in_the_hour_of_its_start(operator: Client) -> None:
    for hours in (0.5, 2.5, 2.6, 23.5, 25):
        aged(completed_trip(), hours=hours)
    aged(failed_trip(), hours=5.5)
    aged(failed_trip(), days=3)
    found = statuses(overview(operator))
    assert found["COMPLETED"][0] == "4"  # the whole table is not counted
    assert "latest 24 hours: 4 in all, at most 2 in an hour" in found["COMPLETED"][1]
    assert found["FAILED"][0] == "2"
    assert "latest 24 hours: 1 in all, at most 1 in an hour" in found["FAILED"][1]


def test_what_is_more_than_was_looked_at_gets_a_plus(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_saga.admin.overview.CAP", 2)
    monkeypatch.setattr("django_saga.admin.overview.HOURLY", 3)
    for _ in range(3):
        failed_trip()
    for _ in range(4):
        due_trip()
    html = overview(operator)
    assert cards(html)["Failed, not dealt with"][0] == "2+"
    assert cards(html)["Without a driver"][0] == "2+"
    assert statuses(html)["PENDING"][0] == "2+"
    assert statuses(html)["COMPLETED"][0] == "0+"
    assert statuses(html)["STUCK"][0] == "0"


def test_recovery_that_is_late_is_red_with_the_command_to_run(operator: Client) -> None:
    html = overview(operator)
    assert "Recovery is late. It has never run." in text(html)
    assert "Run it: python manage.py recover_sagas --watch 30" in text(html)
    beat()
    html = overview(operator)
    assert "is late" not in html
    assert "Recovery: It last ran 0" in text(html)
    SagaHeartbeat.objects.update(at=timezone.now() - timedelta(hours=3))
    assert "Recovery is late. It last ran 3 h 0 m ago" in text(overview(operator))


def test_the_groups_seen_last_are_on_it_but_not_the_muted(operator: Client) -> None:
    failed, stuck = failed_trip(), stuck_trip()
    operations.mute(stuck.failure_group, 1)
    html = overview(operator)
    assert f"/sagafailuregroup/{failed.failure_group}/change/" in html
    assert f"{LIST}?group={failed.failure_group}&amp;status=all" in html
    assert "retry anew once the cause is gone" in html
    assert stuck.failure_group not in html


def test_it_tells_what_waits_what_is_paused_and_what_runs(operator: Client) -> None:
    oldest = aged(pending_trip(), hours=4)
    due_trip()
    operations.pause("tests.TripSaga", "Pay", reason="The bank is down.")
    SagaBatch.objects.create(verb="retry", reason="", title="all")
    SagaBatch.objects.create(verb="retry", reason="", title="all", status="finished")
    html = overview(operator)
    said = text(html[html.index('id="saga-flow"') :])
    assert "Oldest waiting 4 h 0 m tests. Trip Saga" in said
    assert f"{LIST}{oldest.pk}/change/" in html
    assert "tests.TripSaga Pay The bank is down." in said
    assert "Running batches 1" in said


def test_the_steps_that_fail_most_and_those_that_are_slow_come_first(operator: Client) -> None:
    for _ in range(3):
        failed_trip()
    run_trip(act_Leave="fog")
    old = stuck_trip()
    SagaStepRecord.objects.filter(execution=old).update(
        created_at=timezone.now() - timedelta(hours=25)
    )
    SagaStepRecord.objects.filter(step="Leave").update(duration=90.0)
    html = overview(operator)
    failing = text(html[html.index('id="saga-failing"') : html.index('id="saga-slowest"')])
    assert "Pay → tests.TripSaga 3 of 4 (75 %) Leave → tests.TripSaga 1 of 1 (100 %)" in failing
    assert "Pack" not in failing
    slowest = text(html[html.index('id="saga-slowest"') :])
    assert "Leave → tests.TripSaga 1 m 1 m Pa" in slowest
    assert f"{LIST}?saga=tests.TripSaga&amp;step=Leave" in html


def test_who_may_not_see_executions_sees_the_plain_page() -> None:
    failed_trip()
    plain = overview(staff("view_sagafailuregroup"))
    assert "saga-home" not in plain
    assert "/sagafailuregroup/" in plain
    html = overview(staff("view_sagaexecution"))
    assert "saga-home" in html
    assert "/sagafailuregroup/" not in html


def test_text_from_outside_is_never_markup_and_nothing_is_inline(operator: Client) -> None:
    run_trip(act_Pay=HOSTILE)
    SagaPause.objects.create(saga=HOSTILE, step=HOSTILE, reason=HOSTILE, user_name=HOSTILE)
    SagaExecution.objects.update(saga=HOSTILE)
    SagaFailureGroup.objects.update(saga=HOSTILE, step=HOSTILE, error_type=HOSTILE)
    SagaStepRecord.objects.update(step=HOSTILE)
    beat()
    SagaHeartbeat.objects.update(driver=HOSTILE)
    html = overview(operator)
    assert "{{ 7|add:7 }}" in html
    assert "<script>alert" not in html
    assert " style=" not in html
    assert not re.search(r"<script(?![^>]*src=)", html)


@pytest.mark.parametrize("who", ["root", "staff"])
def test_it_asks_little(who: str, operator: Client) -> None:
    for make in (stuck_trip, failed_trip, lost_trip, due_trip, completed_trip):
        make()
    beat()
    client = operator
    if who == "staff":
        client = staff("view_sagaexecution", "view_sagafailuregroup", "view_sagapause")
    overview(client)
    with CaptureQueriesContext(connection) as seen:
        overview(client)
    assert len(seen) <= 12, [query["sql"][:200] for query in seen.captured_queries]


def rq(settings: Any, url: str) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "rq"}
    settings.RQ_QUEUES = {"default": {"URL": url}}


def test_the_queue_tells_of_its_workers_and_of_what_waits(
    operator: Client, settings: Settings
) -> None:
    from django_rq.queues import get_queue

    assert "RQ queue" not in overview(operator)
    rq(settings, settings.REDIS_URL)
    queue = get_queue("default")
    queue.empty()
    assert "RQ queue default 0 workers, 0 jobs wait" in text(overview(operator))
    for _ in range(2):
        pending_trip(delay=0.0)
    try:
        assert queue.count == 2
        assert "RQ queue default no worker 0 workers, 2 jobs wait" in text(overview(operator))
    finally:
        queue.empty()


def test_every_queue_that_sagas_name_is_told(
    operator: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rq(settings, settings.REDIS_URL)
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, "trips": {"URL": "redis://127.0.0.1:1"}}
    monkeypatch.setattr(TripSaga, "queue", "trips")
    told = text(overview(operator))
    assert "RQ queue default 0 workers" in told
    assert "RQ queue trips Redis does not answer" in told


def test_redis_may_be_away(operator: Client, settings: Settings) -> None:
    stuck_trip()
    rq(settings, "redis://127.0.0.1:1")
    html = overview(operator)
    assert "Redis does not answer" in html
    assert cards(html)["Stuck"][0] == "1"
