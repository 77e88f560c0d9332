"""The Redis broker: one supervised connection, on a real Redis, over networks that misbehave."""

import itertools
import json
import logging
import random
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import fakeredis
import pytest
import redis

from django_sse.brokers import redis as redis_broker
from django_sse.brokers.base import META_TTL, Publication
from django_sse.brokers.redis import RedisBroker, RedisUnavailable
from django_sse.exceptions import BrokerUnavailable
from django_sse.history import History
from django_sse.redisqueue import ConnectionPoolManager
from tests.brokers.collector import Collector, our_threads
from tests.brokers.proxy import Proxy
from tests.helpers.need import need
from tests.helpers.process import free_port
from tests.helpers.redis import RedisServer
from tests.helpers.wait import until

TIMEOUT = 10  # seconds for Redis to confirm
AT_ONCE = 2  # seconds that are far less than TIMEOUT, and enough for a busy machine


@pytest.fixture
def make_broker_of():
    """A function that makes a broker of a connect function, or of a pool, with a `Collector`."""
    made = []

    def make(connect):
        pool = None if callable(connect) else connect
        broker = RedisBroker(connect if pool is None else lambda: redis.Redis(connection_pool=pool))
        broker.deliver = Collector()
        made.append((broker, pool))
        return broker

    yield make
    for broker, pool in made:
        broker.close()
        if pool is not None:
            pool.disconnect()


@pytest.fixture
def make_broker(make_broker_of):
    """A function that makes a broker whose clients share a pool of the given options."""
    return lambda **options: make_broker_of(redis.ConnectionPool(**{"host": "127.0.0.1", **options}))


@pytest.fixture
def broker(redis_server, make_broker):
    return make_broker(port=redis_server.port)


@pytest.fixture
def proxy(redis_server):
    with Proxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def quick_reconnects(monkeypatch):
    monkeypatch.setattr(redis_broker, "BACKOFF", (0.01, 0.1))


@pytest.fixture
def admin(redis_server):
    return redis_server.client()


def subscribe(broker, *channels):
    for channel in channels:
        broker.subscribe(channel)
    broker.wait_subscribed(channels, TIMEOUT)


def publish(client, channel, text):
    """Publish until somebody receives it; where a reconnection is under way, nobody does at first."""
    until(lambda: attempt(client, channel, text), what=f"a subscriber of {channel!r}")


def publish_anew(client, broker, channel, text):
    """Publish until it is delivered; a subscriber that Redis counts may be a connection that is dead or dying."""
    until(lambda: attempt(client, channel, text) and text in broker.deliver.of(channel), what=f"{text!r} to arrive")


def attempt(client, channel, text):
    try:
        return client.publish(channel, text)
    except redis.exceptions.ConnectionError:
        return False


def pubsub_connections(admin):
    return admin.client_list(_type="pubsub")


def logged(caplog, text):
    return [record for record in caplog.records if text in record.getMessage()]


# --- one connection -------------------------------------------------------------------------------------------------


def test_there_is_one_connection_however_many_channels(broker, admin):
    subscribe(broker, *(f"channel {number}" for number in range(500)))
    (connection,) = pubsub_connections(admin)
    assert connection["sub"] == "500"
    assert our_threads() == ["django-sse-redis"]


def test_a_channel_is_unsubscribed_from_redis_when_it_is_no_longer_wanted(broker, admin):
    subscribe(broker, "one", "two")
    broker.unsubscribe("one")
    until(lambda: admin.pubsub_channels() == [b"two"], what="the end of channel one")


def test_a_channel_that_comes_and_goes_before_redis_is_asked_leaves_nothing(broker, admin):
    subscribe(broker, "news")
    for _ in range(50):
        broker.subscribe("short")
        broker.unsubscribe("short")
    broker.subscribe("last")
    broker.wait_subscribed(["last"], TIMEOUT)
    until(lambda: sorted(admin.pubsub_channels()) == [b"last", b"news"], what="channels last and news alone")


def test_close_ends_the_connection(broker, admin):
    subscribe(broker, "news")
    broker.close()
    until(lambda: not pubsub_connections(admin), what="the end of the connection")
    assert our_threads() == []


def test_subscribing_returns_at_once_even_where_nobody_answers(make_broker):
    with Proxy(0) as nowhere:
        broker = make_broker(port=nowhere.port)
        began = time.monotonic()
        for number in range(100):
            broker.subscribe(str(number))
            broker.unsubscribe(str(number))
        assert time.monotonic() - began < AT_ONCE
        broker.close()


def test_an_idle_connection_is_given_back_and_the_next_subscriber_gets_a_new_one(broker, admin, monkeypatch):
    monkeypatch.setattr(redis_broker, "IDLE_TIMEOUT", 0.05)
    for text in ("first", "second"):
        subscribe(broker, "news")
        publish(admin, "news", text)
        broker.deliver.wait_for("news", text)
        broker.unsubscribe("news")
        until(lambda: not our_threads() and not pubsub_connections(admin), what="the end of the idle connection")
    assert broker.deliver.of("news") == ["first", "second"]


def test_the_connection_is_kept_warm_for_a_client_that_comes_back(broker, admin):
    subscribe(broker, "news")
    (before,) = pubsub_connections(admin)
    broker.unsubscribe("news")
    until(lambda: not admin.pubsub_channels(), what="no channel")
    subscribe(broker, "news")
    (after,) = pubsub_connections(admin)
    assert after["id"] == before["id"]


def test_a_quiet_connection_outlives_its_idle_timeout_while_a_channel_is_wanted(broker, admin, monkeypatch):
    monkeypatch.setattr(redis_broker, "IDLE_TIMEOUT", 0.05)
    monkeypatch.setattr(redis_broker, "PING_INTERVAL", 0.1)
    subscribe(broker, "news")
    (before,) = pubsub_connections(admin)
    pinged = admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
    until(lambda: admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"] >= pinged + 3, what="3 PINGs")
    assert [connection["id"] for connection in pubsub_connections(admin)] == [before["id"]]


# --- outages --------------------------------------------------------------------------------------------------------


def test_a_restarted_redis_is_subscribed_again(redis_server, broker, admin, caplog):
    subscribe(broker, "one", "two")
    redis_server.restart()
    for channel in ("one", "two"):
        publish_anew(admin, broker, channel, "after")
    assert len(logged(caplog, "is lost")) == 1
    until(lambda: len(logged(caplog, "is back")) == 1, what="the line that says so")


def test_a_killed_connection_is_opened_again(broker, admin):
    subscribe(broker, "news")
    for text in ("first", "second", "third"):
        assert admin.client_kill_filter(_type="pubsub") == 1
        publish_anew(admin, broker, "news", text)
    assert len(pubsub_connections(admin)) == 1


def test_an_outage_of_any_length_is_outlived_and_logged_once(redis_server, broker, admin, caplog, quick_reconnects):
    subscribe(broker, "news")
    attempts = itertools.count()
    connect = broker.connect
    broker.connect = lambda: (next(attempts), connect())[1]
    redis_server.stop()
    until(lambda: next(attempts) > 20, what="many attempts to connect")
    redis_server.start()
    publish_anew(admin, broker, "news", "after")
    assert len(logged(caplog, "is lost")) == 1


def test_what_changes_during_an_outage_holds_after_it(redis_server, broker, admin, quick_reconnects):
    subscribe(broker, "left", "kept")
    redis_server.stop()
    until(lambda: broker._down, what="the outage to be noticed")
    broker.unsubscribe("left")
    broker.subscribe("new")
    redis_server.start()
    broker_says = lambda: sorted(admin.pubsub_channels()) == [b"kept", b"new"]  # noqa: E731
    until(broker_says, what="channels kept and new")


class Clock:
    """Stands in for `time`: goes on by what the reader would have waited."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def test_attempts_to_reconnect_come_ever_more_slowly_up_to_a_bound_and_jittered(make_broker, monkeypatch):
    clock, pauses = Clock(), []

    def hear(reader, seconds):
        pauses.append(seconds)
        clock.now += seconds
        if len(pauses) == 40:
            monkeypatch.undo()

    broker = make_broker(port=free_port())
    monkeypatch.setattr(redis_broker, "time", clock)
    monkeypatch.setattr(redis_broker._Reader, "_hear", hear)
    broker.subscribe("news")
    until(lambda: len(pauses) >= 40, what="40 attempts")
    first, last = redis_broker.BACKOFF
    for number, seconds in enumerate(pauses[:40]):
        longest = min(last, first * 2**number)
        assert longest / 2 <= seconds <= longest
    assert len(set(pauses[10:40])) == 30


def test_a_new_client_hurries_the_next_attempt_to_reconnect(redis_server, broker, monkeypatch):
    pauses = []

    def uniform(least, most):
        pauses.append(redis_broker.BACKOFF)
        return most

    monkeypatch.setattr(redis_broker.random, "uniform", uniform)
    monkeypatch.setattr(redis_broker, "BACKOFF", (0.001, 0.001))
    redis_server.stop()
    broker.subscribe("first")
    until(lambda: len(pauses) > 20, what="20 attempts")
    monkeypatch.setattr(redis_broker, "BACKOFF", (0.001, 3600.0))
    until(lambda: pauses[-1] == redis_broker.BACKOFF, what="a pause of a minute")
    redis_server.start()
    subscribe(broker, "second")
    broker.wait_subscribed(["first"], TIMEOUT)


def test_a_new_client_is_told_at_once_that_redis_is_down(make_broker):
    broker = make_broker(port=free_port())
    for _ in range(3):
        began = time.monotonic()
        broker.subscribe("news")
        with pytest.raises(RedisUnavailable, match="Cannot subscribe to 'news'") as caught:
            broker.wait_subscribed(["news"], TIMEOUT)
        assert time.monotonic() - began < AT_ONCE
        assert isinstance(caught.value, BrokerUnavailable)
        assert isinstance(caught.value, redis.exceptions.ConnectionError)


def test_a_waiting_client_is_told_at_once_that_redis_has_gone(redis_server, make_broker):
    with Proxy(redis_server.port) as proxy:
        proxy.budget = 0  # Redis is asked, and its answer never comes
        broker = make_broker(port=proxy.port)
        broker.subscribe("news")
        errors = []

        def wait():
            try:
                broker.wait_subscribed(["news"], TIMEOUT)
            except RedisUnavailable as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: proxy.accepted, what="the connection")
        began = time.monotonic()
    thread.join(TIMEOUT)
    assert errors
    assert time.monotonic() - began < AT_ONCE


def test_no_confirmation_in_time_is_an_error_that_says_so(proxy, make_broker):
    proxy.budget = 0
    broker = make_broker(port=proxy.port)
    broker.subscribe("news")
    with pytest.raises(RedisUnavailable, match="no confirmation from Redis within 0.05 s"):
        broker.wait_subscribed(["news"], 0.05)


def test_a_client_that_comes_after_everybody_left_during_an_outage_is_served(
    redis_server, broker, admin, monkeypatch, quick_reconnects
):
    monkeypatch.setattr(redis_broker, "IDLE_TIMEOUT", 0.05)
    subscribe(broker, "news")
    redis_server.stop()
    until(lambda: broker._down, what="the outage to be noticed")
    broker.unsubscribe("news")
    until(lambda: not our_threads(), what="the end of the idle reader")
    redis_server.start()
    subscribe(broker, "news")


def test_a_client_that_comes_after_an_idle_connection_was_cut_is_served(broker, admin):
    subscribe(broker, "news")
    connects = itertools.count()
    connect = broker.connect
    broker.connect = lambda: (next(connects), connect())[1]
    (connection,) = pubsub_connections(admin)
    broker.unsubscribe("news")
    until(lambda: not admin.pubsub_channels(), what="no channel")
    assert admin.client_kill_filter(_id=connection["id"]) == 1
    until(lambda: next(connects) >= 1, what="a new connection")
    subscribe(broker, "news")


def test_publishing_to_a_redis_that_is_down_raises_what_is_both_ours_and_redis_own(make_broker):
    broker = make_broker(port=free_port())
    with pytest.raises(RedisUnavailable, match="The event for channel 'news' was not sent") as caught:
        broker.publish("news", "text")
    assert isinstance(caught.value, BrokerUnavailable)
    assert isinstance(caught.value, redis.exceptions.ConnectionError)
    assert isinstance(caught.value.__cause__, redis.exceptions.ConnectionError)


def test_publishing_to_a_redis_that_does_not_answer_in_time_raises_the_same(proxy, make_broker):
    proxy.budget = 0
    broker = make_broker(port=proxy.port, socket_timeout=0.1)
    with pytest.raises(RedisUnavailable, match="did not answer while an event was sent on channel 'news'"):
        broker.publish("news", "text")


def test_other_errors_of_redis_reach_the_publisher_as_they_are(redis_server, make_broker, admin):
    admin.acl_setuser("mute", enabled=True, nopass=True, commands=["-@all", "+ping", "+client", "+hello"], keys=["*"])
    broker = make_broker(port=redis_server.port, username="mute", password="any")
    try:
        with pytest.raises(redis.exceptions.NoPermissionError):
            broker.publish("news", "text")
    finally:
        admin.acl_deluser("mute")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(redis_server, make_broker, admin):
    """A broker whose Redis user may subscribe to channels that begin with `ok` alone."""
    admin.execute_command("ACL", "SETUSER", "limited", "on", "nopass", "+@all", "~*", "resetchannels", "&ok*")
    yield make_broker(port=redis_server.port, username="limited", password="any")
    if redis_server.running:
        admin.acl_deluser("limited")


def test_a_refused_channel_fails_alone_and_with_the_reason(limited, admin, caplog):
    subscribe(limited, "ok 1")
    limited.subscribe("secret")
    limited.subscribe("ok 2")
    began = time.monotonic()
    with pytest.raises(RedisUnavailable, match="Cannot subscribe to 'secret'.*permission"):
        limited.wait_subscribed(["secret"], TIMEOUT)
    assert time.monotonic() - began < AT_ONCE
    limited.wait_subscribed(["ok 1", "ok 2"], TIMEOUT)
    for channel in ("ok 1", "ok 2"):
        publish(admin, channel, "text")
        limited.deliver.wait_for(channel, "text")
    assert logged(caplog, "refused the subscription to channel 'secret'")
    assert not logged(caplog, "is lost")


def test_a_refused_channel_is_refused_again_to_the_next_client(limited):
    for _ in range(3):
        limited.subscribe("secret")
        with pytest.raises(RedisUnavailable, match="permission"):
            limited.wait_subscribed(["secret"], TIMEOUT)
        limited.unsubscribe("secret")
    for _ in range(20):
        limited.subscribe("secret")
        limited.unsubscribe("secret")
    limited.subscribe("secret")
    with pytest.raises(RedisUnavailable, match="permission"):
        limited.wait_subscribed(["secret"], TIMEOUT)


def test_a_channel_that_is_taken_again_just_after_its_refusal_is_asked_for_again(limited, monkeypatch):
    refuse, first = limited.refuse, iter([True])

    def refused(*args):
        if next(first, False):
            limited.unsubscribe("secret")
            refuse(*args)
            limited.subscribe("secret")
        else:
            refuse(*args)

    monkeypatch.setattr(limited, "refuse", refused)
    limited.subscribe("secret")
    with pytest.raises(RedisUnavailable, match="permission"):
        limited.wait_subscribed(["secret"], TIMEOUT)


def test_a_refused_channel_among_several_fails_their_client(limited):
    for channel in ("ok", "secret"):
        limited.subscribe(channel)
    with pytest.raises(RedisUnavailable, match="'ok', 'secret': .*permission"):
        limited.wait_subscribed(["ok", "secret"], TIMEOUT)


def test_a_refused_channel_that_alone_is_wanted_does_not_disturb_the_connection(limited, admin, monkeypatch, caplog):
    monkeypatch.setattr(redis_broker, "PING_INTERVAL", 0.3)
    limited.subscribe("secret")
    with pytest.raises(RedisUnavailable, match="permission"):
        limited.wait_subscribed(["secret"], TIMEOUT)
    calls = admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
    until(lambda: admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"] >= calls + 4, what="4 PINGs")
    assert not logged(caplog, "is lost")
    subscribe(limited, "ok")


def test_a_channel_that_is_allowed_later_is_subscribed_by_a_later_client(limited, admin):
    def served():
        limited.subscribe("secret")
        try:
            limited.wait_subscribed(["secret"], TIMEOUT)
        except RedisUnavailable:
            return False
        finally:
            limited.unsubscribe("secret")
        return True

    assert not served()
    admin.execute_command("ACL", "SETUSER", "limited", "&secret")
    until(served, what="a client that is served")


def test_a_connection_that_is_back_is_back_though_every_channel_is_refused(limited, admin, quick_reconnects, caplog):
    limited.subscribe("secret")
    with pytest.raises(RedisUnavailable, match="permission"):
        limited.wait_subscribed(["secret"], TIMEOUT)
    refusals = len(logged(caplog, "refused the subscription"))
    admin.client_kill_filter(user="limited")
    until(lambda: len(logged(caplog, "refused the subscription")) > refusals, what="the refusal after the outage")
    subscribe(limited, "ok")


def test_a_name_that_redis_cannot_be_told_fails_alone(broker, admin):
    subscribe(broker, "news")
    broker.subscribe("\ud800")
    with pytest.raises(RedisUnavailable, match="surrogate"):
        broker.wait_subscribed(["\ud800"], TIMEOUT)
    broker.wait_subscribed(["news"], TIMEOUT)
    publish(admin, "news", "text")
    broker.deliver.wait_for("news", "text")


# --- networks that misbehave ----------------------------------------------------------------------------------------


def test_a_connection_that_died_silently_is_noticed(proxy, make_broker, admin, monkeypatch, caplog, quick_reconnects):
    monkeypatch.setattr(redis_broker, "PING_INTERVAL", 0.2)
    broker = make_broker(port=proxy.port)
    subscribe(broker, "news")
    proxy.silence()
    until(lambda: proxy.accepted == 2, what="a second connection")
    publish_anew(admin, broker, "news", "after")
    assert logged(caplog, "no answer to a PING within 0.2 s")


def test_a_connection_that_dies_within_a_message_is_noticed(proxy, make_broker, admin, monkeypatch, quick_reconnects):
    monkeypatch.setattr(redis_broker, "PING_INTERVAL", 0.2)
    monkeypatch.setattr(redis_broker, "MESSAGE_TIMEOUT", 0.5)
    broker = make_broker(port=proxy.port)
    subscribe(broker, "news")
    proxy.budget = 1000
    admin.publish("news", "x" * 5000)
    until(lambda: proxy.accepted == 2, what="a second connection")
    publish_anew(admin, broker, "news", "after")
    assert broker.deliver.of("news")[-1] == "after"


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (0, 1, 300)), (7, (500, 2000)), (1024, (100_000, 70_000, 1)), (100_000, (1_000_000,))]
)
def test_messages_that_arrive_in_pieces_are_whole(proxy, make_broker, admin, caplog, largest, sizes):
    chance = random.Random(largest)
    proxy.pieces = iter(lambda: chance.randint(1, largest), None)
    broker = make_broker(port=proxy.port)
    subscribe(broker, "news")
    texts = [chr(97 + number % 26) * size for number, size in enumerate(sizes)]
    for text in texts:
        admin.publish("news", text)
    broker.deliver.wait_for("news", texts[-1])
    assert broker.deliver.of("news") == texts
    assert proxy.accepted == 1
    assert not logged(caplog, "is lost")


@pytest.mark.skipif(not redis_broker.BOUNDS_READS, reason="this redis-py leaves it to the socket's timeout")
def test_the_rest_of_a_message_is_not_waited_for_for_ever_whatever_the_clients_timeout(
    proxy, make_broker_of, admin, monkeypatch, quick_reconnects
):
    monkeypatch.setattr(redis_broker, "MESSAGE_TIMEOUT", 0.5)
    # Of another class than the one that is copied for the reader, so that it keeps its timeout: none.
    broker = make_broker_of(redis.BlockingConnectionPool(host="127.0.0.1", port=proxy.port, socket_timeout=None))
    subscribe(broker, "news")
    proxy.budget = 1000
    admin.publish("news", "x" * 5000)
    until(lambda: proxy.accepted == 2, what="a second connection")


def test_a_loss_within_a_message_is_told_though_the_client_retries_by_itself(
    proxy, make_broker, admin, monkeypatch, quick_reconnects, caplog
):
    monkeypatch.setattr(redis_broker, "MESSAGE_TIMEOUT", 0.5)
    retry = redis.retry.Retry(redis.backoff.NoBackoff(), 3)
    retried = [redis.exceptions.ConnectionError, redis.exceptions.TimeoutError]
    broker = make_broker(port=proxy.port, retry=retry, retry_on_error=retried)
    subscribe(broker, "news")
    proxy.budget = 1000
    admin.publish("news", "x" * 5000)
    until(lambda: proxy.accepted == 2, what="a second connection")
    publish_anew(admin, broker, "news", "after")
    assert len(logged(caplog, "is lost")) == 1


def test_a_burst_in_pieces_is_whole(proxy, make_broker, admin):
    chance = random.Random(1)
    proxy.pieces = iter(lambda: chance.randint(1, 4096), None)
    broker = make_broker(port=proxy.port)
    subscribe(broker, "news")
    texts = [str(number) * (number % 50 + 1) for number in range(3000)]
    pipeline = admin.pipeline(transaction=False)
    for text in texts:
        pipeline.publish("news", text)
    pipeline.execute()
    broker.deliver.wait_for("news", texts[-1], timeout=30)
    assert broker.deliver.of("news") == texts


@pytest.mark.parametrize("protocol", [2, 3])
def test_messages_do_not_get_into_a_log_of_redis_py(redis_server, make_broker, caplog, protocol):
    """Each would be made into a text for it, and may be large; and what is in it may be private."""
    caplog.set_level(logging.DEBUG)
    broker = make_broker(port=redis_server.port, protocol=protocol)
    caplog.set_level(logging.DEBUG, logger="push_response")
    subscribe(broker, "news")
    broker.publish("news", "private")
    broker.deliver.wait_for("news", "private")
    assert not logged(caplog, "private")


# --- deliver --------------------------------------------------------------------------------------------------------


def test_what_has_arrived_meanwhile_is_delivered_together(broker, admin):
    entered, go_on, batches = threading.Event(), threading.Event(), []

    def deliver(batch):
        batches.append([payload for _, payload in batch])
        entered.set()
        assert go_on.wait(TIMEOUT)

    broker.deliver = deliver
    channels = [f"channel {number}" for number in range(100)]
    subscribe(broker, *channels)
    publish(admin, channels[0], "first")
    assert entered.wait(TIMEOUT)
    pipeline = admin.pipeline(transaction=False)
    for channel in channels:
        pipeline.publish(channel, channel)
    pipeline.execute()
    go_on.set()
    until(lambda: channels[-1].encode() in batches[-1], what="the last event")
    assert [text for batch in batches[1:] for text in batch] == [channel.encode() for channel in channels]
    assert max(map(len, batches)) > 50


def test_no_batch_is_larger_than_its_bound(broker, admin, monkeypatch):
    monkeypatch.setattr(redis_broker, "BATCH", 10)
    collector, sizes = broker.deliver, []
    broker.deliver = lambda batch: (sizes.append(len(batch)), collector(batch))
    subscribe(broker, "news")
    pipeline = admin.pipeline(transaction=False)
    for number in range(100):
        pipeline.publish("news", str(number))
    pipeline.execute()
    collector.wait_for("news", "99")
    assert max(sizes) <= 10


def test_an_error_of_the_delivery_does_not_end_the_reader(broker, admin, caplog, quick_reconnects):
    collector = broker.deliver
    broker.deliver = lambda batch: 1 / 0
    subscribe(broker, "news")
    publish(admin, "news", "fatal")
    until(lambda: logged(caplog, "Unexpected error in the Redis reader"), what="the error's line")
    broker.deliver = collector
    publish_anew(admin, broker, "news", "after")


def test_an_error_of_the_connect_function_does_not_end_the_reader(broker, admin, quick_reconnects):
    connect, failures = broker.connect, []

    def fail():
        failures.append(1)
        raise ValueError("not yet")

    broker.connect = fail
    broker.subscribe("news")
    with pytest.raises(RedisUnavailable, match="not yet"):
        broker.wait_subscribed(["news"], TIMEOUT)
    until(lambda: len(failures) > 2, what="further attempts")
    broker.connect = connect
    publish_anew(admin, broker, "news", "after")


def test_a_delivery_may_close_the_broker(broker, admin):
    closed = threading.Event()

    def deliver(batch):
        broker.close()
        closed.set()

    broker.deliver = deliver
    subscribe(broker, "news")
    publish(admin, "news", "text")
    assert closed.wait(TIMEOUT)
    until(lambda: not our_threads(), what="the end of the reader")


def test_a_reader_that_was_replaced_changes_nothing(broker, admin):
    """Closed while it is busy, it comes back to a broker that has a new reader, and must not speak for it."""
    entered, go_on = threading.Event(), threading.Event()
    collector = broker.deliver

    def slowly(batch):
        entered.set()
        assert go_on.wait(TIMEOUT)

    broker.deliver = slowly
    subscribe(broker, "news")
    publish(admin, "news", "text")
    assert entered.wait(TIMEOUT)
    closing = threading.Thread(target=broker.close)
    closing.start()
    until(lambda: broker._reader is None, what="the broker to be closed")
    broker.deliver = collector
    subscribe(broker, "other")
    go_on.set()
    closing.join(TIMEOUT)
    publish_anew(admin, broker, "other", "text")
    until(lambda: admin.pubsub_channels() == [b"other"], what="channel other alone")
    assert our_threads() == ["django-sse-redis"]


# --- clients of every kind ------------------------------------------------------------------------------------------


def works(broker, channel="été"):
    """A round trip, a killed connection, and another round trip."""
    subscribe(broker, channel)
    broker.publish(channel, "caffè \U0001f600")
    broker.deliver.wait_for(channel, "caffè \U0001f600")
    broker.connect().client_kill_filter(_type="pubsub")
    until(lambda: round_trip(broker, channel), what="a delivery after the reconnection")
    subscribe(broker, "other")
    broker.close()
    assert our_threads() == []


def round_trip(broker, channel):
    broker.publish(channel, "again")  # nobody receives it before the reconnection
    return (channel, "again") in broker.deliver.got


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [False, True])
def test_it_works_with_clients_of_both_protocols_decoding_or_not(
    redis_server, make_broker, quick_reconnects, protocol, decode
):
    works(make_broker(port=redis_server.port, protocol=protocol, decode_responses=decode))


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [False, True])
def test_it_works_with_pools_that_are_not_copied_for_the_reader(
    redis_server, make_broker_of, quick_reconnects, protocol, decode
):
    options = {"host": "127.0.0.1", "port": redis_server.port, "protocol": protocol, "decode_responses": decode}
    works(make_broker_of(redis.BlockingConnectionPool(**options)))


@pytest.mark.parametrize("protocol", [2, 3])
def test_a_dead_connection_is_noticed_in_both_protocols(
    proxy, make_broker, admin, monkeypatch, quick_reconnects, protocol
):
    monkeypatch.setattr(redis_broker, "PING_INTERVAL", 0.2)
    broker = make_broker(port=proxy.port, protocol=protocol)
    subscribe(broker, "news")
    calls = admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
    until(lambda: admin.info("commandstats").get("cmdstat_ping", {"calls": 0})["calls"] >= calls + 3, what="3 PINGs")
    assert proxy.accepted == 1
    proxy.silence()
    until(lambda: proxy.accepted == 2, what="a second connection")
    publish_anew(admin, broker, "news", "after")


def test_a_payload_that_the_client_cannot_decode_does_not_disturb_the_connection(redis_server, make_broker, caplog):
    broker = make_broker(port=redis_server.port, decode_responses=True)
    subscribe(broker, "news")
    redis_server.client().publish("news", b"\xff")
    redis_server.client().publish("news", b"good")
    broker.deliver.wait_for("news", "good")
    assert not logged(caplog, "is lost")


def test_it_works_with_the_python_parser_and_with_hiredis(redis_server, make_broker, quick_reconnects, monkeypatch):
    parser = getattr(redis.connection, "_RESP2Parser", None) or redis.connection.PythonParser
    works(make_broker(port=redis_server.port, parser_class=parser))


def test_it_works_with_a_client_that_retries_by_itself(redis_server, make_broker, quick_reconnects):
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.01), 3)
    works(make_broker(port=redis_server.port, retry=retry, retry_on_error=[redis.exceptions.ConnectionError]))


def test_it_works_with_a_client_that_has_timeouts_and_health_checks(redis_server, make_broker, quick_reconnects):
    works(make_broker(port=redis_server.port, socket_timeout=5, health_check_interval=1, socket_keepalive=True))


class ConfiguredServer(RedisServer):
    """A Redis with further arguments."""

    def __init__(self, *arguments):
        super().__init__()
        self._arguments = arguments

    def _command(self):
        return [*super()._command(), *self._arguments]


def test_it_works_through_a_unix_socket_and_with_a_password(tmp_path, make_broker_of, quick_reconnects):
    path = tmp_path / "redis.sock"
    with ConfiguredServer("--unixsocket", str(path)) as server:
        server.client().config_set("requirepass", "secret")
        for location in (f"unix:{path}", server.location):
            works(make_broker_of(ConnectionPoolManager.connection_pool(location=location, password="secret")))


def test_a_client_that_subscribes_again_by_itself_does_not_know_what_was_given_up(redis_server, make_broker_of):
    pool = redis.BlockingConnectionPool(host="127.0.0.1", port=redis_server.port)
    pubsub = redis.Redis(connection_pool=pool).pubsub()
    client = MagicMock()
    client.pubsub.return_value = pubsub
    broker = make_broker_of(lambda: client)
    subscribe(broker, "kept", "left")
    broker.unsubscribe("left")
    until(lambda: list(pubsub.channels) == [b"kept"], what="channel kept alone")
    broker.unsubscribe("kept")
    until(lambda: not pubsub.subscribed, what="no channel")
    broker.close()
    pool.disconnect()


def test_a_wrong_password_is_the_reason_that_a_new_client_is_told(redis_server, make_broker):
    broker = make_broker(port=redis_server.port, username="default", password="wrong")
    redis_server.client().config_set("requirepass", "secret")
    try:
        broker.subscribe("news")
        with pytest.raises(RedisUnavailable, match="(?i)password"):
            broker.wait_subscribed(["news"], TIMEOUT)
    finally:
        with redis_server.client(password="secret") as admin:
            admin.config_set("requirepass", "")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The paths of a certificate for 127.0.0.1 and of its key."""
    need(shutil.which("openssl"), "openssl: on Debian `apt-get install openssl`")
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = str(directory / "redis.crt"), str(directory / "redis.key")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return certificate, key


@pytest.fixture
def tls_port(redis_server, certificate, admin):
    """The port at which the Redis of the session speaks TLS."""
    port = free_port()
    settings = {"tls-cert-file": certificate[0], "tls-key-file": certificate[1], "tls-ca-cert-file": certificate[0]}
    try:
        admin.config_set("tls-auth-clients", "no")
    except redis.exceptions.ResponseError:
        need(False, "a redis-server with TLS (Debian's has it)")
    admin.execute_command("CONFIG", "SET", *(part for item in settings.items() for part in item))
    admin.config_set("tls-port", port)
    yield port
    admin.config_set("tls-port", 0)


def test_it_works_with_tls(tls_port, certificate, make_broker_of, quick_reconnects):
    location = f"rediss://127.0.0.1:{tls_port}"
    options = {"ssl_ca_certs": certificate[0]}
    works(make_broker_of(ConnectionPoolManager.connection_pool(location=location, options=options)))


def test_bursts_and_large_messages_arrive_through_tls(tls_port, certificate, make_broker, admin):
    broker = make_broker(
        port=tls_port, connection_class=redis.SSLConnection, ssl_ca_certs=certificate[0], socket_timeout=5
    )
    subscribe(broker, "news")
    texts = [str(number) * (number % 700 + 1) for number in range(2000)]
    # Bursts that the socket takes at once: Redis 7.0 drops a TLS client ("bad length") when it has to write in parts.
    for start in range(0, len(texts), 25):
        pipeline = admin.pipeline(transaction=False)
        for text in texts[start : start + 25]:
            pipeline.publish("news", text)
        pipeline.execute()
        broker.deliver.wait_for("news", texts[start + 24])
    assert broker.deliver.of("news") == texts


class FakeRedis:
    """A client without a socket, as test doubles of Redis are: what is published waits in a list."""

    def __init__(self, fail_on_close=False):
        self.channels = set()
        self.waiting = []
        self.connection = None
        self.fail_on_close = fail_on_close
        self.closed = 0
        self.answers = True

    def pubsub(self):
        return self

    def publish(self, channel, payload):
        if channel in self.channels:
            self.waiting.append({"type": "message", "channel": channel, "data": payload})

    def subscribe(self, channel):
        self.connection = self
        self.channels.add(channel)
        if self.answers:
            self.waiting.append({"type": "subscribe", "channel": channel, "data": 1})

    def unsubscribe(self, *channels):
        self.channels.difference_update(channels)

    def ping(self):
        self.waiting.append({"type": "pong", "channel": None, "data": b""})

    def can_read(self, timeout):
        return bool(self.waiting)

    def get_message(self, timeout):
        return self.waiting.pop(0)

    def close(self):
        self.closed += 1
        if self.fail_on_close:
            self.fail_on_close = False
            raise OSError("cannot be closed")


@pytest.fixture
def fake():
    return FakeRedis()


def test_a_client_without_a_socket_is_polled(fake, make_broker_of):
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    broker.publish("news", "text")
    broker.deliver.wait_for("news", "text")
    broker.unsubscribe("news")
    until(lambda: not fake.channels, what="no channel")
    broker.close()
    assert our_threads() == []
    assert fake.closed == 1


def test_a_client_that_answers_nothing_although_something_came_is_asked_again(fake, make_broker_of):
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    fake.waiting += [None, {"type": "pong", "channel": None, "data": b""}]
    broker.publish("news", "text")
    broker.deliver.wait_for("news", "text")
    broker.close()


def test_what_is_no_message_is_the_connections_error_and_does_not_keep_the_reader_busy(
    fake, make_broker_of, caplog, quick_reconnects
):
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    fake.waiting.append("what a mock returns")
    until(lambda: logged(caplog, "is lost (str was received, not a message"), what="the line that says so")
    until(lambda: logged(caplog, "is back"), what="the line that says so")


def test_a_mock_in_the_place_of_a_client_does_not_keep_the_reader_busy(make_broker_of, caplog):
    client = MagicMock()
    broker = make_broker_of(lambda: client)
    broker.subscribe("news")
    with pytest.raises(RedisUnavailable, match="MagicMock was received, not a message"):
        broker.wait_subscribed(["news"], TIMEOUT)
    broker.close()
    assert our_threads() == []


def test_an_answer_that_was_not_asked_for_confirms_the_channel_all_the_same(fake, make_broker_of):
    """redis-py subscribes again by itself where it has been told to retry."""
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    fake.waiting.append({"type": "subscribe", "channel": "news", "data": 1})
    broker.publish("news", "text")
    broker.deliver.wait_for("news", "text")
    broker.wait_subscribed(["news"], 0)


def test_of_a_channel_that_was_left_and_taken_again_the_last_answer_counts(fake, make_broker_of):
    fake.answers = False
    broker = make_broker_of(lambda: fake)
    for _ in range(2):
        broker.subscribe("news")
        until(lambda: fake.channels, what="the subscription")
        broker.unsubscribe("news")
        until(lambda: not fake.channels, what="the end of it")
    broker.subscribe("news")
    until(lambda: fake.channels, what="the subscription")
    answer = {"type": "subscribe", "channel": "news", "data": 1}
    fake.waiting += [answer, answer]
    until(lambda: not fake.waiting, what="two answers to be read")
    with pytest.raises(RedisUnavailable, match="no confirmation"):
        broker.wait_subscribed(["news"], 0.05)
    fake.waiting.append(answer)
    broker.wait_subscribed(["news"], TIMEOUT)


def test_a_reader_that_is_no_longer_the_brokers_has_no_say(fake, make_broker_of, caplog):
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    broker.subscribe("other")
    stranger = object()
    assert broker.wants(stranger, set()) is None
    assert broker.lost(stranger, OSError("its own")) is False
    assert broker.resign(stranger) is True
    broker.refuse(stranger, "news", OSError("its own"))
    broker.confirm(stranger, "unheard of")
    broker.wait_subscribed(["news", "other"], TIMEOUT)
    assert not logged(caplog, "is lost")


def test_the_brokers_reader_has_no_say_about_what_is_not_wanted(fake, make_broker_of):
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    broker.confirm(broker._reader, "given up")
    broker.refuse(broker._reader, "given up", OSError("no"))
    assert broker.resign(broker._reader) is False
    with pytest.raises(RedisUnavailable, match="no confirmation"):
        broker.wait_subscribed(["given up"], 0)


def test_an_error_without_a_question_is_the_connections(fake, make_broker_of, caplog, quick_reconnects):
    broker = make_broker_of(lambda: fake)
    subscribe(broker, "news")
    get_message = fake.get_message

    def fail(timeout):
        fake.get_message = get_message
        raise redis.exceptions.ResponseError("out of the blue")

    fake.get_message = fail
    broker.publish("news", "lost")
    until(lambda: logged(caplog, "out of the blue"), what="the line that says so")
    until(lambda: logged(caplog, "is back"), what="the line that says so")
    broker.close()


def test_a_connection_that_cannot_be_closed_does_not_end_the_reader(make_broker_of, quick_reconnects):
    clients = []

    def connect():
        clients.append(FakeRedis(fail_on_close=True))
        return clients[-1]

    broker = make_broker_of(connect)
    broker.deliver = lambda batch: 1 / 0
    subscribe(broker, "news")
    clients[0].publish("news", "fatal")
    until(lambda: len(clients) == 2, what="a second connection")
    broker.deliver = Collector()
    clients[1].fail_on_close = False
    broker.wait_subscribed(["news"], TIMEOUT)
    clients[1].publish("news", "after")
    broker.deliver.wait_for("news", "after")


def test_fakeredis_works(make_broker_of):
    server = fakeredis.FakeServer()
    broker = make_broker_of(lambda: fakeredis.FakeRedis(server=server))
    for text in ("first", "second"):
        subscribe(broker, "news")
        broker.publish("news", text)
        broker.deliver.wait_for("news", text)
        broker.unsubscribe("news")
    broker.close()
    assert our_threads() == []


def test_the_reader_says_in_the_log_that_it_is_a_warning_and_not_an_error(redis_server, broker, admin, caplog):
    subscribe(broker, "news")
    admin.client_kill_filter(_type="pubsub")
    until(lambda: logged(caplog, "is back"), what="the line that says so")
    assert {record.levelno for record in caplog.records if record.name == "django_sse"} == {logging.WARNING}


def test_the_reader_gives_way_after_each_delivery(broker, monkeypatch):
    """Among greenlets it would never be interrupted while events keep coming."""
    subscribe(broker, "news")
    gave_way, sleep = [], time.sleep
    monkeypatch.setattr(redis_broker.time, "sleep", lambda seconds: (gave_way.append(seconds), sleep(seconds)))
    broker.publish("news", "1")
    broker.deliver.wait_for("news", "1")
    until(lambda: 0 in gave_way, what="sleep(0) after the delivery")


# --- history --------------------------------------------------------------------------------------------------------

KEPT = History("news", size=1000, ttl=100)
META, LOG, KEY = "django-sse:meta:{news}", "django-sse:log:{news}", "django-sse:id:{news}:key"


def send(broker, *texts, channel="news", history=KEPT):
    return [broker.publish(channel, json.dumps(["", text]), history) for text in texts]


def several(*texts, channel="news", history=KEPT):
    return [Publication(channel, json.dumps(["", text]), history) for text in texts]


def fetch(broker, lowest=0, *, channel="news", history=KEPT):
    (past,) = broker.fetch([(channel, history, lowest)])
    return past


def texts_of(past):
    return [json.loads(payload)[1] for _, payload in past.events]


def offsets_of(past):
    """The offsets of the events, which are all that has come behind the base."""
    offsets = [position.offset for position, _ in past.events]
    assert offsets == list(range(past.base.offset + 1, past.top.offset + 1))
    return offsets


class Counted(redis.Connection):
    """A connection that counts what is sent at once: each time an answer is waited for."""

    trips = 0

    def send_packed_command(self, command, check_health=True):
        type(self).trips += 1
        super().send_packed_command(command, check_health)


@pytest.fixture
def trips(redis_server, make_broker):
    """A broker, and a function that counts the round trips of a call of it."""
    kind = type("Counted", (Counted,), {})
    broker = make_broker(port=redis_server.port, connection_class=kind)
    send(broker, "connects")
    fetch(broker)

    def count(call, *args):
        before = kind.trips
        call(*args)
        return kind.trips - before

    return broker, count


def test_an_event_with_history_is_one_round_trip(trips):
    broker, count = trips
    assert count(send, broker, "a") == 1


def test_a_thousand_events_are_published_in_two_round_trips(trips, admin):
    broker, count = trips
    subscribe(broker, "news")
    assert count(broker.publish_all, several(*map(str, range(1000)))) == 2
    until(lambda: len(broker.deliver.of("news")) == 1000, what="1,000 events")
    assert [json.loads(payload)[1] for payload in broker.deliver.of("news")] == [str(each) for each in range(1000)]
    assert fetch(broker).top.offset == 1001
    assert offsets_of(fetch(broker)) == list(range(1, 1002))


def test_a_round_trip_has_no_more_bytes_than_are_good_for_it(trips):
    broker, count = trips
    assert count(broker.publish_all, several(*["x" * 1024 * 1024] * 9)) == 3
    assert fetch(broker).top.offset == 10


def test_many_channels_are_fetched_in_one_round_trip(trips):
    broker, count = trips
    assert count(broker.fetch, [(str(number), KEPT, 0) for number in range(200)]) == 1


def test_what_is_fetched_comes_in_pages_and_whole(trips, monkeypatch):
    broker, count = trips
    broker.publish_all(several(*(f"{number:0100}" for number in range(100))))
    monkeypatch.setattr(redis_broker, "PAGE_BYTES", 1000)
    for lowest, most in ((0, 13), (52, 7), (101, 1), (102, 1)):
        assert count(fetch, broker, lowest) <= most
        past = fetch(broker, lowest)
        assert offsets_of(past) == list(range(lowest + 1, 102))
        assert texts_of(past)[-1:] == [f"{99:0100}"][: len(past.events)]
        assert past.complete is (lowest == 0)


@pytest.mark.parametrize("page", [1, 60, 1024 * 1024])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 33])
def test_no_number_of_events_is_fetched_in_part(broker, monkeypatch, page, count):
    broker.publish_all(several(*map(str, range(count))))
    monkeypatch.setattr(redis_broker, "PAGE_BYTES", page)
    assert texts_of(fetch(broker)) == [str(number) for number in range(count)]
    assert offsets_of(fetch(broker, count - 1)) == [count]
    assert fetch(broker, count).top.offset == count


def between_pages(monkeypatch, act):
    """Have `act` called before the second page is read."""
    run = redis_broker._read.run
    calls = []

    def second(*args):
        if not calls:
            calls.append(act())
        return run(*args)

    monkeypatch.setattr(redis_broker, "PAGE_BYTES", 100)
    monkeypatch.setattr(redis_broker._read, "run", second)
    return calls


def test_what_is_trimmed_between_two_pages_is_missing_at_the_beginning_alone(broker, admin, monkeypatch):
    send(broker, *map(str, range(30)))
    assert between_pages(monkeypatch, lambda: admin.xtrim(LOG, maxlen=20, approximate=False)) == []
    past = fetch(broker)
    # One of those that are left says what the others follow.
    assert offsets_of(past) == list(range(12, 31))


def test_what_is_published_between_two_pages_is_left_for_the_next_time(broker, monkeypatch):
    send(broker, *map(str, range(30)))
    called = between_pages(monkeypatch, lambda: send(broker, "later"))
    past = fetch(broker)
    assert called
    assert past.top.offset == 30
    assert offsets_of(past) == list(range(1, 31))


def test_nothing_is_left_of_an_epoch_that_ends_between_two_pages(broker, admin, monkeypatch):
    send(broker, *map(str, range(30)))
    before = fetch(broker).top.epoch
    between_pages(monkeypatch, lambda: (admin.flushall(), send(broker, "new")))
    past = fetch(broker)
    assert (past.top.offset, offsets_of(past), past.complete) == (1, [], False)
    assert past.top.epoch != before


def test_before_an_event_that_somebody_has_removed_there_is_nothing(broker, admin):
    send(broker, *map(str, range(10)))
    ((id, _),) = admin.xrange(LOG, min="4", max="4")
    admin.xdel(LOG, id)
    past = fetch(broker)
    assert offsets_of(past) == [6, 7, 8, 9, 10]
    assert not past.complete


def test_what_redis_keeps_is_what_the_scripts_say(broker, admin):
    (position,) = send(broker, "é")
    broker.publish("news", '["", "b"]', History("news", 7, 50), "key")
    assert {key.decode() for key in admin.scan_iter()} == {META, LOG, KEY}
    ((id, fields), _) = admin.xrange(LOG)
    assert id.decode() == f"{position.offset}-{position.check}"
    assert fields == {b"payload": json.dumps(["", "é"]).encode()}
    kept = {name.decode(): int(value) for name, value in admin.hgetall(META).items()}
    assert (kept["epoch"], kept["offset"]) == (position.epoch, 2)
    assert 0 < admin.ttl(LOG) <= 50
    assert 0 < admin.ttl(KEY) <= 50
    assert META_TTL - 100 < admin.ttl(META) <= META_TTL


def test_the_count_outlives_the_events_however_long_these_are_kept(broker, admin):
    send(broker, "a", history=History("news", 10, 2 * META_TTL))
    assert META_TTL < admin.ttl(META) <= 2 * META_TTL
    fetch(broker, history=History("news", 10, 2 * META_TTL))
    assert META_TTL < admin.ttl(META) <= 2 * META_TTL
    assert META_TTL < admin.ttl(LOG) <= 2 * META_TTL


def test_a_look_keeps_the_count_and_not_the_events(broker, admin):
    send(broker, "a")
    admin.expire(META, 10)
    admin.expire(LOG, 10)
    fetch(broker)
    assert admin.ttl(META) > META_TTL - 100
    assert admin.ttl(LOG) <= 10


def test_data_that_is_lost_begins_a_new_epoch(broker, admin):
    (before,) = send(broker, "a")
    admin.flushall()
    (after,) = send(broker, "b")
    assert after.offset == 1
    assert after.epoch != before.epoch
    admin.flushall()
    assert fetch(broker).top.epoch not in (before.epoch, after.epoch)


@pytest.mark.parametrize("look", [True, False])
def test_events_whose_count_is_lost_are_of_no_epoch(broker, admin, look):
    send(broker, "a", "b", "c")
    admin.delete(META)
    if look:
        assert offsets_of(fetch(broker)) == []
    send(broker, "d")
    past = fetch(broker)
    assert (past.top.offset, texts_of(past)) == (1, ["d"])


def test_a_key_from_an_epoch_that_is_over_is_not_known(broker, admin):
    for _ in range(3):
        broker.publish("news", '["", "a"]', KEPT, "key")
    admin.delete(META, LOG)
    assert broker.publish("news", '["", "a"]', KEPT, "key").offset == 1
    assert len(fetch(broker).events) == 1


def test_a_key_of_an_event_that_the_history_has_not_come_to_is_not_known(broker, admin):
    """Where the count was set back, and the key was not."""
    send(broker, "a", "b")
    first = broker.publish("news", '["", "c"]', KEPT, "key")
    admin.hset(META, "offset", 1)
    admin.delete(LOG)
    again = broker.publish("news", '["", "c"]', KEPT, "key")
    assert again.offset == 2
    assert again != first


def test_an_old_state_that_was_restored_and_goes_on_is_seen_by_its_checks(broker, admin):
    send(broker, "a", "b")
    saved = {key: admin.dump(key) for key in (META, LOG)}
    (before,) = send(broker, "lost")
    for key, value in saved.items():
        admin.restore(key, 0, value, replace=True)
    (after,) = send(broker, "instead")
    assert before[:2] == after[:2]
    assert before.check != after.check


def test_a_size_that_was_changed_holds_from_the_next_event_on(broker):
    send(broker, *map(str, range(20)))
    send(broker, "last", history=History("news", 5, 100))
    assert offsets_of(fetch(broker)) == list(range(17, 22))
    send(broker, *map(str, range(20)))
    assert offsets_of(fetch(broker)) == list(range(17, 42))


def test_the_scripts_may_be_forgotten_at_any_time(broker, admin, monkeypatch):
    def forget():
        admin.script_flush()

    for number in range(3):
        forget()
        send(broker, f"{number} alone")
        forget()
        broker.publish_all(several(f"{number} a", f"{number} b"))
        forget()
        assert fetch(broker).top.offset == 3 * (number + 1)
    between_pages(monkeypatch, forget)
    assert offsets_of(fetch(broker)) == list(range(1, 10))
    assert texts_of(fetch(broker))[:3] == ["0 alone", "0 a", "0 b"]


def test_another_program_may_publish_by_the_script(broker, admin):
    subscribe(broker, "news")
    text = Path(redis_broker.__file__).with_name("publish.lua").read_text("utf-8")
    epoch, offset, check = admin.eval(text, 2, META, LOG, "news", '["", "a"]', 10, 100)
    until(lambda: broker.deliver.of("news"), what="the event")
    position = {"epoch": epoch, "offset": offset, "check": check}
    assert json.loads(broker.deliver.of("news")[0]) == ["", "a", position]
    assert fetch(broker).top._asdict() == position


@pytest.mark.parametrize("payload", ["text", "", "[", "]", '{"a": 1}', '"[]"', '["", "a"] ', '["", "a"'])
def test_the_script_refuses_what_is_no_json_list_and_counts_nothing(broker, admin, payload):
    with pytest.raises(redis.exceptions.ResponseError, match="the payload must be a JSON list"):
        broker.publish("news", payload, KEPT)
    assert admin.keys() == []


@pytest.mark.parametrize(("size", "ttl"), [(0, 10), (10, 0), (-1, 10), ("", 10), (10, "x")])
def test_the_script_refuses_a_history_of_nothing(broker, admin, size, ttl):
    with pytest.raises(redis.exceptions.ResponseError, match="size and ttl must be 1 or more"):
        broker.publish("news", '["", "a"]', History("news", size, ttl))
    assert admin.keys() == []


def test_a_payload_that_is_no_text_is_fetched_as_it_is(broker, admin):
    text = Path(redis_broker.__file__).with_name("publish.lua").read_text("utf-8")
    for payload in (b'["\\xff"]', b"[\\0]", b"[,]"):
        admin.eval(text, 2, META, LOG, "news", payload, 10, 100)
    assert [payload for _, payload in fetch(broker).events] == [b'["\\xff"]', b"[\\0]", b"[,]"]


def test_an_event_that_redis_has_no_room_for_is_counted_for_nobody(broker, admin):
    subscribe(broker, "news")
    (before,) = send(broker, "a")
    admin.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.ResponseError, match="maxmemory"):
            send(broker, "b")
        # What is there can be had all the same.
        assert texts_of(fetch(broker)) == ["a"]
    finally:
        admin.config_set("maxmemory", 0)
    assert send(broker, "c")[0][:2] == (before.epoch, 2)
    until(lambda: len(broker.deliver.of("news")) == 2, what="the other events")


@pytest.mark.parametrize("key", [META, LOG])
def test_a_channel_whose_keys_are_something_else_fails_alone(broker, admin, key):
    send(broker, "a")
    send(broker, "b", channel="other")
    admin.set(key, "something else")
    for _ in range(2):
        bad, good = broker.fetch([("news", KEPT, 0), ("other", KEPT, 0)])
        assert isinstance(bad, RedisUnavailable)
        assert "'news'" in str(bad)
        assert "WRONGTYPE" in str(bad)
        assert texts_of(good) == ["b"]


def test_keys_of_channels_and_events_of_any_name_are_not_one(broker):
    names = ["news", "news}:id:", "news}", "{news", "news}:key", ":", "}"]
    for channel in names:
        send(broker, "own", channel=channel)
        for key in ("key", "}:log", "}:meta", "}:id:", ":", "key}"):
            broker.publish(channel, json.dumps(["", key]), KEPT, key)
    for channel in names:
        assert texts_of(fetch(broker, channel=channel)) == ["own", "key", "}:log", "}:meta", "}:id:", ":", "key}"]


def test_a_key_that_is_something_else_is_an_error_for_the_publisher(broker, admin):
    admin.set(META, "something else")
    with pytest.raises(redis.exceptions.ResponseError, match="WRONGTYPE"):
        send(broker, "a")
    assert admin.get(META) == b"something else"


@pytest.mark.parametrize("allowed", ["", "+publish +eval +evalsha +script|load"])
def test_what_the_scripts_may_not_do_is_an_error_that_says_so(redis_server, make_broker, admin, allowed):
    commands = ["-@all", "+ping", "+client", "+hello", *allowed.split()]
    admin.acl_setuser("limited", enabled=True, nopass=True, commands=commands, keys=["*"], channels=["*"])
    broker = make_broker(port=redis_server.port, username="limited", password="any")
    try:
        for call in (lambda: send(broker, "a"), lambda: broker.publish_all(several("a", "b"))):
            with pytest.raises(redis.exceptions.ResponseError, match="permission|can't run"):
                call()
        assert isinstance(fetch(broker), RedisUnavailable)
        assert re.search("'news' cannot be fetched: .*(permission|can't run)", str(fetch(broker)))
    finally:
        admin.acl_deluser("limited")
    assert admin.keys() == []


def test_the_rights_that_the_documentation_names_are_enough(redis_server, make_broker, admin):
    documentation = (Path(__file__).parents[2] / "docs" / "history.rst").read_text("utf-8")
    ((sentence),) = re.findall(r"An ACL user needs(.+?)\.\s", documentation, re.DOTALL)
    for_history = [f"+{name}" for name in re.findall("``([a-z|]+)``", sentence)]
    assert "``~django-sse:*``" in sentence
    rights = "+ping +client +hello +publish +subscribe +unsubscribe"
    admin.acl_setuser(
        "limited",
        enabled=True,
        nopass=True,
        commands=["-@all", *rights.split(), *for_history],
        keys=["django-sse:*"],
        channels=["news"],
    )
    broker = make_broker(port=redis_server.port, username="limited", password="any")
    try:
        subscribe(broker, "news")
        send(broker, "a")
        broker.publish_all(several("b", "c"))
        assert texts_of(fetch(broker)) == ["a", "b", "c"]
        until(lambda: len(broker.deliver.of("news")) == 3, what="three events")
        broker.close()
    finally:
        admin.acl_deluser("limited")


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("kind", [redis.ConnectionPool, redis.BlockingConnectionPool])
def test_history_works_with_clients_of_every_kind(redis_server, make_broker_of, kind, decode, protocol):
    # A pool of another kind is used as it is, by which payloads are fetched as text.
    options = {"host": "127.0.0.1", "port": redis_server.port, "timeout": 10} if kind.__name__[0] == "B" else {}
    options = options or {"host": "127.0.0.1", "port": redis_server.port}
    broker = make_broker_of(kind(**options, decode_responses=decode, protocol=protocol))
    (first,) = send(broker, "é")
    second, third = broker.publish_all(several("b", "c"))
    past = fetch(broker)
    assert [position for position, _ in past.events] == [first, second, third]
    assert texts_of(past) == ["é", "b", "c"]
    assert broker.publish("news", '["", "d"]', KEPT, "é") == broker.publish("news", '["", "d"]', KEPT, "é")


def test_of_what_is_published_in_parts_the_error_names_the_rest(make_broker_of, monkeypatch):
    monkeypatch.setattr(redis_broker, "PIPELINE_EVENTS", 1)
    sent = []

    class Breaks:
        def publish(self, channel, payload):
            if len(sent) == 1:
                raise redis.exceptions.ConnectionError("gone")
            sent.append(channel)

    broker = make_broker_of(Breaks)
    publications = [Publication(channel, "text") for channel in ("a", "b", "c", "b")]
    with pytest.raises(RedisUnavailable, match="^The event for channel 'b', 'c' was not sent: gone$"):
        broker.publish_all(publications)
    assert sent == ["a"]


def test_a_history_that_cannot_be_reached_is_unavailable(make_broker, proxy):
    with pytest.raises(RedisUnavailable, match="The history of 1 channel.* cannot be fetched"):
        fetch(make_broker(port=free_port()))
    proxy.budget = 0
    with pytest.raises(RedisUnavailable, match="cannot be fetched"):
        fetch(make_broker(port=proxy.port, socket_timeout=0.1))


@pytest.mark.parametrize("budget", [1, 5, 50, 500, 5_000, 50_000])
def test_a_connection_that_is_cut_in_the_middle_of_a_fetch_is_replaced_by_the_next(
    proxy, make_broker, broker, monkeypatch, budget
):
    broker.publish_all(several(*("x" * 100 for _ in range(1000))))
    monkeypatch.setattr(redis_broker, "PAGE_BYTES", 20_000)
    cut = make_broker(port=proxy.port, socket_timeout=0.2, retry=None)
    assert len(fetch(cut).events) == 1000
    proxy.budget = budget
    with pytest.raises(RedisUnavailable):
        fetch(cut)
    assert len(fetch(cut).events) == 1000


def test_what_is_fetched_comes_through_one_connection_that_close_gives_back(broker, admin):
    def connections():
        return [client for client in admin.client_list() if client["cmd"].startswith("evalsha")]

    for _ in range(3):
        fetch(broker)
    assert len(connections()) == 1
    broker.close()
    until(lambda: not connections(), what="the end of the connection")
    assert fetch(broker).top.offset == 0


def test_it_is_said_of_each_channel_when_it_is_received_again(broker, admin, quick_reconnects):
    said = []
    broker.resubscribed = said.append
    subscribe(broker, "one", "two")
    round_trip(broker, "one")
    assert said == [], "nothing can have been missed before"
    admin.client_kill_filter(_type="pubsub")
    until(lambda: sorted(said) == ["one", "two"], what="both channels")
    subscribe(broker, "three")
    assert sorted(said) == ["one", "two"]


def test_a_channel_is_received_before_it_is_said_to_be(broker, admin, quick_reconnects):
    """What is fetched from then on, and what is delivered from then on, leave nothing out."""
    heard = []
    broker.resubscribed = lambda channel: heard.append(admin.publish(channel, "now"))
    subscribe(broker, "news")
    admin.client_kill_filter(_type="pubsub")
    until(lambda: heard == [1], what="a publication that is received")
    broker.deliver.wait_for("news", "now")
