"""Fetches from the broker what this process has missed, or never had: grouped, so that many who ask cost one look.

Whoever needs something says so in the hub, and then either waits here (a view, before it sends its headers) or lets a
thread see to it (streams that are open must not wait). One fetch at a time takes all that is needed at that moment.
"""

from __future__ import annotations

import copy
import logging
import random
import threading
from collections.abc import Callable, Mapping

from .exceptions import BrokerUnavailable

__all__ = ["Recovery"]

log = logging.getLogger("django_sse")

#: Seconds to wait after a failure: the first time, doubled at each further one, up to the last. Jittered by half.
BACKOFF = (0.05, 2.0)


class Recovery:
    """Calls ``fetch``: in the caller's thread, or in one of its own.

    It fetches all that is needed just then, and returns, by channel, what was in the way of it for some; what was in
    the way for all, it raises.
    """

    def __init__(self, fetch: Callable[[], Mapping[str, Exception]]) -> None:
        self._fetch = fetch
        #: Held by whoever fetches.
        self._turn = threading.Lock()
        # How many have had their turn, and which of them was the last to fail, and why.
        self._turns = 0
        self._failed: tuple[int, Exception] | None = None
        #: Guards the thread.
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        # Whether something is needed since the thread last began to fetch.
        self._rung = False
        self._closed = threading.Event()

    def wait(self, timeout: float | None = None) -> Mapping[str, Exception]:
        """Return when all that is needed now has been fetched, and what was in the way, as ``fetch`` does.

        Raises what ``fetch`` raises, and ``BrokerUnavailable`` when it is not its turn within ``timeout`` seconds.
        """
        turns = self._turns
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            log.warning("A stream did not have its turn to fetch what its client has missed within %s s.", timeout)
            raise BrokerUnavailable(f"What was missed could not be fetched within {timeout} s")
        try:
            # What another one tried meanwhile need not be tried by all who wait, one timeout after the other.
            if self._failed is not None and self._failed[0] > turns:
                raise copy.copy(self._failed[1])
            self._turns += 1
            try:
                return self._fetch()
            except Exception as error:
                # Without its traceback, which would keep the request of whoever it is raised to.
                self._failed = self._turns, copy.copy(error)
                raise
        finally:
            self._turn.release()

    def ring(self) -> None:
        """Have it fetched soon, by a thread that tries for as long as it takes. From any thread."""
        with self._lock:
            self._rung = True
            if self._thread is None and not self._closed.is_set():
                thread = threading.Thread(target=self._run, name="django-sse-recovery", daemon=True)
                thread.start()
                self._thread = thread

    def close(self) -> None:
        """Fetch no more."""
        self._closed.set()

    def _run(self) -> None:
        failures = 0
        while True:
            with self._lock:
                if (not self._rung and not failures) or self._closed.is_set():
                    self._thread = None
                    return
                self._rung = False
            try:
                in_the_way = bool(self.wait())
            except Exception as error:  # noqa: BLE001  # whatever it is, open streams wait for the next attempt
                in_the_way = True
                if failures == 0:
                    self._complain(error)
            if in_the_way:
                first, last = BACKOFF
                self._closed.wait(min(last, first * 2 ** min(failures, 16)) * random.uniform(0.5, 1.0))
                failures += 1
            else:
                failures = 0

    @staticmethod
    def _complain(error: Exception) -> None:
        if not isinstance(error, BrokerUnavailable):
            log.error("What this process has missed could not be fetched; trying again", exc_info=error)
        else:
            log.warning("What this process has missed cannot be fetched now (%s); trying again.", error)
