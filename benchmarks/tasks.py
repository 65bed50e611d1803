"""The job that bare RQ is measured with: the commits of a saga's job, without the saga."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from benchmarks.bare import postgresql
from benchmarks.statements import Commit, replay

COMMITS = "SAGA_BENCHMARKS_COMMITS"  # the variable that names the file with them


def bare(id: str) -> None:
    """Commit what a saga's job would, of the execution with this id."""
    replay(_connection(os.getpid()), _commits(), UUID(id))


@cache
def _connection(pid: int) -> psycopg.Connection[Any]:
    """One for each process: a fork must not share its parent's."""
    return postgresql()


@cache
def _commits() -> Sequence[Commit]:
    commits: Sequence[Commit] = pickle.loads(Path(os.environ[COMMITS]).read_bytes())
    return commits
