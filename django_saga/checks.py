"""System checks: what would only show later, with an id and a hint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from django.apps import AppConfig, apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.db import DEFAULT_DB_ALIAS, connections, router

from django_saga import registry
from django_saga.backends import get_backend
from django_saga.conf import DEFAULTS, conf
from django_saga.exceptions import SagaError
from django_saga.saga import default_container
from django_saga.steps import SagaStepHandler
from django_saga.storage.sql import DIALECTS
from django_saga.telling import problems
from django_saga.texts import shown


@register("django_saga")
def check_settings(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """E001 unknown key, E002 unusable value, E003 no usable backend, E008 no queue.

    W001 USE_TZ, W004 a link's place that nothing fills in.
    """
    found: list[CheckMessage] = []
    given = getattr(settings, "DJANGO_SAGA", None) or {}
    if not isinstance(given, dict):
        return [Error("DJANGO_SAGA must be a dict.", id="django_saga.E001")]
    for key in sorted(set(given) - set(DEFAULTS), key=repr):
        hint = f"Known keys: {', '.join(DEFAULTS)}."
        found.append(
            Error(f"DJANGO_SAGA has an unknown key {key!r}.", hint=hint, id="django_saga.E001")
        )
    for problem in problems(given.get("ALERTS", {})):
        text = f"DJANGO_SAGA['ALERTS'] {problem}."
        found.append(Error(text, id="django_saga.E002"))
    try:
        default_container()
    except SagaError as error:
        return [*found, Error(str(error), id="django_saga.E002")]
    try:
        get_backend()
    except SagaError as error:
        hint = "Install the extra: pip install 'django-saga[rq]'." if _lacks_rq() else ""
        found.append(Error(str(error), hint=hint, id="django_saga.E003"))
    else:
        if conf.BACKEND == "rq" and not apps.is_installed("django_rq"):
            hint = "Add it: its commands start the workers."
            message = "The backend is RQ, but django_rq is not in INSTALLED_APPS."
            found.append(Error(message, hint=hint, id="django_saga.E003"))
        if conf.BACKEND == "rq":
            found += _check_queues()
    found += [*_check_authorize(), *_check_links()]
    if not settings.USE_TZ:
        hint = "Set USE_TZ = True; leases and waits are stored in UTC."
        found.append(Warning("USE_TZ is off.", hint=hint, id="django_saga.W001"))
    return found


def _check_queues() -> list[CheckMessage]:
    known = getattr(settings, "RQ_QUEUES", {})
    return [
        Error(
            f"The queue {saga.queue!r} of {saga.name} is not defined in RQ_QUEUES.",
            hint="Define it there, and start a worker for it.",
            obj=saga,
            id="django_saga.E008",
        )
        for saga in registry.all_sagas()
        if saga.queue is not None and saga.queue not in known
    ]


def _check_authorize() -> list[CheckMessage]:
    from django_saga.operations.asking import authorizer

    try:
        authorizer()
    except SagaError as error:
        return [Error(str(error), id="django_saga.E002")]
    return []


def _check_links() -> list[CheckMessage]:
    from django_saga.admin.links import PLACES, is_usable, unknown_places

    places = ", ".join(f"{{{place}}}" for place in PLACES)
    hint = f"Give a label and an http or https address, in which {places} are filled in."
    links = conf.LINKS if isinstance(conf.LINKS, (list, tuple)) else [conf.LINKS]
    found: list[CheckMessage] = []
    for link in links:
        said = f"DJANGO_SAGA['LINKS'] has {shown(link)}"
        if not is_usable(link):
            found.append(Error(f"{said}, which is no link.", hint=hint, id="django_saga.E002"))
        elif unknown := ", ".join(unknown_places(link)):
            what = f"{said}, in which nothing fills in {unknown}."
            found.append(Warning(what, hint=hint, id="django_saga.W004"))
    return found


def _lacks_rq() -> bool:
    return conf.BACKEND == "rq" and find_spec("django_rq") is None


@register("django_saga")
def check_sagas(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """E004 name taken twice, E005 context not storable, E007 no act, W002 atomic elsewhere."""
    found: list[CheckMessage] = []
    names: dict[str, Any] = {}
    for saga in registry.all_sagas():
        first = names.setdefault(saga.name, saga)
        if first is not saga:
            found.append(
                Error(
                    f"The saga name {saga.name!r} is taken by {_path(first)} and by {_path(saga)}.",
                    hint="Give one of them a name of its own.",
                    obj=saga,
                    id="django_saga.E004",
                )
            )
        try:
            _ = saga.definition.codec
        except SagaError as error:
            hint = "SagaContext says which types a field may have."
            found.append(Error(str(error), hint=hint, obj=saga, id="django_saga.E005"))
        found += [*_check_acts(saga), *_check_atomic_steps(saga)]
    return found


def _check_acts(saga: Any) -> list[CheckMessage]:
    steps = set(saga.definition.steps.values())
    return [
        Error(
            f"Step {step.__qualname__} of {saga.name} has no act().",
            obj=saga,
            id="django_saga.E007",
        )
        for step in steps
        if step.act is SagaStepHandler.act
    ]


def _check_atomic_steps(saga: Any) -> list[CheckMessage]:
    alias = _connection().alias
    atomic = sorted({name for name, rules in saga.definition.rules.items() if rules.atomic})
    if alias == DEFAULT_DB_ALIAS or not atomic:
        return []
    hint = "Let the router send the models that they write there too, and silence this check."
    return [
        Warning(
            f"The atomic steps {', '.join(atomic)} of {saga.name} run in a transaction on "
            f"{alias!r}, where the sagas are stored; what they write elsewhere is not in it.",
            hint=hint,
            obj=saga,
            id="django_saga.W002",
        )
    ]


def _path(saga: type) -> str:
    return f"{saga.__module__}.{saga.__qualname__}"


@register("django_saga")
def check_sqlite(
    app_configs: Sequence[AppConfig] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    """W003 SQLite whose transactions begin as DEFERRED."""
    connection = _connection()
    options = connection.settings_dict.get("OPTIONS") or {}
    mode = str(options.get("transaction_mode") or "").upper()
    if connection.vendor != "sqlite" or mode in ("IMMEDIATE", "EXCLUSIVE"):
        return []
    return [
        Warning(
            f"The SQLite database {connection.alias!r} begins transactions as DEFERRED; with "
            "several processes that ends in 'database is locked'.",
            hint="Set OPTIONS = {'transaction_mode': 'IMMEDIATE'} for it.",
            id="django_saga.W003",
        )
    ]


@register(Tags.database)
def check_database(databases: Sequence[str] | None = None, **kwargs: Any) -> list[CheckMessage]:
    """E006 a database that is not supported; asks the server, so with --database only."""
    connection = _connection()
    if connection.alias not in (databases or ()) or _is_supported(connection):
        return []
    return [
        Error(
            f"django-saga does not run on the database {connection.alias!r} "
            f"({connection.display_name}).",
            hint="Use PostgreSQL, SQLite or MariaDB for the alias that holds SagaExecution.",
            id="django_saga.E006",
        )
    ]


def _is_supported(connection: Any) -> bool:
    if connection.vendor == "mysql":
        return bool(connection.mysql_is_mariadb)
    return connection.vendor in DIALECTS


def _connection() -> Any:
    from django_saga.models import SagaExecution

    return connections[router.db_for_write(SagaExecution)]
