"""``recover_sagas``: what it takes, what it leaves alone, how it tells, and what it survives."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.core.management import CommandError, call_command
from django.db import OperationalError, connections, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from django_saga import Saga, machine
from django_saga.conf import conf
from django_saga.exceptions import InvalidSettings, SagaError, StorageUnavailable
from django_saga.flow import driver_name
from django_saga.keeper import keeper
from django_saga.models import SagaExecution, SagaStepRecord, new_id
from django_saga.recovery import (
    BATCH,
    HANDED_OVER,
    LEASE_LOST,
    Recovered,
    arecover_saga,
    recover_saga,
    sweep,
)
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage
from tests import recovery_sagas as sagas
from tests.tables import empty

ALIASES = list(django_settings.DATABASES)
PATIENCE = 60  # seconds until a condition that does not come about fails its test

# The test lets several go at the same moment, by closing their stdin.
CHILD = """
import sys
import django
django.setup()
import tests.recovery_sagas
from django.core.management import execute_from_command_line
sys.stdin.read()
execute_from_command_line(["manage.py", *sys.argv[1:]])
"""

Child = subprocess.Popen[str]
Start = Callable[..., Child]


@pytest.fixture(autouse=True)
def _empty_databases(committing_databases: None) -> None:
    empty(*ALIASES)


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The lines that handlers and backends wrote, in this process or in others."""
    path = tmp_path / "ledger"
    path.touch()
    monkeypatch.setenv("LEDGER", str(path))
    return lambda: path.read_text().splitlines()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a Gated saga waits for."""
    path = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(path))
    return path


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """For what a process writes, so that waiting for it can be given up."""
    return tmp_path / "said"


@pytest.fixture
def start(child_environment: dict[str, str], ledger: object) -> Iterator[Start]:
    """Starts manage.py with arguments in a process of its own; close its stdin to let it go."""
    children: list[Child] = []

    def started(*arguments: str, on: str = "default", **kwargs: Any) -> Child:
        names = {name: os.environ[name] for name in ("LEDGER", "GATE") if name in os.environ}
        environment = {
            **child_environment,
            **names,
            "DJANGO_SETTINGS_MODULE": "tests.recovery_settings",
            "RECOVER_ON": on,
            "RECOVER_WITH": json.dumps(kwargs.pop("settings", {})),
            **kwargs.pop("environment", {}),
        }
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            text=True,
            env=environment,
            **{**streams, **kwargs},
        )
        children.append(child)
        return child

    yield started
    for child in children:
        with child:
            child.kill()


@pytest.fixture
def recover(start: Start) -> Callable[..., tuple[int, str, str]]:
    """Runs recover_sagas in a process of its own: its exit status, stdout and stderr."""

    def recovered(*arguments: str, **kwargs: Any) -> tuple[int, str, str]:
        child = start("recover_sagas", *arguments, **kwargs)
        out, errors = child.communicate(timeout=PATIENCE)
        return child.returncode, out, errors

    return recovered


def interrupted(saga: type[Saga[Any]], alias: str = "default", **kwargs: Any) -> UUID:
    """An execution whose driver was lost in its first step."""
    return stored(saga, alias, **{"driver": "lost:1", "lease": 0.0, **kwargs})


def stored(saga: type[Saga[Any]], alias: str = "default", **kwargs: Any) -> UUID:
    state = machine.start(
        saga.definition.plan, '{"number": 1}', pending=kwargs.pop("pending", False)
    )
    name = kwargs.pop("name", saga.name)
    claim = DjangoSagaStorage(alias).create(new_id(), name, state, **kwargs)
    assert claim is not None
    return claim.id


def row(id: UUID, alias: str = "default") -> SagaExecution:
    return SagaExecution.objects.using(alias).get(pk=id)


def outcomes(id: UUID) -> list[str]:
    return [f"{r.action} {r.outcome}" for r in SagaStepRecord.objects.filter(execution=id)]


def statuses(alias: str = "default") -> Counter[str]:
    return Counter(SagaExecution.objects.using(alias).values_list("status", flat=True))


def run(*arguments: Any, **options: Any) -> str:
    """The command in this process; what it printed."""
    out = StringIO()
    call_command("recover_sagas", *arguments, stdout=out, **options)
    return out.getvalue()


def let_go(child: Child) -> None:
    assert child.stdin is not None
    child.stdin.close()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (answer := condition()):
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.02)
    return answer


# What is taken, and how


def test_an_interrupted_saga_is_driven_on_and_its_lost_attempt_is_recorded(
    ledger: Callable[[], list[str]],
) -> None:
    id = interrupted(sagas.Plain)
    assert run() == "1 execution: 1 COMPLETED.\n"
    assert outcomes(id) == ["act INTERRUPTED", "act DONE", "act DONE"]
    assert ledger() == [f"act Pack {id}", f"act Send {id}"]
    assert row(id).driver == driver_name()


def test_nothing_due_is_no_fault() -> None:
    assert run() == "Nothing was due.\n"


def test_who_has_just_killed_a_driver_is_told_of_its_lease() -> None:
    stored(sagas.Plain, driver="at:work", lease=36e6)
    what = (
        r"1 execution under a lease: driven now, or due once that is over, in (\d+) s at the latest"
    )
    found = re.fullmatch(rf"Nothing was due.\n{what}.\n", run())
    assert found is not None
    assert 35e6 < int(found[1]) <= 36e6
    assert run("--saga", sagas.Failing.name) == "Nothing was due.\n"


@pytest.mark.parametrize("alias", ["default", "sqlite"])
def test_one_statement_claims_a_batch(alias: str) -> None:
    """Beyond the checkpoints 40 executions cost one for each 20, after one that asks of which sagas
    something is due; the last of these finds no more."""
    for _ in range(40):
        interrupted(sagas.Plain, alias)
    with CaptureQueriesContext(connections[alias]) as queries:
        assert len(list(sweep(storage=DjangoSagaStorage(alias)))) == 40
    statements = [query["sql"] for query in queries.captured_queries]
    asked = [sql for sql in statements if "RECURSIVE" in sql]
    claims = [sql for sql in statements if "token = token + 1" in sql]
    checkpoints = [sql for sql in statements if " AND attempt = " in sql]
    assert (len(asked), len(claims)) == (3, 2)
    assert len(checkpoints) == 3 * 40  # the lost attempt and two steps
    rest = set(statements) - set(asked) - set(claims) - set(checkpoints)
    if alias == "default":
        assert not rest
    assert not [sql for sql in rest if "SELECT id" in sql]


def test_a_saga_of_which_many_wait_does_not_keep_another_waiting() -> None:
    for _ in range(100):
        interrupted(sagas.Plain)
    late = interrupted(sagas.Failing)
    driven = [recovered.saga_id for recovered in sweep()]
    assert driven.index(late) < 20
    assert len(driven) == 101


@pytest.mark.parametrize("alias", ALIASES)
def test_many_recoverers_at_once_drive_no_saga_twice(
    alias: str, start: Start, ledger: Callable[[], list[str]]
) -> None:
    ids: list[UUID] = []
    for _ in range(5):
        mine = [interrupted(sagas.Plain, alias) for _ in range(200)]
        ids += mine
        children = [start("recover_sagas", on=alias) for _ in range(4)]
        for child in children:
            let_go(child)
        for child in children:
            assert child.wait(PATIENCE) == 0
        calls = Counter(ledger())
        assert calls == Counter(f"act {step} {id}" for id in ids for step in ("Pack", "Send"))
        assert statuses(alias) == {"COMPLETED": len(ids)}
        rows = SagaExecution.objects.using(alias).filter(pk__in=mine)
        if len({*rows.values_list("driver", flat=True)}) > 1:
            return
    raise AssertionError("each time one of them did all the work, so that this showed nothing")


def test_a_saga_whose_enqueue_was_lost_is_swept_after_its_grace() -> None:
    lost = stored(sagas.Plain, pending=True)
    queued = stored(sagas.Plain, pending=True, grace=3600.0)
    run()
    assert (row(lost).status, row(queued).status) == ("COMPLETED", "PENDING")
    assert outcomes(lost) == ["act DONE", "act DONE"]


def test_a_waiting_retry_is_taken_when_it_is_due_and_not_before() -> None:
    waiting = row(sagas.Waiting().run(sagas.Parcel(1)).id)
    assert waiting.wake_at is not None
    assert run() == "Nothing was due.\n"
    SagaExecution.objects.update(wake_at=waiting.created_at)
    assert run() == "1 execution: 1 COMPLETED.\n"


def test_a_compensating_saga_only_compensates() -> None:
    id = interrupted(sagas.Failing)
    assert run() == "1 execution: 1 FAILED.\n"
    assert outcomes(id)[-2:] == ["act FAILED", "compensate DONE"]


def test_limit_takes_the_oldest() -> None:
    ids = [interrupted(sagas.Plain) for _ in range(3)]
    assert run("--limit", "2") == "2 executions: 2 COMPLETED.\n"
    assert [row(id).status for id in ids] == ["COMPLETED", "COMPLETED", "RUNNING"]


@pytest.mark.parametrize("limit", [1, BATCH + 1])
@pytest.mark.parametrize("backend", ["inprocess", "tests.recovery_sagas.LedgerBackend"])
def test_no_more_are_taken_than_the_limit(limit: int, backend: str, settings: Settings) -> None:
    settings.DJANGO_SAGA = {"BACKEND": backend}
    ids = [interrupted(sagas.Plain) for _ in range(BATCH + 2)]
    assert [recovered.saga_id for recovered in sweep(limit=limit)] == ids[:limit]


def test_only_those_of_a_name_are_handed_over(settings: Settings) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.LedgerBackend"}
    id, _ = interrupted(sagas.Plain), interrupted(sagas.Printing)
    assert [recovered.saga_id for recovered in sweep(saga=sagas.Plain.name)] == [id]


def test_saga_takes_only_those_of_that_name() -> None:
    interrupted(sagas.Plain)
    interrupted(sagas.Printing)
    assert run("--saga", sagas.Plain.name) == "1 execution: 1 COMPLETED.\n"
    assert statuses() == {"COMPLETED": 1, "RUNNING": 1}


def test_an_unknown_saga_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CommandError, match=r"No saga is named 'Nope'\. Known: .*saga_tests\.Plain"):
        run("--saga", "Nope")


@pytest.mark.parametrize("alias", ALIASES)
def test_what_is_due_can_be_read_without_touching_it(alias: str) -> None:
    id = interrupted(sagas.Plain, alias)
    stored(sagas.Plain, alias, lease=3600.0)
    before = list(SagaExecution.objects.using(alias).order_by("id").values())
    assert [claim.id for claim in DjangoSagaStorage(alias).due(10)] == [id]
    assert list(SagaExecution.objects.using(alias).order_by("id").values()) == before


def test_dry_run_lists_what_is_due_and_why() -> None:
    lost = interrupted(sagas.Plain)
    pending = stored(sagas.Printing, pending=True)
    before = list(SagaExecution.objects.order_by("id").values())
    out = run("--dry-run")
    plain, printing, summary = out.splitlines()
    assert plain.startswith(
        f"saga_tests.Plain {lost}  RUNNING, act of Pack: the lease of lost:1 ran"
    )
    assert printing.startswith(f"saga_tests.Printing {pending}  PENDING, act of Print: not begun")
    assert summary == "2 executions due; nothing was touched."
    document = json.loads(run("--dry-run", "--json"))
    assert [found["id"] for found in document["due"]] == [str(lost), str(pending)]
    assert list(SagaExecution.objects.order_by("id").values()) == before


def test_it_is_refused_inside_a_transaction() -> None:
    id = interrupted(sagas.Plain)
    with transaction.atomic(), pytest.raises(CommandError, match="transaction"):
        run()
    assert row(id).token == 1


# One execution, by its id


@pytest.fixture(params=["sync", "async"])
def recover_one(request: pytest.FixtureRequest) -> Callable[..., SagaExecution]:
    return recover_saga if request.param == "sync" else async_to_sync(arecover_saga)


@pytest.mark.parametrize("alias", [None, *ALIASES])
def test_an_execution_is_recovered_where_it_is_stored(
    alias: str | None, recover_one: Callable[..., SagaExecution]
) -> None:
    id = interrupted(sagas.Plain, alias or "default")
    storage = None if alias is None else DjangoSagaStorage(alias)
    execution = recover_one(str(id), storage=storage)
    assert (execution.id, execution.status) == (id, "COMPLETED")
    stored = row(id, alias or "default")
    assert (stored.status, stored.token, stored.driver) == ("COMPLETED", 2, driver_name())


def test_an_execution_in_memory_is_recovered_too(
    recover_one: Callable[..., SagaExecution],
) -> None:
    storage = MemorySagaStorage()
    state = machine.start(sagas.Plain.definition.plan, '{"number": 1}')
    claim = storage.create(new_id(), sagas.Plain.name, state, driver="lost:1", lease=0.0)
    assert claim is not None
    assert recover_one(claim.id, storage=storage).status == "COMPLETED"


def test_no_id_is_refused(recover_one: Callable[..., SagaExecution]) -> None:
    with pytest.raises(SagaError, match="not None"):
        recover_one(None)


# Handing over


def test_enqueue_without_workers_is_refused() -> None:
    with pytest.raises(CommandError, match="--enqueue needs workers, but the backend 'inprocess'"):
        run("--enqueue")


def test_a_backend_with_workers_is_told_once_until_the_grace_is_over(
    settings: Settings, ledger: Callable[[], list[str]]
) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.LedgerBackend"}
    ids = [interrupted(sagas.Plain) for _ in range(BATCH + 1)]
    assert run() == f"{BATCH + 1} executions: {BATCH + 1} {HANDED_OVER}.\n"
    assert ledger() == [f"handed over {id}" for id in ids]
    assert run("--enqueue") == "Nothing was due.\n"
    assert run("--inline") == "Nothing was due.\n"


def test_inline_drives_here_although_there_are_workers(settings: Settings) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.LedgerBackend"}
    interrupted(sagas.Plain)
    assert run("--inline") == "1 execution: 1 COMPLETED.\n"


def test_a_backend_that_cannot_be_told_is_a_fault_and_nothing_is_left_alone_for_it(
    settings: Settings,
) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.DeadBackend"}
    ids = [interrupted(sagas.Plain) for _ in range(3)]
    with pytest.raises(CommandError, match=f"{ids[0]} .*could not be driven: nobody answers"):
        run()
    assert [row(id).grace_until for id in ids] == [None, None, None]


def test_the_backend_is_told_which_saga_it_is_and_where_it_is_stored(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that is lost: its workers end it as STUCK."""
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.KeepingBackend"}
    told: list[Any] = []
    monkeypatch.setattr(sagas.KeepingBackend, "told", told)
    known = interrupted(sagas.Plain, "sqlite")
    lost = interrupted(sagas.Plain, "sqlite", name="gone.Saga")
    storage = DjangoSagaStorage("sqlite")
    recovered = sorted(sweep(storage=storage), key=lambda one: one.saga)  # of one millisecond
    assert recovered == [
        Recovered("gone.Saga", lost, HANDED_OVER),
        Recovered(sagas.Plain.name, known, HANDED_OVER),
    ]
    told.sort()
    assert told == [("gone.Saga", storage, lost, 0.0), (sagas.Plain.name, storage, known, 0.0)]


def test_a_sweep_ends_with_the_first_that_the_backend_cannot_be_told_of(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.DeadBackend"}
    first, *_ = [interrupted(sagas.Plain) for _ in range(BATCH + 1)]
    found = sweep()
    assert next(found) == Recovered(sagas.Plain.name, first, "RUNNING", "nobody answers")
    assert next(found, None) is None
    assert "nobody answers" in caplog.text


# Each isolated from the others


def test_a_lost_saga_and_a_lost_context_are_stuck_and_the_others_go_on() -> None:
    unknown = interrupted(sagas.Plain, name="gone.Saga")
    unreadable = interrupted(sagas.Plain)
    SagaExecution.objects.filter(pk=unreadable).update(context='{"number": "one"}')
    well = interrupted(sagas.Plain)
    with pytest.raises(CommandError) as raised:
        run()
    assert (row(unknown).status, row(unreadable).status) == ("STUCK", "STUCK")
    assert row(well).status == "COMPLETED"
    assert "No saga named 'gone.Saga' is registered" in row(unknown).stuck_reason
    assert "number" in row(unreadable).stuck_reason
    assert row(unreadable).context == '{"number": "one"}'
    first, second = str(raised.value).splitlines()
    assert first.startswith(f"Saga gone.Saga {unknown} is STUCK: No saga named")
    assert second.startswith(f"Saga saga_tests.Plain {unreadable} is STUCK: The stored context")
    assert run() == "Nothing was due.\n"


def test_a_failed_compensation_is_told() -> None:
    id = interrupted(sagas.Sticking)
    with pytest.raises(CommandError, match=f"{id} is STUCK: The compensation of Unpackable failed"):
        run()


def test_what_cannot_be_driven_is_told_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A cancellation that leaks out of a handler is nobody's wish to stop the sweep."""
    id = interrupted(sagas.Leaking)
    interrupted(sagas.Plain)
    with pytest.raises(CommandError, match=f"{id} is RUNNING and could not be driven: Cancelled"):
        run()
    assert statuses() == {"COMPLETED": 1, "RUNNING": 1}
    [line] = named(caplog, sagas.Leaking.name, id)
    assert "Traceback" in line.getMessage(), "its trace says who leaked it"
    assert "CancelledError" in line.getMessage()


def test_a_fault_of_the_settings_is_told_in_words_without_a_trace(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = interrupted(sagas.Plain), interrupted(sagas.Plain)
    found = sweep()
    assert next(found) == Recovered(sagas.Plain.name, first, "COMPLETED")
    settings.DJANGO_SAGA = {"LEASE": "long"}
    why = "DJANGO_SAGA['LEASE'] must be a number, not 'long'."
    assert next(found) == Recovered(sagas.Plain.name, second, "RUNNING", why)
    [line] = named(caplog, sagas.Plain.name, second)
    assert line.getMessage().endswith(why)
    assert "Traceback" not in line.getMessage()
    with pytest.raises(InvalidSettings):
        next(found)


def named(caplog: pytest.LogCaptureFixture, saga: str, id: UUID) -> list[logging.LogRecord]:
    """Recovery's log lines, each of which names the execution in its text and beside it."""
    lines = [line for line in caplog.records if line.name == "django_saga.recovery"]
    for line in lines:
        assert f"Saga {saga} {id}" in line.getMessage()
        assert (line.saga, line.execution) == (saga, str(id))  # type: ignore[attr-defined]
    return lines


def test_what_another_driver_took_meanwhile_is_left_to_it(
    ledger: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = interrupted(sagas.Plain), interrupted(sagas.Plain)
    found = sweep()
    assert next(found).saga_id == first
    taken = DjangoSagaStorage().acquire(second, driver="other:1", lease=3600.0, token=2)
    assert list(found) == [Recovered(sagas.Plain.name, second, LEASE_LOST)]
    [line] = named(caplog, sagas.Plain.name, second)
    assert "taken over" in line.getMessage()
    assert (row(second).driver, row(second).token) == ("other:1", taken.token)
    assert not [line for line in ledger() if str(second) in line]


def test_a_sweep_that_is_closed_releases_what_it_did_not_drive() -> None:
    ids = [interrupted(sagas.Plain) for _ in range(3)]
    found = sweep()
    next(found)
    found.close()
    assert [row(id).status for id in ids] == ["COMPLETED", "RUNNING", "RUNNING"]
    assert [row(id).lease_until for id in ids] == [None, None, None]
    assert [row(id).in_flight for id in ids[1:]] == [True, True], "an attempt may have been lost"
    assert run() == "2 executions: 2 COMPLETED.\n"


def test_the_leases_of_those_that_wait_for_their_turn_are_kept(
    settings: Settings, gate: Path
) -> None:
    settings.DJANGO_SAGA = {"LEASE": 3}
    interrupted(sagas.Gated)
    waiting = interrupted(sagas.Plain)

    def work() -> list[str]:
        try:
            return [recovered.status for recovered in sweep()]
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as pool:
        swept = pool.submit(work)
        try:
            claimed = until(lambda: row(waiting).token == 2 and row(waiting).lease_until)
            until(lambda: row(waiting).lease_until > claimed)
            assert row(waiting).token == 2
        finally:
            gate.touch()
        assert swept.result() == ["COMPLETED", "COMPLETED"]


def test_no_lease_is_kept_any_more_once_its_turn_came_or_the_sweep_is_over() -> None:
    for _ in range(3):
        interrupted(sagas.Plain)
    found = sweep()
    next(found)
    assert len(keeper._watched) == 2
    found.close()
    assert not keeper._watched


def test_after_a_fault_those_that_wait_are_leased_anew() -> None:
    interrupted(sagas.Leaking)
    second, third = interrupted(sagas.Plain), interrupted(sagas.Plain)
    found = sweep()
    assert next(found).error
    SagaExecution.objects.update(lease_until=timezone.now())
    assert next(found).saga_id == second
    assert seconds_left(row(third).lease_until) > conf.LEASE / 2
    found.close()


def seconds_left(moment: datetime | None) -> float:
    assert moment is not None
    return (moment - timezone.now()).total_seconds()


def test_a_sweep_is_broken_off_where_the_database_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = [interrupted(sagas.Plain) for _ in range(3)]
    found = sweep()
    next(found)

    def away(*call: Any) -> Any:
        raise OperationalError("the connection is lost")

    with connections["default"].execute_wrapper(away):
        lost = next(found)
        assert (lost.saga_id, lost.status) == (ids[1], "RUNNING")
        assert "the connection is lost" in lost.error
        with pytest.raises(StorageUnavailable) as broken:
            next(found)
    [left] = [line for line in caplog.records if "could not be released" in line.getMessage()]
    assert str(broken.value) in left.getMessage()
    assert [row(id).status for id in ids] == ["COMPLETED", "RUNNING", "RUNNING"]


# Poison


def test_poison_is_taken_over_a_few_times_then_stuck_while_others_run(
    recover: Callable[..., tuple[int, str, str]], ledger: Callable[[], list[str]]
) -> None:
    short = {"LEASE": 0.5, "MAX_RECOVERIES": 2}
    poison = interrupted(sagas.Deadly)
    others = [interrupted(sagas.Plain) for _ in range(3)]
    ended, pauses = [], set()

    def is_stuck() -> bool:
        ended.append(recover(settings=short)[0])
        lost = row(poison)
        if lost.grace_until:
            pauses.add((lost.grace_until - lost.updated_at).total_seconds())
        return lost.status == "STUCK"

    until(is_stuck)
    assert (ended.count(9), ended.count(1)) == (2, 1)
    assert pauses == {2 * short["LEASE"]}
    assert "The driver was lost 3 times in a row while Die was in act" in row(poison).stuck_reason
    assert ledger().count(f"act Die {poison}") == 2
    assert [row(id).status for id in others] == ["COMPLETED"] * 3


def test_those_that_lost_a_driver_before_come_last_in_their_batch() -> None:
    again = interrupted(sagas.Plain)
    SagaExecution.objects.update(recoveries=1)
    fresh = interrupted(sagas.Plain)
    assert [recovered.saga_id for recovered in sweep()] == [fresh, again]


def test_a_handler_that_leaves_the_process_is_spaced_too() -> None:
    """Its lease is let go; without a pause the next sweeps would use up its takeovers at once."""
    id, other = interrupted(sagas.Leaving), interrupted(sagas.Plain)
    with pytest.raises(SystemExit):
        run()
    left = row(id)
    assert (left.lease_until, left.recoveries, left.in_flight) == (None, 1, True)
    assert left.grace_until is not None
    assert (left.grace_until - left.updated_at).total_seconds() >= conf.LEASE
    assert row(other).lease_until is None
    assert run() == "1 execution: 1 COMPLETED.\n"


# Telling


def test_the_exit_status_is_fit_for_cron(recover: Callable[..., tuple[int, str, str]]) -> None:
    assert recover()[:2] == (0, "Nothing was due.\n")
    assert recover("--limit", "0")[0] == 2
    assert recover("--inline", "--enqueue")[0] == 2
    assert recover("--saga", "Nope")[0] == 2
    assert recover("--enqueue")[0] == 2
    interrupted(sagas.Failing)
    assert recover()[:2] == (0, "1 execution: 1 FAILED.\n")
    id = interrupted(sagas.Sticking)
    status, out, errors = recover()
    assert (status, out) == (1, "1 execution: 1 STUCK.\n")
    assert f"{id} is STUCK" in errors


def test_json_is_alone_on_stdout(recover: Callable[..., tuple[int, str, str]]) -> None:
    printing, sticking = interrupted(sagas.Printing), interrupted(sagas.Sticking)
    status, out, errors = recover("--json")
    document = json.loads(out)
    assert status == 1
    assert document["statuses"] == {"COMPLETED": 1, "STUCK": 1}
    assert [found["id"] for found in document["executions"]] == [str(printing), str(sticking)]
    assert [bool(found["error"]) for found in document["executions"]] == [False, True]
    assert "a handler's own words" in errors


def test_progress_is_shown_on_a_terminal_only(
    start: Start, recover: Callable[..., tuple[int, str, str]]
) -> None:
    interrupted(sagas.Plain)
    assert "\x1b" not in recover()[2]
    interrupted(sagas.Plain)
    ours, its = pty.openpty()
    try:
        child = start("recover_sagas", stderr=its)
        assert child.communicate(timeout=PATIENCE)[0] == "1 execution: 1 COMPLETED.\n"
        shown = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(its)
    assert re.search(r"\r\x1b\[K1 execution: 1 COMPLETED\.\r\x1b\[K$", shown)


# Watching


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watch_sweeps_until_a_signal_and_ends_after_the_execution_in_hand(
    number: int, start: Start, gate: Path, ledger: Callable[[], list[str]]
) -> None:
    first = interrupted(sagas.Plain)
    child = start("recover_sagas", "--watch", "0.1")
    let_go(child)
    until(lambda: row(first).status == "COMPLETED")
    gated = interrupted(sagas.Gated, grace=3600.0)
    behind = interrupted(sagas.Plain, grace=3600.0)
    SagaExecution.objects.filter(grace_until__isnull=False).update(grace_until=None)
    until(lambda: f"act WaitForGate {gated}" in ledger())
    child.send_signal(number)
    gate.touch()
    assert child.wait(PATIENCE) == 0
    assert row(gated).status == "COMPLETED"
    assert (row(behind).status, row(behind).token) == ("RUNNING", 2)
    assert row(behind).lease_until is None


def test_watch_ends_between_two_sweeps_too(start: Start, said: Path) -> None:
    interrupted(sagas.Plain)
    with said.open("w") as stdout:
        child = start("recover_sagas", "--watch", "3600", stdout=stdout)
    let_go(child)
    until(lambda: said.read_text() == "1 execution: 1 COMPLETED.\n")
    child.terminate()
    assert child.wait(PATIENCE) == 0


def test_watch_writes_a_line_of_json_for_each_sweep(start: Start, said: Path) -> None:
    interrupted(sagas.Printing)
    with said.open("w") as stdout:
        let_go(start("recover_sagas", "--watch", "0.1", "--json", stdout=stdout))
    until(lambda: said.read_text().count("\n") > 2)
    lines = [json.loads(line) for line in said.read_text().splitlines()[:3]]
    assert [line["statuses"] for line in lines] == [{"COMPLETED": 1}, {}, {}]


def test_watch_outlives_a_database_that_is_away_for_a_while(
    start: Start, said: Path, child_environment: dict[str, str]
) -> None:
    role = f"watcher_{os.getpid()}"
    url = urlsplit(child_environment["DATABASE_URL"])
    host = url.netloc.rpartition("@")[2]
    theirs = f"{url.scheme}://{role}:secret@{host}{quote(url.path)}?{url.query}"
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"
    with connections["default"].cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'secret'")
        try:
            with said.open("w") as stderr:
                environment = {"DATABASE_URL": theirs}
                watch = ("recover_sagas", "--watch", "0.1")
                child = start(*watch, stderr=stderr, environment=environment)
            let_go(child)
            first = interrupted(sagas.Plain)
            until(lambda: row(first).status == "COMPLETED")
            cursor.execute(f"ALTER ROLE {role} NOLOGIN")
            cursor.execute(ended, [role])
            until(lambda: "The sweep was broken off" in said.read_text())
            second = interrupted(sagas.Plain)
            cursor.execute(f"ALTER ROLE {role} LOGIN")
            until(lambda: row(second).status == "COMPLETED")
            child.terminate()
            assert child.wait(PATIENCE) == 0
        finally:
            cursor.execute(ended, [role])
            cursor.execute(f"DROP ROLE {role}")
