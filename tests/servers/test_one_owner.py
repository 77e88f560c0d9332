"""
Promise O, one owner: one pub/sub connection per process, whoever listens to what, and it survives its Redis.

The Redis of this module is its own, because the tests count its connections and take it away.
"""

import json
import multiprocessing
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.helpers.eventsource import Message
from tests.helpers.redis import RedisServer
from tests.helpers.servers import ROOT, SERVERS, serve
from tests.helpers.wait import until
from tests.servers import publish
from tests.servers.driver import Driver

pytestmark = pytest.mark.server

NEWS = Message("news", "1")


@pytest.fixture(scope="module")
def redis():
    """A private Redis server; `redis.client()` for what a test asks of it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def run(redis):
    """Start a server on that Redis: `run(name, **options of serve)`."""
    if not redis.running:  # a test that failed in the middle of an outage
        redis.start()
    with ExitStack() as stack:

        def driver(name, *, env=None, **options):
            env = {"TEST_REDIS_LOCATION": redis.location, **(env or {})}
            return Driver(stack.enter_context(serve(name, env=env, **options)))

        yield driver


@pytest.fixture
def clients():
    """Open streams that are closed when the test is over: `clients(driver, path)` returns a client with headers."""
    with ExitStack() as stack:

        def client(driver, path):
            stream = stack.enter_context(driver.stream(path, timeout=30))
            assert stream.status == 200
            return stream

        yield client


def subscribers(redis, channel):
    """How many connections are subscribed to `channel`."""
    return redis.client().pubsub_numsub(channel)[0][1]


def pubsub_connections(redis):
    return len(redis.client().client_list(_type="pubsub"))


@pytest.mark.parametrize(("name", "threads"), [("uvicorn", 1), ("gunicorn-gthread", 250)])
def test_200_clients_on_20_channels_share_one_pubsub_connection(run, redis, clients, name, threads):
    driver = run(name, threads=threads, env={"TEST_DJANGO_SSE": json.dumps({"HEARTBEAT": 0.5})})
    channels = [driver.key() for _ in range(20)]
    streams = [(channel, clients(driver, f"queue/{channel}")) for channel in channels for _ in range(10)]
    assert pubsub_connections(redis) == 1
    assert {subscribers(redis, channel) for channel in channels} == {1}

    for channel in channels:
        driver.send(channel, "news", channel)
    for channel, stream in streams:
        assert stream.next_message() == Message("news", channel)
    assert pubsub_connections(redis) == 1

    for _, stream in streams:
        assert len(stream.messages) == 1
        stream.close()
    until(lambda: redis.client().pubsub_channels() == [], what="no channel without a client")
    assert pubsub_connections(redis) <= 1


@pytest.mark.parametrize("name", SERVERS)
def test_a_channel_is_left_with_its_last_client_and_taken_again_with_the_next(run, redis, clients, name):
    driver = run(name, env={"TEST_DJANGO_SSE": json.dumps({"HEARTBEAT": 0.2})})
    channel = driver.key()
    for number in range(3):
        first, second = (clients(driver, f"queue/{channel}") for _ in range(2))
        first.close()
        driver.send(channel, "news", f"{number}")
        assert second.next_message() == Message("news", f"{number}")
        assert subscribers(redis, channel) == 1
        second.close()
        until(lambda: subscribers(redis, channel) == 0, what="the end of the subscription")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-gthread", "gunicorn-gevent"])
def test_streams_outlive_a_redis_that_goes_and_comes_back(run, redis, clients, name, signum):
    driver = run(name)
    channel = driver.key()
    streams = [clients(driver, f"queue/{channel}") for _ in range(50)]
    driver.send(channel, "news", "before")
    for stream in streams:
        stream.wait_for(b"data: before\n\n")

    redis.stop(signum)
    redis.start()
    until(lambda: subscribers(redis, channel) == 1, timeout=30, what="the subscription to come back")
    driver.send(channel, "news", "after")
    driver.send(channel, "news", "last")
    for stream in streams:
        stream.wait_for(b"data: last\n\n")
        assert [message.data for message in stream.messages] == ["before", "after", "last"]
        assert not stream.ended
        assert stream.broken is None
    assert pubsub_connections(redis) == 1


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-gthread", "gunicorn-gevent"])
def test_a_client_that_comes_while_redis_is_away_is_told_to_come_again_and_then_served(run, redis, clients, name):
    driver = run(name)
    channel = driver.key()
    redis.stop()
    refused = clients(driver, f"queue/{channel}")
    refused.wait_closed()
    assert refused.ended
    assert refused.body == b"retry: 2000\n\n"
    assert driver.request("POST", f"servers/send/{channel}", data={"event": "news", "data": "1"})[0] == 500

    redis.start()
    stream = clients(driver, f"queue/{channel}")
    driver.send(channel, "news", "1")
    assert stream.next_message() == NEWS


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-gthread"])
def test_a_malformed_payload_is_logged_with_its_channel_and_skipped(run, redis, clients, name):
    driver = run(name)
    payloads = [
        *(b"no json", b"", b"\xff\xfe", b"null", b"1", b'"ab"', b"[]", b'["news"]', b'{"news": "1", "more": "2"}'),
        *(b'["a\\nb", "1"]', b'["news", ["a", 1]]', b'["news", "\\ud800"]', b'["news", "1", "i\\nd"]', b"[" * 100_000),
    ]
    channels = [driver.key() for _ in payloads]
    for channel, payload in zip(channels, payloads, strict=True):
        stream = clients(driver, f"queue/{channel}")
        assert redis.client().publish(channel, payload) == 1
        driver.send(channel, "news", "1")
        assert stream.next_message() == NEWS
        stream.close()
        lines = [line for line in driver.log().splitlines() if "django_sse:" in line and channel in line]
        assert len(lines) == 1, (payload, driver.log())


@pytest.mark.parametrize("app", ["tests.wsgi:application", "tests.servers.preloaded:application"])
def test_workers_forked_from_a_loaded_application_all_deliver(run, redis, clients, app):
    driver = run("gunicorn-gthread", workers=2, threads=64, app=app, extra=["--preload"])
    channel = driver.key()
    streams = []
    until(
        # A worker that is busy accepting leaves the next connections to the other one, sooner or later.
        lambda: (
            streams.append(clients(driver, f"queue/{channel}"))
            or len({stream.headers["x-pid"] for stream in streams}) == 2
        ),
        what="streams in both workers",
    )
    assert pubsub_connections(redis) == 2
    driver.send(channel, "news", "1")
    for stream in streams:
        assert stream.next_message() == NEWS


def test_an_event_sent_in_one_server_reaches_the_clients_of_another(run, redis, clients):
    drivers = [run("uvicorn"), run("gunicorn-gthread")]
    channel = drivers[0].key()
    streams = [clients(driver, f"queue/{channel}") for driver in drivers]
    for number, driver in enumerate(drivers):
        driver.send(channel, "news", f"{number}")
    for stream in streams:
        stream.wait_for(b"data: 1\n\n")
        assert [message.data for message in stream.messages] == ["0", "1"]


@pytest.fixture
def outside(monkeypatch, redis):
    """The environment in which a project's own processes are started beside its servers."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.settings")
    monkeypatch.setenv("TEST_REDIS_LOCATION", redis.location)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_an_event_sent_by_a_script_reaches_the_clients(run, redis, clients, outside):
    driver = run("uvicorn")
    channel = driver.key()
    stream = clients(driver, f"queue/{channel}")
    subprocess.run([sys.executable, "-m", "tests.servers.publish", channel, "news", "1"], check=True, timeout=30)
    assert stream.next_message() == NEWS


def test_an_event_sent_by_a_worker_process_reaches_the_clients(run, redis, clients, outside):
    driver = run("uvicorn")
    channel = driver.key()
    stream = clients(driver, f"queue/{channel}")
    context = multiprocessing.get_context("spawn")
    jobs = context.Queue()
    worker = context.Process(target=publish.work, args=(jobs,))
    worker.start()
    try:
        jobs.put((channel, "news", "1"))
        assert stream.next_message() == NEWS
    finally:
        jobs.put(None)
        worker.join(10)
        worker.close()
        jobs.close()
        jobs.join_thread()
