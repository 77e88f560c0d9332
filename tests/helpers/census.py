"""
Counts what a server process and its children hold, from outside: threads, descriptors, connections, subscriptions.

What only the process itself can know, the sizes of its registries, `tests.servers.census_views` tells.
"""

import contextlib
import os
from collections import Counter
from pathlib import Path

from tests.helpers.need import need
from tests.helpers.postgres import PostgresServer, find

PROC = Path("/proc")
#: What database connections are counted on: a PostgreSQL where there is one, else the descriptors of an SQLite file.
DATABASE = "postgresql" if find() else "sqlite"


def processes(pid):
    """Return `pid` and all its descendants."""
    need((PROC / "self" / "task").is_dir(), "a Linux: what a process holds is read from its /proc")
    found = [pid]
    for parent in found:
        for task in _entries(parent, "task"):
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def threads(pid):
    """Return how many threads the process `pid` and its descendants have."""
    return sum(len(_entries(process, "task")) for process in processes(pid))


def descriptors(pid):
    """Return what the process `pid` and its descendants have open: a Counter of socket, pipe, anon_inode and paths."""
    counted = Counter()
    for process in processes(pid):
        for descriptor in _entries(process, "fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                target = os.readlink(descriptor)
                counted[target if target.startswith("/") else target.partition(":")[0]] += 1
    return counted


def _entries(pid, folder):
    try:
        return list((PROC / str(pid) / folder).iterdir())
    except OSError:  # it is gone
        return []


class Postgres:
    """Connections of a server as PostgreSQL counts them."""

    def __init__(self):
        self._server = PostgresServer()

    def __enter__(self):
        self._server.__enter__()
        return self

    def __exit__(self, *exc_info):
        self._server.close()

    def settings(self, application):
        """Return the setting `DATABASES` of the server that is to be known as `application`."""
        return {"default": {**self._server.settings, "OPTIONS": {"application_name": application}}}

    def connections(self, application, pid):
        """Return how many connections the server `application`, whose main process is `pid`, has just now."""
        return self._server.connections(application)


class Sqlite:
    """Connections of a server as the descriptors it has on one file, which are what an SQLite connection is."""

    def __init__(self, folder):
        self._file = Path(folder, "census.sqlite3").resolve()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def settings(self, application):
        """Return the setting `DATABASES` of any server."""
        return {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(self._file)}}

    def connections(self, application, pid):
        return descriptors(pid)[str(self._file)]


def database(folder):
    """Return the database on which connections are counted; `folder` is there for its files."""
    return Postgres() if DATABASE == "postgresql" else Sqlite(folder)


def subscriptions(redis):
    """Return how many channels are subscribed to on the server of this client, and by how many connections."""
    return len(redis.pubsub_channels()), len(redis.client_list(_type="pubsub"))
