"""A Redis of a test's own, to be stopped, started and emptied at will."""

from __future__ import annotations

import subprocess
from pathlib import Path

from redis import Redis

from tests.servers import end, redis_url, start_redis


class RedisServer:
    """Runs from the start; stopped, it forgets all that it held."""

    def __init__(self, home: Path) -> None:
        self.url = redis_url(home)
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self.client = Redis.from_url(self.url)
        self.start()

    def start(self) -> None:
        assert self._process is None
        self._process = start_redis(self._home)

    def stop(self) -> None:
        self.client.close()
        if self._process is not None:
            end(self._process)
        self._process = None

    @property
    def clients(self) -> int:
        """How many connections are open to it, besides the one that asks."""
        return int(self.client.info("clients")["connected_clients"]) - 1
