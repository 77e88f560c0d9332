"""Waiting for a mailbox: no event is slept through, no silence made up, whether a thread waits or a task."""

import asyncio
import gc
import threading
import weakref
from collections import deque

import pytest

from django_sse.inbox import Inbox, LoopBell, Mailboxes, _LoopAlarm
from django_sse.workers import on_gevent
from tests.helpers.loops import soon
from tests.helpers.wait import until

LONG = 10  # seconds: a wait that an event is to end; reached only if it does not
SHORT = 0.02  # seconds: a wait that nothing ends


class Box:
    """A mailbox without a hub: its owner is told when there is something to take where there was nothing before."""

    def __init__(self):
        self.ended = None
        self.looks = 0  # how often somebody has come to take something
        self.after_look = None  # called once, after somebody has found nothing
        self.wake = None
        self.waiting = deque()

    def wake_by(self, wake):
        self.wake = wake

    def take(self, limit=None):
        count = len(self.waiting) if limit is None else min(limit, len(self.waiting))
        taken = [self.waiting.popleft() for _ in range(count)]
        self.looks += 1
        if not taken and self.after_look is not None:
            after_look, self.after_look = self.after_look, None
            after_look()
        return taken

    def put(self, *events):
        was_empty = not self.waiting
        self.waiting.extend(events)
        if was_empty:
            self.ring()

    def close(self, reason="client"):
        self.ended = reason
        self.ring()

    def ring(self):
        if self.wake is not None:
            self.wake()


@pytest.fixture
def box():
    return Box()


@pytest.fixture
def inbox(box):
    return Inbox(box)


@pytest.fixture
def loop():
    if on_gevent():
        pytest.skip("asyncio has no place among greenlets: the views refuse it there")
    errors = []  # of callbacks, which a loop would only log
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: errors.append(context))
    yield loop
    loop.close()
    assert errors == []


@pytest.fixture(params=["thread", "loop"])
def receive(request):
    """Both ways to wait, for the rules that hold for both: called with an inbox, a timeout and a limit."""
    if request.param == "thread":
        return lambda inbox, *args: inbox.wait(*args)
    loop = request.getfixturevalue("loop")
    return lambda inbox, *args: loop.run_until_complete(inbox.await_(*args))


@pytest.fixture
def when_waited_for(box):
    """Have a function called by another thread as soon as somebody has looked into the box."""
    threads = []

    def when_waited_for(action):
        looks = box.looks
        thread = threading.Thread(
            target=lambda: until(lambda: box.looks > looks, LONG, "somebody to look") and action()
        )
        threads.append(thread)
        thread.start()

    yield when_waited_for
    for thread in threads:
        thread.join()


async def turns(count=10):
    """Let everything that the loop has to do now be done."""
    for _ in range(count):
        await asyncio.sleep(0)


# --- both ways ---


def test_an_event_from_before_the_waiting_is_returned_at_once(box, inbox, receive):
    box.put("a")
    assert receive(inbox, None) == ["a"]


def test_an_event_between_two_waits_is_returned_at_once(box, inbox, receive):
    box.put("a")
    receive(inbox, LONG)
    box.put("b")
    assert receive(inbox, None) == ["b"]


@pytest.mark.parametrize("timeout", [None, LONG])
def test_an_event_from_another_thread_ends_the_waiting(box, inbox, receive, when_waited_for, timeout):
    for event in "abc":
        when_waited_for(lambda event=event: box.put(event))
        assert receive(inbox, timeout) == [event]


def test_an_event_between_the_look_and_the_waiting_is_not_slept_through(box, inbox, receive):
    box.after_look = lambda: box.put("a")
    assert receive(inbox, None) == ["a"]


def test_all_that_waits_is_returned_in_its_order(box, inbox, receive):
    box.put("a", "b")
    box.put("c")
    assert receive(inbox, LONG) == ["a", "b", "c"]


def test_at_most_the_limit_is_returned_and_the_rest_the_next_time(box, inbox, receive):
    box.put("a", "b", "c")
    assert receive(inbox, None, 2) == ["a", "b"]
    assert receive(inbox, None, 2) == ["c"]


def test_silence_returns_nothing_and_may_be_followed_by_events(box, inbox, receive):
    assert receive(inbox, SHORT) == []
    assert receive(inbox, SHORT) == []
    box.put("a")
    assert receive(inbox, SHORT) == ["a"]
    assert receive(inbox, SHORT) == []


def test_a_ring_with_nothing_to_take_is_neither_an_event_nor_silence(box, inbox, receive, when_waited_for):
    def ring_first():
        looks = box.looks
        box.ring()
        until(lambda: box.looks > looks, LONG, "a look for the ring's sake")
        box.put("a")

    when_waited_for(ring_first)
    assert receive(inbox, None) == ["a"]


def test_the_end_is_none_and_stays_none(box, inbox, receive):
    box.close()
    assert receive(inbox, None) is None
    assert receive(inbox, SHORT) is None


def test_the_end_comes_after_what_waits(box, inbox, receive):
    box.put("a", "b")
    box.close()
    assert receive(inbox, None, 1) == ["a"]
    assert receive(inbox, None) == ["b"]
    assert receive(inbox, None) is None


def test_the_end_is_seen_by_who_waits_already(box, inbox, receive, when_waited_for):
    when_waited_for(box.close)
    assert receive(inbox, None) is None


def test_the_mailbox_can_be_reached_through_the_inbox(box, inbox):
    assert inbox.mailbox is box


# --- the loop's way ---


def test_a_waiting_task_leaves_the_loop_to_others(box, inbox, loop):
    async def main():
        task = asyncio.create_task(inbox.await_(None))
        await turns()
        assert not task.done()
        box.put("a")
        assert await task == ["a"]

    loop.run_until_complete(main())


def test_many_rings_of_one_moment_share_one_wake_up_of_the_loop(loop, monkeypatch):
    wake_ups = []
    call_soon_threadsafe = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda *args: wake_ups.append(args) or call_soon_threadsafe(*args)
    )
    boxes = [Box() for _ in range(50)]

    def put_into_all():
        for number, box in enumerate(boxes):
            box.put(number)
            box.ring()

    async def main():
        inboxes = [Inbox(box) for box in boxes]
        for moment in (1, 2):
            tasks = [asyncio.create_task(inbox.await_(LONG)) for inbox in inboxes]
            await turns()
            thread = threading.Thread(target=put_into_all)
            thread.start()
            thread.join()  # the loop is held up meanwhile, so all rings are of one moment
            assert await asyncio.gather(*tasks) == [[number] for number in range(50)]
            assert len(wake_ups) == moment

    loop.run_until_complete(main())


def test_rings_during_the_wake_up_are_answered(loop):
    boxes = [Box() for _ in range(3)]

    async def main():
        tasks = [asyncio.create_task(Inbox(box).await_(LONG)) for box in boxes]
        # Each task puts the next event when it has its own: rings keep coming while the first is answered.
        for task, box in zip(tasks, boxes[1:], strict=False):
            task.add_done_callback(lambda task, box=box: box.put("next"))
        await turns()
        boxes[0].put("first")
        assert await asyncio.gather(*tasks) == [["first"], ["next"], ["next"]]

    loop.run_until_complete(main())


def test_events_from_many_threads_all_arrive(loop):
    boxes = [Box() for _ in range(8)]
    events = 200

    def fill(box):
        for number in range(events):
            box.put(number)
            box.ring()
        box.close("finished")

    async def read(box):
        inbox, taken = Inbox(box), []
        while (some := await inbox.await_(LONG)) is not None:
            taken += some
        return taken

    async def main():
        tasks = [asyncio.create_task(read(box)) for box in boxes]
        threads = [threading.Thread(target=fill, args=(box,)) for box in boxes]
        await turns()
        for thread in threads:
            thread.start()
        assert await asyncio.wait_for(asyncio.gather(*tasks), LONG) == [list(range(events))] * 8
        for thread in threads:
            thread.join()

    loop.run_until_complete(main())


def test_a_ring_whose_event_is_taken_already_is_no_silence(box, inbox, loop):
    async def read():
        return [await inbox.await_(None), await inbox.await_(None)]

    async def main():
        await inbox.await_(0)
        task = asyncio.create_task(read())
        box.put("a")  # the task finds it before the loop comes to the ring
        await turns()
        box.put("b")
        assert await task == [["a"], ["b"]]

    loop.run_until_complete(main())


@pytest.mark.parametrize("moment", range(5))
def test_an_event_at_the_moment_of_the_timeout_arrives_then_or_the_next_time(box, inbox, loop, moment):
    async def main():
        task = asyncio.create_task(inbox.await_(0))
        await turns(moment)
        box.put("a")
        assert [*await task, *await inbox.await_(SHORT)] == ["a"]

    loop.run_until_complete(main())


def test_a_cancelled_task_leaves_the_inbox_usable(box, inbox, loop):
    async def main():
        for timeout in (None, LONG):
            task = asyncio.create_task(inbox.await_(timeout))
            await turns()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            box.put("a")
            assert await inbox.await_(LONG) == ["a"]
            assert await inbox.await_(SHORT) == []

    loop.run_until_complete(main())


def test_a_task_that_is_cancelled_at_the_moment_of_an_event_leaves_the_event(box, inbox, loop):
    async def main():
        task = asyncio.create_task(inbox.await_(None))
        await turns()
        box.put("a")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await inbox.await_(None) == ["a"]

    loop.run_until_complete(main())


def sweeps(loop):
    """The timers of a loop that look for those whose time is up."""
    return [timer for timer in loop._scheduled if not timer.cancelled() and timer._callback.__name__ == "_sweep"]


def test_all_waits_of_a_loop_share_one_timer_and_it_ends_with_the_last(box, loop):
    async def main():
        inboxes = [Inbox(Box()) for _ in range(3)]
        tasks = [asyncio.create_task(inbox.await_(0.04 * number)) for number, inbox in enumerate(inboxes, start=1)]
        await turns()
        timers = len(sweeps(loop))
        assert [await task for task in tasks] == [[], [], []]
        return timers, len(sweeps(loop))

    assert loop.run_until_complete(main()) == (1, 0)


def test_a_timer_that_a_shorter_one_has_taken_the_place_of_does_nothing(loop):
    async def main():
        tasks = [asyncio.create_task(Inbox(Box()).await_(timeout)) for timeout in (LONG, 0.4, 0.2, 0.08)]
        await turns()
        assert len(sweeps(loop)) > 1
        began = loop.time()
        await soon(lambda: loop.time() > began + 0.15)
        assert len([timer for timer in sweeps(loop) if timer.when() < loop.time() + 0.5]) == 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    loop.run_until_complete(main())


def test_a_short_timeout_among_long_ones_is_kept_and_so_are_they(loop):
    async def main():
        began = loop.time()
        long = asyncio.create_task(Inbox(Box()).await_(0.5))
        await turns()
        assert await Inbox(Box()).await_(SHORT) == []
        short = loop.time() - began
        assert await long == []
        return short, loop.time() - began

    short, long = loop.run_until_complete(main())
    assert SHORT <= short < 0.5
    assert 0.5 <= long < 5


def test_a_sweep_comes_no_more_often_than_it_may_however_short_the_timeouts(loop, monkeypatch):
    monkeypatch.setattr(_LoopAlarm, "LEAST", 0.05)

    async def main():
        began = loop.time()
        for _ in range(3):
            assert await Inbox(Box()).await_(0) == []
        return loop.time() - began

    assert loop.run_until_complete(main()) >= 3 * 0.05 * 0.9


# --- the loop's bell by itself ---


def test_a_bell_that_was_rung_is_not_waited_for(loop):
    async def main():
        bell = LoopBell()
        bell.ring()
        assert await bell.wait(None)
        assert await bell.wait(None)
        bell.clear()
        assert not await bell.wait(SHORT)

    loop.run_until_complete(main())


def test_a_bell_may_be_rung_by_another_thread_while_it_is_waited_for(loop):
    async def main():
        bell = LoopBell()
        task = asyncio.create_task(bell.wait(LONG))
        await turns()
        threading.Thread(target=bell.ring).start()
        assert await task
        assert bell.future is None

    loop.run_until_complete(main())


def test_who_begins_to_wait_is_answered_by_a_ring_and_not_after_the_end(loop):
    async def main():
        bell = LoopBell()
        waiting = bell.begin(None)
        bell.answer()
        bell.answer()
        assert waiting.done()
        waiting = bell.begin(LONG)
        bell.end()
        bell.ring()
        await turns()
        assert not waiting.done()

    loop.run_until_complete(main())


# --- loops that are gone ---


def test_a_closed_loop_harms_nobody_who_rings(box, inbox, loop):
    loop.run_until_complete(inbox.await_(0))
    loop.close()
    box.put("a")
    box.close()


def test_a_loop_that_closes_at_the_moment_of_the_ring_harms_nobody(box, inbox, loop, monkeypatch):
    loop.run_until_complete(inbox.await_(0))
    loop.close()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "is_closed", lambda: False)  # as a thread sees it that looked just before
        box.put("a")


@pytest.mark.skipif(on_gevent(), reason="asyncio has no place among greenlets: the views refuse it there")
@pytest.mark.parametrize("timeout", [0, LONG])
def test_a_loop_is_kept_alive_by_no_inbox_and_its_end_harms_nobody(box, inbox, timeout):
    """Also where its end leaves a timer behind."""

    async def main():
        task = asyncio.create_task(inbox.await_(timeout))
        await turns()
        if timeout:
            task.cancel()
        await asyncio.wait([task])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()
    assert reference() is None
    box.put("a")


def test_each_loop_is_woken_for_its_own_inboxes(box, inbox, loop):
    other, other_box = asyncio.new_event_loop(), Box()
    other.run_until_complete(Inbox(other_box).await_(0))
    other.close()
    other_box.put("lost")

    async def main():
        task = asyncio.create_task(inbox.await_(LONG))
        await turns()
        box.put("a")
        return await task

    assert loop.run_until_complete(main()) == ["a"]


# --- the mailboxes of one stream ---


def test_all_mailboxes_of_a_stream_end_with_it():
    mailboxes, boxes = Mailboxes(), [Box(), Box()]
    for box in boxes:
        mailboxes.add(box)
    assert [box.ended for box in boxes] == [None, None]
    mailboxes.close()
    assert [box.ended for box in boxes] == ["client", "client"]


def test_a_mailbox_that_comes_after_the_end_ends_at_once(box):
    mailboxes = Mailboxes()
    mailboxes.close()
    mailboxes.add(box)
    assert box.ended == "client"


def test_a_mailbox_that_comes_during_the_end_ends_too(box):
    mailboxes, late = Mailboxes(), Box()
    mailboxes.add(box)
    box.wake_by(lambda: mailboxes.add(late))
    mailboxes.close()
    assert late.ended == "client"


def test_the_mailboxes_of_a_stream_are_told_why_it_ends(box):
    mailboxes = Mailboxes()
    mailboxes.add(box)
    mailboxes.close("max_age")
    assert box.ended == "max_age"


def test_a_mailbox_that_has_ended_is_not_kept(box):
    mailboxes = Mailboxes()
    mailboxes.add(box)
    box.close()
    mailboxes.add(other := Box())
    assert mailboxes._opened == (other,)


def test_a_stream_may_end_again():
    mailboxes = Mailboxes()
    mailboxes.close()
    mailboxes.close()
