"""What one PostgreSQL gives, measured here, and a model of it for machines that are not here.

``python run.py python -m benchmarks.capacity`` measures the smallest loop with 1 to 32 clients,
each a process of its own, fits nothing, and sets the model's figures beside them. The model knows
three numbers, all measured: the processor time of a saga, of server and client, the time of one
commit's flush with nobody else there, and how many of a saga's commits there are. It knows two
rules: a core does one thing at a time; and one flush goes on at a time, which makes all of those
commits durable that were there when it began (group commit), while later ones wait for the next.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import os
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import django

CLIENTS = (1, 2, 4, 8, 16, 32)
SIMULATED = 20_000  # commits
COMMITS = 4  # of a saga of three steps
AT_ONCE = (1, 8, 32, 128, 512)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "capacity.inc"
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """A saga, as the model sees it; times in seconds."""

    commits: int
    processor: float
    """Of all its commits together, server and client."""


@dataclass(frozen=True)
class Machine:
    """Where it runs, as the model sees it."""

    cores: int
    flush: float
    """Seconds."""


def sagas_per_second(load: Load, machine: Machine, clients: int) -> float:
    """What the model says, by simulating so many clients that never pause."""
    burst = load.processor / load.commits
    clock, done, free = 0.0, 0, machine.cores
    ready, waiting = deque(range(clients)), list[int]()
    events: list[tuple[float, str, list[int]]] = []
    flushing = False
    while done < SIMULATED:
        while free and ready:
            free -= 1
            heapq.heappush(events, (clock + burst, "computed", [ready.popleft()]))
        if waiting and not flushing:
            flushing = True
            heapq.heappush(events, (clock + machine.flush, "flushed", waiting))
            waiting = []
        clock, what, whose = heapq.heappop(events)
        if what == "computed":
            free += 1
            waiting += whose
        else:
            flushing = False
            done += len(whose)
            ready += whose
    return done / clock / load.commits


# Measuring


def _client(conninfo: str, ready: Connection, until: Synchronized[float]) -> None:
    import psycopg

    django.setup()
    from benchmarks.bare import SUCCESS, smallest

    with psycopg.connect(conninfo, autocommit=True) as session:
        saga = smallest(session, SUCCESS)
        for _ in range(20):
            saga()
        ready.send(0)
        ready.recv()
        sagas, began = 0, time.process_time()
        while time.monotonic() < until.value:
            saga()
            sagas += 1
        ready.send((sagas, time.process_time() - began))
        ready.recv()  # its session's processor time is read while it is there


def measure(conninfo: str, clients: int, seconds: float) -> tuple[float, float]:
    """Sagas per second, and seconds of processor time, of server and clients, for each."""
    context = multiprocessing.get_context("spawn")
    until = context.Value("d", 0.0)
    pipes = [context.Pipe() for _ in range(clients)]
    processes = [
        context.Process(target=_client, args=(conninfo, theirs, until)) for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    ours = [mine for mine, _ in pipes]
    for pipe in ours:
        pipe.recv()
    before = _server_seconds(conninfo)
    until.value = time.monotonic() + seconds
    for pipe in ours:
        pipe.send("go")
    counts = [pipe.recv() for pipe in ours]
    server = _server_seconds(conninfo) - before
    for pipe, process in zip(ours, processes, strict=True):
        pipe.send("end")
        process.join()
    sagas = sum(count for count, _ in counts)
    return sagas / seconds, (server + sum(cpu for _, cpu in counts)) / sagas


def _server_seconds(conninfo: str) -> float:
    """Processor time of the server's processes so far; of Linux, where it is on this machine."""
    import psycopg

    with psycopg.connect(conninfo) as session:
        rows = session.execute("SELECT pid FROM pg_stat_activity WHERE pid IS NOT NULL")
        return sum(_process_seconds(pid) for (pid,) in rows.fetchall())


def _process_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def flush_seconds(conninfo: str, commits: int = 500) -> float:
    """What a commit takes beyond the same statement whose commit does not wait for the disk."""
    import psycopg

    with psycopg.connect(conninfo, autocommit=True) as session:
        times = {}
        for mode in ("on", "off", "on", "off"):
            session.execute(f"SET synchronous_commit = {mode}")
            began = time.perf_counter()
            for _ in range(commits):
                session.execute("SELECT pg_logical_emit_message(true, 'flush', 'x')")
            times[mode] = (time.perf_counter() - began) / commits
    return times["on"] - times["off"]


@contextmanager
def server() -> Iterator[tuple[str, dict[str, str]]]:
    """The connection string of a database with the smallest loop's tables, and what it is."""
    from benchmarks import servers

    with ExitStack() as stack:
        about = servers.start(stack).about
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
        django.setup()
        from benchmarks import bare

        conninfo = bare.conninfo()
        with bare.postgresql() as session:
            session.execute(bare.TABLES)
        yield conninfo, about


def page(measured: dict[int, tuple[float, float]], flush: float, about: dict[str, str]) -> str:
    """What the docs show: what was measured, the model beside it, and the model elsewhere."""
    load = Load(COMMITS, min(cpu for _, cpu in measured.values()))
    here = Machine(os.cpu_count() or 1, flush)
    lines = [
        f"Measured with PostgreSQL {about['postgresql']}, {here.cores} cores, Python "
        f"{platform.python_version()}, on {date.today():%Y-%m-%d}, by ``python -m "
        f"benchmarks.capacity``: a bare loop of {load.commits} commits a saga, clients and server "
        f"on the same machine. One flush takes {flush * 1e3:.2f} ms, and a saga "
        f"{load.processor * 1e3:.2f} ms of processor time, of client and server together.",
        "",
        *_table(
            ("clients", "sagas/s", "commits/s", "sagas/s of the model", "model / measured"),
            [
                (n, _whole(rate), _whole(rate * load.commits), _whole(model), f"{model / rate:.2f}")
                for n, (rate, _) in measured.items()
                for model in (sagas_per_second(load, here, n),)
            ],
        ),
        "",
        "The model knows these two times and two rules: a core does one thing at a time; one flush "
        "goes on at a time, and makes all durable that waited when it began. It knows nothing of "
        "locks, checkpoints, the network, or cores that get in each other's way. What it "
        "says of other machines, with cores as fast as these, in sagas per second:",
        "",
        *_table(
            ("cores", "a flush takes", *(f"{n} at once" for n in AT_ONCE)),
            [
                (
                    cores,
                    f"{flush_ms} ms",
                    *(
                        _whole(sagas_per_second(load, Machine(cores, flush_ms / 1e3), n))
                        for n in AT_ONCE
                    ),
                )
                for cores in (2, 8, 32)
                for flush_ms in (0.05, 0.5, 2.0)
            ],
        ),
    ]
    return "\n".join(lines) + "\n"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for first, *rest in (head, *rows):
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in rest)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each number of clients")
    options = parser.parse_args()
    with server() as (conninfo, about):
        measured = {n: measure(conninfo, n, options.seconds) for n in CLIENTS}
        text = page(measured, flush_seconds(conninfo), about)
    DOCS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
