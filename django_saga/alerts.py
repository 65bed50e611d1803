"""Telling somebody: what is stuck, what could not be undone, failures in masses, late recovery.

Looked for by the sweeps of recovery, never by what drives a saga; each thing is told once, by the
key of its :class:`~django_saga.models.SagaAlert`. Nothing here ends a sweep: faults are logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from django.db import DatabaseError
from django.db.models import Case, Value, When
from django.urls import NoReverseMatch, reverse
from django.utils import timezone

from django_saga.conf import conf
from django_saga.counts import tally, utc_now
from django_saga.heartbeats import Lateness, beat, lateness
from django_saga.models import SagaAlert, SagaExecution, SagaFailureGroup
from django_saga.storage import DjangoSagaStorage
from django_saga.telling import Alert, deliver
from django_saga.texts import told, traced
from django_saga.verdicts import unsettled

logger = logging.getLogger("django_saga.alerts")

Status = SagaExecution.Status

STUCK, COMPENSATION_FAILED = "stuck", "compensation_failed"
FAILURES, RECOVERY_LATE = "failures", "recovery_late"

LOOKED_AT = 1_000  # of the newest executions in a status
AT_ONCE = 20  # alerts of one sweep; further ones are told by the next
QUIET = timedelta(hours=1)  # in which a group is not told of again


@contextmanager
def attended(*, whole: bool = True, every: float | None = None) -> Iterator[None]:
    """Surrounds a sweep of recovery: notes that it began, and tells what it and others left.

    ``whole``: the sweep is of every saga; ``every``: seconds until the next one.
    """
    if whole:
        tell_late(came_before=True)
        beat(every=every)
    yield
    look()


def tell_late(recovery: Lateness | None = None, *, came_before: bool = False) -> None:
    """Tell that recovery is late, once for each time that it is; never raises.

    ``came_before``: say nothing where it never came at all, as before the first sweep.
    """
    try:
        recovery = recovery or lateness()
        if not recovery.late or (came_before and recovery.at is None):
            return
        since = f"{recovery.at:%Y-%m-%d %H:%M:%S}" if recovery.at else ""
        key = f"{RECOVERY_LATE}:{since or 'never'}"
        last = f"it last ran at {since} UTC" if since else "it has never run"
        text = f"Recovery of sagas is late: {last}. Run recover_sagas."
        if key not in _told_here:
            page = _page("app_list", "django_saga")
            if _tell([Alert(key, RECOVERY_LATE, text, page)]):
                _told_here.add(key)
    except Exception as error:
        _log("That recovery is late could not be told", error)


_told_here: set[str] = set()  # so that a page that finds it late need not ask again


def look() -> None:
    """Tell what has come up since somebody last looked; bounded work, never raises."""
    try:
        executions = SagaExecution.objects.using(DjangoSagaStorage().alias)
        found = [*_stuck(executions), *_failures(executions)]
        _tell(_not_told(found))
    except Exception as error:
        _log("Alerts could not be looked for", error)


def _log(what: str, error: Exception) -> None:
    away = isinstance(error, DatabaseError)
    logger.error("%s: %s", what, told(error) if away else traced(error))


def _stuck(executions: Any) -> Iterator[Alert]:
    """One for each group of the newest stuck ones, about the newest in it."""
    rows = executions.filter(status=Status.STUCK).order_by("-created_at")
    columns = ("failure_group", "pk", "settled_at")
    newest: dict[str, list[str]] = {}
    for group_id, pk, settled_at in rows.values_list(*columns)[:LOOKED_AT]:
        if settled_at is None and group_id:
            newest.setdefault(group_id, []).append(str(pk))
    for group in _audible(newest):
        ids = newest[group.pk]
        failed = group.action == "compensate" and group.error_type != "SagaStuck"
        kind = COMPENSATION_FAILED if failed else STUCK
        many = f"{len(ids)} executions are" if len(ids) > 1 else f"Execution {ids[0]} is"
        what = f"the compensation of {group.step} failed" if failed else f"at {group.step}"
        text = f"{many} stuck, {what}: {_words(group)}"
        path = _group_page(group) if len(ids) > 1 else _page("sagaexecution_change", ids[0])
        yield Alert(f"{kind}:{group.pk}:{ids[0]}", kind, text, path, group, ids[0])


def _failures(executions: Any) -> Iterator[Alert]:
    """One for each group with more failures than the settings allow in so many minutes."""
    if not conf.ALERTS.get("FAILURES"):
        return
    most, minutes = conf.ALERTS["FAILURES"]
    since = utc_now() - timedelta(minutes=minutes)
    new = When(unsettled(), finished_at__gte=since, then=Value(1))
    parts = {
        status.value: executions.filter(status=status)
        .order_by("-created_at")
        .annotate(recent=Case(new, default=Value(0)))
        .values_list("failure_group", "recent")[: max(LOOKED_AT, most + 1)]
        for status in (Status.FAILED, Status.STUCK)
    }
    counts: dict[str, int] = {}
    for part in tally(parts, "failure_group", "recent").values():
        for (group_id, recent), number in part.items():
            if recent and group_id:
                counts[group_id] = counts.get(group_id, 0) + number
    hour = f"{utc_now():%Y-%m-%dT%H}"
    for group in _audible([id for id, number in counts.items() if number > most]):
        text = f"{counts[group.pk]} failures in {minutes:g} minutes: {_words(group)}"
        key = f"{FAILURES}:{group.pk}:{hour}"
        yield Alert(key, FAILURES, text, _group_page(group), group)


def _audible(ids: Iterable[str]) -> list[SagaFailureGroup]:
    """Those of the groups that nobody has muted."""
    rows = SagaFailureGroup.objects.using(DjangoSagaStorage().alias).filter(pk__in=list(ids))
    return list(rows.exclude(muted_until__gt=utc_now()).order_by("pk"))


def _words(group: SagaFailureGroup) -> str:
    said = f": {group.message}" if group.message else ""
    where = f"in {group.action} of {group.step}" if group.step else "between two steps"
    return f"{group.error_type} {where}, saga {group.saga}{said}"


def _group_page(group: SagaFailureGroup) -> str:
    return _page("sagafailuregroup_change", group.pk)


def _page(name: str, argument: str) -> str:
    name = f"admin:{name}" if name == "app_list" else f"admin:django_saga_{name}"
    try:
        return reverse(name, args=[argument])
    except NoReverseMatch:  # no admin, or not of these
        return ""


def _not_told(found: list[Alert]) -> list[Alert]:
    """Those that are new, of a kind and group that was not told of just now."""
    if not found:
        return []
    rows = SagaAlert.objects.using(DjangoSagaStorage().alias)
    known = set(rows.filter(pk__in=[alert.key for alert in found]).values_list("pk", flat=True))
    new = [alert for alert in found if alert.key not in known]
    if not new:
        return []
    lately = rows.filter(created_at__gt=timezone.now() - QUIET).values_list("pk", flat=True)
    subjects = {_subject(key) for key in lately}
    return [alert for alert in new if _subject(alert.key) not in subjects]


def _subject(key: str) -> str:
    """Kind and group, without what makes it the only one."""
    return key.rpartition(":")[0]


def _tell(alerts: list[Alert]) -> bool:
    """Tell those that nobody else tells; False where one could not be delivered, and is to be
    tried again next time."""
    rows = SagaAlert.objects.using(DjangoSagaStorage().alias)
    for alert in alerts[:AT_ONCE]:
        facts = {"kind": alert.kind, "text": alert.text, "path": alert.path}
        row, new = rows.get_or_create(key=alert.key, defaults=facts)
        if new and not deliver(alert):
            row.delete()
            return False  # a webhook that is away is not waited for again and again
    return True
