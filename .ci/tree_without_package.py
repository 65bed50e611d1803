"""Copy the checkout, without django_saga/, to the directory in the first argument: tests that run
there can only import the installed wheel."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT = {"build", "dist", "django_saga"}

target = Path(sys.argv[1])
target.mkdir(parents=True, exist_ok=True)
for path in ROOT.iterdir():
    if path.name in LEFT or path.name.startswith("."):
        continue
    if path.is_dir():
        shutil.copytree(path, target / path.name)
    else:
        shutil.copy2(path, target)
