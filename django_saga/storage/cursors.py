"""The cursors that statements of one row go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from django.db.backends.base.base import BaseDatabaseWrapper

if TYPE_CHECKING:
    from django.db.backends.utils import CursorWrapper


def fetch(connection: BaseDatabaseWrapper, sql: str, params: Sequence[Any]) -> Any:
    """The first row that it returns."""
    if kept := kept_cursors(connection, 1):
        kept[0].execute(sql, params)
        return kept[0].fetchone()
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return cursor.fetchone()


def kept_cursors(connection: BaseDatabaseWrapper, number: int) -> list[CursorWrapper]:
    """So many cursors that stay with their connection; none where each is to be a new one.

    A cursor of psycopg 3 finds out once how parameters are adapted; to make one for each statement
    takes up to a tenth of all the CPU of a saga.
    """
    connection.close_if_health_check_failed()
    connection.ensure_connection()
    session = connection.connection
    if not hasattr(session, "pipeline") or _is_somebody_elses(connection):
        return []
    connection.validate_thread_sharing()
    kept = vars(session).setdefault("django_saga_cursors", [])
    if len(kept) < number:
        with connection.wrap_database_errors:
            kept += [connection.create_cursor() for _ in range(number - len(kept))]
    return [connection.make_cursor(cursor) for cursor in kept[:number]]


def _is_somebody_elses(connection: BaseDatabaseWrapper) -> bool:
    """Whether more than Django's own lies on the way to a cursor, or another thread on its own.

    A backend may choose a tenant's schema there, and a tool may note the statements. Threads may
    share a connection, but no cursor.
    """
    its = type(connection)
    return (
        connection.queries_logged
        or connection.allow_thread_sharing
        or "cursor" in vars(connection)
        or its.cursor is not BaseDatabaseWrapper.cursor
        or its._cursor is not BaseDatabaseWrapper._cursor  # type: ignore[attr-defined]
    )
