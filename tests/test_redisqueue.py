"""The queue beyond the interface of 0.4.1 (tests/compat): transactions, channels, locations, errors that help."""

import asyncio
import gc
import re
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
from sse import Sse as PlainSse

from django_sse import redisqueue, runtime, views
from django_sse.brokers.memory import MemoryBroker
from django_sse.brokers.redis import RedisBroker
from django_sse.exceptions import BrokerUnavailable
from django_sse.redisqueue import (
    ConnectionPoolManager,
    RedisQueueView,
    acursor,
    asend_event,
    asend_events,
    cursor,
    send_event,
    send_events,
)
from django_sse.registry import Registry
from django_sse.wire import Sse
from tests.helpers.eventsource import Parser
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
        def publish_all(self, publications):
            threads.append(threading.current_thread())
            assert go_on.wait(10)
            return [None] * len(publications)

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


# --- history --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept():
    """Every channel has a history, but those that are called plain."""
    with override_settings(DJANGO_SSE={"HISTORY": {"*": {"SIZE": 50}, "plain*": None}}):
        yield


@pytest.fixture(params=["memory", "redis"])
def kept_anywhere(request, kept):
    """The same in this process, and in Redis."""
    if request.param == "memory":
        yield
        return
    server = request.getfixturevalue("redis_server")
    server.client().flushall()
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": server.location}):
        yield


class Browser:
    """A client of a view, as a browser would be one."""

    def __init__(self, view, last=None, query=""):
        headers = {} if last is None else {"HTTP_LAST_EVENT_ID": last}
        self.response = view.as_view()(RequestFactory().get("/" + query, **headers))
        self.parser = Parser()
        self.bytes = b""
        self._chunks = iter(self.response)

    def read(self):
        """Read what comes next, and return the messages of it: (event, data)."""
        chunk = next(self._chunks)
        self.bytes += chunk
        return [(message.event, message.data) for message in self.parser.feed(chunk)]

    def until(self, *last):
        """Return all messages to the one that is `last`."""
        got = []
        while last not in got:
            got += self.read()
        return got

    def rest(self):
        """Return all messages to the end."""
        got = []
        for chunk in self._chunks:
            got += self.parser.feed(chunk)
        return got

    @property
    def last_event_id(self):
        return self.parser.last_event_id


@pytest.fixture
def browse():
    """A function that connects a `Browser` to a view of some channels."""
    browsers = []

    def browse(*channels, view=RedisQueueView, **client):
        if channels:
            view = type(view.__name__, (view,), {"get_redis_channel": lambda self: channels})
        browsers.append(Browser(view, **client))
        return browsers[-1]

    yield browse
    for browser in browsers:
        browser.response.close()


def test_without_history_the_wire_is_what_it_was(redis_server, redis_settings, connect):
    admin = redis_server.client()
    admin.config_resetstat()
    heard = admin.pubsub()
    heard.subscribe("room")
    chunk = connect(redis_channel="room")
    assert send_event("news", ["a", "é"], "room") is None
    assert chunk() == "event: news\ndata: a\ndata: é\n\n".encode()
    assert send_events([("", "b"), ("", "c", "other")], "room") == [None, None]
    assert chunk() == event("", "b")
    until(
        lambda: (message := heard.get_message()) and message["data"] == b'["news", ["a", "\\u00e9"]]', what="the event"
    )
    assert admin.keys() == []
    assert not {"cmdstat_eval", "cmdstat_evalsha", "cmdstat_script|load"} & set(admin.info("commandstats"))
    heard.close()


@override_settings(SECRET_KEY="")
def test_without_history_no_secret_is_needed(connect):
    chunk = connect(redis_channel="room")
    send_event("", "1", "room")
    assert chunk() == event("", "1")
    assert send_events([("", "2", "room")]) == [None]


@override_settings(SECRET_KEY="", DJANGO_SSE={"HISTORY": {"room": {}}})
def test_with_history_a_secret_is_needed_and_asked_for_at_once():
    for call in (
        lambda: send_event("", "1", "room"),
        lambda: RedisQueueView.as_view(redis_channel="room")(RequestFactory().get("/")),
        lambda: cursor("room"),
    ):
        with pytest.raises(ImproperlyConfigured, match="SECRET_KEY"):
            call()


# --- ids ---


@pytest.mark.usefixtures("kept_anywhere")
def test_send_event_returns_the_id_that_the_event_arrives_with(browse):
    browser = browse("room")
    returned = send_event("news", "1", "room")
    assert browser.until("news", "1") == [("news", "1")]
    assert browser.last_event_id == returned
    assert re.fullmatch("[A-Za-z0-9_-]{25,40}", returned)
    assert f"id: {returned}\nevent: news\ndata: 1\n\n".encode() in browser.bytes


@pytest.mark.usefixtures("kept_anywhere")
def test_a_client_without_an_id_is_sent_one_at_once_and_no_event(browse):
    browser = browse("room", "other")
    assert browser.read() == []
    while not browser.last_event_id:
        assert browser.read() == []
    assert browser.last_event_id == cursor(["room", "other"])
    assert re.fullmatch(rb"retry: 2000\n\nid: [A-Za-z0-9_-]+\n\n", browser.bytes)


@pytest.mark.usefixtures("kept_anywhere")
def test_a_client_that_comes_back_gets_what_it_has_missed_and_no_id_before(browse):
    ids = send_events([("", str(number)) for number in range(5)], "room")
    for client in (
        {"last": ids[1]},
        {"query": f"?last_event_id={ids[1]}"},
        {"last": ids[1], "query": "?last_event_id=x"},
    ):
        browser = browse("room", **client)
        assert browser.until("message", "4") == [("message", str(number)) for number in (2, 3, 4)]
        assert browser.last_event_id == ids[4]
        assert browser.bytes.startswith(f"retry: 2000\n\nid: {ids[2]}\nevent: ".encode())


@pytest.mark.usefixtures("kept")
def test_an_id_is_of_no_use_for_other_channels(browse):
    send_event("", "secret", "theirs")
    mine = send_event("", "1", "mine")
    send_event("", "2", "mine")
    theirs = send_event("", "secret", "theirs")
    browser = browse("mine", last=theirs)
    assert browser.until("stream-reset", '{"channels": ["mine"], "reason": "unknown"}')
    assert b"secret" not in browser.bytes
    both = browse("theirs", "mine", last=mine)
    assert both.until("message", "2") == [
        ("stream-reset", '{"channels": ["theirs"], "reason": "unknown"}'),
        ("message", "2"),
    ]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("client", [{"last": ""}, {"query": "?last_event_id="}])
def test_an_empty_id_is_none(browse, client):
    browser = browse("room", **client)
    while not browser.last_event_id:
        assert browser.read() == []
    assert browser.last_event_id == cursor("room")


@pytest.mark.usefixtures("kept")
def test_a_program_may_say_itself_what_the_last_id_is(browse):
    send_event("", "1", "room")
    for last in (7, "7"):
        view = type("Own", (RedisQueueView,), {"get_last_id": lambda self, last=last: last})
        assert browse("room", view=view).read()[:1] in (
            [],
            [("stream-reset", '{"channels": ["room"], "reason": "unknown"}')],
        )


@pytest.mark.usefixtures("kept")
def test_without_a_history_of_its_channels_a_view_sends_no_ids_of_ours_and_those_of_others(browse):
    browser = browse("plain")
    assert send_event("", "1", "plain") is None
    redisqueue._runtime().broker.publish("plain", '["", "2", "theirs"]')
    browser.until("message", "2")
    assert browser.bytes == b"retry: 2000\n\nevent: \ndata: 1\n\nid: theirs\nevent: \ndata: 2\n\n"


@pytest.mark.usefixtures("kept")
def test_ids_of_others_are_dropped_where_one_of_ours_would_be_lost(browse):
    browser = browse("room", "plain")
    browser.read()
    redisqueue._runtime().broker.publish("plain", '["", "1", "theirs"]')
    browser.until("message", "1")
    assert b"theirs" not in browser.bytes
    assert browser.last_event_id == cursor("room")


ROTATED = [
    pytest.param("new", ["old"], [("message", "2")], id="understood"),
    pytest.param("new", ["older", "old"], [("message", "2")], id="understood-later"),
    pytest.param("new", [], [("stream-reset", '{"channels": ["room"], "reason": "unknown"}')], id="forgotten"),
    pytest.param("new", ["older"], [("stream-reset", '{"channels": ["room"], "reason": "unknown"}')], id="another"),
]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("key", "fallbacks", "expected"), ROTATED)
def test_an_id_outlives_the_rotation_of_the_secret(browse, redis_server, redis_settings, key, fallbacks, expected):
    with override_settings(SECRET_KEY="old"):
        before = send_event("", "1", "room")
        send_event("", "2", "room")
    with override_settings(SECRET_KEY=key, SECRET_KEY_FALLBACKS=fallbacks):
        browser = browse("room", last=before)
        got = []
        while not got:
            got += browser.read()
        assert got == expected
        assert browser.last_event_id != before
        # Whatever is sent from now on is made with the new one.
        after = send_event("", "3", "room")
        browser.until("message", "3")
        assert browser.last_event_id == after
    with override_settings(SECRET_KEY=key):
        assert browse("room", last=after, query="").read() == []


# --- an event's own id ---


@pytest.mark.usefixtures("kept_anywhere")
def test_an_event_of_one_event_id_is_sent_once_and_its_id_returned_again(browse):
    browser = browse("room")
    first = send_event("", "1", "room", event_id="order 7")
    assert send_event("", "1 again", "room", event_id="order 7") == first
    assert send_event("", "2", "room", event_id="order 8") != first
    assert browser.until("message", "2") == [("message", "1"), ("message", "2")]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("event_id", ["", "x" * 201, 7, b"7", True, ["7"], "\ud800"])
def test_an_event_id_is_text_of_some_length(event_id):
    with pytest.raises(ValueError, match="event_id"):
        send_event("", "1", "room", event_id=event_id)


@pytest.mark.usefixtures("kept_anywhere")
@pytest.mark.parametrize("event_id", ["x", "x" * 200, "é" * 200, "a b:{c}\n\0"])
def test_an_event_id_may_be_any_other_text(event_id):
    first = send_event("", "1", "room", event_id=event_id)
    assert first == send_event("", "1", "room", event_id=event_id)


@pytest.mark.usefixtures("kept")
def test_an_event_id_without_a_history_to_know_it_is_an_error():
    with pytest.raises(ImproperlyConfigured, match="'plain' has no history"):
        send_event("", "1", "plain", event_id="7")
    with override_settings(DJANGO_SSE={}), pytest.raises(ImproperlyConfigured, match="HISTORY"):
        send_event("", "1", "room", event_id="7")


@needs_loops
@pytest.mark.usefixtures("kept")
def test_asend_event_returns_ids_and_knows_event_ids():
    async def main():
        first = await asend_event("", "1", "room", event_id="7")
        return first, await asend_event("", "1", "room", event_id="7"), await asend_event("", "1", "plain")

    first, again, plain = asyncio.run(main())
    assert first == again == cursor("room")
    assert plain is None


# --- the largest event ---


@pytest.mark.parametrize("history", [None, {}])
def test_a_payload_may_be_as_large_as_it_may_be_and_not_larger(history):
    with override_settings(DJANGO_SSE={"MAX_PAYLOAD": 20, "HISTORY": history}):
        send_event("", "x" * (20 - len('["", ""]')), "room")
        for call in (
            lambda: send_event("", "x" * 13, "room"),
            lambda: send_event("", "é" * 3, "room"),  # six bytes each, as JSON
            lambda: send_events([("", "1"), ("", "x" * 13)], "room"),
            lambda: send_event("x" * 13, "", "room"),
        ):
            with pytest.raises(ValueError, match=r'2[0-9] bytes as JSON; DJANGO_SSE\["MAX_PAYLOAD"\] allows 20'):
                call()


def test_a_megabyte_may_be_sent_unless_it_is_said_otherwise(connect):
    chunk = connect(redis_channel="room")
    with pytest.raises(ValueError, match="MAX_PAYLOAD"):
        send_event("", "x" * 1024 * 1024, "room")
    send_event("", "x" * 1024 * 1000, "room")
    assert len(chunk()) > 1024 * 1000
    with override_settings(DJANGO_SSE={"MAX_PAYLOAD": None}):
        send_event("", "x" * 5 * 1024 * 1024, "room")


# --- several events ---


@pytest.mark.usefixtures("kept_anywhere")
def test_several_events_arrive_in_their_order_and_their_ids_are_returned_in_it(browse):
    browser = browse("room", "other")
    ids = send_events([("a", "1"), ("b", {"n": 2}), ["c", ["x", "y"]], ("d", "4", "other"), ("e", b"5", None)], "room")
    assert browser.until("e", "5") == [("a", "1"), ("b", '{"n": 2}'), ("c", "x\ny"), ("d", "4"), ("e", "5")]
    assert len(set(ids)) == 5
    alone = browse("room", last=ids[0])
    assert alone.until("e", "5") == [("b", '{"n": 2}'), ("c", "x\ny"), ("e", "5")]
    assert alone.last_event_id == ids[4]
    assert cursor("other") == ids[3]


@pytest.mark.usefixtures("kept_anywhere")
def test_several_events_may_be_of_channels_with_and_without_history(browse):
    browser = browse("room", "plain")
    ids = send_events((("", str(n), channel) for n, channel in enumerate(["room", "plain", "room"])))
    assert [id is None for id in ids] == [False, True, False]
    assert browser.until("message", "2") == [("message", "0"), ("message", "1"), ("message", "2")]


@pytest.mark.usefixtures("kept")
def test_no_event_is_nothing_to_send():
    assert send_events([]) == []
    assert send_events(iter(()), "room") == []


@override_settings(REDIS_SSEQUEUE_CHANNEL_NAME="usual")
@pytest.mark.usefixtures("kept")
def test_several_events_that_name_no_channel_are_of_the_default_one():
    assert send_events([("", "1"), ("", "2", "room"), ("", "3", None)])[2] == cursor("usual")


WRONG_EVENTS = [
    ("text", TypeError),
    (b"bytes", TypeError),
    (("alone",), TypeError),
    ((), TypeError),
    (("a", "b", "c", "d"), TypeError),
    ({"a": 1, "b": 2}, TypeError),
    ({"a", "b"}, TypeError),
    (None, TypeError),
    (7, TypeError),
    (("a\nb", "1"), ValueError),
    (("a", object()), TypeError),
    (("a", "1", ""), ValueError),
    (("a", "1", "\ud800"), ValueError),
]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(("wrong", "error"), WRONG_EVENTS, ids=[repr(wrong)[:20] for wrong, _ in WRONG_EVENTS])
def test_what_is_wrong_with_one_of_several_events_is_raised_before_any_is_sent(wrong, error):
    before = cursor("room")
    with pytest.raises(error, match="."):
        send_events([("", "1"), wrong, ("", "3")], "room")
    assert cursor("room") == before


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("kept")
def test_several_events_on_commit_wait_for_the_commit(browse):
    browser = browse("room")
    browser.read()
    before = cursor("room")
    with transaction.atomic():
        assert send_events([("", "1"), ("", "2")], "room", on_commit=True) == [None, None]
        assert send_event("", "3", "room", on_commit=True, event_id="3") is None
        assert cursor("room") == before
    assert browser.until("message", "3") == [("message", "1"), ("message", "2"), ("message", "3")]
    with transaction.atomic():
        send_events([("", "4")], "room", on_commit=True)
        transaction.set_rollback(True)
    assert browser.last_event_id == cursor("room")


@needs_loops
@pytest.mark.usefixtures("kept")
def test_asend_events_and_acursor_do_what_the_others_do():
    async def main():
        ids = await asend_events([("", "1"), ("", "2", "plain"), ("", "3")], "room")
        assert await acursor("room") == ids[2] == cursor("room")
        assert await acursor(["room", "other"]) == cursor(["room", "other"])
        assert await acursor() == cursor()
        return ids

    assert [id is None for id in asyncio.run(main())] == [False, True, False]


@needs_loops
@pytest.mark.usefixtures("kept")
def test_acursor_and_asend_events_do_not_block_the_loop():
    go_on = threading.Event()

    class Held(MemoryBroker):
        def fetch(self, channels):
            assert go_on.wait(10)
            return super().fetch(channels)

        def publish_all(self, publications):
            assert go_on.wait(10)
            return super().publish_all(publications)

    async def main():
        with mock.patch.object(redisqueue._runtime(), "broker", Held()):
            tasks = [asyncio.ensure_future(each) for each in (acursor("room"), asend_events([("", "1", "room")]))]
            await asyncio.sleep(0.01)  # the loop goes on
            assert not any(task.done() for task in tasks)
            go_on.set()
            return await asyncio.gather(*tasks)

    asyncio.run(main())


@needs_loops
def test_acursor_leaves_the_thread_of_the_database_to_the_database():
    threads = []

    async def main():
        await sync_to_async(lambda: threads.append(threading.get_ident()))()
        await acursor("room")

    def asked(channels):
        threads.append(threading.get_ident())

    with mock.patch.object(redisqueue, "cursor", asked):
        asyncio.run(main())
    assert len(set(threads)) == 2


@needs_loops
@pytest.mark.parametrize("on_commit", [False, True])
def test_asend_events_keeps_to_the_thread_of_the_transaction_if_that_matters(on_commit):
    threads = []

    async def main():
        await sync_to_async(lambda: threads.append(threading.get_ident()))()
        await asend_events([("news", "1")], "room", on_commit=on_commit)

    def send(*args, **kwargs):
        threads.append(threading.get_ident())

    with mock.patch.object(redisqueue, "send_events", send):
        asyncio.run(main())
    database, sent = threads
    assert (sent == database) is on_commit


# --- the cursor of a page ---


@pytest.mark.usefixtures("kept_anywhere")
def test_a_stream_that_begins_at_a_cursor_gets_what_has_come_since(browse):
    send_event("", "on the page", "room")
    here = cursor(["room", "other", "room"])
    send_events([("", "1", "room"), ("", "2", "other")])
    browser = browse("room", "other", query=f"?last_event_id={here}")
    assert browser.until("message", "2") == [("message", "1"), ("message", "2")]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("channels", [[], ["room", ""], [None], 5.0, "", ["room", "\ud800"]])
def test_a_cursor_is_of_named_channels(channels):
    with pytest.raises(ValueError, match="channel"):
        cursor(channels)


@pytest.mark.usefixtures("kept")
def test_a_cursor_is_of_channels_with_history():
    assert cursor([7, b"room"]) == cursor(["7", "room"])
    for channels in ("plain", ["room", "plain"]):
        with pytest.raises(ImproperlyConfigured, match="'plain' has no history"):
            cursor(channels)


@pytest.mark.usefixtures("kept")
def test_a_cursor_of_a_redis_that_is_down_is_an_error():
    down = override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{free_port()}"})
    with down, pytest.raises(redis.exceptions.ConnectionError) as caught:
        cursor("room")
    assert isinstance(caught.value, BrokerUnavailable)


@pytest.mark.usefixtures("kept")
def test_a_cursor_of_a_channel_that_cannot_be_read_is_an_error(redis_server, redis_settings):
    redis_server.client().set("django-sse:meta:{bad}", "something else")
    with pytest.raises(BrokerUnavailable, match="'bad'"):
        cursor(["room", "bad"])
    assert cursor("room")


@pytest.mark.usefixtures("kept")
def test_a_hundred_channels_with_history_are_as_many_as_an_id_can_speak_of(browse):
    channels = [f"room {number}" for number in range(100)]
    assert len(cursor(channels)) < 4096
    browser = browse(*channels, "plain")
    while not browser.last_event_id:
        browser.read()
    assert browser.last_event_id == cursor(channels)
    with pytest.raises(ValueError, match="100 channels with history, not 101"):
        cursor([*channels, "one more"])
    with pytest.raises(ValueError, match="100 channels with history, not 101"):
        browse(*channels, "one more")
    assert stats()["subscriptions"] == 1
    # Those without are not among them.
    browse(*channels, *(f"plain {number}" for number in range(50)))


# --- the prefix ---


@pytest.mark.parametrize("location", ["memory", "redis"])
def test_histories_and_resets_are_named_without_the_prefix_and_kept_with_it(browse, redis_server, location):
    connection = MEMORY if location == "memory" else {"location": redis_server.location}
    ours = {"CHANNEL_PREFIX": "shop:", "HISTORY": {"room": {"SIZE": 2}, "shop:*": None}}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection, DJANGO_SSE=ours):
        ids = send_events([("", str(number)) for number in range(5)], "room")
        expired = browse("room", last=ids[0])
        assert expired.until("stream-reset", '{"channels": ["room"], "reason": "expired"}')
        browser = browse("room", last=ids[2])
        assert browser.until("message", "4") == [("message", "3"), ("message", "4")]
        if location == "redis":
            keys = {key.decode() for key in redis_server.client().scan_iter()}
            assert keys == {"django-sse:meta:{shop:room}", "django-sse:log:{shop:room}"}
    theirs = {"CHANNEL_PREFIX": "shop2:", "HISTORY": {}}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection, DJANGO_SSE=theirs):
        other = browse("room", last=ids[4])
        assert other.until("stream-reset", '{"channels": ["room"], "reason": "unknown"}')


# --- initial() and on_reset() ---


class Telling(RedisQueueView):
    """Writes down what it is asked for."""

    asked = ()

    def initial(self):
        self.asked.append("initial")
        self.sse.add_message("state", "all")

    def on_reset(self, channels, reason):
        self.asked.append((list(channels), reason))
        super().on_reset(channels, reason)


@pytest.fixture
def telling():
    """A view that writes down what it is asked for, and where it does."""
    asked = []
    return type("Telling", (Telling,), {"asked": asked}), asked


@pytest.mark.usefixtures("kept_anywhere")
def test_initial_is_for_who_comes_without_a_position_and_on_reset_for_who_has_lost_his(browse, telling):
    view, asked = telling
    ids = send_events([("", str(number)) for number in range(70)], "room")
    for last, expected in (
        (None, ["initial"]),
        (ids[-1], []),
        (ids[40], []),
        (ids[2], [(["room"], "expired")]),
        ("garbage", [(["room"], "unknown")]),
        ("", ["initial"]),
    ):
        asked.clear()
        browse("room", view=view, last=last)
        assert asked == expected


@pytest.mark.usefixtures("kept")
def test_channels_that_are_lost_for_one_reason_share_a_reset(browse, telling):
    view, asked = telling
    (old, *_) = send_events([("", str(number)) for number in range(70)], "room")
    browser = browse("b", "room", "c", "plain", view=view, last=old)
    assert sorted(asked) == [(["b", "c"], "unknown"), (["room"], "expired")]
    got = []
    while len(got) < 2:
        got += browser.read()
    assert sorted(data for _, data in got) == [
        '{"channels": ["b", "c"], "reason": "unknown"}',
        '{"channels": ["room"], "reason": "expired"}',
    ]


@pytest.mark.usefixtures("kept")
def test_on_a_channel_without_history_each_connection_begins_with_the_state(browse, telling):
    view, asked = telling
    for last in (None, "theirs", send_event("", "1", "room")):
        assert browse("plain", view=view, last=last).until("state", "all") == [("state", "all")]
    assert asked == ["initial"] * 3


@pytest.mark.usefixtures("kept_anywhere")
def test_the_state_is_sent_before_the_id_and_what_comes_meanwhile_behind_it(browse):
    """Who is cut off before the id gets the state again; who has the id has the state."""

    class View(RedisQueueView):
        def initial(self):
            self.sse.add_message("state", "1 of 2")
            yield
            self.sent = send_event("", "meanwhile", "room")
            self.sse.add_message("state", "2 of 2")

    before = cursor("room")
    browser = browse("room", view=View)
    assert browser.until("message", "meanwhile") == [
        ("state", "1 of 2"),
        ("state", "2 of 2"),
        ("message", "meanwhile"),
    ]
    head, _, rest = browser.bytes.partition(f"id: {before}\n\n".encode())
    assert head.endswith(b"data: 2 of 2\n\n")
    assert rest.startswith(b"id: ")


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("how", ["generator", "list", "written", "initial"])
def test_a_view_may_send_the_state_instead_of_a_reset(browse, how):
    class View(RedisQueueView):
        def initial(self):
            self.sse.add_message("state", "all")
            yield

        def on_reset(self, channels, reason):
            if how == "initial":
                return self.initial()
            if how == "written":
                return self.sse.add_message("state", "all")
            return iter(self.initial()) if how == "generator" else list(self.initial())

    browser = browse("room", view=View, last="garbage")
    assert browser.until("state", "all") == [("state", "all")]
    while not browser.last_event_id:
        browser.read()
    assert b"stream-reset" not in browser.bytes


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("method", ["initial", "on_reset"])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_of_the_state_is_an_ordinary_error_and_gives_the_subscription_back(browse, method, late):
    def fail(self, *args):
        if late:
            self.sse.add_message("state", "half")
            yield
        raise Http404("no such room")

    view = type("View", (RedisQueueView,), {method: fail})
    with pytest.raises(Http404):
        browse("room", view=view, last=None if method == "initial" else "garbage")
    assert stats() == {"channels": 0, "subscriptions": 0}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("method", ["initial", "on_reset"])
def test_the_state_cannot_be_async_and_the_error_says_how_it_can_be(browse, method):
    async def generator(self, *args):
        yield

    for given in (generator, lambda self, *args: 7, lambda self, *args: object()):
        view = type("View", (RedisQueueView,), {method: given})
        with pytest.raises(TypeError, match=rf"View.{method}\(\) must fill self.sse and return None, or be a plain"):
            browse("room", view=view, last=None if method == "initial" else "garbage")
        assert stats() == {"channels": 0, "subscriptions": 0}


@pytest.mark.usefixtures("kept")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_coroutine_is_no_state_either(browse):
    class View(RedisQueueView):
        async def initial(self):
            pass

    with pytest.raises(TypeError, match="plain generator"):
        browse("room", view=View)
    gc.collect()
    assert stats() == {"channels": 0, "subscriptions": 0}


def test_a_redis_that_is_down_is_not_asked_for_the_state(browse, telling, reasons):
    view, asked = telling
    connection = {"location": f"127.0.0.1:{free_port()}"}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection, DJANGO_SSE={"HISTORY": {}}):
        browser = browse("room", view=view)
        assert browser.rest() == []
    assert reasons == ["error"]
    assert asked == []


def lose(redis_server):
    """Let Redis lose its data, and the process its connection."""
    admin = redis_server.client()
    admin.flushall()
    admin.client_kill_filter(_type="pubsub")


@pytest.mark.usefixtures("kept")
def test_a_stream_that_is_open_when_data_is_lost_is_told_so_and_goes_on(browse, redis_server, redis_settings, reasons):
    browser = browse("room")
    send_event("", "1", "room")
    browser.until("message", "1")
    lose(redis_server)
    browser.until("stream-reset", '{"channels": ["room"], "reason": "epoch"}')
    send_event("", "2", "room")
    assert browser.until("message", "2") == [("message", "2")]
    assert reasons == []


@pytest.mark.usefixtures("kept")
def test_a_stream_whose_view_sends_the_state_ends_when_data_is_lost(browse, redis_server, redis_settings, reasons):
    class View(RedisQueueView):
        def on_reset(self, channels, reason):
            self.sse.add_message("state", reason)

    browser = browse("room", view=View)
    send_event("", "1", "room")
    browser.until("message", "1")
    lose(redis_server)
    assert browser.rest() == []
    until(lambda: reasons == ["reset"], what="the end")
    assert stats() == {"channels": 0, "subscriptions": 0}
    again = browse("room", view=View, last=browser.last_event_id)
    assert again.until("state", "epoch") == [("state", "epoch")]


# --- the iterator, called by the program ---


class KeptLooping(RedisQueueView):
    def iterator(self):
        for _ in RedisQueueView.iterator(self):
            self.sse.add_comment("seen")
            yield


@pytest.mark.usefixtures("kept_anywhere")
def test_a_program_that_adds_to_each_event_sends_its_id_in_one_block_with_it(browse):
    first = send_event("", "1", "room")
    browser = browse("room", view=KeptLooping, last=first)
    second = send_event("news", "2", "room")
    browser.until("news", "2")
    assert browser.bytes == f"retry: 2000\n\nid: {second}\nevent: news\ndata: 2\n\n: seen\n\n".encode()


@needs_loops
@pytest.mark.usefixtures("kept")
def test_an_async_program_gets_them_likewise():
    class View(RedisQueueView):
        redis_channel = "room"

        async def iterator(self):
            async for _ in super().iterator():
                yield

    first = send_event("", "1", "room")
    second = send_event("", "2", "room")

    async def main():
        request = AsyncRequestFactory().get("/", headers={"Last-Event-ID": first})
        response = await asyncio.to_thread(View.as_view(), request)
        chunks = aiter(response)
        got = b""
        while not got.endswith(b"data: 2\n\n"):
            got += await anext(chunks)
        await asyncio.to_thread(response.close)
        return got

    assert asyncio.run(main()) == f"retry: 2000\n\nid: {second}\nevent: \ndata: 2\n\n".encode()


@pytest.mark.usefixtures("kept")
def test_a_bare_view_is_greeted_with_its_first_step():
    view = RedisQueueView(redis_channel="room")
    view.request = RequestFactory().get("/")
    steps = view.iterator()
    taken = []
    reader = threading.Thread(target=lambda: taken.append(next(steps)))
    reader.start()
    until(lambda: stats()["subscriptions"], what="the subscription")
    before = cursor("room")
    until(lambda: hasattr(view, "sse") and before in str(view.sse), what="the id")
    sent = send_event("", "1", "room")
    reader.join(10)
    assert "".join(view.sse) == f"retry: 2000\n\nid: {before}\n\nid: {sent}\nevent: \ndata: 1\n\n"
    steps.close()


class Shouting(Sse):
    def add_message(self, event, text, encoding="utf-8"):
        super().add_message(event, text.upper(), encoding)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("kind", "block"),
    [
        (PlainSse, "event: \ndata: {data}\n\nid: {id}\n\n"),
        (Shouting, "event: \ndata: {data}\n\nid: {id}\n\n"),
        (type("Mine", (Sse,), {}), "id: {id}\nevent: \ndata: {data}\n\n"),
    ],
)
def test_a_program_with_a_buffer_of_its_own_gets_no_id_before_its_event(browse, kind, block):
    """Cut off in between, the event would be missed; so it may come twice."""

    class View(RedisQueueView):
        def iterator(self):
            self.sse = kind()
            self.sse.flush()
            for _ in RedisQueueView.iterator(self):
                yield

    first = send_event("", "A", "room")
    browser = browse("room", view=View, last=first)
    sent = [send_event("", "B", "room"), send_event("", "C", "room")]
    while browser.last_event_id != sent[-1]:
        browser.read()
    blocks = "".join(block.format(data=data, id=id) for data, id in zip("BC", sent, strict=True))
    assert browser.bytes.decode().replace("event: message", "event: ").endswith(blocks)
