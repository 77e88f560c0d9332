"""What a coroutine sets in its own context stays there; all else is as if its task awaited it."""

import asyncio
import contextvars
import gc
import weakref
from functools import partial

import pytest

from django_sse import contexts

variable = contextvars.ContextVar("variable", default="the task's")


def apart(coroutine, context=None):
    return contexts.run(context or contextvars.copy_context(), coroutine)


async def begun(context, coroutine):
    """Await what has done its first step already."""
    started = context.run(coroutine.send, None)
    await contexts.finish(partial(context.run, coroutine.send), partial(context.run, coroutine.throw), started)


@pytest.fixture(params=["run", "finish"])
def await_apart(request):
    return {"run": contexts.run, "finish": begun}[request.param]


def test_what_it_sets_stays_in_its_context(await_apart):
    seen = []

    async def coroutine():
        for value in ("first", "second"):
            seen.append(variable.get())
            variable.set(value)
            await asyncio.sleep(0)
        seen.append(variable.get())

    async def main():
        context = contextvars.copy_context()
        await await_apart(context, coroutine())
        return variable.get(), context[variable]

    assert asyncio.run(main()) == ("the task's", "second")
    assert seen == ["the task's", "first", "second"]


def test_it_sees_what_the_task_has_set():
    async def main():
        seen = []

        async def coroutine():
            seen.append(variable.get())

        variable.set("new")
        await apart(coroutine())
        return seen

    assert asyncio.run(main()) == ["new"]


def test_it_runs_in_the_task_that_awaits_it():
    async def main():
        tasks = []

        async def coroutine():
            for _ in range(2):
                tasks.append(asyncio.current_task())
                await asyncio.sleep(0)

        await apart(coroutine())
        return {*tasks} == {asyncio.current_task()}

    assert asyncio.run(main())


def test_a_coroutine_that_never_waits_is_done_at_once():
    async def coroutine():
        variable.set("own")

    with pytest.raises(StopIteration):
        apart(coroutine()).send(None)


def test_what_it_raises_is_raised(await_apart):
    async def coroutine():
        await asyncio.sleep(0)
        raise ValueError("mine")

    async def main():
        await await_apart(contextvars.copy_context(), coroutine())

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(main())


def test_what_it_raises_before_it_waits_is_raised():
    async def coroutine():
        raise ValueError("mine")

    async def main():
        await apart(coroutine())

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(main())


def test_it_is_cancelled_with_its_task_and_its_finally_runs_in_its_context(await_apart):
    seen = []

    async def coroutine():
        variable.set("own")
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            seen.append(variable.get())

    async def main():
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def wait():
        await await_apart(contextvars.copy_context(), coroutine())

    asyncio.run(main())
    assert seen == ["own"]


def test_it_may_go_on_after_what_was_thrown_into_it(await_apart):
    async def coroutine():
        for _ in range(2):
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 0.001)
            except asyncio.TimeoutError:
                timeouts.append(1)

    timeouts = []

    async def main():
        await await_apart(contextvars.copy_context(), coroutine())

    asyncio.run(main())
    assert timeouts == [1, 1]


def test_what_was_set_is_freed_with_the_coroutine_though_the_task_goes_on():
    class Request:
        pass

    async def coroutine():
        request = Request()
        requests.append(weakref.ref(request))
        variable.set(request)
        await asyncio.sleep(0)

    requests = []

    async def main():
        await apart(coroutine())
        gc.collect()
        return requests[0]()

    assert asyncio.run(main()) is None


# --- what all requests find ---


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    """No server has begun, whatever other tests have done."""
    monkeypatch.setattr(contexts, "_common", contextvars.Context())


def within(function, value=None, context=None):
    """Call `function` where `variable` has this value."""

    def call():
        if value is not None:
            variable.set(value)
        return function()

    return (context or contextvars.copy_context()).run(call)


def values(context):
    return [value for var, value in context.items() if var is variable]


def test_before_a_server_has_begun_all_requests_find_nothing():
    assert len(contexts.common()) == 0
    assert contextvars.Context().run(contexts.own) is None
    assert values(within(contexts.own, "mine")) == ["mine"]


def test_all_requests_find_what_was_there_when_the_server_began():
    within(contexts.begin, "the server's")
    assert values(contexts.common()) == ["the server's"]
    assert values(contextvars.copy_context()) == []


def test_a_server_that_begins_later_takes_the_place_of_the_first():
    within(contexts.begin, "the first's")
    within(contexts.begin, "the second's")
    assert values(contexts.common()) == ["the second's"]


def test_what_is_set_after_the_server_has_begun_is_not_what_all_requests_find():
    context = contextvars.copy_context()
    within(contexts.begin, "the server's", context)
    context.run(variable.set, "later")
    contexts.common().run(variable.set, "by somebody who was given it")
    assert values(contexts.common()) == ["the server's"]


def test_a_request_has_a_context_of_its_own_where_something_was_set_for_it():
    within(contexts.begin, "the server's")
    common = contexts.common()
    assert common.run(contexts.own) is None
    assert contexts.common().run(within, contexts.own) is None  # a copy is as good
    own = within(contexts.own, "mine", contexts.common())
    assert values(own) == ["mine"]
    assert values(contexts.common()) == ["the server's"]


def test_a_request_has_a_context_of_its_own_where_something_is_missing_or_more():
    other = contextvars.ContextVar("other")
    within(contexts.begin, "the server's")
    assert values(contextvars.Context().run(contexts.own)) == []

    def more():
        other.set(1)
        return contexts.own()

    assert contexts.common().run(more)[other] == 1


def test_what_was_set_for_a_request_and_reset_is_as_if_it_had_never_been():
    within(contexts.begin, "the server's")

    def request():
        token = variable.set("mine")
        variable.reset(token)
        return contexts.own()

    assert contexts.common().run(request) is None


def test_what_is_set_later_is_in_no_context_that_was_given_before():
    def request():
        variable.set("first")
        own = contexts.own()
        variable.set("second")
        return own

    assert values(contextvars.copy_context().run(request)) == ["first"]


def test_a_variable_that_is_none_and_one_that_is_not_there_are_two_things(monkeypatch):
    nothing, other = contextvars.ContextVar("nothing"), contextvars.ContextVar("other")
    server, request = contextvars.Context(), contextvars.Context()
    server.run(nothing.set, None)
    request.run(other.set, "own")
    monkeypatch.setattr(contexts, "_common", server)
    assert request.run(contexts.own) == request
    assert server.run(contexts.own) is None
