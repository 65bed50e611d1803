"""The witness: a process of its own that writes down each effect, and syncs it, before it answers.

``python -m tests.faults.ledger FILE SOCKET`` serves until it is terminated. An effect is a line:
the execution, the step, the action, its idempotency key. It outlives whoever is killed, and knows
nothing of rows.
"""

from __future__ import annotations

import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import UUID

START_SECONDS = 30


class Entry(NamedTuple):
    """One call, as the service that it was made to saw it."""

    step: str
    action: str
    key: str


def note(address: str, saga_id: UUID, step: str, action: str, key: str) -> None:
    """Make the remote call: returns once it is on the disk."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(f"{saga_id} {step} {action} {key}\n".encode())
        if client.recv(1) != b"+":
            raise ConnectionError("the ledger did not answer")


class Ledger:
    """The process, and what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "ledger.sock")
        self._file = folder / "ledger"
        self._file.touch()
        command = [sys.executable, "-m", "tests.faults.ledger", str(self._file), self.address]
        self._process = subprocess.Popen(command)
        self._read = 0
        self._entries: dict[str, list[Entry]] = defaultdict(list)
        deadline = time.monotonic() + START_SECONDS
        while not Path(self.address).exists():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def entries(self, saga_id: UUID) -> list[Entry]:
        """What was called for an execution, in order."""
        self._read_on()
        return self._entries[str(saga_id)]

    @property
    def executions(self) -> list[str]:
        """The ids of all that was called for."""
        self._read_on()
        return list(self._entries)

    @property
    def size(self) -> int:
        """How many calls there were."""
        self._read_on()
        return sum(map(len, self._entries.values()))

    def _read_on(self) -> None:
        with self._file.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        for line in text.decode().splitlines():
            execution, *entry = line.split(" ")
            self._entries[execution].append(Entry(*entry))

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.server.append(self.rfile.readline())
        self.wfile.write(b"+")


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, file: BinaryIO, address: str) -> None:
        self._file, self._lock = file, threading.Lock()
        super().__init__(address, _Handler)

    def append(self, line: bytes) -> None:
        if not line.endswith(b"\n"):
            return  # whoever called died in the middle of it
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())


if __name__ == "__main__":
    with Path(sys.argv[1]).open("ab") as ledger, _Server(ledger, sys.argv[2]) as server:
        server.serve_forever()
