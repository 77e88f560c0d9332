"""The hand-over: the stream leaves Django's handler when the view's own response is sent, untouched, and never else."""

import asyncio
import contextvars
import gc
import logging
import threading
import weakref
from typing import ClassVar

import pytest
from asgiref.sync import SyncToAsync, markcoroutinefunction, sync_to_async
from django.core.asgi import get_asgi_application as get_django_application
from django.http import HttpResponse, HttpResponseForbidden, StreamingHttpResponse
from django.test import RequestFactory, override_settings
from django.urls import path

from django_sse.asgi import SseApplication
from django_sse.handover import SCOPE_KEY, EventStreamResponse, Handover
from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.registry import open_streams
from django_sse.views import BaseSseView
from tests.helpers.asgi import Exchange, application
from tests.helpers.loops import needs_loops, soon
from tests.helpers.middleware import (
    DJANGOS,
    after,
    failing,
    forbidding,
    looking,
    louder_async,
    sync_only,
    wrapping,
    wrapping_in_another,
)
from tests.helpers.project import nothing_subscribed, project, stats
from tests.helpers.wait import until

pytestmark = needs_loops


class Made(BaseSseView):
    """Remembers its requests and responses, weakly, and what became of its iterators."""

    requests: ClassVar = []
    responses: ClassVar = []
    began: ClassVar = []
    ended: ClassVar = []

    @classmethod
    def forget(cls):
        for known in (cls.requests, cls.responses, cls.began, cls.ended):
            known.clear()

    def dispatch(self, request, *args, **kwargs):
        response = super().dispatch(request, *args, **kwargs)
        self.requests.append(weakref.ref(request))
        self.responses.append(weakref.ref(response))
        return response


class Sync(Made):
    def iterator(self):
        self.began.append(1)
        step = threading.Event()
        try:
            for number in range(10_000):
                self.sse.add_message("", f"<{number}>")
                yield
                step.wait(0.005)
        finally:
            self.ended.append(1)


class Async(Made):
    async def iterator(self):
        self.began.append(1)
        try:
            for number in range(10_000):
                self.sse.add_message("", f"<{number}>")
                yield
                await asyncio.sleep(0.005)
        finally:
            self.ended.append(1)


class Queue(Made, RedisQueueView):
    redis_channel = "handover"

    async def feed(self):
        for number in range(10_000):
            send_event("", f"<{number}>", "handover")
            await asyncio.sleep(0.005)


class Finite(Made):
    def iterator(self):
        self.sse.add_message("", "only")
        yield


class OwnResponse(Made):
    """Streams from a dispatch() of its own."""

    def dispatch(self, request, *args, **kwargs):
        self.request = request
        return StreamingHttpResponse(self._iterator(), content_type="text/event-stream")

    iterator = Async.iterator


def twice(request):
    """Make two responses, and return the first."""
    first, _second = Async.as_view()(request), Async.as_view()(request)
    return first


def second_thought(request):
    """Make two responses, and return the second."""
    _first, second = Async.as_view()(request), Async.as_view()(request)
    return second


urlpatterns = [
    path("sync", Sync.as_view()),
    path("async", Async.as_view()),
    path("queue", Queue.as_view()),
    path("finite", Finite.as_view()),
    path("own", OwnResponse.as_view()),
    path("twice", twice),
    path("second-thought", second_thought),
    path("contextual", lambda request: Contextual.as_view()(request)),
    path("acontextual", lambda request: AContextual.as_view()(request)),
    path("own-thread", lambda request: AnOwnThread.as_view()(request)),
    path("plain", lambda request: HttpResponse("plain", headers={"X-Own": "yes"})),
]

EVERY_STREAM = pytest.mark.parametrize("name", ["sync", "async", "queue"])


@pytest.fixture(autouse=True)
def _project():
    Made.forget()
    with project(__name__):
        yield
    until(lambda: len(Made.began) == len(Made.ended), what="every finally")


async def feeding(name):
    """A task that publishes, for the view that has no iterator of its own."""
    return asyncio.create_task(Queue().feed() if name == "queue" else asyncio.sleep(0))


def numbers(body):
    """The numbers of the events in `body`, which must follow each other."""
    found = [int(part.split(b">")[0]) for part in body.split(b"<")[1:]]
    assert found == list(range(found[0], found[0] + len(found)))
    return found


# --- taken over ---


@EVERY_STREAM
def test_the_handler_ends_and_the_stream_goes_on(name, finished):
    async def main():
        exchange = Exchange(application(), f"/{name}")
        await soon(lambda: finished)
        feeder = await feeding(name)
        await exchange.until(b"<3>")
        # The program's own iterator keeps its view, and that the request.
        gone = Made.requests + Made.responses if name == "queue" else Made.responses
        await soon(lambda: gc.collect() >= 0 and [one() for one in gone] == len(gone) * [None])
        last = numbers(exchange.body)[-1]
        await exchange.until(b"<%d>" % (last + 3))
        assert not exchange.request.done()
        exchange.leave()
        await exchange.over()
        feeder.cancel()
        numbers(exchange.body)
        assert len(finished) == 1

    asyncio.run(main())


class remembering_the_request:  # noqa: N801  # as middleware is named
    """Has what some keep at hand for all code: the present request, in a context variable."""

    present = contextvars.ContextVar("present")
    sync_capable = False
    async_capable = True

    def __init__(self, get_response):
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request):
        self.present.set(request)
        return await self.get_response(request)


def test_what_middleware_has_set_in_a_context_variable_goes_with_the_request():
    async def main():
        exchange = Exchange(application(remembering_the_request), "/queue")
        await soon(lambda: exchange.sent)
        await soon(lambda: gc.collect() >= 0 and [one() for one in Made.requests] == [None])
        exchange.leave()
        await exchange.over()

    asyncio.run(main())


class Contextual(BaseSseView):
    """Tells which request is the present one."""

    def iterator(self):
        for _ in range(2):
            self.sse.add_message("", remembering_the_request.present.get().path)
            yield


class AContextual(Contextual):
    async def iterator(self):
        for _ in range(2):
            self.sse.add_message("", remembering_the_request.present.get().path)
            yield


@pytest.mark.parametrize("name", ["contextual", "acontextual"])
@pytest.mark.parametrize("taken_over", [False, True])
def test_an_iterator_sees_what_middleware_has_set_in_a_context_variable(name, taken_over):
    async def main():
        exchange = Exchange(application(remembering_the_request, taken_over=taken_over), f"/{name}")
        await exchange.over()
        assert exchange.body.count(f"data: /{name}\n".encode()) == 2

    asyncio.run(main())


class AnOwnThread(BaseSseView):
    """Has sync code in the thread that asgiref keeps for it while it runs."""

    async def iterator(self):
        self.sse.add_message("", await sync_to_async(lambda: threading.current_thread().name)())
        yield


def test_the_thread_of_an_iterators_sync_code_ends_with_the_iterator():
    async def main():
        exchange = Exchange(application(remembering_the_request), "/own-thread")
        await exchange.over()
        assert b"data: " in exchange.body
        return contexts_with_a_thread()

    def contexts_with_a_thread():
        return [*SyncToAsync.context_to_thread_executor]

    gc.collect()
    before = contexts_with_a_thread()
    gc.disable()  # else what asgiref forgets may be freed by chance
    try:
        assert asyncio.run(main()) == before
    finally:
        gc.enable()


def test_the_headers_are_those_of_the_view():
    async def main(app):
        exchange = Exchange(app, "/queue")
        await soon(lambda: exchange.sent)
        exchange.leave()
        await exchange.over()
        return exchange.status, exchange.headers

    with override_settings(MIDDLEWARE=[]):
        status, headers = asyncio.run(main(application()))
        as_before = asyncio.run(main(get_django_application()))
    assert (status, headers) == as_before
    assert headers == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "content-encoding": "identity",
        "software": "django-sse",
    }


@EVERY_STREAM
def test_without_the_application_around_it_the_stream_stays_in_the_handler(name, finished):
    async def main():
        exchange = Exchange(get_django_application(), f"/{name}")
        await soon(lambda: exchange.sent)
        feeder = await feeding(name)
        await exchange.until(b"<2>")
        assert finished == []
        exchange.leave()
        await exchange.over()
        feeder.cancel()

    asyncio.run(main())


def test_a_stream_that_ends_ends_the_response(finished):
    async def main():
        exchange = Exchange(application(), "/finite")
        await exchange.over()
        assert exchange.body == b"retry: 2000\n\nevent: \ndata: only\n\n"
        assert exchange.finished
        assert len(finished) == 1

    asyncio.run(main())


def test_what_is_no_stream_is_none_of_our_business(finished):
    async def main():
        exchange = Exchange(application(), "/plain")
        await exchange.over()
        assert (exchange.status, exchange.body, exchange.headers["x-own"]) == (200, b"plain", "yes")
        assert exchange.finished

    asyncio.run(main())


def test_head_has_the_headers_alone(finished):
    async def main():
        exchange = Exchange(application(), "/async", method="HEAD")
        await exchange.over()
        assert (exchange.status, exchange.body, exchange.finished) == (200, b"", True)
        assert exchange.headers["content-type"] == "text/event-stream"

    asyncio.run(main())


# --- middleware in between ---


async def other_chunks():
    for number in range(10):
        yield b"<<%d>" % number


@after
def replacing_unread(response):
    response.streaming_content = other_chunks()
    return response


@after
def reading_later(response):
    return StreamingHttpResponse(louder_async(response), headers=response.headers)


class _Closing:
    """The chunks of a response, which is closed with them."""

    def __init__(self, response):
        self.response = response

    def __aiter__(self):
        return louder_async(self.response)

    def close(self):
        self.response.close()


@after
def reading_later_and_closing(response):
    return StreamingHttpResponse(_Closing(response), headers=response.headers)


@after
def renewing(response):
    return StreamingHttpResponse(louder_async(response), content_type="text/event-stream")


@after
def forbidding_with_its_headers(response):
    return HttpResponseForbidden("Not you.", headers=response.headers)


@after
def adding_headers(response):
    response["X-Seen"] = "by this"
    response.set_cookie("seen", "1")
    return response


@EVERY_STREAM
@pytest.mark.parametrize(
    "middleware",
    [wrapping, wrapping_in_another, reading_later, reading_later_and_closing, renewing],
    ids=lambda middleware: middleware.__name__,
)
def test_what_a_middleware_makes_of_the_stream_is_what_arrives(name, middleware, finished):
    async def main():
        exchange = Exchange(application(middleware), f"/{name}")
        await soon(lambda: exchange.sent)
        await soon(lambda: name != "queue" or stats()["subscriptions"])
        feeder = await feeding(name)
        await exchange.until(b"DATA: <5>")
        assert exchange.headers["content-type"] == "text/event-stream"
        assert finished == []
        exchange.leave()
        await exchange.over()
        feeder.cancel()
        await soon(lambda: len(open_streams) == 0)

    asyncio.run(main())


@EVERY_STREAM
def test_what_a_middleware_puts_in_the_streams_place_is_what_arrives(name):
    async def main():
        exchange = Exchange(application(replacing_unread), f"/{name}")
        await exchange.over()
        assert exchange.body == b"".join([b"<<%d>" % number for number in range(10)])
        assert exchange.finished
        assert len(open_streams) == 0

    asyncio.run(main())


@EVERY_STREAM
def test_a_middleware_that_looks_at_the_content_keeps_it_in_the_handler(name, finished):
    async def main():
        exchange = Exchange(application(looking), f"/{name}")
        await soon(lambda: exchange.sent)
        feeder = await feeding(name)
        await exchange.until(b"<5>")
        assert finished == []
        numbers(exchange.body)
        exchange.leave()
        await exchange.over()
        feeder.cancel()
        await soon(lambda: finished)

    asyncio.run(main())


@EVERY_STREAM
@pytest.mark.parametrize("middleware", [forbidding, forbidding_with_its_headers], ids=lambda one: one.__name__)
def test_a_middleware_that_answers_instead_gives_everything_back(name, middleware, finished):
    async def main():
        exchange = Exchange(application(middleware), f"/{name}")
        await exchange.over()
        assert (exchange.status, exchange.body) == (403, b"Not you.")
        assert exchange.finished
        assert len(open_streams) == 0
        assert nothing_subscribed()
        assert Made.began == []

    asyncio.run(main())


@EVERY_STREAM
def test_a_middleware_that_fails_gives_everything_back(name, caplog):
    async def main():
        exchange = Exchange(application(failing), f"/{name}")
        await exchange.over()
        assert exchange.status == 500
        assert b"data:" not in exchange.body
        assert len(open_streams) == 0
        assert nothing_subscribed()

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(main())


@EVERY_STREAM
@pytest.mark.parametrize("middleware", [adding_headers, sync_only], ids=lambda one: one.__name__)
def test_a_middleware_that_adds_a_header_is_no_hindrance(name, middleware, finished):
    async def main():
        exchange = Exchange(application(middleware), f"/{name}")
        await soon(lambda: finished)
        assert "x-seen" in exchange.headers
        feeder = await feeding(name)
        await exchange.until(b"<5>")
        exchange.leave()
        await exchange.over()
        feeder.cancel()

    asyncio.run(main())


@EVERY_STREAM
def test_no_middleware_of_django_is_a_hindrance(name, finished):
    async def main():
        with override_settings(MIDDLEWARE=DJANGOS):
            app = SseApplication(get_django_application())
        exchange = Exchange(app, f"/{name}", headers=[(b"accept-encoding", b"gzip")])
        await soon(lambda: finished)
        feeder = await feeding(name)
        await exchange.until(b"<5>")
        assert exchange.headers["content-encoding"] == "identity"
        exchange.leave()
        await exchange.over()
        feeder.cancel()

    asyncio.run(main())


# --- other responses of the view ---


def test_a_dispatch_with_a_response_of_its_own_streams_in_the_handler(finished):
    async def main():
        exchange = Exchange(application(), "/own")
        await exchange.until(b"<5>")
        assert finished == []
        numbers(exchange.body)
        exchange.leave()
        await exchange.over()
        await soon(lambda: finished)
        await soon(lambda: Made.ended)

    asyncio.run(main())


@pytest.mark.parametrize("name", ["twice", "second-thought"])
def test_of_two_responses_the_one_that_is_returned_is_delivered(name):
    async def main():
        exchange = Exchange(application(), f"/{name}")
        await exchange.until(b"<5>")
        numbers(exchange.body)
        exchange.leave()
        await exchange.over()
        gc.collect()
        assert len(open_streams) == 0

    asyncio.run(main())


# --- the parts by themselves ---


async def ignored(message):
    """Take what is sent."""


def response(handover=None):
    request = RequestFactory().get("/")
    request.scope = {} if handover is None else {SCOPE_KEY: handover}
    return Finite.as_view()(request)


def test_an_offer_that_nobody_takes_passes_every_message_on_as_it_is():
    async def main():
        sent = []

        async def send(message):
            sent.append(message)

        handover = Handover(send)
        messages = [
            {"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"yes")]},
            {"type": "http.response.body", "body": b"x", "more_body": True},
            {"type": "http.response.body"},
            {"type": "http.response.trailers"},
        ]
        for message in messages:
            await handover.send(message)
        assert all(one is other for one, other in zip(sent, messages, strict=True))
        assert handover.taken() is None
        handover.withdraw()

    asyncio.run(main())


@pytest.mark.parametrize("end", ["taken", "withdraw"])
def test_streams_that_were_offered_in_vain_are_closed(end):
    handover = Handover(ignored)
    made = [response(handover) for _ in range(3)]
    assert all(isinstance(one, EventStreamResponse) for one in made)
    assert len(open_streams) == 3
    assert getattr(handover, end)() is None
    assert len(open_streams) == 0


def test_a_response_closed_unread_closes_its_stream():
    made = response()
    assert len(open_streams) == 1
    made.close()
    assert len(open_streams) == 0


def test_a_response_of_a_server_of_threads_is_an_ordinary_one():
    made = response()
    assert made.streaming
    assert b"".join(made) == b"retry: 2000\n\nevent: \ndata: only\n\n"
    made.close()
