"""Is all in place that sagas need? Each examination reads a bounded number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from django.utils.translation import gettext as _

from django_saga.doctor import configuration, database, executions, partitions, queue
from django_saga.doctor.finding import LEVELS, Finding, Level
from django_saga.texts import told

__all__ = ["LEVELS", "Finding", "Level", "examine", "report"]

Examination = Callable[[], Iterator[Finding]]

# Those of the rows need the tables, so they come when the migrations are known to be applied.
_FIRST: tuple[Examination, ...] = (
    configuration.checks,
    queue.backend,
    database.transactions,
    database.prepared_statements,
)
_ROWS: tuple[Examination, ...] = (
    database.clock,
    executions.recovery,
    executions.leases,
    executions.stuck,
    executions.names,
    executions.rows,
    executions.batches,
    partitions.partitions,
)


def examine() -> list[Finding]:
    """Look at everything; what cannot be examined is itself a finding, of level ``error``."""
    found = [finding for examination in _FIRST for finding in _examined(examination)]
    migrations = _examined(database.migrations)
    found += migrations
    if all(finding.level == "ok" for finding in migrations):
        found += [finding for examination in _ROWS for finding in _examined(examination)]
    return found


def report(options: Any = None) -> dict[str, Any]:
    """The findings as a document, with the worst level among them."""
    findings = examine()
    return {
        "findings": [
            {"name": f.name, "level": f.level, "what": f.what, "todo": f.todo} for f in findings
        ],
        "worst": max((f.level for f in findings), key=LEVELS.index, default="ok"),
    }


def _examined(examination: Examination) -> list[Finding]:
    try:
        return list(examination())
    except Exception as error:
        what = _("It could not be examined: %(type)s: %(error)s") % {
            "type": type(error).__name__,
            "error": told(error),
        }
        return [Finding(examination.__name__, "error", what, _("Mend that first."))]
