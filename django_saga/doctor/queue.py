"""The backend, and where it is RQ: its queues, their Redis, their workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from django_saga import registry
from django_saga.backends import get_backend
from django_saga.conf import conf
from django_saga.doctor.finding import Finding
from django_saga.exceptions import SagaError
from django_saga.texts import told


def backend() -> Iterator[Finding]:
    """Whether executions can be handed over, and somebody takes them."""
    try:
        queues = get_backend().queues
    except SagaError as error:
        yield Finding("backend", "error", told(error), _("Mend DJANGO_SAGA, or RQ_QUEUES."))
        return
    if not queues:
        text = _("Sagas are driven in the process that starts them, and by recover_sagas.")
        yield Finding("backend", "ok", text)
    elif conf.BACKEND == "rq":
        yield from _rq()
    else:
        text = _("The backend is %(path)s; only it knows its queue.") % {"path": conf.BACKEND}
        yield Finding("backend", "ok", text)


def _rq() -> Iterator[Finding]:
    from django_rq.queues import get_queue
    from redis.exceptions import RedisError

    from django_saga.rq import _connection

    servers = []  # the queues may be on several
    for name in registry.queues():
        connection = _connection(name)
        try:
            server = connection.info("server")["run_id"]
        except RedisError as error:
            what = _("Redis does not answer: %(error)s") % {"error": told(error)}
            todo = _("Nothing is lost: recover_sagas hands over again once it answers.")
            yield Finding("redis", "error", what, todo)
            continue
        if server not in servers:
            servers.append(server)
            yield Finding("redis", "ok", _("Redis answers."))
            yield from _eviction(connection)
        yield from _workers(get_queue(name, connection=connection))


def _eviction(connection: Any) -> Iterator[Finding]:
    memory = connection.info("memory")  # CONFIG GET is forbidden at many hosts
    policy = str(memory.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        yield Finding("eviction", "ok", _("Redis evicts no keys."))
        return
    what = _("Redis may evict jobs when its memory is full: its policy is %(policy)s.")
    todo = _("Set maxmemory-policy noeviction; until then recover_sagas makes up for lost jobs.")
    yield Finding("eviction", "warning", what % {"policy": policy}, todo)


def _workers(queue: Any) -> Iterator[Finding]:
    from rq import Worker

    workers = Worker.all(queue=queue)
    facts = {"queue": queue.name, "waiting": queue.count, "n": len(workers)}
    if not workers:
        what = _("No worker listens to the queue %(queue)s; %(waiting)s jobs wait there.") % facts
        todo = _(
            "Start one: manage.py rqworker %(queue)s --with-scheduler "
            "--job-class django_saga.rq.SagaJob --serializer rq.serializers.JSONSerializer"
        )
        yield Finding("workers", "error", what, todo % facts)
        return
    what = ngettext(
        "%(n)s worker listens to the queue %(queue)s; %(waiting)s jobs wait there.",
        "%(n)s workers listen to the queue %(queue)s; %(waiting)s jobs wait there.",
        len(workers),
    )
    todo = _("RQ does not tell a worker's job class: see to it that it is django_saga.rq.SagaJob.")
    yield Finding("workers", "ok", what % facts, todo)
    listened = {name for worker in workers for name in worker.queue_names()}
    if others := sorted(listened - set(registry.queues())):
        what = _("Workers of this queue listen to others too: %(names)s.")
        todo = _("Give sagas workers of their own: one on several queues can lose a job.")
        yield Finding("queues", "warning", what % {"names": ", ".join(others)}, todo)
