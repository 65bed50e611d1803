"""Where attempts lie on an axis of time: to scale, but none so short that it cannot be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from django_saga.admin.formats import span

WIDEST = 12  # a bar that is too short for its time is drawn this wide, or less where many are
FOLD = 56  # the width of a wait that is folded
FOLDS = 2  # at most
MANY = 0.6  # a wait that is more than this share of all is folded ...
FEW = 0.3  # ... where the attempts are less than this share
TICKS = 5  # at most
NOTHING = 1e-6  # seconds: below what a database's clock tells apart

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_STEPS = [
    *(size * 10.0**power for power in (-3, -2, -1) for size in (1, 2, 5)),
    *(1, 2, 5, 10, 15, 30),
    *(size * _MINUTE for size in (1, 2, 5, 10, 15, 30)),
    *(size * _HOUR for size in (1, 2, 3, 6, 12)),
    *(size * _DAY * 10**power for power in range(7) for size in (1, 2, 5)),
]


@dataclass(frozen=True)
class Piece:
    """A stretch of the axis: an attempt, a wait, or a wait that is folded."""

    seconds: float
    attempt: int | None = None  # its number in the sequence; None for a wait
    folded: bool = False
    began: float = 0.0  # seconds from the first begin
    x: float = 0.0
    width: float = 0.0


@dataclass(frozen=True)
class Tick:
    """A mark on the axis."""

    x: float
    text: str


@dataclass(frozen=True)
class Timeline:
    """The axis, from 0 to its width."""

    pieces: list[Piece]
    ticks: list[Tick]
    seconds: float

    @property
    def folds(self) -> list[Piece]:
        """The waits that are not drawn to scale, in order."""
        return [piece for piece in self.pieces if piece.folded]


def lay_out(times: Sequence[tuple[float, float]], width: float) -> Timeline:
    """The begin and the end of each attempt, in seconds, on an axis of that width.

    An execution does one thing at a time: where its drivers' clocks say otherwise, the later
    attempt is drawn from the end of the one before.
    """
    if not times:
        return Timeline([], [], 0.0)
    pieces = _folded(_sequence(times))
    placed = _placed(pieces, _widths(pieces, width))
    return Timeline(placed, _ticks(placed), sum(piece.seconds for piece in placed))


def _sequence(times: Sequence[tuple[float, float]]) -> list[Piece]:
    pieces = []
    now = times[0][0]
    for attempt, (began, ended) in enumerate(times):
        if began - now > NOTHING:
            pieces.append(Piece(began - now))
            now = began
        pieces.append(Piece(max(ended - now, 0.0), attempt))
        now = max(ended, now)
    return pieces


def _folded(pieces: list[Piece]) -> list[Piece]:
    """The pieces, with the waits folded beside which nothing else could be seen."""
    pieces = list(pieces)
    while sum(piece.folded for piece in pieces) < FOLDS:
        shown = sum(piece.seconds for piece in pieces if not piece.folded)
        tried = sum(piece.seconds for piece in pieces if piece.attempt is not None)
        waits = [p for p in pieces if p.attempt is None and not p.folded]
        longest = max(waits, key=lambda piece: piece.seconds, default=None)
        if longest is None or longest.seconds <= MANY * shown or tried >= FEW * shown:
            break
        pieces[pieces.index(longest)] = Piece(longest.seconds, folded=True)
    return pieces


def _widths(pieces: list[Piece], width: float) -> list[float]:
    """Each piece's width: all to one scale, but for folds, and for bars too short for it."""
    attempts = sum(piece.attempt is not None for piece in pieces)
    room = width - FOLD * sum(piece.folded for piece in pieces)
    least = min(WIDEST, 0.55 * room / attempts)
    short: set[int] = set()
    while True:
        scaled = [
            (place, piece.seconds)
            for place, piece in enumerate(pieces)
            if place not in short and not piece.folded
        ]
        seconds = sum(length for _, length in scaled)
        scale = (room - least * len(short)) / seconds if seconds > NOTHING else 0.0
        found = {
            place
            for place, length in scaled
            if pieces[place].attempt is not None and length * scale < least
        }
        if not found:
            break
        short |= found
    return [
        FOLD if piece.folded else least if place in short else piece.seconds * scale
        for place, piece in enumerate(pieces)
    ]


def _placed(pieces: list[Piece], widths: list[float]) -> list[Piece]:
    placed = []
    began = x = 0.0
    for piece, width in zip(pieces, widths, strict=True):
        placed.append(Piece(piece.seconds, piece.attempt, piece.folded, began, x, width))
        began, x = began + piece.seconds, x + width
    return placed


def _ticks(pieces: list[Piece]) -> list[Tick]:
    """Where each stretch between folds begins, and round times after that."""
    stretches = _stretches(pieces)
    lengths = [sum(piece.seconds for piece in stretch) for stretch in stretches]
    step = next(
        (s for s in _STEPS if sum(1 + int(n / s + 1e-9) for n in lengths) <= TICKS), _STEPS[-1]
    )
    ticks = []
    for stretch, length in zip(stretches, lengths, strict=True):
        began = stretch[0].began
        ticks.append(Tick(stretch[0].x, span(began) if began else "0"))
        for count in range(1, int(length / step + 1e-9) + 1):
            plus = "+" if began else ""
            ticks.append(Tick(_x(stretch, began + count * step), f"{plus}{_round(count * step)}"))
    return ticks


def _stretches(pieces: list[Piece]) -> list[list[Piece]]:
    stretches: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece.folded:
            stretches.append([])
        else:
            stretches[-1].append(piece)
    return stretches


def _x(stretch: list[Piece], time: float) -> float:
    for piece in stretch:
        past = time - piece.began
        if past <= piece.seconds and piece.seconds > 0:
            return piece.x + piece.width * max(past, 0.0) / piece.seconds
    return stretch[-1].x + stretch[-1].width


def _round(seconds: float) -> str:
    """A round time in the largest unit that needs no fraction: 90 s, 15 m, 6 h."""
    units = {_DAY: _("%(n)s d"), _HOUR: _("%(n)s h"), _MINUTE: _("%(n)s m")}
    for size, text in units.items():
        if seconds % size == 0:
            return text % {"n": int(seconds // size)}
    return _("%(n)s s") % {"n": f"{seconds:.4g}"}
