"""The database: its clock, its transactions, its tables."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connections
from django.db.migrations.executor import MigrationExecutor
from django.utils.translation import gettext as _

from django_saga.checks import check_sqlite
from django_saga.doctor.finding import Finding
from django_saga.models import SagaHeartbeat
from django_saga.storage import DjangoSagaStorage
from django_saga.verdicts import DatabaseNow

APART = 5.0  # seconds that two clocks may differ


def transactions() -> Iterator[Finding]:
    """SQLite that takes its write lock in the middle of a transaction."""
    for warning in check_sqlite():
        yield Finding("transactions", "warning", str(warning.msg), warning.hint or "")


def prepared_statements() -> Iterator[Finding]:
    """PostgreSQL that plans each checkpoint anew; a hint, as a pooler may want it so."""
    connection = _connection()
    if connection.vendor != "postgresql":
        return
    options = connection.settings_dict.get("OPTIONS") or {}
    lacking = [
        name for name in ("server_side_binding", "prepare_threshold") if not options.get(name)
    ]
    if not lacking:
        yield Finding("prepared_statements", "ok", _("Checkpoints are prepared statements."))
        return
    what = _("Checkpoints are planned anew each time: OPTIONS lacks %(names)s.")
    todo = _(
        "That is safe. Unless a pooler hands out its sessions by transaction, "
        "'server_side_binding': True and 'prepare_threshold': 5 make checkpoints a third faster."
    )
    names = ", ".join(lacking)
    yield Finding("prepared_statements", "ok", what % {"names": names}, todo)


def migrations() -> Iterator[Finding]:
    """Migrations of this app that are not applied where executions are stored."""
    executor = MigrationExecutor(_connection())
    leaves = executor.loader.graph.leaf_nodes("django_saga")
    plan = executor.migration_plan(leaves)
    missing = [migration.name for migration, _ in plan if migration.app_label == "django_saga"]
    if missing:
        what = _("Migrations are not applied: %(names)s.") % {"names": ", ".join(missing)}
        todo = _("Run: manage.py migrate django_saga --database %(alias)s")
        yield Finding("migrations", "error", what, todo % {"alias": DjangoSagaStorage().alias})
        return
    yield Finding("migrations", "ok", _("All migrations are applied."))


def clock() -> Iterator[Finding]:
    """The database's clock, by which leases are given, against that of this machine."""
    before = datetime.now(UTC)
    there = _database_now()
    after = datetime.now(UTC)
    apart = max(before - there, there - after, timedelta()).total_seconds()
    if apart <= APART:
        yield Finding("clock", "ok", _("The database's clock and this machine's agree."))
        return
    what = _("The database's clock and this machine's are %(n)s s apart.") % {"n": f"{apart:.1f}"}
    todo = _(
        "Leases hold, they go by the database's alone; times in logs and on pages do not fit "
        "together. Let both keep time by NTP."
    )
    yield Finding("clock", "warning", what, todo)


def _database_now() -> datetime:
    alias = DjangoSagaStorage().alias
    with connections[alias].cursor() as cursor:
        query, params = _now_query(alias)
        cursor.execute(query, params)
        text = str(cursor.fetchone()[0])
    now = datetime.fromisoformat(text)
    return now if now.tzinfo else now.replace(tzinfo=UTC)


def _now_query(alias: str) -> tuple[str, Any]:
    now = DatabaseNow()
    compiler = SagaHeartbeat.objects.using(alias).query.get_compiler(alias)
    sql, params = compiler.compile(now)
    return f"SELECT {sql}", params


def _connection() -> Any:
    return connections[DjangoSagaStorage().alias]
