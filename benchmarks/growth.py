"""What grows with the history: each statement and each screen, at several sizes of the tables.

``DATABASE_URL=postgres://... python run.py python -m benchmarks.growth --sizes 0,100000,1000000``
makes a database for each size on that server, and drops it in the end. Size 0 holds what fills one
page of each list, and nothing else; of failures that nobody has dealt with, and of what is active,
each has the same, so that it is the history alone that grows. The rounds go from one database to
the next, all in one process. What counts is the ratio to the first size: the median of the ratios
of all rounds, since the machine may be busier in one than in another.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import django

RATIO = 1.3  # of a median to that at the first size
ROUNDS = 15
WRITES = 20  # sagas of each kind in a round
DUE = (0, 10, 10_000)
FILLING = 30_000  # executions of a crowd whose failures fill a page
EXECUTIONS = "django_saga_sagaexecution"

_ONLY_FAILURES = f"""
WITH gone AS (DELETE FROM {EXECUTIONS} WHERE status = 'COMPLETED'
              AND finished_at < now() - interval '2 days' RETURNING id)
DELETE FROM django_saga_sagasteprecord USING gone WHERE execution_id = gone.id
"""
_SETTLED = f"UPDATE {EXECUTIONS} SET settled_at = now() WHERE status IN ('FAILED', 'STUCK')"
# What the crowd has in flight would be due a minute later; it is not what grows.
_NONE_ACTIVE = f"""
UPDATE {EXECUTIONS} SET status = 'COMPLETED', step = '', in_flight = false, lease_until = NULL,
       finished_at = updated_at WHERE status = 'RUNNING'
"""
_DUE = f"""
INSERT INTO {EXECUTIONS} (id, saga, plan, initial_context, context, created_at, updated_at, status,
                          step, in_flight, effects, token, driver)
SELECT gen_random_uuid(), 'growth.Due', '[["S0"]]', '{{}}', '{{}}', now(), now(), 'PENDING', 'S0',
       false, '[]', 1, '' FROM generate_series(1, %s)
"""


@dataclass
class Site:
    """A database of its own, and what was measured on it."""

    size: int
    connection: Any
    client: Any = None
    pages: dict[str, str] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def visited(self) -> Iterator[Any]:
        """Make it the default database; yields a cursor."""
        from django.db import connections

        connections["default"] = self.connection
        with self.connection.cursor() as cursor:
            yield cursor

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long the block takes."""
        began = time.perf_counter()
        yield
        self.times.setdefault(name, []).append(time.perf_counter() - began)


def measure(sizes: list[int], *, records: int = 3, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """For each size ``size``, and by case ``milliseconds``, the median, and ``ratios``."""
    from django.db import connections

    own = connections["default"]
    names = {size: f"{own.settings_dict['NAME']}_growth_{size}" for size in sizes}
    sites = []
    try:
        for size, name in names.items():
            with own.cursor() as cursor:
                cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
                cursor.execute(f'CREATE DATABASE "{name}"')
            sites.append(Site(size, connections.create_connection("default")))
            sites[-1].connection.settings_dict = {**own.settings_dict, "NAME": name}
            _fill(sites[-1], records)
        for _ in range(rounds):
            for site in sites:
                _go_round(site)
    finally:
        connections["default"] = own
        for site in sites:
            site.connection.close()
        with own.cursor() as cursor:
            for name in names.values():
                cursor.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    return [_found(site, sites[0]) for site in sites]


def _found(site: Site, first: Site) -> dict[str, Any]:
    milliseconds, ratios = {}, {}
    for name, each in site.times.items():
        milliseconds[name] = statistics.median(each) * 1000
        pairs = zip(each, first.times[name], strict=True)
        ratios[name] = statistics.median(mine / base for mine, base in pairs)
    return {"size": site.size, "milliseconds": milliseconds, "ratios": ratios}


def _fill(site: Site, records: int) -> None:
    from django.contrib.auth import get_user_model
    from django.core.management import call_command
    from django.test import Client

    from testproject.shop.crowd import gather

    with site.visited() as cursor:
        call_command("migrate", verbosity=0)
        if site.size:
            gather(site.size, records=records)
            cursor.execute(_SETTLED)
        gather(FILLING, records=records)
        if not site.size:
            cursor.execute(_ONLY_FAILURES)
        cursor.execute(_NONE_ACTIVE)
        cursor.execute("VACUUM ANALYZE")
        cursor.execute("CHECKPOINT")
        site.client = Client()
        site.client.force_login(get_user_model().objects.create_superuser("growth"))
        site.pages = _pages()
        for path in site.pages.values():  # what is cached for the process is cached now
            site.client.get(path)


def _go_round(site: Site) -> None:
    with site.visited() as cursor:
        _run_sagas(site)
        _drive(site, cursor)
        for due in DUE:
            _sweep(site, cursor, due)
        for name, path in site.pages.items():
            with site.timed(name):
                response = site.client.get(path)
            assert response.status_code == 200, (path, response.status_code)


def _run_sagas(site: Site) -> None:
    from benchmarks.sagas import Order, OrderSaga, RefusedSaga
    from django_saga import SagaFailed

    def note(execute: Any, sql: str, *rest: Any) -> Any:
        kind = "starting" if sql.startswith("INSERT") else "checkpointing"
        with site.timed("failing" if "failure AS" in sql else kind):
            return execute(sql, *rest)

    drive, failing = OrderSaga(), RefusedSaga()
    with site.connection.execute_wrapper(note):
        for _ in range(WRITES):
            drive.run(Order())
            with suppress(SagaFailed):
                failing.run(Order())


def _drive(site: Site, cursor: Any) -> None:
    from benchmarks.sagas import OrderSaga
    from django_saga import machine
    from django_saga.models import new_id
    from django_saga.storage import DjangoSagaStorage

    storage = DjangoSagaStorage()
    state = machine.start(OrderSaga.definition.plan, "{}")
    held = []
    for pk in [new_id() for _ in range(WRITES)]:
        storage.create(pk, OrderSaga.name, state, driver="lost", lease=0.0)
        with site.timed("acquiring"):
            held.append((pk, storage.acquire(pk, driver="growth", lease=60.0).token))
    with site.timed(f"renewing {WRITES}"):
        storage.renew(held, lease=60.0)
    for lease in held:
        with site.timed("releasing"):
            storage.release(*lease)
    cursor.execute(f"DELETE FROM {EXECUTIONS} WHERE id = ANY(%s)", [[pk for pk, _ in held]])


def _sweep(site: Site, cursor: Any, due: int) -> None:
    from django_saga.storage import DjangoSagaStorage

    cursor.execute(_DUE, [due])
    cursor.execute(f"VACUUM ANALYZE {EXECUTIONS}")
    for _ in range(1 if due else 5):
        with site.timed(f"sweep, {due} due"):
            claims = DjangoSagaStorage().due(20, driver="growth", lease=60.0)
        assert len(claims) == min(due, 20)
    cursor.execute(f"DELETE FROM {EXECUTIONS} WHERE saga = 'growth.Due' AND status = 'PENDING'")
    cursor.execute(f"VACUUM {EXECUTIONS}")


def _pages() -> dict[str, str]:
    from django.urls import reverse

    from django_saga.models import SagaExecution, SagaFailureGroup

    def listed(model: str, query: str = "") -> str:
        return f"{reverse(f'admin:django_saga_{model}_changelist')}{query}"

    def one(model: str, pk: Any) -> str:
        return reverse(f"admin:django_saga_{model}_change", args=[pk])

    stuck = SagaExecution.objects.filter(status="STUCK").order_by("created_at")[0].pk
    recent = SagaExecution.objects.filter(status="COMPLETED").order_by("-created_at")[0].pk
    group = SagaFailureGroup.objects.filter(saga="shop.OrderSaga").order_by("id")[0].pk
    return {
        "list": listed("sagaexecution"),
        "list of all": listed("sagaexecution", "?status=all"),
        "filter": listed("sagaexecution", "?status=FAILED"),
        "filter of a group": listed("sagaexecution", f"?group={group}&status=all"),
        "search": listed("sagaexecution", f"?q={stuck}"),
        "groups": listed("sagafailuregroup"),
        "a group": one("sagafailuregroup", group),
        "a stuck one": one("sagaexecution", stuck),
        "a completed one": one("sagaexecution", recent),
        "overview": reverse("admin:app_list", args=["django_saga"]),
    }


def report(found: list[dict[str, Any]]) -> bool:
    """Print medians, ratios and verdicts; returns whether all hold."""
    print(f"{'milliseconds at':18}", end="")
    print("".join(f" {each['size']:>10,} {'ratio':>13}" for each in found))
    missed = False
    for name in found[0]["ratios"]:
        print(f"{name:18}", end="")
        for each in found:
            ratio = each["ratios"][name]
            missed |= ratio > RATIO
            verdict = "MISSED" if ratio > RATIO else "holds"
            print(f" {each['milliseconds'][name]:10.2f} {ratio:6.2f} {verdict:>6}", end="")
        print()
    print(f"target: at most {RATIO}: {'MISSED' if missed else 'holds'}")
    return not missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="0,100000,1000000", help="executions, with commas")
    parser.add_argument("--records", type=int, default=3, help="of each execution")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
    from django.conf import settings

    settings.DEBUG = False  # it would have Django keep every statement
    settings.ALLOWED_HOSTS = ["*"]
    django.setup()
    sizes = [int(size) for size in options.sizes.split(",")]
    report(measure(sizes, records=options.records, rounds=options.rounds))


if __name__ == "__main__":
    main()
