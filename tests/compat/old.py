"""The other side of the Redis channel, as a program of 2013 has it."""

import json


class OldSubscriber:
    """A subscriber as django-sse 0.4.1 had it: its own connection, its own pub/sub, pairs of JSON."""

    def __init__(self, client, channel):
        self.pubsub = client.pubsub()
        self.pubsub.subscribe(channel)
        assert self.pubsub.get_message(timeout=10)["type"] == "subscribe"

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.pubsub.close()

    def payload(self):
        """The bytes of the next message."""
        return next(message["data"] for message in self.pubsub.listen() if message["type"] == "message")

    def pair(self):
        """The event and the data of the next message."""
        event, data = json.loads(self.payload().decode("utf-8"))
        return event, data
