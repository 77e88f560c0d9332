"""
Streams that the tests end in every way there is, and what has been seen of their ends from within the process.

A stream plays in a mode, `tick` (an event now and then), `quiet` (nothing), `flood` (more than any buffer holds) or
`jam` (the same, with all the time in the world), until the test tells it to `raise` or to `finish`. The iterators over
the queue do so event by event.
"""

import asyncio
import logging
import time
from collections import defaultdict

from asgiref.sync import sync_to_async
from django.http import HttpResponse, JsonResponse
from django.urls import path

from django_sse.redisqueue import RedisQueueView, send_event
from django_sse.signals import stream_closed, stream_opened
from django_sse.views import BaseSseView

PAUSE = 0.02  # seconds between two steps
CLEARING_UP = 0.1  # seconds that it takes to run a `finally`
FLOODS = ("flood", "jam")
BIG = "x" * 2**18  # the data of one event of a flood

log = logging.getLogger("django_sse.tests")  # where the package's own lines go, too


class Story:
    """What one stream is told and what has happened to it."""

    def __init__(self):
        self.told = None
        self.started = 0
        self.steps = 0
        self.closed = 0
        self.opened_signals = 0
        self.closed_signals = []

    def close(self):
        """The last that a `finally` does."""
        self.closed += 1


stories = defaultdict(Story)


def story_of(stream):
    return stories[stream.path.rpartition("/")[2]]


def note_opened(sender, stream, **kwargs):
    story_of(stream).opened_signals += 1


def note_closed(sender, stream, reason, events, bytes, seconds, **kwargs):  # noqa: A002 (the signal's own name)
    ended = {"view": sender.__name__, "reason": reason, "events": events, "bytes": bytes, "seconds": seconds}
    story_of(stream).closed_signals.append(ended)


def story(request, key):
    return JsonResponse(vars(stories[key]))


def tell(request, key, what):
    stories[key].told = what
    send_event("told", what, key)  # what the iterators over the queue are waken by
    return HttpResponse(status=204)


class Played:
    """One step of a stream, the same for all kinds of iterators."""

    def setup(self, request, *args, **kwargs):
        super().setup(request, *args, **kwargs)
        if kwargs["mode"] == "jam":
            self.stall_timeout = None

    def begin(self):
        story = stories[self.kwargs["key"]]
        story.started += 1
        return story

    def over(self, story):
        """Do what the mode or the test says; return whether the stream has come to its end."""
        story.steps += 1
        what = story.told or self.kwargs["mode"]
        if what == "raise":
            raise RuntimeError(f"the secret of {self.kwargs['key']}")
        if what == "tick":
            self.sse.add_message("tick", "")
        if what in FLOODS:
            self.sse.add_message("flood", BIG)
        return what == "finish"

    def get_redis_channel(self):
        return self.kwargs["key"]


class Sync(Played, BaseSseView):
    def iterator(self):
        story = self.begin()
        try:
            while not self.over(story):
                yield
                time.sleep(PAUSE)
        finally:
            log.info("finally of %s", self.kwargs["key"])
            time.sleep(CLEARING_UP)
            story.close()


class Async(Played, BaseSseView):
    """Its `finally` has to be awaited, as one that writes to the database."""

    async def iterator(self):
        story = self.begin()
        try:
            while not self.over(story):
                yield
                await asyncio.sleep(PAUSE)
        finally:
            log.info("finally of %s", self.kwargs["key"])
            await asyncio.sleep(CLEARING_UP)
            await sync_to_async(story.close)()


class Stock(Played, RedisQueueView):
    """The queue as it comes."""


class Queue(Played, RedisQueueView):
    def iterator(self):
        story = self.begin()
        try:
            for _ in RedisQueueView.iterator(self):
                if self.over(story):
                    break
                yield
                while self.kwargs["mode"] in FLOODS:
                    self.over(story)
                    yield
                    time.sleep(PAUSE)
        finally:
            log.info("finally of %s", self.kwargs["key"])
            time.sleep(CLEARING_UP)
            story.close()


class AsyncQueue(Played, RedisQueueView):
    async def iterator(self):
        story = self.begin()
        try:
            async for _ in RedisQueueView.iterator(self):
                if self.over(story):
                    break
                yield
                while self.kwargs["mode"] in FLOODS:
                    self.over(story)
                    yield
                    await asyncio.sleep(PAUSE)
        finally:
            log.info("finally of %s", self.kwargs["key"])
            await asyncio.sleep(CLEARING_UP)
            await sync_to_async(story.close)()


# Of these views alone: the streams of the other tests shall not be slowed down.
for view in (Sync, Async, Stock, Queue, AsyncQueue):
    stream_opened.connect(note_opened, sender=view)
    stream_closed.connect(note_closed, sender=view)

urlpatterns = [
    path("sync/<mode>/<key>", Sync.as_view()),
    path("async/<mode>/<key>", Async.as_view()),
    path("stock/<mode>/<key>", Stock.as_view()),
    path("queue/<mode>/<key>", Queue.as_view()),
    path("async-queue/<mode>/<key>", AsyncQueue.as_view()),
    path("story/<key>", story),
    path("tell/<key>/<what>", tell),
]
