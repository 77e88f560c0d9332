"""A TCP proxy between a client and a server of this machine that can be told to misbehave as networks do."""

import contextlib
import socket
import threading
import time

from tests.helpers.process import free_port

PAUSE = 0.001  # seconds between two pieces, so that they arrive as pieces


class Proxy:
    """Forwards connections to `port`.

    `pieces`: an iterator of sizes in which bytes reach the client; None: as they come.
    `budget`: bytes that still reach the client before the connections of this moment fall silent; None: no end.

    It cuts the network in two ways, until told otherwise: `hold()` and `release()`, as where packets are dropped that
    TCP sends again; `refuse()` and `admit()`, as where a host has gone.
    """

    def __init__(self, port):
        self.pieces = None
        self.budget = None
        self.accepted = 0
        self._upstream = port
        self._mute = set()
        self._pairs = []
        self._threads = []
        self._passing = threading.Event()  # clear: held
        self._passing.set()
        self.port = free_port()
        self.admit()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.release()
        self.refuse()
        for thread in self._threads:
            thread.join(5)
        for pair in self._pairs:
            for sock in pair:
                sock.close()

    @property
    def location(self):
        return f"127.0.0.1:{self.port}"

    def hold(self):
        """Let nothing through, and lose nothing: what was sent meanwhile arrives later. New connections wait, too."""
        self._passing.clear()

    def release(self):
        self._passing.set()

    def refuse(self):
        """End all connections, and refuse new ones. Not while held."""
        self._closing = True
        with contextlib.suppress(OSError):
            # Wakes the thread that waits in accept(), which closing alone does not.
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self._acceptor.join(5)
        self._listener.close()
        for pair in self._pairs:
            self._end(*pair)

    def admit(self):
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def silence(self):
        """The connections there are stay open, and nothing gets through any more; new ones work."""
        self._mute.update(client for client, _ in list(self._pairs))

    def _accept(self):
        while True:
            client, _ = self._listener.accept()
            if self._closing:
                client.close()
                return
            self._passing.wait()
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs.append((client, server))
            self.accepted += 1
            for target, arguments in ((self._to_server, (client, server)), (self._to_client, (client, server))):
                thread = threading.Thread(target=target, args=arguments, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _to_server(self, client, server):
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                self._passing.wait()
                if client not in self._mute:
                    server.sendall(data)
        self._end(client, server)

    def _to_client(self, client, server):
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                self._passing.wait()
                self._forward(client, data)
        self._end(client, server)

    def _forward(self, client, data):
        while data:
            size = len(data) if self.pieces is None else next(self.pieces)
            if self.budget is not None and client not in self._mute:
                size = min(size, self.budget)
                self.budget -= size
                if not size:
                    self._mute.add(client)
                    self.budget = None
            if client in self._mute:
                return
            client.sendall(data[:size])
            data = data[size:]
            if self.pieces is not None:
                time.sleep(PAUSE)

    def _end(self, client, server):
        for sock in (client, server):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
