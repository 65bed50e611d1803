"""The admin of the audit: what was asked, by whom and why. It can be read, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from django_saga.admin import sites
from django_saga.admin.addresses import number_of, uuid_of
from django_saga.admin.changelist import by_filter
from django_saga.admin.formats import badge, name
from django_saga.admin.keyed import KeyedChangeList
from django_saga.admin.rows import leaving_out, stored
from django_saga.models import SagaAuditEntry
from django_saga.operations import VERBS
from django_saga.operations.viewing import PERMISSION as VIEW_CONTEXT

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaAuditEntry]
else:
    _Admin = admin.ModelAdmin

Entries = QuerySet[SagaAuditEntry]
SAMPLE = 500  # of the newest entries, from which choices are taken
TEMPLATES = "admin/django_saga/sagaauditentry"


class _RecentFilter(admin.SimpleListFilter):
    """One exact value of a column, out of those that are known and those of recent entries."""

    parameter_name: Any
    known: Iterable[str] = ()

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        recent = {entry[self.parameter_name] for entry in recent_entries(request, model_admin)}
        values = {*self.known, *recent, self.value() or ""} - {""}
        return [(value, value) for value in sorted(values)]

    def queryset(self, request: HttpRequest, queryset: Entries) -> Entries | None:
        value = self.value()
        if not value:
            return None
        return queryset.none() if "\0" in value else queryset.filter(**{self.parameter_name: value})


class VerbFilter(_RecentFilter):
    """By what was asked."""

    title = _("verb")
    parameter_name = "verb"
    known = (*VERBS, "pause", "resume", "export")


class SourceFilter(_RecentFilter):
    """By where it was asked."""

    title = _("source")
    parameter_name = "source"
    known = ("admin", "batch", "code", "command")


class UserFilter(_RecentFilter):
    """By who asked, out of recent entries."""

    title = _("user")
    parameter_name = "user_name"


class AuditChangeList(KeyedChangeList):
    """Without what the user may not see."""

    key: ClassVar[Any] = {"pk": number_of}

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        hide_contexts(request, self.result_list)


@admin.register(SagaAuditEntry)
class SagaAuditEntryAdmin(_Admin):
    """Entries can be seen; none can be added, edited or deleted."""

    list_display = ("at_shown", "who", "verb", "result_shown", "on", "why")
    list_display_links = ("at_shown",)
    list_filter = (VerbFilter, "result", SourceFilter, UserFilter)
    list_per_page = 50
    list_max_show_all = 0
    search_fields = ("execution_id",)
    search_help_text = _("The whole id of an execution or a batch, or the whole name of a user.")
    sortable_by = ()
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = None
    change_list_template = f"{TEMPLATES}/change_list.html"
    change_form_template = f"{TEMPLATES}/entry.html"
    fields = (
        *("at_shown", "user_name", "user_id", "source", "verb", "result", "on", "execution_id"),
        *("batch_id", "reason_shown", "detail_shown"),
    )
    readonly_fields = ("at_shown", "on", "reason_shown", "detail_shown")

    class Media:
        css = {"all": ["django_saga/admin.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_queryset(self, request: HttpRequest) -> Entries:
        return stored(request, super().get_queryset(request))

    def get_object(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        entry = super().get_object(request, *args, **kwargs)
        if entry is not None:
            hide_contexts(request, [entry])
        return entry

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        return by_filter(self, lookup)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> Any:
        return AuditChangeList

    def get_search_results(
        self, request: HttpRequest, queryset: Entries, search_term: str
    ) -> tuple[Entries, bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        if id := uuid_of(term):
            return queryset.filter(Q(execution_id=id) | Q(batch_id=id)), False
        return queryset.filter(user_name=term), False

    @leaving_out
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        title = {"title": _("Saga audit entries")}
        return super().changelist_view(request, {**title, **(extra_context or {})})

    @admin.display(description=_("at (UTC)"))
    def at_shown(self, entry: SagaAuditEntry) -> str:
        return f"{entry.at:%Y-%m-%d %H:%M:%S}"

    @admin.display(description=_("user"))
    def who(self, entry: SagaAuditEntry) -> SafeString:
        return format_html(
            '{} <span class="saga-small">{}</span>', entry.user_name or "-", entry.source
        )

    @admin.display(description=_("result"))
    def result_shown(self, entry: SagaAuditEntry) -> SafeString:
        refused = entry.result == SagaAuditEntry.Result.REFUSED
        return badge("failed" if refused else "completed", entry.get_result_display())

    @admin.display(description=_("done to"))
    def on(self, entry: SagaAuditEntry) -> SafeString:
        what, id = name(f"{entry.saga} {entry.step}".strip()), entry.execution_id
        if id is None and entry.batch_id is None:
            return what
        model = sites.EXECUTIONS if id else "sagabatch"
        page = sites.address(self.admin_site, model, "change", id or entry.batch_id)
        link = (
            '{} <a class="saga-id" href="{}">{}</a>'
            if page
            else '{0} <span class="saga-id">{2}</span>'
        )
        return format_html(link, what if id else _("batch"), page, id or entry.batch_id)

    @admin.display(description=_("reason"))
    def why(self, entry: SagaAuditEntry) -> SafeString:
        return format_html(
            '<span class="saga-text">{}</span> <span class="saga-text saga-small">{}</span>',
            _cut(entry.reason),
            _cut(entry.detail),
        )

    @admin.display(description=_("reason"))
    def reason_shown(self, entry: SagaAuditEntry) -> SafeString:
        return format_html('<span class="saga-text">{}</span>', entry.reason or "-")

    @admin.display(description=_("detail"))
    def detail_shown(self, entry: SagaAuditEntry) -> SafeString:
        return format_html('<span class="saga-text">{}</span>', entry.detail or "-")


def hide_contexts(request: HttpRequest, entries: Iterable[SagaAuditEntry]) -> None:
    """Empty the details that hold values of contexts, for who may not see these."""
    if not request.user.has_perm(VIEW_CONTEXT):
        for entry in entries:
            if entry.tells_context:
                entry.detail = ""


def recent_entries(request: HttpRequest, model_admin: Any) -> list[dict[str, str]]:
    """Verb, source and user of the newest entries; read once per request."""
    found: list[dict[str, str]] | None = getattr(request, "_saga_recent_entries", None)
    if found is None:
        rows = model_admin.get_queryset(request).order_by("-pk")
        found = list(rows.values("verb", "source", "user_name")[:SAMPLE])
        request._saga_recent_entries = found  # type: ignore[attr-defined]
    return found


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"
