"""
Streams of logged-in users that use the ORM, and a view that tells what this process has registered.

Each iterator answers the events that the test sends with what a query gave, so that a test knows when all of them have
used the database and wait again.
"""

import asyncio
import gc
import os
import threading

from asgiref.sync import SyncToAsync
from django.contrib.auth import get_user_model, login
from django.core.exceptions import PermissionDenied
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

from django_sse import runtime
from django_sse.database import arelease_connections, release_connections
from django_sse.redisqueue import RedisQueueView
from django_sse.registry import open_streams
from django_sse.views import BaseSseView

PAUSE = 0.2  # seconds between two looks at what the test wants
NAME = "census"

users = get_user_model().objects


class Rounds:
    """How often the streams that no event reaches have been asked to use the database."""

    asked = 0


def log_in(request):
    user, _ = users.get_or_create(username=NAME)
    login(request, user)
    return HttpResponse(status=204)


def ask(request):
    """Have every stream that no event reaches use the database once more."""
    Rounds.asked += 1
    return HttpResponse(status=204)


def process(request):
    """What this process has registered, of ours and of asgiref's; `?collect`: and what nobody can reach is freed."""
    if "collect" in request.GET:
        gc.collect()
    registered = {"streams": len(open_streams), "executors": len(SyncToAsync.context_to_thread_executor)}
    for one in list(runtime._runtimes.values()):
        for name, number in one.stats().items():
            registered[name] = registered.get(name, 0) + number
    # The names are for whoever reads a failure.
    threads = sorted(thread.name for thread in threading.enumerate())
    return JsonResponse({"pid": os.getpid(), "registered": registered, "threads": threads})


class ForUsers:
    """Lets in who is logged in, which two tables of the database tell."""

    def dispatch(self, request, *args, **kwargs):
        if not request.user.is_authenticated:
            raise PermissionDenied
        return super().dispatch(request, *args, **kwargs)


class Queue(ForUsers, RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["channel"]


class CountingQueue(Queue):
    """Looks something up for each event."""

    def iterator(self):
        for _ in RedisQueueView.iterator(self):
            self.sse.add_message("users", str(users.count()))
            yield


class AsyncCountingQueue(Queue):
    """Looks something up before the first event, and for each."""

    async def iterator(self):
        await users.acount()
        async for _ in RedisQueueView.iterator(self):
            self.sse.add_message("users", str(await users.acount()))
            yield


class Counting(ForUsers, BaseSseView):
    """Looks something up whenever it is asked to. Ticks, or a WSGI server would not see that the client has left."""

    def iterator(self):
        answered = None
        while True:
            self.sse.add_message("tick", "")
            if answered != Rounds.asked:
                answered = Rounds.asked
                self.sse.add_message("users", str(users.count()))
            yield
            threading.Event().wait(PAUSE)


class AsyncCounting(ForUsers, BaseSseView):
    """Looks something up whenever it is asked to, and waits in silence otherwise."""

    async def iterator(self):
        answered = None
        while True:
            if answered != Rounds.asked:
                answered = Rounds.asked
                self.sse.add_message("users", str(await users.acount()))
                yield
            await asyncio.sleep(PAUSE)


def first_chunk(request):
    if not request.user.is_authenticated:
        raise PermissionDenied
    return f"data: {users.count()}\n\n"


def endless(chunk):
    yield chunk
    while True:
        threading.Event().wait(PAUSE)
        yield ": \n\n"


async def endless_async(chunk):
    yield chunk
    while True:
        await asyncio.sleep(PAUSE)
        yield ": \n\n"


def own(request):
    """A stream without any of our views, as a project may have written it."""
    return StreamingHttpResponse(endless(first_chunk(request)), content_type="text/event-stream")


def own_async(request):
    return StreamingHttpResponse(endless_async(first_chunk(request)), content_type="text/event-stream")


def own_released(request):
    """The same with our helper."""

    def stream(chunk):
        release_connections()
        yield from endless(chunk)

    return StreamingHttpResponse(stream(first_chunk(request)), content_type="text/event-stream")


def own_released_async(request):
    async def stream(chunk):
        await arelease_connections()
        async for each in endless_async(chunk):
            yield each

    return StreamingHttpResponse(stream(first_chunk(request)), content_type="text/event-stream")


urlpatterns = [
    path("log-in", log_in),
    path("ask", ask),
    path("process", process),
    path("queue/<channel>", Queue.as_view()),
    path("counting-queue/<channel>", CountingQueue.as_view()),
    path("async-counting-queue/<channel>", AsyncCountingQueue.as_view()),
    path("counting", Counting.as_view()),
    path("async-counting", AsyncCounting.as_view()),
    path("own", own),
    path("own-async", own_async),
    path("own-released", own_released),
    path("own-released-async", own_released_async),
]
