"""Which steps are slow, and which fail most, out of the latest attempts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Q, QuerySet

from django_saga.admin.formats import span
from django_saga.admin.sites import are_some
from django_saga.models import SagaExecution, SagaStepRecord

SAMPLE = 5_000  # of the newest attempts
SHOWN = 5
DAY = timedelta(hours=24)


@dataclass
class Step:
    """The attempts of one action of a step."""

    saga: str
    step: str
    action: str
    url: str = ""
    failed: int = 0
    attempts: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def most(self) -> float:
        """Seconds within which 95 of 100 attempts end."""
        ordered = sorted(self.seconds)
        return ordered[min(int(len(ordered) * 0.95), len(ordered) - 1)] if ordered else 0.0

    @property
    def typical_shown(self) -> str:
        """The median."""
        return span(sorted(self.seconds)[len(self.seconds) // 2]) if self.seconds else ""

    @property
    def most_shown(self) -> str:
        return span(self.most)

    @property
    def percent(self) -> int:
        """How many of 100 fail."""
        return round(100 * self.failed / self.attempts)


def tempo(
    executions: QuerySet[SagaExecution], now: datetime, link: Callable[[str, str], str]
) -> dict[str, Any]:
    """The slowest and the most failing steps of the last 24 hours; one query."""
    rows = SagaStepRecord.objects.using(executions.db)
    if are_some(executions):
        rows = rows.filter(execution__in=executions)
    columns = ("execution__saga", "step", "action", "outcome", "duration", "recent")
    recent = rows.annotate(recent=Q(created_at__gte=now - DAY))
    newest = recent.order_by("-pk").values_list(*columns)[:SAMPLE]
    steps: dict[tuple[str, str, str], Step] = {}
    looked_at = 0
    for saga, step, action, outcome, duration, is_recent in newest:
        if not is_recent:
            continue
        looked_at += 1
        found = steps.setdefault((saga, step, action), Step(saga, step, action, link(saga, step)))
        found.attempts += 1
        found.failed += outcome != SagaStepRecord.Outcome.DONE
        if duration is not None:
            found.seconds.append(duration)
    slowest = sorted(steps.values(), key=lambda step: step.most, reverse=True)
    failing = sorted(steps.values(), key=lambda step: step.failed, reverse=True)
    return {
        "slowest": [step for step in slowest if step.seconds][:SHOWN],
        "failing": [step for step in failing if step.failed][:SHOWN],
        "sample": SAMPLE if looked_at == SAMPLE else 0,
    }
