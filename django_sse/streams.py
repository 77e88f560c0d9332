"""What is handed to ``StreamingHttpResponse``: iterable in the way that suits the request, once, and closable.

Whoever asks for chunks (a thread, a task, or ``pump``) goes through ``take()``. The stream sends what there is at once,
breaks silence with heartbeats, ends when its time is up, and accounts for itself once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from . import shutdown
from .database import ThreadSensitiveContext, arelease_connections, lend, release_connections
from .feeds import FEEDS, HEARTBEAT, LATE, Chunk, Feed, InTask, Mail, Source
from .inbox import LoopBell, Mailbox
from .registry import Account, open_streams
from .signals import stream_closed, stream_opened
from .workers import Workers, in_worker

__all__ = ["Stream"]

log = logging.getLogger("django_sse")

#: ``max_age`` is lengthened or shortened by at most this part: clients of one moment do not come back in one moment.
JITTER = 0.2


class Stream:
    """The chunks of a source.

    For a request of an event loop (``on_loop``) it is an async iterable to everybody but the thread that runs a sync
    ``iterator()`` or ``_iterator()`` there: that one may loop over it with a plain ``for``. With an ``account`` it is
    one of this process's open streams, and tells what it has done at its end. ``max_age`` and ``stall_timeout`` are
    seconds, or ``None`` for no limit.
    """

    __slots__ = (
        "__weakref__",
        "_begun",
        "_feed",
        "_first",
        "_last",
        "_loop_bell",
        "_max_age",
        "_on_loop",
        "_over",
        "_quiet",
        "_reason",
        "_source",
        "_stall_timeout",
        "_thread_bell",
        "_too_old",
        "_workers",
        "account",
        "given",
        "heartbeats",
        "stall_timeout",
    )

    def __init__(
        self,
        source: Source,
        workers: Workers,
        *,
        on_loop: bool,
        account: Account | None = None,
        max_age: float | None = None,
        stall_timeout: float | None = None,
    ) -> None:
        self.account = account
        self._source = source
        self._workers = workers
        self._on_loop = on_loop
        self._feed: Feed | None = None
        self._first: Iterator[Chunk] | None = iter(source.first)
        #: Whether the iterator's error is for the log alone.
        self._quiet = False
        self._reason: str | None = None
        self._last = b""
        self._over = False
        self._begun = False
        self._thread_bell: threading.Event | None = None
        self._loop_bell: LoopBell | None = None
        self._max_age = max_age
        self._too_old: float | None = None
        self._stall_timeout = self.stall_timeout = stall_timeout
        #: How many were sent past the stream.
        self.heartbeats = 0
        #: When the client was given its last chunk (``time.monotonic()``); ``None`` while it waits for the next.
        self.given: float | None = None
        if on_loop and not in_worker() and source.kind(on_loop=True) == "sync":
            self._feed = FEEDS["sync"][True](source, workers)  # hired while a refusal can still be an answer

    # -- who asks -------------------------------------------------------------------------------------------------

    def for_server(self) -> Stream:
        """Leave as bytes, and end without an error whatever happens: the browser comes back by itself.

        A stream that other code iterates leaves as text instead, and raises there what its iterator has raised.
        """
        self._source.text = False
        self._quiet = True
        return self

    def __iter__(self) -> Iterator[Chunk]:
        if self._on_loop and not in_worker():
            # Django asks for a plain iterator first, and would then collect an endless stream before it sends a byte.
            raise TypeError("this stream belongs to an ASGI request: iterate it with 'async for'")
        if self._on_loop and self._feed is not None:
            self._feed.leave()  # hired in vain: this thread does the work
            self._feed = None
        self._make_feed(on_loop=False)
        return self

    def __next__(self) -> Chunk:
        self.given = None
        if not self._begun:
            self._begun = True
            if self.account is not None:
                self._begin(self.account)
                stream_opened.send_robust(sender=self.account.info.view, stream=self.account.info)
                release_connections()
        bell = self._thread_bell
        if bell is None:
            bell = self._thread_bell = threading.Event()
            self._make_feed(on_loop=False).ring_by(bell.set)
        while True:
            chunk = None
            if bell.is_set() or not self._drained():
                bell.clear()
                chunk = self.take()
                if chunk is None and self._over:
                    self._settle()
                    raise StopIteration
            if chunk is None and not bell.wait(self._patience()):
                chunk = self.silence()
            if chunk:
                self.given = time.monotonic()
                return chunk

    def __aiter__(self) -> AsyncIterator[Chunk]:
        self._make_feed(on_loop=True)
        return self

    async def __anext__(self) -> Chunk:
        self.given = None
        bell = self._loop_bell
        if bell is None:
            bell = await self._get_bell()
        while True:
            chunk = None
            if bell.rung or not self._drained():
                bell.rung = False
                chunk = self.take()
            if not chunk:
                if self._over:
                    await self.settle_on_loop()
                    await self.unwound()
                    raise StopAsyncIteration
                if not bell.rung:
                    # Awaited here, for it is on the way of every event.
                    future = bell.begin(self._patience())
                    try:
                        await future
                    except asyncio.CancelledError:
                        await self._cancelled()
                        raise
                    finally:
                        bell.end()
                if bell.rung:
                    continue
                chunk = self.silence()
            if chunk:
                self.given = time.monotonic()
                return chunk

    async def _get_bell(self) -> LoopBell:
        if not self._begun:
            self._begun = True
            if self.account is not None:
                await self.begin_in_handler(self.close)
        bell = self._loop_bell = LoopBell()
        self._make_feed(on_loop=True).ring_by(bell.ring)
        return bell

    async def _cancelled(self) -> None:
        if self.account is not None:  # the request has ended, by whatever way of Django or the server
            self.shut()
            await self.unwound()

    async def aclose(self) -> None:
        """Do nothing: Django closes what it has iterated, and then the response, which ends the stream."""

    def outside(self) -> Stream:
        """Get ready to be delivered outside of Django's handler. In the event loop, in the handler's context."""
        feed = self._make_feed(on_loop=True)
        if isinstance(feed, InTask):
            feed.go_outside()
        self._source.detach()
        self._stall_timeout = None  # whoever delivers it sees to ``stall_timeout``
        return self

    def ring_by(self, ring: Callable[[], None]) -> None:
        """Have ``ring`` called, by any thread, when ``take()`` has something to give or the end has come."""
        self._make_feed(on_loop=True).ring_by(ring)

    def mark(self, *, slow: bool) -> None:
        """Say whether the client takes what it is sent: who delivers the stream knows."""
        if self._feed is not None:
            self._feed.mark(slow=slow)

    @property
    def is_mail(self) -> bool:
        """Whether the events of a mailbox are the stream."""
        return self._source.kind(on_loop=True) == "mailbox"

    @property
    def begun(self) -> bool:
        """Whether it was said that the stream is open."""
        return self._begun

    @property
    def mailbox(self) -> Mailbox | None:
        """The mailbox whose frames are the chunks while ``buffer`` is empty; ``None`` where the chunks are made."""
        return self._feed.mailbox if isinstance(self._feed, Mail) and self._source.is_detached else None

    @property
    def buffer(self) -> Any:
        """An ``Sse``, which is sent with the mailbox's next event; ``None`` where nobody can fill it."""
        return self._source.detached

    def count(self, size: int) -> None:
        """Add ``size`` bytes to the account."""
        if self.account is not None:
            self.account.bytes += size

    @property
    def heartbeat(self) -> float | None:
        """Seconds of silence after which ``silence()`` is to be sent."""
        return self._source.heartbeat

    @property
    def too_old(self) -> float | None:
        """When the stream ends for its age (``time.monotonic()``)."""
        return self._too_old

    async def begin_in_handler(self, close: Callable[[], None]) -> None:
        """Say that the stream is open, and give back what its request holds. ``close`` is called when that ends."""
        try:
            await self.begin_on_loop()
            lend(close)
            await arelease_connections()
        except BaseException:
            self.close()
            raise

    # -- what comes -----------------------------------------------------------------------------------------------

    def take(self) -> Chunk | None:
        """Return the next chunk if there is one: ``None`` until the feed rings, and when the stream is ``over``."""
        chunk = self._take()
        if chunk is not None and self.account is not None:
            self.account.bytes += len(chunk) if isinstance(chunk, bytes) else len(chunk.encode())
        return chunk

    def _drained(self) -> bool:
        """Whether the feed will ring before ``take()`` has something to give."""
        return self._first is None and self._feed is not None and self._feed.drained

    def _take(self) -> Chunk | None:
        if self._first is not None:
            for chunk in self._first:
                if chunk:
                    return self._source.out(chunk)
            self._first = None
            self._source.first = ()
            self._source.let_go()
        feed = self._feed
        assert feed is not None
        if self._over:
            return None
        if self._too_old is not None and time.monotonic() >= self._too_old:
            self.end("max_age")
        taken = feed.take()
        if taken is not None:
            return taken
        if feed.ended is None:
            return None
        if self._last:
            last, self._last = self._last, b""
            return self._source.out(last)
        self._over = True
        self._reason = self._reason or feed.ended
        if feed.error is not None and not self._quiet:
            self._settle()
            raise _told_to_code(feed.error, on_loop=self._on_loop)
        return None

    @property
    def over(self) -> bool:
        """Whether the last chunk has been taken."""
        return self._over

    def silence(self) -> Chunk | None:
        """Return what breaks a silence that has lasted long enough: a heartbeat, or the end for its age."""
        if self._too_old is not None and time.monotonic() >= self._too_old:
            self.end("max_age")
            return None
        if self._source.heartbeat is None:
            return None
        chunk = self._source.silence()
        self.count(len(chunk))
        return chunk

    def _patience(self) -> float | None:
        heartbeat = self._source.heartbeat
        if self._too_old is None:
            return heartbeat
        left = max(0.0, self._too_old - time.monotonic())
        return left if heartbeat is None else min(heartbeat, left)

    def _make_feed(self, *, on_loop: bool) -> Feed:
        if self._feed is None:
            self._feed = FEEDS[self._source.kind(on_loop=on_loop)][on_loop](self._source, self._workers)
            if self._reason is not None:
                self._feed.close(self._reason)
        return self._feed

    # -- beginning and end ----------------------------------------------------------------------------------------

    def _begin(self, account: Account) -> None:
        self._source.detach()
        account.open()
        shutdown.at_stream()
        if self._max_age is not None:
            self._too_old = time.monotonic() + self._max_age * random.uniform(1 - JITTER, 1 + JITTER)
        if self._stall_timeout is not None:
            open_streams.watch(self._stall_timeout / 4)

    async def begin_on_loop(self) -> None:
        """Say that the stream is open."""
        assert self.account is not None
        self._begun = True
        self._begin(self.account)
        info = self.account.info
        if stream_opened.has_listeners(info.view):
            async with ThreadSensitiveContext():
                await stream_opened.asend_robust(sender=info.view, stream=info)
                await arelease_connections()

    def end(self, reason: str, last: bytes = b"") -> None:
        """Have the stream end soon, with the chunk ``last`` after what waits. By any thread."""
        if self._reason is None:
            self._reason, self._last = reason, last
            # The mailboxes first: their end is what a thread that waits for one can see.
            self._source.mailboxes.close(reason)
            if self._feed is not None:
                self._feed.end(reason)
            elif not self._begun:
                self._source.discard()

    def close(self, reason: str | None = None) -> None:
        """End the stream: give the mailboxes back, run the iterator's ``finally``. By any thread, at any time.

        Without a ``reason`` it is the server that ends it: its client has left, or its process stops.
        """
        try:
            self.shut(reason)
        finally:
            self._settle()

    def shut(self, reason: str | None = None) -> None:
        """Do what ``close()`` does, but leave the account to ``settle_on_loop()``."""
        if self._reason is None:
            self._reason = reason or ("shutdown" if open_streams.draining else "client")
        self._source.mailboxes.close(self._reason)
        try:
            if self._feed is None:
                self._source.discard()
            else:
                self._feed.close(self._reason)
        except Exception:
            if not self._quiet:
                raise
            log.exception(LATE)

    def __del__(self) -> None:
        # Dropped unclosed, its thread or task would wait for the next step for ever. No lock may be taken, for the
        # collector runs anywhere, even under ours; mailboxes see to themselves. Not there: refused in the making.
        feed = getattr(self, "_feed", None)
        if feed is not None and feed.ended is None:
            feed.drop()
            if self.account is not None:
                self._add_up(self.account, feed)
                open_streams.drop(self.account)

    def stalled_for(self, now: float) -> float:
        """Return for how many seconds more than ``stall_timeout`` the client has not taken its chunk."""
        given = self.given
        if given is None or self._stall_timeout is None:
            return 0.0
        return now - given - self._stall_timeout

    def _settle(self) -> None:
        try:
            told = self._tell()
            if told is not None:
                open_streams.send_closed(told)
        finally:
            self._forget()

    async def settle_on_loop(self) -> None:
        """Tell what the stream has done, once."""
        try:
            told = self._tell()
            if told is not None and stream_closed.has_listeners(told["sender"]):
                async with ThreadSensitiveContext():
                    await stream_closed.asend_robust(**told)
                    await arelease_connections()
        finally:
            self._forget()

    @property
    def unwinds(self) -> bool:
        """Whether an async iterator has still to come to its end."""
        return isinstance(self._feed, InTask)

    async def unwound(self) -> None:
        """Wait for what an async iterator still does at its end."""
        if isinstance(self._feed, InTask):
            await self._feed.unwound()

    def _forget(self) -> None:
        # Last of all: a process that stops waits for those that are not forgotten.
        if self.account is not None:
            open_streams.forget(self)

    def _tell(self) -> dict[str, Any] | None:
        if self.account is None:
            return None
        error = None if self._feed is None else self._feed.error
        if self._feed is not None:
            self._add_up(self.account, self._feed)
        return self.account.settle(self._reason or "client", error)

    def _add_up(self, account: Account, feed: Feed) -> None:
        account.events = feed.events
        account.past = self.heartbeats * len(HEARTBEAT)
        if isinstance(feed, Mail):
            account.past += feed.mailbox.bytes_alike


def _told_to_code(error: BaseException, *, on_loop: bool) -> BaseException:
    if on_loop and isinstance(error, TypeError):
        # Under ASGI, Django takes a TypeError for the news that the iterator is not async, and starts it over.
        told = RuntimeError(f"The iterator of a stream raised TypeError: {error}")
        told.__cause__ = error
        return told
    return error
