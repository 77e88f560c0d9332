"""The contract of a broker: it carries payloads between processes, by channel, and knows nothing of clients.

Payloads are opaque here (``event`` encodes and decodes them). One broker serves one runtime, which calls
``subscribe()`` for the first listener of a channel and ``unsubscribe()`` for the last, both under its lock: they must
return at once and never call back. ``tests/brokers/test_contract.py`` states every rule and runs it on each broker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from django_sse.exceptions import BrokerUnavailable
from django_sse.history import History, Past, Position

__all__ = ["FETCH_BYTES", "META_TTL", "Broker", "Deliver", "Payload", "Publication"]

#: Bytes of payloads that are fetched of a channel at most: what was missed beyond that is gone.
FETCH_BYTES = 16 * 1024 * 1024
#: Seconds for which a channel's count is kept after its last event or look: longer than its events, so that a client of
#: a quiet channel that comes back is known to have missed nothing.
META_TTL = 30 * 24 * 3600

Payload = bytes | str
#: Called with (channel, payload) pairs in the order in which they were published, by one thread at a time per channel.
Deliver = Callable[[list[tuple[str, Payload]]], None]


class Publication(NamedTuple):
    """A payload on its way to ``channel``; kept there if that has a ``history``, once for each ``key``."""

    channel: str
    payload: str
    history: History | None = None
    key: str | None = None


class Broker(ABC):
    """Publishes payloads, and hands those of the subscribed channels to ``deliver``."""

    def __init__(self) -> None:
        self.deliver: Deliver = _nobody_listens
        #: Called with a channel that is received again: some of what was published meanwhile was not.
        self.resubscribed: Callable[[str], None] = _nobody_missed

    def publish(
        self, channel: str, payload: str, history: History | None = None, key: str | None = None
    ) -> Position | None:
        """Send ``payload`` to every process that is subscribed to ``channel``; return its place in the history.

        With ``history`` it is counted, kept and sent in one step, so that all see one order; what is sent has the
        position as a third element. What was published with the same ``key``, and is still kept, is not published
        again, and its position is returned.

        Raises ``BrokerUnavailable`` when it cannot be handed over.
        """
        return self.publish_all([Publication(channel, payload, history, key)])[0]

    @abstractmethod
    def publish_all(self, publications: Sequence[Publication]) -> list[Position | None]:
        """Do what ``publish()`` does for several, in their order."""

    @abstractmethod
    def fetch(self, channels: Sequence[tuple[str, History, int]]) -> list[Past | BrokerUnavailable]:
        """Return of each channel its top, and its events from an offset on: the latest if there is not room for all.

        The payloads are as they were published. What concerns one channel alone is returned in its place; raises
        ``BrokerUnavailable`` for what concerns all of them.
        """

    @abstractmethod
    def subscribe(self, channel: str) -> None:
        """Begin to receive ``channel``. Returns at once; ``wait_subscribed()`` tells when it is so."""

    @abstractmethod
    def unsubscribe(self, channel: str) -> None:
        """Stop receiving ``channel``. Returns at once; a payload under way may still be delivered."""

    @abstractmethod
    def wait_subscribed(self, channels: Iterable[str], timeout: float) -> None:
        """Return when every event published on ``channels`` from now on will be delivered.

        Blocks for at most ``timeout`` seconds; raises ``BrokerUnavailable`` then, or as soon as it is known that the
        broker cannot be reached. It stays subscribed to what it was told all the same, and goes on trying.
        """

    @abstractmethod
    def nudge(self) -> None:
        """Call ``deliver`` soon, if only with nothing. Takes no lock. A broker that holds nothing outside need not."""

    @abstractmethod
    def close(self) -> None:
        """Give back connections and threads. A closed broker may be used again."""


def _nobody_missed(channel: str) -> None:
    """Stand in for ``resubscribed`` likewise."""


def _nobody_listens(batch: list[tuple[str, Payload]]) -> None:
    """Stand in for ``deliver`` until the runtime sets it: nothing can be subscribed before."""
