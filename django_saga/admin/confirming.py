"""Acting on many: a selection, or all that match the list's filters, as a batch.

A GET asks, and says what will run; a POST with a reason makes the batch and leads to its page.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import BadRequest, PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.functional import lazy
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from django_saga import batches
from django_saga.admin.addresses import moment_of, uuid_of
from django_saga.admin.driving import drive_here
from django_saga.admin.forms import AskingForm, reason_field
from django_saga.admin.preview import CAP, preview
from django_saga.admin.rows import leaving_out
from django_saga.backends import get_backend
from django_saga.exceptions import SagaError
from django_saga.models import SagaBatch, SagaExecution
from django_saga.operations import BULK, Verb
from django_saga.operations.asking import audited
from django_saga.operations.verbs import CANCEL
from django_saga.verdicts import DatabaseNow

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaExecution]
else:
    _Admin = object

Executions = QuerySet[SagaExecution]
MATCHING, SELECTED = "matching", "selected"
ALLOWED = {"1": 1, "10": 10, "all": None}


class ManyForm(AskingForm):
    """Why, how fast, and how many for now."""

    reason = reason_field(required=True)
    rate = forms.FloatField(
        label=gettext_lazy("Executions per second"),
        initial=5,
        min_value=batches.SLOWEST,
        max_value=batches.FASTEST,
        widget=forms.NumberInput(attrs={"step": "any"}),
    )
    allowed = forms.ChoiceField(choices=[(name, name) for name in ALLOWED])  # by the buttons


class Confirming(_Admin):
    """Acts on a selection, or on all that match; only by POST, from a confirmation."""

    drive_seconds = 5.0
    """How long one request drives a batch itself, with the in-process backend."""

    def may(self, request: HttpRequest, verb: Verb) -> bool:
        """Whether the user may do this to executions, and see them."""
        return self.has_view_permission(request) and request.user.has_perm(verb.permission)

    def url_of(self, page: str, which: str = "", saga_id: UUID | None = None) -> str:
        """The address of one of this admin's pages."""
        name = "_".join(filter(None, ["admin:django_saga_sagaexecution", page, which]))
        args = [saga_id] if saga_id else []
        return reverse(name, args=args, current_app=self.admin_site.name)

    def page_context(self, request: HttpRequest, title: str) -> dict[str, Any]:
        """What the admin's templates need."""
        request.current_app = self.admin_site.name
        return {
            **self.admin_site.each_context(request),
            "title": title,
            "opts": self.opts,
            "media": self.media,
            "has_view_permission": True,
            "preserved_filters": self.get_preserved_filters(request),
        }

    def offered(self, request: HttpRequest, query: str) -> list[dict[str, Any]]:
        """The ways to act on all that match this query, as far as the user may."""
        return [
            {"verb": verb, "url": f"{self.url_of(verb.name, 'many')}?{query}"}
            for verb in BULK.values()
            if self.may(request, verb)
        ]

    # What the admin asks for the permissions that its actions name.

    def has_retry_permission(self, request: HttpRequest) -> bool:
        return self.may(request, BULK["retry"])

    def has_recover_permission(self, request: HttpRequest) -> bool:
        return self.may(request, BULK["recover"])

    def has_cancel_permission(self, request: HttpRequest) -> bool:
        return self.may(request, BULK["cancel"])

    def has_resume_forward_permission(self, request: HttpRequest) -> bool:
        return self.may(request, BULK["resume_forward"])

    def confirm_selected(self, request: HttpRequest, verb: Verb) -> HttpResponse:
        """What an action of the list does: ask first, doing nothing yet."""
        if request.POST.get("select_across") == "1":
            query = request.GET.urlencode()
            return HttpResponseRedirect(f"{self.url_of(verb.name, 'many')}?{query}")
        executions, title = self._selected(request)
        return self._confirm(request, verb, executions, title, SELECTED, ManyForm())

    def many_view(self, request: HttpRequest, *, verb: Verb) -> HttpResponse:
        """GET asks, POST makes the batch."""
        asks = request.method in ("GET", "HEAD")
        if not self.may(request, verb):
            _refuse(request, verb, looks=asks)
        if asks:
            return self._ask(request, verb)
        scope = request.POST.get("scope", "")
        if scope == SELECTED:
            executions, title = self._selected(request)
        elif scope == MATCHING:
            executions, title = self._matching(request)
        else:
            raise BadRequest("Which executions? Begin at the list.")
        seen = moment_of(request.POST.get("seen", ""))
        if seen is None:
            raise BadRequest("This takes a confirmation first.")
        form = ManyForm(request.POST)
        if form.is_valid():
            try:
                return self._do(request, verb, executions, title, seen, form.cleaned_data)
            except SagaError as error:
                form.add_error(None, str(error))
        return self._confirm(request, verb, executions, title, scope, form)

    @leaving_out
    def _ask(self, request: HttpRequest, verb: Verb) -> HttpResponse:
        executions, title = self._matching(request)
        return self._confirm(request, verb, executions, title, MATCHING, ManyForm())

    def _selected(self, request: HttpRequest) -> tuple[Executions, str]:
        ids = list(filter(None, map(uuid_of, request.POST.getlist(ACTION_CHECKBOX_NAME))))
        title = ngettext("%(n)s that was selected", "%(n)s that were selected", len(ids))
        return self.get_queryset(request).filter(pk__in=ids), title % {"n": len(ids)}

    def _matching(self, request: HttpRequest) -> tuple[Executions, str]:
        try:
            changelist = self.get_changelist_instance(request)
        except IncorrectLookupParameters:
            raise BadRequest("These filters cannot be understood.") from None
        return changelist.get_queryset(request), _described(changelist)

    def _confirm(
        self,
        request: HttpRequest,
        verb: Verb,
        executions: Executions,
        title: str,
        scope: str,
        form: ManyForm,
    ) -> HttpResponse:
        # The clock is read first: what changes from then on has not been seen.
        clock = executions.annotate(clock=DatabaseNow())
        first = clock.values_list("clock", flat=True).first()
        query = request.GET.urlencode()
        ids = executions.values_list("pk", flat=True) if scope == SELECTED else []
        shown = preview(verb, executions)
        heading = ngettext("%(verb)s: %(n)s execution", "%(verb)s: %(n)s executions", shown.count)
        context = {
            **self.page_context(request, heading % {"verb": verb.label, "n": shown.shown}),
            "original": verb.label,
            "verb": verb,
            "what": title,
            "preview": shown,
            "form": form,
            "scope": scope,
            "ids": ids,
            "checkbox": ACTION_CHECKBOX_NAME,
            "seen": first.isoformat() if first else "",
            "in_process": not get_backend().queues,
            "action": f"{self.url_of(verb.name, 'many')}?{query}",
            "back": f"{self.url_of('changelist')}?{query}",
        }
        return TemplateResponse(request, "admin/django_saga/sagaexecution/many.html", context)

    def _do(
        self,
        request: HttpRequest,
        verb: Verb,
        executions: Executions,
        title: str,
        seen: datetime,
        given: dict[str, Any],
    ) -> HttpResponse:
        # What is cancelled goes on meanwhile, and is to be cancelled all the same.
        column = "created_at" if verb is CANCEL else "updated_at"
        batch = batches.create(
            verb,
            executions.filter(**{f"{column}__lte": seen}),
            user=request.user,
            reason=given["reason"],
            title=title,
            rate=given["rate"],
            allowed=ALLOWED[given["allowed"]],
            source="admin",
        )
        later = executions.order_by().filter(**{f"{column}__gt": seen}).values("pk")[: CAP + 1]
        if left := len(later):
            self.message_user(request, _left_alone(left), messages.WARNING)
        text = ngettext(
            "%(verb)s, %(n)s execution: %(what)s",
            "%(verb)s, %(n)s executions: %(what)s",
            batch.total,
        )
        words = {"verb": verb.label, "n": batch.total, "what": batch.title}
        self.log_change(request, batch, text % words)  # type: ignore[arg-type]
        drive_here(self, request, batch, self.drive_seconds)
        return HttpResponseRedirect(_page_of(batch, self.admin_site.name))


def action_of(verb: Verb) -> Any:
    """The list's action that asks before it does this to the selection."""

    def ask(model_admin: Confirming, request: HttpRequest, queryset: Any) -> HttpResponse:
        return model_admin.confirm_selected(request, verb)

    ask.__name__ = f"{verb.name}_selected"
    return admin.action(description=_action_text(verb), permissions=[verb.name])(ask)


def _of_selection(verb: Verb) -> str:
    return _("%(verb)s the selection…") % {"verb": verb.label}


_action_text = lazy(_of_selection, str)


def _refuse(request: HttpRequest, verb: Verb, *, looks: bool) -> None:
    """Raise PermissionDenied; an attempt to do it is audited, looking is not."""
    if not looks and not request.user.has_perm(verb.permission):
        with audited("create_batch", verb.permission, {"user": request.user, "source": "admin"}):
            pass
    raise PermissionDenied


def _page_of(batch: SagaBatch, site: str) -> str:
    return reverse("admin:django_saga_sagabatch_change", args=[batch.pk], current_app=site)


def _described(changelist: Any) -> str:
    """The filters of the list in words."""
    chosen = [(spec, spec.value()) for spec in changelist.filter_specs if spec.value()]
    parts = [_("all that needs attention")] if changelist.opens_on_attention else []
    parts += [f"{s.title}: {dict(s.lookup_choices).get(value, value)}" for s, value in chosen]
    if changelist.query:
        parts.append(_("id: %(id)s") % {"id": changelist.query})
    return "; ".join(parts)


def _left_alone(number: int) -> str:
    text = ngettext(
        "%(n)s changed since you looked, and was left alone.",
        "%(n)s changed since you looked, and were left alone.",
        number,
    )
    return text % {"n": f"{CAP:,}+" if number > CAP else number}
