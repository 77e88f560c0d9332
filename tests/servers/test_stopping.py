"""
Promise L at its end: a process that is told to stop says goodbye to every stream, and is gone in time.

The streams end by themselves, with a last `retry` that differs from client to client, spread over the window, and each
`finally` runs. docs/stopping.rst says how each server is told of, and none of them is patched for it.
"""

import itertools
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial

import pytest

from tests.helpers.balancer import Balancer
from tests.helpers.client import request
from tests.helpers.crowd import Crowd
from tests.helpers.process import Process, free_port
from tests.helpers.servers import ASGI_SERVERS, GEVENT_SERVERS, ROOT, SERVERS, Server
from tests.helpers.wait import until

pytestmark = [pytest.mark.server, pytest.mark.heavy]

STREAMS = 200
WINDOW = 2  # seconds
RETRY = 100  # milliseconds
GRACE = 2  # seconds beyond the window after which the process must be gone
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PLAIN = "tests.asgi:plain"
PATIENT = ["--graceful-timeout", 10]  # gunicorn's own default is 30 s, that of the tests is 1 s


@pytest.fixture
def run():
    """Start a server in a form that `serve()` does not know: `run(name, arguments of python -m, environment)`."""
    with ExitStack() as stack:

        def run(name, arguments, env):
            port = free_port()
            env = {**os.environ, "PYTHONUNBUFFERED": "1", "DJANGO_SETTINGS_MODULE": "tests.settings", **env}
            process = Process(name, [sys.executable, "-m", *arguments, str(port)], env=env, cwd=ROOT)
            server = stack.enter_context(Server(name, process, port))
            until(lambda: answers(server), 20, f"an answer of {name}")
            return server

        yield run


@pytest.fixture
def start(serve, tmp_path):
    """Start a server whose streams write their ends to `tmp_path`."""

    def start(name, *, extra=(), env=None, **options):
        env = environment(tmp_path) | (env or {})
        if name == "hypercorn":
            options.setdefault("workers", 0)
        if name.startswith("gunicorn"):
            extra = [*PATIENT, *extra]
        return serve(name, env=env, threads=STREAMS + 20, extra=extra, **options)

    return start


def environment(folder, window=WINDOW):
    return {
        "TEST_DJANGO_SSE": json.dumps({"SHUTDOWN_WINDOW": window, "RETRY": RETRY}),
        "TEST_STOPPING_FILE": str(folder / "ends"),
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
    }


def answers(server):
    try:
        return request("GET", f"{server.url}/ping", timeout=2)[0] == 200
    except OSError:
        return False


def kinds(name):
    """The paths of streams of all kinds that the server has."""
    return ["queue/news", "sync", *(() if name in GEVENT_SERVERS else ("async",))]


def crowd_of(server, n=STREAMS):
    return Crowd([f"{server.url}/servers/stopping/{kind}" for kind in kinds(server.name)], n)


def await_gone(server):
    until(lambda: server.returncode is not None, WINDOW + grace(), "the end of the process")


def grace():
    """Two seconds of this machine, which are longer where others use it, too."""
    return GRACE * max(1, os.getloadavg()[0] / os.cpu_count())


def check_goodbye(crowd, ends):
    """Each stream of `crowd` has ended by itself, has told its client when to come again, and has been closed once."""
    crowd.wait_for(lambda members: all(member.over for member in members), 1, "the end of every stream")
    assert [member for member in crowd.members if member.broken] == []
    for member in crowd.members:
        assert re.fullmatch(rb"retry: 100\n\n(:.*\n\n)*retry: \d+\n\n", member.body), member
    views = Counter(member.url.split("/stopping/")[1].partition("/")[0].title() for member in crowd.members)
    expected = Counter({f"closed {view} shutdown": count for view, count in views.items()})
    expected.update({f"finally {view}": count for view, count in views.items() if view != "Queue"})
    noted = Counter(ends.read_text().splitlines())
    assert (noted - expected, expected - noted) == (Counter(), Counter())


def check_spread(crowd, told):
    """The streams of `crowd` have ended evenly over the window, and their clients come again over as long a time."""
    # A machine that others use, too, takes longer to tell them all.
    span = max(WINDOW, max(member.ended_at for member in crowd.members) - told)
    quarters = Counter(min(int((member.ended_at - told) / span * 4), 3) for member in crowd.members)
    assert all(quarters[quarter] > len(crowd.members) / 20 for quarter in range(4)), quarters
    retries = [int(bytes(member.body).split()[-1]) for member in crowd.members]
    assert RETRY <= min(retries) < RETRY + 500
    assert RETRY + 1000 * WINDOW - 500 < max(retries) <= RETRY + 1000 * WINDOW
    assert len(set(retries)) > len(retries) / 2


def check_log(server):
    assert "Traceback" not in server.log()
    assert "will not learn" not in server.log()


CELLS = [
    *(pytest.param(name, {}, signum, id=f"{name}-{signum.name}") for name in SERVERS for signum in SIGNALS),
    *(pytest.param(name, {"app": PLAIN}, signal.SIGTERM, id=f"{name}-without-hand-over") for name in ASGI_SERVERS),
]


@pytest.mark.parametrize(("name", "options", "signum"), CELLS)
def test_streams_end_by_themselves_and_then_the_process(start, tmp_path, name, options, signum):
    server = start(name, **options)
    with crowd_of(server) as crowd:
        crowd.wait_open()
        told = time.monotonic()
        server.kill(signum)
        await_gone(server)
        check_goodbye(crowd, tmp_path / "ends")
        check_spread(crowd, told)
    check_log(server)
    # Killed by the signal, where the server leaves it to its default in the end.
    assert server.returncode in (0, -signum)


@pytest.mark.parametrize(
    ("name", "signum", "options"),
    [
        pytest.param("uvicorn", signal.SIGINT, {"workers": 2}, id="uvicorn-ctrl-c"),
        pytest.param("uvicorn", signal.SIGTERM, {"workers": 2}, id="uvicorn-systemd"),
        pytest.param("hypercorn", signal.SIGTERM, {"workers": 2}, id="hypercorn-systemd"),
        pytest.param("granian", signal.SIGTERM, {"workers": 2}, id="granian-systemd"),
        pytest.param("gunicorn-gthread", signal.SIGINT, {"workers": 2}, id="gunicorn-gthread-ctrl-c"),
        pytest.param("gunicorn-gthread", signal.SIGTERM, {"workers": 2}, id="gunicorn-gthread-systemd"),
    ],
)
def test_master_and_workers_may_be_told_all_at_once(start, tmp_path, name, signum, options):
    # A terminal tells the whole group, systemd the whole service, and the master tells its workers besides.
    server = start(name, **options)
    with crowd_of(server) as crowd:
        crowd.wait_open()
        told = time.monotonic()
        os.killpg(server.pid, signum)
        await_gone(server)
        check_goodbye(crowd, tmp_path / "ends")
        check_spread(crowd, told)
    check_log(server)


@pytest.mark.parametrize("name", ["gunicorn-gthread", "gunicorn-gevent"])
def test_workers_of_a_loaded_master_learn_by_the_hook_of_the_documents(start, tmp_path, name):
    hook = (ROOT / "docs" / "stopping.rst").read_text().split("# gunicorn.conf.py\n")[1].split("\n\n\n")[0]
    config = tmp_path / "gunicorn.conf.py"
    config.write_text("\n".join(line.removeprefix("    ") for line in hook.splitlines()))
    server = start(name, extra=["--preload", "--config", config])
    with crowd_of(server) as crowd:
        crowd.wait_open()
        told = time.monotonic()
        server.kill(signal.SIGTERM)
        await_gone(server)
        check_goodbye(crowd, tmp_path / "ends")
        check_spread(crowd, told)
    check_log(server)


def test_without_the_hook_a_warning_says_what_is_missing(start):
    server = start("gunicorn-gthread", extra=["--preload"])
    with crowd_of(server, 2) as crowd:
        crowd.wait_open()
        assert server.log().count("will not learn in time that it is to stop") == 1


def await_reload(crowd, file):
    """Change `file` until a stream of `crowd` ends for it: a reloader sees no change before its first look."""
    times = itertools.count(time.time() + 2, 2)

    def touch(members):
        os.utime(file, (next(times),) * 2)
        return any(member.over for member in members)

    crowd.wait_for(touch, what="the reload")


def test_a_reload_of_the_development_server_ends_the_streams_at_once(run, tmp_path):
    touched = tmp_path / "touched.py"
    touched.write_text("from tests.settings import *\nDEBUG = True\n")
    env = environment(tmp_path, window=0) | {"DJANGO_SETTINGS_MODULE": "touched"}
    server = run("runserver", ["django", "runserver"], env)
    with crowd_of(server, 30) as crowd:
        crowd.wait_open()
        await_reload(crowd, touched)
        ended = min(member.ended_at for member in crowd.members if member.over)
        crowd.wait_for(lambda members: all(member.over for member in members), 1, "the end of every stream")
        assert max(member.ended_at for member in crowd.members) - ended < 1
        # Which is started when the old one is gone, and with it the last `finally`. Not by asking it: the old one goes
        # on accepting while Python ends, which socketserver complains about.
        until(lambda: server.log().count("Quit the server with") == 2, what="the new process")
        check_goodbye(crowd, tmp_path / "ends")
    until(lambda: answers(server), what="an answer of the new process")
    with crowd_of(server, 3) as crowd:
        crowd.wait_open()
    check_log(server)


def test_a_reload_of_uvicorn_waits_for_the_window_and_no_longer(start, tmp_path):
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "touched.py").write_text("")
    server = start("uvicorn", extra=["--reload", "--reload-dir", watched])
    with crowd_of(server) as crowd:
        crowd.wait_open()
        await_reload(crowd, watched / "touched.py")
        told = min(member.ended_at for member in crowd.members if member.over)
        crowd.wait_for(lambda members: all(member.over for member in members), WINDOW + grace())
        # Which is started when the old one is gone. That goes on answering until its streams have ended.
        until(lambda: server.log().count("Started server process") == 2, what="the new process")
        check_goodbye(crowd, tmp_path / "ends")
        check_spread(crowd, told)
    until(lambda: answers(server), what="an answer of the new process")
    check_log(server)


class EventSources:
    """The members of a crowd as the pages that opened them: who loses its stream comes again, as the stream said."""

    def __init__(self, crowd):
        self.crowd = crowd
        self.current = list(crowd.members)
        self.retry = [3.0] * len(self.current)  # seconds; what a browser takes before it is told

    def go_on(self, until_gone=None):
        """Do what is due; return whether all have an open stream, or whether the server `until_gone` is gone."""
        for number, member in enumerate(self.current):
            assert member.status in (None, 200), member  # anything else is the end of all attempts of an EventSource
            told = re.findall(rb"^retry: (\d+)$", bytes(member.body), re.MULTILINE)
            if told:
                self.retry[number] = int(told[-1]) / 1000
            if member.over and time.monotonic() >= member.ended_at + self.retry[number]:
                (self.current[number],) = self.crowd.add()
        if until_gone is not None:
            return until_gone.returncode is not None
        return all(member.body and not member.over for member in self.current)


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-gthread"])
def test_behind_a_balancer_every_client_is_served_again_by_the_next_process(start, redis_server, name):
    env = {"TEST_REDIS_LOCATION": redis_server.location}
    old = [start(name, env=env) for _ in range(2)]
    with (
        Balancer(*(server.port for server in old)) as balancer,
        Crowd(f"{balancer.url}/servers/stopping/queue/news", 60) as crowd,
    ):
        crowd.wait_open()
        pages = EventSources(crowd)
        for server in old:
            balancer.backends.append(start(name, env=env).port)
            server.kill(signal.SIGTERM)
            until(partial(pages.go_on, server), WINDOW + grace(), f"the end of {server}")
            balancer.backends.remove(server.port)
            until(pages.go_on, 15, "an open stream of every client")
            check_log(server)
        assert len(crowd.members) > len(pages.current)
        assert request("POST", f"{balancer.url}/servers/send/news", data={"event": "news", "data": "1"})[0] == 204
        crowd.wait_for(lambda members: all(b"data: 1\n\n" in member.body for member in pages.current), what="the event")
