"""What operators write to a failure group: a note, and a mute that runs out by itself."""

from __future__ import annotations

from datetime import timedelta
from typing import Unpack

from django_saga.exceptions import SagaError
from django_saga.masking import mask_text
from django_saga.models import SagaFailureGroup
from django_saga.operations.asking import Asked, audited
from django_saga.storage import DjangoSagaStorage
from django_saga.texts import storable
from django_saga.verdicts import DatabaseNow

PERMISSION = "django_saga.change_sagafailuregroup"
NOTE_LIMIT = 5_000  # characters
MUTE_LIMIT = 720  # hours: 30 days


def note(group_id: str, text: str, **asked: Unpack[Asked]) -> SagaFailureGroup:
    """Write a note to a failure group, for whoever looks at it next, in the place of the last one.

    Raises PermissionDenied where a given user lacks ``change_sagafailuregroup``, SagaError for a
    group that there is not and for a note that is too long.
    """
    with audited("note", PERMISSION, asked) as (entry, storage):
        group = _group(group_id, storage)
        entry.saga, entry.step = group.saga, group.step
        if len(text) > NOTE_LIMIT:
            raise SagaError(f"A note has up to {NOTE_LIMIT} characters.")
        group.note = storable(mask_text(text))
        group.save(using=storage.alias, update_fields=["note"])
        entry.detail = f"Group {group.pk}: {group.note or 'no note'}"
    return group


def mute(group_id: str, hours: float, **asked: Unpack[Asked]) -> SagaFailureGroup:
    """Tell nobody of this group for so many hours, at most 30 days; 0 ends that now.

    Raises PermissionDenied where a given user lacks ``change_sagafailuregroup``, SagaError for a
    group that there is not and for another number of hours.
    """
    with audited("mute" if hours else "unmute", PERMISSION, asked) as (entry, storage):
        group = _group(group_id, storage)
        entry.saga, entry.step = group.saga, group.step
        if not 0 <= hours <= MUTE_LIMIT:
            raise SagaError(f"A group is muted for 0 to {MUTE_LIMIT} hours.")
        until = group.now + timedelta(hours=hours)  # type: ignore[attr-defined]
        group.muted_until = until if hours else None
        group.save(using=storage.alias, update_fields=["muted_until"])
        entry.detail = f"Group {group.pk}" + (
            f" until {until:%Y-%m-%d %H:%M} UTC." if hours else "."
        )
    return group


def _group(group_id: str, storage: DjangoSagaStorage) -> SagaFailureGroup:
    rows = SagaFailureGroup.objects.using(storage.alias)
    group = rows.annotate(now=DatabaseNow()).filter(pk=storable(group_id)).first()
    if group is None:
        raise SagaError(f"There is no failure group {group_id}.")
    return group
