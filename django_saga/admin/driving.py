"""Where sagas are driven in this process, a request drives its batch for a few seconds itself."""

from __future__ import annotations

import logging
from typing import Any

from django.contrib import messages
from django.db import DatabaseError
from django.http import HttpRequest
from django.utils.translation import gettext as _

from django_saga import batches
from django_saga.backends import get_backend
from django_saga.exceptions import SagaError
from django_saga.models import SagaBatch

logger = logging.getLogger("django_saga.admin")


def drive_here(model_admin: Any, request: HttpRequest, batch: SagaBatch, seconds: float) -> None:
    """Begin with a batch, unless workers do; what is left is left to ``recover_sagas``."""
    if get_backend().queues or batch.status != SagaBatch.Status.RUNNING:
        return
    try:
        batches.work(batch.pk, seconds=seconds)
    except (SagaError, DatabaseError) as error:
        logger.error("Batch %s was not driven here: %s", batch.pk, error)
        text = _("It could not be begun here; recover_sagas drives it on: %(error)s")
        model_admin.message_user(request, text % {"error": error}, messages.WARNING)
