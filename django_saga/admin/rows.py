"""Which rows the pages are made of; those that cannot be read hide no others.

PostgreSQL's times go on to infinity, beyond what Python knows, and a row may be edited so. Pages
read all there is; where that fails they are made once more, of what can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar

from django.conf import settings
from django.contrib import messages
from django.db import DataError
from django.db.models import DateTimeField, Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from django_saga.storage import DjangoSagaStorage
from django_saga.texts import told

Row = TypeVar("Row", bound=Model)
View = Callable[..., HttpResponse]

_ONLY = "_saga_readable_only"


def readable(model: type[Model]) -> Q:
    """Of rows whose times Python knows."""
    first, last = datetime(1, 1, 2), datetime(9999, 12, 30)
    if settings.USE_TZ:
        first, last = first.replace(tzinfo=UTC), last.replace(tzinfo=UTC)
    whole = Q()
    for field in model._meta.concrete_fields:
        if isinstance(field, DateTimeField):
            known = Q(**{f"{field.name}__range": (first, last)})
            whole &= known | Q(**{f"{field.name}__isnull": True}) if field.null else known
    return whole


def stored(request: HttpRequest, rows: QuerySet[Row]) -> QuerySet[Row]:
    """Where executions are driven: what a replica tells may be over already.

    Once some of the request's rows could not be read, only those that can.
    """
    rows = rows.using(DjangoSagaStorage().alias)
    return rows.filter(readable(rows.model)) if hasattr(request, _ONLY) else rows


def leave_out(request: HttpRequest, error: DataError) -> str:
    """From now on, leave out what cannot be read; returns that in words.

    Raises the error where that did not help.
    """
    if hasattr(request, _ONLY):
        raise error
    setattr(request, _ONLY, True)
    text = _("Rows that cannot be read are left out, were they edited? %(error)s")
    return text % {"error": told(error)}


def leaving_out(view: View) -> View:
    """A view of an admin that is answered with what can be read, and says so."""

    @wraps(view)
    def answer(admin: Any, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(admin, request, *args, **kwargs)
        except DataError as error:
            admin.message_user(request, leave_out(request, error), messages.ERROR)
            return view(admin, request, *args, **kwargs)

    return answer
