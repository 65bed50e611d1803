"""Battery 8: many recoverers at once on many interrupted sagas, beside some that claim nothing.

All of them start at the same moment, and each drives what it gets to its end.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from django.db import connection
from django.utils import timezone
from msgspec.structs import replace

from django_saga import machine, recover_saga
from django_saga.exceptions import LeaseLost
from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.recovery import sweep
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Checkpoint, Claim, Saved
from tests.faults.children import Child, Nursery
from tests.faults.driving import begin
from tests.faults.fleets import until, until_none
from tests.faults.judge import wrongs
from tests.faults.ledger import Ledger
from tests.faults.options import Size
from tests.faults.sagas import Mixed, Trial

pytestmark = pytest.mark.usefixtures("committing_databases")


class Recovered(NamedTuple):
    """What became of the sagas."""

    ids: list[UUID]
    driven_twice: int
    wrongs: list[str]


@pytest.fixture(params=["default", "sqlite"])
def database(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def recovered(
    database: str,
    nurseries: Callable[[str], Nursery],
    ledger: Ledger,
    size: Size,
    tmp_path: Path,
    figure: Callable[..., None],
) -> Callable[[str], Recovered]:
    """Has recoverers of a kind, ``claim_then_run`` or ``list_then_run``, recover many sagas."""

    def recover(kind: str) -> Recovered:
        recoverers = size("recoverers", everyday=4, full_run=12)
        sagas = size("interrupted", everyday=100, full_run=2_000)
        ids = [interrupted(database, ledger.address) for _ in range(sagas)]
        start = partial(
            nurseries(database).start,
            f"{__name__}.{kind}",
            gate=str(tmp_path),
            ledger=ledger.address,
        )
        per_second = sagas / seconds_of([start() for _ in range(recoverers)], tmp_path, database)
        calls = {id: Counter(ledger.entries(id)) for id in ids}
        twice = sum(max(of.values()) > 1 for of in calls.values())
        found = [wrong for id in ids for wrong in wrongs(id, database, ledger.entries(id))]
        numbers = {"recoverers": recoverers, "sagas": sagas, "driven_twice": twice}
        figure(f"{kind} on {database}", per_second=round(per_second), **numbers)
        return Recovered(ids, twice, found)

    return recover


def interrupted(database: str, ledger: str) -> UUID:
    """An execution whose driver was lost in its first step."""
    context = Mixed.definition.codec.encode(Trial(ledger), limit=1_000)
    state, id = machine.start(Mixed.definition.plan, context), uuid4()
    DjangoSagaStorage(database).create(id, Mixed.name, state, driver="lost:1", lease=0.0)
    return id


def seconds_of(children: list[Child], gate: Path, database: str) -> float:
    """Let them all go once all have come to the gate; how long they took, until the last."""

    def left() -> int:
        active = SagaExecution.objects.using(database).filter(status__in=ACTIVE).count()
        return active + sum(child.poll() is None for child in children)

    try:
        until(lambda: len(list(gate.iterdir())) == len(children), "some do not come to the gate")
        (gate / "open").touch()
        began = time.monotonic()
        until_none(left, "the recoverers do not end")
        seconds = time.monotonic() - began
    finally:
        for child in children:
            child.signal(signal.SIGKILL)
    assert [child.wait() for child in children] == [0] * len(children)
    return seconds


# What the processes do


def claim_then_run(gate: str, ledger: str) -> None:
    begin(ledger, None, "")
    wait_at(Path(gate))
    for _ in sweep():
        pass


def list_then_run(gate: str, ledger: str) -> None:
    """What looks safe on one machine: list what is due, and then drive each."""
    begin(ledger, None, "")
    storage = Unclaimed()
    wait_at(Path(gate))
    for claim in storage.due(sys.maxsize):
        recover_saga(claim.id, storage=storage)


def wait_at(gate: Path) -> None:
    """Connect, and go on at the same moment as the others."""
    connection.ensure_connection()
    (gate / uuid4().hex).touch()
    until((gate / "open").exists, "the gate stayed shut")


class Unclaimed(DjangoSagaStorage):
    """Keeps no leases, as if a table of states were enough: the last to write is right."""

    def acquire(self, saga_id: UUID, **_: Any) -> Claim:
        row = SagaExecution.objects.get(pk=saga_id)
        return Claim(row.id, row.saga, row.token, row.state, timezone.now(), execution=row)

    def checkpoint(self, checkpoint: Checkpoint, *, inside: bool = False) -> Saved:
        while True:
            row = self.acquire(checkpoint.id)
            written = replace(checkpoint, token=row.token, before=row.state)
            try:
                return super().checkpoint(written, inside=inside)
            except LeaseLost:
                continue  # another one wrote in between


def test_many_recoverers_at_once_drive_no_saga_twice(
    database: str, recovered: Callable[[str], Recovered]
) -> None:
    found = recovered("claim_then_run")
    assert not found.wrongs
    assert found.driven_twice == 0
    rows = SagaExecution.objects.using(database).in_bulk(found.ids).values()
    records = SagaStepRecord.objects.using(database).filter(execution__in=found.ids)
    assert {row.token for row in rows} == {2}
    assert set(records.values_list("token", flat=True)) == {2}
    assert len({row.driver for row in rows}) > 1, "only one of them worked"


def test_canary_recoverers_that_claim_nothing_are_seen(
    recovered: Callable[[str], Recovered],
) -> None:
    found = recovered("list_then_run")
    assert found.driven_twice
    assert found.wrongs
