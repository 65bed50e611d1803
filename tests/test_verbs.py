"""Each verb on one execution, in the admin: asked by GET, done by POST."""

from __future__ import annotations

import html
import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.test import Client
from pytest_django import Settings

from django_saga.masking import MASK
from django_saga.models import SagaAuditEntry, SagaExecution, SagaPause
from django_saga.operations import VERBS
from tests.operated import (
    changed,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    guarded_trip,
    lost_trip,
    pending_trip,
    resolved_trip,
    retried_trip,
    stuck_trip,
)
from tests.test_admin import BASE, HOSTILE, MODEL_ADMIN, log_in, one, page, staff

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def operator() -> Client:
    return log_in(User.objects.create_superuser("root"))


def stuck_forward() -> SagaExecution:
    """One that got stuck in an act: its driver was lost once too often."""
    return changed(
        lost_trip(), status="STUCK", lease_until=None, stuck_reason="It was lost 6 times."
    )


# verb, an execution for it, its own arguments, what is said before, and its status afterwards
Arguments = Callable[[SagaExecution], dict[str, Any]]
DEEDS: list[tuple[str, Callable[[], SagaExecution], Arguments, str, str]] = [
    ("retry", failed_trip, lambda _: {}, "A new execution starts", "FAILED"),
    ("retry", stuck_trip, lambda _: {}, "It tries to undo Pack", "FAILED"),
    ("recover", lost_trip, lambda _: {}, "act of Pack runs again, as attempt 2", "COMPLETED"),
    ("recover", due_trip, lambda _: {}, "It goes on with act of Pack, attempt 1", "COMPLETED"),
    ("cancel", pending_trip, lambda _: {}, "Nothing is done yet", "FAILED"),
    ("cancel", driven_trip, lambda _: {}, "web-2:4711 has it in hand", "RUNNING"),
    ("resume_forward", stuck_forward, lambda _: {}, "act of Pack runs again", "COMPLETED"),
    ("skip", lost_trip, lambda _: {}, "act of Pack does not run", "COMPLETED"),
    ("mark_done", lost_trip, lambda _: {"step": "Pack"}, "Pack counts as done", "COMPLETED"),
    ("mark_done", stuck_trip, lambda _: {"step": "Pack"}, "counts as undone", "FAILED"),
    ("edit_context", guarded_trip, lambda e: {"context": e.context}, "a retry gets", "STUCK"),
    ("release", driven_trip, lambda _: {}, "web-2:4711 loses the lease", "RUNNING"),
    ("resolve", stuck_trip, lambda _: {"standing": ["Pack"]}, "It stays stuck", "STUCK"),
    ("abandon", lost_trip, lambda e: {"confirm": str(e.pk)}, "Nothing runs any more", "STUCK"),
]


def text_of(answer: Any) -> str:
    """What a page says, without its markup."""
    content = answer if isinstance(answer, str) else answer.content.decode()
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", content)))


def posted(client: Client, execution: SagaExecution, verb: str, **data: Any) -> Any:
    """Open the form, fill it in, and post it."""
    address = one(execution, verb)
    token = re.search(r'name="token" value="(\d+)"', page(client, address))
    assert token is not None
    return client.post(address, {"token": token[1], "reason": "as agreed", **data})


def test_every_verb_is_tried_here() -> None:
    assert {verb for verb, *_rest in DEEDS} == set(VERBS)


@pytest.mark.parametrize(("verb", "make", "arguments", "said", "status"), DEEDS)
def test_a_verb_says_what_will_run_and_is_done_by_a_post(
    verb: str,
    make: Callable[[], SagaExecution],
    arguments: Arguments,
    said: str,
    status: str,
    operator: Client,
) -> None:
    execution = make()
    before = SagaExecution.objects.values().get()
    asked = text_of(page(operator, one(execution, verb)))
    assert said in asked
    assert f"manage.py sagas {verb.replace('_', '-')} {execution.pk}" in asked
    assert SagaExecution.objects.values().get() == before
    response = posted(operator, execution, verb, **arguments(execution))
    assert response.status_code == 302, text_of(response)
    assert changed(execution).status == status
    newest = SagaExecution.objects.order_by("created_at").last()
    assert newest is not None
    assert response["Location"] == one(newest)
    entry = SagaAuditEntry.objects.get()
    assert (entry.verb, entry.user_name, entry.source) == (verb, "root", "admin")
    assert (entry.reason, entry.result) == ("as agreed", "done")
    assert entry.execution_id == execution.pk
    log = LogEntry.objects.get()
    assert log.object_id == str(execution.pk)
    assert log.change_message.startswith(f"{VERBS[verb].label}: ")


KEYS = [
    ("recover", lost_trip, "act"),
    ("recover", due_trip, "act"),
    ("release", driven_trip, "act"),
]


@pytest.mark.parametrize(("verb", "make", "action"), KEYS)
def test_the_idempotency_key_that_is_used_again_is_named(
    verb: str, make: Callable[[], SagaExecution], action: str, operator: Client
) -> None:
    execution = make()
    assert f"{execution.pk}:Pack:{action}" in text_of(page(operator, one(execution, verb)))


IMPOSSIBLE = [
    ("retry", completed_trip, "It is completed; there is nothing to do."),
    ("retry", driven_trip, "It has not ended: it is running."),
    ("recover", driven_trip, "It is being driven by web-2:4711"),
    ("recover", pending_trip, "It waits, and goes on by itself in"),
    ("recover", stuck_trip, "It has ended, as stuck; retry it."),
    ("cancel", stuck_trip, "It has ended, as stuck; retry it."),
    ("recover", resolved_trip, "It has ended, as stuck, and was dealt with already."),
    ("recover", retried_trip, "It has ended, as failed, and was dealt with already."),
    ("resume_forward", stuck_trip, "It is stuck, and never goes forward again."),
    ("skip", failed_trip, "It is failed, and never goes forward again."),
    ("mark_done", driven_trip, "It is being driven by web-2:4711"),
    ("edit_context", lost_trip, "its context_editable is False"),
    ("release", lost_trip, "Nobody holds it"),
    ("resolve", failed_trip, "It has ended, as failed; retry it."),
    ("abandon", completed_trip, "It is completed"),
]


@pytest.mark.parametrize(("verb", "make", "why"), IMPOSSIBLE)
def test_what_is_not_possible_is_not_asked_but_explained(
    verb: str, make: Callable[[], SagaExecution], why: str, operator: Client
) -> None:
    execution = make()
    content = page(operator, one(execution, verb))
    assert why in text_of(content)
    assert 'name="token"' not in content
    assert one(execution, verb) not in page(operator, one(execution))
    data = {"token": execution.token, "reason": "all the same", "step": "Pack", "context": "{}"}
    data |= {"confirm": str(execution.pk), "standing": ["Pack"]}
    before = SagaExecution.objects.values().get()
    response = operator.post(one(execution, verb), data)
    assert response.status_code == 200
    assert SagaExecution.objects.values().get() == before
    assert not SagaAuditEntry.objects.filter(result="done").exists()


BUTTONS = {
    "completed": (completed_trip, set()),
    "failed": (failed_trip, {"retry"}),
    "stuck": (stuck_trip, {"retry", "mark_done", "resolve"}),
    "stuck forward": (
        stuck_forward,
        {"retry", "resume_forward", "skip", "mark_done", "resolve"},
    ),
    "editable": (guarded_trip, {"retry", "mark_done", "edit_context", "resolve"}),
    "driven": (driven_trip, {"cancel", "release"}),
    "lost": (lost_trip, {"recover", "cancel", "skip", "mark_done", "abandon"}),
    "waiting": (pending_trip, {"cancel", "skip", "mark_done", "abandon"}),
}


def buttons(client: Client, execution: SagaExecution) -> set[str]:
    content = page(client, one(execution))
    return {verb for verb in VERBS if f'href="{one(execution, verb)}"' in content}


@pytest.mark.parametrize("name", BUTTONS)
def test_the_buttons_are_the_verbs_that_are_possible(name: str, operator: Client) -> None:
    make, possible = BUTTONS[name]
    assert buttons(operator, make()) == possible


@pytest.mark.parametrize("right", ["retry", "recover", "cancel", "force"])
def test_the_buttons_are_the_verbs_that_are_permitted(right: str) -> None:
    client = staff("view", right)
    for make, possible in BUTTONS.values():
        permitted = {v for v in possible if VERBS[v].right == right} - {"edit_context"}
        assert buttons(client, make()) == permitted


# Who may


@pytest.mark.parametrize(("verb", "make", "arguments", "said", "status"), DEEDS)
def test_without_its_permission_a_verb_is_neither_shown_nor_done_and_that_is_audited(
    verb: str,
    make: Callable[[], SagaExecution],
    arguments: Arguments,
    said: str,
    status: str,
) -> None:
    execution = make()
    others = {"retry", "recover", "cancel", "force", "pause", "export"} - {VERBS[verb].right}
    client = staff("view", "view_context", "view_traceback", *others)
    before = SagaExecution.objects.values().get()
    assert client.get(one(execution, verb)).status_code == 403
    assert not SagaAuditEntry.objects.exists()
    data = {"token": execution.token, "reason": "please", **arguments(execution)}
    assert client.post(one(execution, verb), data).status_code == 403
    assert SagaExecution.objects.values().get() == before
    entry = SagaAuditEntry.objects.get()
    assert (entry.result, entry.execution_id) == ("refused", execution.pk)
    blind = staff(VERBS[verb].right)
    assert blind.get(one(execution, verb)).status_code == 403
    assert blind.post(one(execution, verb), data).status_code == 403
    assert SagaExecution.objects.values().get() == before


def test_who_may_not_see_contexts_may_not_edit_them() -> None:
    execution = guarded_trip()
    client = staff("view", "force")
    assert client.get(one(execution, "edit_context")).status_code == 403
    assert client.post(one(execution, "edit_context"), {"context": "{}"}).status_code == 403
    assert SagaAuditEntry.objects.get().result == "refused"


@pytest.mark.parametrize("verb", VERBS)
def test_without_a_csrf_token_no_verb_is_done(verb: str) -> None:
    execution = lost_trip()
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    before = SagaExecution.objects.values().get()
    assert client.post(one(execution, verb), {"reason": "x"}).status_code == 403
    assert SagaExecution.objects.values().get() == before


def test_what_the_queryset_hides_is_not_there(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = lost_trip()
    rows = SagaExecution.objects.exclude(pk=execution.pk)
    monkeypatch.setattr(MODEL_ADMIN, "get_queryset", lambda request: rows.all())
    for verb in VERBS:
        assert operator.get(one(execution, verb)).status_code == 404
        assert operator.post(one(execution, verb), {"reason": "x"}).status_code == 404
    assert changed(execution).status == "RUNNING"


def test_the_projects_own_hook_decides_on_each_execution(
    operator: Client, settings: Settings
) -> None:
    mine, theirs = stuck_trip(), stuck_trip()
    settings.DJANGO_SAGA = {"AUTHORIZE": lambda user, verb, execution: execution.pk == mine.pk}
    assert buttons(operator, mine) == {"retry", "mark_done", "resolve"}
    assert buttons(operator, theirs) == set()
    assert posted(operator, theirs, "retry").status_code == 403
    assert changed(theirs).status == "STUCK"
    assert SagaAuditEntry.objects.get().result == "refused"
    assert posted(operator, mine, "retry").status_code == 302


# What is typed


def test_a_reason_is_asked_for_and_what_was_typed_is_kept(operator: Client) -> None:
    execution = stuck_trip()
    response = posted(operator, execution, "mark_done", reason=" ", step="Pack")
    assert "Say why: the audit keeps it." in text_of(response)
    assert re.search(r'<input[^>]*value="Pack"[^>]*checked', response.content.decode())
    assert changed(execution).status == "STUCK"
    assert posted(operator, execution, "retry", reason="").status_code == 302


def test_each_form_tells_by_its_label_alone_whether_it_needs_a_reason(operator: Client) -> None:
    """Pausing and resuming, which need none, are asked with the same form as the verbs."""
    waiting = pending_trip()
    paused = SagaPause.objects.create(saga=waiting.saga, step="Leave")
    needed = [one(waiting, verb) for verb in ("cancel", "skip", "mark_done", "abandon")]
    needed.append(f"{BASE}cancel/?status=all")
    pauses = "/admin/django_saga/sagapause/"
    optional = [one(failed_trip(), "retry"), f"{pauses}pause/", f"{pauses}{paused.pk}/resume/"]
    for address in (*needed, *optional):
        label = re.search(r'<label for="id_reason"([^>]*)>Reason:</label>', page(operator, address))
        assert label is not None, address
        assert label[1].strip() == ('class="required"' if address in needed else ""), address


def test_a_refusal_of_ours_is_told_on_the_form_which_keeps_the_reason(operator: Client) -> None:
    execution = changed(failed_trip(), saga="gone.Saga")
    response = posted(operator, execution, "retry", reason="Ticket 4711, as agreed")
    assert response.status_code == 200
    assert "No saga named 'gone.Saga' is registered" in text_of(response)
    assert "Ticket 4711, as agreed</textarea>" in response.content.decode()
    assert SagaAuditEntry.objects.get().result == "refused"
    assert not LogEntry.objects.exists()


def test_what_changed_since_it_was_seen_is_left_alone_until_it_is_seen_again(
    operator: Client,
) -> None:
    execution = lost_trip()
    address = one(execution, "cancel")
    page(operator, address)
    changed(execution, token=execution.token + 1)
    data = {"token": execution.token, "reason": "not wanted any more"}
    response = operator.post(address, data)
    assert "changed meanwhile" in text_of(response)
    assert changed(execution).status == "RUNNING"
    data["token"] = changed(execution).token
    assert operator.post(address, data).status_code == 302
    assert changed(execution).status == "FAILED"


def test_to_resolve_it_each_standing_effect_is_ticked(operator: Client) -> None:
    execution = stuck_trip()
    changed(execution, effects=[["Pack", "DONE", "FAILED"], ["Pay", "UNKNOWN", "FAILED"]])
    asked = text_of(page(operator, one(execution, "resolve")))
    assert "Pack: stands: it could not be undone" in asked
    assert "Pay: may stand: it could not be undone" in asked
    for ticked in ([], ["Pay"], ["Pay", "Leave"]):
        response = posted(operator, execution, "resolve", standing=ticked)
        assert ("Tick each effect" in text_of(response)) is ("Leave" not in ticked)
        assert response.status_code == 200
    assert changed(execution).settled_at is None
    assert posted(operator, execution, "resolve", standing=["Pay", "Pack"]).status_code == 302
    assert changed(execution).settled_at is not None


def test_to_abandon_it_its_id_is_typed(operator: Client) -> None:
    execution = lost_trip()
    for typed in ("", "yes", str(uuid.uuid4()), str(execution.pk)[:-1]):
        response = posted(operator, execution, "abandon", confirm=typed)
        assert ("That is not the id of this execution." in text_of(response)) is (typed != "")
        assert response.status_code == 200
        assert changed(execution).status == "RUNNING"
    assert posted(operator, execution, "abandon", confirm=f" {execution.pk} ").status_code == 302


def test_only_what_stands_can_be_marked_as_undone_by_hand(operator: Client) -> None:
    execution = stuck_trip()
    content = page(operator, one(execution, "mark_done"))
    assert re.findall(r'type="radio" name="step" value="(\w+)"', content) == ["Pack"]
    assert posted(operator, execution, "mark_done", step="Pay").status_code == 200
    assert changed(execution).status == "STUCK"


# Editing the context


def edit(client: Client, execution: SagaExecution) -> dict[str, Any]:
    """What the form shows."""
    content = page(client, one(execution, "edit_context"))
    area = re.search(r'<textarea name="context".*?>(.*?)</textarea>', content, re.DOTALL)
    assert area is not None
    shown: dict[str, Any] = json.loads(html.unescape(area[1]))
    return shown


def test_a_context_is_edited_masked_and_what_stays_masked_is_kept(operator: Client) -> None:
    execution = guarded_trip()
    shown = edit(operator, execution)
    assert shown == {"traveller": "Ada", "seen": ["Pack", "Pay"], "passport": MASK}
    shown["traveller"] = "Grace"
    response = posted(operator, execution, "edit_context", context=json.dumps(shown))
    assert response.status_code == 302
    stored = json.loads(changed(execution).context)
    assert stored == {"traveller": "Grace", "seen": ["Pack", "Pay"], "passport": "P-4711-0815"}
    shown["passport"] = "P-1"
    assert posted(operator, execution, "edit_context", context=json.dumps(shown)).status_code == 302
    assert json.loads(changed(execution).context)["passport"] == "P-1"


WRONG = {
    "{": "This is no JSON",
    "": "This field is required",
    "[]": "This is no GuardedTrip",
    '{"traveller": 7}': "Expected `str`, got `int` - at `$.traveller`",
    f'{{"traveller": "{MASK}"}}': "There is a mask where nothing was masked",
    "[" * 100_000: "This is no JSON",
}


@pytest.mark.parametrize("typed", WRONG)
def test_what_is_no_such_context_is_told_and_what_was_typed_is_kept(
    typed: str, operator: Client
) -> None:
    execution = guarded_trip()
    response = posted(operator, execution, "edit_context", context=typed, reason="the wrong name")
    assert WRONG[typed] in text_of(response)
    assert f"{html.escape(typed)}</textarea>" in response.content.decode()
    assert "the wrong name</textarea>" in response.content.decode()
    assert changed(execution).context == execution.context
    assert not SagaAuditEntry.objects.exists()


def test_no_hostile_text_becomes_markup_on_any_form(operator: Client) -> None:
    columns = ("saga", "driver", "stuck_reason", "error_message", "step", "failed_step")
    for make in (stuck_trip, lost_trip, driven_trip):
        execution = changed(make(), **dict.fromkeys(columns, HOSTILE[:90]))
        changed(execution, plan=[[HOSTILE[:90]]], effects=[[HOSTILE[:90], "DONE", "FAILED"]])
        for verb in VERBS:
            data = {"token": execution.token, "reason": HOSTILE, "confirm": HOSTILE}
            answers = [operator.get(one(execution, verb))]
            answers.append(operator.post(one(execution, verb), {**data, "context": HOSTILE}))
            for answer in answers:
                content = answer.content.decode()
                assert "<script>alert" not in content
                assert "<b>" not in content
                assert '" onload' not in content


@pytest.mark.parametrize("verb", VERBS)
def test_a_form_is_stored_nowhere_and_holds_nothing_that_a_strict_policy_refuses(
    verb: str, operator: Client
) -> None:
    for make in (guarded_trip, lost_trip, failed_trip):
        response = operator.get(one(make(), verb))
        assert "no-store" in response["Cache-Control"]
        assert not re.search(
            r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)|javascript:", response.content.decode()
        )
