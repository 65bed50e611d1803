"""What a context may hold, how it comes back, and what is said of what cannot be stored."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_saga import InvalidContext, InvalidDefinition, SagaContext
from django_saga.context import ContextCodec

LIMIT = 1_000_000
ID = UUID("12345678-1234-5678-1234-567812345678")
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


class Colour(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    SMALL = 1


class Kind(enum.StrEnum):
    GIFT = "gift"


@dataclass
class Line:
    sku: str
    price: Decimal
    at: datetime | None = None


def codec_of(**fields: Any) -> ContextCodec[Any]:
    return ContextCodec(make_dataclass("Made", list(fields.items()), bases=(SagaContext,)))


def there_and_back(kind: Any, value: Any) -> Any:
    codec = codec_of(value=kind)
    context = codec.context_type(value)
    return codec.decode(codec.encode(context, limit=LIMIT)).value


VALUES: list[tuple[Any, Any]] = [
    (int, 0),
    (int, -(2**63)),
    (int, 2**64),
    (int, 10**40),
    (float, 0.1),
    (float, -0.0),
    (float, 5e-324),
    (float, 1.7976931348623157e308),
    (bool, True),
    (str, ""),
    (str, "naïve \u2028 \U0001f600"),
    (str, "a NUL \x00 inside"),
    (str | None, None),
    (str | None, "text"),
    (Decimal, Decimal("0.10")),
    (Decimal, Decimal("-1E+30")),
    (Decimal, Decimal("123456789012345678901234567890.123456789")),
    (UUID, ID),
    (UUID | None, None),
    (UUID | None, ID),
    (date, date(1, 1, 1)),
    (datetime, MOMENT),
    (datetime, datetime(2026, 1, 2, 3, 4, 5, 1)),
    (datetime, datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))),
    (datetime, datetime.max),
    (time, time(1, 2, 3, 4)),
    (timedelta, timedelta(microseconds=1)),
    (timedelta, timedelta(days=-1, microseconds=-1)),
    (timedelta, timedelta.max),
    (timedelta, timedelta.min),
    (Colour, Colour.RED),
    (Size, Size.SMALL),
    (Kind, Kind.GIFT),
    (bytes, b"\x00\xff"),
    (bytearray, bytearray(b"\x00\xff")),
    (set[int], {3, 1, 2}),
    (set[UUID], {ID}),
    (frozenset[str], frozenset({"a"})),
    (tuple[int, str], (1, "a")),
    (tuple[date, ...], (date(2026, 1, 1), date(2026, 1, 2))),
    (list[tuple[Decimal, bytes]], [(Decimal("1.0"), b"x")]),
    (dict[int, str], {1: "a", -2: "b"}),
    (dict[UUID, Decimal], {ID: Decimal("1.50")}),
    (dict[date, set[int]], {date(2026, 1, 1): {1}}),
    (dict[Colour, Line], {Colour.RED: Line("a", Decimal("1.00"), MOMENT)}),
    (dict[str, dict[str, list[int]]], {"": {"a.b": [1]}}),
    (Line, Line("a", Decimal("9.99"))),
    (Line | None, None),
    (list[Line], [Line("a", Decimal("0.00"), MOMENT), Line("b", Decimal(1))]),
    (Any, {"a": [1, 2.5, None, True, "x"]}),
]


def kinds(value: Any) -> Any:
    """The types of a value and of all that is in it."""
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    elif isinstance(value, Line):
        inside = [value.sku, value.price, value.at]
    return type(value), [kinds(item) for item in inside]


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=lambda value: repr(value)[:40])
def test_a_value_comes_back_equal_and_with_its_types(kind: Any, value: Any) -> None:
    back = there_and_back(kind, value)
    assert back == value
    assert kinds(back) == kinds(value)
    assert math.copysign(1, back) == math.copysign(1, value) if kind is float else True


def test_a_local_time_comes_back_as_the_same_moment_even_when_clocks_go_back() -> None:
    """Python calls such a time unequal to every other; that is no reason to refuse it."""
    ambiguous = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))
    back = there_and_back(datetime, ambiguous)
    assert back.astimezone(UTC) == ambiguous.astimezone(UTC)
    assert back.utcoffset() == timedelta(hours=1)


def test_a_decimal_nan_comes_back() -> None:
    assert there_and_back(Decimal, Decimal("NaN")).is_nan()


BAD: list[tuple[Any, Any]] = [
    (float, math.nan),
    (float, math.inf),
    (float | None, math.nan),
    (list[float | None], [1.0, -math.inf]),
    (dict[str, float | None], {"a": math.nan}),
    (Any, math.nan),
    (str, "\ud800"),
    (list[str], ["fine", "\udfff"]),
    (dict[str, int], {"\ud800": 1}),
    (str, 5),
    (str, None),
    (str, b"x"),
    (str, ID),
    (str, MOMENT),
    (str, Decimal(1)),
    (str, Colour.RED),
    (int, "5"),
    (int, True),
    (int, 1.0),
    (int, None),
    (bool, 1),
    (float, Decimal("1.5")),
    (Decimal, "1.5"),
    (Decimal, 0.1),
    (UUID, str(ID)),
    (UUID | None, str(ID)),
    (date, MOMENT),
    (datetime, date(2026, 1, 1)),
    (datetime, "2026-01-02T03:04:05Z"),
    (timedelta, "PT1S"),
    (timedelta, 5),
    (Colour, "red"),
    (Colour, "blue"),
    (set[int], [1]),
    (list[int], (1, 2)),
    (tuple[int, ...], [1]),
    (tuple[int, str], (1,)),
    (list[UUID], [ID, str(ID)]),
    (set[UUID], {str(ID)}),
    (frozenset[str], frozenset({ID})),
    (dict[UUID, int], {str(ID): 1}),
    (dict[str, Any], {"a": {"b": ID}}),
    (Any, Decimal(1)),
    (Any, (1, 2)),
    (Any, {1: "a"}),
    (Line, {"sku": "a", "price": "1"}),
    (Line, Line("a", "1.0")),  # type: ignore[arg-type]
    (Line, Line("a", Decimal(1), "now")),  # type: ignore[arg-type]
    (Any, object),
    (Any, len),
    (Any, 1j),
    (dict[str, Any], {"a": object}),
]


@pytest.mark.parametrize(("kind", "value"), BAD, ids=lambda value: repr(value)[:40])
def test_what_would_not_come_back_is_refused_and_its_field_named(kind: Any, value: Any) -> None:
    codec = codec_of(first=int, culprit=kind, last=str)
    context = codec.context_type(1, value, "x")
    with pytest.raises(InvalidContext, match=r"field 'culprit' \(a .*\) cannot be stored") as error:
        codec.encode(context, limit=LIMIT)
    assert "'first'" not in str(error.value)


def test_a_value_that_holds_itself_is_refused_and_its_field_named() -> None:
    codec = codec_of(fine=int, culprit=Any)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidContext, match="'culprit'"):
        codec.encode(codec.context_type(1, loop), limit=LIMIT)


def test_a_field_that_a_handler_deleted_is_named() -> None:
    codec = codec_of(fine=int, culprit=int)
    context = codec.context_type(1, 2)
    del context.culprit
    with pytest.raises(InvalidContext, match="'culprit', which is missing"):
        codec.encode(context, limit=LIMIT)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even a message")


def test_an_error_that_cannot_say_what_is_wrong_does_not_hide_the_field() -> None:
    @dataclass
    class Sulking:
        number: int

        def __post_init__(self) -> None:
            if self.number < 0:
                raise Unspeakable

    codec = codec_of(fine=int, culprit=Sulking)
    context = codec.context_type(1, Sulking(1))
    context.culprit.number = -1
    with pytest.raises(InvalidContext, match=r"'culprit'.*no message: its __str__ raised"):
        codec.encode(context, limit=LIMIT)
    with pytest.raises(InvalidContext, match="no message: its __str__ raised"):
        codec.decode('{"fine": 1, "culprit": {"number": -1}}')


def test_a_field_that_raises_when_it_is_read_is_named_and_keeps_its_stored_value() -> None:
    @dataclass
    class Sulking(SagaContext):
        fine: int = 0
        culprit: int = 0

    codec = ContextCodec(Sulking)
    stored = codec.encode(Sulking(1, 2), limit=LIMIT)
    context = Sulking(3, 4)
    del context.culprit
    Sulking.culprit = property(lambda self: 1 / 0)  # type: ignore[assignment]
    with pytest.raises(InvalidContext, match="'culprit', which cannot be read"):
        codec.encode(context, limit=LIMIT)
    del Sulking.culprit
    context.culprit = [object()]  # type: ignore[assignment]
    assert codec.salvage(context, stored, limit=LIMIT) == '{"fine":3,"culprit":2}'


def test_what_was_stored_is_kept_where_it_no_longer_decodes() -> None:
    codec = codec_of(number=int)
    assert codec.salvage(codec.context_type(1), '{"number": "x"}', limit=LIMIT) == '{"number": "x"}'


def test_a_huge_value_is_not_repeated_in_the_message() -> None:
    codec = codec_of(culprit=UUID)
    with pytest.raises(InvalidContext) as error:
        codec.encode(codec.context_type("x" * 10_000), limit=LIMIT)
    assert len(str(error.value)) < 1_000


@dataclass
class Order(SagaContext):
    order_id: int
    note: str = ""
    total: Decimal | None = None


@dataclass
class SpecialOrder(Order):
    extra: str = "would be lost"


@pytest.mark.parametrize("wrong", [None, {"order_id": 1}, Line("a", Decimal(1)), SpecialOrder(1)])
def test_a_context_of_another_class_is_refused(wrong: Any) -> None:
    """A subclass too: it would come back without what it adds."""
    with pytest.raises(InvalidContext, match=f"Expected a Order, got {type(wrong).__name__}"):
        ContextCodec(Order).encode(wrong, limit=LIMIT)


def test_a_class_that_is_no_dataclass_is_refused_with_what_to_do() -> None:
    class Plain(SagaContext):
        pass

    with pytest.raises(InvalidDefinition, match=r"The context \S+Plain is not.*@dataclass"):
        ContextCodec(Plain)


def test_a_class_that_only_inherits_from_a_dataclass_is_refused_too() -> None:
    """Its own field would not be stored, and be missing after a crash."""

    class Heir(Order):
        gift: str = ""

    with pytest.raises(InvalidDefinition, match=r"Heir is not a dataclass"):
        ContextCodec(Heir)


def test_a_class_with_a_field_that_never_could_be_stored_is_refused() -> None:
    with pytest.raises(InvalidDefinition, match="Made has a field that cannot be stored"):
        codec_of(value=UUID | date)  # both are text in JSON


# Size


def test_the_limit_counts_bytes_and_the_largest_field_is_named() -> None:
    codec = ContextCodec(Order)
    context = Order(1, note="é" * 100)
    size = len(codec.encode(context, limit=LIMIT).encode())
    assert size > 200
    assert codec.encode(context, limit=size)
    with pytest.raises(InvalidContext, match=rf"takes {size} bytes.*CONTEXT_LIMIT.*'note'"):
        codec.encode(context, limit=size - 1)


# A stored context and a class that has changed


def test_a_field_added_with_a_default_is_filled_in_and_one_removed_is_dropped() -> None:
    assert ContextCodec(Order).decode('{"order_id": 1, "gone": [1]}') == Order(1)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("{}", "order_id"),
        ('{"order_id": "one"}', "order_id"),
        ('{"order_id": null}', "order_id"),
        ('{"order_id": 1, "total": "much"}', "total"),
        ('{"order_id": 1, "note": 5}', "note"),
        ('{"order_id": 1', ""),
        ("", ""),
        ("[]", ""),
        ("null", ""),
    ],
)
def test_a_stored_context_that_no_longer_fits_names_the_field(stored: str, name: str) -> None:
    with pytest.raises(InvalidContext, match="no longer fits Order") as error:
        ContextCodec(Order).decode(stored)
    assert name in str(error.value)


def test_a_field_of_a_nested_class_is_named_with_its_path() -> None:
    with pytest.raises(InvalidContext, match=r"\$\.lines\[1\]\.price"):
        codec_of(lines=list[Line]).decode(
            '{"lines": [{"sku": "a", "price": "1"}, {"sku": "b", "price": "x"}]}'
        )


@dataclass
class Strict(SagaContext):
    """Refuses values in its own ways."""

    amount: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        if self.amount < 0:
            raise ValueError("amount below zero")
        if self.amount == 13:
            raise KeyError("thirteen")


@pytest.mark.parametrize(("amount", "why"), [(-1, "below zero"), (13, "thirteen")])
def test_a_context_that_refuses_itself_is_an_invalid_context(amount: int, why: str) -> None:
    """Whatever it raises: recovery must see that this context is lost, not stumble over it."""
    codec = ContextCodec(Strict)
    context = Strict()
    context.amount = amount
    with pytest.raises(InvalidContext, match=why):
        codec.encode(context, limit=LIMIT)
    with pytest.raises(InvalidContext, match=why):
        codec.decode(f'{{"amount": {amount}}}')


# Restoring and salvaging


def test_restoring_gives_a_live_context_its_stored_values_again() -> None:
    codec = ContextCodec(Order)
    context = Order(1, note="before", total=Decimal(1))
    stored = codec.encode(context, limit=LIMIT)
    context.note, context.total = "after", None
    alias = context
    codec.restore(context, stored)
    assert alias == Order(1, "before", Decimal(1))


def test_restoring_brings_a_deleted_field_back() -> None:
    context = Order(1, note="before")
    del context.note
    ContextCodec(Order).restore(context, '{"order_id": 1, "note": "stored"}')
    assert context.note == "stored"


def test_a_frozen_context_can_be_restored() -> None:
    @dataclass(frozen=True)
    class Frozen(SagaContext):
        items: list[str]

    context = Frozen(["a", "b"])
    ContextCodec(Frozen).restore(context, '{"items": ["a"]}')
    assert context.items == ["a"]


def test_a_field_outside_of_init_is_stored_and_restored_like_any_other() -> None:
    @dataclass
    class Counting(SagaContext):
        order_id: int
        seen: list[str] = field(default_factory=list, init=False)

    codec = ContextCodec(Counting)
    context = Counting(1)
    context.seen.append("a")
    stored = codec.encode(context, limit=LIMIT)
    assert codec.decode(stored).seen == ["a"]
    context.seen.append("b")
    codec.restore(context, stored)
    assert context.seen == ["a"]
    context.seen = [5]  # type: ignore[list-item]
    with pytest.raises(InvalidContext, match="'seen'"):
        codec.encode(context, limit=LIMIT)
    assert codec.decode(codec.salvage(context, stored, limit=LIMIT)).seen == ["a"]


def test_salvaging_keeps_what_can_be_stored_and_gives_the_rest_its_stored_value() -> None:
    codec = ContextCodec(Order)
    stored = codec.encode(Order(1, note="before", total=Decimal(1)), limit=LIMIT)
    context = Order(2, note="\ud800", total=Decimal(2))
    salvaged = codec.decode(codec.salvage(context, stored, limit=LIMIT))
    assert salvaged == Order(2, "before", Decimal(2))
    assert context == salvaged, "the live context is what was stored, too"


def test_salvaging_drops_the_field_that_is_too_large() -> None:
    codec = ContextCodec(Order)
    stored = codec.encode(Order(1, note="before"), limit=LIMIT)
    context = Order(2, note="x" * 1_000, total=Decimal(2))
    salvaged = codec.salvage(context, stored, limit=100)
    assert codec.decode(salvaged) == Order(2, "before", Decimal(2))
    assert len(salvaged) <= 100


def test_salvaging_survives_a_deleted_field_and_a_context_that_refuses_itself() -> None:
    context = Order(2, note="after")
    del context.order_id
    codec: ContextCodec[Any] = ContextCodec(Order)
    salvaged = codec.decode(codec.salvage(context, '{"order_id": 1}', limit=LIMIT))
    assert salvaged == context == Order(1, "after")
    strict = Strict(1, "kept")
    strict.amount = -1
    codec = ContextCodec(Strict)
    salvaged = codec.decode(codec.salvage(strict, '{"amount": 7}', limit=LIMIT))
    assert salvaged == Strict(7, "kept")
    assert strict.amount == 7


def test_salvaging_where_the_limit_was_lowered_keeps_the_stored_context() -> None:
    stored = '{"order_id": 1, "note": "stored when contexts might be larger"}'
    context = Order(1, note="\ud800")
    kept = ContextCodec(Order).salvage(context, stored, limit=10)
    assert ContextCodec(Order).decode(kept) == ContextCodec(Order).decode(stored)


def test_an_init_only_argument_is_refused_since_no_context_has_it_to_store() -> None:
    @dataclass
    class Seeded(SagaContext):
        seed: InitVar[int] = 0
        number: int = 0

        def __post_init__(self, seed: int) -> None:
            self.number = self.number or seed

    with pytest.raises(InvalidDefinition):
        ContextCodec(Seeded)


# Whatever a handler may leave


def stored_or_refused(kind: Any, value: Any) -> None:
    codec = codec_of(fine=int, culprit=kind)
    context = codec.context_type(1, value)
    stored, message = "", ""
    try:
        stored = codec.encode(context, limit=LIMIT)
    except InvalidContext as error:
        message = str(error)
    if not stored:
        assert "'culprit'" in message
        return
    stored.encode()  # every database takes it
    assert "\x00" not in stored
    back = codec.decode(stored)
    assert back == context
    assert kinds(back.culprit) == kinds(value)
    again = codec.context_type(0, None)
    codec.restore(again, stored)
    assert again == context


anything = settings(max_examples=200, deadline=None, database=None)
hostile = st.text(st.characters(exclude_categories=())) | st.sampled_from(["\x00", "\ud83d\ude00"])


@anything
@given(st.recursive(hostile, lambda inner: st.dictionaries(hostile, inner)))
def test_any_text_is_stored_as_it_is_or_refused_with_its_field(value: Any) -> None:
    stored_or_refused(Any, value)


@anything
@given(
    st.one_of(
        st.tuples(st.just(int), st.integers()),
        st.tuples(st.just(float), st.floats()),
        st.tuples(st.just(float | None), st.floats()),
        st.tuples(st.just(Decimal), st.decimals(allow_nan=False)),
        st.tuples(st.just(int), st.floats()),
        st.tuples(st.just(float), st.decimals()),
    )
)
def test_any_number_is_stored_as_it_is_or_refused_with_its_field(pair: tuple[Any, Any]) -> None:
    stored_or_refused(*pair)


@anything
@given(
    st.one_of(
        st.tuples(st.just(datetime), st.datetimes()),
        st.tuples(st.just(datetime), st.datetimes(timezones=st.just(UTC))),
        st.tuples(st.just(timedelta), st.timedeltas()),
        st.tuples(st.just(date), st.dates()),
        st.tuples(st.just(time), st.times()),
        st.tuples(st.just(UUID), st.uuids()),
        st.tuples(st.just(bytes), st.binary()),
        st.tuples(st.just(dict[int, set[UUID]]), st.dictionaries(st.integers(), st.just({ID}))),
    )
)
def test_any_value_of_the_other_types_comes_back(pair: tuple[Any, Any]) -> None:
    kind, value = pair
    back = there_and_back(kind, value)
    assert back == value
    assert kinds(back) == kinds(value)


@pytest.mark.parametrize("build", [Order, SpecialOrder, Strict])
def test_annotations_as_text_are_understood(build: Callable[..., Any]) -> None:
    """This module's annotations all are: "from __future__ import annotations"."""
    codec = ContextCodec[Any](build)
    assert codec.decode(codec.encode(build(1), limit=LIMIT)) == build(1)


def test_what_strikes_while_a_context_is_stored_or_restored_is_no_fault_of_its_own() -> None:
    """Memory runs out, or a signal handler raises: said as it is, and not as InvalidContext."""
    left = [1]

    @dataclass
    class Struck(SagaContext):
        number: int

        def __post_init__(self) -> None:
            if not left[0]:
                left[0] = 1
                raise MemoryError

    context = Struck(1)
    codec = ContextCodec(Struck)
    for way in (lambda: codec.encode(context, limit=LIMIT), lambda: codec.decode('{"number":1}')):
        left[0] = 0
        with pytest.raises(MemoryError):
            way()
        way()
