"""
A publisher at full speed, in a process of its own or in a thread of a server.

    python -m tests.servers.reconnect_publish WAY FIRST COUNT CHANNELS
"""

import sys

import django

from django_sse.redisqueue import send_event, send_events

BATCH = 500  # events of one `send_events()`


def publish(way, first, count, channels):
    """
    Publish `count` events that are numbered from `first` on, on `channels` (commas between them) in turn.

    `way` is `singly`, by `send_event()`, or `batched`, by `send_events()`.
    """
    names = channels.split(",")
    events = [("n", str(number), names[number % len(names)]) for number in range(first, first + count)]
    if way == "singly":
        for event in events:
            send_event(*event)
    else:
        for at in range(0, count, BATCH):
            send_events(events[at : at + BATCH])


if __name__ == "__main__":
    django.setup()
    publish(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
