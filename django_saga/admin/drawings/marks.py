"""What a step or an attempt came to: its sign and its word, so that colour never tells alone."""

from __future__ import annotations

from enum import StrEnum

from django.utils.safestring import SafeString
from django.utils.translation import pgettext

from django_saga.admin.drawings.svg import element, number


class Mark(StrEnum):
    """The states that drawings tell apart; the value names the CSS class."""

    PLANNED = "planned"
    NEXT = "next"  # the next attempt, of an act
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # without effect
    UNKNOWN = "unknown"  # whether it had its effect
    INTERRUPTED = "interrupted"  # lost with its driver, as another found
    LOST = "lost"  # in flight when its driver was lost, and not taken over yet
    TO_UNDO = "to-undo"
    UNDOING = "undoing"
    UNDONE = "undone"
    STANDS = "stands"  # its compensation failed
    NOT_NEEDED = "not-needed"
    NOT_BEGUN = "not-begun"  # and never will be

    @property
    def word(self) -> str:
        """What it means, in a word or three."""
        return {
            Mark.PLANNED: pgettext("saga drawing", "planned"),
            Mark.NEXT: pgettext("saga drawing", "next"),
            Mark.RUNNING: pgettext("saga drawing", "running"),
            Mark.DONE: pgettext("saga drawing", "done"),
            Mark.FAILED: pgettext("saga drawing", "failed"),
            Mark.UNKNOWN: pgettext("saga drawing", "unknown"),
            Mark.INTERRUPTED: pgettext("saga drawing", "interrupted"),
            Mark.LOST: pgettext("saga drawing", "driver lost"),
            Mark.TO_UNDO: pgettext("saga drawing", "to be undone"),
            Mark.UNDOING: pgettext("saga drawing", "being undone"),
            Mark.UNDONE: pgettext("saga drawing", "undone"),
            Mark.STANDS: pgettext("saga drawing", "stands"),
            Mark.NOT_NEEDED: pgettext("saga drawing", "not needed"),
            Mark.NOT_BEGUN: pgettext("saga drawing", "not begun"),
        }[self]


# Lines in a square of 12 by 12: a font need not have the sign.
_SIGNS = {
    Mark.PLANNED: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    Mark.NEXT: "M2 6h8M6.5 2.5L10 6L6.5 9.5",
    Mark.RUNNING: "M3.5 2L10 6L3.5 10z",
    Mark.DONE: "M2 6.5L5 9.5L10.5 2.5",
    Mark.FAILED: "M2.5 2.5L9.5 9.5M9.5 2.5L2.5 9.5",
    Mark.UNKNOWN: "M3.5 4a2.5 2.5 0 1 1 3.7 2.2C6.4 6.6 6 7.1 6 8M6 10.4v.3",
    Mark.INTERRUPTED: "M7.5 1L3.5 6.3h5L4.5 11",
    Mark.LOST: "M7.5 1L3.5 6.3h5L4.5 11",
    Mark.TO_UNDO: "M4.5 1.5L2 4l2.5 2.5M2 4h5a3 3 0 0 1 0 6H5",
    Mark.UNDOING: "M8.5 2L2 6L8.5 10z",
    Mark.UNDONE: "M5 2.5L1.5 6L5 9.5M1.5 6h9",
    Mark.STANDS: "M6 1.5v5.5M6 10v.4",
    Mark.NOT_NEEDED: "M2.5 6h7",
    Mark.NOT_BEGUN: "M2.5 6h7",
}


def sign(mark: Mark, x: float, y: float, size: float = 12) -> SafeString:
    """The mark's sign in the square that has its upper left corner there."""
    place = f"translate({number(x)} {number(y)}) scale({number(size / 12)})"
    return element("path", d=_SIGNS[mark], class_="saga-sign", transform=place)
