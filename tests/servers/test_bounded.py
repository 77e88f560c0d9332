"""
Promise B, bounded and never silent: what clients that do not read cost the server, the other clients, and themselves.

A client that stops reading fills, in this order, the kernel's buffers, the server's, and its mailbox. `pytest -s` tells
what was measured.
"""

import json
import re
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from django_sse.conf import DEFAULTS
from django_sse.feeds import CHUNK_BYTES
from tests.helpers.client import StreamClient
from tests.helpers.eventsource import parse
from tests.helpers.need import need
from tests.helpers.servers import ASGI_SERVERS, WSGI_SERVERS, serve
from tests.helpers.stall import StallingClient, stalling
from tests.helpers.wait import until
from tests.servers.bounded_views import STALL_TIMEOUT
from tests.servers.driver import Driver

pytestmark = [pytest.mark.server, pytest.mark.heavy]

SETTINGS = "tests.servers.bounded_settings"
HOUSES = [(name, None) for name in WSGI_SERVERS] + [(name, "wrapped") for name in ASGI_SERVERS] + [("uvicorn", "plain")]

STALLED = 200  # clients that stop reading
HEALTHY = 3  # clients that read on
EVENTS = 1000
RATE = 400  # events a second: with all who read, this leaves a processor idle for two thirds of the time
EVENT_BYTES = 10_000
FILLING = 250  # events that are more than fit into all buffers on the way to one client
# What uvicorn keeps for a client before it lets the application wait, and the chunk with which that was too much. A
# second chunk is in the hands of the send() that waits.
SERVER_BYTES = 65536 + 2 * (CHUNK_BYTES + EVENT_BYTES + 200)
SLACK = 16 * 2**20  # bytes that a Python process grows by at its leisure
# Seconds after which half of the events, and all but one in a hundred, must have arrived. They take 0.005 s and 0.05 s.
# On a machine that others use, too, the latter become 0.1 s where nobody stalls.
MOST_LATE, LATE = 0.1, 2.0

BURST = 10_000  # events at once
BURST_BYTES = 200  # of each; of so much, the buffers on the way and the mailbox hold a fifth

MARK = re.compile(rb"data: (\d+) ([\d.]+) ")


def ids(house):
    return "-".join(filter(None, house))


class House(Driver):
    """A running server whose memory is looked at."""

    def __init__(self, server, app):
        super().__init__(server)
        self.app = app
        self.pid = server.pid

    def parts(self):
        """Return what streams consist of in the memory of the process, and how much of it there is."""
        return Counter(json.loads(self.request("GET", "parts")[2]))

    def ends(self, path, reason):
        """How many of the streams of this path have ended for this reason."""
        return len(re.findall(rf"stream closed: reason={reason} .* path=/{path}\n", self.log()))

    def memory(self, which):
        """Return `VmRSS` (bytes in memory) or `VmHWM` (the most there ever were) of the process."""
        status = Path("/proc", str(self.pid), "status")
        need(status.exists(), "a Linux: what a process needs is read from its /proc")
        return int(re.search(rf"{which}:\s+(\d+) kB", status.read_text())[1]) * 1024


class Healthy:
    """A client that does nothing but read, and note which events came and how long after they were sent."""

    def __init__(self, url):
        parts = urlsplit(url)
        self.numbers = []
        self.latencies = []
        self._rest = b""
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=10)
        self._socket.sendall(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        assert self._socket.recv(65536).startswith(b"HTTP/1.1 200")
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    @property
    def reading(self):
        return self._thread.is_alive()

    def _read(self):
        # A frame is never divided among two chunks of the transfer coding, so that need not be taken apart.
        while data := self._socket.recv(2**18):
            now = time.monotonic()
            data = self._rest + data
            end = 0
            for match in MARK.finditer(data):
                self.numbers.append(int(match[1]))
                self.latencies.append(now - float(match[2]))
                end = match.end()
            self._rest = data[max(end, len(data) - 64) :]


def flood(redis, channel, events, rate):
    """Publish events, evenly, as far as this machine lets us."""
    padding = "x" * EVENT_BYTES
    begun = time.monotonic()
    for number in range(events):
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        redis.publish(channel, json.dumps(["flood", f"{number} {time.monotonic()} {padding}"]))


def quantiles(clients):
    """Return the latencies, in seconds, that half of the events and one in a hundred exceed."""
    latencies = sorted(latency for client in clients for latency in client.latencies)
    return latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]


def flooded(house, redis, path, channel, events=EVENTS, rate=RATE, healthy=HEALTHY):
    """Have healthy clients take a flood; return the quantiles of their latencies."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Healthy(f"{house.url}/{path}")) for _ in range(healthy)]
        flood(redis, channel, events, rate)

        def settled():
            return all(len(client.numbers) == events or not client.reading for client in clients)

        until(settled, what="the events")
        for client in clients:
            assert client.numbers == list(range(events))
        return quantiles(clients)


@pytest.fixture(scope="module")
def houses(redis_server):
    """Call with the name of a server and of an application: the server of that kind in this module."""
    running = {}
    with ExitStack() as stack:

        def house(name, app):
            if (name, app) not in running:
                server = serve(
                    name,
                    settings=SETTINGS,
                    env={"TEST_REDIS_LOCATION": redis_server.location},
                    app=app and f"tests.servers.applications:{app}",
                    ready="/parts",
                )
                running[name, app] = House(stack.enter_context(server), app)
            return running[name, app]

        yield house


@pytest.fixture
def house(request, houses):
    return houses(*request.param)


def on(which):
    return pytest.mark.parametrize("house", which, indirect=True, ids=ids)


def stall_many(house, redis, stalled=STALLED, events=EVENTS, rate=RATE):
    """Flood clients of which many do not read; check how these end, and return what all of that has cost."""
    channel = house.key()
    path = f"stalling/queue/{channel}"
    alone = flooded(house, redis, path, channel, events, rate)
    until(lambda: house.parts()["Stream"] == 0, what="the end of the first streams")
    before = house.parts()

    def given_back():
        return house.parts() == before

    with stalling(f"{house.url}/{path}", stalled):
        memory = house.memory("VmRSS")
        # Until a client is seen to stop reading, it is served as any other.
        filling = flooded(house, redis, path, channel, FILLING, rate)
        beside = flooded(house, redis, path, channel, events, rate)
        grown = house.memory("VmHWM") - memory
        until(lambda: house.ends(path, "stalled") == stalled, 10 + STALL_TIMEOUT, "the end of all who do not read")
        assert house.ends(path, "overflow") == 0  # whoever is blocked has stalled
        if house.app == "wrapped":
            until(given_back, what="the end of all parts of the stalled streams")
    # Django's own handler waits in send() for as long as the server lets it: until the client leaves.
    until(given_back, what="the end of all parts of streams")
    return {"alone": alone, "filling": filling, "beside": beside, "grown": grown}


@pytest.mark.heavy
@on([("uvicorn", "plain"), ("uvicorn", "wrapped")])
def test_clients_that_stop_reading_are_ended_and_cost_little(house, redis_server):
    measured = stall_many(house, redis_server.client())
    bound = STALLED * SERVER_BYTES + DEFAULTS["MAILBOX"]["BYTES"] + SLACK
    print(
        f"{STALLED} stalled clients: {measured['grown'] / STALLED / 1024:.0f} KiB each, at most "
        f"{bound / STALLED / 1024:.0f}"
    )
    for which in ("alone", "filling", "beside"):
        half, most = measured[which]
        print(f"healthy clients, {which}: p50 {half * 1000:.1f} ms, p99 {most * 1000:.1f} ms")
    assert measured["grown"] < bound
    half, most = measured["beside"]
    assert half < max(2 * measured["alone"][0], MOST_LATE)
    assert most < max(2 * measured["alone"][1], LATE)


@on(HOUSES)
def test_a_burst_to_a_client_that_does_not_read_leaves_no_gap(house, redis_server):
    redis = redis_server.client()
    channel, other = house.key(), house.key()
    path = f"default/queue/{channel}"
    with StallingClient(f"{house.url}/{path}") as slow, StreamClient(f"{house.url}/default/queue/{other}") as witness:
        assert slow.read_head() == 200
        witness.wait_for(b"retry:")
        padding = "x" * BURST_BYTES
        burst = redis.pipeline(transaction=False)
        for number in range(BURST):
            burst.publish(channel, json.dumps(["burst", f"{number} {padding}"]))
        burst.publish(other, json.dumps(["over", ""]))
        burst.execute()
        witness.wait_for(b"event: over\n")  # the server has the burst behind it
        slow.read_on(f"data: {BURST - 1} ".encode())
        numbers = [int(message.data.partition(" ")[0]) for message in parse(bytes(slow.body))]
    print(f"{len(numbers)} events of the burst arrived, {'ended' if slow.ended else 'open'}")
    assert slow.broken is None
    assert numbers == list(range(len(numbers)))
    if house.name == "daphne":
        # It takes whatever an application sends, so that no mailbox is ever full.
        assert len(numbers) >= BURST - 1  # the last one may not be whole yet
    else:
        assert slow.ended
        until(lambda: house.ends(path, "overflow") == 1, what="the line in the log")
