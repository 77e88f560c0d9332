"""Delivers streams outside of Django's handler: one task for all clients of an event loop, not one for each.

A ``send()`` of the server that finishes at once, as almost all do, is done within the pump's own step; one that has to
wait for a slow client goes on as a task, and holds up nobody. Time (heartbeats, age, clients that do not read) is
looked at where it may have come, and not by a timer for each client.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from .feeds import HEARTBEAT
from .inbox import LoopBell
from .streams import Stream

__all__ = ["Delivery"]

log = logging.getLogger("django_sse")

#: Clients that are served before the loop is given back to others.
BATCH = 100
#: How many of them the end of one counts for: its task, its log line and the server's part come with it.
END_COST = 10
#: Seconds between two looks at the clock.
TICK = 0.1
#: Seconds after which a client that a ``send()`` waits for is slow: nobody paces events for it any more.
SLOW = 0.05
#: Seconds for which a server may take to say that a client has left to which it could not send.
GONE = 1.0
#: Seconds between two looks at a client for which nothing is timed.
LONGEST = 60.0
#: Whether a task can make its first step at once.
_EAGER: Any = {"eager_start": True} if hasattr(asyncio, "eager_task_factory") else {}
#: One for all clients: servers read a message and do not change it.
_HEARTBEAT = {"type": "http.response.body", "body": HEARTBEAT, "more_body": True}
_END = {"type": "http.response.body", "body": b"", "more_body": False}


class Delivery(LoopBell):
    """One stream on its way to one client."""

    __slots__ = (
        "_app",
        "_blocked",
        "_blocked_since",
        "_context",
        "_ended",
        "_gone",
        "_heartbeat",
        "_interval",
        "_is_slow",
        "_last_sent",
        "_over",
        "_pump",
        "_receiving",
        "_send",
        "_stream",
        "_too_old",
        "_unwound",
    )

    def __init__(self, stream: Stream, send: Callable[[Any], Awaitable[None]]) -> None:
        super().__init__()
        self._stream = stream
        self._send = send
        self._pump: _Pump
        # What stands around the server's send(), tracing for instance, may keep things of its request in it.
        self._context = contextvars.copy_context()
        #: The task of a ``send()`` that waits for the client, and since when it does.
        self._blocked: asyncio.Task[None] | None = None
        self._blocked_since = 0.0
        self._is_slow = False
        self._last_sent = time.monotonic()
        self._heartbeat = stream.heartbeat
        self._too_old: float | None = None
        #: Seconds between two looks at the clock at most.
        self._interval = min(stream.stall_timeout or LONGEST, stream.heartbeat or LONGEST)
        #: Whether the iterator has finished, or had its time.
        self._unwound = False
        #: Whether the end of the response is sent.
        self._ended = False
        #: Whether nothing is sent any more.
        self._over = False
        #: Whether the client has left, as far as sending tells.
        self._gone = False
        self._app: asyncio.Task[Any] | None = None
        self._receiving = False

    async def run(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Deliver until the client has left or the stream has ended."""
        stream = self._stream
        try:
            await stream.begin_on_loop()
            self._too_old = stream.too_old
            self._app = asyncio.current_task()
            self._pump = _Pump.of_running_loop()
            self._pump.add(self)
            stream.ring_by(self.ring)
            stream.mark(slow=False)
            try:
                await self._until_over(receive)
            finally:
                self._pump.remove(self)
        finally:
            self._over = True
            if self._blocked is not None:
                self._blocked.cancel()
            # The pump may know this delivery until the next look at its clock.
            del self._app, self._context, self._send, self._stream
            stream.shut()
            await stream.settle_on_loop()
            await stream.unwound()

    def over(self) -> bool:
        """Whether nothing is sent any more."""
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
        self._over = True
        if self._receiving and self._app is not None:
            self._app.cancel()

    def answer(self) -> None:
        """Have the stream looked at."""
        self._pump.ready(self)

    def turn(self) -> None:
        """Send all that there is, as far as the client takes it."""
        self.clear()
        while self._blocked is None and not (self._over or self._gone):
            if self._ended:
                self._finish()
                return
            chunk = self._stream.take()
            if chunk is not None:
                self._give(chunk, time.monotonic())
            elif not self._stream.over:
                return
            elif not self._unwound:
                # Some servers stop as soon as the last response has ended, whatever its iterator still does.
                self._unwound = True
                self._await(self._stream.unwound(), time.monotonic())
            else:
                self._ended = True
                self._step(_END, time.monotonic())

    def _give(self, chunk: Any, now: float) -> None:
        if chunk is HEARTBEAT:
            self._step(_HEARTBEAT, now)
        else:
            self._step({"type": "http.response.body", "body": chunk, "more_body": True}, now)

    def _step(self, message: dict[str, Any], now: float) -> None:
        self._last_sent = now
        self._await(self._send(message), now)

    def _await(self, awaitable: Awaitable[None], now: float) -> None:
        task = _begin(awaitable, self._context)
        if task.done():
            self._sent(task)
        else:
            self._blocked, self._blocked_since = task, now
            self._pump.waits(self)
            task.add_done_callback(self._unblocked)

    def _unblocked(self, task: asyncio.Task[None]) -> None:
        self._blocked = None
        self._last_sent = time.monotonic()
        if self._is_slow and not self._over:
            self._is_slow = False
            self._stream.mark(slow=False)
        self._sent(task)
        self._pump.ready(self)

    def look_whether_slow(self, now: float) -> bool:
        """Say of a client that waits for longer than ``SLOW`` that it is slow; return whether that is settled."""
        if self._blocked is None or self._over:
            return True
        if now >= self._blocked_since + SLOW:
            self._is_slow = True
            self._stream.mark(slow=True)
        return self._is_slow

    def _sent(self, task: asyncio.Task[None]) -> None:
        # Cancelled by the server, for by us it is only when all is over.
        error = None if task.cancelled() else task.exception()
        # An OSError says that the client has left (ASGI HTTP, "Disconnected client - send exception"); uvloop says so
        # with a RuntimeError.
        if task.cancelled() or isinstance(error, (OSError, RuntimeError)):
            self._leave()
        elif error is not None:
            self.fail(error)

    def _leave(self) -> None:
        # Soon the server will know it, too. Before that it would take our leaving for a mistake.
        self._gone = True
        asyncio.get_running_loop().call_later(GONE, self._finish)

    def fail(self, error: BaseException) -> None:
        """End the stream for an error that is not its iterator's."""
        if not self._over:
            log.error("A stream could not be delivered", exc_info=error)
            self._stream.shut("error")
            self._finish()

    def look(self, now: float) -> float:
        """Do what the clock demands; return when to look again."""
        again = now + self._interval
        if self._blocked is not None:
            return self._look_at_blocked(now, again)
        if self._ended or self._over or self._gone:
            return again
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
                    self._give(chunk, now)
                due = now + heartbeat
            again = min(again, due)
        return again

    def _look_at_blocked(self, now: float, again: float) -> float:
        patience = self._stream.stall_timeout
        if patience is None:
            return again
        if now >= self._blocked_since + patience:
            self._stream.shut("stalled")
            self._finish()
        return min(again, self._blocked_since + patience)


def _begin(sending: Awaitable[None], context: contextvars.Context) -> asyncio.Task[None]:
    """Return a task of ``sending`` that has made its first step; before Python 3.12, one that makes it soon."""
    coroutine = sending if inspect.iscoroutine(sending) else _wait_for(sending)
    loop = asyncio.get_running_loop()
    if _EAGER:
        return asyncio.Task(coroutine, loop=loop, context=context, **_EAGER)
    return context.run(loop.create_task, coroutine)


async def _wait_for(sending: Awaitable[None]) -> None:
    await sending


class _Pump:
    """The deliveries of one event loop, and the task that serves them."""

    _pumps: ClassVar[dict[asyncio.AbstractEventLoop, _Pump]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deliveries: set[Delivery] = set()
        self._ready: deque[Delivery] = deque()
        # Those whose time may have come.
        self._timed: deque[Delivery] = deque()
        # Those that have begun to wait for their client, which may turn out to be slow.
        self._waiting: set[Delivery] = set()
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
        if self._task is None:
            self._seen = _tick_of(time.monotonic())
            # In a context of its own: that of the first client is not the others' business.
            contextvars.Context().run(self._start)
        self.ready(delivery)
        self._look_later(delivery, time.monotonic())

    def _start(self) -> None:
        self._timer = self._loop.call_later(TICK, self._look)
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._stop)  # also if it is cancelled before it runs

    def remove(self, delivery: Delivery) -> None:
        self._deliveries.discard(delivery)
        if not self._deliveries:
            self._wake()

    def ready(self, delivery: Delivery) -> None:
        """Have ``delivery`` served."""
        self._ready.append(delivery)
        self._wake()

    def waits(self, delivery: Delivery) -> None:
        """Hear that ``delivery`` waits for its client."""
        self._waiting.add(delivery)

    def _wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    async def _run(self) -> None:
        try:
            while self._deliveries:
                while self._ready or self._timed:
                    for _ in range(min(BATCH, len(self._ready))):
                        self._serve(self._ready.popleft())
                    self._look_at_some()
                    await asyncio.sleep(0)
                if self._deliveries:
                    self._sleep = self._loop.create_future()
                    await self._sleep
                    self._sleep = None
        finally:
            self._stop()

    def _stop(self, task: object = None) -> None:
        # The pump holds the loop, so nobody may hold the pump when there is nothing to do, or the loop ends.
        if self._task is not None and task in (None, self._task):
            self._task = None
            self._timer.cancel()
            self._due.clear()
            self._pumps.pop(self._loop, None)

    @staticmethod
    def _serve(delivery: Delivery) -> None:
        try:
            delivery.turn()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is no reason to leave the others
            delivery.fail(error)

    def _look(self) -> None:
        tick = _tick_of(time.monotonic())
        for slot in range(self._seen + 1, tick + 1):
            self._timed.extend(self._due.pop(slot, ()))
        self._seen = tick
        if self._timed:
            self._wake()
        now = time.monotonic()
        self._waiting = {delivery for delivery in self._waiting if not delivery.look_whether_slow(now)}
        self._timer = self._loop.call_later(TICK, self._look)

    def _look_at_some(self) -> None:
        now = time.monotonic()
        left = BATCH
        while left > 0 and self._timed:
            delivery = self._timed.popleft()
            if delivery in self._deliveries:
                self._look_at(delivery, now)
                left -= END_COST if delivery.over() else 1

    def _look_at(self, delivery: Delivery, now: float) -> None:
        try:
            again = delivery.look(now)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is no reason to leave the others
            delivery.fail(error)
        else:
            self._look_later(delivery, again)

    def _look_later(self, delivery: Delivery, at: float) -> None:
        self._due.setdefault(max(_tick_of(at), self._seen) + 1, []).append(delivery)


def _tick_of(at: float) -> int:
    return int(at / TICK)
