"""Who listens to what in this process, and what waits for each of them. Pure: no lock, no clock, no socket, no thread.

The hub never waits and never calls out: every method says in its return value what its owner (``runtime``) has to do
next. It is not thread-safe; one lock, held by the owner, guards the hub and all its subscriptions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .event import Event

__all__ = ["Hub", "Outcome", "Subscription"]


class Subscription:
    """One client's bounded mailbox.

    ``max_events`` and ``max_bytes`` bound what waits in it. One event too many ends it (``ended == "overflow"``): what
    waits may still be taken, nothing more comes, so a client never sees a gap without seeing the end.
    """

    __slots__ = (
        "__weakref__",
        "_bytes",
        "_max_bytes",
        "_max_events",
        "_waiting",
        "channels",
        "ended",
        "prompt",
        "slow",
        "wake",
    )

    def __init__(self, channels: Iterable[str], *, max_events: int, max_bytes: int) -> None:
        self.channels = tuple(dict.fromkeys(channels))
        #: Why nothing more comes: ``None`` while it is open.
        self.ended: str | None = None
        #: Set by the owner for a client that does not take what waits; cleared when it has caught up.
        self.slow = False
        #: Set by a stream that says itself when its client is slow: otherwise it only waits for its turn.
        self.prompt = False
        #: Set by the stream: how the owner tells it that there is something to take.
        self.wake: Callable[[], None] | None = None
        self._waiting: deque[tuple[Event, bytes]] = deque()
        self._bytes = 0
        self._max_events = max_events
        self._max_bytes = max_bytes

    def put(self, event: Event, frame: bytes) -> None:
        """Let ``event``, encoded as ``frame``, wait; or end the subscription where it would wait beyond the bounds."""
        if self.ended is not None:
            return
        # A single frame larger than the bound may wait alone: it could never be delivered otherwise.
        if len(self._waiting) >= self._max_events or (self._waiting and self._bytes + len(frame) > self._max_bytes):
            self.ended = "overflow"
            return
        self._waiting.append((event, frame))
        self._bytes += len(frame)

    def take(self, limit: int | None = None, max_bytes: int | None = None) -> list[tuple[Event, bytes]]:
        """Return what waits, oldest first: at most ``limit`` events, and no more after ``max_bytes`` bytes."""
        waiting = self._waiting
        if (limit is None or limit >= len(waiting)) and (max_bytes is None or max_bytes >= self._bytes):
            taken = list(waiting)
            waiting.clear()
            self._bytes = 0
        else:
            taken, size = [], 0
            while waiting and len(taken) != limit and (max_bytes is None or size < max_bytes):
                taken.append(waiting.popleft())
                size += len(taken[-1][1])
            self._bytes -= size
        # Only who comes in vain has caught up: a slow client, too, takes all that waits now and then.
        if not taken and not waiting:
            self.slow = False
        return taken

    def clear(self) -> None:
        """Drop what waits: nobody will take it."""
        self._waiting.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def crowded(self) -> bool:
        """Whether more than half of a bound is used."""
        return 2 * len(self._waiting) > self._max_events or 2 * self._bytes > self._max_bytes


@dataclass(slots=True)
class Outcome:
    """What follows from one published event."""

    #: Subscriptions that had nothing to take before, and now have an event.
    wake: list[Subscription] = field(default_factory=list)
    #: Subscriptions that are filling up although their client was not slow until now.
    crowded: list[Subscription] = field(default_factory=list)
    #: Subscriptions that overflowed just now and are no longer registered.
    overflowed: list[Subscription] = field(default_factory=list)
    #: Channels that nobody listens to any more.
    idle: list[str] = field(default_factory=list)


class Hub:
    """The registry: channels to subscriptions."""

    def __init__(self) -> None:
        # A dict as an ordered set: clients are served in the order in which they came.
        self._channels: dict[str, dict[Subscription, None]] = {}

    def add(self, subscription: Subscription) -> list[str]:
        """Register ``subscription``; return the channels that have their first listener with it."""
        first = []
        for channel in subscription.channels:
            if channel not in self._channels:
                self._channels[channel] = {}
                first.append(channel)
            self._channels[channel][subscription] = None
        return first

    def remove(self, subscription: Subscription) -> list[str]:
        """Forget ``subscription``, known or not; return the channels that lost their last listener with it."""
        idle = []
        for channel in subscription.channels:
            listeners = self._channels.get(channel)
            if listeners is not None and subscription in listeners:
                del listeners[subscription]
                if not listeners:
                    del self._channels[channel]
                    idle.append(channel)
        return idle

    def publish(self, channel: str, event: Event, frame: bytes) -> Outcome:
        """Put ``event``, encoded as ``frame``, into the mailbox of every listener of ``channel``."""
        outcome = Outcome()
        gone = []
        for subscription in self._channels.get(channel, ()):
            was_idle = len(subscription) == 0
            subscription.put(event, frame)
            if subscription.ended is not None:
                gone.append(subscription)
                continue
            if was_idle:
                outcome.wake.append(subscription)
            # Without a wake nobody takes anything yet, and nobody has to be waited for.
            if subscription.wake is not None and not subscription.slow and subscription.crowded:
                outcome.crowded.append(subscription)
        for subscription in gone:
            # Others were abandoned by their stream, or never claimed: nobody is there to be told.
            if subscription.ended == "overflow" and subscription.wake is not None:
                outcome.overflowed.append(subscription)
            outcome.idle += self.remove(subscription)
        return outcome

    @property
    def channels(self) -> list[str]:
        """The channels that have listeners."""
        return list(self._channels)

    @property
    def subscriptions(self) -> set[Subscription]:
        """The registered subscriptions."""
        return {subscription for listeners in self._channels.values() for subscription in listeners}
