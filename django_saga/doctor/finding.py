"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What was looked at; it stays the same from release to release."""
    level: Level
    what: str
    """What was found, in a sentence."""
    todo: str = ""
    """What to do about it."""
