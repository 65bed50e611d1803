"""The partitions by month, where the tables have any."""

from __future__ import annotations

from collections.abc import Iterator

from django.utils import timezone
from django.utils.translation import gettext as _

from django_saga.doctor.finding import Finding
from django_saga.partitions import is_partitioned, limited, missing_months


def partitions() -> Iterator[Finding]:
    """Whether next month's executions have a partition of their own to go to."""
    if not is_partitioned():
        return
    if names := limited():
        what = _("%(sagas)s: the places that max_running gives cannot be kept apart in partitions.")
        todo = _("Drop max_running from them, or the partitions: more run at once than may.")
        yield Finding("partitions", "error", what % {"sagas": ", ".join(names)}, todo)
    # What this month lacks it gets no more, and does without.
    missing = [month for month in missing_months(1) if month.begin > timezone.now()]
    if not missing:
        yield Finding("partitions", "ok", _("The next month has its partitions."))
        return
    what = _("There is no partition for %(month)s: its executions will go to the default one.")
    todo = _("Run manage.py partition_sagas every day, before the month begins.")
    yield Finding("partitions", "warning", what % {"month": missing[0]}, todo)
