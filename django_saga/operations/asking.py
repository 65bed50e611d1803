"""Who asks for what, and why: permission is looked at here, and every answer is audited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypedDict
from uuid import UUID

from django.core.exceptions import PermissionDenied
from django.db import InternalError, transaction
from django.utils.module_loading import import_string

from django_saga.conf import conf
from django_saga.exceptions import InvalidSettings, SagaError
from django_saga.masking import mask_text
from django_saga.models import SagaAuditEntry, SagaExecution
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.translating import is_read_only
from django_saga.texts import storable, told


class Operator(Protocol):
    """Who has something done: a user, as the project's authentication knows them."""

    def has_perm(self, perm: str) -> bool:
        """Whether they may."""
        ...


class Asked(TypedDict, total=False):
    """Who asks, and why; every key is optional."""

    user: Operator | None
    """Whose permissions count; None: code, that may do all."""
    user_name: str
    """Who it is where there is no user: the one at the shell, for example."""
    reason: str
    """For the audit table; what is done by force is refused without one."""
    source: str
    """Where it was asked: code (the default), admin, command or batch."""
    batch_id: UUID | None
    token: int | None
    """Refuse an execution that has been driven, or changed by hand, since it had this token."""
    status: str | None
    """Refuse an execution that is no longer in this status."""
    storage: DjangoSagaStorage | None


@contextmanager
def audited(
    verb: str, permission: str, asked: Asked, **about: Any
) -> Iterator[tuple[SagaAuditEntry, DjangoSagaStorage]]:
    """Refuse who lacks the permission; then a transaction that the entry of the audit joins.

    A refusal, ours or one that is raised within, is entered by itself.
    """
    storage = asked.get("storage") or DjangoSagaStorage()
    entry = _entry(verb, asked, about)
    try:
        permit(asked.get("user"), permission)
        with transaction.atomic(using=storage.alias):
            yield entry, storage
            entry.detail = storable(entry.detail)
            entry.save(using=storage.alias)
    except (PermissionDenied, SagaError) as error:
        found = {"saga": entry.saga, "step": entry.step, "execution_id": entry.execution_id}
        refuse(verb, error, asked, storage, **found)
        raise
    except InternalError as error:
        if not is_read_only(error):
            raise
        raise SagaError(f"The database {storage.alias!r} takes no changes: {error}") from error


def enter(verb: str, asked: Asked, storage: DjangoSagaStorage, **about: Any) -> None:
    """Enter by itself that something was done."""
    _entry(verb, asked, about).save(using=storage.alias)


def refuse(
    verb: str, error: Exception, asked: Asked, storage: DjangoSagaStorage, **about: Any
) -> None:
    """Enter by itself that something was not done, and why not."""
    entry = _entry(verb, asked, about)
    entry.result, entry.detail = SagaAuditEntry.Result.REFUSED, storable(told(error))
    entry.save(using=storage.alias)


def permit(user: Operator | None, permission: str) -> None:
    """Raise PermissionDenied where a given user lacks it."""
    if user is not None and not user.has_perm(permission):
        raise PermissionDenied(f"This takes the permission {permission}.")


def authorize(user: Operator | None, verb: str, execution: SagaExecution) -> None:
    """Ask the project's own hook (``AUTHORIZE``) about this one execution."""
    hook = authorizer()
    if user is not None and hook is not None and not hook(user, verb, execution):
        raise PermissionDenied(f"You may not {verb} this execution.")


def need_reason(asked: Asked) -> str:
    """The reason; raises SagaError where there is none."""
    reason = asked.get("reason", "").strip()
    if not reason:
        raise SagaError("This takes a reason, which the audit table keeps.")
    return reason


def name_of(user: Operator | None) -> str:
    """The user name, or empty for code."""
    get = getattr(user, "get_username", None)
    return str(get()) if get else str(user or "")


def who(asked: Asked) -> str:
    """Who asks, by name; else where it was asked."""
    return _name(asked) or _source(asked)


def _name(asked: Asked) -> str:
    user = asked.get("user")
    return storable(name_of(user) if user is not None else asked.get("user_name", ""))


def _source(asked: Asked) -> str:
    return storable(asked.get("source", "code"))


def authorizer() -> Callable[[Operator, str, SagaExecution], bool] | None:
    """The project's own hook, if it has one; raises InvalidSettings where it cannot be called."""
    hook = conf.AUTHORIZE
    try:
        found = import_string(hook) if isinstance(hook, str) else hook
    except ImportError as error:
        raise InvalidSettings(f"DJANGO_SAGA['AUTHORIZE'] cannot be imported: {error}") from error
    if found is not None and not callable(found):
        raise InvalidSettings(f"DJANGO_SAGA['AUTHORIZE'] cannot be called: {found!r}")
    return found  # type: ignore[no-any-return]


def reason_of(asked: Asked) -> str:
    """The reason as it is stored: what looks like a secret is masked."""
    return storable(mask_text(asked.get("reason", "")))


def _entry(verb: str, asked: Asked, about: dict[str, Any]) -> SagaAuditEntry:
    user = asked.get("user")
    entry = SagaAuditEntry(
        verb=verb,
        user_id=str(getattr(user, "pk", None) or "")[:64],
        user_name=_name(asked)[:255],
        source=_source(asked)[:20],
        result=SagaAuditEntry.Result.DONE,
        batch_id=asked.get("batch_id"),
        reason=reason_of(asked),
        **about,
    )
    # Of what there is not, too: a refusal says what was asked for.
    entry.saga, entry.step = storable(entry.saga)[:255], storable(entry.step)[:100]
    return entry
