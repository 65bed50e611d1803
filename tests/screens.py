"""Every screen of the console, over executions in every state."""

from __future__ import annotations

from collections.abc import Iterable

from django.contrib.auth.models import User
from django.urls import reverse

from django_saga import batches, operations
from django_saga.models import SagaAuditEntry, SagaBatch, SagaExecution, SagaPause
from django_saga.operations import BULK, RETRY
from django_saga.operations.verbs import CANCEL
from tests.operated import POSSIBLE, STATES, TripSaga, guarded_trip


def seed(user: User, *, reason: str = "the bank is back") -> dict[str, SagaExecution]:
    """An execution in each state, by its name, and what operators did."""
    found = {name: make() for name, make in STATES.items()}
    found["guarded"] = guarded_trip()
    asked = {"user": user, "reason": reason}
    operations.pause(TripSaga.name, "Leave", **asked)
    group = SagaExecution.objects.get(pk=found["stuck"].pk).failure_group
    operations.note(group, f"Known: {reason}", user=user)
    rows = SagaExecution.objects.exclude(pk__in=[found[name].pk for name in ("failed", "stuck")])
    for verb, allowed in ((RETRY, 1), (CANCEL, None), (RETRY, None)):
        batches.create(verb, rows, **asked, title=f"many: {reason}", allowed=allowed, rate=100.0)
        batches.work(seconds=600)
    return found


def addresses(found: dict[str, SagaExecution], states: Iterable[str] = ()) -> dict[str, str]:
    """Each screen's address, by a name for it; executions in these states only, if any."""
    group = found["failed"].failure_group
    screens = {
        "index": reverse("admin:index"),
        "overview": reverse("admin:app_list", args=["django_saga"]),
        "list": at("sagaexecution"),
        "list of all": at("sagaexecution") + "?status=all",
        "list of a group": at("sagaexecution") + f"?group={group}",
        "export": at("sagaexecution", "export") + "?status=all",
        "groups": at("sagafailuregroup"),
        "batches": at("sagabatch"),
        "audit": at("sagaauditentry"),
        "pauses": at("sagapause"),
        "pause": at("sagapause", "pause"),
        "resume": at("sagapause", "resume", SagaPause.objects.all()[0].pk),
    }
    for number, entry in enumerate(SagaAuditEntry.objects.order_by("pk")[:3]):
        screens[f"audit entry {number}"] = at("sagaauditentry", "change", entry.pk)
    for name in ("failed", "stuck"):
        screens[f"group of {name}"] = at(
            "sagafailuregroup", "change", SagaExecution.objects.get(pk=found[name].pk).failure_group
        )
    for batch in SagaBatch.objects.order_by("created_at"):
        screens[f"batch {batch.verb} {batch.status}"] = at("sagabatch", "change", batch.pk)
    for name in states or found:
        screens[f"execution {name}"] = at("sagaexecution", "change", found[name].pk)
    for verb, states in POSSIBLE.items():
        state = "guarded" if verb == "edit_context" else min(states)
        screens[f"verb {verb}"] = at("sagaexecution", verb, found[state].pk)
    screens["verb refused"] = at("sagaexecution", "cancel", found["completed"].pk)
    for verb in BULK:
        screens[f"many {verb}"] = at("sagaexecution", f"{verb}_many") + "?status=all"
    return screens


def at(model: str, page: str = "changelist", *args: object) -> str:
    """The address of a page of the admin."""
    return reverse(f"admin:django_saga_{model}_{page}", args=args or None)
