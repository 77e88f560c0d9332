"""The recent past of a channel: positions, and a bounded log that knows whether anything is missing. Pure.

A channel's events are counted by *offset*: 1, 2, 3, and so on, without a gap. The count belongs to an *epoch*, which
begins when the broker knows nothing of the channel, and ends when the broker loses what it knew. What has come after a
position is either all of what the log says, or a ``Gap``: never a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from .event import Event

__all__ = ["EPOCH", "EXPIRED", "TOP", "UNKNOWN", "Gap", "History", "Log", "Past", "Position", "reset_event"]

#: Why there is a gap. The broker has lost its data, or an older state of it has been restored.
EPOCH = "epoch"
#: The log does not reach back so far.
EXPIRED = "expired"
#: The client has named no position of the channel that could be understood.
UNKNOWN = "unknown"

#: Above every offset: of a channel, nothing but its end is wanted.
TOP = 1 << 53

#: Bytes that an event in a log takes beside those of its item, roughly.
ENTRY_BYTES = 600

#: In the place of what was dropped.
_FORGOTTEN: Any = None

T = TypeVar("T")


class Position(NamedTuple):
    """A place in a channel: behind its event number ``offset``, or before the first one (0).

    ``check`` is a number that belongs to that event, made of its time. An old state of the broker's data that was
    restored, and went on from there, counts the same offsets again in the same epoch, but has other checks.
    """

    epoch: int
    offset: int
    check: int

    @classmethod
    def of(cls, found: Mapping[str, object]) -> Position:
        """Return the position that came with an event. Raises ``ValueError``: other programs publish, too."""
        values = []
        for name, bits in (("epoch", 32), ("offset", 53), ("check", 24)):
            value = found.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
                raise ValueError(f"its {name} is no whole number below 2**{bits}: {value!r}")
            values.append(value)
        return cls(*values)


class History(NamedTuple):
    """What is kept of a channel: ``size`` events, until ``ttl`` seconds after the last. ``name``: as its users say."""

    name: str
    size: int
    ttl: int


class Past(NamedTuple):
    """What a broker has kept of a channel: its events behind ``base`` up to ``top``, oldest first, without a gap.

    ``complete``: whether none is kept that came before them.
    """

    base: Position
    top: Position
    events: Sequence[tuple[Position, Any]]
    complete: bool


class Gap(Exception):
    """What has come after a position is not known, for the ``reason`` ``EPOCH`` or ``EXPIRED``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Log(Generic[T]):
    """The latest events of one channel: at most ``size`` of them, until ``ttl`` seconds after the last.

    Times are seconds of any clock that does not go back.
    """

    __slots__ = ("_entries", "_first", "_last", "base", "bytes", "complete", "is_shrunk", "size", "ttl")

    def __init__(self, size: int, ttl: float) -> None:
        self.size = size
        self.ttl = ttl
        #: Behind what event it begins; ``None``: nothing is known yet.
        self.base: Position | None = None
        #: Whether nobody has kept what is before it.
        self.complete = False
        #: Whether some that somebody may still want had to make room for others.
        self.is_shrunk = False
        #: Roughly what it takes.
        self.bytes = 0
        # A list, for one may begin to read anywhere; what is dropped at its beginning is cleared away now and then.
        self._entries: list[tuple[Position, T, int]] = []
        self._first = 0
        self._last = 0.0

    def __len__(self) -> int:
        return len(self._entries) - self._first

    @property
    def top(self) -> Position | None:
        """The position behind the last event."""
        return self._entries[-1][0] if len(self) else self.base

    def start(self, base: Position, now: float, *, complete: bool = False) -> None:
        """Forget all; what is added next comes after ``base``."""
        self._entries = []
        self._first = self.bytes = 0
        self._last = now
        self.is_shrunk = False
        self.base = base
        self.complete = complete

    def add(self, position: Position, item: T, now: float, size: int = 0) -> None:
        """Add the event at ``position``, which follows the last one; ``size``: bytes of ``item``."""
        self._last = now
        self._entries.append((position, item, size + ENTRY_BYTES))
        self.bytes += size + ENTRY_BYTES
        if len(self) > self.size:
            self._forget(1)

    def prepend(self, events: Iterable[tuple[Position, T, int]], base: Position, now: float, *, complete: bool) -> None:
        """Add what came between ``base`` and the present base, oldest first, as far as there is room."""
        room = self.size - len(self)
        older = list(events)
        added = [(position, item, size + ENTRY_BYTES) for position, item, size in older[max(0, len(older) - room) :]]
        self._entries[: self._first] = added
        self._first = 0
        self.bytes += sum(size for _, _, size in added)
        self._last = now  # somebody has kept them until now
        self.is_shrunk = False
        self.base = older[-room - 1][0] if len(older) > room else base
        self.complete = complete

    def expire(self, now: float) -> None:
        """Forget the events if the last one is older than ``ttl`` seconds."""
        if len(self) and now - self._last >= self.ttl:
            self._forget(len(self))
            self.complete = False  # only who keeps them for all can say that they are gone

    def shrink(self) -> None:
        """Forget the older half, though somebody else may have kept it."""
        self._forget((len(self) + 1) // 2)
        self.complete = False
        self.is_shrunk = True

    def check_at(self, offset: int) -> int | None:
        """Return the check of the event number ``offset``; ``None`` where it is not known."""
        base = self.base
        if base is None or not base.offset <= offset <= base.offset + len(self):
            return None
        return base.check if offset == base.offset else self._entries[self._first + offset - base.offset - 1][0].check

    def after(self, position: Position, limit: int | None = None) -> list[tuple[Position, T]]:
        """Return what has come after ``position``, at most ``limit`` events, oldest first. Raises ``Gap``."""
        top, base = self.top, self.base
        if top is None or base is None or position.epoch != top.epoch or position.offset > top.offset:
            raise Gap(EPOCH)
        if position.offset < base.offset:
            raise Gap(EXPIRED)
        if position.check != self.check_at(position.offset):
            raise Gap(EPOCH)
        begin = self._first + position.offset - base.offset
        missed = self._entries[begin : None if limit is None else begin + limit]
        return [(at, item) for at, item, _ in missed]

    def _forget(self, count: int) -> None:
        for index in range(self._first, self._first + count):
            self.base, _, size = self._entries[index]
            self.bytes -= size
            self._entries[index] = _FORGOTTEN
        self._first += count
        if 2 * self._first > len(self._entries):
            del self._entries[: self._first]
            self._first = 0


def reset_event(channels: Sequence[str], reason: str, id: str | None = None) -> Event:
    """Return the event that tells a page to fetch its state anew: what it has missed on ``channels`` is gone."""
    return Event("stream-reset", json.dumps({"channels": list(channels), "reason": reason}), id)
