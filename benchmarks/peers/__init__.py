"""The same saga in other libraries, each a process in an environment of its own."""

from __future__ import annotations
