"""What went wrong with an execution: the latest error of each action that matters."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import Max, Q, QuerySet

from django_saga.machine import Outcome
from django_saga.models import SagaExecution, SagaStepRecord

MOST = 6  # errors that are shown

Records = QuerySet[SagaStepRecord]


@dataclass(frozen=True)
class Trouble:
    """One error, and the attempt that raised it."""

    step: str
    action: str
    type: str
    message: str
    outcome: str = ""
    traceback: str = ""


def troubles_of(
    execution: SagaExecution, records: Records, *, traced: bool = False
) -> list[Trouble]:
    """The errors of compensations first: those are to be mended now. Then why it turned back.

    ``records`` are the execution's; ``traced``: with their tracebacks.
    """
    found = _latest(execution, records if traced else records.defer("traceback"))
    troubles = [
        Trouble(
            record.step,
            record.action,
            record.error_type,
            record.error_message,
            record.outcome,
            record.traceback if traced else "",
        )
        for record in found
    ]
    told = any(t.step == execution.failed_step and t.action == "act" for t in troubles)
    if (execution.error_type or execution.error_message) and not told:  # no attempt raised it
        error = execution.error_type, execution.error_message
        troubles.append(Trouble(execution.failed_step, "act", *error))
    return sorted(troubles, key=lambda trouble: trouble.action == "act")


def _latest(execution: SagaExecution, records: Records) -> list[SagaStepRecord]:
    """The latest failed attempt of each action that failed, or that is being tried again."""
    undone = [e.step for e in execution.state.effects if e.undo is Outcome.FAILED]
    which = Q(step=execution.failed_step, action="act")
    which |= Q(step__in=undone, action="compensate")
    if execution.is_active and execution.attempt > 1:
        which |= Q(step=execution.step, action=execution.action)
    elif not undone and not execution.failed_step:
        return []
    failed = records.filter(which).exclude(outcome=SagaStepRecord.Outcome.DONE)
    newest = failed.order_by().values("step", "action").annotate(newest=Max("pk"))
    return list(records.filter(pk__in=newest.values("newest")).order_by("-pk")[:MOST])
