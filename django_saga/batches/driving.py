"""Driving batches: one driver for each, under a lease, which any other takes over when it ends.

What has been done is known by the audit, which the verb writes in its own transaction. So a driver
that was killed before it could note an item leaves nothing to be done twice.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.db import DatabaseError
from django.db.models import DateTimeField, ExpressionWrapper, F, Q, QuerySet

from django_saga.conf import conf
from django_saga.exceptions import SagaError, StorageUnavailable
from django_saga.flow import driver_name
from django_saga.masking import mask_text
from django_saga.models import SagaAuditEntry, SagaBatch, SagaBatchItem, SagaExecution
from django_saga.operations import BULK, RETRY, Asked, Operator, retry_id
from django_saga.operations.asking import audited, permit
from django_saga.operations.verbs import CANCEL
from django_saga.storage import DjangoSagaStorage
from django_saga.texts import said_by, storable, traced
from django_saga.verdicts import DatabaseNow

logger = logging.getLogger("django_saga.batches")

State = SagaBatchItem.State
Status = SagaBatch.Status
CANDIDATES = 20  # that one driver tries to claim before it gives up
NAP = 0.2  # seconds after which one who waits looks whether it is to stop


def work(
    batch_id: UUID | None = None,
    *,
    seconds: float,
    storage: DjangoSagaStorage | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Counter[str]:
    """Drive a running batch that nobody drives, or this one, for so long; how many were done.

    Returns the number of items by state, ``done`` or ``skipped``; it is empty where nothing ran.
    An item that has begun is finished; ``stopped`` is asked before each. With time left it goes on
    to the next batch. Any number of processes may do this at once.

    Raises StorageUnavailable or DatabaseError where the database is away, InsideTransaction.
    """
    storage = storage or DjangoSagaStorage()
    storage.refuse_transaction()
    came: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not stopped():
        batch = _claim(batch_id, storage.alias)
        if batch is None or not _Turn(batch, storage, deadline, stopped, came).take():
            break
    return came


def is_running(batch_id: UUID) -> bool:
    """Whether there is more to do for a driver."""
    rows = SagaBatch.objects.using(DjangoSagaStorage().alias)
    return rows.filter(pk=batch_id, status=Status.RUNNING).exists()


def _claim(batch_id: UUID | None, alias: str) -> SagaBatch | None:
    """Take the lease of this batch, or of that running one which was driven least lately."""
    free = Q(lease_until=None) | Q(lease_until__lte=DatabaseNow())
    rows = SagaBatch.objects.using(alias).filter(free, status=Status.RUNNING)
    if batch_id is not None:
        rows = rows.filter(pk=batch_id)
    oldest = rows.order_by(F("lease_until").asc(nulls_first=True), "created_at")
    for pk, token in oldest.values_list("pk", "token")[:CANDIDATES]:
        lease = {"token": token + 1, "lease_until": _from_now(conf.LEASE)}
        if rows.filter(pk=pk, token=token).update(**lease, driver=driver_name()):
            return SagaBatch.objects.using(alias).filter(pk=pk).first()
    return None


def _from_now(seconds: float) -> ExpressionWrapper[Any]:
    later = DatabaseNow() + timedelta(seconds=seconds)
    return ExpressionWrapper(later, output_field=DateTimeField())


@dataclass
class _Turn:
    """One driver's time with one batch."""

    batch: SagaBatch
    storage: DjangoSagaStorage
    deadline: float
    stopped: Callable[[], bool]
    came: Counter[str]

    def take(self) -> bool:
        """Do its items; False where the time was over before the batch was held, or ended."""
        try:
            return self._go()
        finally:
            self._release()

    def _go(self) -> bool:
        tried = self._items.exclude(state=State.WAITING).count()
        next_at = time.monotonic() + self._wait()
        while self._has_time(time.monotonic()):
            if not self._renew():
                return True  # it was paused or stopped, or is somebody else's
            item = self._items.filter(state=State.WAITING).order_by("id").first()
            if item is None:
                self._mine.update(status=Status.FINISHED, finished_at=DatabaseNow())
                return True
            allowed = self.batch.allowed
            if allowed is not None and tried >= allowed:
                if self._mine.filter(allowed=allowed).update(status=Status.HELD):
                    return True
                continue  # more have been allowed this very moment
            if time.monotonic() < next_at:
                if not self._sleep(next_at):
                    return False
                continue  # it may have been paused meanwhile
            try:
                user = _who(self.batch)
            except PermissionDenied as error:
                self._stop(str(error))
                return True
            began = time.monotonic()
            if self._do(item, user):
                next_at = began + 1 / self.batch.rate
            tried += 1
        return False

    def _has_time(self, at: float) -> bool:
        return at < self.deadline and not self.stopped()

    def _sleep(self, until: float) -> bool:
        """Wait; False where the time would be over then, or this is to stop."""
        while self._has_time(until):
            left = until - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, NAP))
        return False

    def _wait(self) -> float:
        """Seconds until the next may begin: the driver before this one kept to the same rate."""
        done = self._items.filter(state=State.DONE).order_by("-id")
        latest: Any = done.annotate(db_now=DatabaseNow()).first()
        if latest is None:
            return 0.0
        since: timedelta = latest.db_now - latest.done_at
        return max(0.0, 1 / self.batch.rate - since.total_seconds())

    @property
    def _items(self) -> QuerySet[SagaBatchItem]:
        return SagaBatchItem.objects.using(self.storage.alias).filter(batch=self.batch)

    @property
    def _mine(self) -> QuerySet[SagaBatch]:
        """The batch, if it is still to be driven, and by this driver."""
        rows = SagaBatch.objects.using(self.storage.alias).filter(pk=self.batch.pk)
        return rows.filter(token=self.batch.token, status=Status.RUNNING)

    def _renew(self) -> bool:
        """Keep the lease, and read what is allowed now."""
        if not self._mine.update(lease_until=_from_now(conf.LEASE)):
            return False
        batch = self._mine.first()
        self.batch = batch or self.batch
        return batch is not None

    def _release(self) -> None:
        rows = SagaBatch.objects.using(self.storage.alias)
        try:
            # Not NULL: the next driver begins with the batch that has waited longest.
            rows.filter(pk=self.batch.pk, token=self.batch.token).update(lease_until=DatabaseNow())
        except DatabaseError as error:
            logger.warning("The lease of batch %s runs out by itself: %s", self.batch.pk, error)

    def _stop(self, why: str) -> None:
        asked: Asked = {"source": "batch", "batch_id": self.batch.pk, "storage": self.storage}
        with audited("stop_batch", "", asked) as (entry, _):
            entry.detail = why
            self._mine.update(status=Status.STOPPED, why=why[:500], finished_at=DatabaseNow())

    def _do(self, item: SagaBatchItem, user: Operator | None) -> bool:
        """Do it to one execution; False where it was refused, so that the next need not wait."""
        if self._was_done(item):  # by a driver that was killed before it could note it
            self._note(item, State.DONE, _result(self.batch, item))
            return False
        verb = BULK[self.batch.verb]
        try:
            result = verb.function(item.execution_id, **self._asked(item, user))
        except StorageUnavailable:
            raise
        except (SagaError, PermissionDenied) as error:
            self._failed(item, _without_name(str(error), item))
            return False
        except Exception as error:
            about = {"batch": str(self.batch.pk), "execution": str(item.execution_id)}
            failed = "%s of %s failed\n%s"
            logger.error(failed, verb.name, item.execution_id, traced(error), extra=about)
            self._failed(item, f"{type(error).__name__}: {said_by(error)}")
            return True
        self._note(item, State.DONE, result.pk)
        return True

    def _asked(self, item: SagaBatchItem, user: Operator | None) -> Asked:
        asked: Asked = {
            "user": user,
            "reason": self.batch.reason,
            "source": "batch",
            "batch_id": self.batch.pk,
            "storage": self.storage,
        }
        if self.batch.verb == CANCEL.name:  # that it went on meanwhile is no reason to let it
            return asked
        return asked | {"token": item.token, "status": item.status}

    def _was_done(self, item: SagaBatchItem) -> bool:
        entries = SagaAuditEntry.objects.using(self.storage.alias)
        mine = entries.filter(execution_id=item.execution_id, batch_id=self.batch.pk)
        return mine.filter(verb=self.batch.verb, result=SagaAuditEntry.Result.DONE).exists()

    def _failed(self, item: SagaBatchItem, why: str) -> None:
        """It was not done; unless the error came after that, or another driver was quicker."""
        if self._was_done(item):
            self._note(item, State.DONE, _result(self.batch, item), why)
        else:
            self._note(item, State.SKIPPED, None, why)

    def _note(
        self, item: SagaBatchItem, state: SagaBatchItem.State, result_id: UUID | None, why: str = ""
    ) -> None:
        waiting = self._items.filter(pk=item.pk, state=State.WAITING)
        columns: dict[str, Any] = {"state": state, "result_id": result_id}
        columns["why"] = storable(mask_text(why).replace("\0", ""))[:500]
        if waiting.update(**columns, done_at=DatabaseNow()):
            self.came[state.value] += 1


def _who(batch: SagaBatch) -> Operator | None:
    """Who asked, as they are now; raises PermissionDenied where they may not do it any more."""
    verb = BULK.get(batch.verb)
    if verb is None:
        raise PermissionDenied(f"The code no longer has a verb {batch.verb!r} for many.")
    if not batch.user_id:
        return None  # code, that may do all
    user = get_user_model()._default_manager.filter(pk=batch.user_id).first()
    if user is None:
        raise PermissionDenied(f"The user {batch.user_name} is gone.")
    if not user.is_active:
        raise PermissionDenied(f"The user {batch.user_name} is not active any more.")
    permit(user, verb.permission)
    return user


def _result(batch: SagaBatch, item: SagaBatchItem) -> UUID:
    anew = batch.verb == RETRY.name and item.status == SagaExecution.Status.FAILED
    return retry_id(item.execution_id) if anew else item.execution_id


def _without_name(why: str, item: SagaBatchItem) -> str:
    """The reason alone, so that equal ones are counted together."""
    before, found, after = why.partition(f"{item.execution_id} ")
    return after if found and before.startswith("Saga ") else why
