"""The kit for users' own tests: it runs sagas with faults, proves good ones and finds bad ones."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import unittest
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import punq
import pybreaker
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import Group

import django_saga
from django_saga import (
    Abort,
    Fallback,
    Retry,
    RetryLater,
    Saga,
    SagaAlreadyRunning,
    SagaStepHandler,
    current_step,
)
from django_saga.backends import Backend
from django_saga.conf import conf
from django_saga.storage import DjangoSagaStorage
from django_saga.testing import (
    SagaRun,
    SagaRunner,
    SagaTestCase,
    assert_compensates_fully,
    assert_saga_is_crash_safe,
    call_twice,
    crash_after,
    crash_at,
    crash_before,
    fail_at,
    unknown_at,
)
from django_saga.testing.effects import changes
from testproject.services import Services, running
from testproject.shop.models import Order, Product
from testproject.shop.sagas import (
    BookCourier,
    ChargeCard,
    ChargeWallet,
    OrderContext,
    OrderSaga,
    ReserveStock,
    call,
)
from tests.steps import Calls, Log, make_step, raises

ROOT = Path(__file__).resolve().parent.parent
StepType = type[SagaStepHandler[Any]]


class World(list[str]):
    """A service outside: what an act did stands under its key, until it is undone by that."""

    def act(self, context: Log) -> None:
        if current_step().idempotency_key not in self:
            self.append(current_step().idempotency_key)

    def undo(self, context: Log) -> None:
        if current_step().act_idempotency_key in self:
            self.remove(current_step().act_idempotency_key)

    def effects(self) -> list[str]:
        return [key.split(":")[1] for key in self]

    def step(self, name: str, **changed: Any) -> StepType:
        return make_step(name, Calls(), **{"act": self.act, "compensate": self.undo, **changed})


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def runner() -> Iterator[SagaRunner]:
    runner = SagaRunner()
    yield runner
    runner.check_faults()


def saga_of(*steps: StepType | Fallback, **options: Any) -> Saga[Any]:
    return Saga(steps=steps, name="tests.testing", **options)


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"it slept {seconds} s")


# Running a saga


@pytest.mark.parametrize("is_async", [False, True])
def test_a_run_tells_what_was_acted_and_compensated_and_with_which_keys(
    runner: SagaRunner, world: World, is_async: bool
) -> None:
    saga = saga_of(*(world.step(name, is_async=is_async) for name in "ABC"))

    run = runner.run(saga, Log(), fail_at("C", ValueError("no room")))

    assert (run.status, run.acted, run.compensated) == ("FAILED", ["A", "B"], ["B", "A"])
    assert run.error is not None
    assert (run.error.type, run.error.message) == ("ValueError", "no room")
    id = run.saga_id
    assert [call.idempotency_key for call in run.calls] == [
        f"{id}:A:act",
        f"{id}:B:act",
        f"{id}:C:act",
        f"{id}:B:compensate",
        f"{id}:A:compensate",
    ]
    assert run.context.done == ["act A", "act B", "compensate B", "compensate A"]
    assert run.execution is not None
    assert (run.execution.status, run.execution.failed_step) == ("FAILED", "C")


def test_a_retry_waits_for_the_clock_and_never_sleeps(
    runner: SagaRunner, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", no_sleep)
    saga = saga_of(world.step("A", retry=Retry(attempts=3, delay=600.0)))

    run = runner.start(saga, Log(), fail_at("A", ValueError(), times=2))

    assert (run.status, run.wait, len(run.calls)) == ("RUNNING", 600.0, 1)
    runner.clock.move(599)
    assert (len(run.go_on().calls), run.wait) == (1, 1.0)
    runner.clock.move(1)
    assert (len(run.go_on().calls), run.wait) == (2, 1200.0)
    assert (run.finish().status, len(run.calls)) == ("COMPLETED", 3)


def test_compensations_that_are_retried_do_not_sleep_either(
    runner: SagaRunner, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", no_sleep)
    saga = saga_of(world.step("A"), world.step("B"))

    run = runner.run(saga, Log(), fail_at("B"), fail_at("A", OSError(), action="compensate"))

    assert (run.status, len(run.calls), world.effects()) == ("STUCK", 5, ["A"])
    assert "compensation of A failed" in run.stuck_reason


def test_what_waits_is_not_handed_to_the_backend_of_the_settings(
    runner: SagaRunner, world: World, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"BACKEND": f"{__name__}.Refusing"}

    saga = saga_of(world.step("A", retry=Retry(attempts=2)))

    assert runner.run(saga, Log(), fail_at("A", ValueError(), times=1)).status == "COMPLETED"


class Refusing(Backend):
    def hand_over(self, saga: Saga[Any], saga_id: Any, delay: float) -> None:
        raise AssertionError("it was handed over")

    send = hand_over


def test_a_saga_that_asks_for_ever_to_be_called_later_fails_the_test(
    runner: SagaRunner, world: World
) -> None:
    def poll(context: Log) -> None:
        raise RetryLater(60)

    with pytest.raises(AssertionError, match="still RUNNING: it never ends"):
        runner.run(saga_of(world.step("A", act=poll)), Log())


@pytest.mark.parametrize("is_async", [False, True])
def test_handlers_come_from_the_container_of_the_saga(
    runner: SagaRunner, world: World, is_async: bool
) -> None:
    made: list[StepType] = []

    class Container:
        def resolve(self, step: StepType) -> Any:
            made.append(step)
            return later(step()) if is_async else step()

    async def later(handler: Any) -> Any:
        return handler

    step = world.step("A")
    assert runner.run(saga_of(step, container=Container()), Log()).status == "COMPLETED"
    assert made == [step]


def test_a_handler_that_a_container_makes_with_arguments_can_be_proven(world: World) -> None:
    class Act(SagaStepHandler[Log]):
        def __init__(self, service: World) -> None:
            self.service = service

        def act(self, context: Log) -> None:
            self.service.act(context)

        def compensate(self, context: Log) -> None:
            self.service.undo(context)

    container = punq.Container()
    container.register(World, instance=world)
    container.register(Act)

    assert_saga_is_crash_safe(saga_of(Act, container=container), Log(), effects=world.effects)


def test_an_async_test_runs_a_saga_in_a_thread(runner: SagaRunner, world: World) -> None:
    saga = saga_of(world.step("A", is_async=True), world.step("B"))

    async def test() -> SagaRun:
        return await sync_to_async(runner.run)(saga, Log(), crash_after("A"))

    assert async_to_sync(test)().acted == ["A", "B"]


# Faults


@pytest.mark.parametrize(("crash", "effects"), [(crash_before, []), (crash_after, ["A"])])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_driver_that_died_leaves_its_lease_and_another_goes_on_when_that_has_run_out(
    runner: SagaRunner, world: World, crash: Any, effects: list[str], is_async: bool
) -> None:
    saga = saga_of(world.step("A", is_async=is_async), world.step("B"))

    run = runner.start(saga, Log(), crash("A"))

    assert (run.crashed, run.status, world.effects()) == (True, "RUNNING", effects)
    assert (run.history, run.wait) == ([], conf.LEASE)
    with pytest.raises(SagaAlreadyRunning):
        run.go_on()
    runner.clock.move(conf.LEASE)
    run.go_on()
    assert (run.status, run.crashed, world.effects()) == ("COMPLETED", False, ["A", "B"])
    assert [(r.step, r.outcome) for r in run.history] == [
        ("A", "INTERRUPTED"),
        ("A", "DONE"),
        ("B", "DONE"),
    ]
    assert [call.attempt for call in run.calls] == [1, 2, 1]
    assert len({call.idempotency_key for call in run.calls}) == 2


def test_what_a_dead_driver_had_noted_is_lost_and_its_context_is_not_used_again(
    runner: SagaRunner, world: World
) -> None:
    seen: list[tuple[int, Log]] = []

    def note(context: Log) -> None:
        seen.append((context.number, context))
        context.number += 1

    run = runner.run(saga_of(world.step("A", act=note)), Log(), crash_after("A"))

    assert [number for number, _ in seen] == [0, 0]
    assert seen[0][1] is not seen[1][1]
    assert run.context.number == 1


def test_an_act_whose_answer_is_lost_has_its_effect_but_noted_nothing(
    runner: SagaRunner, world: World
) -> None:
    class Lost(Exception):
        def __init__(self, request: str, reply: str) -> None:
            super().__init__(request)

    saga = saga_of(world.step("A"), world.step("B", uncertain=(Lost,)))

    run = runner.start(saga, Log(), unknown_at("B"))

    assert [(r.step, r.action, r.outcome, r.error_type) for r in run.history][1:] == [
        ("B", "act", "UNKNOWN", "Lost"),
        ("B", "compensate", "DONE", ""),
        ("A", "compensate", "DONE", ""),
    ]
    assert run.calls[2].act_outcome == "UNKNOWN"
    assert run.context.done == ["act A", "compensate B", "compensate A"]
    assert (run.status, world.effects()) == ("FAILED", [])


def test_a_fault_can_let_some_calls_go_well_and_fail_some(runner: SagaRunner, world: World) -> None:
    saga = saga_of(world.step("A", act=raises(OSError(), times=1), retry=Retry(attempts=4)))

    run = runner.run(saga, Log(), fail_at("A", ValueError(), skip=1, times=2))

    errors = [record.error_type for record in run.history]
    assert errors == ["OSError", "ValueError", "ValueError", ""]


def test_a_handler_that_is_called_twice_is_called_with_the_same_key(
    runner: SagaRunner, world: World
) -> None:
    keys: list[str] = []
    note = lambda context: keys.append(current_step().idempotency_key)  # noqa: E731

    runner.run(saga_of(world.step("A", act=note)), Log(), call_twice("A"))

    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_a_step_is_given_as_its_class_its_name_or_an_alias(
    runner: SagaRunner, world: World
) -> None:
    step = world.step("A", aliases=["Old"])
    for given in (step, "A", "Old"):
        assert runner.run(saga_of(step), Log(), fail_at(given)).status == "FAILED"


def test_a_fault_at_a_step_that_the_saga_does_not_have_is_refused(
    runner: SagaRunner, world: World
) -> None:
    saga = saga_of(world.step("A"), Fallback(step=world.step("B"), fallback=world.step("C")))

    with pytest.raises(ValueError, match=r"crash_after\('D'\): .*no step 'D', but A, B, C"):
        runner.run(saga, Log(), crash_after(world.step("D")))
    assert world == []


def test_an_unknown_outcome_is_refused_for_a_step_that_knows_none(
    runner: SagaRunner, world: World
) -> None:
    with pytest.raises(ValueError, match="A has no uncertain exceptions"):
        runner.run(saga_of(world.step("A", uncertain=())), Log(), unknown_at("A"))


def test_a_fault_that_never_fired_fails_the_test(world: World) -> None:
    runner = SagaRunner()
    saga = saga_of(world.step("A"), world.step("B"))

    with pytest.raises(AssertionError, match=r"crash_after\('B'\) never fired. .* FAILED: A.act F"):
        runner.run(saga, Log(), fail_at("A"), crash_after("B"))
    with pytest.raises(AssertionError, match=r"fail_at\('B', ValueError\(\), times=2\) fired only"):
        runner.run(saga, Log(), fail_at("B", ValueError(), times=2))


# Proofs


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("prove", [assert_saga_is_crash_safe, assert_compensates_fully])
def test_a_good_saga_is_proven(world: World, is_async: bool, prove: Any) -> None:
    retry = Retry(attempts=3, delay=60.0)
    saga = saga_of(
        world.step("A", is_async=is_async, uncertain=()),
        Fallback(step=world.step("B"), fallback=world.step("C", is_async=is_async)),
        Fallback(step=world.step("D", retry=retry), fallback=world.step("E", retry=retry)),
    )

    prove(saga, Log(), effects=world.effects)


def test_every_checkpoint_and_every_handler_has_a_moment_before_and_after_it(
    runner: SagaRunner, world: World
) -> None:
    steps = [world.step("A"), world.step("B")]

    run = runner.run(saga_of(*steps), Log(), fail_at("B"))

    assert [moment for moment, _ in run.crash_points] == [
        "before A.act ran",
        "after A.act ran, before its checkpoint",
        "before B.act ran",
        "after B.act ran, before its checkpoint",
        "before A.compensate ran",
        "after A.compensate ran, before its checkpoint",
        "once it was FAILED",
    ]
    for number, (moment, _) in enumerate(run.crash_points, 1):
        crashed = runner.start(saga_of(*steps), Log(), fail_at("B"), crash_at(number))
        assert crashed.crashed
        assert [m for m, _ in crashed.crash_points][-1] == moment
        assert crashed.finish().status == "FAILED"


def test_a_proof_runs_on_the_project_s_database(db: None, world: World) -> None:
    saga = saga_of(
        world.step("A", retry=Retry(attempts=2, delay=60.0)),
        Fallback(step=world.step("B"), fallback=world.step("C")),
    )

    assert_saga_is_crash_safe(saga, Log(), effects=world.effects, storage=DjangoSagaStorage())


def join(context: Log) -> None:
    Group.objects.create(name=str(uuid4()))


def leave(context: Log) -> None:
    Group.objects.all()[0].delete()


@pytest.mark.parametrize("alias", ["", "default", "sqlite"])
@pytest.mark.django_db(databases=["default", "sqlite"])
def test_an_atomic_step_needs_no_key_since_a_crash_rolls_it_back(world: World, alias: str) -> None:
    """In memory too: its handler's writes are made in a transaction of the test database."""
    groups = Group.objects.using(alias or "default")

    def add(context: Log) -> None:
        groups.create(name=str(uuid4()))

    def remove(context: Log) -> None:
        groups.order_by("pk")[0].delete()

    saga = saga_of(
        world.step("A"),
        world.step("B", act=add, compensate=remove, atomic=True),
        world.step("C"),
    )
    storage = DjangoSagaStorage(alias) if alias else None

    effects = lambda: {"groups": groups.count(), "world": world.effects()}  # noqa: E731

    assert_saga_is_crash_safe(saga, Log(), effects=effects, storage=storage)


@pytest.mark.django_db(transaction=True)
def test_an_atomic_step_is_proven_where_its_transactions_are_real(world: World) -> None:
    saga = saga_of(world.step("A", act=join, compensate=leave, atomic=True), world.step("B"))
    effects = lambda: {"groups": Group.objects.count(), "world": world.effects()}  # noqa: E731

    assert_saga_is_crash_safe(saga, Log(), effects=effects, storage=DjangoSagaStorage())


@pytest.mark.django_db
def test_the_same_step_without_its_transaction_is_found(world: World) -> None:
    saga = saga_of(world.step("A", act=join, compensate=leave), world.step("B"))

    with pytest.raises(AssertionError, match=r"^A.act is not idempotent: a crash"):
        assert_saga_is_crash_safe(saga, Log(), effects=Group.objects.count)


def test_a_breaker_of_a_fallback_is_not_opened_by_a_proof(world: World) -> None:
    breaker = pybreaker.CircuitBreaker(fail_max=1)
    saga = saga_of(
        Fallback(step=world.step("A"), fallback=world.step("B"), circuit_breaker=breaker)
    )

    assert_saga_is_crash_safe(saga, Log(), effects=world.effects)

    assert breaker.current_state == "closed"


def test_a_fallback_that_stands_in_for_some_errors_only_is_proven_as_well(world: World) -> None:
    saga = saga_of(
        Fallback(
            step=world.step("A"),
            fallback=world.step("B", compensate=lambda context: None),
            failure_exceptions=(KeyError,),
        ),
        world.step("C"),
    )

    with pytest.raises(AssertionError, match=r"^B.compensate"):
        assert_compensates_fully(saga, Log(), effects=world.effects)


# What proofs find


def forgetful(world: World, **wrong: Any) -> Saga[Any]:
    """A, B and C, of which B does something in another way."""
    return saga_of(world.step("A"), world.step("B", **wrong), world.step("C"))


def test_an_act_that_does_its_work_again_with_each_call_is_found(world: World) -> None:
    again = lambda context: world.append(f":B:{uuid4()}")  # noqa: E731

    with pytest.raises(AssertionError) as found:
        assert_saga_is_crash_safe(forgetful(world, act=again), Log(), effects=world.effects)

    message = str(found.value)
    assert message.startswith("B.act is not idempotent: a crash had it called again, with the same")
    assert "The process died after B.act ran, before its checkpoint." in message
    assert """Changed outside:      {'added': ["'A'", "'B'", "'B'", "'C'"]}""" in message
    assert """Should have changed:  {'added': ["'A'", "'B'", "'C'"]}""" in message
    assert "A.act DONE; B.act INTERRUPTED; B.act DONE; C.act DONE" in message
    assert "saga_runner.run(Saga, context, crash_at(4))" in message


@pytest.mark.parametrize("action", ["act", "compensate"])
@pytest.mark.parametrize("name", "ABCDE")
def test_whichever_handler_does_more_when_it_is_called_again_is_named(
    world: World, name: str, action: str
) -> None:
    """Those of fallbacks too, which no undisturbed run calls."""
    known: set[str] = set()

    def more(context: Log) -> None:
        key = current_step().idempotency_key
        (world.act if action == "act" else world.undo)(context)
        if key in known:
            world.append(":once more:")
        known.add(key)

    a, b, c, d, e = (world.step(n, **({action: more} if n == name else {})) for n in "ABCDE")
    saga = saga_of(a, Fallback(step=b, fallback=c), Fallback(step=d, fallback=e))

    with pytest.raises(AssertionError, match=rf"^{name}.{action} is not idempotent: a crash"):
        assert_saga_is_crash_safe(saga, Log(), effects=world.effects)


def test_an_act_that_counts_on_its_memory_of_the_first_call_is_found(world: World) -> None:
    """After a crash it holds, since the context is the stored one; called twice it does not."""

    def act(context: Log) -> None:
        key = f"{current_step().idempotency_key}:{context.number}"
        context.number += 1
        if key not in world:
            world.append(key)

    with pytest.raises(AssertionError, match=r"^B.act is not idempotent: it was called twice"):
        assert_saga_is_crash_safe(forgetful(world, act=act), Log(), effects=world.effects)


def test_a_compensation_that_undoes_more_with_each_call_is_found(world: World) -> None:
    stock = Counter(left=0)

    def act(context: Log) -> None:
        stock["left"] -= current_step().idempotency_key not in stock
        stock[current_step().idempotency_key] = 0

    def compensate(context: Log) -> None:
        stock["left"] += current_step().act_idempotency_key in stock

    saga = forgetful(world, act=act, compensate=compensate)

    with pytest.raises(AssertionError) as found:
        assert_saga_is_crash_safe(saga, Log(), effects=lambda: stock["left"])

    assert str(found.value).startswith("B.compensate is not idempotent: a crash had it called")
    assert "The process died after B.compensate ran, before its checkpoint." in str(found.value)
    assert "Changed outside:      1\nShould have changed:  nothing" in str(found.value)


@pytest.mark.parametrize("prove", [assert_saga_is_crash_safe, assert_compensates_fully])
def test_a_compensation_that_does_nothing_is_found(world: World, prove: Any) -> None:
    saga = forgetful(world, compensate=lambda context: None)

    with pytest.raises(AssertionError) as found:
        prove(saga, Log(), effects=world.effects)

    assert "B.compensate" in str(found.value)
    assert "Should have changed:  nothing" in str(found.value)
    assert "Changed outside:      {'added': [\"'B'\"]}" in str(found.value)


def test_a_compensation_that_cannot_be_called_again_is_found(world: World) -> None:
    def once(context: Log) -> None:
        world.remove(current_step().act_idempotency_key)

    with pytest.raises(AssertionError, match=r"^B.compensate does not bear that act did nothing"):
        assert_saga_is_crash_safe(forgetful(world, compensate=once), Log(), effects=world.effects)


def test_a_compensation_that_needs_what_act_noted_is_found(world: World) -> None:
    def act(context: Log) -> None:
        world.act(context)
        context.number = 7

    def undo(context: Log) -> None:
        if context.number == 7:
            world.undo(context)

    saga = forgetful(world, act=act, compensate=undo)

    with pytest.raises(AssertionError, match=r"^B.compensate does not undo an act whose"):
        assert_saga_is_crash_safe(saga, Log(), effects=world.effects)


def test_what_is_kept_beside_the_stored_context_is_found(world: World) -> None:
    kept: dict[int, str] = {}

    def act(context: Log) -> None:
        world.act(context)
        kept[id(context)] = current_step().idempotency_key

    def undo(context: Log) -> None:
        world.remove(kept.pop(id(context)))

    saga = forgetful(world, act=act, compensate=undo)

    with pytest.raises(AssertionError, match=r"^B.compensate.*\n(.*\n)*.*STUCK"):
        assert_saga_is_crash_safe(saga, Log(), effects=world.effects)


def test_effects_that_see_nothing_prove_nothing(world: World) -> None:
    with pytest.raises(AssertionError, match=r"does not see what Saga tests.testing does"):
        assert_saga_is_crash_safe(forgetful(world), Log(), effects=lambda: 0)


def test_effects_that_differ_in_each_run_prove_nothing(world: World) -> None:
    with pytest.raises(AssertionError, match="Leave ids out"):
        assert_saga_is_crash_safe(forgetful(world), Log(), effects=lambda: list(world))


def test_a_context_with_which_the_saga_fails_proves_nothing(world: World) -> None:
    saga = forgetful(world, act=raises(Abort("sold out")))

    with pytest.raises(AssertionError, match=r"Undisturbed.*FAILED.*B.act FAILED .Abort: sold out"):
        assert_compensates_fully(saga, Log(), effects=world.effects)


def test_a_context_that_the_runs_use_up_is_named_as_the_reason(world: World) -> None:
    def act(context: Log) -> None:
        if len(world) > 12:
            raise Abort("sold out")
        world.act(context)

    with pytest.raises(AssertionError, match=r"(?s)sold out.*a function that makes all that a run"):
        assert_saga_is_crash_safe(forgetful(world, act=act), Log(), effects=world.effects)


def test_a_context_may_be_a_function_that_begins_each_run_afresh(world: World) -> None:
    def fresh() -> Log:
        world.clear()
        return Log(number=len(world))

    assert_saga_is_crash_safe(forgetful(world), fresh, effects=world.effects)


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        (3, 3, None),
        (3, 5, 2),
        (Decimal("2.50"), Decimal("1.00"), Decimal("-1.50")),
        (["a"], ["b", "a", "a"], {"added": ["'a'", "'b'"]}),
        ({1, 2}, {2}, {"removed": ["1"]}),
        ({"x": 1, "y": [0]}, {"x": 1, "y": [0]}, None),
        ({"x": 1}, {"x": 2, "y": 1}, {"x": 1, "y": 1}),
        ({"x": 1, "y": [0]}, {"x": 1}, {"y": {"removed": ["0"]}}),
        ({}, {"x": 0}, None),
        ({}, {"x": "a"}, {"x": {"was": None, "is": "a"}}),
        ("a", "b", {"was": "a", "is": "b"}),
        ({"sum": None}, {"sum": Decimal(5)}, {"sum": Decimal(5)}),
        (
            {"sum": 2, "all": ["a"]},
            {"sum": None, "all": None},
            {"sum": -2, "all": {"removed": ["'a'"]}},
        ),
        (None, "a", {"was": None, "is": "a"}),
        (None, None, None),
        (100.0, 100.0 - 19.99 + 19.99 + 1e-14, None),
        (60.02, 60.02 - 39.98, -39.98),
        (Decimal("1.5"), 2.0, 0.5),
        (0.0, float("inf"), float("inf")),
    ],
)
def test_changes_are_what_came_and_went(before: Any, after: Any, change: Any) -> None:
    assert changes(before, after) == change


def test_money_in_floats_is_proven_though_they_never_come_back_exactly(world: World) -> None:
    def balance() -> float:
        total = 100.0
        for _ in world:
            total -= 19.99
        return total

    saga = saga_of(*map(world.step, "ABC"))
    assert_saga_is_crash_safe(saga, Log(), effects=balance)


@pytest.mark.parametrize("nested", [False, True])
def test_effects_may_be_query_sets(db: None, nested: bool) -> None:
    step = make_step("A", Calls(), act=join, compensate=leave, atomic=True)
    groups = Group.objects.values_list("permissions", flat=True)  # None for each

    def effects() -> Any:
        return {"groups": groups.all()} if nested else groups.all()

    assert_saga_is_crash_safe(saga_of(step), Log(), effects=effects)
    forgetful = saga_of(make_step("A", Calls(), act=join, atomic=True), make_step("B", Calls()))
    with pytest.raises(AssertionError, match="leaves something behind when B fails"):
        assert_saga_is_crash_safe(forgetful, Log(), effects=effects)


# The demo's saga


@pytest.fixture
def services(tmp_path: Path, settings: Any, db: None) -> Iterator[Services]:
    with running(tmp_path / "ledger") as started:
        settings.SHOP_SERVICES_URL = started.url
        yield started


@pytest.fixture
def place() -> Callable[[], OrderContext]:
    """Makes an order of its own for each run."""
    product = Product.objects.create(name="tea", price=Decimal("2.50"), supplied=999, in_stock=999)

    def place() -> OrderContext:
        order = Order.objects.create(product=product, quantity=2, address="1 Main Street")
        return OrderContext.of(order)

    return place


@pytest.fixture
def standing(services: Services) -> Callable[[], Any]:
    """What stands: the stock, and what was paid and booked."""

    def standing() -> dict[str, Any]:
        verbs = Counter(line["verb"] for line in services.effects()["standing"])
        return {"stock": Product.objects.get().in_stock, "services": verbs}

    return standing


def demo_with(step: StepType) -> Saga[OrderContext]:
    """The demo's saga with another way to charge a card."""
    return Saga(
        steps=[ReserveStock, Fallback(step=step, fallback=ChargeWallet), BookCourier],
        name="tests.demo",
    )


def test_the_demo_s_saga_is_crash_safe(
    services: Services, place: Callable[[], OrderContext], standing: Callable[[], Any]
) -> None:
    assert_saga_is_crash_safe(OrderSaga, place, effects=standing)


def test_a_charge_without_its_idempotency_key_is_found_in_the_demo_s_saga(
    services: Services, place: Callable[[], OrderContext], standing: Callable[[], Any]
) -> None:
    class ChargeWithoutKey(ChargeCard):
        def act(self, context: OrderContext) -> str | None:
            answer = services.post(
                self.path, uuid4().hex, order=context.order_id, amount=context.amount
            )
            context.payment_id = answer["payment_id"]
            return context.payment_id

    with pytest.raises(AssertionError) as found:
        assert_saga_is_crash_safe(demo_with(ChargeWithoutKey), place, effects=standing)

    assert str(found.value).startswith("ChargeWithoutKey.act is not idempotent: a crash")
    assert "'services': {'charge': 2, 'book': 1}" in str(found.value)


def test_a_refund_that_cannot_be_repeated_is_found_in_the_demo_s_saga(
    services: Services, place: Callable[[], OrderContext], standing: Callable[[], Any]
) -> None:
    class RefundOnce(ChargeCard):
        def compensate(self, context: OrderContext) -> None:
            lines = services.effects(context.order_id)["effects"]
            if any(line["verb"] == "refund" for line in lines):
                raise Abort("it is refunded already")
            super().compensate(context)

    with pytest.raises(AssertionError) as found:
        assert_saga_is_crash_safe(demo_with(RefundOnce), place, effects=standing)

    assert str(found.value).startswith("RefundOnce.compensate is not idempotent: a crash")
    assert "Abort: it is refunded already" in str(found.value)
    assert "It ended STUCK: The compensation of RefundOnce failed" in str(found.value)


@pytest.mark.parametrize("prove", [assert_saga_is_crash_safe, assert_compensates_fully])
def test_a_refund_by_an_id_that_a_crash_lost_is_found_in_the_demo_s_saga(
    services: Services,
    place: Callable[[], OrderContext],
    standing: Callable[[], Any],
    prove: Callable[..., None],
) -> None:
    class RefundById(ChargeCard):
        def compensate(self, context: OrderContext) -> None:
            call("/payments/refund", payment_id=context.payment_id)

    with pytest.raises(AssertionError) as found:
        prove(demo_with(RefundById), place, effects=standing)

    assert str(found.value).startswith("RefundById.compensate does not undo an act whose answer")
    assert "what act noted in the context" in str(found.value)
    assert "crash_after('RefundById'), fail_at('RefundById', skip=1)" in str(found.value)


# SagaTestCase and the plugin


class Greeting(SagaTestCase):
    def greet(self) -> Saga[Any]:
        return saga_of(make_step("A", Calls(), act=join, compensate=leave, atomic=True))

    def test_a_saga_in_a_test_case_writes_to_the_test_database(self) -> None:
        run = self.run_saga(self.greet(), Log(), crash_after("A"))
        assert (run.status, Group.objects.count()) == ("COMPLETED", 1)

    def test_it_is_rolled_back_after_each_test(self) -> None:
        assert self.run_saga(self.greet(), Log(), fail_at("A")).acted == []
        assert Group.objects.count() == 0


@pytest.mark.django_db
def test_a_fault_that_never_fired_fails_a_test_case() -> None:
    class Forgotten(SagaTestCase):
        saga_storage = DjangoSagaStorage()

        def test(self) -> None:
            step = make_step("A", Calls(), retry=Retry(attempts=2))
            fault = fail_at("A", ValueError(), times=2)
            self.saga_runner.start(saga_of(step), Log(), fault)

    result = unittest.TestResult()
    unittest.TestSuite([Forgotten("test")]).run(result)

    [(_, trace)] = result.failures
    assert result.errors == []
    assert "fired only 1 times. The saga is RUNNING: A.act FAILED (ValueError: )" in trace


USERS_TEST = """
from dataclasses import dataclass

import django
import pytest
from django.conf import settings

settings.configure(INSTALLED_APPS=["django.contrib.contenttypes", "django_saga"])
django.setup()

from django_saga import Saga, SagaContext, SagaStepHandler
from django_saga.testing import crash_after, fail_at

@dataclass
class Context(SagaContext):
    pass

class Step(SagaStepHandler[Context]):
    def act(self, context):
        pass

class Simple(Saga[Context]):
    steps = [Step]

def test_passes(saga_runner, saga_clock):
    run = saga_runner.start(Simple, Context(), crash_after(Step))
    saga_clock.move(60)
    assert run.go_on().acted == ["Step"]

def test_forgets_a_fault(saga_runner):
    saga_runner.start(Simple, Context(), fail_at(Step, skip=1))
"""


def environment() -> dict[str, str]:
    outside = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    return {**outside, "PYTHONPATH": str(Path(django_saga.__file__).parent.parent)}


def test_the_fixtures_serve_a_project_without_a_database_and_without_pytest_django(
    tmp_path: Path,
) -> None:
    (tmp_path / "test_users.py").write_text(USERS_TEST)
    command = [sys.executable, "-m", "pytest", "-W", "error", "--strict-markers", "-q"]
    plugins = ["-p", "no:django", "-p", "no:saga", "-p", "django_saga.testing.plugin"]
    done = subprocess.run(
        [*command, *plugins], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )

    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "fail_at('Step', skip=1) never fired" in done.stdout


def test_the_plugin_costs_those_who_do_not_use_it_no_more_than_its_fixtures() -> None:
    """It is imported before there are settings, in every run of pytest in its environment."""
    code = (
        "import sys, django_saga.testing.plugin\n"
        "heavy = ('django.test', 'django_saga.models', 'django_saga.testing.runner')\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment(), check=True)


def test_pytest_finds_the_plugin_where_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"saga": "django_saga.testing.plugin"}
    assert not [name for name in project["dependencies"] if name.startswith("pytest")]
