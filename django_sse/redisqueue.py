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
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, ClassVar

import redis
from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.serializers.json import DjangoJSONEncoder
from django.db import transaction
from django.http import Http404
from django.utils.functional import Promise, classproperty
from sse import Sse as PlainSse

from . import runtime
from .brokers.base import Broker
from .brokers.memory import MemoryBroker
from .brokers.redis import RedisBroker
from .conf import configuration
from .database import arelease_idle, release_idle
from .event import Event, encode_payload
from .exceptions import BrokerUnavailable
from .inbox import Inbox
from .location import MEMORY, freeze, make_pool
from .streams import Stream
from .views import BaseSseView
from .wire import Sse
from .workers import on_unpatched_gevent

__all__ = ["RedisQueueView", "asend_event", "send_event"]


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
    if kwargs.get("location") == MEMORY and connect is _own_connect:
        return runtime.get(MEMORY, MemoryBroker)
    if connect is _own_connect:
        ConnectionPoolManager.connection_pool(**kwargs)  # a wrong setting is the caller's to see, not a thread's
    return runtime.get((freeze(kwargs), connect), _redis_broker)


def _redis_broker() -> Broker:
    # _connect is looked up at each call: whoever patches it is obeyed.
    return RedisBroker(lambda: _connect())


def send_event(
    event_name: Any, data: Any, channel: str | None = None, *, on_commit: bool = False, using: str | None = None
) -> None:
    """Send an event to every client of ``channel``, whatever process serves it.

    ``event_name``: what the page listens for; ``""`` or ``None`` is a plain ``message``. ``data``: text, bytes (UTF-8),
    or a list, tuple or set of those, each item a line; anything else is sent as JSON (``DjangoJSONEncoder``).
    ``channel``: ``None`` is the default channel. With ``on_commit`` the event is sent when the current transaction of
    the database ``using`` commits, at once if there is none, and never if it is rolled back.

    Raises ``ValueError`` or ``TypeError``, naming the argument, for what cannot be sent, ``ImproperlyConfigured`` for
    wrong settings, and an exception that is both ``BrokerUnavailable`` and ``redis.exceptions.ConnectionError`` when
    Redis cannot be reached (with ``on_commit``: out of the commit).
    """
    if isinstance(data, Promise):
        data = str(data)
    payload = encode_payload(event_name, data, dumps=_dumps)
    name = _current("DEFAULT_CHANNEL") if channel is None else channel
    name = configuration.channel_prefix + _checked_channel(name)
    publish = functools.partial(_runtime().broker.publish, name, payload)
    if on_commit:
        transaction.on_commit(publish, using=using)
    else:
        publish()


async def asend_event(
    event_name: Any, data: Any, channel: str | None = None, *, on_commit: bool = False, using: str | None = None
) -> None:
    """Do what ``send_event()`` does, without blocking the event loop."""
    # A transaction belongs to the thread that Django keeps for this request's database work.
    send = sync_to_async(send_event, thread_sensitive=on_commit)
    await send(event_name, data, channel, on_commit=on_commit, using=using)


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
        try:
            listener = _runtime().open(names, max_events=max_events, max_bytes=max_bytes)
            self._view._mailboxes.add(listener)
            self._inbox = Inbox(listener)
        except BrokerUnavailable as error:
            self._error = error

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
            self.open()
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
            await sync_to_async(self.open, thread_sensitive=False)()
        inbox = self._ready()
        await arelease_idle()
        taken = await inbox.await_(None, 1)
        if taken is None:
            raise StopAsyncIteration
        self._add(taken)

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
        for event, _ in taken:
            if event.id is not None:
                self._view.sse.set_event_id(event.id)
            self._view.sse.add_message(event.name, event.data)


def _names(channels: str | bytes | Iterable[str]) -> list[str]:
    if isinstance(channels, (str, bytes)) or not isinstance(channels, Iterable):
        channels = [channels]  # type: ignore[list-item]
    names = [_checked_channel(channel) for channel in channels]
    if not names:
        raise ValueError("get_redis_channel() must return at least one channel")
    return names
