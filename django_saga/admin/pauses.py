"""The admin of pauses: what is paused, and the ways to pause and to resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_saga import registry
from django_saga.admin.formats import name
from django_saga.admin.forms import AskingForm, reason_field
from django_saga.admin.rows import leaving_out, stored
from django_saga.admin.views import outside_transactions
from django_saga.exceptions import SagaError
from django_saga.masking import mask_text
from django_saga.models import SagaPause
from django_saga.operations import pause, resume
from django_saga.operations.pausing import PERMISSION
from django_saga.texts import told

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaPause]
else:
    _Admin = admin.ModelAdmin

TEMPLATES = "admin/django_saga/sagapause"
BASE = "django_saga_sagapause"


class PauseForm(AskingForm):
    """A saga of the code or one of its steps, and why."""

    what = forms.ChoiceField(label=gettext_lazy("What"))
    reason = reason_field(
        required=False, help_text=gettext_lazy("The audit keeps it, and whoever waits reads it.")
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["what"].choices = _choices()  # type: ignore[attr-defined]


class ReasonForm(AskingForm):
    """Why it is resumed."""

    reason = reason_field(required=False)


def _choices() -> list[Any]:
    """By saga: all of it, then its steps."""
    sagas = {saga.name: saga for saga in registry.all_sagas()}
    choices: list[Any] = [("", _("Choose a saga or a step"))]
    for saga in sorted(sagas):
        steps = [(_value(saga, step), f"{saga}: {step}") for step in sagas[saga].definition.steps]
        every = (_value(saga, ""), _("%(saga)s: every step") % {"saga": saga})
        choices.append((saga, [every, *steps]))
    return choices


def _value(saga: str, step: str) -> str:
    return json.dumps([saga, step])


def _logged(what: str, reason: str) -> str:
    return f"{what}: {mask_text(reason)}" if reason else what


@admin.register(SagaPause)
class SagaPauseAdmin(_Admin):
    """What is paused can be seen, and resumed; and more can be paused."""

    list_display = ("saga_shown", "step_shown", "reason_shown", "user_name", "since", "tools")
    list_display_links = None
    list_per_page = 100
    sortable_by = ()
    actions = None
    change_list_template = f"{TEMPLATES}/change_list.html"

    class Media:
        css = {"all": ["django_saga/admin.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_view_permission(request, obj) or self.has_pause_permission(request)

    def has_pause_permission(self, request: HttpRequest) -> bool:
        """Whether the user may pause and resume."""
        return request.user.has_perm(PERMISSION)

    # The list

    def get_queryset(self, request: HttpRequest) -> QuerySet[SagaPause]:
        return stored(request, super().get_queryset(request))

    def get_list_display(self, request: HttpRequest) -> Any:
        shown = self.list_display
        return shown if self.has_pause_permission(request) else shown[:-1]

    @leaving_out
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        may = self.has_pause_permission(request)
        tools = {"title": _("Saga pauses"), "pause_url": self._url("pause") if may else ""}
        return super().changelist_view(request, {**tools, **(extra_context or {})})

    @admin.display(description=gettext_lazy("saga"))
    def saga_shown(self, pause: SagaPause) -> SafeString:
        return name(pause.saga)

    @admin.display(description=gettext_lazy("step"))
    def step_shown(self, pause: SagaPause) -> str:
        return name(pause.step) if pause.step else _("every step")

    @admin.display(description=gettext_lazy("reason"))
    def reason_shown(self, pause: SagaPause) -> SafeString:
        return format_html('<span class="saga-text">{}</span>', pause.reason[:500] or "-")

    @admin.display(description=gettext_lazy("since (UTC)"))
    def since(self, pause: SagaPause) -> str:
        return f"{pause.created_at:%Y-%m-%d %H:%M:%S}"

    @admin.display(description="")
    def tools(self, pause: SagaPause) -> SafeString:
        return format_html('<a href="{}">{}</a>', self._url("resume", pause.pk), _("Resume…"))

    # Pausing and resuming

    def pause_view(self, request: HttpRequest) -> HttpResponse:
        """GET asks what to pause, POST does it."""
        asks = request.method in ("GET", "HEAD")
        chosen = _value(request.GET.get("saga", ""), request.GET.get("step", ""))
        form = PauseForm(initial={"what": chosen}) if asks else PauseForm(request.POST)
        if asks or not form.is_valid():
            return self._page(request, "pause", _("Pause a saga or a step"), form=form)
        saga, step = json.loads(form.cleaned_data["what"])

        def work(reason: str) -> str:
            paused = pause(saga, step, user=request.user, reason=reason, source="admin")
            self.log_addition(request, paused, _logged(_("Paused"), reason))
            return _("Paused: %(what)s.") % {"what": paused}

        return self._done(request, form, work)

    def resume_view(self, request: HttpRequest, pk: int) -> HttpResponse:
        """GET asks whether to, POST does it."""
        asks = request.method in ("GET", "HEAD")
        row = self.get_queryset(request).filter(pk=pk).first()
        form = ReasonForm() if asks else ReasonForm(request.POST)
        if row is None or asks or not form.is_valid():
            return self._page(request, "resume", _("Resume: are you sure?"), form=form, row=row)

        def work(reason: str) -> str:
            resume(row.saga, row.step, user=request.user, reason=reason, source="admin")
            self.log_change(request, row, _logged(_("Resumed"), reason))
            return _("Resumed: %(what)s. It goes on with the next sweep of recovery.") % {
                "what": row
            }

        return self._done(request, form, work)

    def _page(self, request: HttpRequest, page: str, title: str, **more: Any) -> HttpResponse:
        if not self.has_pause_permission(request):
            raise PermissionDenied
        if more.get("row", self) is None:
            raise Http404("There is no such pause.")
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": title,
            "original": title,
            "opts": self.opts,
            "media": self.media,
            "has_view_permission": True,
            "back": self._url("changelist"),
            **more,
        }
        return TemplateResponse(request, f"{TEMPLATES}/{page}.html", context)

    def _done(
        self, request: HttpRequest, form: forms.Form, work: Callable[[str], str]
    ) -> HttpResponse:
        """Do it; the operation looks at the permission, and has refusals audited."""
        try:
            self.message_user(request, work(form.cleaned_data["reason"]), messages.SUCCESS)
        except SagaError as error:
            self.message_user(request, told(error), messages.ERROR)
        return HttpResponseRedirect(self._url("changelist"))

    def _url(self, page: str, *args: Any) -> str:
        return reverse(f"admin:{BASE}_{page}", args=args, current_app=self.admin_site.name)

    def get_urls(self) -> list[URLPattern]:
        wrap = partial(outside_transactions, self.admin_site)
        ours = [
            path("pause/", wrap(self.pause_view), name=f"{BASE}_pause"),
            path("<int:pk>/resume/", wrap(self.resume_view), name=f"{BASE}_resume"),
        ]
        return ours + super().get_urls()
