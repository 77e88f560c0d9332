"""Where Redis is: ``location`` and the other keys of the connection settings, as a connection pool of redis-py.

Nothing connects here. What is wrong is said with the lines to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis
from django.core.exceptions import ImproperlyConfigured

from .conf import CONNECTION_SETTING

__all__ = ["MEMORY", "freeze", "make_pool"]

#: The location that is no Redis at all, but this process.
MEMORY = "memory:"

_EXAMPLE = f"""    {CONNECTION_SETTING} = {{"location": "localhost:6379"}}
or, for a single process without Redis (development, tests):
    {CONNECTION_SETTING} = {{"location": "memory:"}}"""


def make_pool(kwargs: Mapping[str, Any]) -> redis.ConnectionPool:
    """Return a connection pool for ``kwargs``, which are those of ``ConnectionPoolManager.connection_pool()``.

    Raises ``ImproperlyConfigured``, naming the setting and the key, for a missing or malformed value.
    """
    location = _location(kwargs)
    options = {
        # redis-py stops at 100 connections, which a program with a connection of its own for each client exceeds.
        "max_connections": 2**31,
        "db": _db(kwargs),
        "password": kwargs.get("password"),
        **kwargs.get("options", {}),
    }
    if "://" in location:
        try:
            # What the URL says counts; what it leaves open, the other keys fill in.
            return redis.ConnectionPool.from_url(location, **options)
        except ValueError as error:
            raise _bad_location(location) from error
    if location.startswith("unix:/"):
        return redis.ConnectionPool(
            connection_class=redis.UnixDomainSocketConnection, path=location.removeprefix("unix:"), **options
        )
    host, port = _host_and_port(location)
    return redis.ConnectionPool(host=host, port=port, **options)


def _db(kwargs: Mapping[str, Any]) -> int:
    db = kwargs.get("db") or 0
    try:
        return int(db)
    except (TypeError, ValueError):
        raise ImproperlyConfigured(f"`db` in {CONNECTION_SETTING} must be a number, not {db!r}.") from None


def _location(kwargs: Mapping[str, Any]) -> str:
    location = kwargs.get("location")
    if not location:
        raise ImproperlyConfigured(
            f"There is no `location` in {CONNECTION_SETTING}. Put this into your settings:\n{_EXAMPLE}"
        )
    if not isinstance(location, str):
        raise _bad_location(location)
    return location


def _host_and_port(location: str) -> tuple[str, int]:
    host, separator, port = location.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdigit() else -1
    if not separator or not host or (":" in host and not bracketed) or not 0 < number < 65536:
        raise _bad_location(location)
    return host.strip("[]"), number


def _bad_location(location: object) -> ImproperlyConfigured:
    return ImproperlyConfigured(
        f"Invalid `location` in {CONNECTION_SETTING}: {location!r}. It is host:port, [ipv6]:port, unix:/path, or a "
        f"redis://, rediss:// or unix:// URL. For example:\n{_EXAMPLE}"
    )


def freeze(value: Any) -> Any:
    """Return something hashable that is equal for equal ``value``, whatever the order of its keys."""
    if isinstance(value, Mapping):
        return frozenset((key, freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(freeze, value))
    return (type(value).__name__, value) if value.__hash__ is not None else repr(value)
