"""What an operator can have done; for code, the admin and commands alike.

Every function looks at permission and state itself, where the work is done, and leaves an entry in
the audit table, of refusals too. Beside its own arguments each takes those of :class:`Asked`.
"""

from __future__ import annotations

from django_saga.operations.asking import Asked, Operator
from django_saga.operations.cancelling import cancel, release
from django_saga.operations.executing import retry_id
from django_saga.operations.forcing import (
    abandon,
    edit_context,
    mark_done,
    resolve,
    resume_forward,
    skip,
)
from django_saga.operations.noting import mute, note
from django_saga.operations.pausing import pause, resume
from django_saga.operations.retrying import recover, retry
from django_saga.operations.verbs import BULK, RECOVER, RETRY, VERBS, Verb
from django_saga.operations.viewing import view_context

__all__ = [
    "BULK",
    "RECOVER",
    "RETRY",
    "VERBS",
    "Asked",
    "Operator",
    "Verb",
    "abandon",
    "cancel",
    "edit_context",
    "mark_done",
    "mute",
    "note",
    "pause",
    "recover",
    "release",
    "resolve",
    "resume",
    "resume_forward",
    "retry",
    "retry_id",
    "skip",
    "view_context",
]
