"""Run the tests of what waits and wakes in a process that gevent has patched: python -m tests.run_gevent [arguments].

Rule: patch before anything else is imported, pytest included, as gunicorn's gevent worker and `gevent.monkey` do.
"""

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

HERE = Path(__file__).parent
TESTS = [
    "test_hub.py",
    "test_inbox.py",
    "test_registry.py",
    "test_signals.py",
    "test_feeds.py",
    "test_streams.py",
    "test_runtime.py",
    "test_views.py",
    "test_redisqueue.py",
    "brokers",
]

if __name__ == "__main__":
    sys.exit(pytest.main([*(str(HERE / name) for name in TESTS), *sys.argv[1:]]))
