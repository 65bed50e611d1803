"""Rules of the product, and how to switch each off in this process, for good.

For canaries: a battery that stays green without a rule would not have seen it go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django_saga import machine
from django_saga.steps import CurrentStep
from django_saga.storage import DjangoSagaStorage


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
    machine._effects_if_lost = lambda state, rules: state.effects


SWITCH_OFF: dict[str, Callable[[], None]] = {
    function.__name__.replace("_", " "): function
    for function in (
        an_atomic_step_and_its_checkpoint_share_a_transaction,
        an_actions_key_is_the_same_at_each_attempt,
        an_act_that_was_lost_is_undone_too,
    )
}
