"""The tests' settings for RQ workers, with the queue and the leases of one test."""

from __future__ import annotations

import json
import os

from tests.settings import *  # noqa: F403

DJANGO_SAGA = json.loads(os.environ["SAGA_SETTINGS"])
QUEUE = DJANGO_SAGA["QUEUE"]
NAMES = ("default", QUEUE, f"{QUEUE}-own", f"{QUEUE}-cron")
RQ_QUEUES = {name: {"URL": os.environ["REDIS_URL"]} for name in NAMES}
