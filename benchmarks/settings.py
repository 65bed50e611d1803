"""The demo's settings for benchmarks, over the servers that :mod:`benchmarks.servers` found."""

from __future__ import annotations

import os
from typing import Any

from testproject.databases import database
from testproject.settings import *  # noqa: F403

DEBUG = False  # it would have Django keep every statement
INSTALLED_APPS = [*INSTALLED_APPS, "benchmarks"]  # noqa: F405

# Workers that serve one job after the other keep their connection for some time.
POSTGRESQL = database(os.environ["DATABASE_URL"]) | {"CONN_MAX_AGE": 600}
# The options that the README recommends.
PREPARED = {"server_side_binding": True, "prepare_threshold": 5}
SQLITE = database(os.environ["SQLITE_URL"])
WAL = "PRAGMA journal_mode = WAL; PRAGMA synchronous = "


def sqlite(synchronous: str) -> dict[str, Any]:
    """FULL waits for the disk at every commit, as PostgreSQL does; NORMAL does not."""
    return SQLITE | {"OPTIONS": {**SQLITE["OPTIONS"], "init_command": WAL + synchronous}}


DATABASES = {
    "default": POSTGRESQL | {"OPTIONS": {**POSTGRESQL["OPTIONS"], **PREPARED}},
    "as Django has it": POSTGRESQL,
    "sqlite": sqlite("FULL"),
    "sqlite, normal": sqlite("NORMAL"),
}

QUEUE = "saga-benchmarks"
DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": QUEUE}
RQ_QUEUES = {QUEUE: {"URL": os.environ["REDIS_URL"]}}
