"""Settings and definitions: what the system checks say of them."""

from __future__ import annotations

from collections.abc import Iterator

from django.core.checks import ERROR
from django.utils.translation import gettext as _

from django_saga.checks import check_sagas, check_settings
from django_saga.doctor.finding import Finding


def checks() -> Iterator[Finding]:
    """The system checks of settings and sagas, which a server may have been started without."""
    messages = check_settings()
    messages += check_sagas() if not messages else []
    messages = [message for message in messages if not message.is_silenced()]
    for message in messages:
        level = "error" if message.level >= ERROR else "warning"
        yield Finding("checks", level, f"{message.msg} ({message.id})", message.hint or "")  # type: ignore[arg-type]
    if not messages:
        yield Finding(
            "checks", "ok", _("The settings can be used, and the sagas are well defined.")
        )
