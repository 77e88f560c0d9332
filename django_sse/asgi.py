"""The ASGI application whose open streams hold nothing but their socket.

Django's view decides (URLs, middleware, sessions, permissions) and leaves: its handler ends like that of any other
response, and this application, which has the client's ``send`` and ``receive``, delivers the stream.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from django.core.asgi import get_asgi_application as get_django_application

from . import contexts, shutdown
from .handover import SCOPE_KEY, Handover
from .pump import Delivery

__all__ = ["SseApplication", "get_asgi_application"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]


class SseApplication:
    """An ASGI application around ``app``, which is Django's or leads to it (Channels' router, say)."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                # Servers put their own signal handlers in place after they have imported the application.
                shutdown.install()
                contexts.begin()
            await self.app(scope, receive, send)
            return
        handover, client = Handover(send), _Client(receive)
        try:
            serving = self._serve({**scope, SCOPE_KEY: handover}, client.receive, handover.send)
            # Not in the task's own context, which would keep what middleware sets there: the request, for instance.
            await contexts.run(contextvars.copy_context(), serving)
        except BaseException:
            handover.withdraw()
            raise
        stream = handover.taken()
        if stream is not None:
            receive = client.rest()
            del handover, client, serving
            # All that this frame holds, every open stream holds.
            await Delivery(stream, send).run(receive)

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class _Client:
    """What the server says of the client. Some servers say only once that it has left, perhaps to Django."""

    __slots__ = ("_last", "_receive")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._last: Message | None = None

    async def receive(self) -> Message:
        """Return the next message, the last one again and again."""
        if self._last is not None:
            return self._last
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._last = message
        return message

    def rest(self) -> Receive:
        """Return the ``receive()`` for what the server has still to say."""
        return self._receive if self._last is None else self.receive


def get_asgi_application() -> SseApplication:
    """Return Django's ASGI application, made so that its open streams hold nothing but their socket."""
    return SseApplication(get_django_application())
