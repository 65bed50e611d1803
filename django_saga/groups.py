"""Failures by their cause: which groups have some that nobody has dealt with, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.models import OuterRef, Q, QuerySet, Subquery
from django.db.models.expressions import RawSQL
from django.utils.translation import gettext as _

from django_saga.counts import CAP, by_hour, hours_ago, tally
from django_saga.models import SagaExecution, SagaFailureGroup
from django_saga.verdicts import DatabaseNow, dealt_with, unsettled

Executions = QuerySet[SagaExecution]
Groups = QuerySet[SagaFailureGroup]

LIMIT = 1_000  # groups that are looked at


@dataclass(frozen=True)
class Seen:
    """A group, and when its executions were created."""

    group: SagaFailureGroup
    oldest: datetime | None
    """The oldest that nobody has dealt with; None: all of it has been dealt with."""
    newest: datetime | None
    """The newest, dealt with or not; None: none is there any more, or of this cause."""
    now: datetime
    """The database's clock."""

    @property
    def muted(self) -> bool:
        """Whether somebody muted it, and that has not run out."""
        until = self.group.muted_until
        return until is not None and until > self.now


@dataclass
class Numbers:
    """How many executions of a group nobody has dealt with; each count ends at ``CAP`` + 1."""

    total: int = 0
    hours: list[int] = field(default_factory=list)
    """By hour of their creation, of the latest 24, the oldest first."""

    @property
    def last_hour(self) -> int:
        """Those of the last 60 minutes."""
        return self.hours[-1]

    @property
    def last_day(self) -> int:
        """Those of the last 24 hours."""
        return sum(self.hours)


def live(executions: Executions, limit: int = LIMIT) -> list[str]:
    """The ids of groups that have unsettled ones among these, at most ``limit``; one query.

    Reads the index from group to group, so that a group costs the same however large it is.
    """
    connection = connections[executions.db]
    waiting = executions.filter(unsettled()).order_by("failure_group").values_list("failure_group")
    if not connection.features.supports_partial_indexes:
        return [id for (id,) in waiting.distinct()[:limit]]
    after = waiting.filter(failure_group__gt=RawSQL("live.id", ()))
    try:
        first, given = _sql(waiting[:1])
        following, more = _sql(after[:1])
    except EmptyResultSet:
        return []
    sql = (
        f"WITH RECURSIVE live (id) AS (SELECT * FROM ({first}) f UNION ALL "
        f"SELECT ({following}) FROM live WHERE live.id IS NOT NULL) "
        f"SELECT id FROM live WHERE id IS NOT NULL LIMIT {limit:d}"
    )
    with connection.cursor() as cursor:
        cursor.execute(sql, [*given, *more])
        return [id for (id,) in cursor.fetchall()]


def _sql(queryset: QuerySet[Any, Any]) -> tuple[str, tuple[Any, ...]]:
    sql, params = queryset.query.get_compiler(using=queryset.db).as_sql()
    return sql, tuple(params)


def seen(groups: Groups, executions: Executions) -> list[Seen]:
    """Those of the groups that have unsettled executions, the latest seen first; one query."""
    found = [each for each in look(groups, executions) if each.oldest]
    return sorted(found, key=lambda each: (each.newest, each.group.pk), reverse=True)


def look(groups: Groups, executions: Executions) -> list[Seen]:
    """All of these groups; one query."""
    mine = executions.filter(failure_group=OuterRef("pk"))

    def first(which: Q, order: str) -> Subquery:
        return Subquery(mine.filter(which).order_by(order).values("created_at")[:1])

    rows: Any = groups.annotate(
        now=DatabaseNow(),
        oldest=first(unsettled(), "created_at"),
        newest=first(unsettled(), "-created_at"),
        newest_dealt_with=first(dealt_with(), "-created_at"),
    )
    return [
        Seen(
            row,
            row.oldest,
            max(filter(None, (row.newest, row.newest_dealt_with)), default=None),
            row.now,
        )
        for row in rows
    ]


def number_dealt_with(executions: Executions, id: str) -> int:
    """How many of a group somebody has dealt with, up to ``CAP`` + 1; one query."""
    return executions.filter(dealt_with(), failure_group=id).order_by()[: CAP + 1].count()


def numbers(executions: Executions, ids: Sequence[str], now: datetime) -> dict[str, Numbers]:
    """How many there are of each group, and when they were created; one query."""
    parts = {
        id: executions.filter(unsettled(), failure_group=id)
        .order_by("-created_at")
        .annotate(ago=hours_ago(now))
        .values_list("ago")[: CAP + 1]
        for id in ids
    }
    return {
        id: Numbers(counts.total(), by_hour(Counter({ago: n for (ago,), n in counts.items()})))
        for id, counts in tally(parts, "ago").items()
    }


def next_action(group: SagaFailureGroup) -> str:
    """What can safely be done about it, in words."""
    if group.error_type == "SagaStuck":
        if group.action == "act":
            return _(
                "They are stuck where they stood and have not turned back: mend the cause, then "
                "resume them forward, or retry to have them undone."
            )
        return _(
            "They are stuck in a compensation, and its effect may stand: mend the cause, then "
            "retry the compensation."
        )
    if group.action == "compensate" and group.outcome != "FAILED":
        return _(
            "Retry the compensation once the cause is gone: the effect of the step may stand, or "
            "be undone already."
        )
    if group.action == "compensate":
        return _("Retry the compensation once the cause is gone: the effect of the step stands.")
    if group.outcome == "FAILED":
        return _("All is undone, nothing stands: retry anew once the cause is gone.")
    return _(
        "Whether the step had its effect is unknown, so it was compensated too, like the others: "
        "retry anew once the cause is gone."
    )
