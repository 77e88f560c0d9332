"""An event refuses what an event stream cannot carry, and a payload gives back the event that it was made of."""

import dataclasses
import enum
import json
import re
from functools import partial

import pytest
from django.core.serializers.json import DjangoJSONEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from django_sse.event import Event, decode_message, decode_payload, encode_payload, require_utf8, text_of

# Where text goes wrong first: line ends, what str.splitlines() takes for one, and what JSON or the wire treat apart.
AWKWARD = ["\r\n", *'\r\n\v\f\x1c\x85\u2028\u2029\0 :"\\\ufeff😀']
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=8).map("".join)
NAMES = TEXTS.map(lambda text: re.sub("[\r\n]", "", text))
IDS = NAMES.map(lambda text: text.replace("\0", ""))
EVENTS = st.builds(Event, NAMES, TEXTS, st.none() | IDS)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.dictionaries(TEXTS, inner | TEXTS | st.lists(inner | TEXTS, max_size=3), max_size=3),
    max_leaves=6,
)

# The number of examples is bounded, not the time for each: the machine may be busy.
unhurried = settings(deadline=None)


class Kind(str, enum.Enum):
    NEWS = "news"


class Number(int, enum.Enum):
    ONE = 1


# --- What an event is ---


def test_an_event_is_a_value():
    event = Event("news", "hello", "7")
    assert event == Event("news", "hello", "7") != Event("news", "hello")
    assert len({event, Event("news", "hello", "7")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.data = "changed"


def test_an_event_has_no_id_unless_it_is_given_one():
    assert Event("news", "hello").id is None


@unhurried
@given(NAMES, TEXTS, IDS)
def test_any_text_but_a_few_characters_is_kept_as_it_is(name, data, id):
    event = Event(name, data, id)
    assert (event.name, event.data, event.id) == (name, data, id)


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"], ids=["CR", "LF", "CRLF"])
@pytest.mark.parametrize("text", ["{}", "a{}", "{}b", "a{}b"])
def test_a_line_end_is_refused_in_a_name_and_in_an_id(end, text):
    with pytest.raises(ValueError, match="^event name "):
        Event(text.format(end), "")
    with pytest.raises(ValueError, match="^event id "):
        Event("", "", text.format(end))


def test_nul_is_refused_in_an_id_alone():
    with pytest.raises(ValueError, match="^event id .*NUL"):
        Event("", "", "a\0b")
    assert Event("a\0b", "a\0b").name == "a\0b"


@pytest.mark.parametrize("code_point", [0xD800, 0xDBFF, 0xDC00, 0xDFFF], ids=hex)
def test_a_lone_surrogate_is_refused_everywhere_by_the_name_of_the_field_and_its_place(code_point):
    surrogate = chr(code_point)
    with pytest.raises(ValueError, match="^event name .*surrogate at position 1"):
        Event(f"a{surrogate}", "")
    with pytest.raises(ValueError, match="^data .*surrogate at position 2"):
        Event("", f"ab{surrogate}c")
    with pytest.raises(ValueError, match="^event id .*surrogate at position 0"):
        Event("", "", surrogate)


# --- What may be handed in ---


@pytest.mark.parametrize(
    ("given_name", "name"),
    [("news", "news"), ("", ""), (None, ""), (b"news", "news"), ("é".encode(), "é"), (5, "5"), (0, "0"), (-1, "-1")],
)
def test_a_name_may_be_text_bytes_or_a_whole_number_and_none_is_no_name(given_name, name):
    assert Event.of(given_name, "") == Event(name, "")


@pytest.mark.parametrize(
    ("given_id", "id"), [("a", "a"), ("", ""), (None, None), (b"a", "a"), ("é".encode(), "é"), (5, "5"), (0, "0")]
)
def test_an_id_may_be_text_bytes_or_a_whole_number_and_none_is_no_id(given_id, id):
    assert Event.of("", "", given_id) == Event("", "", id)


@pytest.mark.parametrize("value", [True, False, 1.5, [], ["a"], {}, ("a",), object()], ids=repr)
def test_any_other_name_or_id_is_a_type_error_that_says_which(value):
    with pytest.raises(TypeError, match=f"^event name .* not {type(value).__name__}$"):
        Event.of(value, "")
    with pytest.raises(TypeError, match=f"^event id .* not {type(value).__name__}$"):
        Event.of("", "", value)


def test_bytes_that_are_no_utf8_are_refused_by_the_name_of_the_argument():
    with pytest.raises(ValueError, match="^event name is not valid utf-8"):
        Event.of(b"\xff", "")
    with pytest.raises(ValueError, match="^event id is not valid utf-8"):
        Event.of("", "", b"\xff")
    with pytest.raises(ValueError, match="^data is not valid utf-8"):
        Event.of("", b"\xff")
    with pytest.raises(ValueError, match="^data is not valid utf-8"):
        Event.of("", ["a", b"\xff"])


def test_a_member_of_an_enumeration_of_texts_is_its_text():
    # format() of a member is its text or not, from Python to Python: it must not reach the wire as a member.
    event = Event.of(Kind.NEWS, Kind.NEWS, Kind.NEWS)
    assert f"{event.name} {event.data} {event.id}" == "news news news"


def test_a_member_of_an_enumeration_of_numbers_is_its_digits():
    assert Event.of(Number.ONE, "", Number.ONE) == Event("1", "", "1")


@unhurried
@given(TEXTS)
def test_text_stays_as_it_is(text):
    assert text_of(text) == text


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_decoded_by_the_encoding(kind):
    assert text_of(kind("é\r\n".encode())) == "é\r\n"
    assert text_of(kind(b"\xe9"), encoding="latin-1") == "é"


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_each_item_of_a_list_tuple_or_set_is_a_line(kind):
    assert sorted(text_of(kind(["b", "é".encode(), "a"])).split("\n")) == ["a", "b", "é"]


def test_the_items_of_a_list_are_decoded_by_the_encoding():
    assert text_of(["é", b"\xe9"], encoding="latin-1") == "é\né"


def test_the_items_of_a_list_keep_their_order_and_their_empty_lines():
    assert text_of(["b", "", "a", "", ""]) == "b\n\na\n\n"
    assert text_of([]) == text_of([""]) == ""


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"], ids=["CR", "LF", "CRLF"])
def test_an_item_never_shares_its_line_end_with_the_next_item(end):
    assert re.split("\r\n|\r|\n", text_of([f"a{end}", "b"])) == ["a", "", "b"]


@pytest.mark.parametrize("item", [None, 1, True, {}, [], ["a"]], ids=repr)
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_with_any_other_item_is_a_type_error_that_names_data_and_the_way_out(kind, item):
    with pytest.raises(TypeError, match=rf"^data: .* not {type(item).__name__}; .*json\.dumps"):
        text_of(kind(["a", item]))


@pytest.mark.parametrize("value", [None, True, False, 0, -1, 1.5, {}, {"a": [1, "é", None]}], ids=repr)
def test_any_other_value_is_json(value):
    assert text_of(value) == json.dumps(value)


def test_json_is_made_by_the_function_given():
    value = {"at": Kind.NEWS}
    assert text_of(value, dumps=lambda value: f"<{len(value)}>") == "<1>"
    assert Event.of("", value, dumps=partial(json.dumps, cls=DjangoJSONEncoder)).data == '{"at": "news"}'
    assert json.loads(encode_payload("a", value, dumps=lambda value: "made")) == ["a", "made"]


@pytest.mark.parametrize(
    "value", [object(), {"a": object()}, {"a": {1}}], ids=["object", "in a dict", "a set in a dict"]
)
def test_what_json_cannot_say_is_a_type_error(value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        text_of(value)


# --- The payload ---


@unhurried
@given(NAMES, TEXTS | st.lists(TEXTS, max_size=4) | st.lists(TEXTS, max_size=4).map(tuple))
def test_a_payload_of_text_or_lines_is_byte_for_byte_what_0_4_1_publishes(name, data):
    assert encode_payload(name, data) == json.dumps([name, data])


@unhurried
@given(EVENTS)
def test_a_payload_reads_back_as_the_event_that_it_was_made_of(event):
    payload = encode_payload(event.name, event.data, event.id)
    assert decode_payload(payload) == decode_payload(payload.encode()) == event


@unhurried
@given(EVENTS)
def test_a_payload_with_unescaped_text_reads_the_same(event):
    items = [event.name, event.data] if event.id is None else [event.name, event.data, event.id]
    assert decode_payload(json.dumps(items, ensure_ascii=False).encode()) == event


@unhurried
@given(NAMES, st.lists(TEXTS | TEXTS.map(str.encode), max_size=4))
def test_lines_travel_as_a_list_and_read_back_as_lines(name, lines):
    texts = [line.decode() if isinstance(line, bytes) else line for line in lines]
    payload = encode_payload(name, lines)
    assert json.loads(payload) == [name, texts]
    assert decode_payload(payload) == Event(name, text_of(texts))


@pytest.mark.parametrize("kind", [tuple, set, frozenset])
def test_any_kind_of_lines_travels_as_a_list(kind):
    assert json.loads(encode_payload("a", kind([b"line"]))) == ["a", ["line"]]


@unhurried
@given(NAMES, JSON_VALUES, st.none() | IDS)
def test_any_other_value_travels_as_json_text_and_reads_back_as_json(name, value, id):
    event = decode_payload(encode_payload(name, value, id))
    assert (event.name, event.id) == (name, id)
    assert json.loads(event.data) == value


@pytest.mark.parametrize(
    ("name", "data", "id", "payload"),
    [
        ("news", b"\xc3\xa9", None, ["news", "é"]),
        (b"news", "hello", None, ["news", "hello"]),
        (5, "hello", None, ["5", "hello"]),
        (None, "hello", None, ["", "hello"]),
        ("news", "", None, ["news", ""]),
        ("news", {"a": 1}, None, ["news", '{"a": 1}']),
        ("news", None, None, ["news", "null"]),
        ("news", "hello", "7", ["news", "hello", "7"]),
        ("news", "hello", 7, ["news", "hello", "7"]),
        ("news", "hello", b"7", ["news", "hello", "7"]),
        ("news", "hello", "", ["news", "hello", ""]),
        ("news", ["a", "b"], "7", ["news", ["a", "b"], "7"]),
    ],
)
def test_a_payload_is_a_pair_unless_there_is_an_id(name, data, id, payload):
    assert encode_payload(name, data, id) == json.dumps(payload)


@pytest.mark.parametrize(
    ("name", "data", "id", "error", "says"),
    [
        ("a\nb", "", None, ValueError, "event name"),
        ("a\rb", "", None, ValueError, "event name"),
        ("\ud800", "", None, ValueError, "event name"),
        (b"\xff", "", None, ValueError, "event name"),
        (True, "", None, TypeError, "event name"),
        ("", "\ud800", None, ValueError, "data"),
        ("", ["a", "\ud800"], None, ValueError, "data"),
        ("", b"\xff", None, ValueError, "data"),
        ("", ["a", 1], None, TypeError, "data"),
        ("", "", "a\nb", ValueError, "event id"),
        ("", "", "a\0b", ValueError, "event id"),
        ("", "", 1.5, TypeError, "event id"),
    ],
)
def test_a_mistake_shows_where_the_payload_is_made(name, data, id, error, says):
    with pytest.raises(error, match=f"^{says}"):
        encode_payload(name, data, id)


@pytest.mark.parametrize(
    ("payload", "event"),
    [
        ('["", "hello"]', Event("", "hello")),
        ('[null, "hello"]', Event("", "hello")),
        ('[5, "hello"]', Event("5", "hello")),
        ('["a", 5]', Event("a", "5")),
        ('["a", -1.5]', Event("a", "-1.5")),
        ('["a", true]', Event("a", "true")),
        ('["a", null]', Event("a", "null")),
        ('["a", {"b": [1, null]}]', Event("a", '{"b": [1, null]}')),
        ('["a", {}]', Event("a", "{}")),
        ('["a", []]', Event("a", "")),
        ('["a", ["b", "", "c"]]', Event("a", "b\n\nc")),
        ('["a", "b\\r\\nc"]', Event("a", "b\r\nc")),
        (' [ "a" ,\n"b" ] ', Event("a", "b")),
        ('["\\ud83d\\ude00", "\\ud83d\\ude00"]', Event("😀", "😀")),
        ('["a", "b", "7"]', Event("a", "b", "7")),
        ('["a", "b", 7]', Event("a", "b", "7")),
        ('["a", "b", ""]', Event("a", "b", "")),
        ('["a", "b", null]', Event("a", "b")),
    ],
)
def test_what_another_program_may_publish_is_read_for_what_it_means(payload, event):
    assert decode_payload(payload) == decode_payload(payload.encode()) == event


@pytest.mark.parametrize("extra", ["{}", '{"id": "7"}', '{"anything": [1]}'])
def test_an_object_as_the_third_item_is_reserved_and_no_id(extra):
    assert decode_payload(f'["a", "b", {extra}]') == Event("a", "b")


MALFORMED = {
    "nothing": b"",
    "white space": b" ",
    "not JSON": b"hello",
    "half a list": b'["a", "b"',
    "more after the list": b'["a", "b"] "c"',
    "single quotes": b"['a', 'b']",
    "a byte order mark": '\ufeff["a", "b"]'.encode(),
    "a number": b"1",
    "null": b"null",
    "a text": b'"hello"',
    "a text of two letters": b'"ab"',
    "a text of three letters": b'"abc"',
    "an object": b'{"event": "a"}',
    "an object of two keys": b'{"a": 1, "b": 2}',
    "an object of three keys": b'{"a": 1, "b": 2, "c": 3}',
    "an empty list": b"[]",
    "a list of one": b'["a"]',
    "a list of four": b'["a", "b", "c", "d"]',
    "a boolean for a name": b'[true, "b"]',
    "a fraction for a name": b'[1.5, "b"]',
    "a list for a name": b'[["a"], "b"]',
    "an object for a name": b'[{}, "b"]',
    "a line end in the name": b'["a\\nb", "c"]',
    "a carriage return in the name": b'["a\\rb", "c"]',
    "a number among the lines": b'["a", ["b", 1]]',
    "null among the lines": b'["a", ["b", null]]',
    "a list among the lines": b'["a", [["b"]]]',
    "a boolean for an id": b'["a", "b", true]',
    "a fraction for an id": b'["a", "b", 1.5]',
    "a list for an id": b'["a", "b", ["7"]]',
    "a line end in the id": b'["a", "b", "7\\n8"]',
    "NUL in the id": b'["a", "b", "7\\u0000"]',
    "invalid UTF-8": b'["a", "\xff"]',
    "a surrogate in UTF-8": b'["a", "\xed\xa0\x80"]',
    "UTF-16": '["a", "b"]'.encode("utf-16"),
    "UTF-32 without a mark": '["a", "b"]'.encode("utf-32-le"),
    "a lone surrogate in the name": b'["\\ud800", "b"]',
    "a lone surrogate in the data": b'["a", "\\udc00"]',
    "a lone surrogate among the lines": b'["a", ["b", "\\udc00"]]',
    "a lone surrogate in the id": b'["a", "b", "\\ud800"]',
    "100,000 brackets": b"[" * 100_000,
    "100,000 brackets that close": b'["a", ' + b"[" * 100_000 + b"]" * 100_000 + b"]",
    "100,000 objects": b'["a", ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]",
    "a number of 5,000 digits for a name": b"[" + b"9" * 5_000 + b', "b"]',
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_payload_is_a_value_error_that_says_what_is_wrong(payload):
    with pytest.raises(ValueError, match="."):
        decode_payload(payload)


@unhurried
@given(st.binary(max_size=40) | st.text(max_size=40) | JSON_VALUES.map(json.dumps))
def test_any_payload_at_all_is_an_event_or_a_value_error(payload):
    try:
        assert isinstance(decode_payload(payload), Event)
    except ValueError:
        pass


@unhurried
@given(st.lists(JSON_VALUES | TEXTS | st.lists(JSON_VALUES | TEXTS, max_size=3), min_size=2, max_size=3))
def test_any_payload_of_two_or_three_items_is_an_event_or_a_value_error(items):
    try:
        event = decode_payload(json.dumps(items))
    except ValueError:
        pass
    else:
        assert decode_payload(encode_payload(event.name, event.data, event.id)) == event


# --- The third item ---


@pytest.mark.parametrize("extra", [{}, {"epoch": 1, "offset": 2, "check": 3}, {"id": "7"}, {"a": [{"b": None}]}])
def test_an_object_as_the_third_item_comes_beside_the_event(extra):
    payload = json.dumps(["a", ["b", "c"], extra])
    assert decode_message(payload) == decode_message(payload.encode()) == (Event("a", "b\nc"), extra)


@pytest.mark.parametrize(
    ("payload", "event"),
    [
        ('["a", "b"]', Event("a", "b")),
        ('["a", "b", null]', Event("a", "b")),
        ('["a", "b", "7"]', Event("a", "b", "7")),
        ('["a", {"b": 1}]', Event("a", '{"b": 1}')),
    ],
)
def test_beside_an_event_without_an_object_there_is_nothing(payload, event):
    assert decode_message(payload) == (event, None)


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_payload_is_no_message(payload):
    with pytest.raises(ValueError, match="."):
        decode_message(payload)


@pytest.mark.parametrize("payload", [b'["a", "b", {}, {}]', b'["a", {"b": 1}', b'[{}, "b", {}]', b'["a\\n", "b", {}]'])
def test_an_object_does_not_make_up_for_what_is_wrong_before_it(payload):
    with pytest.raises(ValueError, match="."):
        decode_message(payload)


@unhurried
@given(EVENTS, st.dictionaries(TEXTS, JSON_VALUES, max_size=3))
def test_an_object_that_is_added_to_a_payload_comes_back(event, extra):
    payload = encode_payload(event.name, event.data)
    assert decode_message(f"{payload[:-1]},{json.dumps(extra)}]") == (Event(event.name, event.data), extra)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\ud83d\ude00"])
def test_a_text_that_utf_8_cannot_carry_is_refused_by_the_name_of_its_argument(text):
    with pytest.raises(ValueError, match="^event_id contains a lone surrogate at position "):
        require_utf8("event_id", text)
    assert require_utf8("event_id", "é😀\0\n") is None
