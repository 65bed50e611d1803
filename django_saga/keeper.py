"""One thread per process that renews the leases of steps that take long.

A step shorter than a third of its lease never meets it. The thread has a connection of its own,
opened for each renewal: it must not share one with the very step that it protects.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from django.db import connections

from django_saga.exceptions import SagaError
from django_saga.texts import told, traced

if TYPE_CHECKING:
    from django_saga.flow import Run
    from django_saga.storage.base import SagaStorage

logger = logging.getLogger("django_saga.keeper")


class Keeper:
    """Watches runs whose handler is being called, and renews a lease after a third of it."""

    def __init__(self) -> None:
        self._watched: dict[int, Run] = {}
        self._lock = threading.Lock()
        self._sooner = threading.Event()
        self._thread: threading.Thread | None = None
        self._interval = 0.0

    def watch(self, run: Run) -> None:
        """Keep the run's lease, at most while ``run.until`` is not past."""
        # No lock: the thread says that it ends before it looks here once more.
        self._watched[id(run)] = run
        late = time.monotonic() - run.renewed_at > run.lease / 3
        if late or self._thread is None or run.lease / 6 < self._interval:
            self._attend(run.lease / 6)

    def forget(self, run: Run) -> None:
        """The handler has returned."""
        self._watched.pop(id(run), None)

    def _attend(self, interval: float) -> None:
        with self._lock:
            if self._thread is None:
                self._interval = interval
                thread = threading.Thread(target=self._keep, name="django-saga-keeper", daemon=True)
                thread.start()
                self._thread = thread  # only now: starting it may fail
            else:
                self._interval = min(interval, self._interval)
                self._sooner.set()

    def _keep(self) -> None:
        idle = 0
        while True:
            self._sooner.wait(self._interval)
            self._sooner.clear()
            with self._lock:
                idle = 0 if self._watched else idle + 1
                if idle > 6:
                    self._thread = None
                    if not self._watched:
                        return
                    self._thread, idle = threading.current_thread(), 0
                watched = list(self._watched.values())
            self._renew(watched)

    def _renew(self, watched: list[Run]) -> None:
        now = time.monotonic()
        groups: dict[tuple[SagaStorage, float], list[Run]] = {}
        for run in watched:
            until = run.until
            if not run.leased:  # whoever drove it was interrupted before it could forget it
                self.forget(run)
            elif now - run.renewed_at > run.lease / 3 and (until is None or now < until):
                groups.setdefault((run.storage, run.lease), []).append(run)
        try:
            for (storage, lease), runs in groups.items():
                self._renew_in(storage, lease, runs)
        finally:
            if groups:
                connections.close_all()  # this thread's own

    def _renew_in(self, storage: SagaStorage, lease: float, runs: list[Run]) -> None:
        """One storage that is away must not keep the others' leases from being renewed."""
        began = time.monotonic()
        try:
            renewed = storage.renew([run.key for run in runs], lease=lease)
        except SagaError as error:
            logger.warning("Leases could not be renewed, trying again: %s", told(error))
            return
        except Exception as error:
            logger.error("Leases could not be renewed, trying again: %s", traced(error))
            return
        for run in runs:
            if run.id in renewed:
                run.renewed_at = began
            elif self._watched.get(id(run)):
                logger.warning("Saga %s: its lease was taken by another driver", run.id)


keeper = Keeper()
if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork, and a lock may have been held by one.
    os.register_at_fork(after_in_child=lambda: keeper.__init__())  # type: ignore[misc]
