"""What errors of a database mean: it is away, it is not migrated, or the question was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db import (
    InterfaceError,
    InternalError,
    OperationalError,
    ProgrammingError,
)

from django_saga.exceptions import (
    SagaError,
    StorageUnavailable,
)

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


class translated:
    """Tell a database that is away, or not migrated, from a fault in what was asked."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        away = (OperationalError, InterfaceError, ProgrammingError)
        if isinstance(error, away) or is_read_only(error):
            assert isinstance(error, Exception)
            _raise_translated(error, self._connection)


def _raise_translated(error: Exception, connection: BaseDatabaseWrapper) -> None:
    if _is_outdated(error):
        raise SagaError(
            f"The database {connection.alias!r} has no tables of django-saga, or older ones; "
            f"run: manage.py migrate django_saga --database {connection.alias} ({error})"
        ) from error
    if isinstance(error, ProgrammingError):
        return
    if not connection.in_atomic_block:
        connection.close()  # what is left of it must not serve the next statement
    raise StorageUnavailable(f"The database {connection.alias!r}: {error}") from error


def is_read_only(error: BaseException | None) -> bool:
    """Whether the server takes no writes any more, as after a failover; the next one may."""
    return isinstance(error, InternalError) and _sqlstate(error) == "25006"


def _sqlstate(error: Exception) -> str | None:
    return getattr(error.__cause__, "sqlstate", None)  # psycopg has it


def _is_outdated(error: Exception) -> bool:
    """Whether a table or a column is missing; asks nothing of a transaction that is broken."""
    code = error.args[0] if error.args else None  # MariaDB; SQLite has its text there
    return (
        _sqlstate(error) in ("42P01", "42703")
        or code in (1146, 1054)
        or any(lack in str(code) for lack in _SQLITE_LACKS)
    )


_SQLITE_LACKS = ("no such table", "no such column", "has no column named")
