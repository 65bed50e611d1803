"""Fills PostgreSQL with executions, to see how the screens and the statements bear it."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connection

from testproject.shop.crowd import gather


class Command(BaseCommand):
    help = "Add many executions as a busy month leaves them, with their history. PostgreSQL only."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("executions", type=int, help="how many")
        parser.add_argument("--records", type=int, default=10, help="of each; default: 10")
        parser.add_argument("--groups", type=int, default=20, help="failure groups; default: 20")

    def handle(self, **options: Any) -> None:
        if connection.vendor != "postgresql":
            raise CommandError("This takes PostgreSQL: set DATABASE_URL.")
        gather(options["executions"], records=options["records"], groups=options["groups"])
        self.stdout.write(f"{options['executions']} executions added.")
