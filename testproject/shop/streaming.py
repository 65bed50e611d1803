"""A running order as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django_saga.models import SagaExecution, SagaStepRecord
from django_saga.signals import step_compensated, step_failed
from testproject.shop.models import Order
from testproject.shop.sagas import OrderContext, OrderSaga

Tell = Callable[..., None]


async def events(order: Order) -> AsyncIterator[str]:
    """Drive the order's saga, and tell what happens as it happens.

    A step that fails is compensated inside of the iteration over the steps, so the driving is a
    task of its own, and what it tells goes through a queue. When the client goes away, the task is
    cancelled: the step in flight ends, nothing is compensated, and recovery drives the order on.
    """
    news: asyncio.Queue[str] = asyncio.Queue()

    def tell(event: str, **data: Any) -> None:
        news.put_nowait(f"event: {event}\ndata: {json.dumps(data)}\n\n")

    tell("placed", order=str(order), saga_id=str(order.saga_id))
    driving = asyncio.create_task(drive(order, tell))
    driving.add_done_callback(lambda task: news.put_nowait(""))
    try:
        while part := await news.get():
            yield part
        await driving  # raises what nobody foresaw: the page sees a stream that has no end
    finally:
        driving.cancel()
        await asyncio.wait({driving})


async def drive(order: Order, tell: Tell) -> None:
    transaction = OrderSaga().transaction(OrderContext.of(order), saga_id=order.saga_id)
    why = ""
    with telling_of_trouble(order, tell):
        try:
            async with transaction:
                async for result in transaction:
                    tell("step", step=result.step_type.name, action="act", outcome="DONE")
        except Exception as error:  # the step's own, raised when its compensation is over
            why = f"{type(error).__name__}: {error}"
    tell("end", status=transaction.execution.status, why=why)


@contextmanager
def telling_of_trouble(order: Order, tell: Tell) -> Iterator[None]:
    """Failed attempts and compensations are no items of the iteration: signals tell of them."""

    async def receive(execution: SagaExecution, record: SagaStepRecord, **_: Any) -> None:
        if execution.id == order.saga_id:
            why = f"{record.error_type}: {record.error_message}" if record.error_type else ""
            tell("step", step=record.step, action=record.action, outcome=record.outcome, why=why)

    for signal in (step_failed, step_compensated):
        signal.connect(receive)
    try:
        yield
    finally:
        for signal in (step_failed, step_compensated):
            signal.disconnect(receive)
