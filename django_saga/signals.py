"""Signals: sent after the commit, robustly, in the driver's own kind (sync or async).

``sender`` is the saga class. ``execution`` is the :class:`~django_saga.models.SagaExecution`; the
``step_*`` signals also carry ``record``, the :class:`~django_saga.models.SagaStepRecord`. A process
that dies right after a commit sends nothing: what must not be missed belongs into a step.

``saga_alert`` is another: sweeps of recovery send it, with ``alert``, the
:class:`~django_saga.telling.Alert` that somebody is to hear of.
"""

from __future__ import annotations

from django.dispatch import Signal

saga_started = Signal()
step_completed = Signal()
step_failed = Signal()  # any failed attempt, of act or of compensate
saga_compensating = Signal()
step_compensated = Signal()
saga_completed = Signal()
saga_failed = Signal()
saga_stuck = Signal()
saga_recovered = Signal()  # taken over from a driver that was lost
saga_alert = Signal()
