"""Listeners of a hub, and what they are given, for tests of what is pure: no stream, no lock, no socket."""

import json
from functools import partial

from django_sse.cursor import Cursors
from django_sse.event import Event
from django_sse.history import History
from django_sse.hub import Hub
from django_sse.wire import encode
from tests.helpers.timeline import item, timelines

BOUNDS = {"max_events": 10, "max_bytes": 1000}


def subscribe(hub, *channels, max_events=10, max_bytes=1000, claimed=True):
    """A subscription that `hub` knows; `claimed` by a stream, which can be woken."""
    subscription, _ = hub.subscribe(channels, max_events=max_events, max_bytes=max_bytes)
    if claimed:
        claim(subscription)
    return subscription


def claim(subscription):
    """Have it woken by something that tells it from others."""
    subscription.wake = lambda: subscription


def share(subscription, ring):
    """Have `ring` called for it and for others."""
    subscription.shared = True
    subscription.audience.waiting.pop(subscription, None)
    subscription.audience.bells[ring] = None


def woken(outcome):
    return [wake() for wake in outcome.wake]


def publish(hub, channel, *texts):
    """Publish each of `texts` as an event whose frame is as many bytes as the text; return the last outcome."""
    for text in texts:
        outcome = hub.publish(channel, Event("", text), text.encode())
    return outcome


def texts(taken):
    for event, frame in taken:
        assert frame == event.data.encode()
    return [event.data for event, _ in taken]


class Process:
    """A hub that follows channels with history, and the broker, in lists, that it hears and asks.

    `sizes`: how many events are kept of each of these channels. Their users call channel "a" the channel "A".
    """

    CURSORS = Cursors([b"key"])

    def __init__(self, ttl=60, **sizes):
        self.hub = Hub(self.CURSORS)
        self.histories = {channel: History(channel.upper(), size, ttl) for channel, size in sizes.items()}
        self.timelines = timelines(self.histories)
        self.counts = dict.fromkeys(sizes, 0)
        self.now = 0.0
        #: What was fetched: channels, and the offset from which on.
        self.fetched = []

    def publish(self, channel, count=1, *, missed=False, readable=True):
        """Let the next `count` events of `channel` come, which say "a1", "a2"; return what follows from the last."""
        outcome = None
        for _ in range(count):
            self.counts[channel] += 1
            text = f"{channel}{self.counts[channel]}" if readable else None
            moment = self.timelines[channel].publish(text, self.now)
            if readable and not missed:
                outcome = self.hub.publish(channel, *item(text), moment.position, self.now)
        return outcome

    def publish_unkept(self, channel, text, id=None):
        """Let an event come that is in no history."""
        event = Event("", text, id)
        return self.hub.publish(channel, event, encode(event), None, self.now)

    def flush(self):
        for timeline in self.timelines.values():
            timeline.flush()
        self.counts = dict.fromkeys(self.counts, 0)

    def at(self, **offsets):
        """The positions behind the events of these numbers, as things are."""
        return {
            channel: next(
                position
                for position in self.timelines[channel].moments
                if position[:2] == (self.timelines[channel].top.position.epoch, offset)
            )
            for channel, offset in offsets.items()
        }

    def offsets(self, id):
        """What an id says: how many events were seen of each channel."""
        return {channel: position.offset for channel, position in self.CURSORS.decode(id, self.histories).items()}

    def subscribe(self, channels, max_events=4, max_bytes=10_000, claimed=True, ends_on_reset=False):
        """A subscription that has still to be placed."""
        subscription, _ = self.hub.subscribe(
            channels, max_events=max_events, max_bytes=max_bytes, histories=self.histories
        )
        subscription.ends_on_reset = ends_on_reset
        if claimed:
            claim(subscription)
        return subscription

    def place(self, subscription, positions=None):
        """Place it, as soon as all is fetched that is to be; return where."""
        place = partial(self.hub.place, subscription, positions, asked={})
        while (placement := place(now=self.now)) is None:
            assert self.fetch()
        return placement

    def join(self, channels, positions=None, **options):
        """A subscription that is placed."""
        subscription = self.subscribe(channels, **options)
        self.place(subscription, positions)
        return subscription

    def begin(self):
        """Begin to fetch what is needed: those whose fetch is `end()`ed."""
        wants, wake = self.hub.begin_fetch()
        for each in wake:
            each()
        self.fetched += [(want.track.channel, want.lowest) for want in wants]
        return [(want, self.timelines[want.track.channel].past(want.lowest, self.now)) for want in wants]

    def end(self, looks):
        """Hear what was found; return whom to wake."""
        woken = []
        for want, past in looks:
            woken += self.hub.apply(want, past, self.now).wake
            more = True
            while more:
                outcome, more = self.hub.go_on(want, self.now)
                woken += outcome.wake
        return [wake() for wake in woken]

    def fetch(self):
        """Fetch all that is needed; return what was."""
        before = len(self.fetched)
        self.end(self.begin())
        return self.fetched[before:]

    def seen(self, taken):
        """What was taken: texts of events, and ("reason", channels) of resets."""
        said = []
        for event, frame in taken:
            assert frame == encode(event)
            if event.name == "stream-reset":
                told = json.loads(event.data)
                said.append((told["reason"], *told["channels"]))
            else:
                said.append(event.data)
        return said

    def all_of(self, subscription):
        """All that it gets without another event, page by page, as `seen()`."""
        said = []
        while taken := subscription.take() or self.fetch():
            if isinstance(taken[0][0], Event):
                said += self.seen(taken)
        return said
