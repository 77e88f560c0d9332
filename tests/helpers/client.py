"""
An HTTP/1.1 client that shows a stream as it arrives: when each chunk came, and whether the end was a proper one.

It is written on a bare socket because the clients at hand hide what the tests are about: they buffer, they wait for
the first byte of the body, and they read no further than the headers of a HEAD response.
"""

import contextlib
import http.client
import socket
import threading
import time
from urllib.parse import urlencode, urlsplit

from tests.helpers.eventsource import Parser

READ_SIZE = 65536  # bytes asked of the socket at once


class StreamClient:
    """
    One request whose response is read by a thread of its own from now until the end or `close()`.

    `status` and `headers` wait until they have arrived. `body` is everything received so far without the transfer
    coding, `chunks` the same as `(time.monotonic(), bytes)` per HTTP chunk (per read where the response is not
    chunked), `arrivals` the parsed messages as `(time.monotonic(), Message)`. `ended` turns true when the response is
    complete, `broken` says how it was cut off otherwise; `excess` holds bytes sent after the complete response, and
    `reading` turns false when the connection is over.
    """

    def __init__(self, url, method="GET", headers=None, data=None, timeout=10):
        parts = urlsplit(url)
        self.url = url
        self.timeout = timeout
        self.body = b""
        self.chunks = []
        self.arrivals = []
        self.parser = Parser()
        self.ended = False
        self.broken = None
        self.excess = b""
        self._status = None
        self._headers = None
        self._taken = 0  # messages that next_message() has returned
        self._closing = False
        self._changed = threading.Condition()
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout)
        try:
            self._socket.sendall(_request_bytes(parts, method, headers or {}, data))
            self._socket.settimeout(None)
            self._thread = threading.Thread(target=self._read, args=(method,), name=f"read {url}", daemon=True)
            self._thread.start()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        end = "ended" if self.ended else self.broken or "open"
        return f"<StreamClient {self.url} status={self._status} {end} body={self.body[-300:]!r}>"

    @property
    def reading(self):
        return self._thread.is_alive()

    @property
    def opened(self):
        """Whether the status line and the headers have arrived; does not wait."""
        return self._headers is not None

    @property
    def status(self):
        self._await_headers()
        return self._status

    @property
    def headers(self):
        self._await_headers()
        return self._headers

    @property
    def messages(self):
        return [message for _, message in self.arrivals]

    def wait_for(self, what, timeout=None):
        """
        Wait until the body contains `what` (bytes), or until `what(self)` is true, and return its value.

        Fails when the time is over, and at once when the connection is and the condition still does not hold.
        """
        holds = (lambda client: what in client.body) if isinstance(what, bytes) else what
        timeout = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                value = holds(self)
                if value:
                    return value
                if self.ended or self.broken:
                    raise AssertionError(f"the stream is over before {what!r}: {self!r}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"waited {timeout} s in vain for {what!r}: {self!r}")
                self._changed.wait(left)

    def wait_closed(self, timeout=None):
        """Wait until the server has completed the response or cut the connection."""
        self.wait_for(lambda client: client.ended or client.broken, timeout)

    def next_message(self, timeout=None):
        """Return the first message not returned before, waiting for it if need be."""
        self.wait_for(lambda client: len(client.arrivals) > client._taken, timeout)
        self._taken += 1
        return self.arrivals[self._taken - 1][1]

    def close(self):
        """Leave, as a browser does whose tab is closed."""
        self._closing = True
        with contextlib.suppress(OSError):  # the server may have been first
            # Wakes the reading thread, which close() alone does not.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _await_headers(self):
        self.wait_for(lambda client: client.opened)

    def _read(self, method):
        try:
            for stamp, chunk in self._chunks(method):
                with self._changed:
                    self.body += chunk
                    self.chunks.append((stamp, chunk))
                    self.arrivals.extend((stamp, message) for message in self.parser.feed(chunk))
                    self._changed.notify_all()
        except (OSError, ValueError) as error:
            self.broken = f"{type(error).__name__}: {error}"
        with self._changed:
            if self._closing and not self.ended:
                self.broken = "closed by the client"
            self._changed.notify_all()

    def _chunks(self, method):
        """Read the response; yield `(time, bytes)` per chunk; raise ConnectionError where it ends too early."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive("before the end of the headers")
        head, _, received = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        fields = {}
        for line in lines:
            name, _, value = line.partition(":")
            # A repeated field counts as one with a list, as RFC 9110 section 5.2 has it.
            name = name.strip().lower()
            fields[name] = f"{fields[name]}, {value.strip()}" if name in fields else value.strip()
        with self._changed:
            self._status = int(status_line.split(" ", 2)[1])
            self._headers = fields
            self._changed.notify_all()
        if method == "HEAD" or self._status in (204, 304):
            self._complete(received)
        elif fields.get("transfer-encoding", "").lower() == "chunked":
            yield from self._chunked(received)
        elif "content-length" in fields:
            yield from self._sized(received, int(fields["content-length"]))
        else:
            yield from self._until_close(received)

    def _chunked(self, received):
        while True:
            while b"\r\n" not in received:
                received += self._receive("before the size of a chunk")
            line, _, received = received.partition(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            if size == 0:
                break
            while len(received) < size + 2:
                received += self._receive("within a chunk")
            if received[size : size + 2] != b"\r\n":
                raise ValueError("a chunk that does not end where its size says")
            yield time.monotonic(), received[:size]
            received = received[size + 2 :]
        while b"\r\n" not in received:
            received += self._receive("before the end of the last chunk")
        self._complete(received.partition(b"\r\n")[2])

    def _sized(self, received, size):
        while size:
            if not received:
                received = self._receive("before the end of the body")
            chunk, received = received[:size], received[size:]
            size -= len(chunk)
            yield time.monotonic(), chunk
        self._complete(received)

    def _until_close(self, received):
        while True:
            if received:
                yield time.monotonic(), received
            received = self._socket.recv(READ_SIZE)
            if not received:
                break
        if not self._closing:
            self._complete(b"")

    def _complete(self, excess):
        """The response is whole: whatever comes from now on should not be there."""
        with self._changed:
            self.ended = True
            self.excess = excess
            self._changed.notify_all()
        while True:
            try:
                more = self._socket.recv(READ_SIZE)
            except OSError:
                return
            if not more:
                return
            with self._changed:
                self.excess += more
                self._changed.notify_all()

    def _receive(self, where):
        data = self._socket.recv(READ_SIZE)
        if not data:
            raise ConnectionError(f"closed {where}")
        return data


def _request_bytes(parts, method, headers, data):
    """One request as bytes, with the headers that a browser's EventSource sends."""
    body, extra = _body(data)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc, "Accept": "text/event-stream", "Cache-Control": "no-cache", **extra, **headers}
    if body or method in ("POST", "PUT", "PATCH"):
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def _body(data):
    """The body and its headers: bytes as they are, text as UTF-8, a dict as a form."""
    if isinstance(data, dict):
        return urlencode(data).encode(), {"Content-Type": "application/x-www-form-urlencoded"}
    if isinstance(data, str):
        return data.encode(), {}
    return data or b"", {}


def request(method, url, data=None, headers=None, timeout=10):
    """Make one ordinary request; return its status, its headers (a dict in lower case) and its body."""
    parts = urlsplit(url)
    body, extra = _body(data)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request(method, target, body or None, {"Connection": "close", **extra, **(headers or {})})
        with connection.getresponse() as response:
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()
