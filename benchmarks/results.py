"""What a run found, as it is kept in a file."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.rounds import Measured

PACKAGES = ("django", "psycopg", "msgspec", "redis", "rq", "django-rq")


@dataclass
class Results:
    """All figures of one run, and what it ran on; no names of hosts or people."""

    rounds: int
    seconds: float
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    servers: dict[str, str]
    cases: list[Measured] = field(default_factory=list)
    memory: dict[str, int] | None = None
    imports: dict[str, float] | None = None

    def find(self, who: str, what: str) -> Measured | None:
        found = (case for case in self.cases if (case.who, case.what) == (who, what))
        return next(found, None)

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        found = json.loads(path.read_text())
        cases = [Measured(**case) for case in found.pop("cases")]
        return cls(**found, cases=cases)


def begin(rounds: int, seconds: float, servers: dict[str, str]) -> Results:
    """Results without figures, of this machine and this day."""
    versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    return Results(rounds, seconds, f"{datetime.now(UTC):%Y-%m-%d}", _machine(), versions, servers)


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
