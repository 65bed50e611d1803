"""Group commit: what the flows of one event loop write at the same time shares a transaction.

All sync code of a loop, or of a request under ASGI, runs in one thread of asgiref's. What is to be
written while that thread writes waits, and goes into one transaction then, so that one commit makes
it all durable. (Group commit: DeWitt et al., "Implementation techniques for main memory database
systems", SIGMOD 1984.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from asgiref.sync import AsyncToSync, SyncToAsync

if TYPE_CHECKING:
    from django_saga.storage.base import Checkpoint, Creation, SagaStorage

MOST = 100  # writes in one transaction, whose rows stay locked until its end

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


class Turn:
    """The right to use the thread for writes to one storage; others wait until it goes on."""

    def __init__(self, storage: SagaStorage, in_thread: InThread) -> None:
        self._storage, self._in_thread = storage, in_thread
        self._waiting: list[tuple[Checkpoint | Creation, asyncio.Future[Any]]] = []
        self._key = _key(storage)
        self._task: asyncio.Task[None] | None = None  # or it might be collected while it runs

    def __enter__(self) -> None:
        _turns[self._key] = self

    def __exit__(self, *about: object) -> None:
        self._go_on()

    def wait(self, write: Checkpoint | Creation) -> asyncio.Future[Any]:
        """Have it written with all others that wait; what came of it."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((write, future))
        return future

    def _go_on(self, ended: asyncio.Task[None] | None = None) -> None:
        if not self._waiting:
            del _turns[self._key]
            return
        self._task = asyncio.ensure_future(self._write_all())
        self._task.add_done_callback(self._go_on)  # cancelled before it began, another does it

    async def _write_all(self) -> None:
        waiting, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        try:
            writes = [write for write, _ in waiting]
            outcomes = await self._in_thread(partial(self._storage.write_together, writes))
            written = list(zip(waiting, outcomes, strict=True))
        except BaseException as error:  # what strikes the thread strikes all that it was doing
            written = [(entry, error) for entry in waiting]
        for (_, future), outcome in written:
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def turn_of(storage: SagaStorage) -> Turn | None:
    """Who writes to the storage now, in the thread that the running task's sync code runs in."""
    return _turns.get(_key(storage))


Key = tuple[asyncio.AbstractEventLoop, object, object, str, "SagaStorage"]

_turns: dict[Key, Turn] = {}


def _key(storage: SagaStorage) -> Key:
    # What asgiref chooses the thread by. Two flows of one loop may have two: a sync handler that
    # calls async code runs the sync code below that itself.
    caller = getattr(AsyncToSync.executors, "current", None)
    request = SyncToAsync.thread_sensitive_context.get(None)
    # A router may send each flow to another database.
    database = getattr(storage, "alias", "")
    return asyncio.get_running_loop(), caller, request, database, storage
