"""The embedded broker: publishers and clients in this one process, no server needed.

For development, tests and the example. An event published in another process never arrives here, so the first one that
is published while nobody in this process has ever listened is answered with a warning.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from .base import Broker

__all__ = ["MemoryBroker"]

log = logging.getLogger("django_sse")


class MemoryBroker(Broker):
    """Delivers in the thread that publishes, before ``publish()`` returns."""

    def __init__(self) -> None:
        super().__init__()
        self._channels: set[str] = set()
        self._served = False
        self._warned = False
        # One publisher at a time: all clients of a channel see its events in one order.
        self._order = threading.RLock()

    def publish(self, channel: str, payload: str) -> None:
        if not self._served and not self._warned:
            self._warned = True
            log.warning(
                "An event was sent on channel %r through the memory: broker, but no client has ever connected to this "
                "process. memory: reaches this process only; to reach clients of other processes, set "
                'REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": "localhost:6379"}.',
                channel,
            )
        with self._order:
            if channel in self._channels:
                self.deliver([(channel, payload)])

    def subscribe(self, channel: str) -> None:
        self._served = True
        self._channels.add(channel)

    def unsubscribe(self, channel: str) -> None:
        self._channels.discard(channel)

    def wait_subscribed(self, channels: Iterable[str], timeout: float) -> None:
        """Return at once: ``subscribe()`` is all there is to it."""

    def nudge(self) -> None:
        """Do nothing: what is subscribed here costs nobody anything."""

    def close(self) -> None:
        self._channels.clear()
