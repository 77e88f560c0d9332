"""Settings are read when they are asked for, and a wrong one is an error that names it."""

import re
import threading
from decimal import Decimal

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from django_sse.conf import DEFAULTS, check_seconds, configuration

RIGHT, SIC = "REDIS_SSEQUEUE_CHANNEL_NAME", "REDIS_SSEQUEUE_CHANEL_NAME"


@pytest.fixture
def _without_settings(settings):
    for name in ("DJANGO_SSE", "REDIS_SSEQUEUE_CONNECTION_SETTINGS", RIGHT, SIC):
        if hasattr(settings, name):
            delattr(settings, name)


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
    ("key", "value", "attribute", "read"),
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
    ],
)
def test_a_key_holds_as_long_as_it_is_overridden(key, value, attribute, read):
    before = getattr(configuration, attribute)
    with override_settings(DJANGO_SSE={key: value}):
        assert getattr(configuration, attribute) == read
    assert getattr(configuration, attribute) == before


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
    'DJANGO_SSE["CHANNEL_PREFIX"]': [None, 1, b"shop:", ["shop:"], "shop:\n", "\0", "\ud800"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(name, value, id=f"{name} = {value!r:.20}") for name, values in WRONG.items() for value in values],
)
def test_a_wrong_value_is_an_error_that_names_the_setting_and_the_value(settings, name, value):
    key, *inner = re.findall('"(.+?)"', name)
    settings.DJANGO_SSE = {key: {inner[0]: value} if inner else value}
    with pytest.raises(ImproperlyConfigured, match=f"^{re.escape(name)} must be .* not {re.escape(repr(value))}"):
        getattr(configuration, key.lower())


@pytest.mark.parametrize(
    "value", [float("inf"), 10**400, 2 * threading.TIMEOUT_MAX], ids=["infinity", "10**400", "600 years"]
)
def test_a_heartbeat_that_no_thread_can_wait_for_is_an_error(settings, value):
    assert value > threading.TIMEOUT_MAX  # beyond which wait() is an OverflowError
    settings.DJANGO_SSE = {"HEARTBEAT": value}
    with pytest.raises(ImproperlyConfigured, match=r'^DJANGO_SSE\["HEARTBEAT"\] must be '):
        assert configuration.heartbeat


@pytest.mark.parametrize("given", [None, ["HEARTBEAT"], "HEARTBEAT", 1, True], ids=repr)
@pytest.mark.parametrize("attribute", [*map(str.lower, DEFAULTS), "unknown"])
def test_no_key_can_be_read_from_what_is_no_dict(settings, attribute, given):
    settings.DJANGO_SSE = given
    with pytest.raises(ImproperlyConfigured, match=f"^DJANGO_SSE must be a dict, not {re.escape(repr(given))}"):
        getattr(configuration, attribute)


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
