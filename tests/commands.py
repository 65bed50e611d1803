"""Management commands, each a process of its own with its output in a file.

To import Django, RQ and the rest takes most of a short command's time. So its process is forked
from one that has imported what needs no settings; those a command loads itself, as ever.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

from tests.faults.children import Nursery

IMPORTED = (
    "django.contrib.admin",
    "django.core.management.commands.migrate",
    "django.db.backends.postgresql.base",
    "django.db.backends.sqlite3.base",
    "django.views.debug",
    "django_saga",
    "pymysql",
    "rq.cron",
    "tests.commands",
)


def nursery(environment: dict[str, str]) -> Nursery:
    """What forks commands, without settings: an import that wants them fails there."""
    without = {name: environment[name] for name in environment if name != "DJANGO_SETTINGS_MODULE"}
    return Nursery(without, *IMPORTED)


class Command:
    """``python -m django`` with arguments; anew: by that very line, with nothing imported."""

    def __init__(
        self,
        nursery: Nursery,
        log: Path,
        *arguments: str,
        environment: dict[str, str],
        anew: bool = False,
    ) -> None:
        log.touch()
        self._log = log
        self._process = nursery.start(
            "tests.commands.run",
            log=str(log),
            arguments=arguments,
            environment=environment,
            anew=anew,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def terminate(self) -> None:
        self._process.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, and wait until it is dead."""
        self._process.signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> str:
        """Wait until it ended well; its output."""
        assert self._process.wait() == 0, self.log
        return self.log


def run(log: str, arguments: list[str], environment: dict[str, str], anew: bool) -> None:
    """Become the command, in the process that was forked for it."""
    out = os.open(log, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if anew:
        os.execve(sys.executable, [sys.executable, "-m", "django", *arguments], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    runpy.run_module("django", run_name="__main__", alter_sys=True)
    sys.exit()
