"""Ids: a stream's position in all of its channels, opaque, signed, and of no use for any other channel."""

import base64
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_sse import cursor
from django_sse.cursor import MAX_CHANNELS, Cursors
from django_sse.event import Event
from django_sse.history import Position
from django_sse.wire import encode

CURSORS = Cursors([b"key"])
POSITIONS = st.builds(Position, st.integers(0, 2**32 - 1), st.integers(0, 2**53 - 1), st.integers(0, 2**24 - 1))
CHANNELS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), POSITIONS)
HERE = Position(2**31, 1000, 2**23)


def raw(id):
    return base64.urlsafe_b64decode(id + "=" * (-len(id) % 4))


def text(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


@given(positions=CHANNELS)
@settings(deadline=None, max_examples=300)
def test_an_id_says_where_each_of_its_channels_is(positions):
    id = CURSORS.encode(positions)
    assert CURSORS.decode(id, positions) == positions
    assert CURSORS.decode(id, []) == {}


@given(positions=CHANNELS, others=st.sets(st.text(max_size=8)))
@settings(deadline=None, max_examples=100)
def test_an_id_speaks_of_no_channel_but_those_that_are_asked_for(positions, others):
    asked = {*[*positions][::2], *others}
    known = CURSORS.decode(CURSORS.encode(positions), asked)
    assert known == {channel: position for channel, position in positions.items() if channel in asked}


def test_the_order_of_channels_does_not_matter():
    id = CURSORS.encode({"a": HERE, "b": Position(1, 2, 3)})
    assert CURSORS.decode(id, ["b", "a"]) == {"b": Position(1, 2, 3), "a": HERE}


def test_the_same_positions_have_the_same_id():
    assert CURSORS.encode({"a": HERE}) == Cursors([b"key"]).encode({"a": HERE})
    assert CURSORS.encode({"a": HERE}) != CURSORS.encode({"a": HERE._replace(offset=1001)})


@pytest.mark.parametrize("position", [Position(0, 0, 0), Position(2**32 - 1, 2**53 - 1, 2**24 - 1)])
@pytest.mark.parametrize("offset", [0, 1, 127, 128, 16_383, 16_384, 2**53 - 1])
def test_every_offset_has_its_form(position, offset):
    position = position._replace(offset=offset)
    assert CURSORS.decode(CURSORS.encode({"a": position, "b": HERE}), "ab") == {"a": position, "b": HERE}


# --- what an id looks like ---


def test_an_id_is_text_that_headers_urls_and_event_streams_carry():
    for number in range(200):
        id = CURSORS.encode({"a": Position(number, number, number)})
        assert set(id) <= {*string.ascii_letters, *string.digits, "-", "_"}
        assert encode(Event("", "", id)).startswith(b"id: %s\n" % id.encode())


def test_an_id_is_short():
    """A million events on each channel, which is three bytes of it."""
    position = Position(2**32 - 1, 1_000_000, 2**24 - 1)
    lengths = [len(CURSORS.encode({str(number): position for number in range(count)})) for count in (1, 2, 10, 100)]
    assert lengths[0] <= 32
    assert lengths[1] - lengths[0] <= 20
    assert lengths[3] <= 2048


def test_the_id_of_as_many_channels_as_may_be_is_understood():
    positions = {f"room-{number}": Position(2**32 - 1, 2**53 - 1, 2**24 - 1) for number in range(MAX_CHANNELS)}
    assert CURSORS.decode(CURSORS.encode(positions), positions) == positions


def test_the_name_of_a_channel_cannot_be_read_from_an_id():
    for name in ("secret", "room-17", "ünïcode"):
        assert name.encode() not in raw(CURSORS.encode({name: HERE}))


def test_who_does_not_have_the_key_cannot_find_a_channel_by_trying_names():
    tag = slice(8, 12)
    assert raw(CURSORS.encode({"a": HERE}))[tag] != raw(Cursors([b"another"]).encode({"a": HERE}))[tag]


# --- what is no id of ours ---


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "1",
        "17",
        "garbage",
        "=",
        "====",
        "A",
        "AAAA",
        "A" * 11,
        "AAAAAAAAAAA",
        "é",
        "\0",
        "\n",
        " ",
        "a b",
        "%",
        "☃",
    ],
)
def test_garbage_is_no_position(garbage):
    assert CURSORS.decode(garbage, "ab") == {}


@given(garbage=st.text(max_size=60) | st.binary(max_size=60).map(text))
@settings(deadline=None, max_examples=300)
def test_whatever_comes_is_no_position(garbage):
    assert CURSORS.decode(garbage, "ab") == {}


@pytest.mark.parametrize("length", [4095, 4096, 4097, 1_000_000])
def test_a_huge_id_is_no_position(length):
    assert CURSORS.decode("A" * length, "a") == {}


def test_an_id_longer_than_any_of_ours_is_not_even_looked_at():
    positions = {str(number): Position(2**32 - 1, 2**53 - 1, 2**24 - 1) for number in range(200)}
    id = CURSORS.encode(positions)
    assert len(id) > 4096
    assert CURSORS.decode(id, positions) == {}


def test_an_id_that_was_changed_anywhere_is_no_position():
    id = CURSORS.encode({"a": HERE, "b": HERE})
    for place in range(len(id)):
        for other in ("A", "B", "_", "-", "+", "/", "=", "\n", "é", ""):
            changed = id[:place] + other + id[place + 1 :]
            assert changed == id or CURSORS.decode(changed, "ab") == {}


def test_every_bit_of_an_id_counts():
    id = raw(CURSORS.encode({"a": HERE}))
    for bit in range(8 * len(id)):
        changed = bytearray(id)
        changed[bit // 8] ^= 1 << bit % 8
        assert CURSORS.decode(text(changed), "a") == {}


def test_an_id_has_one_form():
    """Nothing that base64 would let pass as well: what is left over in the last character, padding, other alphabets."""
    random.seed(17)
    for _ in range(50):
        id = CURSORS.encode({"a": Position(random.getrandbits(32), random.getrandbits(20), random.getrandbits(24))})
        forms = {id + "=", id + "==", id + "\n", " " + id, id.replace("-", "+").replace("_", "/")} - {id}
        forms |= {id[:-1] + other for other in string.ascii_letters + string.digits + "-_"} - {id}
        assert [form for form in forms if CURSORS.decode(form, "a")] == []
        assert CURSORS.decode(id, "a")


@pytest.mark.parametrize("part", [slice(1, None), slice(None, -1), slice(None, 8), slice(None, 11)])
def test_a_part_of_an_id_is_no_position(part):
    assert CURSORS.decode(CURSORS.encode({"a": HERE})[part], "a") == {}
    assert CURSORS.decode(text(raw(CURSORS.encode({"a": HERE}))[part]), "a") == {}


def test_an_id_of_no_channel_is_understood_and_says_nothing():
    assert CURSORS.decode(CURSORS.encode({}), "a") == {}


# --- keys ---


def test_an_id_of_another_key_is_no_position():
    assert Cursors([b"another"]).decode(CURSORS.encode({"a": HERE}), "a") == {}
    assert Cursors([b"key "]).decode(CURSORS.encode({"a": HERE}), "a") == {}


def test_an_id_of_an_older_key_is_understood_and_new_ones_are_of_the_new_key():
    both = Cursors([b"new", b"older", b"key"])
    assert both.decode(CURSORS.encode({"a": HERE, "b": HERE}), "ab") == {"a": HERE, "b": HERE}
    assert both.encode({"a": HERE}) == Cursors([b"new"]).encode({"a": HERE})
    assert CURSORS.decode(both.encode({"a": HERE}), "a") == {}


@pytest.mark.parametrize("key", [b"", b"k" * 1000, "ключ".encode()])
def test_a_key_may_be_any_bytes(key):
    cursors = Cursors([key])
    assert cursors.decode(cursors.encode({"a": HERE}), "a") == {"a": HERE}


def test_names_without_end_take_no_memory_without_end(monkeypatch):
    monkeypatch.setattr(cursor, "NAMES", 10)
    cursors = Cursors([b"key"])
    for number in range(100):
        positions = {f"user-{number}": HERE, f"user-{number // 2}": HERE}
        assert cursors.decode(cursors.encode(positions), positions) == positions
        assert sum(len(signer._tags) for signer in cursors._signers) <= 10
