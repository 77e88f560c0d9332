"""What an event is, and how it travels on a channel. Pure: no Django, no Redis, no I/O.

Whatever a caller may hand in (text, bytes, lists of lines, values for JSON) becomes plain text here, once, and is
refused here if the wire could not carry it: later stages trust an ``Event``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Event", "decode_message", "decode_payload", "encode_payload", "require_utf8", "text_of"]


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event.

    ``name`` is the event type; the empty name is an ordinary ``message``. ``data`` is text of any number of lines.
    ``id`` becomes the browser's last event ID; ``None`` leaves it as it is.

    Raises ``ValueError``, naming the field, for what an event stream cannot carry (WHATWG HTML, section 9.2.6): a line
    end in ``name`` or ``id``, which would start a field of its own; NUL in ``id``, which makes browsers ignore it; a
    lone surrogate anywhere, which has no UTF-8 form.
    """

    name: str
    data: str
    id: str | None = None

    def __post_init__(self) -> None:
        _require_one_line("event name", self.name)
        require_utf8("data", self.data)
        if self.id is not None:
            _require_one_line("event id", self.id)
            if "\0" in self.id:
                raise ValueError(f"event id must not contain NUL: {self.id!r}")

    @classmethod
    def of(
        cls,
        name: object,
        data: object,
        id: object = None,
        *,
        encoding: str = "utf-8",
        dumps: Callable[[Any], str] = json.dumps,
    ) -> Event:
        """Return the event for loosely typed input, as ``add_message()`` and ``send_event()`` take it.

        ``name`` and ``id`` may be text, bytes or a whole number; ``None`` is no name and no id. ``data``: see
        ``text_of()``. Raises ``TypeError`` or ``ValueError``, naming the argument.
        """
        return cls(
            "" if name is None else _label("event name", name),
            text_of(data, encoding=encoding, dumps=dumps),
            None if id is None else _label("event id", id),
        )


def text_of(data: object, *, encoding: str = "utf-8", dumps: Callable[[Any], str] = json.dumps) -> str:
    """Return ``data`` as the text of an event.

    Text stays as it is, bytes are decoded by ``encoding``. The items of a list, tuple or set of text or bytes become
    one line each. Anything else (dict, number, bool, ``None``) is sent as JSON, made by ``dumps``.

    Raises ``TypeError`` for a list, tuple or set with an item that is neither text nor bytes (JSON or lines? the caller
    must say), and ``ValueError`` for bytes that are not valid in ``encoding``.
    """
    if isinstance(data, str):
        return str.__str__(data)  # of a subclass, such as an enumeration's, its text and not its own idea of it
    if isinstance(data, (bytes, bytearray, memoryview)):
        return _decode("data", bytes(data), encoding)
    if isinstance(data, (list, tuple, set, frozenset)):
        # Without CR, which would form one line end with the LF that joins.
        return "\n".join(_line(item, encoding).replace("\r\n", "\n").replace("\r", "\n") for item in data)
    return dumps(data)


def encode_payload(name: object, data: object, id: object = None, *, dumps: Callable[[Any], str] = json.dumps) -> str:
    """Return what ``PUBLISH`` carries for an event: JSON of ``[name, data]``, as django-sse 0.4.1 sent it.

    ``id`` adds a third element, which 0.4.1 readers do not understand. Lines stay a JSON list. Takes and refuses what
    ``Event.of()`` does, so that a mistake shows where it is made and not in a reader.
    """
    event = Event.of(name, data, id, dumps=dumps)
    lines = isinstance(data, (list, tuple, set, frozenset))
    body: str | list[str] = [_line(item, "utf-8") for item in data] if lines else event.data  # type: ignore[attr-defined]
    return json.dumps([event.name, body] if event.id is None else [event.name, body, event.id])


def decode_payload(payload: bytes | str) -> Event:
    """Return the event of a payload: ``[name, data]``, ``[name, data, id]`` or ``[name, data, {...}]``.

    Raises ``ValueError``, saying what is wrong, for anything else: other programs publish on the same channels.
    """
    return decode_message(payload)[0]


def decode_message(payload: bytes | str) -> tuple[Event, dict[str, Any] | None]:
    """Return what ``decode_payload()`` does, and the third element if that is an object: the event's position."""
    try:
        # Decoded here, strictly: json.loads() would let lone surrogates through and guess at UTF-16.
        items = json.loads(payload.decode() if isinstance(payload, bytes) else payload)
        if not isinstance(items, list) or len(items) not in (2, 3):
            raise ValueError("not a JSON list of event name, data and, at most, an id")
        name, data = items[0], items[1]
        extra = items[2] if len(items) == 3 else None
        position = extra if isinstance(extra, dict) else None
        if type(name) is str and type(data) is str and extra is position:
            return Event(name, data), position  # as almost all are: nothing has to become text
        return Event.of(name, data, None if position is not None else extra), position
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _label(argument: str, value: object) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return _decode(argument, value, "utf-8")
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)  # the digits, of an enumeration's member as well
    raise TypeError(f"{argument} must be str, bytes or int, not {type(value).__name__}")


def _line(item: object, encoding: str) -> str:
    if isinstance(item, str):
        return str.__str__(item)
    if isinstance(item, bytes):
        return _decode("data", item, encoding)
    raise TypeError(
        f"data: the items of a list are sent as lines and must be str or bytes, not {type(item).__name__}; "
        "to send the list as JSON, pass json.dumps(...) of it"
    )


def _decode(argument: str, value: bytes, encoding: str) -> str:
    try:
        return value.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument} is not valid {encoding}: {error}") from error


def _require_one_line(argument: str, value: str) -> None:
    if "\n" in value or "\r" in value:
        raise ValueError(f"{argument} must not contain a line end: {value!r}")
    require_utf8(argument, value)


def require_utf8(argument: str, value: str) -> None:
    """Raise ``ValueError``, naming ``argument``, if UTF-8 cannot carry ``value``."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{argument} contains a lone surrogate at position {error.start}, which UTF-8 cannot carry"
        ) from error
