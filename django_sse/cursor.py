"""A stream's position in all of its channels, as one opaque id: what ``id:`` and ``Last-Event-ID`` carry. Pure.

An id is signed, and says nothing of a channel but a keyed hash of its name: it cannot be made up, nor read. It selects
among the channels that a request has been granted, and never grants one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence

from .history import Position

__all__ = ["MAX_CHANNELS", "Cursors"]

#: Channels that one id may speak of: 2 KB, as a header that every server and proxy lets through.
MAX_CHANNELS = 100
#: Characters of the longest id that is looked at.
MAX_LENGTH = 4096
#: Bytes of the signature, of the hash of a channel's name, and of a position's epoch and check.
SIGNATURE, TAG, EPOCH, CHECK = 8, 4, 4, 3


class Cursors:
    """Makes ids with the first of ``keys``, and understands those that were made with any of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        # As long as a key of BLAKE2 may be.
        self._keys = [hashlib.blake2b(b"django_sse.cursor" + key, digest_size=32).digest() for key in keys]
        self._tags: dict[tuple[bytes, str], bytes] = {}

    def encode(self, positions: Mapping[str, Position]) -> str:
        """Return the id of ``positions``, by channel: the same for the same positions."""
        key = self._keys[0]
        body = bytearray()
        for channel, position in positions.items():
            body += self._tag(key, channel)
            body += position.epoch.to_bytes(EPOCH, "big") + position.check.to_bytes(CHECK, "big")
            offset = position.offset
            while offset > 0x7F:  # LEB128: 7 bits a byte, the lowest first
                body.append(offset & 0x7F | 0x80)
                offset >>= 7
            body.append(offset)
        return base64.urlsafe_b64encode(_signature(key, body) + body).rstrip(b"=").decode()

    def decode(self, text: str, channels: Iterable[str]) -> dict[str, Position]:
        """Return the positions that the id ``text`` has of ``channels``: none where it is no id of ours."""
        raw = _bytes(text)
        for key in self._keys:
            if raw is not None and hmac.compare_digest(_signature(key, raw[SIGNATURE:]), raw[:SIGNATURE]):
                positions = _positions(raw[SIGNATURE:])
                tags = {channel: self._tag(key, channel) for channel in channels}
                return {channel: positions[tag] for channel, tag in tags.items() if tag in positions}
        return {}

    def _tag(self, key: bytes, channel: str) -> bytes:
        tag = self._tags.get((key, channel))
        if tag is None:
            if len(self._tags) > 10_000:  # names may come from users without end
                self._tags.clear()
            tag = hashlib.blake2b(channel.encode(), key=key, digest_size=TAG).digest()
            self._tags[key, channel] = tag
        return tag


def _signature(key: bytes, body: bytes | bytearray) -> bytes:
    return hashlib.blake2b(body, key=key, digest_size=SIGNATURE).digest()


def _bytes(text: str) -> bytes | None:
    if len(text) > MAX_LENGTH or not text.isascii():
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return None
    # One id has one form: the bits that base64 leaves over at its end are 0.
    return raw if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() == text else None


def _positions(body: bytes) -> dict[bytes, Position]:
    """Return the positions by the tags of their channels. What is signed is well formed."""
    positions = {}
    at = 0
    while at < len(body):
        tag = body[at : at + TAG]
        at += TAG
        epoch = int.from_bytes(body[at : at + EPOCH], "big")
        at += EPOCH
        check = int.from_bytes(body[at : at + CHECK], "big")
        at += CHECK
        offset = shift = 0
        while body[at] & 0x80:
            offset |= (body[at] & 0x7F) << shift
            shift += 7
            at += 1
        offset |= body[at] << shift
        at += 1
        positions[tag] = Position(epoch, offset, check)
    return positions
