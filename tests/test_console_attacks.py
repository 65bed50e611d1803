"""What somebody with some permissions tries at the console, and what is not to come of it."""

from __future__ import annotations

import io
import json
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client
from django.utils import timezone

from django_saga import alerts, batches, operations
from django_saga.exceptions import SagaError
from django_saga.models import (
    SagaAuditEntry,
    SagaBatch,
    SagaBatchItem,
    SagaExecution,
    SagaFailureGroup,
    SagaPause,
)
from django_saga.operations import RETRY
from tests.operated import (
    TripSaga,
    changed,
    completed_trip,
    failed_trip,
    guarded_trip,
    pending_trip,
    run_trip,
    stuck_trip,
)
from tests.tables import MODELS

pytestmark = pytest.mark.usefixtures("alone")

BASE = "/admin/django_saga/"
EXECUTIONS = f"{BASE}sagaexecution/"
SECRET = "password=hunter2-correct-horse"


@pytest.fixture
def operator() -> Client:
    """A superuser's browser."""
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


def user(*permissions: str) -> User:
    """A staff user with these permissions, by codename or for executions."""
    who = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    names = [p if "_saga" in p else f"{p}_sagaexecution" for p in permissions]
    who.user_permissions.set(Permission.objects.filter(codename__in=names))
    return User.objects.get(pk=who.pk)


def log_in(who: User) -> Client:
    client = Client()
    client.force_login(who)
    return client


def shown(*arguments: Any) -> str:
    """What the command writes."""
    out = io.StringIO()
    call_command("sagas", *map(str, arguments), stdout=out)
    return out.getvalue()


def batch_of(*executions: SagaExecution, reason: str = "again") -> SagaBatch:
    rows = SagaExecution.objects.filter(pk__in=[each.pk for each in executions])
    return batches.create(RETRY, rows, user=None, reason=reason, title="some")


def steer(client: Client, batch: SagaBatch, do: str, reason: str) -> int:
    batch.refresh_from_db()
    data = {"do": do, "reason": reason, "seen": f"{batch.status} {batch.allowed}"}
    return client.post(f"{BASE}sagabatch/{batch.pk}/steer/", data).status_code


def many(client: Client, query: str, **data: Any) -> Any:
    """Ask for a retry of all that match."""
    form = {"scope": "matching", "seen": timezone.now().isoformat(), "reason": "why not"}
    form |= {"rate": "5", "allowed": "all"}
    return client.post(f"{EXECUTIONS}retry/?{query}", form | data)


# Contexts are for those who may see them


def edited() -> SagaExecution:
    """One whose context an operator has edited."""
    trip = guarded_trip()
    context = json.dumps(json.loads(trip.context) | {"traveller": "Grace Hopper"})
    operations.edit_context(trip.pk, context, reason="a slip")
    return trip


@pytest.mark.parametrize("sees", [False, True])
def test_the_command_tells_what_changed_in_a_context_only_to_who_may_see_it(sees: bool) -> None:
    trip = edited()
    who = user("view", "view_sagaauditentry", *(["view_context"] if sees else []))
    for words in (("show", trip.pk), ("audit", trip.pk), ("audit",)):
        document = shown(*words, "--json", "--user", who.username)
        assert ("Grace Hopper" in document) is sees, words
        assert ("Pack" in str(json.loads(document).get("history"))) or words[0] == "audit"


def test_the_commands_history_holds_no_changes_for_who_may_not_see_contexts() -> None:
    trip = stuck_trip()
    blind, seeing = user("view"), user("view", "view_context")
    told = [shown("show", trip.pk, "--json", "--user", u.username) for u in (blind, seeing)]
    changes = [[r["changes"] for r in json.loads(text)["history"]] for text in told]
    assert not any(changes[0])
    assert any(changes[1])


@pytest.mark.parametrize("sees", [False, True])
def test_the_audits_pages_tell_what_changed_in_a_context_only_to_who_may_see_it(sees: bool) -> None:
    edited()
    client = log_in(user("view_sagaauditentry", *(["view_context"] if sees else [])))
    entry = SagaAuditEntry.objects.get(verb="edit_context")
    for address in ("", f"{entry.pk}/change/"):
        text = client.get(f"{BASE}sagaauditentry/{address}").content.decode()
        assert "a slip" in text
        assert ("Grace Hopper" in text) is sees, address


@pytest.mark.parametrize(
    "query",
    ["context__contains=Ada", "initial_context__startswith=x", "records__traceback__contains=x"],
)
def test_no_address_asks_what_is_in_a_context(query: str) -> None:
    failed_trip()
    client = log_in(user("view", "retry", "export"))
    assert client.get(f"{EXECUTIONS}?{query}").status_code == 400
    assert client.get(f"{EXECUTIONS}export/?{query}").status_code == 400
    assert many(client, query).status_code == 400


def test_no_address_asks_what_is_in_the_details_of_the_audit() -> None:
    edited()
    client = log_in(user("view_sagaauditentry"))
    address = f"{BASE}sagaauditentry/"
    assert client.get(f"{address}?detail__contains=Grace").status_code == 400
    assert client.get(f"{address}?result__exact=done").status_code == 200


# What is hidden from a user


def test_the_way_to_the_job_of_a_hidden_execution_is_not_shown(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    trip = pending_trip()
    model_admin = admin.site.get_model_admin(SagaExecution)
    monkeypatch.setattr("django_saga.admin.executions.has_jobs", lambda: True)
    monkeypatch.setattr("django_saga.admin.executions.find_job", lambda saga_id: "/job/")
    address = f"{EXECUTIONS}{trip.pk}/job/"
    assert operator.get(address)["Location"] == "/job/"
    nothing = SagaExecution.objects.none()
    monkeypatch.setattr(model_admin, "get_queryset", lambda request: nothing)
    assert operator.get(address).status_code == 404


# Filters that mean nothing


@pytest.mark.parametrize("query", ["status=Failed", "status=open", "status=%00"])
def test_a_status_that_there_is_not_chooses_nothing(query: str, operator: Client) -> None:
    failed_trip()
    assert "No execution matches" in operator.get(f"{EXECUTIONS}?{query}").content.decode()
    assert many(operator, query).status_code == 200
    assert not SagaBatch.objects.exists()


def test_a_search_that_the_list_refuses_shows_what_needs_attention(operator: Client) -> None:
    failed_trip()
    completed_trip()
    changed(failed_trip(), settled_at=timezone.now())
    page = operator.get(f"{EXECUTIONS}?q=%00")
    assert len(page.context["cl"].result_list) == 1


@pytest.mark.parametrize("name", ["saga", "step", "error", "group"])
def test_a_filter_with_a_nul_is_answered_on_a_post_too(name: str, operator: Client) -> None:
    failed_trip()
    assert many(operator, f"{name}=%00&status=all").status_code == 200
    assert not SagaBatch.objects.exists()


# Reasons


def test_a_secret_in_a_batchs_reason_is_masked_before_it_is_stored(operator: Client) -> None:
    batch = batch_of(failed_trip(), failed_trip(), reason=f"it works with {SECRET}")
    for do in ("pause", "resume", "stop"):
        assert steer(operator, batch, do, f"as {SECRET}") == 302
    text = operator.get(f"{BASE}sagabatch/{batch.pk}/change/").content.decode()
    stored = [str(row) for model in MODELS for row in model._base_manager.values()]
    assert "hunter2" not in text
    assert not [row for row in stored if "hunter2" in row]
    assert SagaBatch.objects.get().status == "stopped"


def test_a_secret_in_a_pauses_reason_is_not_logged_by_the_admin(operator: Client) -> None:
    what = json.dumps([TripSaga.name, ""])
    operator.post(f"{BASE}sagapause/pause/", {"what": what, "reason": SECRET})
    pause = SagaPause.objects.get()
    operator.post(f"{BASE}sagapause/{pause.pk}/resume/", {"reason": SECRET})
    stored = [str(row) for model in MODELS for row in model._base_manager.values()]
    assert LogEntry.objects.count() == 2
    assert not [row for row in stored if "hunter2" in row]


@pytest.mark.parametrize("do", ["pause", "stop"])
def test_a_nul_in_the_reason_of_a_button_is_stored_as_text(do: str, operator: Client) -> None:
    batch = batch_of(failed_trip(), failed_trip())
    assert steer(operator, batch, do, "a\0b") == 302
    assert SagaBatch.objects.get().status in ("paused", "stopped")


# Users


def test_a_user_whose_key_cannot_be_kept_makes_no_batch() -> None:
    failed_trip()
    rows = SagaExecution.objects.all()
    for key in (0, "x" * 65):
        who = User(pk=key, username="odd", is_superuser=True)
        with pytest.raises(SagaError, match="user of the database"):
            batches.create(RETRY, rows, user=who, reason="why", title="some")
    assert not SagaBatch.objects.exists()


@pytest.mark.parametrize("text", ["no\0", "no \ud800", SECRET])
def test_a_hook_that_raises_anything_ends_no_batch(
    text: str, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(*args: Any) -> bool:
        raise RuntimeError(text)

    settings.DJANGO_SAGA = {**settings.DJANGO_SAGA, "AUTHORIZE": hook}
    failed = [failed_trip(), failed_trip()]
    rows = SagaExecution.objects.filter(pk__in=[each.pk for each in failed])
    who = user("view", "retry")
    batch = batches.create(RETRY, rows, user=who, reason="why", title="some", allowed=None, rate=99)
    batches.work(batch.pk, seconds=30)
    batch.refresh_from_db()
    assert batch.status == "finished"
    assert [item.state for item in SagaBatchItem.objects.all()] == ["skipped", "skipped"]
    stored = " ".join(SagaBatchItem.objects.values_list("why", flat=True))
    assert "RuntimeError" in stored
    assert "hunter2" not in stored + caplog.text


@pytest.mark.parametrize("seen", ["9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00"])
def test_a_confirmation_at_the_end_of_time_is_none(seen: str, operator: Client) -> None:
    failed_trip()
    assert many(operator, "", seen=seen).status_code == 400


@pytest.mark.parametrize(
    "context",
    [
        "[" * 100_000,
        "[" * 5_000 + "]" * 5_000,
        '{"traveller": NaN, "password": "a b\\"c"}',
        "{",
        "1e999",
    ],
)
def test_a_context_that_nobody_can_read_has_a_page_all_the_same(
    context: str, operator: Client
) -> None:
    trip = changed(guarded_trip(), context=context, initial_context=context)
    page = f"{EXECUTIONS}{trip.pk}/"
    assert operator.get(f"{page}change/").status_code == 200
    assert operator.get(f"{page}edit_context/").status_code == 200
    assert operator.post(f"{page}context/").status_code == 200
    assert str(trip.pk) in shown("show", trip.pk, "--context", "--json")


# Arguments that are no text


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--saga", "\udcff"],
        ["list", "--step", "\0"],
        ["groups", "--user", "\udcff"],
        ["retry", "--group", "\udcff"],
        ["pause", "\udcff"],
        ["resume", TripSaga.name, "\udcff"],
        ["mark-done", str(uuid.uuid4()), "\udcff", "--reason", "r"],
    ],
)
def test_a_word_that_is_no_text_is_wrong_usage(words: list[str]) -> None:
    with pytest.raises(CommandError, match="no text"):
        shown(*words)


# Two operators


def group_page(client: Client, group: SagaFailureGroup) -> tuple[str, dict[str, str]]:
    """The address, and what a browser would post without a change."""
    address = f"{BASE}sagafailuregroup/{group.pk}/change/"
    form = client.get(address).context["form"]
    note = str(form["note"].value() or "")
    return address, {"note": note, "initial-note": note, "mute": ""}


def test_who_mutes_a_group_leaves_the_note_that_somebody_wrote_meanwhile(operator: Client) -> None:
    failed_trip()
    group = SagaFailureGroup.objects.get()
    address, form = group_page(operator, group)
    assert 'name="initial-note"' in operator.get(address).content.decode()
    operations.note(group.pk, "The bank knows.\nIt calls back.")
    operator.post(address, form | {"mute": "4"})
    group.refresh_from_db()
    assert group.note == "The bank knows.\nIt calls back."
    assert group.muted_until


def test_a_note_is_not_written_over_one_that_nobody_has_seen(operator: Client) -> None:
    failed_trip()
    group = SagaFailureGroup.objects.get()
    address, form = group_page(operator, group)
    operations.note(group.pk, "The bank knows.")
    text = operator.post(address, form | {"note": "Who knows?"}).content.decode()
    group.refresh_from_db()
    assert group.note == "The bank knows."
    assert "Who knows?" in text
    assert "meanwhile" in text
    address, form = group_page(operator, group)
    operator.post(address, form | {"note": "Both know."})
    group.refresh_from_db()
    assert group.note == "Both know."


# Log lines


def test_an_alert_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    run_trip(act_Leave="fog", compensate_Pack="lost\r\nERROR forged by\x85whom\u2028ever")
    with caplog.at_level(logging.WARNING, "django_saga.alerts"):
        alerts.look()
    said = [r.getMessage() for r in caplog.records if r.name == "django_saga.alerts"]
    assert ["forged" in line for line in said] == [True]
    assert len(said[0].splitlines()) == 1


# Rows that nobody can read


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "20000-01-01"])
def test_one_row_with_an_impossible_time_hides_no_others(moment: str, operator: Client) -> None:
    good, spoilt = pending_trip(), pending_trip()
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE django_saga_sagaexecution SET wake_at = %s WHERE id = %s",
            [moment, spoilt.pk],
        )
    addresses = ["", "retry/?status=all", "?status=PENDING", "?status=all", f"{spoilt.pk}/change/"]
    found = {a: operator.get(f"{EXECUTIONS}{a}") for a in addresses}
    assert {a: r.status_code for a, r in found.items()} == dict.fromkeys(addresses, 200)
    assert str(good.pk) in found["?status=all"].content.decode()
    assert operator.get(BASE).status_code == 200
    assert operator.get(f"{EXECUTIONS}{spoilt.pk}/cancel/").status_code == 302
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE django_saga_sagaexecution SET wake_at = NULL, settled_at = %s WHERE id = %s",
            [moment, spoilt.pk],
        )
    export = operator.post(f"{EXECUTIONS}export/?status=all", {"format": "json"})
    ids = [each["id"] for each in json.loads(export.getvalue())["executions"]]
    assert ids == [str(good.pk)]


PLACES = [
    *("sagaexecution.created_at", "sagaexecution.finished_at", "sagasteprecord.created_at"),
    *("sagafailuregroup.first_seen", "sagafailuregroup.muted_until", "sagapause.created_at"),
    *("sagabatch.created_at", "sagaauditentry.at"),
]


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "20000-01-01"])
@pytest.mark.parametrize("place", PLACES)
def test_no_page_fails_of_a_row_with_an_impossible_time(
    place: str, moment: str, operator: Client
) -> None:
    """It is left out, and the page says so where it had to read the time."""
    good, _, spoilt = stuck_trip(), failed_trip(), failed_trip()
    operations.pause("tests.TripSaga")
    of_group = f"sagafailuregroup/{spoilt.failure_group}/change/"
    of_batch = f"sagabatch/{batch_of(good).pk}/change/"
    ones = [f"sagaexecution/{each.pk}/change/" for each in (good, spoilt)]
    pages = [
        *("", "sagafailuregroup/", of_group, "sagaexecution/", "sagaexecution/retry/"),
        *("sagapause/", "sagabatch/", of_batch, "sagaauditentry/", *ones),
    ]
    table, column = place.split(".")
    which = f" WHERE id = '{spoilt.pk}'" if table == "sagaexecution" else ""
    query = f"UPDATE django_saga_{table} SET {column} = %s{which}"
    with connection.cursor() as cursor:
        cursor.execute(query, [moment])
    try:
        found = {page: operator.get(BASE + page) for page in pages}
    finally:
        with connection.cursor() as cursor:
            cursor.execute(query, ["2026-01-01"])  # what cannot be read cannot be deleted
    gone = {"sagafailuregroup": of_group, "sagabatch": of_batch}.get(table)
    codes = {page: response.status_code for page, response in found.items()}
    assert codes == {page: 404 if page == gone else 200 for page in pages}
    if place == "sagaexecution.created_at":
        for page in ("", "sagafailuregroup/", "sagaexecution/"):
            html = found[page].content.decode()
            assert "Rows that cannot be read are left out" in html
            assert str(good.pk if page == "sagaexecution/" else good.failure_group) in html


# Text that no database holds

BAD = {"a NUL": "\0", "a lone surrogate": "\ud800"}
DOINGS: dict[str, Callable[[SagaExecution, str], object]] = {
    "note": lambda e, bad: operations.note(e.failure_group, bad),
    "note, of no group": lambda e, bad: operations.note(bad, "x"),
    "mute, of no group": lambda e, bad: operations.mute(bad, 1),
    "pause": lambda e, bad: operations.pause(e.saga, reason=bad),
    "pause, of no saga": lambda e, bad: operations.pause(bad),
    "pause, of no step": lambda e, bad: operations.pause(e.saga, bad),
    "pause, by nobody": lambda e, bad: operations.pause(e.saga, user_name=bad, source=bad),
    "resume, of no saga": lambda e, bad: operations.resume(bad),
    "resume, of no step": lambda e, bad: operations.resume(e.saga, bad),
    "retry": lambda e, bad: operations.retry(e.pk, reason=bad, user_name=bad, source=bad),
    "retry, of no id": lambda e, bad: operations.retry(bad),
    "retry, in no status": lambda e, bad: operations.retry(e.pk, status=bad),
    "mark_done": lambda e, bad: operations.mark_done(e.pk, bad, reason="x"),
    "edit_context": lambda e, bad: operations.edit_context(e.pk, f'"{bad}"', reason="x"),
    "edit_context, of a name": lambda e, bad: operations.edit_context(
        e.pk, json.dumps({"traveller": bad}), reason="x"
    ),
    "resolve": lambda e, bad: operations.resolve(e.pk, [bad], reason=bad),
    "abandon": lambda e, bad: operations.abandon(e.pk, str(e.pk), reason=bad, user_name=bad),
    "cancel": lambda e, bad: operations.cancel(e.pk, reason=bad, user_name=bad),
    "skip": lambda e, bad: operations.skip(e.pk, reason=bad, user_name=bad),
    "view_context": lambda e, bad: operations.view_context(e.pk, user_name=bad, source=bad),
    "batch": lambda e, bad: batches.create(
        RETRY, SagaExecution.objects.all(), user=None, reason=bad, title=bad, source=bad
    ),
    "batch, stopped": lambda e, bad: batches.stop(
        batch_of(e), reason=bad, user_name=bad, source=bad
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("doing", DOINGS)
def test_no_doing_fails_of_text_that_no_database_holds(
    doing: str, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stored as it can be, or refused; and either is audited."""
    monkeypatch.setattr(TripSaga, "context_editable", True)
    for number, execution in enumerate([stuck_trip(), pending_trip()]):
        with suppress(SagaError):
            DOINGS[doing](execution, f"x{BAD[bad]}y")
        assert SagaAuditEntry.objects.count() > number


def test_a_note_is_stored_as_the_database_can() -> None:
    group = operations.note(failed_trip().failure_group, "call\0 the bank")
    group.refresh_from_db()
    assert group.note == "call\\x00 the bank"
