"""The page of docs/history.rst, word for word, on a real server and in a real browser."""

import json

import pytest
from django.test import override_settings

from django_sse.redisqueue import send_event
from tests.example.document_views import TABLE
from tests.example.test_pages import wait_for
from tests.helpers.client import StreamClient

SHOWN = "[...document.querySelectorAll('#headlines li')].map((item) => item.textContent).join(', ')"


@pytest.fixture
def house(redis_server, serve):
    env = {"TEST_REDIS_LOCATION": redis_server.location}
    with serve("uvicorn", settings="tests.example.document_settings", env=env) as server:
        yield server


@pytest.fixture
def news(redis_server, redis_settings):
    """Change a headline in the database, and say so on the channel if ``sent``."""

    def news(pk, text, *, sent=True):
        redis_server.client().hset(TABLE, pk, text)
        if sent:
            send_event("headline", {"pk": pk, "text": text}, "news")

    with override_settings(DJANGO_SSE={"HISTORY": {}}):
        yield news


def wait_until_shown(page, *texts):
    wait_for(page, f"texts => {SHOWN} === texts", ", ".join(texts))


@pytest.mark.browser
def test_the_page_shows_the_state_whatever_happens(house, news, open_page, redis_server):
    page = open_page("about:blank")
    fetched = []

    def connect(route):
        news(1, "one, corrected")  # between the HTML and the stream
        news(2, "two")
        route.continue_()

    def state(route):
        answer = route.fetch()
        fetched.append(answer.json())
        news(4, "four, corrected")  # between the state and its arrival
        wait_for(page, "window.heard.includes('corrected')")
        route.fulfill(response=answer)

    page.route("**/news/events/**", connect)
    page.route("**/news/state/", state)
    news(1, "one")
    page.goto(house.url + "/news/")
    wait_until_shown(page, "one, corrected", "two")
    page.unroute("**/news/events/**")
    news(3, "three")
    wait_until_shown(page, "one, corrected", "two", "three")
    assert fetched == []

    page.evaluate("source.addEventListener('headline', (event) => { window.heard = event.data; })")
    redis_server.client().flushall()
    news(1, "another one", sent=False)  # only the state has it
    news(4, "four")
    wait_until_shown(page, "another one", "four, corrected")
    assert fetched == [{"headlines": [{"pk": 1, "text": "another one"}, {"pk": 4, "text": "four"}]}]


@pytest.mark.browser
def test_a_page_whose_state_cannot_be_fetched_is_loaded_again(house, news, open_page, redis_server):
    page = open_page(house.url + "/news/")
    news(1, "one")
    wait_until_shown(page, "one")
    page.route("**/news/state/", lambda route: route.fulfill(status=502, body="Bad Gateway"))
    page.evaluate("window.loaded = 'before'")
    redis_server.client().flushall()
    news(2, "two")
    wait_for(page, "window.loaded === undefined")
    wait_until_shown(page, "two")


@pytest.mark.server
def test_the_state_comes_through_the_stream_at_first_and_after_a_loss(house, news, redis_server):
    url = house.url + "/state-through-the-stream/"
    news(1, "one")
    with StreamClient(url) as first:
        assert_state(first, {1: "one"})
        news(2, "two")
        assert first.next_message().event == "headline"
        position = first.parser.last_event_id
    news(3, "three")
    with StreamClient(url, headers={"Last-Event-ID": position}) as later:
        assert json.loads(later.next_message().data) == {"pk": 3, "text": "three"}
        redis_server.client().flushall()
        news(4, "four")
        later.wait_closed()
        position = later.parser.last_event_id
    with StreamClient(url, headers={"Last-Event-ID": position}) as after:
        assert_state(after, {4: "four"})


def assert_state(client, texts):
    message = client.next_message()
    assert message.event == "state"
    assert {row["pk"]: row["text"] for row in json.loads(message.data)["headlines"]} == texts


@pytest.mark.server
def test_a_page_that_could_not_get_a_position_is_told_to_fetch_its_state(house):
    with StreamClient(house.url + "/news/events/?last_event_id=unknown") as client:
        message = client.next_message()
    assert (message.event, json.loads(message.data)["reason"]) == ("stream-reset", "unknown")
