"""The page of one execution in the admin."""

from __future__ import annotations

import html
import json
import re
import uuid
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.checks import run_checks
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils.timezone import now
from pytest_django import Settings

from django_saga import operations
from django_saga.admin.chain import chain_of
from django_saga.admin.frames import frames_of, own_frames
from django_saga.masking import MASK
from django_saga.models import SagaAuditEntry, SagaExecution, SagaPause, SagaStepRecord
from tests.operated import (
    TripSaga,
    changed,
    completed_trip,
    driven_trip,
    failed_trip,
    guarded_trip,
    lost_trip,
    pending_trip,
    stuck_trip,
)
from tests.settings import DATABASES
from tests.test_admin import HOSTILE, MODEL_ADMIN, log_in, one, page, staff
from tests.test_verbs import text_of

pytestmark = pytest.mark.usefixtures("alone")

SECRET = "P-4711-0815"


@pytest.fixture
def operator() -> Client:
    return log_in(User.objects.create_superuser("root"))


def lead(client: Client, execution: SagaExecution) -> str:
    content = page(client, one(execution)).split('class="saga-lead"')[1]
    return text_of(content.split("</section>")[0])


def section(client: Client, execution: SagaExecution, name: str) -> str:
    """The markup of one section, by its heading."""
    content = page(client, one(execution))
    return content.split(f"<h2>{name}</h2>")[1].split("</section>")[0]


def rows(table: str) -> list[list[str]]:
    """The cells of each row of a table's body."""
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in found]
    return [[text_of(cell).strip() for cell in row] for row in cells]


# What happened and what is next


def test_the_error_comes_before_the_effects_and_the_rest_after_them(operator: Client) -> None:
    content = page(operator, one(stuck_trip()))
    assert re.findall("<h2>(.*?)</h2>", content.split('id="content-main"')[1]) == [
        "Error",
        "Effects",
        "Plan",
        "History",
        "Context",
        "Lease and driver",
        "Who did what, and why",
    ]


def test_a_retry_that_is_waited_for_is_told_with_its_step_and_time(operator: Client) -> None:
    waiting = changed(lost_trip(), lease_until=None, in_flight=False, attempt=3)
    changed(waiting, wake_at=now() + timedelta(minutes=4, seconds=30))
    assert "Retry of Pack in 4 m, by itself: attempt 3." in lead(operator, waiting)
    changed(waiting, status="COMPENSATING", action="compensate")
    assert "The compensation of Pack is tried again in 4 m" in lead(operator, waiting)


@pytest.mark.parametrize("step", ["", "Pack"])
def test_a_pause_is_told_with_who_and_why(step: str, operator: Client) -> None:
    execution, ended = pending_trip(), completed_trip()
    assert "resumed" not in lead(operator, execution)
    SagaPause.objects.create(saga=TripSaga.name, step=step, user_name="ada", reason="no bank")
    said = lead(operator, execution)
    assert "Nothing more begins until tests.TripSaga" in said
    assert "ada paused it: no bank" in said
    SagaPause.objects.update(reason="")
    assert "is resumed; ada paused it. " in f"{lead(operator, execution)} "
    assert "resumed" not in lead(operator, ended)


def test_what_is_asked_to_be_cancelled_says_so_until_it_has_turned_back(operator: Client) -> None:
    execution = driven_trip()
    operations.cancel(execution.pk, reason="sold out")
    said = "It is to be cancelled, by code: sold out: it turns back when Pack has ended."
    assert said in lead(operator, execution)
    changed(execution, status="FAILED", lease_until=None, step="")
    assert "to be cancelled" not in lead(operator, execution)


def test_what_was_cancelled_or_settled_says_so(operator: Client) -> None:
    cancelled = pending_trip()
    operations.cancel(cancelled.pk, reason="sold out")
    assert "It was cancelled by code: sold out" in lead(operator, cancelled)
    settled = stuck_trip()
    operations.resolve(settled.pk, ["Pack"], reason="the bag was found")
    assert "It was settled by hand" in lead(operator, settled)


def test_the_list_shows_what_is_paused_and_what_is_to_be_cancelled(operator: Client) -> None:
    execution, ended = driven_trip(), failed_trip()
    address = "/admin/django_saga/sagaexecution/?status=all"
    assert "to be cancelled" not in page(operator, address)
    operations.cancel(execution.pk, reason="sold out")
    changed(ended, cancel_reason="too late")
    SagaPause.objects.create(saga=TripSaga.name)
    content = page(operator, address)
    assert content.count("to be cancelled") == 1
    assert content.count(">paused<") == 1


# Effects


def effects(client: Client, execution: SagaExecution) -> list[list[str]]:
    content = section(client, execution, "Effects")
    return [row[:2] for row in rows(content)] if "<tbody>" in content else []


EFFECTS = [
    (completed_trip, [[step, "done: it stands"] for step in ("Pack", "Pay", "Leave")]),
    (failed_trip, [["Pack", "undone"]]),
    (stuck_trip, [["Pack", "stands: it could not be undone"], ["Pay", "undone"]]),
    (lost_trip, [["Pack", "unknown: its driver was lost in it"]]),
    (driven_trip, [["Pack", "in its act now"]]),
    (pending_trip, []),
]


@pytest.mark.parametrize(("make", "expected"), EFFECTS)
def test_the_effects_that_stand_now_are_told(
    make: Any, expected: list[list[str]], operator: Client
) -> None:
    execution = make()
    assert effects(operator, execution) == expected
    standing = len([row for row in expected if row[1] != "undone"])
    said = text_of(section(operator, execution, "Effects"))
    assert ("No effect stands." in said) is (standing == 0)
    assert (f"{standing} effect" in said) is (standing > 0)


def test_an_effect_of_an_unknown_act_may_stand(operator: Client) -> None:
    execution = changed(stuck_trip(), effects=[["Pack", "UNKNOWN", "FAILED"], ["Pay", "UNKNOWN"]])
    assert effects(operator, execution) == [
        ["Pack", "may stand: it could not be undone"],
        ["Pay", "unknown: it may stand"],
    ]
    assert "2 effects stand, or may stand." in section(operator, execution, "Effects")


def test_attempts_are_counted_and_what_was_done_by_hand_is_marked(operator: Client) -> None:
    stuck, lost = stuck_trip(), lost_trip()
    table = rows(section(operator, stuck, "Effects"))
    assert re.fullmatch(r"1 attempt, [\d.e-]+ s", table[0][2])
    assert "by hand" not in " ".join(table[0])
    operations.mark_done(stuck.pk, "Pack", reason="carried it back")
    operations.mark_done(lost.pk, "Pack", reason="packed it myself")
    assert rows(section(operator, stuck, "Effects"))[0][3].startswith("marked as done by hand, 1")
    assert rows(section(operator, lost, "Effects"))[0][2].startswith("marked as done by hand")
    assert "by hand" not in " ".join(rows(section(operator, lost, "Effects"))[1])


# Errors


def test_the_error_of_a_compensation_comes_first_with_the_projects_own_frames(
    operator: Client,
) -> None:
    error = section(operator, stuck_trip(), "Error")
    told = text_of(error)
    assert told.index("Compensation of Pack: Sorry bag lost") < told.index("Leave: Sorry fog")
    frames = re.findall(r"<li><code>(.*?)</code>.*?<span[^>]*>(.*?)</span>", error)
    assert [where.rpartition("/")[2].split(":")[0] for _, where in frames] == ["operated.py"] * 4
    assert [code for code, _ in frames][:2] == [
        "WORLD.call()",
        "raise Sorry(self.trouble[call])",
    ]
    assert error.count("<details") == 2
    assert "<details open" not in error


def test_the_error_of_an_attempt_that_is_tried_again_is_told(operator: Client) -> None:
    execution = failed_trip()
    state = {"status": "RUNNING", "step": "Pay", "action": "act", "attempt": 2, "failed_step": ""}
    changed(execution, **state, error_type="", error_message="", finished_at=None)
    assert "Pay: Sorry no money" in text_of(section(operator, execution, "Error"))
    changed(execution, attempt=1, step="Leave")
    assert "<h2>Error</h2>" not in page(operator, one(execution))


def test_an_error_that_no_attempt_raised_is_told_all_the_same(operator: Client) -> None:
    execution = pending_trip()
    operations.cancel(execution.pk, reason="sold out")
    assert "Cancelled by code: sold out" in text_of(section(operator, execution, "Error"))


def test_tracebacks_take_their_own_permission(operator: Client) -> None:
    execution = stuck_trip()
    for client, sees in (
        (staff("view", "view_context", "retry", "force"), False),
        (staff("view", "view_traceback"), True),
        (operator, True),
    ):
        content = page(client, one(execution))
        assert ("Traceback (most recent call last)" in content) is sees
        assert ("raise Sorry(" in content) is sees
        assert ("Tracebacks take a permission" in content) is not sees
        assert "bag lost" in content


TRACEBACK = """Traceback (most recent call last):
  File "/srv/app/orders/sagas.py", line 12, in act
    charge(order)
    ~~~~~~^^^^^^^
  File "/srv/venv/lib/python3.12/site-packages/httpx/_client.py", line 3, in post
  File "/srv/app/orders/bank.py", line 7, in <lambda>
    raise Declined
orders.bank.Declined: File "x", line 9, in y

During handling of the above exception, another exception occurred:

  + Exception Group Traceback (most recent call last):
  |   File "/srv/app/orders/late.py", line 1, in late
  |     raise ExceptionGroup
"""


def test_a_traceback_is_taken_apart() -> None:
    told = [(f.file.rpartition("/")[2], f.line, f.function, f.code) for f in frames_of(TRACEBACK)]
    assert told == [
        ("sagas.py", "12", "act", "charge(order)"),
        ("_client.py", "3", "post", ""),
        ("bank.py", "7", "<lambda>", "raise Declined"),
        ("late.py", "1", "late", "raise ExceptionGroup"),
    ]
    assert [frame.function for frame in own_frames(TRACEBACK)] == ["late"]
    libraries = TRACEBACK.replace("/srv/app/orders/late.py", "/x/site-packages/late.py")
    assert [frame.function for frame in own_frames(libraries)] == ["act", "<lambda>"]
    for text in ("", "x", '  File "a.py", line 1', 'File "a", line 1, in f\n' * 3):
        frames_of(text)


# Contexts


def test_contexts_take_their_own_permission_and_are_masked(operator: Client) -> None:
    execution = guarded_trip()
    for client, sees in ((staff("view", "force", "view_traceback"), False), (operator, True)):
        content = page(client, one(execution))
        assert ("traveller" in content) is sees
        assert (MASK in content) is sees
        assert ("Contexts take a permission" in content) is not sees
        assert SECRET not in content


def test_all_of_a_context_is_masked_where_the_code_cannot_tell_what_is_sensitive(
    operator: Client,
) -> None:
    execution = changed(guarded_trip(), saga="gone.Saga")
    content = section(operator, execution, "Context")
    assert "Ada" not in content
    assert SECRET not in content


def test_an_unmasked_context_takes_a_post_that_is_audited() -> None:
    execution = guarded_trip()
    client = staff("view", "view_context")
    response = client.get(one(execution, "context"))
    assert response.status_code == 302
    assert not SagaAuditEntry.objects.exists()
    response = client.post(one(execution, "context"))
    assert SECRET in response.content.decode()
    assert "no-store" in response["Cache-Control"]
    entry = SagaAuditEntry.objects.get()
    assert (entry.verb, entry.result, entry.source) == ("view_context", "done", "admin")
    assert entry.execution_id == execution.pk
    assert "View the context unmasked" in page(client, one(execution))
    assert SECRET not in page(client, one(execution))


def test_who_may_not_see_contexts_gets_none_and_the_refusal_is_audited() -> None:
    execution = guarded_trip()
    assert staff("view", "force").post(one(execution, "context")).status_code == 403
    assert SagaAuditEntry.objects.get().result == "refused"
    assert staff("view_context").post(one(execution, "context")).status_code == 403
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    assert client.post(one(execution, "context")).status_code == 403
    assert SagaAuditEntry.objects.count() == 1


def test_an_unmasked_context_is_asked_of_the_queryset_and_the_projects_hook(
    operator: Client, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = guarded_trip()
    assert operator.post(one(execution, "context")).status_code == 200
    settings.DJANGO_SAGA = {"AUTHORIZE": lambda user, verb, execution: verb != "view_context"}
    assert operator.post(one(execution, "context")).status_code == 403
    monkeypatch.setattr(MODEL_ADMIN, "get_queryset", lambda request: SagaExecution.objects.none())
    assert operator.post(one(execution, "context")).status_code == 404


def test_what_each_step_changed_is_told_old_and_new(operator: Client) -> None:
    table = rows(section(operator, completed_trip(), "Context"))
    assert table == [
        ["→ Pack, 1.", "seen", "[]", '["Pack"]'],
        ["→ Pay, 1.", "seen", '["Pack"]', '["Pack", "Pay"]'],
        ["→ Leave, 1.", "seen", '["Pack", "Pay"]', '["Pack", "Pay", "Leave"]'],
    ]


def test_changes_are_masked_wherever_a_sensitive_value_turns_up(operator: Client) -> None:
    execution = guarded_trip()
    first, second = SagaStepRecord.objects.filter(execution=execution)[:2]
    SagaStepRecord.objects.filter(pk=first.pk).update(changes='{"passport": "P-77-NEW-1"}')
    told = json.dumps({"traveller": f"Ada {SECRET}", "new": "P-77-NEW-1"})
    SagaStepRecord.objects.filter(pk=second.pk).update(changes=told)
    table = rows(section(operator, execution, "Context"))
    assert table == [
        ["→ Pack, 1.", "passport", f'"{MASK}"', f'"{MASK}"'],
        ["→ Pay, 1.", "traveller", '"Ada"', f'"Ada {MASK}"'],
        ["new", "not set", f'"{MASK}"'],
    ]
    content = page(operator, one(execution))
    assert SECRET not in content
    assert "P-77-NEW-1" not in content


def test_an_edit_by_hand_is_among_the_changes(operator: Client) -> None:
    execution = guarded_trip()
    context = {**json.loads(execution.context), "traveller": "Grace", "passport": "P-1234-NEW"}
    user = User.objects.get(username="root")
    operations.edit_context(execution.pk, json.dumps(context), user=user, reason="a wrong name")
    table = rows(section(operator, execution, "Context"))
    assert ["root, by hand", "traveller", '"Ada"', '"Grace"'] in table
    for client in (operator, staff("view")):
        assert "P-1234-NEW" not in page(client, one(execution))
    assert "Grace" not in page(staff("view"), one(execution))


def test_what_is_no_json_among_the_changes_does_no_harm(operator: Client) -> None:
    execution = completed_trip()
    for spoilt in ("{", "[]", "7", '"x"', "null"):
        SagaStepRecord.objects.update(changes=spoilt)
        page(operator, one(execution))
        page(operator, one(changed(execution, initial_context=spoilt)))


# Who did what


def test_deeds_and_refusals_are_told_with_their_reasons_the_newest_twenty(
    operator: Client,
) -> None:
    execution = stuck_trip()
    SagaAuditEntry.objects.create(execution_id=uuid.uuid4(), verb="retry", reason="another one")
    for number in range(25):
        SagaAuditEntry.objects.create(
            execution_id=execution.pk,
            verb="retry",
            user_name="ada",
            reason=f"try {number}.",
            result="refused",
            detail="It is being driven.",
        )
    deeds = section(operator, execution, "Who did what, and why")
    assert re.findall(r"try (\d+)\.", deeds) == [str(n) for n in range(24, 4, -1)]
    assert "another one" not in deeds
    assert "ada: Retry refused try 24. It is being driven." in re.sub(" +:", ":", text_of(deeds))


def test_the_command_lines_are_those_of_the_buttons() -> None:
    execution = stuck_trip()
    said = text_of(section(staff("view", "retry"), execution, "Who did what, and why"))
    assert f"manage.py sagas show {execution.pk}" in said
    assert f"manage.py sagas retry {execution.pk} --reason" in said
    assert "sagas resolve" not in said


# Retries


def chained(number: int) -> list[SagaExecution]:
    """Executions of which each is a retry of the one before."""
    made = [failed_trip() for _ in range(2)]
    template, began = made.pop(), made[0].created_at
    for place in range(1, number):
        template.pk, template.retry_of = uuid.uuid4(), made[-1]
        template.created_at = began + timedelta(seconds=place)
        template.save(force_insert=True)
        made.append(SagaExecution.objects.get(pk=template.pk))
    return made


def chain(client: Client, execution: SagaExecution) -> list[str]:
    content = page(client, one(execution)).split('class="saga-chain"')
    if len(content) == 1:
        return []
    items = re.findall(r"<li>(.*?)</li>", content[1].split("</nav>")[0], re.DOTALL)
    return [
        "this" if "this one" in item else re.findall(r">([0-9a-f-]{36})<", item)[0]
        for item in items
    ]


def test_retries_are_a_chain_of_links_whatever_link_is_looked_at(operator: Client) -> None:
    made = chained(3)
    ids = [str(execution.pk) for execution in made]
    assert chain(operator, made[0]) == ["this", ids[1], ids[2]]
    assert chain(operator, made[1]) == [ids[0], "this", ids[2]]
    assert chain(operator, made[2]) == [ids[0], ids[1], "this"]
    assert "It was retried" in lead(operator, made[1])
    assert "It was retried" not in lead(operator, made[2])
    assert chain(operator, failed_trip()) == []


def test_of_a_long_chain_twenty_are_shown_around_the_one_that_is_looked_at(
    operator: Client,
) -> None:
    made = chained(45)
    ids = [str(execution.pk) for execution in made]
    for place, first in ((0, 0), (20, 10), (44, 25)):
        shown = chain(operator, made[place])
        assert shown == ["this" if n == place else ids[n] for n in range(first, first + 20)]


@pytest.mark.parametrize("alias", DATABASES)
def test_every_database_walks_the_chain(alias: str) -> None:
    first, second = (failed_trip(alias=alias) for _ in range(2))
    second = changed(second, retry_of=first)
    rows = SagaExecution.objects.using(alias)
    for execution in (first, second):
        assert [one.pk for one in chain_of(execution, rows.all())] == [first.pk, second.pk]


def test_a_chain_shows_only_what_the_user_may_see(
    operator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chained(3)
    rows = SagaExecution.objects.exclude(pk=made[2].pk)
    monkeypatch.setattr(MODEL_ADMIN, "get_queryset", lambda request: rows.all())
    assert chain(operator, made[0]) == ["this", str(made[1].pk)]


# Links


def test_links_lead_out_with_quoted_values_and_to_web_pages_only(
    operator: Client, settings: Settings
) -> None:
    execution = changed(stuck_trip(), driver="web 2:4711&x=<b>", step="Pack/1")
    settings.DJANGO_SAGA = {
        "LINKS": [
            ("Logs", "https://logs.example.com/?q={id}&saga={saga}&x={other}"),
            ("Traces", "http://traces.example.com/{step}?d={driver}"),
            ("Script", "javascript:alert('{id}')"),
            ("Placed", "{driver}://evil"),
            ("Odd", 7),
            "neither",
        ]
    }
    content = page(operator, one(execution))
    links = re.findall(r'<a href="([^"]*)" rel="noreferrer">(\w+)</a>', content)
    query = f"q={execution.pk}&saga=tests.TripSaga&x={{other}}"
    assert [(html.unescape(address), label) for address, label in links] == [
        (f"https://logs.example.com/?{query}", "Logs"),
        ("http://traces.example.com/Pack%2F1?d=web%202%3A4711%26x%3D%3Cb%3E", "Traces"),
    ]
    errors = [
        error.msg for error in run_checks(tags=["django_saga"]) if error.id == "django_saga.E002"
    ]
    assert len(errors) == 4
    assert "javascript:alert" in errors[0]
    (warning,) = [w.msg for w in run_checks(tags=["django_saga"]) if w.id == "django_saga.W004"]
    assert warning.endswith("&x={other}'), in which nothing fills in other.")


# Live


def test_only_what_goes_on_by_itself_is_looked_at_again(operator: Client) -> None:
    every = re.compile(r'id="content-main" class="saga" data-saga-every="(\d+)"')
    for make, seconds in ((driven_trip, "3"), (lost_trip, "3"), (pending_trip, "30")):
        content = page(operator, one(make()))
        assert every.findall(content) == [seconds]
        assert "django_saga/live.js" in content
    for make in (completed_trip, failed_trip, stuck_trip):
        content = page(operator, one(make()))
        assert not every.findall(content)
        assert "django_saga/live.js" not in content
    guarded = changed(guarded_trip(), status="COMPENSATING", lease_until=None)
    assert every.findall(page(operator, one(guarded)))
    unmasked = operator.post(one(guarded, "context")).content.decode()
    assert not every.findall(unmasked)


# All of it


def test_a_row_that_was_spoilt_is_told_and_nothing_can_be_done_to_it(operator: Client) -> None:
    execution = changed(stuck_trip(), effects=[["Pack", "PERHAPS"]])
    assert "Its row cannot be read, was it edited?" in page(operator, one(execution))
    for verb in operations.VERBS:
        response = operator.get(one(execution, verb))
        assert response["Location"] == one(execution)
    assert operator.post(one(execution, "context")).status_code == 302
    page(operator, "/admin/django_saga/sagaexecution/?status=all")


def test_the_page_of_the_longest_story_costs_twelve_queries_at_most(settings: Settings) -> None:
    """For a user whose permissions are read from the database, too."""
    settings.DJANGO_SAGA = {"LINKS": [("Logs", "https://logs.example.com/{id}")]}
    rights = ("view", "view_context", "view_traceback", "retry", "recover", "cancel", "force")
    client = staff(*rights)
    execution = chained(4)[2]
    state = {"status": "COMPENSATING", "step": "Pack", "action": "compensate", "attempt": 9}
    changed(execution, **state, settled_at=None, finished_at=None)
    record = failed_trip().records.first()
    SagaPause.objects.create(saga=TripSaga.name, reason="no bank")
    SagaAuditEntry.objects.create(execution_id=execution.pk, verb="cancel", user_name="ada")
    record.execution = execution
    for number in range(70):
        record.pk, record.attempt = None, number + 2
        record.outcome = "FAILED"
        record.save(force_insert=True)
    with CaptureQueriesContext(connection) as queries:
        page(client, one(execution))
    assert len(queries) <= 12, [query["sql"][:100] for query in queries]


def test_no_hostile_text_becomes_markup(operator: Client, settings: Settings) -> None:
    settings.DJANGO_SAGA = {"LINKS": [(HOSTILE, f"https://logs.example.com/{HOSTILE}?{{step}}")]}
    execution = stuck_trip(traveller=HOSTILE)
    columns = ("saga", "driver", "stuck_reason", "error_message", "error_type", "failed_step")
    changed(execution, **dict.fromkeys((*columns, "cancel_reason"), HOSTILE))
    changed(execution, plan=[[HOSTILE[:90]]], step=HOSTILE[:90])
    effects = [[HOSTILE[:90], "DONE", "FAILED"]]
    changed(execution, effects=effects, context=json.dumps({HOSTILE: HOSTILE}))
    names = ("error_type", "error_message", "driver", "step")
    told = json.dumps({HOSTILE: HOSTILE})
    frame = f'  File "/srv/{HOSTILE}.py", line 1, in {HOSTILE}\n    {HOSTILE}\n'
    SagaStepRecord.objects.update(**dict.fromkeys(names, HOSTILE[:90]), changes=told)
    SagaStepRecord.objects.update(traceback=frame.replace('"', "'").replace("'", '"', 2))
    SagaPause.objects.create(saga=HOSTILE, user_name=HOSTILE, reason=HOSTILE)
    texts = dict.fromkeys(("verb", "user_name", "reason", "detail"), HOSTILE[:30])
    SagaAuditEntry.objects.create(execution_id=execution.pk, result="refused", **texts)
    for status in ("STUCK", "RUNNING", "COMPENSATING", "FAILED"):
        changed(execution, status=status, finished_at=now())
        content = page(operator, one(execution))
        assert "<script>alert" not in content
        assert "<b>" not in content
        assert '" onload' not in content
        assert html.escape(HOSTILE[:20]) in content
