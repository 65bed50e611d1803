"""The admin of executions: the list, the page of one, and the ways to act on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import BadRequest, PermissionDenied, ValidationError
from django.db import DataError
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from django_saga.admin import detail, verbs
from django_saga.admin.addresses import uuid_of
from django_saga.admin.changelist import ExecutionChangeList, by_filter
from django_saga.admin.confirming import Confirming, action_of
from django_saga.admin.exporting import Exporting
from django_saga.admin.filters import (
    ErrorFilter,
    GroupFilter,
    SagaFilter,
    StatusFilter,
    StepFilter,
)
from django_saga.admin.formats import badge, moment, name, span, status_badge
from django_saga.admin.jobs import find_job, has_jobs
from django_saga.admin.keyed import query_of_all_pages
from django_saga.admin.rows import leaving_out, stored
from django_saga.admin.views import outside_transactions
from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution
from django_saga.operations import BULK, VERBS, view_context
from django_saga.texts import told
from django_saga.verdicts import DatabaseNow

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaExecution]
else:
    _Admin = admin.ModelAdmin

TEMPLATES = "admin/django_saga/sagaexecution"


@admin.register(SagaExecution)
class SagaExecutionAdmin(Exporting, Confirming, _Admin):
    """Executions can be seen, retried and recovered; none can be added, edited or deleted."""

    list_display = ("status_shown", "saga_shown", "step_shown", "error_shown", "age", "took")
    list_display_links = ("saga_shown",)
    list_filter = (StatusFilter, GroupFilter, SagaFilter, StepFilter, ErrorFilter)
    list_per_page = 50
    list_max_show_all = 0
    search_fields = ("pk",)
    search_help_text = _("The whole id of an execution; it is looked for in all of them.")
    ordering = ("-created_at",)
    sortable_by = ()
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = tuple(action_of(verb) for verb in BULK.values())

    class Media:
        css = {"all": ["django_saga/admin.css", "django_saga/drawings.css"]}

    # Nothing changes but through the verbs

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    # The list

    def get_queryset(self, request: HttpRequest) -> QuerySet[SagaExecution]:
        return stored(request, super().get_queryset(request))

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        return by_filter(self, lookup)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> Any:
        return ExecutionChangeList

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[SagaExecution], search_term: str
    ) -> tuple[QuerySet[SagaExecution], bool]:
        if not search_term:
            return queryset, False
        saga_id = uuid_of(search_term)
        return (queryset.filter(pk=saga_id) if saga_id else queryset.none()), False

    @leaving_out
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        ways = {"verbs": self.offered(request, query_of_all_pages(request))}
        try:
            return super().changelist_view(request, {**(extra_context or {}), **ways})
        except ValidationError:
            raise BadRequest("What is selected is no id of an execution.") from None

    @admin.display(description=_("status"))
    def status_shown(self, execution: SagaExecution) -> SafeString:
        return format_html_join(" ", "{}", ((part,) for part in _status(execution)))

    @admin.display(description=_("saga"))
    def saga_shown(self, execution: SagaExecution) -> SafeString:
        # Whole, as the search takes it: the beginning may be a time, and no index knows the end.
        id = execution.pk
        return format_html('{} <span class="saga-id">{}</span>', name(execution.saga), id)

    @admin.display(description=_("step"))
    def step_shown(self, execution: SagaExecution) -> str:
        step = name(execution.step or execution.failed_step)
        if not step or not execution.is_active:
            return step
        where = f"{execution.action}, {execution.attempt}."
        return format_html('{} <span class="saga-small">{}</span>', step, where)

    @admin.display(description=_("error type"))
    def error_shown(self, execution: SagaExecution) -> str:
        return name(execution.error_type)

    @admin.display(description=_("age"))
    def age(self, execution: SagaExecution) -> SafeString:
        now = execution.db_now  # type: ignore[attr-defined]
        return moment(execution.created_at, span(now - execution.created_at))

    @admin.display(description=_("duration"))
    def took(self, execution: SagaExecution) -> str:
        return span(execution.duration) if execution.finished_at else ""

    # One

    @leaving_out
    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """The page of one execution; it has no form, and takes no POST."""
        if not self.has_view_permission(request) or request.method not in ("GET", "HEAD"):
            raise PermissionDenied
        return self._page(request, uuid_of(object_id), extra_context)

    def context_view(self, request: HttpRequest, saga_id: UUID) -> HttpResponse:
        """The same page with its contexts unmasked: takes a POST, as it leaves an audit entry."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        page = self.url_of("change", saga_id=saga_id)
        if request.method != "POST":
            return HttpResponseRedirect(f"{page}#context")
        if not self.get_queryset(request).filter(pk=saga_id).exists():
            raise Http404("There is no such execution.")
        try:
            view_context(saga_id, user=request.user, source="admin")
        except SagaError as error:
            self.message_user(request, str(error), messages.ERROR)
            return HttpResponseRedirect(page)
        return self._page(request, saga_id, masked=False)

    def _page(
        self,
        request: HttpRequest,
        saga_id: UUID | None,
        extra_context: dict[str, Any] | None = None,
        *,
        masked: bool = True,
    ) -> HttpResponse:
        rows = self.get_queryset(request)
        one = verbs.annotated(rows.filter(pk__in=[saga_id])).annotate(db_now=DatabaseNow())
        unreadable = ""
        try:
            execution = one.first()
        except DataError as error:
            execution = rows.filter(pk__in=[saga_id]).only("pk", "saga").first()
            unreadable = detail.spoilt(error)
        if execution is None:
            raise Http404("There is no such execution.")
        if unreadable := unreadable or detail.unreadable(execution):
            context = self.page_context(request, execution.saga)
            context |= {"original": execution, "unreadable": unreadable}
            return TemplateResponse(request, f"{TEMPLATES}/detail.html", context)
        context = {
            **self.page_context(request, execution.saga),
            **detail.context_of(request, execution, rows, masked=masked),
            **verbs.buttons(self, request, execution),
            "original": execution,
            "job_url": self.url_of("job", saga_id=execution.pk) if has_jobs() else "",
            "context_url": self.url_of("context", saga_id=execution.pk),
            **(extra_context or {}),
        }
        return TemplateResponse(request, f"{TEMPLATES}/detail.html", context)

    def job_view(self, request: HttpRequest, saga_id: UUID) -> HttpResponse:
        """Leads on to the execution's RQ job, while Redis holds one."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        if not has_jobs():
            raise Http404("Executions are not handed to RQ.")
        if not self.get_queryset(request).filter(pk=saga_id).exists():
            raise Http404("There is no such execution.")
        try:
            page = find_job(saga_id)
            none = _(
                "No job of this execution was found: ended ones leave Redis soon, and of many "
                "jobs not all are looked at."
            )
            why = str(none)
        except Exception as error:  # whatever Redis, or the way to it, raises
            page, why = "", str(_("Redis does not answer: %(error)s") % {"error": told(error)})
        if not page:
            self.message_user(request, why, messages.WARNING)
        return HttpResponseRedirect(page or self.url_of("change", saga_id=saga_id))

    def get_urls(self) -> list[URLPattern]:
        wrap = partial(outside_transactions, self.admin_site)
        base = f"{self.opts.app_label}_{self.opts.model_name}"
        ours = [
            path("<uuid:saga_id>/job/", wrap(self.job_view), name=f"{base}_job"),
            path("<uuid:saga_id>/context/", wrap(self.context_view), name=f"{base}_context"),
            path("export/", wrap(self.export_view), name=f"{base}_export"),
        ]
        for verb in VERBS.values():
            view = wrap(partial(verbs.verb_view, self, verb=verb))

            ours.append(path(f"<uuid:saga_id>/{verb.name}/", view, name=f"{base}_{verb.name}"))
        for verb in BULK.values():
            view = wrap(partial(self.many_view, verb=verb))
            ours.append(path(f"{verb.name}/", view, name=f"{base}_{verb.name}_many"))
        return ours + super().get_urls()


def _status(execution: Any) -> Iterator[SafeString]:
    """Its status, and what else keeps it from going on or will end it."""
    yield status_badge(execution)
    if not execution.is_active:
        return
    lease, wake, now = execution.lease_until, execution.wake_at, execution.db_now
    if lease is not None and lease <= now:
        yield badge("lost", _("driver lost"))
    if execution.is_paused:
        yield badge("paused", _("paused"))
    if execution.cancel_reason and execution.status != SagaExecution.Status.COMPENSATING:
        yield badge("cancelled", _("to be cancelled"))
    if wake is not None and wake > now:
        wait = _("next attempt in %(time)s") % {"time": span(wake - now)}
        yield format_html('<span class="saga-small">{}</span>', wait)
