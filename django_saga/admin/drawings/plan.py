"""The plan of one execution, from top to bottom: what became of each step, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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

WIDTH = 360
RAIL = 12  # where the way back runs, left of the boxes
LEFT = 30
BOX, ROW, GAP = 42, 64, 36  # a box's height, from row to row, between boxes side by side
TOP, FOOT = 10, 24
JOIN = 7  # below a box, where the line from its fallback comes in
OVER = 8  # above a box, where the way back branches to its fallback
INSET = 28  # of a name in its box
RIGHT, DOWN, UP = ((-5, -4), (-5, 4)), ((-4, -5), (4, -5)), ((-4, 5), (4, 5))  # arrow heads
LETTERS = 13

_BACK = {Mark.TO_UNDO, Mark.UNDOING, Mark.UNDONE, Mark.STANDS}
_WENT_BACK = {Mark.UNDOING, Mark.UNDONE, Mark.STANDS}
_LEFT_OUT = {Mark.NOT_NEEDED, Mark.NOT_BEGUN}
_PASSED = {Mark.DONE, *_BACK}


@dataclass(frozen=True)
class PlanStep:
    """One step of the plan; a fallback follows its step."""

    name: str
    mark: Mark
    fallback_of: str = ""
    fate: str = ""  # what became of it, where there is more to say than the mark's word


@dataclass(frozen=True)
class _Box:
    step: PlanStep
    number: int  # of its row, from 1 up
    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def plan_svg(steps: Sequence[PlanStep]) -> SafeString:
    """The steps in the order of the plan, each fallback to the right of its step."""
    rows = _rows(steps)
    height = TOP + max(len(rows), 1) * ROW - (ROW - BOX) + FOOT
    content: list[SafeString] = [*_ways(rows), *_way_back(rows)]
    content += [_drawn(box) for row in rows for box in row]
    content += _legend(height - 6)
    title = ngettext("Plan of %(n)s step", "Plan of %(n)s steps", len(rows)) % {"n": len(rows)}
    words = f"{title}: {'; '.join(_said(box) for row in rows for box in row)}."
    return drawing("saga-plan", WIDTH, height, title, words if rows else title, *content)


def _rows(steps: Sequence[PlanStep]) -> list[list[_Box]]:
    entries: list[list[PlanStep]] = []
    for step in steps:
        if step.fallback_of and entries:
            entries[-1].append(step)
        else:
            entries.append([step])
    columns = max(map(len, entries), default=1)
    width = (WIDTH - LEFT - 1 - (columns - 1) * GAP) / columns
    return [
        [
            _Box(step, row + 1, LEFT + column * (width + GAP), TOP + row * ROW, width)
            for column, step in enumerate(entry)
        ]
        for row, entry in enumerate(entries)
    ]


def _said(box: _Box) -> str:
    facts = {
        "number": box.number,
        "step": legible(box.step.name),
        "other": legible(box.step.fallback_of),
        "fate": box.step.fate or box.step.mark.word,
    }
    if box.step.fallback_of:
        return _("%(number)s. %(step)s, fallback of %(other)s: %(fate)s") % facts
    return _("%(number)s. %(step)s: %(fate)s") % facts


def _drawn(box: _Box) -> SafeString:
    step, y = box.step, box.y
    start = box.x + (9 if step.fallback_of else INSET)
    name = shorten(legible(step.name), box.x + box.width - start - 8, bold(LETTERS))
    return group(
        f"saga-box saga-mark-{step.mark}",
        _said(box),
        element("rect", x=box.x + 0.5, y=y + 0.5, width=box.width - 1, height=BOX - 1, rx=4),
        *([] if step.fallback_of else [label(box.x + 9, y + 17, str(box.number), "saga-quiet")]),
        label(start, y + 17, name, "saga-name"),
        sign(step.mark, start, y + 24),
        label(start + 17, y + 34, step.mark.word, "saga-word"),
    )


def _ways(rows: list[list[_Box]]) -> list[SafeString]:
    """The lines forward; solid where the execution came along."""
    ways = [part for row in rows for boxes in pairwise(row) for part in _aside(*boxes)]
    for row, following in pairwise(rows):
        ways += [_joined(box, row[0]) for box in row[1:]]
        x, join, end = row[0].middle, row[0].y + BOX + JOIN, following[0].y
        own = path(f"M{_at(x, join - JOIN)}V{number(join)}", _way(row[0].step.mark in _PASSED))
        css = _way(any(box.step.mark in _PASSED for box in row))
        ways += [own, path(f"M{_at(x, join)}V{number(end)}", css), _head(x, end, css, DOWN)]
    return ways


def _aside(box: _Box, fallback: _Box) -> list[SafeString]:
    css = _way(fallback.step.mark not in {Mark.PLANNED, *_LEFT_OUT})
    start, end, y = box.x + box.width, fallback.x, box.y + BOX / 2
    return [
        path(f"M{_at(start, y)}H{number(end)}", css),
        _head(end, y, css, RIGHT),
        label((start + end) / 2, y - 5, pgettext("saga drawing", "else"), "saga-quiet", "middle"),
    ]


def _joined(fallback: _Box, box: _Box) -> SafeString:
    """From below the fallback back to the line below its step."""
    start = fallback.y + BOX
    line = f"M{_at(fallback.middle, start)}V{number(start + JOIN)}H{number(box.middle)}"
    return path(line, _way(fallback.step.mark in _PASSED))


def _way_back(rows: list[list[_Box]]) -> list[SafeString]:
    """The line up on the left, with a branch to each step that is, or would be, undone."""
    back = [box for row in rows for box in row if box.step.mark in _BACK]
    back = back or [row[0] for row in rows if row[0].step.mark not in _LEFT_OUT]
    if not back:
        return []
    css = _back_way(*back)
    low, top = max(map(_branching, back)), 2
    lines = [path(f"M{_at(RAIL, low)}V{number(top)}", css), _head(RAIL, top, css, UP)]
    return lines + [part for box in back for part in _branch(box)]


def _branching(box: _Box) -> float:
    return box.y - OVER if box.step.fallback_of else box.y + BOX / 2


def _branch(box: _Box) -> list[SafeString]:
    css = _back_way(box)
    start = f"M{_at(RAIL, _branching(box))}"
    if box.step.fallback_of:
        x = box.middle + 12  # beside the line that leads on
        return [path(f"{start}H{number(x)}V{number(box.y)}", css), _head(x, box.y, css, DOWN)]
    return [path(f"{start}H{LEFT}", css), _head(LEFT, _branching(box), css, RIGHT)]


def _back_way(*boxes: _Box) -> str:
    due = any(box.step.mark in _BACK for box in boxes)
    css = "saga-back saga-due" if due else "saga-back"
    return _way(any(box.step.mark in _WENT_BACK for box in boxes), css)


def _legend(y: float) -> list[SafeString]:
    """What the lines mean."""
    forward, back = _("↓ forward"), _("↑ the way back: what is done is undone")
    start = LEFT + measure(forward, 11) + 12
    return [
        label(LEFT, y, forward, "saga-quiet"),
        label(start, y, shorten(back, WIDTH - start, 11), "saga-quiet"),
    ]


def _way(taken: bool, css: str = "saga-way") -> str:
    return f"{css} saga-taken" if taken else css


def _head(
    x: float, y: float, css: str, wings: tuple[tuple[int, int], tuple[int, int]]
) -> SafeString:
    """The head of an arrow that ends there; ``wings``: where its two lines come from."""
    (a, b), (c, d) = wings
    line = f"M{_at(x + a, y + b)}L{_at(x, y)}L{_at(x + c, y + d)}"
    return path(line, f"{css} saga-head")


def _at(x: float, y: float) -> str:
    return f"{number(x)} {number(y)}"
