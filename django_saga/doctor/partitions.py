"""The partitions by month, where the tables have any."""

from __future__ import annotations

from collections.abc import Iterator

from django.utils.translation import gettext as _

from django_saga.doctor.finding import Finding
from django_saga.partitions import is_partitioned, missing_months


def partitions() -> Iterator[Finding]:
    """Whether next month's executions have a partition of their own to go to."""
    if not is_partitioned():
        return
    missing = missing_months(1)
    if not missing:
        yield Finding("partitions", "ok", _("This month and the next have partitions."))
        return
    what = _("There is no partition for %(months)s: its executions go to the default one.")
    todo = _(
        "Run manage.py partition_sagas every day; a month that has begun without one stays so."
    )
    yield Finding("partitions", "warning", what % {"months": ", ".join(map(str, missing))}, todo)
