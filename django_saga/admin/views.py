"""How this app's own views are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.contrib.admin import AdminSite
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse

View = Callable[..., HttpResponse]


def outside_transactions(site: AdminSite, view: View) -> View:
    """For who is logged in to that admin, and in no transaction of the request's own."""

    def wrapper(request: HttpRequest, **kwargs: Any) -> HttpResponse:
        return site.admin_view(view)(request, **kwargs)

    # Under ATOMIC_REQUESTS nothing could be driven here: its checkpoints need commits.
    for alias in connections:
        transaction.non_atomic_requests(alias)(wrapper)
    return wrapper
