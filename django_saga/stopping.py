"""How a command that works in pieces is told to end after the piece in hand."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Stop = queue.SimpleQueue[int]


@contextmanager
def told_to_stop() -> Iterator[Stop]:
    """A queue that gets the first SIGTERM or SIGINT; the next one does what it always did.

    A handler that some host of this command has set, such as a worker's, is left alone.
    """
    stop: Stop = queue.SimpleQueue()  # whose put(), unlike an Event's set(), is fit for a handler
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def told(number: int, frame: FrameType | None) -> None:
        restore()
        stop.put(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, told)
    try:
        yield stop
    finally:
        restore()
