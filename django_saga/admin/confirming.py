"""The way from a button to the deed: a confirmation, a POST, a summary, an entry in the log."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.conf import settings
from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import BadRequest, PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.dateparse import parse_datetime
from django.utils.timezone import is_aware
from django.utils.translation import gettext as _

from django_saga.admin.acting import perform, preview, summary
from django_saga.admin.changelist import uuid_of
from django_saga.backends import get_backend
from django_saga.models import SagaExecution
from django_saga.operations import RETRY, Verb
from django_saga.story import will_run
from django_saga.verdicts import DatabaseNow

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaExecution]
else:
    _Admin = object

Executions = QuerySet[SagaExecution]
MATCHING, SELECTED, ONE = "matching", "selected", "one"


class Confirming(_Admin):
    """Acts on one execution, a selection, or all that match; only by POST, from a confirmation."""

    drive_seconds = 10.0
    """How long one request drives executions itself, with the in-process backend."""
    act_seconds = 20.0
    """How long one request goes on with storing them, or handing them over."""

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

    def confirm_selected(self, request: HttpRequest, verb: Verb) -> HttpResponse:
        """What an action of the list does: ask first, doing nothing yet."""
        if request.POST.get("select_across") == "1":
            query = request.GET.urlencode()
            return HttpResponseRedirect(f"{self.url_of(verb.name, 'many')}?{query}")
        return self._confirm(request, verb, self._selected(request), SELECTED)

    def verb_view(
        self, request: HttpRequest, *, verb: Verb, saga_id: UUID | None = None
    ) -> HttpResponse:
        """GET asks, POST does."""
        if not self.may(request, verb):
            raise PermissionDenied
        asks = request.method in ("GET", "HEAD")
        scope = ONE if saga_id else MATCHING if asks else request.POST.get("scope")
        if scope == ONE:
            executions = self.get_queryset(request).filter(pk__in=[saga_id])
            if not executions.exists():
                raise Http404("There is no such execution.")
        elif scope == SELECTED:
            executions = self._selected(request)
        elif scope == MATCHING:
            executions = self._matching(request)
        else:
            raise BadRequest("Which executions? Begin at the list.")
        if asks:
            return self._confirm(request, verb, executions, scope)
        return self._do(request, verb, executions, saga_id)

    def _selected(self, request: HttpRequest) -> Executions:
        ids = filter(None, map(uuid_of, request.POST.getlist(ACTION_CHECKBOX_NAME)))
        return self.get_queryset(request).filter(pk__in=list(ids))

    def _matching(self, request: HttpRequest) -> Executions:
        try:
            changelist = self.get_changelist_instance(request)
        except IncorrectLookupParameters:
            raise BadRequest("These filters cannot be understood.") from None
        return changelist.get_queryset(request)

    def _confirm(
        self, request: HttpRequest, verb: Verb, executions: Executions, scope: str
    ) -> HttpResponse:
        # The clock is read first: what changes from then on has not been seen.
        first = executions.annotate(verdict=verb.verdict(), db_now=DatabaseNow()).first()
        one = first if scope == ONE else None
        title = _("Retry: are you sure?") if verb is RETRY else _("Recover: are you sure?")
        ids = executions.values_list("pk", flat=True) if scope == SELECTED else []
        query = request.GET.urlencode()
        context = {
            **self.page_context(request, title),
            "original": title,
            "verb": verb.name,
            "preview": preview(verb, executions),
            "scope": scope,
            "ids": ids,
            "checkbox": ACTION_CHECKBOX_NAME,
            "one": one,
            "will": will_run(one, one.verdict) if one else "",
            "seen": first.db_now.isoformat() if first else "",
            "in_process": not get_backend().queues,
            "drive_seconds": self.drive_seconds,
            "action": request.path if one else f"{self.url_of(verb.name, 'many')}?{query}",
            "back": self._back(one.pk if one else None, query),
        }
        template = "admin/django_saga/sagaexecution/confirm.html"
        return TemplateResponse(request, template, context)

    def _back(self, saga_id: UUID | None, query: str) -> str:
        if saga_id:
            return self.url_of("change", saga_id=saga_id)
        return f"{self.url_of('changelist')}?{query}"

    def _do(
        self,
        request: HttpRequest,
        verb: Verb,
        executions: Executions,
        saga_id: UUID | None,
    ) -> HttpResponse:
        seen = _moment(request.POST.get("seen", ""))

        def log(execution: SagaExecution, result: SagaExecution) -> None:
            self.log_change(request, execution, log_text(verb, execution, result))

        tally = perform(
            verb,
            executions,
            user=request.user,
            seen=seen,
            drive_seconds=self.drive_seconds,
            seconds=self.act_seconds,
            done=log,
        )
        texts = summary(tally)
        clean = tally.done and len(texts) == 1 and not tally.became["STUCK"]
        self.message_user(request, texts[0], messages.SUCCESS if clean else messages.WARNING)
        for text in texts[1:]:
            self.message_user(request, text, messages.WARNING)
        at = tally.last.pk if saga_id and tally.last else saga_id
        return HttpResponseRedirect(self._back(at, request.GET.urlencode()))


def _moment(text: str) -> datetime:
    try:
        moment = parse_datetime(text)
    except ValueError:
        moment = None
    if moment is None or is_aware(moment) is not settings.USE_TZ:
        raise BadRequest("This takes a confirmation first.")
    return moment


def log_text(verb: Verb, execution: SagaExecution, result: SagaExecution) -> str:
    """The entry in the admin's log."""
    if verb is not RETRY:
        return _("Recovered; then %(status)s.") % {"status": result.status}
    if result.pk != execution.pk:
        return _("Retried: started anew as %(id)s.") % {"id": result.pk}
    return _("Retried its compensation; then %(status)s.") % {"status": result.status}
