"""What addresses hold, as far as it is what it should be: anybody can write one."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from django.conf import settings
from django.utils.dateparse import parse_datetime
from django.utils.timezone import is_aware


def number_of(text: str) -> int | None:
    """A whole number that every database takes, or None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def uuid_of(text: str) -> UUID | None:
    """An id, or None."""
    try:
        return UUID(text.strip())
    except ValueError:
        return None


def moment_of(text: str) -> datetime | None:
    """A time as the storage's times are stored, or None."""
    try:
        moment = parse_datetime(text)
    except ValueError:
        return None
    # Those at the ends may have no place in another time zone.
    if moment is None or is_aware(moment) is not settings.USE_TZ or not 1 < moment.year < 9999:
        return None
    return moment.astimezone(UTC) if settings.USE_TZ else moment
