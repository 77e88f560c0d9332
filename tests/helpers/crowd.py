"""
Many clients of one server, read by one thread: two hundred threads would take more of a small machine than the server.

    with Crowd(server.url + "/servers/queue/news", 200) as crowd:
        crowd.wait_for(lambda members: all(member.status == 200 for member in members))

What one client sees in detail, chunk by chunk, is the business of `tests.helpers.client.StreamClient`.
"""

import itertools
import selectors
import socket
import threading
import time
from collections import deque
from urllib.parse import urlsplit

import h11

from tests.helpers.wait import until

READ_SIZE = 65536  # bytes asked of a socket at once
# Connections that have no answer yet, at one time. A listen queue is short (runserver's takes ten), and the kernel of a
# client that found it full tries again only after a second.
KNOCKING = 8


class Member:
    """
    One request and its response.

    `status` and `headers` (names in lower case) are None before they have arrived, `body` is what has come without the
    transfer coding. `ended` turns true when the response is complete, `broken` says how it was cut off otherwise;
    `ended_at` is the `time.monotonic()` of either, None before.
    """

    def __init__(self, url, headers):
        self.url = url
        self.status = None
        self.headers = None
        self.body = bytearray()
        self.ended = False
        self.broken = None
        self.ended_at = None
        self._request_headers = headers
        self._socket = None
        self._protocol = h11.Connection(h11.CLIENT)

    def __repr__(self):
        end = "ended" if self.ended else self.broken or "open"
        return f"<Member {self.url} status={self.status} {end} body={bytes(self.body[-100:])!r}>"

    @property
    def over(self):
        return self.ended_at is not None

    def _begin(self):
        """Connect and send the request; return the socket."""
        parts = urlsplit(self.url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=10)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fields = {"Host": parts.netloc, "Accept": "text/event-stream", **self._request_headers}
        protocol = self._protocol
        self._socket.sendall(protocol.send(h11.Request(method="GET", target=target, headers=list(fields.items()))))
        protocol.send(h11.EndOfMessage())
        self._socket.setblocking(False)
        return self._socket

    def _read(self):
        """Take what has arrived."""
        self._protocol.receive_data(self._socket.recv(READ_SIZE))
        while not self.over:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                return
            if isinstance(event, h11.Response):
                self.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                self.status = event.status_code
            elif isinstance(event, h11.Data):
                self.body += event.data
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                self.ended = True
                self.ended_at = time.monotonic()

    def _break(self, why):
        if not self.over:
            self.broken = why
            self.ended_at = time.monotonic()

    def _close(self):
        if self._socket is not None:
            self._socket.close()


class Crowd:
    """
    `n` requests of `url`, opened in turn from now on and read until each is over.

    `url` may be several, in a list, which are then asked for in rotation. `members` are in the order in which they were
    asked for.
    """

    def __init__(self, url, n, headers=None):
        self.members = []
        self._urls = itertools.cycle([url] if isinstance(url, str) else url)
        self._headers = headers or {}
        self._waiting = deque()  # members that have not been connected
        self._open = set()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        self._wakened.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self.add(n)
        self._thread = threading.Thread(target=self._run, name=f"read {n} of {url}", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def add(self, n=1):
        """Have `n` more opened; return them."""
        added = [Member(next(self._urls), self._headers) for _ in range(n)]
        self.members += added
        self._waiting.extend(added)
        self._waker.send(b"\0")
        return added

    def wait_for(self, predicate, timeout=10, what=None):
        """Wait until `predicate(members)` is true, and return its value; fail after `timeout` seconds."""
        try:
            return until(lambda: predicate(self.members), timeout, what or predicate)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self!r}") from None

    def wait_open(self, timeout=30):
        """Wait until each has got something of a stream."""
        self.wait_for(
            lambda members: all(member.status == 200 and member.body for member in members), timeout, "open streams"
        )

    def __repr__(self):
        states = [
            "ended" if member.ended else member.broken or (f"open {member.status}" if member.status else "unanswered")
            for member in self.members
        ]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return f"<Crowd {counts}; for instance {self.members[:2]}>"

    def close(self):
        """Leave, all at once."""
        self._closing = True
        self._waker.send(b"\0")
        self._thread.join()
        self._selector.close()
        self._waker.close()
        self._wakened.close()

    def _run(self):
        knocking = set()
        while not self._closing:
            knocking = {member for member in knocking if member.status is None and not member.over}
            while self._waiting and len(knocking) < KNOCKING:
                member = self._waiting.popleft()
                if self._begin(member):
                    knocking.add(member)
            for key, _ in self._selector.select():
                if key.data is None:
                    self._wakened.recv(READ_SIZE)
                else:
                    self._read(key.data)
        for member in list(self._open):
            self._end(member, "closed by the client")

    def _begin(self, member):
        try:
            self._selector.register(member._begin(), selectors.EVENT_READ, member)
        except OSError as error:
            member._break(f"{type(error).__name__}: {error}")
            member._close()
            return False
        self._open.add(member)
        return True

    def _read(self, member):
        try:
            member._read()
        except BlockingIOError:
            return
        except (OSError, h11.RemoteProtocolError) as error:
            member._break(f"{type(error).__name__}: {error}")
        if member.over:
            self._end(member, None)

    def _end(self, member, why):
        member._break(why)
        self._selector.unregister(member._socket)
        member._close()
        self._open.discard(member)
