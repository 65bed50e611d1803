"""All that :mod:`django_saga.machine` may do, as a table, and all that it does.

A place is the status, the action and its step, (so) while that is not in flight, and [the steps
whose effects stand or may stand], with a ! where the compensation was given up. What comes to it:

====================  ==============================================================================
begin                 its driver puts it in flight
done, failed          the attempt was; "failed again" where another attempt is left
unknown               what it did is not known; "unknown again" likewise
failed*, unknown*     the same, with an error for which the step's Fallback does not stand in
unstorable            done, but the context that it left cannot be stored
abort, later          the handler raised Abort or RetryLater
any-error             failed, failed*, unknown, unknown* or abort
lost                  the driver was; "lost again" while that did not happen too often
raise                 the consumer of the transaction raised an error between two steps
stick                 the definition or the context was lost
retry                 an operator's
====================  ==============================================================================
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from django_saga import machine
from django_saga.machine import Outcome, Plan, Report, Retry, State, Status, StepRules
from tests.faults.protocol import MAX_RECOVERIES, WHY

AB: Plan = (("A",), ("B",))
AB_TABLE = """
RUNNING act A []: done -> RUNNING act B [A]
RUNNING act A []: failed failed* abort raise -> FAILED []
RUNNING act A []: unknown unknown* unstorable -> COMPENSATING compensate A [A]

RUNNING act A [A]: done -> RUNNING act B [A]
RUNNING act A [A]: any-error raise unstorable -> COMPENSATING compensate A [A]

RUNNING act B [A]: done -> COMPLETED [A B]
RUNNING act B [A]: failed failed* abort raise -> COMPENSATING compensate A [A]
RUNNING act B [A]: unknown unknown* unstorable -> COMPENSATING compensate B [A B]

RUNNING act B [A B]: done -> COMPLETED [A B]
RUNNING act B [A B]: any-error raise unstorable -> COMPENSATING compensate B [A B]

COMPENSATING compensate B [A B]: done unstorable -> COMPENSATING compensate A [A]
COMPENSATING compensate B [A B]: any-error -> COMPENSATING compensate A [A B!]

COMPENSATING compensate A [A]: done unstorable -> FAILED []
COMPENSATING compensate A [A]: any-error -> STUCK [A!]

COMPENSATING compensate A [A B!]: done unstorable -> STUCK [B!]
COMPENSATING compensate A [A B!]: any-error -> STUCK [A! B!]

COMPENSATING compensate B [B]: done unstorable -> FAILED []
COMPENSATING compensate B [B]: any-error -> STUCK [B!]
"""

APF: Plan = (("A",), ("P", "F"))  # F stands in for P
P_TABLE = """
RUNNING act P [A]: done -> COMPLETED [A P]
RUNNING act P [A]: failed -> RUNNING act F [A]
RUNNING act P [A]: failed* abort raise -> COMPENSATING compensate A [A]
RUNNING act P [A]: unknown -> RUNNING compensate P [A P]
RUNNING act P [A]: unknown* unstorable -> COMPENSATING compensate P [A P]

RUNNING act P [A P]: done -> COMPLETED [A P]
RUNNING act P [A P]: failed unknown -> RUNNING compensate P [A P]
RUNNING act P [A P]: failed* unknown* abort raise unstorable -> COMPENSATING compensate P [A P]

RUNNING compensate P [A P]: done unstorable -> RUNNING act F [A]
RUNNING compensate P [A P]: any-error -> COMPENSATING compensate A [A P!]
RUNNING compensate P [A P]: raise -> COMPENSATING compensate P [A P]
"""
APF_TABLE = (  # but for what is above, P and F are as B is
    re.sub("(?m)^RUNNING act B.*", "", AB_TABLE).replace("B", "P")
    + re.sub("(?m)^[^B]*:.*", "", AB_TABLE).replace("B", "F")
    + P_TABLE
)


class Place(NamedTuple):
    status: str
    action: str = ""
    step: str = ""
    in_flight: bool = True
    standing: tuple[str, ...] = ()

    def __repr__(self) -> str:
        step = self.step if self.in_flight else f"({self.step})"
        call = f" {self.action} {step}" if self.step else ""
        return f"{self.status}{call} [{' '.join(self.standing)}]"


Edge = tuple[Place, str, Place]


def told(table: str, retry: Retry, *, atomic: bool) -> set[Edge]:
    """The edges of the table and of :func:`everywhere` that can be come to from the start."""
    ways = _read(table)

    def edges(place: Place) -> Iterator[tuple[str, Place]]:
        kinds = ways.get(place._replace(in_flight=True), {})
        if not place.in_flight:
            raises = "raise" in kinds and place.status != "PENDING"
            kinds = {"raise": kinds["raise"]} if raises else {}
        elif atomic and place.action == "act":  # rolled back with its checkpoint
            kinds = {**kinds, "unknown": kinds["failed"], "unknown*": kinds["failed*"]}
        yield from kinds.items()
        yield from everywhere(place, retry, atomic=atomic)

    starts = Place("PENDING", "act", "A", in_flight=False), Place("RUNNING", "act", "A")
    return _reached(starts, edges)


def everywhere(place: Place, retry: Retry, *, atomic: bool) -> Iterator[tuple[str, Place]]:
    """What comes to any place of its kind, beside what the table says of it."""
    if place.status == "STUCK":
        undo = tuple(name.strip("!") for name in place.standing)
        again = undo and Place("COMPENSATING", "compensate", undo[-1], False, undo)
        yield "retry", again or Place("FAILED")
    if place.status in ("COMPLETED", "FAILED", "STUCK"):
        return
    doubted = place.standing  # and what is in flight
    if place.in_flight and place.action == "act" and not atomic and place.step not in doubted:
        doubted = (*doubted, place.step)
    yield "stick", Place("STUCK", standing=doubted)
    if not place.in_flight:
        status = "RUNNING" if place.status == "PENDING" else place.status
        yield "begin", place._replace(status=status, in_flight=True)
        return
    yield "later", place._replace(in_flight=False)
    yield "lost again", place._replace(standing=doubted)
    if doubted == place.standing:  # as it is once it was lost
        yield "lost", Place("STUCK", standing=doubted)
    if retry.attempts > 1:
        again = place._replace(in_flight=not retry.delay)
        yield from (("failed again", again), ("failed* again", again))
        again = again._replace(standing=doubted)
        yield from (("unknown again", again), ("unknown* again", again))


def _read(table: str) -> dict[Place, dict[str, Place]]:
    ways: dict[Place, dict[str, Place]] = {}
    for line in filter(None, table.splitlines()):
        left, kinds, right = re.split(": | -> ", line)
        for kind in kinds.replace("any-error", "failed failed* unknown unknown* abort").split():
            known = ways.setdefault(_place(left), {}).setdefault(kind, _place(right))
            assert known == _place(right), f"two lines for {kind} in {left}"
    return ways


def _place(text: str) -> Place:
    parts = re.fullmatch(r"(\w+)(?: (\w+) (\w+))? \[(.*)\]", text)
    assert parts is not None, text
    status, action, step, standing = parts.groups(default="")
    return Place(status, action, step, standing=tuple(standing.split()))


# What the machine does

REPORTS: dict[str, dict[str, Any]] = {
    "done": {"outcome": Outcome.DONE},
    "unstorable": {"outcome": Outcome.DONE, "error": WHY},
    "failed": {"outcome": Outcome.FAILED, "error": WHY},
    "failed*": {"outcome": Outcome.FAILED, "error": WHY, "falls_back": False},
    "unknown": {"outcome": Outcome.UNKNOWN, "error": WHY},
    "unknown*": {"outcome": Outcome.UNKNOWN, "error": WHY, "falls_back": False},
    "abort": {"outcome": Outcome.FAILED, "error": WHY, "abort": True},
    "later": {"outcome": Outcome.FAILED, "error": WHY, "retry_after": 1.0},
}
REPEATED = ("failed", "failed*", "unknown", "unknown*")


def made(plan: Plan, retry: Retry, *, atomic: bool) -> set[Edge]:
    """The edges that the machine makes, from every state that it can come to."""
    rules = StepRules(retry=retry, compensation_retry=retry, atomic=atomic)

    def edges(state: State) -> Iterator[tuple[str, State]]:
        for kind, transition in _transitions(state, retry, rules):
            after = transition.state  # the number of its attempt decides nothing
            yield kind, replace(after, attempt=min(after.attempt, 1))

    starts = [machine.start(plan, "{}", pending=pending) for pending in (True, False)]
    return {(place_of(a), kind, place_of(b)) for a, kind, b in _reached(starts, edges)}


def _transitions(
    state: State, retry: Retry, rules: StepRules
) -> Iterator[tuple[str, machine.Transition]]:
    if state.status is Status.STUCK:
        yield "retry", machine.compensate_again(state)
    if not state.active:
        return
    yield "stick", machine.stick(state, "why", rules)
    if state.status is Status.RUNNING:
        yield "raise", machine.turn_back(state, WHY)
    if not state.in_flight:
        yield "begin", machine.begin(state)
        return
    again = " again" if state.recoveries < MAX_RECOVERIES else ""
    yield f"lost{again}", machine.interrupt(state, rules, MAX_RECOVERIES)
    for kind, values in REPORTS.items():
        again = " again" if kind in REPEATED and state.failures + 1 < retry.attempts else ""
        report = Report(context="{}", **values)
        yield f"{kind}{again}", machine.settle(state, report, rules)


def place_of(state: State) -> Place:
    """Where a state stands in the table."""
    standing = tuple(
        f"{effect.step}!" if effect.undo is Outcome.FAILED else effect.step
        for effect in machine.standing(state)
    )
    if not state.active:
        return Place(state.status, standing=standing)
    return Place(state.status, state.action, state.step, state.in_flight, standing)


def _reached(starts: Iterable[Any], edges: Callable[[Any], Iterable[tuple[str, Any]]]) -> set[Any]:
    seen = set(starts)
    queue, found = deque(seen), set()
    while queue:
        here = queue.popleft()
        for kind, after in edges(here):
            found.add((here, kind, after))
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return found
