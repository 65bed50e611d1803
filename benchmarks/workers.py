"""A saga per RQ job, beside bare jobs that commit the same: how long workers take for a queue full.

The jobs are stored while no worker sees them, and given to the waiting workers all at once.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from django.conf import settings
from django_rq.queues import get_queue
from rq.serializers import JSONSerializer

from benchmarks import tasks
from benchmarks.names import KINDS
from benchmarks.pace import Pace
from benchmarks.rounds import Run
from benchmarks.sagas import Order, OrderSaga
from benchmarks.statements import captured, replay
from django_saga import recover_saga
from django_saga.models import new_id

ROOT = Path(__file__).resolve().parent.parent
JOBS_PER_SECOND = 100  # that are queued, for each second that a case should take
PATIENCE = 300  # seconds


def sagas(kind: str, workers: int) -> Run:
    """Sagas in workers of a kind."""

    def fill(count: int) -> None:
        for _ in range(count):
            OrderSaga().enqueue(Order())

    return lambda seconds: _work_off(kind, workers, "django_saga.rq.SagaJob", fill, seconds)


def bare(kind: str, workers: int, home: Path, session: psycopg.Connection[Any]) -> Run:
    """The same commits in plain jobs, whose executions the session inserts."""
    execution = OrderSaga().enqueue(Order())
    _queue().empty()
    create = captured("default", lambda: OrderSaga().enqueue(Order()).id)
    _queue().empty()
    drive = captured("default", lambda: recover_saga(execution.id).id)
    file = home / "commits.pickle"
    file.write_bytes(pickle.dumps(drive))
    os.environ[tasks.COMMITS] = str(file)

    def fill(count: int) -> None:
        for _ in range(count):
            id = new_id()
            replay(session, create, id)
            _queue().enqueue("benchmarks.tasks.bare", str(id), job_timeout=-1, result_ttl=300)

    return lambda seconds: _work_off(kind, workers, "rq.job.Job", fill, seconds)


def _work_off(
    kind: str, workers: int, job_class: str, fill: Callable[[int], None], seconds: float
) -> Pace:
    count = max(10, int(JOBS_PER_SECOND * seconds))
    queue = _queue()
    redis, key, aside = queue.connection, queue.key, f"{queue.key}-aside"
    finished, failed = queue.finished_job_registry.key, queue.failed_job_registry.key
    redis.delete(key, finished, failed)
    fill(count)
    redis.rename(key, aside)
    with _waiting(kind, workers, job_class, redis) as processes:
        began = time.perf_counter()
        redis.rename(aside, key)
        while (done := redis.zcard(finished)) < count:
            if _has_ended(processes) or time.perf_counter() - began > PATIENCE:
                raise SystemExit(f"The workers did {done} of {count} jobs, and then no more.")
            if redis.zcard(failed):
                raise SystemExit(f"A job failed: {_error_of_one(queue)}")
            time.sleep(0.002)
        return Pace(count, time.perf_counter() - began)


@contextmanager
def _waiting(
    kind: str, workers: int, job_class: str, redis: Any
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Workers that have started, and have nothing to do."""
    known = f"rq:workers:{settings.DJANGO_SAGA['QUEUE']}"
    redis.delete(known)
    command = [sys.executable, "manage.py", "rqworker", settings.DJANGO_SAGA["QUEUE"]]
    options = ["--worker-class", KINDS[kind], "--job-class", job_class, "--verbosity", "0"]
    options += ["--serializer", "rq.serializers.JSONSerializer"]
    processes = [
        subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.DEVNULL)
        for _ in range(workers)
    ]
    try:
        while redis.scard(known) < workers:
            if _has_ended(processes):
                raise SystemExit("An RQ worker did not start.")
            time.sleep(0.01)
        yield processes
    finally:
        while any(process.poll() is None for process in processes):
            for process in processes:
                process.terminate()  # again: a worker that just goes to wait for a job misses one
            time.sleep(0.1)


def _error_of_one(queue: Any) -> str:
    job = queue.fetch_job(queue.failed_job_registry.get_job_ids()[0])
    return str(job.latest_result().exc_string)


def _has_ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    return any(process.poll() is not None for process in processes)


def _queue() -> Any:
    return get_queue(settings.DJANGO_SAGA["QUEUE"], serializer=JSONSerializer)
