"""The lock for critical sections of a few bytecodes."""

from threading import Barrier, Event, Thread

import pytest

from resilient import baton as module
from resilient.baton import Baton


class FakeTime:
    """Time that passes only while somebody waits for the baton."""

    def __init__(self):
        self.now = 0.0
        self.slept = 0
        self.on_sleep = None

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds == 0
        self.slept += 1
        self.now += 1.0
        if self.on_sleep is not None:
            self.on_sleep()


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(module, "time", fake)
    return fake


def test_only_one_thread_at_a_time_is_in_the_section():
    baton = Baton(0, lost=-1)
    start = Barrier(8)
    state = {"inside": 0, "most": 0}

    def work():
        start.wait()
        for _ in range(500):
            value = baton.hold()
            state["inside"] += 1
            state["most"] = max(state["most"], state["inside"])
            state["inside"] -= 1
            baton.give(value + 1)

    threads = [Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state == {"inside": 0, "most": 1}
    assert baton.take() == 4_000


def test_who_comes_second_gets_it_when_the_first_gives_it_back():
    baton = Baton("first", lost="lost")
    order = []
    held, done = Event(), Event()

    def second():
        held.wait()
        order.append(baton.hold())
        done.set()

    thread = Thread(target=second)
    order.append(baton.hold())
    thread.start()
    held.set()
    baton.give("second")
    done.wait()
    thread.join()
    assert order == ["first", "second"]


def test_waiting_polls_until_it_is_given_back(time):
    baton = Baton("first", lost="lost")
    assert baton.take() == "first"

    def give_at_the_third_look():
        if time.slept == 3:
            baton.give("second")

    time.on_sleep = give_at_the_third_look
    assert baton.wait() == "second"
    assert time.slept == 3
    with pytest.raises(IndexError):
        baton.take()  # the waiter has it


def test_hold_waits_for_a_baton_that_is_out(time):
    baton = Baton("first", lost="lost")
    assert baton.hold() == "first"
    time.on_sleep = lambda: baton.give("second")
    assert baton.hold() == "second"
    assert time.slept == 1


def test_a_lost_baton_is_replaced(time):
    baton = Baton("first", lost="lost")
    baton.take()  # and never given back
    assert baton.hold() == "lost"
    assert time.now == module.LOST_AFTER
    baton.give("new")
    assert baton.hold() == "new"  # it is there again, for everybody after
    assert time.now == module.LOST_AFTER


def test_giving_it_twice_leaves_one():
    baton = Baton(1, lost=0)
    baton.give(2)
    baton.give(3)
    assert baton.take() == 3
    with pytest.raises(IndexError):
        baton.take()


def test_a_forked_child_has_a_baton():
    baton = Baton("first", lost="lost")
    baton.after_fork("new")
    assert baton.take() == "first"
    baton.after_fork("new")  # it was in the hands of a thread that the child does not have
    assert baton.take() == "new"
