"""What the batteries are told on the command line, and what they report at the end.

A pytest plugin, loaded with ``-p`` so that every run knows the options.
"""

from __future__ import annotations

import csv
import os
import platform
import random
from collections import defaultdict
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import pytest

Figures = defaultdict[str, defaultdict[str, float]]
FIGURES = pytest.StashKey[Figures]()


class Size(Protocol):
    def __call__(self, name: str, everyday: int, full_run: int) -> int: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "the fault batteries under tests/faults")
    group.addoption("--full", action="store_true", help="run them in full (hours)")
    group.addoption("--seed", type=int, help="repeat the random choices of the run with this seed")
    group.addoption("--size", action="append", default=[], metavar="NAME=N", help="a size")
    group.addoption("--figures", type=Path, metavar="FILE", help="note the figures in this CSV")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(10**9)
    config.stash[FIGURES] = defaultdict(lambda: defaultdict(float))


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):  # of one of pytest-xdist's processes
        figures = config.stash[FIGURES]
        config.workeroutput["figures"] = {name: dict(of) for name, of in figures.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    figures = node.config.stash[FIGURES]
    for battery, numbers in getattr(node, "workeroutput", {}).get("figures", {}).items():
        add(figures, battery, numbers)


def add(figures: Figures, battery: str, numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
        figures[battery][name] += number


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults: --seed {config.option.seed}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    figures = config.stash[FIGURES]
    for battery, numbers in sorted(figures.items()):
        terminalreporter.write_line(f"{battery}: {told(numbers)}")
    if config.option.figures is not None:
        note(figures, config.option.figures)


def told(numbers: dict[str, float]) -> str:
    return ", ".join(f"{number:,.10g} {name}" for name, number in numbers.items())


def note(figures: Figures, file: Path) -> None:
    """Put them into the table, in the place of what an earlier run of the same batteries said."""
    known: dict[str, list[str]] = {}
    if file.exists():
        with file.open(newline="") as table:
            known = {row[0]: row for row in csv.reader(table)}
    where = f"{date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    ours = {battery: [battery, told(numbers), where] for battery, numbers in figures.items()}
    with file.open("w", newline="") as table:
        csv.writer(table, lineterminator="\n").writerows(
            row for _, row in sorted({**known, **ours}.items())
        )
