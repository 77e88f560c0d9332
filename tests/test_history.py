"""A log of a channel's recent events: what came after a position is all of what it says, or a gap."""

import json
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_sse.history import ENTRY_BYTES, Gap, History, Log, Position, reset_event


def at(offset, check=None, epoch=7):
    """The position behind event number `offset`; its check is 100 more, unless it is another event."""
    return Position(epoch, offset, (100 + offset if offset else 0) if check is None else check)


def log_of(first, last, size=10, ttl=60, **start):
    """A log that has the events `first` to `last`."""
    log = Log(size, ttl)
    log.start(at(first - 1), 0.0, **start)
    for number in range(first, last + 1):
        log.add(at(number), f"event {number}", 0.0)
    return log


def numbers(found):
    """The numbers of events, which are what they seem to be."""
    assert all((position, item) == (at(position.offset), f"event {position.offset}") for position, item in found)
    return [position.offset for position, _ in found]


def reason_for(log, position):
    """Why there is a gap."""
    with pytest.raises(Gap) as caught:
        log.after(position)
    return caught.value.reason


# --- positions ---


def test_a_position_is_read_from_what_came_with_an_event():
    found = {"epoch": 2**32 - 1, "offset": 2**53 - 1, "check": 2**24 - 1, "more": "is none of our business"}
    assert Position.of(found) == (2**32 - 1, 2**53 - 1, 2**24 - 1)
    assert Position.of({"epoch": 0, "offset": 0, "check": 0}) == (0, 0, 0)


@pytest.mark.parametrize("name", ["epoch", "offset", "check"])
@pytest.mark.parametrize("value", [None, "1", 1.0, True, False, -1, 2**53, [1], {}])
def test_what_is_no_position_is_refused_by_the_name_of_what_is_wrong(name, value):
    with pytest.raises(ValueError, match=name):
        Position.of({"epoch": 1, "offset": 1, "check": 1, name: value})


@pytest.mark.parametrize(("name", "bits"), [("epoch", 32), ("offset", 53), ("check", 24)])
def test_a_number_of_a_position_fits_into_its_bits(name, bits):
    with pytest.raises(ValueError, match=rf"{name} is no whole number below 2\*\*{bits}: {1 << bits}"):
        Position.of({"epoch": 1, "offset": 1, "check": 1, name: 1 << bits})


@pytest.mark.parametrize("name", ["epoch", "offset", "check"])
def test_a_position_lacks_nothing(name):
    found = {"epoch": 1, "offset": 1, "check": 1}
    del found[name]
    with pytest.raises(ValueError, match=name):
        Position.of(found)


def test_what_is_kept_of_a_channel_has_the_name_that_its_users_say():
    assert History("news", 10, 60) == ("news", 10, 60)


# --- what has come after a position ---


def test_after_a_position_come_all_later_events_oldest_first():
    log = log_of(1, 5)
    assert numbers(log.after(at(0))) == [1, 2, 3, 4, 5]
    assert numbers(log.after(at(2))) == [3, 4, 5]
    assert numbers(log.after(at(4))) == [5]


def test_after_the_top_comes_nothing():
    assert log_of(1, 5).after(at(5)) == []
    assert log_of(6, 5).after(at(5)) == []


def test_what_comes_after_a_position_can_be_bounded():
    log = log_of(1, 5)
    assert numbers(log.after(at(1), 2)) == [2, 3]
    assert log.after(at(1), 0) == []
    assert numbers(log.after(at(1), 9)) == [2, 3, 4, 5]
    assert reason_for(log_of(4, 5), at(1)) == "expired"
    with pytest.raises(Gap):
        log.after(at(1, check=0), 0)


def test_after_a_position_before_the_beginning_there_is_a_gap():
    log = log_of(4, 6)
    assert reason_for(log, at(2)) == "expired"
    assert numbers(log.after(at(3))) == [4, 5, 6]


def test_after_a_position_that_is_not_reached_there_is_another_epoch():
    assert reason_for(log_of(1, 3), at(4)) == "epoch"


def test_after_a_position_of_another_epoch_there_is_another_epoch():
    assert reason_for(log_of(1, 3), at(2, epoch=8)) == "epoch"
    assert reason_for(log_of(3, 4), at(0, epoch=8)) == "epoch"


@pytest.mark.parametrize("offset", [2, 3, 5, 6])
def test_after_an_event_that_was_undone_there_is_another_epoch(offset):
    """Of the base, of those that are there, and of the top: the number is known, and belongs to another event."""
    assert reason_for(log_of(3, 6), at(offset, check=99)) == "epoch"


def test_nothing_is_known_of_what_has_not_begun():
    log = Log(10, 60)
    assert (log.top, log.base, len(log), log.bytes) == (None, None, 0, 0)
    assert reason_for(log, at(0)) == "epoch"


@pytest.mark.parametrize(("offset", "check"), [(1, None), (2, 102), (3, 103), (5, 105), (6, None)])
def test_the_check_of_an_event_is_known_where_the_event_is(offset, check):
    assert log_of(3, 5).check_at(offset) == check
    assert Log(10, 60).check_at(offset) is None


# --- what is kept ---


def test_no_more_than_its_size_is_kept_and_the_oldest_goes_first():
    log = log_of(1, 7, size=3)
    assert len(log) == 3
    assert (log.base, log.top) == (at(4), at(7))
    assert numbers(log.after(at(4))) == [5, 6, 7]
    assert reason_for(log, at(3)) == "expired"


def test_a_log_begins_anew_with_nothing():
    log = log_of(1, 5)
    log.start(at(8), 0.0)
    assert (log.base, log.top, len(log), log.bytes) == (at(8), at(8), 0, 0)
    assert reason_for(log, at(5)) == "expired"
    log.add(at(9), "event 9", 0.0)
    assert numbers(log.after(at(8))) == [9]


def test_all_is_forgotten_when_the_last_event_is_too_old():
    log = log_of(1, 3, ttl=60)
    log.add(at(4), "event 4", 50.0)
    log.expire(109.9)
    assert len(log) == 4
    log.expire(110.0)
    assert (len(log), log.bytes) == (0, 0)
    assert log.top == log.base == at(4)
    assert log.after(at(4)) == []
    assert reason_for(log, at(3)) == "expired"
    log.add(at(5), "event 5", 200.0)
    assert numbers(log.after(at(4))) == [5]


def test_what_is_said_to_be_complete_is_no_longer_so_when_it_was_forgotten_here():
    for forget in (Log.shrink, lambda log: log.expire(1000.0)):
        log = log_of(1, 3, complete=True)
        assert log.complete
        forget(log)
        assert not log.complete


def test_what_is_dropped_for_its_number_is_kept_by_nobody():
    assert log_of(1, 7, size=3, complete=True).complete


@pytest.mark.parametrize(("count", "left"), [(0, 0), (1, 0), (2, 1), (5, 2), (6, 3)])
def test_the_older_half_is_forgotten(count, left):
    log = log_of(1, count)
    log.shrink()
    assert len(log) == left
    assert log.top == at(count)
    assert numbers(log.after(at(count - left))) == [*range(count - left + 1, count + 1)]
    assert log.bytes == left * ENTRY_BYTES


def test_it_says_roughly_how_many_bytes_it_takes():
    log = Log(3, 60)
    log.start(at(0), 0.0)
    for number in range(1, 6):
        log.add(at(number), "", 0.0, size=10**number)
    assert log.bytes == 3 * ENTRY_BYTES + 10**3 + 10**4 + 10**5
    log.prepend([], at(2), 0.0, complete=False)
    assert log.bytes == 3 * ENTRY_BYTES + 10**3 + 10**4 + 10**5
    log.shrink()
    assert log.bytes == ENTRY_BYTES + 10**5
    log.prepend([(at(4), "", 10**4)], at(3), 0.0, complete=False)
    assert log.bytes == 2 * ENTRY_BYTES + 10**4 + 10**5
    log.expire(60.0)
    assert log.bytes == 0


class Thing:
    """Something that can be seen to be freed."""


def test_what_was_dropped_is_freed_at_once():
    log = Log(10, 60)
    log.start(at(0), 0.0)
    things = []
    for number in range(1, 50):
        thing = Thing()
        things.append(weakref.ref(thing))
        log.add(at(number), thing, 0.0)
        del thing
        assert [each() is None for each in things] == [True] * (number - len(log)) + [False] * len(log)
    log.shrink()
    assert [each() is None for each in things] == [True] * 44 + [False] * 5


def test_the_space_of_what_was_dropped_is_given_back():
    log = log_of(1, 0, size=10)
    for number in range(1, 1000):
        log.add(at(number), f"event {number}", 0.0)
        assert len(log._entries) <= 2 * 10 + 1


# --- what is put before it ---


def before(first, last):
    return [(at(number), f"event {number}", 0) for number in range(first, last + 1)]


def test_what_came_before_can_be_added():
    log = log_of(5, 6)
    log.prepend(before(3, 4), at(2), 0.0, complete=False)
    assert (log.base, log.top, len(log)) == (at(2), at(6), 4)
    assert numbers(log.after(at(2))) == [3, 4, 5, 6]
    assert not log.complete
    log.prepend(before(1, 2), at(0), 0.0, complete=True)
    assert numbers(log.after(at(0))) == [1, 2, 3, 4, 5, 6]
    assert log.complete


def test_what_came_before_is_added_as_far_as_there_is_room():
    log = log_of(5, 6, size=4)
    log.prepend(before(1, 4), at(0), 0.0, complete=False)
    assert (log.base, len(log)) == (at(2), 4)
    assert numbers(log.after(at(2))) == [3, 4, 5, 6]
    log.prepend(before(1, 2), at(0), 0.0, complete=False)
    assert (log.base, len(log)) == (at(2), 4)
    assert numbers(log.after(at(2))) == [3, 4, 5, 6]


def test_what_came_before_can_be_added_after_some_were_dropped():
    log = log_of(1, 8, size=4)
    log.shrink()
    log.prepend(before(4, 6), at(3), 0.0, complete=False)
    assert numbers(log.after(at(4))) == [5, 6, 7, 8]
    assert reason_for(log, at(3)) == "expired"


def test_what_was_added_before_is_as_old_as_the_moment_in_which_it_was():
    """Somebody has kept it until then."""
    log = Log(10, ttl=60)
    log.start(at(2), 0.0)
    log.prepend(before(1, 2), at(0), 50.0, complete=True)
    log.expire(109.0)
    assert numbers(log.after(at(0))) == [1, 2]
    log.expire(110.0)
    assert len(log) == 0


# --- what a page is told ---


def test_a_reset_names_the_channels_and_the_reason():
    event = reset_event(["news", "b"], "expired", "an id")
    assert (event.name, event.id) == ("stream-reset", "an id")
    assert json.loads(event.data) == {"channels": ["news", "b"], "reason": "expired"}
    assert reset_event(["news"], "epoch").id is None


def test_a_gap_says_why():
    assert str(Gap("expired")) == Gap("expired").reason == "expired"


# --- all of it at once ---

STEPS = st.lists(
    st.sampled_from(["add", "add", "add", "shrink", "expire", "wait", "start"]) | st.tuples(st.integers(0, 6)),
    max_size=40,
)


@given(steps=STEPS, size=st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_a_log_is_a_list_of_the_latest_events(steps, size):
    """A plain list of what is there beside it; `(n,)` puts the n events before it."""
    log, there, base, top, now, last = Log(size, 10), [], 0, 0, 0.0, 0.0
    log.start(at(0), now)
    for step in steps:
        if step == "add":
            top += 1
            log.add(at(top), f"event {top}", now)
            there, last = [*there, top][-size:], now
        elif step == "shrink":
            log.shrink()
            there = there[(len(there) + 1) // 2 :]
        elif step == "expire":
            log.expire(now)
            there = there if now - last < 10 else []
        elif step == "wait":
            now += 6
        elif step == "start":
            top += 3
            log.start(at(top), now)
            there, base = [], top
        else:
            older = [*range(max(1, base - step[0] + 1), base + 1)]
            log.prepend(before(base - len(older) + 1, base), at(base - len(older)), now, complete=False)
            last = now
            there = [*older[max(0, len(older) - size + len(there)) :], *there]
        base = top - len(there)
        assert (log.base, log.top, len(log)) == (at(base), at(top), len(there))
        assert log.bytes == len(there) * ENTRY_BYTES
        for offset in range(top + 2):
            if base <= offset <= top:
                assert numbers(log.after(at(offset))) == [*range(offset + 1, top + 1)]
                assert log.check_at(offset) == at(offset).check
            else:
                assert reason_for(log, at(offset)) == ("expired" if offset < base else "epoch")
                assert log.check_at(offset) is None
