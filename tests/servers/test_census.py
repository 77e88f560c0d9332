"""
Promise H, an open stream holds nothing: threads, connections and subscriptions, counted from outside the server.

Every user is logged in, with the session in the database, and every stream has used the ORM before it waits. The names
of the tests tell what connections were counted on: a PostgreSQL, or the descriptors of an SQLite file.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.helpers import census
from tests.helpers.crowd import Crowd
from tests.helpers.servers import ASGI_SERVERS, ROOT, serve
from tests.helpers.wait import until
from tests.servers.driver import Driver

pytestmark = [pytest.mark.server, pytest.mark.heavy]

HEARTBEAT = 1  # seconds
STREAMS = {"wrapped": 300, "plain": 90}  # open at one time, with the hand-over and without it
MORE_THREADS = 6  # that a process may have with so many streams and does not have with none
LOOKS = 3  # at what a server holds, each the same: it is at rest
OWN = 60  # streams that hold a thread and a connection each, for the comparison

SETTINGS = "tests.servers.census_settings"
WSGI_SERVERS = ("gunicorn-gthread", "gunicorn-gevent")


class House(Driver):
    """A running server of which all that it holds can be counted."""

    def __init__(self, server, application, database, redis):
        super().__init__(server)
        self.pid = server.pid
        self.application = application
        self.database = database
        self.redis = redis
        status, headers, _ = self.request("GET", "servers/census/log-in")
        assert status == 204
        self.headers = {"Cookie": headers["set-cookie"].partition(";")[0]}

    def crowd(self, paths, n):
        return Crowd([f"{self.url}/servers/census/{path}" for path in paths], n, headers=self.headers)

    def ask(self):
        """Have the streams that no event reaches use the database once more."""
        assert self.request("GET", "servers/census/ask")[0] == 204

    def threads(self):
        return census.threads(self.pid)

    def connections(self):
        return self.database.connections(self.application, self.pid)

    def held(self):
        """All that the process holds for its streams."""
        return {
            "database connections": self.connections(),
            "threads": self.threads(),
            "descriptors": dict(census.descriptors(self.pid)),
            "channels and connections of Redis": census.subscriptions(self.redis),
            # Without what is 0.
            "registered": {what: number for what, number in self._told()["registered"].items() if number},
        }

    def at_rest(self):
        """What is held once nothing comes or goes any more: the thread of the last request may still be ending."""
        looks = []

        def calm():
            looks.append(self.held())
            return looks[-LOOKS:] == LOOKS * looks[-1:]

        until(calm, what="rest")
        return looks[-1]

    def await_that(self, holds, timeout, what):
        """Wait as `until()` does, and show in a failure what is held."""
        try:
            until(holds, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; held: {self.held()}; threads: {self._told()['threads']}") from None

    def _told(self):
        return json.loads(self.request("GET", "servers/census/process")[2])


@pytest.fixture(scope="module", params=[census.DATABASE])
def database(request, tmp_path_factory):
    """The database of all servers of this module, with Django's tables."""
    with census.database(tmp_path_factory.mktemp("census")) as one:
        env = {**os.environ, "DJANGO_SETTINGS_MODULE": SETTINGS, "TEST_DATABASES": json.dumps(one.settings("migrate"))}
        command = [sys.executable, "-m", "django", "migrate", "--verbosity", "0"]
        subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=60)
        yield one


@pytest.fixture(scope="module")
def houses(redis_server, database):
    """Call with the name of a server and of an application: the server of that kind in this module."""
    running = {}
    with ExitStack() as stack:

        def house(name, app=None):
            application = f"{name}-{app}"
            if application not in running:
                env = {
                    "TEST_REDIS_LOCATION": redis_server.location,
                    "TEST_DJANGO_SSE": json.dumps({"HEARTBEAT": HEARTBEAT}),
                    "TEST_DATABASES": json.dumps(database.settings(application)),
                }
                app = app and f"tests.servers.applications:{app}"
                server = stack.enter_context(serve(name, env=env, settings=SETTINGS, app=app, threads=OWN + 4))
                running[application] = House(server, application, database, redis_server.client())
            return running[application]

        yield house


def answered(crowd, times):
    """Wait until each client has got `times` answers, each of which took a look into the database or an event."""
    answer = (b"event: users\ndata: 1\n", b"event: news\n")
    crowd.wait_for(
        lambda members: all(max(map(member.body.count, answer)) >= times for member in members), 30, f"{times} answers"
    )


def await_few(house, threads):
    """Wait until no connection is held, and at most so many `threads`."""
    house.await_that(
        lambda: house.connections() == 0 and house.threads() <= threads,
        2 * HEARTBEAT,
        f"0 connections and at most {threads} threads",
    )


@pytest.mark.heavy
@pytest.mark.parametrize("app", STREAMS)
@pytest.mark.parametrize("name", ASGI_SERVERS)
def test_streams_hold_no_thread_and_no_connection_and_leave_nothing_behind(houses, name, app):
    house = houses(name, app)
    channel = house.key()
    paths = [f"queue/{channel}", f"async-counting-queue/{channel}", "async-counting"]
    few = house.at_rest()["threads"] + MORE_THREADS
    with house.crowd(paths, len(paths)) as crowd:
        crowd.wait_open()
        house.ask()
        house.send(channel, "news", "")
        answered(crowd, 1)
    house.await_that(lambda: "streams" not in house.held()["registered"], 10, "the end of the first streams")
    before = house.at_rest()

    with house.crowd(paths, STREAMS[app]) as crowd:
        crowd.wait_open()
        await_few(house, few)
        # What has been given back stays so while the streams wait.
        beats = [member.body.count(b":\n\n") for member in crowd.members]
        crowd.wait_for(
            lambda members: all(member.body.count(b":\n\n") > n for member, n in zip(members, beats, strict=True)),
            what="heartbeats",
        )
        assert house.connections() == 0
        # And is given back again when they have used the database between two events.
        house.ask()
        house.send(channel, "news", "")
        answered(crowd, 1)
        await_few(house, few)
    house.await_that(lambda: house.held() == before, 2 * HEARTBEAT, f"what was held before: {before}")


@pytest.mark.parametrize("name", WSGI_SERVERS)
def test_under_wsgi_streams_hold_no_connection_while_they_wait(houses, name):
    house = houses(name)
    channel = house.key()
    paths = [f"queue/{channel}", f"counting-queue/{channel}", "counting"]
    with house.crowd(paths, OWN) as crowd:
        crowd.wait_open()
        for times in (1, 2):
            house.await_that(lambda: house.connections() == 0, 2 * HEARTBEAT, "0 connections")
            house.ask()
            house.send(channel, "news", "")
            answered(crowd, times)
        house.await_that(lambda: house.connections() == 0, 2 * HEARTBEAT, "0 connections")

    def ended():
        # Only a write shows a WSGI server that a client has left, and an overridden iterator() writes for events alone.
        house.send(channel, "news", "")
        held = house.held()
        return not held["registered"] and not held["database connections"]

    house.await_that(ended, 2 * HEARTBEAT, "the end of the streams")


# --- What Django does by itself, and the helper for a project's own responses ---


@pytest.mark.parametrize("name", ASGI_SERVERS)
def test_streams_of_a_projects_own_hold_a_thread_and_a_connection_each_until_they_release_them(houses, name):
    house = houses(name, "plain")
    threads = house.at_rest()["threads"]
    with house.crowd(["own-async"], OWN) as crowd:
        crowd.wait_open()
        assert house.connections() == OWN
        # The thread of the request in which the look was taken is one that is gone.
        assert house.threads() >= threads - 1 + OWN
    with house.crowd(["own-released-async"], OWN) as crowd:
        crowd.wait_open()
        await_few(house, threads + MORE_THREADS)


@pytest.mark.parametrize("name", WSGI_SERVERS)
def test_under_wsgi_they_hold_a_connection_each_until_they_release_it(houses, name):
    house = houses(name)
    with house.crowd(["own"], OWN) as crowd:
        crowd.wait_open()
        assert house.connections() == OWN
    house.await_that(lambda: house.connections() == 0, 2 * HEARTBEAT, "the end of the first streams")
    with house.crowd(["own-released"], OWN) as crowd:
        crowd.wait_open()
        house.await_that(lambda: house.connections() == 0, 2 * HEARTBEAT, "0 connections")
