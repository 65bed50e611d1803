"""Sagas for Django: business transactions over several services, that compensate and recover."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django_saga.context import SENSITIVE, SagaContext
from django_saga.exceptions import (
    Abort,
    CircuitOpen,
    InsideTransaction,
    InvalidContext,
    InvalidDefinition,
    InvalidSettings,
    LeaseLost,
    RetryLater,
    SagaAlreadyRunning,
    SagaError,
    SagaFailed,
    SagaLimitReached,
    SagaNotFound,
    SagaPaused,
    SagaStuck,
    StorageUnavailable,
    TransactionLeftOpen,
    UnknownSaga,
)
from django_saga.machine import Retry
from django_saga.saga import Saga
from django_saga.steps import Fallback, SagaStepHandler, SagaStepResult, current_step
from django_saga.transaction import SagaTransaction

if TYPE_CHECKING:
    from django_saga.recovery import arecover_saga, recover_saga

__all__ = [
    "SENSITIVE",
    "Abort",
    "CircuitOpen",
    "Fallback",
    "InsideTransaction",
    "InvalidContext",
    "InvalidDefinition",
    "InvalidSettings",
    "LeaseLost",
    "Retry",
    "RetryLater",
    "Saga",
    "SagaAlreadyRunning",
    "SagaContext",
    "SagaError",
    "SagaFailed",
    "SagaLimitReached",
    "SagaNotFound",
    "SagaPaused",
    "SagaStepHandler",
    "SagaStepResult",
    "SagaStuck",
    "SagaTransaction",
    "StorageUnavailable",
    "TransactionLeftOpen",
    "UnknownSaga",
    "arecover_saga",
    "current_step",
    "recover_saga",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # What only workers and recovery need: a web process starts sooner without.
    if name in ("arecover_saga", "recover_saga"):
        from django_saga import recovery

        return getattr(recovery, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
