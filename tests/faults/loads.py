"""What the children do under load: drive sagas, or sweep, until a file says that it is enough."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from django_rq.queues import get_queue
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer

from django_saga import Saga, SagaFailed, StorageUnavailable
from django_saga.recovery import sweep
from tests.faults.driving import GAVE_UP, begin, rq_settings, work
from tests.faults.sagas import CASES, Trial

AT_ONCE = 4  # sagas of an async driver
BREATH = 0.02  # seconds between two tries of a database that is away


def drive_on(ledger: str, stop: str, runner: str, seed: int, without: str = "") -> None:
    """Run one saga after the other; raises what no caller may get to see."""
    begin(ledger, None, without)
    dice = random.Random(seed)
    some = {"sync": _run, "async": _run_at_once, "rq": _run_by_rq}[runner]
    queue = f"faults-{uuid4()}"
    with rq_settings(queue):
        while not Path(stop).exists():
            some(dice, ledger, queue)
        registry = FailedJobRegistry(queue=get_queue(queue, serializer=JSONSerializer))
        allowed = tuple(f"{error.__module__}.{error.__qualname__}" for error in GAVE_UP)
        for job in registry.get_job_ids():
            said = registry.job_class.fetch(job, registry.connection, JSONSerializer).exc_info
            assert said is None or any(error in said for error in allowed), said


def sweep_on(ledger: str, stop: str) -> None:
    """Recover whatever is due."""
    begin(ledger, None, "")
    while not Path(stop).exists():
        with suppress(StorageUnavailable):
            for _ in sweep():
                pass
        time.sleep(BREATH)


def _run(dice: random.Random, ledger: str, queue: str) -> None:
    _survive(lambda: _any(dice).run(Trial(ledger)))


def _run_at_once(dice: random.Random, ledger: str, queue: str) -> None:
    asyncio.run(_gather([_any(dice) for _ in range(AT_ONCE)], ledger))


async def _gather(sagas: list[Saga[Any]], ledger: str) -> None:
    runs = (saga.arun(Trial(ledger)) for saga in sagas)
    for result in await asyncio.gather(*runs, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, SagaFailed):
            _survive(lambda error=result: _raise(error))


def _run_by_rq(dice: random.Random, ledger: str, queue: str) -> None:
    for _ in range(AT_ONCE):
        _survive(lambda: _any(dice).enqueue(Trial(ledger)))
    work(queue)


def _any(dice: random.Random) -> Saga[Any]:
    return CASES[dice.choice(sorted(CASES))].saga()


def _survive(function: Callable[[], object]) -> None:
    try:
        function()
    except SagaFailed:
        pass
    except tuple(GAVE_UP):
        time.sleep(BREATH)


def _raise(error: BaseException) -> None:
    raise error
