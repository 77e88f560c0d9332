"""The hand-over: how a view's stream leaves Django's handler, which then ends like that of any other response.

``asgi`` makes an offer in the request's scope; the view attaches its response; when Django's handler starts to send
that very response, its content still untouched by middleware, the stream is taken over and Django sees an empty body.
In every doubt it is not: the stream then runs inside the handler, as it does without ``asgi``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from django.http import StreamingHttpResponse

from .streams import Stream

__all__ = ["SCOPE_KEY", "EventStreamResponse", "Handover"]

#: Where in the ASGI scope the offer stands.
SCOPE_KEY = "django_sse.handover"
#: A header that never leaves: by it, the start of a response is known to be that of the view's.
MARK = "X-Django-Sse-Handover"
_MARK = MARK.lower().encode()

Send = Callable[[Any], Awaitable[None]]


class Handover:
    """The offer made to one request: its ``send()`` stands between Django's handler and the server."""

    __slots__ = ("_accepted", "_foreign", "_marked", "_send", "response")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._marked = False
        self._accepted = False
        self._foreign = False
        #: The view's response, if it is a stream.
        self.response: EventStreamResponse | None = None

    async def send(self, message: Any) -> None:
        """Pass on what Django sends, but the end of a response whose stream goes on."""
        if message["type"] == "http.response.start" and self.response is not None:
            headers = [header for header in message["headers"] if bytes(header[0]).lower() != _MARK]
            self._marked = len(headers) != len(message["headers"])
            message = {**message, "headers": headers}
        elif self._accepted and message["type"] == "http.response.body":
            if not message.get("body") and not message.get("more_body"):
                return
            self._foreign = True
        await self._send(message)

    def accept(self) -> bool:
        """Whether the stream is taken over: asked by its response when Django begins to iterate it."""
        self._accepted = self._marked
        return self._accepted

    def taken(self) -> Stream | None:
        """Return the stream that is now to be delivered, once Django's handler has ended."""
        response, self.response = self.response, None
        if response is None:
            return None
        # Closed, it was what the handler has sent. Otherwise some other response has drawn on it, and gets no more.
        if self._accepted and response.closed and not self._foreign:
            return response.stream.outside()
        response.stream.close()
        return None

    def withdraw(self) -> None:
        """Close the stream: the handler has failed."""
        if self.response is not None:
            self.response.stream.close()

    @property
    def accepted(self) -> bool:
        """Whether Django's handler left the end of the response to us."""
        return self._accepted and not self._foreign


class EventStreamResponse(StreamingHttpResponse):
    """A stream as Django's response: the ordinary one, but that it may be handed over."""

    def __init__(self, stream: Stream, handover: Handover | None = None) -> None:
        self._handover: Handover | None = None
        self._body = _Body(stream)
        super().__init__(self._body, content_type="text/event-stream")
        if handover is not None:
            handover.response = self
            self._handover = handover
            self[MARK] = "yes"

    @property
    def streaming_content(self) -> Any:
        """The chunks. Whoever takes them, or puts others in their place, has them sent by Django's handler."""
        self._handover = None
        return StreamingHttpResponse.streaming_content.fget(self)  # type: ignore[union-attr]

    @streaming_content.setter
    def streaming_content(self, value: Any) -> None:
        self._handover = None
        StreamingHttpResponse.streaming_content.fset(self, value)  # type: ignore[union-attr]

    def __aiter__(self) -> AsyncIterator[bytes]:
        handover = self._handover
        if handover is not None and handover.accept():
            self._body.taken = True
            return _nothing()
        return super().__aiter__()

    @property
    def stream(self) -> Stream:
        """The stream itself."""
        return self._body.stream


class _Body:
    """The content of the response: the stream, which ends with the response unless it was taken over."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.taken = False

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def __aiter__(self) -> AsyncIterator[Any]:
        return aiter(self.stream)

    def close(self) -> None:
        if not self.taken:
            self.stream.close()


async def _nothing() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for chunk in nothing:
        yield chunk
