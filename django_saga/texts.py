"""Text of what may refuse to be told: a user's own classes may raise when they are asked."""

from __future__ import annotations


def said_by(error: BaseException) -> str:
    """An error's message."""
    try:
        return str(error)
    except Exception as unspeakable:
        return f"(no message: its __str__ raised {type(unspeakable).__qualname__})"


def shown(value: object) -> str:
    """A value as a message shows it."""
    try:
        return f"{value!r:.100}"
    except Exception:
        return f"a {type(value).__qualname__}"
