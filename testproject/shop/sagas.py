"""The order's saga: one step in this database, two at services that are reached over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from django.conf import settings
from django.db.models import F

from django_saga import (
    Abort,
    Fallback,
    Retry,
    Saga,
    SagaContext,
    SagaStepHandler,
    current_step,
)
from testproject.services import Refused, Services
from testproject.shop.models import Order, Product


@dataclass
class OrderContext(SagaContext):
    order_id: int
    product_id: int
    quantity: int
    amount: Decimal
    address: str
    payment_id: str | None = None
    booking_id: str | None = None

    @classmethod
    def of(cls, order: Order) -> OrderContext:
        amount = order.product.price * order.quantity
        return cls(order.pk, order.product_id, order.quantity, amount, order.address)


def call(path: str, **payload: Any) -> dict[str, Any]:
    """Call a service within the step's time, with the key that all of its attempts share."""
    step = current_step()
    services = Services(settings.SHOP_SERVICES_URL)
    return services.post(path, step.idempotency_key, timeout=step.remaining or 0.01, **payload)


def undo(path: str, order_id: int, **known: str | None) -> None:
    """Undo by the id that the act brought back or, if its answer was lost, by the act's own key."""
    if all(known.values()):
        call(path, **known)
        return
    call(path, order=order_id, charge_key=current_step().act_idempotency_key)


class ReserveStock(SagaStepHandler[OrderContext]):
    atomic = True

    def act(self, context: OrderContext) -> None:
        enough = Product.objects.filter(pk=context.product_id, in_stock__gte=context.quantity)
        if not enough.update(in_stock=F("in_stock") - context.quantity):
            raise Abort("sold out")

    def compensate(self, context: OrderContext) -> None:
        product = Product.objects.filter(pk=context.product_id)
        product.update(in_stock=F("in_stock") + context.quantity)


class Charge(SagaStepHandler[OrderContext]):
    """What both ways to pay have in common."""

    path: ClassVar[str]
    timeout = 5

    def act(self, context: OrderContext) -> str | None:
        answer = call(self.path, order=context.order_id, amount=context.amount)
        context.payment_id = answer["payment_id"]
        return context.payment_id

    def compensate(self, context: OrderContext) -> None:
        undo("/payments/refund", context.order_id, payment_id=context.payment_id)


class ChargeCard(Charge):  # no retry: a card that is declined stays so, and there is a fallback
    path = "/payments/charge"


class ChargeWallet(Charge):
    path = "/payments/wallet"
    retry = Retry(attempts=3, delay=0.5)


class BookCourier(SagaStepHandler[OrderContext]):
    timeout = 5
    retry = Retry(attempts=3, delay=0.5)

    def act(self, context: OrderContext) -> str | None:
        try:
            answer = call("/courier/book", order=context.order_id, address=context.address)
        except Refused as refused:  # asking again would not help
            raise Abort(str(refused)) from refused
        context.booking_id = answer["booking_id"]
        return context.booking_id

    def compensate(self, context: OrderContext) -> None:
        undo("/courier/cancel", context.order_id, booking_id=context.booking_id)


class OrderSaga(Saga[OrderContext]):
    steps = [
        ReserveStock,
        Fallback(step=ChargeCard, fallback=ChargeWallet),
        BookCourier,
    ]
