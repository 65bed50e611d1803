"""Each verb for one execution: what it would do is shown first, and a POST does it."""

from __future__ import annotations

import shlex
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db import DataError
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.utils.translation import gettext as _

from django_saga import interventions
from django_saga.admin.detail import unreadable
from django_saga.admin.formats import status_badge
from django_saga.admin.forms import VerbForm
from django_saga.backends import get_backend
from django_saga.console.arguments import dashed
from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution
from django_saga.operations import VERBS, Verb
from django_saga.operations.asking import audited, authorize
from django_saga.operations.viewing import PERMISSION as VIEW_CONTEXT
from django_saga.prospects import drives, why_never, why_not, will_run
from django_saga.texts import told
from django_saga.verdicts import DatabaseNow, Verdict

if TYPE_CHECKING:
    from django_saga.admin.confirming import Confirming
else:
    Confirming = Any

TEMPLATE = "admin/django_saga/sagaexecution/verb.html"


def verb_view(
    admin: Confirming, request: HttpRequest, saga_id: UUID, *, verb: Verb
) -> HttpResponse:
    """GET asks, POST does; what is refused is told on the form, which keeps what was typed."""
    if not admin.has_view_permission(request):
        raise PermissionDenied
    rows = admin.get_queryset(request).filter(pk__in=[saga_id])
    try:
        execution = rows.annotate(verdict=verb.verdict(), db_now=DatabaseNow()).first()
    except DataError:  # which is told there
        return HttpResponseRedirect(admin.url_of("change", saga_id=saga_id))
    if execution is None:
        raise Http404("There is no such execution.")
    if not may(request, verb):
        _refuse(request, verb, execution)
    if unreadable(execution):  # which is told there
        return HttpResponseRedirect(admin.url_of("change", saga_id=saga_id))
    if request.method != "POST":
        return _ask(admin, request, verb, execution, VerbForm(verb, execution))
    form = VerbForm(verb, execution, data=request.POST)
    if form.is_valid():
        try:
            result = _do(request, verb, execution, form)
        except SagaError as error:
            form.add_error(None, told(error))
        else:
            return _done(admin, request, verb, execution, result)
    elif form.cleaned_data.get("token", execution.token) != execution.token:
        form.add_error(None, _("It changed meanwhile, and was left alone; look again."))
    return _ask(admin, request, verb, execution, form)


def may(request: HttpRequest, verb: Verb) -> bool:
    """Whether the user has the verb's permission; who edits a context sees it, too."""
    sees = "context" not in verb.takes or request.user.has_perm(VIEW_CONTEXT)
    return sees and request.user.has_perm(verb.permission)


def _refuse(request: HttpRequest, verb: Verb, execution: SagaExecution) -> None:
    """Raise PermissionDenied; an attempt to do it is audited, looking is not."""
    if request.method == "POST":
        missing = next(p for p in (verb.permission, VIEW_CONTEXT) if not request.user.has_perm(p))
        about = {"saga": execution.saga, "step": execution.step, "execution_id": execution.pk}
        with audited(verb.name, missing, {"user": request.user, "source": "admin"}, **about):
            pass
    raise PermissionDenied


def _do(
    request: HttpRequest, verb: Verb, execution: SagaExecution, form: VerbForm
) -> SagaExecution:
    result: SagaExecution = verb.function(
        execution.pk,
        **form.arguments,
        user=request.user,
        reason=form.cleaned_data["reason"],
        source="admin",
        token=form.cleaned_data["token"],
    )
    return result


def _done(
    admin: Confirming,
    request: HttpRequest,
    verb: Verb,
    execution: SagaExecution,
    result: SagaExecution,
) -> HttpResponse:
    anew = result.pk != execution.pk
    facts = {"verb": verb.label, "status": result.get_status_display(), "id": result.pk}
    if anew:
        said = _("%(verb)s: started anew. This is the new execution; it is %(status)s now.")
        logged = _("%(verb)s: started anew as %(id)s.")
    else:
        said = logged = _("%(verb)s: done. It is %(status)s now.")
    admin.log_change(request, execution, logged % facts)
    bad = result.status == SagaExecution.Status.STUCK and verb.name not in ("resolve", "abandon")
    level = messages.WARNING if bad else messages.SUCCESS
    admin.message_user(request, said % facts, level)
    return HttpResponseRedirect(admin.url_of("change", saga_id=result.pk))


def _ask(
    admin: Confirming,
    request: HttpRequest,
    verb: Verb,
    execution: SagaExecution,
    form: VerbForm,
) -> HttpResponse:
    verdict = Verdict(execution.verdict)  # type: ignore[attr-defined]
    refused = why_never(execution, verb.name)
    if verdict not in verb.allowed:
        refused = why_not(execution, verdict, execution.db_now)  # type: ignore[attr-defined]
    context = {
        **admin.page_context(request, verb.label),
        "original": execution,
        "execution": execution,
        "badge": status_badge(execution),
        "verb": verb,
        "form": form,
        "will": "" if refused else will_run(execution, verdict, verb.name),
        "refused": refused,
        "drives": drives(verb.name, verdict),
        "in_process": not get_backend().queues,
        "command": command(verb, execution),
        "back": admin.url_of("change", saga_id=execution.pk),
    }
    return TemplateResponse(request, TEMPLATE, context)


# The buttons on the page of an execution


def annotated(rows: Any) -> Any:
    """The executions with the verdict on each verb."""
    return rows.annotate(**{f"{name}_verdict": verb.verdict() for name, verb in VERBS.items()})


def buttons(
    admin: Confirming, request: HttpRequest, execution: SagaExecution
) -> dict[str, list[dict[str, Any]]]:
    """The verbs that can be done to an execution, by this user: the usual ones, and those by hand.

    The execution comes from :func:`annotated`.
    """
    able: list[dict[str, Any]] = [
        {
            "verb": verb,
            "url": admin.url_of(verb.name, saga_id=execution.pk),
            "command": command(verb, execution),
        }
        for verb in VERBS.values()
        if _can(request, verb, execution)
    ]
    forced = [button for button in able if button["verb"].right == "force"]
    return {"verbs": [button for button in able if button not in forced], "by_hand": forced}


def command(verb: Verb, execution: SagaExecution) -> str:
    """What does the same from a shell."""
    words = [dashed(verb.name), str(execution.pk)]
    match verb.takes:
        case ("step",):
            words.append("STEP")
        case ("context",):
            words.append("FILE")
        case ("standing",):
            words += ["--standing", *interventions.standing_steps(execution.state)]
        case ("confirm",):
            words += ["--confirm", str(execution.pk)]
    return f"manage.py sagas {shlex.join(words)} --reason '…'"


def _can(request: HttpRequest, verb: Verb, execution: SagaExecution) -> bool:
    possible = getattr(execution, f"{verb.name}_verdict") in verb.allowed
    if not possible or not may(request, verb) or why_never(execution, verb.name):
        return False
    with suppress(PermissionDenied):
        authorize(request.user, verb.name, execution)
        return True
    return False
