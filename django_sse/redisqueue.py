"""The queue: ``send_event()`` on one side, ``RedisQueueView`` on the other, a channel of Redis in between.

The four names that programs of 0.4.1 import and patch are defined here and looked up when they are used:
``_connect``, ``ConnectionPoolManager``, ``CONNECTION_KWARGS`` and ``DEFAULT_CHANNEL``. The last two follow the settings
for as long as nobody assigns to them. This module is also where the parts meet: it chooses the broker.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import redis
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.serializers.json import DjangoJSONEncoder
from django.db import transaction
from django.http import Http404
from django.utils.functional import Promise, classproperty
from sse import Sse as PlainSse

from . import runtime
from .brokers.base import Broker, Publication
from .brokers.memory import MemoryBroker
from .brokers.redis import RedisBroker
from .conf import configuration
from .cursor import MAX_CHANNELS, Cursors
from .database import arelease_idle, release_idle
from .event import Event, encode_payload, require_utf8
from .exceptions import BrokerUnavailable
from .history import TOP, History, reset_event
from .inbox import Inbox
from .location import MEMORY, freeze, make_pool
from .streams import Stream
from .views import BaseSseView
from .wire import Sse
from .workers import on_unpatched_gevent

__all__ = ["RedisQueueView", "acursor", "asend_event", "asend_events", "cursor", "send_event", "send_events"]


def __getattr__(name: str) -> Any:
    if name == "CONNECTION_KWARGS":
        return configuration.connection
    if name == "DEFAULT_CHANNEL":
        return configuration.channel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _current(name: str) -> Any:
    """Return what a program has assigned to ``name`` in this module, else what the settings say."""
    return globals()[name] if name in globals() else __getattr__(name)


class ConnectionPoolManager:
    """The connection pools of this process, one for each set of arguments. Fork-safe, as redis-py's pools are."""

    pools: ClassVar[dict[Any, redis.ConnectionPool]] = {}
    _lock = threading.Lock()

    @classmethod
    def connection_pool(cls, **kwargs: Any) -> redis.ConnectionPool:
        """Return the pool for ``kwargs``: ``location``, ``db``, ``password``, ``options`` (others are ignored).

        ``location``: ``host:port``, ``[v6]:port``, ``unix:/path``, or a ``redis://``, ``rediss://`` or ``unix://`` URL.
        ``options`` go to redis-py's pool and connections as they are. Raises ``ImproperlyConfigured``.
        """
        key = freeze(kwargs)
        with cls._lock:
            if key not in cls.pools:
                cls.pools[key] = make_pool(kwargs)
            return cls.pools[key]


def _forget_after_fork() -> None:
    ConnectionPoolManager._lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)


def _connect() -> redis.Redis:
    """Return a client on the shared pool of ``CONNECTION_KWARGS``. Raises ``ImproperlyConfigured``."""
    return redis.Redis(connection_pool=ConnectionPoolManager.connection_pool(**_current("CONNECTION_KWARGS")))


_own_connect = _connect


def _runtime() -> runtime.Runtime:
    """Return this process's runtime for the configuration of this moment."""
    kwargs = _current("CONNECTION_KWARGS")
    connect = _connect
    cursors = _cursors() if configuration.has_history else None
    if kwargs.get("location") == MEMORY and connect is _own_connect:
        return runtime.get(MEMORY, MemoryBroker, cursors)
    if connect is _own_connect:
        ConnectionPoolManager.connection_pool(**kwargs)  # a wrong setting is the caller's to see, not a thread's
    return runtime.get((freeze(kwargs), connect), _redis_broker, cursors)


def _redis_broker() -> Broker:
    # _connect is looked up at each call: whoever patches it is obeyed.
    return RedisBroker(lambda: _connect())


def _cursors() -> Cursors:
    return _cursors_of(tuple(str(key) for key in (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)))


@functools.lru_cache(maxsize=4)
def _cursors_of(keys: tuple[str, ...]) -> Cursors:
    return Cursors([key.encode() for key in keys])


def send_event(
    event_name: Any,
    data: Any,
    channel: str | None = None,
    *,
    event_id: str | None = None,
    on_commit: bool = False,
    using: str | None = None,
) -> str | None:
    """Send an event to every client of ``channel``, whatever process serves it.

    ``event_name``: what the page listens for; ``""`` or ``None`` is a plain ``message``. ``data``: text, bytes (UTF-8),
    or a list, tuple or set of those, each item a line; anything else is sent as JSON (``DjangoJSONEncoder``).
    ``channel``: ``None`` is the default channel. ``event_id``: a name of the event, of at most 200 characters, for a
    channel with history: as long as the event is kept there, one of the same name is not sent again. With
    ``on_commit`` the event is sent when the current transaction of the database ``using`` commits, at once if there is
    none, and never if it is rolled back.

    Returns the id of the event on a channel with history (``DJANGO_SSE["HISTORY"]``), of the first one where
    ``event_id`` was known; ``None`` without history, and with ``on_commit``.

    Raises ``ValueError`` or ``TypeError``, naming the argument, for what cannot be sent, ``ImproperlyConfigured`` for
    wrong settings, and an exception that is both ``BrokerUnavailable`` and ``redis.exceptions.ConnectionError`` when
    Redis cannot be reached (with ``on_commit``: out of the commit).
    """
    return _send([_publication(event_name, data, channel, event_id)], on_commit=on_commit, using=using)[0]


def send_events(
    events: Iterable[Sequence[Any]],
    channel: str | None = None,
    *,
    on_commit: bool = False,
    using: str | None = None,
) -> list[str | None]:
    """Send several events in their order, hundreds in one round trip to Redis.

    ``events``: ``(event_name, data)`` or ``(event_name, data, channel)`` each; ``channel`` is that of those that name
    none. Otherwise as ``send_event()``, whose ids are returned in a list. What is wrong with an event is raised before
    any is sent; when Redis fails on the way, the first ones may have been.
    """
    return _send([_publication(*_event(event, channel)) for event in events], on_commit=on_commit, using=using)


async def asend_event(
    event_name: Any,
    data: Any,
    channel: str | None = None,
    *,
    event_id: str | None = None,
    on_commit: bool = False,
    using: str | None = None,
) -> str | None:
    """Do what ``send_event()`` does, without blocking the event loop."""
    # A transaction belongs to the thread that Django keeps for this request's database work.
    send = sync_to_async(send_event, thread_sensitive=on_commit)
    return await send(event_name, data, channel, event_id=event_id, on_commit=on_commit, using=using)


async def asend_events(
    events: Iterable[Sequence[Any]],
    channel: str | None = None,
    *,
    on_commit: bool = False,
    using: str | None = None,
) -> list[str | None]:
    """Do what ``send_events()`` does, without blocking the event loop."""
    send = sync_to_async(send_events, thread_sensitive=on_commit)
    return await send(events, channel, on_commit=on_commit, using=using)


def cursor(channels: str | Iterable[str] | None = None) -> str:
    """Return the id of this moment on a channel with history, or on several: ``None`` is the default channel.

    For a page: what it shows is read after that, and its stream connects with ``?last_event_id=`` and the id. So it
    gets what has come meanwhile. Raises ``ImproperlyConfigured`` where a channel has no history, ``BrokerUnavailable``
    when Redis cannot be reached.
    """
    names = _names(_current("DEFAULT_CHANNEL") if channels is None else channels)
    histories = _histories(names)
    for name in names:
        if configuration.channel_prefix + name not in histories:
            raise ImproperlyConfigured(
                f'Channel {name!r} has no history, so it has no cursor; set DJANGO_SSE["HISTORY"] for it.'
            )
    pasts = _runtime().broker.fetch([(channel, history, TOP) for channel, history in histories.items()])
    tops = {}
    for channel, past in zip(histories, pasts, strict=True):
        if isinstance(past, BrokerUnavailable):
            raise past
        tops[channel] = past.top
    return _cursors().encode(tops)


async def acursor(channels: str | Iterable[str] | None = None) -> str:
    """Do what ``cursor()`` does, without blocking the event loop."""
    return await sync_to_async(cursor, thread_sensitive=False)(channels)


#: Characters of an event's ``event_id``.
MAX_EVENT_ID = 200


def _publication(event_name: Any, data: Any, channel: Any, event_id: Any = None) -> Publication:
    if isinstance(data, Promise):
        data = str(data)
    payload = encode_payload(event_name, data, dumps=_dumps)
    limit = configuration.max_payload
    if limit is not None and len(payload) > limit:
        raise ValueError(
            f'data: the event takes {len(payload)} bytes as JSON; DJANGO_SSE["MAX_PAYLOAD"] allows {limit}. '
            "Send where it can be fetched instead."
        )
    name = _checked_channel(_current("DEFAULT_CHANNEL") if channel is None else channel)
    history = configuration.history(name)
    if event_id is not None:
        if not isinstance(event_id, str) or not 0 < len(event_id) <= MAX_EVENT_ID:
            raise ValueError(f"event_id must be text of 1 to {MAX_EVENT_ID} characters, not {event_id!r}")
        require_utf8("event_id", event_id)
        if history is None:
            raise ImproperlyConfigured(
                f'event_id: channel {name!r} has no history that could know it; set DJANGO_SSE["HISTORY"] for it.'
            )
    return Publication(configuration.channel_prefix + name, payload, history, event_id)


def _event(event: Sequence[Any], channel: str | None) -> tuple[Any, Any, Any]:
    if isinstance(event, (str, bytes)) or not isinstance(event, Sequence) or len(event) not in (2, 3):
        raise TypeError(f"events must be (event_name, data) or (event_name, data, channel), not {event!r}")
    return event[0], event[1], event[2] if len(event) == 3 and event[2] is not None else channel


def _send(publications: Sequence[Publication], *, on_commit: bool, using: str | None) -> list[str | None]:
    """Publish at once, and return the ids; or when the transaction commits."""
    publish = functools.partial(_runtime().broker.publish_all, publications)
    if on_commit:
        transaction.on_commit(publish, using=using)
        return [None] * len(publications)
    positions = publish()
    return [
        None if position is None else _cursors().encode({publication.channel: position})
        for publication, position in zip(publications, positions, strict=True)
    ]


def _histories(names: Iterable[str]) -> Mapping[str, History]:
    """Return what is kept of those of the channels that have history, by their names in the broker."""
    prefix = configuration.channel_prefix
    histories = {prefix + name: history for name in names if (history := configuration.history(name)) is not None}
    if len(histories) > MAX_CHANNELS:
        raise ValueError(
            f"A stream can have {MAX_CHANNELS} channels with history, not {len(histories)}: its position in all of "
            "them has to fit into a header. Send what concerns many on a channel that they share."
        )
    return histories


_dumps = functools.partial(json.dumps, cls=DjangoJSONEncoder, allow_nan=False)


def _checked_channel(channel: Any) -> str:
    if isinstance(channel, bytes):
        channel = channel.decode()
    if isinstance(channel, int) and not isinstance(channel, bool):
        channel = str(channel)  # a primary key, which Redis takes as well
    if not isinstance(channel, str) or not channel:
        raise ValueError(f"channel must be a name, not {channel!r}")
    try:
        channel.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"channel {channel!r} contains a lone surrogate, which UTF-8 cannot carry") from error
    return channel


class RedisQueueView(BaseSseView):
    """A stream of what ``send_event()`` sends on a channel, or on several.

    The channel is ``redis_channel`` (class attribute, or ``as_view(redis_channel=...)``), or whatever
    ``get_redis_channel()`` returns for the request. The view is subscribed before its headers are sent: what is sent
    after the browser's ``open`` is not missed.
    """

    #: The channel, unless ``get_redis_channel()`` says otherwise. Not set: the default channel of the settings.
    redis_channel: Any = classproperty(lambda cls: _current("DEFAULT_CHANNEL"))

    _steps: _Steps | None = None
    _subscribed: Iterable[str] = ()

    def get_redis_channel(self) -> str | Iterable[str]:
        """Return the channel that this request listens to, or a list of channels."""
        return self.redis_channel  # type: ignore[no-any-return]

    def iterator(self) -> Iterable[object]:
        """Return an iterator, for ``for`` and ``async for``, each of whose steps adds one event to ``self.sse``.

        Its first step raises ``BrokerUnavailable`` when the broker cannot be reached.
        """
        steps, self._steps = self._steps, None
        if steps is not None and self._has_own_iterator() and not steps.is_for(self):
            steps.close()
            steps = None
        return steps or _Steps(self)

    def initial(self) -> Iterable[object] | None:
        """Fill ``self.sse`` with the state that the events to come will change. May be a generator; may be written.

        Called when a client comes without a position of its own, after the position from which it will hear events was
        taken: a state that is read here misses nothing. On a channel without history that is at each connect.
        """
        return None

    def on_reset(self, channels: Sequence[str], reason: str) -> Iterable[object] | None:
        """Tell a client that what it has missed on ``channels`` is gone. May be a generator.

        ``reason``: ``"epoch"`` (Redis has lost its data), ``"expired"`` (it was away for too long), or ``"unknown"``
        (its last event ID says nothing of these channels). By default ``self.sse`` gets a ``stream-reset`` event that
        says so; a view that writes its own can send the state instead, for instance ``return self.initial()``.
        """
        event = reset_event(channels, reason)
        self.sse.add_message(event.name, event.data)
        return None

    def _open(self) -> None:
        # Whoever calls iterator() first gets this subscription. One of a subclass that never does, having a source of
        # its own, does not need Redis, nor our settings, to be right; nor does one that chooses the channel later.
        if self._steps is not None:
            return
        steps = _Steps(self)
        try:
            steps.open()
        except (Http404, PermissionDenied):
            raise
        except Exception:
            if not self._has_own_iterator():
                raise
        else:
            self._steps = steps
            steps.greet()

    def _channels(self) -> Iterable[str]:
        return self._subscribed

    def _has_own_iterator(self) -> bool:
        return getattr(self.iterator, "__func__", None) is not RedisQueueView.iterator

    def _stream(self, iterator: Iterable[object] | AsyncIterable[object] | None, **source: Any) -> Stream:
        if isinstance(iterator, _Steps) and iterator.mailbox is not None and type(self.sse) in (Sse, PlainSse):
            # Nobody has a say in each event, so that every client gets the same bytes.
            return super()._stream(None, mailbox=iterator.mailbox)
        return super()._stream(iterator, **source)


class _Steps:
    """The events of a view's channels, one a step, each added to the view's ``sse``."""

    def __init__(self, view: RedisQueueView) -> None:
        self._view = view
        self._channels: list[str] = []
        self._histories: Mapping[str, History] = {}
        self._inbox: Inbox | None = None
        self._error: Exception | None = None

    @property
    def mailbox(self) -> runtime.Listener | None:
        """The subscription, once it is open."""
        return None if self._inbox is None else self._inbox.mailbox  # type: ignore[return-value]

    def open(self) -> None:
        """Subscribe. That the broker is not there is raised by the first step."""
        if on_unpatched_gevent():
            raise ImproperlyConfigured(
                "This process serves requests with gevent but waits with threads: one waiting stream would stop all "
                "others. Call gevent.monkey.patch_all() before anything else is imported."
            )
        self._channels = _names(self._view.get_redis_channel())
        self._view._subscribed = self._channels
        names = [configuration.channel_prefix + channel for channel in self._channels]
        max_events, max_bytes = configuration.mailbox
        self._histories = _histories(self._channels)
        # An empty one is none (WHATWG HTML, section 9.2.3).
        last_id = self._view.get_last_id() or None if self._histories else None
        try:
            listener = _runtime().open(
                names,
                max_events=max_events,
                max_bytes=max_bytes,
                histories=self._histories,
                last_id=None if last_id is None else str(last_id),
                ends_on_reset=getattr(self._view.on_reset, "__func__", None) is not RedisQueueView.on_reset,
            )
            self._view._mailboxes.add(listener)
            self._inbox = Inbox(listener)
        except BrokerUnavailable as error:
            self._error = error

    def greet(self) -> None:
        """Fill the view's buffer with what its client is sent before the first event."""
        if self._inbox is None:
            return
        view = self._view
        placement = self.mailbox.placement if self.mailbox is not None else None
        if not hasattr(view, "sse"):  # an instance that dispatch() has not seen
            view.sse = view._buffer()
        if placement is None or placement.is_first:
            _exhaust(view, "initial", view.initial())
        else:
            for reason, channels in placement.resets.items():
                _exhaust(view, "on_reset", view.on_reset(channels, reason))
        # Last: who is cut off before that comes back as who he was.
        if placement is not None and placement.cursor is not None:
            view.sse.set_event_id(placement.cursor)

    def is_for(self, view: RedisQueueView) -> bool:
        """Whether these are the channels that ``view`` wants now: the start of its iterator may have chosen others."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._channels == _names(view.get_redis_channel())
        return True  # in an event loop nothing that might ask the database can be called

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> None:
        if self._inbox is None and self._error is None:
            self._begin()
        inbox = self._ready()
        release_idle()
        taken = inbox.wait(None, 1)
        if taken is None:
            # The client has left, and this code runs in a thread that cannot be interrupted: end it as close() would.
            raise GeneratorExit if inbox.mailbox.ended == "client" else StopIteration
        self._add(taken)

    def __aiter__(self) -> AsyncIterator[object]:
        return self

    async def __anext__(self) -> None:
        if self._inbox is None and self._error is None:
            await sync_to_async(self._begin, thread_sensitive=False)()
        inbox = self._ready()
        await arelease_idle()
        taken = await inbox.await_(None, 1)
        if taken is None:
            raise StopAsyncIteration
        self._add(taken)

    def _begin(self) -> None:
        self.open()
        self.greet()

    def close(self) -> None:
        """Give the subscription back. Takes no lock: the collector may close a generator that delegates to this."""
        if self.mailbox is not None:
            self.mailbox.leave()

    def _ready(self) -> Inbox:
        if self._inbox is None:
            assert self._error is not None
            raise self._error
        return self._inbox

    def _add(self, taken: list[tuple[Event, bytes]]) -> None:
        sse = self._view.sse
        for event, _ in taken:
            # An id of ours in one block with its event, or behind it: one that arrives alone would have it missed.
            if self._histories and isinstance(sse, Sse) and type(sse).add_message is Sse.add_message:
                sse.add(event)
            elif self._histories:
                sse.add_message(event.name, event.data)
                if event.id is not None:
                    sse.set_event_id(event.id)
            else:
                if event.id is not None:
                    sse.set_event_id(event.id)
                sse.add_message(event.name, event.data)


def _exhaust(view: RedisQueueView, method: str, steps: Any) -> None:
    if steps is not None:
        if not isinstance(steps, Iterable):
            name = f"{type(view).__name__}.{method}()"
            raise TypeError(
                f"{name} must fill self.sse and return None, or be a plain generator; it returned {steps!r}"
            )
        for _ in steps:
            pass


def _names(channels: str | bytes | Iterable[str]) -> list[str]:
    if isinstance(channels, (str, bytes)) or not isinstance(channels, Iterable):
        channels = [channels]  # type: ignore[list-item]
    names = [_checked_channel(channel) for channel in channels]
    if not names:
        raise ValueError("get_redis_channel() must return at least one channel")
    return names
