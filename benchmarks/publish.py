"""Puts measured events into a system: through Redis or by HTTP POST, in its own form, at one of three paces.

Nothing here is a client library: the bytes are made here, because the publisher shares its core with Redis and the load
client and must take little of it. What a measured event is stands in load.c.
"""

import functools
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence

HOST = "127.0.0.1"
PAYLOAD = 100  # bytes of an event's data; load.c says the same
BATCH = 64  # commands in one write, and the most that may be unanswered before the next one
PATIENCE = 30  # seconds to wait for the answer to a command
ROUND_SECONDS = 5  # in which every client must have an event in lock-step
ROUNDS_MISSED = 3  # after which lock-step ends: what is published then is lost anyhow


def payload(number: int) -> str:
    return f"{time.monotonic_ns()} {number} ".ljust(PAYLOAD, "x")


# How an event is said -------------------------------------------------------------------------------------------------

# What says an event: its channels and its data -> a command for each of them.
Form = Callable[[Sequence[str], str], Iterator[bytes]]


def resp(*words: str) -> bytes:
    """A command of Redis's protocol."""
    return b"*%d\r\n" % len(words) + b"".join(map(bulk, words))


def bulk(word: str) -> bytes:
    string = word.encode()
    return b"$%d\r\n%s\r\n" % (len(string), string)


@functools.cache
def publish_on(channel: str) -> bytes:
    """A PUBLISH up to the message: made once, since there may be 10,000 channels."""
    return b"*3\r\n" + bulk("PUBLISH") + bulk(channel)


def redis_raw(channels: Sequence[str], data: str) -> Iterator[bytes]:
    message = bulk(data)
    return (publish_on(channel) + message for channel in channels)


def redis_pair(channels: Sequence[str], data: str) -> Iterator[bytes]:
    """django-sse's form, since 0.4.1."""
    return redis_raw(channels, json.dumps(["message", data]))


def redis_eventstream(channels: Sequence[str], data: str) -> Iterator[bytes]:
    """django-eventstream has one channel of Redis for all of its own."""
    for channel in channels:
        message = {"channel": channel, "event_type": "message", "data": data, "pub_id": None}
        yield resp("PUBLISH", "events_channel", json.dumps(message))


FORMS: dict[str, Form] = {
    "redis:raw": redis_raw,
    "redis:pair": redis_pair,
    "redis:eventstream": redis_eventstream,
}


# Where it goes --------------------------------------------------------------------------------------------------------


class Outlet:
    """A connection on which commands are pipelined and their answers counted."""

    def __init__(self, port: int, form: Form) -> None:
        self._socket = socket.create_connection((HOST, port), PATIENCE)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._form = form
        self._unanswered = 0
        self._rest = b""

    def close(self) -> None:
        self._socket.close()

    def publish(self, channels: Sequence[str], numbers: range) -> None:
        """Publish each of `numbers` on every one of `channels`, and return when all is answered."""
        commands = self._commands(channels, numbers)
        while batch := list(itertools.islice(commands, BATCH)):
            self._socket.sendall(b"".join(batch))
            self._unanswered += len(batch)
            self._read_answers(BATCH)
        self._read_answers(0)

    def _commands(self, channels: Sequence[str], numbers: range) -> Iterator[bytes]:
        return itertools.chain.from_iterable(self._form(channels, payload(number)) for number in numbers)

    def _read_answers(self, still_unanswered: int) -> None:
        while self._unanswered > still_unanswered:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("the connection on which events are published was closed")
            answers, self._rest = self.answers(self._rest + received)
            self._unanswered -= answers

    @staticmethod
    def answers(text: bytes) -> tuple[int, bytes]:
        """How many whole answers `text` begins with, and what follows them."""
        raise NotImplementedError


class RedisOutlet(Outlet):
    @staticmethod
    def answers(text: bytes) -> tuple[int, bytes]:
        *lines, rest = text.split(b"\r\n")
        for line in lines:
            if not line.startswith(b":"):
                raise ConnectionError(f"Redis answered {line!r}")
        return len(lines), rest


class HttpOutlet(Outlet):
    @staticmethod
    def answers(text: bytes) -> tuple[int, bytes]:
        count = 0
        while True:
            head, found, rest = text.partition(b"\r\n\r\n")
            if not found:
                return count, text
            status, *fields = head.split(b"\r\n")
            if not status.startswith(b"HTTP/1.1 2"):
                raise ConnectionError(f"the publisher's location answered {status!r}")
            headers = {name.strip().lower(): value.strip() for name, _, value in (f.partition(b":") for f in fields)}
            length = int(headers.get(b"content-length", 0))
            if len(rest) < length:
                return count, text
            text = rest[length:]
            count += 1


def outlet(form: str, redis_port: int, http_port: int, publish_path: Callable[[str], str]) -> Outlet:
    """Return the way into a system that takes events in `form`."""
    if form != "http":
        return RedisOutlet(redis_port, FORMS[form])

    def post(channels: Sequence[str], data: str) -> Iterator[bytes]:
        for channel in channels:
            lines = [f"POST {publish_path(channel)} HTTP/1.1", f"Host: {HOST}", "Content-Type: text/plain"]
            yield "\r\n".join([*lines, f"Content-Length: {len(data)}", "", data]).encode()

    return HttpOutlet(http_port, post)


# At what pace ---------------------------------------------------------------------------------------------------------


def burst(out: Outlet, channels: Sequence[str], numbers: range) -> None:
    """As fast as they are taken."""
    out.publish(channels, numbers)


def paced(out: Outlet, channels: Sequence[str], numbers: range, per_second: float) -> None:
    start = time.monotonic()
    for i, number in enumerate(numbers):
        time.sleep(max(0, start + i / per_second - time.monotonic()))
        out.publish(channels, range(number, number + 1))


def lockstep(
    out: Outlet, channels: Sequence[str], first: int, seconds: float, everyone_has: Callable[[int, float], bool]
) -> int:
    """Publish an event only when every client has the one before; return how many were published."""
    deadline = time.monotonic() + seconds
    number, missed = first, 0
    while missed < ROUNDS_MISSED and (number == first or time.monotonic() < deadline):
        out.publish(channels, range(number, number + 1))
        missed += not everyone_has(number, ROUND_SECONDS)
        number += 1
    return number - first
