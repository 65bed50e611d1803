from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from testproject.shop.models import Order, Product


class ReadOnly(admin.ModelAdmin):
    """Stock and orders change by sagas alone: otherwise no ledger could agree with them."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    has_change_permission = has_delete_permission = has_add_permission


@admin.register(Product)
class ProductAdmin(ReadOnly):
    list_display = ["name", "price", "supplied", "in_stock"]


@admin.register(Order)
class OrderAdmin(ReadOnly):
    list_display = ["__str__", "product", "quantity", "address", "created_at", "saga"]
    list_select_related = ["product"]
    fields = ["product", "quantity", "address", "created_at", "saga"]
    readonly_fields = ["saga"]

    def saga(self, order: Order) -> SafeString:
        url = reverse("admin:django_saga_sagaexecution_change", args=[order.saga_id])
        return format_html('<a href="{}">{}</a>', url, order.saga_id)
