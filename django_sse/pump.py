"""Delivers the streams of an event loop: one task for all clients, and not one for each.

A ``send()`` of the server that finishes at once, as almost all do, is one step of the pump's task. One that has to wait
for a slow client keeps that task for itself, and another one goes on with the others. What is sent to the listeners
of the same channels is taken, and made into a message, once for all of them. Time (heartbeats, age, clients that do
not read) is looked at where it may have come, and not by a timer for each client.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
import types
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import partial
from itertools import chain, compress, repeat
from typing import Any, ClassVar

from . import contexts
from .feeds import CHUNK_BYTES, HEARTBEAT
from .inbox import LoopBell, Mailbox, Rank
from .streams import Stream

__all__ = ["Delivery"]

log = logging.getLogger("django_sse")

#: Clients that are served before the loop is given back to others.
BATCH = 100
#: How many of them the end of one counts for: its task, its log line and the server's part come with it.
END_COST = 10
#: Seconds between two looks at the clock.
TICK = 0.1
#: Clients that are given up after one of them: those that stalled together must not hold up all others by leaving so.
ENDS = 25
#: Seconds after which a client that a ``send()`` waits for is slow: nobody paces events for it any more.
SLOW = 0.05
#: Seconds for which a server may take to say that a client has left to which it could not send.
GONE = 1.0
#: Seconds between two looks at a client for which nothing is timed.
LONGEST = 60.0
#: One for all clients: servers read a message and do not change it.
_HEARTBEAT = {"type": "http.response.body", "body": HEARTBEAT, "more_body": True}
_END = {"type": "http.response.body", "body": b"", "more_body": False}

Send = Callable[[Any], Coroutine[Any, Any, None]]


class Delivery(LoopBell):
    """One stream on its way to one client."""

    __slots__ = (
        "_app",
        "_blocked",
        "_blocked_since",
        "_ended",
        "_heartbeat",
        "_interval",
        "_is_slow",
        "_over",
        "_pump",
        "_receiving",
        "_stream",
        "_too_old",
        "_unwound",
        "any_task",
        "buffer",
        "context",
        "last_sent",
        "mailbox",
        "row",
        "send",
        "share",
        "takes",
    )

    def __init__(self, stream: Stream, send: Callable[[Any], Awaitable[None]]) -> None:
        super().__init__()
        self._stream = stream
        #: Whether a ``send()`` that waits may go on in another task than it has begun in.
        self.any_task = False
        self.send: Send = send if inspect.iscoroutinefunction(send) else self._coroutines(send)
        self._pump: _Pump
        #: In which it is sent: what stands around the server's send(), tracing for instance, may keep things of its
        #: request there. ``None``, the pump's own, where nothing is there and nothing stands around it, as far as a
        #: method is one of the server's.
        self.context = contexts.own() if inspect.ismethod(send) else contextvars.copy_context()
        #: With whom it is served, and from what, once it has had all that was its own; what may be its own later.
        self.share: _Share | None = None
        self.mailbox: Mailbox | None = None
        self.buffer: Any = None
        #: With whom it goes in step.
        self.row: _Row | None = None
        # The task of a ``send()`` that waits for the client, and since when it does.
        self._blocked: asyncio.Task[None] | None = None
        self._blocked_since = 0.0
        self._is_slow = False
        self.last_sent = time.monotonic()
        # As the stream has them, but nearer.
        self._heartbeat = stream.heartbeat
        self._too_old: float | None = None
        # Seconds between two looks at the clock at most.
        self._interval = min(stream.stall_timeout or LONGEST, self._heartbeat or LONGEST)
        # Whether the iterator has finished, or had its time.
        self._unwound = False
        # Whether the end of the response is sent.
        self._ended = False
        self._over = False
        #: Whether it can be sent something now: it has taken the last, and has not left as far as sending tells.
        self.takes = True
        self._app: asyncio.Task[Any] | None = None
        self._receiving = False

    async def run(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Deliver until the client has left or the stream has ended."""
        stream = self._stream
        try:
            if not stream.begun:
                await stream.begin_on_loop()
            self._too_old = stream.too_old
            self._app = asyncio.current_task()
            self._pump = _Pump.of_running_loop()
            self._pump.add(self)
            stream.ring_by(self)
            stream.mark(slow=False)
            try:
                # Here, and not in a coroutine of its own, which every open stream would hold.
                while not self.over():
                    self._receiving = True
                    try:
                        if (await receive())["type"] == "http.disconnect":
                            break
                    except asyncio.CancelledError:
                        if not self.over():
                            raise
                        # By _finish(): there is no other way out of receive().
                        getattr(self._app, "uncancel", int)()
                    finally:
                        self._receiving = False
            finally:
                self._pump.remove(self)
        finally:
            self._stop()
            if self._blocked is not None:
                self._blocked.cancel()
            # The pump may know this delivery until the next look at its clock.
            del self._app, self._stream, self.buffer, self.context, self.mailbox, self.row, self.send, self.share
            stream.shut()
            await stream.settle_on_loop()
            await stream.unwound()

    def _coroutines(self, send: Callable[[Any], Awaitable[None]]) -> Send:
        """Return a ``send()`` that does all that it does in its coroutine's first step, and later ones."""

        async def sending(message: Any) -> None:
            awaitable = send(message)
            self.any_task = not _may_open(awaitable)
            await awaitable

        return sending

    def __call__(self) -> None:
        """Ring. A method of its own would be one more object for each client."""
        self.ring()

    def over(self) -> bool:
        """Whether nothing is sent any more."""
        return self._over

    def _stop(self) -> None:
        self._over = True
        self.takes = False

    def _finish(self) -> None:
        self._stop()
        if self._receiving and self._app is not None:
            self._app.cancel()

    def answer(self) -> None:
        """Have the stream looked at."""
        self._pump.ready(self)

    def next(self) -> dict[str, Any] | None:
        """Return the message that is to be sent next, or ``None`` where there is nothing."""
        self.clear()
        if not self.takes:
            return None
        if self._ended:
            self._finish()
            return None
        chunk = self._stream.take()
        if chunk is None and self.mailbox is None and self._share():
            chunk = self._stream.take()  # what came just before
        if chunk is not None:
            return self._message(chunk, time.monotonic())
        if not self._stream.over:
            return None
        if not self._unwound and self._stream.unwinds:
            # Some servers stop as soon as the last response has ended, whatever its iterator still does.
            self.block(asyncio.Task(self._unwind(), loop=asyncio.get_running_loop()))
            return None
        self._ended = True
        return _END

    async def _unwind(self) -> None:
        await self._stream.unwound()
        self._unwound = True
        self._unblock()

    def _share(self) -> bool:
        mailbox = None if self._stream.over else self._stream.mailbox
        if mailbox is None:
            return False
        self.mailbox, self.buffer = mailbox, self._stream.buffer
        self.share = self._pump.share(self, mailbox)
        return True

    def has_own(self) -> bool:
        """Whether its view's buffer holds something, which is sent to its client alone."""
        return self.buffer is not None and bool(self.buffer._buffer)

    def _message(self, chunk: Any, now: float) -> dict[str, Any]:
        self.last_sent = now
        return _HEARTBEAT if chunk is HEARTBEAT else _message(chunk)

    def block(self, task: asyncio.Task[None] | None) -> None:
        """Hear that ``task`` has to wait for the client."""
        self._blocked, self._blocked_since = task, time.monotonic()
        self.takes = False
        if self.row is not None:
            self.row.lose(self)
        self._pump.waits(self)

    def has_waited(self, error: BaseException | None = None) -> None:
        """Hear that the client need not be waited for any more, or what the waiting has ended with."""
        self._unblock()
        if error is not None and not self.over():
            self.failed(error)

    def _unblock(self) -> None:
        self._blocked = None
        self.last_sent = time.monotonic()
        if self.over():
            return
        self.takes = True
        if self._is_slow:
            self._is_slow = False
            self._stream.mark(slow=False)
        self._pump.ready(self)

    def look_whether_slow(self, now: float) -> bool:
        """Say of a client that waits for longer than ``SLOW`` that it is slow; return whether that is settled."""
        if self._blocked is None or self.over():
            return True
        if now >= self._blocked_since + SLOW:
            self._is_slow = True
            self._stream.mark(slow=True)
        return self._is_slow

    def failed(self, error: BaseException) -> None:
        """Hear what a ``send()`` has raised."""
        # Cancelled by the server, for by us it is only when all is over. An OSError says that the client has left
        # (ASGI HTTP, "Disconnected client - send exception"); uvloop says so with a RuntimeError.
        if isinstance(error, (OSError, RuntimeError, asyncio.CancelledError)):
            # Soon the server will know it, too. Before that it would take our leaving for a mistake.
            self.takes = False
            self._stream.mark(slow=True)
            asyncio.get_running_loop().call_later(GONE, self._finish)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the stream for an error that is not its iterator's."""
        if not self.over():
            log.error("A stream could not be delivered", exc_info=error)
            self._stream.shut("error")
            self._finish()

    def lost(self) -> None:
        """End the stream, for nobody serves it any more."""
        if not self.over():
            self._stream.shut()
            self._finish()

    def look(self, now: float) -> tuple[float, dict[str, Any] | None]:
        """Do what the clock demands; return when to look again, and a message that is to be sent."""
        again = now + self._interval
        if self._blocked is not None:
            return self._look_at_blocked(now, again), None
        if self._ended or not self.takes:
            return again, None
        too_old = self._too_old
        if too_old is not None:
            if now >= too_old:
                self._stream.end("max_age")
            again = min(again, too_old)
        heartbeat = self._heartbeat
        if heartbeat is None:
            return again, None
        due = self.last_sent + heartbeat
        if self.share is not None:
            due = max(due, self.share.last_sent + heartbeat)
        if now < due:
            return min(again, due), None
        if self.share is not None and not self.has_own():
            # Not made by the stream: that would bring half a dozen objects of each idle client into the processor's
            # cache.
            self.last_sent = now
            self._stream.heartbeats += 1
            return again, _HEARTBEAT
        chunk = self._stream.silence()
        return again, self._message(chunk, now) if chunk else None

    def _look_at_blocked(self, now: float, again: float) -> float:
        patience = self._stream.stall_timeout
        if patience is None:
            return again
        if now >= self._blocked_since + patience and self._pump.may_give_up():
            self._stream.shut("stalled")
            self._finish()
        return min(again, self._blocked_since + patience)


def _may_open(awaitable: Awaitable[None]) -> bool:
    """Whether ``awaitable`` is Python code, which may have opened what belongs to a task: a timeout, for instance."""
    return inspect.isawaitable(awaitable) and (
        isinstance(awaitable, (types.CoroutineType, types.GeneratorType))
        or isinstance(type(awaitable).__await__, types.FunctionType)
    )


def _message(chunk: Any) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": True}


async def _finish(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
    """Go on with ``coroutine``, which has begun to wait for ``waits_for``."""
    await contexts.finish(coroutine.send, coroutine.throw, waits_for)


class _Turn:
    """Whose message is being sent, and whether that has to wait."""

    __slots__ = ("delivery", "waits")

    delivery: Delivery

    def __init__(self) -> None:
        self.waits = False


class _Row:
    """Deliveries that go in step: all of them have had the same, and each of them takes the next.

    Whatever becomes of one of them takes it out of the row, so none has to be looked at for each event.
    """

    __slots__ = ("_rank", "_share", "deliveries")

    def __init__(self, share: _Share, rank: Rank) -> None:
        self._share = share
        self._rank = rank
        # In the order of the rank. A list that somebody goes through is not changed.
        self.deliveries: list[Delivery] = []

    def __len__(self) -> int:
        return len(self.deliveries)

    def add(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Have those of ``deliveries`` go in step that stand where the row does; return them."""
        joined = [*compress(deliveries, self._rank.join([delivery.mailbox for delivery in deliveries]))]
        self.deliveries = [*self.deliveries, *joined]
        for delivery in joined:
            delivery.row = self
        return joined

    def lose(self, delivery: Delivery) -> None:
        """Have ``delivery`` served by itself."""
        self._rank.leave(delivery.mailbox)
        self._drop([delivery])

    def take(self) -> tuple[bytes, bool] | None:
        """Take what waits for all of them: a chunk, and whether more waits. ``None`` where none is left."""
        taken = None
        while self.deliveries and (taken := self._rank.take(CHUNK_BYTES)) is None:
            here = self._rank.muster()
            self._drop([delivery for delivery, is_here in zip(self.deliveries, here, strict=True) if not is_here])
        return taken

    def _drop(self, gone: Sequence[Delivery]) -> None:
        self.deliveries = [delivery for delivery in self.deliveries if delivery not in gone]
        for delivery in gone:
            delivery.row = None
            self._share.take_back(delivery)
        if not self.deliveries:
            self._share.rows.remove(self)


class _Share(LoopBell):
    """The deliveries of one event loop that get the same events."""

    __slots__ = ("_again", "_left", "_pump", "last_sent", "loose", "rows")

    def __init__(self, pump: _Pump) -> None:
        super().__init__()
        self._pump = pump
        #: Those that go in step, and those that are looked at one by one.
        self.rows: list[_Row] = []
        self.loose: dict[Delivery, None] = {}
        #: When they were sent something alike.
        self.last_sent = 0.0
        # Those that are still to be served in the round that is under way, and whether another one follows it.
        self._left: list[_Row | list[Delivery]] | None = None
        self._again = False

    def ring(self) -> None:
        if not self.rung:
            super().ring()

    def answer(self) -> None:
        """Have the deliveries served: all of them, from the first."""
        self.clear()
        if self._left is None:
            self._begin()
            self._pump.begin(self)
        else:
            self._again = True

    def add(self, delivery: Delivery) -> None:
        """Serve ``delivery`` with the others from now on."""
        self.loose[delivery] = None
        self.fall_in([delivery])

    def remove(self, delivery: Delivery) -> bool:
        """Serve ``delivery`` no more; return whether that was the last one."""
        if delivery.row is not None:
            delivery.row.lose(delivery)
        del self.loose[delivery]
        return not (self.rows or self.loose)

    def take_back(self, delivery: Delivery) -> None:
        """Serve by itself who went in step until now. What it may have missed in this round it gets at once."""
        self.loose[delivery] = None
        if delivery.takes:
            self._pump.ready(delivery)

    def fall_in(self, deliveries: Sequence[Delivery]) -> None:
        """Have those of ``deliveries``, which are loose, go in step that can."""
        row = next((row for row in self.rows if len(row) < BATCH), None)
        able = [
            delivery
            for delivery in deliveries
            if delivery.takes and delivery.buffer is None and not delivery.any_task and delivery.row is None
        ]
        if not able:
            return
        if row is None:
            assert able[0].mailbox is not None, "it is served with others"
            row = _Row(self, able[0].mailbox.rank())
        for delivery in row.add(able[: BATCH - len(row)]):
            del self.loose[delivery]
        if row.deliveries and row not in self.rows:
            self.rows.append(row)
        if not self.loose:
            self.loose = {}  # a dictionary keeps the room that it has once needed

    def few(self, most: int) -> _Row | list[Delivery] | None:
        """Return those that are to be served next, if they are ``most`` at most."""
        return self._left.pop() if self._left and len(self._left[-1]) <= most else None

    def goes_on(self, *, more: bool) -> bool:
        """Return whether some are still to be served; all of them once more, if there is ``more``."""
        self._again = self._again or more
        if not self._left:
            if self._again:
                self._begin()
            else:
                self._left = None
            self._again = False
        return self._left is not None

    def _begin(self) -> None:
        left: list[_Row | list[Delivery]] = [*reversed(self.rows)]  # the first is taken from the end
        if self.loose:
            loose = list(self.loose)
            left[:0] = [loose[at : at + BATCH] for at in reversed(range(0, len(loose), BATCH))]
        self._left = left


#: Messages that are to be sent, and to whom.
_Messages = Iterator[tuple[Delivery, dict[str, Any]]]


class _Pump:
    """The deliveries of one event loop, and the task that serves them."""

    _pumps: ClassVar[dict[asyncio.AbstractEventLoop, _Pump]] = {}

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._deliveries: set[Delivery] = set()
        self._shares: dict[Any, _Share] = {}
        # What there is to do: deliveries to be looked at, shares to be served, deliveries whose time may have come.
        self._ready: deque[Delivery] = deque()
        self._rung: deque[_Share] = deque()
        self._timed: deque[Delivery] = deque()
        # Those that have begun to wait for their client, which may turn out to be slow.
        self._waiting: set[Delivery] = set()
        # What is sent just now: whichever task sends goes on where the last one stopped.
        self._messages: _Messages = iter(())
        self._sleep: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle
        # Deliveries by the tick at which they are to be looked at.
        self._due: defaultdict[int, list[Delivery]] = defaultdict(list)
        # How many clients may be given up before the next look.
        self._ends = ENDS
        self._seen = 0

    @classmethod
    def of_running_loop(cls) -> _Pump:
        loop = asyncio.get_running_loop()
        pump = cls._pumps.get(loop)
        if pump is None:
            pump = cls._pumps[loop] = cls(loop)
        return pump

    # -- what there is to do --------------------------------------------------------------------------------------

    def add(self, delivery: Delivery) -> None:
        self._deliveries.add(delivery)
        if self._task is None:
            self._seen = _tick_of(time.monotonic())
            # That of the first client is not the others' business.
            contexts.common().run(self._start)
        self.ready(delivery)
        self._look_later(delivery, time.monotonic())

    def remove(self, delivery: Delivery) -> None:
        self._deliveries.discard(delivery)
        if delivery.mailbox is not None:
            self._unshare(delivery, delivery.mailbox)
        if not self._deliveries:
            self._wake()

    def ready(self, delivery: Delivery) -> None:
        """Have ``delivery`` served."""
        self._ready.append(delivery)
        self._wake()

    def waits(self, delivery: Delivery) -> None:
        """Hear that ``delivery`` waits for its client."""
        self._waiting.add(delivery)

    def share(self, delivery: Delivery, mailbox: Mailbox) -> _Share:
        """Serve ``delivery`` together with others from now on."""
        share = self._shares.get(mailbox.audience)
        if share is None:
            share = self._shares[mailbox.audience] = _Share(self)
        mailbox.share(share.ring)
        share.add(delivery)
        return share

    def _unshare(self, delivery: Delivery, mailbox: Mailbox) -> None:
        share = self._shares[mailbox.audience]
        if share.remove(delivery):
            del self._shares[mailbox.audience]
            mailbox.unshare(share.ring)

    def begin(self, share: _Share) -> None:
        """Serve the members of ``share``."""
        self._rung.append(share)
        self._wake()

    def _wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    def may_give_up(self) -> bool:
        """Return whether a client may be given up now, and count it; otherwise it is looked at again soon."""
        self._ends -= 1
        return self._ends >= 0

    def _look(self) -> None:
        self._timer = self._loop.call_later(TICK, self._look)
        now = time.monotonic()
        tick = _tick_of(now)
        for slot in range(self._seen + 1, tick + 1):
            self._timed.extend(self._due.pop(slot, ()))
        self._seen = tick
        self._ends = ENDS
        if self._timed:
            self._wake()
        self._waiting = {delivery for delivery in self._waiting if not delivery.look_whether_slow(now)}

    def _look_later(self, delivery: Delivery, at: float) -> None:
        self._due[max(_tick_of(at), self._seen) + 1].append(delivery)

    # -- who does it ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._timer = self._loop.call_later(TICK, self._look)
        self._go_on()

    def _go_on(self) -> None:
        # Not by the loop's task factory: an eager one would run it here and now. In a context that is new, for what a
        # send() has set that waits now is not the others' business.
        self._task = contexts.common().run(partial(asyncio.Task, self._run(), loop=self._loop))
        self._task.add_done_callback(self._stop)  # also if it is cancelled before it runs

    async def _run(self) -> None:
        task = asyncio.current_task()
        try:
            await self._send()
        except Exception:  # a mistake of ours: it must not be the end of all streams
            log.exception("A stream could not be delivered")
            if task is self._task:
                self._go_on()
        finally:
            self._stop(task)

    async def _send(self) -> None:
        while True:
            turn = _Turn()
            sending = self._send_all(turn)
            try:
                waits_for = sending.send(None)
            except StopIteration:
                # None is held while nothing is sent.
                del turn, sending
                if not await self._pause():
                    return
                self._messages = self._next_messages()
                continue
            turn.waits = True
            if turn.delivery.any_task:
                # Some servers have an awaitable that waits often, and opens nothing: any task will do for it.
                turn.delivery.block(asyncio.Task(_finish(sending, waits_for), loop=self._loop))
                continue
            # What a coroutine has opened, a timeout for instance, belongs to the task that it has begun in.
            turn.delivery.block(asyncio.current_task())
            self._go_on()
            await _finish(sending, waits_for)
            return

    async def _send_all(self, turn: _Turn) -> None:
        """Send ``_messages`` as long as nobody waits: when that happens it becomes the waiting of that client alone."""
        for delivery, message in self._messages:
            if not delivery.takes:
                continue
            turn.delivery = delivery
            # Awaited, for a coroutine that does not wait is then done without an exception that says so.
            try:
                if delivery.context is None:
                    await delivery.send(message)
                else:
                    await contexts.run(delivery.context, delivery.send(message))
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # whatever it is, it is the client's
                if not turn.waits:
                    delivery.failed(error)
                    continue
                delivery.has_waited(error)
                return
            if turn.waits:
                delivery.has_waited()
                return

    async def _pause(self) -> bool:
        """Let others have the loop; return whether there is anybody to go on for."""
        if self._ready or self._rung or self._timed:
            await asyncio.sleep(0)
        elif self._deliveries:
            self._sleep = self._loop.create_future()
            await self._sleep
            self._sleep = None
        return bool(self._deliveries)

    def _stop(self, task: asyncio.Task[None] | None) -> None:
        # The pump holds the loop, so nobody may hold the pump when there is nothing to do, or the loop ends.
        if task is self._task:
            self._task = None
            self._timer.cancel()
            self._due.clear()
            self._pumps.pop(self._loop, None)
            # Cancelled by somebody: nobody serves them any more, and they would hang silently.
            if not self._loop.is_closed():
                for delivery in self._deliveries:
                    delivery.lost()

    def _next_messages(self) -> _Messages:
        """Return what is to be sent before others have the loop again."""
        alike: list[_Messages] = []
        left = BATCH
        # Each once: what was taken is to be sent, and whose first message has to wait would not take a second one.
        for _ in range(len(self._rung)):
            share = self._rung.popleft()
            more = has_room = False
            try:
                while (several := share.few(left)) is not None:
                    has_room = True
                    left -= len(several)
                    messages, more_waits = self._messages_alike(share, several)
                    alike.append(messages)
                    more = more or more_waits
                    if isinstance(several, list):
                        share.fall_in(several)
            except BaseException:
                self._messages = chain(*alike)
                raise
            finally:
                if share.goes_on(more=more):
                    # One that had no room is the first next time, or it might never have any.
                    (self._rung.append if has_room else self._rung.appendleft)(share)
            left -= 1
            if left <= 0 or not has_room:
                break
        return chain(*alike, self._messages_of_ready(), self._messages_of_timed())

    def _messages_alike(self, share: _Share, deliveries: _Row | list[Delivery]) -> tuple[_Messages, bool]:
        """Return what waits for ``deliveries`` of ``share``, and whether more waits."""
        share.last_sent = time.monotonic()
        if isinstance(deliveries, _Row):
            taken = deliveries.take()
            if taken is None:
                return iter(()), False
            chunk, more = taken
            return zip(deliveries.deliveries, repeat(_message(chunk))) if chunk else iter(()), more
        takes = [delivery for delivery in deliveries if delivery.takes]
        several = [delivery for delivery in takes if not delivery.has_own()]
        if len(several) < len(takes):
            self._ready.extend(delivery for delivery in takes if delivery.has_own())
        if not several:
            return iter(()), False
        return self._messages_one_by_one(several)

    def _messages_one_by_one(self, deliveries: list[Delivery]) -> tuple[_Messages, bool]:
        mailboxes: list[Any] = [delivery.mailbox for delivery in deliveries]
        taken: tuple[list[bytes | None], bool] = mailboxes[0].take_alike(mailboxes, CHUNK_BYTES)
        chunks, more = taken
        first = chunks[0]
        if first and chunks.count(first) == len(chunks):  # as almost always
            return zip(deliveries, repeat(_message(first))), more
        # One message for all that get the same.
        messages = {chunk: _message(chunk) for chunk in chunks if chunk}
        self._ready.extend(delivery for delivery, chunk in zip(deliveries, chunks, strict=True) if chunk is None)
        several = zip(deliveries, chunks, strict=True)
        return iter([(delivery, messages[chunk]) for delivery, chunk in several if chunk]), more

    def _messages_of_ready(self) -> _Messages:
        left = BATCH
        for _ in range(min(BATCH, len(self._ready))):
            delivery = self._ready.popleft()
            try:
                # What comes as fast as it is sent would keep the loop for ever.
                while (message := delivery.next()) is not None:
                    yield delivery, message
                    left -= 1
                    if left <= 0:
                        self._ready.append(delivery)
                        return
            except Exception as error:  # noqa: BLE001  # whatever it is, it is no reason to leave the others
                delivery.fail(error)

    def _messages_of_timed(self) -> _Messages:
        left = BATCH
        now = time.monotonic()
        while left > 0 and self._timed:
            delivery = self._timed.popleft()
            if delivery.over():
                continue
            try:
                again, message = delivery.look(now)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is no reason to leave the others
                delivery.fail(error)
            else:
                self._look_later(delivery, again)
                if message is not None:
                    yield delivery, message
            left -= END_COST if delivery.over() else 1


def _tick_of(at: float) -> int:
    return int(at / TICK)
