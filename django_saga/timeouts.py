"""A step's own timeout over a sync handler, where Python can interrupt one: in the main thread."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import (
    AbstractContextManager,
    _GeneratorContextManager,
    contextmanager,
    nullcontext,
)
from types import FrameType

# Code that must not be left half-way: it would leave a connection that lies about its transaction.
_SPARED = tuple(
    f"{os.sep}{package}{os.sep}"
    for package in (f"django{os.sep}db", "psycopg", "psycopg_pool", "pymysql", "MySQLdb", "asgiref")
)
_AGAIN = 0.01  # seconds until another try, where the alarm met such code


class StepTimedOut(BaseException):
    """Not an Exception, so that no ``except Exception`` of a handler takes it for its own."""


def time_limit(seconds: float | None) -> AbstractContextManager[None]:
    """Raise TimeoutError out of the block after ``seconds``.

    Works in the main thread, unless somebody else's SIGALRM is due before; elsewhere it does
    nothing, and whoever called must look at the clock. Code of Django's database layer and of
    :mod:`django_saga.calling` is never interrupted: the alarm waits until it has returned.
    """
    if seconds is None or not _can_interrupt(seconds):
        return _UNLIMITED
    return _alarm(seconds)


_UNLIMITED = nullcontext()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    others, began = signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()
    over: list[bool] = []

    def ring(_signal: int, frame: FrameType | None) -> None:
        if over:  # it rang just as it was turned off
            return
        if _is_spared(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        else:
            raise StepTimedOut

    def restore() -> None:
        over.append(True)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            left = max(others - (time.monotonic() - began), _AGAIN)
            signal.setitimer(signal.ITIMER_REAL, left)

    before = signal.getsignal(signal.SIGALRM)
    try:
        try:
            try:
                signal.signal(signal.SIGALRM, ring)
                signal.setitimer(signal.ITIMER_REAL, seconds)
                yield
            finally:
                restore()
        finally:
            restore()  # Ctrl-C, for one, may have cut the first short
    except StepTimedOut:
        raise TimeoutError(f"the step took longer than its timeout of {seconds:g} s") from None


def _can_interrupt(seconds: float) -> bool:
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGALRM) is None:  # C code's own, which nobody could put back
        return False
    # RQ, for one, sets an alarm even for no timeout at all, 136 years ahead.
    others = signal.getitimer(signal.ITIMER_REAL)[0]
    return others == 0.0 or others > seconds


def _is_spared(frame: FrameType | None) -> bool:
    called = None
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _SPARED):
            return True
        if frame.f_code.co_name == "call_handler" and frame.f_globals["__name__"] == _OURS:
            # On the way into or out of the block nobody would catch it.
            return called is None or called.f_code in _ENTRANCES
        called, frame = frame, frame.f_back
    return True  # the handler has returned


_OURS = "django_saga.calling"
_ENTRANCES = {
    _GeneratorContextManager.__enter__.__code__,
    _GeneratorContextManager.__exit__.__code__,
}
