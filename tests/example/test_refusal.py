"""What a page in a real browser makes of a refused stream: it is served by itself as soon as there is room."""

import json
from contextlib import ExitStack

import pytest

from tests.example.test_pages import wait_for
from tests.helpers.client import request as http_request
from tests.helpers.servers import serve
from tests.helpers.wait import until

pytestmark = pytest.mark.browser

HOUSES = [("gunicorn-gthread", None), ("uvicorn", "plain"), ("uvicorn", "application")]
CONNECTING, OPEN, CLOSED = 0, 1, 2  # readyState (WHATWG HTML, section 9.2.2)
HEARTBEAT = 0.2  # seconds; a WSGI server sees by it that a page has left

STATE = "window.source.readyState"
FETCH = """async (url) => {
  window.received = "";
  const response = await fetch(url, { headers: { "Accept": "text/event-stream" } });
  window.encoding = response.headers.get("Content-Encoding");
  const decoder = new TextDecoder();
  (async () => {
    for await (const chunk of response.body) window.received += decoder.decode(chunk, { stream: true });
  })();
}"""


@pytest.fixture(scope="module")
def houses():
    """Call with the name of a server and of an application: its address. It has room for one stream."""
    running = {}
    env = {
        "TEST_DJANGO_SSE": json.dumps({"MAX_STREAMS": 1, "HEARTBEAT": HEARTBEAT}),
        "TEST_MIDDLEWARE": json.dumps(["django.middleware.gzip.GZipMiddleware"]),
    }
    with ExitStack() as stack:

        def house(name, app):
            if (name, app) not in running:
                options = {"settings": "tests.servers.safe_settings", "app": app and f"tests.asgi:{app}"}
                running[name, app] = stack.enter_context(serve(name, env=env, **options)).url + "/servers"
            return running[name, app]

        yield house


@pytest.fixture
def house(request, houses):
    """The address of a server in which no stream is open."""
    house = houses(*request.param)
    until(lambda: ask(house, "census/process")["registered"]["streams"] == 0, what="room")
    return house


def on(*houses):
    return pytest.mark.parametrize("house", houses, indirect=True, ids=lambda house: "-".join(filter(None, house)))


def listen(open_page, house, url):
    page = open_page(house + "/safe/page")
    page.evaluate("window.loads = (window.loads || 0) + 1")
    page.evaluate("url => window.listen(url)", house + url)
    return page


def send(house, channel, data):
    assert http_request("POST", f"{house}/send/{channel}", data={"event": "news", "data": data})[0] == 204


def ask(house, path):
    """Return what the server tells, which is JSON."""
    return json.loads(http_request("GET", f"{house}/{path}")[2])


def happened(page, name):
    return [each for each in page.evaluate("window.happened") if each[0] == name]


@on(HOUSES[0], HOUSES[-1])
def test_a_page_that_is_refused_is_served_by_itself_once_another_has_left_and_by_status_503_would_be_lost(
    house, open_page
):
    first = listen(open_page, house, "/queue/news")
    wait_for(first, f"{STATE} === {OPEN}")
    second = listen(open_page, house, "/queue/news")
    wait_for(second, "window.happened.some(([name]) => name === 'error')")
    assert second.evaluate(STATE) == CONNECTING
    lost = listen(open_page, house, "/safe/unavailable")
    wait_for(lost, f"{STATE} === {CLOSED}")

    send(house, "news", "for the first")
    wait_for(first, "window.happened.some(([name]) => name === 'news')")
    first.close()
    # The refusal was a stream that opened and ended, and the page was told so: the next `open` is the real one.
    opened = len(happened(second, "open"))
    wait_for(second, f"window.happened.filter(([name]) => name === 'open').length > {opened} && {STATE} === {OPEN}")
    send(house, "news", "for the second")
    wait_for(second, "window.happened.some(([name]) => name === 'news')")
    assert [data for _, _, data in happened(second, "news")] == ["for the second"]
    assert {state for _, state, _ in happened(second, "error")} == {CONNECTING}

    # What HTTP has for a refusal has meanwhile been taken for the last word.
    assert lost.evaluate(STATE) == CLOSED
    assert lost.evaluate("window.happened") == [["error", CLOSED, ""]]
    assert ask(house, "safe/attempts") == 1
    assert [page.evaluate("window.loads") for page in (second, lost)] == [1, 1]


@on(*HOUSES)
def test_a_page_reads_the_stream_as_it_comes_by_fetch_too(house, open_page):
    page = open_page(house + "/safe/page")
    page.evaluate(FETCH, house + "/queue/news")
    wait_for(page, "window.received.startsWith('retry: 2000\\n\\n')")
    assert page.evaluate("window.encoding") == "identity"
    for number in range(3):
        send(house, "news", f"{number}")
        wait_for(page, "number => window.received.includes(`event: news\\ndata: ${number}\\n\\n`)", number)
