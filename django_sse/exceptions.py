"""Every error that this package raises on its own account.

* ``SseError``: the root, for ``except`` clauses that want them all.

  * ``BrokerUnavailable``: the broker cannot be reached, or did not confirm in time. The Redis broker raises a subclass
    that is also a ``redis.exceptions.ConnectionError``.
  * ``TooManyStreams``: this process already serves as many streams of that kind as it may.

Wrong arguments are ``ValueError`` or ``TypeError``, wrong settings ``django.core.exceptions.ImproperlyConfigured``.
"""

__all__ = ["BrokerUnavailable", "SseError", "TooManyStreams"]


class SseError(Exception):
    """Root of the package's errors."""


class BrokerUnavailable(SseError):
    """The broker cannot be reached, or did not confirm in time."""


class TooManyStreams(SseError):
    """A limit on open streams of this process is reached."""
