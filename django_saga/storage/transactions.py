"""Whose transaction is open: a caller's, a test's, or one that several writes share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from django.db import DatabaseError, OperationalError
from django.db.transaction import Atomic

from django_saga.exceptions import (
    InsideTransaction,
    TransactionLeftOpen,
)

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper


def refuse_transaction(connection: BaseDatabaseWrapper) -> None:
    if connection.in_atomic_block:
        # TestCase's own blocks stand for "no transaction", as they do for Django's durable.
        inside = not all(
            is_testcase_s(block) or isinstance(block, Together)
            for block in connection.atomic_blocks
        )
    elif connection.connection is None:
        inside = not connection.settings_dict["AUTOCOMMIT"]  # as it will be
    else:
        inside = not connection.autocommit
    if inside:
        raise InsideTransaction(
            f"A saga cannot be driven inside an open transaction on {connection.alias!r}: its "
            "checkpoints would not be durable. Call enqueue() there, which joins the "
            "transaction and starts on commit; under ATOMIC_REQUESTS decorate the view with "
            "django.db.transaction.non_atomic_requests."
        )


def is_testcase_s(block: Atomic) -> bool:
    return getattr(block, "_from_testcase", False)


class Together(Atomic):
    """The transaction of several writes, each of which is as durable as one of its own."""


def together(connection: BaseDatabaseWrapper) -> AbstractContextManager[object]:
    """One transaction for several writes, on the shortest way that the database offers."""
    if not connection.in_atomic_block:
        connection.close_if_health_check_failed()
        connection.ensure_connection()
        if hasattr(connection.connection, "pipeline"):  # psycopg 3
            return _pipeline(connection)
    return Together(connection.alias, savepoint=True, durable=False)


@contextmanager
def _pipeline(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """What PostgreSQL gets up to the end of a pipeline is one transaction: no BEGIN, no COMMIT."""
    session, before, is_at_its_end = connection.connection, sys.exception(), False
    try:
        with connection.wrap_database_errors, session.pipeline():
            try:
                yield
                is_at_its_end = True
            except BaseException:
                # Its end would commit what was sent, unless the server knows of the error.
                if session.info.pipeline_status.name != "ABORTED":
                    session.pgconn.finish()
                raise
    except BaseException as error:
        if is_at_its_end or session.closed or not isinstance(error, DatabaseError):
            # It may have been left in the pipeline, or in a transaction that nothing ends any more.
            session.pgconn.finish()  # a pool would take it back otherwise
            connection.close()
        if not is_at_its_end:
            raise
        if interruption := _interruption_in(error, before):
            raise interruption from None
        # Where the commit is refused, psycopg 3.3 is confused: its own errors come out, and the
        # connection is of no use any more.
        raise OperationalError(f"the end of a pipeline failed: {error!r}") from error


def _interruption_in(
    error: BaseException | None, before: BaseException | None
) -> BaseException | None:
    """What struck, Ctrl-C for one, where psycopg's own error came out in its place."""
    while isinstance(error, Exception) and error is not before:
        error = error.__context__
    return None if error is before else error


def roll_back_after(block: Atomic, connection: BaseDatabaseWrapper) -> list[Atomic]:
    """End the blocks within this one that were left open; returns them."""
    blocks = connection.atomic_blocks
    left = blocks[blocks.index(block) + 1 :] if block in blocks else []
    for inner in reversed(left):
        inner.__exit__(TransactionLeftOpen, TransactionLeftOpen(), None)
    return left
