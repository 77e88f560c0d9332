"""Signals of a stream's life, for presence, metrics and the like. A receiver that raises harms no stream.

``stream_opened`` (``sender``: the view class; ``stream``: ``registry.StreamInfo``) when its first bytes are asked for;
``stream_closed`` (also ``reason``, ``events``, ``bytes`` and ``seconds``) exactly once for each opened stream. Sync
receivers may use the database. Under ASGI they run in a thread of their own.
"""

from __future__ import annotations

from django.dispatch import Signal

__all__ = ["stream_closed", "stream_opened"]

stream_opened = Signal()
stream_closed = Signal()
