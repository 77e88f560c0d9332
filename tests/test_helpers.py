"""The instruments are proven before anything is measured with them: parser, client, server processes, waiting."""

import contextlib
import errno
import os
import signal
import socket
import sqlite3
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from tests.helpers import census, postgres
from tests.helpers.client import StreamClient, request
from tests.helpers.eventsource import Message, Parser, parse
from tests.helpers.need import need
from tests.helpers.process import RUNNING, Process, free_port
from tests.helpers.rawclient import PRIVATE, RawClient, private_network
from tests.helpers.servers import SERVERS
from tests.helpers.wait import until

# --- The parser, against the rules and the examples of the HTML standard, section 9.2.6 ---


def data(body):
    return [message.data for message in parse(body)]


def test_the_examples_of_the_standard_read_as_the_standard_says():
    assert parse(b"data: YHOO\ndata: +2\ndata: 10\n\n") == [Message("message", "YHOO\n+2\n10")]
    parser = Parser()
    first = b": test stream\n\ndata: first event\nid: 1\n\n"
    assert parser.feed(first + b"data:second event\nid\n\ndata:  third event\n") == [
        Message("message", "first event", "1"),
        Message("message", "second event", ""),
    ]
    assert parser.comments == ["test stream"]
    assert parse(b"data\n\ndata\ndata\n\ndata:") == [Message("message", ""), Message("message", "\n")]
    assert data(b"data:test\n\ndata: test\n\n") == ["test", "test"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"], ids=["LF", "CR", "CRLF"])
def test_each_of_three_line_ends_ends_a_line_even_when_bytes_come_one_by_one(end):
    body = f"event: a{end}data: 1{end}data: 2{end}{end}data: 3{end}{end}".encode()
    parser = Parser()
    pieces = [message for byte in body for message in parser.feed(bytes([byte]))]
    assert pieces == parse(body) == [Message("a", "1\n2"), Message("message", "3")]


def test_a_line_feed_after_a_carriage_return_belongs_to_it_across_pieces():
    parser = Parser()
    assert parser.feed(b"data: 1\r") == []
    assert parser.feed(b"") == []
    assert parser.feed(b"\ndata: 2\r") == []
    assert parser.feed(b"\n\r") == [Message("message", "1\n2")]
    assert parser.feed(b"\n") == []


@pytest.mark.parametrize("character", ["\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\0"])
def test_no_other_character_ends_a_line(character):
    assert data(f"data: a{character}b\n\n".encode()) == [f"a{character}b"]


def test_one_space_after_the_colon_is_not_part_of_the_value():
    assert data(b"data:  a \n\n") == [" a "]
    assert data(b"data:\ta\n\n") == ["\ta"]


def test_a_message_without_data_is_not_dispatched_and_its_type_is_forgotten():
    assert parse(b"event: a\n\ndata: 1\n\n") == [Message("message", "1")]


def test_an_empty_data_line_is_data():
    assert data(b"data:\n\n") == [""]
    assert data(b"data: a\ndata:\n\n") == ["a\n"]


def test_a_message_without_its_empty_line_is_dropped():
    assert parse(b"data: 1\n\ndata: 2\n") == [Message("message", "1")]


def test_the_last_type_counts_and_does_not_hold_for_the_next_message():
    assert parse(b"event: a\nevent: b\ndata: 1\n\ndata: 2\n\n") == [Message("b", "1"), Message("message", "2")]


def test_an_id_holds_until_the_next_and_is_set_by_a_block_without_data():
    assert parse(b"id: 1\n\ndata: a\n\ndata: b\n\nid:\ndata: c\n\n") == [
        Message("message", "a", "1"),
        Message("message", "b", "1"),
        Message("message", "c", ""),
    ]


def test_an_id_counts_only_once_its_block_is_complete():
    parser = Parser()
    parser.feed(b"id: 1\n\nid: 2\ndata: a\n")
    assert parser.last_event_id == "1"


def test_an_id_with_nul_is_ignored():
    assert parse(b"id: 1\nid: 2\0\ndata: a\n\n") == [Message("message", "a", "1")]


@pytest.mark.parametrize(
    ("value", "retry"), [("2000", 2000), ("0", 0), ("1.5", 7), ("-1", 7), ("", 7), ("1 ", 7), ("٣", 7), ("+1", 7)]
)
def test_retry_takes_ascii_digits_only(value, retry):
    parser = Parser()
    parser.feed(f"retry: 7\nretry: {value}\n".encode())
    assert parser.retry == retry


def test_unknown_fields_and_names_in_other_case_are_ignored():
    assert parse(b"Data: a\n data: b\nfoo: c\ndata : d\ndata: e\n\n") == [Message("message", "e")]


def test_one_byte_order_mark_at_the_start_is_ignored_and_no_other():
    assert data("\ufeffdata: a\n\n\ufeffdata: b\n\ndata: \ufeffc\n\n".encode()) == ["a", "\ufeffc"]
    assert data("\ufeff\ufeffdata: a\n\n".encode()) == []


def test_characters_cut_by_pieces_are_whole_and_invalid_bytes_are_replaced():
    body = "data: ä€😀\n\n".encode() + b"data: \xff\n\n"
    parser = Parser()
    messages = [message.data for byte in body for message in parser.feed(bytes([byte]))]
    assert messages == ["ä€😀", "\ufffd"]


# --- The client, against a socket that answers exactly what the test says ---


@contextlib.contextmanager
def answering(*pieces, method="GET", **options):
    """A client whose server sends one piece per call of `send()`, and after the last closes the connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/p?q=1"
        client = stack.enter_context(StreamClient(url, method, timeout=2, **options))
        connection = stack.enter_context(listener.accept()[0])
        client.seen = b""
        while b"\r\n\r\n" not in client.seen:
            client.seen += connection.recv(65536)
        left = iter(pieces)

        def send():
            piece = next(left, None)
            if piece is None:
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.sendall(piece)

        yield client, send


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-A: 1\r\nx-a: 2\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def test_the_client_sees_headers_before_the_body_and_each_chunk_when_it_comes():
    with answering(CHUNKED, b"9\r\ndata: 1\n\n\r\n9;x=y\r\ndata:", b" 2\n\n\r\n", b"0\r\n\r\n", b"more") as (
        client,
        send,
    ):
        assert not client.opened
        send()
        assert client.status == 200
        assert client.headers == {
            "content-type": "text/event-stream",
            "x-a": "1, 2",
            "transfer-encoding": "chunked",
        }
        assert client.body == b""
        send()
        assert client.next_message() == Message("message", "1")
        send()
        assert client.next_message() == Message("message", "2")
        assert [chunk for _, chunk in client.chunks] == [b"data: 1\n\n", b"data: 2\n\n"]
        assert client.arrivals[0][0] < client.arrivals[1][0]
        assert not client.ended
        send()
        client.wait_closed()
        assert client.ended
        send()
        until(lambda: client.excess == b"more", 2)
        assert client.broken is None


def test_the_client_asks_as_an_event_source_does():
    with answering(headers={"Last-Event-ID": "7"}) as (client, _):
        request_line, *fields = client.seen.decode().splitlines()
        assert request_line == "GET /p?q=1 HTTP/1.1"
        assert "Accept: text/event-stream" in fields
        assert "Last-Event-ID: 7" in fields


@pytest.mark.parametrize(
    "cut",
    [b"", HEAD, CHUNKED, CHUNKED + b"9\r\ndata", HEAD + b"Content-Length: 5\r\n\r\nabc"],
    ids=lambda cut: str(len(cut)),
)
def test_a_response_cut_off_is_broken_and_not_ended(cut):
    with answering(cut) as (client, send):
        send()
        send()
        client.wait_closed()
        assert client.broken.startswith("ConnectionError: closed ")
        assert not client.ended


def test_a_response_without_length_ends_with_the_connection():
    with answering(HEAD + b"\r\ndata: 1\n\n") as (client, send):
        send()
        client.wait_for(b"data: 1\n\n")
        assert not client.ended
        send()
        client.wait_closed()
        assert client.ended
        assert client.messages == [Message("message", "1")]


def test_a_body_of_known_length_ends_with_its_last_byte():
    with answering(HEAD + b"Content-Length: 3\r\n\r\nab", b"cd") as (client, send):
        send()
        client.wait_for(b"ab")
        send()
        client.wait_for(lambda client: client.excess)
        assert (client.ended, client.body, client.excess) == (True, b"abc", b"d")


def test_the_body_of_a_head_response_is_excess():
    with answering(CHUNKED + b"2\r\nab\r\n", method="HEAD") as (client, send):
        send()
        client.wait_closed()
        assert (client.ended, client.body, client.excess) == (True, b"", b"2\r\nab\r\n")


def test_waiting_fails_at_the_deadline_and_at_once_when_the_stream_is_over():
    with answering(CHUNKED, b"0\r\n\r\n") as (client, send):
        send()
        with pytest.raises(AssertionError, match="waited 0.05 s in vain for b'x'"):
            client.wait_for(b"x", 0.05)
        send()
        with pytest.raises(AssertionError, match="over before b'x'"):
            client.wait_for(b"x", 60)


def test_closing_ends_the_reading_thread():
    before = threading.active_count()
    with answering(CHUNKED) as (client, send):
        send()
        client.wait_for(lambda client: client.opened)
        client.close()
        assert threading.active_count() == before
        assert client.broken == "closed by the client"
        assert not client.ended


# --- Waiting and needing ---


def test_until_returns_the_value_or_fails_saying_what_was_waited_for():
    values = iter([None, [], "there"])
    assert until(lambda: next(values)) == "there"
    with pytest.raises(AssertionError, match="0.02 s in vain for the bus; last seen: 0"):
        until(lambda: 0, 0.02, "the bus")


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("false", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_what_is_missing_skips_on_a_laptop_and_fails_in_ci(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    need(True, "nothing to do")
    with pytest.raises(outcome, match="install it so"):
        need(False, "install it so")


# --- Server processes ---


def refuses(server):
    try:
        request("GET", server.url + "/ping", timeout=1)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


@pytest.mark.server
@pytest.mark.parametrize("name", SERVERS)
def test_every_server_starts_answers_and_leaves_nothing_behind(serve, name):
    server = serve(name)
    status, headers, _ = request("GET", server.url + "/ping")
    assert (status, headers["content-type"]) == (200, "text/plain")
    server.stop()
    assert server.returncode is not None
    until(lambda: refuses(server), what="a port where nobody listens")


@pytest.mark.server
def test_a_server_that_does_not_start_shows_its_log(serve):
    before = list(RUNNING)
    with pytest.raises(AssertionError, match="No module named 'tests.no_such_settings'"):
        serve("uvicorn", settings="tests.no_such_settings")
    assert before == RUNNING


@pytest.mark.server
def test_a_server_on_a_port_that_is_taken_tries_another(serve, monkeypatch):
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        ports = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr("tests.helpers.servers.free_port", lambda: next(ports))
        server = serve("uvicorn")
        assert server.port != taken.getsockname()[1]


@pytest.mark.server
def test_a_restarted_redis_is_at_the_same_place_and_empty(redis_server):
    client = redis_server.client()
    client.set("key", "value")
    port = redis_server.port
    redis_server.restart()
    assert (redis_server.port, client.get("key")) == (port, None)
    redis_server.stop(signal.SIGKILL)
    assert not redis_server.running
    redis_server.start()
    assert client.ping()


# --- The census: what is counted from outside is what is there ---


@pytest.fixture
def postgres_census():
    with census.Postgres() as database:
        yield database


def test_postgresql_counts_the_connections_of_each_program(postgres_census):
    counts = []
    with ExitStack() as stack:
        for name in ("one", "one", "other"):
            settings = postgres_census.settings(name)["default"]
            names = {"host": settings["HOST"], "port": settings["PORT"], "user": settings["USER"]}
            stack.enter_context(psycopg.connect(**names, dbname=settings["NAME"], **settings["OPTIONS"]))
            counts.append(postgres_census.connections("one", os.getpid()))
    assert counts == [1, 2, 2]
    until(lambda: postgres_census.connections("one", os.getpid()) == 0, what="the end of the connections")


def test_sqlite_connections_are_descriptors_of_the_file(tmp_path):
    with census.Sqlite(tmp_path) as database:
        file = database.settings("one")["default"]["NAME"]
        with contextlib.closing(sqlite3.connect(file)), contextlib.closing(sqlite3.connect(file)):
            assert database.connections("one", os.getpid()) == 2
        assert database.connections("one", os.getpid()) == 0


def test_postgresql_leaves_nothing_behind():
    with postgres.PostgresServer() as server:
        assert process_exists(server.pid)
        folder = Path(server.settings["HOST"])
        assert folder.is_dir()
    assert not process_exists(server.pid)
    assert not folder.exists()


def process_exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_threads_and_descriptors_are_those_of_a_process_and_its_children():
    child = (
        "import os, sys, threading; threading.Thread(target=threading.Event().wait).start(); print('up', flush=True)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], stdin=open('/dev/zero'))"
    with contextlib.closing(Process("parent", [sys.executable, "-c", parent])) as process:
        until(lambda: "up" in process.log(), what="the child's thread")
        until(lambda: census.threads(process.pid) == 3, what="one thread of the parent and two of its child")
        assert len(census.processes(process.pid)) == 2
        assert census.descriptors(process.pid)["/dev/zero"] == 2
    assert census.threads(process.pid) == 0


# --- The client that leaves in every way ---


@pytest.fixture
def connection():
    """A RawClient and the server's end of its connection; the client has read what it was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = RawClient(f"http://127.0.0.1:{listener.getsockname()[1]}/x")
        server, _ = listener.accept()
        with client, server:
            server.settimeout(10)
            assert server.recv(65536).startswith(b"GET /x HTTP/1.1\r\n")
            server.sendall(b"hello")
            client.read_until(b"hello")
            yield client, server


def test_a_client_that_closes_says_so(connection):
    client, server = connection
    client.close()
    assert server.recv(1) == b""


def test_a_client_that_resets_is_an_error(connection):
    client, server = connection
    client.reset()
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_a_client_that_vanishes_answers_nothing(connection):
    client, server = connection
    client.vanish()
    server.settimeout(0.2)
    server.sendall(b"anybody?")
    with pytest.raises(TimeoutError, match="timed out"):
        server.recv(1)
    client._socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        client._socket.recv(1)


def test_in_a_private_network_the_kernel_soon_gives_up_who_has_vanished_and_the_own_network_comes_back():
    with socket.create_server(("127.0.0.1", 0)) as outside:
        with private_network() as private:
            need(private, PRIVATE)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(outside.getsockname(), timeout=1)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                client = RawClient(f"http://127.0.0.1:{listener.getsockname()[1]}/")
                server, _ = listener.accept()
            with client, server:
                client.vanish()
                server.sendall(b"anybody?")
                server.settimeout(10)
                server.recv(65536)
                with pytest.raises(TimeoutError) as raised:
                    server.recv(1)
                assert raised.value.errno == errno.ETIMEDOUT
        socket.create_connection(outside.getsockname(), timeout=1).close()
