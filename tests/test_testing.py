"""The test helpers themselves."""

import asyncio
import random
import selectors
import socket
import threading
from contextlib import closing

import anyio
import pytest

from resilient import Bulkhead, Fallback, Pipeline, Retry, TimedOut, Timeout, runtime, testing
from resilient.testing import virtual_time
from resilient.ticket import Ticket


def down():
    raise ConnectionError


# -- virtual time ---------------------------------------------------------------------------------------------


def test_the_clock_stands_still_until_somebody_sleeps():
    with testing.virtual_time(start=100) as clock:
        assert runtime.now() == clock.now() == 100
        clock.sleep(5)
        runtime.sleep(2.5)
        runtime.sleep(-1)
        assert runtime.now() == 107.5


def test_an_hour_of_retries_takes_no_time_and_keeps_its_order():
    seen = []

    def attempt(name):
        seen.append((runtime.now(), name))
        raise ConnectionError

    def client(name, wait):
        with pytest.raises(ConnectionError):
            Retry(4, on=OSError, wait=wait).call(attempt, name)

    with testing.virtual_time() as clock:
        clock.run_threads(lambda: client("slow", 1200), lambda: client("quick", 500))
        assert clock.now() == 3600
    assert seen == [
        (0, "slow"),
        (0, "quick"),
        (500, "quick"),
        (1000, "quick"),
        (1200, "slow"),
        (1500, "quick"),
        (2400, "slow"),
        (3600, "slow"),
    ]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_hour_of_retries_of_several_tasks(backend):
    seen = []

    async def attempt(name):
        seen.append((runtime.now(), name))
        raise ConnectionError

    async def client(name, wait):
        with pytest.raises(ConnectionError):
            await Retry(4, on=OSError, wait=wait).acall(attempt, name)

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(client, "slow", 1200)
            group.start_soon(client, "quick", 500)
        return runtime.now()

    assert testing.run(main, backend=backend) == 3600
    assert sorted(seen[:2]) == [(0, "quick"), (0, "slow")]
    assert seen[2:] == [
        (500, "quick"),
        (1000, "quick"),
        (1200, "slow"),
        (1500, "quick"),
        (2400, "slow"),
        (3600, "slow"),
    ]


def test_threads_return_their_results_in_order():
    with testing.virtual_time() as clock:

        def work(seconds):
            clock.sleep(seconds)
            return seconds

        assert clock.run_threads(*(lambda s=s: work(s) for s in (3, 1, 2))) == [3, 1, 2]
        assert clock.now() == 3
        assert clock.run_threads() == []


def test_the_first_error_of_the_threads_is_raised_when_all_have_ended():
    ended = []
    with testing.virtual_time() as clock:

        def work(seconds, error):
            clock.sleep(seconds)
            ended.append(seconds)
            raise error

        with pytest.raises(ConnectionError, match="first"):
            clock.run_threads(lambda: work(5, ConnectionError("first")), lambda: work(1, ValueError("second")))
        with pytest.raises(KeyboardInterrupt):
            clock.run_threads(lambda: work(1, KeyboardInterrupt()))
    assert ended == [1, 5, 1]


def test_threads_wait_for_each_other():
    policy = Bulkhead(1, queue=5, wait=10)
    order = []
    with testing.virtual_time() as clock:

        def work(name):
            order.append((clock.now(), name))
            clock.sleep(4)

        def caller(name):
            try:
                policy.call(work, name)
            except Exception as error:
                return type(error).__name__

        outcomes = clock.run_threads(*(lambda n=n: caller(n) for n in range(4)))
        assert outcomes == [None, None, None, "BulkheadFull"]
        assert clock.now() == 12
    assert order == [(0, 0), (4, 1), (8, 2)]


def test_a_ticket_that_is_granted_before_anybody_waits():
    with testing.virtual_time() as clock:
        ticket = Ticket(expires_at=5)
        ticket.grant()
        assert clock.wait(ticket)
        assert clock.wait(Ticket(ready_at=3))
        assert clock.now() == 3
        assert not clock.wait(Ticket(expires_at=7))
        assert clock.now() == 7
        assert not clock.wait(Ticket(expires_at=1))
        assert clock.now() == 7


def test_a_thread_from_outside_does_not_disturb():
    outcomes = []
    with testing.virtual_time() as clock:
        ticket, granted = Ticket(), Ticket()
        granted.grant()

        def outsider():
            clock.sleep(3)
            outcomes.append((clock.now(), clock.wait(granted)))
            ticket.grant()

        thread = threading.Thread(target=outsider)
        thread.start()
        assert clock.wait(ticket)
        thread.join()
    assert outcomes == [(3, True)]


def test_a_sync_timeout_in_virtual_time():
    with testing.virtual_time() as clock:
        with pytest.raises(TimedOut):
            Timeout(2).call(clock.sleep, 60)
        assert clock.now() == 2
        assert Timeout(2).call(lambda: 5) == 5
        clock.sleep(100)


def test_nested_use_and_errors_put_back_what_was_there():
    real = runtime._installed
    with testing.virtual_time(start=1):
        with pytest.raises(LookupError, match="at 2"), testing.virtual_time(start=2):
            raise LookupError(f"at {runtime.now()}")
        assert runtime.now() == 1

        async def inner():
            return runtime.now()

        assert testing.run(inner, start=3) == 3
        assert runtime.now() == 1
    assert runtime._installed is real


# -- seeds ------------------------------------------------------------------------------------------------------


def delays(seed):
    with testing.virtual_time(seed=seed), testing.capture_events() as seen, pytest.raises(ConnectionError):
        Retry(6, on=OSError).call(down)
    return [event.delay for event in seen if event.name == "retry.scheduled"]


def test_seeds():
    assert delays(1) == delays(1)
    assert delays(1) != delays(2)
    assert len(set(delays(1))) == 5


def test_the_generator_of_the_process_is_left_as_it_was():
    random.seed(7)
    expected = random.random()
    random.seed(7)
    delays(1)
    assert random.random() == expected


# -- run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_run(backend):
    async def main(value, *more):
        assert runtime.in_trio() is (backend == "trio")
        began = runtime.now()
        await anyio.sleep(3600)
        return value, more, began, runtime.now()

    value, more, began, ended = testing.run(main, 1, 2, backend=backend, start=50)
    assert (value, more, began) == (1, (2,), 50)
    assert ended == pytest.approx(3650)

    async def fail():
        raise ConnectionError("down")

    with pytest.raises(ConnectionError, match="down"):
        testing.run(fail, backend=backend)


def test_run_refuses_another_backend():
    async def main():
        pass

    with pytest.raises(ValueError, match="run: backend='curio' is not allowed; give 'asyncio' or 'trio'"):
        testing.run(main, backend="curio")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_sync_sleep_inside_of_a_loop_lets_its_time_pass(backend):
    async def main():
        runtime.sleep(5)
        return runtime.now()

    assert testing.run(main, backend=backend) == 5


def test_another_thread_can_wake_the_virtual_loop():
    async def main():
        return await asyncio.to_thread(lambda: 5)

    assert testing.run(main) == 5


# -- flaky --------------------------------------------------------------------------------------------------------


def test_flaky():
    function = testing.flaky(ConnectionError, ValueError("second"), 3)
    with pytest.raises(ConnectionError):
        function(1)
    with pytest.raises(ValueError, match="second"):
        function(a=2)
    assert function() == 3
    assert function() == 3
    assert function.calls == [((1,), {}), ((), {"a": 2}), ((), {}), ((), {})]


def test_flaky_in_both_colours_counts_together():
    function = testing.flaky(1, 2)
    assert function() == 1
    assert asyncio.run(function.asynchronous("x")) == 2
    assert len(function.calls) == 2


def test_flaky_returns_classes_that_are_no_errors():
    assert testing.flaky(int)() is int


def test_flaky_needs_an_outcome():
    with pytest.raises(ValueError, match=r"flaky: outcomes=\(\) is not allowed"):
        testing.flaky()


# -- events -------------------------------------------------------------------------------------------------------


def test_capture_events():
    one, two = Fallback(1, name="one"), Fallback(2, name="two")
    with testing.capture_events() as everything, testing.capture_events(one) as of_one:
        with testing.capture_events(Pipeline(two)) as of_pipeline:
            one.call(down)
            two.call(down)
        two.call(down)
    one.call(down)
    assert [event.policy for event in everything] == ["one", "two", "two"]
    assert [event.policy for event in of_one] == ["one"]
    assert [event.policy for event in of_pipeline] == ["two"]


# -- run_both -----------------------------------------------------------------------------------------------------


def test_run_both_returns_the_trace():
    async def scenario(colour):
        with pytest.raises(ConnectionError):
            await colour.call(Retry(2, on=OSError, wait=1.5), down)
        await colour.sleep(1)
        return colour.now()

    assert testing.run_both(scenario) == [("retry.scheduled", 0.0), ("retry.gave_up", 1.5)]


def test_run_both_finds_other_results():
    async def scenario(colour):
        return colour.name == "trio"

    with pytest.raises(AssertionError, match="sync and trio differ"):
        testing.run_both(scenario)


def test_run_both_finds_other_events():
    async def scenario(colour):
        await colour.call(Fallback(1), down if colour.name == "sync" else lambda: 1)

    with pytest.raises(AssertionError, match="sync and asyncio differ"):
        testing.run_both(scenario)


def test_run_both_finds_other_times():
    async def scenario(colour):
        await colour.sleep(1 if colour.name == "trio" else 2)
        await colour.call(Fallback(1), down)

    with pytest.raises(AssertionError, match="sync and trio differ"):
        testing.run_both(scenario)


def test_run_both_raises_what_the_scenario_raises():
    async def scenario(colour):
        raise ConnectionError("down")

    with pytest.raises(ConnectionError, match="down"):
        testing.run_both(scenario)


def test_a_scenario_may_only_await_its_colour():
    async def scenario(colour):
        await anyio.sleep(1)

    with pytest.raises(RuntimeError, match="a scenario may only await the operations of the Colour"):
        testing._finish(asyncio.sleep(0))
    with pytest.raises(Exception, match="async"):
        testing.run_both(scenario)


def test_gather_and_functions_of_every_sort():
    async def scenario(colour):
        trace = []

        async def work(name, seconds):
            await colour.sleep(seconds)
            trace.append(name)
            return name

        def plain():
            return "plain"

        results = await colour.gather(lambda: work("b", 2), lambda: work("a", 1))
        results.append(await colour.call(Pipeline(), plain))
        results.append(await colour.call(Pipeline(), work, "c", seconds=1))
        return trace, results, colour.now()

    assert testing.run_both(scenario) == []


def test_jitter_is_the_same_in_all_colours():
    async def scenario(colour):
        with pytest.raises(ConnectionError):
            await colour.call(Retry(5, on=OSError), down)
        return colour.now()

    assert testing.run_both(scenario, seed=1) == testing.run_both(scenario, seed=1)
    assert testing.run_both(scenario, seed=1) != testing.run_both(scenario, seed=2)


def test_waking_a_thread_that_is_awake_already_does_nothing():
    with virtual_time() as clock:
        ticket = Ticket(expires_at=5)

        def waits():
            return clock.wait(ticket), clock.now()

        def grants_twice():
            return ticket.grant(), ticket.grant()

        assert clock.run_threads(waits, grants_twice) == [(True, 0), (True, True)]


def test_a_ticket_that_is_granted_while_its_holder_attaches():
    class Hasty(Ticket):
        def attach(self, wake):
            attached = super().attach(wake)
            self.grant()
            return attached

    with virtual_time() as clock:
        assert clock.wait(Hasty(expires_at=5))
        assert clock.now() == 0


def test_a_grant_from_a_thread_outside_wakes_a_clock_that_stands_still():
    with virtual_time() as clock:
        ticket = Ticket()
        thread = threading.Thread(target=lambda: (waiting.wait(), ticket.grant()))
        waiting = threading.Event()
        thread.start()

        original = clock._next

        def announcing():
            original()
            waiting.set()

        clock._next = announcing
        assert clock.wait(ticket)
        thread.join()


def test_the_error_of_a_thread_comes_out():
    def fails():
        raise OSError("no")

    with virtual_time() as clock, pytest.raises(OSError, match="no"):
        clock.run_threads(lambda: 1, fails)


def test_a_loop_without_a_timer_waits_for_what_another_thread_does():
    with virtual_time() as clock, closing(testing._JumpingSelector(clock)) as selector:
        reads, writes = socket.socketpair()
        with reads, writes:
            selector.register(reads, selectors.EVENT_READ)
            writes.send(b"wake up")
            [(key, _)] = selector.select(None)
        assert (key.fileobj, clock.now()) == (reads, 0)
