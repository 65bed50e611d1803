from __future__ import annotations

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import BadRequest
from django.db import transaction
from django.forms import IntegerField, ModelForm
from django.http import HttpRequest, HttpResponse, QueryDict, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST

from testproject.services import Services
from testproject.shop.models import Order, Product
from testproject.shop.sagas import OrderContext, OrderSaga
from testproject.shop.streaming import events
from testproject.shop.timeline import executions

NO_COURIER = {"status": 422, "message": "no courier goes there today"}


class OrderForm(ModelForm):
    quantity = IntegerField(min_value=1, initial=1)

    class Meta:
        model = Order
        fields = ["product", "quantity", "address"]


def index(request: HttpRequest) -> HttpResponse:
    form = OrderForm(initial={"product": Product.objects.first(), "address": "1 Main Street"})
    latest = [
        (OrderSaga.context_of(row).order_id, row)
        for row in executions().order_by("-created_at")[:12]
    ]
    return render(request, "shop/index.html", {"form": form, "latest": latest})


@require_POST
def enqueue(request: HttpRequest) -> HttpResponse:
    """Have the order driven elsewhere: it and its saga are stored together, or neither is."""
    with transaction.atomic():
        order = place(request.POST)
        OrderSaga().enqueue(OrderContext.of(order), saga_id=order.saga_id)
    return redirect("shop:index")


@require_POST
async def stream(request: HttpRequest) -> StreamingHttpResponse:
    """Drive the order here, and stream its steps.

    By POST, and so without the browser's EventSource: after a lost connection that one connects
    again, and would order again.
    """
    order = await sync_to_async(place)(request.POST)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingHttpResponse(events(order), headers=headers, content_type="text/event-stream")


def place(data: QueryDict) -> Order:
    form = OrderForm(data)
    if not form.is_valid():
        raise BadRequest(form.errors.as_text())
    order: Order = form.save()
    if "no_courier" in data:
        services = Services(settings.SHOP_SERVICES_URL)
        services.behave("/courier/book", order=order.pk, fail=NO_COURIER, times=1)
    return order
