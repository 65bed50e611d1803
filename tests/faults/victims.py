"""An execution that is driven by processes which meet faults."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from django.db import OperationalError, connections

from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution, SagaStepRecord
from tests.faults.children import DIED, Child, Nursery
from tests.faults.driving import expire
from tests.faults.judge import wrongs
from tests.faults.ledger import Entry, Ledger
from tests.faults.sagas import ROWS, groups

Place = tuple[int, bool]  # the statement, and whether after it


class Victim:
    """One execution, driven by processes that may die."""

    def __init__(self, nursery: Nursery, database: str, ledger: Ledger, without: str = "") -> None:
        self.id = uuid4()
        self._without = without
        self._nursery, self._database, self._ledger = nursery, database, ledger

    def drive(self, saga: str, runner: str, place: Place | None = None) -> bool:
        """Whether it died."""
        return self._run("drive", place, saga=saga, runner=runner, queue=f"faults-{self.id}")

    def recover(self, place: Place | None = None) -> bool:
        """Whether the recovery died."""
        expire(self.id, self._database)
        return self._run("recover", place)

    def start(
        self, saga: str, runner: str, fault: list[Any] | None = None, nursery: Nursery | None = None
    ) -> Child:
        """Have it driven, by a process of that nursery."""
        return (nursery or self._nursery).start(
            "tests.faults.driving.drive",
            saga=saga,
            runner=runner,
            saga_id=str(self.id),
            ledger=self._ledger.address,
            fault=fault,
            without=self._without,
        )

    def start_recovery(self) -> Child:
        """Have it taken over, if its lease allows that."""
        return self._nursery.start(
            "tests.faults.driving.recover", saga_id=str(self.id), ledger=self._ledger.address
        )

    def _run(self, function: str, place: Place | None, **arguments: str) -> bool:
        status = self._nursery.run(
            f"tests.faults.driving.{function}",
            saga_id=str(self.id),
            ledger=self._ledger.address,
            fault=None if place is None else [*place, "die"],
            without=self._without,
            **arguments,
        )
        assert status in (0, DIED), f"{function} ended with {status}"
        return status == DIED

    @property
    def wrongs(self) -> list[str]:
        return wrongs(self.id, self._database, self.entries)

    @property
    def entries(self) -> list[Entry]:
        """What the ledger has of it now."""
        return list(self._ledger.entries(self.id))

    @property
    def row(self) -> SagaExecution | None:
        return SagaExecution.objects.using(self._database).filter(pk=self.id).first()

    @property
    def has_begun(self) -> bool:
        """Whether anything of it was done."""
        records = SagaStepRecord.objects.using(self._database).filter(execution=self.id)
        return bool(self.entries) or records.exists()

    @property
    def has_ended(self) -> bool:
        row = self.row
        return row is not None and row.status not in ACTIVE

    @property
    def stored(self) -> list[Any]:
        """All that the database knows of it."""
        rows = SagaExecution.objects.using(self._database).filter(pk=self.id)
        records = SagaStepRecord.objects.using(self._database).filter(execution=self.id)
        written = [list(groups(self._database, self.id, step).values()) for step in sorted(ROWS)]
        return [list(rows.values()), list(records.order_by("id").values()), written]

    @property
    def is_locked(self) -> bool:
        """Whether its driver keeps every writer out, as one that writes or reads does on SQLite."""
        connection = connections[self._database]
        if connection.vendor != "sqlite":
            return False
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA busy_timeout")
            (patience,) = cursor.fetchone()
            cursor.execute("PRAGMA busy_timeout = 0")
            try:
                cursor.execute("BEGIN EXCLUSIVE")
                cursor.execute("ROLLBACK")
            except OperationalError:
                return True
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {patience}")
        return False
