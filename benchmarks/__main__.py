"""Measure django-saga beside bare loops and other libraries, and judge it by its targets.

Rounds are interleaved and medians compared: an absolute rate swings with the machine, a ratio of
one run does not. A whole run rewrites docs/benchmarks.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import page, results, servers

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
MANY = 100_000  # sagas over which the memory is watched
STARTS = 9  # of fresh interpreters that import it
# What a quick run measures: none that needs a peer, or workers.
QUICK = ("django-saga: success", "replay: success", "django-saga: memory", ": SQLite")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python run.py bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case in each round")
    parser.add_argument(
        "--cases", nargs="+", metavar="TEXT", help="only those with it in their name"
    )
    parser.add_argument("--sagas", type=int, default=MANY, help="over which memory is watched")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how fast")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--redraw", action="store_true", help="docs/benchmarks from its JSON")
    parser.add_argument("--save", type=Path, help="the figures as JSON, of a partial run too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.redraw:
        page.write(results.Results.load(DOCS / "results.json"), DOCS)
        return
    wanted = options.cases
    if options.quick:
        options.rounds, options.seconds, options.sagas = 1, 0.1, 500
        wanted = wanted or QUICK
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which also stops the servers
    with ExitStack() as stack:
        figures = run(options, wanted, servers.start(stack), stack)
    if figures is None:
        return
    print(page.text(figures))
    if options.save:
        figures.save(options.save)
    if wanted is None:
        figures.save(DOCS / "results.json")
        page.write(figures, DOCS)
        print(f"Written to {DOCS}; python -m sphinx docs docs/_build makes the pages.")


def run(
    options: argparse.Namespace,
    wanted: Sequence[str] | None,
    found: servers.Servers,
    stack: ExitStack,
) -> results.Results | None:
    """Measure what is wanted; None where it is only to be listed."""
    import django

    django.setup()
    from benchmarks import footprint, rounds
    from benchmarks.cases import Benchmarks

    benchmarks = Benchmarks(stack, found.home)
    cases = [case for case in benchmarks.all() if wanted is None or has_any(case.name, wanted)]
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return None
    migrate()
    watch = servers.Watch(found.log)
    stack.callback(watch.close)
    figures = results.begin(options.rounds, options.seconds, found.about)
    figures.cases = rounds.measure(
        cases, watch, rounds=options.rounds, seconds=options.seconds, tell=tell
    )
    for child in benchmarks.children.values():
        figures.versions |= child.versions
    if not options.cases:
        tell(f"memory over {options.sagas} sagas")
        figures.memory = footprint.memory(options.sagas, found.home)
        tell("imports")
        figures.imports = footprint.import_times(1 if options.quick else STARTS)
    tell("")
    return figures


def has_any(name: str, texts: Sequence[str]) -> bool:
    return any(text.lower() in name.lower() for text in texts)


def migrate() -> None:
    from django.core.management import call_command

    from benchmarks import bare

    for alias in ("default", "sqlite"):
        call_command("migrate", database=alias, verbosity=0)
    with bare.postgresql() as session:
        session.execute(bare.TABLES)


def tell(what: str) -> None:
    """Where it is, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
