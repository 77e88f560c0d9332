"""The embedded broker: what it does beyond the contract."""

import json
import logging
import threading

import pytest

from django_sse.brokers import memory
from django_sse.brokers.base import META_TTL
from django_sse.brokers.memory import MemoryBroker
from django_sse.history import History
from tests.brokers.collector import Collector, our_threads

WARNING = "no client has ever connected"


@pytest.fixture
def broker():
    broker = MemoryBroker()
    broker.deliver = Collector()
    return broker


def warnings(caplog):
    return [record for record in caplog.records if record.levelno == logging.WARNING and WARNING in record.getMessage()]


def test_an_event_is_delivered_before_publish_returns_and_by_the_thread_that_publishes(broker):
    broker.subscribe("news")
    by = []
    broker.deliver = lambda batch: by.append((threading.get_ident(), batch))
    broker.publish("news", "text")
    assert by == [(threading.get_ident(), [("news", "text")])]


def test_it_needs_no_thread(broker):
    broker.subscribe("news")
    broker.publish("news", "text")
    assert our_threads() == []


def test_an_event_for_nobody_ever_is_warned_of_once(broker, caplog):
    broker.publish("news", "1")
    broker.publish("other", "2")
    (record,) = warnings(caplog)
    assert "'news'" in record.getMessage()
    assert "REDIS_SSEQUEUE_CONNECTION_SETTINGS" in record.getMessage()


def test_a_process_that_has_ever_served_a_client_is_not_warned(broker, caplog):
    broker.subscribe("news")
    broker.unsubscribe("news")
    broker.publish("news", "nobody")
    assert warnings(caplog) == []
    assert broker.deliver.got == []


def test_two_brokers_know_nothing_of_each_other(broker):
    other = MemoryBroker()
    other.deliver = Collector()
    other.subscribe("news")
    broker.subscribe("news")
    broker.publish("news", "text")
    assert broker.deliver.of("news") == ["text"]
    assert other.deliver.got == []


def test_a_delivery_may_publish(broker):
    """A handler of the package's own log lines may be one that sends them as events."""
    broker.subscribe("news")
    broker.subscribe("log")
    collector = Collector()

    def deliver(batch):
        if batch[0][0] == "news":
            broker.publish("log", "delivered")
        collector.got.extend(batch)

    broker.deliver = deliver
    broker.publish("news", "text")
    assert collector.got == [("log", "delivered"), ("news", "text")]


def test_one_publisher_at_a_time_delivers(broker):
    broker.subscribe("news")
    inside, go, got = threading.Event(), threading.Event(), []

    def deliver(batch):
        got.append(("begin", batch[0][1]))
        if len(got) == 1:
            inside.set()
            go.wait(10)
        got.append(("end", batch[0][1]))

    broker.deliver = deliver
    first = threading.Thread(target=broker.publish, args=("news", "1"))
    first.start()
    inside.wait(10)
    second = threading.Thread(target=broker.publish, args=("news", "2"))
    second.start()
    second.join(0.1)  # long enough for it to get in, were it let in
    go.set()
    first.join(10)
    second.join(10)
    assert got == [("begin", "1"), ("end", "1"), ("begin", "2"), ("end", "2")]


# --- history --------------------------------------------------------------------------------------------------------

KEPT = History("news", size=5, ttl=100)


class Clock:
    """A clock that stands still until it is moved on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def kept(clock):
    """A broker whose time is `clock`."""
    broker = MemoryBroker(clock)
    broker.subscribe("served")
    return broker


def put(broker, text, *, channel="news", key=None):
    return broker.publish(channel, f'["", "{text}"]', KEPT, key)


def past(broker, channel="news"):
    (past,) = broker.fetch([(channel, KEPT, 0)])
    return past


def kept_texts(broker):
    return [json.loads(payload)[1] for _, payload in past(broker).events]


def test_the_events_of_a_channel_go_together_a_while_after_the_last_one(kept, clock):
    put(kept, "a")
    clock.now += 99
    put(kept, "b", key="key")
    clock.now += 99.9
    assert kept_texts(kept) == ["a", "b"]
    assert put(kept, "b", key="key").offset == 2
    clock.now += 0.1
    assert (kept_texts(kept), past(kept).top.offset, past(kept).complete) == ([], 2, True)
    assert put(kept, "b", key="key").offset == 3


def test_a_look_does_not_keep_the_events(kept, clock):
    put(kept, "a")
    clock.now += 60
    past(kept)
    clock.now += 60
    assert kept_texts(kept) == []


def test_the_count_is_kept_for_long_after_the_last_event_or_look(kept, clock):
    put(kept, "a")
    clock.now += META_TTL - 1
    before = past(kept).top
    clock.now += META_TTL - 1
    assert past(kept).top == before
    clock.now += META_TTL
    after = past(kept).top
    assert after.offset == 0
    assert after.epoch != before.epoch


def test_another_broker_counts_anew(kept):
    assert put(kept, "a").epoch != put(MemoryBroker(), "a").epoch


def test_channels_that_nobody_has_used_for_long_are_forgotten_when_there_are_many(monkeypatch, clock):
    monkeypatch.setattr(memory, "MANY", 3)
    broker = MemoryBroker(clock)
    for channel in "abc":
        put(broker, "old", channel=channel)
    clock.now += META_TTL / 2
    put(broker, "young", channel="c")
    clock.now += META_TTL / 2
    put(broker, "new", channel="d")
    assert sorted(broker._kept) == ["c", "d"]


def test_events_that_nobody_looks_at_are_forgotten_when_there_are_many_channels(monkeypatch, clock):
    monkeypatch.setattr(memory, "MANY", 3)
    broker = MemoryBroker(clock)
    for channel in "abc":
        put(broker, "old", channel=channel)
    clock.now += KEPT.ttl
    put(broker, "new", channel="d")
    assert [len(broker._kept[channel]._log) for channel in "abcd"] == [0, 0, 0, 1]


def test_many_channels_that_are_in_use_are_not_looked_through_each_time(monkeypatch, clock):
    monkeypatch.setattr(memory, "MANY", 4)
    broker = MemoryBroker(clock)
    looked = []
    sweep = memory._Kept.expire
    monkeypatch.setattr(memory._Kept, "expire", lambda self, now: (looked.append(1), sweep(self, now)))
    for number in range(64):
        put(broker, "text", channel=str(number))
    assert len(looked) < 64 * 4


def test_a_delivery_may_publish_with_history(broker):
    broker.subscribe("news")
    got = []

    def deliver(batch):
        got.extend(batch)
        if len(got) == 1:
            put(broker, "answer")

    broker.deliver = deliver
    put(broker, "question")
    events = [json.loads(payload) for _, payload in got]
    assert [(text, position["offset"]) for _, text, position in events] == [("question", 1), ("answer", 2)]


def test_an_event_with_history_for_nobody_ever_is_warned_of_once(broker, caplog):
    put(broker, "1")
    put(broker, "2")
    assert len(warnings(caplog)) == 1


def test_a_closed_broker_keeps_the_history_for_whoever_comes_back(kept):
    put(kept, "a")
    kept.close()
    assert kept_texts(kept) == ["a"]
