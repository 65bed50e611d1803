"""Was anything lost or doubled? Asked of the services' ledger and the stock, not of sagas alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from django.db.models import Sum

from django_saga.models import SagaExecution
from testproject.shop.models import Product
from testproject.shop.sagas import OrderSaga
from testproject.shop.timeline import executions

# A completed order is paid and booked once; of one that failed nothing stands.
RIGHT = {SagaExecution.Status.COMPLETED: 1, SagaExecution.Status.FAILED: 0}


@dataclass(frozen=True)
class Account:
    """One execution of an order's saga, and how many effects of it stand at the services."""

    execution: SagaExecution
    payments: int
    bookings: int

    @property
    def problem(self) -> str:
        right = RIGHT.get(SagaExecution.Status(self.execution.status))
        if right is None:
            return f"{self.execution} has not ended: it is {self.execution.status}"
        if self.payments == self.bookings == right:
            return ""
        return (
            f"{self.execution} is {self.execution.status}: {right} payments and {right} bookings "
            f"should stand, but {self.payments} and {self.bookings} do"
        )


def accounts(ledger: dict[str, Any]) -> list[Account]:
    standing = Counter((saga_id(line), line["service"]) for line in ledger["standing"])
    return [
        Account(
            execution,
            standing[str(execution.pk), "payments"],
            standing[str(execution.pk), "courier"],
        )
        for execution in executions().order_by("created_at")
    ]


def problems(ledger: dict[str, Any]) -> list[str]:
    """Everything that was lost or doubled; empty if nothing was."""
    found = accounts(ledger)
    known = {str(account.execution.pk) for account in found}
    strangers = {saga_id(line) for line in ledger["standing"]} - known
    return [
        *(account.problem for account in found if account.problem),
        *(f"effects stand of {stranger}, which is no order's saga" for stranger in strangers),
        *stock_problems(account.execution for account in found),
    ]


def stock_problems(found: Iterable[SagaExecution]) -> Iterator[str]:
    sold: Counter[int] = Counter()
    for execution in found:
        if execution.status == SagaExecution.Status.COMPLETED:
            context = OrderSaga.context_of(execution)
            sold[context.product_id] += context.quantity
    for product in Product.objects.all():
        if product.in_stock != product.supplied - sold[product.pk]:
            yield (
                f"{product}: {product.in_stock} in stock, though {sold[product.pk]} of "
                f"{product.supplied} are in completed orders"
            )


def stock() -> dict[str, int]:
    """The numbers of all products together: how many were supplied, and are in stock."""
    return Product.objects.aggregate(supplied=Sum("supplied"), in_stock=Sum("in_stock"))


def saga_id(line: dict[str, Any]) -> str:
    return str(line["key"]).partition(":")[0]
