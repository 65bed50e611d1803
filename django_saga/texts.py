"""Text of what may refuse to be told: a user's own classes may raise when they are asked."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from types import CodeType, TracebackType

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
    if _is_chained(error):
        return _masked("".join(traceback.format_exception(error))[-MOST:], secrets)
    said = "".join(traceback.format_exception_only(error))[-MOST:]
    return _masked_frames(error.__traceback__, secrets) + _masked(said, secrets)


def _is_chained(error: BaseException) -> bool:
    told_with = error.__cause__ or (not error.__suppress_context__ and error.__context__)
    return bool(told_with) or isinstance(error, BaseExceptionGroup)


def _masked_frames(trace: TracebackType | None, secrets: Iterable[str]) -> str:
    """Where a service is down, many fail at one place, and its frames take longest to be told."""
    from django_saga.masking import mask_known, mask_text

    if trace is None:
        return ""
    where = tuple((at.tb_frame.f_code, at.tb_lasti) for at in _each(trace))
    if where not in _FRAMES:
        if len(_FRAMES) == _REMEMBERED:
            _FRAMES.clear()
        told = "".join(traceback.format_tb(trace))[-MOST:]
        _FRAMES[where] = mask_text(f"Traceback (most recent call last):\n{told}")
    return mask_known(_FRAMES[where], secrets)


def _each(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


_REMEMBERED = 256
_FRAMES: dict[tuple[tuple[CodeType, int], ...], str] = {}


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
