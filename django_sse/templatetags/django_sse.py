"""``{% load django_sse %}``: the id from which a page's stream goes on."""

from __future__ import annotations

import logging

from django import template

from django_sse.exceptions import BrokerUnavailable
from django_sse.redisqueue import cursor

__all__ = ["sse_cursor"]

log = logging.getLogger("django_sse")

register = template.Library()


@register.simple_tag
def sse_cursor(*channels: str) -> str:
    """Return ``cursor()`` of the channels: ``{% sse_cursor "news" %}``; without any, of the default channel.

    To stand above what the template reads from the database: what comes after the tag is rendered is not missed. While
    the broker cannot be reached, it is an id that says nothing: the page is shown, and its stream begins with a
    ``stream-reset``.
    """
    try:
        return cursor(channels or None)
    except BrokerUnavailable as error:
        log.warning("A page was rendered without a cursor: %s", error)
        return "unknown"
