"""One root catches every error of the package's own, and each can be told from the others."""

import pytest

from django_sse import exceptions
from django_sse.exceptions import BrokerUnavailable, SseError, TooManyStreams


@pytest.mark.parametrize("name", exceptions.__all__)
def test_every_error_is_caught_by_the_root_and_told_of_in_the_tree(name):
    error = getattr(exceptions, name)
    assert issubclass(error, SseError)
    assert f"* ``{name}``: " in exceptions.__doc__
    assert error.__doc__


def test_no_error_is_left_out_of_the_public_names():
    errors = {name for name, value in vars(exceptions).items() if isinstance(value, type)}
    assert errors == set(exceptions.__all__)


def test_the_root_is_an_ordinary_exception():
    assert SseError.__bases__ == (Exception,)


def test_errors_of_one_kind_are_not_taken_for_the_other():
    assert not issubclass(TooManyStreams, BrokerUnavailable)
    assert not issubclass(BrokerUnavailable, TooManyStreams)


def test_an_error_says_what_it_was_told():
    with pytest.raises(SseError, match="^nobody answers at localhost:6379$"):
        raise BrokerUnavailable("nobody answers at localhost:6379")
