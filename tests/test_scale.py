"""The screens and the statements on many executions: their plans, and how many there are."""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from io import StringIO
from typing import Any
from urllib.parse import parse_qsl, quote
from uuid import uuid4

import pytest
from django.contrib.auth import get_user_model
from django.core.management import CommandError, call_command
from django.db import connection, connections, transaction
from django.db.models import F
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from django_saga import Saga, batches, machine
from django_saga.models import SagaExecution, SagaFailureGroup, new_id
from django_saga.operations import RETRY
from django_saga.pruning import Retention, Stage, prune
from django_saga.storage import DjangoSagaStorage
from django_saga.verdicts import unsettled
from testproject.shop.crowd import gather
from tests.operated import lost_trip, run_trip
from tests.steps import Calls, make_step

EXECUTIONS, RECORDS = 30_000, 4
LARGE = ("django_saga_sagaexecution", "django_saga_sagasteprecord")
WAITING = 5_000  # of one saga, in the test of how another fares
MOST = 12  # queries that a page may make
CHEAP = 20_000.0  # planned cost: far less than reading the tables, far more than what is needed

pytestmark = pytest.mark.usefixtures("committing_databases", "crowd")


@pytest.fixture(scope="module")
def crowd(committing_databases: None, django_db_blocker: Any) -> Iterator[None]:
    with django_db_blocker.unblock():
        gather(EXECUTIONS, records=RECORDS)
        yield
        with connections["default"].cursor() as cursor:
            tables = ", ".join((*LARGE, "django_saga_sagafailuregroup"))
            cursor.execute(f"TRUNCATE {tables} CASCADE")


@pytest.fixture
def operator(client: Client) -> Iterator[Client]:
    users = get_user_model().objects
    user = users.create_superuser("crowd", "", "pw")
    client.force_login(user)
    yield client
    user.delete()


def changelist(model: str, query: str = "") -> str:
    return f"{reverse(f'admin:django_saga_{model}_changelist')}{query}"


def many(verb: str, query: str = "") -> str:
    return f"{reverse(f'admin:django_saga_sagaexecution_{verb}_many')}{query}"


def deep(query: str, way: str = "before") -> str:
    """The list from the middle of what it is about."""
    parts = dict(parse_qsl(query[1:]))
    rows = SagaExecution.objects.order_by("created_at", "pk")
    if group := parts.get("group"):
        rows = rows.filter(unsettled(), failure_group=group)
    elif parts["status"] != "all":
        rows = rows.filter(status=parts["status"])
    middle = rows[rows.count() // 2]
    key = quote(f"{middle.created_at.isoformat()},{middle.pk}")
    return changelist("sagaexecution", f"{query}&{way}={key}")


def of_many() -> Any:
    """A batch of all that is unsettled, done and looked at."""
    failed = SagaExecution.objects.filter(unsettled())
    batch = batches.create(RETRY, failed, user=None, reason="x", title="x", source="code")
    batch.items.update(state="done", result_id=F("execution_id"))
    return batch.pk


def pages() -> dict[str, Any]:
    """The path of every screen by its name; made late, since an id is in some of them."""

    def one(**which: Any) -> str:
        pk = SagaExecution.objects.filter(**which).values_list("pk", flat=True)[0]
        return reverse("admin:django_saga_sagaexecution_change", args=[pk])

    def group() -> str:
        return SagaFailureGroup.objects.values_list("pk", flat=True)[0]

    return {
        "list": lambda: changelist("sagaexecution"),
        "list of all": lambda: changelist("sagaexecution", "?status=all"),
        "list of the stuck": lambda: changelist("sagaexecution", "?status=STUCK"),
        "list of the failed": lambda: changelist("sagaexecution", "?status=FAILED"),
        "deep page": lambda: deep("?status=all"),
        "deep page, newer": lambda: deep("?status=all", "after"),
        "deep page of the failed": lambda: deep("?status=FAILED"),
        "deep page of a group": lambda: deep(f"?group={group()}&status=all"),
        "search": lambda: changelist("sagaexecution", f"?q={one(status='STUCK').split('/')[-3]}"),
        "stuck one": lambda: one(status="STUCK"),
        "completed one": lambda: one(status="COMPLETED"),
        "groups": lambda: changelist("sagafailuregroup"),
        "one group": lambda: reverse("admin:django_saga_sagafailuregroup_change", args=[group()]),
        "list of a group": lambda: changelist("sagaexecution", f"?group={group()}&status=all"),
        "dealt with in a group": lambda: changelist(
            "sagaexecution", f"?group={group()}&status=dealt-with"
        ),
        "dealt with": lambda: changelist("sagaexecution", "?status=dealt-with"),
        "what is stuck": lambda: changelist("sagaexecution", "?status=open-STUCK"),
        "what has failed": lambda: changelist("sagaexecution", "?status=open-FAILED"),
        "overview": lambda: reverse("admin:app_list", args=["django_saga"]),
        "running one": lambda: one(status="RUNNING"),
        "many": lambda: many("retry"),
        "many of all": lambda: many("retry", "?status=all"),
        "many of the failed": lambda: many("retry", "?status=FAILED"),
        "many to cancel": lambda: many("cancel", "?status=RUNNING"),
        "many of a group": lambda: many("retry", f"?group={group()}&status=all"),
        "batches": lambda: changelist("sagabatch"),
        "a batch": lambda: reverse("admin:django_saga_sagabatch_change", args=[of_many()]),
        "audit": lambda: changelist("sagaauditentry"),
        "pauses": lambda: changelist("sagapause"),
        "export": lambda: reverse("admin:django_saga_sagaexecution_export"),
    }


@pytest.mark.parametrize("name", list(pages()))
def test_a_screen_reads_little_however_many_there_are(operator: Client, name: str) -> None:
    path = pages()[name]()
    operator.get(path)  # what is cached for the process is cached now
    with CaptureQueriesContext(connection) as queries:
        response = operator.get(path)
    assert response.status_code == 200
    assert len(queries) <= MOST, [query["sql"][:150] for query in queries]
    for query in queries:
        assert not flaws(query["sql"]), query["sql"]
        assert " OFFSET " not in query["sql"]


@pytest.mark.parametrize("name", [name for name in pages() if name.startswith("deep page")])
def test_a_deep_page_reads_the_index_from_its_key_on(operator: Client, name: str) -> None:
    with CaptureQueriesContext(connection) as queries:
        operator.get(pages()[name]())
    (page,) = [q["sql"] for q in queries if q["sql"].endswith(" LIMIT 51")]
    begins = [line for line in plan_of(page) if "Index Cond" in line]
    assert any(re.search(r"created_at [<>]= '", line) for line in begins), plan_of(page)


COMMANDS = {
    "list": ["list"],
    "list of all": ["list", "--status", "all"],
    "list of the stuck": ["list", "--status", "stuck"],
    "list of a group": ["list", "--group", "{group}"],
    "groups": ["groups"],
    "show": ["show", "{stuck}"],
    "doctor": ["doctor"],
    "retry of a group": ["retry", "--group", "{group}", "--limit", "1", "--dry-run"],
    "retry of the stuck": ["retry", "--status", "stuck", "--limit", "1", "--dry-run"],
    "recover": ["recover", "--status", "overdue", "--limit", "1", "--dry-run"],
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_reads_little_however_many_there_are(name: str) -> None:
    stuck = SagaExecution.objects.filter(status="STUCK")[0]
    names = {"stuck": str(stuck.pk), "group": stuck.failure_group}
    arguments = [argument.format(**names) for argument in COMMANDS[name]]
    with CaptureQueriesContext(connection) as queries, suppress(CommandError):
        call_command("sagas", *arguments, stdout=StringIO())
    assert len(queries) > 0
    for query in queries:
        assert not flaws(query["sql"]), query["sql"]


@pytest.mark.parametrize("lease", [60.0, None], ids=["claim", "list"])
def test_a_sweep_reads_only_what_is_active(lease: float | None) -> None:
    storage = DjangoSagaStorage()
    with CaptureQueriesContext(connection) as queries:
        assert storage.due(20, driver="crowd", lease=lease) == []
    (query,) = queries
    assert not flaws(query["sql"]), query["sql"]


@pytest.mark.parametrize("address", ["", "sagaexecution/?status=RUNNING"])
def test_what_is_active_is_found_without_reading_what_has_ended(
    operator: Client, address: str
) -> None:
    """Though a third was, as the planner believes still, and nothing is."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {LARGE[0]} SET status = 'RUNNING' WHERE id IN "
            f"(SELECT id FROM {LARGE[0]} WHERE status = 'COMPLETED' LIMIT {EXECUTIONS // 3})"
        )
        cursor.execute(f"ANALYZE {LARGE[0]}")
        active = SagaExecution.objects.filter(status__in=["PENDING", "RUNNING", "COMPENSATING"])
        active.update(status="COMPLETED")
        with CaptureQueriesContext(connection) as queries:
            assert operator.get(f"/admin/django_saga/{address}").status_code == 200
        ordered = [q["sql"] for q in queries if "'RUNNING'" in q["sql"] and "ORDER BY" in q["sql"]]
        for sql in ordered:
            if "COUNT(" not in sql:  # they say how far they count
                assert rows_read(sql) < EXECUTIONS / 10, sql
        transaction.set_rollback(True)
    assert ordered


@pytest.mark.parametrize("others", [True, False], ids=["beside the crowd", "alone"])
def test_a_sweep_finds_what_is_due_without_reading_what_waits_of_another_saga(others: bool) -> None:
    storage = DjangoSagaStorage()
    state = machine.start((("A",),), "", pending=True)
    with transaction.atomic():
        with connection.cursor() as cursor:
            if not others:  # then the index on the time alone leads to what waits, too
                cursor.execute(f"DELETE FROM {LARGE[1]}")
                cursor.execute(f"DELETE FROM {LARGE[0]}")
            storage.create_many("crowd.A", state, {uuid4(): "{}" for _ in range(WAITING)})
            storage.create_many("crowd.B", state, {uuid4(): "{}"})
            cursor.execute(f"ANALYZE {LARGE[0]}")
        with CaptureQueriesContext(connection) as queries:
            claims = storage.due(20, grace=60.0)
        assert Counter(claim.saga for claim in claims) == {"crowd.A": 19, "crowd.B": 1}
        for query in queries:
            assert rows_read(query["sql"]) < WAITING / 10, query["sql"]
        transaction.set_rollback(True)


@pytest.mark.parametrize("free", [False, True], ids=["full", "a place is free"])
def test_a_sweep_does_not_read_all_that_waits_for_a_place(free: bool) -> None:
    body = {"name": "crowd.Limited", "steps": [make_step("A", Calls())], "max_running": 1}
    saga = type("Limited", (Saga,), body)
    storage, state = DjangoSagaStorage(), machine.start(saga.definition.plan, "{}", pending=True)
    waiting = {uuid4(): "{}" for _ in range(WAITING)}
    with transaction.atomic():
        storage.create_many(saga.name, state, waiting, limit_keys=dict.fromkeys(waiting, ""))
        if not free:
            first = SagaExecution.objects.filter(saga=saga.name)[:1]
            SagaExecution.objects.filter(pk__in=first).update(
                slot=1, status="RUNNING", lease_until=timezone.now() + timedelta(hours=1)
            )
        with connection.cursor() as cursor:
            cursor.execute(f"ANALYZE {LARGE[0]}")
        with CaptureQueriesContext(connection) as queries:
            claims = storage.due(20, grace=60.0, saga=saga.name)
            waits = storage.next_waiting(saga.name, "", 10)
        assert (len(claims), len(waits)) == (free, free)
        for query in queries:
            assert rows_read(query["sql"]) < WAITING / 10, query["sql"]
        transaction.set_rollback(True)


def rows_read(sql: str) -> int:
    """How many rows of the executions a statement reads; what it does is undone."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}")
        ((plans,),) = cursor.fetchall()
        transaction.set_rollback(True)
    nodes, read = [plan["Plan"] for plan in plans], 0
    for node in nodes:
        nodes += node.get("Plans", [])
        if node.get("Relation Name") == LARGE[0] and node["Node Type"] != "ModifyTable":
            filtered = node.get("Rows Removed by Filter", 0)
            read += int(node["Actual Loops"] * (node["Actual Rows"] + filtered))
    return read


def test_a_sweep_reads_little_where_ten_thousand_are_due() -> None:
    storage = DjangoSagaStorage()
    with CaptureQueriesContext(connection) as queries:
        storage.due(20, driver="crowd", lease=60.0)
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {LARGE[0]} SET status = 'PENDING', finished_at = NULL WHERE id IN "
            f"(SELECT id FROM {LARGE[0]} WHERE status = 'COMPLETED' LIMIT 10000)"
        )
        cursor.execute(f"ANALYZE {LARGE[0]}")
        found = flaws(queries[0]["sql"])
        transaction.set_rollback(True)
    assert not found


@pytest.mark.parametrize("trouble", [{}, {"act_Leave": "fog"}], ids=["completed", "failed"])
def test_starting_and_checkpointing_touch_one_execution(trouble: dict[str, str]) -> None:
    with CaptureQueriesContext(connection) as queries:
        run_trip(**trouble)
    assert len(queries) >= 4
    for query in queries:
        assert not flaws(query["sql"]), query["sql"]


def test_a_lease_is_taken_renewed_and_given_back_by_the_primary_key() -> None:
    storage = DjangoSagaStorage()
    ids = [lost_trip().pk for _ in range(100)]
    with CaptureQueriesContext(connection) as queries:
        held = [(pk, storage.acquire(pk, driver="crowd", lease=60.0).token) for pk in ids]
        assert len(storage.renew(held, lease=60.0)) == 100
        storage.release(*held[0])
    assert len(queries) == 102
    for query in queries[99:]:
        assert not flaws(query["sql"]), query["sql"]


@pytest.mark.parametrize(
    ("sagas", "days"), [((), 29.8), (("shop.OrderSaga",), 29.6)], ids=["all", "one"]
)
def test_pruning_reads_only_what_it_prunes(sagas: tuple[str, ...], days: float) -> None:
    ages = {"delete_after": timedelta(days=days), "blank_after": timedelta(days=days - 0.3)}
    with CaptureQueriesContext(connection) as queries:
        assert {part.stage for part in prune(Retention(**ages, sagas=sagas))} == set(Stage)
    for query in queries:
        assert not flaws(query["sql"]), query["sql"]


def test_ids_are_in_order_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an index takes them at its end, and what was there long ago is not read for it."""
    began = time.time_ns()
    moments = [began + 1_000_000 * n for n in range(100)]
    monkeypatch.setattr(time, "time_ns", iter(moments).__next__)
    ids = [new_id() for _ in moments]
    assert ids == sorted(ids)
    assert ids[0].int >> 80 == began // 1_000_000
    assert {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}
    assert len({id.int & (1 << 62) - 1 for id in ids}) == 100


def test_a_plan_that_reads_a_whole_table_is_seen() -> None:
    assert flaws("SELECT count(*) FROM django_saga_sagasteprecord WHERE driver = 'x'")


def flaws(sql: str) -> list[str]:
    """What is wrong with the plan of a statement, which is not run."""
    if not sql.startswith(("SELECT", "WITH", "UPDATE")) or not any(t in sql for t in LARGE):
        return []
    plan = plan_of(sql)
    found = [line for line in plan for table in LARGE if f"Seq Scan on {table}" in line]
    cost = max(float(number) for number in re.findall(r"\.\.(\d+\.\d+)", plan[0]))
    return [*found, *([f"it costs {cost}"] if cost > CHEAP else [])]


def plan_of(sql: str) -> list[str]:
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN {sql}")
        return [line for (line,) in cursor.fetchall()]


def test_there_is_a_crowd() -> None:
    assert SagaExecution.objects.count() >= 0.9 * EXECUTIONS  # some were pruned
    assert SagaFailureGroup.objects.count() >= 20
