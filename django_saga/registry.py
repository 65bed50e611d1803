"""The sagas of the project, by name; the only place where stored names become classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.apps import apps

from django_saga.conf import conf
from django_saga.exceptions import UnknownSaga

if TYPE_CHECKING:
    from django_saga.saga import Saga

_classes: dict[str, type[Saga[Any]]] = {}  # by module and qualified name: a reload replaces


def register(saga: type[Saga[Any]]) -> None:
    """Called for each class that declares ``steps``."""
    _classes[f"{saga.__module__}.{saga.__qualname__}"] = saga


def all_sagas() -> list[type[Saga[Any]]]:
    """Every registered saga, in the order of definition."""
    return list(_classes.values())


def find_saga(name: str) -> type[Saga[Any]]:
    """The saga of that name; raises :class:`UnknownSaga`."""
    for saga in reversed(_classes.values()):
        if saga.name == name:
            return saga
    raise UnknownSaga(
        f"No saga named {name!r} is registered. Define it in an installed app's sagas.py, or give "
        "the class that replaced it this name; then resume it forward, or retry to undo it."
    )


def limit_of(name: str) -> int | None:
    """How many of the saga may run at once; None for any number, or where it is not known."""
    try:
        return find_saga(name).max_running
    except UnknownSaga:
        return None


def queues() -> list[str]:
    """The queues that jobs go to: first that of the settings, then those that sagas name."""
    named = {saga.queue for saga in all_sagas() if saga.queue}
    return [conf.QUEUE, *sorted(named - {conf.QUEUE})]


def default_name(saga: type[Saga[Any]]) -> str:
    """App label and class name."""
    app = apps.get_containing_app_config(saga.__module__) if apps.apps_ready else None
    label = app.label if app else saga.__module__.partition(".")[0]
    return f"{label}.{saga.__name__}"
