"""Settings are read when they are asked for, and a wrong one is an error that names it."""

import functools
import re
import threading
from decimal import Decimal

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from django_sse.conf import DEFAULTS, check_seconds, configuration
from django_sse.history import History

MIB = 1024 * 1024
RIGHT, SIC = "REDIS_SSEQUEUE_CHANNEL_NAME", "REDIS_SSEQUEUE_CHANEL_NAME"


@pytest.fixture
def _without_settings(settings):
    for name in ("DJANGO_SSE", "REDIS_SSEQUEUE_CONNECTION_SETTINGS", RIGHT, SIC):
        if hasattr(settings, name):
            delattr(settings, name)


def read(attribute):
    """What a key says; what is kept is asked for by channel."""
    value = getattr(configuration, attribute)
    return value("news") if callable(value) else value


# --- defaults ---


@pytest.mark.usefixtures("_without_settings")
def test_without_settings_there_are_defaults():
    assert configuration.connection == {}
    assert configuration.channel == "sse"
    assert configuration.heartbeat == 15
    assert configuration.retry == 2000
    assert configuration.mailbox == (256, 1024 * 1024)
    assert configuration.threads == 256
    assert configuration.max_age is None
    assert configuration.stall_timeout == 30
    assert configuration.max_streams == 10_000
    assert configuration.max_streams_per_user is None
    assert configuration.shutdown_window == 5
    assert configuration.channel_prefix == ""
    assert configuration.history("news") is None
    assert not configuration.has_history
    assert configuration.max_payload == MIB
    assert configuration.unknown == []


@pytest.mark.usefixtures("_without_settings")
def test_a_restart_waits_for_nobody_where_the_code_is_being_changed(settings):
    settings.DEBUG = True
    assert configuration.shutdown_window == 0
    settings.DJANGO_SSE = {"SHUTDOWN_WINDOW": 2}
    assert configuration.shutdown_window == 2
    settings.DJANGO_SSE = {"SHUTDOWN_WINDOW": "soon"}
    with pytest.raises(ImproperlyConfigured):
        assert configuration.shutdown_window


@override_settings(DJANGO_SSE={"RETRY": 5000})
def test_what_is_not_set_keeps_its_default():
    assert configuration.retry == 5000
    assert configuration.heartbeat == 15
    assert configuration.mailbox == (256, 1024 * 1024)


@pytest.mark.parametrize(
    ("mailbox", "bounds"),
    [
        ({}, (256, 1048576)),
        ({"EVENTS": 8}, (8, 1048576)),
        ({"BYTES": 64}, (256, 64)),
        ({"EVENTS": 1, "BYTES": 1}, (1, 1)),
    ],
)
def test_each_bound_of_the_mailbox_has_its_own_default(settings, mailbox, bounds):
    settings.DJANGO_SSE = {"MAILBOX": mailbox}
    assert configuration.mailbox == bounds


# --- read late ---


@pytest.mark.parametrize(
    ("key", "value", "attribute", "expected"),
    [
        ("HEARTBEAT", 5, "heartbeat", 5),
        ("HEARTBEAT", 0.5, "heartbeat", 0.5),
        ("HEARTBEAT", None, "heartbeat", None),
        ("RETRY", 0, "retry", 0),
        ("RETRY", 60_000, "retry", 60_000),
        ("MAILBOX", {"EVENTS": 2, "BYTES": 3}, "mailbox", (2, 3)),
        ("THREADS", 1, "threads", 1),
        ("MAX_AGE", 3600, "max_age", 3600),
        ("MAX_AGE", 0.5, "max_age", 0.5),
        ("STALL_TIMEOUT", 1, "stall_timeout", 1),
        ("STALL_TIMEOUT", None, "stall_timeout", None),
        ("MAX_STREAMS", 1, "max_streams", 1),
        ("MAX_STREAMS", None, "max_streams", None),
        ("MAX_STREAMS_PER_USER", 6, "max_streams_per_user", 6),
        ("SHUTDOWN_WINDOW", 0, "shutdown_window", 0),
        ("SHUTDOWN_WINDOW", 0.5, "shutdown_window", 0.5),
        ("CHANNEL_PREFIX", "shop:é:", "channel_prefix", "shop:é:"),
        ("HISTORY", {"SIZE": 2, "TTL": 3}, "history", History("news", 2, 3)),
        ("HISTORY", None, "history", None),
        ("MAX_PAYLOAD", 1, "max_payload", 1),
        ("MAX_PAYLOAD", None, "max_payload", None),
    ],
)
def test_a_key_holds_as_long_as_it_is_overridden(key, value, attribute, expected):
    before = read(attribute)
    with override_settings(DJANGO_SSE={key: value}):
        assert read(attribute) == expected
    assert read(attribute) == before


def test_the_connection_settings_are_the_object_of_the_settings_itself():
    one, two = {"location": "one:1"}, {"location": "two:2"}
    with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=one):
        assert configuration.connection is one
        with override_settings(REDIS_SSEQUEUE_CONNECTION_SETTINGS=two):
            assert configuration.connection is two
        assert configuration.connection is one


@pytest.mark.usefixtures("_without_settings")
@pytest.mark.parametrize("name", [RIGHT, SIC])
def test_the_channel_is_named_in_either_spelling_and_read_late(name):
    with override_settings(**{name: "news"}):
        assert configuration.channel == "news"
    assert configuration.channel == "sse"


@pytest.mark.usefixtures("_without_settings")
def test_the_right_spelling_wins():
    with override_settings(**{RIGHT: "right", SIC: "sic"}):
        assert configuration.channel == "right"


# --- wrong values ---

NO_SECONDS = [-1, -0.5, "15", b"15", True, False, [], {}, Decimal(1), float("nan"), float("inf"), 10**400]
NO_WHOLE_NUMBERS = [-1, 1.5, 2.0, "1", b"1", None, True, False, [], {}, Decimal(1), float("nan")]
WRONG = {
    'DJANGO_SSE["HEARTBEAT"]': [0, -1, 0.0, -0.5, "15", True, False, [], {}, Decimal(1), float("nan")],
    'DJANGO_SSE["RETRY"]': NO_WHOLE_NUMBERS,
    'DJANGO_SSE["MAILBOX"]': [None, 1, [1, 2], "EVENTS", {"events": 1}, {"EVENTS": 1, "BYTE": 1}, {1: 2}],
    'DJANGO_SSE["MAILBOX"]["EVENTS"]': [0, *NO_WHOLE_NUMBERS],
    'DJANGO_SSE["MAILBOX"]["BYTES"]': [0, *NO_WHOLE_NUMBERS],
    'DJANGO_SSE["THREADS"]': [0, *NO_WHOLE_NUMBERS],
    'DJANGO_SSE["MAX_AGE"]': [0, 0.0, *NO_SECONDS],
    'DJANGO_SSE["STALL_TIMEOUT"]': [0, 0.0, *NO_SECONDS],
    'DJANGO_SSE["MAX_STREAMS"]': [0, *(value for value in NO_WHOLE_NUMBERS if value is not None)],
    'DJANGO_SSE["MAX_STREAMS_PER_USER"]': [0, *(value for value in NO_WHOLE_NUMBERS if value is not None)],
    'DJANGO_SSE["SHUTDOWN_WINDOW"]': [None, *NO_SECONDS],
    'DJANGO_SSE["HISTORY"]': [1, True, False, "news", ["news"], ()],
    'DJANGO_SSE["HISTORY"]["SIZE"]': [0, *NO_WHOLE_NUMBERS],
    'DJANGO_SSE["HISTORY"]["TTL"]': [0, *NO_WHOLE_NUMBERS],
    "DJANGO_SSE[\"HISTORY\"]['news']": [1, True, "1000", [1000, 3600], {"size": 1}, {"SIZE": 1, "TTLS": 1}, {1: 2}],
    'DJANGO_SSE["HISTORY"][\'*\']["SIZE"]': [0, *NO_WHOLE_NUMBERS],
    'DJANGO_SSE["HISTORY"][\'n*\']["TTL"]': [0, *NO_WHOLE_NUMBERS],
    'DJANGO_SSE["MAX_PAYLOAD"]': [0, *(value for value in NO_WHOLE_NUMBERS if value is not None)],
    'DJANGO_SSE["CHANNEL_PREFIX"]': [None, 1, b"shop:", ["shop:"], "shop:\n", "\0", "\ud800"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name} = {value!r:.20}") for name, values in WRONG.items() for value in values],
)
def test_a_wrong_value_is_an_error_that_names_the_setting_and_the_value(settings, name, value):
    keys = re.findall("""\\[["'](.+?)["']]""", name)
    settings.DJANGO_SSE = functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value)
    with pytest.raises(ImproperlyConfigured, match=f"^{re.escape(name)} must be .* not {re.escape(repr(value))}"):
        read(keys[0].lower())


@pytest.mark.parametrize(
    "value", [float("inf"), 10**400, 2 * threading.TIMEOUT_MAX], ids=["infinity", "10**400", "600 years"]
)
def test_a_heartbeat_that_no_thread_can_wait_for_is_an_error(settings, value):
    assert value > threading.TIMEOUT_MAX  # beyond which wait() is an OverflowError
    settings.DJANGO_SSE = {"HEARTBEAT": value}
    with pytest.raises(ImproperlyConfigured, match=r'^DJANGO_SSE\["HEARTBEAT"\] must be '):
        assert configuration.heartbeat


@pytest.mark.parametrize("given", [None, ["HEARTBEAT"], "HEARTBEAT", 1, True], ids=repr)
@pytest.mark.parametrize("attribute", [*map(str.lower, DEFAULTS), "has_history", "histories", "unknown"])
def test_no_key_can_be_read_from_what_is_no_dict(settings, attribute, given):
    settings.DJANGO_SSE = given
    with pytest.raises(ImproperlyConfigured, match=f"^DJANGO_SSE must be a dict, not {re.escape(repr(given))}"):
        read(attribute)


@pytest.mark.parametrize("attribute", ["retry", "mailbox", "threads", "max_streams", "shutdown_window"])
def test_a_wrong_value_is_no_harm_to_the_other_keys(settings, attribute):
    settings.DJANGO_SSE = {"HEARTBEAT": "soon"}
    assert getattr(configuration, attribute)


def test_the_heartbeat_of_a_view_is_checked_under_its_own_name():
    assert check_seconds("Clock.heartbeat", 2.5, "for no heartbeats") == 2.5
    assert check_seconds("Clock.heartbeat", None, "for no heartbeats") is None
    with pytest.raises(ImproperlyConfigured, match="^Clock.heartbeat must be .* above 0, or None for no .*, not 0"):
        check_seconds("Clock.heartbeat", 0, "for no heartbeats")


# --- unknown keys ---


@pytest.mark.parametrize(
    ("given", "unknown"),
    [
        ({}, []),
        (DEFAULTS, []),
        ({"heartbeat": 5, "HEARTBEAT": 5}, ["heartbeat"]),
        ({"RETRYS": 1, "HEART_BEAT": 1}, ["HEART_BEAT", "RETRYS"]),
        ({1: 2, None: 3, "A": 4}, ["1", "A", "None"]),
    ],
)
def test_keys_that_mean_nothing_are_listed_in_order(settings, given, unknown):
    settings.DJANGO_SSE = given
    assert configuration.unknown == unknown


# --- history ---


@pytest.mark.parametrize(
    ("given", "size", "ttl"),
    [
        ({}, 1000, 3600),
        ({"SIZE": 5}, 5, 3600),
        ({"TTL": 5}, 1000, 5),
        ({"SIZE": 1, "TTL": 1}, 1, 1),
        ({"*": {}}, 1000, 3600),
        ({"news": {}}, 1000, 3600),
        ({"news": {"SIZE": 5}}, 5, 3600),
        ({"n*": {"TTL": 5}}, 1000, 5),
    ],
)
def test_each_bound_of_a_history_has_its_own_default(settings, given, size, ttl):
    settings.DJANGO_SSE = {"HISTORY": given}
    assert configuration.history("news") == History("news", size, ttl)
    assert configuration.has_history


BY_CHANNEL = {
    "*": {"SIZE": 1},
    "room-*": {"SIZE": 2},
    "room-1*": {"SIZE": 3},
    "room-1": {"SIZE": 4},
    "private": None,
    "private-*": None,
    "private-news": {"SIZE": 5},
    "room-none*": None,
    "a*b": {"SIZE": 6},
}


@pytest.mark.parametrize(
    ("channel", "size"),
    [
        ("news", 1),
        ("", 1),
        ("room", 1),
        ("room-", 2),
        ("room-2", 2),
        ("room-10", 3),
        ("room-1", 4),
        ("private", None),
        ("private-", None),
        ("private-x", None),
        ("private-news", 5),
        ("private-news-2", None),
        ("room-none", None),
        ("room-nonesuch", None),
        ("a*b", 6),
        ("a2b", 1),
        ("ROOM-1", 1),
        ("aroom-1", 1),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_exact_name_counts_first_and_then_the_longest_prefix(settings, channel, size, order):
    settings.DJANGO_SSE = {"HISTORY": dict(list(BY_CHANNEL.items())[::order])}
    history = configuration.history(channel)
    assert (history and history.size) == size
    assert history is None or history.name == channel


@pytest.mark.parametrize("given", [{"room-*": {}}, {"room": {}}, {"other": {}, "*": None}])
def test_a_channel_that_nothing_is_said_of_has_no_history(settings, given):
    settings.DJANGO_SSE = {"HISTORY": given}
    assert configuration.history("news") is None
    assert configuration.has_history


def test_a_channel_that_is_a_number_is_named_by_it(settings):
    settings.DJANGO_SSE = {"HISTORY": {7: {"SIZE": 5}}}
    assert configuration.history("7") == History("7", 5, 3600)


def test_a_mistake_in_the_history_of_one_channel_is_told_to_all(settings):
    settings.DJANGO_SSE = {"HISTORY": {"news": {}, "other": {"SIZE": 0}}}
    with pytest.raises(ImproperlyConfigured, match="'other'"):
        configuration.history("news")


def test_bounds_beside_channels_are_an_error(settings):
    settings.DJANGO_SSE = {"HISTORY": {"SIZE": 5, "news": {}}}
    with pytest.raises(ImproperlyConfigured, match="SIZE"):
        configuration.history("news")


def test_the_prefix_of_channels_is_no_part_of_their_names(settings):
    settings.DJANGO_SSE = {"CHANNEL_PREFIX": "shop:", "HISTORY": {"news": {}}}
    assert configuration.history("news") is not None
    assert configuration.history("shop:news") is None
