"""PostgreSQL, Redis and a place for SQLite: those that the environment names, or private ones.

All is put into a database of its own, which is dropped at the end. A private PostgreSQL is as
durable as an installed one: it waits for the disk at every commit.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import redis

from tests import servers as private

STATEMENT = re.compile(rb"^(.*) LOG:  (?:statement|execute [^:]*): ", re.MULTILINE)
POLLS = b"dbos_transact"  # the sessions of DBOS, which asks for work while others are measured


@dataclass(frozen=True)
class Servers:
    """Where they are, and what they are."""

    home: Path
    log: Path | None
    """The log of a private PostgreSQL."""
    about: dict[str, str]


def start(stack: ExitStack) -> Servers:
    """Start what is lacking until the stack ends, and tell of it in the environment."""
    home = Path(stack.enter_context(TemporaryDirectory(prefix="saga-benchmarks-")))
    stack.callback(private.stop)
    given = os.environ.get("DATABASE_URL")
    server = given or private.private_postgresql(home, fsync=True)
    os.environ["DATABASE_URL"] = _scratch(server, stack)
    os.environ["SQLITE_URL"] = f"sqlite:///{quote(str(home / 'saga.sqlite3'))}"
    if "REDIS_URL" not in os.environ:
        os.environ["REDIS_URL"] = private.private_redis(home)
    log = None if given else home / "postgresql" / "log"
    return Servers(home, log, {**_postgresql(given is None), "redis": _redis()})


class Watch:
    """Counts what the whole server does, whoever does it: nothing else must use it meanwhile."""

    def __init__(self, log: Path | None) -> None:
        self._session = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
        self._log = log
        if log is not None:
            self._session.execute("ALTER SYSTEM SET log_line_prefix = '%a '")
            self._session.execute("ALTER SYSTEM SET log_parameter_max_length = 0")
            self._session.execute("SET log_statement = 'none'")  # of this session's own

    def close(self) -> None:
        self._session.close()

    def wal_and_commits(self) -> tuple[int, int]:
        """Bytes of WAL, and transactions that wrote, since the server was made."""
        query = """SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint,
                          pg_snapshot_xmax(pg_current_snapshot())::text::bigint"""
        wal, commits = self._one(query)
        return wal, commits

    def statements(self, run: Callable[[], int], *, of_dbos: bool) -> float | None:
        """How many statements each of what ``run`` counts took, BEGIN and COMMIT too.

        None where there is no log to count them in.
        """
        if self._log is None:
            return None
        self._log_statements("all")
        end = self._log.stat().st_size
        count = run()
        self._log_statements("none")
        with self._log.open("rb") as log:
            log.seek(end)
            sessions = STATEMENT.findall(log.read())
        return sum((session == POLLS) is of_dbos for session in sessions) / count

    def _log_statements(self, which: str) -> None:
        [loaded] = self._one("SELECT pg_conf_load_time()")
        self._session.execute(f"ALTER SYSTEM SET log_statement = '{which}'")
        self._session.execute("SELECT pg_reload_conf()")
        while self._one("SELECT pg_conf_load_time()") == (loaded,):
            pass

    def _one(self, query: str) -> tuple[Any, ...]:
        row = self._session.execute(query).fetchone()
        assert row is not None
        return row


def _scratch(server: str, stack: ExitStack) -> str:
    """The URL of a new database on the server."""
    name = f"saga_benchmarks_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server, autocommit=True) as session:
        session.execute(f"CREATE DATABASE {name}")
    stack.callback(_drop, server, name)
    return urlsplit(server)._replace(path=f"/{name}").geturl()


def _drop(server: str, name: str) -> None:
    with psycopg.connect(server, autocommit=True) as session:
        session.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _postgresql(private: bool) -> dict[str, str]:
    with psycopg.connect(os.environ["DATABASE_URL"]) as session:

        def shown(name: str) -> str:
            row = session.execute(f"SHOW {name}").fetchone()
            assert row is not None
            return str(row[0])

        version = shown("server_version").split()[0]
        return {
            "postgresql": f"{version}, {'private' if private else 'from DATABASE_URL'}",
            "fsync": shown("fsync"),
            "synchronous_commit": shown("synchronous_commit"),
        }


def _redis() -> str:
    client: Any = redis.Redis.from_url(os.environ["REDIS_URL"])
    return str(client.info("server")["redis_version"])
