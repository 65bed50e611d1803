"""What operators can have done: retry and recover, on every database."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.exceptions import PermissionDenied
from django.db import connections, transaction

from django_saga import (
    InvalidContext,
    SagaAlreadyRunning,
    SagaError,
    SagaNotFound,
    UnknownSaga,
)
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.operations import recover, retry
from django_saga.recovery import sweep
from django_saga.signals import saga_failed
from django_saga.storage import DjangoSagaStorage
from tests.operated import (
    WORLD,
    changed,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    lost_trip,
    pending_trip,
    stuck_trip,
)

ALIASES = list(settings.DATABASES)


@pytest.fixture(autouse=True)
def _world(committing_databases: None) -> Iterator[None]:
    WORLD.reset()
    yield
    WORLD.reset()
    User.objects.all().delete()


@pytest.fixture(params=ALIASES)
def alias(request: pytest.FixtureRequest, _world: None) -> str:
    SagaStepRecord.objects.using(request.param).all().delete()
    SagaExecution.objects.using(request.param).all().delete()
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def storage(alias: str) -> DjangoSagaStorage:
    return DjangoSagaStorage(alias)


def rows(alias: str) -> Any:
    return SagaExecution.objects.using(alias)


def test_a_failed_one_starts_anew_linked_with_its_original_context(
    alias: str, storage: DjangoSagaStorage
) -> None:
    failed = failed_trip(alias=alias, traveller="Grace")
    new = retry(failed.pk, storage=storage)
    assert (new.status, new.retry_of_id) == ("COMPLETED", failed.pk)
    assert '"Grace"' in new.initial_context
    assert new.initial_context == failed.initial_context != failed.context
    assert WORLD.calls == ["act Pack", "act Pay", "act Leave"]
    assert rows(alias).get(pk=failed.pk).status == "FAILED"


@pytest.mark.parametrize("delay", [-1, float("nan"), 10**400, "soon", None])
def test_a_delay_that_is_none_is_refused_and_nothing_is_changed(
    alias: str, storage: DjangoSagaStorage, delay: Any
) -> None:
    for trip in (failed_trip(alias=alias), stuck_trip(alias=alias)):
        with pytest.raises(SagaError, match=r"retry\(\) takes a delay between 0 seconds"):
            retry(trip.pk, delay=delay, storage=storage)
        assert rows(alias).get(pk=trip.pk).status == trip.status
    assert rows(alias).count() == 2


def test_one_is_started_anew_once_and_its_failed_retry_can_be_retried(
    alias: str, storage: DjangoSagaStorage
) -> None:
    first = failed_trip(alias=alias)
    WORLD.trouble = {"act Pay": "still no money"}
    second = retry(first.pk, storage=storage)
    with pytest.raises(SagaError, match=rf"retried already.*{second.pk}.*FAILED.*Retry that one"):
        retry(first.pk, storage=storage)
    WORLD.reset()
    third = retry(second.pk, storage=storage)
    assert (third.status, third.retry_of_id) == ("COMPLETED", second.pk)
    assert rows(alias).count() == 3


def test_a_retry_that_user_code_linked_counts_too(alias: str, storage: DjangoSagaStorage) -> None:
    failed, other = failed_trip(alias=alias), completed_trip(alias=alias)
    changed(other, retry_of=failed)
    changed(failed, settled_at=other.created_at)
    with pytest.raises(SagaError, match=rf"retried already, as execution {other.pk}"):
        retry(failed.pk, storage=storage)


def at_once(alias: str, call: Callable[[], Any], times: int = 4) -> list[Any]:
    """Call it in several threads at the same instant; returns results and errors."""
    barrier = threading.Barrier(times)
    came: list[Any] = []

    def run() -> None:
        barrier.wait()
        try:
            came.append(call())
        except SagaError as error:
            came.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == times
    return came


def test_retried_twice_at_the_same_instant_one_is_started(
    alias: str, storage: DjangoSagaStorage
) -> None:
    failed = failed_trip(alias=alias)
    came = at_once(alias, lambda: retry(failed.pk, storage=storage))
    assert [type(result) for result in came].count(SagaExecution) == 1
    assert all("retried already" in str(r) for r in came if isinstance(r, SagaError))
    assert rows(alias).count() == 2
    assert WORLD.calls.count("act Pack") == 1


def test_a_stuck_one_undoes_what_is_not_undone_yet(alias: str, storage: DjangoSagaStorage) -> None:
    stuck = stuck_trip(alias=alias)
    assert stuck.status == "STUCK"
    result = retry(stuck.pk, storage=storage)
    assert (result.pk, result.status, result.stuck_reason) == (stuck.pk, "FAILED", "")
    assert WORLD.calls == ["compensate Pack"]
    assert result.token > stuck.token
    assert result.failed_step == "Leave"


def test_a_stuck_one_that_fails_again_is_stuck_again(
    alias: str, storage: DjangoSagaStorage
) -> None:
    stuck = stuck_trip(alias=alias)
    WORLD.trouble = {"compensate Pack": "still lost"}
    result = retry(stuck.pk, storage=storage)
    assert result.status == "STUCK"
    assert "Pack" in result.stuck_reason
    assert result.finished_at > stuck.finished_at
    records = SagaStepRecord.objects.using(alias).filter(execution=stuck, action="compensate")
    said = list(records.filter(step="Pack").values_list("error_message", flat=True))
    assert said == ["bag lost", "still lost"]


def test_a_stuck_one_retried_twice_at_the_same_instant_is_compensated_once(
    alias: str, storage: DjangoSagaStorage
) -> None:
    stuck = stuck_trip(alias=alias)
    at_once(alias, lambda: retry(stuck.pk, status="STUCK", storage=storage))
    assert WORLD.calls == ["compensate Pack"]
    assert rows(alias).get().status == "FAILED"


def test_a_stuck_one_with_nothing_left_to_undo_ends_as_failed_and_tells(
    alias: str, storage: DjangoSagaStorage
) -> None:
    stuck = changed(stuck_trip(alias=alias), effects=[])
    told: list[SagaExecution] = []

    def hear(execution: SagaExecution, **_: Any) -> None:
        told.append(execution)

    saga_failed.connect(hear)
    try:
        result = retry(stuck.pk, storage=storage)
    finally:
        saga_failed.disconnect(hear)
    assert (result.status, WORLD.calls) == ("FAILED", [])
    assert [(e.pk, e.status) for e in told] == [(stuck.pk, "FAILED")]


def test_what_changed_since_it_was_looked_at_is_left_alone(
    alias: str, storage: DjangoSagaStorage
) -> None:
    stuck = stuck_trip(alias=alias)
    retry(stuck.pk, status="STUCK", storage=storage)
    with pytest.raises(SagaError, match="changed meanwhile and is FAILED now"):
        retry(stuck.pk, status="STUCK", storage=storage)
    assert rows(alias).count() == 1


@pytest.mark.parametrize(
    ("make", "why"),
    [(completed_trip, "completed"), (driven_trip, "not ended"), (pending_trip, "not ended")],
)
def test_what_cannot_be_retried_is_refused_with_the_reason(
    make: Callable[..., SagaExecution], why: str, alias: str, storage: DjangoSagaStorage
) -> None:
    execution = make(alias=alias)
    with pytest.raises(SagaError, match=rf"{execution.pk}.*{why}"):
        retry(execution.pk, storage=storage)
    assert rows(alias).values().get() == execution_values(execution)


def execution_values(execution: SagaExecution) -> dict[str, Any]:
    return {f.attname: getattr(execution, f.attname) for f in execution._meta.concrete_fields}


@pytest.mark.parametrize(("make", "left"), [(failed_trip, 1), (stuck_trip, 1)])
def test_a_retry_joins_the_transaction_that_is_open(
    make: Callable[..., SagaExecution], left: int, alias: str, storage: DjangoSagaStorage
) -> None:
    """Rolled back, nothing is stored and nothing driven; committed, it is driven then."""
    execution = make(alias=alias)
    with transaction.atomic(using=alias):
        retry(execution.pk, storage=storage)
        transaction.set_rollback(True, using=alias)
    assert (rows(alias).count(), WORLD.calls) == (left, [])
    assert rows(alias).get().status == execution.status
    with transaction.atomic(using=alias):
        result = retry(execution.pk, storage=storage)
        assert result.is_active
        assert WORLD.calls == []
    assert WORLD.calls
    assert rows(alias).get(pk=result.pk).is_final


@pytest.mark.parametrize("make", [failed_trip, stuck_trip])
def test_with_a_delay_it_is_left_to_recovery(
    make: Callable[..., SagaExecution], alias: str, storage: DjangoSagaStorage
) -> None:
    execution = make(alias=alias)
    result = retry(execution.pk, delay=3600, storage=storage)
    assert result.is_active
    assert result.wake_at > result.updated_at
    assert WORLD.calls == []
    changed(result, wake_at=None)
    assert [str(recovered.saga_id) for recovered in sweep(storage=storage)] == [str(result.pk)]
    assert rows(alias).get(pk=result.pk).is_final


@pytest.mark.parametrize("make", [lost_trip, due_trip])
def test_recover_drives_what_nobody_drives(
    make: Callable[..., SagaExecution], alias: str, storage: DjangoSagaStorage
) -> None:
    execution = make(alias=alias)
    result = recover(execution.pk, storage=storage)
    assert (result.pk, result.status) == (execution.pk, "COMPLETED")
    assert WORLD.calls == ["act Pack", "act Pay", "act Leave"]


def test_recover_leaves_alone_what_is_driven_and_says_by_whom(
    alias: str, storage: DjangoSagaStorage
) -> None:
    execution = driven_trip(alias=alias)
    with pytest.raises(SagaAlreadyRunning, match=r"driven by web-2:4711; its lease lasts until 20"):
        recover(execution.pk, storage=storage)
    assert rows(alias).values().get() == execution_values(execution)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (pending_trip, "waits until"),
        (completed_trip, "completed"),
        (failed_trip, "it is FAILED; retry it"),
        (stuck_trip, "it is STUCK; retry it"),
    ],
)
def test_what_cannot_be_recovered_is_refused_with_the_reason(
    make: Callable[..., SagaExecution], why: str, alias: str, storage: DjangoSagaStorage
) -> None:
    execution = make(alias=alias)
    with pytest.raises(SagaError, match=why):
        recover(execution.pk, storage=storage)
    assert rows(alias).values().get() == execution_values(execution)


def test_recover_at_the_same_instant_drives_once(alias: str, storage: DjangoSagaStorage) -> None:
    execution = due_trip(alias=alias)
    at_once(alias, lambda: recover(execution.pk, storage=storage))
    assert WORLD.calls == ["act Pack", "act Pay", "act Leave"]


def test_recover_inside_a_transaction_is_refused(alias: str, storage: DjangoSagaStorage) -> None:
    execution = lost_trip(alias=alias)
    with transaction.atomic(using=alias), pytest.raises(SagaError, match="non_atomic_requests"):
        recover(execution.pk, storage=storage)
    assert WORLD.calls == []


@pytest.mark.parametrize("operation", [retry, recover])
def test_an_id_that_is_not_there_is_told(operation: Callable[..., Any]) -> None:
    with pytest.raises(SagaNotFound):
        operation(uuid.uuid4())
    with pytest.raises(SagaError, match="is a UUID"):
        operation("'; DROP TABLE")


def test_a_saga_that_the_code_no_longer_defines_is_told_and_nothing_stored(
    alias: str, storage: DjangoSagaStorage
) -> None:
    failed = changed(failed_trip(alias=alias), saga="gone.Saga")
    with pytest.raises(UnknownSaga, match=r"gone\.Saga"):
        retry(failed.pk, storage=storage)
    assert rows(alias).count() == 1
    stuck = changed(stuck_trip(alias=alias), saga="gone.Saga")
    result = retry(stuck.pk, storage=storage)
    assert result.status == "STUCK"
    assert "gone.Saga" in result.stuck_reason


def test_an_original_context_that_no_longer_fits_is_told_and_nothing_stored(
    alias: str, storage: DjangoSagaStorage
) -> None:
    failed = changed(failed_trip(alias=alias), initial_context='{"traveller": 7}')
    with pytest.raises(InvalidContext, match="traveller"):
        retry(failed.pk, storage=storage)
    assert rows(alias).count() == 1


@pytest.mark.parametrize(
    ("operation", "make", "permission", "other"),
    [
        (retry, failed_trip, "retry_sagaexecution", "recover_sagaexecution"),
        (retry, stuck_trip, "retry_sagaexecution", "recover_sagaexecution"),
        (recover, lost_trip, "recover_sagaexecution", "retry_sagaexecution"),
    ],
)
def test_a_user_needs_the_permission_of_the_verb(
    operation: Callable[..., Any], make: Callable[..., SagaExecution], permission: str, other: str
) -> None:
    execution = make()
    before = SagaExecution.objects.filter(pk=execution.pk).values()
    user = User.objects.create_user("op")
    user.user_permissions.add(Permission.objects.get(codename=other))
    for nobody in (user, AnonymousUser()):
        with pytest.raises(PermissionDenied, match=permission):
            operation(execution.pk, user=nobody)
    assert before.get() == execution_values(execution)
    user.user_permissions.add(Permission.objects.get(codename=permission))
    operation(execution.pk, user=User.objects.get(pk=user.pk))
    assert WORLD.calls
