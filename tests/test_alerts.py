"""Being told: whether recovery still comes by, and what somebody must hear of."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.core.management import call_command
from django.db import connection, connections
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django import Settings

from django_saga.heartbeats import Lateness, beat, lateness
from django_saga.models import SagaExecution, SagaHeartbeat, SagaStepRecord
from django_saga.rq import sweep_sagas
from django_saga.storage import DjangoSagaStorage
from tests.operated import WORLD, changed, due_trip

ALIASES = list(django_settings.DATABASES)


@pytest.fixture(autouse=True)
def _alone(committing_databases: None) -> Iterator[None]:
    WORLD.reset()
    for alias in ALIASES:
        for model in (SagaStepRecord, SagaExecution, SagaHeartbeat):
            model.objects.using(alias).all().delete()
    yield
    WORLD.reset()


def came(*, seconds_ago: float, every: float | None = None) -> None:
    """Recovery came by that long ago."""
    at = timezone.now() - timedelta(seconds=seconds_ago)
    SagaHeartbeat.objects.update_or_create(name="recovery", defaults={"at": at, "every": every})


def recover(*options: Any) -> str:
    out = StringIO()
    call_command("recover_sagas", *options, stdout=out)
    return out.getvalue()


# Whether recovery comes by


def test_recovery_that_never_came_is_late() -> None:
    assert lateness() == Lateness(limit=timedelta(seconds=300))
    assert lateness().late


@pytest.mark.parametrize("alias", ALIASES)
def test_a_sweep_notes_when_it_began_by_the_clock_of_the_database(alias: str) -> None:
    storage = DjangoSagaStorage(alias)
    beat(storage=storage)
    first = lateness(storage=storage)
    assert first.at is not None
    assert first.age is not None
    assert timedelta() <= first.age < timedelta(seconds=300)
    assert not first.late
    beat(storage=storage)
    second = lateness(storage=storage)
    assert second.at is not None
    assert second.at > first.at
    assert SagaHeartbeat.objects.using(alias).count() == 1


@pytest.mark.parametrize("alias", ALIASES)
def test_noting_it_takes_one_statement(alias: str) -> None:
    with CaptureQueriesContext(connections[alias]) as seen:
        beat(storage=DjangoSagaStorage(alias))
    changes = [q["sql"] for q in seen.captured_queries if "saga" in q["sql"]]
    assert len(changes) == 1, changes


@pytest.mark.parametrize(
    ("ago", "every", "late"),
    [
        (299, None, False),
        (301, None, True),
        (301, 60, True),
        (301, 200, False),
        (599, 200, False),
        (601, 200, True),
    ],
)
def test_it_is_late_after_three_missed_sweeps_but_not_before_the_setting_says(
    ago: float, every: float | None, late: bool
) -> None:
    came(seconds_ago=ago - 0.5 if not late else ago, every=every)
    assert lateness().late is late


def test_the_setting_says_from_when_on_it_is_late(settings: Settings) -> None:
    settings.DJANGO_SAGA = {"RECOVERY_LATE": 10_000}
    came(seconds_ago=5_000)
    assert not lateness().late
    assert lateness().limit == timedelta(seconds=10_000)


def test_each_sweep_of_the_command_notes_it() -> None:
    assert recover() == "Nothing was due.\n"
    assert lateness().at is not None


def test_a_watch_notes_its_interval_and_a_single_sweep_leaves_that() -> None:
    due_trip()

    def stop() -> None:
        WORLD.interlude = None
        os.kill(os.getpid(), signal.SIGTERM)

    WORLD.interlude = stop
    recover("--watch", "900")
    recover()
    note = SagaHeartbeat.objects.get()
    assert note.every == 900
    assert lateness().limit == timedelta(seconds=2_700)


def test_a_job_of_rq_notes_it_too() -> None:
    due = due_trip()
    sweep_sagas()
    assert changed(due).status == "COMPLETED"
    assert lateness().at is not None


@pytest.mark.parametrize("options", [["--dry-run"], ["--saga", "tests.TripSaga"]])
def test_what_is_no_sweep_of_everything_notes_nothing(options: list[str]) -> None:
    recover(*options)
    assert lateness().at is None


def test_a_sweep_goes_on_though_it_cannot_note_that_it_did(
    caplog: pytest.LogCaptureFixture,
) -> None:
    due = due_trip()
    with connection.schema_editor() as editor:
        editor.alter_db_table(SagaHeartbeat, "django_saga_sagaheartbeat", "elsewhere")
    try:
        recover()
    finally:
        with connection.schema_editor() as editor:
            editor.alter_db_table(SagaHeartbeat, "elsewhere", "django_saga_sagaheartbeat")
    assert changed(due).status == "COMPLETED"
    assert "could not be noted" in caplog.text
