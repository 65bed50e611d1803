"""The peers from this side: their environments, and the processes in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pace import Pace

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENTS = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Peer:
    """A library: its module here, and what pip installs for it."""

    module: str
    requirements: tuple[str, ...]


PEERS = {
    "python-cqrs": Peer("cqrs", ("python-cqrs[sqlalchemy]>=5.3,<6", "asyncpg>=0.30")),
    "DBOS": Peer("dbos", ("dbos>=3.4,<4",)),
}


class Child:
    """A peer's process: it waits, and costs nothing, until it is asked to run."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        peer = PEERS[name]
        self._name = name
        self._process = subprocess.Popen(
            [_environment(peer), "-m", f"benchmarks.peers.{peer.module}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._end)
        self.versions: dict[str, str] = self._answer()

    def measure(self, case: str, tasks: int = 1) -> Callable[[float], Pace]:
        """What runs one of its cases for some seconds."""

        def run(seconds: float) -> Pace:
            asked = {"case": case, "at_once": tasks, "seconds": seconds}
            assert self._process.stdin is not None
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            return Pace(**self._answer())

        return run

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended, with {self._process.wait()}; see above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment(peer: Peer) -> Path:
    """The Python of the peer's own environment, made where it is lacking."""
    home = ENVIRONMENTS / peer.module
    python, ready = home / "bin" / "python", home / "ready"
    wanted = "\n".join((sys.version, *peer.requirements))
    if not ready.exists() or ready.read_text() != wanted:
        print(f"Installing {', '.join(peer.requirements)} into {home} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", home], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", *peer.requirements], check=True)
        ready.write_text(wanted)
    return python
