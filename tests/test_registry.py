"""The registry: how many streams may be open, what is told of each at its end, and how all of them end."""

import asyncio
import gc
import logging
import os
import re
import threading
import time
import weakref
from collections import deque

import pytest

from django_sse import registry
from django_sse.exceptions import BrokerUnavailable, TooManyStreams
from django_sse.registry import Account, Registry, StreamInfo, open_streams
from django_sse.signals import stream_closed
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until


class View:
    """The view of these streams."""


class Fake:
    """A stream as the registry sees one."""

    def __init__(self, streams, owner=None, *, stays=False, stalled=0.0, retry=2000):
        self.account = Account(StreamInfo(View, "/", owner=owner), retry)
        self.streams = streams
        self.ends = []
        self.stays = stays
        self.stalled = stalled

    def end(self, reason, last=b""):
        self.ends.append((reason, last, time.monotonic()))
        if not self.stays:
            self.streams.forget(self)

    def close(self, reason=None):
        self.end(reason)

    def stalled_for(self, now):
        return self.stalled


@pytest.fixture
def streams():
    return Registry()


def admit(streams, *fakes, limit=None, owner_limit=None):
    for fake in fakes:
        streams.admit(fake, limit=limit, owner=fake.account.info.owner, owner_limit=owner_limit)
    return fakes


def watchers(but=()):
    """The threads that watch, except those that did when a test began: other streams' may end at any time."""
    return {thread for thread in threading.enumerate() if thread.name == "django-sse-watch"} - set(but)


@pytest.fixture
def told():
    """What stream_closed has said of this view's streams."""
    told = []

    def receiver(sender, signal, **details):
        told.append({**details, "thread": threading.current_thread()})

    stream_closed.connect(receiver, sender=View)
    yield told
    stream_closed.disconnect(receiver, sender=View)


# --- limits ---


def test_streams_are_counted_until_they_are_forgotten(streams):
    one, two = admit(streams, Fake(streams), Fake(streams))
    assert len(streams) == 2
    assert set(streams.all()) == {one, two}
    streams.forget(one)
    streams.forget(one)
    assert streams.all() == [two]


def test_a_stream_beyond_the_limit_is_refused(streams):
    one, two = admit(streams, Fake(streams), Fake(streams), limit=2)
    with pytest.raises(TooManyStreams, match=r'^2 streams are open in this process\. .*DJANGO_SSE\["MAX_STREAMS"\]'):
        admit(streams, Fake(streams), limit=2)
    assert len(streams) == 2
    admit(streams, Fake(streams), limit=3)
    streams.forget(one)
    streams.forget(two)
    admit(streams, Fake(streams), limit=2)


def test_a_stream_beyond_its_owners_limit_is_refused(streams):
    mine, *_ = admit(streams, Fake(streams, "me"), Fake(streams, "me"), owner_limit=2)
    with pytest.raises(TooManyStreams, match=r"""the user 'me' .*DJANGO_SSE\["MAX_STREAMS_PER_USER"\]"""):
        admit(streams, Fake(streams, "me"), owner_limit=2)
    yours = admit(streams, Fake(streams, "you"), Fake(streams, "you"), owner_limit=2)
    assert len(streams) == 2 + len(yours)
    streams.forget(mine)
    admit(streams, Fake(streams, "me"), owner_limit=2)


def test_whoever_is_nobody_has_no_owners_limit(streams):
    fakes = admit(streams, *(Fake(streams) for _ in range(5)), owner_limit=1)
    assert len(streams) == len(fakes) == 5


def test_a_refused_stream_takes_no_place_of_its_owner(streams):
    (one,) = admit(streams, Fake(streams), limit=1)
    with pytest.raises(TooManyStreams):
        admit(streams, Fake(streams, "me"), limit=1, owner_limit=1)
    streams.forget(one)
    admit(streams, Fake(streams, "me"), limit=1, owner_limit=1)


def test_nothing_is_kept_of_an_owner_whose_streams_are_over(streams):
    for number in range(10):
        (fake,) = admit(streams, Fake(streams, number), owner_limit=1)
        streams.forget(fake)
    assert streams._owners == {}


def test_a_stream_that_is_dropped_unclosed_gives_its_place_back(streams):
    admit(streams, Fake(streams, "me"), limit=1, owner_limit=1)
    gc.collect()
    assert len(streams) == 0
    admit(streams, Fake(streams, "me"), limit=1, owner_limit=1)


def test_nothing_is_kept_of_an_owner_whose_streams_were_dropped(streams):
    (fake,) = admit(streams, Fake(streams, "me"), owner_limit=1)
    account = fake.account
    del fake
    gc.collect()
    streams.drop(account)  # as Stream.__del__ does
    admit(streams, Fake(streams, "you"), owner_limit=1)
    assert list(streams._owners) == ["you"]


def test_a_limit_holds_for_threads_that_come_at_once(streams):
    refused = []
    barrier = threading.Barrier(8)
    kept = [Fake(streams, "me") for _ in range(8)]

    def come(fake):
        barrier.wait(10)
        try:
            streams.admit(fake, limit=5, owner="me", owner_limit=3)
        except TooManyStreams:
            refused.append(fake)

    threads = [threading.Thread(target=come, args=(fake,)) for fake in kept]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(streams), len(refused)) == (3, 5)


# --- the account ---


def test_an_account_that_was_never_opened_tells_nothing(caplog):
    account = Account(StreamInfo(View, "/"))
    assert account.settle("client") is None
    assert caplog.records == []


def test_an_account_is_opened_and_settled_once(caplog):
    caplog.set_level(logging.INFO, "django_sse.streams")
    info = StreamInfo(View, "/news", ("a", "b"), "me")
    account = Account(info)
    assert account.open()
    assert not account.open()
    account.events, account.bytes = 3, 120
    told = account.settle("client")
    assert account.settle("error") is None
    assert told.pop("seconds") >= 0
    assert told == {"sender": View, "stream": info, "reason": "client", "events": 3, "bytes": 120}
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert re.fullmatch(
        r"stream closed: reason=client events=3 bytes=120 seconds=0\.\d{3} view=tests\.test_registry\.View path=/news",
        record.getMessage(),
    )
    fields = {name: getattr(record, name) for name in ("reason", "events", "bytes", "view", "path", "channels")}
    assert fields == {
        "reason": "client",
        "events": 3,
        "bytes": 120,
        "view": "tests.test_registry.View",
        "path": "/news",
        "channels": ("a", "b"),
    }
    assert 0 <= record.seconds < 5


@pytest.mark.parametrize(
    ("reason", "level"),
    [
        ("client", logging.INFO),
        ("finished", logging.INFO),
        ("max_age", logging.INFO),
        ("shutdown", logging.INFO),
        ("overflow", logging.WARNING),
        ("stalled", logging.WARNING),
        ("error", logging.ERROR),
    ],
)
def test_the_level_says_how_bad_an_end_is(caplog, reason, level):
    caplog.set_level(logging.INFO, "django_sse.streams")
    account = Account(StreamInfo(View, "/"))
    account.open()
    account.settle(reason)
    assert [record.levelno for record in caplog.records] == [level]


def test_an_error_is_logged_with_its_traceback(caplog):
    account = Account(StreamInfo(View, "/"))
    account.open()
    account.settle("error", ZeroDivisionError("the program's"))
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_a_broker_that_is_away_is_no_error_of_the_program(caplog):
    account = Account(StreamInfo(View, "/"))
    account.open()
    account.settle("error", BrokerUnavailable("away"))
    assert [(record.levelno, record.exc_info) for record in caplog.records] == [(logging.WARNING, None)]


def test_a_path_is_not_taken_for_a_format(caplog):
    caplog.set_level(logging.INFO, "django_sse.streams")
    account = Account(StreamInfo(View, "/100%s/%(reason)s"))
    account.open()
    account.settle("client")
    assert caplog.records[0].getMessage().endswith("path=/100%s/%(reason)s")


def test_an_account_is_settled_by_one_thread_of_many():
    account = Account(StreamInfo(View, "/"))
    account.open()
    barrier = threading.Barrier(8)
    told = []

    def settle():
        barrier.wait(10)
        told.append(account.settle("client"))

    threads = [threading.Thread(target=settle) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len([one for one in told if one is not None]) == 1


def test_the_streams_of_a_process_are_numbered():
    first, second = StreamInfo(View, "/"), StreamInfo(View, "/")
    assert second.id > first.id
    assert first != second


def test_a_stream_that_was_collected_is_told_of_with_the_next_one(streams, told):
    account = Account(StreamInfo(View, "/dropped"))
    account.open()
    streams.drop(account)
    assert told == []
    admit(streams, Fake(streams))
    assert [(one["reason"], one["stream"].path) for one in told] == [("client", "/dropped")]
    streams.drop(account)
    (fake,) = admit(streams, Fake(streams))
    streams.forget(fake)
    assert len(told) == 1


def test_a_thread_that_finds_nothing_left_to_reap_goes_on(streams):
    class Emptied(deque):
        """Has one when it is looked at, and none when it is asked: another thread was quicker."""

        def popleft(self):
            self.clear()
            return super().popleft()

    streams._dropped = Emptied([Account(StreamInfo(View, "/"))])
    (fake,) = admit(streams, Fake(streams))
    assert streams.all() == [fake]


def test_threads_that_reap_at_once_tell_each_stream_once(streams, told):
    for number in range(200):
        account = Account(StreamInfo(View, f"/{number}"))
        account.open()
        streams.drop(account)
    barrier = threading.Barrier(4)

    def reap():
        barrier.wait(10)
        streams._reap()

    threads = [threading.Thread(target=reap) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(one["stream"].path for one in told) == sorted(f"/{number}" for number in range(200))


def test_the_watch_begins_anew_when_no_thread_could_be_had(streams, monkeypatch):
    before = watchers()
    (stalled,) = admit(streams, Fake(streams, stalled=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streams.watch(0.02)
    streams.watch(0.02)
    until(lambda: stalled.ends)
    until(lambda: not watchers(before))


# --- telling ---


def an_end(path="/"):
    return {"sender": View, "stream": StreamInfo(View, path), "reason": "client", "events": 0, "bytes": 0, "seconds": 0}


def test_an_end_that_nobody_listens_to_costs_nothing(streams, monkeypatch):
    started = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread.name))
    # The views of other tests have receivers for every stream of this process.
    monkeypatch.setattr(stream_closed, "receivers", [])
    streams.send_closed(an_end())

    async def main():
        streams.send_closed(an_end())

    asyncio.run(main())
    assert started == []


def test_a_thread_tells_itself(streams, told):
    streams.send_closed(an_end())
    assert [one["thread"] for one in told] == [threading.current_thread()]


@needs_loops
def test_a_loop_has_all_ends_told_by_one_thread_in_their_order(streams, told):
    all_sent = threading.Event()

    def wait(**kwargs):
        all_sent.wait(10)

    async def main():
        stream_closed.connect(wait, sender=View)
        for number in range(50):
            streams.send_closed(an_end(f"/{number}"))
        all_sent.set()
        stream_closed.disconnect(wait, sender=View)
        await soon(lambda: len(told) == 50)
        await soon(lambda: not told[0]["thread"].is_alive())
        streams.send_closed(an_end("/last"))
        await soon(lambda: len(told) == 51)

    asyncio.run(main())
    assert [one["stream"].path for one in told] == [*(f"/{number}" for number in range(50)), "/last"]
    assert len({one["thread"] for one in told[:50]}) == 1
    assert threading.current_thread() not in [one["thread"] for one in told]


# --- the watch ---


def test_a_stream_that_has_stalled_is_closed_and_the_watch_ends_with_the_last(streams):
    before = watchers()
    stalled, well = admit(streams, Fake(streams, stalled=1.0), Fake(streams))
    streams.watch(0.02)
    streams.watch(0.02)
    assert len(watchers(before)) == 1
    until(lambda: stalled.ends)
    assert stalled.ends[0][0] == "stalled"
    assert well.ends == []
    streams.forget(well)
    until(lambda: not watchers(before))
    assert streams._watcher is None
    (late,) = admit(streams, Fake(streams, stalled=1.0))
    streams.watch(0.02)
    until(lambda: late.ends)
    until(lambda: not watchers(before))


def test_the_watch_keeps_no_stream_that_was_dropped(streams):
    before = watchers()
    (fake,) = admit(streams, Fake(streams))
    streams.watch(0.05)
    dropped = weakref.ref(fake)
    time.sleep(0.12)  # it has looked
    del fake
    gc.collect()
    until(lambda: dropped() is None, timeout=3)
    until(lambda: not watchers(before), timeout=3)


def test_a_stream_whose_end_fails_does_not_end_the_watch(streams, caplog):
    before = watchers()
    failing, other = admit(streams, Fake(streams, stalled=1.0), Fake(streams))
    failing.close = lambda reason: 1 / 0
    streams.watch(0.02)
    until(lambda: caplog.records)
    other.stalled = 1.0
    until(lambda: other.ends)
    streams.forget(failing)
    until(lambda: not watchers(before))


def test_whoever_is_least_patient_is_looked_at_in_time(streams):
    """The first stream's view may have a longer `stall_timeout` than the second's."""
    before = watchers()
    patient, hasty = admit(streams, Fake(streams), Fake(streams, stalled=1.0))
    streams.watch(3600)
    streams.watch(0.02)
    until(lambda: hasty.ends, timeout=3)
    streams.forget(patient)
    until(lambda: not watchers(before), timeout=3)


# --- the end of the process ---


def test_no_stream_is_admitted_by_a_process_that_stops(streams):
    streams.drain(0)
    assert streams.draining
    with pytest.raises(TooManyStreams, match="stopping"):
        admit(streams, Fake(streams))
    assert len(streams) == 0


def test_without_streams_a_drain_returns_at_once(streams):
    begun = time.monotonic()
    streams.drain(60)
    assert time.monotonic() - begun < 0.5


def test_a_drain_without_a_window_ends_all_at_once(streams):
    fakes = admit(streams, *(Fake(streams) for _ in range(50)))
    begun = time.monotonic()
    streams.drain(0)
    assert time.monotonic() - begun < 0.5
    assert [fake.ends[0][0] for fake in fakes] == 50 * ["shutdown"]


def test_a_drain_is_spread_over_its_window_and_returns_with_the_last_stream(streams):
    fakes = admit(streams, *(Fake(streams) for _ in range(20)))
    begun = time.monotonic()
    streams.drain(1)
    took = time.monotonic() - begun
    at = sorted(fake.ends[0][2] - begun for fake in fakes)
    assert 0.9 <= took < 1.5
    assert at[0] < 0.1
    assert all(abs(when - number / 20) < 0.2 for number, when in enumerate(at))


def test_a_drain_waits_for_streams_that_end_later_but_not_for_ever(streams, monkeypatch):
    monkeypatch.setattr(registry, "GRACE", 0.3)
    (stays,) = admit(streams, Fake(streams, stays=True))
    begun = time.monotonic()
    streams.drain(0)
    assert 0.3 <= time.monotonic() - begun < 0.8
    assert len(stays.ends) == 1
    timer = threading.Timer(0.1, streams.forget, [stays])
    timer.start()
    begun = time.monotonic()
    streams.drain(0)
    assert 0.05 < time.monotonic() - begun < 0.28
    timer.join()


def test_each_stream_is_told_when_to_come_back_and_not_all_at_one_time(streams):
    fakes = admit(streams, *(Fake(streams, retry=1000) for _ in range(100)))
    streams.drain(0.01)
    retries = [int(re.fullmatch(rb"retry: (\d+)\n\n", fake.ends[0][1])[1]) for fake in fakes]
    assert all(1000 <= number < 2000 for number in retries)
    assert len(set(retries)) > 50


def test_the_wider_the_window_the_wider_the_return(streams, monkeypatch):
    monkeypatch.setattr(registry.random, "uniform", lambda low, high: high)
    (fake,) = admit(streams, Fake(streams, retry=1000))
    streams.drain(0)
    (late,) = fakes = [Fake(streams, retry=1000)]
    streams.draining = False
    admit(streams, *fakes)
    streams.drain(5)
    assert (fake.ends[0][1], late.ends[0][1]) == (b"retry: 2000\n\n", b"retry: 6000\n\n")


def test_a_stream_without_an_account_comes_back_after_the_default_time(streams):
    (fake,) = admit(streams, Fake(streams, stays=True))
    account, fake.account = fake.account, None
    threading.Timer(0.05, lambda: (setattr(fake, "account", account), streams.forget(fake))).start()
    streams.drain(0)
    assert 2000 <= int(fake.ends[0][1].split()[1]) < 3000


def test_a_stream_whose_end_fails_does_not_keep_the_others_open(streams, caplog, monkeypatch):
    monkeypatch.setattr(registry, "GRACE", 0.1)
    fakes = admit(streams, *(Fake(streams) for _ in range(9)))
    for fake in fakes[::3]:
        fake.end = lambda reason, last: 1 / 0
    streams.drain(0)
    assert [len(fake.ends) for fake in fakes] == 3 * [0, 1, 1]
    assert {record.exc_info[0] for record in caplog.records} == {ZeroDivisionError}
    for fake in fakes:
        streams.forget(fake)


def test_a_second_drain_is_in_more_of_a_hurry(streams):
    fakes = admit(streams, *(Fake(streams) for _ in range(10)))
    slowly = threading.Thread(target=streams.drain, args=(30,))
    slowly.start()
    until(lambda: any(fake.ends for fake in fakes))
    begun = time.monotonic()
    streams.drain(0)
    assert time.monotonic() - begun < 0.5
    slowly.join(2)
    assert not slowly.is_alive()
    assert all(fake.ends for fake in fakes)


def test_a_drain_holds_no_stream_that_was_dropped(streams):
    fakes = list(admit(streams, Fake(streams, stays=True), Fake(streams, stays=True)))
    timer = threading.Timer(0.1, fakes.clear)
    timer.start()
    begun = time.monotonic()
    streams.drain(0)
    assert time.monotonic() - begun < 0.8
    timer.join()


# --- fork ---


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_has_no_streams_of_its_parent():
    before = watchers()
    stream = Fake(open_streams)
    open_streams.admit(stream, limit=None)
    open_streams.watch(0.05)
    held, release = threading.Event(), threading.Event()

    def hold():
        with open_streams._lock:
            held.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    open_streams.draining = True
    try:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child = Fake(open_streams, stalled=1.0)
                assert (len(open_streams), open_streams.draining) == (0, False)
                open_streams.admit(child, limit=1)
                open_streams.watch(0.01)
                until(lambda: child.ends)
                open_streams.forget(stream)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        open_streams.draining = False
        release.set()
        holder.join(10)
        open_streams.forget(stream)
    until(lambda: not watchers(before))
