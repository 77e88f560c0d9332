"""
Publishers outside any server: a plain script, and the job of a worker process.

    python -m tests.servers.publish CHANNEL EVENT DATA
"""

import sys

import django

from django_sse.redisqueue import send_event


def work(jobs):
    """Take `(channel, event, data)` from the queue until None comes, as a task runner's process does."""
    django.setup()
    for channel, event, data in iter(jobs.get, None):
        send_event(event, data, channel)


if __name__ == "__main__":
    django.setup()
    send_event(*sys.argv[2:], channel=sys.argv[1])
