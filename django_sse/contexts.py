"""Coroutines that run in a context of their own, though within the task that awaits them.

A task keeps what is set in its context variables for as long as it lives, and the task of an open stream lives long.
What all requests of a server find there it has set before the first of them.
"""

from __future__ import annotations

import contextvars
import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

__all__ = ["begin", "common", "finish", "own", "run"]

_common = contextvars.Context()


def begin() -> None:
    """Take the present context for what all requests find: the server begins."""
    global _common
    _common = contextvars.copy_context()


def common() -> contextvars.Context:
    """Return a context with what all requests find."""
    return _common.copy()


def own() -> contextvars.Context | None:
    """Return the present context; ``None`` if all that is in it is what all requests find."""
    present = contextvars.copy_context()
    # The same objects, for what is equal may be changed by one of them.
    if len(present) != len(_common):
        return present
    same = all(variable in present and present[variable] is value for variable, value in _common.items())
    return None if same else present


@types.coroutine
def run(context: contextvars.Context, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Do for the task that awaits this what it would do for ``coroutine``, but in ``context``."""
    within: Callable[..., Any] = context.run
    try:
        waits_for = within(coroutine.send, None)
    except StopIteration:
        return
    yield from finish(partial(within, coroutine.send), partial(within, coroutine.throw), waits_for)


@types.coroutine
def finish(
    send: Callable[[Any], Any], throw: Callable[[BaseException], Any], waits_for: Any
) -> Generator[Any, Any, None]:
    """Do for the task that awaits this what it would do for a coroutine that has begun, and waits for ``waits_for``.

    ``send`` and ``throw`` are that coroutine's.
    """
    while True:
        try:
            try:
                result = yield waits_for
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is meant for the coroutine
                waits_for = throw(error)
            else:
                waits_for = send(result)
        except StopIteration:
            return
