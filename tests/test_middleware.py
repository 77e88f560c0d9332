"""
Promise S among middleware: what Django brings, and what a project writes, neither holds a stream back nor breaks it.

Django's own handlers run in this process, with and without the hand-over. An iterator goes on to its next event only
when the test has received the one before, so that whatever gathers events cannot pass.
"""

import asyncio
import contextlib
import gc
import io
import itertools
import json
import logging
import queue
import shutil
import subprocess
import threading
from collections import defaultdict
from contextlib import ExitStack

import pytest
from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpResponse
from django.test import override_settings
from django.urls import path
from django.utils.decorators import async_only_middleware
from django.utils.translation import get_language

from django_sse.asgi import SseApplication
from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.registry import open_streams
from django_sse.views import BaseSseView
from tests.helpers.middleware import (
    DJANGOS,
    after,
    failing,
    forbidding,
    looking,
    path_of,
    sync_only,
    wrapping,
    wrapping_in_another,
)
from tests.helpers.need import need
from tests.helpers.project import nothing_subscribed, project
from tests.helpers.servers import serve
from tests.helpers.wait import until
from tests.servers.driver import Driver

HOUSES = ("wsgi", "plain", "handed-over")
KINDS = ("sync", "async", "queue")
HEARTBEAT = 0.05  # seconds; under WSGI a queue view sees by it that its client has left
LONGEST = 5  # seconds for which anything is waited for
OPENING = b"retry: 2000\n\n"
LONG_PAGE = "A page that is worth compressing. " * 100

FEATURES = {
    "gzip": ["django.middleware.gzip.GZipMiddleware"],
    "conditional-get": ["django.middleware.http.ConditionalGetMiddleware"],
    "sessions": ["django.contrib.sessions.middleware.SessionMiddleware"],
    "locale": ["django.middleware.locale.LocaleMiddleware"],
    "messages": [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    "common": ["django.middleware.common.CommonMiddleware"],
    "csrf": ["django.middleware.csrf.CsrfViewMiddleware"],
    "security": ["django.middleware.security.SecurityMiddleware"],
    "clickjacking": ["django.middleware.clickjacking.XFrameOptionsMiddleware"],
}

# --- the project ----------------------------------------------------------------------------------------------------

scripts = defaultdict(queue.SimpleQueue)  # by the key of a stream: what its iterator sends next, None to finish
closed = []  # keys of the streams whose iterator's `finally` has run
keys = map("key-{:04}".format, itertools.count(1))


def use_all(view):
    """Do what the middleware is there for."""
    if hasattr(view.request, "session"):
        view.request.session["seen"] = "yes"
    if hasattr(view.request, "_messages"):
        messages.info(view.request, "Hello.")


class Stream(BaseSseView):
    def dispatch(self, request, *args, **kwargs):
        self.request = request
        use_all(self)
        return super().dispatch(request, *args, **kwargs)

    def add(self, what):
        self.sse.add_message("news", what)


class Sync(Stream):
    def iterator(self):
        script = scripts[self.kwargs["key"]]
        try:
            while (what := script.get(timeout=LONGEST)) is not None:
                self.add(what)
                yield
        finally:
            closed.append(self.kwargs["key"])


class Async(Stream):
    async def iterator(self):
        script = scripts[self.kwargs["key"]]
        try:
            while True:
                while script.empty():  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
                if (what := script.get()) is None:
                    break
                self.add(what)
                yield
        finally:
            closed.append(self.kwargs["key"])


class Queue(Stream, RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["key"]


class SyncLanguage(Sync):
    def add(self, what):
        super().add(get_language())


class AsyncLanguage(Async):
    def add(self, what):
        super().add(get_language())


def page(request):
    return HttpResponse(LONG_PAGE)


urlpatterns = [
    path("sync/<key>", Sync.as_view()),
    path("async/<key>", Async.as_view()),
    path("queue/<key>", Queue.as_view()),
    path("sync-language/<key>", SyncLanguage.as_view()),
    path("async-language/<key>", AsyncLanguage.as_view()),
    path("page", page),
]


def say(kind, key, what):
    """Have a stream send its next event; None: have it finish, if it can."""
    if kind != "queue":
        scripts[key].put(what)
    elif what is not None:
        send_event("news", what, key)


def event(what):
    return f"event: news\ndata: {what}\n\n".encode()


# --- middleware as projects write it ---------------------------------------------------------------------------------


@async_only_middleware
def async_only(get_response):
    async def middleware(request):
        response = await get_response(request)
        response["X-Seen"] = "by async-only middleware"
        return response

    return middleware


@after
def denying(response):
    raise PermissionDenied


# --- the servers ----------------------------------------------------------------------------------------------------


class Response:
    """What a client receives, waited for by the test's thread and brought by another one."""

    def __init__(self):
        self.status = None
        self.headers = {}
        self.body = b""
        self.ended = False
        self._changed = threading.Condition()

    def start(self, status, headers):
        self.status = status
        self.headers = {name.lower(): value for name, value in headers}

    def add(self, chunk):
        with self._changed:
            self.body += chunk
            self._changed.notify_all()

    def end(self):
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def wait_for(self, what):
        self._wait(lambda: what in self.body or self.ended)
        assert what in self.body

    def wait_ended(self):
        self._wait(lambda: self.ended)

    def _wait(self, predicate):
        with self._changed:
            assert self._changed.wait_for(predicate, LONGEST), f"waited in vain: {self.body!r}"


class Wsgi:
    """Django's WSGI handler, and a server of threads before it."""

    def __init__(self, loop):
        self.handler = WSGIHandler()

    @contextlib.contextmanager
    def get(self, url, **headers):
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": url, "SERVER_NAME": "testserver", "SERVER_PORT": "80"}
        environ |= {"wsgi.input": io.BytesIO(), "wsgi.url_scheme": "http"}
        environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        response = Response()
        leaving = threading.Event()
        thread = threading.Thread(target=self._serve, args=(environ, response, leaving))
        thread.start()
        try:
            yield response
        finally:
            leaving.set()
            thread.join(LONGEST)
            assert not thread.is_alive(), "the stream goes on after its client has left"

    def _serve(self, environ, response, leaving):
        def start_response(status, headers):
            response.start(int(status.partition(" ")[0]), headers)

        chunks = self.handler(environ, start_response)
        with contextlib.closing(chunks):
            for chunk in chunks:
                response.add(chunk)
                if leaving.is_set():
                    return
        response.end()


class Asgi:
    """Django's ASGI handler, and a server with an event loop before it."""

    def __init__(self, loop):
        self.handler = ASGIHandler()
        self._loop = loop

    @contextlib.contextmanager
    def get(self, url, **headers):
        response = Response()
        left = asyncio.Event()
        serving = asyncio.run_coroutine_threadsafe(self._serve(url, headers, response, left), self._loop)
        try:
            yield response
        finally:
            self._loop.call_soon_threadsafe(left.set)
            serving.result(LONGEST)

    async def _serve(self, url, headers, response, left):
        requested = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive():
            for message in requested:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                response.start(
                    message["status"], [(name.decode(), value.decode("latin-1")) for name, value in message["headers"]]
                )
            else:
                response.add(message.get("body", b""))
                if not message.get("more_body"):
                    response.end()

        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": url, "headers": named, "query_string": b""}
        await self.handler(scope, receive, send)


class HandedOver(Asgi):
    """The same with the hand-over of the streams."""

    def __init__(self, loop):
        super().__init__(loop)
        self.handler = SseApplication(self.handler)


@pytest.fixture(scope="module")
def loop():
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture
def start(loop):
    """Call with the name of a house and its middleware: a server in this process."""
    storage = "django.contrib.messages.storage.cookie.CookieStorage"
    with project(__name__, DJANGO_SSE={"HEARTBEAT": HEARTBEAT}, MESSAGE_STORAGE=storage), ExitStack() as stack:

        def start(house, middleware):
            stack.enter_context(override_settings(MIDDLEWARE=middleware))
            return {"wsgi": Wsgi, "plain": Asgi, "handed-over": HandedOver}[house](loop)

        yield start


@pytest.fixture
def unlogged():
    """Nothing is logged, for pytest keeps what is, and with an exception the response that it has met."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


each_house = pytest.mark.parametrize("house", HOUSES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def each_of(*middleware):
    return pytest.mark.parametrize("middleware", middleware, ids=lambda one: one.__name__)


def check_one_by_one(response, kind, key, shape=bytes):
    """Check that each event comes before the next one is made, in order, and nothing else with them."""
    expected = shape(OPENING)
    response.wait_for(expected)
    for what in ("one", "two", "three"):
        say(kind, key, what)
        response.wait_for(shape(event(what)))
        expected += shape(event(what))
    assert response.body.replace(b":\n\n", b"") == expected


# --- Django's middleware ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [*FEATURES.values(), DJANGOS], ids=[*FEATURES, "all"])
@each_kind
@each_house
def test_events_come_one_by_one_through_djangos_middleware(start, finished, house, kind, names):
    server = start(house, names)
    key = next(keys)
    headers = {"accept_encoding": "gzip", "accept_language": "de", "if_none_match": '"any"'}
    with server.get(f"/{kind}/{key}", **headers) as response:
        check_one_by_one(response, kind, key)
        assert response.status == 200
        assert response.headers["content-encoding"] == "identity"
        assert response.headers["content-type"] == "text/event-stream"
        assert not {"content-length", "etag"} & set(response.headers)
        # Its content is as the view made it, and the stream has left the handler where it can.
        assert len(finished) == (house == "handed-over")
        say(kind, key, None)
        if kind != "queue":
            response.wait_ended()
    until(lambda: len(finished) == 1, what="the end of the request")


@each_house
def test_the_middleware_is_at_work(start, house):
    """All that the test above shows not to happen to a stream happens to a page, and what may happen does."""
    server = start(house, DJANGOS)
    with server.get("/page", accept_encoding="gzip") as response:
        response.wait_ended()
        assert response.headers["content-encoding"] == "gzip"
        assert response.headers["etag"]
        assert int(response.headers["content-length"]) == len(response.body) < len(LONG_PAGE)
    key = next(keys)
    with server.get(f"/sync/{key}", accept_language="de") as response:
        response.wait_for(OPENING)
        assert "accept-language" in response.headers["vary"].lower()
        assert response.headers["content-language"] == "de"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" in response.headers
        say("sync", key, None)


@pytest.mark.parametrize("kind", ["sync", "async"])
@each_house
def test_each_iterator_speaks_the_language_of_its_client(start, house, kind):
    server = start(house, FEATURES["locale"])
    languages = ("de", "fr", "en")
    with ExitStack() as stack:
        streams = []
        for language in languages:
            key = next(keys)
            response = stack.enter_context(server.get(f"/{kind}-language/{key}", accept_language=language))
            response.wait_for(OPENING)
            streams.append((language, key, response))
        for _ in range(2):
            for language, key, response in streams:
                say(kind, key, "")
                response.wait_for(event(language))
        for language, key, response in streams:
            say(kind, key, None)
            response.wait_ended()
            assert set(response.body.removeprefix(OPENING).split(event(language))) <= {b"", b":\n\n"}


# --- a project's own --------------------------------------------------------------------------------------------------


@each_of(sync_only, async_only)
@each_kind
@each_house
def test_events_come_one_by_one_through_middleware_of_one_kind_only(start, finished, house, kind, middleware):
    server = start(house, [path_of(middleware)])
    key = next(keys)
    with server.get(f"/{kind}/{key}") as response:
        check_one_by_one(response, kind, key)
        assert response.headers["x-seen"] == f"by {middleware.__name__.replace('_', '-')} middleware"
        assert len(finished) == (house == "handed-over")
        say(kind, key, None)


@each_of(wrapping, wrapping_in_another)
@each_kind
@each_house
def test_content_that_middleware_wraps_is_delivered_wrapped_and_within_the_handler(
    start, finished, house, kind, middleware
):
    server = start(house, [*DJANGOS, path_of(middleware)])
    key = next(keys)
    with server.get(f"/{kind}/{key}") as response:
        check_one_by_one(response, kind, key, bytes.upper)
        assert len(finished) == 0
        say(kind, key, None)
        if kind != "queue":
            response.wait_ended()
    if kind != "queue":
        until(lambda: key in closed, what="the end of the iterator")
    # One that was not told is found by the collector.
    until(lambda: gc.collect() is None or nothing_subscribed(), what="the end of the subscription")


@each_kind
@each_house
def test_middleware_that_only_looks_at_the_content_changes_nothing_for_the_client(start, finished, house, kind):
    server = start(house, [path_of(looking)])
    key = next(keys)
    with server.get(f"/{kind}/{key}") as response:
        check_one_by_one(response, kind, key)
        assert len(finished) == 0
        say(kind, key, None)


@each_of(forbidding, denying, failing)
@each_kind
@each_house
def test_a_stream_that_middleware_answers_in_place_of_is_given_back_unread(start, house, kind, middleware, unlogged):
    server = start(house, [path_of(middleware)])
    key = next(keys)
    say(kind, key, "a secret")
    gc.collect()
    gc.disable()  # what is given back must not wait for the collector
    try:
        with server.get(f"/{kind}/{key}") as response:
            response.wait_ended()
            assert response.status == (500 if middleware is failing else 403)
            say(kind, key, "a secret")
            assert b"secret" not in response.body
            assert b"retry" not in response.body
            assert "content-encoding" not in response.headers
        # Where nobody but Django has the response it may be in a cycle: with the exception of which Django has made a
        # page, and under Python 3.10 with frames of asgiref.
        collected = house in ("plain", "wsgi")

        def given_back():
            if collected:
                gc.collect()
            return not len(open_streams) and nothing_subscribed()

        until(given_back, LONGEST, "a free place")
    finally:
        gc.enable()
    assert key not in closed  # it was never begun


# --- on real servers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drivers():
    """Call with the name of a server and of an application: a server with all of Django's middleware."""
    running = {}
    env = {"TEST_MIDDLEWARE": json.dumps(DJANGOS)}
    with ExitStack() as stack:

        def driver(name, app):
            if (name, app) not in running:
                options = {"settings": "tests.servers.safe_settings", "app": app and f"tests.asgi:{app}"}
                running[name, app] = Driver(stack.enter_context(serve(name, env=env, **options)))
            return running[name, app]

        yield driver


@pytest.fixture(
    params=[("gunicorn-gthread", None), ("uvicorn", "plain"), ("uvicorn", "application")],
    ids=lambda param: "-".join(filter(None, param)),
)
def driver(request, drivers):
    return drivers(*request.param)


@pytest.mark.server
def test_events_come_one_by_one_on_a_server_with_all_of_djangos_middleware(driver):
    channel = driver.key()
    with driver.stream(f"queue/{channel}", headers={"Accept-Encoding": "gzip, deflate, br"}) as client:
        client.wait_for(OPENING)
        for number in range(5):
            driver.send(channel, "news", f"{number}")
            assert client.next_message().data == f"{number}"
        assert len(client.messages) == 5
        assert client.headers["content-encoding"] == "identity"
        assert "set-cookie" not in client.headers
    for kind in ("sync", "async"):
        key = driver.key()
        with driver.stream(f"{kind}/{key}", headers={"Accept-Encoding": "gzip"}) as client:
            client.wait_for(OPENING)
            assert client.body == OPENING
            driver.open_gate(key)
            client.wait_for(lambda client: len(client.chunks) >= 5)


@pytest.mark.server
def test_curl_reads_the_stream_although_it_has_asked_for_compression(driver):
    need(shutil.which("curl"), "curl: on Debian `apt-get install curl`")
    channel = driver.key()
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--compressed", "--max-time", "20"]
    with subprocess.Popen(
        [*command, f"{driver.url}/servers/queue/{channel}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as curl:
        try:
            received = curl.stdout.readline()
            assert received == b"retry: 2000\n"
            for number in range(3):
                driver.send(channel, "news", f"{number}")
                while not received.endswith(f"data: {number}\n".encode()):
                    line = curl.stdout.readline()
                    assert line, received
                    received += line
        finally:
            curl.kill()
