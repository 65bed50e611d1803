"""The tables of a run: on the terminal, and as files that the docs take in."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.results import Results
from benchmarks.rounds import Measured
from benchmarks.targets import Verdict, judge

TARGETS = ("django-saga", "beside", "ratio", "target", "verdict", "rounds", "ours", "theirs")
CASES = ("what", "who", "per second", "rounds", "CPU ms", "statements", "commits", "WAL bytes")

Row = Sequence[str]


def text(results: Results) -> str:
    """All tables, for a terminal; ratios first."""
    tables = (_aligned([TARGETS, *targets(results)]), _aligned([CASES, *cases(results)]))
    return "\n\n".join((about(results), *tables))


def write(results: Results, folder: Path) -> None:
    """The tables and plots, for the docs."""
    from benchmarks import plots  # which needs matplotlib

    (folder / "run.txt").write_text(about(results) + "\n", encoding="utf-8")
    for name, header, rows in (
        ("targets", TARGETS, targets(results)),
        ("cases", CASES, cases(results)),
    ):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    plots.draw(results, folder)


def about(results: Results) -> str:
    """What ran where, in sentences."""
    machine, servers, versions = results.machine, results.servers, results.versions
    peers = [f"{name} {version}" for name, version in versions.items() if name != "python"]
    lines = [
        f"{results.date}; {results.rounds} interleaved rounds of {results.seconds:g} s for each "
        "case; medians, and in brackets the least and the most of the rounds.",
        f"{machine['system']} {machine['architecture']}, {machine['processor']}, "
        f"{machine['cores']} cores; load {machine['load']} when it began.",
        f"PostgreSQL {servers['postgresql']}, fsync {servers['fsync']}, synchronous_commit "
        f"{servers['synchronous_commit']}; Redis {servers['redis']}; Python {versions['python']}.",
        f"{', '.join(peers)}.",
    ]
    if results.imports:
        base, setup = results.imports["base"], results.imports["setup_base"]
        lines.append(
            f"A fresh interpreter that imports Django's models takes {base:.0f} ms of CPU, and "
            f"{results.imports['added']:.0f} ms more with django-saga; one that sets Django up "
            f"takes {setup:.0f} ms, and {results.imports['setup_added']:.0f} ms more with the app."
        )
    if results.memory:
        lines.append(f"Memory was watched over {results.memory['sagas']:,} sagas, on SQLite.")
    return "\n".join(lines)


def targets(results: Results) -> Iterable[Row]:
    return map(_target, judge(results))


def cases(results: Results) -> Iterable[Row]:
    return map(_case, results.cases)


def _target(verdict: Verdict) -> Row:
    target, ratio = verdict.target, verdict.ratio
    bound = "" if target.bound is None else f"{'≤' if target.at_most else '≥'} {target.bound:g}"
    named = (target.text, target.beside)
    if ratio is None or verdict.ours is None or verdict.theirs is None:
        return (*named, "", bound, verdict.word, "", "", "")
    spread = "" if verdict.spread is None else f"({verdict.spread[0]:.2f}-{verdict.spread[1]:.2f})"
    sides = [f"{_number(side)}{target.unit}" for side in (verdict.ours, verdict.theirs)]
    return (*named, f"{ratio:.2f}", bound, verdict.word, spread, *sides)


def _case(case: Measured) -> Row:
    return (
        case.what,
        case.who,
        _number(case.rate),
        f"({_number(min(case.rates))}-{_number(max(case.rates))})",
        _median(case.cpu, 2),
        "" if case.statements is None else f"{case.statements:.1f}",
        _median(case.commits, 1),
        _median(case.wal, 0),
    )


def _median(rounds: Sequence[float], digits: int) -> str:
    return f"{statistics.median(rounds):,.{digits}f}" if rounds else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _aligned(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
