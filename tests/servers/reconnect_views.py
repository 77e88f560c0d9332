"""Streams of one channel and of several, and a publisher for the broker that only its own process can reach."""

import os
import threading

from django.http import HttpResponse, JsonResponse
from django.urls import path

from django_sse.redisqueue import RedisQueueView
from tests.servers import reconnect_publish


def ping(request):
    return HttpResponse(os.environ.get("TEST_SERVER_TOKEN", ""))


class Queue(RedisQueueView):
    """The channels that the path names, with commas between them."""

    def get_redis_channel(self):
        return self.kwargs["channels"].split(",")


publishers = []  # threads


def publish(request, **arguments):
    """Have a thread of this process publish."""
    publishers.append(threading.Thread(target=reconnect_publish.publish, kwargs=arguments))
    publishers[-1].start()
    return HttpResponse(status=204)


def published(request):
    """Whether all of them have done so."""
    return JsonResponse(not any(thread.is_alive() for thread in publishers), safe=False)


urlpatterns = [
    path("ping", ping),
    path("queue/<channels>", Queue.as_view()),
    path("published", published),
    path("publish/<way>/<int:first>/<int:count>/<channels>", publish),
]
