"""The Redis broker: publishes through the caller's client, and reads through one pub/sub connection per process.

A channel with history is published to by ``publish.lua``, whose head says what it wants: other programs may call it,
too. What is kept is fetched by ``read.lua``, through a connection of its own.

One thread owns that connection: it alone writes to it and reads from it (a TLS socket allows nothing else), and it
never dies of an error. Other threads only change what is wanted and ring its bell. It reconnects for as long as it
takes, and gives the connection back when nothing has been wanted for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from django_sse.exceptions import BrokerUnavailable
from django_sse.history import TOP, History, Past, Position

from .base import FETCH_BYTES, Broker, Payload, Publication

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
#: Seconds for which close() waits for the thread: it may be in the middle of a delivery.
STOP_TIMEOUT = 1.0
#: Seconds to wait before reconnecting: the first time, doubled at each failure, up to the last. Jittered by half.
BACKOFF = (0.05, 2.0)
#: Seconds between two looks at a connection whose client has no socket to wait for (a fake one in a test).
POLL_INTERVAL = 0.01
#: Whether redis-py can be told how long a read may take. Where it cannot, the socket's own timeout says it.
BOUNDS_READS = "timeout" in inspect.signature(redis.connection.AbstractConnection.read_response).parameters
#: Events, and bytes of them, that are published in one round trip at most.
PIPELINE_EVENTS, PIPELINE_BYTES = 500, 4 * 1024 * 1024
#: Bytes of payloads that Redis returns in one reply, or little more: it serves nobody else meanwhile.
PAGE_BYTES = 1024 * 1024


class _Script:
    """A script that Redis runs as one step."""

    def __init__(self, name: str) -> None:
        self.text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        # A name, not a secret.
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def run(self, client: redis.Redis, keys: Sequence[str], args: Sequence[Any]) -> Any:
        try:
            return client.evalsha(self.sha, len(keys), *keys, *args)
        except redis.exceptions.NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)


_publish = _Script("publish.lua")
_read = _Script("read.lua")


def _keys(channel: str) -> list[str]:
    # Braces, so that both are in one slot of a cluster.
    return [f"django-sse:meta:{{{channel}}}", f"django-sse:log:{{{channel}}}"]


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
        # Those that were wanted or given up since the reader last asked, which does not look through all each time.
        self._touched: set[str] = set()
        # What the present connection delivers. A channel that is given up stays here until the reader has seen it: if
        # it is taken again before that, it is still subscribed.
        self._confirmed: set[str] = set()
        # What an earlier connection delivered, and this one does not yet.
        self._lost: set[str] = set()
        #: What Redis refused, and why: until the channel is given up, so that who comes next asks again.
        self._refused: dict[str, Exception] = {}
        self._ask_again: set[str] = set()
        #: Why the last attempt to connect failed, unless somebody has asked for another since.
        self._down: Exception | None = None
        #: Whether a loss has been logged, and its end has not.
        self._outage = False
        self._reader: _Reader | None = None
        # Fetches what is kept: one thread at a time does. ``None`` until somebody needs it, and after a failure.
        self._fetcher: redis.Redis | None = None

    def publish_all(self, publications: Sequence[Publication]) -> list[Position | None]:
        done: list[Position | None] = []
        try:
            client = self.connect()
            for group in _groups(publications):
                done += _publish_group(client, group)
        except redis.exceptions.TimeoutError as error:
            raise RedisUnavailable(
                f"Redis did not answer while an event was sent on {_names(publications[len(done) :])}: {error}"
            ) from error
        except redis.exceptions.ConnectionError as error:
            raise RedisUnavailable(
                f"The event for {_names(publications[len(done) :])} was not sent: {error}"
            ) from error
        return done

    def fetch(self, channels: Sequence[tuple[str, History, int]]) -> list[Past | BrokerUnavailable]:
        client, self._fetcher = self._fetcher, None
        try:
            if client is None:
                client = _client_of_its_own(self.connect())
            pasts = _fetch(client, channels)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            raise RedisUnavailable(f"The history of {len(channels)} channel(s) cannot be fetched: {error}") from error
        self._fetcher = client
        return pasts

    def subscribe(self, channel: str) -> None:
        with self._state:
            self._wanted.add(channel)
            self._touched.add(channel)
            self._down = None
            if self._reader is None:
                reader = _Reader(self)
                reader.start()
                self._reader = reader
            else:
                self._reader.ring(hurry=True)

    def unsubscribe(self, channel: str) -> None:
        with self._state:
            self._wanted.discard(channel)
            self._lost.discard(channel)
            self._touched.add(channel)
            if self._refused.pop(channel, None) is not None:
                self._ask_again.add(channel)
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

    def nudge(self) -> None:
        reader = self._reader
        if reader is not None:
            reader.nudge()

    def close(self) -> None:
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.connection_pool.disconnect()
        with self._state:
            reader, self._reader = self._reader, None
            self._wanted.clear()
            self._touched.clear()
            self._confirmed.clear()
            self._lost.clear()
            self._refused.clear()
            self._ask_again.clear()
            self._down = None
        if reader is not None:
            reader.stop()

    def _why_not(self, channels: set[str]) -> Exception | None:
        return self._down or next((self._refused[channel] for channel in channels if channel in self._refused), None)

    # What the reader asks and reports. A reader that has been replaced or closed meanwhile changes nothing.

    def serves(self, reader: _Reader) -> bool:
        """Whether ``reader`` shall go on."""
        with self._state:
            return self._reader is reader

    def wants(self, reader: _Reader, told: set[str]) -> tuple[set[str], set[str]] | None:
        """What ``reader``, which has ``told`` Redis of some, shall subscribe to and give up; ``None``: it shall end."""
        with self._state:
            if self._reader is not reader:
                return None
            touched, self._touched = self._touched, set()
            if not told:  # a new connection
                touched |= self._wanted
            told -= self._ask_again
            self._ask_again.clear()
            gone = touched - self._wanted
            self._confirmed -= gone
            return touched - gone - told, gone & told

    def confirm(self, reader: _Reader, channel: str) -> None:
        """Redis delivers ``channel`` from now on."""
        with self._state:
            if self._reader is not reader:
                return
            if self._outage:
                self._outage = False
                log.warning("The Redis subscription of this process is back.")
            # Also where redis-py has reconnected on its own account, and told nobody.
            again = channel in self._lost or channel in self._confirmed
            if channel in self._wanted:
                self._lost.discard(channel)
                self._confirmed.add(channel)
                self._state.notify_all()
        if again:
            self.resubscribed(channel)

    def refuse(self, reader: _Reader, channel: str, error: Exception) -> None:
        """Redis will not deliver ``channel``, whatever happens to the others."""
        log.error("Redis refused the subscription to channel %r: %s", channel, error)
        with self._state:
            if self._reader is not reader:
                return
            if channel in self._wanted:
                self._refused[channel] = error
                self._state.notify_all()
            else:
                self._ask_again.add(channel)  # for who takes it before the reader has seen that it was given up

    def lost(self, reader: _Reader, error: Exception) -> bool:
        """The connection failed, for ``error``. Whether the reader shall try again."""
        with self._state:
            if self._reader is not reader:
                return False
            if not self._outage:
                self._outage = True
                log.warning(
                    "The Redis subscription of this process is lost (%s); reconnecting. "
                    "Open streams stay open; what is published meanwhile reaches them only where there is a HISTORY.",
                    error,
                )
            self._down = error
            self._lost |= self._confirmed
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
        # Made now and kept: a process that is out of file descriptors must not lose its thread over one.
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listen, selectors.EVENT_READ)
        self._watched: socket.socket | None = None
        #: Whether what is wanted may have changed since the thread last looked.
        self._changed = True
        #: Whether a delivery is wanted though nothing may have come.
        self._nudged = False
        #: Whether somebody waits for the next attempt to connect.
        self._hurry = False
        #: Connections that failed in a row.
        self._failures = 0
        #: Channels in the order in which this connection was told to subscribe, without an answer so far.
        self._asked: deque[str] = deque()

    def start(self) -> None:
        self._thread.start()

    def ring(self, *, hurry: bool = False) -> None:
        """Make the thread look at what is wanted; with ``hurry``, also cut short its pause. From any thread."""
        self._changed = True
        self._hurry = self._hurry or hurry
        # Full of unheard rings, or just closed by a thread that ends: one more ring would tell nothing new.
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def nudge(self) -> None:
        """Make the thread deliver, if only nothing. From any thread; takes no lock."""
        self._nudged = True
        self.ring()

    def stop(self) -> None:
        """End the thread and wait for it, unless the caller is that thread."""
        self.ring()
        if self._thread is not threading.current_thread():
            self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        with self._listen, self._bell, self._selector:
            while not self._serve_once():
                self._pause()
                self._failures += 1

    def _pause(self) -> None:
        """Wait before the next attempt: the longer, the more have failed, unless somebody waits for it."""
        first, last = BACKOFF
        begin = time.monotonic()
        seconds = min(last, first * 2 ** min(self._failures, 16)) * random.uniform(0.5, 1.0)
        while self._broker.serves(self):
            left = begin + (min(first, seconds) if self._hurry else seconds) - time.monotonic()
            if left <= 0:
                return
            self._hear(left)

    def _serve_once(self) -> bool:
        """Open a connection and serve it. Whether the thread shall end; else the connection has failed."""
        pubsub = None
        self._hurry = False
        try:
            pubsub = _client_of_its_own(self._broker.connect()).pubsub()  # type: ignore[no-untyped-call]
            self._serve(pubsub)
            return True
        # Supervision: whatever went wrong with this connection, the next one may do.
        except Exception as error:
            if not isinstance(error, (redis.exceptions.RedisError, OSError)):
                log.exception("Unexpected error in the Redis reader; reconnecting")
            return not self._broker.lost(self, error)
        finally:
            self._watch(None)
            if pubsub is not None:
                with contextlib.suppress(Exception):  # it is given up in any case
                    pubsub.close()

    def _serve(self, pubsub: Any) -> None:
        """Read from one connection until it fails, by an exception, or the thread shall end."""
        told: set[str] = set()
        self._asked.clear()
        self._changed = True
        heard = time.monotonic()
        pinged = False
        while True:
            if not self._attend(pubsub, told):
                return
            now = time.monotonic()
            if self._read(pubsub):
                heard, pinged = now, False
                continue
            silence = now - heard
            if not told:
                if silence >= IDLE_TIMEOUT and self._broker.resign(self):
                    return
            elif silence >= PING_INTERVAL and self._watched is not None:
                if pinged:
                    raise redis.exceptions.ConnectionError(f"no answer to a PING within {PING_INTERVAL} s")
                pubsub.ping()
                heard, pinged = now, True
            timeout = PING_INTERVAL if told else IDLE_TIMEOUT
            if pubsub.connection is not None and not self._watch(pubsub.connection):
                timeout = POLL_INTERVAL
            self._hear(timeout)

    def _attend(self, pubsub: Any, told: set[str]) -> bool:
        """Do what the thread was rung for. Whether it shall go on."""
        if self._changed:
            self._changed = False
            wanted = self._broker.wants(self, told)
            if wanted is None:
                return False
            self._tell(pubsub, told, *wanted)
        if self._nudged:
            self._nudged = False
            self._broker.deliver([])
        return True

    def _tell(self, pubsub: Any, told: set[str], new: set[str], gone: set[str]) -> None:
        if gone:
            pubsub.unsubscribe(*gone)
            told -= gone
        # One command a channel, so that a refusal (by an ACL) can be told to concern that channel alone.
        for channel in new:
            told.add(channel)
            try:
                pubsub.subscribe(channel)
            except (UnicodeError, redis.exceptions.DataError) as error:  # no name that could be sent
                self._broker.refuse(self, channel, error)
            else:
                self._asked.append(channel)
        _keep_out_of_log(pubsub.connection)

    def _read(self, pubsub: Any) -> bool:
        """Deliver what has arrived, without waiting for more. Whether anything had."""
        batch: list[tuple[str, Payload]] = []
        anything = False
        # can_read() first: a read with no time at all takes half a message for a broken connection.
        while len(batch) < BATCH and pubsub.connection is not None and pubsub.connection.can_read(timeout=0):
            anything = True
            try:
                event = self._take(pubsub)
            except redis.exceptions.ResponseError as error:
                if not self._asked:
                    raise
                self._broker.refuse(self, self._asked.popleft(), error)
                continue
            if event is not None:
                batch.append(event)
        if batch:
            self._broker.deliver(batch)
            # Under gevent, a reader that always finds more would never let a greenlet send what it has.
            time.sleep(0)
        return anything

    def _take(self, pubsub: Any) -> tuple[str, Payload] | None:
        """Read what has begun to arrive, waiting for its rest; return it if it is an event."""
        connection = pubsub.connection
        if hasattr(connection, "read_response"):
            # As get_message() reads, without what it does besides: look at the socket again, count, and reconnect on
            # its own account, so that nobody learns of a loss. For a small message that is most of the cost.
            if BOUNDS_READS:
                answer = connection.read_response(disconnect_on_error=False, push_request=True, timeout=MESSAGE_TIMEOUT)
            else:
                answer = connection.read_response(disconnect_on_error=False, push_request=True)
            if answer and answer[0] == b"message":
                return _text(answer[1]), answer[2]
            message = pubsub.handle_message(answer)  # which keeps account of what is subscribed
        else:  # a fake client
            message = pubsub.get_message(timeout=MESSAGE_TIMEOUT)
        if message is None:
            return None
        if not isinstance(message, dict):  # a mock instead of a client would keep the thread busy for ever
            raise TypeError(f"{type(message).__name__} was received, not a message")
        if message["type"] == "message":
            return _text(message["channel"]), message["data"]
        if message["type"] == "subscribe":
            self._answered(_text(message["channel"]))
        return None

    def _answered(self, channel: str) -> None:
        self._failures = 0
        if self._asked and self._asked[0] == channel:
            self._asked.popleft()
        # Unsubscribed and subscribed again in between? Then only the last answer counts.
        if channel not in self._asked:
            self._broker.confirm(self, channel)

    def _watch(self, connection: Any) -> bool:
        """Hear the connection's socket as well. False where there is none to hear: a fake client's."""
        # redis-py keeps the socket to itself (and replaces it when it reconnects on its own account), but a thread that
        # waits inside redis-py could not hear the bell.
        sock = getattr(connection, "_sock", None)
        if not isinstance(sock, socket.socket):
            sock = None
        if sock is not self._watched:
            if self._watched is not None:
                self._selector.unregister(self._watched)
            if sock is not None:
                self._selector.register(sock, selectors.EVENT_READ)
            self._watched = sock
        return sock is not None

    def _hear(self, timeout: float) -> None:
        """Wait until there is something to read, the bell rings, or ``timeout`` seconds have passed."""
        self._selector.select(timeout)
        with contextlib.suppress(BlockingIOError):
            while self._listen.recv(4096):
                pass


def _client_of_its_own(client: redis.Redis) -> redis.Redis:
    """Return a client like ``client`` for the reader alone, whatever the program wants of its own.

    Its payloads stay bytes, for it is not its part to refuse one that is no text. Its reads end: redis-py 5 waits for
    the rest of a message for as long as the socket lets it. And it takes no connection from the program's pool.
    """
    pool = getattr(client, "connection_pool", None)
    if type(pool) is not redis.ConnectionPool:  # Sentinel's, say, which knows itself where to connect
        return client
    kwargs = {**pool.connection_kwargs, "decode_responses": False}
    kwargs["socket_timeout"] = kwargs.get("socket_timeout") or MESSAGE_TIMEOUT
    return redis.Redis(connection_pool=redis.ConnectionPool(pool.connection_class, **kwargs))


def _groups(publications: Sequence[Publication]) -> Iterator[list[Publication]]:
    """Divide ``publications`` into round trips."""
    group: list[Publication] = []
    size = 0
    for publication in publications:
        group.append(publication)
        size += len(publication.payload)
        if len(group) >= PIPELINE_EVENTS or size >= PIPELINE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _publish_group(client: redis.Redis, group: Sequence[Publication]) -> list[Position | None]:
    if len(group) == 1:
        channel, payload, history, _ = group[0]
        if history is None:
            client.publish(channel, payload)
            return [None]
        return [_position(_publish.run(client, *_script_arguments(group[0], history)))]
    loads = any(publication.history is not None for publication in group)
    with client.pipeline(transaction=False) as pipeline:
        if loads:  # first of all: what comes later in the same round trip then finds it
            pipeline.script_load(_publish.text)
        for publication in group:
            if publication.history is None:
                pipeline.publish(publication.channel, publication.payload)
            else:
                keys, args = _script_arguments(publication, publication.history)
                pipeline.evalsha(_publish.sha, len(keys), *keys, *args)
        answers = pipeline.execute()[loads:]
    return [
        None if publication.history is None else _position(answer)
        for publication, answer in zip(group, answers, strict=True)
    ]


def _script_arguments(publication: Publication, history: History) -> tuple[list[str], list[Any]]:
    keys = _keys(publication.channel)
    if publication.key is not None:
        keys.append(f"django-sse:id:{{{publication.channel}}}:{publication.key}")
    return keys, [publication.channel, publication.payload, history.size, history.ttl]


def _position(answer: Any) -> Position:
    epoch, offset, check = answer[:3]
    return Position(int(epoch), int(offset), int(check))


def _names(publications: Sequence[Publication]) -> str:
    channels = dict.fromkeys(publication.channel for publication in publications)
    return "channel " + ", ".join(map(repr, channels))


def _fetch(client: redis.Redis, channels: Sequence[tuple[str, History, int]]) -> list[Past | BrokerUnavailable]:
    answers = _first_pages(client, channels)
    if any(isinstance(answer, redis.exceptions.NoScriptError) for answer in answers):
        client.script_load(_read.text)
        answers = _first_pages(client, channels)
    pasts: list[Past | BrokerUnavailable] = []
    for (channel, history, lowest), answer in zip(channels, answers, strict=True):
        try:
            if isinstance(answer, Exception):
                raise answer
            pasts.append(_whole(client, channel, history, lowest, answer))
        except redis.exceptions.ResponseError as error:  # this channel's: refused by an ACL, for instance
            pasts.append(RedisUnavailable(f"The history of channel {channel!r} cannot be fetched: {error}"))
    return pasts


def _first_pages(client: redis.Redis, channels: Sequence[tuple[str, History, int]]) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for channel, history, lowest in channels:
            keys = _keys(channel)
            pipeline.evalsha(_read.sha, len(keys), *keys, TOP, lowest, PAGE_BYTES, history.ttl)
        return pipeline.execute(raise_on_error=False)


def _whole(client: redis.Redis, channel: str, history: History, lowest: int, answer: Any) -> Past:
    """Return what is kept, of which ``answer`` is the latest page, going back page by page."""
    top = _position(answer)
    events: list[tuple[Position, Payload]] = []
    room = FETCH_BYTES
    while True:
        page = [(_entry(top.epoch, id), payload) for id, payload in zip(answer[3][::2], answer[3][1::2], strict=True)]
        events += page
        size = sum(len(payload) for _, payload in page)
        room -= size
        if size < PAGE_BYTES or room <= 0 or page[-1][0].offset <= max(lowest, 1):
            break
        args = [page[-1][0].offset - 1, lowest, PAGE_BYTES, history.ttl]
        answer = _read.run(client, _keys(channel), args)
        if int(answer[0]) != top.epoch:
            top = _position(answer)  # nothing is left of what was begun
            return Past(top, top, (), complete=False)
    # Until the first that is missing: others may have been trimmed between two pages.
    whole = [at for number, at in enumerate(events) if at[0].offset == top.offset - number]
    whole.reverse()
    # Whether more was wanted than there was.
    complete = room > 0 and len(whole) == len(events) and lowest < (whole[0][0].offset if whole else top.offset + 1)
    if not whole:
        return Past(top, top, (), complete)
    first, payload = whole[0]
    if first.offset == 1 and payload:
        return Past(Position(top.epoch, 0, 0), top, whole, complete=True)
    # One more is kept than can be missed, so that it is certain what the others follow. Its payload may have expired.
    return Past(first, top, whole[1:], complete)


def _entry(epoch: int, id: bytes | str) -> Position:
    offset, check = _text(id).split("-")
    return Position(epoch, int(offset), int(check))


def _keep_out_of_log(connection: Any) -> None:
    """Have redis-py not make a text of each message of a RESP3 connection, for its log.

    With that log, reading takes nearly twice as long, and redis-py 5.0 shows it on standard error.
    """
    # A PubSub takes such a handler, too, but fails on a connection of RESP2; and which it is, is known when it is made.
    parser = getattr(connection, "_parser", None)
    for name in ("set_pubsub_push_handler", "set_push_handler"):  # as it is called now, and was in 5.0
        set_handler = getattr(parser, name, None)
        if set_handler is not None:
            set_handler(lambda message: message)
            return


def _text(channel: bytes | str) -> str:
    return channel.decode("utf-8", "surrogateescape") if isinstance(channel, bytes) else channel
