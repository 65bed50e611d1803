"""The admin of executions in a real browser: with and without scripts, keyboard, themes, widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User

from django_saga import batches
from django_saga.models import SagaAuditEntry, SagaExecution
from django_saga.operations import RETRY
from tests.browsing import SCHEMES, OpenPage, expect_text, in_a_thread, logged_in, press_to, wear
from tests.operated import WORLD, completed_trip, driven_trip, failed_trip, lost_trip, stuck_trip

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from pytest_django.live_server_helper import LiveServer

pytestmark = pytest.mark.django_db(transaction=True)

APP = "/admin/django_saga/"
BASE = "/admin/django_saga/sagaexecution/"
GROUPS = "/admin/django_saga/sagafailuregroup/"
Opened = Callable[..., AbstractContextManager["Page"]]


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    WORLD.reset()
    yield
    WORLD.reset()


@pytest.fixture
def operate(open_page: OpenPage, live_server: LiveServer) -> Opened:
    """Opens a page for an operator who is logged in; options go to the browser's context."""

    def opened(**options: Any) -> AbstractContextManager[Page]:
        root = User.objects.create_superuser("root")
        return logged_in(open_page, live_server.url, root, **options)

    return opened


def test_an_operator_without_scripts_finds_and_retries_all_of_one_cause(operate: Opened) -> None:
    matching = [failed_trip() for _ in range(3)]
    stuck = stuck_trip()
    completed_trip()
    with operate(java_script_enabled=False) as page:
        page.goto(BASE)
        expect_rows(page, 4)
        page.get_by_role("link", name="Pay", exact=True).click()
        expect_rows(page, 3)
        page.get_by_role("link", name="Retry all that match…").click()
        expect_text(page, "#content", "3 start anew")
        page.get_by_label("Reason").fill("the bank is back")
        page.get_by_role("button", name="Try one").click()
        expect_text(page, ".saga-what", "1 of 3")
        page.get_by_role("button", name="All the rest").click()
        expect_text(page, ".saga-what", "finished")
        expect_text(page, "#content", "3 completed")
    retried = SagaExecution.objects.exclude(retry_of=None)
    assert {r.retry_of_id for r in retried} == {execution.pk for execution in matching}
    assert SagaExecution.objects.get(pk=stuck.pk).status == "STUCK"
    assert LogEntry.objects.count() == 2
    assert SagaAuditEntry.objects.filter(verb="retry", result="done").count() == 3


def test_the_page_of_a_batch_follows_it_by_itself_and_keeps_the_focus(operate: Opened) -> None:
    for _ in range(3):
        failed_trip()
    batch = batches.create(
        RETRY,
        SagaExecution.objects.all(),
        user=None,
        reason="the bank is back",
        title="all",
        rate=100.0,
        allowed=None,
    )
    with operate() as page:
        page.goto(f"/admin/django_saga/sagabatch/{batch.pk}/change/")
        expect_text(page, ".saga-what", "0 of 3")
        page.get_by_label("Reason").fill("lunch")
        page.get_by_role("button", name="Stop").focus()
        in_a_thread(lambda: batches.work(seconds=60, stopped=after(2)))
        expect_text(page, ".saga-what", "1 of 3")
        assert page.evaluate("document.activeElement.value") == "stop"
        assert page.get_by_label("Reason").input_value() == "lunch"
        in_a_thread(lambda: batches.work(seconds=60))
        expect_text(page, ".saga-what", "finished")
        expect_text(page, "#content", "3 completed")


def after(times: int) -> Callable[[], bool]:
    """Says no so many times, then yes."""
    answers = iter([False] * times)
    return lambda: next(answers, True)


def test_an_operator_with_the_keyboard_alone_retries_a_stuck_one(operate: Opened) -> None:
    stuck = stuck_trip()
    with operate() as page:
        page.goto(BASE)
        press_to(page, page.locator("#result_list a"))
        press_to(page, page.get_by_role("link", name="Retry…"))
        expect_text(page, "#content", "It tries to undo Pack")
        press_to(page, page.get_by_role("button", name="Retry"))
        expect_text(page, ".messagelist", "Retry: done. It is failed now.")
        expect_text(page, ".saga-what", "No effect stands")
    assert SagaExecution.objects.get(pk=stuck.pk).status == "FAILED"


def test_an_open_page_follows_the_execution_and_leaves_what_is_in_use(operate: Opened) -> None:
    """What was unfolded stays unfolded, the focus where it was; and nothing is asked for at the
    end."""
    execution = lost_trip()
    with operate() as page:
        page.goto(f"{BASE}{execution.pk}/change/")
        page.locator("#saga-mermaid summary").click()
        page.get_by_role("link", name="Cancel…").focus()
        other = page.context.new_page()
        other.goto(f"{BASE}{execution.pk}/skip/")
        other.fill("[name=reason]", "packed already")
        other.get_by_role("button", name="Skip step").click()
        expect_text(other, ".messagelist", "Skip step: done. It is completed now.")
        page.bring_to_front()
        expect_text(page, ".saga-what", "completed")
        expect_text(page, "#saga-heard", "completed")
        assert page.evaluate("document.querySelector('#saga-mermaid').open")
        assert page.get_attribute("#content-main", "data-saga-every") is None


def test_a_form_that_is_refused_keeps_what_was_typed(operate: Opened) -> None:
    stuck = stuck_trip()
    with operate(viewport={"width": 360, "height": 800}, java_script_enabled=False) as page:
        page.goto(f"{BASE}{stuck.pk}/resolve/")
        page.fill("[name=reason]", "the bag was found")
        page.get_by_role("button", name="Resolve").click()
        expect_text(page, "[role=alert]", "Nothing was done")
        expect_text(page, ".errorlist", "Tick each effect")
        assert page.input_value("[name=reason]") == "the bag was found"
        page.get_by_label("Pack: stands").check()
        page.get_by_role("button", name="Resolve").click()
        expect_text(page, ".saga-next", "It was settled by hand")
        page.get_by_role("button", name="Show it unmasked").click()
        expect_text(page, "#context", "Nothing is masked here")


def expect_rows(page: Page, number: int) -> None:
    """Wait until the list has that many rows."""
    from playwright.sync_api import expect

    expect(page.locator("#result_list tbody tr")).to_have_count(number)


def test_with_scripts_all_pages_are_selected_and_confirmed(operate: Opened) -> None:
    for _ in range(52):
        failed_trip()
    with operate() as page:
        page.goto(BASE)
        page.check("#action-toggle")
        page.get_by_text("Select all that match").click()
        expect_text(page, ".actions", "All that match are selected")
        page.select_option("select[name=action]", "retry_selected")
        page.click("button[name=index]")
        expect_text(page, "#content", "52 start anew")
        page.get_by_role("link", name="No, take me back").click()
        expect_rows(page, 50)
        press_to(page, page.locator("a[rel=next]"))
        expect_rows(page, 2)
        page.check("#result_list tbody tr:first-child input")
        page.select_option("select[name=action]", "retry_selected")
        page.click("button[name=index]")
        page.get_by_label("Reason").fill("to see")
        page.get_by_role("button", name="All 1").click()
        expect_text(page, "#content", "1 completed")
    assert SagaExecution.objects.exclude(retry_of=None).count() == 1


RATIO = """(text, back) => {
  const light = color => {
    const [r, g, b] = color.match(/[0-9.]+/g).map(Number).map(c => c / 255).map(
      c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [a, b] = [light(text), light(back)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
CONTRAST = """(badges, name) => badges.map(badge => {
  const style = getComputedStyle(badge);
  return [name ? badge.getAttribute(name) : badge.textContent,
    (RATIO)(style.color, style.backgroundColor)];
})""".replace("RATIO", RATIO)
WIDTHS = (360, 1200)


def test_each_status_can_be_read_in_both_themes(operate: Opened) -> None:
    """A contrast of 4.5 to 1 at least, and a background that tells the theme."""
    for make in (failed_trip, lost_trip, driven_trip, completed_trip):
        make()
    stuck = stuck_trip()
    with operate() as page:
        for address in (f"{BASE}?status=all", f"{BASE}{stuck.pk}/change/"):
            page.goto(address)
            for scheme in SCHEMES:
                wear(page, scheme)
                can_be_read(page.locator(".saga-badge").evaluate_all(CONTRAST, "class"), 4)
                body = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (body == "rgb(255, 255, 255)") is (scheme == "light")


def can_be_read(ratios: list[tuple[str, float]], kinds: int) -> None:
    """Of so many kinds at least, each has the contrast that it takes."""
    assert len({kind for kind, _ in ratios}) >= kinds
    assert min(ratio for _, ratio in ratios) >= 4.5, ratios


def resize(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})


def test_no_page_is_wider_than_the_screen(operate: Opened) -> None:
    stuck = stuck_trip()
    batch = batches.create(
        RETRY, SagaExecution.objects.all(), user=None, reason="x" * 300, title="y" * 300
    )
    on_batch = f"/admin/django_saga/sagabatch/{batch.pk}/change/"
    verbs = ("change", "retry", "resolve", "mark_done", "recover")
    ones = [f"{BASE}{stuck.pk}/{verb}/" for verb in verbs]
    with operate() as page:
        of_batches = (f"{BASE}retry/", on_batch, "/admin/django_saga/sagabatch/")
        for address in (*ones, *of_batches, APP, GROUPS, group_page(stuck), BASE):
            page.goto(address)
            for width in WIDTHS:
                resize(page, width)
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, address
        for width in WIDTHS:
            resize(page, width)
            for column in (
                "status_shown",
                "saga_shown",
                "step_shown",
                "error_shown",
                "age",
                "took",
            ):
                box = page.locator(f"#result_list .field-{column}").bounding_box()
                assert box is not None
                assert box["x"] + box["width"] <= width, column
            table = page.locator("#result_list").bounding_box()
            assert table is not None
            assert table["width"] > width / 2  # nothing squeezes it


def test_the_overview_and_the_groups_can_be_read_in_both_themes(operate: Opened) -> None:
    """A contrast of 4.5 to 1 at least, of what is red too."""
    for make in (failed_trip, lost_trip):
        make()
    stuck = stuck_trip()
    ratios: dict[str, list[tuple[str, float]]] = {scheme: [] for scheme in SCHEMES}
    with operate() as page:
        for address in (APP, GROUPS, group_page(stuck)):
            page.goto(address)
            for scheme in SCHEMES:
                wear(page, scheme)
                boxes = page.locator(".saga-badge, .saga-cards a, .saga-late")
                ratios[scheme] += boxes.evaluate_all(CONTRAST)
    for scheme in SCHEMES:
        can_be_read(ratios[scheme], 10)


def group_page(execution: SagaExecution) -> str:
    return f"{GROUPS}{execution.failure_group}/change/"


def test_the_way_from_the_overview_to_a_retry_of_a_group_is_three_clicks(operate: Opened) -> None:
    failures = [failed_trip() for _ in range(3)]
    stuck_trip()
    with operate(java_script_enabled=False) as page:
        page.goto(APP)
        page.locator(f"h3 a[href$='{failures[0].failure_group}/change/']").click()
        expect_text(page, ".saga-next", "retry anew once the cause is gone")
        page.get_by_role("link", name="Retry: 3…").click()
        expect_text(page, "#content", "3 start anew")
        page.goto(group_page(failures[0]))
        page.fill("[name=note]", "The bank mends it.")
        page.fill("[name=mute]", "2")
        page.get_by_role("button", name="Save").click()
        expect_text(page, ".messagelist", "The group is muted for 2 hours.")
        page.goto(GROUPS)
        page.get_by_text("1 muted group").click()
        expect_text(page, ".saga-muted", "The bank mends it.")


INK = """boxes => boxes.map(box => {
  const [text, back] = [box.querySelector(".saga-word"), box.querySelector("rect")];
  return [box.getAttribute("class"),
    (RATIO)(getComputedStyle(text).fill, getComputedStyle(back).fill)];
})""".replace("RATIO", RATIO)
SPILT = """() => [...document.querySelectorAll(".saga-box")].filter(box => {
  const frame = box.querySelector("rect").getBBox();
  return [...box.querySelectorAll("text")].map(text => text.getBBox()).some(
    text => text.x < frame.x || text.x + text.width > frame.x + frame.width);
}).map(box => box.textContent)"""


def test_the_drawings_can_be_read_in_both_themes(operate: Opened) -> None:
    """A contrast of 4.5 to 1 at least, each word in its box, and the one drawing that fits."""
    executions = [failed_trip(), lost_trip(), driven_trip(), completed_trip(), stuck_trip()]
    ratios: dict[Any, list[tuple[str, float]]] = {way: [] for way in product(SCHEMES, WIDTHS)}
    with operate() as page:
        for execution in executions:
            page.goto(f"{BASE}{execution.pk}/change/")
            for scheme, width in ratios:
                wear(page, scheme)
                resize(page, width)
                ratios[scheme, width] += page.locator(".saga-box").evaluate_all(INK)
                assert page.evaluate(SPILT) == []
                assert page.locator(".saga-narrow").is_visible() is (width == 360)
                assert page.locator(".saga-wide").is_visible() is (width == 1200)
    for found in ratios.values():
        can_be_read(found, 7)
