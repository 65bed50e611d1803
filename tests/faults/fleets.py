"""A fleet: the processes that enqueue, work and recover, as a site has them, to be killed at will.

:class:`Fleet` is for the battery; the functions are what its processes do.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID, uuid4

import rq
from django.core.management import call_command
from django.db import connections
from django.db.models.functions import Now
from django_rq.queues import get_queue
from rq.serializers import JSONSerializer

from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.rq import SagaJob
from tests.faults.children import PATIENCE, Child, Nursery
from tests.faults.driving import begin, rq_settings
from tests.faults.judge import wrongs
from tests.faults.ledger import Entry, Ledger
from tests.faults.redis_server import RedisServer
from tests.faults.sagas import CASES, Trial

LEASE = 2.0  # seconds; short, as what was killed is healed only after it, yet no pause of a process
SWEEP = 0.1  # seconds between two sweeps


class Member:
    """One place in a fleet, and the process that fills it now."""

    def __init__(self, nursery: Nursery, function: str, arguments: dict[str, Any]) -> None:
        self.function = function
        self._start = lambda: nursery.start(f"{__name__}.{function}", **arguments)
        self.child: Child = self._start()

    def replace(self) -> None:
        self.child = self._start()


class Fleet:
    """What drives the executions that it enqueued, until the ``with`` block ends.

    Nothing of it may be left then: no process, also none that a killed one had forked, no
    connection to the database or to Redis.
    """

    def __init__(
        self,
        nursery: Nursery,
        database: str,
        ledger: Ledger,
        redis: RedisServer,
        alive: Path,
        *,
        lease: float = LEASE,
        without: str = "",
    ) -> None:
        name = f"faults-{uuid4().hex[:8]}"
        self.ids: list[UUID] = []
        self.members: list[Member] = []
        self.fallen: list[str] = []  # what ended by itself
        self.queue = rq.Queue(name, connection=redis.client, serializer=JSONSerializer)
        self._nursery, self._database, self._ledger, self._redis = nursery, database, ledger, redis
        self._alive = alive
        alive.touch()
        self._shared: dict[str, Any] = {
            "queue": name,
            "redis": redis.url,
            "ledger": ledger.address,
            "lease": lease,
            "alive": str(alive),
            "without": without,
        }

    def __enter__(self) -> Fleet:
        self._baseline = self._connections
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for member in self.members:
            member.child.signal(signal.SIGKILL)
        until(self._has_ended, "L6 a process is left")
        if error is None:
            until(self._is_as_before, "L6 a connection is left")

    def enqueue(self, sagas: Sequence[str]) -> None:
        """Have a process of its own enqueue one execution of each."""
        new = [(saga, uuid4()) for saga in sagas]
        named = [[saga, str(id)] for saga, id in new]
        self._nursery.run(f"{__name__}.enqueue", sagas=named, **self._shared)
        self.ids += [id for _, id in new]

    def add(self, function: str, **arguments: object) -> None:
        """One more process: ``work`` or ``recover``, with arguments of its own."""
        self.members.append(Member(self._nursery, function, {**self._shared, **arguments}))

    def kill(self, member: Member) -> bool:
        """SIGKILL its process and start another; whether that one was driving an execution."""
        child = member.child
        assert child.poll() is None, f"process {child.pid} had ended by itself"
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        in_hand = child.pid in self._drivers
        member.replace()
        return in_hand

    @property
    def driving(self) -> list[Member]:
        """Those that hold a lease just now."""
        drivers = self._drivers
        return [member for member in self.members if member.child.pid in drivers]

    def tend(self) -> None:
        """Start again what has ended by itself, as whoever runs workers does."""
        for member in self.members:
            if member.child.poll() is not None:
                self.fallen.append(member.function)
                member.replace()

    def heal(self) -> None:
        """Wait until every execution has ended."""

        def left() -> int:
            self.tend()
            return len(self.active)

        until_none(left, "L0 executions do not end")

    @property
    def active(self) -> set[UUID]:
        """Its executions that have not ended."""
        rows = self._rows.filter(status__in=ACTIVE).values_list("id", flat=True)
        return set(rows) & set(self.ids)

    @property
    def stranded(self) -> set[UUID]:
        """Those of them that nobody drives any more, their lease being past."""
        past = self._rows.filter(status__in=ACTIVE, lease_until__lt=Now())
        return set(past.values_list("id", flat=True)) & set(self.ids)

    @property
    def interrupted(self) -> int:
        """How many of its executions lost a driver."""
        records = SagaStepRecord.objects.using(self._database).filter(outcome="INTERRUPTED")
        return len(set(records.values_list("execution", flat=True)) & set(self.ids))

    @property
    def wrongs(self) -> list[str]:
        """What its executions break."""
        return [wrong for id in self.ids for wrong in self.wrongs_of(id)]

    def wrongs_of(self, id: UUID) -> list[str]:
        if not self._rows.filter(pk=id).exists():
            return [f"L0 {id} was lost"]
        return wrongs(id, self._database, self.entries(id))

    def entries(self, id: UUID) -> list[Entry]:
        """What was called for it."""
        return self._ledger.entries(id)

    @property
    def _rows(self) -> Any:
        return SagaExecution.objects.using(self._database)

    @property
    def _drivers(self) -> set[int]:
        """The processes that have an execution in hand, or had when they died."""
        leased = self._rows.filter(status__in=ACTIVE, lease_until__isnull=False)
        return {int(name.rpartition(":")[2]) for name in leased.values_list("driver", flat=True)}

    @property
    def _connections(self) -> tuple[int, int]:
        """To the database, as far as it counts them, and to Redis."""
        to_database = 0
        if connections[self._database].vendor == "postgresql":
            with connections[self._database].cursor() as cursor:
                cursor.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                )
                (to_database,) = cursor.fetchone()
        return to_database, self._redis.clients

    def _is_as_before(self) -> bool:
        return all(now <= then for now, then in zip(self._connections, self._baseline, strict=True))

    def _has_ended(self) -> bool:
        """Whether no process of it runs, and none that one of them forked."""
        with self._alive.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def until(condition: Callable[[], object], otherwise: str) -> None:
    """Wait for it; AssertionError where it does not come about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def until_none(left: Callable[[], int], otherwise: str) -> None:
    """Wait until it is 0; that may take its time, as long as it changes."""
    known, deadline = -1, 0.0
    while count := left():
        if count != known:
            known, deadline = count, time.monotonic() + PATIENCE
        assert time.monotonic() < deadline, f"{otherwise} ({count})"
        time.sleep(0.05)


# What the processes do


def enqueue(sagas: list[tuple[str, str]], **shared: Any) -> None:
    with _member(**shared):
        for saga, saga_id in sagas:
            CASES[saga].saga().enqueue(Trial(shared["ledger"]), saga_id=UUID(saga_id))


def work(worker: str = "SimpleWorker", **shared: Any) -> None:
    """Be a worker of that class of RQ's, for ever."""
    with _member(**shared):
        queue = get_queue(shared["queue"], serializer=JSONSerializer)
        made = getattr(rq, worker)([queue], connection=queue.connection, job_class=SagaJob)
        made.work(logging_level="CRITICAL")


def recover(where: str = "enqueue", **shared: Any) -> None:
    """Sweep again and again; ``where`` is that option of the command's."""
    with _member(**shared):
        call_command("recover_sagas", watch=SWEEP, verbosity=0, **{where: True})


@contextmanager
def _member(
    queue: str, redis: str, ledger: str, lease: float, alive: str, without: str
) -> Iterator[None]:
    # Held until this process has ended, and each that it forks.
    fcntl.flock(os.open(alive, os.O_RDONLY), fcntl.LOCK_SH)
    begin(ledger, None, without)
    with rq_settings(queue, redis, LEASE=lease):
        yield
