#!/usr/bin/env python
"""Start the demo, the tests or a tool of this project, with nothing but Python and pip.

    python run.py demo                  sagas that complete, fail, and are killed and recovered
    python run.py tests [ARGUMENT ...]  the tests; the arguments are pytest's
    python run.py bench [ARGUMENT ...]  the benchmarks, beside bare loops and other libraries
    python run.py python ARGUMENT ...   the environment's Python, with all tools (-m mypy, ...)

The first start makes .venv beside this file and installs what the command needs.
"""

# Nothing here may be newer than Python 3.6, so that an old one can still say what it lacks.
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
FOLDERS = ("testproject", "tests", "benchmarks", ".ci")
REQUIREMENTS = {name: ROOT / name / "requirements.txt" for name in FOLDERS}

DEMO = ["--editable", str(ROOT), "--requirement", str(REQUIREMENTS["testproject"])]
TESTS = [
    "--editable",
    str(ROOT) + "[breaker,postgres,rq]",
    "--requirement",
    str(REQUIREMENTS["tests"]),
]
BENCH = [*TESTS, "--requirement", str(REQUIREMENTS["benchmarks"])]
TOOLS = [*TESTS, "--requirement", str(REQUIREMENTS[".ci"])]
COMMANDS = {
    "demo": (DEMO, ["manage.py", "demo"]),
    "tests": (TESTS, ["-m", "pytest"]),
    "bench": (BENCH, ["-m", "benchmarks"]),
    "python": (TOOLS, []),
}

# All tests run in several processes, with servers of their own each: where one is named it would
# serve them all, and some tests want it for themselves.
SIDE_BY_SIDE = ["--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
SERVERS = {"DATABASE_URL", "REDIS_URL"}


def fingerprint() -> str:
    """Changes with whatever makes an installed environment unfit."""
    files = [ROOT / "pyproject.toml", *REQUIREMENTS.values()]
    parts = [sys.version, str(ROOT), *(path.read_text(encoding="utf-8") for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def prepare(command: str, requirements: "list[str]") -> None:
    ready = VENV / ("ready-" + command)
    if ready.exists() and ready.read_text() == fingerprint():
        return
    if importlib.util.find_spec("pip") is None:
        sys.exit("This Python has no pip. Install it (python -m ensurepip) and start again.")
    print("Installing what '" + command + "' needs into " + str(VENV) + " ...", flush=True)
    make_environment()
    install = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet"]
    if subprocess.call([*install, "--disable-pip-version-check", *requirements], cwd=str(ROOT)):
        sys.exit("The installation failed, see above; the same command starts it again.")
    ready.write_text(fingerprint())


def make_environment() -> None:
    config = VENV / "pyvenv.cfg"
    fits = config.exists() and "version = " + platform.python_version() in config.read_text()
    if VENV.exists() and not fits and not list(VENV.glob("ready-*")):
        sys.exit(str(VENV) + " was not made by this command with this Python; move it away.")
    # pip works on it from outside: some systems have no ensurepip to put it inside.
    venv.EnvBuilder(clear=not fits, symlinks=os.name != "nt").create(str(VENV))


def main(arguments: "list[str]") -> None:
    if not arguments or arguments[0] not in COMMANDS:
        sys.exit(__doc__)
    if sys.version_info < (3, 11):
        sys.exit("django-saga needs Python 3.11 or newer; this is " + platform.python_version())
    requirements, start = COMMANDS[arguments[0]]
    prepare(arguments[0], requirements)
    os.chdir(str(ROOT))
    if arguments == ["tests"] and not SERVERS.intersection(os.environ):
        start = [*start, *SIDE_BY_SIDE]
    command = [str(PYTHON), *start, *arguments[1:]]
    if os.name == "nt":  # where exec would give the terminal back at once
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
