"""
Promise R in a real browser: its EventSource comes back by itself, and its page misses nothing and shows nothing twice.

A server is killed without a word to its clients, and started again on the same port.
"""

import itertools
import json
import os
import signal

import pytest
from django.test import override_settings

from django_sse.redisqueue import send_event
from tests.brokers.proxy import Proxy
from tests.example import conftest as chromium
from tests.helpers.client import StreamClient, request
from tests.helpers.process import Process, free_port
from tests.helpers.servers import ROOT, command
from tests.helpers.wait import until

pytestmark = [pytest.mark.server, pytest.mark.browser]

browser = chromium.browser
open_page = chromium.open_page

SSE = {"HISTORY": {"SIZE": 100}, "RETRY": 100}
APPLICATIONS = {"uvicorn": "tests.servers.applications:wrapped", "gunicorn-gthread": "tests.wsgi:application"}
PATIENCE = 20  # seconds in which a server must answer, on a busy machine too

numbers = itertools.count(1)


class House:
    """A server that keeps its port."""

    def __init__(self, name, location, gate):
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "DJANGO_SETTINGS_MODULE": "tests.servers.page_settings",
            "TEST_REDIS_LOCATION": location,
            "TEST_DJANGO_SSE": json.dumps(SSE),
            "TEST_PAGE_GATE": str(gate),
        }
        self._process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.kill()

    def start(self):
        words = command(self.name, self.port, APPLICATIONS[self.name], 1, 64, [])
        self._process = Process(self.name, words, env=self._env, cwd=ROOT)
        until(self._answers, PATIENCE, f"an answer of {self.name}")

    def kill(self):
        """End it, and what it has started, as a crash does."""
        if self._process is not None:
            self._process.stop(signal.SIGKILL)
            self._process.close()
            self._process = None

    def _answers(self):
        assert self._process.returncode is None, self._process.log()
        try:
            return request("GET", f"{self.url}/ping", timeout=5)[0] == 200
        except OSError:
            return False


@pytest.fixture(params=APPLICATIONS)
def house(request, redis_server, tmp_path):
    with House(request.param, redis_server.location, tmp_path / "gate") as house:
        yield house


@pytest.fixture
def open_gate(tmp_path):
    return (tmp_path / "gate").touch


class Channel:
    """A channel and its state, which an application changes together."""

    def __init__(self, redis):
        self.name = f"page-{next(numbers)}"
        self._redis = redis

    def publish(self, *items):
        for item in items:
            self._redis.rpush(f"state:{self.name}", item)
            send_event("news", item, self.name)

    def is_waited_for(self):
        """Whether a stream has read the state, and waits at the gate before it sends it."""
        return self._redis.exists(f"waiting:{self.name}")


@pytest.fixture
def channel(redis_server):
    connection = {"location": redis_server.location}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection, DJANGO_SSE=SSE):
        yield Channel(redis_server.client())


def wait_until_shown(page, last):
    """Wait until a page has shown something; return all that it has shown."""
    page.wait_for_function("last => window.shown.includes(last)", arg=last, polling=20)
    return page.evaluate("window.shown")


def begin_to_listen(page, url=None):
    """Have the page open its stream, by default the one that resumes where the page was made."""
    page.evaluate("url => window.listen(url ?? window.resuming)", url)


def listen(page, url=None):
    """Have the page open its stream, and wait until it is open."""
    begin_to_listen(page, url)
    page.wait_for_function("window.source.readyState === EventSource.OPEN", polling=20)


def wait_until_lost(page):
    page.wait_for_function("window.source.readyState === EventSource.CONNECTING", polling=20)


def test_events_between_the_page_and_its_stream_arrive(house, channel, open_page):
    channel.publish("1", "2")
    page = open_page(f"{house.url}/page/{channel.name}")
    channel.publish("3", "4")
    listen(page)
    assert wait_until_shown(page, "news 4") == ["news 3", "news 4"]
    assert page.evaluate("window.rendered") == ["1", "2"]
    channel.publish("5")
    assert wait_until_shown(page, "news 5") == ["news 3", "news 4", "news 5"]


def test_a_page_of_a_channel_without_events_misses_none(house, channel, open_page):
    page = open_page(f"{house.url}/page/{channel.name}")
    channel.publish("1")
    listen(page)
    assert wait_until_shown(page, "news 1") == ["news 1"]


def test_after_a_restart_of_the_server_each_event_was_shown_exactly_once(house, channel, open_page):
    page = open_page(f"{house.url}/page/{channel.name}")
    channel.publish("1")
    listen(page)
    channel.publish("2")
    wait_until_shown(page, "news 2")
    for first in (3, 6):
        house.kill()
        wait_until_lost(page)
        channel.publish(f"{first}", f"{first + 1}")
        house.start()
        channel.publish(f"{first + 2}")
        wait_until_shown(page, f"news {first + 2}")
    channel.publish("9")
    assert wait_until_shown(page, "news 9") == [f"news {number}" for number in range(1, 10)]


def test_a_page_that_has_seen_no_event_resumes_as_well(house, channel, open_page):
    channel.publish("1")
    page = open_page(f"{house.url}/page/{channel.name}")
    listen(page, f"/news/{channel.name}")
    with StreamClient(f"{house.url}/news/{channel.name}") as later:
        later.wait_for(b"\nid: ")  # and the page's was sent before
    house.kill()
    wait_until_lost(page)
    channel.publish("2")
    house.start()
    assert wait_until_shown(page, "news 2") == ["news 2"]


def test_a_page_whose_history_was_lost_sees_one_reset_and_then_what_comes(house, channel, open_page, redis_server):
    page = open_page(f"{house.url}/page/{channel.name}")
    listen(page)
    channel.publish("1")
    wait_until_shown(page, "news 1")
    house.kill()
    wait_until_lost(page)
    channel.publish("2")
    redis_server.client().flushall()
    channel.publish("3")
    house.start()
    page.wait_for_function("window.shown.length >= 2", polling=20)
    channel.publish("4")
    shown = wait_until_shown(page, "news 4")
    assert [shown[0], *shown[2:]] == ["news 1", "news 4"]
    kind, _, data = shown[1].partition(" ")
    assert kind == "stream-reset"
    assert json.loads(data) == {"channels": [channel.name], "reason": "epoch"}
    # Which does not come again with the next connection.
    house.kill()
    wait_until_lost(page)
    channel.publish("5")
    house.start()
    assert wait_until_shown(page, "news 5")[3:] == ["news 5"]


def test_the_state_comes_before_the_events_that_are_published_while_it_is_read(house, channel, open_page, open_gate):
    channel.publish("1", "2")
    page = open_page(f"{house.url}/page/{channel.name}")
    begin_to_listen(page, f"/board/{channel.name}")
    until(channel.is_waited_for, what="the state to be read")
    channel.publish("3", "4")
    open_gate()
    expected = ["state 1", "state 2", "news 3", "news 4"]
    assert wait_until_shown(page, "news 4") == expected
    # Whoever has it comes back without.
    house.kill()
    wait_until_lost(page)
    channel.publish("5")
    house.start()
    channel.publish("6")
    assert wait_until_shown(page, "news 6") == [*expected, "news 5", "news 6"]


def test_a_state_in_the_middle_of_which_the_connection_broke_comes_again_as_a_whole(
    house, channel, open_page, open_gate
):
    open_gate()
    long = "2" * 100_000
    channel.publish("1", long, "3")
    with Proxy(house.port) as proxy:
        page = open_page(f"http://127.0.0.1:{proxy.port}/page/{channel.name}")
        proxy.budget = 50_000
        listen(page, f"/board/{channel.name}")
        wait_until_shown(page, "state 1")
        channel.publish("4")
        house.kill()
        wait_until_lost(page)
        house.start()
        expected = ["state 1", "state 1", f"state {long}", "state 3", "state 4"]
        assert wait_until_shown(page, "state 4") == expected
        channel.publish("5")
        assert wait_until_shown(page, "news 5") == [*expected, "news 5"]
