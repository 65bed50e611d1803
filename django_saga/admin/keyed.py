"""Lists that page by key: what is shown next depends on the last row seen, not on a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, ClassVar

from django.contrib.admin.views.main import PAGE_VAR, ChangeList
from django.core.paginator import Paginator
from django.db.models import Q, QuerySet
from django.http import HttpRequest

from django_saga.counts import CAP

BEFORE, AFTER = "before", "after"

Key = dict[str, Any]


class KeyedChangeList(ChangeList):
    """Newest first. It knows the neighbouring pages, not their numbers."""

    key: ClassVar[Mapping[str, Callable[[str], Any]]]
    """The columns of the order, the last of them unique, and how each is read from an address."""
    result_list: Any

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        self.before = self._read(request.GET.get(BEFORE, ""))
        self.after = self._read(request.GET.get(AFTER, ""))
        super().__init__(request, *args, **kwargs)

    def get_filters_params(self, params: Any = None) -> Any:
        found = super().get_filters_params(params)
        for name in (BEFORE, AFTER):
            found.pop(name, None)
        return found

    def get_query_string(self, new_params: Any = None, remove: Any = None) -> str:
        # Another choice of a filter has other pages.
        turns = set(new_params or ()) & {BEFORE, AFTER}
        return super().get_query_string(new_params, [*(remove or ()), *({BEFORE, AFTER} - turns)])

    def get_results(self, request: HttpRequest) -> None:
        """The page beyond the key; the newest, where there is none beyond it any more."""
        size = self.list_per_page
        if self.after and len(found := self._rows(self.after, "gt")) >= size:
            page, self._newer, self._older = found[:size][::-1], len(found) > size, True
        elif self.before and (found := self._rows(self.before, "lt")):
            page, self._newer, self._older = found[:size], True, len(found) > size
        else:
            found = self._rows(None, "lt")
            page, self._newer, self._older = found[:size], False, len(found) > size
        self.result_list, self.result_count = page, len(page)
        self.full_result_count = None
        self.show_full_result_count = self.can_show_all = False
        self.show_admin_actions = True
        self.multi_page = self._newer or self._older
        self.paginator = Paginator(page, size)

    @property
    def count(self) -> str:
        """How many match, up to a limit."""
        number = self.queryset.order_by()[: CAP + 1].count()
        return f"{CAP:,}+" if number > CAP else f"{number:,}"

    @property
    def newer(self) -> str:
        """The query of the page before this one; empty on the first."""
        return self._query(AFTER, 0) if self._newer else ""

    @property
    def older(self) -> str:
        """The query of the page after this one; empty on the last."""
        return self._query(BEFORE, -1) if self._older else ""

    @property
    def first_page(self) -> str:
        """The query of the newest."""
        return self.get_query_string()

    def _rows(self, key: Key | None, way: str) -> list[Any]:
        """A page of those beyond the key, or of all, and one more."""
        sign = "" if way == "gt" else "-"
        rows: QuerySet[Any] = self.queryset.order_by(*(sign + column for column in self.key))
        return list((rows.filter(beyond(key, way)) if key else rows)[: self.list_per_page + 1])

    def _query(self, which: str, row: int) -> str:
        values = (getattr(self.result_list[row], column) for column in self.key)
        texts = (v.isoformat() if isinstance(v, datetime) else str(v) for v in values)
        return self.get_query_string({which: ",".join(texts)})

    def _read(self, text: str) -> Key | None:
        """The key in an address; None where it holds none, which asks for the newest."""
        parts = text.split(",")
        if len(parts) != len(self.key):
            return None
        key = {c: read(part) for (c, read), part in zip(self.key.items(), parts, strict=True)}
        return None if None in key.values() else key


def beyond(key: Mapping[str, Any], way: str) -> Q:
    """Of rows that come before (``lt``) or after (``gt``) a key of these columns, in their order.

    The first column is a range by itself, so that an index on it alone begins at the key.
    """
    (column, value), *rest = key.items()
    past = Q(**{f"{column}__{way}": value})
    return Q(**{f"{column}__{way}e": value}) & (past | beyond(dict(rest), way)) if rest else past


def query_of_all_pages(request: HttpRequest) -> str:
    """The query of a list, whichever page of it is shown."""
    query = request.GET.copy()
    for name in (PAGE_VAR, BEFORE, AFTER):
        query.pop(name, None)
    return query.urlencode()
