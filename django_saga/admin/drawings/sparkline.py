"""The latest hours as small bars."""

from __future__ import annotations

from collections.abc import Sequence

from django.utils.safestring import SafeString
from django.utils.translation import ngettext

from django_saga.admin.drawings.svg import drawing, element, number, path

WIDTH, HEIGHT = 120, 24
BASE = HEIGHT - 1.5  # the line on which the bars stand
LEAST = 2  # the height of the smallest count: one is not nothing


def sparkline(values: Sequence[int], label: str) -> SafeString:
    """Counts by hour, the oldest first; ``label`` says what is counted."""
    most = max([*values, 0])
    words = ngettext(
        "%(label)s, the latest %(hours)s hour: %(total)s in all, at most %(most)s in an hour.",
        "%(label)s, the latest %(hours)s hours: %(total)s in all, at most %(most)s in an hour.",
        len(values),
    ) % {"label": label, "hours": len(values), "total": sum(values), "most": most}
    slot = WIDTH / max(len(values), 1)
    bars = [
        element(
            "rect",
            x=place * slot + slot * 0.12,
            y=BASE - _height(value, most),
            width=slot * 0.76,
            height=_height(value, most),
        )
        for place, value in enumerate(values)
        if value > 0
    ]
    base = path(f"M0 {number(BASE + 0.5)}H{WIDTH}", "saga-base")
    return drawing("saga-sparkline", WIDTH, HEIGHT, words, words, *bars, base)


def _height(value: int, most: int) -> float:
    return LEAST + (BASE - 1 - LEAST) * value / most
