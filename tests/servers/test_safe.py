"""
Promise S, safe: what is too much is refused so that its client survives, and a place is free again when it is left.

Limits are small here. One server of each kind serves the whole module, and each test begins when no stream is open.
"""

import itertools
import json
import re
from contextlib import ExitStack, closing
from functools import partial

import pytest
from django.test import RequestFactory, override_settings

from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.registry import open_streams
from django_sse.workers import THREAD_NAME
from tests.helpers.eventsource import Message
from tests.helpers.servers import ASGI_SERVERS, serve
from tests.helpers.wait import until
from tests.servers.driver import Driver
from tests.servers.safe_views import SECRET

pytestmark = pytest.mark.server

HEARTBEAT = 0.2  # seconds; a WSGI server sees by the second one that a client has left
MAX_STREAMS = 4
PER_USER = 2
THREADS = 2
PREFIX = "shop:"
SETTINGS = "tests.servers.safe_settings"
API = {"Accept": "application/json"}
OPENING = b"retry: 2000\n\n"

HOUSES = (("gunicorn-gthread", None), ("uvicorn", "plain"), ("uvicorn", "application"))
ASGI_HOUSES = HOUSES[1:]


def ids(house):
    return "-".join(filter(None, house))


class House(Driver):
    """A running server with limits."""

    @property
    def on_loop(self):
        return self.name in ASGI_SERVERS

    @property
    def registered(self):
        """What this process has registered, without what is 0, and the threads that run iterators."""
        told = json.loads(self.request("GET", "servers/census/process")[2])
        registered = {**told["registered"], "workers": sum(name.startswith(THREAD_NAME) for name in told["threads"])}
        return {what: number for what, number in registered.items() if number and what != "executors"}

    def await_empty(self):
        until(lambda: not self.registered, what="the end of all streams")

    def queue(self, **headers):
        """Open a stream of a channel of its own."""
        return self.stream(f"queue/{self.key()}", headers=headers)


@pytest.fixture(scope="module")
def houses(redis_server):
    """Call with the name of a server and of an application: the server of that kind in this module."""
    running = {}
    limits = {
        "HEARTBEAT": HEARTBEAT,
        "MAX_STREAMS": MAX_STREAMS,
        "MAX_STREAMS_PER_USER": PER_USER,
        "THREADS": THREADS,
        "CHANNEL_PREFIX": PREFIX,
    }
    env = {"TEST_REDIS_LOCATION": redis_server.location, "TEST_DJANGO_SSE": json.dumps(limits)}
    with ExitStack() as stack:

        def house(name, app):
            if (name, app) not in running:
                server = serve(name, settings=SETTINGS, env=env, app=app and f"tests.asgi:{app}")
                running[name, app] = House(stack.enter_context(server))
            return running[name, app]

        yield house


@pytest.fixture
def house(request, houses):
    house = houses(*request.param)
    house.await_empty()
    return house


def on(houses):
    return pytest.mark.parametrize("house", houses, indirect=True, ids=ids)


def served(client):
    """Whether the client of a queue or a silent iterator has got a stream, which goes on."""
    client.wait_for(OPENING)
    return client.status == 200 and not client.ended


def check_refusal(open_client, what):
    """Check what a client is told that is refused; `what` names the setting."""
    with open_client(headers={}) as browser:
        browser.wait_closed()
        assert browser.status == 200
        assert browser.headers["content-type"] == "text/event-stream"
        assert browser.headers["cache-control"] == "no-store"
        # 5 s and up to 1 s more, for those that were refused in one moment must not come back in one moment.
        assert re.fullmatch(rb"retry: 5\d\d\d\n\n", browser.body)
        assert browser.ended
    with open_client(headers=API) as program:
        program.wait_closed()
        assert program.status == 503
        assert program.headers["retry-after"] == "5"
        assert program.headers["cache-control"] == "no-store"
        assert program.headers["content-type"].startswith("text/plain")
        assert what in program.body.decode()


# --- limits ---------------------------------------------------------------------------------------------------------


@on(HOUSES)
def test_one_stream_too_many_is_refused_and_served_when_another_has_left(house):
    with ExitStack() as stack:
        clients = [stack.enter_context(house.queue()) for _ in range(MAX_STREAMS)]
        assert all(map(served, clients))
        channel = house.key()
        check_refusal(partial(house.stream, f"queue/{channel}"), 'DJANGO_SSE["MAX_STREAMS"]')
        check_refusal(partial(house.stream, f"sync/{channel}"), 'DJANGO_SSE["MAX_STREAMS"]')
        check_refusal(partial(house.stream, f"async/{channel}"), 'DJANGO_SSE["MAX_STREAMS"]')
        assert house.story(channel) == {"started": 0, "closed": 0}
        # Nothing of them is left, and whatever is no stream is still served.
        assert house.registered == {"streams": MAX_STREAMS, "channels": MAX_STREAMS, "subscriptions": MAX_STREAMS}
        with house.stream(f"queue/{channel}", method="HEAD") as head:
            head.wait_closed()
            assert head.status == 200
        assert house.request("GET", "ping")[0] == 200
        assert all(map(served, clients))

        clients[0].close()
        until(lambda: house.registered["streams"] < MAX_STREAMS, what="a free place")
        with house.queue() as client:
            assert served(client)


@on(HOUSES)
def test_a_place_is_given_back_whatever_is_streamed_and_however_it_ends(house):
    for kind in ("sync", "async", "iterable", "queue", "async-queue") * 2:
        for number in range(MAX_STREAMS - 1 if house.on_loop and kind in ("sync", "iterable") else MAX_STREAMS + 1):
            key = house.key()
            with house.stream(f"{kind}/{key}") as client:
                assert served(client), number
                if "queue" not in kind:
                    house.open_gate(key)
                    client.next_message()
            # An iterator of one's own over the queue is silent under WSGI, where only a write shows that one has left.
            until(lambda key=key: house.send(key, "news", "") or not house.registered, what="a free place")
        with house.stream(f"list/{house.key()}") as client:
            client.wait_closed()
            assert client.ended
            assert len(client.messages) == 2
        with house.stream(f"safe/failing/sync/{house.key()}") as client:
            client.wait_closed()
        for path in (f"safe/failing/at-once/{house.key()}", f"safe/forbidden/{house.key()}", "nowhere"):
            house.request("GET", f"servers/{path}")
        house.await_empty()


@on(HOUSES)
def test_a_user_has_a_limit_of_their_own_and_whoever_is_not_logged_in_has_none(house):
    with ExitStack() as stack:
        one, another = {"X-User": "1"}, {"X-User": "2"}
        ones = [stack.enter_context(house.queue(**one)) for _ in range(PER_USER)]
        assert all(map(served, ones))
        path = f"queue/{house.key()}"
        check_refusal(lambda headers: house.stream(path, headers=headers | one), 'DJANGO_SSE["MAX_STREAMS_PER_USER"]')
        with house.queue(**another) as client:
            assert served(client)
        house_is_full = MAX_STREAMS - PER_USER
        until(lambda: house.registered["streams"] == PER_USER, what="the end of the other's stream")
        with ExitStack() as strangers:
            clients = [strangers.enter_context(house.queue()) for _ in range(house_is_full)]
            assert all(map(served, clients))
            check_refusal(partial(house.stream, path), 'DJANGO_SSE["MAX_STREAMS"]')
        until(lambda: house.registered["streams"] == PER_USER, what="the end of the strangers' streams")

        ones[0].close()
        until(lambda: house.registered["streams"] < PER_USER, what="a free place")
        with house.queue(**one) as client:
            assert served(client)


@on(HOUSES)
def test_a_view_may_count_by_whatever_owner_it_names(house):
    path = f"safe/tenant/{house.key()}"
    with ExitStack() as stack:
        for user in range(PER_USER):
            # Who the user is does not matter to this view.
            headers = {"X-Tenant": "red", "X-User": str(user)}
            assert served(stack.enter_context(house.stream(path, headers=headers)))
        red, blue = {"X-Tenant": "red"}, {"X-Tenant": "blue"}
        check_refusal(lambda headers: house.stream(path, headers=headers | red), 'DJANGO_SSE["MAX_STREAMS_PER_USER"]')
        with house.stream(path, headers=blue) as client, house.stream(path) as anybody:
            assert served(client)
            assert served(anybody)


@on(ASGI_HOUSES)
def test_sync_iterators_under_asgi_have_a_limit_of_threads_and_the_rest_of_the_streams_does_not(house):
    keys = [house.key() for _ in range(THREADS)]
    with ExitStack() as stack:
        for kind, key in zip(itertools.cycle(("sync", "iterable")), keys, strict=False):
            assert served(stack.enter_context(house.stream(f"{kind}/{key}")))
        key = house.key()
        check_refusal(partial(house.stream, f"sync/{key}"), 'DJANGO_SSE["THREADS"]')
        assert house.story(key) == {"started": 0, "closed": 0}
        check_refusal(partial(house.stream, f"list/{key}"), 'DJANGO_SSE["THREADS"]')
        assert house.registered["streams"] == THREADS
        for path in (f"async/{key}", f"queue/{key}"):
            with house.stream(path) as client:
                assert served(client)
        house.open_gate(keys[0])
        house.open_gate(keys[1])
    house.await_empty()  # a thread ends a moment after its stream
    with house.stream(f"list/{house.key()}") as client:
        client.wait_closed()
        assert len(client.messages) == 2


@on(HOUSES)
def test_a_client_that_leaves_while_the_view_decides_leaves_nothing_behind(house):
    channels = [house.key() for _ in range(MAX_STREAMS)]
    clients = [house.stream(f"safe/undecided/{channel}") for channel in channels]
    for channel in channels:
        until(lambda channel=channel: house.story(channel)["started"], what=f"the start of {channel}")
    for client in clients:
        client.close()
    # Once the server has seen it, which it shows by no sign: all places are free then, and the views still decide.
    assert not house.registered
    for channel in channels:
        house.open_gate(channel)
    for channel in channels:
        until(lambda channel=channel: house.story(channel)["closed"], what=f"the decision on {channel}")
    house.await_empty()


# --- what an error tells --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def debug_houses(redis_server):
    """Servers of the same kinds with `DEBUG`, in which Django shows whatever it knows."""
    running = {}
    env = {"TEST_REDIS_LOCATION": redis_server.location, "TEST_DEBUG": "yes"}
    with ExitStack() as stack:

        def house(name, app):
            if (name, app) not in running:
                server = serve(name, settings=SETTINGS, env=env, app=app and f"tests.asgi:{app}")
                running[name, app] = House(stack.enter_context(server))
            return running[name, app]

        yield house


@pytest.mark.parametrize("kind", ["sync", "async", "at-once", "queue"])
@pytest.mark.parametrize("house", [("runserver", None), *HOUSES], ids=ids)
def test_an_exception_in_an_iterator_tells_the_client_nothing_even_with_debug(debug_houses, house, kind):
    house = debug_houses(*house)
    key = house.key()
    with house.stream(f"safe/failing/{kind}/{key}") as client:
        client.wait_for(OPENING)
        if kind == "queue":
            house.send(key, "news", "")
        client.wait_closed()
        assert client.status == 200
        assert client.ended
        assert client.excess == b""
        received = client.body
    assert received == OPENING + (b"event: before\ndata: \n\n" if kind in ("sync", "async") else b"")
    line = f"reason=error .* path=/servers/safe/failing/{kind}/{key}\n"
    until(lambda: re.search(line, house.log()), what="the line in the log")
    assert SECRET in re.split(line, house.log())[1]


# --- channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["news", "*", "shop:*", "other:news", "..%2Fother:news", "%2A", "n[e]ws", "%00news"])
@on(HOUSES)
def test_a_url_reaches_only_channels_with_the_prefix(house, redis_server, name):
    redis = redis_server.client()
    with house.stream(f"safe/any/{name}") as client:
        assert served(client)
        [channel] = redis.pubsub_channels()
        assert channel.startswith(PREFIX.encode())
        assert redis.pubsub_numpat() == 0
        plain = channel.removeprefix(PREFIX.encode())
        # Another application, and this one without its prefix, are on the same Redis.
        for stranger in (plain, b"other:" + plain, b"news", b"other:news", b"anything"):
            assert redis.publish(stranger, '["news", "from elsewhere"]') == 0
        assert redis.publish(channel, '["news", "from the outside"]') == 1
        assert client.next_message() == Message("news", "from the outside")
        house.request("POST", f"servers/safe/send-any/{name}")
        assert client.next_message() == Message("news", "from the inside")
    until(lambda: not redis.pubsub_channels(), what="the end of the subscription")


class Names(RedisQueueView):
    """Notes what channels the package speaks of."""

    seen = ()

    def get_redis_channel(self):
        assert self.redis_channel == "room"
        return self.redis_channel


@pytest.mark.parametrize("broker", ["redis", "memory:"])
def test_the_prefix_is_for_the_broker_alone(redis_server, broker):
    """The program's own names, old and new, stay as they are."""
    location = redis_server.location if broker == "redis" else broker
    with override_settings(
        REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": location},
        REDIS_SSEQUEUE_CHANNEL_NAME="room",
        DJANGO_SSE={"CHANNEL_PREFIX": PREFIX},
    ):
        assert RedisQueueView.redis_channel == "room"
        with closing(Names.as_view()(RequestFactory().get("/"))) as response:
            chunks = iter(response)
            assert next(chunks) == OPENING
            [stream] = open_streams.all()
            assert stream.account.info.channels == ("room",)
            if broker == "redis":
                assert redis_server.client().pubsub_channels() == [b"shop:room"]
            send_event("default", "1")
            send_event("named", "2", "room")
            send_event("prefixed twice", "nobody hears that", "shop:room")
            send_event("named", "3", channel="room")
            expected = b"event: default\ndata: 1\n\nevent: named\ndata: 2\n\nevent: named\ndata: 3\n\n"
            received = b""
            while len(received) < len(expected):
                received += next(chunks)
            assert received == expected
