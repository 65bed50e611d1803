"""Two thin drivers: they do what a flow asks for, one blocking, one awaiting. No rule is here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from asgiref.sync import sync_to_async

from django_saga import signals
from django_saga.calling import (
    aresolve,
    call,
    call_async_handler,
    call_inside,
    call_outside,
    is_async,
    resolve,
)
from django_saga.errors import secrets_of
from django_saga.exceptions import (
    SagaError,
)
from django_saga.flow import (
    Announce,
    Call,
    CallInside,
    Do,
    Flow,
    Pause,
    Run,
    Write,
)
from django_saga.texts import traced
from django_saga.together import Turn, turn_of

logger = logging.getLogger("django_saga.drivers")

T = TypeVar("T")


def drive(flow: Flow[T]) -> T:
    """Do all that the flow asks for, in this thread."""
    try:
        refuse_running_loop("await arun(), or use async with and async for")
    except SagaError:
        flow.close()
        raise
    answer: Any = None
    error: BaseException | None = None
    try:
        while True:
            try:
                ask = flow.send(answer) if error is None else flow.throw(error)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            answer = error = None
            try:
                answer = _do(ask)
            except BaseException as raised:
                error = raised
    finally:
        flow.close()  # interrupted right here it would be kept, and its lease too, by a traceback


def refuse_running_loop(instead: str) -> None:
    """Raise where blocking would block an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise SagaError(f"This would block the running event loop; {instead}.")


def _do(ask: Any) -> Any:
    match ask:
        case Do():
            return ask.function()
        case Write():
            return ask.storage.write(ask.what)
        case Call():
            return call(ask)
        case CallInside():
            return call_inside(ask, resolve(ask.call))
        case Pause():
            return time.sleep(ask.seconds)
        case Announce():
            signal = getattr(signals, ask.name)
            _log_faults(ask, signal.send_robust(type(ask.run.saga), **_payload(ask)))


class AsyncDriver:
    """Does what a flow asks for in the running loop, and never abandons what cannot be stopped."""

    def __init__(self) -> None:
        self._pause: asyncio.Future[None] | None = None
        self._run: Run | None = None
        self._stopping = False
        self._cancelled: asyncio.CancelledError | None = None  # what met the task itself

    async def drive(
        self,
        flow: Flow[T],
        run: Run | None = None,
        *,
        give_up: Callable[[T], Flow[None]] | None = None,
    ) -> T:
        """Do all that the flow asks for.

        Cancelled, it lets the step in flight finish and be checkpointed, has the flow release the
        lease and hand the execution over, and only then raises CancelledError. ``give_up`` is what
        to do with a result that nobody gets any more.
        """
        self._run, self._cancelled = run, None
        interruption: BaseException | None = None
        task = asyncio.ensure_future(self._drive(flow))
        while True:
            try:
                while not task.done():
                    await asyncio.wait((task,))
                break
            except GeneratorExit:  # its loop was closed: there is nothing to wait in any more
                self._stop()
                raise
            except BaseException as error:  # whatever it is, the task must not go on alone
                interruption = error
                self._stop()
        interruption = interruption or self._cancelled
        if interruption is not None:
            # Asking for the exception marks it as seen; the caller has gone.
            if not task.cancelled() and task.exception() is None and give_up is not None:
                await self.drive(give_up(task.result()))
            raise interruption
        return task.result()

    def _stop(self) -> None:
        self._stopping = True
        if self._run is not None:
            self._run.stopping = True
        if self._pause is not None:
            self._pause.cancel()

    async def _drive(self, flow: Flow[T]) -> T:
        answer: Any = None
        error: BaseException | None = None
        try:
            while True:
                try:
                    ask = flow.send(answer) if error is None else flow.throw(error)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
                answer = error = None
                try:
                    answer = await self._do(ask)
                except BaseException as raised:
                    error = raised
        finally:
            flow.close()

    async def _do(self, ask: Any) -> Any:
        match ask:
            case Do(blocking=False):
                return ask.function()
            case Do():
                return await self._finished(ask.function)
            case Write():
                return await self._written(ask)
            case Call():
                self._take(ask.run)
                method = await aresolve(ask)
                if is_async(method):
                    return await call_async_handler(ask, method)
                return await self._finished(partial(call_outside, ask, method))
            case CallInside():
                self._take(ask.call.run)
                method = await aresolve(ask.call)
                return await self._finished(partial(call_inside, ask, method))
            case Pause():
                await self._sleep(ask.seconds)
            case Announce():
                signal = getattr(signals, ask.name)
                payload = _payload(ask)
                _log_faults(ask, await signal.asend_robust(type(ask.run.saga), **payload))
        return None

    def _take(self, run: Run) -> None:
        """A flow that began without a run has one now; it may have been told to stop before."""
        self._run = run
        run.stopping = run.stopping or self._stopping

    async def _written(self, ask: Write) -> Any:
        if not ask.storage.blocking:
            return ask.storage.write(ask.what)
        turn = turn_of(ask.storage)
        if turn is None:
            with Turn(ask.storage, AsyncDriver()._finished):
                return await self._finished(partial(ask.storage.write, ask.what))
        written = turn.wait(ask.what)
        try:
            await self._outlast(written)
        except BaseException:
            if self._run is not None and not written.done():
                self._run.abandoned = True
            raise
        return written.result()

    async def _finished(self, function: Callable[[], T]) -> T:
        """Wait for a thread's work however often this task is cancelled: it goes on anyway."""
        done: Future[T] = Future()

        def work() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except BaseException as error:
                    if done.done():
                        raise  # struck once all was done
                    done.set_exception(error)
                finally:
                    if not done.done():  # struck in the line above: it must not be waited for
                        done.set_exception(asyncio.CancelledError())

        try:
            task = asyncio.ensure_future(sync_to_async(work)())
            await self._outlast(task)
            if task.cancelled():
                if done.cancel():  # it never began
                    raise asyncio.CancelledError
                # A loop that shuts down cancels every task, this one too; but not its thread.
                self._cancel(asyncio.CancelledError())
                in_thread = asyncio.wrap_future(done)
                await self._outlast(in_thread)
                return in_thread.result()
            if (why := task.exception()) and not done.done():
                raise why  # the thread that sync code runs in has gone, say
            return done.result()
        except BaseException:
            if self._run is not None and not (done.cancel() or done.done()):
                self._run.abandoned = True
            raise

    async def _outlast(self, waited: asyncio.Future[Any]) -> None:
        while not waited.done():
            try:
                await asyncio.wait((waited,))
            except asyncio.CancelledError as error:
                self._cancel(error)

    def _cancel(self, error: asyncio.CancelledError) -> None:
        """Stop after the step in flight, and raise the error on."""
        self._cancelled = error
        self._stop()

    async def _sleep(self, seconds: float) -> None:
        self._pause = asyncio.ensure_future(asyncio.sleep(seconds))
        try:
            await asyncio.wait((self._pause,))
        finally:
            self._pause = None


def _payload(ask: Announce) -> dict[str, Any]:
    payload: dict[str, Any] = {"execution": ask.run.execution}
    if ask.record is not None:
        payload["record"] = ask.record
    return payload


def _log_faults(ask: Announce, answers: list[tuple[Any, Any]]) -> None:
    for receiver, answer in answers:
        if isinstance(answer, Exception):
            trace = traced(answer, secrets_of(ask.run))
            logger.error("A receiver of %s failed: %r\n%s", ask.name, receiver, trace)
