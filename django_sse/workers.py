"""Threads and loops of our own, for iterators that do not fit the server: never more than needed, none after a fork.

A sync iterator under an event loop gets a thread, an async one under a server of threads a loop in a thread that all
such iterators share. Both are daemons: an endless iterator must not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable

from .exceptions import TooManyStreams

__all__ = ["DONE", "Worker", "Workers", "in_worker", "on_gevent", "on_unpatched_gevent", "shared_loop"]

log = logging.getLogger("django_sse")

#: How the threads of workers are called, with a number after it.
THREAD_NAME = "django-sse-stream"
#: What a worker that has been stopped answers, and ``next()`` at the end.
DONE = object()


#: Takes what a call has returned, or what it has raised.
Answer = Callable[[object, BaseException | None], None]
Call = tuple[Callable[[], object], Answer]


class Workers:
    """The threads that step sync iterators for event loops, one for each stream, at most ``limit()`` of them.

    One each, and not a pool of fewer: how long a step takes is up to the iterator's blocking calls, and what it keeps
    in its thread (a database connection) must be there at the next step. ``at_exit`` is called in a thread that ends.
    """

    def __init__(self, limit: Callable[[], int], at_exit: Callable[[], None]) -> None:
        self.limit = limit
        self.at_exit = at_exit
        self._lock = threading.Lock()
        # Weak: a stream that is dropped unclosed gives its place back.
        self._hired: weakref.WeakSet[Worker] = weakref.WeakSet()
        os.register_at_fork(after_in_child=self._forget_after_fork)

    def hire(self, close: Callable[[], None]) -> Worker:
        """Return a worker, which calls ``close`` at its end. Raises ``TooManyStreams``."""
        limit = self.limit()
        with self._lock:
            full = len(self._hired) >= limit
            if not full:
                worker = Worker(self, close)
                self._hired.add(worker)
                return worker
        raise TooManyStreams(
            f"{limit} sync iterators are streaming under ASGI in this process, each in a thread of its own. "
            'Raise DJANGO_SSE["THREADS"], or write the iterator as `async def`, which needs no thread.'
        )

    def _forget_after_fork(self) -> None:
        self._lock = threading.Lock()
        self._hired = weakref.WeakSet()

    def dismiss(self, worker: Worker) -> None:
        """Give the worker's place to another. Takes no lock: a worker that is collected may call it at any point."""
        self._hired.discard(worker)


class Worker:
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

    def call(self, function: Callable[[], object], answer: Answer) -> None:
        """Call ``function`` in the thread, and there ``answer`` with what it returned and what it raised.

        A worker that has been stopped answers ``DONE``.
        """
        if self._stopped:
            answer(DONE, None)
            return
        self._calls.put((function, answer))
        if self._thread is None:
            name = f"{THREAD_NAME}-{next(self._number)}"
            # Daemon: an endless iterator must not keep the process from ending.
            self._thread = threading.Thread(target=self._context.run, args=(self._work,), name=name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Close the iterator in its thread, after the step that is under way, and end the thread."""
        if not self._stopped:
            self._stopped = True
            self._calls.put(None)
            if self._thread is None:
                self._close()
                self._workers.dismiss(self)

    def leave(self) -> None:
        """End without closing the iterator: another thread has taken it over before the first call."""
        self._close = _nothing
        self.stop()

    def _work(self) -> None:
        self._inside.yes = True
        try:
            while self._work_once():
                pass
            self._close()
        except Exception:
            log.exception("The iterator of a stream failed while it was closed")
        finally:
            self._workers.at_exit()
            self._workers.dismiss(self)

    def _work_once(self) -> bool:
        # A function of its own, for a thread that waits must not hold the last call, and with it the stream.
        call = self._calls.get()
        if call is None:
            return False
        function, answer = call
        result: object = DONE
        error: BaseException | None = None
        if not self._stopped:  # since it was asked; it is answered all the same, for somebody may be waiting
            try:
                result = function()
            # Whatever it is, it belongs to whoever waits for the answer.
            except BaseException as caught:  # noqa: BLE001
                error = caught
        answer(result, error)
        return True


def _nothing() -> None:
    """Stand in for the closing of an iterator that is another's."""


def in_worker() -> bool:
    """Whether this thread runs a sync iterator for an event loop."""
    return getattr(Worker._inside, "yes", False)


class _SharedLoop:
    """One event loop in a thread of its own, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="django-sse-loop", daemon=True).start()
            return self._loop


_shared_loop = _SharedLoop()


def shared_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, running in a thread of ours, that all async iterators share in a process of threads."""
    return _shared_loop.get()


def _forget_after_fork() -> None:
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
