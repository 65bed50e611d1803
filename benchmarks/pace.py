"""How often something is done in some seconds: one after the other, in threads, or in one loop.

The peers' processes use it too, so it knows nothing of Django.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass

Work = Callable[[], object]
AsyncWork = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Pace:
    """How many were done, in how many seconds, with how much of this process's CPU."""

    count: int
    seconds: float
    cpu: float | None = None

    @property
    def rate(self) -> float:
        return self.count / self.seconds


def in_sequence(work: Work, seconds: float) -> Pace:
    """One after the other."""
    clock = _Clock(seconds)
    done = 0
    while clock.runs():
        work()
        done += 1
    return clock.pace(done)


def in_threads(prepare: Callable[[ExitStack], Work], threads: int, seconds: float) -> Pace:
    """By several threads; each prepares first, and closes what its stack holds."""
    done: list[int] = []
    ready = threading.Barrier(threads + 1)

    def run() -> None:
        with ExitStack() as stack:
            work = prepare(stack)
            ready.wait()
            done.append(in_sequence(work, seconds).count)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    clock = _Clock(seconds)
    for worker in workers:
        worker.join()
    return clock.pace(sum(done))


async def at_once(works: list[AsyncWork], seconds: float) -> Pace:
    """By several tasks of the running loop, each one after the other."""
    clock = _Clock(seconds)

    async def run(work: AsyncWork) -> int:
        done = 0
        while clock.runs():
            await work()
            done += 1
        return done

    return clock.pace(sum(await asyncio.gather(*map(run, works))))


class _Clock:
    def __init__(self, seconds: float) -> None:
        self._cpu, self._began = time.process_time(), time.perf_counter()
        self._end = self._began + seconds

    def runs(self) -> bool:
        return time.perf_counter() < self._end

    def pace(self, count: int) -> Pace:
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu
        return Pace(count, seconds, cpu)
