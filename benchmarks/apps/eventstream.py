"""django-eventstream: its view, with its own Redis listener, as its manual has it for several processes."""

import os

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import include, path

settings.configure(
    ALLOWED_HOSTS=["*"],
    EVENTSTREAM_REDIS={"host": "127.0.0.1", "port": int(os.environ["BENCHMARK_REDIS_PORT"])},
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django_eventstream"],
    MIDDLEWARE=[],
    ROOT_URLCONF=__name__,
    SECRET_KEY="benchmark",
)


def ping(request):
    return HttpResponse(str(os.getpid()))


urlpatterns = [
    path("events/<str:channel>", include("django_eventstream.urls"), {"format-channels": ["{channel}"]}),
    path("ping", ping),
]


def asgi():
    return get_asgi_application()
