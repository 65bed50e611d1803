"""What operators, and those who look after them, need to remember beside the executions."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from django_saga.exceptions import SagaError


class SagaFailureGroup(models.Model):
    """One cause of failures; its executions name it. The storage inserts it with the first."""

    id = models.CharField(_("id"), primary_key=True, max_length=32)
    saga = models.CharField(_("saga"), max_length=255)
    step = models.CharField(_("step"), max_length=100, blank=True)
    action = models.CharField(_("action"), max_length=10)
    outcome = models.CharField(_("outcome"), max_length=11)
    error_type = models.CharField(_("error type"), max_length=255)
    frame = models.CharField(
        _("frame"), max_length=255, blank=True, help_text=_("The top one of the project's code.")
    )
    message = models.CharField(_("sample message"), max_length=500, blank=True)
    first_seen = models.DateTimeField(_("first seen"))
    note = models.TextField(_("note"), blank=True, db_default="")
    muted_until = models.DateTimeField(_("muted until"), null=True, blank=True)

    class Meta:
        verbose_name = _("saga failure group")
        verbose_name_plural = _("saga failure groups")
        default_permissions = ("view", "change")
        ordering: ClassVar = ["-first_seen"]

    def __str__(self) -> str:
        return f"{self.error_type} in {self.action} of {self.saga} {self.step}"


class SagaPause(models.Model):
    """Nothing of this saga, or of this one step of it, begins while the row is there."""

    saga = models.CharField(_("saga"), max_length=255)
    step = models.CharField(
        _("step"), max_length=100, blank=True, help_text=_("Empty: every step.")
    )
    reason = models.TextField(_("reason"), blank=True)
    user_name = models.CharField(_("paused by"), max_length=255, blank=True)
    created_at = models.DateTimeField(_("paused at"), auto_now_add=True)

    class Meta:
        verbose_name = _("saga pause")
        verbose_name_plural = _("saga pauses")
        default_permissions = ("view",)
        ordering: ClassVar = ["saga", "step"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["saga", "step"], name="saga_paused_once")
        ]

    def __str__(self) -> str:
        return f"{self.saga} {self.step}".strip()


class SagaAuditEntry(models.Model):
    """What was asked of this app, by whom and why, and whether it was done; only ever added.

    It names users and executions by value: it outlives both.
    """

    class Result(models.TextChoices):
        """What came of it."""

        DONE = "done", pgettext_lazy("saga audit", "done")
        REFUSED = "refused", pgettext_lazy("saga audit", "refused")

    id = models.BigAutoField(_("id"), primary_key=True)
    at = models.DateTimeField(_("at"), auto_now_add=True)
    user_id = models.CharField(_("user id"), max_length=64, blank=True)
    user_name = models.CharField(_("user"), max_length=255, blank=True)
    source = models.CharField(_("source"), max_length=20)
    verb = models.CharField(_("verb"), max_length=30)
    result = models.CharField(_("result"), max_length=10, choices=Result.choices)
    saga = models.CharField(_("saga"), max_length=255, blank=True)
    step = models.CharField(_("step"), max_length=100, blank=True)
    execution_id = models.UUIDField(_("execution"), null=True)
    batch_id = models.UUIDField(_("batch"), null=True)
    reason = models.TextField(_("reason"), blank=True)
    detail = models.TextField(_("detail"), blank=True, help_text=_("What changed, or why not."))

    class Meta:
        verbose_name = _("saga audit entry")
        verbose_name_plural = _("saga audit entries")
        default_permissions = ("view",)
        ordering: ClassVar = ["-id"]
        indexes: ClassVar = [
            models.Index(fields=["execution_id", "-id"], name="saga_audit_execution"),
            models.Index(fields=["batch_id", "-id"], name="saga_audit_batch"),
        ]

    def __str__(self) -> str:
        return f"{self.user_name or self.source}: {self.verb} {self.execution_id or self.saga}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Insert it; raises SagaError for an entry that is there already."""
        if not self._state.adding:
            raise SagaError("Audit entries are never changed.")
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> Any:
        """Raises SagaError."""
        raise SagaError("Audit entries are never deleted one by one.")

    @property
    def tells_context(self) -> bool:
        """Whether its detail holds values of a context."""
        return self.verb == "edit_context" and self.result == self.Result.DONE


class SagaHeartbeat(models.Model):
    """When something that should come again and again came last, such as recovery."""

    name = models.CharField(_("name"), max_length=50, primary_key=True)
    at = models.DateTimeField(_("at"))
    every = models.FloatField(
        _("every"), null=True, help_text=_("Seconds until the next; empty: not known.")
    )
    driver = models.CharField(_("driver"), max_length=255, blank=True)

    class Meta:
        verbose_name = _("saga heartbeat")
        verbose_name_plural = _("saga heartbeats")
        default_permissions = ()

    def __str__(self) -> str:
        return f"{self.name} {self.at:%Y-%m-%d %H:%M:%S}"


class SagaAlert(models.Model):
    """Something that somebody was told of; its key is told once."""

    key = models.CharField(_("key"), max_length=255, primary_key=True)
    kind = models.CharField(_("kind"), max_length=30)
    text = models.TextField(_("text"))
    path = models.CharField(_("path"), max_length=500, blank=True)
    created_at = models.DateTimeField(_("told at"), auto_now_add=True)

    class Meta:
        verbose_name = _("saga alert")
        verbose_name_plural = _("saga alerts")
        default_permissions = ("view",)
        ordering: ClassVar = ["-created_at"]

    def __str__(self) -> str:
        return self.text
