"""What a saga does, on every storage, under both drivers, with handlers of both kinds."""

from __future__ import annotations

import pickle
import re
import uuid
from collections.abc import Callable
from typing import Any

import punq
import pybreaker
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.db import transaction

from django_saga import (
    Abort,
    Fallback,
    InsideTransaction,
    InvalidContext,
    InvalidDefinition,
    Retry,
    RetryLater,
    Saga,
    SagaAlreadyRunning,
    SagaError,
    SagaFailed,
    SagaNotFound,
    SagaStepHandler,
    SagaStepResult,
    SagaStuck,
    current_step,
    recover_saga,
)
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage, SagaStorage
from tests.steps import Calls, Log, make_step, raises

ALIASES = list(settings.DATABASES)
pytestmark = pytest.mark.usefixtures("committing_databases")

Runner = Callable[..., SagaExecution]
QUICK = Retry(attempts=3, delay=0.01, backoff=1.0)


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a saga to its end under one of the drivers."""
    if request.param == "sync":
        return lambda saga, context, **kwargs: saga.run(context, **kwargs)
    return lambda saga, context, **kwargs: async_to_sync(saga.arun)(context, **kwargs)


@pytest.fixture(params=["sync", "async"])
def steps_of(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Iterates over a transaction of one of the kinds, calling a function on each result."""

    def sync(transaction: Any, each: Callable[[SagaStepResult], Any]) -> None:
        with transaction:
            for result in transaction:
                if each(result) is STOP:
                    break

    async def asynchronous(transaction: Any, each: Callable[[SagaStepResult], Any]) -> None:
        async with transaction:
            async for result in transaction:
                if each(result) is STOP:
                    break

    return sync if request.param == "sync" else async_to_sync(asynchronous)


STOP = object()


@pytest.fixture(params=[False, True], ids=["def", "async def"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def calls() -> Calls:
    return Calls()


def history(storage: SagaStorage, saga_id: uuid.UUID) -> list[str]:
    return [
        f"{record.action} {record.step} {record.attempt} {record.outcome}"
        for record in storage.history(saga_id)
    ]


def adhoc(storage: SagaStorage, *steps: Any) -> Saga[Any]:
    return Saga(steps=steps, storage=storage, name="tests.adhoc")


def test_a_saga_that_succeeds_runs_every_step_once(
    storage: SagaStorage, run: Runner, is_async: bool, calls: Calls
) -> None:
    context = Log()
    steps = [make_step(name, calls, is_async=is_async) for name in "ABC"]
    execution = run(adhoc(storage, *steps), context)
    assert calls == ["act A", "act B", "act C"]
    assert context.done == calls
    assert execution.status == "COMPLETED"
    assert execution.is_final
    assert execution.finished_at is not None
    assert history(storage, execution.id) == ["act A 1 DONE", "act B 1 DONE", "act C 1 DONE"]


def test_a_failure_compensates_in_reverse_and_carries_the_original_error(
    storage: SagaStorage, run: Runner, is_async: bool, calls: Calls
) -> None:
    error = RuntimeError("no courier")
    steps = [make_step(name, calls, is_async=is_async) for name in "AB"]
    failing = make_step("C", calls, act=raises(error), is_async=is_async)
    with pytest.raises(SagaFailed, match=r"step C failed.*RuntimeError: no courier") as failure:
        run(adhoc(storage, *steps, failing), Log())
    assert failure.value.__cause__ is error
    assert failure.value.step == "C"
    execution = failure.value.execution
    assert calls == ["act A", "act B", "act C", "compensate B", "compensate A"]
    assert (execution.status, execution.failed_step) == ("FAILED", "C")
    assert (execution.error_type, execution.error_message) == ("RuntimeError", "no courier")
    assert history(storage, execution.id) == [
        "act A 1 DONE",
        "act B 1 DONE",
        "act C 1 FAILED",
        "compensate B 1 DONE",
        "compensate A 1 DONE",
    ]
    assert "no courier" in storage.history(execution.id)[2].traceback


def test_the_first_step_failing_leaves_nothing_to_compensate(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    saga = adhoc(storage, make_step("A", calls, act=raises(RuntimeError("x"))))
    with pytest.raises(SagaFailed):
        run(saga, Log())
    assert calls == ["act A"]


def test_a_transaction_yields_each_result_and_raises_the_steps_own_error(
    storage: SagaStorage, steps_of: Any, is_async: bool, calls: Calls
) -> None:
    results: list[SagaStepResult] = []
    error = LookupError("gone")
    steps = [make_step(name, calls, is_async=is_async) for name in "AB"]
    failing = make_step("C", calls, act=raises(error), is_async=is_async)
    transaction = adhoc(storage, *steps, failing).transaction(Log())
    with pytest.raises(LookupError) as raised:
        steps_of(transaction, results.append)
    assert raised.value is error
    assert [(r.step_type.__name__, r.response) for r in results] == [("A", "A"), ("B", "B")]
    assert {r.saga_id for r in results} == {transaction.saga_id}
    assert calls[-2:] == ["compensate B", "compensate A"]
    assert transaction.execution.status == "FAILED"


def test_break_leaves_the_saga_resumable_and_a_resumed_one_skips_what_is_done(
    storage: SagaStorage, steps_of: Any, run: Runner, calls: Calls
) -> None:
    saga = adhoc(storage, *[make_step(name, calls) for name in "ABC"])
    transaction = saga.transaction(Log())
    steps_of(transaction, lambda result: STOP)
    assert calls == ["act A"]
    assert transaction.execution.status == "RUNNING"
    context = Log()
    execution = run(saga, context, saga_id=transaction.saga_id)
    assert execution.status == "COMPLETED"
    assert calls == ["act A", "act B", "act C"]
    assert context.done == calls, "the stored context rules, and the caller's is brought up to it"
    assert len(history(storage, execution.id)) == 3, "an attempt that never began is not recorded"


def test_an_exception_of_the_consumer_compensates(
    storage: SagaStorage, steps_of: Any, calls: Calls
) -> None:
    def refuse(result: SagaStepResult) -> None:
        if result.step_type.__name__ == "B":
            raise ValueError("the consumer's")

    transaction = adhoc(storage, *[make_step(n, calls) for n in "ABC"]).transaction(Log())
    with pytest.raises(ValueError, match="the consumer's"):
        steps_of(transaction, refuse)
    assert calls == ["act A", "act B", "compensate B", "compensate A"]
    assert transaction.execution.status == "FAILED"
    assert transaction.execution.error_message == "the consumer's"


@pytest.mark.parametrize("alias", ALIASES)
def test_the_execution_that_is_returned_is_what_a_query_finds(run: Runner, alias: str) -> None:
    saga = Saga(
        steps=[make_step("A", Calls()), make_step("B", Calls())],
        name="tests.returned",
        storage=DjangoSagaStorage(alias),
    )
    returned = run(saga, Log())
    found = SagaExecution.objects.using(alias).get(pk=returned.pk)
    assert returned == found
    assert pickle.loads(pickle.dumps(returned)) == found
    for field in SagaExecution._meta.concrete_fields:
        value = getattr(found, field.attname)
        assert getattr(returned, field.attname) == value, field.attname


def test_an_ended_saga_runs_nothing_and_returns_its_outcome(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    good = adhoc(storage, make_step("A", calls))
    completed = run(good, Log())
    assert run(good, Log(), saga_id=completed.id).status == "COMPLETED"
    bad = adhoc(storage, make_step("A", calls, act=raises(RuntimeError("x"))))
    with pytest.raises(SagaFailed) as failure:
        run(bad, Log())
    with pytest.raises(SagaFailed, match="RuntimeError: x"):
        run(bad, Log(), saga_id=failure.value.execution.id)
    assert calls == ["act A", "act A"]


def test_retries_of_an_act_are_recorded_and_bounded(
    storage: SagaStorage, run: Runner, is_async: bool, calls: Calls
) -> None:
    flaky = make_step(
        "A", calls, act=raises(OSError("down"), times=2), retry=QUICK, is_async=is_async
    )
    execution = run(adhoc(storage, flaky), Log())
    assert history(storage, execution.id) == ["act A 1 FAILED", "act A 2 FAILED", "act A 3 DONE"]
    hopeless = make_step("A", calls, act=raises(OSError("down")), retry=QUICK, is_async=is_async)
    with pytest.raises(SagaFailed) as failure:
        run(adhoc(storage, hopeless), Log())
    assert len(history(storage, failure.value.execution.id)) == 3


def test_abort_compensates_at_once_without_retry_or_fallback(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    aborting = make_step("B", calls, act=raises(Abort("sold out")), retry=QUICK)
    other = make_step("C", calls)
    saga = adhoc(storage, make_step("A", calls), Fallback(step=aborting, fallback=other))
    with pytest.raises(SagaFailed, match="sold out"):
        run(saga, Log())
    assert calls == ["act A", "act B", "compensate A"]


def test_retry_later_uses_no_attempt(storage: SagaStorage, run: Runner, calls: Calls) -> None:
    polling = make_step("A", calls, act=raises(RetryLater(0.001), times=4))
    execution = run(adhoc(storage, polling), Log())
    assert execution.status == "COMPLETED"
    assert len(calls) == 5


def test_a_failing_compensation_is_retried_then_the_others_go_on_and_it_ends_stuck(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    stubborn = make_step(
        "B", calls, compensate=raises(RuntimeError("stays")), compensation_retry=QUICK
    )
    failing = make_step("C", calls, act=raises(ValueError("no")))
    with pytest.raises(SagaStuck, match="compensation of B failed") as stuck:
        run(adhoc(storage, make_step("A", calls), stubborn, failing), Log())
    assert isinstance(stuck.value.__cause__, ValueError)
    assert calls[-4:] == ["compensate B"] * 3 + ["compensate A"]
    assert stuck.value.execution.status == "STUCK"
    assert "B" in stuck.value.execution.stuck_reason


def test_an_unknown_outcome_is_compensated_and_told_so(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    seen: list[Any] = []
    unsure = make_step(
        "B",
        calls,
        act=raises(TimeoutError("no answer")),
        compensate=lambda context: seen.append(current_step().act_outcome),
    )
    with pytest.raises(SagaFailed):
        run(adhoc(storage, make_step("A", calls), unsure), Log())
    assert calls == ["act A", "act B", "compensate B", "compensate A"]
    assert seen == ["UNKNOWN"]


def test_the_idempotency_key_is_the_same_for_every_attempt(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    keys: list[str] = []
    fail = raises(OSError("down"), times=2)

    def act(context: Log) -> None:
        keys.append(current_step().idempotency_key)
        fail(context)

    execution = run(adhoc(storage, make_step("A", calls, act=act, retry=QUICK)), Log())
    assert keys == [f"{execution.id}:A:act"] * 3


def test_a_fallback_restores_the_context_and_is_itself_compensated(
    storage: SagaStorage, run: Runner, is_async: bool, calls: Calls
) -> None:
    def spoil(context: Log) -> None:
        context.number = 99
        raise ConnectionError("card service")

    seen: list[int] = []
    card = make_step("Card", calls, act=spoil, retry=QUICK, is_async=is_async)
    wallet = make_step("Wallet", calls, act=lambda c: seen.append(c.number), is_async=is_async)
    failing = make_step("C", calls, act=raises(RuntimeError("x")), is_async=is_async)
    context = Log(number=7)
    with pytest.raises(SagaFailed):
        run(adhoc(storage, Fallback(step=card, fallback=wallet), failing), context)
    assert seen == [7]
    assert calls == ["act Card"] * 3 + ["act Wallet", "act C", "compensate Wallet"]
    assert context.number == 7


def test_a_fallback_first_undoes_a_step_whose_outcome_is_unknown(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    card = make_step("Card", calls, act=raises(TimeoutError("no answer")))
    wallet = make_step("Wallet", calls)
    execution = run(adhoc(storage, Fallback(step=card, fallback=wallet)), Log())
    assert execution.status == "COMPLETED"
    assert calls == ["act Card", "compensate Card", "act Wallet"]


def test_a_fallback_that_the_code_has_dropped_still_stands_in_where_the_plan_names_it(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    card = make_step("Card", calls, act=raises(ConnectionError("down")))
    wallet, first = make_step("Wallet", calls), make_step("A", calls)
    transaction = adhoc(storage, first, Fallback(step=card, fallback=wallet)).transaction(Log())
    with transaction:
        next(iter(transaction))
    changed = adhoc(storage, first, card, wallet)  # as retired_steps say it of both
    assert run(changed, Log(), saga_id=transaction.saga_id).status == "COMPLETED"
    assert calls == ["act A", "act Card", "act Wallet"]


def test_failure_exceptions_say_what_a_fallback_stands_in_for(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    card = make_step("Card", calls, act=raises(ValueError("bad card")))
    fallback = Fallback(
        step=card, fallback=make_step("Wallet", calls), failure_exceptions=(ConnectionError,)
    )
    with pytest.raises(SagaFailed, match="bad card"):
        run(adhoc(storage, fallback), Log())
    assert calls == ["act Card"]


def test_an_open_circuit_breaker_goes_straight_to_the_fallback(
    storage: SagaStorage, run: Runner, is_async: bool, calls: Calls
) -> None:
    card = make_step("Card", calls, act=raises(ConnectionError("down")), is_async=is_async)
    wallet = make_step("Wallet", calls, is_async=is_async)
    breaker = pybreaker.CircuitBreaker(fail_max=2, reset_timeout=600)
    saga = adhoc(storage, Fallback(step=card, fallback=wallet, circuit_breaker=breaker))
    for _ in range(4):
        execution = run(saga, Log())
    assert calls == ["act Card", "act Wallet"] * 2 + ["act Wallet"] * 2
    first, *_ = storage.history(execution.id)
    assert (first.step, first.outcome, first.error_type) == ("Card", "FAILED", "CircuitOpen")
    assert first.error_message.startswith("the circuit breaker is open: ")


def test_the_call_that_opens_a_circuit_breaker_has_failed_with_its_own_error(
    storage: SagaStorage, run: Runner, is_async: bool, calls: Calls
) -> None:
    card = make_step("Card", calls, act=raises(ConnectionError("down")), is_async=is_async)
    wallet = make_step("Wallet", calls, is_async=is_async)
    breaker = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=600)
    saga = adhoc(storage, Fallback(step=card, fallback=wallet, circuit_breaker=breaker))
    first, *_ = storage.history(run(saga, Log()).id)
    assert breaker.current_state == "open"
    assert (first.error_type, first.error_message) == ("ConnectionError", "down")


def test_a_circuit_breaker_that_breaks_down_after_the_call_is_no_failure_of_the_step(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    """The step was called, so its effect may stand: it is called again, and nothing else is."""

    class Breaking(pybreaker.CircuitBreakerListener):
        def success(self, breaker: Any) -> None:
            if calls == ["act Card"]:
                raise OSError("the breaker's own storage is away")

    card = make_step("Card", calls)
    breaker = pybreaker.CircuitBreaker(listeners=[Breaking()])
    fallback = Fallback(step=card, fallback=make_step("Wallet", calls), circuit_breaker=breaker)
    saga_id = uuid.uuid4()
    with pytest.raises(OSError, match="own storage is away"):
        run(adhoc(storage, fallback), Log(), saga_id=saga_id)
    assert run(adhoc(storage, fallback), Log(), saga_id=saga_id).status == "COMPLETED"
    assert calls == ["act Card", "act Card"]
    assert history(storage, saga_id) == ["act Card 1 INTERRUPTED", "act Card 2 DONE"]


def test_a_context_that_cannot_be_stored_compensates_that_step_too(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    seen: list[Any] = []

    def spoil(context: Log) -> None:
        context.number = 5
        context.done = object()  # type: ignore[assignment]

    step = make_step("A", calls, act=spoil, compensate=lambda c: seen.append(c.number))
    with pytest.raises(SagaFailed, match=r"'done'.*cannot be stored") as failure:
        run(adhoc(storage, step), Log())
    assert isinstance(failure.value.__cause__, InvalidContext)
    assert calls == ["act A", "compensate A"]
    assert seen == [5], "what could be stored is there for the compensation"


def test_a_handler_that_returns_an_awaitable_from_def_is_refused_clearly(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    async def forgotten() -> None: ...

    step = make_step("A", calls, act=lambda context: forgotten())
    told = r"InvalidDefinition: act of step A returned an awaitable; declare it with async def\.$"
    with pytest.raises(SagaFailed, match=told):
        run(adhoc(storage, step), Log())


def test_the_same_id_while_it_runs_is_refused(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    saga_id = uuid.uuid4()
    errors: list[BaseException] = []

    def again(context: Log) -> None:
        with pytest.raises(SagaAlreadyRunning) as refused:
            adhoc(storage, make_step("A", calls)).run(Log(), saga_id=saga_id)
        errors.append(refused.value)

    run(adhoc(storage, make_step("A", calls, act=again)), Log(), saga_id=saga_id)
    assert "being driven by" in str(errors[0])
    assert calls == ["act A"]


def test_an_id_of_another_saga_is_refused(storage: SagaStorage, run: Runner, calls: Calls) -> None:
    execution = run(adhoc(storage, make_step("A", calls)), Log())
    other = Saga(steps=[make_step("A", calls)], storage=storage, name="tests.other")
    with pytest.raises(SagaNotFound, match="belongs to an execution of 'tests"):
        run(other, Log(), saga_id=execution.id)


def test_a_context_of_the_wrong_class_or_no_uuid_is_refused(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    saga = adhoc(storage, make_step("A", calls))
    with pytest.raises(InvalidContext, match="Expected a Log, got dict"):
        run(saga, {"done": []})
    with pytest.raises(SagaError, match="A saga_id is a UUID"):
        run(saga, Log(), saga_id="42")
    assert calls == []


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("not even a name")

    __repr__ = __str__


@pytest.mark.parametrize("saga_id", [b"42", 42, object(), "\ud800", "4" * 10_000, Unspeakable()])
def test_what_is_no_uuid_is_refused_whatever_it_is(calls: Calls, saga_id: Any) -> None:
    saga = adhoc(DjangoSagaStorage(), make_step("A", calls))
    for use in (saga.enqueue, saga.run, saga.transaction):
        with pytest.raises(SagaError, match="A saga_id is a UUID") as refused:
            use(Log(), saga_id=saga_id)
        assert len(str(refused.value)) < 200
    for unknown in (saga_id, None):
        with pytest.raises(SagaError, match="A saga_id is a UUID"):
            recover_saga(unknown)
    assert calls == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_failure(
    storage: SagaStorage, calls: Calls, stop: type[BaseException]
) -> None:
    interrupted = [stop()]

    def act(context: Log) -> None:
        if interrupted:
            raise interrupted.pop()

    saga_id = uuid.uuid4()
    saga = adhoc(storage, make_step("A", calls), make_step("B", calls, act=act))
    with pytest.raises(stop):
        saga.run(Log(), saga_id=saga_id)
    assert calls == ["act A", "act B"], "nothing is compensated"
    assert saga.run(Log(), saga_id=saga_id).status == "COMPLETED", "the lease was released"
    assert history(storage, saga_id) == ["act A 1 DONE", "act B 1 INTERRUPTED", "act B 2 DONE"]


@pytest.mark.parametrize("alias", ALIASES)
def test_driving_inside_a_transaction_is_refused_and_says_what_to_do(
    alias: str, run: Runner, calls: Calls
) -> None:
    saga = adhoc(DjangoSagaStorage(using=alias), make_step("A", calls))
    with (
        transaction.atomic(using=alias),
        pytest.raises(InsideTransaction, match=r"enqueue\(\).*non_atomic_requests"),
    ):
        run(saga, Log())
    assert calls == []


def test_a_consumer_that_opens_a_transaction_between_steps_is_refused(calls: Calls) -> None:
    saga = adhoc(DjangoSagaStorage(), make_step("A", calls), make_step("B", calls))
    steps = saga.transaction(Log())

    def consume() -> None:
        with steps:
            for _ in steps:
                with transaction.atomic():
                    next(iter(steps))

    with pytest.raises(InsideTransaction):
        consume()
    assert steps.execution.status == "FAILED", "an exception of the consumer's compensates"
    assert calls == ["act A", "compensate A"]


def test_run_inside_an_event_loop_says_to_await_arun(storage: SagaStorage, calls: Calls) -> None:
    async def view() -> None:
        adhoc(storage, make_step("A", calls)).run(Log())

    with pytest.raises(SagaError) as refused:
        async_to_sync(view)()
    assert str(refused.value) == (
        "This would block the running event loop; await arun(), or use async with and async for."
    )


def test_an_ad_hoc_saga_can_be_enqueued_in_process(storage: SagaStorage, calls: Calls) -> None:
    execution = adhoc(storage, make_step("A", calls)).enqueue(Log())
    assert storage.acquire(execution.id, driver="test", lease=1).state.status == "COMPLETED"
    assert calls == ["act A"]


@pytest.mark.parametrize("resolve_async", [False, True])
def test_a_container_makes_the_handlers(
    storage: SagaStorage, run: Runner, calls: Calls, resolve_async: bool
) -> None:
    class Charge(SagaStepHandler[Log]):
        def __init__(self, service: Calls) -> None:
            self.service = service

        def act(self, context: Log) -> None:
            self.service.note()

    class Asynchronous:
        def __init__(self, container: punq.Container) -> None:
            self.container = container

        async def resolve(self, kind: type) -> Any:
            return self.container.resolve(kind)

    def saga_with(container: punq.Container) -> Saga[Log]:
        chosen = Asynchronous(container) if resolve_async else container
        return Saga(steps=[Charge], storage=storage, container=chosen, name="tests.container")

    container = punq.Container()
    container.register(Charge, factory=lambda: Charge(calls))
    run(saga_with(container), Log())
    assert calls == ["act Charge"]
    with pytest.raises(SagaFailed, match="MissingDependency"):
        run(saga_with(punq.Container()), Log())


@pytest.mark.parametrize("made", [None, 42], ids=["nothing", "something else"])
def test_a_container_that_makes_no_handler_is_told(
    storage: SagaStorage, run: Runner, calls: Calls, made: object
) -> None:
    class Wrong:
        def resolve(self, kind: type) -> object:
            return made

    saga = Saga(
        steps=[make_step("A", calls)], storage=storage, container=Wrong(), name="tests.wrong"
    )
    told = rf"For step A the container made {made}, which has no act\(\)\.$"
    with pytest.raises(SagaFailed, match=told):
        run(saga, Log())


def test_a_handler_that_wants_arguments_and_has_no_container_is_told(
    storage: SagaStorage, run: Runner
) -> None:
    class Wanting(SagaStepHandler[Log]):
        def __init__(self, service: object) -> None: ...

        def act(self, context: Log) -> None: ...

    with pytest.raises(SagaFailed) as failure:
        run(Saga(steps=[Wanting], storage=storage, name="tests.wanting"), Log())
    assert isinstance(failure.value.__cause__, InvalidDefinition)
    assert re.fullmatch(
        r"Step .*Wanting cannot be made: .*'service'. Handlers are made without arguments, or by "
        r"the CONTAINER of the settings\.",
        str(failure.value.__cause__),
    )


def test_an_error_of_a_handlers_new_is_the_steps_failure(storage: SagaStorage, run: Runner) -> None:
    class Unmade(SagaStepHandler[Log]):
        def __new__(cls) -> Unmade:
            raise RuntimeError("not today")

        def act(self, context: Log) -> None: ...

    with pytest.raises(SagaFailed, match="not today"):
        run(Saga(steps=[Unmade], storage=storage, name="tests.unmade"), Log())


def test_what_is_handed_over_says_when_it_goes_on(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    later = make_step("A", calls, act=raises(OSError("busy")), retry=Retry(attempts=2, delay=30))
    execution = run(adhoc(storage, later), Log())
    assert not execution.is_final
    assert execution.wake_at is not None
    assert 29 < (execution.wake_at - execution.updated_at).total_seconds() < 31


def test_a_stuck_saga_names_what_failed_first_and_its_error(
    storage: SagaStorage, run: Runner, calls: Calls
) -> None:
    once = Retry(attempts=1)
    kept = make_step("A", calls, compensate=raises(OSError("on fire")), compensation_retry=once)
    failing = make_step("B", calls, act=raises(ValueError("declined")))
    with pytest.raises(
        SagaStuck, match=r"of A failed; .* since step B failed: ValueError: declined"
    ):
        run(adhoc(storage, kept, failing), Log())


def test_the_end_of_a_saga_is_logged_with_the_step_that_failed(
    storage: SagaStorage, run: Runner, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    failing = make_step("B", calls, act=raises(ValueError("declined")))
    with pytest.raises(SagaFailed):
        run(adhoc(storage, make_step("A", calls), failing), Log())
    (ended,) = [r for r in caplog.records if r.getMessage().startswith("saga_failed ")]
    assert ended.getMessage().endswith("step B: ValueError: declined")
    assert ended.step == "B"  # type: ignore[attr-defined]
