"""The demo's settings over the servers that ``tests.servers`` found or started."""

from __future__ import annotations

import os
from typing import Any

import django

from testproject.databases import database
from testproject.settings import *  # noqa: F403

INSTALLED_APPS = [*INSTALLED_APPS, "tests.apps.TestsConfig"]  # noqa: F405
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# alias: the variable with its URL. The processes that tests start get the same variables.
DATABASE_URLS = {"default": "DATABASE_URL", "sqlite": "SQLITE_URL", "mariadb": "MARIADB_URL"}
DATABASES: dict[str, dict[str, Any]] = {
    alias: database(os.environ[variable])
    for alias, variable in DATABASE_URLS.items()
    if variable in os.environ
}
# As with the private PostgreSQL, nobody pulls the plug here.
DATABASES["sqlite"]["OPTIONS"]["init_command"] = "PRAGMA synchronous = OFF"
# In memory, Django's default for tests, no other process could read it.
DATABASES["sqlite"]["TEST"] = {"NAME": DATABASES["sqlite"]["NAME"] + ".test"}

if "mariadb" in DATABASES:
    import pymysql

    # Unlike the private servers this one may serve another run at the same time.
    DATABASES["mariadb"]["TEST"] = {"NAME": f"test_saga_{os.getpid()}"}

    pymysql.install_as_MySQLdb()

if django.VERSION >= (6, 1):  # which warns of a project that has none
    MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
