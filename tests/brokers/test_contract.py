"""The rules of brokers/base.py, each once, on every broker."""

import threading

import pytest
import redis

from django_sse.brokers.base import Broker
from django_sse.brokers.memory import MemoryBroker
from django_sse.brokers.redis import RedisBroker
from tests.brokers.collector import Collector, our_threads
from tests.helpers.wait import until

TIMEOUT = 10  # seconds for the broker to confirm a subscription


@pytest.fixture(params=["memory", "redis"])
def broker(request):
    if request.param == "memory":
        broker = MemoryBroker()
        yield broker
        broker.close()
        return
    server = request.getfixturevalue("redis_server")
    pool = redis.ConnectionPool(host="127.0.0.1", port=server.port)
    broker = RedisBroker(lambda: redis.Redis(connection_pool=pool))
    yield broker
    broker.close()
    pool.disconnect()


@pytest.fixture
def got(broker):
    broker.deliver = Collector()
    return broker.deliver


def subscribe(broker, *channels):
    for channel in channels:
        broker.subscribe(channel)
    broker.wait_subscribed(channels, TIMEOUT)


def settle(broker, got, channel):
    """Return when `channel` is no longer received; a marker on another channel shows what was and was not."""
    subscribe(broker, "marker")
    count = 0

    def silent():
        nonlocal count
        count += 1
        broker.publish(channel, f"probe {count}")
        broker.publish("marker", str(count))
        got.wait_for("marker", str(count))
        return f"probe {count}" not in got.of(channel)

    until(silent, what=f"the end of {channel!r}")


def test_the_base_class_is_a_contract_and_nothing_else():
    with pytest.raises(TypeError, match="abstract"):
        Broker()


def test_what_is_published_once_subscribed_is_delivered_in_order_and_once(broker, got):
    subscribe(broker, "news")
    texts = [str(number) for number in range(2000)]
    for text in texts:
        broker.publish("news", text)
    got.wait_for("news", texts[-1])
    assert got.of("news") == texts


def test_two_subscriptions_of_a_channel_are_one(broker, got):
    subscribe(broker, "news")
    subscribe(broker, "news")
    broker.publish("news", "once")
    broker.publish("news", "end")
    got.wait_for("news", "end")
    assert got.of("news") == ["once", "end"]


def test_what_was_published_before_is_not_delivered(broker, got):
    broker.publish("news", "early")
    subscribe(broker, "news")
    broker.publish("news", "late")
    got.wait_for("news", "late")
    assert got.of("news") == ["late"]


def test_other_channels_are_not_delivered(broker, got):
    subscribe(broker, "news")
    for other in ("new", "news2", "NEWS", "news ", "n*", "ne?s"):
        broker.publish(other, "other")
    broker.publish("news", "own")
    got.wait_for("news", "own")
    assert got.got == [("news", "own")]


def test_a_pattern_is_a_name_like_any_other(broker, got):
    subscribe(broker, "n*")
    broker.publish("news", "other")
    broker.publish("n*", "own")
    got.wait_for("n*", "own")
    assert got.got == [("n*", "own")]


def test_nothing_is_delivered_once_an_unsubscription_has_settled(broker, got):
    subscribe(broker, "news")
    broker.publish("news", "heard")
    got.wait_for("news", "heard")
    broker.unsubscribe("news")
    settle(broker, got, "news")
    before = got.of("news")
    broker.publish("news", "unheard")
    broker.publish("marker", "last")
    got.wait_for("marker", "last")
    assert got.of("news") == before


def test_unsubscribing_from_what_was_never_subscribed_is_nothing(broker, got):
    broker.unsubscribe("never")
    subscribe(broker, "news")
    broker.unsubscribe("never")
    broker.publish("news", "on")
    got.wait_for("news", "on")


def test_a_channel_left_does_not_take_another_with_it(broker, got):
    subscribe(broker, "one", "two")
    broker.unsubscribe("one")
    settle(broker, got, "one")
    broker.publish("two", "still")
    got.wait_for("two", "still")


def test_a_channel_left_and_taken_again_at_once_loses_nothing(broker, got):
    subscribe(broker, "news")
    for number in range(200):
        broker.unsubscribe("news")
        broker.subscribe("news")
        broker.wait_subscribed(["news"], TIMEOUT)
        broker.publish("news", str(number))
        got.wait_for("news", str(number))
    assert got.of("news") == [str(number) for number in range(200)]


def test_a_channel_left_and_taken_again_while_events_are_being_delivered_is_confirmed(broker, got):
    entered, go_on = threading.Event(), threading.Event()

    def slowly(batch):
        entered.set()
        assert go_on.wait(TIMEOUT)
        got(batch)

    broker.deliver = slowly
    subscribe(broker, "news")
    publisher = threading.Thread(target=broker.publish, args=("news", "held up"))
    publisher.start()
    assert entered.wait(TIMEOUT)
    broker.unsubscribe("news")
    broker.subscribe("news")
    go_on.set()
    broker.wait_subscribed(["news"], TIMEOUT)
    publisher.join(TIMEOUT)
    broker.publish("news", "after")
    got.wait_for("news", "after")


def test_every_one_of_many_channels_is_delivered(broker, got):
    channels = [f"channel {number}" for number in range(300)]
    subscribe(broker, *channels)
    for channel in channels:
        broker.publish(channel, f"to {channel}")
    got.wait_for(channels[-1], f"to {channels[-1]}")
    assert got.got == [(channel, f"to {channel}") for channel in channels]


def test_threads_may_publish_at_one_time_and_each_of_them_keeps_its_order(broker, got):
    subscribe(broker, "news")

    def publish(name):
        for number in range(100):
            broker.publish("news", f"{name} {number}")

    threads = [threading.Thread(target=publish, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    until(lambda: len(got.of("news")) == 800 or got.overlapped, what="800 events")
    assert not got.overlapped
    for name in "abcdefgh":
        texts = [text for text in got.of("news") if text[0] == name]
        assert texts == [f"{name} {number}" for number in range(100)]


def test_threads_may_subscribe_and_unsubscribe_at_one_time(broker, got):
    def come_and_go(channel):
        for number in range(30):
            subscribe(broker, channel)
            broker.publish(channel, str(number))
            until(lambda number=number: str(number) in got.of(channel))
            broker.unsubscribe(channel)
        done.append(channel)

    done = []
    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == list("abcd")


def test_names_and_payloads_are_any_unicode(broker, got):
    channels = ["été", "каналы", "\U0001f4ec", "with space", "a:b/c", "line\nend", "nul\0", "x" * 5000]
    subscribe(broker, *channels)
    for channel in channels:
        broker.publish(channel, f"\U0001f600 é \0 \r\n {channel}")
    got.wait_for(channels[-1], f"\U0001f600 é \0 \r\n {channels[-1]}")
    assert got.got == [(channel, f"\U0001f600 é \0 \r\n {channel}") for channel in channels]


@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_a_payload_is_of_any_size(broker, got, size):
    subscribe(broker, "news")
    broker.publish("news", "x" * size)
    broker.publish("news", "end")
    got.wait_for("news", "end")
    assert got.of("news") == ["x" * size, "end"]


def test_waiting_for_no_channel_is_over_at_once(broker):
    broker.wait_subscribed([], 0)


def test_close_gives_back_every_thread_and_the_broker_works_again(broker, got):
    for text in ("first", "second"):
        subscribe(broker, "news")
        broker.publish("news", text)
        got.wait_for("news", text)
        broker.close()
        assert our_threads() == []
    assert got.of("news") == ["first", "second"]


def test_a_closed_broker_delivers_nothing(broker, got):
    subscribe(broker, "news", "other")
    broker.close()
    broker.publish("news", "unheard")
    subscribe(broker, "other")
    broker.publish("news", "unheard")
    broker.publish("other", "heard")
    got.wait_for("other", "heard")
    assert got.got == [("other", "heard")]


def test_closing_may_be_repeated_and_needs_no_use_before(broker):
    broker.close()
    broker.close()


def test_a_broker_without_a_runtime_delivers_to_nobody(broker):
    subscribe(broker, "news")
    broker.publish("news", "unheard")
    broker.deliver = Collector()
    broker.publish("news", "heard")
    broker.deliver.wait_for("news", "heard")
