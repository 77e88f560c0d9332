"""Coroutines that run in a context of their own, though within the task that awaits them.

A task keeps what is set in its context variables for as long as it lives, and the task of an open stream lives long.
"""

from __future__ import annotations

import contextvars
import types
from collections.abc import Coroutine, Generator
from typing import Any

__all__ = ["finish", "run"]


@types.coroutine
def run(context: contextvars.Context, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Do for the task that awaits this what it would do for ``coroutine``, but in ``context``."""
    try:
        waits_for = context.run(coroutine.send, None)
    except StopIteration:
        return
    yield from finish(context, coroutine, waits_for)


@types.coroutine
def finish(
    context: contextvars.Context, coroutine: Coroutine[Any, Any, None], waits_for: Any
) -> Generator[Any, Any, None]:
    """Do what ``run()`` does with one that has begun, and waits for ``waits_for``."""
    while True:
        try:
            try:
                result = yield waits_for
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is meant for ``coroutine``
                waits_for = context.run(coroutine.throw, error)
            else:
                waits_for = context.run(coroutine.send, result)
        except StopIteration:
            return
