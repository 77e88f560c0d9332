"""django-sse: its queue view, under ASGI with and without the hand-over, and under WSGI."""

import os

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

from django_sse import asgi
from django_sse.redisqueue import RedisQueueView

settings.configure(
    ALLOWED_HOSTS=["*"],
    INSTALLED_APPS=["django_sse"],
    MIDDLEWARE=[],
    ROOT_URLCONF=__name__,
    SECRET_KEY="benchmark",
    REDIS_SSEQUEUE_CONNECTION_SETTINGS={"location": f"127.0.0.1:{os.environ['BENCHMARK_REDIS_PORT']}"},
    # A burst is further than a browser may be behind by default; nchan is given more room for it as well.
    DJANGO_SSE={"MAILBOX": {"EVENTS": 1_000_000, "BYTES": 1 << 30}},
)


class Events(RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["channel"]


def ping(request):
    return HttpResponse(str(os.getpid()))


urlpatterns = [path("events/<str:channel>", Events.as_view()), path("ping", ping)]


def handover():
    return asgi.get_asgi_application()


def handler():
    return get_asgi_application()


def wsgi():
    return get_wsgi_application()
