"""What the children do: drive an execution, and meet a fault at a statement."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID, uuid5

import rq
from django.conf import settings
from django.db.backends.signals import connection_created
from django.test import override_settings
from django_rq.queues import get_queue
from rq.serializers import JSONSerializer

from django_saga import (
    LeaseLost,
    SagaAlreadyRunning,
    SagaFailed,
    SagaNotFound,
    StorageUnavailable,
    recover_saga,
)
from django_saga.models import SagaExecution
from tests.faults import sagas
from tests.faults.children import DIED
from tests.faults.rules import SWITCH_OFF
from tests.faults.sagas import JUDGED, Trial, tell_the_ledger

FAULTS = {
    "die": lambda: os._exit(DIED),
    # To this very thread, or it might run on for a while before another gets the signal.
    "freeze": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP),
}
RUNNERS = ("sync", "async", "rq")
GAVE_UP = {LeaseLost: 11, StorageUnavailable: 12, SagaAlreadyRunning: 13}
"""The exit statuses of a driver that raised an error which it may raise."""


class Fault:
    """Something done before or after the n-th SQL statement of this process, in any thread, or the
    n-th call of the ledger."""

    def __init__(self, at: int, after: bool, kind: str, where: str = "statement") -> None:
        self.left, self.after, self.strike, self.where = at, after, FAULTS[kind], where

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self.left -= 1
        here = self.left == 0
        if here and not self.after:
            self.strike()
        answer = function(*args)
        if here and self.after:
            self.strike()
        return answer

    def install(self) -> None:
        """Have it meet every call, or the statements of every connection opened from now on."""
        if self.where == "call":
            sagas.note = partial(self, sagas.note)
        else:
            connection_created.connect(self._meet, weak=False)

    def _meet(self, connection: Any, **_: object) -> None:
        connection.execute_wrappers.append(self)


def drive(
    saga: str,
    saga_id: str,
    ledger: str,
    runner: str = "sync",
    queue: str = "sagas",
    fault: list[Any] | None = None,
    without: str = "",
) -> int:
    """Run a saga; ``fault`` is the arguments of a :class:`Fault`, ``without`` names a rule.

    Returns one of GAVE_UP, or 0.
    """
    begin(ledger, fault, without)
    made, context = JUDGED[saga].saga(), Trial(ledger)
    try:
        if runner == "sync":
            made.run(context, saga_id=UUID(saga_id))
        elif runner == "async":
            asyncio.run(_arun(made, context, UUID(saga_id)))
        elif runner == "together":
            asyncio.run(_arun_together(made, context, crowd_of(UUID(saga_id))))
        else:
            with rq_settings(queue):
                made.enqueue(context, saga_id=UUID(saga_id))
                work(queue)
    except SagaFailed:
        pass
    except tuple(GAVE_UP) as error:
        return GAVE_UP[type(error)]
    return 0


async def _arun(saga: Any, context: Trial, saga_id: UUID) -> None:
    await saga.arun(context, saga_id=saga_id)


async def _arun_together(saga: Any, context: Trial, ids: list[UUID]) -> None:
    outcomes = await asyncio.gather(
        *(saga.arun(replace(context), saga_id=id) for id in ids), return_exceptions=True
    )
    for outcome in outcomes:
        # Nobody knows of an execution whether it was started: its caller is told, and recovery.
        if isinstance(outcome, BaseException) and not isinstance(
            outcome, (SagaFailed, StorageUnavailable)
        ):
            raise outcome


def crowd_of(saga_id: UUID) -> list[UUID]:
    """The ids of executions that are driven at once, from that of the first."""
    return [saga_id, *(uuid5(saga_id, str(number)) for number in range(3))]


def recover(saga_id: str, ledger: str, fault: list[Any] | None = None, without: str = "") -> None:
    """Drive an execution on, its lease being past; one that was never stored is no fault."""
    begin(ledger, fault, without)
    with suppress(SagaNotFound, SagaAlreadyRunning):
        recover_saga(saga_id)


def begin(ledger: str, fault: list[Any] | None, without: str) -> None:
    tell_the_ledger(ledger)
    if without:
        SWITCH_OFF[without]()
    if fault is not None:
        Fault(*fault).install()


def rq_settings(queue: str, redis: str = "", **saga_settings: Any) -> override_settings:
    """Sagas are handed to that queue, of the tests' Redis or of one at that URL."""
    url = redis or settings.RQ_QUEUES["default"]["URL"]
    ours = {**settings.DJANGO_SAGA, "BACKEND": "rq", "QUEUE": queue, **saga_settings}
    return override_settings(DJANGO_SAGA=ours, RQ_QUEUES={queue: {"URL": url}})


def work(queue: str) -> None:
    """Be a simple worker until the queue is empty, and leave none of its signal handlers."""
    queues = [get_queue(queue, serializer=JSONSerializer)]
    connection = queues[0].connection
    worker = rq.SimpleWorker(queues, connection=connection, serializer=JSONSerializer)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        worker.work(burst=True, logging_level="ERROR")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def expire(saga_id: UUID, database: str) -> None:
    """As if the lease had run out, and with it every wait."""
    past = "2020-01-01T00:00:00Z"
    rows = SagaExecution.objects.using(database).filter(pk=saga_id)
    rows.filter(lease_until__isnull=False).update(lease_until=past)
    rows.update(grace_until=None)
