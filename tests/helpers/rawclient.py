"""A client that leaves in every way there is, the rude ones too. It reads only when it is told to."""

import contextlib
import ctypes
import errno
import fcntl
import socket
import struct
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tests.helpers.need import need

READ_SIZE = 65536  # bytes asked of the socket at once

SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
ACCEPT_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # a packet filter of one instruction, "return 0 bytes"
CLONE_NEWNET = 0x40000000  # <linux/sched.h>
SIOCSIFFLAGS = 0x8914  # <linux/sockios.h>
IFF_UP = 1  # <linux/if.h>
REFUSED = (errno.EPERM, errno.EACCES, errno.EROFS)  # to who is not root, or is root of a container only
# Of the private network. Linux sends a segment again for a quarter of an hour; with these, for two seconds.
SYSCTLS = {
    "tcp_retries2": 1,
    # Milliseconds within which a second probe of a full window is not answered: a client that lives seemed to be gone.
    "tcp_invalid_ratelimit": 0,
}
PRIVATE = "root of a Linux, who may make a network in which the kernel soon gives a silent client up"


class RawClient:
    """One request of `url`, sent; what comes back waits in the kernel until it is read."""

    def __init__(self, url, timeout=10):
        parts = urlsplit(url)
        self.body = b""
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout)
        try:
            request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: text/event-stream\r\n\r\n"
            self._socket.sendall(request.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def read_until(self, what):
        """Read until `what` has come, headers and transfer coding included."""
        while what not in self.body:
            data = self._socket.recv(READ_SIZE)
            if not data:
                raise AssertionError(f"the end has come before {what!r}: {self.body[-300:]!r}")
            self.body += data

    def close(self):
        """Leave, as a browser does whose tab is closed."""
        self._socket.close()

    def reset(self):
        """Leave without a goodbye: the server is told by a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def vanish(self):
        """Leave as a laptop does that goes to sleep: whatever the server sends, there is no answer of any kind."""
        need(sys.platform == "linux", "a Linux: its kernel can be told to be deaf")
        instruction = ctypes.create_string_buffer(ACCEPT_NOTHING)
        program = struct.pack("HL", 1, ctypes.addressof(instruction))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


@contextlib.contextmanager
def private_network():
    """
    Have what this thread opens and starts be in a network of its own, whose kernel gives a silent peer up soon.

    Its value says whether there is one: it takes a Linux, and root of it.
    """
    with contextlib.ExitStack() as stack:
        private = sys.platform == "linux"
        if private:
            try:
                stack.enter_context(_network())
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                private = False
        yield private


@contextlib.contextmanager
def _network():
    with open("/proc/thread-self/ns/net", "rb") as before:
        _call("unshare", CLONE_NEWNET)
        try:
            with socket.socket() as any_socket:
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
            for name, value in SYSCTLS.items():
                Path("/proc/sys/net/ipv4", name).write_text(str(value))
            yield
        finally:
            _call("setns", before.fileno(), CLONE_NEWNET)


def _call(function, *arguments):
    """Call a function of the C library that Python 3.10 does not have."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments):
        raise OSError(ctypes.get_errno(), function)
