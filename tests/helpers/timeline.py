"""A broker that keeps a history, in lists: what was published, what came before what, and what is still there."""

import itertools
from copy import copy

from django_sse.event import Event
from django_sse.history import Past, Position
from django_sse.wire import encode


class Moment:
    """An event that was published; or where an epoch begins, before all of its events."""

    def __init__(self, channel, position, before=None, text=None):
        self.channel = channel
        self.position = position
        self.before = before
        #: What it says; `None` where it is no event, or none that can be read.
        self.text = text
        #: Whether there was something after it.
        self.passed = False
        #: Whether more than what is kept has come after it, or it is too old.
        self.dropped = False
        #: Whether the broker has forgotten that it ever was.
        self.undone = False

    def __repr__(self):
        return f"<{self.channel} {self.position.epoch}:{self.position.offset} {self.text}>"

    @property
    def seen(self):
        """The last event that could be seen by one who is here."""
        moment = self
        while moment.text is None and moment.before is not None:
            moment = moment.before
        return moment

    def justifies(self, reason):
        """Whether one who is here may be told that what came after it is gone, for that `reason`."""
        if reason == "epoch":
            return self.undone
        return reason == "expired" and self.dropped and (self.passed or self.undone)


class Timeline:
    """One channel."""

    def __init__(self, history, epochs, checks):
        self.history = history
        self._epochs = epochs
        self._checks = checks
        #: All that ever was, by position.
        self.moments = {}
        self.top = self.begin()
        #: What is there, oldest first. Of the first, after all have expired, no more than that it was.
        self.kept = []
        self.anchor = None
        #: What was there when all was lost, and when it would have been too old.
        self.lost = []
        self._last = 0.0
        #: Whether those who listen cannot know of the present epoch, for nothing has come.
        self.is_secret = False

    def begin(self):
        return self._add(Moment(self.history.name, Position(next(self._epochs), 0, 0)))

    def _add(self, moment):
        self.moments[moment.position] = moment
        return moment

    def publish(self, text, now):
        self.expire(now)
        before = self.top
        before.passed = True
        position = Position(before.position.epoch, before.position.offset + 1, next(self._checks))
        self.top = self._add(Moment(self.history.name, position, before, text))
        self._last = now
        if not self.kept and before.before is not None:
            self.kept.append(before)
            self.anchor = before
        self.kept.append(self.top)
        # One more than can be missed: where the one begins who has missed all others.
        self._drop(len(self.kept) - self.history.size - 1)
        if len(self.kept) > self.history.size and self.kept[0].before is not None:
            self.kept[0].before.dropped = True
        if text is not None:
            self.is_secret = False
        return self.top

    def expire(self, now):
        if now - self._last >= self.history.ttl:
            self._drop(len(self.kept))
        # Of what was lost, a process that does not know it yet may still say that it is too old.
        for until, moments in self.lost:
            if now >= until:
                self._mark_dropped(moments)

    def _drop(self, count):
        self._mark_dropped(self.kept[: max(0, count)])
        del self.kept[: max(0, count)]

    def _mark_dropped(self, moments):
        for moment in moments:
            moment.before.dropped = True
            moment.dropped = moment.dropped or moment.passed

    def past(self, lowest, now, room=None):
        """What is kept from the offset `lowest` on; the latest `room` events of it."""
        self.expire(now)
        top = self.top.position
        found = [moment for moment in self.kept if moment.position.offset >= lowest]
        found = found if room is None else found[len(found) - min(room, len(found)) :]
        if not found:
            return Past(top, top, (), complete=not self.kept)
        complete = found[0] is self.kept[0]
        # The first is where the others begin.
        base = found[0] if found[0].before.before or found[0] is self.anchor else found[0].before
        events = [(moment.position, moment.text and item(moment.text)) for moment in found if moment is not base]
        return Past(base.position, top, events, complete)

    def flush(self):
        """Lose all."""
        for moment in self.moments.values():
            moment.undone = True
        self.lost.append((self._last + self.history.ttl, self.kept))
        self.top = self.begin()
        self.kept = []
        self.anchor = None
        self.is_secret = True

    def save(self):
        saved = copy(self)
        saved.kept = list(self.kept)
        return saved

    def restore(self, saved):
        """Be as it was when it was `saved`."""
        known, at = set(), saved.top
        while at is not None:
            known.add(at)
            at = at.before
        for moment in self.moments.values():
            if moment not in known:
                moment.undone = moment.dropped = True
        self.top, self.kept, self.anchor, self._last = saved.top, list(saved.kept), saved.anchor, saved._last
        self.is_secret = False


def timelines(histories):
    """A timeline for each channel, by channel."""
    epochs, checks = itertools.count(1), itertools.count(1)
    return {channel: Timeline(history, epochs, checks) for channel, history in histories.items()}


def item(text, id=None):
    """An event that says `text`, and its frame."""
    event = Event("", text, id)
    return event, encode(event)
