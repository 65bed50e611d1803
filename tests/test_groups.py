"""Failure groups: what is counted, what is told of them, and what a large table costs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.exceptions import PermissionDenied
from django.test import Client
from django.utils import timezone

from django_saga import groups, operations
from django_saga.admin.groups import capped
from django_saga.exceptions import SagaError
from django_saga.models import SagaAuditEntry, SagaExecution, SagaFailureGroup, SagaPause
from tests.operated import changed, completed_trip, failed_trip, run_trip, stuck_trip

pytestmark = pytest.mark.usefixtures("alone")

BASE = "/admin/django_saga/sagafailuregroup/"
EXECUTIONS = "/admin/django_saga/sagaexecution/"
HOSTILE = "<script>alert('&amp;')</script>{{ 7|add:7 }}\" onload=x <b>"


@pytest.fixture
def operator() -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    return client


def user(*codenames: str) -> User:
    """A staff user with these permissions."""
    who = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    who.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    return User.objects.get(pk=who.pk)


def staff(*codenames: str) -> Client:
    client = Client()
    client.force_login(user(*codenames))
    return client


def page(client: Client, address: str, status: int = 200) -> str:
    response = client.get(address)
    assert response.status_code == status, response.content.decode()
    return response.content.decode()


def one(execution: SagaExecution) -> str:
    return f"{BASE}{execution.failure_group}/change/"


def listed(client: Client, query: str = "") -> list[str]:
    """The ids of the groups in the list, from its top."""
    html = page(client, BASE + query).partition("saga-muted")[0]
    return re.findall(r'<h3><a href="[^"]*/sagafailuregroup/([0-9a-f]{32})/change/"', html)


def facts(html: str) -> dict[str, str]:
    """Names and values of the numbers, of the first group on a page."""
    pairs = re.findall(r"<dt>([^<]*)</dt><dd[^>]*>(.*?)</dd>", html, re.S)
    return {name: re.sub(r"<[^>]*>", "", value).strip() for name, value in reversed(pairs)}


def shown(client: Client, query: str) -> set[uuid.UUID]:
    """The ids of the executions in their list."""
    ids = re.findall(r"/sagaexecution/([0-9a-f-]{36})/change/", page(client, EXECUTIONS + query))
    return {uuid.UUID(id) for id in ids}


def aged(execution: SagaExecution, **ago: float) -> SagaExecution:
    """The execution, begun that long ago."""
    return changed(execution, created_at=timezone.now() - timedelta(**ago))


# What is counted


def test_the_groups_are_those_with_executions_that_nobody_has_dealt_with(alias: str) -> None:
    failed, stuck = failed_trip(alias=alias), stuck_trip(alias=alias)
    settled = run_trip(alias=alias, act_Leave="flat tyre")
    changed(settled, settled_at=timezone.now())
    completed_trip(alias=alias)
    rows = SagaExecution.objects.using(alias)
    assert groups.live(rows) == sorted([failed.failure_group, stuck.failure_group])
    assert groups.live(rows, limit=1) == groups.live(rows)[:1]
    assert groups.live(rows.none()) == []
    assert SagaFailureGroup.objects.using(alias).count() == 4  # the stuck one was of two


def test_a_group_knows_its_oldest_and_its_newest_and_counts_them_by_hour(alias: str) -> None:
    for hours in (0.1, 0.2, 1.5, 23.5, 30):
        aged(failed_trip(alias=alias), hours=hours)
    other = aged(stuck_trip(alias=alias), hours=3)
    rows = SagaExecution.objects.using(alias)
    found = groups.seen(SagaFailureGroup.objects.using(alias), rows)
    assert [each.group.action for each in found] == ["act", "compensate"]
    first = found[0]
    assert timedelta(hours=29.8) < first.newest - first.oldest < timedelta(hours=30)
    numbers = groups.numbers(rows, [each.group.pk for each in found], first.now)
    mine = numbers[first.group.pk]
    assert (mine.total, mine.last_day, mine.last_hour) == (5, 4, 2)
    assert mine.hours == [1, *[0] * 21, 1, 2]
    assert numbers[other.failure_group].hours == [*[0] * 20, 1, 0, 0, 0]


def test_the_list_tells_all_of_a_group_and_leads_to_what_is_behind_it(operator: Client) -> None:
    failures = [failed_trip() for _ in range(3)]
    aged(failures[0], hours=2)
    stuck_trip()
    html = page(operator, BASE)
    assert len(listed(operator)) == 2
    assert listed(operator)[0] != failures[0].failure_group  # the latest is on top
    html = html[html.rindex("<article") :]
    told = facts(html)
    assert told["Not dealt with"] == "3"
    assert told["Of these, in 1 h"] == "2"
    assert told["Of these, in 24 h"] == "3"
    assert told["Oldest waiting"] == "2 h 0 m"
    assert "no money" in html
    assert "in Pay of tests.TripSaga" in html
    assert "All is undone, nothing stands: retry anew" in html
    assert "outcome known" in html
    query = f"?group={failures[0].failure_group}&status=all"
    assert f'href="{EXECUTIONS}{query.replace("&", "&amp;")}"' in html
    assert shown(operator, query) == {each.pk for each in failures}


@pytest.mark.parametrize("query", ["&status=all", "", "&status=open-FAILED", "&status=FAILED"])
def test_the_filter_shows_what_nobody_has_dealt_with_in_the_group(
    query: str, operator: Client
) -> None:
    open_one, settled = failed_trip(), failed_trip()
    changed(settled, settled_at=timezone.now())
    stuck_trip()
    assert shown(operator, f"?group={open_one.failure_group}{query}") == {open_one.pk}


@pytest.mark.parametrize("value", ["%00", "x" * 5000, "%27%3B--", "0" * 32])
def test_no_group_has_an_id_that_is_none(value: str, operator: Client) -> None:
    failed_trip()
    assert shown(operator, f"?group={value}&status=all") == set()
    if len(value) < 5000:
        page(operator, f"{BASE}{value}/change/", 404)


ACTIONS: list[tuple[Callable[..., SagaExecution], str]] = [
    (failed_trip, "All is undone, nothing stands: retry anew once the cause is gone."),
    (stuck_trip, "Retry the compensation once the cause is gone: the effect of the step stands."),
]


@pytest.mark.parametrize(("make", "words"), ACTIONS)
def test_the_next_action_is_what_is_safe_there(
    make: Callable[..., SagaExecution], words: str, operator: Client
) -> None:
    assert words in page(operator, one(make()))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"outcome": "UNKNOWN"}, "unknown, so it was compensated too"),
        ({"outcome": "UNKNOWN", "action": "compensate"}, "may stand, or be undone already"),
        ({"error_type": "SagaStuck"}, "resume them forward, or retry"),
        ({"error_type": "SagaStuck", "action": "compensate"}, "its effect may stand"),
    ],
)
def test_the_next_action_knows_what_was_stuck_and_what_is_unknown(
    facts: dict[str, str], words: str
) -> None:
    given = {"action": "act", "outcome": "FAILED", "error_type": "Sorry"} | facts
    assert words in groups.next_action(SagaFailureGroup(**given))


@pytest.mark.parametrize(
    ("make", "outcome", "words"),
    [
        (failed_trip, "FAILED", "outcome known: the failed attempt had no effect"),
        (failed_trip, "UNKNOWN", "outcome unknown: the failed attempt may have had its effect"),
        (stuck_trip, "FAILED", "outcome known: the failed attempt undid nothing"),
        (stuck_trip, "UNKNOWN", "outcome unknown: the failed attempt may have undone the step"),
    ],
)
def test_the_outcome_is_told_of_what_was_attempted(
    make: Callable[..., SagaExecution], outcome: str, words: str, operator: Client
) -> None:
    execution = make()
    SagaFailureGroup.objects.update(outcome=outcome)
    assert words in page(operator, one(execution))


# The page of one


def test_the_page_shows_the_latest_and_the_traceback_and_leads_to_the_verbs(
    operator: Client,
) -> None:
    failures = [failed_trip() for _ in range(22)]
    html = page(operator, one(failures[0]))
    assert facts(html)["Not dealt with"] == "22"
    assert len(set(re.findall(r"sagaexecution/([0-9a-f-]{36})/change/", html))) == 20
    assert "Traceback (most recent call last)" in html
    assert "tests.operated.World.call" in html
    group = failures[0].failure_group
    assert f'href="{EXECUTIONS}retry/?group={group}&amp;status=all"' in html
    assert f"{EXECUTIONS}recover/" not in html  # they have ended
    confirmation = page(operator, f"{EXECUTIONS}retry/?group={group}&status=all")
    assert "22" in confirmation


def test_a_group_that_was_dealt_with_says_so_and_leads_to_what_was(operator: Client) -> None:
    failures = [aged(failed_trip(), hours=hours) for hours in (5, 3, 4)]
    for failed in failures:
        changed(failed, settled_at=timezone.now())
    SagaFailureGroup.objects.update(first_seen=timezone.now() - timedelta(hours=5))
    stuck_trip()
    html = page(operator, one(failures[0]))
    assert "Nothing: all 3 that failed so were dealt with." in html
    told = facts(html)
    assert (told["Not dealt with"], told["Dealt with"]) == ("0", "3")
    assert (told["First seen"], told["Last seen"]) == ("5 h 0 m ago", "3 h 0 m ago")
    assert "Of these, in 1 h" not in told
    assert f"{EXECUTIONS}retry/" not in html
    assert failures[0].failure_group not in listed(operator)
    query = f"?group={failures[0].failure_group}&status=dealt-with"
    assert f'href="{EXECUTIONS}{query.replace("&", "&amp;")}"' in html
    assert shown(operator, query) == {each.pk for each in failures}
    assert shown(operator, "?status=dealt-with") == {each.pk for each in failures}


def test_a_group_is_seen_last_by_what_was_dealt_with_too(operator: Client) -> None:
    left, dealt_with = aged(failed_trip(), hours=5), aged(failed_trip(), hours=3)
    changed(dealt_with, settled_at=timezone.now())
    told = facts(page(operator, one(left)))
    assert (told["Not dealt with"], told["Dealt with"]) == ("1", "1")
    assert (told["Oldest waiting"], told["Last seen"]) == ("5 h 0 m", "3 h 0 m ago")


def test_a_group_of_which_nothing_is_left_claims_no_time(operator: Client) -> None:
    failed = failed_trip()
    SagaExecution.objects.all().delete()
    html = page(operator, one(failed))
    assert "Nothing: no execution that is there failed so" in html
    assert facts(html)["Last seen"] == "\N{EN DASH}"


def test_text_from_outside_is_never_markup(operator: Client) -> None:
    failed = run_trip(act_Pay=HOSTILE)
    operations.note(failed.failure_group, HOSTILE)
    for address in (BASE, one(failed), f"{EXECUTIONS}?group={failed.failure_group}"):
        html = page(operator, address)
        assert "<script>alert" not in html
        assert "{{ 7|add:7 }}" in html or address.startswith(EXECUTIONS)


def test_no_page_holds_inline_script_or_style(operator: Client) -> None:
    failed = failed_trip()
    for address in (BASE, one(failed)):
        html = page(operator, address)
        assert " style=" not in html
        assert not re.search(r"<script(?![^>]*src=)(?![^>]*application/json)", html)
        assert "no-store" in operator.get(address)["Cache-Control"]


# Note and mute


def post(client: Client, execution: SagaExecution, **data: Any) -> Any:
    return client.post(one(execution), data, follow=True)


def test_a_note_and_a_mute_are_kept_and_audited(operator: Client) -> None:
    failed = failed_trip()
    response = post(operator, failed, note="The bank mends it.", mute="2")
    said = " ".join(str(message) for message in response.context["messages"])
    assert said == "The note was saved. The group is muted for 2 hours."
    group = SagaFailureGroup.objects.get()
    assert group.note == "The bank mends it."
    assert group.muted_until is not None
    left = group.muted_until - timezone.now()
    assert timedelta(hours=1.9) < left <= timedelta(hours=2)
    noted, muted = SagaAuditEntry.objects.order_by("id")
    assert (noted.verb, noted.user_name, noted.source) == ("note", "root", "admin")
    assert (muted.verb, muted.result, muted.step) == ("mute", "done", "Pay")
    assert "The bank mends it." in noted.detail
    post(operator, failed, note="The bank mends it.", mute="")
    assert SagaAuditEntry.objects.count() == 2  # nothing was asked for


def test_a_muted_group_is_folded_below_until_its_mute_runs_out(operator: Client) -> None:
    failed = failed_trip()
    post(operator, failed, mute="1")
    assert listed(operator) == []
    assert "1 muted group" in page(operator, BASE)
    SagaFailureGroup.objects.update(muted_until=timezone.now() - timedelta(seconds=1))
    assert listed(operator) == [failed.failure_group]
    post(operator, failed, mute="1")
    post(operator, failed, mute="0")
    assert listed(operator) == [failed.failure_group]


@pytest.mark.parametrize("hours", ["-1", "721", "nan", "inf", "soon"])
def test_no_mute_is_for_ever(hours: str, operator: Client) -> None:
    failed = failed_trip()
    response = post(operator, failed, mute=hours)
    assert response.status_code == 200
    assert "errorlist" in response.content.decode()
    assert SagaFailureGroup.objects.get().muted_until is None


@pytest.mark.parametrize("hours", [-1, 721, float("nan"), float("inf")])
def test_code_mutes_for_no_longer_either(hours: float) -> None:
    failed = failed_trip()
    with pytest.raises(SagaError, match="0 to 720 hours"):
        operations.mute(failed.failure_group, hours)
    assert SagaAuditEntry.objects.get().result == "refused"


def test_a_note_has_an_end_and_a_group_must_be_there() -> None:
    failed = failed_trip()
    with pytest.raises(SagaError, match="up to 5000"):
        operations.note(failed.failure_group, "x" * 5001)
    with pytest.raises(SagaError, match="no failure group"):
        operations.note("0" * 32, "Hello")


def test_a_secret_in_a_note_is_masked_before_it_is_stored(operator: Client) -> None:
    failed = failed_trip()
    post(operator, failed, note="Log in with password=hunter2-very-secret")
    assert "hunter2" not in SagaFailureGroup.objects.get().note
    assert "hunter2" not in SagaAuditEntry.objects.get().detail


# Who may


def test_each_page_and_each_change_takes_its_permission() -> None:
    failed = failed_trip()
    for client in (staff(), staff("view_sagaexecution")):
        page(client, BASE, 403)
        page(client, one(failed), 403)
        assert post(client, failed, note="Hello").status_code == 403
    viewer = staff("view_sagafailuregroup")
    assert listed(viewer) == [failed.failure_group]
    html = page(viewer, one(failed))
    assert str(failed.pk) not in html  # that takes the right to see executions
    assert "Traceback" not in html
    assert 'name="note"' not in html
    assert post(viewer, failed, note="Hello", mute="5").status_code == 403
    assert SagaFailureGroup.objects.get().note == ""
    refused = SagaAuditEntry.objects.get()
    assert (refused.verb, refused.result) == ("note", "refused")
    editor = staff("view_sagafailuregroup", "change_sagafailuregroup")
    assert post(editor, failed, note="Hello").status_code == 200
    assert SagaFailureGroup.objects.get().note == "Hello"


def test_the_verbs_and_the_traceback_are_for_those_who_may() -> None:
    failed = failed_trip()
    seeing = ("view_sagafailuregroup", "view_sagaexecution")
    html = page(staff(*seeing), one(failed))
    assert str(failed.pk) in html
    assert "Traceback" not in html
    assert f"{EXECUTIONS}retry/" not in html
    html = page(staff(*seeing, "retry_sagaexecution"), one(failed))
    assert f"{EXECUTIONS}retry/" in html
    html = page(staff(*seeing, "view_traceback_sagaexecution"), one(failed))
    assert "Traceback" in html


def test_who_may_pause_is_led_to_pausing_the_step_that_fails() -> None:
    failed = failed_trip()
    seeing = ("view_sagafailuregroup", "view_sagaexecution")
    pausing = staff(*seeing, "pause_sagaexecution")
    link = f'href="/admin/django_saga/sagapause/pause/?saga={failed.saga}&amp;step=Pay"'
    assert link in page(pausing, one(failed))
    assert link not in page(staff(*seeing), one(failed))
    assert "sagapause/pause" in page(pausing, f"{EXECUTIONS}{failed.pk}/change/")
    assert "step=Pay" in page(pausing, f"{EXECUTIONS}{failed.pk}/change/")
    operations.pause(failed.saga, "Pay")
    html = page(pausing, one(failed))
    assert link not in html
    assert "tests.TripSaga Pay is paused: nothing more of it begins." in html
    assert f'href="/admin/django_saga/sagapause/{SagaPause.objects.get().pk}/resume/"' in html


def test_code_that_asks_for_a_user_is_refused_as_they_are() -> None:
    failed = failed_trip()
    with pytest.raises(PermissionDenied):
        operations.mute(failed.failure_group, 1, user=user("view_sagafailuregroup"))


@pytest.mark.parametrize("address", ["add/", "{id}/delete/"])
def test_nothing_is_added_or_deleted(address: str, operator: Client) -> None:
    page(operator, BASE + address.format(id=failed_trip().failure_group), 403)
    assert operator.post(BASE, {"action": "delete_selected"}).status_code == 403


def test_a_change_takes_a_csrf_token() -> None:
    failed = failed_trip()
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    assert client.post(one(failed), {"note": "Hello"}).status_code == 403
    assert SagaFailureGroup.objects.get().note == ""


# Many


def test_the_groups_come_in_pages_and_a_count_has_an_end(operator: Client) -> None:
    failed = failed_trip()
    group = SagaFailureGroup.objects.get()
    for number in range(27):
        group.pk = failed.failure_group = f"{number:032x}"
        failed.pk = uuid.uuid4()
        failed.created_at -= timedelta(minutes=1)
        SagaFailureGroup.objects.bulk_create([group])
        SagaExecution.objects.bulk_create([failed])
    assert len(listed(operator)) == 25
    assert "1 to 25 of 28" in page(operator, BASE)
    assert listed(operator, "?p=2") == [f"{number:032x}" for number in (24, 25, 26)]
    for beyond in ("?p=99", "?p=3"):
        assert "26 to 28 of 28" in page(operator, BASE + beyond)
    for wrong in ("?p=0", "?p=-1", "?p=x", "?p=\u0662", f"?p={'9' * 5000}"):
        assert len(listed(operator, wrong)) in (25, 3)
    assert [capped(10_000), capped(10_001)] == ["10,000", "10,000+"]
