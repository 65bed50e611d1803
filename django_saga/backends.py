"""Where executions are driven that their caller does not drive."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.utils.module_loading import import_string

from django_saga.conf import conf
from django_saga.exceptions import InvalidSettings, SagaLimitReached, SagaPaused
from django_saga.texts import told

if TYPE_CHECKING:
    from django_saga.saga import Saga

logger = logging.getLogger("django_saga.backends")

NAMES = {
    "inprocess": "django_saga.backends.InProcessBackend",
    "rq": "django_saga.rq.RQBackend",
}


WAITS = (SagaPaused, SagaLimitReached)  # it goes on by itself once it may


class Backend(ABC):
    """Has executions driven; a hint that may get lost, since recovery finds what is due."""

    queues: bool = True
    """Whether others drive what is handed over; recovery then hands over too."""

    def grace(self, delay: float) -> float | None:
        """Seconds for which recovery leaves an execution alone that is handed over with a delay."""
        return delay + conf.LEASE

    def hand_over(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        """Have it driven in ``delay`` seconds; a fault is logged, recovery makes up for it."""
        try:
            self.send(saga, saga_id, delay)
        except WAITS as waits:
            logger.info("%s", waits, extra={"saga": saga.name, "execution": str(saga_id)})
        except Exception as error:
            logger.warning(
                "Saga %s %s could not be handed over, recovery will find it: %s",
                saga.name,
                saga_id,
                told(error),
                extra={"saga": saga.name, "execution": str(saga_id)},
            )

    def hand_over_many(self, saga: Saga[Any], saga_ids: Sequence[UUID]) -> None:
        """Have all of them driven; a fault is logged, recovery makes up for it."""
        try:
            self.send_many(saga, saga_ids)
        except Exception as error:
            logger.warning(
                "Saga %s: %s executions could not be handed over, recovery will find them: %s",
                saga.name,
                len(saga_ids),
                told(error),
                extra={"saga": saga.name},
            )

    @abstractmethod
    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        """Tell whoever drives; may raise."""

    def send_many(self, saga: Saga[Any], saga_ids: Sequence[UUID]) -> None:
        """Tell of many at once; may raise. By default each is sent, up to one that cannot be."""
        for saga_id in saga_ids:
            self.send(saga, saga_id, 0.0)

    def send_batch(self, batch_id: UUID) -> None:  # noqa: B027
        """Tell a worker to work on a batch; may raise. By default ``recover_sagas`` alone does."""


class InProcessBackend(Backend):
    """Drives at once, where it was called; what has to wait is left to ``recover_sagas``."""

    queues = False

    def grace(self, delay: float) -> float | None:
        return None

    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        from django_saga.drivers import drive
        from django_saga.engine import resume_and_go_on

        if delay <= 0:
            drive(resume_and_go_on(saga, saga_id))

    def send_many(self, saga: Saga[Any], saga_ids: Sequence[UUID]) -> None:
        for saga_id in saga_ids:
            self.hand_over(saga, saga_id, 0.0)  # each isolated from the others


@lru_cache(maxsize=8)
def _backend(name: str) -> Backend:
    try:
        backend = import_string(NAMES.get(name, name))()
    except (ImportError, TypeError) as error:
        raise InvalidSettings(
            f"DJANGO_SAGA['BACKEND'] {name!r} cannot be used: {error}. "
            "It is 'inprocess', 'rq' or the dotted path of a backend class."
        ) from error
    if not isinstance(backend, Backend):
        raise InvalidSettings(f"DJANGO_SAGA['BACKEND'] {name!r} is no django_saga backend.")
    return backend


def get_backend() -> Backend:
    """The backend of the settings."""
    if not isinstance(conf.BACKEND, str):
        raise InvalidSettings(f"DJANGO_SAGA['BACKEND'] must be a text, not {conf.BACKEND!r}.")
    return _backend(conf.BACKEND)
