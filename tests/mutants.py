"""For runs of mutmut alone, which load it with ``-p``: what an import made is made anew.

A mutant is chosen after the import. The SQL statements, which are built while their module is
imported, would never be a mutant's.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _statements_anew() -> None:
    from django_saga.storage import sql

    for vendor, dialect in sql.DIALECTS.items():
        sql.STATEMENTS[vendor] = sql.Statements(dialect)
