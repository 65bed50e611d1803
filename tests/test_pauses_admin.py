"""The admin of pauses: pausing, resuming, and who may."""

from __future__ import annotations

import json
import re
import uuid

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from pytest_django import Settings

from django_saga.models import SagaAuditEntry, SagaPause
from django_saga.operations import pause
from tests.operated import TripSaga

pytestmark = pytest.mark.usefixtures("alone")

BASE = "/admin/django_saga/sagapause/"
SAGA = TripSaga.name
HOSTILE = "<script>alert('&amp;')</script>{{ 7|add:7 }}\" onload=x <b>"


def browser(*permissions: str) -> Client:
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def operator() -> Client:
    """The browser of who may pause, and nothing else."""
    return browser("pause_sagaexecution")


def what(step: str = "") -> str:
    return json.dumps([SAGA, step])


def told(client: Client, address: str, **data: str) -> list[str]:
    response = client.post(BASE + address, data, follow=True)
    assert response.status_code == 200
    return [str(message) for message in response.context["messages"]]


def trail() -> list[tuple[str, ...]]:
    entries = SagaAuditEntry.objects.order_by("pk")
    return list(entries.values_list("verb", "result", "source", "reason"))


def test_a_step_is_paused_and_resumed_from_the_list(operator: Client) -> None:
    html = operator.get(BASE).content.decode()
    assert "Nothing is paused." in html
    assert f'href="{BASE}pause/"' in html
    said = told(operator, "pause/", what=what("Pay"), reason="bank down")
    assert said == ["Paused: tests.TripSaga Pay."]
    row = SagaPause.objects.get()
    assert (row.saga, row.step, row.reason) == (SAGA, "Pay", "bank down")
    html = operator.get(BASE).content.decode()
    assert "bank down" in html
    resume = re.search(rf'href="({BASE}\d+/resume/)"', html)
    assert resume is not None
    asked = operator.get(resume[1]).content.decode()
    assert ("bank down" in asked, SagaPause.objects.count()) == (True, 1)
    said = told(operator, resume[1].removeprefix(BASE), reason="up again")
    assert said == ["Resumed: tests.TripSaga Pay. It goes on with the next sweep of recovery."]
    assert not SagaPause.objects.exists()
    assert trail() == [
        ("pause", "done", "admin", "bank down"),
        ("resume", "done", "admin", "up again"),
    ]
    log = LogEntry.objects.order_by("pk").values_list("change_message", flat=True)
    assert list(log) == ["Paused: bank down", "Resumed: up again"]


def test_a_whole_saga_can_be_chosen_and_what_a_link_names_is_chosen_already(
    operator: Client,
) -> None:
    html = operator.get(f"{BASE}pause/?saga={SAGA}&step=Pay").content.decode()
    chosen = re.findall(r'<option value="([^"]*)" selected>', html)
    assert chosen == [what("Pay").replace('"', "&quot;")]
    assert what().replace('"', "&quot;") in html
    told(operator, "pause/", what=what())
    assert SagaPause.objects.get().step == ""


def test_what_is_no_saga_or_step_of_the_code_is_refused(operator: Client) -> None:
    for odd in ("", "x", what("Fly"), json.dumps(["gone.Saga", ""])):
        response = operator.post(f"{BASE}pause/", {"what": odd})
        assert (response.status_code, "errorlist" in response.content.decode()) == (200, True)
    assert not SagaPause.objects.exists()


def test_twice_is_told_and_audited(operator: Client) -> None:
    told(operator, "pause/", what=what())
    assert LogEntry.objects.get().change_message == "Paused"
    again = operator.post(f"{BASE}pause/", {"what": what()}, follow=True).content.decode()
    assert "Saga tests.TripSaga is paused already, since" in again  # its name as it is
    assert [entry[:2] for entry in trail()] == [("pause", "done"), ("pause", "refused")]


def test_one_that_is_gone_cannot_be_resumed(operator: Client) -> None:
    assert operator.get(f"{BASE}4711/resume/").status_code == 404
    assert operator.post(f"{BASE}4711/resume/").status_code == 404
    assert operator.get(f"{BASE}{'9' * 40}/resume/").status_code == 404


PERMISSIONS = [
    # permissions, then the status of: list, other pages, and whether a POST is done
    ((), 403, 403),
    (("view_sagaexecution", "retry_sagaexecution"), 403, 403),
    (("view_sagapause",), 200, 403),
    (("pause_sagaexecution",), 200, 200),
]


@pytest.mark.parametrize(("permissions", "listed", "asked"), PERMISSIONS)
def test_who_may(permissions: tuple[str, ...], listed: int, asked: int) -> None:
    client, row = browser(*permissions), pause(SAGA, "Pay")
    SagaAuditEntry.objects.all().delete()
    response = client.get(BASE)
    assert response.status_code == listed
    html = response.content.decode()
    assert (f"{BASE}pause/" in html, f"{row.pk}/resume/" in html) == (asked == 200, asked == 200)
    for address in ("pause/", f"{row.pk}/resume/"):
        assert client.get(BASE + address).status_code == asked
    done = client.post(f"{BASE}pause/", {"what": what("Pack")}).status_code == 302
    assert (done, SagaPause.objects.count()) == ((True, 2) if asked == 200 else (False, 1))
    done = client.post(f"{BASE}{row.pk}/resume/").status_code == 302
    assert (done, SagaPause.objects.count()) == ((True, 1) if asked == 200 else (False, 1))
    result = "done" if asked == 200 else "refused"
    assert [entry[:2] for entry in trail()] == [("pause", result), ("resume", result)]


def test_who_is_not_logged_in_is_asked_to() -> None:
    for address in ("", "pause/", "1/resume/"):
        assert Client().get(BASE + address)["Location"].startswith("/admin/login/")


def test_a_refusal_is_audited_in_a_project_whose_requests_are_transactions(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    client = browser("view_sagapause")
    assert client.post(f"{BASE}pause/", {"what": what()}).status_code == 403
    assert [entry[:2] for entry in trail()] == [("pause", "refused")]


def test_nothing_is_changed_without_a_csrf_token_nor_by_a_superuser_in_other_ways() -> None:
    row = pause(SAGA)
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    assert client.post(f"{BASE}pause/", {"what": what("Pay")}).status_code == 403
    assert client.post(f"{BASE}{row.pk}/resume/").status_code == 403
    for address in ("add/", f"{row.pk}/delete/"):
        assert client.get(BASE + address).status_code == 403
    assert SagaPause.objects.count() == 1


def test_text_from_outside_is_escaped(operator: Client) -> None:
    row = pause(SAGA, "Pay", reason=HOSTILE)
    SagaPause.objects.update(user_name=HOSTILE)
    for address in ("", "pause/", f"{row.pk}/resume/"):
        response = operator.get(BASE + address)
        html = response.content.decode()
        assert "<script>alert" not in html
        assert "<b>" not in html
        assert "no-store" in response["Cache-Control"]
        assert not re.search(r"<style|\bstyle=|<script(?![^>]*\bsrc=)", html)


def test_each_page_takes_few_queries(operator: Client) -> None:
    row = pause(SAGA, "Pay")
    for address in ("", "pause/", f"{row.pk}/resume/"):
        with CaptureQueriesContext(connection) as queries:
            operator.get(BASE + address)
        assert len(queries) <= 12
