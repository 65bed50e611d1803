"""Pruning beside running sagas: executions deleted per second, and what is left of the sagas' rate.

``DATABASE_URL=postgres://... python run.py python -m benchmarks.pruning --executions 400000`` adds
so many executions of three records first. Sagas run alone and beside the deletion in turns.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path

import django

PRUNED = 20_000  # executions per second
KEPT = 0.8  # of the rate of sagas without it
ROUNDS = 8
SECONDS = 1.5  # of each half of a round

_PRUNE = f"""
import sys, time
import django
django.setup()
from datetime import timedelta
from django_saga.pruning import Retention, prune
rule = Retention(delete_after=timedelta(hours=1))
for _line in sys.stdin:
    began = time.monotonic()
    parts = prune(rule, stopped=lambda: time.monotonic() - began > {SECONDS})
    number = sum(part.statuses.total() for part in parts)
    print(number / (time.monotonic() - began), flush=True)
"""


def measure(executions: int) -> dict[str, float]:
    """Medians of all rounds: executions deleted per second beside sagas, the sagas' own rate
    without it, and what is left of that with it."""
    from benchmarks.pace import in_sequence
    from benchmarks.sagas import Order, OrderSaga
    from testproject.shop.crowd import gather

    drive = OrderSaga()
    gather(executions, records=3)
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _PRUNE]
    deleted, alone, kept = [], [], []
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as pruning:
        assert pruning.stdin is not None
        assert pruning.stdout is not None
        for _ in range(ROUNDS):
            alone.append(in_sequence(lambda: drive.run(Order()), SECONDS).rate)
            pruning.stdin.write("go on\n")
            pruning.stdin.flush()
            beside = in_sequence(lambda: drive.run(Order()), SECONDS).rate
            deleted.append(float(pruning.stdout.readline()))
            kept.append(beside / alone[-1])
        pruning.stdin.close()
    return {
        "deleted per second": statistics.median(deleted),
        "sagas per second": statistics.median(alone),
        "kept": statistics.median(kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=400_000)
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
    for name, target in (("deleted per second", PRUNED), ("kept", KEPT)):
        verdict = "holds" if found[name] >= target else "MISSED"
        print(f"{name}: {found[name]:.2f} (target {target}: {verdict})")
    print(f"sagas per second, alone: {found['sagas per second']:.0f}")


if __name__ == "__main__":
    main()
