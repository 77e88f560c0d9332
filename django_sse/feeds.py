"""Where a stream's chunks come from: the steps of an iterator, or a mailbox. Knows nothing of who asks.

What ``iterator()`` gives meets how the server asks in one table, ``FEEDS``. A feed rings when there is something to
take, works for one chunk at a time and only when asked, and may be closed by any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import sse

from .database import OwnThread, arelease_idle, lend, stepping
from .inbox import Mailbox, Mailboxes
from .wire import Sse, comment
from .workers import DONE, Workers, shared_loop

__all__ = [
    "FEEDS",
    "HEARTBEAT",
    "LATE",
    "Chunk",
    "Feed",
    "InTask",
    "Mail",
    "Source",
    "flush_sse",
    "has_own_iter",
    "running",
]

log = logging.getLogger("django_sse")

Chunk = str | bytes
#: The tasks of async iterators, until their ``finally`` has run: the loop itself keeps no reference to them.
running: set[asyncio.Task[None]] = set()
#: What breaks a silence.
HEARTBEAT = comment()
#: Seconds for which a connection that is over is kept, so that its server waits for an iterator's ``finally``.
UNWINDING = 5.0
#: What the log says of an error that comes when the stream has ended already.
LATE = "The iterator of a stream failed while it was closed"
#: Bytes of waiting events that leave as one chunk: what a server may have to keep for a client that does not read.
CHUNK_BYTES = 64 * 1024


class Source:
    """What a stream sends: the steps of ``iterator``, or a mailbox.

    ``flush(value)`` gives the chunks that follow from one step, which yielded ``value``. ``first`` are the chunks that
    are sent before the first step. With ``iterator`` ``None`` the events of ``mailbox`` are the stream. A comment
    follows after every ``heartbeat`` seconds of silence, where the server can be waited beside. What is in
    ``mailboxes`` ends with the stream. ``buffer()`` is what ``flush`` flushes, if that is all it does. ``prepare`` is
    called before the first step where that is not made by the thread that made the source.
    """

    __slots__ = (
        "_close",
        "buffer",
        "detached",
        "first",
        "flush",
        "heartbeat",
        "is_detached",
        "iterator",
        "mailbox",
        "mailboxes",
        "prepare",
        "text",
    )

    def __init__(
        self,
        iterator: Iterable[object] | AsyncIterable[object] | None,
        flush: Callable[[object], Iterable[Chunk]],
        *,
        first: Iterable[Chunk] = (),
        mailbox: Mailbox | None = None,
        heartbeat: float | None = None,
        mailboxes: Mailboxes | None = None,
        buffer: Callable[[], sse.Sse] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.iterator = iterator
        self.flush = flush
        self.first = first
        self.mailbox = mailbox
        self.heartbeat = heartbeat
        self.buffer = buffer
        self.prepare = prepare or _nothing
        self.mailboxes = mailboxes or Mailboxes()
        #: Whether the view was let go of, and its buffer, while somebody can still fill it.
        self.is_detached = False
        self.detached: sse.Sse | None = None
        self._close: Callable[[], object] = getattr(iterator, "close", _nothing)
        #: Whether chunks leave as text, for code that edits them, or as bytes.
        self.text = True

    def kind(self, *, on_loop: bool) -> str:
        """Return the row of ``FEEDS``. What can be iterated in both ways takes the one that suits who asks."""
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

    def with_rest(self, chunk: bytes) -> Chunk:
        """Return ``chunk``, which was taken from the mailbox or is a heartbeat, and what the view's buffer holds."""
        # On the way of every event: mostly the buffer is empty, or nobody can fill it.
        rest: Iterable[Chunk] = ()
        if not self.is_detached:
            rest = self.flush(None)
        elif self.detached is not None and self.detached._buffer:
            rest = flush_sse(self.detached)
        if rest:
            chunk += b"".join(own.encode() if isinstance(own, str) else own for own in rest)
        return chunk.decode() if self.text else chunk

    def detach(self) -> None:
        """Let go of the view, and with it of the request, where only its buffer is needed."""
        if self.iterator is None and self.buffer is not None:
            self.is_detached = True
            self.detached = self.buffer()
            self.buffer = None
            self.flush = _flush_nothing
            self.prepare = _nothing

    def let_go(self) -> None:
        """Let go of the view's buffer, too, unless somebody else has it: then nobody can fill it any more."""
        if self.detached is not None and not self.detached._buffer:
            buffer = weakref.ref(self.detached)
            self.detached = None
            self.detached = buffer()

    def silence(self) -> Chunk:
        """Return a heartbeat, and what the view's buffer holds."""
        return self.with_rest(HEARTBEAT)  # the same bytes for all the idle clients of a process

    def discard(self) -> None:
        """Close an iterator that nobody has begun. Once: one of the user's own need not know that it may come again."""
        close, self._close = self._close, _nothing
        close()


def flush_sse(buffer: sse.Sse) -> Iterable[Chunk]:
    """Return what ``buffer`` holds, emptying it: one chunk, or as many as a subclass's own ``__iter__`` makes."""
    if has_own_iter(buffer):
        return iter(buffer)  # type: ignore[no-any-return]
    # Mostly empty where a mailbox is the stream: that look is on the way of every event.
    return ("".join(buffer),) if buffer._buffer else ()


def has_own_iter(buffer: sse.Sse) -> bool:
    """Whether the class of ``buffer`` decides itself what its iteration gives."""
    return type(buffer).__iter__ not in (sse.Sse.__iter__, Sse.__iter__)


class Feed(Protocol):
    """What a stream takes its chunks from."""

    #: Why nothing more comes, once what there is has been taken; ``None`` while it is open.
    ended: str | None
    #: What the iterator has raised.
    error: BaseException | None
    #: Whether it is known, without asking, that there is nothing to take before it rings.
    drained: bool

    @property
    def events(self) -> int:
        """How many events, or steps that sent something, were taken."""

    def ring_by(self, ring: Callable[[], None]) -> None:
        """Have ``ring`` called, by any thread, when there is something to take or the end has come."""

    def take(self) -> Chunk | None:
        """Return the next chunk; ``None`` where there is none yet: then it is being worked for, and will ring."""

    def mark(self, *, slow: bool) -> None:
        """Hear whether the client takes what it is sent."""

    def end(self, reason: str) -> None:
        """Have it end as soon as it can, where whoever takes will come again."""

    def close(self, reason: str) -> None:
        """End it: run the iterator's ``finally``, here or where the iterator runs. Nobody takes any more."""

    def drop(self) -> None:
        """Do what ``close()`` does without taking a lock: the stream was collected."""

    def leave(self) -> None:
        """Leave the source to another feed, before anything was taken."""


class _SyncSteps:
    """The chunks of a sync iterator, stepped by the thread that asks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._chunks: Iterator[Chunk] = iter(())
        self._steps: Iterator[object] | None = None
        self._over = False
        self._closed = False
        self._stepping = False
        self._lock = threading.Lock()

    def __next__(self) -> Chunk:
        while not self._closed:
            for chunk in self._chunks:
                if chunk:
                    return self._source.out(chunk)
            if self._over:
                break
            self._stepping = True
            try:
                with stepping():
                    self._chunks = iter(self._source.flush(self._step()))
            finally:
                with self._lock:
                    self._stepping = False
        if self._closed:
            self.close()  # by another thread, which could not do so in the middle of a step
        raise StopIteration

    def _step(self) -> object:
        if self._steps is None:
            self._steps = iter(self._source.iterator)  # type: ignore[arg-type]
        try:
            return next(self._steps)
        except (StopIteration, GeneratorExit):  # the latter where a mailbox was closed under its reader
            self._over = True
        return None

    def stop(self) -> None:
        """End after the step that is under way."""
        self._closed = True

    def close(self) -> None:
        """Close the iterator: now, or when the step is over that another thread is in the middle of."""
        self._closed = True
        # Once: an iterator of the user's own need not know that it may be closed again.
        with self._lock:
            steps, self._steps = self._steps, iter(())
        if steps is None:
            self._source.discard()
            return
        try:
            with stepping():
                getattr(steps, "close", _nothing)()
        except ValueError as error:
            if str(error) != "generator already executing":  # Python's own refusal
                raise
            with self._lock:
                self._steps = steps
                over = not self._stepping
            if over:  # just now, and whoever stepped has not seen it any more
                self.close()


class _AsyncSteps:
    """The chunks of an async iterator, awaited by the task that asks."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._chunks: Iterator[Chunk] = iter(())
        self._steps: AsyncIterator[object] | None = None
        self._over = False

    async def __anext__(self) -> Chunk:
        while True:
            for chunk in self._chunks:
                if chunk:
                    return self._source.out(chunk)
            if self._over:
                raise StopAsyncIteration
            self._chunks = iter(self._source.flush(await self._step()))

    async def _step(self) -> object:
        if self._steps is None:
            self._steps = aiter(self._source.iterator)  # type: ignore[arg-type]
        try:
            return await anext(self._steps)
        except StopAsyncIteration:
            self._over = True
        finally:
            await arelease_idle()
        return None

    @property
    def begun(self) -> bool:
        return self._steps is not None

    async def aclose(self) -> None:
        if self._steps is None:
            self._source.discard()
        else:
            await getattr(self._steps, "aclose", _anothing)()


class _Here:
    """A sync iterator under a server of threads: stepped by the server's thread, which waits for nothing else."""

    drained = False

    def __init__(self, source: Source, workers: Workers) -> None:
        self._steps = _SyncSteps(source)
        self.ended: str | None = None
        self.error: BaseException | None = None
        self.events = 0

    def ring_by(self, ring: Callable[[], None]) -> None:
        """Nobody waits beside a step."""

    def mark(self, *, slow: bool) -> None:
        """Nobody waits for it."""

    def take(self) -> Chunk | None:
        try:
            chunk = next(self._steps, None)
        except Exception as error:  # noqa: BLE001  # whatever it is, it belongs to the stream's account
            self.error = error
            self.ended = self.ended or "error"
            return None
        if chunk is None:
            self.ended = self.ended or "finished"
        else:
            self.events += 1
        return chunk

    def end(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._steps.stop()

    def close(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._steps.close()

    def drop(self) -> None:
        """Its iterator is collected with it."""

    def leave(self) -> None:
        """There is nothing to give back."""


class _Working(ABC):
    """A feed whose steps happen elsewhere: what a thread's and a task's have in common."""

    drained = False

    def __init__(self) -> None:
        self.ended: str | None = None
        self.error: BaseException | None = None
        self.events = 0
        self._chunk: Chunk | None = None
        self._working = False
        self._ring: Callable[[], None] = _nothing

    def ring_by(self, ring: Callable[[], None]) -> None:
        self._ring = ring

    def take(self) -> Chunk | None:
        if self._working:
            return None
        chunk, self._chunk = self._chunk, None
        if chunk is not None:
            self.events += 1
        elif self.ended is None:
            self._working = True
            self._work()
        return chunk

    @abstractmethod
    def _work(self) -> None:
        """Begin the next step."""

    def _done(self, chunk: object, error: BaseException | None = None) -> None:
        """Take what a step has brought: a chunk, ``DONE``, or an error."""
        if self.ended is not None:  # and nobody takes any more
            if error is not None:
                log.error(LATE, exc_info=error)
        elif error is not None:
            self.error = error
            self.ended = "error"
        elif chunk is DONE:
            self.ended = "finished"
        else:
            self._chunk = chunk  # type: ignore[assignment]
        self._working = False
        self._ring()

    def end(self, reason: str) -> None:
        self.close(reason)

    def close(self, reason: str) -> None:
        self.ended = self.ended or reason
        self._stop()
        self._ring()

    @abstractmethod
    def _stop(self) -> None:
        """Close the iterator where it runs, at once or after the step that is under way."""

    def drop(self) -> None:
        self._stop()

    def mark(self, *, slow: bool) -> None:  # noqa: B027  # nothing is abstract in it
        """Nobody waits for it: it works only when it is asked."""

    def leave(self) -> None:  # noqa: B027  # there is something for one of them only
        """There is nothing to give back."""


class _InThread(_Working):
    """A sync iterator under an event loop: stepped, start to end, by a thread of its own."""

    def __init__(self, source: Source, workers: Workers) -> None:
        super().__init__()
        self._prepare = source.prepare
        self._steps = _SyncSteps(source)
        self._worker = workers.hire(self._steps.close)

    def _work(self) -> None:
        self._worker.call(partial(_next, self._prepare, self._steps), self._done)
        self._prepare = _nothing

    def _stop(self) -> None:
        self._steps.stop()  # where no step sends anything, none of them ends in the worker
        self._worker.stop()

    def leave(self) -> None:
        self._worker.leave()


class InTask(_Working):
    """An async iterator under an event loop: awaited, start to end, by a task of its own.

    One task for all steps, for what the iterator opens around a ``yield`` (a timeout, a task group) belongs to a task.
    """

    _in_our_loop = False

    def __init__(self, source: Source, workers: Workers) -> None:
        super().__init__()
        self._source = source
        self._steps = _AsyncSteps(source)
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next: asyncio.Future[None] | None = None
        self._cancelled = False
        self._context = contextvars.Context()
        #: Whether the task is outside of Django's handler, where sync code has no thread of its own request.
        self.outside = False

    def go_outside(self) -> None:
        """Have the iterator run outside of Django's handler, but in a copy of its context, which is the present one."""
        self.outside = True
        self._context = contextvars.copy_context()

    def ring_by(self, ring: Callable[[], None]) -> None:
        super().ring_by(ring)
        # The iterator runs in that of whoever waits for it: the view's own may belong to a thread that is waited for.
        if not self.outside:
            self._context = contextvars.copy_context()

    def _work(self) -> None:
        if self._loop is None:
            self._loop = self._get_loop()
        self._begin()

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _begin(self) -> None:
        if self._task is None:
            assert self._loop is not None
            self._task = self._context.run(self._loop.create_task, self._run())
            running.add(self._task)
            self._task.add_done_callback(running.discard)
        elif self._next is not None and not self._next.done():
            self._next.set_result(None)

    async def _run(self) -> None:
        if self.outside:
            async with OwnThread():
                lend(_nothing)
                await self._step_all()
        else:
            await self._step_all()

    async def _step_all(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._source.prepare()
            while self.ended is None:
                chunk = await anext(self._steps, DONE)
                self._next = loop.create_future()
                self._done(chunk)
                if chunk is DONE or self.ended is not None:
                    break
                await self._next
        except asyncio.CancelledError as error:
            if self.ended is None:
                if _is_cancelled():  # not by close(): the loop itself ends
                    self.ended = "client"
                    raise
                self._done(None, error)  # of something that the iterator has awaited
        except Exception as error:  # noqa: BLE001  # whatever it is, it belongs to whoever takes
            self._done(None, error)
        except BaseException as error:
            self._done(None, error)
            if not self._in_our_loop:  # which has to run on for others
                raise
        finally:
            self._cancelled = True  # what is under way now is the iterator's ``finally``
            try:
                await self._steps.aclose()
            except Exception:
                log.exception(LATE)
            self._ring()

    def _stop(self) -> None:
        if self._loop is None:
            self._source.discard()
        else:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has ended its tasks
                self._loop.call_soon_threadsafe(self._cancel)

    async def unwound(self) -> None:
        """Wait for the iterator's ``finally``, for ``UNWINDING`` seconds at most."""
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task}, timeout=UNWINDING)

    def _cancel(self) -> None:
        # Once: a second one would land in the iterator's ``finally``.
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()
            if not self._steps.begun:
                self._source.discard()


class _InLoop(InTask):
    """An async iterator under a server of threads: as in an event loop, in the one that all of them share."""

    _in_our_loop = True

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        return shared_loop()

    def _work(self) -> None:
        if self._loop is None:
            self._loop = self._get_loop()
        self._loop.call_soon_threadsafe(self._begin)


class Mail:
    """A mailbox."""

    def __init__(self, source: Source, workers: Workers) -> None:
        assert source.mailbox is not None, "a source without an iterator has a mailbox"
        self._source = source
        self.mailbox = source.mailbox
        self.ended: str | None = None
        self.error: BaseException | None = None
        self.drained = False

    @property
    def events(self) -> int:
        return self.mailbox.events

    def ring_by(self, ring: Callable[[], None]) -> None:
        self.mailbox.wake_by(ring)

    def take(self) -> Chunk | None:
        # The end first: what came before it may still be taken.
        ended = self.mailbox.ended
        chunk, self.drained = self.mailbox.take_chunk(CHUNK_BYTES)
        if chunk:
            return self._source.with_rest(chunk)
        self.ended = ended
        return None

    def mark(self, *, slow: bool) -> None:
        self.mailbox.mark(slow=slow)

    def end(self, reason: str) -> None:
        self.mailbox.close(reason)

    def close(self, reason: str) -> None:
        self.mailbox.close(reason)

    def drop(self) -> None:
        """The mailbox sees to itself."""

    def leave(self) -> None:
        """There is nothing to give back."""


class _MailHere(Mail):
    """A mailbox under a server of threads, or of greenlets."""

    def take(self) -> Chunk | None:
        chunk = super().take()
        if self.mailbox.is_behind:
            # A greenlet that finds page after page, for a client that takes them all, would never let another one run.
            time.sleep(0)
        return chunk


def _next(prepare: Callable[[], None], steps: _SyncSteps) -> object:
    prepare()
    return next(steps, DONE)


def _is_cancelled() -> bool:
    """Whether somebody has cancelled this task. Before Python 3.11 nobody can tell, and it is taken for granted."""
    return bool(getattr(asyncio.current_task(), "cancelling", lambda: 1)())


def _nothing() -> None:
    """Stand in for what is not there."""


def _flush_nothing(value: object) -> Iterable[Chunk]:
    return ()


async def _anothing() -> None:
    """Stand in for the ``aclose()`` that an iterator does not have."""


#: What ``iterator()`` gives x how the server asks for the next chunk.
FEEDS: dict[str, tuple[Callable[[Source, Workers], Feed], Callable[[Source, Workers], Feed]]] = {
    #           by a thread or greenlet (WSGI)   by an event loop (ASGI)
    "sync": (_Here, _InThread),
    "async": (_InLoop, InTask),
    "mailbox": (_MailHere, Mail),
}
