"""
Promise C, closed means closed: a user's `finally` runs in every way a stream can end, and each end is told once.

Every test ends one stream of each kind of iterator that the server knows. Where root runs the tests, the servers live
in a network of their own, whose kernel takes seconds and not a quarter of an hour to give a silent client up.
"""

import contextlib
import json
import re
from contextlib import ExitStack
from functools import partial

import pytest

from tests.helpers.client import StreamClient
from tests.helpers.need import need
from tests.helpers.rawclient import PRIVATE, RawClient, private_network
from tests.helpers.servers import ASGI_SERVERS, GEVENT_SERVERS, WSGI_SERVERS, serve
from tests.helpers.wait import until
from tests.servers.driver import Driver

pytestmark = [pytest.mark.server, pytest.mark.heavy, pytest.mark.ends]

HEARTBEAT = 0.5  # seconds
STALL_TIMEOUT = 1  # seconds
LOOKS = 10  # at a stream, none of which sees it go on: it is blocked
OPENING = b"retry: 2000\n\n"
SETTINGS = "tests.servers.closing_settings"

# Every server; those of ASGI with Django's application as it is, and with the hand-over.
HOUSES = [(name, None) for name in WSGI_SERVERS] + [
    (name, app) for name in ASGI_SERVERS for app in ("plain", "wrapped")
]
# daphne takes whatever an application sends: its own memory is where a client that does not read is waited for.
WAITING = [(name, app) for name, app in HOUSES if name in ASGI_SERVERS and name != "daphne"]


def ids(house):
    return "-".join(filter(None, house))


class House(Driver):
    """A running server with streams that can be told to end."""

    def __init__(self, server):
        super().__init__(server)
        self.ended = []  # (key, reason) of the streams whose end was awaited

    def path(self, kind, mode):
        """The path of a new stream, and its key."""
        key = self.key()
        return f"servers/closing/{kind}/{mode}/{key}", key

    @property
    def kinds(self):
        """Of iterators that are a user's own."""
        return ("sync", "queue") if self.name in GEVENT_SERVERS else ("sync", "async", "queue", "async-queue")

    def story(self, key):
        return json.loads(self.request("GET", f"servers/closing/story/{key}")[2])

    def tell(self, key, what):
        assert self.request("GET", f"servers/closing/tell/{key}/{what}")[0] == 204

    def lines(self, key):
        """The lines in which the end of a stream was logged."""
        return [line for line in self.log().splitlines() if "stream closed:" in line and f"/{key}" in line]

    def await_begin(self, key, what):
        until(lambda: self.story(key)[what], what=f"the start of {key}")

    def await_ends(self, keys, reason, timeout=10, nudge=lambda key: None):
        """Wait until the streams have ended, calling `nudge` for those that have not, and check how that was told."""
        left = set(keys)

        def over():
            for key in sorted(left):
                story = self.story(key)
                if story["closed"] == story["started"] and story["closed_signals"] and self.lines(key):
                    left.discard(key)
                else:
                    nudge(key)
            return not left

        try:
            until(over, timeout, "the end of the streams")
        except AssertionError as error:
            raise AssertionError(f"{error}; {[(self.story(key), self.lines(key)) for key in sorted(left)]}") from None
        for key in keys:
            self.check(key, reason)
            self.ended.append((key, reason))

    def check(self, key, reason):
        """Each end is told once, and everybody is told the same."""
        story = self.story(key)
        [told] = story["closed_signals"]
        own = 0 if told["view"] == "Stock" else 1
        assert (story["started"], story["closed"], story["opened_signals"]) == (own, own, 1)
        assert told["reason"] == reason
        [line] = self.lines(key)
        level = {"error": "ERROR", "stalled": "WARNING"}.get(reason, "INFO")
        assert line.startswith(f"{level} django_sse.streams: stream closed: reason={reason} ")
        told_by_log = dict(re.findall("(events|bytes|seconds)=(\\S+)", line))
        assert told_by_log == {
            "events": str(told["events"]),
            "bytes": str(told["bytes"]),
            "seconds": f"{told['seconds']:.3f}",
        }


@pytest.fixture(scope="module")
def network():
    """Whether the servers and clients of this module are in a network of their own."""
    with private_network() as private:
        yield private


@pytest.fixture(scope="module")
def houses(network):
    """Call with the name of a server and of an application: the server of that kind in this module."""
    running = {}
    settings = {"HEARTBEAT": HEARTBEAT, "STALL_TIMEOUT": STALL_TIMEOUT, "SHUTDOWN_WINDOW": 0}
    with ExitStack() as stack:

        def house(name, app):
            if (name, app) not in running:
                app_path = app and f"tests.servers.applications:{app}"
                server = serve(name, settings=SETTINGS, env={"TEST_DJANGO_SSE": json.dumps(settings)}, app=app_path)
                running[name, app] = House(stack.enter_context(server))
            return running[name, app]

        yield house
        for one in running.values():
            for key, reason in one.ended:
                one.check(key, reason)  # nothing was told again


@pytest.fixture
def house(request, houses):
    return houses(*request.param)


def on(which):
    return pytest.mark.parametrize("house", which, indirect=True, ids=ids)


def open_streams(house, mode, stack, *more_kinds):
    """Open a stream of each kind; return their keys and their clients, who have seen them begin."""
    keys, clients = [], []
    for kind in (*house.kinds, *more_kinds):
        path, key = house.path(kind, mode)
        client = stack.enter_context(RawClient(f"{house.url}/{path}"))
        client.read_until(OPENING)
        house.await_begin(key, "opened_signals" if kind == "stock" else "started")
        keys.append(key)
        clients.append(client)
    return keys, clients


def flood(house, mode, stack):
    """Open streams that nobody reads and that send until nothing fits anywhere any more; return keys and clients."""
    keys, clients = open_streams(house, mode, stack)
    for key in keys:
        house.tell(key, mode)  # begins those over the queue
    return keys, clients


def noticed_by(house):
    """Return the mode in which a stream of the server notices that its client has left, and what the test has to do."""
    if house.name in ASGI_SERVERS:
        return "quiet", lambda key: None
    # Only a write shows it, and nobody but the iterator itself can write there.
    return "tick", partial(house.tell, what="tick")


@pytest.mark.parametrize("way", [RawClient.close, RawClient.reset], ids=["closes", "resets"])
@on(HOUSES)
def test_a_client_closes_or_resets_the_connection(house, way):
    mode, nudge = noticed_by(house)
    with ExitStack() as stack:
        keys, clients = open_streams(house, mode, stack, "stock")
        for client in clients:
            way(client)
        house.await_ends(keys, "client", nudge=nudge)


@on(HOUSES)
def test_a_client_vanishes_without_a_packet(house, network):
    mode, nudge = noticed_by(house)
    reason, more = "client", ["stock"]
    if not network:
        # Here the kernel would need a quarter of an hour.
        need((house.name, "plain") in WAITING, PRIVATE)
        mode, reason, more, nudge = "flood", "stalled", [], partial(house.tell, what="flood")
    with ExitStack() as stack:
        keys, clients = open_streams(house, mode, stack, *more)
        for client in clients:
            client.vanish()
        house.await_ends(keys, reason, nudge=nudge)


@on(WAITING)
def test_a_client_that_does_not_read_is_stalled(house):
    with ExitStack() as stack:
        house.await_ends(flood(house, "flood", stack)[0], "stalled")


@on([house for house in HOUSES if house[0] != "daphne"])
def test_a_client_leaves_while_the_server_waits_for_it(house):
    with ExitStack() as stack:
        keys, clients = flood(house, "jam", stack)
        looks = []

        def blocked():
            looks.append([house.story(key)["steps"] for key in keys])
            return looks[-LOOKS:] == LOOKS * looks[-1:]

        until(blocked, what="full buffers")
        for client in clients:
            client.close()
        house.await_ends(keys, "client")


@on(HOUSES)
def test_an_iterator_that_finishes(house):
    for kind in house.kinds:
        path, key = house.path(kind, "quiet")
        with StreamClient(f"{house.url}/{path}") as client:
            client.wait_for(OPENING)
            house.tell(key, "tick")
            client.wait_for(b"event: tick\n")
            house.tell(key, "finish")
            client.wait_closed()
            assert client.ended
        house.await_ends([key], "finished")


@on(HOUSES)
def test_an_iterator_that_raises_ends_its_stream_only_and_its_client_is_told_nothing(house):
    for kind in house.kinds:
        path, key = house.path(kind, "quiet")
        other_path, other = house.path(kind, "quiet")
        with StreamClient(f"{house.url}/{path}") as client, StreamClient(f"{house.url}/{other_path}") as neighbour:
            client.wait_for(OPENING)
            neighbour.wait_for(OPENING)
            house.tell(key, "raise")
            client.wait_closed()
            assert client.ended
            assert b"secret" not in client.body
            assert b"Traceback" not in client.body
            house.await_ends([key], "error")
            log = house.log()
            assert log.count(f"RuntimeError: the secret of {key}\n") == 1
            assert log.partition(f"/{key}\n")[2].startswith("Traceback (most recent call last):\n")

            house.tell(other, "tick")
            neighbour.wait_for(b"event: tick\n")
            house.tell(other, "finish")
            neighbour.wait_closed()
        house.await_ends([other], "finished")


@pytest.mark.parametrize("app", ["plain", "wrapped"])
def test_a_server_cancels_its_streams(app, network):
    # Without a signal, of which we should learn: after so many responses uvicorn stops, to be started afresh.
    extra = ("--limit-max-requests", 50, "--timeout-graceful-shutdown", 1)
    env = {"TEST_DJANGO_SSE": json.dumps({"SHUTDOWN_WINDOW": 60})}
    app = f"tests.servers.applications:{app}"
    with serve("uvicorn", settings=SETTINGS, env=env, app=app, extra=extra) as server, ExitStack() as stack:
        house = House(server)
        keys = [key for _ in range(2) for key in open_streams(house, "quiet", stack)[0]]
        with contextlib.suppress(OSError):  # it has enough
            while True:
                house.request("GET", "ping")
        until(lambda: server.returncode is not None, what="the end of the server")
        log = server.log()
        assert f"Cancel {len(keys)} running task(s)" in log
        for key in keys:
            # The process is gone, and with it what such a `finally` may have awaited.
            assert log.count(f"finally of {key}\n") == 1, log
            assert len(house.lines(key)) == 1, log
            assert "reason=client " in house.lines(key)[0]
