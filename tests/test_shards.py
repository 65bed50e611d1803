"""Executions of one saga over several databases, each with workers and recovery of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connections
from django.test import Client, override_settings

from django_saga import InvalidDefinition, SagaFailed, recover_saga
from django_saga.models import SagaExecution
from django_saga.recovery import sweep
from django_saga.storage import DjangoSagaStorage
from tests.faults.driving import expire, work
from tests.sagas import Journey, Stroll, Travel

SHARDS = ("default", "sqlite")

pytestmark = pytest.mark.usefixtures("committing_databases")


class Default:
    """The router of the processes of one shard: all that is there is in their database."""

    alias = "default"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.alias

    db_for_write = db_for_read


class Sqlite(Default):
    alias = "sqlite"


ROUTERS = {router.alias: f"{__name__}.{router.__qualname__}" for router in (Default, Sqlite)}


def shard_of(saga_id: UUID) -> str:
    return SHARDS[saga_id.int % len(SHARDS)]


@pytest.fixture
def queues() -> dict[str, str]:
    return {shard: f"shard-{shard}-{uuid4()}" for shard in SHARDS}


@contextmanager
def process_of(shard: str, queues: dict[str, str]) -> Iterator[None]:
    """The settings of a worker, a recovery or an admin of that shard."""
    url = settings.RQ_QUEUES["default"]["URL"]
    ours = {"BACKEND": "rq", "QUEUE": queues[shard]}
    with override_settings(
        DJANGO_SAGA={**settings.DJANGO_SAGA, **ours},
        RQ_QUEUES={queue: {"URL": url} for queue in queues.values()},
        DATABASE_ROUTERS=[ROUTERS[shard]],
    ):
        yield


def test_sagas_of_one_class_are_spread_over_databases_by_their_ids(
    tmp_path: Path, queues: dict[str, str]
) -> None:
    journey, ids = Journey(str(tmp_path / "ledger")), [uuid4() for _ in range(12)]
    with process_of(SHARDS[0], queues):  # any process may start them
        for saga_id in ids:
            shard = shard_of(saga_id)
            saga = Stroll(storage=DjangoSagaStorage(shard), queue=queues[shard])
            saga.enqueue(journey, saga_id=saga_id)
    for shard in SHARDS:
        mine = {saga_id for saga_id in ids if shard_of(saga_id) == shard}
        with process_of(shard, queues):
            assert len(list(sweep())) == 0, "they wait in the queue, and are left alone there"
            work(queues[shard])
        rows = SagaExecution.objects.using(shard).filter(pk__in=ids)
        assert {row.pk for row in rows} == mine
        assert {row.status for row in rows} == {"COMPLETED"}


def test_recovery_of_a_shard_finds_what_its_queue_has_lost(
    tmp_path: Path, queues: dict[str, str]
) -> None:
    journey, saga_id = Journey(str(tmp_path / "ledger")), uuid4()
    with process_of("default", queues):
        saga = Stroll(storage=DjangoSagaStorage("sqlite"), queue="a queue that is no more")
        saga.enqueue(journey, saga_id=saga_id)
        expire(saga_id, "sqlite")
        assert saga_id not in {recovered.saga_id for recovered in sweep(inline=True)}
    with process_of("sqlite", queues):
        assert saga_id in {recovered.saga_id for recovered in sweep(inline=True)}
        assert recover_saga(saga_id).status == "COMPLETED"


class Replica:
    """The router of a process that shows sagas from a replica."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "replica" if model._meta.app_label == "django_saga" else "default"

    db_for_write = db_for_read


@pytest.fixture
def replica() -> Iterator[None]:
    """Another way to the database of the tests, which takes nothing."""
    default = connections.settings["default"]
    options = {**default["OPTIONS"], "options": "-c default_transaction_read_only=on"}
    connections.settings["replica"] = {**default, "OPTIONS": options}
    yield
    connections["replica"].close()
    del connections["replica"], connections.settings["replica"]


def test_the_admin_can_be_read_from_a_replica(replica: None, tmp_path: Path) -> None:
    with pytest.raises(SagaFailed) as failed:
        Travel().run(Journey(str(tmp_path / "ledger"), full=True))
    execution, admin = failed.value.execution, Client()
    group, shown = execution.failure_group, f"sagaexecution/{execution.pk}/change/"
    name = f"operator-{uuid4()}"
    admin.force_login(get_user_model().objects.create_superuser(name))
    pages = ["", "sagaexecution/?status=all", shown, "sagafailuregroup/", "sagabatch/"]
    retry = f"/admin/django_saga/sagaexecution/{execution.pk}/retry/"
    with override_settings(DATABASE_ROUTERS=[f"{__name__}.{Replica.__qualname__}"]):
        for page in [*pages, f"sagafailuregroup/{group}/change/"]:
            assert admin.get(f"/admin/django_saga/{page}").status_code == 200, page
        form = admin.get(retry).content.decode()
        (token,) = re.findall(r'name="token" value="([^"]*)"', form)
        answer = admin.post(retry, {"token": token, "reason": "why not"}, follow=True)
    assert "takes no changes" in answer.content.decode()
    assert not SagaExecution.objects.filter(retry_of=execution.pk).exists()


@pytest.mark.parametrize("queue", ["", 7])
def test_a_queue_is_a_name(queue: Any) -> None:
    with pytest.raises(InvalidDefinition, match="queue must be a name"):
        Stroll(queue=queue)
