"""Battery 9: a Redis that forgets jobs, is away, or delivers them thrice, late, in any order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import cycle, islice
from uuid import UUID

import pytest
from rq.job import Job

from tests.faults.fleets import Fleet, until
from tests.faults.options import Size
from tests.faults.redis_server import RedisServer
from tests.faults.sagas import CASES

WORKERS = 3
FLUSHES = 5
CALM = 60.0  # seconds of lease where nobody is lost: whoever is slow keeps it

pytestmark = pytest.mark.usefixtures("committing_databases")


@pytest.fixture
def names(size: Size) -> list[str]:
    """The sagas to enqueue."""
    return list(islice(cycle(CASES), size("sagas", everyday=50, full_run=1_000)))


def man(fleet: Fleet, *, recoverers: int = 1) -> None:
    for _ in range(WORKERS):
        fleet.add("work")
    for _ in range(recoverers):
        fleet.add("recover")


def enqueue_and_flush(fleet: Fleet, names: list[str], redis: RedisServer) -> int:
    """How many of their jobs Redis lost; the others had found a worker by then."""
    fleet.enqueue(names)
    with redis.client.pipeline(transaction=True) as pipeline:
        lost, _ = pipeline.llen(fleet.queue.key).flushall().execute()
    return int(lost)


def test_jobs_that_redis_forgets_are_sent_again(
    fleet: Callable[..., Fleet],
    redis_server: RedisServer,
    names: list[str],
    figure: Callable[..., None],
) -> None:
    with fleet("default") as one:
        man(one)
        parts = [names[part::FLUSHES] for part in range(FLUSHES)]
        lost = sum(enqueue_and_flush(one, part, redis_server) for part in parts)
        one.heal()
        assert not one.wrongs
        assert "recover" not in one.fallen
    assert lost, "the workers were faster each time"
    figure("redis flushed", sagas=len(names), jobs_lost=lost, wrongs=0)


def test_sagas_enqueued_while_redis_is_away_are_driven_once_it_is_back(
    fleet: Callable[..., Fleet],
    redis_server: RedisServer,
    names: list[str],
    figure: Callable[..., None],
) -> None:
    with fleet("default") as one:
        man(one)
        redis_server.stop()
        one.enqueue(names)
        away = len(one.active)
        redis_server.start()
        one.heal()
        assert not one.wrongs
        assert "recover" not in one.fallen
    assert away == len(names), "somebody drove them without Redis"
    figure("redis away", sagas=away, wrongs=0)


def deliver_thrice(fleet: Fleet, names: list[str], dice: random.Random) -> None:
    """Each job twice in a row, in any order, and once more when all is over."""
    fleet.enqueue(names)
    jobs = fleet.queue.job_ids
    fleet.queue.connection.delete(fleet.queue.key)
    dice.shuffle(jobs)
    deliver(fleet, [job for job in jobs for _ in range(2)])
    man(fleet, recoverers=0)
    fleet.heal()
    dice.shuffle(jobs)
    deliver(fleet, jobs)
    until(lambda: runs(fleet, jobs) == 3 * len(jobs), "not all that was delivered ran")


def deliver(fleet: Fleet, jobs: list[str]) -> None:
    for job in jobs:
        fleet.queue.push_job_id(job)


def runs(fleet: Fleet, jobs: list[str]) -> int:
    """How often workers ran them."""
    fetched = Job.fetch_many(jobs, connection=fleet.queue.connection)
    return sum(len(job.results()) for job in fetched if job is not None)


def repeated(fleet: Fleet) -> list[UUID]:
    """The executions of which an effect was called twice, though nobody was lost."""
    return [id for id in fleet.ids if max(Counter(fleet.entries(id)).values()) > 1]


def test_jobs_delivered_thrice_late_and_reordered_drive_each_saga_once(
    fleet: Callable[..., Fleet],
    names: list[str],
    dice: random.Random,
    figure: Callable[..., None],
) -> None:
    with fleet("default", lease=CALM) as one:
        deliver_thrice(one, names, dice)
        assert not one.wrongs
        assert not repeated(one)
    figure("redis doubles", sagas=len(names), deliveries=3 * len(names), wrongs=0)


def test_canary_without_the_sweep_lost_jobs_are_seen(
    fleet: Callable[..., Fleet], redis_server: RedisServer, names: list[str]
) -> None:
    with fleet("default") as one:
        man(one, recoverers=0)
        until(lambda: enqueue_and_flush(one, names[:8], redis_server), "no job was lost")
        until(lambda: not one.driving, "the workers do not end")
        assert any("L0 is PENDING" in wrong for wrong in one.wrongs)


def test_canary_without_leases_doubled_jobs_are_seen(
    fleet: Callable[..., Fleet], names: list[str], dice: random.Random
) -> None:
    rule = "a lease keeps other drivers out"
    with fleet("default", lease=CALM, without=rule) as one:
        deliver_thrice(one, names, dice)
        assert repeated(one)
