"""Many sagas enqueued at once: what is stored, what is driven, and what an error leaves."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from django.db import transaction
from django.db.models import F
from pytest_django import Settings

from django_saga import InvalidContext, Saga, SagaError, current_step
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage, SagaStorage
from tests.recovery_sagas import KeepingBackend
from tests.steps import Calls, Log, make_step
from tests.tables import empty

pytestmark = pytest.mark.usefixtures("committing_databases")


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def saga(storage: SagaStorage, calls: Calls) -> Saga[Log]:
    """One of a name of its own, driven in this process."""
    return Saga(steps=[make_step("A", calls)], storage=storage, name=f"tests.{uuid.uuid4()}")


class Kept(Saga[Log]):
    """A saga whose backend notes what it is told."""

    name = "tests.bulk"
    steps = [make_step("A", Calls())]


@pytest.fixture
def told(settings: Settings) -> Iterator[list[UUID]]:
    """What a backend of queues was told, in order; all that is stored belongs to the test."""
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.KeepingBackend"}
    empty()
    yield KeptIds()
    KeepingBackend.told.clear()


class KeptIds(list[UUID]):
    def __eq__(self, other: object) -> bool:
        return [saga_id for _, _, saga_id, _ in KeepingBackend.told] == other


def numbered(count: int, start: int = 0) -> list[Log]:
    return [Log(number=number) for number in range(start, start + count)]


def stored(saga: Saga[Log], ids: list[UUID]) -> list[SagaExecution]:
    if isinstance(saga.storage, MemorySagaStorage):
        claims = [saga.storage.acquire(saga_id, driver="x", lease=60.0) for saga_id in ids]
        return [saga.storage.execution(c, c.state, c.at, leased=False) for c in claims]
    assert isinstance(saga.storage, DjangoSagaStorage)
    found = SagaExecution.objects.using(saga.storage.alias).in_bulk(ids)
    return [found[saga_id] for saga_id in ids]


def test_each_context_becomes_an_execution_that_is_driven_in_this_process(
    saga: Saga[Log], calls: Calls
) -> None:
    ids = saga.enqueue_many(numbered(3))
    executions = stored(saga, ids)
    assert [execution.status for execution in executions] == ["COMPLETED"] * 3
    assert [Kept.context_of(execution).number for execution in executions] == [0, 1, 2]
    assert calls == ["act A"] * 3


def test_one_that_cannot_be_driven_leaves_the_others_alone(calls: Calls) -> None:
    def lose_lease(context: Log) -> None:
        if context.number == 0:
            SagaExecution.objects.filter(pk=current_step().saga_id).update(token=F("token") + 1)

    saga = Saga(steps=[make_step("A", calls, act=lose_lease)], name=f"tests.{uuid.uuid4()}")
    executions = stored(saga, saga.enqueue_many(numbered(3)))
    assert [execution.status for execution in executions] == ["RUNNING", "COMPLETED", "COMPLETED"]


def test_ids_that_are_taken_are_skipped_so_a_repeated_import_is_harmless(
    saga: Saga[Log], calls: Calls
) -> None:
    ids = [uuid.uuid4() for _ in range(4)]
    assert saga.enqueue_many(numbered(2), saga_ids=ids[:2]) == ids[:2]
    assert saga.enqueue_many(numbered(4), saga_ids=map(str, ids)) == ids[2:]  # type: ignore[arg-type]
    assert saga.enqueue_many(numbered(4), saga_ids=ids) == []
    assert len(calls) == 4
    twice = uuid.uuid4()
    assert saga.enqueue_many(numbered(2), saga_ids=[twice, twice]) == [twice]
    (execution,) = stored(saga, [twice])
    assert Kept.context_of(execution).number == 0, "the first one has it"


def test_nothing_is_nothing(saga: Saga[Log]) -> None:
    assert saga.enqueue_many([]) == saga.enqueue_many([], saga_ids=[]) == []


def test_contexts_are_read_no_further_than_what_is_stored(told: list[UUID]) -> None:
    stored_when_read: list[int] = []

    def contexts() -> Iterator[Log]:
        for context in numbered(2001):
            if context.number % 1000 == 0:
                stored_when_read.append(SagaExecution.objects.count())
            yield context

    ids = Kept().enqueue_many(contexts())
    assert stored_when_read == [0, 1000, 2000]
    assert told == ids
    numbers = [Kept.context_of(execution).number for execution in stored(Kept(), ids)]
    assert numbers == list(range(2001))


def test_large_contexts_are_stored_in_smaller_portions(told: list[UUID]) -> None:
    stored_when_read: list[int] = []

    def contexts() -> Iterator[Log]:
        for _ in range(5):
            stored_when_read.append(SagaExecution.objects.count())
            yield Log(done=["x" * 900_000])

    Kept().enqueue_many(contexts())
    assert stored_when_read == [0, 0, 0, 3, 3]


def test_an_invalid_context_is_named_and_nothing_of_its_thousand_stored(told: list[UUID]) -> None:
    ids = [uuid.uuid4() for _ in range(2500)]
    contexts: list[Any] = numbered(2500)
    contexts[1700] = Log(number="many")  # type: ignore[arg-type]
    why = r"^contexts\[1700\]: .*'number'.* Those before contexts\[1000\] are stored\.$"
    with pytest.raises(InvalidContext, match=why):
        Kept().enqueue_many(contexts, saga_ids=ids)
    assert set(SagaExecution.objects.values_list("pk", flat=True)) == set(ids[:1000])
    assert told == ids[:1000]
    contexts[1700] = Log(number=1700)
    assert Kept().enqueue_many(contexts, saga_ids=ids) == ids[1000:]
    assert told == ids
    why = r"^contexts\[1\]: Expected a Log, got NoneType\. Nothing is stored\.$"
    with pytest.raises(InvalidContext, match=why):
        Kept().enqueue_many([Log(), None])  # type: ignore[list-item]


def test_contexts_that_cannot_be_read_on_leave_a_note_of_what_is_stored(told: list[UUID]) -> None:
    def contexts() -> Iterator[Log]:
        yield from numbered(1500)
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here") as raised:
        Kept().enqueue_many(contexts())
    (note,) = raised.value.__notes__
    assert f"1000 executions of saga {Kept.name} were stored" in note
    assert SagaExecution.objects.count() == 1000


def test_inside_a_transaction_all_or_none_are_stored_and_they_start_on_commit(
    told: list[UUID],
) -> None:
    broken: list[Any] = [*numbered(1500), None]
    with pytest.raises(InvalidContext, match=r"contexts\[1500\]"), transaction.atomic():
        Kept().enqueue_many(broken)
    assert (SagaExecution.objects.count(), told) == (0, [])
    with transaction.atomic():
        ids = Kept().enqueue_many(numbered(1500))
        assert told == []
    assert told == ids
    assert SagaExecution.objects.count() == 1500


def test_they_wait_for_the_backend_as_long_as_one_that_is_enqueued_alone(
    told: list[UUID],
) -> None:
    (saga_id,) = Kept().enqueue_many([Log()])
    alone = Kept().enqueue(Log())
    assert alone.grace_until is None  # not read again
    many, alone = SagaExecution.objects.get(pk=saga_id), SagaExecution.objects.get(pk=alone.pk)
    assert many.grace_until is not None
    assert alone.grace_until is not None
    assert many.grace_until - many.created_at == alone.grace_until - alone.created_at


def test_a_backend_that_is_away_is_logged_and_recovery_finds_them(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "tests.recovery_sagas.DeadBackend"}
    ids = Kept().enqueue_many(numbered(3))
    assert {execution.status for execution in stored(Kept(), ids)} == {"PENDING"}
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "3 executions could not be handed over" in record.getMessage()


@pytest.mark.parametrize(("count", "which"), [(1, "fewer"), (3, "more")])
def test_as_many_ids_as_contexts_must_be_given(
    saga: Saga[Log], calls: Calls, count: int, which: str
) -> None:
    ids = [uuid.uuid4() for _ in range(count)]
    with pytest.raises(SagaError, match=f"There are {which} saga_ids than contexts"):
        saga.enqueue_many(numbered(2), saga_ids=ids)
    with pytest.raises(SagaError, match="A saga_id is a UUID, not 'x'"):
        saga.enqueue_many(numbered(1), saga_ids=["x"])  # type: ignore[list-item]
    assert calls == []


def test_a_saga_that_no_worker_finds_is_refused(told: list[UUID], saga: Saga[Log]) -> None:
    with pytest.raises(SagaError, match="No saga named"):
        saga.enqueue_many(numbered(1))


def test_async_code_awaits_it(saga: Saga[Log], calls: Calls) -> None:
    async def main() -> list[UUID]:
        with pytest.raises(SagaError, match=r"await aenqueue_many\(\)"):
            saga.enqueue_many(numbered(1))
        return await saga.aenqueue_many(numbered(2), saga_ids=iter([uuid.uuid4(), uuid.uuid4()]))

    assert len(asyncio.run(main())) == 2
    assert calls == ["act A"] * 2
