"""Servers that the tests of one module share: a start costs up to a second, and there are eight of them."""

from contextlib import ExitStack

import pytest

from tests.helpers.servers import serve
from tests.servers.driver import Driver


@pytest.fixture(scope="module")
def drivers(redis_server):
    """Call with the name of a server: the one of that name in this module, on the session's Redis."""
    running = {}
    with ExitStack() as stack:

        def driver(name):
            if name not in running:
                server = stack.enter_context(serve(name, env={"TEST_REDIS_LOCATION": redis_server.location}))
                running[name] = Driver(server)
            return running[name]

        yield driver


@pytest.fixture
def driver(request, drivers):
    """The driver of the server with which the test is parametrised."""
    return drivers(request.param)
