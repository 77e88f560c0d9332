"""System checks: each mistake in ``DJANGO_SSE`` that can be seen without a request has an id here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from django.core import checks
from django.core.checks import CheckMessage, Error
from django.core.exceptions import ImproperlyConfigured

from .conf import configuration

__all__ = ["check_settings"]


def check_settings(app_configs: Sequence[Any] | None, **kwargs: Any) -> list[CheckMessage]:
    """Return what is wrong with ``DJANGO_SSE``."""
    readers: list[Callable[[], Any]] = [
        lambda: configuration.heartbeat,
        lambda: configuration.retry,
        lambda: configuration.mailbox,
        lambda: configuration.threads,
        lambda: configuration.max_age,
        lambda: configuration.stall_timeout,
        lambda: configuration.max_streams,
        lambda: configuration.max_streams_per_user,
        lambda: configuration.shutdown_window,
        lambda: configuration.channel_prefix,
    ]
    try:
        unknown = configuration.unknown
    except ImproperlyConfigured as error:
        return [Error(str(error), hint="See the settings reference of django-sse.", id="django_sse.E001")]
    messages: list[CheckMessage] = [
        checks.Warning(
            f"DJANGO_SSE has an unknown key {key!r}, which does nothing.",
            hint="Is it misspelt? Keys are upper-case.",
            id="django_sse.W001",
        )
        for key in unknown
    ]
    for read in readers:
        try:
            read()
        except ImproperlyConfigured as error:
            messages.append(Error(str(error), id="django_sse.E001"))
    return messages
