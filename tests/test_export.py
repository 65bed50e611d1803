"""Exports of the list: who may, what is in them, and that nothing in them is ever run."""

from __future__ import annotations

import csv
import io
import json
import re
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext

from django_saga.admin import exporting
from django_saga.admin.exporting import cell
from django_saga.documents import EXECUTION
from django_saga.models import SagaAuditEntry
from tests.operated import changed, completed_trip, failed_trip, stuck_trip

pytestmark = pytest.mark.usefixtures("alone")

LIST = "/admin/django_saga/sagaexecution/"
BASE = f"{LIST}export/"
FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=cmd|' /C calc'!A0", " =1"]
HOSTILE = [
    *FORMULAS,
    *(f"{text}, and more" for text in FORMULAS),
    *(f"text{separator}{text}" for separator in ";\t\r\n" for text in FORMULAS),
    *('"=1+1', '";=1+1', '","=1+1', 'x";=1+1;"', "\u2028=1", "\uff1d1+1", "\uff0b1", "\xa0=1"),
    *("-", "=", "'=1", '=HYPERLINK("http://x","y")', "a,b", '"', "<b>", "\0=1", "\v-1"),
]
STARTS = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"


def user(*permissions: str) -> User:
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    names = [f"{permission}_sagaexecution" for permission in permissions]
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return user


def browser(*permissions: str) -> Client:
    client = Client()
    client.force_login(user(*permissions))
    return client


@pytest.fixture
def exporter() -> Client:
    return browser("view", "export")


def download(client: Client, query: str = "", status: int = 200, **data: str) -> str:
    response = client.post(BASE + query, {"format": "csv", **data})
    assert response.status_code == status
    body = response.getvalue() if response.streaming else response.content
    return body.decode()


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def exported(client: Client, query: str = "", **data: str) -> list[str]:
    return [row["id"] for row in table(download(client, query, **data))]


def trail() -> list[tuple[str, str, str, str]]:
    entries = SagaAuditEntry.objects.order_by("pk")
    return list(entries.values_list("verb", "result", "source", "detail"))


def test_what_matches_the_filters_is_exported_newest_first(exporter: Client) -> None:
    failed, stuck, done = failed_trip(), stuck_trip(), completed_trip()
    assert exported(exporter) == [str(stuck.pk), str(failed.pk)]
    assert exported(exporter, "?status=all") == [str(e.pk) for e in (done, stuck, failed)]
    assert exported(exporter, "?status=FAILED") == [str(failed.pk)]
    assert exported(exporter, f"?q={done.pk}") == [str(done.pk)]
    assert exported(exporter, "?saga=none") == []
    assert exporter.post(f"{BASE}?nonsense=1", {"format": "csv"}).status_code in (302, 400)


def test_csv_and_json_say_the_same(exporter: Client) -> None:
    failed = failed_trip()
    [row] = table(download(exporter))
    [same] = json.loads(download(exporter, format="json"))["executions"]
    assert list(row) == list(same) == list(EXECUTION)
    assert {key: cell(value) for key, value in same.items()} == row
    assert (row["id"], row["status"], row["error_message"]) == (
        str(failed.pk),
        "FAILED",
        "no money",
    )
    assert row["created_at"] == failed.created_at.isoformat()
    assert json.loads(download(exporter, "?saga=none", format="json")) == {"executions": []}


def test_the_list_leads_there_and_the_page_says_how_many(
    exporter: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_trip(), stuck_trip(), completed_trip()
    html = exporter.get(f"{LIST}?status=FAILED&p=1").content.decode()
    link = re.search(rf'href="({BASE}[^"]*)"', html)
    assert link is not None
    assert link[1] == f"{BASE}?status=FAILED"
    html = exporter.get(link[1]).content.decode()
    assert "1 executions match" in html
    assert f'action="{link[1]}"' in html
    monkeypatch.setattr(exporting, "CAP", 2)
    assert "More than 2 executions match" in exporter.get(f"{BASE}?status=all").content.decode()
    assert SagaAuditEntry.objects.count() == 0


PERMISSIONS = [
    # permissions, then the status of: the page, a download, one with contexts
    ((), 403, 403, 403),
    (("export",), 403, 403, 403),
    (("view",), 403, 403, 403),
    (("view", "view_context"), 403, 403, 403),
    (("view", "export"), 200, 200, 403),
    (("view", "export", "view_context"), 200, 200, 200),
]


@pytest.mark.parametrize(("permissions", "page", "plain", "contexts"), PERMISSIONS)
def test_who_may(permissions: tuple[str, ...], page: int, plain: int, contexts: int) -> None:
    failed_trip(traveller="Grace")
    client = browser(*permissions)
    response = client.get(BASE)
    assert response.status_code == page
    assert (b'name="contexts"' in response.content) == (contexts == 200)
    assert (BASE in client.get(LIST).content.decode()) == (page == 200)
    assert "Grace" not in download(client, status=plain)
    assert ("Grace" in download(client, status=contexts, contexts="1")) == (contexts == 200)
    if "view" in permissions:
        results = ["done" if status == 200 else "refused" for status in (plain, contexts)]
        assert [entry[1] for entry in trail()] == results


def test_who_is_not_logged_in_is_asked_to() -> None:
    for response in (Client().get(BASE), Client().post(BASE, {"format": "csv"})):
        assert response["Location"].startswith("/admin/login/")


def test_it_takes_a_csrf_token_and_a_known_format() -> None:
    account = user("view", "export")
    client = Client(enforce_csrf_checks=True)
    client.force_login(account)
    assert client.post(BASE, {"format": "csv"}).status_code == 403
    client = Client()
    client.force_login(account)
    assert client.post(BASE, {"format": "exe"}).status_code == 400
    assert trail() == []


def test_each_export_is_audited_with_its_filters(exporter: Client) -> None:
    download(exporter, "?status=FAILED", format="json")
    assert trail() == [("export", "done", "admin", "As json; filters: status=FAILED")]


def test_it_is_a_file_that_no_browser_shows_or_keeps(exporter: Client) -> None:
    for kind, type in (("csv", "text/csv; charset=utf-8"), ("json", "application/json")):
        response = exporter.post(BASE, {"format": kind})
        assert response["Content-Type"] == type
        name = rf'attachment; filename="saga-executions-\d{{8}}-\d{{6}}\.{kind}"'
        assert re.fullmatch(name, response["Content-Disposition"])
        assert response["X-Content-Type-Options"] == "nosniff"
        assert "no-store" in response["Cache-Control"]


def test_there_are_enough_hostile_texts() -> None:
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_is_a_formula_wherever_cells_are_parted(text: str) -> None:
    line = next(exporting.csv_of([], [cell(text)]))
    for delimiter in ",;\t":
        for row in csv.reader(io.StringIO(line, newline=""), delimiter=delimiter):
            for part in row:
                assert not part.startswith(tuple(STARTS)), part
                assert not part.lstrip().startswith(tuple("=+-@")), part
    for part in re.split("[;\t\r\n\u2028]", cell(text)):
        assert not part.lstrip().startswith(tuple("=+-@")), part


def test_hostile_texts_in_every_column_come_out_as_text(exporter: Client) -> None:
    for text in HOSTILE:
        text = text.replace("\0", "")
        changed(
            failed_trip(),
            **dict.fromkeys(("saga", "step", "driver", "failed_step", "error_type"), text),
            **dict.fromkeys(("error_message", "stuck_reason", "cancel_reason"), text),
        )
    rows = table(download(exporter))
    assert len(rows) == len(HOSTILE)
    cells = [value for row in rows for value in row.values()]
    assert [value for value in cells if value.startswith(tuple(STARTS))] == []
    documents = json.loads(download(exporter, format="json"))["executions"]
    assert {row["error_type"] for row in documents} == {text.replace("\0", "") for text in HOSTILE}


def test_secrets_are_masked_in_texts_and_contexts() -> None:
    client = browser("view", "export", "view_context")
    secret = "hunter22hunter"
    context = json.dumps({"traveller": "Ada", "api_key": secret})
    changed(failed_trip(), context=context, error_message=f"password={secret}")
    for kind in ("csv", "json"):
        text = download(client, format=kind, contexts="1")
        assert "Ada" in text
        assert secret not in text


def test_it_reads_in_chunks_each_row_once_and_no_more_than_the_most(
    exporter: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [failed_trip() for _ in range(7)]
    for execution in made[:4]:  # of the very same instant
        changed(execution, created_at=made[0].created_at - timedelta(hours=1))
    monkeypatch.setattr(exporting, "CHUNK", 2)
    ids = exported(exporter)
    assert (len(ids), set(ids)) == (7, {str(execution.pk) for execution in made})
    with CaptureQueriesContext(connection) as queries:
        monkeypatch.setattr(exporting, "MOST", 3)
        assert exported(exporter) == ids[:3]
    reading = [q["sql"] for q in queries if "initial_context" not in q["sql"]]
    assert not [sql for sql in reading if "sagaexecution" in sql and "LIMIT" not in sql]


def test_it_streams_over_asgi_too() -> None:
    failed_trip(), stuck_trip()
    client, account = AsyncClient(), user("view", "export")
    client.force_login(account)

    async def read() -> bytes:
        response: Any = await client.post(BASE, {"format": "csv"})
        chunks: AsyncIterator[bytes] = aiter(response.streaming_content)
        return b"".join([chunk async for chunk in chunks])

    assert len(table(async_to_sync(read)().decode())) == 2
