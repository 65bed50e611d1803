"""Where executions are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_saga.storage.base import SagaStorage

if TYPE_CHECKING:
    from django_saga.storage.django import DjangoSagaStorage
    from django_saga.storage.memory import MemorySagaStorage

__all__ = ["DjangoSagaStorage", "MemorySagaStorage", "SagaStorage"]


def __getattr__(name: str) -> Any:
    # It brings the models in, which can be imported only once the apps are ready.
    if name == "DjangoSagaStorage":
        from django_saga.storage.django import DjangoSagaStorage

        return DjangoSagaStorage
    if name == "MemorySagaStorage":
        from django_saga.storage.memory import MemorySagaStorage

        return MemorySagaStorage
    raise AttributeError(name)
