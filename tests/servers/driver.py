"""A running server and the verbs with which the tests of this folder drive it."""

import itertools
import json

import pytest

from tests.helpers import client
from tests.helpers.wait import until

numbers = itertools.count(1)


class Driver:
    """`tests.helpers.servers.Server` plus what `tests.servers.views` understands."""

    def __init__(self, server):
        self.name = server.name
        self.url = server.url
        self.log = server.log

    def key(self):
        """A name for a stream or a channel that no other test uses."""
        return f"{self.name}-{next(numbers):04}"  # of one length: none is part of another

    def stream(self, path, **options):
        """Open a stream and read on in the background."""
        return client.StreamClient(f"{self.url}/servers/{path}", **options)

    def request(self, method, path, **options):
        return client.request(method, f"{self.url}/{path}", **options)

    def open_gate(self, key):
        """Let the stream `key` yield its first event."""
        status, _, _ = self.request("POST", f"servers/gate/{key}")
        assert status == 204

    def story(self, key):
        """How often the iterator of `key` was started and closed."""
        return json.loads(self.request("GET", f"servers/story/{key}")[2])

    def await_closed(self, key, count=1):
        until(lambda: self.story(key)["closed"] >= count, what=f"the end of {key}")
        assert self.story(key) == {"started": count, "closed": count}

    def send(self, channel, event, data):
        """Have a view of this server call `send_event`."""
        status, _, _ = self.request("POST", f"servers/send/{channel}", data={"event": event, "data": data})
        assert status == 204


def on(*names):
    """Run a test once on each of the servers `names`; it gets the `driver` of the server."""
    return pytest.mark.parametrize("driver", names, indirect=True)
