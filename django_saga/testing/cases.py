"""The base class for tests in the manner of unittest."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from django.test import TestCase

from django_saga.testing.runner import SagaRun, SagaRunner

if TYPE_CHECKING:
    from django_saga import Saga, SagaContext
    from django_saga.storage import DjangoSagaStorage
    from django_saga.testing.faults import Fault


class SagaTestCase(TestCase):
    """Executions in memory, and the test database, rolled back after each test, for handlers.

    A test on another base class makes its own :class:`SagaRunner`.
    """

    saga_storage: ClassVar[DjangoSagaStorage | None] = None
    """Where executions are kept; None: in memory."""

    @cached_property
    def saga_runner(self) -> SagaRunner:
        """This test's own; at the end, a fault that never fired fails the test."""
        runner = SagaRunner(self.saga_storage)
        self.addCleanup(runner.check_faults)
        return runner

    def run_saga(
        self, saga: Saga[Any] | type[Saga[Any]], context: SagaContext, *faults: Fault
    ) -> SagaRun:
        """See :meth:`SagaRunner.run`."""
        return self.saga_runner.run(saga, context, *faults)
