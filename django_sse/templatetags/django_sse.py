"""``{% load django_sse %}``: the id from which a page's stream goes on."""

from __future__ import annotations

from django import template

from django_sse.redisqueue import cursor

__all__ = ["sse_cursor"]

register = template.Library()


@register.simple_tag
def sse_cursor(*channels: str) -> str:
    """Return ``cursor()`` of the channels: ``{% sse_cursor "news" %}``; without any, of the default channel.

    To stand above what the template reads from the database: what comes after the tag is rendered is not missed.
    """
    return cursor(channels or None)
