"""Limits of how many executions of a saga run at once.

An execution of a saga with ``max_running`` has a ``limit_key``; while it runs it also has a place,
a number of which each exists once for a saga and key. That is a constraint of the database: of two
that take the same number at once one fails, and takes another. It begins only with a place, and
gives it back in the very checkpoint that ends it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from django_saga.exceptions import SagaError
from django_saga.texts import shown, storable, told

if TYPE_CHECKING:
    from django_saga.saga import Saga

logger = logging.getLogger("django_saga.limits")

LONGEST = 255  # characters of a key
AT_ONCE = 10  # executions that one which ends hands on to, where as many places are free


def key_of(saga: Saga[Any], context: Any) -> str | None:
    """What counts together with this context; None for a saga without a limit."""
    if saga.max_running is None:
        return None
    try:
        key: object = saga.limit_key(context)
    except Exception as error:
        raise SagaError(f"limit_key() of {saga.name} failed: {told(error)}") from error
    if not isinstance(key, str) or len(key) > LONGEST or key != storable(key):
        raise SagaError(
            f"limit_key() of {saga.name} must return a text of up to {LONGEST} characters, "
            f"not {shown(key)}."
        )
    return key


def reached(saga: str, key: str, running: int, most: int) -> str:
    """How many run, in the words of errors; a key may tell what a context holds."""
    alike = " with its limit_key" if key else ""
    return f"{running} of {most} of {saga}{alike} are running"


def hand_on(saga: Saga[Any], key: str) -> None:
    """Have the backend drive those that waited longest for the places that are free now."""
    if not saga.backend.queues:
        return  # what it drove here it would drive within the one that ends; recovery does it
    try:
        waiting = saga.storage.next_waiting(saga.name, key, AT_ONCE)
    except SagaError as error:
        logger.warning("Saga %s: recovery finds what waits for a place: %s", saga.name, told(error))
        return
    for saga_id in waiting:
        saga.backend.hand_over(saga, saga_id, 0.0)
