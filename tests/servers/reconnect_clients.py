"""
Clients that leave and come back: each reads as a browser's EventSource does, and comes with the last id that it saw.

    with Traffic() as traffic:
        clients = [traffic.add(Client([server.url], "/queue/news")) for _ in range(200)]
        traffic.run(lambda: all(client.last_id for client in clients))

One thread reads them all, and there are millions of events, so that those that look as they should are not taken apart
line by line. Whatever looks different, and the last of each run of those, is read by the rules of the standard.
"""

import heapq
import itertools
import math
import os
import random
import re
import selectors
import socket
import struct
import time
from array import array
from urllib.parse import urlsplit

from tests.helpers.eventsource import Parser

READ_SIZE = 2**18  # bytes asked of a socket at once
HASTY = 0.1  # of the clients that leave by themselves do not wait for the answer
RETRY = 0.1  # seconds after which a client comes back whose connection was ended by the other side

#: One after the other, events of the type `n` with an id, whose data begin with a number.
RUN = re.compile(rb"(?:id: [^\r\n]+\nevent: n\ndata: \d+(?: [^\r\n]*)?\n\n)+")
NUMBER = re.compile(rb"\ndata: (\d+)")


class Reader:
    """
    The body of one response as an EventSource reads it that begins with `last_id`.

    `numbers` are added to an array, in which a client has all that it ever got; `messages` are all others.
    """

    def __init__(self, last_id, numbers, messages):
        self._numbers = numbers
        self._messages = messages
        self._rest = b""
        self._parser = Parser()
        # An id holds until the next one, also when the next connection has begun.
        self._parser.feed(b"id: %s\n\n" % last_id.encode())

    @property
    def last_id(self):
        return self._parser.last_event_id

    @property
    def comments(self):
        return self._parser.comments

    def feed(self, data):
        """Take some bytes of the body; what is not a whole block waits for the rest."""
        data = self._rest + data
        at = 0
        while True:
            run = RUN.match(data, at)
            if run:
                last = data.rfind(b"\n\n", at, run.end() - 2)
                last = at if last == -1 else last + 2
                self._numbers.extend(map(int, NUMBER.findall(data, at, last)))
                at = last
            end = data.find(b"\n\n", at) + 2
            if end == 1:
                break
            for message in self._parser.feed(data[at:end]):
                if message.event == "n":
                    self._numbers.append(int(message.data.partition(" ")[0]))
                else:
                    self._messages.append(message)
            at = end
        self._rest = data[at:]
        # Nothing of ours ends a line with one, and what is cut at "\n\n" would be cut elsewhere if it did.
        assert b"\r" not in self._rest, self._rest


class Client:
    """
    A page with an EventSource of `path`, on one of the servers `urls`, whichever.

    `numbers` are those of the events that it got, on all its connections; `messages` are what is not such an event;
    `last_id` is what it comes back with. `status` is that of the last response. `connections` counts the responses,
    `lost` those that the server ended.

    `stay` returns after how many seconds, and how many events, it leaves, whichever is first, `away` after how many
    seconds it comes back: None where only the test says so.
    """

    def __init__(self, urls, path, last_id="", *, header=None, stay=None, away=None):
        self.urls = urls
        self.path = path
        self.last_id = last_id
        self.stay = stay
        self.away = away
        self.numbers = array("I")
        self.messages = []
        self.status = None
        self.connections = 0
        self.lost = []
        #: With how many numbers it leaves.
        self.enough = math.inf
        self._header = header  # bytes that are sent as Last-Event-ID, whatever has come
        self._socket = None

    def __repr__(self):
        return (
            f"<Client {self.path} status={self.status} connections={self.connections} lost={self.lost} "
            f"{len(self.numbers)} numbers {self.messages[:3]} last_id={self.last_id!r}>"
        )

    @property
    def here(self):
        """Whether it has a connection."""
        return self._socket is not None

    def knock(self):
        """Begin to connect; return the socket."""
        parts = urlsplit(random.choice(self.urls))
        self._request = f"GET {self.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: text/event-stream\r\n".encode()
        header = self.last_id.encode() if self._header is None else self._header
        if header:
            self._request += b"Last-Event-ID: " + header + b"\r\n"
        self._request += b"\r\n"
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.connect_ex((parts.hostname, parts.port))
        self._head = b""
        self._left = None  # bytes of this chunk that have not come, with the line end behind them; None: not chunked
        self._framing = b""  # the part of a chunk's first line that has come
        self._complete = False
        self._reader = Reader(self.last_id, self.numbers, self.messages)
        self.status = None
        return self._socket

    def ask(self):
        """Send the request: the connection is there, or has failed."""
        if error := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        while self._request:
            self._request = self._request[self._socket.send(self._request) :]

    def receive(self):
        data = self._socket.recv(READ_SIZE)
        if not data:
            raise ConnectionError("ended")
        return data

    def take(self, data):
        """Take bytes as they came; raises ConnectionError at the end of the response."""
        if self.status is None:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self.status = int(head.split(b" ", 2)[1])
            self.connections += 1
            self._left = 0 if b"transfer-encoding: chunked" in head.lower() else None
        if self.status == 200:
            self._reader.feed(data if self._left is None else self._unchunk(data))
            self.last_id = self._reader.last_id
        if self._complete:
            raise ConnectionError("complete")

    def leave(self):
        """Close the connection, with a reset or with a goodbye, in the middle of what has arrived and was not read."""
        try:
            data = self.receive()
            self.take(data[: random.randrange(len(data) + 1)])
        except (BlockingIOError, ConnectionError):
            pass
        if random.random() < 0.5:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _unchunk(self, data):
        """Return the body in some bytes of a chunked response, parts of chunks included."""
        data = self._framing + data
        self._framing = b""
        body = []
        at = 0
        while at < len(data):
            if not self._left:
                end = data.find(b"\r\n", at)
                if end == -1:
                    self._framing = data[at:]
                    break
                size = int(data[at:end], 16)
                if not size:
                    self._complete = True
                    break
                self._left = size + 2
                at = end + 2
            taken = data[at : at + self._left]
            body.append(taken[: max(self._left - 2, 0)])
            self._left -= len(taken)
            at += len(taken)
        return b"".join(body)


class Traffic:
    """Reads clients, and has them come and go, for as long as `run()` is told to."""

    def __init__(self):
        self.clients = []
        self._selector = selectors.DefaultSelector()
        self._moments = []  # a heap of (time.monotonic(), tie, client, connection it is about, what it then does)
        self._ties = itertools.count()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for client in self.clients:
            client.close()
        self._selector.close()

    def add(self, client):
        """Have a client come; return it."""
        self.clients.append(client)
        self.come(client)
        return client

    def come(self, client):
        self._selector.register(client.knock(), selectors.EVENT_WRITE, client)
        # Now and then also before there is an answer. The others get something each time, however busy the server is.
        client.enough = math.inf
        if random.random() < HASTY:
            self.unsettle(client)

    def unsettle(self, client):
        """Have a client that is here leave by itself, if it says when."""
        if client.stay is not None:
            seconds, events = client.stay()
            client.enough = len(client.numbers) + events
            self._later(client, seconds, self.leave)

    def leave(self, client):
        """Have a client leave; it comes back by itself if it says when."""
        self._selector.unregister(client._socket)
        client.leave()
        if client.away is not None:
            self._later(client, client.away(), self.come)

    def run(self, until, timeout=60, what=None):
        """Go on until `until()` is true; `what()` says what was waited for in vain."""
        deadline = time.monotonic() + timeout
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout} s in vain for {what() if callable(what) else what}; {self!r}")
            self._step()

    def __repr__(self):
        here = sum(client.here for client in self.clients)
        answered = sum(client.status is not None for client in self.clients)
        numbers = sum(len(client.numbers) for client in self.clients)
        return (
            f"<Traffic {len(self.clients)} clients, {here} here, {answered} answered, {numbers} numbers; for instance "
            f"{sorted(self.clients, key=lambda client: len(client.numbers))[:3]}>"
        )

    def _read(self, client):
        unanswered = client.status is None
        client.take(client.receive())
        if unanswered and client.status is not None:
            self.unsettle(client)
        elif len(client.numbers) >= client.enough:
            self.leave(client)

    def _later(self, client, seconds, action):
        moment = time.monotonic() + seconds, next(self._ties), client, client._socket, action
        heapq.heappush(self._moments, moment)

    def _step(self):
        now = time.monotonic()
        while self._moments and self._moments[0][0] <= now:
            _, _, client, connection, action = heapq.heappop(self._moments)
            if client._socket is connection:  # else it has lost that one meanwhile
                action(client)
        for key, events in self._selector.select(0.01):
            client = key.data
            if client._socket is not key.fileobj:
                continue
            try:
                if events & selectors.EVENT_WRITE:
                    client.ask()
                    self._selector.modify(key.fileobj, selectors.EVENT_READ, client)
                else:
                    self._read(client)
            except BlockingIOError:
                pass
            except OSError as error:
                self._selector.unregister(key.fileobj)
                client.close()
                client.lost.append(str(error))
                if client.away is not None:
                    self._later(client, RETRY, self.come)
