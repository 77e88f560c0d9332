"""The crowd and the balancer tell what happens on their sockets: proven against a server that does as it is told."""

import socket
import threading
from contextlib import ExitStack

import pytest

from tests.helpers.balancer import Balancer
from tests.helpers.client import request
from tests.helpers.crowd import Crowd
from tests.helpers.process import free_port
from tests.helpers.wait import until

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


class Told:
    """Accepts connections; `connections` are the sockets, `requests` what each has sent."""

    def __init__(self):
        self.connections = []
        self.requests = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.requests.append(connection.recv(65536))
            self.connections.append(connection)

    def answer(self, data):
        """Send `data` to each client, once it has asked."""
        for connection in self.connections:
            connection.sendall(data)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def told():
    """Return a new server at each call."""
    with ExitStack() as stack:

        def told():
            server = Told()
            stack.callback(server.close)
            return server

        yield told


def test_a_crowd_shows_what_each_of_its_members_gets(told):
    server = told()
    with Crowd(server.url + "/a?b=c", 5, {"Last-Event-ID": "7"}) as crowd:
        until(lambda: len(server.connections) == 5)
        assert {member.status for member in crowd.members} == {None}
        server.answer(CHUNKED + b"3\r\nabc\r\n")
        crowd.wait_open()
        assert {member.headers["content-type"] for member in crowd.members} == {"text/event-stream"}
        server.answer(b"1\r\nd\r\n")
        crowd.wait_for(lambda members: all(member.body == b"abcd" for member in members))
        assert not any(member.over for member in crowd.members)
    for sent in server.requests:
        assert sent.startswith(b"GET /a?b=c HTTP/1.1\r\n")
        assert b"text/event-stream" in sent
        assert b"\r\nlast-event-id: 7\r\n" in sent.lower()


@pytest.mark.parametrize(
    ("answer", "ended", "body"),
    [
        pytest.param(CHUNKED + b"1\r\na\r\n0\r\n\r\n", True, b"a", id="the-last-chunk"),
        pytest.param(CHUNKED + b"1\r\na\r\n", False, b"a", id="no-last-chunk"),
        pytest.param(CLOSED + b"a", True, b"a", id="until-it-closes"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na", False, b"a", id="too-short"),
        pytest.param(b"HTTP/1.1 20", False, b"", id="no-headers"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", True, b"", id="no-content"),
    ],
)
def test_a_response_ends_or_breaks(told, answer, ended, body):
    server = told()
    with Crowd(server.url, 2) as crowd:
        until(lambda: len(server.connections) == 2)
        server.answer(answer)
        for connection in server.connections:
            connection.shutdown(socket.SHUT_WR)
        crowd.wait_for(lambda members: all(member.over for member in members))
        for member in crowd.members:
            assert member.ended is ended
            assert (member.broken is None) is ended
            assert member.body == body


def test_members_are_over_with_their_crowd_and_the_server_sees_them_leave(told):
    server = told()
    with Crowd(server.url, 2) as crowd:
        until(lambda: len(server.connections) == 2)
        server.answer(CHUNKED + b"1\r\na\r\n")
        crowd.wait_open()
    assert {member.broken for member in crowd.members} == {"closed by the client"}
    assert [connection.recv(1) for connection in server.connections] == [b"", b""]


def test_a_crowd_goes_in_turn_to_several_urls_and_grows(told):
    servers = [told(), told()]
    with Crowd([server.url for server in servers], 4) as crowd:
        until(lambda: [len(server.connections) for server in servers] == [2, 2])
        (added,) = crowd.add()
        until(lambda: [len(server.connections) for server in servers] == [3, 2])
        assert crowd.members[4] is added


def test_who_is_not_let_in_is_broken():
    with Crowd(f"http://127.0.0.1:{free_port()}", 2) as crowd:
        crowd.wait_for(lambda members: all(member.broken for member in members))
        with pytest.raises(AssertionError, match="what was waited for"):
            crowd.wait_for(lambda members: False, 0.01, "what was waited for")


def test_a_balancer_takes_turns_and_leaves_out_who_does_not_accept(told):
    servers = [told(), told()]
    with Balancer(servers[0].port, free_port(), servers[1].port) as balancer, Crowd(balancer.url, 6) as crowd:
        until(lambda: sum(len(server.connections) for server in servers) == 6)
        assert min(len(server.connections) for server in servers) >= 2
        for server in servers:
            server.answer(CHUNKED + b"1\r\na\r\n")
        crowd.wait_open()
        balancer.backends[:] = [servers[1].port]
        before = len(servers[1].connections)
        crowd.add(2)
        until(lambda: len(servers[1].connections) == before + 2)


def test_a_balancer_passes_the_end_on_to_both_sides(told):
    server = told()
    with Balancer(server.port) as balancer:
        with Crowd(balancer.url, 2) as crowd:
            until(lambda: len(server.connections) == 2)
            server.answer(CHUNKED + b"0\r\n\r\n")
            crowd.wait_for(lambda members: all(member.ended for member in members))
        assert [connection.recv(1) for connection in server.connections] == [b"", b""]
        balancer.backends.clear()
        with pytest.raises(ConnectionError):
            request("GET", balancer.url)
