"""Who gets the same, and what waits for each of them. Pure: no lock, no clock, no socket, no thread.

What an audience gets stands once in its log, and each subscription is a place in it: to publish costs the same for ten
clients and for ten thousand.

A subscription that has come back, or cannot keep up, is *behind*: it has a position in each channel instead of a place
in the log, and what it has missed is laid before it page by page, until it stands in the log again. So it is only where
all that it gets can be had again, from the channels' history; elsewhere one that cannot keep up is ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from .event import Event
from .history import TOP, Gap, Position, reset_event
from .track import Frame, NotFetched, Track, with_id
from .wire import encode

__all__ = ["Audience", "Outcome", "Subscription"]

_NOTHING = Event("", "")
#: Of who has not asked for anything: one for all of them.
_UNASKED: Mapping[Track, int] = MappingProxyType({})
#: Where channels were before an event: a reset may be of several.
_Before = tuple[tuple[str, Position | None], ...]


def _no_id(positions: Mapping[str, Position]) -> str:
    """Stand in for what makes ids, where no channel has history."""
    raise LookupError("channels with history need ids")


class _Entry:
    """A place in a log: the event that comes there, if it has come, and the way to the next.

    Python frees the entries that no subscription has still to come to.
    """

    __slots__ = ("before", "event", "frame", "next", "number", "size")

    def __init__(self, number: int, size: int) -> None:
        #: How many events, and bytes, the log has had before.
        self.number = number
        self.size = size
        self.event = _NOTHING
        self.frame = b""
        #: Where its channel was before it, if that has history.
        self.before: _Before = ()
        self.next: _Entry | None = None

    def fill(self, event: Event, frame: bytes, before: _Before = ()) -> _Entry:
        """Put the event here; return the place of the next."""
        self.event, self.frame, self.before = event, frame, before
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


class Cursor:
    """A place in a log: that of one subscription, or of several that go on in step."""

    __slots__ = ("deserted", "is_common", "members", "place")

    def __init__(self, place: _Entry) -> None:
        self.place = place
        #: Whether several may have it, and whether one of them has gone another way since that was last looked at.
        self.is_common = False
        self.deserted = False
        #: How many have it, if it is common.
        self.members = 0


class Subscription:
    """One client's bounded mailbox.

    The bounds of its audience bound what waits in it. One event too many ends it (``ended == "overflow"``): what
    waits may still be taken, nothing more comes, so a client never sees a gap without seeing the end. Where all of its
    channels have history it does not end, but is behind.
    """

    __slots__ = (
        "__weakref__",
        "_asked",
        "_behind",
        "_cursor",
        "_end",
        "_size",
        "_start",
        "audience",
        "ended",
        "ends_on_reset",
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
        self._cursor = Cursor(audience.end)
        self._start = audience.end.number
        # Where the log's bytes would be if nothing had been taken together with others.
        self._size = audience.end.size
        # The end of what it still gets, or of the page of what it has missed.
        self._end: _Entry | None = None
        # By channel, what it has seen, including the page: while it has no place in the audience's log.
        self._behind: dict[str, Position | None] | None = None
        # From what offset on what it misses has been fetched, by track: what is not there then is gone.
        self._asked = _UNASKED
        #: Whether its view has to be asked anew where its client would otherwise be sent a ``stream-reset``.
        self.ends_on_reset = False

    @property
    def channels(self) -> tuple[str, ...]:
        """What it listens to."""
        return self.audience.channels

    @property
    def _place(self) -> _Entry:
        return self._cursor.place

    @_place.setter
    def _place(self, place: _Entry) -> None:
        if place is not self._cursor.place:
            self.fall_out()
            self._cursor.place = place

    def fall_out(self) -> None:
        """Go on alone from here."""
        if self._cursor.is_common:
            cursor, self._cursor = self._cursor, Cursor(self._cursor.place)
            cursor.deserted = True
            cursor.members -= 1
            if not cursor.members:
                # Whoever steps it may be held up, and it would keep all that is published meanwhile.
                cursor.place = _Entry(cursor.place.number, cursor.place.size)

    def fall_in(self, cursor: Cursor) -> bool:
        """Go on in step with the others at ``cursor``; return whether it can: it stands there, and takes what comes."""
        if self._cursor.place is not cursor.place or self.ended is not None or self.slow or self._behind is not None:
            return False
        self.fall_out()
        self._cursor = cursor
        cursor.members += 1
        return True

    def is_at(self, cursor: Cursor) -> bool:
        """Whether it goes on in step with the others at ``cursor``."""
        return self._cursor is cursor

    def be_slow(self) -> None:
        """Hear that its client does not take what waits."""
        self.slow = True
        self.fall_out()

    @property
    def events(self) -> int:
        """How many events were taken."""
        return self._place.number - self._start

    @property
    def is_behind(self) -> bool:
        """Whether it has no place in the audience's log."""
        return self._behind is not None

    @property
    def drained(self) -> bool:
        """Whether nothing waits, and it need not come in vain to be known to have caught up."""
        return self._place.next is None and self.ended is None and not self.slow and self._behind is None

    @property
    def bytes_alike(self) -> int:
        """How many bytes were taken together with others, by ``Audience.advance()`` or ``step()``."""
        return self._place.size - self._size

    def take(self, limit: int | None = None) -> list[tuple[Event, bytes]]:
        """Return what waits, oldest first: at most ``limit`` events."""
        taken: list[tuple[Event, bytes]] = []
        if self._behind is not None:
            self.audience.refill(self)
        place, size = self._place, 0
        while place.next is not None and len(taken) != limit:
            taken.append((place.event, place.frame))
            size += len(place.frame)
            place = place.next
        self._go_to(place, size)
        return taken

    def take_chunk(self, max_bytes: int) -> tuple[bytes, bool]:
        """Return what waits as one chunk, up to the event that makes it ``max_bytes``, and whether that is all."""
        if self._behind is not None:
            self.audience.refill(self)
        place, chunk = _joined(self._place, max_bytes)
        self._go_to(place, len(chunk))
        return chunk, self.drained

    def _go_to(self, place: _Entry, size: int) -> None:
        self._place = place
        self._size += size
        if place.next is None and self.ended is None and self._behind is None:
            if not self.shared:
                self.audience.waiting[self] = None
            # Only who comes in vain has caught up: a slow client, too, takes all that waits now and then.
            if not size:
                self.slow = False

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

    def place(self, entry: _Entry, end: _Entry | None = None) -> None:
        """Go on at ``entry``: the log's end, or a log of its own, that leads there or to ``end``."""
        self._start += entry.number - self._place.number
        self._size += entry.size - self._place.size
        self._place, self._end = entry, end

    def fall_behind(self, positions: dict[str, Position | None]) -> None:
        """Have what waits dropped, and all that comes, and fetched when its client comes for it."""
        self._behind = positions
        self._asked = _UNASKED
        self.slow = True
        nothing = _Entry(self._place.number, self._place.size)
        self.place(nothing, nothing)

    def __len__(self) -> int:
        return (self._end or self.audience.end).number - self._place.number

    @property
    def crowded(self) -> bool:
        """Whether more than half of a bound is used."""
        end = self._end or self.audience.end
        return self.audience.is_crowded(end.number - self._place.number, end.size - self._place.size)


class Audience:
    """The subscriptions to the same channels, and the log of what they get.

    ``max_events`` and ``max_bytes`` bound what waits for each of them. ``tracks``: those of its channels that have
    history; ``make_id`` gives the id of a position in these.
    """

    def __init__(
        self,
        channels: tuple[str, ...],
        max_events: int,
        max_bytes: int,
        tracks: tuple[Track, ...] = (),
        make_id: Callable[[Mapping[str, Position]], str] = _no_id,
    ) -> None:
        self.channels = channels
        self.tracks = tracks
        self._make_id = make_id
        #: Whether all that it gets can be had again.
        self.has_history = len(tracks) == len(channels)
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

    def put(self, event: Event, frame: bytes, outcome: Outcome, before: _Before = ()) -> list[Subscription]:
        """Add to the log; return the subscriptions that had ended, or end with this event.

        ``before``: where its channel was before it, if that has history.
        """
        number, size = self.end.number + 1, self.end.size + len(frame)
        gone = []
        if number >= self._look_at_number or size > self._look_at_size:
            gone = self._look(number, size, outcome, before)
        if self.tracks and not before:
            gone += self._end_those_behind()
        self.end = self.end.fill(event, frame, before)
        if self.waiting:
            outcome.wake += [waiting.wake for waiting in self.waiting if waiting.wake and waiting.ended is None]
            self.waiting.clear()
        outcome.wake += self.bells
        return gone

    def look_again(self) -> None:
        """Have all subscriptions looked at with the next event."""
        self._look_at_number = 0

    def _look(self, number: int, size: int, outcome: Outcome, before: _Before) -> list[Subscription]:
        """Compare what waits with the bounds when the log comes to be so long; note when that is to be done again.

        ``before`` is that of the event which makes it so long.
        """
        gone = []
        # Where this process was held up, all of them overflow at one time.
        copies: dict[_Entry, _Entry] = {}
        seen: dict[_Entry, dict[str, Position | None] | None] = {}
        # A subscription that comes later, or has caught up, cannot be crowded before that.
        next_number, next_size = number + self.max_events // 2, size + self.max_bytes // 2
        for subscription in self.subscriptions:
            place = subscription._place
            events, waiting = number - place.number, size - place.size
            if subscription.ended is not None:
                # Of who was told to end, what waits may still be taken.
                subscription.end(subscription.ended, clear=subscription._end is None)
                gone.append(subscription)
                continue
            if subscription._behind is not None:
                continue
            # A single frame larger than the bound may wait alone: it could never be delivered otherwise.
            if events > self.max_events or (events > 1 and waiting > self.max_bytes):
                if self.has_history and place not in seen:
                    seen[place] = self._seen_before(place, before)
                if (positions := seen.get(place)) is not None:
                    subscription.fall_behind(dict(positions))
                    outcome.behind.append(subscription)
                    continue
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
            if subscription.slow or subscription._behind is not None:
                chunks.append(None)
            else:
                subscription._place = reached
                chunks.append(chunk)
        return chunks, any(reached.next is not None for reached, _ in places.values())

    def common_cursor(self, subscription: Subscription) -> Cursor:
        """Return a cursor for several, where ``subscription`` stands."""
        cursor = Cursor(subscription._place)
        cursor.is_common = True
        return cursor

    def step(self, cursor: Cursor, max_bytes: int) -> tuple[bytes, bool]:
        """Do for all at ``cursor`` at once what ``advance()`` does for each."""
        cursor.place, chunk = _joined(cursor.place, max_bytes)
        return chunk, cursor.place.next is not None

    # -- history ----------------------------------------------------------------------------------------------------

    def positions(self) -> dict[str, Position]:
        """Return where its channels with history are at the end of the log."""
        return {track.channel: top for track in self.tracks if (top := track.top) is not None}

    def put_kept(
        self, track: Track, position: Position, frame: Frame, before: Position | None, outcome: Outcome
    ) -> list[Subscription]:
        """Do what ``put()`` does with the event at ``position`` of ``track``, which was at ``before``."""
        if len(self.tracks) > 1:
            frame = with_id(*frame, self._make_id({**self.positions(), track.channel: position}))
        return self.put(*frame, outcome, ((track.channel, before),))

    def _end_those_behind(self) -> list[Subscription]:
        """End those who would never get an event that is not kept; return them."""
        behind = [each for each in self.subscriptions if each._behind is not None and each.ended is None]
        for subscription in behind:
            subscription.end("overflow")
        return behind

    def missed(
        self, positions: Mapping[str, Position | None], asked: Mapping[Track, int], limit: int
    ) -> tuple[list[tuple[Track, Position, Frame | None]], dict[str, list[Track]]]:
        """Return what has come after ``positions``, channel by channel, and those where it is gone, by reason.

        At most ``limit`` events of each. ``asked``: from what offset on all has been fetched. Raises ``NotFetched``.
        """
        missed: list[tuple[Track, Position, Frame | None]] = []
        resets: dict[str, list[Track]] = {}
        needed: dict[Track, int] = {}
        for track in self.tracks:
            try:
                after = track.after(positions.get(track.channel), asked.get(track), limit)
                missed += [(track, *event) for event in after]
            except Gap as gap:
                resets.setdefault(gap.reason, []).append(track)
            except NotFetched as more:
                needed.update(more.needed)  # the others may need something, too
        if needed:
            raise NotFetched(needed)
        return missed, resets

    def reset(self, track: Track, reason: str, before: Position | None, outcome: Outcome) -> list[Subscription]:
        """Tell everybody that events of ``track`` are gone; return the subscriptions that end with that."""
        gone = []
        copies: dict[_Entry, _Entry] = {}
        for subscription in self.subscriptions:
            # Those that are behind will see for themselves.
            if subscription.ends_on_reset and subscription.ended is None and subscription._behind is None:
                subscription.end("reset", copies=copies)
                gone.append(subscription)
        event = reset_event([track.history.name], reason, self._make_id(self.positions()))
        others = self.put(event, encode(event), outcome, ((track.channel, before),))
        return gone + [ended for ended in others if ended not in gone]

    def place_at_end(self, subscription: Subscription) -> None:
        """Let ``subscription`` begin here: what came before is not for it."""
        subscription._behind = None
        subscription.slow = False
        self._lay(subscription, [], self.end)

    def place_behind(self, subscription: Subscription, positions: Mapping[str, Position]) -> None:
        """Let ``subscription`` begin behind ``positions``."""
        self.waiting.pop(subscription, None)
        subscription.fall_behind(dict(positions))
        subscription.slow = False
        self.refill(subscription)

    def refill(self, subscription: Subscription) -> None:
        """Lay the next page of what it has missed before ``subscription``; the rest of the log behind the last one.

        Where that has to be fetched first, it gets nothing, and is rung for afterwards.
        """
        behind = subscription._behind
        # Or somebody has done it meanwhile, or it waits for more than that.
        if behind is None or subscription._place.next is not None or subscription.ended is not None:
            return
        if any(track.starves(subscription) for track in self.tracks):
            return
        # Half of what may wait: the page's end may already be followed by what comes meanwhile. Others than those that
        # are all history have no second page, for what comes to the rest of their channels would not be on it.
        max_events, max_bytes = (self.max_events // 2 or 1, self.max_bytes // 2) if self.has_history else (TOP, TOP)
        page: list[tuple[Frame, _Before]] = []
        while not page:
            try:
                # This process itself has said where it is, so nobody need look whether it knows the latest.
                asked = {**dict.fromkeys(self.tracks, TOP), **subscription._asked}
                missed, resets = self.missed(behind, asked, max_events)
            except NotFetched as more:
                subscription._asked = {**subscription._asked, **more.needed}
                for track in more.needed:
                    track.starve(subscription)
                return
            subscription._asked = _UNASKED
            if resets and subscription.ends_on_reset:
                subscription.end("reset")
                return
            page = self._page(behind, missed, resets, max_events, max_bytes)
            if all(behind[track.channel] == track.top for track in self.tracks):
                subscription._behind = None
                self._lay(subscription, page, self.end)
                self.look_again()
                return
        self._lay(subscription, page, None)

    def _page(
        self,
        behind: dict[str, Position | None],
        missed: Iterable[tuple[Track, Position, Frame | None]],
        resets: Mapping[str, Sequence[Track]],
        max_events: int,
        max_bytes: int,
    ) -> list[tuple[Frame, _Before]]:
        """Return some of what was ``missed`` by who is at ``behind``, which goes on accordingly."""
        page: list[tuple[Frame, _Before]] = []
        for reason, tracks in resets.items():
            before = tuple((track.channel, behind[track.channel]) for track in tracks)
            behind.update((track.channel, track.top) for track in tracks)
            event = reset_event([track.history.name for track in tracks], reason, self._make_id(_only_known(behind)))
            page.append(((event, encode(event)), before))
        size = 0
        for track, position, frame in missed:
            if page and (len(page) >= max_events or size >= max_bytes):
                break
            before = ((track.channel, behind[track.channel]),)
            behind[track.channel] = position
            if frame is not None:
                if len(self.tracks) > 1:
                    frame = with_id(*frame, self._make_id(_only_known(behind)))
                page.append((frame, before))
                size += len(frame[1])
        return page

    def _lay(
        self,
        subscription: Subscription,
        page: list[tuple[Frame, _Before]],
        end: _Entry | None,
    ) -> None:
        if end is None:
            first = entry = _Entry(subscription._place.number, subscription._place.size)
        else:
            size = sum(len(frame) for (_, frame), _ in page)
            first = entry = _Entry(end.number - len(page), end.size - size)
        last = entry
        for (event, frame), before in page:
            last, entry = entry, entry.fill(event, frame, before)
        if end is None:
            subscription.place(first, entry)
        elif first is entry:
            subscription.place(end)
            if not subscription.shared:
                self.waiting[subscription] = None
        else:
            last.next = end
            subscription.place(first)

    def _seen_before(self, place: _Entry, last: _Before) -> dict[str, Position | None] | None:
        """Return what somebody has seen who has seen all before ``place``; ``None``: not all of it can be had again.

        ``last`` is that of the event which is to be put at the end of the log.
        """
        seen: dict[str, Position | None] = {}
        entry = place
        while entry.next is not None:
            if not entry.before:
                return None
            for channel, position in entry.before:
                seen.setdefault(channel, position)
            entry = entry.next
        return {**self.positions(), **dict(last), **seen} if last else None


def _only_known(positions: Mapping[str, Position | None]) -> dict[str, Position]:
    return {channel: position for channel, position in positions.items() if position is not None}


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
    """What follows from published events, one or several."""

    #: What is to be called: some have something to take now, and had not before.
    wake: list[Callable[[], None]] = field(default_factory=list)
    #: Subscriptions that are filling up although their client was not slow until now.
    crowded: list[Subscription] = field(default_factory=list)
    #: Subscriptions that are behind since just now.
    behind: list[Subscription] = field(default_factory=list)
    #: Subscriptions that have ended just now, and are no longer registered: they overflowed, or are to be asked anew.
    ended: list[Subscription] = field(default_factory=list)
    #: Channels with history on which an event came that cannot be had again.
    unkept: list[str] = field(default_factory=list)
    #: Channels that nobody listens to any more.
    idle: list[str] = field(default_factory=list)
