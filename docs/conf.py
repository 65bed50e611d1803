"""Sphinx: ``python run.py python -m sphinx -W docs docs/_build``."""

from __future__ import annotations

import re
from pathlib import Path

project = "django-saga"
author = "django-saga contributors"
project_copyright = "2026, django-saga contributors"
source = Path(__file__).resolve().parent.parent / "django_saga" / "__init__.py"
release = re.findall(r'__version__ = "(.+)"', source.read_text(encoding="utf-8"))[0]

exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"django-saga {release}"
nitpicky = True
