"""
`django_sse.redisqueue`: names, patch points, settings, pools, errors and the bytes on the Redis channel.

The other side of the channel, where it matters, is a program of 2013: tests.compat.old, or a PUBLISH written out.
"""

import inspect
import json
import logging
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from unittest import mock

import pytest
import redis
import sse
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.test import Client, RequestFactory, override_settings

from django_sse import redisqueue
from django_sse.redisqueue import ConnectionPoolManager, RedisQueueView, send_event
from django_sse.views import BaseSseView
from tests.compat import views
from tests.compat.old import OldSubscriber
from tests.compat.reading import Reading
from tests.helpers.process import free_port
from tests.helpers.servers import ROOT
from tests.helpers.wait import until

POOL = 130  # connections in use at once, more than the 100 at which redis-py stops by itself

WITHOUT_SETTINGS = """
from django.conf import settings
settings.configure(SECRET_KEY="x")
import django
django.setup()
import django_sse.redisqueue
from django_sse.redisqueue import *
from django_sse.redisqueue import CONNECTION_KWARGS, DEFAULT_CHANNEL, ConnectionPoolManager, _connect
assert (CONNECTION_KWARGS, DEFAULT_CHANNEL) == ({}, "sse")
print(sorted(name for name in globals() if name in ("RedisQueueView", "send_event")), RedisQueueView.redis_channel)
"""


IN_A_PROGRAM = """
import sys
MEMORY = {"location": "memory:"}
from django.conf import settings
settings.configure(SECRET_KEY="x", INSTALLED_APPS=sys.argv[1:], REDIS_SSEQUEUE_CONNECTION_SETTINGS=MEMORY)
import django
django.setup()
from django.test import RequestFactory
from django_sse.redisqueue import RedisQueueView, send_event
chunks = iter(RedisQueueView.as_view()(RequestFactory().get("/")))
assert next(chunks) == b"retry: 2000\\n\\n"
send_event("news", "hello")
sys.stdout.write(next(chunks).decode())
"""


@pytest.fixture
def subscriber(redis_server, redis_settings):
    """An old subscriber of the default channel, on the Redis that the settings name."""
    with OldSubscriber(redis_server.client(socket_timeout=10), "sse") as subscriber:
        yield subscriber


@pytest.fixture
def short_heartbeat():
    """Silent streams notice within 0.1 s that their reader has left."""
    with override_settings(DJANGO_SSE={"HEARTBEAT": 0.1}):
        yield


@pytest.fixture
def down():
    """The settings name a port where no Redis is; the name of that location."""
    location = f"127.0.0.1:{free_port()}"
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": location}):
        yield location


def listen(view=views.Queue, **kwargs):
    """Connect a client to a queue view and return when it is subscribed."""
    reading = Reading((view if inspect.isfunction(view) else view.as_view())(RequestFactory().get("/"), **kwargs))
    try:
        reading.wait_for(b"retry: 2000\n\n")
    except BaseException:
        reading.__exit__()
        raise
    return reading


def received(reading, count=1):
    messages = [reading.next_message() for _ in range(count)]
    return [(message.event, message.data) for message in messages]


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_module_exports_the_view_and_send_event():
    assert {"RedisQueueView", "send_event"} <= set(redisqueue.__all__)


def test_the_queue_view_is_a_base_view():
    assert issubclass(RedisQueueView, BaseSseView)


def test_send_event_takes_event_name_data_and_channel():
    parameters = inspect.signature(send_event).parameters
    assert list(parameters)[:3] == ["event_name", "data", "channel"]
    assert parameters["channel"].default is not inspect.Parameter.empty
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in list(parameters.values())[3:])


def run_program(text, *arguments):
    run = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_works_without_settings():
    assert run_program(WITHOUT_SETTINGS) == "['RedisQueueView', 'send_event'] sse\n"


@pytest.mark.parametrize("apps", [[], ["django_sse"]], ids=["no-app", "installed-app"])
def test_the_package_may_be_an_installed_app_or_not(apps):
    assert run_program(IN_A_PROGRAM, *apps) == "event: news\ndata: hello\n\n"


# --- settings -------------------------------------------------------------------------------------------------------


def test_connection_kwargs_are_the_settings_object_itself():
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "127.0.0.1:1"}):
        assert redisqueue.CONNECTION_KWARGS is settings.REDIS_SSEQUEUE_CONNECTION_SETTINGS


def test_connection_kwargs_without_settings_are_empty():
    with override_settings():
        del settings.REDIS_SSEQUEUE_CONNECTION_SETTINGS
        assert redisqueue.CONNECTION_KWARGS == {}


def test_the_connection_settings_are_read_late():
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "127.0.0.1:1111"}):
        assert redisqueue._connect().connection_pool.connection_kwargs["port"] == 1111
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "127.0.0.1:2222"}):
        assert redisqueue._connect().connection_pool.connection_kwargs["port"] == 2222


def test_patching_connection_kwargs_beats_the_settings():
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "127.0.0.1:1111"}):
        with mock.patch("django_sse.redisqueue.CONNECTION_KWARGS", {"location": "127.0.0.1:3333"}):
            assert redisqueue._connect().connection_pool.connection_kwargs["port"] == 3333
        assert redisqueue._connect().connection_pool.connection_kwargs["port"] == 1111


def test_patching_connection_kwargs_with_nothing_is_improperly_configured():
    elsewhere = override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": "127.0.0.1:1111"})
    patched = mock.patch("django_sse.redisqueue.CONNECTION_KWARGS", {})
    with elsewhere, patched, pytest.raises(ImproperlyConfigured):
        redisqueue._connect()


def test_patching_the_dictionary_in_place_takes_effect():
    connection = {"location": "127.0.0.1:1111"}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection):
        redisqueue.CONNECTION_KWARGS["location"] = "127.0.0.1:3333"
        assert redisqueue._connect().connection_pool.connection_kwargs["port"] == 3333


@pytest.mark.parametrize("setting", ["REDIS_SSEQUEUE_CHANEL_NAME", "REDIS_SSEQUEUE_CHANNEL_NAME"])
def test_the_default_channel_is_read_late_in_both_spellings(setting, redis_server, redis_settings, short_heartbeat):
    with override_settings(**{setting: "spelt"}):
        assert redisqueue.DEFAULT_CHANNEL == "spelt"
        assert RedisQueueView.redis_channel == "spelt"
        assert RedisQueueView().get_redis_channel() == "spelt"
        with listen() as reading, OldSubscriber(redis_server.client(socket_timeout=10), "spelt") as subscriber:
            send_event("e", "1")
            assert subscriber.pair() == ("e", "1")
            assert received(reading) == [("e", "1")]


def test_the_default_channel_is_sse():
    assert redisqueue.DEFAULT_CHANNEL == "sse"
    assert RedisQueueView.redis_channel == "sse"
    assert RedisQueueView().get_redis_channel() == "sse"


def test_patching_the_default_channel_takes_effect():
    with mock.patch("django_sse.redisqueue.DEFAULT_CHANNEL", "patched"):
        assert RedisQueueView.redis_channel == "patched"
        with mock.patch("django_sse.redisqueue._connect") as connect:
            send_event("e", "1")
        assert connect().publish.call_args.args[0] == "patched"
    assert redisqueue.DEFAULT_CHANNEL == RedisQueueView.redis_channel == "sse"


# --- pools and _connect() -------------------------------------------------------------------------------------------


def test_connect_gives_a_new_client_with_undecoded_bytes_on_the_shared_pool(redis_server, redis_settings):
    first, second = redisqueue._connect(), redisqueue._connect()
    assert isinstance(first, redis.Redis)
    assert first is not second
    assert first.connection_pool is second.connection_pool
    assert first.connection_pool is ConnectionPoolManager.connection_pool(**redisqueue.CONNECTION_KWARGS)
    first.set("key", "é")
    assert second.get("key") == "é".encode()


def test_the_pool_has_no_bound(redis_server, redis_settings):
    with ExitStack() as stack:
        for _ in range(POOL):
            pubsub = redisqueue._connect().pubsub()
            stack.callback(pubsub.close)
            pubsub.subscribe("crowd")
        counted = redis_server.client()
        until(lambda: counted.pubsub_numsub("crowd") == [(b"crowd", POOL)], what="all subscriptions")


def test_a_pool_is_a_redis_pool_of_the_location_db_and_password():
    pool = ConnectionPoolManager.connection_pool(location="example.org:7000", db="3", password="secret")
    assert isinstance(pool, redis.ConnectionPool)
    assert pool.connection_kwargs["host"] == "example.org"
    assert pool.connection_kwargs["port"] == 7000
    assert int(pool.connection_kwargs["db"]) == 3
    assert pool.connection_kwargs["password"] == "secret"


def test_db_and_password_may_be_left_out():
    pool = ConnectionPoolManager.connection_pool(location="example.org:7001")
    assert pool.connection_kwargs["db"] == 0
    assert pool.connection_kwargs["password"] is None


def test_a_unix_location_is_a_path():
    pool = ConnectionPoolManager.connection_pool(location="unix:/run/redis.sock", db=1)
    assert pool.connection_class is redis.UnixDomainSocketConnection
    assert pool.connection_kwargs["path"] == "/run/redis.sock"


def test_unknown_keys_are_ignored():
    pool = ConnectionPoolManager.connection_pool(location="example.org:7002", color="red")
    assert "color" not in pool.connection_kwargs


def test_the_same_arguments_give_the_same_pool_in_any_order():
    pool = ConnectionPoolManager.connection_pool(location="a:1", db=2, password="p")
    assert ConnectionPoolManager.connection_pool(location="a:1", db=2, password="p") is pool
    assert ConnectionPoolManager.connection_pool(password="p", db=2, location="a:1") is pool


def test_different_arguments_give_different_pools():
    arguments = [
        {"location": "a:1"},
        {"location": "a:1", "db": "7"},
        {"location": "a:1", "password": "7"},
        {"location": "a:1", "db": 2, "password": "p"},
        {"location": "a:12", "password": "p"},
        {"location": "a:1", "password": "2:p"},
        {"location": "a:1", "password": "None"},
        {"location": "unix:/a:1"},
    ]
    pools = [ConnectionPoolManager.connection_pool(**kwargs) for kwargs in arguments]
    assert len({id(pool) for pool in pools}) == len(arguments)


def test_db_as_a_text_and_no_password_work(redis_server, redis_settings):
    connection = {**redis_settings, "db": "1", "password": None}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection):
        redisqueue._connect().set("key", "value")
    assert redis_server.client(db=1).get("key") == b"value"


@pytest.mark.parametrize("connection", [{}, {"db": 1}, {"location": ""}, {"location": None}])
def test_a_missing_location_is_improperly_configured_when_a_connection_is_asked_for(connection):
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection):
        assert_improperly_configured(connection)


@pytest.mark.parametrize("location", ["localhost", "localhost:", "localhost:port", "localhost:6379:1", "a:b:c"])
def test_a_malformed_location_is_improperly_configured_when_a_connection_is_asked_for(location):
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": location}):
        assert_improperly_configured({"location": location})


def test_missing_settings_are_improperly_configured_when_a_connection_is_asked_for():
    with override_settings():
        del settings.REDIS_SSEQUEUE_CONNECTION_SETTINGS
        assert_improperly_configured({})


def assert_improperly_configured(connection):
    with pytest.raises(ImproperlyConfigured, match="location"):
        ConnectionPoolManager.connection_pool(**connection)
    with pytest.raises(ImproperlyConfigured, match="location"):
        redisqueue._connect()
    with pytest.raises(ImproperlyConfigured, match="location"):
        send_event("e", "1")
    with pytest.raises(ImproperlyConfigured, match="location"):
        b"".join(views.Queue.as_view()(RequestFactory().get("/")))


# --- send_event() ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ("news", "hello"),
        ("news", json.dumps({"a": [1, "é"]})),
        ("été", "\u2013 \u2028 \U0001f600 \x00 \x85"),
        ("", "plain"),
        ("news", ""),
        ("news", "one\r\ntwo\n"),
        ("news", ["one", "two"]),
        ("a:b", ' "quoted" \\ '),
    ],
)
def test_the_payload_is_the_ascii_json_of_the_pair(event, data, subscriber):
    assert send_event(event, data) is None
    assert subscriber.payload() == json.dumps([event, data]).encode("ascii")


def test_bytes_are_published_as_text(subscriber):
    send_event(b"news", "caffè".encode())
    assert subscriber.payload() == json.dumps(["news", "caffè"]).encode("ascii")


def test_a_number_as_a_name_reaches_an_old_subscriber_as_its_digits(subscriber):
    send_event(5, "one")
    event, data = subscriber.pair()
    assert (str(event), data) == ("5", "one")


@pytest.mark.parametrize("data", [{"a": 1}, 5, 1.5, True, None])
def test_other_data_reaches_an_old_subscriber_as_json_text(data, subscriber):
    send_event("e", data)
    _, text = subscriber.pair()
    assert isinstance(text, str)
    assert json.loads(text) == data


@pytest.mark.parametrize("call", [lambda: send_event("e", "1", "room"), lambda: send_event("e", "1", channel="room")])
def test_the_channel_is_given_by_place_or_by_name(call, redis_server, redis_settings):
    with OldSubscriber(redis_server.client(socket_timeout=10), "room") as subscriber:
        call()
        assert subscriber.pair() == ("e", "1")


def test_all_arguments_may_be_given_by_name(subscriber):
    send_event(data="1", event_name="e")
    assert subscriber.pair() == ("e", "1")


def test_patching_connect_in_the_module_takes_effect_even_without_settings():
    with override_settings(), mock.patch("django_sse.redisqueue._connect") as connect:
        del settings.REDIS_SSEQUEUE_CONNECTION_SETTINGS
        assert send_event("e", "1", "room") is None
    connect.assert_called_once_with()
    (channel, payload), options = connect.return_value.publish.call_args
    assert (channel, options) == ("room", {})
    assert payload in ('["e", "1"]', b'["e", "1"]')


@pytest.mark.parametrize("data", [object(), ["good", object()], {"a": object()}, b"\xff", "\ud800", ["a", 5]])
def test_data_that_cannot_be_sent_is_refused_and_nothing_is_published(data, subscriber):
    with pytest.raises((TypeError, ValueError)):
        send_event("e", data)
    send_event("after", "1")
    assert subscriber.pair() == ("after", "1")


def test_unserialisable_data_is_a_type_error(redis_settings):
    with pytest.raises(TypeError):
        send_event("e", object())


@pytest.mark.parametrize("event", ["a\nb", "a\rdata: forged", b"a\nb"])
def test_a_line_end_in_an_event_name_is_refused_and_nothing_is_published(event, subscriber):
    with pytest.raises(ValueError, match="event.name"):
        send_event(event, "1")
    send_event("after", "1")
    assert subscriber.pair() == ("after", "1")


def test_send_event_works_from_a_thread(subscriber):
    thread = threading.Thread(target=send_event, args=("e", "1"))
    thread.start()
    assert subscriber.pair() == ("e", "1")
    thread.join()


def test_send_event_works_from_a_view(subscriber):
    assert Client().post("/compat/notify", {"event": "e", "data": "1"}).content == b"sent"
    assert subscriber.pair() == ("e", "1")


# --- Redis is down --------------------------------------------------------------------------------------------------


def test_send_event_raises_the_connection_error_of_redis(down):
    with pytest.raises(redis.exceptions.ConnectionError):
        send_event("e", "1")


def test_a_view_that_sends_is_a_500(down):
    response = Client(raise_request_exception=False).post("/compat/notify", {"event": "e", "data": "1"})
    assert response.status_code == 500


def test_the_idiom_that_ignores_the_outage_goes_on(down):
    assert Client().post("/compat/notify-if-possible").content == b"saved"


def test_a_patched_connection_error_passes_through():
    with mock.patch("django_sse.redisqueue._connect") as connect:
        connect.return_value.publish.side_effect = redis.exceptions.ConnectionError("patched")
        with pytest.raises(redis.exceptions.ConnectionError):
            send_event("e", "1")


def test_the_stock_view_answers_with_retry_and_the_end(down):
    response = views.Queue.as_view()(RequestFactory().get("/"))
    assert response.status_code == 200
    assert b"".join(response) == b"retry: 2000\n\n"
    response.close()


@pytest.mark.parametrize("view", [views.SurvivesOutage, views.QueueTellsOutage])
def test_programs_catch_the_outage_in_their_own_loop(view, down):
    with Reading(view.as_view()(RequestFactory().get("/"), channel="room")) as reading:
        assert received(reading) == [("outage", "redis is away")]


def test_programs_call_the_parents_iterator_again_until_redis_is_back(redis_server, redis_settings):
    redis_server.stop()
    with Reading(views.TriesAgain.as_view()(RequestFactory().get("/"), channel="again")) as reading:
        assert received(reading) == [("outage", "redis is away")]
        redis_server.start()
        client = redis_server.client()
        until(lambda: client.publish("again", '["e", "1"]') and b"event: e\n" in reading.body, what="the message")
        reading.response.close()


def test_the_parents_iterator_raises_the_outage_at_its_first_step(down):
    view = views.Queue()
    view.dispatch(RequestFactory().get("/")).close()
    steps = iter(RedisQueueView.iterator(view))
    with pytest.raises(redis.exceptions.ConnectionError):
        next(steps)


# --- the view -------------------------------------------------------------------------------------------------------


def test_an_old_publisher_reaches_a_new_view(redis_server, redis_settings, short_heartbeat):
    client = redis_server.client()
    with listen() as reading:
        client.publish("sse", '["event","data"]')
        client.publish("sse", '["", "plain"]')
        client.publish("sse", '[5, "number"]')
        client.publish("sse", '["list", ["one", "two"]]')
        client.publish("sse", ' [\n"\\u00e9", "caff\\u00e8 é"] '.encode())
        assert received(reading, 5) == [
            ("event", "data"),
            ("message", "plain"),
            ("5", "number"),
            ("list", "one\ntwo"),
            ("é", "caffè é"),
        ]


def test_send_event_reaches_a_new_view_and_an_old_subscriber_alike(subscriber, short_heartbeat):
    with listen() as reading:
        for n in range(3):
            send_event("e", str(n))
            assert subscriber.pair() == ("e", str(n))
            assert received(reading) == [("e", str(n))]


def test_the_body_is_the_bytes_of_the_original(redis_server, redis_settings, short_heartbeat):
    with listen() as reading:
        send_event("news", "hello\nworld")
        reading.wait_for(b"retry: 2000\n\nevent: news\ndata: hello\ndata: world\n\n")


def test_a_third_item_is_the_id(redis_server, redis_settings, short_heartbeat):
    client = redis_server.client()
    with listen() as reading:
        client.publish("sse", '["news", "one", "41"]')
        client.publish("sse", '["news", "two"]')
        client.publish("sse", '["news", "three", "42"]')
        messages = [reading.next_message() for _ in range(3)]
    assert [(message.data, message.last_event_id) for message in messages] == [
        ("one", "41"),
        ("two", "41"),
        ("three", "42"),
    ]


@pytest.mark.parametrize(
    "payload",
    [
        b"not json",
        b"\xff\xfe",
        b"",
        b"[]",
        b'["one"]',
        b'"ab"',
        b'{"a": 1, "b": 2}',
        b"null",
        b'[["name"], "data"]',
        b'[{"a": 1}, "data"]',
        b'["e", ["good", 5]]',
        b'["e", "\\ud800"]',
        b'["e\\ndata: forged", "data"]',
        b'["e", "data", "1\\n2"]',
        b'["e", "data", "1\\u00002"]',
        b'["e", "data", "1", "more"]',
        b"[" * 100_000,
    ],
    ids=lambda payload: payload[:30].decode("latin-1"),
)
def test_a_malformed_payload_is_logged_and_skipped(payload, redis_server, redis_settings, short_heartbeat, caplog):
    client = redis_server.client()
    with caplog.at_level(logging.WARNING, "django_sse"), listen(views.Room, channel="bad-room") as reading:
        client.publish("bad-room", payload)
        client.publish("bad-room", '["good", "1"]')
        assert received(reading) == [("good", "1")]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("django_sse")]
    assert any("bad-room" in line for line in lines)


@pytest.mark.parametrize("data", [{"a": 1}, 5, True, None])
def test_other_data_in_a_payload_arrives_as_json_text(data, redis_server, redis_settings, short_heartbeat):
    client = redis_server.client()
    with listen() as reading:
        client.publish("sse", json.dumps(["e", data]))
        assert json.loads(reading.next_message().data) == data


def test_empty_data_is_a_message(redis_server, redis_settings, short_heartbeat):
    with listen() as reading:
        send_event("e", "")
        assert received(reading) == [("e", "")]


@pytest.mark.parametrize("character", "\v\f\x1c\x1d\x1e\x85\u2028\u2029", ids=lambda c: f"U+{ord(c):04X}")
def test_only_cr_and_lf_cut_the_data(character, redis_server, redis_settings, short_heartbeat):
    with listen() as reading:
        send_event("e", f"one{character}two{character}")
        assert received(reading) == [("e", f"one{character}two{character}")]


def test_the_channel_is_asked_for_when_a_client_connects(redis_server, redis_settings, short_heartbeat):
    with listen(views.Room, channel="one") as one, listen(views.Room, channel="two") as two:
        send_event("e", "for one", "one")
        send_event("e", "for two", channel="two")
        assert received(one) == [("e", "for one")]
        assert received(two) == [("e", "for two")]


def test_the_next_client_of_a_channel_is_subscribed_as_soon_as_the_last_has_left(redis_server, redis_settings):
    client = redis_server.client()
    for n in range(50):
        response = views.Room.as_view()(RequestFactory().get("/"), channel="reloaded")
        chunks = iter(response)
        assert next(chunks) == b"retry: 2000\n\n"
        client.publish("reloaded", f'["e", "{n}"]')
        assert next(chunks) == b"event: e\ndata: %d\n\n" % n
        response.close()


def test_a_killed_connection_is_opened_again_and_the_client_kept(redis_server, redis_settings, short_heartbeat):
    client = redis_server.client()
    with listen(views.Room, channel="killed") as reading:
        client.client_kill_filter(_type="pubsub")
        until(lambda: client.publish("killed", '["e", "1"]'), what="a new subscription")
        assert received(reading) == [("e", "1")]


def test_as_view_takes_the_channel(redis_server, redis_settings, short_heartbeat):
    with listen(views.Queue.as_view(redis_channel="foo")) as reading:
        send_event("e", "1", "foo")
        assert received(reading) == [("e", "1")]


def test_a_class_attribute_is_the_channel(redis_server, redis_settings, short_heartbeat):
    with listen(views.Board.Events) as reading:
        send_event("e", "1", "compat-nested")
        assert received(reading) == [("e", "1")]


def test_the_channel_may_be_assigned_to_the_class_while_the_program_runs(redis_server, redis_settings, short_heartbeat):
    class Assigned(RedisQueueView):
        pass

    for channel in ("first", "second"):
        Assigned.redis_channel = channel
        assert Assigned().get_redis_channel() == channel
        with listen(Assigned) as reading:
            send_event("e", channel, channel)
            assert received(reading) == [("e", channel)]


def test_the_channel_may_be_assigned_to_the_instance():
    view = RedisQueueView()
    view.redis_channel = "mine"
    assert view.get_redis_channel() == "mine"


def test_several_channels_may_be_named(redis_server, redis_settings, short_heartbeat):
    with listen(views.SeveralRooms, channel="hall") as reading:
        send_event("e", "1", "hall-left")
        assert received(reading) == [("e", "1")]
        send_event("e", "2", "hall-right")
        assert received(reading) == [("e", "2")]


def test_patching_connect_in_the_module_takes_effect_for_the_view(redis_server, short_heartbeat):
    elsewhere = override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{free_port()}"})
    with elsewhere, mock.patch("django_sse.redisqueue._connect", redis_server.client), listen() as reading:
        redis_server.client().publish("sse", '["e", "1"]')
        assert received(reading) == [("e", "1")]


def test_a_view_answers_at_once_with_a_mock_for_a_connection(redis_settings):
    with mock.patch("django_sse.redisqueue._connect"):
        started = time.monotonic()
        assert b"".join(views.Queue.as_view()(RequestFactory().get("/"))) == b"retry: 2000\n\n"
        assert time.monotonic() - started < 2  # seconds; what waits for a confirmation waits for five


def test_patching_connection_kwargs_takes_effect_for_the_view(redis_server, short_heartbeat):
    elsewhere = override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{free_port()}"})
    patched = mock.patch("django_sse.redisqueue.CONNECTION_KWARGS", {"location": redis_server.location})
    with elsewhere, patched, listen() as reading:
        send_event("e", "1")
        assert received(reading) == [("e", "1")]


def test_the_parents_iterator_fills_sse_of_a_bare_instance(redis_server, redis_settings, short_heartbeat):
    """As unit tests of programs do: no setup(), no dispatch(), a step of iterator() and a look at the buffer."""
    view = views.Queue()
    view.sse = sse.Sse()
    steps = view.iterator()
    step = threading.Thread(target=next, args=(steps,), daemon=True)
    step.start()
    client = redis_server.client()
    until(lambda: client.publish("sse", '["e", "1"]') and not step.is_alive(), what="a step of iterator()")
    assert str(view.sse).startswith("retry: 2000\n\nevent: e\ndata: 1\n\n")
    steps.close()


def test_a_wholesale_dispatch_streams_the_queue(redis_server, redis_settings, short_heartbeat):
    with listen(views.WholesaleRoom, channel="whole") as reading:
        send_event("e", "1", "whole")
        assert received(reading) == [("e", "1")]


def test_a_quiet_stream_writes_heartbeats_so_that_a_client_that_has_left_is_noticed(redis_settings, short_heartbeat):
    for view in (views.Room, views.WholesaleRoom):
        with listen(view, channel="quiet") as reading:
            reading.wait_for(lambda reading: len(reading.comments) >= 2)
            assert reading.messages == []
