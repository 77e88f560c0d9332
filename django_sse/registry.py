"""The open streams of this process: how many may be open, how each of them ended, and how all of them end.

A stream is registered before its headers are sent. What it has done is told once, when it has ended: in the log
(``django_sse.streams``) and by ``stream_closed``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .database import release_connections
from .exceptions import BrokerUnavailable, TooManyStreams
from .signals import stream_closed
from .wire import retry

__all__ = ["Account", "OpenStream", "Registry", "StreamInfo", "open_streams"]

log = logging.getLogger("django_sse.streams")

#: Seconds beyond the window that a drain waits for streams that do not end when they are told.
GRACE = 1.0
#: Seconds between two looks of a drain.
TICK = 0.02

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """Who a stream is, also after its request has gone."""

    #: The view class.
    view: type
    path: str
    channels: tuple[str, ...] = ()
    #: Whose it is (``BaseSseView.get_owner()``): the user's primary key, or ``None``.
    owner: Hashable = None
    #: A number that no other stream of this process has.
    id: int = field(default_factory=lambda: next(_numbers))


class Account:
    """What one stream has done, told at its end. Whoever ends it first says why."""

    __slots__ = ("_opened", "_settled", "bytes", "events", "info", "past", "retry")

    #: One for all: nothing is done under it but to look who is first.
    _lock = threading.Lock()

    def __init__(self, info: StreamInfo, retry: int = 2000) -> None:
        self.info = info
        #: Milliseconds after which its browser reconnects.
        self.retry = retry
        self.events = 0
        self.bytes = 0
        #: Bytes that were sent past the stream, and are not in ``bytes``.
        self.past = 0
        self._opened: float | None = None
        self._settled = False

    def open(self) -> bool:
        """Start the clock; return whether this was the first call."""
        if self._opened is not None:
            return False
        self._opened = time.monotonic()
        return True

    def settle(self, reason: str, error: BaseException | None = None) -> dict[str, Any] | None:
        """Write the log line; return what ``stream_closed`` is to be sent with, and ``None`` after the first time."""
        with Account._lock:
            if self._settled or self._opened is None:
                return None
            self._settled = True
        figures = {
            "reason": reason,
            "events": self.events,
            "bytes": self.bytes + self.past,
            "seconds": time.monotonic() - self._opened,
        }
        view = f"{self.info.view.__module__}.{self.info.view.__qualname__}"
        away = isinstance(error, BrokerUnavailable)  # the program has not failed, and the broker has been logged
        level = logging.INFO
        if away or reason in ("overflow", "stalled"):
            level = logging.WARNING
        elif error is not None or reason == "error":
            level = logging.ERROR
        log.log(
            level,
            "stream closed: reason=%(reason)s events=%(events)d bytes=%(bytes)d seconds=%(seconds).3f "
            "view=%(view)s path=%(path)s",
            {**figures, "view": view, "path": self.info.path},
            exc_info=None if away else error,
            extra={**figures, "view": view, "path": self.info.path, "channels": self.info.channels},
        )
        return {"sender": self.info.view, "stream": self.info, **figures}


class OpenStream(Protocol):
    """What the registry needs of a stream (``streams.Stream``)."""

    account: Account | None

    def end(self, reason: str, last: bytes = b"") -> None: ...
    def close(self, reason: str | None = None) -> None: ...
    def stalled_for(self, now: float) -> float: ...


class Registry:
    """Every stream of this process that has not ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the collector may forget a stream while another is admitted
        # Weak: a stream that is dropped unclosed gives its place back.
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._owners: dict[Hashable, weakref.WeakSet[Any]] = {}
        self._watcher: threading.Thread | None = None
        # Seconds between two looks of the watcher; set by whoever wants it to be less than it was.
        self._interval = threading.TIMEOUT_MAX
        self._hurry = threading.Event()
        # Ends that receivers of the signal are yet to hear of, and whether a thread is telling them.
        self._untold: deque[dict[str, Any]] = deque()
        self._telling = False
        # Accounts of streams that were collected unclosed, in whatever thread that was.
        self._dropped: deque[Account] = deque()
        #: Whether this process is about to stop, and takes no new streams.
        self.draining = False

    def __len__(self) -> int:
        return len(self._streams)

    def all(self) -> list[Any]:
        """Return the streams."""
        with self._lock:
            return list(self._streams)

    def admit(self, stream: Any, *, limit: int | None, owner: Hashable = None, owner_limit: int | None = None) -> None:
        """Register ``stream``. Raises ``TooManyStreams`` beyond a limit, and while this process stops."""
        self._reap()
        with self._lock:
            if self.draining:
                raise TooManyStreams("This process is stopping; another one will serve the stream.")
            if limit is not None and len(self._streams) >= limit:
                raise TooManyStreams(
                    f"{limit} streams are open in this process. Start more processes, or raise "
                    'DJANGO_SSE["MAX_STREAMS"].'
                )
            if owner is not None and owner_limit is not None:
                owned = self._owners.setdefault(owner, weakref.WeakSet())
                if len(owned) >= owner_limit:
                    raise TooManyStreams(
                        f"{owner_limit} streams are open for the user {owner!r} in this process, which is "
                        'DJANGO_SSE["MAX_STREAMS_PER_USER"].'
                    )
                owned.add(stream)
            self._streams.add(stream)

    def forget(self, stream: Any) -> None:
        """Give the place of ``stream`` to another. May be called again."""
        self._reap()
        with self._lock:
            self._streams.discard(stream)
            if not self._streams:
                self._hurry.set()  # nobody is left to be watched
            owner = stream.account.info.owner
            owned = self._owners.get(owner)
            if owned is not None:
                owned.discard(stream)
                if not owned:
                    del self._owners[owner]

    def drop(self, account: Account) -> None:
        """Have ``account`` settled soon. Takes no lock, for the collector runs anywhere, even under ours."""
        self._dropped.append(account)

    def _reap(self) -> None:
        while self._dropped:
            try:
                account = self._dropped.popleft()
            except IndexError:  # another thread was quicker
                return
            with self._lock:
                if not self._owners.get(account.info.owner, True):
                    del self._owners[account.info.owner]
            told = account.settle("client")
            if told is not None:
                self.send_closed(told)

    def send_closed(self, told: dict[str, Any]) -> None:
        """Send ``stream_closed`` with what ``Account.settle()`` has returned."""
        if not stream_closed.has_listeners(told["sender"]):
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            stream_closed.send_robust(**told)
            return
        # Receivers may use the database, which would block the loop in this thread, and is refused by Django there.
        with self._lock:
            self._untold.append(told)
            if not self._telling:
                threading.Thread(target=self._tell, name="django-sse-closed").start()
                self._telling = True

    def _tell(self) -> None:
        while True:
            with self._lock:
                if not self._untold:
                    self._telling = False
                    break
                told = self._untold.popleft()
            stream_closed.send_robust(**told)
        release_connections()

    def watch(self, interval: float) -> None:
        """Have streams whose client does not read ended, looking every ``interval`` seconds, while there are any."""
        with self._lock:
            if interval < self._interval:
                self._interval = interval
                self._hurry.set()
            if self._watcher is None:
                watcher = threading.Thread(target=self._watch, name="django-sse-watch", daemon=True)
                watcher.start()
                self._watcher = watcher

    def _watch(self) -> None:
        while True:
            if self._hurry.wait(self._interval):
                self._hurry.clear()
            self._end_stalled(time.monotonic())
            with self._lock:
                if not self._streams:
                    self._watcher, self._interval = None, threading.TIMEOUT_MAX
                    return

    def _end_stalled(self, now: float) -> None:
        for stream in self.all():
            if stream.stalled_for(now) > 0:
                _safely(stream.close, "stalled")

    def drain(self, window: float) -> None:
        """End every stream, spread over ``window`` seconds, each with a ``retry`` of its own; take no new ones.

        Returns when none is open any more, at the latest one second after the window.
        """
        self.draining = True
        begun = time.monotonic()
        streams = self.all()
        random.shuffle(streams)
        pause = window / max(len(streams), 1)
        for number in range(len(streams)):
            while len(self) and time.monotonic() < begun + number * pause:  # somebody may be in more of a hurry
                time.sleep(min(TICK, window))
            # None is held for longer than that: who has left must be free to go.
            self._dismiss(streams.pop(), window)
        while len(self) and time.monotonic() < begun + window + GRACE:
            time.sleep(TICK)

    @staticmethod
    def _dismiss(stream: OpenStream, window: float) -> None:
        # The next process is not met by all of them at once.
        least = 2000 if stream.account is None else stream.account.retry
        _safely(stream.end, "shutdown", retry(least + int(random.uniform(0, max(window, 1) * 1000))))


def _safely(function: Callable[..., object], *args: object) -> None:
    # What one stream's iterator does in its ``finally`` must not be the end of the others.
    try:
        function(*args)
    except Exception:
        log.exception("A stream could not be ended")


open_streams = Registry()


def _forget_after_fork() -> None:
    Registry.__init__(open_streams)
    Account._lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
