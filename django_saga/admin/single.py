"""One execution, retried or recovered: a confirmation, a POST, a summary, an entry in the log."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.conf import settings
from django.contrib import messages
from django.core.exceptions import BadRequest, PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.dateparse import parse_datetime
from django.utils.timezone import is_aware
from django.utils.translation import gettext as _

from django_saga.admin.acting import Executions, perform, preview, summary
from django_saga.backends import get_backend
from django_saga.models import SagaExecution
from django_saga.operations import RETRY, Verb
from django_saga.story import will_run
from django_saga.verdicts import DatabaseNow

if TYPE_CHECKING:
    from django_saga.admin.confirming import Confirming
else:
    Confirming = Any


def verb_view(
    admin: Confirming, request: HttpRequest, saga_id: UUID, *, verb: Verb
) -> HttpResponse:
    """GET asks, POST does."""
    if not admin.may(request, verb):
        raise PermissionDenied
    executions = admin.get_queryset(request).filter(pk__in=[saga_id])
    if not executions.exists():
        raise Http404("There is no such execution.")
    if request.method in ("GET", "HEAD"):
        return _confirm(admin, request, verb, executions, saga_id)
    return _do(admin, request, verb, executions, saga_id)


def _confirm(
    admin: Confirming, request: HttpRequest, verb: Verb, executions: Executions, saga_id: UUID
) -> HttpResponse:
    # The clock is read first: what changes from then on has not been seen.
    one: Any = executions.annotate(verdict=verb.verdict(), db_now=DatabaseNow()).first()
    title = _("Retry: are you sure?") if verb is RETRY else _("Recover: are you sure?")
    context = {
        **admin.page_context(request, title),
        "original": title,
        "verb": verb.name,
        "preview": preview(verb, executions),
        "scope": "one",
        "one": one,
        "will": will_run(one, one.verdict),
        "seen": one.db_now.isoformat(),
        "in_process": not get_backend().queues,
        "action": request.path,
        "back": admin.url_of("change", saga_id=saga_id),
    }
    return TemplateResponse(request, "admin/django_saga/sagaexecution/single.html", context)


def _do(
    admin: Confirming, request: HttpRequest, verb: Verb, executions: Executions, saga_id: UUID
) -> HttpResponse:
    seen = _moment(request.POST.get("seen", ""))

    def log(execution: SagaExecution, result: SagaExecution) -> None:
        admin.log_change(request, execution, log_text(verb, execution, result))

    tally = perform(
        verb,
        executions,
        user=request.user,
        seen=seen,
        drive_seconds=10.0,
        seconds=20.0,
        done=log,
    )
    texts = summary(tally)
    clean = tally.done and len(texts) == 1 and not tally.became["STUCK"]
    admin.message_user(request, texts[0], messages.SUCCESS if clean else messages.WARNING)
    for text in texts[1:]:
        admin.message_user(request, text, messages.WARNING)
    at = tally.last.pk if tally.last else saga_id
    return HttpResponseRedirect(admin.url_of("change", saga_id=at))


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
