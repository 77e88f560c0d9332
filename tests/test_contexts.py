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
