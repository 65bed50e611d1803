"""Two thin drivers: they do what a flow asks for, one blocking, one awaiting. No rule is here."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache, partial
from traceback import walk_tb
from types import MethodType
from typing import Any, TypeVar

from asgiref.sync import async_to_sync, sync_to_async
from django.db import Error as DatabaseError
from msgspec.structs import replace

from django_saga import signals
from django_saga.errors import left_open, secrets_of
from django_saga.exceptions import (
    CircuitOpen,
    InsideTransaction,
    InvalidDefinition,
    LeaseLost,
    SagaError,
    TransactionLeftOpen,
)
from django_saga.flow import (
    Announce,
    Call,
    CallInside,
    Do,
    Flow,
    HandlerRaised,
    Pause,
    Run,
    Write,
)
from django_saga.steps import CircuitBreaker, CurrentStep, StepType, _current
from django_saga.storage.base import SagaStorage
from django_saga.texts import shown, traced
from django_saga.timeouts import time_limit
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
            return _call(ask)
        case CallInside():
            return _call_inside(ask, _resolve(ask.call))
        case Pause():
            return time.sleep(ask.seconds)
        case Announce():
            signal = getattr(signals, ask.name)
            _log_faults(ask, signal.send_robust(type(ask.run.saga), **_payload(ask)))


def _made(ask: Call) -> Any:
    """The handler, from the container or just made; where that is async, what to await for it."""
    container = ask.run.saga.container
    maker = container.resolve if container is not None else ask.step.__init__
    if maker is object.__init__:
        maker = ask.step.__new__
    try:
        return _make(ask.step) if container is None else maker(ask.step)
    except Exception as error:
        raise _raised_by(maker, error) from error


def _make(step: StepType) -> Any:
    try:
        return step()
    except TypeError as error:
        raise InvalidDefinition(
            f"Step {step.__qualname__} cannot be made: {error}. Handlers are made without "
            "arguments, or by the CONTAINER of the settings."
        ) from error


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except Exception as error:
        raise _raised_by(awaitable, error) from error


def _raised_by(called: Any, error: Exception) -> Exception:
    """What to raise for an error: HandlerRaised, unless it struck our own lines around the call.

    A signal handler, such as RQ's timeout, raises anywhere, and memory can run out anywhere. Where
    the call itself did not raise, nothing is known of what it did: that is an interruption.
    """
    if isinstance(error, (SagaError, TimeoutError, TypeError)):  # ours; or the call does not fit
        return HandlerRaised(error)
    code = getattr(called, "__code__", getattr(called, "cr_code", None))
    if code is None:  # not Python's: it leaves no frame
        struck = called is object.__new__
    else:
        struck = all(frame.f_code is not code for frame, _ in walk_tb(error.__traceback__))
    return error if struck else HandlerRaised(error)


def _method(ask: Call, handler: Any) -> Callable[[Any], Any]:
    method = getattr(handler, ask.info.action, None)
    if not callable(method):
        raise HandlerRaised(
            InvalidDefinition(
                f"For step {ask.step.__qualname__} the container made {shown(handler)}, which has "
                f"no {ask.info.action}()."
            )
        )
    return method  # type: ignore[no-any-return]


def _is_async(method: Callable[[Any], Any]) -> bool:
    if isinstance(method, MethodType):
        return _is_coroutine_function(method.__func__)
    return inspect.iscoroutinefunction(method)


_is_coroutine_function = lru_cache(maxsize=1024)(inspect.iscoroutinefunction)  # it is slow to tell


def _resolve(ask: Call) -> Callable[[Any], Any]:
    handler = _made(ask)
    if inspect.isawaitable(handler):
        handler = async_to_sync(_awaited)(handler)
    return _method(ask, handler)


async def _aresolve(ask: Call) -> Callable[[Any], Any]:
    handler = _made(ask)
    return _method(ask, await _awaited(handler) if inspect.isawaitable(handler) else handler)


def _call(ask: Call) -> Any:
    method = _resolve(ask)
    if not _is_async(method):
        return _call_outside(ask, method)
    try:
        return async_to_sync(call_async_handler)(ask, method)
    except HandlerRaised:
        raise
    except BaseException:
        # Interrupted here, the coroutine goes on in its own thread.
        ask.run.abandoned = True
        raise


def _call_inside(ask: CallInside, method: Callable[[Any], Any]) -> Any:
    try:
        with ask.transaction():
            answer = call_handler(ask.call, method), ask.checkpoint()
        return answer
    except (DatabaseError, TransactionLeftOpen) as error:
        # The database refused what the handler had written, at the latest at the commit.
        raise HandlerRaised(error) from error


def call_handler(ask: Call, method: Callable[[Any], Any]) -> Any:
    """Call a sync handler, in whatever thread this is."""
    if time.monotonic() - ask.run.renewed_at > ask.run.lease:
        raise LeaseLost(
            f"Saga execution {ask.run.id}: its lease ran out while step {ask.info.step} waited "
            "for a thread."
        )
    info, timeout = _begun(ask), ask.step.timeout
    current = _current.set(info)
    try:
        with _guarded(ask.breaker), time_limit(timeout):
            response = method(ask.run.context)
        if response is not None and inspect.isawaitable(response):
            _close(response)
            raise InvalidDefinition(
                f"{info.action} of step {info.step} returned an awaitable; "
                "declare it with async def."
            )
    except Exception as error:
        raise _raised_by(method, error) from error
    finally:
        _current.reset(current)
        ask.run.until = None
    if info.remaining == 0:
        logger.warning(
            "Saga %s: %s of step %s took longer than its timeout of %s s, and is done",
            info.saga_id,
            info.action,
            info.step,
            timeout,
        )
    return response


def _call_outside(ask: Call, method: Callable[[Any], Any]) -> Any:
    """Call a sync handler outside of any transaction, and end one that it leaves open.

    Left open it would be in the way of its own checkpoint, and of every saga after it in this
    thread.
    """
    storage = ask.run.storage
    try:
        response = call_handler(ask, method)
    except HandlerRaised:
        if _is_open(storage):
            storage.end_transaction()
        raise
    if _is_open(storage):
        storage.end_transaction()
        raise HandlerRaised(left_open(ask.info))
    return response


def _is_open(storage: SagaStorage) -> bool:
    try:
        storage.refuse_transaction()
    except InsideTransaction:
        return True
    return False


async def call_async_handler(ask: Call, method: Callable[[Any], Any]) -> Any:
    """Call an async handler, in whatever loop this is."""
    current = _current.set(_begun(ask))
    try:
        with _guarded(ask.breaker):
            async with asyncio.timeout(ask.step.timeout):
                return await method(ask.run.context)
    except Exception as error:
        raise _raised_by(method, error) from error
    finally:
        _current.reset(current)
        ask.run.until = None


def _begun(ask: Call) -> CurrentStep:
    """What the handler is told; its timeout counts from now: the call may have waited."""
    if ask.step.timeout is None:
        return ask.info
    ask.run.until = time.monotonic() + ask.step.timeout
    return replace(ask.info, deadline=ask.run.until)


def _guarded(breaker: CircuitBreaker | None) -> AbstractContextManager[None]:
    return _UNGUARDED if breaker is None else _broken_by(breaker)


_UNGUARDED = nullcontext()


@contextmanager
def _broken_by(breaker: CircuitBreaker) -> Iterator[None]:
    """Let a circuit breaker see the call; the handler's own error stays what the saga sees."""
    entered, raised = False, None
    try:
        with breaker.calling():
            entered = True
            try:
                yield
            except Exception as error:
                raised = error
                raise
    except Exception as error:
        if raised is not None:
            raise raised from None
        if entered:
            raise
        raise CircuitOpen(f"the circuit breaker is open: {error}") from error


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
                method = await _aresolve(ask)
                if _is_async(method):
                    return await call_async_handler(ask, method)
                return await self._finished(partial(_call_outside, ask, method))
            case CallInside():
                self._take(ask.call.run)
                method = await _aresolve(ask.call)
                return await self._finished(partial(_call_inside, ask, method))
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


def _close(awaitable: Any) -> None:
    if inspect.iscoroutine(awaitable):
        awaitable.close()  # or Python warns that it was never awaited


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
