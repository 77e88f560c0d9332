"""The embedded broker: publishers and clients in this one process, no server needed.

For development, tests and the example. An event published in another process never arrives here, so the first one that
is published while nobody in this process has ever listened is answered with a warning.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from django_sse.exceptions import BrokerUnavailable
from django_sse.history import History, Log, Past, Position

from .base import FETCH_BYTES, META_TTL, Broker, Publication

__all__ = ["MemoryBroker"]

log = logging.getLogger("django_sse")

#: Channels with history after whose number those that nobody has used for long are looked for.
MANY = 1000


class MemoryBroker(Broker):
    """Delivers in the thread that publishes, before ``publish()`` returns. ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._channels: set[str] = set()
        self._served = False
        self._warned = False
        # One publisher at a time: all clients of a channel see its events in one order.
        self._order = threading.RLock()
        self._kept: dict[str, _Kept] = {}
        self._many = MANY

    def publish_all(self, publications: Sequence[Publication]) -> list[Position | None]:
        if publications and not self._served and not self._warned:
            self._warned = True
            log.warning(
                "An event was sent on channel %r through the memory: broker, but no client has ever connected to this "
                "process. memory: reaches this process only; to reach clients of other processes, set "
                'REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": "localhost:6379"}.',
                publications[0].channel,
            )
        return [self._publish(*publication) for publication in publications]

    def _publish(self, channel: str, payload: str, history: History | None, key: str | None) -> Position | None:
        with self._order:
            position = None
            if history is not None:
                kept = self._kept_of(channel, history)
                if key is not None and (known := kept.keys.get(key)) is not None:
                    return known
                position = kept.add(payload, key, self._clock())
                payload = _with_position(payload, position)
            if channel in self._channels:
                self.deliver([(channel, payload)])
            return position

    def fetch(self, channels: Sequence[tuple[str, History, int]]) -> list[Past | BrokerUnavailable]:
        with self._order:
            return [self._kept_of(channel, history).past(lowest) for channel, history, lowest in channels]

    def _kept_of(self, channel: str, history: History) -> _Kept:
        now = self._clock()
        kept = self._kept.get(channel)
        if kept is None or now - kept.used >= META_TTL:
            self._sweep(now)
            kept = self._kept[channel] = _Kept(history, now)
        kept.used = now
        kept.expire(now)
        return kept

    def _sweep(self, now: float) -> None:
        if len(self._kept) < self._many:
            return
        self._kept = {channel: kept for channel, kept in self._kept.items() if now - kept.used < META_TTL}
        for kept in self._kept.values():
            kept.expire(now)
        self._many = max(MANY, 2 * len(self._kept))

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


class _Kept:
    """The history of one channel."""

    def __init__(self, history: History, now: float) -> None:
        self.used = now
        #: Those that events were published with which are still there.
        self.keys: dict[str, Position] = {}
        self._log: Log[str] = Log(history.size, history.ttl)
        self._log.start(Position(random.getrandbits(32), 0, 0), now, complete=True)

    def add(self, payload: str, key: str | None, now: float) -> Position:
        assert self._log.top is not None
        position = Position(self._log.top.epoch, self._log.top.offset + 1, random.getrandbits(24))
        self._log.add(position, payload, now)
        if key is not None:
            self.keys[key] = position
        self._forget_keys()
        return position

    def expire(self, now: float) -> None:
        self._log.expire(now)
        self._forget_keys()

    def _forget_keys(self) -> None:
        assert self._log.top is not None
        assert self._log.base is not None
        # In the order of their events.
        while self.keys and (first := next(iter(self.keys.items())))[1].offset <= self._log.base.offset:
            del self.keys[first[0]]

    def past(self, lowest: int) -> Past:
        assert self._log.base is not None
        assert self._log.top is not None
        kept = self._log.after(self._log.base)
        events: list[tuple[Position, str]] = []
        room = FETCH_BYTES
        for position, payload in reversed(kept):
            base = position
            if position.offset < max(lowest, 1) or room <= 0:
                break
            events.append((position, payload))
            room -= len(payload)
        else:
            base = self._log.base
        events.reverse()
        return Past(base, self._log.top, events, complete=len(events) == len(kept))


def _with_position(payload: str, position: Position) -> str:
    where = f'{{"epoch":{position.epoch},"offset":{position.offset},"check":{position.check}}}'
    return f"{payload[:-1]},{where}]"
