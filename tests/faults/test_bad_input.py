"""Battery 15: input that nobody should send: contexts, ids, rows edited by hand, forged jobs.

Whatever it is, only our own errors come out, nothing is written by half, and a sweep drives the
others all the same.
"""

from __future__ import annotations

import json
import pickle
import random
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.core.exceptions import PermissionDenied
from django.db import DatabaseError, connections
from django.db.backends.signals import connection_created
from django_rq import get_connection
from rq.exceptions import NoSuchJobError
from rq.job import Job

from django_saga import (
    Fallback,
    Retry,
    RetryLater,
    Saga,
    SagaContext,
    SagaError,
    SagaStepHandler,
    current_step,
    machine,
    operations,
    recover_saga,
    recovery,
    registry,
)
from django_saga import saga as saga_module
from django_saga.context import ContextCodec
from django_saga.models import SagaExecution
from django_saga.operations import executing, retrying
from django_saga.recovery import sweep
from django_saga.rq import ENTRY_POINT, SagaJob, run_saga
from django_saga.storage import DjangoSagaStorage, reading
from tests.faults.options import Size

pytestmark = pytest.mark.usefixtures("committing_databases")

NAME = "bad.Order"
PATIENCE = 200  # calls of handlers, in all cases together, for each case
OUR_ERRORS = (SagaError, PermissionDenied)
Dice = random.Random


# What is wrong with a value


class Raises:
    """Whatever is asked of it, it raises."""

    def __init__(self, *methods: str) -> None:
        self.__class__ = type("Raises", (Raises,), dict.fromkeys(methods, refuse))


def refuse(self: Any, *arguments: Any) -> Any:
    raise RuntimeError("ask somebody else")


class Unspeakable(Exception):
    __str__ = __repr__ = refuse  # type: ignore[assignment]


class EvilText(str):
    __eq__ = __hash__ = __str__ = __repr__ = refuse  # type: ignore[assignment]


class EvilNumber(int):
    __eq__ = __hash__ = __str__ = __repr__ = __lt__ = refuse  # type: ignore[assignment]


class EvilList(list[Any]):
    __iter__ = __len__ = __eq__ = __repr__ = refuse  # type: ignore[assignment]


class EvilDict(dict[str, Any]):
    keys = items = __iter__ = __len__ = __eq__ = __repr__ = refuse  # type: ignore[assignment]


def loop() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


WRONG: dict[str, Callable[[Dice], Any]] = {
    "nothing": lambda dice: None,
    "a number": lambda dice: dice.choice([0, -1, 10**400, 2**63, True]),
    "a float": lambda dice: dice.choice([0.5, float("nan"), float("inf"), -0.0]),
    "a text": lambda dice: dice.choice(["", "x", "NUL \x00", "\ud800", "\udfff", "\u2028"]),
    "bytes": lambda dice: dice.randbytes(dice.randrange(20)),
    "a huge text": lambda dice: "é" * 3_000,
    "a decimal": lambda dice: Decimal(dice.choice(["NaN", "sNaN", "1E+9999", "-0", "0.1"])),
    "an id": lambda dice: uuid.UUID(int=dice.getrandbits(128), version=4),
    "a moment": lambda dice: datetime(1, 1, 1, tzinfo=dice.choice([None, UTC])),
    "a span": lambda dice: dice.choice([timedelta.max, timedelta.min]),
    "a list": lambda dice: [value(dice) for _ in range(dice.randrange(3))],
    "a dict": lambda dice: {dice.choice(["a", "\ud800", ""]): value(dice)},
    "a dict of other keys": lambda dice: {dice.choice([1, None, (1,), b"x"]): value(dice)},
    "a set": lambda dice: {dice.choice([1, "a", None])},
    "a list in itself": lambda dice: loop(),
    "too deep": lambda dice: nested(dice.choice([50, 5_000])),
    "an object": lambda dice: object(),
    "a class": lambda dice: dice.choice([int, Raises, SagaContext]),
    "a function": lambda dice: refuse,
    "an exception": lambda dice: Unspeakable(),
    "an evil text": lambda dice: EvilText("x"),
    "an evil number": lambda dice: EvilNumber(7),
    "an evil list": lambda dice: EvilList([1]),
    "an evil dict": lambda dice: EvilDict(a=1),
    "raises when compared": lambda dice: Raises("__eq__"),
    "raises when told": lambda dice: Raises("__str__", "__repr__"),
    "raises when hashed": lambda dice: Raises("__hash__"),
    "raises when looked at": lambda dice: Raises("__getattr__", "__bool__", "__len__", "__iter__"),
    "raises at all": lambda dice: Raises(
        *("__eq__", "__ne__", "__str__", "__repr__", "__hash__", "__bool__", "__len__", "__iter__")
    ),
    "a line": lambda dice: Line(value(dice), value(dice)),
}


def value(dice: Dice) -> Any:
    return WRONG[dice.choice(list(WRONG))](dice)


@dataclass
class Line:
    sku: str
    price: Decimal = Decimal(1)


@dataclass
class Picky:
    """Refuses to come back."""

    number: int

    def __post_init__(self) -> None:
        if LEDGER.picky:
            raise Unspeakable


@dataclass
class Order(SagaContext):
    number: int = 0
    name: str = ""
    price: Decimal | None = None
    lines: list[Line] = field(default_factory=list)
    extra: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    picky: Picky = field(default_factory=lambda: Picky(1))


class OtherOrder(Order):
    pass


class Moody(Order):
    """Raises when a field is read that its class does not have as data."""

    @property
    def extra(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not now")

    @extra.setter
    def extra(self, given: Any) -> None:
        pass


# What is driven


@dataclass
class Ledger:
    """What was called, outside of every row."""

    calls: list[str] = field(default_factory=list)
    stands: set[str] = field(default_factory=set)
    spoil: dict[str, Callable[[Any], Any]] = field(default_factory=dict)  # by "act Pay"
    picky: bool = False
    patience: int = PATIENCE

    def call(self, context: Any) -> Any:
        step = current_step()
        call = f"{step.action} {step.step}"
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt("it goes on for ever")
        if self.spoil.get(call) is leave:
            raise KeyboardInterrupt
        self.calls.append(f"{step.saga_id} {call}")
        response = self.spoil[call](context) if call in self.spoil else None
        effect = f"{step.saga_id} {step.step}"
        (self.stands.add if step.action == "act" else self.stands.discard)(effect)
        return response


def leave(context: Any) -> None:
    """The process is interrupted here."""


LEDGER = Ledger()


class Step(SagaStepHandler[Order]):
    compensation_retry = Retry(attempts=1)

    def act(self, context: Order) -> Any:
        return LEDGER.call(context)

    def compensate(self, context: Order) -> Any:
        return LEDGER.call(context)


class Reserve(Step):
    pass


class Pay(Step):
    pass


class Owe(Step):
    pass


class Send(Step):
    pass


def build() -> type[Saga[Order]]:
    class Orders(Saga[Order]):
        name = NAME
        steps = [Reserve, Fallback(step=Pay, fallback=Owe), Send]

    return Orders


@pytest.fixture
def saga() -> Iterator[type[Saga[Order]]]:
    before = dict(registry._classes)
    yield build()
    registry._classes.clear()
    registry._classes.update(before)


def spare_the_disk(connection: Any, **kwargs: Any) -> None:
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA synchronous = OFF")  # nothing here depends on the disk


@pytest.fixture(params=django_settings.DATABASES)
def storage(
    request: pytest.FixtureRequest, settings: Any, caplog: pytest.LogCaptureFixture
) -> Iterator[DjangoSagaStorage]:
    settings.DJANGO_SAGA = {"INLINE_WAIT": 0, "CONTEXT_LIMIT": 2_000, "MAX_RECOVERIES": 1}
    caplog.set_level(100, "django_saga")
    caplog.set_level(100, "rq")
    connection_created.connect(spare_the_disk)
    connections[request.param].close()
    storage = DjangoSagaStorage(request.param)
    rows(storage).delete()
    yield storage
    connection_created.disconnect(spare_the_disk)
    rows(storage).delete()
    connections[request.param].close()


def rows(storage: DjangoSagaStorage) -> Any:
    return SagaExecution.objects.using(storage.alias).filter(saga__startswith="bad.")


@dataclass
class Judge:
    """Does what may raise our errors; any other is noted."""

    cases: int = 0
    foreign: list[str] = field(default_factory=list)

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The result, or our error."""
        try:
            return call()
        except OUR_ERRORS as error:
            return error
        except NoSuchJobError:
            raise  # a worker takes it for a job that has expired
        except BaseException as error:
            self.foreign.append(f"{what}: {type(error).__name__} {told(error)}")
            return error

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.foreign.append(what)


def told(result: Any) -> str:
    try:
        return str(result)[:200]
    except Exception:
        return "(it cannot even say what)"


# Contexts


def spoilt_context(dice: Dice) -> Any:
    """No context at all, or one of whose fields is wrong."""
    if dice.random() < 0.15:
        return dice.choice([Order, OtherOrder(), Moody(), value(dice)])
    context = Order()
    spoil(context, dice)
    return context


def spoil(context: Any, dice: Dice) -> None:
    name = dice.choice(list(Order.__dataclass_fields__))
    match dice.randrange(8):
        case 0:
            object.__delattr__(context, name)
        case 1:
            context.surplus = value(dice)
        case 2:
            context.lines.append(value(dice))
        case 3:
            context.__class__ = Moody
        case 4:
            LEDGER.picky = True
        case _:
            object.__setattr__(context, name, value(dice))


WAYS: dict[str, Callable[[Saga[Order], Any, uuid.UUID], Any]] = {
    "run": lambda saga, context, id: saga.run(context, saga_id=id),
    "arun": lambda saga, context, id: async_to_sync(saga.arun)(context, saga_id=id),
    "enqueue": lambda saga, context, id: saga.enqueue(context, saga_id=id),
    "transaction": lambda saga, context, id: list(saga.transaction(context, saga_id=id)),
}


def case_of_a_context(
    judge: Judge, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> None:
    """A context that cannot be stored starts nothing; one that can comes back."""
    id, way = uuid.UUID(int=dice.getrandbits(128), version=4), dice.choice(list(WAYS))
    context = spoilt_context(dice)
    came = judge.attempt(way, lambda: WAYS[way](saga(storage=storage), context, id))
    LEDGER.picky = False
    row = rows(storage).filter(pk=id).first()
    if isinstance(came, Exception):
        judge.expect(row is None, f"{way} raised {told(came)} and stored {row}")
        judge.expect(not LEDGER.calls, f"{way} raised {told(came)} and called {LEDGER.calls}")
    else:
        judge.expect(row.status == "COMPLETED", f"{way} left {row.status}")
        judge.attempt("context_of", lambda: saga.context_of(row))


def case_of_a_handler(
    judge: Judge, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> None:
    """A handler spoils the context, or raises the unspeakable; all is undone, or told as stuck."""
    id, way = uuid.UUID(int=dice.getrandbits(128), version=4), dice.choice(list(WAYS))

    def go_wrong(context: Any) -> Any:
        if dice.random() < 0.3:
            raise dice.choice([Unspeakable(), ExceptionGroup("x", [Unspeakable()])])
        spoil(context, dice)
        return value(dice)

    call = dice.choice(["act Reserve", "act Pay", "act Owe", "act Send", "compensate Reserve"])
    LEDGER.spoil[call] = go_wrong
    if call.startswith("compensate"):
        LEDGER.spoil["act Send"] = go_wrong
    if call == "act Owe":
        LEDGER.spoil["act Pay"] = fail
    came = judge_step(judge, way, lambda: WAYS[way](saga(storage=storage), Order(), id))
    if rows(storage).get(pk=id).is_active:
        make_due(storage, id)
        came = judge.attempt("recover_saga", lambda: recover_saga(id, storage=storage))
    LEDGER.picky = False
    row = rows(storage).get(pk=id)
    stands = {effect.partition(" ")[2] for effect in LEDGER.stands}
    named = {effect.step for effect in machine.standing(row.state)}
    what = f"{way}, {call}: {row.status} after {told(came)}, {stands} stand"
    judge.expect(not row.is_active, what)
    judge.expect(stands <= named, what)


def fail(context: Any) -> None:
    raise RuntimeError("told to")


def judge_step(judge: Judge, what: str, call: Callable[[], Any]) -> Any:
    """As Judge.attempt; the iteration of a transaction raises the step's own error."""
    try:
        return call()
    except (*OUR_ERRORS, Unspeakable, ExceptionGroup) as error:
        return error
    except BaseException as error:
        judge.foreign.append(f"{what}: {type(error).__name__} {told(error)}")
        return error


# Ids


def spoilt_id(dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage) -> Any:
    id = str(uuid.UUID(int=dice.getrandbits(128), version=4))
    choices: list[Callable[[], Any]] = [
        lambda: value(dice),
        lambda: id,
        lambda: id.upper(),
        lambda: f" {id} ",
        lambda: f"{{{id}}}",
        lambda: id.encode(),
        lambda: id[:-1],
        lambda: id[:-1] + dice.choice("\x00\ud800g\u0661"),
        lambda: "-" * 40,
        lambda: "x" * 1_000_000,
        lambda: other_id(storage),
        lambda: str(other_id(storage)),
    ]
    return dice.choice(choices)()


def other_id(storage: DjangoSagaStorage) -> uuid.UUID:
    """Of another saga's execution."""
    return Saga(steps=[Send], name="bad.Other", storage=storage).run(Order()).pk


USES: dict[str, Callable[[Any, Any, DjangoSagaStorage], Any]] = {
    "run": lambda saga, id, storage: saga.run(Order(), saga_id=id),
    "arun": lambda saga, id, storage: async_to_sync(saga.arun)(Order(), saga_id=id),
    "enqueue": lambda saga, id, storage: saga.enqueue(Order(), saga_id=id),
    "transaction": lambda saga, id, storage: list(saga.transaction(Order(), saga_id=id)),
    "recover_saga": lambda saga, id, storage: recover_saga(id, storage=storage),
    "operations.retry": lambda saga, id, storage: operations.retry(id, storage=storage),
    "operations.recover": lambda saga, id, storage: operations.recover(id, storage=storage),
    "run_saga": lambda saga, id, storage: run_saga(id),
}


def case_of_an_id(
    judge: Judge, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> None:
    """It starts one new execution, or it is refused and nothing is written."""
    id, use = spoilt_id(dice, saga, storage), dice.choice(list(USES))
    LEDGER.calls.clear()
    before = rows(storage).count()
    came = judge.attempt(use, lambda: USES[use](saga(storage=storage), id, storage))
    new = rows(storage).count() - before
    if isinstance(came, Exception):
        judge.expect(not new and not LEDGER.calls, f"{use} raised {told(came)} and went on")
    elif use in WAYS:
        judge.expect(new == 1 and len(LEDGER.calls) == 3, f"{use} stored {new}")


def case_of_a_delay(
    judge: Judge, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> None:
    """It is refused, and nothing is changed."""
    id, delay = begin(dice, saga, storage), value(dice)
    uses: dict[str, Callable[[], Any]] = {
        "enqueue": lambda: saga(storage=storage).enqueue(Order(), delay=delay),
        "retry": lambda: operations.retry(id, delay=delay, storage=storage),
    }
    use = dice.choice(list(uses))
    before = rows(storage).count(), rows(storage).get(pk=id).status
    came = judge.attempt(f"{use} with a delay", uses[use])
    after = rows(storage).count(), rows(storage).get(pk=id).status
    judge.expect(before == after or not isinstance(came, Exception), f"{use} raised {told(came)}")


# Rows that were edited by hand

DEEP = json.dumps(nested(900))
TEXTS = ["", "nonsense", "act", "compensate", "Reserve", "Pay", "Owe", "Send", "x" * 90, "\u2028"]
JSONS = [
    *("null", "{}", "[]", "[[]]", "7", '"x"', "[[1]]", "[null]", '[["Nope"]]', DEEP),
    *('[["Reserve"],["Reserve"]]', '[["Send"],["Pay","Owe"],["Reserve"]]', '[["Pay","Pay"]]'),
    *('[["Reserve"],[]]', '[["Reserve","DONE"]]', '[["Reserve","DONE",null]]'),
    *('[["Nope","DONE",null]]', '[["Reserve","DONE","DONE"]]', '[["Reserve","Splendid",null]]'),
    *('[["Reserve","DONE",null],["Reserve","DONE",null]]', '[["Send","FAILED","UNKNOWN"]]'),
]
CONTEXTS = [
    "",
    "{",
    "null",
    "[]",
    '{"number": "x"}',
    '{"number": 1e999}',
    '{"lines": [1]}',
    "\u2028",
]
NUMBERS = [0, 1, 2, 7, 2**31 - 1, 2**63 - 1, -1, "abc", 0.5, None]
MOMENTS = [
    *("0001-01-01 00:00:00+00:00", "9999-12-31 23:59:59+00:00", "2020-01-01 00:00:00"),
    *("infinity", "-infinity", "garbage", "", None, "20000-01-01 00:00:00"),
]
NONSENSE: dict[str, list[Any]] = {
    "saga": [*TEXTS, "bad.Other", "bad.Nobody"],
    "plan": JSONS,
    "effects": JSONS,
    "initial_context": CONTEXTS,
    "context": CONTEXTS,
    "fallback_context": [*CONTEXTS, None],
    "status": [*TEXTS, "PENDING", "RUNNING", "COMPENSATING", "COMPLETED", "FAILED", "STUCK"],
    "step": TEXTS,
    "action": TEXTS,
    "attempt": NUMBERS,
    "failures": NUMBERS,
    "recoveries": NUMBERS,
    "in_flight": [True, False, 7, "abc", None],
    "atomic": [True, False, 7, "abc", None],
    "failed_step": TEXTS,
    "error_type": TEXTS,
    "error_message": TEXTS,
    "stuck_reason": TEXTS,
    "failure_group": TEXTS,
    "cancel_reason": TEXTS,
    "settled_at": MOMENTS,
    "blanked_at": MOMENTS,
    "limit_key": TEXTS,
    "slot": NUMBERS,
    "token": NUMBERS,
    "driver": TEXTS,
    "lease_until": MOMENTS,
    "wake_at": MOMENTS,
    "grace_until": MOMENTS,
    "created_at": MOMENTS,
    "updated_at": MOMENTS,
    "finished_at": MOMENTS,
}


def test_every_column_is_edited() -> None:
    columns = {column.column for column in SagaExecution._meta.concrete_fields}
    assert {*NONSENSE} == columns - {"id", "retry_of_id"}


def wait_long(context: Any) -> None:
    raise RetryLater(1000)


BEGINNINGS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "interrupted": {"act Pay": leave},
    "interrupted at first": {"act Reserve": leave},
    "interrupted in a fallback": {"act Pay": fail, "act Owe": leave},
    "waiting": {"act Pay": wait_long},
    "compensating": {"act Send": fail, "compensate Pay": leave},
    "stuck": {"act Send": fail, "compensate Pay": fail},
    "failed": {"act Send": fail},
    "completed": {},
}


def begin(dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage) -> uuid.UUID:
    """An execution somewhere on its way, that is due if it is active."""
    id = uuid.UUID(int=dice.getrandbits(128), version=4)
    LEDGER.spoil = dict(BEGINNINGS[dice.choice(list(BEGINNINGS))])
    with suppress(SagaError, KeyboardInterrupt):
        saga(storage=storage).run(Order(), saga_id=id)
    LEDGER.spoil = {}
    make_due(storage, id)
    return id


def make_due(storage: DjangoSagaStorage, id: uuid.UUID) -> None:
    rows(storage).filter(pk=id).update(lease_until=None, wake_at=None, grace_until=None)


def edit(storage: DjangoSagaStorage, id: uuid.UUID, column: str, nonsense: Any) -> bool:
    """By hand, with the database's own words; False where the database refuses."""
    connection = connections[storage.alias]
    key = SagaExecution._meta.pk.get_db_prep_value(id, connection)
    statement = f"UPDATE {SagaExecution._meta.db_table} SET {column} = %s WHERE id = %s"
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, [nonsense, key])
            return bool(cursor.rowcount == 1)
    except (DatabaseError, OverflowError, ValueError):
        return False


DEALINGS: dict[str, Callable[[Any, uuid.UUID, DjangoSagaStorage], Any]] = {
    "recover_saga": lambda saga, id, storage: recover_saga(id, storage=storage),
    "run": lambda saga, id, storage: saga(storage=storage).run(Order(), saga_id=id),
    "enqueue": lambda saga, id, storage: saga(storage=storage).enqueue(Order(), saga_id=id),
    "retry": lambda saga, id, storage: operations.retry(id, storage=storage),
    "recover": lambda saga, id, storage: operations.recover(id, storage=storage),
    "sweep": lambda saga, id, storage: list(sweep(storage=storage)),
    "history": lambda saga, id, storage: storage.history(id),
}


def case_of_a_row(
    judge: Judge, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> None:
    """An edit that the database takes; then all that can be done with it, beside a sound one."""
    id = begin(dice, saga, storage)
    column = dice.choice(list(NONSENSE))
    nonsense = dice.choice(NONSENSE[column])
    while not edit(storage, id, column, nonsense):
        column = dice.choice(list(NONSENSE))
        nonsense = dice.choice(NONSENSE[column])
    what = f"{column} = {nonsense!r:.60}"
    LEDGER.calls.clear()
    well = uuid.UUID(int=dice.getrandbits(128), version=4)
    saga(storage=storage).enqueue(Order(), saga_id=well, delay=1000)
    make_due(storage, well)
    swept = judge.attempt(f"the sweep, {what}", lambda: list(sweep(storage=storage)))
    for recovered in swept if isinstance(swept, list) else []:
        sound = not recovered.error or recovered.status not in machine.ACTIVE
        judge.expect(sound, f"the sweep met {recovered}, {what}")
    status = rows(storage).filter(pk=well).values_list("status", flat=True).get()
    judge.expect(status == "COMPLETED", f"the neighbour is {status}, {what}")
    for way in dice.sample(list(DEALINGS), 3):
        judge.attempt(f"{way}, {what}", lambda way=way: DEALINGS[way](saga, id, storage))
        edit(storage, id, "lease_until", None)
    judge.expect(LEDGER.patience >= 0, f"it went on for ever, {what}")
    for row in (id, well):
        judge.expect(bool(count_of(storage, row)), f"a row is gone, {what}")
        forget(storage, row)


def count_of(storage: DjangoSagaStorage, id: uuid.UUID) -> int:
    return int(SagaExecution.objects.using(storage.alias).filter(pk=id).count())


def forget(storage: DjangoSagaStorage, id: uuid.UUID) -> None:
    connection = connections[storage.alias]
    key = SagaExecution._meta.pk.get_db_prep_value(id, connection)
    table = SagaExecution._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM django_saga_sagasteprecord WHERE execution_id = %s", [key])
        cursor.execute(f"UPDATE {table} SET retry_of_id = NULL WHERE retry_of_id = %s", [key])
        cursor.execute(f"DELETE FROM {table} WHERE id = %s", [key])


# Jobs


def forged_data(dice: Dice) -> Any:
    id: Any = str(uuid.UUID(int=dice.getrandbits(128), version=4))
    parts = [
        dice.choice([ENTRY_POINT, ENTRY_POINT, "os.system", "", None, 7, NEIGHBOUR]),
        dice.choice([None, None, "x", {}, []]),
        dice.choice([[id], [id], [id, id], [], {}, None, [None], [[id]], [id.upper()], id, [True]]),
        dice.choice([{}, {}, {"x": 1}, None, [], 7]),
    ]
    return parts[: dice.choice([4, 4, 4, 4, 3, 0])]


def forged_job(dice: Dice) -> dict[Any, Any]:
    call = json.dumps(forged_data(dice)).encode()
    data = [
        call,
        call,
        call,
        zlib.compress(call),
        pickle.dumps(forged_data(dice)),
        b"",
        b"\xff\x00",
    ]
    data += [b"[" * 5_000, b"null", b"NaN", call + b" ", b"{}" * 3, dice.randbytes(30)]
    fields: dict[Any, Any] = {b"data": dice.choice(data), b"origin": b"sagas"}
    for _ in range(dice.randrange(3)):
        name = dice.choice(JOB_FIELDS)
        odd = [
            b"",
            b"\xff",
            b"7",
            b"null",
            b"{}",
            b"[]",
            b"yesterday",
            pickle.dumps(7),
            b"x" * 9_999,
        ]
        fields[name.encode()] = dice.choice(odd)
    if dice.random() < 0.1:
        del fields[dice.choice(list(fields))]
    return fields


NEIGHBOUR = "django_saga.rq.sweep_sagas"
JOB_FIELDS = (
    *("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat", "status", "meta"),
    *("timeout", "result_ttl", "failure_ttl", "ttl", "worker_name", "description", "origin"),
    *("success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks"),
    *("dependency_id", "dependency_ids", "retries_left", "repeats_left", "group_id", "exc_info"),
)


def case_of_a_job(
    judge: Judge, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> None:
    """Read as a worker reads it, and performed: refused with our error, or one of ours."""
    job = SagaJob(f"forged-{dice.getrandbits(64):x}", connection=get_connection("default"))
    fields = forged_job(dice)
    before = rows(storage).count()
    try:
        judge.attempt(f"restore {fields!r:.300}", lambda: job.restore(fields))
    except NoSuchJobError:
        return judge.expect(b"data" not in fields, f"no such job: {fields!r:.300}")
    judge.attempt(f"perform {fields!r:.300}", job.perform)
    quiet = rows(storage).count() == before and not LEDGER.calls
    return judge.expect(quiet, f"a forged job did something: {fields!r:.300}")


# The battery

Case = Callable[[Judge, Dice, type[Saga[Order]], DjangoSagaStorage], None]
CASES: dict[str, Case] = {
    "contexts": case_of_a_context,
    "handlers": case_of_a_handler,
    "ids": case_of_an_id,
    "delays": case_of_a_delay,
    "rows": case_of_a_row,
    "jobs": case_of_a_job,
}


def play(
    case: Case, count: int, dice: Dice, saga: type[Saga[Order]], storage: DjangoSagaStorage
) -> Judge:
    judge = Judge()
    for _ in range(count):
        LEDGER.__init__()  # type: ignore[misc]
        case(judge, dice, saga, storage)
        judge.cases += 1
    return judge


@pytest.mark.parametrize("kind", CASES)
def test_bad_input_brings_out_our_errors_alone_and_nothing_by_half(
    kind: str,
    saga: type[Saga[Order]],
    storage: DjangoSagaStorage,
    dice: Dice,
    size: Size,
    figure: Callable[..., None],
) -> None:
    share = len(CASES) * len(django_settings.DATABASES)
    count = -(-size("bad_input", everyday=500, full_run=10_000) // share)
    judge = play(CASES[kind], count, dice, saga, storage)
    figure("bad input", cases=judge.cases, foreign_errors=len(judge.foreign))
    assert not judge.foreign, "\n".join(judge.foreign[:20])


# Canaries: with a rule of the product's switched off, the judge must see it


def store_unproven(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        ContextCodec,
        "encode",
        lambda self, context, limit: msgspec.json.encode(context).decode(),
    )


def let_the_salvage_raise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ContextCodec, "salvage", lambda self, context, *rest, **kw: {}[context])


def take_any_id(patch: pytest.MonkeyPatch) -> None:
    for module in (saga_module, recovery, executing):
        patch.setattr(module, "_uuid", lambda id: uuid.UUID(id) if isinstance(id, str) else id)


def take_any_delay(patch: pytest.MonkeyPatch) -> None:
    for module in (saga_module, retrying):
        patch.setattr(module, "_delay", lambda seconds, what: seconds)


def trust_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "flaw", lambda state: "")


def stop_at_what_cannot_be_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reading, "claim_of", lambda row: row.state and read(row))


read = reading.claim_of


def trust_jobs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SagaJob, "restore", Job.restore)


@pytest.mark.parametrize("storage", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "rule_off"),
    [
        ("contexts", store_unproven),
        ("handlers", let_the_salvage_raise),
        ("ids", take_any_id),
        ("delays", take_any_delay),
        ("rows", trust_rows),
        ("rows", stop_at_what_cannot_be_read),
        ("jobs", trust_jobs),
    ],
)
def test_canary_a_rule_that_is_off_is_seen(
    kind: str,
    rule_off: Callable[[pytest.MonkeyPatch], None],
    saga: type[Saga[Order]],
    storage: DjangoSagaStorage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = 100 if kind == "rows" else 60
    assert play(CASES[kind], count, Dice(0), saga, storage).foreign == []
    rule_off(monkeypatch)
    assert play(CASES[kind], count, Dice(0), saga, storage).foreign
