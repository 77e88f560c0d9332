"""How the stream of a mailbox is delivered inside of Django's handler: by the pump, up to where the handler asks.

So what comes is taken once for all who listen to the same, there as outside. The handler's task finds its chunk in a
pipe, and waits for nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from .feeds import CHUNK_BYTES
from .pump import Delivery
from .streams import Stream

__all__ = ["Inside"]


class Inside:
    """The chunks of ``stream``, for the task of Django's handler. To be closed, by any thread."""

    __slots__ = ("__weakref__", "_pipe", "_stream", "_task")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pipe: _Pipe | None = None
        self._task: asyncio.Task[None] | None = None

    def __aiter__(self) -> Inside:
        return self

    async def __anext__(self) -> bytes:
        stream, pipe = self._stream, self._pipe
        stream.given = None
        if pipe is None:
            pipe = await self._begin()
        while True:
            if pipe.chunks:
                stream.given = time.monotonic()
                return pipe.pour()
            if pipe.ended:
                if self._task is not None:
                    await self._task
                raise StopAsyncIteration
            # Awaited here, for it is on the way of every event.
            pipe.asked = pipe.loop.create_future()
            try:
                await pipe.asked
            except asyncio.CancelledError:
                # The request has ended, by whatever way of Django or the server.
                stream.shut()
                pipe.leave()
                raise

    async def _begin(self) -> _Pipe:
        await self._stream.begin_in_handler(self.close)
        pipe = self._pipe = _Pipe()
        delivery = Delivery(self._stream, pipe.send)
        delivery.context = None  # a pipe has no use for the request's
        self._task = asyncio.create_task(delivery.run(pipe.receive))
        self._task.add_done_callback(pipe.end)
        return pipe

    async def aclose(self) -> None:
        """Do nothing: Django closes what it has iterated, and then the response."""

    def close(self) -> None:
        """End the stream."""
        try:
            self._stream.close()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed took its streams with it
                self._pipe.loop.call_soon_threadsafe(self._pipe.leave)

    def __del__(self) -> None:
        # Dropped unclosed, its delivery would go on for nobody.
        self._leave()


class _Pipe:
    """What was sent and not asked for yet. Both ends are in the loop."""

    __slots__ = ("_left", "_room", "_size", "asked", "chunks", "ended", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.chunks: list[bytes] = []
        self._size = 0
        #: Whether nothing more comes.
        self.ended = False
        #: What is awaited until there is a chunk, or the end.
        self.asked: asyncio.Future[None] | None = None
        # What is awaited until there is room, and until nobody asks any more.
        self._room: asyncio.Future[None] | None = None
        self._left = self.loop.create_future()

    async def send(self, message: dict[str, Any]) -> None:
        """Put in what ``message`` carries, and wait while there is too much: ``send()`` of ASGI."""
        chunk = message["body"]
        if chunk:
            self.chunks.append(chunk)
            self._size += len(chunk)
        if not message["more_body"]:
            self.ended = True
        self._answer()
        if self._size > CHUNK_BYTES and not self._left.done():
            self._room = self.loop.create_future()
            await self._room

    async def receive(self) -> dict[str, Any]:
        """Say that the client has left, when nobody asks any more: ``receive()`` of ASGI."""
        await self._left
        return {"type": "http.disconnect"}

    def pour(self) -> bytes:
        """Take out all that is in it as one chunk, or what came first if that is too much for one."""
        if self._size <= CHUNK_BYTES:
            chunk = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
            self.chunks.clear()
        else:
            chunk = self.chunks.pop(0)
        self._size -= len(chunk)
        if self._size <= CHUNK_BYTES and self._room is not None and not self._room.done():
            self._room.set_result(None)
        return chunk

    def leave(self) -> None:
        """Say that nobody asks any more."""
        if not self._left.done():
            self._left.set_result(None)

    def end(self, task: asyncio.Task[None]) -> None:
        """Say that nothing more comes: ``task`` is done, which delivered."""
        self.ended = True
        self._answer()

    def _answer(self) -> None:
        if self.asked is not None and not self.asked.done():
            self.asked.set_result(None)
