"""The admin of executions, as a browser without scripts meets it."""

from __future__ import annotations

import json
import re
import uuid
from html import unescape
from typing import Any
from urllib.parse import quote

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection, connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from pytest_django import Settings

from django_saga import batches
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.operations import RETRY
from tests.operated import (
    WORLD,
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

BASE = "/admin/django_saga/sagaexecution/"
MODEL_ADMIN = admin.site.get_model_admin(SagaExecution)
MAKERS = {
    "completed": completed_trip,
    "failed": failed_trip,
    "stuck": stuck_trip,
    "driven": driven_trip,
    "lost": lost_trip,
    "due": due_trip,
    "waiting": pending_trip,
}
MANY = {"reason": "the bank is back", "rate": "100", "allowed": "all"}
HOSTILE = "<script>alert('&amp;')</script>{{ 7|add:7 }}\" onload=x <b>"


@pytest.fixture
def operator() -> Client:
    """A superuser's browser."""
    return log_in(User.objects.create_superuser("root"))


def log_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def staff(*permissions: str) -> Client:
    """The browser of a staff user with these permissions."""
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    names = [f"{permission}_sagaexecution" for permission in permissions]
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return log_in(user)


def page(client: Client, address: str, status: int = 200) -> str:
    response = client.get(address)
    assert response.status_code == status, response.content.decode()
    return response.content.decode()


def shown(client: Client, query: str = "") -> set[uuid.UUID]:
    """The ids in the list."""
    ids = re.findall(r"/sagaexecution/([0-9a-f-]{36})/change/", page(client, BASE + query))
    return {uuid.UUID(id) for id in ids}


def confirm(client: Client, address: str, **data: Any) -> dict[str, Any]:
    """Open a confirmation page; returns what its form would post."""
    html = client.post(address, data).content.decode() if data else page(client, address)
    form = html[html.index('<form method="post" action="') :]
    fields: dict[str, Any] = {}
    for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form):
        fields.setdefault(name, []).append(value)
    fields.pop("csrfmiddlewaretoken", None)
    return fields


def act(client: Client, address: str) -> list[str]:
    """Confirm and do it; returns what the operator is told."""
    return told(client, address, confirm(client, address))


def told(client: Client, address: str, data: dict[str, Any]) -> list[str]:
    response = client.post(address, data, follow=True)
    assert response.status_code == 200, response.content.decode()
    return [str(message) for message in response.context["messages"]]


def one(execution: SagaExecution, verb: str = "change") -> str:
    return f"{BASE}{execution.pk}/{verb}/"


def counts() -> dict[str, int]:
    statuses = list(SagaExecution.objects.values_list("status", flat=True))
    return {status: statuses.count(status) for status in sorted(set(statuses))}


# Who may


@pytest.mark.parametrize("address", ["", "{id}/change/", "{id}/retry/", "{id}/recover/", "retry/"])
def test_who_is_not_logged_in_is_asked_to(address: str) -> None:
    address = BASE + address.format(id=failed_trip().pk)
    for response in (Client().get(address), Client().post(address)):
        assert response.status_code == 302
        assert response["Location"].startswith("/admin/login/")


ALLOWED = [
    # permissions, then the status of: list, page, retry, recover
    ((), 403, 403, 403, 403),
    (("retry", "recover"), 403, 403, 403, 403),
    (("view",), 200, 200, 403, 403),
    (("view", "retry"), 200, 200, 200, 403),
    (("view", "recover"), 200, 200, 403, 200),
    (("view", "retry", "recover"), 200, 200, 200, 200),
]


@pytest.mark.parametrize(("permissions", "listed", "seen", "retry", "recover"), ALLOWED)
def test_each_page_takes_its_own_permission(
    permissions: tuple[str, ...], listed: int, seen: int, retry: int, recover: int
) -> None:
    execution = failed_trip()
    client = staff(*permissions)
    assert client.get(BASE).status_code == listed
    assert client.get(one(execution)).status_code == seen
    assert client.get(f"{BASE}{execution.pk}/history/").status_code == seen
    for verb, status in (("retry", retry), ("recover", recover)):
        for address in (one(execution, verb), f"{BASE}{verb}/"):
            assert client.get(address).status_code == status
    assert counts() == {"FAILED": 1}


@pytest.mark.parametrize(("permissions", "listed", "seen", "retry", "recover"), ALLOWED)
def test_no_post_gets_around_the_permission(
    permissions: tuple[str, ...], listed: int, seen: int, retry: int, recover: int
) -> None:
    """With exactly what the confirmation of somebody who may would post."""
    failed, lost = failed_trip(), lost_trip()
    root = log_in(User.objects.create_superuser("root"))
    client = staff(*permissions)
    for execution, verb, status in ((failed, "retry", retry), (lost, "recover", recover)):
        posts = {
            address: {**confirm(root, address), **MANY}
            for address in (f"{BASE}{verb}/", one(execution, verb))
        }
        for address, data in posts.items():
            before = list(SagaExecution.objects.order_by("pk").values())
            response = client.post(address, data)
            assert (response.status_code == 403) is (status == 403)
            if status == 403:
                assert list(SagaExecution.objects.order_by("pk").values()) == before
    assert SagaExecution.objects.filter(retry_of=failed).count() == (retry == 200)
    assert changed(lost).status == ("COMPLETED" if recover == 200 else "RUNNING")


def test_the_actions_offered_are_those_that_are_permitted() -> None:
    execution, lost = failed_trip(), lost_trip()
    both = {"retry", "recover"}
    for permissions in ((), ("retry",), ("recover",), ("retry", "recover")):
        client = staff("view", *permissions)
        html = page(client, BASE)
        for verb in both:
            assert (f'value="{verb}_selected"' in html) is (verb in permissions)
            assert (f'href="{BASE}{verb}/?' in html) is (verb in permissions)
        assert (one(execution, "retry") in page(client, one(execution))) is ("retry" in permissions)
        assert (one(lost, "recover") in page(client, one(lost))) is ("recover" in permissions)


@pytest.mark.parametrize("address", ["add/", "{id}/change/", "{id}/delete/", "{id}/", ""])
def test_nothing_is_added_edited_or_deleted_not_even_by_a_superuser(
    address: str, operator: Client
) -> None:
    execution = failed_trip()
    before = SagaExecution.objects.values().get()
    data = {"status": "COMPLETED", "saga": "x", "post": "yes", "_save": "1", "action": "delete"}
    data |= {"_selected_action": str(execution.pk), "index": "0"}
    data["action"] = "delete_selected"
    response = operator.post(BASE + address.format(id=execution.pk), data)
    assert response.status_code in ((302, 403) if address else (200,))
    assert SagaExecution.objects.values().get() == before
    assert operator.get(f"{BASE}add/").status_code == 403
    assert operator.get(one(execution, "delete")).status_code == 403
    assert "delete_selected" not in page(operator, BASE)


def test_without_a_csrf_token_nothing_is_done() -> None:
    execution = failed_trip()
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    data = confirm(client, one(execution, "retry"))
    assert client.post(one(execution, "retry"), data).status_code == 403
    assert counts() == {"FAILED": 1}


# The list


def test_it_opens_on_what_needs_attention(operator: Client) -> None:
    made = {name: make() for name, make in MAKERS.items()}
    retried = failed_trip()
    changed(retried, settled_at=retried.finished_at)
    needed = {made[name].pk for name in ("failed", "stuck", "lost", "due")}
    assert shown(operator) == needed
    everything = {execution.pk for execution in made.values()} | {retried.pk}
    assert shown(operator, "?status=all") == everything
    assert "?status=all" in page(operator, BASE)


def test_filters(operator: Client) -> None:
    made = {name: make() for name, make in MAKERS.items()}
    other = changed(run_trip(act_Leave="fog"), saga="old.Saga", error_type="OddError")

    def names(query: str) -> set[str]:
        by_id = {execution.pk: name for name, execution in made.items()} | {other.pk: "other"}
        return {by_id[id] for id in shown(operator, query)}

    assert names("?status=STUCK") == {"stuck"}
    assert names("?status=FAILED") == {"failed", "other"}
    assert names("?status=RUNNING") == {"lost", "driven"}
    assert names("?status=overdue") == {"lost", "due"}
    assert names("?saga=old.Saga") == {"other"}
    assert names("?status=all&saga=tests.TripSaga") == set(made)
    assert names("?step=Pay") == {"failed"}
    assert names("?step=Pack") == {"stuck", "lost", "due"}
    assert names("?error=OddError") == {"other"}
    assert names("?error=Sorry&status=FAILED&step=Pay") == {"failed"}
    assert names("?error=Unheard") == set()
    html = page(operator, BASE)
    for choice in ("old.Saga", "tests.TripSaga", "OddError", "Sorry"):
        assert f">{choice}</a>" in html


def test_another_saga_drops_the_step_that_was_chosen(operator: Client) -> None:
    failed_trip()
    html = page(operator, f"{BASE}?saga=tests.TripSaga&step=Pay&status=FAILED")
    assert 'href="?status=FAILED"' in html.replace("&amp;", "&")


def test_search_finds_an_id_whatever_its_status(operator: Client) -> None:
    completed, failed = completed_trip(), failed_trip()
    for text in (str(completed.pk), completed.pk.hex, f" {completed.pk}".upper()):
        assert shown(operator, f"?q={text}") == {completed.pk}
    assert shown(operator, f"?q={failed.pk}") == {failed.pk}


def test_what_the_lists_show_of_an_id_is_what_the_search_takes(operator: Client) -> None:
    failed = failed_trip()
    rows = SagaExecution.objects.all()
    batch = batches.create(RETRY, rows, user=None, reason="x", title="x")
    for address in (
        BASE,
        f"/admin/django_saga/sagafailuregroup/{failed.failure_group}/change/",
        f"/admin/django_saga/sagabatch/{batch.pk}/change/",
    ):
        (text,) = re.findall(r'class="saga-id"[^>]*>([^<]*)<', page(operator, address))
        assert shown(operator, f"?q={quote(text)}") == {failed.pk}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tests.TripSaga", "a UUID; this is none"),
        ("%20", "a UUID; this is none"),
        ("' OR 1=1", "a UUID; this is none"),
        (str(uuid.UUID(int=7)), "No execution has this id"),
    ],
)
def test_a_search_for_anything_else_finds_nothing_and_says_so(
    text: str, why: str, operator: Client
) -> None:
    failed_trip()
    assert why in page(operator, f"{BASE}?q={text}")
    assert shown(operator, f"?q={text}") == set()


@pytest.mark.parametrize(
    ("query", "why"),
    [("", "Nothing needs attention"), ("?error=Nope", "No execution matches these filters")],
)
def test_an_empty_list_says_why(query: str, why: str, operator: Client) -> None:
    completed_trip()
    assert why in page(operator, BASE + query)


def test_newest_first_page_by_page_without_counting(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No query counts, sorts out duplicates, or reads a context; their number is constant."""
    monkeypatch.setattr(MODEL_ADMIN, "list_per_page", 2)
    made = [failed_trip().pk for _ in range(5)][::-1]
    with CaptureQueriesContext(connection) as queries:
        first = page(operator, BASE)
    said = [query["sql"] for query in queries if "django_saga_sagaexecution" in query["sql"]]
    assert listed(first) == made[:2]
    assert not turn(first, "prev")
    second = page(operator, BASE + turn(first, "next"))
    assert listed(second) == made[2:4]
    last = page(operator, BASE + turn(second, "next"))
    assert listed(last) == made[4:]
    assert not turn(last, "next")
    assert listed(page(operator, BASE + turn(last, "prev"))) == made[2:4]
    assert 0 < len(said) <= 4
    for sql in said:
        assert "COUNT(" not in sql
        assert "DISTINCT" not in sql
        assert not re.search(r'"(initial_context|context|plan|effects|error_message)"', sql)
        assert "LIMIT" in sql


def listed(html: str) -> list[uuid.UUID]:
    """The executions of a page, in its order."""
    return [uuid.UUID(id) for id in re.findall(r"/sagaexecution/([0-9a-f-]{36})/change/", html)]


def turn(html: str, rel: str) -> str:
    """The query of the next page, or of the one before; empty where there is none."""
    found = re.search(rf'<a href="([^"]*)" rel="{rel}">', html)
    return unescape(found[1]) if found else ""


def test_pages_neither_repeat_nor_leave_out_what_began_at_the_same_time(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There and back, with a filter, and with what comes and goes meanwhile."""
    monkeypatch.setattr(MODEL_ADMIN, "list_per_page", 2)
    made = [failed_trip() for _ in range(7)]
    for execution in made[1:6]:
        changed(execution, created_at=made[0].created_at)
    html = page(operator, f"{BASE}?status=FAILED")
    seen = listed(html)
    late = failed_trip()
    for _ in range(3):
        html = page(operator, BASE + turn(html, "next"))
        seen += listed(html)
    assert not turn(html, "next")
    assert len(seen) == 7
    assert set(seen) == {execution.pk for execution in made}
    back = listed(html)
    for _ in range(3):
        assert "status=FAILED" in turn(html, "prev")
        html = page(operator, BASE + turn(html, "prev"))
        back = listed(html) + back
    assert back == seen
    newest = page(operator, BASE + turn(html, "prev"))
    assert listed(newest) == [late.pk, seen[0]]
    assert not turn(newest, "prev")


def test_a_page_of_which_nothing_is_left_leads_to_the_newest(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODEL_ADMIN, "list_per_page", 1)
    made = [failed_trip() for _ in range(2)]
    last = turn(page(operator, BASE), "next")
    newer = turn(page(operator, BASE + last), "prev")
    SagaExecution.objects.filter(pk=made[0].pk).delete()
    assert shown(operator, last) == {made[1].pk}
    changed(made[1], settled_at=made[1].finished_at)
    assert shown(operator, newer) == set()
    assert "Nothing needs attention" in page(operator, BASE + newer)


NOBODY = str(uuid.UUID(int=7))
KEYS = [
    *("", "x", "0", "-1", ",", ",,", "\0", "2026-11-26,", f",{NOBODY}", f"2026-11-26,{NOBODY}"),
    *(f"{at},{NOBODY}" for at in ("infinity", "-infinity", "\0", "now", "9" * 5000, "NaN")),
    *(f"{at}-01-01T00:00:00+00:00,{NOBODY}" for at in ("0001", "9999", "20000", "\u0662000")),
    *(f"{at}{NOBODY}" for at in ("0001-01-01T00:00:00+14:00,", "9999-12-31T23:59:59-14:00,")),
    *(f"2026-11-26T12:00:00{zone},{NOBODY}" for zone in ("", "+99:99", "+23:59:59.999999")),
    *(f"2026-11-26T12:00:00+00:00,{id}" for id in ("", "x", "\0", "9" * 5000, f"{NOBODY},x")),
]


@pytest.mark.parametrize("way", ["before", "after"])
@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_a_key_that_is_none_leads_to_the_newest(way: str, key: str, operator: Client) -> None:
    execution = failed_trip()
    assert shown(operator, f"?{way}={quote(key)}") == {execution.pk}


def test_what_is_done_to_all_that_match_is_done_on_every_page(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODEL_ADMIN, "list_per_page", 1)
    failed_trip(), failed_trip()
    html = page(operator, BASE + turn(page(operator, BASE), "next"))
    ways = re.findall(rf'href="({BASE}(?:retry|export)/[^"]*)"', html)
    assert len(ways) == 2
    assert not [way for way in ways if "before" in way]


@pytest.mark.parametrize("query", ["?o=1", "?o=-3.2", "?all=", "?status=NONSENSE", "?saga=%00"])
def test_a_query_made_by_hand_does_no_harm(query: str, operator: Client) -> None:
    failed_trip()
    assert operator.get(BASE + query, follow=True).status_code in (200, 400)


# One


@pytest.mark.parametrize("name", MAKERS)
def test_the_page_says_what_happened_and_what_is_next(name: str, operator: Client) -> None:
    execution = MAKERS[name]()
    lead = re.sub(r"\s+", " ", page(operator, one(execution)).split('class="saga-lead"')[1])
    lead = lead.split("</section>")[0]
    expected = {
        "completed": ("All its 3 steps are done", "nothing to do"),
        "failed": ("Pay failed, and all that was done is undone", "A retry starts it anew"),
        "stuck": ("The compensation of Pack failed", "tries again to undo Pack"),
        "driven": ("web-2:4711 is in act of Pack, attempt 1", "nothing to do"),
        "lost": ("web-2:4711 was lost in act of Pack", "same idempotency key"),
        "due": ("has not begun", "recover it to do that now"),
        "waiting": ("has not begun", "goes on by itself in"),
    }[name]
    for text in expected:
        assert text in lead


FATES = {
    "completed": ["done", "done", "done"],
    "failed": ["undone", "failed, without effect", "not begun"],
    "stuck": ["stands: its compensation failed", "undone", "failed, without effect"],
    "driven": ["in act", "to come", "to come"],
    "lost": ["its driver was lost: not known", "to come", "to come"],
    "due": ["next", "to come", "to come"],
    "waiting": ["next", "to come", "to come"],
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_plan_tells_each_steps_fate(name: str, operator: Client) -> None:
    html = page(operator, one(MAKERS[name]()))
    plan = html.split("<h2>Plan</h2>")[1].split("</section>")[0]
    rows = re.findall(r'<th scope="row">(\w+).*?saga-badge[^>]*>([^<]*)<', plan, re.DOTALL)
    assert rows == list(zip(["Pack", "Pay", "Leave"], FATES[name], strict=True))


def test_the_history_tells_attempts_errors_and_a_folded_traceback(operator: Client) -> None:
    html = page(operator, one(stuck_trip()))
    history = html.split('id="history"')[1].split("</section>")[0]
    rows = re.findall(
        r"<td>(\w+)</td>\s*<td[^>]*>. (\w+)</td>\s*<td[^>]*>(\d)</td>\s*<td><span[^>]*>(\w+)<",
        history,
    )
    assert rows == [
        ("Pack", "act", "1", "done"),
        ("Pay", "act", "1", "done"),
        ("Leave", "act", "1", "failed"),
        ("Pay", "compensate", "1", "done"),
        ("Pack", "compensate", "1", "failed"),
    ]
    assert history.count("<summary") == 2
    assert "bag lost" in history
    assert "Traceback (most recent call last)" in history
    assert "Compensation of Pack:" in html
    assert " s</td>" in history


def test_a_long_history_is_shown_in_parts(operator: Client) -> None:
    execution = completed_trip()
    record = execution.records.first()
    for number in range(120):
        record.pk, record.attempt = None, number + 2
        record.save()
    html = page(operator, one(execution))
    seen = []
    while True:
        numbers = re.findall(r"</td>\s*<td[^>]*>(\d+)</td>\s*<td><span", html)
        assert 0 < len(numbers) <= 50
        seen = numbers + seen
        earlier = re.search(r'href="\?before=(\d+)', html)
        if earlier is None:
            break
        html = page(operator, f"{one(execution)}?before={earlier[1]}")
    assert [int(n) for n in seen] == [1, 1, 1, *range(2, 122)]
    assert page(operator, f"{one(execution)}?before=x'--")


def test_the_context_is_readable_and_the_original_beside_it(operator: Client) -> None:
    html = page(operator, one(completed_trip(traveller="Grace")))
    assert "  &quot;traveller&quot;: &quot;Grace&quot;," in html
    assert html.count("&quot;seen&quot;: [") == 2


def test_a_context_that_is_no_json_is_shown_as_it_is(operator: Client) -> None:
    execution = changed(failed_trip(), context="{broken", initial_context="x" * 200_000)
    html = page(operator, one(execution))
    assert "{broken" in html
    assert "Cut after 100000 characters" in html


def test_lease_driver_and_token_are_told(operator: Client) -> None:
    html = page(operator, one(driven_trip()))
    facts = html.split("Lease and driver")[1]
    assert "web-2:4711" in facts
    assert re.search(r"lease until</dt><dd>20\d\d-\d\d-\d\d .*in 59 m", facts)
    assert re.search(r"fencing token</dt><dd>1", facts)


def test_retries_are_linked_both_ways(operator: Client) -> None:
    failed = failed_trip()
    act(operator, one(failed, "retry"))
    new = SagaExecution.objects.get(retry_of=failed)
    assert one(new) in page(operator, one(failed))
    assert "It was retried" in page(operator, one(failed))
    assert one(failed) in page(operator, one(new))


def test_text_from_outside_never_becomes_markup(operator: Client) -> None:
    """In the list, the page, the confirmation and the messages."""
    execution = stuck_trip(traveller=HOSTILE)
    context = json.dumps({"traveller": HOSTILE})
    columns = ("error_type", "error_message", "stuck_reason", "driver", "saga", "failed_step")
    effects = [[HOSTILE[:90], "DONE", "FAILED"]]
    changed(execution, context=context, **dict.fromkeys(columns, HOSTILE))
    changed(execution, plan=[[HOSTILE[:90]]], step=HOSTILE[:90], effects=effects)
    for name in ("error_type", "error_message", "traceback", "driver", "step"):
        SagaStepRecord.objects.update(**{name: HOSTILE[:90]})
    WORLD.trouble = {"compensate Pack": HOSTILE}
    addresses = ["", "?status=all", f"?q={quote(HOSTILE)}", f"?saga={quote(HOSTILE)}"]
    addresses += ["retry/", f"?error={quote(HOSTILE)}"]
    addresses += [f"{execution.pk}/{view}/" for view in ("change", "retry", "recover", "history")]
    pages = [page(operator, BASE + address) for address in addresses]
    data = confirm(operator, one(execution, "retry"))
    pages.append(operator.post(one(execution, "retry"), data, follow=True).content.decode())
    for html in pages:
        assert "<script>alert" not in html
        assert "<b>" not in html
        assert '" onload' not in html
    assert "&lt;script&gt;" in pages[6]


def test_an_execution_that_is_not_there_is_not_found(operator: Client) -> None:
    for id in (uuid.uuid4(), "nonsense", "1"):
        for view in ("change", "retry", "recover"):
            assert operator.get(f"{BASE}{id}/{view}/").status_code in (302, 404)


def test_pages_are_stored_nowhere_and_hold_nothing_that_a_strict_policy_refuses(
    operator: Client,
) -> None:
    execution = stuck_trip()
    for address in ("", f"{execution.pk}/change/", f"{execution.pk}/retry/", "retry/"):
        response = operator.get(BASE + address)
        html = response.content.decode()
        assert "no-store" in response["Cache-Control"]
        assert response["Content-Security-Policy"] == "default-src 'self'"
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|javascript:", html)
        assert "django_saga/admin.css" in html


def test_the_page_costs_a_few_queries_however_long_its_story(operator: Client) -> None:
    short, long = failed_trip(), stuck_trip()
    numbers = []
    for execution in (short, long):
        with CaptureQueriesContext(connection) as queries:
            page(operator, one(execution))
        numbers.append(len(queries))
    assert max(numbers) <= 12, numbers


# Acting


def test_nothing_is_done_before_it_is_confirmed(operator: Client) -> None:
    failed, stuck = failed_trip(), stuck_trip()
    before = list(SagaExecution.objects.order_by("pk").values())
    selection = {"action": "retry_selected", "index": "0", "_selected_action": [str(failed.pk)]}
    operator.post(BASE, selection)
    page(operator, f"{BASE}retry/")
    assert operator.post(f"{BASE}retry/").status_code == 400
    data = {"scope": "matching", "seen": "x", "token": "x"}
    assert operator.post(f"{BASE}retry/", data).status_code == 400
    for address in (one(failed, "retry"), one(stuck, "retry")):
        page(operator, address)
        for posted in ({}, data):
            html = operator.post(address, posted).content.decode()
            assert "This takes a confirmation first" in html
    assert list(SagaExecution.objects.order_by("pk").values()) == before
    assert not LogEntry.objects.exists()


def test_the_confirmation_says_how_many_and_what_will_happen(operator: Client) -> None:
    for make in (failed_trip, failed_trip, stuck_trip, completed_trip, driven_trip):
        make()
    text = re.sub(r"<[^>]*>|\s+", " ", page(operator, f"{BASE}retry/?status=all"))
    text = re.sub(r"\s+", " ", text)
    for said in (
        "2 start anew with the original context",
        "1 tries the compensation again",
        "1 is completed",
        "1 has not ended",
    ):
        assert said in text
    assert "All 3" in text
    assert "It tries to undo Pack" in page(operator, one(stuck_trip(), "retry"))


def test_retrying_one_leads_to_the_new_execution(operator: Client) -> None:
    failed = failed_trip()
    data = confirm(operator, one(failed, "retry"))
    response = operator.post(one(failed, "retry"), data)
    new = SagaExecution.objects.get(retry_of=failed)
    assert response["Location"] == one(new)
    assert new.status == "COMPLETED"


def test_a_double_click_retries_once(operator: Client) -> None:
    """What is stuck would end failed, and start anew with the second click."""
    failed, stuck = failed_trip(), stuck_trip()
    for execution in (failed, stuck):
        address = one(execution, "retry")
        data = confirm(operator, address)
        assert len(told(operator, address, data)) == 1
        html = operator.post(address, data).content.decode()
        assert "changed meanwhile" in html or "has been retried already" in html
    assert counts() == {"COMPLETED": 1, "FAILED": 2}
    assert WORLD.calls == ["act Pack", "act Pay", "act Leave", "compensate Pack"]


def test_recovering_one_drives_it(operator: Client) -> None:
    lost = lost_trip()
    messages = act(operator, one(lost, "recover"))
    assert messages == ["Recover now: done. It is completed now."]
    assert changed(lost).status == "COMPLETED"


def test_each_deed_is_in_the_admins_log_and_on_the_page(operator: Client) -> None:
    failed, stuck, lost = failed_trip(), stuck_trip(), lost_trip()
    act(operator, one(failed, "retry"))
    act(operator, one(stuck, "retry"))
    act(operator, one(lost, "recover"))
    new = SagaExecution.objects.get(retry_of=failed)
    entries = {entry.object_id: entry for entry in LogEntry.objects.all()}
    assert len(LogEntry.objects.all()) == 3
    assert entries[str(failed.pk)].change_message == f"Retry: started anew as {new.pk}."
    assert "failed" in entries[str(stuck.pk)].change_message
    assert "completed" in entries[str(lost.pk)].change_message
    assert {entry.user.username for entry in entries.values()} == {"root"}
    for execution, deed in ((failed, "Retry"), (stuck, "Retry"), (lost, "Recover now")):
        assert f"<strong>root</strong>: {deed} " in page(operator, one(execution))


def test_it_works_under_atomic_requests(operator: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    failed, stuck, lost = failed_trip(), stuck_trip(), lost_trip()
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    operator.post(f"{BASE}retry/", {**confirm(operator, f"{BASE}retry/"), **MANY})
    assert act(operator, one(lost, "recover")) == ["Recover now: done. It is completed now."]
    assert SagaExecution.objects.get(retry_of=failed).status == "COMPLETED"
    assert changed(stuck).status == "FAILED"


# RQ


def test_the_page_leads_to_the_job_while_redis_holds_one(
    operator: Client, settings: Settings
) -> None:
    execution = due_trip()
    assert one(execution, "job") not in page(operator, one(execution))
    assert operator.get(one(execution, "job")).status_code == 404
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "sagas"}
    assert one(execution, "job") in page(operator, one(execution))
    assert "No job of this execution was found" in told_by(operator, one(execution, "job"))
    messages = act(operator, one(execution, "recover"))
    assert messages == ["Recover now: done. It is pending now."]
    response = operator.get(one(execution, "job"))
    assert re.search(rf"/queues/\d+/saga-{execution.pk}-\w+/$", response["Location"])
    assert str(execution.pk) in page(operator, response["Location"])
    assert staff().get(one(execution, "job")).status_code == 403


def test_a_redis_that_is_away_is_told(operator: Client, settings: Settings) -> None:
    execution = due_trip()
    settings.RQ_QUEUES = {"sagas": {"URL": "redis://127.0.0.1:1/0"}}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "sagas"}
    assert "Redis does not answer" in told_by(operator, one(execution, "job"))
    address = one(execution, "recover")
    html = operator.post(address, confirm(operator, address)).content.decode()
    assert "could not be handed to the backend" in html


def told_by(client: Client, address: str) -> str:
    response = client.get(address, follow=True)
    return " ".join(str(message) for message in response.context["messages"])


def test_the_urls_have_names() -> None:
    """By which others can link to them."""
    id = uuid.uuid4()
    name = "admin:django_saga_sagaexecution"
    assert reverse(f"{name}_change", args=[id]) == f"{BASE}{id}/change/"
    assert reverse(f"{name}_retry", args=[id]) == f"{BASE}{id}/retry/"
    assert reverse(f"{name}_recover_many") == f"{BASE}recover/"


def drawn(html: str, css: str) -> list[str]:
    """What the drawings' parts of this class are entitled."""
    return re.findall(rf'<g class="[^"]*{css}[^"]*"><title>([^<]*)</title>', html)


def test_the_plan_and_the_history_are_drawn(operator: Client) -> None:
    html = page(operator, one(stuck_trip()))
    assert drawn(html, "saga-box saga-mark-stands") == ["1. Pack: stands: its compensation failed"]
    assert drawn(html, "saga-box saga-mark-undone") == ["2. Pay: undone"]
    assert drawn(html, "saga-box saga-mark-failed") == ["3. Leave: failed, without effect"]
    failed = drawn(html, "saga-bar saga-mark-failed")
    assert [text.split(", after")[0] for text in failed] == 2 * [  # wide and narrow
        "Leave, → act, attempt 1: failed",
        "Pack, ← compensate, attempt 1: failed",
    ]


@pytest.mark.parametrize(("make", "mark"), [(driven_trip, "running"), (lost_trip, "lost")])
def test_an_attempt_in_flight_is_drawn_up_to_now(make: Any, mark: str, operator: Client) -> None:
    html = page(operator, one(make()))
    assert len(drawn(html, f"saga-box saga-mark-{mark}")) == 1
    arrows = drawn(html, f"saga-bar saga-mark-{mark}")
    assert len(arrows) == 2
    assert all(text.startswith("Pack, → act, attempt 1: in flight") for text in arrows)
    assert "saga-lanes" not in page(operator, one(pending_trip()))


def test_the_mermaid_text_is_there_while_the_code_defines_the_saga(operator: Client) -> None:
    execution = completed_trip()
    assert "flowchart TD" in page(operator, one(execution))
    gone = changed(execution, saga="tests.Gone")
    assert "flowchart TD" not in page(operator, one(gone))
