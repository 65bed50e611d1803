"""The Django admin of executions: see what happened, and act on it. Nothing can be edited."""

from __future__ import annotations

from django_saga.admin.executions import SagaExecutionAdmin

__all__ = ["SagaExecutionAdmin"]
