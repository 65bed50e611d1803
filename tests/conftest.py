from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import pytest
from django.db import connections
from django.test.utils import setup_databases, teardown_databases

from tests.operated import WORLD
from tests.settings import DATABASE_URLS, DATABASES
from tests.tables import empty

if TYPE_CHECKING:
    from playwright.sync_api import Browser as PlaywrightBrowser
    from playwright.sync_api import Page
    from pytest_django import DjangoDbBlocker

    from django_saga.storage import SagaStorage

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def child_environment(django_db_setup: None) -> dict[str, str]:
    """The environment for processes that a test starts: our settings on the test databases."""
    urls = {}
    for alias, variable in DATABASE_URLS.items():
        if alias in connections.settings:
            parts = urlsplit(os.environ[variable])
            name = quote(str(connections[alias].settings_dict["NAME"]))
            urls[variable] = f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"
    ours = {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **ours, **urls}


@pytest.fixture(scope="session")
def django_db_setup(
    request: pytest.FixtureRequest,
    django_test_environment: None,
    django_db_blocker: DjangoDbBlocker,
) -> Iterator[None]:
    """Every database, whatever the selected tests are marked with."""
    keep = request.config.getoption("--reuse-db")
    with django_db_blocker.unblock():
        created = setup_databases(verbosity=0, interactive=False, keepdb=keep)
    yield
    if keep:
        return
    with django_db_blocker.unblock():
        with connections["default"].cursor() as cursor:
            # Threads that asgiref keeps may still hold a connection, which would block the drop.
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        teardown_databases(created, verbosity=0)


@pytest.fixture(scope="module")
def committing_databases(
    django_db_setup: None, django_db_blocker: DjangoDbBlocker
) -> Iterator[None]:
    """Every database, without a transaction around the test; emptied once, after the module. So a
    test that wants it may not count on being alone."""
    with django_db_blocker.unblock():
        yield
        empty(*connections)
        connections.close_all()


@pytest.fixture
def alone(committing_databases: None) -> Iterator[None]:
    """Nothing in the default database, and no trouble in the world of tests.operated."""
    WORLD.reset()
    empty()
    yield
    WORLD.reset()


@pytest.fixture(params=DATABASES)
def alias(request: pytest.FixtureRequest, alone: None) -> str:
    """Each database in turn, with nothing in it."""
    empty(request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["memory", *DATABASES])
def storage(request: pytest.FixtureRequest) -> SagaStorage:
    """Every storage there is; on the databases it needs committing_databases."""
    from django_saga.storage import DjangoSagaStorage, MemorySagaStorage

    return MemorySagaStorage() if request.param == "memory" else DjangoSagaStorage(request.param)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium, installed on Debian if need be. Without one the tests that want it
    are not run, and the summary names them; under CI=true they fail."""
    with only_process():
        found = os.environ.get("CHROMIUM") or which_chromium() or install_chromium()
    if found is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("no Chromium: install one, or name its path in CHROMIUM")
    return found


@contextmanager
def only_process() -> Iterator[None]:
    """Of those that run this tree's tests: no two may install at once."""
    tree = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(tree, fcntl.LOCK_EX)
        yield
    finally:
        os.close(tree)


class Browser:
    """A browser that stays open between tests, and opens pages."""

    def __init__(self, browser: PlaywrightBrowser) -> None:
        self._browser = browser
        self.loop = asyncio.get_running_loop()
        asyncio._set_running_loop(None)

    @contextmanager
    def at_work(self) -> Iterator[PlaywrightBrowser]:
        """Playwright's event loop counts as running in this thread for one ``with`` block only:
        Django refuses to touch a database beside one."""
        asyncio._set_running_loop(self.loop)
        try:
            yield self._browser
        finally:
            asyncio._set_running_loop(None)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One for all tests of a module: to start it takes longer than most of them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        browser = Browser(launched)
        yield browser
        asyncio._set_running_loop(browser.loop)  # until Playwright has stopped it
        launched.close()


@pytest.fixture
def open_page(browser: Browser) -> Callable[..., AbstractContextManager[Page]]:
    """Opens a page that knows nothing of earlier ones, for one ``with`` block, and fails if it
    broke its Content-Security-Policy; options go to the browser's context. Playwright runs an event
    loop in this thread meanwhile: touch the database, or run a saga, before or after the block."""

    @contextmanager
    def opened(**options: Any) -> Iterator[Page]:
        messages: list[str] = []
        with browser.at_work() as launched, launched.new_context(**options) as context:
            page = context.new_page()
            page.on("console", lambda message: messages.append(message.text))
            yield page
        assert not [text for text in messages if "Content Security Policy" in text]

    return opened


def which_chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def install_chromium() -> str | None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return None
    if platform.freedesktop_os_release()["ID"] != "debian":  # elsewhere it is a snap's stub
        return None
    apt_get = ["apt-get", "--quiet", "--yes", "-o", "DPkg::Lock::Timeout=300"]
    subprocess.run([*apt_get, "update"], check=False)
    subprocess.run([*apt_get, "install", "--no-install-recommends", "chromium"], check=False)
    return which_chromium()
