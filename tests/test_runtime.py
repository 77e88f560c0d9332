"""What the streams of a process share: delivery, pace, overflow, and that nothing of it outlives its owner."""

import asyncio
import gc
import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import pytest
import redis
from django.test import override_settings

from django_sse import hub, recovery, redisqueue, runtime
from django_sse.brokers import redis as redis_broker
from django_sse.brokers.base import Broker, Publication
from django_sse.brokers.memory import MemoryBroker
from django_sse.brokers.redis import RedisBroker
from django_sse.cursor import Cursors
from django_sse.event import encode_payload
from django_sse.exceptions import BrokerUnavailable
from django_sse.history import History
from django_sse.inbox import Inbox
from django_sse.runtime import Runtime
from tests.brokers.proxy import Proxy
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until

BOUNDS = {"max_events": 256, "max_bytes": 1024 * 1024}
BURST = 20_000


class Recorder(Broker):
    """A broker that does nothing but remember what it is told."""

    def __init__(self, error=None):
        super().__init__()
        self.calls = []
        self.error = error

    def publish_all(self, publications):
        for channel, payload, *_ in publications:
            self.deliver([(channel, payload)])
        return [None] * len(publications)

    def fetch(self, channels):
        raise NotImplementedError("no channel here has history")

    def subscribe(self, channel):
        self.calls.append(("subscribe", channel))

    def unsubscribe(self, channel):
        self.calls.append(("unsubscribe", channel))

    def wait_subscribed(self, channels, timeout):
        self.calls.append(("wait", tuple(channels), timeout))
        if self.error is not None:
            raise self.error

    def nudge(self):
        self.calls.append(("nudge",))

    def close(self):
        self.calls.append(("close",))


@pytest.fixture
def broker():
    return Recorder()


@pytest.fixture
def run(broker):
    run = Runtime(broker)
    yield run
    run.close()


@pytest.fixture(params=["memory", "redis"])
def live(request, monkeypatch):
    """A runtime on a broker that delivers, and a function that publishes many texts quickly."""
    # As fast as it can is not very fast while the machine has other things to do.
    monkeypatch.setattr(runtime, "PATIENCE", 10)
    pool = None
    if request.param == "memory":
        run = Runtime(MemoryBroker())

        def publish(channel, texts):
            for text in texts:
                run.broker.publish(channel, encode_payload("", text))
    else:
        server = request.getfixturevalue("redis_server")
        pool = redis.ConnectionPool(host="127.0.0.1", port=server.port)
        run = Runtime(RedisBroker(lambda: redis.Redis(connection_pool=pool)))

        def publish(channel, texts):
            pipeline = redis.Redis(connection_pool=pool).pipeline(transaction=False)
            for text in texts:
                pipeline.publish(channel, encode_payload("", text))
            pipeline.execute()

    yield run, publish
    run.close()
    if pool is not None:
        pool.disconnect()


@pytest.fixture
def fresh():
    """The runtimes of this process are ended before and after."""
    runtime.reset()
    yield
    runtime.reset()


def payload(text):
    return encode_payload("", text)


def texts(taken):
    return [event.data for event, _ in taken]


def logged(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def never():
    """A wake-up call that is not heeded."""


def read(listener, count, got):
    """Take events as fast as they come, as a thread's stream does, until there are `count`."""
    inbox = Inbox(listener)
    while len(got) < count:
        taken = inbox.wait(10)
        if not taken:
            return
        got += texts(taken)


# --- opening and closing --------------------------------------------------------------------------------------------


def test_the_first_listener_of_a_channel_subscribes_and_the_last_unsubscribes(run, broker):
    first = run.open(["a"], **BOUNDS)
    second = run.open(["a"], **BOUNDS)
    first.close()
    assert ("unsubscribe", "a") not in broker.calls
    second.close()
    assert [call for call in broker.calls if call[0] != "wait"] == [("subscribe", "a"), ("unsubscribe", "a")]
    assert run.stats() == {"channels": 0, "subscriptions": 0}


def test_a_listener_of_several_channels_gets_the_events_of_all(run, broker):
    listener = run.open(["a", "b", "a"], **BOUNDS)
    assert run.stats() == {"channels": 2, "subscriptions": 1}
    broker.publish("a", payload("1"))
    broker.publish("b", payload("2"))
    broker.publish("c", payload("3"))
    assert texts(listener.take()) == ["1", "2"]


def test_opening_waits_for_the_broker_for_as_long_as_it_may(run, broker):
    run.open(["a", "b"], timeout=0.25, **BOUNDS)
    run.open(["a"], **BOUNDS)
    assert [call for call in broker.calls if call[0] == "wait"] == [
        ("wait", ("a", "b"), 0.25),
        ("wait", ("a",), runtime.SUBSCRIBE_TIMEOUT),
    ]


def test_nothing_is_left_behind_when_the_broker_is_not_there():
    broker = Recorder(BrokerUnavailable("down"))
    run = Runtime(broker)
    with pytest.raises(BrokerUnavailable, match="down"):
        run.open(["a"], **BOUNDS)
    assert run.stats() == {"channels": 0, "subscriptions": 0}
    assert broker.calls[-1] == ("unsubscribe", "a")


def test_a_client_that_fails_does_not_take_the_channel_from_another(run, broker):
    listener = run.open(["a"], **BOUNDS)
    broker.error = BrokerUnavailable("late")
    with pytest.raises(BrokerUnavailable):
        run.open(["a"], **BOUNDS)
    assert ("unsubscribe", "a") not in broker.calls
    broker.publish("a", payload("1"))
    assert texts(listener.take()) == ["1"]


@pytest.mark.parametrize(
    ("reason", "kept"), [("shutdown", ["1"]), ("max_age", ["1"]), ("client", []), ("stalled", []), ("abandoned", [])]
)
def test_a_closed_listener_keeps_what_waited_for_a_client_that_is_there_and_gets_nothing_more(
    run, broker, reason, kept
):
    listener = run.open(["a"], **BOUNDS)
    broker.publish("a", payload("1"))
    assert listener.ended is None
    listener.close(reason)
    broker.publish("a", payload("2"))
    assert listener.ended == reason
    assert texts(listener.take()) == kept


def test_the_first_reason_for_an_end_is_the_one_that_counts(run):
    listener = run.open(["a"], **BOUNDS)
    listener.close("finished")
    listener.close("client")
    assert listener.ended == "finished"


def test_closing_wakes_whoever_waits(run):
    listener = run.open(["a"], **BOUNDS)
    rings = []
    listener.wake_by(lambda: rings.append(1))
    listener.close()
    assert rings


def test_close_ends_every_stream_and_the_broker(run, broker):
    listeners = [run.open([channel], **BOUNDS) for channel in "aab"]
    waiting = [threading.Thread(target=read, args=(listener, 1, [])) for listener in listeners]
    for thread in waiting:
        thread.start()
    until(lambda: all(listener.subscription.wake for listener in listeners), what="three readers")
    run.close()
    for thread in waiting:
        thread.join(10)
        assert not thread.is_alive()
    assert [listener.ended for listener in listeners] == ["shutdown"] * 3
    assert broker.calls[-1] == ("close",)
    assert run.stats() == {"channels": 0, "subscriptions": 0}


# --- delivery -------------------------------------------------------------------------------------------------------


def test_every_client_gets_the_very_same_bytes(run, broker):
    listeners = [run.open(["a"], **BOUNDS) for _ in range(3)]
    broker.publish("a", payload("1"))
    frames = [frame for listener in listeners for _, frame in listener.take()]
    assert frames[0].endswith(b"data: 1\n\n")
    assert frames[0] is frames[1] is frames[2]


def test_take_gives_at_most_as_many_as_are_asked_for(run, broker):
    listener = run.open(["a"], **BOUNDS)
    for number in range(5):
        broker.publish("a", payload(str(number)))
    assert texts(listener.take(2)) == ["0", "1"]
    assert texts(listener.take()) == ["2", "3", "4"]
    assert listener.take() == []


def test_a_chunk_is_of_no_more_after_the_event_that_makes_it_the_bytes_asked_for(run, broker):
    listener = run.open(["a"], **BOUNDS)
    for number in range(5):
        broker.publish("a", payload(str(number) * 100))
    frames = [b"event: \ndata: %s\n\n" % (b"%d" % number * 100) for number in range(5)]
    assert listener.take_chunk(101) == (frames[0], False)
    assert listener.take_chunk(150) == (frames[1] + frames[2], False)
    assert listener.take_chunk(1000) == (frames[3] + frames[4], True)


def test_a_client_that_takes_in_small_bites_is_waited_for_until_it_is_less_crowded(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    listener = run.open(["a"], max_events=8, max_bytes=1024)
    listener.wake_by(never)
    delivery = threading.Thread(
        target=run.deliver, args=([("a", payload(str(number))) for number in range(5)],), daemon=True
    )
    delivery.start()
    until(lambda: listener.subscription in run._crowded, what="the wait")
    assert len(listener.take(1)) == 1
    delivery.join(10)
    assert not delivery.is_alive()
    assert not listener.subscription.slow


def test_several_clients_take_the_same_bytes_together(run):
    one, two = run.open(["a"], **BOUNDS), run.open(["a"], **BOUNDS)
    other = run.open(["a", "b"], **BOUNDS)
    assert one.audience is two.audience
    assert one.audience is not other.audience
    run.deliver([("a", payload("1")), ("a", payload("2"))])
    (chunk_one, chunk_two), more = one.take_alike([one, two], 1000)
    assert chunk_one is chunk_two
    assert (chunk_one, more) == (b"event: \ndata: 1\n\nevent: \ndata: 2\n\n", False)
    run.deliver([("a", payload("3")), ("a", payload("4"))])
    assert two.take_alike([two], 1) == ([b"event: \ndata: 3\n\n"], True)
    assert texts(two.take()) == ["4"]
    assert texts(one.take()) == ["3", "4"]
    assert (one.events, two.events, two.bytes_alike) == (4, 4, len(chunk_two) * 3 // 2)


def test_clients_that_are_crowded_are_waited_for_until_they_have_taken_together(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    listeners = [run.open(["a"], max_events=8, max_bytes=1024) for _ in range(3)]
    for listener in listeners:
        listener.wake_by(never)
        listener.share(never)
        listener.mark(slow=False)
    delivery = threading.Thread(
        target=run.deliver, args=([("a", payload(str(number))) for number in range(5)],), daemon=True
    )
    delivery.start()
    until(lambda: len(run._crowded) == 3, what="the wait")
    listeners[0].take_alike(listeners, 1000)
    delivery.join(10)
    assert not delivery.is_alive()
    assert [listener.subscription.slow for listener in listeners] == [False] * 3


def test_one_bell_rings_for_all_that_name_it_at_every_event(run):
    listeners = [run.open(["a", "b"], **BOUNDS) for _ in range(3)]
    alone, rings, wakes = run.open(["a", "b"], **BOUNDS), [], []
    alone.wake_by(lambda: wakes.append("alone"))

    def ring():
        rings.append("ring")

    for listener in listeners:
        listener.wake_by(lambda: wakes.append("shared"))
        listener.share(ring)
    for number in range(3):
        run.deliver([("a", payload(str(number))), ("b", payload(str(number)))])
        assert len(rings) == number + 1
        assert all(texts(listener.take()) == [str(number)] * 2 for listener in listeners)
    assert wakes == ["alone"]
    listeners[0].close()
    assert wakes == ["alone", "shared"]  # its end is its own
    run.deliver([("a", payload("more"))])
    assert len(rings) == 4
    listeners[1].unshare(ring)
    run.deliver([("a", payload("and more"))])
    assert len(rings) == 4


def test_a_client_that_begins_to_take_late_is_paced_from_more_than_half_a_mailbox_on(run, waits):
    listener = run.open(["a"], max_events=100, max_bytes=10_000)
    for number in range(53):
        run.deliver([("a", payload(str(number)))])
    assert waits == []
    listener.wake_by(never)
    run.deliver([("a", payload("53"))])
    assert waits == [False]
    assert listener.subscription.slow


@pytest.mark.parametrize("bad", [b"\xff", b"no json", b"[1]", b'["a"]', b'["a\\nb", "c"]', b"{}", "[" * 100_000])
def test_a_payload_that_is_no_event_is_logged_with_its_channel_and_skipped(run, broker, caplog, bad):
    listener = run.open(["room"], **BOUNDS)
    run.deliver([("room", payload("1")), ("room", bad), ("room", payload("2"))])
    assert texts(listener.take()) == ["1", "2"]
    (record,) = [record for record in caplog.records if record.name == "django_sse"]
    assert record.levelno == logging.WARNING
    assert "'room'" in record.getMessage()
    assert len(record.getMessage()) < 1000


def test_a_client_is_woken_once_for_what_it_takes_at_once(run):
    listener = run.open(["a"], **BOUNDS)
    rings = []
    listener.wake_by(lambda: rings.append(1))
    run.deliver([("a", payload(str(number))) for number in range(10)])
    assert len(rings) == 1
    assert len(listener.take()) == 10
    run.deliver([("a", payload("more"))])
    assert len(rings) == 2


def test_a_listener_that_is_dropped_unclosed_gives_a_quiet_channel_back(redis_settings, redis_server):
    run = redisqueue._runtime()
    listener = run.open(["quiet"], **BOUNDS)
    with redis_server.client() as client:
        assert client.pubsub_channels() == [b"quiet"]
        del listener
        gc.collect()
        until(lambda: client.pubsub_channels() == [], what="the end of the subscription")
    assert run.stats() == {"channels": 0, "subscriptions": 0}


def test_a_listener_is_dropped_without_a_lock(run, broker):
    listener = run.open(["a"], **BOUNDS)
    with run._lock:  # the collector may run in the middle of anything
        del listener
        gc.collect()
    assert broker.calls[-1] == ("nudge",)
    run.open(["b"], **BOUNDS).close()
    assert run.stats() == {"channels": 0, "subscriptions": 0}


def test_an_abandoned_listener_is_forgotten_at_the_next_event(run, broker):
    listener = run.open(["a"], **BOUNDS)
    listener.wake_by(never)
    other = run.open(["a", "b"], **BOUNDS)
    del listener
    gc.collect()
    broker.publish("a", payload("1"))
    assert run.stats() == {"channels": 2, "subscriptions": 1}
    assert ("unsubscribe", "a") not in broker.calls
    assert texts(other.take()) == ["1"]
    del other
    gc.collect()
    broker.publish("b", payload("2"))
    assert run.stats() == {"channels": 0, "subscriptions": 0}
    assert sorted(call for call in broker.calls if call[0] == "unsubscribe") == [
        ("unsubscribe", "a"),
        ("unsubscribe", "b"),
    ]


# --- in step --------------------------------------------------------------------------------------------------------


def frames(*texts):
    return b"".join(f"event: \ndata: {text}\n\n".encode() for text in texts)


def deliver(run, *texts):
    run.deliver([("a", payload(text)) for text in texts])


def in_rank(run, count, **bounds):
    """So many listeners, and the rank in which they are."""
    listeners = [run.open(["a"], **(bounds or BOUNDS)) for _ in range(count)]
    rank = listeners[0].rank()
    assert rank.join(listeners) == [True] * count
    return listeners, rank


def test_a_rank_begins_where_one_stands_and_is_joined_by_those_who_stand_there(run):
    early = run.open(["a"], **BOUNDS)
    deliver(run, "1")
    late = [run.open(["a"], **BOUNDS) for _ in range(3)]
    late[1].mark(slow=True)
    late[2].close("shutdown")
    rank = late[0].rank()
    assert early.rank().join([*late, early]) == [False, False, False, True]
    assert rank.join([early, *late]) == [False, True, False, False]
    assert rank.muster() == [True]
    deliver(run, "2")
    assert rank.take(1000) == (frames("2"), False)
    assert [texts(listener.take()) for listener in (early, *late)] == [["1", "2"], [], ["2"], []]


def test_others_may_join_a_rank_where_it_has_come_to(run):
    (one, two), rank = in_rank(run, 2)
    late = run.open(["a"], **BOUNDS)
    deliver(run, "1")
    assert rank.take(1000) == (frames("1"), False)
    assert rank.join([late]) == [False]
    assert texts(late.take()) == ["1"]
    assert rank.join([late]) == [True]
    deliver(run, "2")
    assert rank.take(1000) == (frames("2"), False)
    assert [texts(listener.take()) for listener in (one, two, late)] == [[], [], []]


def test_a_rank_takes_for_all_of_it_what_would_be_taken_for_each(run):
    listeners, rank = in_rank(run, 3)
    alone = run.open(["a"], **BOUNDS)
    deliver(run, "1", "2", "3")
    for max_bytes, expected in (1, (frames("1"), True)), (1000, (frames("2", "3"), False)), (1000, (b"", False)):
        assert rank.take(max_bytes) == expected
        [chunk], more = alone.take_alike([alone], max_bytes)
        assert (chunk, more) == expected
    assert {(each.events, each.bytes_alike) for each in (*listeners, alone)} == {(3, len(frames("1", "2", "3")))}
    assert [texts(listener.take()) for listener in listeners] == [[], [], []]


def test_who_leaves_a_rank_goes_on_alone(run):
    (one, two, three), rank = in_rank(run, 3)
    deliver(run, "1")
    rank.leave(two)
    assert rank.muster() == [True, True]
    assert rank.take(1000) == (frames("1"), False)
    assert texts(two.take()) == ["1"]
    deliver(run, "2")
    assert rank.take(1000) == (frames("2"), False)
    assert texts(two.take()) == ["2"]
    assert (one.events, two.events, three.events) == (2, 2, 2)
    assert rank.join([two]) == [True]
    deliver(run, "3")
    assert rank.take(1000) == (frames("3"), False)
    assert two.take() == []


OTHER_WAYS = {
    "takes": lambda listener: listener.take(1),
    "takes a chunk": lambda listener: listener.take_chunk(1),
    "takes alike": lambda listener: listener.take_alike([listener], 1),
    "is slow": lambda listener: listener.mark(slow=True),
    "is closed": lambda listener: listener.close(),
    "is ended": lambda listener: listener.close("shutdown"),
    "joins another": lambda listener: listener.rank().join([listener]),
}


@pytest.mark.parametrize("way", OTHER_WAYS.values(), ids=OTHER_WAYS.keys())
def test_a_rank_takes_nothing_when_one_has_gone_another_way_until_it_is_known_who_stays(run, way):
    listeners, rank = in_rank(run, 4)
    assert rank.muster() == [True] * 4
    deliver(run, "1", "2")
    way(listeners[1])
    assert rank.take(1000) is rank.take(1000) is None
    assert [listener.events for listener in (listeners[0], *listeners[2:])] == [0, 0, 0]
    way(listeners[3])
    assert rank.muster() == [True, False, True, False]
    assert rank.muster() == [True, True]
    assert rank.take(1000) == (frames("1", "2"), False)
    assert [listener.events for listener in listeners[::2]] == [2, 2]


def test_those_who_stay_in_a_rank_are_told_in_the_order_in_which_they_have_joined(run):
    (one, two), rank = in_rank(run, 2)
    three, four = [run.open(["a"], **BOUNDS) for _ in range(2)]
    assert rank.join([four, three]) == [True, True]
    rank.leave(one)
    three.close()
    assert rank.muster() == [True, True, False]
    assert rank.join([one]) == [True]
    four.close()
    assert rank.muster() == [True, False, True]
    two.close()
    assert rank.muster() == [False, True]
    deliver(run, "1")
    assert rank.take(1000) == (frames("1"), False)
    assert one.events == 1


def test_those_of_a_rank_that_overflow_leave_it_with_what_waited(run):
    listeners, rank = in_rank(run, 2, max_events=3, max_bytes=1000)
    other = run.open(["a"], **BOUNDS)
    deliver(run, "0")
    assert rank.take(1000) == (frames("0"), False)
    deliver(run, "1", "2", "3", "4")
    assert [listener.ended for listener in listeners] == ["overflow"] * 2
    assert rank.take(1000) is None
    assert rank.muster() == [False, False]
    assert [texts(listener.take()) for listener in listeners] == [["1", "2", "3"]] * 2
    assert texts(other.take()) == ["0", "1", "2", "3", "4"]


def crowd(run, listeners, *texts):
    """Deliver events in another thread; return that when all of the listeners are waited for."""
    for listener in listeners:
        listener.wake_by(never)
        listener.share(never)
        listener.mark(slow=False)
    delivery = threading.Thread(target=deliver, args=(run, *texts), daemon=True)
    delivery.start()
    until(lambda: len(run._crowded) == len(listeners), what="the wait")
    return delivery


def test_those_of_a_rank_that_are_crowded_are_waited_for_until_it_has_taken(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    listeners, rank = in_rank(run, 3, max_events=8, max_bytes=1024)
    delivery = crowd(run, listeners, *"01234")
    assert rank.take(1) == (frames("0"), True)
    delivery.join(10)
    assert not delivery.is_alive()
    assert run._crowded == set()
    assert [listener.subscription.slow for listener in listeners] == [False] * 3
    assert rank.take(1000) == (frames("1", "2", "3", "4"), False)


def test_those_of_a_rank_that_are_crowded_still_when_it_has_taken_are_waited_for_still(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    listeners, rank = in_rank(run, 2, max_events=200, max_bytes=120)
    delivery = crowd(run, listeners, "0", "1" * 60)
    assert rank.take(1) == (frames("0"), True)
    assert len(run._crowded) == 2
    assert rank.take(1) == (frames("1" * 60), False)
    assert run._crowded == set()
    delivery.join(10)
    assert not delivery.is_alive()
    assert [listener.subscription.slow for listener in listeners] == [False] * 2


def test_those_of_a_rank_that_does_not_take_are_slow_and_leave_it(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 0.001)
    listeners, rank = in_rank(run, 2)
    for listener in listeners:
        listener.wake_by(never)
    numbers = [str(number) for number in range(200)]
    deliver(run, *numbers)
    assert [listener.subscription.slow for listener in listeners] == [True, True]
    assert rank.take(1000) is None
    assert rank.muster() == [False, False]
    assert [texts(listener.take()) for listener in listeners] == [numbers, numbers]
    assert rank.join(listeners) == [False, False]


def test_who_goes_another_way_in_another_thread_loses_nothing_and_neither_do_the_others(run, monkeypatch):
    """Whatever becomes of one of a rank, and whenever: each gets all until its end, in order and once."""
    monkeypatch.setattr(runtime, "PATIENCE", 10)
    listeners, rank = in_rank(run, 12)
    expected = [str(number) for number in range(2000)]
    got = dict.fromkeys(listeners, b"")
    in_step, chance = list(listeners), random.Random(7)
    stop = threading.Event()
    for listener in listeners:
        listener.wake_by(never)

    def disturb():
        for listener in chance.sample(listeners, 4):
            listener.mark(slow=True)
            stop.wait(0.002)
            listener.mark(slow=False)
            stop.wait(0.002)
        for listener in listeners[:4]:
            listener.close("shutdown")
            stop.wait(0.002)

    threads = [
        threading.Thread(target=disturb, daemon=True),
        threading.Thread(target=deliver, args=(run, *expected), daemon=True),
    ]

    def look():
        """Do once what a pump does."""
        while in_step and (taken := rank.take(200)) is None:
            in_step[:] = [one for one, stays in zip(in_step, rank.muster(), strict=True) if stays]
        for listener in listeners:
            if listener in in_step:
                got[listener] += taken[0]
            else:
                got[listener] += b"".join(frame for _, frame in listener.take())
        others = [listener for listener in listeners if listener not in in_step]
        in_step.extend(one for one, joined in zip(others, rank.join(others), strict=True) if joined)
        return all(listener.ended or got[listener] == whole for listener in listeners)

    whole = frames(*expected)
    for thread in threads:
        thread.start()
    until(lambda: any(look() for _ in range(20)), what="all events")
    stop.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    look()
    assert [listener.ended for listener in listeners] == ["shutdown"] * 4 + [None] * 8
    for listener in listeners:
        assert whole.startswith(got[listener])
        assert listener.events == got[listener].count(b"\n\n")
        assert len(listener.take()) == 0


# --- pace and overflow ----------------------------------------------------------------------------------------------


def test_a_burst_loses_nothing_of_a_thread_that_reads_as_fast_as_it_can(live):
    run, publish = live
    listener = run.open(["a"], **BOUNDS)
    got = []
    reader = threading.Thread(target=read, args=(listener, BURST, got))
    reader.start()
    until(lambda: listener.subscription.wake, what="the reader")
    publish("a", [str(number) for number in range(BURST)])
    reader.join(60)
    assert not reader.is_alive()
    assert listener.ended is None
    assert got == [str(number) for number in range(BURST)]


@needs_loops
def test_a_burst_loses_nothing_of_tasks_that_read_as_fast_as_they_can(live):
    run, publish = live

    async def take_all(listener):
        inbox, got = Inbox(listener), []
        while len(got) < BURST:
            taken = await inbox.await_(10)
            if not taken:
                break
            got += texts(taken)
        return got

    async def main():
        listeners = [run.open(["a"], **BOUNDS) for _ in range(3)]
        tasks = [asyncio.create_task(take_all(listener)) for listener in listeners]
        await soon(lambda: all(listener.subscription.wake for listener in listeners))
        publisher = threading.Thread(target=publish, args=("a", [str(number) for number in range(BURST)]))
        publisher.start()
        got = await asyncio.wait_for(asyncio.gather(*tasks), 60)
        publisher.join(10)
        return [listener.ended for listener in listeners], got

    ended, got = asyncio.run(main())
    assert ended == [None] * 3
    for each in got:
        assert each == [str(number) for number in range(BURST)]


@pytest.fixture
def waits(run, monkeypatch):
    """What became of each time that the runtime waited for its clients: whether they took their events."""
    outcomes = []
    wait = run._calm.wait

    def spy(timeout):
        outcomes.append(wait(timeout))
        return outcomes[-1]

    monkeypatch.setattr(run._calm, "wait", spy)
    return outcomes


def test_a_client_that_never_takes_is_ended_and_holds_the_others_up_once(run, waits, caplog):
    stalled = run.open(["a"], **BOUNDS)
    stalled.wake_by(never)
    healthy = run.open(["a"], **BOUNDS)
    got = []
    reader = threading.Thread(target=read, args=(healthy, 5000, got))
    reader.start()
    until(lambda: healthy.subscription.wake, what="the reader")
    for number in range(5000):
        run.deliver([("a", payload(str(number)))])
    reader.join(30)
    assert got == [str(number) for number in range(5000)]
    assert stalled.ended == "overflow"
    assert texts(stalled.take()) == [str(number) for number in range(256)]
    assert healthy.ended is None
    assert waits.count(False) == 1
    (line,) = logged(caplog, "overflow")
    assert "1 stream(s) on channel 'a'" in line
    assert run.stats() == {"channels": 1, "subscriptions": 1}


def test_a_client_that_is_said_to_be_slow_is_not_waited_for_until_it_is_said_not_to_be(run, waits):
    listener = run.open(["a"], **BOUNDS)
    listener.wake_by(never)

    def burst():
        run.deliver([("a", payload(str(number))) for number in range(200)])
        assert len(listener.take()) == 200
        return len(waits)

    listener.mark(slow=True)
    assert burst() == 0
    listener.mark(slow=False)
    assert burst() > 0
    assert listener.ended is None


def test_a_client_that_is_said_to_be_slow_is_waited_for_no_longer(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    listener = run.open(["a"], **BOUNDS)
    listener.wake_by(never)
    delivery = threading.Thread(
        target=run.deliver, args=([("a", payload(str(number))) for number in range(129)],), daemon=True
    )
    delivery.start()
    until(lambda: listener.subscription in run._crowded, what="the wait")
    listener.mark(slow=False)
    assert listener.subscription in run._crowded
    listener.mark(slow=True)
    delivery.join(10)
    assert not delivery.is_alive()


def test_a_stream_that_says_when_its_client_is_slow_is_given_more_time_and_not_for_ever(run, monkeypatch):
    """It only waits for its turn in this process."""
    monkeypatch.setattr(runtime, "PATIENCE", 0.01)
    timeouts, wait = [], run._calm.wait
    monkeypatch.setattr(run._calm, "wait", lambda timeout: timeouts.append(timeout) or wait(timeout))
    plain, prompt = run.open(["a"], **BOUNDS), run.open(["b"], **BOUNDS)
    for listener in (plain, prompt):
        listener.wake_by(never)
    prompt.mark(slow=False)
    run.deliver([("a", payload(str(number))) for number in range(200)])
    assert timeouts == [0.01]
    assert plain.subscription.slow
    timeouts.clear()
    run.deliver([("b", payload(str(number))) for number in range(200)])
    assert timeouts == [0.01, 0.1]
    assert prompt.subscription.slow
    assert len(prompt.take()) == 200


def test_a_slow_client_is_waited_for_again_only_when_it_has_caught_up(run, waits):
    listener = run.open(["a"], **BOUNDS)
    listener.wake_by(never)

    def burst():
        run.deliver([("a", payload(str(number))) for number in range(200)])
        assert len(listener.take()) == 200
        return waits.count(False)

    assert [burst(), burst(), burst()] == [1, 1, 1]
    assert listener.take() == []
    assert burst() == 2
    assert listener.ended is None


def test_the_last_client_that_overflows_gives_the_channel_back(run, broker, caplog):
    listener = run.open(["a"], max_events=2, max_bytes=1000)
    rings = []
    listener.wake_by(lambda: rings.append(listener.ended))
    run.deliver([("a", payload(str(number))) for number in range(3)])
    assert listener.ended == "overflow"
    assert rings[-1] == "overflow"
    assert broker.calls[-1] == ("unsubscribe", "a")
    assert texts(listener.take()) == ["0", "1"]


def test_what_comes_in_one_batch_with_an_overflow_reaches_the_others(run, caplog):
    small = [run.open([channel], max_events=1, max_bytes=1000) for channel in ("a", "b")]
    for listener in small:
        listener.mark(slow=True)  # is not waited for
        listener.wake_by(never)
    other = run.open(["a", "b", "c"], **BOUNDS)
    batch = [(channel, payload(f"{channel}{number}")) for number in range(3) for channel in ("a", "b", "c")]
    run.deliver(batch)
    assert texts(other.take()) == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert [listener.ended for listener in small] == ["overflow", "overflow"]
    assert [texts(listener.take()) for listener in small] == [["a0"], ["b0"]]
    assert [line.partition("channel ")[2][:3] for line in logged(caplog, "overflow")] == ["'a'", "'b'"]


def test_a_mailbox_is_bounded_in_bytes_as_well(run):
    listener = run.open(["a"], max_events=256, max_bytes=1000)
    run.deliver([("a", payload("x" * 400)) for _ in range(4)])
    assert listener.ended == "overflow"
    assert len(listener.take()) == 2


def test_an_event_larger_than_the_bound_arrives_if_nothing_else_waits(run):
    listener = run.open(["a"], max_events=256, max_bytes=1000)
    run.deliver([("a", payload("x" * 5000))])
    assert texts(listener.take()) == ["x" * 5000]
    assert listener.ended is None


def test_a_client_that_has_not_begun_to_take_is_not_waited_for_and_ends_without_a_word(run, waits, caplog):
    listener = run.open(["a"], **BOUNDS)
    for number in range(300):
        run.deliver([("a", payload(str(number)))])
    assert listener.ended == "overflow"
    assert waits == []
    assert caplog.records == []


@needs_loops
def test_a_thread_that_runs_a_loop_is_never_held_up(run, waits):
    async def main():
        listener = run.open(["a"], **BOUNDS)
        listener.wake_by(never)
        loop = asyncio.get_running_loop()
        began = loop.time()
        run.deliver([("a", payload(str(number))) for number in range(300)])
        return loop.time() - began, listener.ended

    seconds, ended = asyncio.run(main())
    assert ended == "overflow"
    assert seconds < runtime.PATIENCE * 5
    assert not any(waits)


def test_the_end_of_the_client_that_is_waited_for_ends_the_wait(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    stalled = run.open(["a"], **BOUNDS)
    stalled.wake_by(never)
    delivery = threading.Thread(
        target=run.deliver, args=([("a", payload(str(number))) for number in range(200)],), daemon=True
    )
    delivery.start()
    until(lambda: stalled.subscription in run._crowded, what="the wait")
    stalled.close()
    delivery.join(10)
    assert not delivery.is_alive()


def test_the_end_of_one_of_those_that_are_waited_for_leaves_the_other_its_time(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    first, second = run.open(["a"], **BOUNDS), run.open(["a"], **BOUNDS)
    for listener in (first, second):
        listener.wake_by(never)
    delivery = threading.Thread(
        target=run.deliver, args=([("a", payload(str(number))) for number in range(129)],), daemon=True
    )
    delivery.start()
    until(lambda: len(run._crowded) == 2, what="the wait")
    first.close()
    assert delivery.is_alive()
    assert len(second.take(100)) == 100
    delivery.join(10)
    assert not delivery.is_alive()
    assert not second.subscription.slow


def test_clients_may_come_and_go_in_threads_while_events_flow(live):
    run, publish = live
    channels = ["a", "b", "c"]
    stop = threading.Event()
    failures = []

    def come_and_go(seed):
        chance = random.Random(seed)
        try:
            for number in range(25):
                mine = chance.sample(channels, chance.randint(1, 3))
                listener = run.open(mine, timeout=10, **BOUNDS)
                own = f"{seed} {number}"
                publish(mine[0], [own])
                inbox, got = Inbox(listener), []
                while own not in got:
                    taken = inbox.wait(10)
                    assert taken, (own, taken, listener.ended)
                    got += texts(taken)
                if number % 3:
                    listener.close()  # the others are dropped
        except BaseException as error:  # noqa: BLE001  (the test asks for it)
            failures.append(error)

    def flow():
        while not stop.is_set():
            for channel in channels:
                publish(channel, ["noise"])
            stop.wait(0.001)

    threads = [threading.Thread(target=come_and_go, args=(seed,), daemon=True) for seed in range(8)]
    noise = threading.Thread(target=flow)
    noise.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    gc.collect()
    until(lambda: run.stats() == {"channels": 0, "subscriptions": 0}, what="an empty hub")
    stop.set()
    noise.join(10)


# --- one per configuration ------------------------------------------------------------------------------------------


def test_a_configuration_has_one_runtime_and_another_has_another(fresh):
    one = runtime.get("one", MemoryBroker)
    assert runtime.get("one", MemoryBroker) is one
    assert runtime.get("two", MemoryBroker) is not one


def test_threads_that_ask_at_one_time_get_the_same_runtime(fresh):
    made, got = [], []

    def make():
        made.append(1)
        return MemoryBroker()

    threads = [threading.Thread(target=lambda: got.append(runtime.get("key", make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1
    assert len(set(map(id, got))) == 1


def test_reset_ends_every_stream_and_starts_afresh(fresh):
    before = runtime.get("key", MemoryBroker)
    listener = before.open(["a"], **BOUNDS)
    runtime.reset()
    assert listener.ended == "shutdown"
    assert runtime.get("key", MemoryBroker) is not before


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("DJANGO_SSE", {"HEARTBEAT": 5}),
        ("REDIS_SSEQUEUE_CONNECTION_SETTINGS", {"location": "memory:"}),
        ("REDIS_SSEQUEUE_CHANEL_NAME", "a"),
        ("REDIS_SSEQUEUE_CHANNEL_NAME", "a"),
        ("SECRET_KEY", "another"),
        ("SECRET_KEY_FALLBACKS", ["older"]),
    ],
)
def test_a_changed_setting_of_ours_ends_every_stream(fresh, setting, value):
    listener = runtime.get("key", MemoryBroker).open(["a"], **BOUNDS)
    with override_settings(**{setting: value}):
        assert listener.ended == "shutdown"
        inside = runtime.get("key", MemoryBroker).open(["a"], **BOUNDS)
    assert inside.ended == "shutdown"


def test_a_changed_setting_of_others_changes_nothing(fresh):
    listener = runtime.get("key", MemoryBroker).open(["a"], **BOUNDS)
    with override_settings(TIME_ZONE="Europe/Madrid", DJANGO_SSE_OF_OTHERS=1):
        assert listener.ended is None


# --- fork -----------------------------------------------------------------------------------------------------------

FORK = """
    import os, sys, threading
    import django
    django.setup()
    from django_sse import redisqueue, runtime
    from django_sse.event import encode_payload
    from django_sse.inbox import Inbox
    from django_sse.views import workers

    BOUNDS = {"max_events": 256, "max_bytes": 1000000}

    def received(listener):
        taken = Inbox(listener).wait(10)
        return [event.data for event, _ in taken or []]

    parent = redisqueue._runtime()
    listener = parent.open(["a"], **BOUNDS)
    redisqueue.send_event("", "before", "a")
    assert received(listener) == ["before"]
    # A lock that another thread holds at the moment of the fork stays locked in the child.
    hold, held = threading.Event(), threading.Event()

    def busy():
        with runtime._runtimes_lock, redisqueue.ConnectionPoolManager._lock, workers._lock, parent._lock:
            held.set()
            hold.wait(10)

    thread = threading.Thread(target=busy)
    thread.start()
    held.wait(10)
    pid = os.fork()
    if not pid:
        try:
            child = redisqueue._runtime()
            assert child is not parent
            assert child.stats() == {"channels": 0, "subscriptions": 0}
            mine = child.open(["a"], **BOUNDS)
            redisqueue.send_event("", "from the child", "a")
            assert received(mine) == ["from the child"]
            workers.hire(lambda: None).stop()
            runtime.reset()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    hold.set()
    thread.join(10)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    assert redisqueue._runtime() is parent
    if sys.argv[1] == "shared":
        assert received(listener) == ["from the child"]
    redisqueue.send_event("", "after", "a")
    assert received(listener) == ["after"]
    assert listener.ended is None
    print("ok")
"""


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_forked_child_starts_afresh_and_the_streams_of_its_parent_go_on(kind, request):
    location = "memory:" if kind == "memory" else request.getfixturevalue("redis_server").location
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK), "shared" if kind == "redis" else "separate"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "TEST_REDIS_LOCATION": location},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "ok\n"


def test_a_process_with_open_streams_ends_when_it_should(redis_server):
    script = """
        import django
        django.setup()
        from django_sse import redisqueue
        listener = redisqueue._runtime().open(["a"], max_events=9, max_bytes=999)
        print("open", flush=True)
    """
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "TEST_REDIS_LOCATION": redis_server.location,
            "TEST_DJANGO_SSE": json.dumps({}),
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, "open\n", "")


def test_the_queue_module_asks_for_the_runtime_of_its_settings(fresh):
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "memory:"}):
        assert isinstance(redisqueue._runtime().broker, MemoryBroker)


def test_a_process_that_ends_has_ended_its_reader_before(redis_server):
    script = """
        import atexit, sys, threading
        atexit.register(lambda: print([thread.name for thread in threading.enumerate() if "sse" in thread.name]))
        from django.conf import settings
        settings.configure(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": sys.argv[1]})
        from django_sse import redisqueue
        listener = redisqueue._runtime().open(["a"], max_events=1, max_bytes=1)
        print([thread.name for thread in threading.enumerate() if "sse" in thread.name])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), redis_server.location]
    root = Path(__file__).parent.parent
    outcome = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    assert (outcome.stdout, outcome.stderr) == ("['django-sse-redis']\n[]\n", "")


# --- history --------------------------------------------------------------------------------------------------------

CURSORS = Cursors([b"a key"])
PLENTY = 100_000  # events


class Scene:
    """A runtime, and another process that publishes: where there is but one process, that."""

    def __init__(self, broker, other, size=1000):
        self.run = Runtime(broker, CURSORS)
        self.other = other
        self.size = size
        self.fetches = []
        fetch = broker.fetch

        def remembered(channels):
            self.fetches.append([(channel, lowest) for channel, _, lowest in channels])
            return fetch(channels)

        broker.fetch = remembered

    def history(self, channel):
        return History(channel, self.size, 100)

    def publish(self, *texts, channel="a"):
        history = self.history(channel)
        return self.other.publish_all([Publication(channel, payload(text), history) for text in texts])

    def open(self, *channels, last=None, plain=(), **options):
        """Open `channels`, those that are `plain` without history, behind the id or the positions of `last`."""
        if last is not None and not isinstance(last, str):
            last = id_of(*last)
        histories = {channel: self.history(channel) for channel in channels if channel not in plain}
        return self.run.open(channels, **{**BOUNDS, "histories": histories, "last_id": last, **options})


def id_of(*positions):
    """The id of the last of some positions of channel a."""
    return CURSORS.encode({"a": positions[-1]})


def offset_of(event, channel="a"):
    return CURSORS.decode(event.id, [channel])[channel].offset


def take_until(listener, last, timeout=10):
    """Take until the data is `last`; return the events."""
    inbox, got = Inbox(listener), []
    while not got or got[-1].data != last:
        taken = inbox.wait(timeout, 1)
        assert taken, (taken, listener.ended, [event.data for event in got])
        got += [event for event, _ in taken]
    return got


def take_some(listener, count):
    inbox, got = Inbox(listener), []
    while len(got) < count:
        taken = inbox.wait(10, 1)
        assert taken, (taken, listener.ended, [event.data for event in got])
        got += [event for event, _ in taken]
    return got


def data(events):
    return [event.data for event in events]


def numbers(first, last):
    return [str(number) for number in range(first, last + 1)]


@pytest.fixture(params=["memory", "redis"])
def scene(request, monkeypatch):
    if request.param == "memory":
        broker = MemoryBroker()
        scene = Scene(broker, broker)
        yield scene
        scene.run.close()
        return
    monkeypatch.setattr(redis_broker, "BACKOFF", (0.01, 0.1))
    monkeypatch.setattr(recovery, "BACKOFF", (0.01, 0.1))
    yield from redis_scene(request.getfixturevalue("redis_server"))


def redis_scene(server, through=None):
    """A scene whose runtime reaches Redis through a proxy, where there is one."""
    server.client().flushall()
    pools = [redis.ConnectionPool(host="127.0.0.1", port=each.port, retry=None) for each in (through or server, server)]
    broker, other = [RedisBroker(lambda pool=pool: redis.Redis(connection_pool=pool)) for pool in pools]
    scene = Scene(broker, other)
    yield scene
    scene.run.close()
    other.close()
    for pool in pools:
        pool.disconnect()


@pytest.fixture
def redis_only(redis_server, monkeypatch):
    monkeypatch.setattr(redis_broker, "BACKOFF", (0.01, 0.1))
    monkeypatch.setattr(recovery, "BACKOFF", (0.01, 0.1))
    yield from redis_scene(redis_server)


@pytest.fixture
def cut(redis_server, monkeypatch):
    """A scene whose network can be cut, and the proxy that does it."""
    monkeypatch.setattr(redis_broker, "BACKOFF", (0.01, 0.1))
    monkeypatch.setattr(recovery, "BACKOFF", (0.01, 0.1))
    with Proxy(redis_server.port) as proxy:
        for scene in redis_scene(redis_server, proxy):
            yield scene, proxy


def our_recovery():
    return [thread for thread in threading.enumerate() if thread.name == "django-sse-recovery"]


# --- where a client begins ---


def test_a_client_that_comes_first_begins_at_the_end_and_is_told_where_that_is(scene):
    *_, last = scene.publish("1", "2")
    listener = scene.open("a")
    assert listener.placement.is_first
    assert listener.placement.cursor == id_of(last)
    assert listener.placement.resets == {}
    assert listener.take() == []
    scene.publish("3")
    (event,) = take_until(listener, "3")
    assert offset_of(event) == 3


def test_a_client_that_comes_back_gets_what_it_has_missed_and_then_what_comes(scene):
    positions = scene.publish(*numbers(1, 20))
    listener = scene.open("a", last=[positions[4]])
    assert listener.placement == (False, None, {})
    scene.publish("21")
    got = take_until(listener, "21")
    assert data(got) == numbers(6, 21)
    assert [offset_of(event) for event in got] == list(range(6, 22))


def test_who_has_missed_nothing_gets_nothing_and_is_woken_by_what_comes(scene):
    *_, last = scene.publish("1", "2")
    listener = scene.open("a", last=[last])
    rings = []
    listener.wake_by(lambda: rings.append(1))
    assert listener.subscription.drained
    assert rings == []
    scene.publish("3")
    until(lambda: rings, what="the ring")
    assert data(take_until(listener, "3")) == ["3"]


def test_who_comes_back_after_somebody_new_gets_what_it_has_missed(scene):
    """What this process knows begins with the one who was there first."""
    positions = scene.publish(*numbers(1, 5))
    first = scene.open("a")
    listener = scene.open("a", last=[positions[1]])
    assert listener.placement.resets == {}
    assert data(take_until(listener, "5")) == ["3", "4", "5"]
    assert first.take() == []


def test_an_id_of_an_event_names_the_place_behind_it(scene):
    listener = scene.open("a", "b")
    scene.publish("1")
    scene.publish("2", channel="b")
    scene.publish("3")
    got = take_until(listener, "3")
    for seen in range(3):
        again = scene.open("a", "b", last=got[seen].id)
        assert again.placement.resets == {}
        assert sorted(data(take_some(again, 2 - seen))) == data(got[seen + 1 :])
        assert again.take() == []


@pytest.mark.parametrize("last", ["", "42", "garbage", "é", "x" * 10_000, "A" * 40])
def test_an_id_that_is_not_ours_is_a_reset_for_an_unknown_reason(scene, last):
    scene.publish("1")
    listener = scene.open("a", "b", last=last)
    assert listener.placement.resets == {"unknown": ["a", "b"]}
    assert not listener.placement.is_first
    assert CURSORS.decode(listener.placement.cursor, ["a"])["a"].offset == 1
    scene.publish("2")
    assert data(take_until(listener, "2")) == ["2"]


def test_an_id_that_knows_one_of_the_channels_is_a_reset_for_the_other(scene):
    positions = scene.publish("1", "2")
    scene.publish("3", channel="b")
    listener = scene.open("a", "b", last=[positions[0]])
    assert listener.placement.resets == {"unknown": ["b"]}
    assert data(take_until(listener, "2")) == ["2"]


def test_more_than_the_history_has_is_a_reset_and_not_a_part(scene):
    scene.size = 10
    positions = scene.publish(*numbers(1, 40))
    listener = scene.open("a", last=[positions[28]])
    assert listener.placement.resets == {"expired": ["a"]}
    assert listener.take() == []
    other = scene.open("a", last=[positions[29]])
    assert data(take_until(other, "40")) == numbers(31, 40)


def test_a_channel_without_history_beside_one_that_has_it_is_heard_from_now_on(scene):
    (first, _) = scene.publish("1", "2")
    scene.other.publish("plain", payload("before"))
    listener = scene.open("a", "plain", last=[first], plain=["plain"])
    scene.other.publish("plain", payload("after"))
    got = take_until(listener, "after")
    assert data(got) == ["2", "after"]
    assert got[1].id is None


@pytest.mark.parametrize("others", [False, True], ids=["alone", "while-others-stay"])
def test_nothing_is_lost_for_whoever_comes_while_events_flow(scene, others):
    """Between subscription and placement, in every order of what is fetched and what comes."""
    scene.size = PLENTY
    stop, failures, rounds = threading.Event(), [], []
    stays = scene.open("a", max_events=PLENTY, max_bytes=1 << 30) if others else None

    def flow():
        number = 0
        while not stop.is_set():
            # The publisher is alone: the text of an event is its offset.
            scene.publish(*numbers(number + 1, number + 3))
            number += 3
            stop.wait(0.002)

    def come_and_go(seed):
        chance = random.Random(seed)
        last = None
        try:
            for _ in range(20):
                listener = scene.open("a", last=last, max_events=chance.choice([4, 64]))
                placement = listener.placement
                assert placement.resets == {}
                assert placement.is_first is (last is None)
                begin = CURSORS.decode(placement.cursor or last, ["a"])["a"].offset
                inbox, got = Inbox(listener), []
                while len(got) < chance.randint(1, 40):
                    taken = inbox.wait(10)
                    assert taken, (taken, listener.ended)
                    got += [event for event, _ in taken]
                assert data(got) == numbers(begin + 1, begin + len(got))
                assert [offset_of(event) for event in got] == list(range(begin + 1, begin + len(got) + 1))
                last = chance.choice([None, got[-1].id, chance.choice(got).id])
                listener.close()
                rounds.append(1)
        except BaseException as error:  # noqa: BLE001  (the test asks for it)
            failures.append(error)

    flowing = threading.Thread(target=flow)
    flowing.start()
    coming = [threading.Thread(target=come_and_go, args=(seed,), daemon=True) for seed in range(6)]
    for thread in coming:
        thread.start()
    for thread in coming:
        thread.join(60)
    stop.set()
    flowing.join(10)
    assert failures == []
    assert len(rounds) == 6 * 20
    assert stays is None or stays.ended is None


def test_many_who_come_back_at_one_time_cost_few_looks(scene, monkeypatch):
    positions = scene.publish(*numbers(1, 50))
    entered, go_on = threading.Event(), threading.Event()
    fetch = scene.run.broker.fetch

    def held(channels):
        entered.set()
        assert go_on.wait(10)
        return fetch(channels)

    scene.run.broker.fetch = held
    got = []

    def come(number):
        listener = scene.open("a", last=[positions[number]])
        got.append((number, data(take_until(listener, "50"))))

    coming = [threading.Thread(target=come, args=(number,)) for number in range(30)]
    for thread in coming:
        thread.start()
    assert entered.wait(10)
    until(lambda: scene.run.stats()["subscriptions"] == 30, what="all of them")
    go_on.set()
    for thread in coming:
        thread.join(30)
    assert sorted(got) == [(number, numbers(number + 2, 50)) for number in range(30)]
    assert len(scene.fetches) <= 3


def test_what_this_process_knows_is_not_fetched_again(scene):
    stays = scene.open("a")
    positions = scene.publish(*numbers(1, 50))
    scene.publish("51")
    take_until(stays, "51")
    scene.fetches.clear()
    for _ in range(3):
        assert data(take_until(scene.open("a", last=[positions[9]]), "51")) == numbers(11, 51)
        assert scene.open("a").placement.is_first
    assert scene.fetches == []


# --- what is missed on the way ---


def test_a_subscription_that_is_cut_and_comes_back_misses_nothing(redis_only, redis_server):
    """And whoever publishes does not stop for it."""
    scene = redis_only
    scene.size = PLENTY
    listener = scene.open("a", max_events=64)
    stop = threading.Event()
    count = [0]

    def flow():
        while not stop.is_set():
            scene.publish(*numbers(count[0] + 1, count[0] + 3))
            count[0] += 3
            stop.wait(0.002)

    flowing = threading.Thread(target=flow)
    flowing.start()
    admin = redis_server.client()
    got = take_until(listener, "9")
    for _ in range(10):
        until(lambda: admin.client_kill_filter(_type="pubsub"), what="a connection to cut")
        got += take_until(listener, str(count[0] + 30))
    stop.set()
    flowing.join(10)
    got += take_until(listener, str(count[0])) if got[-1].data != str(count[0]) else []
    assert data(got) == numbers(1, count[0])


def test_what_came_during_a_cut_is_fetched_though_nothing_comes_after_it(cut):
    scene, proxy = cut
    listeners = [scene.open("a", last=last) for last in (None, None)] + [scene.open("a", "b")]
    scene.publish("before")
    for listener in listeners:
        take_until(listener, "before")
    proxy.refuse()
    scene.publish(*numbers(1, 200))
    proxy.admit()
    for listener in listeners:
        got = take_until(listener, "200")
        assert data(got) == numbers(1, 200)
        assert [offset_of(event) for event in got] == list(range(2, 202))
        assert listener.ended is None


def test_a_cut_without_an_event_costs_one_look_and_nobody_hears_of_it(cut):
    scene, proxy = cut
    listeners = [scene.open("a") for _ in range(5)]
    scene.publish("before")
    for listener in listeners:
        take_until(listener, "before")
    scene.fetches.clear()
    proxy.refuse()
    proxy.admit()
    until(lambda: scene.fetches, what="the look")
    until(lambda: not our_recovery(), what="its end")
    assert scene.fetches == [[("a", 1)]]
    assert [listener.take() for listener in listeners] == [[]] * 5


def test_data_that_is_lost_is_a_reset_for_the_streams_that_are_open_and_these_stay_open(cut, redis_server):
    scene, proxy = cut
    listener, both = scene.open("a"), scene.open("a", "b")
    scene.publish(*numbers(1, 3))
    take_until(listener, "3")
    take_until(both, "3")
    proxy.refuse()
    redis_server.client().flushall()
    scene.publish("new")
    proxy.admit()
    for each, names in ((listener, "a"), (both, "ab")):
        resets = {}
        while "".join(sorted(resets)) != names:
            (event,) = take_some(each, 1)
            # What came before the reset may be left to whoever fetches the state anew.
            if event.data != "new":
                told = json.loads(event.data)
                assert (event.name, told["reason"]) == ("stream-reset", "epoch")
                resets.update(dict.fromkeys(told["channels"], event))
        assert each.ended is None
    scene.publish("live")
    for each in (listener, both):
        got = data(take_until(each, "live"))
        assert got in (["live"], ["new", "live"])
    # Who comes back with the reset's id has missed what came after it, and that alone.
    again = scene.open("a", last=resets["a"].id)
    assert again.placement.resets == {}
    assert data(take_until(again, "live"))[-1:] == ["live"]


def test_a_view_that_sends_resets_itself_is_ended_by_one_and_woken(cut, redis_server):
    scene, proxy = cut
    listener = scene.open("a", ends_on_reset=True)
    scene.publish("1")
    take_until(listener, "1")
    rings = []
    listener.wake_by(lambda: rings.append(listener.ended))
    proxy.refuse()
    redis_server.client().flushall()
    proxy.admit()
    until(lambda: listener.ended == "reset", what="the end")
    until(lambda: "reset" in rings, what="the ring")
    assert listener.take() == []
    assert scene.run.stats() == {"channels": 0, "subscriptions": 0}
    again = scene.open("a", last=CURSORS.encode({}), ends_on_reset=True)
    assert again.placement.resets == {"unknown": ["a"]}
    assert again.ended is None


def test_a_fetch_that_fails_is_tried_until_it_works(cut, caplog):
    scene, proxy = cut
    listener = scene.open("a")
    scene.publish("before")
    take_until(listener, "before")
    fetch, failures = scene.run.broker.fetch, []

    def unwell(channels):
        if len(failures) < 5:
            failures.append(1)
            raise BrokerUnavailable("not now")
        return fetch(channels)

    scene.run.broker.fetch = unwell
    proxy.refuse()
    scene.publish("meanwhile")
    proxy.admit()
    assert data(take_until(listener, "meanwhile")) == ["meanwhile"]
    assert len(failures) == 5
    assert len(logged(caplog, "not now")) == 1


def test_close_ends_the_attempts_to_fetch(scene, monkeypatch):
    monkeypatch.setattr(recovery, "BACKOFF", (30, 30))
    listener = scene.open("a")
    tried = threading.Event()

    def unwell(channels):
        tried.set()
        raise BrokerUnavailable("not now")

    scene.run.broker.fetch = unwell
    scene.run._refresh("a")
    assert tried.wait(10)
    scene.run.close()
    assert listener.ended == "shutdown"
    until(lambda: not our_recovery(), what="the end of the thread")


# --- what cannot be fetched ---


def test_who_cannot_be_placed_is_refused_and_leaves_nothing_behind(scene):
    fetch = scene.run.broker.fetch

    def unwell(channels):
        raise BrokerUnavailable("not now")

    scene.run.broker.fetch = unwell
    for last in (None, "garbage"):
        with pytest.raises(BrokerUnavailable, match="not now"):
            scene.open("a", "b", last=last)
        assert scene.run.stats() == {"channels": 0, "subscriptions": 0}
        assert scene.run._hub.needs == {}
    scene.run.broker.fetch = fetch
    assert scene.open("a").placement.is_first


def test_a_channel_that_cannot_be_fetched_fails_alone_and_is_complained_of_once(redis_only, redis_server, caplog):
    scene = redis_only
    stays = scene.open("bad")
    scene.publish("1", channel="bad")
    take_until(stays, "1")
    redis_server.client().set("django-sse:log:{bad}", "something else")
    scene.run._refresh("bad")
    until(lambda: logged(caplog, "'bad'"), what="the complaint")
    for _ in range(3):
        good = scene.open("a", last="garbage")
        assert good.placement.resets == {"unknown": ["a"]}
        good.close()
        with pytest.raises(BrokerUnavailable, match="'bad'"):
            scene.open("a", "bad", last=id_of((1, 0, 0)))
    assert len(logged(caplog, "'bad'")) == 1
    assert stays.ended is None
    redis_server.client().delete("django-sse:log:{bad}")
    scene.publish("2", channel="bad")
    # What came while it could not be fetched is gone, or it is not: either is said.
    until(lambda: "2" in texts(stays.take()), what="the event")


def test_the_error_of_a_channel_keeps_nothing_of_those_who_were_told_of_it(redis_only, redis_server):
    class Request:
        pass

    seen = []

    def handle():
        request = Request()
        seen.append(weakref.ref(request))
        with pytest.raises(BrokerUnavailable, match="'bad'"):
            redis_only.open("bad")

    redis_server.client().set("django-sse:meta:{bad}", "something else")
    handle()
    gc.collect()
    assert [each() for each in seen] == [None]


def test_redis_that_falls_silent_keeps_those_who_come_back_waiting_no_longer_than_one(cut, monkeypatch):
    monkeypatch.setattr(redis_broker, "MESSAGE_TIMEOUT", 0.5)
    scene, proxy = cut
    stays = scene.open("a")
    (position,) = scene.publish("1")
    proxy.silence()
    proxy.hold()
    (position,) = scene.publish("2")
    failures = []

    def come():
        try:
            scene.open("a", last=[position], timeout=1)
        except BrokerUnavailable as error:
            failures.append(error)

    coming = [threading.Thread(target=come) for _ in range(20)]
    for thread in coming:
        thread.start()
    until(lambda: len(failures) == 20, timeout=5, what="the end of their patience")
    for thread in coming:
        thread.join(10)
    proxy.release()
    assert stays.ended is None


def test_who_is_being_placed_when_the_process_ends_is_ended(scene):
    entered, go_on = threading.Event(), threading.Event()
    fetch = scene.run.broker.fetch

    def held(channels):
        entered.set()
        assert go_on.wait(10)
        return fetch(channels)

    scene.run.broker.fetch = held
    got = []
    coming = threading.Thread(target=lambda: got.append(scene.open("a")), daemon=True)
    coming.start()
    assert entered.wait(10)
    scene.run.close()
    go_on.set()
    coming.join(10)
    assert not coming.is_alive()
    assert [(listener.ended, listener.placement) for listener in got] == [("shutdown", None)]


# --- those who cannot keep up ---


def test_who_cannot_keep_up_is_behind_and_gets_all_of_it_page_by_page(scene, caplog):
    caplog.set_level(logging.INFO, "django_sse")
    listener = scene.open("a", max_events=10)
    fetches = len(scene.fetches)
    scene.publish(*numbers(1, 200))
    until(lambda: listener.is_behind, what="the overflow")
    got = []
    # Pages as large as half a mailbox, and every one in order.
    while len(got) < 195:
        taken = Inbox(listener).wait(10)
        assert len(taken) <= 10
        got += [event for event, _ in taken]
    got += take_until(listener, "200")
    assert data(got) == numbers(1, 200)
    assert listener.ended is None
    scene.publish("201")
    assert data(take_until(listener, "201")) == ["201"]
    assert not listener.is_behind
    assert len(scene.fetches) == fetches, "it is in this process"
    assert len(logged(caplog, "are behind")) == 1
    assert logged(caplog, "overflow") == []


def test_what_this_process_does_not_keep_is_fetched_for_those_who_are_behind(scene, monkeypatch):
    monkeypatch.setattr(hub, "RECENT_BYTES", 8000)
    listener = scene.open("a", max_events=10)
    fetches = len(scene.fetches)
    scene.publish(*numbers(1, 300))
    until(lambda: scene.run._hub._tracks["a"].top.offset == 300, what="their delivery")
    assert listener.is_behind
    assert data(take_until(listener, "300")) == numbers(1, 300)
    assert len(scene.fetches) > fetches
    assert listener.ended is None


def test_what_was_fetched_for_those_who_are_behind_is_theirs_whatever_comes_meanwhile(scene, monkeypatch):
    """What this process keeps is bounded, and may be forgotten again before they come for it."""
    monkeypatch.setattr(hub, "RECENT_BYTES", 8000)
    listener = scene.open("a", max_events=10)
    scene.publish(*numbers(1, 100))
    until(lambda: listener.is_behind, what="the overflow")
    got, last = [], 100
    while len(got) < last:
        taken = listener.take()
        until(lambda: not our_recovery(), what="the end of what is fetched")
        if last < 400:
            scene.publish(*numbers(last + 1, last + 30))
            last += 30
            watched = scene.run._hub._tracks["a"]
            until(lambda last=last, watched=watched: watched.top.offset == last, what="their delivery")
        got += [event for event, _ in taken]
        assert data(got) == numbers(1, len(got))
    assert len(got) == last


def test_those_who_are_behind_for_longer_than_the_history_lasts_are_told_so(scene):
    scene.size = 20
    listener, other = scene.open("a", max_events=10), scene.open("a", "b", max_events=10)
    scene.publish("0")
    assert data(take_until(listener, "0")) == ["0"]
    scene.publish(*numbers(1, 100))
    until(lambda: listener.is_behind and other.is_behind, what="the overflow")
    for each in (listener, other):
        ((reset, _),) = Inbox(each).wait(10)
        assert (reset.name, json.loads(reset.data)) == ("stream-reset", {"channels": ["a"], "reason": "expired"})
        assert each.ended is None
        assert offset_of(reset) == 101
    scene.publish("end")
    for each in (listener, other):
        assert data(take_until(each, "end")) == ["end"]


def test_a_view_that_sends_resets_itself_is_ended_when_it_is_found_to_have_missed_too_much(scene):
    scene.size = 20
    listener = scene.open("a", max_events=10, ends_on_reset=True)
    rings = []
    listener.wake_by(lambda: rings.append(listener.ended))
    # It is waited for, as it has said that it takes events.
    listener.mark(slow=True)
    scene.publish(*numbers(1, 100))
    until(lambda: listener.is_behind, what="the overflow")
    until(lambda: listener.ended or not listener.take(), what="the look")
    until(lambda: listener.take() == [] and listener.ended == "reset", what="the end")
    assert "reset" in rings


def test_a_reset_is_the_end_of_the_inbox_of_who_was_found_to_have_missed_too_much(scene):
    scene.size = 20
    listener = scene.open("a", max_events=10, ends_on_reset=True)
    scene.publish(*numbers(1, 100))
    (track,) = listener.audience.tracks
    # Until more has come than is kept: before that there is no need of a reset.
    until(lambda: track.top.offset == 100, what="the last event")
    assert listener.is_behind
    assert Inbox(listener).wait(10) is None
    assert listener.ended == "reset"
    listener.close()
    assert listener.ended == "reset"
    assert scene.run.stats() == {"channels": 0, "subscriptions": 0}


def test_a_stream_with_a_channel_that_has_no_history_is_ended_by_an_overflow(scene, caplog):
    listener = scene.open("a", "plain", plain=["plain"], max_events=10)
    scene.publish(*numbers(1, 100))
    until(lambda: listener.ended == "overflow", what="the end")
    assert texts(listener.take()) == numbers(1, 10)


def test_what_is_fetched_after_a_cut_is_paced_as_what_comes_is(cut, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 10)
    monkeypatch.setattr(runtime, "FETCH_PATIENCE", 60)
    scene, proxy = cut
    scene.size = PLENTY
    listener = scene.open("a", "plain", plain=["plain"])  # an overflow would end it
    scene.publish("0")
    take_until(listener, "0")
    proxy.refuse()
    scene.publish(*numbers(1, 5000))
    got = []
    reader = threading.Thread(target=read, args=(listener, 5000, got))
    reader.start()
    proxy.admit()
    reader.join(60)
    assert got == numbers(1, 5000)
    assert listener.ended is None


def test_a_client_that_does_not_take_what_is_fetched_holds_nobody_up_for_long(cut, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 10)
    monkeypatch.setattr(runtime, "FETCH_PATIENCE", 0)
    scene, proxy = cut
    stalled = scene.open("a", "plain", plain=["plain"])
    scene.publish("0")
    take_until(stalled, "0")
    stalled.wake_by(never)
    proxy.refuse()
    (*_, last) = scene.publish(*numbers(1, 900))
    proxy.admit()
    until(lambda: stalled.ended == "overflow", timeout=5, what="its end")
    assert data(take_until(scene.open("a", last=[last._replace(offset=0, check=0)]), "900")) == ["0", *numbers(1, 900)]


# --- what others publish ---


def test_an_event_without_a_position_on_a_channel_with_history_is_heard_and_complained_of_once(scene, caplog):
    listener = scene.open("a")
    scene.publish("1")
    for text in ("2", "3"):
        scene.other.publish("a", payload(text))
    scene.other.publish("a", '["", "4", "an id of its own"]')
    scene.publish("5")
    got = take_until(listener, "5")
    assert data(got) == ["1", "2", "3", "4", "5"]
    assert [event.id is None for event in got] == [False, True, True, True, False]
    (line,) = logged(caplog, "without a position")
    assert "'a'" in line


def test_a_position_is_no_matter_where_there_is_no_history(run, broker):
    listener = run.open(["a"], **BOUNDS)
    broker.publish("a", '["", "1", {"epoch": 1, "offset": 2, "check": 3}]')
    broker.publish("a", '["", "2", {"of": "others"}]')
    (first, frame), (second, _) = listener.take()
    assert (first.data, first.id, frame) == ("1", None, b"event: \ndata: 1\n\n")
    assert (second.data, second.id) == ("2", None)


@pytest.mark.parametrize(
    "position",
    [
        '{"epoch": 1}',
        '{"epoch": null, "offset": 1, "check": 1}',
        '{"epoch": 1, "offset": -1, "check": 1}',
        '{"epoch": 1, "offset": 1.5, "check": 1}',
        '{"epoch": 1, "offset": 1, "check": 16777216}',
        '{"epoch": 4294967296, "offset": 1, "check": 1}',
        '{"epoch": true, "offset": 1, "check": 1}',
    ],
)
def test_a_position_that_is_none_is_no_event(scene, position, caplog):
    listener = scene.open("a")
    scene.other.publish("a", f'["", "bad", {position}]')
    scene.publish("good")
    assert data(take_until(listener, "good")) == ["good"]
    assert len(logged(caplog, "is not an event and was skipped")) == 1


def test_an_event_that_claims_a_place_it_does_not_have_harms_nobody(scene, caplog):
    listener = scene.open("a")
    (first,) = scene.publish("1")
    for epoch, offset in ((first.epoch, 50), (first.epoch ^ 1, 1), (first.epoch, 1), (first.epoch, 0)):
        scene.other.publish("a", f'["", "forged", {{"epoch": {epoch}, "offset": {offset}, "check": 7}}]')
    scene.publish("2")
    got = take_until(listener, "2")
    assert data(got) == ["1", "2"]
    assert listener.ended is None


@pytest.mark.parametrize("bad", ["[1, 2, 3, 4]", '["a\\n", "b"]', "[[], []]"])
def test_what_is_kept_and_is_no_event_is_skipped_by_all(scene, caplog, bad):
    listener = scene.open("a")
    scene.publish("1")
    scene.other.publish("a", bad, scene.history("a"))
    (third,) = scene.publish("3")
    got = take_until(listener, "3")
    assert data(got) == ["1", "3"]
    assert third.offset == 3
    assert data(take_until(scene.open("a", last=got[0].id), "3")) == ["3"]
    assert logged(caplog, "is not an event and was skipped")


# --- fork ---

FORK_WITH_HISTORY = """
    import os, sys
    import django
    django.setup()
    from django_sse import redisqueue, runtime
    from django_sse.history import History
    from django_sse.inbox import Inbox

    BOUNDS = {"max_events": 256, "max_bytes": 1000000, "histories": {"a": History("a", 1000, 3600)}}

    def received(listener):
        taken = Inbox(listener).wait(10)
        return [event.data for event, _ in taken or []]

    parent = redisqueue._runtime()
    listener = parent.open(["a"], **BOUNDS)
    before = redisqueue.send_event("", "before", "a")
    assert received(listener) == ["before"]
    redisqueue.cursor("a")
    # What somebody fetches at the moment of the fork is nobody's in the child.
    parent._recovery._turn.acquire()
    pid = os.fork()
    if not pid:
        try:
            child = redisqueue._runtime()
            mine = child.open(["a"], **BOUNDS, last_id=before)
            assert (mine.placement.resets == {}) == (sys.argv[1] == "shared")
            redisqueue.send_event("", "from the child", "a")
            assert received(mine) == ["from the child"]
            runtime.reset()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status == 0, status
    parent._recovery._turn.release()
    if sys.argv[1] == "shared":
        assert received(listener) == ["from the child"]
    redisqueue.send_event("", "after", "a")
    assert received(listener) == ["after"]
    print("ok")
"""


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_forked_child_has_no_history_of_its_parents_but_that_in_redis(kind, request):
    location = "memory:" if kind == "memory" else request.getfixturevalue("redis_server").location
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK_WITH_HISTORY), "shared" if kind == "redis" else "separate"],
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "TEST_REDIS_LOCATION": location,
            "TEST_DJANGO_SSE": json.dumps({"HISTORY": {}}),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "ok\n"
