"""What every storage promises, in one suite for all of them; then what only a database can."""

from __future__ import annotations

import gc
import os
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

import psycopg
import pytest
from django.conf import settings
from django.contrib.auth.models import Group
from django.db import Error as DatabaseError
from django.db import IntegrityError, OperationalError, connections, transaction
from django.test.utils import CaptureQueriesContext
from msgspec.structs import replace

from django_saga import (
    InsideTransaction,
    LeaseLost,
    Retry,
    Saga,
    SagaAlreadyRunning,
    SagaError,
    SagaFailed,
    SagaLimitReached,
    SagaNotFound,
    StorageUnavailable,
    machine,
)
from django_saga.machine import (
    Action,
    Effect,
    Error,
    Outcome,
    Plan,
    Record,
    Report,
    State,
    Status,
    StepRules,
    Transition,
)
from django_saga.models import SagaExecution, new_id
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage, SagaStorage, reading
from django_saga.storage.base import Checkpoint, Claim, Creation, Saved
from django_saga.storage.sql import EXECUTIONS, RECORDS
from tests.faults.strikes import striking
from tests.steps import Calls, Log, make_step, raises
from tests.tables import empty

pytestmark = pytest.mark.usefixtures("committing_databases")

ALIASES = list(settings.DATABASES)
SERVERS = [alias for alias in ALIASES if alias != "sqlite"]
PLAN: Plan = (("A",), ("P", "F"), ("C",))
RULES = StepRules(retry=Retry(attempts=2), compensation_retry=Retry(attempts=1))
WHY = Error("RuntimeError", "why")
THREADS = 8


@pytest.fixture(params=ALIASES)
def database(request: pytest.FixtureRequest) -> DjangoSagaStorage:
    """The storages with a database alone."""
    return DjangoSagaStorage(request.param)


@pytest.fixture
def emptied(storage: SagaStorage) -> SagaStorage:
    """A storage with nothing in it."""
    if isinstance(storage, DjangoSagaStorage):
        empty(storage.alias)
    return storage


@pytest.fixture
def saga() -> str:
    """A name of the test's own: it is not alone on the storage."""
    return f"tests.{uuid.uuid4()}"


def create(
    storage: SagaStorage, saga: str = "tests.contract", *, pending: bool = False, **more: Any
) -> Claim:
    state = machine.start(PLAN, '{"a":1}', pending=pending)
    claim = storage.create(uuid.uuid4(), saga, state, driver="first", **more)
    assert claim is not None
    return claim


def leased(storage: SagaStorage, saga: str = "tests.contract") -> Claim:
    return create(storage, saga, lease=60.0)


def settled(state: State, outcome: Outcome = Outcome.DONE) -> Transition:
    error = None if outcome is Outcome.DONE else WHY
    report = Report(outcome=outcome, context=state.context, error=error)
    return machine.settle(state, report, RULES)


def checkpoint(claim: Claim, transition: Transition, **more: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "id": claim.id,
        "token": claim.token,
        "before": claim.state,
        "after": transition.state,
        "record": transition.record,
        "duration": 0.5,
        "lease": 60.0 if transition.state.active else None,
    }
    return Checkpoint(**{**fields, **more})


def advance(
    storage: SagaStorage, claim: Claim, outcome: Outcome = Outcome.DONE, **more: Any
) -> None:
    """Checkpoint an attempt's outcome, and bring the claim up to it."""
    transition = settled(claim.state, outcome)
    storage.checkpoint(checkpoint(claim, transition, **more))
    claim.state = transition.state


def row(storage: SagaStorage, saga_id: UUID) -> SagaExecution:
    """The execution as it is stored."""
    if isinstance(storage, DjangoSagaStorage):
        return SagaExecution.objects.using(storage.alias).get(pk=saga_id)
    assert isinstance(storage, MemorySagaStorage)
    kept = storage._rows[saga_id]
    claim = storage._claim(saga_id, kept, time.time())
    at = datetime.fromtimestamp(kept.updated_at, UTC)
    execution = storage.execution(claim, kept.state, at, leased=True)
    if kept.grace_until is not None:
        execution.grace_until = datetime.fromtimestamp(kept.grace_until, UTC)
    return execution


def columns(storage: SagaStorage, saga_id: UUID) -> dict[str, Any]:
    found = row(storage, saga_id)
    return {field.attname: getattr(found, field.attname) for field in found._meta.concrete_fields}


def plain(value: Any) -> Any:
    """JSON does not tell tuples from lists."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def seconds_left(moment: datetime | None) -> float:
    assert moment is not None
    return (moment - datetime.now(UTC)).total_seconds()


def about(seconds: float) -> Any:
    """A clock of the same machine, and patience for a slow one."""
    return pytest.approx(seconds, abs=30)


def ids(claims: list[Claim]) -> list[UUID]:
    return [claim.id for claim in claims]


def in_threads(function: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Call it at once in several threads; what they raise is among the results."""
    barrier = threading.Barrier(count)

    def work(number: int) -> Any:
        barrier.wait()
        try:
            return function(number)
        except Exception as error:
            return error
        finally:
            connections.close_all()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


# create


def test_a_new_execution_has_the_first_token_and_is_leased_to_its_driver(
    storage: SagaStorage,
) -> None:
    claim = leased(storage)
    assert (claim.saga, claim.token, claim.wait) == ("tests.contract", 1, 0)
    assert claim.state == machine.start(PLAN, '{"a":1}')
    assert claim.at.utcoffset() == timedelta(0)
    assert seconds_left(claim.at) == about(0)
    stored = row(storage, claim.id)
    assert stored.state == claim.state
    assert (stored.saga, stored.token, stored.driver) == ("tests.contract", 1, "first")
    assert (plain(stored.plan), stored.initial_context) == (plain(PLAN), '{"a":1}')
    assert seconds_left(stored.lease_until) == about(60)
    assert (stored.wake_at, stored.finished_at, stored.retry_of_id) == (None, None, None)
    assert stored.created_at == stored.updated_at == claim.at


def test_an_execution_may_be_stored_for_later(storage: SagaStorage) -> None:
    claim = create(storage, pending=True, wake=500.0, grace=1000.0)
    stored = row(storage, claim.id)
    assert (stored.status, stored.in_flight, stored.lease_until) == ("PENDING", False, None)
    assert seconds_left(stored.wake_at) == about(500)
    assert seconds_left(stored.grace_until) == about(1000)
    assert claim.wait == about(500)
    seen = storage.execution(claim, claim.state, claim.at, leased=False)
    assert seconds_left(seen.wake_at) == about(500)


def test_what_waits_for_a_driver_names_none(storage: SagaStorage) -> None:
    state = machine.start(PLAN, "{}", pending=True)
    claim = storage.create(uuid.uuid4(), "tests.contract", state)
    assert claim is not None
    assert (claim.driver, row(storage, claim.id).driver) == ("", "")


def test_an_execution_is_linked_to_the_one_that_it_repeats(storage: SagaStorage) -> None:
    first = leased(storage)
    second = create(storage, pending=True, retry_of=first.id)
    assert row(storage, second.id).retry_of_id == first.id
    execution = storage.execution(second, second.state, second.at, leased=False)
    assert execution.retry_of_id == first.id


def test_an_id_that_is_taken_is_told_and_its_execution_left_as_it_is(storage: SagaStorage) -> None:
    first = leased(storage)
    before = columns(storage, first.id)
    other = machine.start((("X",),), '{"other":1}')
    for saga in ("tests.contract", "tests.other"):
        assert storage.create(first.id, saga, other, driver="second", lease=60.0) is None
    assert columns(storage, first.id) == before


def test_of_threads_that_create_one_id_one_wins(storage: SagaStorage) -> None:
    saga_id = uuid.uuid4()

    def compete(number: int) -> Claim | None:
        state = machine.start(PLAN, f'{{"number":{number}}}')
        return storage.create(saga_id, "tests.contract", state, driver=str(number), lease=60.0)

    [winner] = [claim for claim in in_threads(compete) if claim is not None]
    assert isinstance(winner, Claim), winner
    assert row(storage, saga_id).context == winner.state.context


# create_many


def create_many(storage: SagaStorage, contexts: dict[UUID, str], **more: Any) -> list[UUID]:
    state = machine.start(PLAN, "", pending=True)
    return storage.create_many("tests.contract", state, contexts, **more)


def contexts(count: int) -> dict[UUID, str]:
    return {uuid.uuid4(): f'{{"number":{number}}}' for number in range(count)}


def test_what_is_created_with_many_is_as_if_created_alone(storage: SagaStorage) -> None:
    given = contexts(3)
    assert create_many(storage, given, grace=1000.0) == list(given)
    for saga_id, context in given.items():
        many = columns(storage, saga_id)
        assert (many["initial_context"], many["context"]) == (context, context)
        assert seconds_left(many["grace_until"]) == about(1000)
        state = machine.start(PLAN, context, pending=True)
        alone = storage.create(uuid.uuid4(), "tests.contract", state)
        assert alone is not None
        assert row(storage, saga_id).state == state
        times = {"created_at", "updated_at", "grace_until"}
        for name, value in columns(storage, alone.id).items():
            if name not in times | {"id"}:
                assert plain(many[name]) == plain(value), name
        assert many["created_at"] == many["updated_at"] <= alone.at


def test_of_many_those_whose_id_is_taken_are_left_as_they_are(storage: SagaStorage) -> None:
    given = contexts(5)
    taken = list(given)[1:3]
    for saga_id in taken:
        assert storage.create(saga_id, "tests.contract", machine.start(PLAN, '{"first":1}'))
    before = [columns(storage, saga_id) for saga_id in taken]
    assert create_many(storage, given) == [id for id in given if id not in taken]
    assert [columns(storage, saga_id) for saga_id in taken] == before
    assert create_many(storage, given) == []
    assert create_many(storage, {}) == []


def test_of_threads_that_create_the_same_many_each_has_its_own(storage: SagaStorage) -> None:
    given = contexts(50)
    told = in_threads(lambda number: create_many(storage, given))
    assert not [error for error in told if isinstance(error, Exception)]
    assert sorted(saga_id for ids in told for saga_id in ids) == sorted(given)


def test_many_contexts_of_any_size_and_text_are_stored_whole(storage: SagaStorage) -> None:
    texts = ["{}", '{"a":"' + "x" * 1_000_000 + '"}', '{"a":"😀 %s {} \\u0000 \'; --"}']
    given = {uuid.uuid4(): text for text in texts}
    assert create_many(storage, given) == list(given)
    assert [row(storage, saga_id).context for saga_id in given] == texts


# acquire


def test_an_execution_that_nobody_drives_is_acquired_under_the_next_token(
    storage: SagaStorage,
) -> None:
    created = create(storage, pending=True)
    claim = storage.acquire(created.id, driver="second", lease=60.0)
    assert (claim.id, claim.token, claim.state) == (created.id, 2, created.state)
    assert (claim.saga, claim.wait) == (created.saga, 0)
    assert claim.at.utcoffset() == timedelta(0)
    assert seconds_left(claim.at) == about(0)
    stored = row(storage, created.id)
    assert (stored.token, stored.driver) == (2, "second")
    assert seconds_left(stored.lease_until) == about(60)


def test_an_execution_that_is_being_driven_is_refused_and_left_as_it_is(
    storage: SagaStorage,
) -> None:
    created = leased(storage)
    before = columns(storage, created.id)
    with pytest.raises(SagaAlreadyRunning) as refused:
        storage.acquire(created.id, driver="second", lease=60.0)
    for fact in ("tests.contract", str(created.id), "first", "act of step A"):
        assert fact in str(refused.value)
    assert columns(storage, created.id) == before


def test_a_lease_that_ran_out_is_taken_over(storage: SagaStorage) -> None:
    created = create(storage, lease=-1.0)
    assert storage.acquire(created.id, driver="second", lease=-1.0).token == 2
    assert storage.acquire(created.id, driver="third", lease=60.0).token == 3
    with pytest.raises(SagaAlreadyRunning, match="third"):
        storage.acquire(created.id, driver="fourth", lease=60.0)


def test_ones_own_lease_is_acquired_again_with_its_token_alone(storage: SagaStorage) -> None:
    created = leased(storage)
    for wrong in (0, 2, -1):
        with pytest.raises(SagaAlreadyRunning):
            storage.acquire(created.id, driver="first", lease=60.0, token=wrong)
    assert storage.acquire(created.id, driver="first", lease=60.0, token=1).token == 2
    with pytest.raises(SagaAlreadyRunning):
        storage.acquire(created.id, driver="first", lease=60.0, token=1)


def test_an_execution_that_was_released_is_acquired_at_once(storage: SagaStorage) -> None:
    created = leased(storage)
    storage.release(created.id, created.token)
    assert storage.acquire(created.id, driver="second", lease=60.0).token == 2


def test_acquiring_tells_how_long_to_wait_and_ends_the_time_of_grace(storage: SagaStorage) -> None:
    created = create(storage, pending=True, wake=500.0, grace=1000.0)
    claim = storage.acquire(created.id, driver="second", lease=60.0)
    assert claim.wait == about(500)
    assert row(storage, created.id).grace_until is None
    past = create(storage, pending=True, wake=-500.0)
    assert storage.acquire(past.id, driver="second", lease=60.0).wait == 0


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "STUCK"])
def test_an_execution_that_ended_is_returned_as_it_is(storage: SagaStorage, status: str) -> None:
    claim = ended(storage, status)
    before = columns(storage, claim.id)
    for token in (None, claim.token):
        read = storage.acquire(claim.id, driver="second", lease=60.0, token=token)
        assert (read.token, read.state.status.value) == (claim.token, status)
        assert read.state == claim.state
    assert columns(storage, claim.id) == before


def ended(
    storage: SagaStorage,
    status: str,
    saga: str = "tests.contract",
    *,
    lease: float | None = 60.0,
) -> Claim:
    claim = leased(storage, saga)
    done, failed = Outcome.DONE, Outcome.FAILED
    outcomes = {
        "COMPLETED": [done, done, done],
        "FAILED": [done, failed, failed, failed, failed, done],
        "STUCK": [done, failed, failed, failed, failed, failed],
    }
    for outcome in outcomes[status]:
        advance(storage, claim, outcome, lease=lease)
    assert claim.state.status.value == status
    return claim


def test_an_unknown_id_is_told(storage: SagaStorage) -> None:
    unknown = uuid.uuid4()
    with pytest.raises(SagaNotFound, match=str(unknown)):
        storage.acquire(unknown, driver="second", lease=60.0)


def test_an_id_of_another_saga_is_refused_naming_both(storage: SagaStorage) -> None:
    created = create(storage, pending=True)
    completed = ended(storage, "COMPLETED")
    for claim in (created, completed):
        before = columns(storage, claim.id)
        for other in ("tests.other", "Tests.Contract", "tests.contract ", ""):
            with pytest.raises(SagaNotFound, match=f"'tests.contract', not of '{other}'"):
                storage.acquire(claim.id, driver="second", lease=60.0, saga=other)
        assert columns(storage, claim.id) == before
    assert storage.acquire(created.id, driver="x", lease=60.0, saga="tests.contract").token == 2


def test_of_threads_that_acquire_one_execution_one_wins(storage: SagaStorage) -> None:
    created = create(storage, lease=-1.0)
    results = in_threads(lambda n: storage.acquire(created.id, driver=str(n), lease=60.0))
    [winner] = [result for result in results if isinstance(result, Claim)]
    assert winner.token == 2
    assert [type(r) for r in results if r is not winner] == [SagaAlreadyRunning] * (THREADS - 1)


# checkpoint


def test_a_checkpoint_stores_the_record_and_the_state_together(storage: SagaStorage) -> None:
    claim = leased(storage)
    transition = settled(claim.state)
    saved = storage.checkpoint(checkpoint(claim, transition))
    stored = row(storage, claim.id)
    assert stored.state == transition.state
    assert stored.token == claim.token, "a token counts drivers, not checkpoints"
    assert stored.updated_at == saved.at
    assert saved.at.utcoffset() == timedelta(0)
    assert seconds_left(stored.lease_until) == about(60)
    [record] = storage.history(claim.id)
    assert (record.step, record.action, record.attempt, record.outcome) == ("A", "act", 1, "DONE")
    assert (record.error_type, record.error_message, record.traceback) == ("", "", "")
    assert (record.duration, record.token, record.driver) == (0.5, 1, "first")
    assert (record.id, record.created_at) == (saved.record_id, saved.at)
    assert record.execution_id == claim.id


FULL = State(
    status=Status.COMPENSATING,
    plan=PLAN,
    context='{"a":"\\u0000 é \U0001f600"}',
    step="F",
    action=Action.COMPENSATE,
    attempt=7,
    failures=3,
    in_flight=False,
    effects=(Effect("A", Outcome.DONE), Effect("F", Outcome.UNKNOWN, Outcome.FAILED)),
    recoveries=2,
    fallback_context='{"before":1}',
    failed_step="C",
    error=Error("ValueError", "é \U0001f600 %s {} '\""),
    stuck_reason="é \U0001f600",
)


def test_every_part_of_a_state_comes_back_and_goes_again(storage: SagaStorage) -> None:
    claim = leased(storage)
    fresh = claim.state
    saved = storage.checkpoint(checkpoint(claim, Transition(state=FULL)))
    assert seconds_left(saved.at) == about(0)
    assert row(storage, claim.id).state == FULL
    claim.state = FULL
    storage.checkpoint(checkpoint(claim, Transition(state=fresh)))
    assert row(storage, claim.id).state == fresh
    assert storage.history(claim.id) == [], "no attempt, no record"


def test_a_failure_is_recorded_with_its_error(storage: SagaStorage) -> None:
    claim = leased(storage)
    error = Error("E" * 300, "m" * 5_000, "Traceback é\n" * 1_000)
    report = Report(outcome=Outcome.FAILED, context="{}", error=error)
    storage.checkpoint(checkpoint(claim, machine.settle(claim.state, report, StepRules())))
    [record] = storage.history(claim.id)
    stored = row(storage, claim.id)
    assert (record.error_message, record.traceback) == (error.message, error.traceback)
    assert stored.error_message == error.message
    for kept in (record.error_type, stored.error_type):
        assert kept == "E" * len(kept)
        assert len(kept) >= 255


def stale(claim: Claim) -> Iterator[tuple[str, Checkpoint]]:
    """Checkpoints of drivers that are not where the execution is."""
    good = settled(claim.state)
    before = claim.state
    replaced = machine.replace
    yield "older token", checkpoint(claim, good, token=claim.token - 1)
    yield "newer token", checkpoint(claim, good, token=claim.token + 1)
    yield "status", checkpoint(claim, good, before=replaced(before, status=Status.COMPENSATING))
    for step in ("C", "a", "A ", ""):
        yield f"step {step!r}", checkpoint(claim, good, before=replaced(before, step=step))
    yield "attempt", checkpoint(claim, good, before=replaced(before, attempt=2))
    yield "action", checkpoint(claim, good, before=replaced(before, action=Action.COMPENSATE))
    yield "id", checkpoint(claim, good, id=uuid.uuid4())


@pytest.mark.parametrize("recorded", [True, False], ids=["with record", "without record"])
def test_a_stale_checkpoint_writes_nothing(storage: SagaStorage, recorded: bool) -> None:
    claim = leased(storage)
    storage.release(claim.id, claim.token)
    claim = storage.acquire(claim.id, driver="second", lease=60.0)
    before = columns(storage, claim.id)
    for what, wrong in stale(claim):
        if not recorded:
            wrong = machine.replace(wrong, record=None)
        with pytest.raises(LeaseLost, match=r"step .* was in \w+; nothing was written") as lost:
            storage.checkpoint(wrong)
        assert str(wrong.id) in str(lost.value), what
        assert columns(storage, claim.id) == before, what
        assert storage.history(claim.id) == [], what
    storage.checkpoint(checkpoint(claim, settled(claim.state)))


def test_the_same_checkpoint_again_writes_nothing(storage: SagaStorage) -> None:
    claim = leased(storage)
    first = checkpoint(claim, settled(claim.state))
    storage.checkpoint(first)
    before = columns(storage, claim.id)
    with pytest.raises(LeaseLost):
        storage.checkpoint(first)
    assert columns(storage, claim.id) == before
    assert len(storage.history(claim.id)) == 1


def test_of_threads_that_write_one_checkpoint_one_wins(storage: SagaStorage) -> None:
    claim = leased(storage)
    one = checkpoint(claim, settled(claim.state))
    results = in_threads(lambda n: storage.checkpoint(one))
    assert [type(r) for r in results].count(LeaseLost) == THREADS - 1
    assert len(storage.history(claim.id)) == 1


def test_a_lease_that_ran_out_still_writes_until_another_takes_it(storage: SagaStorage) -> None:
    """The token decides; a slow driver that nobody replaced has done its work."""
    claim = create(storage, lease=-1.0)
    advance(storage, claim)
    assert seconds_left(row(storage, claim.id).lease_until) == about(60)
    storage.release(claim.id, claim.token)
    storage.acquire(claim.id, driver="second", lease=60.0)
    with pytest.raises(LeaseLost):
        advance(storage, claim)


def test_a_checkpoint_sets_the_times_and_the_next_one_clears_them(storage: SagaStorage) -> None:
    claim = leased(storage)
    advance(storage, claim, lease=None, wake=500.0, grace=1000.0)
    stored = row(storage, claim.id)
    assert stored.lease_until is None
    assert seconds_left(stored.wake_at) == about(500)
    assert seconds_left(stored.grace_until) == about(1000)
    advance(storage, claim)
    stored = row(storage, claim.id)
    assert seconds_left(stored.lease_until) == about(60)
    assert (stored.wake_at, stored.grace_until) == (None, None)


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "STUCK"])
def test_the_last_checkpoint_ends_the_execution_for_every_verb(
    storage: SagaStorage, status: str, saga: str
) -> None:
    claim = ended(storage, status)
    stored = row(storage, claim.id)
    assert stored.finished_at is not None
    assert stored.finished_at == stored.updated_at
    assert storage.renew([(claim.id, claim.token)], lease=60.0) == set()
    before = columns(storage, claim.id)
    storage.release(claim.id, claim.token, unstarted=True, grace=60.0)
    assert columns(storage, claim.id) == before
    assert claim.id not in ids(storage.due(10_000))


@pytest.mark.parametrize("how", [{}, {"lease": 60.0}, {"grace": 60.0}], ids=str)
@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "STUCK"])
def test_what_has_ended_is_not_due_though_nobody_holds_it(
    storage: SagaStorage, saga: str, status: str, how: dict[str, float]
) -> None:
    ended(storage, status, saga, lease=None)
    assert storage.due(100, saga=saga, **how) == []


def test_an_execution_that_goes_on_after_being_stuck_has_not_ended_any_more(
    storage: SagaStorage,
) -> None:
    claim = ended(storage, "STUCK")
    again = machine.compensate_again(claim.state)
    storage.checkpoint(checkpoint(claim, again, lease=None))
    stored = row(storage, claim.id)
    assert (stored.status, stored.finished_at) == ("COMPENSATING", None)
    taken = storage.acquire(claim.id, driver="second", lease=60.0)
    assert taken.token == claim.token + 1
    begun = machine.begin(taken.state)
    saved = storage.checkpoint(checkpoint(taken, begun))
    taken.state = begun.state
    seen = storage.execution(taken, begun.state, saved.at, leased=True)
    assert seen.finished_at is None
    advance(storage, taken)
    assert row(storage, claim.id).finished_at is not None


def test_the_instance_in_hand_is_what_is_stored(storage: SagaStorage) -> None:
    """Without reading it again; but for the times of the lease, which are the driver's own."""
    created = leased(storage)
    acquired = storage.acquire(created.id, driver="second", lease=60.0, token=1)
    for claim in (leased(storage), acquired):
        transition = settled(claim.state)
        saved = storage.checkpoint(checkpoint(claim, transition))
        seen = storage.execution(claim, transition.state, saved.at, leased=True)
        stored = columns(storage, claim.id)
        for name in stored.keys() - {"lease_until", "wake_at", "grace_until"}:
            assert plain(getattr(seen, name)) == plain(stored[name]), name
        assert seen.wake_at is None
        seen = storage.execution(claim, transition.state, saved.at, leased=False)
        assert seen.lease_until is None


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "STUCK"])
def test_the_instance_of_what_has_ended_is_what_is_stored(
    storage: SagaStorage, status: str
) -> None:
    claim = ended(storage, status, lease=None)
    stored = columns(storage, claim.id)
    at, later = stored["updated_at"], stored["updated_at"] + timedelta(seconds=9)
    seen = storage.execution(claim, claim.state, at, leased=False)
    for name in stored:
        assert plain(getattr(seen, name)) == plain(stored[name]), name
    read = storage.acquire(claim.id, driver="second", lease=60.0)
    again = storage.execution(read, read.state, later, leased=False)
    assert (again.finished_at, again.lease_until) == (stored["finished_at"], None)


def test_the_instance_of_what_is_acquired_knows_its_lease(storage: SagaStorage) -> None:
    created = create(storage, pending=True)
    claim = storage.acquire(created.id, driver="second", lease=60.0)
    seen = storage.execution(claim, claim.state, claim.at, leased=True)
    assert seconds_left(seen.lease_until) == about(60)


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_large_context_is_stored_whole(storage: SagaStorage, size: int) -> None:
    context = '{"a":"' + "x" * (size - 8) + '"}'
    assert len(context) == size
    claim = storage.create(uuid.uuid4(), "tests.contract", machine.start(PLAN, context), lease=60.0)
    assert claim is not None
    report = Report(outcome=Outcome.DONE, context=context.replace("x", "y"))
    transition = machine.settle(claim.state, report, RULES)
    storage.checkpoint(checkpoint(claim, transition))
    stored = row(storage, claim.id)
    assert (stored.initial_context, stored.context) == (context, context.replace("x", "y"))


def test_an_error_of_any_text_is_stored(storage: SagaStorage) -> None:
    hostile = "NUL \x00, half \ud83d of a pair, \U0001f600, %s, {}, '; --"
    calls = Calls()
    steps = [make_step("A", calls), make_step("B", calls, act=raises(RuntimeError(hostile)))]
    with pytest.raises(SagaFailed) as failed:
        Saga(steps=steps, storage=storage, name="tests.contract").run(Log())
    expected = "NUL \\x00, half \\ud83d of a pair, \U0001f600, %s, {}, '; --"
    assert row(storage, failed.value.execution.id).error_message == expected
    record = storage.history(failed.value.execution.id)[1]
    assert record.error_message == expected
    assert expected in record.traceback


def test_a_reason_of_any_text_is_stored(storage: SagaStorage) -> None:
    """It may quote a stored context; what is stuck for it must not stumble over it for ever."""
    claim = leased(storage)
    stuck = machine.stick(claim.state, "no enum value 'NUL \x00 \ud83d'")
    storage.checkpoint(checkpoint(claim, stuck))
    stored = row(storage, claim.id)
    assert stored.status == "STUCK"
    assert "no enum value" in stored.stuck_reason
    assert "no enum value" in stored.error_message
    if isinstance(storage, DjangoSagaStorage):
        expected = "no enum value 'NUL \\x00 \\ud83d'"
        assert (stored.stuck_reason, stored.error_message) == (expected, expected)


# renew and release


def test_leases_that_hold_are_renewed_and_those_are_told(storage: SagaStorage) -> None:
    held, expired, released, lost = (create(storage, lease=1.0) for _ in range(4))
    expired = create(storage, lease=-1.0)
    storage.release(released.id, released.token)
    storage.acquire(lost.id, driver="second", lease=1.0, token=lost.token)
    done = ended(storage, "COMPLETED")
    every = [held, expired, released, lost, done]
    renewed = storage.renew([(claim.id, claim.token) for claim in every], lease=500.0)
    assert renewed == {held.id, expired.id}
    assert seconds_left(row(storage, held.id).lease_until) == about(500)
    assert seconds_left(row(storage, expired.id).lease_until) == about(500)
    assert row(storage, released.id).lease_until is None
    assert seconds_left(row(storage, lost.id).lease_until) == about(0)


def test_renewing_nothing_or_what_is_unknown_is_no_error(storage: SagaStorage) -> None:
    assert storage.renew([], lease=60.0) == set()
    assert storage.renew([(uuid.uuid4(), 1)], lease=60.0) == set()


def test_many_leases_are_renewed_at_once(storage: SagaStorage) -> None:
    """Also more than SQLite can tell apart by ORs."""
    claims = [create(storage, lease=1.0) for _ in range(3)]
    others = [(uuid.uuid4(), 1) for _ in range(2_000)]
    held = [(claim.id, claim.token) for claim in claims]
    assert storage.renew(others + held, lease=500.0) == set(ids(claims))
    assert storage.renew(held, lease=500.0) == set(ids(claims))


def test_only_who_holds_a_lease_can_release_it(storage: SagaStorage) -> None:
    claim = leased(storage)
    before = columns(storage, claim.id)
    for token in (claim.token - 1, claim.token + 1):
        storage.release(claim.id, token, unstarted=True, grace=60.0)
    storage.release(uuid.uuid4(), 1)
    assert columns(storage, claim.id) == before


@pytest.mark.parametrize("unstarted", [True, False])
def test_a_release_tells_whether_the_attempt_in_flight_began(
    storage: SagaStorage, unstarted: bool
) -> None:
    claim = leased(storage)
    storage.release(claim.id, claim.token, unstarted=unstarted, grace=500.0)
    stored = row(storage, claim.id)
    assert stored.lease_until is None
    assert stored.in_flight is (not unstarted)
    assert seconds_left(stored.grace_until) == about(500)


def test_a_release_leaves_open_whether_the_attempt_began_and_gives_no_grace_unless_told(
    storage: SagaStorage,
) -> None:
    claim = create(storage, lease=60.0, grace=1000.0)
    storage.release(claim.id, claim.token)
    stored = row(storage, claim.id)
    assert (stored.in_flight, stored.lease_until, stored.grace_until) == (True, None, None)


def test_a_release_puts_nothing_in_flight_and_keeps_a_wait(storage: SagaStorage) -> None:
    claim = leased(storage)
    advance(storage, claim)
    advance(storage, claim, Outcome.FAILED, wake=500.0)
    assert not claim.state.in_flight
    storage.release(claim.id, claim.token)
    stored = row(storage, claim.id)
    assert not stored.in_flight
    assert seconds_left(stored.wake_at) == about(500)


# due


def test_what_nobody_drives_and_may_go_on_is_due(storage: SagaStorage, saga: str) -> None:
    stored = create(storage, saga, pending=True)
    lost = create(storage, saga, lease=-1.0)
    released = leased(storage, saga)
    storage.release(released.id, released.token)
    awake = create(storage, saga, pending=True, wake=-1.0, grace=-1.0)
    leased(storage, saga)
    create(storage, saga, pending=True, wake=500.0)
    create(storage, saga, pending=True, grace=500.0)
    create(storage, f"{saga}.other", pending=True)
    create(storage, saga.upper(), pending=True)
    create(storage, f"{saga} ", pending=True)
    found = storage.due(100, saga=saga)
    assert set(ids(found)) == {stored.id, lost.id, released.id, awake.id}
    assert {claim.id: claim.state for claim in found}[lost.id] == lost.state


def test_without_a_lease_or_grace_nothing_is_changed(storage: SagaStorage, saga: str) -> None:
    created = create(storage, saga, pending=True)
    before = columns(storage, created.id)
    for _ in range(2):
        [claim] = storage.due(100, saga=saga)
        assert (claim.id, claim.token, claim.saga) == (created.id, 1, saga)
    assert columns(storage, created.id) == before


@pytest.mark.parametrize("how", [{}, {"lease": 60.0}, {"grace": 60.0}], ids=str)
def test_the_oldest_come_first_and_no_more_than_the_limit(
    storage: SagaStorage, saga: str, how: dict[str, float]
) -> None:
    created = [create(storage, saga, pending=True) for _ in range(6)]
    for number, claim in enumerate(created):
        make_older(storage, claim.id, seconds=100.0 * ((number * 5) % 6))
    oldest = sorted(created, key=lambda claim: row(storage, claim.id).created_at)
    assert ids(storage.due(4, saga=saga, **how)) == ids(oldest)[:4]
    assert storage.due(0, saga=saga, **how) == []


@pytest.mark.parametrize("how", [{}, {"lease": 60.0}, {"grace": 60.0}], ids=str)
def test_each_saga_has_its_share_however_many_of_another_wait(
    emptied: SagaStorage, how: dict[str, float]
) -> None:
    create_many(emptied, contexts(30))
    late = [create(emptied, "tests.late", pending=True).id for _ in range(3)]
    later = [create(emptied, "tests.later", pending=True).id for _ in range(20)]
    first = emptied.due(20, **how)
    assert set(late) < set(ids(first)), "few of them: all come"
    assert Counter(claim.saga for claim in first)["tests.later"] in (8, 9), "half of the rest"
    assert len(set(ids(first))) == len(first) == 20
    oldest = [saga_id for saga_id in later if saga_id in ids(first)]
    assert oldest == later[: len(oldest)]
    if how:
        second = emptied.due(100, **how)
        assert len(second) == 53 - 20
        assert not set(ids(first)) & set(ids(second))
        assert emptied.due(100, **how) == []


def test_with_fewer_places_than_sagas_each_has_its_chance(emptied: SagaStorage) -> None:
    for name in ("tests.a", "tests.b"):
        for _ in range(40):
            create(emptied, name, pending=True)
    found = [claim.saga for _ in range(40) for claim in emptied.due(1, lease=60.0)]
    assert len(found) == 40
    assert set(found) == {"tests.a", "tests.b"}, "by chance only one in 2 ** 39 times"


def test_names_that_a_collation_takes_for_one_are_sagas_of_their_own(emptied: SagaStorage) -> None:
    names = {"tests.saga", "tests.Saga", "tests.saga ", "tests.s\u00e4ga", "tests.\U0001f600"}
    for name in names:
        create(emptied, name, pending=True)
    assert {claim.saga for claim in emptied.due(10, lease=60.0)} == names


# limits


@pytest.fixture
def limited(saga: str) -> type[Saga[Log]]:
    """A saga of which three may run at once."""
    body = {"name": saga, "steps": [make_step("A", Calls())], "max_running": 3}
    return type("Limited", (Saga,), body)


def begin(storage: SagaStorage, saga: str, key: str = "", count: int = 3) -> list[Claim]:
    return [create(storage, saga, lease=60.0, limit_key=key) for _ in range(count)]


def wait(storage: SagaStorage, saga: str, key: str = "", count: int = 1) -> list[Claim]:
    return [create(storage, saga, pending=True, limit_key=key) for _ in range(count)]


def end(storage: SagaStorage, claim: Claim, status: Status = Status.COMPLETED) -> None:
    after = replace(claim.state, status=status, in_flight=False)
    storage.checkpoint(checkpoint(claim, Transition(state=after), place=True))


def acquire(storage: SagaStorage, claim: Claim) -> Claim:
    return storage.acquire(claim.id, driver="second", lease=60.0)


def test_no_more_begin_than_may_run_at_once(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    begin(storage, saga)
    refused = uuid.uuid4()
    state = machine.start(PLAN, "{}")
    with pytest.raises(SagaLimitReached, match=f"3 of 3 of {saga} are running; .*enqueue"):
        storage.create(refused, saga, state, lease=60.0, limit_key="")
    with pytest.raises(SagaNotFound):
        storage.acquire(refused, driver="x", lease=60.0)
    begin(storage, saga, "another key")
    begin(storage, f"{saga}.other")
    assert storage.running(saga, "") == storage.running(saga, "another key") == 3
    with pytest.raises(SagaLimitReached, match=f"3 of 3 of {saga} with its limit_key are running"):
        begin(storage, saga, "another key", 1)


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.FAILED, Status.STUCK])
def test_what_ends_gives_its_place_to_what_waits(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str, status: Status
) -> None:
    running = begin(storage, saga)
    waiting, other = *wait(storage, saga), *wait(storage, saga, "another key")
    told = f"Saga {saga} {waiting.id} waits: 3 of 3 of {saga} are running\\."
    with pytest.raises(SagaLimitReached, match=told):
        acquire(storage, waiting)
    assert acquire(storage, other).state.status is Status.PENDING
    end(storage, running[1], status)
    assert storage.running(saga, "") == 2
    claim = acquire(storage, waiting)
    assert (claim.token, claim.limit_key) == (2, "")
    assert storage.running(saga, "") == 3
    end(storage, claim, Status.FAILED)
    assert storage.running(saga, "") == 2


def test_what_waits_for_a_retry_or_lost_its_driver_keeps_its_place(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    first, second, _ = begin(storage, saga)
    [waiting] = wait(storage, saga)
    advance(storage, first)
    advance(storage, first, Outcome.FAILED, wake=500.0, place=True)
    storage.release(first.id, first.token)
    storage.release(second.id, second.token)
    with pytest.raises(SagaLimitReached):
        acquire(storage, waiting)
    assert acquire(storage, second).token == 2
    assert acquire(storage, first).token == 2


@pytest.mark.parametrize("pending", [False, True], ids=["begun", "acquired"])
def test_of_many_threads_no_more_begin_than_may_run(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str, pending: bool
) -> None:
    waiting = wait(storage, saga, count=20)

    def compete(number: int) -> Claim:
        return acquire(storage, waiting[number]) if pending else begin(storage, saga, count=1)[0]

    came = in_threads(compete, 20)
    assert len([claim for claim in came if isinstance(claim, Claim)]) == 3, came
    assert len([error for error in came if isinstance(error, SagaLimitReached)]) == 17
    assert storage.running(saga, "") == 3


@pytest.mark.parametrize("how", [{}, {"lease": 60.0}, {"grace": 60.0}], ids=str)
def test_as_many_are_due_as_there_are_places_the_oldest_first(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str, how: dict[str, float]
) -> None:
    running = begin(storage, saga, count=2)
    waiting = wait(storage, saga, count=5)
    others = wait(storage, saga, "another key", 5)
    delayed = create(storage, saga, pending=True, wake=500.0, limit_key="third")
    for claim, seconds in zip(waiting, (1, 2, 5, 3, 4), strict=True):
        make_older(storage, claim.id, 100.0 * seconds)
    due = set(ids(storage.due(20, saga=saga, **how)))
    assert due == {waiting[2].id, *ids(others[:3])}
    assert delayed.id not in due
    if "lease" in how:
        assert storage.running(saga, "") == storage.running(saga, "another key") == 3
        assert storage.due(20, saga=saga, **how) == []
        end(storage, running[0])
        assert ids(storage.due(20, saga=saga, **how)) == [waiting[4].id]


def test_what_compensates_needs_no_place(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    """An operator retries what was stuck, whose place another has."""
    [stuck] = begin(storage, saga, count=1)
    end(storage, stuck, Status.STUCK)
    stuck.state = replace(stuck.state, status=Status.STUCK, in_flight=False)
    back = replace(stuck.state, status=Status.COMPENSATING, action=Action.COMPENSATE)
    storage.checkpoint(checkpoint(stuck, Transition(state=back), lease=None, place=False))
    begin(storage, saga)
    assert ids(storage.due(10, saga=saga)) == [stuck.id]
    assert acquire(storage, stuck).token == 2


def test_what_was_stuck_goes_forward_only_with_a_place(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    [stuck] = begin(storage, saga, count=1)
    end(storage, stuck, Status.STUCK)
    stuck.state = replace(stuck.state, status=Status.STUCK, in_flight=False)
    forward = replace(stuck.state, status=Status.RUNNING)
    storage.checkpoint(checkpoint(stuck, Transition(state=forward), lease=None, place=False))
    running = begin(storage, saga)
    assert storage.due(10, saga=saga) == []
    with pytest.raises(SagaLimitReached):
        acquire(storage, stuck)
    end(storage, running[0])
    assert ids(storage.due(10, saga=saga, lease=60.0)) == [stuck.id]


def test_another_limit_holds_from_the_next_that_begins(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    running = begin(storage, saga)
    waiting = wait(storage, saga, count=4)
    limited.max_running = 1
    for claim in running[:2]:
        end(storage, claim)
    with pytest.raises(SagaLimitReached, match="1 of 1"):
        acquire(storage, waiting[0])
    limited.max_running = 2
    acquire(storage, waiting[0])
    with pytest.raises(SagaLimitReached, match="2 of 2"):
        acquire(storage, waiting[1])
    limited.max_running = None
    acquire(storage, waiting[1])
    assert set(ids(storage.due(10, saga=saga, lease=60.0))) == set(ids(waiting[2:]))


def test_those_that_waited_longest_are_next_for_the_places_that_are_free(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    running = begin(storage, saga)
    waiting = wait(storage, saga, count=4)
    wait(storage, saga, "another key")
    create(storage, saga, pending=True, wake=500.0, limit_key="")
    make_older(storage, waiting[3].id, 100.0)
    assert storage.next_waiting(saga, "", 10) == []
    end(storage, running[0])
    assert storage.next_waiting(saga, "", 10) == [waiting[3].id]
    end(storage, running[1])
    assert storage.next_waiting(saga, "", 10) == [waiting[3].id, waiting[0].id]
    assert storage.next_waiting(saga, "", 1) == [waiting[3].id]


def test_an_id_that_is_taken_is_told_though_no_place_is_free(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    first = begin(storage, saga)[0]
    state = machine.start(PLAN, "{}")
    assert storage.create(first.id, saga, state, lease=60.0, limit_key="") is None
    assert storage.create(first.id, saga, state, limit_key="") is None
    assert storage.running(saga, "") == 3


def test_an_operator_may_hold_what_waits_for_a_place(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    begin(storage, saga)
    [waiting] = wait(storage, saga)
    assert storage.acquire(waiting.id, driver="x", lease=60.0, by_hand=True).token == 2
    assert storage.running(saga, "") == 3


def test_many_wait_each_with_its_key(
    storage: SagaStorage, limited: type[Saga[Log]], saga: str
) -> None:
    given = contexts(8)
    keys = {saga_id: "ab"[number % 2] for number, saga_id in enumerate(given)}
    state = machine.start(PLAN, "", pending=True)
    assert storage.create_many(saga, state, given, limit_keys=keys) == list(given)
    claims = storage.due(10, saga=saga, lease=60.0)
    assert Counter(keys[claim.id] for claim in claims) == {"a": 3, "b": 3}
    assert {claim.limit_key for claim in claims} == {"a", "b"}


def make_older(storage: SagaStorage, saga_id: UUID, seconds: float) -> None:
    if isinstance(storage, DjangoSagaStorage):
        rows = SagaExecution.objects.using(storage.alias).filter(pk=saga_id)
        moment = rows.get().created_at - timedelta(seconds=seconds)
        rows.update(created_at=moment, updated_at=moment)
    else:
        assert isinstance(storage, MemorySagaStorage)
        storage._rows[saga_id].created_at -= seconds
        storage._rows[saga_id].updated_at -= seconds


def test_with_a_lease_what_is_due_is_acquired(storage: SagaStorage, saga: str) -> None:
    created = create(storage, saga, pending=True, grace=-1.0)
    [claim] = storage.due(100, driver="sweep", lease=60.0, saga=saga)
    assert (claim.id, claim.token, claim.state) == (created.id, 2, created.state)
    stored = row(storage, created.id)
    assert (stored.token, stored.driver, stored.grace_until) == (2, "sweep", None)
    assert seconds_left(stored.lease_until) == about(60)
    assert storage.due(100, driver="sweep", lease=60.0, saga=saga) == []
    advance(storage, claim)


@pytest.mark.parametrize("lease", [0.0, -1.0])
def test_a_lease_of_no_time_is_a_lease_all_the_same(
    storage: SagaStorage, saga: str, lease: float
) -> None:
    create(storage, saga, pending=True)
    for token in (2, 3):
        [claim] = storage.due(100, lease=lease, saga=saga)
        assert claim.token == token
        assert row(storage, claim.id).driver == ""


def test_with_grace_what_is_due_is_left_alone_for_a_while_and_not_acquired(
    storage: SagaStorage, saga: str
) -> None:
    created = create(storage, saga, pending=True)
    [claim] = storage.due(100, grace=500.0, saga=saga)
    assert claim.token == 1
    stored = row(storage, created.id)
    assert (stored.token, stored.driver, stored.lease_until) == (1, "first", None)
    assert seconds_left(stored.grace_until) == about(500)
    assert storage.due(100, grace=500.0, saga=saga) == []
    assert storage.due(100, lease=60.0, saga=saga) == []
    assert storage.acquire(created.id, driver="worker", lease=60.0).token == 2


@pytest.mark.parametrize(("age", "alone"), [(400.0, 400), (5_000.0, 600)])
def test_what_has_waited_long_is_left_alone_for_as_long_again_within_a_limit(
    storage: SagaStorage, saga: str, age: float, alone: float
) -> None:
    created = create(storage, saga, pending=True)
    make_older(storage, created.id, seconds=age)
    storage.due(100, grace=60.0, saga=saga)
    assert seconds_left(row(storage, created.id).grace_until) == about(alone)


def test_what_went_on_lately_has_not_waited_long_however_old_it_is(
    storage: SagaStorage, saga: str
) -> None:
    created = create(storage, saga, pending=True)
    make_older(storage, created.id, seconds=5_000.0)
    advance(storage, storage.acquire(created.id, driver="second", lease=60.0), lease=None)
    assert ids(storage.due(100, grace=60.0, saga=saga)) == [created.id]
    assert seconds_left(row(storage, created.id).grace_until) == about(60)


def test_a_grace_of_no_time_leaves_nothing_alone(storage: SagaStorage, saga: str) -> None:
    created = create(storage, saga, pending=True)
    make_older(storage, created.id, seconds=400.0)
    for _ in range(2):
        assert ids(storage.due(100, grace=0.0, saga=saga)) == [created.id]


@pytest.mark.parametrize("how", ["lease", "grace"])
def test_threads_that_claim_what_is_due_never_claim_the_same(
    storage: SagaStorage, saga: str, how: str
) -> None:
    created = [create(storage, saga, pending=True) for _ in range(40)]

    def claim_all(number: int) -> list[UUID]:
        mine: list[UUID] = []
        while claims := storage.due(3, driver=str(number), saga=saga, **{how: 60.0}):
            mine += ids(claims)
        return mine

    results = in_threads(claim_all)
    assert not [result for result in results if isinstance(result, Exception)]
    claimed = [saga_id for result in results for saga_id in result]
    assert len(claimed) == len(set(claimed))
    assert set(claimed) == set(ids(created))


# history


def test_the_history_is_in_order_and_each_executions_own(storage: SagaStorage) -> None:
    claim, other = leased(storage), leased(storage)
    for outcome in (Outcome.DONE, Outcome.FAILED, Outcome.UNKNOWN, Outcome.DONE):
        advance(storage, claim, outcome)
    advance(storage, other)
    assert [(r.step, r.action, r.attempt, r.outcome) for r in storage.history(claim.id)] == [
        ("A", "act", 1, "DONE"),
        ("P", "act", 1, "FAILED"),
        ("P", "act", 2, "UNKNOWN"),
        ("P", "compensate", 1, "DONE"),
    ]
    assert storage.history(uuid.uuid4()) == []


def test_a_record_names_the_driver_and_the_token_that_wrote_it(storage: SagaStorage) -> None:
    claim = leased(storage)
    advance(storage, claim)
    storage.release(claim.id, claim.token)
    second = storage.acquire(claim.id, driver="second", lease=60.0)
    advance(storage, second)
    history = storage.history(claim.id)
    assert [(r.driver, r.token) for r in history] == [("first", 1), ("second", 2)]
    ids_and_times = [(r.id, r.created_at) for r in history]
    assert ids_and_times == sorted(ids_and_times)


# on_commit and transactions


def test_without_a_transaction_a_callback_is_called_at_once(storage: SagaStorage) -> None:
    called: list[str] = []
    storage.on_commit(lambda: called.append("now"))
    assert called == ["now"]


def test_a_callback_that_raises_is_logged(
    storage: SagaStorage, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("no bell")

    storage.on_commit(fail)
    assert "no bell" in caplog.text


def test_outside_of_a_transaction_nothing_is_refused(storage: SagaStorage) -> None:
    storage.refuse_transaction()
    leased(storage)
    storage.refuse_transaction()


def test_a_checkpoint_inside_the_atomic_block_is_stored_with_it(storage: SagaStorage) -> None:
    claim = leased(storage)
    with storage.atomic(60.0):
        storage.checkpoint(checkpoint(claim, settled(claim.state)), inside=True)
    assert row(storage, claim.id).step == "P"


# What only a database does


def test_in_a_callers_transaction_a_stored_execution_lives_and_dies_with_it(
    database: DjangoSagaStorage,
) -> None:
    with transaction.atomic(using=database.alias):
        kept = create(database, pending=True)
        again = database.create(kept.id, "tests.contract", kept.state)
        assert again is None, "an id that is taken, in the transaction that took it"
        Group.objects.using(database.alias).count()  # the transaction is still good
    assert row(database, kept.id).status == "PENDING"
    with transaction.atomic(using=database.alias):
        lost = create(database, pending=True)
        assert database.create(kept.id, "tests.contract", kept.state) is None
        transaction.set_rollback(True, using=database.alias)
    with pytest.raises(SagaNotFound):
        database.acquire(lost.id, driver="x", lease=60.0)


def test_many_that_are_stored_in_a_callers_transaction_live_and_die_with_it(
    database: DjangoSagaStorage,
) -> None:
    kept, lost = contexts(3), contexts(3)
    with transaction.atomic(using=database.alias):
        assert create_many(database, kept) == list(kept)
        assert create_many(database, kept) == []
    assert [row(database, saga_id).status for saga_id in kept] == ["PENDING"] * 3
    with transaction.atomic(using=database.alias):
        assert create_many(database, {**kept, **lost}) == list(lost)
        transaction.set_rollback(True, using=database.alias)
    assert create_many(database, {**kept, **lost}) == list(lost)


@pytest.mark.parametrize("alias", SERVERS)
def test_an_id_that_was_taken_since_the_transaction_began_is_taken(alias: str) -> None:
    database, given, connection = DjangoSagaStorage(alias), contexts(3), connections[alias]
    if connection.vendor == "mysql":  # where a project may read what was there when it began
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    with closing(connection), transaction.atomic(using=alias):
        assert not SagaExecution.objects.using(alias).filter(pk__in=given).exists()
        taken = dict(list(given.items())[:2])
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(create_many, database, taken).result() == list(taken)
            pool.submit(connections.close_all).result()
        assert create_many(database, given) == list(given)[2:]


def test_a_thousand_are_stored_in_one_statement(database: DjangoSagaStorage) -> None:
    given = contexts(1000)
    with CaptureQueriesContext(connections[database.alias]) as queries:
        assert create_many(database, given) == list(given)
    assert len(queries) == 1


def test_a_link_to_no_execution_is_not_taken_for_an_id_that_is_taken(
    database: DjangoSagaStorage,
) -> None:
    with pytest.raises(IntegrityError):
        create(database, pending=True, retry_of=uuid.uuid4())


def test_callbacks_follow_the_callers_transaction(database: DjangoSagaStorage) -> None:
    called: list[str] = []
    with transaction.atomic(using=database.alias):
        database.on_commit(lambda: called.append("committed"))
        assert called == []
    assert called == ["committed"]
    with transaction.atomic(using=database.alias):
        database.on_commit(lambda: called.append("rolled back"))
        transaction.set_rollback(True, using=database.alias)
    assert called == ["committed"]


@contextmanager
def manual_transaction(alias: str) -> Iterator[None]:
    transaction.set_autocommit(False, using=alias)
    try:
        yield
    finally:
        transaction.rollback(using=alias)
        transaction.set_autocommit(True, using=alias)


@pytest.mark.parametrize("kind", ["atomic", "nested", "manual"])
def test_whatever_must_be_durable_is_refused_in_a_callers_transaction(
    database: DjangoSagaStorage, kind: str
) -> None:
    claim, due = leased(database), create(database, pending=True)
    before = columns(database, claim.id), columns(database, due.id)
    blocks = {
        "atomic": [transaction.atomic(using=database.alias)],
        "nested": [transaction.atomic(using=database.alias) for _ in range(2)],
        "manual": [manual_transaction(database.alias)],
    }
    verbs: list[Callable[[], object]] = [
        database.refuse_transaction,
        lambda: create(database, lease=60.0),
        lambda: database.acquire(due.id, driver="x", lease=60.0),
        lambda: database.checkpoint(checkpoint(claim, settled(claim.state))),
        lambda: database.due(10, lease=60.0),
        lambda: database.atomic(60.0).__enter__(),
    ]
    with ExitStack() as stack:
        for block in blocks[kind]:
            stack.enter_context(block)
        for verb in verbs:
            with pytest.raises(InsideTransaction, match=r"enqueue\(\).*non_atomic_requests"):
                verb()
    assert (columns(database, claim.id), columns(database, due.id)) == before


def test_the_transaction_of_a_django_test_case_is_none_of_the_callers(
    database: DjangoSagaStorage,
) -> None:
    around = transaction.atomic(using=database.alias)
    around._from_testcase = True  # type: ignore[attr-defined]  # as TestCase marks its own
    with around:
        database.refuse_transaction()
        advance(database, leased(database))
        with transaction.atomic(using=database.alias), pytest.raises(InsideTransaction):
            database.refuse_transaction()


def atomic_step(
    storage: DjangoSagaStorage, claim: Claim, name: str = "", then: Callable[[], object] = list
) -> None:
    """What the driver does for an atomic step, whose handler writes a group."""
    with storage.atomic(60.0):
        if name:
            Group.objects.using(storage.alias).create(name=name)
        then()
        storage.checkpoint(checkpoint(claim, settled(claim.state)), inside=True)


def wrote(storage: DjangoSagaStorage, name: str) -> bool:
    return bool(Group.objects.using(storage.alias).filter(name=name).delete()[0])


def test_an_atomic_steps_writes_and_its_checkpoint_commit_together(
    database: DjangoSagaStorage, saga: str
) -> None:
    claim = leased(database)
    atomic_step(database, claim, saga)
    assert wrote(database, saga)
    assert row(database, claim.id).step == "P"
    assert len(database.history(claim.id)) == 1


def test_an_atomic_step_that_raises_leaves_neither_writes_nor_checkpoint(
    database: DjangoSagaStorage, saga: str
) -> None:
    claim = leased(database)
    before = columns(database, claim.id)

    def checkpoint_and_fail() -> None:
        database.checkpoint(checkpoint(claim, settled(claim.state)), inside=True)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic_step(database, claim, saga, checkpoint_and_fail)
    assert not wrote(database, saga)
    assert columns(database, claim.id) == before
    assert database.history(claim.id) == []


def test_an_atomic_step_whose_lease_was_lost_leaves_no_writes(
    database: DjangoSagaStorage, saga: str
) -> None:
    claim = leased(database)
    database.release(claim.id, claim.token)
    database.acquire(claim.id, driver="second", lease=60.0)
    with pytest.raises(LeaseLost):
        atomic_step(database, claim, saga)
    assert not wrote(database, saga)


def test_a_commit_that_the_database_refuses_for_now_is_an_outage(
    database: DjangoSagaStorage, saga: str
) -> None:
    """As where it cannot serialize transactions: the session is good, the writes are gone."""
    claim = leased(database)

    def refuse() -> None:
        raise OperationalError("could not serialize access")

    with pytest.raises(StorageUnavailable, match="could not serialize access"):
        atomic_step(database, claim, saga, refuse)
    assert not wrote(database, saga)
    atomic_step(database, claim, saga)
    assert wrote(database, saga)


@pytest.mark.parametrize(("lease", "limit"), [(60.0, "1min"), (90.25, "90250ms")])
def test_a_transaction_that_idles_is_ended_with_its_lease(lease: float, limit: str) -> None:
    seen: list[str] = []

    def look(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        answer = execute(sql, params, many, context)
        if "idle_in_transaction" in sql:
            seen.extend(context["cursor"].fetchone())
        return answer

    with connections["default"].execute_wrapper(look), DjangoSagaStorage("default").atomic(lease):
        pass
    with connections["default"].cursor() as cursor:
        cursor.execute("SHOW idle_in_transaction_session_timeout")
        [after] = cursor.fetchone()
    assert (seen, after) == ([limit], "0")


@pytest.mark.parametrize("how", ["lease", "grace"])
def test_what_cannot_be_read_takes_no_others_place_among_those_that_are_due(
    database: DjangoSagaStorage, saga: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt, *others = [create(database, saga, pending=True) for _ in range(4)]
    rows = SagaExecution.objects.using(database.alias).filter(pk=spoilt.id)
    rows.update(plan={"no": "plan"})
    for claim, seconds in zip([spoilt, *others], [40.0, 30.0, 20.0, 10.0], strict=True):
        make_older(database, claim.id, seconds)
    assert ids(database.due(2, saga=saga, **{how: 60.0})) == ids(others)[:2]
    assert f"{spoilt.id} cannot be read: " in caplog.text
    rows.delete()


def test_a_statement_that_failed_leaves_no_open_cursor_to_the_garbage_collector() -> None:
    """Whose thread may hold the lock that another waits for, with the connection in its hands."""
    connection = connections["sqlite"]
    gc.disable()
    try:
        with pytest.raises(IntegrityError):
            reading.rows(connection, f"INSERT INTO {EXECUTIONS} DEFAULT VALUES RETURNING *", ())
        cursors = [one for one in gc.get_objects() if isinstance(one, sqlite3.Cursor)]
        assert cursors
        for cursor in cursors:
            with pytest.raises(sqlite3.ProgrammingError, match="closed cursor"):
                cursor.fetchone()
    finally:
        gc.enable()


@pytest.mark.parametrize("column", ["created_at", "updated_at"])
def test_a_row_of_sqlite_without_a_time_is_not_due(saga: str, column: str) -> None:
    """SQLite keeps what is no time; Django reads it as None."""
    storage = DjangoSagaStorage("sqlite")
    spoilt = create(storage, saga, pending=True)
    with connections["sqlite"].cursor() as cursor:
        update = f"UPDATE {EXECUTIONS} SET {column} = '' WHERE saga = %s"
        assert cursor.execute(update, [saga]).rowcount == 1
    for how in ({}, {"grace": 60.0}, {"lease": 60.0}):
        assert storage.due(100, saga=saga, **how) == []
    SagaExecution.objects.using("sqlite").filter(pk=spoilt.id).delete()


def test_times_keep_what_the_database_can(database: DjangoSagaStorage) -> None:
    """Microseconds; milliseconds on SQLite, whose clock has no more."""
    claim = create(database, lease=123.456789, wake=0.000001, grace=0.25)
    stored = row(database, claim.id)
    finest = 0.001 if connections[database.alias].vendor == "sqlite" else 0
    for moment, seconds in (
        (stored.lease_until, 123.456789),
        (stored.wake_at, 0.000001),
        (stored.grace_until, 0.25),
    ):
        assert moment is not None
        exact = timedelta(seconds=seconds)
        assert abs(moment - stored.created_at - exact) <= timedelta(seconds=finest)


def test_a_lease_that_is_released_while_it_is_asked_for_is_acquired(
    database: DjangoSagaStorage,
) -> None:
    claim = leased(database)
    held = [claim]

    def release_first(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("SELECT") and held:  # which follows an UPDATE that found it leased
            database.release(held.pop().id, claim.token)
        return execute(sql, params, many, context)

    with connections[database.alias].execute_wrapper(release_first):
        assert database.acquire(claim.id, driver="second", lease=60.0).token == 2


@pytest.mark.parametrize("alias", SERVERS)
def test_what_another_transaction_holds_is_seen_and_not_claimed(alias: str, saga: str) -> None:
    storage = DjangoSagaStorage(alias)
    created = create(storage, saga, pending=True)
    with ThreadPoolExecutor(1) as pool, transaction.atomic(using=alias):
        SagaExecution.objects.using(alias).select_for_update().get(pk=created.id)
        assert ids(pool.submit(storage.due, 100, saga=saga).result()) == [created.id]
        for how in ("lease", "grace"):
            claimed = pool.submit(storage.due, 100, saga=saga, **{how: 60.0}).result()
            assert claimed == []
        pool.submit(connections.close_all).result()


def test_an_execution_is_written_where_it_is_told_and_nowhere_else(
    database: DjangoSagaStorage,
) -> None:
    claim = leased(database)
    advance(database, claim)
    for alias in ALIASES:
        there = SagaExecution.objects.using(alias).filter(pk=claim.id).exists()
        assert there is (alias == database.alias)
        assert bool(DjangoSagaStorage(alias).history(claim.id)) is there
    seen = database.execution(claim, claim.state, claim.at, leased=True)
    assert seen._state.db == database.alias
    seen.refresh_from_db()


class WritesTo:
    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        return "sqlite" if model is SagaExecution else None

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "default"  # a replica, behind


def test_the_router_says_where_and_no_replica_is_read(settings: Any) -> None:
    settings.DATABASE_ROUTERS = [WritesTo()]
    storage = DjangoSagaStorage()
    assert storage.alias == "sqlite"
    claim = leased(storage)
    advance(storage, claim)
    assert len(storage.history(claim.id)) == 1
    assert storage.acquire(claim.id, driver="x", lease=60.0, token=1).token == 2


# A database that is away, or has no tables


VERBS: dict[str, Callable[[DjangoSagaStorage, Claim], object]] = {
    "create": lambda storage, claim: create(storage, pending=True),
    "acquire": lambda storage, claim: storage.acquire(claim.id, driver="x", lease=9.0, token=1),
    "checkpoint": lambda storage, claim: storage.checkpoint(
        checkpoint(claim, settled(claim.state))
    ),
    "checkpoint without record": lambda storage, claim: storage.checkpoint(
        checkpoint(claim, machine.begin(claim.state))
    ),
    "renew": lambda storage, claim: storage.renew([(claim.id, claim.token)], lease=60.0),
    "release": lambda storage, claim: storage.release(claim.id, claim.token),
    "due": lambda storage, claim: storage.due(1),
    "due with lease": lambda storage, claim: storage.due(1, lease=60.0, saga="none"),
    "due with grace": lambda storage, claim: storage.due(1, grace=60.0, saga="none"),
    "history": lambda storage, claim: storage.history(claim.id),
    "atomic": atomic_step,
}


def end_session(alias: str) -> None:
    """Have the server end this thread's session, as when it restarts."""
    own, end = {
        "postgresql": ("SELECT pg_backend_pid()", "SELECT pg_terminate_backend(%s, 10000)"),
        "mysql": ("SELECT CONNECTION_ID()", "KILL CONNECTION %s"),
    }[connections[alias].vendor]
    with connections[alias].cursor() as cursor:
        cursor.execute(own)
        [session] = cursor.fetchone()

    def work(number: int) -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute(end, [session])

    assert in_threads(work, 1) == [None]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("alias", SERVERS)
def test_a_lost_session_is_told_apart_and_the_next_call_has_a_new_one(
    alias: str, verb: str
) -> None:
    storage = DjangoSagaStorage(alias)
    claim = leased(storage)
    end_session(alias)
    with pytest.raises(StorageUnavailable, match=f"'{alias}'"):
        VERBS[verb](storage, claim)
    VERBS[verb](storage, claim)
    assert connections[alias].is_usable()


@pytest.mark.parametrize("alias", SERVERS)
def test_a_session_lost_within_an_atomic_step_rolls_its_writes_back(alias: str, saga: str) -> None:
    storage = DjangoSagaStorage(alias)
    claim = leased(storage)
    with pytest.raises(StorageUnavailable):
        atomic_step(storage, claim, saga, lambda: end_session(alias))
    assert not wrote(storage, saga)
    assert storage.history(claim.id) == []
    atomic_step(storage, claim, saga)
    assert wrote(storage, saga)


def test_a_locked_sqlite_is_told_apart_and_serves_again_once_it_is_free() -> None:
    storage = DjangoSagaStorage("sqlite")
    claim = leased(storage)
    other = sqlite3.connect(connections["sqlite"].settings_dict["NAME"], isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        with connections["sqlite"].cursor() as cursor:
            cursor.execute("PRAGMA busy_timeout = 1")
        with pytest.raises(StorageUnavailable, match="locked"):
            advance(storage, claim)
    finally:
        other.rollback()
        other.close()
    advance(storage, claim)
    assert len(storage.history(claim.id)) == 1


@contextmanager
def without_tables(alias: str) -> Iterator[None]:
    def rename(ending: str, to: str) -> None:
        with connections[alias].cursor() as cursor:
            for table in (EXECUTIONS, RECORDS):
                cursor.execute(f"ALTER TABLE {table}{ending} RENAME TO {table}{to}")

    rename("", "_away")
    try:
        yield
    finally:
        rename("_away", "")


@pytest.mark.parametrize("verb", VERBS)
def test_a_database_that_is_not_migrated_is_told_with_the_command(
    database: DjangoSagaStorage, verb: str
) -> None:
    claim = leased(database)
    expected = rf"'{database.alias}' has no tables.*migrate django_saga --database {database.alias}"
    with without_tables(database.alias), pytest.raises(SagaError, match=expected) as error:
        VERBS[verb](database, claim)
    assert not isinstance(error.value, StorageUnavailable), "waiting would not help"
    VERBS[verb](database, claim)


@contextmanager
def without_column(alias: str, table: str, column: str) -> Iterator[None]:
    def rename(old: str, new: str) -> None:
        with connections[alias].cursor() as cursor:
            cursor.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")

    rename(column, f"{column}_later")
    try:
        yield
    finally:
        rename(f"{column}_later", column)


@pytest.mark.parametrize(
    ("verb", "table", "column"),
    [
        ("create", EXECUTIONS, "wake_at"),
        ("acquire", EXECUTIONS, "driver"),
        ("checkpoint", EXECUTIONS, "wake_at"),
        ("checkpoint", RECORDS, "duration"),
        ("due", EXECUTIONS, "wake_at"),
        ("history", RECORDS, "duration"),
    ],
)
def test_a_database_with_older_tables_is_told_with_the_command(
    database: DjangoSagaStorage, verb: str, table: str, column: str
) -> None:
    claim = leased(database)
    older = without_column(database.alias, table, column)
    with older, pytest.raises(SagaError, match=r"older ones; run: manage\.py migrate") as error:
        VERBS[verb](database, claim)
    assert column in str(error.value)
    assert not isinstance(error.value, StorageUnavailable), "waiting would not help"
    VERBS[verb](database, claim)


def test_an_outage_without_a_word_is_one_too(database: DjangoSagaStorage) -> None:
    claim = leased(database)

    def away(*call: Any) -> Any:
        raise OperationalError

    with connections[database.alias].execute_wrapper(away), pytest.raises(StorageUnavailable):
        advance(database, claim)
    advance(database, claim)


def test_a_database_that_is_not_migrated_is_told_in_a_callers_transaction_too(
    database: DjangoSagaStorage,
) -> None:
    joined = transaction.atomic(using=database.alias)(lambda: create(database, pending=True))
    with without_tables(database.alias), pytest.raises(SagaError, match="migrate django_saga"):
        joined()


def test_a_fault_in_what_is_asked_is_not_called_an_outage(database: DjangoSagaStorage) -> None:
    """Nor are the tables called missing."""
    if connections[database.alias].vendor == "sqlite":
        return  # it stores a text of any length
    with pytest.raises(DatabaseError):
        create(database, "x" * 256, pending=True)
    leased(database)


# What a saga costs on PostgreSQL


def captured(run: Callable[[], object]) -> list[str]:
    with CaptureQueriesContext(connections["default"]) as queries:
        run()
    return [query["sql"] for query in queries.captured_queries]


def saga_of(count: int, *, failing: int | None = None, atomic: bool = False) -> Saga[Log]:
    calls = Calls()
    steps = [
        make_step(
            f"S{number}",
            calls,
            atomic=atomic,
            act=raises(RuntimeError("no")) if number == failing else None,
        )
        for number in range(1, count + 1)
    ]
    return Saga[Log](steps=steps, name="tests.contract", storage=DjangoSagaStorage("default"))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_saga_of_n_steps_costs_n_plus_one_statements_and_no_other(count: int) -> None:
    saga = saga_of(count)
    saga.run(Log())  # the connection is made
    statements = captured(lambda: saga.run(Log()))
    assert [statement.split()[0] for statement in statements] == ["INSERT", *["WITH"] * count]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_statement_is_its_own_commit(count: int) -> None:
    """Counted by the server: transactions of this session that changed something."""
    saga = saga_of(count)
    saga.run(Log())

    def commits() -> int:
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT pg_current_xact_id()::text::bigint")
            [number] = cursor.fetchone()
        return int(number)

    before = commits()
    saga.run(Log())
    assert commits() - before - 1 == count + 1


@pytest.mark.parametrize(("count", "failing"), [(1, 1), (3, 1), (3, 2), (3, 3), (5, 4)])
def test_a_failure_at_step_k_costs_k_plus_one_and_one_for_each_compensation(
    count: int, failing: int
) -> None:
    saga = saga_of(count, failing=failing)

    def run() -> None:
        with pytest.raises(SagaFailed):
            saga.run(Log())

    run()
    statements = captured(run)
    assert len(statements) == failing + 1 + (failing - 1)
    assert {statement.split()[0] for statement in statements[1:]} == {"WITH"}


def test_an_atomic_step_costs_a_transaction_around_its_checkpoint() -> None:
    """BEGIN, the limit on a transaction that idles, the checkpoint, COMMIT: two of them do work."""
    saga = saga_of(3, atomic=True)
    saga.run(Log())
    kinds = [statement.split()[0] for statement in captured(lambda: saga.run(Log()))]
    assert kinds == ["INSERT", *["BEGIN", "SELECT", "WITH", "COMMIT"] * 3]


@pytest.mark.parametrize("alias", ALIASES)
def test_only_postgresql_needs_one_statement_alone(alias: str) -> None:
    """The others wrap an UPDATE and an INSERT in a transaction."""
    storage = DjangoSagaStorage(alias)
    claim = leased(storage)
    with CaptureQueriesContext(connections[alias]) as queries:
        advance(storage, claim)
    kinds = [query["sql"].split()[0] for query in queries.captured_queries]
    several = {
        "postgresql": ["WITH"],
        "sqlite": ["BEGIN", "UPDATE", "INSERT", "COMMIT"],
        "mysql": ["BEGIN", "UPDATE", "SELECT", "INSERT", "COMMIT"],  # what operators asked for
    }
    assert kinds == several[connections[alias].vendor]


@pytest.mark.parametrize("alias", ALIASES)
def test_what_is_acquired_is_read_in_the_transaction_that_acquired_it(alias: str) -> None:
    storage = DjangoSagaStorage(alias)
    claim = create(storage, pending=True)
    with CaptureQueriesContext(connections[alias]) as queries:
        storage.acquire(claim.id, driver="second", lease=60.0)
    kinds = [query["sql"].split()[0] for query in queries.captured_queries]
    returns = connections[alias].vendor != "mysql"
    assert kinds == (["UPDATE"] if returns else ["BEGIN", "UPDATE", "SELECT", "COMMIT"])


@pytest.mark.parametrize("alias", ALIASES)
def test_many_leases_are_renewed_in_one_statement(alias: str) -> None:
    storage = DjangoSagaStorage(alias)
    claims = [leased(storage) for _ in range(20)]
    with CaptureQueriesContext(connections[alias]) as queries:
        storage.renew([(claim.id, claim.token) for claim in claims], lease=60.0)
    assert len(queries) == 1


def test_a_batch_is_claimed_in_one_statement_on_postgresql_after_one_that_asks(saga: str) -> None:
    storage = DjangoSagaStorage("default")
    for _ in range(20):
        create(storage, saga, pending=True)
    assert len(captured(lambda: storage.due(20, lease=60.0, saga=saga))) == 2


# The memory storage's own


def test_the_memory_storages_clock_can_be_given() -> None:
    now = [1_000_000.0]
    storage = MemorySagaStorage(clock=lambda: now[0])
    claim = create(storage, lease=60.0)
    assert claim.at == datetime.fromtimestamp(1_000_000, UTC)
    now[0] += 60.0
    assert storage.acquire(claim.id, driver="second", lease=60.0).token == 2


def test_a_record_of_an_attempt_is_plain_data() -> None:
    """So that any storage can keep it."""
    record = Record(step="A", action=Action.ACT, attempt=1, outcome=Outcome.DONE)
    assert (record.action.value, record.outcome.value) == ("act", "DONE")


def test_a_new_id_is_a_uuid_of_version_7_in_order_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for milliseconds in (1_764_160_000_000, 1_764_160_000_001, 2_000_000_000_000):
        monkeypatch.setattr("time.time_ns", lambda now=milliseconds: now * 1_000_000 + 999_999)
        ids += [new_id(), new_id()]
        assert all(id.int >> 80 == milliseconds for id in ids[-2:])
    assert len({*ids}) == 6
    assert {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}


# write_together


def next_checkpoint(claim: Claim) -> Checkpoint:
    return checkpoint(claim, settled(claim.state, Outcome.DONE))


def creation(**more: Any) -> Creation:
    state = machine.start(PLAN, '{"a":1}')
    fields: dict[str, Any] = {"id": uuid.uuid4(), "saga": "tests.contract", "state": state}
    return Creation(**{**fields, "driver": "first", "lease": 60.0, **more})


def test_what_is_written_together_comes_to_what_each_alone_would(storage: SagaStorage) -> None:
    one, other, lost = leased(storage), leased(storage), leased(storage)
    storage.acquire(lost.id, driver="second", lease=60.0, token=lost.token)
    before = columns(storage, lost.id)
    new, taken = creation(), creation(id=one.id)
    saved, created, missing, none, last = storage.write_together(
        [next_checkpoint(one), new, next_checkpoint(lost), taken, next_checkpoint(other)]
    )
    for came, claim in ((saved, one), (last, other)):
        assert isinstance(came, Saved)
        stored = row(storage, claim.id)
        assert (stored.step, stored.updated_at) == ("P", came.at)
        [record] = storage.history(claim.id)
        assert record.pk == came.record_id
    assert isinstance(created, Claim)
    assert (created.id, created.token) == (new.id, 1)
    assert row(storage, new.id).driver == "first"
    assert none is None
    assert isinstance(missing, LeaseLost)
    assert columns(storage, lost.id) == before


@pytest.mark.parametrize("step", ["\udc80", "x" * 101], ids=["no text", "too long"])
def test_what_cannot_be_written_is_not_in_the_way_of_what_is_written_with_it(
    database: DjangoSagaStorage, step: str
) -> None:
    one, other = leased(database), leased(database)
    bad = next_checkpoint(one)
    bad = replace(bad, after=replace(bad.after, step=step))
    saved, refused, created = database.write_together([next_checkpoint(other), bad, creation()])
    if database.alias == "sqlite" and len(step) > 100:  # it stores any length
        assert isinstance(refused, Saved)
    else:
        assert isinstance(refused, (DatabaseError, UnicodeEncodeError))
        assert row(database, one.id).step == "A"
    assert isinstance(saved, Saved)
    assert isinstance(created, Claim)
    assert row(database, other.id).step == "P"


def test_what_the_commit_refuses_is_not_in_the_way_of_what_is_written_with_it(
    database: DjangoSagaStorage,
) -> None:
    """A foreign key, say, which is looked at no sooner."""
    one, bad = leased(database), creation(retry_of=uuid.uuid4())
    refused, saved = database.write_together([bad, next_checkpoint(one)])
    if database.alias == "default":  # psycopg loses why a pipeline's end was refused
        assert isinstance(refused, StorageUnavailable)
        assert saved is refused, "each must look what became of it"
        saved = database.checkpoint(next_checkpoint(one))
    else:
        assert isinstance(refused, IntegrityError)
    assert isinstance(saved, Saved)
    assert row(database, one.id).step == "P"


def test_what_is_written_together_is_one_transaction(database: DjangoSagaStorage) -> None:
    claims = [leased(database) for _ in range(3)]
    connection = connections[database.alias]
    with CaptureQueriesContext(connection) as captured:
        database.write_together([next_checkpoint(claim) for claim in claims])
    said = [query["sql"] for query in captured]
    if database.alias == "default":
        assert [text.split()[0] for text in said] == ["WITH"] * 3
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT count(DISTINCT xmin::text) FROM {EXECUTIONS} WHERE id = ANY(%s)",
                [[claim.id for claim in claims]],
            )
            assert cursor.fetchone() == (1,)
    else:
        assert said.count("COMMIT") == 1
        assert "COMMIT" in said[-1]


def test_cursors_stay_with_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, connection = DjangoSagaStorage("default"), connections["default"]
    claims = [leased(storage) for _ in range(9)]
    connection.close()
    made, create = list[object](), type(connection).create_cursor

    def creating(self: Any, name: str | None = None) -> Any:
        made.append(self)
        return create(self, name)

    monkeypatch.setattr(type(connection), "create_cursor", creating)
    for number, of_these in ((1, claims[:1]), (1, claims[1:2]), (3, claims[2:5]), (4, claims[5:])):
        storage.write_together([next_checkpoint(claim) for claim in of_these])
        assert len(made) == number
    connection.close()
    storage.write(creation())
    assert len(made) == 5


@pytest.mark.parametrize("place", ["of the connection", "of its class", "within its class"])
def test_who_makes_cursors_in_another_way_is_not_passed_by(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a tool that notes statements, or a backend that goes to a tenant's schema there."""
    storage, connection = DjangoSagaStorage("default"), connections["default"]
    claims, made = [leased(storage) for _ in range(3)], list[object]()
    wrapper: Any = type(connection)
    if place == "of the connection":
        its = connection.cursor
        monkeypatch.setitem(vars(connection), "cursor", lambda: made.append(1) or its())
    else:
        name = "cursor" if place == "of its class" else "_cursor"
        its = getattr(wrapper, name)
        monkeypatch.setattr(wrapper, name, lambda self: made.append(1) or its(self))
    storage.checkpoint(next_checkpoint(claims[0]))
    assert len(made) == 1
    storage.write_together([next_checkpoint(claim) for claim in claims[1:]])
    assert len(made) == 3


def test_without_autocommit_nothing_is_begun(
    database: DjangoSagaStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on a connection that is still to be opened, either: it would never commit."""
    connection, one = connections[database.alias], creation()
    connection.close()
    monkeypatch.setitem(connection.settings_dict, "AUTOCOMMIT", False)
    for _ in range(2):
        with pytest.raises(InsideTransaction):
            database.write(one)
        [refused, _] = database.write_together([one, creation()])
        assert isinstance(refused, InsideTransaction)
        connection.ensure_connection()
    connection.close()


def test_a_lost_connection_loses_its_cursors() -> None:
    storage, connection = DjangoSagaStorage("default"), connections["default"]
    claim = leased(storage)
    connection.close()
    storage.checkpoint(next_checkpoint(claim))
    assert row(storage, claim.id).step == "P"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_strikes_in_a_pipeline_leaves_no_transaction_that_nobody_ends(
    error: type[BaseException],
) -> None:
    """Whatever is written next, and said to be, is there for others as well."""
    storage = DjangoSagaStorage("default")
    claims: list[Claim] = []

    def steps_of_them(_: int) -> list[str]:
        return [row(storage, claim.id).step for claim in claims]

    for at in count(1):
        claims[:] = one, other, next_one = [leased(storage) for _ in range(3)]
        came: list[Any] = []
        with striking(at, error) as strike, suppress(error):
            strike.home = f"{psycopg.__path__[0]}{os.sep}_pipeline"
            came = storage.write_together([next_checkpoint(one), next_checkpoint(other)])
        assert isinstance(storage.checkpoint(next_checkpoint(next_one)), Saved), strike.fired
        [steps] = in_threads(steps_of_them, 1)
        assert steps in (["A", "A", "P"], ["P", "P", "P"]), strike.fired
        if not strike.fired:
            break
        if error is KeyboardInterrupt:
            assert not came, f"nobody hears of it at {strike.fired}"
        assert all(isinstance(outcome, StorageUnavailable) for outcome in came), strike.fired
    assert at > 50


def test_what_is_taken_back_is_taken_back_whatever_lies_on_the_way_to_a_cursor() -> None:
    """As a budget of statements does, that refuses all that come after."""
    storage, statements = DjangoSagaStorage("default"), count(1)
    claims = [leased(storage) for _ in range(3)]

    def budget(execute: Any, *about: Any) -> Any:
        if next(statements) in (3, 4):
            raise OperationalError("no more")
        return execute(*about)

    with connections["default"].execute_wrapper(budget):
        outcomes = storage.write_together([next_checkpoint(claim) for claim in claims])
    for claim, came in zip(claims, outcomes, strict=True):
        assert isinstance(came, Saved) == (row(storage, claim.id).step == "P")


def test_threads_that_share_a_connection_get_each_what_it_asked_for() -> None:
    storage, connection = DjangoSagaStorage("default"), connections["default"]
    mine, others = leased(storage), leased(storage)
    came: list[Any] = []

    def meanwhile(_: int) -> None:
        connections["default"] = connection
        came.append(storage.checkpoint(next_checkpoint(others)))
        del connections["default"]

    def between(execute: Any, *about: Any) -> Any:
        result = execute(*about)
        if threading.current_thread() is threading.main_thread():
            assert in_threads(meanwhile, 1) == [None]
        return result

    connection.inc_thread_sharing()
    try:
        with connection.execute_wrapper(between):
            came.append(storage.checkpoint(next_checkpoint(mine)))
    finally:
        connection.dec_thread_sharing()
    for claim, saved in zip((others, mine), came, strict=True):
        assert [record.pk for record in storage.history(claim.id)] == [saved.record_id]


def test_nothing_is_written_together_inside_a_callers_transaction(
    database: DjangoSagaStorage,
) -> None:
    claims = [leased(database) for _ in range(2)]
    with transaction.atomic(using=database.alias):
        came = database.write_together([next_checkpoint(claim) for claim in claims])
    assert all(isinstance(error, InsideTransaction) for error in came)
    assert [row(database, claim.id).step for claim in claims] == ["A", "A"]


def test_a_server_that_takes_no_writes_any_more_is_left_for_the_next() -> None:
    """As after a failover: the old one refuses, the new connection leads to its successor."""
    storage = DjangoSagaStorage("default")
    claim = leased(storage)
    with connections["default"].cursor() as cursor:
        cursor.execute("SET default_transaction_read_only = on")
    with pytest.raises(StorageUnavailable, match="read-only"):
        storage.checkpoint(next_checkpoint(claim))
    storage.checkpoint(next_checkpoint(claim))
    assert row(storage, claim.id).step == "P"
