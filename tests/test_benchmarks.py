"""The benchmarks run, and judge: how fast anything is, no test says."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from django.db import connections

from benchmarks.pace import Pace
from benchmarks.results import Results
from benchmarks.rounds import Measured
from benchmarks.statements import (
    Commit,
    captured,
    replay,
    replay_on_sqlite,
    replay_through_django,
)
from benchmarks.targets import TARGETS, judge
from django_saga import Saga, SagaFailed
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage
from tests.steps import Calls, Log, make_step, raises

ROOT = Path(__file__).resolve().parent.parent


def test_a_quick_run_prints_every_row_of_the_table_of_targets() -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "≥" in line or "≤" in line]
    judged = [target for target in TARGETS if target.bound is not None]
    for row, target in zip(rows, judged, strict=True):
        assert row.startswith(target.text)
        assert target.beside in row
    assert "fsync" in done.stdout
    assert [row for row in rows if "not run" not in row], "none was measured"


@pytest.mark.django_db(transaction=True, databases=["default", "sqlite"])
@pytest.mark.parametrize("alias", ["default", "sqlite"])
def test_a_replay_leaves_what_the_saga_left(alias: str) -> None:
    saga = refused_saga(alias)

    def run() -> uuid.UUID:
        with pytest.raises(SagaFailed) as failed:
            saga.run(Log())
        return failed.value.execution.id

    original = SagaExecution.objects.using(alias).get(id=run())
    commits = captured(alias, run)
    by_django = uuid.uuid4()
    replay_through_django(alias, commits, by_django)
    assert_same(SagaExecution.objects.using(alias).get(id=by_django), original)
    assert_same(replayed(alias, commits), original)
    assert len(commits) == 6


def assert_same(copy: SagaExecution, original: SagaExecution) -> None:
    assert [(r.step, r.action, r.outcome) for r in copy.records.all()] == [
        (r.step, r.action, r.outcome) for r in original.records.all()
    ]
    for name in ("status", "step", "token", "plan", "context", "effects", "error_message"):
        assert getattr(copy, name) == getattr(original, name), name


def refused_saga(alias: str) -> Saga[Log]:
    calls = Calls()
    steps = [
        make_step("First", calls),
        make_step("Second", calls),
        make_step("Third", calls, act=raises(ValueError("no"))),
    ]
    return Saga[Log](steps=steps, name="refused", storage=DjangoSagaStorage(alias))


def replayed(alias: str, commits: list[Commit]) -> SagaExecution:
    """An execution that only the replay made."""
    id = uuid.uuid4()
    params = connections[alias].get_connection_params()
    if alias == "sqlite":
        with closing(sqlite3.connect(params["database"], isolation_level=None)) as session:
            replay_on_sqlite(session, commits, id)
    else:
        names = ("dbname", "user", "password", "host", "port")
        address = {name: params[name] for name in names if name in params}
        with psycopg.connect(**address, autocommit=True) as session:
            replay(session, commits, id)
    return SagaExecution.objects.using(alias).get(id=id)


@pytest.mark.parametrize(("ours", "verdict"), [(79.0, "MISSED"), (80.0, "holds")])
def test_a_target_holds_from_its_bound_on(ours: float, verdict: str) -> None:
    [first, *others] = judge(results(ours=ours, theirs=100.0))
    assert first.word == verdict
    assert first.ratio == ours / 100
    assert "holds" not in [other.word for other in others]


def test_the_spread_is_of_ratios_within_a_round() -> None:
    found = results(ours=80.0, theirs=100.0)
    found.cases[0].rates, found.cases[1].rates = [80.0, 40.0, 90.0], [100.0, 50.0, 90.0]
    assert judge(found)[0].spread == (0.8, 1.0)


def test_results_survive_their_file(tmp_path: Path) -> None:
    found = results(ours=1.0, theirs=2.0)
    found.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == found


def test_a_pace_knows_its_rate() -> None:
    assert Pace(count=30, seconds=2.0).rate == 15.0


def results(*, ours: float, theirs: float) -> Results:
    """A run that measured the first target alone."""
    return Results(
        rounds=1,
        seconds=1.0,
        date="2026-11-26",
        machine={},
        versions={},
        servers={},
        cases=[
            Measured("django-saga", "success", rates=[ours]),
            Measured("replay", "success", rates=[theirs]),
        ],
    )
