"""The embedded broker: what it does beyond the contract."""

import logging
import threading

import pytest

from django_sse.brokers.memory import MemoryBroker
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
