"""A stream that waits holds no database connection and no thread; what is still needed is not taken away."""

import asyncio
import gc
import logging
import threading

import pytest
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, async_to_sync, sync_to_async
from django.contrib.auth.models import Group
from django.db import connections, transaction
from django.db.backends.signals import connection_created
from django.http import HttpResponse, StreamingHttpResponse
from django.test import RequestFactory
from django.urls import path
from django.utils.decorators import sync_only_middleware

from django_sse import database
from django_sse.database import (
    OwnThread,
    arelease_connections,
    arelease_idle,
    lend,
    release_connections,
    release_idle,
    stepping,
)
from django_sse.redisqueue import RedisQueueView
from django_sse.registry import open_streams
from django_sse.signals import stream_closed, stream_opened
from django_sse.views import BaseSseView
from tests.helpers.asgi import SERVERS, Exchange, application, leaves_the_body
from tests.helpers.loops import needs_loops, soon
from tests.helpers.project import AEndless, Endless, nothing_subscribed, project

FILE = "file"
ROWS = 20


class Opened(list):
    """The wrappers of all connections to the file that were opened: those of other threads too, and of ended ones."""

    @property
    def still(self):
        return [connection for connection in self if connection.connection is not None]


@pytest.fixture
def opened(tmp_path, django_db_blocker):
    """A database in a file, with a table of a few rows; what was opened to it."""
    opened = Opened()

    def note(connection, **kwargs):
        if connection.alias == FILE and connection not in opened:
            opened.append(connection)

    with django_db_blocker.unblock():
        connections.settings[FILE] = {**connections.settings["default"], "NAME": str(tmp_path / "db.sqlite3")}
        with connections[FILE].cursor() as cursor:
            cursor.execute("CREATE TABLE auth_group (id INTEGER PRIMARY KEY, name VARCHAR(150))")
        del cursor
        Group.objects.using(FILE).bulk_create(Group(name=f"<{number}>") for number in range(ROWS))
        connections[FILE].close()
        connection_created.connect(note)
        yield opened
        connection_created.disconnect(note)
        connections[FILE].close()
        del connections[FILE]
        del connections.settings[FILE]


@pytest.fixture(autouse=True)
def _project():
    with project(__name__):
        yield


def count():
    return Group.objects.using(FILE).count()


def query():
    """Use the database in this thread; return the thread."""
    assert count() == ROWS
    return threading.current_thread()


def is_open():
    return connections[FILE].connection is not None


class AutocommitOff:
    def __enter__(self):
        connections[FILE].set_autocommit(False)

    def __exit__(self, *exc_info):
        connections[FILE].rollback()
        connections[FILE].set_autocommit(True)


# --- this thread's ---


@pytest.mark.parametrize("release", [release_connections, release_idle])
def test_what_is_not_needed_is_closed_and_opened_again(opened, release):
    query()
    assert is_open()
    release()
    assert not is_open()
    release()
    query()
    assert is_open()


@pytest.mark.parametrize("release", [release_connections, release_idle])
@pytest.mark.parametrize(
    "keeper", [lambda: transaction.atomic(using=FILE), AutocommitOff], ids=["atomic", "autocommit"]
)
def test_a_transaction_keeps_its_connection(opened, release, keeper):
    with keeper():
        Group.objects.using(FILE).create(name="new")
        release()
        assert is_open()
        assert count() == ROWS + 1
    release()
    assert not is_open()


def test_a_database_in_memory_keeps_what_is_in_it(opened):
    with connections["default"].cursor() as cursor:
        cursor.execute("CREATE TABLE kept (id INTEGER)")
    try:
        release_connections()
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT count(*) FROM kept")
            assert cursor.fetchone() == (0,)
    finally:
        with connections["default"].cursor() as cursor:
            cursor.execute("DROP TABLE kept")


def test_a_connection_that_cannot_be_closed_is_logged(opened, caplog, monkeypatch):
    query()
    with monkeypatch.context() as patch:
        patch.setattr(connections[FILE], "close", lambda: 1 / 0)
        release_connections()
    [record] = [record for record in caplog.records if record.name == "django_sse"]
    assert record.levelno == logging.ERROR
    assert "'file'" in record.getMessage()
    assert record.exc_info[0] is ZeroDivisionError


def test_a_connection_that_was_never_opened_is_not_opened(opened):
    release_connections()
    assert opened == []


def test_a_cursor_that_is_being_read_keeps_the_connection_only_from_the_package(opened):
    with stepping():
        rows = Group.objects.using(FILE).iterator(chunk_size=1)
        next(rows)
    assert is_open()
    release_idle()
    assert is_open()
    assert len(list(rows)) == ROWS - 1
    release_idle()
    assert not is_open()


def test_release_connections_asks_no_cursor(opened):
    with stepping():
        rows = Group.objects.using(FILE).iterator(chunk_size=1)
        next(rows)
    release_connections()
    assert not is_open()
    with pytest.raises(Exception, match="closed database"):
        list(rows)


def test_a_step_that_fails_gives_its_connection_back_too(opened):
    def step():
        with stepping():
            query()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert not is_open()


def test_wrappers_of_a_programs_own_around_a_connection_that_opens_are_left_in_order(opened):
    """Django pops the last one at the end of its `with`, whichever it is."""
    seen = []

    def own(execute, *args):
        seen.append(args[0])
        return execute(*args)

    with stepping():
        with connections[FILE].execute_wrapper(own):
            query()
        assert len(seen) == 1
        query()
        assert len(seen) == 1
        rows = Group.objects.using(FILE).iterator(chunk_size=1)
        next(rows)
    assert is_open()
    rows.close()


def test_no_connection_collects_wrappers(opened):
    for _ in range(3):
        with stepping():
            query()
    assert len(connections[FILE].execute_wrappers) == 1


# --- a request's ---


@needs_loops
@pytest.mark.parametrize("release", [arelease_connections, arelease_idle])
def test_the_thread_of_a_request_ends_and_its_connection_is_closed(opened, release):
    async def main():
        async with ThreadSensitiveContext():
            for _ in range(2):
                thread = await sync_to_async(query)()
                assert thread.is_alive()
                assert opened.still
                await release()
                assert opened.still == []
                await soon(lambda: not thread.is_alive())  # noqa: B023  (done within this turn)
                await release()  # there is nothing any more

    asyncio.run(main())


@needs_loops
@pytest.mark.parametrize("lent", [False, True], ids=["own", "lent"])
def test_a_transaction_keeps_the_thread_of_a_request(opened, lent):
    async def main():
        atomic = transaction.atomic(using=FILE)
        async with ThreadSensitiveContext():
            if lent:
                lend(lambda: None)
            thread = await sync_to_async(query)()
            await sync_to_async(atomic.__enter__)()
            await arelease_connections()
            assert await sync_to_async(query)() is thread
            await sync_to_async(atomic.__exit__)(None, None, None)
            await arelease_connections()
            assert opened.still == []
            await soon(lambda: not thread.is_alive())

    asyncio.run(main())


@needs_loops
def test_a_cursor_that_is_being_read_keeps_a_lent_thread(opened):
    async def main():
        async with ThreadSensitiveContext():
            lend(lambda: None)
            rows = Group.objects.using(FILE).aiterator(chunk_size=1)
            names = [(await anext(rows)).name]
            await arelease_idle()
            async for row in rows:
                names.append(row.name)
                await arelease_idle()
            assert names == [f"<{number}>" for number in range(ROWS)]
            await arelease_idle()
            assert opened.still == []

    asyncio.run(main())


@needs_loops
def test_where_django_keeps_no_thread_there_is_nothing_to_release(opened):
    async def main():
        await arelease_connections()
        lend(lambda: 1 / 0)

    asyncio.run(main())


@needs_loops
def test_releasing_below_sync_code_of_the_same_request_is_no_deadlock(opened):
    """As in an async view below a sync middleware: the request's thread waits for the view."""

    async def inner():
        await sync_to_async(query)()
        await arelease_connections()
        await arelease_idle()
        assert opened.still == []
        await sync_to_async(query)()

    async def main():
        async with ThreadSensitiveContext():
            await asyncio.wait_for(sync_to_async(async_to_sync(inner))(), 5)
            await arelease_connections()
            assert opened.still == []

    asyncio.run(main())


# --- lent ---


@needs_loops
def test_a_lent_thread_exists_only_while_it_is_needed(opened):
    ends = []

    async def main():
        async with ThreadSensitiveContext():
            before = await sync_to_async(query)()
            lend(lambda: ends.append("first"))
            await soon(lambda: not before.is_alive())
            assert opened.still == []
            threads = set()
            for _ in range(2):
                thread = await sync_to_async(query)()
                threads.add(thread)
                assert await sync_to_async(threading.current_thread)() is thread
                await arelease_connections()
                await soon(lambda: not thread.is_alive())  # noqa: B023  (done within this turn)
            assert len(threads) == 2
            lend(lambda: ends.append("second"))
            last = await sync_to_async(query)()
            assert ends == []
        await soon(lambda: ends)
        await soon(lambda: not last.is_alive())
        assert opened.still == []

    asyncio.run(main())
    assert ends == ["second"]


@needs_loops
def test_the_end_of_a_request_that_ran_no_sync_code_is_heard(opened):
    ends = []

    async def main():
        async with ThreadSensitiveContext():
            lend(lambda: ends.append(1))
        await soon(lambda: ends)

    asyncio.run(main())
    assert ends == [1]


# --- another asgiref ---


@needs_loops
def test_an_asgiref_that_keeps_its_threads_elsewhere_is_told_once_and_what_can_be_closed_is(
    opened, caplog, monkeypatch
):
    monkeypatch.delattr(SyncToAsync, "context_to_thread_executor")
    monkeypatch.setattr(database, "_warned", False)

    async def main():
        await sync_to_async(query)()
        lend(lambda: 1 / 0)
        await arelease_connections()
        assert opened.still == []

        rows = Group.objects.using(FILE).aiterator(chunk_size=1)
        await anext(rows)
        await arelease_idle()
        assert len([row async for row in rows]) == ROWS - 1
        await arelease_connections()

    asyncio.run(main())
    [record] = [record for record in caplog.records if record.name == "django_sse"]
    assert record.levelno == logging.WARNING
    assert "asgiref" in record.getMessage()


# --- views ---


class Rows(BaseSseView):
    """A row a step, all read by one cursor."""

    def iterator(self):
        for row in Group.objects.using(FILE).iterator(chunk_size=1):
            self.sse.add_message("", row.name)
            yield


class ARows(BaseSseView):
    async def iterator(self):
        async for row in Group.objects.using(FILE).aiterator(chunk_size=1):
            self.sse.add_message("", row.name)
            yield


class Asking(BaseSseView):
    """Asks the database between its events, and waits."""

    waiting = threading.Event()

    def get_owner(self):
        return query() and None

    def iterator(self):
        while True:
            query()
            self.sse.add_message("", "asked")
            yield
            yield from self.wait()

    def wait(self):
        while not self.waiting.wait(0.01):
            yield


class AAsking(Asking):
    async def iterator(self):
        try:
            while True:
                await Group.objects.using(FILE).acount()
                self.sse.add_message("", "asked")
                yield
                await asyncio.sleep(3600)
        finally:
            finals.append(await Group.objects.using(FILE).acount())


class Queue(RedisQueueView):
    redis_channel = "database"

    def get_redis_channel(self):
        query()
        return self.redis_channel


finals = []


def own_response(request):
    """A StreamingHttpResponse of a program's own, which gives its connection back before it waits."""

    async def chunks():
        await Group.objects.using(FILE).acount()
        await arelease_connections()
        yield b"waiting"
        await asyncio.sleep(3600)

    return StreamingHttpResponse(chunks())


async def releasing(request):
    await Group.objects.using(FILE).acount()
    await arelease_connections()
    return HttpResponse("done")


urlpatterns = [
    path("rows", Rows.as_view()),
    path("arows", ARows.as_view()),
    path("asking", Asking.as_view()),
    path("aasking", AAsking.as_view()),
    path("queue", Queue.as_view()),
    path("own", own_response),
    path("releasing", releasing),
]


def request_threads():
    """The threads that asgiref, or we in its stead, keep for requests."""
    names = ("ThreadPoolExecutor", "django-sse-request")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_under_wsgi_the_rows_of_one_query_may_be_events(opened):
    response = Rows.as_view()(RequestFactory().get("/"))
    body = b"".join(response)
    assert all(b"<%d>" % number in body for number in range(ROWS))
    assert not is_open()
    response.close()


def test_under_wsgi_a_waiting_iterator_holds_no_connection(opened):
    response = Asking.as_view()(RequestFactory().get("/"))
    query()
    iterator = iter(response)
    next(iterator)  # the retry
    assert not is_open()
    next(iterator)
    assert len(opened) == 1
    assert not is_open()
    response.close()


@needs_loops
@SERVERS
@pytest.mark.parametrize("name", ["rows", "arows"])
def test_under_asgi_the_rows_of_one_query_may_be_events(opened, caplog, taken_over, name):
    async def main():
        exchange = Exchange(application(taken_over=taken_over), f"/{name}")
        await exchange.over()
        assert all(b"<%d>" % number in exchange.body for number in range(ROWS)), exchange.body
        await soon(lambda: opened.still == [])

    asyncio.run(main())
    assert [record for record in caplog.records if record.exc_info] == []


@sync_only_middleware
def sync_only(get_response):
    def middleware(request):
        query()
        response = get_response(request)
        query()
        return response

    return middleware


@needs_loops
@SERVERS
@pytest.mark.parametrize("name", ["asking", "aasking", "queue"])
@pytest.mark.parametrize("middleware", [(), (sync_only,)], ids=["plain", "sync middleware"])
def test_under_asgi_open_streams_hold_no_connection_and_no_request_thread(opened, taken_over, name, middleware):
    async def main():
        finals.clear()
        before = len(request_threads())
        app = application(*middleware, taken_over=taken_over)
        exchanges = [Exchange(app, f"/{name}") for _ in range(5)]
        for exchange in exchanges:
            await exchange.until(b"retry" if name == "queue" else b"asked")
        await soon(lambda: opened.still == [])
        assert opened, "the database was used"
        await soon(lambda: len(request_threads()) == before)
        for exchange in exchanges:
            exchange.leave()
            await exchange.over()
        await soon(lambda: opened.still == [])
        await soon(lambda: len(request_threads()) == before)
        if name == "aasking":
            await soon(lambda: finals == 5 * [ROWS], timeout=3)

    asyncio.run(main())


@needs_loops
@SERVERS
def test_a_programs_own_response_can_give_back_too(opened, taken_over):
    async def main():
        before = len(request_threads())
        exchange = Exchange(application(taken_over=taken_over), "/own")
        await exchange.until(b"waiting")
        assert opened
        assert opened.still == []
        await soon(lambda: len(request_threads()) == before)
        exchange.leave()
        await exchange.over()

    asyncio.run(main())


@needs_loops
@pytest.mark.parametrize("middleware", [(), (sync_only,)], ids=["plain", "sync middleware"])
def test_an_async_view_can_give_back(opened, middleware):
    async def main():
        exchange = Exchange(application(*middleware, taken_over=False), "/releasing")
        await asyncio.wait_for(exchange.request, 5)
        assert exchange.body == b"done"

    asyncio.run(main())


@needs_loops
@SERVERS
def test_receivers_of_the_signals_leave_no_connection(opened, taken_over):
    def receiver(**kwargs):
        query()

    async def main():
        before = len(request_threads())
        exchange = Exchange(application(taken_over=taken_over), "/queue")
        await exchange.until(b"retry")
        await soon(lambda: opened.still == [])
        await soon(lambda: len(request_threads()) == before)
        exchange.leave()
        await exchange.over()
        await soon(lambda: opened.still == [])
        await soon(lambda: len(request_threads()) == before)

    stream_opened.connect(receiver)
    stream_closed.connect(receiver)
    try:
        asyncio.run(main())
    finally:
        stream_opened.disconnect(receiver)
        stream_closed.disconnect(receiver)


# --- the server cancels (FACTS L4: Django 5.2 leaves its own task behind) ---


class Waiting(Endless):
    async def iterator(self):
        try:
            self.sse.add_message("", "tick")
            yield
            await asyncio.sleep(3600)
        finally:
            self.ended.append(1)


urlpatterns += [
    path("endless", Endless.as_view()),
    path("aendless", AEndless.as_view()),
    path("waiting", Waiting.as_view()),
]


@leaves_the_body
@needs_loops
@SERVERS
@pytest.mark.parametrize("name", ["endless", "aendless", "waiting", "queue"])
@pytest.mark.parametrize("blocked", [False, True], ids=["free", "blocked in send"])
def test_a_request_that_the_server_cancels_runs_every_finally_within_a_second(
    opened, reasons, taken_over, name, blocked
):
    async def main():
        jammed = asyncio.Event()

        async def send(message):
            await exchange.take(message)
            if blocked and message.get("body"):
                jammed.set()
                await asyncio.Event().wait()

        exchange = Exchange(application(taken_over=taken_over), f"/{name}", send=send)
        await (jammed.wait() if blocked else exchange.until(b"retry" if name == "queue" else b"tick"))
        exchange.request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange.request
        await soon(lambda: reasons == ["client"], timeout=1)
        await soon(lambda: len(open_streams) == 0, timeout=1)
        if name == "queue":
            assert nothing_subscribed()
        elif not blocked:
            await soon(lambda: Endless.ended == [1], timeout=1)

    asyncio.run(main())
    gc.collect()
    assert len(Endless.ended) <= 1


# --- a thread of one's own ---


@needs_loops
def test_sync_code_has_a_thread_of_its_own_also_in_the_context_of_a_request_that_has_ended():
    async def main():
        request = ThreadSensitiveContext()  # one that is over, but not forgotten
        SyncToAsync.thread_sensitive_context.set(request)
        async with OwnThread():
            first, second = [await sync_to_async(threading.current_thread)() for _ in range(2)]
        assert first is second
        assert SyncToAsync.thread_sensitive_context.get() is request
        assert request not in SyncToAsync.context_to_thread_executor
        await soon(lambda: not first.is_alive())

    asyncio.run(main())


@needs_loops
def test_a_thread_that_nobody_needed_is_none():
    async def main():
        before = dict(SyncToAsync.context_to_thread_executor)
        async with OwnThread():
            pass
        assert dict(SyncToAsync.context_to_thread_executor) == before

    asyncio.run(main())


@needs_loops
def test_where_asgiref_keeps_its_threads_elsewhere_sync_code_still_runs(monkeypatch):
    async def main():
        async with OwnThread():
            assert await sync_to_async(lambda: 1, thread_sensitive=False)() == 1

    monkeypatch.delattr(SyncToAsync, "context_to_thread_executor")
    asyncio.run(main())
