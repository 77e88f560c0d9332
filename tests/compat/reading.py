"""Reads a streaming response inside the test process as a WSGI server does: one thread iterates, then closes."""

import threading
import time

from tests.helpers.eventsource import Parser


class Reading:
    """
    A response that a thread reads until its end, or until the first chunk after the `with` block is left.

    A stream that is silent for ever would keep the thread: tests of queue views set a short HEARTBEAT.
    """

    def __init__(self, response, timeout=10):
        self.response = response
        self.timeout = timeout
        self.body = b""
        self._parser = Parser()
        self.messages = []
        self.comments = self._parser.comments
        self.ended = False
        self.error = None
        self._taken = 0
        self._leaving = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._leaving = True
        self._thread.join(self.timeout)
        assert not self._thread.is_alive(), f"the stream goes on after its client has left: {self.body[-300:]!r}"

    def wait_for(self, what):
        """Wait until the body contains `what` (bytes), or `what(self)` is true."""
        holds = (lambda reading: what in reading.body) if isinstance(what, bytes) else what
        deadline = time.monotonic() + self.timeout
        with self._changed:
            while not holds(self):
                left = deadline - time.monotonic()
                if left <= 0 or self.ended or self.error:
                    raise AssertionError(f"no {what!r} in {self.body!r}, error {self.error!r}") from self.error
                self._changed.wait(left)

    def next_message(self):
        """Return the first message not returned before, waiting for it if need be."""
        self.wait_for(lambda reading: len(reading.messages) > reading._taken)
        self._taken += 1
        return self.messages[self._taken - 1]

    def _read(self):
        try:
            for chunk in self.response:
                with self._changed:
                    self.body += chunk
                    self.messages += self._parser.feed(chunk)
                    self._changed.notify_all()
                if self._leaving:
                    break
            else:
                self.ended = True
        except Exception as error:  # noqa: BLE001  (the test asks for it)
            self.error = error
        finally:
            self.response.close()
            with self._changed:
                self._changed.notify_all()
