"""The rows: executions and their history, and what operators did about them."""

from __future__ import annotations

from django_saga.models.batches import SagaBatch, SagaBatchItem
from django_saga.models.executions import SagaExecution, SagaStepRecord, changed_columns, new_id
from django_saga.models.operating import (
    SagaAlert,
    SagaAuditEntry,
    SagaFailureGroup,
    SagaHeartbeat,
    SagaPause,
)

__all__ = [
    "SagaAlert",
    "SagaAuditEntry",
    "SagaBatch",
    "SagaBatchItem",
    "SagaExecution",
    "SagaFailureGroup",
    "SagaHeartbeat",
    "SagaPause",
    "SagaStepRecord",
    "changed_columns",
    "new_id",
]
