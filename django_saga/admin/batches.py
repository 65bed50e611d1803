"""The admin of batches: how far each has come, and whether it shall go on."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.contrib import admin, messages
from django.core.exceptions import BadRequest, PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_saga import batches
from django_saga.admin.addresses import number_of, uuid_of
from django_saga.admin.driving import drive_here
from django_saga.admin.formats import badge, last_run
from django_saga.admin.progress import ITEMS, fate, progress, with_results
from django_saga.admin.rows import leaving_out, stored
from django_saga.admin.sites import executions_of
from django_saga.admin.views import outside_transactions
from django_saga.backends import get_backend
from django_saga.exceptions import SagaError
from django_saga.heartbeats import lateness
from django_saga.models import SagaBatch, SagaBatchItem, SagaExecution
from django_saga.operations import VERBS
from django_saga.operations.asking import reason_of
from django_saga.verdicts import DatabaseNow

if TYPE_CHECKING:
    _Admin = admin.ModelAdmin[SagaBatch]
else:
    _Admin = admin.ModelAdmin

Status = SagaBatch.Status
STATUSES = dict(SagaExecution.Status.choices)
KINDS = {"running": "running", "held": "unknown", "paused": "unknown", "finished": "completed"}
MORE = {"one": 1, "ten": 10, "all": None}
STEER = {"pause": batches.pause, "resume": batches.resume, "stop": batches.stop}


@admin.register(SagaBatch)
class SagaBatchAdmin(_Admin):
    """Batches can be seen by who asked for them, or may see all; steered by who may do the verb."""

    list_display = ("status_shown", "verb_shown", "title", "total", "user_name", "at_shown")
    list_display_links = ("title",)
    list_filter = ("status",)
    list_per_page = 50
    list_max_show_all = 0
    ordering = ("-created_at",)
    sortable_by = ()
    actions = None
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    drive_seconds = 5.0
    """How long one request drives a batch itself, with the in-process backend."""

    class Media:
        css = {"all": ["django_saga/admin.css"]}
        js = ["django_saga/batch.js"]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Who may see executions sees the batches that they asked for; all with a permission."""
        if not request.user.has_perm("django_saga.view_sagaexecution"):
            return False
        return obj is None or self._sees_all(request) or obj.user_id == str(request.user.pk)

    def _sees_all(self, request: HttpRequest) -> bool:
        return request.user.has_perm("django_saga.view_sagabatch")

    def get_queryset(self, request: HttpRequest) -> QuerySet[SagaBatch]:
        rows = stored(request, super().get_queryset(request))
        return rows if self._sees_all(request) else rows.filter(user_id=str(request.user.pk))

    @admin.display(description=gettext_lazy("status"))
    def status_shown(self, batch: SagaBatch) -> SafeString:
        return badge(KINDS.get(batch.status, "failed"), batch.get_status_display())

    @admin.display(description=gettext_lazy("verb"))
    def verb_shown(self, batch: SagaBatch) -> str:
        return _label(batch)

    @admin.display(description=gettext_lazy("at (UTC)"))
    def at_shown(self, batch: SagaBatch) -> str:
        return f"{batch.created_at:%Y-%m-%d %H:%M:%S}"

    @leaving_out
    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        title = {"title": _("Saga batches")}
        return super().changelist_view(request, {**title, **(extra_context or {})})

    @leaving_out
    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """The page of one batch; its buttons post to :meth:`steer_view`."""
        if request.method not in ("GET", "HEAD"):
            raise PermissionDenied
        batch = self._get(request, uuid_of(object_id))
        request.current_app = self.admin_site.name
        context = {
            **self.admin_site.each_context(request),
            "title": _("Batch: %(verb)s") % {"verb": _label(batch)},
            "opts": self.opts,
            "media": self.media,
            "has_view_permission": True,
            "preserved_filters": self.get_preserved_filters(request),
            "original": _label(batch),
            "batch": batch,
            "verb": _label(batch),
            "badge": self.status_shown(batch),
            "progress": progress(batch),
            "onward": _onward(batch),
            "buttons": _buttons(batch) if self._may_steer(request, batch) else [],
            "steer": self._url("steer", batch.pk),
            "executions": "admin:django_saga_sagaexecution_change",
            **_items(request, batch, executions_of(self.admin_site, request)),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "admin/django_saga/sagabatch/detail.html", context)

    def steer_view(self, request: HttpRequest, batch_id: UUID) -> HttpResponse:
        """Do what one of the buttons says; takes a POST."""
        batch = self._get(request, batch_id)
        page = HttpResponseRedirect(self._url("change", batch.pk))
        if request.method != "POST":
            return page
        what = request.POST.get("do", "")
        asked: Any = {"user": request.user, "reason": request.POST.get("reason", "")[:2_000]}
        try:
            if request.POST.get("seen") != _seen(batch):
                raise SagaError(_("It changed since you looked: nothing was done. Look again."))
            if what in MORE:
                batch = batches.allow(batch, MORE[what], **asked, source="admin")
            elif what in STEER:
                batch = STEER[what](batch, **asked, source="admin")
            else:
                raise BadRequest("There is no such button.")
        except SagaError as error:
            self.message_user(request, str(error), messages.WARNING)
            return page
        self.log_change(request, batch, f"{dict(_words())[what]} {reason_of(asked)}".strip())
        drive_here(self, request, batch, self.drive_seconds)
        return page

    def _get(self, request: HttpRequest, batch_id: UUID | None) -> SagaBatch:
        if not self.has_view_permission(request):
            raise PermissionDenied
        rows = self.get_queryset(request).filter(pk__in=[batch_id])
        batch = rows.annotate(db_now=DatabaseNow()).first()
        if batch is None:
            raise Http404("There is no such batch.")
        return batch

    def _may_steer(self, request: HttpRequest, batch: SagaBatch) -> bool:
        verb = VERBS.get(batch.verb)
        return verb is not None and request.user.has_perm(verb.permission)

    def _url(self, page: str, batch_id: UUID) -> str:
        name = f"admin:django_saga_sagabatch_{page}"
        return reverse(name, args=[batch_id], current_app=self.admin_site.name)

    def get_urls(self) -> list[URLPattern]:
        view = outside_transactions(self.admin_site, partial(self.steer_view))
        name = "django_saga_sagabatch_steer"
        return [path("<uuid:batch_id>/steer/", view, name=name), *super().get_urls()]


def _label(batch: SagaBatch) -> str:
    verb = VERBS.get(batch.verb)
    return str(verb.label) if verb else batch.verb


def _onward(batch: SagaBatch) -> dict[str, Any]:
    """Who goes on with a running one, and whether they still come by; empty for the others."""
    if batch.status != Status.RUNNING:
        return {}
    lease, now = batch.lease_until, batch.db_now  # type: ignore[attr-defined]
    if lease is not None and lease > now:
        text = _("%(driver)s drives it now; what that leaves, recover_sagas drives on.")
        who = text % {"driver": batch.driver}
    elif get_backend().queues:
        who = _("A worker of the backend drives it on; if none does, recover_sagas does.")
    else:
        who = _("recover_sagas drives it on.")
    recovery = lateness()
    return {"who": who, "last_run": last_run(recovery), "late": recovery.late}


def _seen(batch: SagaBatch) -> str:
    return f"{batch.status} {batch.allowed}"


def _words() -> list[tuple[str, str]]:
    return [
        ("one", _("One more")),
        ("ten", _("Ten more")),
        ("all", _("All the rest")),
        ("resume", _("Resume")),
        ("pause", _("Pause")),
        ("stop", _("Stop")),
    ]


def _buttons(batch: SagaBatch) -> list[tuple[str, str]]:
    match batch.status:
        case Status.HELD:
            fit = {"one", "ten", "all", "stop"}
        case Status.RUNNING if batch.allowed is not None:
            fit = {"ten", "all", "pause", "stop"}
        case Status.RUNNING:
            fit = {"pause", "stop"}
        case Status.PAUSED:
            fit = {"resume", "stop"}
        case _:
            fit = set()
    return [(name, words) for name, words in _words() if name in fit]


def _items(
    request: HttpRequest, batch: SagaBatch, visible: QuerySet[SagaExecution]
) -> dict[str, Any]:
    """A page of its items, in order, all or those of one state; and where the next one begins.

    Those of executions that the user may not see are left out.
    """
    rows = SagaBatchItem.objects.using(batch._state.db).filter(batch=batch)
    state, after = request.GET.get("state", ""), number_of(request.GET.get("after", ""))
    if state in SagaBatchItem.State.values:
        rows = rows.filter(state=state)
    else:
        state = ""
    if after is not None:
        rows = rows.filter(pk__gt=after)
    found = list(with_results(rows).order_by("pk")[: ITEMS + 1])
    ids = [item.execution_id for item in found[:ITEMS]]
    there = SagaExecution.objects.using(batch._state.db).filter(pk__in=ids)
    shown = visible.filter(pk__in=ids).order_by().values("pk")
    hidden = set(there.exclude(pk__in=shown).values_list("pk", flat=True))
    page = [item for item in found[:ITEMS] if item.execution_id not in hidden]
    for item in page:
        item.fate = fate(batch.verb, item.status, item.now) if item.result_id else ""
        item.now = STATUSES.get(item.now, item.now)
    return {
        "items": page,
        "state": state,
        "states": SagaBatchItem.State.choices,
        "next": found[ITEMS - 1].pk if len(found) > ITEMS else None,
        "seen": _seen(batch),
    }
