"""The list: its page, without counting what is not shown."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext as _

from django_saga.admin.addresses import moment_of, uuid_of
from django_saga.admin.filters import StatusFilter
from django_saga.admin.keyed import KeyedChangeList
from django_saga.models import SagaExecution
from django_saga.verdicts import DatabaseNow, paused

SHOWN = (
    "status",
    "cancel_reason",
    "saga",
    "step",
    "action",
    "attempt",
    "failed_step",
    "error_type",
    "created_at",
    "finished_at",
    "updated_at",
    "lease_until",
    "wake_at",
    "grace_until",
)


def by_filter(model_admin: Any, lookup: str) -> bool:
    """Whether an address may ask so: by a filter of the list alone.

    Who could ask for other columns would learn what is in them, be it a context.
    """
    filters = {getattr(each, "parameter_name", each) for each in model_admin.list_filter}
    return lookup in filters or lookup.removesuffix("__exact") in filters


class ExecutionChangeList(KeyedChangeList):
    """One page of executions, with only the columns that it shows."""

    key: ClassVar[Any] = {"created_at": moment_of, "pk": uuid_of}

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        super().__init__(request, *args, **kwargs)
        self.title = _("Saga executions")

    @property
    def opens_on_attention(self) -> bool:
        """Whether only what needs attention is shown."""
        return not self.query and StatusFilter.parameter_name not in self.params

    @property
    def query_of_all(self) -> str:
        """The query of all executions, whatever their status."""
        return self.get_query_string({StatusFilter.parameter_name: "all"})

    def get_queryset(self, *args: Any, **kwargs: Any) -> QuerySet[SagaExecution]:
        queryset: QuerySet[SagaExecution] = super().get_queryset(*args, **kwargs)
        return queryset.only(*SHOWN).annotate(db_now=DatabaseNow(), is_paused=paused())

    @property
    def note(self) -> str:
        """Why there is nothing to see, in words."""
        if self.result_list:
            return ""
        if self.query and uuid_of(self.query) is None:
            return _("A search takes the whole id of an execution, a UUID; this is none.")
        if self.query:
            return _("No execution has this id.")
        if not self.has_active_filters:
            return _("Nothing needs attention.")
        return _("No execution matches these filters.")
