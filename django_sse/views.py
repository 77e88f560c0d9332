"""``BaseSseView``: a Django view whose ``iterator()`` is the stream.

The view decides, in Django's own way (URLs, middleware, permissions); the stream it returns lives on in ``streams``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils import timezone, translation
from django.utils.decorators import method_decorator
from django.utils.functional import classproperty
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import View
from sse import Sse as PlainSse

from .conf import check_seconds, configuration
from .exceptions import TooManyStreams
from .feeds import Chunk, Source, flush_sse, has_own_iter
from .handover import SCOPE_KEY, EventStreamResponse, Handover
from .inbox import Mailboxes
from .registry import Account, StreamInfo, open_streams
from .streams import Stream
from .wire import Sse, retry
from .workers import Workers, on_gevent

__all__ = ["BaseSseView"]

log = logging.getLogger("django_sse")

#: Seconds after which a client that was refused may come again.
RETRY_AFTER = 5

workers = Workers(limit=lambda: configuration.threads, at_exit=connections.close_all)


class BaseSseView(View):
    """A stream of server-sent events, written as a generator::

        class Clock(BaseSseView):
            def iterator(self):
                while True:
                    self.sse.add_message("time", str(time.time()))
                    yield
                    time.sleep(1)

    Any HTTP method is answered with the stream, ``HEAD`` with its headers alone, unless ``http_method_names`` is
    narrowed. The view is exempt from CSRF checks.
    """

    #: What ``iterator()`` fills; each of its steps sends what is in it.
    sse: PlainSse
    #: Milliseconds before the browser reconnects. ``None``: ``DJANGO_SSE["RETRY"]``.
    retry: int | None = None
    #: Seconds of silence before a heartbeat; ``None``: no heartbeats. Not set: ``DJANGO_SSE["HEARTBEAT"]``. A plain
    #: generator under WSGI has none: its thread can wait for one thing only.
    heartbeat: Any = classproperty(lambda cls: configuration.heartbeat)
    #: Seconds after which the stream ends, give or take 20 %; ``None``: never. Not set: ``DJANGO_SSE["MAX_AGE"]``.
    max_age: Any = classproperty(lambda cls: configuration.max_age)
    #: Seconds for which a client may leave unread what it was sent. Not set: ``DJANGO_SSE["STALL_TIMEOUT"]``.
    stall_timeout: Any = classproperty(lambda cls: configuration.stall_timeout)

    # Whether the chunks of iterator() go into another stream of this view, which speaks for both.
    _has_stream = False

    @classmethod
    def as_view(cls, **initkwargs: Any) -> Callable[..., HttpResponseBase]:
        """Return the view function, as ``View.as_view()`` does.

        Whatever ``dispatch()`` streams is made to fit the server. A client beyond ``DJANGO_SSE["THREADS"]`` is told to
        come again: an ``EventSource`` by an empty stream, others by status 503.
        """
        view = super().as_view(**initkwargs)

        # Around dispatch() and not in it: a subclass may write its own and build the response there.
        @functools.wraps(view)
        def sse_view(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
            try:
                return _suit(view(request, *args, **kwargs), request)
            except TooManyStreams as error:
                return _refuse(request, error)

        return sse_view

    @method_decorator(csrf_exempt)
    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Return the streaming response."""
        self.request = request
        self.args = args
        self.kwargs = kwargs
        if not self._allows("GET" if request.method == "HEAD" else request.method or ""):
            return HttpResponseNotAllowed([name.upper() for name in self.http_method_names])
        self.sse = self._buffer()
        handover: Handover | None = None
        if request.method == "HEAD":
            stream = _nothing(request)
        else:
            with self._given_back_on_error():
                self._open()
                chunks = self._iterator()
                stream = chunks if isinstance(chunks, Stream) else self._wrap(chunks)
            handover = _scope(request).get(SCOPE_KEY)
        response = EventStreamResponse(stream.for_server(), handover)
        # no-transform keeps compressing proxies from holding events back, and X-Accel-Buffering does so for nginx.
        response["Cache-Control"] = "no-cache, no-transform"
        response["X-Accel-Buffering"] = "no"
        # GZipMiddleware leaves alone what says how it is encoded. It would hold events back before Django 6.1, and take
        # a compressor's memory for each stream since.
        response["Content-Encoding"] = "identity"
        response["Software"] = "django-sse"
        return response

    def _allows(self, method: str) -> bool:
        # Django's own list is no filter here: every method streams until a subclass narrows it.
        return self.http_method_names == View.http_method_names or method.lower() in self.http_method_names

    def get_last_id(self) -> str | None:
        """Return the last event ID that the client has seen, or ``None`` on a first connect.

        That is ``Last-Event-ID``, or the query's ``last_event_id`` for clients that cannot send the header: a page that
        has just been loaded, or a polyfill.
        """
        value = self.request.META.get("HTTP_LAST_EVENT_ID")
        if not isinstance(value, str):
            return self.request.GET.get("last_event_id")
        # Servers hand headers on as latin-1; browsers send the id as UTF-8 (WHATWG HTML, section 9.2.3).
        try:
            return value.encode("latin-1").decode()
        except UnicodeError:
            return value

    def get_owner(self) -> Hashable:
        """Return whose stream it is, for ``DJANGO_SSE["MAX_STREAMS_PER_USER"]``: by default the user's primary key.

        ``None``, for somebody who is not logged in: not counted.
        """
        user = getattr(self.request, "user", None)
        return user.pk if user is not None and user.is_authenticated else None

    def iterator(self) -> Iterable[object] | AsyncIterable[object]:
        """Fill ``self.sse`` and yield, again and again: each step sends what is in it. To be written by the subclass.

        May be a generator, an ``async def`` generator, or return any iterable; what it yields is ignored. Its
        ``finally`` runs when the client has left.
        """
        raise NotImplementedError(f"{type(self).__name__} must define iterator()")

    def _iterator(self) -> Iterable[Any] | AsyncIterable[Any]:
        """Return the chunks of the stream, as text, in the way that suits the request: what an own response streams."""
        with self._given_back_on_error():
            self._open()
            iterator: Any = self.iterator()
            if inspect.iscoroutine(iterator):
                iterator = _Returned(iterator)
            elif not (hasattr(iterator, "__iter__") or hasattr(iterator, "__aiter__")):
                name = f"{type(self).__name__}.iterator()"
                raise TypeError(f"{name} must yield, or return an iterable; it returned {iterator!r}")
            if not hasattr(self, "sse"):  # an instance that dispatch() has not seen
                self.sse = self._buffer()
            return self._stream(iterator)

    @functools.cached_property
    def _mailboxes(self) -> Mailboxes:
        """What is subscribed to for this request, and ends with its stream."""
        return Mailboxes()

    @contextlib.contextmanager
    def _given_back_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._mailboxes.close()
            raise

    def _open(self) -> None:
        """Get ready before any header is sent. May be called again, and does nothing then."""

    def _stream(self, iterator: Iterable[object] | AsyncIterable[object] | None, **source: Any) -> Stream:
        """Return the stream of the steps of ``iterator``, each of which flushes ``self.sse``."""
        # Not counted: an instance that dispatch() has not seen, and a stream that speaks through another one.
        counted = hasattr(self, "request") and not self._has_stream
        if counted or iterator is None:
            source["heartbeat"] = self._seconds("heartbeat", "for no heartbeats")
        source.update(first=self._first_chunks(), mailboxes=self._mailboxes)
        source.update(buffer=lambda: self.sse, prepare=_same_locale())
        return self._counted(Source(iterator, lambda value: flush_sse(self.sse), **source), counted=counted)

    def _wrap(self, chunks: Iterable[Any] | AsyncIterable[Any]) -> Stream:
        """Return the stream of the ``chunks`` that an ``_iterator()`` of a subclass gives."""
        self._has_stream = True
        heartbeat = self._seconds("heartbeat", "for no heartbeats")
        source = Source(
            chunks,
            _as_it_is,
            first=self._first_chunks(),
            heartbeat=heartbeat,
            mailboxes=self._mailboxes,
            prepare=_same_locale(),
        )
        return self._counted(source, counted=True)

    def _counted(self, source: Source, *, counted: bool) -> Stream:
        if not counted:
            return _stream(source, getattr(self, "request", None))
        owner_limit = configuration.max_streams_per_user
        owner = None if owner_limit is None else self.get_owner()
        info = StreamInfo(type(self), self.request.path, tuple(self._channels()), owner)
        account = Account(info, self._option("retry") or configuration.retry)
        stream = _stream(
            source,
            self.request,
            account=account,
            max_age=self._seconds("max_age", "for no limit"),
            stall_timeout=self._seconds("stall_timeout", "for no limit"),
        )
        try:
            open_streams.admit(stream, limit=configuration.max_streams, owner=owner, owner_limit=owner_limit)
        except TooManyStreams:
            stream.close()
            raise
        return stream

    def _channels(self) -> Iterable[str]:
        """Return what the stream listens to, for the log."""
        return ()

    def _seconds(self, name: str, none: str) -> float | None:
        return check_seconds(f"{type(self).__name__}.{name}", self._option(name), none)

    def _first_chunks(self) -> Iterator[Chunk]:
        # What is there already (``retry``) leaves at once, unless the buffer's own iteration might wait for more.
        if not has_own_iter(self.sse):
            yield from flush_sse(self.sse)

    def _buffer(self) -> Sse:
        retry = self._option("retry")
        return Sse(default_retry=configuration.retry if retry is None else retry)

    def _option(self, name: str) -> Any:
        """Return the class attribute ``name``; the setting of that name where a subclass calls a method so."""
        value = getattr(self, name)
        return getattr(configuration, name) if callable(value) else value


def _same_locale() -> Callable[[], None]:
    """Return what activates, in another thread or task, the language and time zone that are active in this one."""
    language, zone = translation.get_language(), timezone.get_current_timezone()

    def activate() -> None:
        if language is not None:
            translation.activate(language)
        timezone.activate(zone)

    return activate


def _on_loop(request: HttpRequest | None) -> bool:
    # Django REST framework wraps requests, and keeps Django's own under this name.
    return isinstance(getattr(request, "_request", request), ASGIRequest)


def _scope(request: HttpRequest) -> Mapping[str, Any]:
    return getattr(getattr(request, "_request", request), "scope", {})


def _stream(source: Source, request: HttpRequest | None, **limits: Any) -> Stream:
    on_loop = _on_loop(request)
    if not on_loop and on_gevent() and source.kind(on_loop=False) == "async":
        raise ImproperlyConfigured(
            "An async iterator() cannot run on a gevent server: asyncio takes all greenlets of a thread for one, so "
            "every other request would seem to run inside its event loop. Write it as a plain generator (`def`, not "
            "`async def`), or serve this view through ASGI."
        )
    return Stream(source, workers, on_loop=on_loop, **limits)


def _refuse(request: HttpRequest, error: TooManyStreams) -> HttpResponse:
    log.log(logging.INFO if open_streams.draining else logging.WARNING, "A stream is refused: %s", error)
    if "text/event-stream" in request.headers.get("Accept", ""):
        # An EventSource takes any status but 200 for the end of all attempts (WHATWG HTML, section 9.2.3).
        # Jitter, for clients that were refused in one moment must not come back in one moment. A process that stops is
        # soon followed by the next.
        milliseconds = configuration.retry if open_streams.draining else RETRY_AFTER * 1000
        response = HttpResponse(
            retry(milliseconds + random.randrange(1000)),
            content_type="text/event-stream",
        )
    else:
        response = HttpResponse(f"{error}\n", status=503, content_type="text/plain; charset=utf-8")
    response["Cache-Control"] = "no-store"
    response["Retry-After"] = str(RETRY_AFTER)
    return response


def _suit(response: HttpResponseBase, request: HttpRequest) -> HttpResponseBase:
    """Make any streaming response fit the server: a dispatch() of old may hand a plain generator to an event loop."""
    if not isinstance(response, StreamingHttpResponse):
        return response
    on_loop = _on_loop(request)
    if response.headers.get("Content-Type", "").startswith("text/event-stream"):
        response.headers.setdefault("Content-Encoding", "identity")
    if request.method == "HEAD":
        response.streaming_content = _nothing(request)
    elif response.is_async is not on_loop:
        response.streaming_content = _stream(Source(response.streaming_content, _as_it_is), request).for_server()
    return response


def _as_it_is(chunk: Any) -> Iterable[Chunk]:
    return () if chunk is None else (chunk,)


def _nothing(request: HttpRequest) -> Stream:
    return Stream(Source(_NoSteps(), lambda value: ()), workers, on_loop=_on_loop(request))


class _NoSteps:
    """An iterable of nothing, for threads and loops alike."""

    def __iter__(self) -> _NoSteps:
        return self

    def __next__(self) -> object:
        raise StopIteration

    def __aiter__(self) -> _NoSteps:
        return self

    async def __anext__(self) -> object:
        raise StopAsyncIteration


class _Returned:
    """The steps of what an ``async def iterator()`` without a ``yield`` returns."""

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine
        self._steps: Any = None

    def __aiter__(self) -> _Returned:
        return self

    async def __anext__(self) -> object:
        if self._steps is None:
            self._steps = _async_steps(await self._coroutine)
        return await anext(self._steps)

    async def aclose(self) -> None:
        if self._steps is not None:
            await self._steps.aclose()

    def close(self) -> None:
        self._coroutine.close()


async def _async_steps(steps: Any) -> AsyncIterator[object]:
    if hasattr(steps, "__aiter__"):
        async for step in steps:
            yield step
    elif hasattr(steps, "__next__"):
        raise TypeError("async def iterator() must yield, or return an async iterable or a list: others would block")
    else:
        for step in steps:
            yield step
