"""Delivers streams outside of Django's handler: one task for all clients of an event loop, not one for each.

The pump steps the server's ``send()`` itself. A ``send()`` that finishes at once, as almost all do, costs no task; one
that has to wait for a slow client becomes a task of its own, and holds up nobody. Time (heartbeats, age, clients that
do not read) is looked at where it may have come, and not by a timer for each client.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from typing import Any, ClassVar

from .feeds import HEARTBEAT
from .inbox import LoopBell
from .streams import Stream

__all__ = ["Delivery"]

log = logging.getLogger("django_sse")

#: Clients that are served before the loop is given back to others.
BATCH = 100
#: Seconds between two looks at the clock.
TICK = 0.1
#: Seconds between two looks at a client for which nothing is timed.
LONGEST = 60.0
#: One for all idle clients: servers read a message and do not change it.
_HEARTBEAT_MESSAGE = {"type": "http.response.body", "body": HEARTBEAT, "more_body": True}


class Delivery(LoopBell):
    """One stream on its way to one client."""

    __slots__ = (
        "_app",
        "_blocked",
        "_blocked_since",
        "_gone",
        "_heartbeat",
        "_interval",
        "_last_sent",
        "_over",
        "_pump",
        "_receiving",
        "_send",
        "_stream",
        "_too_old",
    )

    def __init__(self, stream: Stream, send: Callable[[Any], Awaitable[None]]) -> None:
        super().__init__()
        self._stream = stream
        self._send = send
        self._pump = _Pump.of_running_loop()
        #: The task of a ``send()`` that waits for the client, and since when it does.
        self._blocked: asyncio.Task[None] | None = None
        self._blocked_since = 0.0
        self._last_sent = time.monotonic()
        self._heartbeat = stream.heartbeat
        self._too_old: float | None = None
        #: Seconds between two looks at the clock at most.
        self._interval = stream.stall_timeout or LONGEST
        self._over = False
        #: Whether the client has left, as far as sending tells.
        self._gone = False
        self._app: asyncio.Task[Any] | None = None
        self._receiving = False

    async def run(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Deliver until the client has left or the stream has ended."""
        stream = self._stream
        await stream.begin_on_loop()
        self._too_old = stream.too_old
        self._app = asyncio.current_task()
        stream.ring_by(self.ring)
        self._pump.add(self)
        try:
            await self._until_over(receive)
        finally:
            self._pump.remove(self)
            if self._blocked is not None:
                self._blocked.cancel()
            self._app = None
            stream.shut()
            await stream.settle_on_loop()
        if self._over and self._blocked is None and not self._gone:
            with contextlib.suppress(OSError):
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def over(self) -> bool:
        """Whether the stream has ended, on our side."""
        return self._over

    async def _until_over(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while not self.over():
            self._receiving = True
            try:
                if (await receive())["type"] == "http.disconnect":
                    return
            except asyncio.CancelledError:
                if not self.over():
                    raise
                # By _finish(): there is no other way out of receive().
                getattr(self._app, "uncancel", int)()
            finally:
                self._receiving = False

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            if self._receiving and self._app is not None:
                self._app.cancel()

    def _leave(self) -> None:
        self._gone = True
        self._finish()

    def answer(self) -> None:
        """Have the stream looked at."""
        self._pump.ready(self)

    def turn(self) -> None:
        """Send all that there is, as far as the client takes it."""
        if self._blocked is not None or self._over:
            return
        self.clear()
        try:
            while self._blocked is None and not self._over:
                chunk = self._stream.take()
                if chunk is None:
                    if self._stream.over:
                        self._finish()
                    return
                self._step(chunk, time.monotonic())
        except Exception:
            log.exception("A stream could not be delivered")
            self._stream.shut("error")
            self._finish()

    def _step(self, chunk: Any, now: float) -> None:
        self._last_sent = now
        if chunk is HEARTBEAT:
            sending = self._send(_HEARTBEAT_MESSAGE)
        else:
            sending = self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        rest: Awaitable[None]
        if inspect.iscoroutine(sending):
            try:
                rest = _Rest(sending, sending.send(None))
            except StopIteration:
                return
            except OSError:  # ASGI HTTP, section "Disconnected client - send exception"
                self._leave()
                return
        else:
            rest = sending  # of a server whose awaitables belong to a task
        self._blocked_since = self._last_sent
        self._blocked = asyncio.get_running_loop().create_task(self._wait_for(rest))

    async def _wait_for(self, rest: Awaitable[None]) -> None:
        try:
            await rest
        except OSError:
            self._leave()
        except Exception:
            log.exception("A stream could not be delivered")
            self._stream.shut("error")
            self._finish()
        self._blocked = None
        self._last_sent = time.monotonic()
        self._pump.ready(self)

    def look(self, now: float) -> float:
        """Do what the clock demands; return when to look again."""
        if self._blocked is not None:
            return self._look_at_blocked(now)
        again = now + self._interval
        if self._too_old is not None:
            if now >= self._too_old:
                self._stream.end("max_age")
            again = min(again, self._too_old)
        heartbeat = self._heartbeat
        if heartbeat is not None:
            due = self._last_sent + heartbeat
            if now >= due:
                chunk = self._stream.silence()
                if chunk:
                    self._step(chunk, now)
                due = now + heartbeat
            again = min(again, due)
        return again

    def _look_at_blocked(self, now: float) -> float:
        patience = self._stream.stall_timeout
        if patience is None:
            return now + self._interval
        if now >= self._blocked_since + patience:
            self._stream.shut("stalled")
            self._finish()
        return self._blocked_since + patience


class _Rest:
    """What is left of a coroutine that was stepped by hand, and waits for ``waiting``."""

    __slots__ = ("_coroutine", "_waiting")

    def __init__(self, coroutine: Any, waiting: Any) -> None:
        self._coroutine = coroutine
        self._waiting = waiting

    def __await__(self) -> Generator[Any, Any, None]:
        waiting = self._waiting
        while True:
            try:
                sent = yield waiting
            except BaseException as error:  # noqa: BLE001  # a cancellation, which is for the coroutine to see
                step, argument = self._coroutine.throw, error
            else:
                step, argument = self._coroutine.send, sent
            try:
                waiting = step(argument)
            except StopIteration:
                return


class _Pump:
    """The deliveries of one event loop, and the task that serves them."""

    _pumps: ClassVar[dict[asyncio.AbstractEventLoop, _Pump]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deliveries: set[Delivery] = set()
        self._ready: deque[Delivery] = deque()
        # Those whose time may have come.
        self._timed: deque[Delivery] = deque()
        self._sleep: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle
        # Deliveries by the tick at which they are to be looked at.
        self._due: dict[int, list[Delivery]] = {}
        self._seen = 0

    @classmethod
    def of_running_loop(cls) -> _Pump:
        loop = asyncio.get_running_loop()
        pump = cls._pumps.get(loop)
        if pump is None:
            pump = cls._pumps[loop] = cls(loop)
        return pump

    def add(self, delivery: Delivery) -> None:
        self._deliveries.add(delivery)
        self._pumps[self._loop] = self
        if self._task is None:
            self._seen = _tick_of(time.monotonic())
            self._timer = self._loop.call_later(TICK, self._look)
            self._task = self._loop.create_task(self._run())
        self.ready(delivery)
        self._look_later(delivery, time.monotonic())

    def remove(self, delivery: Delivery) -> None:
        self._deliveries.discard(delivery)
        if not self._deliveries:
            self._wake()

    def ready(self, delivery: Delivery) -> None:
        """Have ``delivery`` served."""
        self._ready.append(delivery)
        self._wake()

    def _wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    async def _run(self) -> None:
        try:
            while self._deliveries:
                while self._ready or self._timed:
                    for _ in range(min(BATCH, len(self._ready))):
                        self._ready.popleft().turn()
                    self._look_at_some()
                    await asyncio.sleep(0)
                if self._deliveries:
                    self._sleep = self._loop.create_future()
                    await self._sleep
                    self._sleep = None
        finally:
            # The pump holds the loop, so nobody may hold the pump when there is nothing to do, or the loop ends.
            self._task = None
            self._timer.cancel()
            self._due.clear()
            self._pumps.pop(self._loop, None)

    def _look(self) -> None:
        tick = _tick_of(time.monotonic())
        for slot in range(self._seen + 1, tick + 1):
            self._timed.extend(self._due.pop(slot, ()))
        self._seen = tick
        if self._timed:
            self._wake()
        self._timer = self._loop.call_later(TICK, self._look)

    def _look_at_some(self) -> None:
        now = time.monotonic()
        for _ in range(min(BATCH, len(self._timed))):
            delivery = self._timed.popleft()
            if delivery in self._deliveries:
                self._look_at(delivery, now)

    def _look_at(self, delivery: Delivery, now: float) -> None:
        try:
            again = delivery.look(now)
        except Exception:
            log.exception("A stream could not be looked after")
            again = now + LONGEST
        self._look_later(delivery, again)

    def _look_later(self, delivery: Delivery, at: float) -> None:
        self._due.setdefault(max(_tick_of(at), self._seen) + 1, []).append(delivery)


def _tick_of(at: float) -> int:
    return int(at / TICK)
