"""What a saga takes: bytes of tables, indexes and log; and how many of its updates are heap-only.

``DATABASE_URL=postgres://... python run.py python -m benchmarks.sizes --sagas 20000`` runs so many
no-op sagas of three steps, by the real statements, on tables that must be empty.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import django

TABLES = ("django_saga_sagaexecution", "django_saga_sagasteprecord")

_RELATIONS = """
SELECT relname, pg_relation_size(oid) FROM pg_class
WHERE oid = ANY(%(tables)s::regclass[])
   OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = ANY(%(tables)s::regclass[]))
ORDER BY relkind DESC, relname
"""
_UPDATES = """
SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables
WHERE relname = 'django_saga_sagaexecution'
"""


def measure(sagas: int) -> dict[str, float]:
    """Bytes per saga of each table and index, and of the log; the share of heap-only updates."""
    from django.db import connection

    from benchmarks.sagas import Order, OrderSaga

    drive = OrderSaga()
    drive.run(Order())
    with connection.cursor() as cursor:

        def asked(query: str, params: Any = None) -> Any:
            cursor.execute(query, params)
            return cursor.fetchall()

        cursor.execute(f"TRUNCATE {', '.join(TABLES)} CASCADE")
        cursor.execute("CHECKPOINT")
        ((before,),) = asked("SELECT pg_current_wal_insert_lsn()")
        ((updated, hot),) = asked(_UPDATES)
        began = time.perf_counter()
        for _ in range(sagas):
            drive.run(Order())
        took = time.perf_counter() - began
        ((logged,),) = asked("SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", [before])
        cursor.execute("SELECT pg_stat_force_next_flush()")
        for table in TABLES:  # so that no dead row of an update is counted
            cursor.execute(f"VACUUM {table}")
        ((now_updated, now_hot),) = asked(_UPDATES)
        sizes = {name: size / sagas for name, size in asked(_RELATIONS, {"tables": list(TABLES)})}
    return {
        **sizes,
        "tables and indexes": sum(sizes.values()),
        "write-ahead log": float(logged) / sagas,
        "heap-only share of updates": (now_hot - hot) / max(1, now_updated - updated),
        "sagas per second": sagas / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sagas", type=int, default=20_000)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
    from django.conf import settings

    settings.DEBUG = False  # it would have Django keep every statement
    django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    for name, value in measure(options.sagas).items():
        print(f"{name:48} {value:10.2f}")


if __name__ == "__main__":
    main()
