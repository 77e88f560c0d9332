"""An audience: what waits for each of its subscriptions, whom to wake, and what becomes of those who cannot keep up."""

import gc
import weakref
from collections import Counter

import pytest

from django_sse.event import Event
from django_sse.hub import Hub
from tests.helpers.listening import Process, publish, share, subscribe, texts, woken
from tests.helpers.timeline import item

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
    ],
)
def test_a_chunk_is_of_no_more_after_the_event_that_makes_it_the_bytes_asked_for(max_bytes, expected):
    hub = Hub()
    subscription = subscribe(hub, "a")
    publish(hub, "a", "12", "34", "56")
    assert subscription.take_chunk(max_bytes) == ("".join(expected).encode(), len(expected) == 3)
    assert texts(subscription.take()) == ["12", "34", "56"][len(expected) :]


def test_an_event_above_the_bytes_asked_for_is_given_alone():
    hub = Hub()
    subscription = subscribe(hub, "a")
    publish(hub, "a", "123456", "7")
    assert subscription.take_chunk(2) == (b"123456", False)
    assert subscription.take_chunk(2) == (b"7", True)


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_what_was_taken_makes_room_for_as_many_bytes(limit):
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=4)
    for _ in range(5):
        publish(hub, "a", "12", "34")
        assert subscription.ended is None
        taken = subscription.take(limit) + subscription.take(limit)
        assert texts(taken) == ["12", "34"]


@pytest.mark.parametrize("max_bytes", [1, 3])
def test_a_chunk_that_was_taken_makes_room_for_as_many_bytes(max_bytes):
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=4)
    for _ in range(5):
        publish(hub, "a", "12", "34")
        assert subscription.ended is None
        assert subscription.take_chunk(max_bytes)[0] + subscription.take_chunk(max_bytes)[0] == b"1234"


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
    assert publish(hub, "a", "1", "2").ended == []
    assert subscription.ended is None
    outcome = publish(hub, "a", "3")
    assert subscription.ended == "overflow"
    assert outcome.ended == [subscription]
    assert outcome.wake == outcome.crowded == []


def test_one_byte_too_many_ends_the_subscription():
    hub = Hub()
    subscription = subscribe(hub, "a", max_bytes=6)
    publish(hub, "a", "123", "456")
    assert subscription.ended is None
    assert publish(hub, "a", "7").ended == [subscription]
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
    assert publish(hub, "a", "1", "23456").ended == [before]
    assert publish(hub, "b", "12345", "").ended == [after]
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


def test_an_unclaimed_subscription_gets_its_events_and_never_counts_as_crowded():
    hub = Hub()
    subscription = subscribe(hub, "a", max_events=3, claimed=False)
    for text in "123":
        assert publish(hub, "a", text).crowded == []
    assert texts(subscription.take()) == ["1", "2", "3"]


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
        expected, is_all = alone.take_chunk(max_bytes)
        left = not is_all
        assert advance(one, two, max_bytes=max_bytes) == ([expected] * 2, left)
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


# --- several in step ---


def fall_in(*subscriptions):
    """Have them go on in step, from where the first of them stands; return at which cursor."""
    cursor = subscriptions[0].audience.common_cursor(subscriptions[0])
    for subscription in subscriptions:
        assert subscription.fall_in(cursor)
    return cursor


def step(cursor, *subscriptions, max_bytes=1000):
    """Take for those at `cursor`, one of whom is the first of `subscriptions`."""
    return subscriptions[0].audience.step(cursor, max_bytes)


def test_those_who_stand_at_one_place_may_fall_in():
    hub = Hub()
    early = [subscribe(hub, "a") for _ in range(2)]
    publish(hub, "a", "1")
    late = subscribe(hub, "a")
    publish(hub, "a", "2")
    early[0].take(1)
    cursor = early[0].audience.common_cursor(early[0])
    assert not any(each.is_at(cursor) for each in (*early, late))
    assert [each.fall_in(cursor) for each in (early[1], late, early[0])] == [False, True, True]
    assert [each.is_at(cursor) for each in (*early, late)] == [True, False, True]
    assert not cursor.deserted
    assert step(cursor, late) == (b"2", False)
    assert texts(early[1].take()) == ["1", "2"]


def test_who_has_come_to_where_the_others_stand_may_fall_in():
    hub = Hub()
    one, two, late = [subscribe(hub, "a") for _ in range(3)]
    cursor = fall_in(one, two)
    publish(hub, "a", "1", "2")
    step(cursor, one)
    assert not late.fall_in(cursor)
    assert advance(late) == ([b"12"], False)
    assert late.fall_in(cursor)
    publish(hub, "a", "3")
    assert step(cursor, one) == (b"3", False)
    assert [texts(each.take()) for each in (one, two, late)] == [[], [], []]


@pytest.mark.parametrize("reason", ["shutdown", "client", "abandoned"])
@pytest.mark.parametrize("waiting", [0, 2])
def test_who_has_ended_does_not_fall_in(reason, waiting):
    hub = Hub()
    ended, other = subscribe(hub, "a"), subscribe(hub, "a")
    for text in "12"[:waiting]:
        publish(hub, "a", text)
    if reason == "abandoned":  # as `Listener.leave()` does, which takes no lock
        ended.ended = reason
    else:
        ended.end(reason, clear=reason == "client")
    for each in (ended, other):
        assert not ended.fall_in(each.audience.common_cursor(each))


def test_who_is_slow_does_not_fall_in_until_it_has_caught_up():
    hub = Hub()
    slow = subscribe(hub, "a")
    slow.be_slow()
    publish(hub, "a", "1")
    assert not slow.fall_in(slow.audience.common_cursor(slow))
    assert texts(slow.take()) == ["1"]
    assert not slow.fall_in(slow.audience.common_cursor(slow))
    assert slow.take() == []
    assert slow.fall_in(slow.audience.common_cursor(slow))


def test_who_is_behind_does_not_fall_in_until_it_stands_in_the_log_again():
    process = Process(a=100)
    process.publish("a", 3)
    behind, other = process.join("a", process.at(a=0), max_events=4), process.join("a", max_events=4)
    taken = 0
    while behind.is_behind:
        assert not behind.slow
        for each in (behind, other):
            assert not behind.fall_in(each.audience.common_cursor(each))
        taken += len(behind.take(1))
    assert taken == 3
    cursor = fall_in(other, behind)
    process.publish("a")
    chunk, _ = step(cursor, other)
    assert chunk.endswith(b"data: a4\n\n")


def test_who_falls_in_elsewhere_has_gone_another_way():
    hub = Hub()
    one, two, three = [subscribe(hub, "a") for _ in range(3)]
    before = fall_in(one, two)
    after = fall_in(three, two)
    assert (before.deserted, after.deserted) == (True, False)
    assert [each.is_at(before) for each in (one, two, three)] == [True, False, False]
    assert [each.is_at(after) for each in (one, two, three)] == [False, True, True]
    publish(hub, "a", "1")
    assert step(before, one) == (b"1", False)
    assert (len(one), len(two), len(three)) == (0, 1, 1)
    assert step(after, two) == (b"1", False)
    assert (len(one), len(two), len(three)) == (0, 0, 0)


@pytest.mark.parametrize("max_bytes", [*range(1, 8), 60])
def test_a_step_takes_what_would_be_taken_for_each(max_bytes):
    hub = Hub()
    in_step, alone = [subscribe(hub, "a") for _ in range(2)], [subscribe(hub, "a") for _ in range(2)]
    cursor = fall_in(*in_step)
    for some in (["12", "34", "56"], ["7"], []):
        for text in some:
            publish(hub, "a", text)
        for _ in range(2):
            chunks, more = advance(*alone, max_bytes=max_bytes)
            assert step(cursor, *in_step, max_bytes=max_bytes) == (chunks[0], more)
            for one, other in zip(in_step, alone, strict=True):
                assert (one.events, one.bytes_alike, len(one)) == (other.events, other.bytes_alike, len(other))
                assert one._place is other._place
                assert (one.crowded, one.drained) == (other.crowded, other.drained)
    assert not cursor.deserted


def test_a_step_where_nothing_waits_is_nothing():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    cursor = fall_in(one, two)
    assert step(cursor, one) == (b"", False)
    publish(hub, "a", "1")
    assert step(cursor, one) == (b"1", False)
    assert step(cursor, one) == (b"", False)
    assert (one.events, two.bytes_alike) == (1, 1)


def test_a_single_event_is_given_to_those_in_step_as_the_very_frame():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    cursor = fall_in(one, two)
    frame = b"frame"
    hub.publish("a", Event("", "1"), frame)
    assert step(cursor, one)[0] is frame


def takes_one(hub, subscription):
    return texts(subscription.take(1))


def takes_all(hub, subscription):
    return texts(subscription.take())


def takes_a_chunk(hub, subscription):
    chunk, _ = subscription.take_chunk(1)
    return [chunk.decode()]


def takes_as_others_do(hub, subscription):
    [chunk], _ = advance(subscription, max_bytes=1)
    return [chunk.decode()]


def is_slow(hub, subscription):
    subscription.be_slow()
    assert advance(subscription)[0] == [None]
    return []


def falls_out(hub, subscription):
    subscription.fall_out()
    return []


def is_ended(hub, subscription):
    subscription.end("shutdown")
    hub.remove(subscription)
    return []


WAYS_OUT = [takes_one, takes_all, takes_a_chunk, takes_as_others_do, is_slow, falls_out, is_ended]


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("before", [0, 2])
def test_who_goes_another_way_loses_nothing_and_gets_nothing_twice_and_neither_do_the_others(way, which, before):
    hub = Hub()
    several = [subscribe(hub, "a") for _ in range(3)]
    cursor = fall_in(*several)
    for text in "12"[:before]:
        publish(hub, "a", text)
    step(cursor, *several)
    publish(hub, "a", "3", "4")
    gone = several.pop(which)
    seen = way(hub, gone)
    assert cursor.deserted
    assert not gone.is_at(cursor)
    assert all(each.is_at(cursor) for each in several)
    assert (gone.events, len(gone)) == (before + len(seen), 2 - len(seen))
    assert [(each.events, len(each)) for each in several] == [(before, 2)] * 2
    assert step(cursor, *several) == (b"34", False)
    publish(hub, "a", "5")
    assert step(cursor, *several) == (b"5", False)
    assert seen + texts(gone.take()) == ["3", "4"] + ["5"] * (way is not is_ended)
    assert (gone.events, gone.bytes_alike) == (before + 3 - (way is is_ended), before + (way is takes_as_others_do))
    assert [(each.events, each.bytes_alike) for each in several] == [(before + 3, before + 3)] * 2


@pytest.mark.parametrize("waiting", [0, 2])
def test_who_is_cleared_goes_another_way_and_gets_nothing_more(waiting):
    hub = Hub()
    one, gone = subscribe(hub, "a"), subscribe(hub, "a")
    cursor = fall_in(one, gone)
    for text in "12"[:waiting]:
        publish(hub, "a", text)
    gone.end("client", clear=True)
    assert cursor.deserted
    assert (one.is_at(cursor), gone.is_at(cursor)) == (True, False)
    publish(hub, "a", "3")
    assert step(cursor, one) == (b"12"[:waiting] + b"3", False)
    assert (gone.take(), gone.events, gone.bytes_alike) == ([], 0, 0)


def test_who_is_abandoned_goes_another_way_when_the_audience_looks_at_it():
    """`Listener.leave()` takes no lock, so it can only say so."""
    hub = Hub()
    one, gone = subscribe(hub, "a", max_events=4), subscribe(hub, "a", max_events=4)
    cursor = fall_in(one, gone)
    gone.ended = "abandoned"
    for number in range(1, 5):
        publish(hub, "a", str(number))
        assert step(cursor, one) == (str(number).encode(), False)
    assert cursor.deserted
    assert (one.is_at(cursor), gone.is_at(cursor)) == (True, False)
    assert gone.take() == []


def test_who_takes_in_vain_stays_in_step():
    hub = Hub()
    one, two = subscribe(hub, "a"), subscribe(hub, "a")
    cursor = fall_in(one, two)
    publish(hub, "a", "1")
    step(cursor, one)
    assert one.take() == []
    assert advance(one, two) == ([b"", b""], False)
    publish(hub, "a", "2")
    assert two.take(0) == []
    assert not cursor.deserted
    assert one.is_at(cursor)
    assert two.is_at(cursor)
    assert step(cursor, one) == (b"2", False)


def test_who_goes_alone_deserts_nobody():
    hub = Hub()
    one, two, alone = [subscribe(hub, "a") for _ in range(3)]
    cursor = fall_in(one, two)
    two.fall_out()
    cursor.deserted = False
    publish(hub, "a", "1")
    two.fall_out()
    two.take()
    two.be_slow()
    alone.fall_out()
    alone.end("client", clear=True)
    assert not cursor.deserted


def test_those_in_step_are_crowded_together_and_no_longer_when_they_have_taken():
    hub = Hub()
    several = [subscribe(hub, "a", max_events=4) for _ in range(2)]
    cursor = fall_in(*several)
    for _ in range(3):
        assert publish(hub, "a", "1", "2").crowded == []
        assert publish(hub, "a", "3").crowded == several
        assert all(each.crowded for each in several)
        assert step(cursor, *several) == (b"123", False)
        assert not any(each.crowded for each in several)
    assert [each.ended for each in several] == [None, None]


@pytest.mark.parametrize("bounds", [{"max_events": 3}, {"max_bytes": 3}], ids=["events", "bytes"])
def test_those_in_step_overflow_together_and_still_get_what_waited(bounds):
    hub = Hub()
    several = [subscribe(hub, "a", **bounds) for _ in range(2)]
    ahead = subscribe(hub, "a", **bounds)
    cursor = fall_in(*several)
    publish(hub, "a", "1")
    step(cursor, *several)
    assert publish(hub, "a", "2", "3", "4").ended == [ahead]
    outcome = publish(hub, "a", "5")
    assert outcome.ended == several
    assert [each.ended for each in several] == ["overflow"] * 2
    assert cursor.deserted
    assert not any(each.is_at(cursor) for each in several)
    assert several[0]._place is several[1]._place
    assert [texts(each.take()) for each in several] == [["2", "3", "4"]] * 2
    assert [each.events for each in several] == [4, 4]


@pytest.mark.parametrize("bounds", [{"max_events": 2}, {"max_bytes": 2}], ids=["events", "bytes"])
def test_what_those_in_step_have_taken_makes_room(bounds):
    hub = Hub()
    several = [subscribe(hub, "a", **bounds) for _ in range(2)]
    cursor = fall_in(*several)
    for _ in range(5):
        assert publish(hub, "a", "1", "2").ended == []
        assert step(cursor, *several) == (b"12", False)
    assert not cursor.deserted


def test_those_in_step_who_cannot_keep_up_are_behind_and_get_all_that_they_have_missed():
    process = Process(a=100)
    several = [process.join("a", max_events=4) for _ in range(2)]
    cursor = fall_in(*several)
    process.publish("a", 2)
    step(cursor, *several)
    assert process.publish("a", 5).behind == several
    assert cursor.deserted
    assert not any(each.is_at(cursor) for each in several)
    expected = ["a3", "a4", "a5", "a6", "a7"]
    assert [process.all_of(each) for each in several] == [expected, expected]
    assert [each.events for each in several] == [7, 7]
    again = fall_in(*several)
    process.publish("a")
    chunk, more = step(again, *several)
    assert (chunk.endswith(b"data: a8\n\n"), more) == (True, False)
    assert [each.bytes_alike for each in several] == [several[0].bytes_alike] * 2


# --- with history: where one begins ---


def test_who_comes_first_begins_at_the_end():
    process = Process(a=10)
    process.publish("a", 2)
    subscription = process.join("a")
    assert subscription.take() == []
    process.publish("a", 2)
    assert process.seen(subscription.take()) == ["a3", "a4"]


def test_who_comes_back_gets_what_was_missed_and_then_what_comes():
    process = Process(a=10)
    process.publish("a", 5)
    subscription = process.join("a", process.at(a=2))
    process.publish("a")
    assert process.seen(subscription.take()) == ["a3", "a4"]
    assert process.all_of(subscription) == ["a5", "a6"]
    process.publish("a")
    assert process.seen(subscription.take()) == ["a7"]


@pytest.mark.parametrize("offset", [3, None])
def test_who_has_missed_nothing_is_woken_by_the_next_event(offset):
    """His stream does not take first: nothing waits."""
    process = Process(a=10)
    process.publish("a", 3)
    subscription = process.join("a", offset and process.at(a=offset))
    assert subscription.drained
    assert woken(process.publish("a")) == [subscription]
    assert process.seen(subscription.take()) == ["a4"]


def test_who_has_missed_something_is_not_rung_for_until_he_has_it():
    process = Process(a=10)
    process.publish("a", 3)
    subscription = process.join("a", process.at(a=2))
    assert not subscription.drained
    assert woken(process.publish("a")) == []
    assert process.seen(subscription.take()) == ["a3", "a4"]
    assert woken(process.publish("a")) == [subscription]


def test_who_is_served_with_others_is_not_woken_by_himself_when_he_has_missed_nothing():
    process = Process(a=10)
    subscription = process.subscribe("a")
    share(subscription, lambda: "ring")
    process.place(subscription)
    assert woken(process.publish("a")) == ["ring"]


def test_an_event_that_waits_before_one_is_placed_is_not_for_him():
    process = Process(a=10)
    process.join("a")
    late = process.subscribe("a")
    process.publish("a", 2)
    process.place(late)
    assert late.take() == []
    later = process.subscribe("a")
    process.publish("a", 2)
    process.place(later, process.at(a=1))
    assert process.all_of(later) == ["a2", "a3", "a4"]


def test_who_has_too_much_waiting_before_he_is_placed_is_not_late():
    process = Process(a=10)
    process.join("a", max_events=100)
    subscription = process.subscribe("a", max_events=2)
    assert process.publish("a", 5).ended == []
    process.place(subscription)
    assert (subscription.ended, subscription.is_behind, subscription.slow) == (None, False, False)
    process.publish("a")
    assert process.seen(subscription.take()) == ["a6"]


# --- with history: ids ---


def test_an_event_has_an_id_that_says_where_its_channel_is():
    process = Process(a=10)
    subscription = process.join("a")
    process.publish("a", 3)
    ids = [event.id for event, _ in subscription.take()]
    assert [process.offsets(id) for id in ids] == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_an_event_has_an_id_that_says_where_all_channels_of_the_stream_are():
    process = Process(a=10, b=10)
    both, one = process.join("ab"), process.join("a")
    process.publish("a")
    process.publish("b", 2)
    process.publish("a")
    offsets = [process.offsets(event.id) for event, _ in both.take()]
    assert offsets == [{"a": 1, "b": 0}, {"a": 1, "b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 2}]
    assert [process.offsets(event.id) for event, _ in one.take()] == [{"a": 1}, {"a": 2}]


def test_an_id_says_nothing_of_a_channel_without_history():
    process = Process(a=10)
    subscription = process.join("ap")
    process.publish("a")
    process.publish_unkept("p", "p1")
    [(first, _), (second, _)] = subscription.take()
    assert process.offsets(first.id) == {"a": 1}
    assert (second.data, second.id) == ("p1", None)


@pytest.mark.parametrize("max_events", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("channels", ["a", "ab", "cab"])
def test_whoever_stops_anywhere_goes_on_there(channels, max_events):
    """After each event that is sent, of a page or not, its id brings all the others, and no more."""
    process = Process(a=20, b=20, c=20)
    counts = dict.fromkeys(channels, 0)
    for channel in "abccabbacb":
        if channel in channels:
            process.publish(channel, 2)
            counts[channel] += 2
    everything = {f"{channel}{number}" for channel in channels for number in range(1, counts[channel] + 1)}
    subscription = process.join(channels, process.at(**dict.fromkeys(channels, 0)), max_events=max_events)
    seen = set()
    while taken := subscription.take(1) or (process.fetch() and subscription.take(1)):
        [(event, _)] = taken
        seen.add(event.data)
        positions = process.CURSORS.decode(event.id, channels)
        assert {f"{name}{number}" for name in channels for number in range(1, positions[name].offset + 1)} == seen
        again = process.join(channels, positions, max_events=max_events)
        assert sorted(process.all_of(again)) == sorted(everything - seen)
        process.hub.remove(again)
    assert seen == everything


def test_an_id_of_a_foreign_event_is_dropped_where_a_channel_has_history():
    """It would be the client's last one, and the positions of its channels would be lost."""
    process = Process(a=10)
    kept, plain = process.join("ap"), process.subscribe("p")
    process.publish_unkept("p", "text", id="foreign")
    process.publish_unkept("a", "text", id="foreign")
    assert [(event, frame) for event, frame in kept.take()] == [item("text")] * 2
    assert plain.take() == [item("text", "foreign")]


# --- with history: page by page ---


def test_what_was_missed_comes_in_pages_of_half_a_mailbox():
    process = Process(a=100)
    process.publish("a", 9)
    subscription = process.join("a", process.at(a=0), max_events=6)
    pages = []
    while taken := process.seen(subscription.take()):
        assert len(subscription) == 0
        pages.append(taken)
    assert pages == [["a1", "a2", "a3"], ["a4", "a5", "a6"], ["a7", "a8", "a9"]]


def test_a_page_has_half_the_bytes_of_a_mailbox():
    process = Process(a=100)
    process.publish("a", 9)
    size = len(process.join("a", process.at(a=8)).take()[0][1])
    subscription = process.join("a", process.at(a=0), max_events=100, max_bytes=6 * size)
    assert process.seen(subscription.take()) == ["a1", "a2", "a3"]
    large = process.join("a", process.at(a=0), max_events=100, max_bytes=size)
    assert process.seen(large.take()) == ["a1"]
    assert process.all_of(large) == [f"a{number}" for number in range(2, 10)]


def test_what_comes_while_pages_are_taken_is_on_the_last_one():
    process = Process(a=100)
    process.publish("a", 5)
    subscription = process.join("a", process.at(a=0), max_events=4)
    said = []
    for _ in range(4):
        assert subscription.is_behind
        assert process.publish("a").behind == []
        said += process.seen(subscription.take())
        assert subscription.is_behind or len(said) == 8
    assert process.all_of(subscription) == ["a9"]
    assert said == [f"a{number}" for number in range(1, 9)]
    process.publish("a")
    assert process.seen(subscription.take()) == ["a10"]


def test_who_is_behind_has_no_more_waiting_than_a_page():
    process = Process(a=1000)
    process.publish("a", 5)
    subscription = process.join("a", process.at(a=0), max_events=4)
    for _ in range(50):
        assert process.publish("a").behind == []
        assert len(subscription) == 2
        assert not subscription.crowded
    assert subscription.ended is None
    assert process.all_of(subscription) == [f"a{number}" for number in range(1, 56)]


def test_the_channels_of_what_was_missed_come_one_after_the_other():
    process = Process(a=10, b=10)
    for _ in range(3):
        process.publish("a")
        process.publish("b")
    subscription = process.join("ab", process.at(a=1, b=0))
    assert process.all_of(subscription) == ["a2", "a3", "b1", "b2", "b3"]


def test_what_could_not_be_read_is_no_page():
    process = Process(a=100)
    process.publish("a", 20, readable=False)
    process.publish("a")
    subscription = process.join("a", process.at(a=0), max_events=4)
    assert process.seen(subscription.take()) == ["a21"]
    assert subscription.take() == []
    assert not subscription.is_behind


def test_what_could_not_be_read_at_the_end_is_had_too():
    process = Process(a=100)
    process.publish("a")
    process.publish("a", 20, readable=False)
    subscription = process.join("a", process.at(a=1), max_events=4)
    assert subscription.take() == []
    assert not subscription.is_behind
    assert woken(process.publish("a")) == [subscription]
    process.fetch()
    assert process.seen(subscription.take()) == ["a22"]


def test_where_a_channel_has_no_history_all_that_was_missed_is_one_page():
    """What comes to the others meanwhile is to come after it."""
    process = Process(a=100)
    process.publish("a", 50)
    subscription = process.join("pa", process.at(a=0), max_events=60)
    assert not subscription.is_behind
    process.publish_unkept("p", "p1")
    assert process.seen(subscription.take()) == [*(f"a{number}" for number in range(1, 51)), "p1"]


def test_one_page_of_more_than_a_mailbox_ends_who_does_not_take_it():
    process = Process(a=100)
    process.publish("a", 50)
    subscription = process.join("pa", process.at(a=0), max_events=4)
    assert process.publish("a").ended == [subscription]
    assert subscription.ended == "overflow"


def test_events_and_bytes_count_as_taken_if_they_were():
    process = Process(a=100)
    process.publish("a", 7)
    subscription = process.join("a", process.at(a=3), max_events=4)
    other = process.join("a")
    assert subscription.events == other.events == 0
    taken = 0
    for _ in range(3):
        taken += len(subscription.take())
        assert subscription.events == taken
    assert (taken, subscription.bytes_alike) == (4, 0)
    process.publish("a", 9)
    assert subscription.is_behind
    while more := len(subscription.take()):
        taken += more
        assert (subscription.events, subscription.bytes_alike) == (taken, 0)
    assert taken == 13
    process.publish("a")
    [chunk], _ = advance(subscription)
    assert (subscription.events, subscription.bytes_alike) == (14, len(chunk))


# --- with history: overflow ---


def test_who_cannot_keep_up_is_not_ended_but_behind():
    process = Process(a=100)
    subscription, other = process.join("a", max_events=3), process.join("a", max_events=3)
    process.publish("a", 3)
    other.take()
    outcome = process.publish("a")
    assert (outcome.behind, outcome.ended, outcome.crowded, outcome.idle) == ([subscription], [], [], [])
    assert (subscription.ended, subscription.is_behind, subscription.slow) == (None, True, True)
    assert len(subscription) == 0  # nothing is kept for it
    assert process.publish("a", 1).behind == []
    assert process.seen(other.take()) == ["a4", "a5"]
    assert process.all_of(subscription) == ["a1", "a2", "a3", "a4", "a5"]
    assert not subscription.is_behind


def test_who_is_behind_has_not_drained_when_it_has_taken_a_page():
    process = Process(a=100)
    process.publish("a", 5)
    subscription = process.join("a", process.at(a=0), max_events=4)
    for page in (["a1", "a2"], ["a3", "a4"]):
        assert process.seen(subscription.take()) == page
        assert not subscription.drained
    assert process.seen(subscription.take()) == ["a5"]
    assert subscription.drained


def test_who_is_behind_is_so_because_of_bytes_too():
    process = Process(a=100)
    process.publish("a")
    size = len(item("a1", process.hub.id_of(process.at(a=1)))[1])
    subscription = process.join("a", max_events=100, max_bytes=2 * size)
    assert process.publish("a", 2).behind == []
    assert process.publish("a").behind == [subscription]
    assert process.all_of(subscription) == ["a2", "a3", "a4"]


def test_who_is_behind_goes_on_where_it_had_come_to():
    process = Process(a=100)
    one, two = process.join("a", max_events=4), process.join("a", max_events=4)
    process.publish("a", 3)
    assert process.seen(one.take(2)) == ["a1", "a2"]
    assert process.seen(two.take(1)) == ["a1"]
    assert process.publish("a", 3).behind == [two]
    assert process.publish("a").behind == [one]
    assert process.all_of(one) == ["a3", "a4", "a5", "a6", "a7"]
    assert process.all_of(two) == ["a2", "a3", "a4", "a5", "a6", "a7"]


def test_who_is_behind_goes_on_where_it_had_come_to_in_each_channel():
    process = Process(a=100, b=100)
    subscription = process.join("ab", max_events=4)
    process.publish("a", 2)
    process.publish("b", 2)
    assert process.seen(subscription.take(3)) == ["a1", "a2", "b1"]
    process.publish("b", 4)
    assert subscription.is_behind
    assert process.all_of(subscription) == ["b2", "b3", "b4", "b5", "b6"]
    process.publish("b", 3)
    process.publish("a", 2)
    assert process.all_of(subscription) == ["a3", "a4", "b7", "b8", "b9"]


def test_who_overflows_on_the_last_page_goes_on_there():
    process = Process(a=100, b=100)
    process.publish("a", 3)
    process.publish("b", 2)
    subscription = process.join("ab", process.at(a=1, b=1), max_events=8)
    assert process.seen(subscription.take(1)) == ["a2"]
    assert not subscription.is_behind
    process.publish("b", 10)
    assert subscription.is_behind
    assert process.all_of(subscription) == ["a3", *(f"b{number}" for number in range(2, 13))]


def test_who_is_behind_has_caught_up_when_it_comes_in_vain():
    process = Process(a=100)
    subscription = process.join("a", max_events=2)
    process.publish("a", 3)
    while subscription.take():
        assert subscription.slow
        assert not subscription.drained
    assert not subscription.slow
    assert subscription.drained
    assert woken(process.publish("a")) == [subscription]


def test_who_is_behind_is_not_rung_for_and_does_not_crowd():
    process = Process(a=100)
    subscription = process.join("a", max_events=2)
    process.publish("a", 3)
    for _ in range(10):
        outcome = process.publish("a")
        assert (outcome.wake, outcome.crowded, outcome.behind, outcome.ended) == ([], [], [], [])
    assert len(subscription.take(1)) == 1
    assert process.publish("a").wake == []


def test_who_is_behind_takes_by_himself():
    process = Process(a=100)
    one, two = process.join("a", max_events=4), process.join("a", max_events=4)
    process.publish("a", 3)
    advance(two)
    process.publish("a", 2)
    assert one.is_behind
    chunks, _ = advance(one, two)
    assert chunks[0] is None
    assert chunks[1].count(b"data: ") == 2
    assert process.all_of(one) == [f"a{number}" for number in range(1, 6)]
    process.publish("a")
    chunks, _ = advance(one, two)
    assert chunks[0] is chunks[1]


def test_who_is_behind_without_being_slow_takes_by_himself():
    process = Process(a=100)
    process.publish("a", 5)
    subscription, other = process.join("a", process.at(a=0)), process.join("a")
    assert not subscription.slow
    assert advance(subscription, other)[0] == [None, b""]


def test_nothing_is_kept_for_who_is_behind():
    process = Process(a=100)
    subscription = process.join("a", max_events=2)
    process.publish("a", 50)
    assert subscription._place.next is None
    assert subscription._place is not subscription.audience.end


def test_an_overflow_ends_who_has_a_channel_without_history():
    process = Process(a=100)
    subscription = process.join("ap", max_events=2)
    process.publish("a", 2)
    outcome = process.publish("a")
    assert (outcome.ended, outcome.behind, subscription.ended) == ([subscription], [], "overflow")
    assert process.seen(subscription.take()) == ["a1", "a2"]


def test_who_waits_for_what_cannot_be_had_again_is_ended_by_an_overflow():
    process = Process(a=100)
    subscription = process.join("a", max_events=2)
    process.publish("a")
    process.publish_unkept("a", "unkept")
    outcome = process.publish("a")
    assert (outcome.ended, outcome.behind, subscription.ended) == ([subscription], [], "overflow")
    assert process.seen(subscription.take()) == ["a1", "unkept"]


def test_who_overflows_by_what_cannot_be_had_again_is_ended():
    process = Process(a=100)
    subscription = process.join("a", max_events=2)
    process.publish("a", 2)
    assert process.publish_unkept("a", "unkept").ended == [subscription]


def test_who_is_behind_is_ended_by_what_cannot_be_had_again():
    """It would never get it."""
    process = Process(a=100)
    behind, paging, other = (process.join("a", max_events=2) for _ in range(3))
    process.publish("a", 2)
    other.take()
    process.publish("a")
    assert process.seen(paging.take()) == ["a1"]
    outcome = process.publish_unkept("a", "unkept")
    assert outcome.ended == [behind, paging]
    assert (behind.ended, paging.ended, other.ended) == ("overflow", "overflow", None)
    assert (behind.take(), paging.take()) == ([], [])
    assert process.seen(other.take()) == ["a3", "unkept"]
    assert process.hub.subscriptions == {other}


def test_a_reset_can_be_had_again():
    process = Process(a=3)
    behind, other = process.join("a", max_events=2), process.join("a", max_events=100)
    process.publish("a", 3)
    process.publish("a", 9, missed=True)
    process.hub.refresh("a")
    process.fetch()
    assert behind.ended is None
    assert process.all_of(other) == ["a1", "a2", "a3", ("expired", "A")]


# --- with history: what has to be fetched ---


def forget_all(process):
    """Let the process have no recent events."""
    for track in process.hub._tracks.values():
        while track.size:
            track.shrink()


def test_what_is_not_recent_is_fetched_and_its_client_rung_for():
    process = Process(a=100)
    subscription = process.join("a", max_events=4)
    process.publish("a", 5)
    forget_all(process)
    assert subscription.take() == []
    assert process.hub.needs == {"a": 0}
    looks = process.begin()
    assert subscription.take() == []
    assert process.hub.needs == {}  # it waits for the look that is under way
    assert process.end(looks) == [subscription]
    assert process.seen(subscription.take()) == ["a1", "a2"]
    assert process.all_of(subscription) == ["a3", "a4", "a5"]


def test_many_who_need_something_cost_one_look():
    process = Process(a=1000)
    subscriptions = [process.join("a", max_events=4) for _ in range(50)]
    process.publish("a", 500)
    forget_all(process)
    process.fetched.clear()
    for subscription in subscriptions:
        assert subscription.take() == []
    process.fetch()
    for subscription in subscriptions:
        assert process.all_of(subscription) == [f"a{number}" for number in range(1, 501)]
    assert len(process.fetched) == 1


def test_what_others_have_had_fetched_is_there_for_all():
    process = Process(a=100)
    one, two = process.join("a", max_events=4), process.join("a", max_events=4)
    process.publish("a", 5)
    forget_all(process)
    assert one.take() == []
    looks = process.begin()
    assert two.take() == []
    assert process.hub.needs == {"a": 0}
    process.end(looks)
    wants, wake = process.hub.begin_fetch()
    assert wants == []
    assert [each() for each in wake] == [two]
    assert process.seen(two.take()) == ["a1", "a2"]


def test_who_needs_several_channels_waits_for_all_of_them():
    process = Process(a=100, b=100)
    subscription = process.join("ab", max_events=4)
    process.publish("a", 5)
    process.publish("b", 5)
    forget_all(process)
    assert subscription.take() == []
    first, second = process.begin()
    process.end([first])
    assert subscription.take() == []
    assert process.end([second]) == [subscription]
    expected = [f"{channel}{number}" for channel in "ab" for number in range(1, 6)]
    assert process.all_of(subscription) == expected


def test_a_look_that_had_begun_before_decides_nothing():
    process = Process(a=100)
    subscription = process.join("a", max_events=4)
    process.publish("a", 5)
    forget_all(process)
    process.hub.refresh("a")
    looks = process.begin()
    assert process.fetched[-1] == ("a", 5)
    assert subscription.take() == []
    assert process.end(looks) == []
    assert subscription.take() == []
    assert process.all_of(subscription) == ["a1", "a2", "a3", "a4", "a5"]


def test_who_has_left_is_not_rung_for():
    process = Process(a=100)
    subscription, other = process.join("a", max_events=4), process.join("a", max_events=4)
    process.publish("a", 5)
    forget_all(process)
    assert subscription.take() == other.take() == []
    looks = process.begin()
    process.hub.remove(subscription)
    assert process.end(looks) == [other]


def test_who_has_ended_needs_nothing():
    process = Process(a=100)
    subscription = process.join("a", max_events=4)
    process.publish("a", 5)
    forget_all(process)
    subscription.end("shutdown")
    assert subscription.take() == []
    assert process.hub.needs == {}


def test_what_is_gone_when_it_is_fetched_is_a_reset():
    process = Process(a=10)
    process.publish("a", 20)
    subscription = process.join("a", max_events=4)
    process.publish("a", 30)
    assert subscription.take() == []
    process.fetch()
    [(event, frame)] = subscription.take()
    assert process.seen([(event, frame)]) == [("expired", "A")]
    assert process.offsets(event.id) == {"a": 50}
    process.publish("a")
    assert process.seen(subscription.take()) == ["a51"]


@pytest.mark.parametrize("before", range(3))
def test_what_waits_is_bounded_for_who_has_the_last_page_still_to_take(before):
    process = Process(a=100)
    process.publish("a", before)
    subscription = process.join("a", max_events=8)
    process.publish("a", 11)
    for _ in range(2):
        assert len(subscription.take()) == 4
    assert len(subscription.take(1)) == 1
    assert not subscription.is_behind
    for _ in range(30):
        process.publish("a")
        assert len(subscription) <= 8
    assert subscription.is_behind


def test_what_there_was_no_room_for_in_a_look_is_a_reset_after_that_one():
    process = Process(a=100)
    subscription = process.join("a", max_events=4)
    process.publish("a", 20)
    forget_all(process)
    assert subscription.take() == []
    [(want, _)] = process.begin()
    process.end([(want, process.timelines["a"].past(want.lowest, process.now, room=5))])
    assert process.seen(subscription.take()) == [("expired", "A")]
    assert process.hub.needs == {}


def test_what_is_known_to_be_gone_is_a_reset_without_a_look():
    process = Process(a=10)
    subscription = process.join("a", max_events=4)
    process.publish("a", 30)
    assert process.seen(subscription.take()) == [("expired", "A")]
    assert process.hub.needs == {}


def test_what_is_gone_of_one_channel_is_a_reset_of_that_one():
    process = Process(a=10, b=100)
    subscription = process.join("ab", max_events=4)
    process.publish("a", 30)
    process.publish("b", 5)
    assert process.all_of(subscription) == [("expired", "A"), "b1", "b2", "b3", "b4", "b5"]
    process.publish("a")
    assert process.seen(subscription.take()) == ["a31"]


def test_resets_of_several_channels_are_one_for_each_reason():
    process = Process(a=10, b=10, c=10)
    subscription = process.join("abc", max_events=8)
    process.publish("c")
    process.publish("a", 30)
    process.publish("b", 30)
    process.timelines["c"].flush()
    process.publish("c", 1, missed=True)
    process.hub.refresh("c")
    process.fetch()
    assert process.all_of(subscription) == [("expired", "A", "B"), ("epoch", "C")]
    process.publish("c")
    assert process.seen(subscription.take()) == ["c3"]


def test_the_id_of_a_reset_says_where_all_channels_are_then():
    process = Process(a=10, b=100)
    subscription = process.join("ab", max_events=4)
    process.publish("b", 2)
    process.publish("a", 30)
    [(reset, _)] = subscription.take(1)
    assert process.offsets(reset.id) == {"a": 30, "b": 0}
    assert [process.offsets(event.id) for event, _ in subscription.take()] == [{"a": 30, "b": 1}]
    again = process.join("ab", process.CURSORS.decode(reset.id, "ab"))
    assert process.all_of(again) == ["b1", "b2"]


def test_what_is_forgotten_between_the_look_and_the_page_is_looked_for_again():
    process = Process(a=100, b=100)
    subscription = process.join("ab", max_events=4)
    process.publish("a", 5)
    process.publish("b", 2)
    forget_all(process)
    assert subscription.take() == []
    first, second = process.begin()
    process.end([first])
    forget_all(process)
    process.end([second])
    expected = ["a1", "a2", "a3", "a4", "a5", "b1", "b2"]
    assert process.all_of(subscription) == expected


# --- with history: resets while streams are open ---


def lose_epoch(process, *channels):
    """The broker loses its data, and the process hears of it."""
    process.flush()
    for channel in channels:
        process.hub.refresh(channel)
    process.fetch()


def test_everybody_hears_of_a_reset_between_what_came_before_it_and_after():
    process = Process(a=10)
    one, two = process.join("a", max_events=10), process.join("a", max_events=10)
    process.publish("a", 2)
    two.take()
    lose_epoch(process, "a")
    process.publish("a")
    assert process.seen(one.take()) == ["a1", "a2", ("epoch", "A"), "a1"]
    assert process.seen(two.take()) == [("epoch", "A"), "a1"]


def test_everybody_is_rung_for_at_a_reset():
    process = Process(a=10)
    subscription = process.join("a")
    process.flush()
    process.hub.refresh("a")
    assert process.end(process.begin()) == [subscription]


def test_the_id_of_a_reset_is_where_the_channel_begins_anew():
    process = Process(a=10, b=10)
    process.publish("b", 3)
    subscription = process.join("ab")
    process.publish("a", 2)
    process.timelines["a"].flush()
    process.hub.refresh("a")
    process.fetch()
    *_, (reset, _) = subscription.take()
    assert process.offsets(reset.id) == {"a": 0, "b": 3}
    assert process.CURSORS.decode(reset.id, "a") == process.at(a=0)


def test_a_reset_is_for_the_listeners_of_its_channel():
    process = Process(a=10, b=10)
    one, both, other = process.join("a"), process.join("ba"), process.join("b")
    process.timelines["a"].flush()
    process.hub.refresh("a")
    process.fetch()
    assert process.seen(one.take()) == process.seen(both.take()) == [("epoch", "A")]
    assert other.take() == []


def test_who_is_behind_hears_of_a_reset_when_it_comes_to_it():
    process = Process(a=10)
    subscription = process.join("a", max_events=2)
    process.publish("a", 3)
    assert subscription.is_behind
    lose_epoch(process, "a")
    process.publish("a")
    assert process.all_of(subscription) == [("epoch", "A")]
    process.publish("a")
    assert process.all_of(subscription) == ["a2"]


def test_who_overflows_by_the_very_reset_hears_of_it():
    process = Process(a=10, b=10)
    subscription = process.join("ab", max_events=1)
    process.publish("b")
    process.timelines["a"].flush()
    process.publish("a", 1, missed=True)
    process.hub.refresh("a")
    process.fetch()
    assert subscription.is_behind
    assert process.all_of(subscription) == [("epoch", "A"), "b1"]


def test_who_overflows_behind_a_reset_that_it_has_not_taken_hears_of_it():
    process = Process(a=10)
    subscription = process.join("a", max_events=2)
    lose_epoch(process, "a")
    process.publish("a", 5)
    assert subscription.is_behind
    assert process.all_of(subscription) == [("epoch", "A")]
    process.publish("a")
    assert process.all_of(subscription) == ["a6"]


def test_who_overflows_behind_a_reset_that_it_has_taken_does_not_hear_of_it_again():
    process = Process(a=10)
    subscription = process.join("a", max_events=2)
    lose_epoch(process, "a")
    assert process.seen(subscription.take()) == [("epoch", "A")]
    process.publish("a", 5)
    assert process.all_of(subscription) == ["a1", "a2", "a3", "a4", "a5"]


@pytest.mark.parametrize("max_events", [3, 4, 10])
def test_who_wants_to_be_asked_anew_is_ended_instead_and_what_waits_may_still_be_taken(max_events):
    process = Process(a=10)
    proud, other = (
        process.join("a", max_events=max_events, ends_on_reset=True),
        process.join("a", max_events=max_events),
    )
    process.publish("a", 3)
    other.take()
    process.timelines["a"].flush()
    process.hub.refresh("a")
    [(want, past)] = process.begin()
    outcome = process.hub.apply(want, past, process.now)
    assert outcome.ended == [proud]
    assert (proud.ended, other.ended) == ("reset", None)
    assert process.hub.subscriptions == {other}
    assert process.seen(proud.take()) == ["a1", "a2", "a3"]
    assert proud.take() == []
    assert process.seen(other.take()) == [("epoch", "A")]


def test_those_who_are_ended_by_a_reset_share_what_waits():
    process = Process(a=10)
    proud = [process.join("a", max_events=10, ends_on_reset=True) for _ in range(2)]
    process.publish("a", 2)
    lose_epoch(process, "a")
    assert proud[0]._place is proud[1]._place
    assert process.hub.channels == []


def test_who_is_behind_and_wants_to_be_asked_anew_is_ended_when_it_comes_to_the_reset():
    process = Process(a=10)
    subscription = process.join("a", max_events=2, ends_on_reset=True)
    process.publish("a", 3)
    lose_epoch(process, "a")
    assert subscription.ended is None
    assert subscription.take() == []
    assert subscription.ended == "reset"


def test_who_is_too_far_behind_and_wants_to_be_asked_anew_is_ended():
    process = Process(a=3)
    process.publish("a", 9)
    subscription = process.join("a", max_events=2, ends_on_reset=True)
    process.publish("a", 20)
    assert subscription.take() == []
    assert subscription.ended is None
    process.fetch()
    assert subscription.take() == []
    assert subscription.ended == "reset"


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
        assert (outcome.crowded, outcome.ended) == ([], [])
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
        assert publish(hub, "a", str(number)).ended == []
        other.take()
    assert audience.subscriptions.looks <= 3
    assert publish(hub, "a", "one too many").ended == [slow]
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
def test_nothing_is_kept_of_what_all_in_step_have_passed():
    hub = Hub()
    one, two, out = [subscribe(hub, "a") for _ in range(3)]
    cursor = fall_in(one, two, out)
    out.fall_out()
    things = [publish_thing(hub) for _ in range(6)]
    assert len(out.take()) == 6
    assert None not in [thing() for thing in things]
    for taken in range(1, 7):
        step(cursor, one, max_bytes=len(b"frame"))
        assert [thing() is None for thing in things] == [True] * taken + [False] * (6 - taken)
    assert two.is_at(cursor)


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("end", [ends_for_good, ends_with_what_waits, is_removed])
@pytest.mark.parametrize("waiting", [0, 1, 5])
def test_who_has_ended_in_step_keeps_nothing_that_is_published_later(end, waiting):
    hub = Hub()
    ended, other, third = [subscribe(hub, "a") for _ in range(3)]
    cursor = fall_in(ended, other, third)
    for _ in range(waiting):
        publish_thing(hub)
    end(hub, ended)
    later = publish_thing(hub)
    assert later() is not None
    step(cursor, other)
    publish_thing(hub)
    step(cursor, other)
    assert later() is None


def all_are_slow(hub, several):
    for each in several:
        each.be_slow()


def all_overflow(hub, several):
    for _ in range(8):
        publish_thing(hub)
    assert all(each.ended == "overflow" for each in several)


def all_are_ended(hub, several):
    for each in several:
        ends_with_what_waits(hub, each)


def all_go_elsewhere(hub, several):
    fall_in(*several)


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("leave", [all_are_slow, all_overflow, all_are_ended, all_go_elsewhere])
def test_a_cursor_that_all_have_left_keeps_nothing(leave):
    """Who steps may be held up, and look at it much later: until then more may come than any mailbox may hold."""
    hub = Hub()
    several, other = [subscribe(hub, "a") for _ in range(2)], subscribe(hub, "a")
    cursor = fall_in(*several)
    for _ in range(3):
        publish_thing(hub)
    other.take()
    leave(hub, several)
    assert cursor.deserted
    other.take()
    later = publish_thing(hub)
    for each in (*several, other):
        each.take()
    assert later() is None


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
