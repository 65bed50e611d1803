"""A driver that is held up, taken over meanwhile, and goes on: what it does wrong then.

It may write nothing more. One late call cannot be kept from it: of the action that was in flight
when it was held up, if that was after its lease was checked and before its call was made. No
database can fence that off; the service called can, by the key, which is the same. Exactly this
call is no wrong here, unless the lease was checked after it had run out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from django_saga import LeaseLost
from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution
from tests.faults.children import wait_for
from tests.faults.driving import GAVE_UP
from tests.faults.ledger import Entry
from tests.faults.victims import Victim

Wake = Callable[[], int | str]
"""Lets the driver go on, and waits for its end: the exit status."""


def outlive(victim: Victim, wake: Wake, *, may_call: bool = True) -> list[str]:
    """Have another process finish the execution, then wake its driver."""
    row = victim.row
    if row is None:  # not stored yet: nobody could take it over
        return wake_first(victim, wake)

    def is_finished() -> bool:
        if not victim.has_ended:
            victim.recover()
        return victim.has_ended

    # A driver that is held up elsewhere than in its process may renew its lease meanwhile.
    wait_for(is_finished)
    found, stored, entries = victim.wrongs, victim.stored, victim.entries
    status = wake()
    late = victim.entries[len(entries) :]
    if victim.stored != stored:
        found += ["the zombie wrote", *victim.wrongs]
    found += _late(row, late, may_call)
    expected = GAVE_UP[LeaseLost] if row.status in ACTIVE else 0
    if status != expected:
        found.append(f"the zombie ended with {status}, not {expected}")
    return found


def wake_first(victim: Victim, wake: Wake) -> list[str]:
    """Wake the driver before anybody has taken over: it goes on, or leaves that to others."""
    status = wake()
    victim.recover()
    odd = {status} - {0, GAVE_UP[LeaseLost]}
    return [*victim.wrongs, *(f"it ended with {status}" for status in odd)]


def outwait(victim: Victim, wake: Wake) -> list[str]:
    """Let a process that wants to take over wait for the database, which the driver holds; whoever
    of the two goes on then, it is one."""
    other = victim.start_recovery()
    statuses = [wake(), other.wait()]
    victim.recover()
    odd = set(statuses) - {0, GAVE_UP[LeaseLost]}
    return [*victim.wrongs, *(f"one of the two ended with {status}" for status in odd)]


def _late(row: SagaExecution, late: Sequence[Entry], may_call: bool) -> Iterator[str]:
    if row.status not in ACTIVE:
        # All was stored but not yet told: nobody else has announced this end.
        allowed = [Entry(f"saga_{row.status.lower()}", "signal", f"saga_{row.status.lower()}")]
    elif may_call and row.in_flight:
        allowed = [Entry(row.step, row.action, f"{row.pk}:{row.step}:{row.action}")]
    else:
        allowed = []
    if late and list(late) != allowed:
        yield f"the zombie made late calls: {late}"
