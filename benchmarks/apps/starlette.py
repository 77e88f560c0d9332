"""sse-starlette: one Redis reader for the process, a queue for each client."""

import asyncio
import os

from redis.asyncio import Redis
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route


class Broadcast:
    """Hands what is published to the queues of its channel."""

    def __init__(self):
        redis = Redis(port=int(os.environ["BENCHMARK_REDIS_PORT"]), decode_responses=True)
        self.pubsub = redis.pubsub(ignore_subscribe_messages=True)
        self.queues = {}
        self.subscribing = asyncio.Lock()  # two first commands at a time would make two connections
        self.reader = None

    async def read(self):
        async for message in self.pubsub.listen():
            for queue in self.queues[message["channel"]]:
                queue.put_nowait(message["data"])

    async def events(self, channel):
        queue = asyncio.Queue()
        if channel not in self.queues:
            self.queues[channel] = set()
            async with self.subscribing:
                await self.pubsub.subscribe(channel)
            self.reader = self.reader or asyncio.create_task(self.read())
        self.queues[channel].add(queue)
        try:
            while True:
                yield {"data": await queue.get()}
        finally:
            self.queues[channel].discard(queue)


def asgi():
    broadcast = Broadcast()

    async def events(request):
        return EventSourceResponse(broadcast.events(request.path_params["channel"]))

    async def ping(request):
        return PlainTextResponse(str(os.getpid()))

    return Starlette(routes=[Route("/events/{channel}", events), Route("/ping", ping)])
