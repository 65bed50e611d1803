"""Databases by URL, as libpq writes them, so that one variable can also be given to psql."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

ENGINES = {
    "mariadb": "mysql",
    "mysql": "mysql",
    "postgres": "postgresql",
    "postgresql": "postgresql",
    "sqlite": "sqlite3",
}
# SQLite's own default takes the write lock in the middle of a transaction, where waiting for it
# is impossible: concurrent writers then fail with "database is locked".
OPTIONS: dict[str, dict[str, Any]] = {
    "mysql": {"charset": "utf8mb4"},
    "sqlite3": {"transaction_mode": "IMMEDIATE", "timeout": 20},
}


def database(url: str) -> dict[str, Any]:
    """The entry of ``DATABASES`` for a URL such as ``postgres://user@host:5432/name``.

    A SQLite file is ``sqlite:///`` and its path (four slashes when absolute); a Unix socket's
    directory is the query's ``host``; what else is in the query goes to ``OPTIONS``.
    """
    parts = urlsplit(url)
    engine, name = ENGINES.get(parts.scheme), unquote(parts.path[1:])
    if engine is None or not name:
        raise ValueError(
            f"{parts.scheme}://... names no database that Django knows; write "
            "postgres://user:password@host:port/name, mysql://... or sqlite:///path."
        )
    query = dict(parse_qsl(parts.query))
    return {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": name,
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": query.pop("host", None) or parts.hostname or "",
        "PORT": str(parts.port or ""),
        "OPTIONS": {**OPTIONS.get(engine, {}), **query},
    }
