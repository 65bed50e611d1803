"""All that is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import cache, cached_property
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any
from uuid import UUID

import psycopg
from django.conf import settings
from django.db import connections

from benchmarks import bare, pace, workers
from benchmarks.names import (
    BARE_RQ,
    BY_DJANGO,
    CQRS,
    DBOS,
    DEFAULTS,
    FAILURE,
    IN_THREADS,
    KILOBYTES,
    MEMORY,
    MEMORY_ASYNC,
    ORM,
    OURS,
    REPLAY,
    SMALLEST,
    SQLITES,
    SUCCESS,
    TASKS,
    THREADS,
    WAITS,
    WORKERS,
    at_once,
    in_workers,
    with_context,
)
from benchmarks.pace import AsyncWork, Work
from benchmarks.peers.children import Child
from benchmarks.rounds import Case, Run
from benchmarks.sagas import AsyncSaga, NotingSaga, Order, OrderSaga, RefusedSaga, WaitingSaga
from benchmarks.statements import Commit, captured
from django_saga import Saga, SagaFailed
from django_saga.storage import DjangoSagaStorage, MemorySagaStorage


class Benchmarks:
    """The cases, and what several of them share."""

    def __init__(self, stack: ExitStack, home: Path) -> None:
        self._stack, self._home = stack, home
        self.children: dict[str, Child] = {}

    def all(self) -> list[Case]:
        return [
            *self._in_sequence(),
            *self._failing(),
            *self._in_threads(),
            *self._in_one_loop(),
            *self._waiting(),
            *self._contexts(),
            *self._in_workers(),
            *self._elsewhere(),
        ]

    def _in_sequence(self) -> list[Case]:
        return [
            Case(SMALLEST, SUCCESS, lambda: one_by_one(self._smallest(bare.SUCCESS))),
            Case(REPLAY, SUCCESS, lambda: one_by_one(self._replayed(sent(OrderSaga)))),
            Case(
                BY_DJANGO,
                SUCCESS,
                lambda: one_by_one(bare.replayed_by_django("default", sent(OrderSaga))),
            ),
            Case(ORM, SUCCESS, lambda: one_by_one(bare.orm_saga)),
            Case(
                OURS,
                SUCCESS,
                lambda: one_by_one(ours(OrderSaga)),
                sends=lambda: number_of(sent(OrderSaga)),
            ),
            Case(DEFAULTS, SUCCESS, lambda: one_by_one(ours(OrderSaga, "as Django has it"))),
            Case(CQRS, SUCCESS, lambda: self._child(CQRS).measure("success")),
            Case(DBOS, SUCCESS, lambda: self._child(DBOS).measure("success")),
        ]

    def _failing(self) -> list[Case]:
        return [
            Case(SMALLEST, FAILURE, lambda: one_by_one(self._smallest(bare.FAILURE))),
            Case(REPLAY, FAILURE, lambda: one_by_one(self._replayed(sent(RefusedSaga)))),
            Case(
                BY_DJANGO,
                FAILURE,
                lambda: one_by_one(bare.replayed_by_django("default", sent(RefusedSaga))),
            ),
            Case(
                OURS,
                FAILURE,
                lambda: one_by_one(ours(RefusedSaga)),
                sends=lambda: number_of(sent(RefusedSaga)),
            ),
            Case(CQRS, FAILURE, lambda: self._child(CQRS).measure("failure")),
            Case(DBOS, FAILURE, lambda: self._child(DBOS).measure("failure")),
        ]

    def _in_threads(self) -> list[Case]:
        def smallest(stack: ExitStack) -> Work:
            return bare.smallest(stack.enter_context(bare.postgresql()), bare.SUCCESS)

        def replayed(stack: ExitStack) -> Work:
            return bare.replayed(stack.enter_context(bare.postgresql()), sent(OrderSaga))

        def run(stack: ExitStack) -> Work:
            stack.callback(connections.close_all)
            connections["default"].ensure_connection()
            return ours(OrderSaga)

        return [
            Case(SMALLEST, IN_THREADS, lambda: by_threads(smallest)),
            Case(REPLAY, IN_THREADS, lambda: by_threads(replayed)),
            Case(OURS, IN_THREADS, lambda: by_threads(run)),
        ]

    def _in_one_loop(self) -> list[Case]:
        def cases(tasks: int) -> list[Case]:
            what = at_once(tasks)
            return [
                Case(REPLAY, what, lambda: self._replayed_at_once(tasks)),
                Case(OURS, what, lambda: self._together(aours(AsyncSaga), tasks)),
                Case(CQRS, what, lambda: self._child(CQRS).measure("success", tasks)),
                Case(DBOS, what, lambda: self._child(DBOS).measure("async", tasks)),
            ]

        return [case for tasks in TASKS for case in cases(tasks)]

    def _waiting(self) -> list[Case]:
        tasks = TASKS[-1]
        return [
            Case(OURS, WAITS, lambda: self._together(aours(WaitingSaga), tasks)),
            Case(CQRS, WAITS, lambda: self._child(CQRS).measure("waits", tasks)),
            Case(DBOS, WAITS, lambda: self._child(DBOS).measure("waits", tasks)),
        ]

    def _contexts(self) -> list[Case]:
        def cases(kilobytes: int) -> list[Case]:
            what, size = with_context(kilobytes), 1000 * kilobytes
            return [
                Case(REPLAY, what, lambda: one_by_one(self._replayed(sent(NotingSaga, size=size)))),
                Case(OURS, what, lambda: one_by_one(ours(NotingSaga, size=size))),
            ]

        return [case for kilobytes in KILOBYTES for case in cases(kilobytes)]

    def _in_workers(self) -> list[Case]:
        def cases(kind: str, number: int) -> list[Case]:
            what = in_workers(kind, number)
            return [
                Case(BARE_RQ, what, lambda: workers.bare(kind, number, self._home, self._session)),
                Case(OURS, what, lambda: workers.sagas(kind, number)),
            ]

        return [case for kind, number in WORKERS for case in cases(kind, number)]

    def _elsewhere(self) -> list[Case]:
        return [
            Case(OURS, MEMORY, in_memory, on_postgresql=False),
            Case(OURS, MEMORY_ASYNC, self._in_memory_async, on_postgresql=False),
            Case(CQRS, MEMORY, lambda: self._child(CQRS).measure("memory"), on_postgresql=False),
            *(case for what, alias in SQLITES for case in on_sqlite(what, alias)),
        ]

    @cached_property
    def _session(self) -> psycopg.Connection[Any]:
        return self._stack.enter_context(bare.postgresql())

    @cached_property
    def _runner(self) -> asyncio.Runner:
        return self._stack.enter_context(asyncio.Runner())

    def _child(self, name: str) -> Child:
        if name not in self.children:
            self.children[name] = Child(name, self._stack)
        return self.children[name]

    def _together(self, work: AsyncWork, tasks: int) -> Run:
        return lambda seconds: self._runner.run(pace.at_once([work] * tasks, seconds))

    def _smallest(self, way: Sequence[tuple[str, str]]) -> Work:
        return bare.smallest(self._session, way)

    def _replayed(self, commits: Sequence[Commit]) -> Work:
        return bare.replayed(self._session, commits)

    def _replayed_at_once(self, tasks: int) -> Run:
        """Each task with a connection of its own, which it closes again: servers have few."""
        commits = sent(OrderSaga)

        async def run(seconds: float) -> pace.Pace:
            async with AsyncExitStack() as stack:
                sessions = [
                    await stack.enter_async_context(await bare.apostgresql()) for _ in range(tasks)
                ]
                works = [bare.areplayed(session, commits) for session in sessions]
                return await pace.at_once(works, seconds)

        return lambda seconds: self._runner.run(run(seconds))

    def _in_memory_async(self) -> Run:
        def run(seconds: float) -> pace.Pace:
            saga = AsyncSaga(storage=MemorySagaStorage())
            return self._runner.run(pace.at_once([lambda: saga.arun(Order())], seconds))

        return run


def on_sqlite(what: str, alias: str) -> list[Case]:
    def replayed() -> Run:
        database = settings.DATABASES[alias]
        return one_by_one(
            bare.replayed_on_sqlite(
                database["NAME"], database["OPTIONS"]["init_command"], sent(OrderSaga, alias)
            )
        )

    return [
        Case(REPLAY, what, replayed, on_postgresql=False),
        Case(
            BY_DJANGO,
            what,
            lambda: one_by_one(bare.replayed_by_django(alias, sent(OrderSaga, alias))),
            on_postgresql=False,
        ),
        Case(OURS, what, lambda: one_by_one(ours(OrderSaga, alias)), on_postgresql=False),
    ]


def one_by_one(work: Work) -> Run:
    return lambda seconds: pace.in_sequence(work, seconds)


def by_threads(prepare: Callable[[ExitStack], Work]) -> Run:
    return lambda seconds: pace.in_threads(prepare, THREADS, seconds)


def ours(saga: type[Saga[Order]], alias: str = "default", *, size: int = 0) -> Work:
    """One saga, as its caller runs it."""
    made = saga(storage=DjangoSagaStorage(alias))
    note = text_of(size)

    def run() -> None:
        with suppress(SagaFailed):
            made.run(Order(note=note))

    return run


def aours(saga: type[Saga[Order]]) -> AsyncWork:
    made = saga()
    return lambda: made.arun(Order())


def in_memory() -> Run:
    def run(seconds: float) -> pace.Pace:
        saga = OrderSaga(storage=MemorySagaStorage())  # a new one, which is empty
        return pace.in_sequence(lambda: saga.run(Order()), seconds)

    return run


def text_of(size: int) -> str:
    """Text that does not compress much, as the database would do with it."""
    return "".join(Random(0).choices(ascii_letters, k=size))


@cache
def sent(saga: type[Saga[Order]], alias: str = "default", *, size: int = 0) -> tuple[Commit, ...]:
    """The commits of one such saga."""

    def run() -> UUID:
        try:
            return saga(storage=DjangoSagaStorage(alias)).run(Order(note=text_of(size))).id
        except SagaFailed as failed:
            return failed.execution.id

    connections[alias].ensure_connection()
    return tuple(captured(alias, run))


def number_of(commits: Sequence[Commit]) -> int:
    return sum(len(commit) for commit in commits)
