"""From an execution to its RQ job. Redis is asked only when somebody follows the link."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from uuid import UUID

from django.apps import apps
from django.urls import NoReverseMatch, reverse

from django_saga import registry
from django_saga.backends import get_backend
from django_saga.texts import told

logger = logging.getLogger("django_saga.admin")

PATIENCE = 2.0  # seconds that a page waits for Redis
LOOKED_AT = 10_000  # ids of each list of jobs; the rest may be a million


@dataclass
class Queue:
    """How a queue of saga jobs stands."""

    name: str
    workers: int = 0
    waiting: int = 0
    error: str = ""

    @property
    def deserted(self) -> bool:
        """Whether jobs wait and nobody works."""
        return bool(self.waiting) and not self.workers


def queues() -> list[Queue]:
    """Workers and waiting jobs; none where RQ is not used. Redis away is an error to show."""
    if not apps.is_installed("django_rq") or not get_backend().queues:
        return []
    return [_facts(name) for name in registry.queues()]


def _facts(name: str) -> Queue:
    facts = Queue(name)
    try:
        from django_rq.queues import get_queue
        from rq import Worker

        from django_saga.rq import _connection

        connection = _connection(name)
        connection.connection_pool.connection_kwargs.setdefault("socket_timeout", PATIENCE)
        queue = get_queue(name, connection=connection)
        facts.waiting = queue.count
        facts.workers = Worker.count(connection=connection, queue=queue)
    except Exception as error:  # whatever Redis, or the way to it, raises
        logger.warning("The overview cannot ask Redis: %s", told(error))
        facts.error = type(error).__name__
    return facts


def has_jobs() -> bool:
    """Whether executions are handed to RQ, and its dashboard can be linked to."""
    if not apps.is_installed("django_rq") or not get_backend().queues:
        return False
    return any(_job_page(name, "saga") for name in registry.queues())


def find_job(saga_id: UUID) -> str:
    """The page of this execution's job in django-rq's dashboard; empty where none was found.

    Of the jobs that wait in a queue those are looked at that are next, of all others the latest.
    """
    return next(filter(None, (_find_in(name, saga_id) for name in registry.queues())), "")


def _find_in(name: str, saga_id: UUID) -> str:
    from django_rq.queues import get_queue

    from django_saga.rq import _connection

    queue = get_queue(name, connection=_connection(name))
    registries = (
        queue.started_job_registry,
        queue.scheduled_job_registry,
        queue.failed_job_registry,
        queue.finished_job_registry,
    )
    waiting = queue.get_job_ids(0, LOOKED_AT)
    held = (jobs.get_job_ids(0, LOOKED_AT - 1, desc=True, cleanup=False) for jobs in registries)
    mine = f"saga-{saga_id}-"  # what follows is random: no key can be asked for
    found = (id for id in chain(waiting, *held) if id.startswith(mine))
    return next((_job_page(name, id) for id in found), "")


def _job_page(queue: str, job_id: str) -> str:
    from django_rq.settings import get_queues_list

    names = [entry["name"] for entry in get_queues_list()]
    if queue not in names:
        return ""
    for name in ("admin:django_rq_job_detail", "django_rq:job_detail"):
        try:
            return reverse(name, args=[names.index(queue), job_id])
        except NoReverseMatch:
            continue
    return ""
