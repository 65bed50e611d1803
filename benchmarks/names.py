"""Who is measured, and what: the words that cases, targets and plots share."""

from __future__ import annotations

from itertools import product

OURS, DEFAULTS = "django-saga", "django-saga, Django's defaults"
REPLAY, SMALLEST, ORM = "replay", "smallest loop", "ORM loop"
BY_DJANGO = "replay through Django"
CQRS, DBOS = "python-cqrs", "DBOS"
BARE_RQ = "bare RQ"

STEPS = 3
WAIT = 0.005  # seconds that a service takes to answer
THREADS = 8
TASKS = (1, 8, 32)
KILOBYTES = (1, 10, 100)
KINDS = {"simple": "rq.SimpleWorker", "forking": "rq.Worker"}
WORKERS = tuple(product(KINDS, (1, 2)))

SUCCESS, FAILURE = "success", "failure, two compensations"
IN_THREADS = f"success, {THREADS} threads"
WAITS = f"handlers wait 5 ms, {TASKS[-1]} at once"
MEMORY, MEMORY_ASYNC = "memory", "memory, async"
SQLITE, SQLITE_NORMAL = "SQLite, WAL", "SQLite, WAL, synchronous NORMAL"
SQLITES = ((SQLITE, "sqlite"), (SQLITE_NORMAL, "sqlite, normal"))


def at_once(tasks: int) -> str:
    return f"async, {tasks} at once"


def with_context(kilobytes: int) -> str:
    return f"context of {kilobytes} KB"


def in_workers(kind: str, number: int) -> str:
    return f"RQ, {number} {kind} worker{'s' if number > 1 else ''}"
