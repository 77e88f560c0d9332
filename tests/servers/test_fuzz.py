"""
Promise S against whatever comes: random requests, most of them rude, to one process, which is then as it was before.

The seed is printed; with it in `DJANGO_SSE_FUZZ_SEED` the same requests are made again, though not at the same moments.
"""

import contextlib
import json
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from tests.helpers import census
from tests.helpers.eventsource import Message
from tests.helpers.need import need_module
from tests.helpers.wait import until
from tests.servers.driver import Driver
from tests.servers.safe_views import SECRET

pytestmark = [pytest.mark.server, pytest.mark.heavy]

HEARTBEAT = 1  # seconds
SLACK = 3  # seconds that a busy machine may take for it
MAX_STREAMS = 8  # fewer than there are clients at times: some are refused
THREADS = 3  # of sync iterators
CLIENTS = 6  # threads that make requests
HELD = 5  # connections that each of them leaves open at most, before the oldest is closed
PATIENCE = 0.5  # seconds for which a client waits for an answer
CHANNELS = tuple(f"fuzz-{number}" for number in range(6))
POOLS = ("asyncio_", "uvloop_", "ThreadPoolExecutor-")
LOOKS = 3  # at what the process holds, each the same: it is at rest

METHODS = ("GET",) * 12 + ("HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "get", "FUZZ")
PATHS = (
    *(f"/servers/queue/{channel}" for channel in CHANNELS),
    *("/servers/queue/%00%ff", "/servers/queue/*", "/servers/queue/" + "x" * 200),
    *("/servers/safe/ticks/sync", "/servers/safe/ticks/async", "/servers/list/fuzz", "/servers/safe/last-id"),
    *("/servers/safe/forbidden/fuzz", "/servers/safe/get-only/fuzz", "/servers/safe/failing/sync/fuzz"),
    *("/servers/safe/failing/async/fuzz", "/servers/nowhere", "/ping", "//", "/servers/queue/", "*", "http://x/ping"),
)
LAST_IDS = (
    *(b"", b"0", b"7", b"-1", b" ", b"a" * 4000, b"1" * 400, b"\xe9\xff", "\u00e9\u2028\U0001f600".encode()),
    *(
        b"%00",
        b"\\0",
        b"\\r\\nX-Injected: yes",
        b"%0D%0AX-Injected:%20yes",
        b"1\n\ndata: injected",
        b"1\r\nX-Injected: yes",
    ),
    *(b"null", b'{"a": 1}', b"\xc3", b"\xed\xa0\x80", b"1,2,3", b"\t7\t"),
)
ACCEPTS = (
    b"text/event-stream",
    b"*/*",
    b"application/json",
    b"",
    b",,;q=x",
    b"text/event-stream;q=0",
    b"\xff\xfe",
    b"a" * 2000,
)
OTHERS = (
    *(
        b"Cookie: sessionid=\xff; a=b=c;;",
        b"Accept-Encoding: gzip, br",
        b"If-None-Match: *",
        b"Range: bytes=0-1",
        b"X-User: 7",
    ),
    *(
        b"If-Modified-Since: never",
        b"Content-Type: multipart/form-data; boundary=\xff",
        b"Connection: close",
        b"X-User: 8",
    ),
    *(
        b"Accept-Language: \xe9,de;q=2",
        b"Forwarded: for=x",
        b"Expect: 100-continue",
        b"Connection: keep-alive, Upgrade",
    ),
    *(b"Upgrade: websocket", b"Authorization: Basic !!", b"X-HTTP-Method-Override: DELETE", b"X-Long: " + b"y" * 6000),
    *(b"X-Django-Sse-Handover: yes", b"Cache-Control: no-cache", b"Origin: null", b"Host: [::1", b"X-Tenant:"),
)
# What uvicorn says of a client that has reset the connection while it was answered, whatever the application.
UVICORNS_OWN = re.compile(
    r"^ERROR:    Exception in ASGI application\n(?:.*\n)*?RuntimeError: unable to perform operation on <TCPTransp.*\n"
    r"|^ERROR:    ASGI callable returned without completing response\.\n",
    re.MULTILINE,
)
# The iterators that fail do so by themselves; a refusal is an error to Django.
EXPECTED = (
    "ERROR (django_sse.streams: stream closed: reason=(?:error|client) .* path=/servers/safe/failing/"
    "|django.request: Service Unavailable: )"
)
CONTINUE = re.compile(rb"^HTTP/1\.1 100 .*\r\n\r\n")
# How a request is sent, and what its client does then.
MANNERS = (
    ("read",) * 4 + ("hold",) * 2 + ("leave", "reset", "half close", "line", "headers", "body", "garbage", "again")
)


class House(Driver):
    """A running server of which all that it holds can be counted."""

    def __init__(self, server, redis):
        super().__init__(server)
        self.pid = server.pid
        self.returncode = lambda: server.returncode
        self.redis = redis

    def held(self):
        """How much of everything this process holds, the request included that asks."""
        told = json.loads(self.request("GET", "servers/census/process?collect")[2])
        channels, connections = census.subscriptions(self.redis)
        return {
            **told["registered"],
            # Those of the server and of the loop stay when they have once been needed.
            "threads": sum(not name.startswith(POOLS) for name in told["threads"]),
            "descriptors": census.descriptors(self.pid).total(),
            "channels in Redis": channels,
            "connections for them": connections,
        }

    def holds_no_more_than(self, before):
        held = self.held()
        return all(held[what] <= number for what, number in before.items())

    def at_rest(self):
        looks = []

        def calm():
            looks.append(self.held())
            return looks[-LOOKS:] == LOOKS * looks[-1:]

        until(calm, what="rest")
        return looks[-1]


class Client:
    """Makes requests out of one source of chance, and counts the answers."""

    def __init__(self, url, seed, held):
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.chance = random.Random(seed)
        self.answers = Counter()
        self.held = []
        self.max_held = held

    def request(self):
        """Return the head of a random request, and its body."""
        chance = self.chance
        method, path = chance.choice(METHODS), chance.choice(PATHS)
        lines = [f"{method} {path} HTTP/1.{chance.choice('1110')}".encode()]
        lines.append(b"Host: 127.0.0.1" if chance.random() < 0.97 else b"Host: \xff..bad_")
        if chance.random() < 0.8:
            lines.append(b"Accept: " + chance.choice(ACCEPTS))
        for _ in range(chance.choice((0, 0, 1, 1, 1, 2))):
            lines.append(b"Last-Event-ID: " + chance.choice(LAST_IDS))
        lines += chance.sample(OTHERS, chance.randrange(4))
        body = b""
        if chance.random() < 0.2 or method in ("POST", "PUT", "PATCH"):
            body = chance.randbytes(chance.choice((0, 1, 100, 20_000)))
            if chance.random() < 0.7:
                lines.append(b"Content-Length: %d" % len(body))
            else:
                lines.append(b"Transfer-Encoding: chunked")
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        return b"\r\n".join([*lines, b"", b""]), body

    def run(self, n):
        try:
            for _ in range(n):
                # Whatever the server does with the connection is its right; what it must not do is looked at later.
                with contextlib.suppress(OSError):
                    self.make_one()
        finally:
            for connection in self.held:
                connection.close()
        return self.answers

    def make_one(self):
        chance = self.chance
        manner = chance.choice(MANNERS)
        head, body = self.request()
        connection = socket.create_connection(self.address, timeout=1)
        try:
            if manner == "line":
                connection.sendall(head[: chance.randrange(1, head.index(b"\r\n"))])
            elif manner == "headers":
                connection.sendall(head[: chance.randrange(head.index(b"\r\n"), len(head) - 2)])
            elif manner == "body":
                head = re.sub(rb"\r\n(Content-Length|Transfer-Encoding):[^\r]*", b"", head)
                connection.sendall(
                    head[:-2] + b"Content-Length: 100000\r\n\r\n" + chance.randbytes(chance.randrange(999))
                )
            elif manner == "garbage":
                connection.sendall(chance.randbytes(chance.randrange(1, 3000)) + b"\r\n\r\n")
            else:
                connection.sendall(head + body)
            self.finish(manner, connection)
        except BaseException:
            connection.close()
            raise

    def finish(self, manner, connection):
        connection.settimeout(PATIENCE)
        if manner in ("read", "again", "hold", "half close", "garbage"):
            if manner == "half close":
                connection.shutdown(socket.SHUT_WR)
            streams = self.read(connection)
        if manner == "again":
            connection.sendall(b"".join(self.request()))
            if not streams:  # else the connection is busy with the first request for ever
                self.read(connection)
        if manner == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if manner == "hold" and self.max_held:
            self.held.append(connection)
            if len(self.held) > self.chance.randrange(1, self.max_held):
                self.held.pop(0).close()
        else:
            connection.close()

    def read(self, connection):
        """Take the head of the answer, and count it by its status; return whether it is a stream."""
        received = b""
        with contextlib.suppress(TimeoutError):
            while b"\r\n\r\n" not in received and (more := connection.recv(65536)):
                # Without what precedes an answer to who expects it.
                received = CONTINUE.sub(b"", received + more)
        status = re.match(rb"HTTP/1\.. (\d+)", received)
        self.answers[status[1].decode() if status else "none"] += 1
        self.answers["streams"] += b"text/event-stream" in received
        assert b"x-injected: yes\r\n" not in received.lower()
        return b"text/event-stream" in received


def deliver(house):
    """Check that a stream of each kind, with events that are sent now, is as ever."""
    channel = house.key()
    with house.stream(f"queue/{channel}") as client:
        assert client.status == 200
        house.send(channel, "news", "still here")
        assert client.next_message() == Message("news", "still here")
    for kind in ("sync", "async"):
        with house.stream(f"safe/ticks/{kind}") as client:
            assert client.next_message().event == "tick"


@pytest.mark.parametrize(
    ("name", "app", "n", "held"),
    [
        ("uvicorn", "application", 10_000, HELD),
        ("uvicorn", "plain", 1000, HELD),
        # Its one thread that accepts waits for seconds for a client that does not close a connection it is to close.
        ("gunicorn-gthread", None, 500, 0),
    ],
    ids=["uvicorn-application", "uvicorn-plain", "gunicorn-gthread"],
)
def test_random_requests_leave_a_process_as_it_was(redis_server, serve, name, app, n, held):
    if name == "uvicorn":
        need_module("httptools")  # with its other parser, h11, uvicorn itself fails at requests that are none
    seed = int(os.environ.get("DJANGO_SSE_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
    print("seed:", seed)
    settings = {"HEARTBEAT": HEARTBEAT, "MAX_STREAMS": MAX_STREAMS, "THREADS": THREADS, "MAX_STREAMS_PER_USER": 3}
    env = {"TEST_REDIS_LOCATION": redis_server.location, "TEST_DJANGO_SSE": json.dumps(settings)}
    # Without WebSockets, whose libraries fail at a Host that is none. A connection that waits for its next request has
    # the context of the last one; and where Django gave up on that while its middleware ran, asgiref's thread with it.
    extra = ("--no-access-log", "--ws", "none", "--timeout-keep-alive", HEARTBEAT) if name == "uvicorn" else ()
    options = {"app": app and f"tests.asgi:{app}", "extra": extra}
    house = House(serve(name, settings="tests.servers.safe_settings", env=env, **options), redis_server.client())

    warm_up(house)
    before = house.at_rest()
    over = threading.Event()
    publisher = threading.Thread(target=publish, args=(house, over))
    publisher.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [Client(house.url, f"{seed} {number}", held) for number in range(CLIENTS)]
            answers = sum(pool.map(lambda client: client.run(n // CLIENTS), clients), Counter())
    finally:
        over.set()
        publisher.join()
    print(sorted(answers.items()))

    check_answers(answers)
    try:
        # A server that does not read, for another request waits, hears of the end by its second write into it.
        until(lambda: house.holds_no_more_than(before), 2 * HEARTBEAT + SLACK, "what was held before")
    except AssertionError as error:
        raise AssertionError(f"{error}: {before}; held: {house.held()}; seed: {seed}") from None
    deliver(house)
    assert house.returncode() is None
    log = UVICORNS_OWN.sub("", house.log())
    errors = re.findall("^(?:ERROR|CRITICAL).*", log, re.MULTILINE)
    assert [line for line in errors if not re.match(EXPECTED, line)] == []
    raised = re.findall(r"^Traceback .*\n(?:[ \n].*\n|\n)*(.*)", log, re.MULTILINE)
    assert [error for error in raised if error != f"RuntimeError: {SECRET}"] == []
    assert log.count("Traceback") == len(raised)
    assert "never awaited" not in log


def warm_up(house):
    """Have everything started that a process starts once."""
    deliver(house)
    with ExitStack() as stack:
        clients = [stack.enter_context(house.stream(f"queue/{channel}")) for channel in CHANNELS for _ in range(2)]
        for client in clients:
            assert client.status == 200
    until(lambda: not house.held()["streams"], what="the end of the streams")


def publish(house, over):
    """Have something to deliver all the time."""
    while not over.wait(0.01):
        for channel in CHANNELS:
            house.redis.publish(channel, '["news", "while others are rude"]')


def check_answers(answers):
    """Nobody got an error of the server, and every kind of answer was among them."""
    assert {status for status in answers if status.startswith("5")} <= {"503", "501", "505"}, answers
    for status in ("200", "streams", "400", "403", "404", "503", "none"):
        assert answers[status], (status, answers)
