"""Lengths of time, as people read them."""

from __future__ import annotations

from datetime import timedelta

from django.utils.translation import gettext as _


def span(time: timedelta | float | None) -> str:
    """A length of time in at most two units; numbers are seconds."""
    if time is None:
        return ""
    seconds = time.total_seconds() if isinstance(time, timedelta) else time
    if seconds < 10:
        return _("%(n)s s") % {"n": f"{max(seconds, 0):.2g}"}
    if seconds < 60:
        return _("%(n)s s") % {"n": int(seconds)}
    minutes, hours, days = (int(seconds // size) for size in (60, 3600, 86400))
    if hours < 1:
        return _("%(n)s m") % {"n": minutes}
    if days < 1:
        return _("%(h)s h %(m)s m") % {"h": hours, "m": minutes % 60}
    return _("%(d)s d %(h)s h") % {"d": days, "h": hours % 24}
