"""
Promise R, resume, where it is the process that loses Redis: its clients stay, and get what they missed, or are told.

In each test a server has `CLIENTS` clients, each on two channels, and another process publishes on both, straight to
Redis, whatever happens. What the clients got is then accounted for against what was published. `pytest -s` tells it.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from django.test import override_settings

from django_sse.brokers.redis import PAGE_BYTES
from django_sse.redisqueue import send_event, send_events
from tests.brokers.proxy import Proxy
from tests.helpers.client import StreamClient
from tests.helpers.crowd import Crowd
from tests.helpers.durable import DurableRedis
from tests.helpers.eventsource import parse
from tests.helpers.ledger import RESET, Account, read
from tests.helpers.process import Process
from tests.helpers.redis import RedisServer
from tests.helpers.servers import ROOT, serve
from tests.helpers.stall import StallingClient
from tests.helpers.wait import until
from tests.servers.driver import Driver

pytestmark = [pytest.mark.server, pytest.mark.heavy, pytest.mark.timeout(240)]

SETTINGS = "tests.servers.resume_settings"
CLIENTS = 100
RATE = 20  # events a second by each of two publishers on each of two channels
KEPT = 20_000  # events that a channel keeps: more than a test sends
RECOVERY = 45  # seconds after which everybody has everything, once Redis can be reached

# For how many seconds the network is cut, how, and at what rate is published. A process notices a connection that has
# fallen silent for ever by a PING without an answer, after 15 to 30 s.
CUTS = {
    "held-1": (1, "held", 20),
    "refused-1": (1, "refused", 20),
    "held-10": (10, "held", 10),
    "refused-10": (10, "refused", 10),
    "silenced": (0, "silenced", 4),
    "held-60": (60, "held", 4),
    "refused-60": (60, "refused", 4),
}

LONG = ("silenced", "held-60", "refused-60")

SERVERS = ("uvicorn", "gunicorn-gthread", "gunicorn-gevent")
TIMES = 20  # that a subscription is killed, or the network cut for a moment
MOMENT = 0.2  # seconds, at most, between two of them, and of a cut
FEW = 50  # events that a channel keeps where they shall not suffice
PADDING = 50_000  # bytes of an event where much is missed
AHEAD = 100  # events that a history is behind the clients
RETURNS = 5  # of clients that come back
RETURNED = 40  # the latest events, each of which may be the last one that they have

BURST = 10_000  # events
FILLER = "x" * 200  # of each: on the way to a client is room for some hundreds of them
PORTIONS = 10  # in which a slow client takes a burst
MAILBOX = {"EVENTS": 10}
HOUSES = [("uvicorn", "wrapped"), ("uvicorn", "plain"), ("gunicorn-gthread", None), ("gunicorn-gevent", None)]


class Scene:
    """A server, its clients, and a process that publishes to them. The server is on Redis through `proxy`, if any."""

    def __init__(self, redis, *, server="uvicorn", proxy=None, clients=CLIENTS, rate=RATE, padding=0, size=KEPT):
        self.redis = redis
        self.clients = clients
        self._server = server
        self._padding = padding
        self._location = (proxy or redis).location
        self._rate = rate
        self._env = {"TEST_DJANGO_SSE": json.dumps(history(size))}

    def __enter__(self):
        with ExitStack() as stack:
            env = {**self._env, "TEST_REDIS_LOCATION": self._location}
            server = serve(self._server, settings=SETTINGS, env=env, threads=self.clients + 10)
            driver = Driver(stack.enter_context(server))
            self._log = driver.log
            self.channels = [driver.key(), driver.key()]
            self._url = f"{driver.url}/queue/{','.join(self.channels)}"
            self._crowd = stack.enter_context(Crowd(self._url, self.clients))
            self._crowd.wait_open()
            self._publisher = self._publish()
            stack.callback(self._publisher.close)
            self.flow()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        if exc_info[0] is not None:
            print(self._log())  # when the test has failed, the server has been stopped
        self._stack.close()

    def published(self):
        """How many events there were, on the channel where there were fewest, as far as Redis knows."""
        redis = self.redis.client()
        return min(int(redis.hget(f"django-sse:meta:{{{channel}}}", "offset") or 0) for channel in self.channels)

    def kept(self, channel, count=None):
        """The latest `count` events that Redis keeps of `channel`, as `(publisher, number)`, oldest first."""
        entries = self.redis.client().xrevrange(f"django-sse:log:{{{channel}}}", count=count)
        return [read(json.loads(entry[b"payload"])[1])[1:] for _, entry in reversed(entries)]

    def flow(self):
        """Wait until every client has got, on each channel, an event that was published after this call."""
        for channel in self.channels:
            ((publisher, number),) = until(lambda: self.kept(channel, 1), what="an event")  # noqa: B023
            # Redis may have forgotten what the clients have.
            number = max(number, *(latest(member.body, channel, publisher) for member in self._crowd.members))
            self._arrive(channel, publisher, number + 2)

    def fall_silent(self):
        """Have the publishers end."""
        assert self._publisher.stop(signal.SIGTERM, RECOVERY) == 0, self._publisher.log()

    def finish(self):
        """Have the publishers end; return the account of what they sent and the clients got."""
        if self._publisher.returncode is None:
            self.fall_silent()
        sent = json.loads(self._publisher.log().splitlines()[-1])
        try:
            for channel, numbers in sent.items():
                for publisher, number in numbers.items():
                    self._arrive(channel, publisher, number)
        except AssertionError as error:
            print(error)  # the account tells better what has not arrived
        account = Account(clients=self.clients, gone=sum(member.over for member in self._crowd.members))
        kept = {channel: self.kept(channel) for channel in self.channels}
        for body, clients in Counter(bytes(member.body) for member in self._crowd.members).items():
            messages = parse(body)
            for channel in self.channels:
                account.add(messages, channel, sent[channel], kept[channel], clients)
        print(f"{self._server}: {account}")
        return account

    def come_back(self):
        """See that the id of each late event stands for all events before it, also where they came from history."""
        messages = parse(bytes(self._crowd.members[-1].body))
        resets = [number for number, message in enumerate(messages) if message.event == RESET]
        first = max([0, *resets, len(messages) - RETURNED])
        for number in random.choices(range(first, len(messages) - 1), k=RETURNS):
            rest = messages[number + 1 :]
            with StreamClient(self._url, headers={"Last-Event-ID": messages[number].last_event_id}) as client:
                client.wait_for(lambda client: len(client.messages) >= len(rest))  # noqa: B023
                for channel in self.channels:
                    assert of(channel, client.messages) == of(channel, rest)

    def _publish(self):
        arguments = [str(self._rate), str(self._padding), *self.channels]
        command = [sys.executable, "-m", "tests.servers.resume_publisher", *arguments]
        env = {"TEST_REDIS_LOCATION": self.redis.location, "DJANGO_SETTINGS_MODULE": SETTINGS}
        return Process("publisher", command, env={**os.environ, **self._env, **env}, cwd=ROOT)

    def _arrive(self, channel, publisher, number):
        """Wait until every client that is still there has got an event of that number, or a later one."""
        waiting = deque(self._crowd.members)

        def arrived(members):
            while waiting and (waiting[0].over or latest(waiting[0].body, channel, publisher) >= number):
                waiting.popleft()
            return not waiting

        self._crowd.wait_for(arrived, RECOVERY, f"event {number} of {publisher} on {channel}")


def history(size, **more):
    """What `DJANGO_SSE` is with a history of that many events."""
    return {"HISTORY": {"SIZE": size}, **more}


def latest(body, channel, publisher):
    """The number of the latest event of `publisher` on `channel` that `body` has."""
    head = f"data: {channel} {publisher} ".encode()
    start = body.rfind(head) + len(head)
    number, whole, _ = body[start : start + 20].partition(b" ")
    return int(number) if start >= len(head) and whole else 0


def of(channel, messages):
    return [message.data for message in messages if read(message.data)[0] == channel]


def assert_exact(scene):
    """Every client has kept its connection, and got every event once and in order."""
    account = scene.finish()
    assert account == Account(clients=scene.clients, due=account.due, received=account.due)
    scene.come_back()


def assert_told(scene, reason, times=1):
    """Every client has kept its connection, was told once of each loss, and else got every event once and in order."""
    account = scene.finish()
    assert account == Account(
        clients=scene.clients,
        due=account.due,
        received=account.due - account.skipped,
        skipped=account.skipped,
        repeated=account.repeated,
        resets=Counter({(channel, reason): scene.clients * times for channel in scene.channels}),
    )
    scene.come_back()
    return account


@pytest.fixture(scope="module")
def redis():
    """A Redis that loses all data when it is stopped."""
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _running(redis):
    if not redis.running:  # a test that failed in the middle of an outage
        redis.start()


@pytest.fixture(scope="module", autouse=True)
def cuts(request):
    """What becomes of each cut, as a future. They all begin with the module, side by side, to save minutes."""
    items = [item for item in request.session.items if item.parent is request.node]
    wanted = {item.callspec.params.get("cut") for item in items if hasattr(item, "callspec")} & set(CUTS)
    over = threading.Event()
    with ExitStack() as stack:
        if wanted:
            redis = stack.enter_context(RedisServer())
            executor = stack.enter_context(ThreadPoolExecutor(len(wanted)))
            stack.callback(over.set)
        yield {cut: executor.submit(cut_off, redis, *CUTS[cut], over) for cut in wanted}


def cut_off(redis, seconds, how, rate, over):
    """Have a server lose its Redis for so many seconds, or until all is over; see that this has cost no event."""
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy, rate=rate) as scene:
        if how == "silenced":
            proxy.silence()
        elif how == "held":
            proxy.hold()
            over.wait(seconds)
            proxy.release()
        else:
            proxy.refuse()
            over.wait(seconds)
            proxy.admit()
        scene.flow()
        assert_exact(scene)


def later(scene, events=5):
    """Wait until so many more events are published on each channel."""
    enough = scene.published() + events
    until(lambda: scene.published() >= enough, RECOVERY, f"{events} events")


def kill_subscriptions(redis):
    until(lambda: redis.client().client_kill_filter(_type="pubsub"), what="a subscription to kill")


@pytest.mark.parametrize("server", SERVERS)
def test_a_subscription_that_is_killed_again_and_again_costs_no_event(redis, server):
    with Scene(redis, server=server) as scene:
        for _ in range(TIMES):
            kill_subscriptions(redis)
            time.sleep(random.uniform(0, MOMENT))
        scene.flow()
        assert_exact(scene)


def test_a_network_that_comes_and_goes_costs_no_event(redis):
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy) as scene:
        for _ in range(TIMES):
            proxy.refuse()
            time.sleep(random.uniform(0, MOMENT))
            proxy.admit()
            time.sleep(random.uniform(0, MOMENT))
        scene.flow()
        assert_exact(scene)


def test_a_cut_that_nothing_follows_costs_no_event(redis):
    """No later event shows that some are missing."""
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy) as scene:
        proxy.refuse()
        later(scene)
        scene.fall_silent()
        proxy.admit()
        assert_exact(scene)


def test_a_cut_in_which_much_is_missed_costs_no_event(redis):
    """More than Redis returns at one time."""
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy, clients=10, padding=PADDING) as scene:
        proxy.refuse()
        later(scene, 3 * PAGE_BYTES // PADDING)
        proxy.admit()
        scene.flow()
        assert_exact(scene)


def test_a_part_of_what_redis_sent_before_it_gave_the_subscription_up_costs_no_event(redis):
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy) as scene:
        proxy.hold()
        later(scene)
        kill_subscriptions(redis)
        later(scene)
        proxy.release()
        scene.flow()
        assert_exact(scene)


@pytest.mark.parametrize(
    ("server", "keep", "signum"),
    [
        ("uvicorn", "aof", signal.SIGKILL),
        ("uvicorn", "rdb", signal.SIGTERM),
        ("gunicorn-gthread", "aof", signal.SIGKILL),
        ("gunicorn-gevent", "rdb", signal.SIGTERM),
    ],
)
def test_a_redis_that_restarts_with_its_data_costs_no_event(server, keep, signum):
    with DurableRedis(keep) as redis, Scene(redis, server=server) as scene:
        for _ in range(2):
            redis.stop(signum)
            redis.start()
            scene.flow()
        assert_exact(scene)


@pytest.mark.parametrize("server", SERVERS)
def test_a_redis_that_restarts_without_its_data_is_told_once_each_time(redis, server):
    with Scene(redis, server=server) as scene:
        for _ in range(2):
            redis.restart()
            scene.flow()
        assert_told(scene, "epoch", times=2)


def test_data_that_goes_under_an_open_subscription_is_told_once_and_costs_no_event(redis):
    with Scene(redis) as scene:
        redis.client().flushall()
        scene.flow()
        assert assert_told(scene, "epoch").skipped == 0


def test_data_that_goes_while_the_network_is_cut_is_told_once(redis):
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy) as scene:
        proxy.refuse()
        later(scene)
        redis.client().flushall()
        later(scene)
        proxy.admit()
        scene.flow()
        assert_told(scene, "epoch")


@pytest.mark.parametrize("overtaken", [False, True], ids=["behind", "overtaken"])
def test_a_redis_that_restarts_with_older_data_is_told_once(overtaken):
    """Overtaken: when the process comes back, there is another event at the offset of the last one that it has."""
    with DurableRedis("rdb") as redis, Proxy(redis.port) as proxy, Scene(redis, proxy=proxy) as scene:
        redis.client().save()
        later(scene, AHEAD)
        before = scene.published()
        redis.stop(signal.SIGKILL)  # which saves nothing
        if overtaken:
            proxy.refuse()
        redis.start()
        assert scene.published() < before
        if overtaken:
            later(scene, AHEAD + FEW)
            assert scene.published() > before
            proxy.admit()
        scene.flow()
        assert_told(scene, "epoch")


def test_a_cut_that_outlasts_the_history_is_told_once(redis):
    with Proxy(redis.port) as proxy, Scene(redis, proxy=proxy, size=FEW) as scene:
        proxy.refuse()
        later(scene, 2 * FEW)
        proxy.admit()
        scene.flow()
        assert_told(scene, "expired")


@pytest.fixture
def slow(redis):
    """Call with a server and a size of history: a slow client, one that is not, and how to send them events."""
    with ExitStack() as stack:

        def slow(name, app, size):
            settings = history(size, MAILBOX=MAILBOX)
            connection = {"location": redis.location}
            env = {"TEST_DJANGO_SSE": json.dumps(settings), "TEST_REDIS_LOCATION": redis.location}
            app = app and f"tests.servers.applications:{app}"
            server = stack.enter_context(serve(name, settings=SETTINGS, env=env, app=app))
            stack.enter_context(override_settings(DJANGO_SSE=settings, REDIS_SSEQUEUE_CONNECTION_SETTINGS=connection))
            return Slow(stack, Driver(server))

        yield slow


class Slow:
    """A client that is sent a burst, and reads it when it is told to."""

    def __init__(self, stack, driver):
        self.log = driver.log
        self.channel, self._other = driver.key(), driver.key()
        self._sent = 0
        url = f"{driver.url}/queue/"
        self.client = stack.enter_context(StallingClient(url + self.channel))
        self._witness = stack.enter_context(StreamClient(url + self._other))
        assert self.client.read_head() == 200
        self._witness.wait_for(b"id:")

    def burst(self, events):
        """Send so many events at once, and wait until the server has them behind it."""
        numbers = range(self._sent, self._sent + events)
        send_events([("burst", f"{number} {FILLER}") for number in numbers], self.channel)
        self._sent += events
        send_event("over", f"{self._sent}", self._other)
        self._witness.wait_for(f"data: {self._sent}\n".encode())

    def read(self, events):
        """Read until so many events of all that were sent have come, or the last one, in portions."""
        self.client.read_on(f"data: {events - 1} {FILLER}\n\n".encode())

    def finish(self):
        """Send one event more, read all, and return the messages."""
        self.burst(1)
        self.read(self._sent)
        assert self.client.broken is None
        assert not self.client.ended
        assert "reason=overflow" not in self.log()
        return parse(bytes(self.client.body))


on_houses = pytest.mark.parametrize(("name", "app"), HOUSES, ids=["-".join(filter(None, house)) for house in HOUSES])


@on_houses
def test_what_is_too_much_for_a_mailbox_comes_from_history(slow, name, app):
    slow = slow(name, app, 2 * BURST)
    slow.burst(BURST // 2)
    for portion in range(1, PORTIONS + 1):
        slow.read(BURST // 2 * portion // PORTIONS)
        slow.burst(BURST // 2 // PORTIONS)
    messages = slow.finish()
    assert [message.event for message in messages] == ["burst"] * (BURST + 1)
    assert [int(message.data.split()[0]) for message in messages] == list(range(BURST + 1))


def test_what_is_too_much_for_a_mailbox_comes_from_history_also_when_the_process_loses_redis(redis, slow):
    slow = slow("uvicorn", "wrapped", 2 * BURST)
    for portion in range(1, PORTIONS + 1):
        slow.burst(BURST // PORTIONS)
        kill_subscriptions(redis)
        slow.read(BURST // PORTIONS * portion // 2)
    messages = slow.finish()
    assert [int(message.data.split()[0]) for message in messages] == list(range(BURST + 1))


@on_houses
def test_what_is_too_much_for_a_mailbox_and_for_history_is_told(slow, name, app):
    slow = slow(name, app, FEW)
    slow.burst(BURST)
    slow.client.read_on(b"event: stream-reset\n")
    messages = slow.finish()
    next_number = 0
    for before, message in zip([None, *messages], messages, strict=False):
        if message.event == RESET:
            assert before.event != RESET
            assert json.loads(message.data) == {"channels": [slow.channel], "reason": "expired"}
        else:
            number = int(message.data.split()[0])
            # A gap where one is told of, and nowhere else.
            assert (number > next_number) if before and before.event == RESET else (number == next_number)
            next_number = number + 1
    assert next_number == BURST + 1


@pytest.mark.parametrize("cut", [pytest.param(cut, marks=[pytest.mark.heavy] if cut in LONG else []) for cut in CUTS])
def test_a_network_that_is_cut_costs_no_event(cuts, cut):
    cuts[cut].result()
