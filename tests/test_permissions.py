"""Who may see and do what: every screen and every command, for every kind of user.

A screen is one line of :data:`SCREENS`. From it come its cases: who is not logged in, who has no
permission, who has all but one of those that it takes, who has just those, a superuser, one from
whom the execution is hidden, and one whom the project's own hook refuses. What is refused must have
done nothing; what is allowed must have done what it says.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.exceptions import PermissionDenied
from django.core.management import CommandError, call_command
from django.http import HttpResponse
from django.test import Client
from django.utils import timezone

from django_saga import SagaError, batches
from django_saga.models import (
    SagaAuditEntry,
    SagaBatch,
    SagaExecution,
    SagaFailureGroup,
    SagaPause,
    SagaStepRecord,
)
from django_saga.operations import BULK, VERBS, pause, resume
from tests.operated import POSSIBLE, STATES, WORLD, TripSaga, arguments, changed, failed_trip

TRIP = "tests.TripSaga"
BASE = "/admin/django_saga"
ONE = BASE + "/sagaexecution/{id}"
VIEW = "view_sagaexecution"
SECRET = "Ada Lovelace of London"


@dataclass(frozen=True)
class Screen:
    """A request, and the permissions that it takes; ``{id}`` is the execution's."""

    name: str
    path: str
    needs: tuple[str, ...] = (VIEW,)
    method: str = "get"
    data: Callable[[SagaExecution], dict[str, Any]] = lambda execution: {}
    state: str = "failed"  # of the execution, see operated.STATES
    does: str = ""  # the verb of the audit entry that it leaves
    one: bool = False  # it is about one execution, and not there where that is hidden
    hooked: bool = False  # the project's own hook is asked about the execution
    alternatives: tuple[str, ...] = field(default=())  # permissions of which each would do, alone

    def request(self, client: Client, execution: SagaExecution) -> HttpResponse:
        path = self.path.format(
            id=execution.pk,
            group=execution.failure_group,
            pause=getattr(SagaPause.objects.first(), "pk", 0),
            batch=getattr(SagaBatch.objects.first(), "pk", uuid.UUID(int=0)),
        )
        send = getattr(client, self.method)
        response: HttpResponse = send(path, self.data(execution))
        if getattr(response, "streaming", False):
            b"".join(response.streaming_content)  # type: ignore[attr-defined]
        return response


def verb_form(verb: str) -> Callable[[SagaExecution], dict[str, Any]]:
    def data(execution: SagaExecution) -> dict[str, Any]:
        return {"token": execution.token, "reason": "planned", **arguments(verb, execution)}

    return data


def many_form(execution: SagaExecution) -> dict[str, Any]:
    asked = {"reason": "planned", "rate": "5", "allowed": "all", "scope": "selected"}
    return {**asked, "_selected_action": [str(execution.pk)], "seen": timezone.now().isoformat()}


def right(verb: str) -> tuple[str, ...]:
    own = VERBS[verb].permission.removeprefix("django_saga.")
    context = ("view_context_sagaexecution",) if verb == "edit_context" else ()
    return (VIEW, own, *context)


def state_for(verb: str) -> str:
    return sorted(POSSIBLE[verb])[-1]


EXPORT = (VIEW, "export_sagaexecution")
PAUSE = "pause_sagaexecution"
GROUPS = ("view_sagafailuregroup", "change_sagafailuregroup")
PAUSING = {"what": json.dumps([TRIP, ""]), "reason": "the bank is down"}
SCREENS = [
    Screen("the list", f"{BASE}/sagaexecution/"),
    Screen("the list, filtered", f"{BASE}/sagaexecution/?status=FAILED&q={{id}}"),
    Screen("an execution", f"{ONE}/change/", one=True),
    Screen("an execution, unmasked", f"{ONE}/context/", (VIEW, "view_context_sagaexecution"),
           "post", does="view_context", one=True),
    Screen("export, asked", f"{BASE}/sagaexecution/export/", EXPORT),
    Screen("export as CSV", f"{BASE}/sagaexecution/export/", EXPORT, "post",
           lambda _: {"format": "csv"}, does="export"),
    Screen("export as JSON", f"{BASE}/sagaexecution/export/", EXPORT, "post",
           lambda _: {"format": "json"}, does="export"),
    Screen("export with contexts", f"{BASE}/sagaexecution/export/",
           (*EXPORT, "view_context_sagaexecution"), "post",
           lambda _: {"format": "json", "contexts": "1"}, does="export"),
    *(
        Screen(f"{verb}, asked", f"{ONE}/{verb}/", right(verb), state=state_for(verb), one=True)
        for verb in VERBS
    ),
    *(
        Screen(f"{verb}, done", f"{ONE}/{verb}/", right(verb), "post", verb_form(verb),
               state_for(verb), does=verb, one=True, hooked=True)
        for verb in VERBS
    ),
    *(
        Screen(f"{verb} many, asked", f"{BASE}/sagaexecution/{verb}/", right(verb),
               state=state_for(verb))
        for verb in BULK
    ),
    *(
        Screen(f"{verb} many, done", f"{BASE}/sagaexecution/{verb}/", right(verb), "post",
               many_form, state_for(verb), does="create_batch")
        for verb in BULK
    ),
    Screen("batches", f"{BASE}/sagabatch/"),
    Screen("a batch", f"{BASE}/sagabatch/{{batch}}/change/", (VIEW, "view_sagabatch")),
    Screen("groups", f"{BASE}/sagafailuregroup/", alternatives=GROUPS),
    Screen("a group", f"{BASE}/sagafailuregroup/{{group}}/change/", alternatives=GROUPS,
           one=True),
    Screen("a group, noted", f"{BASE}/sagafailuregroup/{{group}}/change/",
           ("change_sagafailuregroup",), "post", lambda _: {"note": "ask the bank"},
           does="note", one=True),
    Screen("the audit", f"{BASE}/sagaauditentry/", ("view_sagaauditentry",)),
    Screen("pauses", f"{BASE}/sagapause/", alternatives=("view_sagapause", PAUSE)),
    Screen("pause, asked", f"{BASE}/sagapause/pause/", (PAUSE,)),
    Screen("pause, done", f"{BASE}/sagapause/pause/", (PAUSE,), "post", lambda _: PAUSING,
           does="pause"),
    Screen("resume, asked", f"{BASE}/sagapause/{{pause}}/resume/", (PAUSE,)),
    Screen("resume, done", f"{BASE}/sagapause/{{pause}}/resume/", (PAUSE,), "post",
           lambda _: {"reason": "it is back"}, does="resume"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _editable(alone: None, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TripSaga, "context_editable", True)
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.cache"  # hundreds log in


def scene(screen: Screen) -> SagaExecution:
    """What the screen is about; nothing of it counts as done by who is asked about."""
    execution = STATES[screen.state]()
    if "{batch}" in screen.path:
        rows = SagaExecution.objects.filter(pk=execution.pk)
        batches.create(VERBS["retry"], rows, user=None, reason="planned", title="all")
    if "{pause}" in screen.path:
        pause("tests.GuardedSaga")
    SagaAuditEntry.objects.all().delete()
    WORLD.reset()
    return changed(execution)


def staff(permissions: tuple[str, ...] = (), **kwargs: Any) -> Client:
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True, **kwargs)
    found = list(Permission.objects.filter(codename__in=permissions))
    assert len(found) == len(permissions)
    user.user_permissions.add(*found)
    client = Client()
    client.force_login(user)
    return client


def all_but(permission: str) -> tuple[str, ...]:
    ours = Permission.objects.filter(content_type__app_label="django_saga")
    return tuple(ours.exclude(codename=permission).values_list("codename", flat=True))


def what_is_there(execution: SagaExecution) -> Any:
    """All that a screen could have changed, beside refusals in the audit."""
    return (
        SagaExecution.objects.filter(pk=execution.pk).values().get(),
        SagaExecution.objects.count(),
        SagaBatch.objects.count(),
        list(SagaPause.objects.values_list("saga", "step")),
        list(SagaFailureGroup.objects.values("note", "muted_until")),
        SagaAuditEntry.objects.exclude(result="refused").count(),
        list(WORLD.calls),
    )


def done(screen: Screen) -> list[str]:
    return list(SagaAuditEntry.objects.filter(result="done").values_list("verb", flat=True))


def assert_allowed(screen: Screen, response: HttpResponse) -> None:
    assert response.status_code in (200, 302), response.content.decode()
    assert not response.get("Location", "").startswith("/admin/login/")
    if screen.does:
        assert screen.does in done(screen)
    else:
        assert response.status_code == 200
        assert done(screen) == []


every_screen = pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.name)


@every_screen
def test_who_is_not_logged_in_is_led_to_the_login(screen: Screen) -> None:
    execution = scene(screen)
    before = what_is_there(execution)
    response = screen.request(Client(), execution)
    assert response.status_code == 302
    assert response["Location"].startswith("/admin/login/")
    assert what_is_there(execution) == before


@every_screen
def test_who_is_no_staff_has_no_use_of_permissions(screen: Screen) -> None:
    execution = scene(screen)
    client = staff(all_but(""))
    User.objects.update(is_staff=False)
    before = what_is_there(execution)
    assert screen.request(client, execution)["Location"].startswith("/admin/login/")
    assert what_is_there(execution) == before


@every_screen
def test_who_has_no_permission_is_refused(screen: Screen) -> None:
    execution = scene(screen)
    before = what_is_there(execution)
    assert screen.request(staff(), execution).status_code == 403
    assert what_is_there(execution) == before


@pytest.mark.parametrize(
    ("screen", "lacking"),
    [
        pytest.param(screen, lacking, id=f"{screen.name} without {lacking}")
        for screen in SCREENS
        if not screen.alternatives
        for lacking in screen.needs
    ],
)
def test_who_has_all_permissions_but_one_that_it_takes_is_refused(
    screen: Screen, lacking: str
) -> None:
    """And what was tried, rather than looked at, is in the audit."""
    execution = scene(screen)
    before = what_is_there(execution)
    # Of another's batch one is not even told that it is there.
    refused = 404 if lacking == "view_sagabatch" else 403
    assert screen.request(staff(all_but(lacking)), execution).status_code == refused
    assert what_is_there(execution) == before
    if screen.does and lacking != VIEW:
        assert SagaAuditEntry.objects.filter(result="refused", verb=screen.does).count() == 1


@pytest.mark.parametrize(
    ("screen", "permissions"),
    [
        pytest.param(screen, permissions, id=f"{screen.name} with {' '.join(permissions)}")
        for screen in SCREENS
        for permissions in [(a,) for a in screen.alternatives] or [screen.needs]
    ],
)
def test_who_has_just_what_it_takes_is_allowed(
    screen: Screen, permissions: tuple[str, ...]
) -> None:
    execution = scene(screen)
    assert_allowed(screen, screen.request(staff(permissions), execution))


@every_screen
def test_a_superuser_is_allowed(screen: Screen) -> None:
    execution = scene(screen)
    assert_allowed(screen, screen.request(staff(is_superuser=True), execution))


@every_screen
def test_nobody_sees_or_changes_what_is_hidden_from_them(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the project's own get_queryset() leaves the execution out, posted ids do not help."""
    execution = scene(screen)
    model_admin = type(admin.site.get_model_admin(SagaExecution))
    whole = model_admin.get_queryset
    monkeypatch.setattr(
        model_admin,
        "get_queryset",
        lambda self, request: whole(self, request).exclude(pk=execution.pk),
    )
    row = SagaExecution.objects.filter(pk=execution.pk).values().get()
    response = screen.request(staff(is_superuser=True), execution)
    if screen.one:
        assert response.status_code == 404
    if not getattr(response, "streaming", False) and "q=" not in screen.path:
        assert str(execution.pk) not in response.content.decode().replace(f"/{execution.pk}/", "")
        assert f"/sagaexecution/{execution.pk}/" not in response.content.decode()
    assert SagaExecution.objects.filter(pk=execution.pk).values().get() == row
    assert WORLD.calls == []


@pytest.mark.parametrize("screen", [s for s in SCREENS if s.hooked], ids=lambda s: s.name)
def test_whom_the_projects_own_hook_refuses_nothing_is_done_for(
    screen: Screen, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"AUTHORIZE": lambda user, verb, execution: False}
    execution = scene(screen)
    before = what_is_there(execution)
    response = screen.request(staff(is_superuser=True), execution)
    assert response.status_code in (200, 403)
    assert what_is_there(execution) == before
    assert SagaAuditEntry.objects.filter(result="refused", verb=screen.does).count() == 1


@pytest.mark.parametrize("verb", BULK)
def test_a_batch_does_nothing_to_what_the_hook_refuses(verb: str, settings: Any) -> None:
    settings.DJANGO_SAGA = {"AUTHORIZE": lambda user, verb, execution: False}
    screen = next(s for s in SCREENS if s.name == f"{verb} many, done")
    execution = scene(screen)
    row = SagaExecution.objects.filter(pk=execution.pk).values().get()
    screen.request(staff(is_superuser=True), execution)
    assert SagaExecution.objects.filter(pk=execution.pk).values().get() == row
    assert verb not in done(screen)


@pytest.mark.parametrize("verb", BULK)
def test_a_batch_acts_as_its_user_may_when_it_runs(verb: str) -> None:
    """Who has lost the permission meanwhile, or is locked out, has nothing more done."""
    execution = STATES[state_for(verb)]()
    for change in ("permission", "active"):
        user = User.objects.create_user(f"op-{change}", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=right(verb)))
        rows = SagaExecution.objects.filter(pk=execution.pk)
        user = User.objects.get(pk=user.pk)
        batch = batches.create(VERBS[verb], rows, user=user, reason="planned", title="one")
        if change == "permission":
            user.user_permissions.clear()
        else:
            User.objects.filter(pk=user.pk).update(is_active=False)
        row = rows.values().get()
        assert batches.work(batch.pk, seconds=60)["done"] == 0
        assert rows.values().get() == row
        assert WORLD.calls == []


@pytest.mark.parametrize("screen", [s for s in SCREENS if s.method == "post"], ids=lambda s: s.name)
def test_without_a_csrf_token_nothing_is_done(screen: Screen) -> None:
    execution = scene(screen)
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.create_superuser("root"))
    before = what_is_there(execution)
    assert screen.request(client, execution).status_code == 403
    assert what_is_there(execution) == before


@pytest.mark.parametrize("screen", [s for s in SCREENS if s.does], ids=lambda s: s.name)
def test_a_get_changes_nothing(screen: Screen) -> None:
    execution = scene(screen)
    before = what_is_there(execution)
    get = Screen(screen.name, screen.path, data=screen.data)
    get.request(staff(is_superuser=True), execution)
    assert what_is_there(execution) == before


def test_every_address_of_the_console_is_in_the_matrix() -> None:
    """What is new must say who may: by one line in SCREENS, or here."""
    elsewhere = {"add", "history", "delete", "job", "steer", "sagaauditentry_change"}
    elsewhere |= {"sagapause_change", "None"}
    known = [screen.path.split("?")[0] for screen in SCREENS]
    for model, model_admin in admin.site._registry.items():
        if model._meta.app_label != "django_saga":
            continue
        for url in model_admin.get_urls():
            name = str(url.name).removeprefix("django_saga_")
            if name in elsewhere or name.split("_", 1)[-1] in elsewhere:
                continue
            path = f"{BASE}/{model._meta.model_name}/{url.pattern}"
            blank = [p.replace("{", "<").replace("}", ">") for p in known]
            assert any(_shape(path) == _shape(other) for other in blank), name


def _shape(path: str) -> str:
    return "/".join("*" if part.startswith("<") else part for part in path.split("/"))


@pytest.mark.parametrize("model", ["sagaexecution", "sagabatch", "sagaauditentry", "sagapause"])
@pytest.mark.parametrize("page", ["add", "{id}/delete"])
def test_nothing_is_added_or_deleted_not_even_by_a_superuser(model: str, page: str) -> None:
    execution = failed_trip()
    address = f"{BASE}/{model}/{page.format(id=execution.pk)}/"
    client = staff(is_superuser=True)
    for response in (client.get(address), client.post(address, {"post": "yes"})):
        assert response.status_code in (302, 403, 404)
    assert SagaExecution.objects.filter(pk=execution.pk).exists()


def test_contexts_and_tracebacks_take_permissions_of_their_own() -> None:
    execution = changed(failed_trip(traveller=SECRET))
    SagaStepRecord.objects.filter(execution=execution).update(traceback="Traceback of Ada's own")
    for permissions, context, trace in [
        ((VIEW,), False, False),
        ((VIEW, "view_context_sagaexecution"), True, False),
        ((VIEW, "view_traceback_sagaexecution"), False, True),
    ]:
        response = staff(permissions).get(ONE.format(id=execution.pk) + "/change/")
        html = response.content.decode()
        assert (SECRET in html) is context
        assert ("Traceback of Ada" in html) is trace


# The shell


@dataclass(frozen=True)
class Command:
    """A command line, and the permissions that its --user must have."""

    line: tuple[str, ...]
    needs: str
    state: str = "failed"
    verb: str = ""


def command_line(verb: str) -> tuple[str, ...]:
    own: dict[str, tuple[str, ...]] = {
        "mark_done": ("{step}",),
        "edit_context": ("{file}",),
        "resolve": ("--standing", "{standing}"),
        "abandon": ("--confirm", "{id}"),
    }
    return (verb.replace("_", "-"), "{id}", *own.get(verb, ()), "--reason", "planned")


COMMANDS = [
    Command(("list",), VIEW),
    Command(("show", "{id}"), VIEW),
    Command(("groups",), "view_sagafailuregroup"),
    Command(("audit",), "view_sagaauditentry"),
    Command(("pauses",), "view_sagapause"),
    Command(("pause", TRIP, "--reason", "planned"), PAUSE, verb="pause"),
    *(
        Command(command_line(verb), right(verb)[1], state_for(verb), verb)
        for verb in VERBS
    ),
]  # fmt: skip


def call(command: Command, execution: SagaExecution, tmp_path: Path, user: str) -> str:
    file = tmp_path / "context.json"
    file.write_text(arguments("edit_context", execution)["context"])
    standing = arguments("resolve", execution)["standing"]
    words = [
        word.format(id=execution.pk, step=execution.step, file=file, standing=" ".join(standing))
        for word in command.line
    ]
    out = StringIO()
    call_command("sagas", *words, "--user", user, stdout=out)
    return out.getvalue()


every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.line[0])


@every_command
def test_a_command_for_a_user_does_what_that_user_may(command: Command, tmp_path: Path) -> None:
    execution = STATES[command.state]()
    user = User.objects.create_user("op")
    user.user_permissions.set(Permission.objects.filter(codename=command.needs))
    SagaAuditEntry.objects.all().delete()
    call(command, execution, tmp_path, "op")
    if command.verb:
        entry = SagaAuditEntry.objects.get(result="done", verb=command.verb)
        assert (entry.user_name, entry.source) == ("op", "command")


@every_command
def test_a_command_for_a_user_without_the_permission_is_refused(
    command: Command, tmp_path: Path
) -> None:
    execution = STATES[command.state]()
    user = User.objects.create_user("op", is_staff=True)
    user.user_permissions.set(Permission.objects.exclude(codename=command.needs))
    before = what_is_there(execution)
    with pytest.raises(CommandError):
        call(command, execution, tmp_path, "op")
    assert what_is_there(execution) == before


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.verb in VERBS], ids=lambda c: c.verb)
def test_a_command_asks_the_projects_own_hook(
    command: Command, tmp_path: Path, settings: Any
) -> None:
    settings.DJANGO_SAGA = {"AUTHORIZE": lambda user, verb, execution: False}
    execution = STATES[command.state]()
    User.objects.create_superuser("root")
    before = what_is_there(execution)
    with pytest.raises(CommandError):
        call(command, execution, tmp_path, "root")
    assert what_is_there(execution) == before


# The functions


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("who", ["nobody", "view only", "inactive superuser"])
def test_a_function_called_for_a_user_looks_at_the_permission_itself(verb: str, who: str) -> None:
    execution = STATES[state_for(verb)]()
    user: Any = AnonymousUser()
    if who == "view only":
        user = User.objects.create_user("op", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename=VIEW))
    elif who == "inactive superuser":
        user = User.objects.create_superuser("root", is_active=False)
    before = what_is_there(execution)
    with pytest.raises(PermissionDenied):
        VERBS[verb].function(
            execution.pk, **arguments(verb, execution), user=user, reason="planned"
        )
    assert what_is_there(execution) == before


def test_to_resume_takes_the_permission_too() -> None:
    pause(TRIP)
    with pytest.raises(PermissionDenied):
        resume(TRIP, user=AnonymousUser())
    with pytest.raises(SagaError):
        pause(TRIP, user=User.objects.create_superuser("root"))
