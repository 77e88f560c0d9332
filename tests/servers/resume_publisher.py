"""
A process that publishes until it is told to stop, by SIGTERM, whatever happens to Redis meanwhile.

    python -m tests.servers.resume_publisher RATE PADDING CHANNEL...

Its threads, `PUBLISHERS`, each send `RATE` events a second on each channel, of `PADDING` bytes and some more. What
Redis has not confirmed they send again, under the same `event_id`. The process prints a line of JSON at its end: how
many events each publisher has sent on each channel.
"""

import json
import signal
import sys
import threading
import time

import django
import redis

from django_sse.redisqueue import send_event
from tests.helpers.ledger import text

PUBLISHERS = ("a", "b")
PAUSE = 0.01  # seconds before an event is sent again

told = threading.Event()


def send(channel, publisher, number, padding):
    """Send one event, however often it takes."""
    data = text(channel, publisher, number, padding)
    while True:
        try:
            return send_event("count", data, channel, event_id=f"{publisher}-{number}")
        except redis.exceptions.ConnectionError:
            time.sleep(PAUSE)


def publish(publisher, rate, padding, channels, sent):
    """Send evenly until told to end."""
    number = 0
    while not told.wait(1 / rate):
        number += 1
        for channel in channels:
            send(channel, publisher, number, padding)
            sent[channel][publisher] = number


def main(rate, padding, *channels):
    # A handler, and not a wait for the signal: the threads that redis-py may start take none.
    signal.signal(signal.SIGTERM, lambda signum, frame: told.set())
    django.setup()
    sent = {channel: {} for channel in channels}
    arguments = float(rate), "x" * int(padding), channels, sent
    threads = [threading.Thread(target=publish, args=(publisher, *arguments)) for publisher in PUBLISHERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(sent), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
