"""Delivery outside of Django's handler: at once where the client takes it, and never at the cost of another client."""

import asyncio
import contextvars
import gc
import inspect
import itertools
import logging
import random
import re
import sys
import threading
import time
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_sse import contexts, feeds, pump
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

EVENT = re.compile(rb"event: [^\n]*\ndata: ([^\n]*)\n\n")
#: All the ways in which something is taken from a mailbox.
TAKES = [name for name in vars(Runtime) if name.startswith("take")]
END = {"type": "http.response.body", "body": b"", "more_body": False}


class View:
    """The sender of these streams' signals."""


#: How streams may be served: several go in step, each has a buffer that is looked at first, or each is served alone.
KINDS = ["in step", "alike", "alone"]
IN_STEP = pytest.mark.parametrize("run", ["in step"], indirect=True)


@pytest.fixture(params=KINDS)
def run(request):
    """A runtime, and how its streams are served, one with a ``kind`` of its own aside."""
    run = Runtime(MemoryBroker())
    run.kind = request.param
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


def empty_buffer():
    buffer = Sse()
    list(buffer)  # no ``retry``
    return buffer


class Client:
    """One client: `send` and `receive` for the delivery of its stream, which listens to `channels` or has `steps`."""

    def __init__(self, run, *channels, steps=None, send=None, receive=None, max_events=10_000, kind=None, **options):
        kept = {name: options.pop(name) for name in ("heartbeat", "first") if name in options}
        kind = kind or run.kind
        #: The view's buffer. To go in step is for those whose view is gone, and nobody else has its buffer.
        self.sse = None if kind == "in step" else empty_buffer()
        if steps is not None:
            source = Source(steps, lambda value: () if value is None else (value,), **kept)
        else:
            self.mailbox = run.open(channels or ["a"], max_events=max_events, max_bytes=10_000_000)
            if kind != "alone":
                kept["buffer"] = lambda: empty_buffer() if self.sse is None else self.sse
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


def writing(run):
    """Return how a client's stream is served whose view still writes."""
    return "alike" if run.kind == "in step" else run.kind


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


def got(client):
    """The texts that it was sent, and no part of one."""
    assert EVENT.sub(b"", client.body) == b""
    return [text.decode() for text in EVENT.findall(client.body)]


class Gate:
    """A `send` that waits for each message until it is let through, and gives `client.sent` what it let through."""

    def __init__(self):
        self.client = None
        self.waiting = None

    async def __call__(self, message):
        assert self.waiting is None, "the last one is not sent yet"
        self.waiting = asyncio.get_running_loop().create_future()
        try:
            await self.waiting
        finally:
            self.waiting = None
        self.client.sent.append(message)

    def let_through(self):
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


def gated(run, *channels, **options):
    gate = Gate()
    gate.client = Client(run, *channels, send=gate, **options)
    gate.client.gate = gate
    return gate.client


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


# --- several at once ---


def test_all_that_get_the_same_are_sent_the_very_same_bytes(run):
    async def main():
        clients = [Client(run) for _ in range(3)]
        await turns()
        publish(run, "1", "2")
        for client in clients:
            await client.until(b"data: 2")
        bodies = [client.sent[0]["body"] for client in clients]
        assert bodies == [b"event: \ndata: 1\n\nevent: \ndata: 2\n\n"] * 3
        assert run.kind == "alone" or bodies[0] is bodies[1] is bodies[2]
        for client in clients:
            await client.leave()

    asyncio.run(main())


def test_clients_of_different_channels_get_theirs_and_nothing_else(run):
    async def main():
        names = {"a": ["a"], "b": ["b"], "ab": ["a", "b"], "ba": ["b", "a"], "bounded": ["a"]}
        clients = {}
        for name, channels in names.items():
            bound = {"max_events": 5_000} if name == "bounded" else {}
            clients[name] = [Client(run, *channels, **bound) for _ in range(2)]
        await turns()
        publish(run, "1")
        publish(run, "2", channel="b")
        await turns(10)
        publish(run, "3", channel="b")
        publish(run, "4")
        await turns(10)
        both = ["1", "2", "3", "4"]
        expected = {"a": ["1", "4"], "b": ["2", "3"], "ab": both, "ba": both, "bounded": ["1", "4"]}
        assert {name: [got(client) for client in some] for name, some in clients.items()} == {
            name: [texts, texts] for name, texts in expected.items()
        }
        for some in clients.values():
            for client in some:
                await client.leave()

    asyncio.run(main())


@pytest.mark.parametrize("delay", range(8))
def test_a_client_that_comes_in_the_middle_of_everything_gets_all_that_is_published_from_then_on(run, delay):
    async def main():
        first = Client(run)
        await turns()
        publish(run, "before")
        await turns(delay)
        second = Client(run, first=[b"event: \ndata: first\n\n"])
        for number in range(10):
            publish(run, str(number))
            await turns(1)
        await second.until(b"data: 9")
        await first.until(b"data: 9")
        assert got(first) == ["before", *map(str, range(10))]
        assert got(second) == ["first", *map(str, range(10))]
        await first.leave()
        await second.leave()

    asyncio.run(main())


@pytest.mark.parametrize("delay", range(6))
@pytest.mark.parametrize("slow", [False, True], ids=["quick", "slow"])
def test_the_first_chunk_comes_before_any_event(run, delay, slow):
    """Events that were published while the client was still on its way through Django included."""

    async def main():
        other = Client(run)
        await turns()
        client = (gated if slow else Client)(run, first=[b"event: \ndata: first\n\n"])
        publish(run, "1")
        await turns(delay)
        publish(run, "2")
        await turns(10)
        publish(run, "3")
        if slow:
            assert got(client) == []
            while len(client.body) < 4 * len(b"event: \ndata: 1\n\n"):
                client.gate.let_through()
                await turns(1)
        await client.until(b"data: 3")
        assert got(client) == ["first", "1", "2", "3"]
        assert client.sent[0]["body"] == b"event: \ndata: first\n\n"
        await client.leave()
        await other.leave()

    asyncio.run(main())


def test_what_the_view_adds_goes_out_after_the_next_event_and_in_order(run):
    async def main():
        client, other = Client(run, kind=writing(run)), Client(run)
        await turns()
        publish(run, "1")
        await turns(10)
        client.sse.add_message("own", "x")
        client.sse.add_message("own", "y")
        await turns(10)
        assert got(client) == ["1"]
        publish(run, "2")
        await turns(10)
        publish(run, "3")
        await turns(10)
        client.sse.add_message("own", "z")
        publish(run, "4", "5")
        await turns(10)
        assert got(client) == ["1", "2", "x", "y", "3", "4", "5", "z"]
        assert got(other) == ["1", "2", "3", "4", "5"]
        await client.leave()
        await other.leave()

    asyncio.run(main())


def test_what_the_view_adds_to_a_slow_client_waits_for_the_next_event(run):
    async def main():
        client, other = gated(run, kind=writing(run)), Client(run)
        await turns()
        publish(run, "1")
        await soon(lambda: client.gate.waiting)
        client.sse.add_message("own", "x")
        publish(run, "2")
        await turns(10)
        for _ in range(2):
            client.gate.let_through()
            await turns(10)
        assert got(client) == ["1", "2", "x"]
        assert got(other) == ["1", "2"]
        await client.leave()
        await other.leave()

    asyncio.run(main())


def test_what_the_view_adds_goes_with_a_heartbeat_where_no_event_comes(run):
    async def main():
        client = Client(run, heartbeat=0.1, kind=writing(run))
        await turns()
        client.sse.add_message("own", "x")
        await client.until(b":\n\nevent: own\ndata: x\n\n")
        await client.leave()

    asyncio.run(main())


@pytest.fixture
def _small_batches(monkeypatch):
    monkeypatch.setattr(pump, "BATCH", 10)


#: What is 2 batches and a half then.
NUMBER = 25
#: Places in a round: of the first, in the middle and last of a batch, and of others.
PLACES = [0, 5, 9, 10, 24]


def leaves(run, client):
    client.disconnect.set()


def is_ended(run, client):
    client.stream.end("max_age")


def is_shut(run, client):
    client.stream.close("stalled")


def is_cancelled(run, client):
    client.task.cancel()


def fails(run, client):
    client.broken = True


def publishes(run, client):
    publish(run, "more", "and more")


def brings_another(run, client):
    client.brought = Client(run)


def is_written_to(run, client):
    client.sse.add_message("own", "x")


EVENTS = [leaves, is_ended, is_shut, is_cancelled, fails, publishes, brings_another, is_written_to]


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "while it waits"])
@pytest.mark.parametrize("victim", PLACES)
@pytest.mark.parametrize("happens", EVENTS)
def test_whatever_happens_to_one_in_the_middle_of_a_round_harms_no_other(run, happens, victim, waits):
    """It happens while the server is sending to another one, who may have to wait for that."""
    causing = 4

    async def main():
        clients = []

        def sender(number):
            async def send(message):
                if number == causing and b"data: 1\n" in message["body"]:
                    if waits:
                        await asyncio.sleep(0)
                    happens(run, clients[victim])
                    await asyncio.sleep(0)
                if getattr(clients[number], "broken", False):
                    raise ConnectionResetError("gone")
                clients[number].sent.append(message)

            return send

        for number in range(NUMBER):
            kind = writing(run) if happens is is_written_to and number == victim else run.kind
            clients.append(Client(run, send=sender(number), kind=kind))
        await turns()
        publish(run, "0")
        await soon(lambda: b"data: 0" in clients[-1].body)
        publish(run, "1")
        await soon(lambda: b"data: 1" in clients[causing].body)
        publish(run, "2")
        await turns(5)
        publish(run, "3")
        await soon(lambda: all(b"data: 3" in clients[number].body for number in range(NUMBER) if number != victim))
        await turns(10)
        texts = ["0", "1", *(["more", "and more"] if happens is publishes else []), "2", "3"]
        for number in range(NUMBER):
            if number != victim:
                assert got(clients[number]) == texts
        own = got(clients[victim])
        if happens in (publishes, brings_another):
            assert own == texts
        elif happens is is_written_to:
            assert [text for text in own if text != "x"] == texts
            assert own.count("x") == 1
        else:
            assert own == texts[: len(own)]
        if happens is brings_another:
            assert got(clients[victim].brought) == ["2", "3"]
            await clients[victim].brought.leave()
        if happens is is_ended:
            assert own[:2] == ["0", "1"]
            assert clients[victim].sent[-1] == END
        for client in clients:
            client.disconnect.set()
        await asyncio.wait([client.task for client in clients], timeout=10)
        await turns()
        assert tasks() == set()

    asyncio.run(main())


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "while it waits"])
@pytest.mark.parametrize("publisher", PLACES)
def test_an_event_that_is_published_in_the_middle_of_a_round_needs_no_other_to_arrive(run, publisher, waits):
    async def main():
        clients = []

        def sender(number):
            async def send(message):
                clients[number].sent.append(message)
                if number == publisher and b"data: 1\n" in message["body"]:
                    if waits:
                        await asyncio.sleep(0)
                    publish(run, "2")

            return send

        for number in range(NUMBER):
            clients.append(Client(run, send=sender(number)))
        await turns(10)
        publish(run, "1")
        await soon(lambda: all(b"data: 2" in client.body for client in clients), timeout=2)
        assert [got(client) for client in clients] == [["1", "2"]] * NUMBER
        for client in clients:
            await client.leave()

    asyncio.run(main())


def test_clients_that_all_wait_and_come_back_one_by_one_get_everything_once(run):
    texts = [str(number) for number in range(20)]

    async def main():
        clients = [gated(run) for _ in range(30)]
        quick = Client(run)
        await turns()
        order = random.Random(1)
        for text in texts:
            publish(run, text)
            await turns(2)
            for client in order.sample(clients, 10):
                client.gate.let_through()
            await turns(2)
        await quick.until(b"data: 19")
        assert got(quick) == texts
        while any(client.gate.waiting for client in clients):
            for client in clients:
                client.gate.let_through()
            await turns(3)
        assert [got(client) for client in clients] == [texts] * 30
        assert len(tasks()) == 32  # the clients' own, and the pump's
        for client in [*clients, quick]:
            await client.leave()

    asyncio.run(main())


def test_a_client_that_does_not_read_overflows_and_is_told_the_end_once_it_reads(run, ends):
    async def main():
        slow, quick = gated(run, max_events=5), Client(run, max_events=5)
        await turns()
        publish(run, "0")
        await soon(lambda: slow.gate.waiting)
        for number in range(1, 10):
            publish(run, str(number))
            await turns(3)
        assert got(quick) == [str(number) for number in range(10)]
        while not slow.task.done():
            slow.gate.let_through()
            await turns(1)
        assert got(slow) == ["0", "1", "2", "3", "4", "5"]
        assert slow.sent[-1] == END
        await quick.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["overflow", "client"]


def test_a_burst_that_finds_all_of_them_slow_arrives_though_nothing_follows(run):
    """Published in the loop itself, which cannot wait for its own clients: they are slow when they are crowded."""
    texts = [str(number) for number in range(8)]

    async def main():
        clients = [Client(run, max_events=10) for _ in range(3)]
        await turns()
        for round_ in range(3):
            publish(run, *texts)
            assert all(client.mailbox.subscription.slow for client in clients)
            await soon(lambda count=round_ + 1: all(len(got(client)) == 8 * count for client in clients), timeout=2)
            assert not any(client.mailbox.subscription.slow for client in clients)
        assert [got(client) for client in clients] == [texts * 3] * 3
        for client in clients:
            await client.leave()

    asyncio.run(main())


def test_more_than_a_chunk_for_many_is_sent_in_several_and_in_order(run):
    texts = [f"{number}".zfill(5) * 8_000 for number in range(6)]

    async def main():
        clients = [Client(run) for _ in range(BATCH + 5)]
        slow = gated(run)
        clients.append(slow)
        await turns()
        publish(run, *texts)
        for client in clients[:-1]:
            await client.until(texts[-1].encode())
        while not slow.sent or texts[-1].encode() not in slow.sent[-1]["body"]:
            slow.gate.let_through()
            await turns(1)
        for client in clients:
            assert got(client) == texts
            assert len(client.sent) == 3  # 40 kB each; two of them are more than 64 KiB
        for client in clients:
            await client.leave()

    asyncio.run(main())


def test_more_than_a_chunk_for_a_client_that_waits_is_sent_in_several_and_in_order(run):
    texts = [f"{number}".zfill(5) * 8_000 for number in range(12)]

    async def main():
        slow, quick = gated(run), Client(run)
        await turns()
        publish(run, *texts)
        await quick.until(texts[-1].encode())
        while len(slow.sent) < 6:
            slow.gate.let_through()
            await turns(1)
        await turns(10)
        assert got(slow) == got(quick) == texts
        await slow.leave()
        await quick.leave()

    asyncio.run(asyncio.wait_for(main(), 5))


@pytest.mark.parametrize("delay", range(8))
def test_an_event_for_a_client_that_has_just_left_harms_no_other(run, delay):
    async def main():
        other, client = Client(run, "b"), Client(run, "a")
        await turns()
        client.disconnect.set()
        await turns(delay)
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        await turns(10)
        publish(run, "2", channel="b")
        await other.until(b"data: 2")
        await other.leave()

    asyncio.run(main())


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("delay", range(8))
def test_events_for_clients_that_all_leave_in_the_middle_of_a_round_harm_no_other(run, delay):
    async def main():
        other = Client(run, "b")
        clients = [Client(run, "a") for _ in range(NUMBER)]
        await turns()
        publish(run, "1")
        await turns(1)
        for client in clients:
            client.disconnect.set()
        publish(run, "2")
        await turns(delay)
        publish(run, "3")
        await asyncio.wait([client.task for client in clients], timeout=10)
        await turns(10)
        publish(run, "4", channel="b")
        await other.until(b"data: 4")
        await other.leave()

    asyncio.run(main())


def test_a_mistake_of_ours_does_not_end_the_streams_of_a_loop(run, caplog, monkeypatch):
    broken = []

    def once(original):
        def taking(*args, **kwargs):
            if broken:
                raise ZeroDivisionError(broken.pop())
            return original(*args, **kwargs)

        return taking

    for name in TAKES:
        monkeypatch.setattr(Runtime, name, once(getattr(Runtime, name)))

    async def main():
        clients, other = [Client(run) for _ in range(3)], Client(run, "b")
        await turns()
        broken.append("ours")
        publish(run, "1")
        await turns(10)
        assert broken == []
        publish(run, "2", channel="b")
        await other.until(b"data: 2")
        publish(run, "3")
        for client in clients[1:]:
            await client.until(b"data: 3")
        for client in [*clients, other]:
            client.disconnect.set()
        await asyncio.wait([client.task for client in [*clients, other]], timeout=10)

    asyncio.run(main())
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


# --- in step ---


class Tap:
    """A `send` that waits while it is shut, and gives `client.sent` what has gone through."""

    def __init__(self):
        self.client = None
        self._open = asyncio.Event()
        self._open.set()

    async def __call__(self, message):
        await self._open.wait()
        self.client.sent.append(message)

    def shut(self):
        self._open.clear()

    def open(self):
        self._open.set()


def tapped(run, *channels, **options):
    tap = Tap()
    tap.client = Client(run, *channels, send=tap, **options)
    tap.client.tap = tap
    return tap.client


def rows(*clients):
    """How many go in each row, of those in which `clients` do."""
    found = dict.fromkeys(client.delivery.row for client in clients)
    found.pop(None, None)
    return sorted((len(row) for row in found), reverse=True)


async def arrives(run, text, *clients, channel="a"):
    """Publish, and wait until all of them have it."""
    publish(run, text, channel=channel)
    await soon(lambda: all(got(client)[-1:] == [text] for client in clients), timeout=2)


async def all_leave(clients):
    for client in clients:
        client.disconnect.set()
    await asyncio.wait([client.task for client in clients], timeout=10)
    assert all(client.task.done() for client in clients)


@IN_STEP
def test_those_that_listen_to_the_same_go_in_step_once_they_have_had_the_first_event(run):
    async def main():
        clients = [Client(run) for _ in range(3)]
        others = [Client(run, "b") for _ in range(2)]
        await turns()
        await arrives(run, "1", *clients)
        await arrives(run, "2", *others, channel="b")
        assert rows(*clients) == [3]
        assert rows(*others) == [2]
        clients.append(Client(run))
        await turns()
        await arrives(run, "3", *clients)
        assert rows(*clients) == [4]
        assert [got(client) for client in clients] == [["1", "3"]] * 3 + [["3"]]
        await all_leave([*clients, *others])

    asyncio.run(main())


@IN_STEP
def test_what_those_in_step_get_is_taken_once_for_all_of_them(run, monkeypatch):
    calls = []
    for name in TAKES:
        original = getattr(Runtime, name)
        monkeypatch.setattr(
            Runtime, name, lambda *given, _name=name, _as=original: (calls.append(_name), _as(*given))[1]
        )

    async def main():
        clients = [Client(run) for _ in range(BATCH)]
        await turns(10)
        await arrives(run, "1", *clients)
        calls.clear()
        await arrives(run, "2", *clients)
        assert calls == ["take_in_step"]
        assert len({id(client.sent[-1]) for client in clients}) == 1  # the message, too
        await all_leave(clients)

    asyncio.run(main())


@IN_STEP
@pytest.mark.parametrize("place", range(3))
def test_one_that_has_to_wait_leaves_its_row_gets_everything_and_falls_in_again(run, place):
    async def main():
        clients = [tapped(run) if number == place else Client(run) for number in range(3)]
        slow = clients[place]
        others = [client for client in clients if client is not slow]
        await turns()
        await arrives(run, "1", *clients)
        assert rows(slow, *others) == [3]
        slow.tap.shut()
        await arrives(run, "2", *others)
        assert slow.delivery.row is None
        assert rows(*others) == [2]
        await arrives(run, "3", *others)
        await arrives(run, "4", *others)
        assert got(slow) == ["1"]
        slow.tap.open()
        await slow.until(b"data: 4")
        await arrives(run, "5", *clients)
        assert rows(*clients) == [3]
        await arrives(run, "6", *clients)
        assert [got(client) for client in clients] == [["1", "2", "3", "4", "5", "6"]] * 3
        await all_leave(clients)

    asyncio.run(main())


@IN_STEP
def test_all_of_a_row_may_have_to_wait_and_come_back_in_any_order(run):
    async def main():
        clients = [tapped(run) for _ in range(5)]
        await turns()
        await arrives(run, "1", *clients)
        for client in clients:
            client.tap.shut()
        publish(run, "2")
        await soon(lambda: rows(*clients) == [])
        publish(run, "3")
        for client in reversed(clients):
            client.tap.open()
            await client.until(b"data: 3")
        await arrives(run, "4", *clients)
        assert rows(*clients) == [5]
        assert [got(client) for client in clients] == [["1", "2", "3", "4"]] * 5
        await all_leave(clients)

    asyncio.run(main())


@IN_STEP
@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("how", [leaves, fails, is_shut, is_ended, is_cancelled])
@pytest.mark.parametrize("places", [[0], [3], [9], [0, 1, 2], [0, 2, 4, 6, 8], [4, 5], [2, 3, 5, 6], range(7)], ids=str)
def test_those_that_go_while_one_of_their_row_waits_take_nothing_from_the_others(run, how, places):
    """Nobody is left out, or sent the same twice, by those who go from the list that is gone through just then."""
    waiting = 3

    async def main():
        clients, gone = [], asyncio.Event()

        def sender(number):
            async def send(message):
                if number == waiting and b"data: 2" in message["body"]:
                    for place in places:
                        how(run, clients[place])
                    gone.set()
                    for _ in range(3):
                        await asyncio.sleep(0)
                if getattr(clients[number], "broken", False):
                    raise ConnectionResetError("gone")
                clients[number].sent.append(message)

            return send

        for number in range(10):
            clients.append(Client(run, send=sender(number)))
        await turns(10)
        await arrives(run, "1", *clients)
        assert rows(*clients) == [10]
        staying = [client for number, client in enumerate(clients) if number not in places]
        publish(run, "2")
        await gone.wait()
        for text in ("3", "4"):
            await arrives(run, text, *staying)
        assert [got(client) for client in staying] == [["1", "2", "3", "4"]] * len(staying)
        for place in places:
            own = got(clients[place])
            assert own == ["1", "2", "3", "4"][: len(own)]
        assert rows(*staying) == [len(staying)]
        await all_leave(clients)
        await turns()
        assert tasks() == set()

    asyncio.run(main())


@IN_STEP
@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("delay", range(8))
def test_clients_that_come_in_the_middle_of_a_round_get_what_follows_and_fall_in(run, delay):
    async def main():
        clients = [Client(run) for _ in range(NUMBER)]
        await turns(10)
        await arrives(run, "1", *clients)
        publish(run, "2")
        await turns(delay)
        late = [Client(run) for _ in range(3)]
        publish(run, "3")
        await turns(1)
        later = [Client(run) for _ in range(3)]
        await turns(10)
        await arrives(run, "4", *clients, *late, *later)
        assert [got(client) for client in clients] == [["1", "2", "3", "4"]] * NUMBER
        assert [got(client) for client in late] == [["3", "4"]] * 3
        assert [got(client) for client in later] == [["4"]] * 3
        await arrives(run, "5", *clients, *late, *later)
        assert rows(*clients, *late, *later) == [10, 10, 10, 1]
        await all_leave([*clients, *late, *later])

    asyncio.run(main())


@IN_STEP
@pytest.mark.usefixtures("_small_batches")
def test_a_row_is_no_longer_than_a_batch_and_room_in_it_is_for_who_comes(run):
    async def main():
        clients = [tapped(run) for _ in range(NUMBER)]
        await turns(10)
        await arrives(run, "1", *clients)
        assert rows(*clients) == [10, 10, 5]
        clients += [Client(run) for _ in range(9)]
        await turns(10)
        await arrives(run, "2", *clients)
        assert rows(*clients) == [10, 10, 10, 4]
        clients[3].tap.shut()
        publish(run, "3")
        await soon(lambda: clients[3].delivery.row is None)
        clients.append(Client(run))
        await turns(10)
        assert rows(*clients) == [10, 10, 10, 4]
        clients[3].tap.open()
        await clients[3].until(b"data: 3")
        await arrives(run, "4", *clients)
        assert rows(*clients) == [10, 10, 10, 5]
        texts = ["1", "2", "3", "4"]
        assert [got(client) for client in clients] == [texts] * NUMBER + [texts[1:]] * 9 + [texts[3:]]
        await all_leave(clients)

    asyncio.run(main())


@IN_STEP
def test_the_loop_is_given_back_after_a_batch_of_those_in_rows_too(run):
    async def main():
        clients = [Client(run) for _ in range(3 * BATCH)]
        await turns(10)
        await arrives(run, "1", *clients)
        seen = [0]
        publish(run, "2")
        while seen[-1] < len(clients):
            await turns(1)
            seen.append(sum(got(client)[-1] == "2" for client in clients))
        assert {after - before for before, after in itertools.pairwise(seen)} <= {0, BATCH}
        await all_leave(clients)

    asyncio.run(asyncio.wait_for(main(), 10))


@IN_STEP
def test_a_client_whose_buffer_somebody_still_fills_goes_alone_and_gets_its_own(run):
    async def main():
        client, others = Client(run, kind="alike"), [Client(run) for _ in range(3)]
        await turns()
        await arrives(run, "1", client, *others)
        assert client.delivery.share is others[0].delivery.share
        assert client.delivery.row is None
        assert rows(client, *others) == [3]
        client.sse.add_message("own", "x")
        publish(run, "2")
        await client.until(b"data: x")
        await arrives(run, "3", client, *others)
        assert client.delivery.row is None
        assert got(client) == ["1", "2", "x", "3"]
        assert [got(other) for other in others] == [["1", "2", "3"]] * 3
        await all_leave([client, *others])

    asyncio.run(main())


@IN_STEP
@pytest.mark.parametrize("kind", ["coroutine", "object", "future"])
def test_what_some_servers_give_to_await_is_no_python_code_and_keeps_them_out_of_every_row(run, kind):
    async def main():
        async def sending(client, message):
            client.sent.append(message)

        def sender(number):
            def send(message):
                if kind == "future":
                    clients[number].sent.append(message)
                    done = asyncio.get_running_loop().create_future()
                    done.set_result(None)
                    return done
                coroutine = sending(clients[number], message)
                return Awaitable(coroutine) if kind == "object" else coroutine

            return send

        first = [b"event: \ndata: first\n\n"]
        clients = []
        for number in range(3):
            clients.append(Client(run, send=sender(number), first=first))
        others = [Client(run, first=first) for _ in range(2)]
        await soon(lambda: all(got(client) == ["first"] for client in [*clients, *others]))
        await turns(10)
        for text in ("1", "2"):
            await arrives(run, text, *clients, *others)
            assert [client.delivery.any_task for client in clients] == [kind == "future"] * 3
            assert rows(*clients, *others) == ([2] if kind == "future" else [5])
        assert [got(client) for client in [*clients, *others]] == [["first", "1", "2"]] * 5
        await all_leave([*clients, *others])

    asyncio.run(main())


@IN_STEP
def test_one_of_a_row_that_is_taken_for_slow_by_another_thread_goes_alone_until_it_has_caught_up(run):
    """By a publisher that would otherwise have to wait for it. Nothing need follow for it to get what has come."""

    async def main():
        clients = [Client(run) for _ in range(4)]
        client = clients[1]
        others = [one for one in clients if one is not client]
        await turns()
        await arrives(run, "1", *clients)
        for text in ("2", "3"):
            await asyncio.to_thread(client.mailbox.mark, slow=True)
            await arrives(run, text, *clients)
            assert client.delivery.row is None
            assert rows(*others) == [3]
            await soon(lambda: not client.mailbox.subscription.slow)
        await arrives(run, "4", *clients)
        assert rows(*clients) == [4]
        assert [got(one) for one in clients] == [["1", "2", "3", "4"]] * 4
        await all_leave(clients)

    asyncio.run(main())


@IN_STEP
def test_one_of_a_row_may_take_by_itself_what_has_just_come(run):
    """It is looked at for some reason of its own before the row's turn comes."""

    async def main():
        clients = [Client(run) for _ in range(4)]
        await turns()
        await arrives(run, "1", *clients)
        for text in ("2", "3"):
            clients[2].delivery.ring()
            publish(run, text)
            clients[0].delivery.ring()
            await soon(lambda text=text: all(got(client)[-1] == text for client in clients), timeout=2)
        await arrives(run, "4", *clients)
        assert [got(client) for client in clients] == [["1", "2", "3", "4"]] * 4
        assert rows(*clients) == [4]
        await all_leave(clients)

    asyncio.run(main())


@IN_STEP
@pytest.mark.parametrize("how", ["ended", "shut"])
def test_one_of_a_row_that_is_ended_by_another_thread_gets_what_waits_and_the_end(run, ends, how):
    async def main():
        clients = [Client(run) for _ in range(4)]
        client = clients[1]
        others = [one for one in clients if one is not client]
        await turns()
        await arrives(run, "1", *clients)
        publish(run, "2")
        end = client.stream.end if how == "ended" else client.mailbox.close
        thread = threading.Thread(target=end, args=["max_age"])
        thread.start()
        thread.join(10)  # the loop, and so the pump, is held meanwhile
        publish(run, "3")
        await asyncio.wait_for(client.task, 10)
        assert client.sent[-1] == END
        assert got(client) == ["1", "2"]
        await arrives(run, "4", *others)
        assert rows(*others) == [3]
        assert [got(other) for other in others] == [["1", "2", "3", "4"]] * 3
        await all_leave(clients)

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["max_age", "client", "client", "client"]


@IN_STEP
def test_a_row_that_overflows_gets_what_waits_and_the_end(run, ends):
    async def main():
        clients = [Client(run, max_events=5) for _ in range(4)]
        other = Client(run, max_events=50)
        await turns()
        await arrives(run, "0", *clients, other)
        publish(run, *map(str, range(1, 10)))
        await asyncio.wait([client.task for client in clients], timeout=10)
        for client in clients:
            assert got(client) == ["0", "1", "2", "3", "4", "5"]
            assert client.sent[-1] == END
        await other.until(b"data: 9")
        await all_leave([*clients, other])

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["overflow"] * 4 + ["client"]


@IN_STEP
@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("broken", range(3))
def test_a_mistake_with_one_row_leaves_the_other_rows_of_the_round_served(run, caplog, monkeypatch, broken):
    calls = itertools.count()
    take = Runtime.take_in_step

    async def main():
        clients = [Client(run) for _ in range(NUMBER)]
        await turns(10)
        await arrives(run, "1", *clients)
        members = [row.deliveries for row in dict.fromkeys(client.delivery.row for client in clients)]
        monkeypatch.setattr(Runtime, "take_in_step", lambda *given: 1 / 0 if next(calls) == broken else take(*given))
        publish(run, "2")
        await turns(20)
        without = [client for client in clients if got(client) == ["1"]]
        assert [client.delivery for client in without] == members[broken]
        assert sum(got(client) == ["1", "2"] for client in clients) == NUMBER - len(without)
        await arrives(run, "3", *clients)
        assert [got(client) for client in clients] == [["1", "2", "3"]] * NUMBER
        await all_leave(clients)

    asyncio.run(main())
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


@IN_STEP
@pytest.mark.parametrize("broken", range(3))
def test_a_mistake_with_one_row_leaves_nothing_unsent_that_was_taken_for_others(run, monkeypatch, broken):
    calls = itertools.count()
    take = Runtime.take_in_step

    async def main():
        clients = {name: [Client(run, name) for _ in range(3)] for name in "abc"}
        await turns(10)
        monkeypatch.setattr(Runtime, "take_in_step", lambda *given: 1 / 0 if next(calls) == broken else take(*given))
        for name in clients:
            publish(run, "1", channel=name)
        await turns(20)
        sent = [[got(client) for client in some] for some in clients.values()]
        assert sent == [[[]] * 3 if number == broken else [["1"]] * 3 for number in range(3)]
        await all_leave([client for some in clients.values() for client in some])

    asyncio.run(main())


@IN_STEP
@pytest.mark.parametrize("number", [BATCH - 1, BATCH])
def test_those_who_always_have_more_do_not_keep_a_long_row_waiting(run, number):
    text = "x" * 70_000  # more than a chunk

    async def main():
        greedy, clients = Client(run, "greedy"), [Client(run) for _ in range(number)]
        await turns(10)
        await arrives(run, "1", *clients)
        publish(run, text, text, text, channel="greedy")
        publish(run, "2")
        for _ in range(20):
            publish(run, text, channel="greedy")
            await turns(1)
        assert [got(client) for client in clients] == [["1", "2"]] * number
        await all_leave([greedy, *clients])

    asyncio.run(main())


@IN_STEP
@pytest.mark.parametrize(("channels", "number"), [(2, 60), (10, 60), (44, 40)])
def test_where_there_is_always_more_to_do_than_in_one_round_all_have_their_turn(run, channels, number):
    async def main():
        names = [str(channel) for channel in range(channels)]
        clients = {name: [Client(run, name) for _ in range(number)] for name in names}
        await turns(2 * channels)
        for _ in range(4 * channels):
            for name in names:
                publish(run, "x", channel=name)
            await turns(1)
        served = [len(some[0].sent) for some in clients.values()]
        assert 2 * min(served) > max(served)
        await all_leave([client for some in clients.values() for client in some])

    asyncio.run(main())


@IN_STEP
def test_the_account_of_those_in_step_is_their_own(run, ends):
    async def main():
        early = [tapped(run) for _ in range(2)]
        await turns()
        await arrives(run, "1", *early)
        late = Client(run)
        await turns()
        early[0].tap.shut()
        await arrives(run, "2", early[1], late)
        await arrives(run, "3", early[1], late)
        early[0].tap.open()
        await early[0].until(b"data: 3")
        await arrives(run, "4", *early, late)
        for client in (*early, late):
            await client.leave()
        return [("client", len(got(client)), len(client.body)) for client in (*early, late)]

    expected = asyncio.run(main())
    assert ends == expected
    assert [events for _, events, _ in ends] == [4, 4, 3]


class Fate:
    """A `send` that waits, fails or lets its client leave, as chance will have it."""

    def __init__(self, chance, waits):
        self.chance = chance
        self.waits = waits
        self.client = None
        self.sending = False

    async def __call__(self, message):
        assert not self.sending, "one thing at a time"
        assert not self.client.task.done()
        self.sending = True
        try:
            if self.chance.random() < self.waits:
                for _ in range(self.chance.randint(1, 6)):
                    await asyncio.sleep(0)
            fate = self.chance.random()
            if fate < 0.002:
                raise ConnectionResetError("gone")
            if fate < 0.004:
                self.client.disconnect.set()
            self.client.sent.append(message)
        finally:
            self.sending = False


@IN_STEP
@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("waits", [0.02, 0.3], ids=["few wait", "many wait"])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_chance_does_to_the_rows_each_client_gets_all_from_its_coming_to_its_going(
    run, monkeypatch, seed, waits
):
    monkeypatch.setattr(pump, "GONE", 0.01)
    chance = random.Random(seed)
    longest = 0

    async def main():
        nonlocal longest
        clients, published = [], 0

        def join():
            fate = Fate(chance, waits)
            fate.client = client = Client(run, send=fate)
            client.came = published
            clients.append(client)

        for _ in range(40):
            join()
        for _ in range(150):
            act = chance.random()
            if act < 0.6:
                for _ in range(chance.choice([1, 1, 1, 3])):
                    publish(run, str(published))
                    published += 1
            elif act < 0.75:
                join()
            elif act < 0.8:
                chance.choice(clients).disconnect.set()
            await turns(chance.randint(0, 4))
            longest = max([longest, *rows(*(client for client in clients if not client.delivery.over()))])
        publish(run, "last")
        texts = [*map(str, range(published)), "last"]
        await soon(lambda: all(client.task.done() or got(client)[-1:] == ["last"] for client in clients))
        for client in clients:
            own = got(client)
            if client.task.done():
                assert own == texts[client.came :][: len(own)]
            else:
                assert own == texts[client.came :]
        assert sum(not client.task.done() for client in clients) > 20
        await all_leave(clients)
        await turns(10)
        assert tasks() == set()

    asyncio.run(main())
    assert 5 <= longest <= 10


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


@pytest.mark.skipif(sys.version_info < (3, 12), reason="inspect.markcoroutinefunction() came with 3.12")
@pytest.mark.parametrize("fails", ["at the call", "with what it returns"])
def test_a_send_that_only_says_that_it_is_a_coroutine_function_ends_that_stream_alone(run, ends, caplog, fails):
    async def main():
        def send(message):
            return 1 / 0 if fails == "at the call" else "nothing to await"

        client, other = Client(run, send=inspect.markcoroutinefunction(send)), Client(run)
        publish(run, "1")
        await asyncio.wait_for(client.task, 10)
        publish(run, "2")
        await other.until(b"data: 2")
        assert got(other) == ["1", "2"]
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["error", "client"]
    assert len([record for record in caplog.records if record.exc_info]) == 1


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


def test_a_client_to_which_nothing_can_be_sent_holds_no_publisher_up(run, monkeypatch):
    """For the second for which its server may take to say that it has left."""
    waits, wait = [], run._calm.wait
    monkeypatch.setattr(run._calm, "wait", lambda timeout: waits.append(timeout) or wait(timeout))

    async def main():
        async def send(message):
            raise ConnectionResetError("gone")

        client = Client(run, send=send, max_events=100)
        await turns()
        publish(run, "1")
        await turns(10)
        assert not client.task.done()
        await asyncio.to_thread(publish, run, *map(str, range(90)))
        assert waits == []
        await asyncio.wait_for(client.task, 10)

    asyncio.run(main())


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


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_what_send_does_at_the_call_happens_in_the_context_of_its_own_client(run, waits):
    """It need be no coroutine function: one that stands around another may do its part and return that one's."""

    async def main():
        seen = []

        async def sent():
            if waits:
                await asyncio.sleep(0)
            seen.append(here.get())

        def sender(name):
            def send(message):
                seen.append(here.get())
                here.set(f"{here.get()}, {name} sending")
                return sent()

            return send

        clients = []
        for name in ("a", "b"):
            here.set(name)
            clients.append(Client(run, send=sender(name)))
            await turns()
        here.set("publisher")
        publish(run, "1")
        await soon(lambda: len(seen) == 4)
        assert sorted(seen) == ["a", "a, a sending", "b", "b, b sending"]
        publish(run, "2")
        await soon(lambda: len(seen) == 8)
        assert "a, a sending, a sending" in seen
        for client in clients:
            await client.leave()
        assert not [text for text in seen if "a" in text.split(", ")[0] and "b sending" in text]
        late = Client(run, send=sender("c"))
        publish(run, "3")
        await soon(lambda: len(seen) == 10)
        assert seen[8:] == ["publisher", "publisher, c sending"]
        await late.leave()

    asyncio.run(main())


class Server:
    """A server's part for one client: its `send` is a method."""

    def __init__(self, seen, waits=False):
        self.seen = seen
        self.waits = waits

    async def send(self, message):
        if self.waits:
            await asyncio.sleep(0)
        self.seen.append(here.get())


@pytest.fixture
def lifespan(monkeypatch):
    """Begins the server, where `here` has this value."""
    monkeypatch.setattr(contexts, "_common", contextvars.Context())

    def begin(value):
        context = contextvars.copy_context()
        context.run(here.set, value)
        context.run(contexts.begin)
        return context

    return begin


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_a_servers_method_sees_what_stands_around_its_own_request_and_around_all(run, lifespan, waits):
    async def main():
        common = lifespan("all")
        names = ["all", "a", "all", "b", "nobody's"]
        seen = [[] for _ in names]
        clients = []
        for name, own in zip(names, seen, strict=True):
            context = common.copy() if name == "all" else contextvars.copy_context()
            if name not in ("all", "nobody's"):
                context.run(here.set, name)
            clients.append(context.run(Client, run, send=Server(own, waits).send))
        await turns()
        for text in ("1", "2"):
            publish(run, text)
            await soon(lambda text=text: all(len(own) == int(text) for own in seen))
        assert seen == [[name] * 2 for name in names]
        assert [client.delivery.context is None for client in clients] == [name == "all" for name in names]
        await all_leave(clients)

    asyncio.run(main())


def test_a_servers_method_sees_nothing_of_the_request_that_came_first(run, lifespan):
    """It is that one which has the pump's task made, and those of who waits come after it."""

    async def main():
        common, other = lifespan("all"), contextvars.copy_context()
        other.run(here.set, "the first's")
        seen = []
        first = other.run(Client, run, send=Server([], waits=True).send)
        await turns()
        client = common.copy().run(Client, run, send=Server(seen).send)
        for text in ("1", "2"):
            publish(run, text)
            await turns(10)
        assert seen == ["all", "all"]
        await all_leave([first, client])

    asyncio.run(main())


def test_what_stands_around_a_servers_method_has_the_context_of_its_own_request(run, lifespan):
    """A function, as most of what stands there, though nothing has been set for the request until then."""

    async def main():
        common = lifespan("all")
        seen = [[], []]

        def around(own):
            send = Server(own).send

            async def sending(message):
                here.set(f"{here.get()}, sent")
                await send(message)

            return sending

        clients = [common.copy().run(Client, run, send=around(own)) for own in seen]
        method = common.copy().run(Client, run, send=Server(untouched := []).send)
        await turns()
        for text in ("1", "2"):
            await turns(10)
            publish(run, text)
            await soon(lambda text=text: all(len(own) == int(text) for own in [*seen, untouched]))
        assert seen == [["all, sent", "all, sent, sent"]] * 2
        assert untouched == ["all", "all"]
        await all_leave([*clients, method])

    asyncio.run(main())


def test_a_send_is_one_task_from_its_call_to_its_end_and_no_other_clients(run):
    async def main():
        seen = {}

        def sender(name):
            async def send(message):
                task = asyncio.current_task()
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
                assert asyncio.current_task() is task
                assert task not in seen.values()
                seen[name] = task

            return send

        clients = [Client(run, send=sender(name)) for name in "abc"]
        publish(run, "1")
        await soon(lambda: len(seen) == 3)
        for client in clients:
            await client.leave()

    asyncio.run(main())


needs_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout() and TaskGroup came with 3.11")


@pytest.mark.parametrize(
    "around",
    [
        pytest.param("timeout", marks=needs_311),
        pytest.param("timeout that is over", marks=needs_311),
        pytest.param("task group", marks=needs_311),
        pytest.param("task group that fails", marks=needs_311),
        "wait_for",
        "wait_for that is over",
        "context",
        "lock",
    ],
)
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_a_send_may_open_around_its_wait_what_belongs_to_a_task_and_a_context(run, caplog, around, waits):
    """Middleware does so: with a limit in time for a send, a span of tracing, a lock for what it shares."""
    lock = asyncio.Lock()

    async def pause():
        if waits:
            await asyncio.sleep(0)
            await asyncio.sleep(0.001)

    async def fail():
        raise KeyError("the group's")

    async def group_that_fails():
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await asyncio.Event().wait()

    async def middleware():
        if around == "timeout":
            async with asyncio.timeout(10):
                await pause()
        elif around == "timeout that is over":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.Event().wait()
            await pause()
        elif around == "task group":
            async with asyncio.TaskGroup() as group:
                task = group.create_task(pause())
                await pause()
            assert task.done()
        elif around == "task group that fails":
            with pytest.raises(BaseExceptionGroup):  # noqa: F821  # of 3.11
                await group_that_fails()
            await pause()
        elif around == "wait_for":
            await asyncio.wait_for(pause(), 10)
        elif around == "wait_for that is over":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.001)
            await pause()
        elif around == "context":
            token = here.set("inside")
            await pause()
            assert here.get() == "inside"
            here.reset(token)
        else:
            async with lock:
                await pause()

    async def main():
        clients = []

        def sender(number):
            async def send(message):
                assert here.get() == str(number)
                await middleware()
                assert here.get() == str(number)
                clients[number].sent.append(message)

            return send

        for number in range(4):
            here.set(str(number))
            clients.append(Client(run, send=sender(number)))
        here.set("nobody's")
        clients.append(Client(run))
        for text in ("1", "2", "3"):
            publish(run, text)
            await turns(10)
        for client in clients:
            await client.until(b"data: 3")
            assert got(client) == ["1", "2", "3"]
        for client in clients:
            await client.leave()

    asyncio.run(main())
    assert [record for record in caplog.records if record.exc_info] == []


class Awaitable:
    """What may be awaited, and is neither a coroutine nor a future."""

    def __init__(self, coroutine):
        self._coroutine = coroutine

    def __await__(self):
        return self._coroutine.__await__()


@pytest.mark.parametrize("kind", ["object", "future", "task"])
@pytest.mark.parametrize("waits", [False, True], ids=["done", "not done"])
def test_what_send_returns_need_not_be_a_coroutine(run, kind, waits):
    async def main():
        client, other = Client(run, send=lambda message: send(message)), Client(run)

        async def sending(message):
            if waits:
                await asyncio.sleep(0.001)
            client.sent.append(message)

        def send(message):
            if kind == "object":
                return Awaitable(sending(message))
            if kind == "task":
                return asyncio.ensure_future(sending(message))
            future = asyncio.get_running_loop().create_future()
            client.sent.append(message)
            if waits:
                asyncio.get_running_loop().call_later(0.001, future.set_result, None)
            else:
                future.set_result(None)
            return future

        for text in ("1", "2", "3"):
            publish(run, text)
            await turns(3)
        await client.until(b"data: 3")
        await other.until(b"data: 3")
        assert got(client) == got(other) == ["1", "2", "3"]
        await client.leave()
        await other.leave()

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


# --- eager tasks ---

needs_eager_tasks = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")


@needs_eager_tasks
def test_a_client_is_sent_one_thing_at_a_time_with_eager_tasks_too(run):
    texts = [f"{number}".zfill(3) * 10_000 for number in range(10)]

    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        clients = [gated(run) for _ in range(3)]
        publish(run, *texts)
        await turns(10)
        while any(len(client.sent) < 4 for client in clients):  # 3 events of 30 kB are more than 64 KiB
            for client in clients:
                client.gate.let_through()
            await turns(3)
        assert [got(client) for client in clients] == [texts] * 3
        for client in clients:
            await client.leave()

    asyncio.run(main())


@needs_eager_tasks
def test_the_clock_goes_on_with_eager_tasks_too(run):
    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        doors = [Door() for _ in range(5)]
        clients = [Client(run, send=door, heartbeat=0.2) for door in doors]
        await turns()
        publish(run, "1")
        await soon(lambda: all(door.waiting for door in doors))
        for door in doors:
            door.open()
        await soon(lambda: all(b":\n\n" in door.body for door in doors), timeout=3)
        late = Client(run, heartbeat=0.2)
        await late.until(b":\n\n")
        assert late.delivery._pump is clients[0].delivery._pump
        for client in [*clients, late]:
            await client.leave()
        await turns()
        assert tasks() == set()

    asyncio.run(main())


@needs_eager_tasks
def test_many_clients_may_have_to_wait_at_one_time_with_eager_tasks_too(run, caplog):
    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        clients = [gated(run) for _ in range(500)]
        quick = Client(run)
        await turns()
        publish(run, "1")
        await quick.until(b"data: 1")
        await soon(lambda: all(client.gate.waiting for client in clients))
        for client in clients:
            client.gate.let_through()
        await soon(lambda: all(client.sent for client in clients))
        for client in [*clients, quick]:
            client.disconnect.set()
        await asyncio.wait([client.task for client in [*clients, quick]], timeout=10)

    asyncio.run(main())
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("eager", [False, pytest.param(True, marks=needs_eager_tasks)], ids=["plain", "eager"])
def test_an_iterator_that_finishes_while_its_client_is_slow_finishes_the_response(run, eager):
    async def main():
        if eager:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        door, go, gone = Door(at=b":\n\n"), asyncio.Event(), []

        async def steps():
            try:
                yield b"only"
                await go.wait()
            finally:
                gone.append(asyncio.current_task())

        client = Client(run, steps=steps(), send=door, heartbeat=0.1)
        await soon(lambda: door.waiting)
        go.set()
        await soon(lambda: gone and gone[0].done())
        door.open()
        await asyncio.wait_for(client.task, 2)
        assert [message["body"] for message in door.sent] == [b"only", b":\n\n", b""]

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


def test_heartbeats_and_events_are_all_in_the_account(run, ends):
    async def main():
        clients = [Client(run, heartbeat=0.1) for _ in range(2)]
        await turns()
        publish(run, "1")
        for client in clients:
            await client.until(b":\n\n:\n\n")
        publish(run, "2")
        for client in clients:
            await client.until(b"data: 2")
            await client.leave()
        return sorted(len(client.body) for client in clients)

    sent = asyncio.run(main())
    assert sorted(size for _, _, size in ends) == sent
    assert [events for _, events, _ in ends] == [2, 2]


def test_those_that_stalled_together_are_given_up_a_few_at_a_time(run, ends, monkeypatch):
    monkeypatch.setattr(pump, "ENDS", 3)
    look, over = _Pump._look, []

    async def main():
        doors = [Door() for _ in range(10)]
        clients = [Client(run, send=door, stall_timeout=0.2) for door in doors]
        monkeypatch.setattr(
            _Pump, "_look", lambda one: (over.append(sum(client.delivery.over() for client in clients)), look(one))
        )
        await turns()
        publish(run, "1")
        await soon(lambda: all(door.waiting for door in doors))
        await asyncio.wait_for(asyncio.wait([client.task for client in clients]), 10)

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["stalled"] * 10
    assert max(after - before for before, after in itertools.pairwise([*over, 10])) <= 3


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
    look = Delivery.look
    broken = []
    monkeypatch.setattr(Delivery, "look", lambda one, now: 1 / 0 if one._stream in broken else look(one, now))

    async def main():
        client, other = Client(run, heartbeat=0.1), Client(run, heartbeat=0.1)
        broken.append(client.stream)
        await asyncio.wait_for(client.task, 10)
        await other.until(b":\n\n:\n\n")
        await other.leave()

    asyncio.run(main())
    assert [reason for reason, *_ in ends] == ["error", "client"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


class Impatient:
    """A `send` that is an object, and gives its client a moment."""

    async def __call__(self, message):
        async with asyncio.timeout(0.05):
            if b"data" in message["body"]:
                await asyncio.Event().wait()


async def _as_a_function(message):
    await Impatient()(message)


class Awaited:
    """What is awaited may be an object of Python code, too."""

    def __init__(self, message):
        self.message = message

    def __await__(self):
        return _as_a_function(self.message).__await__()


@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="asyncio.timeout() came with Python 3.11")
@pytest.mark.parametrize(
    "send", [Impatient(), lambda m: _as_a_function(m), Awaited], ids=["object", "lambda", "awaitable"]
)
def test_a_timeout_around_a_send_ends_that_send_alone(run, send):
    async def main():
        slow, other = Client(run, "slow", send=send), Client(run, "a")
        await turns()
        publish(run, "1", channel="slow")
        await soon(lambda: not slow.delivery.takes)
        await asyncio.sleep(0.1)  # the timeout
        publish(run, "2")
        await other.until(b"data: 2")
        await slow.leave()
        await other.leave()

    asyncio.run(main())


def test_streams_that_nobody_serves_any_more_end(run):
    async def main():
        clients = [Client(run, "a") for _ in range(3)]
        await turns()
        _Pump.of_running_loop()._task.cancel()
        await soon(lambda: all(client.task.done() for client in clients))
        later = Client(run, "a")
        await turns()
        publish(run, "1")
        await later.until(b"data: 1")
        await later.leave()
        assert not _Pump._pumps

    asyncio.run(main())


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


def test_nobody_rings_for_clients_that_have_gone(run):
    """Although others, of another loop or of a server's thread, still listen to the same."""

    async def main():
        clients = [Client(run) for _ in range(2)]
        await turns()
        other = run.open(["a"], max_events=10_000, max_bytes=10_000_000)
        assert other.audience is clients[0].mailbox.audience
        await clients[0].leave()
        publish(run, "1")
        await clients[1].until(b"data: 1")
        loop_pump = weakref.ref(_Pump.of_running_loop())
        await clients[1].leave()
        await turns()
        assert not other.audience.bells
        clients.clear()
        gc.collect()
        assert loop_pump() is None
        other.close()

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


# --- whatever happens ---

SLOWNESS = st.sampled_from(["at once", "turns", "later", "object", "future"])
STEP = st.one_of(
    st.tuples(st.just("join"), st.sampled_from(["a", "a", "b", "ab"]), SLOWNESS, st.sampled_from(KINDS)),
    st.tuples(st.just("publish"), st.sampled_from("aab"), st.integers(1, 12), st.booleans()),
    st.tuples(st.just("turns"), st.integers(1, 6)),
    st.tuples(st.just("sleep")),
    st.tuples(st.sampled_from(["leave", "end", "write", "fail"]), st.integers(0, 30)),
)


class Story:
    """Clients that come and go while events are published, and what each of them must have been sent."""

    def __init__(self, run, seed):
        self.run = run
        self.random = random.Random(seed)
        self.clients = []
        self.published = 0

    async def join(self, channels, slowness, kind):
        first = [b"event: \ndata: first\n\n"]
        client = Client(self.run, *channels, first=first, send=lambda message: send(message), kind=kind)
        client.channels = channels
        client.expected, client.written = ["first"], []
        client.state = "there"
        client.broken = False
        self.clients.append(client)

        async def sending(message):
            for _ in range(self.random.randint(0, 4) if slowness != "at once" else 0):
                await asyncio.sleep(0)
            if slowness == "later" and self.random.random() < 0.5:
                await asyncio.sleep(0.001)
            if client.broken:
                raise BrokenPipeError("gone")
            client.sent.append(message)

        def send(message):
            assert not client.task.done()
            if slowness == "object":
                return Awaitable(sending(message))
            return asyncio.ensure_future(sending(message)) if slowness == "future" else sending(message)

    async def publish(self, channel, count, in_thread):
        texts = [f"{channel}{self.published + number}" for number in range(count)]
        self.published += count
        for client in self.clients:
            if channel in client.channels and client.state != "ended":  # one that leaves may still be sent some
                client.expected += texts
        if in_thread:
            await asyncio.to_thread(publish, self.run, *texts, channel=channel)
        else:
            publish(self.run, *texts, channel=channel)

    async def turns(self, number):
        await turns(number)

    async def sleep(self):
        await asyncio.sleep(0.002)

    def one(self, number):
        """One of the clients that are there."""
        there = [client for client in self.clients if client.state == "there"]
        return there[number % len(there)] if there else None

    async def leave(self, number):
        if client := self.one(number):
            client.state = "left"
            client.disconnect.set()

    async def fail(self, number):
        if client := self.one(number):
            client.state = "left"
            client.broken = True

    async def end(self, number):
        if client := self.one(number):
            client.state = "ended"
            client.stream.end("max_age")

    async def write(self, number):
        client = self.one(number)
        if client is not None and client.sse is not None:
            client.written.append(f"own {len(client.written)}")
            client.sse.add_message("own", client.written[-1])

    async def is_told(self, steps):
        for name, *arguments in steps:
            await getattr(self, name)(*arguments)
        await self.publish("a", 1, False)
        await self.publish("b", 1, False)
        there = [client for client in self.clients if client.state == "there"]
        ended = [client for client in self.clients if client.state == "ended"]
        for client in there:
            await soon(lambda client=client: client.expected[-1].encode() in client.body, timeout=2)
        await asyncio.wait([client.task for client in ended] or [asyncio.ensure_future(turns(1))], timeout=10)
        await turns(10)
        for client in self.clients:
            texts = got(client)
            events = [text for text in texts if not text.startswith("own")]
            written = [text for text in texts if text.startswith("own")]
            if client.state == "left":
                assert events == client.expected[: len(events)]
                assert written == client.written[: len(written)]
            else:
                assert events == client.expected
                assert written == client.written[: len(written)]
                assert client.state == "ended" or written == client.written
                assert (client.sent[-1] == END) == (client.state == "ended")
            client.disconnect.set()
        await asyncio.wait([client.task for client in self.clients] or [asyncio.ensure_future(turns(1))], timeout=10)
        await turns()
        assert [client.task.exception() for client in self.clients] == [None] * len(self.clients)
        await soon(lambda: tasks() == set())
        assert self.run.stats() == {"channels": 0, "subscriptions": 0}


@given(steps=st.lists(STEP, min_size=5, max_size=40), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_every_client_gets_what_was_published_while_it_was_there_once_and_in_order(steps, seed):
    """In batches of three clients, and chunks of about three events."""
    run = Runtime(MemoryBroker())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pump, "BATCH", 3)
        patch.setattr(pump, "GONE", 0.01)
        for module in (pump, feeds):
            patch.setattr(module, "CHUNK_BYTES", 50)
        asyncio.run(Story(run, seed).is_told(steps))
    run.close()
