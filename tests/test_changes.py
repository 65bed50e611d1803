"""What an attempt changed in the context, as its record keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.conf import settings
from hypothesis import given
from hypothesis import strategies as st

from django_saga import Retry, Saga, SagaContext, SagaStepHandler
from django_saga.changes import LARGEST, changes, unknown_fields
from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.storage import DjangoSagaStorage

ALIASES = list(settings.DATABASES)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
contexts = st.dictionaries(st.sampled_from("abcd"), values)


@given(contexts, contexts)
def test_the_fields_that_differ_are_kept_with_their_new_values(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    said = json.loads(changes(json.dumps(before), json.dumps(after)))
    assert said.keys() == {
        *(name for name, value in after.items() if _json(before, name) != json.dumps(value)),
        *(before.keys() - after.keys()),
    }
    for name in said:
        if name not in after:
            assert said[name] is None


def _json(context: dict[str, Any], name: str) -> str | None:
    return json.dumps(context[name]) if name in context else None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('{"a":1}', '{"a":1}', {}),
        ('{"a":1}', '{"a":2}', {"a": 2}),
        ('{"a":1}', '{"a":1,"b":[1,{"c":null}]}', {"b": [1, {"c": None}]}),
        ('{"a":1,"b":2}', '{"a":1}', {"b": None}),
        ('{"a":"1"}', '{"a":1}', {"a": 1}),
        ('{"a":1.10}', '{"a":1.10}', {}),
        ('{"ü":"\\u00fc"}', '{"ü":"é"}', {"ü": "é"}),
    ],
)
def test_examples(before: str, after: str, said: dict[str, Any]) -> None:
    assert json.loads(changes(before, after)) == said


@pytest.mark.parametrize("broken", ["", "nonsense", "[1]", "null", "7"])
def test_after_a_context_that_cannot_be_read_all_is_new(broken: str) -> None:
    assert json.loads(changes(broken, '{"a":1}')) == {"a": 1}
    assert json.loads(changes('{"a":1}', broken)) == {"a": None}


def test_a_large_value_is_told_by_its_size() -> None:
    at_most = json.dumps({"a": "x" * (LARGEST - 2)})
    assert json.loads(changes("{}", at_most)) == json.loads(at_most)
    said = json.loads(changes("{}", json.dumps({"a": "x" * LARGEST, "b": 1})))
    assert said == {"a": f"… ({LARGEST + 2} bytes)", "b": 1}


def test_what_looks_like_a_secret_or_is_said_to_be_one_is_masked() -> None:
    after = json.dumps({"api_key": "k-4711", "pin": "1234", "to": "Ada"})
    said = changes("{}", after, {"pin"})
    assert "4711" not in said
    assert "1234" not in said
    assert json.loads(said)["to"] == "Ada"


def test_unknown_fields_are_those_that_the_known_context_has_not() -> None:
    assert unknown_fields('{"b":1,"a":2,"c":3}', '{"c":1}') == ["a", "b"]
    assert unknown_fields('{"c":3}', '{"c":1,"d":2}') == []


@dataclass
class Cart(SagaContext):
    items: list[str] = field(default_factory=list)
    total: int = 0
    payment: str | None = None


class Fill(SagaStepHandler[Cart]):
    def act(self, context: Cart) -> None:
        context.items.append("book")


class Look(SagaStepHandler[Cart]):
    async def act(self, context: Cart) -> None:
        """Changes nothing."""


class Charge(SagaStepHandler[Cart]):
    """Changes the context, fails; and changes it again when it succeeds."""

    retry = Retry(attempts=2, delay=0)
    atomic = True

    def act(self, context: Cart) -> None:
        context.total += 5
        if context.total == 5:
            raise ValueError("not yet")
        context.payment = "p"


class Send(SagaStepHandler[Cart]):
    def act(self, context: Cart) -> None:
        raise ValueError("no")

    def compensate(self, context: Cart) -> None:
        """Never called."""


class Refunded(Charge):
    def compensate(self, context: Cart) -> None:
        context.payment = None


class CartSaga(Saga[Cart]):
    name = "tests.CartSaga"
    steps = [Fill, Look, Refunded, Send]


@pytest.mark.usefixtures("committing_databases")
@pytest.mark.parametrize("alias", ALIASES)
def test_each_record_keeps_what_its_own_attempt_changed(alias: str) -> None:
    execution = CartSaga(storage=DjangoSagaStorage(alias)).enqueue(Cart())
    row = SagaExecution.objects.using(alias).get(pk=execution.pk)
    assert row.status == "FAILED"
    records = SagaStepRecord.objects.using(alias).filter(execution=row).order_by("id")
    assert [(r.step, r.action, r.outcome, r.changes) for r in records] == [
        ("Fill", "act", "DONE", '{"items":["book"]}'),
        ("Look", "act", "DONE", ""),
        ("Refunded", "act", "FAILED", '{"total":5}'),
        ("Refunded", "act", "DONE", '{"total":10,"payment":"p"}'),
        ("Send", "act", "FAILED", ""),
        ("Refunded", "compensate", "DONE", '{"payment":null}'),
        ("Look", "compensate", "DONE", ""),
        ("Fill", "compensate", "DONE", ""),
    ]
