"""What django-saga is to reach, each beside what it is compared with, and whether it does."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.names import (
    BARE_RQ,
    BY_DJANGO,
    CQRS,
    DBOS,
    FAILURE,
    IN_THREADS,
    MEMORY,
    MEMORY_ASYNC,
    ORM,
    OURS,
    REPLAY,
    SMALLEST,
    SQLITE,
    SQLITE_NORMAL,
    STEPS,
    SUCCESS,
    TASKS,
    WAIT,
    WAITS,
    WORKERS,
    at_once,
    in_workers,
)
from benchmarks.results import Results
from benchmarks.rounds import Measured

MOST = TASKS[-1]
IMPORT_MILLISECONDS = 30


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a figure, and the rounds that it is the median of."""

    value: float
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Target:
    """A ratio of two figures that is to be at least, or at most, some number; None: just told."""

    text: str
    beside: str
    ours: Callable[[Results], Side | None]
    theirs: Callable[[Results], Side | None]
    bound: float | None = None
    at_most: bool = False
    unit: str = "/s"


@dataclass(frozen=True)
class Verdict:
    """A target, and what a run had to say of it; without figures where it did not ask."""

    target: Target
    ours: float | None = None
    theirs: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None or not self.theirs else self.ours / self.theirs

    @property
    def word(self) -> str:
        ratio, target = self.ratio, self.target
        if ratio is None:
            return "not run"
        if target.bound is None:
            return "-"
        holds = ratio <= target.bound if target.at_most else ratio >= target.bound
        return "holds" if holds else "MISSED"


def judge(results: Results) -> list[Verdict]:
    """Every row of the table, also of what was not run."""
    return [_judge(target, results) for target in TARGETS]


def _judge(target: Target, results: Results) -> Verdict:
    ours, theirs = target.ours(results), target.theirs(results)
    if ours is None or theirs is None:
        return Verdict(target)
    # Rounds are paired: what slowed one of the two slowed the other.
    ratios = [a / b for a, b in zip(ours.rounds, theirs.rounds, strict=False) if b]
    spread = (min(ratios), max(ratios)) if ratios else None
    return Verdict(target, ours.value, theirs.value, spread)


def rate(who: str, what: str) -> Callable[[Results], Side | None]:
    return _median(who, what, lambda case: case.rates)


def wal(who: str) -> Callable[[Results], Side | None]:
    return _median(who, SUCCESS, lambda case: case.wal)


def commits(what: str) -> Callable[[Results], Side | None]:
    # Rounded, since now and then the server commits something of its own.
    return _median(OURS, what, lambda case: [round(count, 1) for count in case.commits])


def _median(
    who: str, what: str, rounds: Callable[[Measured], list[float]]
) -> Callable[[Results], Side | None]:
    def find(results: Results) -> Side | None:
        case = results.find(who, what)
        if case is None or not rounds(case):
            return None
        return Side(statistics.median(rounds(case)), tuple(rounds(case)))

    return find


def constant(value: float) -> Callable[[Results], Side | None]:
    return lambda _: Side(value)


def statements(what: str) -> Callable[[Results], Side | None]:
    def find(results: Results) -> Side | None:
        case = results.find(OURS, what)
        if case is None or case.statements is None:
            return None
        return Side(round(case.statements, 1))

    return find


def waits_allow(results: Results) -> Side | None:
    """What the handlers' waits leave of the rate, or what PostgreSQL gives, whichever is less."""
    places = [(REPLAY, at_once(tasks)) for tasks in TASKS[1:]] + [(REPLAY, IN_THREADS)]
    found = [case for place in places if (case := results.find(*place)) is not None]
    if not found:
        return None
    return Side(min(MOST / (STEPS * WAIT), max(case.rate for case in found)))


def memory(when: str) -> Callable[[Results], Side | None]:
    def find(results: Results) -> Side | None:
        return None if results.memory is None else Side(results.memory[when] / 2**20)

    return find


def added_by(what: str) -> Callable[[Results], Side | None]:
    def find(results: Results) -> Side | None:
        return None if results.imports is None else Side(results.imports[what])

    return find


def rates(
    text: str, beside: str, what: str, bound: float | None, theirs: str | None = None
) -> Target:
    """Our rate beside somebody's, of the same, or of what comes nearest there."""
    return Target(text, beside, rate(OURS, what), rate(beside, theirs or what), bound)


TARGETS = [
    rates("Inline, success", REPLAY, SUCCESS, 0.8),
    rates("Inline, success", SMALLEST, SUCCESS, None),
    rates("Inline, success", BY_DJANGO, SUCCESS, None),
    rates("Inline, success, 8 threads", REPLAY, IN_THREADS, 0.8),
    rates("Inline, success, 8 threads", SMALLEST, IN_THREADS, None),
    rates("Inline, success", CQRS, SUCCESS, 5),
    rates("Inline, success", DBOS, SUCCESS, 5),
    rates("Failure, two compensations", REPLAY, FAILURE, 0.8),
    rates("Failure, two compensations", SMALLEST, FAILURE, None),
    rates("Failure, two compensations", BY_DJANGO, FAILURE, None),
    rates("Async, 32 at once", CQRS, at_once(MOST), 5),
    Target(
        "Async, 32 at once",
        "django-saga, 1 at once",
        rate(OURS, at_once(MOST)),
        rate(OURS, at_once(1)),
        3,
    ),
    Target(
        "Handlers wait 5 ms, 32 at once", "what that allows", rate(OURS, WAITS), waits_allow, 0.9
    ),
    *(
        rates(in_workers(kind, number), BARE_RQ, in_workers(kind, number), 0.8)
        for kind, number in WORKERS
    ),
    rates("Memory storage", CQRS, MEMORY, 1.5),
    Target("Memory storage, async", CQRS, rate(OURS, MEMORY_ASYNC), rate(CQRS, MEMORY)),
    rates("SQLite, WAL", REPLAY, SQLITE, 0.8),
    rates("SQLite, WAL", BY_DJANGO, SQLITE, None),
    rates("SQLite, WAL, synchronous NORMAL", REPLAY, SQLITE_NORMAL, None),
    rates("SQLite, WAL, synchronous NORMAL", BY_DJANGO, SQLITE_NORMAL, None),
    *(
        Target(
            f"{what.capitalize()}: {text}",
            f"{expected} for {STEPS} steps",
            find(what),
            constant(expected),
            1,
            at_most=True,
            unit="",
        )
        for what, expected in ((SUCCESS, STEPS + 1), (FAILURE, 2 * STEPS))
        for text, find in (("statements", statements), ("commits", commits))
    ),
    *(
        Target("WAL of a saga", who, wal(OURS), wal(who), bound, at_most=True, unit=" B")
        for who, bound in ((REPLAY, 1.3), (ORM, 1.3), (SMALLEST, None))
    ),
    Target(
        "Peak memory after all sagas",
        "after a tenth",
        memory("late"),
        memory("early"),
        1.05,
        at_most=True,
        unit=" MiB",
    ),
    Target(
        "Time that the import adds",
        f"{IMPORT_MILLISECONDS} ms",
        added_by("added"),
        constant(IMPORT_MILLISECONDS),
        1,
        at_most=True,
        unit=" ms",
    ),
]
