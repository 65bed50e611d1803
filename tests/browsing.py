"""What tests in a real browser share: a page that is logged in, ways to look and to walk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.auth.models import User
from django.db import connections
from django.test import Client

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., AbstractContextManager["Page"]]


@contextmanager
def logged_in(open_page: OpenPage, url: str, user: User, **options: Any) -> Iterator[Page]:
    """A page of this user; options go to the browser's context. Fails if anything was said on the
    browser's console: a script that failed, or a breach of the Content-Security-Policy."""
    client = Client()
    client.force_login(user)
    cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
    with open_page(base_url=url, **options) as page:
        page.context.add_cookies(
            [{"name": settings.SESSION_COOKIE_NAME, "value": cookie, "url": url}]
        )
        refused: list[str] = []
        page.on("console", lambda said: refused.append(f"{said.text} {said.location}"))
        page.on("pageerror", lambda error: refused.append(str(error)))
        yield page
        assert not [text for text in refused if "favicon.ico" not in text]


def expect_text(page: Page, where: str, text: str) -> None:
    """Wait until that is said there."""
    from playwright.sync_api import expect

    expect(page.locator(where)).to_contain_text(text)


SCHEMES = ("light", "dark")


def wear(page: Page, scheme: Any) -> None:
    """Have the page wear a theme, and be done with changing its clothes."""
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.getAnimations().forEach(each => each.finish())")


LOOK = """element => {
  const style = getComputedStyle(element);
  return [style.outline, style.textDecoration, style.color, style.backgroundColor,
    style.boxShadow, style.borderColor].join();
}"""


def walk_to(page: Page, target: Any) -> None:
    """Walk there with the tab key, and see that one is there."""
    bare = target.evaluate(LOOK)
    element = target.element_handle()
    for _ in range(160):
        page.keyboard.press("Tab")
        if page.evaluate("element => document.activeElement === element", element):
            break
    else:
        raise AssertionError("the tab key does not lead there")
    assert target.evaluate(LOOK) != bare


def press_to(page: Page, target: Any, key: str = "Enter") -> None:
    """Walk there with the tab key, and press it."""
    walk_to(page, target)
    with page.expect_navigation():
        page.keyboard.press(key)


def in_a_thread(function: Callable[[], object]) -> None:
    """Playwright's event loop runs in this one; what is raised there is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
