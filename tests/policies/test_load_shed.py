"""Load shedding: the lag of the event loop, the standing queue, and who is shed first."""

import asyncio
import contextvars
import gc
import os
import random
import threading
import time
import traceback
import weakref
from collections import Counter
from itertools import pairwise

import anyio
import pytest
import trio

from resilient import (
    Bulkhead,
    CircuitBreaker,
    Keyed,
    LoadShed,
    Pipeline,
    Priority,
    RateLimit,
    Rejected,
    Retry,
    Shed,
    Timeout,
    loop_lag,
    priority,
    runtime,
)
from resilient.call import Call
from resilient.loop_lag import IDLE, PERIOD
from resilient.policies.load_shed import SCALE, LoadShedStatistics
from resilient.testing import capture_events, run, run_both, virtual_time
from resilient.ticket import Waited, after_wait

LOW, NORMAL, HIGH, CRITICAL = Priority
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


async def work():
    return "done"


def a_call():
    return Call(work, (), {})


async def attempt(policy, level=NORMAL):
    """Call under a policy; return what came of it."""
    with priority.of(level):
        try:
            return await policy.acall(work)
        except Shed as error:
            return error


async def served(policy):
    """Call until a call is let through."""
    while True:
        if await attempt(policy) == "done":
            return
        await anyio.sleep(PERIOD / 4)


def in_new_thread(function):
    """Run a function in a thread that has never looked at the lag of an event loop."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


# -- the lag of the event loop ------------------------------------------------------------------------------------


@BACKENDS
def test_the_first_call_after_a_block_is_shed(backend):
    async def main():
        shed = LoadShed(name="shed")
        assert await attempt(shed) == "done"
        await anyio.sleep(1)
        runtime.sleep(0.2)
        with capture_events(shed) as seen:
            error = await attempt(shed)
        assert isinstance(error, Shed)
        assert 0.1 < seen[0].seconds <= 0.2
        late = f"{seen[0].seconds:.3g}"
        assert str(error) == f"shed: the event loop is {late} s late; retry after {PERIOD:.3g} s"
        assert (seen[0].name, seen[0].reason, seen[0].priority) == ("load_shed.rejected", "lag", "normal")
        statistics = shed.statistics()
        assert statistics == LoadShedStatistics(
            lag=seen[0].seconds,
            delay=0.0,
            shed=1,
            reasons={"lag": 1, "delay": 0},
            priorities={LOW: 0, NORMAL: 1, HIGH: 0, CRITICAL: 0},
        )
        await anyio.sleep(PERIOD / 2)  # the probe has come, and was late
        assert isinstance(await attempt(shed), Shed)
        await anyio.sleep(PERIOD)  # the next one was not
        assert await attempt(shed) == "done"
        assert shed.statistics().lag == pytest.approx(0, abs=1e-9)

    run(main, backend=backend)


@BACKENDS
def test_a_loop_that_is_on_time_sheds_nothing(backend):
    async def main():
        shed = LoadShed()
        for _ in range(200):
            await anyio.sleep(0.013)
            assert await attempt(shed) == "done"
            assert shed.statistics().lag == pytest.approx(0, abs=1e-9)

    with capture_events() as seen:
        run(main, backend=backend)
    assert seen == []


@BACKENDS
@pytest.mark.parametrize("level", Priority)
@pytest.mark.parametrize("excess", [0.9, 1.1])
def test_each_priority_has_its_own_threshold(backend, level, excess):
    async def main():
        shed = LoadShed(lag=1)
        await attempt(shed)
        runtime.sleep(PERIOD + SCALE[level] * excess)
        outcome = await attempt(shed, level)
        assert isinstance(outcome, Shed) == (excess > 1)
        assert isinstance(await attempt(shed, CRITICAL), Shed) == (level is CRITICAL and excess > 1)
        assert shed.statistics().shed == shed.statistics().reasons["lag"]

    run(main, backend=backend)


@BACKENDS
def test_refusals_do_not_keep_it_shedding(backend):
    async def main():
        shed = LoadShed()
        await attempt(shed)
        runtime.sleep(1)
        for _ in range(100):
            assert isinstance(await attempt(shed), Shed)
        await anyio.sleep(2.1 * PERIOD)
        assert await attempt(shed) == "done"

    run(main, backend=backend)


@BACKENDS
def test_lag_none_does_not_look_at_the_loop(backend):
    async def main():
        shed = LoadShed(lag=None)
        await attempt(shed)
        runtime.sleep(10)
        assert await attempt(shed) == "done"

    run(main, backend=backend)


def test_sync_code_has_no_lag():
    shed = LoadShed()
    with virtual_time() as clock:
        for _ in range(10):
            assert shed.call(len, "abc") == 3
            clock.sleep(100)
        assert shed.statistics().lag == 0
        assert shed.statistics().shed == 0


def test_a_real_event_loop_that_was_blocked():
    async def main():
        shed = LoadShed(lag=0.01)
        await served(shed)  # a slow machine may be late all by itself
        until = time.monotonic() + PERIOD + 0.05
        while time.monotonic() < until:
            pass
        assert isinstance(await attempt(shed), Shed)
        await served(shed)
        return shed.statistics().reasons["lag"]

    assert in_new_thread(lambda: asyncio.run(main())) >= 1


@BACKENDS
def test_a_probe_ends_when_nobody_asks(backend):
    async def main():
        shed = LoadShed()
        await attempt(shed)
        probe = loop_lag.here.probe
        await anyio.sleep(IDLE / 2)
        assert probe.late < IDLE
        await attempt(shed)
        await anyio.sleep(IDLE * 0.9)  # not yet
        assert probe.late < IDLE
        await anyio.sleep(IDLE)
        assert probe.late == float("inf")
        assert shed.statistics().lag == 0
        if backend == "asyncio":
            assert not asyncio.get_running_loop()._scheduled
        runtime.sleep(5)
        assert await attempt(shed) == "done"  # nobody has measured the block
        assert loop_lag.here.probe is probe
        runtime.sleep(5)
        assert isinstance(await attempt(shed), Shed)

    run(main, backend=backend)


@BACKENDS
def test_policies_share_the_probe_of_a_loop(backend):
    async def main():
        one, other = LoadShed(), LoadShed(lag=5)
        await attempt(one)
        probe = loop_lag.here.probe
        await attempt(other)
        assert loop_lag.here.probe is probe
        if backend == "asyncio":
            assert len(asyncio.get_running_loop()._scheduled) == 1
        runtime.sleep(1)
        return isinstance(await attempt(one), Shed), await attempt(other)

    assert run(main, backend=backend) == (True, "done")


def test_the_probe_does_not_keep_the_context_of_a_call():
    class Request:
        pass

    request = contextvars.ContextVar("request")

    async def handle():
        request.set(Request())
        await LoadShed().acall(work)
        return weakref.ref(request.get())

    async def main():
        forgotten = await asyncio.create_task(handle())
        await asyncio.sleep(0)
        gc.collect()
        assert asyncio.get_running_loop()._scheduled
        assert forgotten() is None

    run(main)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_loops_leave_nothing_behind(backend):
    def many():
        shed, loops = LoadShed(lag=100), []

        async def main():
            loop = asyncio.get_running_loop() if backend == "asyncio" else trio.lowlevel.current_trio_token()
            loops.append(weakref.ref(loop))
            await shed.acall(work)
            assert loop_lag.look().is_of(loop)

        for _ in range(20):
            (asyncio if backend == "asyncio" else trio).run(main if backend == "trio" else main())
        gc.collect()
        return sum(loop() is not None for loop in loops), len(loop_lag.here.probes)

    assert in_new_thread(many) == (0, 0)


def test_each_thread_and_each_loop_has_its_own_probe():
    probes, together = [], threading.Barrier(4)

    async def main():
        probe = loop_lag.look()
        together.wait(60)
        assert loop_lag.look() is probe
        assert probe.is_of(asyncio.get_running_loop())
        probes.append(probe)

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(probe) for probe in probes}) == 4


def test_loops_that_run_in_turns_in_one_thread():
    def turns():
        async def look():
            return loop_lag.look()

        one, other = asyncio.new_event_loop(), asyncio.new_event_loop()
        first, second = one.run_until_complete(look()), other.run_until_complete(look())
        assert first is not second
        assert one.run_until_complete(look()) is first
        none = loop_lag.look()
        assert none not in (first, second)
        assert none.is_of(None)
        assert loop_lag.look() is none
        assert other.run_until_complete(look()) is second
        one.close()
        other.close()
        return True

    assert in_new_thread(turns)


def test_a_loop_that_ends_while_it_is_late_does_not_shed_in_the_next_one():
    shed = LoadShed()

    async def main():
        assert await attempt(shed) == "done"
        runtime.sleep(5)
        assert isinstance(await attempt(shed), Shed)

    for backend in ("asyncio", "trio", "asyncio"):
        run(main, backend=backend)


def test_another_clock_in_a_running_loop():
    async def main():
        shed = LoadShed()
        assert await attempt(shed) == "done"
        with virtual_time() as clock:
            assert await attempt(shed) == "done"
            clock.sleep(1)
            assert isinstance(await attempt(shed), Shed)

    in_new_thread(lambda: run(main, start=1e6))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_measures_its_own_loop():
    shed = LoadShed()

    def check():
        async def main():
            assert await attempt(shed) == "done"
            runtime.sleep(1)
            assert isinstance(await attempt(shed), Shed)

        run(main)
        assert asyncio.run(shed.acall(work)) == "done"

    async def fork():
        await attempt(shed)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                asyncio.events._set_running_loop(None)
                check()
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        return child

    with shed._lock:
        child = run(fork)
    assert os.waitpid(child, 0)[1] == 0


def test_time_that_begins_anew_is_not_mistaken_for_a_loop_on_time():
    async def main():
        shed = LoadShed()
        await attempt(shed)
        runtime.sleep(1)
        return isinstance(await attempt(shed), Shed)

    for start in (1e6, 0.0, -1e6):
        LoadShed().call(len, "abc")
        with virtual_time(start=start):
            LoadShed().call(len, "abc")
        assert run(main, start=start)
        assert run(main, backend="trio", start=start)


# -- the standing queue -------------------------------------------------------------------------------------------


def waits(shed, at, seconds, level=NORMAL):
    """Let a call come at some time that has waited so long; return whether it was let through."""
    with priority.of(level):
        try:
            shed.admit(a_call(), after_wait(at - seconds, at))
        except Shed:
            return False
        return True


def standing(shed=None, at=10.0, wait=0.2, level=NORMAL):
    """Make a policy that has seen waits that were all too long, up to a time."""
    shed = LoadShed(lag=None) if shed is None else shed
    assert waits(shed, at - 0.125, wait, level)
    assert waits(shed, at - 0.0625, wait, level)
    return shed


def test_calls_that_have_waited_too_long_are_shed_while_the_queue_stands():
    with virtual_time():
        shed = standing()
        with capture_events(shed) as seen, pytest.raises(Shed, match=r"this one for 0\.15 s") as caught:
            shed.admit(a_call(), after_wait(9.85, 10.0))
        assert caught.value.retry_after == 0.1
        assert caught.value.policy == "LoadShed(lag=None)"
        assert (seen[0].reason, seen[0].priority) == ("delay", "normal")
        assert seen[0].seconds == pytest.approx(0.15)
        assert waits(shed, 10.01, 0.1)  # twice the delay is not too long
        assert not waits(shed, 10.02, 0.11)


def test_a_burst_is_no_standing_queue():
    shed = LoadShed(lag=None)
    for interval in range(100):
        assert waits(shed, interval / 10, 0.3)
        assert waits(shed, interval / 10 + 0.05, 0.04)  # one short wait in each interval


def test_waits_of_the_delay_are_no_standing_queue():
    shed = LoadShed(lag=None, delay=0.25, interval=1)
    assert all(waits(shed, 100 + step / 4, 0.25) for step in range(40))
    assert waits(shed, 110.1, 5.0)


def test_it_ends_with_an_interval_that_has_a_short_wait():
    shed = standing()
    assert not waits(shed, 10.0, 0.2)
    assert waits(shed, 10.03, 0.049)
    assert not waits(shed, 10.09, 0.2)  # the interval is not over
    assert waits(shed, 10.11, 0.2)


def test_it_goes_on_as_long_as_all_waits_are_too_long():
    shed = standing()
    assert not any(waits(shed, 10 + step / 30, 0.11) for step in range(100))


def test_a_call_that_did_not_wait_ends_it_at_once():
    shed = standing()
    assert not waits(shed, 10.0, 0.2)
    assert shed.admit(a_call(), 10.01) is None
    assert waits(shed, 10.02, 0.2)
    assert waits(shed, 10.11, 0.2)  # and the interval after
    assert not waits(shed, 10.22, 0.2)


def test_a_pause_ends_it():
    shed = standing()
    assert not waits(shed, 10.0, 0.2)
    assert waits(shed, 15.0, 0.2)


def test_a_queue_that_moves_less_than_once_in_an_interval():
    """Who has waited since before the last one came out knows that the queue was not empty in between."""
    shed = LoadShed(lag=None)
    assert waits(shed, 10.0, 3.0)
    assert not waits(shed, 11.0, 3.0)
    assert not waits(shed, 12.0, 1.5)
    assert waits(shed, 13.5, 1.2)  # came after the one before had gone


def test_time_that_begins_anew():
    shed = standing()
    assert waits(shed, 1.0, 0.2)
    assert waits(shed, 1.05, 0.2)
    assert not waits(shed, 1.1, 0.2)


@pytest.mark.parametrize("level", Priority)
def test_thresholds_of_the_delay_by_priority(level):
    allowed = 0.05 * SCALE[level]
    shed = standing(wait=allowed * 1.1, level=level)
    assert waits(shed, 10.0, allowed * 1.9, level)
    assert not waits(shed, 10.01, allowed * 2.1, level)
    shed = standing(wait=allowed * 0.9, level=level)
    assert waits(shed, 10.0, allowed * 10, level)


def test_the_waits_of_each_priority_are_judged_apart():
    shed = LoadShed(lag=None)
    for step in range(30):
        waits(shed, 10 + step / 30, 0.3, LOW)
        assert waits(shed, 10 + step / 30, 0.01, HIGH)
    assert not waits(shed, 11, 0.3, LOW)
    assert waits(shed, 11, 0.3, NORMAL)
    assert waits(shed, 11, 0.3, HIGH)


def test_statistics_and_idle():
    with virtual_time() as clock:
        shed = LoadShed(lag=None)
        empty = shed.statistics()
        assert empty == LoadShedStatistics(
            lag=0.0,
            delay=0.0,
            shed=0,
            reasons={"lag": 0, "delay": 0},
            priorities=dict.fromkeys(Priority, 0),
        )
        assert shed.idle(0.0)
        clock.sleep(10)
        standing(shed)
        assert not shed.idle(10.0)
        assert not waits(shed, 10.0, 0.2)
        statistics = shed.statistics()
        assert (statistics.delay, statistics.shed) == (pytest.approx(0.2), 1)
        assert statistics.reasons == {"lag": 0, "delay": 1}
        assert statistics.priorities == {LOW: 0, NORMAL: 1, HIGH: 0, CRITICAL: 0}
        with pytest.raises(TypeError):
            statistics.reasons["lag"] = 1
        clock.sleep(1)
        assert shed.statistics().delay == 0
        assert shed.idle(11.0)


def test_8_threads():
    shed, start = standing(at=10.0), threading.Barrier(8)
    outcomes = [Counter() for _ in range(8)]

    def hammer(outcome):
        start.wait()
        for step in range(500):
            outcome[waits(shed, 10 + step / 10_000, 0.2)] += 1

    threads = [threading.Thread(target=hammer, args=(outcome,)) for outcome in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcomes, Counter()) == {False: 4_000}
    assert shed.statistics().shed == 4_000


# -- where waits come from ----------------------------------------------------------------------------------------


def test_the_wait_in_a_bulkhead_counts_and_the_permit_comes_back():
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=9, name="b")
        guard = Pipeline(bulkhead, LoadShed(name="shed"))
        log = []

        async def hold():
            await colour.sleep(1)

        def caller(number):
            async def call():
                await colour.sleep(number / 16)
                try:
                    await colour.call(guard, hold)
                except Shed as error:
                    log.append((number, error.policy, colour.now()))
                else:
                    log.append((number, colour.now()))

            return call

        await colour.gather(*map(caller, range(4)))
        assert bulkhead.idle(colour.now())
        return tuple(log)

    # The first wait is no standing queue yet; the second one is, and its permit goes on to the next.
    trace = run_both(scenario)
    assert [name for name, _ in trace] == ["bulkhead.queued"] * 3 + ["load_shed.rejected"] * 2
    assert [at for _, at in trace][3:] == [2.0, 2.0]


def seen_by(*outer, calls=1):
    """Return the waits that a gate inside of some policies sees."""
    seen = []

    class Look(LoadShed):
        def admit(self, call, now):
            seen.append(now.seconds if isinstance(now, Waited) else None)

    return Pipeline(*outer, Look()), seen


def test_waits_add_up():
    with virtual_time() as clock:
        first, second = Bulkhead(1, queue=1), Bulkhead(1, queue=1)
        guard, seen = seen_by(first, second)

        def hold(bulkhead, seconds):
            with bulkhead:
                clock.sleep(seconds)

        def late():
            clock.sleep(0.5)
            guard.call(len, "abc")

        clock.run_threads(lambda: hold(first, 2), lambda: hold(second, 3), late)
        assert seen == [2.5]


def test_the_pace_of_a_rate_limit_is_no_queue():
    with virtual_time():
        guard, seen = seen_by(RateLimit("1/s", wait=10))
        for _ in range(3):
            guard.call(len, "abc")
        assert seen == [None, None, None]


def test_the_next_attempt_is_not_blamed_for_the_wait_of_the_first():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1, queue=1)
        guard, seen = seen_by(bulkhead, Retry(2, on=OSError, wait=1), CircuitBreaker())

        def fail():
            raise ConnectionError

        def hold():
            with bulkhead:
                clock.sleep(2)

        def late():
            clock.sleep(0.5)
            with pytest.raises(ConnectionError):
                guard.call(fail)

        clock.run_threads(hold, late)
        assert seen == [1.5, None]


@pytest.mark.parametrize("over", [2.0, 3.0])
def test_overload_uses_the_capacity_and_bounds_the_wait(over):
    permits, service, asked = 20, 0.1, 4_000
    dice = random.Random(7)
    waited, ends = [], []
    refused = Counter()

    async def main():
        guard = Pipeline(Bulkhead(permits, queue=10 * permits), LoadShed())
        loop = asyncio.get_running_loop()

        async def caller():
            arrived = loop.time()

            async def serve():
                waited.append(loop.time() - arrived)
                await asyncio.sleep(dice.expovariate(1 / service))
                ends.append(loop.time())

            try:
                await guard.acall(serve)
            except Rejected as error:
                refused[type(error)] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(asked):
                group.create_task(caller())
                await asyncio.sleep(dice.expovariate(over * permits / service))
            return loop.time()

    last = run(main)
    capacity = last * permits / service
    assert sum(end <= last for end in ends) >= 0.95 * capacity
    waited.sort()
    assert waited[int(len(waited) * 0.99)] <= 0.2
    assert refused[Shed] > 0.3 * asked
    assert waited[len(waited) // 2] <= 0.1 + 1e-9


def test_who_is_shed_first_under_overload():
    asked, served = Counter(), Counter()
    dice = random.Random(3)

    async def main():
        guard = Pipeline(Bulkhead(10, queue=100), LoadShed())

        async def caller(level):
            asked[level] += 1
            with priority.of(level):
                try:
                    await guard.acall(asyncio.sleep, dice.expovariate(10))
                except Rejected:
                    return
            served[level] += 1

        async with asyncio.TaskGroup() as group:
            for level in dice.choices(list(Priority), [0.4, 0.3, 0.25, 0.05], k=4_000):
                group.create_task(caller(level))
                await asyncio.sleep(dice.expovariate(200))

    run(main)
    share = {level: served[level] / asked[level] for level in Priority}
    assert share[HIGH] >= 0.99
    assert share[CRITICAL] >= 0.99
    assert all(lower <= higher for lower, higher in pairwise(share.values()))


# -- using it -----------------------------------------------------------------------------------------------------


def test_alone_as_a_decorator_and_as_a_block():
    async def scenario(colour):
        shed = LoadShed()
        assert await colour.call(shed, work) == "done"
        if colour.name == "sync":
            with shed:
                pass
            assert shed(lambda: 3)() == 3
        else:
            async with shed:
                pass
            assert await shed(work)() == "done"

    assert run_both(scenario) == []


def test_in_a_timeout_and_by_key():
    with virtual_time():
        assert Pipeline(Timeout(5), LoadShed()).call(len, "abc") == 3
        assert Keyed(LoadShed, key=lambda text: text).call(len, "abc") == 3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lag": 0}, ValueError, "LoadShed: lag=0 is not allowed; give a number of seconds"),
        ({"delay": "1"}, TypeError, "LoadShed: delay='1' is not allowed"),
        ({"interval": None}, TypeError, "LoadShed: interval=None is not allowed"),
        ({"lag": None, "delay": None}, ValueError, "give at least one of lag= and delay="),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        LoadShed(**options)


def test_repr_and_copies():
    shed = standing(LoadShed(lag=None, delay=0.04))
    assert repr(shed) == "LoadShed(lag=None, delay=0.04)"
    assert not waits(shed, 10.0, 0.2)
    assert shed.fresh().statistics().shed == 0
    assert waits(shed.fresh(), 10.0, 0.2)
