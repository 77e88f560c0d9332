"""The forms of `location`, and the connection pool that follows from each."""

import pytest
import redis
from django.core.exceptions import ImproperlyConfigured

from django_sse.location import freeze, make_pool


def pool(location, **kwargs):
    return make_pool({"location": location, **kwargs})


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("example.org:7000", {"host": "example.org", "port": 7000, "db": 0}),
        ("127.0.0.1:1", {"host": "127.0.0.1", "port": 1}),
        ("[::1]:6379", {"host": "::1", "port": 6379}),
        ("[2001:db8::1]:65535", {"host": "2001:db8::1", "port": 65535}),
        ("unix:/run/redis.sock", {"path": "/run/redis.sock"}),
        ("redis://example.org:7001/3", {"host": "example.org", "port": 7001, "db": 3}),
        ("redis://user:pass@example.org", {"username": "user", "password": "pass"}),
        ("rediss://example.org:7002?ssl_cert_reqs=none", {"host": "example.org", "port": 7002}),
        ("unix:///run/redis.sock?db=2", {"path": "/run/redis.sock", "db": 2}),
    ],
)
def test_a_location_has_one_of_these_forms(location, expected):
    kwargs = pool(location).connection_kwargs
    assert {key: kwargs[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("location", "connection_class"),
    [
        ("example.org:7000", redis.Connection),
        ("unix:/run/redis.sock", redis.UnixDomainSocketConnection),
        ("redis://example.org", redis.Connection),
        ("rediss://example.org", redis.SSLConnection),
        ("unix:///run/redis.sock", redis.UnixDomainSocketConnection),
    ],
)
def test_the_form_of_the_location_decides_how_redis_is_spoken_to(location, connection_class):
    assert pool(location).connection_class is connection_class


@pytest.mark.parametrize(
    "location",
    [
        *("localhost", ":6379", "localhost:", "localhost:http", "localhost:-1", "localhost:٣", "::1:6379", "[::1]"),
        *("memory", "memory://", "unix:", "http://example.org:6379", "redis//example.org", "localhost:70000"),
        *("redis://example.org:port", "a:b:1", "  ", 6379, ["localhost", 6379]),
    ],
)
def test_a_location_of_another_form_is_improperly_configured(location):
    with pytest.raises(ImproperlyConfigured, match="Invalid `location`"):
        pool(location)


@pytest.mark.parametrize("db", ["nine", [1], object()])
def test_a_database_that_is_no_number_is_improperly_configured(db):
    with pytest.raises(ImproperlyConfigured, match="`db`.*must be a number"):
        pool("example.org:7000", db=db)


def test_what_the_url_says_counts_and_the_other_keys_fill_in_the_rest():
    kwargs = pool("redis://:inside@example.org/4", db=1, password="outside").connection_kwargs
    assert (kwargs["db"], kwargs["password"]) == (4, "inside")
    kwargs = pool("redis://example.org", db="1", password="outside").connection_kwargs
    assert (kwargs["db"], kwargs["password"]) == (1, "outside")


def test_options_go_to_redis_py_as_they_are():
    options = {"socket_timeout": 3, "max_connections": 7, "username": "app", "client_name": "web"}
    made = pool("example.org:7003", options=options)
    assert made.max_connections == 7
    assert made.connection_kwargs["socket_timeout"] == 3
    assert made.connection_kwargs["username"] == "app"
    assert made.connection_kwargs["client_name"] == "web"


def test_a_pool_is_not_bounded_unless_options_say_so():
    assert pool("example.org:7004").max_connections > 1_000_000


@pytest.mark.parametrize("location", [None, ""])
def test_a_missing_location_is_improperly_configured_with_the_lines_to_write(location):
    with pytest.raises(ImproperlyConfigured) as caught:
        pool(location)
    assert 'REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": "localhost:6379"}' in str(caught.value)
    assert 'REDIS_SSEQUEUE_CONNECTION_SETTINGS = {"location": "memory:"}' in str(caught.value)


def test_frozen_settings_are_equal_whatever_the_order_of_their_keys():
    one = {"location": "a:1", "options": {"x": [1, {"y": 2}], "z": "1"}}
    other = {"options": {"z": "1", "x": (1, {"y": 2})}, "location": "a:1"}
    assert freeze(one) == freeze(other)
    assert hash(freeze(one)) == hash(freeze(other))


@pytest.mark.parametrize("other", [{"x": "1"}, {"x": True}, {"y": 1}, {"x": [1]}, {"x": {1: 1}}, {"x": {1}}])
def test_frozen_settings_differ_where_the_settings_do(other):
    assert freeze({"x": 1}) != freeze(other)
