"""What the ``sagas`` command takes on its line."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from typing import Any
from uuid import UUID

from django_saga.models import SagaExecution
from django_saga.operations import BULK, VERBS, Verb
from django_saga.texts import storable

LISTED = 50  # rows, where nobody says how many
RATE = 5.0  # executions per second, for those that a filter chose
STATUSES = ("attention", "all", "overdue", *SagaExecution.Status.values)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(dest="subcommand", metavar="subcommand")

    def add(name: str, help: str, *, reads: bool = True) -> ArgumentParser:
        command: ArgumentParser = commands.add_parser(name, help=help, description=help)
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
        if name != "doctor":
            command.add_argument(
                "--user", type=_text, metavar="NAME", help="as this user, who must be allowed"
            )
        if not reads:
            command.add_argument("--reason", default="", help="why, for the audit table")
            dry = "say what would be done, touch nothing"
            command.add_argument("--dry-run", action="store_true", help=dry)
        return command

    _reading(add)
    for verb in VERBS.values():
        _acting(add(dashed(verb.name), str(verb.help), reads=False), verb)
    for name, help in (
        ("pause", "Let nothing more of a saga begin, or of one step of it."),
        ("resume", "End a pause."),
    ):
        command = add(name, help, reads=False)
        command.add_argument("saga", metavar="SAGA", type=_text)
        command.add_argument("step", metavar="STEP", type=_text, nargs="?", default="")


def _reading(add: Any) -> None:
    command = add("list", "List executions, newest first; by default what needs attention.")
    _filters(command)
    _limit(command, "at most N; default: %(default)s", default=LISTED)
    command = add("show", "Tell what happened to an execution, what is next, and what stands.")
    command.add_argument("id", metavar="ID", type=_id)
    shown = "show its context, masked; that is audited"
    command.add_argument("--context", action="store_true", help=shown)
    command = add("groups", "List the causes of failures that nobody has dealt with yet.")
    _limit(command, "at most N, those seen last first; default: %(default)s", default=LISTED)
    add("pauses", "List what is paused.")
    command = add("audit", "List what operators did, newest first.")
    command.add_argument("id", metavar="ID", type=_id, nargs="?", help="of an execution or a batch")
    _limit(command, "at most N; default: %(default)s", default=LISTED)
    add("doctor", "Examine settings, database, queue and executions; exit status 1 for an error.")


def _acting(command: ArgumentParser, verb: Verb) -> None:
    if verb.takes:
        command.add_argument("id", metavar="ID", type=_id)
    else:
        command.add_argument("ids", metavar="ID", type=_id, nargs="*" if verb.bulk else "+")
    match verb.takes:
        case ("step",):
            command.add_argument("step", metavar="STEP", type=_text)
        case ("context",):
            command.add_argument("file", metavar="FILE", help="with JSON; - is standard input")
        case ("standing",):
            help = "every step whose effect stands, or may stand; none: nothing stands"
            command.add_argument("--standing", metavar="STEP", nargs="*", required=True, help=help)
        case ("confirm",):
            help = "the same id once more"
            command.add_argument("--confirm", metavar="ID", required=True, help=help)
    if verb.name in BULK:
        _filters(command)
        _limit(command, "at most N of those that the filters choose, oldest first", default=None)
        rate = "per second, of those that the filters choose; 0: no limit; default: %(default)g"
        command.add_argument("--rate", type=_rate, metavar="N", default=RATE, help=rate)


def _filters(command: ArgumentParser) -> None:
    statuses = ", ".join(STATUSES)
    command.add_argument("--status", type=_status, metavar="STATUS", help=f"one of {statuses}")
    command.add_argument("--saga", type=_text, metavar="SAGA", help="only this saga")
    command.add_argument(
        "--step", type=_text, metavar="STEP", help="only what stands at, or failed in it"
    )
    command.add_argument(
        "--group", type=_text, metavar="ID", help="only this cause, not dealt with"
    )


def _limit(command: ArgumentParser, help: str, *, default: int | None) -> None:
    command.add_argument("--limit", type=_number, metavar="N", default=default, help=help)


def dashed(name: str) -> str:
    """A verb's name on the command line."""
    return name.replace("_", "-")


def _id(text: str) -> UUID:
    try:
        return UUID(text.strip())
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no id of an execution, a UUID") from None


def _text(text: str) -> str:
    """What a database can be asked for: no NUL, nothing that the shell's encoding did not hold."""
    if storable(text) != text:
        raise ArgumentTypeError(f"{text!r} is no text")
    return text


def _status(text: str) -> str:
    for status in STATUSES:
        if status.lower() == text.lower():
            return status
    raise ArgumentTypeError(f"must be one of {', '.join(STATUSES)}, not {text!r}")


def _number(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text[:10]) <= 1_000_000):
        raise ArgumentTypeError(f"must be a whole number from 1 to 1000000, not {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1_000_000:
        raise ArgumentTypeError(f"must be a number from 0 up, not {text!r}")
    return rate
