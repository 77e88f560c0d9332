"""
Streams that are open when their process is told to stop.

What is known of their ends outlives it: each `finally` and each `stream_closed` is one line of the file that
`TEST_STOPPING_FILE` names.
"""

import asyncio
import os
import time

from django.dispatch import receiver
from django.urls import path

from django_sse.redisqueue import RedisQueueView
from django_sse.signals import stream_closed
from django_sse.views import BaseSseView


def note(*words):
    """Append a line, in one write, which is not mixed up with those of other threads and processes."""
    file = os.open(os.environ["TEST_STOPPING_FILE"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(file, (" ".join(words) + "\n").encode())
    finally:
        os.close(file)


@receiver(stream_closed)
def note_closed(sender, stream, reason, **kwargs):
    if sender.__module__ == __name__:
        note("closed", sender.__name__, reason)


class Sync(BaseSseView):
    def iterator(self):
        try:
            while True:
                yield
                time.sleep(0.1)
        finally:
            note("finally", "Sync")


class Async(BaseSseView):
    async def iterator(self):
        try:
            while True:
                yield
                await asyncio.sleep(3600)  # it is in the middle of its step that it has to end
        finally:
            await asyncio.sleep(0.1)  # its client has left by then, and its server might, too
            note("finally", "Async")


class Queue(RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["channel"]


urlpatterns = [
    path("sync", Sync.as_view()),
    path("async", Async.as_view()),
    path("queue/<channel>", Queue.as_view()),
]
