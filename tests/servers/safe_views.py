"""Streams that are limited, slow to be decided, or fail, and the page of a browser whose stream may be refused."""

import asyncio
import inspect
import time

from django.contrib.auth.models import User
from django.core.exceptions import PermissionDenied
from django.http import HttpResponse
from django.urls import path
from django.utils.decorators import sync_and_async_middleware
from django.views.decorators.csrf import csrf_exempt

from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.views import BaseSseView
from tests.servers.views import LONGEST, PAUSE, QueueView, stories

SECRET = "the password of the database"


def log_in(request):
    if request.headers.get("X-User", "").isdecimal():
        request.user = User(pk=int(request.headers["X-User"]))


@sync_and_async_middleware
def log_in_who_says_so(get_response):
    """Make whoever sends a number in `X-User` the user with that primary key, without a database."""
    if inspect.iscoroutinefunction(get_response):

        async def middleware(request):
            log_in(request)
            return await get_response(request)

    else:

        def middleware(request):
            log_in(request)
            return get_response(request)

    return middleware


class OfATenant(QueueView):
    """Counted by tenant and not by user."""

    def get_owner(self):
        return self.request.headers.get("X-Tenant")


class Undecided(QueueView):
    """Does not know its channel before the test opens the gate of that name."""

    def get_redis_channel(self):
        story = stories[self.kwargs["channel"]]
        story.started += 1
        story.gate.wait(LONGEST)
        story.closed += 1
        return self.kwargs["channel"]


class LastId(BaseSseView):
    """Ends after one event, which tells the id that the client says it has seen."""

    def iterator(self):
        last_id = self.get_last_id()
        self.sse.add_message("last-id", "none" if last_id is None else ascii(last_id))
        yield


class Forbidden(QueueView):
    def get_redis_channel(self):
        raise PermissionDenied


class GetOnly(QueueView):
    http_method_names = ("get",)


class Ticks(BaseSseView):
    """Goes on for as long as somebody listens."""

    def iterator(self):
        while True:
            self.sse.add_message("tick", "")
            yield
            time.sleep(PAUSE)


class AsyncTicks(BaseSseView):
    async def iterator(self):
        while True:
            self.sse.add_message("tick", "")
            yield
            await asyncio.sleep(PAUSE)


class Failing(BaseSseView):
    def iterator(self):
        self.sse.add_message("before", "")
        yield
        raise RuntimeError(SECRET)


class AsyncFailing(BaseSseView):
    async def iterator(self):
        self.sse.add_message("before", "")
        yield
        raise RuntimeError(SECRET)


class FailingAtOnce(BaseSseView):
    def iterator(self):
        raise RuntimeError(SECRET)
        yield


class FailingQueue(RedisQueueView):
    """Fails at its first event."""

    def get_redis_channel(self):
        return self.kwargs["key"]

    def iterator(self):
        for _ in RedisQueueView.iterator(self):
            raise RuntimeError(SECRET)
            yield


class Attempts:
    """How often a browser has asked for what is never served."""

    counted = 0


def unavailable(request):
    Attempts.counted += 1
    return HttpResponse(status=503, headers={"Retry-After": "1"})


def attempts(request):
    return HttpResponse(str(Attempts.counted))


PAGE = """<!doctype html>
<title>A page with a stream</title>
<link rel="icon" href="data:,">
<script>
  // What has happened, oldest first: [name, readyState, data].
  window.happened = [];
  window.listen = (url) => {
    window.source = new EventSource(url);
    const note = (event) => window.happened.push([event.type, window.source.readyState, event.data ?? ""]);
    for (const name of ["open", "error", "news"]) window.source.addEventListener(name, note);
  };
</script>
"""


def page(request):
    """Nothing but the means to listen; it is never loaded again by itself."""
    return HttpResponse(PAGE)


@csrf_exempt
def send_any(request, channel):
    send_event("news", "from the inside", channel)
    return HttpResponse(status=204)


urlpatterns = [
    path("any/<path:channel>", QueueView.as_view()),
    path("send-any/<path:channel>", send_any),
    path("tenant/<channel>", OfATenant.as_view()),
    path("undecided/<channel>", Undecided.as_view()),
    path("last-id", LastId.as_view()),
    path("ticks/sync", Ticks.as_view()),
    path("ticks/async", AsyncTicks.as_view()),
    path("forbidden/<channel>", Forbidden.as_view()),
    path("get-only/<channel>", GetOnly.as_view()),
    path("failing/sync/<key>", Failing.as_view()),
    path("failing/async/<key>", AsyncFailing.as_view()),
    path("failing/at-once/<key>", FailingAtOnce.as_view()),
    path("failing/queue/<key>", FailingQueue.as_view()),
    path("unavailable", unavailable),
    path("attempts", attempts),
    path("page", page),
]
