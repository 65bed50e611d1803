"""The tests' settings for recovering processes, on the database and with the leases of one test."""

from __future__ import annotations

import json
import os

from tests.settings import *  # noqa: F403

DATABASES["default"] = DATABASES[os.environ.get("RECOVER_ON", "default")]  # noqa: F405
DJANGO_SAGA = json.loads(os.environ.get("RECOVER_WITH", "{}"))
