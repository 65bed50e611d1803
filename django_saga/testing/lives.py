"""What a driver reaches the world through; it is cut off where the driver's process is to die."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from uuid import UUID

from django.db import transaction

from django_saga.calling import make
from django_saga.conf import conf
from django_saga.machine import Outcome, State
from django_saga.saga import default_storage
from django_saga.steps import StepType, current_step
from django_saga.storage import MemorySagaStorage
from django_saga.storage.base import Checkpoint, Claim, SagaStorage, Saved
from django_saga.testing.faults import Crash, Scene

if TYPE_CHECKING:
    from django_saga.testing.runner import SagaRun


class CrashPoint(NamedTuple):
    """A moment in which the process may die, and what is wrong where that does harm."""

    moment: str
    fault: str


_REPEATED = "{} is not idempotent: a crash had it called again, with the same key"
_LOST = "What {} needs, or what follows it, was lost in a crash"


class Life:
    """The storage and the container of one driver. Once dead it reaches neither of them."""

    def __init__(self, run: SagaRun) -> None:
        self._run, self._storage, self._dead = run, run.runner.storage, False
        self._uncommitted: Checkpoint | None = None

    def __getattr__(self, name: str) -> Any:
        self._breathe()
        return getattr(self._storage, name)

    def _breathe(self) -> None:
        if self._dead:
            raise Crash

    def _die(self) -> NoReturn:
        self._dead = True
        raise Crash

    # The storage

    write = SagaStorage.write

    def create(self, saga_id: UUID, saga: str, state: State, **options: Any) -> Claim | None:
        claim = self._storage.create(saga_id, saga, state, **options)
        self._run.stored(state)
        self._point("before {} ran", _LOST, state)
        return claim

    def checkpoint(self, checkpoint: Checkpoint, *, inside: bool = False) -> Saved:
        self._breathe()
        record = checkpoint.record
        if record is not None and record.outcome is not Outcome.INTERRUPTED:
            self._point("after {} ran, before its checkpoint", _REPEATED, checkpoint.before)
        else:
            self._point("before {} was put in flight", _LOST, checkpoint.before)
        saved = self._storage.checkpoint(checkpoint, inside=inside)
        if inside:
            self._uncommitted = checkpoint
        else:
            self._stored(checkpoint)
        return saved

    @contextmanager
    def atomic(self, lease: float) -> Iterator[None]:
        self._breathe()
        with ExitStack() as stack:
            if isinstance(self._storage, MemorySagaStorage):
                # It has nothing to roll back; what the handler wrote has.
                stack.enter_context(transaction.atomic(using=default_storage().alias))
            stack.enter_context(self._storage.atomic(lease))
            yield
        assert self._uncommitted is not None
        self._stored(self._uncommitted)

    def _stored(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.after
        self._run.stored(state, checkpoint.wake)
        if state.active:
            self._point("before {} ran", _LOST, state)
        else:
            self._point(f"once it was {state.status}", "Its end was lost in a crash", state)

    def _point(self, moment: str, fault: str, state: State) -> None:
        handler = f"{state.step}.{state.action}"
        self._run.crash_points.append(CrashPoint(moment.format(handler), fault.format(handler)))
        if sum(fault.fires("", "") for fault in self._run.faults):
            self._die()

    # The container

    def resolve(self, step: StepType) -> Any:
        container = self._run.saga.container
        handler = make(step) if container is None else container.resolve(step)
        watched = partial(_Watched, self, step)
        return _later(handler, watched) if inspect.isawaitable(handler) else watched(handler)

    @contextmanager
    def call(self, step: StepType, context: Any) -> Iterator[int]:
        """Around a call of a handler: how often it is really called, and what comes of it."""
        codec, info = self._run.saga.definition.codec, current_step()
        self._run.calls.append(info)
        faults = [fault for fault in self._run.faults if fault.fires(info.step, info.action)]
        if not faults:
            yield 1
            return
        before = codec.encode(context, limit=conf.CONTEXT_LIMIT)
        scene = Scene(step, self._die, lambda: codec.restore(context, before))
        calls, ends = [f.calls for f in faults], [f.then for f in faults if f.then]
        with suppress(*([Exception] if ends else [])):
            yield min(calls) and max(calls)
        for then in ends:
            then(scene)


async def _later(handler: Awaitable[Any], watched: Callable[[Any], _Watched]) -> _Watched:
    return watched(await handler)


class _Watched:
    """A handler as the driver gets it."""

    def __init__(self, life: Life, step: StepType, handler: Any) -> None:
        self.act = _Method(life, step, handler.act).watched
        self.compensate = _Method(life, step, handler.compensate).watched


class _Method(NamedTuple):
    life: Life
    step: StepType
    method: Callable[[Any], Any]

    @property
    def watched(self) -> Callable[[Any], Any]:
        return self._acall if inspect.iscoroutinefunction(self.method) else self._call

    def _call(self, context: Any) -> Any:
        with self.life.call(self.step, context) as calls:
            answers = [self.method(context) for _ in range(calls)]
        return answers[-1]

    async def _acall(self, context: Any) -> Any:
        with self.life.call(self.step, context) as calls:
            answers = [await self.method(context) for _ in range(calls)]
        return answers[-1]
