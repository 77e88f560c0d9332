"""Who listens to what in this process, and what waits for each of them. Pure: no lock, no clock, no socket, no thread.

Subscriptions to the same channels are one audience. What an audience gets stands once in its log, and each subscription
is a place in it: to publish costs the same for ten clients and for ten thousand.

The hub never waits and never calls out: every method says in its return value what its owner (``runtime``) has to do
next. It is not thread-safe; one lock, held by the owner, guards the hub and all its subscriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from .event import Event

__all__ = ["Audience", "Hub", "Outcome", "Subscription"]

_NOTHING = Event("", "")


class _Entry:
    """A place in a log: the event that comes there, if it has come, and the way to the next.

    Python frees the entries that no subscription has still to come to.
    """

    __slots__ = ("event", "frame", "next", "number", "size")

    def __init__(self, number: int, size: int) -> None:
        #: How many events, and bytes, the log has had before.
        self.number = number
        self.size = size
        self.event = _NOTHING
        self.frame = b""
        self.next: _Entry | None = None

    def fill(self, event: Event, frame: bytes) -> _Entry:
        """Put the event here; return the place of the next."""
        self.event, self.frame = event, frame
        self.next = after = _Entry(self.number + 1, self.size + len(frame))
        return after

    def copied(self, copies: dict[_Entry, _Entry]) -> _Entry:
        """Return a copy of the log from here on, which does not grow: with ``copies`` one that those before share."""
        entry, before = self, None
        while True:
            copy = copies.get(entry)
            known = copy is not None
            if copy is None:
                copy = copies[entry] = _Entry(entry.number, entry.size)
                copy.event, copy.frame = entry.event, entry.frame
            if before is not None:
                before.next = copy
            if known or entry.next is None:
                return copies[self]
            entry, before = entry.next, copy


class Subscription:
    """One client's bounded mailbox.

    The bounds of its audience bound what waits in it. One event too many ends it (``ended == "overflow"``): what
    waits may still be taken, nothing more comes, so a client never sees a gap without seeing the end.
    """

    __slots__ = (
        "__weakref__",
        "_end",
        "_place",
        "_size",
        "_start",
        "audience",
        "ended",
        "prompt",
        "shared",
        "slow",
        "wake",
    )

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        #: Why nothing more comes: ``None`` while it is open.
        self.ended: str | None = None
        #: Set by the owner for a client that does not take what waits; cleared when it has caught up.
        self.slow = False
        #: Set by a stream that says itself when its client is slow: otherwise it only waits for its turn.
        self.prompt = False
        #: Whether it is rung for by one of the audience's bells, and not by itself.
        self.shared = False
        #: Set by the stream: how the owner tells it that there is something to take.
        self.wake: Callable[[], None] | None = None
        # Where the next event is taken. An entry leads to all that comes after it, so none is held for longer.
        self._place = audience.end
        self._start = audience.end.number
        # Where the log's bytes would be if ``take()`` alone had taken them.
        self._size = audience.end.size
        # The end of what it still gets.
        self._end: _Entry | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """What it listens to."""
        return self.audience.channels

    @property
    def events(self) -> int:
        """How many events were taken."""
        return self._place.number - self._start

    @property
    def drained(self) -> bool:
        """Whether nothing waits, and it need not come in vain to be known to have caught up."""
        return self._place.next is None and self.ended is None and not self.slow

    @property
    def bytes_alike(self) -> int:
        """How many bytes were taken by ``Audience.advance()``."""
        return self._place.size - self._size

    def take(self, limit: int | None = None, max_bytes: int | None = None) -> list[tuple[Event, bytes]]:
        """Return what waits, oldest first: at most ``limit`` events, and no more after ``max_bytes`` bytes."""
        taken: list[tuple[Event, bytes]] = []
        place, size = self._place, 0
        while place.next is not None and len(taken) != limit and (max_bytes is None or size < max_bytes):
            taken.append((place.event, place.frame))
            size += len(place.frame)
            place = place.next
        self._place = place
        self._size += size
        if place.next is None and self.ended is None:
            if not self.shared:
                self.audience.waiting[self] = None
            # Only who comes in vain has caught up: a slow client, too, takes all that waits now and then.
            if not taken:
                self.slow = False
        return taken

    def end(self, reason: str, *, clear: bool = False, copies: dict[_Entry, _Entry] | None = None) -> None:
        """Let nothing more come; with ``clear`` what waits is dropped, too, for nobody will take it.

        Those that end with the same event name the same ``copies``: what waits for them is kept once.
        """
        self.ended = self.ended or reason
        if clear:
            self._place = self._end = _Entry(self._place.number, self._place.size)
        elif self._end is None:
            # A log of its own: a place in the audience's would keep all that is published from now on.
            copies = {} if copies is None else copies
            self._place = self._place.copied(copies)
            self._end = copies[self.audience.end]

    def __len__(self) -> int:
        return (self._end or self.audience.end).number - self._place.number

    @property
    def crowded(self) -> bool:
        """Whether more than half of a bound is used."""
        end = self._end or self.audience.end
        return self.audience.is_crowded(end.number - self._place.number, end.size - self._place.size)


class Audience:
    """The subscriptions to the same channels, and the log of what they get.

    ``max_events`` and ``max_bytes`` bound what waits for each of them.
    """

    def __init__(self, channels: tuple[str, ...], max_events: int, max_bytes: int) -> None:
        self.channels = channels
        self.max_events = max_events
        self.max_bytes = max_bytes
        # As ordered sets: clients are served in the order in which they came.
        self.subscriptions: dict[Subscription, None] = {}
        #: Those for which nothing waits.
        self.waiting: dict[Subscription, None] = {}
        #: Rung at every event, by whoever takes for several of them.
        self.bells: dict[Callable[[], None], None] = {}
        #: Where the next event will be.
        self.end = _Entry(0, 0)
        # No bound can be reached before the log has had so many events, or more bytes than that.
        self._look_at_number = 0
        self._look_at_size = 0

    def is_crowded(self, events: int, size: int) -> bool:
        """Whether ``events`` that wait, of ``size`` bytes, use more than half of a bound."""
        return 2 * events > self.max_events or 2 * size > self.max_bytes

    def put(self, event: Event, frame: bytes, outcome: Outcome) -> list[Subscription]:
        """Add to the log; return the subscriptions that had ended, or end with this event."""
        number, size = self.end.number + 1, self.end.size + len(frame)
        gone = []
        if number >= self._look_at_number or size > self._look_at_size:
            gone = self._look(number, size, outcome)
        self.end = self.end.fill(event, frame)
        if self.waiting:
            outcome.wake += [waiting.wake for waiting in self.waiting if waiting.wake and waiting.ended is None]
            self.waiting.clear()
        outcome.wake += self.bells
        return gone

    def look_again(self) -> None:
        """Have all subscriptions looked at with the next event."""
        self._look_at_number = 0

    def _look(self, number: int, size: int, outcome: Outcome) -> list[Subscription]:
        """Compare what waits with the bounds when the log comes to be so long; note when that is to be done again."""
        gone = []
        # Where this process was held up, all of them overflow at one time.
        copies: dict[_Entry, _Entry] = {}
        # A subscription that comes later, or has caught up, cannot be crowded before that.
        next_number, next_size = number + self.max_events // 2, size + self.max_bytes // 2
        for subscription in self.subscriptions:
            place = subscription._place
            events, waiting = number - place.number, size - place.size
            if subscription.ended is not None:
                subscription.end(subscription.ended, clear=True)
                gone.append(subscription)
                continue
            # A single frame larger than the bound may wait alone: it could never be delivered otherwise.
            if events > self.max_events or (events > 1 and waiting > self.max_bytes):
                subscription.end("overflow", copies=copies)
                gone.append(subscription)
                continue
            # Without a wake nobody takes anything yet, and nobody has to be waited for.
            part = 1
            if subscription.wake is not None and not subscription.slow:
                part = 2
                if self.is_crowded(events, waiting):
                    outcome.crowded.append(subscription)
                    next_number = number  # whatever its owner does about it will show
            next_number = min(next_number, place.number + self.max_events // part)
            next_size = min(next_size, place.size + self.max_bytes // part)
        self._look_at_number, self._look_at_size = next_number + 1, next_size
        return gone

    def advance(self, subscriptions: Iterable[Subscription], max_bytes: int) -> tuple[list[bytes | None], bool]:
        """Take for several: return for each what waits for it as one chunk, and whether more waits for one of them.

        Those at the same place get the same bytes object, empty where nothing waits. ``None``: it has to come itself.
        """
        chunks: list[bytes | None] = []
        # Mostly all are at one place.
        known: _Entry | None = None
        places: dict[_Entry, tuple[_Entry, bytes]] = {}
        reached, chunk = self.end, b""
        for subscription in subscriptions:
            place = subscription._place
            if place is not known:
                known = place
                if place not in places:
                    places[place] = _joined(place, max_bytes)
                reached, chunk = places[place]
            if subscription.slow:
                chunks.append(None)
            else:
                subscription._place = reached
                chunks.append(chunk)
        return chunks, any(reached.next is not None for reached, _ in places.values())


def _joined(place: _Entry, max_bytes: int) -> tuple[_Entry, bytes]:
    """Return the place behind the frames that make ``max_bytes``, and these frames as one."""
    frames: list[bytes] = []
    size = 0
    while place.next is not None and size < max_bytes:
        frames.append(place.frame)
        size += len(place.frame)
        place = place.next
    return place, frames[0] if len(frames) == 1 else b"".join(frames)


@dataclass(slots=True)
class Outcome:
    """What follows from one published event."""

    #: What is to be called: some have something to take now, and had not before.
    wake: list[Callable[[], None]] = field(default_factory=list)
    #: Subscriptions that are filling up although their client was not slow until now.
    crowded: list[Subscription] = field(default_factory=list)
    #: Subscriptions that overflowed just now and are no longer registered.
    overflowed: list[Subscription] = field(default_factory=list)
    #: Channels that nobody listens to any more.
    idle: list[str] = field(default_factory=list)


class Hub:
    """The registry: channels to audiences."""

    def __init__(self) -> None:
        self._channels: dict[str, dict[Audience, None]] = {}
        self._audiences: dict[tuple[tuple[str, ...], int, int], Audience] = {}

    def subscribe(
        self, channels: Iterable[str], *, max_events: int, max_bytes: int
    ) -> tuple[Subscription, Sequence[str]]:
        """Register a subscription; return it, and the channels that have their first listener with it."""
        names = tuple(dict.fromkeys(channels))
        key = names, max_events, max_bytes
        audience = self._audiences.get(key)
        first = []
        if audience is None:
            audience = self._audiences[key] = Audience(*key)
            for channel in names:
                if channel not in self._channels:
                    self._channels[channel] = {}
                    first.append(channel)
                self._channels[channel][audience] = None
        subscription = Subscription(audience)
        audience.subscriptions[subscription] = audience.waiting[subscription] = None
        return subscription, first

    def remove(self, subscription: Subscription) -> list[str]:
        """Forget ``subscription``, known or not; return the channels that lost their last listener with it."""
        subscription.end("removed")
        audience = subscription.audience
        audience.waiting.pop(subscription, None)
        if subscription not in audience.subscriptions:
            return []
        del audience.subscriptions[subscription]
        idle = []
        if not audience.subscriptions:
            del self._audiences[audience.channels, audience.max_events, audience.max_bytes]
            for channel in audience.channels:
                audiences = self._channels[channel]
                del audiences[audience]
                if not audiences:
                    del self._channels[channel]
                    idle.append(channel)
        return idle

    def publish(self, channel: str, event: Event, frame: bytes) -> Outcome:
        """Let ``event``, encoded as ``frame``, wait for every listener of ``channel``."""
        outcome = Outcome()
        gone: list[Subscription] = []
        for audience in self._channels.get(channel, ()):
            gone += audience.put(event, frame, outcome)
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
        return {subscription for audience in self._audiences.values() for subscription in audience.subscriptions}
