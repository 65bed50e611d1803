"""How sagas and steps are declared and found, and what is said of a wrong declaration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pybreaker
import pytest

from django_saga import (
    Abort,
    Fallback,
    InvalidDefinition,
    Retry,
    RetryLater,
    Saga,
    SagaContext,
    SagaStepHandler,
    UnknownSaga,
    registry,
)
from django_saga.definition import Definition, define
from django_saga.machine import ONCE
from django_saga.storage import MemorySagaStorage


@dataclass
class OrderContext(SagaContext):
    order_id: int = 0


@dataclass
class GiftContext(OrderContext):
    card: str = ""


@dataclass
class OtherContext(SagaContext):
    pass


class Reserve(SagaStepHandler[OrderContext]):
    pass


class Charge(SagaStepHandler[OrderContext]):
    pass


class Book(SagaStepHandler[OrderContext]):
    pass


class WrapGift(SagaStepHandler[GiftContext]):
    pass


class Unrelated(SagaStepHandler[OtherContext]):
    pass


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test declares is forgotten after it."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))


def order_saga(*steps: Any, **more: Any) -> Definition:
    return define("Saga Order", list(steps), more.get("retired", ()), OrderContext)


# What a definition says


def test_the_plan_is_the_step_names_in_order_with_the_fallbacks_beside_their_steps() -> None:
    definition = order_saga(Reserve, Fallback(step=Charge, fallback=Book))
    assert definition.plan == (("Reserve",), ("Charge", "Book"))
    assert definition.steps == {"Reserve": Reserve, "Charge": Charge, "Book": Book}
    assert list(definition.fallbacks) == ["Charge"]
    assert definition.context_type is OrderContext


def test_a_steps_rules_are_its_attributes() -> None:
    class Careful(SagaStepHandler[OrderContext]):
        retry = Retry(attempts=7)
        compensation_retry = Retry(attempts=9)
        atomic = True

    rules = order_saga(Careful, Reserve).rules
    careful, plain = rules["Careful"], rules["Reserve"]
    assert (careful.retry, careful.compensation_retry) == (Retry(attempts=7), Retry(attempts=9))
    assert careful.atomic
    assert (plain.retry, plain.atomic) == (ONCE, False)
    assert plain.compensation_retry == Retry(attempts=3, delay=1, backoff=2)


def test_a_tuple_of_steps_will_do() -> None:
    assert define("Saga S", (Reserve,)).plan == (("Reserve",),)


def test_a_step_is_found_by_its_aliases_with_its_rules_and_its_fallback() -> None:
    class Pay(SagaStepHandler[OrderContext]):
        aliases = ["Charge", "Debit"]
        retry = Retry(attempts=4)

    entry = Fallback(step=Pay, fallback=Book)
    definition = order_saga(entry)
    assert definition.plan == (("Pay", "Book"),)
    for name in ("Pay", "Charge", "Debit"):
        assert definition.steps[name] is Pay
        assert definition.rules[name].retry.attempts == 4
        assert definition.fallbacks[name] is entry


def test_a_retired_step_is_known_but_not_in_the_plan() -> None:
    class Old(SagaStepHandler[OrderContext]):
        aliases = ["Older"]

    definition = order_saga(Reserve, retired=[Old])
    assert definition.plan == (("Reserve",),)
    assert definition.steps["Old"] is definition.steps["Older"] is Old
    definition.require(["Reserve", "Old", "Older"])


def test_a_retired_step_does_not_take_the_name_of_a_live_one() -> None:
    class Old(SagaStepHandler[OrderContext]):
        name = "Reserve"

    assert order_saga(Reserve, retired=[Old]).steps["Reserve"] is Reserve


def test_a_step_that_is_gone_is_named_with_what_to_do() -> None:
    with pytest.raises(UnknownSaga, match=r"Saga Order.*Gone, Lost.*retired_steps.*aliases"):
        order_saga(Reserve).require(["Reserve", "Lost", "Gone", "Lost"])


def test_a_step_may_take_a_base_of_the_sagas_context() -> None:
    assert define("Saga Gift", [Reserve, WrapGift], (), GiftContext).context_type is GiftContext


def test_a_step_that_leaves_its_context_open_goes_with_any() -> None:
    class Anything(SagaStepHandler[Any]):
        pass

    class Bare(SagaStepHandler):  # type: ignore[type-arg]
        pass

    assert order_saga(Anything, Bare).plan == (("Anything",), ("Bare",))
    assert define("Saga S", [Bare, Anything, Reserve]).context_type is OrderContext


def test_a_steps_context_is_found_through_generic_bases() -> None:
    T = TypeVar("T", bound=SagaContext)

    class Base(SagaStepHandler[T], Generic[T]):
        pass

    class Made(Base[OtherContext]):
        pass

    class Heir(Made):
        pass

    with pytest.raises(InvalidDefinition, match="Heir takes a OtherContext"):
        order_saga(Heir)


# Wrong declarations: the message names saga, position and step


def test_two_steps_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidDefinition, match=r"Saga Order, steps\[2\].*'Reserve'.*taken"):
        order_saga(Reserve, Charge, Reserve)


@pytest.mark.parametrize("where", ["step", "alias", "fallback", "own alias"])
def test_a_name_taken_through_an_alias_or_a_fallback_is_refused(where: str) -> None:
    class Twin(SagaStepHandler[OrderContext]):
        name = "Reserve" if where == "step" else "Twin"
        aliases = {"alias": ["Reserve"], "own alias": ["Twin"]}.get(where, [])

    entry: Any = Twin
    if where == "fallback":
        entry = Fallback(step=Charge, fallback=Reserve)
    with pytest.raises(InvalidDefinition, match=r"Saga Order, steps\[1\].*taken"):
        order_saga(Reserve, entry)


@pytest.mark.parametrize("nested", ["step", "fallback"])
def test_a_fallback_within_a_fallback_is_refused(nested: str) -> None:
    inner: Any = Fallback(step=Charge, fallback=Book)
    outer = Fallback(**{"step": Reserve, "fallback": Unrelated, nested: inner})
    with pytest.raises(
        InvalidDefinition, match=r"Saga Order, steps\[0\].*cannot hold another Fallback"
    ):
        order_saga(outer)


def test_a_fallback_to_itself_is_refused() -> None:
    with pytest.raises(InvalidDefinition, match=r"Saga Order, steps\[1\].*Charge.*its own"):
        order_saga(Reserve, Fallback(step=Charge, fallback=Charge))


@pytest.mark.parametrize(
    "errors", [ValueError, [ValueError], ("ValueError",), (KeyboardInterrupt,)]
)
def test_failure_exceptions_that_are_no_tuple_of_exceptions_are_refused(errors: Any) -> None:
    entry = Fallback(step=Charge, fallback=Book, failure_exceptions=errors)
    with pytest.raises(InvalidDefinition, match=r"steps\[0\]: failure_exceptions must be a tuple"):
        order_saga(entry)


@pytest.mark.parametrize("error", [Abort, RetryLater, type("Declined", (Abort,), {})])
def test_failure_exceptions_that_never_lead_to_the_fallback_are_refused(error: Any) -> None:
    entry = Fallback(step=Charge, fallback=Book, failure_exceptions=(OSError, error))
    with pytest.raises(InvalidDefinition, match=rf"steps\[0\].* {error.__name__}, which never"):
        order_saga(entry)


def test_a_circuit_breaker_that_cannot_guard_a_call_is_refused() -> None:
    """Otherwise each call of it would fail, and look like a circuit that is open for ever."""
    breaker: Any = object()
    with pytest.raises(InvalidDefinition, match=r"steps\[0\]: the circuit_breaker"):
        order_saga(Fallback(step=Charge, fallback=Book, circuit_breaker=breaker))
    order_saga(Fallback(step=Charge, fallback=Book, circuit_breaker=pybreaker.CircuitBreaker()))


@pytest.mark.parametrize(
    "wrong", ["Reserve", None, Reserve(), OrderContext, SagaStepHandler, [Reserve]]
)
@pytest.mark.parametrize("declared", [OrderContext, None], ids=["typed", "untyped"])
def test_what_is_no_step_is_refused_and_shown(wrong: Any, declared: Any) -> None:
    expected = rf"Saga S, steps\[1\]: expected a SagaStepHandler.*{re.escape(repr(wrong)[:20])}"
    with pytest.raises(InvalidDefinition, match=expected):
        define("Saga S", [Reserve, wrong], (), declared)
    expected = expected.replace("1", "0")
    with pytest.raises(InvalidDefinition, match=expected):
        define("Saga S", [Fallback(step=wrong, fallback=Charge)], (), declared)


@pytest.mark.parametrize("steps", [[], (), None, "Reserve", Reserve, {Reserve}, 5])
def test_steps_that_are_empty_or_no_list_are_refused(steps: Any) -> None:
    with pytest.raises(InvalidDefinition, match="Saga S: steps must be a list with at least one"):
        define("Saga S", steps)


def test_a_step_for_another_context_is_refused() -> None:
    expected = r"Saga Order, steps\[1\]: Unrelated takes a OtherContext.*context is OrderContext"
    with pytest.raises(InvalidDefinition, match=expected):
        order_saga(Reserve, Unrelated)
    with pytest.raises(InvalidDefinition, match=expected):
        order_saga(Reserve, Fallback(step=Charge, fallback=Unrelated))
    with pytest.raises(InvalidDefinition, match=expected):
        define("Saga Order", [Reserve, Unrelated])  # it is the first step's, undeclared


def test_a_step_for_a_derived_context_is_refused() -> None:
    with pytest.raises(InvalidDefinition, match=r"steps\[0\]: WrapGift takes a GiftContext"):
        order_saga(WrapGift)


@pytest.mark.parametrize("declared", [int, None, "OrderContext", OrderContext()])
def test_a_context_that_is_no_saga_context_is_refused(declared: Any) -> None:
    class Open(SagaStepHandler[Any]):
        pass

    with pytest.raises(InvalidDefinition, match="Saga S: its context must derive from SagaContext"):
        define("Saga S", [Open], (), declared)


@pytest.mark.parametrize("retired", [None, Reserve, "Reserve"])
def test_retired_steps_that_are_no_list_are_refused(retired: Any) -> None:
    with pytest.raises(InvalidDefinition, match="Saga Order: retired_steps must be a list"):
        order_saga(Reserve, retired=retired)


def test_a_wrong_retired_step_is_refused_with_its_position() -> None:
    for wrong in ("Old", Unrelated):
        with pytest.raises(InvalidDefinition, match=r"Saga Order, retired_steps\[1\]"):
            order_saga(Reserve, retired=[Charge, wrong])


def test_a_retired_fallback_is_refused_with_what_to_list_instead() -> None:
    with pytest.raises(InvalidDefinition, match=r"retired_steps\[0\]: list the Fallback's step"):
        order_saga(Reserve, retired=[Fallback(step=Charge, fallback=Book)])


@pytest.mark.parametrize("aliases", [None, 5, [5], [None], {"a": 1}])
def test_aliases_that_are_no_list_of_texts_are_refused(aliases: Any) -> None:
    Named = type("Named", (Reserve,), {"aliases": aliases})
    with pytest.raises(InvalidDefinition, match=r"Saga Order, steps\[0\]: the aliases of Named"):
        order_saga(Named)


# Wrong steps: refused where the class is made


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"name": ""}, "name must be"),
        ({"name": None}, "name must be"),
        ({"name": 5}, "name must be"),
        ({"name": "x" * 101}, "name must be"),
        ({"name": "a:b"}, "name must be"),
        ({"retry": 3}, "retry must be a Retry"),
        ({"compensation_retry": None}, "compensation_retry must be a Retry"),
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": -1}, "timeout must be"),
        ({"timeout": "10"}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"uncertain": TimeoutError}, "uncertain must be"),
        ({"uncertain": ("TimeoutError",)}, "uncertain must be"),
        ({"uncertain": (KeyboardInterrupt,)}, "uncertain must be"),
        ({"aliases": "Old"}, "aliases must be"),
    ],
)
def test_a_step_with_a_wrong_attribute_is_refused_by_name(
    attributes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidDefinition, match=f"Step Wrong: .*{said}"):
        type("Wrong", (Reserve,), attributes)


@pytest.mark.parametrize("action", ["act", "compensate"])
def test_an_atomic_step_with_an_async_action_is_refused_with_both_ways_out(action: str) -> None:
    async def method(self: Any, context: OrderContext) -> None:
        pass

    with pytest.raises(InvalidDefinition, match=r"Step Wrong.*plain def.*atomic = True"):
        type("Wrong", (Reserve,), {"atomic": True, action: method})


def test_an_atomic_step_that_inherits_an_async_action_is_refused() -> None:
    class Base(SagaStepHandler[OrderContext]):
        async def act(self, context: OrderContext) -> None:
            pass

    with pytest.raises(InvalidDefinition, match="atomic"):
        type("Wrong", (Base,), {"atomic": True})


def test_a_step_is_called_as_its_class_and_does_not_inherit_a_name() -> None:
    class Named(Reserve):
        name = "reserve-stock"

    class Heir(Named):
        pass

    assert [step.name for step in (Reserve, Named, Heir)] == ["Reserve", "reserve-stock", "Heir"]
    assert order_saga(Named, Heir).plan == (("reserve-stock",), ("Heir",))


# Saga classes


def test_a_saga_class_is_checked_where_it_is_made_and_named() -> None:
    with pytest.raises(InvalidDefinition, match=r"Saga .*Wrong, steps\[1\]: Unrelated takes"):

        class Wrong(Saga[OrderContext]):
            steps = [Reserve, Unrelated]

    assert not any(saga.__name__ == "Wrong" for saga in registry.all_sagas())


@pytest.mark.parametrize("name", ["", None, 5, "x" * 256])
def test_a_saga_of_an_impossible_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidDefinition, match=r"Saga .*Wrong: its name"):
        type("Wrong", (Saga,), {"name": name, "steps": [Reserve]})


@pytest.mark.parametrize("queue", ["", 5, b"sagas"])
def test_a_queue_that_is_no_name_is_refused(queue: Any) -> None:
    with pytest.raises(InvalidDefinition, match=r"Saga .*Wrong: its queue must be a name, not "):
        type("Wrong", (Saga,), {"queue": queue, "steps": [Reserve]})


def test_a_saga_is_named_by_its_app_and_class_and_found_by_that() -> None:
    class Plain(Saga[OrderContext]):
        steps = [Reserve]

    assert Plain.name == "saga_tests.Plain"
    assert Plain(storage=MemorySagaStorage()).name == "saga_tests.Plain"
    assert registry.find_saga("saga_tests.Plain") is Plain


def test_a_saga_of_no_app_is_named_by_its_package() -> None:
    made: Any = type("Loose", (Saga,), {"steps": [Reserve], "__module__": "somewhere.inside"})
    assert made.name == "somewhere.Loose"


def test_a_name_of_its_own_is_not_inherited_by_subclasses() -> None:
    class Named(Saga[OrderContext]):
        name = "orders"
        steps = [Reserve]

    class Heir(Named):
        steps = [Reserve, Charge]

    assert Heir.name == "saga_tests.Heir"
    assert registry.find_saga("orders") is Named
    assert registry.find_saga("saga_tests.Heir") is Heir


def test_a_saga_without_steps_is_a_base_and_cannot_be_made() -> None:
    class Base(Saga[OrderContext]):
        pass

    assert Base not in registry.all_sagas()
    with pytest.raises(InvalidDefinition, match=r"Saga .*Base has no steps"):
        Base()

    class Made(Base):
        steps = [Reserve]

    assert Made.definition.context_type is OrderContext


def test_a_subclass_that_inherits_its_steps_is_found_by_its_name() -> None:
    """It can be run, so recovery must know it."""

    class Parent(Saga[OrderContext]):
        steps = [Reserve]

    class Heir(Parent):
        pass

    assert registry.find_saga(Heir(storage=MemorySagaStorage()).name) is Heir


def test_an_unknown_name_is_told_with_what_to_do() -> None:
    with pytest.raises(UnknownSaga, match=r"'orders\.Gone'.*sagas\.py.*resume.*retry"):
        registry.find_saga("orders.Gone")


def test_a_class_that_is_made_again_replaces_the_first() -> None:
    """As when its module is reloaded."""

    def make() -> Any:
        class Again(Saga[OrderContext]):
            steps = [Reserve]

        return Again

    first, second = make(), make()
    assert registry.find_saga(first.name) is second
    assert first not in registry.all_sagas()


def test_a_saga_made_ad_hoc_has_its_name_and_is_not_registered() -> None:
    before = registry.all_sagas()
    saga = Saga[OrderContext](steps=[Reserve], name="adhoc", storage=MemorySagaStorage())
    assert (saga.name, saga.definition.plan) == ("adhoc", (("Reserve",),))
    assert registry.all_sagas() == before
    with pytest.raises(InvalidDefinition, match=r"Saga adhoc, steps\[0\]"):
        Saga[OrderContext](steps=["Reserve"], name="adhoc")  # type: ignore[list-item]
    with pytest.raises(InvalidDefinition, match="steps must be a list"):
        Saga[OrderContext](steps=[], name="adhoc")


def test_an_ad_hoc_saga_of_a_class_keeps_to_the_context_of_that_class() -> None:
    class Order(Saga[OrderContext]):
        steps = [Reserve]

    with pytest.raises(InvalidDefinition, match="Unrelated takes a OtherContext"):
        Order(steps=[Unrelated])
    assert Order(steps=[Charge], storage=MemorySagaStorage()).definition.plan == (("Charge",),)
    assert Order.definition.plan == (("Reserve",),), "the class is as it was"


@pytest.mark.parametrize("name", ["", "x" * 256, 5])
def test_an_ad_hoc_saga_of_an_impossible_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidDefinition, match="name"):
        Saga[OrderContext](steps=[Reserve], name=name, storage=MemorySagaStorage())


def test_the_sagas_of_installed_apps_are_found_in_their_sagas_module() -> None:
    """Nothing here imports them."""
    assert registry.find_saga("shop.OrderSaga").__module__ == "testproject.shop.sagas"
    assert registry.find_saga("saga_tests.Travel").__module__ == "tests.sagas"


def test_an_action_that_does_not_take_the_context_is_refused() -> None:
    class Wrong(SagaStepHandler[OrderContext]):
        def act(self) -> None:  # type: ignore[override]
            pass

    with pytest.raises(InvalidDefinition, match=r"act of .*Wrong must take self and the context"):
        Saga(steps=[Wrong])


@pytest.mark.parametrize("action", ["act", "compensate"])
def test_an_action_with_a_yield_is_refused_for_it_would_do_nothing(action: str) -> None:
    def generator(self: Any, context: OrderContext) -> Any:
        yield

    async def async_generator(self: Any, context: OrderContext) -> Any:
        yield

    for method in (generator, async_generator):
        wrong = type("Wrong", (Reserve,), {action: method})
        with pytest.raises(InvalidDefinition, match=rf"steps\[0\]: {action} of Wrong .*yield"):
            order_saga(wrong)
