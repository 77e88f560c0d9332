"""What is missed is fetched once for all who need it, by one at a time, and for as long as it takes."""

import gc
import logging
import threading
import time
import weakref

import pytest

from django_sse import recovery
from django_sse.exceptions import BrokerUnavailable
from django_sse.recovery import Recovery
from tests.helpers.wait import until

NAME = "django-sse-recovery"
LONG = 30  # seconds that no test takes


def threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def gone():
    until(lambda: not threads(), what="the end of the thread")


class Fetch:
    """Takes what is needed, as the hub does; does not come back before it may."""

    def __init__(self):
        self.needs = set()
        self.taken = []
        self.by = []
        self.at = []
        self.overlapped = False
        self.outcomes = []
        self.may = threading.Event()
        self.may.set()
        self._busy = threading.Lock()

    def __call__(self):
        taken, self.needs = self.needs, set()
        if not self._busy.acquire(blocking=False):
            self.overlapped = True
        try:
            self.by.append(threading.current_thread())
            self.at.append(time.monotonic())
            self.taken.append(taken)
            assert self.may.wait(LONG)
            outcome = self.outcomes.pop(0) if self.outcomes else {}
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome
        finally:
            self._busy.release()


@pytest.fixture
def fetch():
    return Fetch()


@pytest.fixture
def made(fetch):
    made = Recovery(fetch)
    yield made
    made.close()
    fetch.may.set()
    gone()


def logged(caplog):
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "django_sse"]


# --- those who wait -------------------------------------------------------------------------------------------------


def test_who_waits_fetches_himself_and_needs_no_thread(made, fetch):
    assert made.wait() == {}
    assert fetch.by == [threading.current_thread()]
    assert threads() == []


def test_who_waits_is_told_what_was_in_the_way_and_of_which_channel(made, fetch):
    error = BrokerUnavailable("no")
    fetch.outcomes = [{"news": error}]
    assert made.wait() == {"news": error}
    assert made.wait() == {}


def test_an_error_is_raised_to_who_waits_and_is_no_harm_to_the_next(made, fetch, caplog):
    fetch.outcomes = [BrokerUnavailable("down"), KeyboardInterrupt()]
    with pytest.raises(BrokerUnavailable, match="down"):
        made.wait()
    with pytest.raises(KeyboardInterrupt):
        made.wait()
    assert made.wait() == {}
    assert logged(caplog) == []


def test_many_who_need_something_at_one_time_cost_two_looks_that_find_something(made, fetch):
    """One is under way; the next takes the needs of all who came meanwhile."""
    fetch.may.clear()
    got = []

    def need(name):
        fetch.needs.add(name)
        made.wait()
        got.append(name)

    waiting = [threading.Thread(target=need, args=(0,))]
    waiting[0].start()
    until(lambda: len(fetch.taken) == 1, what="the first look")
    waiting += [threading.Thread(target=need, args=(number,)) for number in range(1, 50)]
    for thread in waiting[1:]:
        thread.start()
    until(lambda: len(fetch.needs) == 49, what="the needs of all")
    assert got == []
    fetch.may.set()
    for thread in waiting:
        thread.join(LONG)
    assert sorted(got) == list(range(50))
    assert not fetch.overlapped
    assert [len(taken) for taken in fetch.taken if taken] == [1, 49]


def test_who_has_waited_for_no_turn_of_his_own_in_time_is_told_so(made, fetch):
    fetch.may.clear()
    made.ring()
    until(lambda: fetch.taken, what="the fetch of the thread")
    with pytest.raises(BrokerUnavailable, match="within 0.01 s"):
        made.wait(0.01)
    fetch.may.set()
    assert made.wait(LONG) == {}


def all_wait(made, fetch, count):
    """Have `count` threads wait while a fetch is under way; return what each was told."""
    fetch.may.clear()
    told = []

    def wait():
        try:
            told.append(made.wait())
        except Exception as error:  # noqa: BLE001  (the test asks for it)
            told.append(error)

    waiting = [threading.Thread(target=wait) for _ in range(count)]
    for number, thread in enumerate(waiting):
        thread.start()
        if not number:
            until(lambda: fetch.taken, what="the first fetch")
    until(lambda: threading.active_count() > count, what="all of them")
    time.sleep(0.05)  # none of them shows that it waits for the lock
    fetch.may.set()
    for thread in waiting:
        thread.join(LONG)
    return told


def test_those_who_wait_together_fail_together(made, fetch):
    """One timeout after the other would keep the last one for minutes."""
    fetch.outcomes = [BrokerUnavailable("silent"), BrokerUnavailable("silent still"), {}, {}]
    told = all_wait(made, fetch, 20)
    assert sorted(map(str, told)) == ["silent"] + ["silent still"] * 19
    assert {type(error) for error in told} == {BrokerUnavailable}
    assert len(set(map(id, told))) == 20, "each with a traceback of its own"
    assert len(fetch.taken) == 2
    assert made.wait() == {}, "who comes later tries anew"


def test_those_who_come_while_a_fetch_fails_are_not_refused_for_it(made, fetch):
    """It had begun before they said what they need."""
    fetch.outcomes = [BrokerUnavailable("silent")]
    told = all_wait(made, fetch, 20)
    assert sorted(map(str, told)) == ["silent"] + ["{}"] * 19


def test_a_failure_keeps_nothing_of_those_who_were_told_of_it(made, fetch):
    class Request:
        pass

    seen = []

    def handle():
        request = Request()
        seen.append(weakref.ref(request))
        with pytest.raises(BrokerUnavailable):
            made.wait()

    fetch.outcomes = [BrokerUnavailable("down")]
    handle()
    gc.collect()
    assert [each() for each in seen] == [None]


# --- the thread -----------------------------------------------------------------------------------------------------


def test_who_rings_does_not_wait_and_a_thread_fetches(made, fetch):
    fetch.may.clear()
    fetch.needs.add("news")
    made.ring()
    until(lambda: fetch.taken == [{"news"}], what="the fetch")
    assert fetch.by[0] is not threading.current_thread()
    assert fetch.by[0].daemon


def test_the_thread_ends_when_nothing_more_is_needed_and_comes_again_when_it_is(made, fetch):
    for number in range(1, 4):
        made.ring()
        until(lambda number=number: len(fetch.taken) == number, what="the fetch")
        gone()


def test_rings_during_a_fetch_are_one_more_fetch_by_the_same_thread(made, fetch):
    fetch.may.clear()
    made.ring()
    until(lambda: len(fetch.taken) == 1, what="the first fetch")
    for _ in range(100):
        made.ring()
    assert len(threads()) == 1
    fetch.may.set()
    gone()
    assert len(fetch.taken) == 2


def test_rings_from_many_threads_make_one_thread_and_the_last_one_is_heard(made, fetch):
    def ring():
        for _ in range(200):
            fetch.needs.add(1)
            made.ring()

    ringing = [threading.Thread(target=ring) for _ in range(8)]
    for thread in ringing:
        thread.start()
    for thread in ringing:
        thread.join(LONG)
    gone()
    assert not fetch.overlapped
    assert fetch.needs == set()


def test_who_waits_and_the_thread_take_turns(made, fetch):
    fetch.may.clear()
    made.ring()
    until(lambda: len(fetch.taken) == 1, what="the fetch of the thread")
    waiting = threading.Thread(target=made.wait)
    waiting.start()
    waiting.join(0.05)  # long enough for it to get in, were it let in
    assert len(fetch.taken) == 1
    fetch.may.set()
    waiting.join(LONG)
    assert len(fetch.taken) == 2
    assert not fetch.overlapped


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(recovery, "BACKOFF", (0.001, 0.002))


@pytest.mark.usefixtures("quick")
def test_the_thread_tries_for_as_long_as_it_takes(made, fetch):
    fetch.outcomes = [BrokerUnavailable("down")] * 20
    made.ring()
    gone()
    assert len(fetch.taken) == 21
    assert len(set(fetch.by)) == 1


@pytest.mark.usefixtures("quick")
def test_what_is_in_the_way_of_some_channels_is_tried_again_too(made, fetch, caplog):
    fetch.outcomes = [{"news": BrokerUnavailable("refused")}] * 5
    made.ring()
    gone()
    assert len(fetch.taken) == 6
    assert logged(caplog) == []  # whoever fetches knows whether it was said before


@pytest.mark.usefixtures("quick")
def test_an_outage_is_a_warning_and_another_error_a_traceback_and_each_is_said_once(made, fetch, caplog):
    fetch.outcomes = [BrokerUnavailable("no route")] * 5 + [{}]
    made.ring()
    gone()
    fetch.outcomes = [ZeroDivisionError("a mistake")] * 5 + [{}]
    made.ring()
    gone()
    (outage, mistake) = [record for record in caplog.records if record.name == "django_sse"]
    assert (outage.levelno, outage.exc_info) == (logging.WARNING, None)
    assert "no route" in outage.getMessage()
    assert (mistake.levelno, mistake.exc_info[0]) == (logging.ERROR, ZeroDivisionError)


@pytest.mark.usefixtures("quick")
def test_who_waits_during_an_outage_is_told_and_does_not_wait_for_its_end(made, fetch):
    fetch.outcomes = [BrokerUnavailable("down")] * 10_000
    made.ring()
    for _ in range(3):
        with pytest.raises(BrokerUnavailable):
            made.wait()
    made.close()


class Clock(threading.Event):
    """Stands in for the wait between two attempts, and remembers how long it was to be."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def wait(self, timeout=None):
        self.waits.append(timeout)
        return self.is_set()


def test_attempts_come_ever_more_slowly_up_to_a_bound_and_jittered(fetch):
    made = Recovery(fetch)
    made._closed = clock = Clock()
    fetch.outcomes = [BrokerUnavailable("down")] * 2000
    made.ring()
    gone()
    first, last = recovery.BACKOFF
    for number, wait in enumerate(clock.waits):
        most = min(last, first * 2 ** min(number, 16))
        assert most / 2 <= wait <= most
    assert len(clock.waits) == 2000
    assert len(set(clock.waits)) > 1000


def test_after_a_success_the_first_attempt_comes_soon_again(fetch):
    made = Recovery(fetch)
    made._closed = clock = Clock()
    fetch.outcomes = [BrokerUnavailable("down")] * 10 + [{}] + [BrokerUnavailable("down")]

    taken = []

    def again():
        outcome = fetch()
        taken.append(outcome)
        if len(taken) == 1:
            made.ring()
        return outcome

    made._fetch = again
    made.ring()
    gone()
    assert clock.waits[9] > 1
    assert clock.waits[10] <= recovery.BACKOFF[0]


# --- the end --------------------------------------------------------------------------------------------------------


def test_close_ends_the_pause_between_two_attempts(made, fetch, monkeypatch):
    monkeypatch.setattr(recovery, "BACKOFF", (LONG, LONG))
    fetch.outcomes = [BrokerUnavailable("down")] * 3
    made.ring()
    until(lambda: fetch.taken, what="the first attempt")
    made.close()
    gone()
    assert len(fetch.taken) == 1


def test_what_is_closed_fetches_no_more_by_itself(made, fetch):
    made.close()
    made.close()
    made.ring()
    assert threads() == []
    assert fetch.taken == []


def test_a_thread_that_cannot_be_started_is_tried_again_at_the_next_ring(made, fetch, monkeypatch):
    def full(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError):
            made.ring()
    made.ring()
    until(lambda: fetch.taken, what="the fetch")
