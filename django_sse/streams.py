"""What is handed to ``StreamingHttpResponse``, and the ways to wait for the next chunk of it.

Whatever a view's ``iterator()`` is meets whatever the server is in one table, ``DRIVERS``. Each driver sends what there
is at once, never asks for more than one step ahead of the client, and may be closed by any thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import logging
import os
import queue
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, Protocol

import sse

from .event import Event
from .exceptions import BrokerUnavailable, TooManyStreams
from .wire import Sse, comment

__all__ = ["Chunk", "Inbox", "Mailbox", "Source", "Stream", "Workers", "on_gevent", "on_unpatched_gevent"]

log = logging.getLogger("django_sse")

Chunk = str | bytes
_DONE = object()
_HEARTBEAT = comment()


class Mailbox(Protocol):
    """What this module needs of a subscription (``runtime.Listener``)."""

    @property
    def ended(self) -> str | None: ...
    def wake_by(self, wake: Callable[[], None]) -> None: ...
    def take(self, limit: int | None = None) -> list[tuple[Event, bytes]]: ...
    def close(self, reason: str = "client") -> None: ...


# ------------------------------------------------------------------------------------------------ what is waited for


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
        if self._future is not None and not self._future.done():
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

    _alarms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopAlarm] = weakref.WeakKeyDictionary()

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
            # A loop that is gone took its streams with it.
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        # First the flag, then the bells: one that is added in between is answered now, and once more for nothing.
        self._called = False
        while self._bells:
            self._bells.popleft().answer()


# ----------------------------------------------------------------------------------------------------- what is sent


class Source:
    """What a stream sends: the steps of ``iterator``, or a mailbox.

    ``flush(value)`` gives the chunks that follow from one step, which yielded ``value``. ``first`` are the chunks that
    are sent before the first step. ``mailbox``, if any, is given back with the stream; with ``iterator`` ``None`` its
    events are the stream, with a comment after every ``heartbeat`` seconds of silence.
    """

    def __init__(
        self,
        iterator: Iterable[object] | AsyncIterable[object] | None,
        flush: Callable[[object], Iterable[Chunk]],
        *,
        first: Iterable[Chunk] = (),
        mailbox: Mailbox | None = None,
        heartbeat: float | None = None,
    ) -> None:
        self.iterator = iterator
        self.flush = flush
        self.first = first
        self.mailbox = mailbox
        self.heartbeat = heartbeat
        #: Whether chunks leave as text, for code that edits them, or as bytes.
        self.text = True
        #: Whether ``BrokerUnavailable`` ends the stream like the end of the iterator; it has been logged already.
        self.quiet = False

    def kind(self, *, on_loop: bool) -> str:
        """Return the row of ``DRIVERS``. What can be iterated in both ways takes the one that suits who asks."""
        if self.iterator is None:
            return "mailbox"
        if hasattr(self.iterator, "__aiter__") and (on_loop or not hasattr(self.iterator, "__iter__")):
            return "async"
        return "sync"

    def out(self, chunk: Chunk) -> Chunk:
        """Return ``chunk`` in the form in which it shall leave."""
        if isinstance(chunk, str):
            return chunk if self.text else chunk.encode()
        return chunk.decode() if self.text else chunk

    def frames(self, taken: list[tuple[Event, bytes]]) -> Chunk:
        """Return what is sent for the events taken from the mailbox: a heartbeat where there are none."""
        frames = [frame for _, frame in taken] or [_HEARTBEAT]
        for chunk in self.flush(None):
            frames.append(chunk.encode() if isinstance(chunk, str) else chunk)
        return self.out(frames[0] if len(frames) == 1 else b"".join(frames))


def flush_sse(buffer: sse.Sse) -> Iterable[Chunk]:
    """Return what ``buffer`` holds, emptying it: one chunk, or as many as a subclass's own ``__iter__`` makes."""
    if has_own_iter(buffer):
        return iter(buffer)
    text = "".join(buffer)
    return (text,) if text else ()


def has_own_iter(buffer: sse.Sse) -> bool:
    """Whether the class of ``buffer`` decides itself what its iteration gives."""
    return type(buffer).__iter__ not in (sse.Sse.__iter__, Sse.__iter__)


# ------------------------------------------------------------------------------------------------------ the drivers


class _Here:
    """A sync iterator, stepped by the thread that asks."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._source = source
        self._chunks: Iterator[Chunk] = iter(source.first)
        self._steps: Iterator[object] | None = None
        self._over = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while True:
            for chunk in self._chunks:
                if chunk:
                    return self._source.out(chunk)
            if self._over:
                raise StopIteration
            if self._steps is None:
                self._steps = iter(self._source.iterator)  # type: ignore[arg-type]
            value: object = None
            try:
                value = next(self._steps)
            except StopIteration:
                self._over = True
            except BrokerUnavailable:
                if not self._source.quiet:
                    raise
                self._over = True
            self._chunks = iter(self._source.flush(value))

    def close(self) -> None:
        self._over = True
        self._chunks = iter(())
        close = getattr(self._steps, "close", None)
        if close is not None:
            # Another thread is in the middle of a step? Then it sees the end afterwards.
            try:
                close()
            except ValueError:
                if not inspect.isgenerator(self._steps) or not self._steps.gi_running:
                    raise


class _Await:
    """An async iterator, awaited by the task that asks."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._source = source
        self._chunks: Iterator[Chunk] = iter(source.first)
        self._steps: AsyncIterator[object] | None = None
        self._over = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            for chunk in self._chunks:
                if chunk:
                    return self._source.out(chunk)
            if self._over:
                raise StopAsyncIteration
            if self._steps is None:
                self._loop = asyncio.get_running_loop()
                self._steps = aiter(self._source.iterator)  # type: ignore[arg-type]
            value: object = None
            try:
                value = await anext(self._steps)
            except StopAsyncIteration:
                self._over = True
            except BrokerUnavailable:
                if not self._source.quiet:
                    raise
                self._over = True
            self._chunks = iter(self._source.flush(value))

    def close(self) -> None:
        self._over = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._close_soon, loop)

    def _close_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        task = loop.create_task(self.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    async def aclose(self) -> None:
        self._over = True
        aclose = getattr(self._steps, "aclose", None)
        if aclose is None:
            return
        try:
            await aclose()
        except RuntimeError:
            # Cancelled in the middle of a step, it is unwinding already.
            if not getattr(self._steps, "ag_running", False):
                raise


#: Tasks that run a user's ``finally``: the loop itself keeps no reference to them.
_closing: set[asyncio.Task[None]] = set()


class _InThread:
    """A sync iterator under an event loop: stepped, start to end, by a thread of its own."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._inner = _Here(source, workers)
        self._worker = workers.hire(self._inner.close)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self._worker.run(lambda: next(self._inner, _DONE))
        if chunk is _DONE:
            raise StopAsyncIteration
        return chunk  # type: ignore[return-value]

    def close(self) -> None:
        self._worker.stop()

    def __del__(self) -> None:
        self._worker.stop()  # dropped unclosed: the thread would wait for its next step for ever


class _InLoop:
    """An async iterator under a server of threads: awaited, start to end, in the loop of a thread of ours."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._inner = _Await(source, workers)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = _shared_loop.run(self._step())
        if chunk is _DONE:
            raise StopIteration
        return chunk  # type: ignore[return-value]

    async def _step(self) -> object:
        return await anext(self._inner, _DONE)

    def close(self) -> None:
        self._inner.close()


class _Wait:
    """A mailbox, waited for by the thread that asks."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._source = source
        self._chunks = iter(source.first)
        self._inbox = Inbox(_mailbox_of(source))

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        for chunk in self._chunks:
            return self._source.out(chunk)
        taken = self._inbox.wait(self._source.heartbeat)
        if taken is None:
            raise StopIteration
        return self._source.frames(taken)

    def close(self) -> None:
        self._inbox.mailbox.close()


class _AwaitMail:
    """A mailbox, awaited by the task that asks."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._source = source
        self._chunks = iter(source.first)
        self._inbox = Inbox(_mailbox_of(source))

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        for chunk in self._chunks:
            return self._source.out(chunk)
        taken = await self._inbox.await_(self._source.heartbeat)
        if taken is None:
            raise StopAsyncIteration
        return self._source.frames(taken)

    def close(self) -> None:
        self._inbox.mailbox.close()


def _mailbox_of(source: Source) -> Mailbox:
    assert source.mailbox is not None, "a source without an iterator has a mailbox"
    return source.mailbox


#: What ``iterator()`` gives x how the server asks for the next chunk.
DRIVERS: dict[str, tuple[Callable[[Source, Workers], Any], Callable[[Source, Workers], Any]]] = {
    #           by a thread or greenlet (WSGI)   by an event loop (ASGI)
    "sync": (_Here, _InThread),
    "async": (_InLoop, _Await),
    "mailbox": (_Wait, _AwaitMail),
}


class Stream:
    """What ``_iterator()`` returns: iterable in the way that suits the request at hand, once, and closable.

    For a request of an event loop (``on_loop``) it is an async iterable, to everybody but the thread that runs a sync
    ``iterator()`` or ``_iterator()`` there: that one may loop over it with a plain ``for``.
    """

    def __init__(self, source: Source, workers: Workers, *, on_loop: bool) -> None:
        self._source = source
        self._workers = workers
        self._on_loop = on_loop
        self._driver: Any = None
        if on_loop and not in_worker() and source.kind(on_loop=True) == "sync":
            self._driver = _InThread(source, workers)  # hired while a refusal can still be an answer

    def for_server(self) -> Stream:
        """Leave as bytes, and end without an error where the broker is not there: the browser comes back by itself.

        A stream that other code iterates leaves as text instead, and raises ``BrokerUnavailable`` there.
        """
        self._source.text = False
        self._source.quiet = True
        return self

    def __iter__(self) -> Iterator[Chunk]:
        if self._on_loop and not in_worker():
            # Django asks for a plain iterator first, and would then collect an endless stream before it sends a byte.
            raise TypeError("this stream belongs to an ASGI request: iterate it with 'async for'")
        if self._on_loop and self._driver is not None:
            self._driver.close()  # hired in vain: this thread does the work
            self._driver = None
        return self._drive(on_loop=False)  # type: ignore[no-any-return]

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._drive(on_loop=True)  # type: ignore[no-any-return]

    def _drive(self, *, on_loop: bool) -> Any:
        if self._driver is None:
            self._driver = DRIVERS[self._source.kind(on_loop=on_loop)][on_loop](self._source, self._workers)
        return self._driver

    def close(self) -> None:
        """End the stream: the mailbox is given back, and the iterator's ``finally`` runs. By any thread, at any time."""
        # The mailbox first: its end is what a thread that waits for it can see.
        if self._source.mailbox is not None:
            self._source.mailbox.close()
        if self._driver is not None:
            self._driver.close()


# ------------------------------------------------------------------------------------------- threads and loops of ours


class Workers:
    """The threads that step sync iterators for event loops, one for each stream, at most ``limit()`` of them.

    One each, and not a pool of fewer: how long a step takes is up to the iterator's blocking calls, and what it keeps in
    its thread (a database connection) must be there at the next step. ``at_exit`` is called in a thread that ends.
    """

    def __init__(self, limit: Callable[[], int], at_exit: Callable[[], None]) -> None:
        self.limit = limit
        self.at_exit = at_exit
        self._lock = threading.Lock()
        # Weak: a stream that is dropped unclosed takes its place with it.
        self._hired: weakref.WeakSet[_Worker] = weakref.WeakSet()

    def hire(self, close: Callable[[], None]) -> _Worker:
        """Return a worker, which calls ``close`` at its end. Raises ``TooManyStreams``."""
        limit = self.limit()
        with self._lock:
            full = len(self._hired) >= limit
            if not full:
                worker = _Worker(self, close)
                self._hired.add(worker)
                return worker
        raise TooManyStreams(
            f"{limit} sync iterators are streaming under ASGI in this process, each in a thread of its own. "
            'Raise DJANGO_SSE["THREADS"], or write the iterator as `async def`, which needs no thread.'
        )

    def dismiss(self, worker: _Worker) -> None:
        """Give the worker's place to another."""
        with self._lock:
            self._hired.discard(worker)


class _Worker:
    """A thread, started with its first call."""

    _inside = threading.local()
    _number = itertools.count(1)

    def __init__(self, workers: Workers, close: Callable[[], None]) -> None:
        self._workers = workers
        self._close = close
        self._context = contextvars.copy_context()
        # SimpleQueue, for its put() may be called from __del__. None: end.
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False

    async def run(self, function: Callable[[], object]) -> object:
        """Return what ``function`` returns or raises, called in the thread. One at a time."""
        if self._stopped:
            return _DONE
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        self._calls.put((function, loop, future))
        if self._thread is None:
            name = f"django-sse-stream-{next(self._number)}"
            # Daemon: an endless iterator must not keep the process from ending.
            self._thread = threading.Thread(target=self._context.run, args=(self._work,), name=name, daemon=True)
            self._thread.start()
        return await future

    def stop(self) -> None:
        """Close the iterator in its thread, after the step that is under way, and end the thread."""
        if not self._stopped:
            self._stopped = True
            self._calls.put(None)
            if self._thread is None:
                self._close()
                self._workers.dismiss(self)

    def _work(self) -> None:
        self._inside.yes = True
        try:
            while (call := self._calls.get()) is not None and not self._stopped:
                _answer(*call)
            self._close()
        except Exception:
            log.exception("The iterator of a stream failed while it was closed")
        finally:
            self._workers.at_exit()
            self._workers.dismiss(self)


Call = tuple[Callable[[], object], asyncio.AbstractEventLoop, "asyncio.Future[object]"]


def _answer(function: Callable[[], object], loop: asyncio.AbstractEventLoop, future: asyncio.Future[object]) -> None:
    result: object = None
    error: BaseException | None = None
    try:
        result = function()
    except BaseException as caught:
        error = caught
    # A loop that is closed awaits nothing any more.
    if not loop.is_closed():
        loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[object], result: object, error: BaseException | None) -> None:
    if future.done():  # cancelled: the client has left
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def in_worker() -> bool:
    """Whether this thread runs a sync iterator for an event loop."""
    return getattr(_Worker._inside, "yes", False)


class _SharedLoop:
    """One event loop in a thread of its own, for the async iterators of a server of threads. Started when needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, awaitable: Awaitable[object]) -> object:
        """Return what ``awaitable`` returns or raises, awaited in the loop."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="django-sse-loop", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()  # type: ignore[arg-type]


_shared_loop = _SharedLoop()


def _forget_after_fork() -> None:
    # The parent's loop thread does not run here.
    global _shared_loop
    _shared_loop = _SharedLoop()


os.register_at_fork(after_in_child=_forget_after_fork)


def on_gevent() -> bool:
    """Whether this process's threads are greenlets (``gevent.monkey.patch_all()``)."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def on_unpatched_gevent() -> bool:
    """Whether the caller is a greenlet although threads are not: waiting would then stop the whole process."""
    gevent = sys.modules.get("gevent")
    return gevent is not None and not on_gevent() and isinstance(gevent.getcurrent(), gevent.Greenlet)
