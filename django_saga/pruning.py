"""Retention: what ended long ago loses its contexts, and later goes, together with its history.

Both happen in short transactions, of so many executions each; what somebody else has in hand is
passed over, and found by the next run.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Unpack

from django.db import IntegrityError, connections, transaction
from django.db.models import Count, Exists, OuterRef, Q, QuerySet

from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.operations.asking import Asked, enter
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.sql import EXECUTIONS, RECORDS, STATEMENTS
from django_saga.verdicts import DatabaseNow, unsettled

logger = logging.getLogger("django_saga.pruning")

BATCH = 1_000  # executions of one transaction: 10 to 50 ms
RATE = 25_000.0  # executions per second: what runs beside it shall hardly feel it
TICK = timedelta(milliseconds=1)  # SQLite compares texts, and ours have no microseconds
ENDED = ("COMPLETED", "FAILED", "STUCK")

Executions = QuerySet[SagaExecution]
Status = SagaExecution.Status


class Stage(StrEnum):
    """What is done to an execution whose time has come."""

    DELETE = "delete"
    BLANK = "blank"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long which executions are kept. An age counts from the end; of a STUCK one from when it
    was settled.

    Never taken: what is active, or has a lease; a STUCK one that is not settled; and, for deletion,
    that to which another row refers, as a retry does, for as long as that one is there. Raises
    SagaError for ages that make no sense together, and for a status in which nothing has ended.
    """

    blank_after: timedelta | None = None
    """When contexts, changes of them, error messages and tracebacks go; None: never by themselves.
    """
    delete_after: timedelta | None = None
    """When execution and records go as a whole; None: never."""
    sagas: Collection[str] = ()
    """Only these; empty: all."""
    statuses: Collection[str] = ENDED
    """Only these."""
    unsettled: bool = False
    """Also failures that no operator has dealt with yet."""

    def __post_init__(self) -> None:
        ages = [age for age in (self.blank_after, self.delete_after) if age is not None]
        if not ages or min(ages) <= timedelta():
            raise SagaError("Say after which time, more than none, to blank or to delete.")
        if len(ages) == 2 and ages != sorted(set(ages)):
            raise SagaError("What is deleted as early as it is blanked need not be blanked.")
        if not self.statuses or not set(self.statuses) <= set(ENDED):
            raise SagaError(f"A status to prune is one of {', '.join(ENDED)}.")

    def over(self, stage: Stage) -> Q:
        """Whose time has come for this stage."""
        age = self.delete_after if stage is Stage.DELETE else self.blank_after
        if age is None:
            return Q(pk__in=[])
        cutoff = DatabaseNow() - age
        rule = Q(status__in=self.statuses, finished_at__lte=cutoff, lease_until=None)
        rule &= ~Q(status=Status.STUCK) | Q(settled_at__lte=cutoff)
        if not self.unsettled:
            rule &= ~Q(unsettled(), status=Status.FAILED)
        return rule & _unreferred() if stage is Stage.DELETE else rule


def _unreferred() -> Q:
    """That nothing but its records refers to it: no retry, and no row of the project's own."""
    free = Q()
    for relation in SagaExecution._meta.related_objects:
        model: Any = relation.related_model
        if model is not SagaStepRecord:
            rows = model._base_manager.filter(**{relation.field.name: OuterRef("pk")})
            free &= ~Q(Exists(rows))
    return free


@dataclass(frozen=True)
class Pruned:
    """What became of some executions of one saga."""

    stage: Stage
    saga: str
    statuses: Counter[str]
    """How many there were of each status."""


def prunable(
    rule: Retention, *, storage: DjangoSagaStorage | None = None
) -> Generator[Pruned, None, None]:
    """What :func:`prune` would do, counted; nothing is touched."""
    for part in _parts(rule, (storage or DjangoSagaStorage()).alias):
        rows = part.rows.filter(rule.over(part.stage))
        if part.stage is Stage.BLANK:
            rows = rows.exclude(rule.over(Stage.DELETE))
        found = rows.values("status").annotate(number=Count("pk")).values_list("status", "number")
        if statuses := Counter(dict(found.order_by("status"))):
            yield Pruned(part.stage, part.saga, statuses)


def prune(
    rule: Retention,
    *,
    rate: float = RATE,
    stopped: Callable[[], bool] = lambda: False,
    **asked: Unpack[Asked],
) -> Generator[Pruned, None, None]:
    """Delete and blank what the rule says, and yield what each transaction did.

    Takes no more than ``rate`` executions per second; 0: as many as it can.
    Ends early, between two transactions, once ``stopped()`` is true, or where the iterator is
    closed; the next call goes on. Leaves one entry in the audit table, when it ends. Raises
    InsideTransaction.
    """
    storage = asked.get("storage") or DjangoSagaStorage()
    storage.refuse_transaction()
    total: Counter[Stage] = Counter()
    try:
        began = time.monotonic()
        for pruned in _prune(rule, storage.alias, stopped):
            number = pruned.statuses.total()
            logger.info("%s of %s: %s", pruned.stage, pruned.saga, number)
            total[pruned.stage] += number
            yield pruned
            if rate:
                time.sleep(max(0.0, number / rate - (time.monotonic() - began)))
            began = time.monotonic()
    finally:
        if total:
            enter("prune", asked, storage, detail=_told(rule, total))


def known_sagas(names: Iterable[str], *, storage: DjangoSagaStorage | None = None) -> set[str]:
    """Those of the names of which something has ended."""
    rows = SagaExecution.objects.using((storage or DjangoSagaStorage()).alias)
    ended = rows.filter(finished_at__isnull=False)
    return {
        name
        for name in names
        for blanked in (False, True)
        if ended.filter(saga=name, blanked_at__isnull=not blanked).exists()
    }


def _prune(rule: Retention, alias: str, stopped: Callable[[], bool]) -> Iterator[Pruned]:
    again = True
    while again:  # what was retried can go after its retry
        again = False
        for part in _parts(rule, alias):
            for statuses in _batches(rule, part, alias):
                again |= part.stage is Stage.DELETE
                yield Pruned(part.stage, part.saga, statuses)
                if stopped():
                    return


def _batches(rule: Retention, part: _Part, alias: str) -> Iterator[Counter[str]]:
    # MariaDB has no partial indexes; in the order of their beginning it finds them, too.
    partial = connections[alias].features.supports_partial_indexes
    order = "finished_at" if partial else "created_at"
    old = part.rows.filter(rule.over(part.stage)).order_by(order).values_list("pk", "status", order)
    since: dict[str, datetime] = {}
    refused = False
    full = True
    while full:
        try:
            with transaction.atomic(using=alias):
                rows = old.filter(**since).select_for_update(skip_locked=True)[:BATCH]
                found = _work(part.stage, rows, alias)
        except IntegrityError:
            # A retry was started between the look and the lock; the next look sees it.
            if refused:
                raise
            refused = True
            continue
        refused = False
        statuses: Counter[str] = Counter()
        for status, number, _ in found:
            statuses[status] += number
        full = statuses.total() == BATCH
        if found:
            since = {f"{order}__gte": max(at for _, _, at in found) - TICK}
            yield statuses


@dataclass(frozen=True)
class _Part:
    """The rows of one saga in one of the two indexes of what has ended."""

    stage: Stage
    saga: str
    rows: Executions


def _parts(rule: Retention, alias: str) -> Iterator[_Part]:
    """Those to delete come first: they need not be blanked."""
    ended = SagaExecution.objects.using(alias).filter(finished_at__isnull=False)
    for stage, blanked in ((Stage.DELETE, True), (Stage.DELETE, False), (Stage.BLANK, False)):
        if (rule.delete_after if stage is Stage.DELETE else rule.blank_after) is None:
            continue
        rows = ended.filter(blanked_at__isnull=not blanked)
        for saga in rule.sagas or _sagas(rows):
            yield _Part(stage, saga, rows.filter(saga=saga))


def _sagas(rows: Executions) -> Iterator[str]:
    """Each name once, by one look into the index for each."""
    names = rows.order_by("saga").values_list("saga", flat=True)
    name = names.first()
    while name is not None:
        yield name
        name = names.filter(saga__gt=name).first()


# What is done to the executions of a batch; {ids} is "= ANY(...)" or "IN (...)".
EDITS = (
    "UPDATE django_saga_sagaauditentry SET detail = 'Removed by retention.' "
    "WHERE execution_id {ids} AND verb = 'edit_context' AND result = 'done'"
)
_STATEMENTS = {
    Stage.DELETE: (
        EDITS,
        f"DELETE FROM {RECORDS} WHERE execution_id {{ids}}",
        f"DELETE FROM {EXECUTIONS} WHERE id {{ids}}",
    ),
    Stage.BLANK: (
        EDITS,
        f"UPDATE {RECORDS} SET changes = '', error_message = '', traceback = '' "
        "WHERE execution_id {ids} AND (changes <> '' OR error_message <> '' OR traceback <> '')",
        f"UPDATE {EXECUTIONS} SET context = '', initial_context = '', fallback_context = NULL, "
        "error_message = '', stuck_reason = '', blanked_at = {now} WHERE id {ids}",
    ),
}


def _work(stage: Stage, old: QuerySet[Any, Any], alias: str) -> list[tuple[str, int, datetime]]:
    """Do it to these; returns each status, how many had it, and the latest time among them."""
    connection = connections[alias]
    dialect = STATEMENTS[connection.vendor].dialect
    with connection.cursor() as cursor:
        if dialect.one_statement:  # so that no id has to travel
            query, params = old.query.get_compiler(alias).as_sql()
            ids = "= ANY(ARRAY(SELECT id FROM old))"  # by the index, whatever the planner guesses
            parts = [f"old (id, status, at) AS MATERIALIZED ({query})"]
            for number, statement in enumerate(_STATEMENTS[stage]):
                parts.append(f"part{number} AS ({statement.format(ids=ids, now=dialect.now)})")
            counted = "SELECT status, count(*), max(at) FROM old GROUP BY status"
            cursor.execute(f"WITH {', '.join(parts)} {counted}", params)
            return list(cursor.fetchall())
        found = list(old)
        prepared = [SagaExecution._meta.pk.get_db_prep_value(pk, connection) for pk, _, _ in found]
        ids = f"IN ({', '.join(['%s'] * len(found))})"
        for statement in _STATEMENTS[stage] if found else ():
            cursor.execute(statement.format(ids=ids, now=dialect.now), prepared)
    return [(status, 1, at) for _, status, at in found]


def _told(rule: Retention, total: Counter[Stage]) -> str:
    said = [
        f"{done} {total[stage]} that ended more than {age / timedelta(days=1):g} days ago."
        for stage, done, age in (
            (Stage.DELETE, "Deleted", rule.delete_after),
            (Stage.BLANK, "Blanked", rule.blank_after),
        )
        if total[stage] and age is not None
    ]
    only = [*rule.sagas, *(rule.statuses if set(rule.statuses) != set(ENDED) else ())]
    said += [f"Only {', '.join(only)}."] if only else []
    said += ["Unsettled failures too."] if rule.unsettled else []
    return " ".join(said)
