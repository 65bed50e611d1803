"""Each system check: what sets it off, its id, its hint, and that a sound project sets off none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from io import StringIO
from typing import Any
from uuid import UUID

import pytest
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, run_checks
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connections

from django_saga import Saga, SagaContext, SagaStepHandler, backends, registry
from django_saga.checks import check_settings

ALIASES = list(django_settings.DATABASES)


@dataclass
class Sound(SagaContext):
    number: int = 0


class Step(SagaStepHandler[Sound]):
    def act(self, context: Sound) -> None: ...


class Open(SagaStepHandler[Any]):
    def act(self, context: Any) -> None: ...


def messages(*, databases: list[str] | None = None) -> list[CheckMessage]:
    tags = ["django_saga"] if databases is None else ["django_saga", "database"]
    found = run_checks(tags=tags, databases=databases)
    return [message for message in found if str(message.id).startswith("django_saga.")]


def only(*, databases: list[str] | None = None) -> CheckMessage:
    [message] = messages(databases=databases)
    return message


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test knows the sagas alone that it declares."""
    monkeypatch.setattr(registry, "_classes", {})


class RouterTo:
    alias = "default"

    def db_for_write(self, model: Any, **hints: Any) -> str:
        return self.alias


@pytest.fixture
def route_to(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def route(alias: str) -> None:
        monkeypatch.setattr(RouterTo, "alias", alias)
        settings.DATABASE_ROUTERS = [RouterTo()]

    return route


def test_a_sound_project_sets_off_none() -> None:
    class Order(Saga[Sound]):
        steps = [Step]

    assert messages() == []


def test_an_unknown_key_is_an_error_that_lists_the_known_ones(settings: Any) -> None:
    settings.DJANGO_SAGA = {"LAESE": 10, "QUEUE": "sagas"}
    message = only()
    assert (message.id, message.level) == ("django_saga.E001", 40)
    assert "'LAESE'" in message.msg
    assert "LEASE" in str(message.hint)


def test_each_unknown_key_is_told(settings: Any) -> None:
    settings.DJANGO_SAGA = {"b": 1, "a": 1}
    assert [message.id for message in messages()] == ["django_saga.E001"] * 2


def test_keys_that_are_no_texts_are_told_too(settings: Any) -> None:
    settings.DJANGO_SAGA = {"b": 1, 5: 1}
    assert [message.id for message in messages()] == ["django_saga.E001"] * 2


@pytest.mark.parametrize("value", [["LEASE"], "rq", 60])
def test_a_setting_that_is_no_dict_is_an_error(settings: Any, value: Any) -> None:
    settings.DJANGO_SAGA = value
    [message] = check_settings()
    assert message.id == "django_saga.E001"
    assert "must be a dict" in message.msg


@pytest.mark.parametrize("empty", [None, {}])
def test_no_setting_at_all_is_fine(settings: Any, empty: Any) -> None:
    settings.DJANGO_SAGA = empty
    assert messages() == []
    del settings.DJANGO_SAGA
    assert messages() == []


def test_an_unusable_value_is_an_error_that_names_the_key(settings: Any) -> None:
    settings.DJANGO_SAGA = {"LEASE": "a minute"}
    message = only()
    assert message.id == "django_saga.E002"
    assert "'LEASE'" in message.msg
    assert "a minute" in message.msg


@pytest.mark.parametrize(
    "backend",
    ["no.such.Backend", "nothing", "datetime.timedelta", "django_saga.backends.Backends"],
)
def test_a_backend_that_cannot_be_used_is_an_error(settings: Any, backend: str) -> None:
    settings.DJANGO_SAGA = {"BACKEND": backend}
    message = only()
    assert message.id == "django_saga.E003"
    assert repr(backend) in message.msg


def test_a_queue_that_rq_does_not_know_is_an_error_that_names_the_saga(settings: Any) -> None:
    class Order(Saga[Sound]):
        steps = [Step]
        queue = "orders"

    assert messages() == [], "without RQ nobody needs it"
    settings.DJANGO_SAGA = {"BACKEND": "rq"}
    settings.RQ_QUEUES = {"default": {"URL": "redis://"}}
    message = only()
    assert (message.id, message.obj) == ("django_saga.E008", Order)
    assert message.msg == f"The queue 'orders' of {Order.name} is not defined in RQ_QUEUES."
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, "orders": {"URL": "redis://"}}
    assert messages() == []


@pytest.mark.parametrize("backend", [5, None, ["rq"], "uuid.UUID"])
def test_a_backend_that_is_no_text_or_cannot_be_made_is_an_error(
    settings: Any, backend: Any
) -> None:
    settings.DJANGO_SAGA = {"BACKEND": backend}
    assert only().id in ("django_saga.E002", "django_saga.E003")


def test_rq_without_django_rq_names_the_extra(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "django_saga.rq", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "django_rq"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    backends._backend.cache_clear()
    settings.DJANGO_SAGA = {"BACKEND": "rq"}
    message = only()
    assert message.id == "django_saga.E003"
    assert "django-saga[rq]" in str(message.hint)


def test_rq_with_django_rq_passes(settings: Any) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "rq"}
    assert messages() == []


@pytest.mark.parametrize("container", ["no.such.container", "uuid.UUID", 5])
def test_a_container_that_cannot_be_used_is_an_error(settings: Any, container: Any) -> None:
    settings.DJANGO_SAGA = {"CONTAINER": container}
    assert only().id == "django_saga.E002"


@pytest.mark.parametrize("hook", ["no.such.hook", "nothing", "os.sep", 5])
def test_an_authorizer_that_cannot_be_called_is_an_error(settings: Any, hook: Any) -> None:
    settings.DJANGO_SAGA = {"AUTHORIZE": hook}
    message = only()
    assert message.id == "django_saga.E002"
    assert "'AUTHORIZE'" in message.msg


def test_local_times_are_warned_of(settings: Any) -> None:
    settings.USE_TZ = False
    message = only()
    assert (message.id, message.level) == ("django_saga.W001", 30)
    assert "USE_TZ = True" in str(message.hint)


def test_a_name_taken_twice_is_an_error_that_names_both_classes() -> None:
    class First(Saga[Sound]):
        name = "orders"
        steps = [Step]

    class Second(Saga[Sound]):
        name = "orders"
        steps = [Step]

    message = only()
    assert (message.id, message.level, message.obj) == ("django_saga.E004", 40, Second)
    assert "'orders'" in message.msg
    assert "First" in message.msg
    assert "Second" in message.msg
    assert "name of its own" in str(message.hint)
    with pytest.raises(SystemCheckError, match=r"django_saga\.E004"):
        call_command("check", tags=["django_saga"], stderr=StringIO())


def test_a_context_that_cannot_be_stored_is_an_error_of_its_saga() -> None:
    @dataclass
    class Ambiguous(SagaContext):
        value: UUID | date

    globals()["Ambiguous"] = Ambiguous
    try:

        class Doubtful(Saga[Ambiguous]):
            steps = [Open]

        message = only()
    finally:
        del globals()["Ambiguous"]
    assert (message.id, message.obj) == ("django_saga.E005", Doubtful)
    assert "Ambiguous" in message.msg
    assert message.hint


def test_a_context_that_is_no_dataclass_is_an_error_that_says_so() -> None:
    class Plain(SagaContext):
        pass

    class Forgot(Saga[Plain]):
        steps = [Open]

    message = only()
    assert (message.id, message.obj) == ("django_saga.E005", Forgot)
    assert "@dataclass" in message.msg


def test_atomic_steps_are_warned_of_where_the_sagas_have_a_database_of_their_own(
    route_to: Callable[[str], None],
) -> None:
    class Writing(SagaStepHandler[Sound]):
        def act(self, context: Sound) -> None: ...

        atomic = True

    class Plain(Saga[Sound]):
        steps = [Step]

    class Order(Saga[Sound]):
        steps = [Step, Writing]

    assert messages() == []
    route_to("sqlite")
    message = only()
    assert (message.id, message.level, message.obj) == ("django_saga.W002", 30, Order)
    assert "Writing" in message.msg
    assert "'sqlite'" in message.msg
    assert "router" in str(message.hint)


def test_sqlite_with_deferred_transactions_is_warned_of(
    route_to: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    route_to("sqlite")
    assert messages() == [], "the tests' own has IMMEDIATE"
    for mode in ("", "DEFERRED", None):
        options = {} if mode == "" else {"transaction_mode": mode}
        monkeypatch.setitem(connections["sqlite"].settings_dict, "OPTIONS", options)
        message = only()
        assert (message.id, message.level) == ("django_saga.W003", 30)
        assert "'sqlite'" in message.msg
        assert "IMMEDIATE" in str(message.hint)
    for mode in ("immediate", "EXCLUSIVE"):
        options = {"transaction_mode": mode}
        monkeypatch.setitem(connections["sqlite"].settings_dict, "OPTIONS", options)
        assert messages() == []


@pytest.mark.usefixtures("committing_databases")
@pytest.mark.parametrize("alias", ALIASES)
def test_every_database_that_is_supported_passes(
    alias: str, route_to: Callable[[str], None]
) -> None:
    route_to(alias)
    assert messages(databases=[alias]) == []


def test_a_database_that_is_not_supported_is_an_error_where_databases_are_checked(
    route_to: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {**connections.settings["default"], "ENGINE": "django.db.backends.dummy"}
    monkeypatch.setitem(connections.settings, "odd", odd)
    route_to("odd")
    assert messages() == [], "the server is asked only where databases are checked"
    message = only(databases=["odd"])
    assert (message.id, message.level) == ("django_saga.E006", 40)
    assert "'odd'" in message.msg
    assert "PostgreSQL, SQLite or MariaDB" in str(message.hint)
    assert messages(databases=["default"]) == []
    del connections["odd"]


def test_a_step_without_act_is_an_error_that_names_step_and_saga() -> None:
    class Idle(SagaStepHandler[Sound]):
        pass

    class Lazy(Saga[Sound]):
        steps = [Idle]

    message = only()
    assert message.id == "django_saga.E007"
    assert "Idle of saga_tests.Lazy has no act()" in message.msg


def test_rq_without_its_app_is_an_error(settings: Any) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "rq"}
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "django_rq"]
    message = only()
    assert message.id == "django_saga.E003"
    assert "not in INSTALLED_APPS" in message.msg
