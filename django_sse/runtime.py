"""What the streams of a process share: for each configuration one hub, one lock, one broker. Nothing outlives a fork.

The runtime owns the hub's lock, carries out what the hub says has to be done, and paces the broker: a client that takes
its events is given a moment to do so before the next ones are put on top; one that does not take them is *slow*, and
holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import Any, TypeVar

from django.core.signals import setting_changed

from .audience import Audience, Cursor, Outcome, Subscription
from .brokers.base import Broker, Payload
from .cursor import Cursors
from .event import Event, decode_message, decode_payload
from .exceptions import BrokerUnavailable
from .history import History, Position
from .hub import Hub, Placement
from .recovery import Recovery
from .track import Track
from .wire import encode

__all__ = ["Listener", "Rank", "Runtime", "get", "reset"]

log = logging.getLogger("django_sse")

T = TypeVar("T")
#: Seconds without any progress for which crowded mailboxes hold the broker's thread up, before their clients are slow.
PATIENCE = 0.1
#: Reasons of an end after which nobody takes what waits.
GONE = ("client", "stalled", "abandoned")
#: Seconds for which crowded mailboxes hold up, in all, what was fetched.
FETCH_PATIENCE = 0.5
#: Seconds that a new stream waits for the broker to confirm its channels.
SUBSCRIBE_TIMEOUT = 5.0


class Runtime:
    """Everything that the streams of one configuration share. ``cursors``: for channels with history."""

    def __init__(self, broker: Broker, cursors: Cursors | None = None) -> None:
        self.broker = broker
        self.cursors = cursors
        broker.deliver = self.deliver
        broker.resubscribed = self._refresh
        #: Guards the hub, its subscriptions and ``_crowded``.
        self._lock = threading.Lock()
        #: Notified when ``_crowded`` becomes smaller.
        self._calm = threading.Condition(self._lock)
        self._hub = Hub(cursors)
        self._recovery = Recovery(self._fetch)
        # What was in the way of the last fetch: said once.
        self._in_the_way: dict[str, Exception] = {}
        self._crowded: set[Subscription] = set()
        # Channels for which it was said that some of their events are not kept.
        self._unkept: set[str] = set()
        # What was dropped without being closed, and by whatever thread the collector ran in.
        self._abandoned: deque[Subscription] = deque()

    def open(
        self,
        channels: Iterable[str],
        *,
        max_events: int,
        max_bytes: int,
        histories: Mapping[str, History] = MappingProxyType({}),
        last_id: str | None = None,
        ends_on_reset: bool = False,
        timeout: float = SUBSCRIBE_TIMEOUT,
    ) -> Listener:
        """Subscribe to ``channels`` and return the listener: whatever is published from now on is in its mailbox.

        Also what came on those that have a history after ``last_id``, if that is given. ``ends_on_reset``: end it,
        ``"reset"``, where a ``stream-reset`` would have to be sent later on.

        Waits for the broker for at most ``timeout`` seconds. Raises ``BrokerUnavailable``; nothing is left behind then.
        """
        self._reap()
        with self._lock:
            subscription, first = self._hub.subscribe(
                channels, max_events=max_events, max_bytes=max_bytes, histories=histories
            )
            subscription.ends_on_reset = ends_on_reset
            listener = Listener(self, subscription)
            try:
                for channel in first:
                    self.broker.subscribe(channel)
            except BaseException:
                self._end(subscription, "error")
                raise
        try:
            self.broker.wait_subscribed(subscription.channels, timeout)
            if subscription.audience.tracks:
                listener.placement = self._place(subscription, last_id, timeout)
        except BaseException:
            listener.close()
            raise
        return listener

    def _place(self, subscription: Subscription, last_id: str | None, timeout: float) -> Placement | None:
        positions = None
        if last_id is not None:
            assert self.cursors is not None, "channels with history need cursors"
            positions = self.cursors.decode(last_id, subscription.channels)
        asked: dict[Track, int] = {}
        while True:
            with self._lock:
                if subscription.ended is not None:  # this process stops, for instance
                    return None
                placement = self._hub.place(subscription, positions, time.monotonic(), asked)
            if placement is not None:
                return placement
            in_the_way = self._recovery.wait(timeout)
            for channel in subscription.channels:
                if channel in in_the_way:
                    raise copy.copy(in_the_way[channel])

    def _fetch(self) -> dict[str, Exception]:
        """Fetch what the hub needs; return what was in the way, by channel."""
        in_the_way: dict[str, Exception] = {}
        with self._lock:
            wants, wake = self._hub.begin_fetch()
        _ring(wake)
        if not wants:
            return in_the_way
        try:
            pasts = self.broker.fetch([(want.track.channel, want.track.history, want.lowest) for want in wants])
        except BaseException:
            with self._lock:
                self._hub.give_back(wants)
            raise
        begun = time.monotonic()
        for want, past in zip(wants, pasts, strict=True):
            channel = want.track.channel
            if isinstance(past, BrokerUnavailable):
                in_the_way[channel] = past
                with self._lock:
                    self._hub.give_back([want])
                if channel not in self._in_the_way:
                    log.error("%s", past)
                continue
            read = past._replace(events=[(at, _read(channel, payload)) for at, payload in past.events])
            with self._lock:
                outcome = self._hub.apply(want, read, time.monotonic())
                self._after(outcome)
            more = True
            while more:
                _ring(self._tell(channel, outcome))
                # Those who cannot keep up are behind, and are refilled: others wait for their turn to fetch.
                if self._crowded and time.monotonic() < begun + FETCH_PATIENCE:
                    self._give_time()
                with self._lock:
                    outcome, more = self._hub.go_on(want, time.monotonic())
                    self._after(outcome)
            _ring(self._tell(channel, outcome))
        self._in_the_way = in_the_way
        self._look_for_needs()  # a new epoch, for instance, is to be fetched from its beginning
        return in_the_way

    def _refresh(self, channel: str) -> None:
        """Have fetched what may have been missed of ``channel``."""
        with self._lock:
            self._hub.refresh(channel)
        self._look_for_needs()

    def _look_for_needs(self) -> None:
        if self._hub.needs:
            self._recovery.ring()

    def deliver(self, batch: Iterable[tuple[str, Payload]]) -> None:
        """Decode and encode each payload once, and put it into the mailboxes of its channel. For the broker."""
        self._reap()
        events: deque[tuple[str, Event, bytes, Position | None]] = deque()
        for channel, payload in batch:
            try:
                event, extra = decode_message(payload)
                position = None if extra is None or "epoch" not in extra else Position.of(extra)
            except ValueError as error:
                _complain(channel, payload, error)
                continue
            events.append((channel, event, encode(event), position))
        while events:
            self._publish(events)
            if self._crowded:
                self._give_time()
        self._look_for_needs()

    def _publish(self, events: deque[tuple[str, Event, bytes, Position | None]]) -> None:
        """Put ``events`` into the mailboxes of their channels, up to one that needs more than that done."""
        outcome = Outcome()
        now = time.monotonic()
        with self._lock:
            more = True
            while more:
                channel, event, frame, position = events.popleft()
                self._hub.publish(channel, event, frame, position, now, outcome)
                more = bool(events) and not (outcome.crowded or outcome.ended or outcome.behind or self._crowded)
            self._after(outcome)
        _ring(self._tell(channel, outcome))

    def _after(self, outcome: Outcome) -> None:
        """Do what follows from an event, under the lock."""
        for idle in outcome.idle:
            self.broker.unsubscribe(idle)
        self._crowded.update(outcome.crowded)
        self._crowded.difference_update(outcome.ended, outcome.behind)

    def _tell(self, channel: str, outcome: Outcome) -> list[Callable[[], None]]:
        """Return what is to be called; say what has happened to those who did not take their events."""
        for unkept in set(outcome.unkept) - self._unkept:
            self._unkept.add(unkept)
            log.warning(
                "An event without a position came on channel %r, which has a HISTORY here: whoever publishes there "
                "does not have that setting. Clients that lose their connection miss such events.",
                unkept,
            )
        if outcome.behind:
            log.info("%d stream(s) on channel %r are behind; they are refilled.", len(outcome.behind), channel)
        if not outcome.ended:
            return outcome.wake
        overflowed = sum(ended.ended == "overflow" for ended in outcome.ended)
        if overflowed:
            log.warning(
                "%d stream(s) on channel %r are ended: overflow; their clients do not take their events.",
                overflowed,
                channel,
            )
        return outcome.wake + [ended.wake for ended in outcome.ended if ended.wake is not None]

    def take(self, subscription: Subscription, limit: int | None) -> list[tuple[Event, bytes]]:
        """Return what waits for ``subscription``: at most ``limit`` events."""
        return self._take(subscription, subscription.take, limit)

    def take_chunk(self, subscription: Subscription, max_bytes: int) -> tuple[bytes, bool]:
        """Return what waits for ``subscription`` as one chunk, and whether that is all."""
        return self._take(subscription, subscription.take_chunk, max_bytes)

    def _take(self, subscription: Subscription, take: Callable[..., T], *args: Any) -> T:
        open_before = subscription.ended is None
        with self._lock:
            taken = take(*args)
            if self._crowded:
                self._calm_down((subscription,))
        if subscription.audience.tracks:
            self._look_for_needs()
            # What it has missed is gone, and its view is to be asked anew.
            if open_before and subscription.ended is not None and subscription.wake is not None:
                subscription.wake()
        return taken

    def _calm_down(self, subscriptions: Iterable[Subscription]) -> None:
        before = len(self._crowded)
        for subscription in subscriptions:
            if subscription in self._crowded and not subscription.crowded:
                self._crowded.discard(subscription)
        if len(self._crowded) < before:
            self._calm.notify_all()

    def claim(self, subscription: Subscription, wake: Callable[[], None]) -> None:
        """Have ``wake`` called, by any thread, when there is something to take or the end has come."""
        with self._lock:
            subscription.wake = wake
            subscription.audience.look_again()

    def take_alike(self, subscriptions: Sequence[Subscription], max_bytes: int) -> tuple[list[bytes | None], bool]:
        """Take for several of one audience what ``Audience.advance()`` gives."""
        with self._lock:
            taken = subscriptions[0].audience.advance(subscriptions, max_bytes)
            if self._crowded:
                self._calm_down(subscriptions)
            return taken

    def take_in_step(self, cursor: Cursor, listeners: Sequence[Listener], max_bytes: int) -> tuple[bytes, bool] | None:
        """Take for all at ``cursor``, who are ``listeners``; ``None`` where one of them has gone another way."""
        with self._lock:
            if cursor.deserted:
                return None
            taken = listeners[0].audience.step(cursor, max_bytes)
            if self._crowded:
                self._calm_down([listener.subscription for listener in listeners])
            return taken

    def fall_in(self, cursor: Cursor, listeners: Iterable[Listener]) -> list[bool]:
        """Have ``listeners`` go on in step with those at ``cursor``; return which of them do."""
        with self._lock:
            return [listener.subscription.fall_in(cursor) for listener in listeners]

    def fall_out(self, listener: Listener) -> None:
        """Have ``listener`` go on alone."""
        with self._lock:
            listener.subscription.fall_out()

    def muster(self, cursor: Cursor, listeners: Iterable[Listener]) -> list[bool]:
        """Return which of ``listeners`` are at ``cursor`` still."""
        with self._lock:
            cursor.deserted = False
            return [listener.subscription.is_at(cursor) for listener in listeners]

    def share(self, subscription: Subscription, ring: Callable[[], None]) -> None:
        """Have ``ring`` called, by any thread, at every event of the audience of ``subscription``."""
        with self._lock:
            subscription.shared = True
            subscription.audience.waiting.pop(subscription, None)
            subscription.audience.bells[ring] = None

    def unshare(self, audience: Audience, ring: Callable[[], None]) -> None:
        """Call ``ring`` no more."""
        with self._lock:
            audience.bells.pop(ring, None)

    def mark(self, subscription: Subscription, *, slow: bool) -> None:
        """Say of a ``prompt`` subscription whether its client takes what it is sent."""
        with self._lock:
            if slow:
                subscription.be_slow()
            else:
                subscription.slow = False
            subscription.audience.look_again()
            if slow and subscription in self._crowded:
                self._crowded.discard(subscription)
                self._calm.notify_all()

    def end(self, subscription: Subscription, reason: str) -> None:
        """Unregister ``subscription``; whoever waits for it sees its end."""
        with self._lock:
            self._end(subscription, reason)
        if subscription.wake is not None:
            subscription.wake()

    def _end(self, subscription: Subscription, reason: str) -> None:
        subscription.end(reason, clear=reason in GONE)
        for channel in self._hub.remove(subscription):
            self.broker.unsubscribe(channel)
        if subscription in self._crowded:
            self._crowded.discard(subscription)
            self._calm.notify_all()

    def abandon(self, subscription: Subscription) -> None:
        """Have ``subscription`` ended soon. Takes no lock, for the collector runs anywhere, even under ours."""
        self._abandoned.append(subscription)
        self.broker.nudge()

    def _reap(self) -> None:
        with contextlib.suppress(IndexError):  # when another thread was quicker, too
            while self._abandoned:
                self.end(self._abandoned.popleft(), "abandoned")

    def close(self) -> None:
        """End every stream and give back the broker's connections."""
        with self._lock:
            subscriptions = self._hub.subscriptions
        for subscription in subscriptions:
            self.end(subscription, "shutdown")
        self._recovery.close()
        self.broker.close()

    def stats(self) -> dict[str, int]:
        """Return how many channels and subscriptions are registered."""
        self._reap()
        with self._lock:
            return {"channels": len(self._hub.channels), "subscriptions": len(self._hub.subscriptions)}

    def _give_time(self) -> None:
        """Let the crowded clients take what waits for them; those that do not are slow until they have caught up."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            patience = PATIENCE
        else:
            patience = 0.0  # this thread runs a loop: waiting for its own clients would be in vain
        with self._lock:
            self._wait_for(self._crowded, patience)
            self._give_up({subscription for subscription in self._crowded if not subscription.prompt})
            # The others wait for this process alone, and say so when they wait for their client.
            self._wait_for(self._crowded, patience * 10)
            self._give_up(set(self._crowded))

    def _wait_for(self, crowded: set[Subscription], patience: float) -> None:
        left = 0
        while crowded and len(crowded) != left:
            left = len(crowded)
            self._calm.wait(patience)

    def _give_up(self, subscriptions: set[Subscription]) -> None:
        for subscription in subscriptions:
            subscription.be_slow()
        self._crowded -= subscriptions


class Listener:
    """One subscription as its stream sees it. Thread-safe."""

    __slots__ = ("__weakref__", "_runtime", "placement", "subscription")

    def __init__(self, runtime: Runtime, subscription: Subscription) -> None:
        self._runtime = runtime
        self.subscription = subscription
        #: Where it begins, if any of its channels has history.
        self.placement: Placement | None = None

    @property
    def ended(self) -> str | None:
        """Why nothing more comes once what waits is taken; ``None`` while open."""
        return self.subscription.ended

    def wake_by(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called, by any thread, when there is something to take or the end has come."""
        self._runtime.claim(self.subscription, wake)

    def take(self, limit: int | None = None) -> list[tuple[Event, bytes]]:
        """Return the events that wait, with their encoded form, oldest first: at most ``limit`` of them."""
        return self._runtime.take(self.subscription, limit)

    @property
    def events(self) -> int:
        """How many events were taken."""
        return self.subscription.events

    def take_chunk(self, max_bytes: int) -> tuple[bytes, bool]:
        """Return the events that wait in their encoded form, up to the one that makes it ``max_bytes``: one chunk.

        It is empty where nothing waits. And whether that is all, so that it is rung for when there is more.
        """
        return self._runtime.take_chunk(self.subscription, max_bytes)

    @property
    def is_behind(self) -> bool:
        """Whether it is still to get more than waits for it now. Asked without the lock."""
        return self.subscription.is_behind

    @property
    def bytes_alike(self) -> int:
        """How many bytes were taken together with others."""
        return self.subscription.bytes_alike

    @property
    def audience(self) -> Audience:
        """What it has in common with others: they get the same events."""
        return self.subscription.audience

    def share(self, ring: Callable[[], None]) -> None:
        """Have ``ring`` called, by any thread, at every event: once for all of the audience that name the same."""
        self._runtime.share(self.subscription, ring)

    def unshare(self, ring: Callable[[], None]) -> None:
        """Have ``ring`` called no more, neither for this one nor for others."""
        self._runtime.unshare(self.audience, ring)

    def take_alike(self, listeners: Iterable[Listener], max_bytes: int) -> tuple[list[bytes | None], bool]:
        """Take for ``listeners``, all of this one's audience, what waits, up to the event that makes it ``max_bytes``.

        Returns a chunk for each, empty where nothing waits, ``None`` where it has to ``take()`` itself; and whether
        more waits for one of them.
        """
        return self._runtime.take_alike([listener.subscription for listener in listeners], max_bytes)

    def rank(self) -> Rank:
        """Return a rank of its audience, which begins where this one stands, and which it may join."""
        return Rank(self._runtime, self.audience.common_cursor(self.subscription))

    def mark(self, *, slow: bool) -> None:
        """Say whether the client takes what it is sent, as the stream knows from now on."""
        self.subscription.prompt = True
        self._runtime.mark(self.subscription, slow=slow)

    def close(self, reason: str = "client") -> None:
        """Give the subscription back. May be called again, and by any thread."""
        self._runtime.end(self.subscription, reason)

    def leave(self) -> None:
        """Have the subscription given back soon. Takes no lock, so the collector may call it anywhere."""
        if self.subscription.ended is None:
            self.subscription.ended = "abandoned"
            self._runtime.abandon(self.subscription)
            if self.subscription.wake is not None:
                self.subscription.wake()

    # The response was dropped unclosed: the client left while the view ran, or a middleware answered instead.
    __del__ = leave


class Rank:
    """Listeners of one audience that stand at one place and go on in step: what they get is taken once for all."""

    __slots__ = ("_cursor", "_listeners", "_runtime")

    def __init__(self, runtime: Runtime, cursor: Cursor) -> None:
        self._runtime = runtime
        self._cursor = cursor
        self._listeners: list[Listener] = []

    def join(self, listeners: Sequence[Listener]) -> list[bool]:
        """Add those of ``listeners`` that stand where the rank does; return which these are."""
        joined = self._runtime.fall_in(self._cursor, listeners)
        self._listeners += compress(listeners, joined)
        return joined

    def leave(self, listener: Listener) -> None:
        """Have ``listener`` go on alone."""
        self._runtime.fall_out(listener)
        self._listeners.remove(listener)

    def take(self, max_bytes: int) -> tuple[bytes, bool] | None:
        """Take for all of them what waits, up to the event that makes it ``max_bytes``.

        Returns a chunk, empty where nothing waits, and whether more waits. ``None`` where one of them does not go in
        step any more: then ``muster()`` comes first.
        """
        return self._runtime.take_in_step(self._cursor, self._listeners, max_bytes)

    def muster(self) -> list[bool]:
        """Return which of the listeners, in the order in which they have joined, are still in step; drop the others."""
        here = self._runtime.muster(self._cursor, self._listeners)
        self._listeners = [*compress(self._listeners, here)]
        return here


def _read(channel: str, payload: Payload) -> tuple[Event, bytes] | None:
    """Return the event of a payload that was kept, and its frame; ``None`` where it is none."""
    try:
        event = decode_payload(payload)
    except ValueError as error:
        _complain(channel, payload, error)
        return None
    return event, encode(event)


def _complain(channel: str, payload: Payload, error: ValueError) -> None:
    log.warning("A payload on channel %r is not an event and was skipped (%s): %.200r", channel, error, payload)


def _ring(wake: Iterable[Callable[[], None]]) -> None:
    for ring in dict.fromkeys(wake):
        ring()


_runtimes: dict[Hashable, Runtime] = {}
_runtimes_lock = threading.Lock()


def get(key: Hashable, make_broker: Callable[[], Broker], cursors: Cursors | None = None) -> Runtime:
    """Return the runtime of the configuration ``key``; the first call makes it, with the broker of ``make_broker``."""
    with _runtimes_lock:
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = Runtime(make_broker(), cursors)
        return runtime


def reset() -> None:
    """End every stream of this process and give everything back. What is asked for next starts afresh."""
    with _runtimes_lock:
        runtimes = list(_runtimes.values())
        _runtimes.clear()
    for runtime in runtimes:
        runtime.close()


def _forget_after_fork() -> None:
    # The parent's threads, locks and connections do not work here. They are not closed: they are the parent's.
    global _runtimes, _runtimes_lock
    _runtimes = {}
    _runtimes_lock = threading.Lock()


def _reset_on_change(*, setting: str, **kwargs: Any) -> None:
    if setting in ("DJANGO_SSE", "SECRET_KEY", "SECRET_KEY_FALLBACKS") or setting.startswith("REDIS_SSEQUEUE_"):
        reset()


os.register_at_fork(after_in_child=_forget_after_fork)
setting_changed.connect(_reset_on_change, dispatch_uid="django_sse.runtime")
