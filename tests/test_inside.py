"""Inside of Django's handler the pump delivers what a mailbox gives, and the handler asks; either may go first."""

import asyncio
import gc
import logging
import threading

import pytest

from django_sse.brokers.memory import MemoryBroker
from django_sse.event import encode_payload
from django_sse.feeds import CHUNK_BYTES, HEARTBEAT, Source, flush_sse
from django_sse.handover import EventStreamResponse
from django_sse.inbox import Mailboxes
from django_sse.inside import Inside
from django_sse.pump import _Pump
from django_sse.registry import Account, StreamInfo, open_streams
from django_sse.runtime import Runtime
from django_sse.streams import Stream
from django_sse.wire import Sse
from django_sse.workers import Workers
from tests.helpers.loops import needs_loops, soon
from tests.helpers.wait import until

pytestmark = needs_loops
MANY = 10_000


class View:
    """Stands for the view class in what is told of a stream."""


@pytest.fixture
def run():
    run = Runtime(MemoryBroker())
    yield run
    run.close()


def empty():
    buffer = Sse()
    list(buffer)
    return buffer


@pytest.fixture
def make(run):
    """Make what the handler iterates, for a stream of a channel."""

    def make(channel="a", **limits):
        mailbox = run.open([channel], max_events=MANY, max_bytes=64 * CHUNK_BYTES)
        mailboxes = Mailboxes()
        mailboxes.add(mailbox)
        source = Source(
            None,
            flush_sse,
            mailbox=mailbox,
            mailboxes=mailboxes,
            heartbeat=limits.pop("heartbeat", None),
            buffer=limits.pop("buffer", empty),
        )
        account = Account(StreamInfo(View, "/path", (channel,)))
        workers = Workers(limit=lambda: 4, at_exit=lambda: None)
        stream = Stream(source, workers, on_loop=True, account=account, **limits).for_server()
        open_streams.admit(stream, limit=None)
        return Inside(stream)

    return make


@pytest.fixture
def ends(caplog):
    """Return the reasons of the streams that have ended."""
    caplog.set_level(logging.INFO, "django_sse.streams")
    return lambda: [record.reason for record in caplog.records if record.name == "django_sse.streams"]


def publish(run, *texts, channel="a"):
    for text in texts:
        run.broker.publish(channel, encode_payload("", text))


def frames(*texts):
    return "".join(f"event: \ndata: {text}\n\n" for text in texts).encode()


async def begin(inside):
    """Ask for the first chunk, which is the buffer's, and return it."""
    return await asyncio.wait_for(anext(inside), 10)


async def next_of(inside, run, text):
    """Ask for a chunk, have an event come as soon as it is waited for, and return what was given."""
    asked = asyncio.ensure_future(anext(inside))
    await soon(lambda: _Pump._pumps)
    publish(run, text)
    return await asyncio.wait_for(asked, 10)


async def nothing_left(run):
    await soon(lambda: not _Pump._pumps and run.stats() == {"channels": 0, "subscriptions": 0})


async def rest(inside):
    """Return all that still comes, joined, until the end."""

    async def joined():
        return b"".join([chunk async for chunk in inside])

    return await asyncio.wait_for(joined(), 10)


def test_what_comes_while_nobody_asks_is_one_chunk(run, make):
    async def main():
        inside = make()
        assert await next_of(inside, run, "1") == frames("1")
        publish(run, "2")
        await soon(lambda: inside._pipe.chunks)
        publish(run, "3")
        await soon(lambda: len(inside._pipe.chunks) == 2)
        assert await anext(inside) == frames("2", "3")
        inside.close()
        await nothing_left(run)

    asyncio.run(main())


def test_those_who_listen_to_the_same_go_in_step_and_get_the_same_bytes(run, make):
    async def main():
        several = [make() for _ in range(3)]
        for number in range(3):
            asked = [asyncio.ensure_future(anext(inside)) for inside in several]
            await soon(lambda: all(inside._pipe and inside._pipe.asked for inside in several))
            await soon(lambda: run.stats()["subscriptions"] == len(several))
            publish(run, str(number))
            chunks = await asyncio.wait_for(asyncio.gather(*asked), 10)
            assert chunks == [frames(number)] * 3
        assert len({id(chunk) for chunk in chunks}) == 1
        (share,) = _Pump.of_running_loop()._shares.values()
        assert ([len(row) for row in share.rows], len(share.loose)) == ([3], 0)
        for inside in several:
            inside.close()
        await nothing_left(run)

    asyncio.run(main())


def test_a_pipe_that_is_full_waits_and_nothing_is_lost(run, make):
    text = "x" * 1000
    count = 5 * CHUNK_BYTES // len(text)

    async def main():
        inside = make()
        assert await next_of(inside, run, "first") == frames("first")
        for number in range(count):
            publish(run, f"{number} {text}")
            if not number % 20:
                await asyncio.sleep(0)
        await soon(lambda: inside._pipe._room is not None)
        # What was sent in one piece may be in it, and what made it full.
        assert CHUNK_BYTES < sum(map(len, inside._pipe.chunks)) < 3 * CHUNK_BYTES
        body = b""
        while body.count(b"data: ") < count:
            chunk = await asyncio.wait_for(anext(inside), 10)
            assert len(chunk) < CHUNK_BYTES + 2 * len(text)
            body += chunk
        assert body == frames(*(f"{number} {text}" for number in range(count)))
        inside.close()
        await nothing_left(run)

    asyncio.run(main())


def test_silence_is_broken_by_heartbeats(run, make):
    async def main():
        inside = make(heartbeat=0.01)
        assert [await begin(inside) for _ in range(2)] == [b":\n\n"] * 2
        inside.close()
        await nothing_left(run)

    asyncio.run(main())


def test_a_buffer_that_somebody_can_fill_is_looked_at(run, make):
    kept = empty()

    async def main():
        inside = make(buffer=lambda: kept)
        asked = asyncio.ensure_future(anext(inside))
        await soon(lambda: _Pump._pumps)
        kept.add_message("", "own")
        publish(run, "1")
        assert await asyncio.wait_for(asked, 10) == frames("1", "own")
        inside.close()
        await nothing_left(run)

    asyncio.run(main())


@pytest.mark.parametrize("reason", ["max_age", "shutdown", "overflow"])
def test_the_end_comes_after_what_waits_and_is_told_once(run, make, ends, reason):
    async def main():
        inside = make(max_age=0.05 if reason == "max_age" else None)
        assert await next_of(inside, run, "1") == frames("1")
        if reason == "shutdown":
            publish(run, "2")
            inside._stream.end("shutdown", b"retry: 1\n\n")
            assert await rest(inside) == frames("2") + b"retry: 1\n\n"
        elif reason == "overflow":
            publish(run, *map(str, range(MANY + 1)))  # by this thread: nobody can take them meanwhile
            assert (await rest(inside)).startswith(frames("0", "1"))
        else:
            assert await rest(inside) == b""
        assert ends() == [reason]  # before the handler has ended
        inside.close()
        with pytest.raises(StopAsyncIteration):
            await anext(inside)
        await nothing_left(run)

    asyncio.run(main())
    assert ends() == [reason]


def test_a_request_that_is_cancelled_while_it_waits_ends_the_stream(run, make, ends):
    async def main():
        inside = make()
        asked = asyncio.ensure_future(anext(inside))
        await soon(lambda: inside._pipe is not None and inside._pipe.asked is not None)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await nothing_left(run)
        await soon(lambda: ends() == ["client"])
        inside.close()

    asyncio.run(main())
    assert ends() == ["client"]


def test_a_response_that_another_thread_closes_ends_the_stream_though_its_pipe_is_full(run, make, ends):
    async def main():
        inside = make()
        await next_of(inside, run, "1")
        publish(run, *["x" * 1000] * (3 * CHUNK_BYTES // 1000))
        await soon(lambda: inside._pipe._room is not None)
        closing = threading.Thread(target=inside.close)
        closing.start()
        await nothing_left(run)
        closing.join()
        assert ends() == ["client"]

    asyncio.run(main())


@pytest.mark.parametrize("way", ["is closed", "is cancelled", "has stalled"])
def test_all_bytes_are_told_whoever_ends_the_stream(run, make, caplog, way):
    caplog.set_level(logging.INFO, "django_sse.streams")

    async def main():
        inside = make(heartbeat=0.02)
        got = await begin(inside)
        asked = asyncio.ensure_future(anext(inside))
        publish(run, "1")
        got += await asyncio.wait_for(asked, 10)
        asked = asyncio.ensure_future(anext(inside))
        await soon(lambda: inside._pipe.asked is not None and not inside._pipe.asked.done())
        if way == "is cancelled":
            asked.cancel()
        elif way == "is closed":
            inside.close()
        else:
            inside._stream.close("stalled")
        await asyncio.gather(asked, return_exceptions=True)
        inside.close()
        await nothing_left(run)
        return len(got)

    got = asyncio.run(main())
    (told,) = [record.bytes for record in caplog.records if record.name == "django_sse.streams"]
    # A heartbeat may have been on its way to nobody.
    assert told - got in (0, len(HEARTBEAT))


def test_an_owner_whose_response_was_dropped_before_anybody_asked_is_forgotten(make):
    inside = make()
    stream = inside._stream
    open_streams.admit(stream, limit=None, owner="somebody", owner_limit=5)
    stream.account.info = StreamInfo(View, "/path", (), "somebody")
    response = EventStreamResponse(stream)
    assert "somebody" in open_streams._owners
    del inside, stream, response
    gc.collect()
    open_streams._reap()
    assert "somebody" not in open_streams._owners


def test_a_response_that_is_closed_before_anybody_asked_ends_the_stream(run, make):
    inside = make()
    inside.close()
    assert run.stats() == {"channels": 0, "subscriptions": 0}


def test_one_that_is_dropped_unclosed_ends_its_stream(run, make, ends):
    async def main():
        inside = make()
        await next_of(inside, run, "1")
        del inside
        gc.collect()
        await nothing_left(run)
        await soon(lambda: ends() == ["client"])

    asyncio.run(main())


def test_django_closes_what_it_has_iterated_and_that_ends_nothing(run, make):
    async def main():
        inside = make()
        asked = asyncio.ensure_future(anext(inside))
        await soon(lambda: _Pump._pumps)
        await inside.aclose()
        publish(run, "1")
        assert await asyncio.wait_for(asked, 10) == frames("1")
        assert aiter(inside) is inside
        inside.close()
        await nothing_left(run)

    asyncio.run(main())


def test_one_that_outlives_its_loop_may_be_closed(run, make):
    inside = make()

    async def main():
        await next_of(inside, run, "1")

    asyncio.run(main())
    inside.close()
    until(lambda: run.stats() == {"channels": 0, "subscriptions": 0})


def test_a_delivery_that_breaks_off_ends_the_iteration(run, make, monkeypatch, caplog):
    def breaks(self, max_bytes):
        raise ValueError("mine")

    async def main():
        inside = make()
        await next_of(inside, run, "1")
        asked = asyncio.ensure_future(anext(inside))
        await soon(lambda: inside._pipe.asked is not None)
        for delivery in list(_Pump.of_running_loop()._deliveries):
            delivery.fail(ValueError("mine"))
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(asked, 10)
        inside.close()
        await nothing_left(run)

    asyncio.run(main())
    assert "mine" in caplog.text
