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
    secrets = tuple(secrets)
    try:
        if _is_chained(error):
            return _masked("".join(traceback.format_exception(error))[-MOST:], secrets)
        said = "".join(traceback.format_exception_only(error))[-MOST:]
    except Exception as unspeakable:
        return f"(no traceback: telling it raised {type(unspeakable).__qualname__})"
    return _masked_frames(error.__traceback__, secrets) + _masked(said, secrets)


def _is_chained(error: BaseException) -> bool:
    context = None if error.__suppress_context__ else error.__context__
    told_with = error.__cause__ is not None or context is not None
    return told_with or isinstance(error, BaseExceptionGroup)


def _masked_frames(trace: TracebackType | None, secrets: Iterable[str]) -> str:
    """Where a service is down, many fail at one place, and its frames take longest to be told."""
    from django_saga.masking import mask_known, mask_text

    if trace is None:
        return ""
    steps = list(_each(trace))
    where = tuple((id(step.tb_frame.f_code), step.tb_lasti) for step in steps)
    known = _FRAMES.get(where)
    if known is None:
        told = "".join(traceback.format_tb(trace))[-MOST:]
        text = mask_text(f"Traceback (most recent call last):\n{told}")
        # With its code, so that no other can have its id; equal code may be of another file.
        known = text, [step.tb_frame.f_code for step in steps]
        if len(_FRAMES) >= _REMEMBERED:
            _FRAMES.clear()
        if len(steps) <= _DEEPEST:
            _FRAMES[where] = known
    return mask_known(known[0], secrets)


def _each(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


_REMEMBERED, _DEEPEST = 256, 60  # places, and frames of one
_FRAMES: dict[tuple[tuple[int, int], ...], tuple[str, list[CodeType]]] = {}


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
