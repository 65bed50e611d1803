"""Battery 13: everything that can happen to executions, in any order, drawn by hypothesis.

Two workers drive executions step by step and are lost between any two of them, or in the middle of
one; jobs are doubled, dropped and late; leases run out under their drivers; the code is changed;
operators retry. Beside the real rows goes a twin of each execution, a small model that knows only
what was done to it: it says which call may come next, and how each execution must stand.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import UUID

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import Group
from django.db import OperationalError, connections
from django.db.backends.signals import connection_created
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from django_saga import (
    LeaseLost,
    Retry,
    RetryLater,
    Saga,
    SagaAlreadyRunning,
    SagaContext,
    SagaError,
    SagaFailed,
    SagaStepHandler,
    SagaStuck,
    UnknownSaga,
    current_step,
    machine,
    operations,
    recover_saga,
    registry,
    signals,
)
from django_saga.backends import Backend
from django_saga.models import SagaExecution
from django_saga.recovery import sweep
from django_saga.storage import DjangoSagaStorage
from tests.faults.options import Size

pytestmark = pytest.mark.usefixtures("committing_databases")

NAME = "stateful.Trip"
MAX_RECOVERIES = 2
OK, FAILS, TIMES_OUT, WAITS = "ok", "fails", "times out", "waits"
DIES_BEFORE, DIES_AFTER = "dies before its effect", "dies after its effect"
DEATHS = (DIES_BEFORE, DIES_AFTER)
FATES = (OK, OK, OK, FAILS, TIMES_OUT, WAITS, *DEATHS)
ATOMIC = {"Reserve"}  # steps whose effect is a row of the same database
ACTS = {"Charge": 2, "Bill": 2}  # attempts; others have one
COMPENSATIONS = 2
FINAL = {"COMPLETED", "FAILED"}
ACTIVE = {"PENDING", "RUNNING", "COMPENSATING"}


class Died(BaseException):
    """The process ends here, and says goodbye to nobody."""


# The code, in versions that are deployed one after the other


@dataclass
class Trip(SagaContext):
    number: int = 0


def build_step(name: str, *aliases: str, is_async: bool = False) -> type[SagaStepHandler[Trip]]:
    def call(self: Any, context: Trip) -> None:
        MACHINE[0].called(context)

    async def acall(self: Any, context: Trip) -> None:
        MACHINE[0].called(context)

    function = acall if is_async else call
    body = {
        "act": function,
        "compensate": function,
        "aliases": aliases,
        "atomic": name in ATOMIC,
        "retry": Retry(attempts=ACTS.get(name, 1), delay=0),
        "compensation_retry": Retry(attempts=COMPENSATIONS, delay=0),
    }
    return types.new_class(name, (SagaStepHandler[Trip],), {}, lambda ns: ns.update(body))


Steps = list[type[SagaStepHandler[Trip]]]


def versions() -> dict[str, tuple[Steps, Steps]]:
    """The steps and the retired steps of each."""
    reserve, charge, ship = (build_step(name) for name in ("Reserve", "Charge", "Ship"))
    insure = build_step("Insure")
    bill = build_step("Bill", "Charge", is_async=True)
    return {
        "first": ([reserve, charge, ship], []),
        "a step more": ([reserve, insure, charge, ship], []),
        "another order": ([ship, charge, reserve], [insure]),
        "a step renamed": ([reserve, bill, ship], [insure]),
        "a step lost": ([reserve, ship], [insure]),
        "a step retired": ([reserve, ship], [charge, insure]),
    }


@cache
def build(version: str) -> type[Saga[Trip]]:
    steps, retired = versions()[version]
    body = {"name": NAME, "steps": steps, "retired_steps": retired}
    return types.new_class("Trip", (Saga[Trip],), {}, lambda ns: ns.update(body))


def known_to(saga: type[Saga[Trip]] | None) -> set[str]:
    """The names by which plans may call the steps of this class; none of a saga that is gone."""
    if saga is None:
        return set()
    classes: list[Any] = [*saga.steps, *saga.retired_steps]
    return {name for step in classes for name in (step.name, *step.aliases)}


# What must be so


@dataclass
class Twin:
    """One execution, as it must stand after all that was done to it."""

    plan: list[str]
    status: str = "RUNNING"
    at: int = 0
    effects: list[str] = field(default_factory=list)  # of acts that had one, or may have
    broken: set[str] = field(default_factory=set)  # whose compensation failed
    failures: int = 0
    recoveries: int = 0
    owner: object = None  # who acquired it last; None: whoever did has let go
    leased: bool = False
    in_flight: bool = False
    waits: bool = False
    left_alone: bool = False  # by recovery, for a time of grace
    records: list[tuple[str, str, str]] = field(default_factory=list)
    late: set[str] = field(default_factory=set)  # steps that acted for a driver that had lost it
    ended: int = 0  # final transitions
    retried: bool = False

    @property
    def next(self) -> tuple[str, str]:
        if self.status in ("PENDING", "RUNNING"):
            return "act", self.plan[self.at]
        return "compensate", [step for step in self.effects if step not in self.broken][-1]

    @property
    def active(self) -> bool:
        return self.status in ACTIVE

    @property
    def due(self) -> bool:
        return self.active and not (self.leased or self.waits or self.left_alone)

    def needed(self) -> set[str]:
        ahead = self.plan[self.at :] if self.status in ("PENDING", "RUNNING") else []
        return {*self.effects, *ahead} - self.broken

    def acquire(self, owner: object, known: set[str]) -> None:
        """A driver takes it; what was in flight is lost, what is unknown ends it as STUCK."""
        assert not self.leased, "two drivers at once"
        assert self.active
        self.owner, self.leased, self.left_alone = owner, True, False
        lost = self.in_flight
        if lost:
            action, step = self.next
            self.records.append((action, step, "INTERRUPTED"))
            if action == "act" and step not in (*ATOMIC, *self.effects):
                self.effects.append(step)
        if not self.needed() <= known:
            return self.end("STUCK")
        self.recoveries += lost
        if self.recoveries > MAX_RECOVERIES:
            return self.end("STUCK")
        if self.waits:
            return self.rest()
        self.status = "RUNNING" if self.status == "PENDING" else self.status
        self.in_flight = True
        return None

    def rest(self) -> None:
        """It is handed over until its next attempt may begin."""
        self.waits, self.left_alone, self.leased, self.in_flight = True, True, False, False
        self.owner = None

    def settle(self, fate: str) -> None:
        """What its owner's call came to."""
        if fate in DEATHS:
            return
        action, step = self.next
        self.recoveries, self.leased = 0, True  # a checkpoint renews a lease that ran out
        outcome = {OK: "DONE", TIMES_OUT: "UNKNOWN"}.get(fate, "FAILED")
        if fate == TIMES_OUT and step in ATOMIC:
            outcome = "FAILED"
        self.records.append((action, step, outcome))
        if fate == WAITS:
            return self.rest()
        self.failures = 0 if fate == OK else self.failures + 1
        if action == "act":
            return self.settle_act(step, outcome)
        return self.settle_compensation(step, outcome)

    def settle_act(self, step: str, outcome: str) -> None:
        if outcome != "FAILED" and step not in self.effects:
            self.effects.append(step)
        if outcome == "DONE":
            self.at += 1
            if self.at == len(self.plan):
                self.end("COMPLETED")
        elif self.failures >= ACTS.get(step, 1):
            self.turn_back()

    def settle_compensation(self, step: str, outcome: str) -> None:
        if outcome == "DONE":
            self.effects.remove(step)
        elif self.failures < COMPENSATIONS:
            return
        else:
            self.broken.add(step)
        self.turn_back()

    def turn_back(self) -> None:
        self.failures = 0
        if {*self.effects} - self.broken:
            self.status, self.in_flight = "COMPENSATING", True
        else:
            self.end("STUCK" if self.broken else "FAILED")

    def end(self, status: str) -> None:
        self.status, self.leased, self.owner = status, False, None
        self.in_flight = self.waits = self.left_alone = False
        self.ended += status in FINAL

    def retry(self) -> None:
        """An operator has it undo what stands."""
        assert self.status == "STUCK"
        self.broken, self.recoveries = set(), 0
        self.turn_back()
        if self.active:
            self.in_flight, self.left_alone = False, True


@dataclass(eq=False)
class Driver:
    """A worker, or a call that drives."""

    saga: type[Saga[Trip]] | None  # the code that it runs
    transaction: Any = None
    iterator: Iterator[Any] | None = None
    saga_id: UUID | None = None
    zombie_calls: int = 0


class Deliveries(Backend):
    """Jobs on their way to a worker."""

    jobs: list[UUID] = []

    def send(self, saga: Saga[Any], saga_id: UUID, delay: float) -> None:
        self.jobs.append(saga_id)


MACHINE: list[Machine] = []  # the one that runs
SETTINGS = {
    "LEASE": 80_000,
    "INLINE_WAIT": 0,
    "MAX_RECOVERIES": MAX_RECOVERIES,
    "BACKEND": f"{__name__}.Deliveries",
}
PAST = datetime(2020, 1, 1, tzinfo=UTC)
fates = st.lists(st.sampled_from(FATES), max_size=3)
chosen = st.integers(0, 5)
workers = st.integers(0, 1)


class Machine(RuleBasedStateMachine):
    """The rules are what can happen; the invariants are judged after each."""

    count: Counter[str] = Counter()

    def __init__(self) -> None:
        super().__init__()
        MACHINE[:] = [self]
        self.storage = DjangoSagaStorage()
        self.twins: dict[UUID, Twin] = {}
        self.workers: list[Driver | None] = [None, None]
        self.saga: type[Saga[Trip]] | None = None
        self.saga_built = build("first")
        self.remote: set[tuple[UUID, str]] = set()
        self.keys: dict[tuple[UUID, str, str], str] = {}
        self.tokens: dict[UUID, int] = {}
        self.finals: Counter[UUID] = Counter()
        self.driver = Driver(None)  # that makes the calls just now
        self.fates: list[str] = []
        self.dead = False
        self.wrong: list[AssertionError] = []
        self.touched: set[UUID] = set()
        self.numbers = iter(range(1, 1000))
        Deliveries.jobs.clear()
        self.clear()

    @initialize()
    def begin(self) -> None:
        self.put("first")

    def teardown(self) -> None:
        self.count["examples"] += 1
        self.clear()

    def clear(self) -> None:
        Group.objects.using(self.storage.alias).all().delete()
        self.rows().filter(saga=NAME).delete()

    # What handlers meet

    def called(self, context: Trip) -> None:
        try:
            self.judge_call(context)
        except AssertionError as error:
            self.wrong.append(error)  # the saga takes it for a step that failed
            raise

    def judge_call(self, context: Trip) -> None:
        """A handler is called: is it its turn, and what becomes of the call?"""
        step, driver = current_step(), self.driver
        action, name, saga_id = step.action.value, step.step, step.saga_id
        self.count["calls"] += 1
        twin = self.twins[saga_id]
        if twin.owner is not driver and driver.saga_id is None and saga_id not in self.touched:
            self.touched.add(saga_id)  # by a sweep
            twin.acquire(driver, known_to(driver.saga))
        key = self.keys.setdefault((saga_id, name, action), step.idempotency_key)
        assert key == step.idempotency_key, "another key"
        fate = self.fates.pop(0) if self.fates else OK
        if twin.owner is driver:
            assert twin.next == (action, name), f"{action} {name} was not its turn"
            assert step.act_outcome != "INTERRUPTED"
            self.happen(saga_id, action, name, fate)
            twin.settle(fate)
        else:
            self.happen_late(saga_id, action, name, fate)
        context.number += 1
        self.fail(fate)

    def happen(self, saga_id: UUID, action: str, step: str, fate: str) -> None:
        if fate in (FAILS, WAITS, DIES_BEFORE):
            return
        if step in ATOMIC:
            rows = Group.objects.using(self.storage.alias)
            if action == "act":
                rows.create(name=f"{saga_id} {step} {rows.count()}")
            else:
                rows.filter(name__startswith=f"{saga_id} {step}").delete()
        elif action == "act":
            self.remote.add((saga_id, step))
        else:
            self.remote.discard((saga_id, step))

    def happen_late(self, saga_id: UUID, action: str, step: str, fate: str) -> None:
        """A call that no saga can fence, from a driver that was taken over: one, and no more."""
        self.driver.zombie_calls += 1
        assert self.driver.zombie_calls == 1, "a driver went on that had lost its lease"
        if action == "act" and step not in ATOMIC:
            self.twins[saga_id].late.add(step)
        self.happen(saga_id, action, step, fate)

    def fail(self, fate: str) -> None:
        if fate == FAILS:
            raise RuntimeError("told to fail")
        if fate == TIMES_OUT:
            raise TimeoutError("told to time out")
        if fate == WAITS:
            raise RetryLater(10_000)
        if fate in DEATHS:
            self.dead = True
            raise Died

    def refuse_the_dead(self, execute: Any, sql: str, *rest: Any) -> Any:
        if self.dead:
            raise OperationalError("nobody is there any more")
        return execute(sql, *rest)

    def play(
        self, driver: Driver, fates: list[str], call: Callable[[], Any]
    ) -> tuple[Any, BaseException | None]:
        """Do something with a driver; what came of it, and what was raised."""
        self.driver, self.fates, self.touched = driver, list(fates), set()
        self.count["steps"] += 1
        connection = connections[self.storage.alias]
        try:
            with connection.execute_wrapper(self.refuse_the_dead):
                return call(), None
        except (Exception, Died) as error:
            return None, error
        finally:
            self.fates, self.dead = [], False
            if self.wrong:
                raise self.wrong[0]

    # Driving

    def some(self, number: int, *statuses: str) -> UUID | None:
        found = [id for id, twin in self.twins.items() if not statuses or twin.status in statuses]
        return found[number % len(found)] if found else None

    def new_id(self) -> UUID:
        return UUID(int=next(self.numbers))

    @property
    def busy(self) -> list[int]:
        return [number for number, driver in enumerate(self.workers) if driver]

    def worker(self, number: int) -> Driver:
        """One of those that are at it."""
        driver = self.workers[self.busy[number % len(self.busy)]]
        assert driver is not None
        return driver

    def dismiss(self, driver: Driver) -> None:
        self.workers = [None if worker is driver else worker for worker in self.workers]

    @precondition(lambda self: len(self.twins) < 4 and self.saga and len(self.busy) < 2)
    @rule(fates=fates)
    def start(self, fates: list[str]) -> None:
        assert self.saga is not None
        driver = self.hire(self.new_id())
        plan = [entry[0] for entry in self.saga.definition.plan]
        twin = self.twins[self.id_of(driver)] = Twin(plan)
        twin.owner, twin.leased, twin.in_flight = driver, True, True
        self.judge_step(driver, fates, twin)

    @precondition(lambda self: len(self.twins) < 4 and self.saga)
    @rule()
    def enqueue(self) -> None:
        assert self.saga is not None
        execution = self.saga().enqueue(Trip(), saga_id=self.new_id())
        plan = [entry[0] for entry in self.saga.definition.plan]
        self.twins[execution.pk] = Twin(plan, status="PENDING", left_alone=True)
        assert Deliveries.jobs[-1] == execution.pk

    def hire(self, saga_id: UUID) -> Driver:
        """A worker that is free has a transaction now."""
        transaction = self.saga_built().transaction(Trip(), saga_id=saga_id)
        driver = Driver(self.saga_built, transaction, iter(transaction), saga_id)
        self.workers[self.workers.index(None)] = driver
        return driver

    def id_of(self, driver: Driver) -> UUID:
        assert driver.saga_id is not None
        return driver.saga_id

    @precondition(lambda self: self.twins and len(self.busy) < 2)
    @rule(number=chosen, fates=fates)
    def start_again(self, number: int, fates: list[str]) -> None:
        """With the id of one that exists."""
        saga_id = self.some(number)
        assert saga_id is not None
        twin, driver = self.twins[saga_id], self.hire(saga_id)
        self.take(driver, fates, twin, lambda: next(driver.iterator))  # type: ignore[arg-type]
        if twin.owner is not driver:
            self.dismiss(driver)

    @precondition(lambda self: self.busy)
    @rule(worker=workers, fates=fates)
    def step(self, worker: int, fates: list[str]) -> None:
        """One more step, by whoever holds it or thinks so."""
        driver = self.worker(worker)
        self.judge_step(driver, fates, self.twins[self.id_of(driver)])

    def judge_step(self, driver: Driver, fates: list[str], twin: Twin) -> None:
        owned, before = twin.owner is driver, twin.at
        result, error = self.play(driver, fates, lambda: next(driver.iterator))  # type: ignore[arg-type]
        if twin.owner is not driver or isinstance(error, Died):
            self.dismiss(driver)
        if isinstance(error, Died):
            self.count["deaths"] += 1
        elif not owned:
            self.count["zombies"] += 1
            assert isinstance(error, LeaseLost), f"a zombie got {result or error!r}"
        elif error is None:
            assert result.step_type in driver.saga.definition.steps.values()  # type: ignore[union-attr]
            assert twin.status in ("RUNNING", "COMPLETED")
            assert twin.at == before + 1, "one step each"
        else:
            self.judge_end(error, twin)

    def judge_end(self, error: BaseException, twin: Twin) -> None:
        """An iteration ended; so did the execution, unless it waits."""
        if isinstance(error, StopIteration):
            assert twin.status == "COMPLETED" or twin.waits
        elif isinstance(error, SagaFailed):
            assert twin.status == "FAILED"
        elif isinstance(error, SagaStuck):
            assert twin.status == "STUCK"
        else:
            assert isinstance(error, (RuntimeError, TimeoutError)), repr(error)
            assert twin.status in ("FAILED", "STUCK") or twin.waits

    def take(self, driver: Driver, fates: list[str], twin: Twin, call: Callable[[], Any]) -> None:
        """Something that acquires the execution, if it may."""
        if twin.active and twin.leased:
            _, error = self.play(driver, fates, call)
            assert isinstance(error, SagaAlreadyRunning), repr(error)
            return
        if twin.active:
            twin.acquire(driver, known_to(driver.saga))
        result, error = self.play(driver, fates, call)
        if isinstance(error, Died):
            self.count["deaths"] += 1
            self.dismiss(driver)
        elif isinstance(result, SagaExecution):
            assert result.status == twin.status, f"{result.status} ({result.stuck_reason}): {twin}"
            assert twin.waits or not twin.active
        elif error is not None:
            self.judge_end(error, twin)

    @precondition(lambda self: self.twins)
    @rule(number=chosen, fates=fates)
    def recover(self, number: int, fates: list[str]) -> None:
        saga_id = self.some(number)
        assert saga_id is not None
        self.deliver_to(saga_id, fates)

    def deliver_to(self, saga_id: UUID, fates: list[str]) -> None:
        driver = Driver(self.saga, saga_id=saga_id)
        self.take(driver, fates, self.twins[saga_id], lambda: recover_saga(saga_id))

    @precondition(lambda self: Deliveries.jobs)
    @rule(number=chosen, fates=fates, twice=st.booleans())
    def deliver(self, number: int, fates: list[str], twice: bool) -> None:
        """A job comes; the other of a doubled one comes later."""
        jobs = Deliveries.jobs
        saga_id = jobs[number % len(jobs)]
        if not twice:
            jobs.remove(saga_id)
        self.deliver_to(saga_id, fates)

    @precondition(lambda self: Deliveries.jobs)
    @rule(number=chosen)
    def drop_a_delivery(self, number: int) -> None:
        del Deliveries.jobs[number % len(Deliveries.jobs)]

    @rule(fates=fates)
    def sweep(self, fates: list[str]) -> None:
        due = {id for id, twin in self.twins.items() if twin.due}
        swept: list[UUID] = []
        driver = Driver(self.saga)

        def drive() -> None:
            for recovered in sweep(inline=True, saga=NAME):
                assert (
                    recovered.status not in ("lost", *ACTIVE) or self.twins[recovered.saga_id].waits
                ), recovered
                swept.append(recovered.saga_id)

        _, error = self.play(driver, fates, drive)
        assert error is None or isinstance(error, Died), repr(error)
        assert self.touched <= due, "it was not due"
        for id in {*swept} - self.touched:  # no call was made: it could not go on
            self.twins[id].acquire(driver, known_to(driver.saga))
        if error is None:
            assert {*swept} == due, "it was due and not driven"
        for id in due - {*swept} - self.touched:  # claimed, and not yet looked at
            self.twins[id].owner, self.twins[id].leased = driver, True
            self.twins[id].left_alone = False

    # Losing

    @precondition(lambda self: self.busy)
    @rule(worker=workers)
    def crash(self, worker: int) -> None:
        """Between two steps, with the lease."""
        self.dismiss(self.worker(worker))

    @precondition(lambda self: self.busy)
    @rule(worker=workers, fates=fates, raising=st.booleans())
    def leave(self, worker: int, fates: list[str], raising: bool) -> None:
        """The body of the transaction breaks, or raises."""
        driver = self.worker(worker)
        self.dismiss(driver)
        twin = self.twins[self.id_of(driver)]
        error = ValueError("the consumer's") if raising else None
        owned = twin.owner is driver
        if owned and raising:
            twin.turn_back()
        elif owned:
            twin.leased = twin.in_flight = False
            twin.owner = None
        kind = type(error) if error else None
        _, raised = self.play(driver, fates, lambda: driver.transaction.__exit__(kind, error, None))
        if raised is not None and not isinstance(raised, Died):
            assert isinstance(raised, LeaseLost), repr(raised)
            assert raising, "letting go of what was lost is no error"
            assert not owned

    @precondition(lambda self: self.busy)
    @rule(worker=workers, fates=fates, late=fates)
    def freeze(self, worker: int, fates: list[str], late: list[str]) -> None:
        """For so long that another takes over what the worker holds; then it goes on."""
        driver = self.worker(worker)
        saga_id = self.id_of(driver)
        if self.twins[saga_id].active:
            self.let_time_pass(saga_id)
            self.deliver_to(saga_id, fates)
            self.judge_step(driver, late, self.twins[saga_id])

    @precondition(lambda self: self.some(0, *ACTIVE))
    @rule(number=chosen)
    def time_passes(self, number: int) -> None:
        """The lease of one runs out, and whatever it waits for comes."""
        saga_id = self.some(number, *ACTIVE)
        assert saga_id is not None
        self.let_time_pass(saga_id)

    def let_time_pass(self, saga_id: UUID) -> None:
        row = self.rows().get(pk=saga_id)
        lease = PAST if row.lease_until else None
        self.rows().filter(pk=saga_id).update(lease_until=lease, wake_at=None, grace_until=None)
        twin = self.twins[saga_id]
        twin.leased = twin.waits = twin.left_alone = False

    # Changing

    def put(self, version: str | None) -> None:
        for key, saga in list(registry._classes.items()):
            if saga.name == NAME:
                del registry._classes[key]
        self.saga = None if version is None else build(version)
        if self.saga is not None:
            self.saga_built = self.saga
            registry.register(self.saga)

    @rule(version=st.sampled_from(["first", *versions(), *versions(), None]))
    def deploy(self, version: str | None) -> None:
        """Workers that are at it go on with the code that they began with."""
        self.put(version)

    @precondition(lambda self: self.twins)
    @rule(number=chosen)
    def retry(self, number: int) -> None:
        """By an operator."""
        saga_id = self.some(number)
        assert saga_id is not None
        twin = self.twins[saga_id]
        new, error = self.play(Driver(None), [], lambda: operations.retry(saga_id))
        if twin.status == "STUCK":
            assert error is None, repr(error)
            twin.retry()
            assert not twin.active or Deliveries.jobs[-1] == saga_id
        elif twin.status != "FAILED" or twin.retried:
            assert isinstance(error, SagaError)
        elif self.saga is None:
            assert isinstance(error, UnknownSaga)
        else:
            assert error is None, repr(error)
            twin.retried = True
            plan = [entry[0] for entry in self.saga.definition.plan]
            self.twins[new.pk] = Twin(plan, status="PENDING", left_alone=True)

    # Judging

    def rows(self) -> Any:
        return SagaExecution.objects.using(self.storage.alias)

    @invariant()
    def every_execution_stands_as_it_must(self) -> None:
        rows = {row.pk: row for row in self.rows().filter(saga=NAME)}
        assert rows.keys() == self.twins.keys()
        for saga_id, twin in self.twins.items():
            row = rows[saga_id]
            state = row.state
            assert row.status == twin.status, f"{row.status} ({row.stuck_reason}), not {twin}"
            assert state.in_flight is twin.in_flight, f"in flight: {twin}"
            told = [effect.step for effect in machine.standing(state)]
            assert told == twin.effects, f"{told} are said to stand: {twin}"
            self.judge_world(saga_id, twin)
            assert row.token >= self.tokens.get(saga_id, 0)
            self.tokens[saga_id] = row.token
            if twin.status == "STUCK":
                assert row.stuck_reason
            assert self.finals[saga_id] == twin.ended, "one final signal"

    def judge_world(self, saga_id: UUID, twin: Twin) -> None:
        """L1 and L3, against what really stands out there."""
        remote = {step for id, step in self.remote if id == saga_id}
        allowed = {*twin.effects, *twin.late}
        if twin.in_flight:
            allowed.add(twin.next[1])
        assert remote <= allowed, f"{remote} stand: {twin}"
        reserved = Group.objects.using(self.storage.alias).filter(name__startswith=f"{saga_id} ")
        assert reserved.count() == ("Reserve" in twin.effects), f"atomic, once: {twin}"
        if twin.status == "COMPLETED":
            assert remote | {"Reserve"} >= {*twin.plan}, f"{remote} stand: {twin}"
        if twin.status == "FAILED":
            assert remote <= twin.late, f"{remote} stand: {twin}"

    @invariant()
    def every_attempt_is_in_the_history(self) -> None:
        for saga_id, twin in self.twins.items():
            history = self.storage.history(saga_id)
            assert [(r.action, r.step, r.outcome) for r in history] == twin.records
            tokens = [record.token for record in history]
            assert tokens == sorted(tokens)

    def tell(self, execution: SagaExecution, **kwargs: Any) -> None:
        self.finals[execution.pk] += 1


# The battery


class WritesTo:
    """The sagas' database, for what is enqueued as for all else."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

    def db_for_write(self, model: Any, **hints: Any) -> str | None:
        return self.alias if model._meta.app_label == "django_saga" else None


def spare_the_disk(connection: Any, **kwargs: Any) -> None:
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA synchronous = OFF")  # nothing here depends on the disk


@pytest.fixture(params=django_settings.DATABASES)
def alias(
    request: pytest.FixtureRequest, settings: Any, caplog: pytest.LogCaptureFixture
) -> Iterator[str]:
    settings.DJANGO_SAGA = SETTINGS
    settings.DATABASE_ROUTERS = [WritesTo(request.param)]
    caplog.set_level(100, "django_saga")  # thousands of lines say what is meant to happen
    before = dict(registry._classes)
    final = (signals.saga_completed, signals.saga_failed)
    connection_created.connect(spare_the_disk)
    connections[request.param].close()
    for signal in final:
        signal.connect(tell)
    yield request.param
    for signal in final:
        signal.disconnect(tell)
    connection_created.disconnect(spare_the_disk)
    connections[request.param].close()
    registry._classes.clear()
    registry._classes.update(before)


def tell(sender: Any, execution: SagaExecution, **kwargs: Any) -> None:
    if MACHINE and execution.saga == NAME:
        MACHINE[0].tell(execution)


def run(number: int, examples: int, steps: int, *, shrink: bool = True) -> Counter[str]:
    Machine.count.clear()
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.normal if shrink else Verbosity.quiet,
    )
    run_state_machine_as_test(seed(number)(type("Machine", (Machine,), {})), settings=chosen)
    return Machine.count


def test_whatever_happens_in_whatever_order_every_execution_stands_as_it_must(
    alias: str,
    request: pytest.FixtureRequest,
    size: Size,
    full: bool,
    figure: Callable[..., None],
) -> None:
    examples = size("stateful", everyday=25, full_run=2_000)  # on each database
    count = run(request.config.getoption("--seed"), examples, 60 if full else 30)
    assert count["examples"] >= examples
    figure("stateful", **count, violations=0)


@pytest.mark.parametrize("alias", ["sqlite"], indirect=True)
def test_what_the_rules_say_does_happen(alias: str) -> None:
    """Each fault once, by hand: else a quiet battery might only be an idle one."""
    played = Machine()
    count = played.count
    count.clear()
    played.begin()
    played.start([])
    played.freeze(0, [], [OK])
    assert (count["zombies"], count["calls"]) == (1, 4), "the late call came, and was judged"
    played.start([DIES_AFTER])
    assert count["deaths"] == 1
    assert played.busy == []
    played.sweep([])
    assert count["calls"] == 5, "its lease has not run out"
    played.time_passes(0)
    played.put("a step lost")
    played.sweep([])
    assert [twin.status for twin in played.twins.values()] == ["COMPLETED", "STUCK"]
    played.enqueue()
    played.deliver(0, [WAITS], True)
    played.deliver(0, [], False)
    played.drop_a_delivery(0)
    played.retry(1)
    played.put("first")
    played.recover(1, [FAILS])
    played.start_again(0, [])
    played.every_execution_stands_as_it_must()
    played.every_attempt_is_in_the_history()
    assert [twin.status for twin in played.twins.values()] == ["COMPLETED", "FAILED", "RUNNING"]
    assert played.finals.total() == 2
    played.teardown()


# Canaries: with a rule of the product's switched off, a violation must be found


def forget_the_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "effects_if_lost", lambda state, rules: state.effects)


def fence_nothing(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written whoever holds the lease, and wherever the execution stands."""
    write = DjangoSagaStorage.checkpoint

    def checkpoint(self: Any, checkpoint: Any, **options: Any) -> Any:
        row = SagaExecution.objects.using(self.alias).get(pk=checkpoint.id)
        checkpoint = type(checkpoint)(
            **{name: getattr(checkpoint, name) for name in checkpoint.__struct_fields__}
            | {"token": row.token, "before": row.state}
        )
        return write(self, checkpoint, **options)

    patch.setattr(DjangoSagaStorage, "checkpoint", checkpoint)


def lease_to_everyone(patch: pytest.MonkeyPatch) -> None:
    acquire = DjangoSagaStorage.acquire

    def take(self: Any, saga_id: UUID, **options: Any) -> Any:
        SagaExecution.objects.using(self.alias).filter(pk=saga_id).update(lease_until=None)
        return acquire(self, saga_id, **options)

    patch.setattr(DjangoSagaStorage, "acquire", take)


def undo_in_the_order_of_acts(patch: pytest.MonkeyPatch) -> None:
    undo = machine.compensate_next

    def turned(state: Any) -> Any:
        after = undo(replace(state, effects=state.effects[::-1]))
        return replace(after, effects=state.effects)

    patch.setattr(machine, "compensate_next", turned)


@pytest.mark.parametrize("alias", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "rule_off", [forget_the_lost, fence_nothing, lease_to_everyone, undo_in_the_order_of_acts]
)
def test_canary_a_rule_that_is_off_is_found(
    alias: str,
    rule_off: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rule_off(monkeypatch)
    with pytest.raises(AssertionError):
        run(0, 100, 30, shrink=False)
