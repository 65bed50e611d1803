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
    """What waits to be written to one storage, in one thread, and goes there batch by batch."""

    def __init__(self, key: Key, storage: SagaStorage, in_thread: InThread) -> None:
        self._key, self._storage, self._in_thread = key, storage, in_thread
        self._waiting: list[tuple[Checkpoint | Creation, asyncio.Future[Any]]] = []
        self._task: asyncio.Task[None] | None = None

    def add(self, write: Checkpoint | Creation) -> asyncio.Future[Any]:
        """What will have come of it; whoever waits for that waits for the :meth:`task`, again and
        again."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((write, future))
        return future

    def task(self) -> asyncio.Task[None]:
        """That which writes a batch now. Those who wait begin it, so that none waits in vain where
        something struck the one before: Ctrl-C, or the end of the loop."""
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._write())
        return self._task

    async def _write(self) -> None:
        batch: list[tuple[Checkpoint | Creation, asyncio.Future[Any]]] = []
        try:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            writes = [write for write, _ in batch]
            outcomes = await self._in_thread(partial(self._storage.write_together, writes))
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                _settle(future, outcome)
        except BaseException as error:  # what strikes the thread strikes all that it was doing
            if not batch:
                raise
            for _, future in batch:
                _settle(future, error)
        finally:
            if not self._waiting:
                _turns.pop(self._key, None)


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def turn_of(storage: SagaStorage, in_thread: InThread) -> Turn:
    """The turn of the thread that the running task's sync code runs in."""
    key = _key(storage)
    turn = _turns.get(key)
    if turn is None:
        for other in list(_turns):
            if other[0].is_closed():  # what was under way there never ends
                _turns.pop(other, None)
        turn = _turns[key] = Turn(key, storage, in_thread)
    return turn


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
