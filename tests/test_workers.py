"""Threads and loops of our own: a thread for each sync iterator under a loop, bounded, given back at every end."""

import asyncio
import concurrent.futures
import contextvars
import gc
import os
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from pathlib import Path

import pytest

from django_sse import workers as workers_module
from django_sse.exceptions import SseError, TooManyStreams
from django_sse.feeds import Source
from django_sse.streams import Stream
from django_sse.workers import (
    DONE,
    THREAD_NAME,
    Worker,
    Workers,
    in_worker,
    on_gevent,
    on_unpatched_gevent,
    shared_loop,
)
from tests.helpers.wait import until

pytestmark = pytest.mark.skipif(on_gevent(), reason="workers serve event loops, and a gevent process has none")


@pytest.fixture
def at_exit():
    """The threads in which `at_exit` has run."""
    return []


@pytest.fixture
def workers(at_exit):
    return Workers(limit=lambda: 2, at_exit=lambda: at_exit.append(threading.get_ident()))


@pytest.fixture(autouse=True)
def _earlier_threads():
    """Streams that other tests have just closed may still be ending."""
    earlier.update(threading.enumerate())
    yield
    earlier.clear()


earlier = set()


def worker_threads():
    """The threads that workers of this test have started and not ended."""
    threads = set(threading.enumerate()) - earlier
    return [thread.name for thread in threads if thread.name.startswith(THREAD_NAME)]


def nothing():
    pass


def ask(worker, function):
    """Call `function` in the worker; return what it answers, or raise what it answers with."""
    answered = concurrent.futures.Future()

    def answer(result, error):
        answered.set_result(result) if error is None else answered.set_exception(error)

    worker.call(function, answer)
    return answered.result(10)


# --- one worker -----------------------------------------------------------------------------------------------------


def test_a_worker_starts_its_thread_with_its_first_call_and_keeps_it(workers):
    worker = workers.hire(nothing)
    assert worker_threads() == []
    idents = [ask(worker, threading.get_ident) for _ in range(3)]
    assert len(set(idents)) == 1
    assert idents[0] != threading.get_ident()
    (name,) = worker_threads()
    assert name.startswith(THREAD_NAME + "-")
    worker.stop()
    until(lambda: not worker_threads(), what="the end of the thread")


def test_what_a_function_returns_or_raises_is_the_answer(workers):
    worker = workers.hire(nothing)
    assert ask(worker, lambda: "result") == "result"
    with pytest.raises(ZeroDivisionError):
        ask(worker, lambda: 1 / 0)
    with pytest.raises(GeneratorExit):
        ask(worker, raiser(GeneratorExit))
    assert ask(worker, lambda: "still there") == "still there"
    worker.stop()


def raiser(error):
    def fail():
        raise error

    return fail


def test_the_answer_comes_in_the_thread_and_once(workers):
    answers = []
    worker = workers.hire(nothing)
    worker.call(lambda: "result", lambda *answer: answers.append((answer, threading.get_ident())))
    ident = ask(worker, threading.get_ident)
    assert answers == [(("result", None), ident)]
    worker.stop()


def test_the_thread_sees_the_context_of_its_hiring(workers):
    variable = contextvars.ContextVar("variable")
    variable.set("hired")
    worker = workers.hire(nothing)
    variable.set("later")
    assert ask(worker, variable.get) == "hired"
    ask(worker, lambda: variable.set("own"))
    assert ask(worker, variable.get) == "own"
    assert variable.get() == "later"
    worker.stop()


def test_code_knows_whether_it_is_in_a_worker(workers):
    worker = workers.hire(nothing)
    assert ask(worker, in_worker)
    assert not in_worker()
    worker.stop()


def test_stopping_closes_in_the_same_thread_after_the_step_under_way(workers, at_exit):
    order = []
    entered, go_on = threading.Event(), threading.Event()

    def step():
        entered.set()
        assert go_on.wait(10)
        order.append(("step", threading.get_ident()))

    worker = workers.hire(lambda: order.append(("close", threading.get_ident())))
    worker.call(step, lambda *answer: order.append(("answer", threading.get_ident())))
    assert entered.wait(10)
    worker.stop()
    worker.stop()
    assert order == []
    go_on.set()
    until(lambda: at_exit, what="the end of the thread")
    ident = order[0][1]
    assert order == [("step", ident), ("answer", ident), ("close", ident)]
    assert at_exit == [ident]


def test_a_worker_that_was_never_used_closes_without_a_thread(workers, at_exit):
    closed = []
    worker = workers.hire(lambda: closed.append(threading.get_ident()))
    worker.stop()
    worker.stop()
    assert closed == [threading.get_ident()]
    assert at_exit == []
    assert worker_threads() == []


def test_a_stopped_worker_answers_at_once_that_it_is_done(workers):
    called, answers = [], []
    worker = workers.hire(nothing)
    worker.stop()
    worker.call(lambda: called.append(1), lambda *answer: answers.append(answer))
    assert answers == [(DONE, None)]
    assert called == []


def test_a_worker_whose_iterator_another_thread_has_taken_over_closes_nothing(workers):
    closed = []
    worker = workers.hire(lambda: closed.append(1))
    worker.leave()
    assert len(workers._hired) == 0
    assert closed == []


def test_a_call_that_comes_together_with_the_stop_is_answered(workers, monkeypatch):
    """Another thread stops the worker after the call was made and before the thread has taken it."""
    called = []

    class LateThread(threading.Thread):
        def start(self):
            worker.stop()
            super().start()

    worker = workers.hire(nothing)
    monkeypatch.setattr(workers_module, "threading", types.SimpleNamespace(Thread=LateThread, local=threading.local))
    assert ask(worker, lambda: called.append(1)) is DONE
    assert called == []


def test_an_error_while_closing_is_logged_and_the_place_given_back(workers, at_exit, caplog):
    worker = workers.hire(raiser(ValueError("in finally")))
    ask(worker, nothing)
    worker.stop()
    until(lambda: at_exit and not worker_threads(), what="the end of the thread")
    (record,) = caplog.records
    assert "failed while it was closed" in record.getMessage()
    assert "in finally" in str(record.exc_info[1])
    assert len(workers._hired) == 0


def test_a_waiting_thread_does_not_hold_its_last_call(workers):
    """For with it it would hold the stream, which then nobody would collect."""

    class Step:
        def __call__(self):
            return "result"

    worker = workers.hire(nothing)
    step = Step()
    reference = weakref.ref(step)
    assert ask(worker, step) == "result"
    del step
    until(lambda: gc.collect() is not None and reference() is None, what="the end of the call")
    worker.stop()


# --- the bound ------------------------------------------------------------------------------------------------------


def test_one_more_than_the_limit_is_refused_with_what_to_do(workers):
    kept = [workers.hire(nothing) for _ in range(2)]
    with pytest.raises(TooManyStreams, match=r'2 sync iterators .*DJANGO_SSE\["THREADS"\]') as caught:
        workers.hire(nothing)
    assert isinstance(caught.value, SseError)
    assert len(kept) == 2


def test_the_limit_is_asked_for_at_each_hiring():
    limit = 1
    workers = Workers(limit=lambda: limit, at_exit=nothing)
    kept = [workers.hire(nothing)]
    with pytest.raises(TooManyStreams):
        workers.hire(nothing)
    limit = 2
    kept.append(workers.hire(nothing))


def test_a_place_is_given_back_by_a_stopped_worker(workers):
    for _ in range(5):
        first, second = workers.hire(nothing), workers.hire(nothing)
        first.stop()
        second.stop()


def test_a_place_is_given_back_by_a_worker_whose_thread_has_ended(workers):
    for _ in range(5):
        pair = [workers.hire(nothing), workers.hire(nothing)]
        for worker in pair:
            ask(worker, nothing)
            worker.stop()
        until(lambda: not worker_threads(), what="the end of the threads")


def test_a_place_is_given_back_by_a_worker_that_is_dropped(workers):
    for _ in range(5):
        pair = [workers.hire(nothing), workers.hire(nothing)]
        del pair
        gc.collect()


def test_the_collector_may_drop_a_stream_while_another_is_hired(monkeypatch):
    """A stream in a reference cycle is collected at any point, also where a lock is held."""
    workers = Workers(limit=lambda: 5, at_exit=nothing)

    class CollectingWorker(Worker):
        def __init__(self, *arguments):
            gc.collect()
            super().__init__(*arguments)

    cycle = [Stream(Source(iter(()), lambda value: ()), workers, on_loop=True)]
    cycle.append(cycle)
    del cycle
    monkeypatch.setattr(workers_module, "Worker", CollectingWorker)
    hired = []
    thread = threading.Thread(target=lambda: hired.append(workers.hire(nothing)), daemon=True)
    thread.start()
    thread.join(10)
    assert hired, "the thread waits for a lock that it holds"
    hired[0].stop()


def test_a_refused_stream_leaves_nothing_to_complain_of():
    """Nothing half-made is collected with an error: pytest would fail this test."""
    workers = Workers(limit=lambda: 0, at_exit=nothing)
    with pytest.raises(TooManyStreams):
        Stream(Source(iter(()), lambda value: ()), workers, on_loop=True)
    gc.collect()


# --- the shared loop ------------------------------------------------------------------------------------------------


def run_in_loop(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, shared_loop()).result(10)


async def where():
    return threading.current_thread().name, id(asyncio.get_running_loop())


def test_all_coroutines_of_a_process_run_in_one_loop():
    (name, loop), other = run_in_loop(where()), []
    thread = threading.Thread(target=lambda: other.append(run_in_loop(where())))
    thread.start()
    thread.join(10)
    assert name == "django-sse-loop"
    assert other == [(name, loop)]


def test_what_a_coroutine_raises_is_what_its_caller_gets():
    async def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run_in_loop(fail())


def test_a_fork_gets_workers_and_a_loop_of_its_own():
    script = """
        import asyncio, os, threading
        from django_sse.workers import Workers, shared_loop

        def run_in_loop(coroutine):
            return asyncio.run_coroutine_threadsafe(coroutine, shared_loop()).result(10)

        async def where():
            return threading.get_ident()

        workers = Workers(limit=lambda: 1, at_exit=lambda: None)
        kept = workers.hire(lambda: None)
        run_in_loop(where())
        hold, held = threading.Event(), threading.Event()

        def busy():
            with workers._lock:
                held.set()
                hold.wait(10)

        thread = threading.Thread(target=busy)
        thread.start()
        held.wait(10)
        pid = os.fork()
        if not pid:
            workers.hire(lambda: None)
            run_in_loop(where())
            os._exit(7)
        hold.set()
        thread.join()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert outcome.stdout == "7\n", outcome.stderr


# --- gevent ---------------------------------------------------------------------------------------------------------


class Greenlet:
    pass


def gevent(monkeypatch, *, patched, current):
    monkey = types.SimpleNamespace(is_module_patched=lambda name: patched and name == "threading")
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    monkeypatch.setitem(sys.modules, "gevent", types.SimpleNamespace(getcurrent=lambda: current, Greenlet=Greenlet))


def test_a_process_without_gevent_is_on_neither(monkeypatch):
    monkeypatch.delitem(sys.modules, "gevent", raising=False)
    monkeypatch.delitem(sys.modules, "gevent.monkey", raising=False)
    assert not on_gevent()
    assert not on_unpatched_gevent()


@pytest.mark.parametrize(
    ("patched", "current", "on", "on_unpatched"),
    [
        (True, Greenlet(), True, False),
        (False, Greenlet(), False, True),
        (False, object(), False, False),
    ],
)
def test_patched_threads_are_gevent_and_a_greenlet_among_threads_is_a_mistake(
    monkeypatch, patched, current, on, on_unpatched
):
    gevent(monkeypatch, patched=patched, current=current)
    assert on_gevent() is on
    assert on_unpatched_gevent() is on_unpatched
