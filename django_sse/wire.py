"""Events as bytes of a ``text/event-stream`` (WHATWG HTML, section 9.2). Pure: no Django, no I/O.

Only CR, LF and CRLF end a line here: ``str.splitlines()`` knows eight more, and each of them would alter the data.
Every block is complete when it is handed on: a half-written one would be read as part of the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sse

from .event import Event, require_utf8

__all__ = ["Sse", "comment", "encode", "retry"]

_LINE_END = re.compile("\r\n|\r|\n")


def encode(event: Event) -> bytes:
    """Return the bytes of ``event``: ``id`` if it has one, ``event``, a ``data`` field per line, an empty line."""
    head = "" if event.id is None else f"id: {event.id}\n"
    return (head + _message(event)).encode()


def comment(text: str = "") -> bytes:
    """Return a comment block, which browsers ignore and proxies count as traffic. A line of it per line of ``text``."""
    return _comment(text).encode()


def retry(milliseconds: int) -> bytes:
    """Return a ``retry`` block: how long a browser waits before it reconnects. ``ValueError`` for a negative number."""
    return _retry(milliseconds).encode()


class Sse(sse.Sse):  # type: ignore[misc]
    """The buffer that ``iterator()`` fills: an ``sse.Sse`` whose output a browser reads back as it was meant.

    Every method appends one whole block or raises and appends nothing, so another thread may add messages meanwhile.
    """

    _buffer: list[str]

    def set_retry(self, num: int | str) -> None:
        """Set the browser's reconnection time to ``num`` milliseconds. ``ValueError`` for anything but digits."""
        block = _retry(num)
        self._retry = num
        self._buffer.append(block)

    def set_event_id(self, event_id: object) -> None:
        """Set the last event ID, which holds until it is set anew; ``None``, ``""`` or ``0`` resets it.

        ``ValueError`` for a line end or NUL in it.
        """
        if not event_id:
            self._buffer.append("id\n\n")
        else:
            self._buffer.append(f"id: {Event.of(None, '', event_id).id}\n\n")

    def add_message(self, event: object, text: object, encoding: str = "utf-8") -> None:
        """Add a message of type ``event``; an empty one or ``None`` is an ordinary ``message``.

        ``text``: str, bytes in ``encoding``, a list, tuple or set of those (a line each), or a value that is sent as
        JSON. ``ValueError`` or ``TypeError`` name the argument that the wire cannot carry.
        """
        self._buffer.append(_message(Event.of(event, text, encoding=encoding)))

    def add(self, event: Event) -> None:
        """Add ``event``, with its id, as one block."""
        self._buffer.append(encode(event).decode())

    def add_comment(self, text: str = "") -> None:
        """Add a comment: bytes on the connection that no script sees, such as a heartbeat."""
        self._buffer.append(_comment(text))

    def __getattr__(self, attr: str) -> Any:
        # The base class delegates to object.__getattr__, which does not exist: its own error would name that instead.
        if sse.Sse._rx_event.search(attr) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attr!r}")
        return super().__getattr__(attr)

    def __iter__(self) -> Iterator[str]:
        # One slice, one deletion: what another thread appends in between stays for the next time.
        buffer = self._buffer
        items = buffer[:]
        del buffer[: len(items)]
        yield from items


def _message(event: Event) -> str:
    data = event.data
    if "\n" in data or "\r" in data:
        data = "\ndata: ".join(_LINE_END.split(data))
    return f"event: {event.name}\ndata: {data}\n\n"


def _comment(text: str) -> str:
    require_utf8("text", text)
    return "".join(f": {line}\n" if line else ":\n" for line in _LINE_END.split(text)) + "\n"


def _retry(milliseconds: object) -> str:
    text = str(milliseconds)
    if isinstance(milliseconds, bool) or not (text.isascii() and text.isdigit()):
        raise ValueError(f"retry must be a whole number of milliseconds, 0 or more, not {milliseconds!r}")
    return f"retry: {text}\n\n"
