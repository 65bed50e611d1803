"""Driving executions in RQ workers, over django-rq.

A job carries the id of an execution and nothing else, and is only a hint: lost, it is sent again by
the next sweep of recovery; doubled, the lease lets one of them drive and the other end.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from secrets import token_hex
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import close_old_connections
from django_rq.connection_utils import get_connection
from django_rq.queues import get_queue
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import decode_redis_hash

from django_saga import batches
from django_saga.alerts import attended
from django_saga.backends import WAITS, Backend
from django_saga.batches.creating import ring
from django_saga.batches.driving import is_running
from django_saga.conf import conf
from django_saga.exceptions import (
    InvalidSettings,
    LeaseLost,
    SagaAlreadyRunning,
    SagaError,
    SagaNotFound,
)
from django_saga.recovery import recover_saga, sweep
from django_saga.saga import Saga
from django_saga.texts import shown, told

logger = logging.getLogger("django_saga.rq")

ENTRY_POINT = "django_saga.rq.run_saga"  # stored in jobs: it keeps its name for ever
BATCH_ENTRY_POINT = "django_saga.rq.run_batch"  # as does this one
ENTRY_POINTS = (ENTRY_POINT, BATCH_ENTRY_POINT)
BATCH_SECONDS = 15.0  # that one job works on a batch; other jobs may have to wait meanwhile
RESULT_TTL = 300  # seconds that a job stays in Redis once it has ended
FAILURE_TTL = 86_400  # seconds for one that failed, so that somebody can look at it
KEPT: dict[str, Any] = {"result_ttl": RESULT_TTL, "failure_ttl": FAILURE_TTL}
NO_TIMEOUT = -1  # RQ's would strike anywhere; steps have their own


class RQBackend(Backend):
    """Hands executions to the workers of the saga's django-rq queue, or of ``QUEUE``."""

    def __init__(self) -> None:
        _config(conf.QUEUE)

    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        queue = _queue(saga.queue or conf.QUEUE)
        self._enqueue(queue, ENTRY_POINT, saga_id, delay, job_id=_job_id(saga_id))

    def send_many(self, saga: Saga[Any], saga_ids: Sequence[UUID]) -> None:
        jobs = [
            Queue.prepare_data(
                ENTRY_POINT, [str(id)], job_id=_job_id(id), timeout=NO_TIMEOUT, **KEPT
            )
            for id in saga_ids
        ]
        _queue(saga.queue or conf.QUEUE).enqueue_many(jobs)

    def send_batch(self, batch_id: UUID) -> None:
        job_id = f"saga-batch-{batch_id}-{token_hex(6)}"
        self._enqueue(_queue(conf.QUEUE), BATCH_ENTRY_POINT, batch_id, 0.0, job_id=job_id)

    def _enqueue(self, queue: Queue, path: str, id: UUID, delay: float, *, job_id: str) -> None:
        options: dict[str, Any] = {"job_id": job_id, "job_timeout": NO_TIMEOUT, **KEPT}
        if delay > 0:
            queue.enqueue_in(timedelta(seconds=delay), path, str(id), **options)
        else:
            queue.enqueue(path, str(id), **options)


def _job_id(saga_id: UUID) -> str:
    """A new one each time: a job that waits, runs or expires is never in the way of the next."""
    return f"saga-{saga_id}-{token_hex(6)}"


def _queue(name: str) -> Queue:
    return get_queue(
        name,
        commit_mode="auto",  # whoever hands over waits for the commit, on the right database
        connection=_connection(name),
        serializer=JSONSerializer,
    )


def run_saga(saga_id: str) -> None:
    """Drive an execution on from where it stands: what a worker calls.

    However the saga ends, the job has done its work. Raises SagaError for what is no id,
    StorageUnavailable where the database is away; recovery sends the job again then.
    """
    if not _is_id(saga_id):
        raise SagaError(f"{ENTRY_POINT} takes the id of an execution, not {shown(saga_id)}.")
    _end_alarm()
    close_old_connections()
    try:
        recover_saga(saga_id)
    except (SagaAlreadyRunning, SagaNotFound, *WAITS, LeaseLost) as error:
        level = logging.WARNING if isinstance(error, SagaNotFound) else logging.INFO
        logger.log(level, "Nothing to do: %s", told(error), extra={"execution": saga_id})
    finally:
        close_old_connections()


def run_batch(batch_id: str) -> None:
    """Work on a batch for some seconds, and ring again while there is more to do.

    Raises SagaError for what is no id, and where the database is away: recovery goes on then.
    """
    if not _is_id(batch_id):
        raise SagaError(f"{BATCH_ENTRY_POINT} takes the id of a batch, not {shown(batch_id)}.")
    _end_alarm()
    close_old_connections()
    id = UUID(batch_id)
    try:
        came = batches.work(id, seconds=BATCH_SECONDS)
        logger.info("Batch %s: %s", batch_id, dict(came), extra={"batch": batch_id})
        if came and is_running(id):  # else another has it, who rings himself
            ring(id)
    finally:
        close_old_connections()


def _end_alarm() -> None:
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        # A timeout of RQ's would strike anywhere, into a checkpoint too; steps have their own.
        signal.setitimer(signal.ITIMER_REAL, 0)


def sweep_sagas() -> None:
    """One sweep of recovery, as a job for ``rqcron``; register it with ``job_timeout=-1``.

    Batches whose driver was lost are driven on for some seconds, too.
    """
    close_old_connections()
    try:
        with attended():
            for recovered in sweep():
                logger.info("%s: %s", recovered.saga_id, recovered.status)
        batches.work(seconds=BATCH_SECONDS)
    finally:
        close_old_connections()


class SagaJob(Job):
    """The job class of workers that serve sagas alone: ``rqworker --job-class``.

    It refuses whatever is not a call of :func:`run_saga`, or of :func:`run_batch`, with one id,
    written as JSON: such a job fails. Nothing that a job names is imported, nothing in it
    unpickled. Give the worker ``--serializer rq.serializers.JSONSerializer`` too: its scheduler
    reads jobs by other means.
    """

    _refusal = ""

    def __init__(
        self, id: str | None = None, connection: Redis | None = None, serializer: Any = None
    ) -> None:
        super().__init__(id, connection, JSONSerializer)

    def restore(self, raw_data: Any) -> None:
        """Take over what is harmless; anything else has the job refused when it is performed."""
        try:
            fields = decode_redis_hash(raw_data)
            super().restore({name: fields[name] for name in _HARMLESS if name in fields})
            self._refusal = _why_refused(fields, self.data)
        except NoSuchJobError:
            raise
        except Exception as error:  # it must fail this job, not end the worker
            origin = raw_data.get(b"origin", b"").decode(errors="replace")
            super().restore({"data": b"null", "origin": origin})
            self._refusal = f"it cannot be read ({type(error).__name__})"
        # All of the call is known from here on; what is not, rq would decode later.
        call = (None, None, (), {}) if self._refusal else json.loads(self.data)
        self._func_name, self._instance, self._args, self._kwargs = call
        self.description = "refused" if self._refusal else self.get_call_string()
        self.timeout, self.result_ttl, self.failure_ttl = NO_TIMEOUT, RESULT_TTL, FAILURE_TTL

    def perform(self) -> Any:
        """Call the entry point; raises SagaError for a job that is refused."""
        if self._refusal:
            message = (
                f"Job {self.id} was refused: {self._refusal}. This worker serves sagas alone; "
                "give other jobs a queue and workers of their own."
            )
            logger.error(message)
            raise SagaError(message)
        return super().perform()


# Fields of a job's hash that run nothing, now or later, and fields that would.
_HARMLESS = (
    *("data", "origin", "status", "meta", "worker_name", "created_at", "enqueued_at"),
    *("started_at", "ended_at", "last_heartbeat"),
)
_REFUSED = (
    *("success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks"),
    *("dependency_id", "dependency_ids"),
)


def _why_refused(fields: Mapping[str, bytes], data: bytes) -> str:
    """Why a job must not run; empty for one of ours."""
    for name in _REFUSED:
        if fields.get(name):
            return f"it has a {name}"
    match json.loads(data):
        case [str(path), None, [id], {**options}] if not options:
            if path in ENTRY_POINTS and _is_id(id):
                return ""
    return f"it is no call of {ENTRY_POINT} or {BATCH_ENTRY_POINT} with one id"


def _is_id(saga_id: object) -> bool:
    return isinstance(saga_id, str) and bool(_ID.fullmatch(saga_id))


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _config(queue: str) -> Any:
    queues = getattr(settings, "RQ_QUEUES", {})
    if queue not in queues:
        whose = "DJANGO_SAGA['QUEUE']" if queue == conf.QUEUE else "The queue"
        raise InvalidSettings(f"{whose} {queue!r} is not defined in RQ_QUEUES.")
    return queues[queue]


def _connection(queue: str) -> Redis:
    """A connection that gives up soon: its caller waits, and recovery makes up for a lost job."""
    config = _config(queue)
    connection = get_connection(queue)
    given = {**config.get("REDIS_CLIENT_KWARGS", {}), **config.get("CONNECTION_KWARGS", {})}
    if "USE_REDIS_CACHE" not in config and "retry" not in given:  # made for us, as nobody asked
        connection.set_retry(Retry(NoBackoff(), 1))
    return connection
