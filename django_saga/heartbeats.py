"""Whether recovery still comes by: each sweep leaves a note of when it began."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db import connections

from django_saga.conf import conf
from django_saga.flow import driver_name
from django_saga.models import SagaHeartbeat
from django_saga.storage import DjangoSagaStorage
from django_saga.texts import told
from django_saga.verdicts import DatabaseNow

logger = logging.getLogger("django_saga.recovery")

RECOVERY = "recovery"
MISSED = 3  # sweeps that may be missed before recovery is late


@dataclass(frozen=True)
class Lateness:
    """When recovery came last, by the database's clock."""

    at: datetime | None = None
    """When its latest sweep began; None: never."""
    age: timedelta | None = None
    """How long ago that is."""
    limit: timedelta = timedelta()
    """How long ago it may be."""
    driver: str = ""

    @property
    def late(self) -> bool:
        """Whether it never came, or not for too long."""
        return self.age is None or self.age > self.limit


def lateness(*, storage: DjangoSagaStorage | None = None) -> Lateness:
    """How recovery stands: one query."""
    alias = (storage or DjangoSagaStorage()).alias
    rows = SagaHeartbeat.objects.using(alias).filter(name=RECOVERY)
    beat = rows.annotate(now=DatabaseNow()).first()
    if beat is None:
        return Lateness(limit=_limit(None))
    return Lateness(beat.at, beat.now - beat.at, _limit(beat.every), beat.driver)


def _limit(every: float | None) -> timedelta:
    return timedelta(seconds=max(MISSED * (every or 0.0), conf.RECOVERY_LATE))


def beat(*, every: float | None = None, storage: DjangoSagaStorage | None = None) -> None:
    """Note that a sweep begins now; ``every``: seconds until the next one, where that is known.

    Never raises: a sweep is worth more than the note of it.
    """
    try:
        _upsert(every, (storage or DjangoSagaStorage()).alias)
    except Exception as error:
        logger.warning("When recovery ran could not be noted: %s", told(error))


def _upsert(every: float | None, alias: str) -> None:
    note = SagaHeartbeat(
        name=RECOVERY,
        at=DatabaseNow(),
        every=every,
        driver=driver_name()[:255],
    )
    # One that does not know when the next will be leaves what another has said.
    known = ["every"] if every is not None else []
    targeted = connections[alias].features.supports_update_conflicts_with_target
    SagaHeartbeat.objects.using(alias).bulk_create(
        [note],
        update_conflicts=True,
        update_fields=["at", "driver", *known],
        unique_fields=["name"] if targeted else None,
    )
