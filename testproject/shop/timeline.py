"""What became of orders, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.core.management.color import Style
from django.db.models import QuerySet

from django_saga.models import SagaExecution, SagaStepRecord
from testproject.shop.sagas import OrderSaga

STYLES = {
    "DONE": "SUCCESS",
    "COMPLETED": "SUCCESS",
    "FAILED": "ERROR",
    "STUCK": "ERROR",
}


def executions() -> QuerySet[SagaExecution]:
    return SagaExecution.objects.filter(saga=OrderSaga.name)


def timeline(execution: SagaExecution, style: Style) -> Iterator[str]:
    """A line for each attempt, oldest first, and one for where the execution stands."""
    yield style.MIGRATE_LABEL(
        f"{'after':>9}  {'step':13} {'action':11} {'attempt':>7}  {'outcome':12} {'took':>8}"
    )
    for record in execution.records.all():
        after = (record.created_at - execution.created_at).total_seconds()
        took = "" if record.duration is None else f"{record.duration * 1000:.0f} ms"
        outcome = styled(style, record.outcome, 12)
        yield (
            f"{after:7.2f} s  {record.step:13} {record.action:11} {record.attempt:7}  "
            f"{outcome} {took:>8}{why(record)}"
        )
    yield f"{execution.duration.total_seconds():7.2f} s  {standing(execution, style)}"


def why(record: SagaStepRecord) -> str:
    return f"  {record.error_type}: {record.error_message}" if record.error_type else ""


def standing(execution: SagaExecution, style: Style) -> str:
    status = styled(style, execution.status)
    if execution.stuck_reason:
        return f"{status}: {execution.stuck_reason}"
    if execution.is_active:
        return f"{status}, with {execution.action} of {execution.step} in flight"
    return status


def styled(style: Style, word: str, width: int = 0) -> str:
    paint: Any = getattr(style, STYLES.get(word, "WARNING"))
    return str(paint(f"{word:{width}}"))


def effects(ledger: dict[str, Any]) -> str:
    """What the services have written for an order, in its order."""
    standing = {line["id"] for line in ledger["standing"]}
    undos = {"refund", "cancel", "block"}
    told = []
    for line in sorted(ledger["effects"] + ledger["blocked"], key=lambda line: str(line["time"])):
        mark = (
            "" if line["verb"] in undos else " (stands)" if line["id"] in standing else " (undone)"
        )
        told.append(f"{line['service']}.{line['verb']}{mark}")
    return ", ".join(told) or "nothing"
