"""Three-step no-op sagas beside a bare psycopg loop of the same four statements, in one run.

``DATABASE_URL=postgres://... python run.py python benchmarks/compare.py``. The bare loop replays
what django-saga sends; the smallest loop has tables and statements of its own, with nothing that
could be left out. Rounds are interleaved, medians reported, and ratios are what counts: an absolute
rate swings with the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import django

STEPS = 3
PREPARED = {"server_side_binding": True, "prepare_threshold": 5}
THREADS = 8
IN_MEMORY = 10_000

BARE_TABLES = """
CREATE TABLE IF NOT EXISTS bench_execution (
    id uuid PRIMARY KEY, status text, step text, context text, updated_at timestamptz);
CREATE TABLE IF NOT EXISTS bench_record (
    id bigserial PRIMARY KEY, execution_id uuid REFERENCES bench_execution,
    step text, at timestamptz);
CREATE INDEX IF NOT EXISTS bench_record_execution ON bench_record (execution_id);
"""
BARE_INSERT = "INSERT INTO bench_execution VALUES (%s, 'RUNNING', 'S0', %s, now())"
BARE_UPDATE = """
WITH e AS (UPDATE bench_execution SET status = %s, step = %s, context = %s, updated_at = now()
           WHERE id = %s RETURNING id)
INSERT INTO bench_record (execution_id, step, at) SELECT id, %s, now() FROM e
"""
CONTEXT = json.dumps({"order_id": 1, "items": ["a", "b"], "total": "12.50", "reservation_id": None})


def bare_saga(connection: Any) -> None:
    """The four statements that any durable saga of three steps needs, and nothing else."""
    execution = uuid.uuid4()
    connection.execute(BARE_INSERT, (execution, CONTEXT))
    for number in range(STEPS):
        status = "COMPLETED" if number == STEPS - 1 else "RUNNING"
        connection.execute(BARE_UPDATE, (status, f"S{number}", CONTEXT, execution, f"S{number}"))


def the_same_statements(saga: Any, context: Any) -> list[tuple[str, tuple[Any, ...], int]]:
    """What django-saga sends for one saga: SQL, parameters, and where among these its id is."""
    from django.db import connection

    sent: list[tuple[str, tuple[Any, ...]]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, about: Any) -> Any:
        sent.append((sql, tuple(params)))
        return execute(sql, params, many, about)

    with connection.execute_wrapper(note):
        execution = saga.run(context)
    return [(sql, params, params.index(execution.id)) for sql, params in sent]


def replay(connection: Any, statements: list[tuple[str, tuple[Any, ...], int]]) -> None:
    """The very statements of django-saga, without it."""
    execution = uuid.uuid4()
    for sql, params, at in statements:
        connection.execute(sql, (*params[:at], execution, *params[at + 1 :])).fetchone()


def define() -> tuple[Any, Any]:
    """The saga and a context for it."""
    from django_saga import Saga, SagaContext, SagaStepHandler

    @dataclass
    class Order(SagaContext):
        order_id: int
        items: list[str]
        total: Decimal
        reservation_id: str | None = None

    class S0(SagaStepHandler[Order]):
        def act(self, context: Order) -> None:
            pass

    class S1(S0):
        pass

    class S2(S0):
        pass

    class BenchmarkSaga(Saga[Order]):
        steps = [S0, S1, S2]

    return BenchmarkSaga, lambda: Order(1, ["a", "b"], Decimal("12.50"))


def rate(work: Callable[[], object], seconds: float) -> float:
    """Calls per second."""
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        work()
        done += 1
    return done / (time.perf_counter() - began)


def rate_in_threads(prepare: Callable[[], Callable[[], object]], seconds: float) -> float:
    """Calls per second of all threads together; each prepares its own connection."""
    rates: list[float] = []

    def run() -> None:
        rates.append(rate(prepare(), seconds))

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def measure(rounds: int, seconds: float) -> dict[str, list[float]]:
    """The rates of each case, a round after the other."""
    import psycopg
    from django.db import connection, connections

    from django_saga.storage import DjangoSagaStorage, MemorySagaStorage

    saga, context = define()
    # The options that the README recommends, beside Django's defaults.
    options = {**connection.settings_dict["OPTIONS"], **PREPARED}
    connections.settings["prepared"] = {**connection.settings_dict, "OPTIONS": options}
    prepared = saga(storage=DjangoSagaStorage("prepared"))
    conninfo = psycopg.conninfo.make_conninfo(
        **{
            key: value
            for key, value in connection.get_connection_params().items()
            if key in ("dbname", "user", "password", "host", "port")
        }
    )
    bare = psycopg.connect(conninfo, autocommit=True)
    bare.execute(BARE_TABLES)
    memory = MemorySagaStorage()
    drive, in_memory = saga(), saga(storage=memory)

    same = the_same_statements(drive, context())

    def bare_in_thread() -> Callable[[], object]:
        own = psycopg.connect(conninfo, autocommit=True)
        return lambda: replay(own, same)

    cases: dict[str, Callable[[], float]] = {
        "smallest loop": lambda: rate(lambda: bare_saga(bare), seconds),
        "bare loop": lambda: rate(lambda: replay(bare, same), seconds),
        "django-saga": lambda: rate(lambda: prepared.run(context()), seconds),
        "django-saga, defaults": lambda: rate(lambda: drive.run(context()), seconds),
        "bare loop, 8 threads": lambda: rate_in_threads(bare_in_thread, seconds),
        "django-saga, 8 threads": lambda: rate_in_threads(
            lambda: lambda: prepared.run(context()), seconds
        ),
        "memory": lambda: rate(lambda: in_memory.run(context()), seconds),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            rates[name].append(case())
    return rates


def import_milliseconds(statement: str) -> float:
    """The median time of a fresh interpreter that runs the statement."""
    times = []
    for _ in range(9):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case in each round")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
    from django.conf import settings

    settings.DEBUG = False  # it would have Django keep every statement
    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    medians = {
        name: statistics.median(rates)
        for name, rates in measure(options.rounds, options.seconds).items()
    }
    print(
        f"Python {platform.python_version()}, Django {django.get_version()}, {os.cpu_count()} cores"
    )
    for name, value in medians.items():
        print(f"{name:28} {value:9.0f} sagas/s")
    for ours, theirs, target in (
        ("django-saga", "bare loop", 0.6),
        ("django-saga, 8 threads", "bare loop, 8 threads", 0.6),
    ):
        ratio = medians[ours] / medians[theirs]
        verdict = "holds" if ratio >= target else "MISSED"
        print(f"{ours} / {theirs}: {ratio:.2f} (target {target}: {verdict})")
    verdict = "holds" if medians["memory"] >= IN_MEMORY else "MISSED"
    print(f"memory: {medians['memory']:.0f} sagas/s (target {IN_MEMORY}: {verdict})")
    base = import_milliseconds("import django.db.models, asgiref.sync")
    added = import_milliseconds("import django.db.models, asgiref.sync, django_saga") - base
    print(f"import django_saga adds {added:.0f} ms to Django's {base:.0f} ms")


if __name__ == "__main__":
    main()
