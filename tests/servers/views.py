"""
Views whose iterators the tests drive from outside.

Each stream is named by a key in its URL. It yields nothing before the test opens its gate, and `story()` tells what
became of it, so no test has to guess with sleeps how far a server has come.
"""

import asyncio
import os
import threading
import time
from collections import defaultdict

from django.http import HttpResponse, JsonResponse
from django.views.decorators.csrf import csrf_exempt

from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.views import BaseSseView

PAUSE = 0.02  # seconds between two ticks
LONGEST = 60  # seconds after which a gate gives up, so that a forgotten stream does not hold its thread for ever


class Story:
    """What one stream waits for and what has happened to it."""

    def __init__(self):
        self.gate = threading.Event()
        self.started = 0
        self.closed = 0

    async def opened(self):
        """Wait for the gate on an event loop, which a `threading.Event` cannot wake."""
        while not self.gate.is_set():  # noqa: ASYNC110
            await asyncio.sleep(PAUSE)


stories = defaultdict(Story)


@csrf_exempt
def gate(request, key):
    """Let the stream `key` go on to its first event."""
    stories[key].gate.set()
    return HttpResponse(status=204)


def story(request, key):
    """How often the iterator of `key` was started and how often its `finally` has run."""
    return JsonResponse({"started": stories[key].started, "closed": stories[key].closed})


def tick(view):
    """Add an event that says when it was yielded, on the clock that all processes of a Linux machine share."""
    view.sse.add_message("tick", str(time.monotonic()))


class SyncTicks(BaseSseView):
    """An endless generator."""

    def iterator(self):
        story = stories[self.kwargs["key"]]
        story.started += 1
        try:
            story.gate.wait(LONGEST)
            while True:
                tick(self)
                yield
                time.sleep(PAUSE)
        finally:
            story.closed += 1


class AsyncTicks(BaseSseView):
    """An endless asynchronous generator."""

    async def iterator(self):
        story = stories[self.kwargs["key"]]
        story.started += 1
        try:
            await story.opened()
            while True:
                tick(self)
                yield
                await asyncio.sleep(PAUSE)
        finally:
            story.closed += 1


class Ticker:
    """An endless iterable that is no generator and has a `close()` of its own."""

    def __init__(self, view):
        self.view = view
        self.story = stories[view.kwargs["key"]]
        self.story.started += 1

    def __iter__(self):
        return self

    def __next__(self):
        if self.story.gate.is_set():
            time.sleep(PAUSE)
        self.story.gate.wait(LONGEST)
        tick(self.view)

    def close(self):
        self.story.closed += 1


class IterableTicks(BaseSseView):
    def iterator(self):
        return Ticker(self)


class ListOfTicks(BaseSseView):
    """A list: the messages are there before its first item, and the stream ends after its last."""

    def iterator(self):
        stories[self.kwargs["key"]].started += 1
        tick(self)
        tick(self)
        return [None, None]


class QueueView(RedisQueueView):
    """A channel per URL; the response says which process it comes from."""

    def dispatch(self, request, *args, **kwargs):
        response = super().dispatch(request, *args, **kwargs)
        response["X-Pid"] = str(os.getpid())
        return response

    def get_redis_channel(self):
        return self.kwargs["channel"]


class AsyncQueueView(QueueView):
    """Loops over the stock iterator in an asynchronous one and adds an event of its own to each event."""

    async def iterator(self):
        stories[self.kwargs["channel"]].started += 1
        try:
            async for _ in RedisQueueView.iterator(self):
                self.sse.add_message("seen", "by the subclass")
                yield
        finally:
            stories[self.kwargs["channel"]].closed += 1


@csrf_exempt
def send(request, channel):
    """Send what the form says to `channel`, as an ordinary view of a project does."""
    send_event(request.POST["event"], request.POST["data"], channel)
    return HttpResponse(status=204)
