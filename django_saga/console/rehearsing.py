"""What a verb would do, found out by doing it in a transaction that is rolled back.

So it is refused for the very reasons for which it would be. No handler is called: what is driven is
driven after the commit that never comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import transaction

from django_saga.documents import Document
from django_saga.exceptions import SagaError, StorageUnavailable
from django_saga.models import SagaExecution
from django_saga.operations import RECOVER, Verb
from django_saga.operations.asking import authorize, permit
from django_saga.operations.executing import _refusal, read
from django_saga.prospects import will_run
from django_saga.storage import DjangoSagaStorage
from django_saga.texts import told
from django_saga.verdicts import Verdict

POSSIBLE, REFUSED = "possible", "refused"
UNSAID = "(not given yet)"  # the reason that a rehearsal goes without


@contextmanager
def undone() -> Iterator[None]:
    """A transaction that is rolled back at its end."""
    alias = DjangoSagaStorage().alias
    with transaction.atomic(using=alias):
        yield
        transaction.set_rollback(True, using=alias)


def rehearse(verb: Verb, given: dict[str, Any]) -> Document:
    """What would come of it, touching nothing."""
    found = {"id": str(given["saga_id"])}
    storage = DjangoSagaStorage()
    try:
        permit(given.get("user"), verb.permission)
        with undone():
            before = read(given["saga_id"], storage, verb)
            found |= {"saga": before.saga, "status": before.status}
            after = _look(verb, before, given) if verb is RECOVER else _try(verb, given)
    except StorageUnavailable:
        raise
    except (SagaError, PermissionDenied) as error:
        return {**found, "result": REFUSED, "says": told(error)}
    says = will_run(before, before.verdict, verb.name) or str(verb.help)
    return {**found, "result": POSSIBLE, "would_be": after.status, "says": says}


def _try(verb: Verb, given: dict[str, Any]) -> SagaExecution:
    return verb.function(**{**given, "reason": given["reason"] or UNSAID})  # type: ignore[no-any-return]


def _look(verb: Verb, execution: Any, given: dict[str, Any]) -> SagaExecution:
    """For what cannot be rolled back: it would be driven at once."""
    authorize(given.get("user"), verb.name, execution)
    if execution.verdict not in verb.allowed:
        raise _refusal(execution, Verdict(execution.verdict), DjangoSagaStorage())
    return execution  # type: ignore[no-any-return]
