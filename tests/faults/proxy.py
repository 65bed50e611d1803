"""A proxy before PostgreSQL that loses or delays what is said at the n-th request.

It knows as much of the protocol as it takes to tell requests and replies apart: messages are a type
byte, a length and a body; a request ends with Query or Sync, a reply with ReadyForQuery, which also
tells whether a transaction is open. So in autocommit every request is a commit of its own.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

KINDS = ("request lost", "reply lost", "request late", "reply late")
QUERY, SYNC, FLUSH, READY = b"Q", b"S", b"H", b"Z"
IN_TRANSACTION = b"T"


class Lost(Exception):
    """The connection is to be closed."""


class Proxy:
    """Serves on a Unix socket in ``folder``, where libpq looks for a server on port 5432."""

    def __init__(self, folder: Path, server: dict[str, Any]) -> None:
        self.folder = folder
        self._server = server
        self._lock = threading.Lock()
        self.disarm()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, at: int, kind: str, *, commits: bool) -> None:
        """Strike at the n-th request from now, of all or of those that commit."""
        self.disarm()
        self._left, self._kind, self._commits = at, kind, commits

    def disarm(self) -> None:
        self._left, self._kind, self._commits = 0, "", False
        self.struck, self._go_on = threading.Event(), threading.Event()

    def go_on(self) -> None:
        """Let pass what is held up."""
        self._go_on.set()

    def end(self) -> None:
        self.go_on()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def fault(self, commits: bool) -> str:
        """What is to befall this request."""
        with self._lock:
            if not self._left or (self._commits and not commits):
                return ""
            self._left -= 1
            return "" if self._left else self._kind

    def hold_up(self) -> None:
        go_on = self._go_on
        self.struck.set()
        go_on.wait()

    def connect(self) -> socket.socket:
        host, port = self._server["HOST"], int(self._server["PORT"] or 5432)
        if not host.startswith("/"):
            return socket.create_connection((host or "127.0.0.1", port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, self.connect() as server, suppress(Lost, OSError):
            _Session(self, client, server).serve()


class _Session:
    """One connection; its two sides speak in turn, but for what the server says as it ends."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.asked, self.told = b"", b""  # what was not yet a whole message
        self.state = b""  # of the transaction; nothing before the first ReadyForQuery
        self.request: list[bytes] = []

    def serve(self) -> None:
        while True:
            readable, _, _ = select.select([self.client, self.server], [], [])
            if self.server in readable:
                self.client.sendall(self.hear())
            elif not self.state:
                self.server.sendall(receive(self.client))  # it logs in
            else:
                self.asked += receive(self.client)
                for message in self._asked():
                    self.request.append(message)
                    if message[:1] in (QUERY, SYNC):
                        self.forward(b"".join(self.request))
                        self.request = []
                    elif message[:1] == FLUSH:  # of a pipeline, which commits nothing yet
                        self.server.sendall(b"".join(self.request))
                        self.request = []
                    elif message[:1] == b"X":
                        raise Lost

    def forward(self, request: bytes) -> None:
        kind = self.proxy.fault(self.commits(request))
        if kind == "request lost":
            self.proxy.struck.set()
            raise Lost
        if kind == "request late":
            self.proxy.hold_up()
        with suppress(OSError):  # if it has ended, it has said why
            self.server.sendall(request)
        if kind == "reply lost":
            self.reply()
            self.proxy.struck.set()
            raise Lost
        if kind == "reply late":
            reply = self.reply()
            self.proxy.hold_up()
            self.client.sendall(reply)

    def commits(self, request: bytes) -> bool:
        """Whether it is a transaction of its own, or the end of one."""
        if self.state == IN_TRANSACTION:
            return b"COMMIT" in request
        return b"BEGIN" not in request

    def reply(self) -> bytes:
        said = self.hear()
        while not said.endswith(READY + struct.pack("!I", 5) + self.state):
            said += self.hear()
        return said

    def hear(self) -> bytes:
        said = receive(self.server)
        self.told += said
        while (message := whole_message(self.told)) is not None:
            self.told = self.told[len(message) :]
            if message[:1] == READY:
                self.state = message[5:6]
        return said

    def _asked(self) -> Iterator[bytes]:
        while (message := whole_message(self.asked)) is not None:
            self.asked = self.asked[len(message) :]
            yield message


def receive(side: socket.socket) -> bytes:
    """Some of what it says; raises Lost once it has hung up."""
    said = side.recv(65536)
    if not said:
        raise Lost
    return said


def whole_message(text: bytes) -> bytes | None:
    """The first message, if all of it is there."""
    if len(text) < 5:
        return None
    (length,) = struct.unpack("!I", text[1:5])
    return text[: length + 1] if len(text) > length else None
