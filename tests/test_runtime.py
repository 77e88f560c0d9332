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
from pathlib import Path

import pytest
import redis
from django.test import override_settings

from django_sse import redisqueue, runtime
from django_sse.brokers.base import Broker
from django_sse.brokers.memory import MemoryBroker
from django_sse.brokers.redis import RedisBroker
from django_sse.event import encode_payload
from django_sse.exceptions import BrokerUnavailable
from django_sse.inbox import Inbox
from django_sse.runtime import Runtime
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


def test_take_gives_no_more_after_the_event_that_makes_it_the_bytes_asked_for(run, broker):
    listener = run.open(["a"], **BOUNDS)
    for number in range(5):
        broker.publish("a", payload(str(number) * 100))
    assert texts(listener.take(max_bytes=101)) == ["0" * 100]
    assert texts(listener.take(max_bytes=150)) == ["1" * 100, "2" * 100]
    assert texts(listener.take(1, 150)) == ["3" * 100]
    assert texts(listener.take(max_bytes=1000)) == ["4" * 100]


def test_a_client_that_takes_in_small_bites_is_waited_for_until_it_is_less_crowded(run, monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE", 30)
    listener = run.open(["a"], max_events=8, max_bytes=1024)
    listener.wake_by(never)
    delivery = threading.Thread(
        target=run.deliver, args=([("a", payload(str(number))) for number in range(5)],), daemon=True
    )
    delivery.start()
    until(lambda: listener.subscription in run._crowded, what="the wait")
    assert len(listener.take(max_bytes=1)) == 1
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
