"""Processes that a battery starts, kills, freezes and lets go on.

To start Python and Django takes half a second, and a battery wants hundreds. So one process gets
ready once, without threads or connections, and forks for each. ``python -m tests.faults.children``
reads lines of JSON, ``[function, arguments]`` to start one or ``[null, pid]`` to look at one, and
answers each with a line. What the function returns is the exit status.

Its arguments are the modules that it imports, so that no child has to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

PATIENCE = 60  # seconds
DIED = 9  # the exit status of a process that a battery ended
STOPPED = "stopped"


def wait_for(condition: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Look until it holds; fail where it never does."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Child:
    """A process that was forked."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._status: int | None = None

    def poll(self) -> int | str | None:
        """Its exit status, negative for a signal; STOPPED, once; None while it runs."""
        if self._status is not None:
            return self._status
        status = self._nursery.ask(None, self.pid)
        if isinstance(status, int):
            self._status = status
        return status  # type: ignore[no-any-return]

    def wait(self) -> int | str:
        """Wait until it ends, or stops."""
        deadline = time.monotonic() + PATIENCE
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"process {self.pid} did not end")
            time.sleep(0.005)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if not isinstance(self.poll(), int):
            os.kill(self.pid, number)


class Nursery:
    """The process that forks, for one environment; Django is ready if that names settings."""

    def __init__(self, environment: dict[str, str], *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.children", *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children: list[Child] = []

    def ask(self, function: str | None, argument: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, argument]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, function: str, **arguments: object) -> Child:
        """Fork, and call a function, ``module:name``, with arguments that JSON can carry."""
        child = Child(self, self.ask(function, arguments))
        self._children.append(child)
        return child

    def run(self, function: str, **arguments: object) -> int | str:
        """As :meth:`start`, and wait; the exit status is 0, or DIED, never that of an error."""
        status = self.start(function, **arguments).wait()
        assert status in (0, DIED), f"{function}({arguments}) ended with {status}"
        return status

    @property
    def running(self) -> list[int]:
        """The processes that have not ended."""
        return [child.pid for child in self._children if not isinstance(child.poll(), int)]

    def end(self) -> None:
        """Kill what still runs, and the process itself."""
        for child in self._children:
            child.signal(signal.SIGKILL)
        self._process.communicate()


def fork(function: Any, arguments: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what is asked, and the answers,
    os.dup2(2, 1)  # are the parent's
    try:
        status = function(**arguments) or 0
    except SystemExit:
        raise  # the end that Python itself makes, for those who want it
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def look(pid: int) -> int | str | None:
    changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
    if not changed:
        return None
    return STOPPED if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def main() -> None:
    import django
    from django.utils.module_loading import import_string

    if "DJANGO_SETTINGS_MODULE" in os.environ:
        django.setup()
    for module in sys.argv[1:]:
        import_module(module)
    for line in sys.stdin:
        function, argument = json.loads(line)
        answer = fork(import_string(function), argument) if function else look(argument)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
