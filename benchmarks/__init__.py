"""How fast sagas are beside what could be in their place: ``python run.py bench``."""

from __future__ import annotations
