"""For a test module that is a Django project itself, with its own URLs: what such modules share."""

import asyncio
import contextlib
import gc
import threading
from typing import ClassVar

from django.test import override_settings

from django_sse import redisqueue
from django_sse.registry import open_streams
from django_sse.views import BaseSseView
from tests.helpers.wait import until


@contextlib.contextmanager
def project(urls, **settings):
    """Have the module `urls` be the project, with no middleware and the broker of this process; wait for all to end."""
    Endless.ended.clear()
    broker = {"location": "memory:"}
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=[], REDIS_SSEQUEUE_CONNECTION_SETTINGS=broker, **settings):
        yield
        # One that was not told of its end is found by the collector.
        until(lambda: gc.collect() >= 0 and len(open_streams) == 0, what="no open stream")
        until(nothing_subscribed, what="no subscription")


def stats():
    """Return how many channels and subscriptions this process has."""
    return redisqueue._runtime().stats()


def nothing_subscribed():
    return stats() == {"channels": 0, "subscriptions": 0}


class Endless(BaseSseView):
    """Ticks for as long as it is open, and notes its end."""

    ended: ClassVar = []

    def iterator(self):
        step = threading.Event()
        try:
            while True:
                self.sse.add_message("", "tick")
                yield
                step.wait(0.01)
        finally:
            self.ended.append(1)


class AEndless(Endless):
    async def iterator(self):
        try:
            while True:
                self.sse.add_message("", "tick")
                yield
                await asyncio.sleep(0.01)
        finally:
            self.ended.append(1)
