"""What is handed to ``StreamingHttpResponse``: the next chunk, whatever the view's iterator and the server are.

What ``iterator()`` gives meets how the server asks in one table, ``DRIVERS``. Each driver sends what there is at once,
is never more than one step ahead of the client, and may be closed by any thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any

import sse

from .event import Event
from .exceptions import BrokerUnavailable
from .inbox import Inbox, Mailbox, Mailboxes
from .wire import Sse, comment
from .workers import DONE, Worker, Workers, in_worker, shared_loop

__all__ = ["Chunk", "Source", "Stream", "flush_sse", "has_own_iter"]

Chunk = str | bytes
_HEARTBEAT = comment()


class Source:
    """What a stream sends: the steps of ``iterator``, or a mailbox.

    ``flush(value)`` gives the chunks that follow from one step, which yielded ``value``. ``first`` are the chunks that
    are sent before the first step. With ``iterator`` ``None`` the events of ``mailbox`` are the stream, with a comment
    after every ``heartbeat`` seconds of silence. What is in ``mailboxes`` ends with the stream.
    """

    def __init__(
        self,
        iterator: Iterable[object] | AsyncIterable[object] | None,
        flush: Callable[[object], Iterable[Chunk]],
        *,
        first: Iterable[Chunk] = (),
        mailbox: Mailbox | None = None,
        heartbeat: float | None = None,
        mailboxes: Mailboxes | None = None,
    ) -> None:
        self.iterator = iterator
        self.flush = flush
        self.first = first
        self.mailbox = mailbox
        self.heartbeat = heartbeat
        self.mailboxes = mailboxes or Mailboxes()
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
        rest = self.flush(None)
        if len(taken) == 1 and not rest:
            return self.out(taken[0][1])
        frames = [frame for _, frame in taken] or [_HEARTBEAT]
        frames += [chunk.encode() if isinstance(chunk, str) else chunk for chunk in rest]
        return self.out(b"".join(frames))

    def discard(self) -> None:
        """Close an iterator that nobody has begun."""
        getattr(self.iterator, "close", _nothing)()


def flush_sse(buffer: sse.Sse) -> Iterable[Chunk]:
    """Return what ``buffer`` holds, emptying it: one chunk, or as many as a subclass's own ``__iter__`` makes."""
    if has_own_iter(buffer):
        return iter(buffer)  # type: ignore[no-any-return]
    # Mostly empty where a mailbox is the stream: that look is on the way of every event.
    return ("".join(buffer),) if buffer._buffer else ()


def has_own_iter(buffer: sse.Sse) -> bool:
    """Whether the class of ``buffer`` decides itself what its iteration gives."""
    return type(buffer).__iter__ not in (sse.Sse.__iter__, Sse.__iter__)


class _Here:
    """A sync iterator, stepped by the thread that asks."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._source = source
        self._chunks: Iterator[Chunk] = iter(source.first)
        self._steps: Iterator[object] | None = None
        self._over = False
        self._closed = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while not self._closed:
            for chunk in self._chunks:
                if chunk:
                    return self._source.out(chunk)
            if self._over:
                break
            self._chunks = iter(self._source.flush(self._step()))
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
        except BrokerUnavailable:
            if not self._source.quiet:
                raise
            self._over = True
        return None

    def stop(self) -> None:
        """End after the step that is under way."""
        self._closed = True

    def close(self) -> None:
        self._closed = True
        # Once: an iterator of the user's own need not know that it may be closed again.
        steps, self._steps = self._steps, iter(())
        if steps is None:
            self._source.discard()
            return
        try:
            getattr(steps, "close", _nothing)()
        except ValueError as error:
            # Python's own refusal. It is in the middle of a step, by another thread, which closes it when that is over.
            if str(error) != "generator already executing":
                raise
            self._steps = steps


class _Await:
    """An async iterator, awaited by the task that asks."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._source = source
        self._chunks: Iterator[Chunk] = iter(source.first)
        self._steps: AsyncIterator[object] | None = None
        self._over = False
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._closed:
            for chunk in self._chunks:
                if chunk:
                    return self._source.out(chunk)
            if self._over:
                break
            self._chunks = iter(self._source.flush(await self._step()))
        if self._closed:
            await self.aclose()
        raise StopAsyncIteration

    async def _step(self) -> object:
        if self._steps is None:
            self._loop = asyncio.get_running_loop()
            self._steps = aiter(self._source.iterator)  # type: ignore[arg-type]
        try:
            return await anext(self._steps)
        except StopAsyncIteration:
            self._over = True
        except BrokerUnavailable:
            if not self._source.quiet:
                raise
            self._over = True
        except TypeError as error:
            raise _hidden_from_django(error) from error
        return None

    def stop(self) -> None:
        """End after the step that is under way."""
        self._closed = True

    def close(self) -> None:
        self._closed = True
        loop = self._loop
        if loop is None:
            self._source.discard()
        else:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has ended its tasks
                loop.call_soon_threadsafe(self._close_soon, loop)

    def _close_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        task = loop.create_task(self.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    async def aclose(self) -> None:
        self._closed = True
        if self._steps is None:
            self._source.discard()
        # In the middle of a step? Then it is unwinding, or is closed when the step is over.
        elif not getattr(self._steps, "ag_running", False):
            await getattr(self._steps, "aclose", _anothing)()


#: Tasks that run a user's ``finally``: the loop itself keeps no reference to them.
_closing: set[asyncio.Task[None]] = set()


class _InThread:
    """A sync iterator under an event loop: stepped, start to end, by a thread of its own."""

    _worker: Worker = None  # type: ignore[assignment]

    def __init__(self, source: Source, workers: Workers) -> None:
        self._inner = _Here(source, workers)
        self._worker = workers.hire(self._inner.close)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._worker.run(partial(next, self._inner, DONE))
        except TypeError as error:
            raise _hidden_from_django(error) from error
        if chunk is DONE:
            raise StopAsyncIteration
        return chunk  # type: ignore[return-value]

    def leave(self) -> None:
        """Leave the source to another driver."""
        self._worker.leave()

    def close(self) -> None:
        self._inner.stop()  # where no step sends anything, none of them ends in the worker
        self._worker.stop()

    def __del__(self) -> None:
        # Dropped unclosed, the thread would wait for its next step for ever. None: refused, there is no thread.
        if self._worker is not None:
            self.close()


class _InLoop:
    """An async iterator under a server of threads: awaited by one task, start to end, in the loop that all share."""

    def __init__(self, source: Source, workers: Workers) -> None:
        self._inner = _Await(source, workers)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: concurrent.futures.Future[None] | None = None
        # One future a step, which a thread waits for; None: end.
        self._asked: asyncio.Queue[concurrent.futures.Future[object] | None] = asyncio.Queue()

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._loop is None or self._task is None:
            self._loop = shared_loop()
            self._task = asyncio.run_coroutine_threadsafe(self._work(), self._loop)
        answer: concurrent.futures.Future[object] = concurrent.futures.Future()
        self._loop.call_soon_threadsafe(self._asked.put_nowait, answer)
        # The task ends where another thread closes the stream: then nobody answers any more.
        either: tuple[Any, Any] = (answer, self._task)
        concurrent.futures.wait(either, return_when=concurrent.futures.FIRST_COMPLETED)
        chunk = answer.result() if answer.done() else DONE
        if chunk is DONE:
            raise StopIteration
        return chunk  # type: ignore[return-value]

    async def _work(self) -> None:
        # One task for all steps: what the iterator opens around a yield (a timeout, a task group) belongs to its task.
        while (answer := await self._asked.get()) is not None:
            try:
                answer.set_result(await anext(self._inner, DONE))
            # Whatever it is, it belongs to the thread that waits.
            except BaseException as error:  # noqa: BLE001
                answer.set_exception(error)
        await self._inner.aclose()

    def close(self) -> None:
        if self._loop is None:
            self._inner.close()
        else:
            self._inner.stop()
            self._loop.call_soon_threadsafe(self._asked.put_nowait, None)


class _Mail:
    """A mailbox as the stream: what its two drivers share."""

    def __init__(self, source: Source, workers: Workers) -> None:
        assert source.mailbox is not None, "a source without an iterator has a mailbox"
        self._source = source
        self._chunks = iter(source.first)
        self._inbox = Inbox(source.mailbox)

    def close(self) -> None:
        self._inbox.mailbox.close()


class _Wait(_Mail):
    """A mailbox, waited for by the thread that asks."""

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        for chunk in self._chunks:
            return self._source.out(chunk)
        taken = self._inbox.wait(self._source.heartbeat)
        if taken is None:
            raise StopIteration
        return self._source.frames(taken)


class _AwaitMail(_Mail):
    """A mailbox, awaited by the task that asks."""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        for chunk in self._chunks:
            return self._source.out(chunk)
        taken = await self._inbox.await_(self._source.heartbeat)
        if taken is None:
            raise StopAsyncIteration
        return self._source.frames(taken)


def _nothing() -> None:
    """Stand in for the ``close()`` that an iterator does not have."""


async def _anothing() -> None:
    """Stand in for the ``aclose()`` that an iterator does not have."""


def _hidden_from_django(error: TypeError) -> RuntimeError:
    # Under ASGI, Django takes a TypeError for the news that the iterator is not async, and starts it over, warning.
    return RuntimeError(f"The iterator of a stream raised TypeError: {error}")


#: What ``iterator()`` gives x how the server asks for the next chunk.
DRIVERS: dict[str, tuple[Callable[[Source, Workers], Any], Callable[[Source, Workers], Any]]] = {
    #           by a thread or greenlet (WSGI)   by an event loop (ASGI)
    "sync": (_Here, _InThread),
    "async": (_InLoop, _Await),
    "mailbox": (_Wait, _AwaitMail),
}


class Stream:
    """What ``_iterator()`` returns: iterable in the way that suits the request at hand, once, and closable.

    For a request of an event loop (``on_loop``) it is an async iterable to everybody but the thread that runs a sync
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
            self._driver.leave()  # hired in vain: this thread does the work
            self._driver = None
        return self._drive(on_loop=False)  # type: ignore[no-any-return]

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._drive(on_loop=True)  # type: ignore[no-any-return]

    def _drive(self, *, on_loop: bool) -> Any:
        if self._driver is None:
            self._driver = DRIVERS[self._source.kind(on_loop=on_loop)][on_loop](self._source, self._workers)
        return self._driver

    def close(self) -> None:
        """End the stream: give the mailboxes back, run the iterator's ``finally``. By any thread, at any time."""
        # The mailboxes first: their end is what a thread that waits for one can see.
        self._source.mailboxes.close()
        if self._driver is None:
            self._source.discard()
        else:
            self._driver.close()
