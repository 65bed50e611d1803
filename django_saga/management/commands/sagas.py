"""The operator's console at the shell: what the admin shows and does, with the same reach."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from django.core.exceptions import PermissionDenied
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, connections

from django_saga import doctor
from django_saga.console import acting, reading
from django_saga.console.arguments import add_arguments, dashed
from django_saga.console.asking import USAGE
from django_saga.console.telling import result_line, tell
from django_saga.documents import Document
from django_saga.exceptions import SagaError
from django_saga.operations import VERBS
from django_saga.storage import DjangoSagaStorage
from django_saga.storage.translating import translated
from django_saga.texts import told

READERS = {
    "list": reading.listed,
    "show": reading.shown,
    "groups": reading.groups,
    "pauses": reading.pauses,
    "audit": reading.audit,
    "doctor": doctor.report,
}


class Command(BaseCommand):
    help = (
        "See and operate sagas. Exit status: 0 done; 1 something was refused, failed or is amiss; "
        "2 wrong usage."
    )
    requires_system_checks = []  # the doctor tells of them, too

    def add_arguments(self, parser: CommandParser) -> None:
        add_arguments(parser)

    def handle(self, *, subcommand: str | None, **options: Any) -> None:
        if subcommand is None:
            known = ", ".join([*READERS, *map(dashed, VERBS), "pause", "resume"])
            why = f"Give a subcommand: {known}. What each does: manage.py sagas --help"
            raise CommandError(why, returncode=USAGE)
        self.json = options["json"]
        # What handlers print that are driven here is no part of the document.
        quiet = redirect_stdout(sys.stderr) if self.json else nullcontext()
        try:
            with quiet, translated(connections[DjangoSagaStorage().alias]):
                document = self._answer(subcommand, options)
        except (SagaError, PermissionDenied, DatabaseError) as error:
            raise CommandError(told(error)) from error
        lines = [json.dumps(document)] if self.json else tell(subcommand, document)
        try:
            for line in lines:
                self.stdout.write(line)
            self.stdout.flush()
        except BrokenPipeError:  # its reader, such as head, has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or it is told again at the exit
            return
        if why := _amiss(document):
            raise CommandError(why)

    def _answer(self, subcommand: str, options: dict[str, Any]) -> Document:
        if subcommand in READERS:
            return READERS[subcommand](options)
        if subcommand in ("pause", "resume"):
            return acting.act_on_saga(subcommand, options)
        if "file" in options:
            options["context"] = _read(options["file"])
        return acting.act(VERBS[subcommand.replace("-", "_")], options, self._say)

    def _say(self, result: Document) -> None:
        if not self.json:
            self.stdout.write(result_line(result))
            self.stdout.flush()


def _amiss(document: Document) -> str:
    """Why the exit status is 1; empty where all is well."""
    if document.get("worst") == "error":
        return "Something is wrong."
    if document.get("result") == "refused":
        return "It was refused."
    if bad := document.get("refused", 0) + document.get("failed", 0):
        return f"{bad} refused or failed."
    return ""


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CommandError(f"{file} cannot be read: {error}", returncode=USAGE) from error
