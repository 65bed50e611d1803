"""Causes: what is counted together, what is told apart, and when a group of failures is made."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import connections, transaction
from hypothesis import given
from hypothesis import strategies as st

from django_saga import LeaseLost, Retry, Saga, SagaError, SagaFailed
from django_saga.causes import Cause, frame_of, stripped
from django_saga.machine import Action, Outcome
from django_saga.models import SagaExecution, SagaFailureGroup, SagaStepRecord
from django_saga.operations import retry
from django_saga.recovery import recover_saga
from django_saga.storage import DjangoSagaStorage
from tests.operated import (
    WORLD,
    Pack,
    Trip,
    TripSaga,
    changed,
    failed_trip,
    halted_trip,
    lost_trip,
    run_trip,
    stuck_trip,
)

pytestmark = pytest.mark.usefixtures("alone")

ALIASES = list(django_settings.DATABASES)


class Cancelled(Exception):
    """A project's own error, that happens to be called so."""


class Unpaid(Pack):
    """Fails in ways of its own."""

    def act(self, context: Trip) -> None:
        if context.traveller == "Cancelled":
            raise Cancelled("the bank did that")
        if context.traveller == "json":
            json.loads("{")
        raise ValueError(f"no account {context.traveller}")


class Doubtful(Unpaid):
    uncertain = (ValueError,)


class Insistent(Unpaid):
    retry = Retry(attempts=2, delay=0)


def saga_of(step: type[Pack], name: str = "tests.CausesSaga") -> Saga[Trip]:
    return Saga[Trip](steps=[step], name=name)


def groups(alias: str = "default") -> list[SagaFailureGroup]:
    """Those of acts first; two may come up within one millisecond."""
    return list(SagaFailureGroup.objects.using(alias).order_by("action", "first_seen", "id"))


def fail(saga: Saga[Trip], traveller: str = "A") -> SagaExecution:
    with pytest.raises(SagaFailed) as caught:
        saga.run(Trip(traveller))
    return SagaExecution.objects.get(pk=caught.value.execution.pk)


# What a message comes to


@pytest.mark.parametrize(
    "message",
    [
        "order {} of customer {} was refused",
        "order '{}' has no account \"{}\"",
        "can't charge '{}': the card wasn't accepted, says '{}'",
        "the customer's order '{}' isn't '{}'",
        "{}: timed out after {} s",
        "https://bank.example/v1/{}?at={}",
        "no account\nfor {} and {}",
    ],
)
def test_what_differs_from_one_to_the_next_is_left_out(message: str) -> None:
    one = message.format(uuid.UUID(int=1), 17)
    assert stripped(one) == stripped(message.format(uuid.uuid4(), 4_000))
    assert stripped(one)


@pytest.mark.parametrize("message", ["can't find '{}'", "no '{}' in the customers' list", '"{}"'])
def test_what_is_quoted_is_left_out_whatever_it_is(message: str) -> None:
    assert stripped(message.format("Grace")) == stripped(message.format("Ada"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no money", "no seats"),
        ("card 12 was refused", "card 12 has expired"),
        ("can't pay", "can't wait"),
        ("it's late, isn't it", "it's late, and it isn't"),
    ],
)
def test_what_is_said_otherwise_stays_different(one: str, other: str) -> None:
    assert stripped(one) != stripped(other)


@given(st.text(max_size=2_000))
def test_whatever_is_said_comes_to_little(message: str) -> None:
    assert len(stripped(message)) <= 120
    assert "\n" not in stripped(message)


def test_a_long_message_takes_no_time() -> None:
    """Nor one that is made for a pattern to choke on: it would be read within each checkpoint."""
    for text in ("'" * 100_000, '"' * 100_000, "a-" * 100_000, "1" * 100_000, "' " * 100_000):
        assert len(stripped(text)) <= 120


ONE = Cause("s", "A", Action.ACT, Outcome.FAILED, "ValueError", "orders.pay", "no account 7")


@pytest.mark.parametrize(
    "changes",
    [
        {"saga": "other"},
        {"step": "B"},
        {"action": Action.COMPENSATE},
        {"outcome": Outcome.UNKNOWN},
        {"error_type": "KeyError"},
        {"frame": "orders.charge"},
        {"message": "no money"},
    ],
)
def test_each_part_of_a_cause_tells_it_from_others(changes: dict[str, Any]) -> None:
    import msgspec

    assert msgspec.structs.replace(ONE, **changes).id != ONE.id
    assert msgspec.structs.replace(ONE, message="no account 8").id == ONE.id


# The frame


def test_the_frame_is_the_innermost_of_the_projects_own_code() -> None:
    def ours() -> None:
        json.loads("{")

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ours()
    assert frame_of(caught.value).startswith(f"{__name__}.test_the_frame_is")
    assert frame_of(caught.value).endswith("<locals>.ours")


def test_an_error_that_no_code_of_the_projects_raised_has_no_frame() -> None:
    assert frame_of(ValueError("never raised")) == ""
    with pytest.raises(SagaError) as caught:
        raise SagaError("ours")
    caught.value.__traceback__ = None
    assert frame_of(caught.value) == ""
    with pytest.raises(ZeroDivisionError) as made:
        exec("1 / 0", {})
    trace = made.value.__traceback__
    assert trace is not None
    made.value.__traceback__ = trace.tb_next
    assert frame_of(made.value) == "", "what was made of a text is nobody's file"


def test_a_long_name_of_a_frame_fits_its_column() -> None:
    name = "f" * 400
    space: dict[str, Any] = {"__name__": "m"}
    exec(compile(f"def {name}(): 1 / 0", __file__, "exec"), space)
    with pytest.raises(ZeroDivisionError) as caught:
        space[name]()
    assert len(frame_of(caught.value)) == 255


# The groups that are made


def test_equal_failures_form_one_group_which_their_executions_name(alias: str) -> None:
    first = run_trip(alias=alias, act_Pay="order 17 refused")
    other = run_trip(alias=alias, act_Pay="order 18 refused")
    (group,) = groups(alias)
    assert first.failure_group == other.failure_group == group.id
    assert (group.saga, group.step, group.action) == ("tests.TripSaga", "Pay", "act")
    assert (group.outcome, group.error_type) == ("FAILED", "Sorry")
    assert group.frame == "tests.operated.World.call"
    assert group.message == "order 17 refused", "the sample is the first"
    assert abs((group.first_seen - first.updated_at).total_seconds()) < 60


def test_another_step_error_or_frame_is_another_group(alias: str) -> None:
    executions = [
        run_trip(alias=alias, act_Pay="no"),
        run_trip(alias=alias, act_Pack="no"),
        run_trip(alias=alias, act_Pay="never"),
        run_trip(alias=alias, compensate_Pack="no", act_Pay="no"),
    ]
    assert len({execution.failure_group for execution in executions}) == 4
    assert {execution.failure_group for execution in executions} <= {g.id for g in groups(alias)}


def test_what_is_unknown_is_told_from_what_is_known_to_have_failed() -> None:
    known, unknown = fail(saga_of(Unpaid)), fail(saga_of(Doubtful))
    assert [group.outcome for group in groups()] == ["FAILED", "UNKNOWN"]
    assert known.failure_group != unknown.failure_group


def test_an_error_of_a_library_is_known_by_the_line_that_called_it() -> None:
    fail(saga_of(Unpaid), "json")
    (group,) = groups()
    assert (group.error_type, group.frame) == ("JSONDecodeError", f"{__name__}.Unpaid.act")


def test_what_succeeds_after_all_makes_none() -> None:
    WORLD.trouble = {"act Pack": "not yet"}

    class Twice(Pack):
        retry = Retry(attempts=2, delay=0)

        def act(self, context: Trip) -> None:
            try:
                super().act(context)
            finally:
                WORLD.trouble = {}

    assert saga_of(Twice).run(Trip()).failure_group == ""
    assert groups() == []
    assert fail(saga_of(Insistent)).failure_group
    assert len(groups()) == 1


def test_a_projects_own_error_that_is_called_cancelled_is_a_failure() -> None:
    assert fail(saga_of(Unpaid), "Cancelled").failure_group == groups()[0].id


def test_what_a_consumer_raised_between_two_steps_has_a_group() -> None:
    def consume() -> None:
        with TripSaga().transaction(Trip()) as steps:
            for _ in steps:
                raise ValueError("I changed my mind")

    with pytest.raises(ValueError, match="changed my mind"):
        consume()
    row = SagaExecution.objects.get()
    assert (row.status, row.failure_group) == ("FAILED", groups()[0].id)


def test_a_failed_compensation_has_a_group_of_its_own(alias: str) -> None:
    stuck = stuck_trip(alias=alias)
    turned, failed = groups(alias)
    assert (turned.step, turned.action, turned.message) == ("Leave", "act", "fog")
    assert (failed.step, failed.action, failed.message) == ("Pack", "compensate", "bag lost")
    assert stuck.failure_group == failed.id


def test_what_is_undone_after_a_failed_compensation_does_not_hide_it(alias: str) -> None:
    """The execution gets stuck with the last that is undone; the cause is the one before."""
    stuck = run_trip(alias=alias, act_Leave="fog", compensate_Pay="spent")
    assert stuck.status == "STUCK"
    assert [(g.step, g.message) for g in groups(alias)] == [("Leave", "fog"), ("Pay", "spent")]
    assert stuck.failure_group == groups(alias)[-1].id


def test_stuck_by_a_lost_definition_or_a_lost_driver_has_a_group(alias: str) -> None:
    gone = changed(lost_trip(alias=alias), saga="gone.Saga")
    assert recover_saga(gone.pk, storage=DjangoSagaStorage(alias)).status == "STUCK"
    row = SagaExecution.objects.using(alias).get()
    (group,) = groups(alias)
    assert (row.failure_group, group.saga, group.step) == (group.id, "gone.Saga", "Pack")
    assert (group.error_type, group.outcome, group.frame) == ("SagaStuck", "UNKNOWN", "")
    halted = halted_trip(alias=alias)
    assert halted.failure_group in {group.id for group in groups(alias)}
    assert halted.failure_group != row.failure_group


def test_a_stuck_one_that_fails_again_of_the_same_stays_in_its_group(alias: str) -> None:
    stuck = stuck_trip(alias=alias)
    WORLD.trouble = {"compensate Pack": "bag lost"}
    assert retry(stuck.pk, storage=DjangoSagaStorage(alias)).failure_group == stuck.failure_group
    assert len(groups(alias)) == 2


def test_the_note_of_a_group_outlasts_further_failures(alias: str) -> None:
    run_trip(alias=alias, act_Pay="no money")
    SagaFailureGroup.objects.using(alias).update(note="ask the bank", message="kept")
    failed_trip(alias=alias)
    (group,) = groups(alias)
    assert (group.note, group.message) == ("ask the bank", "kept")


@pytest.mark.parametrize("text", ["\x00", "\ud800", "ü 'x' \U0001f600", "x" * 10_000, ""])
def test_an_error_of_any_text_makes_a_group(text: str, alias: str) -> None:
    failed = run_trip(alias=alias, act_Pay=text)
    assert failed.failure_group == groups(alias)[0].id


def at_once(calls: list[Callable[[], Any]]) -> None:
    barrier = threading.Barrier(len(calls))
    errors: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_group_is_made_once_by_many_at_once(alias: str) -> None:
    WORLD.trouble = {"act Pay": "no money"}

    def run() -> None:
        with pytest.raises(SagaFailed):
            TripSaga(storage=DjangoSagaStorage(alias)).run(Trip())

    at_once([run] * 6)
    (group,) = groups(alias)
    rows = SagaExecution.objects.using(alias)
    assert list(rows.values_list("failure_group", flat=True)) == [group.id] * 6


def test_a_driver_that_was_fenced_off_makes_none(alias: str) -> None:
    def meanwhile() -> None:
        row = SagaExecution.objects.using(alias).get()
        changed(row, token=row.token + 1, driver="another")

    WORLD.trouble, WORLD.interlude = {"act Pack": "no"}, meanwhile
    with pytest.raises(LeaseLost):
        TripSaga(storage=DjangoSagaStorage(alias)).run(Trip())
    assert groups(alias) == []
    assert SagaExecution.objects.using(alias).get().failure_group == ""
    assert not SagaStepRecord.objects.using(alias).exists()


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias != "sqlite"], indirect=True)
def test_a_group_is_rolled_back_with_the_checkpoint_that_made_it(alias: str) -> None:
    """No group is left without an execution; SQLite would take any number."""
    from django.db import DatabaseError

    from django_saga import machine
    from django_saga.storage.base import Checkpoint

    storage = DjangoSagaStorage(alias)
    state = machine.start(TripSaga.definition.plan, "{}")
    claim = storage.create(uuid.uuid4(), TripSaga.name, state, driver="me", lease=60)
    assert claim is not None
    failed = machine.turn_back(state, machine.Error("E", "no"))
    record = machine.Record(step="Pack", action=Action.ACT, attempt=2**40, outcome=Outcome.FAILED)
    with pytest.raises((DatabaseError, SagaError)):
        storage.checkpoint(
            Checkpoint(
                id=claim.id,
                token=claim.token,
                before=state,
                after=failed.state,
                record=record,
                cause=ONE,
            )
        )
    assert groups(alias) == []
    assert SagaExecution.objects.using(alias).get().status == "RUNNING"


def test_what_is_rolled_back_with_a_callers_transaction_leaves_no_group(alias: str) -> None:
    stuck = stuck_trip(alias=alias)
    SagaFailureGroup.objects.using(alias).all().delete()
    with transaction.atomic(using=alias):
        retry(stuck.pk, storage=DjangoSagaStorage(alias))
        transaction.set_rollback(True, using=alias)
    assert groups(alias) == []


def test_what_is_undone_after_all_is_the_failure_of_its_act_again() -> None:
    stuck = stuck_trip()
    assert SagaFailureGroup.objects.get(pk=stuck.failure_group).action == "compensate"
    WORLD.trouble = {}
    retry(stuck.pk)
    undone = SagaExecution.objects.get(pk=stuck.pk)
    group = SagaFailureGroup.objects.get(pk=undone.failure_group)
    assert (undone.status, group.action, group.step) == ("FAILED", "act", undone.failed_step)
