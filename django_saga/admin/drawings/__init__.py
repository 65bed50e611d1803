"""Drawings for the screens, as SVG: pure functions from plain data.

They carry no style and no script: ``drawings.css`` gives the colours, in both themes. Each says in
words what it shows, and marks each state by a sign and a word besides its colour.
"""

from __future__ import annotations

from django_saga.admin.drawings.lanes import Attempt, lanes_svg
from django_saga.admin.drawings.marks import Mark
from django_saga.admin.drawings.plan import PlanStep, plan_svg
from django_saga.admin.drawings.sparkline import sparkline

__all__ = ["Attempt", "Mark", "PlanStep", "lanes_svg", "plan_svg", "sparkline"]
