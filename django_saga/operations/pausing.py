"""Pausing a saga, or one step of it: the first thing to do when a service is down."""

from __future__ import annotations

from typing import Unpack

from django_saga import registry
from django_saga.exceptions import SagaError, UnknownSaga
from django_saga.models import SagaExecution, SagaPause
from django_saga.operations.asking import Asked, audited, reason_of, who
from django_saga.texts import storable

PERMISSION = "django_saga.pause_sagaexecution"


def pause(saga: str, step: str = "", **asked: Unpack[Asked]) -> SagaPause:
    """Let nothing more of this saga begin, or of this step of it; acts and compensations alike.

    What is in a handler finishes it, and waits then; so does what is started meanwhile. Raises
    PermissionDenied where a given user lacks ``pause_sagaexecution``, SagaError for a saga or a
    step that there is not, and for what is paused already.
    """
    saga, step = storable(saga), storable(step)
    with audited("pause", PERMISSION, asked, saga=saga, step=step) as (_, storage):
        _refuse_unknown(saga, step, storage.alias)
        rows = SagaPause.objects.using(storage.alias)
        facts = {"reason": reason_of(asked), "user_name": who(asked)[:255]}
        pause, made = rows.get_or_create(saga=saga, step=step, defaults=facts)
        if not made:
            since = f"{pause.created_at:%Y-%m-%d %H:%M:%S} UTC by {pause.user_name}"
            raise SagaError(f"Saga {pause} is paused already, since {since}.")
    return pause


def resume(saga: str, step: str = "", **asked: Unpack[Asked]) -> None:
    """End a pause; what waits for that goes on with the next sweep of recovery.

    Raises PermissionDenied as :func:`pause` does, and SagaError where there is none.
    """
    saga, step = storable(saga), storable(step)
    with audited("resume", PERMISSION, asked, saga=saga, step=step) as (_, storage):
        pauses = SagaPause.objects.using(storage.alias).filter(saga=saga, step=step)
        if not pauses.delete()[0]:
            raise SagaError(f"Saga {saga} {step}".strip() + " is not paused.")


def _refuse_unknown(saga: str, step: str, alias: str) -> None:
    try:
        steps = set(registry.find_saga(saga).definition.steps)
    except UnknownSaga:
        rows = SagaExecution.objects.using(alias)
        if not rows.filter(saga=saga).exists():
            raise SagaError(f"No saga is named {saga!r}.") from None
        return  # the code has lost it; its executions are still there
    if step and step not in steps:
        raise SagaError(f"Saga {saga} has no step {step!r}; it has {', '.join(sorted(steps))}.")
