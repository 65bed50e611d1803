"""How values are written on the screens; text from outside is always escaped."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import datetime
from typing import Any

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe
from django.utils.translation import gettext as _

from django_saga.heartbeats import Lateness
from django_saga.models import SagaExecution
from django_saga.spans import span as span

JSON_LIMIT = 100_000  # characters of a context that a page shows


def badge(kind: str, text: Any) -> SafeString:
    """A word in a colour; the colour is never the only thing that tells."""
    return format_html('<span class="saga-badge saga-{}">{}</span>', kind.lower(), text)


def status_badge(execution: SagaExecution) -> SafeString:
    """The status of an execution."""
    return badge(execution.status, execution.get_status_display())


def name(text: str) -> SafeString:
    """A name that may be broken where its words begin, so that a column can be narrow."""
    return format_html_join(mark_safe("<wbr>"), "{}", ((word,) for word in _WORDS.split(text)))


_WORDS = re.compile(r"(?<=[a-z0-9._])(?=[A-Z])")


def moment(at: datetime, text: str) -> SafeString:
    """A relative time that tells the absolute one, in UTC, when pointed at."""
    absolute = f"{at:%Y-%m-%d %H:%M:%S} UTC"
    return format_html('<time datetime="{}" title="{}">{}</time>', at.isoformat(), absolute, text)


def last_run(recovery: Lateness) -> str:
    """When ``recover_sagas`` came last, and where."""
    if recovery.at is None or recovery.age is None:
        return _("It has never run.")
    words = {"time": span(recovery.age), "driver": recovery.driver}
    return moment(recovery.at, _("It last ran %(time)s ago, on %(driver)s.") % words)


def pretty(stored: str | None) -> tuple[str, bool]:
    """A stored context for reading, as it is where it is no JSON; and whether it was cut."""
    text = stored or ""
    with suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    return text[:JSON_LIMIT], len(text) > JSON_LIMIT
