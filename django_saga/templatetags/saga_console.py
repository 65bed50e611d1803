"""What the app's page in the admin shows beside the list of its models."""

from __future__ import annotations

from typing import Any

from django import template
from django.template import RequestContext

from django_saga.admin.overview import overview_of

register = template.Library()


@register.simple_tag(takes_context=True)
def saga_overview(context: RequestContext) -> dict[str, Any] | None:
    """How the sagas stand; None for who may not see executions, or where they have no admin."""
    request = context.get("request")
    return overview_of(request) if request is not None else None
