"""How many sagas a second ``enqueue_many`` accepts, with PostgreSQL and Redis.

``python run.py python -m benchmarks.bulk``; the jobs go to a queue that nobody works on.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from contextlib import ExitStack

import django

ACCEPTED = 5_000  # a second
ROUNDS = 5


def measure(sagas: int) -> list[float]:
    """Sagas accepted per second, of each round."""
    from django_rq.queues import get_queue

    from benchmarks.sagas import Order, OrderSaga
    from benchmarks.settings import QUEUE

    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        ids = OrderSaga().enqueue_many(Order() for _ in range(sagas))
        rates.append(len(ids) / (time.perf_counter() - began))
        assert len(ids) == sagas
        get_queue(QUEUE).empty()  # type: ignore[no-untyped-call]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sagas", type=int, default=20_000, help="of each round")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    from benchmarks import servers

    with ExitStack() as stack:
        servers.start(stack)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        django.setup()
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
        rates = measure(options.sagas)
    median = statistics.median(rates)
    verdict = "holds" if median >= ACCEPTED else "MISSED"
    between = f"{min(rates):,.0f} to {max(rates):,.0f}"
    print(f"accepted per second: {median:,.0f} ({between}; target {ACCEPTED:,}: {verdict})")


if __name__ == "__main__":
    main()
