"""Signals belong to a process, so each story is told by one of its own: what it prints is what happened, in order."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.need import need_module

ROOT = Path(__file__).parent.parent

PRELUDE = """
import _thread, asyncio, logging, os, signal, sys, threading, time
from django.conf import settings
from signal import SIGINT, SIGQUIT, SIGTERM, SIG_DFL, SIG_IGN, getsignal

settings.configure(DEBUG=False, DJANGO_SSE={"SHUTDOWN_WINDOW": 0.2})
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout, level="WARNING")

from django_sse import shutdown
from django_sse.registry import Account, StreamInfo, open_streams

class Stream:
    def __init__(self, ends=True):
        self.account = Account(StreamInfo(view=type(self), path="/"))
        self.ends = ends
        streams.append(self)
        open_streams.admit(self, limit=None)

    def end(self, reason, last=b""):
        say("end", reason, last.partition(b":")[0].decode())
        if self.ends:
            open_streams.forget(self)

streams = []
began = time.monotonic()

def say(*what):
    os.write(1, (" ".join(map(str, what)) + "\\n").encode())

def server(signum, frame):
    say("server", signal.Signals(signum).name, "in the main thread" if here() else "elsewhere", len(open_streams))
    heard.append(signum)

def here():
    return threading.get_ident() == main

def kill(signum):
    os.kill(os.getpid(), signum)

def wait(count):
    deadline = time.monotonic() + 5
    while len(heard) < count and time.monotonic() < deadline:
        time.sleep(0.01)

heard = []
main = threading.get_ident()
"""


def story(code, *arguments, status=0, patch="", measured=True):
    """Run `code` in a process of its own, `patch` before anything is imported; return the lines it has written.

    Where it is `measured`, coverage has a handler for SIGTERM.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if patch or not measured:  # coverage knows threads only
        env.pop("COVERAGE_PROCESS_CONFIG", None)
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", patch + PRELUDE + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=30,
        cwd=ROOT,
        env=env,
    )
    assert process.returncode == status, process.stdout
    return process.stdout.splitlines()


def test_without_a_stream_the_server_is_given_the_signal_at_once():
    assert story("""
signal.signal(SIGTERM, server)
assert shutdown.install()
kill(SIGTERM)
say("after", threading.active_count(), open_streams.draining)
""") == ["server SIGTERM in the main thread 0", "after 1 False"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT"])
def test_the_server_is_given_the_signal_in_the_main_thread_when_the_last_stream_has_ended(name):
    assert story(f"""
signal.signal({name}, server)
shutdown.install()
for _ in range(3): Stream()
kill({name})
wait(1)
say(0.1 < time.monotonic() - began < 1.2, open_streams.draining)
kill({name})
""") == [
        *["end shutdown retry"] * 3,
        f"server {name} in the main thread 0",
        "True True",
        f"server {name} in the main thread 0",
    ]


def test_streams_that_do_not_end_hold_the_signal_up_for_a_second_beyond_the_window():
    assert story("""
signal.signal(SIGTERM, server)
shutdown.install()
Stream(ends=False)
kill(SIGTERM)
wait(1)
say(1.1 < time.monotonic() - began < 2)
streams.clear()
""") == ["end shutdown retry", "server SIGTERM in the main thread 1", "True"]


def test_nothing_is_held_when_the_streams_have_been_given_up():
    assert story("""
for signum in (SIGINT, SIGTERM): signal.signal(signum, server)
shutdown.install()
Stream(ends=False)
kill(SIGTERM)
wait(1)
kill(SIGINT)
kill(SIGTERM)
say(len(heard))
streams.clear()
""") == [
        "end shutdown retry",
        *(f"server {name} in the main thread 1" for name in ("SIGTERM", "SIGINT", "SIGTERM")),
        "3",
    ]


def test_streams_that_end_at_once_do_not_have_the_signal_lost():
    # The end may come before the handler has done its work: a thread that runs at once is the extreme of that.
    assert story("""
settings.DJANGO_SSE = {"SHUTDOWN_WINDOW": 0}
signal.signal(SIGTERM, server)
shutdown.install()
start = _thread.start_new_thread

def start_and_wait(function, arguments):
    done = []
    start(lambda: (function(*arguments), done.append(True)), ())
    while not done or len(open_streams) or threading.active_count() > 1: time.sleep(0.01)

_thread.start_new_thread = start_and_wait
Stream()
kill(SIGTERM)
wait(1)
time.sleep(0.1)  # in which it may not come again
""") == ["end shutdown retry", "server SIGTERM in the main thread 0"]


def test_without_a_thread_to_be_had_the_server_is_given_the_signal_at_once():
    assert story("""
signal.signal(SIGTERM, server)
shutdown.install()

def refuse(*args):
    raise RuntimeError("can't start new thread")

_thread.start_new_thread = refuse
Stream()
kill(SIGTERM)
say(len(heard))
""") == ["server SIGTERM in the main thread 1", "1", "end shutdown retry"]


def test_ctrl_c_pressed_again_does_not_wait():
    lines = story("""
settings.DJANGO_SSE = {"SHUTDOWN_WINDOW": 20}
signal.signal(SIGINT, server)
shutdown.install()
Stream()
Stream()
kill(SIGINT)
say("once", len(heard))
kill(SIGINT)
say("twice", len(heard))
kill(SIGINT)
say("thrice", len(heard))
while len(open_streams): time.sleep(0.01)
time.sleep(0.1)  # in which nothing more may come
say("at last", len(heard))
assert time.monotonic() - began < 5
""")
    assert [line.split()[0] + line[-2:] for line in lines if not line.startswith(("end", "server"))] == [
        *("once 0", "twice 1", "thrice 2", "at 2"),
    ]


def test_a_supervisor_may_repeat_itself():
    lines = story("""
signal.signal(SIGTERM, server)
shutdown.install()
Stream()
for _ in range(3): kill(SIGTERM)
say("thrice", len(heard))
wait(1)
say("at last", len(heard))
""")
    assert [line for line in lines if not line.startswith("end")] == [
        "thrice 0",
        "server SIGTERM in the main thread 0",
        "at last 1",
    ]


def test_signals_of_two_kinds_are_both_handed_on():
    lines = story("""
signal.signal(SIGINT, server)
signal.signal(SIGQUIT, server)
signal.signal(SIGTERM, server)
shutdown.install()
logging.getLogger("django_sse").setLevel("INFO")
Stream()
kill(SIGQUIT)
kill(SIGINT)
wait(2)
""")
    assert lines[:2] == ["INFO This process is to stop: its 1 stream(s) end within 0.2 s.", "end shutdown retry"]
    assert sorted(lines[2:]) == [f"server {name} in the main thread 0" for name in ("SIGINT", "SIGQUIT")]


def test_a_process_that_sigterm_would_kill_is_killed_by_it_in_the_end():
    assert story(
        """
assert shutdown.install(default=True)
Stream()
kill(SIGTERM)
say("lives")
time.sleep(5)
say("too long")
""",
        status=-signal.SIGTERM,
    ) in (["lives", "end shutdown retry"], ["end shutdown retry", "lives"])


def test_ctrl_c_is_still_a_keyboard_interrupt():
    assert story("""
shutdown.install(default=True)
try:
    kill(SIGINT)
except KeyboardInterrupt:
    say("interrupted")
Stream()
try:
    kill(SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    say("interrupted", len(open_streams))
""") == ["interrupted", "end shutdown retry", "interrupted 0"]


def test_a_process_that_may_not_be_serving_keeps_what_python_starts_with():
    code = """
say(shutdown.install())
say(getsignal(SIGTERM) is SIG_DFL, getsignal(SIGINT) is signal.default_int_handler, getsignal(SIGQUIT) is SIG_DFL)
"""
    assert story(code, measured=False) == ["False", "True True True"]


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("shutdown.install()", ["runserver", "8000"]),
        ("shutdown.install()", ["runserver_plus"]),
        (
            "loop = asyncio.new_event_loop(); loop.call_soon(lambda: (shutdown.install(), loop.stop()))\n"
            "loop.run_forever(); loop.close()",
            [],
        ),
        ("shutdown.install(default=True)", ["migrate"]),
    ],
    ids=["development-server", "another-one", "event-loop", "asked-to"],
)
def test_a_process_that_is_known_to_serve_does_not(code, arguments):
    assert story(
        code + "\nsay(getsignal(SIGTERM) is SIG_DFL, getsignal(SIGINT) is signal.default_int_handler, "
        "getsignal(SIGQUIT) is SIG_DFL)",
        *arguments,
    ) == ["False False True"]


def test_what_is_ignored_stays_ignored():
    assert story("""
for signum in (SIGTERM, SIGINT, SIGQUIT): signal.signal(signum, SIG_IGN)
say(shutdown.install(default=True), {getsignal(signum) for signum in (SIGTERM, SIGINT, SIGQUIT)} == {SIG_IGN})
""") == ["False True"]


def test_it_is_done_once_and_again_when_the_server_has_set_its_handlers_anew():
    assert story("""
signal.signal(SIGTERM, server)
shutdown.install()
first = getsignal(SIGTERM)
shutdown.install()
say(getsignal(SIGTERM) is first)

def second(signum, frame):
    say("the second server")
    first(signum, frame)

signal.signal(SIGTERM, second)
assert shutdown.install()
Stream()
kill(SIGTERM)
wait(1)
""") == ["True", "end shutdown retry", "the second server", "server SIGTERM in the main thread 0"]


@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_a_loop_that_handles_signals_hears_of_each_once_and_at_once(name):
    need_module(name)
    lines = story(f"""
import {name}

async def serve():
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    def hear():
        say("server", len(open_streams))
        heard.append(SIGTERM)
        stop.set()
    loop.add_signal_handler(SIGTERM, hear)
    assert shutdown.install()
    for _ in range(3): Stream()
    kill(SIGTERM)
    await asyncio.wait_for(stop.wait(), 5)
    while len(open_streams): await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    say("heard", len(heard))
    kill(SIGTERM)
    await asyncio.sleep(0.1)
    say("heard", len(heard))

loop = {name}.new_event_loop()
loop.run_until_complete(serve())
loop.close()
""")
    assert lines.count("end shutdown retry") == 3
    assert [line for line in lines if line.startswith("heard")] == ["heard 1", "heard 2"]
    assert int(lines[[line.startswith("server") for line in lines].index(True)].split()[1]) > 0


def test_in_another_thread_a_stream_warns_once_that_it_will_not_learn():
    code = """
for _ in range(2):
    thread = threading.Thread(target=shutdown.at_stream)
    thread.start()
    thread.join()
say(getsignal(SIGTERM) is server)
"""
    warning, untouched = story("signal.signal(SIGTERM, server)\n" + code)
    assert warning.startswith("WARNING This process will not learn in time")
    assert "django_sse.shutdown.install()" in warning
    assert untouched == "True"
    assert story('settings.DJANGO_SSE = {"SHUTDOWN_WINDOW": 0}\nsignal.signal(SIGTERM, server)\n' + code) == ["True"]
    assert story("signal.signal(SIGTERM, server)\nshutdown.install()\n" + code) == ["False"]


def test_a_process_that_ends_without_a_signal_ends_its_streams_at_once_and_waits_for_a_second():
    assert (
        story(
            """
for _ in range(3): Stream()
sys.exit(3)
""",
            status=3,
        )
        == ["end shutdown retry"] * 3
    )
    assert story("""
import atexit
atexit.unregister(shutdown._end_at_exit)
atexit.register(lambda: say(0.9 < time.monotonic() - began < 2))
atexit.register(shutdown._end_at_exit)
Stream(ends=False)
""") == ["end shutdown retry", "True"]


SLOW = """
from django_sse.workers import Workers

stepping = threading.Event()

def step():
    stepping.set()
    time.sleep(0.3)

worker = Workers(lambda: 1, lambda: None).hire(lambda: say("finally"))
worker.call(step, lambda result, error: None)
assert stepping.wait(5)
worker.stop()
"""


def test_a_process_does_not_end_under_the_last_step_of_an_iterator_in_a_thread():
    assert story(SLOW + "say('end')") == ["end", "finally"]
    lines = story("signal.signal(SIGTERM, server)\nshutdown.install()\nStream()\n" + SLOW + "kill(SIGTERM)\nwait(1)")
    assert lines == ["end shutdown retry", "finally", "server SIGTERM in the main thread 0"]
    lines = story(
        "signal.signal(SIGTERM, server)\nshutdown.install()\nStream()\n" + SLOW + "kill(SIGTERM)\n"
        "while len(open_streams): time.sleep(0.01)\nkill(SIGTERM)\nsay(len(heard))\nwait(1)"
    )
    assert lines == ["end shutdown retry", "0", "finally", "server SIGTERM in the main thread 0"]
    # A server that the loop has told already may be gone before the streams are.
    lines = story(
        "def loop(*args): say('server')\nloop.__module__ = 'uvloop.loop'\n"
        "signal.signal(SIGTERM, loop)\nshutdown.install()\nfor _ in range(3): Stream()\nkill(SIGTERM)\n"
        "while not open_streams.draining: time.sleep(0.01)\n"
        "import atexit; atexit.unregister(shutdown._end_at_exit)"
    )
    assert sorted(lines) == [*["end shutdown retry"] * 3, "server"]


def test_a_forked_process_starts_afresh():
    lines = story("""
signal.signal(SIGTERM, server)
shutdown.install()
Stream()
kill(SIGTERM)
child = os.fork()
if not child:
    streams.clear()
    kill(SIGTERM)
    say("child", len(heard))
    Stream()
    kill(SIGTERM)
    say("child", len(heard))
    wait(2)
    say("child", len(heard))
    os._exit(0)
os.waitpid(child, 0)
wait(1)
say("parent", len(heard))
""")
    assert [line for line in lines if line.startswith("child")] == ["child 1", "child 1", "child 2"]
    assert lines[-1] == "parent 1"


def test_a_process_forked_after_the_end_starts_afresh():
    assert story("""
signal.signal(SIGTERM, server)
shutdown.install()
Stream()
kill(SIGTERM)
wait(1)
child = os.fork()
if not child:
    Stream()
    kill(SIGTERM)
    say("child", len(heard))
    wait(2)
    os._exit(0)
os.waitpid(child, 0)
""")[2:] in (
        ["child 1", "end shutdown retry", "server SIGTERM in the main thread 0"],
        ["end shutdown retry", "child 1", "server SIGTERM in the main thread 0"],
    )


def test_greenlets_go_on_while_their_streams_end():
    need_module("gevent")
    patch = "from gevent import monkey; thread = monkey.get_original('_thread', 'get_ident'); monkey.patch_all()"
    lines = story(
        """
import gevent
here = lambda: thread() == main
main = thread()
signal.signal(SIGTERM, server)
shutdown.at_stream()
for _ in range(3): Stream()
ticks = []
def tick():
    while True:
        ticks.append(len(heard))
        gevent.sleep(0.01)
gevent.spawn(tick)
gevent.spawn_later(0.05, kill, SIGTERM)  # while the main greenlet waits, so that the handler runs in the hub
wait(1)
say(len(ticks) > 10)
""",
        patch=patch,
    )
    assert lines == [*["end shutdown retry"] * 3, "server SIGTERM in the main thread 0", "True"]


def test_a_setting_that_cannot_be_used_is_logged_and_holds_nothing_up():
    lines = story("""
settings.DJANGO_SSE = {"SHUTDOWN_WINDOW": "soon"}
signal.signal(SIGTERM, server)
shutdown.install()
Stream()
kill(SIGTERM)
wait(1)
streams.clear()
""")
    assert lines[0] == "ERROR The streams of this process could not be ended"
    assert lines[-1] == "server SIGTERM in the main thread 1"


def test_a_server_that_calls_a_function_can_have_the_streams_ended():
    assert story("""
for _ in range(3): Stream()
shutdown.drain()
say(0.1 < time.monotonic() - began < 1.2, len(open_streams), open_streams.draining)
""") == [*["end shutdown retry"] * 3, "True 0 True"]
