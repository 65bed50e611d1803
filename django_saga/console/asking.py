"""Who has the command do something: a user, or whoever sits at the shell."""

from __future__ import annotations

import getpass
from typing import Any

from django.apps import apps
from django.core.management import CommandError

from django_saga.operations import Asked
from django_saga.operations.asking import permit

USAGE = 2  # the exit status of a command that was given wrongly
SOURCE = "command"


def asked(options: dict[str, Any]) -> Asked:
    """As the operations take it; raises CommandError for a user that there is not."""
    name = options.get("user")
    given: Asked = {"source": SOURCE, "reason": options.get("reason") or ""}
    if name is not None:
        return {**given, "user": _user(name)}
    return {**given, "user_name": _at_the_shell()}


def permit_to_see(options: dict[str, Any], model: str) -> None:
    """Raise PermissionDenied where the given user may not see rows of this model."""
    permit(asked(options).get("user"), f"django_saga.view_{model}")


def _user(name: str) -> Any:
    if not apps.is_installed("django.contrib.auth"):
        raise CommandError("--user needs django.contrib.auth.", returncode=USAGE)
    from django.contrib.auth import get_user_model

    model = get_user_model()
    try:
        return model._default_manager.get_by_natural_key(name)
    except model.DoesNotExist:
        raise CommandError(f"No user is named {name!r}.", returncode=USAGE) from None


def _at_the_shell() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""
