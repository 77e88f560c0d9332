"""A bare asynchronous Django view whose stream waits for ever: what a connect costs before anybody adds to it."""

import asyncio
import os

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

settings.configure(ALLOWED_HOSTS=["*"], MIDDLEWARE=[], ROOT_URLCONF=__name__, SECRET_KEY="benchmark")


async def chunks():
    yield "retry: 2000\n\n"
    await asyncio.get_running_loop().create_future()


async def events(request, channel):
    return StreamingHttpResponse(chunks(), content_type="text/event-stream")


def ping(request):
    return HttpResponse(str(os.getpid()))


urlpatterns = [path("events/<str:channel>", events), path("ping", ping)]


def asgi():
    return get_asgi_application()
