"""What django-saga takes beside time: memory over many sagas, and the time to import it."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
EARLY = 10  # the first look at the memory is after one in so many

BASE = "import django.db.models, asgiref.sync"
IMPORT = f"{BASE}, django_saga"
TIMED = "import time\nbegan = time.process_time()\n{}\nprint(time.process_time() - began)"
SETUP = """
from django.conf import settings
settings.configure(INSTALLED_APPS={apps})
import django
django.setup()
"""


def memory(count: int, home: Path) -> dict[str, int]:
    """Peak bytes of one process after a tenth of so many sagas on SQLite, and after all."""
    url = f"sqlite:///{quote(str(home / 'footprint.sqlite3'))}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.footprint", str(count)],
        cwd=ROOT,
        env={**os.environ, "SQLITE_URL": url},
        stdout=subprocess.PIPE,
        check=True,
    )
    early, late = json.loads(done.stdout)
    return {"sagas": count, "early": early, "late": late}


def import_times(starts: int) -> dict[str, float]:
    """Median milliseconds of CPU of so many fresh interpreters, and what django-saga adds."""
    apps = ["django.contrib.contenttypes", "django.contrib.auth"]
    codes = {
        "base": BASE,
        "import": IMPORT,
        "setup_base": SETUP.format(apps=apps),
        "setup": SETUP.format(apps=[*apps, "django_saga"]),
    }
    times: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(starts):
        for name, code in codes.items():
            timed = [sys.executable, "-c", TIMED.format(code)]
            done = subprocess.run(timed, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            times[name].append(1000 * float(done.stdout))
    medians = {name: statistics.median(of) for name, of in times.items()}
    return {
        "base": medians["base"],
        "added": medians["import"] - medians["base"],
        "setup_base": medians["setup_base"],
        "setup_added": medians["setup"] - medians["setup_base"],
    }


def _run_many(count: int) -> None:
    import django

    django.setup()
    from django.core.management import call_command

    from benchmarks.sagas import Order, OrderSaga
    from django_saga.storage import DjangoSagaStorage

    alias = "sqlite, normal"  # it does not wait for the disk
    call_command("migrate", database=alias, verbosity=0)
    saga = OrderSaga(storage=DjangoSagaStorage(alias))
    peaks = []
    for number in range(1, count + 1):
        saga.run(Order())
        if number in (count // EARLY, count):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(json.dumps(peaks))


if __name__ == "__main__":
    _run_many(int(sys.argv[1]))
