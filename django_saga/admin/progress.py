"""How far a batch has come, and what became of the executions that it was done to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from django.db.models import Count, OuterRef, QuerySet, Subquery
from django.utils.translation import gettext as _

from django_saga.machine import ACTIVE
from django_saga.models import SagaBatch, SagaBatchItem, SagaExecution
from django_saga.operations import RETRY
from django_saga.operations.verbs import CANCEL

State = SagaBatchItem.State
Status = SagaExecution.Status

CAP = 10_000  # items whose results are looked at, the latest
REASONS = 10  # that are named
ITEMS = 100  # on a page


@dataclass(frozen=True)
class Fate:
    """What became of some."""

    kind: str  # for its colour
    label: str
    number: int


@dataclass(frozen=True)
class Progress:
    """What a batch's page tells of its items."""

    total: int
    waiting: int
    done: int
    skipped: int
    fates: list[Fate]
    """Of those that it was done to, the latest ``CAP``."""
    reasons: list[tuple[str, int]]
    """Why some were skipped, the most frequent first."""
    further: int
    """How many were skipped for reasons that are not named."""
    capped: bool
    """Whether there are more results than were looked at."""

    @property
    def tried(self) -> int:
        """How many it was tried on."""
        return self.done + self.skipped


def progress(batch: SagaBatch) -> Progress:
    """Three queries, each about at most ``CAP`` rows but the count of the batch's own items."""
    rows = SagaBatchItem.objects.using(batch._state.db).filter(batch=batch)
    states = dict(rows.order_by().values_list("state").annotate(number=Count("pk")))
    done = with_results(rows.filter(state=State.DONE)).order_by("-pk")
    results = list(done.values_list("status", "now")[:CAP])
    fates = Counter(fate(batch.verb, was, now) for was, now in results)
    skipped = rows.filter(state=State.SKIPPED).order_by("-pk")
    reasons = Counter(skipped.values_list("why", flat=True)[:CAP])
    named = reasons.most_common(REASONS)
    labels = _labels()
    return Progress(
        total=batch.total,
        waiting=states.get(State.WAITING, 0),
        done=states.get(State.DONE, 0),
        skipped=states.get(State.SKIPPED, 0),
        fates=[Fate(kind, label, fates[kind]) for kind, label in labels.items() if fates[kind]],
        reasons=named,
        further=reasons.total() - sum(number for _why, number in named),
        capped=states.get(State.DONE, 0) > CAP,
    )


def with_results(items: QuerySet[SagaBatchItem]) -> QuerySet[Any]:
    """The items with the present status of what came of each, as ``now``."""
    results = SagaExecution.objects.filter(pk=OuterRef("result_id")).values("status")
    return items.annotate(now=Subquery(results[:1]))


def fate(verb: str, was: str, now: str | None) -> str:
    """What became of one that was done: ``was`` is its status when it was selected."""
    if now is None:
        return "gone"
    if now in ACTIVE:
        return "running"
    if now == Status.FAILED:
        undone = verb == CANCEL.name or (verb == RETRY.name and was == Status.STUCK)
        return "undone" if undone else "failed"
    return "stuck" if now == Status.STUCK else "completed"


def _labels() -> dict[str, str]:
    """In the order in which they are told: the worst first."""
    return {
        "stuck": _("stuck"),
        "failed": _("failed again"),
        "running": _("still running"),
        "undone": _("all undone"),
        "completed": _("completed"),
        "gone": _("not there any more"),
    }
