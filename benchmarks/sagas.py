"""The sagas that are measured: three steps that do next to nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from benchmarks.names import WAIT
from django_saga import Saga, SagaContext, SagaStepHandler


class Refused(Exception):
    """What the failing step raises."""


@dataclass
class Order(SagaContext):
    order_id: int = 1
    items: list[str] = field(default_factory=lambda: ["a", "b"])
    total: Decimal = Decimal("12.50")
    reservation_id: str | None = None
    note: str = ""


class S0(SagaStepHandler[Order]):
    def act(self, context: Order) -> Any:
        pass

    def compensate(self, context: Order) -> Any:
        pass


class S1(S0):
    pass


class S2(S0):
    pass


class Refusing(S0):
    def act(self, context: Order) -> None:
        raise Refused("no")


class A0(SagaStepHandler[Order]):
    async def act(self, context: Order) -> None:
        pass

    async def compensate(self, context: Order) -> None:
        pass


class A1(A0):
    pass


class A2(A0):
    pass


class W0(A0):
    async def act(self, context: Order) -> None:
        await asyncio.sleep(WAIT)


class W1(W0):
    pass


class W2(W0):
    pass


class N0(S0):
    """Notes something in the context, which is then stored anew, as most real steps have it."""

    def act(self, context: Order) -> None:
        context.reservation_id = f"{type(self).__name__}-4711"


class N1(N0):
    pass


class N2(N0):
    pass


class OrderSaga(Saga[Order]):
    steps = [S0, S1, S2]


class RefusedSaga(Saga[Order]):
    steps = [S0, S1, Refusing]


class AsyncSaga(Saga[Order]):
    steps = [A0, A1, A2]


class WaitingSaga(Saga[Order]):
    steps = [W0, W1, W2]


class NotingSaga(Saga[Order]):
    steps = [N0, N1, N2]
