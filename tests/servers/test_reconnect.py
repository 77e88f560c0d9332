"""
Promise R, resume: whoever comes back gets exactly what was missed, in order and once, or is told that it is gone.

`pytest -s` tells what was counted.
"""

import base64
import json
import random
import sys
import threading
import time
import uuid
from array import array
from collections import Counter
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from urllib.parse import quote

import pytest
from django.test import override_settings

from django_sse.redisqueue import cursor, send_event, send_events
from tests.helpers.client import request
from tests.helpers.eventsource import Parser
from tests.helpers.process import Process
from tests.helpers.servers import ROOT, serve
from tests.servers.reconnect_clients import Client, Reader, Traffic
from tests.servers.reconnect_publish import publish

pytestmark = [pytest.mark.server, pytest.mark.heavy]

SETTINGS = "tests.servers.reconnect_settings"
HISTORY = {"HISTORY": {"SIZE": 150_000}}  # more events than any test publishes

CLIENTS = 200
EVENTS = 100_000
STAY, AWAY = 5, 0.3  # seconds, on average
VISITS = 8  # in which a client gets its events, were it for their number alone

#: How each publisher publishes, where, and its share of all events; it numbers them from its place here times SPAN on.
PUBLISHERS = (("batched", "a", 0.08), ("batched", "b,c", 0.45), ("batched", "b,c", 0.45), ("singly", "a", 0.02))
SPAN = 1_000_000
#: One of the last events, on each channel in turn.
LAST = len(PUBLISHERS) * SPAN
#: What the clients listen to, in turn: most to the channel with the fewest events, and some to all.
PATHS = (*(f"/queue/{channels}" for channels in ("a", "b", "c", "a,b,c")), *["/queue/a"] * 16)

RETURNING = 1000  # clients that come back at once
READS = 3  # of Redis, for each channel, that a fresh process may need for all of them

REPLAYED_BYTES = 500  # of each event that is replayed

REFUSALS = (400, 413, 414, 431)  # what servers answer to a request that they do not like the size or the bytes of


@pytest.fixture
def redis(redis_server):
    """The session's Redis, as this process, too, publishes to it."""
    connection = {"location": redis_server.location}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection, DJANGO_SSE=HISTORY):
        yield redis_server.client()


@pytest.fixture
def start(redis_server):
    """Start a server: `start(name, app)`."""
    with ExitStack() as stack:

        def start(name, app=None, location=redis_server.location):
            env = environment(location)
            app = app and f"tests.servers.applications:{app}"
            return stack.enter_context(serve(name, settings=SETTINGS, env=env, app=app, threads=3 * CLIENTS))

        yield start


@pytest.fixture
def traffic():
    with Traffic() as traffic:
        yield traffic


def environment(location):
    # Under WSGI a client that has left is seen by what is sent to it.
    return {"TEST_REDIS_LOCATION": location, "TEST_DJANGO_SSE": json.dumps({**HISTORY, "HEARTBEAT": 0.5})}


def arrived(clients):
    """Whether each of the clients knows where it is in its channels."""
    return all(client.last_id for client in clients)


def channels_of(client):
    return client.path.partition("?")[0].rpartition("/")[2].split(",")


# --- the instrument ---------------------------------------------------------------------------------------------------


def test_the_fast_reader_reads_as_an_event_source_does():
    blocks = [f"id: i{number}\nevent: n\ndata: {number}\n\n" for number in range(30)]
    blocks += ["id: other\n\n", "id\n\n", ": still here\n\n", "retry: 100\n\n", "event: n\ndata: 77\n\n", "\n"]
    blocks += [
        "event: reset\nid: x\ndata: {}\n\n",
        "data: id: 1\n\n",
        "id: p\nevent: n\ndata: 7 xxx\n\n",
        "event: n\n\n",
    ]
    for _ in range(300):
        body = "".join(random.choices(blocks, k=40)).encode()
        body = body[: random.randrange(len(body))]
        strict = Parser()
        expected = strict.feed(b"id: before\n\n" + body)
        numbers, messages = array("I"), []
        reader = Reader("before", numbers, messages)
        at = 0
        while at < len(body):
            size = random.choice([1, 7, 100, 1000])
            reader.feed(body[at : at + size])
            at += size
        assert list(numbers) == [int(m.data.partition(" ")[0]) for m in expected if m.event == "n"]
        assert messages == [message for message in expected if message.event != "n"]
        assert reader.last_id == strict.last_event_id


# --- at random moments ------------------------------------------------------------------------------------------------


def channel_of(number):
    """The channel on which `number` was published."""
    names = "a,b,c" if number >= LAST else PUBLISHERS[number // SPAN][1]
    names = names.split(",")
    return names[number % len(names)]


def kept(redis, channel):
    """What Redis has kept of a channel, in its order, which is that of the events."""
    log = redis.xrange(f"django-sse:log:{{{channel}}}")
    return [int(json.loads(fields[b"payload"])[1]) for _, fields in log]


def published_on(redis, events):
    """What was published, by channel, once all of that is found to be there."""
    truth = {channel: kept(redis, channel) for channel in "abc"}
    assert sum(map(len, truth.values())) == events + 6
    assert all(map(in_order, truth.values()))
    return truth


def in_order(numbers):
    """Whether the numbers of each publisher are there as it has published them."""
    for first in range(0, LAST, SPAN):
        own = [number for number in numbers if first <= number < first + SPAN]
        if own != sorted(set(own)):
            return False
    return True


class Processes:
    """Publishers, each of which is a process."""

    def __init__(self, location):
        self._env = {**environment(location), "DJANGO_SETTINGS_MODULE": SETTINGS, "PYTHONPATH": str(ROOT)}
        self._stack = ExitStack()
        self._running = []

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._stack.close()

    def publish(self, way, first, count, channels):
        command = [sys.executable, "-m", "tests.servers.reconnect_publish", way, str(first), str(count), channels]
        process = Process("publisher", command, env=self._env, cwd=ROOT)
        self._stack.callback(process.close)
        self._running.append(process)

    def over(self):
        """Whether all that was to be published is."""
        assert all(process.returncode in (None, 0) for process in self._running), [p.log() for p in self._running]
        return all(process.returncode == 0 for process in self._running)


class Threads:
    """Publishers, each of which is a thread of a server."""

    def __init__(self, server):
        self._server = server

    def publish(self, way, first, count, channels):
        assert request("GET", f"{self._server.url}/publish/{way}/{first}/{count}/{channels}")[0] == 204

    def over(self):
        return json.loads(request("GET", f"{self._server.url}/published")[2])


def come_and_go(traffic, servers, publishers, clients, events):
    """Publish events while clients come and go until each has got all; print how that was."""
    counts = [round(events * share) for _, _, share in PUBLISHERS]
    sizes = [counts[0] + counts[3], *[(counts[1] + counts[2]) // 2] * 2]
    sizes = dict(zip("abc", sizes, strict=True))
    expected = {path: sum(sizes[name] for name in path.rpartition("/")[2].split(",")) for path in PATHS}

    def lacking(more):
        return [each for each in crowd if len(each.numbers) < expected[each.path] + more * len(channels_of(each))]

    def reconnections():
        return sum(client.connections for client in crowd) - clients

    def add(path):
        client = traffic.add(Client([server.url for server in servers], path))
        client.away = partial(random.expovariate, 1 / AWAY)
        return client

    crowd = [add(PATHS[number % len(PATHS)]) for number in range(clients)]
    traffic.run(lambda: arrived(crowd), what="the position of every client")
    for client in crowd:
        size = expected[client.path] / VISITS
        client.stay = lambda size=size: (random.expovariate(1 / STAY), random.expovariate(1 / size))
        traffic.unsettle(client)
    begun = time.monotonic()
    for number, ((way, channels, _), count) in enumerate(zip(PUBLISHERS, counts, strict=True)):
        publishers.publish(way, number * SPAN, count, channels)
    traffic.run(publishers.over, what="the end of the publishers")
    published = time.monotonic() - begun
    meanwhile = reconnections()
    publishers.publish("singly", LAST, 3, "a,b,c")
    traffic.run(lambda: not lacking(1), 180, lambda: f"every event at {lacking(1)}")
    seconds = time.monotonic() - begun
    assert reconnections() >= clients
    # Once more, and what comes then is the one event that they have not seen.
    for client in crowd:
        client.stay = None
        if client.here:
            traffic.leave(client)
    publishers.publish("singly", LAST + 3, 3, "a,b,c")
    for client in crowd:
        traffic.come(client)
    traffic.run(lambda: not lacking(2), 30, lambda: f"the last event at {lacking(2)}")
    print(
        f"{events} events published in {published:.1f} s, with {meanwhile} reconnections; "
        f"{sum(len(client.numbers) for client in crowd)} arrived in {seconds:.1f} s, with {reconnections()}, "
        f"{sum(len(client.lost) for client in crowd)} of them because a server wished so"
    )


def check_exact(clients, truth):
    """Each client has got what was published on its channels, in that order, and nothing else."""
    wrong = []
    for client in clients:
        check_no_loss(client)
        for channel in channels_of(client):
            got = [number for number in client.numbers if channel_of(number) == channel]
            if got != truth[channel]:
                wrong.append(f"{client} {channel}: {difference(got, truth[channel])}")
    assert not wrong, "\n".join(wrong)


def check_no_loss(client):
    """Nothing was reset, and no connection cut off: a server that is busy may tell a client to come again, though."""
    assert client.messages == [], client
    assert set(client.lost) <= {"complete"}, client


def difference(got, expected):
    """Say where the first difference is, and how much is missing, there twice, and out of order."""
    at = next((n for n, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), len(got))
    return (
        f"{len(got)} of {len(expected)}, missing {len(set(expected) - set(got))}, twice {len(got) - len(set(got))}, "
        f"first difference at {at}: {got[max(at - 3, 0) : at + 5]} for {expected[max(at - 3, 0) : at + 5]}"
    )


@pytest.mark.heavy
@pytest.mark.timeout(240)  # seconds; it takes a quarter of it where nobody else is
def test_100_000_events_reach_200_clients_exactly_whenever_they_leave_and_wherever_they_come_back(
    start, redis, redis_server, traffic
):
    servers = [start("uvicorn", "wrapped") for _ in range(2)]
    with Processes(redis_server.location) as publishers:
        come_and_go(traffic, servers, publishers, CLIENTS, EVENTS)
    check_exact(traffic.clients, published_on(redis, EVENTS))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "app"),
    [("gunicorn-gthread", None), ("gunicorn-gevent", None), ("uvicorn", "plain")],
    ids=["gunicorn-gthread", "gunicorn-gevent", "uvicorn-plain"],
)
def test_10_000_events_reach_50_clients_exactly_on_every_kind_of_server(start, redis, redis_server, traffic, name, app):
    servers = [start(name, app) for _ in range(2)]
    with Processes(redis_server.location) as publishers:
        come_and_go(traffic, servers, publishers, 50, 10_000)
    check_exact(traffic.clients, published_on(redis, 10_000))


@pytest.mark.heavy
def test_10_000_events_reach_50_clients_exactly_within_one_process(start, traffic):
    server = start("uvicorn", "wrapped", location="memory:")
    come_and_go(traffic, [server], Threads(server), 50, 10_000)
    # Nobody else knows in which order they were published.
    truth = {client.path[-1]: list(client.numbers) for client in traffic.clients[:3]}
    assert sum(len(set(numbers)) for numbers in truth.values()) == 10_000 + 6
    assert all(map(in_order, truth.values()))
    check_exact(traffic.clients, truth)


# --- all at once ------------------------------------------------------------------------------------------------------


class Monitor:
    """What Redis is told by its clients: `commands` by name, without what their scripts do."""

    def __init__(self, redis_server):
        # Nothing may be asked for a long time, while clients are served.
        self._redis = redis_server.client(socket_timeout=None)
        self._end = uuid.uuid4().hex

    def __enter__(self):
        self.commands = Counter()
        listening = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(listening,), daemon=True)
        self._thread.start()
        assert listening.wait(10)
        return self

    def __exit__(self, *exc_info):
        self._redis.echo(self._end)
        self._thread.join(10)

    @property
    def reads(self):
        """How often something was asked for: publishing apart, of which there is none while this is looked at."""
        return sum(count for name, count in self.commands.items() if name.startswith(("EVAL", "FCALL", "X")))

    def _listen(self, listening):
        with self._redis.monitor() as monitor:
            listening.set()
            for told in monitor.listen():
                if self._end in told["command"]:
                    return
                if told["client_type"] != "lua":
                    self.commands[told["command"].partition(" ")[0].upper()] += 1


def scatter(traffic, server, count):
    """Have clients come to a server and leave it at different moments; return them and what was published."""
    crowd = [traffic.add(Client([server.url], PATHS[number % len(PATHS)])) for number in range(count)]
    traffic.run(lambda: arrived(crowd), what="the position of every client")
    total = 0
    leaving = random.sample(crowd, len(crowd))
    while leaving:
        publish("batched", total, 90, "a,b,c")
        total += 90
        traffic.run(lambda: all(caught_up(client, total) for client in leaving), what="events")  # noqa: B023
        for client in leaving[-100:]:
            traffic.leave(client)
        del leaving[-100:]
    publish("batched", total, 90, "a,b,c")
    return crowd, total + 90


def share(client, total):
    """Which of the numbers from 0 to `total` were published for a client."""
    channels = channels_of(client)
    return [number for number in range(total) if "abc"[number % 3] in channels]


def caught_up(client, total):
    return len(client.numbers) >= total * len(channels_of(client)) // 3


def come_at_once(traffic, redis_server, crowd, total):
    """Have all come in one moment; return what Redis was asked for until each has got what it had missed."""
    with Monitor(redis_server) as monitor:
        for client in crowd:
            client.away = lambda: 0.0  # it comes again if it is told to
            traffic.come(client)
        traffic.run(lambda: all(caught_up(client, total) for client in crowd), what="what was missed")
    publish("batched", total, 90, "a,b,c")
    traffic.run(lambda: all(caught_up(client, total + 90) for client in crowd), what="what came then")
    for client in crowd:
        missed = share(client, total + 90)
        # By channel: what was published on different ones has no order.
        assert sorted(client.numbers) == missed, difference(sorted(client.numbers), missed)
        for channel in "abc":
            own = [number for number in client.numbers if "abc"[number % 3] == channel]
            assert own == sorted(own), client
        check_no_loss(client)
    return monitor


@pytest.mark.heavy
def test_a_thousand_clients_that_come_to_a_new_process_at_once_cost_it_a_few_reads(start, redis, redis_server, traffic):
    with start("uvicorn", "wrapped") as old:
        crowd, total = scatter(traffic, old, RETURNING)
    new = start("uvicorn", "wrapped")
    for client in crowd:
        client.urls = [new.url]
    monitor = come_at_once(traffic, redis_server, crowd, total)
    print(f"{RETURNING} clients on 3 channels came to a new process: {dict(monitor.commands)}")
    assert 1 <= monitor.reads <= 3 * READS


@pytest.mark.heavy
def test_a_thousand_clients_that_come_back_to_their_process_at_once_are_served_from_what_it_has(
    start, redis, redis_server, traffic
):
    server = start("uvicorn", "wrapped")
    for path in ("/queue/a", "/queue/b", "/queue/c"):
        traffic.add(Client([server.url], path))  # who stays
    crowd, total = scatter(traffic, server, RETURNING)
    monitor = come_at_once(traffic, redis_server, crowd, total)
    print(f"{RETURNING} clients on 3 channels came back to their process: {dict(monitor.commands)}")
    assert monitor.reads <= 2


class Hoarder(Client):
    """Once it is `hoarding`, reads as fast as it can be served: what came is looked at when the last event is there."""

    def __init__(self, urls, path, last):
        super().__init__(urls, path)
        self._last = b"\ndata: %d " % last
        self.hoarding = False
        self.size = 0
        self.complete = False
        self._hoard = []

    def take(self, data):
        if not self.hoarding:
            super().take(data)
            return
        self._hoard.append(data)
        self.size += len(data)
        if self._last in b"".join(self._hoard[-2:]):
            self.complete = True

    def look(self):
        super().take(b"".join(self._hoard))
        self._hoard.clear()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "app", "clients", "events"),
    [
        ("uvicorn", "wrapped", 200, 1000),
        ("uvicorn", "plain", 200, 1000),
        # Greenlets take turns, of one page each: as much in all, in more turns of fewer.
        ("gunicorn-gevent", None, 50, 4000),
    ],
    ids=["uvicorn-wrapped", "uvicorn-plain", "gunicorn-gevent"],
)
def test_events_of_others_go_on_arriving_while_many_replay(start, redis, traffic, name, app, clients, events):
    server = start(name, app)
    witness = traffic.add(Client([server.url], "/queue/live"))
    crowd = [traffic.add(Hoarder([server.url], "/queue/old", events - 1)) for _ in range(clients)]
    traffic.run(lambda: arrived([witness, *crowd]), what="the position of every client")
    for client in crowd:
        traffic.leave(client)
    padding = "x" * REPLAYED_BYTES
    send_events([("n", f"{number} {padding}") for number in range(events)], "old")

    # One event after the other, each sent when the one before it has come.
    arrivals = []  # how far the replay was at each

    def over():
        if len(witness.numbers) == len(arrivals):
            arrivals.append(sum(client.size for client in crowd))
            send_event("n", len(arrivals), "live")
        return all(client.complete for client in crowd)

    for client in crowd:
        client.hoarding = True
        traffic.come(client)
    begun = time.monotonic()
    traffic.run(over, what="the end of the replay")
    seconds = time.monotonic() - begun
    whole = sum(client.size for client in crowd)
    longest = max(later - earlier for earlier, later in pairwise([*arrivals, whole])) / whole
    print(
        f"{len(arrivals)} events arrived while {whole / 2**20:.0f} MiB were replayed in {seconds:.1f} s; at most "
        f"{longest:.0%} of it happened between two"
    )
    for client in crowd:
        client.look()
        assert list(client.numbers) == list(range(events))
        check_no_loss(client)
    assert longest < 3 / 4


# --- ids that are none ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def houses(redis_server):
    """Call with the name of a server and of an application: the server of that kind in this module."""
    running = {}
    with ExitStack() as stack:

        def house(name, app):
            if (name, app) not in running:
                app_path = app and f"tests.servers.applications:{app}"
                server = serve(
                    name, settings=SETTINGS, env=environment(redis_server.location), app=app_path, threads=900
                )
                running[name, app] = stack.enter_context(server)
            return running[name, app]

        yield house


@pytest.fixture
def house(request, houses):
    return houses(*request.param)


def on(which):
    return pytest.mark.parametrize("house", which, indirect=True, ids=lambda house: "-".join(filter(None, house)))


HOUSES = on([("uvicorn", "wrapped"), ("uvicorn", "plain"), ("gunicorn-gthread", None), ("gunicorn-gevent", None)])


@pytest.fixture
def seen(house, redis, traffic):
    """A channel that nobody else has, and the id with which a client has left it before five events were sent."""
    channel = uuid.uuid4().hex
    return channel, leave_behind(house, traffic, channel)


def leave_behind(house, traffic, channels, events=5):
    """Return the id of a client that has left before some events were sent on each of its channels."""
    path = f"/queue/{channels}"
    client = traffic.add(Client([house.url], path))
    traffic.run(lambda: arrived([client]), what="a position")
    traffic.leave(client)
    names = channels.split(",")
    for name in names:
        send_events([("n", str(number)) for number in range(events)], name)
    # One that comes back shows that the process has them, too: else they are still to come for whoever comes now.
    witness = traffic.add(Client([house.url], path, client.last_id))
    traffic.run(lambda: len(witness.numbers) == events * len(names), what="what was missed")
    return client.last_id


def reset(*channels, reason="unknown"):
    return {"channels": list(channels), "reason": reason}


def resets(client):
    assert {message.event for message in client.messages} <= {"stream-reset"}, client
    return [json.loads(message.data) for message in client.messages]


def check_unknown(traffic, channel, clients):
    """Each client is told once that its position is unknown, gets no event of before, and every one from now on."""
    traffic.run(lambda: all(client.messages or client.lost for client in clients), 20, "an answer to every client")
    send_event("n", "1000", channel)
    traffic.run(lambda: all(client.numbers or client.lost for client in clients), 20, "the next event")
    for client in clients:
        assert client.status == 200, client
        assert resets(client) == [reset(channel)], client
        assert list(client.numbers) == [1000], client


def altered(id):
    """What an id becomes when one bit of it is another, one character, or a part is missing or too many."""
    raw = base64.urlsafe_b64decode(id + "=" * (-len(id) % 4))
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        yield base64.urlsafe_b64encode(flipped).rstrip(b"=").decode()
    for at, character in enumerate(id):
        yield id[:at] + ("A" if character != "A" else "B") + id[at + 1 :]
    yield from (id[:size] for size in range(1, len(id)))
    yield from (id[size:] for size in range(1, len(id)))
    yield from (id + id, id + "A", id + "=", id + "==", id + "!", "!" + id, id[::-1], id.swapcase(), f'"{id}"')


@HOUSES
def test_an_id_is_understood_as_it_was_given_and_in_no_other_form(house, traffic, seen):
    channel, id = seen
    path = f"/queue/{channel}"
    (client, *clients) = [traffic.add(Client([house.url], path, one)) for one in (id, *altered(id))]
    traffic.run(lambda: len(client.numbers) >= 5, what="what was missed")
    check_unknown(traffic, channel, clients)
    traffic.run(lambda: len(client.numbers) >= 6, what="what was published last")
    assert list(client.numbers) == [0, 1, 2, 3, 4, 1000]
    assert client.messages == []
    check_log(house)


NONSENSE = [
    *(b"1", b"-1", b"0", b"null", b"undefined", b"1700000000000-0", b"{}", b"[1, 2]", b"true", b"../../etc/passwd"),
    *(b"%00%ff", b"%0d%0a", b"=", b"====", b"-", b"_", b"A" * 4096, b"A" * 4097, "é€𝄞".encode(), b"\xff\xfe\x80\xc0"),
    *(b"\x01\x02\x03", b"\x00", b"\x7f", b"a\tb", b"\x1b[31m"),
    *(b"A" * 100_000, b"\xff" * 100_000),
]
#: What only a query can carry.
LINES = (
    b"\r\n",
    b"\r\ndata: 6\r\n\r\n",
    b"\n\nevent: n\ndata: 6\n\n",
    b"\rid: 1\r\r",
    b"a\nb",
    b"&",
    b" ",
    b"+",
    b"\0" * 30,
)


@HOUSES
def test_nonsense_is_an_unknown_id_and_no_error(house, traffic, seen):
    channel, _ = seen
    path = f"/queue/{channel}"
    clients = [Client([house.url], path, header=nonsense) for nonsense in NONSENSE]
    clients += [Client([house.url], f"{path}?last_event_id={quote(one)}") for one in (*NONSENSE, *LINES)]
    for client in clients:
        traffic.add(client)
    traffic.run(lambda: all(client.status or client.lost for client in clients), 20, "an answer to every client")
    # Of some, and of what is too long, servers have an opinion of their own.
    refused = [client for client in clients if client.status != 200]
    assert {client.status for client in refused} <= {None, *REFUSALS}
    print(f"{len(refused)} of {len(clients)} were refused by the server itself")
    assert len(refused) <= len(clients) / 4
    check_unknown(traffic, channel, [client for client in clients if client.status == 200])
    check_log(house)


@HOUSES
def test_an_id_shows_nothing_but_the_channels_of_this_view(house, traffic, seen):
    mine, _ = seen
    other = uuid.uuid4().hex
    for channels in (other, f"{other},{uuid.uuid4().hex}"):
        client = traffic.add(Client([house.url], f"/queue/{mine}", leave_behind(house, traffic, channels)))
        check_unknown(traffic, mine, [client])


@HOUSES
def test_an_id_that_was_signed_with_another_key_is_unknown(house, traffic, seen):
    channel, _ = seen
    with override_settings(SECRET_KEY="of somebody else"):
        id = cursor(channel)
    check_unknown(traffic, channel, [traffic.add(Client([house.url], f"/queue/{channel}", id))])


@HOUSES
def test_of_each_channel_what_the_id_knows_is_resumed_and_the_rest_is_reset(house, traffic, redis):
    one, two, three = (uuid.uuid4().hex for _ in range(3))
    id = leave_behind(house, traffic, f"{one},{two}", events=2)
    more = traffic.add(Client([house.url], f"/queue/{three},{two},{one}", id))
    less = traffic.add(Client([house.url], f"/queue/{two}", id))
    traffic.run(lambda: len(more.numbers) == 4 and more.messages and len(less.numbers) == 2, what="what was missed")
    for channel in (one, two, three):
        send_event("n", "1000", channel)
    traffic.run(lambda: len(more.numbers) == 7 and len(less.numbers) == 3, what="what came then")
    assert sorted(more.numbers) == [0, 0, 1, 1, 1000, 1000, 1000]
    assert resets(more) == [reset(three)]
    assert list(less.numbers) == [0, 1, 1000]
    assert resets(less) == []


def check_log(house):
    log = house.log()
    assert "Traceback" not in log
    assert "Internal Server Error" not in log
