"""The Django admin of executions: see what happened, and act on it. Nothing can be edited."""

from __future__ import annotations

from django_saga.admin.audit import SagaAuditEntryAdmin
from django_saga.admin.batches import SagaBatchAdmin
from django_saga.admin.executions import SagaExecutionAdmin
from django_saga.admin.groups import SagaFailureGroupAdmin
from django_saga.admin.pauses import SagaPauseAdmin

__all__ = [
    "SagaAuditEntryAdmin",
    "SagaBatchAdmin",
    "SagaExecutionAdmin",
    "SagaFailureGroupAdmin",
    "SagaPauseAdmin",
]
