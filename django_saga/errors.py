"""What an exception from a handler means, and the form in which it is stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
from django_saga.texts import storable, told, traced

if TYPE_CHECKING:
    from django_saga.flow import Run


def report_of(
    error: Exception,
    step: StepType,
    fallback: Fallback | None,
    context: str,
    secrets: Iterable[str] = (),
) -> Report:
    """The report of an attempt that ended with this exception; ``secrets`` are masked in it."""
    uncertain = (*step.uncertain, TransactionLeftOpen)
    return Report(
        outcome=Outcome.UNKNOWN if isinstance(error, uncertain) else Outcome.FAILED,
        context=context,
        error=describe(error, secrets),
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


def describe(error: BaseException, secrets: Iterable[str] = ()) -> Error:
    """An exception as it is stored: no locals, no secrets, no more than the settings allow."""
    secrets = tuple(secrets)
    return Error(
        type=type(error).__qualname__,
        message=_storable(told(error, secrets), conf.ERROR_LIMIT),
        traceback=_storable(traced(error, secrets), conf.TRACEBACK_LIMIT, keep_end=True),
        frame=frame_of(error),
    )


def secrets_of(run: Run, *contexts: str) -> set[str]:
    """The sensitive values of a run, as it was taken over, as it is stored, as it stands now."""
    from django_saga.masking import sensitive_values

    codec = getattr(run.definition, "codec", None)  # a saga that the code lost has none
    sensitive = codec.sensitive if codec else ()
    stored = {run.claim.state.context, run.state.context, run.state.fallback_context, *contexts}
    return {value for json in stored if json for value in sensitive_values(json, sensitive)}


def _storable(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Text that every database takes: no NUL, no lone surrogates, not too long."""
    text = storable(text)
    if len(text) <= limit:
        return text
    return f"…{text[len(text) - limit + 1 :]}" if keep_end else f"{text[: limit - 1]}…"
