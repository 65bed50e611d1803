"""The plots of a run, as SVG that is the same for the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.names import (
    BARE_RQ,
    CQRS,
    DBOS,
    DEFAULTS,
    FAILURE,
    KILOBYTES,
    ORM,
    OURS,
    REPLAY,
    SMALLEST,
    SUCCESS,
    TASKS,
    WORKERS,
    at_once,
    in_workers,
    with_context,
)
from benchmarks.results import Results

COLOURS = {
    OURS: "#1f6f54",
    DEFAULTS: "#7fb8a4",
    REPLAY: "#4c5a73",
    SMALLEST: "#8d99ae",
    ORM: "#c9a227",
    CQRS: "#b5524a",
    DBOS: "#7a5195",
    BARE_RQ: "#4c5a73",
}
STYLE = {
    "svg.hashsalt": "django-saga",  # ids, else made of random numbers
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "white",  # the docs' theme may be dark
    "axes.spines.top": False,
    "axes.spines.right": False,
}
INCHES = (8, 3.6)


def draw(results: Results, folder: Path) -> None:
    """All plots of which there are figures."""
    with mpl.rc_context(STYLE):
        for name, figure in (
            ("inline", _inline(results)),
            ("async", _async(results)),
            ("contexts", _contexts(results)),
            ("workers", _workers(results)),
        ):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _inline(results: Results) -> Figure:
    figure = Figure(figsize=INCHES, layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, results, SUCCESS, (SMALLEST, REPLAY, OURS, DEFAULTS, ORM, DBOS, CQRS))
    _bars(right, results, FAILURE, (SMALLEST, REPLAY, OURS, DBOS, CQRS))
    return figure


def _async(results: Results) -> Figure:
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    whats = [at_once(tasks) for tasks in TASKS]
    _lines(axes, results, whats, TASKS, (REPLAY, OURS, DBOS, CQRS))
    axes.set(title="In one event loop", xlabel="sagas at once", ylabel="sagas per second")
    return figure


def _contexts(results: Results) -> Figure:
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    whats = [with_context(kilobytes) for kilobytes in KILOBYTES]
    _lines(axes, results, whats, KILOBYTES, (REPLAY, OURS))
    axes.set(title="Steps that change the context", xlabel="KB", ylabel="sagas per second")
    return figure


def _workers(results: Results) -> Figure:
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    whats = [in_workers(kind, number) for kind, number in WORKERS]
    for shift, who in ((0.2, BARE_RQ), (-0.2, OURS)):
        rates = [_rate(results, who, what) for what in whats]
        places = [shift - at for at in range(len(whats))]
        axes.barh(places, rates, 0.38, color=COLOURS[who], label=who)
    axes.set_yticks([-at for at in range(len(whats))], whats)
    axes.set(title="RQ, a saga per job", xlabel="jobs per second")
    axes.legend(frameon=False)
    return figure


def _bars(axes: Any, results: Results, what: str, whos: Sequence[str]) -> None:
    rates = [_rate(results, who, what) for who in whos]
    names = [who.replace(", ", ",\n") for who in whos]
    bars = axes.barh(names, rates, color=[COLOURS[who] for who in whos])
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=what.capitalize(), xlabel="sagas per second")


def _lines(
    axes: Any, results: Results, whats: Sequence[str], places: Sequence[int], whos: Sequence[str]
) -> None:
    for who in whos:
        rates = [_rate(results, who, what) for what in whats]
        axes.plot(places, rates, "o-", color=COLOURS[who], label=who)
    axes.set_xscale("log")
    axes.set_xticks(places, map(str, places))
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _rate(results: Results, who: str, what: str) -> float:
    case = results.find(who, what)
    return 0.0 if case is None else case.rate
