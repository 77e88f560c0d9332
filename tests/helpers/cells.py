"""The cells of the table FEEDS (what iterator() gives x how the server asks), for rules that hold in each of them."""

import pytest

from tests.helpers.loops import needs_loops


def cell(kind, *, on_loop):
    return pytest.param(
        kind,
        on_loop,
        id=f"{kind}-{'loop' if on_loop else 'thread'}",
        marks=[needs_loops] if on_loop or kind == "async" else [],
    )


def cells(*some):
    return pytest.mark.parametrize(("kind", "on_loop"), [cell(kind, on_loop=on_loop) for kind, on_loop in some])


#: The cells whose steps are a user's code.
STEPPED = cells(("sync", False), ("sync", True), ("async", False), ("async", True))
#: Those of them whose steps happen elsewhere, so that whoever asks can be waited beside.
BESIDE = cells(("sync", True), ("async", False), ("async", True))
#: The cells that wait for a mailbox.
WAITING = cells(("mailbox", False), ("mailbox", True))
#: How the server asks.
ASKED = pytest.mark.parametrize("on_loop", [False, pytest.param(True, marks=needs_loops)], ids=["thread", "loop"])


def as_given(value):
    """A `flush` that sends what was yielded."""
    return () if value is None else (value,)


def make(kind, steps):
    """The iterator of a kind that runs the plain generator function `steps`."""
    if kind == "sync":
        return steps()

    async def asynchronous():
        generator = steps()
        try:
            for value in generator:
                yield value
        finally:
            generator.close()

    return asynchronous()
