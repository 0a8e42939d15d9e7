"""The cache: how answers age, who makes the call, and what the others get."""

import functools
import sys
from threading import Barrier, Thread
from types import SimpleNamespace

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilient import Cache, CircuitBreaker, Pipeline, TimedOut, Timeout, deadline, runtime
from resilient.call import Call
from resilient.edge import Edge
from resilient.kinds import MISSING, Stale, Value
from resilient.policies.cache import CacheStatistics
from resilient.testing import capture_events, flaky, run, run_both, virtual_time
from resilient.ticket import Ticket

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture
def clock():
    with virtual_time() as clock:
        yield clock


@pytest.fixture
def impatient_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def counts(cache):
    statistics = cache.statistics()
    return statistics.hits, statistics.misses, statistics.shared, statistics.stale


# -- how answers age ------------------------------------------------------------------------------------------


def test_fresh_answers_are_served_without_a_call():
    async def scenario(colour):
        cache = Cache(10)
        function = colour.function(flaky("first", "second"))
        answers = []
        for pause in (0, 9.999, 0.001, 9):
            await colour.sleep(pause)
            answers.append(await colour.call(cache, function))
        assert answers == ["first", "first", "second", "second"]
        return cache.statistics()

    assert run_both(scenario) == []


def test_statistics_of_fresh_answers(clock):
    cache = Cache(10)
    for _ in range(4):
        cache.call(abs, -1)
    assert cache.statistics() == CacheStatistics(entries=1, hits=3, misses=1, shared=0, stale=0)
    with pytest.raises(AttributeError):
        cache.statistics().hits = 0


def test_stale_answers_are_served_only_if_the_call_fails():
    async def scenario(colour):
        cache = Cache(10, stale=5, name="c")
        function = colour.function(flaky("old", OSError, "new", OSError, OSError("too old")))
        answers = []
        for pause in (0, 12, 0, 14.999):  # at 0, 12, 12 and 26.999
            await colour.sleep(pause)
            answers.append(await colour.call(cache, function))
        assert answers == ["old", "old", "new", "new"]
        await colour.sleep(0.001)
        with pytest.raises(OSError, match="too old"):
            await colour.call(cache, function)
        return cache.statistics()

    assert run_both(scenario) == [("cache.stale_served", 12.0), ("cache.stale_served", 26.999)]


def test_the_event_tells_age_and_reason(clock):
    cache = Cache(10, stale=5, refresh=2)
    function = flaky("old", OSError)
    cache.call(function)
    clock.sleep(13)
    with capture_events(cache) as seen:
        cache.call(function)
    assert [(event.name, event.age, event.reason) for event in seen] == [("cache.stale_served", 13.0, "error")]


def test_without_stale_an_error_comes_out(clock):
    cache = Cache(1)
    function = flaky("old", OSError("no"))
    cache.call(function)
    clock.sleep(1)
    with pytest.raises(OSError, match="no"):
        cache.call(function)


def test_on_tells_for_which_errors_stale_answers_are_served(clock):
    cache = Cache(1, stale=10, on=OSError)
    function = flaky("old", KeyError("bug"), TimeoutError())
    cache.call(function)
    clock.sleep(2)
    with pytest.raises(KeyError, match="bug"):
        cache.call(function)
    assert cache.call(function) == "old"


def test_stale_answers_are_served_for_status_codes_too():
    async def scenario(colour):
        cache = Cache(1, stale=100, on={503, OSError})
        good, bad, other = (SimpleNamespace(status_code=status) for status in (200, 503, 500))
        error = ValueError("bad status")
        error.status = 503
        function = flaky(bad, good, bad, error, OSError(), other, bad)
        assert await colour.call(cache, function) is bad, "there is nothing else yet"
        assert cache.statistics().entries == 0, "and it is no answer to keep"
        for _ in range(4):
            assert await colour.call(cache, function) is good
            await colour.sleep(2)
        for _ in range(2):  # the 500 is a good answer here
            assert await colour.call(cache, function) is other
            await colour.sleep(2)

    assert [name for name, _ in run_both(scenario)] == ["cache.stale_served"] * 4


def test_all_who_wait_for_a_failing_response_get_it():
    async def scenario(colour):
        cache = Cache(60, on={503})
        bad = SimpleNamespace(status_code=503)
        calls = []

        async def fetch():
            calls.append(1)
            await colour.sleep(1)
            return bad

        async def caller():
            return await colour.call(cache, fetch) is bad

        assert await colour.gather(caller, caller, caller) == [True] * 3
        return len(calls)

    run_both(scenario)


def test_a_refresh_that_gets_a_failing_response_leaves_the_old_one():
    async def scenario(colour):
        cache = Cache(1, refresh=100, on={503})
        good, bad = (SimpleNamespace(status_code=status) for status in (200, 503))
        function = flaky(good, bad)
        assert await colour.call(cache, function) is good
        for _ in range(2):
            await colour.sleep(2)
            assert await colour.call(cache, function) is good
        await colour.sleep(1)

    names = sorted(name for name, _ in run_both(scenario))
    assert names == ["cache.refresh_failed"] * 2 + ["cache.stale_served"] * 2


def test_stale_on_the_refusal_of_a_breaker_further_in(clock):
    breaker = CircuitBreaker(consecutive=1)
    guard = Pipeline(Cache(1, stale=100), breaker)
    function = flaky("old", OSError)
    assert guard.call(function) == "old"
    for _ in range(3):
        clock.sleep(1.5)
        assert guard.call(function) == "old"
    assert len(function.calls) == 2
    assert breaker.statistics().rejected == 2


def test_errors_are_not_kept():
    async def scenario(colour):
        cache = Cache(10)
        script = flaky(OSError("no"), "well")
        function = colour.function(script)
        with pytest.raises(OSError, match="no"):
            await colour.call(cache, function)
        answers = [await colour.call(cache, function) for _ in range(2)]
        assert (answers, len(script.calls)) == (["well", "well"], 2)

    assert run_both(scenario) == []


def test_none_is_an_answer_like_any_other(clock):
    cache = Cache(10)
    function = flaky(None, "another")
    assert [cache.call(function) for _ in range(3)] == [None] * 3
    assert len(function.calls) == 1


def test_what_counts_as_a_failed_result_is_not_kept(clock):
    guard = Pipeline(Cache(10), failed=lambda status: status >= 500)
    function = flaky(503, 200, 201)
    assert [guard.call(function) for _ in range(3)] == [503, 200, 200]


def test_clear_forgets_all_answers(clock):
    cache = Cache(10, stale=10)
    function = flaky("first", "second")
    cache.call(function)
    assert not cache.idle(0.0)
    cache.clear()
    assert cache.statistics().entries == 0
    assert cache.idle(0.0)
    assert cache.call(function) == "second"


# -- refreshing in the background -----------------------------------------------------------------------------


def test_a_refresh_in_the_background():
    async def scenario(colour):
        cache = Cache(10, refresh=5, name="c")
        made = []

        async def fetch():
            made.append((colour.now(), deadline.current()))
            await colour.sleep(1)
            return len(made)

        fetch = colour.function(fetch)  # once, as it is part of the key

        guard = Pipeline(Timeout(5), cache)
        log = []
        for pause in (0, 11, 0.5, 1, 14.999):
            await colour.sleep(pause)
            log.append((await colour.call(guard, fetch), round(colour.now(), 3)))
        # The old answer at once, at 12 and 12.5 as well; the new one, fetched at 12, from 13 on.
        assert log == [(1, 1.0), (1, 12.0), (1, 12.5), (2, 13.5), (3, 29.499)]
        assert made[0][1] is not None
        assert made[1] == (12.0, None)  # it outlives the call, and so does not have its deadline
        return [when for when, _ in made], cache.statistics()

    assert run_both(scenario)[:2] == [("cache.stale_served", 12.0), ("cache.stale_served", 12.5)]


def test_one_refresh_at_a_time():
    async def scenario(colour):
        cache = Cache(10, refresh=5, name="c")
        made = []

        async def fetch():
            made.append(colour.now())
            await colour.sleep(1)
            return len(made)

        fetch = colour.function(fetch)  # once, as it is part of the key

        await colour.call(cache, fetch)
        await colour.sleep(11)
        for _ in range(5):
            assert await colour.call(cache, fetch) == 1
        await colour.sleep(2)
        assert await colour.call(cache, fetch) == 2
        assert made == [0.0, 12.0]
        return cache.statistics()

    assert len(run_both(scenario)) == 5


def test_a_refresh_that_fails_leaves_the_old_answer():
    async def scenario(colour):
        cache = Cache(10, refresh=5, name="c")
        function = colour.function(flaky("old", OSError, "new"))
        answers = []
        for pause in (0, 11, 1, 1):
            await colour.sleep(pause)
            answers.append(await colour.call(cache, function))
        assert answers == ["old", "old", "old", "new"]
        return cache.statistics().entries

    names = [name for name, _ in run_both(scenario)]
    assert names == ["cache.stale_served", "cache.refresh_failed", "cache.stale_served"]


def test_the_event_of_a_failed_refresh_names_the_error(clock):
    cache = Cache(10, refresh=5)
    function = flaky("old", OSError("secret"))
    cache.call(function)
    clock.sleep(11)
    with capture_events(cache) as seen:
        cache.call(function)
        clock.sleep(1)
    assert [event.name for event in seen] == ["cache.stale_served", "cache.refresh_failed"]
    assert seen[1].error == "OSError"
    assert seen[0].reason == "refresh"


def test_after_the_time_to_refresh_calls_wait_again():
    async def scenario(colour):
        cache = Cache(10, refresh=5, stale=100, name="c")
        function = colour.function(flaky("old", "new"))
        await colour.call(cache, function)
        await colour.sleep(15)
        return await colour.call(cache, function)

    assert run_both(scenario) == []


@BACKENDS
def test_a_refresh_that_is_cancelled_with_its_event_loop_can_be_made_again(backend):
    cache = Cache(10, refresh=5)
    made = []

    async def fetch():
        made.append(runtime.now())
        await anyio.sleep(0 if len(made) == 1 else 1)
        return len(made)

    async def main(pause):
        answer = await cache.acall(fetch)
        await anyio.sleep(pause)
        return answer

    assert run(main, 0.0, backend=backend, start=0.0) == 1
    for start in (11.0, 12.0, 13.0):  # the loop ends, with the refresh not begun or half done
        assert run(main, start - 11.0 and 0.5, backend=backend, start=start) == 1
    assert cache._flights == {}
    assert run(main, 2.0, backend=backend, start=14.0) == 1
    assert run(main, 0.0, backend=backend, start=17.0) == len(made)
    assert len(made) > 2


def test_an_interrupt_in_a_refresh_lets_another_one_begin(clock):
    cache = Cache(10, refresh=5)
    call = Call(flaky("new"), (), {})
    other = Call(call.function, (), {})
    assert cache.lookup(call, 0.0) is MISSING
    cache.store(call, "old", 0.0)
    assert isinstance(cache.lookup(call, 11.0), Stale)
    assert cache.lookup(other, 11.0) == "old"
    cache.abandon(call)
    assert isinstance(cache.lookup(other, 11.0), Stale)


# -- single flight --------------------------------------------------------------------------------------------


def test_those_who_miss_at_the_same_time_make_one_call():
    async def scenario(colour):
        cache = Cache(10)
        made = []

        async def fetch(key):
            made.append(key)
            await colour.sleep(1)
            return key.upper()

        fetch = colour.function(fetch)  # once, as it is part of the key

        def caller(key):
            async def call():
                answer = await colour.call(cache, fetch, key)
                return answer, colour.now()

            return call

        answers = await colour.gather(*map(caller, "aababb"))
        assert answers == [(key.upper(), 1.0) for key in "aababb"]
        assert sorted(made) == ["a", "b"]
        return cache.statistics()

    assert run_both(scenario) == []


def test_they_share_the_failure_too():
    async def scenario(colour):
        cache = Cache(10)
        made = []

        async def fetch():
            made.append(colour.now())
            await colour.sleep(1)
            if len(made) == 1:
                raise OSError("shared")
            return "well"

        fetch = colour.function(fetch)  # once, as it is part of the key

        async def caller():
            with pytest.raises(OSError, match="shared"):
                await colour.call(cache, fetch)
            return colour.now()

        assert await colour.gather(*[caller] * 5) == [1.0] * 5
        assert await colour.call(cache, fetch) == "well"
        assert made == [0.0, 1.0]
        return cache.statistics()

    assert run_both(scenario) == []


def test_they_share_the_stale_answer_too():
    async def scenario(colour):
        cache = Cache(10, stale=100, name="c")
        made = []

        async def fetch():
            made.append(colour.now())
            await colour.sleep(1)
            if len(made) > 1:
                raise OSError
            return "old"

        fetch = colour.function(fetch)  # once, as it is part of the key

        async def caller():
            return await colour.call(cache, fetch)

        await caller()
        await colour.sleep(20)
        assert await colour.gather(*[caller] * 3) == ["old"] * 3
        assert len(made) == 2
        return cache.statistics()

    assert run_both(scenario) == [("cache.stale_served", 22.0)]


def test_threads_and_tasks_share_one_flight():
    """The leader is in no loop; one waits in a thread, one on asyncio, one on trio."""
    cache = Cache(1e6, key=lambda colour: "key")
    leader = Call(len, ("leader",), {})
    assert cache.lookup(leader, runtime.now()) is MISSING
    answers = []

    def in_thread():
        answers.append(cache.call(len, "thread"))

    async def in_task(backend):
        waiting = cache.acall(len, backend)  # the same function, and so the same key
        answers.append(await waiting)

    threads = [Thread(target=in_thread)] + [
        Thread(target=lambda backend=backend: anyio.run(in_task, backend, backend=backend))
        for backend in ("asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    while len(cache._flights[len, "key"].waiting) < 3:
        pass
    cache.store(leader, "answer", runtime.now())
    for thread in threads:
        thread.join()
    assert answers == ["answer"] * 3
    assert counts(cache) == (0, 1, 3, 0)


def test_8_threads_make_one_call_for_each_key(impatient_threads):
    for _ in range(30):
        cache = Cache(1e6)
        start = Barrier(8)
        made, wrong = [], []

        def fetch(key, made=made):
            made.append(key)
            return key * 2

        def hammer(cache=cache, start=start, fetch=fetch, wrong=wrong):
            start.wait()
            wrong.extend(key for key in range(20) if cache.call(fetch, key) != key * 2)

        threads = [Thread(target=hammer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert sorted(made) == list(range(20))
        assert sum(counts(cache)) == 160
        assert (cache._flights, cache._led) == ({}, {})


@BACKENDS
def test_a_cancelled_leader_hands_over(backend):
    async def main():
        cache = Cache(10, key=lambda name: "key")
        log = []

        async def fetch(name):
            log.append((name, anyio.current_time()))
            await anyio.sleep(1)
            return name

        cached = functools.partial(cache.acall, fetch)

        async def leader():
            with anyio.move_on_after(0.5):
                await cached("leader")

        async def waiter(name):
            log.append((name, await cached(name), anyio.current_time()))

        async with anyio.create_task_group() as group:
            group.start_soon(leader)
            for name in ("second", "third"):
                await anyio.sleep(0.125)
                group.start_soon(waiter, name)
        assert sorted(log[2:]) == [("second", "second", 1.5), ("third", "second", 1.5)]
        assert (cache._flights, cache._led) == ({}, {})
        return log[:2], cache.statistics()

    started, statistics = run(main, backend=backend)
    assert started == [("leader", 0.0), ("second", 0.5)]
    assert statistics == CacheStatistics(entries=1, hits=0, misses=1, shared=2, stale=0)


@BACKENDS
def test_the_one_it_hands_over_to_is_cancelled_as_well(backend):
    async def main():
        cache = Cache(10, key=lambda name: "key")
        log = []

        async def fetch(name):
            log.append(name)
            await anyio.sleep(1)
            return name

        scopes = [anyio.CancelScope(), anyio.CancelScope()]

        async def cancelled(name, scope):
            with scope:
                await cache.acall(fetch, name)

        async def waiter(name):
            log.append((name, await cache.acall(fetch, name), anyio.current_time()))

        async with anyio.create_task_group() as group:
            for name, scope in zip(("first", "second"), scopes, strict=True):
                group.start_soon(cancelled, name, scope)
                await anyio.sleep(0.125)
            group.start_soon(waiter, "third")
            await anyio.sleep(0.25)
            for scope in scopes:
                scope.cancel()
        return log, cache.statistics(), cache._flights, cache._led

    log, statistics, flights, led = run(main, backend=backend)
    assert log == ["first", "third", ("third", "third", 1.5)]
    assert statistics == CacheStatistics(entries=1, hits=0, misses=1, shared=2, stale=0)
    assert flights == led == {}


def test_the_one_it_hands_over_to_has_just_given_up():
    cache = Cache(10)
    function = flaky("answer")
    calls = [Call(function, (), {}) for _ in range(3)]
    assert cache.lookup(calls[0], 0.0) is MISSING
    second, third = (cache.lookup(call, 0.0) for call in calls[1:])
    cache.abandon(calls[0])
    assert (second.granted, second.value, third.granted) == (True, MISSING, False)
    cache.leave(calls[1], second)
    assert (third.granted, third.value) == (True, MISSING)
    cache.leave(calls[2], third)
    assert cache._flights == cache._led == {}
    assert cache.lookup(calls[0], 1.0) is MISSING


def test_the_flight_goes_past_a_closed_event_loop():
    cache = Cache(10)
    function = flaky("answer")
    calls = [Call(function, (), {}) for _ in range(3)]
    cache.lookup(calls[0], 0.0)
    gone, here = (cache.lookup(call, 0.0) for call in calls[1:])

    def closed():
        raise RuntimeError("the event loop is closed")

    gone.attach(closed)
    cache.abandon(calls[0])
    assert (gone.granted, here.granted, here.value) == (False, True, MISSING)
    cache.store(calls[2], "answer", 1.0)
    assert cache._flights == cache._led == {}


def test_a_waiter_who_gives_up_is_forgotten():
    cache = Cache(10)
    function = flaky("answer")
    leader, waiter = (Call(function, (), {}) for _ in range(2))
    cache.lookup(leader, 0.0)
    ticket = cache.lookup(waiter, 0.0)
    assert isinstance(cache.leave(waiter, ticket), TimeoutError)
    cache.abandon(leader)
    assert not ticket.granted
    assert cache._flights == cache._led == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_of_the_leader_hands_over(clock, error):
    cache = Cache(10, stale=10)
    made = []

    def fetch():
        made.append(clock.now())
        clock.sleep(1)
        if len(made) == 1:
            raise error
        return "answer"

    def leader():
        with pytest.raises(error):
            cache.call(fetch)

    def waiter():
        clock.sleep(0.5)
        return cache.call(fetch), clock.now()

    assert clock.run_threads(leader, waiter, waiter) == [None, ("answer", 2.0), ("answer", 2.0)]
    assert made == [0.0, 1.0]
    assert (cache._flights, cache._led) == ({}, {})


def test_a_waiter_has_a_deadline_of_its_own():
    async def scenario(colour):
        cache = Cache(10)
        hurried = Pipeline(Timeout(0.5, interrupt=False, name="t"), cache)

        async def fetch():
            await colour.sleep(5)
            return "answer"

        fetch = colour.function(fetch)  # once, as it is part of the key

        async def leader():
            return await colour.call(cache, fetch), colour.now()

        async def waiter():
            await colour.sleep(0.25)
            with pytest.raises(TimedOut, match=r"t: not done after 0\.5 s"):
                await colour.call(hurried, fetch)
            return colour.now()

        assert await colour.gather(leader, waiter) == [("answer", 5.0), 0.75]
        return cache.statistics(), len(cache._flights), len(cache._led)

    assert run_both(scenario) == [("timeout.expired", 0.75)]


@BACKENDS
def test_a_timeout_of_a_waiting_task_is_told_once(backend):
    async def main():
        cache = Cache(10)
        hurried = Pipeline(Timeout(0.5, name="t"), cache)

        async def fetch():
            await anyio.sleep(5)

        async def waiter():
            await anyio.sleep(0.25)
            with pytest.raises(TimedOut, match=r"t: not done after 0\.5 s"):
                await hurried.acall(fetch)

        async with anyio.create_task_group() as group:
            group.start_soon(cache.acall, fetch)
            group.start_soon(waiter)
        return len(cache._flights), len(cache._led)

    with capture_events() as seen:
        assert run(main, backend=backend) == (0, 0)
    assert [event.name for event in seen] == ["timeout.expired"]


def test_results_may_be_kept_for_stale_answers_only(clock):
    cache = Cache(0, stale=10)
    function = flaky("first", "second", OSError)
    assert [cache.call(function) for _ in range(3)] == ["first", "second", "second"]


def test_a_timeout_around_the_leader_hands_over():
    """Async code is cancelled at the deadline; a thread goes on, and its answer is for those who wait."""

    async def main():
        cache = Cache(10)
        made = []

        async def fetch():
            made.append(runtime.now())
            await anyio.sleep(2)
            return "answer"

        async def leader():
            with pytest.raises(TimedOut):
                await Pipeline(Timeout(1), cache).acall(fetch)

        answers = []

        async def waiter():
            await anyio.sleep(0.5)
            answers.append((await cache.acall(fetch), runtime.now()))

        async with anyio.create_task_group() as group:
            group.start_soon(leader)
            group.start_soon(waiter)
        return made, answers

    for backend in ("asyncio", "trio"):
        assert run(main, backend=backend) == ([0.0, 1.0], [("answer", 3.0)])
    with virtual_time() as clock:
        cache = Cache(10)
        made = []

        def fetch():
            made.append(clock.now())
            clock.sleep(2)
            return "answer"

        def leader():
            with pytest.raises(TimedOut):
                Pipeline(Timeout(1), cache).call(fetch)

        def waiter():
            clock.sleep(0.5)
            return cache.call(fetch), clock.now()

        assert clock.run_threads(leader, waiter) == [None, ("answer", 2.0)]
        assert made == [0.0]


def test_after_a_fork_nobody_waits_for_calls_of_the_parent(clock):
    cache = Cache(10)
    function = flaky("answer")
    leader, other = (Call(function, (), {}) for _ in range(2))
    cache.lookup(leader, 0.0)
    assert isinstance(cache.lookup(other, 0.0), Ticket)
    cache.after_fork()
    assert cache.call(function) == "answer"
    cache.store(leader, "of the parent", 0.0)  # a thread that forked in the middle of its call
    assert cache.recover(leader, OSError(), 0.0) is MISSING
    assert cache.call(function) == "answer"


# -- bounded --------------------------------------------------------------------------------------------------


def test_the_least_recently_used_answer_goes_first(clock):
    cache = Cache(10, max_entries=2)
    made = []
    cached = functools.partial(cache.call, made.append)
    for key in "abacab":
        cached(key)
    assert made == ["a", "b", "c", "b"]
    assert cache.statistics().entries == 2


def test_an_answer_that_is_too_old_is_dropped_when_it_is_asked_for(clock):
    cache = Cache(10, stale=5)
    function = flaky("answer", OSError("gone"))
    cache.call(function)
    clock.sleep(15)
    with pytest.raises(OSError, match="gone"):
        cache.call(function)
    assert cache.statistics().entries == 0


# -- keys -----------------------------------------------------------------------------------------------------


def test_the_key_is_the_function_and_its_arguments(clock):
    cache = Cache(10)
    made = []

    def one(*args, **kwargs):
        made.append(("one", args, kwargs))

    def two(*args, **kwargs):
        made.append(("two", args, kwargs))

    for _ in range(2):
        cache.call(one)
        cache.call(one, 1)
        cache.call(one, a=1, b=2)
        cache.call(one, b=2, a=1)
        cache.call(one, ("a", 1))
        cache.call(two, 1)
    assert made == [
        ("one", (), {}),
        ("one", (1,), {}),
        ("one", (), {"a": 1, "b": 2}),
        ("one", (("a", 1),), {}),
        ("two", (1,), {}),
    ]


def test_methods_are_kept_by_object(clock):
    cache = Cache(10)

    class Client:
        def __init__(self):
            self.calls = 0

        @cache
        def fetch(self):
            self.calls += 1
            return self.calls

    one, two = Client(), Client()
    assert [one.fetch(), one.fetch(), two.fetch()] == [1, 1, 1]
    assert (one.calls, two.calls) == (1, 1)


def test_a_key_of_ones_own(clock):
    cache = Cache(10, key=lambda user, **_: user["id"])
    made = []
    cached = functools.partial(cache.call, lambda user, **_: made.append(user))
    cached({"id": 1}, trace="x")
    cached({"id": 1, "name": "n"}, trace="y")
    cached({"id": 2})
    assert made == [{"id": 1}, {"id": 2}]


def test_arguments_that_are_not_hashable(clock):
    cache = Cache(10, name="c")
    with pytest.raises(
        TypeError, match="c: the arguments are not hashable; give key= a function that makes a key"
    ):
        cache.call(len, [])
    cache = Cache(10, key=lambda items: items, name="c")
    with pytest.raises(TypeError, match="c: what key= returned is not hashable"):
        cache.call(len, [])
    assert (cache._flights, cache._led) == ({}, {})


# -- a model --------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """The hooks against dicts: answers, who leads, and who waits in which order."""

    keys = st.integers(0, 2)

    @initialize(stale=st.sampled_from([0, 4]), refresh=st.sampled_from([0, 2, 6]))
    def make(self, stale, refresh):
        self.cache = Cache(8, stale=stale, refresh=refresh, max_entries=10, key=lambda key: key)
        self.stale, self.refresh = stale, refresh
        self.now = 0.0
        self.answers = {}  # key -> (value, when)
        self.leading = {}  # key -> call
        self.waiting = {0: [], 1: [], 2: []}  # key -> [(call, ticket)]
        self.number = 0

    @staticmethod
    def function(key):
        """Stand for the guarded function."""

    def age(self, key):
        value, when = self.answers.get(key, (None, -1e9))
        return value, self.now - when

    @rule(seconds=st.integers(1, 9))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(key=keys)
    def ask(self, key):
        call = Call(self.function, (key,), {})
        value, age = self.age(key)
        found = self.cache.lookup(call, self.now)
        if age < 8:
            assert found == value
        elif age < 8 + self.refresh:
            if key in self.leading:
                assert found == value
            else:
                assert isinstance(found, Stale)
                assert found.value == value
                self.leading[key] = call
        elif key in self.leading:
            assert isinstance(found, Ticket)
            self.waiting[key].append((call, found))
        else:
            assert found is MISSING
            self.leading[key] = call

    def land(self, key):
        waiting, self.waiting[key] = self.waiting[key], []
        return self.leading.pop(key), [ticket for _, ticket in waiting]

    @precondition(lambda self: self.leading)
    @rule(which=keys)
    def succeed(self, which):
        key = sorted(self.leading)[which % len(self.leading)]
        call, tickets = self.land(key)
        self.number += 1
        self.answers[key] = (self.number, self.now)
        self.cache.store(call, self.number, self.now)
        assert all(ticket.granted and ticket.value == self.number and not ticket.error for ticket in tickets)

    @precondition(lambda self: self.leading)
    @rule(which=keys, in_background=st.booleans())
    def fail(self, which, in_background):
        key = sorted(self.leading)[which % len(self.leading)]
        call, tickets = self.land(key)
        error = OSError()
        value, age = self.age(key)
        answered = age < 8 + self.stale
        if in_background:
            self.cache.refresh_failed(call, error, self.now)
        else:
            assert self.cache.recover(call, error, self.now) == (value if answered else MISSING)
        for ticket in tickets:
            assert ticket.granted
            assert (ticket.value, ticket.error) == ((value, None) if answered else (None, error))

    @precondition(lambda self: self.leading)
    @rule(which=keys)
    def cancel_leader(self, which):
        key = sorted(self.leading)[which % len(self.leading)]
        self.cache.abandon(self.leading.pop(key))
        if self.waiting[key]:
            call, ticket = self.waiting[key].pop(0)
            assert ticket.granted
            assert ticket.value is MISSING
            self.leading[key] = call

    @precondition(lambda self: any(self.waiting.values()))
    @rule(which=st.integers(0, 20))
    def cancel_waiter(self, which):
        key, index = [(key, index) for key, row in self.waiting.items() for index in range(len(row))][
            which % sum(map(len, self.waiting.values()))
        ]
        call, ticket = self.waiting[key].pop(index)
        self.cache.leave(call, ticket)
        assert not ticket.granted

    @rule()
    def clear(self):
        self.cache.clear()
        self.answers.clear()

    @invariant()
    def they_agree(self):
        if hasattr(self, "cache"):
            assert set(self.cache._flights) == {(self.function, key) for key in self.leading}
            assert set(self.cache._led) == set(self.leading.values())
            assert {key: len(row) for key, row in self.waiting.items() if row} == {
                key: len(flight.waiting) for (_, key), flight in self.cache._flights.items() if flight.waiting
            }
            assert self.cache.statistics().entries <= len(self.answers)


TestCache = Machine.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- edges whose results cannot be kept as they are ---------------------------------------------------------------


class Copies(Value):
    """Keeps texts of results, and makes results of them."""

    def __init__(self, cache):
        super().__init__()
        self.cache = cache
        self.kept = {}

    @property
    def entries(self):
        return len(self.kept)

    def clear(self):
        self.kept.clear()

    def idle(self, now):
        return not self.kept

    def lookup(self, call, now):
        text = self.kept.get(call.args)
        return MISSING if text is None else [text]

    def store(self, call, result, now):
        self.kept[call.args] = result[0]

    def recover(self, call, error, now):
        return MISSING


class Bodies(Edge):
    """Returns lists, which whoever gets them may empty."""

    cache = Copies


class Whole(Edge):
    cache = None


@pytest.mark.parametrize("backend", ["sync", "asyncio", "trio"])
def test_an_edge_may_keep_results_in_a_way_of_its_own(backend):
    def through(policy, edge, function, *args):
        if backend == "sync":
            with virtual_time():
                return policy.chain(edge)(Call(function, args, {}))

        async def main():
            return await policy.achain(edge)(Call(function.asynchronous, args, {}))

        return run(main, backend=backend)

    cache = Cache(10)
    guard = Pipeline(cache)
    function = flaky(["first"], ["second"])
    for _ in range(2):  # one state, however many chains
        assert through(guard, Bodies(), function, "a").pop() == "first"
    assert len(function.calls) == 1
    assert cache.statistics().entries == 1
    assert not cache.idle(0.0)
    assert through(cache, Whole(), flaky("as it is"), "a") == "as it is"
    assert cache.statistics().entries == 2
    cache.clear()
    assert cache.statistics().entries == 0
    assert cache.idle(0.0)
    assert through(guard, Bodies(), function, "a") == ["second"]


# -- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((-1,), {}, ValueError, "Cache: ttl=-1 is not allowed"),
        ((len,), {}, TypeError, "with parentheses"),
        ((1,), {"stale": -1}, ValueError, "stale=-1 is not allowed"),
        ((1,), {"refresh": -1}, ValueError, "refresh=-1 is not allowed"),
        ((1,), {"max_entries": 0}, ValueError, "max_entries=0 is not allowed"),
        ((1,), {"key": "id"}, TypeError, "key='id' is not allowed"),
        ((1,), {"on": "all"}, TypeError, "on='all' is not allowed"),
    ],
)
def test_bad_options(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        Cache(*arguments, **options)


def test_a_block_cannot_be_skipped():
    with pytest.raises(TypeError, match="Cache cannot guard a `with` block"), Cache(1):
        raise AssertionError("never entered")


def test_a_copy_has_answers_of_its_own(clock):
    cache = Cache(10, stale=5)
    cache.call(len, "four")
    assert cache.fresh().statistics().entries == 0
    assert repr(cache.fresh()) == repr(cache)
