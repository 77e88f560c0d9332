"""One channel with history, as one process follows it: what it has had, what it lacks, and what is to be done. Pure.

Events come live, one after the other, and in what is fetched from the broker, in any overlap. What comes out is every
event once and in order; or, where some are gone, a reset. Whoever asks what has come after a position is answered from
the recent events, or has to have something fetched first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from .event import Event
from .history import EPOCH, EXPIRED, TOP, UNKNOWN, Gap, History, Log, Past, Position

__all__ = ["Frame", "NotFetched", "Step", "Track", "Want", "size_of", "with_id"]

#: Events that are kept while those before them are being fetched. More can be fetched as well.
PENDING = 1000
#: Fetched events that come out in one go: others shall have the lock, and slow clients a moment.
SLICE = 64
#: Events that are fetched beyond those that somebody has missed, for others who come back.
FURTHER = 64

Frame = tuple[Event, bytes]


class Want(NamedTuple):
    """What is to be fetched of a channel: its top, and its events from the offset ``lowest`` on."""

    track: Track
    lowest: int
    #: Where the channel was, as far as this process knew then.
    known: Position | None
    #: How often its top had been doubted.
    doubts: int
    #: Whether what comes after the top is wanted, too, which may not come live.
    more: bool


class Step(NamedTuple):
    """What comes out: the event at ``position``, or that ``reset`` events are gone (``EPOCH`` or ``EXPIRED``)."""

    #: Where the channel was before.
    before: Position | None
    position: Position | None = None
    frame: Frame | None = None
    reset: str | None = None


class NotFetched(Exception):
    """Something has to be fetched first: of some tracks, from an offset on each."""

    def __init__(self, needed: Mapping[Track, int]) -> None:
        super().__init__(", ".join(track.channel for track in needed))
        self.needed = needed


class Track:
    """What this process knows of ``channel``.

    ``needs`` is where it says, by its name, from what offset on it wants its events fetched. ``make_id`` gives the id
    of a position of this channel alone: its events carry it.
    """

    def __init__(
        self,
        channel: str,
        history: History,
        needs: MutableMapping[str, int],
        make_id: Callable[[Position], str],
    ) -> None:
        self.channel = channel
        self.history = history
        # Those who wait for a fetch, and whether it has begun.
        self._starved: dict[Any, bool] = {}
        self._needs = needs
        self._make_id = make_id
        # The recent events, with their ids. None is in the place of one that could not be read.
        self._log: Log[Frame | None] = Log(history.size, history.ttl)
        # Events that were fetched, and are still to come out.
        self._backlog: deque[tuple[Position, Frame | None]] = deque()
        # Events that have come without the one before them, and how many of them had when the last fetch began.
        self._pending: list[tuple[Position, Frame]] = []
        self._pending_before = 0
        # How often something may have been missed, and what of that has been looked into.
        self._doubts = 0
        self._settled_doubts = 0
        # Whether what comes after the top is needed, too.
        self._needs_more = False

    @property
    def top(self) -> Position | None:
        """Behind which event the channel is, as far as it has come out; ``None`` where nothing is known."""
        return self._log.top

    @property
    def size(self) -> int:
        """Roughly what the recent events take, in bytes."""
        return self._log.bytes

    def shrink(self) -> None:
        """Forget the older half of the recent events: they can be fetched again."""
        self._log.shrink()

    def expire(self, now: float) -> None:
        """Forget the recent events if their time is over."""
        self._log.expire(now)

    # -- what is missed ---------------------------------------------------------------------------------------------

    def after(
        self, position: Position | None, asked: int | None, limit: int
    ) -> Sequence[tuple[Position, Frame | None]]:
        """Return what has come after ``position``, at most ``limit`` events, oldest first.

        ``asked``: from what offset on all was fetched for who asks; ``None``: nothing was. Raises ``Gap`` where what
        has come is gone, and ``NotFetched`` where more has to be fetched first, which is needed from then on.
        """
        if position is None:
            raise Gap(UNKNOWN)
        if self.top is None:
            self.need(TOP)  # what is being fetched just now may be older than what the client has seen
            raise self._not_fetched(max(0, position.offset - FURTHER))
        try:
            return self._log.after(position, limit)
        except Gap as gap:
            if asked is None and (gap.reason == EPOCH or self._log.complete):
                # This process may be the one that does not know the latest.
                raise self._not_fetched(TOP) from None
            was_fetched = asked is not None and asked <= position.offset and not self._log.is_shrunk
            if gap.reason == EXPIRED and not (was_fetched or self._log.complete):
                # Twice as far back as this one needs: so those who come next from a little before cost few looks.
                further = max(FURTHER, self.top.offset - position.offset)
                raise self._not_fetched(max(0, position.offset - further)) from None
            raise

    def _not_fetched(self, lowest: int) -> NotFetched:
        self.need(lowest)
        return NotFetched({self: lowest})

    def need(self, lowest: int) -> None:
        """Want the events from the offset ``lowest`` on; ``TOP``: whatever has come after those that are known."""
        self._needs_more = self._needs_more or lowest == TOP
        self._needs[self.channel] = min(lowest, self._needs.get(self.channel, TOP))

    def refresh(self) -> None:
        """Want what has come since the last event: it may not have been delivered, or the broker may not be the same.

        What comes live has to wait until that is known: it might seem to follow what it does not.
        """
        self._doubts += 1
        self.need(TOP)

    # -- what comes -------------------------------------------------------------------------------------------------

    def came(self, position: Position, event: Event, frame: bytes, now: float) -> Iterator[Step]:
        """Take what was delivered live; yield what comes out. ``now``: seconds of a clock that does not go back."""
        top = self.top
        if top is None or self._doubts != self._settled_doubts:
            self._postpone(position, (event, frame))
        elif _follows(position, top):
            yield from self._come_out(position, (event, frame), now)
        elif (
            position.epoch != top.epoch
            or position.offset > top.offset
            or self._log.check_at(position.offset) not in (None, position.check)
        ):
            self._postpone(position, (event, frame))
        # Else it was fetched before it came.

    def want(self, lowest: int) -> Want:
        """Begin to fetch. ``fetched()`` and ``go_on()`` follow, or ``give_back()`` where that fails."""
        self._pending_before = len(self._pending)
        self._starved = dict.fromkeys(self._starved, True)
        # At least what links up with what there is.
        lowest = lowest if self.top is None else min(lowest, self.top.offset)
        more, self._needs_more = self._needs_more, False
        return Want(self, lowest, self.top, self._doubts, more)

    def answers(self, want: Want) -> bool:
        """Whether what is wanted is there already."""
        base = self._log.base
        return base is not None and not want.more and (self._log.complete or base.offset <= want.lowest)

    def give_back(self, want: Want) -> None:
        """Hear that what was wanted could not be fetched."""
        self._starved = dict.fromkeys(self._starved, False)
        self.need(want.lowest)
        self._needs_more = self._needs_more or want.more

    def starve(self, who: Any) -> None:
        """Let ``who`` wait until what is needed now has been fetched."""
        self._starved[who] = False

    def forget(self, who: Any) -> None:
        """Let ``who`` wait no longer."""
        self._starved.pop(who, None)

    def starves(self, who: Any) -> bool:
        """Whether ``who`` waits."""
        return who in self._starved

    def feed(self) -> list[Any]:
        """Return those who have waited for the fetch that is over."""
        fed = [who for who, began in self._starved.items() if began]
        for who in fed:
            del self._starved[who]
        return fed

    def fetched(self, want: Want, past: Past, now: float) -> Iterator[Step]:
        """Take what was fetched, ``(position, (event, frame) or None)`` each; yield what comes out at once."""
        self._log.expire(now)
        self._settled_doubts = want.doubts
        top = self.top
        if top is None:
            self._load(past, now)
        elif (reason := self._broken(top, past, want)) is not None:
            yield from self._begin_anew(top, reason, past, now)
        else:
            self._extend(top, past, now)

    def go_on(self, now: float) -> Iterator[Step]:
        """Yield some of what was fetched, until nothing is left of it (``is_behind``)."""
        for _ in range(min(SLICE, len(self._backlog))):
            position, frame = self._backlog.popleft()
            if _follows(position, self.top):  # else it was delivered meanwhile
                yield from self._come_out(position, frame, now)
        if self._backlog:
            return
        # What had come before the fetch began is in it, or of a time that is over.
        pending, self._pending = self._pending[self._pending_before :], []
        for position, item in pending:
            yield from self.came(position, *item, now)

    @property
    def is_behind(self) -> bool:
        """Whether ``go_on()`` has something to yield that was fetched."""
        return bool(self._backlog)

    # -- how --------------------------------------------------------------------------------------------------------

    def _come_out(self, position: Position, frame: Frame | None, now: float) -> Iterator[Step]:
        if frame is not None:
            frame = with_id(*frame, self._make_id(position))
            yield Step(self.top, position, frame)
        # Only now: whoever is looked at meanwhile has not had it.
        self._log.add(position, frame, now, 0 if frame is None else size_of(frame))

    def _postpone(self, position: Position, item: Frame) -> None:
        self._pending.append((position, item))
        if len(self._pending) > PENDING:
            del self._pending[0]
            self._pending_before = max(0, self._pending_before - 1)
        if not self._backlog and self._doubts == self._settled_doubts:
            self.need(TOP)
            if self.top is not None and position.epoch != self.top.epoch:
                self.need(max(0, position.offset - FURTHER))

    def _broken(self, top: Position, past: Past, want: Want) -> str | None:
        """Return why ``past`` does not continue the log, which ends at ``top``; ``None`` if it does."""
        if past.top.epoch != top.epoch:
            return EPOCH
        # What is fetched is no older than what was known before, or the broker has gone back in time.
        if want.known is not None and want.known.epoch == top.epoch and past.top.offset < want.known.offset:
            return EPOCH
        for position in (past.base, *(position for position, _ in past.events)):
            if position.offset <= top.offset and self._log.check_at(position.offset) not in (None, position.check):
                return EPOCH
        return EXPIRED if past.base.offset > top.offset else None

    def _load(self, past: Past, now: float) -> None:
        """Let the log be what was fetched."""
        self._log.start(past.base, now, complete=past.complete)
        for position, frame, size in self._with_ids(past.events):
            self._log.add(position, frame, now, size)

    def _extend(self, top: Position, past: Past, now: float) -> None:
        """Add what was fetched before the log's beginning; what comes after its end is to come out."""
        log = self._log
        assert log.base is not None, "it has a top"
        if past.base.offset < log.base.offset <= past.top.offset:  # the log may have moved on meanwhile
            older = [(position, frame) for position, frame in past.events if position.offset <= log.base.offset]
            log.prepend(self._with_ids(older), past.base, now, complete=past.complete)
        elif past.complete and past.base.offset >= log.base.offset:
            log.complete = True
        self._backlog.extend((position, frame) for position, frame in past.events if position.offset > top.offset)

    def _begin_anew(self, top: Position, reason: str, past: Past, now: float) -> Iterator[Step]:
        if past.top.epoch == top.epoch:
            self._load(past, now)
        else:
            # Nobody has had anything of a new epoch.
            self._log.start(past.base, now, complete=past.complete)
            self._backlog.extend(past.events)
        yield Step(top, reset=reason)

    def _with_ids(
        self, events: Iterable[tuple[Position, Frame | None]]
    ) -> Iterator[tuple[Position, Frame | None, int]]:
        for position, frame in events:
            if frame is None:
                yield position, None, 0
            else:
                frame = with_id(*frame, self._make_id(position))
                yield position, frame, size_of(frame)


def size_of(frame: Frame) -> int:
    """Return the bytes that an event takes, in both of its forms."""
    event, encoded = frame
    return len(event.data) + len(encoded)


def with_id(event: Event, frame: bytes, id: str | None) -> Frame:
    """Return the event and its frame with ``id`` instead of its own."""
    if event.id is not None:
        frame = frame[frame.index(b"\n") + 1 :]
    if id is not None:
        frame = b"id: %s\n%s" % (id.encode(), frame)
    return Event(event.name, event.data, id), frame


def _follows(position: Position, top: Position | None) -> bool:
    return top is not None and position.epoch == top.epoch and position.offset == top.offset + 1
