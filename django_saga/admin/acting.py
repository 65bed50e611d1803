"""Acting on executions: what a confirmation says, the doing, and what is said of it afterwards.

The time of a request bounds it. Where executions are driven in this process, that is done for the
first seconds only; further ones are stored, and left to ``recover_sagas``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from django.db.models import Count, QuerySet
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from django_saga.backends import get_backend
from django_saga.exceptions import SagaError
from django_saga.models import SagaExecution
from django_saga.operations import RETRY, Verb
from django_saga.texts import told, traced
from django_saga.verdicts import Verdict, stands_at

logger = logging.getLogger("django_saga.admin")

Executions = QuerySet[SagaExecution]
Done = Callable[[SagaExecution, SagaExecution], object]
Counts = list[tuple[Verdict, int]]

LATER = 1.0  # seconds; what begins later is not driven by the request that stores it
LIMIT = 10_000  # executions that one request looks at
REASONS = 8  # that a summary names
GROUPS = 10  # that a confirmation shows


@dataclass
class Preview:
    """How many executions a verb can be done to, and how many not, by verdict."""

    possible: Counts
    others: Counts
    groups: list[dict[str, Any]]
    """The largest groups of equal saga, step and error type, among those that it can be done to."""

    @property
    def count(self) -> int:
        """How many it can be done to."""
        return sum(number for _, number in self.possible)


def preview(verb: Verb, executions: Executions) -> Preview:
    """Look at what a verb would do to these executions."""
    rows = executions.order_by().annotate(verdict=verb.verdict())
    numbers = rows.values_list("verdict").annotate(number=Count("pk"))
    counts = sorted((Verdict(verdict), number) for verdict, number in numbers)
    able = rows.filter(verdict__in=verb.possible).annotate(at=stands_at())
    groups = able.values("saga", "at", "error_type").annotate(number=Count("pk"))
    return Preview(
        possible=[(v, n) for v, n in counts if v in verb.possible],
        others=[(v, n) for v, n in counts if v not in verb.possible],
        groups=list[Any](groups.order_by("-number", "saga", "at", "error_type")[:GROUPS]),
    )


@dataclass
class Tally:
    """What came of acting on several executions."""

    verb: Verb
    became: Counter[str] = field(default_factory=Counter)  # by status
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    skipped: Counts = field(default_factory=list)  # known before
    left: int = 0  # to recover_sagas
    untouched: int = 0
    last: SagaExecution | None = None

    @property
    def done(self) -> int:
        """How many it was done to."""
        return self.became.total()


def perform(
    verb: Verb,
    executions: Executions,
    *,
    user: Any,
    seen: datetime,
    drive_seconds: float,
    seconds: float,
    done: Done,
) -> Tally:
    """Do it to each execution that has not changed since it was ``seen``; never to one twice.

    What is driven in this process is driven for ``drive_seconds``, what is only stored or handed
    over for ``seconds``. ``done`` is called with the execution as it was and what came of it.
    """
    unchanged = executions.filter(updated_at__lte=seen)
    tally = Tally(verb, skipped=preview(verb, unchanged).others)
    changed = executions.filter(updated_at__gt=seen).count()
    if changed:
        tally.refused[_("changed since you looked")] = changed
    able = unchanged.annotate(verdict=verb.verdict()).filter(verdict__in=verb.possible)
    rows = list(able.only("saga", "status", "token").order_by("created_at", "pk")[: LIMIT + 1])
    drives = not get_backend().queues
    began = time.monotonic()
    for number, execution in enumerate(rows):
        spent = time.monotonic() - began
        if spent >= seconds or number == LIMIT:
            tally.untouched = len(rows) - number
            break
        later = drives and spent >= drive_seconds
        if later and verb is not RETRY:  # it is due already: there is nothing to store
            tally.left = len(rows) - number
            break
        _do(tally, execution, user, later, done)
    return tally


def _do(tally: Tally, execution: SagaExecution, user: Any, later: bool, done: Done) -> None:
    verb = tally.verb
    options: dict[str, Any] = {"user": user}
    if verb is RETRY:
        options |= {"status": execution.status, "delay": LATER if later else 0.0}
    try:
        result = verb.function(execution.pk, **options)
    except SagaError as error:
        tally.refused[_without_name(error, execution)] += 1
        return
    except Exception as error:
        logger.error("%s of saga %s failed: %s", verb.name, execution, traced(error))
        tally.refused[f"{type(error).__name__}: {told(error)}"] += 1
        return
    tally.became[result.status] += 1
    tally.left += later
    tally.last = result
    done(execution, result)


def _without_name(error: SagaError, execution: SagaExecution) -> str:
    """The reason alone, so that equal ones are counted together."""
    return told(error).replace(f"Saga {execution.saga} {execution.pk} ", "").strip()


def summary(tally: Tally) -> list[str]:
    """What came of it, in a few sentences; the first says what was done."""
    labels = dict(SagaExecution.Status.choices)
    if tally.verb is RETRY:
        done = ngettext("%(n)s execution was retried", "%(n)s executions were retried", tally.done)
    else:
        done = ngettext(
            "%(n)s execution was recovered", "%(n)s executions were recovered", tally.done
        )
    texts = [done % {"n": tally.done}]
    if tally.became:
        now = ", ".join(f"{number} {labels[status]}" for status, number in tally.became.items())
        texts[0] += _("; now %(now)s") % {"now": now}
    texts[0] += "."
    skipped = [f"{number} {verdict.label}" for verdict, number in tally.skipped]
    skipped += [f"{number}: {why[:300]}" for why, number in tally.refused.most_common(REASONS)]
    further = sum(number for _, number in tally.refused.most_common()[REASONS:])
    if further:
        skipped.append(_("%(n)s for other reasons") % {"n": further})
    if skipped:
        texts.append(_("Skipped: %(why)s.") % {"why": "; ".join(skipped).rstrip(".")})
    if tally.left:
        texts.append(
            _("%(n)s of them are left to recover_sagas: this request's time was over.")
            % {"n": tally.left}
        )
    if tally.untouched:
        texts.append(_("More were not touched: this request's time was over. Do it once more."))
    return texts
