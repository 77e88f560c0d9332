"""The rules of brokers/base.py, each once, on every broker."""

import json
import threading

import pytest
import redis

from django_sse.brokers import memory as memory_broker
from django_sse.brokers import redis as redis_broker
from django_sse.brokers.base import Broker, Publication
from django_sse.brokers.memory import MemoryBroker
from django_sse.brokers.redis import RedisBroker
from django_sse.history import History, Position
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
    server.client().flushall()
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


# --- history --------------------------------------------------------------------------------------------------------

KEPT = History("news", size=5, ttl=100)
TOP = 1 << 53  # above every offset
NAMES = ["news", "a b", "{news}", "a}b", "{", "}", "{}", "été 😀", "n*", "%s", "a:b", "new\nline", '"', "\0"]


def event(text):
    return json.dumps(["", text])


def send(broker, *texts, channel="news", history=KEPT):
    return [broker.publish(channel, event(text), history) for text in texts]


def fetch(broker, lowest=0, *, channel="news", history=KEPT):
    (past,) = broker.fetch([(channel, history, lowest)])
    return past


def text(payload):
    return json.loads(payload)[1]


def texts(past):
    """What has come behind the base, which has to be all of it."""
    assert [position.offset for position, _ in past.events] == list(range(past.base.offset + 1, past.top.offset + 1))
    assert {position.epoch for position, _ in past.events} | {past.base.epoch} == {past.top.epoch}
    assert ([past.base] + [position for position, _ in past.events])[-1] == past.top
    return [text(payload) for _, payload in past.events]


def offsets(past):
    return [position.offset for position, _ in past.events]


def test_events_with_history_are_counted_from_1_in_one_epoch(broker):
    positions = send(broker, "a", "b", "c")
    assert [position.offset for position in positions] == [1, 2, 3]
    assert len({position.epoch for position in positions}) == 1
    # Each is one that can travel.
    assert [Position.of(position._asdict()) for position in positions] == positions


def test_each_channel_has_a_count_and_an_epoch_of_its_own(broker):
    send(broker, "a", "b")
    (other,) = send(broker, "a", channel="other")
    assert other.offset == 1
    assert other.epoch != fetch(broker).top.epoch


def test_what_is_delivered_carries_the_position_that_the_publisher_was_told(broker, got):
    subscribe(broker, "news")
    positions = send(broker, "a", "b")
    until(lambda: len(got.of("news")) == 2, what="two events")
    assert [json.loads(payload) for payload in got.of("news")] == [
        ["", "a", positions[0]._asdict()],
        ["", "b", positions[1]._asdict()],
    ]


def test_without_history_nothing_is_counted_added_or_kept(broker, got):
    subscribe(broker, "news")
    assert broker.publish("news", event("a")) is None
    assert broker.publish("news", "no JSON") is None
    got.wait_for("news", "no JSON")
    assert got.of("news") == [event("a"), "no JSON"]
    assert texts(fetch(broker)) == []
    assert fetch(broker).top.offset == 0


def test_what_is_fetched_is_what_was_published_from_an_offset_on_oldest_first(broker):
    payloads = ['["", "a"]', '["name",["b","c"]]', '[ "é", "\\u00e9\\n😀" ]', '["", ""]']
    positions = [broker.publish("news", payload, KEPT) for payload in payloads]
    for lowest in range(6):
        past = fetch(broker, lowest)
        assert past.top == positions[-1]
        # Whoever has seen the one at this offset has missed what is behind it.
        begin = past.base.offset
        assert begin in {min(max(lowest - 1, 0), 4), min(lowest, 4)}
        got = [payload.decode() if isinstance(payload, bytes) else payload for _, payload in past.events]
        assert got == payloads[begin:]
        assert [position for position, _ in past.events] == positions[begin:]
        assert past.base == (positions[begin - 1] if begin else (positions[0].epoch, 0, 0))


@pytest.mark.parametrize("lowest", [0, 1, 2, TOP])
def test_that_nothing_was_kept_before_is_said_only_where_it_has_been_looked_for(broker, lowest):
    assert fetch(broker).complete, "there is nothing"
    send(broker, "a", "b")
    past = fetch(broker, lowest)
    assert past.complete or lowest
    assert not past.complete or texts(past) == ["a", "b"]


def test_the_first_look_begins_the_epoch_of_a_channel(broker):
    past = fetch(broker)
    assert (past.base, past.top.offset, texts(past), past.complete) == (past.top, 0, [], True)
    assert fetch(broker) == past
    assert send(broker, "a")[0].epoch == past.top.epoch


def test_several_channels_are_fetched_at_once_each_from_its_own_offset(broker):
    send(broker, "a", "b", "c")
    send(broker, "x", "y", channel="other")
    pasts = broker.fetch([("other", KEPT, 1), ("nothing", KEPT, 0), ("news", KEPT, 0)])
    assert [texts(past)[-3:] for past in pasts] == [["x", "y"], [], ["a", "b", "c"]]
    assert [past.top.offset for past in pasts] == [2, 0, 3]


def test_of_no_channel_nothing_is_fetched(broker):
    assert broker.fetch([]) == []


def test_nothing_to_publish_is_nothing(broker):
    assert broker.publish_all([]) == []


@pytest.mark.parametrize("size", [1, 5])
def test_a_history_keeps_as_many_as_can_be_missed_and_knows_what_they_follow(broker, size):
    history = History("news", size, 100)
    send(broker, *map(str, range(1, 21)), history=history)
    past = fetch(broker, history=history)
    assert texts(past) == [str(number) for number in range(21 - size, 21)]
    assert past.top.offset == 20
    assert past.complete, "nobody has kept what was before"


def test_the_events_go_when_their_time_is_over_and_the_count_stays(broker):
    history = History("news", size=5, ttl=1)
    *_, last = send(broker, "a", "b", history=history)
    # That somebody looks at them does not keep them.
    until(lambda: not texts(fetch(broker, history=history)), what="the end of the events")
    past = fetch(broker, history=history)
    assert (past.base, past.top, past.complete) == (last, last, True)
    assert send(broker, "c", history=history)[0][:2] == (last.epoch, 3)
    past = fetch(broker, history=history)
    # Who had seen the last one of before has missed nothing but this.
    assert (past.base, texts(past), past.complete) == (last, ["c"], True)


def fetch_at_most(monkeypatch, size):
    for module in (memory_broker, redis_broker):
        monkeypatch.setattr(module, "FETCH_BYTES", size)
    monkeypatch.setattr(redis_broker, "PAGE_BYTES", size // 5)


@pytest.mark.parametrize("channel", NAMES)
def test_a_channel_with_history_may_have_any_name(broker, got, channel):
    subscribe(broker, channel)
    positions = send(broker, "a", "b", channel=channel)
    send(broker, "other", channel=channel + " ")
    until(lambda: len(got.of(channel)) == 2, what="two events")
    assert [text(payload) for payload in got.of(channel)] == ["a", "b"]
    past = fetch(broker, channel=channel)
    assert texts(past) == ["a", "b"]
    assert [position for position, _ in past.events] == positions


def test_of_more_bytes_than_are_fetched_the_latest_come_without_a_gap(broker, monkeypatch):
    fetch_at_most(monkeypatch, 1000)
    history = History("news", 100, 100)
    send(broker, *(str(number) * 50 for number in range(10, 60)), history=history)
    past = fetch(broker, history=history)
    assert 5 < len(past.events) < 20
    assert texts(past) == [str(number) * 50 for number in range(60 - len(past.events), 60)]
    assert not past.complete
    assert past.top.offset == 50


def test_an_event_larger_than_all_that_is_fetched_leaves_no_gap(broker, monkeypatch):
    fetch_at_most(monkeypatch, 50)
    send(broker, "a", "b" * 100, "c")
    past = fetch(broker)
    assert "a" not in texts(past)
    assert not past.complete


def test_a_publication_of_several_is_in_their_order_and_has_the_position_of_each(broker, got):
    subscribe(broker, "news", "other", "plain")
    publications = [
        Publication("news", event("a"), KEPT),
        Publication("plain", event("b")),
        Publication("other", event("c"), KEPT),
        Publication("news", event("d"), KEPT, "key"),
        Publication("news", event("d again"), KEPT, "key"),
        Publication("news", event("e"), KEPT),
        Publication("plain", event("f")),
    ]
    positions = broker.publish_all(publications)
    assert [position and position.offset for position in positions] == [1, None, 1, 2, 2, 3, None]
    assert positions[3] == positions[4]
    until(lambda: len(got.got) == 6, what="six events")
    assert [text(payload) for payload in got.of("news")] == ["a", "d", "e"]
    assert [text(payload) for payload in got.of("plain")] == ["b", "f"]
    assert texts(fetch(broker, channel="other")) == ["c"]
    assert texts(fetch(broker)) == ["a", "d", "e"]


def test_publishers_at_one_time_make_one_order_live_and_in_the_history(broker, got):
    history = History("news", 1000, 100)
    subscribe(broker, "news")
    told = {}

    def publish(name):
        for number in range(100):
            own = f"{name} {number}"
            (told[own],) = send(broker, own, history=history)

    threads = [threading.Thread(target=publish, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    until(lambda: len(got.of("news")) == 400, what="400 events")
    live = [json.loads(payload) for payload in got.of("news")]
    assert [position["offset"] for _, _, position in live] == list(range(1, 401))
    past = fetch(broker, history=history)
    assert offsets(past) == list(range(1, 401))
    assert texts(past) == [own for _, own, _ in live]
    assert {own: position for (position, _), own in zip(past.events, texts(past), strict=True)} == told
    assert {own: Position.of(position) for _, own, position in live} == told


# --- an event's own key ---


def put(broker, key, text="text", *, channel="news", history=KEPT):
    return broker.publish(channel, event(text), history, key)


@pytest.mark.parametrize("key", ["1", "a b", "{}", "}:log", ":", "été 😀", "\n", "x" * 200])
def test_what_has_a_key_is_published_once(broker, got, key):
    subscribe(broker, "news")
    first = put(broker, key, "first")
    assert put(broker, key, "second") == first
    assert put(broker, "another", "end").offset == 2
    assert put(broker, key, "third") == first
    until(lambda: len(got.of("news")) == 2, what="two events")
    assert [text(payload) for payload in got.of("news")] == ["first", "end"]
    assert texts(fetch(broker)) == ["first", "end"]


def test_a_key_belongs_to_its_channel(broker):
    put(broker, "key")
    put(broker, "key", channel="other")
    assert [len(fetch(broker, channel=channel).events) for channel in ("news", "other")] == [1, 1]


def test_a_key_is_known_for_as_long_as_its_event_can_be_missed(broker):
    first = put(broker, "key")
    assert [position.offset for position in send(broker, *"abcd")] == [2, 3, 4, 5]
    assert put(broker, "key") == first
    send(broker, "e")
    assert put(broker, "key").offset == 7
    assert put(broker, "key").offset == 7


def test_a_key_is_known_no_longer_than_the_events(broker):
    history = History("news", 5, ttl=1)
    put(broker, "key", history=history)
    until(lambda: not texts(fetch(broker, history=history)), what="the end of the events")
    assert put(broker, "key", history=history).offset == 2
    assert texts(fetch(broker, history=history)) == ["text"]


def test_publishers_of_one_key_at_one_time_publish_it_once(broker):
    told = []
    ready = threading.Barrier(8)

    def publish():
        ready.wait(10)
        told.extend([put(broker, str(number)) for number in range(5)])

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(told) == 40
    assert len(set(told)) == 5
    assert offsets(fetch(broker)) == [1, 2, 3, 4, 5]
