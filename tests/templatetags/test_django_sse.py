"""`{% sse_cursor %}`: a page that is rendered now, and connects later, misses nothing of what came in between."""

import re

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.template import Context, Template
from django.test import RequestFactory, override_settings

from django_sse.redisqueue import RedisQueueView, cursor, send_event
from tests.helpers.eventsource import Parser
from tests.helpers.process import free_port

MEMORY = {"location": "memory:"}
HISTORY = {"HISTORY": {"none": None, "*": {}}}


@pytest.fixture(autouse=True)
def _history():
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=MEMORY, DJANGO_SSE=HISTORY):
        yield


def render(text, **context):
    return Template("{% load django_sse %}" + text).render(Context(context))


def first_events(channels, last_id):
    """The first events that a client gets which comes with `last_id`."""
    view = type("View", (RedisQueueView,), {"get_redis_channel": lambda self: channels})
    response = view.as_view()(RequestFactory().get("/", {"last_event_id": last_id}))
    try:
        chunks = iter(response)
        parser, messages = Parser(), []
        while not messages:
            messages += parser.feed(next(chunks))
        return [(message.event, message.data) for message in messages]
    finally:
        response.close()


def test_the_tag_is_the_cursor_of_its_channels():
    send_event("", "1", "news")
    assert render('{% sse_cursor "news" %}') == cursor("news")
    assert render('{% sse_cursor "news" "other" %}') == cursor(["news", "other"])
    assert render('{% sse_cursor first "other" %}', first="news") == cursor(["news", "other"])


@override_settings(REDIS_SSEQUEUE_CHANNEL_NAME="usual")
def test_without_channels_the_tag_is_of_the_default_channel():
    assert render("{% sse_cursor %}") == cursor("usual") == cursor()


def test_a_cursor_needs_no_escaping_in_a_url():
    send_event("", "1", "news")
    assert re.fullmatch("[A-Za-z0-9_-]+", render('{% sse_cursor "news" "other" %}'))


def test_the_tag_may_be_kept_in_a_variable():
    assert render('{% sse_cursor "news" as here %}/stream?last_event_id={{ here }}') == (
        "/stream?last_event_id=" + cursor("news")
    )


def test_what_comes_after_the_page_was_rendered_is_what_its_stream_begins_with():
    send_event("", "on the page", "news")
    here = render('{% sse_cursor "news" "other" %}')
    send_event("news", "1", "news")
    send_event("other", "2", "other")
    send_event("news", "3", "news")
    assert sorted(first_events(["news", "other"], here)) == [("news", "1"), ("news", "3"), ("other", "2")]


def test_a_channel_without_history_has_no_cursor():
    with pytest.raises(ImproperlyConfigured, match="'none' has no history.*HISTORY"):
        render('{% sse_cursor "news" "none" %}')


@pytest.mark.parametrize("channel", [None, ""])
def test_a_channel_is_a_name(channel):
    with pytest.raises(ValueError, match="channel must be a name"):
        render("{% sse_cursor channel %}", channel=channel)


def test_a_page_is_shown_while_redis_is_down_and_its_stream_begins_with_a_reset(caplog):
    down = {"location": f"127.0.0.1:{free_port()}"}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=down):
        here = render('{% sse_cursor "news" %}')
    (record,) = [record for record in caplog.records if record.name == "django_sse"]
    assert "without a cursor" in record.getMessage()
    assert first_events(["news"], here) == [("stream-reset", '{"channels": ["news"], "reason": "unknown"}')]
