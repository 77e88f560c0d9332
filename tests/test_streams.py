"""Streams: what they send in which order, how they break a silence, how each of them ends, and what they tell of it."""

import asyncio
import gc
import logging
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.utils.asyncio import async_unsafe

from django_sse import feeds, streams
from django_sse.brokers.memory import MemoryBroker
from django_sse.event import encode_payload
from django_sse.exceptions import BrokerUnavailable
from django_sse.feeds import LATE, Source, flush_sse
from django_sse.inbox import Mailboxes
from django_sse.registry import Account, Registry, StreamInfo, open_streams
from django_sse.runtime import Runtime
from django_sse.signals import stream_closed, stream_opened
from django_sse.streams import JITTER, Stream
from django_sse.wire import Sse
from django_sse.workers import Workers, in_worker
from tests.helpers.cells import ASKED, BESIDE, STEPPED, WAITING, as_given, cells, make
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until

#: Every cell.
ALL = cells(*((kind, on_loop) for kind in ("sync", "async", "mailbox") for on_loop in (False, True)))
#: The cells that can be waited beside.
SILENT = cells(("sync", True), ("async", False), ("async", True), ("mailbox", False), ("mailbox", True))
HEARTBEAT = ":\n\n"


class View:
    """Stands for the view class in what is told of a stream."""


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


def opened(*mailboxes):
    """What a view has subscribed to for a stream."""
    all_of_them = Mailboxes()
    for mailbox in mailboxes:
        all_of_them.add(mailbox)
    return all_of_them


def make_account():
    return Account(StreamInfo(View, "/path", ("a",)))


class Reader:
    """Asks a stream for its chunks as a server does, and whatever is asked of it returns in time."""

    def __init__(self, stream, *, on_loop):
        self.stream = stream
        self.on_loop = on_loop
        self._loop = asyncio.new_event_loop() if on_loop else None
        self._iterator = self.call(lambda: aiter(stream) if on_loop else iter(stream))

    def call(self, function):
        """Call `function` where the server runs."""
        if self._loop is None:
            return function()

        async def call():
            return function()

        return self._loop.run_until_complete(call())

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
            waiting = asyncio.all_tasks(self._loop)
            self._loop.run_until_complete(asyncio.wait(waiting, timeout=10) if waiting else asyncio.sleep(0))
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


LIMITS = {"account", "max_age", "stall_timeout"}


@pytest.fixture
def open_stream(workers, read, mailbox):
    """A function that returns the reader of a stream, of `steps` or of the mailbox."""

    def open_stream(kind, steps=None, *, on_loop, flush=as_given, server=False, **options):
        limits = {name: options.pop(name) for name in LIMITS & set(options)}
        if kind == "mailbox":
            source = Source(None, flush, mailbox=mailbox, mailboxes=opened(mailbox), **options)
        else:
            source = Source(make(kind, steps) if callable(steps) else steps, flush, **options)
        stream = Stream(source, workers, on_loop=on_loop, **limits)
        return read(stream.for_server() if server else stream, on_loop=on_loop)

    return open_stream


class Silence:
    """An iterator that sends nothing until it is told to, and knows whether somebody has cancelled it."""

    def __init__(self, kind):
        self.entered, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.cancelled = False
        self.steps = self._sync() if kind == "sync" else self._async()

    def _sync(self):
        try:
            self.entered.set()
            assert self.go_on.wait(10)
            yield "event"
        finally:
            self.ended.set()

    async def _async(self):
        try:
            self.entered.set()
            await soon(self.go_on.is_set)
            yield "event"
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.ended.set()


@pytest.fixture
def clock(monkeypatch):
    """The clock of `streams`, which stands still until it is moved."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def endless():
    while True:
        yield "chunk"


# --- order ----------------------------------------------------------------------------------------------------------


@STEPPED
def test_each_step_is_a_chunk_and_the_end_is_the_end(open_stream, kind, on_loop):
    reader = open_stream(kind, lambda: (value for value in "abc"), on_loop=on_loop)
    assert reader.all() == ["a", "b", "c"]
    assert reader.next() is None
    assert reader.stream.over


@STEPPED
def test_the_first_chunks_leave_before_the_first_step(open_stream, kind, on_loop):
    def steps():
        stepped.append(1)
        yield "step"

    stepped = []
    reader = open_stream(kind, steps, on_loop=on_loop, first=["first", "", "second"])
    assert [reader.next(), reader.next()] == ["first", "second"]
    assert stepped == []
    assert reader.all() == ["step"]


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


@STEPPED
def test_asking_for_the_iterator_again_goes_on_where_it_was(open_stream, kind, on_loop):
    reader = open_stream(kind, lambda: (value for value in "abc"), on_loop=on_loop)
    assert reader.next() == "a"
    reader._iterator = reader.call(lambda: aiter(reader.stream) if on_loop else iter(reader.stream))
    assert reader.all() == ["b", "c"]


@WAITING
def test_what_waits_leaves_in_one_chunk_after_the_first(run, open_stream, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop, first=["first"])
    assert reader.next() == "first"
    publish(run, "1", "2")
    assert reader.next() == "event: \ndata: 1\n\nevent: \ndata: 2\n\n"


@WAITING
def test_what_is_published_meanwhile_wakes_the_stream(run, open_stream, mailbox, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop)
    result = reader.begin()
    until(lambda: mailbox.subscription.wake, what="the stream to wait")
    publish(run, "1")
    assert result() == "event: \ndata: 1\n\n"


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
def test_what_the_view_adds_meanwhile_goes_along(run, open_stream, kind, on_loop):
    extra = [["text"], [b"bytes"], []]
    reader = open_stream(kind, on_loop=on_loop, flush=lambda value: extra.pop(0))
    for expected in ("1\n\ntext", "2\n\nbytes", "3\n\n"):
        publish(run, expected[0])
        assert reader.next() == f"event: \ndata: {expected}"


@WAITING
def test_a_chunk_is_bounded_in_bytes(run, open_stream, monkeypatch, kind, on_loop):
    monkeypatch.setattr(feeds, "CHUNK_BYTES", 100)
    reader = open_stream(kind, on_loop=on_loop)
    publish(run, *["x" * 90] * 3)
    assert [reader.next() for _ in range(3)] == [f"event: \ndata: {'x' * 90}\n\n"] * 3


@WAITING
def test_an_overflow_ends_the_stream_once_what_waited_is_sent(run, open_stream, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop)
    publish(run, "x" * 600, "y" * 600)
    assert "x" * 600 in reader.next()
    assert reader.next() is None


# --- for code and for the server ------------------------------------------------------------------------------------


@STEPPED
def test_chunks_leave_as_text_for_code_and_as_bytes_for_the_server(open_stream, kind, on_loop):
    def steps():
        yield "é"
        yield "é".encode()

    for_code = open_stream(kind, steps, on_loop=on_loop, first=["ä", "ä".encode()])
    assert for_code.all() == ["ä", "ä", "é", "é"]
    for_server = open_stream(kind, steps, on_loop=on_loop, first=["ä", "ä".encode()], server=True)
    assert for_server.all() == [chunk.encode() for chunk in "ääéé"]


@STEPPED
@pytest.mark.parametrize("error", [ValueError("mine"), BrokerUnavailable("away")])
def test_an_error_of_the_iterator_is_raised_to_code_and_the_end_for_the_server(open_stream, kind, on_loop, error):
    def steps():
        yield "good"
        raise error

    reader = open_stream(kind, steps, on_loop=on_loop)
    assert reader.next() == "good"
    with pytest.raises(type(error), match=str(error)):
        reader.next()
    assert reader.next() is None
    assert open_stream(kind, steps, on_loop=on_loop, server=True).all() == [b"good"]


@STEPPED
def test_a_type_error_is_told_to_code_in_a_loop_as_what_django_does_not_take_for_its_own(open_stream, kind, on_loop):
    """Django would iterate once more, as if the stream were not async, and warn of that instead."""

    def steps():
        yield "good"
        len(5)

    reader = open_stream(kind, steps, on_loop=on_loop)
    assert reader.next() == "good"
    with pytest.raises(RuntimeError if on_loop else TypeError, match="object of type 'int' has no len") as caught:
        reader.next()
    if on_loop:
        assert str(caught.value).startswith("The iterator of a stream raised TypeError: ")
        assert isinstance(caught.value.__cause__, TypeError)


# --- who may iterate ------------------------------------------------------------------------------------------------


class Both:
    """Can be iterated in both ways, and says which one was taken."""

    def __iter__(self):
        return iter(["sync"])

    async def __aiter__(self):
        yield "async"


@ASKED
def test_what_can_be_iterated_in_both_ways_takes_the_one_that_suits_the_server(workers, read, on_loop):
    stream = Stream(Source(Both(), as_given), workers, on_loop=on_loop)
    assert read(stream, on_loop=on_loop).all() == ["async" if on_loop else "sync"]


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


# --- silence --------------------------------------------------------------------------------------------------------


@WAITING
def test_silence_is_broken_by_heartbeats(open_stream, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop, heartbeat=0.01)
    assert [reader.next() for _ in range(3)] == [HEARTBEAT] * 3


@BESIDE
def test_heartbeats_break_the_silence_of_an_iterator_and_never_cancel_it(open_stream, kind, on_loop):
    silence = Silence(kind)
    reader = open_stream(kind, silence.steps, on_loop=on_loop, heartbeat=0.01)
    assert [reader.next() for _ in range(5)] == [HEARTBEAT] * 5
    assert not silence.ended.is_set()
    silence.go_on.set()
    chunks = reader.all()
    assert chunks[-1] == "event"
    assert set(chunks[:-1]) <= {HEARTBEAT}
    assert silence.cancelled is False


def test_nobody_can_wait_beside_an_iterator_of_the_servers_own_thread(open_stream):
    def steps():
        threading.Event().wait(0.05)
        yield "event"

    assert open_stream("sync", steps, on_loop=False, heartbeat=0.001).all() == ["event"]


@SILENT
def test_no_heartbeat_comes_where_something_waits(run, open_stream, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop, heartbeat=60)
    chunks = []
    for _ in range(5):
        publish(run, "chunk")
        chunks.append(reader.next())
    assert HEARTBEAT not in chunks


@SILENT
def test_without_a_heartbeat_silence_stays_unbroken(open_stream, kind, on_loop):
    reader = open_stream(kind, Silence(kind).steps, on_loop=on_loop)
    assert reader.stream.heartbeat is None
    assert reader.stream.silence() is None
    reader = open_stream(kind, Silence(kind).steps, on_loop=on_loop, heartbeat=15)
    assert reader.stream.heartbeat == 15
    assert reader.stream.silence() == HEARTBEAT


# --- age ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [1 - JITTER, 1.0, 1 + JITTER])
def test_the_age_is_jittered_for_clients_of_one_moment_shall_not_come_back_in_one(
    open_stream, clock, monkeypatch, jitter
):
    asked = []
    monkeypatch.setattr(streams, "random", SimpleNamespace(uniform=lambda *bounds: asked.append(bounds) or jitter))
    reader = open_stream("sync", endless, on_loop=False, account=make_account(), max_age=100)
    assert reader.stream.too_old is None
    reader.next()
    assert asked == [(1 - JITTER, 1 + JITTER)]
    assert reader.stream.too_old == 1000 + 100 * jitter
    clock.now = reader.stream.too_old - 0.001
    assert reader.next() == "chunk"
    clock.now = reader.stream.too_old
    assert reader.next() is None


@ALL
def test_a_stream_that_is_too_old_ends_though_there_is_more(run, open_stream, told, clock, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop, account=make_account(), max_age=100)
    publish(run, "1")
    assert reader.next()
    clock.now += 200
    reader.all()
    assert told.line(reader).reason == "max_age"


@SILENT
@pytest.mark.parametrize("heartbeat", [None, 60])
def test_a_silent_stream_ends_in_time_for_its_age(open_stream, told, kind, on_loop, heartbeat):
    silence = Silence(kind)
    reader = open_stream(
        kind, silence.steps, on_loop=on_loop, account=make_account(), max_age=0.02, heartbeat=heartbeat
    )
    assert set(reader.all()) <= {HEARTBEAT}  # at most where a clock is a moment behind
    assert told.line(reader).reason == "max_age"
    silence.go_on.set()


@SILENT
def test_a_stream_has_heartbeats_until_it_is_too_old(open_stream, told, kind, on_loop):
    silence = Silence(kind)
    reader = open_stream(kind, silence.steps, on_loop=on_loop, account=make_account(), max_age=0.5, heartbeat=0.02)
    chunks = reader.all()
    assert len(chunks) > 2
    assert set(chunks) == {HEARTBEAT}
    assert told.line(reader).reason == "max_age"
    silence.go_on.set()


def test_what_is_sent_for_a_silence_that_lasts_until_the_stream_is_too_old_is_its_end(open_stream, clock):
    reader = open_stream("mailbox", on_loop=False, account=make_account(), max_age=100, heartbeat=15, first=["first"])
    reader.next()
    assert reader.stream.silence() == HEARTBEAT
    clock.now += 200
    assert reader.stream.silence() is None
    assert reader.all() == []


def test_a_stream_without_a_limit_has_no_age(open_stream):
    reader = open_stream("sync", endless, on_loop=False, account=make_account())
    reader.next()
    assert reader.stream.too_old is None


# --- told to end ----------------------------------------------------------------------------------------------------


@SILENT
def test_end_by_another_thread_ends_who_waits_with_the_last_chunk(open_stream, told, kind, on_loop):
    silence = Silence(kind)
    reader = open_stream(kind, silence.steps, on_loop=on_loop, account=make_account())
    result = reader.begin()
    if kind == "mailbox":
        until(lambda: reader.stream._source.mailbox.subscription.wake)
    else:
        assert silence.entered.wait(10)
    reader.stream.end("shutdown", b"bye")
    assert result() == "bye"
    assert reader.next() is None
    assert told.line(reader).reason == "shutdown"
    silence.go_on.set()
    if kind != "mailbox":
        reader.settle(silence.ended.is_set)


def test_end_by_another_thread_comes_after_the_step_where_the_server_is_in_it(open_stream, told):
    silence = Silence("sync")
    reader = open_stream("sync", silence.steps, on_loop=False, account=make_account())
    result = reader.begin()
    assert silence.entered.wait(10)
    reader.stream.end("shutdown", b"bye")
    silence.go_on.set()
    assert result() == "bye"
    assert silence.ended.is_set()
    assert reader.next() is None
    assert told.line(reader).reason == "shutdown"


@ALL
def test_the_last_chunk_comes_after_the_first_where_nothing_was_asked_for(open_stream, told, kind, on_loop):
    def steps():
        pytest.fail("not to be begun")
        yield

    reader = open_stream(kind, steps, on_loop=on_loop, account=make_account(), first=["first"])
    reader.stream.end("shutdown", b"bye")
    assert reader.all() == ["first", "bye"]
    assert told.line(reader).reason == "shutdown"


@WAITING
def test_the_last_chunk_comes_after_the_events_that_wait(run, open_stream, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop)
    publish(run, "1")
    reader.stream.end("shutdown", b"bye")
    publish(run, "too late")
    assert reader.all() == ["event: \ndata: 1\n\n", "bye"]


@cells(("sync", True), ("async", True))
def test_the_last_chunk_comes_after_the_step_that_waits(open_stream, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop)
    rung = threading.Event()
    reader.stream.ring_by(rung.set)
    assert reader.call(reader.stream.take) is None
    reader.settle(rung.is_set)
    reader.stream.end("shutdown", b"bye")
    assert [reader.call(reader.stream.take) for _ in range(3)] == ["chunk", "bye", None]
    assert reader.stream.over


@BESIDE
def test_nothing_comes_after_the_last_chunk(open_stream, kind, on_loop):
    """What a step brings that was under way is not sent: a browser that was told to go would not see it."""
    silence = Silence(kind)
    reader = open_stream(kind, silence.steps, on_loop=on_loop)
    result = reader.begin()
    assert silence.entered.wait(10)
    reader.stream.end("shutdown", b"bye")
    assert result() == "bye"
    silence.go_on.set()
    reader.settle(silence.ended.is_set)
    assert reader.all() == []


@ALL
def test_an_end_without_a_last_chunk_is_just_the_end(run, open_stream, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop)
    publish(run, "1")
    assert reader.next()
    reader.stream.end("max_age")
    assert len(reader.all()) <= 1  # what was there already


@ALL
def test_who_ends_a_stream_first_says_why(open_stream, told, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop, account=make_account(), first=["first"])
    reader.next()
    reader.stream.end("shutdown", b"bye")
    reader.stream.end("max_age", b"no")
    reader.stream.close("stalled")
    assert told.line(reader).reason == "shutdown"
    assert "no" not in reader.all()


def test_every_mailbox_of_a_stream_that_is_told_to_end_says_why(run, open_stream, mailbox):
    other = run.open(["b"], max_events=9, max_bytes=99)
    reader = open_stream("sync", endless, on_loop=False, mailboxes=opened(mailbox, other))
    reader.stream.end("shutdown")
    assert [mailbox.ended, other.ended] == ["shutdown"] * 2


# --- closing --------------------------------------------------------------------------------------------------------


@STEPPED
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_close_runs_the_finally_of_a_stream_that_has_begun(open_stream, kind, on_loop, asked):
    def steps():
        begun.append(1)
        try:
            while True:
                yield "chunk"
        finally:
            ended.append(1)

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


class Closable:
    """An iterator of the user's own, which need not know that it may be closed again."""

    def __init__(self):
        self.closed = 0

    def close(self):
        self.closed += 1


class SyncClosable(Closable):
    def __iter__(self):
        return self

    def __next__(self):
        return "chunk"


class AsyncClosable(Closable):
    def __aiter__(self):
        return self

    async def __anext__(self):
        return "chunk"


@STEPPED
@pytest.mark.parametrize("ends", [["close", "close"], ["end", "close"], ["end", "read", "close"], ["read", "close"]])
def test_an_iterator_that_nobody_has_begun_is_closed_once(workers, read, kind, on_loop, ends):
    iterator = SyncClosable() if kind == "sync" else AsyncClosable()
    stream = Stream(Source(iterator, as_given, first=["first"]), workers, on_loop=on_loop)
    for end in ends:
        if end == "read":
            reader = read(stream, on_loop=on_loop)
            assert reader.next() == "first"
            stream.end("shutdown", b"bye")
            assert reader.all() == (["bye"] if ends[0] == "read" else [])
        else:
            getattr(stream, end)("shutdown")
    until(lambda: iterator.closed)
    assert iterator.closed == 1


@STEPPED
def test_a_stream_that_is_told_to_end_before_anybody_came_says_so_to_who_comes(workers, read, kind, on_loop):
    iterator = SyncClosable() if kind == "sync" else AsyncClosable()
    stream = Stream(Source(iterator, as_given, first=["first"]), workers, on_loop=on_loop)
    stream.end("shutdown", b"bye")
    assert iterator.closed == 1
    assert read(stream, on_loop=on_loop).all() == ["first", "bye"]
    assert iterator.closed == 1


def test_a_stream_that_is_told_to_end_while_it_begins_ends(workers, told):
    def end(**kwargs):
        stream.end("shutdown", b"bye")

    iterator = SyncClosable()
    stream = Stream(Source(iterator, as_given), workers, on_loop=False, account=make_account())
    stream_opened.connect(end, sender=View)
    try:
        assert [next(stream, None), next(stream, None)] == ["bye", None]
    finally:
        stream_opened.disconnect(end, sender=View)
    assert iterator.closed == 1
    assert told.line(stream).reason == "shutdown"


@pytest.mark.parametrize("server", [False, True])
def test_an_error_in_the_finally_is_raised_to_code_and_logged_for_the_server(open_stream, caplog, server):
    """Django drops what a close() raises."""

    def steps():
        try:
            yield "chunk"
        finally:
            raise ValueError("in finally")

    reader = open_stream("sync", steps, on_loop=False, server=server)
    reader.next()
    if server:
        reader.stream.close()
        (record,) = [record for record in caplog.records if record.getMessage() == LATE]
        assert str(record.exc_info[1]) == "in finally"
    else:
        with pytest.raises(ValueError, match="in finally"):
            reader.stream.close()


@BESIDE
def test_an_error_in_the_finally_does_not_hang_the_close_and_is_logged(open_stream, kind, on_loop, caplog):
    def steps():
        try:
            yield "chunk"
        finally:
            raise ValueError("in finally")

    reader = open_stream(kind, steps, on_loop=on_loop)
    reader.next()
    reader.stream.close()
    reader.settle(lambda: [record for record in caplog.records if record.getMessage() == LATE])
    assert reader.next() is None


@WAITING
def test_close_gives_the_mailbox_back_and_ends_whoever_waits(run, open_stream, mailbox, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop)
    result = reader.begin()
    until(lambda: mailbox.subscription.wake, what="the stream to wait")
    reader.stream.close("stalled")
    assert result() is None
    assert mailbox.ended == "stalled"
    assert run.stats() == {"channels": 0, "subscriptions": 0}


@WAITING
def test_a_stream_that_was_never_asked_gives_its_mailbox_back(run, workers, mailbox, kind, on_loop):
    source = Source(None, as_given, mailbox=mailbox, mailboxes=opened(mailbox))
    Stream(source, workers, on_loop=on_loop).close()
    assert run.stats() == {"channels": 0, "subscriptions": 0}


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


# --- cancelled, and loops that are gone -----------------------------------------------------------------------------


@cells(("sync", True), ("async", True), ("mailbox", True))
@pytest.mark.parametrize("receiver", ["sync", "async"])
def test_a_cancelled_request_ends_its_stream(workers, mailbox, told, kind, on_loop, receiver):
    """However Django or the server ends the request, and whoever listens: what comes out is the cancellation."""

    def synchronous(**kwargs):
        received.append(kwargs["reason"])

    async def asynchronous(**kwargs):
        received.append(kwargs["reason"])

    async def main():
        iterator = None if kind == "mailbox" else silence.steps
        source = Source(iterator, as_given, mailbox=mailbox, mailboxes=opened(mailbox))
        stream = Stream(source, workers, on_loop=True, account=make_account()).for_server()
        task = asyncio.ensure_future(anext(aiter(stream)))
        await soon(lambda: mailbox.subscription.wake if iterator is None else silence.entered.is_set())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        silence.go_on.set()
        if iterator is not None:
            await soon(silence.ended.is_set)
        assert mailbox.ended == "client"
        stream.close()
        await soon(lambda: received)
        return stream

    silence, received = Silence(kind), []
    connected = synchronous if receiver == "sync" else asynchronous
    stream_closed.connect(connected, sender=View)
    try:
        stream = asyncio.run(main())
    finally:
        stream_closed.disconnect(connected, sender=View)
    assert told.line(stream).reason == "client"
    assert received == ["client"]


@needs_loops
@pytest.mark.parametrize("moment", ["opened", "asked"])
def test_a_request_of_djangos_that_is_cancelled_is_told_of_without_a_close(workers, told, moment):
    """Django 5.2 closes nothing when the server cancels: the end of the request's thread is what there is to see."""

    async def hold(**kwargs):
        if moment == "opened":
            opening.set()
            await asyncio.sleep(3600)

    async def main():
        stream = Stream(Source(silence.steps, as_given), workers, on_loop=True, account=make_account()).for_server()
        kept.append(stream)

        async def request():
            async with ThreadSensitiveContext():
                await sync_to_async(lambda: None)()
                await anext(aiter(stream))

        task = asyncio.ensure_future(request())
        await soon(opening.is_set if moment == "opened" else silence.entered.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await soon(lambda: told.closed)

    kept, silence, opening = [], Silence("async"), threading.Event()
    stream_opened.connect(hold, sender=View)
    try:
        asyncio.run(main())
    finally:
        stream_opened.disconnect(hold, sender=View)
    assert len(told.lines) == 1
    assert told.line(kept[0]).reason == "client"


@needs_loops
def test_a_cancelled_wait_of_other_code_leaves_its_stream_alone(workers):
    """It may come again: `asyncio.wait_for(anext(chunks), 1)`."""

    async def main():
        stream = Stream(Source(silence.steps, as_given), workers, on_loop=True)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(aiter(stream)), 0.01)
        silence.go_on.set()
        assert [chunk async for chunk in stream] == ["event"]
        stream.close()

    silence = Silence("async")
    asyncio.run(main())
    assert not silence.cancelled


@needs_loops
def test_a_cancelled_step_is_closed_when_it_is_over(workers):
    async def main():
        stream = Stream(Source(silence.steps, as_given), workers, on_loop=True)
        task = asyncio.ensure_future(anext(aiter(stream)))
        await asyncio.to_thread(silence.entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream.close()
        assert not silence.ended.is_set()
        silence.go_on.set()
        assert await asyncio.to_thread(silence.ended.wait, 10)

    silence = Silence("sync")
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

    async def main():
        stream = Stream(Source(steps(), as_given), workers, on_loop=True)
        task = asyncio.ensure_future(anext(aiter(stream)))
        await soon(entered.is_set)
        task.cancel()
        stream.close()
        with pytest.raises(asyncio.CancelledError):
            await task
        await soon(lambda: ended)

    entered, ended = threading.Event(), []
    asyncio.run(main())


@needs_loops
def test_the_end_of_the_loop_does_not_hold_up_the_thread_of_a_sync_iterator(workers):
    async def main():
        stream = Stream(Source(silence.steps, as_given), workers, on_loop=True)
        kept.extend([stream, asyncio.ensure_future(anext(aiter(stream)))])
        await asyncio.to_thread(silence.entered.wait, 10)

    kept, silence = [], Silence("sync")
    asyncio.run(main())
    silence.go_on.set()
    kept[0].close()
    assert silence.ended.wait(10)
    until(lambda: not len(workers._hired), what="the end of the thread")


@needs_loops
def test_closing_after_the_end_of_the_loop_is_harmless(workers):
    async def main():
        stream = Stream(Source(make("async", endless), as_given), workers, on_loop=True)
        await anext(aiter(stream))
        return stream

    asyncio.run(main()).close()


# --- dropped --------------------------------------------------------------------------------------------------------


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


@ALL
@pytest.mark.parametrize("asked", [0, 1])
def test_a_stream_that_is_dropped_unclosed_takes_no_lock(run, workers, open_stream, kind, on_loop, asked):
    """The collector runs anywhere, even under ours: here each lock is held by another thread, which waits for it."""
    account = make_account()
    reader = open_stream(kind, endless, on_loop=on_loop, account=account)
    for _ in range(asked):
        publish(run, "1")
        reader.next()
    if kind != "sync" or on_loop:
        reader.stream._source.mailboxes.close()  # mailboxes see to themselves
    dropped = threading.Event()
    thread = threading.Thread(target=lambda: (reader.stream.__del__(), dropped.set()), daemon=True)
    with run._lock, workers._lock, open_streams._lock, account._lock:
        thread.start()
        assert dropped.wait(5), "it waits for a lock"
    thread.join(10)


def test_a_stream_that_was_dropped_unclosed_is_told_of_soon(workers, told):
    account = make_account()
    stream = Stream(Source(endless(), as_given), workers, on_loop=False, account=account)
    open_streams.admit(stream, limit=None)
    next(iter(stream))
    before = len(open_streams)
    del stream
    gc.collect()
    assert len(open_streams) == before - 1
    assert told.lines == []
    Stream(Source((), as_given), workers, on_loop=False, account=make_account()).close()  # whoever comes next
    (record,) = told.lines
    assert (record.reason, record.events) == ("client", 1)
    assert len(told.closed) == 1


def test_a_stream_that_was_refused_in_the_making_is_dropped_without_an_error():
    Stream.__new__(Stream).__del__()


# --- what it tells --------------------------------------------------------------------------------------------------


class Told:
    """What the log and the signals say of streams."""

    def __init__(self, caplog):
        self._caplog = caplog
        self.opened, self.closed = [], []

    @property
    def lines(self):
        return [record for record in self._caplog.records if record.name == "django_sse.streams"]

    def line(self, reader):
        """The one line on a stream that has ended, whoever closes it now, and its one signal."""
        getattr(reader, "stream", reader).close()
        until(lambda: self.closed, what="the signal")
        (record,) = self.lines
        (signal,) = self.closed
        for name in ("reason", "events", "bytes", "seconds"):
            assert signal[name] == getattr(record, name)
        return record

    def on_opened(self, **kwargs):
        self.opened.append({**kwargs, "thread": threading.get_ident()})

    def on_closed(self, **kwargs):
        self.closed.append({**kwargs, "thread": threading.get_ident()})


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, "django_sse.streams")
    told = Told(caplog)
    stream_opened.connect(told.on_opened, sender=View)
    stream_closed.connect(told.on_closed, sender=View)
    yield told
    stream_opened.disconnect(told.on_opened, sender=View)
    stream_closed.disconnect(told.on_closed, sender=View)


def fails():
    yield "chunk"
    raise ValueError("mine")


def two():
    yield "é"
    yield ""
    yield "chunk"


@STEPPED
def test_a_stream_that_finishes_is_told_of_once(open_stream, told, kind, on_loop):
    account = make_account()
    reader = open_stream(kind, two, on_loop=on_loop, account=account, first=["first"])
    assert told.opened == []
    assert reader.next() == "first"
    assert [(signal["sender"], signal["stream"]) for signal in told.opened] == [(View, account.info)]
    reader.all()
    record = told.line(reader)
    assert (record.reason, record.events, record.bytes) == ("finished", 2, len("firstchunk") + len("é".encode()))
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("stream closed: reason=finished events=2 bytes=12 seconds=0.")
    assert (record.path, record.channels) == ("/path", ("a",))
    assert len(told.opened) == 1
    assert told.closed[0]["stream"] is account.info


@STEPPED
@pytest.mark.parametrize("server", [False, True])
def test_an_error_is_told_once_with_its_traceback(open_stream, told, kind, on_loop, server):
    reader = open_stream(kind, fails, on_loop=on_loop, account=make_account(), server=server)
    assert reader.next() in ("chunk", b"chunk")
    if server:
        assert reader.next() is None
    else:
        with pytest.raises(ValueError, match="mine"):
            reader.next()
    record = told.line(reader)
    assert (record.reason, record.events, record.bytes) == ("error", 1, 5)
    assert record.levelno == logging.ERROR
    assert str(record.exc_info[1]) == "mine"


@STEPPED
def test_a_broker_that_is_away_is_no_error_of_the_program(open_stream, told, kind, on_loop):
    def steps():
        raise BrokerUnavailable("away")
        yield

    reader = open_stream(kind, steps, on_loop=on_loop, account=make_account(), server=True)
    assert reader.all() == []
    record = told.line(reader)
    assert (record.reason, record.levelno, record.exc_info) == ("error", logging.WARNING, None)


@ALL
@pytest.mark.parametrize("reason", ["client", "stalled", "shutdown"])
def test_a_stream_that_is_closed_is_told_of_once_with_the_reason(run, open_stream, told, kind, on_loop, reason):
    reader = open_stream(kind, endless, on_loop=on_loop, account=make_account(), server=True)
    publish(run, "1")
    chunk = reader.next()
    reader.stream.close(reason)
    reader.stream.close("client")
    record = told.line(reader)
    assert (record.reason, record.events, record.bytes) == (reason, 1, len(chunk))
    assert record.levelno == (logging.WARNING if reason == "stalled" else logging.INFO)


@WAITING
def test_an_overflow_is_told_with_what_was_taken(run, open_stream, told, kind, on_loop):
    reader = open_stream(kind, on_loop=on_loop, account=make_account(), server=True)
    publish(run, "x" * 400, "y" * 400, "z" * 400)
    sent = reader.all()
    record = told.line(reader)
    assert (record.reason, record.events, record.bytes) == ("overflow", 2, len(b"".join(sent)))
    assert record.levelno == logging.WARNING


@SILENT
def test_heartbeats_and_the_last_chunk_count_as_bytes_and_not_as_events(open_stream, told, kind, on_loop):
    silence = Silence(kind)
    reader = open_stream(kind, silence.steps, on_loop=on_loop, account=make_account(), heartbeat=0.01, first=["first"])
    chunks = [reader.next() for _ in range(3)]
    reader.stream.end("shutdown", b"bye")
    chunks += reader.all()
    record = told.line(reader)
    assert chunks[-1] == "bye"
    assert (record.events, record.bytes) == (0, len("".join(chunks)))
    silence.go_on.set()


@ALL
def test_nothing_is_told_of_a_stream_that_was_never_asked(open_stream, told, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop, account=make_account())
    open_streams.admit(reader.stream, limit=None)
    reader.stream.close()
    assert reader.stream not in open_streams.all()
    assert (told.lines, told.opened, told.closed) == ([], [], [])


@ALL
def test_nothing_is_told_of_a_stream_without_an_account(run, open_stream, told, kind, on_loop):
    reader = open_stream(kind, two, on_loop=on_loop)
    publish(run, "1")
    reader.next()
    reader.stream.close()
    reader.all()
    assert (told.lines, told.opened, told.closed) == ([], [], [])


@ALL
def test_a_stream_keeps_its_place_until_its_end_is_told(run, open_stream, told, kind, on_loop):
    """A process that stops waits for those that have a place."""

    def look(**kwargs):
        there.append(reader.stream in open_streams.all())

    there = []
    reader = open_stream(kind, endless, on_loop=on_loop, account=make_account())
    open_streams.admit(reader.stream, limit=None)
    publish(run, "1")
    reader.next()
    assert reader.stream in open_streams.all()
    stream_closed.connect(look, sender=View)
    reader.stream.end("shutdown")
    reader.all()
    reader.settle(lambda: there)
    assert there == [True]
    reader.settle(lambda: reader.stream not in open_streams.all())


@needs_loops
@pytest.mark.parametrize("end", ["finish", "close", "error"])
def test_receivers_may_use_the_database_under_a_loop(open_stream, told, end):
    """Django refuses that in the thread of the loop."""

    def ask(**kwargs):
        try:
            query()
        except SynchronousOnlyOperation as error:
            asked.append(error)

    asked, query = [], async_unsafe("as the ORM does")(lambda: asked.append(threading.get_ident()))
    stream_opened.connect(ask, sender=View)
    stream_closed.connect(ask, sender=View)
    reader = open_stream("async", two if end == "finish" else fails, on_loop=True, account=make_account())
    try:
        reader.next()
        if end == "close":
            reader.call(reader.stream.close)
        else:
            with pytest.raises(ValueError, match="mine") if end == "error" else nullcontext():
                reader.all()
        reader.settle(lambda: len(asked) == 2)
    finally:
        stream_opened.disconnect(ask, sender=View)
        stream_closed.disconnect(ask, sender=View)
    assert all(isinstance(ident, int) for ident in asked), asked
    assert threading.get_ident() not in asked
    told.line(reader)


@ASKED
def test_a_receiver_that_raises_harms_no_stream(open_stream, told, on_loop):
    def harm(**kwargs):
        raise ValueError("not the stream's")

    stream_opened.connect(harm, sender=View)
    stream_closed.connect(harm, sender=View)
    try:
        reader = open_stream("sync", two, on_loop=on_loop, account=make_account(), server=True)
        assert reader.all() == ["é".encode(), b"chunk"]
        assert told.line(reader).reason == "finished"
    finally:
        stream_opened.disconnect(harm, sender=View)
        stream_closed.disconnect(harm, sender=View)


def test_streams_that_end_while_the_process_stops_say_so(open_stream, told, monkeypatch):
    reader = open_stream("sync", endless, on_loop=False, account=make_account())
    reader.next()
    monkeypatch.setattr(open_streams, "draining", True)
    reader.stream.close()
    assert told.line(reader).reason == "shutdown"


# --- clients that do not read ---------------------------------------------------------------------------------------


@ALL
def test_a_stream_is_stalled_while_its_client_does_not_come_for_more(run, open_stream, clock, kind, on_loop):
    reader = open_stream(kind, endless, on_loop=on_loop, stall_timeout=30)
    assert reader.stream.stalled_for(clock.now) == 0
    for _ in range(2):
        publish(run, "1")
        reader.next()
        assert reader.stream.stalled_for(clock.now + 20) == -10
        assert reader.stream.stalled_for(clock.now + 40) == 10
        clock.now += 40


@SILENT
def test_a_silent_stream_is_not_stalled(open_stream, kind, on_loop):
    silence = Silence(kind)
    reader = open_stream(kind, silence.steps, on_loop=on_loop, stall_timeout=0, first=["first"])
    reader.next()
    assert reader.stream.stalled_for(10**9) > 0
    result = reader.begin()
    until(lambda: reader.stream.given is None, what="the client to come for more")
    assert reader.stream.stalled_for(10**9) == 0
    reader.stream.end("shutdown")
    silence.go_on.set()
    result()


def test_a_stream_without_a_limit_never_stalls(open_stream):
    reader = open_stream("sync", endless, on_loop=False)
    reader.next()
    assert reader.stream.stalled_for(10**9) == 0


@ASKED
def test_a_client_that_does_not_read_is_ended(open_stream, told, on_loop):
    reader = open_stream("async" if on_loop else "sync", endless, on_loop=on_loop, account=make_account())
    reader.stream._stall_timeout = reader.stream.stall_timeout = 0.05
    registry = Registry()
    registry.admit(reader.stream, limit=None)
    reader.next()
    registry.watch(0.01)
    until(lambda: told.closed, what="the end")
    assert told.line(reader).reason == "stalled"


def test_the_registry_looks_after_an_open_stream_four_times_in_its_patience(open_stream, monkeypatch):
    watched = []
    monkeypatch.setattr(open_streams, "watch", watched.append)
    for stall_timeout in (None, 30):
        open_stream("sync", endless, on_loop=False, account=make_account(), stall_timeout=stall_timeout).next()
    assert watched == [7.5]


# --- delivered outside of Django's handler --------------------------------------------------------------------------


@cells(("sync", True), ("async", True), ("mailbox", True))
def test_outside_a_stream_lets_go_of_what_it_does_not_need(run, open_stream, monkeypatch, kind, on_loop):
    detached = []
    monkeypatch.setattr(Source, "detach", lambda source: detached.append(source))
    reader = open_stream(kind, two, on_loop=on_loop, stall_timeout=30, server=True)
    assert reader.call(reader.stream.outside) is reader.stream
    assert detached == [reader.stream._source]
    assert getattr(reader.stream._feed, "outside", None) is (True if kind == "async" else None)
    publish(run, "1")
    assert reader.next()
    assert reader.stream.stalled_for(10**9) == 0  # whoever delivers it looks for that
    assert reader.stream.stall_timeout == 30


@cells(("sync", True), ("async", True), ("mailbox", True))
def test_taking_gives_what_there_is_and_rings_for_the_rest(run, open_stream, told, kind, on_loop):
    reader = open_stream(kind, two, on_loop=on_loop, account=make_account(), first=["first"], server=True)
    rung = threading.Event()
    reader.call(reader.stream.outside)
    reader.call(lambda: reader.stream.ring_by(rung.set))
    reader._loop.run_until_complete(reader.stream.begin_on_loop())
    assert len(told.opened) == 1
    assert reader.call(reader.stream.take) == b"first"
    assert reader.call(reader.stream.take) is None
    assert not reader.stream.over
    if kind == "mailbox":
        publish(run, "1")
    reader.settle(rung.is_set)
    assert reader.call(reader.stream.take)
    reader.stream.shut("client")
    while reader.call(reader.stream.take) is not None:
        pass
    assert reader.stream.over
    assert told.lines == told.closed == []
    for _ in range(2):
        reader._loop.run_until_complete(reader.stream.settle_on_loop())
    assert told.line(reader).reason == "client"
    assert told.closed[0]["thread"] != threading.get_ident()


class Seen:
    """A view, of which a stream needs the buffer alone."""

    def __init__(self):
        self.sse = Sse()
        list(self.sse)

    def buffer(self):
        return self.sse

    def source(self, mailbox, **options):
        return Source(None, lambda value: flush_sse(self.sse), mailbox=mailbox, **options)


@needs_loops
def test_a_mailbox_may_be_taken_from_past_its_stream_where_the_buffer_can_be_looked_at(workers, read, mailbox):
    view = Seen()
    stream = Stream(view.source(mailbox, buffer=lambda: view.sse), workers, on_loop=True)
    assert (stream.mailbox, stream.buffer) == (None, None)  # the view may still do anything
    reader = read(stream, on_loop=True)
    reader.call(stream.outside)
    assert stream.mailbox is mailbox
    assert stream.buffer is view.sse


@needs_loops
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("empty", [True, False])
def test_a_stream_lets_go_of_a_buffer_that_nobody_can_fill_when_the_first_chunks_are_out(
    run, workers, read, mailbox, held, empty
):
    view = Seen()
    source = view.source(mailbox, buffer=view.buffer, first=["first", "second"], heartbeat=15)
    reader = read(Stream(source, workers, on_loop=True).for_server(), on_loop=True)
    stream, buffer = reader.stream, weakref.ref(view.sse)
    reader.call(stream.outside)
    if not empty:
        view.sse.add_comment("added")
    somebody = view.sse if held else None
    del view
    for first in (b"first", b"second"):
        assert reader.call(stream.take) == first
        assert stream.buffer is not None
    assert reader.call(stream.take) is None
    assert stream.buffer is buffer()
    assert (stream.buffer is None) == (empty and not held)
    assert stream.mailbox is mailbox
    rest = b"" if empty else b": added\n\n"
    assert reader.call(stream.silence) == HEARTBEAT.encode() + rest
    publish(run, "1")
    assert reader.call(stream.take) == b"event: \ndata: 1\n\n"
    if somebody is not None:
        somebody.add_comment("later")
        assert reader.call(stream.silence) == b":\n\n: later\n\n"


@cells(("mailbox", False), ("mailbox", True))
@pytest.mark.parametrize("held", [True, False])
def test_a_stream_of_a_handler_lets_go_of_such_a_buffer_too(run, workers, read, mailbox, kind, on_loop, held):
    view = Seen()
    source = view.source(mailbox, buffer=view.buffer, first=["first"], mailboxes=opened(mailbox))
    reader = read(Stream(source, workers, on_loop=on_loop, account=make_account()).for_server(), on_loop=on_loop)
    buffer = weakref.ref(view.sse)
    somebody = view.sse if held else None
    assert reader.next() == b"first"
    del view
    assert buffer() is not None
    publish(run, "1")
    assert reader.next() == b"event: \ndata: 1\n\n"
    assert buffer() is somebody
    if somebody is not None:
        somebody.add_comment("added")
    publish(run, "2")
    assert reader.next() == b"event: \ndata: 2\n\n" + (b": added\n\n" if held else b"")


@needs_loops
def test_a_mailbox_is_not_taken_from_past_a_stream_that_makes_its_chunks(workers, read, mailbox):
    view = Seen()
    for source in (
        view.source(mailbox),  # with a flush() of its own
        Source(iter(()), lambda value: (), buffer=lambda: view.sse),
        Source(None, lambda value: (), mailbox=mailbox),
    ):
        stream = Stream(source, workers, on_loop=True)
        reader = read(stream, on_loop=True)
        reader.call(stream.outside)
        assert stream.mailbox is None


@needs_loops
def test_bytes_that_were_taken_past_the_stream_are_counted(run, workers, read, mailbox, told):
    view = Seen()
    source = view.source(mailbox, buffer=lambda: view.sse, mailboxes=opened(mailbox))
    stream = Stream(source, workers, on_loop=True, account=make_account())
    reader = read(stream, on_loop=True)
    reader.call(stream.for_server().outside)
    reader._loop.run_until_complete(stream.begin_on_loop())
    publish(run, "1", "2")
    assert reader.call(stream.take)
    publish(run, "3")
    assert mailbox.take_alike([mailbox], 1000) == ([b"event: \ndata: 3\n\n"], False)
    stream.heartbeats += 2
    stream.shut("client")
    reader._loop.run_until_complete(stream.settle_on_loop())
    line = told.line(reader)
    assert (line.events, line.bytes) == (3, 3 * len(b"event: \ndata: 1\n\n") + 2 * len(HEARTBEAT))
    Stream(Source(iter(()), as_given), workers, on_loop=False).count(5)  # one without an account counts for nobody


@needs_loops
def test_who_delivers_says_whether_the_client_takes_what_it_is_sent(workers, read, mailbox):
    stream = Stream(Source(None, as_given, mailbox=mailbox), workers, on_loop=True)
    stream.mark(slow=True)  # nobody has come yet
    assert not mailbox.subscription.slow
    reader = read(stream, on_loop=True)
    reader.call(stream.outside)
    for slow in (True, False):
        stream.mark(slow=slow)
        assert mailbox.subscription.slow is slow


@needs_loops
def test_nobody_is_troubled_where_nobody_listens(open_stream, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "django_sse.streams")
    # The views of other tests have receivers for every stream of this process.
    monkeypatch.setattr(stream_closed, "receivers", [])
    reader = open_stream("async", two, on_loop=True, account=make_account())
    before = set(threading.enumerate())
    reader.all()
    assert set(threading.enumerate()) <= before
    assert len(caplog.records) >= 1
