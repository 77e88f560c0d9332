"""The application around Django's: every request is Django's own, and its stream goes on when that has ended."""

import asyncio
import contextvars

import pytest
from django.core.asgi import get_asgi_application as get_django_application
from django.http import HttpResponse
from django.urls import path

from django_sse import asgi, contexts
from django_sse.asgi import SseApplication, get_asgi_application
from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.registry import open_streams
from tests.helpers.asgi import Exchange, http_scope, leaves_the_body
from tests.helpers.loops import needs_loops, soon
from tests.helpers.project import AEndless, Endless, nothing_subscribed, project

pytestmark = needs_loops


class Slow(AEndless):
    """Takes its time to end."""

    max_age = 0.05

    async def iterator(self):
        try:
            while True:
                self.sse.add_message("", "tick")
                yield
                await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0.05)
            self.ended.append(1)


class Queue(RedisQueueView):
    redis_channel = "asgi"


class Limited(AEndless):
    max_age = 0.2


async def slow(request):
    await asyncio.Event().wait()


def echo(request):
    return HttpResponse(request.body + request.META.get("HTTP_X_OWN", "").encode())


urlpatterns = [
    path("sync", Endless.as_view()),
    path("async", AEndless.as_view()),
    path("queue", Queue.as_view()),
    path("limited", Limited.as_view()),
    path("slow-end", Slow.as_view()),
    path("slow", slow),
    path("echo", echo),
]

EVERY_STREAM = pytest.mark.parametrize("name", ["sync", "async", "queue"])


@pytest.fixture(autouse=True)
def _project():
    with project(__name__):
        yield


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    """No server has begun, and none is left for other tests that has."""
    monkeypatch.setattr(contexts, "_common", contextvars.Context())


async def begun(exchange, name):
    """Wait until the stream of `exchange` delivers."""
    await exchange.until(b"retry")
    if name == "queue":
        send_event("", "tick", "asgi")
    await exchange.until(b"data: tick")


def test_the_application_is_djangos_with_ours_around_it():
    application = get_asgi_application()
    assert isinstance(application, SseApplication)
    assert type(application.app) is type(get_django_application())


# --- the client leaves ---


@EVERY_STREAM
def test_the_client_leaves_after_the_handler(name, finished, reasons):
    async def main():
        exchange = Exchange(get_asgi_application(), f"/{name}")
        await soon(lambda: finished)
        await begun(exchange, name)
        exchange.leave()
        await exchange.over()
        assert not exchange.finished
        await soon(lambda: reasons == ["client"])
        if name != "queue":
            await soon(lambda: Endless.ended)

    asyncio.run(main())


@EVERY_STREAM
@pytest.mark.parametrize("turns", [*range(0, 40, 3), 60, 100])
def test_the_client_leaves_at_any_moment_and_it_is_said_once(name, finished, turns):
    """Before the handler, in the midst of it, or when the stream has begun: it may be Django that hears of it."""

    async def main():
        exchange = Exchange(get_asgi_application(), f"/{name}")
        for _ in range(turns):
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.over()
        await soon(lambda: finished or not exchange.sent)

    asyncio.run(main())


@EVERY_STREAM
def test_the_client_leaves_while_the_headers_are_sent(name, finished, reasons):
    async def main():
        jammed = asyncio.Event()

        async def send(message):
            jammed.set()
            await asyncio.Event().wait()

        exchange = Exchange(get_asgi_application(), f"/{name}", send=send)
        await jammed.wait()
        exchange.leave()
        await exchange.over()
        await soon(lambda: finished)

    asyncio.run(main())
    assert reasons == []  # it was never begun


def test_the_client_leaves_before_it_is_heard():
    async def main():
        application = get_asgi_application()
        messages = iter([{"type": "http.disconnect"}])

        async def receive():
            return next(messages)

        sent = []
        await application(http_scope("/async"), receive, sent.append)
        assert sent == []

    asyncio.run(main())


def test_a_client_that_has_left_is_still_gone_when_it_is_asked_again():
    """Channels' consumers and middleware ask, and then we do."""

    async def main():
        heard = []

        async def application(scope, receive, send):
            heard.extend([await receive(), await receive(), await receive()])

        exchange = Exchange(SseApplication(application))
        exchange.leave()
        await exchange.over()
        assert [message["type"] for message in heard] == ["http.request", "http.disconnect", "http.disconnect"]

    asyncio.run(main())


def test_a_view_that_is_slow_hears_of_the_client(finished):
    async def main():
        exchange = Exchange(get_asgi_application(), "/slow")
        await asyncio.sleep(0.05)
        exchange.leave()
        await exchange.over()
        assert exchange.sent == []

    asyncio.run(main())
    assert finished


# --- the stream ends ---


def test_a_stream_that_ends_for_its_age_ends_the_response(finished, reasons):
    async def main():
        exchange = Exchange(get_asgi_application(), "/limited")
        await exchange.over()
        assert exchange.finished
        await soon(lambda: Endless.ended)

    asyncio.run(main())
    assert reasons == ["max_age"]


@pytest.mark.parametrize("taken_over", [True, False])
def test_a_response_ends_after_the_finally_of_its_iterator(taken_over):
    """For some servers, when the last response has ended there is nothing left to wait for."""

    async def main():
        exchange = Exchange(get_asgi_application() if taken_over else get_django_application(), "/slow-end")
        await exchange.over()
        assert Endless.ended == [1]

    asyncio.run(main())


@pytest.mark.parametrize("taken_over", [True, False])
def test_the_server_waits_for_the_finally_of_an_iterator_whose_client_has_left(taken_over):
    async def main():
        exchange = Exchange(get_asgi_application() if taken_over else get_django_application(), "/slow-end")
        await exchange.until(b"data: tick")
        exchange.leave()
        await exchange.over()
        assert Endless.ended == [1]

    asyncio.run(main())


@EVERY_STREAM
@pytest.mark.parametrize("reason", ["shutdown", "overflow"])
def test_a_stream_that_is_ended_says_its_last_and_ends_the_response(name, reasons, reason):
    async def main():
        exchange = Exchange(get_asgi_application(), f"/{name}")
        await begun(exchange, name)
        [stream] = open_streams.all()
        await asyncio.to_thread(stream.end, reason, b"retry: 7\n\n")
        await exchange.over()
        assert exchange.finished
        assert exchange.body.endswith(b"retry: 7\n\n")

    asyncio.run(main())
    assert reasons == [reason]


@EVERY_STREAM
@pytest.mark.parametrize("draining", [False, True])
def test_the_server_cancels_the_request(name, reasons, draining):
    async def main():
        exchange = Exchange(get_asgi_application(), f"/{name}")
        await begun(exchange, name)
        open_streams.draining = draining
        exchange.request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.over()
        if name != "queue":
            await soon(lambda: Endless.ended, timeout=1)

    try:
        asyncio.run(main())
    finally:
        open_streams.draining = False
    assert reasons == ["shutdown" if draining else "client"]


# --- Django fails, or is not alone ---


@leaves_the_body
@EVERY_STREAM
@pytest.mark.parametrize("when", ["after the handler", "instead of the start", "instead of the end"])
def test_an_application_that_raises_gives_everything_back(name, when):
    django = get_django_application()

    async def failing(scope, receive, send):
        async def fail(message):
            if when == "instead of the start" or message["type"] != "http.response.start":
                raise ZeroDivisionError(when)
            await send(message)

        await django(scope, receive, send if when == "after the handler" else fail)
        raise ZeroDivisionError(when)

    async def main():
        exchange = Exchange(SseApplication(failing), f"/{name}")
        with pytest.raises(ZeroDivisionError, match=when):
            await exchange.over()
        await soon(lambda: len(open_streams) == 0)
        assert nothing_subscribed()

    asyncio.run(main())


@EVERY_STREAM
def test_there_may_be_other_applications_in_between(name, finished):
    django = get_django_application()

    async def between(scope, receive, send):
        async def own_send(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-own", b"yes")]}
            await send(message)

        await django({**scope, "own": 1}, receive, own_send)

    async def main():
        exchange = Exchange(SseApplication(between), f"/{name}")
        await soon(lambda: finished)
        await begun(exchange, name)
        assert exchange.headers["x-own"] == "yes"
        exchange.leave()
        await exchange.over()

    asyncio.run(main())


@EVERY_STREAM
def test_an_application_in_between_that_drops_the_scope_keeps_the_stream_in_the_handler(name, finished):
    django = get_django_application()

    async def between(scope, receive, send):
        await django({key: value for key, value in scope.items() if "sse" not in key}, receive, send)

    async def main():
        exchange = Exchange(SseApplication(between), f"/{name}")
        await begun(exchange, name)
        assert not finished
        exchange.leave()
        await exchange.over()

    asyncio.run(main())


@EVERY_STREAM
def test_ours_around_ours_is_ours_once(name, finished, reasons):
    async def main():
        exchange = Exchange(SseApplication(get_asgi_application()), f"/{name}")
        await begun(exchange, name)
        exchange.leave()
        await exchange.over()
        await soon(lambda: finished)

    asyncio.run(main())
    assert reasons == ["client"]


def test_a_request_is_djangos_own():
    async def main():
        exchange = Exchange(get_asgi_application(), "/echo", method="POST", headers=[(b"x-own", b"yes")])
        before = dict(exchange.scope)
        await exchange.over()
        assert exchange.body == b"yes"
        assert exchange.finished
        assert exchange.scope == before

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "installs"), [("lifespan", 1), ("websocket", 0)])
def test_other_connections_are_passed_on_as_they_are(monkeypatch, kind, installs):
    installed = []
    monkeypatch.setattr(asgi.shutdown, "install", lambda: installed.append(1))

    async def main():
        passed = []

        async def application(*arguments):
            assert len(installed) == installs
            passed.append(arguments)

        arguments = ({"type": kind}, object(), object())
        await SseApplication(application)(*arguments)
        assert all(one is other for one, other in zip(passed[0], arguments, strict=True))

    asyncio.run(main())


def test_a_lifespan_that_django_refuses_is_refused_as_ever(monkeypatch):
    monkeypatch.setattr(asgi.shutdown, "install", lambda: None)

    async def main():
        with pytest.raises(ValueError, match="Django can only handle ASGI/HTTP connections"):
            await get_asgi_application()({"type": "lifespan"}, None, None)

    asyncio.run(main())


# --- contexts ---

variable = contextvars.ContextVar("variable")


async def live(application):
    """Be a server that begins, for an application that has a lifespan."""
    await application({"type": "lifespan"}, None, None)


async def sets(scope, receive, send):
    """An application that sets something, whatever it is asked for."""
    variable.set(f"the application's, of {scope['type']}")


@pytest.fixture
def contexts_of_deliveries(monkeypatch):
    seen = []

    class Delivery(asgi.Delivery):
        def __init__(self, stream, send):
            super().__init__(stream, send)
            seen.append(self.context)

    monkeypatch.setattr(asgi, "Delivery", Delivery)
    return seen


def test_all_requests_find_what_is_there_when_the_lifespan_begins(monkeypatch):
    monkeypatch.setattr(asgi.shutdown, "install", lambda: None)

    async def main():
        variable.set("the server's")
        await SseApplication(sets)({"type": "websocket"}, None, None)
        assert len(contexts.common()) == 0
        variable.set("the server's")
        await live(SseApplication(sets))
        assert contexts.common()[variable] == "the server's"

    asyncio.run(main())


def test_what_the_application_sets_for_a_request_ends_with_it():
    """Its task goes on for as long as the stream is open, and a server's task may see to several requests."""

    async def main():
        await SseApplication(sets)(http_scope(), None, None)
        assert variable.get(None) is None

    asyncio.run(main())


@EVERY_STREAM
def test_a_stream_keeps_nothing_of_a_request_around_which_nothing_stands(name, monkeypatch, contexts_of_deliveries):
    monkeypatch.setattr(asgi.shutdown, "install", lambda: None)
    django = get_django_application()

    async def between(scope, receive, send):
        await sets(scope, receive, send)
        if scope["type"] == "http":
            await django(scope, receive, send)

    application = SseApplication(between)

    async def around(scope, receive, send):
        await sets(scope, receive, send)
        await application(scope, receive, send)

    async def main():
        contextvars.ContextVar("the server's").set(1)
        await asyncio.create_task(live(application))
        for each in (application, around):
            exchange = Exchange(each, f"/{name}")
            await begun(exchange, name)
            exchange.leave()
            await exchange.over()

    asyncio.run(main())
    without, own = contexts_of_deliveries
    assert without is None
    assert own[variable] == "the application's, of http"
