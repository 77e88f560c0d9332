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
#: Bytes of the signature, and of the hash of a channel's name.
SIGNATURE, TAG = 8, 4
#: Bytes of a position before its offset: epoch (4), check (3), how many bytes the offset has (1).
HEAD = 8
#: Names whose hashes are kept: they may come from users without end.
NAMES = 10_000

_URL_SAFE = bytes.maketrans(b"+/", b"-_")


class Cursors:
    """Makes ids with the first of ``keys``, and understands those that were made with any of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._signers = [_Signer(key) for key in keys]

    def encode(self, positions: Mapping[str, Position]) -> str:
        """Return the id of ``positions``, by channel: the same for the same positions."""
        signer = self._signers[0]
        body = b""
        for channel, (epoch, offset, check) in positions.items():
            length = (offset.bit_length() + 7) // 8
            number = (epoch << 32 | check << 8 | length) << 8 * length | offset
            body += signer.tag(channel) + number.to_bytes(HEAD + length, "big")
        return _text(signer.sign(body) + body)

    def decode(self, text: str, channels: Iterable[str]) -> dict[str, Position]:
        """Return the positions that the id ``text`` has of ``channels``: none where it is no id of ours."""
        raw = _bytes(text)
        for signer in self._signers:
            if raw is not None and hmac.compare_digest(signer.sign(raw[SIGNATURE:]), raw[:SIGNATURE]):
                positions = _positions(raw[SIGNATURE:])
                tags = {channel: signer.tag(channel) for channel in channels}
                return {channel: positions[tag] for channel, tag in tags.items() if tag in positions}
        return {}


class _Signer:
    """One key."""

    def __init__(self, key: bytes) -> None:
        # As long as a key of BLAKE2 may be.
        self._key = hashlib.blake2b(b"django_sse.cursor" + key, digest_size=32).digest()
        self._begun = hashlib.blake2b(key=self._key, digest_size=SIGNATURE)
        self._tags: dict[str, bytes] = {}

    def sign(self, body: bytes) -> bytes:
        signature = self._begun.copy()
        signature.update(body)
        return signature.digest()

    def tag(self, channel: str) -> bytes:
        tag = self._tags.get(channel)
        if tag is None:
            if len(self._tags) >= NAMES:
                self._tags.clear()
            tag = self._tags[channel] = hashlib.blake2b(channel.encode(), key=self._key, digest_size=TAG).digest()
        return tag


def _text(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).translate(_URL_SAFE).rstrip(b"=").decode()


def _bytes(text: str) -> bytes | None:
    if len(text) > MAX_LENGTH or not text.isascii():
        return None
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        return None
    # One id has one form: the bits that base64 leaves over at its end are 0.
    return raw if _text(raw) == text else None


def _positions(body: bytes) -> dict[bytes, Position]:
    """Return the positions by the tags of their channels. What is signed is well formed."""
    positions = {}
    at = 0
    while at < len(body):
        tag, at = body[at : at + TAG], at + TAG
        number, at = int.from_bytes(body[at : at + HEAD], "big"), at + HEAD
        offset, at = body[at : at + (number & 0xFF)], at + (number & 0xFF)
        positions[tag] = Position(number >> 32, int.from_bytes(offset, "big"), number >> 8 & 0xFFFFFF)
    return positions
