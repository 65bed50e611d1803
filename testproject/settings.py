"""Settings of the demo; the tests build on them.

``DATABASE_URL`` names the database (default: a SQLite file beside manage.py). With ``REDIS_URL``,
and django-rq installed, sagas can be enqueued. ``SHOP_SERVICES_URL`` is where the demo's services
listen, ``SHOP_LEDGER`` the file that they keep, ``SAGA_LEASE`` the lease in seconds.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import django

from testproject.databases import database

BASE_DIR = Path(__file__).resolve().parent.parent

# For the demo only, and known to everybody: a real site keeps its own, and DEBUG off.
SECRET_KEY = "django-insecure-demo-only-known-to-everybody-who-reads-this"
DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1", "localhost", "[::1]"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_saga",
    "testproject.shop",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.csp.ContentSecurityPolicyMiddleware"
    if django.VERSION >= (6, 0)
    else "testproject.middleware.ContentSecurityPolicyMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
SECURE_CSP = {"default-src": ["'self'"]}

ROOT_URLCONF = "testproject.urls"
ASGI_APPLICATION = "testproject.asgi.application"
WSGI_APPLICATION = "testproject.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
STATIC_URL = "/static/"
USE_TZ = True
TIME_ZONE = "UTC"

DEMO_DATABASE = f"sqlite:///{quote((BASE_DIR / 'demo.sqlite3').as_posix())}"
DATABASES = {"default": database(os.environ.get("DATABASE_URL", DEMO_DATABASE))}
# The app brings its own; a project's choice must make no difference to its migrations.
DEFAULT_AUTO_FIELD = os.environ.get("DEFAULT_AUTO_FIELD", "django.db.models.BigAutoField")

DJANGO_SAGA: dict[str, Any] = {"LEASE": float(os.environ.get("SAGA_LEASE", 60))}

SHOP_SERVICES_URL = os.environ.get("SHOP_SERVICES_URL", "http://127.0.0.1:8901")
SHOP_LEDGER = os.environ.get("SHOP_LEDGER", str(BASE_DIR / "demo.sqlite3.ledger"))

REDIS_URL = os.environ.get("REDIS_URL")
if REDIS_URL and find_spec("django_rq"):
    INSTALLED_APPS.append("django_rq")
    RQ_QUEUES = {name: {"URL": REDIS_URL} for name in ("default", "sagas")}
