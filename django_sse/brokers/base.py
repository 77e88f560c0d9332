"""The contract of a broker: it carries payloads between processes, by channel, and knows nothing of clients.

Payloads are opaque here (``event`` encodes and decodes them). One broker serves one runtime, which calls
``subscribe()`` for the first listener of a channel and ``unsubscribe()`` for the last, both under its lock: they must
return at once and never call back. ``tests/brokers/test_contract.py`` states every rule and runs it on each broker.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

__all__ = ["Broker", "Deliver", "Payload"]

Payload = bytes | str
#: Called with (channel, payload) pairs in the order in which they were published, by one thread at a time per channel.
Deliver = Callable[[list[tuple[str, Payload]]], None]


class Broker(ABC):
    """Publishes payloads, and hands those of the subscribed channels to ``deliver``."""

    def __init__(self) -> None:
        self.deliver: Deliver = _nobody_listens

    @abstractmethod
    def publish(self, channel: str, payload: str) -> None:
        """Send ``payload`` to every process that is subscribed to ``channel``.

        Raises ``BrokerUnavailable`` when it cannot be handed over.
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


def _nobody_listens(batch: list[tuple[str, Payload]]) -> None:
    """Stand in for ``deliver`` until the runtime sets it: nothing can be subscribed before."""
