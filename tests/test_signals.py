"""The two signals of a stream's life: each exactly once, for every server, and no receiver harms a stream."""

import asyncio
import threading

import pytest
from asgiref.sync import sync_to_async
from django.db import connection
from django.test import RequestFactory
from django.urls import path

from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.registry import StreamInfo
from django_sse.signals import stream_closed, stream_opened
from django_sse.views import BaseSseView
from tests.helpers.asgi import SERVERS, Exchange, application
from tests.helpers.loops import needs_loops, soon
from tests.helpers.middleware import forbidding
from tests.helpers.project import project


class Clock(BaseSseView):
    async def iterator(self):
        while True:
            self.sse.add_message("", "tick")
            yield
            await asyncio.sleep(0.01)


class Short(BaseSseView):
    def iterator(self):
        self.sse.add_message("", "tick")
        yield
        self.sse.add_message("", "tack")
        yield


class Broken(BaseSseView):
    def iterator(self):
        self.sse.add_message("", "tick")
        yield
        raise ZeroDivisionError("the program's")


class News(RedisQueueView):
    redis_channel = "signals"


urlpatterns = [
    path("clock", Clock.as_view()),
    path("short", Short.as_view()),
    path("broken", Broken.as_view()),
    path("news", News.as_view()),
]


@pytest.fixture(autouse=True)
def _project():
    with project(__name__):
        yield


@pytest.fixture
def heard():
    """What the signals have said: (name, sender, details)."""
    heard = []

    def opened(sender, stream, signal):
        heard.append(("opened", sender, {"stream": stream}))

    def closed(sender, signal, **details):
        heard.append(("closed", sender, details))

    stream_opened.connect(opened)
    stream_closed.connect(closed)
    yield heard
    stream_opened.disconnect(opened)
    stream_closed.disconnect(closed)


@pytest.fixture
def connect():
    """Connect receivers while the test runs."""
    connected = []

    def connect(signal, receiver):
        signal.connect(receiver)
        connected.append((signal, receiver))

    yield connect
    for signal, receiver in connected:
        signal.disconnect(receiver)


def get(view, **extra):
    return view.as_view()(RequestFactory().get("/thread", **extra))


# --- what they say ---


def test_a_stream_of_a_thread_is_told_of(heard):
    response = get(Short)
    assert heard == []  # nothing has been asked for yet
    body = b"".join(response)
    response.close()
    [(_, opener, opened), (_, closer, closed)] = heard
    assert opener is closer is Short
    assert opened["stream"] == closed["stream"]
    info = opened["stream"]
    assert isinstance(info, StreamInfo)
    assert (info.view, info.path, info.channels, info.owner) == (Short, "/thread", (), None)
    assert (closed["reason"], closed["events"], closed["bytes"]) == ("finished", 2, len(body))
    assert 0 <= closed["seconds"] < 5


def test_a_stream_that_nobody_reads_is_not_told_of(heard):
    get(Short).close()
    assert heard == []


def test_an_end_is_told_once_however_often_it_is_closed(heard):
    response = get(Short)
    next(iter(response))
    for _ in range(3):
        response.close()
    assert [name for name, *_ in heard] == ["opened", "closed"]
    assert heard[1][2]["reason"] == "client"


def test_the_channels_of_a_queue_are_told(heard):
    response = get(News)
    send_event("", "x", "signals")
    iterator = iter(response)
    next(iterator)
    next(iterator)
    response.close()
    assert heard[0][2]["stream"].channels == ("signals",)
    assert (heard[1][2]["reason"], heard[1][2]["events"]) == ("client", 1)


def test_each_stream_has_a_number_of_its_own(heard):
    for _ in range(3):
        b"".join(get(Short))
    assert len({details["stream"].id for _, _, details in heard}) == 3


@needs_loops
@SERVERS
@pytest.mark.parametrize(("name", "reason", "events"), [("short", "finished", 2), ("broken", "error", 1)])
def test_a_stream_of_a_loop_is_told_of(heard, caplog, taken_over, name, reason, events):
    async def main():
        exchange = Exchange(application(taken_over=taken_over), f"/{name}")
        await exchange.over()
        return exchange

    exchange = asyncio.run(main())
    assert [(event, sender.__name__) for event, sender, _ in heard] == [
        ("opened", name.title()),
        ("closed", name.title()),
    ]
    details = heard[1][2]
    assert (details["reason"], details["events"], details["bytes"]) == (reason, events, len(exchange.body))
    assert details["stream"].path == f"/{name}"
    [record] = [record for record in caplog.records if record.name == "django_sse.streams"]
    assert (record.reason, record.events, record.bytes) == (reason, events, len(exchange.body))


@needs_loops
@SERVERS
@pytest.mark.parametrize("name", ["clock", "news"])
def test_a_client_that_leaves_is_told_of_once(heard, taken_over, name):
    async def main():
        exchange = Exchange(application(taken_over=taken_over), f"/{name}")
        await soon(lambda: exchange.body)
        exchange.leave()
        await exchange.over()
        await soon(lambda: len(heard) == 2)

    asyncio.run(main())
    assert [name for name, *_ in heard] == ["opened", "closed"]
    assert heard[1][2]["reason"] == "client"


# --- receivers ---


def refuse(**kwargs):
    raise ZeroDivisionError("the receiver's")


async def arefuse(**kwargs):
    raise ZeroDivisionError("the receiver's")


@pytest.mark.parametrize("receiver", [refuse, arefuse])
def test_a_receiver_that_raises_harms_no_stream_of_a_thread(connect, receiver):
    connect(stream_opened, receiver)
    connect(stream_closed, receiver)
    response = get(Short)
    assert b"".join(response).endswith(b"data: tack\n\n")
    response.close()


@needs_loops
@SERVERS
@pytest.mark.parametrize("receiver", [refuse, arefuse])
def test_a_receiver_that_raises_harms_no_stream_of_a_loop(connect, taken_over, receiver):
    connect(stream_opened, receiver)
    connect(stream_closed, receiver)

    async def main():
        exchange = Exchange(application(taken_over=taken_over), "/short")
        await exchange.over()
        assert exchange.body.endswith(b"data: tack\n\n")
        assert exchange.finished

    asyncio.run(main())


@needs_loops
@SERVERS
@pytest.mark.parametrize("name", ["short", "clock", "news"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_under_asgi_receivers_may_wait_and_use_the_database(connect, taken_over, name, kind):
    """A sync one in a thread, so that it holds up nobody; an async one in a loop. Also when the client has left."""
    done = []

    def ask():
        # Django refuses this where an event loop runs (SynchronousOnlyOperation).
        connection.close()
        return threading.current_thread()

    def sync_receiver(signal, **kwargs):
        done.append((signal, ask()))

    async def async_receiver(signal, **kwargs):
        done.append((signal, await sync_to_async(ask)()))

    receiver = sync_receiver if kind == "sync" else async_receiver
    connect(stream_opened, receiver)
    connect(stream_closed, receiver)

    async def main():
        exchange = Exchange(application(taken_over=taken_over), f"/{name}")
        await soon(lambda: exchange.body)
        if name != "short":
            exchange.leave()
        await exchange.over()
        await soon(lambda: len(done) == 2, timeout=2)

    asyncio.run(main())
    assert [signal for signal, _ in done] == [stream_opened, stream_closed]
    assert threading.current_thread() not in [thread for _, thread in done]


@needs_loops
@SERVERS
def test_a_stream_that_was_answered_otherwise_is_not_told_of(heard, taken_over):
    async def main():
        exchange = Exchange(application(forbidding, taken_over=taken_over), "/clock")
        await exchange.over()
        assert exchange.status == 403

    asyncio.run(main())
    assert heard == []
