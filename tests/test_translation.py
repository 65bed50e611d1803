"""The screens in another language than the one they were written in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.test import Client
from django.test.utils import override_settings
from django.urls import reverse

from tests.operated import failed_trip, stuck_trip

pytestmark = pytest.mark.django_db(transaction=True)

LIST = "admin:django_saga_sagaexecution_changelist"
ONE = "admin:django_saga_sagaexecution_change"

SCREENS: dict[str, tuple[Callable[[], str], str]] = {
    "overview": (lambda: reverse("admin:app_list", args=["django_saga"]), "Braucht Aufmerksamkeit"),
    "list": (lambda: reverse(LIST), "Gezeigt wird, was Aufmerksamkeit"),
    "one": (lambda: reverse(ONE, args=[failed_trip().pk]), "Keine Wirkung besteht."),
    "a stuck one": (lambda: reverse(ONE, args=[stuck_trip().pk]), "festgefahren"),
    "a verb": (
        lambda: reverse("admin:django_saga_sagaexecution_retry", args=[failed_trip().pk]),
        "Ändert sie sich, bevor Sie bestätigen, bleibt sie unberührt.",
    ),
    "groups": (lambda: reverse("admin:django_saga_sagafailuregroup_changelist"), "Ausgang bekannt"),
    "pauses": (lambda: reverse("admin:django_saga_sagapause_changelist"), "Nichts ist angehalten."),
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_speaks_german(admin_client: Client, name: str) -> None:
    failed_trip()
    path, words = SCREENS[name]
    with override_settings(LANGUAGE_CODE="de"):
        html = admin_client.get(path()).content.decode()
    assert words in html
    assert words not in admin_client.get(path()).content.decode()
