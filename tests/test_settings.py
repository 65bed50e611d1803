"""The one setting: its defaults, its limits, and that it is read late."""

from __future__ import annotations

import math
from typing import Any

import pytest
from django.test import override_settings

from django_saga.conf import DEFAULTS, conf
from django_saga.errors import describe
from django_saga.exceptions import InvalidSettings, SagaError

LIMITS = {
    "LEASE": (0.1, 86_400),
    "INLINE_WAIT": (0, 86_400),
    "MAX_RECOVERIES": (0, 1_000_000),
    "RECOVERY_LATE": (1, 31_536_000),
    "CONTEXT_LIMIT": (100, 1_000_000_000),
    "ERROR_LIMIT": (100, 1_000_000),
    "TRACEBACK_LIMIT": (0, 10_000_000),
}


@pytest.fixture(autouse=True)
def unset(settings: Any) -> None:
    settings.DJANGO_SAGA = {}


def test_every_key_has_a_default_and_none_has_to_be_given(settings: Any) -> None:
    expected = {
        "BACKEND": "inprocess",
        "QUEUE": "default",
        "LEASE": 60,
        "INLINE_WAIT": 5,
        "MAX_RECOVERIES": 5,
        "CONTAINER": None,
    }
    for given in ({}, None):
        settings.DJANGO_SAGA = given
        assert {key: getattr(conf, key) for key in expected} == expected
        assert all(getattr(conf, key) == value for key, value in DEFAULTS.items())
    del settings.DJANGO_SAGA
    assert conf.LEASE == 60


def test_a_key_that_is_given_leaves_the_others_at_their_defaults(settings: Any) -> None:
    settings.DJANGO_SAGA = {"LEASE": 5}
    assert (conf.LEASE, conf.MAX_RECOVERIES) == (5, 5)


def test_a_changed_setting_holds_at_once_and_only_while_it_is_changed() -> None:
    assert conf.LEASE == 60
    with override_settings(DJANGO_SAGA={"LEASE": 7}):
        assert conf.LEASE == 7
    assert conf.LEASE == 60


def test_an_unknown_name_is_no_setting() -> None:
    with pytest.raises(AttributeError, match="LAESE"):
        _ = conf.LAESE  # type: ignore[attr-defined]


@pytest.mark.parametrize(("key", "limits"), LIMITS.items())
def test_the_ends_of_each_range_are_taken_and_what_is_beyond_is_refused(
    settings: Any, key: str, limits: tuple[float, float]
) -> None:
    low, high = limits
    for value in limits:
        settings.DJANGO_SAGA = {key: value}
        assert getattr(conf, key) == value
    for value in (low - 0.1, -1, high + 1, math.inf, -math.inf, math.nan):
        settings.DJANGO_SAGA = {key: value}
        with pytest.raises(InvalidSettings, match=rf"DJANGO_SAGA\['{key}'\] must be from"):
            getattr(conf, key)


@pytest.mark.parametrize("key", LIMITS)
@pytest.mark.parametrize("value", ["60", None, True, [60]])
def test_what_is_no_number_is_refused_and_shown(settings: Any, key: str, value: Any) -> None:
    settings.DJANGO_SAGA = {key: value}
    with pytest.raises(InvalidSettings, match=rf"\['{key}'\] must be a number, not") as error:
        _ = conf.QUEUE
    assert repr(value) in str(error.value)


def test_a_bad_value_is_told_at_every_access_and_mended_by_the_next_change(settings: Any) -> None:
    settings.DJANGO_SAGA = {"LEASE": 0}
    for _ in range(2):
        with pytest.raises(InvalidSettings):
            _ = conf.LEASE
    settings.DJANGO_SAGA = {"LEASE": 1}
    assert conf.LEASE == 1


def test_a_setting_that_is_no_dict_is_refused_clearly(settings: Any) -> None:
    settings.DJANGO_SAGA = ["LEASE"]
    with pytest.raises(InvalidSettings, match="must be a dict"):
        _ = conf.LEASE


@pytest.mark.parametrize(
    "key", ["MAX_RECOVERIES", "CONTEXT_LIMIT", "ERROR_LIMIT", "TRACEBACK_LIMIT"]
)
def test_what_is_counted_must_be_whole(settings: Any, key: str) -> None:
    """ERROR_LIMIT = 150.5 otherwise fails where an error is to be stored."""
    settings.DJANGO_SAGA = {key: 150.5}
    with pytest.raises(InvalidSettings, match=key):
        _ = conf.LEASE


# The limits at work


def raised(message: str) -> Exception:
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        return error


def test_a_long_error_keeps_its_beginning_and_a_long_traceback_its_end(settings: Any) -> None:
    settings.DJANGO_SAGA = {"ERROR_LIMIT": 100, "TRACEBACK_LIMIT": 50}
    error = describe(raised("begin" + "x" * 1_000 + "the end"))
    assert error.type == "RuntimeError"
    assert len(error.message) == 100
    assert error.message.startswith("begin")
    assert len(error.traceback) == 50
    assert error.traceback.endswith("the end\n")


def test_what_fits_is_kept_whole() -> None:
    error = describe(raised("short"))
    assert error.message == "short"
    assert error.traceback.startswith("Traceback")
    assert error.traceback.endswith("RuntimeError: short\n")
    assert "in raised" in error.traceback


def test_an_error_may_hold_any_text_and_is_stored_as_text_for_every_database() -> None:
    error = describe(raised("NUL \x00 and half \ud83d of a pair"))
    for text in (error.message, error.traceback):
        assert "\x00" not in text
        assert text.encode()
        assert "NUL \\x00 and half \\ud83d of a pair" in text


def test_an_error_that_cannot_be_shown_is_described_all_the_same() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise SagaError("no words")

    assert describe(Unspeakable()).type.endswith("Unspeakable")


def test_no_traceback_is_kept_where_none_is_wanted(settings: Any) -> None:
    settings.DJANGO_SAGA = {"TRACEBACK_LIMIT": 0}
    assert len(describe(raised("x")).traceback) <= 1
