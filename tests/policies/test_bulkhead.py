"""The bulkhead: its limit, its queue, and permits that always come back."""

import asyncio
import os
import random
import sys
import traceback
from collections import deque
from threading import Barrier, Event, Lock, Thread

import anyio
import anyio.lowlevel
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilient import Bulkhead, BulkheadFull, Pipeline, Retry, TimedOut, Timeout, runtime
from resilient.call import Call
from resilient.edge import Edge
from resilient.policies.bulkhead import BulkheadStatistics
from resilient.testing import Colour, _finish, capture_events, flaky, run, run_both, virtual_time

FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture
def impatient_threads():
    """Switch threads as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def function():
    """Stand for the guarded function where the hooks are called by numbers."""


def a_call():
    return Call(function, (), {})


# -- limit and queue ------------------------------------------------------------------------------------------


def test_at_most_so_many_run_and_the_rest_is_refused():
    async def scenario(colour):
        bulkhead = Bulkhead(2, name="b")

        async def work():
            await colour.sleep(1)
            return bulkhead.statistics().in_use

        def caller(number):
            async def call():
                await colour.sleep(number / 8)  # trio starts tasks in any order
                try:
                    return await colour.call(bulkhead, work)
                except BulkheadFull as error:
                    return str(error), error.policy, error.retry_after

            return call

        results = await colour.gather(*map(caller, range(4)))
        refused = ("b: all 2 permits are taken", "b", None)
        assert results == [2, 1, refused, refused]
        return bulkhead.statistics()

    assert run_both(scenario) == [("bulkhead.rejected", 0.25), ("bulkhead.rejected", 0.375)]


def test_the_queue_is_first_come_first_served():
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=3, name="b")
        order = []

        async def work(number):
            order.append((number, colour.now()))
            await colour.sleep(1)

        def caller(number):
            async def call():
                await colour.sleep(number / 8)  # they come one after the other
                try:
                    await colour.call(bulkhead, work, number)
                except BulkheadFull:
                    order.append((number, "full"))

            return call

        with capture_events(bulkhead) as seen:
            await colour.gather(*map(caller, range(6)))
        assert order == [(0, 0.0), (4, "full"), (5, "full"), (1, 1.0), (2, 2.0), (3, 3.0)]
        assert [event.position for event in seen if event.name == "bulkhead.queued"] == [1, 2, 3]
        assert {event.reason for event in seen if event.name == "bulkhead.rejected"} == {"full"}
        return bulkhead.statistics()

    assert len(run_both(scenario)) == 5


def test_nobody_overtakes_those_who_wait():
    """A permit that comes back goes to the queue, also when somebody asks at the same moment."""
    with virtual_time():
        bulkhead = Bulkhead(1, queue=2)
        calls = [a_call() for _ in range(3)]
        assert bulkhead.admit(calls[0], 0.0) is None
        first, second = bulkhead.admit(calls[1], 0.0), bulkhead.admit(calls[2], 0.0)
        bulkhead.settle(calls[0], None, 0.0, 1.0)
        assert (first.granted, second.granted) == (True, False)
        newcomer = bulkhead.admit(a_call(), 1.0)
        bulkhead.settle(calls[1], None, 1.0, 2.0)
        assert (second.granted, newcomer.granted) == (True, False)
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=1, rejected=0)


def test_the_wait_is_limited():
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=5, wait=2, name="b")

        async def work():
            await colour.sleep(10)

        async def caller():
            try:
                await colour.call(bulkhead, work)
            except BulkheadFull as error:
                return colour.now(), str(error)

        with capture_events(bulkhead) as seen:
            results = await colour.gather(caller, caller)
        results.sort(key=str, reverse=True)
        assert results == [None, (2.0, "b: no permit became free in time")]
        assert [event.reason for event in seen if event.name == "bulkhead.rejected"] == ["waited"]
        return bulkhead.statistics()

    assert run_both(scenario) == [("bulkhead.queued", 0.0), ("bulkhead.rejected", 2.0)]


@pytest.mark.parametrize("interrupt", [True, False])
def test_nobody_waits_past_the_deadline(interrupt):
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=5, wait=5, name="b")
        hurried = Pipeline(Timeout(1, interrupt=interrupt, name="total"), bulkhead)

        async def work():
            await colour.sleep(10)

        async def holder():
            await colour.call(bulkhead, work)

        async def caller():
            await colour.sleep(0.5)
            with pytest.raises(BulkheadFull, match="b: no permit became free before the deadline of total"):
                await colour.call(hurried, work)
            gave_up = round(colour.now(), 3)
            await colour.sleep(0.5)
            statistics = bulkhead.statistics()
            return gave_up, statistics.in_use, statistics.queued

        assert await colour.gather(holder, caller) == [None, (1.49, 1, 0)]
        return bulkhead.statistics().in_use

    if interrupt:
        with virtual_time() as clock:
            _finish(scenario(Colour("sync", clock)))
        for backend in ("asyncio", "trio"):
            assert run(scenario, Colour(backend, None), backend=backend) == 0
    else:
        assert run_both(scenario) == [("bulkhead.queued", 0.5), ("bulkhead.rejected", 1.49)]


def test_a_deadline_that_has_passed_leaves_no_time_to_wait():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1, queue=1, name="b")
        guard = Pipeline(Timeout(1, interrupt=False), bulkhead)
        bulkhead.admit(a_call(), 0.0)

        def late():
            clock.sleep(2)
            bulkhead.call(function)

        with (
            capture_events(bulkhead) as seen,
            pytest.raises(BulkheadFull, match=r"the deadline of Timeout\(1.*\) leaves no time to wait"),
        ):
            Timeout(1, interrupt=False).call(late)
        assert [event.reason for event in seen] == ["deadline"]
        with capture_events(bulkhead) as seen, pytest.raises(BulkheadFull):
            guard.call(function)  # waits until its deadline
        assert [event.name for event in seen] == ["bulkhead.queued", "bulkhead.rejected"]
        assert (seen[1].reason, clock.now()) == ("deadline", 2.99)
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=0, rejected=2)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, GeneratorExit])
def test_an_error_gives_the_permit_back(error):
    bulkhead = Bulkhead(1)

    def fail():
        assert bulkhead.statistics().in_use == 1
        raise error

    for _ in range(3):
        with pytest.raises(error):
            bulkhead.call(fail)
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


def test_as_a_block():
    async def scenario(colour):
        bulkhead = Bulkhead(1, name="b")
        if colour.name == "sync":
            with bulkhead:
                assert bulkhead.statistics().in_use == 1
                with pytest.raises(BulkheadFull), bulkhead:
                    raise AssertionError("never entered")
        else:
            async with bulkhead:
                assert bulkhead.statistics().in_use == 1
                with pytest.raises(BulkheadFull):
                    async with bulkhead:
                        raise AssertionError("never entered")
        return bulkhead.statistics()

    assert run_both(scenario) == [("bulkhead.rejected", 0.0)]


def test_a_block_waits_in_the_queue():
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=1, name="b")
        log = []

        def caller(name):
            async def call():
                if colour.name == "sync":
                    with bulkhead:
                        log.append((name, colour.now()))
                        await colour.sleep(1)
                else:
                    async with bulkhead:
                        log.append((name, colour.now()))
                        await colour.sleep(1)

            return call

        await colour.gather(caller("a"), caller("b"))
        return [when for _, when in log], bulkhead.statistics()

    assert run_both(scenario) == [("bulkhead.queued", 0.0)]


def test_made_before_virtual_time_it_works_in_it():
    bulkhead = Bulkhead(1)
    with virtual_time():
        for _ in range(3):
            bulkhead.call(function)
    with virtual_time(start=-1e6):
        for _ in range(3):
            bulkhead.call(function)
    assert bulkhead.statistics().in_use == 0


def test_idle_means_that_nobody_holds_a_permit():
    bulkhead = Bulkhead(2)
    assert bulkhead.idle(0.0)
    with bulkhead:
        assert not bulkhead.idle(0.0)
    assert bulkhead.idle(0.0)


# -- cancellation ---------------------------------------------------------------------------------------------


@BACKENDS
def test_cancelled_while_waiting(backend):
    async def main():
        bulkhead = Bulkhead(1, queue=2)
        order = []

        async def work(name):
            order.append((name, anyio.current_time()))
            await anyio.sleep(1)

        async def impatient():
            with anyio.move_on_after(0.5):
                await bulkhead.acall(work, "impatient")
            order.append(("gave up", bulkhead.statistics().queued))

        async with anyio.create_task_group() as group:
            group.start_soon(bulkhead.acall, work, "first")
            await anyio.lowlevel.checkpoint()
            group.start_soon(impatient)
            await anyio.sleep(0.125)
            group.start_soon(bulkhead.acall, work, "second")
        return [name for name, _ in order], order[1][1], bulkhead.statistics()

    with capture_events() as seen:
        order, queued, statistics = run(main, backend=backend)
    assert (order, queued) == (["first", "gave up", "second"], 1)
    # Who is cancelled was not refused.
    assert statistics == BulkheadStatistics(in_use=0, queued=0, rejected=0)
    assert [event.name for event in seen] == ["bulkhead.queued"] * 2


@BACKENDS
def test_cancelled_just_as_it_was_granted_the_permit_goes_to_the_next(backend):
    async def main():
        bulkhead = Bulkhead(1, queue=2)
        held = a_call()
        assert bulkhead.admit(held, runtime.now()) is None
        ran = []

        async def work(name):
            ran.append(name)

        scope = anyio.CancelScope()

        async def unlucky():
            with scope:
                await bulkhead.acall(work, "unlucky")

        async with anyio.create_task_group() as group:
            group.start_soon(unlucky)
            await anyio.sleep(0.125)
            group.start_soon(bulkhead.acall, work, "next")
            await anyio.sleep(0.125)
            assert bulkhead.statistics().queued == 2
            scope.cancel()  # it will see this only when it runs again, ...
            bulkhead.settle(held, None, 0.0, 0.0)  # ... and this comes before
            assert bulkhead.statistics().queued == 1
        return ran, bulkhead.statistics().in_use

    assert run(main, backend=backend) == (["next"], 0)


@BACKENDS
def test_random_cancellation_leaves_no_permit_taken(backend):
    async def main(seed):
        dice = random.Random(seed)
        bulkhead = Bulkhead(3, queue=5, wait=2)
        running = most = 0

        async def work():
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                await anyio.sleep(dice.choice([0, 0.25, 1]))
            finally:
                running -= 1

        async def caller():
            await anyio.sleep(dice.random() * 5)
            with anyio.move_on_after(dice.random() * 3):
                try:
                    await bulkhead.acall(work)
                except BulkheadFull:
                    pass

        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(caller)
        statistics = bulkhead.statistics()
        return running, most, statistics.in_use, statistics.queued

    for seed in range(20):
        assert run(main, seed, backend=backend) == (0, 3, 0, 0)


# -- threads and event loops ----------------------------------------------------------------------------------


def test_8_threads_never_exceed_the_limit_and_give_all_back(impatient_threads):
    bulkhead = Bulkhead(3, queue=8)
    start, lock = Barrier(8), Lock()
    running, seen, total = [], [], []

    def work(number):
        with lock:
            running.append(number)
            seen.append(len(running))
        with lock:
            running.remove(number)

    def hammer(number):
        start.wait()
        for _ in range(400):
            bulkhead.call(work, number)
            total.append(number)

    threads = [Thread(target=hammer, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(total) == 3_200
    assert max(seen) <= 3
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


def test_exactly_so_many_of_50_threads_get_a_permit():
    bulkhead = Bulkhead(7)
    start, all_refused, lock = Barrier(50), Event(), Lock()
    refused, ran = [], []

    def work():
        ran.append(1)
        assert all_refused.wait(60)

    def caller():
        start.wait()
        try:
            bulkhead.call(work)
        except BulkheadFull:
            with lock:
                refused.append(1)
                if len(refused) == 43:
                    all_refused.set()

    threads = [Thread(target=caller) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(ran), len(refused)) == (7, 43)
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=43)


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self, backend):
        self.backend = backend

    def start(self, function):
        self.error = None

        def body():
            try:
                anyio.run(function, backend=self.backend)
            except BaseException as error:
                self.error = error

        self.thread = Thread(target=body)
        self.thread.start()

    def join(self):
        self.thread.join()
        if self.error is not None:
            raise self.error


@BACKENDS
def test_a_thread_gives_its_permit_to_a_task_in_another_loop(backend):
    bulkhead = Bulkhead(1, queue=1)
    held = a_call()
    assert bulkhead.admit(held, runtime.now()) is None
    queued, ran = Event(), Event()

    async def work():
        ran.set()

    with bulkhead.listen(lambda event: queued.set()):
        loop = Loop(backend)
        loop.start(lambda: bulkhead.acall(work))
        assert queued.wait(60)
    assert not ran.is_set()
    bulkhead.settle(held, None, runtime.now(), runtime.now())
    loop.join()
    assert ran.is_set()
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


def test_threads_and_loops_wait_in_one_queue():
    bulkhead = Bulkhead(1, queue=6)
    held = a_call()
    assert bulkhead.admit(held, runtime.now()) is None
    order = []
    queued = Event()
    waiting = []
    with bulkhead.listen(lambda event: queued.set()):
        for number, kind in enumerate(["thread", "asyncio", "trio"] * 2):
            queued.clear()
            if kind == "thread":
                thread = Thread(target=lambda number=number: bulkhead.call(order.append, number))
                thread.start()
                waiting.append(thread)
            else:

                async def work(number=number):
                    order.append(number)

                loop = Loop(kind)
                loop.start(lambda work=work: bulkhead.acall(work))
                waiting.append(loop)
            assert queued.wait(60)
    bulkhead.settle(held, None, runtime.now(), runtime.now())
    for each in waiting:
        each.join()
    assert order == [0, 1, 2, 3, 4, 5]
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


def test_one_policy_in_event_loops_one_after_the_other():
    bulkhead = Bulkhead(1, queue=10)

    async def main():
        async def work():
            await anyio.sleep(1)

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(bulkhead.acall, work)
        return runtime.now()

    for backend in ("asyncio", "trio", "asyncio"):
        assert run(main, backend=backend) == pytest.approx(4)
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


def test_a_waiter_of_a_closed_event_loop_takes_no_permit():
    bulkhead = Bulkhead(1, queue=2)
    held = a_call()
    assert bulkhead.admit(held, runtime.now()) is None

    async def work():
        raise AssertionError("its loop is closed")

    loop = asyncio.new_event_loop()
    task = loop.create_task(bulkhead.acall(work))
    loop.run_until_complete(asyncio.sleep(0))
    assert bulkhead.statistics().queued == 1
    loop.close()
    task._log_destroy_pending = False
    bulkhead.settle(held, None, runtime.now(), runtime.now())
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)
    del task
    with bulkhead:
        assert bulkhead.statistics().in_use == 1


def test_an_abandoned_thread_keeps_its_permit_until_it_ends():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1)
        guard = Pipeline(bulkhead, Timeout(1))
        with pytest.raises(TimedOut):
            guard.call(clock.sleep, 5)
        assert bulkhead.statistics().in_use == 1
        with pytest.raises(BulkheadFull):
            guard.call(function)
        clock.sleep(5)
        assert bulkhead.statistics().in_use == 0
        guard.call(function)


def test_an_abandoned_thread_hands_its_permit_to_a_waiter_when_it_ends():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1, queue=1)
        guard = Pipeline(bulkhead, Timeout(1))
        with pytest.raises(TimedOut):
            guard.call(clock.sleep, 5)
        assert bulkhead.call(clock.now) == 5.0
        assert bulkhead.statistics().in_use == 0


# -- moments that threads hit once in a million calls -----------------------------------------------------------


class Permits(deque):
    """Permits that do something just before one of them is taken or put back."""

    before_append = before_pop = None

    def append(self, permit):
        action, self.before_append = self.before_append, None
        if action is not None:
            action()
        super().append(permit)

    def pop(self):
        action, self.before_pop = self.before_pop, None
        if action is not None:
            action()
            raise IndexError  # this one had looked just before
        return super().pop()


def taken(**options):
    """Make a bulkhead whose only permit is taken, with permits to play tricks with."""
    bulkhead = Bulkhead(1, **options)
    bulkhead._permits = Permits([None])
    call = a_call()
    assert bulkhead.admit(call, 0.0) is None
    return bulkhead, call


def closed_loop():
    raise RuntimeError("the event loop is closed")


def test_somebody_begins_to_wait_just_before_the_permit_comes_back():
    bulkhead, call = taken(queue=1)
    tickets = []
    bulkhead._permits.before_append = lambda: tickets.append(bulkhead.admit(a_call(), 0.0))
    bulkhead.settle(call, None, 0.0, 0.0)
    assert tickets[0].granted
    assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=0, rejected=0)


@pytest.mark.parametrize("queue", [0, 1])
def test_the_permit_comes_back_just_after_somebody_has_looked_for_it(queue):
    bulkhead, call = taken(queue=queue)
    bulkhead._permits.before_pop = lambda: bulkhead.settle(call, None, 0.0, 0.0)
    assert bulkhead.admit(a_call(), 0.0) is None
    assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=0, rejected=0)


def test_somebody_begins_to_wait_while_the_permit_passes_those_who_are_gone():
    bulkhead, call = taken(queue=2)
    gone = bulkhead.admit(a_call(), 0.0)
    gone.attach(closed_loop)
    tickets = []
    bulkhead._permits.before_append = lambda: tickets.append(bulkhead.admit(a_call(), 0.0))
    bulkhead.settle(call, None, 0.0, 0.0)
    assert (gone.granted, tickets[0].granted) == (False, True)
    assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=0, rejected=0)


def test_who_begins_to_wait_just_before_is_gone_just_after():
    bulkhead, call = taken(queue=1)
    bulkhead._permits.before_append = lambda: bulkhead.admit(a_call(), 0.0).attach(closed_loop)
    bulkhead.settle(call, None, 0.0, 0.0)
    assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


# -- fork -----------------------------------------------------------------------------------------------------


def in_child(check):
    """Fork, run `check` in the child, and fail with its traceback if it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        report = ""
        try:
            check()
        except BaseException:
            report = traceback.format_exc()
        os.write(writing, report.encode() or b"well")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = pipe.read()
    os.waitpid(child, 0)
    assert report == "well", report


@FORKS
def test_a_forked_child_has_all_permits():
    bulkhead = Bulkhead(2, queue=1)
    bulkhead.admit(a_call(), runtime.now())
    bulkhead.admit(a_call(), runtime.now())
    waiting = bulkhead.admit(a_call(), runtime.now())
    assert bulkhead.statistics() == BulkheadStatistics(in_use=2, queued=1, rejected=0)

    def check():
        assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)
        with bulkhead, bulkhead:
            assert bulkhead.statistics().in_use == 2
            with pytest.raises(BulkheadFull):
                Pipeline(Timeout(0.001, interrupt=False), bulkhead).call(function)
        assert bulkhead.statistics().in_use == 0
        assert not waiting.granted

    in_child(check)
    assert bulkhead.statistics() == BulkheadStatistics(in_use=2, queued=1, rejected=0)


@FORKS
def test_a_fork_while_a_thread_holds_the_lock_leaves_a_usable_policy():
    bulkhead = Bulkhead(1, queue=1)

    def check():
        with bulkhead, pytest.raises(BulkheadFull):
            Pipeline(Timeout(0.001, interrupt=False), bulkhead).call(function)

    with bulkhead._lock:
        in_child(check)


@FORKS
def test_a_call_in_flight_across_the_fork_does_not_release_twice():
    bulkhead = Bulkhead(1)

    def check_in_child():
        # The child goes on with the call of its parent; its end must not make a second permit.
        bulkhead.settle(call, None, started, runtime.now())
        assert bulkhead.statistics().in_use == 0
        with bulkhead, pytest.raises(BulkheadFull):
            bulkhead.call(function)

    call, started = a_call(), runtime.now()
    assert bulkhead.admit(call, started) is None
    in_child(check_in_child)
    bulkhead.settle(call, None, started, runtime.now())
    assert bulkhead.statistics().in_use == 0


# -- results that go on after they were returned ------------------------------------------------------------------


class Body:
    """A result that somebody still reads."""

    def __init__(self):
        self.callbacks = []

    def end(self, error=None):
        for callback in self.callbacks:
            callback(error)


class Streaming(Edge):
    streams = True

    def released(self, result):
        return not isinstance(result, Body)

    def when_released(self, result, callback):
        result.callbacks.append(callback)


def read(bulkhead, function=Body):
    return bulkhead.chain(Streaming())(Call(function, (), {}))


@pytest.mark.parametrize("error", [None, OSError("broken")])
def test_a_permit_is_held_until_the_result_is_released(error):
    with virtual_time():
        bulkhead = Bulkhead(1)
        body = read(bulkhead)
        assert bulkhead.statistics().in_use == 1
        assert not bulkhead.idle(0.0)
        with pytest.raises(BulkheadFull):
            read(bulkhead)
        with pytest.raises(BulkheadFull):
            bulkhead.call(function)
        body.end(error)
        assert bulkhead.statistics().in_use == 0
        assert read(bulkhead, lambda: "all there") == "all there"
        with pytest.raises(ZeroDivisionError):
            read(bulkhead, lambda: 1 / 0)
        assert bulkhead.idle(0.0)


@BACKENDS
def test_a_permit_is_held_until_the_result_is_released_in_async_code(backend):
    async def main():
        bulkhead = Bulkhead(1, queue=5)
        chain = bulkhead.achain(Streaming())
        started = []

        async def fetch():
            started.append(anyio.current_time() - start)
            return Body()

        async def reader():
            body = await chain(Call(fetch, (), {}))
            await anyio.sleep(2)
            body.end()

        start = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(reader)
        with anyio.move_on_after(1):  # cancelled before there is a result to hold on to
            await chain(Call(anyio.sleep, (9,), {}))
        return started, bulkhead.statistics()

    assert run(main, backend=backend) == ([0, 2, 4], BulkheadStatistics(in_use=0, queued=0, rejected=0))


def test_a_permit_may_be_given_back_from_another_thread():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1, queue=1)
        body = read(bulkhead)

        def waiter():
            assert bulkhead.call(clock.now) == 3
            return bulkhead.statistics().in_use

        def ender():
            clock.sleep(3)
            body.end()

        assert clock.run_threads(waiter, ender) == [0, None]


def test_a_permit_inside_of_a_retry_is_given_back_with_the_error():
    with virtual_time():
        bulkhead = Bulkhead(1)
        guard = Pipeline(Retry(3, on=OSError, wait=1), bulkhead)
        body = Body()
        function = flaky(OSError, OSError, body)
        assert guard.chain(Streaming())(Call(function, (), {})) is body
        assert bulkhead.statistics().in_use == 1
        body.end()
        assert bulkhead.idle(0.0)


def test_a_body_that_was_opened_before_a_fork_gives_nothing_back_after_it():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1)
        body = read(bulkhead)
        clock.sleep(1)
        bulkhead.after_fork()
        assert read(bulkhead, lambda: bulkhead.statistics().in_use) == 1
        body.end()
        assert bulkhead.statistics().in_use == 0


# -- a model --------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """The hooks against two lists: who runs, and who waits."""

    def __init__(self):
        super().__init__()
        self.time = virtual_time()
        self.clock = self.time.__enter__()
        self.running, self.waiting = [], []

    def teardown(self):
        self.time.__exit__(None, None, None)

    @initialize(limit=st.integers(1, 4), queue=st.integers(0, 4))
    def make(self, limit, queue):
        self.limit, self.queue = limit, queue
        self.bulkhead = Bulkhead(limit, queue=queue)
        self.rejected = 0

    @rule()
    def ask(self):
        call = a_call()
        try:
            ticket = self.bulkhead.admit(call, self.clock.now())
        except BulkheadFull:
            assert len(self.running) == self.limit
            assert len(self.waiting) == self.queue
            self.rejected += 1
        else:
            if ticket is None:
                assert len(self.running) < self.limit
                self.running.append(call)
            else:
                assert len(self.running) == self.limit
                assert len(self.waiting) < self.queue
                self.waiting.append((call, ticket))

    def one_comes_in(self):
        if self.waiting:
            call, ticket = self.waiting.pop(0)
            assert ticket.granted
            self.running.append(call)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), error=st.sampled_from([None, OSError(), KeyboardInterrupt()]))
    def end(self, which, error):
        call = self.running.pop(which % len(self.running))
        self.bulkhead.settle(call, error, self.clock.now(), self.clock.now())
        self.one_comes_in()

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def give_up_waiting(self, which):
        call, ticket = self.waiting.pop(which % len(self.waiting))
        assert isinstance(self.bulkhead.leave(call, ticket), BulkheadFull)
        self.rejected += 1

    @precondition(lambda self: self.running and self.waiting)
    @rule(which=st.integers(0, 100))
    def give_up_just_as_it_is_granted(self, which):
        call, ticket = self.waiting[0]
        self.end(which=which, error=None)
        assert self.running.pop() is call
        self.bulkhead.leave(call, ticket)
        self.rejected += 1
        self.one_comes_in()

    @invariant()
    def they_agree(self):
        if hasattr(self, "bulkhead"):
            assert self.bulkhead.statistics() == BulkheadStatistics(
                in_use=len(self.running), queued=len(self.waiting), rejected=self.rejected
            )
            assert not any(ticket.granted for _, ticket in self.waiting)


TestBulkhead = Machine.TestCase
TestBulkhead.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# -- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((0,), {}, ValueError, "Bulkhead: limit=0 is not allowed; give an int >= 1"),
        (("many",), {}, TypeError, "Bulkhead: limit='many' is not allowed"),
        ((function,), {}, TypeError, "with parentheses"),
        ((1,), {"queue": -1}, ValueError, "queue=-1 is not allowed; give an int >= 0"),
        ((1,), {"wait": 0}, ValueError, "wait=0 is not allowed"),
        ((1,), {"wait": 2}, ValueError, "wait=2 is not allowed; give a queue= of calls that may wait, or None"),
    ],
)
def test_bad_options(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        Bulkhead(*arguments, **options)


def test_repr_and_copies():
    bulkhead = Bulkhead(3, queue=2, wait=1.5)
    assert repr(bulkhead) == "Bulkhead(3, queue=2, wait=1.5)"
    with bulkhead:
        assert bulkhead.fresh().statistics().in_use == 0
