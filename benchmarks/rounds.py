"""Runs all cases in turn, several rounds, so that whatever slows the machine slows them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.names import DBOS
from benchmarks.pace import Pace
from benchmarks.servers import Watch

Run = Callable[[float], Pace]
WARM_UP = 0.3  # seconds at most, in which statements are counted


@dataclass(frozen=True)
class Case:
    """Something to measure: who does it, what it is, and what makes it ready to run."""

    who: str
    what: str
    prepare: Callable[[], Run]
    on_postgresql: bool = True
    sends: Callable[[], int] | None = None
    """How many statements it sends, for where the server's log does not tell."""

    @property
    def name(self) -> str:
        return f"{self.who}: {self.what}"


@dataclass
class Measured:
    """What came of a case: for each round how many per second, and what one of them took."""

    who: str
    what: str
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Milliseconds of its process's CPU; none where the work is done in several."""
    wal: list[float] = field(default_factory=list)
    """Bytes that PostgreSQL wrote ahead."""
    commits: list[float] = field(default_factory=list)
    """Transactions that wrote."""
    statements: float | None = None
    """As PostgreSQL's log had them, BEGIN and COMMIT too; None: it could not be read."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def measure(
    cases: Sequence[Case],
    watch: Watch,
    *,
    rounds: int,
    seconds: float,
    tell: Callable[[str], None],
) -> list[Measured]:
    """Each case ``rounds`` times for some seconds, after a warm-up."""
    runs = [(case, case.prepare()) for case in cases]
    all_measured = [Measured(case.who, case.what) for case in cases]
    warm_up = min(WARM_UP, seconds)
    for (case, run), measured in zip(runs, all_measured, strict=True):
        tell(f"warm-up: {case.name}")
        run(warm_up)
        if case.on_postgresql:
            count = partial(_count, run, warm_up)
            measured.statements = watch.statements(count, of_dbos=case.who == DBOS)
        if measured.statements is None and case.sends is not None:
            measured.statements = case.sends()
    for number in range(rounds):
        turns: list[Any] = list(zip(runs, all_measured, strict=True))
        # Back and forth, so that none always comes after the same one.
        for (case, run), measured in turns if number % 2 == 0 else reversed(turns):
            tell(f"round {number + 1} of {rounds}: {case.name}")
            _measure(case, run, measured, watch, seconds)
    return all_measured


def _count(run: Run, seconds: float) -> int:
    return run(seconds).count


def _measure(case: Case, run: Run, measured: Measured, watch: Watch, seconds: float) -> None:
    wal, commits = watch.wal_and_commits()
    pace = run(seconds)
    after_wal, after_commits = watch.wal_and_commits()
    measured.rates.append(pace.rate)
    if pace.cpu is not None:
        measured.cpu.append(1000 * pace.cpu / pace.count)
    if case.on_postgresql:
        measured.wal.append((after_wal - wal) / pace.count)
        measured.commits.append((after_commits - commits) / pace.count)
