"""What a person takes upon themselves: to say where an execution stands, or that it is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Unpack
from uuid import UUID

from django_saga import interventions, registry
from django_saga.changes import changes, unknown_fields, unmasked
from django_saga.conf import conf
from django_saga.exceptions import InvalidContext, SagaError
from django_saga.machine import State, StepRules, Transition
from django_saga.masking import sensitive_values
from django_saga.models import SagaAuditEntry, SagaExecution
from django_saga.operations.asking import Asked, reason_of, who
from django_saga.operations.executing import change, name, operate
from django_saga.operations.verbs import (
    ABANDON,
    EDIT_CONTEXT,
    MARK_DONE,
    RESOLVE,
    RESUME_FORWARD,
    SKIP,
    Verb,
)
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Claim
from django_saga.texts import told
from django_saga.verdicts import DatabaseNow


def resume_forward(saga_id: UUID | str, **asked: Unpack[Asked]) -> SagaExecution:
    """Begin again the step at which a STUCK execution stands, if it had not turned back."""
    return _changed(RESUME_FORWARD, saga_id, asked, interventions.resume_forward)


def skip(saga_id: UUID | str, **asked: Unpack[Asked]) -> SagaExecution:
    """Go on without the act of the step at which it stands.

    The reason is the evidence that the act had no effect and that the saga does without it: it
    will not be compensated.
    """
    return _changed(SKIP, saga_id, asked, interventions.skip)


def mark_done(saga_id: UUID | str, step: str, **asked: Unpack[Asked]) -> SagaExecution:
    """Say that somebody did by hand what ``step`` was to do: its act, or else its compensation."""
    return _changed(
        MARK_DONE, saga_id, asked, lambda state: interventions.mark_done(state, step), step
    )


def edit_context(saga_id: UUID | str, context: str, **asked: Unpack[Asked]) -> SagaExecution:
    """Put another context, as JSON, in the place of the stored one.

    Where it has a mask that stands for a secret of the stored one, it keeps that. Raises
    InvalidContext where it does not fit the saga's type, or has a mask anywhere else, and SagaError
    where the saga does not allow it (``Saga.context_editable``).
    """

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        saga = registry.find_saga(execution.saga)
        if not saga.context_editable:
            raise SagaError(f"Saga {saga.name} does not allow it: its context_editable is False.")
        codec = saga.definition.codec
        whole = unmasked(context, execution.context, codec.sensitive)
        try:
            encoded = codec.encode(codec.decode(whole), limit=conf.CONTEXT_LIMIT)
        except InvalidContext as error:  # which may quote what was masked
            secrets = sensitive_values(execution.context, codec.sensitive)
            raise InvalidContext(told(error, secrets)) from error
        if unknown := unknown_fields(whole, encoded):  # a slip; it would be dropped in silence
            raise InvalidContext(f"The context of {saga.name} has no {', '.join(unknown)}.")
        entry.detail = changes(execution.context, encoded, codec.sensitive)

        def edited(claim: Claim) -> Transition:
            return interventions.edit_context(claim.state, encoded, claim.wait)

        change(execution, storage, edited)
        return execution.id

    return operate(EDIT_CONTEXT, saga_id, asked, work)


def resolve(saga_id: UUID | str, standing: Iterable[str], **asked: Unpack[Asked]) -> SagaExecution:
    """Close a STUCK execution: it stays STUCK, but asks for nobody's attention any more.

    ``standing`` names each step whose effect stands, or may stand: whoever resolves it has seen
    them all. Raises SagaError where these are others.
    """
    acknowledged = set(standing)

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        stands = set(interventions.standing_steps(execution.state))
        if acknowledged != stands:
            names = ", ".join(sorted(stands)) or "no step"
            raise SagaError(f"{name(execution)}: what stands is of {names}; acknowledge just that.")
        _settle(execution, storage)
        entry.detail = f"Standing: {', '.join(sorted(stands)) or 'nothing'}."
        return execution.id

    return operate(RESOLVE, saga_id, asked, work)


def abandon(saga_id: UUID | str, confirm: str, **asked: Unpack[Asked]) -> SagaExecution:
    """End it where it stands, as STUCK and settled, with nothing compensated.

    ``confirm`` is its id once more: what stands, stands from then on.
    """
    why = f"Abandoned by {who(asked)}: {reason_of(asked)}"

    def ended(claim: Claim) -> Transition:
        return interventions.abandon(claim.state, why, StepRules(atomic=claim.state.atomic))

    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        if confirm.strip().lower() != str(execution.id):
            raise SagaError("Type the whole id of the execution to abandon it.")
        stands = interventions.standing_steps(change(execution, storage, ended))
        _settle(execution, storage)
        entry.detail = f"Standing: {', '.join(stands) or 'nothing'}."
        return execution.id

    return operate(ABANDON, saga_id, asked, work)


def _changed(
    verb: Verb,
    saga_id: UUID | str,
    asked: Asked,
    to: Callable[[State], Transition],
    step: str = "",
) -> SagaExecution:
    def work(execution: SagaExecution, storage: DjangoSagaStorage, entry: SagaAuditEntry) -> UUID:
        entry.step = step or entry.step
        change(execution, storage, lambda claim: to(claim.state))
        return execution.id

    return operate(verb, saga_id, asked, work)


def _settle(execution: SagaExecution, storage: DjangoSagaStorage) -> None:
    rows = SagaExecution.objects.using(storage.alias).filter(pk=execution.id)
    rows.filter(status=SagaExecution.Status.STUCK).update(settled_at=DatabaseNow())
