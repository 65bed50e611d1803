"""Raises an exception at the n-th line of django_saga that this thread executes."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import django_saga
from tests.faults import noted

HOME = str(Path(django_saga.__file__).parent) + os.sep


class Strike:
    """Counts the executed lines, and raises ``error`` once ``at`` of them are reached."""

    def __init__(
        self,
        at: int | None,
        error: type[BaseException],
        within: str = "",
        phase: Callable[[], object] | None = None,
    ) -> None:
        self.at, self.error, self.home, self.phase = at, error, HOME + within, phase
        self.lines = 0
        self.fired = ""
        """Where it was raised."""
        self.places: dict[object, int] = {}
        """Where it came by, if a ``phase`` was given, and at which line first."""
        self._tracers: dict[int, Any] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not _starts(code.co_filename, self.home):
            return None
        by_handler = frame.f_back is not None and frame.f_back.f_code.co_filename == noted.__file__
        # What a handler calls belongs to the handler: its errors are the handler's own.
        return None if by_handler else self._lines_of(code)

    def _lines_of(self, code: CodeType) -> Any:
        if id(code) not in self._tracers:  # a code object takes long to be hashed
            self._tracers[id(code)] = self._tracer(code)
        return self._tracers[id(code)]

    def _tracer(self, code: CodeType) -> Any:
        safe = safe_in(code)

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line" and frame.f_lasti not in safe:
                self.lines += 1
                if self.phase is not None:
                    self.places.setdefault((self.phase(), _place(frame)), self.lines)
                if self.lines == self.at:
                    file = code.co_filename.removeprefix(HOME)
                    self.fired = f"{file}:{frame.f_lineno} in {code.co_qualname}"
                    raise self.error(f"at {self.fired}")  # Python then stops tracing
            return line

        return line


@contextmanager
def striking(
    at: int | None,
    error: type[BaseException] = KeyboardInterrupt,
    within: str = "",
    phase: Callable[[], object] | None = None,
) -> Iterator[Strike]:
    """Strike in this thread, in the block; ``at`` None: only count. ``within``: in one module.

    ``phase``: how far the world outside has come. Where one line is executed again in the same
    phase, by the same callers, it is one place: the next round of a loop that touches nothing.
    """
    strike, before = Strike(at, error, within, phase), sys.gettrace()
    sys.settrace(strike)
    try:
        yield strike
    finally:
        sys.settrace(before)


def _place(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    """The lines of django_saga that lead to where a frame stands."""
    place = []
    while frame is not None:
        if _starts(frame.f_code.co_filename, HOME):
            place.append((id(frame.f_code), frame.f_lineno))
        frame = frame.f_back
    return tuple(place)


@cache
def _starts(file: str, home: str) -> bool:
    return file.startswith(home)


@cache
def safe_in(code: CodeType) -> frozenset[int]:
    """Instructions at which nothing ever raises, though a tracer sees a line there.

    Python looks for signals only after calls, at jumps back and where a function begins. So not at
    a ``try:``, not on the way into or out of an ``except``, and not where a ``with`` block has
    ended and its ``__exit__`` is about to be called.
    """
    instructions = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    safe = {i.offset for i in instructions if i.opname in _SAFE}
    for at, instruction in enumerate(instructions):
        # A value that is about to be returned is put out of the way first.
        call = at + (instruction.opname == "SWAP")
        arguments = instructions[call : call + 3]
        if len(arguments) == 3 and all(
            i.opname == "LOAD_CONST" and i.argval is None for i in arguments
        ):
            safe.add(instruction.offset)
    return frozenset(safe)


_SAFE = ("NOP", "PUSH_EXC_INFO", "POP_EXCEPT", "WITH_EXCEPT_START", "RERAISE")
