import asyncio
import contextvars
import gc
import re
import threading
import weakref
from collections import deque
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta

import anyio
import pytest

from resilient import (
    Bulkhead,
    BulkheadFull,
    Fallback,
    Pipeline,
    Retry,
    ThreadsExhausted,
    TimedOut,
    Timeout,
    deadline,
    runtime,
    workers,
)
from resilient.events import ThreadAbandoned, ThreadsRejected, TimeoutExpired
from resilient.testing import capture_events, run, run_both, virtual_time
from resilient.timers import Alarm

BACKENDS = ("asyncio", "trio")

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def raised(colour, policy, function, *args):
    """Call, and return the error that comes out."""
    try:
        result = await colour.call(policy, function, *args)
    except Exception as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def times_out(seconds=None):
    return pytest.raises(TimedOut, match=None if seconds is None else f"not done after {seconds:g} s")


# -- both colours -----------------------------------------------------------------------------------------------


def test_a_call_that_is_done_in_time_is_left_alone():
    async def scenario(colour):
        async def function(value, *, key):
            await colour.sleep(1.9)
            return value, key

        assert await colour.call(Timeout(2), function, 1, key="x") == (1, "x")
        assert colour.now() == 1.9
        assert deadline.current() is None

    assert run_both(scenario) == []


def test_a_call_that_is_late_times_out():
    async def scenario(colour):
        async def function():
            await colour.sleep(100)

        policy = Timeout(2, name="db")
        error = await raised(colour, policy, function)
        assert type(error) is TimedOut
        assert isinstance(error, TimeoutError)
        assert (error.policy, error.seconds, str(error)) == ("db", 2.0, "db: not done after 2 s")
        assert colour.now() == 2
        assert deadline.current() is None
        if colour.name == "sync":
            await colour.sleep(100)  # until the thread has ended

    assert run_both(scenario) == [("timeout.expired", 2.0)]


def test_a_duration_may_be_a_timedelta():
    policy = Timeout(timedelta(minutes=2))
    assert policy.limit() == 120.0


def test_the_deadline_is_visible_inside():
    async def scenario(colour):
        async def function():
            await colour.sleep(3)
            current = deadline.current()
            return deadline.remaining(), current.at, current.scope

        policy = Timeout(10)
        await colour.sleep(5)
        assert await colour.call(policy, function) == (7, 15, policy)
        assert deadline.remaining() is None

    run_both(scenario)


def test_code_can_look_at_its_deadline():
    async def scenario(colour):
        seen = []

        async def function():
            deadline.check()
            await colour.sleep(3)
            seen.append(deadline.remaining())
            deadline.check()

        policy = Timeout(2, interrupt=False, name="soft")
        error = await raised(colour, policy, function)
        assert (type(error), error.policy, seen) == (TimedOut, "soft", [-1])
        assert colour.now() == 3
        deadline.check()  # no deadline here

    assert run_both(scenario) == [("timeout.expired", 3.0)]


def test_without_interrupt_a_late_result_is_a_result():
    async def scenario(colour):
        async def function():
            await colour.sleep(3)
            return threading.get_ident()

        assert await colour.call(Timeout(2, interrupt=False), function) == threading.get_ident()

    assert run_both(scenario) == []


def test_an_outer_deadline_that_comes_first_wins_and_is_named():
    async def scenario(colour):
        async def function():
            await colour.sleep(100)

        outer, inner = Timeout(2, name="outer"), Timeout(5, name="inner")
        for pipeline in (outer | inner, inner | outer):
            start = colour.now()
            error = await raised(colour, pipeline, function)
            assert (error.policy, error.seconds, colour.now() - start) == ("outer", 2, 2)
        if colour.name == "sync":
            await colour.sleep(100)

    assert run_both(scenario) == [("timeout.expired", 2.0), ("timeout.expired", 4.0)]


def test_of_two_deadlines_at_the_same_time_it_is_the_outer_one():
    async def scenario(colour):
        async def function():
            await colour.sleep(100)

        error = await raised(colour, Timeout(2, name="outer") | Timeout(2, name="inner"), function)
        assert error.policy == "outer"
        if colour.name == "sync":
            await colour.sleep(200)

    run_both(scenario)


def test_so_it_is_if_the_inner_one_begins_later():
    async def main():
        async def function():
            await anyio.sleep(1)
            await Timeout(1, name="inner").acall(anyio.sleep, 100)

        with times_out(2):
            await Timeout(2, name="outer").acall(function)

    for backend in BACKENDS:
        run(main, backend=backend)

    with virtual_time() as clock:

        def function():
            clock.sleep(1)
            Timeout(1, name="inner").call(clock.sleep, 100)

        with times_out(2):
            Timeout(2, name="outer").call(function)
        clock.sleep(200)


def test_nothing_begins_after_the_deadline_of_an_outer_scope():
    async def scenario(colour):
        calls = []

        async def function():
            await colour.sleep(3)
            for policy in (Timeout(10), Timeout(10, interrupt=False), Timeout(1)):
                error = await raised(colour, policy, lambda: calls.append(1))
                assert (type(error), error.policy) == (TimedOut, "soft")

        await colour.call(Timeout(2, interrupt=False, name="soft"), function)
        assert calls == []

    run_both(scenario)


def test_a_published_deadline_is_enforced_by_a_scope_further_in():
    async def scenario(colour):
        async def function():
            await colour.sleep(100)

        soft, hard = Timeout(5, interrupt=False, name="soft"), Timeout(10, name="hard")
        error = await raised(colour, soft | hard, function)
        assert (error.policy, colour.now()) == ("soft", 5)
        assert await colour.call(soft | hard, lambda: "quick") == "quick"
        error = await raised(colour, Timeout(20, interrupt=False) | hard, function)  # its own comes first
        assert (error.policy, colour.now()) == ("hard", 15)
        if colour.name == "sync":
            await colour.sleep(400)

    run_both(scenario)


def test_a_published_deadline_is_enforced_only_once():
    async def main():
        soft, hard = Timeout(5, interrupt=False, name="soft"), Timeout(10, name="hard")

        async def nested():
            assert deadline.remaining() == 5
            await hard.acall(asyncio.sleep, 1)
            assert len(asyncio.get_running_loop()._scheduled) == 1
            await hard.acall(asyncio.sleep, 100)

        with times_out(5):
            await (soft | hard).acall(nested)
        assert asyncio.current_task().cancelling() == 0

    run(main)


def test_a_timeout_error_of_the_function_comes_out_untouched():
    async def scenario(colour):
        own = TimeoutError("socket")

        async def function():
            await colour.sleep(1)
            raise own

        assert await raised(colour, Timeout(2), function) is own
        assert not hasattr(own, "__notes__")

    assert run_both(scenario) == []


def test_errors_and_interrupts_of_the_function_come_out():
    async def scenario(colour):
        errors = []
        for error in (ValueError("bad"), KeyError("x"), ExceptionGroup("g", [OSError()])):

            async def function(error=error):
                raise error

            errors.append(await raised(colour, Timeout(2), function) is error)
        assert errors == [True] * 3

    run_both(scenario)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_base_exceptions_of_a_thread_come_out(error):
    def function():
        raise error("here")

    with virtual_time(), pytest.raises(error, match="here"):
        Timeout(2).call(function)


def test_each_attempt_of_a_retry_has_its_own_time():
    async def scenario(colour):
        began = []

        async def function():
            began.append(colour.now())
            await colour.sleep(100 if len(began) < 3 else 1)
            return "third"

        pipeline = Pipeline(Retry(on=TimedOut, wait=1), Timeout(2))
        assert await colour.call(pipeline, function) == "third"
        assert began == [0, 3, 6]
        if colour.name == "sync":
            await colour.sleep(200)

    run_both(scenario)


def test_concurrent_calls_end_each_at_its_own_time():
    async def scenario(colour):
        policy = Timeout(10)
        ends = []

        def one(index):
            async def call():
                await colour.sleep(index / 10)
                try:
                    await colour.call(policy, body, (index * 7) % 20 + 0.5)
                except TimedOut:
                    ends.append((index, "late", round(colour.now() - index / 10, 6)))
                else:
                    ends.append((index, "done", round(colour.now() - index / 10, 6)))

            return call

        async def body(seconds):
            await colour.sleep(seconds)

        await colour.gather(*map(one, range(40)))
        expected = {}
        for index in range(40):
            length = (index * 7) % 20 + 0.5
            expected[index] = (index, "late", 10.0) if length > 10 else (index, "done", length)
        assert sorted(ends) == [expected[index] for index in range(40)]
        if colour.name == "sync":
            await colour.sleep(100)

    run_both(scenario)


# -- async ------------------------------------------------------------------------------------------------------


def test_a_cancellation_from_outside_stays_a_cancellation(backend):
    async def main():
        with anyio.move_on_after(1) as outside:
            await Timeout(5).acall(anyio.sleep, 100)
        assert outside.cancelled_caught
        assert deadline.current() is None

    with capture_events() as seen:
        run(main, backend=backend)
    assert seen == []


@pytest.mark.parametrize("order", ["timer first", "cancel first"])
def test_a_cancellation_in_the_tick_of_the_deadline_stays_a_cancellation(order):
    async def main():
        loop = asyncio.get_running_loop()
        policy = Timeout(5)
        if order == "cancel first":
            loop.call_later(5, lambda: task.cancel("outside"))
        task = asyncio.create_task(policy.acall(asyncio.sleep, 100))
        await asyncio.sleep(0)
        if order == "timer first":
            loop.call_later(5, lambda: task.cancel("outside"))
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelled(), task.cancelling()

    with capture_events() as seen:
        assert run(main) == (True, 1)
    assert seen == []


def test_a_cancellation_that_was_asked_for_before_is_not_ours():
    async def main():
        async def body():
            task = asyncio.current_task()
            task.cancel()
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass  # swallowed, but the request still counts
            assert task.cancelling() == 1
            with times_out(5):
                await Timeout(5).acall(asyncio.sleep, 100)
            assert task.cancelling() == 1
            task.uncancel()

        await asyncio.create_task(body())

    run(main)


def test_our_own_request_is_taken_back():
    async def main():
        task = asyncio.current_task()
        for _ in range(3):
            with times_out():
                await Timeout(1).acall(asyncio.sleep, 100)
            assert task.cancelling() == 0
        await asyncio.sleep(1)  # and nothing is left that would hit later code
        async with asyncio.timeout(1):
            with times_out():
                await Timeout(0.5).acall(asyncio.sleep, 100)

    run(main)


def test_two_due_in_one_tick_raise_the_outer_one_only():
    """The loop is blocked until both are due: inner and outer timer fire one after the other."""

    async def main(clock):
        outer, inner = Timeout(5, name="outer"), Timeout(4, name="inner")

        async def body():
            clock._now += 10  # as code does that never awaits
            await asyncio.sleep(1)

        with pytest.raises(TimedOut) as caught:
            await (outer | inner).acall(body)
        assert asyncio.current_task().cancelling() == 0
        return caught.value.policy

    async def with_clock():
        return await main(asyncio.get_running_loop()._virtual)

    with capture_events() as seen:
        assert run(with_clock) == "outer"
    assert [event.name for event in seen] == ["timeout.expired"]


def test_an_inner_timeout_leaves_the_outer_one_working(backend):
    async def main():
        async def body():
            with times_out(1):
                await Timeout(1).acall(anyio.sleep, 100)
            await anyio.sleep(100)

        start = runtime.now()
        with times_out(5):
            await Timeout(5).acall(body)
        return runtime.now() - start

    assert run(main, backend=backend) == pytest.approx(5)


def test_together_with_the_timeouts_of_the_event_loop(backend):
    async def main():
        with pytest.raises(TimeoutError) as caught:
            with anyio.fail_after(2):
                await Timeout(5).acall(anyio.sleep, 100)
        assert not isinstance(caught.value, TimedOut)
        with times_out(2):
            with anyio.fail_after(5):
                await Timeout(2).acall(anyio.sleep, 100)

        async def body():
            with anyio.fail_after(5):
                await anyio.sleep(100)

        with times_out(2):
            await Timeout(2).acall(body)

    run(main, backend=backend)


def test_a_body_that_swallows_the_cancellation_has_the_last_word():
    async def main():
        async def stubborn():
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                await asyncio.sleep(1)
                return "swallowed"

        assert await Timeout(2).acall(stubborn) == "swallowed"
        assert asyncio.current_task().cancelling() == 0

        async def replacing():
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                raise KeyError("instead") from None

        with pytest.raises(KeyError):
            await Timeout(2).acall(replacing)
        assert asyncio.current_task().cancelling() == 0
        assert deadline.current() is None
        await asyncio.sleep(0)

    run(main)


def test_code_that_goes_on_after_swallowing_is_stopped_at_the_next_scope():
    async def main():
        async def stubborn():
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                return await Timeout(10, name="inner").acall(asyncio.sleep, 1)

        with pytest.raises(TimedOut) as caught:
            await Timeout(2, name="outer").acall(stubborn)
        return caught.value.policy

    assert run(main) == "outer"


def test_a_body_that_never_awaits_is_not_interrupted(backend):
    async def main():
        async def busy():
            runtime.sleep(10)
            return "late"

        result = await Timeout(2).acall(busy)
        await anyio.sleep(5)
        return result

    assert run(main, backend=backend) == "late"


def test_context_variables_that_the_body_sets_are_kept(backend):
    async def main():
        async def body():
            variable.set("inside")

        await Timeout(2).acall(body)
        assert variable.get() == "inside"
        async with Timeout(2):
            variable.set("block")
        return variable.get()

    assert contextvars.copy_context().run(run, main, backend=backend) == "block"


def test_a_call_that_ends_in_time_leaves_no_timer_behind():
    async def main():
        loop = asyncio.get_running_loop()
        policy = Timeout(30)
        for _ in range(1000):
            await policy.acall(asyncio.sleep, 0)
        queue = policy._queues.last
        assert len(queue.pending) == 0
        return len(loop._scheduled)

    assert run(main) == 1


def test_many_calls_at_once_share_one_timer_of_the_loop():
    async def main():
        loop = asyncio.get_running_loop()
        policy = Timeout(30)
        tasks = [asyncio.create_task(policy.acall(asyncio.Event().wait)) for _ in range(100)]
        await asyncio.sleep(0)
        assert len(loop._scheduled) == 1
        assert len(policy._queues.last.pending) == 100
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {TimedOut}
        assert len(policy._queues.last.pending) == 0
        return loop.time()

    assert run(main) == 30


def test_the_queue_expires_calls_in_their_order_and_rearms_for_the_next():
    async def main():
        policy = Timeout(10)
        ends = []

        async def one(start):
            await asyncio.sleep(start)
            try:
                await policy.acall(asyncio.sleep, 100)
            except TimedOut:
                ends.append((start, asyncio.get_running_loop().time()))

        await asyncio.gather(*(one(start) for start in (3, 1, 2, 1, 25)))
        return ends

    assert run(main) == [(1, 11), (1, 11), (2, 12), (3, 13), (25, 35)]


def test_ended_calls_behind_a_long_one_go_with_it():
    async def main():
        policy = Timeout(30)
        long = asyncio.create_task(policy.acall(asyncio.sleep, 29))
        await asyncio.sleep(0)
        await asyncio.gather(*(policy.acall(asyncio.sleep, 0) for _ in range(50)))
        pending = policy._queues.last.pending
        # One after the other, nothing stays behind the long call: each takes its own entry away again.
        before = len(pending)
        for _ in range(1000):
            await policy.acall(asyncio.sleep, 0)
        assert len(pending) <= max(before, 1)
        # What did stay holds no task.
        assert [timer.task for timer in list(pending)[1:]] == [None] * (len(pending) - 1)
        await long
        assert len(pending) == 0

    run(main)


def test_an_ended_call_in_the_queue_keeps_its_task_not_alive():
    async def main():
        policy = Timeout(30)
        release = asyncio.Event()
        long = asyncio.create_task(policy.acall(release.wait))
        short, last = (asyncio.create_task(policy.acall(asyncio.sleep, seconds)) for seconds in (1, 2))
        await asyncio.sleep(0)
        gone = weakref.ref(short)
        await short
        del short
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
        assert len(policy._queues.last.pending) == 3
        release.set()
        await long
        await last
        assert len(policy._queues.last.pending) == 0

    run(main)


def test_a_timer_that_fires_over_ended_calls_lets_go_of_them():
    async def main():
        policy = Timeout(10)

        async def one(start, seconds):
            await asyncio.sleep(start)
            await policy.acall(asyncio.sleep, seconds)

        late = asyncio.create_task(one(0, 100))
        rest = [asyncio.create_task(one(1, seconds)) for seconds in (3, 2, 8)]
        with times_out(10):
            await late
        await asyncio.gather(*rest)
        assert len(policy._queues.last.pending) == 0

    run(main)


# -- alarms: one deadline for one step after another ------------------------------------------------------------


def alarm(at, scope=None):
    return Alarm(deadline.Deadline(at, scope or Timeout(1)))


async def step(alarm, seconds):
    """Sleep as a step; return whether it was ended, and when."""
    with alarm:
        await asyncio.sleep(seconds)
    return alarm.cancelled_caught, runtime.now()


def test_an_alarm_ends_the_step_that_takes_too_long_and_no_time_between():
    async def main():
        mine = alarm(10)
        assert await step(mine, 4) == (False, 4)
        await asyncio.sleep(5)
        assert await step(mine, 4) == (True, 10)
        assert await step(mine, 4) == (True, 10)  # it is over: at the first chance
        await asyncio.sleep(1)
        assert asyncio.current_task().cancelling() == 0

    run(main)


def test_an_alarm_that_rings_between_two_steps_ends_the_next():
    async def main():
        mine = alarm(5)
        assert await step(mine, 4) == (False, 4)
        await asyncio.sleep(2)
        with mine:
            pass
        assert not mine.cancelled_caught  # nothing had to be waited for
        assert await step(mine, 4) == (True, 6)

    run(main)


def test_alarms_ring_in_the_order_of_their_times_and_share_a_timer_of_the_loop():
    """However they were set: bodies do not begin in the order of their calls."""

    async def main():
        scope, ends = Timeout(1), []

        async def one(at):
            _, now = await step(alarm(at, scope), 100)
            ends.append((at, now))

        await asyncio.gather(*(one(at) for at in (5, 9, 3, 7, 3)))
        assert ends == [(3, 3), (3, 3), (5, 5), (7, 7), (9, 9)]
        assert len(scope._alarms.last.pending) == 0
        others = [asyncio.create_task(step(alarm(at, scope), 1)) for at in (20, 30, 40)]
        await asyncio.sleep(0)
        scheduled = asyncio.get_running_loop()._scheduled
        assert sum(handle._when >= 20 for handle in scheduled) == 1
        return await asyncio.gather(*others)

    assert run(main) == [(False, 10)] * 3


def test_an_alarm_that_is_disarmed_leaves_the_queue_but_not_a_step():
    async def main():
        scope = Timeout(1)
        first, second, third = (alarm(at, scope) for at in (10, 20, 30))
        first.disarm()  # it is not in the queue
        for each in (first, second, third):
            assert await step(each, 1) == (False, runtime.now())
        pending = scope._alarms.last.pending
        second.disarm()  # it goes with those before it
        assert len(pending) == 3
        first.disarm()
        assert list(pending) == [third]
        under_way = asyncio.create_task(step(third, 100))
        await asyncio.sleep(1)
        third.disarm()
        assert list(pending) == [third]
        assert await under_way == (True, 30)
        fourth = alarm(40, scope)
        await step(fourth, 1)
        fourth.disarm()
        assert not pending

    run(main)


def test_a_cancellation_by_somebody_else_is_not_swallowed_by_an_alarm():
    async def main():
        mine = alarm(5)
        task = asyncio.create_task(step(mine, 100))
        await asyncio.sleep(5)  # the alarm rings in the same moment, before or after
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not mine.cancelled_caught

    run(main)


def test_an_error_in_place_of_the_cancellation_by_an_alarm_goes_on():
    async def step_that_fails():
        with alarm(7):
            try:
                await asyncio.sleep(9)
            except asyncio.CancelledError:
                raise KeyError from None

    async def main():
        with pytest.raises(KeyError):
            await step_that_fails()
        assert asyncio.current_task().cancelling() == 0

    run(main)


def test_an_alarm_wants_a_task():
    async def main():
        raised = []

        def outside():
            try:
                alarm(5).__enter__()
            except RuntimeError as error:
                raised.append(str(error))

        asyncio.get_running_loop().call_soon(outside)
        await asyncio.sleep(0)
        return raised

    assert run(main) == ["Timeout(1) limits the time of a task, and there is none"]


def test_an_alarm_goes_along_to_another_loop():
    """As when a body is begun in one `asyncio.run` and read on in the next; and it keeps no loop alive."""
    mine = alarm(float("inf"))
    loops = []

    async def main(at):
        mine.at = runtime.now() + at
        loops.append(weakref.ref(asyncio.get_running_loop()))
        with mine:
            await asyncio.sleep(0.01 if at > 1 else 100)
        return mine.cancelled_caught

    assert asyncio.run(main(100)) is False
    assert asyncio.run(main(0.01)) is True
    gc.collect()
    assert [loop() for loop in loops] == [None, None]


def test_an_outer_scope_that_ends_sooner_arms_nothing():
    async def main():
        inner = Timeout(10)

        async def body():
            await inner.acall(asyncio.sleep, 1)
            return inner._queues.last, len(asyncio.get_running_loop()._scheduled)

        return await Timeout(5).acall(body)

    assert run(main) == (None, 1)


def test_one_policy_in_several_loops_one_after_the_other(backend):
    policy = Timeout(2)

    async def main():
        assert await policy.acall(anyio.sleep, 1) is None
        with times_out(2):
            await policy.acall(anyio.sleep, 100)

    for _ in range(3):
        run(main, backend=backend)
    run(main, backend="asyncio")
    run(main, backend="trio")
    gc.collect()
    assert len(policy._queues._queues) <= 1  # ended loops are forgotten


def test_one_policy_in_two_loops_in_turns():
    policy = Timeout(2)
    loops = [asyncio.new_event_loop() for _ in range(2)]
    try:
        for _ in range(2):
            for loop in loops:
                assert loop.run_until_complete(policy.acall(asyncio.sleep, 0, "done")) == "done"
        assert len(policy._queues._queues) == 2
    finally:
        for loop in loops:
            loop.close()


def test_a_loop_that_was_stopped_in_a_call_leaves_nothing_wrong():
    policy = Timeout(2)

    class Stopped(BaseException):
        pass

    async def stopped():
        async with policy:
            raise Stopped

    with pytest.raises(Stopped):
        run(stopped)
    assert run(policy.acall, asyncio.sleep, 1) is None


def test_what_enforces_the_deadline_of_another_scope_keeps_no_loop_timer():
    async def main():
        await (Timeout(5, interrupt=False) | Timeout(10)).acall(asyncio.sleep, 1)
        return [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]

    assert run(main) == []


def test_outside_of_a_task_there_is_nothing_to_limit():
    async def body():
        return 1

    coroutine = Timeout(2).acall(body)
    with pytest.raises(RuntimeError):
        coroutine.send(None)
    assert deadline.current() is None

    for policy in (Timeout(2), Timeout(5, interrupt=False) | Timeout(10)):

        async def main(policy=policy):
            outcome = asyncio.get_running_loop().create_future()

            def no_task():
                coroutine = policy.acall(body)
                try:
                    coroutine.send(None)
                except RuntimeError as error:
                    outcome.set_result(str(error))

            asyncio.get_running_loop().call_soon(no_task)
            return await outcome

        assert "limits the time of a task, and there is none" in run(main)


def test_tasks_of_a_group_end_with_the_call(backend):
    async def main():
        cancelled = []

        async def child(index):
            try:
                await Timeout(10).acall(anyio.sleep, 100)
            except BaseException as error:
                cancelled.append((index, type(error)))
                raise

        async def parent():
            async with anyio.create_task_group() as group:
                for index in range(3):
                    group.start_soon(child, index)

        start = runtime.now()
        with times_out(2):
            await Timeout(2, name="outer").acall(parent)
        assert runtime.now() - start == pytest.approx(2)
        assert sorted(index for index, _ in cancelled) == [0, 1, 2]
        assert not {kind for _, kind in cancelled} & {TimedOut, TimeoutError}

    with capture_events() as seen:
        run(main, backend=backend)
    assert [(event.name, event.policy) for event in seen] == [("timeout.expired", "outer")]


def test_a_task_of_a_standard_group_ends_with_the_call():
    async def main():
        async def parent():
            async with asyncio.TaskGroup() as group:
                group.create_task(Timeout(10).acall(asyncio.sleep, 100))
                group.create_task(Timeout(1).acall(asyncio.sleep, 0.5))

        with times_out(2):
            await Timeout(2).acall(parent)

    run(main)


def test_a_child_task_has_a_time_of_its_own(backend):
    async def main():
        async def child():
            with times_out(1):
                await Timeout(1).acall(anyio.sleep, 100)
            ended.append(runtime.now() - start)

        async def parent():
            async with anyio.create_task_group() as group:
                group.start_soon(child)
                group.start_soon(child)

        ended = []
        start = runtime.now()
        await Timeout(5).acall(parent)
        return ended

    assert run(main, backend=backend) == [1, 1]


def test_detached_work_does_not_inherit_the_deadline():
    async def main():
        left = []

        async def background(wait):
            left.append(deadline.remaining())
            await asyncio.sleep(wait)
            left.append(deadline.remaining())
            return await Timeout(5).acall(asyncio.sleep, 1, "done")

        async def parent():
            with deadline.detached():
                task = asyncio.create_task(background(10))
            assert deadline.remaining() == 2
            return task

        task = await Timeout(2).acall(parent)
        assert await task == "done"
        return left

    assert run(main) == [None, None]


def test_work_that_was_not_detached_is_stopped_at_its_next_scope():
    async def main():
        async def background():
            await asyncio.sleep(10)
            return await Timeout(5).acall(asyncio.sleep, 1)

        async def parent():
            return asyncio.create_task(background())

        task = await Timeout(2, name="outer").acall(parent)
        with pytest.raises(TimedOut) as caught:
            await task
        return caught.value.policy

    assert run(main) == "outer"


def test_an_async_block(backend):
    async def main():
        async with Timeout(2) as entered:
            await anyio.sleep(1)
            assert deadline.remaining() == pytest.approx(1)
        assert isinstance(entered, Timeout)
        with times_out(2):
            async with Timeout(2):
                await anyio.sleep(100)
        with pytest.raises(KeyError):
            async with Timeout(2):
                raise KeyError
        async with Timeout(5), Timeout(10):  # the inner one arms nothing
            await anyio.sleep(1)
        with times_out(5):
            async with Timeout(5), Timeout(10):
                await anyio.sleep(100)
        assert deadline.current() is None
        await anyio.sleep(100)

    run(main, backend=backend)


def test_an_async_block_without_interrupt(backend):
    async def main():
        async with Timeout(2, interrupt=False):
            await anyio.sleep(5)
            assert deadline.remaining() == pytest.approx(-3)
            with times_out(2):
                deadline.check()
        assert deadline.current() is None

    run(main, backend=backend)


def test_a_sync_block_is_refused_unless_nothing_is_interrupted():
    with pytest.raises(TypeError, match="Timeout cannot interrupt a sync `with` block"), Timeout(2):
        pass
    with pytest.raises(TypeError, match="interrupt=False"):
        Timeout(2).block()
    with virtual_time() as clock:
        with Timeout(2, interrupt=False):
            clock.sleep(3)
            with times_out(2):
                deadline.check()
        assert deadline.current() is None


# -- sync: threads ----------------------------------------------------------------------------------------------


def test_a_sync_call_runs_in_another_thread_with_the_variables_of_the_caller():
    def function():
        seen = variable.get(), threading.get_ident(), threading.current_thread().daemon
        variable.set("changed there")
        return seen

    def main():
        variable.set("travels")
        value, thread, daemon = Timeout(60).call(function)
        assert (value, daemon) == ("travels", True)
        assert thread != threading.get_ident()
        assert variable.get() == "travels"

    contextvars.copy_context().run(main)


def test_at_the_deadline_the_thread_is_abandoned_and_runs_on():
    with virtual_time() as clock, capture_events() as seen:
        ended = []

        def function():
            clock.sleep(10)
            ended.append(clock.now())

        policy = Timeout(2)
        with times_out(2):
            policy.call(function)
        assert (clock.now(), ended) == (2, [])
        clock.sleep(20)
        assert ended == [10]
    assert [type(event) for event in seen] == [ThreadAbandoned, TimeoutExpired]
    assert seen[0].running == 1


def test_abandoned_threads_are_bounded():
    with virtual_time() as clock, capture_events() as seen:
        policy = Timeout(1, max_abandoned=3, name="t")
        for _ in range(3):
            with times_out():
                policy.call(clock.sleep, 10)
        calls = []
        with pytest.raises(ThreadsExhausted, match="t: 3 abandoned threads are still running") as caught:
            policy.call(calls.append, 1)
        assert calls == []
        assert caught.value.retry_after is None
        other = Timeout(1, max_abandoned=3)  # the bound is that of the policy
        assert other.call(lambda: 1) == 1
        clock.sleep(7.5)  # the first of them has ended
        assert policy.call(lambda: 1) == 1
        with times_out():
            policy.call(clock.sleep, 10)
        clock.sleep(20)
        for _ in range(5):
            assert policy.call(lambda: 1) == 1
    names = [type(event) for event in seen]
    assert names.count(ThreadAbandoned) == 4
    assert names.count(ThreadsRejected) == 1
    assert [event.running for event in seen if isinstance(event, ThreadAbandoned)] == [1, 2, 3, 2]


def test_the_refusal_is_permanent_for_a_retry():
    with virtual_time() as clock:
        timeout = Timeout(1, max_abandoned=1)
        with times_out():
            timeout.call(clock.sleep, 100)
        retry = Retry(on=Exception, wait=1)
        with pytest.raises(ThreadsExhausted):
            (retry | timeout).call(lambda: 1)
        assert clock.now() == 1
        clock.sleep(200)


def test_a_permit_stays_taken_until_the_thread_has_really_ended():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1)
        pipeline = bulkhead | Timeout(2)
        with times_out():
            pipeline.call(clock.sleep, 10)
        assert bulkhead.statistics().in_use == 1
        with pytest.raises(BulkheadFull):
            pipeline.call(lambda: 1)
        clock.sleep(7)
        assert bulkhead.statistics().in_use == 1
        clock.sleep(2)
        assert bulkhead.statistics().in_use == 0
        assert pipeline.call(lambda: 1) == 1


def test_a_permit_stays_taken_even_if_a_retry_succeeds():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1)
        pipeline = Pipeline(bulkhead, Retry(on=TimedOut, wait=1), Timeout(2))
        naps = [20, 10, 0]

        def function():
            clock.sleep(naps.pop(0))
            return "third"

        assert pipeline.call(function) == "third"
        assert clock.now() == 6
        clock.sleep(8)  # the second thread has ended at 13, the first one runs until 20
        assert bulkhead.statistics().in_use == 1
        clock.sleep(7)
        assert bulkhead.statistics().in_use == 0


def test_a_permit_inside_of_the_timeout_is_held_by_the_thread_itself():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1)
        pipeline = Timeout(2) | bulkhead
        with times_out():
            pipeline.call(clock.sleep, 10)
        assert bulkhead.statistics().in_use == 1
        clock.sleep(9)
        assert bulkhead.statistics().in_use == 0


def test_nested_scopes_share_one_thread(monkeypatch):
    started = []
    monkeypatch.setattr(workers, "start", lambda job, start=workers.start: (started.append(job), start(job)))
    with virtual_time() as clock:
        pipeline = Pipeline(
            Timeout(30), Bulkhead(5), Retry(on=KeyError), Timeout(10), Timeout(5, interrupt=False), Timeout(2)
        )
        assert pipeline.call(deadline.remaining) == 2
        assert len(started) == 1
        with times_out(2):
            pipeline.call(clock.sleep, 100)
        assert len(started) == 2
        # A fallback may run long after the inner deadline: the outer scope has to hop for it.
        assert Pipeline(Timeout(30), Fallback(1), Timeout(2)).call(lambda: 1) == 1
        assert len(started) == 4
        clock.sleep(200)


def test_an_outer_scope_that_only_publishes_needs_no_thread(monkeypatch):
    monkeypatch.setattr(workers, "start", None)
    with virtual_time():
        pipeline = Timeout(30, interrupt=False) | Timeout(20, interrupt=False)
        assert pipeline.call(lambda: (deadline.remaining(), threading.get_ident())) == (20, threading.get_ident())


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_waiting_thread_abandons_the_worker(interrupt):
    with virtual_time() as clock:
        bulkhead = Bulkhead(1)
        policy = Timeout(5)

        def interrupted(ticket):
            raise interrupt

        previous = runtime.install(replace(runtime._installed, wait=interrupted))
        with capture_events() as seen, pytest.raises(interrupt):
            (bulkhead | policy).call(clock.sleep, 3)
        runtime.install(previous)
        assert [type(event) for event in seen] == [ThreadAbandoned]
        assert bulkhead.statistics().in_use == 1
        clock.sleep(10)
        assert bulkhead.statistics().in_use == 0
        assert policy._abandoned == 0


def test_a_function_that_ends_just_at_its_deadline_keeps_the_books_right():
    with virtual_time() as clock:
        policy = Timeout(2, max_abandoned=1)
        for _ in range(3):
            try:
                policy.call(clock.sleep, 2)
            except TimedOut:
                pass
            clock.sleep(1)
        assert policy._abandoned == 0


def eventually(holds):
    """Wait until another thread has done what it is about to do."""
    for _ in range(2000):
        if holds():
            return True
        threading.Event().wait(0.005)
    return False


def test_threads_of_calls_that_ended_are_used_again(monkeypatch):
    monkeypatch.setattr(workers, "_idle", deque())
    policy = Timeout(60)
    threads = set()
    for _ in range(3):
        threads.add(policy.call(threading.get_ident))
        assert eventually(lambda: len(workers._idle) == 1)
    assert len(threads) == 1


def test_a_worker_without_a_job_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(workers, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(workers, "_idle", deque())
    job = workers.Job(lambda: "done", contextvars.copy_context(), None)
    workers._Worker(job).loop()
    assert job.outcome() == "done"
    assert len(workers._idle) == 0


def test_a_worker_that_is_taken_just_as_it_would_end_runs_the_job(monkeypatch):
    second = workers.Job(lambda: "second", contextvars.copy_context(), None)

    class Taken(deque):
        def remove(self, worker):
            if not second.finished:
                self.pop().submit(second)
                raise ValueError
            super().remove(worker)

    monkeypatch.setattr(workers, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(workers, "_idle", Taken())
    workers._Worker(workers.Job(lambda: "first", contextvars.copy_context(), None)).loop()
    assert second.outcome() == "second"
    assert len(workers._idle) == 0


def test_who_asks_after_the_end_of_a_job_is_told_at_once():
    job = workers.Job(lambda: "done", contextvars.copy_context(), None)
    told = []
    job.when_finished(lambda: told.append("before"))
    job.run()
    job.when_finished(lambda: told.append("after"))
    assert told == ["before", "after"]


def test_a_real_thread_is_abandoned_in_real_time():
    release = threading.Event()
    policy = Timeout(0.02)
    with times_out():
        policy.call(release.wait)
    assert policy._abandoned == 1
    release.set()
    assert eventually(lambda: policy._abandoned == 0)
    assert Timeout(60).call(lambda: 1) == 1


def test_when_there_are_no_more_threads_the_caller_is_told(monkeypatch):
    def no_threads(*args):
        raise RuntimeError("can't start new thread")

    previous = runtime.install(replace(runtime._installed, start_thread=no_threads))
    try:
        bulkhead = Bulkhead(1)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            (bulkhead | Timeout(1)).call(lambda: 1)
        assert bulkhead.statistics().in_use == 0
    finally:
        runtime.install(previous)


def test_a_sync_call_in_a_task_ends_at_the_deadline_of_the_task():
    async def main():
        async def body():
            return Timeout(10, interrupt=False).call(deadline.remaining)

        return await Timeout(3).acall(body)

    assert run(main) == 3


def test_an_event_loop_in_a_worker_thread_ends_at_the_deadline_of_the_caller():
    def function():
        async def main():
            return await Timeout(100).acall(lambda: asyncio.sleep(0, deadline.current().scope.name))

        return asyncio.run(main())

    assert Timeout(60, name="outer").call(function) == "outer"


# -- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "kind", "named", "allowed"),
    [
        ((0,), {}, ValueError, "seconds=0", "> 0"),
        ((-1,), {}, ValueError, "seconds=-1", "> 0"),
        ((float("nan"),), {}, ValueError, "seconds=nan", "> 0"),
        ((float("inf"),), {}, ValueError, "seconds=inf", "> 0"),
        ((timedelta(0),), {}, ValueError, "seconds=datetime.timedelta(0)", "> 0"),
        ((None,), {}, TypeError, "seconds=None", "> 0"),
        (("2",), {}, TypeError, "seconds='2'", "> 0"),
        ((True,), {}, TypeError, "seconds=True", "> 0"),
        ((2,), {"interrupt": 1}, TypeError, "interrupt=1", "True or False"),
        ((2,), {"max_abandoned": 0}, ValueError, "max_abandoned=0", "an int >= 1"),
        ((2,), {"max_abandoned": 1.5}, TypeError, "max_abandoned=1.5", "an int >= 1"),
        ((2,), {"name": ""}, ValueError, "name=''", "a non-empty str"),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_what_is_allowed(args, options, kind, named, allowed):
    with pytest.raises(kind, match=f"^Timeout: {re.escape(named)}.*is not allowed; give .*{re.escape(allowed)}"):
        Timeout(*args, **options)


def test_there_is_no_default():
    with pytest.raises(TypeError):
        Timeout()


def test_the_timer_of_a_deadline_that_is_only_published_goes_with_its_call():
    async def main():
        await (Timeout(30, interrupt=False) | Timeout(60)).acall(asyncio.sleep, 0)
        return [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()]

    assert asyncio.run(main()) == []
