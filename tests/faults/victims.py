"""An execution that is driven by processes which meet faults."""

from __future__ import annotations

from uuid import uuid4

from tests.faults.children import DIED, Nursery
from tests.faults.driving import expire
from tests.faults.judge import wrongs
from tests.faults.ledger import Ledger

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

    def _run(self, function: str, place: Place | None, **arguments: str) -> bool:
        status = self._nursery.run(
            f"tests.faults.driving.{function}",
            saga_id=str(self.id),
            ledger=self._ledger.address,
            fault=None if place is None else [*place, "die"],
            without=self._without,
            **arguments,
        )
        return status == DIED

    @property
    def wrongs(self) -> list[str]:
        return wrongs(self.id, self._database, self._ledger.entries(self.id))
