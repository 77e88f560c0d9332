"""How the open streams learn that their process is to stop: from the signal itself, before the server acts on it.

Our handler stands in front of the server's own, never instead of it. With no stream open it hands the signal on as if
it were not there; with some, these are ended first, over ``SHUTDOWN_WINDOW``, while the server goes on serving.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import feeds, runtime
from .conf import configuration
from .registry import TICK, open_streams
from .workers import THREAD_NAME

__all__ = ["at_stream", "drain", "install"]

log = logging.getLogger("django_sse")

#: What supervisors and terminals stop a process with, and gunicorn's master its workers.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGQUIT") if hasattr(signal, name)]
#: What Python starts with: death, and ``KeyboardInterrupt``. SIGQUIT's default, a core dump, is nobody's wish to stop.
DEFAULTS: dict[int, object] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
#: The handlers of event loops. A loop reads its signals from a file descriptor and has seen this one in any case.
LOOPS = ("asyncio.unix_events", "uvloop.loop")

#: Seconds that the last step of an iterator may take.
GRACE = 1.0

#: Signals that have come since there were streams to end.
_seen: set[int] = set()
#: Those of them that the server has not been given yet.
_held: set[int] = set()
#: Whether the streams have been ended, or given up: signals are handed on at once again.
_done = False
_warned = False


def install(*, default: bool | None = None) -> bool:
    """Get in front of this process's handlers of the signals that stop it. Return whether SIGTERM comes to us.

    For the main thread, after the server has set its own handlers; may be called again. What Python starts with is
    taken for such a handler too if ``default`` is true; by default, in an event loop and in the development server.
    """
    if os.name != "posix":
        return False
    if default is None:
        # Other commands are to be killed as ever, and gevent and uWSGI have handlers that Python takes for its default.
        default = "".join(sys.argv[1:2]).startswith("runserver") or _on_loop()
    for signum in SIGNALS:
        previous = signal.getsignal(signum)
        if signum in DEFAULTS and previous is DEFAULTS[signum]:
            wanted = default
        else:
            # The others: ignored, SIGQUIT's default, and None for C code that would never hear of the signal again.
            wanted = callable(previous) and not isinstance(previous, _Handler)
        if wanted:
            try:
                signal.signal(signum, _Handler(previous))
            except ValueError:
                # Not the main thread. There is no asking beforehand, for gevent calls its greenlets threads.
                return False
    return isinstance(signal.getsignal(signal.SIGTERM), _Handler)


def at_stream() -> None:
    """Install when a stream begins, for servers that set their handlers late; warn once where that is in vain."""
    global _warned
    if not (install() or _warned):
        _warned = True
        if configuration.shutdown_window:
            log.warning(
                "This process will not learn in time that it is to stop, and its streams will be cut off. Call "
                "django_sse.shutdown.install() in its main thread, once its server has set its signal handlers."
            )


def _on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def drain() -> None:
    """End all streams of this process, spread over ``SHUTDOWN_WINDOW``, and wait for their end. New ones are refused.

    For servers that call a function of yours when they are to stop.
    """
    window = configuration.shutdown_window
    log.info("This process is to stop: its %d stream(s) end within %s s.", len(open_streams), window)
    open_streams.drain(window)
    _let_finish()


def _let_finish() -> None:
    # An iterator comes to its ``finally`` after its step, when the client has long been told.
    deadline = time.monotonic() + GRACE
    while _unfinished() and time.monotonic() < deadline:
        time.sleep(TICK)


def _unfinished() -> bool:
    """Whether an iterator has not finished that still can."""
    return any(task.get_loop().is_running() for task in list(feeds.running)) or any(
        thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()
    )


class _Handler:
    """Stands in front of the handler ``previous``.

    It runs in the main thread, at any point of it: nothing here may wait, log or take a lock.
    """

    def __init__(self, previous: Any) -> None:
        self.previous: Callable[[int, FrameType | None], object] | int = previous

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        held = False
        if not _done and (_seen or len(open_streams)):
            first, again = not _seen, signum in _seen
            _seen.add(signum)
            if again and signum == signal.SIGINT:
                # Ctrl-C is pressed once more by somebody who does not want to wait. Others are repeated by supervisors
                # that tell every process of a service, beside the master that tells its workers.
                _held.discard(signum)
                _start(open_streams.drain, 0)
            elif getattr(self.previous, "__module__", None) not in LOOPS:
                held = True
                _held.add(signum)
            if first:
                _start(_begin)
        if held and not (_done and _take(signum)):
            return
        if callable(self.previous):
            self.previous(signum, frame)
        else:
            signal.signal(signum, self.previous)
            os.kill(os.getpid(), signum)


def _start(function: Callable[..., None], *args: Any) -> None:
    global _done
    try:
        # Not threading.Thread, whose start() takes locks and waits. Under gevent this is a greenlet.
        _thread.start_new_thread(function, args)
    except RuntimeError:  # no more threads are to be had: the server must see to the streams
        _done = True


def _take(signum: int) -> bool:
    """Whether it is for the caller to hand the signal on: for one only."""
    try:
        _held.remove(signum)
    except KeyError:
        return False
    return True


def _begin() -> None:
    try:
        # No daemon: a server that has been told already must not take the process from under the last ``finally``.
        threading.Thread(target=_drain, name="django-sse-stop", daemon=False).start()
    except RuntimeError:
        _drain()


def _drain() -> None:
    global _done
    try:
        drain()
    except Exception:
        log.exception("The streams of this process could not be ended")
    _done = True
    for signum in tuple(_held):
        if _take(signum):
            # To ourselves once more: only a signal reaches the main thread wherever it is.
            os.kill(os.getpid(), signum)


def _end_at_exit() -> None:
    # Without a signal: the development server reloads, and would take its threads with it without a word.
    if len(open_streams):
        open_streams.drain(0)
    _let_finish()
    runtime.reset()


def _forget_after_fork() -> None:
    global _done
    _done = False
    _seen.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_end_at_exit)
