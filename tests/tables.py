"""Empties the tables that tests write to, at the price of one statement each.

A queryset's ``delete()`` first reads what it deletes, and what refers to that. Here the order does
not matter: foreign keys are looked at when the transaction ends, and on MariaDB not at all.
"""

from __future__ import annotations

from django.apps import apps
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.management.color import no_style
from django.db import DEFAULT_DB_ALIAS, connections

MODELS = (
    *apps.get_app_config("django_saga").get_models(),
    *(LogEntry, Session, User.groups.through, User.user_permissions.through, User),
)
TABLES = [model._meta.db_table for model in MODELS]


def empty(*aliases: str) -> None:
    """Those of the named databases, otherwise of the default one."""
    for alias in aliases or (DEFAULT_DB_ALIAS,):
        connection = connections[alias]
        if connection.vendor == "postgresql":  # where Django's flush would truncate: far slower
            with connection.cursor() as cursor:
                cursor.execute(";".join(f"DELETE FROM {table}" for table in TABLES))
        else:
            connection.ops.execute_sql_flush(connection.ops.sql_flush(no_style(), TABLES))
