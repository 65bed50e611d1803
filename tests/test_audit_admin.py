"""The admin of the audit: it can be read, searched and paged through, and not be changed."""

from __future__ import annotations

import re
import uuid
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from django_saga import SagaError
from django_saga.admin import keyed
from django_saga.admin.audit import SagaAuditEntryAdmin
from django_saga.models import SagaAuditEntry

pytestmark = pytest.mark.usefixtures("alone")

BASE = "/admin/django_saga/sagaauditentry/"
HOSTILE = "<script>alert('&amp;')</script>{{ 7|add:7 }}\" onload=x <b>"


@pytest.fixture
def auditor() -> Client:
    """The browser of who may see the audit, and nothing else."""
    return browser("view_sagaauditentry")


def browser(*permissions: str) -> Client:
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


def entry(**facts: Any) -> SagaAuditEntry:
    given = {"verb": "retry", "result": "done", "source": "admin", "user_name": "ada", **facts}
    return SagaAuditEntry.objects.create(**given)


def page(client: Client, query: str = "", status: int = 200) -> str:
    response = client.get(BASE + query)
    assert response.status_code == status
    return response.content.decode()


def shown(html: str) -> list[int]:
    return [int(pk) for pk in re.findall(rf"{BASE}(\d+)/change/", html)]


def link(html: str, rel: str) -> str:
    found = re.search(rf'<a href="([^"]*)" rel="{rel}">', html)
    return found[1].replace("&amp;", "&") if found else ""


def test_each_page_takes_the_permission(auditor: Client) -> None:
    one = f"{entry().pk}/change/"
    for address in ("", one):
        page(auditor, address)
        page(browser("view_sagaexecution", "retry_sagaexecution"), address, 403)
        assert Client().get(BASE + address).status_code == 302


def test_not_even_a_superuser_changes_anything() -> None:
    kept = entry()
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    before = SagaAuditEntry.objects.values().get()
    assert client.get(f"{BASE}add/").status_code == 403
    assert client.post(f"{BASE}add/", {"verb": "x"}).status_code == 403
    assert client.get(f"{BASE}{kept.pk}/delete/").status_code == 403
    assert client.post(f"{BASE}{kept.pk}/delete/", {"post": "yes"}).status_code == 403
    assert client.post(f"{BASE}{kept.pk}/change/", {"verb": "x"}).status_code == 403
    data = {"action": "delete_selected", "_selected_action": str(kept.pk), "post": "yes"}
    client.post(BASE, data)
    assert SagaAuditEntry.objects.values().get() == before
    with pytest.raises(SagaError):
        kept.delete()


def test_a_page_shows_who_did_what_to_which_and_why(auditor: Client) -> None:
    execution = uuid.uuid4()
    row = entry(execution_id=execution, saga="tests.TripSaga", reason="bank is up again")
    refused = entry(result="refused", detail="It is completed.", user_name="", source="command")
    html = page(auditor)
    assert shown(html) == [refused.pk, row.pk]
    for part in ("ada", "bank is up again", "It is completed.", "refused", "command"):
        assert part in html
    assert f"/admin/django_saga/sagaexecution/{execution}/change/" in html
    assert "bank is up again" in page(auditor, f"{row.pk}/change/")


def test_what_was_done_to_many_leads_to_the_batch(auditor: Client) -> None:
    batch = uuid.uuid4()
    row = entry(verb="create_batch", batch_id=batch)
    link = f'href="/admin/django_saga/sagabatch/{batch}/change/">{batch}</a>'
    for address in ("", f"{row.pk}/change/"):
        assert link in page(auditor, address)


def test_text_from_outside_is_escaped_and_nothing_is_stored_by_the_browser(auditor: Client) -> None:
    texts = {"reason": HOSTILE, "detail": HOSTILE, "saga": HOSTILE, "step": HOSTILE}
    row = entry(**texts, user_name=HOSTILE)
    for address in ("", f"{row.pk}/change/"):
        response = auditor.get(BASE + address)
        html = response.content.decode()
        assert "<script>alert" not in html
        assert "<b>" not in html
        assert "{{ 7|add:7 }}" in html
        assert "no-store" in response["Cache-Control"]
        assert not re.search(r"<style|\bstyle=|<script(?![^>]*\bsrc=)", html)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("?verb=cancel", {"b"}),
        ("?result__exact=refused", {"c"}),
        ("?source=command", {"d"}),
        ("?user_name=grace", {"e"}),
        ("?verb=%00", set()),
        ("?q=grace", {"e"}),
        ("?q={execution}", {"f"}),
        ("?q={batch}", {"g"}),
        ("?q=nobody", set()),
        ("", {"a", "b", "c", "d", "e", "f", "g"}),
    ],
)
def test_filters_and_search(auditor: Client, query: str, names: set[str]) -> None:
    execution, batch = uuid.uuid4(), uuid.uuid4()
    made = {
        "a": entry(),
        "b": entry(verb="cancel"),
        "c": entry(result="refused"),
        "d": entry(source="command"),
        "e": entry(user_name="grace"),
        "f": entry(execution_id=execution),
        "g": entry(batch_id=batch),
    }
    html = page(auditor, query.format(execution=execution, batch=batch))
    assert set(shown(html)) == {made[name].pk for name in names}
    assert f"{len(names)} entries" in html


def test_it_pages_by_key_and_never_twice_over_an_entry(
    auditor: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SagaAuditEntryAdmin, "list_per_page", 2)
    made = [entry().pk for _ in range(5)]
    html = page(auditor, "?verb=retry")
    seen = shown(html)
    entry()  # what comes meanwhile moves no row to another page
    while older := link(html, "next"):
        assert "verb=retry" in older
        html = page(auditor, older)
        seen += shown(html)
    assert seen == made[::-1]
    newer = page(auditor, link(html, "prev"))
    assert shown(newer) == [made[2], made[1]]
    assert link(newer, "next")
    assert "before" not in link(page(auditor, link(newer, "prev")), "prev")
    for odd in ("?before=x", "?after=-1", "?before=" + "9" * 40, "?after=٣"):
        assert shown(page(auditor, odd))


def test_another_filter_begins_at_the_first_page(
    auditor: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SagaAuditEntryAdmin, "list_per_page", 1)
    entry(), entry()
    html = page(auditor, link(page(auditor), "next"))
    choices = re.findall(r'<a href="(\?[^"]*verb=[^"]*)"', html)
    assert choices
    assert not [query for query in choices if "before" in query]


def test_counts_stop_at_a_limit_and_a_page_takes_few_queries(
    auditor: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyed, "CAP", 3)
    for _ in range(3):
        entry()
    assert "3 entries" in page(auditor)
    entry()
    with CaptureQueriesContext(connection) as queries:
        assert "3+ entries" in page(auditor)
    assert len(queries) <= 12
    ours = [query["sql"] for query in queries if "sagaauditentry" in query["sql"]]
    assert [sql for sql in ours if "LIMIT" not in sql] == []
    with CaptureQueriesContext(connection) as queries:
        page(auditor, f"{entry().pk}/change/")
    assert len(queries) <= 12
