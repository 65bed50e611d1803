"""The demo: three orders with real services, a real crash, and proof that nothing got lost."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import CommandError, CommandParser, call_command
from django.core.management.base import BaseCommand
from django.db.models import F
from django.db.models.functions import Now

from django_saga import SagaFailed
from django_saga.models import SagaExecution
from testproject.services import ACTS, UNDOS, Services, running
from testproject.shop import audit, serving
from testproject.shop.models import Order, Product
from testproject.shop.sagas import OrderContext, OrderSaga
from testproject.shop.timeline import effects, executions, styled, timeline

USER = PASSWORD = "demo"
ADMIN = "/admin/django_saga/"
PRODUCTS = {"Green tea": "4.50", "Teapot": "39.00", "Tea cups, set of four": "24.80"}
LEASE = 3  # seconds; a crash is noticed when it has run out
PATIENCE = 60  # seconds for anything that should take no more than a few
WATCHABLE = 0.7  # seconds that each call of a service takes while a person watches

RUN = (
    "from testproject.shop.sagas import *; order = Order.objects.get(pk={}); "
    "OrderSaga().run(OrderContext.of(order), saga_id=order.saga_id)"
)


class Command(BaseCommand):
    help = (
        "Runs three orders: one completes, one fails and is compensated, one is killed and "
        "recovered. With --serve, serves the shop and the admin with the orders that there are."
    )
    requires_system_checks = ()  # of tables that the first start has yet to make

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--serve", action="store_true", help="serve the shop and the admin")
        parser.add_argument("--port", type=int, default=8000, help="of the server (default: 8000)")

    def handle(self, *args: Any, serve: bool, port: int, **options: Any) -> None:
        # Told to end, it must not leave its processes behind: end as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.refuse_taken_ports(port if serve else None)
        try:
            self.prepare()
            with self.services() as services:
                if not serve or not executions().exists():
                    self.run_orders(services)
                if serve:
                    self.serve(services, port)
                else:
                    self.invite(port)
        except KeyboardInterrupt:
            sys.exit(130)

    def serve(self, services: Services, port: int) -> None:
        for path in (*ACTS, *UNDOS):
            services.behave(path, delay=WATCHABLE)
        self.say(
            f"The shop:   http://127.0.0.1:{port}/",
            f"The admin:  http://127.0.0.1:{port}{ADMIN}  (user: {USER}, password: {PASSWORD})",
            "Ctrl-C ends both.",
        )
        sys.exit(serving.serve(port))

    def refuse_taken_ports(self, port: int | None) -> None:
        """Say so now: the servers would only after the demo's work, at length."""
        refuse_taken(
            services_port(),
            "Is the demo running in another terminal already? Otherwise name a free port, as "
            "SHOP_SERVICES_URL=http://127.0.0.1:PORT in the environment.",
        )
        if port is not None:
            refuse_taken(port, "Name a free one: python run.py demo --serve --port PORT")

    def prepare(self) -> None:
        """Bring the database, the demo's user and the stock to where each start wants them."""
        call_command("migrate", verbosity=0)
        user, _ = get_user_model().objects.get_or_create(
            username=USER, defaults={"is_staff": True, "is_superuser": True}
        )
        if not user.check_password(PASSWORD):
            user.set_password(PASSWORD)
            user.save()
        for name, price in PRODUCTS.items():
            defaults = {"price": price, "supplied": 0, "in_stock": 0}
            Product.objects.get_or_create(name=name, defaults=defaults)
        scarce = Product.objects.filter(in_stock__lt=20)
        scarce.update(supplied=F("supplied") + 100, in_stock=F("in_stock") + 100)
        if not Order.objects.exists():  # a new database: an old ledger tells of other orders
            Path(settings.SHOP_LEDGER).unlink(missing_ok=True)

    @contextmanager
    def services(self) -> Iterator[Services]:
        with ExitStack() as stack:
            try:
                services = stack.enter_context(running(settings.SHOP_LEDGER, services_port()))
            except RuntimeError as error:
                raise CommandError(str(error)) from error
            yield services

    # The three orders

    def run_orders(self, services: Services) -> None:
        # The timelines say it all: without a handler the warnings would be on the terminal too.
        logging.getLogger("django_saga").addHandler(logging.NullHandler())
        self.say(f"Payments and courier: process {services.pid} at {services.url}")
        self.say(f"Their ledger:         {settings.SHOP_LEDGER}")
        self.complete(services)
        self.fail(services)
        self.kill(services)
        self.prove(services)

    def complete(self, services: Services) -> None:
        order = self.place("Teapot", 1)
        self.title(f"{order} completes", "Stock, card, courier: one step after the other.")
        self.drive(order)
        self.show(order, services)

    def fail(self, services: Services) -> None:
        order = self.place("Green tea", 3)
        self.title(
            f"{order} fails, and is compensated",
            "The card is declined, so its fallback, the wallet, pays. Then no courier goes there:",
            "what was done is undone, last first.",
        )
        declined = {"status": 402, "message": "the card is declined"}
        no_courier = {"status": 422, "message": "no courier goes there"}
        services.behave("/payments/charge", order=order.pk, fail=declined, times=1)
        services.behave("/courier/book", order=order.pk, fail=no_courier, times=1)
        self.drive(order)
        self.show(order, services)

    def kill(self, services: Services) -> None:
        order = self.place("Tea cups, set of four", 2)
        self.title(f"{order} is killed with kill -9, and recovered")
        services.behave("/payments/charge", order=order.pk, reply_delay=LEASE, times=1)
        shell = [sys.executable, str(settings.BASE_DIR / "manage.py"), "shell", "--verbosity=0"]
        environment = {**os.environ, "SAGA_LEASE": str(LEASE)}
        with subprocess.Popen([*shell, "-c", RUN.format(order.pk)], env=environment) as process:
            try:
                self.wait_until(lambda: services.effects(order.pk)["standing"], process)
            finally:
                process.kill()
        self.say(
            f"  Process {process.pid} ran it. The payment service had taken the money, but not yet",
            f"  answered, when the process was killed (exit status {process.returncode}). "
            "What it left behind:",
        )
        self.show(order, services)
        self.say("", f"  Its lease of {LEASE} s runs out; then: manage.py recover_sagas")
        self.wait_until(executions().filter(pk=order.saga_id, lease_until__lte=Now()).exists)
        call_command("recover_sagas", stdout=self.stdout, stderr=self.stderr)
        self.say(
            "", "  The card was charged again, with the same key: the service took nothing twice."
        )
        self.show(order, services)

    def place(self, product: str, quantity: int) -> Order:
        found = Product.objects.get(name=product)
        return Order.objects.create(product=found, quantity=quantity, address="1 Main Street")

    def drive(self, order: Order) -> None:
        try:
            OrderSaga().run(OrderContext.of(order), saga_id=order.saga_id)
        except SagaFailed as failed:
            self.say(f"  SagaFailed: step {failed.step}: {failed.__cause__}")

    def wait_until(self, condition: Callable[[], Any], process: Any = None) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline or (process and process.poll() is not None):
                raise CommandError(f"This took more than {PATIENCE} s, or its process ended.")
            time.sleep(0.02)

    # What is shown

    def show(self, order: Order, services: Services) -> None:
        execution = SagaExecution.objects.get(pk=order.saga_id)
        for line in timeline(execution, self.style):
            self.say(f"  {line.rstrip()}")
        stock = Product.objects.get(pk=order.product_id)
        self.say(
            f"  In the services' ledger: {effects(services.effects(order.pk))}",
            f"  In stock: {stock.in_stock} of {stock.supplied} ({stock})",
        )

    def prove(self, services: Services) -> None:
        ledger = services.effects()
        self.title(
            "Was anything lost or doubled?",
            "What stands in the services' ledger, for each execution that there is:",
        )
        self.say(self.style.MIGRATE_LABEL("  order  payments  bookings  status"))
        for account in audit.accounts(ledger):
            status = styled(self.style, account.execution.status)
            order = OrderSaga.context_of(account.execution).order_id
            self.say(f"  {order:5}  {account.payments:8}  {account.bookings:8}  {status}")
        for product in Product.objects.all():
            self.say(f"  {product}: {product.in_stock} of {product.supplied} in stock")
        if problems := audit.problems(ledger):
            raise CommandError("\n".join(["Something was lost or doubled.", *problems]))
        self.say(self.style.SUCCESS("  Nothing was lost, nothing was doubled."))

    def invite(self, port: int) -> None:
        self.title("Look at them in the admin")
        self.say(
            "  python run.py demo --serve",
            "",
            f"  and open http://127.0.0.1:{port}{ADMIN}",
            f"  User: {USER}  Password: {PASSWORD}",
            f"  Order more at http://127.0.0.1:{port}/",
        )

    def title(self, title: str, *lines: str) -> None:
        self.say("", self.style.MIGRATE_HEADING(title), *(f"  {line}" for line in lines))

    def say(self, *lines: str) -> None:
        for line in lines:
            self.stdout.write(line)
        self.stdout.flush()


def services_port() -> int:
    return urlsplit(settings.SHOP_SERVICES_URL).port or 80


def refuse_taken(port: int, todo: str) -> None:
    """Raise CommandError where no server can be had on this port."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"Port {port} cannot be had: {why}. {todo}") from error
