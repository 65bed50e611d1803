"""What a verb would do to many executions: to how many, what will run, and to which it cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from django.db.models import QuerySet
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from django_saga.admin.formats import name
from django_saga.models import SagaExecution
from django_saga.operations import Verb
from django_saga.verdicts import Verdict, stands_at

CAP = 10_000  # executions that are counted
GROUPS = 10  # that are shown


@dataclass(frozen=True)
class Group:
    """Some that are equal in what matters."""

    number: int
    saga: str
    step: str
    error_type: str
    will_run: str

    @property
    def name(self) -> SafeString:
        """The saga, which may be broken where its words begin."""
        return name(self.saga)


@dataclass(frozen=True)
class Preview:
    """How many executions a verb can be done to, and how many not, by verdict: each in words."""

    possible: list[tuple[str, int]]
    others: list[tuple[str, int]]
    groups: list[Group]
    """The largest groups of those that it can be done to."""
    further: int
    """How many groups are not shown."""
    capped: bool
    """Whether there are more of those than were counted."""
    others_capped: bool

    @property
    def count(self) -> int:
        """How many it can be done to, of those that were counted."""
        return sum(number for _, number in self.possible)

    @property
    def shown(self) -> str:
        """The same in words."""
        return f"{self.count:,}{'+' if self.capped else ''}"


def preview(verb: Verb, executions: QuerySet[SagaExecution]) -> Preview:
    """Look at what a verb would do to these executions; two queries, each for ``CAP`` of them."""
    rows = executions.order_by("-created_at").annotate(verdict=verb.verdict(), at=stands_at())
    columns = ("verdict", "saga", "at", "action", "error_type")
    able = list(verb.fit(rows).values_list(*columns)[: CAP + 1])
    unable = rows.exclude(verdict__in=verb.possible).values_list("verdict", flat=True)
    others = list(unable[: CAP + 1])
    kinds: Counter[Any] = Counter(_kind(*row) for row in able[:CAP])
    largest = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    return Preview(
        possible=_counted(row[0] for row in able[:CAP]),
        others=_counted(others[:CAP]),
        groups=[Group(number, *kind) for kind, number in largest[:GROUPS]],
        further=max(len(largest) - GROUPS, 0),
        capped=len(able) > CAP,
        others_capped=len(others) > CAP,
    )


def _counted(verdicts: Iterable[str]) -> list[tuple[str, int]]:
    counts = sorted(Counter(verdicts).items())
    return [(Verdict(verdict).of(number), number) for verdict, number in counts]


def _kind(verdict: str, saga: str, step: str, action: str, error: str) -> tuple[str, ...]:
    return saga, step, error, will_run(Verdict(verdict), step, action)


def will_run(verdict: Verdict, step: str, action: str) -> str:
    """What a verb does to executions under this verdict that stand at this step."""
    facts = {"step": step, "action": action}
    match verdict:
        case Verdict.ANEW:
            return _("A new execution: act of its first step, with a key of its own.")
        case Verdict.AGAIN:
            return _("Compensation of what stands, in reverse order, with the same keys.")
        case Verdict.NOW:
            return _("Compensation of what is done, in reverse order; then it has failed.")
        case Verdict.SOON:
            return _("It turns back when the step in hand has ended, and undoes what is done.")
        case Verdict.FORWARD:
            return _("act of %(step)s once more, with the same key.") % facts
        case Verdict.ON:
            return _("%(action)s of %(step)s goes on, with the same key.") % facts
    return ""
