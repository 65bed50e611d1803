"""The processes of a site that runs sagas: a web server, and a watch for what lost its driver."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

from django.conf import settings

WATCH_SECONDS = 2
GRACE_SECONDS = 10


def serve(port: int) -> int:
    """Serve until Ctrl-C, or until the web server ends by itself; returns its exit status."""
    uvicorn = ["-m", "uvicorn", "testproject.asgi:application", "--port", str(port)]
    quiet = [
        "--lifespan=off",
        "--log-level=warning",
        f"--timeout-graceful-shutdown={GRACE_SECONDS}",
    ]
    watch = ["manage.py", "recover_sagas", "--watch", str(WATCH_SECONDS)]
    with ExitStack() as stack:
        start(stack, watch)
        web = start(stack, [*uvicorn, *quiet])
        try:
            return web.wait()
        except KeyboardInterrupt:
            return 0


def start(stack: ExitStack, arguments: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, *arguments], cwd=settings.BASE_DIR)
    stack.callback(end, process)
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(GRACE_SECONDS + 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
