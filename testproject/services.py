"""The demo shop's remote services, payments and courier: a real process, and its client.

``python -m testproject.services --port 0 --ledger PATH`` prints its URL and serves JSON:

    POST /payments/charge, /payments/wallet  {order, amount}   -> {payment_id}
    POST /courier/book                       {order, address}  -> {booking_id}
    POST /payments/refund                    {payment_id}      -> {}
    POST /courier/cancel                     {booking_id}      -> {}
    POST /behaviour  {path, order?, fail?: {status, message}, delay?, reply_delay?, times?}
    GET  /effects[?order=]  -> {standing, effects, blocked}

A call carries an ``Idempotency-Key``: one effect and one answer per key. Whoever has no id, since
no answer came, undoes by {order, charge_key}, the key of the act: what it did is undone, what it
has not done is blocked for ever. A behaviour holds for the next `times` calls (null: until
changed); `delay` is in seconds before the effect, `reply_delay` between the effect and its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from re import fullmatch
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote
from urllib.request import ProxyHandler, Request, build_opener
from uuid import uuid4

Json = dict[str, Any]
IDS = {"payments": "payment_id", "courier": "booking_id"}
ACTS = {"/payments/charge": "amount", "/payments/wallet": "amount", "/courier/book": "address"}
UNDOS = ("/payments/refund", "/courier/cancel")
USUAL: Json = {"fail": None, "delay": 0, "reply_delay": 0, "times": None}
CHECKS: dict[str, Callable[[Any], object]] = {  # any other field is a text
    "path": lambda value: value in (*ACTS, *UNDOS),
    "order": lambda value: type(value) is int or is_text(value),
    "amount": lambda value: fullmatch(r"\d+(\.\d+)?", str(value)) and float(value) > 0,
    "fail": lambda value: value is None or (isinstance(value, dict) and len(value) == 2),
    "status": lambda value: type(value) is int and 400 <= value <= 599,
    "delay": lambda value: type(value) in (int, float) and 0 <= value <= 3600,
    "reply_delay": lambda value: CHECKS["delay"](value),
    "times": lambda value: value is None or (type(value) is int and value > 0),
}


class Refused(Exception):
    """The service said no, with an HTTP `status` and a `message`: the call had no effect."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (status {status})")
        self.status, self.message = status, message


class OutcomeUnknown(TimeoutError):
    """No answer in time, a lost connection or a 5xx: the call may have had its effect."""


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def check(payload: Any, *names: str) -> None:
    if not isinstance(payload, dict):
        raise Refused(400, f"A JSON object is needed, not {payload!r}.")
    for name in names:
        if not CHECKS.get(name, is_text)(payload.get(name)):
            raise Refused(400, f"The field {name!r} cannot be {payload.get(name)!r}.")


class Shop:
    """Both services: what they did, a JSON line each in the ledger, and how they behave."""

    def __init__(self, ledger: Path) -> None:
        self.lines: list[Json] = []
        self.index: dict[tuple[str, str, str], Json] = {}  # by service, field or verb, value
        self.behaviours: dict[tuple[str, str], Json] = {}
        self.key_locks: dict[tuple[str, str], threading.Lock] = {}
        self.lock = threading.Lock()  # of the ledger and the behaviours; nobody sleeps with it
        self.file = ledger.open("a+b", buffering=0)
        self.file.seek(0)
        stored = self.file.read()
        for line in stored.split(b"\n")[:-1]:
            self._remember(json.loads(line))
        self.file.truncate(stored.rfind(b"\n") + 1)  # no answer went out for a torn line

    def call(self, path: str, key: str, payload: Json) -> Json:
        """Answer a call of a service. Another call with its key waits until this one is over."""
        if not key:
            raise Refused(400, f"POST {path} needs an Idempotency-Key header.")
        _, service, verb = path.split("/")
        _, order, _ = self._meaning(path, payload)
        with self.key_locks.setdefault((service, key), threading.Lock()):
            line = self.index.get((service, "key", key))
            if line and line["verb"] not in ([verb] if path in ACTS else [verb, "block"]):
                raise Refused(409, f"The key {key!r} belongs to a {line['verb']}, not a {verb}.")
            if not line:
                behaviour = self._behaviour(path, order)
                time.sleep(behaviour["delay"])
                if behaviour["fail"]:
                    raise Refused(**behaviour["fail"])
                line = self._perform(path, key, payload)
                time.sleep(behaviour["reply_delay"])
            return {IDS[service]: line["id"]} if path in ACTS else {}

    def _meaning(self, path: str, payload: Json) -> tuple[str, Any, str]:
        """The verb, order and id to record for a call, by what is known at this moment."""
        _, service, verb = path.split("/")
        if path in ACTS:
            check(payload, "order", ACTS[path])
            return verb, payload["order"], f"{verb}-{uuid4().hex}"
        by = "charge_key" if payload.get(IDS[service]) is None else IDS[service]
        check(payload, by, *(["order"] if by == "charge_key" else []))
        if act := self.index.get((service, by, payload[by])):
            return verb, act["order"], act["id"]
        if by == "charge_key":
            return "block", payload["order"], payload[by]
        raise Refused(404, f"POST {path}: nothing has the {by} {payload[by]!r}.")

    def _perform(self, path: str, key: str, payload: Json) -> Json:
        service = path.split("/")[1]
        with self.lock:
            if path in ACTS and (service, "block", key) in self.index:
                raise Refused(409, f"POST {path}: the key {key!r} was undone before its effect.")
            verb, order, id = self._meaning(path, payload)
            if done := self.index.get((service, verb, id)):
                return done
            line = {"time": datetime.now(UTC).isoformat(), "service": service, "verb": verb}
            line |= {"order": order, "key": key, "id": id}
            self.file.write(json.dumps(line).encode() + b"\n")
            os.fsync(self.file.fileno())
            self._remember(line)
            return line

    def _remember(self, line: Json) -> None:
        service, verb, key, id = line["service"], line["verb"], line["key"], line["id"]
        self.lines.append(line)
        self.index[service, "key", key] = self.index[service, verb, id] = line
        if f"/{service}/{verb}" in ACTS:
            self.index[service, "charge_key", key] = self.index[service, IDS[service], id] = line

    def behave(self, payload: Json) -> Json:
        behaviour = USUAL | payload
        check(behaviour, "path", *behaviour)
        if behaviour["fail"] is not None:
            check(behaviour["fail"], "status", "message")
        with self.lock:
            self.behaviours[behaviour["path"], str(behaviour.get("order", ""))] = behaviour
        return {}

    def _behaviour(self, path: str, order: Any) -> Json:
        """How this call goes: as asked for its order, else for its path, else as usual."""
        with self.lock:
            asked = [self.behaviours.get((path, name)) for name in (str(order), "")]
            behaviour = next((one for one in asked if one and one["times"] != 0), USUAL)
            if behaviour["times"]:
                behaviour["times"] -= 1
            return behaviour

    def effects(self, order: str) -> Json:
        with self.lock:
            lines = [line for line in self.lines if order in ("", str(line["order"]))]
        blocked = [line for line in lines if line["verb"] == "block"]
        effects = [line for line in lines if line["verb"] != "block"]
        counts = Counter(line["id"] for line in effects)  # an act, and perhaps its undoing
        standing = [line for line in effects if counts[line["id"]] == 1]
        return {"standing": standing, "effects": effects, "blocked": blocked}


class Handler(BaseHTTPRequestHandler):
    shop: Shop

    def do_POST(self) -> None:
        try:
            status, answer = 200, self._answer()
        except Refused as refused:
            status, answer = refused.status, {"error": refused.message}
        body = json.dumps(answer).encode()
        with suppress(ConnectionError):  # the caller may be gone; the effect stands
            self.send_response_only(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_POST

    def _answer(self) -> Json:
        path, _, order = self.path.partition("?order=")
        if (self.command, path) == ("GET", "/effects"):
            return self.shop.effects(unquote(order))
        if self.command == "GET" or path not in (*ACTS, *UNDOS, "/behaviour"):
            raise Refused(404, f"There is no {self.command} {self.path}.")
        try:
            payload = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"The body is not JSON: {error}") from error
        check(payload)
        if path == "/behaviour":
            return self.shop.behave(payload)
        return self.shop.call(path, self.headers.get("Idempotency-Key", ""), payload)


class Services:
    """The client. `timeout` is in seconds; `pid` is the process, where `running` started it."""

    open = build_opener(ProxyHandler({})).open  # a proxy in the environment is not for 127.0.0.1

    def __init__(self, url: str, timeout: float = 10.0, pid: int | None = None) -> None:
        self.url, self.timeout, self.pid = url, timeout, pid

    def post(self, path: str, key: str, /, timeout: float = 0, **payload: Any) -> Json:
        """Call a service. Raises `Refused` on a 4xx, and `OutcomeUnknown` if nobody can tell."""
        data = json.dumps(payload, default=str).encode()
        headers = {"Idempotency-Key": key}
        return self._send(Request(self.url + path, data, headers), timeout or self.timeout)

    def behave(self, path: str, **behaviour: Any) -> None:
        """Ask for failures and delays at `path`; without any, all is as usual again."""
        data = json.dumps({"path": path, **behaviour}, default=str).encode()
        self._send(Request(f"{self.url}/behaviour", data), self.timeout)

    def effects(self, order: Any = "") -> Json:
        """The ledger's lines, of one order or all: those `standing`, all `effects`, `blocked`."""
        return self._send(Request(f"{self.url}/effects?order={quote(str(order))}"), self.timeout)

    def _send(self, request: Request, timeout: float) -> Json:
        try:
            try:
                reply = self.open(request, timeout=timeout)
            except HTTPError as error:
                reply = error
            with reply:
                status, answer = reply.status, json.load(reply)
        except (OSError, HTTPException) as error:
            raise OutcomeUnknown(f"{request.full_url}: no answer: {error}") from error
        if status >= 500:
            raise OutcomeUnknown(f"{request.full_url}: {answer['error']} (status {status})")
        if status >= 400:
            raise Refused(status, answer["error"])
        return dict(answer)


@contextmanager
def running(ledger: Path | str, port: int = 0) -> Iterator[Services]:
    """The services as a process, which ends with the block. Its ledger outlives it."""
    command = [sys.executable, "-m", "testproject.services", "--port", str(port)]
    command += ["--ledger", str(Path(ledger).resolve())]
    root = Path(__file__).resolve().parents[1]
    # In a session of its own: Ctrl-C is meant for the caller, who ends the services last.
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            url = process.stdout.readline().strip() if process.stdout else ""
            if not url:
                raise RuntimeError(f"The services did not start: status {process.wait()}.")
            yield Services(url, pid=process.pid)
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo shop's payments and courier.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ledger", type=Path, required=True)
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())
    try:
        Handler.shop = Shop(arguments.ledger)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{arguments.ledger} cannot be the ledger: {error!r}")
    ThreadingHTTPServer.request_queue_size = 128  # the usual 5 makes a burst of calls wait
    with ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
