"""Calling a handler: who makes it, under which limits, and whose error comes out of it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from traceback import walk_tb
from types import MethodType
from typing import Any

from asgiref.sync import async_to_sync
from django.db import Error as DatabaseError
from msgspec.structs import replace

from django_saga.errors import left_open
from django_saga.exceptions import (
    CircuitOpen,
    InsideTransaction,
    InvalidDefinition,
    LeaseLost,
    SagaError,
    TransactionLeftOpen,
)
from django_saga.flow import Call, CallInside, HandlerRaised
from django_saga.steps import CircuitBreaker, CurrentStep, StepType, _current
from django_saga.storage.base import SagaStorage
from django_saga.texts import shown
from django_saga.timeouts import time_limit

logger = logging.getLogger("django_saga.calling")


def _made(ask: Call) -> Any:
    """The handler, from the container or just made; where that is async, what to await for it."""
    container = ask.run.saga.container
    maker = container.resolve if container is not None else ask.step.__init__
    if maker is object.__init__:
        maker = ask.step.__new__
    try:
        return make(ask.step) if container is None else maker(ask.step)
    except Exception as error:
        raise _raised_by(maker, error) from error


def make(step: StepType) -> Any:
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


def is_async(method: Callable[[Any], Any]) -> bool:
    if isinstance(method, MethodType):
        return _is_coroutine_function(method.__func__)
    return inspect.iscoroutinefunction(method)


_is_coroutine_function = lru_cache(maxsize=1024)(inspect.iscoroutinefunction)  # it is slow to tell


def resolve(ask: Call) -> Callable[[Any], Any]:
    handler = _made(ask)
    if inspect.isawaitable(handler):
        handler = async_to_sync(_awaited)(handler)
    return _method(ask, handler)


async def aresolve(ask: Call) -> Callable[[Any], Any]:
    handler = _made(ask)
    return _method(ask, await _awaited(handler) if inspect.isawaitable(handler) else handler)


def call(ask: Call) -> Any:
    method = resolve(ask)
    if not is_async(method):
        return call_outside(ask, method)
    try:
        return async_to_sync(call_async_handler)(ask, method)
    except HandlerRaised:
        raise
    except BaseException:
        # Interrupted here, the coroutine goes on in its own thread.
        ask.run.abandoned = True
        raise


def call_inside(ask: CallInside, method: Callable[[Any], Any]) -> Any:
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


def call_outside(ask: Call, method: Callable[[Any], Any]) -> Any:
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


def _close(awaitable: Any) -> None:
    if inspect.iscoroutine(awaitable):
        awaitable.close()  # or Python warns that it was never awaited
