"""How a stream waits for its mailbox: as a thread, a greenlet or a task. Knows nothing of what is sent.

The two ways differ in their bell alone. A bell may be rung by any thread, also when nobody waits yet; whoever waits
looks into the mailbox first, so no ring is lost and none is needed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar, Protocol

from .event import Event

__all__ = ["Inbox", "LoopBell", "Mailbox", "Mailboxes", "Rank"]


class Mailbox(Protocol):
    """What this module needs of a subscription (``runtime.Listener``)."""

    @property
    def ended(self) -> str | None: ...
    @property
    def events(self) -> int: ...
    @property
    def is_behind(self) -> bool: ...
    @property
    def bytes_alike(self) -> int: ...
    @property
    def audience(self) -> Hashable: ...
    def wake_by(self, wake: Callable[[], None]) -> None: ...
    def take(self, limit: int | None = None) -> list[tuple[Event, bytes]]: ...
    def take_chunk(self, max_bytes: int) -> tuple[bytes, bool]: ...
    def take_alike(self, listeners: Iterable[Any], max_bytes: int) -> tuple[list[bytes | None], bool]: ...
    def share(self, ring: Callable[[], None]) -> None: ...
    def unshare(self, ring: Callable[[], None]) -> None: ...
    def rank(self) -> Rank: ...
    def mark(self, *, slow: bool) -> None: ...
    def close(self, reason: str = "client") -> None: ...


class Rank(Protocol):
    """What this module needs of mailboxes that go on in step (``runtime.Rank``)."""

    def join(self, listeners: Any) -> list[bool]: ...
    def leave(self, listener: Any) -> None: ...
    def take(self, max_bytes: int) -> tuple[bytes, bool] | None: ...
    def muster(self) -> list[bool]: ...


class Mailboxes:
    """The subscriptions of one stream, which end with it. Thread-safe."""

    __slots__ = ("_closed", "_opened")

    def __init__(self) -> None:
        self._opened: tuple[Mailbox, ...] = ()
        self._closed = False

    def add(self, mailbox: Mailbox) -> None:
        """Let ``mailbox`` end with the stream: at once, if that has ended."""
        self._opened = *(opened for opened in self._opened if opened.ended is None), mailbox
        if self._closed:
            mailbox.close()

    def close(self, reason: str = "client") -> None:
        """End them all, and those that come later."""
        self._closed = True
        for mailbox in self._opened:
            mailbox.close(reason)


class Inbox:
    """The events of one subscription, for a thread that waits or a loop that awaits."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self._thread_bell: threading.Event | None = None
        self._loop_bell: LoopBell | None = None

    def wait(self, timeout: float | None, limit: int | None = None) -> list[tuple[Event, bytes]] | None:
        """Return the next events, at most ``limit``; none after ``timeout`` seconds of silence; ``None`` at the end."""
        bell = self._thread_bell
        if bell is None:
            bell = self._thread_bell = threading.Event()
            self.mailbox.wake_by(bell.set)
        while True:
            bell.clear()
            taken = self.mailbox.take(limit)
            if taken:
                return taken
            if self.mailbox.ended is not None:
                return None
            if not bell.wait(timeout):
                return []

    async def await_(self, timeout: float | None, limit: int | None = None) -> list[tuple[Event, bytes]] | None:
        """Return what ``wait()`` does, without blocking the running loop."""
        bell = self._loop_bell
        if bell is None:
            bell = self._loop_bell = LoopBell()
            self.mailbox.wake_by(bell.ring)
        while True:
            bell.clear()
            taken = self.mailbox.take(limit)
            if taken:
                return taken
            if self.mailbox.ended is not None:
                return None
            if not await bell.wait(timeout):
                return []


class LoopBell:
    """An event that any thread may set, for one task at a time to await. Rings of one moment share one loop wake-up."""

    __slots__ = ("_alarm", "deadline", "future", "rung")

    def __init__(self) -> None:
        self._alarm = _LoopAlarm.of_running_loop()
        #: Whether it was rung since ``clear()``.
        self.rung = False
        #: What is awaited, while somebody does; until ``deadline`` (the loop's time) at most, if anybody sweeps for it.
        self.future: asyncio.Future[None] | None = None
        self.deadline = math.inf

    def ring(self) -> None:
        self.rung = True
        self._alarm.add(self)

    def clear(self) -> None:
        self.rung = False

    async def wait(self, timeout: float | None) -> bool:
        """Return whether it was rung since ``clear()``, waiting for that for at most ``timeout`` seconds."""
        if not self.rung:
            try:
                await self.begin(timeout)
            finally:
                self.end()
        return self.rung

    def begin(self, timeout: float | None) -> asyncio.Future[None]:
        """Return what to await: done when it is rung, or after ``timeout`` seconds, or up to a quarter more."""
        loop = asyncio.get_running_loop()
        self.future = loop.create_future()
        if timeout is not None:
            self.deadline = loop.time() + timeout
            self._alarm.sweep_for(self, timeout)
        return self.future

    def end(self) -> None:
        """Say that nobody awaits it any more."""
        self.future = None
        self.deadline = math.inf

    def answer(self) -> None:
        """Wake who awaits it. In the loop."""
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


class _LoopAlarm:
    """Wakes the waiters of one event loop: those that other threads rang for, all at once, and those whose time is up.

    Time is looked at in sweeps over all who wait, and not by a timer for each wait: an event that comes before its
    timeout, as almost all do, then costs no timer.
    """

    #: Seconds between two sweeps at most; a quarter of the shortest timeout, if that is less.
    INTERVAL = 1.0
    #: Seconds between two sweeps at least.
    LEAST = 0.01

    _alarms: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopAlarm]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._rung: deque[LoopBell] = deque()
        self._called = False
        self._timed: set[LoopBell] = set()
        self._interval = math.inf
        self._sweep_at = math.inf

    @classmethod
    def of_running_loop(cls) -> _LoopAlarm:
        loop = asyncio.get_running_loop()
        alarm = cls._alarms.get(loop)
        if alarm is None:
            alarm = cls._alarms[loop] = cls(loop)
        return alarm

    def add(self, bell: LoopBell) -> None:
        """Have ``bell`` answered soon. From any thread."""
        self._rung.append(bell)
        if not self._called:
            self._called = True
            loop = self._loop()
            # A loop that is closed, or gone, took its streams with it.
            if loop is not None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        # First the flag, then the bells: one that is added in between is answered now, and once more for nothing.
        self._called = False
        while self._rung:
            bell = self._rung.popleft()
            # Not rung any more? Then a look at the mailbox came first, and has taken what the ring was for.
            if bell.rung:
                bell.answer()

    def sweep_for(self, bell: LoopBell, timeout: float) -> None:
        """Have ``bell`` answered when its deadline, ``timeout`` seconds from now, has passed. In the loop."""
        self._timed.add(bell)
        if timeout >= 4 * self._interval:  # as almost always, for an event has come before the last timeout
            return
        interval = max(self.LEAST, min(self.INTERVAL, timeout / 4))
        if interval < self._interval:
            self._interval = interval
            self._sweep_later(asyncio.get_running_loop())

    def _sweep_later(self, loop: asyncio.AbstractEventLoop) -> None:
        # No timer is kept, for it would keep the loop. One that another has taken the place of does nothing.
        self._sweep_at = loop.time() + self._interval
        loop.call_at(self._sweep_at, self._sweep, loop, self._sweep_at)

    def _sweep(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if at != self._sweep_at:
            return
        now = loop.time()
        for bell in [bell for bell in self._timed if bell.deadline <= now]:
            bell.answer()
        # Who does not wait just now will say so again.
        self._timed = {bell for bell in self._timed if bell.future is not None and not bell.future.done()}
        if self._timed:
            self._sweep_later(loop)
        else:
            self._interval = self._sweep_at = math.inf
