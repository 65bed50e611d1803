"""Rows as documents with stable keys, for commands and exports. Texts and contexts are masked."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from django.db.models import Model

from django_saga import registry
from django_saga.exceptions import SagaError
from django_saga.masking import mask_json, mask_text
from django_saga.models import SagaExecution

Document = dict[str, Any]

# All of an execution but what is long: the plan, the effects and the contexts.
EXECUTION = (
    *("id", "saga", "status", "step", "action", "attempt", "failures", "in_flight", "failed_step"),
    *(
        "error_type",
        "error_message",
        "stuck_reason",
        "cancel_reason",
        "failure_group",
        "recoveries",
    ),
    *("retry_of_id", "driver", "token", "created_at", "updated_at", "finished_at", "settled_at"),
    "blanked_at",
    *("wake_at", "lease_until", "grace_until"),
)
RECORD = (
    *("step", "action", "attempt", "outcome", "error_type", "error_message", "duration", "changes"),
    *("driver", "token", "created_at"),
)
AUDIT = (
    *("id", "at", "user_name", "source", "verb", "result", "saga", "step", "execution_id"),
    *("batch_id", "reason", "detail"),
)
GROUP = (
    *("id", "saga", "step", "action", "outcome", "error_type", "frame", "message", "first_seen"),
    *("note", "muted_until"),
)
PAUSE = ("saga", "step", "reason", "user_name", "created_at")

_TOLD = {"error_message", "stuck_reason", "cancel_reason", "message", "reason", "detail"}


def document(row: Model, keys: Iterable[str]) -> Document:
    """These columns of a row; times as ISO 8601, ids as texts."""
    return {key: _value(key, getattr(row, key)) for key in keys}


def _value(key: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    return mask_text(value) if key in _TOLD and isinstance(value, str) else value


def context_of(execution: SagaExecution) -> Any:
    """The stored context with its secrets masked, as JSON has it; a text where it is none.

    None where retention removed it.
    """
    if execution.blanked_at is not None:
        return None
    masked = mask_json(execution.context, _sensitive(execution))
    try:
        return json.loads(masked)
    except (ValueError, RecursionError):
        return masked


def _sensitive(execution: SagaExecution) -> Collection[str]:
    """The fields that are marked as sensitive; all, where the code cannot tell any more."""
    try:
        return registry.find_saga(execution.saga).definition.codec.sensitive
    except SagaError:
        return list(_fields(execution.context))


def _fields(context: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        fields = json.loads(context)
        if isinstance(fields, dict):
            return fields
    return {}
