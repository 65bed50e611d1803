"""The admin site that shows a page: its other pages, and the executions that it lets one see."""

from __future__ import annotations

from typing import Any

from django.contrib.admin import AdminSite
from django.contrib.admin.exceptions import NotRegistered
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse

from django_saga.admin.rows import stored
from django_saga.models import SagaExecution
from django_saga.operations import BULK, Verb

EXECUTIONS = "sagaexecution"


def address(site: AdminSite, model: str, page: str = "changelist", *args: Any) -> str:
    """Where one of this app's pages is; empty where there is none."""
    try:
        return reverse(
            f"admin:django_saga_{model}_{page}", args=args or None, current_app=site.name
        )
    except NoReverseMatch:
        return ""


def executions_of(site: AdminSite, request: HttpRequest) -> QuerySet[SagaExecution]:
    """Those that its admin shows to this user; all where executions have no admin there."""
    try:
        return site.get_model_admin(SagaExecution).get_queryset(request)
    except NotRegistered:
        return stored(request, SagaExecution.objects.all())


def are_some(executions: QuerySet[SagaExecution]) -> bool:
    """Whether these may be but some of all: an admin's own ``get_queryset`` leaves others out."""
    return bool(executions.query.where)


def may_see(site: AdminSite, request: HttpRequest, model: Any = SagaExecution) -> bool:
    """Whether the user may see the pages of this model there."""
    try:
        return bool(site.get_model_admin(model).has_view_permission(request))
    except NotRegistered:
        return False


def verbs_for(site: AdminSite, request: HttpRequest) -> list[Verb]:
    """What the user may do to many executions at once there."""
    return [
        verb
        for verb in BULK.values()
        if request.user.has_perm(verb.permission) and address(site, EXECUTIONS, f"{verb.name}_many")
    ]
