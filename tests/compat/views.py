"""
One view per shape in which programs in the wild use django-sse; each docstring names its shape.

They are written as such programs write them, so they know nothing of how the package works inside. Only the names of
channels come by URL where several tests would meet on one. Endless streams tick so that a test sees events arrive one
by one; what a client leaves behind ends by itself.
"""

import itertools
import json
import socket
import threading
import time
from typing import ClassVar

import redis
import sse
from django.contrib.auth import get_user_model
from django.contrib.auth import login as auth_login
from django.contrib.auth.decorators import login_required
from django.contrib.auth.mixins import LoginRequiredMixin
from django.db import connection
from django.http import HttpResponse, HttpResponseForbidden, StreamingHttpResponse
from django.utils.decorators import method_decorator
from django.utils.module_loading import import_string
from django.views.decorators.csrf import csrf_exempt

from django_sse.redisqueue import RedisQueueView, _connect, send_event
from django_sse.views import BaseSseView

TICK = 0.05  # seconds between two events of an endless stream
PREAMBLE = ":" + " " * 2048 + "\n"  # what old browsers and proxies wanted before they showed anything


# --- iterator() -----------------------------------------------------------------------------------------------------


class Clock(BaseSseView):
    """Endless: adds, flushes, sleeps."""

    def iterator(self):
        for n in itertools.count(1):
            self.sse.add_message("time", str(n))
            yield
            time.sleep(TICK)


class SleepsFirst(BaseSseView):
    """Endless: sleeps before it adds."""

    def iterator(self):
        for n in itertools.count(1):
            time.sleep(TICK)
            self.sse.add_message("time", str(n))
            yield


class Polls(BaseSseView):
    """Looks for news in a loop, and mostly finds none: bare yields with nothing buffered."""

    def iterator(self):
        for n in itertools.count(1):
            yield
            if n % 5 == 0:
                self.sse.add_message("news", str(n // 5))
                yield
            yield
            time.sleep(TICK / 5)


class OwnHeartbeat(BaseSseView):
    """Endless: an event of its own keeps the connection alive, called with arguments by name."""

    def iterator(self):
        while True:
            self.sse.add_message(event="heartbeat", text="")
            yield
            time.sleep(TICK)


class Finite(BaseSseView):
    """A generator that comes to an end, with all that self.sse can do."""

    def iterator(self):
        self.sse.set_event_id("7")
        self.sse.add_message("one", "first\nline")
        yield
        self.sse.add_message("", ["plain", b"bytes"])
        self.sse.add_event_named(text="keyword")
        yield
        self.sse.reset_event_id()
        self.sse.add_message(event="three", text="é".encode("latin-1"), encoding="latin-1")
        yield


class Slow(BaseSseView):
    """A finite generator that takes its time between two messages."""

    def iterator(self):
        for n in range(1, 4):
            self.sse.add_message("slow", str(n))
            yield
            time.sleep(TICK)


class OneMessage(BaseSseView):
    """One message and the end: the browser polls by reconnecting after `retry`."""

    def iterator(self):
        self.sse.set_retry(100)
        self.sse.add_message("status", "ready")
        yield


class ReturnsList(BaseSseView):
    """iterator() is no generator: it fills the buffer and returns a list."""

    def iterator(self):
        for n in range(3):
            self.sse.add_message("item", str(n))
        return [None]


class ReturnsGeneratorExpression(BaseSseView):
    """iterator() returns an iterable whose steps fill the buffer."""

    def iterator(self):
        return (self.sse.add_message("item", str(n)) for n in range(3))


class YieldsValues(BaseSseView):
    """Yields dicts, strings and bytes, which have never meant anything."""

    def iterator(self):
        self.sse.add_message("item", "1")
        yield {"event": "no", "data": "no"}
        self.sse.add_message("item", "2")
        yield "event: no\ndata: no\n\n"
        yield b"event: no\ndata: no\n\n"
        yield 0


class EmptyGenerator(BaseSseView):
    """A generator that ends at once."""

    def iterator(self):
        return
        yield


class EmptyList(BaseSseView):
    """iterator() returns nothing to step over."""

    def iterator(self):
        return []


class ReadsRequest(BaseSseView):
    """Reads self.request and self.kwargs."""

    def iterator(self):
        for word in self.request.GET.getlist("word"):
            self.sse.add_message(self.kwargs["room"], f"{self.request.method} {word} {self.request.user}")
            yield


class LastId(BaseSseView):
    """Says what the browser has seen last."""

    def iterator(self):
        self.sse.add_message("last", repr(self.get_last_id()))
        yield


class InstanceState(BaseSseView):
    """Keeps state on the instance, which is one per request."""

    count = 0

    def iterator(self):
        for _ in range(3):
            self.count += 1
            self.sse.add_message("count", str(self.count))
            yield


class ClassState(BaseSseView):
    """Keeps state on the class, which is one per process."""

    visits = 0

    def iterator(self):
        ClassState.visits += 1
        self.sse.add_message("visits", str(ClassState.visits))
        yield


class HelperThread(BaseSseView):
    """A thread fills self.sse; the generator only yields and sleeps."""

    def iterator(self):
        threading.Thread(target=self.fill, daemon=True).start()
        while True:
            yield
            time.sleep(TICK / 10)

    def fill(self):
        for n in range(1, 101):
            self.sse.add_message("filled", str(n))
            time.sleep(TICK / 2)


class SocketLines(BaseSseView):
    """Blocks reading lines from a device, here a socket whose port the client names."""

    def iterator(self):
        with socket.create_connection(("127.0.0.1", int(self.request.GET["port"]))) as device:
            for line in device.makefile("rb"):
                self.sse.add_message("line", line.rstrip(b"\n"))
                yield


class Device(BaseSseView):
    """A try/finally gives a device back when the client has left."""

    busy: ClassVar[set] = set()

    def iterator(self):
        name = self.kwargs["name"]
        self.busy.add(name)
        try:
            for n in itertools.count(1):
                self.sse.add_message("reading", str(n))
                yield
                time.sleep(TICK)
        finally:
            self.busy.discard(name)


def device_state(request, name):
    return HttpResponse("busy" if name in Device.busy else "free")


class QueriesDatabase(BaseSseView):
    """Uses the ORM inside the iterator, and closes the connection for the time it sleeps."""

    def iterator(self):
        users = get_user_model().objects
        for n in range(1, 4):
            name = f"{self.kwargs['prefix']}-{n}"
            users.create(username=name)
            self.sse.add_message("user", users.get(username=name).username)
            connection.close()
            yield
            time.sleep(TICK)


def gevent_timeout(request):
    """The shape of tests.compat.gevent_views, loaded where it is asked for."""
    return import_string("tests.compat.gevent_views.GeventTimeout").as_view()(request)


class FailsAtOnce(BaseSseView):
    """Raises before its first message."""

    def iterator(self):
        raise RuntimeError("a fault of the program")
        yield


class Fails(BaseSseView):
    """Raises after its first message."""

    def iterator(self):
        self.sse.add_message("item", "1")
        yield
        raise RuntimeError("a fault of the program")


# --- dispatch() -----------------------------------------------------------------------------------------------------


class SetsAttributes(BaseSseView):
    """dispatch() sets attributes, calls super(), then adds a message and a header."""

    def dispatch(self, request, *args, **kwargs):
        self.room = kwargs["room"]
        response = super().dispatch(request, *args, **kwargs)
        self.sse.add_message("welcome", self.room)
        response["X-Room"] = self.room
        return response

    def iterator(self):
        self.sse.add_message("room", self.room)
        yield


class CrossOriginMixin:
    """Stands in front of the view and adds a header."""

    def dispatch(self, request, *args, **kwargs):
        response = super().dispatch(request, *args, **kwargs)
        response["Access-Control-Allow-Origin"] = "*"
        return response


class Mixed(CrossOriginMixin, Clock):
    """A mixin in front of an endless view."""


class ExemptOverride(Finite):
    """dispatch() overridden under csrf_exempt, as the original's own is."""

    @method_decorator(csrf_exempt)
    def dispatch(self, request, *args, **kwargs):
        return super().dispatch(request, *args, **kwargs)


@method_decorator(csrf_exempt, name="dispatch")
class ExemptClass(Finite):
    """csrf_exempt on the class."""

    def dispatch(self, request, *args, **kwargs):
        return super().dispatch(request, *args, **kwargs)


class CheckedOverride(Finite):
    """dispatch() overridden without csrf_exempt: Django checks it again."""

    def dispatch(self, request, *args, **kwargs):
        return super().dispatch(request, *args, **kwargs)


class MembersOverride(Clock):
    """login_required on the override of dispatch()."""

    @method_decorator(login_required)
    def dispatch(self, request, *args, **kwargs):
        return super().dispatch(request, *args, **kwargs)


class OwnInit(BaseSseView):
    """__init__ overridden, taking an argument of as_view()."""

    greeting = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = [self.greeting, "world"]

    def iterator(self):
        for word in self.words:
            self.sse.add_message("word", word)
            yield


class OwnInitAlone(BaseSseView):
    """__init__ overridden without a call of the parent's."""

    def __init__(self, **kwargs):
        self.words = ["hello", "world"]

    def iterator(self):
        for word in self.words:
            self.sse.add_message("word", word)
            yield


class WholesaleMixin:
    """dispatch() written anew: the program's own Sse and its own StreamingHttpResponse."""

    def make_sse(self):
        return sse.Sse()

    @method_decorator(csrf_exempt)
    def dispatch(self, request, *args, **kwargs):
        self.sse = self.make_sse()
        self.request = request
        self.args = args
        self.kwargs = kwargs
        response = StreamingHttpResponse(self._iterator(), content_type="text/event-stream")
        response["Cache-Control"] = "no-cache"
        response["Software"] = "django-sse"
        response["X-Accel-Buffering"] = "no"
        return response


class WholesaleClock(WholesaleMixin, Clock):
    """Wholesale and endless."""


class WholesaleFinite(WholesaleMixin, Finite):
    """Wholesale and finite."""


class WholesaleList(WholesaleMixin, ReturnsList):
    """Wholesale over an iterator() that returns a list."""


class WholesaleDevice(WholesaleMixin, Device):
    """Wholesale over an iterator with a try/finally."""


class WholesalePreamble(WholesaleMixin, Clock):
    """Wholesale over an _iterator() of its own, which is a plain generator."""

    def _iterator(self):
        yield PREAMBLE
        for _ in self.iterator():
            yield from self.sse


class WholesaleNoRetry(WholesaleMixin, Finite):
    """Wholesale with Sse(default_retry=0)."""

    def make_sse(self):
        return sse.Sse(default_retry=0)


# --- _iterator() ----------------------------------------------------------------------------------------------------


class Preamble(Clock):
    """_iterator() begins with a comment of 2 KiB and then does what the original does."""

    def _iterator(self):
        yield PREAMBLE
        for _ in self.iterator():
            yield from self.sse


class JoinsPerFlush(Clock):
    """_iterator() sends one chunk per flush."""

    def _iterator(self):
        for _ in self.iterator():
            yield "".join(self.sse)


class EditsChunks(Clock):
    """_iterator() loops over its parent's and edits the text of the chunks."""

    def _iterator(self):
        for chunk in super()._iterator():
            yield chunk.replace("time", "hour")


class Chained(Clock):
    """_iterator() returns its parent's with something in front."""

    def _iterator(self):
        return itertools.chain([PREAMBLE], super()._iterator())


class FinitePreamble(Finite):
    """_iterator() with a preamble over a finite iterator()."""

    def _iterator(self):
        yield PREAMBLE
        for _ in self.iterator():
            yield from self.sse


# --- Sse ------------------------------------------------------------------------------------------------------------


class RefillingSse(sse.Sse):
    """Iterating it reads from a reader and never ends of itself."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader

    def __iter__(self):
        for line in self.reader:
            self.add_message("line", line)
            yield from self._buffer
            self.flush()


class Refills(WholesaleMixin, BaseSseView):
    """One step of iterator(), during which a subclass of Sse goes on for ever."""

    def make_sse(self):
        return RefillingSse(self.read())

    def read(self):
        for n in itertools.count(1):
            yield str(n)
            time.sleep(TICK)

    def iterator(self):
        yield


def one_shot(request):
    """Sse as a formatter, in a view that is no class of the package."""
    buffer = sse.Sse(default_retry=0)
    buffer.add_message("once", "text")
    return HttpResponse("".join(buffer), content_type="text/event-stream")


# --- RedisQueueView -------------------------------------------------------------------------------------------------


class Queue(RedisQueueView):
    """An empty subclass; also mounted with as_view(redis_channel=...)."""


class Board:
    class Events(RedisQueueView):
        """Nested in another class, its channel a class attribute."""

        redis_channel = "compat-nested"


class Room(RedisQueueView):
    """A channel per URL."""

    def get_redis_channel(self):
        return self.kwargs["channel"]


class LivelyRoom(Room):
    """A channel per URL with a heartbeat that a test can wait for."""

    heartbeat = 0.1  # seconds


class PrivateRoom(LoginRequiredMixin, RedisQueueView):
    """A channel per user, for users who are logged in."""

    def get_redis_channel(self):
        return f"compat-user-{self.request.user.username}"


class SeveralRooms(RedisQueueView):
    """Several channels in one stream."""

    def get_redis_channel(self):
        return [f"{self.kwargs['channel']}-{side}" for side in ("left", "right")]


class GuardedRoom(Room):
    """dispatch() asks get_redis_channel() first, with self.kwargs set by hand, and calls the parent by name."""

    def dispatch(self, request, *args, **kwargs):
        self.kwargs = kwargs
        if self.get_redis_channel().endswith("-secret"):
            return HttpResponseForbidden("not for you")
        return RedisQueueView.dispatch(self, request, *args, **kwargs)


class Reassigned(RedisQueueView):
    """Its channel is assigned on the class while the program runs."""


def reassign(request, channel):
    Reassigned.redis_channel = channel
    return HttpResponse("done")


class WholesaleRoom(WholesaleMixin, Room):
    """Wholesale over the stock iterator()."""


class ReturnsParentIterator(Room):
    """iterator() returns the parent's, called by name."""

    def iterator(self):
        return RedisQueueView.iterator(self)


class LoopsOverParentIterator(Room):
    """iterator() loops over the parent's, one step per message, and adds to each."""

    heartbeat = 0.01  # seconds: silence must not look like a message to the loop

    def iterator(self):
        for count, _ in enumerate(RedisQueueView.iterator(self), 1):
            self.sse.add_message("count", str(count))
            yield


class FiltersParentIterator(Room):
    """iterator() looks at what the parent has put into self.sse and throws some of it away."""

    def iterator(self):
        for _ in super().iterator():
            if "secret" in str(self.sse):
                self.sse.flush()
            else:
                yield


class Greets(Room):
    """iterator() sends something of its own, then whatever the parent has."""

    def iterator(self):
        self.sse.add_message("welcome", "hello")
        yield
        yield from super().iterator()


class SurvivesOutage(Room):
    """iterator() catches the error of Redis and tells the client."""

    def iterator(self):
        try:
            for _ in RedisQueueView.iterator(self):
                yield
        except redis.exceptions.ConnectionError:
            self.sse.add_message("outage", "redis is away")
            yield


class TriesAgain(Room):
    """iterator() catches the error of Redis, tells the client, and calls the parent's iterator() anew."""

    def iterator(self):
        while True:
            try:
                yield from RedisQueueView.iterator(self)
            except redis.exceptions.ConnectionError:
                self.sse.add_message("outage", "redis is away")
                yield
                time.sleep(TICK)


class IteratesTwice(Room):
    """iterator() takes one message from the parent's, then calls it a second time for the rest."""

    def iterator(self):
        for _ in RedisQueueView.iterator(self):
            break
        self.sse.add_message("first", "over")
        yield
        for _ in RedisQueueView.iterator(self):
            yield


class QueuePreamble(Room):
    """_iterator() with a preamble over the stock iterator()."""

    def _iterator(self):
        yield PREAMBLE
        for _ in self.iterator():
            yield "".join(self.sse)


class QueueEditsChunks(Room):
    """_iterator() loops over the stock one and edits the text of the chunks."""

    def _iterator(self):
        for chunk in super()._iterator():
            yield chunk.replace("secret", "******")


class QueueChained(Room):
    """_iterator() returns the stock one with something in front."""

    def _iterator(self):
        return itertools.chain([PREAMBLE], super()._iterator())


class QueueTellsOutage(Room):
    """_iterator() catches the error of Redis and tells the client."""

    def _iterator(self):
        try:
            for _ in self.iterator():
                yield from self.sse
        except redis.exceptions.ConnectionError:
            yield "event: outage\ndata: redis is away\n\n"


class OwnPubSub(Room):
    """Holds a blocking pub/sub connection of its own."""

    def iterator(self):
        pubsub = _connect().pubsub()
        pubsub.subscribe(self.get_redis_channel())
        for message in pubsub.listen():
            if message["type"] == "message":
                event, data = json.loads(message["data"].decode("utf-8"))
                self.sse.add_message(event, data)
                yield


class CatchesUp(Room):
    """Replays what was missed since get_last_id() from a list, then follows its own pub/sub with ids."""

    def iterator(self):
        channel = self.get_redis_channel()
        client = _connect()
        pubsub = client.pubsub()
        pubsub.subscribe(channel)
        seen = int(self.get_last_id() or 0)
        for number, text in enumerate(client.lrange(f"history:{channel}", 0, -1), 1):
            if number > seen:
                self.sse.set_event_id(number)
                self.sse.add_message("news", text)
                yield
        for message in pubsub.listen():
            if message["type"] == "message":
                event, data, event_id = json.loads(message["data"])
                self.sse.set_event_id(event_id)
                self.sse.add_message(event, data)
                yield


# --- send_event() ---------------------------------------------------------------------------------------------------


@csrf_exempt
def notify(request):
    """Sends what the form says, the channel by place, or to the default channel."""
    channel = request.POST.get("channel")
    if channel:
        send_event(request.POST["event"], request.POST["data"], channel)
    else:
        send_event(request.POST["event"], request.POST["data"])
    return HttpResponse("sent")


@csrf_exempt
def notify_if_possible(request):
    """Goes on without Redis."""
    try:
        send_event("saved", json.dumps({"id": 1}), channel="compat-saved")
    except redis.exceptions.ConnectionError:
        pass
    return HttpResponse("saved")


# --- users ----------------------------------------------------------------------------------------------------------


def login(request, name):
    """Log a user in without a password."""
    user, _ = get_user_model().objects.get_or_create(username=name)
    auth_login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return HttpResponse(name)
