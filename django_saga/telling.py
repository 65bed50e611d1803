"""How an alert gets to somebody: by a signal always, by a webhook and e-mail if so set."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from django.core.mail import send_mail
from django.utils.text import Truncator

from django_saga.conf import conf
from django_saga.models import SagaAlert, SagaFailureGroup
from django_saga.signals import saga_alert

logger = logging.getLogger("django_saga.alerts")

WEBHOOK_SECONDS = 5.0


@dataclass(frozen=True)
class Alert:
    """What is to be told."""

    key: str
    """Told once."""
    kind: str
    text: str
    path: str = ""
    """The admin's page about it."""
    group: SagaFailureGroup | None = None
    execution_id: str = ""

    @property
    def url(self) -> str:
        """The page with the address of the site, as the settings have it."""
        site = str(conf.ALERTS.get("SITE") or "").rstrip("/")
        return f"{site}{self.path}" if self.path else ""


def deliver(alert: Alert) -> bool:
    """Send the signal, and whatever the settings name; False where nobody could be reached."""
    # In one line: a message of several could look like lines of others.
    line = alert.text.encode("unicode_escape").decode()
    logger.warning("%s %s", line, alert.url, extra={"kind": alert.kind})
    saga_alert.send_robust(sender=SagaAlert, alert=alert)
    ways: dict[str, Callable[..., None]] = {"WEBHOOK": _post, "EMAIL": _mail}
    chosen = [name for name in ways if conf.ALERTS.get(name)]
    reached = [name for name in chosen if _sent(ways[name], name, alert)]
    return bool(reached) or not chosen


def _sent(send: Callable[..., None], name: str, alert: Alert) -> bool:
    try:
        send(alert, conf.ALERTS[name])
    except Exception as error:  # whatever a network raises; its address may hold a secret
        logger.error("An alert could not be sent to the %s: %s", name, type(error).__name__)
        return False
    return True


def _post(alert: Alert, address: str) -> None:
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError("A webhook is an address of http or https.")
    group = alert.group
    facts = {
        "kind": alert.kind,
        "text": alert.text,
        "url": alert.url,
        "key": alert.key,
        "saga": group.saga if group else "",
        "step": group.step if group else "",
        "group": group.pk if group else "",
        "execution": alert.execution_id,
    }
    headers = {"Content-Type": "application/json"}
    request = Request(address, json.dumps(facts).encode(), headers, method="POST")
    with urlopen(request, timeout=WEBHOOK_SECONDS):
        pass


def _mail(alert: Alert, addresses: list[str]) -> None:
    subject = Truncator(" ".join(alert.text.split())).chars(120)
    body = "\n\n".join(filter(None, [alert.text, alert.url]))
    send_mail(subject, body, None, list(addresses))


def problems(given: Any) -> list[str]:
    """What is wrong with the setting ``ALERTS``, in words."""
    if not isinstance(given, dict):
        return [f"must be a dict, not {given!r}"]
    known = ("WEBHOOK", "EMAIL", "FAILURES", "SITE")
    found = [f"has an unknown key {key!r}" for key in sorted(set(given) - set(known), key=repr)]
    for key in ("WEBHOOK", "SITE"):
        if given.get(key) and not _is_address(given[key]):
            found.append(f"{key} must be an address that begins with http:// or https://")
    if given.get("EMAIL") and not _are_mailboxes(given["EMAIL"]):
        found.append("EMAIL must be a list of addresses")
    if given.get("FAILURES") and not _is_limit(given["FAILURES"]):
        found.append("FAILURES must be a pair: more than so many, in so many minutes")
    return found


def _is_address(value: Any) -> bool:
    try:
        parts = urlsplit(value) if isinstance(value, str) else None
    except ValueError:
        return False
    return parts is not None and parts.scheme in ("http", "https") and bool(parts.netloc)


def _are_mailboxes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(each, str) and "@" in each for each in value
    )


def _is_limit(value: Any) -> bool:
    match value:
        case (int(most), int() | float() as minutes) if not isinstance(most, bool):
            return most >= 0 and 0 < minutes <= 1_440
    return False
