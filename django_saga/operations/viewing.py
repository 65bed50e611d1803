"""Looking at what is masked otherwise: it takes a permission, and leaves an entry."""

from __future__ import annotations

from typing import Unpack
from uuid import UUID

from django_saga.models import SagaExecution
from django_saga.operations.asking import Asked, audited, authorize
from django_saga.operations.executing import read

PERMISSION = "django_saga.view_context_sagaexecution"


def view_context(saga_id: UUID | str, **asked: Unpack[Asked]) -> SagaExecution:
    """An execution whose contexts are about to be shown as they are stored, with nothing masked.

    Raises PermissionDenied where a given user lacks ``view_context_sagaexecution``, SagaNotFound,
    and SagaError where its row cannot be read.
    """
    with audited("view_context", PERMISSION, asked) as (entry, storage):
        execution: SagaExecution = read(saga_id, storage)
        entry.saga, entry.execution_id = execution.saga, execution.id
        authorize(asked.get("user"), "view_context", execution)
    return execution
