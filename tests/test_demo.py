"""The demo's command, and its order killed at every moment; judged by the services' ledger."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from django.db.models.functions import Now

from django_saga import SagaFailed
from django_saga.models import SagaExecution
from testproject.services import Services, running
from testproject.shop import audit
from testproject.shop.models import Order, Product
from testproject.shop.sagas import BookCourier, ChargeCard, OrderContext, OrderSaga

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 90


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def shop_environment(home: Path) -> dict[str, str]:
    """A demo that has never run, on SQLite and with nothing else running."""
    servers = ("DATABASE_URL", "REDIS_URL", "SQLITE_URL", "MARIADB_URL", "SAGA_LEASE")
    return {name: value for name, value in os.environ.items() if name not in servers} | {
        "DJANGO_SETTINGS_MODULE": "testproject.settings",
        "DATABASE_URL": f"sqlite:///{home / 'demo.sqlite3'}",
        "SHOP_LEDGER": str(home / "ledger"),
        "SHOP_SERVICES_URL": f"http://127.0.0.1:{free_port()}",
    }


def manage(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def ledger(environment: dict[str, str]) -> list[dict[str, Any]]:
    lines = Path(environment["SHOP_LEDGER"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def standing(environment: dict[str, str]) -> Counter[tuple[int, str]]:
    """How many effects stand, by order and service, as the ledger's file has it."""
    lines = ledger(environment)
    undone = {line["id"] for line in lines if line["verb"] in ("refund", "cancel")}
    return Counter(
        (line["order"], line["service"])
        for line in lines
        if line["verb"] in ("charge", "wallet", "book") and line["id"] not in undone
    )


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return shop_environment(tmp_path)


@pytest.fixture(scope="module")
def demo_of_nothing(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a demo that was run once, and what it said."""
    home = tmp_path_factory.mktemp("demo")
    return home, manage(shop_environment(home), "demo")


@pytest.fixture
def shown(
    demo_of_nothing: tuple[Path, subprocess.CompletedProcess[str]], environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """What the demo said that was run once in this environment."""
    home, done = demo_of_nothing
    shutil.copytree(home, Path(environment["SHOP_LEDGER"]).parent, dirs_exist_ok=True)
    return done


def attempts(output: str, order: int) -> list[tuple[str, ...]]:
    """Step, action, attempt and outcome of each line of the last timeline of an order."""
    part = re.split(r"^Order \d+ .*\n", output, flags=re.MULTILINE)[order]
    table = part.split("outcome          took\n")[-1]
    found = re.findall(r"^ +[\d.]+ s  (\w+) +(\w+) +(\d+)  (\w+)", table, flags=re.MULTILINE)
    return [tuple(line) for line in found]


def test_the_demo_completes_fails_and_recovers_an_order_each_time_that_it_is_run(
    environment: dict[str, str], shown: subprocess.CompletedProcess[str]
) -> None:
    """From nothing, and again on what the first run left: nothing is lost, nothing doubled."""
    for run, done in enumerate((shown, manage(environment, "demo"))):
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        first = 3 * run + 1
        assert [int(n) for n in re.findall(r"^Order (\d+) ", done.stdout, re.MULTILINE)] == [
            first,
            first + 1,
            first + 2,
        ]
        assert attempts(done.stdout, 1) == [
            ("ReserveStock", "act", "1", "DONE"),
            ("ChargeCard", "act", "1", "DONE"),
            ("BookCourier", "act", "1", "DONE"),
        ]
        assert attempts(done.stdout, 2) == [
            ("ReserveStock", "act", "1", "DONE"),
            ("ChargeCard", "act", "1", "FAILED"),
            ("ChargeWallet", "act", "1", "DONE"),
            ("BookCourier", "act", "1", "FAILED"),
            ("ChargeWallet", "compensate", "1", "DONE"),
            ("ReserveStock", "compensate", "1", "DONE"),
        ]
        assert "(exit status -9)" in done.stdout
        assert attempts(done.stdout, 3) == [
            ("ReserveStock", "act", "1", "DONE"),
            ("ChargeCard", "act", "1", "INTERRUPTED"),
            ("ChargeCard", "act", "2", "DONE"),
            ("BookCourier", "act", "1", "DONE"),
        ]
        assert "Nothing was lost, nothing was doubled." in done.stdout
        assert "python run.py demo --serve" in done.stdout
        assert "open http://127.0.0.1:8000/admin/django_saga/\n" in done.stdout
    paid_and_booked = {(n, service): 1 for n in (1, 3, 4, 6) for service in ("payments", "courier")}
    assert standing(environment) == paid_and_booked


def test_the_demo_says_so_and_exits_1_where_its_proof_does_not_hold(
    environment: dict[str, str], shown: subprocess.CompletedProcess[str]
) -> None:
    """A payment that was taken twice, and a booking that got lost, are both found."""
    assert shown.returncode == 0
    lines = ledger(environment)
    charge = next(line for line in lines if line["verb"] == "charge")
    booking = next(line for line in lines if line["verb"] == "book" and line["order"] == 3)
    doubled = charge | {"id": "charge-again", "key": charge["key"] + "-again"}
    left = [line for line in (*lines, doubled) if line != booking]
    Path(environment["SHOP_LEDGER"]).write_text("".join(json.dumps(line) + "\n" for line in left))

    done = manage(environment, "demo")

    assert done.returncode == 1
    assert "Something was lost or doubled." in done.stderr
    assert "1 payments and 1 bookings should stand, but 2 and 1 do" in done.stderr
    assert "1 payments and 1 bookings should stand, but 1 and 0 do" in done.stderr


def test_a_second_demo_beside_a_running_one_is_told_why_it_cannot_start(
    environment: dict[str, str], tmp_path: Path
) -> None:
    port = int(environment["SHOP_SERVICES_URL"].rpartition(":")[2])
    with running(tmp_path / "another", port):
        done = manage(environment, "demo")
    assert done.returncode == 1
    assert done.stderr.startswith(f"CommandError: Port {port} cannot be had: Address already in")
    assert "Is the demo running in another terminal already?" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told_before_anything_is_done(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = manage(environment, "demo", "--serve", "--port", str(port))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"CommandError: Port {port} cannot be had: Address already in")
    assert "--serve --port PORT" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path(environment["DATABASE_URL"].removeprefix("sqlite:///")).exists()


# Runs or recovers orders, each in a fork that kills itself: before or after a handler does its
# work, or once that is recorded. Prints how each ended.
DOOMED = """
import json, os, signal, sys, traceback
import django
django.setup()
from django_saga import recover_saga
from django_saga.signals import step_compensated, step_completed
from testproject.shop import sagas
from testproject.shop.models import Order

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def drive(order, moment):
    step, action, when = moment.split(".")
    work = getattr(getattr(sagas, step), action)

    def doomed(handler, context):
        if when == "before":
            die()
        work(handler, context)
        if when == "after":
            die()

    def die_if_recorded(record, **kwargs):
        if when == "recorded" and (record.step, record.action) == (step, action):
            die()

    setattr(getattr(sagas, step), action, doomed)
    step_completed.connect(die_if_recorded)
    step_compensated.connect(die_if_recorded)
    order = Order.objects.get(pk=order)
    if verb == "recover":
        recover_saga(order.saga_id)
    else:
        sagas.OrderSaga().run(sagas.OrderContext.of(order), saga_id=order.saga_id)

def ended(order, moment):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        drive(order, moment)
    except BaseException:
        traceback.print_exc()
    os._exit(1)

verb, orders = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps([ended(*each) for each in orders]))
"""
FORWARD = [
    f"{step}.act.{when}"
    for step in ("ReserveStock", "ChargeCard", "BookCourier")
    for when in ("before", "after", "recorded")
]
BACKWARD = [
    f"{step}.compensate.{when}"
    for step in ("ChargeCard", "ReserveStock")
    for when in ("before", "after", "recorded")
]
ENDED = ("BookCourier.act.recorded", "ReserveStock.compensate.recorded")
LEASE = 2


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with running(tmp_path / "ledger") as started:
        yield started


@pytest.fixture
def doom(
    transactional_db: None, child_environment: dict[str, str], services: Services
) -> Callable[..., list[int]]:
    """Has processes run or recover orders until they die, each at its moment; the exit statuses."""
    ours = {"SHOP_SERVICES_URL": services.url, "SAGA_LEASE": str(LEASE)}

    def doom(verb: str, *orders: tuple[Order, str]) -> list[int]:
        named = json.dumps([(order.pk, moment) for order, moment in orders])
        done = subprocess.run(
            [sys.executable, "-c", DOOMED, verb, named],
            cwd=ROOT,
            env={**child_environment, **ours},
            stdout=subprocess.PIPE,
            timeout=PATIENCE,
        )
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    return doom


@pytest.fixture
def recover(child_environment: dict[str, str], services: Services) -> Callable[[], None]:
    """Sweeps, in processes of their own, until every order has ended."""
    environment = {**child_environment, "SHOP_SERVICES_URL": services.url}

    def swept() -> bool:
        manage(environment, "recover_sagas")
        return not SagaExecution.objects.filter(finished_at=None).exclude(status="STUCK").exists()

    return lambda: wait_for(swept)


def place(services: Services, moment: str) -> Order:
    """An order of a product of its own, that no other order's mistake can even out."""
    product = Product.objects.create(name=moment, price=Decimal("2.50"), supplied=9, in_stock=9)
    order = Order.objects.create(product=product, quantity=2, address="1 Main Street")
    if moment in BACKWARD:
        services.behave("/courier/book", order=order.pk, fail={"status": 422, "message": "no"})
    return order


def test_kill_9_at_any_moment_of_an_order_loses_and_doubles_nothing(
    doom: Callable[..., list[int]], recover: Callable[[], None], services: Services
) -> None:
    """Each effect stands exactly once, or all of the order is undone."""
    moments = [*FORWARD, *BACKWARD]
    orders = [place(services, moment) for moment in moments]
    assert doom("run", *zip(orders, moments, strict=True)) == [-9] * len(orders)
    ended = SagaExecution.objects.exclude(finished_at=None).values_list("id", flat=True)
    by_moment = dict(zip(moments, orders, strict=True))
    assert set(ended) == {by_moment[moment].saga_id for moment in ENDED}

    recover()

    status = dict(SagaExecution.objects.values_list("id", "status"))
    assert {moment: status[order.saga_id] for moment, order in by_moment.items()} == {
        **dict.fromkeys(FORWARD, "COMPLETED"),
        **dict.fromkeys(BACKWARD, "FAILED"),
    }
    assert audit.problems(services.effects()) == []
    assert dict(Product.objects.values_list("name", "in_stock")) == {
        **dict.fromkeys(FORWARD, 7),
        **dict.fromkeys(BACKWARD, 9),
    }
    keys = Counter(line["key"] for line in services.effects()["effects"])
    assert set(keys.values()) == {1}


def test_a_recovery_that_is_killed_as_well_is_recovered_from(
    doom: Callable[..., list[int]], recover: Callable[[], None], services: Services
) -> None:
    """The service took the money for the lost attempts once."""
    order = place(services, "ChargeCard.act.after")
    assert doom("run", (order, "ChargeCard.act.after")) == [-9]
    rows = SagaExecution.objects.filter(pk=order.saga_id)
    wait_for(lambda: rows.filter(lease_until__lte=Now()).exists())
    assert doom("recover", (order, "ChargeCard.act.after")) == [-9]

    recover()

    execution = rows.get()
    outcomes = execution.records.filter(step="ChargeCard").values_list("outcome", flat=True)
    assert (execution.status, list(outcomes)) == (
        "COMPLETED",
        ["INTERRUPTED", "INTERRUPTED", "DONE"],
    )
    assert audit.problems(services.effects()) == []


@pytest.fixture
def order(
    transactional_db: None, settings: Any, services: Services, monkeypatch: pytest.MonkeyPatch
) -> Order:
    """An order at services that have half a second to answer."""
    settings.SHOP_SERVICES_URL = services.url
    for step in (ChargeCard, BookCourier):
        monkeypatch.setattr(step, "timeout", 0.5)
    return place(services, "an order")


def test_a_payment_whose_answer_is_lost_is_refunded_by_its_key_and_the_wallet_pays(
    order: Order, services: Services
) -> None:
    """Nobody knows an id to refund: the key of the lost call does."""
    services.behave("/payments/charge", order=order.pk, reply_delay=60)

    execution = OrderSaga().run(OrderContext.of(order), saga_id=order.saga_id)

    records = execution.records.values_list("step", "action", "outcome")
    assert list(records)[1:4] == [
        ("ChargeCard", "act", "UNKNOWN"),
        ("ChargeCard", "compensate", "DONE"),
        ("ChargeWallet", "act", "DONE"),
    ]
    verbs = [line["verb"] for line in services.effects()["effects"]]
    assert verbs == ["charge", "refund", "wallet", "book"]
    assert audit.problems(services.effects()) == []


def test_a_booking_whose_answer_is_lost_is_asked_for_again_and_at_last_cancelled_by_its_key(
    order: Order, services: Services
) -> None:
    """The courier came to know of one booking, and that it is off."""
    services.behave("/courier/book", order=order.pk, reply_delay=60)

    with pytest.raises(SagaFailed) as failed:
        OrderSaga().run(OrderContext.of(order), saga_id=order.saga_id)

    booking = failed.value.execution.records.filter(step="BookCourier")
    assert list(booking.values_list("action", "attempt", "outcome")) == [
        ("act", 1, "UNKNOWN"),
        ("act", 2, "UNKNOWN"),
        ("act", 3, "UNKNOWN"),
        ("compensate", 1, "DONE"),
    ]
    verbs = [line["verb"] for line in services.effects()["effects"]]
    assert verbs == ["charge", "book", "cancel", "refund"]
    assert audit.problems(services.effects()) == []
