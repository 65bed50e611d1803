"""The two large tables in partitions by month, on PostgreSQL, for who drops months as a whole.

A new execution's id begins with its time (UUID 7), so the partitions are ranges of ids: the primary
key stays, and every statement about one execution looks into one partition. What has another id,
such as a retry or a ``saga_id`` of the caller's own, and what was there before, lies in the default
partition, where :mod:`django_saga.pruning` takes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Unpack
from uuid import UUID

from django.db import (
    DatabaseError,
    IntegrityError,
    connections,
    transaction,
)
from django.db.models import Count, Q

from django_saga import registry
from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution
from django_saga.operations.asking import Asked, enter
from django_saga.pruning import EDITS, Retention, Stage
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.sql import EXECUTIONS, RECORDS

TABLES = {EXECUTIONS: ("id",), RECORDS: ("execution_id", "id")}  # and their primary keys
LOCK_SECONDS = 5  # that a change waits for those who use the tables, who wait behind it

Execute = Callable[..., list[Any]]


@dataclass(frozen=True, order=True)
class Month:
    """A month, in UTC, by the ids of the executions that began in it."""

    year: int
    month: int

    def __str__(self) -> str:
        return f"{self.year}-{self.month:02}"

    @property
    def next(self) -> Month:
        """The one after it."""
        return Month(self.year + self.month // 12, self.month % 12 + 1)

    @property
    def begin(self) -> datetime:
        """Its first moment."""
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    @property
    def first_id(self) -> UUID:
        """No id that was made in it, or later, is less."""
        return UUID(int=int(self.begin.timestamp() * 1000) << 80)

    def name(self, table: str) -> str:
        """Its partition of a table."""
        return f"{table}_{self.year}_{self.month:02}"


@dataclass(frozen=True)
class Dropped:
    """What became of a month that was to be dropped."""

    month: Month
    executions: int
    why_not: str = ""
    """Empty: it was dropped."""


def is_partitioned(*, storage: DjangoSagaStorage | None = None) -> bool:
    """Whether the tables are."""
    alias = (storage or DjangoSagaStorage()).alias
    if connections[alias].vendor != "postgresql":
        return False
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT relkind FROM pg_class WHERE oid = to_regclass(%s)", [EXECUTIONS])
        kind = cursor.fetchone()
    return kind is not None and kind[0] == "p"


def limited() -> list[str]:
    """The sagas that limit how many of them run, whose places partitions cannot keep apart.

    Their constraint would have to be unique over all partitions, and holds no column that decides
    about these.
    """
    return sorted(saga.name for saga in registry.all_sagas() if saga.max_running is not None)


def refuse_limits() -> None:
    """Raise SagaError where a saga has max_running."""
    if names := limited():
        raise SagaError(
            f"Partitions and max_running exclude each other, which {', '.join(names)} "
            "has: a place could be taken twice. Drop one of the two."
        )


def months(*, storage: DjangoSagaStorage | None = None) -> list[Month]:
    """Those that have partitions, in order."""
    alias = (storage or DjangoSagaStorage()).alias
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(%s)",
            [EXECUTIONS],
        )
        names = [name for (name,) in cursor.fetchall()]
    found = (re.search(r"_(\d{4})_(\d\d)\"?$", name) for name in names)
    return sorted(Month(int(match[1]), int(match[2])) for match in found if match)


def convert(*, storage: DjangoSagaStorage | None = None) -> None:
    """Make the tables partitioned; what they hold becomes the default partition, as it is.

    Nothing is copied, but the foreign keys are checked again under a lock, and a new index of the
    records is built before that: do it on fresh tables, or while no saga has to run. Raises
    SagaError where it cannot be done, or is done already.
    """
    alias = (storage or DjangoSagaStorage()).alias
    if connections[alias].vendor != "postgresql":
        raise SagaError("Partitions take PostgreSQL.")
    if is_partitioned(storage=storage):
        raise SagaError("The tables are partitioned already.")
    refuse_limits()
    key = f"{_default(RECORDS)}_key"
    with connections[alias].cursor() as cursor:
        cursor.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {key}")
        columns = ", ".join(TABLES[RECORDS])
        cursor.execute(f"CREATE UNIQUE INDEX CONCURRENTLY {key} ON {RECORDS} ({columns})")
    with _changing(alias) as execute:
        links = execute(
            "SELECT conrelid::regclass::text, quote_ident(conname), pg_get_constraintdef(oid) "
            "FROM pg_constraint WHERE contype = 'f' AND confrelid = %s::regclass",
            [EXECUTIONS],
        )
        for table, link, _ in links:
            execute(f"ALTER TABLE {table} DROP CONSTRAINT {link}")
        for table in TABLES:
            _convert(table, key, execute)
        for table, link, definition in links:
            execute(f"ALTER TABLE {table} ADD CONSTRAINT {link} {definition}")


def _convert(table: str, key: str, execute: Execute) -> None:
    default = _default(table)
    indexes = execute(
        "SELECT relname, indisprimary, pg_get_indexdef(indexrelid) FROM pg_index "
        "JOIN pg_class ON pg_class.oid = indexrelid "
        "WHERE indrelid = %s::regclass AND relname <> %s",
        [table, key],
    )
    execute(f"ALTER TABLE {table} RENAME TO {default}")
    for name, primary, _ in indexes:
        if table == EXECUTIONS:
            execute(f'ALTER INDEX "{name}" RENAME TO "{name[:55]}_default"')
        elif primary:
            execute(f'ALTER TABLE {default} DROP CONSTRAINT "{name}"')
            execute(f"ALTER TABLE {default} ADD PRIMARY KEY USING INDEX {key}")
        else:  # by the execution alone, as the new primary key does too
            execute(f'DROP INDEX "{name}"')
    like = f"LIKE {default} INCLUDING DEFAULTS INCLUDING CONSTRAINTS"
    execute(f"CREATE TABLE {table} ({like}) PARTITION BY RANGE ({TABLES[table][0]})")
    execute(f"ALTER TABLE {table} ADD PRIMARY KEY ({', '.join(TABLES[table])})")
    if table == EXECUTIONS:
        for _, primary, definition in indexes:
            if not primary and not definition.startswith("CREATE UNIQUE"):
                execute(definition)
    else:
        execute(f"ALTER TABLE {default} ALTER id DROP IDENTITY")
        execute(f"ALTER TABLE {table} ALTER id ADD GENERATED BY DEFAULT AS IDENTITY")
        ((last,),) = execute(f"SELECT COALESCE(max(id), 0) FROM {default}")
        execute(f"ALTER TABLE {table} ALTER id RESTART WITH {last + 1}")
    execute(f"ALTER TABLE {table} ATTACH PARTITION {default} DEFAULT")


def add_months(ahead: int, *, storage: DjangoSagaStorage | None = None) -> Iterator[Month]:
    """Make the partitions of this month and of so many after it, and yield those that are new.

    This month's is left out where the default partition has executions of it: let the default
    partition keep them. Raises SagaError where the tables are not partitioned, or stay locked.
    """
    storage = storage or DjangoSagaStorage()
    _refuse_plain(storage)
    refuse_limits()
    now = _now(storage)
    for month in missing_months(ahead, storage=storage):
        if not _in_default(month, storage):
            _add(month, storage.alias, checked=month.begin > now)
            yield month


def missing_months(ahead: int, *, storage: DjangoSagaStorage | None = None) -> list[Month]:
    """Those of this month and of so many after it that have no partitions."""
    storage = storage or DjangoSagaStorage()
    there, now = months(storage=storage), _now(storage)
    wanted = [Month(now.year, now.month)]
    while len(wanted) <= ahead:
        wanted.append(wanted[-1].next)
    return [month for month in wanted if month not in there]


def _add(month: Month, alias: str, *, checked: bool) -> None:
    """With a check first, the default partition is not read under the lock to see that it fits."""
    first, last = month.first_id, month.next.first_id
    # Only where none can come yet: from then on, the check would refuse it.
    checks = {table: f"{_default(table)}_{month.year}_{month.month:02}" for table in TABLES}
    try:
        for table, check in checks.items() if checked else ():
            key, default = TABLES[table][0], _default(table)
            with _changing(alias) as execute:
                execute(f"ALTER TABLE {default} DROP CONSTRAINT IF EXISTS {check}")
                outside = f"CHECK ({key} < '{first}' OR {key} >= '{last}') NOT VALID"
                execute(f"ALTER TABLE {default} ADD CONSTRAINT {check} {outside}")
            with _changing(alias) as execute:
                execute(f"ALTER TABLE {default} VALIDATE CONSTRAINT {check}")
        with _changing(alias) as execute:
            for table in TABLES:
                name = month.name(table)
                like = f"LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS"
                execute(f"CREATE TABLE {name} ({like})")
                values = f"FROM ('{first}') TO ('{last}')"
                execute(f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES {values}")
    finally:
        for table, check in checks.items() if checked else ():
            with _changing(alias) as execute:
                execute(f"ALTER TABLE {_default(table)} DROP CONSTRAINT IF EXISTS {check}")


def drop_months(after: timedelta, **asked: Unpack[Asked]) -> Iterator[Dropped]:
    """Drop the months of which all executions may be deleted, oldest first; tell of the others.

    Looked at is each month that was over so long ago; what may be deleted is what
    :class:`~django_saga.pruning.Retention` with ``delete_after`` says. Each that is dropped leaves
    an entry in the audit table.
    """
    storage = asked.get("storage") or DjangoSagaStorage()
    _refuse_plain(storage)
    rule = Retention(delete_after=after)
    for month in months(storage=storage):
        if month.next.begin > _now(storage) - after:
            return
        found = _look(month, rule, storage)
        if found.why_not:
            yield found
            continue
        try:
            yield _drop(month, rule, asked, storage)
        except IntegrityError as error:  # one of them was retried just now
            yield Dropped(month, found.executions, f"it is referred to: {error}")


def _look(month: Month, rule: Retention, storage: DjangoSagaStorage) -> Dropped:
    """What would become of it."""
    rows = SagaExecution.objects.using(storage.alias).filter(
        pk__gte=month.first_id, pk__lt=month.next.first_id
    )
    over = rule.over(Stage.DELETE)
    found = rows.aggregate(total=Count("pk"), over=Count("pk", filter=Q(over)))
    left = found["total"] - found["over"]
    why = f"{left} of its executions are active, not dealt with, too young or referred to"
    return Dropped(month, found["total"], why if left else "")


def _drop(month: Month, rule: Retention, asked: Asked, storage: DjangoSagaStorage) -> Dropped:
    between = f"BETWEEN '{month.first_id}' AND '{month.next.first_id}'"
    with _changing(storage.alias) as execute:
        for table in TABLES:
            execute(f"LOCK TABLE {month.name(table)} IN ACCESS EXCLUSIVE MODE")
        found = _look(month, rule, storage)  # one may have been stored while that was waited for
        if found.why_not:
            return found
        execute(EDITS.format(ids=between))
        for table in reversed(TABLES):
            execute(f"ALTER TABLE {table} DETACH PARTITION {month.name(table)}")
            execute(f"DROP TABLE {month.name(table)}")
        detail = f"Dropped the month {month} with {found.executions} executions."
        enter("prune", asked, storage, detail=detail)
    return found


def _refuse_plain(storage: DjangoSagaStorage) -> None:
    if not is_partitioned(storage=storage):
        raise SagaError("The tables are not partitioned: see manage.py partition_sagas --convert.")


def _in_default(month: Month, storage: DjangoSagaStorage) -> bool:
    with connections[storage.alias].cursor() as cursor:
        cursor.execute(
            f"SELECT EXISTS (SELECT 1 FROM {_default(EXECUTIONS)} WHERE id >= %s AND id < %s)",
            [month.first_id, month.next.first_id],
        )
        return bool(cursor.fetchone()[0])


def _now(storage: DjangoSagaStorage) -> datetime:
    with connections[storage.alias].cursor() as cursor:
        cursor.execute("SELECT statement_timestamp()")
        now: datetime = cursor.fetchone()[0]
    return now.astimezone(UTC)


def _default(table: str) -> str:
    return f"{table}_default"


@contextmanager
def _changing(alias: str) -> Iterator[Execute]:
    """A transaction that gives up where it would have everybody wait behind it."""

    def execute(sql: str, params: Any = None) -> list[Any]:
        with connections[alias].cursor() as cursor:
            cursor.execute(sql, params)
            return list(cursor.fetchall()) if cursor.description else []

    try:
        with transaction.atomic(using=alias, durable=True):
            execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            yield execute
    except DatabaseError as error:
        why = _BUSY.get(getattr(error.__cause__, "sqlstate", ""))
        if why is None:
            raise
        raise SagaError(f"The tables {why}; try again. ({error})") from error


_BUSY = {
    "55P03": "are in use",  # lock_not_available
    "40P01": "are in use",  # deadlock_detected
    "42P01": "were changed by somebody else just now",  # undefined_table
    "42P07": "were changed by somebody else just now",  # duplicate_table
    "42710": "were changed by somebody else just now",  # duplicate_object
    "42704": "were changed by somebody else just now",  # undefined_object
    "23505": "were changed by somebody else just now",  # of PostgreSQL's own catalogue
}
