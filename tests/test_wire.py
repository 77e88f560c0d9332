"""What the wire carries, a browser reads back as it was: every byte here is read by the rules of the HTML standard."""

import json
import re
import sys
import threading
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from django_sse.event import Event
from django_sse.wire import Sse, comment, encode, retry
from tests.helpers.eventsource import Message, Parser, parse

# Where text goes wrong first: line ends, what str.splitlines() takes for one, the bytes of a field, forged fields.
AWKWARD = [
    "\r\n",
    *"\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029\0 :\ufeffé😀",
    "id",
    "data: x",
    "event:y",
    "\n\n",
    "retry: 1\n",
]
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=8).map("".join)
NAMES = TEXTS.map(lambda text: re.sub("[\r\n]", "", text))
IDS = NAMES.map(lambda text: text.replace("\0", ""))
EVENTS = st.builds(Event, NAMES, TEXTS, st.none() | IDS)
SURROGATES = st.characters(categories=["Cs"])

# The number of examples is bounded, not the time for each: the machine may be busy.
unhurried = settings(deadline=None)


def lines(text):
    """`text` as a browser gives it to a page: each line end is LF."""
    return re.sub("\r\n|\r", "\n", text)


def expected(*events):
    """The messages that a browser dispatches for `events`: an id holds until the next one."""
    messages, last = [], ""
    for event in events:
        last = last if event.id is None else event.id
        messages.append(Message(event.name or "message", lines(event.data), last))
    return messages


def empty():
    """An Sse whose first block, the retry, is already gone."""
    buffer = Sse()
    buffer.flush()
    return buffer


def read(buffer):
    """What a browser dispatches for what `buffer` holds."""
    return parse(str(buffer).encode())


# --- encode ---


@unhurried
@given(EVENTS)
@example(Event("", ""))
@example(Event("message", "\n"))
@example(Event(" a", " b", " c"))
@example(Event(":", ":", ":"))
@example(Event("a", "b\r\n\rc\n\r\n"))
@example(Event("a\0", "\0b"))
def test_an_event_reads_back_as_it_was(event):
    assert parse(encode(event)) == expected(event)


@unhurried
@given(st.lists(EVENTS, max_size=6), st.data())
def test_a_stream_cut_anywhere_reads_the_same(events, data):
    body = b"".join(map(encode, events))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=8), label="cuts")), len(body)]
    parser = Parser()
    assert [m for a, b in pairwise(cuts) for m in parser.feed(body[a:b])] == expected(*events)


@settings(unhurried, max_examples=25)
@given(st.lists(EVENTS, max_size=3))
def test_a_stream_that_comes_byte_by_byte_reads_the_same(events):
    parser = Parser()
    body = b"".join(map(encode, events))
    assert [m for byte in body for m in parser.feed(bytes([byte]))] == expected(*events)


@unhurried
@given(EVENTS)
def test_an_event_is_one_whole_block(event):
    block = encode(event)
    assert block.endswith(b"\n\n")
    assert b"\n\n" not in block[:-1]
    assert b"\r" not in block


@unhurried
@given(EVENTS)
def test_an_event_changes_nothing_but_itself(event):
    parser = Parser()
    parser.feed(encode(event))
    assert parser.retry is None
    assert parser.comments == []
    assert parser.last_event_id == (event.id or "")


def test_the_bytes_are_the_id_if_any_the_event_and_a_data_field_a_line():
    assert encode(Event("news", "hello")) == b"event: news\ndata: hello\n\n"
    assert encode(Event("news", "a\nb\r\nc\rd", "7")) == b"id: 7\nevent: news\ndata: a\ndata: b\ndata: c\ndata: d\n\n"
    assert encode(Event("é", "\u2028", "😀")) == "id: 😀\nevent: é\ndata: \u2028\n\n".encode()


def test_an_event_without_a_name_is_a_plain_message():
    assert parse(encode(Event("", "hello"))) == [Message("message", "hello")]


@pytest.mark.parametrize("data", ["", "\n", "\n\n", "a\n", "a\n\n", "\na"])
def test_empty_lines_are_neither_lost_nor_added(data):
    assert parse(encode(Event("a", data))) == [Message("a", data)]


def test_an_event_without_data_is_dispatched_with_empty_data():
    assert parse(encode(Event("a", ""))) == [Message("a", "")]


@pytest.mark.parametrize("character", ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_no_character_but_cr_and_lf_ends_a_line(character):
    text = f"a{character}b{character}"
    assert parse(encode(Event(text, text, text))) == [Message(text, text, text)]


def test_the_empty_id_resets_the_last_event_id():
    parser = Parser()
    messages = [m for id in ("7", None, "") for m in parser.feed(encode(Event("a", "b", id)))]
    assert [message.last_event_id for message in messages] == ["7", "7", ""]


# --- comment and retry ---


@unhurried
@given(TEXTS)
def test_a_comment_never_becomes_anything_else(text):
    parser = Parser()
    # A browser takes away one space behind the colon, so the text is found as it was.
    assert parser.feed(comment(text)) == []
    assert "\n".join(parser.comments) == lines(text)
    assert (parser.retry, parser.last_event_id) == (None, "")


@unhurried
@given(EVENTS, TEXTS, EVENTS)
def test_a_comment_between_events_leaves_them_as_they_are(first, text, second):
    assert parse(encode(first) + comment(text) + encode(second)) == expected(first, second)


def test_the_shortest_comment_is_a_heartbeat():
    assert comment() == b":\n\n"
    assert comment("a\r\n\rb") == b": a\n:\n: b\n\n"


@unhurried
@given(st.integers(0, 10**12))
def test_a_retry_is_read_as_milliseconds(milliseconds):
    parser = Parser()
    assert parser.feed(retry(milliseconds)) == []
    assert parser.retry == milliseconds


NO_RETRY = [
    -1,
    "-1",
    "",
    " ",
    "1 ",
    "+1",
    "1.5",
    1.5,
    1e3,
    None,
    True,
    False,
    "x",
    b"5",
    "1\n",
    "1\n\ndata: x",
    "٣",
    "²",
]


@pytest.mark.parametrize("value", NO_RETRY, ids=repr)
def test_a_retry_that_is_not_a_whole_number_of_milliseconds_is_refused(value):
    with pytest.raises(ValueError, match="^retry must be a whole number of milliseconds"):
        retry(value)
    buffer = empty()
    with pytest.raises(ValueError, match="^retry must be a whole number of milliseconds"):
        buffer.set_retry(value)
    assert str(buffer) == ""
    with pytest.raises(ValueError, match="^retry must be a whole number of milliseconds"):
        Sse(default_retry=value)


@pytest.mark.parametrize("value", [0, 1, 5000, "0", "5000", 10**12], ids=repr)
def test_a_retry_may_be_a_number_or_its_digits(value):
    buffer = empty()
    buffer.set_retry(value)
    assert str(buffer) == str(Sse(value)) == retry(value).decode() == f"retry: {value}\n\n"


def test_a_refused_retry_leaves_the_one_before_in_force():
    buffer = Sse(default_retry=5000)
    with pytest.raises(ValueError, match="retry"):
        buffer.set_retry("soon")
    assert buffer._retry == 5000
    assert str(buffer) == "retry: 5000\n\n"


# --- Sse: messages ---

TEXT_OR_BYTES = TEXTS | TEXTS.map(str.encode)


def as_text(value):
    return value.decode() if isinstance(value, bytes) else value


@unhurried
@given(st.lists(st.tuples(NAMES, TEXT_OR_BYTES), max_size=5))
def test_messages_read_back_as_they_were_added(messages):
    buffer = empty()
    for name, text in messages:
        buffer.add_message(name, text)
    assert read(buffer) == expected(*(Event(name, as_text(text)) for name, text in messages))


@unhurried
@given(NAMES, st.lists(TEXT_OR_BYTES, max_size=5), st.sampled_from([list, tuple]))
def test_the_items_of_a_list_read_back_as_lines(name, items, kind):
    buffer = empty()
    buffer.add_message(name, kind(items))
    assert read(buffer) == [Message(name or "message", "\n".join(lines(as_text(item)) for item in items))]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_the_items_of_a_set_are_lines_in_any_order(kind):
    buffer = empty()
    buffer.add_message("a", kind(["b", b"c", "d"]))
    [message] = read(buffer)
    assert sorted(message.data.split("\n")) == ["b", "c", "d"]


def test_bytes_are_text_in_the_encoding_given():
    buffer = empty()
    buffer.add_message("a", b"\xe9", "latin-1")
    buffer.add_message("a", ["é", b"\xe9"], encoding="latin-1")
    buffer.add_event_a(text=b"\xe9", encoding="latin-1")
    buffer.add_message("a", "é".encode())
    assert [message.data for message in read(buffer)] == ["é", "é\né", "é", "é"]


@pytest.mark.parametrize("value", [{"a": [1, "é\n", None]}, {}, 0, -1, 1.5, 10**30, True, False, None], ids=repr)
def test_a_dict_a_number_a_boolean_or_none_is_sent_as_json(value):
    buffer = empty()
    buffer.add_message("a", value)
    [message] = read(buffer)
    assert json.loads(message.data) == value


@pytest.mark.parametrize(
    ("name", "event"),
    [("", "message"), (None, "message"), ("message", "message"), (b"caf\xc3\xa9", "café"), (5, "5"), (" a:", " a:")],
)
def test_a_name_may_be_text_bytes_a_number_or_nothing(name, event):
    buffer = empty()
    buffer.add_message(name, "hello")
    assert read(buffer) == [Message(event, "hello")]


def test_a_text_that_makes_something_else_of_itself_is_sent_as_the_text_that_it_is():
    class Text(str):
        __slots__ = ()

        def __str__(self):
            return "x\n\ndata: forged"

        def __format__(self, spec):
            return str(self)

    buffer = empty()
    buffer.set_event_id(Text("7"))
    buffer.add_message(Text("a"), Text("b"))
    buffer.add_message(Text("a"), [Text("b"), Text("c")])
    assert read(buffer) == [Message("a", "b", "7"), Message("a", "b\nc", "7")]


REFUSED = {
    "LF in the name": (("a\nb", "c"), ValueError, "event name"),
    "CR in the name": (("a\rb", "c"), ValueError, "event name"),
    "CRLF at the end of the name": (("a\r\n", "c"), ValueError, "event name"),
    "a line end in a name of bytes": ((b"a\nb", "c"), ValueError, "event name"),
    "a lone surrogate in the name": (("a\ud800", "c"), ValueError, "event name"),
    "a name of bytes that are no UTF-8": ((b"\xff", "c"), ValueError, "event name"),
    "a boolean for a name": ((True, "c"), TypeError, "event name"),
    "a list for a name": ((["a"], "c"), TypeError, "event name"),
    "a lone surrogate in the text": (("a", "b\udc00"), ValueError, "data"),
    "a lone surrogate in a later line": (("a", ["b", "\udc00"]), ValueError, "data"),
    "bytes that are no UTF-8": (("a", b"\xff"), ValueError, "data"),
    "bytes that are not in the encoding": (("a", ["b", b"\xff"], "ascii"), ValueError, "data"),
    "a number in a later line": (("a", ["b", "c", 1]), TypeError, "data"),
    "a dict in a list": (("a", [{}]), TypeError, "data"),
    "None in a list": (("a", ("b", None)), TypeError, "data"),
    "what is no JSON": (("a", object()), TypeError, "object"),
}


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_a_message_that_is_refused_leaves_nothing_behind(arguments, error, says):
    buffer = empty()
    buffer.add_message("before", "1")
    with pytest.raises(error, match=says):
        buffer.add_message(*arguments)
    buffer.add_message("after", "2")
    assert read(buffer) == [Message("before", "1"), Message("after", "2")]


@unhurried
@given(NAMES, SURROGATES, NAMES)
def test_a_lone_surrogate_is_refused_wherever_it_stands(before, surrogate, after):
    text = before + surrogate + after
    buffer = empty()
    with pytest.raises(ValueError, match="^event name "):
        buffer.add_message(text, "")
    with pytest.raises(ValueError, match="^data "):
        buffer.add_message("", text)
    with pytest.raises(ValueError, match="^event id "):
        buffer.set_event_id(text.replace("\0", ""))
    with pytest.raises(ValueError, match="surrogate"):
        buffer.add_comment(text)
    assert str(buffer) == ""


def test_add_event_word_adds_a_message_of_that_name():
    buffer = empty()
    buffer.add_event_news(text="hello")
    buffer.add_event_größe_2(text=["a", "b"])
    assert read(buffer) == [Message("news", "hello"), Message("größe_2", "a\nb")]


@pytest.mark.parametrize("name", ["missing", "add_event", "add_event_", "add_event_a-b", "xadd_event_a", "__missing__"])
def test_any_other_attribute_is_an_error_that_names_the_class_and_the_attribute(name):
    with pytest.raises(AttributeError, match=f"^'Sse' object has no attribute '{name}'$"):
        getattr(Sse(), name)
    assert not hasattr(Sse(), name)

    class Mine(Sse):
        pass

    with pytest.raises(AttributeError, match=f"^'Mine' object has no attribute '{name}'$"):
        getattr(Mine(), name)


# --- Sse: ids and comments ---


@unhurried
@given(st.lists(IDS.filter(bool), min_size=1, max_size=4))
def test_an_id_holds_for_every_message_until_it_is_set_anew(ids):
    buffer = empty()
    for id in ids:
        buffer.set_event_id(id)
        buffer.add_message("a", "1")
        buffer.add_message("a", "2")
    assert [message.last_event_id for message in read(buffer)] == [id for id in ids for _ in range(2)]


@pytest.mark.parametrize("value", [None, "", b"", 0, False], ids=repr)
def test_a_falsy_id_resets_the_id(value):
    buffer = empty()
    buffer.set_event_id("7")
    buffer.set_event_id(value)
    buffer.add_message("a", "b")
    assert "id\n\n" in str(buffer)
    assert read(buffer) == [Message("a", "b", "")]


def test_reset_event_id_makes_a_browser_forget_the_id():
    buffer = empty()
    buffer.set_event_id("7")
    buffer.reset_event_id()
    buffer.add_message("a", "b")
    assert read(buffer) == [Message("a", "b", "")]


@pytest.mark.parametrize(("value", "id"), [("a b", "a b"), (b"caf\xc3\xa9", "café"), (5, "5"), ("0", "0"), (" ", " ")])
def test_an_id_may_be_text_bytes_or_a_number(value, id):
    buffer = empty()
    buffer.set_event_id(value)
    buffer.add_message("a", "b")
    assert read(buffer) == [Message("a", "b", id)]


REFUSED_IDS = {
    ValueError: ["a\nb", "a\r", b"\n", "a\0b", b"\0", "\ud800", b"\xff"],
    TypeError: [True, 1.5, ["a"]],
}


@pytest.mark.parametrize(
    ("value", "error"), [(value, error) for error, values in REFUSED_IDS.items() for value in values], ids=repr
)
def test_an_id_that_is_refused_leaves_nothing_behind(value, error):
    buffer = empty()
    buffer.set_event_id("7")
    with pytest.raises(error, match="^event id "):
        buffer.set_event_id(value)
    buffer.add_message("a", "b")
    assert read(buffer) == [Message("a", "b", "7")]


@unhurried
@given(st.lists(TEXTS, max_size=3))
def test_a_comment_of_any_text_is_no_message(texts):
    buffer = empty()
    buffer.add_message("before", "1")
    for text in texts:
        buffer.add_comment(text)
    buffer.add_message("after", "2")
    assert read(buffer) == [Message("before", "1"), Message("after", "2")]


def test_a_comment_has_a_line_for_each_line_of_its_text():
    buffer = empty()
    buffer.add_comment("a\nevent: b\r\n\r\ndata: c\r")
    assert str(buffer) == ": a\n: event: b\n:\n: data: c\n:\n\n"


def test_a_comment_without_text_is_a_heartbeat():
    buffer = empty()
    buffer.add_comment()
    assert str(buffer).encode() == comment()


# --- Sse: the buffer ---


def test_a_new_buffer_holds_the_retry():
    assert str(Sse()) == "retry: 2000\n\n"


def test_str_leaves_the_buffer_as_it_is():
    buffer = Sse()
    buffer.add_message("a", "b")
    assert str(buffer) == str(buffer) == "retry: 2000\n\nevent: a\ndata: b\n\n"


def test_iterating_gives_whole_blocks_and_empties_the_buffer():
    buffer = Sse()
    buffer.set_event_id("7")
    buffer.add_message("a", "b\nc")
    buffer.add_comment("d\ne")
    assert list(buffer) == ["retry: 2000\n\n", "id: 7\n\n", "event: a\ndata: b\ndata: c\n\n", ": d\n: e\n\n"]
    assert list(buffer) == []
    assert str(buffer) == ""


def test_what_is_added_while_the_buffer_is_iterated_comes_the_next_time():
    buffer = empty()
    buffer.add_message("a", "1")
    taken = []
    for block in buffer:
        taken.append(block)
        buffer.add_message("a", "2")
    assert taken == ["event: a\ndata: 1\n\n"]
    assert read(buffer) == [Message("a", "2")]


def test_what_a_thread_adds_while_the_blocks_are_taken_comes_the_next_time():
    class Shared(list):
        def __getitem__(self, index):
            items = super().__getitem__(index)
            self.append("late\n\n")  # as if by another thread, between two steps of the one that takes
            return items

    buffer = empty()
    buffer._buffer = Shared(["early\n\n"])
    assert list(buffer) == ["early\n\n"]
    assert list(buffer) == ["late\n\n"]


def test_flush_throws_away_what_waits():
    buffer = Sse()
    buffer.add_message("a", "1")
    buffer.flush()
    assert str(buffer) == ""
    buffer.add_message("a", "2")
    assert read(buffer) == [Message("a", "2")]


def test_a_buffer_that_threads_fill_while_it_is_drained_loses_and_tears_nothing():
    buffer = empty()
    fillers, messages = 4, 400

    def fill(filler):
        for number in range(messages):
            buffer.add_message(f"filler {filler}", [str(number), "end"])
            buffer.add_comment("a\nb")

    threads = [threading.Thread(target=fill, args=(filler,)) for filler in range(fillers)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds: threads take turns as often as they can
    try:
        for thread in threads:
            thread.start()
        blocks = []
        while any(thread.is_alive() for thread in threads):
            blocks += buffer
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    blocks += buffer

    parser = Parser()
    read_back = parser.feed("".join(blocks).encode())
    assert len(blocks) == 2 * fillers * messages
    assert len(parser.comments) == 2 * fillers * messages
    for filler in range(fillers):
        texts = [message.data for message in read_back if message.event == f"filler {filler}"]
        assert texts == [f"{number}\nend" for number in range(messages)]


def test_a_buffer_can_be_read_as_text_while_a_thread_fills_it():
    buffer, block = empty(), "event: a\ndata: b\ndata: c\n\n"
    filler = threading.Thread(target=lambda: [buffer.add_message("a", ["b", "c"]) for _ in range(400)])
    filler.start()
    while filler.is_alive():
        text = str(buffer)
        assert text == block * (len(text) // len(block))
    filler.join()
    assert str(buffer) == block * 400


def test_a_subclass_may_write_into_the_buffer():
    class Padded(Sse):
        def add_message(self, event, text, encoding="utf-8"):
            self._buffer.append(":" + " " * 10 + "\n\n")
            super().add_message(event, text, encoding)

    buffer = Padded()
    buffer.add_event_a(text="b")
    assert list(buffer) == ["retry: 2000\n\n", ":          \n\n", "event: a\ndata: b\n\n"]


def test_a_subclass_may_fill_the_buffer_when_it_is_iterated():
    class Reader(Sse):
        def __init__(self, source):
            super().__init__()
            self.source = source

        def __iter__(self):
            for item in self.source:
                self.add_message("a", item)
            return super().__iter__()

    assert list(Reader("12")) == ["retry: 2000\n\n", "event: a\ndata: 1\n\n", "event: a\ndata: 2\n\n"]


def test_a_subclass_may_iterate_over_the_buffer_itself_and_flush_it():
    class Joined(Sse):
        def __iter__(self):
            yield "".join(self._buffer)
            self.flush()

    buffer = Joined(1)
    buffer.add_message("a", "b")
    assert list(buffer) == ["retry: 1\n\nevent: a\ndata: b\n\n"]
    assert buffer._buffer == []


def test_an_event_is_added_with_its_id_as_one_block():
    buffer = empty()
    buffer.add(Event("news", "a\nb", "7"))
    buffer.add(Event("", "c"))
    assert list(buffer) == ["id: 7\nevent: news\ndata: a\ndata: b\n\n", "event: \ndata: c\n\n"]


@unhurried
@given(st.lists(EVENTS, max_size=4))
def test_what_is_added_is_read_back_as_it_was(events):
    buffer = empty()
    for event in events:
        buffer.add(event)
    assert read(buffer) == expected(*events)
    assert "".join(buffer).encode() == b"".join(map(encode, events))
