"""The Redis broker: publishes through the caller's client, and reads through one pub/sub connection per process.

One thread owns that connection: it alone writes to it and reads from it (a TLS socket allows nothing else), and it
never dies of an error. Other threads only change what is wanted and ring its bell. It reconnects for as long as it
takes, and gives the connection back when nothing has been wanted for a while.
"""

from __future__ import annotations

import contextlib
import logging
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import redis

from django_sse.exceptions import BrokerUnavailable

from .base import Broker, Payload

__all__ = ["RedisBroker", "RedisUnavailable"]

log = logging.getLogger("django_sse")

#: Seconds between two looks at a silent connection. Two silent intervals in a row, with a PING in between: it is dead.
PING_INTERVAL = 15.0
#: Seconds that the rest of a message which has begun to arrive may take.
MESSAGE_TIMEOUT = 10.0
#: Seconds for which the connection is kept while nothing is subscribed: a client that reconnects finds it warm.
IDLE_TIMEOUT = 5.0
#: Messages taken from the connection before they are delivered: bounds the memory of a burst, not its speed.
BATCH = 256
#: Seconds to wait before reconnecting: the first time, doubled at each failure, up to the last. Jittered by half.
BACKOFF = (0.05, 2.0)
#: Seconds between two looks at a connection whose client has no socket to wait for (a fake one in a test).
POLL_INTERVAL = 0.01


class RedisUnavailable(BrokerUnavailable, redis.exceptions.ConnectionError):
    """Redis cannot be reached, or did not confirm in time."""


class RedisBroker(Broker):
    """Speaks to Redis through clients made by ``connect``, which is asked anew for each connection and publication."""

    def __init__(self, connect: Callable[[], redis.Redis]) -> None:
        super().__init__()
        #: Called for each new connection and each publication, from the thread that needs it.
        self.connect = connect
        #: Guards everything below, and is notified of every change a waiter may wait for.
        self._state = threading.Condition()
        self._wanted: set[str] = set()
        self._confirmed: set[str] = set()
        self._refused: dict[str, Exception] = {}
        #: Why the connection is down, while the reader waits before it tries again.
        self._down: Exception | None = None
        self._reader: _Reader | None = None

    def publish(self, channel: str, payload: str) -> None:
        try:
            self.connect().publish(channel, payload)
        except redis.exceptions.TimeoutError as error:
            raise RedisUnavailable(
                f"Redis did not answer while an event was sent on channel {channel!r}: {error}"
            ) from error
        except redis.exceptions.ConnectionError as error:
            raise RedisUnavailable(f"The event for channel {channel!r} was not sent: {error}") from error

    def subscribe(self, channel: str) -> None:
        with self._state:
            self._wanted.add(channel)
            if self._reader is None:
                self._reader = _Reader(self)
                self._reader.start()
            else:
                self._reader.ring()

    def unsubscribe(self, channel: str) -> None:
        with self._state:
            self._wanted.discard(channel)
            self._confirmed.discard(channel)
            self._refused.pop(channel, None)
            if self._reader is not None:
                self._reader.ring()

    def wait_subscribed(self, channels: Iterable[str], timeout: float) -> None:
        channels = set(channels)
        with self._state:
            self._state.wait_for(lambda: channels <= self._confirmed or self._why_not(channels), timeout)
            if channels <= self._confirmed:
                return
            why = self._why_not(channels) or f"no confirmation from Redis within {timeout} s"
        raise RedisUnavailable(f"Cannot subscribe to {', '.join(map(repr, sorted(channels)))}: {why}")

    def close(self) -> None:
        with self._state:
            reader, self._reader = self._reader, None
            self._wanted.clear()
            self._confirmed.clear()
            self._refused.clear()
            self._down = None
        if reader is not None:
            reader.stop()

    def _why_not(self, channels: set[str]) -> Exception | None:
        return self._down or next((self._refused[channel] for channel in channels if channel in self._refused), None)

    # What the reader asks and reports. A reader that has been replaced or closed meanwhile changes nothing.

    def wants(self, reader: _Reader) -> set[str] | None:
        """What ``reader`` shall be subscribed to; ``None``: it shall end."""
        with self._state:
            return set(self._wanted) if self._reader is reader else None

    def confirm(self, reader: _Reader, channel: str) -> None:
        """Redis delivers ``channel`` from now on."""
        with self._state:
            if self._reader is not reader:
                return
            if self._down is not None:
                log.warning("The Redis subscription of this process is back.")
                self._down = None
            if channel in self._wanted:
                self._confirmed.add(channel)
                self._state.notify_all()

    def refuse(self, reader: _Reader, channel: str, error: Exception) -> None:
        """Redis will not deliver ``channel``, whatever happens to the others."""
        log.error("Redis refused the subscription to channel %r: %s", channel, error)
        with self._state:
            if self._reader is reader and channel in self._wanted:
                self._refused[channel] = error
                self._state.notify_all()

    def lost(self, reader: _Reader, error: Exception) -> bool:
        """The connection failed, for ``error``. Whether the reader shall try again."""
        with self._state:
            if self._reader is not reader:
                return False
            if self._down is None:
                log.warning(
                    "The Redis subscription of this process is lost (%s); reconnecting. "
                    "Open streams stay open; what is published meanwhile does not reach them.",
                    error,
                )
            self._down = error
            self._confirmed.clear()
            self._refused.clear()
            self._state.notify_all()
            return True

    def resign(self, reader: _Reader) -> bool:
        """``reader`` is idle. Whether it shall end."""
        with self._state:
            if self._reader is reader and not self._wanted:
                self._reader = None
            return self._reader is not reader


class _Reader:
    """The thread that owns the pub/sub connection of one broker."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self._thread = threading.Thread(target=self._run, name="django-sse-redis", daemon=True)
        self._listen, self._bell = socket.socketpair()
        self._listen.setblocking(False)
        self._bell.setblocking(False)
        #: Whether what is wanted may have changed since the thread last looked.
        self._changed = True
        #: Connections that failed in a row.
        self._failures = 0
        #: Channels in the order in which this connection was told to subscribe, without an answer so far.
        self._asked: deque[str] = deque()

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        """Make the thread look at what is wanted. From any thread."""
        self._changed = True
        # Full of unheard rings, or just closed by a thread that ends: one more ring would tell nothing new.
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def stop(self) -> None:
        """End the thread and wait for it, unless the caller is that thread."""
        self.ring()
        if self._thread is not threading.current_thread():
            self._thread.join(MESSAGE_TIMEOUT)

    def _run(self) -> None:
        with self._listen, self._bell:
            while not self._serve_once():
                first, last = BACKOFF
                seconds = min(last, first * 2 ** min(self._failures, 16)) * random.uniform(0.5, 1.0)
                self._failures += 1
                with selectors.DefaultSelector() as selector:
                    selector.register(self._listen, selectors.EVENT_READ)
                    self._pause(selector, seconds)

    def _pause(self, selector: selectors.BaseSelector, seconds: float) -> None:
        """Wait out ``seconds``; a ring matters only if it tells the thread to end."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self._broker.wants(self) is not None:
            self._hear(selector, left)

    def _serve_once(self) -> bool:
        """Open a connection and serve it. Whether the thread shall end; else the connection has failed."""
        pubsub = None
        try:
            pubsub = self._broker.connect().pubsub()  # type: ignore[no-untyped-call]
            with selectors.DefaultSelector() as selector:
                selector.register(self._listen, selectors.EVENT_READ)
                self._serve(pubsub, selector)
            return True
        # Supervision: whatever went wrong with this connection, the next one may do.
        except Exception as error:
            if not isinstance(error, (redis.exceptions.RedisError, OSError)):
                log.exception("Unexpected error in the Redis reader; reconnecting")
            return not self._broker.lost(self, error)
        finally:
            if pubsub is not None:
                pubsub.close()

    def _serve(self, pubsub: Any, selector: selectors.BaseSelector) -> None:
        """Read from one connection until it fails, by an exception, or the thread shall end."""
        told: set[str] = set()
        self._asked.clear()
        self._changed = True
        heard = time.monotonic()
        pinged = False
        while True:
            if self._changed:
                self._changed = False
                wanted = self._broker.wants(self)
                if wanted is None:
                    return
                self._tell(pubsub, told, wanted)
            now = time.monotonic()
            if self._read(pubsub):
                heard, pinged = now, False
                continue
            silence = now - heard
            if not told:
                if silence >= IDLE_TIMEOUT and self._broker.resign(self):
                    return
            elif silence >= PING_INTERVAL:
                if pinged:
                    raise redis.exceptions.ConnectionError(f"no answer to a PING within {PING_INTERVAL} s")
                pubsub.ping()
                heard, pinged = now, True
            timeout = PING_INTERVAL if told else IDLE_TIMEOUT
            if pubsub.connection is not None and not self._watch(selector, pubsub.connection):
                timeout = POLL_INTERVAL
            self._hear(selector, timeout)

    def _tell(self, pubsub: Any, told: set[str], wanted: set[str]) -> None:
        gone = told - wanted
        if gone:
            pubsub.unsubscribe(*gone)
            told -= gone
        # One command a channel, so that a refusal (by an ACL) can be told to concern that channel alone.
        for channel in wanted - told:
            pubsub.subscribe(channel)
            self._asked.append(channel)
            told.add(channel)

    def _read(self, pubsub: Any) -> bool:
        """Deliver what has arrived, without waiting for more. Whether anything had."""
        batch: list[tuple[str, Payload]] = []
        anything = False
        # can_read() first: get_message() with no time at all takes half a message for a broken connection.
        while len(batch) < BATCH and pubsub.connection is not None and pubsub.connection.can_read(timeout=0):
            anything = True
            try:
                message = pubsub.get_message(timeout=MESSAGE_TIMEOUT)
            except redis.exceptions.ResponseError as error:
                if not self._asked:
                    raise
                self._broker.refuse(self, self._asked.popleft(), error)
                continue
            if message is None:
                continue
            if message["type"] == "message":
                batch.append((_text(message["channel"]), message["data"]))
            elif message["type"] == "subscribe":
                self._answered(_text(message["channel"]))
        if batch:
            self._broker.deliver(batch)
            # Under gevent, a reader that always finds more would never let a greenlet send what it has.
            time.sleep(0)
        return anything

    def _answered(self, channel: str) -> None:
        self._failures = 0
        if self._asked and self._asked[0] == channel:
            self._asked.popleft()
        # Unsubscribed and subscribed again in between? Then only the last answer counts.
        if channel not in self._asked:
            self._broker.confirm(self, channel)

    def _watch(self, selector: selectors.BaseSelector, connection: Any) -> bool:
        """Make ``selector`` watch the connection's socket. False where there is none to watch: a fake client's."""
        # redis-py keeps the socket to itself (and replaces it when it reconnects on its own account), but a thread that
        # waits inside redis-py could not hear the bell.
        sock = getattr(connection, "_sock", None)
        watched = [key.fileobj for key in selector.get_map().values() if key.fileobj is not self._listen]
        if watched == [sock]:
            return True
        for fileobj in watched:
            selector.unregister(fileobj)
        if not isinstance(sock, socket.socket):
            return False
        selector.register(sock, selectors.EVENT_READ)
        return True

    def _hear(self, selector: selectors.BaseSelector, timeout: float) -> None:
        """Wait until there is something to read, the bell rings, or ``timeout`` seconds have passed."""
        selector.select(timeout)
        with contextlib.suppress(BlockingIOError):
            while self._listen.recv(4096):
                pass


def _text(channel: bytes | str) -> str:
    return channel.decode("utf-8", "surrogateescape") if isinstance(channel, bytes) else channel
