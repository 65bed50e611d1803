"""Lists that page by key: what is shown next depends on the last row seen, not on a number."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.views.main import ChangeList
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest

from django_saga.counts import CAP

BEFORE, AFTER = "before", "after"


class KeyedChangeList(ChangeList):
    """Newest first, by a whole-number key. It knows the neighbouring pages, not their numbers."""

    result_list: Any

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        self.before = _key(request.GET.get(BEFORE, ""))
        self.after = _key(request.GET.get(AFTER, ""))
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
        rows: QuerySet[Any] = self.queryset
        if self.after is not None:
            found = list(rows.filter(pk__gt=self.after).order_by("pk")[: self.list_per_page + 1])
            self._newer, self._older = len(found) > self.list_per_page, True
            found = found[: self.list_per_page][::-1]
        else:
            page = rows if self.before is None else rows.filter(pk__lt=self.before)
            found = list(page.order_by("-pk")[: self.list_per_page + 1])
            self._newer, self._older = self.before is not None, len(found) > self.list_per_page
            found = found[: self.list_per_page]
        self.result_list, self.result_count = found, len(found)
        self.full_result_count = None
        self.show_full_result_count = False
        self.show_admin_actions = self.can_show_all = self.multi_page = False
        self.paginator = Paginator(found, self.list_per_page)

    @property
    def count(self) -> str:
        """How many match, up to a limit."""
        number = self.queryset.order_by()[: CAP + 1].count()
        return f"{CAP:,}+" if number > CAP else f"{number:,}"

    @property
    def newer(self) -> str:
        """The query of the page before this one; empty on the first."""
        return self._query(AFTER, 0) if self._newer and self.result_list else ""

    @property
    def older(self) -> str:
        """The query of the page after this one; empty on the last."""
        return self._query(BEFORE, -1) if self._older and self.result_list else ""

    @property
    def first_page(self) -> str:
        """The query of the newest."""
        return self.get_query_string()

    def _query(self, which: str, row: int) -> str:
        return self.get_query_string({which: self.result_list[row].pk})


def _key(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None
