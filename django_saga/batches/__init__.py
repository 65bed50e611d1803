"""One verb done to many executions, at a rate, by whoever comes by.

A batch is a row, and so is each of its items: it survives the tab that made it, a deploy, and a
driver that is killed. Each item is done as the user who asked, with what they may do at that time.
"""

from __future__ import annotations

from django_saga.batches.creating import FASTEST, MOST, SLOWEST, create
from django_saga.batches.driving import work
from django_saga.batches.steering import allow, pause, resume, stop

__all__ = ["FASTEST", "MOST", "SLOWEST", "allow", "create", "pause", "resume", "stop", "work"]
