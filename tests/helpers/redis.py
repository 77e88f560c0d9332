"""A private Redis server: its own port and directory, nothing kept, nothing of the machine's own Redis touched."""

import os
import shutil
import signal
import tempfile

import redis

from tests.helpers.need import need
from tests.helpers.process import Process, free_port
from tests.helpers.wait import until

HOW = "redis-server: on Debian `apt-get install redis-server`, elsewhere https://redis.io/docs/latest/operate/oss_and_stack/install/"


class RedisServer:
    """A Redis (or Valkey) process that can be stopped and started again on the same port, as after an outage."""

    def __init__(self):
        named = os.environ.get("DJANGO_SSE_REDIS_SERVER", "redis-server")
        self.binary = shutil.which(named) or shutil.which("valkey-server")
        need(self.binary, HOW)
        self.port = free_port()
        self._directory = tempfile.TemporaryDirectory(prefix="django-sse-redis-")
        self._process = None
        self._clients = {}

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def location(self):
        return f"127.0.0.1:{self.port}"

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def running(self):
        return self._process is not None and self._process.returncode is None

    def client(self, **options):
        """Return a `redis.Redis` of this server, the same for the same options; it is closed with the server."""
        key = frozenset(options.items())
        if key not in self._clients:
            self._clients[key] = redis.Redis(host="127.0.0.1", port=self.port, **options)
        return self._clients[key]

    def start(self):
        """Start and wait until it answers; another port is taken only before the first start."""
        first_time = self._process is None
        for _ in range(5):
            self._process = Process("redis-server", self._command())
            try:
                until(lambda: not self.running or self._answers(), what="an answer of redis-server")
            except AssertionError:
                log = self._process.log()
                self._process.close()
                raise AssertionError(f"redis-server does not answer:\n{log}") from None
            if self.running:
                return
            log = self._process.log()
            self._process.close()
            if first_time:
                self.port = free_port()
        raise AssertionError(f"redis-server does not start:\n{log}")

    def stop(self, signum=signal.SIGTERM):
        """Stop and wait until it is gone; every connection ends."""
        self._process.stop(signum)
        self._process.close()

    def restart(self):
        self.stop()
        self.start()

    def close(self):
        for client in self._clients.values():
            client.close()
        if self._process is not None:
            self._process.close()
        self._directory.cleanup()

    def _command(self):
        return [
            *(self.binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._directory.name),
            *("--save", "", "--appendonly", "no", "--daemonize", "no"),
        ]

    def _answers(self):
        with redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=1) as client:
            try:
                # Not another server that was quicker to take the port.
                return client.info("server")["process_id"] == self._process.pid
            except redis.exceptions.RedisError:
                return False
