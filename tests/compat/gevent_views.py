"""The shape that needs gevent, apart from the others so that no other server imports it."""

import itertools

import gevent

from django_sse.views import BaseSseView

TICK = 0.05  # seconds between two events


class GeventTimeout(BaseSseView):
    """gevent.Timeout around the loop bounds the life of the stream."""

    def iterator(self):
        with gevent.Timeout(TICK * 10, False):
            for n in itertools.count(1):
                self.sse.add_message("time", str(n))
                yield
                gevent.sleep(TICK)
        self.sse.add_message("over", "")
        yield
