"""Puts one fault at a time into one function of a copy of this project, and runs tests on it.

``python -m tests.mutate MODULE TEST... [--only FUNCTION]``, with mutmut beside the tests' own
requirements: mutmut makes the faults, and this puts each in its place. Its own way to run them
gives the functions other names, and passes over those that have a decorator; the drivers' are
known by their names. Prints each fault that no test noticed. docs/mutants.rst says more.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

PARTS = ("django_saga", "testproject", "tests", "docs")
FILES = ("pyproject.toml", "manage.py", "README.rst", "LICENSE")
DECORATED = re.compile(r"^( *)@contextmanager\n(?= *def (\w+))", re.MULTILINE)
PATIENCE = 300  # seconds; a fault may make a loop endless


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """The name of each mutant's function, with the number of the mutant in it; and the module."""
    from libcst import ClassDef
    from mutmut.mutation.file_mutation import create_mutations

    source = path.read_text()
    decorators = {found[2]: found[0] for found in DECORATED.finditer(source)}
    module, mutations, *_ = create_mutations(str(path), DECORATED.sub("", source))
    names = {}
    for statement in module.body:
        names[statement] = getattr(getattr(statement, "name", None), "value", "")
        if isinstance(statement, ClassDef):
            for method in statement.body.body:
                own = getattr(getattr(method, "name", None), "value", "")
                names[method] = f"{statement.name.value}.{own}"
    counts: dict[str, int] = {}
    for mutation in mutations:
        name = names.get(mutation.contained_by_top_level_function)
        if not name:
            continue  # a value of the module's own
        counts[name] = counts.get(name, 0) + 1
        changed = module.deep_replace(mutation.original_node, mutation.mutated_node).code
        for function, decorator in decorators.items():
            changed = re.sub(rf"^(?= *def {function}\b)", decorator, changed, flags=re.MULTILINE)
        yield f"{name}__{counts[name]}", changed


def is_noticed(tests: list[str], home: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--reuse-db"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            [*command, *tests], cwd=home, env=environment, timeout=PATIENCE, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return True
    if run.returncode not in (0, 1):  # no test failed; it could not be run
        raise SystemExit(run.stdout.decode() + run.stderr.decode())
    return run.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate")
    parser.add_argument("module", type=Path)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--only", action="append", help="a function, or Class.method")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        home = Path(directory)
        for part in PARTS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(part, home / part, ignore=ignored)
        for file in FILES:
            shutil.copy(file, home)
        if is_noticed(options.tests, home):
            raise SystemExit("These tests fail without any fault.")
        source, noticed, number = options.module.read_text(), 0, 0
        for name, changed in mutants(options.module):
            if options.only and name.rsplit("__", 1)[0] not in options.only:
                continue
            (home / options.module).write_text(changed)
            number += 1
            if is_noticed(options.tests, home):
                noticed += 1
                continue
            lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="")
            print(name, *list(lines)[2:], sep="\n", flush=True)
        print(f"{noticed} of {number} noticed")


if __name__ == "__main__":
    main()
