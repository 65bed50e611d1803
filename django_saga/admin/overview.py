"""The overview: what needs somebody now, and how the sagas stand. Every read is bounded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.contrib.admin.sites import AdminSite, all_sites
from django.db import DataError
from django.db.models import Case, CharField, IntegerField, Q, QuerySet, Value, When
from django.http import HttpRequest
from django.utils.translation import gettext as _

from django_saga import groups
from django_saga.admin import sites
from django_saga.admin.drawings import sparkline
from django_saga.admin.formats import badge, last_run, moment, name, span
from django_saga.admin.groups import Shown, show
from django_saga.admin.jobs import queues
from django_saga.admin.rows import leave_out, stored
from django_saga.admin.tempo import tempo
from django_saga.alerts import tell_late
from django_saga.counts import CAP, HOURS, by_hour, hours_ago, tally, utc_now
from django_saga.heartbeats import lateness
from django_saga.machine import ACTIVE
from django_saga.models import SagaBatch, SagaExecution, SagaFailureGroup, SagaPause
from django_saga.verdicts import overdue, unsettled

Executions = QuerySet[SagaExecution]
Status = SagaExecution.Status

HOURLY = 1_000  # executions of one hour that are looked at
GROUPS = 5  # that are shown
PAUSES = 50


def overview_of(request: HttpRequest) -> dict[str, Any] | None:
    """What the page shows to this user; None where they may not see executions."""
    site = next((s for s in all_sites if s.name == getattr(request, "current_app", None)), None)
    if site is None or not sites.may_see(site, request):
        return None
    try:
        return _overview(site, request)
    except DataError as error:
        unreadable = leave_out(request, error)
        return {"unreadable": unreadable, **_overview(site, request)}


def _overview(site: AdminSite, request: HttpRequest) -> dict[str, Any]:
    executions, now = sites.executions_of(site, request), utc_now()
    paused = stored(request, SagaPause.objects.all())
    numbers = Numbers.of(executions, now)
    to = _Links(site)
    recovery = lateness()
    tell_late(recovery)  # sweeps that do not come cannot say so
    return {
        "first": _first(numbers, to),
        "recovery": last_run(recovery),
        "late": recovery.late,
        "groups": _groups(site, request, executions),
        "groups_url": to.groups if sites.may_see(site, request, SagaFailureGroup) else "",
        "statuses": _statuses(numbers, to),
        "oldest": _oldest(site, executions, now),
        "pauses": list(paused[: PAUSES + 1]),
        "pauses_url": sites.address(site, "sagapause"),
        "batches": numbers.batches,
        "batches_url": sites.address(site, "sagabatch"),
        "queues": queues(),
        "tempo": tempo(executions, now, to.steps),
    }


class _Links:
    def __init__(self, site: AdminSite) -> None:
        self.list = sites.address(site, sites.EXECUTIONS)
        self.groups = sites.address(site, "sagafailuregroup")

    def status(self, status: str) -> str:
        """The executions in this status, or of this choice of the filter."""
        return f"{self.list}?{urlencode({'status': status})}"

    def steps(self, saga: str, step: str) -> str:
        """What needs attention at this step."""
        return f"{self.list}?{urlencode({'saga': saga, 'step': step})}"


@dataclass
class Numbers:
    """Counts of what is looked at: the oldest that are active, the newest that ended badly, the
    newest of each hour."""

    statuses: Counter[str]
    hours: dict[str, list[int]]
    """By status, of the latest 24 hours, the oldest first."""
    open: Counter[str]
    """By status: those that nobody has dealt with."""
    lost: int
    """Whose lease ran out."""
    undriven: int
    """Those and the ones that nobody has begun, or gone on with."""
    more: set[str]
    """Statuses of which there are more than were looked at."""
    batches: int

    @classmethod
    def of(cls, executions: Executions, now: datetime) -> Numbers:
        """Count; one query."""
        counts = tally(_parts(executions, now), "status", "flag", "ago")
        batches = counts.pop("batches").total()
        active, by_hours = counts["active"], Counter[tuple[Any, ...]]()
        for hour in range(HOURS):
            by_hours += counts[str(hour)]
        everything: dict[str, Counter[tuple[Any, ...]]] = {
            **{status.value: active for status in ACTIVE},
            **{status: counts[status] for status in (Status.FAILED, Status.STUCK)},
            Status.COMPLETED: by_hours,
        }
        more = {status for status, part in everything.items() if part.total() > CAP}
        if any(counts[str(hour)].total() >= HOURLY for hour in range(HOURS)):
            more.add(Status.COMPLETED)
        else:
            more.discard(Status.COMPLETED)
        return cls(
            statuses=Counter({s: _sum(part, status=s) for s, part in everything.items()}),
            hours={s: _hours(part, s) for s, part in everything.items()},
            open=Counter(
                {s: _sum(everything[s], s, "open") for s in (Status.FAILED, Status.STUCK)}
            ),
            lost=_sum(active, flag="lost"),
            undriven=_sum(active, flag="lost") + _sum(active, flag="overdue"),
            more=more,
            batches=batches,
        )

    def shown(self, status: str, number: int | None = None) -> str:
        """A count, with a plus where there are more than were looked at."""
        count = self.statuses[status] if number is None else number
        return f"{min(count, CAP):,}+" if status in self.more else f"{count:,}"


def _parts(executions: Executions, now: datetime) -> dict[str, QuerySet[Any, Any]]:
    def part(rows: QuerySet[Any], most: int, flag: Any = None, ago: Any = None) -> Any:
        nothing = Value("", output_field=CharField())
        given = {"flag": flag or nothing, "ago": Value(-1) if ago is None else ago}
        return rows.annotate(**given).values_list("status", "flag", "ago")[:most]

    def ended(status: Status) -> Any:
        rows = executions.filter(status=status).order_by("-created_at")
        return part(rows, CAP + 1, _flag(open=unsettled()), hours_ago(now))

    active = executions.filter(status__in=[status.value for status in ACTIVE])
    flag = _flag(lost=overdue() & Q(lease_until__isnull=False), overdue=overdue())
    hours = {str(hour): _begun(executions, now, hour) for hour in range(HOURS)}
    running = SagaBatch.objects.using(executions.db).filter(status=SagaBatch.Status.RUNNING)
    return {
        "active": part(active.order_by("created_at"), CAP + 1, flag, hours_ago(now)),
        "FAILED": ended(Status.FAILED),
        "STUCK": ended(Status.STUCK),
        **{
            hour: part(rows, HOURLY, ago=Value(int(hour), output_field=IntegerField()))
            for hour, rows in hours.items()
        },
        "batches": part(running.order_by("created_at"), CAP + 1),
    }


def _begun(executions: Executions, now: datetime, ago: int) -> Executions:
    rows = executions.filter(created_at__gt=now - timedelta(hours=ago + 1))
    if ago:
        rows = rows.filter(created_at__lte=now - timedelta(hours=ago))
    return rows.order_by("-created_at")


def _flag(**flags: Q) -> Case:
    whens = [When(condition, then=Value(flag)) for flag, condition in flags.items()]
    return Case(*whens, default=Value(""), output_field=CharField())


def _sum(counts: Counter[tuple[Any, ...]], status: str = "", flag: str = "") -> int:
    return sum(
        number
        for (of, flagged, _ago), number in counts.items()
        if status in ("", of) and flag in ("", flagged)
    )


def _hours(counts: Counter[tuple[Any, ...]], status: str) -> list[int]:
    hours = Counter[int]()
    for (of, _flag, ago), number in counts.items():
        if of == status:
            hours[ago] += number
    return by_hour(hours)


def _first(numbers: Numbers, to: _Links) -> list[dict[str, Any]]:
    """What somebody must look at, the worst first."""
    cards = [
        (_("Stuck"), Status.STUCK, numbers.open[Status.STUCK], "open-STUCK", "stuck"),
        (
            _("Failed, not dealt with"),
            Status.FAILED,
            numbers.open[Status.FAILED],
            "open-FAILED",
            "",
        ),
        (_("Without a driver"), Status.RUNNING, numbers.undriven, "overdue", "stuck"),
        (_("Expired leases"), Status.RUNNING, numbers.lost, "overdue", "stuck"),
    ]
    return [
        {
            "label": label,
            "number": numbers.shown(status, number),
            "url": to.status(choice),
            "kind": (kind or "failed") if number else "none",
        }
        for label, status, number, choice, kind in cards
    ]


def _statuses(numbers: Numbers, to: _Links) -> list[dict[str, Any]]:
    order = (*reversed(Status), Status.PENDING)
    return [
        {
            "badge": badge(status, status.label),
            "number": numbers.shown(status),
            "url": to.status(status),
            "recent": status == Status.COMPLETED,
            "sparkline": sparkline(
                numbers.hours[status],
                _("%(status)s, by the hour of their start") % {"status": status.label},
            ),
        }
        for status in dict.fromkeys(order)
    ]


def _oldest(site: AdminSite, executions: Executions, now: datetime) -> dict[str, Any] | None:
    """The oldest that has not ended."""
    active = executions.filter(status__in=[status.value for status in ACTIVE])
    found = active.only("saga", "status", "created_at").order_by("created_at").first()
    if found is None:
        return None
    return {
        "saga": name(found.saga),
        "age": moment(found.created_at, span(now - found.created_at)),
        "url": sites.address(site, sites.EXECUTIONS, "change", found.pk),
    }


def _groups(site: AdminSite, request: HttpRequest, executions: Executions) -> list[Shown]:
    """The groups that were seen last, but for the muted."""
    if not sites.may_see(site, request, SagaFailureGroup):
        return []
    rows = site.get_model_admin(SagaFailureGroup).get_queryset(request)
    ids = groups.live(executions)
    found = groups.seen(rows.filter(pk__in=ids), executions) if ids else []
    return show(site, executions, [each for each in found if not each.muted][:GROUPS])
