"""The console in a real browser: an operator's night, by mouse and by keys; axe; every width."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth.models import Permission, User

from django_saga import Retry, Saga, SagaContext, SagaError, SagaStepHandler, batches
from django_saga.models import SagaAuditEntry, SagaExecution, SagaStepRecord
from django_saga.storage import DjangoSagaStorage
from tests.browsing import OpenPage, expect_text, in_a_thread, logged_in, press_to, walk_to, wear
from tests.operated import WORLD
from tests.screens import addresses, seed

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from pytest_django.live_server_helper import LiveServer

pytestmark = pytest.mark.django_db(transaction=True)

Opened = Callable[..., AbstractContextManager["Page"]]


class CardDeclined(Exception):
    """The bank said no."""


class WarehouseDown(Exception):
    """The warehouse does not answer."""


@dataclass
class Order(SagaContext):
    number: int


class World:
    """What goes wrong out there, and what was done, outside of every database."""

    def __init__(self) -> None:
        self.down: dict[str, Exception] = {}
        self.broke: set[int] = set()
        self.done: Counter[tuple[str, int]] = Counter()

    def call(self, what: str, order: Order) -> None:
        if what in self.down:
            said = self.down[what]
            raise type(said)(f"{said}: order {order.number}")
        if order.number in self.broke:
            raise CardDeclined(f"insufficient funds: order {order.number}")
        self.done[what, order.number] += 1


THERE = World()


class _Step(SagaStepHandler[Order]):
    retry = Retry(attempts=1)
    compensation_retry = Retry(attempts=1)


class ReserveStock(_Step):
    def act(self, context: Order) -> None:
        THERE.call("reserve", context)

    def compensate(self, context: Order) -> None:
        THERE.call("release", context)


class ChargeCard(_Step):
    def act(self, context: Order) -> None:
        THERE.call("charge", context)

    def compensate(self, context: Order) -> None:
        THERE.call("refund", context)


class BookCourier(_Step):
    def act(self, context: Order) -> None:
        THERE.call("book", context)


class NightlySaga(Saga[Order]):
    name = "tests.NightlySaga"
    steps = [ReserveStock, ChargeCard, BookCourier]


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    THERE.__init__()  # type: ignore[misc]
    WORLD.reset()
    yield
    THERE.__init__()  # type: ignore[misc]
    WORLD.reset()


@pytest.fixture
def operate(open_page: OpenPage, live_server: LiveServer) -> Opened:
    """Opens a page for a user who is logged in; options go to the browser's context."""

    def opened(user: User, **options: Any) -> AbstractContextManager[Page]:
        return logged_in(open_page, live_server.url, user, **options)

    return opened


def on_call() -> User:
    """Who may look, and retry, and no more."""
    user = User.objects.create_user("olga", is_staff=True)
    names = ["view_sagaexecution", "retry_sagaexecution", "view_sagafailuregroup"]
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return user


def run(number: int, **down: Exception) -> SagaExecution:
    """Run an order to its end, while that is down."""
    THERE.down = down
    saga_id = uuid.uuid4()
    with suppress(SagaError):
        NightlySaga(storage=DjangoSagaStorage("default")).run(Order(number), saga_id=saga_id)
    THERE.down = {}
    return SagaExecution.objects.get(pk=saga_id)


def copies(of: SagaExecution, number: int) -> None:
    """So many more like this one, with ids and orders of their own, and the records of it."""
    records = list(SagaStepRecord.objects.filter(execution=of).order_by("pk"))
    was = f"order {of.context.rpartition(':')[2].strip('}')}"
    first = SagaExecution.objects.count() + 1_000
    made, recorded = [], []
    for each in range(first, first + number):
        row = SagaExecution.objects.get(pk=of.pk)
        row.pk = uuid.uuid4()
        row.context = row.initial_context = f'{{"number":{each}}}'
        for name in ("error_message", "stuck_reason"):
            setattr(row, name, getattr(row, name).replace(was, f"order {each}"))
        made.append(row)
        for record in records:
            columns = {f.attname: getattr(record, f.attname) for f in record._meta.concrete_fields}
            columns |= {"id": None, "execution_id": row.pk}
            recorded.append(SagaStepRecord(**columns))
    SagaExecution.objects.bulk_create(made)
    SagaStepRecord.objects.bulk_create(recorded)


def a_bad_night(declined: int, down: int, stuck: int, healthy: int) -> None:
    """Failed ones of three causes among healthy ones; and all is well out there again."""
    copies(run(1, charge=CardDeclined("declined by the issuer")), declined - 1)
    copies(run(2, reserve=WarehouseDown("503 from the warehouse")), down - 1)
    warehouse, courier = WarehouseDown("503 from the warehouse"), WarehouseDown("no courier")
    copies(run(3, book=courier, release=warehouse), stuck - 1)
    copies(run(4), healthy - 1)
    THERE.done.clear()


def rows(**filters: Any) -> dict[uuid.UUID, dict[str, Any]]:
    """The rows as they are, by id."""
    return {row["id"]: row for row in SagaExecution.objects.filter(**filters).values()}


class Clicks:
    """Counts them."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.number = 0

    def __call__(self, role: Any, name: str, within: str = "#container") -> None:
        self.number += 1
        self.page.locator(within).get_by_role(role, name=name).click()


def test_the_operator_finds_a_cause_and_retries_one_then_ten_then_all_of_it(
    operate: Opened,
) -> None:
    """At most three clicks to the cause, six more to the end, and no other saga is touched."""
    a_bad_night(declined=80, down=40, stuck=30, healthy=20)
    before = rows()
    chosen = {pk for pk, row in before.items() if row["error_type"] == "CardDeclined"}
    assert Counter(row["status"] for row in before.values()) == {
        "FAILED": 120,
        "STUCK": 30,
        "COMPLETED": 20,
    }
    oldest = min(chosen, key=lambda pk: (before[pk]["created_at"], pk))
    THERE.broke = {int(before[oldest]["context"].rpartition(":")[2].strip("}"))}
    with operate(on_call()) as page:
        click = Clicks(page)
        page.goto("/admin/")
        click("link", "Sagas", ".app-django_saga caption")
        expect_text(page, ".saga-cards", "120 Failed, not dealt with")
        expect_text(page, ".saga-cards", "30 Stuck")
        click("link", "All failure groups")
        expect_text(page, "#content", "declined by the issuer")
        click("link", "CardDeclined", "#content")
        expect_text(page, ".saga-next", "retry")
        expect_text(page, ".saga-lead", "declined by the issuer")
        assert click.number <= 3
        click("link", "Retry: 80…")
        expect_text(page, "#content", "80 start anew")
        page.get_by_label("Reason").fill("the issuer is back")
        page.get_by_label("Executions per second").fill("100")
        click("button", "Try one")
        expect_text(page, ".saga-what", "1 of 80")
        expect_text(page, "#content", "1 failed again")
        THERE.broke = set()
        click("button", "Ten more")
        expect_text(page, ".saga-what", "11 of 80")
        expect_text(page, "#content", "10 completed")
        click("button", "All the rest")
        in_a_thread(lambda: batches.work(seconds=600))
        expect_text(page, ".saga-what", "80 of 80")
        expect_text(page, ".saga-what", "finished")
        expect_text(page, "#content", "79 completed")
        expect_text(page, "#content", "1 failed again")
        assert click.number <= 3 + 6
    after = rows()
    retried = Counter(row["retry_of_id"] for row in after.values() if row["retry_of_id"])
    assert retried == dict.fromkeys(chosen, 1)
    assert {pk: after[pk] for pk in before if pk not in chosen} == {
        pk: row for pk, row in before.items() if pk not in chosen
    }
    charged = {order: times for (what, order), times in THERE.done.items() if what == "charge"}
    assert len(charged) == 79
    assert set(charged.values()) == {1}
    assert (
        SagaAuditEntry.objects.filter(verb="retry", result="done", user_name="olga").count() == 80
    )
    assert SagaAuditEntry.objects.exclude(result="done").count() == 0


def test_the_operators_way_can_be_gone_with_the_keyboard_alone(operate: Opened) -> None:
    """By tab, enter and space, without scripts; what has the focus can be seen."""
    a_bad_night(declined=14, down=2, stuck=1, healthy=1)
    chosen = set(rows(error_type="CardDeclined"))
    with operate(on_call(), java_script_enabled=False) as page:
        page.goto("/admin/")
        press_to(page, page.locator(".app-django_saga caption a"))
        press_to(page, page.get_by_role("link", name="All failure groups"))
        press_to(page, page.locator("#content").get_by_role("link", name="CardDeclined"))
        press_to(page, page.get_by_role("link", name="Retry: 14…"))
        walk_to(page, page.get_by_label("Reason"))
        page.keyboard.type("the issuer is back")
        walk_to(page, page.get_by_label("Executions per second"))
        page.keyboard.press("Control+A")
        page.keyboard.type("100")
        press_to(page, page.get_by_role("button", name="Try one"), "Space")
        expect_text(page, ".saga-what", "1 of 14")
        press_to(page, page.get_by_role("button", name="Ten more"), "Space")
        expect_text(page, ".saga-what", "11 of 14")
        press_to(page, page.get_by_role("button", name="All the rest"))
        in_a_thread(lambda: batches.work(seconds=600))
        page.reload()
        expect_text(page, ".saga-what", "finished")
        expect_text(page, "#content", "14 completed")
    assert {row["retry_of_id"] for row in rows(retry_of__isnull=False).values()} == chosen


# They differ from screens that are looked at in their words alone.
ALIKE = re.compile(
    "audit entry [12]|execution (retried|resolved|due|undoing)"
    "|many (cancel|resolve|abandon|recover)|verb (recover|cancel|mark_done|release|resolve|abandon)"
)
RULES: dict[str, dict[str, list[str]]] = {
    "light": {},
    "dark": {"runOnly": ["color-contrast"]},  # the markup is the same
}


def test_axe_finds_nothing_serious_on_any_screen_in_either_theme(operate: Opened) -> None:
    from axe_playwright_python.sync_playwright import Axe

    user = User.objects.create_superuser("root")
    screens = addresses(seed(user))
    axe, found = Axe(), []
    # To preload would be to ask for other files.
    options = {"resultTypes": ["violations"], "preload": False}
    with operate(user) as page:
        for name, address in screens.items():
            if ALIKE.fullmatch(name):
                continue
            page.goto(address)
            page.evaluate(axe.axe_script)
            for scheme, rules in RULES.items():
                wear(page, scheme)
                said = page.evaluate("options => axe.run(options)", {**options, **rules})
                for violation in said["violations"]:
                    if violation["impact"] in ("serious", "critical"):
                        where = [node["html"] for node in violation["nodes"]]
                        found.append(f"{name}, {scheme}: {violation['id']}: {where}")
    assert not found, "\n".join(found)


HIDDEN = """() => [...document.querySelectorAll(".saga-scroll")].filter(
  each => each.scrollWidth > each.clientWidth).length"""


def test_no_screen_is_wider_than_360_pixels(operate: Opened) -> None:
    """Nor is anything in its tables, of effects and of attempts for instance, to be scrolled to."""
    user = User.objects.create_superuser("root")
    screens = addresses(seed(user, reason="y" * 300))
    too_wide = {}
    with operate(user, viewport={"width": 360, "height": 800}) as page:
        for name, address in screens.items():
            page.goto(address)
            wide = page.evaluate("document.documentElement.scrollWidth")
            if wide > 360 or page.evaluate(HIDDEN):
                too_wide[name] = wide
    assert not too_wide
