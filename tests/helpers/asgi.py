"""
Calls an ASGI application in this process, being its server.

    exchange = Exchange(application, "/stream")
    await exchange.until(b"data: 1")
    exchange.leave()
    await exchange.over()
"""

import asyncio

import pytest
from django.core.asgi import get_asgi_application as get_django_application
from django.test import override_settings

from django_sse.asgi import SseApplication
from tests.helpers.loops import soon
from tests.helpers.middleware import path_of

SERVERS = pytest.mark.parametrize("taken_over", [True, False], ids=["taken over", "in the handler"])

# Where `send` fails or a request is cancelled, Django 5.2 leaves its body to the collector, as Python says since 3.11.
leaves_the_body = pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")


def application(*middleware, taken_over=True):
    """Return Django's application with this middleware, and ours around it if streams are to be `taken_over`."""
    with override_settings(MIDDLEWARE=[path_of(one) for one in middleware]):
        app = get_django_application()
    return SseApplication(app) if taken_over else app


def http_scope(path="/", method="GET", headers=()):
    """Return what a server tells an application of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"testserver"), *headers],
        "client": ("127.0.0.1", 12345),
        "server": ("testserver", 80),
    }


class Exchange:
    """
    One request and what the application has answered.

    `request` is the task in which the application runs. Like some servers, it says only once that the client has left.
    """

    def __init__(self, application, path="/", *, method="GET", headers=(), send=None):
        self.scope = http_scope(path, method, headers)
        self.sent = []
        self._incoming = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self.request = asyncio.get_running_loop().create_task(
            application(self.scope, self._incoming.get, send or self.take)
        )

    async def take(self, message):
        """What the application knows as `send`."""
        assert not self.finished, f"sent after the end: {message}"
        self.sent.append(message)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self):
        return {bytes(name).decode().lower(): bytes(value).decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent if message["type"] == "http.response.body")

    @property
    def finished(self):
        """Whether the response is complete."""
        ends = [m for m in self.sent if m["type"] == "http.response.body" and not m.get("more_body", False)]
        return bool(ends)

    async def until(self, part):
        """Wait until `part` has come."""
        await soon(lambda: part in self.body or self.request.done())
        assert part in self.body, f"the application has ended with {self.sent}"

    def leave(self):
        """Tell the application that the client has left."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def over(self):
        """Wait until the application has ended; raises what it has raised."""
        await asyncio.wait_for(self.request, 10)
