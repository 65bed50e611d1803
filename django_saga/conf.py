"""The settings: one dict, ``DJANGO_SAGA``, every key optional, read when it is needed."""

from __future__ import annotations

from typing import Any

from django.conf import settings as django_settings
from django.core.signals import setting_changed

from django_saga.exceptions import InvalidSettings

DEFAULTS: dict[str, Any] = {
    "BACKEND": "inprocess",  # "inprocess", "rq", or the dotted path of a backend class
    "QUEUE": "default",  # the django-rq queue that saga jobs go to
    "LEASE": 60.0,  # seconds that a driver may be silent before another takes over
    "INLINE_WAIT": 5.0,  # seconds that a driver sleeps through rather than hand over
    "MAX_RECOVERIES": 5,  # takeovers without progress before an execution is STUCK
    "CONTAINER": None,  # dotted path of an object with resolve(type), sync or async
    "RECOVERY_LATE": 300.0,  # seconds since the latest sweep from which recovery is late
    "ALERTS": {},  # WEBHOOK, EMAIL, FAILURES, SITE: who is told of what, and how
    "AUTHORIZE": None,  # callable(user, verb, execution) -> bool, or its dotted path
    "LINKS": [],  # (label, address) of each link on an execution's page; {id}, {saga}, {step}, ...
    "CONTEXT_LIMIT": 1_000_000,  # bytes of stored context
    "ERROR_LIMIT": 2_000,  # characters of a stored error message
    "TRACEBACK_LIMIT": 20_000,  # characters of a stored traceback
}

_RANGES = {
    "LEASE": (0.1, 86_400),
    "INLINE_WAIT": (0, 86_400),
    "MAX_RECOVERIES": (0, 1_000_000),
    "RECOVERY_LATE": (1, 31_536_000),
    "CONTEXT_LIMIT": (100, 1_000_000_000),
    "ERROR_LIMIT": (100, 1_000_000),
    "TRACEBACK_LIMIT": (0, 10_000_000),
}


class Settings:
    """``DJANGO_SAGA`` over its defaults, as attributes; built again when the setting changes."""

    BACKEND: str
    QUEUE: str
    LEASE: float
    INLINE_WAIT: float
    MAX_RECOVERIES: int
    CONTAINER: Any
    RECOVERY_LATE: float
    ALERTS: dict[str, Any]
    AUTHORIZE: Any
    LINKS: Any
    CONTEXT_LIMIT: int
    ERROR_LIMIT: int
    TRACEBACK_LIMIT: int

    def __getattr__(self, key: str) -> Any:
        # Reached only until the values are in place.
        if key not in DEFAULTS:
            raise AttributeError(key)
        given = getattr(django_settings, "DJANGO_SAGA", None) or {}
        if not isinstance(given, dict):
            raise InvalidSettings(f"DJANGO_SAGA must be a dict, not {given!r}.")
        for name, (low, high) in _RANGES.items():
            value = given.get(name, DEFAULTS[name])
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidSettings(f"DJANGO_SAGA[{name!r}] must be a number, not {value!r}.")
            if not low <= value <= high:
                raise InvalidSettings(
                    f"DJANGO_SAGA[{name!r}] must be from {low:g} to {high:g}, not {value!r}."
                )
            if isinstance(DEFAULTS[name], int) and not isinstance(value, int):
                raise InvalidSettings(f"DJANGO_SAGA[{name!r}] must be whole, not {value!r}.")
        self.__dict__.update({**DEFAULTS, **given})
        return self.__dict__[key]

    def reload(self) -> None:
        """Forget the values; the next access reads the setting again."""
        self.__dict__.clear()


conf = Settings()


def _reload(*, setting: str, **_: object) -> None:
    if setting == "DJANGO_SAGA":
        conf.reload()


setting_changed.connect(_reload, dispatch_uid="django_saga.conf")
