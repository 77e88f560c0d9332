"""
Every shape in which programs in the wild use the package, run on a real WSGI and a real ASGI server.

One server of each kind serves the whole module, one process each, so the channels and the names in the URLs carry the
name of the server: what a client of one test leaves behind is never another test's business.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from django.test import override_settings

from django_sse.redisqueue import send_event
from tests.compat.old import OldSubscriber
from tests.compat.views import PREAMBLE
from tests.helpers import servers
from tests.helpers.client import StreamClient, request
from tests.helpers.process import free_port
from tests.helpers.servers import ROOT
from tests.helpers.wait import until

pytestmark = pytest.mark.server

KINDS = ("gunicorn-gthread", "uvicorn")

RETRY = b"retry: 2000\n\n"
FINITE_BODY = RETRY + (
    b"id: 7\n\n"
    b"event: one\ndata: first\ndata: line\n\n"
    b"event: \ndata: plain\ndata: bytes\n\n"
    b"event: named\ndata: keyword\n\n"
    b"id\n\n"
    b"event: three\ndata: \xc3\xa9\n\n"
)
FINITE = [("one", "first\nline", "7"), ("message", "plain\nbytes", "7"), ("named", "keyword", "7"), ("three", "é", "")]
ITEMS = [("item", "0", ""), ("item", "1", ""), ("item", "2", "")]
WORDS = [("word", "hello", ""), ("word", "world", "")]

# path -> the messages of the whole stream, as (event, data, last event id)
WHOLE_STREAMS = {
    "finite": FINITE,
    "slow": [("slow", "1", ""), ("slow", "2", ""), ("slow", "3", "")],
    "one-message": [("status", "ready", "")],
    "returns-list": ITEMS,
    "returns-generator-expression": ITEMS,
    "yields-values": [("item", "1", ""), ("item", "2", "")],
    "empty-generator": [],
    "empty-list": [],
    "reads-request/hall?word=a&word=b": [("hall", "GET a AnonymousUser", ""), ("hall", "GET b AnonymousUser", "")],
    "instance-state": [("count", "1", ""), ("count", "2", ""), ("count", "3", "")],
    "sets-attributes/hall": [("welcome", "hall", ""), ("room", "hall", "")],
    "exempt-override": FINITE,
    "exempt-class": FINITE,
    "checked-override": FINITE,
    "own-init": WORDS,
    "own-init-alone": WORDS,
    "wholesale-finite": FINITE,
    "wholesale-list": ITEMS,
    "wholesale-no-retry": FINITE,
    "finite-preamble": FINITE,
    "one-shot": [("once", "text", "")],
}

# path -> (event, data) of the first messages of a stream that never ends
ENDLESS_STREAMS = {
    "clock": [("time", "1"), ("time", "2"), ("time", "3")],
    "sleeps-first": [("time", "1"), ("time", "2"), ("time", "3")],
    "polls": [("news", "1"), ("news", "2"), ("news", "3")],
    "own-heartbeat": [("heartbeat", "")] * 3,
    "helper-thread": [("filled", "1"), ("filled", "2"), ("filled", "3")],
    "mixed": [("time", "1"), ("time", "2"), ("time", "3")],
    "wholesale-clock": [("time", "1"), ("time", "2"), ("time", "3")],
    "wholesale-preamble": [("time", "1"), ("time", "2"), ("time", "3")],
    "preamble": [("time", "1"), ("time", "2"), ("time", "3")],
    "joins-per-flush": [("time", "1"), ("time", "2"), ("time", "3")],
    "edits-chunks": [("hour", "1"), ("hour", "2"), ("hour", "3")],
    "chained": [("time", "1"), ("time", "2"), ("time", "3")],
    "refills": [("line", "1"), ("line", "2"), ("line", "3")],
}

# path -> its channel; the first byte says that the stream is subscribed
STOCK_QUEUES = {
    "stock": "sse",
    "queue": "sse",
    "queue-as-view": "compat-as-view",
    "nested": "compat-nested",
    "room/{name}": "{name}",
    "several-rooms/{name}": "{name}-right",
    "guarded-room/{name}": "{name}",
    "wholesale-room/{name}": "{name}",
    "returns-parent/{name}": "{name}",
    "queue-chained/{name}": "{name}",
}

# Views that take a channel of any name from the URL, whose own code comes first: they are subscribed a little later
OWN_LOOPS = (
    *("greets", "loops-over-parent", "filters-parent", "queue-preamble", "queue-edits-chunks", "survives-outage"),
    *("queue-tells-outage", "own-pubsub"),
)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A migrated database for the servers."""
    path = str(tmp_path_factory.mktemp("compat") / "database.sqlite3")
    run_python("-m", "django", "migrate", "--verbosity=0", TEST_DATABASE=path)
    return path


def run_python(*arguments, **environment):
    """Run a program of its own in the test project and return what it wrote to standard output."""
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module", params=KINDS)
def server(request, redis_server, database):
    """A server with Redis and a database."""
    environment = {"TEST_REDIS_LOCATION": redis_server.location, "TEST_DATABASE": database}
    with servers.serve(request.param, env=environment) as server:
        yield server


@pytest.fixture(scope="module", params=KINDS)
def server_without_redis(request):
    """A server whose settings name a Redis that is not there."""
    with servers.serve(request.param, env={"TEST_REDIS_LOCATION": f"127.0.0.1:{free_port()}"}) as server:
        yield server


@contextmanager
def open_stream(server, path, **options):
    """Connect and see the stream accepted."""
    with StreamClient(f"{server.url}/compat/{path}", **options) as client:
        assert client.status == 200
        yield client


def next_pair(client):
    message = client.next_message()
    return message.event, message.data


def data_of(client, event):
    return [message.data for message in client.messages if message.event == event]


def prime(client, channel, publish, *more):
    """Publish until the client gets it: its own code subscribes some time after the answer has begun."""
    until(lambda: publish(channel, "prime", "x", *more) and b"event: prime" in client.body, what="a first message")


def triples(client):
    return [(message.event, message.data, message.last_event_id) for message in client.messages]


def chunks_of(client, count):
    """In how many HTTP chunks the first messages came: a stream that is consumed whole has one."""
    return len({stamp for stamp, _ in client.arrivals[:count]})


@pytest.fixture
def channel(request, server):
    """A channel that only this test on this server uses."""
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name) + f"-{server.pid}"


@pytest.fixture
def publish(redis_server):
    """What a program in another language does: PUBLISH of the JSON text of a pair."""
    client = redis_server.client()
    return lambda channel, *payload: client.publish(channel, json.dumps(payload))


@pytest.fixture
def subscribed(redis_server):
    """Wait until somebody listens to a channel."""
    client = redis_server.client()
    return lambda channel: until(lambda: client.pubsub_numsub(channel)[0][1], what=f"a subscriber of {channel}")


@pytest.fixture
def cookie(server):
    """The session cookie of a user named after the server."""
    _, headers, body = request("GET", f"{server.url}/compat/login/anna-{server.port}")
    assert body.decode() == f"anna-{server.port}"
    return {"Cookie": headers["set-cookie"].split(";")[0]}


# --- whole streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WHOLE_STREAMS)
def test_a_finite_stream_arrives_whole_and_ends(server, path):
    with open_stream(server, path) as client:
        client.wait_closed()
        assert client.ended
        assert triples(client) == WHOLE_STREAMS[path]
        assert client.headers["content-type"] == "text/event-stream"


def test_the_bytes_are_those_of_the_original(server):
    with open_stream(server, "finite") as client:
        client.wait_closed()
        assert client.body == FINITE_BODY
        assert "no-cache" in client.headers["cache-control"]
        assert client.headers["software"] == "django-sse"
        assert client.headers["x-accel-buffering"] == "no"


def test_an_overridden_iterator_is_the_body_byte_by_byte_behind_the_retry(server):
    with open_stream(server, "finite-preamble") as client:
        client.wait_closed()
        assert client.body == RETRY + PREAMBLE.encode() + FINITE_BODY.removeprefix(RETRY)


def test_the_retry_of_the_program_is_the_only_one(server):
    with open_stream(server, "wholesale-no-retry") as client:
        client.wait_closed()
        assert client.body == FINITE_BODY.replace(b"2000", b"0")


def test_a_browser_that_polls_gets_the_retry_of_the_program(server):
    with open_stream(server, "one-message") as client:
        client.wait_closed()
        assert client.body == b"retry: 2000\n\nretry: 100\n\nevent: status\ndata: ready\n\n"


def test_a_slow_finite_stream_arrives_step_by_step(server):
    with open_stream(server, "slow") as client:
        client.wait_closed()
        assert chunks_of(client, 3) == 3


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_streams(server, method):
    with open_stream(server, "finite", method=method) as client:
        client.wait_closed()
        assert client.body == FINITE_BODY


@pytest.mark.parametrize("path", ["clock", "queue", "preamble", "wholesale-clock", "wholesale-preamble"])
def test_head_is_the_headers_and_nothing_more(server, path):
    with open_stream(server, path, method="HEAD", headers={"Connection": "close"}) as client:
        client.wait_closed()
        assert client.headers["content-type"] == "text/event-stream"
        assert client.headers["software"] == "django-sse"
        assert client.body + client.excess == b""


@pytest.mark.parametrize("path", ["exempt-override", "exempt-class", "wholesale-finite"])
def test_an_exempt_override_takes_a_post(server, path):
    with open_stream(server, path, method="POST") as client:
        client.wait_closed()
        assert client.body == FINITE_BODY


def test_an_override_without_the_decorator_is_checked_again(server):
    assert request("POST", f"{server.url}/compat/checked-override")[0] == 403


def test_the_last_id_of_the_browser_is_read(server):
    with open_stream(server, "last-id", headers={"Last-Event-ID": "42"}) as client:
        assert next_pair(client) == ("last", "'42'")
    with open_stream(server, "last-id") as client:
        assert next_pair(client) == ("last", "None")


def test_state_on_the_class_outlives_a_request(server):
    visits = []
    for _ in range(2):
        with open_stream(server, "class-state") as client:
            visits.append(int(client.next_message().data))
    assert visits[1] == visits[0] + 1


@pytest.mark.parametrize(("path", "messages"), [("fails", [("item", "1", "")]), ("fails-at-once", [])])
def test_an_error_ends_the_stream_after_what_was_flushed(server, path, messages):
    with open_stream(server, path) as client:
        client.wait_closed()
        assert triples(client) == messages
        assert client.ended
    until(lambda: "a fault of the program" in server.log(), what="the error in the log of the server")


# --- endless streams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ENDLESS_STREAMS)
def test_an_endless_stream_arrives_event_by_event(server, path):
    with open_stream(server, path) as client:
        assert [next_pair(client) for _ in range(3)] == ENDLESS_STREAMS[path]
        assert client.body.count(b"retry:") == 1
        assert not client.ended
        assert chunks_of(client, 3) > 1


@pytest.mark.parametrize("path", ["preamble", "chained"])
def test_a_preamble_comes_before_the_messages(server, path):
    with open_stream(server, path) as client:
        client.wait_for(b"data: 1\n\n")
        assert client.body.startswith(RETRY + PREAMBLE.encode() + b"event: time\ndata: 1\n\n")


def test_a_preamble_in_a_wholesale_dispatch_comes_first(server):
    with open_stream(server, "wholesale-preamble") as client:
        client.wait_for(b"data: 1\n\n")
        assert client.body.startswith(PREAMBLE.encode() + RETRY + b"event: time\ndata: 1\n\n")


def test_a_blocking_read_delivers_each_line_as_it_comes(server):
    with (
        socket.create_server(("127.0.0.1", 0)) as device,
        open_stream(server, f"socket-lines?port={device.getsockname()[1]}") as client,
    ):
        # The answer has begun before the first line is there.
        client.wait_for(RETRY)
        device.settimeout(10)
        line, _ = device.accept()
        with line:
            for n in range(5):
                line.sendall(b"%d\n" % n)
                assert next_pair(client) == ("line", str(n))
        client.wait_closed()
        assert client.ended


@pytest.mark.parametrize("path", ["device", "wholesale-device"])
def test_the_device_is_free_again_when_the_client_has_left(server, path):
    name = f"{path}-{server.port}"
    with open_stream(server, f"{path}/{name}") as client:
        assert next_pair(client) == ("reading", "1")
        assert request("GET", f"{server.url}/compat/device-state/{name}")[2] == b"busy"
    until(lambda: request("GET", f"{server.url}/compat/device-state/{name}")[2] == b"free", what="a free device")


def test_the_orm_works_inside_the_iterator(server):
    prefix = f"orm-{server.port}"
    with open_stream(server, f"queries-database/{prefix}") as client:
        client.wait_closed()
        assert triples(client) == [("user", f"{prefix}-{n}", "") for n in (1, 2, 3)]
        assert client.ended
        assert chunks_of(client, 3) == 3


def test_a_gevent_timeout_bounds_the_loop(serve):
    with serve("gunicorn-gevent") as server, open_stream(server, "gevent-timeout") as client:
        client.wait_closed()
        events = [message.event for message in client.messages]
        assert events[:2] == ["time", "time"]
        assert events[-1] == "over"


# --- users ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["private-room", "members-clock", "members-override", "members-room/any"])
def test_an_anonymous_user_is_sent_to_the_login_page(server, path):
    status, headers, _ = request("GET", f"{server.url}/compat/{path}")
    assert status == 302
    assert headers["location"].startswith("/accounts/login/")


@pytest.mark.parametrize("path", ["members-clock", "members-override"])
def test_login_required_lets_a_user_through_to_an_endless_stream(server, path, cookie):
    with open_stream(server, path, headers=cookie) as client:
        assert [next_pair(client) for _ in range(2)] == [("time", "1"), ("time", "2")]


def test_login_required_lets_a_user_through_to_a_queue(server, cookie, channel, publish):
    with open_stream(server, f"members-room/{channel}", headers=cookie) as client:
        client.wait_for(RETRY)
        publish(channel, "e", "1")
        assert next_pair(client) == ("e", "1")


def test_the_channel_may_come_from_the_user(server, cookie, publish):
    with open_stream(server, "private-room", headers=cookie) as client:
        client.wait_for(RETRY)
        publish("compat-user-somebody", "e", "not mine")
        publish(f"compat-user-anna-{server.port}", "e", "mine")
        assert next_pair(client) == ("e", "mine")


def test_the_iterator_reads_the_user(server, cookie):
    with open_stream(server, "reads-request/hall?word=a", headers=cookie) as client:
        assert next_pair(client) == ("hall", f"GET a anna-{server.port}")


def test_a_check_in_dispatch_answers_403(server):
    status, _, body = request("GET", f"{server.url}/compat/guarded-room/the-secret")
    assert (status, body) == (403, b"not for you")


# --- queues ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STOCK_QUEUES)
def test_an_old_publisher_reaches_a_queue_as_soon_as_its_answer_has_begun(server, path, channel, publish):
    with open_stream(server, path.format(name=channel)) as client:
        client.wait_for(RETRY)
        for n in range(3):
            publish(STOCK_QUEUES[path].format(name=channel), "news", f"{n}\nline")
            assert next_pair(client) == ("news", f"{n}\nline")
        assert not client.ended


@pytest.mark.parametrize("path", OWN_LOOPS)
def test_a_loop_of_the_program_around_the_queue_delivers_event_by_event(server, path, channel, publish):
    with open_stream(server, f"{path}/{channel}") as client:
        # The answer has begun before there is any message.
        client.wait_for(RETRY)
        prime(client, channel, publish)
        for n in range(3):
            publish(channel, "news", str(n))
            client.wait_for(b"event: news\ndata: %d\n\n" % n)
        assert data_of(client, "news") == ["0", "1", "2"]
        assert not client.ended


@pytest.mark.parametrize(
    ("path", "count"),
    [("own-pubsub", 2000), ("loops-over-parent", 200)],  # events: a pub/sub of its own has no bound, a mailbox has 256
)
def test_a_burst_reaches_a_loop_of_the_program_whole(server, path, count, channel, redis_server, publish):
    with open_stream(server, f"{path}/{channel}") as client:
        prime(client, channel, publish)
        with redis_server.client().pipeline(transaction=False) as pipeline:
            for n in range(count):
                pipeline.publish(channel, json.dumps(["news", str(n)]))
            pipeline.execute()
        client.wait_for(b"event: news\ndata: %d\n\n" % (count - 1))
        assert data_of(client, "news") == [str(n) for n in range(count)]


def test_a_loop_over_the_parents_iterator_steps_once_per_message(server, channel, publish, subscribed):
    with (
        open_stream(server, f"loops-over-parent/{channel}") as client,
        open_stream(server, f"lively-room/{channel}-silent") as clock,
    ):
        subscribed(channel)
        publish(channel, "news", "1")
        assert [next_pair(client) for _ in range(2)] == [("news", "1"), ("count", "1")]
        # Silence, long enough for heartbeats, is no step; and messages that come together are one step each.
        clock.wait_for(lambda clock: len(clock.parser.comments) >= 2)
        for n in range(2, 7):
            publish(channel, "news", str(n))
        client.wait_for(b"event: count\ndata: 6\n\n")
        pairs = [(message.event, message.data) for message in client.messages]
        assert pairs == [(event, str(n)) for n in range(1, 7) for event in ("news", "count")]


def test_a_loop_over_the_parents_iterator_may_throw_messages_away(server, channel, publish, subscribed):
    with open_stream(server, f"filters-parent/{channel}") as client:
        subscribed(channel)
        for text in ("1", "the secret", "2"):
            publish(channel, "news", text)
        assert [next_pair(client) for _ in range(2)] == [("news", "1"), ("news", "2")]


def test_the_parents_iterator_may_be_called_twice(server, channel, publish):
    with open_stream(server, f"iterates-twice/{channel}") as client:
        client.wait_for(RETRY)
        publish(channel, "news", "1")
        assert [next_pair(client) for _ in range(2)] == [("news", "1"), ("first", "over")]
        prime(client, channel, publish)
        publish(channel, "news", "2")
        client.wait_for(b"event: news\ndata: 2\n\n")


# A pub/sub of the program's own is not ours to close: with redis-py 5 it goes when Python collects it.
@pytest.mark.parametrize(
    "path",
    ["room", "lively-room", "wholesale-room", "iterates-twice", *(path for path in OWN_LOOPS if path != "own-pubsub")],
)
def test_a_client_that_has_left_is_noticed(server, path, channel, publish, redis_server):
    client = redis_server.client()
    with open_stream(server, f"{path}/{channel}") as stream:
        prime(stream, channel, publish)
    if path == "lively-room" or server.name in servers.ASGI_SERVERS:
        # A heartbeat shows it, and an event loop is told it: the channel may stay quiet.
        until(lambda: client.pubsub_numsub(channel)[0][1] == 0, what="nobody listening")
    else:
        # The next message shows it.
        until(lambda: publish(channel, "nudge", "x") == 0, what="nobody listening")


def test_a_greeting_comes_before_the_queue(server, channel, publish, subscribed):
    with open_stream(server, f"greets/{channel}") as client:
        assert next_pair(client) == ("welcome", "hello")
        subscribed(channel)
        publish(channel, "news", "1")
        assert next_pair(client) == ("news", "1")


def test_the_text_of_the_queue_may_be_edited_chunk_by_chunk(server, channel, publish, subscribed):
    with open_stream(server, f"queue-edits-chunks/{channel}") as client:
        subscribed(channel)
        publish(channel, "news", "the secret")
        assert next_pair(client) == ("news", "the ******")


def test_a_preamble_comes_before_the_queue(server, channel, publish, subscribed):
    for path in ("queue-preamble", "queue-chained"):
        with open_stream(server, f"{path}/{channel}-{path}") as client:
            subscribed(f"{channel}-{path}")
            publish(f"{channel}-{path}", "news", "1")
            assert next_pair(client) == ("news", "1")
            assert client.body.startswith(RETRY + PREAMBLE.encode())


def test_a_queue_may_listen_to_several_channels(server, channel, publish):
    with open_stream(server, f"several-rooms/{channel}") as client:
        client.wait_for(RETRY)
        for n, side in enumerate(("left", "right", "left")):
            publish(f"{channel}-{side}", side, str(n))
            assert next_pair(client) == (side, str(n))


def test_the_channel_may_be_assigned_to_the_class_while_the_server_runs(server, channel, publish):
    for name in (f"{channel}-first", f"{channel}-second"):
        assert request("GET", f"{server.url}/compat/reassign/{name}")[0] == 200
        with open_stream(server, "reassigned") as client:
            client.wait_for(RETRY)
            publish(name, "news", name)
            assert next_pair(client) == ("news", name)


def test_two_clients_of_a_channel_get_the_same_and_a_third_of_another_does_not(server, channel, publish):
    with (
        open_stream(server, f"room/{channel}") as one,
        open_stream(server, f"room/{channel}") as two,
        open_stream(server, f"room/{channel}-other") as other,
    ):
        for client in (one, two, other):
            client.wait_for(RETRY)
        publish(channel, "news", "1")
        publish(f"{channel}-other", "news", "2")
        assert next_pair(one) == next_pair(two) == ("news", "1")
        assert next_pair(other) == ("news", "2")


def test_a_third_item_of_text_is_the_id(server, channel, publish):
    with open_stream(server, f"room/{channel}") as client:
        client.wait_for(RETRY)
        publish(channel, "news", "1", "41")
        publish(channel, "news", "2")
        assert [(client.next_message().data, client.parser.last_event_id) for _ in range(2)] == [
            ("1", "41"),
            ("2", "41"),
        ]


def test_a_malformed_payload_is_skipped(server, channel, publish, redis_server):
    with open_stream(server, f"room/{channel}") as client:
        client.wait_for(RETRY)
        redis_server.client().publish(channel, "not json")
        publish(channel, "news", "1")
        assert next_pair(client) == ("news", "1")
    until(lambda: channel in server.log(), what="the channel in the log of the server")


def test_a_program_may_replay_from_its_own_list_and_then_follow(server, channel, publish, redis_server):
    redis_server.client().rpush(f"history:{channel}", "one", "two", "three")
    with open_stream(server, f"catches-up/{channel}", headers={"Last-Event-ID": "1"}) as client:
        assert [next_pair(client) for _ in range(2)] == [("news", "two"), ("news", "three")]
        prime(client, channel, publish, "0")
        publish(channel, "news", "four", "4")
        client.wait_for(b"data: four\n\n")
        ids = [message.last_event_id for message in client.messages if message.event == "news"]
        assert ids == ["2", "3", "4"]


# --- Redis is down --------------------------------------------------------------------------------------------------


def test_the_stock_view_answers_and_ends_while_redis_is_down(server_without_redis):
    with open_stream(server_without_redis, "queue") as client:
        client.wait_closed()
        assert client.ended
        assert client.body == RETRY


@pytest.mark.parametrize("path", ["survives-outage/room", "queue-tells-outage/room"])
def test_programs_catch_the_outage_and_tell_the_client(server_without_redis, path):
    with open_stream(server_without_redis, path) as client:
        assert next_pair(client) == ("outage", "redis is away")
        client.wait_closed()
        assert client.ended


def test_a_view_that_sends_while_redis_is_down_is_a_500_or_goes_on(server_without_redis):
    url = f"{server_without_redis.url}/compat"
    assert request("POST", f"{url}/notify", data={"event": "e", "data": "1"}, timeout=30)[0] == 500
    assert request("POST", f"{url}/notify-if-possible", timeout=30)[2] == b"saved"


# --- send_event() from everywhere -----------------------------------------------------------------------------------

SCRIPT = """
import sys
import django
django.setup()
from django_sse.redisqueue import send_event
send_event("news", "from a script", sys.argv[1])
"""

SPAWNED_WORKER = """
import multiprocessing
import sys
from tests.compat.worker import work

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    tasks = context.JoinableQueue()
    worker = context.Process(target=work, args=(tasks,))
    worker.start()
    for task in (("news", "first task", sys.argv[1]), ("news", "second task", sys.argv[1]), None):
        tasks.put(task)
    worker.join(30)
    sys.exit(worker.exitcode)
"""

PREFORKED_WORKER = """
import os
import sys
import django
django.setup()
from django_sse.redisqueue import send_event
send_event("news", "from the parent", sys.argv[1])
worker = os.fork()
if not worker:
    send_event("news", "from the child", sys.argv[1])
    os._exit(0)
assert os.waitpid(worker, 0)[1] == 0
send_event("news", "from the parent again", sys.argv[1])
"""


@pytest.mark.parametrize(
    ("program", "texts"),
    [
        (SCRIPT, ["from a script"]),
        (SPAWNED_WORKER, ["first task", "second task"]),
        (PREFORKED_WORKER, ["from the parent", "from the child", "from the parent again"]),
    ],
    ids=["script", "spawned-worker", "preforked-worker"],
)
def test_send_event_from_another_process_reaches_the_browser(server, channel, redis_server, tmp_path, program, texts):
    file = tmp_path / "program.py"
    file.write_text(program)
    with open_stream(server, f"room/{channel}") as client:
        client.wait_for(RETRY)
        run_python(str(file), channel, TEST_REDIS_LOCATION=redis_server.location)
        assert [next_pair(client) for _ in texts] == [("news", text) for text in texts]


def test_send_event_from_a_view_reaches_the_browser(server, channel):
    with open_stream(server, f"room/{channel}") as client, open_stream(server, "queue") as default:
        client.wait_for(RETRY)
        default.wait_for(b"retry: 2000\n\n")
        form = {"event": "news", "data": "é\n\u2028", "channel": channel}
        assert request("POST", f"{server.url}/compat/notify", data=form)[2] == b"sent"
        assert next_pair(client) == ("news", "é\n\u2028")
        assert request("POST", f"{server.url}/compat/notify", data={"event": "", "data": "x"})[2] == b"sent"
        assert next_pair(default) == ("message", "x")


def test_send_event_from_this_process_reaches_the_browser_and_an_old_subscriber(server, channel, redis_server):
    old_subscriber = OldSubscriber(redis_server.client(socket_timeout=10), channel)
    with old_subscriber, open_stream(server, f"room/{channel}") as client:
        client.wait_for(RETRY)
        with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": redis_server.location}):
            send_event("news", ["one", "two"], channel)
        assert next_pair(client) == ("news", "one\ntwo")
        assert old_subscriber.payload() == b'["news", ["one", "two"]]'
