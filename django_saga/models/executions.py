"""One row per execution, one per finished attempt. The storage alone writes them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar

import msgspec
from django.db import models
from django.db.models.base import ModelState
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from django_saga import machine
from django_saga.machine import Error, State


class SagaExecution(models.Model):
    """One run of a saga. Columns that never change come first: PostgreSQL logs what follows."""

    class Status(models.TextChoices):
        """See :class:`django_saga.machine.Status`."""

        PENDING = "PENDING", pgettext_lazy("saga status", "pending")
        RUNNING = "RUNNING", pgettext_lazy("saga status", "running")
        COMPENSATING = "COMPENSATING", pgettext_lazy("saga status", "compensating")
        COMPLETED = "COMPLETED", pgettext_lazy("saga status", "completed")
        FAILED = "FAILED", pgettext_lazy("saga status", "failed")
        STUCK = "STUCK", pgettext_lazy("saga status", "stuck")

    id = models.UUIDField(_("id"), primary_key=True, editable=False)
    saga = models.CharField(_("saga"), max_length=255)
    plan = models.JSONField(_("plan"), help_text=_("The step names, frozen at the start."))
    initial_context = models.TextField(_("initial context"))
    retry_of = models.ForeignKey(
        "self",
        verbose_name=_("retry of"),
        null=True,
        blank=True,
        on_delete=models.SET_NULL,
        related_name="retries",
        db_index=False,  # few are retries: see the indexes
    )
    created_at = models.DateTimeField(_("created at"))
    limit_key = models.CharField(  # noqa: DJ001 - NULL: there is no limit
        _("limit key"), max_length=255, null=True, help_text=_("What max_running counts together.")
    )

    slot = models.PositiveIntegerField(
        _("place"), null=True, help_text=_("Its number among those that run at once.")
    )
    cancel_reason = models.TextField(_("to be cancelled"), blank=True, db_default="")
    settled_at = models.DateTimeField(
        _("settled at"), null=True, help_text=_("When an operator dealt with its failure.")
    )
    blanked_at = models.DateTimeField(
        _("blanked at"), null=True, help_text=_("When retention removed its contexts and errors.")
    )
    status = models.CharField(_("status"), max_length=12, choices=Status.choices)
    step = models.CharField(_("step"), max_length=100, blank=True)
    action = models.CharField(_("action"), max_length=10, db_default="act")
    attempt = models.PositiveIntegerField(_("attempt"), db_default=1)
    failures = models.PositiveIntegerField(_("failures"), db_default=0)
    in_flight = models.BooleanField(_("in flight"))
    atomic = models.BooleanField(_("atomic"), db_default=False)
    effects = models.JSONField(_("effects"))
    recoveries = models.PositiveIntegerField(_("recoveries"), db_default=0)
    fallback_context = models.TextField(_("fallback context"), null=True)  # noqa: DJ001
    failed_step = models.CharField(_("failed step"), max_length=100, blank=True, db_default="")
    error_type = models.CharField(_("error type"), max_length=255, blank=True, db_default="")
    error_message = models.TextField(_("error message"), blank=True, db_default="")
    stuck_reason = models.TextField(_("stuck reason"), blank=True, db_default="")
    failure_group = models.CharField(
        _("failure group"), max_length=32, blank=True, db_default="", db_index=False
    )
    context = models.TextField(_("context"))

    token = models.BigIntegerField(_("fencing token"))
    driver = models.CharField(_("driver"), max_length=255, blank=True)
    lease_until = models.DateTimeField(_("lease until"), null=True)
    wake_at = models.DateTimeField(_("wakes at"), null=True)
    grace_until = models.DateTimeField(_("left alone until"), null=True)
    updated_at = models.DateTimeField(_("updated at"))
    finished_at = models.DateTimeField(_("finished at"), null=True)

    class Meta:
        verbose_name = _("saga execution")
        verbose_name_plural = _("saga executions")
        default_permissions = ("view",)
        permissions: ClassVar = [
            ("view_context_sagaexecution", _("Can view the contexts of saga executions")),
            ("view_traceback_sagaexecution", _("Can view the tracebacks of saga executions")),
            ("retry_sagaexecution", _("Can retry saga executions")),
            ("recover_sagaexecution", _("Can recover saga executions")),
            ("cancel_sagaexecution", _("Can cancel saga executions")),
            ("force_sagaexecution", _("Can change by hand where saga executions stand")),
            ("pause_sagaexecution", _("Can pause sagas and steps")),
            ("export_sagaexecution", _("Can export saga executions")),
        ]
        # None holds a column that an ordinary checkpoint changes: such updates stay heap-only.
        indexes: ClassVar = [
            models.Index(fields=["created_at"], name="saga_newest"),
            models.Index(
                fields=["saga", "limit_key", "created_at"],
                name="saga_active",
                condition=models.Q(status__in=["PENDING", "RUNNING", "COMPENSATING"]),
            ),
            models.Index(
                fields=["created_at"],
                name="saga_oldest_active",
                condition=models.Q(status__in=["PENDING", "RUNNING", "COMPENSATING"]),
            ),
            models.Index(
                fields=["status", "created_at"],
                name="saga_ended_badly",
                condition=models.Q(status__in=["FAILED", "STUCK"]),
            ),
            models.Index(
                fields=["failure_group", "created_at"],
                name="saga_unsettled",
                condition=models.Q(status__in=["FAILED", "STUCK"], settled_at=None)
                & ~models.Q(failure_group=""),
            ),
            models.Index(
                fields=["retry_of"],
                name="saga_retries",
                condition=models.Q(retry_of__isnull=False),
            ),
            # What has ended is in one of these two: pruning finds what is old without reading on.
            models.Index(
                fields=["saga", "finished_at"],
                name="saga_finished",
                condition=models.Q(finished_at__isnull=False, blanked_at=None),
            ),
            models.Index(
                fields=["saga", "finished_at"],
                name="saga_blanked",
                condition=models.Q(blanked_at__isnull=False),
            ),
            models.Index(
                fields=["failure_group", "created_at"],
                name="saga_dealt_with",
                condition=models.Q(settled_at__isnull=False) & ~models.Q(failure_group=""),
            ),
        ]
        # Nothing without a limit is in it; MariaDB has it without a condition, by the migration.
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["saga", "limit_key", "slot"],
                name="saga_place",
                condition=models.Q(slot__isnull=False),
            )
        ]

    def __str__(self) -> str:
        return f"{self.saga} {self.id}"

    @property
    def is_final(self) -> bool:
        """Whether it ended, COMPLETED or FAILED; a STUCK one waits for an operator."""
        return self.status in (self.Status.COMPLETED, self.Status.FAILED)

    @property
    def is_active(self) -> bool:
        """Whether it goes on by itself."""
        return self.status in machine.ACTIVE

    @property
    def state(self) -> State:
        """What the machine decides on; raises ValueError where it was spoilt."""
        failed = self.error_type or self.error_message
        columns = {name: getattr(self, name) for name in _STATE} | {
            "in_flight": bool(self.in_flight),
            "atomic": bool(self.atomic),
            "error": Error(self.error_type, self.error_message) if failed else None,
        }
        try:
            return msgspec.convert(columns, State)
        except msgspec.ValidationError as error:  # no ValueError up to msgspec 0.20
            raise ValueError(str(error)) from error

    @classmethod
    def of(cls, alias: str | None, columns: Mapping[str, Any], state: State) -> SagaExecution:
        """An instance as if read from the row, without reading it; what is not given is None."""
        # Model.from_db sets each field by itself and sends two signals; one is built for each run.
        execution = cls.__new__(cls)
        execution.__dict__.update(_unknown(), _state=ModelState(), **columns)
        execution._state.adding, execution._state.db = False, alias
        execution.plan = [list(entry) for entry in state.plan]
        execution.assign(state)
        return execution

    def assign(self, state: State) -> None:
        """Take over the columns that a checkpoint of this state wrote."""
        self.__dict__.update(columns_of(state), effects=list(msgspec.to_builtins(state.effects)))

    @property
    def duration(self) -> timedelta:
        """From its creation to its end, or to its latest change."""
        return (self.finished_at or self.updated_at) - self.created_at


_STATE = [name for name in State.__struct_fields__ if name != "error"]


@cache
def _unknown() -> dict[str, str | None]:
    texts = ("cancel_reason", "failure_group")  # empty at the start, as their columns are
    columns = [field.attname for field in SagaExecution._meta.concrete_fields]
    return dict.fromkeys(columns) | dict.fromkeys(texts, "")


def columns_of(state: State) -> dict[str, Any]:
    """The columns that a checkpoint writes, from the state that it stores."""
    error = state.error
    return {
        "status": state.status.value,
        "step": state.step,
        "action": state.action.value,
        "attempt": state.attempt,
        "failures": state.failures,
        "in_flight": state.in_flight,
        "atomic": state.atomic,
        "effects": state.effects,
        "recoveries": state.recoveries,
        "fallback_context": state.fallback_context,
        "failed_step": state.failed_step,
        "error_type": error.type[:255] if error else "",
        "error_message": error.message if error else "",
        "stuck_reason": state.stuck_reason,
        "context": state.context,
    }


def changed_columns(before: State, after: State) -> dict[str, Any]:
    """The columns to which a checkpoint between the two gives other values."""
    pairs = zip(_FIELDS, _fields(before), _fields(after), strict=True)
    names = [name for name, was, now in pairs if was != now]
    columns = columns_of(after)
    return {column: columns[column] for name in names for column in _COLUMNS.get(name, (name,))}


_FIELDS = [name for name in State.__struct_fields__ if name != "plan"]
_COLUMNS = {"error": ("error_type", "error_message")}
_fields = attrgetter(*_FIELDS)


def new_id() -> uuid.UUID:
    """An id for a new execution: a UUID of version 7 (RFC 9562), in order of time as indexes like.

    Milliseconds of the Unix epoch fill the first 48 bits, chance the others.
    """
    # Python's own uuid7() is new in 3.14.
    chance = int.from_bytes(os.urandom(10))
    value = (time.time_ns() // 1_000_000) << 80 | chance
    return uuid.UUID(int=value & ~_VERSION | _VERSION_7)


_VERSION, _VERSION_7 = 0xF << 76 | 0b11 << 62, 7 << 76 | 0b10 << 62


class SagaStepRecord(models.Model):
    """One finished attempt of one action of one step; rows are only ever added.

    Columns of a fixed width come first: PostgreSQL loses nothing to alignment.
    """

    class Action(models.TextChoices):
        """See :class:`django_saga.machine.Action`."""

        ACT = "act", pgettext_lazy("saga action", "act")
        COMPENSATE = "compensate", pgettext_lazy("saga action", "compensate")

    class Outcome(models.TextChoices):
        """See :class:`django_saga.machine.Outcome`."""

        DONE = "DONE", pgettext_lazy("saga outcome", "done")
        FAILED = "FAILED", pgettext_lazy("saga outcome", "failed")
        UNKNOWN = "UNKNOWN", pgettext_lazy("saga outcome", "unknown")
        INTERRUPTED = "INTERRUPTED", pgettext_lazy("saga outcome", "interrupted")

    id = models.BigAutoField(_("id"), primary_key=True)
    execution = models.ForeignKey(
        SagaExecution,
        verbose_name=_("execution"),
        on_delete=models.CASCADE,
        related_name="records",
        # The checkpoint's one statement takes the id from the row that it updates. A constraint
        # would look there again, and lock it, at every commit.
        db_constraint=False,
    )
    token = models.BigIntegerField(_("fencing token"))
    created_at = models.DateTimeField(_("recorded at"))
    duration = models.FloatField(_("duration"), null=True, help_text=_("Seconds."))
    attempt = models.PositiveIntegerField(_("attempt"))
    step = models.CharField(_("step"), max_length=100)
    action = models.CharField(_("action"), max_length=10, choices=Action.choices)
    outcome = models.CharField(_("outcome"), max_length=11, choices=Outcome.choices)
    driver = models.CharField(_("driver"), max_length=255, blank=True)
    error_type = models.CharField(_("error type"), max_length=255, blank=True, db_default="")
    error_message = models.TextField(_("error message"), blank=True, db_default="")
    traceback = models.TextField(_("traceback"), blank=True, db_default="")
    changes = models.TextField(
        _("changes"),
        blank=True,
        db_default="",
        help_text=_("The fields of the context that it changed, masked; JSON."),
    )

    class Meta:
        verbose_name = _("saga step record")
        verbose_name_plural = _("saga step records")
        default_permissions = ("view",)
        ordering: ClassVar = ["id"]

    def __str__(self) -> str:
        return f"{self.step}.{self.action} #{self.attempt} {self.outcome}"
