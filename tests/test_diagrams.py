"""Diagrams: what a definition says, as Mermaid."""

from __future__ import annotations

import re
from io import StringIO

import pybreaker
import pytest
from django.core.management import CommandError, call_command

from django_saga import Fallback, Retry
from django_saga.definition import Definition, define
from django_saga.diagrams import flowchart, sequence
from tests.recovery_sagas import Plain
from tests.steps import Calls, make_step

DRAWINGS = [flowchart, sequence]
ODD = ['say "hi"', "a # b", "end", "<b>x</b>", "a;b", "[x](y)", "%% c", "1. one", "`md`", "a\nb"]


class CardDeclined(Exception):
    pass


class CardExpired(Exception):
    pass


@pytest.fixture
def order() -> Definition:
    calls = Calls()
    reserve = make_step("Reserve", calls, atomic=True)
    card = make_step("Card", calls, retry=Retry(attempts=3), timeout=10)
    wallet, courier = make_step("Wallet", calls), make_step("Courier", calls)
    either = Fallback(step=card, fallback=wallet, failure_exceptions=(CardDeclined, CardExpired))
    return define("Saga Order", [reserve, either, courier])


def nodes(drawing: str) -> dict[str, str]:
    """The nodes of a flow chart and what is written in them."""
    found = re.findall(r'^ +(\w+)[\[(/]+"(.*)"[\])/]+$', drawing, re.MULTILINE)
    return dict(found)


def edges(drawing: str) -> set[tuple[str, str, str]]:
    """The edges of a flow chart: from, what is written on it, to."""
    found = re.findall(r'^ +(\w+) -\.?->(?:\|"(.*)"\|)? (\w+)$', drawing, re.MULTILINE)
    return set(found)


def test_the_flow_chart_shows_each_step_with_what_is_special_about_it(order: Definition) -> None:
    assert nodes(flowchart(order, "shop.Order")) == {
        "saga": "shop.Order",
        "s0": "Reserve<br/>atomic",
        "s1": "Card<br/>up to 3 attempts, timeout 10 s",
        "f1": "Wallet",
        "s2": "Courier",
        "u0": "undo Reserve",
        "u1": "undo Card or Wallet",
        "u2": "undo Courier",
        "completed": "COMPLETED",
        "failed": "FAILED",
        "stuck": "STUCK",
    }


def test_the_flow_chart_leads_forward_and_back(order: Definition) -> None:
    """A failed step is not undone, one whose outcome is unknown is, an atomic one is never that."""
    assert edges(flowchart(order, "shop.Order")) == {
        ("saga", "", "s0"),
        ("s0", "", "s1"),
        ("s1", "", "s2"),
        ("s1", "CardDeclined, CardExpired", "f1"),
        ("f1", "", "s2"),
        ("s2", "", "completed"),
        ("s0", "failed", "failed"),
        ("s1", "any other error", "u0"),
        ("s1", "outcome unknown", "u1"),
        ("f1", "failed", "u0"),
        ("f1", "outcome unknown", "u1"),
        ("s2", "failed", "u1"),
        ("s2", "outcome unknown", "u2"),
        ("u2", "", "u1"),
        ("u1", "", "u0"),
        ("u0", "", "failed"),
        ("u0", "a compensation failed", "stuck"),
    }


def test_every_edge_joins_nodes_that_are_drawn(order: Definition) -> None:
    drawing = flowchart(order, "shop.Order")
    assert {end for a, _, b in edges(drawing) for end in (a, b)} == set(nodes(drawing))


def test_a_fallback_for_any_error_leaves_its_step_but_abort() -> None:
    calls = Calls()
    step, other = make_step("Card", calls), make_step("Wallet", calls)
    breaker = pybreaker.CircuitBreaker()
    either = Fallback(step=step, fallback=other, circuit_breaker=breaker)
    found = edges(flowchart(define("Saga", [either]), "Pay"))
    assert {edge for edge in found if edge[0] == "s0"} == {
        ("s0", "", "completed"),
        ("s0", "any error but Abort, circuit open", "f0"),
        ("s0", "Abort", "failed"),
    }


def test_a_last_atomic_step_is_never_undone() -> None:
    only = define("Saga", [make_step("Only", Calls(), atomic=True)])
    assert set(nodes(flowchart(only, "One"))) == {"saga", "s0", "completed", "failed"}
    assert "compensate" not in sequence(only, "One")


def test_a_step_without_a_compensation_says_so() -> None:
    from django_saga import SagaStepHandler

    first = make_step("First", Calls(), compensate=None)
    first.compensate = SagaStepHandler.compensate  # type: ignore[method-assign]
    drawing = flowchart(define("Saga", [first, make_step("Next", Calls())]), "Two")
    assert nodes(drawing)["u0"] == "undo First<br/>nothing to do"


def test_the_sequence_acts_in_order_and_compensates_in_reverse(order: Definition) -> None:
    calls = re.findall(r"saga->>(\w+): (\w+)", sequence(order, "shop.Order"))
    acts = [("s0", "act"), ("s1", "act"), ("f1", "act"), ("s2", "act")]
    undone = [(node, "compensate") for node in ("s2", "f1", "s1", "s0")]
    assert calls == [*acts, *undone]


def test_the_sequence_shows_when_a_fallback_stands_in_and_how_it_ends(order: Definition) -> None:
    lines = [line.strip() for line in sequence(order, "shop.Order").splitlines()]
    start = lines.index("opt Card failed, CardDeclined, CardExpired")
    assert lines[start + 1 : start + 3] == ["saga->>f1: act", "end"]
    assert lines.index("Note over saga: COMPLETED") < lines.index("saga->>s0: compensate")
    assert lines[-2:] == ["Note over saga: FAILED, or STUCK if a compensation failed", "end"]
    blocks = [line.split()[0] for line in lines]
    assert blocks.count("end") == blocks.count("opt") + blocks.count("alt")


@pytest.mark.parametrize("draw", DRAWINGS)
@pytest.mark.parametrize("odd", ODD)
def test_odd_names_cannot_become_syntax(draw: object, odd: str) -> None:
    """An odd name changes no line but those that show it, and reads back from its escapes."""
    plain = draw(define("Saga", [make_step("Plain", Calls())]), "Name")  # type: ignore[operator]
    drawn = draw(define("Saga", [make_step(odd, Calls())]), odd)  # type: ignore[operator]
    escaped = "".join(
        c if c.isalnum() or c in " ." else f"#{ord(c)};" for c in odd.replace("\n", " ")
    ).replace("1.", "1#46;")
    assert drawn == plain.replace("Plain", escaped).replace("Name", escaped)


def test_the_command_prints_a_diagram_of_a_registered_saga() -> None:
    drawn, in_time = StringIO(), StringIO()
    call_command("saga_diagram", Plain.name, stdout=drawn)
    call_command("saga_diagram", Plain.name, "--sequence", stdout=in_time)
    assert drawn.getvalue() == flowchart(Plain.definition, "saga_tests.Plain")
    assert in_time.getvalue() == sequence(Plain.definition, "saga_tests.Plain")


def test_the_command_names_the_known_sagas_when_one_is_unknown() -> None:
    with pytest.raises(CommandError, match=r"No saga is named 'Nope'\. Known: .*saga_tests\.Plain"):
        call_command("saga_diagram", "Nope")
