"""The hand-over: how a view's stream leaves Django's handler, which then ends like that of any other response.

``asgi`` makes an offer in the request's scope, and the view's response takes it up. When Django's handler sends just
that response, its content still untouched by middleware, the stream is taken over and the handler sees an empty body.
In every other case the stream runs inside the handler, as it does without ``asgi``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from django.http import StreamingHttpResponse

from .inside import Inside
from .streams import Stream

__all__ = ["SCOPE_KEY", "EventStreamResponse", "Handover"]

#: Where in the ASGI scope the offer stands.
SCOPE_KEY = "django_sse.handover"

Send = Callable[[Any], Awaitable[None]]


class Handover:
    """The offer made to one request: its ``send()`` stands between Django's handler and the server."""

    __slots__ = ("_offered", "_send", "_taken", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        # The streams of this request: mostly one.
        self._offered: list[Stream] = []
        self._taken: Stream | None = None
        #: Whether a response has begun.
        self.started = False

    async def send(self, message: Any) -> None:
        """Pass on what Django sends, but the end of a response whose stream goes on."""
        ends = message["type"] == "http.response.body" and not message.get("more_body")
        if not (ends and self._taken is not None):
            await self._send(message)
        if message["type"] == "http.response.start":
            self.started = True

    def offer(self, stream: Stream) -> None:
        """Say that ``stream`` may be taken over."""
        self._offered.append(stream)

    def take(self, stream: Stream) -> None:
        """Take ``stream`` over, when the handler has ended. In the handler's context."""
        self._taken = stream.outside()

    def taken(self) -> Stream | None:
        """Return the stream to be delivered, now that the handler has ended. Others of its request end here."""
        taken, self._taken = self._taken, None
        self._close_others(taken)
        return taken

    def withdraw(self) -> None:
        """Close the streams: the handler has failed."""
        self._close_others(None)

    def _close_others(self, taken: Stream | None) -> None:
        offered, self._offered = self._offered, []
        for stream in offered:
            if stream is not taken:
                stream.close()


class EventStreamResponse(StreamingHttpResponse):
    """A stream as Django's response: the ordinary one, but that it may be handed over."""

    def __init__(self, stream: Stream, handover: Handover | None = None) -> None:
        self._handover: Handover | None = None
        self._is_sent = False
        self._body = _Body(stream)
        super().__init__(self._body, content_type="text/event-stream")
        # Whether nobody has taken the chunks, or put others in their place.
        self._is_untouched = True
        self._handover = handover
        if handover is not None:
            handover.offer(stream)

    @property
    def streaming(self) -> bool:  # type: ignore[override]
        """``True``. Asked of a response that has begun, by Django's handler: this is the one that it sends."""
        self._is_sent = self._handover is not None and self._handover.started
        return True

    @property
    def streaming_content(self) -> Any:
        """The chunks. Whoever takes them, or puts others in their place, has them sent by Django's handler."""
        self._is_untouched = False
        return StreamingHttpResponse.streaming_content.fget(self)  # type: ignore[union-attr]

    @streaming_content.setter
    def streaming_content(self, value: Any) -> None:
        self._is_untouched = False
        StreamingHttpResponse.streaming_content.fset(self, value)  # type: ignore[union-attr]

    def __aiter__(self) -> AsyncIterator[bytes]:
        if not self._is_untouched:
            return super().__aiter__()
        # A middleware's own response may draw on this one just now, and must see what it asked for.
        if self._handover is not None and self._is_sent:
            self._handover.take(self._body.stream)
            self._body.taken = True
            return _Nothing()
        # As they are: Django's generators around them would cost a fifth of each delivery.
        return aiter(self._body)


class _Body:
    """The content of the response: the stream, which ends with the response unless it was taken over."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.taken = False
        self._inside: Inside | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def __aiter__(self) -> AsyncIterator[Any]:
        stream = aiter(self.stream)
        if not self.stream.is_mail:
            return stream
        self._inside = self._inside or Inside(self.stream)
        return self._inside

    def close(self) -> None:
        if not self.taken:
            (self._inside or self.stream).close()


class _Nothing:
    """What the handler sends of a stream that was taken over."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Do nothing: Django 6.1 closes what it has iterated."""
