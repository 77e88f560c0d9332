"""The account of the fault tests sees each way in which a stream can be wrong."""

import json

import pytest

from tests.helpers.eventsource import Message
from tests.helpers.ledger import RESET, Account, text


def event(number, publisher="a", channel="news"):
    return Message("count", text(channel, publisher, number))


def reset(reason="epoch", channels=("news",)):
    return Message(RESET, json.dumps({"channels": list(channels), "reason": reason}))


def account(messages, log=(), **sent):
    account = Account()
    account.add(messages, "news", sent or {"a": 3}, list(log))
    return account


ONE, TWO, THREE = event(1), event(2), event(3)
LOG = [("a", 1), ("a", 2), ("a", 3)]


def test_what_arrives_once_and_in_order_is_right():
    assert account([ONE, TWO, THREE], LOG) == Account(due=3, received=3)


def test_other_channels_are_of_no_concern():
    others = [event(1, channel="sport"), reset(channels=["sport"])]
    assert account([ONE, *others, TWO, THREE], LOG) == Account(due=3, received=3)


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        pytest.param([ONE, THREE], {"received": 2, "lost": 1}, id="a-gap"),
        pytest.param([TWO, THREE], {"received": 2, "lost": 1}, id="no-beginning"),
        pytest.param([ONE, TWO], {"received": 2, "lost": 1}, id="no-end"),
        pytest.param([ONE, TWO, TWO, THREE], {"received": 3, "duplicated": 1}, id="twice"),
        pytest.param([ONE, TWO, THREE, ONE, TWO, THREE], {"received": 3, "duplicated": 3}, id="all-twice"),
        pytest.param([ONE, THREE, TWO], {"received": 3, "disordered": 1}, id="out-of-order"),
        pytest.param([reset("expired"), THREE], {"received": 1, "skipped": 2, "resets": {("news", "expired"): 1}}),
        pytest.param(
            [ONE, reset(), THREE, reset()],
            {"received": 2, "skipped": 1, "resets": {("news", "epoch"): 2}},
            id="two-resets",
        ),
        pytest.param([reset(), ONE, THREE], {"received": 2, "lost": 1, "resets": {("news", "epoch"): 1}}),
        pytest.param([ONE, reset()], {"received": 1, "lost": 2, "resets": {("news", "epoch"): 1}}, id="no-suffix"),
        pytest.param(
            [ONE, TWO, reset(), TWO, THREE],
            {"received": 3, "repeated": 1, "resets": {("news", "epoch"): 1}},
            id="sent-again",
        ),
        pytest.param(
            [ONE, TWO, reset(), ONE, TWO, THREE],
            {"received": 3, "duplicated": 2, "resets": {("news", "epoch"): 1}},
            id="replayed",
        ),
    ],
)
def test_what_is_wrong_is_counted(messages, wrong):
    assert account(messages) == Account(due=3, **wrong)


def test_publishers_that_change_places_are_seen():
    messages = [event(1, "a"), event(1, "b")]
    assert account(messages, [("a", 1), ("b", 1)], a=1, b=1).disordered == 0
    assert account(messages, [("b", 1), ("a", 1)], a=1, b=1).disordered == 1


def test_the_history_may_be_shorter_than_what_arrived_and_longer():
    assert account([ONE, TWO, THREE], LOG[1:]).disordered == 0
    assert account([ONE, reset(), THREE], LOG).disordered == 0
    assert account([ONE, TWO], LOG).disordered == 1
