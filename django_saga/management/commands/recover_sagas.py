"""Drives on what lost its driver, has waited, or never began; from cron, or as a service."""

from __future__ import annotations

import json
import logging
import queue
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, close_old_connections
from django.db.models import Count, Max

from django_saga import batches, registry
from django_saga.alerts import attended
from django_saga.backends import get_backend
from django_saga.conf import conf
from django_saga.exceptions import SagaError, StorageUnavailable
from django_saga.machine import ACTIVE, Status
from django_saga.models import SagaExecution
from django_saga.recovery import Recovered, sweep
from django_saga.saga import default_storage
from django_saga.stopping import Stop, told_to_stop
from django_saga.storage.base import Claim
from django_saga.texts import told
from django_saga.verdicts import DatabaseNow

logger = logging.getLogger("django_saga.recovery")

USAGE = 2  # the exit status of a command that was given wrongly
BATCH_SECONDS = 30.0  # that one call works on batches; less than what cron leaves between two


class Command(BaseCommand):
    help = (
        "Drive on the sagas whose driver was lost, whose wait is over, or that were never begun. "
        "Safe to run many times at once. Exit status: 0 all is well, also when nothing was due; "
        "1 an execution is stuck or could not be driven; 2 wrong usage."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--limit",
            type=_whole_number,
            metavar="N",
            help="take at most N executions in a sweep, the oldest that are due; default: all",
        )
        parser.add_argument("--saga", metavar="NAME", help="only executions of this saga")
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--inline", action="store_true", help="drive them in this process")
        where.add_argument(
            "--enqueue",
            action="store_true",
            help="hand them over to the backend's workers; the default where it has any",
        )
        how = parser.add_mutually_exclusive_group()
        how.add_argument(
            "--watch",
            type=_seconds,
            metavar="SECONDS",
            help="sweep every SECONDS; SIGTERM or SIGINT ends it after the execution in hand",
        )
        how.add_argument("--dry-run", action="store_true", help="list what is due, touch nothing")
        parser.add_argument(
            "--json",
            action="store_true",
            help="write one JSON document, and nothing else, to stdout; with --watch one per sweep",
        )

    def handle(self, **options: Any) -> None:
        self.options = options
        try:
            self._check()
            if options["dry_run"]:
                self._list_due()
            elif options["watch"]:
                self._watch(options["watch"])
            else:
                self._sweep_once()
        except SagaError as error:
            raise CommandError(str(error)) from error

    def _check(self) -> None:
        name = self.options["saga"]
        known = sorted(saga.name for saga in registry.all_sagas())
        if name is not None and name not in known:
            names = ", ".join(known) or "none is defined"
            raise CommandError(f"No saga is named {name!r}. Known: {names}.", returncode=USAGE)
        if self.options["enqueue"] and not get_backend().queues:
            raise CommandError(
                f"--enqueue needs workers, but the backend {conf.BACKEND!r} drives sagas in the "
                "process that starts them. Set DJANGO_SAGA['BACKEND'], to 'rq' for example, or "
                "leave --enqueue out.",
                returncode=USAGE,
            )

    def _list_due(self) -> None:
        limit = self.options["limit"] or sys.maxsize
        due = default_storage().due(limit, saga=self.options["saga"])
        if self.options["json"]:
            self._print(json.dumps({"due": [_described(claim) for claim in due]}))
            return
        for claim in due:
            self._print(
                "{saga} {id}  {status}, {action} of {step}: {why}".format(**_described(claim))
            )
        self._print(f"{_executions(len(due))} due; nothing was touched.", verbosity=1)

    def _sweep_once(self) -> None:
        with told_to_stop() as stop:
            tally = self._sweep(stop)
            self._work(tally, stop, BATCH_SECONDS)
        self._print_summary(tally)
        if tally.faults:
            raise CommandError("\n".join(tally.faults))
        if not (tally.recovered or tally.items or self.options["json"]):
            self._tell_of_leases()

    def _tell_of_leases(self) -> None:
        """Who has just killed a driver looks here, and nothing is due before its lease is over."""
        rows = SagaExecution.objects.using(default_storage().alias)
        if self.options["saga"]:
            rows = rows.filter(saga=self.options["saga"])
        leased = rows.filter(status__in=ACTIVE, lease_until__gt=DatabaseNow())
        found = leased.aggregate(count=Count("pk"), last=Max("lease_until"), now=Max(DatabaseNow()))
        if found["count"]:
            seconds = (found["last"] - found["now"]).total_seconds()
            self._print(
                f"{_executions(found['count'])} under a lease: driven now, or due once that is "
                f"over, in {seconds:.0f} s at the latest.",
                verbosity=1,
            )

    def _watch(self, seconds: float) -> None:
        with told_to_stop() as stop:
            while True:
                close_old_connections()
                tally = self._sweep(stop)
                began = time.monotonic()
                self._work(tally, stop, seconds)  # in the time until the next sweep
                if tally.recovered or tally.items or tally.error or self.options["json"]:
                    self._print_summary(tally)
                for fault in tally.faults:
                    self.stderr.write(fault)
                try:
                    stop.get(timeout=max(0.0, seconds - (time.monotonic() - began)))
                except queue.Empty:
                    continue
                return

    def _sweep(self, stop: Stop) -> Tally:
        tally = Tally()
        found = sweep(
            limit=self.options["limit"],
            saga=self.options["saga"],
            inline=True if self.options["inline"] else False if self.options["enqueue"] else None,
        )
        around = attended(whole=self.options["saga"] is None, every=self.options["watch"])
        with around, closing(found), self._quiet_handlers(), self._progress(tally) as show:
            try:
                for recovered in found:
                    tally.recovered.append(recovered)
                    show()
                    if not stop.empty():
                        break
            except StorageUnavailable as error:
                tally.error = told(error)
                logger.error("The sweep was broken off: %s", tally.error)
        return tally

    def _work(self, tally: Tally, stop: Stop, seconds: float) -> None:
        """Drive running batches on; one of a single saga is not asked for."""
        if self.options["saga"] or tally.error:
            return
        with self._quiet_handlers():
            try:
                tally.items = batches.work(seconds=seconds, stopped=lambda: not stop.empty())
            except (SagaError, DatabaseError) as error:
                logger.error("The work on batches was broken off: %s", error)
                tally.error = str(error)

    def _quiet_handlers(self) -> AbstractContextManager[Any]:
        """A handler that prints must not get its words into the JSON."""
        return redirect_stdout(sys.stderr) if self.options["json"] else nullcontext()

    @contextmanager
    def _progress(self, tally: Tally) -> Iterator[Any]:
        """Keep one line about the sweep up to date, on a terminal only."""
        if not self.stderr.isatty():
            yield lambda: None
            return

        def show(line: str = "") -> None:
            self.stderr.write(f"\r\x1b[K{line}", style_func=str, ending="")
            self.stderr.flush()

        try:
            yield lambda: show(tally.summary)
        finally:
            show()

    def _print_summary(self, tally: Tally) -> None:
        if self.options["json"]:
            self._print(json.dumps(tally.document()))
        else:
            self._print(tally.summary, verbosity=1)

    def _print(self, text: str, verbosity: int = 0) -> None:
        if self.options["verbosity"] >= verbosity:
            self.stdout.write(text)
            self.stdout.flush()


@dataclass
class Tally:
    """What became of the executions of one sweep."""

    recovered: list[Recovered] = field(default_factory=list)
    error: str = ""
    """Why the sweep was broken off."""
    items: Counter[str] = field(default_factory=Counter)
    """How many items of batches were done, or skipped."""

    @property
    def summary(self) -> str:
        """One line for people."""
        lines = []
        if self.recovered:
            parts = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
            lines.append(f"{_executions(len(self.recovered))}: {parts}.")
        if self.items:
            parts = ", ".join(f"{count} {state}" for state, count in self.items.items())
            lines.append(f"Of batches: {parts}.")
        return " ".join(lines) or ("Nothing could be done." if self.error else "Nothing was due.")

    @property
    def statuses(self) -> Counter[str]:
        """How many came to stand where."""
        return Counter(str(recovered.status) for recovered in self.recovered)

    @property
    def faults(self) -> list[str]:
        """A line for each thing that a person must look at."""
        lines = [_fault(recovered) for recovered in self.recovered if recovered.error]
        return [*lines, f"The sweep was broken off. {self.error}"] if self.error else lines

    def document(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "statuses": dict(self.statuses),
            "batches": dict(self.items),
            "executions": [
                {"saga": r.saga, "id": str(r.saga_id), "status": str(r.status), "error": r.error}
                for r in self.recovered
            ],
            "error": self.error,
        }


def _fault(recovered: Recovered) -> str:
    stuck = recovered.status == Status.STUCK
    what = "is STUCK" if stuck else f"is {recovered.status} and could not be driven"
    return f"Saga {recovered.saga} {recovered.saga_id} {what}: {recovered.error}"


def _described(claim: Claim) -> dict[str, Any]:
    state = claim.state
    return {
        "saga": claim.saga,
        "id": str(claim.id),
        "status": state.status.value,
        "step": state.step,
        "action": state.action.value,
        "attempt": state.attempt,
        "why": _why_due(claim),
    }


def _why_due(claim: Claim) -> str:
    execution = claim.execution
    assert execution is not None  # the Django storage reads whole rows
    if claim.state.status is Status.PENDING:
        return f"not begun since {execution.created_at:%Y-%m-%d %H:%M:%S} UTC"
    if execution.lease_until is not None:
        lapsed = f"{execution.lease_until:%Y-%m-%d %H:%M:%S}"
        return f"the lease of {execution.driver} ran out at {lapsed} UTC"
    if execution.wake_at is not None:
        return f"waited until {execution.wake_at:%Y-%m-%d %H:%M:%S} UTC"
    return f"let go by {execution.driver}"


def _executions(count: int) -> str:
    return "1 execution" if count == 1 else f"{count} executions"


def _whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number from 1 up, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86_400:
        raise ArgumentTypeError(f"must be seconds from 0.1 to 86400, not {text!r}")
    return seconds
