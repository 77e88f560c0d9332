"""For tests that run an event loop."""

import asyncio

import pytest

from django_sse.workers import on_gevent
from tests.helpers.wait import INTERVAL

needs_loops = pytest.mark.skipif(on_gevent(), reason="asyncio has no place among greenlets: the views refuse it there")


async def soon(predicate, timeout=10):
    """Wait as `until()` does, in a loop that must go on meanwhile."""
    for _ in range(int(timeout / INTERVAL)):
        if predicate():
            return
        await asyncio.sleep(INTERVAL)
    raise AssertionError(f"waited {timeout} s in vain for {predicate}")
