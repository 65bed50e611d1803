from __future__ import annotations

import uuid

from django.db import models


class Product(models.Model):
    name = models.CharField(max_length=100, unique=True)
    price = models.DecimalField(max_digits=8, decimal_places=2)
    supplied = models.PositiveIntegerField(help_text="All that was ever put into the stock.")
    in_stock = models.PositiveIntegerField(help_text="What is left of it and not reserved.")

    def __str__(self) -> str:
        return self.name


class Order(models.Model):
    product = models.ForeignKey(Product, on_delete=models.PROTECT)
    quantity = models.PositiveIntegerField(default=1)
    address = models.CharField(max_length=200)
    # Fixed with the order: however often its saga is started, it is the same execution.
    saga_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"Order {self.pk}"
