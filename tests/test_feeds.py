"""The table FEEDS: what iterator() gives x how the server asks, each cell by itself, without a stream around it."""

import asyncio
import contextvars
import gc
import sys
import threading
import weakref
from functools import partial

import pytest
import sse
from asgiref.sync import SyncToAsync

from django_sse.brokers.memory import MemoryBroker
from django_sse.event import encode_payload
from django_sse.feeds import CHUNK_BYTES, FEEDS, HEARTBEAT, LATE, InTask, Source, flush_sse, has_own_iter
from django_sse.inbox import LoopBell, Mailboxes
from django_sse.runtime import Runtime
from django_sse.wire import Sse, comment
from django_sse.workers import Workers, shared_loop
from tests.helpers.cells import ASKED, BESIDE, STEPPED, WAITING, as_given, make
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until


@pytest.fixture
def workers():
    return Workers(limit=lambda: 4, at_exit=lambda: None)


@pytest.fixture
def run():
    run = Runtime(MemoryBroker())
    yield run
    run.close()


@pytest.fixture
def mailbox(run):
    return run.open(["a"], max_events=10_000, max_bytes=10**7)


def publish(run, *texts):
    for text in texts:
        run.broker.publish("a", encode_payload("", text))


class Taker:
    """Takes from a feed as a stream does: again when it has rung. Whatever is asked of it returns in time."""

    def __init__(self, feed, *, on_loop):
        self.feed = feed
        self.rings = threading.Semaphore(0)
        self._loop = asyncio.new_event_loop() if on_loop else None
        self._bell = self._in_loop(LoopBell) if on_loop else threading.Event()
        feed.ring_by(self._ring)

    def _ring(self):
        self.rings.release()
        self._bell.ring() if self._loop else self._bell.set()

    def _in_loop(self, function):
        """Call `function` where the loop runs."""
        if self._loop is None:
            return function()

        async def call():
            return function()

        return self._loop.run_until_complete(call())

    def take(self):
        """What there is now."""
        return self._in_loop(self.feed.take)

    def next(self):
        """The next chunk, or None at the end."""
        if self._loop is not None:
            return self._loop.run_until_complete(asyncio.wait_for(self._next(), 10))
        while (chunk := self.feed.take()) is None and self.feed.ended is None:
            assert self._bell.wait(10), "no ring"
            self._bell.clear()
        return chunk

    async def _next(self):
        while (chunk := self.feed.take()) is None and self.feed.ended is None:
            await self._bell.wait(None)
            self._bell.clear()
        return chunk

    def all(self):
        chunks = []
        while (chunk := self.next()) is not None:
            chunks.append(chunk)
        return chunks

    def in_background(self):
        """Ask for the next chunk and do not wait for it; call the result to get it."""
        got = []
        thread = threading.Thread(target=lambda: got.append(self.next()), daemon=True)
        thread.start()

        def result():
            thread.join(10)
            assert got, "nothing came"
            return got[0]

        return result

    def settle(self, predicate):
        """Wait until `predicate()` holds, running the loop meanwhile."""

        def look():
            if self._loop is not None:
                self._loop.run_until_complete(asyncio.sleep(0.001))
            return predicate()

        until(look, what=predicate)

    def finish(self):
        self.feed.close("client")
        if self._loop is not None:
            self._loop.run_until_complete(asyncio.sleep(0))
            waiting = asyncio.all_tasks(self._loop)
            self._loop.run_until_complete(asyncio.wait(waiting, timeout=10) if waiting else asyncio.sleep(0))
            self._loop.close()


@pytest.fixture
def taker(workers):
    """A function that returns the `Taker` of a source."""
    takers, before = [], set(threading.enumerate())

    def taker(source, *, on_loop):
        feed = FEEDS[source.kind(on_loop=on_loop)][on_loop](source, workers)
        takers.append(Taker(feed, on_loop=on_loop))
        return takers[-1]

    yield taker
    for each in takers:
        each.finish()
    started = set(threading.enumerate()) - before
    mine = [thread for thread in started if thread.name.startswith("django-sse-stream")]
    until(lambda: not any(thread.is_alive() for thread in mine), what="the end of the threads")


@pytest.fixture
def stepped(taker):
    """A function that returns the `Taker` of an iterator."""

    def stepped(kind, steps, *, on_loop, flush=as_given):
        return taker(Source(make(kind, steps), flush), on_loop=on_loop)

    return stepped


# --- every cell of user code ----------------------------------------------------------------------------------------


def test_the_table_has_a_feed_for_each_kind_and_each_server():
    assert set(FEEDS) == {"sync", "async", "mailbox"}
    assert all(len(row) == 2 for row in FEEDS.values())


@STEPPED
def test_each_step_is_a_chunk_and_the_end_is_the_end(stepped, kind, on_loop):
    taker = stepped(kind, lambda: (value for value in "abc"), on_loop=on_loop)
    assert taker.feed.ended is None
    assert taker.all() == ["a", "b", "c"]
    assert (taker.feed.ended, taker.feed.error, taker.feed.events) == ("finished", None, 3)
    assert taker.next() is None


@STEPPED
def test_nothing_is_stepped_before_it_is_asked_for(stepped, kind, on_loop):
    taken = []

    def steps():
        for number in range(5):
            taken.append(number)
            yield str(number)

    taker = stepped(kind, steps, on_loop=on_loop)
    assert taken == []
    assert taker.next() == "0"
    assert taken == [0]
    assert taker.next() == "1"
    assert taken == [0, 1]


@BESIDE
def test_who_asks_again_before_the_ring_gets_nothing_and_begins_no_second_step(stepped, kind, on_loop):
    entered, go_on = threading.Event(), threading.Event()

    def steps():
        for number in range(5):
            taken.append(number)
            entered.set()
            assert go_on.wait(10)
            yield str(number)

    if (kind, on_loop) == ("async", True):
        go_on.set()  # nobody else runs while this loop's task does
    taken = []
    taker = stepped(kind, steps, on_loop=on_loop)
    assert taker.take() is None
    if on_loop is False or kind == "sync":
        assert entered.wait(10)
        assert [taker.take() for _ in range(3)] == [None] * 3
        go_on.set()
    taker.settle(partial(taker.rings.acquire, blocking=False))
    assert taker.take() == "0"
    assert taken == [0]
    assert taker.feed.events == 1


@STEPPED
def test_a_step_without_a_chunk_is_followed_by_the_next_and_one_with_several_by_all_of_them(stepped, kind, on_loop):
    chunks = {0: (), 1: ("a", "", "b"), 2: ("",), 3: ("c",), None: ("after the end",)}
    taker = stepped(kind, lambda: (n for n in range(4)), on_loop=on_loop, flush=lambda value: chunks[value])
    assert taker.all() == ["a", "b", "c", "after the end"]


@STEPPED
def test_steps_happen_one_after_the_other_in_one_thread(stepped, kind, on_loop):
    def steps():
        for _ in range(5):
            idents.add(threading.get_ident())
            yield "chunk"
        idents.add(threading.get_ident())

    idents = set()
    assert len(stepped(kind, steps, on_loop=on_loop).all()) == 5
    assert len(idents) == 1
    same = (kind == "sync") is not on_loop  # the cells that need no thread of ours
    assert (idents == {threading.get_ident()}) is same


@ASKED
@needs_loops
def test_all_steps_of_an_async_iterator_and_its_end_belong_to_one_task(taker, on_loop):
    """For what it opens around a `yield`, a timeout or a task group, does."""

    async def steps():
        try:
            for _ in range(3):
                tasks.add(asyncio.current_task())
                yield "chunk"
        finally:
            await asyncio.sleep(0)
            ended.append(asyncio.current_task())

    for close in (False, True):
        tasks, ended = set(), []
        mine = taker(Source(steps(), as_given), on_loop=on_loop)
        if close:
            assert mine.next() == "chunk"
            mine.feed.close("client")
        else:
            assert mine.all() == ["chunk"] * 3
        mine.settle(lambda ended=ended: ended)
        assert tasks == set(ended)


@STEPPED
def test_the_iterator_sees_the_context_of_its_request(workers, kind, on_loop):
    variable = contextvars.ContextVar("variable", default="nothing")

    def steps():
        yield variable.get()

    def request():
        variable.set("the request's")
        return FEEDS[kind][on_loop](Source(make(kind, steps), as_given), workers)

    hired = kind == "sync" and on_loop  # in the request, and taken from by the server
    taker = Taker(contextvars.copy_context().run(request) if hired else request(), on_loop=on_loop)
    assert taker.all() == ["the request's"]
    taker.finish()


@STEPPED
def test_an_error_of_the_iterator_is_kept_and_the_end(stepped, kind, on_loop):
    def steps():
        yield "good"
        raise ValueError("mine")

    taker = stepped(kind, steps, on_loop=on_loop)
    assert taker.next() == "good"
    assert taker.next() is None
    assert taker.feed.ended == "error"
    assert str(taker.feed.error) == "mine"
    assert taker.feed.events == 1
    assert taker.next() is None


@STEPPED
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_close_runs_the_finally_of_what_has_begun(stepped, kind, on_loop, asked):
    def steps():
        begun.append(1)
        try:
            while True:
                yield "chunk"
        finally:
            ended.append(1)

    begun, ended = [], []
    taker = stepped(kind, steps, on_loop=on_loop)
    for _ in range(asked):
        taker.next()
    taker.feed.close("stalled")
    taker.feed.close("client")
    taker.settle(lambda: len(ended) == bool(asked))
    assert taker.feed.ended == "stalled"
    assert len(begun) == bool(asked)
    assert taker.next() is None
    assert len(ended) == bool(asked)


@STEPPED
@pytest.mark.parametrize("how", ["close", "end"])
def test_an_end_in_the_middle_of_a_step_comes_after_it_and_runs_the_finally(stepped, kind, on_loop, how):
    entered, go_on = threading.Event(), threading.Event()

    def steps():
        try:
            yield "first"
            entered.set()
            assert go_on.wait(10)
            yield "second"
            yield "never"
        finally:
            ended.append(1)

    ended = []
    taker = stepped(kind, steps, on_loop=on_loop)
    assert taker.next() == "first"
    result = taker.in_background()
    assert entered.wait(10)
    getattr(taker.feed, how)("shutdown")
    go_on.set()
    assert result() in ("second", None)
    assert taker.next() is None
    taker.settle(lambda: ended)
    assert taker.feed.ended == "shutdown"


@BESIDE
def test_close_rings_for_who_waits(stepped, kind, on_loop):
    taker = stepped(kind, lambda: (value for value in "ab"), on_loop=on_loop)
    taker.feed.close("client")
    assert taker.rings.acquire(timeout=0)


@BESIDE
def test_what_is_dropped_ends_as_if_it_was_closed(stepped, kind, on_loop):
    def steps():
        try:
            while True:
                yield "chunk"
        finally:
            ended.append(1)

    ended = []
    taker = stepped(kind, steps, on_loop=on_loop)
    taker.next()
    taker.feed.drop()
    taker.settle(lambda: ended)


def test_an_iterator_of_this_thread_is_collected_and_needs_no_dropping(workers):
    def steps():
        try:
            yield "chunk"
        finally:
            ended.append(1)

    ended = []
    feed = FEEDS["sync"][False](Source(steps(), as_given), workers)
    assert feed.take() == "chunk"
    feed.drop()
    feed.leave()
    assert ended == []
    del feed
    gc.collect()
    assert ended == [1]


@BESIDE
def test_an_error_in_the_finally_is_logged(stepped, kind, on_loop, caplog):
    def steps():
        try:
            yield "chunk"
        finally:
            raise ValueError("in finally")

    taker = stepped(kind, steps, on_loop=on_loop)
    taker.next()
    taker.feed.close("client")
    taker.settle(lambda: caplog.records)
    (record,) = caplog.records
    assert record.getMessage() == LATE
    assert str(record.exc_info[1]) == "in finally"
    assert taker.next() is None


@ASKED
@needs_loops
def test_an_error_in_the_finally_of_an_async_iterator_that_was_awaiting_is_logged(taker, caplog, on_loop):
    async def steps():
        try:
            entered.set()
            await asyncio.sleep(3600)
            yield "never"
        finally:
            raise ValueError("in finally")

    entered = threading.Event()
    mine = taker(Source(steps(), as_given), on_loop=on_loop)
    mine.take()
    mine.settle(entered.is_set)
    mine.feed.close("client")
    mine.settle(lambda: caplog.records)
    assert str(caplog.records[0].exc_info[1]) == "in finally"
    assert len(caplog.records) == 1


@needs_loops
def test_an_error_of_the_step_that_was_under_way_at_the_close_is_logged(taker, caplog):
    entered, go_on = threading.Event(), threading.Event()

    def steps():
        entered.set()
        assert go_on.wait(10)
        raise ValueError("late")
        yield

    mine = taker(Source(steps(), as_given), on_loop=True)
    mine.take()
    assert entered.wait(10)
    mine.feed.close("client")
    go_on.set()
    mine.settle(lambda: caplog.records)
    assert str(caplog.records[0].exc_info[1]) == "late"
    assert len(caplog.records) == 1


# --- sync iterators -------------------------------------------------------------------------------------------------


class Closable:
    """An iterator of the user's own, which need not know that it may be closed again."""

    def __init__(self):
        self.closed = 0

    def __iter__(self):
        return self

    def __next__(self):
        return "chunk"

    def close(self):
        self.closed += 1


@ASKED
@pytest.mark.parametrize("asked", [0, 1])
def test_an_iterator_is_closed_once(taker, on_loop, asked):
    iterator = Closable()
    mine = taker(Source(iterator, as_given), on_loop=on_loop)
    for _ in range(asked):
        assert mine.next() == "chunk"
    for _ in range(3):
        mine.feed.close("client")
    mine.settle(lambda: iterator.closed)
    assert mine.next() is None
    assert iterator.closed == 1


def test_an_iterator_that_refuses_to_close_for_a_reason_of_its_own_says_so(workers):
    class Refusing(Closable):
        def close(self):
            raise ValueError("mine")

    feed = FEEDS["sync"][False](Source(Refusing(), as_given), workers)
    feed.take()
    with pytest.raises(ValueError, match="mine"):
        feed.close("client")


def test_a_close_that_comes_with_the_end_of_a_step_runs_the_finally(workers):
    """Another thread is refused, for the step is under way, and the step is over before that thread has noted it."""

    class Refusing(Closable):
        def close(self):
            super().close()
            if self.closed == 1:
                go_on.set()
                assert over.wait(10)
                raise ValueError("generator already executing")  # what Python says

        def __next__(self):
            entered.set()
            assert go_on.wait(10)
            return "chunk"

    entered, go_on, over = threading.Event(), threading.Event(), threading.Event()
    iterator = Refusing()
    feed = FEEDS["sync"][False](Source(iterator, as_given), workers)
    stepping = threading.Thread(target=lambda: feed.take() or over.set(), daemon=True)
    stepping.start()
    assert entered.wait(10)
    feed.close("stalled")
    stepping.join(10)
    assert iterator.closed == 2


def test_nobody_rings_for_an_iterator_of_this_thread(workers):
    feed = FEEDS["sync"][False](Source(iter("a"), as_given), workers)
    feed.ring_by(pytest.fail)
    assert [feed.take(), feed.take()] == ["a", None]


def test_a_mailbox_that_ends_under_its_reader_is_the_end_and_no_error(workers):
    def steps():
        yield "a"
        raise GeneratorExit

    class Exiting:
        def __iter__(self):
            return self

        def __next__(self):
            raise GeneratorExit

    for steps_ in (steps(), Exiting()):
        feed = FEEDS["sync"][False](Source(steps_, as_given), workers)
        while feed.take() is not None:
            pass
        assert (feed.ended, feed.error) == ("finished", None)


@needs_loops
def test_a_sync_iterator_that_sends_nothing_ends_with_its_client_under_a_loop(taker):
    def steps():
        try:
            while True:
                turns.append(1)
                yield
        finally:
            ended.append(1)

    turns, ended = [], []
    mine = taker(Source(steps(), as_given), on_loop=True)
    mine.take()
    mine.settle(lambda: turns)
    mine.feed.close("client")
    mine.settle(lambda: ended)


@needs_loops
@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, KeyboardInterrupt])
def test_what_is_no_ordinary_error_ends_a_sync_iterator_under_a_loop_too(taker, error):
    class Raising:
        def __iter__(self):
            return self

        def __next__(self):
            raise error

    mine = taker(Source(Raising(), as_given), on_loop=True)
    assert mine.next() is None
    assert mine.feed.ended == ("finished" if error is GeneratorExit else "error")


@needs_loops
def test_a_thread_that_was_hired_in_vain_is_given_back_and_the_iterator_left_alone(workers):
    iterator = Closable()
    feed = FEEDS["sync"][True](Source(iterator, as_given), workers)
    assert len(workers._hired) == 1
    feed.leave()
    assert len(workers._hired) == 0
    assert iterator.closed == 0


# --- async iterators ------------------------------------------------------------------------------------------------


class Returned:
    """The steps of an `async def iterator()` that nobody has begun: Python warns of a coroutine never awaited."""

    def __init__(self):
        async def begin():
            begun.append(1)
            return "chunk"

        begun = self.begun = []
        self._coroutine = begin()

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await self._coroutine

    def close(self):
        self._coroutine.close()


@pytest.fixture
def busy_shared_loop():
    """Nothing runs in the shared loop until the event that this gives is set."""
    busy, free = threading.Event(), threading.Event()

    def hold():
        busy.set()
        assert free.wait(10)

    shared_loop().call_soon_threadsafe(hold)
    assert busy.wait(10)
    yield free
    free.set()


@needs_loops
@pytest.mark.parametrize("end", ["close", "drop"])
@pytest.mark.parametrize("asked", [False, True])
def test_an_end_before_the_task_has_begun_leaves_no_coroutine_un_awaited(workers, end, asked):
    async def main(iterator):
        feed = FEEDS["async"][True](Source(iterator, as_given), workers)
        if asked:
            assert feed.take() is None
        feed.close("client") if end == "close" else feed.drop()
        await soon(lambda: len(asyncio.all_tasks()) == 1)

    iterator = Returned()
    asyncio.run(main(iterator))
    if end == "close" or not asked:  # what is dropped may have begun a moment before
        assert iterator.begun == []
    del iterator
    gc.collect()


@needs_loops
def test_an_end_before_the_task_has_begun_leaves_no_coroutine_un_awaited_for_a_thread(workers, busy_shared_loop):
    iterator = Returned()
    feed = FEEDS["async"][False](Source(iterator, as_given), workers)
    assert feed.take() is None
    feed.close("client")
    busy_shared_loop.set()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), shared_loop()).result(10)
    assert iterator.begun == []
    del iterator, feed
    gc.collect()


@needs_loops
def test_a_question_that_comes_after_the_end_of_the_task_is_none_of_its_business(workers, caplog):
    feed = FEEDS["async"][False](Source(make("async", lambda: (value for value in "ab")), as_given), workers)
    until(feed.take)
    until(lambda: feed._next is not None)
    ask = feed._work
    feed._work = lambda: (feed.close("client"), ask())  # another thread closes it while it is asked
    assert feed.take() is None
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), shared_loop()).result(10)
    assert caplog.records == []


@needs_loops
def test_an_end_between_the_question_and_the_task_is_seen_by_the_task(workers):
    """Another thread closes a feed that has no loop yet, while it is being asked for the first time."""

    class Late(InTask):
        def _begin(self):
            self._loop, loop = None, self._loop
            self.close("client")
            self._loop = loop
            super()._begin()

    async def main():
        feed = Late(Source(iterator, as_given), workers)
        assert feed.take() is None
        await soon(feed._task.done)
        return feed.ended

    iterator = Returned()
    assert asyncio.run(main()) == "client"
    assert iterator.begun == []


@needs_loops
def test_the_end_of_the_loop_ends_the_iterator(workers):
    async def steps():
        try:
            yield "a"
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append(1)

    async def main(asked):
        feed = FEEDS["async"][True](Source(steps(), as_given), workers)
        if asked:
            await soon(feed.take)
        feed.take()
        await asyncio.sleep(0)
        return feed

    for asked in (False, True):
        ended = []
        feed = asyncio.run(main(asked))
        assert ended == [1]
        assert feed.ended == "client"
        feed.close("client")  # as Django may do later: harmless
        feed.drop()


@ASKED
@needs_loops
def test_an_iterator_that_swallows_its_cancellation_ends_after_its_step(taker, on_loop):
    async def steps():
        try:
            while True:
                entered.set()
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    yield "in spite of it"
        finally:
            ended.append(1)

    entered, ended = threading.Event(), []
    mine = taker(Source(steps(), as_given), on_loop=on_loop)
    mine.take()
    mine.settle(entered.is_set)
    mine.feed.close("client")
    mine.settle(lambda: ended)


@ASKED
@needs_loops
@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 nobody can tell who has cancelled a task")
def test_a_cancellation_of_the_iterators_own_making_is_its_error(taker, on_loop):
    async def steps():
        yield "a"
        task = asyncio.ensure_future(asyncio.sleep(3600))
        task.cancel()
        await task

    mine = taker(Source(steps(), as_given), on_loop=on_loop)
    assert mine.all() == ["a"]
    assert mine.feed.ended == "error"


@needs_loops
def test_an_exit_in_an_async_iterator_ends_a_loop_that_is_not_ours(workers):
    async def exits():
        raise SystemExit(3)
        yield

    async def main():
        kept.append(FEEDS["async"][True](Source(exits(), as_given), workers))
        kept[0].take()
        await asyncio.sleep(3600)

    kept = []
    with pytest.raises(SystemExit):
        asyncio.run(main())
    assert kept[0].ended == "error"
    assert isinstance(kept[0].error, SystemExit)


@needs_loops
def test_an_exit_of_one_async_iterator_leaves_the_shared_loop_to_the_others(taker):
    async def exits():
        yield "a"
        raise SystemExit

    async def steps():
        yield "b"

    mine = taker(Source(exits(), as_given), on_loop=False)
    assert mine.all() == ["a"]
    assert mine.feed.ended == "error"
    assert isinstance(mine.feed.error, SystemExit)
    assert taker(Source(steps(), as_given), on_loop=False).all() == ["b"]


@ASKED
@needs_loops
def test_an_async_iterator_without_aclose_may_be_closed(taker, on_loop):
    class Plain:
        def __aiter__(self):
            return self

        async def __anext__(self):
            return "chunk"

    mine = taker(Source(Plain(), as_given), on_loop=on_loop)
    assert mine.next() == "chunk"
    mine.feed.close("client")
    assert mine.next() is None


@needs_loops
@pytest.mark.parametrize("outside", [False, True])
def test_outside_of_djangos_handler_sync_code_has_a_thread_of_the_streams_own(workers, outside):
    async def steps():
        seen.append(SyncToAsync.thread_sensitive_context.get(None))
        yield "chunk"

    async def main():
        feed = FEEDS["async"][True](Source(steps(), as_given), workers)
        if outside:
            feed.go_outside()
        feed.take()
        await soon(lambda: seen)
        feed.close("client")
        await soon(feed._task.done)
        return SyncToAsync.thread_sensitive_context.get(None)

    seen = []
    around = asyncio.run(main())
    assert (seen[0] is not around) is outside


@ASKED
@needs_loops
def test_an_async_feed_has_nothing_to_give_back_to_another(taker, on_loop):
    mine = taker(Source(make("async", lambda: (value for value in "ab")), as_given), on_loop=on_loop)
    mine.feed.leave()
    assert mine.all() == ["a", "b"]


# --- the mailbox ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mail(taker, mailbox):
    def mail(*, on_loop, flush=as_given):
        return taker(Source(None, flush, mailbox=mailbox), on_loop=on_loop)

    return mail


@WAITING
def test_what_waits_leaves_in_one_chunk(run, mail, kind, on_loop):
    taker = mail(on_loop=on_loop)
    publish(run, "1", "2")
    assert taker.take() == "event: \ndata: 1\n\nevent: \ndata: 2\n\n"
    assert taker.take() is None
    assert (taker.feed.events, taker.feed.ended) == (2, None)


@WAITING
def test_a_mailbox_can_be_reached_through_its_feed(mail, mailbox, kind, on_loop):
    assert mail(on_loop=on_loop).feed.mailbox is mailbox


@WAITING
def test_a_chunk_takes_no_more_events_after_its_bound_in_bytes(run, mail, kind, on_loop):
    text = "x" * 1000
    taker = mail(on_loop=on_loop)
    publish(run, *[text] * 200)
    frame = len(f"event: \ndata: {text}\n\n")
    chunks = []
    while (chunk := taker.take()) is not None:
        chunks.append(chunk)
    assert sum(map(len, chunks)) == 200 * frame
    assert len(chunks) == 4
    assert all(CHUNK_BYTES <= len(chunk) < CHUNK_BYTES + frame for chunk in chunks[:-1])
    assert taker.feed.events == 200


@WAITING
def test_an_event_larger_than_the_bound_is_a_chunk(run, mail, kind, on_loop):
    taker = mail(on_loop=on_loop)
    publish(run, "x" * (CHUNK_BYTES + 1), "small")
    assert len(taker.take()) > CHUNK_BYTES
    assert taker.take() == "event: \ndata: small\n\n"


@WAITING
def test_what_is_published_meanwhile_rings(run, mail, mailbox, kind, on_loop):
    taker = mail(on_loop=on_loop)
    result = taker.in_background()
    until(lambda: mailbox.subscription.wake, what="the feed to wait")
    publish(run, "1")
    assert result() == "event: \ndata: 1\n\n"


@WAITING
@pytest.mark.parametrize("how", ["close", "end"])
def test_the_end_of_a_mailbox_comes_after_what_waits(run, mail, mailbox, kind, on_loop, how):
    taker = mail(on_loop=on_loop)
    publish(run, "1")
    getattr(taker.feed, how)("max_age")
    assert taker.feed.ended is None
    assert taker.take() == "event: \ndata: 1\n\n"
    assert taker.feed.ended is None
    assert taker.take() is None
    assert taker.feed.ended == mailbox.ended == "max_age"
    assert run.stats() == {"channels": 0, "subscriptions": 0}


def test_an_event_that_comes_with_the_end_is_taken(run, mailbox):
    """Between the look for events and whatever is looked at after it."""

    class Late:
        def __getattr__(self, name):
            return getattr(mailbox, name)

        def take_chunk(self, max_bytes):
            taken = mailbox.take_chunk(max_bytes)
            if not mailbox.ended:
                publish(run, "1")
                mailbox.close("shutdown")
            return taken

    feed = FEEDS["mailbox"][False](Source(None, as_given, mailbox=Late()), None)
    assert feed.take() is None
    assert feed.ended is None
    assert feed.take() == "event: \ndata: 1\n\n"
    assert feed.take() is None
    assert feed.ended == "shutdown"


@WAITING
def test_a_mailbox_is_told_whether_its_client_takes_what_it_is_sent(mail, mailbox, kind, on_loop):
    taker = mail(on_loop=on_loop)
    for slow in (True, False):
        taker.feed.mark(slow=slow)
        assert mailbox.subscription.slow is slow
    assert mailbox.subscription.prompt


@STEPPED
def test_steps_are_as_slow_as_their_client(stepped, kind, on_loop):
    """Nobody has to be told: none is taken before the last one has been sent."""
    taker = stepped(kind, lambda: (value for value in "ab"), on_loop=on_loop)
    taker.feed.mark(slow=True)
    assert taker.all() == ["a", "b"]


def test_a_mailbox_sees_to_itself_when_its_feed_is_dropped(run, mail, mailbox):
    taker = mail(on_loop=False)
    taker.feed.drop()
    taker.feed.leave()
    assert mailbox.ended is None
    publish(run, "1")
    assert taker.take() == "event: \ndata: 1\n\n"


# --- sources --------------------------------------------------------------------------------------------------------


class Both:
    """Can be iterated in both ways."""

    def __iter__(self):
        return iter(["sync"])

    async def __aiter__(self):
        yield "async"


@pytest.mark.parametrize(
    ("iterator", "in_thread", "on_loop"),
    [
        (None, "mailbox", "mailbox"),
        ([], "sync", "sync"),
        ((value for value in "a"), "sync", "sync"),
        (make("async", list), "async", "async"),
        (Both(), "sync", "async"),
    ],
)
def test_what_can_be_iterated_in_both_ways_takes_the_one_that_suits_who_asks(iterator, in_thread, on_loop):
    source = Source(iterator, as_given)
    assert source.kind(on_loop=False) == in_thread
    assert source.kind(on_loop=True) == on_loop


@ASKED
@pytest.mark.parametrize("iterable", [["a", "b"], ("a", "b"), {"a": 1, "b": 2}, "generator", "ab"])
def test_any_iterable_will_do(taker, iterable, on_loop):
    iterable = (value for value in "ab") if iterable == "generator" else iterable
    assert taker(Source(iterable, as_given), on_loop=on_loop).all() == ["a", "b"]


@pytest.mark.parametrize("text", [True, False])
def test_chunks_leave_as_text_or_as_bytes(text):
    source = Source(None, as_given)
    source.text = text
    for chunk in ("é", "é".encode()):
        assert source.out(chunk) == ("é" if text else "é".encode())
    assert source.with_rest(b"frame") == ("frame" if text else b"frame")


def test_a_single_event_leaves_as_the_very_bytes_that_all_clients_get():
    source = Source(None, lambda value: ())
    source.text = False
    frame = b"frame"
    assert source.with_rest(frame) is frame


def test_a_heartbeat_breaks_a_silence_and_takes_along_what_the_view_adds():
    assert Source(None, lambda value: ()).silence() == comment().decode()
    assert Source(None, lambda value: ("text", b"bytes")).silence() == comment().decode() + "textbytes"


def test_what_the_view_adds_goes_along_after_the_events():
    source = Source(None, lambda value: ("text", b"bytes"))
    assert source.with_rest(b"1") == "1textbytes"


class View:
    def __init__(self):
        self.sse = Sse(default_retry=1)
        self.sse.flush()


def buffered(iterator=None):
    """A source, and its view, which has a buffer."""
    view = View()
    source = Source(iterator, lambda value: flush_sse(view.sse), buffer=lambda: view.sse)
    source.text = False
    return source, view


def test_a_source_lets_go_of_its_view_where_it_needs_the_buffer_alone():
    source, view = buffered()
    buffer, view = view.sse, weakref.ref(view)
    source.detach()
    gc.collect()
    assert view() is None
    buffer.add_comment("added")
    assert source.with_rest(b"frame") == b"frame: added\n\n"
    source.detach()


def test_a_source_keeps_its_view_where_an_iterator_may_still_look_at_it():
    source, view = buffered(iter(()))
    source.detach()
    view.sse = Sse(default_retry=2)
    assert list(source.flush(None)) == ["retry: 2\n\n"]
    Source(None, as_given).detach()


def test_the_heartbeat_of_all_that_are_idle_is_the_same_bytes():
    source, view = buffered()
    assert source.silence() == comment()
    source.detach()
    assert source.silence() is HEARTBEAT
    view.sse.add_comment("added")
    assert source.silence() == comment() + b": added\n\n"
    assert source.silence() is HEARTBEAT
    source.text = True
    assert source.silence() == comment().decode()


def test_a_source_lets_go_of_a_buffer_that_nobody_else_has():
    source, view = buffered()
    buffer = weakref.ref(view.sse)
    source.detach()
    source.let_go()
    assert source.detached is view.sse
    del view
    source.let_go()
    assert (source.detached, buffer()) == (None, None)
    assert source.is_detached
    source.let_go()
    assert source.silence() is HEARTBEAT
    source.text = True
    assert source.silence() == comment().decode()


def test_a_source_keeps_a_buffer_that_somebody_else_may_fill():
    source, view = buffered()
    buffer = view.sse
    source.detach()
    del view
    source.let_go()
    assert source.silence() is HEARTBEAT
    buffer.add_comment("added")
    assert source.silence() == comment() + b": added\n\n"


def test_a_source_keeps_a_buffer_that_is_not_empty():
    source, view = buffered()
    view.sse.add_comment("added")
    source.detach()
    del view
    source.let_go()
    assert source.silence() == comment() + b": added\n\n"
    assert source.silence() is HEARTBEAT
    source.let_go()
    assert source.detached is None


def test_a_source_that_keeps_its_view_lets_go_of_nothing():
    source, view = buffered(iter(()))
    source.detach()
    source.let_go()
    view.sse.add_comment("added")
    assert list(source.flush(None)) == [": added\n\n"]


@pytest.mark.parametrize("held", [True, False])
def test_events_go_on_without_the_buffer_that_was_let_go_of_and_with_the_one_that_was_not(run, workers, mailbox, held):
    source, view = buffered()
    source.mailbox = mailbox
    feed = FEEDS["mailbox"][False](source, workers)
    buffer = view.sse
    source.detach()
    del view
    if not held:
        del buffer
    source.let_go()
    publish(run, "1")
    assert feed.take() == b"event: \ndata: 1\n\n"
    if held:
        buffer.add_comment("added")
    publish(run, "2", "3")
    assert feed.take() == b"event: \ndata: 2\n\nevent: \ndata: 3\n\n" + (b": added\n\n" if held else b"")
    assert feed.take() is None


def test_a_source_closes_an_iterator_that_nobody_has_begun():
    iterator = Closable()
    Source(iterator, as_given).discard()
    assert iterator.closed == 1
    Source([], as_given).discard()
    Source(None, as_given).discard()


def test_a_source_has_mailboxes_of_its_own_unless_it_is_given_some():
    given = Mailboxes()
    assert Source(None, as_given, mailboxes=given).mailboxes is given
    assert Source(None, as_given).mailboxes is not Source(None, as_given).mailboxes


# --- the buffer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_buffer", [Sse, sse.Sse])
def test_flushing_a_buffer_gives_one_chunk_and_empties_it(make_buffer):
    buffer = make_buffer(default_retry=1)
    buffer.add_message("a", "1")
    assert list(flush_sse(buffer)) == ["retry: 1\n\nevent: a\ndata: 1\n\n"]
    buffer.flush()
    assert list(flush_sse(buffer)) == []


@pytest.mark.parametrize("base", [Sse, sse.Sse])
def test_a_buffer_with_an_iteration_of_its_own_is_asked_for_its_chunks(base):
    class Own(base):
        def __iter__(self):
            yield "one"
            yield "two"

    assert has_own_iter(Own())
    assert not has_own_iter(base())
    assert list(flush_sse(Own())) == ["one", "two"]
