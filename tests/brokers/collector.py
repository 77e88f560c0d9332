"""Takes the place of a runtime: keeps what a broker delivers."""

import threading

from tests.helpers.wait import until


class Collector:
    """A `deliver` that remembers each (channel, text), and whether two threads were ever in it at one time."""

    def __init__(self):
        self.got = []
        self.overlapped = False
        self._busy = threading.Lock()

    def __call__(self, batch):
        if not self._busy.acquire(blocking=False):
            self.overlapped = True
            return
        try:
            for channel, payload in batch:
                self.got.append((channel, payload.decode(errors="replace") if isinstance(payload, bytes) else payload))
        finally:
            self._busy.release()

    def of(self, channel):
        return [text for name, text in list(self.got) if name == channel]

    def wait_for(self, channel, text, timeout=10):
        until(lambda: (channel, text) in self.got, timeout, f"{text!r} on {channel!r}")


def our_threads():
    """The threads of the package that a broker could have: not the one of the shared loop, and not the registry's."""
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("django-sse")]
    return [name for name in names if name not in ("django-sse-loop", "django-sse-watch")]
