"""The history as lanes: a lane for each step, its attempts as arrows, drawn to scale of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import ngettext, pgettext

from django_saga.admin.drawings.marks import Mark, sign
from django_saga.admin.drawings.svg import (
    bold,
    drawing,
    element,
    group,
    label,
    legible,
    measure,
    number,
    path,
    shorten,
)
from django_saga.admin.drawings.timeline import Piece, Timeline, lay_out
from django_saga.admin.formats import span

WIDE, NARROW = 760, 340
BESIDE = 600  # from this width up a name stands beside its lane, else above it
GUTTER = 150  # for the names
EDGE = 6
BAR, ROW, APART = 16, 30, 10  # a bar's height; a row's, with its attempts' numbers; between lanes
NAME = 18  # a name's height above its lane
FOLDED, AXIS = 18, 22  # above the lanes, where waits are folded, and below them
LETTERS, SMALL = 13, 10
TINY = 6  # a sign smaller than this cannot be read: the arrow's filling and edge tell
ACT = "act"


@dataclass(frozen=True)
class Attempt:
    """An attempt of an action of a step; in the order in which they were made."""

    step: str
    action: str  # "act" or "compensate"
    number: int
    mark: Mark
    ended_at: datetime | None  # None while it is in flight
    seconds: float | None  # None where nobody knows when it began


@dataclass(frozen=True)
class _Lane:
    """Where a step's attempts lie: the tops of its rows by action."""

    step: str
    top: float
    rows: dict[str, float]
    bottom: float


def lanes_svg(attempts: Sequence[Attempt], now: datetime, *, width: int = WIDE) -> SafeString:
    """Acts point right, compensations left; what is in flight is open towards ``now``."""
    left = GUTTER if width >= BESIDE else EDGE
    line = lay_out(_times(attempts, now), width - left - EDGE)
    top = FOLDED if line.folds else 2
    lanes = _lanes(attempts, top, named_above=width < BESIDE)
    bottom = lanes[-1].bottom if lanes else top
    content = [*_axis(line, left, top, bottom, width), *_folds(line, left, top, bottom)]
    content += [part for lane in lanes for part in _named(lane, left, width)]
    content += _bars(attempts, line, lanes, left, width)
    title, words = _told(attempts, line)
    css = "saga-lanes saga-wide" if width >= BESIDE else "saga-lanes saga-narrow"
    return drawing(css, width, bottom + AXIS, title, words, *content)


def _times(attempts: Sequence[Attempt], now: datetime) -> list[tuple[float, float]]:
    """Begin and end in seconds from the first end; an unknown begin is taken for the end."""
    zero = next((a.ended_at for a in attempts if a.ended_at), now)
    times = []
    for attempt in attempts:
        ended = ((attempt.ended_at or now) - zero).total_seconds()
        known = attempt.seconds is not None and 0 <= attempt.seconds < 1e10
        times.append((ended - (attempt.seconds or 0.0) if known else ended, ended))
    return times


def _lanes(attempts: Sequence[Attempt], top: float, named_above: bool) -> list[_Lane]:
    actions: dict[str, set[str]] = {}
    for attempt in attempts:
        actions.setdefault(attempt.step, set()).add(_direction(attempt.action))
    lanes = []
    for step, found in actions.items():
        y = top + (NAME if named_above else 0)
        rows = {}
        for action in sorted(found):
            rows[action] = y
            y += ROW
        lanes.append(_Lane(step, top, rows, y + APART))
        top = y + APART
    return lanes


def _direction(action: str) -> str:
    return ACT if action == ACT else "compensate"


def _named(lane: _Lane, left: float, width: float) -> list[SafeString]:
    if width >= BESIDE:
        x, y, room = 0, min(lane.rows.values()) + ROW - 6, left - 12
    else:
        x, y, room = 0, lane.top + 14, width
    name = shorten(legible(lane.step), room, bold(LETTERS))
    title = element("title", legible(lane.step))
    edge = path(f"M0 {number(lane.bottom)}H{number(width)}", "saga-rule")
    return [element("g", title, label(x, y, name, "saga-name")), edge]


# Bars


def _bars(
    attempts: Sequence[Attempt], line: Timeline, lanes: list[_Lane], left: float, width: float
) -> list[SafeString]:
    by_step = {lane.step: lane for lane in lanes}
    free: dict[tuple[str, str], float] = {}  # up to where numbers are written, by row
    bars = []
    for piece in line.pieces:
        if piece.attempt is None:
            continue
        attempt = attempts[piece.attempt]
        row = (attempt.step, _direction(attempt.action))
        y = by_step[attempt.step].rows[row[1]]
        parts = [*_bar(attempt, left + piece.x, y + ROW - BAR, piece.width)]
        wide = measure(str(attempt.number), SMALL)
        x = min(left + piece.x + 1, width - wide)
        if x >= free.get(row, 0.0):
            parts.append(label(x, y + ROW - BAR - 3, str(attempt.number), "saga-number"))
            free[row] = x + wide + 6
        open_ = "" if attempt.ended_at and attempt.seconds is not None else " saga-open"
        bars.append(group(f"saga-bar saga-mark-{attempt.mark}{open_}", _said(attempt), *parts))
    return bars


def _bar(attempt: Attempt, x: float, y: float, width: float) -> list[SafeString]:
    """An arrow as long as the attempt, with its outcome's sign where the arrow is thick."""
    x, width = x + 0.5, width - 1
    tip = min(6.0, width / 3)
    body, half = width - tip, BAR / 2
    size = min(10.0, body)
    if _direction(attempt.action) == ACT:
        shape = f"M{number(x)} {number(y)}h{number(body)}l{number(tip)} {number(half)}"
        shape += f"l{number(-tip)} {number(half)}h{number(-body)}z"
        middle = x + body / 2
    else:
        shape = f"M{number(x + width)} {number(y)}h{number(-body)}l{number(-tip)} {number(half)}"
        shape += f"l{number(tip)} {number(half)}h{number(body)}z"
        middle = x + tip + body / 2
    at = (middle - size / 2, y + half - size / 2)
    if size < TINY:
        return [path(shape, "saga-shape saga-tiny")]
    return [path(shape, "saga-shape"), sign(attempt.mark, *at, size)]


def _said(attempt: Attempt) -> str:
    facts = {
        "step": legible(attempt.step),
        "action": _arrow(attempt.action),
        "number": attempt.number,
        "outcome": attempt.mark.word,
        "time": span(attempt.seconds),
    }
    if attempt.ended_at is None:
        return _("%(step)s, %(action)s, attempt %(number)s: in flight, %(outcome)s") % facts
    if attempt.seconds is None:
        return (
            _("%(step)s, %(action)s, attempt %(number)s: %(outcome)s; began at an unknown time")
            % facts
        )
    return _("%(step)s, %(action)s, attempt %(number)s: %(outcome)s, after %(time)s") % facts


def _arrow(action: str) -> str:
    if action == ACT:
        return pgettext("saga drawing", "→ act")
    return pgettext("saga drawing", "← compensate")


# The axis


def _axis(line: Timeline, left: float, top: float, bottom: float, width: float) -> list[SafeString]:
    """Lines down through the lanes, each with its time from the first begin."""
    drawn = []
    free = 0.0
    for tick in line.ticks:
        x = left + tick.x
        drawn.append(path(f"M{number(x)} {number(top)}V{number(bottom + 4)}", "saga-tick"))
        wide = measure(tick.text, SMALL)
        start = min(max(x - wide / 2, 0.0), width - wide)
        if start >= free:
            y = bottom + AXIS - 6
            drawn.append(label(start + wide / 2, y, tick.text, "saga-time-label", "middle"))
            free = start + wide + 4
    return drawn


def _folds(line: Timeline, left: float, top: float, bottom: float) -> list[SafeString]:
    drawn = []
    for fold in line.folds:
        x, end = left + fold.x, left + fold.x + fold.width
        text = span(fold.seconds)
        drawn.append(
            group(
                "saga-fold",
                _("a wait of %(time)s, folded") % {"time": text},
                element("rect", x=x, y=top, width=fold.width, height=bottom - top),
                path(_torn(x, top, bottom) + _torn(end, top, bottom), "saga-torn"),
                label((x + end) / 2, top - 6, text, "saga-time-label", "middle"),
            )
        )
    return drawn


def _torn(x: float, top: float, bottom: float) -> str:
    """An edge like that of torn paper."""
    line, y, side = f"M{number(x)} {number(top)}", top, 2
    while y + 5 <= bottom:
        y, side = y + 5, -side
        line += f"L{number(x + side)} {number(y)}"
    return line


# Words


def _told(attempts: Sequence[Attempt], line: Timeline) -> tuple[str, str]:
    """The title, and all that is drawn in words."""
    facts = {"number": len(attempts), "time": span(line.seconds)}
    title = ngettext(
        "%(number)s attempt in %(time)s", "%(number)s attempts in %(time)s", len(attempts)
    )
    title %= facts
    steps: dict[str, list[str]] = {}
    for attempt in attempts:
        facts = {
            "action": _arrow(attempt.action),
            "number": attempt.number,
            "outcome": attempt.mark.word,
        }
        said = _("%(action)s %(number)s %(outcome)s") % facts
        steps.setdefault(legible(attempt.step), []).append(said)
    sentences = [title, *(f"{step}: {', '.join(said)}" for step, said in steps.items())]
    sentences += [_fold_told(fold, attempts, line.pieces) for fold in line.folds]
    return title, ". ".join(sentences) + "."


def _fold_told(fold: Piece, attempts: Sequence[Attempt], pieces: list[Piece]) -> str:
    following = pieces[pieces.index(fold) + 1].attempt
    assert following is not None  # no wait follows a wait
    attempt = attempts[following]
    text = _("The wait of %(time)s before %(action)s %(number)s of %(step)s is not drawn to scale")
    return text % {
        "time": span(fold.seconds),
        "action": _arrow(attempt.action),
        "number": attempt.number,
        "step": legible(attempt.step),
    }
