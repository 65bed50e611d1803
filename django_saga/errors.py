"""What an exception from a handler means, and the form in which it is stored."""

from __future__ import annotations

import traceback

from django_saga.causes import frame_of
from django_saga.conf import conf
from django_saga.exceptions import (
    Abort,
    CircuitOpen,
    InvalidDefinition,
    RetryLater,
    TransactionLeftOpen,
)
from django_saga.machine import Error, Outcome, Report
from django_saga.steps import CurrentStep, Fallback, StepType
from django_saga.texts import said_by


def report_of(error: Exception, step: StepType, fallback: Fallback | None, context: str) -> Report:
    """The report of an attempt that ended with this exception."""
    uncertain = (*step.uncertain, TransactionLeftOpen)
    return Report(
        outcome=Outcome.UNKNOWN if isinstance(error, uncertain) else Outcome.FAILED,
        context=context,
        error=describe(error),
        retry_after=error.seconds if isinstance(error, RetryLater) else None,
        abort=isinstance(error, (Abort, InvalidDefinition)),
        # Without a Fallback in the code, the plan of an older execution may have one all the same.
        falls_back=fallback is None
        or not fallback.failure_exceptions
        or isinstance(error, (*fallback.failure_exceptions, CircuitOpen)),
    )


def left_open(info: CurrentStep) -> TransactionLeftOpen:
    """The error of a handler that returned inside a transaction."""
    return TransactionLeftOpen(
        f"{info.action} of step {info.step} left a transaction open on the sagas' database. It was "
        "rolled back; let every atomic() block end within the handler."
    )


def describe(error: BaseException) -> Error:
    """An exception as it is stored: no locals, no more than the limits in the settings."""
    lines = traceback.format_exception(error)
    return Error(
        type=type(error).__qualname__,
        message=_storable(said_by(error), conf.ERROR_LIMIT),
        traceback=_storable("".join(lines), conf.TRACEBACK_LIMIT, keep_end=True),
        frame=frame_of(error),
    )


def _storable(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Text that every database takes: no NUL, no lone surrogates, not too long."""
    text = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
    if len(text) <= limit:
        return text
    return f"…{text[len(text) - limit + 1 :]}" if keep_end else f"{text[: limit - 1]}…"
