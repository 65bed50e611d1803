"""What a failure came from, so that equal ones can be counted, seen and retried together."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from functools import cache, lru_cache
from pathlib import Path
from traceback import walk_tb
from types import FrameType

from msgspec import Struct

from django_saga.interventions import CANCELLED
from django_saga.machine import Action, Error, Outcome, State, Status, Transition, why_stuck


class Cause(Struct, frozen=True, gc=False):
    """The saga, where in it, and with what error; executions with an equal one form a group."""

    saga: str
    step: str
    action: Action
    outcome: Outcome  # of the attempt: whether it is known that it had no effect
    error_type: str
    frame: str  # the top one of the project's own code, as module.function
    message: str

    @property
    def id(self) -> str:
        """Equal for equal causes; what differs in a message from one to the next is left out."""
        return _id(self)


@lru_cache(maxsize=256)  # where a service is down, one cause comes again and again
def _id(cause: Cause) -> str:
    parts = (*(getattr(cause, name) for name in _KEY), stripped(cause.message))
    return hashlib.md5("\0".join(parts).encode(), usedforsecurity=False).hexdigest()


_KEY = ("saga", "step", "action", "outcome", "error_type", "frame")


def cause_of(saga: str, before: State, transition: Transition) -> Cause | None:
    """Why this transition turned the saga back, or got it stuck; None where it did neither."""
    after, record = transition.state, transition.record
    if record and record.action is Action.COMPENSATE and _gave_up(record.step, before, after):
        error = record.error or Error("", "")
        return _cause(saga, record.step, record.action, record.outcome, error)
    if after.status is Status.STUCK and before.status is not Status.STUCK:
        if after.stuck_reason == why_stuck(_not_undone(after)):
            return None  # told when it came to that: the group is the failed compensation's
        outcome = Outcome.UNKNOWN if before.in_flight else Outcome.FAILED
        return _cause(
            saga, before.step, before.action, outcome, Error("SagaStuck", after.stuck_reason)
        )
    # A stuck one that is to be undone after all counts as the failure of its act again.
    turned = after.status in (Status.COMPENSATING, Status.FAILED)
    if turned and before.status is not Status.COMPENSATING and after.error:
        if after.error.type == CANCELLED:
            return None
        outcome = record.outcome if record else Outcome.FAILED
        return _cause(saga, after.failed_step, Action.ACT, outcome, after.error)
    return None


def _gave_up(step: str, before: State, after: State) -> bool:
    return step in _not_undone(after) and step not in _not_undone(before)


def _not_undone(state: State) -> list[str]:
    """The steps whose compensation failed."""
    return [effect.step for effect in state.effects if effect.undo is Outcome.FAILED]


def _cause(saga: str, step: str, action: Action, outcome: Outcome, error: Error) -> Cause:
    return Cause(saga, step, action, outcome, error.type[:255], error.frame, error.message[:500])


def stripped(message: str) -> str:
    """The beginning of a message, without numbers, ids and what is quoted."""
    return _VARIES.sub("#", message[:300].split("\n", 1)[0])[:120]


_VARIES = re.compile(
    # quoted, but for the apostrophe within a word; any word with a digit in it
    r"""(?<!\w)'.*?'(?!\w)|"[^"]*"|\b(?=[\w-]*\d)[\w-]+\b"""
)


def frame_of(error: BaseException) -> str:
    """The innermost frame of the project's own code, as module.function; else empty."""
    named = ""
    for frame, _ in walk_tb(error.__traceback__):
        if _is_the_projects(frame.f_code.co_filename):
            named = _name(frame)
    return named[:255]


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"


@cache
def _is_the_projects(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename)
    if "site-packages" in path.parts or "dist-packages" in path.parts:
        return False
    return not any(path.is_relative_to(library) for library in _LIBRARIES)


_LIBRARIES = tuple(
    {
        Path(__file__).parent,
        *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")),
    }
)
