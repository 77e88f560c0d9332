"""The hub: who gets an event, in which order, what may wait, and what its owner is told to do next."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from django_sse.event import Event
from django_sse.hub import Hub, Outcome, Subscription


def subscribe(hub, *channels, max_events=10, max_bytes=1000, claimed=True):
    """A subscription that `hub` knows; `claimed` by a stream, which can be woken."""
    subscription = Subscription(channels, max_events=max_events, max_bytes=max_bytes)
    if claimed:
        subscription.wake = lambda: None
    hub.add(subscription)
    return subscription


def publish(hub, channel, *texts):
    """Publish each of `texts` as an event whose frame is as many bytes as the text; return the last outcome."""
    for text in texts:
        outcome = hub.publish(channel, Event("", text), text.encode())
    return outcome


def texts(taken):
    for event, frame in taken:
        assert frame == event.data.encode()
    return [event.data for event, _ in taken]


# --- who gets what ---


def test_every_listener_of_a_channel_gets_its_events_in_the_order_of_publishing():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    publish(hub, "a", "1", "2", "3")
    assert texts(one.take()) == texts(two.take()) == ["1", "2", "3"]


def test_every_listener_gets_the_same_event_and_the_same_bytes():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    event, frame = Event("", "1"), b"frame"
    hub.publish("a", event, frame)
    [(event_one, frame_one)], [(event_two, frame_two)] = one.take(), two.take()
    assert event_one is event_two is event
    assert frame_one is frame_two is frame


def test_events_of_several_channels_wait_in_the_order_of_publishing():
    hub = Hub()
    both, other = subscribe(hub, "a", "b"), subscribe(hub, "b")
    publish(hub, "a", "1")
    publish(hub, "b", "2")
    publish(hub, "a", "3")
    assert texts(both.take()) == ["1", "2", "3"]
    assert texts(other.take()) == ["2"]


def test_a_listener_gets_nothing_from_before_it_came_nor_from_after_it_left():
    hub = Hub()
    publish(hub, "a", "before")
    subscription = subscribe(hub, "a")
    publish(hub, "a", "1")
    hub.remove(subscription)
    publish(hub, "a", "after")
    assert texts(subscription.take()) == ["1"]


def test_a_channel_named_twice_is_listened_to_once():
    hub = Hub()
    subscription = Subscription(["a", "b", "a"], max_events=10, max_bytes=1000)
    assert subscription.channels == ("a", "b")
    assert hub.add(subscription) == ["a", "b"]
    publish(hub, "a", "1")
    assert texts(subscription.take()) == ["1"]
    assert hub.remove(subscription) == ["a", "b"]


def test_an_event_that_nobody_listens_to_has_no_outcome():
    assert publish(Hub(), "a", "1") == Outcome()


# --- first and last listener ---


def test_only_the_first_listener_of_a_channel_is_reported():
    hub = Hub()
    assert hub.add(Subscription(["a"], max_events=1, max_bytes=1)) == ["a"]
    assert hub.add(Subscription(["a", "b"], max_events=1, max_bytes=1)) == ["b"]
    assert hub.add(Subscription(["b", "a"], max_events=1, max_bytes=1)) == []


def test_only_the_last_listener_of_a_channel_is_reported():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a", "b")
    assert hub.remove(two) == ["b"]
    assert hub.remove(one) == ["a"]
    assert hub.channels == []


def test_a_channel_that_was_left_has_a_first_listener_again():
    hub = Hub()
    hub.remove(subscribe(hub, "a"))
    assert hub.add(Subscription(["a"], max_events=1, max_bytes=1)) == ["a"]


def test_a_subscription_may_be_removed_again_or_without_being_known():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    assert hub.remove(Subscription(["a", "b"], max_events=1, max_bytes=1)) == []
    assert hub.remove(one) == hub.remove(one) == []
    assert hub.remove(two) == ["a"]
    assert hub.remove(two) == []


def test_the_hub_knows_its_channels_and_subscriptions():
    hub = Hub()
    assert (hub.channels, hub.subscriptions) == ([], set())
    one, two = subscribe(hub, "a", "b"), subscribe(hub, "b")
    assert hub.channels == ["a", "b"]
    assert hub.subscriptions == {one, two}
    hub.remove(one)
    assert hub.channels == ["b"]
    assert hub.subscriptions == {two}


# --- what waits ---


def test_take_gives_what_waits_once():
    hub = Hub()
    subscription = subscribe(hub, "a")
    assert subscription.take() == subscription.take(1) == []
    publish(hub, "a", "1", "2")
    assert len(subscription) == 2
    assert texts(subscription.take()) == ["1", "2"]
    assert subscription.take() == []
    assert len(subscription) == 0


def test_take_gives_at_most_the_limit_and_leaves_the_rest():
    hub = Hub()
    subscription = subscribe(hub, "a")
    publish(hub, "a", "1", "2", "3", "4")
    assert texts(subscription.take(1)) == ["1"]
    publish(hub, "a", "5")
    assert texts(subscription.take(2)) == ["2", "3"]
    assert texts(subscription.take(2)) == ["4", "5"]
    assert subscription.take(2) == []


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [
        (1, ["12"]),
        (2, ["12"]),
        (3, ["12", "34"]),
        (4, ["12", "34"]),
        (5, ["12", "34", "56"]),
        (6, ["12", "34", "56"]),
        (60, ["12", "34", "56"]),
        (None, ["12", "34", "56"]),
    ],
)
def test_take_gives_no_more_after_the_event_that_makes_it_the_bytes_asked_for(max_bytes, expected):
    hub = Hub()
    subscription = subscribe(hub, "a")
    publish(hub, "a", "12", "34", "56")
    assert texts(subscription.take(max_bytes=max_bytes)) == expected
    assert texts(subscription.take()) == ["12", "34", "56"][len(expected) :]


def test_take_keeps_to_both_bounds():
    hub = Hub()
    subscription = subscribe(hub, "a")
    publish(hub, "a", "12", "34", "56", "78", "90")
    assert texts(subscription.take(1, 100)) == ["12"]
    assert texts(subscription.take(100, 3)) == ["34", "56"]
    assert texts(subscription.take(100, 100)) == ["78", "90"]


def test_an_event_above_the_bytes_asked_for_is_given_alone():
    hub = Hub()
    subscription = subscribe(hub, "a")
    publish(hub, "a", "123456", "7")
    assert texts(subscription.take(max_bytes=2)) == ["123456"]
    assert texts(subscription.take(max_bytes=2)) == ["7"]


@pytest.mark.parametrize("limits", [(None, None), (1, None), (2, None), (None, 1), (None, 3), (2, 1)])
def test_what_was_taken_makes_room_for_as_many_bytes(limits):
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=4)
    for _ in range(5):
        publish(hub, "a", "12", "34")
        assert subscription.ended is None
        taken = subscription.take(*limits) + subscription.take(*limits)
        assert texts(taken) == ["12", "34"]


# --- whom to wake ---


def test_a_subscription_is_to_be_woken_by_the_first_event_that_waits_and_not_by_the_next():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a", "b")
    assert publish(hub, "a", "1").wake == [one, two]
    assert publish(hub, "a", "2").wake == []
    one.take()
    assert publish(hub, "a", "3").wake == [one]
    two.take(1)
    assert publish(hub, "b", "4").wake == []
    two.take()
    assert publish(hub, "b", "5").wake == [two]


# --- overflow ---


def test_one_event_too_many_ends_the_subscription():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=2)
    assert publish(hub, "a", "1", "2").overflowed == []
    assert subscription.ended is None
    outcome = publish(hub, "a", "3")
    assert subscription.ended == "overflow"
    assert outcome.overflowed == [subscription]
    assert outcome.wake == outcome.crowded == []


def test_one_byte_too_many_ends_the_subscription():
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=6)
    publish(hub, "a", "123", "456")
    assert subscription.ended is None
    assert publish(hub, "a", "7").overflowed == [subscription]
    assert subscription.ended == "overflow"


def test_what_waited_at_an_overflow_can_still_be_taken_and_nothing_comes_after_it():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=2)
    publish(hub, "a", "1", "2", "3", "4")
    assert texts(subscription.take(1)) == ["1"]
    publish(hub, "a", "5")
    subscription.put(Event("", "6"), b"6")
    assert texts(subscription.take()) == ["2"]
    assert subscription.take() == []
    assert subscription.ended == "overflow"


def test_an_overflow_is_reported_once_and_ends_no_other_subscription():
    hub = Hub()
    full, other = subscribe(hub, "a", max_events=1), subscribe(hub, "a")
    assert publish(hub, "a", "1", "2").overflowed == [full]
    assert publish(hub, "a", "3").overflowed == []
    assert hub.subscriptions == {other}
    assert texts(other.take()) == ["1", "2", "3"]


def test_an_overflow_leaves_every_channel_and_reports_those_without_listeners():
    hub = Hub()
    subscribe(hub, "a", "b", "c", max_events=1)
    other = subscribe(hub, "b")
    outcome = publish(hub, "a", "1", "2")
    assert outcome.idle == ["a", "c"]
    assert hub.channels == ["b"]
    assert hub.subscriptions == {other}


def test_a_frame_above_the_bound_may_wait_alone():
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=4)
    publish(hub, "a", "12345")
    assert subscription.ended is None
    assert texts(subscription.take()) == ["12345"]
    publish(hub, "a", "123456")
    assert texts(subscription.take(1)) == ["123456"]


def test_a_frame_above_the_bound_neither_joins_others_nor_is_joined():
    hub = Hub()
    before, after = subscribe(hub, "a", max_bytes=4), subscribe(hub, "b", max_bytes=4)
    assert publish(hub, "a", "1", "23456").overflowed == [before]
    assert publish(hub, "b", "12345", "").overflowed == [after]
    assert texts(before.take()) == ["1"]
    assert texts(after.take()) == ["12345"]


# --- subscriptions that nobody reads ---


def test_an_abandoned_subscription_is_forgotten_at_the_next_event_without_a_word():
    hub = Hub()
    gone, other = subscribe(hub, "a", "b"), subscribe(hub, "a")
    gone.ended = "abandoned"
    assert hub.subscriptions == {gone, other}
    assert publish(hub, "a", "1") == Outcome(wake=[other], idle=["b"])
    assert hub.subscriptions == {other}
    assert gone.take() == []


def test_an_unclaimed_subscription_gets_its_events_and_never_counts_as_crowded():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=3, claimed=False)
    for text in "123":
        assert publish(hub, "a", text).crowded == []
    assert texts(subscription.take()) == ["1", "2", "3"]


def test_an_unclaimed_subscription_that_overflows_is_forgotten_and_nobody_told():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=1, claimed=False)
    assert publish(hub, "a", "1", "2") == Outcome(idle=["a"])
    assert subscription.ended == "overflow"
    assert hub.subscriptions == set()


# --- crowded and slow ---


def test_a_subscription_is_crowded_with_more_than_half_of_its_events():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=4)
    assert publish(hub, "a", "1", "2").crowded == []
    assert not subscription.crowded
    assert publish(hub, "a", "3").crowded == [subscription]
    assert subscription.crowded


def test_a_subscription_is_crowded_with_more_than_half_of_its_bytes():
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=8)
    assert publish(hub, "a", "1234").crowded == []
    assert publish(hub, "a", "5").crowded == [subscription]
    subscription.take(1)
    assert not subscription.crowded


def test_a_slow_subscription_is_not_reported_as_crowded_until_it_has_caught_up():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=4)
    assert publish(hub, "a", "1", "2", "3").crowded == [subscription]
    subscription.slow = True
    assert publish(hub, "a", "4").crowded == []
    assert len(subscription.take()) == 4
    assert subscription.slow  # a slow client takes all that waits, too
    assert subscription.take() == []
    assert not subscription.slow
    assert publish(hub, "a", "5", "6", "7").crowded == [subscription]


# --- all of it at once ---


@dataclass(eq=False)
class Client:
    """What a subscription must do, in lists: no byte counter, no reference to the hub."""

    channels: list[str]
    max_events: int
    max_bytes: int
    claimed: bool
    waiting: list[str] = field(default_factory=list)
    ended: str | None = None
    slow: bool = False

    def fits(self, text):
        size = sum(map(len, self.waiting)) + len(text)
        return len(self.waiting) < self.max_events and (not self.waiting or size <= self.max_bytes)

    @property
    def crowded(self):
        return len(self.waiting) > self.max_events / 2 or sum(map(len, self.waiting)) > self.max_bytes / 2


CHANNELS = st.sampled_from("abc")


class HubAgainstLists(RuleBasedStateMachine):
    """Whatever is done in whatever order, the hub says and holds what a dict of lists would."""

    clients = Bundle("clients")

    def __init__(self):
        super().__init__()
        self.hub = Hub()
        self.known = {}  # client -> its subscription, for the clients that ever were
        self.listeners = {}  # channel -> its clients, in the order in which they came
        self.published = 0

    @rule(
        target=clients,
        channels=st.lists(CHANNELS, min_size=1, max_size=4),
        max_events=st.integers(1, 4),
        max_bytes=st.integers(1, 12),
        claimed=st.booleans(),
    )
    def add(self, channels, max_events, max_bytes, claimed):
        client = Client(list(dict.fromkeys(channels)), max_events, max_bytes, claimed)
        subscription = self.known[client] = Subscription(channels, max_events=max_events, max_bytes=max_bytes)
        if claimed:
            subscription.wake = lambda: None
        first = [channel for channel in client.channels if channel not in self.listeners]
        for channel in client.channels:
            self.listeners.setdefault(channel, []).append(client)
        assert self.hub.add(subscription) == first
        return client

    @rule(channel=CHANNELS, size=st.integers(0, 8))
    def publish(self, channel, size):
        self.published += 1
        text = str(self.published).rjust(size, ".")
        wake, crowded, overflowed, gone = [], [], [], []
        for client in self.listeners.get(channel, []):
            if client.ended is None and not client.fits(text):
                client.ended = "overflow"
                if client.claimed:
                    overflowed.append(client)
            if client.ended is not None:
                gone.append(client)
                continue
            if not client.waiting:
                wake.append(client)
            client.waiting.append(text)
            if client.claimed and not client.slow and client.crowded:
                crowded.append(client)
        idle = [channel for client in gone for channel in self.forget(client)]
        outcome = publish(self.hub, channel, text)
        assert outcome.wake == [self.known[client] for client in wake]
        assert outcome.crowded == [self.known[client] for client in crowded]
        assert outcome.overflowed == [self.known[client] for client in overflowed]
        assert outcome.idle == idle

    @rule(client=clients, limit=st.none() | st.integers(0, 3), max_bytes=st.none() | st.integers(1, 12))
    def take(self, client, limit, max_bytes):
        taken = []
        for text in client.waiting[:limit]:
            if max_bytes is None or sum(map(len, taken)) < max_bytes:
                taken.append(text)
        del client.waiting[: len(taken)]
        client.slow = client.slow and bool(taken or client.waiting)
        assert texts(self.known[client].take(limit, max_bytes)) == taken

    @rule(client=clients)
    def remove(self, client):
        assert self.hub.remove(self.known[client]) == self.forget(client)

    @rule(client=clients)
    def claim(self, client):
        client.claimed = True
        self.known[client].wake = lambda: None

    @rule(client=clients)
    def is_slow(self, client):
        client.slow = self.known[client].slow = True

    @rule(client=clients)
    def is_abandoned(self, client):
        client.ended = client.ended or "abandoned"
        self.known[client].ended = client.ended

    def forget(self, client):
        idle = []
        for channel in client.channels:
            if client in self.listeners.get(channel, []):
                self.listeners[channel].remove(client)
                if not self.listeners[channel]:
                    del self.listeners[channel]
                    idle.append(channel)
        return idle

    @invariant()
    def the_hub_knows_the_listeners_and_nobody_else(self):
        assert set(self.hub.channels) == set(self.listeners)
        assert self.hub.subscriptions == {self.known[client] for some in self.listeners.values() for client in some}

    @invariant()
    def each_subscription_is_as_its_client_knows_it(self):
        for client, subscription in self.known.items():
            assert len(subscription) == len(client.waiting)
            assert subscription.ended == client.ended
            assert subscription.slow == client.slow
            assert subscription.crowded == client.crowded

    @invariant()
    def nothing_waits_beyond_the_bounds(self):
        for client in self.known.values():
            waiting = [frame for _, frame in client._waiting]
            assert len(waiting) <= client._max_events
            assert len(waiting) <= 1 or sum(map(len, waiting)) <= client._max_bytes


TestHubAgainstLists = HubAgainstLists.TestCase
TestHubAgainstLists.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
