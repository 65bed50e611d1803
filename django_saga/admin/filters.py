"""The filters of the list. None asks the database for every value that there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR
from django.db.models import F, QuerySet
from django.http import HttpRequest, QueryDict
from django.utils.translation import gettext_lazy as _

from django_saga import registry
from django_saga.models import SagaExecution, SagaFailureGroup
from django_saga.verdicts import dealt_with, needs_attention, overdue, stands_at, unsettled

if TYPE_CHECKING:
    from django.contrib.admin.views.main import ChangeList

Executions = QuerySet[SagaExecution]
Status = SagaExecution.Status
OPEN = [
    ("open-STUCK", _("stuck, not dealt with")),
    ("open-FAILED", _("failed, not dealt with")),
]
DEALT_WITH = "dealt-with"
SAMPLE = 500  # of the newest failures, from which choices are taken


class StatusFilter(admin.SimpleListFilter):
    """Opens on what needs attention; all is one click away."""

    title = _("status")
    parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, Any]]:
        in_group = request.GET.get(GroupFilter.parameter_name)
        return [
            ("all", _("not dealt with") if in_group else _("all")),
            ("overdue", _("without a driver")),
            *OPEN,
            (DEALT_WITH, _("dealt with")),
            *((status.value, status.label) for status in reversed(Status)),
        ]

    @property
    def searches(self) -> bool:
        """Whether an id is searched for: that looks everywhere."""
        term = self.request.GET.get(SEARCH_VAR, "")
        return bool(term) and "\0" not in term  # which is no term to the list

    def queryset(self, request: HttpRequest, queryset: Executions) -> Executions:
        value = self.value()
        if value == "overdue":
            return queryset.filter(overdue())
        if value in dict(OPEN):
            return queryset.filter(unsettled(), status=value.removeprefix("open-"))
        if value == DEALT_WITH:
            return queryset.filter(dealt_with())
        if value in Status.values:
            return queryset.filter(status=value)
        if value is None and not self.searches:
            return queryset.filter(needs_attention())
        if value in (None, "all"):
            return queryset
        return queryset.none()  # a slip in an address is never all that there is

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        chosen = self.value() or ("all" if self.searches else None)
        yield {
            "selected": chosen is None,
            "query_string": changelist.get_query_string(remove=[self.parameter_name, SEARCH_VAR]),
            "display": _("needs attention"),
        }
        for value, title in self.lookup_choices:
            if value in {*dict(OPEN), DEALT_WITH} and value != chosen:
                continue  # the overview, or the page of a group, leads there
            yield {
                "selected": chosen == value,
                "query_string": changelist.get_query_string({self.parameter_name: value}),
                "display": title,
            }


class _ValueFilter(admin.SimpleListFilter):
    """One exact value of a column; one that is not among the choices can still be asked for."""

    column: Any

    def values(self, request: HttpRequest, model_admin: Any) -> set[str]:
        raise NotImplementedError

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        known = self.values(request, model_admin) | {self.value() or ""}
        return [(value, value) for value in sorted(known - {""})]

    def queryset(self, request: HttpRequest, queryset: Executions) -> Executions | None:
        value = self.value()
        if not value:
            return None
        if "\0" in value:  # PostgreSQL refuses to look for it
            return queryset.none()
        return queryset.alias(asked=self.column).filter(asked=value)


class SagaFilter(_ValueFilter):
    """By saga: those that the code defines, and those of recent failures."""

    title = _("saga")
    parameter_name = "saga"
    column = F("saga")

    def values(self, request: HttpRequest, model_admin: Any) -> set[str]:
        defined = {saga.name for saga in registry.all_sagas()}
        return defined | {saga for saga, error in recent_failures(request, model_admin)}

    def choices(self, changelist: ChangeList) -> Iterator[Any]:
        for choice in super().choices(changelist):
            # The steps are those of the saga: another one has others.
            yield {**choice, "query_string": without_step(choice["query_string"])}


class StepFilter(_ValueFilter):
    """By the step where it stands, or that failed; the choices are those of the chosen saga."""

    title = _("step")
    parameter_name = "step"
    column = stands_at()

    def values(self, request: HttpRequest, model_admin: Any) -> set[str]:
        chosen = request.GET.get("saga")
        sagas = [saga for saga in registry.all_sagas() if not chosen or saga.name == chosen]
        return {step for saga in sagas for step in saga.definition.steps}


class ErrorFilter(_ValueFilter):
    """By the type of the error that turned it back, out of recent failures."""

    title = _("error type")
    parameter_name = "error"
    column = F("error_type")

    def values(self, request: HttpRequest, model_admin: Any) -> set[str]:
        return {error for saga, error in recent_failures(request, model_admin)}


class GroupFilter(admin.SimpleListFilter):
    """By failure group: those of it that nobody has dealt with, unless the others are asked for."""

    title = _("failure group")
    parameter_name = "group"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        # Shown only while one is chosen: the way there is the page of the groups.
        value = self.value()
        if not value or "\0" in value:
            return [("", "")] if value else []
        rows = SagaFailureGroup.objects.using(model_admin.get_queryset(request).db)
        return [(value, str(rows.filter(pk=value).first() or value))]

    def queryset(self, request: HttpRequest, queryset: Executions) -> Executions | None:
        value = self.value()
        if not value:
            return None
        if "\0" in value:  # PostgreSQL refuses to look for it
            return queryset.none()
        asked = self.request.GET.get(StatusFilter.parameter_name)
        which = dealt_with() if asked == DEALT_WITH else unsettled()
        return queryset.filter(which, failure_group=value)


def without_step(query: str) -> str:
    """The query of another saga: it has other steps."""
    kept = QueryDict(query.removeprefix("?"), mutable=True)
    kept.pop(StepFilter.parameter_name, None)
    return f"?{kept.urlencode()}"


def recent_failures(request: HttpRequest, model_admin: Any) -> set[tuple[str, str]]:
    """Saga and error type of the newest failures; read once per request."""
    found: set[tuple[str, str]] | None = getattr(request, "_saga_recent_failures", None)
    if found is None:
        rows = model_admin.get_queryset(request).filter(status__in=[Status.FAILED, Status.STUCK])
        newest = rows.order_by("-created_at").values_list("saga", "error_type")[:SAMPLE]
        found = set(newest)
        request._saga_recent_failures = found  # type: ignore[attr-defined]
    return found
