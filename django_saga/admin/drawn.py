"""What the drawings of one execution are made from, and the drawings."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from django_saga import registry
from django_saga.admin.drawings import Attempt, Mark, PlanStep, lanes_svg, plan_svg
from django_saga.admin.drawings.lanes import NARROW, WIDE
from django_saga.diagrams import flowchart
from django_saga.exceptions import UnknownSaga
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.story import StepFate

_MARKS = {  # of the kinds of fates
    "ahead": Mark.PLANNED,
    "pending": Mark.NEXT,
    "running": Mark.RUNNING,
    "completed": Mark.DONE,
    "failed": Mark.FAILED,
    "unknown": Mark.UNKNOWN,
    "lost": Mark.LOST,
    "standing": Mark.TO_UNDO,
    "compensating": Mark.UNDOING,
    "undone": Mark.UNDONE,
    "stuck": Mark.STANDS,
    "spare": Mark.NOT_NEEDED,
    "unbegun": Mark.NOT_BEGUN,
}


def drawings(
    execution: SagaExecution,
    now: datetime,
    plan: Sequence[StepFate],
    records: Sequence[SagaStepRecord],
    *,
    to_now: bool,
) -> dict[str, Any]:
    """The drawings for the page; ``to_now``: whether the records are the latest."""
    attempts = [_attempt(record) for record in records]
    if to_now and execution.is_active and execution.in_flight:
        attempts.append(_in_flight(execution, now))
    return {
        "plan_drawing": plan_svg([_step(fate) for fate in plan]),
        "lanes": [lanes_svg(attempts, now, width=width) for width in (WIDE, NARROW) if attempts],
        "mermaid": _mermaid(execution.saga),
    }


def _step(fate: StepFate) -> PlanStep:
    return PlanStep(fate.step, _MARKS[fate.kind], fate.fallback_of, fate.fate)


def _attempt(record: SagaStepRecord) -> Attempt:
    return Attempt(
        step=record.step,
        action=record.action,
        number=record.attempt,
        mark=Mark.__members__.get(record.outcome, Mark.UNKNOWN),
        ended_at=record.created_at,
        seconds=record.duration,
    )


def _in_flight(execution: SagaExecution, now: datetime) -> Attempt:
    """The attempt that may have begun with the latest checkpoint."""
    driven = execution.lease_until is not None and execution.lease_until > now
    return Attempt(
        step=execution.step,
        action=execution.action,
        number=execution.attempt,
        mark=Mark.RUNNING if driven else Mark.LOST,
        ended_at=None,
        seconds=(now - execution.updated_at).total_seconds(),
    )


def _mermaid(saga: str) -> str:
    """The saga's flow chart, where the code still defines it."""
    try:
        return flowchart(registry.find_saga(saga).definition, saga)
    except UnknownSaga:
        return ""
