"""The queue beyond the interface of 0.4.1 (tests/compat): transactions, channels, locations, errors that help."""

import asyncio
import gc
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import redis
from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.db import transaction
from django.http import Http404
from django.test import AsyncRequestFactory, RequestFactory, override_settings
from django.utils.translation import gettext_lazy

from django_sse import redisqueue, runtime, views
from django_sse.brokers.memory import MemoryBroker
from django_sse.brokers.redis import RedisBroker
from django_sse.exceptions import BrokerUnavailable
from django_sse.redisqueue import ConnectionPoolManager, RedisQueueView, asend_event, send_event
from django_sse.registry import Registry
from django_sse.wire import Sse
from tests.helpers.loops import needs_loops, soon
from tests.helpers.process import free_port
from tests.helpers.wait import until

MEMORY = {"location": "memory:"}


@pytest.fixture(autouse=True)
def _memory():
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=MEMORY):
        yield


@pytest.fixture
def connect():
    """A function that connects a client to a view and returns how to get its next chunk."""
    responses = []

    def connect(view=None, **initkwargs):
        response = (view or RedisQueueView).as_view(**initkwargs)(RequestFactory().get("/"))
        responses.append(response)
        chunks = iter(response)
        assert next(chunks) == b"retry: 2000\n\n"
        return lambda: next(chunks, None)

    yield connect
    for response in responses:
        response.close()


def event(name, data):
    return f"event: {name}\ndata: {data}\n\n".encode()


def stats():
    return redisqueue._runtime().stats()


# --- transactions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(connect):
    """A function that returns what has been sent so far."""
    chunk = connect(redis_channel="room")

    def sent():
        send_event("", "until here", "room")
        return chunk().removesuffix(event("", "until here"))

    return sent


@pytest.mark.django_db(transaction=True)
def test_an_event_on_commit_waits_for_the_commit(sent):
    with transaction.atomic():
        send_event("news", "1", "room", on_commit=True)
        assert sent() == b""
    assert sent() == event("news", "1")


@pytest.mark.django_db(transaction=True)
def test_an_event_on_commit_of_a_transaction_that_is_rolled_back_is_not_sent(sent):
    with transaction.atomic():
        send_event("news", "1", "room", on_commit=True)
        transaction.set_rollback(True)
    assert sent() == b""


@pytest.mark.django_db(transaction=True)
def test_an_event_on_commit_without_a_transaction_is_sent_at_once(sent):
    send_event("news", "1", "room", on_commit=True)
    assert sent() == event("news", "1")


@pytest.mark.django_db(transaction=True)
def test_a_savepoint_that_is_rolled_back_takes_its_events_with_it(sent):
    with transaction.atomic():
        send_event("news", "before", "room", on_commit=True)
        with transaction.atomic():
            send_event("news", "inside", "room", on_commit=True)
            transaction.set_rollback(True)
        with transaction.atomic():
            send_event("news", "after", "room", on_commit=True)
        assert sent() == b""
    assert sent() == event("news", "before") + event("news", "after")


@pytest.mark.django_db(transaction=True)
def test_an_event_without_on_commit_does_not_wait(sent):
    with transaction.atomic():
        send_event("news", "1", "room")
        assert sent() == event("news", "1")


@pytest.mark.django_db(transaction=True)
def test_what_cannot_be_sent_is_refused_where_it_is_given_and_not_at_the_commit():
    with transaction.atomic():
        with pytest.raises(ValueError, match="event name"):
            send_event("a\nb", "1", on_commit=True)
        with pytest.raises(ValueError, match="channel"):
            send_event("a", "1", "", on_commit=True)
        with pytest.raises(TypeError):
            send_event("a", object(), on_commit=True)


@pytest.mark.django_db(transaction=True)
def test_the_data_is_what_it_was_when_it_was_given(sent):
    data = {"count": 1}
    with transaction.atomic():
        send_event("news", data, "room", on_commit=True)
        data["count"] = 2
    assert sent() == event("news", '{"count": 1}')


@pytest.mark.django_db(transaction=True)
def test_the_database_may_be_named():
    with mock.patch.object(transaction, "on_commit") as on_commit:
        send_event("news", "1", on_commit=True, using="other")
    assert on_commit.call_args.kwargs == {"using": "other"}


@pytest.mark.django_db(transaction=True)
@override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{free_port()}"})
def test_a_redis_that_is_down_is_an_error_out_of_the_commit():
    with pytest.raises(BrokerUnavailable), transaction.atomic():
        send_event("news", "1", on_commit=True)


# --- asend_event ----------------------------------------------------------------------------------------------------


@needs_loops
def test_asend_event_sends_and_does_not_block_the_loop(sent):
    threads = []

    class Blocking(MemoryBroker):
        def publish(self, channel, payload):
            threads.append(threading.current_thread())
            assert go_on.wait(10)

    go_on = threading.Event()

    async def main():
        assert await asend_event("news", {"a": 1}, "room") is None
        with mock.patch.object(redisqueue._runtime(), "broker", Blocking()):
            task = asyncio.ensure_future(asend_event("news", "2"))
            await soon(lambda: threads)
            go_on.set()
            await task

    asyncio.run(main())
    assert threads != [threading.current_thread()]
    assert sent() == event("news", '{"a": 1}')


@needs_loops
@pytest.mark.parametrize("on_commit", [False, True])
def test_asend_event_keeps_to_the_thread_of_the_transaction_if_that_matters(on_commit):
    threads = []

    async def main():
        await sync_to_async(lambda: threads.append(threading.get_ident()))()
        await asend_event("news", "1", "room", on_commit=on_commit)

    def send(*args, **kwargs):
        threads.append(threading.get_ident())

    with mock.patch.object(redisqueue, "send_event", send):
        asyncio.run(main())
    database, sent = threads
    assert (sent == database) is on_commit


@needs_loops
def test_asend_event_raises_what_send_event_does():
    async def main(**kwargs):
        await asend_event(**{"event_name": "a", "data": "1", **kwargs})

    with pytest.raises(ValueError, match="event name"):
        asyncio.run(main(event_name="a\nb"))
    with pytest.raises(ValueError, match="channel"):
        asyncio.run(main(channel=""))
    down = override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{free_port()}"})
    with down, pytest.raises(redis.exceptions.ConnectionError):
        asyncio.run(main())


@needs_loops
@pytest.mark.django_db(transaction=True)
def test_asend_event_waits_for_the_commit_too(sent):
    async def main():
        await asend_event("news", "1", "room", on_commit=True)

    asyncio.run(main())
    assert sent() == event("news", "1")


# --- what is sent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        (None, "x", event("", "x")),
        ("news", gettext_lazy("yes"), event("news", "yes")),
        ("news", ("a", b"b"), b"event: news\ndata: a\ndata: b\n\n"),
        ("news", {"at": None, "é": [1.5, True]}, event("news", r'{"at": null, "\u00e9": [1.5, true]}')),
        (7, b"\xc3\xa9", "event: 7\ndata: é\n\n".encode()),
    ],
)
def test_what_is_given_arrives_as_text(sent, name, data, expected):
    send_event(name, data, "room")
    assert sent() == expected


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_know_is_refused(number):
    with pytest.raises(ValueError, match="JSON"):
        send_event("news", number)


@pytest.mark.parametrize("channel", ["", b"", 5.0, True, b"\xff", "\ud800", ["a"]])
def test_a_channel_is_a_name_of_at_least_one_character(channel):
    with pytest.raises(ValueError, match="channel|codec"):
        send_event("news", "1", channel)


def test_a_channel_may_be_given_as_bytes(sent):
    send_event("news", "1", b"room")
    assert sent() == event("news", "1")


def test_a_channel_may_be_a_number_such_as_a_primary_key(connect):
    chunk = connect(several(7))
    send_event("", "1", 7)
    assert chunk() == event("", "1")


# --- several channels -----------------------------------------------------------------------------------------------


def several(*channels):
    return type("Several", (RedisQueueView,), {"get_redis_channel": lambda self: channels[0]})


@pytest.mark.parametrize(
    "channels", [["a", "b"], ("a", "b"), {"a": 1, "b": 2}.keys(), ["a", "b", "a"], (name for name in "ab"), [b"a", "b"]]
)
def test_a_view_may_listen_to_several_channels(connect, channels):
    chunk = connect(several(channels))
    assert stats() == {"channels": 2, "subscriptions": 1}
    for channel in ("a", "b", "c"):
        send_event("", channel, channel)
    assert chunk() == event("", "a") + event("", "b")


@pytest.mark.parametrize("channels", [[], (), [""], ["a", None], None, 5.0, ["a", "\ud800"], ""])
def test_a_view_listens_to_names_and_to_at_least_one(connect, channels):
    with pytest.raises(ValueError, match="channel"):
        connect(several(channels))
    assert stats() == {"channels": 0, "subscriptions": 0}


def test_the_subscription_of_a_client_ends_with_its_response(connect):
    first, second = connect(), connect()
    assert stats() == {"channels": 1, "subscriptions": 2}
    send_event("", "1")
    assert first() == second() == event("", "1")
    response = RedisQueueView.as_view()(RequestFactory().get("/"))
    assert stats()["subscriptions"] == 3
    response.close()
    assert stats()["subscriptions"] == 2


@override_settings(DJANGO_SSE={"CHANNEL_PREFIX": "mine:"})
def test_a_prefix_stands_before_what_is_sent_and_what_is_listened_to_alike(connect):
    chunk = connect(redis_channel="room")
    assert redisqueue._runtime()._hub.channels == ["mine:room"]
    send_event("", "1", "room")
    assert chunk() == event("", "1")
    with override_settings(DJANGO_SSE={"CHANNEL_PREFIX": ""}):
        send_event("", "of another application", "room")
    other = connect(redis_channel="mine:room")
    assert redisqueue._runtime()._hub.channels == ["mine:mine:room"]
    send_event("", "2", "mine:room")
    assert other() == event("", "2")


# --- the iterator, called by the program ----------------------------------------------------------------------------


class Looping(RedisQueueView):
    def iterator(self):
        for _ in super().iterator():
            self.sse.add_comment("seen")
            yield


def test_a_program_may_add_to_each_event(connect):
    chunk = connect(Looping)
    send_event("", "1")
    assert chunk() == event("", "1") + b": seen\n\n"


class AsyncLooping(RedisQueueView):
    async def iterator(self):
        async for _ in super().iterator():
            self.sse.add_comment("seen")
            yield


@needs_loops
@pytest.mark.parametrize("on_loop", [False, True])
def test_an_async_program_may_add_to_each_event(connect, on_loop):
    async def main():
        response = await asyncio.to_thread(AsyncLooping.as_view(redis_channel="room"), AsyncRequestFactory().get("/"))
        chunks = aiter(response)
        assert await anext(chunks) == b"retry: 2000\n\n"
        assert stats() == {"channels": 1, "subscriptions": 1}
        await asend_event("", "1", "room")
        chunk = await anext(chunks)
        await asyncio.to_thread(response.close)
        return chunk

    if on_loop:
        assert asyncio.run(main()) == event("", "1") + b": seen\n\n"
        assert stats() == {"channels": 0, "subscriptions": 0}
    else:
        chunk = connect(AsyncLooping, redis_channel="room")
        assert stats() == {"channels": 1, "subscriptions": 1}
        send_event("", "1", "room")
        assert chunk() == event("", "1") + b": seen\n\n"


@needs_loops
def test_an_async_program_may_loop_over_the_events():
    async def main():
        view = RedisQueueView()
        view.sse = Sse(default_retry=1)
        view.sse.flush()
        steps = aiter(view.iterator())
        task = asyncio.ensure_future(anext(steps))
        await soon(lambda: stats()["subscriptions"])
        await asend_event("", "1")
        await task
        assert "".join(view.sse) == event("", "1").decode()
        task = asyncio.ensure_future(anext(steps, "the end"))
        await asyncio.sleep(0)
        steps.close()
        assert await task == "the end"
        return stats()

    assert asyncio.run(main()) == {"channels": 0, "subscriptions": 0}


def test_a_bare_view_subscribes_with_the_first_step_and_carries_ids():
    view = RedisQueueView(redis_channel="room")
    view.sse = Sse(default_retry=1)
    view.sse.flush()
    steps = view.iterator()
    assert stats() == {"channels": 0, "subscriptions": 0}
    steps.close()  # not yet subscribed: nothing to give back
    reader = threading.Thread(target=lambda: next(steps))
    reader.start()
    until(lambda: stats()["subscriptions"], what="the subscription")
    redisqueue._runtime().broker.publish("room", '["news", "1", "id 1"]')
    reader.join(10)
    assert "".join(view.sse) == "id: id 1\n\nevent: news\ndata: 1\n\n"
    steps.close()
    assert stats() == {"channels": 0, "subscriptions": 0}


def test_the_end_of_the_process_ends_the_loop_of_the_program():
    view = RedisQueueView(redis_channel="room")
    view.sse = Sse(default_retry=1)
    ended = []

    def loop():
        for _ in view.iterator():
            pass
        ended.append(True)

    program = threading.Thread(target=loop, daemon=True)
    program.start()
    until(lambda: stats()["subscriptions"], what="the subscription")
    runtime.reset()
    program.join(10)
    assert ended == [True]


@pytest.mark.parametrize("reason", ["shutdown", "max_age", "stalled", "client"])
def test_a_stream_that_ends_ends_the_loop_of_the_program(monkeypatch, reason):
    """Under a server of threads nobody can interrupt the thread that waits for the next event."""

    class Loops(RedisQueueView):
        def iterator(self):
            try:
                for _ in super().iterator():
                    yield
                after.append(1)
            finally:
                ended.append(1)

    registry = Registry()
    monkeypatch.setattr(views, "open_streams", registry)
    after, ended = [], []
    response = Loops.as_view(redis_channel="room")(RequestFactory().get("/"))
    chunks = iter(response)
    assert next(chunks) == b"retry: 2000\n\n"
    rest = []
    reader = threading.Thread(target=lambda: rest.extend(chunks), daemon=True)
    reader.start()
    (stream,) = registry.all()
    (subscription,) = redisqueue._runtime()._hub.subscriptions
    until(lambda: subscription.wake, what="the program to wait")
    if reason in ("shutdown", "max_age"):
        stream.end(reason, b"bye")
    else:
        stream.close(reason)
    reader.join(10)
    assert not reader.is_alive()
    assert rest == ([b"bye"] if reason in ("shutdown", "max_age") else [])
    assert ended == [1]
    assert after == ([] if reason == "client" else [1])
    response.close()
    assert stats() == {"channels": 0, "subscriptions": 0}


def test_the_error_of_a_redis_that_is_down_is_the_first_step_of_the_program():
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{free_port()}"}):
        steps = RedisQueueView(redis_channel="room").iterator()
        for _ in range(2):
            with pytest.raises(redis.exceptions.ConnectionError, match="'room'") as caught:
                next(steps)
            assert isinstance(caught.value, BrokerUnavailable)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connection", [{}, {"location": ""}, {"location": "nonsense"}, {"location": 6379}])
def test_wrong_settings_are_answered_with_the_two_lines_to_write(connection):
    wrong = override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection)
    with wrong, pytest.raises(ImproperlyConfigured) as caught:
        send_event("news", "1")
    text = str(caught.value)
    assert '    REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": "localhost:6379"}' in text
    assert '    REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": "memory:"}' in text


def pool(location, **kwargs):
    return ConnectionPoolManager.connection_pool(location=location, **kwargs)


def test_equal_arguments_share_a_pool_and_others_do_not():
    given = [
        {"db": 1},
        {"db": 1, "options": {"a": [1, 2], "b": {"c": 1}}},
        {"db": 1, "options": {"b": {"c": 1}, "a": [1, 2]}},
        {"db": 1, "options": {"b": {"c": 1}, "a": (1, 2)}},
        {"db": 1, "options": {"b": {"c": 2}, "a": [1, 2]}},
        {"db": 1, "options": {"b": {1, 2}}},
        {"db": 1, "options": {"b": {2, 1}}},
        {"db": "1"},
        {"db": True},
    ]
    keys = [redisqueue.freeze(kwargs) for kwargs in given]
    assert keys[1] == keys[2] == keys[3]
    assert keys[5] == keys[6]
    assert len(set(keys)) == 6
    assert pool("example.org:7005", db=1) is pool(db=1, location="example.org:7005")


def test_memory_is_no_redis_to_connect_to():
    with pytest.raises(ImproperlyConfigured):
        redisqueue._connect()


def test_the_module_has_no_other_names_than_it_has():
    with pytest.raises(AttributeError, match="module 'django_sse.redisqueue' has no attribute 'CONNECTION_ARGS'"):
        _ = redisqueue.CONNECTION_ARGS


# --- runtimes -------------------------------------------------------------------------------------------------------


def test_memory_is_one_broker_for_the_process():
    first = redisqueue._runtime()
    assert isinstance(first.broker, MemoryBroker)
    assert redisqueue._runtime() is first


def test_each_configuration_of_redis_has_a_runtime_of_its_own():
    runtimes = []
    for db in (0, 1, 0):
        # Assigned to the module, which ends no runtime, as a change of settings does.
        with mock.patch.object(redisqueue, "CONNECTION_KWARGS", {"location": "127.0.0.1:1", "db": db}, create=True):
            runtimes.append(redisqueue._runtime())
    assert runtimes[0] is runtimes[2]
    assert runtimes[0] is not runtimes[1]
    assert all(isinstance(each.broker, RedisBroker) for each in runtimes)


def test_a_patched_connect_has_a_runtime_of_its_own_and_is_looked_up_at_each_call():
    calls = []

    def connect():
        calls.append(1)
        return SimpleNamespace(publish=lambda channel, payload: calls.append((channel, payload)))

    usual = redisqueue._runtime()
    with mock.patch.object(redisqueue, "_connect", connect):
        patched = redisqueue._runtime()
        assert patched is not usual
        assert redisqueue._runtime() is patched
        send_event("news", "1", "room")
    assert calls == [1, ("room", '["news", "1"]')]
    assert redisqueue._runtime() is usual


def test_a_view_and_send_event_of_a_patched_connect_find_each_other(redis_server, connect):
    with mock.patch.object(redisqueue, "_connect", redis_server.client):
        chunk = connect(redis_channel="room")
        send_event("news", "1", "room")
        assert chunk() == event("news", "1")
        runtime.reset()


def test_memory_warns_when_an_event_is_sent_where_nobody_ever_connected(caplog):
    runtime.reset()
    send_event("news", "1")
    send_event("news", "2")
    (record,) = [record for record in caplog.records if record.name == "django_sse"]
    assert "no client has ever connected to this process" in record.getMessage()


def test_memory_does_not_warn_where_a_client_has_connected(caplog, connect):
    runtime.reset()
    connect()
    send_event("news", "1")
    assert caplog.records == []


def test_with_redis_the_event_goes_to_the_clients_of_every_process(redis_server, redis_settings, connect):
    chunk = connect(redis_channel="room")
    redis_server.client().publish("room", '["news", "from another program"]')
    assert chunk() == event("news", "from another program")
    send_event("news", "from this one", "room")
    assert chunk() == event("news", "from this one")


# --- programs that decide late, or wrongly --------------------------------------------------------------------------


def test_an_iterator_that_chooses_its_channel_gets_that_channel_and_no_other(connect):
    class Mine(RedisQueueView):
        def iterator(self):
            self.redis_channel = "mine"
            yield from RedisQueueView.iterator(self)

    chunk = connect(Mine, redis_channel="everybody")
    taken = []
    reader = threading.Thread(target=lambda: taken.append(chunk()))
    reader.start()
    until(lambda: stats() == {"channels": 1, "subscriptions": 1} and "mine" in redisqueue._runtime()._hub.channels)
    send_event("", "not for me", "everybody")
    send_event("", "for me", "mine")
    reader.join(10)
    assert taken == [event("", "for me")]


def test_a_channel_that_only_the_iterator_can_tell_is_asked_for_there(connect):
    class Late(RedisQueueView):
        def iterator(self):
            self.room = "late"
            yield from RedisQueueView.iterator(self)

        def get_redis_channel(self):
            return self.room

    chunk = connect(Late)
    taken = []
    reader = threading.Thread(target=lambda: taken.append(chunk()))
    reader.start()
    until(lambda: stats()["channels"] == 1)
    send_event("", "1", "late")
    reader.join(10)
    assert taken == [event("", "1")]


@pytest.mark.parametrize("refusal", [Http404, PermissionDenied])
def test_a_channel_that_is_refused_is_djangos_answer_whatever_the_iterator(connect, refusal):
    class Refuses(RedisQueueView):
        def iterator(self):
            yield from RedisQueueView.iterator(self)

        def get_redis_channel(self):
            raise refusal

    with pytest.raises(refusal):
        connect(Refuses)


@override_settings()
def test_a_stock_view_without_settings_is_an_error_at_once(connect):
    del settings.REDIS_SSEQUEUE_CONNECTION_SETTINGS
    with pytest.raises(ImproperlyConfigured, match="location"):
        connect()


def test_a_program_may_call_a_method_of_its_own_heartbeat_or_retry(connect):
    class Busy(RedisQueueView):
        def heartbeat(self):
            raise AssertionError("not ours to call")

        retry = heartbeat

    chunk = connect(Busy)
    send_event("", "1")
    assert chunk() == event("", "1")


def test_a_generator_over_the_events_that_is_collected_takes_no_lock(connect):
    class Loops(RedisQueueView):
        def iterator(self):
            yield from RedisQueueView.iterator(self)

    view = Loops()
    view.setup(RequestFactory().get("/"))
    chunks = view.dispatch(view.request).streaming_content
    next(chunks)
    send_event("", "1")
    next(chunks)
    with redisqueue._runtime()._lock:  # the collector may run in the middle of anything
        del view, chunks
        gc.collect()
