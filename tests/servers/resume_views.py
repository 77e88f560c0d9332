"""Streams of several channels, which stand in the path with commas between them."""

from django.urls import path

from django_sse.redisqueue import RedisQueueView
from tests.urls import ping


class QueueView(RedisQueueView):
    def get_redis_channel(self):
        return self.kwargs["channels"].split(",")


urlpatterns = [
    path("ping", ping),
    path("queue/<channels>", QueueView.as_view()),
]
