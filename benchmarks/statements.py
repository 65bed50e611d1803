"""What django-saga sends to its database, to send the very same without it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any
from uuid import UUID

import psycopg
from django.db import connections, transaction


@dataclass(frozen=True)
class Statement:
    """SQL with its parameters, and which of these are the id of the execution."""

    asked: str
    """As Django is asked for it."""
    sql: str
    params: tuple[Any, ...]
    ids: tuple[int, ...]

    def about(self, id: object) -> list[Any]:
        """The parameters for another execution."""
        params = list(self.params)
        for at in self.ids:
            params[at] = id
        return params


Commit = Sequence[Statement]


def captured(alias: str, run: Callable[[], UUID]) -> list[Commit]:
    """The commits of one run, which returns the id of its execution."""
    connection = connections[alias]
    sent: list[tuple[object, str, Sequence[Any]]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, about: Any) -> Any:
        block = connection.atomic_blocks[0] if connection.in_atomic_block else object()
        if not sql.startswith("BEGIN"):  # which SQLite is sent, and PostgreSQL not
            sent.append((block, sql, params))
        return execute(sql, params, many, about)

    with connection.execute_wrapper(note):
        id = run()
    if not sent:
        raise RuntimeError("Nothing was sent through Django's cursors, so nothing can be replayed.")
    return [
        [_statement(sql, params, id, connection.vendor) for _, sql, params in commit]
        for _, commit in groupby(sent, key=itemgetter(0))
    ]


def _statement(sql: str, params: Sequence[Any], id: UUID, vendor: str) -> Statement:
    sent = sql.replace("%s", "?").replace("%%", "%") if vendor == "sqlite" else sql
    ids = [at for at, value in enumerate(params) if value in (id, id.hex)]
    return Statement(sql, sent, tuple(params), tuple(ids))


def replay(connection: psycopg.Connection[Any], commits: Sequence[Commit], id: UUID) -> None:
    """The same commits on PostgreSQL, of another execution."""
    for commit in commits:
        if len(commit) == 1:
            _send(connection, commit[0], id)
            continue
        with connection.transaction():
            for statement in commit:
                _send(connection, statement, id)


async def areplay(
    connection: psycopg.AsyncConnection[Any], commits: Sequence[Commit], id: UUID
) -> None:
    """As :func:`replay`, for statements that are each a commit."""
    for [statement] in commits:
        cursor = await connection.execute(statement.sql, statement.about(id))
        if cursor.description:
            await cursor.fetchone()


def replay_on_sqlite(connection: sqlite3.Connection, commits: Sequence[Commit], id: UUID) -> None:
    """The same commits on SQLite, of another execution."""
    for commit in commits:
        if len(commit) > 1:
            connection.execute("BEGIN IMMEDIATE")
        for statement in commit:
            connection.execute(statement.sql, statement.about(id.hex)).fetchone()
        if len(commit) > 1:
            connection.execute("COMMIT")


def replay_through_django(alias: str, commits: Sequence[Commit], id: UUID) -> None:
    """The same commits, as Django's cursors and ``atomic()`` send them."""
    connection = connections[alias]
    own_id = id if connection.features.has_native_uuid_field else id.hex
    for commit in commits:
        with transaction.atomic(using=alias) if len(commit) > 1 else nullcontext():
            for statement in commit:
                with connection.cursor() as cursor:
                    cursor.execute(statement.asked, statement.about(own_id))
                    if cursor.description:
                        cursor.fetchone()


def _send(connection: psycopg.Connection[Any], statement: Statement, id: UUID) -> None:
    cursor = connection.execute(statement.sql, statement.about(id))
    if cursor.description:
        cursor.fetchone()
