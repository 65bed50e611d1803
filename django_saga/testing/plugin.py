"""The fixtures for pytest, which finds them by itself where django-saga is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from django_saga.testing.runner import Clock, SagaRunner


@pytest.fixture
def saga_runner() -> Iterator[SagaRunner]:
    """Runs sagas in memory; at the end, a fault that never fired fails the test."""
    from django_saga.testing.runner import SagaRunner

    runner = SagaRunner()
    yield runner
    runner.check_faults()


@pytest.fixture
def saga_clock(saga_runner: SagaRunner) -> Clock:
    """The clock of ``saga_runner``, to be moved by hand."""
    return saga_runner.clock
