"""The shop's page, as the demo serves it: real services, uvicorn and recovery, a real browser."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPResponse
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener
from uuid import UUID

import pytest

from testproject.services import Services
from testproject.shop.management.commands.demo import ADMIN, PASSWORD, USER
from tests.test_demo import ROOT, free_port, shop_environment, standing, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Page

STEPS = ["ReserveStock", "ChargeCard", "BookCourier"]
OPENER = build_opener(ProxyHandler({}))  # a proxy in the environment is not for 127.0.0.1
OpenPage = Callable[[], AbstractContextManager["Page"]]


@dataclass
class Served:
    """The demo while it is served, and a look at its database from outside."""

    port: int
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def services(self) -> Services:
        return Services(self.environment["SHOP_SERVICES_URL"])

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        file = self.environment["DATABASE_URL"].removeprefix("sqlite:///")
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return connection.execute(query, parameters).fetchall()

    def status(self, saga_id: str) -> str:
        query = "SELECT status FROM django_saga_sagaexecution WHERE id = ?"
        return str(self.rows(query, saga_id.replace("-", ""))[0][0])

    def standing(self, order: int) -> dict[str, int]:
        effects = standing(self.environment)
        return {service: n for (number, service), n in effects.items() if number == order}

    def order(self, **more: str) -> HTTPResponse:
        """The answer to an order that a program places: a stream of events."""
        with OPENER.open(self.url) as page:
            token = SimpleCookie(page.headers["Set-Cookie"])["csrftoken"].value
        fields = {"product": "1", "quantity": "2", "address": "1 Main Street", **more}
        headers = {"Cookie": f"csrftoken={token}", "X-CSRFToken": token}
        request = Request(f"{self.url}/stream/", urlencode(fields).encode(), headers)
        response: HTTPResponse = OPENER.open(request, timeout=60)
        return response


def answers(url: str) -> bool:
    try:
        with OPENER.open(url, timeout=60):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served


@contextmanager
def serving(home: Path) -> Iterator[Served]:
    """The demo, served for one ``with`` block."""
    served = Served(free_port(), shop_environment(home))
    command = [sys.executable, "manage.py", "demo", "--serve", "--port", str(served.port)]
    with subprocess.Popen(
        command, cwd=ROOT, env=served.environment, stdout=subprocess.PIPE
    ) as process:
        try:
            wait_for(lambda: process.poll() is not None or answers(served.url))
            yield served
        finally:
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.terminate()
                raise
    assert b"Ctrl-C ends both." in output
    assert process.returncode == 0


def events(response: HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
    while line := response.readline().decode():
        name = line.removeprefix("event: ").strip()
        data = json.loads(response.readline().decode().removeprefix("data: "))
        assert response.readline() == b"\n"
        yield name, data


def test_an_order_is_streamed_as_server_sent_events(served: Served) -> None:
    """Each step as it is done, and how it all ended."""
    with served.order() as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        told = list(events(response))
    assert [name for name, _ in told] == ["placed", "step", "step", "step", "end"]
    assert [data["step"] for name, data in told if name == "step"] == STEPS
    assert told[-1][1] == {"status": "COMPLETED", "why": ""}
    assert served.status(told[0][1]["saga_id"]) == "COMPLETED"
    assert served.standing(number_of(told[0][1])) == {"payments": 1, "courier": 1}


def test_the_compensation_of_an_order_that_fails_is_streamed_too(served: Served) -> None:
    """The failed attempt, then each undone step, last first, and only then the end."""
    with served.order(no_courier="yes") as response:
        told = list(events(response))
    steps = [(data["step"], data["action"], data["outcome"]) for _, data in told[1:-1]]
    assert steps == [
        ("ReserveStock", "act", "DONE"),
        ("ChargeCard", "act", "DONE"),
        ("BookCourier", "act", "FAILED"),
        ("ChargeCard", "compensate", "DONE"),
        ("ReserveStock", "compensate", "DONE"),
    ]
    assert told[-1][1]["status"] == "FAILED"
    assert "no courier goes there today" in told[-1][1]["why"]
    assert served.standing(number_of(told[0][1])) == {}


def test_an_order_whose_client_goes_away_is_driven_on_by_recovery(served: Served) -> None:
    """The step in flight ends, nothing is compensated, and the watch completes the order."""
    response = served.order()
    stream = events(response)
    _, placed = next(stream)
    next(stream)
    response.close()

    wait_for(lambda: served.status(placed["saga_id"]) == "COMPLETED")

    records = served.rows(
        "SELECT step, action, outcome, driver FROM django_saga_sagasteprecord "
        "WHERE execution_id = ? ORDER BY id",
        placed["saga_id"].replace("-", ""),
    )
    assert [record[:3] for record in records] == [(step, "act", "DONE") for step in STEPS]
    assert len({driver for *_, driver in records}) == 2
    assert served.standing(number_of(placed)) == {"payments": 1, "courier": 1}


def number_of(placed: dict[str, Any]) -> int:
    return int(placed["order"].removeprefix("Order "))


def card(page: Page) -> Any:
    """The newest order on the page: its steps with what became of each, and its status."""
    return page.evaluate(
        """() => {
            const card = document.querySelector("article");
            const texts = (item) => [...item.children].slice(0, 2).map((span) => span.textContent);
            return {
                steps: [...card.querySelectorAll("li")].map(texts),
                status: card.querySelector(".status").textContent,
            };
        }"""
    )


def test_the_steps_of_an_order_appear_on_the_page_one_by_one(
    served: Served, open_page: OpenPage
) -> None:
    """While the courier still thinks, the page already shows the card's charge, and no end."""
    served.services.behave("/courier/book", delay=3)
    with open_page() as page:
        page.goto(served.url)
        page.get_by_role("button", name="Order", exact=True).click()
        page.wait_for_selector("article li:nth-of-type(2)")
        under_way = card(page)
        page.wait_for_selector("article[data-ended]")
        ended = card(page)
    served.services.behave("/courier/book", delay=0)
    assert under_way == {
        "steps": [["ReserveStock", "done"], ["ChargeCard", "done"]],
        "status": "RUNNING",
    }
    assert ended == {"steps": [[step, "done"] for step in STEPS], "status": "COMPLETED"}


def test_the_page_shows_what_is_undone_of_an_order_that_fails(
    served: Served, open_page: OpenPage
) -> None:
    """Nothing of it is hidden: the failure, its reason, and the compensation."""
    with open_page() as page:
        page.goto(served.url)
        page.get_by_role("button", name="Order that fails at the courier").click()
        page.wait_for_selector("article[data-ended]")
        assert card(page) == {
            "steps": [
                ["ReserveStock", "done"],
                ["ChargeCard", "done"],
                ["BookCourier", "failed"],
                ["ChargeCard", "undone"],
                ["ReserveStock", "undone"],
            ],
            "status": "FAILED",
        }
        assert "no courier goes there today" in page.inner_text("article")


def test_an_enqueued_order_is_on_the_page_that_follows(served: Served, open_page: OpenPage) -> None:
    """The order and its saga were stored together; without Redis the server drives it at once."""
    before = served.rows("SELECT count(*) FROM shop_order")
    with open_page() as page:
        page.goto(served.url)
        with page.expect_navigation():
            page.get_by_role("button", name="Enqueue").click()
        row = page.locator("tbody tr").first.inner_text()
    assert served.rows("SELECT count(*) FROM shop_order") == [(before[0][0] + 1,)]
    assert "COMPLETED" in row
    number = int(row.split()[1])
    assert served.standing(number) == {"payments": 1, "courier": 1}


def test_the_admin_shows_the_three_orders_and_retries_the_failed_one(
    served: Served, open_page: OpenPage
) -> None:
    """At the address and with the password that the demo prints; the retry pays and books once."""
    query = "SELECT saga_id FROM shop_order WHERE id IN (1, 2, 3) ORDER BY id"
    ids = [str(UUID(saga_id)) for (saga_id,) in served.rows(query)]
    assert served.standing(2) == {}
    with open_page() as page:
        page.goto(f"{served.url}{ADMIN}")
        page.fill("#id_username", USER)
        page.fill("#id_password", PASSWORD)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="Needs attention").wait_for()
        page.goto(f"{served.url}{ADMIN}sagaexecution/?status=all")
        for saga_id in ids:
            page.locator(f"#result_list a[href*='{saga_id}']").first.wait_for()
        page.locator(f"#result_list a[href*='{ids[1]}']").first.click()
        page.get_by_text("Retry…").click()
        page.get_by_role("button", name="Retry").click()
        page.get_by_text("This is the new execution").wait_for()
    assert served.standing(2) == {"payments": 1, "courier": 1}
