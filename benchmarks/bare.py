"""The loops without a library that django-saga is compared with.

The *replay* sends the very statements of django-saga, also through Django's own cursors. The
*smallest* loop has tables of its own, and in them nothing that a saga which is to survive its
process could do without: where it stands, its context, and what was done, without a constraint. The
*ORM* loop is what one would write by hand with Django. All of them take ids of the kind that
django-saga does, which indexes like.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import psycopg
from django.db import connections, transaction
from django.utils import timezone

from benchmarks.pace import AsyncWork, Work
from benchmarks.statements import (
    Commit,
    areplay,
    replay,
    replay_on_sqlite,
    replay_through_django,
)
from django_saga.models import SagaExecution, SagaStepRecord, new_id

STEPS = ("S0", "S1", "S2")
DRIVER = f"{platform.node()}:{os.getpid()}"
CONTEXT = json.dumps({"order_id": 1, "items": ["a", "b"], "total": "12.50", "reservation_id": None})

TABLES = """
CREATE TABLE smallest_execution (
    id uuid PRIMARY KEY, status text, step text, context text, updated_at timestamptz);
CREATE TABLE smallest_record (
    id bigserial PRIMARY KEY, execution_id uuid, step text, at timestamptz);
CREATE INDEX ON smallest_record (execution_id);
"""
INSERT = "INSERT INTO smallest_execution VALUES (%s, 'RUNNING', 'S0', %s, now())"
UPDATE = """
WITH e AS (UPDATE smallest_execution SET status = %s, step = %s, context = %s, updated_at = now()
           WHERE id = %s RETURNING id)
INSERT INTO smallest_record (execution_id, step, at) SELECT id, %s, now() FROM e
"""
SUCCESS = (("RUNNING", "S0"), ("RUNNING", "S1"), ("COMPLETED", "S2"))
FAILURE = (
    *(("RUNNING", "S0"), ("RUNNING", "S1"), ("COMPENSATING", "S2")),
    *(("COMPENSATING", "S1"), ("FAILED", "S0")),
)


def postgresql() -> psycopg.Connection[Any]:
    """A connection as the loops want it: each statement is a commit, and prepared when repeated."""
    return psycopg.connect(conninfo(), autocommit=True)


async def apostgresql() -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(conninfo(), autocommit=True)


def conninfo() -> str:
    params = connections["default"].get_connection_params()
    names = ("dbname", "user", "password", "host", "port")
    return psycopg.conninfo.make_conninfo(**{k: params[k] for k in names if k in params})


def smallest(connection: psycopg.Connection[Any], way: Sequence[tuple[str, str]]) -> Work:
    """A statement to begin with, and one for each attempt."""

    def saga() -> None:
        id = new_id()
        connection.execute(INSERT, (id, CONTEXT))
        for status, step in way:
            connection.execute(UPDATE, (status, step, CONTEXT, id, step))

    return saga


def replayed(connection: psycopg.Connection[Any], commits: Sequence[Commit]) -> Work:
    return lambda: replay(connection, commits, new_id())


def areplayed(connection: psycopg.AsyncConnection[Any], commits: Sequence[Commit]) -> AsyncWork:
    return lambda: areplay(connection, commits, new_id())


def replayed_on_sqlite(path: str, pragmas: str, commits: Sequence[Commit]) -> Work:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(pragmas)
    return lambda: replay_on_sqlite(connection, commits, new_id())


def replayed_by_django(alias: str, commits: Sequence[Commit]) -> Work:
    return lambda: replay_through_django(alias, commits, new_id())


def orm_saga() -> None:
    """An execution that is saved, with a record that is created, in a transaction per step."""
    now = timezone.now()
    execution = SagaExecution.objects.create(
        id=new_id(),
        saga="by hand",
        plan=list(STEPS),
        initial_context=CONTEXT,
        context=CONTEXT,
        status=SagaExecution.Status.RUNNING,
        step=STEPS[0],
        in_flight=True,
        effects=[],
        token=1,
        driver=DRIVER,
        lease_until=now + timedelta(seconds=60),
        created_at=now,
        updated_at=now,
    )
    for status, step in SUCCESS:
        execution.status, execution.step, execution.updated_at = status, step, timezone.now()
        with transaction.atomic():
            execution.save()
            SagaStepRecord.objects.create(
                execution=execution,
                step=step,
                action=SagaStepRecord.Action.ACT,
                attempt=1,
                outcome=SagaStepRecord.Outcome.DONE,
                token=1,
                driver=DRIVER,
                duration=0.0,
                created_at=execution.updated_at,
            )
