"""Acting on many in the admin: from the list to the batch, and the page of one, without scripts."""

from __future__ import annotations

import re
import threading
import uuid
from datetime import timedelta
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db import connection, connections
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from django_saga import batches, heartbeats
from django_saga.admin import preview, progress
from django_saga.backends import InProcessBackend
from django_saga.models import (
    SagaAuditEntry,
    SagaBatch,
    SagaBatchItem,
    SagaExecution,
    SagaFailureGroup,
)
from django_saga.operations import BULK, RETRY
from tests.operated import (
    WORLD,
    changed,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    lost_trip,
    resolved_trip,
    run_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

BASE = "/admin/django_saga/sagaexecution/"
BATCHES = "/admin/django_saga/sagabatch/"
MODEL_ADMIN = admin.site.get_model_admin(SagaExecution)
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
    """The browser of a staff user with these permissions, by codename or for executions."""
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    names = [p if "_" in p else f"{p}_sagaexecution" for p in permissions]
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return log_in(user)


def page(client: Client, address: str, status: int = 200) -> str:
    response = client.get(address)
    assert response.status_code == status, response.content.decode()
    return response.content.decode()


def words(html: str) -> str:
    """What is to be read in it."""
    main = html[html.index('id="content-main"') :].replace("<wbr>", "")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", main))


def hidden(html: str) -> dict[str, Any]:
    """What the page's own form would post by itself."""
    form = html[html.index('<form method="post" action="/admin/django_saga') :]
    fields: dict[str, Any] = {}
    for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form):
        fields.setdefault(name, []).append(value)
    return fields


def confirm(client: Client, address: str, **data: Any) -> dict[str, Any]:
    """Open a confirmation; returns what its form would post, with a reason, for all."""
    html = client.post(address, data).content.decode() if data else page(client, address)
    return {**hidden(html), "reason": "the bank is back", "rate": "100", "allowed": "all"}


def do(client: Client, address: str, **given: Any) -> SagaBatch:
    """Confirm it and post; the batch that it leads to."""
    data = {**confirm(client, address), **given}
    response = client.post(address, data)
    assert response.status_code == 302, response.content.decode()
    assert response["Location"].startswith(BATCHES)
    return SagaBatch.objects.get(pk=response["Location"].split("/")[-3])


def now(batch: SagaBatch) -> SagaBatch:
    return SagaBatch.objects.get(pk=batch.pk)


def items(batch: SagaBatch) -> list[SagaBatchItem]:
    return list(batch.items.order_by("id"))


def steer(client: Client, batch: SagaBatch, what: str, **given: Any) -> list[str]:
    """Press a button on the batch's page; what the operator is told."""
    data = {**hidden(page(client, url(batch))), "do": what, **given}
    response = client.post(f"{BATCHES}{batch.pk}/steer/", data, follow=True)
    return [str(message) for message in response.context["messages"]]


def url(batch: SagaBatch) -> str:
    return f"{BATCHES}{batch.pk}/change/"


def counts() -> dict[str, int]:
    statuses = list(SagaExecution.objects.values_list("status", flat=True))
    return {status: statuses.count(status) for status in sorted(set(statuses))}


def copies(of: SagaExecution, number: int, **columns: Any) -> list[SagaExecution]:
    """So many rows like this one, with ids of their own."""
    made = []
    for _ in range(number):
        row = SagaExecution.objects.get(pk=of.pk)
        row.pk = uuid.uuid4()
        for name, value in columns.items():
            setattr(row, name, value)
        made.append(row)
    return SagaExecution.objects.bulk_create(made)


# The confirmation


def test_the_list_offers_every_verb_for_many_that_the_user_may_do() -> None:
    failed_trip()
    for permissions in ((), ("retry",), ("recover", "cancel"), ("retry", "force")):
        html = page(staff("view", *permissions), BASE)
        offered = set(re.findall(r'<option value="(\w+)_selected">', html))
        linked = set(re.findall(rf'href="{BASE}(\w+)/\?', html))
        expected = {verb.name for verb in BULK.values() if verb.right in permissions}
        assert offered == linked == expected
    assert "Resume forward the selection…" in html
    assert "Resume forward all that match…" in html


def test_it_says_what_will_run_on_how_many_and_which_are_left_alone(operator: Client) -> None:
    for make in (failed_trip, failed_trip, stuck_trip, completed_trip, driven_trip):
        make()
    html = page(operator, f"{BASE}retry/?status=all")
    said = words(html)
    for text in (
        "status: all",
        "2 start anew with the original context",
        "1 tries the compensation again",
        "1 is completed",
        "1 has not ended",
        "2 tests.TripSaga Pay Sorry A new execution: act of its first step, with a key of its own.",
        "1 tests.TripSaga Pack Sorry Compensation of what stands, in reverse order, with the same",
        "All 3",
    ):
        assert text in said
    assert "1 start" not in said
    assert "<h1>Retry: 3 executions</h1>" in html
    assert 'name="reason"' in html
    assert "5" in re.findall(r'name="rate" value="([^"]*)"', html)


@pytest.mark.parametrize("verb", ["recover", "cancel"])
def test_nobody_is_sent_to_retry_what_may_not_be_retried(verb: str, operator: Client) -> None:
    resolved_trip()
    said = words(page(operator, f"{BASE}{verb}/?status=all"))
    assert "1 is stuck" in said
    assert "retry" not in said


@pytest.mark.parametrize(
    ("verb", "make", "text"),
    [
        ("recover", lost_trip, "act of Pack goes on, with the same key"),
        ("cancel", driven_trip, "It turns back when the step in hand has ended"),
        ("cancel", due_trip, "Compensation of what is done, in reverse order"),
        ("resume_forward", lambda: changed(stuck_trip(), action="act"), "act of Pack once more"),
    ],
)
def test_each_verb_says_what_it_does(verb: str, make: Any, text: str, operator: Client) -> None:
    make()
    assert text in words(page(operator, f"{BASE}{verb}/?status=all"))


def test_counts_end_at_a_limit_and_say_so(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        failed_trip()
    monkeypatch.setattr(preview, "CAP", 2)
    said = words(page(operator, f"{BASE}retry/"))
    assert "2+ start anew" in said
    assert "All 2+" in said
    monkeypatch.setattr(preview, "CAP", 3)
    assert "All 3 No" in words(page(operator, f"{BASE}retry/"))


def test_what_can_be_done_is_found_among_any_number_that_cannot(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_trip()
    for _ in range(3):
        completed_trip()
    monkeypatch.setattr(preview, "CAP", 2)
    said = words(page(operator, f"{BASE}retry/?status=all"))
    assert "1 starts anew" in said
    assert "2+ are completed" in said


def test_filters_are_told_in_words(operator: Client) -> None:
    failed = failed_trip()
    said = words(page(operator, f"{BASE}retry/?status=FAILED&step=Pay&error=Sorry"))
    assert "status: failed; step: Pay; error type: Sorry" in said
    assert "all that needs attention" in words(page(operator, f"{BASE}retry/"))
    assert f"id: {failed.pk}" in words(page(operator, f"{BASE}retry/?q={failed.pk}"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"reason": "  "}, "Say why: the audit keeps it."),
        ({"rate": "fast"}, "Enter a number"),
        ({"rate": "0"}, "greater than or equal to 0.1"),
        ({"rate": "nan"}, "Enter a number"),
        ({"allowed": "3"}, "Use one of the buttons"),
        ({"allowed": ""}, "Use one of the buttons"),
    ],
)
def test_a_form_that_is_not_complete_is_asked_for_again(
    given: dict[str, str], why: str, operator: Client
) -> None:
    failed_trip()
    address = f"{BASE}retry/?status=FAILED"
    response = operator.post(address, {**confirm(operator, address), **given})
    assert response.status_code == 200
    assert why in words(response.content.decode())
    assert not SagaBatch.objects.exists()
    again = {**hidden(response.content.decode()), "reason": "x", "rate": "5", "allowed": "1"}
    assert operator.post(address, again).status_code == 302


@pytest.mark.parametrize(
    "data", [{}, {"scope": "matching"}, {"scope": "all", "seen": "2026-01-01T00:00:00Z"}]
)
def test_a_post_without_a_confirmation_does_nothing(data: Any, operator: Client) -> None:
    failed_trip()
    given = {"reason": "x", "rate": "5", "allowed": "all", **data}
    assert operator.post(f"{BASE}retry/", given).status_code == 400
    assert operator.post(f"{BASE}retry/?nonsense=1", given).status_code == 400
    assert not SagaBatch.objects.exists()


def test_a_post_without_the_permission_does_nothing_and_is_audited(operator: Client) -> None:
    failed_trip()
    data = confirm(operator, f"{BASE}retry/")
    assert staff("view", "cancel").post(f"{BASE}retry/", data).status_code == 403
    assert staff("retry").post(f"{BASE}retry/", data).status_code == 403
    assert not SagaBatch.objects.exists()
    entry = SagaAuditEntry.objects.get()
    assert (entry.verb, entry.result, entry.source) == ("create_batch", "refused", "admin")


def test_without_a_csrf_token_nothing_is_done() -> None:
    failed_trip()
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    data = confirm(client, f"{BASE}retry/")
    data.pop("csrfmiddlewaretoken")
    assert client.post(f"{BASE}retry/", data).status_code == 403
    batch = batches.create(
        RETRY, SagaExecution.objects.all(), user=None, reason="x", title="x", source="code"
    )
    post = {"do": "stop", "seen": "running 1"}
    assert client.post(f"{BATCHES}{batch.pk}/steer/", post).status_code == 403
    assert now(batch).status == "running"


# What it is done to


def test_one_then_ten_then_all_of_one_cause_among_400(operator: Client) -> None:
    """No execution of the other two causes is touched."""
    first = failed_trip()
    groups = [uuid.uuid4().hex for _ in range(3)]
    kinds = [{"failure_group": group, "error_type": f"Error{group[:4]}"} for group in groups]
    mine, *others = (
        copies(first, n, **kind) for n, kind in zip((32, 168, 200), kinds, strict=True)
    )
    first.delete()
    untouched = SagaExecution.objects.filter(pk__in=[e.pk for group in others for e in group])
    before = list(untouched.order_by("pk").values())
    batch = do(operator, f"{BASE}retry/?error={kinds[0]['error_type']}", allowed="1")
    assert (now(batch).total, now(batch).status) == (32, "held")
    assert "1 of 32" in words(page(operator, url(batch)))
    steer(operator, batch, "ten")
    assert [item.state for item in items(batch)].count("done") == 11
    assert now(batch).status == "held"
    steer(operator, batch, "all")
    assert now(batch).status == "finished"
    assert "1 completed" not in words(page(operator, url(batch)))
    assert "32 completed" in words(page(operator, url(batch)))
    assert list(untouched.order_by("pk").values()) == before
    retried = SagaExecution.objects.exclude(retry_of=None).values_list("retry_of", flat=True)
    assert set(retried) == {execution.pk for execution in mine}
    assert len(retried) == 32


def test_a_failure_group_is_acted_on_and_nothing_else(operator: Client) -> None:
    """As the group's own page leads there; by its stored rows, whatever else the address says."""
    mine, other = failed_trip(), run_trip(act_Pay="another cause")
    assert mine.failure_group != other.failure_group
    group = SagaFailureGroup.objects.get(pk=mine.failure_group)
    address = f"{BASE}retry/?group={group.pk}&status=all"
    title = f"status: not dealt with; failure group: {group}"
    assert title in words(page(operator, address))
    batch = do(operator, address)
    assert batch.title == title
    assert [item.execution_id for item in items(batch)] == [mine.pk]
    assert changed(other).settled_at is None
    for nobody in ("x", "%00", uuid.uuid4().hex):
        assert "Nothing can be done" in page(operator, f"{BASE}retry/?group={nobody}&status=all")


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("", "all that needs attention"),
        ("?saga=tests.TripSaga", "all that needs attention; saga: tests.TripSaga"),
        ("?status=all&saga=tests.TripSaga", "status: all; saga: tests.TripSaga"),
    ],
)
def test_a_batch_is_named_for_what_its_filters_mean(
    query: str, title: str, operator: Client
) -> None:
    failed_trip()
    assert do(operator, f"{BASE}retry/{query}").title == title


def test_a_selection_is_acted_on_and_nothing_else(operator: Client) -> None:
    chosen, left, completed = failed_trip(), failed_trip(), completed_trip()
    ids = [str(chosen.pk), str(completed.pk)]
    selection = {"action": "retry_selected", "index": "0", "_selected_action": ids}
    html = operator.post(BASE, selection).content.decode()
    assert "2 that were selected" in words(html)
    assert "1 is completed" in words(html)
    data = confirm(operator, BASE, **selection)
    assert set(data["_selected_action"]) == set(ids)
    assert operator.post(f"{BASE}retry/", data).status_code == 302
    assert [item.execution_id for item in SagaBatchItem.objects.all()] == [chosen.pk]
    assert not SagaExecution.objects.filter(retry_of=left).exists()


def test_posted_ids_are_no_authority(operator: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the admin's own queryset does not hold is not acted on, whoever names it."""
    mine, hers = failed_trip(), failed_trip()
    data = {**confirm(operator, f"{BASE}retry/"), "scope": "selected"}
    data["_selected_action"] = [str(mine.pk), str(hers.pk), "nonsense"]
    everything = MODEL_ADMIN.get_queryset
    monkeypatch.setattr(
        MODEL_ADMIN, "get_queryset", lambda request: everything(request).filter(pk=mine.pk)
    )
    assert operator.post(f"{BASE}retry/", data).status_code == 302
    assert [item.execution_id for item in SagaBatchItem.objects.all()] == [mine.pk]


def test_a_selection_made_by_hand_is_refused(operator: Client) -> None:
    selection = {"action": "retry_selected", "index": "0", "_selected_action": "nonsense"}
    assert operator.post(BASE, selection).status_code == 400


def test_select_across_leads_to_all_that_match(operator: Client) -> None:
    failed = failed_trip()
    data = {"action": "retry_selected", "index": "0", "select_across": "1"}
    data["_selected_action"] = str(failed.pk)
    response = operator.post(f"{BASE}?status=FAILED&step=Pay", data)
    assert response["Location"] == f"{BASE}retry/?status=FAILED&step=Pay"
    assert counts() == {"FAILED": 1}


def test_all_that_match_are_acted_on_and_what_fails_again_is_not_retried_in_turn(
    operator: Client,
) -> None:
    matching = [failed_trip() for _ in range(4)]
    other = run_trip(act_Leave="fog")
    WORLD.trouble = {"act Pay": "still no money"}
    batch = do(operator, f"{BASE}retry/?step=Pay&status=FAILED")
    assert [item.execution_id for item in items(batch)] == [e.pk for e in matching]
    assert counts() == {"FAILED": 9}
    assert not SagaExecution.objects.filter(retry_of=other).exists()
    assert "4 done : 4 failed again" in words(page(operator, url(batch)))


def test_what_came_after_the_confirmation_is_left_alone(operator: Client) -> None:
    failed_trip()
    data = confirm(operator, f"{BASE}retry/")
    later = failed_trip()
    response = operator.post(f"{BASE}retry/", data, follow=True)
    assert [str(m) for m in response.context["messages"]] == [
        "1 changed since you looked, and was left alone."
    ]
    assert SagaBatch.objects.get().total == 1
    assert not SagaExecution.objects.filter(retry_of=later).exists()


def test_what_is_cancelled_may_have_gone_on_since_the_confirmation(operator: Client) -> None:
    due = due_trip()
    data = confirm(operator, f"{BASE}cancel/?status=PENDING")
    later = due_trip()
    SagaExecution.objects.update(updated_at=later.updated_at)
    assert operator.post(f"{BASE}cancel/?status=PENDING", data).status_code == 302
    assert (changed(due).status, changed(later).status) == ("FAILED", "PENDING")


def test_when_nothing_is_left_to_do_it_says_so(operator: Client) -> None:
    failed = failed_trip()
    data = confirm(operator, f"{BASE}retry/?status=all")
    changed(failed, settled_at=failed.updated_at)
    response = operator.post(f"{BASE}retry/?status=all", data)
    assert response.status_code == 200
    assert "Nothing can be done here" in words(response.content.decode())
    assert not SagaBatch.objects.exists()


def test_two_operators_at_once_do_each_once(operator: Client) -> None:
    """What the second ends as failed, the first must not start anew."""
    first, second = stuck_trip(), stuck_trip()
    data = confirm(operator, f"{BASE}retry/")
    other = log_in(User.objects.create_superuser("other"))

    def act_meanwhile() -> None:
        WORLD.interlude = None
        thread = threading.Thread(target=lambda: (post(other), connections.close_all()))
        thread.start()
        thread.join()

    def post(client: Client) -> None:
        client.post(f"{BASE}retry/", data)

    WORLD.interlude = act_meanwhile  # while the first one is being compensated
    post(operator)
    mine = SagaBatch.objects.get(user_name="root")
    assert [item.state for item in items(mine)] == ["done", "skipped"]
    assert items(mine)[1].why == "changed meanwhile and is FAILED now."
    assert changed(first).status == changed(second).status == "FAILED"
    assert counts() == {"FAILED": 2}
    assert WORLD.calls == ["compensate Pack"] * 2


def test_a_request_whose_time_is_over_leaves_the_rest_to_others(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_trip()
    monkeypatch.setattr(MODEL_ADMIN, "drive_seconds", 0.0)
    batch = do(operator, f"{BASE}retry/")
    assert now(batch).status == "running"
    assert "0 of 1" in words(page(operator, url(batch)))
    assert WORLD.calls == []
    batches.work(seconds=60)
    assert now(batch).status == "finished"


def test_where_workers_drive_the_request_does_not(operator: Client, settings: Settings) -> None:
    failed_trip()
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "sagas"}
    assert "whose workers drive them" in words(page(operator, f"{BASE}retry/"))
    batch = do(operator, f"{BASE}retry/")
    assert [item.state for item in items(batch)] == ["waiting"]


# The page of a batch


def test_it_tells_who_why_and_what_came_of_it(operator: Client) -> None:
    first, second, third = stuck_trip(), failed_trip(), failed_trip()
    gone = [changed(failed_trip(), saga="gone.Saga") for _ in range(2)]
    batch = do(operator, f"{BASE}retry/", allowed="1")
    WORLD.trouble = {"act Pay": "still no money"}
    steer(operator, batch, "one")
    WORLD.reset()
    steer(operator, batch, "all")
    html = page(operator, url(batch))
    said = words(html)
    for text in (
        "finished",
        "5 of 5",
        "3 done : 1 failed again 1 all undone 1 completed",
        "2 skipped 2 No saga named 'gone.Saga' is registered.",
        "Asked by root, 20",
        "Reason the bank is back",
        "100 per second",
    ):
        assert text in said.replace("&#x27;", "'"), text
    for execution in (first, second, third, *gone):
        assert f"{BASE}{execution.pk}/change/" in html
    result = SagaExecution.objects.get(retry_of=third)
    assert f"{BASE}{result.pk}/change/" in html
    assert '<progress class="saga-progress" max="5" value="5"' in html
    assert "<button" not in html[html.index('id="content-main"') :]
    entry = LogEntry.objects.filter(object_id=str(batch.pk)).earliest("pk")
    assert entry.change_message == "Retry, 5 executions: all that needs attention"


def test_what_is_stuck_again_or_still_running_is_told(operator: Client) -> None:
    stuck, due = stuck_trip(), failed_trip()
    WORLD.trouble = {"compensate Pack": "still lost"}
    batch = do(operator, f"{BASE}retry/")
    changed(SagaExecution.objects.get(retry_of=due), status="RUNNING")
    assert "2 done : 1 stuck 1 still running" in words(page(operator, url(batch)))
    stuck.records.all().delete()
    SagaExecution.objects.filter(pk=stuck.pk).delete()
    assert "1 not there any more" in words(page(operator, url(batch)))


def test_its_items_are_shown_a_hundred_at_a_time_or_those_of_one_state(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = failed_trip()
    copies(first, 249)
    batch = do(operator, f"{BASE}retry/", allowed="1")
    ids = [str(item.execution_id) for item in items(batch)]
    seen, query = [], ""
    while True:
        html = page(operator, f"{url(batch)}{query}")
        table = html[html.index('id="items"') :]
        seen += re.findall(r'<th scope="row"><a class="saga-id" href="[^"]*">([^<]*)<', table)
        follow = re.search(r'rel="next" href="([^#]*)#items"', table)
        if not follow:
            break
        assert len(seen) % 100 == 0
        query = follow[1].replace("&amp;", "&")
    assert seen == ids
    done = page(operator, f"{url(batch)}?state=done")
    assert ids[0] in done
    assert ids[1] not in done
    for nonsense in ("?state=x", "?after=x", "?after=-1", f"?after={'9' * 30}"):
        assert operator.get(url(batch) + nonsense).status_code == 200
    monkeypatch.setattr(progress, "CAP", 0)
    assert "of the latest" not in words(page(operator, f"{url(batch)}?state=waiting"))


def test_the_buttons_are_those_that_make_sense(operator: Client) -> None:
    for _ in range(30):
        failed_trip()

    def buttons() -> list[str]:
        return re.findall(r'name="do" value="(\w+)"', page(operator, url(batch)))

    batch = do(operator, f"{BASE}retry/", allowed="1")
    assert buttons() == ["one", "ten", "all", "stop"]
    SagaBatch.objects.update(status="running")
    assert buttons() == ["ten", "all", "pause", "stop"]
    steer(operator, batch, "pause", reason="lunch")
    assert buttons() == ["resume", "stop"]
    assert "Paused by root: lunch" in words(page(operator, url(batch)))
    SagaBatch.objects.update(allowed=2)
    steer(operator, batch, "resume")
    assert now(batch).status == "held"
    assert [item.state for item in items(batch)].count("done") == 2
    steer(operator, batch, "stop", reason="enough")
    assert buttons() == []
    assert now(batch).status == "stopped"
    verbs = ("create_batch", "pause_batch", "resume_batch", "stop_batch")
    for verb in verbs:
        assert SagaAuditEntry.objects.get(verb=verb).source == "admin"


def test_a_running_batch_says_who_goes_on_with_it(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        failed_trip()
    batch = do(operator, f"{BASE}retry/", allowed="1")
    assert "recover_sagas" not in words(page(operator, url(batch)))  # it waits for a person
    SagaBatch.objects.update(status="running")
    said = words(page(operator, url(batch)))
    assert "recover_sagas drives it on. It has never run. Recovery is late. Run it:" in said
    heartbeats.beat(every=30)
    said = words(page(operator, url(batch)))
    assert re.search(r"recover_sagas drives it on\. It last ran 0?\.?\d+ m?s ago, on ", said), said
    assert "late" not in said
    monkeypatch.setattr(InProcessBackend, "queues", True)
    assert "A worker of the backend drives it on; if" in words(page(operator, url(batch)))
    in_an_hour = timezone.now() + timedelta(hours=1)
    SagaBatch.objects.update(lease_until=in_an_hour, driver="cron-1:77")
    assert "cron-1:77 drives it now; what that leaves" in words(page(operator, url(batch)))


def test_a_button_pressed_twice_or_too_late_does_nothing(operator: Client) -> None:
    for _ in range(4):
        failed_trip()
    batch = do(operator, f"{BASE}retry/", allowed="1")
    data = {**hidden(page(operator, url(batch))), "do": "one"}
    address = f"{BATCHES}{batch.pk}/steer/"
    for _ in range(2):
        response = operator.post(address, data, follow=True)
    assert "It changed since you looked" in str(next(iter(response.context["messages"])))
    assert [item.state for item in items(batch)].count("done") == 2
    assert operator.post(address, {**data, "do": "dance"}).status_code == 302
    fresh = hidden(page(operator, url(batch)))
    assert operator.post(address, {**fresh, "do": "dance"}).status_code == 400
    assert operator.get(address).status_code == 302
    assert operator.post(url(batch), {**fresh, "do": "stop"}).status_code == 403
    assert now(batch).status == "held"


def test_who_may_see_and_steer_it() -> None:
    """Who asked sees it, others need the permission; all need to see executions."""
    for _ in range(3):
        failed_trip()
    owner = staff("view", "retry")
    batch = do(owner, f"{BASE}retry/", allowed="1")
    address = f"{BATCHES}{batch.pk}/steer/"
    data = {**hidden(page(owner, url(batch))), "do": "stop"}
    for client, seen, listed in (
        (staff("view", "retry"), 404, True),
        (staff("view", "view_sagabatch"), 200, True),
        (staff("view_sagabatch", "retry"), 403, False),
        (staff(), 403, False),
    ):
        assert client.get(url(batch)).status_code == seen
        assert client.get(BATCHES).status_code == (200 if listed else 403)
        assert client.post(address, data).status_code in (403, 404)
        assert 'name="do"' not in client.get(url(batch)).content.decode()
    assert str(batch.pk) not in page(staff("view", "retry"), BATCHES)
    assert str(batch.pk) in page(staff("view", "view_sagabatch"), BATCHES)
    assert str(batch.pk) in page(owner, BATCHES)
    assert Client().get(url(batch)).status_code == 302
    assert now(batch).status == "held"
    assert owner.post(address, data).status_code == 302
    assert now(batch).status == "stopped"


@pytest.mark.parametrize("address", ["add/", "{id}/change/", "{id}/delete/", ""])
def test_no_batch_is_added_edited_or_deleted(address: str, operator: Client) -> None:
    failed_trip()
    batch = do(operator, f"{BASE}retry/", allowed="1")
    before = SagaBatch.objects.values().get()
    data = {"status": "running", "post": "yes", "action": "delete_selected", "index": "0"}
    data["_selected_action"] = str(batch.pk)
    operator.post(BATCHES + address.format(id=batch.pk), data)
    assert SagaBatch.objects.values().get() == before
    assert operator.get(f"{BATCHES}{uuid.uuid4()}/change/").status_code == 404
    assert operator.get(f"{BATCHES}nonsense/change/").status_code == 404


def test_text_from_outside_never_becomes_markup(operator: Client) -> None:
    failed = changed(failed_trip(), error_type=HOSTILE, saga=HOSTILE, failed_step=HOSTILE[:90])
    other = changed(failed_trip(), error_type=HOSTILE)
    batch = do(operator, f"{BASE}retry/", reason=HOSTILE, allowed="1")
    SagaBatch.objects.update(title=HOSTILE, why=HOSTILE, user_name=HOSTILE, driver=HOSTILE)
    batch.items.filter(execution_id=failed.pk).update(state="skipped", why=HOSTILE)
    pages = [page(operator, url(batch)), page(operator, BATCHES)]
    pages.append(page(operator, f"{BASE}retry/?status=all"))
    pages.append(page(operator, f"{url(batch)}?state={HOSTILE}"))
    for html in pages:
        assert "<script>alert" not in html
        assert "<b>" not in html
        assert '" onload' not in html
    assert changed(other).settled_at is None


def test_pages_cost_a_few_queries_are_stored_nowhere_and_keep_to_a_strict_policy() -> None:
    client = staff("view", "retry", "cancel", "force", "recover", "view_sagabatch")
    first = failed_trip()
    copies(first, 150)
    batch = do(client, f"{BASE}retry/")
    copies(first, 50)
    selection = {"action": "retry_selected", "index": "0", "_selected_action": str(first.pk)}
    for get in (
        lambda: client.get(BATCHES),
        lambda: client.get(url(batch)),
        lambda: client.get(f"{BASE}retry/?status=all"),
        lambda: client.get(f"{BASE}cancel/?status=all"),
        lambda: client.post(BASE, selection),
    ):
        with CaptureQueriesContext(connection) as queries:
            response = get()
        assert response.status_code == 200
        html = response.content.decode()
        assert len(queries) <= 12, [query["sql"][:100] for query in queries]
        assert "no-store" in response["Cache-Control"]
        assert response["Content-Security-Policy"] == "default-src 'self'"
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|javascript:", html)
        assert "django_saga/admin.css" in html
