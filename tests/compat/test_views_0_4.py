"""`django_sse.views.BaseSseView`: names, attributes, headers and bytes of the original, seen inside one process."""

import asyncio
import inspect

import pytest
import sse
from django.http import StreamingHttpResponse
from django.test import AsyncClient, Client, RequestFactory
from django.views.generic import View

from django_sse.views import BaseSseView
from tests.compat import views
from tests.helpers.eventsource import Parser, parse

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "REPORT"]
RETRY = b"retry: 2000\n\n"
FINITE = RETRY + (
    b"id: 7\n\n"
    b"event: one\ndata: first\ndata: line\n\n"
    b"event: \ndata: plain\ndata: bytes\n\n"
    b"event: named\ndata: keyword\n\n"
    b"id\n\n"
    b"event: three\ndata: \xc3\xa9\n\n"
)


def respond(view, method="GET", **headers):
    request = RequestFactory().generic(method, "/", **headers)
    return (view if inspect.isfunction(view) else view.as_view())(request)


def body(response):
    content = b"".join(response)
    response.close()
    return content


def pairs(content):
    return [(message.event, message.data) for message in parse(content)]


# --- names and signatures -------------------------------------------------------------------------------------------


def test_it_is_a_django_view():
    assert issubclass(BaseSseView, View)


@pytest.mark.parametrize("name", ["iterator", "_iterator", "get_last_id"])
def test_the_methods_take_nothing_but_self(name):
    assert list(inspect.signature(getattr(BaseSseView, name)).parameters) == ["self"]


def test_dispatch_takes_the_request_and_what_the_url_says():
    kinds = [parameter.kind for parameter in inspect.signature(BaseSseView.dispatch).parameters.values()]
    assert kinds[-2:] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


def test_a_view_without_an_iterator_is_not_implemented():
    with pytest.raises(NotImplementedError):
        BaseSseView().iterator()


# --- the response ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_streams(method):
    response = respond(views.Finite, method)
    assert response.status_code == 200
    assert body(response) == FINITE


def test_the_response_is_a_streaming_response_of_bytes():
    response = respond(views.Finite)
    assert isinstance(response, StreamingHttpResponse)
    assert {type(chunk) for chunk in response.streaming_content} == {bytes}
    response.close()


def test_the_headers_are_those_of_the_original():
    response = respond(views.Finite)
    assert response["Content-Type"] == "text/event-stream"
    assert "no-cache" in [part.strip() for part in response["Cache-Control"].split(",")]
    assert response["Software"] == "django-sse"
    assert "Content-Length" not in response
    response.close()


def test_no_proxy_buffers_or_transforms_the_stream():
    response = respond(views.Finite)
    assert response["X-Accel-Buffering"] == "no"
    assert "no-transform" in response["Cache-Control"]
    response.close()


def test_a_subclass_may_narrow_the_methods():
    class OnlyGet(views.Finite):
        http_method_names = ("get", "head")

    assert body(respond(OnlyGet)) == FINITE
    response = respond(OnlyGet, "POST")
    assert response.status_code == 405
    assert "GET" in response["Allow"]


def test_head_answers_with_headers_only():
    class Untouched(BaseSseView):
        def iterator(self):
            raise AssertionError("HEAD has no body to make")

    response = respond(Untouched, "HEAD")
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    assert response["Software"] == "django-sse"
    assert body(response) == b""


def test_retry_is_there_before_the_first_step_of_the_iterator():
    steps = []

    class Watched(BaseSseView):
        def iterator(self):
            steps.append(1)
            self.sse.add_message("e", "1")
            yield

    response = respond(Watched)
    assert next(iter(response)) == b"retry: 2000\n\n"
    assert steps == []
    response.close()


@pytest.mark.parametrize(
    ("view", "messages"),
    [
        (views.ReturnsList, [("item", "0"), ("item", "1"), ("item", "2")]),
        (views.ReturnsGeneratorExpression, [("item", "0"), ("item", "1"), ("item", "2")]),
        (views.YieldsValues, [("item", "1"), ("item", "2")]),
        (views.EmptyGenerator, []),
        (views.EmptyList, []),
        (views.InstanceState, [("count", "1"), ("count", "2"), ("count", "3")]),
        (views.OwnInitAlone, [("word", "hello"), ("word", "world")]),
    ],
)
def test_what_is_buffered_at_each_step_is_the_body_and_what_is_yielded_is_not(view, messages):
    content = body(respond(view))
    assert content.startswith(b"retry: 2000\n\n")
    assert content.count(b"retry:") == 1
    assert pairs(content) == messages


def test_any_iterable_will_do():
    class Steps(BaseSseView):
        def iterator(self):
            self.sse.add_message("e", "1")
            return self.kind

    for kind in [(None,), {1}, range(1), iter([None]), "x", b"x", {"a": 1}]:
        Steps.kind = kind
        assert body(respond(Steps)) == b"retry: 2000\n\nevent: e\ndata: 1\n\n"


def test_a_step_with_nothing_buffered_sends_nothing():
    class Bare(BaseSseView):
        def iterator(self):
            yield
            yield
            self.sse.add_message("e", "1")
            yield
            yield

    chunks = list(respond(Bare))
    assert b"" not in chunks
    assert b"".join(chunks) == b"retry: 2000\n\nevent: e\ndata: 1\n\n"


def test_each_step_is_sent_before_the_next_one_is_asked_for():
    seen = []

    class Watched(BaseSseView):
        def iterator(self):
            for n in range(3):
                seen.append(f"step {n}")
                self.sse.add_message("e", str(n))
                yield

    parser = Parser()
    for chunk in respond(Watched):
        seen += [f"sent {message.data}" for message in parser.feed(chunk)]
    assert seen == ["step 0", "sent 0", "step 1", "sent 1", "step 2", "sent 2"]


def test_an_error_in_the_iterator_comes_after_what_was_flushed_before_it():
    assert pairs(b"".join(respond(views.Fails))) == [("item", "1")]


def test_closing_the_response_runs_the_finally_of_the_iterator():
    request = RequestFactory().get("/")
    response = views.Device.as_view()(request, name="inside")
    chunks = iter(response)
    while "inside" not in views.Device.busy:
        next(chunks)
    response.close()
    assert "inside" not in views.Device.busy


def test_closing_a_response_that_nobody_has_read_is_quiet():
    respond(views.Clock).close()


# --- what the view has ----------------------------------------------------------------------------------------------


def test_request_args_kwargs_and_sse_are_set_before_the_iterator_runs():
    seen = {}

    class Looks(BaseSseView):
        def iterator(self):
            seen.update(vars(self))
            return [None]

    request = RequestFactory().get("/")
    body(Looks.as_view()(request, "one", room="two"))
    assert seen["request"] is request
    assert seen["args"] == ("one",)
    assert seen["kwargs"] == {"room": "two"}
    assert isinstance(seen["sse"], sse.Sse)


def test_dispatch_works_on_a_bare_instance():
    view = views.Finite()
    request = RequestFactory().get("/")
    response = view.dispatch(request, "one", room="two")
    assert (view.request, view.args, view.kwargs) == (request, ("one",), {"room": "two"})
    assert isinstance(view.sse, sse.Sse)
    assert body(response) == FINITE


def test_each_dispatch_has_an_sse_of_its_own():
    view = views.Finite()
    first = view.dispatch(RequestFactory().get("/"))
    old = view.sse
    assert body(first) == FINITE
    second = view.dispatch(RequestFactory().get("/"))
    assert view.sse is not old
    assert body(second) == FINITE


def test_iterator_works_on_a_bare_instance_without_a_request():
    view = views.Finite()
    view.sse = sse.Sse()
    chunks = list(view._iterator())
    assert {type(chunk) for chunk in chunks} == {str}
    assert "".join(chunks).encode() == FINITE


def test_iterator_can_be_stepped_by_hand_on_a_bare_instance():
    view = views.Finite()
    view.sse = sse.Sse()
    view.sse.flush()
    next(view.iterator())
    assert str(view.sse).startswith("id: 7\n\nevent: one\n")


def test_the_chunks_of_iterator_are_text():
    view = views.Finite()
    view.dispatch(RequestFactory().get("/")).close()
    assert {type(chunk) for chunk in view._iterator()} == {str}


@pytest.mark.parametrize("value", ["7", "a b", "", "0"])
def test_get_last_id_is_the_header_as_it_came(value):
    view = BaseSseView()
    view.request = RequestFactory().get("/", HTTP_LAST_EVENT_ID=value)
    assert view.get_last_id() == value


def test_get_last_id_without_a_header_is_none():
    view = BaseSseView()
    view.request = RequestFactory().get("/")
    assert view.get_last_id() is None


def test_get_last_id_reads_utf8():
    view = BaseSseView()
    view.request = RequestFactory().get("/", HTTP_LAST_EVENT_ID="é1".encode().decode("latin-1"))
    assert view.get_last_id() == "é1"


def test_get_last_id_survives_bytes_that_are_no_utf8():
    view = BaseSseView()
    view.request = RequestFactory().get("/", HTTP_LAST_EVENT_ID="\xff")
    assert isinstance(view.get_last_id(), str)


# --- overriding -----------------------------------------------------------------------------------------------------


def test_a_message_added_after_super_dispatch_follows_the_retry():
    response = views.SetsAttributes.as_view()(RequestFactory().get("/"), room="hall")
    assert response["X-Room"] == "hall"
    assert body(response) == b"retry: 2000\n\nevent: welcome\ndata: hall\n\nevent: room\ndata: hall\n\n"


def test_a_wholesale_dispatch_with_a_plain_sse_makes_the_same_body():
    response = respond(views.WholesaleFinite)
    assert response["Content-Type"] == "text/event-stream"
    assert body(response) == FINITE


def test_a_wholesale_dispatch_decides_on_the_retry():
    assert body(respond(views.WholesaleNoRetry)) == FINITE.replace(b"2000", b"0")


def test_an_overridden_iterator_is_the_body_byte_by_byte_behind_the_retry():
    assert body(respond(views.FinitePreamble)) == RETRY + views.PREAMBLE.encode() + FINITE.removeprefix(RETRY)


def test_an_overridden_iterator_may_yield_bytes():
    class Bytes(views.Finite):
        def _iterator(self):
            for _ in self.iterator():
                yield "".join(self.sse).encode()

    assert body(respond(Bytes)) == FINITE


def test_an_overridden_iterator_may_edit_the_chunks_of_its_parent():
    class Edits(views.Finite):
        def _iterator(self):
            for chunk in super()._iterator():
                yield chunk.replace("first", "FIRST")

    assert body(respond(Edits)) == FINITE.replace(b"first", b"FIRST")


def test_sse_may_be_replaced_by_the_subclass_while_it_streams():
    class Replaces(BaseSseView):
        def iterator(self):
            self.sse = sse.Sse(default_retry=5)
            self.sse.add_message("e", "1")
            yield

    assert pairs(body(respond(Replaces))) == [("e", "1")]


def test_as_view_takes_class_attributes_and_refuses_other_names():
    assert pairs(body(respond(views.OwnInit.as_view(greeting="hello")))) == [("word", "hello"), ("word", "world")]
    with pytest.raises(TypeError):
        views.OwnInit.as_view(unknown=1)


def test_the_view_function_says_what_it_is_made_of():
    view = views.OwnInit.as_view(greeting="hello")
    assert view.view_class is views.OwnInit
    assert view.view_initkwargs == {"greeting": "hello"}


# --- CSRF and clients -----------------------------------------------------------------------------------------------


def test_the_view_is_exempt_from_csrf():
    assert views.Finite.as_view().csrf_exempt
    assert views.Finite().dispatch.csrf_exempt


@pytest.mark.parametrize(
    ("path", "status"),
    [("finite", 200), ("exempt-override", 200), ("exempt-class", 200), ("checked-override", 403)],
)
def test_only_an_override_of_dispatch_without_the_decorator_is_checked_again(path, status):
    response = Client(enforce_csrf_checks=True).post(f"/compat/{path}")
    assert response.status_code == status
    response.close()


def test_a_check_in_dispatch_may_answer_anything_else():
    response = Client().get("/compat/guarded-room/the-secret")
    assert (response.status_code, response.content) == (403, b"not for you")


def test_djangos_test_client_reads_the_stream():
    response = Client().get("/compat/finite")
    assert response.streaming
    assert b"".join(response.streaming_content) == FINITE


def test_djangos_asynchronous_test_client_reads_the_stream():
    async def read():
        response = await AsyncClient().get("/compat/finite")
        return b"".join([chunk async for chunk in response.streaming_content])

    assert asyncio.run(read()) == FINITE


@pytest.mark.parametrize("path", ["clock", "wholesale-clock", "chained", "edits-chunks", "preamble"])
def test_under_asgi_an_endless_iterator_is_read_chunk_by_chunk(path):
    async def read():
        response = await AsyncClient().get(f"/compat/{path}")
        content = b""
        async for chunk in response.streaming_content:
            content += chunk
            if len(parse(content)) == 3:
                break
        response.close()
        return content

    content = asyncio.run(asyncio.wait_for(read(), 10))
    assert [data for _, data in pairs(content)] == ["1", "2", "3"]
