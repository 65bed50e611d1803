"""What the batteries are told on the command line, and what they report at the end.

A pytest plugin, loaded with ``-p`` so that every run knows the options.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Protocol

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
    group.addoption("--figures", type=Path, metavar="FILE", help="add the figures to this JSON")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(10**9)
    config.stash[FIGURES] = defaultdict(lambda: defaultdict(float))


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults: --seed {config.option.seed}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    figures = config.stash[FIGURES]
    for battery, numbers in sorted(figures.items()):
        told = ", ".join(f"{number:g} {name}" for name, number in numbers.items())
        terminalreporter.write_line(f"{battery}: {told}")
    file = config.option.figures
    if file is not None and figures:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **figures}, indent=2, sort_keys=True) + "\n")
