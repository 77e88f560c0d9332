"""BaseSseView beyond the interface of 0.4.1 (tests/compat): its attributes, its refusals, its async side."""

import asyncio
import gc
import re
import threading
import time
from types import SimpleNamespace

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.http import HttpResponse, HttpResponseForbidden, StreamingHttpResponse
from django.test import AsyncClient, AsyncRequestFactory, RequestFactory, override_settings
from django.urls import path

from django_sse import redisqueue, streams, views
from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.registry import Registry
from django_sse.views import BaseSseView
from django_sse.wire import Sse
from django_sse.workers import on_gevent
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until

MEMORY = {"location": "memory:"}


class Endless(BaseSseView):
    """A sync generator that waits between its events for the test to go on."""

    go_on = threading.Event()
    ended = threading.Event()

    def iterator(self):
        try:
            self.sse.add_message("", "first")
            yield
            while True:
                self.go_on.wait(0.01)
                self.sse.add_message("", "next")
                yield
        finally:
            self.ended.set()


class AsyncEndless(BaseSseView):
    ended = threading.Event()

    async def iterator(self):
        try:
            while True:
                self.sse.add_message("", "next")
                yield
                await asyncio.sleep(0.01)
        finally:
            self.ended.set()


class Finite(BaseSseView):
    def iterator(self):
        self.sse.add_message("", "only")
        yield


class Wholesale(BaseSseView):
    """A dispatch() of old that knows nothing of the package's Stream."""

    ended = threading.Event()

    def dispatch(self, request, *args, **kwargs):
        return StreamingHttpResponse(self.chunks(), content_type="text/event-stream")

    def chunks(self):
        try:
            while True:
                yield "data: é\n\n"
        finally:
            self.ended.set()


class AsyncWholesale(Wholesale):
    async def chunks(self):
        try:
            while True:
                yield "data: é\n\n"
                await asyncio.sleep(0)
        finally:
            self.ended.set()


class Forbidden(BaseSseView):
    def dispatch(self, request, *args, **kwargs):
        return HttpResponseForbidden("no")


class AsyncSource:
    async def __aiter__(self):
        for step in "ab":
            yield step


class Returning(BaseSseView):
    """`async def iterator()` that returns its steps."""

    make = None

    async def iterator(self):
        await asyncio.sleep(0)
        self.sse.add_message("", "filled")
        return self.make()


def generator():
    yield


RETURNED = {
    "list": lambda: ["a", "b"],
    "dict": lambda: {"a": 1},
    "async-iterable": AsyncSource,
    "async-generator": lambda: AsyncSource().__aiter__(),
}

urlpatterns = [
    path("endless", Endless.as_view()),
    path("async-endless", AsyncEndless.as_view()),
    path("finite", Finite.as_view()),
    path("wholesale", Wholesale.as_view()),
    path("async-wholesale", AsyncWholesale.as_view()),
    path("forbidden", Forbidden.as_view()),
    path("queue", RedisQueueView.as_view(redis_channel="room")),
    *(path(name, Returning.as_view(make=make)) for name, make in RETURNED.items()),
]

pytestmark = pytest.mark.urls(__name__)


@pytest.fixture(autouse=True)
def _fresh():
    for view in (Endless, AsyncEndless, Wholesale, AsyncWholesale):
        view.ended.clear()
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=MEMORY):
        yield


@pytest.fixture
def get():
    """A function that asks a view as a WSGI server does; the responses are closed at the end."""
    responses = []

    def get(view, method="GET", **kwargs):
        responses.append(view(RequestFactory().generic(method, "/"), **kwargs))
        return responses[-1]

    yield get
    for response in responses:
        response.close()


@pytest.fixture
def registry(monkeypatch):
    """The open streams of this test alone."""
    registry = Registry()
    for module in (views, streams):
        monkeypatch.setattr(module, "open_streams", registry)
    return registry


def asynchronously(test):
    """Run `test(client)` on a loop, with Django's client for ASGI."""

    async def main():
        return await asyncio.wait_for(test(AsyncClient()), 20)

    return asyncio.run(main())


async def first_chunks(response, count):
    chunks = aiter(response)
    return [await anext(chunks) for _ in range(count)]


# --- attributes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "attribute", "argument", "expected"),
    [
        ({}, None, {}, b"retry: 2000\n\n"),
        ({"RETRY": 5}, None, {}, b"retry: 5\n\n"),
        ({"RETRY": 5}, 7, {}, b"retry: 7\n\n"),
        ({"RETRY": 5}, 7, {"retry": 9}, b"retry: 9\n\n"),
        ({}, 0, {}, b"retry: 0\n\n"),
    ],
)
def test_retry_comes_from_the_settings_the_class_or_as_view(get, setting, attribute, argument, expected):
    view = type("View", (Finite,), {"retry": attribute})
    with override_settings(DJANGO_SSE=setting):
        assert next(iter(get(view.as_view(**argument)))) == expected


@pytest.mark.parametrize("retry", [-1, "soon", 1.5, True])
def test_a_retry_that_is_no_number_of_milliseconds_is_refused(get, retry):
    with pytest.raises(ValueError, match="retry"):
        get(Finite.as_view(retry=retry))


@pytest.mark.parametrize("source", ["setting", "attribute", "argument"])
def test_heartbeats_come_from_the_settings_the_class_or_as_view(get, source):
    setting = {"HEARTBEAT": 0.01} if source == "setting" else {"HEARTBEAT": 3600}
    view = type("View", (RedisQueueView,), {"heartbeat": 0.01} if source == "attribute" else {})
    with override_settings(DJANGO_SSE=setting):
        response = get(view.as_view(**({"heartbeat": 0.01} if source == "argument" else {})))
        chunks = iter(response)
        assert [next(chunks) for _ in range(3)] == [b"retry: 2000\n\n", b":\n\n", b":\n\n"]


@pytest.mark.parametrize("heartbeat", [0, -1, "15", True])
def test_a_heartbeat_that_is_no_number_of_seconds_is_refused_by_name(get, heartbeat):
    with pytest.raises(ImproperlyConfigured, match="RedisQueueView.heartbeat must be a number of seconds"):
        get(RedisQueueView.as_view(heartbeat=heartbeat))


def test_no_heartbeat_is_sent_where_it_is_none(get):
    response = get(RedisQueueView.as_view(heartbeat=None))
    chunks, got = iter(response), []
    reader = threading.Thread(target=lambda: got.extend(next(chunks) for _ in range(2)), daemon=True)
    reader.start()
    until(lambda: len(got) == 1, what="the retry")
    send_event("", "event")
    reader.join(10)
    assert got == [b"retry: 2000\n\n", b"event: \ndata: event\n\n"]


def test_the_view_function_knows_its_class_and_stays_exempt_from_csrf():
    view = Finite.as_view(retry=1)
    assert view.view_class is Finite
    assert view.view_initkwargs == {"retry": 1}
    assert view.csrf_exempt


def test_as_view_refuses_what_the_class_does_not_know():
    with pytest.raises(TypeError, match="colour"):
        Finite.as_view(colour="red")


def test_a_view_without_an_iterator_says_so(get):
    with pytest.raises(NotImplementedError, match="BaseSseView must define iterator"):
        get(BaseSseView.as_view())


def test_a_method_that_a_subclass_leaves_out_is_answered_with_those_it_takes(get):
    response = get(Finite.as_view(http_method_names=["get", "post"]), "PUT")
    assert response.status_code == 405
    assert response["Allow"] == "GET, POST"
    assert get(Finite.as_view(http_method_names=["get", "post"]), "POST").status_code == 200
    assert get(Finite.as_view(http_method_names=["get"]), "HEAD").status_code == 200


def test_other_responses_pass_as_they_are(get):
    assert get(Forbidden.as_view()).status_code == 403
    assert get(Forbidden.as_view(), "HEAD").content == b"no"


def test_what_is_sent_of_a_stream_is_left_alone_on_its_way(get):
    for view in (Finite, RedisQueueView):
        response = get(view.as_view())
        assert response["Content-Encoding"] == "identity"  # GZipMiddleware leaves alone what says so
        assert response["Cache-Control"] == "no-cache, no-transform"
        assert response["X-Accel-Buffering"] == "no"
    assert get(Wholesale.as_view())["Content-Encoding"] == "identity"
    assert "Content-Encoding" not in get(Forbidden.as_view())


@needs_loops
@pytest.mark.parametrize("asynchronous", [False, True])
def test_heartbeats_break_the_silence_of_an_iterator_under_a_loop(asynchronous):
    class Silent(BaseSseView):
        heartbeat = 0.01

        def iterator(self):
            assert go_on.wait(10)
            self.sse.add_message("", "event")
            yield

    class AsyncSilent(Silent):
        async def iterator(self):
            await soon(go_on.is_set)
            self.sse.add_message("", "event")
            yield

    async def main():
        view = (AsyncSilent if asynchronous else Silent).as_view()
        response = await asyncio.to_thread(view, AsyncRequestFactory().get("/"))
        chunks = await first_chunks(response, 4)
        go_on.set()
        rest = [chunk async for chunk in response]
        await asyncio.to_thread(response.close)
        return chunks, rest

    go_on = threading.Event()
    chunks, rest = asyncio.run(main())
    assert chunks == [b"retry: 2000\n\n"] + [b":\n\n"] * 3
    assert rest[-1] == b"event: \ndata: event\n\n"


@pytest.mark.parametrize("option", ["max_age", "stall_timeout"])
@pytest.mark.parametrize("source", ["setting", "attribute", "argument"])
def test_limits_in_time_come_from_the_settings_the_class_or_as_view(get, registry, option, source):
    view = type("View", (Finite,), {option: 7} if source == "attribute" else {})
    with override_settings(DJANGO_SSE={option.upper(): 7 if source == "setting" else 8}):
        response = get(view.as_view(**({option: 7} if source == "argument" else {})))
        next(iter(response))
    (stream,) = registry.all()
    if option == "stall_timeout":
        assert stream.stall_timeout == 7
    else:
        assert 7 * 0.79 < stream.too_old - time.monotonic() < 7 * 1.21


@pytest.mark.parametrize("option", ["max_age", "stall_timeout"])
@pytest.mark.parametrize("value", [0, -1, "15", True])
def test_a_limit_that_is_no_number_of_seconds_is_refused_by_name(get, option, value):
    with pytest.raises(ImproperlyConfigured, match=f"Finite.{option} must be a number of seconds"):
        get(Finite.as_view(**{option: value}))
    assert get(Finite.as_view(**{option: None})).status_code == 200


# --- HEAD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [Endless, AsyncEndless, Wholesale, AsyncWholesale, RedisQueueView])
def test_head_is_an_empty_stream_for_a_thread(get, view):
    response = get(view.as_view(), "HEAD")
    assert response.status_code == 200
    assert response["Content-Type"].startswith("text/event-stream")
    assert list(response) == []


@pytest.mark.parametrize("view", [Endless, AsyncEndless, Wholesale, AsyncWholesale, RedisQueueView])
def test_head_is_an_empty_stream_for_a_loop(view):
    async def main():
        response = await asyncio.to_thread(view.as_view(), AsyncRequestFactory().head("/"))
        assert (response.status_code, response.is_async) == (200, True)
        chunks = [chunk async for chunk in response]
        await asyncio.to_thread(response.close)
        return chunks

    assert asyncio.run(main()) == []


def test_head_takes_no_thread_and_no_subscription():
    before = len(views.workers._hired)

    async def test(client):
        for url in ("/endless", "/queue"):
            await client.head(url)
        return len(views.workers._hired)

    assert asynchronously(test) == before
    assert redisqueue._runtime().stats() == {"channels": 0, "subscriptions": 0}


# --- on a loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "view"), [("/endless", Endless), ("/async-endless", AsyncEndless)])
def test_an_endless_iterator_streams_on_a_loop_and_ends_when_it_is_closed(url, view):
    async def test(client):
        response = await client.get(url)
        chunks = await first_chunks(response, 3)
        await asyncio.to_thread(response.close)
        await soon(view.ended.is_set)
        return chunks

    first, *others = asynchronously(test)
    assert first == b"retry: 2000\n\n"
    assert all(chunk.startswith(b"event: \ndata: ") for chunk in others)


@pytest.mark.parametrize(("url", "view"), [("/wholesale", Wholesale), ("/async-wholesale", AsyncWholesale)])
def test_a_response_that_dispatch_built_itself_streams_on_a_loop(url, view):
    async def test(client):
        response = await client.get(url)
        assert response.is_async
        chunks = await first_chunks(response, 3)
        await asyncio.to_thread(response.close)
        return chunks

    assert asynchronously(test) == ["data: é\n\n".encode()] * 3
    gc.collect()
    until(view.ended.is_set, what="the finally")


@needs_loops
def test_an_async_response_that_dispatch_built_itself_streams_in_a_thread(get):
    chunks = iter(get(AsyncWholesale.as_view()))
    assert [next(chunks) for _ in range(3)] == ["data: é\n\n".encode()] * 3


@needs_loops
@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("on_loop", [True, False])
def test_an_async_iterator_may_return_its_steps(get, name, on_loop):
    async def test(client):
        return b"".join([chunk async for chunk in await client.get(f"/{name}")])

    body = asynchronously(test) if on_loop else b"".join(get(Returning.as_view(make=RETURNED[name])))
    assert body == b"retry: 2000\n\nevent: \ndata: filled\n\n"


class Mistaken(BaseSseView):
    def iterator(self):
        yield
        len(5)


class AsyncMistaken(BaseSseView):
    async def iterator(self):
        yield
        len(5)


MISTAKES = {
    "sync": (Mistaken.as_view(), "object of type 'int' has no len"),
    "async": (AsyncMistaken.as_view(), "object of type 'int' has no len"),
    "generator": (Returning.as_view(make=generator), "async def iterator.. must yield, or return"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("on_loop", [pytest.param(True, marks=needs_loops), False])
def test_an_error_of_the_program_ends_the_stream_and_is_logged_once(caplog, mistake, on_loop):
    """A TypeError, which Django would take for its own: it would iterate once more, and warn of that instead."""

    async def main():
        response = await asyncio.to_thread(view, AsyncRequestFactory().get("/here"))
        chunks = [chunk async for chunk in response]
        await asyncio.to_thread(response.close)
        return chunks

    view, message = MISTAKES[mistake]
    if on_loop:
        chunks = asyncio.run(main())
    elif mistake == "sync" or not on_gevent():
        response = view(RequestFactory().get("/here"))
        chunks = list(response)
        response.close()
    else:
        pytest.skip("an async iterator is refused on gevent")
    assert chunks == [b"retry: 2000\n\n"]
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert (record.name, record.reason, record.path) == ("django_sse.streams", "error", "/here")
    assert isinstance(record.exc_info[1], TypeError)
    assert re.search(message, str(record.exc_info[1]))


@needs_loops
def test_an_error_of_the_program_is_raised_to_an_own_response_around_the_stream(caplog):
    class Own(Mistaken):
        def dispatch(self, request):
            return StreamingHttpResponse(self._iterator(), content_type="text/event-stream")

    async def main():
        response = await asyncio.to_thread(Own.as_view(), AsyncRequestFactory().get("/"))
        try:
            return [chunk async for chunk in response]
        finally:
            await asyncio.to_thread(response.close)

    with pytest.raises(RuntimeError, match="raised TypeError: object of type 'int' has no len") as caught:
        asyncio.run(main())
    assert isinstance(caught.value.__cause__, TypeError)


class OwnBuffer(Sse):
    """Decides itself what a flush gives."""

    def __iter__(self):
        yield "data: mine\n\n"


class WithOwnBuffer(BaseSseView):
    def iterator(self):
        self.sse = OwnBuffer()
        return [1, 2]


def test_a_buffer_that_iterates_by_itself_is_asked_after_each_step_and_not_before(get):
    chunks = iter(get(WithOwnBuffer.as_view()))
    assert [next(chunks) for _ in range(2)] == [b"data: mine\n\n"] * 2


class Failing(RedisQueueView):
    def iterator(self):
        raise ValueError("mine")


def test_an_error_of_the_program_before_the_stream_gives_the_subscription_back(get):
    with pytest.raises(ValueError, match="mine"):
        get(Failing.as_view())
    with pytest.raises(ImproperlyConfigured):
        get(RedisQueueView.as_view(heartbeat=0))
    assert redisqueue._runtime().stats() == {"channels": 0, "subscriptions": 0}


@needs_loops
@pytest.mark.parametrize("read", [0, 1])
@pytest.mark.parametrize("on_loop", [True, False])
def test_a_client_that_leaves_before_the_first_step_leaves_no_coroutine_behind(on_loop, read):
    """Python would warn of one that was never awaited, and pytest would fail this test."""
    view = Returning.as_view(make=list)

    async def main():
        response = await asyncio.to_thread(view, AsyncRequestFactory().get("/"))
        chunks = aiter(response)
        for _ in range(read):
            await anext(chunks)
        response.close()
        await asyncio.sleep(0.01)

    if on_loop:
        asyncio.run(main())
    else:
        response = view(RequestFactory().get("/"))
        chunks = iter(response)
        for _ in range(read):
            next(chunks)
        response.close()
    gc.collect()


def test_a_queue_delivers_on_a_loop():
    async def test(client):
        response = await client.get("/queue")
        chunks = aiter(response)
        assert await anext(chunks) == b"retry: 2000\n\n"
        await redisqueue.asend_event("news", {"a": 1}, "room")
        event = await anext(chunks)
        response.close()
        return event

    assert asynchronously(test) == b'event: news\ndata: {"a": 1}\n\n'
    assert redisqueue._runtime().stats() == {"channels": 0, "subscriptions": 0}


# --- refusals -------------------------------------------------------------------------------------------------------


@needs_loops
@override_settings(DJANGO_SSE={"THREADS": 2})
def test_one_stream_too_many_is_answered_with_503_and_when_to_come_again():
    async def test(client):
        kept = [await client.get("/endless") for _ in range(2)]
        refused = await client.get("/endless")
        assert refused.status_code == 503
        assert refused["Retry-After"] == str(views.RETRY_AFTER)
        assert refused["Content-Type"] == "text/plain; charset=utf-8"
        assert 'DJANGO_SSE["THREADS"]' in refused.content.decode()
        assert (await client.get("/wholesale")).status_code == 503
        for url in ("/async-endless", "/queue"):
            others = await client.get(url)
            assert others.status_code == 200
            await asyncio.to_thread(others.close)
        for response in kept:
            await first_chunks(response, 2)
            await asyncio.to_thread(response.close)
        await soon(lambda: not len(views.workers._hired))
        again = await client.get("/endless")
        assert again.status_code == 200
        await asyncio.to_thread(again.close)

    gc.collect()
    until(lambda: not len(views.workers._hired), what="the streams of other tests to end")
    asynchronously(test)


@override_settings(DJANGO_SSE={"MAX_STREAMS": 2})
def test_one_stream_more_than_the_process_may_have_is_refused_until_one_has_ended(get, registry):
    kept = [get(RedisQueueView.as_view(redis_channel="room")) for _ in range(2)]
    refused = get(RedisQueueView.as_view(redis_channel="other"))
    assert (refused.status_code, refused["Retry-After"]) == (503, "5")
    assert 'DJANGO_SSE["MAX_STREAMS"]' in refused.content.decode()
    assert redisqueue._runtime().stats() == {"channels": 1, "subscriptions": 2}
    assert get(Finite.as_view(), "HEAD").status_code == 200
    kept[0].close()
    assert get(Finite.as_view()).status_code == 200


def asked_by(view, pk):
    request = RequestFactory().get("/")
    request.user = SimpleNamespace(pk=pk, is_authenticated=pk is not None)
    return view(request)


@override_settings(DJANGO_SSE={"MAX_STREAMS_PER_USER": 1})
def test_one_stream_more_than_a_user_may_have_is_refused_and_others_are_served(registry):
    view = Finite.as_view()
    first = asked_by(view, 1)
    assert first.status_code == 200
    refused = asked_by(view, 1)
    assert refused.status_code == 503
    assert 'DJANGO_SSE["MAX_STREAMS_PER_USER"]' in refused.content.decode()
    others = [asked_by(view, pk) for pk in (2, None, None)]
    assert [response.status_code for response in others] == [200] * 3
    first.close()
    others.append(asked_by(view, 1))
    assert others[-1].status_code == 200
    for response in others:
        response.close()


def test_a_stream_is_counted_once_whoever_iterates_it(get, registry):
    class Edits(RedisQueueView):
        def _iterator(self):
            yield from super()._iterator()

    class Own(RedisQueueView):
        def dispatch(self, request):
            self.request = request
            return StreamingHttpResponse(self._iterator(), content_type="text/event-stream")

    for view in (Finite, RedisQueueView, Edits, Own):
        response = get(view.as_view())
        next(iter(response))
        (stream,) = registry.all()
        assert stream.account.info.view.__name__ == view.__name__
        assert stream.account.info.path == "/"
        assert stream.account.info.channels == (() if view is Finite else (redisqueue.configuration.channel,))
        response.close()
        assert len(registry) == 0


class OwnLoop(RedisQueueView):
    """Takes a thread and a subscription."""

    def iterator(self):
        for _ in super().iterator():
            yield


@override_settings(DJANGO_SSE={"THREADS": 1})
def test_a_refused_stream_gives_its_subscription_back_at_once():
    view = OwnLoop.as_view()

    async def main():
        first = await asyncio.to_thread(view, AsyncRequestFactory().get("/"))
        refused = await asyncio.to_thread(view, AsyncRequestFactory().get("/"))
        assert (first.status_code, refused.status_code) == (200, 503)
        stats = redisqueue._runtime().stats()
        await asyncio.to_thread(first.close)
        return stats

    gc.collect()
    until(lambda: not len(views.workers._hired), what="the streams of other tests to end")
    assert asyncio.run(main()) == {"channels": 1, "subscriptions": 1}


def test_an_async_iterator_on_gevent_is_refused_with_what_to_do(get, monkeypatch):
    monkeypatch.setattr(views, "on_gevent", lambda: True)
    for view in (AsyncEndless, AsyncWholesale):
        with pytest.raises(
            ImproperlyConfigured, match="async iterator.. cannot run on a gevent server.*plain generator"
        ):
            get(view.as_view())
    response = get(Finite.as_view())
    assert b"data: only" in b"".join(response)
    assert next(iter(get(RedisQueueView.as_view()))) == b"retry: 2000\n\n"


def test_gevent_without_patched_threads_is_refused_with_what_to_do(get, monkeypatch):
    monkeypatch.setattr(redisqueue, "on_unpatched_gevent", lambda: True)
    with pytest.raises(ImproperlyConfigured, match="gevent.monkey.patch_all"):
        get(RedisQueueView.as_view())


@pytest.mark.parametrize(
    ("sent", "seen"),
    [("42", "42"), ("", ""), ("Ã©", "é"), ("é", "é"), ("日", "日"), (5, None)],
)
def test_the_last_event_id_is_read_as_browsers_send_it(sent, seen):
    view = Finite()
    view.request = RequestFactory().get("/", HTTP_LAST_EVENT_ID=sent)
    assert view.get_last_id() == seen


@pytest.mark.parametrize(
    ("query", "header", "seen"),
    [
        ("", None, None),
        ("?last_event_id=42", None, "42"),
        ("?last_event_id=%C3%A9%20", None, "é "),
        ("?last_event_id=", None, ""),
        ("?last_event_id=1&last_event_id=2", None, "2"),
        ("?lastEventId=42&LAST_EVENT_ID=42", None, None),
        # Once the browser has an id, it is younger than that in the URL.
        ("?last_event_id=42", "43", "43"),
        ("?last_event_id=42", "", ""),
    ],
)
@pytest.mark.parametrize("method", ["get", "post"])
def test_a_client_that_cannot_send_the_header_says_the_last_event_id_in_the_query(query, header, seen, method):
    view = Finite()
    headers = {} if header is None else {"HTTP_LAST_EVENT_ID": header}
    view.request = getattr(RequestFactory(), method)("/" + query, **headers)
    assert view.get_last_id() == seen


def test_a_plain_response_of_another_view_is_not_touched():
    class Page(BaseSseView):
        def dispatch(self, request, *args, **kwargs):
            return HttpResponse("page")

    assert Page.as_view()(RequestFactory().get("/")).content == b"page"


# --- mistakes, limits and wrapped requests --------------------------------------------------------------------------


def test_an_iterator_that_returns_nothing_is_named(get):
    class Forgetful(BaseSseView):
        def iterator(self):
            self.sse.add_message("", "but no yield")

    with pytest.raises(TypeError, match=r"Forgetful.iterator\(\) must yield, or return an iterable; it returned None"):
        get(Forgetful.as_view())


@override_settings(DJANGO_SSE={"THREADS": 1})
def test_a_browser_beyond_the_limit_is_told_to_come_again_and_another_client_that_it_is_refused(monkeypatch):
    monkeypatch.setattr(views, "workers", views.Workers(lambda: 1, lambda: None))
    factory = AsyncRequestFactory()
    kept = Endless.as_view()(factory.get("/"))
    browser = Endless.as_view()(factory.get("/", headers={"accept": "text/event-stream"}))
    assert browser.status_code == 200
    assert re.fullmatch(rb"retry: 5\d\d\d\n\n", browser.content)  # not all at one moment
    assert browser["Content-Type"] == "text/event-stream"
    other = Endless.as_view()(factory.get("/"))
    assert (other.status_code, other["Retry-After"]) == (503, "5")
    kept.close()


@override_settings(DJANGO_SSE={"RETRY": 3000})
def test_a_browser_that_comes_while_the_process_stops_is_sent_to_the_next_one(registry, get):
    registry.draining = True
    request = RequestFactory().get("/", headers={"accept": "text/event-stream"})
    assert re.fullmatch(rb"retry: 3\d\d\d\n\n", Finite.as_view()(request).content)
    assert get(Finite.as_view()).status_code == 503


def test_a_request_that_rest_framework_has_wrapped_is_still_one_of_an_event_loop():
    class Wrapper:
        def __init__(self, request):
            self._request = request

        def __getattr__(self, name):
            return getattr(self._request, name)

    view = Endless()
    response = view.dispatch(Wrapper(AsyncRequestFactory().get("/")))
    assert response.is_async
    response.close()


@needs_loops
def test_the_thread_of_a_sync_iterator_closes_its_database_connections():
    threads = []

    class Asks(BaseSseView):
        def iterator(self):
            threads.append(threading.get_ident())
            # This thread's own. (SQLite in memory, which the tests use, has nothing to close.)
            connections["default"].close = lambda: threads.append(threading.get_ident())
            yield

    async def main():
        view = Asks()
        view.setup(AsyncRequestFactory().get("/"))
        stream = view._iterator()
        assert [chunk async for chunk in stream] == ["retry: 2000\n\n"]
        stream.close()
        await soon(lambda: len(threads) == 2)

    asyncio.run(main())
    assert threads[0] == threads[1] != threading.get_ident()
