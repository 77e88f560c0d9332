"""`self.sse`: what programs written for sse 1.2 may rely on, and the faults of sse 1.2 that are mended in ours."""

import copy
import pickle
import threading

import pytest
import sse

from django_sse.wire import Sse
from tests.helpers.eventsource import parse

# Characters at which str.splitlines() cuts, though only CR, LF and CRLF end a line of an event stream.
NOT_LINE_ENDS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def fresh(**kwargs):
    """An Sse whose first block, the retry, is already gone."""
    buffer = Sse(**kwargs)
    buffer.flush()
    return buffer


def read(buffer):
    return [(message.event, message.data) for message in parse(str(buffer).encode())]


# --- the interface of sse 1.2 ---------------------------------------------------------------------------------------


def test_it_is_an_sse_of_the_sse_package():
    assert issubclass(Sse, sse.Sse)


def test_a_new_buffer_holds_the_default_retry():
    assert str(Sse()) == "retry: 2000\n\n"


@pytest.mark.parametrize("milliseconds", [0, 1, 60_000])
def test_default_retry_is_given_by_name_or_by_place(milliseconds):
    assert str(Sse(default_retry=milliseconds)) == str(Sse(milliseconds)) == f"retry: {milliseconds}\n\n"


def test_set_retry_is_a_block_of_its_own():
    buffer = fresh()
    buffer.set_retry(5000)
    assert str(buffer) == "retry: 5000\n\n"


def test_retry_may_be_digits_in_a_text():
    buffer = fresh()
    buffer.set_retry("3000")
    assert str(buffer) == "retry: 3000\n\n"


def test_a_message_is_an_event_line_a_data_line_and_an_empty_line():
    buffer = fresh()
    buffer.add_message("news", "hello")
    assert str(buffer) == "event: news\ndata: hello\n\n"


def test_messages_follow_each_other_in_the_order_they_were_added():
    buffer = fresh()
    buffer.add_message("a", "1")
    buffer.set_retry(10)
    buffer.add_message("b", "2")
    assert str(buffer) == "event: a\ndata: 1\n\nretry: 10\n\nevent: b\ndata: 2\n\n"


def test_add_message_takes_its_arguments_by_name():
    buffer = fresh()
    buffer.add_message(event="news", text="hello", encoding="utf-8")
    assert str(buffer) == "event: news\ndata: hello\n\n"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_each_line_of_the_text_is_a_data_line(end):
    buffer = fresh()
    buffer.add_message("e", f"one{end}two")
    assert str(buffer) == "event: e\ndata: one\ndata: two\n\n"


def test_an_empty_line_inside_the_text_is_kept():
    buffer = fresh()
    buffer.add_message("e", "one\n\ntwo")
    assert read(buffer) == [("e", "one\n\ntwo")]


def test_lines_are_not_stripped():
    buffer = fresh()
    buffer.add_message("e", "  one \n\ttwo")
    assert str(buffer) == "event: e\ndata:   one \ndata: \ttwo\n\n"


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_one_data_line_per_item(kind):
    buffer = fresh()
    buffer.add_message("e", kind(["one", "two"]))
    assert str(buffer) == "event: e\ndata: one\ndata: two\n\n"


def test_a_set_is_one_data_line_per_item_in_any_order():
    buffer = fresh()
    buffer.add_message("e", {"one", "two"})
    assert sorted(str(buffer).splitlines()) == ["", "data: one", "data: two", "event: e"]


def test_an_item_of_a_list_may_have_several_lines():
    buffer = fresh()
    buffer.add_message("e", ["one\ntwo", "three"])
    assert read(buffer) == [("e", "one\ntwo\nthree")]


def test_bytes_are_utf8_text():
    buffer = fresh()
    buffer.add_message("e", "caffè".encode())
    assert str(buffer) == "event: e\ndata: caffè\n\n"


def test_bytes_are_decoded_by_the_encoding_given():
    buffer = fresh()
    buffer.add_message("e", "caffè".encode("latin-1"), "latin-1")
    buffer.add_message("e", ["caffè".encode("utf-16-le")], encoding="utf-16-le")
    assert str(buffer) == "event: e\ndata: caffè\n\n" * 2


def test_bytes_and_text_mix_in_a_list():
    buffer = fresh()
    buffer.add_message("e", [b"one", "two"])
    assert str(buffer) == "event: e\ndata: one\ndata: two\n\n"


@pytest.mark.parametrize("event_id", ["41", "a b", 41])
def test_an_id_is_a_block_of_its_own_so_that_it_holds_for_all_that_follows(event_id):
    buffer = fresh()
    buffer.set_event_id(event_id)
    buffer.add_message("e", "one")
    buffer.add_message("e", "two")
    assert str(buffer).startswith(f"id: {event_id}\n\nevent: e\n")
    assert [message.last_event_id for message in parse(str(buffer).encode())] == [str(event_id)] * 2


@pytest.mark.parametrize("event_id", [None, "", 0])
def test_a_falsy_id_resets_the_id(event_id):
    buffer = fresh()
    buffer.set_event_id(event_id)
    assert str(buffer) == "id\n\n"


def test_reset_event_id_makes_the_browser_forget_the_id():
    buffer = fresh()
    buffer.set_event_id("7")
    buffer.reset_event_id()
    buffer.add_message("e", "one")
    assert str(buffer) == "id: 7\n\nid\n\nevent: e\ndata: one\n\n"
    assert [message.last_event_id for message in parse(str(buffer).encode())] == [""]


@pytest.mark.parametrize("word", ["news", "room_7", "2nd", "été"])
def test_add_event_word_adds_a_message_of_that_name(word):
    buffer = fresh()
    getattr(buffer, f"add_event_{word}")(text="hello")
    assert str(buffer) == f"event: {word}\ndata: hello\n\n"


def test_add_event_word_takes_the_encoding_too():
    buffer = fresh()
    buffer.add_event_news(text="caffè".encode("latin-1"), encoding="latin-1")
    assert str(buffer) == "event: news\ndata: caffè\n\n"


def test_add_event_word_takes_no_argument_by_place():
    with pytest.raises(TypeError):
        fresh().add_event_news("hello")


@pytest.mark.parametrize("name", ["nothing", "add_event_", "add_news", "xadd_event_news", "add_event_a-b"])
def test_any_other_attribute_is_an_attribute_error(name):
    assert not hasattr(fresh(), name)
    with pytest.raises(AttributeError):
        getattr(fresh(), name)


def test_a_buffer_can_be_copied():
    buffer = Sse(default_retry=5)
    assert str(copy.copy(buffer)) == "retry: 5\n\n"


def test_a_buffer_unpickled_or_not_never_recurses_for_attributes_it_lacks():
    assert not hasattr(Sse.__new__(Sse), "nothing")
    try:
        twin = pickle.loads(pickle.dumps(Sse(default_retry=5)))
    except (TypeError, pickle.PicklingError):  # a lock inside cannot be pickled: an honest error is enough
        return
    assert str(twin) == "retry: 5\n\n"


def test_str_does_not_empty_the_buffer():
    buffer = fresh()
    buffer.add_message("e", "one")
    assert str(buffer) == str(buffer) == "event: e\ndata: one\n\n"


def test_iterating_empties_the_buffer():
    buffer = fresh()
    buffer.add_message("e", "one")
    assert "".join(buffer) == "event: e\ndata: one\n\n"
    assert str(buffer) == ""
    assert list(buffer) == []


def test_the_chunks_are_text():
    buffer = Sse()
    buffer.add_message(b"e", b"one")
    buffer.set_event_id(7)
    assert {type(chunk) for chunk in buffer} == {str}


def test_flush_throws_away_what_is_buffered():
    buffer = Sse()
    buffer.add_message("e", "one")
    buffer.flush()
    assert str(buffer) == ""
    buffer.add_message("e", "two")
    assert "".join(buffer) == "event: e\ndata: two\n\n"


def test_one_shot_join_makes_a_whole_body():
    buffer = Sse(default_retry=0)
    buffer.add_message("e", "one")
    assert "".join(buffer) == "retry: 0\n\nevent: e\ndata: one\n\n"


def test_the_empty_name_makes_a_plain_message():
    buffer = fresh()
    buffer.add_message("", "one")
    assert read(buffer) == [("message", "one")]


# --- subclasses -----------------------------------------------------------------------------------------------------


def test_a_subclass_may_write_to_the_buffer_list():
    class Raw(Sse):
        def comment(self, text):
            self._buffer.append(f": {text}\n\n")

    buffer = Raw(default_retry=9)
    buffer.comment("hi")
    assert str(buffer) == "retry: 9\n\n: hi\n\n"
    assert "".join(buffer) == "retry: 9\n\n: hi\n\n"
    assert str(buffer) == ""


def test_a_subclass_may_iterate_over_the_buffer_and_flush_it():
    class Refilling(Sse):
        def __init__(self, lines):
            super().__init__(default_retry=0)
            self.lines = lines

        def __iter__(self):
            for line in self.lines:
                self.add_message("line", line)
                yield from self._buffer
                self.flush()

    buffer = Refilling(["one", "two"])
    assert "".join(buffer) == "retry: 0\n\nevent: line\ndata: one\n\nevent: line\ndata: two\n\n"
    assert str(buffer) == ""


def test_a_subclass_may_refill_and_then_call_the_iteration_of_its_parent():
    class Refilling(Sse):
        lines = ("one", "two")

        def __iter__(self):
            for line in self.lines:
                self.add_message("line", line)
                yield from super().__iter__()

    assert "".join(Refilling()) == "retry: 2000\n\nevent: line\ndata: one\n\nevent: line\ndata: two\n\n"


def test_a_subclass_may_wrap_add_message():
    class Counting(Sse):
        count = 0

        def add_message(self, event, text, encoding="utf-8"):
            self.count += 1
            super().add_message(event, text, encoding)

    buffer = Counting()
    buffer.add_message("e", "one")
    buffer.add_event_e(text="two")
    assert buffer.count == 2


# --- faults of sse 1.2, mended --------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", NOT_LINE_ENDS, ids=lambda c: f"U+{ord(c):04X}")
@pytest.mark.parametrize("text", ["one{}two", "{}one", "one{}", "{}"])
def test_only_cr_and_lf_end_a_line(character, text):
    buffer = fresh()
    text = text.format(character)
    buffer.add_message("e", text)
    buffer.add_message("e", [text])
    assert read(buffer) == [("e", text), ("e", text)]


@pytest.mark.parametrize("text", ["", b"", [""], [], ()])
def test_an_empty_text_is_a_message_with_empty_data(text):
    buffer = fresh()
    buffer.add_message("e", text)
    assert read(buffer) == [("e", "")]


@pytest.mark.parametrize("name", ["a\ndata: forged", "a\rb", "a\r\nb", "\n", b"a\nb"])
def test_a_line_end_in_an_event_name_is_refused(name):
    buffer = fresh()
    with pytest.raises(ValueError, match="event"):
        buffer.add_message(name, "one")
    assert str(buffer) == ""


@pytest.mark.parametrize("event_id", ["1\ndata: forged", "1\r2", "1\r\n2", "1\0002", b"1\n2"])
def test_a_line_end_or_nul_in_an_id_is_refused(event_id):
    buffer = fresh()
    with pytest.raises(ValueError, match="id"):
        buffer.set_event_id(event_id)
    assert str(buffer) == ""


@pytest.mark.parametrize("retry", ["1\n\nevent: forged", "soon"])
def test_a_retry_that_is_no_number_is_refused(retry):
    buffer = fresh()
    with pytest.raises(ValueError, match="retry"):
        buffer.set_retry(retry)
    assert str(buffer) == ""


@pytest.mark.parametrize(
    "text",
    [
        ["good", object()],
        ["good", 5],
        ["good", None],
        b"\xff",
        ["good", b"\xff"],
        "\ud800",
        ["good", "\ud800"],
        object(),
    ],
    ids=["object", "number", "none", "bytes", "bytes-in-list", "surrogate", "surrogate-in-list", "no-text"],
)
def test_a_text_that_is_refused_leaves_no_half_block(text):
    buffer = fresh()
    buffer.add_message("before", "1")
    with pytest.raises((TypeError, ValueError)):
        buffer.add_message("e", text)
    buffer.add_message("after", "2")
    assert str(buffer) == "event: before\ndata: 1\n\nevent: after\ndata: 2\n\n"


def test_bytes_as_a_name_are_utf8():
    buffer = fresh()
    buffer.add_message("é".encode(), "one")
    assert str(buffer) == "event: é\ndata: one\n\n"


def test_bytes_as_an_id_are_utf8():
    buffer = fresh()
    buffer.set_event_id("é".encode())
    assert str(buffer) == "id: é\n\n"


def test_none_as_a_name_makes_a_plain_message():
    buffer = fresh()
    buffer.add_message(None, "one")
    assert read(buffer) == [("message", "one")]


def test_a_number_as_a_name_is_its_digits():
    buffer = fresh()
    buffer.add_message(5, "one")
    assert str(buffer) == "event: 5\ndata: one\n\n"


def test_messages_added_by_threads_while_the_buffer_is_drained_are_neither_lost_nor_torn():
    buffer = fresh()
    threads = [
        threading.Thread(target=lambda n=n: [buffer.add_message(f"t{n}", [f"{n}-{i}", "end"]) for i in range(500)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    body = ""
    while any(thread.is_alive() for thread in threads):
        body += "".join(buffer)
    body += "".join(buffer)

    messages = [(message.event, message.data) for message in parse(body.encode())]
    assert len(messages) == 2000
    for n in range(4):
        assert [data for event, data in messages if event == f"t{n}"] == [f"{n}-{i}\nend" for i in range(500)]
