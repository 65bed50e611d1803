"""Taking the list along, as CSV or JSON: all that match its filters, newest first."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import BadRequest, PermissionDenied
from django.db.models import Q, QuerySet
from django.http import HttpRequest, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.utils.timezone import now
from django.utils.translation import gettext as _

from django_saga.admin.keyed import beyond, query_of_all_pages
from django_saga.admin.rows import readable
from django_saga.counts import CAP
from django_saga.documents import EXECUTION, context_of, document
from django_saga.models import SagaExecution
from django_saga.operations.asking import audited, permit

if TYPE_CHECKING:
    from django_saga.admin.confirming import Confirming as _Admin
else:
    _Admin = object

PERMISSION = "django_saga.export_sagaexecution"
VIEW_CONTEXT = "django_saga.view_context_sagaexecution"
MOST = 50_000  # rows of an export
CHUNK = 500  # rows that are read at once
TYPES = {"csv": "text/csv; charset=utf-8", "json": "application/json"}

Executions = QuerySet[SagaExecution]


class Exporting(_Admin):
    """Adds the page and the download to the admin of executions."""

    def may_export(self, request: HttpRequest) -> bool:
        """Whether the user may take along what they see."""
        return self.has_view_permission(request) and request.user.has_perm(PERMISSION)

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        changelist: Any = super().get_changelist_instance(request)
        if self.may_export(request):
            changelist.export_url = f"{self.url_of('export')}?{query_of_all_pages(request)}"
        return changelist

    def export_view(self, request: HttpRequest) -> Any:
        """GET asks how, POST streams the file."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        if request.method not in ("GET", "HEAD"):
            return self._export(request)
        if not self.may_export(request):
            raise PermissionDenied
        newest = self._matched(request).order_by("-created_at").values("pk")
        number = newest[: CAP + 1].count()
        query = request.GET.urlencode()
        context = {
            **self.page_context(request, _("Export executions")),
            "original": _("Export executions"),
            "number": f"{min(number, CAP):,}",
            "more": number > CAP,
            "most": f"{MOST:,}",
            "with_contexts": request.user.has_perm(VIEW_CONTEXT),
            "action": f"{request.path}?{query}",
            "back": f"{self.url_of('changelist')}?{query}",
        }
        return TemplateResponse(request, "admin/django_saga/sagaexecution/export.html", context)

    def _matched(self, request: HttpRequest) -> Executions:
        try:
            changelist = self.get_changelist_instance(request)
        except IncorrectLookupParameters:
            raise BadRequest("These filters cannot be understood.") from None
        return changelist.get_queryset(request)  # type: ignore[no-any-return]

    def _export(self, request: HttpRequest) -> StreamingHttpResponse:
        kind = request.POST.get("format", "")
        if kind not in TYPES:
            raise BadRequest("As what? Begin at the list.")
        contexts = bool(request.POST.get("contexts"))
        asked: Any = {"user": request.user, "source": "admin"}
        with audited("export", PERMISSION, asked) as (entry, _storage):
            if contexts:
                permit(request.user, VIEW_CONTEXT)
            columns = (*EXECUTION, *(["context"] if contexts else []))
            rows = self._matched(request).only(*columns)
            filters = request.GET.urlencode() or "none"
            entry.detail = f"As {kind}{' with contexts' * contexts}; filters: {filters}"
        found = _documents(rows, contexts)
        return _download(
            request, kind, json_of(found) if kind == "json" else csv_of(found, columns)
        )


def _download(request: HttpRequest, kind: str, chunks: Iterator[str]) -> StreamingHttpResponse:
    over_asgi = hasattr(request, "scope")
    response = StreamingHttpResponse(
        _awaited(chunks) if over_asgi else chunks, content_type=TYPES[kind]
    )
    name = f"saga-executions-{now():%Y%m%d-%H%M%S}.{kind}"
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    response["X-Content-Type-Options"] = "nosniff"
    response["Cache-Control"] = "no-store"
    return response


async def _awaited(chunks: Iterator[str]) -> AsyncIterator[str]:
    while (chunk := await sync_to_async(lambda: next(chunks, None))()) is not None:
        yield chunk


def _documents(rows: Executions, contexts: bool) -> Iterator[dict[str, Any]]:
    for execution in _by_key(rows.order_by("-created_at", "-pk")):
        found = document(execution, EXECUTION)
        yield {**found, "context": context_of(execution)} if contexts else found


def _by_key(rows: Executions) -> Iterator[SagaExecution]:
    """One query per chunk: a cursor would not outlive a pooler's transaction."""
    left, rest = MOST, Q()
    while left > 0:
        chunk = list(rows.filter(readable(SagaExecution), rest)[: min(CHUNK, left)])
        yield from chunk
        left -= len(chunk)
        if len(chunk) < CHUNK:
            return
        last = chunk[-1]
        rest = beyond({"created_at": last.created_at, "pk": last.pk}, "lt")


# How it is written


def csv_of(rows: Iterable[dict[str, Any]], columns: Iterable[str]) -> Iterator[str]:
    """Lines of CSV, the first with the names; no cell is a formula to any spreadsheet."""
    writer: Any = csv.writer(_Echo(), quoting=csv.QUOTE_ALL)
    yield writer.writerow(columns)
    for row in rows:
        yield writer.writerow([cell(value) for value in row.values()])


def cell(value: Any) -> str:
    """A value as what a spreadsheet takes for a text, or for a number that is one."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return str(value)
    text = value if isinstance(value, str) else json.dumps(value)
    text = _AFTER_SEPARATOR.sub(r"\1'", text.replace("\0", "\\0"))
    return f"'{text}" if _FORMULA.match(text) else text


_SIGN = "[=+\\-@\uff1d\uff0b\uff0d\uff20]"  # the last four are the wide ones of East Asia
_FORMULA = re.compile(rf"\s*{_SIGN}|[\t\r\n]")
# Some spreadsheets part the cells there, whatever we say.
_AFTER_SEPARATOR = re.compile(rf"([;\t\r\n\v\f\u2028\u2029]\s*)(?={_SIGN})")


def json_of(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One document with an object for each row."""
    yield '{"executions": ['
    between = "\n"
    for row in rows:
        yield between + json.dumps(row)
        between = ",\n"
    yield "\n]}\n"


class _Echo:
    """A file whose write() gives the line back."""

    def write(self, line: str) -> str:
        return line
