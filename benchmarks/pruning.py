"""Pruning beside running sagas: executions deleted per second, and what is left of the sagas' rate.

``DATABASE_URL=postgres://... python run.py python -m benchmarks.pruning --executions 300000`` adds
so many executions of three records first, and deletes all that ended more than a day ago.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import django

PRUNED = 20_000  # executions per second
KEPT = 0.8  # of the rate of sagas without it
ALONE = 5.0  # seconds

_PRUNE = """
import time
import django
django.setup()
from datetime import timedelta
from django_saga.pruning import Retention, prune
input()
began = time.perf_counter()
rule = Retention(delete_after=timedelta(days=1))
number = sum(part.statuses.total() for part in prune(rule))
print(number, time.perf_counter() - began)
"""


def measure(executions: int) -> dict[str, float]:
    """Executions deleted per second beside sagas, and the rate of these with it and without."""
    from benchmarks.pace import in_sequence
    from benchmarks.sagas import Order, OrderSaga
    from testproject.shop.crowd import gather

    drive = OrderSaga()
    gather(executions, records=3)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _PRUNE], stdin=pipe, stdout=pipe) as pruning:
        assert pruning.stdin is not None
        assert pruning.stdout is not None
        before = in_sequence(lambda: drive.run(Order()), ALONE).rate
        pruning.stdin.write(b"\n")
        pruning.stdin.flush()
        done, began = 0, time.perf_counter()
        while pruning.poll() is None:
            drive.run(Order())
            done += 1
        beside = done / (time.perf_counter() - began)
        number, seconds = map(float, pruning.stdout.read().split())
    after = in_sequence(lambda: drive.run(Order()), ALONE).rate
    return {"deleted": number / seconds, "sagas alone": (before + after) / 2, "beside it": beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=300_000)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    from django.conf import settings

    settings.DEBUG = False  # it would have Django keep every statement
    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    found = measure(options.executions)
    for name, value in found.items():
        print(f"{name:16} {value:9.0f} /s")
    verdict = "holds" if found["deleted"] >= PRUNED else "MISSED"
    print(f"deleted: target {PRUNED}/s: {verdict}")
    ratio = found["beside it"] / found["sagas alone"]
    verdict = "holds" if ratio >= KEPT else "MISSED"
    print(f"sagas beside it / alone: {ratio:.2f} (target {KEPT}: {verdict})")


if __name__ == "__main__":
    main()
