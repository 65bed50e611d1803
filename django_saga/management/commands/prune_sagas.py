"""Removes what ended long ago: first its contexts, later all of it. From cron, once a day."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from django_saga import registry
from django_saga.console.arguments import _rate, _text
from django_saga.console.asking import USAGE, asked
from django_saga.exceptions import SagaError
from django_saga.pruning import ENDED, RATE, Pruned, Retention, Stage, known_sagas, prunable, prune
from django_saga.stopping import told_to_stop
from django_saga.texts import told

DONE = {Stage.DELETE: "deleted", Stage.BLANK: "blanked"}
MOST_DAYS = 36_500


class Command(BaseCommand):
    help = (
        "Blank, and later delete, executions that ended long ago. Leaves alone what is active, "
        "stuck and not settled, or failed and not dealt with, and what was retried by an execution "
        "that is still there. Safe to stop at any time, and to run again. Exit status: 0 done, or "
        "stopped by SIGTERM or SIGINT between two transactions; 1 it failed; 2 wrong usage."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--blank-after",
            type=_days,
            metavar="DAYS",
            help="remove contexts, their changes and what errors said, DAYS after the end",
        )
        parser.add_argument(
            "--delete-after",
            type=_days,
            metavar="DAYS",
            help="delete executions and their history, DAYS after the end",
        )
        parser.add_argument(
            "--saga",
            action="append",
            type=_text,
            metavar="NAME",
            default=[],
            help="only executions of this saga; can be given again",
        )
        parser.add_argument(
            "--status",
            action="append",
            type=_status,
            metavar="STATUS",
            help=f"only those with this status, one of {', '.join(ENDED)}; can be given again",
        )
        parser.add_argument(
            "--unsettled",
            action="store_true",
            help="failed ones that nobody has dealt with, too",
        )
        parser.add_argument(
            "--rate",
            type=_rate,
            metavar="N",
            default=RATE,
            help="executions per second at most; 0: no limit; default: %(default)g",
        )
        parser.add_argument("--reason", default="", help="why, for the audit table")
        parser.add_argument(
            "--dry-run", action="store_true", help="count what would be done, touch nothing"
        )
        parser.add_argument("--json", action="store_true", help="one JSON document on stdout")

    def handle(self, **options: Any) -> None:
        try:
            rule = _rule(options)
            _refuse_unknown(rule)
        except SagaError as error:
            raise CommandError(str(error), returncode=USAGE) from error
        found: Counter[tuple[str, str, str]] = Counter()
        try:
            with told_to_stop() as stop:
                by_whom, rate = asked(options), options["rate"]
                work = prune(rule, rate=rate, stopped=lambda: not stop.empty(), **by_whom)
                with closing(prunable(rule) if options["dry_run"] else work) as parts:
                    self._count(parts, found, loud=options["verbosity"] > 1)
        except (SagaError, DatabaseError) as error:
            raise CommandError(f"{told(error)} {_summary(found, False)}") from error
        self._tell(found, options)

    def _count(
        self,
        parts: Generator[Pruned, None, None],
        found: Counter[tuple[str, str, str]],
        *,
        loud: bool,
    ) -> None:
        for pruned in parts:
            for status, number in pruned.statuses.items():
                found[DONE[pruned.stage], pruned.saga, status] += number
            if loud:
                self.stderr.write(_summary(found, False), style_func=str)

    def _tell(self, found: Counter[tuple[str, str, str]], options: dict[str, Any]) -> None:
        dry, rows = options["dry_run"], sorted(found.items())
        if options["json"]:
            keys = ("done", "saga", "status", "number")
            counts = [dict(zip(keys, (*key, number), strict=True)) for key, number in rows]
            self.stdout.write(json.dumps({"dry_run": dry, "counts": counts}))
            return
        for (done, saga, status), number in rows:
            self.stdout.write(f"{saga}  {status}: {number} {'to be ' * dry}{done}")
        if options["verbosity"] > 0:
            self.stdout.write(_summary(found, dry))


def _rule(options: dict[str, Any]) -> Retention:
    return Retention(
        blank_after=options["blank_after"],
        delete_after=options["delete_after"],
        sagas=tuple(dict.fromkeys(options["saga"])),
        statuses=tuple(dict.fromkeys(options["status"] or ENDED)),
        unsettled=options["unsettled"],
    )


def _refuse_unknown(rule: Retention) -> None:
    """What is misspelt must not read as if there were nothing to do."""
    unknown = set(rule.sagas) - {saga.name for saga in registry.all_sagas()}
    if lost := sorted(unknown - known_sagas(unknown)):
        raise SagaError(
            f"No saga is named {', '.join(lost)}, and no ended execution has that name."
        )


def _summary(found: Counter[tuple[str, str, str]], dry: bool) -> str:
    total: Counter[str] = Counter()
    for (done, _saga, _status), number in found.items():
        total[done] += number
    said = ", ".join(f"{total[done]} {'to be ' * dry}{done}" for done in DONE.values())
    return f"Executions: {said}.{' Nothing was touched.' * dry}"


def _days(text: str) -> timedelta:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= MOST_DAYS:
        raise ArgumentTypeError(f"must be days, more than 0 and up to {MOST_DAYS}, not {text!r}")
    return timedelta(days=days)


def _status(text: str) -> str:
    if text.upper() not in ENDED:
        raise ArgumentTypeError(f"must be one of {', '.join(ENDED)}, not {text!r}")
    return text.upper()
