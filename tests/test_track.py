"""A channel with history as one process follows it: each event comes out once and in order, or a reset says why not."""

import pytest

from django_sse import track as module
from django_sse.event import Event
from django_sse.history import ENTRY_BYTES, Gap, History, Past, Position
from django_sse.track import FURTHER, TOP, NotFetched, Track, with_id
from django_sse.wire import encode

EPOCH, OTHER = 7, 8


def at(offset, epoch=EPOCH, check=None):
    """The position behind event number `offset`; its check is 100 more, unless it is another event."""
    return Position(epoch, offset, (100 + offset if offset else 0) if check is None else check)


def item(offset):
    event = Event("", f"event {offset}")
    return event, encode(event)


def kept(first, last, epoch=EPOCH, complete=False):
    """What the broker answers that has the events `first` to `last` of what was wanted."""
    events = [(at(number, epoch), item(number)) for number in range(first, last + 1)]
    return Past(at(first - 1, epoch), at(last, epoch), events, complete)


class Channel:
    """A track, and what comes out of it."""

    def __init__(self, size=10, ttl=60):
        self.needs = {}
        self.track = Track("a", History("a", size, ttl), self.needs, lambda position: f"id{position.offset}")
        self.came_out = []

    def out(self):
        """What has come out since the last call: numbers of events, and reasons of resets."""
        came_out, self.came_out = self.came_out, []
        return came_out

    def take(self, steps):
        for step in steps:
            if step.reset is not None:
                assert (step.position, step.frame) == (None, None)
                self.came_out.append(step.reset)
            else:
                event, frame = step.frame
                assert event == Event("", f"event {step.position.offset}", f"id{step.position.offset}")
                assert frame == encode(event)
                # Whoever is looked at while it comes out has not had it.
                assert step.before == self.track.top
                self.came_out.append(step.position.offset)

    def live(self, *offsets, epoch=EPOCH, now=0.0, **position):
        for offset in offsets:
            self.take(self.track.came(at(offset, epoch, **position), *item(offset), now))

    def begin(self):
        """Begin to fetch what is needed."""
        [(channel, lowest)] = self.needs.items()
        assert channel == "a"
        self.needs.clear()
        return self.track.want(lowest)

    def end(self, want, past, now=0.0):
        """Hear what the broker answered."""
        self.take(self.track.fetched(want, past, now))
        more = True
        while more:
            self.take(self.track.go_on(now))
            more = self.track.is_behind

    def fetch(self, past, now=0.0):
        self.end(self.begin(), past, now)

    def after(self, position, asked=None, limit=100):
        """The numbers of the events after it; or the reason of the gap; or `None`, where they are to be fetched."""
        needed = {}
        try:
            found = self.track.after(position, asked, limit)
        except Gap as gap:
            return gap.reason
        except NotFetched as more:
            needed = more.needed
        if needed:
            assert [*needed] == [self.track]
            assert self.needs["a"] <= needed[self.track]
            return None
        return [position.offset for position, frame in found if frame is not None]


def channel_with(first, last, complete=False, **options):
    """A channel of which this process has the events `first` to `last`."""
    channel = Channel(**options)
    channel.track.need(first)
    channel.fetch(kept(first, last, complete=complete))
    assert channel.out() == []
    assert channel.needs == {}
    return channel


# --- what comes live ---


def test_events_that_follow_come_out_as_they_come():
    channel = channel_with(3, 4)
    channel.live(5, 6)
    assert channel.out() == [5, 6]
    assert channel.track.top == at(6)
    assert channel.needs == {}


def test_an_event_that_was_fetched_does_not_come_out_again():
    channel = channel_with(1, 4)
    channel.live(1, 3, 4)
    assert (channel.out(), channel.needs) == ([], {})
    channel.live(5)
    assert channel.out() == [5]


def test_an_event_older_than_all_that_are_known_does_not_come_out():
    channel = channel_with(5, 6)
    channel.live(2)
    assert (channel.out(), channel.needs) == ([], {})


def test_before_anything_is_known_nothing_comes_out_and_nothing_is_lost():
    channel = Channel()
    channel.live(4)
    want = channel.begin()
    channel.live(5, 6)
    assert (channel.out(), channel.track.top) == ([], None)
    channel.end(want, kept(1, 4))
    assert channel.out() == [5, 6]


def test_what_is_in_the_first_fetch_comes_out_for_nobody():
    """Nobody was placed before it: it is for those who ask."""
    channel = Channel()
    channel.live(5)
    channel.fetch(kept(3, 6))
    assert (channel.out(), channel.track.top) == ([], at(6))


def test_an_event_after_a_missing_one_waits_until_that_was_fetched():
    channel = channel_with(1, 3)
    channel.live(5, 6)
    assert channel.out() == []
    channel.fetch(kept(4, 6))
    assert channel.out() == [4, 5, 6]
    assert channel.needs == {}
    channel.live(7)
    assert channel.out() == [7]


def test_what_comes_while_it_is_fetched_comes_out_behind_it():
    channel = channel_with(1, 3)
    channel.live(5)
    want = channel.begin()
    channel.live(6, 7)
    channel.end(want, kept(4, 5))
    assert channel.out() == [4, 5, 6, 7]


def test_what_was_missing_may_come_live_after_all():
    channel = channel_with(1, 3)
    channel.live(5)
    want = channel.begin()
    channel.live(4)
    assert channel.out() == [4]
    channel.live(5)
    channel.end(want, kept(4, 6))
    assert channel.out() == [5, 6]


def test_an_event_that_comes_after_the_look_of_a_fetch_with_one_missing_before_it_is_fetched_anew():
    channel = channel_with(1, 3)
    channel.live(5)
    want = channel.begin()
    channel.live(8)
    channel.end(want, kept(4, 6))
    assert channel.out() == [4, 5, 6]
    channel.fetch(kept(7, 8))
    assert channel.out() == [7, 8]
    assert channel.needs == {}


def test_what_waits_is_bounded_and_what_was_dropped_is_fetched(monkeypatch):
    monkeypatch.setattr(module, "PENDING", 3)
    channel = channel_with(1, 1, size=100)
    channel.live(3)
    want = channel.begin()
    channel.live(*range(4, 21))
    channel.end(want, kept(2, 5))
    assert channel.out() == [2, 3, 4, 5]
    channel.fetch(kept(6, 20))
    assert channel.out() == [*range(6, 21)]
    assert channel.needs == {}


def between_slices(channel, past):
    """Let what was fetched be about to come out."""
    channel.track.refresh()
    channel.take(channel.track.fetched(channel.begin(), past, 0.0))


def go_on(channel):
    channel.take(channel.track.go_on(0.0))
    while channel.track.is_behind:
        channel.take(channel.track.go_on(0.0))


def test_an_event_that_comes_between_slices_with_one_missing_before_it_is_fetched_anew(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 1)
    channel = channel_with(1, 1)
    between_slices(channel, kept(2, 3))
    channel.live(6)
    assert channel.needs == {}
    go_on(channel)
    assert channel.out() == [2, 3]
    channel.fetch(kept(4, 6))
    assert channel.out() == [4, 5, 6]


def test_what_had_come_before_a_fetch_is_told_from_what_came_later_though_some_were_dropped(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 1)
    monkeypatch.setattr(module, "PENDING", 3)
    channel = channel_with(1, 1)
    channel.live(1, 2, 3, epoch=OTHER)
    want = channel.begin()
    channel.take(channel.track.fetched(want, kept(2, 3), 0.0))
    channel.live(6)
    go_on(channel)
    # The broker has no other epoch; what came of it before it was asked is of one that is over.
    assert channel.out() == [2, 3]
    channel.fetch(kept(4, 6))
    assert channel.out() == [4, 5, 6]
    assert channel.needs == {}


def test_what_comes_live_before_it_has_come_out_as_fetched_comes_out_once():
    channel = channel_with(1, 1)
    between_slices(channel, kept(2, 4))
    channel.live(2, 3)
    assert channel.out() == [2, 3]
    go_on(channel)
    assert channel.out() == [4]


def test_fetched_events_come_out_in_slices_and_live_ones_wait_for_them(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 2)
    channel = channel_with(1, 1)
    channel.track.refresh()
    want = channel.begin()
    channel.take(channel.track.fetched(want, kept(2, 6), 0.0))
    assert channel.out() == []
    channel.take(channel.track.go_on(0.0))
    assert (channel.out(), channel.track.is_behind, channel.track.top) == ([2, 3], True, at(3))
    channel.live(7)
    assert (channel.out(), channel.needs) == ([], {})
    channel.take(channel.track.go_on(0.0))
    assert (channel.out(), channel.track.is_behind) == ([4, 5], True)
    channel.take(channel.track.go_on(0.0))
    assert (channel.out(), channel.track.is_behind) == ([6, 7], False)
    channel.take(channel.track.go_on(0.0))
    assert channel.out() == []


def test_a_slice_is_small():
    assert 0 < module.SLICE <= 100


def test_an_event_that_could_not_be_read_comes_out_for_nobody_and_leaves_no_gap():
    channel = channel_with(1, 1)
    channel.live(4)
    events = [(at(2), item(2)), (at(3), None), (at(4), item(4))]
    channel.fetch(Past(at(1), at(4), events, complete=False))
    assert channel.out() == [2, 4]
    assert channel.after(at(2)) == [4]
    assert channel.after(at(3)) == [4]
    assert channel.track.after(at(2), None, 1) == [(at(3), None)]


# --- what was missed by the process ---


def test_after_a_reconnect_what_was_published_meanwhile_comes_out():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(4, 6))
    assert channel.out() == [4, 5, 6]
    channel.live(7)
    assert channel.out() == [7]


def test_after_a_reconnect_in_which_nothing_was_missed_nothing_comes_out():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(4, 3))
    assert (channel.out(), channel.needs) == ([], {})


def test_a_fetch_begins_at_the_latest_with_what_is_known():
    channel = channel_with(1, 3)
    for _ in range(2):
        channel.track.refresh()
        want = channel.begin()
        assert (want.track, want.lowest, want.known) == (channel.track, 3, at(3))
        channel.end(want, kept(4, 3))


def test_a_need_of_the_end_alone_links_up_all_the_same_if_something_is_known_by_then():
    channel = Channel()
    channel.track.need(TOP)
    want = channel.begin()
    assert want.lowest == TOP
    channel.track.need(TOP)
    channel.end(want, kept(6, 5))
    assert channel.begin().lowest == 5


def test_several_needs_are_one_that_reaches_furthest():
    channel = channel_with(50, 60)
    for lowest in (40, 30, TOP, 35):
        channel.track.need(lowest)
    assert channel.needs == {"a": 30}


def test_a_reconnect_during_the_first_fetch_is_looked_into():
    channel = Channel()
    channel.track.need(TOP)
    want = channel.begin()
    channel.track.refresh()
    channel.end(want, kept(6, 5))
    channel.fetch(kept(6, 7))
    assert channel.out() == [6, 7]
    assert channel.needs == {}


def test_a_reconnect_during_a_fetch_is_looked_into_after_it():
    channel = channel_with(1, 3)
    channel.track.refresh()
    want = channel.begin()
    channel.track.refresh()
    channel.live(6)
    channel.end(want, kept(4, 4))
    assert channel.out() == [4]
    channel.fetch(kept(5, 6))
    assert channel.out() == [5, 6]


def test_what_comes_live_after_a_reconnect_waits_for_a_fetch_that_began_after_it():
    channel = channel_with(1, 3)
    channel.live(5)
    want = channel.begin()
    channel.track.refresh()
    channel.live(6)
    channel.end(want, kept(4, 5))
    assert channel.out() == [4, 5]
    channel.live(6)
    assert channel.out() == []
    channel.fetch(kept(5, 6))
    assert channel.out() == [6]


def test_what_comes_live_after_a_reconnect_waits_for_what_was_missed():
    """It might follow what was undone meanwhile, and seem to follow what is known."""
    channel = channel_with(1, 5)
    channel.track.refresh()
    channel.live(6)
    assert channel.out() == []
    past = kept(5, 6)
    past.events[0] = at(5, check=99), past.events[0][1]
    channel.fetch(past)
    assert channel.out() == ["epoch"]
    channel.live(7)
    assert channel.out() == [7]


def test_what_comes_live_after_a_reconnect_comes_out_if_it_does_follow():
    channel = channel_with(1, 5)
    channel.track.refresh()
    channel.live(6)
    want = channel.begin()
    channel.live(7)
    channel.end(want, kept(6, 6))
    assert channel.out() == [6, 7]
    assert channel.needs == {}


def test_what_had_come_before_a_fetch_and_is_not_in_it_does_not_come_out():
    """An older state of the broker was restored: it does not follow the other events of its numbers."""
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.live(4, 5, 6)
    past = kept(4, 5)._replace(top=at(5, check=98))
    past.events[:] = [(at(4, check=99), item(4)), (at(5, check=98), item(5))]
    channel.fetch(past)
    assert channel.out() == [4, 5]
    assert channel.needs == {}


def test_what_had_come_before_a_reconnect_without_the_one_before_it_is_not_taken_for_granted():
    """An older state of the broker may have been restored, in which it never was."""
    channel = channel_with(1, 3)
    channel.live(6)
    channel.track.refresh()
    channel.fetch(kept(4, 5))
    assert channel.out() == [4, 5]
    channel.live(6, check=99)
    assert channel.out() == [6]


def test_a_fetch_that_failed_is_wanted_again():
    channel = channel_with(20, 30)
    channel.track.need(5)
    want = channel.begin()
    channel.live(33)
    channel.track.give_back(want)
    assert channel.needs == {"a": 5}
    channel.fetch(kept(5, 33))
    assert channel.out() == [31, 32, 33]


def test_what_is_wanted_from_the_end_on_is_still_wanted_so_after_a_failure():
    channel = channel_with(1, 3)
    channel.track.refresh()
    want = channel.begin()
    channel.track.give_back(want)
    want = channel.begin()
    assert not channel.track.answers(want)
    channel.live(4)
    assert channel.out() == []
    channel.end(want, kept(4, 4))
    assert channel.out() == [4]


def test_what_is_fetched_of_before_the_log_is_kept_for_those_who_ask_and_comes_out_for_nobody():
    channel = channel_with(5, 6)
    channel.track.need(2)
    channel.fetch(kept(2, 8))
    assert channel.out() == [7, 8]
    assert channel.after(at(1)) == [2, 3, 4, 5, 6, 7, 8]


def test_what_was_fetched_does_not_join_a_log_that_has_moved_on_meanwhile():
    channel = channel_with(5, 7, size=3)
    channel.track.need(2)
    want = channel.begin()
    channel.live(*range(8, 20))
    channel.end(want, kept(2, 7))
    assert channel.out() == [*range(8, 20)]
    assert channel.after(at(16)) == [17, 18, 19]
    assert channel.after(at(6), asked=2) == "expired"


# --- resets ---


def test_what_was_missed_and_is_gone_is_a_reset():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(6, 8))
    assert channel.out() == ["expired"]
    assert channel.track.top == at(8)
    channel.live(9)
    assert channel.out() == [9]
    assert channel.after(at(5)) == [6, 7, 8, 9]
    assert channel.after(at(3), asked=3) == "expired"


def test_a_reset_says_where_the_channel_was_before():
    channel = channel_with(1, 3)
    channel.track.refresh()
    [step] = channel.track.fetched(channel.begin(), kept(6, 8), 0.0)
    assert (step.reset, step.before) == ("expired", at(3))
    assert channel.track.top == at(8)


def test_what_follows_by_its_number_alone_does_not_follow():
    """Nobody knows whether the event before it is the one that is known."""
    channel = channel_with(1, 5, size=2)
    channel.track.refresh()
    channel.fetch(Past(at(6), at(8), kept(7, 8).events, complete=True))
    assert channel.out() == ["expired"]


@pytest.mark.parametrize("known", [0, 3])
def test_a_new_epoch_is_a_reset_and_then_all_of_its_events(known):
    channel = channel_with(1, known)
    channel.live(1, epoch=OTHER)
    assert channel.out() == []
    channel.fetch(kept(1, 2, epoch=OTHER, complete=True))
    assert channel.out() == ["epoch", 1, 2]
    channel.live(3, epoch=OTHER)
    assert channel.out() == [3]
    assert channel.after(at(0, OTHER)) == [1, 2, 3]


def test_a_new_epoch_that_comes_live_is_fetched_from_a_little_before():
    channel = channel_with(1, 200, size=200)
    channel.live(100, epoch=OTHER)
    assert channel.needs == {"a": 100 - FURTHER}


def test_of_a_new_epoch_more_may_be_kept_than_was_fetched():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(5, 6, OTHER))
    assert channel.out() == ["epoch", 5, 6]
    assert channel.after(at(2, OTHER)) is None
    assert channel.needs == {"a": 0}


def test_a_new_epoch_without_events_is_a_reset():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(1, 0, epoch=OTHER))
    assert channel.out() == ["epoch"]
    channel.live(1, 2, epoch=OTHER)
    assert channel.out() == [1, 2]


def test_a_new_epoch_that_is_not_known_from_its_beginning_is_one_reset_to_where_it_is_known():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(6, 7, epoch=OTHER))
    assert channel.out()[0] == "epoch"
    assert "expired" not in channel.out()
    assert (channel.track.top, channel.needs) == (at(7, OTHER), {})
    channel.live(8, epoch=OTHER)
    assert channel.out() == [8]


def test_a_new_epoch_with_lower_numbers_than_were_wanted_is_one_reset_to_where_it_is():
    channel = channel_with(90, 100)
    channel.track.refresh()
    want = channel.begin()
    assert want.lowest == 100
    channel.end(want, Past(at(7, OTHER), at(7, OTHER), (), complete=False))
    assert channel.out() == ["epoch"]
    assert channel.track.top == at(7, OTHER)
    assert channel.needs == {}
    assert channel.after(at(3, OTHER)) is None  # it may be there; nobody has asked


@pytest.mark.parametrize("waiting", [1, 2, 3])
def test_what_comes_late_of_an_epoch_that_has_ended_is_dropped(waiting):
    channel = channel_with(1, 3)
    channel.live(1, epoch=OTHER)
    channel.fetch(kept(1, 1, epoch=OTHER, complete=True))
    assert channel.out() == ["epoch", 1]
    channel.live(*range(4, 4 + waiting))
    assert channel.out() == []
    channel.fetch(kept(2, 1, epoch=OTHER))
    assert channel.out() == []
    assert channel.needs == {}
    channel.live(2, epoch=OTHER)
    assert channel.out() == [2]


@pytest.mark.parametrize(("top", "known"), [(2, 5), (4, 5), (0, 3)])
def test_an_older_state_of_the_broker_is_a_reset(top, known):
    channel = channel_with(1, known)
    channel.track.refresh()
    channel.fetch(kept(top + 1, top))
    assert channel.out() == ["epoch"]
    assert channel.track.top == at(top)
    channel.live(top + 1, check=99)
    assert channel.out() == [top + 1]


@pytest.mark.parametrize("changed", [3, 4, 5])
@pytest.mark.parametrize("top", [5, 7])
def test_an_older_state_of_the_broker_that_has_gone_on_is_a_reset(changed, top):
    channel = channel_with(1, 5)
    channel.track.refresh()
    events = [(at(number, check=99 if number >= changed else None), item(number)) for number in range(4, top + 1)]
    base = at(3, check=99 if changed == 3 else None)
    channel.fetch(Past(base, at(top, check=99), events, complete=False))
    assert channel.out() == ["epoch"]
    channel.live(top + 1)
    assert channel.out() == [top + 1]


def test_an_older_state_that_has_gone_on_beyond_what_is_known_is_a_reset():
    channel = channel_with(1, 5)
    channel.track.refresh()
    channel.fetch(kept(6, 7)._replace(base=at(5, check=99)))
    assert channel.out() == ["epoch"]
    assert channel.track.top == at(7)


def test_an_event_that_is_known_as_another_one_shows_an_older_state_of_the_broker():
    channel = channel_with(1, 5)
    channel.live(4, check=99)
    assert channel.out() == []
    channel.fetch(Past(at(3), at(4, check=99), [(at(4, check=99), item(4))], complete=False))
    assert channel.out() == ["epoch"]


def test_a_fetch_that_ends_before_what_has_come_since_it_began_is_no_older_state():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(4, 3))
    channel.track.need(0)
    want = channel.begin()
    channel.live(4, 5)
    channel.end(want, kept(1, 3))
    assert channel.out() == [4, 5]


def test_an_older_state_that_is_restored_with_an_older_epoch_is_a_reset_and_its_clients_go_on():
    channel = channel_with(1, 3)
    channel.track.refresh()
    channel.fetch(kept(1, 1, epoch=OTHER, complete=True))
    channel.track.refresh()
    channel.fetch(kept(1, 3, complete=True))
    assert channel.out()[:3] == ["epoch", 1, "epoch"]
    assert channel.after(at(3)) == []
    assert channel.after(at(1, OTHER), asked=TOP) == "epoch"


# --- who asks ---


def test_what_came_after_a_position_is_known_at_once_where_it_is_recent():
    channel = channel_with(5, 8)
    assert channel.after(at(6)) == [7, 8]
    assert channel.after(at(8)) == []
    assert channel.after(at(4)) == [5, 6, 7, 8]
    assert channel.after(at(4), limit=2) == [5, 6]
    assert channel.needs == {}


def test_who_names_no_position_is_unknown_without_a_look():
    for channel in (Channel(), channel_with(5, 8)):
        assert channel.after(None) == "unknown"
        assert channel.needs == {}


def test_what_is_not_recent_is_fetched_first():
    channel = channel_with(105, 108, size=100)
    assert channel.after(at(100)) is None
    [lowest] = channel.needs.values()
    assert lowest <= 100
    channel.fetch(kept(lowest, 108))
    assert channel.after(at(100), asked=lowest) == [*range(101, 109)]


def test_where_nothing_is_known_it_is_fetched_first():
    channel = Channel(size=200)
    assert channel.after(at(150)) is None
    [lowest] = channel.needs.values()
    assert lowest <= 150
    channel.fetch(kept(lowest + 1, 155))
    assert channel.after(at(150), asked=lowest) == [151, 152, 153, 154, 155]


def test_who_comes_during_the_first_fetch_is_not_told_by_what_that_has_read_before():
    channel = Channel()
    channel.track.need(TOP)
    want = channel.begin()
    assert channel.after(at(3, OTHER)) is None
    channel.end(want, kept(1, 5, complete=True))
    want = channel.begin()
    assert not channel.track.answers(want)
    channel.end(want, kept(1, 3, OTHER, complete=True))
    assert channel.after(at(3, OTHER), asked=0) == []


def test_no_more_is_fetched_than_a_little_more_than_was_missed():
    """A channel may keep a hundred thousand events, and its clients miss three of them."""
    channel = Channel(size=100_000)
    assert channel.after(at(50_000)) is None
    assert channel.needs == {"a": 50_000 - FURTHER}
    channel.fetch(kept(49_990, 50_010))
    assert channel.after(at(49_980)) is None
    assert channel.needs == {"a": 49_980 - FURTHER}
    channel.fetch(kept(49_900, 50_010))
    assert channel.after(at(48_010)) is None
    assert channel.needs == {"a": 48_010 - 2_000}


def test_who_is_too_far_back_is_told_only_after_a_look_from_there_on():
    channel = channel_with(5, 8)
    assert channel.after(at(2)) is None
    assert channel.after(at(2), asked=3) is None
    assert channel.after(at(2), asked=2) == "expired"
    assert channel.after(at(2), asked=0) == "expired"


def test_where_the_broker_had_no_more_a_look_at_the_end_will_do():
    """It may have another past by now, from which the client comes."""
    channel = channel_with(5, 8, complete=True)
    assert channel.after(at(2)) is None
    assert channel.needs == {"a": TOP}
    channel.fetch(kept(9, 8))
    assert channel.after(at(2), asked=TOP) == "expired"
    assert channel.needs == {}


def test_that_the_broker_has_no_more_may_come_with_what_is_known_already():
    channel = channel_with(5, 8)
    assert channel.after(at(2)) is None
    channel.fetch(kept(5, 8, complete=True))
    assert channel.after(at(2), asked=TOP) == "expired"
    channel.track.need(0)
    channel.fetch(kept(7, 8, complete=True))
    assert channel.after(at(3), asked=TOP) == "expired"
    assert channel.after(at(5)) == [6, 7, 8]


def test_that_the_broker_has_no_more_than_what_was_fetched_is_not_taken_for_less():
    channel = channel_with(5, 8)
    channel.track.need(3)
    channel.fetch(kept(3, 8, complete=True))
    assert channel.after(at(2)) == [3, 4, 5, 6, 7, 8]
    assert channel.after(at(1), asked=TOP) == "expired"


def test_who_seems_to_be_ahead_is_told_only_after_a_look():
    channel = channel_with(5, 8)
    assert channel.after(at(9)) is None
    channel.fetch(kept(9, 10))
    assert channel.out() == [9, 10]
    assert channel.after(at(9), asked=TOP) == [10]
    assert channel.after(at(12)) is None
    assert channel.after(at(12), asked=TOP) == "epoch"


@pytest.mark.parametrize("position", [at(6, OTHER), at(6, check=99), at(8, check=99), at(4, check=99), at(2, OTHER)])
def test_who_seems_to_be_of_another_epoch_is_told_only_after_a_look(position):
    channel = channel_with(5, 8)
    assert channel.after(position) is None
    channel.fetch(kept(9, 8))
    assert channel.after(position, asked=TOP) == "epoch"


def test_who_is_of_a_newer_epoch_goes_on_after_a_look():
    channel = channel_with(5, 8)
    assert channel.after(at(2, OTHER)) is None
    channel.fetch(kept(1, 3, epoch=OTHER, complete=True))
    assert channel.out() == ["epoch", 1, 2, 3]
    assert channel.after(at(2, OTHER), asked=TOP) == [3]


def test_who_is_of_a_newer_epoch_with_lower_numbers_goes_on_after_a_look():
    channel = channel_with(95, 100)
    assert channel.after(at(2, OTHER)) is None
    channel.fetch(Past(at(4, OTHER), at(4, OTHER), (), complete=False))
    assert channel.out() == ["epoch"]
    assert channel.after(at(4, OTHER), asked=TOP) == []


def test_an_epoch_that_has_come_back_has_not_ended():
    channel = channel_with(1, 3, complete=True)
    channel.track.refresh()
    channel.fetch(kept(1, 1, epoch=OTHER, complete=True))
    channel.track.refresh()
    channel.fetch(kept(1, 3, complete=True))
    assert channel.after(at(1)) == [2, 3]
    assert channel.after(at(5)) is None


def test_the_present_epoch_has_not_ended_though_somebody_was_undone_in_it():
    channel = channel_with(1, 3, complete=True)
    assert channel.after(at(2, check=99)) is None
    channel.fetch(kept(4, 3))
    assert channel.after(at(2, check=99), asked=TOP) == "epoch"
    assert channel.after(at(3, check=99)) is None


def test_who_asks_may_be_told_less_than_there_is_but_nothing_is_left_out():
    channel = channel_with(1, 9)
    seen, limit = at(0), 2
    while found := channel.track.after(seen, None, limit):
        assert [position.offset for position, _ in found] == [*range(seen.offset + 1, seen.offset + len(found) + 1)]
        assert len(found) <= limit
        seen = found[-1][0]
    assert seen == at(9)


def test_what_is_there_already_is_not_fetched_once_more():
    channel = channel_with(5, 8)
    channel.track.need(4)
    assert channel.track.answers(channel.begin())
    channel.track.need(3)
    assert not channel.track.answers(channel.begin())


def test_where_the_broker_has_no_more_everything_older_is_there():
    channel = channel_with(5, 8, complete=True)
    channel.track.need(1)
    assert channel.track.answers(channel.begin())


@pytest.mark.parametrize("why", ["refresh", "live", "ahead"])
def test_what_may_have_come_since_is_fetched_though_all_before_it_is_there(why):
    channel = channel_with(5, 8, complete=True)
    if why == "refresh":
        channel.track.refresh()
    elif why == "live":
        channel.live(10)
    else:
        assert channel.after(at(9)) is None
    channel.track.need(5)
    assert not channel.track.answers(channel.begin())


def test_nothing_is_there_where_nothing_is_known():
    channel = Channel()
    channel.track.need(TOP)
    assert not channel.track.answers(channel.begin())


# --- what is recent ---


def test_as_many_events_are_recent_as_are_kept():
    channel = channel_with(1, 3, size=3)
    channel.live(4, 5)
    assert channel.after(at(2)) == [3, 4, 5]
    assert channel.after(at(1)) is None


def test_recent_events_are_recent_until_the_last_one_is_too_old():
    channel = channel_with(1, 3, ttl=60)
    channel.live(4, now=50.0)
    channel.track.expire(109.0)
    assert channel.after(at(2)) == [3, 4]
    channel.track.expire(110.0)
    assert channel.after(at(4)) == []
    assert channel.after(at(2)) is None  # the broker may have later ones, and so all of them
    channel.live(5, now=200.0)
    assert channel.out() == [4, 5]
    assert channel.after(at(4)) == [5]


def test_a_fetch_makes_old_events_recent():
    channel = channel_with(1, 3, ttl=60)
    channel.track.need(0)
    channel.fetch(kept(1, 3), now=100.0)
    channel.track.expire(159.0)
    assert channel.after(at(0)) == [1, 2, 3]


def test_what_is_too_old_when_it_is_fetched_anew_is_not_in_the_way():
    channel = channel_with(1, 3, ttl=60)
    channel.track.refresh()
    channel.fetch(kept(4, 5), now=100.0)
    assert channel.out() == [4, 5]
    assert channel.after(at(3)) == [4, 5]


def test_recent_events_can_be_forgotten_to_make_room_and_are_fetched_again():
    channel = channel_with(1, 8, complete=True)
    size = channel.track.size
    assert size > 8 * ENTRY_BYTES
    channel.track.shrink()
    assert channel.track.size < size * 0.6
    assert channel.after(at(4)) == [5, 6, 7, 8]
    assert channel.after(at(2)) is None
    channel.fetch(kept(1, 8))
    assert channel.after(at(2), asked=0) == [3, 4, 5, 6, 7, 8]


def test_what_had_to_make_room_after_it_was_fetched_is_not_gone():
    channel = channel_with(5, 8)
    assert channel.after(at(2)) is None
    channel.fetch(kept(1, 8))
    channel.track.shrink()
    assert channel.after(at(2), asked=0) is None
    channel.fetch(kept(3, 8))
    assert channel.after(at(2), asked=0) == [3, 4, 5, 6, 7, 8]


# --- those who wait ---


def test_those_who_wait_are_fed_by_a_fetch_that_begins_later():
    channel = channel_with(5, 8)
    channel.track.refresh()
    want = channel.begin()
    channel.track.need(0)
    channel.track.starve("late")
    channel.end(want, kept(9, 8))
    assert (channel.track.feed(), channel.track.starves("late")) == ([], True)
    channel.track.starve("too")
    channel.fetch(kept(1, 8))
    assert channel.track.feed() == ["late", "too"]
    assert not channel.track.starves("late")
    assert channel.track.feed() == []


def test_those_who_wait_go_on_waiting_where_a_fetch_fails():
    channel = channel_with(5, 8)
    channel.track.need(0)
    channel.track.starve("one")
    channel.track.give_back(channel.begin())
    assert (channel.track.feed(), channel.track.starves("one")) == ([], True)
    channel.fetch(kept(1, 8))
    assert channel.track.feed() == ["one"]


def test_who_has_left_waits_no_longer():
    channel = channel_with(5, 8)
    channel.track.need(0)
    channel.track.starve("one")
    channel.track.starve("two")
    channel.track.forget("one")
    channel.track.forget("nobody")
    channel.fetch(kept(1, 8))
    assert channel.track.feed() == ["two"]


# --- ids ---


@pytest.mark.parametrize("old", [None, "an id"])
@pytest.mark.parametrize("new", [None, "another"])
def test_an_event_is_given_an_id_or_loses_it(old, new):
    event = Event("name", "two\nlines", old)
    assert with_id(event, encode(event), new) == (
        Event("name", "two\nlines", new),
        encode(Event("name", "two\nlines", new)),
    )
