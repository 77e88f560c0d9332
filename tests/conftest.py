"""Fixtures that start real servers on first use, and the order in which everything is stopped again."""

import gc
import signal
from contextlib import ExitStack

import pytest
from django.core.signals import request_finished
from django.db import connections
from django.test import override_settings

from django_sse.signals import stream_closed
from tests.helpers import servers
from tests.helpers.process import RUNNING
from tests.helpers.redis import RedisServer

LOG_SHOWN = 6000  # characters of each server's log shown with a failed test
LOGS_BEFORE = pytest.StashKey()


def pytest_sessionstart(session):
    # A run that is terminated (a time limit in CI) unwinds as on Ctrl-C, so that no server outlives it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A run in the background of a shell ignores these, and so would every server that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[LOGS_BEFORE] = {process.pid: len(process.log()) for process in RUNNING}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show with a failed test what the servers have written since it began."""
    report = yield
    if report.failed:
        before = item.stash.get(LOGS_BEFORE, {})
        for process in RUNNING:
            if log := process.log()[before.get(process.pid, 0) :]:
                report.sections.append((f"log of {process.name} (pid {process.pid})", log[-LOG_SHOWN:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def _closed_responses_leave_the_database_alone():
    """Closing a response by hand must not ask for the test's own connection, let alone close it."""
    # Not by disconnecting the signal, as Django's test client does: that connects it again after each request.
    connections["default"].close_if_unusable_or_obsolete = lambda: None


@pytest.fixture(scope="module", autouse=True)
def _what_is_old_is_not_looked_through():
    """Many tests have the collector look for what nobody holds: not among all that pytest has gathered."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def redis_server():
    """A private Redis for the whole session, empty at the start of each test."""
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _empty_redis(request):
    if "redis_server" in request.fixturenames:
        server = request.getfixturevalue("redis_server")
        if not server.running:  # a test that failed in the middle of an outage
            server.start()
        server.client().flushall()


@pytest.fixture
def redis_settings(redis_server):
    """The settings of this process name the private Redis while the test runs."""
    connection = {"location": redis_server.location}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection):
        yield connection


@pytest.fixture
def finished():
    """A true value for each request that Django has finished."""
    finished = []

    def receiver(**kwargs):
        finished.append(1)

    request_finished.connect(receiver)
    yield finished
    request_finished.disconnect(receiver)


@pytest.fixture
def reasons():
    """Why each stream has ended."""
    reasons = []

    def receiver(reason, **kwargs):
        reasons.append(reason)

    stream_closed.connect(receiver)
    yield reasons
    stream_closed.disconnect(receiver)


@pytest.fixture
def serve():
    """`tests.helpers.servers.serve`, whose servers are stopped when the test is over."""
    with ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(servers.serve(name, **options))
