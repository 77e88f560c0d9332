"""
Streams under load, quiet ones, and such that grow old; and what the process still has of all of them.

The first part of a path says with which attributes the view is used (`WAYS`), the second what kind of iterator it has.
"""

import asyncio
import gc
import threading
import time
from collections import Counter, defaultdict

from django.http import HttpResponse, JsonResponse
from django.urls import path

from django_sse.redisqueue import RedisQueueView
from django_sse.views import BaseSseView

LONGEST = 60  # seconds after which an iterator gives up that has not been told anything
PAUSE = 0.05  # seconds between two events of an iterator that is not quiet
MAX_AGE = 1  # seconds
SHORT = 0.5  # seconds of another one, where it is not compared
STALL_TIMEOUT = 2  # seconds

#: What a stream consists of in the memory of a process, its mailbox and Django's part included.
PARTS = ("ASGIRequest", "Delivery", "Listener", "Stream", "Subscription", "WSGIRequest")


class Story:
    """What a quiet stream waits for, and how often its wait was begun and cancelled."""

    def __init__(self):
        self.told = threading.Event()
        self.loop = None
        self.future = None
        self.waits = 0
        self.cancelled = 0

    def tell(self):
        self.told.set()
        if self.future is not None:
            self.loop.call_soon_threadsafe(self.future.set_result, None)


stories = defaultdict(Story)


class Sync(BaseSseView):
    """Waits in one step for as long as the test wants it to."""

    def iterator(self):
        story = stories[self.kwargs["key"]]
        story.waits += 1
        story.told.wait(LONGEST)
        self.sse.add_message("told", "")
        yield


class Async(BaseSseView):
    """Awaits one future for as long as the test wants it to."""

    async def iterator(self):
        story = stories[self.kwargs["key"]]
        story.waits += 1
        story.loop = asyncio.get_running_loop()
        story.future = story.loop.create_future()
        try:
            await asyncio.wait_for(story.future, LONGEST)
        except asyncio.CancelledError:
            story.cancelled += 1
            raise
        self.sse.add_message("told", "")
        yield


class Queue(RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["key"]


class AsyncQueue(Queue):
    async def iterator(self):
        async for _ in RedisQueueView.iterator(self):
            yield


class BusySync(BaseSseView):
    def iterator(self):
        while True:
            self.sse.add_message("tick", "")
            yield
            time.sleep(PAUSE)


class BusyAsync(BaseSseView):
    async def iterator(self):
        while True:
            self.sse.add_message("tick", "")
            yield
            await asyncio.sleep(PAUSE)


class Commenting(BaseSseView):
    """Breaks its silence itself, for where nobody else can."""

    def iterator(self):
        while True:
            self.sse.add_comment("still here")
            yield
            time.sleep(PAUSE)


def tell(request, key):
    stories[key].tell()
    return HttpResponse(status=204)


def story(request, key):
    return JsonResponse({"waits": stories[key].waits, "cancelled": stories[key].cancelled})


def parts(request):
    """How many parts of streams there are in this process."""
    gc.collect()
    counted = Counter(type(one).__name__ for one in gc.get_objects())
    return JsonResponse({name: counted[name] for name in PARTS})


KINDS = {
    "sync": Sync,
    "async": Async,
    "queue": Queue,
    "async-queue": AsyncQueue,
    "busy-sync": BusySync,
    "busy-async": BusyAsync,
    "commenting": Commenting,
}
WAYS = {
    "default": {},
    "off": {"heartbeat": None},
    "seldom": {"heartbeat": LONGEST},
    "zero": {"heartbeat": 0},
    "negative": {"heartbeat": -1.5},
    "aging": {"max_age": MAX_AGE},
    "short": {"max_age": SHORT},
    "stalling": {"stall_timeout": STALL_TIMEOUT},
}

urlpatterns = [
    path("tell/<key>", tell),
    path("story/<key>", story),
    path("parts", parts),
    *(
        path(f"{way}/{kind}/<key>", view.as_view(**attributes))
        for way, attributes in WAYS.items()
        for kind, view in KINDS.items()
    ),
]
