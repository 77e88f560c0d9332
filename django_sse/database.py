"""What a stream that waits gives back: its database connections, and the thread that Django keeps for them.

A connection stays where giving it back would do harm: in a transaction, and, when the package asks by itself, while a
cursor of it is still being read.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.db import connections
from django.db.backends.signals import connection_created

__all__ = [
    "OwnThread",
    "ThreadSensitiveContext",
    "arelease_connections",
    "arelease_idle",
    "lend",
    "release_connections",
    "release_idle",
    "stepping",
]

log = logging.getLogger("django_sse")


def release_connections() -> None:
    """Close this thread's database connections, but those in a transaction. The next query opens a new one.

    For a ``StreamingHttpResponse`` of your own, before it waits. Django itself gives a connection back when the
    response has ended, which for an endless one is too late.
    """
    _release(even_if_read=True)


async def arelease_connections() -> None:
    """Do what ``release_connections()`` does for the sync code that this task has called, and end its thread.

    Django runs the sync code of an async request (the ORM, sync middleware) in a thread that it keeps until the
    response has ended.
    """
    await _arelease(even_if_read=True)


def _release(*, even_if_read: bool) -> bool:
    """Close what can be closed; return whether that is all."""
    all_closed = True
    for connection in connections.all(initialized_only=True):
        if connection.connection is None:
            continue
        # Without autocommit there may be uncommitted work even outside of atomic().
        if connection.in_atomic_block or not connection.autocommit or not (even_if_read or not _is_read(connection)):
            all_closed = False
            continue
        try:
            connection.close()
        except Exception:
            log.exception("The database connection %r of a waiting stream could not be closed", connection.alias)
    return all_closed


class stepping:  # noqa: N801
    """While a thread runs an iterator: notes which cursors it reads, and releases what it can at the end."""

    __slots__ = ()

    def __enter__(self) -> None:
        _here.steps = True

    def __exit__(self, *exc_info: object) -> None:
        _here.steps = False
        _release(even_if_read=False)


class _Here(threading.local):
    """What is known of this thread."""

    #: Whether it runs a stream's code just now.
    steps = False

    def __init__(self) -> None:
        #: Its cursors that still exist. Django drops a cursor that has been read to its end.
        self.cursors: weakref.WeakSet[Any] = weakref.WeakSet()


_here = _Here()


def _watch(connection: Any, **kwargs: Any) -> None:
    if _here.steps and _note_cursor not in connection.execute_wrappers:
        # First, for whoever opens a connection within a wrapper of its own takes the last one away.
        connection.execute_wrappers.insert(0, _note_cursor)


def _note_cursor(execute: Callable[..., Any], sql: Any, params: Any, many: Any, context: Any) -> Any:
    _here.cursors.add(context["cursor"])
    return execute(sql, params, many, context)


def _is_read(connection: Any) -> bool:
    return any(cursor.db is connection for cursor in _here.cursors)


connection_created.connect(_watch, dispatch_uid="django_sse.database")


class _RequestThread(concurrent.futures.Executor):
    """Stands in for the executor that asgiref keeps for one request: its thread exists only while it is needed.

    ``over`` is called when asgiref shuts it down: the request has ended, whatever ended it.
    """

    def __init__(self, over: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None
        self.over = over

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        with self._lock:
            if self._thread is None:
                self._thread = concurrent.futures.ThreadPoolExecutor(1, "django-sse-request", _mark_stepping)
            return self._thread.submit(function, *args, **kwargs)

    async def release(self, *, even_if_read: bool) -> None:
        """Close the connections of the thread and end it."""
        with self._lock:
            thread = self._thread
        if thread is not None and await _closed_in_thread(even_if_read=even_if_read):
            with self._lock:
                if self._thread is thread:
                    self._thread = None
            thread.shutdown(wait=False)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.submit(release_connections)
            thread.shutdown(wait=False)
        self.over()


def _mark_stepping() -> None:
    _here.steps = True


async def _closed_in_thread(*, even_if_read: bool) -> bool:
    """Close the connections of the request's thread; return whether the thread may end."""
    # By way of asgiref: where sync code of the request waits for this async code, it is not the executor that is idle.
    closed = await sync_to_async(_release)(even_if_read=even_if_read)
    return closed and getattr(getattr(AsyncToSync, "executors", None), "current", None) is None


def lend(over: Callable[[], None]) -> None:
    """Take over the thread that Django keeps for this task's request; have ``over`` called when the request ends."""
    threads, context = _threads(), SyncToAsync.thread_sensitive_context.get(None)
    if threads is None or context is None:
        return
    present = threads.get(context)
    if isinstance(present, _RequestThread):
        present.over = over
        return
    threads[context] = _RequestThread(over)
    if present is not None:
        present.submit(release_connections)
        present.shutdown(wait=False)


async def _arelease(*, even_if_read: bool) -> None:
    threads, context = _threads(), SyncToAsync.thread_sensitive_context.get(None)
    if threads is None:
        if even_if_read:  # which nobody could tell there
            await sync_to_async(release_connections)()
        return
    thread = None if context is None else threads.get(context)
    if isinstance(thread, _RequestThread):
        await thread.release(even_if_read=even_if_read)
    elif thread is not None and await _closed_in_thread(even_if_read=even_if_read):
        threads.pop(context, None)
        thread.shutdown(wait=False)


def release_idle() -> None:
    """Close this thread's connections that are neither in a transaction nor read from."""
    _release(even_if_read=False)


async def arelease_idle() -> None:
    """Do what ``release_idle()`` does for the sync code that this task has called, and end its thread."""
    await _arelease(even_if_read=False)


class OwnThread:
    """A context in which sync code has a thread of its own, also within the context of a request that has ended.

    asgiref's ``ThreadSensitiveContext`` would leave the thread to that one, which nobody will end again.
    """

    __slots__ = ("_context", "_token")

    async def __aenter__(self) -> None:
        self._context = ThreadSensitiveContext()  # never entered: asgiref asks for it by what it is
        self._token = SyncToAsync.thread_sensitive_context.set(self._context)

    async def __aexit__(self, *exc_info: object) -> None:
        threads = _threads()
        thread = None if threads is None else threads.pop(self._context, None)
        SyncToAsync.thread_sensitive_context.reset(self._token)
        if thread is not None:
            thread.shutdown(wait=False)


_warned = False


def _threads() -> Any:
    """Return asgiref's executors by context: no public interface tells of them. ``None`` where there are none."""
    global _warned
    threads = getattr(SyncToAsync, "context_to_thread_executor", None)
    if threads is None and not _warned:
        _warned = True
        log.warning("This version of asgiref keeps its threads elsewhere: each open stream holds one under ASGI.")
    return threads
