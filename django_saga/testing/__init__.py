"""For the tests of your own sagas: run them with faults, and prove that none of it harms them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_saga.testing.cases import SagaTestCase
    from django_saga.testing.faults import (
        call_twice,
        crash_after,
        crash_at,
        crash_before,
        fail_at,
        unknown_at,
    )
    from django_saga.testing.proofs import assert_compensates_fully, assert_saga_is_crash_safe
    from django_saga.testing.runner import SagaRun, SagaRunner

__all__ = [
    "SagaRun",
    "SagaRunner",
    "SagaTestCase",
    "assert_compensates_fully",
    "assert_saga_is_crash_safe",
    "call_twice",
    "crash_after",
    "crash_at",
    "crash_before",
    "fail_at",
    "unknown_at",
]


def __getattr__(name: str) -> Any:
    # Every run of pytest imports this package for its plugin; most want nothing else of it.
    if name in __all__:
        for module in ("faults", "runner", "proofs", "cases"):
            found = import_module(f"{__name__}.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
