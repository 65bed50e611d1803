"""The ways out of an execution's page: to its traces, its logs, or whatever ``LINKS`` names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from django_saga.conf import conf
from django_saga.models import SagaExecution

PLACES = ("id", "saga", "step", "driver")


def links_of(execution: SagaExecution) -> list[tuple[str, str]]:
    """Label and address of each link, with the execution's own values, quoted."""
    values = {
        "id": str(execution.pk),
        "saga": execution.saga,
        "step": execution.step or execution.failed_step,
        "driver": execution.driver,
    }
    return [(str(link[0]), _filled(link[1], values)) for link in conf.LINKS if is_usable(link)]


def is_usable(link: object) -> bool:
    """Whether it is a label and the address of a web page; a script, say, is not linked to."""
    match link:
        case [_label, str(address)]:
            return bool(_WEB.match(address))
    return False


def unknown_places(link: object) -> list[str]:
    """What looks in its address as if it were filled in, and is not."""
    match link:
        case [_label, str(address)]:
            return sorted(set(re.findall(r"\{(\w+)\}", address)) - {*PLACES})
    return []


_WEB = re.compile(r"https?://[^\s/{}]", re.IGNORECASE)


def _filled(address: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: quote(values[place[1]], safe=""), address)


_PLACE = re.compile(rf"\{{({'|'.join(PLACES)})\}}")
