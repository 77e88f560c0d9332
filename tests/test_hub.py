"""The hub: who gets an event, in which order, what may wait, and what its owner is told to do next."""

import gc
import weakref
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from django_sse.event import Event
from django_sse.hub import Hub, Outcome

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


def first(hub, *channels):
    """The channels that have their first listener with one to `channels`."""
    return hub.subscribe(channels, **BOUNDS)[1]


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


def test_a_listener_gets_nothing_from_before_it_came_nor_from_after_it_left_though_others_do():
    hub = Hub()
    other = subscribe(hub, "a")
    publish(hub, "a", "before")
    subscription = subscribe(hub, "a")
    assert subscription.audience is other.audience
    publish(hub, "a", "1")
    hub.remove(subscription)
    publish(hub, "a", "after")
    assert texts(subscription.take()) == ["1"]
    assert texts(other.take()) == ["before", "1", "after"]
    assert publish(hub, "a", "later").wake == [other.wake]


def test_listeners_of_a_channel_with_other_channels_or_other_bounds_get_its_events_too():
    hub = Hub()
    listeners = [
        subscribe(hub, "a"),
        subscribe(hub, "a", "b"),
        subscribe(hub, "b", "a"),
        subscribe(hub, "a", max_events=11),
        subscribe(hub, "a", max_bytes=1001),
    ]
    publish(hub, "a", "1")
    publish(hub, "b", "2")
    assert [texts(listener.take()) for listener in listeners] == [["1"], ["1", "2"], ["1", "2"], ["1"], ["1"]]


def test_who_comes_when_all_others_have_left_begins_anew():
    hub = Hub()
    hub.remove(gone := subscribe(hub, "a"))
    publish(hub, "a", "1")
    subscription = subscribe(hub, "a")
    publish(hub, "a", "2")
    assert hub.remove(gone) == []
    publish(hub, "a", "3")
    assert texts(subscription.take()) == ["2", "3"]


def test_a_channel_named_twice_is_listened_to_once():
    hub = Hub()
    subscription, first = hub.subscribe(["a", "b", "a"], **BOUNDS)
    assert subscription.channels == ("a", "b")
    assert first == ["a", "b"]
    publish(hub, "a", "1")
    assert texts(subscription.take()) == ["1"]
    assert hub.remove(subscription) == ["a", "b"]


def test_an_event_that_nobody_listens_to_has_no_outcome():
    assert publish(Hub(), "a", "1") == Outcome()


# --- first and last listener ---


def test_only_the_first_listener_of_a_channel_is_reported():
    hub = Hub()
    assert first(hub, "a") == ["a"]
    assert first(hub, "a", "b") == ["b"]
    assert first(hub, "b", "a") == []
    assert first(hub, "a") == []


def test_only_the_last_listener_of_a_channel_is_reported():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a", "b")
    assert hub.remove(two) == ["b"]
    assert hub.remove(one) == ["a"]
    assert hub.channels == []


def test_a_channel_that_was_left_has_a_first_listener_again():
    hub = Hub()
    hub.remove(subscribe(hub, "a"))
    assert first(hub, "a") == ["a"]


def test_a_subscription_may_be_removed_again():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
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
    assert woken(publish(hub, "a", "1")) == [one, two]
    assert woken(publish(hub, "a", "2")) == []
    one.take()
    assert woken(publish(hub, "a", "3")) == [one]
    two.take(1)
    assert woken(publish(hub, "b", "4")) == []
    two.take()
    assert woken(publish(hub, "b", "5")) == [two]


def test_who_is_served_with_others_is_rung_for_by_their_bell_at_every_event_and_not_woken():
    hub = Hub()
    alone, one, two = [subscribe(hub, "a", "b") for _ in range(3)]
    other = subscribe(hub, "a")
    share(one, ring := lambda: "ring")
    share(two, ring)
    assert Counter(woken(publish(hub, "a", "1"))) == Counter([alone, "ring", other])
    assert woken(publish(hub, "b", "2")) == ["ring"]
    assert texts(one.take()) == ["1", "2"]
    assert woken(publish(hub, "b", "3")) == ["ring"]
    del one.audience.bells[ring]
    assert woken(publish(hub, "b", "4")) == []


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


def test_what_waits_for_those_that_overflow_together_is_kept_once():
    hub = Hub()
    first, second, late = (hub.subscribe(["a"], max_events=3, max_bytes=1000)[0] for _ in range(3))
    publish(hub, "a", "0")
    late.take()
    publish(hub, "a", "1", "2", "3")
    assert (first.ended, second.ended, late.ended) == ("overflow", "overflow", None)
    assert first._place is second._place
    publish(hub, "a", "4")
    assert late.ended == "overflow"
    assert texts(first.take()) == texts(second.take()) == ["0", "1", "2"]
    assert texts(late.take()) == ["1", "2", "3"]


def test_those_that_overflow_together_from_different_places_share_what_waits_for_both():
    hub = Hub()
    one, other = (hub.subscribe(["a"], max_events=3, max_bytes=5)[0] for _ in range(2))
    publish(hub, "a", "0")
    other.take()
    publish(hub, "a", "1", "22222")
    assert (one.ended, other.ended) == ("overflow", "overflow")
    assert one._place.next is other._place
    assert (texts(one.take()), texts(other.take())) == (["0", "1"], ["1"])
    assert len(one) == len(other) == 0


# --- subscriptions that nobody reads ---


def test_an_abandoned_subscription_is_forgotten_when_it_is_looked_at_without_a_word():
    hub = Hub()
    gone, other = subscribe(hub, "a", "b", max_events=4), subscribe(hub, "a")
    gone.ended = "abandoned"
    assert hub.subscriptions == {gone, other}
    assert publish(hub, "a", "1") == Outcome(wake=[other.wake], idle=["b"])
    assert hub.subscriptions == {other}
    assert gone.take() == []


def test_an_abandoned_subscription_is_forgotten_before_it_would_have_overflowed_without_a_word():
    hub = Hub()
    gone, other = subscribe(hub, "a", max_events=4), subscribe(hub, "a", max_events=4)
    publish(hub, "a", "1")
    gone.ended = "abandoned"
    for _ in range(4):
        outcome = publish(hub, "a", "more")
        assert (outcome.crowded, outcome.overflowed) == ([], [])
        other.take()
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


# --- several at once ---


def advance(*subscriptions, max_bytes=1000):
    return subscriptions[0].audience.advance(subscriptions, max_bytes)


def test_what_several_get_is_the_same_bytes_for_all_at_one_place():
    hub = Hub()
    early = [subscribe(hub, "a") for _ in range(3)]
    publish(hub, "a", "1")
    late = [subscribe(hub, "a") for _ in range(2)]
    publish(hub, "a", "2", "3")
    chunks, more = advance(early[0], late[0], early[1], late[1], early[2])
    assert chunks == [b"123", b"23", b"123", b"23", b"123"]
    assert chunks[0] is chunks[2] is chunks[4]
    assert chunks[1] is chunks[3]
    assert more is False
    publish(hub, "a", "4")
    chunks, _ = advance(*early, *late)
    assert chunks == [b"4"] * 5
    assert [texts(each.take()) for each in early + late] == [[]] * 5


def test_a_single_event_is_given_to_several_as_the_very_frame():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    frame = b"frame"
    hub.publish("a", Event("", "1"), frame)
    chunks, _ = advance(one, two)
    assert chunks[0] is chunks[1] is frame


def test_several_that_have_all_get_nothing():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    assert advance(one, two) == ([b"", b""], False)
    publish(hub, "a", "1")
    one.take()
    assert advance(one, two) == ([b"", b"1"], False)


@pytest.mark.parametrize("max_bytes", [*range(1, 8), 60])
def test_several_are_given_no_more_after_the_event_that_makes_it_the_bytes_asked_for(max_bytes):
    hub = Hub()
    one, two, alone = [subscribe(hub, "a") for _ in range(3)]
    publish(hub, "a", "12", "34", "56")
    left = True
    while left:
        expected = texts(alone.take(max_bytes=max_bytes))
        left = len(alone) > 0
        assert advance(one, two, max_bytes=max_bytes) == ([b"".join(text.encode() for text in expected)] * 2, left)
    assert len(one) == len(two) == 0


def test_an_event_above_the_bytes_asked_for_is_given_to_several_alone():
    hub = Hub()
    one = subscribe(hub, "a")
    publish(hub, "a", "1", "23456", "7", "8")
    assert advance(one, max_bytes=2) == ([b"123456"], True)
    publish(hub, "a", "90123")
    assert advance(one, max_bytes=2) == ([b"78"], True)
    assert advance(one, max_bytes=2) == ([b"90123"], False)


@pytest.mark.parametrize("first", ["late", "early"])
def test_there_is_more_for_several_when_more_waits_for_one_of_them(first):
    hub = Hub()
    early = subscribe(hub, "a")
    publish(hub, "a", "12")
    late = subscribe(hub, "a")
    publish(hub, "a", "34")
    both, order = ([late, early], 1) if first == "late" else ([early, late], -1)
    assert advance(*both, max_bytes=2) == ([b"34", b"12"][::order], True)
    assert advance(*both, max_bytes=2) == ([b"", b"34"][::order], False)


def test_a_slow_one_among_several_is_left_to_itself():
    hub = Hub()
    one, slow, two = [subscribe(hub, "a") for _ in range(3)]
    slow.slow = True
    publish(hub, "a", "1", "2")
    assert advance(one, slow, two)[0] == [b"12", None, b"12"]
    assert texts(slow.take()) == ["1", "2"]
    publish(hub, "a", "3")
    assert advance(one, slow, two)[0] == [b"3", None, b"3"]
    assert texts(slow.take()) == ["3"]
    assert slow.take() == []
    publish(hub, "a", "4")
    assert advance(one, slow, two)[0] == [b"4", b"4", b"4"]


def test_those_that_have_ended_get_with_others_what_waits_and_nothing_more():
    hub = Hub()
    full = subscribe(hub, "a", max_events=2)
    publish(hub, "a", "1")
    ended, cleared, other = [subscribe(hub, "a", max_events=2) for _ in range(3)]
    publish(hub, "a", "2")
    ended.end("finished")
    cleared.end("client", clear=True)
    for each in (ended, cleared):
        hub.remove(each)
    publish(hub, "a", "3")
    assert full.ended == "overflow"
    assert advance(full, ended, cleared, other) == ([b"12", b"2", b"", b"23"], False)
    publish(hub, "a", "4")
    assert advance(full, ended, cleared, other) == ([b"", b"", b"", b"4"], False)


def test_what_was_given_to_several_counts_as_taken_and_makes_room():
    hub = Hub()
    one, two = [subscribe(hub, "a", max_events=2, max_bytes=4) for _ in range(2)]
    for _ in range(5):
        publish(hub, "a", "12", "34")
        assert advance(one, two)[0] == [b"1234"] * 2
    assert one.events == two.events == 10
    assert (one.ended, two.ended) == (None, None)


def test_bytes_count_as_taken_with_others_only_if_they_were():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    publish(hub, "a", "123", "4")
    one.take(1)
    advance(one, two)
    publish(hub, "a", "5678")
    two.take()
    publish(hub, "a", "9")
    one.end("shutdown")
    advance(one, two)
    assert (one.bytes_alike, two.bytes_alike) == (6, 5)
    publish(hub, "a", "dropped")
    two.end("client", clear=True)
    assert two.bytes_alike == 5


# --- what it costs ---


class Looked(dict):
    """An audience's subscriptions, and how often somebody has gone through them."""

    looks = 0

    def __iter__(self):
        self.looks += 1
        return super().__iter__()

    keys = items = values = copy = None


@pytest.mark.parametrize(
    ("bounds", "size"),
    [({"max_events": 100, "max_bytes": 10**6}, 1), ({"max_events": 10**6, "max_bytes": 500}, 5)],
    ids=["events", "bytes"],
)
@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_bounds_are_looked_at_once_in_half_a_mailbox(bounds, size, slow):
    """And so publishing touches no subscription but then, however many there are: 100 events are a mailbox."""
    hub = Hub()
    subscriptions = [subscribe(hub, "a", **bounds) for _ in range(3)]
    audience = subscriptions[0].audience
    audience.subscriptions = Looked(audience.subscriptions)
    for subscription in subscriptions:
        share(subscription, lambda: None)
        subscription.slow = slow
    looks = 0
    for number in range(1000):
        outcome = publish(hub, "a", "x" * size)
        assert (outcome.crowded, outcome.overflowed) == ([], [])
        for subscription in subscriptions:
            subscription.take()
        if audience.subscriptions.looks > looks:
            looks += 1
            assert audience.subscriptions.looks == looks
        if number == 0:
            assert looks <= 1
    assert looks <= 1000 / 50 + 1


def test_bounds_are_looked_at_once_for_a_slow_client_that_fills_its_mailbox():
    hub = Hub()
    slow, other = [subscribe(hub, "a", max_events=1000, max_bytes=10_000) for _ in range(2)]
    slow.slow = True
    audience = slow.audience
    audience.subscriptions = Looked(audience.subscriptions)
    for number in range(1000):
        assert publish(hub, "a", str(number)).overflowed == []
        other.take()
    assert audience.subscriptions.looks <= 3
    assert publish(hub, "a", "one too many").overflowed == [slow]
    assert texts(slow.take()) == [str(number) for number in range(1000)]


class Thing:
    """Stands for an event: something that can be seen to be freed."""


def publish_thing(hub, channel="a"):
    thing = Thing()
    hub.publish(channel, thing, b"frame")
    return weakref.ref(thing)


@pytest.fixture
def _no_collector():
    """What is freed is freed at once, and not when the collector comes."""
    gc.disable()
    yield
    gc.enable()


def ends_for_good(hub, subscription):
    subscription.end("client", clear=True)
    hub.remove(subscription)


def ends_with_what_waits(hub, subscription):
    subscription.end("shutdown")
    hub.remove(subscription)


def overflows(hub, subscription):
    for _ in range(11):
        hub.publish("a", Thing(), b"frame")
    assert subscription.ended == "overflow"


def is_removed(hub, subscription):
    hub.remove(subscription)


WAYS_TO_END = [ends_for_good, ends_with_what_waits, overflows, is_removed]


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("waiting", [0, 1, 5])
@pytest.mark.parametrize("end", WAYS_TO_END)
def test_a_subscription_that_has_ended_keeps_nothing_that_is_published_later(end, waiting):
    hub = Hub()
    ended, other = subscribe(hub, "a"), subscribe(hub, "a", max_events=100)
    neighbour = subscribe(hub, "a")
    for _ in range(waiting):
        publish_thing(hub)
    neighbour.take()
    end(hub, ended)
    for _ in range(3):
        neighbour.take()
        later = publish_thing(hub)
        assert later() is not None
    for _ in range(2):  # what was published last may be kept
        publish_thing(hub)
        neighbour.take()
        other.take()
    assert later() is None


@pytest.mark.usefixtures("_no_collector")
def test_a_subscription_that_has_ended_keeps_what_waits_until_that_is_taken():
    hub = Hub()
    ended = subscribe(hub, "a")
    waiting = [publish_thing(hub) for _ in range(3)]
    ended.end("shutdown")
    hub.remove(ended)
    assert None not in [thing() for thing in waiting]
    assert [event for event, _ in ended.take(2)] == [thing() for thing in waiting[:2]]
    assert waiting[0]() is None
    ended.end("client", clear=True)
    assert [thing() for thing in waiting] == [None] * 3


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("how", ["take", "advance"])
def test_the_log_keeps_what_somebody_still_has_to_take_and_nothing_else(how):
    hub = Hub()
    behind, quick = subscribe(hub, "a"), subscribe(hub, "a")

    def take(subscription, count):
        if how == "take":
            subscription.take(count)
        else:
            advance(subscription, max_bytes=count * len(b"frame"))

    things = [publish_thing(hub) for _ in range(6)]
    take(quick, 6)
    assert None not in [thing() for thing in things]
    for taken in range(1, 7):
        take(behind, 1)
        assert [thing() is None for thing in things] == [True] * taken + [False] * (6 - taken)


@pytest.mark.usefixtures("_no_collector")
def test_what_is_published_where_nobody_waits_for_it_any_more_is_freed():
    hub = Hub()
    thing = publish_thing(hub)
    assert thing() is None
    subscription = subscribe(hub, "a")
    thing = publish_thing(hub)
    ends_for_good(hub, subscription)
    assert thing() is None


@pytest.mark.parametrize("end", ["taken", "cleared", "dropped"])
def test_a_long_log_is_freed_without_recursion(end):
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=200_000, max_bytes=10**9, claimed=False)
    other = subscribe(hub, "a", max_events=200_000, max_bytes=10**9, claimed=False)
    event = Event("", "")
    for _ in range(100_000):
        hub.publish("a", event, b"")
    assert len(other.take()) == 100_000
    assert len(subscription) == 100_000
    if end == "taken":
        assert len(subscription.take()) == 100_000
    elif end == "cleared":
        subscription.end("shutdown")
        other.end("shutdown")
        subscription.end("client", clear=True)
        assert subscription.take() == []
    else:
        subscription.end("shutdown")
        hub.remove(subscription)
        del subscription, other, hub
    gc.collect()


# --- all of it at once ---


@dataclass(eq=False)
class Client:
    """What a subscription must do, in lists: no log, no byte counter, no reference to the hub."""

    channels: list[str]
    max_events: int
    max_bytes: int
    claimed: bool
    waiting: list[str] = field(default_factory=list)
    taken: int = 0
    #: Bytes that were taken together with others.
    alike: int = 0
    ended: str | None = None
    slow: bool = False
    shared: bool = False
    #: Whether it is to be woken by the next event.
    alert: bool = True
    #: How many events it was not looked at since it was abandoned; `None` where it was not.
    abandoned: int | None = None

    @property
    def size(self):
        return sum(map(len, self.waiting))

    def fits(self, text):
        return len(self.waiting) < self.max_events and (not self.waiting or self.size + len(text) <= self.max_bytes)

    @property
    def crowded(self):
        return len(self.waiting) > self.max_events / 2 or self.size > self.max_bytes / 2

    def first(self, limit, max_bytes):
        """What it is to be given first."""
        given = []
        for text in self.waiting[:limit]:
            if max_bytes is None or sum(map(len, given)) < max_bytes:
                given.append(text)
        return given

    def take(self, limit, max_bytes):
        given = self.first(limit, max_bytes)
        del self.waiting[: len(given)]
        self.taken += len(given)
        return given


CHANNELS = st.sampled_from("abc")


class HubAgainstLists(RuleBasedStateMachine):
    """Whatever is done in whatever order, the hub says and holds what a dict of lists would."""

    clients = Bundle("clients")

    def __init__(self):
        super().__init__()
        self.hub = Hub()
        self.known = {}  # client -> its subscription, for the clients that ever were
        self.listeners = {}  # channel -> its clients, in the order in which they came
        self.bells = {}  # audience -> its bell
        self.published = 0

    @rule(
        target=clients,
        channels=st.sampled_from(["a", "aa", "b", "ab", "ab", "bac"]),
        max_events=st.sampled_from([1, 4, 4, 5]),
        max_bytes=st.sampled_from([5, 12]),
        claimed=st.booleans(),
    )
    def subscribe(self, channels, max_events, max_bytes, claimed):
        client = Client(list(dict.fromkeys(channels)), max_events, max_bytes, claimed)
        first = [channel for channel in client.channels if channel not in self.listeners]
        for channel in client.channels:
            self.listeners.setdefault(channel, []).append(client)
        subscription, told = self.hub.subscribe(channels, max_events=max_events, max_bytes=max_bytes)
        assert told == first
        self.known[client] = subscription
        if claimed:
            claim(subscription)
        return client

    @rule(channel=CHANNELS, size=st.integers(0, 8))
    def publish(self, channel, size):
        self.published += 1
        text = str(self.published).rjust(size, ".")
        wake, crowded, overflowed, gone = [], [], [], []
        listeners = list(self.listeners.get(channel, []))
        for client in listeners:
            if client.abandoned is not None:
                client.abandoned += 1
                continue
            if not client.fits(text):
                client.ended = "overflow"
                gone.append(client)
                if client.claimed:
                    overflowed.append(client)
                continue
            if client.alert and client.claimed:
                wake.append(self.known[client])
            client.alert = False
            client.waiting.append(text)
            if client.claimed and not client.slow and client.crowded:
                crowded.append(client)
        audiences = {self.known[client].audience for client in listeners}
        wake += [self.bells[audience] for audience in audiences if audience in self.bells]
        outcome = publish(self.hub, channel, text)
        # When those whose stream is gone are forgotten is the hub's own business, up to a point.
        left = self.hub.subscriptions
        for client in listeners:
            if client.abandoned is not None and self.known[client] not in left:
                client.abandoned = None
                client.waiting = []
                gone.append(client)
        idle = [channel for client in gone for channel in self.forget(client)]
        assert Counter(woken(outcome)) == Counter(wake)
        assert Counter(outcome.crowded) == Counter(self.known[client] for client in crowded)
        assert Counter(outcome.overflowed) == Counter(self.known[client] for client in overflowed)
        assert Counter(outcome.idle) == Counter(idle)

    @rule(client=clients, limit=st.none() | st.integers(0, 3), max_bytes=st.none() | st.integers(1, 12))
    def take(self, client, limit, max_bytes):
        if client.abandoned is not None:
            return
        taken = client.take(limit, max_bytes)
        if not client.waiting and client.ended is None:
            client.alert = not client.shared
            client.slow = client.slow and bool(taken)
        assert texts(self.known[client].take(limit, max_bytes)) == taken

    @rule(client=clients, seed=st.randoms(use_true_random=False), max_bytes=st.integers(1, 12))
    def advance(self, client, seed, max_bytes):
        audience = self.known[client].audience
        several = [each for each in self.known if self.known[each].audience is audience and each.abandoned is None]
        several = seed.sample(several, seed.randint(0, len(several)))
        expected, more, same = [], False, {}
        for each in several:
            place = each.ended or tuple(each.waiting)
            if each.slow:
                expected.append(None)
                more = more or each.waiting != each.first(None, max_bytes)
            else:
                expected.append("".join(each.take(None, max_bytes)).encode())
                each.alike += len(expected[-1])
                more = more or bool(each.waiting)
            same.setdefault(place, []).append(len(expected) - 1)
        chunks, said_more = audience.advance([self.known[each] for each in several], max_bytes)
        assert chunks == expected
        assert said_more == more
        for place, indices in same.items():
            if isinstance(place, tuple):
                assert len({id(chunks[index]) for index in indices if chunks[index] is not None}) <= 1

    @rule(client=clients)
    def share(self, client):
        if client.abandoned is None:
            client.shared, client.alert = True, False
            audience = self.known[client].audience
            bell = self.bells.setdefault(audience, object())
            rings = [ring for ring in audience.bells if ring() is bell]
            share(self.known[client], rings[0] if rings else lambda: bell)

    @rule(client=clients)
    def unshare(self, client):
        audience = self.known[client].audience
        self.bells.pop(audience, None)
        audience.bells.clear()

    @rule(client=clients, reason=st.sampled_from(["client", "shutdown"]), clear=st.booleans())
    def end(self, client, reason, clear):
        client.ended = client.ended or reason
        if client.abandoned is not None:
            client.abandoned, clear = None, True
        if clear:
            client.waiting = []
        self.known[client].end(reason, clear=clear)
        assert self.hub.remove(self.known[client]) == self.forget(client)

    @rule(client=clients)
    def claim(self, client):
        client.claimed = True
        claim(self.known[client])
        self.known[client].audience.look_again()

    @rule(client=clients)
    def is_given_up(self, client):
        client.slow = self.known[client].slow = True

    @rule(client=clients, slow=st.booleans())
    def is_said_to_be_slow(self, client, slow):
        client.slow = self.known[client].slow = slow
        self.known[client].audience.look_again()

    @rule(client=clients)
    def is_abandoned(self, client):
        if client.ended is None:
            client.ended = self.known[client].ended = "abandoned"
            client.abandoned = 0

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
            assert subscription.ended == client.ended
            if client.abandoned is None:
                assert len(subscription) == len(client.waiting)
                assert subscription.events == client.taken
                assert subscription.bytes_alike == client.alike
                assert subscription.slow == client.slow
                assert subscription.crowded == client.crowded

    @invariant()
    def an_abandoned_one_is_forgotten_before_it_would_be_full(self):
        for client in self.known:
            assert client.abandoned is None or client.abandoned <= client.max_events


TestHubAgainstLists = HubAgainstLists.TestCase
TestHubAgainstLists.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
