"""How a stream waits for its mailbox: as a thread, a greenlet or a task. Knows nothing of what is sent.

The two ways differ in their bell alone. A bell may be rung by any thread, also when nobody waits yet; whoever waits
looks into the mailbox first, so no ring is lost and none is needed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Protocol

from .event import Event

__all__ = ["Inbox", "Mailbox", "Mailboxes"]


class Mailbox(Protocol):
    """What this module needs of a subscription (``runtime.Listener``)."""

    @property
    def ended(self) -> str | None: ...
    def wake_by(self, wake: Callable[[], None]) -> None: ...
    def take(self, limit: int | None = None) -> list[tuple[Event, bytes]]: ...
    def close(self, reason: str = "client") -> None: ...


class Mailboxes:
    """The subscriptions of one stream, which end with it. Thread-safe."""

    def __init__(self) -> None:
        self._opened: list[Mailbox] = []
        self._closed = False

    def add(self, mailbox: Mailbox) -> None:
        """Let ``mailbox`` end with the stream: at once, if that has ended."""
        self._opened = [opened for opened in self._opened if opened.ended is None] + [mailbox]
        if self._closed:
            mailbox.close()

    def close(self) -> None:
        """End them all, and those that come later."""
        self._closed = True
        for mailbox in self._opened:
            mailbox.close()


class Inbox:
    """The events of one subscription, for a thread that waits or a loop that awaits."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self._thread_bell: threading.Event | None = None
        self._loop_bell: _LoopBell | None = None

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
            bell = self._loop_bell = _LoopBell()
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


class _LoopBell:
    """An event that any thread may set, for one task at a time to await. Rings of one moment share one loop wake-up."""

    __slots__ = ("_alarm", "_future", "_rung")

    def __init__(self) -> None:
        self._alarm = _LoopAlarm.of_running_loop()
        self._future: asyncio.Future[bool] | None = None
        self._rung = False

    def ring(self) -> None:
        self._rung = True
        self._alarm.add(self)

    def answer(self) -> None:
        # Not rung any more? Then a look at the mailbox came first, and has taken what the ring was for.
        if self._rung and self._future is not None and not self._future.done():
            self._future.set_result(True)

    def clear(self) -> None:
        self._rung = False

    async def wait(self, timeout: float | None) -> bool:
        """Whether it rang since ``clear()``, or does within ``timeout`` seconds."""
        if self._rung:
            return True
        loop = self._alarm.loop
        self._future = future = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, _give_up, future)
        try:
            await future
        finally:
            self._future = None
            if timer is not None:
                timer.cancel()
        return self._rung


def _give_up(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(False)


class _LoopAlarm:
    """Wakes one event loop from other threads, once for all the bells that rang since it last woke."""

    _alarms: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopAlarm]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._bells: deque[_LoopBell] = deque()
        self._called = False

    @classmethod
    def of_running_loop(cls) -> _LoopAlarm:
        loop = asyncio.get_running_loop()
        alarm = cls._alarms.get(loop)
        if alarm is None:
            alarm = cls._alarms[loop] = cls(loop)
        return alarm

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop()
        assert loop is not None, "a bell is only used while its loop runs"
        return loop

    def add(self, bell: _LoopBell) -> None:
        self._bells.append(bell)
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
        while self._bells:
            self._bells.popleft().answer()
