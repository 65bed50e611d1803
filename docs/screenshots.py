"""Makes the pictures of the admin from executions that really ran: python docs/screenshots.py

It needs Chromium, playwright and the test requirements. The pictures go to docs/images; with the
name of a directory, every screen goes there instead, light and dark, wide and narrow (360 px).
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT))
WORK = TemporaryDirectory(prefix="saga-pictures-")
os.environ["DATABASE_URL"] = f"sqlite:///{WORK.name}/saga.sqlite3"
os.environ.pop("REDIS_URL", None)
os.environ["DJANGO_SETTINGS_MODULE"] = "testproject.settings"

import django  # noqa: E402

django.setup()

from django.contrib.auth.models import User  # noqa: E402
from django.contrib.staticfiles.handlers import StaticFilesHandler  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db.models import F, Value  # noqa: E402
from django.db.models.functions import Replace  # noqa: E402
from django.test.testcases import LiveServerThread  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

from django_saga import (  # noqa: E402
    Fallback,
    Retry,
    Saga,
    SagaContext,
    SagaError,
    SagaStepHandler,
    batches,
    heartbeats,
    operations,
)
from django_saga.models import (  # noqa: E402
    SagaAuditEntry,
    SagaBatch,
    SagaExecution,
    SagaFailureGroup,
    SagaHeartbeat,
    SagaStepRecord,
)
from django_saga.operations import RETRY  # noqa: E402


class CardDeclined(Exception):
    """The bank said no."""


class GatewayTimeout(TimeoutError):
    """Nobody knows what the gateway did."""


class CourierUnavailable(Exception):
    """No courier takes it."""


class WarehouseOffline(Exception):
    """The warehouse does not answer."""


@dataclass
class OrderContext(SagaContext):
    order: int
    customer: str
    items: list[str]
    total: Decimal
    trouble: str = ""
    reservation: str | None = None
    payment: str | None = None
    courier: str | None = None


QUICK = Retry(attempts=3, delay=0.0)
WHAT_THEY_SAID = {
    "declined": CardDeclined("The issuer declined the charge (code 51, insufficient funds)."),
    "timeout": GatewayTimeout("POST /charges: no answer within 10 s."),
    "courier": CourierUnavailable("No pickup before Friday in area 10115."),
    "offline": WarehouseOffline("503 Service Unavailable from warehouse.internal"),
}


MENDED: set[str] = set()  # troubles that are over, but for every fifth order


def fail(context: OrderContext, *troubles: str) -> None:
    if context.trouble in MENDED and context.order % 5:
        return
    if context.trouble in troubles:
        said = WHAT_THEY_SAID[context.trouble]
        raise type(said)(*said.args)  # an error that is raised again has the frames of before


class ReserveStock(SagaStepHandler[OrderContext]):
    compensation_retry = QUICK

    def act(self, context: OrderContext) -> None:
        context.reservation = f"res_{context.order}"

    def compensate(self, context: OrderContext) -> None:
        fail(context, "offline")
        context.reservation = None


class ChargeCard(SagaStepHandler[OrderContext]):
    retry = QUICK
    compensation_retry = QUICK

    def act(self, context: OrderContext) -> None:
        fail(context, "declined", "timeout")
        context.payment = f"ch_{context.order}"


class ChargeWallet(SagaStepHandler[OrderContext]):
    def act(self, context: OrderContext) -> None:
        fail(context, "declined")
        context.payment = f"wal_{context.order}"


class BookCourier(SagaStepHandler[OrderContext]):
    retry = QUICK

    def act(self, context: OrderContext) -> None:
        fail(context, "courier", "offline")
        context.courier = f"pickup_{context.order}"


class OrderSaga(Saga[OrderContext]):
    name = "shop.OrderSaga"
    steps = [ReserveStock, Fallback(step=ChargeCard, fallback=ChargeWallet), BookCourier]


class ReturnSaga(Saga[OrderContext]):
    name = "shop.ReturnSaga"
    steps = [BookCourier, ReserveStock]


def seed() -> None:
    """Run sagas to their several ends, and lay them out over the last hours."""
    call_command("migrate", verbosity=0)
    User.objects.create_superuser("operator", password="operator", first_name="Olga")
    chance = random.Random(7)
    troubles = ["", "", "declined", "courier", "", "declined", "offline", "", "timeout", "courier"]
    for number in range(60):
        saga = ReturnSaga() if number % 7 == 3 else OrderSaga()
        context = OrderContext(
            order=48210 + number,
            customer=chance.choice(["Ada Byron", "Grace Murray", "Edsger Wybe"]),
            items=chance.sample(["lamp", "desk", "chair", "shelf", "rug"], k=2),
            total=Decimal(chance.randrange(1900, 49900)) / 100,
            trouble=troubles[number % len(troubles)],
        )
        try:
            execution = saga.run(context)
        except SagaError as error:
            execution = error.execution  # type: ignore[attr-defined]
        lay_out(execution, timedelta(minutes=(60 - number) * 7), timedelta(seconds=2 + number % 9))
    lose_a_driver()
    operate()
    dress()


def dress() -> None:
    """Name files and processes as a shop would, not as the machine that makes the pictures."""
    at = Replace(F("traceback"), Value(str(Path(__file__).resolve())), Value("/srv/shop/orders.py"))
    SagaStepRecord.objects.update(traceback=at, driver="web-1:4242")
    SagaExecution.objects.exclude(status="RUNNING").update(driver="web-1:4242")
    SagaFailureGroup.objects.update(frame="shop.orders.fail")
    SagaBatch.objects.update(driver="web-1:4242")
    SagaHeartbeat.objects.update(driver="cron-1:77")


def operate() -> None:
    """What the operator did since: a pause, a note, and a batch that is half done."""
    olga = User.objects.get()
    heartbeats.beat(every=30)
    operations.pause(ReturnSaga.name, "BookCourier", user=olga, reason="No courier before Friday.")
    declined = SagaExecution.objects.filter(status="FAILED", error_type="CardDeclined")
    group = declined[0].failure_group
    operations.note(group, "The issuer had an outage until 02:40; tell Ada.", user=olga)
    MENDED.add("declined")
    why = "The issuer is back since 02:40."
    rows = declined.filter(failure_group=group)
    title = f"failure group: CardDeclined in {OrderSaga.name}"
    batches.create(RETRY, rows, user=olga, reason=why, title=title, rate=100.0, allowed=4)
    batches.work(seconds=60)


def lay_out(execution: SagaExecution, ago: timedelta, took: timedelta) -> None:
    rows = SagaExecution.objects.filter(pk=execution.pk)
    times = SagaExecution.objects.values("created_at", "finished_at").get(pk=execution.pk)
    began = times["created_at"] - ago
    ended = began + took if times["finished_at"] else None
    rows.update(created_at=began, updated_at=began + took, finished_at=ended)
    records = list(SagaStepRecord.objects.filter(execution=execution))
    for number, record in enumerate(records, 1):
        record.duration = took.total_seconds() / len(records)
        record.created_at = began + number * took / len(records)
        record.save()


def lose_a_driver() -> None:
    """What a killed process leaves: a step in flight, and a lease that runs out."""
    newest = SagaExecution.objects.filter(status="COMPLETED", saga=OrderSaga.name)[0]
    newest.status, newest.step, newest.in_flight = "RUNNING", "BookCourier", True
    newest.attempt, newest.finished_at, newest.effects = 1, None, newest.effects[:2]
    newest.lease_until = newest.updated_at + timedelta(minutes=1)
    newest.driver = "web-2:4711"
    newest.save()
    SagaStepRecord.objects.filter(execution=newest, step="BookCourier").delete()


PICTURES = {
    "overview": ("overview", "light"),
    "overview-dark": ("overview", "dark"),
    "groups": ("groups", "light"),
    "group": ("group", "light"),
    "admin-list": ("list", "light"),
    "admin-detail": ("detail-stuck", "light"),
    "execution-dark": ("detail-stuck", "dark"),
    "confirmation": ("confirmation", "light"),
    "batch": ("batch", "light"),
}


def main() -> None:
    seed()
    stuck = SagaExecution.objects.filter(status="STUCK").order_by("-created_at")[0].pk
    lost = SagaExecution.objects.get(status="RUNNING").pk
    open_ones = SagaExecution.objects.filter(status="FAILED", settled_at=None, retry_of=None)
    declined = open_ones.filter(error_type="CardDeclined")[0]
    failed, group = declined.pk, declined.failure_group
    batch = SagaBatch.objects.get().pk
    entry = SagaAuditEntry.objects.all()[0].pk
    base = "/admin/django_saga/sagaexecution/"
    screens = {
        "overview": "/admin/django_saga/",
        "groups": "/admin/django_saga/sagafailuregroup/",
        "group": f"/admin/django_saga/sagafailuregroup/{group}/change/",
        "list": base,
        "list-all": f"{base}?status=all",
        "detail-stuck": f"{base}{stuck}/change/",
        "detail-lost": f"{base}{lost}/change/",
        "detail-failed": f"{base}{failed}/change/",
        "confirmation": f"{base}retry/?group={group}&status=all",
        "confirm-all": f"{base}retry/?",
        "confirm-one": f"{base}{stuck}/retry/",
        "resolve": f"{base}{stuck}/resolve/",
        "export": f"{base}export/?",
        "batches": "/admin/django_saga/sagabatch/",
        "batch": f"/admin/django_saga/sagabatch/{batch}/change/",
        "audit": "/admin/django_saga/sagaauditentry/",
        "audit-entry": f"/admin/django_saga/sagaauditentry/{entry}/change/",
        "pauses": "/admin/django_saga/sagapause/",
        "pause": "/admin/django_saga/sagapause/pause/",
    }
    server = LiveServerThread("127.0.0.1", StaticFilesHandler, port=0)
    server.daemon = True
    server.start()
    server.is_ready.wait()
    if server.error:
        raise server.error
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or which("chromium"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page()
        site = f"http://127.0.0.1:{server.port}"
        log_in(page, site)
        if len(sys.argv) > 1:
            picture_all(page, site, screens, Path(sys.argv[1]))
        else:
            IMAGES.mkdir(exist_ok=True)
            for name, (screen, scheme) in PICTURES.items():
                picture(page, site + screens[screen], IMAGES / f"{name}.png", 1200, scheme)
        browser.close()
    server.terminate()


def log_in(page: Page, site: str) -> None:
    page.goto(f"{site}/admin/")
    page.fill("#id_username", "operator")
    page.fill("#id_password", "operator")
    page.click("[type=submit]")
    page.wait_for_selector("#user-tools")


def picture_all(page: Page, site: str, screens: dict[str, str], to: Path) -> None:
    for name, address in screens.items():
        for scheme in ("light", "dark"):
            for width in (1200, 360):
                file = to / f"{name}-{scheme}-{width}.png"
                picture(page, site + address, file, width, scheme, whole=True)


def picture(
    page: Page, url: str, file: Path, width: int, scheme: Any, *, whole: bool = False
) -> None:
    page.set_viewport_size({"width": width, "height": 780})
    page.emulate_media(color_scheme=scheme)
    page.goto(url)
    page.screenshot(path=file, full_page=whole)


if __name__ == "__main__":
    main()
