"""Prints a saga as a Mermaid diagram."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from django_saga import diagrams, registry
from django_saga.exceptions import UnknownSaga


class Command(BaseCommand):
    help = "Print a saga's steps, and the way back, as a Mermaid flow chart or sequence diagram."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the saga's name, such as orders.OrderSaga")
        parser.add_argument("--sequence", action="store_true", help="draw the calls in time")

    def handle(self, *args: Any, name: str, sequence: bool, **options: Any) -> None:
        try:
            saga = registry.find_saga(name)
        except UnknownSaga as error:
            known = ", ".join(sorted(saga.name for saga in registry.all_sagas()))
            raise CommandError(
                f"No saga is named {name!r}. Known: {known or 'none is defined'}.", returncode=2
            ) from error
        draw = diagrams.sequence if sequence else diagrams.flowchart
        self.stdout.write(draw(saga.definition, saga.name), ending="")
