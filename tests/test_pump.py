"""Delivery outside of Django's handler: at once where the client takes it, and never at the cost of another client."""

import asyncio
import contextvars
import gc
import itertools
import logging
import threading
import time
import weakref

import pytest

from django_sse import pump
from django_sse.brokers.memory import MemoryBroker
from django_sse.event import encode_payload
from django_sse.feeds import Source, flush_sse
from django_sse.pump import BATCH, Delivery, _Pump
from django_sse.registry import Account, StreamInfo, open_streams
from django_sse.runtime import Runtime
from django_sse.signals import stream_closed, stream_opened
from django_sse.streams import Stream
from django_sse.wire import Sse
from django_sse.workers import Workers
from tests.helpers.loops import needs_loops, soon

pytestmark = needs_loops

END = {"type": "http.response.body", "body": b"", "more_body": False}


class View:
    """The sender of these streams' signals."""


@pytest.fixture(params=["alike", "alone"])
def run(request):
    """A runtime. Its streams either have a buffer that may be looked at, so that clients are served as one, or not."""
    run = Runtime(MemoryBroker())
    run.alike = request.param == "alike"
    yield run
    run.close()


@pytest.fixture
def workers():
    return Workers(limit=lambda: 4, at_exit=lambda: None)


@pytest.fixture
def ends():
    """(reason, events, bytes) of each stream that has ended."""
    ends = []

    def receiver(sender, reason, events, bytes, **kwargs):  # noqa: A002
        ends.append((reason, events, bytes))

    stream_closed.connect(receiver, sender=View)
    yield ends
    stream_closed.disconnect(receiver, sender=View)


@pytest.fixture(autouse=True)
def _ready_for_streams():
    yield
    open_streams.draining = False


class Client:
    """One client: `send` and `receive` for the delivery of its stream, which listens to `channels` or has `steps`."""

    def __init__(self, run, *channels, steps=None, send=None, receive=None, max_events=10_000, **options):
        kept = {name: options.pop(name) for name in ("heartbeat", "first") if name in options}
        self.sse = Sse()
        list(self.sse)  # no ``retry``
        if steps is not None:
            source = Source(steps, lambda value: (value,), **kept)
        else:
            self.mailbox = run.open(channels or ["a"], max_events=max_events, max_bytes=10_000_000)
            if run.alike:
                kept["buffer"] = lambda: self.sse
            source = Source(None, lambda value: flush_sse(self.sse), mailbox=self.mailbox, **kept)
            source.mailboxes.add(self.mailbox)
        self.sent = []
        self.disconnect = asyncio.Event()
        self.stream = Stream(
            source, Workers(lambda: 9, lambda: None), on_loop=True, account=Account(StreamInfo(View, "/")), **options
        )
        open_streams.admit(self.stream, limit=None)
        self.stream.for_server().outside()
        self.delivery = Delivery(self.stream, send or self.send)
        self.task = asyncio.get_running_loop().create_task(self.delivery.run(receive or self.receive))

    async def send(self, message):
        self.sent.append(message)

    async def receive(self):
        await self.disconnect.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self):
        return b"".join(message["body"] for message in self.sent)

    async def until(self, part):
        await soon(lambda: part in self.body or self.task.done())
        assert part in self.body, f"ended with {self.sent}"

    async def leave(self):
        self.disconnect.set()
        await asyncio.wait_for(self.task, 10)


def publish(run, *texts, channel="a"):
    for text in texts:
        run.broker.publish(channel, encode_payload("", text))


def tasks():
    """The tasks of this loop but the caller."""
    return asyncio.all_tasks() - {asyncio.current_task()}


async def turns(number=5):
    """Give the loop back so often."""
    for _ in range(number):
        await asyncio.sleep(0)


class Door:
    """A `send` that waits, from the message with `at` in it on, until it is opened."""

    def __init__(self, at=b"data"):
        self.at = at
        self.sent = []
        self.waiting = []
        self.cancelled = 0
        self._open = asyncio.Event()

    async def __call__(self, message):
        if self.at in message["body"]:
            self.waiting.append(message)
            try:
                await self._open.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        self.sent.append(message)

    def open(self):
        self._open.set()

    @property
    def body(self):
        return b"".join(message["body"] for message in self.sent)


# --- sending ---


def test_a_send_that_completes_at_once_costs_no_task(run):
    async def main():
        client = Client(run)
        await turns()
        before = tasks()
        publish(run, "1", "2")
        await client.until(b"data: 2")
        assert len(tasks()) == len(before)
        assert before == {client.task, _Pump.of_running_loop()._task}
        await client.leave()

    asyncio.run(main())


def test_a_send_that_waits_becomes_a_task_and_holds_up_nobody_else(run):
    async def main():
        door = Door()
        slow, quick = Client(run, send=door), Client(run)
        await turns()
        before = tasks()
        publish(run, "1")
        await quick.until(b"data: 1")
        publish(run, "2")
        await quick.until(b"data: 2")
        assert len(tasks() - before) == 1
        assert len(door.waiting) == 1
        door.open()
        await soon(lambda: b"data: 2" in door.body)
        assert len(tasks()) == len(before)
        await slow.leave()
        await quick.leave()

    asyncio.run(main())


def test_chunks_arrive_in_order_whether_the_client_is_slow_or_not(run):
    texts = [f"<{number}>" for number in range(200)]

    async def main():
        client = Client(run, send=lambda message: send(message))

        async def send(message):
            for _ in range(len(client.sent) % 4):
                await asyncio.sleep(0)
            client.sent.append(message)

        for text in texts:
            publish(run, text)
            if len(text) % 2:
                await asyncio.sleep(0)
        await client.until(texts[-1].encode())
        expected = b"".join(f"event: \ndata: {text}\n\n".encode() for text in texts)
        assert client.body == expected
        await client.leave()

    asyncio.run(main())


def test_a_send_may_return_any_awaitable(run):
    async def main():
        sent, futures = [], []

        def send(message):
            sent.append(message["body"])
            future = asyncio.get_running_loop().create_future()
            futures.append(future)
            return future

        client = Client(run, send=send)
        publish(run, "1")
        await soon(lambda: futures)
        publish(run, "2")
        await turns()
        assert len(sent) == 1
        futures[0].set_result(None)
        await soon(lambda: len(futures) == 2)
        assert [b"data: 1" in sent[0], b"data: 2" in sent[1]] == [True, True]
        futures[1].set_result(None)
        await turns()
        await client.leave()

    asyncio.run(main())


def test_a_send_that_waits_several_times_is_sent_through(run):
    async def main():
        client = Client(run, send=lambda message: send(message))

        async def send(message):
            await asyncio.sleep(0)
            first = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(first.set_result, "value")
            assert await first == "value"
            second = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(second.set_exception, KeyError("caught"))
            with pytest.raises(KeyError, match="caught"):
                await second
            client.sent.append(message)

        publish(run, "1")
        await client.until(b"data: 1")
        await client.leave()

    asyncio.run(main())


def test_many_events_that_wait_for_one_client_leave_as_one_chunk(run):
    async def main():
        client = Client(run)
        await turns()
        publish(run, *(str(number) for number in range(100)))
        await client.until(b"data: 99")
        assert len(client.sent) == 1
        await client.leave()

    asyncio.run(main())


def test_an_event_of_another_thread_arrives(run):
    async def main():
        client = Client(run)
        await turns()
        await asyncio.to_thread(publish, run, "1")
        await client.until(b"data: 1")
        await client.leave()

    asyncio.run(main())


def test_the_loop_is_given_back_after_a_batch_of_clients(run):
    number = 3 * BATCH

    async def main():
        clients = [Client(run) for _ in range(number)]
        await turns()
        seen = []

        async def watch():
            while not seen or seen[-1] < number:
                seen.append(sum(b"data" in client.body for client in clients))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await turns(1)
        publish(run, "1")
        await asyncio.wait_for(watching, 10)
        steps = [after - before for before, after in itertools.pairwise(seen)]
        assert max(steps) <= BATCH
        for client in clients:
            await client.leave()

    asyncio.run(main())


# --- the client leaves ---


def test_the_client_leaves(run, ends):
    async def main():
        client = Client(run)
        publish(run, "1")
        await client.until(b"data: 1")
        assert len(open_streams) == 1
        await client.leave()
        assert END not in client.sent
        assert ends == [("client", 1, len(client.body))]
        assert run.stats() == {"channels": 0, "subscriptions": 0}
        assert client.stream not in open_streams.all()

    asyncio.run(main())


def test_other_messages_than_the_disconnect_mean_nothing(run):
    async def main():
        messages = asyncio.Queue()
        client = Client(run, receive=messages.get)
        messages.put_nowait({"type": "http.request", "body": b"more"})
        await turns()
        publish(run, "1")
        await client.until(b"data: 1")
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(client.task, 10)

    asyncio.run(main())


def test_nothing_is_sent_to_a_client_that_has_left(run):
    async def main():
        client = Client(run)
        await turns()
        publish(run, "1")  # the ring, and the disconnect, in one turn of the loop
        client.disconnect.set()
        await asyncio.wait_for(client.task, 10)
        at_the_end = list(client.sent)
        await turns()
        assert client.sent == at_the_end

    asyncio.run(main())


@pytest.mark.parametrize("delay", range(8))
def test_nothing_is_sent_after_the_application_has_ended(run, delay):
    """Whatever the order in which the pump and the application's task hear of their part."""

    async def main():
        client = Client(run)
        await turns()
        sent_when_over = []
        client.task.add_done_callback(lambda task: sent_when_over.append(len(client.sent)))
        client.disconnect.set()
        await turns(delay)
        publish(run, "1")
        client.delivery.ring()
        await asyncio.wait_for(client.task, 10)
        await turns(10)
        assert sent_when_over == [len(client.sent)]

    asyncio.run(main())


@pytest.mark.parametrize("delay", range(6))
def test_a_step_that_comes_when_the_client_has_left_is_not_sent(run, delay):
    async def main():
        go = asyncio.Event()

        async def steps():
            await go.wait()
            yield b"late"
            await asyncio.Event().wait()

        client = Client(run, steps=steps())
        await turns()
        go.set()
        await turns(delay)
        client.disconnect.set()
        await asyncio.wait_for(client.task, 10)
        at_the_end = list(client.sent)
        await turns(10)
        assert client.sent == at_the_end
        assert tasks() == set()

    asyncio.run(main())


def test_an_os_error_of_send_is_the_client_that_has_left(run, ends, caplog):
    async def main():
        sent = []

        async def send(message):
            sent.append(message)
            raise ConnectionResetError("gone")

        client = Client(run, send=send)
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        assert len(sent) == 1

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["client"]
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_os_error_of_a_send_that_waited_is_the_client_that_has_left(run, ends, caplog):
    async def main():
        sent = []

        async def send(message):
            sent.append(message)
            await asyncio.sleep(0)
            raise BrokenPipeError("gone")

        client = Client(run, send=send)
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        assert len(sent) == 1

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["client"]
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_left_when_the_stream_ended_is_no_error(run):
    async def main():
        async def send(message):
            if message == END:
                raise ConnectionResetError("gone")

        client = Client(run, send=send)
        await turns()
        client.stream.end("max_age")
        await asyncio.wait_for(client.task, 10)

    asyncio.run(main())


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_another_error_of_send_ends_that_stream_alone_and_is_logged(run, ends, caplog, waits):
    async def main():
        async def send(message):
            if message["body"]:
                if waits:
                    await asyncio.sleep(0)
                raise ZeroDivisionError("a server's bug")

        client, other = Client(run, send=send), Client(run)
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        publish(run, "2")
        await other.until(b"data: 2")
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["error", "client"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_a_send_that_was_cancelled_within_the_server_ends_that_stream_alone(run, ends, waits):
    """The server awaits a future of its own, which it has cancelled when the connection was lost."""

    async def main():
        async def send(message):
            future = asyncio.get_running_loop().create_future()
            if waits:
                asyncio.get_running_loop().call_soon(future.cancel)
            else:
                future.cancel()
            await future

        client, other = Client(run, send=send), Client(run)
        publish(run, "1")
        await other.until(b"data: 1")
        await asyncio.wait_for(client.task, 10)
        publish(run, "2")
        await other.until(b"data: 2")
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["client", "client"]


def test_an_error_of_send_before_there_is_anything_to_await_ends_that_stream_alone(run, ends, caplog):
    async def main():
        client, other = Client(run, send=lambda message: 1 / 0), Client(run)
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        await other.until(b"data: 1")
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["error", "client"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_what_a_send_raises_when_its_client_has_left_is_nobodys_business(run, ends, caplog):
    async def main():
        async def send(message):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ZeroDivisionError("a server's bug") from None

        client = Client(run, send=send)
        publish(run, "1")
        await turns(10)
        await client.leave()
        await turns()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["client"]
    assert [record for record in caplog.records if record.exc_info] == []


# --- what is around the server's send() ---


def test_a_send_with_a_timeout_of_its_own_harms_no_other_client(run):
    async def main():
        async def send(message):
            if message["body"]:
                await asyncio.wait_for(asyncio.Event().wait(), 0.05)

        client, other = Client(run, send=send), Client(run)
        await turns()
        publish(run, "1")
        await other.until(b"data: 1")
        await asyncio.wait_for(client.task, 10)  # TimeoutError: by now an OSError, and the client's end before
        publish(run, "2")
        await other.until(b"data: 2")
        await other.leave()

    asyncio.run(main())


here = contextvars.ContextVar("here", default="nobody's")


def test_send_runs_in_the_context_of_its_own_client(run):
    """Whoever stands between (tracing, say) has put something there for this request, and not for another."""

    async def main():
        seen = {}

        def sender(name):
            async def send(message):
                seen.setdefault(name, []).append(here.get())
                token = here.set("sending")
                await asyncio.sleep(0)
                here.reset(token)  # ValueError in another context

            return send

        clients = []
        for name in ("a", "b"):
            here.set(name)
            clients.append(Client(run, send=sender(name)))
            await turns()
        here.set("publisher")
        publish(run, "1")
        await soon(lambda: len(seen) == 2)
        await turns()
        publish(run, "2")
        await soon(lambda: all(len(values) == 2 for values in seen.values()))
        for client in clients:
            await client.leave()
        assert seen == {"a": ["a", "a"], "b": ["b", "b"]}

    asyncio.run(main())


def test_an_async_iterator_runs_in_the_context_of_its_own_client(run):
    async def main():
        async def steps():
            while True:
                yield here.get().encode()
                await asyncio.sleep(0.001)

        clients = []
        for name in ("a", "b"):
            here.set(name)
            clients.append(Client(run, steps=steps()))
            await turns()
        for client, name in zip(clients, (b"a", b"b"), strict=True):
            await client.until(name)
        for client in clients:
            await client.leave()
        assert {bytes(set(client.body)) for client in clients} == {b"a", b"b"}

    asyncio.run(main())


def test_the_pump_keeps_nothing_of_its_first_client(run):
    class Thing:
        pass

    var = contextvars.ContextVar("var")

    async def main():
        def begin():
            thing = Thing()
            var.set(thing)
            return Client(run), weakref.ref(thing)

        first, thing = contextvars.copy_context().run(begin)
        await turns()
        other = Client(run)
        await turns()
        await first.leave()
        await turns()
        stream = weakref.ref(first.stream)
        del first
        gc.collect()
        assert (thing(), stream()) == (None, None)
        await other.leave()

    asyncio.run(main())


# --- the stream ends ---


@pytest.mark.parametrize("reason", ["overflow", "max_age"])
def test_a_stream_that_ends_finishes_the_response(run, ends, reason):
    async def main():
        client = Client(run)
        publish(run, "1")
        await turns()
        client.stream.end(reason, b"retry: 5\n\n")
        await asyncio.wait_for(client.task, 10)
        assert client.sent[-1] == END
        assert client.body.endswith(b"data: 1\n\nretry: 5\n\n")
        assert client.delivery.over()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == [reason]


def test_an_iterator_that_finishes_finishes_the_response(run, ends):
    async def main():
        async def steps():
            yield b"only"

        client = Client(run, steps=steps())
        await asyncio.wait_for(client.task, 10)
        assert [message["body"] for message in client.sent] == [b"only", b""]
        assert client.sent[-1] == END

    asyncio.run(main())
    assert ends == [("finished", 1, 4)]


def test_an_iterator_that_fails_finishes_the_response_and_is_logged_once(run, ends, caplog):
    async def main():
        async def steps():
            yield b"first"
            raise ZeroDivisionError("the program's")

        client = Client(run, steps=steps())
        await asyncio.wait_for(client.task, 10)
        assert [message["body"] for message in client.sent] == [b"first", b""]

    asyncio.run(main())
    assert ends == [("error", 1, 5)]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


def test_a_stream_that_was_ended_before_it_began_is_finished(run, ends):
    async def main():
        client = Client(run)
        client.stream.end("shutdown", b"retry: 7\n\n")
        await asyncio.wait_for(client.task, 10)
        assert client.body == b"retry: 7\n\n"
        assert client.sent[-1] == END

    asyncio.run(main())
    assert ends == [("shutdown", 0, 10)]


def test_a_client_that_does_not_take_the_end_is_given_up(run, ends):
    """What was sent before filled the server's buffer: its send() waits from now on."""

    async def main():
        async def send(message):
            if message == END:
                await asyncio.Event().wait()

        client = Client(run, send=send, stall_timeout=0.2)
        publish(run, "1")
        await turns()
        client.stream.end("max_age")
        await asyncio.wait_for(client.task, 2)

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["max_age"]


# --- time ---


def test_heartbeats_break_silence_and_traffic_puts_them_off(run):
    async def main():
        client = Client(run, heartbeat=0.4)
        begun = time.monotonic()
        while time.monotonic() < begun + 1:
            publish(run, "x")
            await asyncio.sleep(0.05)
        assert b":\n\n" not in client.body
        silent = time.monotonic()
        await client.until(b":\n\n:\n\n")
        assert 0.7 < time.monotonic() - silent < 1.8
        await client.leave()

    asyncio.run(main())


def test_no_heartbeat_is_no_heartbeat(run):
    async def main():
        client, other = Client(run), Client(run, heartbeat=0.1)
        await other.until(b":\n\n:\n\n")
        assert client.sent == []
        await client.leave()
        await other.leave()

    asyncio.run(main())


def test_a_client_that_was_slow_for_a_while_has_heartbeats_again(run):
    async def main():
        door = Door()
        client = Client(run, send=door, heartbeat=0.2, stall_timeout=60)
        publish(run, "1")
        await soon(lambda: door.waiting)
        await asyncio.sleep(0.5)  # the clock is looked at meanwhile
        door.open()
        await soon(lambda: b":\n\n" in door.body, timeout=2)
        await client.leave()

    asyncio.run(main())


def test_a_heartbeat_may_have_to_wait_as_any_chunk(run):
    async def main():
        door = Door(at=b":\n\n")
        slow, quick = Client(run, send=door, heartbeat=0.1), Client(run, heartbeat=0.1)
        await soon(lambda: door.waiting)
        before = len(quick.sent)
        await soon(lambda: len(quick.sent) > before + 1)
        assert len(door.waiting) == 1
        await slow.leave()
        await quick.leave()

    asyncio.run(main())


def test_a_heartbeat_that_cannot_be_sent_ends_the_stream(run, ends):
    async def main():
        async def send(message):
            if message["body"]:
                raise ZeroDivisionError("a server's bug")

        client = Client(run, send=send, heartbeat=0.1)
        await asyncio.wait_for(client.task, 2)

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["error"]


def test_a_client_that_does_not_read_is_ended(run, ends):
    async def main():
        door = Door()
        client, other = Client(run, send=door, stall_timeout=0.3), Client(run, stall_timeout=0.3)
        begun = time.monotonic()
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        assert 0.3 <= time.monotonic() - begun < 1.5
        await turns()
        assert door.cancelled == 1
        assert END not in door.sent
        publish(run, "2")
        await other.until(b"data: 2")
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["stalled", "client"]


def test_a_client_that_reads_slowly_is_not_ended(run):
    async def main():
        async def send(message):
            await asyncio.sleep(0.15)

        client = Client(run, send=send, stall_timeout=0.3)
        for number in range(5):
            publish(run, str(number))
            await asyncio.sleep(0.15)
        assert not client.task.done()
        await client.leave()

    asyncio.run(main())


def test_without_a_limit_a_client_may_take_its_time(run):
    async def main():
        door = Door()
        client = Client(run, send=door, max_age=0.2)  # looked at although it is blocked
        publish(run, "1")
        await soon(lambda: door.waiting)
        await asyncio.sleep(0.5)
        assert not client.task.done()
        door.open()
        await asyncio.wait_for(client.task, 3)
        assert door.sent[-1] == END

    asyncio.run(main())


def test_a_stream_ends_when_it_is_too_old(run, ends):
    async def main():
        client = Client(run, max_age=0.5)
        begun = time.monotonic()
        await asyncio.wait_for(client.task, 10)
        assert 0.4 <= time.monotonic() - begun < 1.5  # +-20 %
        assert client.sent == [END]

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["max_age"]


def test_a_stream_that_is_too_old_sends_no_heartbeat_more(run, ends):
    async def main():
        client = Client(run, max_age=0.4, heartbeat=0.05)
        await asyncio.wait_for(client.task, 10)
        assert client.sent[-1] == END

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["max_age"]


def test_traffic_keeps_no_stream_beyond_its_age(run, ends):
    async def main():
        client = Client(run, max_age=0.4)
        while not client.task.done():
            publish(run, "x")
            await asyncio.sleep(0.02)
        assert client.sent[-1] == END

    asyncio.run(asyncio.wait_for(main(), 3))
    assert [reason for reason, *_ in ends] == ["max_age"]


def test_a_stream_that_cannot_be_looked_after_is_ended_and_harms_no_other(run, ends, caplog, monkeypatch):
    silence = Stream.silence
    broken = []
    monkeypatch.setattr(Stream, "silence", lambda stream: 1 / 0 if stream in broken else silence(stream))

    async def main():
        client, other = Client(run, heartbeat=0.1), Client(run, heartbeat=0.1)
        broken.append(client.stream)
        await asyncio.wait_for(client.task, 10)
        await other.until(b":\n\n:\n\n")
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["error", "client"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


# --- the server cancels ---


@pytest.mark.parametrize(("draining", "reason"), [(False, "client"), (True, "shutdown")])
def test_the_server_cancels_the_application(run, ends, draining, reason):
    closed = []

    async def main():
        async def steps():
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                closed.append(True)

        client = Client(run, steps=steps())
        await client.until(b"x")
        open_streams.draining = draining
        client.task.cancel("by the server")
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(client.task, 10)
        assert client.task.cancelled()
        await soon(lambda: closed, timeout=1)
        assert END not in client.sent

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == [reason]


@pytest.mark.parametrize("waits", [False, True], ids=["while it begins", "while its opening is told"])
def test_the_server_cancels_before_the_stream_has_begun(run, ends, waits):
    """Its subscription, its place and its signals are as at any other end."""
    opened = []

    async def receiver(sender, **kwargs):
        opened.append(True)
        await asyncio.Event().wait()

    async def main():
        if waits:
            stream_opened.connect(receiver, sender=View)
        try:
            client = Client(run)
            await (soon(lambda: opened) if waits else turns(0))
            client.task.cancel()
            await asyncio.wait({client.task}, timeout=5)
            assert client.task.cancelled()
        finally:
            stream_opened.disconnect(receiver, sender=View)
        assert ends == ([("client", 0, 0)] if waits else [])
        assert run.stats() == {"channels": 0, "subscriptions": 0} or not waits

    asyncio.run(main())


def test_the_server_cancels_while_a_send_waits(run, ends):
    async def main():
        door = Door()
        client = Client(run, send=door)
        publish(run, "1")
        await soon(lambda: door.waiting)
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(client.task, 10)
        await turns()
        assert door.cancelled == 1
        assert tasks() == set()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["client"]


def test_the_end_of_the_loop_ends_every_stream(run, ends):
    closed = []

    async def main():
        async def steps():
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                closed.append(True)

        clients = [Client(run, steps=steps()) for _ in range(3)]
        for client in clients:
            await client.until(b"x")

    asyncio.run(main())
    assert len(closed) == 3
    assert [reason for reason, *_ in ends] == 3 * ["client"]
    assert _Pump._pumps == {}


# --- nothing is left ---


def test_nothing_is_left_when_the_last_client_has_gone(run):
    async def main():
        clients = [Client(run, heartbeat=10, max_age=60, stall_timeout=30) for _ in range(3)]
        publish(run, "1")
        for client in clients:
            await client.until(b"data: 1")
        loop_pump = weakref.ref(_Pump.of_running_loop())
        for client in clients:
            await client.leave()
        await turns()
        assert tasks() == set()
        assert _Pump._pumps == {}
        await soon(lambda: not [handle for handle in asyncio.get_running_loop()._scheduled if not handle.cancelled()])
        streams = [weakref.ref(client.stream) for client in clients]
        del client, clients
        gc.collect()
        assert [stream() for stream in streams] == 3 * [None]
        assert loop_pump() is None

    asyncio.run(main())


def test_a_client_that_has_gone_is_not_kept_until_its_clock_would_have_been_looked_at(run):
    async def main():
        staying, leaving = Client(run), Client(run, heartbeat=3600)
        await turns()
        await leaving.leave()
        await turns()
        stream = weakref.ref(leaving.stream)
        del leaving
        gc.collect()
        assert stream() is None
        await staying.leave()

    asyncio.run(main())


@pytest.mark.parametrize("delay", range(12))
def test_a_client_that_comes_when_the_last_one_leaves_is_served(run, delay):
    """Whatever part of its end the pump is at."""

    async def main():
        first = Client(run)
        await turns()
        first.disconnect.set()
        await turns(delay)
        second = Client(run, heartbeat=0.1)
        await asyncio.wait_for(first.task, 10)
        await turns(10)
        publish(run, "2")
        await soon(lambda: b"data: 2" in second.body, timeout=1)
        await soon(lambda: b":\n\n" in second.body, timeout=1)
        await second.leave()

    asyncio.run(main())


def test_clients_that_come_and_go_leave_one_clock(run):
    async def main():
        looks = []
        look = _Pump._look
        _Pump._look = lambda self: (looks.append(self), look(self))
        try:
            for _ in range(20):
                client = Client(run)
                await turns()
                await client.leave()
                await turns()
            client = Client(run)
            looks.clear()
            await asyncio.sleep(5.5 * pump.TICK)
            current = [one for one in looks if one is client.delivery._pump]
            assert len(current) <= 6
            await client.leave()
        finally:
            _Pump._look = look

    asyncio.run(main())


def test_each_loop_has_a_pump_of_its_own(run):
    failed = []

    def serve():
        async def main():
            client = Client(run)
            await turns()
            await asyncio.to_thread(barrier.wait, 10)
            await client.until(b"data: 1")
            await client.leave()

        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  (told below)
            failed.append(error)

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait(10)
    publish(run, "1")
    for thread in threads:
        thread.join(10)
    assert failed == []
    assert _Pump._pumps == {}
