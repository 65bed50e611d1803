"""Rules of the product, and how to switch each off in this process, for good.

For canaries: a battery that stays green without a rule would not have seen it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from django_saga import StorageUnavailable, machine
from django_saga.drivers import AsyncDriver
from django_saga.flow import HandlerRaised
from django_saga.keeper import keeper
from django_saga.models import SagaExecution
from django_saga.steps import CurrentStep
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.base import Claim
from django_saga.storage.sql import Statements


def an_atomic_step_and_its_checkpoint_share_a_transaction() -> None:
    @contextmanager
    def none(self: Any, lease: float) -> Iterator[None]:
        yield

    DjangoSagaStorage.atomic = none


def an_actions_key_is_the_same_at_each_attempt() -> None:
    key = CurrentStep.idempotency_key.fget
    assert key is not None
    CurrentStep.idempotency_key = property(lambda step: f"{key(step)}:{step.attempt}")


def an_act_that_was_lost_is_undone_too() -> None:
    machine.effects_if_lost = lambda state, rules: state.effects


def a_lease_keeps_other_drivers_out() -> None:
    acquire = DjangoSagaStorage.acquire

    def anyway(self: Any, saga_id: UUID, **given: Any) -> Claim:
        held = SagaExecution.objects.using(self.alias).values_list("token", flat=True)
        return acquire(self, saga_id, **{**given, "token": held.get(pk=saga_id)})

    DjangoSagaStorage.acquire = anyway


def a_checkpoint_names_its_token() -> None:
    _drop_condition("token = %s")


def a_checkpoint_names_its_place() -> None:
    for column in ("status", "step", "action", "attempt"):
        _drop_condition(f"{column} = %s")


def a_checkpoint_names_its_token_and_its_place() -> None:
    a_checkpoint_names_its_token()
    a_checkpoint_names_its_place()


def a_lost_connection_is_no_failure() -> None:
    checkpoint = DjangoSagaStorage.checkpoint

    def failing(self: DjangoSagaStorage, *args: Any, **kwargs: Any) -> Any:
        try:
            return checkpoint(self, *args, **kwargs)
        except StorageUnavailable as error:
            raise HandlerRaised(error) from error

    DjangoSagaStorage.checkpoint = failing


def a_lost_commit_that_several_share_is_looked_for() -> None:
    write_all, write_together = DjangoSagaStorage._write_all, DjangoSagaStorage.write_together
    written: list[Any] = []

    def noting(self: DjangoSagaStorage, *args: Any) -> Any:
        written[:] = write_all(self, *args)
        return [*written]

    def believing(self: DjangoSagaStorage, writes: Any) -> Any:
        came = write_together(self, writes)
        lost = all(isinstance(outcome, StorageUnavailable) for outcome in came)
        return written if lost and len(came) > 1 else came

    DjangoSagaStorage._write_all = noting
    DjangoSagaStorage.write_together = believing


def a_step_in_flight_outlives_its_driver() -> None:
    async def straight(self: Any, flow: Any, run: Any = None, *, give_up: Any = None) -> Any:
        return await self._drive(flow)

    AsyncDriver.drive = straight


def a_long_steps_lease_is_renewed() -> None:
    keeper.watch = lambda run: None


def _drop_condition(condition: str) -> None:
    """Of the statement that writes a checkpoint; its parameters stay as they are."""
    update = Statements.update

    def without(self: Statements, *kind: Any) -> str:
        change, where = update(self, *kind).split(" WHERE ")
        assert condition in where
        return f"{change} WHERE {where.replace(condition, f'({condition} OR 1 = 1)')}"

    Statements.update = without


SWITCH_OFF: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        an_atomic_step_and_its_checkpoint_share_a_transaction,
        an_actions_key_is_the_same_at_each_attempt,
        an_act_that_was_lost_is_undone_too,
        a_checkpoint_names_its_token,
        a_checkpoint_names_its_place,
        a_checkpoint_names_its_token_and_its_place,
        a_lost_connection_is_no_failure,
        a_lost_commit_that_several_share_is_looked_for,
        a_lease_keeps_other_drivers_out,
        a_step_in_flight_outlives_its_driver,
        a_long_steps_lease_is_renewed,
    )
}
