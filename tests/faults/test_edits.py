"""Battery 12: a saga's definition is edited between a crash and its recovery.

Each edit meets an execution that was interrupted at each call of its plan, going forward and
compensating. What then is right is foretold from the plan's order and the edit alone: which
handlers are called, in which order, or that it is STUCK and names what is missing. A ledger that
the handlers write, outside of the rows, says what was done.
"""

from __future__ import annotations

import random
import types
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import msgspec
import pytest
from django.conf import settings
from django.contrib.auth.models import Group
from django.db import connections

from django_saga import (
    Fallback,
    Retry,
    RetryLater,
    Saga,
    SagaContext,
    SagaError,
    SagaStepHandler,
    StorageUnavailable,
    current_step,
    engine,
    machine,
    operations,
    recover_saga,
    registry,
)
from django_saga.definition import Definition
from django_saga.models import SagaExecution
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage, SagaStorage
from tests.faults.options import Size

pytestmark = pytest.mark.usefixtures("committing_databases")

NAME = "edits.Order"
Plan = tuple[tuple[str, ...], ...]
Call = tuple[str, str]  # action, and what the execution's plan calls the step
PLAN: Plan = (("Reserve",), ("Charge", "Wallet"), ("Book",), ("Ship",))
STEPS = [step for entry in PLAN for step in entry]


# What happens to a call

OK = "ok"
FAILS = "fails"  # without an effect
TIMES_OUT = "times out"  # with its effect
DIES_BEFORE = "dies before its effect"
DIES_AFTER = "dies after its effect"
WAITS = "waits for its next attempt"
INTERRUPTIONS = (DIES_BEFORE, DIES_AFTER, WAITS)


class Died(BaseException):
    """The process ends here."""


@dataclass
class Ledger:
    """What was called, and what stands, outside of every row of ours."""

    fates: dict[Call, list[str]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)  # the code that ran, of each call
    keys: set[tuple[Call, str]] = field(default_factory=set)
    remote: set[str] = field(default_factory=set)  # act keys whose effect stands
    alias: str | None = None  # where the effects of atomic steps are rows
    interrupted: bool = False

    def call(self, version: str, atomic: bool, context: Any) -> None:
        step = current_step()
        call = (step.action.value, step.step)
        self.calls.append(call)
        self.versions.append(version)
        self.keys.add((call, step.idempotency_key))
        fate = self.fates[call].pop(0) if self.fates.get(call) else OK
        self.interrupted = self.interrupted or fate in INTERRUPTIONS
        if fate == WAITS:
            raise RetryLater(1000)
        if fate == DIES_BEFORE:
            raise Died
        if fate == FAILS:
            raise RuntimeError(f"{call} was told to fail")
        self.take_effect(step.action == "act", step.act_idempotency_key, atomic)
        context.number += 1
        if fate == DIES_AFTER:
            raise Died
        if fate == TIMES_OUT:
            raise TimeoutError

    def take_effect(self, acts: bool, key: str, atomic: bool) -> None:
        if acts and not (atomic and self.alias):
            self.remote.add(key)
            return
        self.remote.discard(key)
        if self.alias:
            rows = Group.objects.using(self.alias).filter(name=key)
            rows.create(name=key) if acts else rows.delete()

    def standing(self, saga_id: uuid.UUID) -> set[str]:
        """The names of the steps whose effect stands."""
        keys = {*self.remote}
        if self.alias:
            rows = Group.objects.using(self.alias).filter(name__startswith=str(saga_id))
            keys |= {*rows.values_list("name", flat=True)}
        return {key.split(":")[1] for key in keys}


LEDGER = Ledger()


# What is deployed


@dataclass(frozen=True)
class Spec:
    """The source of a step."""

    name: str
    aliases: tuple[str, ...] = ()
    is_async: bool = False
    atomic: bool = False
    module: str = "orders.steps"


Entry = tuple[Spec, ...]  # a step, or a step and its fallback
Field = tuple[Any, ...]  # name, type, and default if it has one


@dataclass(frozen=True)
class Code:
    """The source of a saga."""

    steps: tuple[Entry, ...]
    retired: tuple[Spec, ...] = ()
    fields: tuple[Field, ...] = (
        ("order", int),
        ("number", int, 0),
        ("note", str, "by hand"),
    )
    context: str = "OrderContext"
    saga: str = "Order"
    name: str = NAME
    deleted: bool = False
    version: str = "new"

    def spec(self, name: str) -> Spec | None:
        """The step that a plan may call so, if it is still there."""
        for spec in (*(spec for entry in self.steps for spec in entry), *self.retired):
            if name in (spec.name, *spec.aliases):
                return spec
        return None


OLD = Code(tuple(tuple(map(Spec, entry)) for entry in PLAN), version="old")


def build_step(spec: Spec, context: type[SagaContext], version: str) -> type[SagaStepHandler[Any]]:
    def call(self: Any, context: Any) -> None:
        LEDGER.call(version, spec.atomic, context)

    async def acall(self: Any, context: Any) -> None:
        LEDGER.call(version, spec.atomic, context)

    function = acall if spec.is_async else call
    body = {
        "__module__": spec.module,
        "act": function,
        "compensate": function,
        "aliases": spec.aliases,
        "atomic": spec.atomic,
        "compensation_retry": Retry(attempts=1),
    }
    return types.new_class(spec.name, (SagaStepHandler[context],), {}, lambda ns: ns.update(body))  # type: ignore[valid-type]


@cache
def build(code: Code) -> type[Saga[Any]]:
    context = make_dataclass(code.context, code.fields, bases=(SagaContext,))
    step = partial(build_step, context=context, version=code.version)
    steps = [
        Fallback(step=step(entry[0]), fallback=step(entry[1])) if len(entry) > 1 else step(entry[0])
        for entry in code.steps
    ]
    body = {"name": code.name, "steps": steps, "retired_steps": list(map(step, code.retired))}
    bases = (Saga[context],)  # type: ignore[valid-type]
    return types.new_class(code.saga, bases, {}, lambda namespace: namespace.update(body))


def deploy(code: Code) -> type[Saga[Any]]:
    """Put this code in the place of what was there."""
    for key, saga in list(registry._classes.items()):
        if saga.name == NAME or saga.__module__ == __name__:
            del registry._classes[key]
    saga = build(code)
    registry._classes.pop(f"{saga.__module__}.{saga.__qualname__}", None)
    if not code.deleted:
        registry.register(saga)
    return saga


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(registry._classes)
    yield
    registry._classes.clear()
    registry._classes.update(before)


# The edits


@dataclass(frozen=True)
class Edit:
    """A change of the code, and what of a stored execution it loses."""

    name: str
    new: Code
    old: Code = OLD
    lost: frozenset[str] = frozenset()  # what plans call the steps that are no longer known
    lost_all: str = ""  # what the reason must name when the saga or its context is lost


def change(target: str, code: Code = OLD, **attributes: Any) -> Code:
    """The code with one step declared otherwise."""

    def changed(spec: Spec) -> Spec:
        return replace(spec, **attributes) if spec.name == target else spec

    steps = tuple(tuple(map(changed, entry)) for entry in code.steps)
    return replace(code, steps=steps, version="new")


def without(target: str, *, retired: bool) -> Code:
    steps = tuple(tuple(s for s in entry if s.name != target) for entry in OLD.steps)
    old = OLD.spec(target)
    assert old
    return replace(
        OLD,
        steps=tuple(filter(None, steps)),
        retired=(old,) if retired else (),
        version="new",
    )


def before(code: Code) -> Code:
    return replace(code, version="old")


def edits_of(target: str) -> list[Edit]:
    """The edits of one step."""
    gone = frozenset({target})
    atomic = change(target, atomic=True)
    return [
        Edit(f"{target} renamed, with an alias", change(target, name="Other", aliases=(target,))),
        Edit(f"{target} renamed, without an alias", change(target, name="Other"), lost=gone),
        Edit(f"{target} removed, and retired", without(target, retired=True)),
        Edit(f"{target} removed", without(target, retired=False), lost=gone),
        Edit(f"{target} moved to another module", change(target, module="shipping.steps")),
        Edit(f"{target} made async", change(target, is_async=True)),
        Edit(f"{target} made sync", change(target), old=before(change(target, is_async=True))),
        Edit(f"{target} made atomic", atomic),
        Edit(f"{target} no longer atomic", change(target), old=before(atomic)),
    ]


def edited(**attributes: Any) -> Code:
    return replace(OLD, **{"version": "new", **attributes})


RESERVE, CHARGE, BOOK, SHIP = OLD.steps
NEW = (Spec("Insure"),)
FIELDS = OLD.fields
EDITS = [
    Edit("nothing", edited()),
    *(edit for step in STEPS for edit in edits_of(step)),
    *(
        Edit(f"a step inserted at {at}", edited(steps=(*OLD.steps[:at], NEW, *OLD.steps[at:])))
        for at in range(len(OLD.steps) + 1)
    ),
    Edit("the steps reversed", edited(steps=OLD.steps[::-1])),
    Edit("two steps swapped", edited(steps=(RESERVE, BOOK, CHARGE, SHIP))),
    Edit("all steps replaced", edited(steps=(NEW,)), lost=frozenset(STEPS)),
    Edit("all steps replaced, and retired", edited(steps=(NEW,), retired=tuple(map(Spec, STEPS)))),
    Edit("the fallback made a step", edited(steps=(RESERVE, *zip(CHARGE), BOOK, SHIP))),
    Edit("the fallback's sides swapped", edited(steps=(RESERVE, CHARGE[::-1], BOOK, SHIP))),
    Edit("a step given a fallback", edited(steps=(RESERVE, CHARGE, BOOK + NEW, SHIP))),
    Edit("one step in the place of two", edited(
        steps=(RESERVE, CHARGE, (Spec("Send", aliases=("Book", "Ship")),)),
    )),
    Edit("the saga deleted", edited(deleted=True), lost_all=NAME),
    Edit("the saga renamed, its name kept", edited(saga="Purchase")),
    Edit("the saga renamed, and its name", edited(saga="Purchase", name="edits.Purchase"),
         lost_all=NAME),
    Edit("the context renamed", edited(context="PurchaseContext")),
    Edit("a field added, with a default", edited(fields=(*FIELDS, ("gift", bool, False)))),
    Edit("a field added", edited(fields=(("gift", bool), *FIELDS)), lost_all="gift"),
    Edit("a field removed", edited(fields=FIELDS[:2])),
    Edit("a field of another type", edited(fields=(("order", str), *FIELDS[1:])), lost_all="order"),
    Edit("a field of a wider type", edited(fields=(("order", float | None), *FIELDS[1:]))),
]  # fmt: skip


# Where it is interrupted, and what happens after that


@dataclass(frozen=True)
class Story:
    """What happens to each call, in order; every other is done."""

    name: str
    at: Call  # that is interrupted
    fates: tuple[tuple[Call, tuple[str, ...]], ...]
    forward: bool

    @property
    def fate_of(self) -> dict[Call, list[str]]:
        return {call: list(fates) for call, fates in self.fates}


def stories() -> Iterator[Story]:
    last = ("act", "Ship")
    by_wallet = {("act", "Charge"): (FAILS,)}
    undone = {("act", "Charge"): (TIMES_OUT,)}
    forward: list[tuple[Call, dict[Call, tuple[str, ...]]]] = [
        (("act", "Reserve"), {}),
        (("act", "Charge"), {}),
        (("compensate", "Charge"), undone),
        (("act", "Wallet"), by_wallet),
        (("act", "Wallet"), undone),
        (("act", "Book"), {}),
        (("act", "Book"), by_wallet),
        (last, {}),
    ]
    for call, before in forward:
        for moment in INTERRUPTIONS:
            yield story(call, before, moment, OK, forward=True)
            yield story(call, before, moment, FAILS, forward=True)
            if call != last:
                yield story(call, {**before, last: (FAILS,)}, moment, OK, forward=True)
    backward: list[tuple[Call, dict[Call, tuple[str, ...]]]] = [
        (("compensate", "Ship"), {last: (TIMES_OUT,)}),
        (("compensate", "Book"), {last: (FAILS,)}),
        (("compensate", "Charge"), {last: (FAILS,)}),
        (("compensate", "Wallet"), {last: (FAILS,), **by_wallet}),
        (("compensate", "Reserve"), {last: (FAILS,), **by_wallet}),
        (("compensate", "Reserve"), {last: (TIMES_OUT,)}),
    ]
    for call, before in backward:
        for moment in INTERRUPTIONS:
            for then in (OK, FAILS):
                yield story(call, before, moment, then, forward=False)


def story(
    call: Call, before: dict[Call, tuple[str, ...]], moment: str, then: str, *, forward: bool
) -> Story:
    fates = {**before, call: (*before.get(call, ()), moment, then)}
    names = ", ".join(f"{' '.join(call)}: {' then '.join(fate)}" for call, fate in fates.items())
    return Story(names, call, tuple(fates.items()), forward)


STORIES = list(stories())
Case = tuple[Edit, Story]


# What is right


@dataclass
class Foretold:
    """What must come, from the order of the plan alone."""

    calls: list[Call] = field(default_factory=list)
    before: int = 0  # calls until the interruption
    effects: list[str] = field(default_factory=list)  # of acts that had one, or may have
    broken: set[str] = field(default_factory=set)  # whose compensation failed
    status: str = ""
    missing: frozenset[str] = frozenset()  # what the reason must name


class Halted(Exception):
    pass


class Seer:
    """Walks through the plan as it was written when the execution started."""

    def __init__(self, edit: Edit, story: Story) -> None:
        self.edit, self.fates = edit, story.fate_of
        self.seen = Foretold()

    def foretell(self) -> Foretold:
        seen = self.seen
        try:
            if self.forward():
                seen.status = "COMPLETED"
            else:
                self.backward()
                seen.status = "STUCK" if seen.broken else "FAILED"
                seen.missing = frozenset(seen.broken)
        except Halted:
            seen.status = "STUCK"
        return seen

    def forward(self) -> bool:
        for number, entry in enumerate(PLAN):
            later = {step for ahead in PLAN[number + 1 :] for step in ahead}
            if not any(self.stands_in(entry, at, later) for at in range(len(entry))):
                return False
            if self.seen.broken:
                return False
        return True

    def stands_in(self, entry: tuple[str, ...], at: int, later: set[str]) -> bool:
        """Whether the step, or else its fallback after it, does what the plan wants here."""
        step, ahead = entry[at], {*entry[at:], *later}
        if self.call("act", step, ahead) == OK:
            return True
        if step in self.seen.effects and at + 1 < len(entry):
            return not self.undo(step, ahead)
        return False

    def backward(self) -> None:
        for step in reversed(list(self.seen.effects)):
            if step not in self.seen.broken:
                self.undo(step, set())

    def undo(self, step: str, ahead: set[str]) -> bool:
        if self.call("compensate", step, ahead) == OK:
            self.seen.effects.remove(step)
            return True
        self.seen.broken.add(step)
        return False

    def call(self, action: str, step: str, ahead: set[str]) -> str:
        """What comes of the call, once it is made after the interruption too."""
        seen, fates = self.seen, self.fates.get((action, step), [])
        while True:
            fate = fates.pop(0) if fates else OK
            seen.calls.append((action, step))
            code = self.edit.new if seen.before else self.edit.old
            spec = code.spec(step)
            assert spec
            known = fate in (OK, FAILS, WAITS) or spec.atomic  # else it may have had its effect
            has = fate == OK or not known
            if action == "act" and has and step not in seen.effects:
                seen.effects.append(step)
            if fate not in INTERRUPTIONS:
                return fate
            seen.before = len(seen.calls)
            self.look_at_the_code({*ahead, *seen.effects} - seen.broken)

    def look_at_the_code(self, needed: set[str]) -> None:
        if self.edit.lost_all:
            self.seen.missing = frozenset({self.edit.lost_all})
            raise Halted
        if needed & self.edit.lost:
            self.seen.missing = frozenset(needed & self.edit.lost)
            raise Halted


# In some stories a step times out with its effect, which one that was atomic then cannot have.
CASES: list[Case] = [case for case in product(EDITS, STORIES) if Seer(*case).foretell().before]


# What is done


class Dying(DjangoSagaStorage):
    """What the process that dies has: it lets go of nothing."""

    def release(self, *arguments: Any, **options: Any) -> None:
        raise StorageUnavailable("the process has died")


class Memory(MemorySagaStorage):
    """Of a process that does not die: another thread of it goes on, a day later."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lambda: self.now)


def interrupt(saga: type[Saga[Any]], saga_id: uuid.UUID, storage: SagaStorage) -> None:
    """Drive it as far as the interruption, and let its lease and its wait run out."""
    dying = Dying(storage.alias) if isinstance(storage, DjangoSagaStorage) else storage
    context = saga.definition.context_type(7)  # type: ignore[call-arg]
    with suppress(Died):
        saga(storage=dying).run(context, saga_id=saga_id)
    assert LEDGER.interrupted, "the interruption never came"
    if isinstance(storage, Memory):
        storage.now += 86_400
    else:
        assert rows(storage).filter(pk=saga_id).update(lease_until=None, wake_at=None) == 1


def rows(storage: SagaStorage) -> Any:
    assert isinstance(storage, DjangoSagaStorage)
    return SagaExecution.objects.using(storage.alias)


def judge(case: Case, storage: SagaStorage) -> tuple[str, list[str]]:
    """Play one case; how it ended after the recovery, and whatever was not right."""
    edit, story = case
    saga_id = uuid.uuid4()
    alias = storage.alias if isinstance(storage, DjangoSagaStorage) else None
    rolls_back = needs_rollback(edit)
    LEDGER.__init__(story.fate_of, alias=alias if rolls_back else None)  # type: ignore[misc]
    foretold = Seer(edit, story).foretell()
    interrupt(deploy(edit.old), saga_id, storage)
    deploy(edit.new)
    try:
        execution = recover_saga(saga_id, storage=storage)
    except Exception as error:
        return "raised", [f"recovery raised {error!r}"]
    wrong = [*differences(execution, storage, foretold)]
    if execution.status == "STUCK" and alias:
        assert isinstance(storage, DjangoSagaStorage)
        wrong += retried(execution, storage, case, foretold)
    if rolls_back:
        Group.objects.using(alias).all().delete()
    return execution.status, wrong


def differences(
    execution: SagaExecution, storage: SagaStorage, foretold: Foretold
) -> Iterator[str]:
    if execution.status != foretold.status:
        yield f"it is {execution.status} ({execution.stuck_reason}), not {foretold.status}"
    if foretold.calls != LEDGER.calls:
        yield f"called {LEDGER.calls}, not {foretold.calls}"
    versions = ["old"] * foretold.before + ["new"] * (len(LEDGER.calls) - foretold.before)
    if versions != LEDGER.versions:
        yield f"ran {LEDGER.versions}, not {versions}"
    yield from wrong_keys(execution)
    yield from wrong_world(execution)
    for name in foretold.missing:
        if name not in execution.stuck_reason:
            yield f"{name} is not in the reason: {execution.stuck_reason}"
    history = [(record.action, record.step) for record in storage.history(execution.pk)]
    if history != LEDGER.calls:
        yield f"the history is {history}, not {LEDGER.calls}"


def wrong_keys(execution: SagaExecution) -> Iterator[str]:
    for (action, step), key in LEDGER.keys:
        if key != f"{execution.pk}:{step}:{action}":
            yield f"{action} {step} was called with {key}"


def wrong_world(execution: SagaExecution) -> Iterator[str]:
    """What stands out there, against what the execution's end says."""
    stands = LEDGER.standing(execution.pk)
    if execution.status == "FAILED" and stands:
        yield f"FAILED, but {stands} stand"
    if execution.status == "COMPLETED" and [len(stands & {*e}) for e in PLAN] != [1] * len(PLAN):
        yield f"COMPLETED, but only {stands} stand"
    if execution.status == "STUCK":
        named = {effect.step for effect in machine.standing(execution.state)}
        if not stands <= named:
            yield f"STUCK, and {stands - named} stand unnamed"


def retried(
    execution: SagaExecution, storage: DjangoSagaStorage, case: Case, foretold: Foretold
) -> Iterator[str]:
    """An operator's retry: first with the code as it is, then with what was lost brought back."""
    edit, effects = case[0], foretold.effects
    unable = bool(effects) and (edit.lost_all or edit.lost & {*effects})
    LEDGER.fates.clear()
    LEDGER.calls.clear()
    again = operations.retry(execution.pk, storage=storage)
    if unable:
        if (again.status, LEDGER.calls) != ("STUCK", []):
            yield f"retried without the code it is {again.status}, with {LEDGER.calls}"
        deploy(replace(edit.old, version="new"))
        again = operations.retry(execution.pk, storage=storage)
    if again.status != "FAILED":
        yield f"retried it is {again.status}: {again.stuck_reason}"
    undone = [("compensate", step) for step in reversed(effects)]
    if undone != LEDGER.calls:
        yield f"retried, called {LEDGER.calls}, not {undone}"
    yield from wrong_keys(again)
    yield from wrong_world(again)


def needs_rollback(edit: Edit) -> bool:
    """Whether there is an atomic step. Memory rolls nothing back, so none is played there."""
    return any(spec.atomic for code in (edit.old, edit.new) for e in code.steps for spec in e)


def cases_for(storage: str) -> list[Case]:
    return [case for case in CASES if storage != "memory" or not needs_rollback(case[0])]


def telling_first(cases: Sequence[Case]) -> list[Case]:
    """First every edit and every story once, then every edit at every call, then the others."""
    seen: set[Any] = set()

    def rank(case: Case) -> int:
        edit, story = case
        names, place = {edit.name, story.name}, (edit.name, story.at, story.forward)
        new = not names <= seen, place not in seen, True
        seen.update(names, {place})
        return new.index(True)

    return sorted(cases, key=rank)


# The battery


@pytest.fixture(autouse=True)
def _patience(settings: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings.DJANGO_SAGA = {"INLINE_WAIT": 0}
    caplog.set_level("CRITICAL", "django_saga")  # thousands of lines say what is meant to happen


def make_storage(name: str) -> SagaStorage:
    if name == "memory":
        return Memory()
    if connections[name].vendor == "sqlite":
        with connections[name].cursor() as cursor:
            cursor.execute("PRAGMA synchronous = OFF")  # nothing here depends on the disk
    return DjangoSagaStorage(name)


@pytest.mark.parametrize("name", ["memory", *settings.DATABASES])
def test_an_edited_definition_is_resumed_rightly_or_stuck_with_what_is_missing(
    name: str, dice: random.Random, size: Size, figure: Callable[..., None]
) -> None:
    cases = cases_for(name)
    count = size("edits", everyday=800 if name == "memory" else 120, full_run=len(cases))
    chosen = telling_first(dice.sample(cases, len(cases)))[:count]
    storage, ends, silent = make_storage(name), [], []
    for case in chosen:
        end, wrong = judge(case, storage)
        ends.append(end)
        silent += [(case[0].name, case[1].name, what) for what in wrong]
    figure(
        "edits",
        cases=len(chosen),
        resumed=len(ends) - ends.count("STUCK"),
        stuck=ends.count("STUCK"),
        silent=len(silent),
    )
    assert not silent, f"{len(silent)} of {len(chosen)}: {silent[:5]}"


def test_the_battery_interrupts_every_step_in_both_directions_and_all_ends_come() -> None:
    """Else it would not see all that it claims to."""
    for forward, action in ((True, "act"), (False, "compensate")):
        at = {story.at for story in STORIES if story.forward is forward}
        assert {(action, step) for step in STEPS} <= at
        for edit in EDITS:
            played = {story.at for e, story in CASES if e is edit and story.forward is forward}
            assert len(played) > 3, edit.name
    for forward in (True, False):
        told = [Seer(*case).foretell() for case in CASES if case[1].forward is forward]
        ends = {(seen.status, bool(seen.missing)) for seen in told}
        assert ends >= {("FAILED", False), ("STUCK", True)}
        assert (("COMPLETED", False) in ends) is forward


# Canaries: with a rule of the product's switched off, the judgement must be red


def forget_the_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "effects_if_lost", lambda state, rules: state.effects)


def take_what_is_there(patch: pytest.MonkeyPatch) -> None:
    """Steps that are not known count as done."""
    patch.setattr(Definition, "require", lambda self, names: None)
    take_over = engine.take_over

    def skip(saga: Any, claim: Any, context: Any = None) -> Any:
        known, effects = saga.definition.steps, claim.state.effects
        plan = tuple(entry for entry in claim.state.plan if {*entry} <= {*known})
        kept = tuple(effect for effect in effects if effect.step in known)
        state = msgspec.structs.replace(claim.state, plan=plan, effects=kept)
        if claim.state.step in known:
            claim.state = state
        return take_over(saga, claim, context)

    patch.setattr(engine, "take_over", skip)


def thaw_the_plan(patch: pytest.MonkeyPatch) -> None:
    take_over = engine.take_over

    def renew(saga: Any, claim: Any, context: Any = None) -> Any:
        claim.state = msgspec.structs.replace(claim.state, plan=saga.definition.plan)
        return take_over(saga, claim, context)

    patch.setattr(engine, "take_over", renew)


@pytest.mark.parametrize("rule_off", [forget_the_lost, take_what_is_there, thaw_the_plan])
def test_canary_a_rule_that_is_off_is_seen(
    rule_off: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(cases: Sequence[Case]) -> list[str]:
        return [what for case in cases for what in judge(case, Memory())[1]]

    cases = cases_for("memory")[::13]
    assert wrong(cases) == []
    rule_off(monkeypatch)
    assert wrong(cases)


def test_canary_what_stands_unnamed_and_a_wrong_key_are_seen() -> None:
    edit = next(edit for edit in EDITS if edit.name == "the saga deleted")
    told = "act Book: dies after its effect then ok"
    story = next(story for story in STORIES if story.name == told)
    storage = DjangoSagaStorage("sqlite")
    assert judge((edit, story), storage) == ("STUCK", [])
    deploy(edit.old)
    execution = rows(storage).latest("created_at")
    LEDGER.remote.add(f"{execution.pk}:Book:act")
    assert [*wrong_world(execution)] == ["FAILED, but {'Book'} stand"]
    execution.status = "STUCK"
    execution.effects = []
    assert [*wrong_world(execution)] == ["STUCK, and {'Book'} stand unnamed"]
    LEDGER.keys.add((("act", "Book"), f"{execution.pk}:Other:act"))
    assert len([*wrong_keys(execution)]) == 1


def test_canary_an_error_of_recovery_is_no_good_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, names: Any) -> None:
        raise SagaError("no")

    monkeypatch.setattr(Definition, "require", refuse)
    assert judge(CASES[0], Memory())[0] == "raised"
