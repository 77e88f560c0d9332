"""Django without a library, as answers and tutorials have it: a Redis subscription for each client."""

import os

import redis.asyncio
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

settings.configure(ALLOWED_HOSTS=["*"], MIDDLEWARE=[], ROOT_URLCONF=__name__, SECRET_KEY="benchmark")

REDIS_PORT = int(os.environ["BENCHMARK_REDIS_PORT"])


async def chunks(channel):
    async with redis.asyncio.Redis(port=REDIS_PORT) as client, client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(channel)
        async for message in pubsub.listen():
            yield b"data: %s\n\n" % message["data"]


async def events(request, channel):
    return StreamingHttpResponse(chunks(channel), content_type="text/event-stream")


def ping(request):
    return HttpResponse(str(os.getpid()))


urlpatterns = [path("events/<str:channel>", events), path("ping", ping)]


def asgi():
    return get_asgi_application()
