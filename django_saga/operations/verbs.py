"""The verbs: what can be done to an execution, what it takes, and to which ones it can be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db.models import Case, QuerySet
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from django_saga import verdicts
from django_saga.machine import ACTIVE
from django_saga.models import SagaExecution
from django_saga.verdicts import Verdict

Executions = QuerySet[SagaExecution]


@dataclass(frozen=True)
class Verb:
    """One thing that can be done, with all that is to be known before it is."""

    name: str
    """Also the name of its function in :mod:`django_saga.operations`."""
    label: Any
    help: Any
    """What it does, in a sentence."""
    verdict: Callable[[], Case]
    """The expression that gives each execution's :class:`~django_saga.verdicts.Verdict`."""
    possible: tuple[Verdict, ...]
    """The verdicts under which it can be done."""
    alone: tuple[Verdict, ...] = ()
    """The verdicts under which it can be done to one that is asked for by itself, never to many."""
    right: str = "force"
    """Which permission it takes, without the model's name."""
    takes: tuple[str, ...] = ()
    """Arguments of its own: step, context, standing, or the id typed again (confirm)."""
    needs_reason: bool = True
    among: tuple[str, ...] = ()
    """The statuses that allow it at all, for the indexes; given for those that are done to many."""

    @property
    def bulk(self) -> bool:
        """Whether it is done to many at once, too."""
        return bool(self.among)

    @property
    def allowed(self) -> tuple[Verdict, ...]:
        """The verdicts under which it can be done to one that is asked for by itself."""
        return self.possible + self.alone

    def fit(self, executions: Executions) -> Executions:
        """Those of the executions that it can be done to now."""
        rows = executions.filter(status__in=self.among) if self.among else executions
        return rows.alias(fit=self.verdict()).filter(fit__in=self.possible)

    @property
    def permission(self) -> str:
        """The permission that it takes, with its app label."""
        return f"django_saga.{self.right}_sagaexecution"

    @property
    def function(self) -> Callable[..., Any]:
        """What does it."""
        from django_saga import operations

        return getattr(operations, self.name)  # type: ignore[no-any-return]


RETRY = Verb(
    "retry",
    pgettext_lazy("saga verb", "Retry"),
    _("Starts a failed one anew, or tries the compensation of a stuck one again."),
    verdicts.retry_verdict,
    (Verdict.ANEW, Verdict.AGAIN),
    alone=(Verdict.CANCELLED,),
    right="retry",
    needs_reason=False,
    among=("FAILED", "STUCK"),
)
RECOVER = Verb(
    "recover",
    pgettext_lazy("saga verb", "Recover now"),
    _("Drives on, at once, what has lost its driver."),
    verdicts.recover_verdict,
    (Verdict.ON,),
    right="recover",
    needs_reason=False,
    among=tuple(status.value for status in ACTIVE),
)
CANCEL = Verb(
    "cancel",
    pgettext_lazy("saga verb", "Cancel"),
    _("Undoes what is done, in reverse order, and ends it as failed."),
    verdicts.cancel_verdict,
    (Verdict.NOW, Verdict.SOON),
    right="cancel",
    among=("PENDING", "RUNNING"),
)
RESUME_FORWARD = Verb(
    "resume_forward",
    pgettext_lazy("saga verb", "Resume forward"),
    _("Begins the step again at which it got stuck before it had turned back."),
    verdicts.forward_verdict,
    (Verdict.FORWARD,),
    among=("STUCK",),
)
SKIP = Verb(
    "skip",
    pgettext_lazy("saga verb", "Skip step"),
    _("Goes on without the act at which it stands; the reason says how you know that it may."),
    verdicts.skip_verdict,
    (Verdict.FORWARD,),
)
MARK_DONE = Verb(
    "mark_done",
    pgettext_lazy("saga verb", "Mark step done"),
    _("Somebody did by hand what the step was to do, or undid it."),
    verdicts.by_hand_verdict,
    (Verdict.NOW, Verdict.AGAIN),
    takes=("step",),
)
EDIT_CONTEXT = Verb(
    "edit_context",
    pgettext_lazy("saga verb", "Edit context"),
    _("Puts another context in the place of the stored one, if the saga allows that."),
    verdicts.by_hand_verdict,
    (Verdict.NOW, Verdict.AGAIN),
    takes=("context",),
)
RELEASE = Verb(
    "release",
    pgettext_lazy("saga verb", "Release lease"),
    _("Takes the lease from a driver that is known to be dead; recovery goes on at once."),
    verdicts.release_verdict,
    (Verdict.DRIVEN,),
)
RESOLVE = Verb(
    "resolve",
    pgettext_lazy("saga verb", "Resolve"),
    _("Closes a stuck one: you acknowledge each effect that stands."),
    verdicts.resolve_verdict,
    (Verdict.AGAIN,),
    takes=("standing",),
)
ABANDON = Verb(
    "abandon",
    pgettext_lazy("saga verb", "Abandon"),
    _("Ends it where it stands, with nothing compensated."),
    verdicts.abandon_verdict,
    (Verdict.NOW,),
    takes=("confirm",),
)

VERBS = {
    verb.name: verb
    for verb in (
        *(RETRY, RECOVER, CANCEL, RESUME_FORWARD, SKIP, MARK_DONE, EDIT_CONTEXT),
        *(RELEASE, RESOLVE, ABANDON),
    )
}
BULK = {name: verb for name, verb in VERBS.items() if verb.bulk}
