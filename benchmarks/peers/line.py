"""The line protocol of a peer's process: a question and an answer are each a line of JSON.

It begins with a line of its versions. Then it is asked ``{"case": "success", "at_once": 8,
"seconds": 2.0}`` and answers ``{"count": 812, "seconds": 2.01, "cpu": 1.2}``, until its input ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TextIO

from benchmarks.pace import Pace

Measure = Callable[[int, float], Pace]


def serve(packages: list[str], cases: Mapping[str, Measure]) -> None:
    """Answer until there is nothing more to read."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever the library prints must not look like an answer
    _say(answers, {package: version(package) for package in packages})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(answers, asdict(cases[asked["case"]](asked["at_once"], asked["seconds"])))


def database_url(scheme: str) -> str:
    """The database as SQLAlchemy wants it."""
    return scheme + os.environ["DATABASE_URL"].removeprefix("postgres").removeprefix("ql")


def _say(answers: TextIO, what: object) -> None:
    print(json.dumps(what), file=answers, flush=True)
