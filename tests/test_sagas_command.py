"""``manage.py sagas``: what it lists, tells and does, for whom, and with which exit status."""

from __future__ import annotations

import getpass
import io
import json
import re
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command

from django_saga.doctor import report
from django_saga.masking import MASK
from django_saga.models import (
    SagaAuditEntry,
    SagaExecution,
    SagaFailureGroup,
    SagaPause,
    SagaStepRecord,
)
from django_saga.operations import VERBS, pause
from django_saga.storage import DjangoSagaStorage
from tests.conftest import ROOT
from tests.operated import (
    WORLD,
    Trip,
    TripSaga,
    changed,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    guarded_trip,
    halted_trip,
    lost_trip,
    pending_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

SAGA = TripSaga.name
HOSTILE = "\x1b[2J\x1b]0;owned\x07 line\nforged: \u202e gpj\x00"


def said(*arguments: Any, status: int = 0) -> str:
    """What it writes to stdout, after a look at its exit status."""
    out = io.StringIO()
    told, why = 0, ""
    try:
        call_command("sagas", *map(str, arguments), stdout=out)
    except CommandError as error:
        told, why = error.returncode, str(error)
    assert told == status, (why, out.getvalue())
    return out.getvalue()


def answer(*arguments: Any, status: int = 0) -> dict[str, Any]:
    """Its one document."""
    out = said(*arguments, "--json", status=status)
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document


def usage(*arguments: Any) -> str:
    """What it says when it is used wrongly; nothing is done, and nothing is on stdout."""
    out = io.StringIO()
    with pytest.raises(CommandError) as caught:
        call_command("sagas", *map(str, arguments), stdout=out)
    assert out.getvalue() == ""
    return str(caught.value)


def user(*permissions: str) -> User:
    user = User.objects.create_user(f"u-{uuid.uuid4()}")
    names = [name if "_saga" in name else f"{name}_sagaexecution" for name in permissions]
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return user


def ids(document: dict[str, Any]) -> list[str]:
    return [row["id"] for row in document["executions"]]


def trail() -> list[tuple[str, str, str, str]]:
    entries = SagaAuditEntry.objects.order_by("pk")
    return list(entries.values_list("verb", "result", "source", "user_name"))


# Reading


def test_the_list_shows_what_needs_attention_newest_first() -> None:
    failed, stuck, lost = failed_trip(), stuck_trip(), lost_trip()
    completed_trip(), driven_trip(), pending_trip()
    assert ids(answer("list")) == [str(e.pk) for e in (lost, stuck, failed)]
    text = said("list")
    assert f"FAILED  {failed.pk}  {SAGA}  Pay  Sorry: no money" in text


def test_the_list_is_narrowed_by_each_filter() -> None:
    failed, stuck, done = failed_trip(), stuck_trip(), completed_trip()
    other = changed(failed_trip(), saga="old.Saga")
    assert set(ids(answer("list", "--status", "all"))) == {
        str(e.pk) for e in (failed, stuck, done, other)
    }
    assert ids(answer("list", "--status", "completed")) == [str(done.pk)]
    assert ids(answer("list", "--saga", "old.Saga")) == [str(other.pk)]
    assert set(ids(answer("list", "--step", "Pay"))) == {str(failed.pk), str(other.pk)}
    assert ids(answer("list", "--group", stuck.failure_group)) == [str(stuck.pk)]
    cut = answer("list", "--limit", "2")
    assert (len(cut["executions"]), cut["more"]) == (2, True)
    assert "There are more" in said("list", "--limit", "2")


def test_the_list_says_so_when_there_is_nothing() -> None:
    assert said("list") == "Nothing.\n"
    assert answer("list") == {"executions": [], "more": False}


def test_show_tells_what_happened_what_stands_and_who_did_what() -> None:
    stuck = stuck_trip()
    said("retry", stuck.pk, "--dry-run")
    assert not SagaAuditEntry.objects.exists()
    WORLD.trouble = {"compensate Pack": "still lost"}
    said("retry", stuck.pk, "--reason", "found it")
    document = answer("show", stuck.pk)
    assert document["standing"] == ["Pack"]
    assert document["execution"]["status"] == "STUCK"
    assert {step["step"]: step["kind"] for step in document["steps"]}["Pay"] == "undone"
    assert document["history"][-1]["error_message"] == "still lost"
    assert [entry["reason"] for entry in document["audit"]] == ["found it"]
    assert set(document["possible"]) == {"retry", "resolve", "mark_done"}
    text = said("show", stuck.pk)
    assert (
        "\nError: compensate of Pack: Sorry: still lost\nError: act of Leave: Sorry: fog\n" in text
    )
    for part in ("Next: It waits for you.", "stand, or may stand: Pack", "“found it”", "mark-done"):
        assert part in text


def test_show_offers_to_edit_a_context_only_where_the_saga_allows_it() -> None:
    assert "edit_context" in answer("show", guarded_trip().pk)["possible"]
    assert "edit-context" not in said("show", stuck_trip().pk)


def test_show_names_the_retry_of_a_failed_one() -> None:
    failed = failed_trip()
    new = answer("retry", failed.pk)["results"][0]["result_id"]
    document = answer("show", failed.pk)
    assert [retry["id"] for retry in document["retries"]] == [new]
    assert document["execution"]["settled_at"] is not None


def test_show_says_that_an_attempt_without_an_error_was_interrupted() -> None:
    assert "\nError: act of Pack: interrupted\n" in said("show", halted_trip().pk)


def test_without_a_subcommand_it_names_them_all() -> None:
    why = usage()
    assert re.search(r"list, show, groups.*doctor, retry.*mark-done.*pause, resume\. .*--help", why)


def test_a_database_without_our_tables_is_told_with_what_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SagaExecution._meta, "db_table", "django_saga_not_there")
    with pytest.raises(CommandError, match=r"no tables of django-saga.* run: manage\.py migrate"):
        call_command("sagas", "list")


def test_show_of_an_unknown_id_fails() -> None:
    assert said("show", uuid.uuid4(), status=1) == ""


def test_a_context_is_shown_only_when_asked_for_masked_and_audited() -> None:
    failed = failed_trip(traveller="Ada")
    assert "context" not in answer("show", failed.pk)
    assert set(answer("show", failed.pk, "--context")["context"]) == {"traveller", "seen"}
    assert trail() == [("view_context", "done", "command", getpass.getuser())]
    name = user("view").username
    said("show", failed.pk, "--context", "--user", name, status=1)
    assert trail()[-1] == ("view_context", "refused", "command", name)
    may = user("view", "view_context").username
    assert "Context:" in said("show", failed.pk, "--context", "--user", may)


def test_groups_count_what_nobody_has_dealt_with() -> None:
    failed = [failed_trip() for _ in range(3)]
    stuck_trip()
    groups = answer("groups")["groups"]
    assert {group["id"]: group["count"] for group in groups}[failed[0].failure_group] == 3
    assert len(groups) == 2
    said("retry", *(e.pk for e in failed))
    assert [group["count"] for group in answer("groups")["groups"]] == [1]
    assert said("groups").startswith("1  ")


def test_text_from_outside_neither_ends_a_line_nor_steers_the_terminal() -> None:
    failed = changed(failed_trip(), error_message=HOSTILE.replace("\0", ""), error_type="E\r\nX")
    SagaFailureGroup.objects.update(message=HOSTILE.replace("\0", ""))
    said("retry", failed.pk, "--reason", HOSTILE.replace("\0", ""))
    for what in (["list", "--status", "all"], ["show", failed.pk], ["groups"], ["audit"]):
        text = said(*what)
        assert all(char == "\n" or char.isprintable() for char in text)
        assert "\nforged" not in text
    assert answer("list", "--status", "failed")["executions"][0]["error_type"] == "E\r\nX"


# Doing


DOING: list[tuple[str, Any, list[str], str]] = [
    ("retry", failed_trip, [], "COMPLETED"),
    ("retry", stuck_trip, [], "FAILED"),
    ("recover", lost_trip, [], "COMPLETED"),
    ("cancel", due_trip, [], "FAILED"),
    ("skip", lost_trip, [], "COMPLETED"),
    ("mark-done", stuck_trip, ["Pack"], "FAILED"),
    ("release", driven_trip, [], "RUNNING"),
    ("resolve", stuck_trip, ["--standing", "Pack"], "STUCK"),
    ("abandon", due_trip, ["--confirm", "{id}"], "STUCK"),
]


@pytest.mark.parametrize(("verb", "make", "more", "status"), DOING)
def test_each_verb_does_what_it_says_and_is_audited(
    verb: str, make: Any, more: list[str], status: str
) -> None:
    execution = make()
    more = [text.format(id=execution.pk) for text in more]
    before = rows()
    dry = answer(verb, execution.pk, *more, "--dry-run")
    assert (dry["results"][0]["result"], dry["possible"]) == ("possible", 1)
    assert rows() == before
    assert WORLD.calls == []
    document = answer(verb, execution.pk, *more, "--reason", "because")
    assert document["results"][0] | {"says": ""} == document["results"][0]
    assert (document["done"], document["refused"], document["failed"]) == (1, 0, 0)
    result = SagaExecution.objects.get(pk=document["results"][0]["result_id"])
    assert (document["results"][0]["status"], result.status) == (result.status, status)
    assert trail() == [(verb.replace("-", "_"), "done", "command", getpass.getuser())]
    assert SagaAuditEntry.objects.get().reason == "because"


def rows() -> list[dict[str, Any]]:
    """Everything that is stored."""
    models = (SagaExecution, SagaStepRecord, SagaAuditEntry, SagaPause)
    return [row for model in models for row in model.objects.order_by("pk").values()]


def test_every_verb_is_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call_command("sagas", "--help")
    text = capsys.readouterr().out
    for name in VERBS:
        assert f"    {name.replace('_', '-')} " in text


def test_a_stuck_one_that_had_not_turned_back_goes_forward() -> None:
    stuck = changed(
        lost_trip(), status="STUCK", lease_until=None, in_flight=False, stuck_reason="poison"
    )
    assert (
        answer("resume-forward", stuck.pk, "--reason", "x")["results"][0]["status"] == "COMPLETED"
    )


def test_a_context_is_edited_from_a_file_where_the_saga_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    due = pending_trip()
    file = tmp_path / "context.json"
    file.write_text('{"traveller": "Grace", "seen": []}')
    refused = answer("edit-context", due.pk, file, "--reason", "typo", status=1)
    assert "does not allow it" in refused["results"][0]["says"]
    monkeypatch.setattr(TripSaga, "context_editable", True)
    answer("edit-context", due.pk, file, "--reason", "typo")
    assert '"Grace"' in SagaExecution.objects.get(pk=due.pk).context
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"traveller": "Mary", "seen": []}'))
    answer("edit-context", due.pk, "-", "--reason", "typo")
    assert '"Mary"' in SagaExecution.objects.get(pk=due.pk).context
    assert "cannot be read" in usage("edit-context", due.pk, tmp_path / "none", "--reason", "x")


def test_what_is_shown_of_a_context_can_be_edited_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guarded = guarded_trip()
    shown = answer("show", guarded.pk, "--context")["context"]
    assert shown["passport"] == MASK
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(shown | {"traveller": "Grace"})))
    answer("edit-context", guarded.pk, "-", "--reason", "typo")
    stored = json.loads(SagaExecution.objects.get(pk=guarded.pk).context)
    assert (stored["traveller"], stored["passport"]) == ("Grace", "P-4711-0815")


def test_what_failed_between_two_steps_is_told_so() -> None:
    trip = TripSaga(storage=DjangoSagaStorage())
    with suppress(KeyError), trip.transaction(Trip()) as transaction:
        for _ in transaction:
            raise KeyError("mine")
    assert "between two steps of tests.TripSaga" in said("groups")


def test_several_are_done_and_one_that_is_refused_makes_the_exit_status_1() -> None:
    failed, done = failed_trip(), completed_trip()
    missing = uuid.uuid4()
    document = answer("retry", failed.pk, done.pk, missing, status=1)
    assert [result["result"] for result in document["results"]] == ["done", "refused", "refused"]
    assert "is completed" in document["results"][1]["says"]
    assert (document["done"], document["refused"]) == (1, 2)
    assert [entry[:2] for entry in trail()] == [
        ("retry", "done"),
        ("retry", "refused"),
        ("retry", "refused"),
    ]


def test_one_of_a_group_then_two_then_all() -> None:
    failed = [failed_trip() for _ in range(5)]
    other = failed_trip()
    changed(other, failure_group="f" * 32)
    group = failed[0].failure_group
    for limit, left in ((["--limit", "1"], 4), (["--limit", "2"], 2), ([], 0)):
        said("retry", "--group", group, "--rate", "0", *limit)
        settled = SagaExecution.objects.filter(settled_at=None, failure_group=group)
        assert settled.count() == left
    oldest = SagaAuditEntry.objects.order_by("pk").values_list("execution_id", flat=True)
    assert list(oldest) == [execution.pk for execution in failed]
    assert SagaExecution.objects.get(pk=other.pk).settled_at is None
    assert said("retry", "--group", group) == "retry: there was nothing to do.\n"


def test_filters_choose_only_what_the_verb_can_be_done_to() -> None:
    failed_trip(), completed_trip(), stuck_trip(), driven_trip()
    dry = answer("retry", "--saga", SAGA, "--dry-run")
    assert dry["possible"] == 2
    left = {entry["verdict"]: entry["number"] for entry in dry["left_alone"]}
    assert left == {"completed": 1, "active": 1}
    assert answer("retry", "--status", "stuck", "--rate", "0")["done"] == 1
    assert "left alone: 1 is completed" in said("retry", "--saga", SAGA, "--dry-run")


def test_what_changes_between_choosing_and_doing_is_left_alone() -> None:
    first, second = failed_trip(), failed_trip()

    def settle() -> None:
        WORLD.interlude = None
        changed(second, token=second.token + 1)

    WORLD.interlude = settle
    document = answer("retry", "--status", "failed", "--rate", "0", status=1)
    assert [result["result"] for result in document["results"]] == ["done", "refused"]
    assert "changed meanwhile" in document["results"][1]["says"]
    assert document["results"][0]["id"] == str(first.pk)


@pytest.mark.parametrize("verb", list(VERBS))
def test_a_user_without_the_permission_is_refused_and_audited(verb: str) -> None:
    makers = {"release": driven_trip, "cancel": due_trip, "abandon": due_trip, "recover": due_trip}
    execution = makers.get(verb, stuck_trip)()
    name = user("view").username
    arguments = {
        "mark_done": ["Pack"],
        "edit_context": [__file__],
        "resolve": ["--standing", "Pack"],
        "abandon": ["--confirm", str(execution.pk)],
    }
    more = [*arguments.get(verb, []), "--user", name, "--reason", "please"]
    before = SagaExecution.objects.values().get()
    command = verb.replace("_", "-")
    dry = answer(command, execution.pk, *more, "--dry-run", status=1)
    assert VERBS[verb].permission in dry["results"][0]["says"]
    assert trail() == []
    document = answer(command, execution.pk, *more, status=1)
    assert document["results"][0]["result"] == "refused"
    assert trail() == [(verb, "refused", "command", name)]
    assert SagaExecution.objects.values().get() == before


def test_a_user_with_the_permission_acts_under_that_name() -> None:
    name = user("view", "retry").username
    answer("retry", failed_trip().pk, "--user", name)
    assert trail() == [("retry", "done", "command", name)]


def test_who_may_not_see_executions_cannot_choose_them_by_a_filter() -> None:
    failed_trip()
    assert said("retry", "--saga", SAGA, "--user", user("retry").username, status=1) == ""


READING = [
    (["list"], "sagaexecution"),
    (["show", "{id}"], "sagaexecution"),
    (["groups"], "sagafailuregroup"),
    (["pauses"], "sagapause"),
    (["audit"], "sagaauditentry"),
]


@pytest.mark.parametrize(("arguments", "model"), READING)
def test_a_user_sees_only_what_they_may(arguments: list[str], model: str) -> None:
    arguments = [text.format(id=failed_trip().pk) for text in arguments]
    assert said(*arguments, "--user", user("retry").username, status=1) == ""
    assert said(*arguments, "--user", user(f"view_{model}").username)


def test_an_error_that_nobody_foresaw_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken, sound = failed_trip(), failed_trip()
    monkeypatch.setattr(
        "django_saga.operations.retrying.retry_id",
        lambda id: 1 / 0 if id == broken.pk else uuid.uuid4(),
    )
    document = answer("retry", broken.pk, sound.pk, status=1)
    assert [result["result"] for result in document["results"]] == ["failed", "done"]
    assert document["results"][0]["says"].startswith("ZeroDivisionError")


# Pausing


def test_a_saga_and_a_step_are_paused_listed_and_resumed() -> None:
    dry = answer("pause", SAGA, "--dry-run")
    assert (dry["result"], SagaPause.objects.count()) == ("possible", 0)
    assert answer("pause", SAGA, "Pay", "--reason", "bank is down")["result"] == "done"
    assert answer("pause", SAGA, "Pay", status=1)["result"] == "refused"
    listed = answer("pauses")["pauses"]
    assert [(p["saga"], p["step"], p["reason"]) for p in listed] == [(SAGA, "Pay", "bank is down")]
    assert listed[0]["user_name"] == getpass.getuser()
    assert "bank is down" in said("pauses")
    assert answer("resume", SAGA, "Pay")["result"] == "done"
    assert "is not paused" in said("resume", SAGA, "Pay", status=1)
    assert said("pauses") == "Nothing.\n"
    assert [entry[:3] for entry in trail()] == [
        ("pause", "done", "command"),
        ("pause", "refused", "command"),
        ("resume", "done", "command"),
        ("resume", "refused", "command"),
    ]


def test_a_pause_takes_its_permission() -> None:
    assert answer("pause", SAGA, "--user", user("view").username, status=1)["result"] == "refused"
    assert answer("pause", SAGA, "--user", user("pause").username)["result"] == "done"


def test_what_is_paused_is_not_recovered() -> None:
    due = due_trip()
    pause(SAGA)
    assert "is paused" in said("recover", due.pk, "--dry-run", status=1)


# The audit


def test_the_audit_is_listed_newest_first_and_by_execution() -> None:
    first, second = failed_trip(), failed_trip()
    said("retry", first.pk, "--reason", "one")
    said("retry", second.pk, "--reason", "two")
    assert [entry["reason"] for entry in answer("audit")["entries"]] == ["two", "one"]
    assert [entry["reason"] for entry in answer("audit", first.pk)["entries"]] == ["one"]
    cut = answer("audit", "--limit", "1")
    assert ([entry["reason"] for entry in cut["entries"]], cut["more"]) == (["two"], True)
    assert f"({'command'})  retry  done  {first.pk}" in said("audit", first.pk)


# Usage


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["retry"], "Name executions, or choose them"),
        (["retry", "--saga", SAGA, str(uuid.uuid4())], "Name executions, or choose them"),
        (["retry", str(uuid.uuid4()), "--limit", "1"], "--limit goes with filters"),
        (["retry", "--status", "bad"], "must be one of"),
        (["retry", "nonsense"], "no id of an execution"),
        (["cancel", str(uuid.uuid4())], "cancel needs a --reason"),
        (["cancel", str(uuid.uuid4()), "--reason", "  "], "cancel needs a --reason"),
        (["abandon", str(uuid.uuid4()), "--reason", "x"], "--confirm"),
        (["resolve", str(uuid.uuid4()), "--reason", "x"], "--standing"),
        (["mark-done", str(uuid.uuid4())], "STEP"),
        (["skip", "--reason", "x"], "ID"),
        (["list", "--limit", "0"], "whole number"),
        (["list", "--user", "nobody"], "No user is named 'nobody'"),
        (["retry", str(uuid.uuid4()), "--rate", "nan"], "number from 0 up"),
        (["explode"], "invalid choice"),
        ([], "subcommand"),
    ],
)
def test_wrong_usage_is_told_and_nothing_is_done(arguments: list[str], why: str) -> None:
    assert why in usage(*arguments)
    assert trail() == []


def test_exit_statuses_of_the_process(child_environment: dict[str, str]) -> None:
    failed, missing = failed_trip(), str(uuid.uuid4())

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "django", "sagas", *arguments]
        done = subprocess.run(command, env=child_environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    status, out = run("show", str(failed.pk), "--json")
    assert (status, json.loads(out)["execution"]["status"]) == (0, "FAILED")
    assert run("show", missing, "--json") == (1, "")
    assert run("retry", "--json") == (2, "")
    assert run("list", "--user", "nobody")[0] == 2


def test_secrets_are_shown_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter22hunter"
    failed = failed_trip()
    context = json.dumps({"traveller": "Ada", "api_key": secret})
    texts = {"error_message": f"password={secret}", "stuck_reason": f"token={secret}"}
    changed(failed, context=context, **texts)
    SagaFailureGroup.objects.update(message=f"password={secret}")
    said("retry", failed.pk, "--reason", f"password={secret}")
    for what in (["list", "--status", "all"], ["show", failed.pk, "--context"], ["audit"]):
        assert secret not in said(*what)
        assert secret not in said(*what, "--json")
    changed(failed, saga="gone.Saga")
    assert set(answer("show", failed.pk, "--context")["context"].values()) == {"********"}


def test_every_key_of_the_documents_is_documented() -> None:
    text = (ROOT / "docs" / "commands.rst").read_text()
    documented = set(re.findall(r"``(\w+)``", text))
    failed = failed_trip()
    answer("retry", failed.pk)
    pause(SAGA)
    asked = [
        ["list", "--status", "all"],
        ["show", failed.pk],
        ["groups"],
        ["pauses"],
        ["audit"],
        ["retry", "--saga", SAGA, "--dry-run"],
        ["resume", SAGA, "--dry-run"],
    ]
    stuck_trip()
    for arguments in asked:
        assert keys(answer(*arguments)) - documented == set(), arguments
    findings = report()["findings"]
    assert {finding["name"] for finding in findings} - documented == set()


def keys(value: Any) -> set[str]:
    """Every key in it, at whatever depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


def test_what_was_cancelled_on_purpose_is_retried_by_its_own_id_alone() -> None:
    cancelled = due_trip()
    said("cancel", cancelled.pk, "--reason", "ordered twice")
    said("retry", "--saga", cancelled.saga, "--reason", "all of them")
    assert not SagaExecution.objects.filter(retry_of=cancelled.pk).exists()
    assert "cancelled on purpose" in said("show", cancelled.pk)
    said("retry", cancelled.pk, "--reason", "wanted after all")
    assert SagaExecution.objects.filter(retry_of=cancelled.pk).exists()


def test_what_is_misspelt_is_no_empty_answer() -> None:
    failed_trip()
    assert said("list", "--saga", "tests.NoSuchSaga", status=1) == ""
    assert said("retry", "--group", "nosuch", "--reason", "x", status=1) == ""
