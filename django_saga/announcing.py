"""Telling of a transition that is durable: the signals and the log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from django_saga import signals
from django_saga.flow import Announce, Flow, Run, driver_name
from django_saga.machine import Record
from django_saga.storage.base import Saved

if TYPE_CHECKING:
    from django_saga.models import SagaStepRecord

logger = logging.getLogger("django_saga.saga")


def announce(run: Run, events: tuple[str, ...], saved: Saved | None) -> Flow[None]:
    record = run.last if saved is not None else None
    for event in events:
        _log(run, event, record)
        if getattr(signals, event).receivers:
            told = _record(run, record, saved) if record and event.startswith("step_") else None
            yield Announce(event, run, told)


def _record(run: Run, record: Record, saved: Saved | None) -> SagaStepRecord:
    from django_saga.models import SagaStepRecord

    error = record.error
    return SagaStepRecord(
        id=saved.record_id if saved else None,
        execution_id=run.id,
        step=record.step,
        action=record.action.value,
        attempt=record.attempt,
        outcome=record.outcome.value,
        error_type=error.type if error else "",
        error_message=error.message if error else "",
        traceback=error.traceback if error else "",
        duration=run.duration,
        token=run.claim.token,
        driver=driver_name(),
        created_at=run.at,
    )


_LEVELS = {
    "step_failed": logging.WARNING,
    "saga_compensating": logging.WARNING,
    "saga_recovered": logging.WARNING,
    "saga_failed": logging.ERROR,
    "saga_stuck": logging.CRITICAL,
}


def _log(run: Run, event: str, record: Record | None) -> None:
    level = _LEVELS.get(event, logging.INFO)
    if not logger.isEnabledFor(level):
        return
    if record is None or (event.startswith("saga_") and run.state.failed_step):
        # Of the saga as a whole: the step that failed, not the one that was undone last.
        step, attempt = run.state.failed_step or run.state.step, run.state.attempt
        error = run.state.error
    else:
        step, attempt, error = record.step, record.attempt, record.error
    extra = {"saga": run.saga.name, "execution": str(run.id), "step": step, "attempt": attempt}
    why = f": {error.type}: {error.message}" if error and level > logging.INFO else ""
    # One line whatever the message holds: an error's text comes from outside.
    why = why.encode("unicode_escape").decode()
    logger.log(level, "%s %s %s, step %s%s", event, run.saga.name, run.id, step, why, extra=extra)
