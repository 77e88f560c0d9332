"""The table FEEDS: what iterator() gives x how the server asks, each cell by itself."""

import asyncio
import contextvars
import gc
import threading

import pytest
import sse

from django_sse import streams
from django_sse.brokers.memory import MemoryBroker
from django_sse.event import Event, encode_payload
from django_sse.exceptions import BrokerUnavailable
from django_sse.inbox import Mailboxes
from django_sse.runtime import Runtime
from django_sse.feeds import FEEDS, Source, flush_sse, has_own_iter
from django_sse.streams import Stream
from django_sse.wire import Sse
from django_sse.workers import Workers, in_worker
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until


def cell(kind, *, on_loop):
    return pytest.param(
        kind,
        on_loop,
        id=f"{kind}-{'loop' if on_loop else 'thread'}",
        marks=[needs_loops] if on_loop or kind == "async" else [],
    )


#: The cells whose steps are a user's code.
STEPPED = pytest.mark.parametrize(
    ("kind", "on_loop"), [cell(kind, on_loop=on_loop) for kind in ("sync", "async") for on_loop in (False, True)]
)
#: The cells that wait for a mailbox.
WAITING = pytest.mark.parametrize(("kind", "on_loop"), [cell("mailbox", on_loop=on_loop) for on_loop in (False, True)])


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
    return run.open(["a"], max_events=256, max_bytes=1000)


def publish(run, *texts):
    for text in texts:
        run.broker.publish("a", encode_payload("", text))


def as_given(value):
    return () if value is None else (value,)


def make(kind, steps):
    """The iterator of a kind that runs the plain generator function `steps`."""
    if kind == "sync":
        return steps()

    async def asynchronous():
        generator = steps()
        try:
            for value in generator:
                yield value
        finally:
            generator.close()

    return asynchronous()


class Reader:
    """Asks a stream for its chunks as a server does, and whatever is asked of it returns in time."""

    def __init__(self, stream, *, on_loop):
        self.stream = stream
        self.on_loop = on_loop
        self._loop = asyncio.new_event_loop() if on_loop else None
        self._iterator = aiter(stream) if on_loop else iter(stream)

    def next(self):
        """The next chunk, or None at the end."""
        if self.on_loop:
            return self._loop.run_until_complete(asyncio.wait_for(self._next(), 10))
        return next(self._iterator, None)

    async def _next(self):
        return await anext(self._iterator, None)

    def begin(self):
        """Ask for the next chunk and do not wait for it; call the result to get it."""
        got = []

        def ask():
            try:
                got.append(self.next())
            except BaseException as error:  # noqa: BLE001  (the test asks for it)
                got.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()

        def result():
            thread.join(10)
            assert got, "nothing came"
            return got[0]

        return result

    def all(self):
        chunks = []
        while (chunk := self.next()) is not None:
            chunks.append(chunk)
        return chunks

    def settle(self, predicate):
        """Wait until `predicate()` holds, running the loop meanwhile."""

        def look():
            if self._loop is not None:
                self._loop.run_until_complete(asyncio.sleep(0.001))
            return predicate()

        until(look, what=predicate)

    def close(self):
        self.stream.close()
        if self._loop is not None:
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


@pytest.fixture
def read():
    """A function that returns the `Reader` of a stream."""
    readers, before = [], set(threading.enumerate())

    def read(stream, *, on_loop):
        readers.append(Reader(stream, on_loop=on_loop))
        return readers[-1]

    yield read
    for reader in readers:
        reader.close()
    started = set(threading.enumerate()) - before
    mine = [thread for thread in started if thread.name.startswith("django-sse-stream")]
    until(lambda: not any(thread.is_alive() for thread in mine), what="the end of the threads")


@pytest.fixture
def open_stream(workers, read):
    """A function that returns the reader of a stream of steps."""

    def open_stream(kind, steps, *, on_loop, flush=as_given, **source):
        return read(Stream(Source(make(kind, steps), flush, **source), workers, on_loop=on_loop), on_loop=on_loop)

    return open_stream


# --- every cell of user code ----------------------------------------------------------------------------------------


def test_the_table_has_a_driver_for_each_kind_and_each_server():
    assert set(FEEDS) == {"sync", "async", "mailbox"}
    assert all(len(row) == 2 for row in FEEDS.values())


@STEPPED
def test_each_step_is_a_chunk_and_the_end_is_the_end(open_stream, kind, on_loop):
    reader = open_stream(kind, lambda: iter(["a", "b", "c"]), on_loop=on_loop) if kind == "sync" else None
    reader = reader or open_stream(kind, lambda: (value for value in "abc"), on_loop=on_loop)
    assert reader.all() == ["a", "b", "c"]
    assert reader.next() is None


@STEPPED
def test_nothing_is_stepped_before_it_is_asked_for(open_stream, kind, on_loop):
    taken = []

    def steps():
        for number in range(5):
            taken.append(number)
            yield str(number)

    reader = open_stream(kind, steps, on_loop=on_loop)
    assert taken == []
    assert reader.next() == "0"
    assert taken == [0]
    assert reader.next() == "1"
    assert taken == [0, 1]


@STEPPED
def test_the_first_chunks_leave_before_the_first_step(open_stream, kind, on_loop):
    def steps():
        stepped.append(1)
        yield "step"

    stepped = []
    reader = open_stream(kind, steps, on_loop=on_loop, first=["first", "second"])
    assert [reader.next(), reader.next()] == ["first", "second"]
    assert stepped == []
    assert reader.all() == ["step"]


@STEPPED
def test_a_step_without_a_chunk_is_followed_by_the_next_and_one_with_several_by_all_of_them(open_stream, kind, on_loop):
    chunks = {0: (), 1: ("a", "", "b"), 2: ("",), 3: ("c",), None: ("after the end",)}
    reader = open_stream(kind, lambda: (n for n in range(4)), on_loop=on_loop, flush=lambda value: chunks[value])
    assert reader.all() == ["a", "b", "c", "after the end"]


@STEPPED
def test_steps_happen_one_after_the_other_in_one_thread(open_stream, kind, on_loop):
    def steps():
        for _ in range(5):
            idents.add(threading.get_ident())
            yield "chunk"
        idents.add(threading.get_ident())

    idents = set()
    assert len(open_stream(kind, steps, on_loop=on_loop).all()) == 5
    assert len(idents) == 1
    same = (kind == "sync") is not on_loop  # the cells that need no thread of ours
    assert (idents == {threading.get_ident()}) is same


@STEPPED
def test_the_iterator_sees_the_context_of_its_request(workers, read, kind, on_loop):
    variable = contextvars.ContextVar("variable", default="nothing")

    def steps():
        yield variable.get()

    def request():
        variable.set("the request's")
        return Stream(Source(make(kind, steps), as_given), workers, on_loop=on_loop)

    if kind == "sync" and on_loop:  # hired in the request, iterated by the server
        stream = contextvars.copy_context().run(request)
        assert read(stream, on_loop=on_loop).all() == ["the request's"]
    else:
        variable.set("the request's")
        assert read(request(), on_loop=on_loop).all() == ["the request's"]


@STEPPED
def test_an_error_of_the_iterator_reaches_whoever_asks(open_stream, kind, on_loop):
    def steps():
        yield "good"
        raise ValueError("mine")

    reader = open_stream(kind, steps, on_loop=on_loop)
    assert reader.next() == "good"
    with pytest.raises(ValueError, match="mine"):
        reader.next()


@STEPPED
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_close_runs_the_finally_of_a_stream_that_has_begun(open_stream, kind, on_loop, asked):
    def steps():
        begun.append(1)
        try:
            while True:
                yield "chunk"
        finally:
            ended.append(threading.get_ident())

    begun, ended = [], []
    reader = open_stream(kind, steps, on_loop=on_loop)
    for _ in range(asked):
        reader.next()
    reader.stream.close()
    reader.stream.close()
    reader.settle(lambda: len(ended) == bool(asked))
    assert len(begun) == bool(asked)
    assert reader.next() is None
    assert len(ended) == bool(asked)


@STEPPED
def test_a_close_in_the_middle_of_a_step_ends_the_stream_after_it_and_runs_its_finally(open_stream, kind, on_loop):
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
    reader = open_stream(kind, steps, on_loop=on_loop)
    assert reader.next() == "first"
    result = reader.begin()
    assert entered.wait(10)
    reader.stream.close()
    go_on.set()
    assert result() in ("second", None)
    assert reader.next() is None
    reader.settle(lambda: ended)


@STEPPED
def test_a_dropped_stream_runs_its_finally(workers, read, kind, on_loop):
    def steps():
        try:
            while True:
                yield "chunk"
        finally:
            ended.append(1)

    ended = []
    reader = read(Stream(Source(make(kind, steps), as_given), workers, on_loop=on_loop), on_loop=on_loop)
    reader.next()
    reader.stream = reader._iterator = Stream(Source((), as_given), workers, on_loop=False)
    gc.collect()
    reader.settle(lambda: ended)


@STEPPED
def test_an_error_in_the_finally_does_not_hang_the_close(open_stream, kind, on_loop, caplog, monkeypatch):
    def steps():
        try:
            yield "chunk"
        finally:
            ended.append(1)
            raise ValueError("in finally")

    ended = []
    reader = open_stream(kind, steps, on_loop=on_loop)
    reader.next()
    if (kind, on_loop) == ("sync", False):
        with pytest.raises(ValueError, match="in finally"):
            reader.stream.close()
        return
    complaints = []
    if reader._loop is not None:
        reader._loop.set_exception_handler(lambda loop, context: complaints.append(context))
    reader.stream.close()
    reader.settle(lambda: ended)
    assert reader.next() is None


# --- text and bytes, quiet and loud ---------------------------------------------------------------------------------


@STEPPED
def test_chunks_leave_as_text_for_code_and_as_bytes_for_the_server(workers, read, kind, on_loop):
    def steps():
        yield "é"
        yield "é".encode()

    for_code = Stream(Source(make(kind, steps), as_given, first=["ä", "ä".encode()]), workers, on_loop=on_loop)
    assert read(for_code, on_loop=on_loop).all() == ["ä", "ä", "é", "é"]
    for_server = Stream(Source(make(kind, steps), as_given, first=["ä", "ä".encode()]), workers, on_loop=on_loop)
    assert read(for_server.for_server(), on_loop=on_loop).all() == [chunk.encode() for chunk in "ääéé"]


@STEPPED
def test_a_broker_that_is_away_ends_the_stream_for_the_server_and_is_an_error_for_code(workers, read, kind, on_loop):
    def steps():
        yield "first"
        raise BrokerUnavailable("away")

    stream = Stream(Source(make(kind, steps), as_given), workers, on_loop=on_loop)
    assert read(stream.for_server(), on_loop=on_loop).all() == [b"first"]
    reader = read(Stream(Source(make(kind, steps), as_given), workers, on_loop=on_loop), on_loop=on_loop)
    assert reader.next() == "first"
    with pytest.raises(BrokerUnavailable, match="away"):
        reader.next()


# --- the mailbox ----------------------------------------------------------------------------------------------------


@pytest.fixture
def open_mailbox(workers, read, mailbox):
    def open_mailbox(*, on_loop, flush=as_given, **options):
        source = Source(None, flush, mailbox=mailbox, mailboxes=opened(mailbox), **options)
        return read(Stream(source, workers, on_loop=on_loop), on_loop=on_loop)

    return open_mailbox


def opened(*mailboxes):
    """What a view has subscribed to for a stream."""
    all_of_them = Mailboxes()
    for mailbox in mailboxes:
        all_of_them.add(mailbox)
    return all_of_them


@WAITING
def test_what_waits_leaves_in_one_chunk(run, open_mailbox, kind, on_loop):
    reader = open_mailbox(on_loop=on_loop, first=["first"])
    assert reader.next() == "first"
    publish(run, "1", "2")
    assert reader.next() == "event: \ndata: 1\n\nevent: \ndata: 2\n\n"


@WAITING
def test_what_is_published_meanwhile_wakes_the_stream(run, open_mailbox, mailbox, kind, on_loop):
    reader = open_mailbox(on_loop=on_loop)
    result = reader.begin()
    until(lambda: mailbox.subscription.wake, what="the stream to wait")
    publish(run, "1")
    assert result() == "event: \ndata: 1\n\n"


@WAITING
def test_silence_is_broken_by_heartbeats(open_mailbox, kind, on_loop):
    reader = open_mailbox(on_loop=on_loop, heartbeat=0.01)
    assert [reader.next() for _ in range(3)] == [":\n\n"] * 3


@WAITING
def test_every_client_of_the_server_gets_the_same_bytes(run, workers, read, kind, on_loop):
    mailboxes = [run.open(["a"], max_events=9, max_bytes=999) for _ in range(2)]
    sources = [Source(None, as_given, mailbox=mailbox) for mailbox in mailboxes]
    readers = [read(Stream(source, workers, on_loop=on_loop).for_server(), on_loop=on_loop) for source in sources]
    publish(run, "1")
    first, second = (reader.next() for reader in readers)
    assert first == b"event: \ndata: 1\n\n"
    assert first is second


@WAITING
def test_what_the_view_adds_meanwhile_goes_along(run, open_mailbox, kind, on_loop):
    extra = [["text"], [b"bytes"], []]
    reader = open_mailbox(on_loop=on_loop, flush=lambda value: extra.pop(0))
    for expected in ("1\n\ntext", "2\n\nbytes", "3\n\n"):
        publish(run, expected[0])
        assert reader.next() == f"event: \ndata: {expected}"


@WAITING
def test_close_gives_the_mailbox_back_and_ends_whoever_waits(run, open_mailbox, mailbox, kind, on_loop):
    reader = open_mailbox(on_loop=on_loop)
    result = reader.begin()
    until(lambda: mailbox.subscription.wake, what="the stream to wait")
    reader.stream.close()
    assert result() is None
    assert mailbox.ended == "client"
    assert run.stats() == {"channels": 0, "subscriptions": 0}


@WAITING
def test_a_stream_that_was_never_asked_gives_its_mailbox_back(run, workers, mailbox, kind, on_loop):
    source = Source(None, as_given, mailbox=mailbox, mailboxes=opened(mailbox))
    Stream(source, workers, on_loop=on_loop).close()
    assert run.stats() == {"channels": 0, "subscriptions": 0}


@WAITING
def test_an_overflow_ends_the_stream_once_what_waited_is_sent(run, open_mailbox, kind, on_loop):
    reader = open_mailbox(on_loop=on_loop)
    publish(run, "x" * 600, "y" * 600)
    assert "x" * 600 in reader.next()
    assert reader.next() is None


@STEPPED
def test_every_mailbox_that_was_opened_for_a_stream_ends_with_it(run, open_stream, mailbox, kind, on_loop):
    mailboxes = opened(mailbox)
    reader = open_stream(kind, lambda: (value for value in "ab"), on_loop=on_loop, mailboxes=mailboxes)
    reader.next()
    second = run.open(["b"], max_events=9, max_bytes=999)
    mailboxes.add(second)
    reader.stream.close()
    assert [mailbox.ended, second.ended] == ["client", "client"]
    late = run.open(["c"], max_events=9, max_bytes=999)
    mailboxes.add(late)
    assert late.ended == "client"
    assert run.stats() == {"channels": 0, "subscriptions": 0}


# --- who may iterate ------------------------------------------------------------------------------------------------


class Both:
    """Can be iterated in both ways, and says which one was taken."""

    def __iter__(self):
        return iter(["sync"])

    async def __aiter__(self):
        yield "async"


@pytest.mark.parametrize("on_loop", [False, pytest.param(True, marks=needs_loops)])
def test_what_can_be_iterated_in_both_ways_takes_the_one_that_suits_the_server(workers, read, on_loop):
    stream = Stream(Source(Both(), as_given), workers, on_loop=on_loop)
    assert read(stream, on_loop=on_loop).all() == ["async" if on_loop else "sync"]


@pytest.mark.parametrize("iterable", [["a", "b"], ("a", "b"), {"a": 1, "b": 2}, iter(["a", "b"]), "ab"])
@pytest.mark.parametrize("on_loop", [False, pytest.param(True, marks=needs_loops)])
def test_any_iterable_will_do(workers, read, iterable, on_loop):
    iterable = iterable if not hasattr(iterable, "__next__") else iter(["a", "b"])
    assert read(Stream(Source(iterable, as_given), workers, on_loop=on_loop), on_loop=on_loop).all() == ["a", "b"]


def test_a_stream_for_a_loop_refuses_a_plain_for(workers):
    stream = Stream(Source(iter("ab"), as_given), workers, on_loop=True)
    with pytest.raises(TypeError, match="async for"):
        iter(stream)
    stream.close()


@needs_loops
def test_code_in_a_worker_may_loop_over_a_stream_for_a_loop(workers, read):
    """An `_iterator()` of old, `for chunk in super()._iterator()`, runs in the thread that is hired for it."""

    def steps():
        assert in_worker()
        inner = Stream(Source(iter("ab"), as_given), workers, on_loop=True)
        for chunk in inner:
            yield chunk + "!"
        inner.close()

    assert read(Stream(Source(steps(), as_given), workers, on_loop=True), on_loop=True).all() == ["a!", "b!"]


@needs_loops
def test_a_thread_hired_in_vain_is_given_back(workers, read):
    inner = Stream(Source(iter("ab"), as_given), workers, on_loop=True)

    def steps():
        yield from inner

    assert len(workers._hired) == 1
    reader = read(Stream(Source(steps(), as_given), workers, on_loop=True), on_loop=True)
    assert len(workers._hired) == 2
    assert reader.next() == "a"
    assert len(workers._hired) == 1
    assert reader.all() == ["b"]


@STEPPED
def test_asking_for_the_iterator_again_goes_on_where_it_was(open_stream, kind, on_loop):
    reader = open_stream(kind, lambda: (value for value in "abc"), on_loop=on_loop)
    assert reader.next() == "a"
    reader._iterator = aiter(reader.stream) if on_loop else iter(reader.stream)
    assert reader.all() == ["b", "c"]


# --- places ---------------------------------------------------------------------------------------------------------


@needs_loops
@pytest.mark.parametrize("end", ["close", "drop", "finish"])
def test_the_place_of_a_stream_is_given_back_at_its_end(workers, read, end):
    def steps():
        yield "a"
        yield "b"

    for _ in range(6):  # more than there are places
        reader = read(Stream(Source(steps(), as_given), workers, on_loop=True), on_loop=True)
        assert reader.next() == "a"
        if end == "close":
            reader.stream.close()
        elif end == "drop":
            reader.stream = reader._iterator = Stream(Source((), as_given), workers, on_loop=False)
        else:
            assert reader.all() == ["b"]
            reader.stream.close()  # as Django does after the last chunk
        gc.collect()
        until(lambda: not len(workers._hired), what="a place")


@needs_loops
def test_a_cancelled_step_is_closed_when_it_is_over(workers):
    entered, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def steps():
        try:
            entered.set()
            assert go_on.wait(10)
            yield "late"
        finally:
            ended.set()

    async def main():
        stream = Stream(Source(steps(), as_given), workers, on_loop=True)
        task = asyncio.ensure_future(anext(aiter(stream)))
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream.close()
        assert not ended.is_set()
        go_on.set()
        assert await asyncio.to_thread(ended.wait, 10)

    asyncio.run(main())


@needs_loops
def test_a_cancelled_await_runs_the_finally_of_an_async_iterator(workers):
    async def steps():
        try:
            entered.set()
            await asyncio.sleep(3600)
            yield "never"
        finally:
            await asyncio.sleep(0)
            ended.append(1)

    ended = []
    entered = asyncio.Event()

    async def main():
        stream = Stream(Source(steps(), as_given), workers, on_loop=True)
        task = asyncio.ensure_future(anext(aiter(stream)))
        await entered.wait()
        task.cancel()
        stream.close()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [1]

    asyncio.run(main())


@needs_loops
def test_closing_after_the_end_of_the_loop_is_harmless(workers):
    async def steps():
        yield "a"

    async def main():
        stream = Stream(Source(steps(), as_given), workers, on_loop=True)
        await anext(aiter(stream))
        return stream

    asyncio.run(main()).close()


@needs_loops
def test_an_async_iterator_without_aclose_may_be_closed(workers, read):
    class Plain:
        def __aiter__(self):
            return self

        async def __anext__(self):
            return "chunk"

    reader = read(Stream(Source(Plain(), as_given), workers, on_loop=True), on_loop=True)
    assert reader.next() == "chunk"
    reader.stream.close()
    assert reader.next() is None


def test_an_iterator_that_refuses_to_close_for_a_reason_of_its_own_says_so(workers):
    class Refusing:
        def __iter__(self):
            return self

        def __next__(self):
            return "chunk"

        def close(self):
            raise ValueError("mine")

    stream = Stream(Source(Refusing(), as_given), workers, on_loop=False)
    next(iter(stream))
    with pytest.raises(ValueError, match="mine"):
        stream.close()


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


def test_a_heartbeat_is_what_stands_for_no_event():
    source = Source(None, lambda value: (), heartbeat=1)
    assert source.frames([]) == streams._HEARTBEAT.decode()
    assert source.frames([(Event("", "a"), b"frame")]) == "frame"


# --- found in review ------------------------------------------------------------------------------------------------


@needs_loops
def test_a_sync_iterator_that_sends_nothing_ends_with_its_client_under_a_loop():
    def steps():
        try:
            while True:
                turns.append(1)
                yield
        finally:
            ended.append(1)

    async def main():
        stream = Stream(Source(steps(), lambda value: ()), workers, on_loop=True)
        task = asyncio.create_task(anext(aiter(stream)))
        await soon(lambda: turns)
        task.cancel()
        stream.close()
        await soon(lambda: ended)

    turns, ended = [], []
    workers = Workers(limit=lambda: 1, at_exit=lambda: None)
    asyncio.run(main())


@needs_loops
def test_all_steps_of_an_async_iterator_run_in_one_task_under_a_server_of_threads():
    async def steps():
        for _ in range(3):
            tasks.append(asyncio.current_task())
            yield "chunk"

    tasks = []
    workers = Workers(limit=lambda: 1, at_exit=lambda: None)
    stream = Stream(Source(steps(), lambda value: [value] if value else ()), workers, on_loop=False)
    assert list(stream) == ["chunk"] * 3
    assert len(set(tasks)) == 1
    stream.close()
