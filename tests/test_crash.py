"""A process that dies before or after any SQL statement: recovered, nothing is lost or doubled."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from django.contrib.auth.models import Group

from django_saga import SagaNotFound, recover_saga
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage
from tests.crash_child import CrashSaga  # registers the saga here too

pytestmark = pytest.mark.usefixtures("committing_databases")

DIED = 9


def die(
    environment: dict[str, str], alias: str, ledger: Path, at: int, when: str, outcome: str
) -> tuple[uuid.UUID, bool]:
    """Run the saga in a process that dies at that statement; whether it did."""
    saga_id = uuid.uuid4()
    command = [sys.executable, "-m", "tests.crash_child", alias, str(saga_id), str(ledger)]
    child = subprocess.run(
        [*command, str(at), when, outcome],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode in (0, DIED), child.stderr
    return saga_id, child.returncode == DIED


@pytest.mark.parametrize("alias", ["default", "sqlite"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("outcome", ["succeed", "fail"])
def test_death_at_every_statement(
    child_environment: dict[str, str], tmp_path: Path, alias: str, when: str, outcome: str
) -> None:
    storage, deaths = DjangoSagaStorage(alias), 0
    while True:
        ledger = tmp_path / f"ledger-{deaths}"
        ledger.touch()
        saga_id, died = die(child_environment, alias, ledger, deaths + 1, when, outcome)
        if not died:
            break
        deaths += 1
        rows = SagaExecution.objects.using(alias).filter(pk=saga_id)
        if rows.filter(status__in=["PENDING", "RUNNING", "COMPENSATING"]).exists():
            rows.update(lease_until="2020-01-01T00:00Z")
        try:
            execution = recover_saga(saga_id, storage=storage)
        except SagaNotFound:
            assert ledger.read_text() == "", "it died before it began"
            continue
        effects = ledger.read_text().splitlines()
        groups = Group.objects.using(alias).filter(name=str(saga_id)).count()
        assert len({line.split()[2] for line in effects}) <= len(
            {line.split()[1] + line.split()[0] for line in effects}
        ), "each action of each step has one key"
        if outcome == "succeed":
            assert (execution.status, groups) == ("COMPLETED", 1)
            assert {line.split()[1] for line in effects} == {"First", "Last"}
            assert not [line for line in effects if line.startswith("compensate")]
        else:
            assert (execution.status, groups) == ("FAILED", 0)
            assert [line.split()[0] for line in effects][-1] == "compensate"
        attempts = [(r.step, r.action, r.attempt) for r in storage.history(saga_id)]
        assert len(attempts) == len(set(attempts)), "no attempt is recorded twice"
    assert deaths >= 5, f"{CrashSaga.name} makes more statements than that"
