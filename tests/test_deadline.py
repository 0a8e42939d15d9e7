import asyncio

import pytest

from resilient import TimedOut, Timeout, deadline, runtime, testing


def test_without_a_deadline():
    assert deadline.current() is None
    assert deadline.remaining() is None
    assert deadline.tightest(None) is None
    assert deadline.tightest(5.0) == 5.0
    deadline.check()


def test_what_is_left():
    guard = Timeout(10, interrupt=False)

    def work(clock):
        clock.sleep(4)
        assert deadline.remaining() == 6
        assert deadline.tightest(None) == 10
        assert deadline.tightest(8.0) == 8.0
        assert deadline.tightest(12.0) == 10
        deadline.check()
        clock.sleep(6)
        assert deadline.remaining() == 0
        deadline.check()

    with testing.virtual_time() as clock, testing.capture_events() as seen:
        with pytest.raises(TimedOut) as caught:
            guard.call(work, clock)
        assert deadline.current() is None
    assert (caught.value.policy, caught.value.seconds) == (guard.label, 10)
    assert [event.name for event in seen] == ["timeout.expired"]


def test_the_outer_deadline_names_its_owner():
    outer, inner = Timeout(3, interrupt=False, name="outer"), Timeout(10, interrupt=False)

    def work(clock):
        clock.sleep(4)
        assert deadline.remaining() == -1
        deadline.check()

    with testing.virtual_time() as clock, pytest.raises(TimedOut, match="outer: not done after 3 s"):
        (outer | inner).call(work, clock)


def test_a_scope_within_a_passed_deadline_is_not_begun():
    outer, inner = Timeout(3, interrupt=False, name="outer"), Timeout(1, interrupt=False)
    calls = []

    def work(clock):
        clock.sleep(3)
        inner.call(calls.append, 1)

    with testing.virtual_time() as clock, pytest.raises(TimedOut, match="outer"):
        outer.call(work, clock)
    assert calls == []


def test_detached_work_has_no_deadline():
    guard = Timeout(3, interrupt=False)

    def work():
        with deadline.detached():
            assert deadline.current() is None
        assert deadline.current().scope is guard

    with testing.virtual_time():
        guard.call(work)


def test_published():
    with testing.virtual_time():
        limit = deadline.Deadline(5.0, Timeout(5))
        with deadline.published(limit):
            assert deadline.current() is limit
        assert deadline.current() is None


def test_tasks_inherit_it():
    async def child():
        return deadline.remaining()

    async def main():
        async def work():
            return await asyncio.create_task(child())

        return await Timeout(3).acall(work), await asyncio.create_task(child())

    assert testing.run(main) == (3, None)


def test_tighten():
    scope, outer = Timeout(5), Timeout(2)
    limit = deadline.tighten(scope, 5.0, 100.0)
    assert (limit.at, limit.scope) == (105.0, scope)
    around = deadline.Deadline(102.0, outer)
    with deadline.published(around):
        assert deadline.tighten(scope, 5.0, 100.0) is around
        assert deadline.tighten(scope, 1.0, 100.0).at == 101.0
        with pytest.raises(TimedOut, match=r"Timeout\(2\)"):
            deadline.tighten(scope, 1.0, 102.0)


def test_it_reads_the_runtime():
    with testing.virtual_time(start=50):
        assert runtime.now() == 50
        with deadline.published(deadline.Deadline(49.0, Timeout(1))), pytest.raises(TimedOut):
            deadline.check()


# -- which scope is around which ----------------------------------------------------------------------------------


def test_a_deadline_knows_the_one_around_it():
    outer = deadline.Deadline(10.0, Timeout(10))
    assert outer.outer is None
    with deadline.published(outer):
        inner = deadline.tighten(Timeout(1), 1.0, 0.0)
        assert inner.outer is outer
        assert deadline.tighten(Timeout(20), 20.0, 0.0) is outer
