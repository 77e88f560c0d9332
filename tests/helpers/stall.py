"""
Clients that stop reading: they take the headers of a stream, and the rest waits, in the kernel and in the server.

Their buffers are as small as can be, so that what a server does for such a client begins after a tenth of a megabyte
and not after three. A client that has next to nothing to read, an idle one, costs the test process a descriptor.
"""

import contextlib
import socket
from urllib.parse import urlsplit

import h11

READ_SIZE = 65536  # bytes asked of the socket at once
RECEIVE_BUFFER = 4096  # bytes; the kernel doubles it
# Bytes of a segment, as on an Ethernet. The kernel gives a connection a send buffer of so many segments, and those of
# the loopback interface are as long as 64 KiB.
SEGMENT = 1460
KNOCKING = 64  # requests that wait for their answer at one time


class StallingClient:
    """
    One request of `url`, whose answer is read as far as `read_head()` and `read_on()` go, and no further.

    `status` and `headers` (names in lower case) are those of the answer, `body` is what has been read of it without
    the transfer coding. `ended` turns true when the answer is complete, `broken` says how it was cut off otherwise.
    """

    def __init__(self, url, timeout=10):
        parts = urlsplit(url)
        self.url = url
        self.status = None
        self.headers = None
        self.body = bytearray()
        self.ended = False
        self.broken = None
        self._protocol = h11.Connection(h11.CLIENT)
        self._socket = socket.socket()
        try:
            self._socket.settimeout(timeout)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
            self._socket.connect((parts.hostname, parts.port))
            fields = {"Host": parts.netloc, "Accept": "text/event-stream"}
            request = h11.Request(method="GET", target=parts.path, headers=list(fields.items()))
            self._socket.sendall(self._protocol.send(request))
            self._protocol.send(h11.EndOfMessage())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __repr__(self):
        end = "ended" if self.ended else self.broken or "open"
        return f"<StallingClient {self.url} status={self.status} {end} body={bytes(self.body[-100:])!r}>"

    def read_head(self):
        """Read until the headers have come; return the status."""
        self._read_until(lambda: self.status is not None)
        return self.status

    def read_on(self, what=None):
        """Read until `what` (bytes) has come, or the end of the answer, of whatever kind."""
        self._read_until(lambda: what is not None and what in self.body)

    def close(self):
        """Leave."""
        self._socket.close()

    def _read_until(self, holds):
        try:
            while not (holds() or self.ended):
                self._take(self._protocol.next_event())
        except TimeoutError:
            raise AssertionError(f"nothing more came in {self._socket.gettimeout()} s: {self!r}") from None
        except (OSError, h11.RemoteProtocolError) as error:
            self.broken = f"{type(error).__name__}: {error}"

    def _take(self, event):
        if event is h11.NEED_DATA:
            self._protocol.receive_data(self._socket.recv(READ_SIZE))
        elif isinstance(event, h11.Response):
            self.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            self.status = event.status_code
        elif isinstance(event, h11.Data):
            self.body += event.data
        elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
            self.ended = True


@contextlib.contextmanager
def stalling(url, n):
    """Open `n` streams of `url`, read their headers, and leave at the end; the value is the list of clients."""
    clients = []
    with contextlib.ExitStack() as stack:
        while len(clients) < n:
            knocking = [stack.enter_context(StallingClient(url)) for _ in range(min(KNOCKING, n - len(clients)))]
            for client in knocking:
                assert client.read_head() == 200, client
            clients += knocking
        yield clients
