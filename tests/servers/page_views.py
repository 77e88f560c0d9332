"""
Pages that show what their streams bring, and the streams.

The state of a channel is the list `state:<channel>` in Redis, which stands here for the database.
"""

import json
import os
import time
from pathlib import Path

from django.http import HttpResponse
from django.template import engines
from django.urls import path

from django_sse.redisqueue import RedisQueueView, _connect

PAUSE = 0.01  # seconds between two looks at the gate
LONGEST = 60  # seconds after which a stream gives up waiting for it

# The position first and then the state: what is published in between is shown by both, and not by neither.
PAGE = """{% load django_sse %}<!doctype html>
<title>A page with a stream</title>
<link rel="icon" href="data:,">
<script>
  window.resuming = "/news/{{ channel }}?last_event_id={% sse_cursor channel %}";
  window.rendered = {{ state|safe }};
  // What the stream has brought, oldest first, as "type data".
  window.shown = [];
  window.listen = (url) => {
    window.source = new EventSource(url);
    const show = (event) => window.shown.push(`${event.type} ${event.data}`);
    for (const name of ["state", "news", "stream-reset"]) window.source.addEventListener(name, show);
  };
</script>
"""


def state(channel):
    return [item.decode() for item in _connect().lrange(f"state:{channel}", 0, -1)]


def page(request, channel):
    """A page with the state of its channel in its HTML. It is the test that has it listen."""
    context = {"channel": channel, "state": lambda: json.dumps(state(channel))}
    return HttpResponse(engines["django"].from_string(PAGE).render(context))


class News(RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["channel"]


class Board(News):
    """Sends the state first, which takes as long as the test wants: there is a gate, which is a file."""

    def initial(self):
        items = state(self.kwargs["channel"])
        wait_at_gate(self.kwargs["channel"])
        for item in items:
            self.sse.add_message("state", item)
            yield


def wait_at_gate(channel):
    _connect().set(f"waiting:{channel}", "1")
    gate = Path(os.environ["TEST_PAGE_GATE"])
    deadline = time.monotonic() + LONGEST
    while not gate.exists() and time.monotonic() < deadline:
        time.sleep(PAUSE)


def ping(request):
    return HttpResponse(os.environ.get("TEST_SERVER_TOKEN", ""))


urlpatterns = [
    path("ping", ping),
    path("page/<channel>", page),
    path("news/<channel>", News.as_view()),
    path("board/<channel>", Board.as_view()),
]
