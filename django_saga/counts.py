"""Counts that stay cheap on any number of rows: each looks at so many, and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.models import Case, IntegerField, QuerySet, Value, When

CAP = 10_000
HOURS = 24

Tallies = dict[str, Counter[tuple[Any, ...]]]


def tally(parts: Mapping[str, QuerySet[Any, Any]], *columns: str) -> Tallies:
    """For each part, how many of its rows have which values; all of them in one statement.

    A part is a slice of ``values_list(*columns)``: what is beyond it is not read. Only texts and
    whole numbers come back as they are stored.
    """
    found: Tallies = {name: Counter() for name in parts}
    selects: list[str] = []
    params: list[Any] = []
    alias = next(iter(parts.values())).db if parts else ""
    for number, part in enumerate(parts.values()):
        try:
            sql, given = part.query.get_compiler(using=alias).as_sql()
        except EmptyResultSet:  # as of none(): there is nothing to ask
            continue
        selects.append(f"SELECT {number} AS part, q.* FROM ({sql}) q")
        params += given
    if not selects:
        return found
    values = ", ".join(connections[alias].ops.quote_name(column) for column in columns)
    sql = (
        f"SELECT part, {values}, COUNT(*) FROM ({' UNION ALL '.join(selects)}) u "
        f"GROUP BY part, {values}"
    )
    names = list(parts)
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)
        for part_number, *row, count in cursor.fetchall():
            found[names[part_number]][tuple(row)] += count
    return found


def hours_ago(now: datetime) -> Case:
    """In which of the latest hours it was created, 0 for the current one; -1 if before them."""
    starts = [now - timedelta(hours=ago + 1) for ago in range(HOURS)]
    return Case(
        When(created_at__lte=starts[-1], then=Value(-1)),
        *(When(created_at__gt=start, then=Value(ago)) for ago, start in enumerate(starts)),
        default=Value(-1),
        output_field=IntegerField(),
    )


def by_hour(counter: Counter[int]) -> list[int]:
    """Counts by hours ago as :func:`hours_ago` gives them, the oldest first."""
    return [counter[ago] for ago in reversed(range(HOURS))]


def utc_now() -> datetime:
    """This process's clock, as the storage's times are stored."""
    now = datetime.now(UTC)
    return now if settings.USE_TZ else now.replace(tzinfo=None)
