"""Keeps the large tables in partitions by month. PostgreSQL only; from cron, once a day."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from django_saga.console.asking import asked
from django_saga.exceptions import SagaError
from django_saga.management.commands.prune_sagas import _days
from django_saga.partitions import add_months, convert, drop_months
from django_saga.texts import told

MOST_MONTHS = 120


class Command(BaseCommand):
    help = (
        "Make the partitions of this month and of those to come, and drop those of old months, "
        "whose executions may all be deleted. Exit status: 0 done; 1 it failed, or an old month "
        "was left; 2 wrong usage."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--convert",
            action="store_true",
            help="make the tables partitioned first; what they hold stays in a default partition",
        )
        parser.add_argument(
            "--months",
            type=_months,
            metavar="N",
            default=3,
            help="so many months ahead; default: %(default)s",
        )
        parser.add_argument(
            "--drop-after", type=_days, metavar="DAYS", help="drop months that ended DAYS ago"
        )
        parser.add_argument("--reason", default="", help="why, for the audit table")

    def handle(self, **options: Any) -> None:
        left = []
        try:
            if options["convert"]:
                convert()
                self._say("The tables are partitioned.")
            for month in add_months(options["months"]):
                self._say(f"{month}: added.")
            if options["drop_after"] is not None:
                for dropped in drop_months(options["drop_after"], **asked(options)):
                    number = f"{dropped.executions} executions"
                    if dropped.why_not:
                        left.append(f"{dropped.month}: left, {number}: {dropped.why_not}.")
                    else:
                        self._say(f"{dropped.month}: dropped, {number}.")
        except (SagaError, DatabaseError) as error:
            raise CommandError(told(error)) from error
        if left:
            raise CommandError("\n".join(left))

    def _say(self, text: str) -> None:
        self.stdout.write(text)


def _months(text: str) -> int:
    if not (text.isdecimal() and int(text[:10]) <= MOST_MONTHS):
        raise ArgumentTypeError(f"must be a whole number up to {MOST_MONTHS}, not {text!r}")
    return int(text)
