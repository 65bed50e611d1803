"""One verb done to many executions, by whoever comes by: it survives the tab and a deploy."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils.translation import gettext_lazy as _
from django.utils.translation import pgettext_lazy

from django_saga.models.executions import new_id


class SagaBatch(models.Model):
    """What is to be done, on whose authority, how fast, and how far it may go for now."""

    class Status(models.TextChoices):
        """Where a batch stands."""

        RUNNING = "running", pgettext_lazy("saga batch", "running")
        HELD = "held", pgettext_lazy("saga batch", "held: look at the results")
        PAUSED = "paused", pgettext_lazy("saga batch", "paused")
        STOPPED = "stopped", pgettext_lazy("saga batch", "stopped")
        FINISHED = "finished", pgettext_lazy("saga batch", "finished")

    id = models.UUIDField(_("id"), primary_key=True, default=new_id, editable=False)
    verb = models.CharField(_("verb"), max_length=30)
    reason = models.TextField(_("reason"))
    user_id = models.CharField(_("user id"), max_length=64, blank=True)
    user_name = models.CharField(_("user"), max_length=255, blank=True)
    title = models.CharField(_("title"), max_length=500, help_text=_("What was selected."))
    status = models.CharField(
        _("status"), max_length=10, choices=Status.choices, default=Status.RUNNING
    )
    allowed = models.PositiveIntegerField(
        _("allowed"), null=True, help_text=_("How many may be done before it is held; empty: all.")
    )
    rate = models.FloatField(_("rate"), default=5.0, help_text=_("Executions per second."))
    total = models.PositiveIntegerField(_("total"), default=0)
    why = models.CharField(
        _("why"),
        max_length=500,
        blank=True,
        db_default="",
        help_text=_("Why it was paused or stopped, and by whom."),
    )
    token = models.BigIntegerField(_("fencing token"), default=0)
    driver = models.CharField(_("driver"), max_length=255, blank=True)
    lease_until = models.DateTimeField(_("lease until"), null=True)
    created_at = models.DateTimeField(_("created at"), auto_now_add=True)
    finished_at = models.DateTimeField(_("finished at"), null=True)

    class Meta:
        verbose_name = _("saga batch")
        verbose_name_plural = _("saga batches")
        default_permissions = ("view",)
        ordering: ClassVar = ["-created_at"]
        indexes: ClassVar = [
            models.Index(
                fields=["created_at"],
                name="saga_batch_running",
                condition=models.Q(status="running"),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.verb}: {self.title}"


class SagaBatchItem(models.Model):
    """One execution of a batch, as it was when it was selected, and what came of it."""

    class State(models.TextChoices):
        """What came of it."""

        WAITING = "waiting", pgettext_lazy("saga batch item", "waiting")
        DONE = "done", pgettext_lazy("saga batch item", "done")
        SKIPPED = "skipped", pgettext_lazy("saga batch item", "skipped")

    id = models.BigAutoField(_("id"), primary_key=True)
    batch = models.ForeignKey(
        SagaBatch, verbose_name=_("batch"), on_delete=models.CASCADE, related_name="items"
    )
    # By value: what is pruned meanwhile is skipped, and the batch still tells of it.
    execution_id = models.UUIDField(_("execution"))
    token = models.BigIntegerField(_("fencing token"))
    status = models.CharField(_("status when selected"), max_length=12)
    state = models.CharField(
        _("state"), max_length=10, choices=State.choices, db_default=State.WAITING.value
    )
    result_id = models.UUIDField(_("result"), null=True)
    why = models.CharField(_("why"), max_length=500, blank=True, db_default="")
    done_at = models.DateTimeField(_("done at"), null=True)

    class Meta:
        verbose_name = _("saga batch item")
        verbose_name_plural = _("saga batch items")
        default_permissions = ()
        ordering: ClassVar = ["id"]
        indexes: ClassVar = [models.Index(fields=["batch", "state", "id"], name="saga_batch_items")]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["batch", "execution_id"], name="saga_batch_item_once")
        ]

    def __str__(self) -> str:
        return f"{self.execution_id} {self.state}"
