"""The pages in a real browser: what a person with two windows side by side would see."""

from datetime import datetime, timedelta
from itertools import pairwise

import pytest

pytestmark = pytest.mark.browser

ALL_SHOW_IT = 1000  # milliseconds from the click on Send until every page shows the note

# performance.now() is monotonic, and with its origin added comparable between the pages of one browser.
NOW = "performance.timeOrigin + performance.now()"

WATCH_CLICK = f"""() => {{
  const clicked = () => {{ window.clicked = {NOW}; }};
  document.getElementById("send").addEventListener("click", clicked, {{ capture: true, once: true }});
}}"""

WATCH_NOTES = f"""() => {{
  const shown = (_, observer) => {{ window.shown = {NOW}; observer.disconnect(); }};
  window.shown = 0;
  new MutationObserver(shown).observe(document.getElementById("notes"), {{ childList: true }});
}}"""

HOSTILE = [
    "<script>window.hacked = true</script>",
    "<img src=x onerror='window.hacked = true'>",
    "\"double\" 'single' `back` &amp; \\u0041 \\",
    "line\u2028separator, paragraph\u2029separator, next\u0085line, vertical\vtab, form\ffeed",
    "👩‍🚀 🌿 é مرحبا \u202eright to left",
    "    leading spaces",
    "\n\nfirst\n\n    fourth",
    "a: b\n: c\ndata: d\nevent: e\nid: f\nretry: 0\n\ndata: g",
    '["note", "not mine"]',
    "{{ csrf_token }}{% now 'Y' %}",
]


def wait_for(page, expression, arg=None):
    """Wait until an expression is true in a page and return its value."""
    # Looks every 20 ms: by default it looks at every frame, of which a page in the background has one a second.
    return page.wait_for_function(expression, arg=arg, polling=20).json_value()


def wait_for_state(page, state):
    wait_for(page, "state => document.getElementById('state').textContent === state", state)


def notes(page):
    """The texts of the notes on a page, the newest first."""
    return page.locator("#notes p").all_text_contents()


GAP = "Notes may be missing here"


def lines(page):
    """The texts of the notes on a page and of the gaps between them, the newest first."""
    return page.locator("#notes p, #notes .gap").all_text_contents()


def send(text, page, *others):
    """Send a note from a page; return the milliseconds until the last of these pages showed a new one."""
    for each in (page, *others):
        each.evaluate(WATCH_NOTES)
    page.evaluate(WATCH_CLICK)
    page.bring_to_front()
    page.fill("#text", text)
    page.click("#send")
    shown = [wait_for(each, "window.shown") for each in (page, *others)]
    return max(shown) - page.evaluate("window.clicked")


def open_live(open_page, url):
    page = open_page(url)
    wait_for_state(page, "live")
    return page


def test_what_one_page_sends_every_page_shows_within_a_second(example, open_page):
    here, there = (open_live(open_page, example.url + "/board/") for _ in range(2))
    times = [send(f"note {number}", here, there) for number in range(3)]
    times += [send("an answer", there, here)]
    print("milliseconds:", *map(round, times))
    assert max(times) < ALL_SHOW_IT
    assert notes(here) == notes(there) == ["an answer", "note 2", "note 1", "note 0"]
    assert here.input_value("#text") == ""


def test_enter_sends_and_shift_enter_starts_a_new_line(example, open_page):
    page = open_live(open_page, example.url + "/board/")
    box = page.get_by_label("Your note")
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    box.press("Enter")
    page.get_by_role("log", name="Notes").get_by_role("listitem").wait_for()
    assert notes(page) == ["one\ntwo"]


def test_a_refused_note_stays_and_the_reason_is_shown(example, open_page):
    page = open_live(open_page, example.url + "/board/")
    page.fill("#text", "   ")
    page.click("#send")
    page.wait_for_selector("#problem:not(:empty)")
    assert page.text_content("#problem") == "Please write something first."
    assert page.input_value("#text") == "   "
    send("something", page)
    page.wait_for_selector("#problem:empty", state="attached")  # the note may be shown before its request is answered


def test_notes_are_shown_as_they_were_written(example, open_page):
    page = open_live(open_page, example.url + "/board/")
    for text in HOSTILE:
        send(text, page)
    assert notes(page) == HOSTILE[::-1]
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("getComputedStyle(document.querySelector('#notes p')).whiteSpace") == "pre-wrap"


def test_rooms_are_separate_from_each_other_and_from_the_board(example, open_page):
    garden, same_garden, board_room = (
        open_live(open_page, f"{example.url}/room/{name}/") for name in ("garden", "garden", "board")
    )
    board = open_live(open_page, example.url + "/board/")
    send("to the garden", garden, same_garden)
    send("to the room named board", board_room)
    send("to the board", board)
    # Each page has by now shown a later note than those that were not meant for it.
    send("to the garden again", same_garden, garden)
    assert notes(garden) == notes(same_garden) == ["to the garden again", "to the garden"]
    assert notes(board_room) == ["to the room named board"]
    assert notes(board) == ["to the board"]


def test_a_room_is_entered_by_its_name(example, open_page):
    page = open_page(example.url + "/room/")
    page.get_by_label("Name of the room").fill("Garden Shed")
    page.get_by_role("button", name="Enter").click()
    page.wait_for_url(example.url + "/room/garden-shed/")
    wait_for_state(page, "live")
    assert page.text_content("h1") == "Room garden-shed"


def test_the_clock_ticks_every_second(example, open_page):
    page = open_live(open_page, example.url + "/clock/")
    page.evaluate(
        """() => {
          const time = document.getElementById("time");
          window.ticks = [];
          new MutationObserver(() => window.ticks.push(time.dateTime)).observe(time, { childList: true });
        }"""
    )
    wait_for(page, "window.ticks.length >= 4")
    ticks = [datetime.fromisoformat(tick) for tick in page.evaluate("window.ticks")]
    # The first may be the one that greets the page, at any moment of its second.
    gaps = [later - earlier for earlier, later in pairwise(ticks[1:])]
    assert all(timedelta(seconds=0.5) < gap < timedelta(seconds=1.5) for gap in gaps), ticks


def test_the_pages_go_on_by_themselves_when_the_server_is_killed_and_started_again(example, open_page):
    here, there = (open_live(open_page, example.url + "/board/") for _ in range(2))
    clock = open_live(open_page, example.url + "/clock/")
    send("before", here, there)

    example.kill()
    for page in (here, there, clock):
        wait_for_state(page, "reconnecting")
    here.bring_to_front()
    here.fill("#text", "too early")
    here.click("#send")
    here.wait_for_selector("#problem:not(:empty)")
    assert here.text_content("#problem") == "The server does not answer. Your note is still here."
    assert here.input_value("#text") == "too early"

    last_tick = clock.get_attribute("#time", "datetime")
    example.start()
    for page in (here, there, clock):
        wait_for_state(page, "live")
    for page in (here, there):  # the history went with its process
        page.wait_for_selector(".gap")
    assert send("after", here, there) < ALL_SHOW_IT
    assert lines(here) == lines(there) == ["after", GAP, "before"]
    wait_for(clock, "last => document.getElementById('time').dateTime !== last", last_tick)


def test_a_page_goes_on_after_an_answer_that_is_no_stream(start_example, open_page):
    """EventSource itself gives up for good on what a proxy says while its server is away."""
    example = start_example("runserver")
    page = open_page(example.url)
    page.route("**/events/*", lambda route: route.fulfill(status=502, body="Bad Gateway"))
    page.goto(example.url + "/board/")
    wait_for_state(page, "reconnecting")
    send("meanwhile", open_live(open_page, example.url + "/board/"))
    page.unroute("**/events/*")
    wait_for_state(page, "live")
    page.locator("#notes p").first.wait_for()
    send("after", page)
    assert lines(page) == ["after", "meanwhile"]


def test_a_page_fits_a_small_screen_whatever_is_sent(start_example, open_page):
    example = start_example("runserver")
    page = open_live(open_page, f"{example.url}/room/{'long' * 12}/")
    page.set_viewport_size({"width": 320, "height": 640})
    send("x" * 500, page)
    for path in ("/room/", "/clock/", "/"):
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        page.goto(example.url + path)
    assert page.evaluate("document.documentElement.scrollWidth") == 320


def test_a_page_that_was_left_comes_back_from_the_browsers_cache_and_is_live_again(example, open_page):
    page = open_live(open_page, example.url + "/board/")
    send("before", page)
    page.evaluate("window.kept = true")
    page.goto(example.url + "/clock/")
    wait_for_state(page, "live")
    send("meanwhile", open_live(open_page, example.url + "/board/"))
    page.bring_to_front()
    page.evaluate("history.back()")
    wait_for(page, "window.kept")
    wait_for_state(page, "live")
    wait_for(page, "document.querySelectorAll('#notes p').length === 2")
    send("after", page)
    assert lines(page) == ["after", "meanwhile", "before"]


def test_the_pages_that_were_left_hold_no_connection(example, open_page):
    """A browser has six connections for a host: an eighth page in one tab would wait for ever."""
    page = open_page(example.url)
    for number in range(8):
        page.goto(f"{example.url}/room/number-{number}/")
        wait_for_state(page, "live")


def test_with_redis_a_note_reaches_the_pages_of_another_process(start_example, redis_server, open_page):
    first, second = (start_example("uvicorn", REDIS_URL=redis_server.url) for _ in range(2))
    here = open_live(open_page, first.url + "/board/")
    there = open_live(open_page, second.url + "/board/")
    times = [send("over Redis", here, there), send("and back", there, here)]
    print("milliseconds:", *map(round, times))
    assert max(times) < ALL_SHOW_IT
    assert notes(here) == notes(there) == ["and back", "over Redis"]


def test_with_redis_a_page_whose_server_is_killed_misses_no_note(start_example, redis_server, open_page):
    first, second = (start_example("uvicorn", REDIS_URL=redis_server.url) for _ in range(2))
    here, room = open_live(open_page, first.url + "/board/"), open_live(open_page, first.url + "/room/garden/")
    there, same_room = open_live(open_page, second.url + "/board/"), open_live(open_page, second.url + "/room/garden/")
    send("before", there, here)
    first.kill()
    for page in (here, room):
        wait_for_state(page, "reconnecting")
    for number in range(3):
        send(f"meanwhile {number}", there)
    send("to the room", same_room)
    first.start()
    wait_for(here, "document.querySelectorAll('#notes p').length === 4")
    wait_for(room, "document.querySelectorAll('#notes p').length === 1")
    send("after", there, here)
    assert lines(here) == lines(there) == ["after", "meanwhile 2", "meanwhile 1", "meanwhile 0", "before"]
    assert lines(room) == lines(same_room) == ["to the room"]


def test_with_redis_a_page_that_was_open_before_its_stream_misses_no_note(start_example, redis_server, open_page):
    example = start_example("uvicorn", REDIS_URL=redis_server.url)
    other = open_live(open_page, example.url + "/board/")
    page = open_page(example.url)

    def connect(route):
        send("between", other)
        route.continue_()

    page.route("**/events/*", connect)
    page.goto(example.url + "/board/")
    page.locator("#notes p").first.wait_for()
    assert lines(page) == ["between"]
