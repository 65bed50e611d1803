"""The invariants, held against the ledger and the final rows: what is wrong with an execution.

L0 it has ended; L1 an atomic step's row stands once, or not at all; L2 one key for each action of a
step; L3 what stands is what its status says; L4 undone in reverse order; L5 one end, one signal, a
history without gaps, tokens that never decrease. (L6, connections and threads, is each battery's.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from uuid import UUID

from django_saga.models import SagaExecution, SagaStepRecord
from tests.faults.ledger import Entry
from tests.faults.sagas import JUDGED, ROWS, groups


def wrongs(saga_id: UUID, database: str, entries: Sequence[Entry]) -> list[str]:
    """What the execution breaks; empty where all is as it must be."""
    rows = SagaExecution.objects.using(database)
    execution = rows.filter(pk=saga_id).first()
    if execution is None:
        return ["called, though it was never stored"] if entries else []
    records = list(SagaStepRecord.objects.using(database).filter(execution=saga_id).order_by("id"))
    calls = [entry for entry in entries if entry.action != "signal"]
    signalled = [entry for entry in entries if entry.action == "signal"]
    found = [
        *_end(execution),
        *_rows(execution, database),
        *_keys(calls),
        *_effects(execution, database, calls),
        *_order(calls, records),
        *_history(records, signalled),
    ]
    return [f"{execution.saga} {saga_id}: {wrong}" for wrong in found]


def _end(execution: SagaExecution) -> Iterator[str]:
    expected = JUDGED[execution.saga].ends
    if execution.status not in expected:
        yield f"L0 is {execution.status}, not {sorted(expected)} ({execution.stuck_reason})"
    if execution.lease_until is not None or execution.finished_at is None:
        yield "L0 has ended with a lease, or without saying when"


def _rows(execution: SagaExecution, database: str) -> Iterator[str]:
    for step in sorted(ROWS):
        count = groups(database, execution.id, step).count()
        if count > 1:
            yield f"L1 the row of {step} stands {count} times"


def _keys(calls: Sequence[Entry]) -> Iterator[str]:
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    for call in calls:
        keys[call.step, call.action].add(call.key)
    for (step, action), known in keys.items():
        if len(known) > 1:
            yield f"L2 {action} of {step} was called with {len(known)} keys"
    if len({key for known in keys.values() for key in known}) < len(keys):
        yield "L2 two actions share a key"


def _effects(execution: SagaExecution, database: str, calls: Sequence[Entry]) -> Iterator[str]:
    last = {call.step: call.action for call in calls}
    stands = {step for step, action in last.items() if action == "act"}
    stands |= {step for step in ROWS if groups(database, execution.id, step).exists()}
    expected = JUDGED[execution.saga].stands if execution.status == "COMPLETED" else frozenset()
    if execution.status == "STUCK":
        hidden = {step for step in stands if step not in execution.stuck_reason}
        if hidden:
            yield f"L3 is STUCK and does not name {sorted(hidden)}, which stand"
    elif stands != expected:
        yield f"L3 {sorted(stands)} stand where {sorted(expected)} should"


def _order(calls: Sequence[Entry], records: Sequence[SagaStepRecord]) -> Iterator[str]:
    acted = list(dict.fromkeys(r.step for r in records if r.action == "act"))
    for undone in (
        [r.step for r in records if r.action == "compensate" and r.outcome == "DONE"],
        list(dict.fromkeys(call.step for call in calls if call.action == "compensate")),
    ):
        positions = [acted.index(step) for step in undone]
        if positions != sorted(positions, reverse=True):
            yield f"L4 acted {acted}, undone {undone}"


def _history(records: Sequence[SagaStepRecord], signalled: Sequence[Entry]) -> Iterator[str]:
    attempts: dict[tuple[str, str], list[int]] = defaultdict(list)
    for record in records:
        attempts[record.step, record.action].append(record.attempt)
    for (step, action), numbers in attempts.items():
        if numbers != list(range(1, len(numbers) + 1)):
            yield f"L5 {action} of {step} has the attempts {numbers}"
    tokens = [record.token for record in records]
    if tokens != sorted(tokens):
        yield f"L5 the tokens are {tokens}"
    if len(signalled) > 1:
        yield f"L5 {len(signalled)} ends were signalled"
