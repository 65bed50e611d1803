"""Sagas in real RQ workers: what is handed over, what is lost, what is forged, who is killed."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.core.checks import run_checks
from django.db import connection, transaction
from django_rq import get_queue
from pytest_django import Settings
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, ScheduledJobRegistry
from rq.serializers import JSONSerializer

from django_saga.admin import jobs as jobs_page
from django_saga.backends import _backend, get_backend
from django_saga.exceptions import InvalidSettings, SagaError
from django_saga.models import SagaExecution
from django_saga.recovery import HANDED_OVER, sweep
from django_saga.rq import ENTRY_POINT, RESULT_TTL, run_saga
from django_saga.saga import Saga
from tests.commands import Command, nursery
from tests.faults.children import Nursery
from tests.sagas import (
    Alone,
    AwaitSaga,
    ComeBackSaga,
    Guided,
    Journey,
    LongerSaga,
    LoseLeaseSaga,
    SleepSaga,
    Stroll,
    Travel,
)

pytestmark = pytest.mark.usefixtures("alone")

LEASE = 1.0  # seconds; short, as these tests wait until it has run out
PATIENCE = 60  # seconds until a condition that does not come about fails its test
WORKERS = ["rq.Worker", "rq.SimpleWorker"]
JSON = ("--serializer", "rq.serializers.JSONSerializer")
GUARDED = ("--job-class", "django_saga.rq.SagaJob", *JSON)

Start = Callable[..., Command]


@pytest.fixture(scope="module")
def forking(child_environment: dict[str, str]) -> Iterator[Nursery]:
    """What the commands are forked from."""
    forking = nursery(child_environment)
    yield forking
    forking.end()


@pytest.fixture
def anew() -> bool:
    """Whether commands are started by their very command line, rather than forked."""
    return False


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    """A queue for this test alone, which this process hands its sagas over to."""
    name = f"sagas-{uuid4().hex[:8]}"
    here = {"URL": os.environ["REDIS_URL"]}
    ours = dict.fromkeys((name, f"{name}-own", f"{name}-cron"), here)
    settings.RQ_QUEUES = {**settings.RQ_QUEUES, **ours}
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": name, "LEASE": LEASE}
    queue = get_queue(name, serializer=JSONSerializer)
    yield queue
    queue.empty()
    queue.connection.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The file that BookHotel waits for, where the context names it."""
    return tmp_path / "gate"


@pytest.fixture
def intruded(tmp_path: Path) -> Path:
    """The mark that a forged job leaves, if a worker runs it."""
    return tmp_path / "intruded"


@pytest.fixture
def start(
    forking: Nursery,
    anew: bool,
    queue: Queue,
    settings: Settings,
    child_environment: dict[str, str],
    tmp_path: Path,
    gate: Path,
    intruded: Path,
) -> Iterator[Start]:
    """Starts a manage.py command with the settings that this process has now."""
    children: list[Command] = []

    def started(*arguments: str) -> Command:
        environment = {
            **child_environment,
            "DJANGO_SETTINGS_MODULE": "tests.rq_settings",
            "SAGA_SETTINGS": json.dumps(settings.DJANGO_SAGA),
            "INTRUDED": str(intruded),
        }
        log = tmp_path / f"{len(children)}.log"
        children.append(Command(forking, log, *arguments, environment=environment, anew=anew))
        return children[-1]

    yield started
    gate.touch()  # so that horses without a worker end too
    for child in children:
        child.kill()


@pytest.fixture
def work(start: Start, queue: Queue) -> Start:
    """Starts a worker, by default a guarded one that ends with the queue."""

    def started(worker: str = "rq.Worker", *options: str, like: Any = (*GUARDED, "--burst")) -> Any:
        return start("rqworker", queue.name, "--worker-class", worker, *like, *options)

    return started


@pytest.fixture
def journey(tmp_path: Path) -> Journey:
    (tmp_path / "ledger").touch()
    return Journey(ledger=str(tmp_path / "ledger"))


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (met := condition()):
        assert time.monotonic() < deadline, "what the test waits for did not come about"
        time.sleep(0.02)
    return met


def calls(journey: Journey) -> list[str]:
    """What handlers were called, in order."""
    return [" ".join(line.split()[:2]) for line in Path(journey.ledger).read_text().splitlines()]


def callers(journey: Journey) -> list[int]:
    """The processes that called them."""
    return [int(line.split()[3]) for line in Path(journey.ledger).read_text().splitlines()]


def outcomes(execution: SagaExecution) -> list[str]:
    return [f"{r.action} {r.step} {r.outcome}" for r in execution.records.all()]


def status(execution: SagaExecution) -> str:
    execution.refresh_from_db()
    return execution.status


def jobs(queue: Queue) -> list[Job]:
    return [job for job in map(queue.fetch_job, queue.job_ids) if job]


def failed_jobs(queue: Queue) -> set[str]:
    return set(FailedJobRegistry(queue=queue).get_job_ids(cleanup=False))


def hand_over_when_due() -> None:
    """Sweep until the lease or the grace of the one execution there is has run out."""
    (recovered,) = until(lambda: list(sweep()))
    assert recovered.status == HANDED_OVER


ALL_BOOKED = ["act BookFlight", "act BookHotel", "act BookTrain"]


# Driving


# The one test that shows the way of a site; all others fork, which is many times as fast.
@pytest.mark.parametrize("anew", [True], ids=["anew"])
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("like", [GUARDED, JSON], ids=["SagaJob", "Job"])
def test_a_worker_drives_what_is_enqueued(
    queue: Queue, work: Start, journey: Journey, worker: str, like: tuple[str, ...]
) -> None:
    execution = Travel().enqueue(journey)
    assert (execution.status, calls(journey)) == ("PENDING", [])
    (job,) = jobs(queue)
    child = work(worker, like=(*like, "--burst"))
    child.end()
    assert 0 < queue.connection.ttl(job.key) <= RESULT_TTL
    assert status(execution) == "COMPLETED"
    assert calls(journey) == ALL_BOOKED
    forks = worker == "rq.Worker"
    assert (set(callers(journey)) == {child.pid}) is not forks


@pytest.mark.parametrize("worker", WORKERS)
def test_the_job_of_a_saga_that_failed_has_done_its_work(
    queue: Queue, work: Start, journey: Journey, worker: str
) -> None:
    journey.full = True
    execution = Travel().enqueue(journey)
    work(worker).end()
    assert status(execution) == "FAILED"
    assert execution.error_message == "no seats"
    assert calls(journey) == [*ALL_BOOKED, "compensate BookHotel", "compensate BookFlight"]
    assert failed_jobs(queue) == set()


def test_the_job_of_an_execution_is_looked_for_among_so_many(
    queue: Queue, journey: Journey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are next; of the failed, the latest."""
    monkeypatch.setattr(jobs_page, "LOOKED_AT", 2)
    ids = [Travel().enqueue(journey).id for _ in range(3)]
    found = [jobs_page.find_job(id) for id in ids]
    assert [str(id) in page for id, page in zip(ids, found, strict=True)] == [True, True, False]
    for number, job in enumerate(jobs(queue)):
        queue.remove(job)
        queue.failed_job_registry.add(job, ttl=1_000 + number)
    found = [jobs_page.find_job(id) for id in ids]
    assert [str(id) in page for id, page in zip(ids, found, strict=True)] == [False, True, True]


def test_a_job_carries_the_path_of_the_entry_point_and_one_id_as_json(
    queue: Queue, journey: Journey
) -> None:
    execution = Travel().enqueue(journey)
    (job,) = jobs(queue)
    assert json.loads(job.data) == ["django_saga.rq.run_saga", None, [str(execution.id)], {}]
    assert job.id.startswith(f"saga-{execution.id}-")
    assert job.timeout == -1
    assert 0 < job.result_ttl < job.failure_ttl <= 86_400
    hash = queue.connection.hgetall(job.key)
    assert not [name for name, value in hash.items() if value and b"callback" in name]


def test_the_jobs_of_many_are_as_the_job_of_one(
    queue: Queue, work: Start, journey: Journey
) -> None:
    Travel().enqueue(journey)
    ids = Travel().enqueue_many([journey] * 3)
    alone, *many = jobs(queue)
    assert [job.args for job in many] == [[str(saga_id)] for saga_id in ids]
    assert [job.id[:41] for job in many] == [f"saga-{saga_id}" for saga_id in ids]
    own = {b"created_at", b"enqueued_at", b"data", b"description"}
    hashes = [queue.connection.hgetall(job.key) for job in (alone, *many)]
    told = [{name: value for name, value in hash.items() if name not in own} for hash in hashes]
    assert told[1:] == [told[0]] * 3
    work().end()
    assert set(SagaExecution.objects.values_list("status", flat=True)) == {"COMPLETED"}
    assert calls(journey) == ALL_BOOKED * 4


def test_the_jobs_of_a_thousand_are_one_command_to_redis(queue: Queue, journey: Journey) -> None:
    def transactions() -> int:
        return int(queue.connection.info("commandstats")["cmdstat_exec"]["calls"])

    Travel().enqueue(journey)
    before = transactions()
    Travel().enqueue_many([journey] * 1500)
    assert (transactions() - before, queue.count) == (2, 1501)


def test_an_execution_can_always_be_handed_over_again(
    queue: Queue, work: Start, journey: Journey
) -> None:
    """A job that waits, or has ended and is still in Redis, is not in the way of the next."""
    saga = Travel()
    execution = saga.enqueue(journey)
    for _ in range(2):
        get_backend().hand_over(saga, execution.id, 0.0)
    assert len(set(queue.job_ids)) == 3
    work().end()
    assert status(execution) == "COMPLETED"
    get_backend().hand_over(saga, execution.id, 0.0)
    assert len(queue.job_ids) == 1
    assert calls(journey) == ALL_BOOKED


def test_doubled_jobs_drive_a_saga_once(
    queue: Queue, work: Start, journey: Journey, gate: Path
) -> None:
    journey.gate = str(gate)
    saga = Travel()
    execution = saga.enqueue(journey)
    first = work()
    until(lambda: "act BookHotel" in calls(journey))
    get_backend().hand_over(saga, execution.id, 0.0)
    queue.push_job_id(queue.job_ids[0])  # Redis doubled this one
    log = work("rq.SimpleWorker").end()
    assert log.count("Job OK") == 2
    assert failed_jobs(queue) == set()
    gate.touch()
    first.end()
    assert status(execution) == "COMPLETED"
    assert calls(journey) == ALL_BOOKED


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("saga", [SleepSaga, AwaitSaga])
def test_a_steps_timeout_ends_its_handler_in_a_worker(
    queue: Queue, work: Start, journey: Journey, worker: str, saga: type[Saga[Journey]]
) -> None:
    execution = saga().enqueue(journey)
    work(worker).end()
    assert status(execution) == "FAILED"
    assert execution.error_type == "TimeoutError"
    step = execution.failed_step
    assert calls(journey) == [
        "act BookFlight",
        f"act {step}",
        f"compensate {step}",
        "compensate BookFlight",
    ]
    assert f"act {step} UNKNOWN" in outcomes(execution)


@pytest.mark.parametrize("worker", WORKERS)
def test_a_timeout_of_rq_does_not_strike_into_a_saga(
    queue: Queue, work: Start, journey: Journey, worker: str
) -> None:
    execution = LongerSaga().enqueue(journey)
    (job,) = jobs(queue)
    queue.connection.hset(job.key, "timeout", "1")
    work(worker, like=(*JSON, "--burst")).end()
    assert status(execution) == "COMPLETED", execution.error_message


# With a queue of its own


@pytest.fixture
def own(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """The queue of Travel alone."""
    own = get_queue(f"{queue.name}-own", serializer=JSONSerializer)
    monkeypatch.setattr(Travel, "queue", own.name)
    yield own
    own.empty()
    own.connection.close()


def test_a_saga_with_a_queue_of_its_own_is_handed_over_there(
    queue: Queue, own: Queue, journey: Journey
) -> None:
    Travel().enqueue(journey, delay=1)
    assert ScheduledJobRegistry(queue=own).count == 1
    execution = Travel().enqueue(journey)
    Travel().enqueue_many([journey] * 2)
    Stroll().enqueue(journey)
    assert (queue.count, own.count) == (1, 3)
    SagaExecution.objects.filter(pk=execution.pk).update(grace_until=None)
    assert [recovered.saga_id for recovered in sweep()] == [execution.pk]
    assert (queue.count, own.count) == (1, 4)


def test_a_worker_that_takes_turns_keeps_no_queue_waiting(
    queue: Queue, own: Queue, start: Start, journey: Journey
) -> None:
    Stroll().enqueue_many([journey] * 500)
    last = Travel().enqueue(journey)
    taking_turns = ("--worker-class", "rq.worker.RoundRobinWorker", "--max-jobs", "10")
    start("rqworker", queue.name, own.name, *taking_turns, *GUARDED).end()
    assert status(last) == "COMPLETED"
    assert SagaExecution.objects.filter(status="COMPLETED").count() == 10
    assert SagaExecution.objects.filter(status="PENDING").count() == 491


# With a limit


def test_workers_never_drive_more_at_once_than_may_run_and_hand_on_to_what_waits(
    queue: Queue, work: Start, journey: Journey
) -> None:
    Guided().enqueue_many([journey] * 30)
    for worker in [work("rq.SimpleWorker") for _ in range(4)]:
        worker.end()
    assert set(SagaExecution.objects.values_list("status", flat=True)) == {"COMPLETED"}
    inside: set[str] = set()
    at_once = []
    for line in Path(journey.ledger).read_text().splitlines():
        inside ^= {line.split()[2]}
        at_once.append(len(inside))
    assert max(at_once) == 2
    assert len(at_once) == 60


def test_the_place_of_a_killed_worker_is_free_once_what_it_drove_has_ended(
    queue: Queue, work: Start, journey: Journey, gate: Path
) -> None:
    journey.gate = str(gate)
    first, second = Alone().enqueue(journey), Alone().enqueue(journey)
    child = work("rq.SimpleWorker")
    until(lambda: "act BookHotel" in calls(journey))
    child.kill()
    gate.touch()
    work("rq.SimpleWorker").end()
    assert (status(first), status(second)) == ("RUNNING", "PENDING"), "it waits for its turn"
    hand_over_when_due()
    work("rq.SimpleWorker").end()
    assert (status(first), status(second)) == ("COMPLETED", "COMPLETED")
    assert calls(journey) == ["act BookFlight", *["act BookHotel"] * 2, *calls(journey)[3:]]
    ended = SagaExecution.objects.get(pk=first.pk).finished_at
    assert ended <= second.records.first().created_at  # type: ignore[operator,union-attr]


# With a transaction, with a delay


def test_enqueue_inside_atomic_sends_the_job_after_the_commit(
    queue: Queue, journey: Journey
) -> None:
    with transaction.atomic():
        execution = Travel().enqueue(journey)
        assert queue.job_ids == []
    assert status(execution) == "PENDING"
    assert [job.args for job in jobs(queue)] == [[str(execution.id)]]


def test_the_job_is_sent_at_once_whatever_django_rq_waits_for(
    queue: Queue, journey: Journey, settings: Settings
) -> None:
    settings.RQ = {"COMMIT_MODE": "request_finished"}
    Travel().enqueue(journey)
    assert len(queue.job_ids) == 1


def test_enqueue_inside_atomic_that_rolls_back_leaves_no_row_and_no_job(
    queue: Queue, journey: Journey
) -> None:
    with transaction.atomic():
        Travel().enqueue(journey)
        transaction.set_rollback(True)
    assert not SagaExecution.objects.exists()
    assert queue.job_ids == []


@pytest.mark.parametrize("worker", WORKERS)
def test_a_delayed_saga_starts_with_the_scheduler(
    queue: Queue, work: Start, journey: Journey, worker: str
) -> None:
    execution = Travel().enqueue(journey, delay=1)
    assert queue.job_ids == []
    assert ScheduledJobRegistry(queue=queue).count == 1
    work(worker, "--with-scheduler", like=GUARDED)
    until(lambda: status(execution) == "COMPLETED")
    assert calls(journey) == ALL_BOOKED


def test_without_a_scheduler_recovery_starts_a_delayed_saga(
    queue: Queue, work: Start, journey: Journey
) -> None:
    execution = Travel().enqueue(journey, delay=1)
    hand_over_when_due()
    work().end()
    assert status(execution) == "COMPLETED"


def test_a_worker_hands_over_what_has_to_wait(
    queue: Queue, work: Start, journey: Journey, settings: Settings
) -> None:
    settings.DJANGO_SAGA = {**settings.DJANGO_SAGA, "INLINE_WAIT": 0}
    execution = ComeBackSaga().enqueue(journey)
    work().end()
    assert (status(execution), execution.lease_until) == ("RUNNING", None)
    assert ScheduledJobRegistry(queue=queue).count == 1
    work("rq.Worker", "--with-scheduler", like=GUARDED)
    until(lambda: status(execution) == "COMPLETED")
    assert calls(journey) == ["act ComeBack", "act ComeBack", "act BookTrain"]


# Lost


def test_a_lost_job_is_sent_again_by_a_sweep(queue: Queue, work: Start, journey: Journey) -> None:
    execution = Travel().enqueue(journey)
    lost = queue.job_ids
    queue.connection.delete(queue.key, *map(Job.key_for, lost))
    hand_over_when_due()
    assert len(queue.job_ids) == 1
    assert queue.job_ids != lost
    work().end()
    assert status(execution) == "COMPLETED"


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_killed_in_a_step_is_recovered_by_another(
    queue: Queue, work: Start, journey: Journey, gate: Path, worker: str
) -> None:
    journey.gate = str(gate)
    execution = Travel().enqueue(journey)
    child = work(worker)
    until(lambda: "act BookHotel" in calls(journey))
    child.kill()
    horse = callers(journey)[-1]
    if horse != child.pid:  # it survives its worker
        os.kill(horse, signal.SIGKILL)
    gate.touch()
    hand_over_when_due()
    work(worker).end()
    assert status(execution) == "COMPLETED"
    assert outcomes(execution) == [
        "act BookFlight DONE",
        "act BookHotel INTERRUPTED",
        "act BookHotel DONE",
        "act BookTrain DONE",
    ]
    assert calls(journey) == ["act BookFlight", "act BookHotel", *ALL_BOOKED[1:]]
    lines = Path(journey.ledger).read_text().splitlines()
    assert len({line.split()[2] for line in lines}) == 3, "a step keeps its idempotency key"


@pytest.mark.parametrize("worker", WORKERS)
def test_a_worker_told_to_end_finishes_the_saga_in_hand(
    queue: Queue, work: Start, journey: Journey, gate: Path, worker: str
) -> None:
    journey.gate = str(gate)
    execution = Travel().enqueue(journey)
    child = work(worker, like=GUARDED)
    until(lambda: "act BookHotel" in calls(journey))
    child.terminate()
    until(lambda: "warm shut down" in child.log)
    gate.touch()
    child.end()
    assert status(execution) == "COMPLETED"
    assert calls(journey) == ALL_BOOKED


def test_a_simple_worker_forced_to_end_undoes_nothing_and_lets_go_of_the_lease(
    queue: Queue, work: Start, journey: Journey, gate: Path, settings: Settings
) -> None:
    settings.DJANGO_SAGA = {**settings.DJANGO_SAGA, "LEASE": 3600}
    journey.gate = str(gate)
    execution = Travel().enqueue(journey)
    child = work("rq.SimpleWorker", like=GUARDED)
    until(lambda: "act BookHotel" in calls(journey))
    child.terminate()
    until(lambda: "warm shut down" in child.log)
    time.sleep(1.5)  # RQ takes two signals within a second for one
    child.terminate()
    child.end()
    assert (status(execution), execution.step) == ("RUNNING", "BookHotel")
    assert execution.lease_until is None
    assert calls(journey) == ALL_BOOKED[:2]
    gate.touch()
    hand_over_when_due()
    work("rq.SimpleWorker").end()
    assert status(execution) == "COMPLETED"
    assert "act BookHotel INTERRUPTED" in outcomes(execution)


def test_without_redis_enqueue_stores_the_saga_logs_and_gives_up_soon(
    queue: Queue,
    work: Start,
    journey: Journey,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    queues = settings.RQ_QUEUES
    with closing(Refusing()) as redis:
        settings.RQ_QUEUES = {**queues, queue.name: {"URL": redis.url}}
        execution = Travel().enqueue(journey)
        (recovered,) = until(lambda: list(sweep()))
        assert recovered.status == "PENDING"
        assert recovered.error
    assert redis.tries == 2 * 2
    assert f"{execution.id} could not be handed over, recovery will find it" in caplog.text
    settings.RQ_QUEUES = queues
    hand_over_when_due()
    work().end()
    assert status(execution) == "COMPLETED"


class Refusing(socketserver.TCPServer):
    """Takes the place of a Redis: closes every connection, and counts them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.url = f"redis://127.0.0.1:{self.server_address[1]}"
        self.tries = 0
        threading.Thread(target=self.serve_forever, args=[0.01]).start()

    def verify_request(self, *request: Any) -> bool:
        self.tries += 1
        return False

    def close(self) -> None:
        self.shutdown()
        self.server_close()


# The entry point


def test_run_saga_ends_quietly_where_there_is_nothing_to_do(
    queue: Queue, journey: Journey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "django_saga.rq")
    run_saga(str(uuid4()))
    with Travel().transaction(journey) as driven:
        for _ in driven:
            run_saga(str(driven.saga_id))
    lost = LoseLeaseSaga().enqueue(journey)
    run_saga(str(lost.id))
    told = [
        f"{record.levelname} {record.getMessage()}"
        for record in caplog.records
        if record.name == "django_saga.rq"
    ]
    assert len(told) == 4
    assert re.match("WARNING .*No saga execution has the id", told[0])
    assert re.match("INFO .*is being driven by", told[1])
    assert re.match("INFO .*was taken over", told[3])
    assert calls(journey) == [*ALL_BOOKED, "act BookFlight", "act LoseLease"]


ID = UUID("abcdef01-2345-4789-abcd-ef0123456789")


@pytest.mark.parametrize("saga_id", ["", "nonsense", None, 7, str(ID).upper(), ID])
def test_run_saga_takes_one_id_as_text(saga_id: Any) -> None:
    with pytest.raises(SagaError, match="takes the id of an execution, not"):
        run_saga(saga_id)


def test_run_saga_neither_uses_nor_leaves_an_old_connection(queue: Queue, journey: Journey) -> None:
    execution = Travel().enqueue(journey)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (old,) = cursor.fetchone()
    terminator = connection.copy()
    with closing(terminator), terminator.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [old])
    run_saga(str(execution.id))
    assert connection.connection is None
    assert status(execution) == "COMPLETED"


# Forged in Redis

SHELL = 'touch "$INTRUDED"'
NOBODY = str(UUID(int=7))


class Pickled:
    def __reduce__(self) -> Any:
        return os.system, (SHELL,)


def call(path: Any, *arguments: Any, instance: Any = None, **options: Any) -> bytes:
    return json.dumps([path, instance, arguments, options]).encode()


OURS = call(ENTRY_POINT, NOBODY)
RUNS_CODE: dict[str, dict[str, Any]] = {
    "another function": {"data": call("tests.sagas.intrude")},
    "a shell command": {"data": call("os.system", SHELL)},
    "success callback": {"data": OURS, "success_callback_name": "tests.sagas.intrude"},
    "failure callback": {"data": call("no.such"), "failure_callback_name": "tests.sagas.intrude"},
}
FORGED: dict[str, dict[str, Any]] = {
    **RUNS_CODE,
    "another function of one id": {"data": call("tests.sagas.intrude", NOBODY)},
    "pickle": {"data": pickle.dumps(Pickled())},
    "pickled call": {"data": pickle.dumps((ENTRY_POINT, None, (NOBODY,), {}))},
    "stopped callback": {"data": OURS, "stopped_callback_name": "tests.sagas.intrude"},
    "web hook": {
        "data": OURS,
        "webhooks": json.dumps([{"url": "http://127.0.0.1:9/", "job_status": "finished"}]),
    },
    "dependency": {"data": OURS, "dependency_ids": json.dumps(["another"])},
    "old dependency": {"data": OURS, "dependency_id": "another"},
    "instance": {"data": call(ENTRY_POINT, NOBODY, instance="someone")},
    "no argument": {"data": call(ENTRY_POINT)},
    "two arguments": {"data": call(ENTRY_POINT, NOBODY, NOBODY)},
    "keyword": {"data": call(ENTRY_POINT, NOBODY, storage=1)},
    "keyword only": {"data": call(ENTRY_POINT, saga_id=NOBODY)},
    "no id": {"data": call(ENTRY_POINT, "nonsense")},
    "another spelling": {"data": call(ENTRY_POINT, f"{{{NOBODY}}}")},
    "a number": {"data": call(ENTRY_POINT, 7)},
    "no path": {"data": call(None, NOBODY)},
    "a neighbour": {"data": call("django_saga.rq.sweep_sagas")},
    "no list": {"data": b"7"},
    "no JSON": {"data": b"\xff\x00"},
    "nested": {"data": b"[" * 100_000},
    "retried": {"data": call("no.such"), "retries_left": "3"},
    "repeated": {"data": call("no.such"), "repeats_left": "3", "repeat_intervals": "[0]"},
    "no time": {"data": OURS, "created_at": "yesterday"},
    "no status": {"data": OURS, "status": "splendid"},
}


def forge(queue: Queue, fields: dict[str, Any]) -> str:
    id = f"forged-{uuid4().hex}"
    hash = {"origin": queue.name, "status": "queued", "created_at": "2026-11-23T12:00:00.000000Z"}
    queue.connection.hset(Job.key_for(id), mapping={**hash, **fields})
    queue.push_job_id(id)
    return id


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("serializer", [JSON, ()], ids=["JSON", "default"])
def test_a_guarded_worker_refuses_what_is_forged_and_works_on(
    queue: Queue,
    work: Start,
    journey: Journey,
    intruded: Path,
    worker: str,
    serializer: tuple[str, ...],
) -> None:
    forged = {name: forge(queue, fields) for name, fields in FORGED.items()}
    execution = Travel().enqueue(journey)
    log = work(worker, *serializer, "--job-class", "django_saga.rq.SagaJob", like=["--burst"]).end()
    refused = {name: log.count(f"\nJob {id} was refused: ") for name, id in forged.items()}
    assert refused == dict.fromkeys(forged, 1)
    assert failed_jobs(queue) == set(forged.values())
    assert not intruded.exists()
    assert status(execution) == "COMPLETED"


@pytest.mark.parametrize("worker", WORKERS)
def test_a_guarded_worker_runs_nothing_that_comes_beside_the_call(
    queue: Queue, work: Start, intruded: Path, worker: str
) -> None:
    """What tools add to a job, such as a trace in its meta, does not get it refused."""
    besides = {name: pickle.dumps(Pickled()) for name in ("meta", "result", "exc_info")}
    again = {"retries_left": "3", "repeats_left": "3", "repeat_intervals": "[0]"}
    forge(queue, {"data": OURS, **besides, **again})
    log = work(worker, "--job-class", "django_saga.rq.SagaJob", like=["--burst"]).end()
    assert log.count("Job OK") == 1
    assert not intruded.exists()


@pytest.mark.parametrize("name", [*RUNS_CODE, "pickle"])
def test_a_plain_worker_would_run_it(queue: Queue, work: Start, intruded: Path, name: str) -> None:
    forge(queue, FORGED[name])
    work(like=["--burst", *(() if name == "pickle" else JSON)]).end()
    assert intruded.exists()


# Periodic recovery


def test_rqcron_is_a_home_for_the_sweep(
    queue: Queue, start: Start, work: Start, journey: Journey, tmp_path: Path
) -> None:
    execution = Travel().enqueue(journey)
    queue.empty()
    (tmp_path / "cron.py").write_text(
        "from rq import cron\n"
        "from django_saga.rq import sweep_sagas\n"
        f"cron.register(sweep_sagas, '{queue.name}-cron', interval=1, job_timeout=-1)\n"
    )
    start("rqcron", str(tmp_path / "cron.py"))
    start("rqworker", f"{queue.name}-cron")
    work(like=GUARDED)
    until(lambda: status(execution) == "COMPLETED")
    assert calls(journey) == ALL_BOOKED


# Settings, and what is installed


def test_a_queue_that_is_not_configured_is_told(settings: Settings) -> None:
    settings.DJANGO_SAGA = {"BACKEND": "rq", "QUEUE": "nowhere"}
    _backend.cache_clear()
    with pytest.raises(InvalidSettings, match="'nowhere' is not defined in RQ_QUEUES"):
        get_backend()
    assert [error.id for error in run_checks() if "nowhere" in error.msg] == ["django_saga.E003"]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=PATIENCE
    )


CORE = """
import sys
{before}
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django_saga"], USE_TZ=True, DJANGO_SAGA={saga},
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}}},
)
import django
django.setup()
from django.core.management import call_command
"""


def test_the_core_imports_neither_rq_nor_django_rq() -> None:
    code = CORE.format(before="", saga={}) + (
        "call_command('migrate', verbosity=0)\n"
        "call_command('recover_sagas', verbosity=0)\n"
        "import django_saga.storage, django_saga.recovery, django_saga.operations\n"
        "print(sorted({'rq', 'django_rq', 'redis'} & set(sys.modules)))"
    )
    done = run_python(code)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_missing_django_rq_is_told_with_what_to_install() -> None:
    hide = (
        "class Hide:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *rest):\n"
        "        if name == 'django_rq':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Hide)\n"
    )
    done = run_python(CORE.format(before=hide, saga={"BACKEND": "rq"}) + "call_command('check')")
    assert done.returncode != 0
    assert "'rq' cannot be used: No module named 'django_rq'" in done.stderr
    assert "pip install 'django-saga[rq]'" in done.stderr
