"""The admin of failure groups: what went wrong, how often, and what to do about all of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_saga import groups, operations
from django_saga.admin import sites
from django_saga.admin.drawings import sparkline
from django_saga.admin.filters import DEALT_WITH
from django_saga.admin.formats import moment, name, span, status_badge
from django_saga.admin.rows import leaving_out, stored
from django_saga.counts import CAP
from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution, SagaFailureGroup, SagaPause, SagaStepRecord
from django_saga.operations.noting import MUTE_LIMIT, NOTE_LIMIT
from django_saga.operations.pausing import PERMISSION as PAUSE
from django_saga.verdicts import DatabaseNow, unsettled

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaFailureGroup]
else:
    _Admin = admin.ModelAdmin

TEMPLATES = "admin/django_saga/sagafailuregroup"
PER_PAGE = 25
LATEST = 20  # executions on the page of a group


def capped(number: int) -> str:
    """A count that was not taken beyond the cap."""
    return f"{CAP:,}+" if number > CAP else f"{number:,}"


@dataclass
class Shown:
    """A group as its page and the list show it."""

    seen: groups.Seen
    numbers: groups.Numbers
    url: str
    executions_url: str

    @property
    def group(self) -> SagaFailureGroup:
        return self.seen.group

    @property
    def title(self) -> SafeString:
        """Its error."""
        return name(self.group.error_type)

    @property
    def where(self) -> str:
        """What failed, in words."""
        words = {"saga": self.group.saga, "step": self.group.step}
        if not self.group.step:
            return _("between two steps of %(saga)s") % words
        if self.group.action == SagaStepRecord.Action.COMPENSATE:
            return _("while compensating %(step)s of %(saga)s") % words
        return _("in %(step)s of %(saga)s") % words

    @property
    def outcome_known(self) -> bool:
        """Whether it is known that the failed attempt had no effect."""
        return self.group.outcome == SagaStepRecord.Outcome.FAILED

    @property
    def outcome(self) -> str:
        """What is known of the failed attempt, in words."""
        undoing = self.group.action == SagaStepRecord.Action.COMPENSATE
        if self.outcome_known and undoing:
            return _("outcome known: the failed attempt undid nothing")
        if self.outcome_known:
            return _("outcome known: the failed attempt had no effect")
        if undoing:
            return _("outcome unknown: the failed attempt may have undone the step")
        return _("outcome unknown: the failed attempt may have had its effect")

    @property
    def next_action(self) -> str:
        return groups.next_action(self.group)

    @property
    def count(self) -> str:
        return capped(self.numbers.total)

    @property
    def last_hour(self) -> str:
        return capped(self.numbers.last_hour)

    @property
    def last_day(self) -> str:
        return capped(self.numbers.last_day)

    @property
    def sparkline(self) -> SafeString:
        return sparkline(self.numbers.hours, _("Failed executions by the hour of their start"))

    @property
    def first_seen(self) -> SafeString:
        known = (self.group.first_seen, self.seen.oldest, self.seen.newest)
        return self._ago(min(filter(None, known)))

    @property
    def last_seen(self) -> str:
        return self._ago(self.seen.newest) if self.seen.newest else ""

    @property
    def oldest(self) -> str:
        oldest = self.seen.oldest
        return moment(oldest, span(self.seen.now - oldest)) if oldest else ""

    @property
    def muted_for(self) -> str:
        until = self.group.muted_until
        return span(until - self.seen.now) if until and self.seen.muted else ""

    def _ago(self, at: Any) -> SafeString:
        ago = max(self.seen.now - at, timedelta())
        return moment(at, _("%(time)s ago") % {"time": span(ago)})


def show(
    site: admin.AdminSite, executions: QuerySet[SagaExecution], found: list[groups.Seen]
) -> list[Shown]:
    """These groups with their numbers; one query."""
    if not found:
        return []
    numbers = groups.numbers(executions, [each.group.pk for each in found], found[0].now)
    list_of = sites.address(site, sites.EXECUTIONS)
    return [
        Shown(
            each,
            numbers[each.group.pk],
            sites.address(site, "sagafailuregroup", "change", each.group.pk),
            f"{list_of}?group={each.group.pk}&status=all" if list_of else "",
        )
        for each in found
    ]


class GroupForm(forms.Form):
    """What can be changed about a group."""

    note = forms.CharField(
        label=gettext_lazy("Note"),
        required=False,
        max_length=NOTE_LIMIT,
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text=gettext_lazy("For whoever looks at this next."),
        show_hidden_initial=True,  # what was seen, so that only a change is saved
    )
    mute = forms.FloatField(
        label=gettext_lazy("Mute for hours"),
        required=False,
        min_value=0,
        max_value=MUTE_LIMIT,
        help_text=gettext_lazy(
            "At most 720, which is 30 days; it runs out by itself. 0 ends it, empty leaves it."
        ),
    )

    def clean_note(self) -> str:
        note: str = self.cleaned_data["note"]
        seen, now = self.data.get("initial-note"), self.initial["note"]
        if "note" not in self.changed_data:
            return now  # type: ignore[no-any-return]
        if seen is not None and seen.split() != now.split():
            raise forms.ValidationError(_("Somebody changed the note meanwhile; look again."))
        return note


@admin.register(SagaFailureGroup)
class SagaFailureGroupAdmin(_Admin):
    """Groups can be seen, noted and muted; none can be added or deleted."""

    class Media:
        css = {
            "all": [
                "django_saga/admin.css",
                "django_saga/drawings.css",
                "django_saga/console.css",
            ]
        }

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[SagaFailureGroup]:
        return stored(request, super().get_queryset(request))

    def executions(self, request: HttpRequest) -> QuerySet[SagaExecution]:
        """Those that may be counted for this user."""
        return sites.executions_of(self.admin_site, request)

    # The list

    @leaving_out
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """The groups with executions that nobody has dealt with, the latest first."""
        self._look_only(request)
        executions = self.executions(request)
        ids = groups.live(executions, groups.LIMIT + 1)
        found = groups.seen(self.get_queryset(request).filter(pk__in=ids), executions)
        open_groups = [each for each in found if not each.muted]
        page = _page(request, len(open_groups))
        chosen = open_groups[page * PER_PAGE : (page + 1) * PER_PAGE]
        muted = [each for each in found if each.muted][:PER_PAGE]
        shown = show(self.admin_site, executions, [*chosen, *muted])
        context = {
            **self._page_context(request, _("Failure groups")),
            "groups": shown[: len(chosen)],
            "muted": shown[len(chosen) :],
            "number": len(open_groups),
            "newer": page if page else None,
            "older": page + 2 if len(open_groups) > (page + 1) * PER_PAGE else None,
            "first": page * PER_PAGE + 1,
            "last": page * PER_PAGE + len(chosen),
            "limit": groups.LIMIT if len(ids) > groups.LIMIT else None,
            **(extra_context or {}),
        }
        return TemplateResponse(request, f"{TEMPLATES}/change_list.html", context)

    # One

    @leaving_out
    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """The page of one group; POST changes its note, or how long it is muted."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        executions = self.executions(request)
        seen: list[groups.Seen] = []
        if "\0" not in object_id:
            rows = self.get_queryset(request).filter(pk=object_id)
            seen = groups.look(rows, executions)
        # Its message and note may tell of executions that are not for this user.
        if not seen or (sites.are_some(executions) and seen[0].newest is None):
            raise Http404("There is no such failure group.")
        found = seen[0].group
        form = GroupForm(request.POST or None, initial={"note": found.note})
        if request.method == "POST" and form.is_valid():
            self._change(request, found, form.cleaned_data)
            return HttpResponseRedirect(request.get_full_path())
        context = {
            **self._page_context(request, str(found)),
            "original": found,
            "shown": show(self.admin_site, executions, seen)[0],
            **self._dealt_with(executions, found),
            "form": form if self.has_change_permission(request) else None,
            "note_only": found.note,
            **self._behind(request, executions, found),
            **self._pause(request, found),
            **(extra_context or {}),
        }
        return TemplateResponse(request, f"{TEMPLATES}/group.html", context)

    def _dealt_with(
        self, executions: QuerySet[SagaExecution], group: SagaFailureGroup
    ) -> dict[str, Any]:
        """How many of a group somebody has dealt with, and where these are."""
        number = groups.number_dealt_with(executions, group.pk)
        list_of = sites.address(self.admin_site, sites.EXECUTIONS)
        query = f"?group={group.pk}&status={DEALT_WITH}"
        return {
            "dealt_with": number,
            "dealt_with_shown": capped(number),
            "dealt_with_url": f"{list_of}{query}" if list_of else "",
        }

    def _behind(
        self, request: HttpRequest, executions: QuerySet[SagaExecution], group: SagaFailureGroup
    ) -> dict[str, Any]:
        """The latest executions of a group, what can be done to all of it, and the traceback."""
        if not sites.may_see(self.admin_site, request):
            return {"latest": None}
        rows = executions.filter(unsettled(), failure_group=group.pk).order_by("-created_at")
        verbs = sites.verbs_for(self.admin_site, request)
        for verb in verbs:
            rows = rows.annotate(**{f"{verb.name}_verdict": verb.verdict()})
        latest: Any = list(
            rows.only(
                "saga",
                "status",
                "created_at",
                "step",
                "failed_step",
                "error_message",
                "stuck_reason",
            ).annotate(now=DatabaseNow())[:LATEST]
        )
        for execution in latest:
            execution.said = execution.stuck_reason or execution.error_message
            execution.badge = status_badge(execution)
            execution.age = moment(execution.created_at, span(execution.now - execution.created_at))
            execution.url = sites.address(self.admin_site, sites.EXECUTIONS, "change", execution.pk)
        fit = [
            {"verb": verb, "url": self._many(verb.name, group)}
            for verb in verbs
            if any(getattr(each, f"{verb.name}_verdict") in verb.possible for each in latest)
        ]
        return {"latest": latest, "verbs": fit, "record": self._record(request, latest, group)}

    def _pause(self, request: HttpRequest, group: SagaFailureGroup) -> dict[str, Any]:
        """For who may: what holds its step up, or else where that can be paused."""
        if not request.user.has_perm(PAUSE):
            return {}
        rows = stored(request, SagaPause.objects.all()).filter(saga=group.saga)
        pause = rows.filter(step__in=["", group.step]).order_by("step").first()
        if pause is not None:
            url = sites.address(self.admin_site, "sagapause", "resume", pause.pk)
            return {"pause": pause, "resume_url": url}
        url = sites.address(self.admin_site, "sagapause", "pause")
        chosen = urlencode({"saga": group.saga, "step": group.step})
        return {"pause_url": f"{url}?{chosen}" if url else ""}

    def _many(self, verb: str, group: SagaFailureGroup) -> str:
        page = sites.address(self.admin_site, sites.EXECUTIONS, f"{verb}_many")
        return f"{page}?group={group.pk}&status=all"

    def _record(
        self, request: HttpRequest, latest: list[SagaExecution], group: SagaFailureGroup
    ) -> SagaStepRecord | None:
        """The failed attempt of the latest execution, with its traceback."""
        if not latest or not request.user.has_perm("django_saga.view_traceback_sagaexecution"):
            return None
        records = stored(request, SagaStepRecord.objects.filter(execution=latest[0]))
        here = records.filter(step=group.step, action=group.action)
        return here.exclude(outcome=SagaStepRecord.Outcome.DONE).order_by("-pk").first()

    def _change(self, request: HttpRequest, group: SagaFailureGroup, data: dict[str, Any]) -> None:
        """Do what the form asks for; each part checks the permission, and is audited."""
        asked: Any = {"user": request.user, "source": "admin"}
        told = []
        try:
            if data["note"] != group.note:
                operations.note(group.pk, data["note"], **asked)
                told.append(_("The note was saved."))
            if data["mute"] is not None:
                operations.mute(group.pk, data["mute"], **asked)
                words = {"hours": f"{data['mute']:g}"}
                muted = _("The group is muted for %(hours)s hours.") % words
                told.append(muted if data["mute"] else _("The group is not muted any more."))
        except SagaError as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        self.message_user(request, " ".join(told) or _("Nothing was changed."))

    def _look_only(self, request: HttpRequest) -> None:
        if not self.has_view_permission(request) or request.method not in ("GET", "HEAD"):
            raise PermissionDenied

    def _page_context(self, request: HttpRequest, title: str) -> dict[str, Any]:
        request.current_app = self.admin_site.name
        return {
            **self.admin_site.each_context(request),
            "title": title,
            "opts": self.opts,
            "media": self.media,
            "has_view_permission": True,
        }


def _page(request: HttpRequest, number: int) -> int:
    """Which page is asked for, from 0 up, as far as there are any."""
    asked = request.GET.get("p", "1")
    last = max(number - 1, 0) // PER_PAGE
    return (
        min(max(int(asked) - 1, 0), last)
        if asked.isascii() and asked.isdecimal() and len(asked) < 9
        else 0
    )
