"""Tests wait for a condition with a deadline, never for a length of time."""

import time

INTERVAL = 0.01  # seconds between two looks at the condition


def until(predicate, timeout=10, what=None):
    """Return the first true value of `predicate()`; after `timeout` seconds fail naming `what` was waited for."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain for {what or predicate}; last seen: {value!r}")
        time.sleep(INTERVAL)
