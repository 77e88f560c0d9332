"""How a system under test is started, pinned to its cores, found ready, and ended.

Nothing is known here of what is started: a command, and `GET /ping`, which each of its workers answers with its pid.
"""

import http.client
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
PATIENCE = 30  # seconds in which all workers must answer
PINGS = 16  # at a time: an idle kernel gives single connections to the same worker again and again
PORTS = range(20000, 32000)  # below those from which Linux takes the ports of outgoing connections


class Site(NamedTuple):
    """Where a system runs."""

    port: int
    redis_port: int  # of a Redis that runs already
    folder: Path  # an empty one, for configurations, logs and what the system writes
    cores: frozenset[int] | set[int] = frozenset()  # that it may use; empty: all
    workers: int = 1


class Process:
    """One command in a session of its own, its output in a file."""

    def __init__(self, command: Sequence[object], log: Path, cores: set[int], env: Mapping[str, str]) -> None:
        self._log = log
        ours = os.sched_getaffinity(0)
        with open(log, "wb") as output:
            # A child has the cores of the thread that starts it, from its first instruction on.
            os.sched_setaffinity(0, cores or ours)
            try:
                self._popen = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **env},
                    cwd=log.parent,
                    start_new_session=True,
                )
            finally:
                os.sched_setaffinity(0, ours)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def ended(self) -> bool:
        return self._popen.poll() is not None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Kill all of it at once: nothing of it is worth an orderly end, and some wait for their clients first."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._popen.wait()


class Running:
    """A system that runs. `pid` is the root of the processes to be measured; POSTs go to `publish_port`.

    `publisher`: what takes the POSTs, if that is not the system itself; it is not measured.
    """

    def __init__(self, server: Process, port: int, publisher: "Running | None" = None) -> None:
        self._server = server
        self._publisher = publisher
        self.port = port
        self.publish_port = publisher.port if publisher else port

    @property
    def pid(self) -> int:
        return self._server.pid

    def log(self) -> str:
        return self._server.log()

    def stop(self) -> None:
        self._server.stop()
        if self._publisher:
            self._publisher.stop()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def launch(
    site: Site, command: Sequence[object], env: Mapping[str, str] | None = None, name: str = "server"
) -> Process:
    """Start `command` and return when all its workers answer on the site's port. Raises `RuntimeError` with its log."""
    process = Process(command, site.folder / f"{name}.log", set(site.cores), env or {})
    try:
        _await_workers(process, site)
    except BaseException:
        process.stop()
        raise
    return process


def free_port() -> int:
    """Return a port on which nobody listens now."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def _await_workers(process: Process, site: Site) -> None:
    deadline = time.monotonic() + PATIENCE
    seen: set[bytes] = set()
    pings = PINGS if site.workers > 1 else 1
    with ThreadPoolExecutor(pings) as pool:
        while len(seen) < site.workers:
            if process.ended or time.monotonic() > deadline:
                raise RuntimeError(f"{len(seen)} of {site.workers} workers answered:\n{process.log()}")
            seen.update(filter(None, pool.map(_ping, [site.port] * pings)))
            time.sleep(0.05)


def _ping(port: int) -> bytes | None:
    """The pid of the worker that answers, if one does."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/ping", headers={"Connection": "close"})
        response = connection.getresponse()
        return response.read() if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
