"""Text of what may refuse to be told: a user's own classes may raise when they are asked."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

MOST = 1_000_000  # characters of an error's text that are looked at


def said_by(error: BaseException) -> str:
    """An error's message."""
    try:
        return str(error)
    except Exception as unspeakable:
        return f"(no message: its __str__ raised {type(unspeakable).__qualname__})"


def told(error: BaseException, secrets: Iterable[str] = ()) -> str:
    """An error's message, for others than its handler: what looks like a secret is masked."""
    return _masked(said_by(error)[:MOST], secrets)


def traced(error: BaseException, secrets: Iterable[str] = ()) -> str:
    """An error's traceback, without locals and masked.

    Logs get this text rather than ``exc_info``, which would print the message as it is.
    """
    return _masked("".join(traceback.format_exception(error))[-MOST:], secrets)


def _masked(text: str, secrets: Iterable[str]) -> str:
    from django_saga.masking import mask_text  # once there is an error: its patterns take a while

    return mask_text(text, secrets)


def storable(text: str) -> str:
    """What every database takes: no NUL, no lone surrogates."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def shown(value: object) -> str:
    """A value as a message shows it."""
    try:
        return f"{value!r:.100}"
    except Exception:
        return f"a {type(value).__qualname__}"
