from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Barrier
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest

from testproject.services import OutcomeUnknown, Refused, Services, running

CHARGE: dict[str, Any] = {"order": 7, "amount": "19.90"}
BOOK: dict[str, Any] = {"order": 7, "address": "1 Main Street"}
PAIRS = pytest.mark.parametrize(
    ("act", "payload", "undo", "id_name"),
    [
        ("/payments/charge", CHARGE, "/payments/refund", "payment_id"),
        ("/payments/wallet", CHARGE, "/payments/refund", "payment_id"),
        ("/courier/book", BOOK, "/courier/cancel", "booking_id"),
    ],
)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def services(ledger: Path) -> Iterator[Services]:
    with running(ledger) as services:
        yield services


def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("The condition did not come true.")


def verbs(lines: list[dict[str, Any]]) -> list[str]:
    return [line["verb"] for line in lines]


@PAIRS
def test_an_act_stands_until_it_is_undone(
    services: Services, act: str, payload: dict[str, Any], undo: str, id_name: str
) -> None:
    answer = services.post(act, "act-1", **payload)
    assert list(answer) == [id_name]
    assert [line["id"] for line in services.effects()["standing"]] == [answer[id_name]]

    assert services.post(undo, "undo-1", **answer) == {}
    effects = services.effects()
    assert effects["standing"] == []
    assert [line["id"] for line in effects["effects"]] == [answer[id_name]] * 2


@PAIRS
def test_the_same_key_gets_the_same_answer_and_has_no_second_effect(
    services: Services, act: str, payload: dict[str, Any], undo: str, id_name: str
) -> None:
    answer = services.post(act, "act-1", **payload)
    assert services.post(act, "act-1", **payload) == answer
    assert services.post(undo, "undo-1", **answer) == {}
    assert services.post(undo, "undo-1", **answer) == {}
    assert services.post(act, "act-1", **payload) == answer
    assert len(services.effects()["effects"]) == 2
    assert services.effects()["standing"] == []


def test_the_same_key_is_answered_from_the_past_even_while_new_calls_are_refused(
    services: Services,
) -> None:
    answer = services.post("/payments/charge", "act-1", **CHARGE)
    services.behave("/payments/charge", fail={"status": 503, "message": "Down."})
    assert services.post("/payments/charge", "act-1", **CHARGE) == answer


def test_other_keys_have_effects_of_their_own(services: Services) -> None:
    first = services.post("/payments/charge", "act-1", **CHARGE)
    assert services.post("/payments/charge", "act-2", **CHARGE) != first
    assert len(services.effects()["standing"]) == 2


def test_twenty_simultaneous_calls_with_one_key_have_one_effect_and_one_answer(
    services: Services,
) -> None:
    """The delay keeps the first call running while the others arrive: they wait for it."""
    services.behave("/payments/charge", delay=0.3)
    barrier = Barrier(20)

    def charge(_: int) -> str:
        barrier.wait(30)
        return str(services.post("/payments/charge", "act-1", **CHARGE)["payment_id"])

    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(charge, range(20)))) == 1
    assert verbs(services.effects()["effects"]) == ["charge"]


@pytest.mark.parametrize("path", ["/payments/charge", "/payments/refund", "/courier/book"])
def test_a_call_without_a_key_is_refused_and_the_message_says_what_is_missing(
    services: Services, path: str
) -> None:
    with pytest.raises(Refused, match="Idempotency-Key") as refused:
        services.post(path, "", payment_id="p", **(CHARGE | BOOK))
    assert refused.value.status == 400
    assert services.effects()["effects"] == []


@pytest.mark.parametrize(
    ("path", "payload", "field"),
    [
        ("/payments/charge", {"order": 7}, "amount"),
        ("/payments/charge", {"amount": 5}, "order"),
        ("/payments/charge", {"order": True, "amount": 5}, "order"),
        ("/payments/charge", {"order": "", "amount": 5}, "order"),
        ("/payments/charge", {"order": [7], "amount": 5}, "order"),
        ("/payments/charge", {"order": 7, "amount": 0}, "amount"),
        ("/payments/charge", {"order": 7, "amount": -3}, "amount"),
        ("/payments/wallet", {"order": 7, "amount": "a lot"}, "amount"),
        ("/payments/wallet", {"order": 7, "amount": True}, "amount"),
        ("/payments/wallet", {"order": 7, "amount": float("nan")}, "amount"),
        ("/courier/book", {"order": 7}, "address"),
        ("/courier/book", {"order": 7, "address": 12}, "address"),
        ("/payments/refund", {}, "charge_key"),
        ("/payments/refund", {"payment_id": 5}, "payment_id"),
        ("/payments/refund", {"payment_id": {}}, "payment_id"),
        ("/payments/refund", {"payment_id": None, "order": 7}, "charge_key"),
        ("/courier/cancel", {"booking_id": None, "charge_key": "act-1"}, "order"),
    ],
)
def test_a_bad_payload_is_refused_and_the_message_names_the_field(
    services: Services, path: str, payload: dict[str, Any], field: str
) -> None:
    with pytest.raises(Refused, match=field) as refused:
        services.post(path, "key-1", **payload)
    assert refused.value.status == 400
    assert services.effects() == {"standing": [], "effects": [], "blocked": []}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'"text"', b"null", b"[" * 50_000])
def test_a_body_that_is_no_json_object_is_refused(services: Services, body: bytes) -> None:
    headers = {"Idempotency-Key": "key-1"}
    request = urllib.request.Request(f"{services.url}/payments/charge", body, headers)
    with pytest.raises(HTTPError) as refused:
        Services.open(request, timeout=10)
    with refused.value as answer:
        assert answer.status == 400
        assert "JSON" in json.load(answer)["error"]


@pytest.mark.parametrize(
    ("behaviour", "field"),
    [
        ({"fail": "no"}, "fail"),
        ({"fail": {"status": 409}}, "fail"),
        ({"fail": {"status": 200, "message": "Fine."}}, "status"),
        ({"fail": {"status": 409, "message": ""}}, "message"),
        ({"delay": -1}, "delay"),
        ({"delay": "1"}, "delay"),
        ({"reply_delay": float("inf")}, "reply_delay"),
        ({"times": 0}, "times"),
        ({"times": 1.5}, "times"),
        ({"order": []}, "order"),
        ({"wait": 3}, "wait"),
    ],
)
def test_a_bad_behaviour_is_refused_and_changes_nothing(
    services: Services, behaviour: dict[str, Any], field: str
) -> None:
    with pytest.raises(Refused, match=field) as refused:
        services.behave("/courier/book", **behaviour)
    assert refused.value.status == 400
    assert services.post("/courier/book", "act-1", **BOOK)


def test_the_behaviour_of_an_unknown_path_is_refused(services: Services) -> None:
    with pytest.raises(Refused, match="/courier/boook"):
        services.behave("/courier/boook", delay=1)


@pytest.mark.parametrize("path", ["/payments/steal", "/", "/effects", "/payments/charge/"])
def test_an_unknown_path_is_not_found(services: Services, path: str) -> None:
    with pytest.raises(Refused, match="There is no POST") as refused:
        services.post(path, "key-1", **CHARGE)
    assert refused.value.status == 404


@PAIRS
def test_a_refused_call_has_no_effect_and_its_key_may_be_tried_again(
    services: Services, act: str, payload: dict[str, Any], undo: str, id_name: str
) -> None:
    services.behave(act, fail={"status": 409, "message": "Not today."}, times=2)
    for _ in range(2):
        with pytest.raises(Refused, match="Not today") as refused:
            services.post(act, "act-1", **payload)
        assert refused.value.status == 409
        assert services.effects()["effects"] == []
    answer = services.post(act, "act-1", **payload)

    services.behave(undo, fail={"status": 422, "message": "Too late."}, times=1)
    with pytest.raises(Refused, match="Too late"):
        services.post(undo, "undo-1", **answer)
    assert len(services.effects()["standing"]) == 1
    services.post(undo, "undo-1", **answer)
    assert services.effects()["standing"] == []


def test_a_behaviour_without_times_holds_until_it_is_changed(services: Services) -> None:
    services.behave("/courier/book", fail={"status": 409, "message": "No driver."})
    for number in range(5):
        with pytest.raises(Refused, match="No driver"):
            services.post("/courier/book", f"act-{number}", **BOOK)
    services.behave("/courier/book")
    assert services.post("/courier/book", "act-1", **BOOK)


def test_a_behaviour_may_hold_for_one_order_alone(services: Services) -> None:
    """An undo belongs to the order of its act, though its payload does not name it."""
    ids = {}
    for order in (7, 8):
        payload = CHARGE | {"order": order}
        ids[order] = services.post("/payments/charge", f"act-{order}", **payload)
    refusal = {"status": 409, "message": "Closed."}
    services.behave("/courier/book", order=7, fail=refusal)
    services.behave("/payments/refund", order=7, fail=refusal)

    with pytest.raises(Refused, match="Closed"):
        services.post("/courier/book", "book-7", **BOOK)
    with pytest.raises(Refused, match="Closed"):
        services.post("/payments/refund", "undo-7", **ids[7])
    assert services.post("/courier/book", "book-8", **(BOOK | {"order": 8}))
    assert services.post("/payments/refund", "undo-8", **ids[8]) == {}


def test_effects_can_be_asked_for_one_order(services: Services) -> None:
    for order in (7, "A & B/1"):
        services.post("/payments/charge", f"charge-{order}", order=order, amount=5)
        services.post(
            "/payments/refund",
            f"undo-{order}",
            order=order,
            payment_id=None,
            charge_key=f"x-{order}",
        )
    for order in (7, "A & B/1"):
        effects = services.effects(order)
        assert [line["order"] for line in effects["standing"]] == [order]
        assert [line["order"] for line in effects["effects"]] == [order]
        assert [line["order"] for line in effects["blocked"]] == [order]
    assert services.effects("nobody's") == {"standing": [], "effects": [], "blocked": []}


@pytest.mark.parametrize(
    ("path", "id_name"), [("/payments/refund", "payment_id"), ("/courier/cancel", "booking_id")]
)
def test_undoing_an_unknown_id_is_not_found(services: Services, path: str, id_name: str) -> None:
    unknown: dict[str, Any] = {id_name: "nothing-like-it"}
    with pytest.raises(Refused, match="nothing-like-it") as refused:
        services.post(path, "undo-1", **unknown)
    assert refused.value.status == 404
    assert services.effects()["effects"] == []


def test_a_booking_is_no_payment(services: Services) -> None:
    booking = services.post("/courier/book", "act-1", **BOOK)["booking_id"]
    with pytest.raises(Refused) as refused:
        services.post("/payments/refund", "undo-1", payment_id=booking)
    assert refused.value.status == 404


@PAIRS
def test_undoing_twice_under_different_keys_has_no_second_effect(
    services: Services, act: str, payload: dict[str, Any], undo: str, id_name: str
) -> None:
    answer = services.post(act, "act-1", **payload)
    assert services.post(undo, "undo-1", **answer) == {}
    assert services.post(undo, "undo-2", **answer) == {}
    assert services.post(undo, "undo-3", order=7, charge_key="act-1") == {}
    assert len(services.effects()["effects"]) == 2


@PAIRS
def test_an_act_whose_answer_was_lost_is_undone_by_its_key(
    services: Services, act: str, payload: dict[str, Any], undo: str, id_name: str
) -> None:
    services.behave(act, reply_delay=60)
    with pytest.raises(OutcomeUnknown):
        services.post(act, "act-1", timeout=0.5, **payload)
    until(lambda: services.effects()["standing"])

    undone: dict[str, Any] = {id_name: None, "order": 7, "charge_key": "act-1"}
    assert services.post(undo, "undo-1", **undone) == {}
    assert services.post(undo, "undo-1", **undone) == {}
    effects = services.effects()
    assert effects["standing"] == effects["blocked"] == []
    assert len(effects["effects"]) == 2


@PAIRS
def test_undoing_a_key_that_did_nothing_records_no_effect_and_blocks_the_key_for_ever(
    services: Services,
    ledger: Path,
    act: str,
    payload: dict[str, Any],
    undo: str,
    id_name: str,
) -> None:
    undone: dict[str, Any] = {id_name: None, "order": 7, "charge_key": "act-1"}
    assert services.post(undo, "undo-1", **undone) == {}
    assert services.post(undo, "undo-1", **undone) == {}
    assert services.post(undo, "undo-2", **undone) == {}

    def judge(services: Services) -> None:
        with pytest.raises(Refused, match="'act-1' was undone before") as refused:
            services.post(act, "act-1", **payload)
        assert refused.value.status == 409
        effects = services.effects(7)
        assert effects["standing"] == effects["effects"] == []
        assert [(line["id"], line["key"]) for line in effects["blocked"]] == [("act-1", "undo-1")]

    judge(services)
    os.kill(services.pid or 0, signal.SIGKILL)
    with running(ledger) as restarted:
        judge(restarted)
        assert restarted.post(act, "act-2", **payload)


def test_a_key_that_is_blocked_while_its_call_is_on_its_way_has_no_effect_on_arrival(
    services: Services,
) -> None:
    """The same key's second call waits for the first, so after it the first one is over."""
    services.behave("/payments/charge", delay=1.5, times=1)
    with pytest.raises(OutcomeUnknown):
        services.post("/payments/charge", "act-1", timeout=0.5, **CHARGE)
    undone: dict[str, Any] = {"payment_id": None, "order": 7, "charge_key": "act-1"}
    assert services.post("/payments/refund", "undo-1", **undone) == {}
    with pytest.raises(Refused, match="undone before"):
        services.post("/payments/charge", "act-1", **CHARGE)
    assert services.effects()["effects"] == []


def test_a_call_that_outlives_its_callers_patience_still_has_its_effect_once(
    services: Services,
) -> None:
    services.behave("/payments/charge", delay=1, times=1)
    with pytest.raises(OutcomeUnknown, match="timed out"):
        services.post("/payments/charge", "act-1", timeout=0.2, **CHARGE)
    answer = services.post("/payments/charge", "act-1", **CHARGE)
    effects = services.effects()["effects"]
    assert [line["id"] for line in effects] == [answer["payment_id"]]


def test_a_caller_that_breaks_its_connection_off_is_no_error_of_the_service(
    ledger: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A linger of no time at all resets the connection, as a killed caller's system may do."""
    body = json.dumps(CHARGE).encode()
    head = f"POST /payments/charge HTTP/1.0\r\nIdempotency-Key: 1\r\nContent-Length: {len(body)}"
    with running(ledger) as services:
        services.behave("/payments/charge", reply_delay=0.5)
        address = urlsplit(services.url)
        with socket.create_connection((address.hostname, address.port)) as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: services.effects()["standing"])
        for _ in range(50):  # a complaint about the first call would be out after these
            services.post("/payments/charge", "1", **CHARGE)
        assert len(services.effects()["effects"]) == 1
    assert capfd.readouterr().err == ""


def test_a_key_belongs_to_one_verb(services: Services) -> None:
    """Otherwise a refund under a charge's key would be answered as done, and nothing refunded."""
    answer = services.post("/payments/charge", "key-1", **CHARGE)
    for path, payload in (("/payments/refund", answer), ("/payments/wallet", CHARGE)):
        with pytest.raises(Refused, match="belongs to a charge") as refused:
            services.post(path, "key-1", **payload)
        assert refused.value.status == 409
    assert len(services.effects()["effects"]) == 1
    assert services.post("/courier/book", "key-1", **BOOK)  # another service's keys are its own


def test_an_error_of_the_server_leaves_the_outcome_unknown(services: Services) -> None:
    services.behave("/payments/charge", fail={"status": 503, "message": "Out of order."}, times=1)
    with pytest.raises(OutcomeUnknown, match=r"Out of order.*503"):
        services.post("/payments/charge", "act-1", **CHARGE)
    assert services.effects()["effects"] == []


def test_a_service_that_is_gone_leaves_the_outcome_unknown(services: Services) -> None:
    os.kill(services.pid or 0, signal.SIGKILL)
    with pytest.raises(OutcomeUnknown) as unknown:
        services.post("/payments/charge", "act-1", **CHARGE)
    assert isinstance(unknown.value, TimeoutError)
    assert isinstance(unknown.value, OSError)


def test_a_proxy_of_the_environment_is_not_asked(ledger: Path) -> None:
    code = f"""
from testproject.services import running
with running({str(ledger)!r}) as services:
    services.post("/payments/charge", "act-1", order=7, amount=5)
"""
    environment = os.environ | {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_each_effect_is_a_line_in_the_ledger(services: Services, ledger: Path) -> None:
    payment = services.post("/payments/charge", "act-1", **CHARGE)["payment_id"]
    services.post("/payments/refund", "undo-1", payment_id=payment)
    services.post("/courier/cancel", "undo-2", order=7, charge_key="act-2")
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert all(
        datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0) for line in lines
    )
    names = ("service", "verb", "order", "key", "id")
    assert lines == [
        dict(zip(names, values, strict=True))
        for values in (
            ("payments", "charge", 7, "act-1", payment),
            ("payments", "refund", 7, "undo-1", payment),
            ("courier", "block", 7, "undo-2", "act-2"),
        )
    ]


def test_an_effect_is_in_the_ledger_before_its_answer_goes_out(
    services: Services, ledger: Path
) -> None:
    """And a restart after kill -9 in between answers the same key with what is written there."""
    services.behave("/payments/charge", reply_delay=60)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(services.post, "/payments/charge", "act-1", timeout=60, **CHARGE)
        until(lambda: ledger.read_text().endswith("\n"))
        assert not call.done()
        os.kill(services.pid or 0, signal.SIGKILL)
        with pytest.raises(OutcomeUnknown):
            call.result()
    written = json.loads(ledger.read_text())
    with running(ledger) as restarted:
        answer = restarted.post("/payments/charge", "act-1", **CHARGE)
        assert answer == {"payment_id": written["id"]}
        assert restarted.effects()["effects"] == [written]


@PAIRS
def test_after_kill_9_all_keys_ids_and_effects_are_remembered(
    services: Services,
    ledger: Path,
    act: str,
    payload: dict[str, Any],
    undo: str,
    id_name: str,
) -> None:
    undone = services.post(act, "act-1", **payload)
    services.post(undo, "undo-1", **undone)
    standing = services.post(act, "act-2", **payload)
    before = services.effects()
    os.kill(services.pid or 0, signal.SIGKILL)

    with running(ledger) as restarted:
        assert restarted.post(act, "act-1", **payload) == undone
        assert restarted.post(act, "act-2", **payload) == standing
        assert restarted.post(undo, "undo-1", **undone) == {}
        assert restarted.post(undo, "undo-2", **undone) == {}
        assert restarted.effects() == before
        restarted.post(undo, "undo-3", order=7, charge_key="act-2")
        assert restarted.effects()["standing"] == []


def test_kill_9_under_load_loses_no_answered_effect_and_doubles_none(
    services: Services, ledger: Path
) -> None:
    """Callers that lost their answer try again with the same key after the restart."""
    answers: dict[str, str] = {}

    def charge(services: Services, key: str) -> None:
        answers[key] = services.post("/payments/charge", key, **CHARGE)["payment_id"]

    def charge_in_vain(key: str) -> None:
        with suppress(OutcomeUnknown):
            charge(services, key)

    keys = [f"act-{number}" for number in range(300)]
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(charge_in_vain, key) for key in keys]
        until(lambda: len(answers) >= 50)
        os.kill(services.pid or 0, signal.SIGKILL)
        for call in calls:
            call.result()
    answered = dict(answers)
    assert len(answered) < len(keys)

    with running(ledger) as restarted:
        for key in keys:
            charge(restarted, key)
        effects = restarted.effects()["effects"]
    assert answers == answers | answered
    assert {line["key"]: line["id"] for line in effects} == answers
    assert len(effects) == len(keys)


def test_a_torn_last_line_is_dropped_and_its_call_may_come_again(ledger: Path) -> None:
    with running(ledger) as services:
        first = services.post("/payments/charge", "act-1", **CHARGE)
        services.post("/payments/charge", "act-2", **CHARGE)
    ledger.write_bytes(ledger.read_bytes()[:-20])
    with running(ledger) as services:
        assert [line["id"] for line in services.effects()["effects"]] == [first["payment_id"]]
        services.post("/payments/charge", "act-2", **CHARGE)
    assert [json.loads(line)["key"] for line in ledger.read_text().splitlines()] == [
        "act-1",
        "act-2",
    ]


def test_a_file_that_is_no_ledger_is_refused_and_left_alone(
    ledger: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ledger.write_text("a shopping list\nbread")
    with pytest.raises(RuntimeError, match="did not start"), running(ledger):
        pass
    assert f"{ledger} cannot be the ledger" in capfd.readouterr().err
    assert ledger.read_text() == "a shopping list\nbread"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly_even_while_a_call_is_running(
    ledger: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "testproject.services", "--port", "0", "--ledger", str(ledger)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        services = Services(process.stdout.readline().strip())
        services.behave("/payments/charge", reply_delay=60)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(services.post, "/payments/charge", "act-1", timeout=60, **CHARGE)
            until(lambda: services.effects()["standing"])
            process.send_signal(number)
            assert process.wait(30) == 0
            with pytest.raises(OutcomeUnknown):
                call.result()
        assert process.stdout.read() == ""
    assert capfd.readouterr().err == ""
    assert json.loads(ledger.read_text())["key"] == "act-1"


def test_running_ends_its_process_also_when_its_block_fails(ledger: Path) -> None:
    pids: list[int] = []

    def fail(services: Services) -> None:
        pids.append(services.pid or 0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), running(ledger) as services:
        fail(services)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_restart_may_keep_its_url(ledger: Path) -> None:
    with running(ledger) as services:
        url = services.url
        services.post("/payments/charge", "act-1", **CHARGE)
    with running(ledger, port=int(url.rpartition(":")[2])) as restarted:
        assert restarted.url == url
        assert len(restarted.effects()["standing"]) == 1
