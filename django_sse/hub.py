"""Who listens to what in this process. Pure: no lock, no clock, no socket, no thread.

Subscriptions to the same channels are one audience. Of a channel with history this process keeps the recent events, in
a track.

The hub never waits and never calls out: every method says in its return value, or in ``needs``, what its owner
(``runtime``) has to do next. It is not thread-safe; one lock, held by the owner, guards the hub and all its
subscriptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .audience import Audience, Outcome, Subscription
from .cursor import Cursors
from .event import Event
from .history import TOP, History, Past, Position
from .track import NotFetched, Step, Track, Want, size_of, with_id

__all__ = ["Hub", "Placement"]

#: Bytes that the recent events of all channels may take in one process, roughly.
RECENT_BYTES = 64 * 1024 * 1024


class Placement(NamedTuple):
    """Where a subscription begins."""

    #: Whether its client came without a position.
    is_first: bool
    #: The id that its client is to be sent; ``None`` where the one that it has will do.
    cursor: str | None
    #: The channels of which it has missed more than it can be sent, as the view calls them, by reason.
    resets: dict[str, list[str]]


class Hub:
    """The registry: channels to audiences. ``cursors`` are for channels with history, and needed for nothing else."""

    def __init__(self, cursors: Cursors | None = None) -> None:
        self._cursors = cursors
        self._channels: dict[str, dict[Audience, None]] = {}
        self._audiences: dict[tuple[tuple[str, ...], int, int], Audience] = {}
        self._tracks: dict[str, Track] = {}
        #: Channels of which something is to be fetched, and the lowest offset that is wanted.
        self.needs: dict[str, int] = {}
        # Bytes of recent events that have come since their sum was last looked at.
        self._added = 0

    def subscribe(
        self,
        channels: Iterable[str],
        *,
        max_events: int,
        max_bytes: int,
        histories: Mapping[str, History] = MappingProxyType({}),
    ) -> tuple[Subscription, Sequence[str]]:
        """Register a subscription; return it, and the channels that have their first listener with it.

        ``histories``: what is kept of those channels that have history. With any, ``place()`` is to follow.
        """
        names = tuple(dict.fromkeys(channels))
        key = names, max_events, max_bytes
        audience = self._audiences.get(key)
        first = []
        if audience is None:
            for channel in names:
                if channel not in self._channels:
                    self._channels[channel] = {}
                    first.append(channel)
                    if channel in histories:
                        self._tracks[channel] = self._track(channel, histories[channel])
            tracks = tuple(self._tracks[channel] for channel in names if channel in self._tracks)
            audience = self._audiences[key] = Audience(*key, tracks, self.id_of)
            for channel in names:
                self._channels[channel][audience] = None
        subscription = Subscription(audience)
        audience.subscriptions[subscription] = audience.waiting[subscription] = None
        return subscription, first

    def remove(self, subscription: Subscription) -> list[str]:
        """Forget ``subscription``, known or not; return the channels that lost their last listener with it."""
        subscription.end("removed")
        audience = subscription.audience
        audience.waiting.pop(subscription, None)
        if subscription not in audience.subscriptions:
            return []
        del audience.subscriptions[subscription]
        for track in audience.tracks:
            track.forget(subscription)
        idle = []
        if not audience.subscriptions:
            del self._audiences[audience.channels, audience.max_events, audience.max_bytes]
            for channel in audience.channels:
                audiences = self._channels[channel]
                del audiences[audience]
                if not audiences:
                    del self._channels[channel]
                    self._tracks.pop(channel, None)
                    self.needs.pop(channel, None)
                    idle.append(channel)
        return idle

    def _track(self, channel: str, history: History) -> Track:
        return Track(channel, history, self.needs, lambda position: self.id_of({channel: position}))

    def publish(
        self,
        channel: str,
        event: Event,
        frame: bytes,
        position: Position | None = None,
        now: float = 0.0,
        outcome: Outcome | None = None,
    ) -> Outcome:
        """Let ``event``, encoded as ``frame``, wait for every listener of ``channel``.

        ``position``: of an event that is in its channel's history. ``now``: seconds of a clock that does not go back.
        Returns what follows from it, and from those before if their outcome is handed in.
        """
        outcome = Outcome() if outcome is None else outcome
        track = self._tracks.get(channel)
        if track is None or position is None:
            # Whoever publishes without history on a channel that has it is heard, but his events cannot be had again.
            if track is not None:
                outcome.unkept.append(channel)
            self._put(channel, event, frame, outcome)
        else:
            self._carry_out(track, track.came(position, event, frame, now), outcome)
        return outcome

    def _put(self, channel: str, event: Event, frame: bytes, outcome: Outcome) -> None:
        gone: list[Subscription] = []
        for audience in self._channels.get(channel, ()):
            if audience.tracks and event.id is not None:
                # Its clients would come back with that id, and the positions of their channels would be lost.
                gone += audience.put(*with_id(event, frame, None), outcome)
            else:
                gone += audience.put(event, frame, outcome)
        self._let_go(gone, outcome)

    def _let_go(self, gone: list[Subscription], outcome: Outcome) -> None:
        for subscription in gone:
            # Others were abandoned by their stream, or never claimed: nobody is there to be told.
            if subscription.ended in ("overflow", "reset") and subscription.wake is not None:
                outcome.ended.append(subscription)
            outcome.idle += self.remove(subscription)

    @property
    def channels(self) -> list[str]:
        """The channels that have listeners."""
        return list(self._channels)

    @property
    def subscriptions(self) -> set[Subscription]:
        """The registered subscriptions."""
        return {subscription for audience in self._audiences.values() for subscription in audience.subscriptions}

    # -- history ----------------------------------------------------------------------------------------------------

    def id_of(self, positions: Mapping[str, Position]) -> str:
        """Return the id of ``positions``."""
        assert self._cursors is not None, "channels with history need cursors"
        return self._cursors.encode(positions)

    def place(
        self,
        subscription: Subscription,
        positions: Mapping[str, Position] | None,
        now: float,
        asked: dict[Track, int],
    ) -> Placement | None:
        """Let ``subscription`` begin behind ``positions``: of a client that has none (``None``), at the end.

        Returns ``None`` where something has to be fetched first (``needs``), and notes it in ``asked``: to be handed in
        again when that is done. To be called once the channels are being received.
        """
        audience = subscription.audience
        for track in audience.tracks:
            track.expire(now)
        resets: Mapping[str, Sequence[Track]] = {}
        needed = {track: TOP for track in audience.tracks if track.top is None}
        if positions is not None:
            try:
                _, resets = audience.missed(positions, asked, 0)
            except NotFetched as more:
                needed.update(more.needed)
        if needed:
            for track, lowest in needed.items():
                track.need(lowest)
            asked.update(needed)
            return None
        tops = audience.positions()
        if positions is None:
            audience.place_at_end(subscription)
            return Placement(is_first=True, cursor=self.id_of(tops), resets={})
        # What is gone is for the view to tell.
        begin = {channel: positions[channel] for channel in tops if channel in positions}
        begin.update((track.channel, tops[track.channel]) for tracks in resets.values() for track in tracks)
        audience.place_behind(subscription, begin)
        return Placement(
            is_first=False,
            cursor=self.id_of(begin) if resets else None,
            resets={reason: [track.history.name for track in tracks] for reason, tracks in resets.items()},
        )

    def refresh(self, channel: str) -> None:
        """Have fetched what has come since the last event: some may not have been delivered."""
        track = self._tracks.get(channel)
        if track is not None:
            track.refresh()

    def begin_fetch(self) -> tuple[list[Want], list[Callable[[], None]]]:
        """Return what is to be fetched now. ``apply()`` and ``go_on()``, or ``give_back()``, follow for each.

        And what is to be called, for those who need nothing any more: it has been fetched for others.
        """
        needs = dict(self.needs)
        self.needs.clear()
        wants = []
        wake: list[Callable[[], None]] = []
        for channel, lowest in needs.items():
            track = self._tracks.get(channel)
            if track is not None:
                want = track.want(lowest)
                if track.answers(want):
                    wake += [fed.wake for fed in track.feed() if fed.wake is not None]
                else:
                    wants.append(want)
        return wants, wake

    def give_back(self, wants: Iterable[Want]) -> None:
        """Have ``wants`` fetched another time."""
        for want in wants:
            if self._is_followed(want.track):
                want.track.give_back(want)

    def apply(self, want: Want, past: Past, now: float) -> Outcome:
        """Take over what was fetched: its events are ``(position, (event, frame) or None)``."""
        outcome = Outcome()
        if self._is_followed(want.track):
            self._carry_out(want.track, want.track.fetched(want, past, now), outcome)
        return outcome

    def go_on(self, want: Want, now: float) -> tuple[Outcome, bool]:
        """Deliver some of what was fetched; return what follows, and whether there is more."""
        outcome = Outcome()
        track = want.track
        if not self._is_followed(track):
            return outcome, False
        self._carry_out(track, track.go_on(now), outcome)
        if track.is_behind:
            return outcome, True
        for fed in track.feed():
            # Now, for what was fetched may have to make room for others soon.
            fed.audience.refill(fed)
            if fed.wake is not None:
                outcome.wake.append(fed.wake)
        return outcome, False

    def _is_followed(self, track: Track) -> bool:
        """Whether anybody listens still; somebody who has come after all had left begins anew."""
        return self._tracks.get(track.channel) is track

    def _carry_out(self, track: Track, steps: Iterable[Step], outcome: Outcome) -> None:
        for step in steps:
            gone: list[Subscription] = []
            for audience in self._channels.get(track.channel, ()):  # none where all have gone on the way
                if step.reset is not None:
                    gone += audience.reset(track, step.reset, step.before, outcome)
                elif step.position is not None and step.frame is not None:
                    gone += audience.put_kept(track, step.position, step.frame, step.before, outcome)
            self._let_go(gone, outcome)
            if step.frame is not None:
                self._added += size_of(step.frame)
        if self._added > RECENT_BYTES // 8:
            self._added = 0
            while sum(track.size for track in self._tracks.values()) > RECENT_BYTES:
                for each in self._tracks.values():
                    each.shrink()
