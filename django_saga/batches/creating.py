"""Making a batch: what it is done to is fixed, and entered in the audit, in one transaction."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any
from uuid import UUID

from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.models import QuerySet, UUIDField, Value

from django_saga.backends import get_backend
from django_saga.exceptions import SagaError
from django_saga.masking import mask_text
from django_saga.models import SagaBatch, SagaBatchItem, SagaExecution
from django_saga.operations import Asked, Operator, Verb
from django_saga.operations.asking import audited, need_reason
from django_saga.storage import DjangoSagaStorage
from django_saga.texts import storable

logger = logging.getLogger("django_saga.batches")

MOST = 100_000  # items of one batch
SLOWEST, FASTEST = 0.1, 100.0  # executions per second


def create(
    verb: Verb,
    executions: QuerySet[SagaExecution],
    *,
    user: Operator | None,
    reason: str,
    title: str,
    rate: float = 5.0,
    allowed: int | None = 1,
    source: str = "admin",
    storage: DjangoSagaStorage | None = None,
) -> SagaBatch:
    """Have a verb done to each of these executions that it can be done to now, the oldest first.

    ``title`` says what was selected; ``rate`` is in executions per second; after ``allowed`` of
    them it is held until somebody allows more (None: all). It takes the oldest 100,000, and says so
    in its title where there are more. What changes before its turn is skipped.

    ``user``: as whom it is done, with the permissions of that time; None: as code, that may do all.
    Raises PermissionDenied, and SagaError saying why not.
    """
    asked: Asked = {"user": user, "reason": reason, "source": source, "storage": storage}
    with audited("create_batch", verb.permission, asked) as (entry, storage):
        _refuse_unfit(verb, user, rate, allowed)
        need_reason(asked)
        title = storable(mask_text(title))
        batch = SagaBatch(
            verb=verb.name,
            reason=entry.reason.strip(),
            user_id=entry.user_id,
            user_name=entry.user_name,
            title=title[:500],
            rate=rate,
            allowed=allowed,
        )
        batch.save(using=storage.alias, force_insert=True)
        fit = _fit(verb, executions.using(storage.alias))
        batch.total = _fill(batch, fit)
        if batch.total == MOST and fit[MOST : MOST + 1].exists():
            batch.title = f"{title[:450]} (the oldest {MOST:,} of more)"
        batch.save(using=storage.alias, update_fields=["total", "title"])
        entry.batch_id = batch.id
        entry.detail = f"{verb.name}, {batch.total} executions: {batch.title}"
        ring_on_commit(batch.id, storage)
    return batch


def ring_on_commit(batch_id: UUID, storage: DjangoSagaStorage) -> None:
    """Tell the backend's workers of it, once it is there for them to see."""
    storage.on_commit(partial(ring, batch_id))


def ring(batch_id: UUID) -> None:
    """Tell the backend's workers, if it has any; recover_sagas makes up for what gets lost."""
    try:
        get_backend().send_batch(batch_id)
    except Exception as error:
        logger.warning("No worker was told of batch %s, recovery will: %s", batch_id, error)


def _refuse_unfit(verb: Verb, user: Operator | None, rate: float, allowed: int | None) -> None:
    if not verb.bulk:
        raise SagaError(f"{verb.name} is done to one execution at a time.")
    key = str(getattr(user, "pk", None) or "")
    if user is not None and not 0 < len(key) <= 64:  # it would be done as by code, or another
        raise SagaError("A batch takes a user of the database: it is loaded anew for each item.")
    if not (math.isfinite(rate) and SLOWEST <= rate <= FASTEST):
        raise SagaError(f"A rate is from {SLOWEST:g} to {FASTEST:g} executions per second.")
    if allowed is not None and allowed < 1:
        raise SagaError("At least one must be allowed.")


def _fit(verb: Verb, executions: QuerySet[SagaExecution]) -> QuerySet[SagaExecution]:
    if executions.query.distinct:  # such a query cannot be ordered by what it does not select
        executions = executions.model.objects.using(executions.db).filter(
            pk__in=executions.order_by().values("pk")
        )
    return verb.fit(executions).order_by("created_at", "pk")


def _fill(batch: SagaBatch, fit: QuerySet[SagaExecution]) -> int:
    """Insert its items with one statement, as they are now; returns how many."""
    connection = connections[fit.db]
    of = Value(batch.id, output_field=UUIDField())
    rows: Any = fit.annotate(batch=of)
    rows = rows.values_list("batch", "pk", "token", "status")[:MOST]
    try:
        select, parameters = rows.query.get_compiler(fit.db).as_sql()
    except EmptyResultSet:
        select, parameters = "", ()
    inserted = 0
    if select:
        names = ("batch_id", "execution_id", "token", "status")
        columns = ", ".join(map(connection.ops.quote_name, names))
        table = connection.ops.quote_name(SagaBatchItem._meta.db_table)
        with connection.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} ({columns}) {select}", parameters)
            inserted = cursor.rowcount
    if not inserted:
        raise SagaError("It can be done to none of these executions.")
    return inserted
