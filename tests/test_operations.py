"""What operators can have done, on every database."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
from django.conf import settings
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.exceptions import PermissionDenied, ValidationError
from django.db import connections, transaction
from django.test import TestCase

from django_saga import (
    InvalidContext,
    LeaseLost,
    SagaAlreadyRunning,
    SagaError,
    SagaNotFound,
    UnknownSaga,
    interventions,
)
from django_saga.backends import Backend
from django_saga.changes import unmasked
from django_saga.masking import MASK, mask_json
from django_saga.models import SagaAuditEntry, SagaExecution, SagaFailureGroup, SagaStepRecord
from django_saga.operations import (
    VERBS,
    abandon,
    edit_context,
    mark_done,
    recover,
    release,
    resolve,
    resume_forward,
    retry,
    skip,
)
from django_saga.recovery import sweep
from django_saga.signals import saga_failed
from django_saga.storage import DjangoSagaStorage
from django_saga.verdicts import unsettled
from tests.operated import (
    EDITED,
    POSSIBLE,
    STATES,
    WORLD,
    Trip,
    TripSaga,
    arguments,
    changed,
    compensating_trip,
    completed_trip,
    driven_trip,
    due_trip,
    failed_trip,
    guarded_trip,
    halted_trip,
    lost_trip,
    pending_trip,
    resolved_trip,
    retried_trip,
    run_trip,
    stuck_trip,
)

ALIASES = list(settings.DATABASES)


@pytest.fixture(autouse=True)
def _editable(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TripSaga, "context_editable", True)


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
    return all_at_once([call] * times)


def all_at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Call each in a thread of its own, at the same instant."""
    barrier = threading.Barrier(len(calls))
    came: list[Any] = []

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            came.append(call())
        except SagaError as error:
            came.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == len(calls)
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
        (retried_trip, "it is FAILED, and was dealt with already"),
        (resolved_trip, "it is STUCK, and was dealt with already"),
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


# Every verb


def do(verb: str, execution: SagaExecution, **asked: Any) -> Any:
    """Do it with the right arguments, and a reason."""
    asked = {"reason": "as planned", **asked}
    return VERBS[verb].function(execution.pk, **arguments(verb, execution), **asked)


def entries(alias: str, result: str) -> list[SagaAuditEntry]:
    return list(SagaAuditEntry.objects.using(alias).filter(result=result).order_by("id"))


def reread(execution: SagaExecution) -> SagaExecution:
    return rows(str(execution._state.db)).get(pk=execution.pk)  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_done_where_it_can_be_and_refused_with_the_reason_elsewhere(
    verb: str, alias: str, storage: DjangoSagaStorage
) -> None:
    """Either is audited; what is refused is left as it was."""
    possible = set()
    for state, make in STATES.items():
        execution = make(alias=alias)
        SagaAuditEntry.objects.using(alias).all().delete()
        try:
            do(verb, execution, storage=storage)
        except SagaError:
            assert execution_values(reread(execution)) == execution_values(execution)
            (entry,) = entries(alias, "refused")
            assert str(execution.pk) in entry.detail
        else:
            possible.add(state)
            (entry,) = entries(alias, "done")
        assert SagaAuditEntry.objects.using(alias).count() == 1
        assert (entry.verb, entry.execution_id) == (verb, execution.pk)
        assert (entry.saga, entry.reason) == ("tests.TripSaga", "as planned")
        assert (entry.user_name, entry.source) == ("", "code")
    assert possible == POSSIBLE[verb]


def a_state(verb: str) -> Callable[..., SagaExecution]:
    """One in which the verb is possible."""
    return STATES[sorted(POSSIBLE[verb])[-1]]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_takes_its_own_permission_and_no_other_will_do(verb: str) -> None:
    execution = a_state(verb)()
    needed = VERBS[verb].permission.removeprefix("django_saga.")
    user = User.objects.create_user("op", is_staff=True)
    user.user_permissions.set(Permission.objects.exclude(codename=needed))
    SagaAuditEntry.objects.all().delete()
    for nobody in (user, AnonymousUser()):
        with pytest.raises(PermissionDenied, match=needed):
            do(verb, execution, user=nobody, source="admin")
    assert execution_values(reread(execution)) == execution_values(execution)
    assert [(e.verb, e.execution_id, e.user_name) for e in entries("default", "refused")] == [
        (verb, execution.pk, "op"),
        (verb, execution.pk, ""),
    ]
    user.user_permissions.set(Permission.objects.filter(codename=needed))
    do(verb, execution, user=User.objects.get(pk=user.pk), source="admin")
    (entry,) = entries("default", "done")
    assert (entry.user_id, entry.user_name, entry.source) == (str(user.pk), "op", "admin")


@pytest.mark.parametrize("verb", VERBS)
def test_the_projects_own_hook_may_refuse_one(verb: str, settings: Any) -> None:
    asked: list[tuple[Any, str, uuid.UUID]] = []

    def hook(user: Any, verb: str, execution: SagaExecution) -> bool:
        asked.append((user, verb, execution.pk))
        return False

    settings.DJANGO_SAGA = {"AUTHORIZE": hook}
    execution, user = a_state(verb)(), User.objects.create_superuser("root")
    with pytest.raises(PermissionDenied, match=f"may not {verb}"):
        do(verb, execution, user=user)
    assert asked == [(user, verb, execution.pk)]
    assert execution_values(reread(execution)) == execution_values(execution)
    assert [e.execution_id for e in entries("default", "refused")][-1] == execution.pk
    do(verb, execution)  # code is not asked


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.needs_reason])
@pytest.mark.parametrize("reason", ["", " \n"])
def test_what_takes_a_reason_is_refused_without(verb: str, reason: str) -> None:
    execution = a_state(verb)()
    with pytest.raises(SagaError, match="takes a reason"):
        do(verb, execution, reason=reason)
    assert execution_values(reread(execution)) == execution_values(execution)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_refused_for_what_changed_since_it_was_seen(verb: str) -> None:
    execution = a_state(verb)()
    for seen in ({"token": execution.token - 1}, {"status": "COMPLETED"}):
        with pytest.raises(SagaError, match=f"changed meanwhile and is {execution.status} now"):
            do(verb, execution, **seen)
    assert execution_values(reread(execution)) == execution_values(execution)
    do(verb, execution, token=execution.token, status=execution.status)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "recover"])
def test_deed_and_audit_are_rolled_back_with_the_callers_transaction(
    verb: str, alias: str, storage: DjangoSagaStorage
) -> None:
    execution = a_state(verb)(alias=alias)
    SagaAuditEntry.objects.using(alias).all().delete()
    with transaction.atomic(using=alias):
        do(verb, execution, storage=storage)
        assert len(entries(alias, "done")) == 1
        transaction.set_rollback(True, using=alias)
    assert execution_values(reread(execution)) == execution_values(execution)
    assert not SagaAuditEntry.objects.using(alias).exists()
    assert WORLD.calls == []
    with transaction.atomic(using=alias):
        do(verb, execution, storage=storage)
        assert WORLD.calls == []
    assert len(entries(alias, "done")) == 1


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "recover"])
def test_nothing_is_done_whose_audit_cannot_be_stored(
    verb: str, alias: str, storage: DjangoSagaStorage
) -> None:
    execution = a_state(verb)(alias=alias)
    with pytest.raises(ValidationError):
        do(verb, execution, storage=storage, batch_id="no id")
    assert execution_values(reread(execution)) == execution_values(execution)
    assert WORLD.calls == []


def test_a_refusal_leaves_the_callers_transaction_good(
    alias: str, storage: DjangoSagaStorage
) -> None:
    execution = completed_trip(alias=alias)
    with transaction.atomic(using=alias):
        for verb in VERBS:
            with pytest.raises(SagaError):
                do(verb, execution, storage=storage)
    assert len(entries(alias, "refused")) == len(VERBS)


def test_a_recovery_that_is_refused_at_the_last_is_audited_so() -> None:
    execution = lost_trip()
    with transaction.atomic(), pytest.raises(SagaError, match="open transaction"):
        recover(execution.pk)
    (refusal,) = entries("default", "refused")
    assert (refusal.verb, refusal.execution_id, refusal.step) == ("recover", execution.pk, "Pack")


def test_of_what_is_not_there_the_refusal_says_what_was_asked_for() -> None:
    asked = uuid.uuid4()
    with pytest.raises(SagaNotFound):
        retry(asked, reason="?")
    with pytest.raises(SagaError, match="is a UUID"):
        retry("no id")
    assert [entry.execution_id for entry in entries("default", "refused")] == [asked, None]


@pytest.mark.parametrize("alias", ALIASES, indirect=True)
def test_a_reason_of_any_text_is_kept_without_what_looks_like_a_secret(
    alias: str, storage: DjangoSagaStorage
) -> None:
    execution = driven_trip(alias=alias)
    do("cancel", execution, storage=storage, reason="\x00 \ud800 password=hunter22 ü")
    reason = entries(alias, "done")[-1].reason
    assert "\\x00 \\ud800 " in reason
    assert "ü" in reason
    for kept in (reason, reread(execution).cancel_reason):
        assert "hunter22" not in kept
        assert "\\ud800" in kept


# What each of them does


def test_what_was_skipped_is_neither_done_nor_undone(
    alias: str, storage: DjangoSagaStorage
) -> None:
    WORLD.trouble = {"act Leave": "fog"}
    result = skip(lost_trip(alias=alias).pk, reason="it was called off", storage=storage)
    assert (result.status, result.failed_step) == ("FAILED", "Leave")
    assert WORLD.calls == ["act Pay", "act Leave", "compensate Pay"]
    first = SagaStepRecord.objects.using(alias).filter(execution=result).first()
    assert first is not None
    assert (first.step, first.outcome, first.attempt) == ("Pack", "INTERRUPTED", 1)


def test_what_was_done_by_hand_is_not_done_again_but_undone(
    alias: str, storage: DjangoSagaStorage
) -> None:
    WORLD.trouble = {"act Leave": "fog"}
    result = mark_done(lost_trip(alias=alias).pk, "Pack", reason="I did", storage=storage)
    assert result.status == "FAILED"
    assert WORLD.calls == ["act Pay", "act Leave", "compensate Pay", "compensate Pack"]


@pytest.mark.parametrize("make", [stuck_trip, compensating_trip])
def test_what_was_undone_by_hand_is_not_undone_again(
    make: Callable[..., SagaExecution], alias: str, storage: DjangoSagaStorage
) -> None:
    result = mark_done(make(alias=alias).pk, "Pack", reason="I did", storage=storage)
    assert (result.status, result.stuck_reason, WORLD.calls) == ("FAILED", "", [])


def test_one_that_goes_forward_begins_its_step_again(
    alias: str, storage: DjangoSagaStorage
) -> None:
    halted = halted_trip(alias=alias)
    assert halted.failure_group
    result = resume_forward(halted.pk, reason="mended", storage=storage)
    assert (result.status, result.failure_group) == ("COMPLETED", "")
    assert WORLD.calls == ["act Pack", "act Pay", "act Leave"]


def test_one_that_turned_back_never_goes_forward(alias: str, storage: DjangoSagaStorage) -> None:
    for verb in (resume_forward, skip):
        with pytest.raises(SagaError, match="never goes forward again"):
            verb(stuck_trip(alias=alias).pk, reason="please", storage=storage)


def test_another_context_goes_on_in_the_place_of_the_stored_one(
    alias: str, storage: DjangoSagaStorage
) -> None:
    execution = lost_trip(alias=alias)
    result = edit_context(execution.pk, EDITED, reason="a typo", storage=storage)
    assert result.status == "COMPLETED"
    assert TripSaga.context_of(result) == Trip("Grace", ["Pack", "Pay", "Leave"])
    assert '"Ada"' in result.initial_context
    assert entries(alias, "done")[-1].detail == '{"traveller":"Grace"}'


@pytest.mark.parametrize("context", ["", "nonsense", "[]", '{"traveller": 7}', '{"travler": "X"}'])
def test_a_context_that_does_not_fit_is_refused(context: str) -> None:
    """Nor is a slip taken for what is not there: an unknown field would be dropped."""
    execution = lost_trip()
    with pytest.raises(SagaError):
        edit_context(execution.pk, context, reason="a typo")
    assert execution_values(reread(execution)) == execution_values(execution)


def test_a_mask_that_is_left_keeps_the_secret_that_it_stands_for() -> None:
    guarded = guarded_trip()
    shown = json.loads(mask_json(guarded.context, {"passport"}))
    assert shown["passport"] == MASK
    edit_context(guarded.pk, json.dumps(shown | {"traveller": "Grace"}), reason="a typo")
    stored = json.loads(reread(guarded).context)
    assert (stored["traveller"], stored["passport"]) == ("Grace", "P-4711-0815")
    with pytest.raises(InvalidContext, match="There is a mask where nothing was masked"):
        edit_context(guarded.pk, json.dumps(stored | {"traveller": MASK}), reason="a typo")


MASKED = [
    ('{"a": "%s", "b": 2}', '{"a": "s3cret", "b": 2}'),  # as it is shown
    ('{"a": "\\u002a%s", "b": 3}', '{"a": "s3cret", "b": 3}'),  # one star of it escaped
    ('{"a": "%s", "b": true}', '{"a": "s3cret", "b": true}'),  # which equals 1, and is not
    ('{"a": "%s", "c": "%s"}', None),  # nothing is masked there
    ('{"%s": 1}', None),
    ('{"a": ["%s"]}', None),
]


@pytest.mark.parametrize(("given", "whole"), MASKED)
def test_a_mask_stands_for_what_it_was_shown_for_and_for_nothing_else(
    given: str, whole: str | None
) -> None:
    stars = MASK[1:] if "u002a" in given else MASK
    text, stored = given.replace("%s", stars), '{"a": "s3cret", "b": 1}'
    if whole is None:
        with pytest.raises(InvalidContext, match="a mask where nothing was masked"):
            unmasked(text, stored, {"a"})
    else:
        assert json.loads(unmasked(text, stored, {"a"})) == json.loads(whole)


def test_an_item_of_a_list_keeps_its_secret_only_where_it_is_as_it_was() -> None:
    stored = json.dumps({"to": [{"who": "ann", "iban": "DE1"}, {"who": "bob", "iban": "DE2"}]})
    shown = json.loads(mask_json(stored))
    ann, bob = shown["to"]
    assert ann["iban"] == bob["iban"] == MASK
    new = {"who": "cy", "iban": "DE3"}
    kept = json.loads(unmasked(json.dumps({"to": [ann, new]}), stored))
    assert kept["to"] == [{"who": "ann", "iban": "DE1"}, new]
    for to in ([bob, ann], [ann], [ann, bob | {"who": "eve"}]):
        with pytest.raises(InvalidContext):
            unmasked(json.dumps({"to": to}), stored)


def test_what_is_refused_does_not_quote_the_secret_that_a_mask_stood_for() -> None:
    guarded = guarded_trip()
    text = json.dumps({"traveller": 7, "seen": [], "passport": MASK})
    with pytest.raises(InvalidContext) as refused:
        edit_context(guarded.pk, text, reason="a typo")
    assert "P-4711" not in str(refused.value)


def test_a_saga_says_whether_its_context_may_be_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TripSaga, "context_editable", False)
    with pytest.raises(SagaError, match="context_editable is False"):
        edit_context(lost_trip().pk, EDITED, reason="a typo")


@pytest.mark.parametrize("broken", ["no JSON", "[1]", '{"traveller": 7}'])
def test_a_context_that_cannot_be_read_can_be_put_right(broken: str) -> None:
    halted = changed(halted_trip(), context=broken)
    edit_context(halted.pk, EDITED, reason="it was broken")
    assert resume_forward(halted.pk, reason="mended").status == "COMPLETED"


def test_what_waits_goes_on_waiting_with_another_context(
    alias: str, storage: DjangoSagaStorage
) -> None:
    execution = pending_trip(alias=alias)
    result = edit_context(execution.pk, EDITED, reason="a typo", storage=storage)
    assert (result.status, result.context, WORLD.calls) == ("PENDING", EDITED, [])
    assert abs((result.wake_at - execution.wake_at).total_seconds()) < 60


def test_resolved_it_asks_for_nobodys_attention_any_more(
    alias: str, storage: DjangoSagaStorage
) -> None:
    stuck = stuck_trip(alias=alias)
    for standing in ([], ["Pay"], ["Pack", "Pay"]):
        with pytest.raises(SagaError, match="what stands is of Pack; acknowledge just that"):
            resolve(stuck.pk, standing, reason="written off", storage=storage)
    assert rows(alias).filter(unsettled()).exists()
    result = resolve(stuck.pk, ["Pack"], reason="written off", storage=storage)
    assert (result.status, WORLD.calls) == ("STUCK", [])
    assert result.settled_at is not None
    assert not rows(alias).filter(unsettled()).exists()
    assert entries(alias, "done")[-1].detail == "Standing: Pack."


def test_what_is_abandoned_stays_as_it_is_and_says_what_may_stand(
    alias: str, storage: DjangoSagaStorage
) -> None:
    """The act that was lost may stand; and no group of failures is made of it."""
    lost = lost_trip(alias=alias)
    for typed in ("", "yes", str(uuid.uuid4()), str(lost.pk)[:-1]):
        with pytest.raises(SagaError, match="Type the whole id"):
            abandon(lost.pk, typed, reason="hopeless", storage=storage)
    result = abandon(lost.pk, f" {str(lost.pk).upper()} ", reason="hopeless", storage=storage)
    assert (result.status, WORLD.calls) == ("STUCK", [])
    assert "hopeless" in result.stuck_reason
    assert result.settled_at is not None
    assert interventions.standing_steps(result.state) == ("Pack",)
    assert entries(alias, "done")[-1].detail == "Standing: Pack."
    assert not SagaFailureGroup.objects.using(alias).exists()


# Somebody else is at it


def test_what_two_operators_mark_at_once_is_both_kept(
    alias: str, storage: DjangoSagaStorage
) -> None:
    for _ in range(5):
        stuck = run_trip(
            alias=alias, act_Leave="fog", compensate_Pack="lost", compensate_Pay="spent"
        )
        mark = partial(mark_done, stuck.pk, reason="I did", storage=storage)
        came = all_at_once([partial(mark, "Pack"), partial(mark, "Pay")])
        assert not [error for error in came if isinstance(error, SagaError)]
        assert reread(stuck).status == "FAILED"


def test_what_is_changed_by_hand_is_seen_to_have_changed(
    alias: str, storage: DjangoSagaStorage
) -> None:
    stuck = run_trip(alias=alias, act_Leave="fog", compensate_Pack="lost", compensate_Pay="spent")
    asked: Any = {"token": stuck.token, "reason": "I did", "storage": storage}
    assert mark_done(stuck.pk, "Pay", **asked).status == "STUCK"
    for again in (
        lambda: mark_done(stuck.pk, "Pack", **asked),
        lambda: edit_context(stuck.pk, EDITED, **asked),
        lambda: resolve(stuck.pk, ["Pack", "Pay"], **asked),
    ):
        with pytest.raises(SagaError, match="changed meanwhile"):
            again()


def test_of_operators_who_retry_and_resolve_at_once_one_has_it(
    alias: str, storage: DjangoSagaStorage
) -> None:
    """What goes on is not settled: if it gets stuck again, somebody must be told."""
    for _ in range(5):
        stuck = stuck_trip(alias=alias)
        again = partial(retry, stuck.pk, delay=3600, storage=storage)
        close = partial(resolve, stuck.pk, ["Pack"], reason="written off", storage=storage)
        came = all_at_once([again, close])
        assert len([error for error in came if isinstance(error, SagaError)]) == 1
        row = reread(stuck)
        assert row.is_active is (row.settled_at is None)


def test_of_all_verbs_at_once_on_one_that_is_lost_the_outcome_is_sound(
    alias: str, storage: DjangoSagaStorage
) -> None:
    lost = lost_trip(alias=alias)
    verbs = ["cancel", "skip", "mark_done", "edit_context", "abandon", "recover"]
    all_at_once([partial(do, verb, lost, storage=storage) for verb in verbs])
    row = reread(lost)
    assert row.status in ("COMPLETED", "FAILED", "STUCK")
    records = SagaStepRecord.objects.using(alias).filter(execution=lost)
    assert records.filter(outcome="INTERRUPTED").count() <= 1
    undone = {call for call in WORLD.calls if call.startswith("compensate")}
    assert len(undone) == len([c for c in WORLD.calls if c.startswith("compensate")])


def test_a_released_driver_that_lives_writes_nothing_more(
    alias: str, storage: DjangoSagaStorage
) -> None:
    def meanwhile() -> None:
        WORLD.interlude = None
        release(saga_id, reason="it hangs", storage=storage)

    saga_id = uuid.uuid4()
    WORLD.interlude = meanwhile
    with pytest.raises(LeaseLost):
        TripSaga(storage=storage).run(Trip(), saga_id=saga_id)
    row = rows(alias).get(pk=saga_id)
    assert (row.status, row.step, row.lease_until, row.in_flight) == ("RUNNING", "Pack", None, True)
    assert not SagaStepRecord.objects.using(alias).filter(execution=row).exists()
    assert [r.status for r in sweep(storage=storage)] == ["COMPLETED"]
    first = SagaStepRecord.objects.using(alias).filter(execution=row).first()
    assert first is not None
    assert (first.step, first.outcome) == ("Pack", "INTERRUPTED")


@pytest.mark.parametrize("verb", ["edit_context", "cancel", "skip", "mark_done", "abandon"])
def test_a_zombie_does_not_undo_what_was_done_by_hand(
    verb: str, alias: str, storage: DjangoSagaStorage
) -> None:
    """Its lease ran out in its handler, an operator stepped in, and then it wakes up."""

    def meanwhile() -> None:
        WORLD.interlude = None
        past = rows(alias).get(pk=saga_id)
        changed(past, lease_until=past.created_at)
        do(verb, past, storage=storage)
        left.append(execution_values(rows(alias).get(pk=saga_id)))

    saga_id, left = uuid.uuid4(), []
    WORLD.interlude = meanwhile
    with pytest.raises(LeaseLost):
        TripSaga(storage=storage).run(Trip("Ada"), saga_id=saga_id)
    assert execution_values(rows(alias).get(pk=saga_id)) == left[0]
    assert ('"Grace"' in left[0]["context"]) is (verb == "edit_context")


class TestWithinATestCase(TestCase):
    """Whose transaction counts as none."""

    databases = frozenset(ALIASES)

    def test_every_verb_works(self) -> None:
        for verb in VERBS:
            execution = a_state(verb)()
            with self.captureOnCommitCallbacks(execute=True):
                do(verb, execution)
            entry = SagaAuditEntry.objects.filter(execution_id=execution.pk).first()
            assert entry is not None
            assert (entry.verb, entry.result) == (verb, "done")


class Deaf(Backend):
    """Is told of what goes on, and does nothing of it."""

    told: ClassVar[list[tuple[uuid.UUID, float]]] = []

    def send(self, saga: Any, saga_id: uuid.UUID, delay: float) -> None:
        self.told.append((saga_id, delay))


@pytest.mark.parametrize("verb", ["cancel", "skip", "mark_done", "edit_context"])
def test_what_waited_and_is_to_go_on_now_is_left_alone_no_longer_than_that(
    verb: str, settings: Any
) -> None:
    """Should the backend lose it, recovery comes a lease later, not when it would have waked."""
    settings.DJANGO_SAGA = {"BACKEND": "tests.test_operations.Deaf"}
    WORLD.trouble = {"act Pay": "no money"}
    execution = pending_trip()
    changed(execution, effects=[["Pack", "DONE"]], step="Pay", status="RUNNING")
    Deaf.told.clear()
    do(verb, reread(execution))
    row = reread(execution)
    waits = verb == "edit_context"
    assert [(id, delay > 60) for id, delay in Deaf.told] == [(execution.pk, waits)]
    assert ((row.grace_until - row.updated_at).total_seconds() > 61) is waits
