"""Every setting of the package, read each time it is asked for, in this one place.

``override_settings`` therefore just works, and a wrong value is reported, by its name, where it first matters.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from .history import History

__all__ = ["CONNECTION_SETTING", "Configuration", "configuration"]

CONNECTION_SETTING = "REDIS_SSEQUEUE_CONNECTION_SETTINGS"
#: The name in 0.4.1 is misspelt, and in use.
CHANNEL_SETTINGS = ("REDIS_SSEQUEUE_CHANNEL_NAME", "REDIS_SSEQUEUE_CHANEL_NAME")

DEFAULTS: dict[str, Any] = {
    # Seconds of silence after which a stream sends a comment; None: never. Proxies cut at 30 to 60 s of silence.
    "HEARTBEAT": 15,
    # Milliseconds after which a browser reconnects.
    "RETRY": 2000,
    # What may wait for one client.
    "MAILBOX": {"EVENTS": 256, "BYTES": 1024 * 1024},
    # Sync iterators that stream at one time in one ASGI process, each in a thread.
    "THREADS": 256,
    # Seconds after which a stream ends, give or take 20 %, and the browser reconnects; None: never.
    "MAX_AGE": None,
    # Seconds after which a client that does not read what it was sent is given up; None: never.
    "STALL_TIMEOUT": 30,
    # Streams that may be open in one process, and in one process for one user; None: no limit.
    "MAX_STREAMS": 10_000,
    "MAX_STREAMS_PER_USER": None,
    # Seconds over which the open streams are ended when the process is told to stop. Where the code is being changed
    # (DEBUG), a restart waits for nobody.
    "SHUTDOWN_WINDOW": 5,
    # What stands before every channel's name in the broker.
    "CHANNEL_PREFIX": "",
    # What is kept of a channel for those who come back: of all channels, or by name or prefix; None: nothing.
    "HISTORY": None,
    # Bytes of an event's payload; None: no limit.
    "MAX_PAYLOAD": 1024 * 1024,
}

HISTORY_DEFAULTS = {
    # Events.
    "SIZE": 1000,
    # Seconds after the channel's last event.
    "TTL": 3600,
}


class Configuration:
    """The settings as values that can be used. Raises ``ImproperlyConfigured``, naming the setting, for others."""

    @property
    def connection(self) -> Mapping[str, Any]:
        """``REDIS_SSEQUEUE_CONNECTION_SETTINGS``: the settings' own object, or an empty dict."""
        return getattr(settings, CONNECTION_SETTING, {})

    @property
    def channel(self) -> str:
        """The channel of views and events that name none."""
        for name in CHANNEL_SETTINGS:
            if hasattr(settings, name):
                return getattr(settings, name)  # type: ignore[no-any-return]
        return "sse"

    @property
    def heartbeat(self) -> float | None:
        """Seconds of silence before a heartbeat; ``None``: no heartbeats."""
        return check_seconds('DJANGO_SSE["HEARTBEAT"]', self._get("HEARTBEAT"), "for no heartbeats")

    @property
    def retry(self) -> int:
        """Milliseconds before a browser reconnects."""
        return _whole('DJANGO_SSE["RETRY"]', self._get("RETRY"), least=0)

    @property
    def mailbox(self) -> tuple[int, int]:
        """How many events, and how many bytes, may wait for one client."""
        given = self._get("MAILBOX")
        if not isinstance(given, Mapping) or set(given) - {"EVENTS", "BYTES"}:
            raise ImproperlyConfigured(f'DJANGO_SSE["MAILBOX"] must be a dict of "EVENTS" and "BYTES", not {given!r}.')
        bounds = {**DEFAULTS["MAILBOX"], **given}
        return (
            _whole('DJANGO_SSE["MAILBOX"]["EVENTS"]', bounds["EVENTS"], least=1),
            _whole('DJANGO_SSE["MAILBOX"]["BYTES"]', bounds["BYTES"], least=1),
        )

    @property
    def threads(self) -> int:
        """How many sync iterators may stream at one time in an ASGI process."""
        return _whole('DJANGO_SSE["THREADS"]', self._get("THREADS"), least=1)

    @property
    def max_age(self) -> float | None:
        """Seconds after which a stream ends, give or take 20 %; ``None``: never."""
        return check_seconds('DJANGO_SSE["MAX_AGE"]', self._get("MAX_AGE"), "for no limit")

    @property
    def stall_timeout(self) -> float | None:
        """Seconds for which a client may leave unread what it was sent; ``None``: for ever."""
        return check_seconds('DJANGO_SSE["STALL_TIMEOUT"]', self._get("STALL_TIMEOUT"), "for no limit")

    @property
    def max_streams(self) -> int | None:
        """How many streams may be open in a process."""
        return self._limit("MAX_STREAMS")

    @property
    def max_streams_per_user(self) -> int | None:
        """How many streams may be open for one user in a process."""
        return self._limit("MAX_STREAMS_PER_USER")

    @property
    def shutdown_window(self) -> float:
        """Seconds over which the open streams are ended when the process is told to stop."""
        if "SHUTDOWN_WINDOW" not in self._given() and settings.DEBUG:
            return 0
        window = self._get("SHUTDOWN_WINDOW")
        if isinstance(window, bool) or not isinstance(window, (int, float)) or not 0 <= window <= threading.TIMEOUT_MAX:
            raise ImproperlyConfigured(
                f'DJANGO_SSE["SHUTDOWN_WINDOW"] must be a number of seconds, 0 or more, not {window!r}.'
            )
        return window

    @property
    def channel_prefix(self) -> str:
        """What stands before every channel's name in the broker."""
        prefix = self._get("CHANNEL_PREFIX")
        if not isinstance(prefix, str) or not prefix.isprintable():
            raise ImproperlyConfigured(f'DJANGO_SSE["CHANNEL_PREFIX"] must be text, such as "shop:", not {prefix!r}.')
        return prefix

    @property
    def has_history(self) -> bool:
        """Whether any channel may have history."""
        return bool(self._history())

    def history(self, channel: str) -> History | None:
        """What is kept of ``channel`` (without the prefix); ``None``: nothing.

        The exact name counts first, then the longest prefix, written with ``*`` at its end.
        """
        given = self._history()
        if channel in given:
            options = given[channel]
        else:
            patterns = [name for name in given if name.endswith("*") and channel.startswith(name[:-1])]
            options = given[max(patterns, key=len)] if patterns else None
        return None if options is None else History(channel, options["SIZE"], options["TTL"])

    @property
    def histories(self) -> Mapping[str, Mapping[str, int] | None]:
        """What is kept, by channel or prefix."""
        return self._history()

    @property
    def max_payload(self) -> int | None:
        """How many bytes the payload of an event may have."""
        return self._limit("MAX_PAYLOAD")

    def _history(self) -> Mapping[str, Mapping[str, int] | None]:
        given = self._get("HISTORY")
        if given is None:
            return {}
        name = 'DJANGO_SSE["HISTORY"]'
        if not isinstance(given, Mapping):
            raise ImproperlyConfigured(f"{name} must be None or a dict, such as {HISTORY_DEFAULTS!r}, not {given!r}.")
        if not set(given) - set(HISTORY_DEFAULTS):
            return {"*": _history_options(name, given)}
        return {
            str(channel): None if options is None else _history_options(f"{name}[{channel!r}]", options)
            for channel, options in given.items()
        }

    @property
    def unknown(self) -> list[str]:
        """Keys of ``DJANGO_SSE`` that mean nothing."""
        return sorted(str(key) for key in set(self._given()) - set(DEFAULTS))

    def _limit(self, key: str) -> int | None:
        value = self._get(key)
        return None if value is None else _whole(f'DJANGO_SSE["{key}"]', value, least=1)

    def _get(self, key: str) -> Any:
        return self._given().get(key, DEFAULTS[key])

    @staticmethod
    def _given() -> Mapping[str, Any]:
        given = getattr(settings, "DJANGO_SSE", {})
        if not isinstance(given, Mapping):
            raise ImproperlyConfigured(f"DJANGO_SSE must be a dict, not {given!r}.")
        return given


configuration = Configuration()


def check_seconds(name: str, value: Any, none: str) -> float | None:
    """Return ``value`` if it is a time above 0; the error says where it came from (``name``) and what ``None`` is."""
    if value is None:
        return None
    # No thread can wait for longer than TIMEOUT_MAX, some centuries.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= threading.TIMEOUT_MAX:
        raise ImproperlyConfigured(f"{name} must be a number of seconds above 0, or None {none}, not {value!r}.")
    return value


def _history_options(name: str, given: Any) -> Mapping[str, int]:
    if not isinstance(given, Mapping) or set(given) - set(HISTORY_DEFAULTS):
        raise ImproperlyConfigured(f'{name} must be None or a dict of "SIZE" and "TTL", not {given!r}.')
    options = {**HISTORY_DEFAULTS, **given}
    return {key: _whole(f'{name}["{key}"]', value, least=1) for key, value in options.items()}


def _whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ImproperlyConfigured(f"{name} must be a whole number of {least} or more, not {value!r}.")
    return value
