"""An execution, what it is a retry of, and what it was retried as: one after the other."""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.db.models import QuerySet

from django_saga.models import SagaExecution

LONGEST = 20  # executions of a chain that are shown


def chain_of(execution: SagaExecution, rows: QuerySet[SagaExecution]) -> list[SagaExecution]:
    """The whole chain, the oldest first, out of these ``rows``; empty where there is just one."""
    ids = _ids(execution, rows.db)
    if len(ids) < 2:
        return []
    shown = rows.filter(pk__in=ids).only("id", "saga", "status", "created_at")
    chain = list(shown.order_by("created_at", "pk"))
    here = next((n for n, one in enumerate(chain) if one.pk == execution.pk), 0)
    first = max(0, min(here - LONGEST // 2, len(chain) - LONGEST))
    return chain[first : first + LONGEST]


def _ids(execution: SagaExecution, alias: str) -> list[Any]:
    connection = connections[alias]
    key = SagaExecution._meta.pk
    table = connection.ops.quote_name(SagaExecution._meta.db_table)
    saga_id = key.get_db_prep_value(execution.pk, connection)
    bound = LONGEST - 1
    found = SagaExecution.objects.using(alias).raw(
        _CHAIN.format(table=table), [saga_id, bound, saga_id, bound]
    )
    return [one.pk for one in found]


# Two walks, each along an index: up by the key, down by the foreign key.
_CHAIN = """
WITH RECURSIVE earlier(id, retry_of_id, steps) AS (
    SELECT id, retry_of_id, 0 FROM {table} WHERE id = %s
    UNION ALL
    SELECT e.id, e.retry_of_id, earlier.steps + 1
    FROM earlier JOIN {table} e ON e.id = earlier.retry_of_id WHERE earlier.steps < %s
), later(id, steps) AS (
    SELECT id, 0 FROM {table} WHERE id = %s
    UNION ALL
    SELECT e.id, later.steps + 1
    FROM later JOIN {table} e ON e.retry_of_id = later.id WHERE later.steps < %s
)
SELECT id FROM earlier UNION SELECT id FROM later
"""
