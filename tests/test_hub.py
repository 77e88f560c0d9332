"""The hub: who gets an event, in which order, and what its owner is told to do next."""

import json
import os
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from random import Random

import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from django_sse import hub as hub_module
from django_sse import track
from django_sse.cursor import Cursors
from django_sse.event import Event
from django_sse.history import History, Position, reset_event
from django_sse.hub import Hub, Outcome
from django_sse.track import TOP
from django_sse.wire import encode
from tests.helpers.listening import BOUNDS, Process, claim, publish, share, subscribe, texts, woken
from tests.helpers.timeline import item, timelines


def first(hub, *channels):
    """The channels that have their first listener with one to `channels`."""
    return hub.subscribe(channels, **BOUNDS)[1]


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


# --- overflow ---


def test_an_overflow_is_reported_once_and_ends_no_other_subscription():
    hub = Hub()
    full, other = subscribe(hub, "a", max_events=1), subscribe(hub, "a")
    assert publish(hub, "a", "1", "2").ended == [full]
    assert publish(hub, "a", "3").ended == []
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
        assert (outcome.crowded, outcome.ended) == ([], [])
        other.take()
    assert hub.subscriptions == {other}
    assert gone.take() == []


def test_an_unclaimed_subscription_that_overflows_is_forgotten_and_nobody_told():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=1, claimed=False)
    assert publish(hub, "a", "1", "2") == Outcome(idle=["a"])
    assert subscription.ended == "overflow"
    assert hub.subscriptions == set()


# --- with history: where a client begins ---


def test_who_has_no_position_begins_at_the_end_and_is_told_where_that_is():
    process = Process(a=10)
    process.publish("a", 3, missed=True)
    subscription = process.subscribe("a")
    assert process.hub.place(subscription, None, 0.0, {}) is None
    assert process.fetch() == [("a", TOP)]
    placement = process.hub.place(subscription, None, 0.0, {})
    assert (placement.is_first, placement.resets) == (True, {})
    assert process.offsets(placement.cursor) == {"a": 3}


def test_where_the_end_is_known_nobody_has_to_look():
    process = Process(a=10)
    process.join("a")
    process.publish("a", 3)
    process.fetched.clear()
    placement = process.place(process.subscribe("ab"))
    assert (process.offsets(placement.cursor), process.fetched) == ({"a": 3}, [])


def test_a_place_says_where_all_channels_are():
    process = Process(a=10, b=10)
    process.publish("a", 3, missed=True)
    placement = process.place(process.subscribe("bap"))
    assert process.offsets(placement.cursor) == {"a": 3, "b": 0}


def test_who_comes_back_keeps_the_id_that_it_has():
    process = Process(a=10)
    process.publish("a", 3, missed=True)
    for offset in range(4):
        subscription = process.subscribe("a")
        placement = process.place(subscription, process.at(a=offset))
        assert placement == (False, None, {})
        assert process.all_of(subscription) == [f"a{number}" for number in range(offset + 1, 4)]


def test_who_comes_back_to_a_process_that_knows_nothing_has_it_fetched_once():
    process = Process(a=1000)
    process.publish("a", 500, missed=True)
    subscription = process.subscribe("a")
    asked = {}
    assert process.hub.place(subscription, process.at(a=450), 0.0, asked) is None
    assert asked == {subscription.audience.tracks[0]: process.hub.needs["a"]}
    [(channel, lowest)] = process.fetch()
    assert channel == "a"
    assert lowest <= 450
    assert process.hub.place(subscription, process.at(a=450), 0.0, asked) is not None
    assert process.hub.needs == {}
    assert process.all_of(subscription) == [f"a{number}" for number in range(451, 501)]


def test_all_who_come_back_at_once_cost_one_look():
    process = Process(a=1000)
    process.publish("a", 500, missed=True)
    several = [(process.subscribe("a"), process.at(a=offset), {}) for offset in range(400, 500)]
    for subscription, positions, asked in several:
        assert process.hub.place(subscription, positions, 0.0, asked) is None
    assert len(process.fetch()) == 1
    for subscription, positions, asked in several:
        assert process.hub.place(subscription, positions, 0.0, asked) == (False, None, {})
        assert process.all_of(subscription) == [f"a{number}" for number in range(positions["a"].offset + 1, 501)]
    assert process.fetch() == []


def test_an_event_that_comes_between_the_look_and_the_answer_is_not_lost():
    """Of a channel of which nothing is known yet."""
    process = Process(a=10)
    process.publish("a", 6, missed=True)
    subscription, asked = process.subscribe("a"), {}
    assert process.hub.place(subscription, process.at(a=5), 0.0, asked) is None
    looks = process.begin()
    process.publish("a")
    process.end(looks)
    assert process.hub.place(subscription, process.at(a=5), 0.0, asked) == (False, None, {})
    assert process.all_of(subscription) == ["a6", "a7"]


def test_of_several_channels_all_that_is_needed_is_fetched_at_once():
    process = Process(a=10, b=10)
    process.publish("a", 6, missed=True)
    process.publish("b", 6, missed=True)
    process.join("b")
    process.fetched.clear()
    subscription = process.subscribe("ab")
    placement = process.place(subscription, process.at(a=3, b=4))
    assert placement == (False, None, {})
    assert [channel for channel, _ in process.fetched] == ["a", "b"]
    assert process.all_of(subscription) == ["a4", "a5", "a6", "b5", "b6"]


def test_who_has_no_position_of_ours_is_unknown_and_begins_at_the_end():
    process = Process(a=10, b=10)
    process.publish("a", 3, missed=True)
    subscription = process.subscribe("ab")
    placement = process.place(subscription, {})
    assert (placement.is_first, placement.resets) == (False, {"unknown": ["A", "B"]})
    assert process.offsets(placement.cursor) == {"a": 3, "b": 0}
    process.publish("b")
    assert process.all_of(subscription) == ["b1"]


def test_who_has_a_position_of_some_channels_goes_on_there_and_is_unknown_elsewhere():
    process = Process(a=10, b=10)
    process.publish("a", 3, missed=True)
    process.publish("b", 3, missed=True)
    subscription = process.subscribe("ab")
    placement = process.place(subscription, process.at(a=1))
    assert placement.resets == {"unknown": ["B"]}
    assert process.offsets(placement.cursor) == {"a": 1, "b": 3}
    assert process.all_of(subscription) == ["a2", "a3"]


def test_a_position_of_a_channel_that_is_not_granted_is_ignored():
    process = Process(a=10, b=10)
    process.publish("b", 3, missed=True)
    subscription = process.subscribe("a")
    assert process.place(subscription, process.at(a=0, b=0)) == (False, None, {})
    assert process.all_of(subscription) == []
    assert process.hub.channels == ["a"]


def test_who_has_missed_what_is_gone_is_told_and_begins_at_the_end():
    process = Process(a=3, b=10)
    old = process.at(a=0, b=0)
    process.publish("a", 9, missed=True)
    process.publish("b", 3, missed=True)
    subscription = process.subscribe("ab")
    placement = process.place(subscription, old)
    assert (placement.is_first, placement.resets) == (False, {"expired": ["A"]})
    assert process.offsets(placement.cursor) == {"a": 9, "b": 0}
    assert process.all_of(subscription) == ["b1", "b2", "b3"]


def test_who_comes_from_an_epoch_that_has_ended_is_told():
    process = Process(a=10)
    process.publish("a", 5, missed=True)
    old = process.at(a=3)
    process.flush()
    process.publish("a", 2, missed=True)
    subscription = process.subscribe("a")
    placement = process.place(subscription, old)
    assert placement.resets == {"epoch": ["A"]}
    assert process.CURSORS.decode(placement.cursor, "a") == process.at(a=2)
    assert process.all_of(subscription) == []


def test_who_is_told_of_several_channels_is_told_once_for_each_reason():
    process = Process(a=2, b=2, c=2, d=2)
    old = process.at(a=0, b=0, c=0)
    for channel in "ab":
        process.publish(channel, 9, missed=True)
    process.timelines["c"].flush()
    placement = process.place(process.subscribe("abcd"), old)
    assert placement.resets == {"expired": ["A", "B"], "epoch": ["C"], "unknown": ["D"]}


def test_a_process_that_lags_looks_before_it_tells_somebody_that_something_is_gone():
    process = Process(a=10)
    process.join("a")
    process.publish("a", 3)
    process.publish("a", 3, missed=True)
    subscription = process.subscribe("a")
    assert process.place(subscription, process.at(a=5)) == (False, None, {})
    assert process.all_of(subscription) == ["a6"]


def test_a_process_that_lags_by_an_epoch_looks_before_it_tells_somebody_that_something_is_gone():
    process = Process(a=10)
    process.publish("a", 100, missed=True)
    other = process.join("a")
    process.flush()
    process.publish("a", 4, missed=True)
    subscription = process.subscribe("a")
    assert process.place(subscription, process.at(a=4)) == (False, None, {})
    assert process.all_of(subscription) == []
    assert process.seen(other.take())[:1] == [("epoch", "A")]


def test_what_is_too_old_is_not_recent_any_more_for_who_comes_back():
    process = Process(a=10, ttl=60)
    process.join("a")
    process.publish("a", 3)
    process.now = 60.0
    subscription = process.subscribe("a")
    assert process.place(subscription, process.at(a=1)).resets == {"expired": ["A"]}
    assert process.place(process.subscribe("a"), process.at(a=3)) == (False, None, {})


def test_what_is_too_old_here_and_not_for_the_broker_is_fetched():
    process = Process(a=10, ttl=60)
    process.join("a")
    process.publish("a", 3)
    process.now = 50.0
    process.publish("a", 1, missed=True)
    process.now = 70.0
    subscription = process.subscribe("a")
    assert process.place(subscription, process.at(a=1)) == (False, None, {})
    assert process.all_of(subscription) == ["a2", "a3", "a4"]


def test_who_has_seen_the_last_event_before_all_were_too_old_has_missed_nothing_but_the_next():
    process = Process(a=10, ttl=60)
    process.publish("a", 1, missed=True)
    process.now = 100.0
    before = process.at(a=0), process.at(a=1)
    process.publish("a", 1, missed=True)
    subscription = process.subscribe("a")
    assert process.place(subscription, before[1]) == (False, None, {})
    assert process.all_of(subscription) == ["a2"]
    assert process.place(process.subscribe("a"), before[0]).resets == {"expired": ["A"]}


def test_history_is_for_the_channels_that_have_it():
    process = Process(a=10)
    subscription = process.subscribe("pq")
    assert subscription.audience.tracks == ()
    process.publish_unkept("p", "p1", id="its own")
    assert [event.id for event, _ in subscription.take()] == ["its own"]
    assert process.hub.needs == {}


def test_channels_with_history_need_cursors():
    hub = Hub()
    hub.subscribe("a", **BOUNDS, histories={"a": History("a", 10, 60)})
    with pytest.raises(AssertionError, match="cursors"):
        hub.id_of({"a": Position(1, 1, 1)})


def test_listeners_of_a_channel_follow_it_together():
    process = Process(a=10, b=10)
    one, other, both = process.join("a"), process.join("a", max_events=5), process.join("ba")
    process.publish("a", 2)
    for subscription in (one, other, both):
        assert process.seen(subscription.take()) == ["a1", "a2"]
    process.publish("a", 2, missed=True)
    process.hub.refresh("a")
    assert process.fetch() == [("a", 2)]
    for subscription in (one, other, both):
        assert process.seen(subscription.take()) == ["a3", "a4"]


def test_an_event_that_is_in_no_history_is_heard_and_told_of():
    process = Process(a=10)
    one, other = process.join("a"), process.join("ap")
    outcome = process.publish_unkept("a", "unkept")
    assert outcome.unkept == ["a"]
    assert process.seen(one.take()) == process.seen(other.take()) == ["unkept"]
    assert process.publish("a").unkept == []
    assert process.publish_unkept("p", "p1").unkept == []
    assert process.publish_unkept("nobody", "p1").unkept == []


def test_an_event_of_a_channel_without_history_is_heard_though_it_says_where_it_is():
    """Another process has another idea of what has history."""
    hub = Hub()
    subscription = subscribe(hub, "p")
    hub.publish("p", *item("text"), Position(1, 1, 1), 0.0)
    assert [*subscription.take()] == [item("text")]


# --- with history: what the owner is told to fetch ---


def test_what_is_needed_is_said_once():
    process = Process(a=10, b=10)
    process.subscribe("ab")
    process.hub.refresh("a")
    process.hub.refresh("b")
    assert set(process.hub.needs) == {"a", "b"}
    wants, wake = process.hub.begin_fetch()
    assert [(want.track.channel, want.track.history) for want in wants] == [*process.histories.items()]
    assert wake == []
    assert process.hub.needs == {}
    assert process.hub.begin_fetch() == ([], [])


def test_a_channel_that_nobody_listens_to_is_not_refreshed():
    process = Process(a=10)
    process.hub.refresh("a")
    process.hub.remove(process.join("p"))
    process.hub.refresh("p")
    assert process.hub.needs == {}


def test_nothing_is_needed_of_a_channel_that_nobody_listens_to_any_more():
    process = Process(a=10, b=10)
    subscription, other = process.join("ab"), process.join("b")
    process.hub.refresh("a")
    process.hub.refresh("b")
    assert process.hub.remove(subscription) == ["a"]
    assert [*process.hub.needs] == ["b"]
    assert process.hub.remove(other) == ["b"]
    assert process.hub.begin_fetch() == ([], [])


@pytest.mark.parametrize("again", [False, True])
def test_what_is_found_when_nobody_listens_any_more_is_nothing(again):
    """Nor is it for one who has come since, and is not known to have been subscribed when the broker was asked."""
    process = Process(a=10)
    subscription = process.join("a")
    process.hub.refresh("a")
    looks = process.begin()
    process.hub.remove(subscription)
    process.publish("a", 2, missed=True)
    if again:
        subscription = process.subscribe("a")
        assert process.hub.place(subscription, None, 0.0, {}) is None
    assert process.end(looks) == []
    if again:
        placement = process.place(subscription, None)
        assert process.offsets(placement.cursor) == {"a": 2}
    else:
        assert process.hub.channels == []


def test_what_failed_for_a_channel_that_nobody_listens_to_any_more_is_not_needed():
    process = Process(a=10)
    subscription = process.join("a")
    process.hub.refresh("a")
    wants, _ = process.hub.begin_fetch()
    process.hub.remove(subscription)
    process.hub.give_back(wants)
    assert process.hub.needs == {}
    process.subscribe("a")
    process.hub.give_back(wants)
    assert process.hub.needs == {}


def test_what_failed_is_needed_again():
    process = Process(a=10, b=10)
    subscription = process.join("ab", max_events=10)
    process.publish("a", 3)
    process.publish("b", 3)
    process.publish("a", 1, missed=True)
    process.hub.refresh("a")
    process.hub.refresh("b")
    wants, _ = process.hub.begin_fetch()
    process.hub.give_back(wants)
    assert process.fetch() == [("a", 3), ("b", 3)]
    assert process.all_of(subscription)[-1] == "a4"


def test_what_was_fetched_comes_out_in_slices(monkeypatch):
    monkeypatch.setattr(track, "SLICE", 2)
    process = Process(a=10)
    subscription = process.join("a", max_events=10)
    process.publish("a", 5, missed=True)
    process.hub.refresh("a")
    [(want, past)] = process.begin()
    assert process.hub.apply(want, past, 0.0) == Outcome()
    assert subscription.take() == []
    rung = []
    for expected, more in (["a1", "a2"], True), (["a3", "a4"], True), (["a5"], False):
        outcome, left = process.hub.go_on(want, 0.0)
        assert left == more
        rung += woken(outcome)
        assert process.seen(subscription.take()) == expected
    assert rung == [subscription] * 3


def test_what_is_fetched_crowds_and_overflows_as_what_comes_live():
    process = Process(a=100)
    one, plain = process.join("a", max_events=4), process.join("ap", max_events=4)
    process.publish("a", 60, missed=True)
    process.hub.refresh("a")
    [(want, past)] = process.begin()
    outcome = process.hub.apply(want, past, 0.0)
    outcome, _ = process.hub.go_on(want, 0.0)
    assert outcome.behind == [one]
    assert outcome.ended == [plain]
    assert set(outcome.crowded) == {one, plain}
    assert process.all_of(one) == [f"a{number}" for number in range(1, 61)]


def test_what_is_fetched_may_leave_nobody_listening():
    process = Process(a=100)
    process.join("ap", max_events=4)
    process.publish("a", 60, missed=True)
    process.hub.refresh("a")
    [(want, past)] = process.begin()
    process.hub.apply(want, past, 0.0)
    outcome, more = process.hub.go_on(want, 0.0)
    assert (outcome.idle, more) == (["a", "p"], False)
    assert process.hub.channels == []


def test_recent_events_of_all_channels_together_are_bounded(monkeypatch):
    monkeypatch.setattr(hub_module, "RECENT_BYTES", 40 * 1024)
    process = Process(a=1000, b=1000)
    subscription = process.join("ab", max_events=10_000, max_bytes=10**9)
    for number in range(200):
        process.publish("ab"[number % 2])
    sizes = [each.size for each in subscription.audience.tracks]
    assert sum(sizes) <= 45 * 1024
    assert min(sizes) > 0
    assert len(subscription) == 200
    process.fetched.clear()
    again = process.subscribe("ab")
    assert process.place(again, process.at(a=0, b=0)) == (False, None, {})
    assert len(process.all_of(again)) == 200
    assert len(process.fetched) >= 2


def test_recent_events_take_a_bounded_part_of_a_process():
    assert hub_module.RECENT_BYTES <= 64 * 1024 * 1024


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

    def take(self, limit=None, max_bytes=None):
        given = self.first(limit, max_bytes)
        del self.waiting[: len(given)]
        self.taken += len(given)
        return given


@dataclass(eq=False)
class Rank:
    """Clients that go on in step, in lists."""

    audience: object
    cursor: object
    #: What a client has waiting that stands there.
    place: Client
    members: list[Client] = field(default_factory=list)
    begun: bool = False
    #: Whether one has gone another way since that was last looked at.
    deserted: bool = False


CHANNELS = st.sampled_from("abc")


class HubAgainstLists(RuleBasedStateMachine):
    """Whatever is done in whatever order, the hub says and holds what a dict of lists would."""

    clients = Bundle("clients")
    ranks = Bundle("ranks")

    def __init__(self):
        super().__init__()
        self.hub = Hub()
        self.known = {}  # client -> its subscription, for the clients that ever were
        self.in_ranks = []  # all that ever were
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

    @rule(target=clients, client=clients, claimed=st.booleans())
    def subscribe_too(self, client, claimed):
        """Have another one get what that one gets."""
        return self.subscribe(client.channels, client.max_events, client.max_bytes, claimed)

    @rule(channel=CHANNELS, size=st.integers(0, 8))
    def publish(self, channel, size):
        self.published += 1
        text = str(self.published).rjust(size, ".")
        wake, crowded, ended, gone = [], [], [], []
        listeners = list(self.listeners.get(channel, []))
        for client in listeners:
            if client.abandoned is not None:
                client.abandoned += 1
                continue
            if not client.fits(text):
                client.ended = "overflow"
                self.goes_alone(client)
                gone.append(client)
                if client.claimed:
                    ended.append(client)
                continue
            if client.alert and client.claimed:
                wake.append(self.known[client])
            client.alert = False
            client.waiting.append(text)
            if client.claimed and not client.slow and client.crowded:
                crowded.append(client)
        for rank in self.in_ranks:
            if channel in rank.place.channels:
                rank.place.waiting.append(text)
        audiences = {self.known[client].audience for client in listeners}
        wake += [self.bells[audience] for audience in audiences if audience in self.bells]
        outcome = publish(self.hub, channel, text)
        # When those whose stream is gone are forgotten is the hub's own business, up to a point.
        left = self.hub.subscriptions
        for client in listeners:
            if client.abandoned is not None and self.known[client] not in left:
                client.abandoned = None
                client.waiting = []
                self.goes_alone(client)
                gone.append(client)
        idle = [channel for client in gone for channel in self.forget(client)]
        assert Counter(woken(outcome)) == Counter(wake)
        assert Counter(outcome.crowded) == Counter(self.known[client] for client in crowded)
        assert Counter(outcome.ended) == Counter(self.known[client] for client in ended)
        assert Counter(outcome.idle) == Counter(idle)

    @rule(
        client=clients,
        limit=st.none() | st.integers(0, 3),
        max_bytes=st.none() | st.integers(1, 12),
    )
    def take(self, client, limit, max_bytes):
        if client.abandoned is not None:
            return
        taken = client.take(limit if max_bytes is None else None, max_bytes)
        if taken:
            self.goes_alone(client)
        if not client.waiting and client.ended is None:
            client.alert = not client.shared
            client.slow = client.slow and bool(taken)
        if max_bytes is not None:
            is_all = not client.waiting and client.ended is None and not client.slow
            assert self.known[client].take_chunk(max_bytes) == ("".join(taken).encode(), is_all)
        else:
            assert texts(self.known[client].take(limit)) == taken

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
                if expected[-1]:
                    self.goes_alone(each)
                more = more or bool(each.waiting)
            same.setdefault(place, []).append(len(expected) - 1)
        chunks, said_more = audience.advance([self.known[each] for each in several], max_bytes)
        assert chunks == expected
        assert said_more == more
        for place, indices in same.items():
            if isinstance(place, tuple):
                assert len({id(chunks[index]) for index in indices if chunks[index] is not None}) <= 1

    @rule(target=ranks, client=clients, seed=st.randoms(use_true_random=False))
    def rank(self, client, seed):
        """Where a client stands, who need not be able to join it."""
        if client.ended is not None:
            return multiple()
        subscription = self.known[client]
        place = Client(client.channels, 0, 0, False, waiting=list(client.waiting))
        rank = Rank(subscription.audience, subscription.audience.common_cursor(subscription), place)
        self.in_ranks.append(rank)
        self._fall_in(rank, [client])
        self.fall_in(rank, seed)
        return rank

    @rule(rank=ranks, seed=st.randoms(use_true_random=False))
    def fall_in(self, rank, seed):
        if rank.begun and not rank.members:
            return  # when all have gone another way it is of no use any more
        several = [each for each in self.known if self.known[each].audience is rank.audience]
        self._fall_in(rank, seed.sample(several, seed.randint(0, len(several))))

    def _fall_in(self, rank, several):
        for each in several:
            may = each.ended is None and not each.slow and each.waiting == rank.place.waiting
            if each not in rank.members:
                assert self.known[each].fall_in(rank.cursor) == may
                if may:
                    self.goes_alone(each)
                    rank.members.append(each)
                    rank.begun = True

    @precondition(lambda self: any(rank.members for rank in self.in_ranks))
    @rule(number=st.integers(0, 3), max_bytes=st.integers(1, 12))
    def step(self, number, max_bytes):
        ranks = [rank for rank in self.in_ranks if rank.members]
        rank = ranks[number % len(ranks)]
        given = rank.place.take(None, max_bytes)
        for each in rank.members:
            each.alike += len("".join(given))
            if each.abandoned is None:
                assert each.take(None, max_bytes) == given
            else:
                each.taken += len(given)
        expected = "".join(given).encode(), bool(rank.place.waiting)
        assert rank.audience.step(rank.cursor, max_bytes) == expected

    @rule(rank=ranks)
    def muster(self, rank):
        rank.deserted = rank.cursor.deserted = False

    @rule(client=clients)
    def falls_out(self, client):
        self.goes_alone(client)
        self.known[client].fall_out()

    def goes_alone(self, client):
        for rank in self.in_ranks:
            if client in rank.members:
                rank.members.remove(client)
                rank.deserted = True

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
        self.goes_alone(client)
        self.known[client].end(reason, clear=clear)
        assert self.hub.remove(self.known[client]) == self.forget(client)

    @rule(client=clients)
    def claim(self, client):
        client.claimed = True
        claim(self.known[client])
        self.known[client].audience.look_again()

    @rule(client=clients)
    def is_given_up(self, client):
        self.known[client].be_slow()
        client.slow = True
        self.goes_alone(client)

    @rule(client=clients, slow=st.booleans())
    def is_said_to_be_slow(self, client, slow):
        if slow:
            self.is_given_up(client)
        else:
            client.slow = self.known[client].slow = False
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
    def those_in_step_are_so_and_nobody_else(self):
        for rank in self.in_ranks:
            assert rank.cursor.deserted == rank.deserted
            for client, subscription in self.known.items():
                assert subscription.is_at(rank.cursor) == (client in rank.members)

    @invariant()
    def an_abandoned_one_is_forgotten_before_it_would_be_full(self):
        for client in self.known:
            assert client.abandoned is None or client.abandoned <= client.max_events


TestHubAgainstLists = HubAgainstLists.TestCase
TestHubAgainstLists.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


# --- all of it at once, with history: one broker, several processes, several clients ---

#: So many stories are told, in so many parts: none may take too long on a busy machine.
EXAMPLES = 10_000 if os.environ.get("CI", "").lower() in ("1", "true", "yes") else 1_000
PARTS = 20

KEPT = {"a": History("a", 3, 100), "b": History("b", 8, 60)}
CURSORS = Cursors([b"key"])
GARBAGE = ["", "garbage", "1", Cursors([b"other"]).encode({"a": Position(1, 1, 1)}), CURSORS.encode({})]


class Worker:
    """A process: its hub, the connection on which it receives, and what it does about what the hub needs."""

    def __init__(self, machine):
        self.machine = machine
        self.hub = Hub(CURSORS)
        self.connected = True
        #: Channels that the broker sends it.
        self.heard = set()
        #: What is on its way: calls that are made in this order.
        self.arriving = deque()
        self.fetches_begun = 0
        self._fetch = iter(())
        self.failing = None
        #: By audience, clients that go on in step.
        self.rows = {}

    def receives(self, channel, call):
        if self.connected and channel in self.heard:
            self.arriving.append(call)

    def cut(self):
        self.connected = False
        self.arriving.clear()

    def reconnect(self):
        self.connected = True
        self.heard = set(self.hub.channels)
        for channel in self.hub.channels:
            self.arriving.append(partial(self.hub.refresh, channel))

    def hears(self, channel, event, frame, position=None):
        self.follow(self.hub.publish(channel, event, frame, position, self.machine.now))

    def follow(self, outcome):
        for wake in outcome.wake:
            wake()
        for subscription in outcome.ended:
            subscription.wake()
        self.heard.difference_update(outcome.idle)

    def fetch_on(self):
        """Do one step of a fetch; return whether there was one."""
        if next(self._fetch, None) is None:
            self._fetch = self._fetching()
            return next(self._fetch, None) is not None
        return True

    def _fetching(self):
        wants, wake = self.hub.begin_fetch()
        number = self.fetches_begun = self.fetches_begun + 1
        for each in wake:
            each()
        refused = set()
        if wants:
            yield "begun"
            if self.failing == "all":
                self.failing = None
                self.hub.give_back(wants)
                refused.update(self.hub.channels)
                wants = []
            pasts = []
            for want in wants:
                pasts.append(self.machine.timelines[want.track.channel].past(want.lowest, self.machine.now))
                yield "read"
            for want, past in zip(wants, pasts, strict=True):
                if self.failing == want.track.channel:
                    self.failing = None
                    self.hub.give_back([want])
                    refused.add(want.track.channel)
                    continue
                self.follow(self.hub.apply(want, past, self.machine.now))
                more = True
                while more:
                    yield "applied"
                    outcome, more = self.hub.go_on(want, self.machine.now)
                    self.follow(outcome)
        for client in self.machine.clients:
            if client.worker is self and client.waits_for is not None and client.waits_for < number:
                if refused.isdisjoint(client.channels):
                    client.place()
                else:
                    client.leave()
                yield "placed"


class Row:
    """Clients that go on in step, by their subscription, as their stream serves them."""

    def __init__(self, subscription):
        self.audience = subscription.audience
        self.cursor = self.audience.common_cursor(subscription)
        self.clients = {}

    def add(self, client):
        """Have it go in step, if it can."""
        if client.subscription not in self.clients and client.subscription.fall_in(self.cursor):
            self.clients[client.subscription] = client

    def muster(self):
        """Drop those who have gone another way; none has, unless that is said."""
        here = {each: client for each, client in self.clients.items() if each.is_at(self.cursor)}
        assert self.cursor.deserted or here == self.clients
        self.cursor.deserted = False
        self.clients = here

    def step(self, max_bytes):
        """Send all of them what waits; return whether there was something."""
        chunk, _ = self.audience.step(self.cursor, max_bytes)
        for subscription, client in self.clients.items():
            assert client.subscription is subscription
            client.see_all()
            client._sent.extend(blocks(chunk))
            client.awake = bool(chunk)
        return bool(chunk)


class Browser:
    """A client, and what it has seen: in order, once, and nothing missing, or a word that it is gone."""

    def __init__(self, machine, channels, max_events, max_bytes, resets_itself, shared):
        self.machine = machine
        self.channels = channels
        self.kept = [channel for channel in channels if channel in KEPT]
        self.bounds = {"max_events": max_events, "max_bytes": max_bytes}
        self.resets_itself = resets_itself
        self.shared = shared
        self.last_id = None
        #: Where it is, by channel, as its last id says.
        self.at = {}
        self.worker = None

    def connect(self, worker, last_id, at_once):
        self.worker = worker
        self.last_id = last_id
        self.opened = False
        # Channels of which it was told that something is gone, since the last id.
        self._told = set()
        # What was sent to it, and has not arrived.
        self._sent = deque()
        # Events that cannot be had again, which it is to see.
        self._passing = deque()
        self._may_overflow = len(self.kept) < len(self.channels)
        self._asked = {}
        self.waits_for = None
        self.awake = True
        hub = worker.hub
        self.subscription, first = hub.subscribe(
            self.channels, **self.bounds, histories={channel: KEPT[channel] for channel in self.kept}
        )
        self.subscription.ends_on_reset = self.resets_itself
        worker.heard.update(first)
        if first or (worker.arriving and not at_once):
            worker.arriving.append(partial(self.received, self.subscription))
        else:
            self.place()

    def received(self, subscription):
        """All channels are being received."""
        if self.subscription is subscription:
            self.place()

    def place(self):
        self.waits_for = None
        if self.subscription.ended is not None:
            self.check_end()
            self.leave()
            return
        positions = None if self.last_id is None else CURSORS.decode(self.last_id, self.channels)
        placement = self.worker.hub.place(self.subscription, positions, self.machine.now, self._asked)
        if placement is None:
            self.waits_for = self.worker.fetches_begun
            return
        self.opened = True
        assert placement.is_first == (positions is None)
        if positions is None:
            assert placement.resets == {}
            self.at = {}
        else:
            unknown = [channel for channel in self.kept if channel not in positions]
            assert placement.resets.get("unknown", []) == unknown
            for channel in unknown:
                self.at.pop(channel, None)
            for reason, channels in placement.resets.items():
                assert reason == "unknown" or all(self.at[channel].justifies(reason) for channel in channels)
        assert (placement.cursor is None) == (positions is not None and not placement.resets)
        for reason, channels in placement.resets.items():
            self._sent.append({"event": "stream-reset", "data": reset_event(channels, reason).data})
        if placement.cursor is not None:
            self._sent.append({"id": placement.cursor})
        if self.shared:
            self.subscription.shared = True
            self.subscription.audience.waiting.pop(self.subscription, None)
            self.subscription.audience.bells[self.wake] = None

    def wake(self):
        self.awake = True

    def is_to_see(self, text):
        """An event that cannot be had again has come to its process."""
        self._may_overflow = True
        if self.opened and self.subscription.ended is None:
            self._passing.append(text)

    def take(self, limit=None, max_bytes=None):
        """Take what waits, as its stream would; what was taken before has arrived by then."""
        self.see_all()
        if not self.opened or not self.awake:
            return
        subscription = self.subscription
        subscription.wake = self.wake
        # Or two resets: of several channels, for different reasons.
        assert len(subscription) <= max(2, self.bounds["max_events"]) or self._may_overflow
        row = self.worker.rows.get(subscription.audience)
        if row is not None:
            row.muster()
            if subscription in row.clients:
                row.step(max_bytes or 1000)
                return
        if self.shared:
            [chunk], _ = subscription.audience.advance([subscription], max_bytes or 1000)
            if chunk is not None:
                self._sent.extend(blocks(chunk))
                self.awake = bool(chunk)
                if chunk or subscription.ended is None:
                    return
        ended = subscription.ended
        if max_bytes is not None:
            taken, _ = subscription.take_chunk(max_bytes)
            self._sent.extend(blocks(taken))
        else:
            taken = subscription.take(limit)
            for event, frame in taken:
                assert frame == encode(event)
                self._sent.extend(blocks(frame))
        if not taken and ended is not None:
            self.check_end()
            self.leave()
            return
        self.awake = subscription.ended is not None or (bool(taken) and not subscription.drained)

    def fall_in(self):
        """Go in step with the others who get the same and stand where it does, or begin to."""
        if self.opened and self.shared:
            rows, audience = self.worker.rows, self.subscription.audience
            if audience in rows:
                rows[audience].muster()
            if audience not in rows or not rows[audience].clients:
                rows[audience] = Row(self.subscription)
            rows[audience].add(self)

    def check_end(self):
        ended = self.subscription.ended
        if ended == "overflow":
            assert self._may_overflow
        else:
            assert ended == "reset"
            assert self.resets_itself
            assert not self.opened or any(
                self.at[channel].justifies(reason) for channel in self.kept for reason in ("epoch", "expired")
            )

    def leave(self, seen=None):
        """Lose the connection, when `seen` of what was sent have arrived; `None`: all."""
        for _ in range(len(self._sent) if seen is None else min(seen, len(self._sent))):
            self.see(self._sent.popleft())
        self.subscription.audience.bells.pop(self.wake, None)
        self.worker.heard.difference_update(self.worker.hub.remove(self.subscription))
        self.worker = self.subscription = self.waits_for = None
        self.opened = False

    def see_all(self):
        while self._sent:
            self.see(self._sent.popleft())

    def see(self, block):
        channel = None
        if block.get("event") == "stream-reset":
            told = json.loads(block["data"])
            assert not self.resets_itself or "id" not in block
            for each in told["channels"]:
                assert each in self.kept
                if told["reason"] != "unknown":
                    assert self.at[each].justifies(told["reason"]), (self.at[each], told)
            self._told.update(told["channels"])
        elif "data" in block:
            moment = self.machine.moments.get(block["data"])
            if moment is None:
                assert "id" not in block
                assert block["data"] == self._passing.popleft()
            else:
                channel = moment.channel
                assert channel not in self._told
                assert moment.before.seen is self.at[channel].seen, (self.at[channel], moment)
                assert "id" in block
        if "id" in block:
            self.last_id = block["id"]
            positions = CURSORS.decode(self.last_id, KEPT)
            assert set(positions) == set(self.kept)
            for each, position in positions.items():
                now = self.machine.timelines[each].moments[position]
                if each == channel:
                    assert now is moment
                elif each in self.at and each not in self._told:
                    assert now.seen is self.at[each].seen, (now, self.at[each])
                self.at[each] = now
            self.at = {each: self.at[each] for each in positions}
            self._told.clear()


def blocks(chunk):
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in chunk.decode().split("\n\n")[:-1]]


WORKERS = st.integers(0, 1)
BROWSERS = st.integers(0, 3)
FEW = st.integers(1, 5)
SEEDS = st.integers(0, 2**32 - 1)
#: What happens all the time, and how often.
USUAL = {
    "publish": 4,
    "take": 7,
    "deliver": 4,
    "fetch": 3,
    "falls": 5,
    "returns": 3,
    "connect": 1,
    "cut": 1,
    "accident": 1,
}
ACCIDENTS = ["flush", "save", "restore", "time", "shrink", "fail", "without history"]
#: Channels, bounds, whether the view has its own way of a reset, and whether it is served with others.
OPTIONS = st.sampled_from(
    [
        *product(["a"], [2, 10], [10_000], [False], [False]),
        *product(["a", "b", "ab"], [1, 2, 4], [10_000, 150], [False, True], [False, True]),
        *product(["ba", "ap", "bpa"], [1, 4], [10_000], [False, True], [False, True]),
        # Those that often go in step: they seldom cannot keep up.
        *product(["a", "ba", "ap"], [6, 12, 30], [10_000], [False, True], [True]),
    ]
)


class HubsAgainstOneBroker(RuleBasedStateMachine):
    """Whatever happens in whatever order, every client sees all in order and once, or hears that some is gone.

    And it hears that only where it is so.
    """

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(track, "PENDING", 3)
        self.patch.setattr(track, "SLICE", 2)
        self.patch.setattr(track, "FURTHER", 1)
        self.now = 0.0
        self.timelines = timelines(KEPT)
        self.saved = None
        #: The events that are in a history, by what they say.
        self.moments = {}
        self.workers = [Worker(self), Worker(self)]
        self.clients = []
        self.published = 0

    # Or pairs who get the same: only these go in step.
    @initialize(several=st.tuples(*[OPTIONS] * 4) | st.tuples(OPTIONS, OPTIONS).map(lambda two: two * 2), seed=SEEDS)
    def there_are(self, several, seed):
        self.clients = [Browser(self, *options) for options in several]
        self.a_while_passes(seed)

    def client(self, number):
        return self.clients[number % len(self.clients)]

    # What clients do

    @rule(number=BROWSERS, which=WORKERS, seen=st.none() | st.integers(0, 3), patient=st.booleans())
    def comes_back(self, number, which, seen=None, patient=True):
        """After it has lost its connection, if it had one, having seen so many of the events that were sent."""
        client = self.client(number)
        if client.worker is not None:
            client.leave(seen)
        self._connect(client, which, client.last_id, patient)

    @rule(
        number=BROWSERS,
        which=WORKERS,
        last_id=st.sampled_from([None, *GARBAGE]),
        channels=st.sampled_from(["a", "ab", ""]),
    )
    def comes_anew(self, number, which, last_id, channels):
        """With an id that is none, or with its own one for other channels."""
        client = self.client(number)
        if client.worker is not None:
            client.leave()
        if channels:
            client.channels, client.kept = channels, list(channels)
            last_id = client.last_id
        self._connect(client, which, last_id, True)

    def _connect(self, client, which, last_id, patient):
        worker = self.workers[which]
        if worker.connected:
            client.connect(worker, last_id, at_once=not patient)
            while patient and client.worker is worker and not client.opened:
                if worker.arriving:
                    worker.arriving.popleft()()
                else:
                    worker.fetch_on()

    @rule(number=BROWSERS, limit=st.none() | st.integers(1, 3), max_bytes=st.none() | st.integers(1, 200))
    def takes(self, number, limit=None, max_bytes=None):
        if self.client(number).worker is not None:
            self.client(number).take(limit, max_bytes)

    @rule(number=BROWSERS, how=st.sampled_from(["in", "in", "in", "out", "slow"]))
    def falls(self, number, how):
        """In, to go in step with others; or out, maybe because it does not take what it is sent."""
        client = self.client(number)
        if client.worker is None:
            return
        if how == "in":
            worker, audience = client.worker, client.subscription.audience
            for each in self.clients:
                if each.worker is worker and each.subscription.audience is audience:
                    each.take()
                    if each.worker is not None:
                        each.fall_in()
        elif how == "out":
            client.subscription.fall_out()
        else:
            client.subscription.be_slow()

    @rule(number=BROWSERS, seen=st.integers(0, 5))
    def leaves(self, number, seen):
        if self.client(number).worker is not None:
            self.client(number).leave(seen)

    # What is published

    @rule(
        channel=st.sampled_from("aab"),
        count=FEW,
        delivered=st.booleans(),
        readable=st.sampled_from([True, True, True, False]),
    )
    def publish(self, channel, count, delivered=False, readable=True):
        for _ in range(count):
            self.published += 1
            text = str(self.published) if readable else None
            moment = self.timelines[channel].publish(text, self.now)
            if readable:
                self.moments[text] = moment
                for worker in self.workers:
                    worker.receives(channel, partial(worker.hears, channel, *item(text), moment.position))
        if delivered:
            for which in (0, 1):
                self.deliver(which, 100)

    def publish_without_history(self, channel):
        self.published += 1
        event, frame = item(f"p{self.published}", "an id")
        for worker in self.workers:
            worker.receives(channel, partial(self._passes, worker, channel, event, frame))

    def _passes(self, worker, channel, event, frame):
        for client in self.clients:
            if client.worker is worker and channel in client.channels:
                client.is_to_see(event.data)
        worker.hears(channel, event, frame)

    # What processes do

    @rule(which=WORKERS, count=FEW)
    def deliver(self, which, count):
        arriving = self.workers[which].arriving
        for _ in range(min(count, len(arriving))):
            arriving.popleft()()

    @rule(which=WORKERS, count=st.integers(1, 8))
    def fetch(self, which, count):
        for _ in range(count):
            self.workers[which].fetch_on()

    # What happens to them

    @rule(which=WORKERS, seen=FEW)
    def is_cut(self, which, seen):
        """It receives some of what is on its way, and nothing until it is connected again."""
        self.deliver(which, seen - 1)
        worker = self.workers[which]
        worker.cut()
        for client in self.clients:  # those that were to be told that their channels are received
            if client.worker is worker and not client.opened and client.waits_for is None:
                client.leave()

    @rule(which=WORKERS)
    def is_connected(self, which):
        if not self.workers[which].connected:
            self.workers[which].reconnect()

    @rule(
        what=st.sampled_from(ACCIDENTS),
        which=WORKERS,
        channel=st.sampled_from("pab"),
        seconds=st.sampled_from([30, 70, 200]),
    )
    def happens(self, what, which, channel, seconds):
        if what == "flush":
            for timeline in self.timelines.values():
                timeline.flush()
        elif what == "save":
            self.saved = {channel: timeline.save() for channel, timeline in self.timelines.items()}
        elif what == "restore" and self.saved is not None:
            for each, timeline in self.timelines.items():
                timeline.restore(self.saved[each])
            for each in (0, 1):
                self.is_cut(each, 1)
        elif what == "time":
            self.now += seconds
            for timeline in self.timelines.values():
                timeline.expire(self.now)
        elif what == "shrink":
            for each in self.workers[which].hub._tracks.values():
                each.shrink()
        elif what == "fail":
            self.workers[which].failing = {"p": "all"}.get(channel, channel)
        elif what == "without history":
            self.publish_without_history(channel)

    @rule(seed=SEEDS)
    def a_while_passes(self, seed):
        """Much of what happens all the time."""
        draw = Random(seed)
        for what in draw.choices([*USUAL], [*USUAL.values()], k=60):
            which, number, few = draw.randrange(2), draw.randrange(4), draw.randint(1, 4)
            match what:
                case "publish":
                    self.publish(draw.choice("aab"), few, delivered=draw.random() < 0.5)
                case "take":
                    self.takes(number, draw.choice([None, None, 1, 2]))
                case "deliver":
                    self.deliver(which, few)
                case "fetch":
                    self.fetch(which, few)
                case "falls":
                    self.falls(number, draw.choice(["in", "in", "in", "in", "out", "slow"]))
                case "returns":
                    self.comes_back(number, which, draw.choice([None, None, 0, 1, 2, 3]), draw.random() < 0.7)
                case "connect":
                    self.is_connected(which)
                case "cut":
                    self.is_cut(which, few)
                case "accident":
                    self.happens(draw.choice(ACCIDENTS), which, draw.choice("pab"), draw.choice([30, 70, 200]))

    # What is so whenever all is quiet

    @rule()
    def settle(self):
        for worker in self.workers:
            if not worker.connected:
                worker.reconnect()
        for _ in range(100):
            if not self._does_anything():
                break
        else:
            raise AssertionError("it never becomes quiet")
        for client in self.clients:
            if client.worker is not None:
                assert client.opened
                assert not client._passing
                for channel in client.kept:
                    moment, timeline = client.at[channel], self.timelines[channel]
                    assert timeline.is_secret or moment.seen is timeline.top.seen, (moment, timeline.top)

    def _does_anything(self):
        done = False
        for worker in self.workers:
            while worker.arriving:
                worker.arriving.popleft()()
                done = True
            waits = any(client.worker is worker and client.waits_for is not None for client in self.clients)
            for _ in range(1000):
                if not (worker.fetch_on() or worker.hub.needs or waits):
                    break
                waits = False
                done = True
            else:
                raise AssertionError("it never has what it needs")
        for client in self.clients:
            if client.worker is not None:
                done = done or (client.awake and client.opened) or bool(client._sent)
                client.take()
        return done

    def teardown(self):
        self.patch.undo()
        if sys.exc_info()[0] is not None:  # what has failed is what is to be told
            return
        for channel in KEPT:
            self.publish(channel, 1)
        self.settle()
        for number, client in enumerate(self.clients):
            if client.worker is None:
                self.comes_back(number, number % 2)
        self.settle()


@pytest.mark.timeout(300)  # seconds; a tenth of that where it is not measured, and nobody else is busy
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.heavy) for part in range(1, PARTS))])
def test_every_client_sees_all_in_order_and_once_or_hears_that_it_is_gone(part):
    machine = type("Part", (HubsAgainstOneBroker,), {})
    if settings().derandomize:  # as in CI: not the same ones in each part
        machine = seed(part)(machine)
    run_state_machine_as_test(
        machine, settings=settings(deadline=None, max_examples=EXAMPLES // PARTS, stateful_step_count=8)
    )
