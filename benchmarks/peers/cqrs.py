"""python-cqrs: its saga, on its SQLAlchemy storage over asyncpg and on its memory storage."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

from cqrs import Response, SagaStepHandler
from cqrs.saga.models import SagaContext
from cqrs.saga.saga import Saga
from cqrs.saga.storage.memory import MemorySagaStorage
from cqrs.saga.storage.sqlalchemy import Base, SqlAlchemySagaStorage
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.names import WAIT
from benchmarks.pace import AsyncWork, Pace, at_once
from benchmarks.peers.line import Measure, database_url, serve

CONNECTIONS = 32


class Refused(Exception):
    pass


@dataclass
class Order(SagaContext):
    order_id: int = 1
    items: list[str] = field(default_factory=lambda: ["a", "b"])
    total: str = "12.50"
    reservation_id: str | None = None


class S0(SagaStepHandler[Order, Response]):
    async def act(self, context: Order) -> Any:
        return self._generate_step_result(Response())

    async def compensate(self, context: Order) -> None:
        pass


class S1(S0):
    pass


class S2(S0):
    pass


class Refusing(S0):
    async def act(self, context: Order) -> Any:
        raise Refused("no")


class W0(S0):
    async def act(self, context: Order) -> Any:
        await asyncio.sleep(WAIT)
        return self._generate_step_result(Response())


class W1(W0):
    pass


class W2(W0):
    pass


class OrderSaga(Saga[Order]):
    steps = [S0, S1, S2]


class RefusedSaga(Saga[Order]):
    steps = [S0, S1, Refusing]


class WaitingSaga(Saga[Order]):
    steps = [W0, W1, W2]


class Container:
    """Makes a handler by calling its class, as django-saga does without one."""

    async def resolve(self, type_: type[Any]) -> Any:
        return type_()


def work(saga: Saga[Order], storage: Any) -> AsyncWork:
    container = Container()

    async def run() -> None:
        transaction = saga.transaction(Order(), container, storage)
        with contextlib.suppress(Refused):
            async with transaction:
                async for _ in transaction:
                    pass

    return run


def main() -> None:
    logging.disable(logging.CRITICAL)
    runner = asyncio.Runner()
    engine = create_async_engine(
        database_url("postgresql+asyncpg"),
        pool_size=CONNECTIONS,
        max_overflow=0,
    )

    async def migrate() -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    runner.run(migrate())
    stored = SqlAlchemySagaStorage(async_sessionmaker(engine, expire_on_commit=False))

    async def measure(saga: Saga[Order], tasks: int, seconds: float) -> Pace:
        # Each task has its connection before the clock starts, and none is kept after.
        for session in [await engine.connect() for _ in range(tasks)]:
            await session.close()
        pace = await at_once([work(saga, stored)] * tasks, seconds)
        await engine.dispose()
        return pace

    def on_postgresql(saga: Saga[Order]) -> Measure:
        return lambda tasks, seconds: runner.run(measure(saga, tasks, seconds))

    def in_memory(tasks: int, seconds: float) -> Pace:
        storage = MemorySagaStorage()
        return runner.run(at_once([work(OrderSaga(), storage)] * tasks, seconds))

    serve(
        ["python-cqrs", "sqlalchemy", "asyncpg"],
        {
            "success": on_postgresql(OrderSaga()),
            "failure": on_postgresql(RefusedSaga()),
            "waits": on_postgresql(WaitingSaga()),
            "memory": in_memory,
        },
    )


if __name__ == "__main__":
    main()
