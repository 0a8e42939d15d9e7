"""The circuit breaker: what opens it, what counts as nothing, what it tells."""

import asyncio
import copy
import pickle
from datetime import timedelta

import pybreaker
import pytest

from resilient import (
    BulkheadFull,
    CircuitBreaker,
    CircuitOpen,
    Pipeline,
    RateLimited,
    Rejected,
    TimedOut,
    Timeout,
)
from resilient.call import Call
from resilient.policies.circuit_breaker import CircuitBreakerStatistics, State
from resilient.testing import Colour, capture_events, run, run_both, virtual_time


@pytest.fixture
def clock():
    with virtual_time() as clock:
        yield clock


def works():
    return "works"


def breaks():
    raise OSError("breaks")


def succeed(breaker, times=1):
    for _ in range(times):
        assert breaker.call(works) == "works"


def fail(breaker, times=1):
    for _ in range(times):
        with pytest.raises(OSError, match="breaks"):
            breaker.call(breaks)


def refused(breaker):
    with pytest.raises(CircuitOpen) as caught:
        breaker.call(works)
    return caught.value


# -- what opens it --------------------------------------------------------------------------------------------


def test_it_opens_when_half_of_the_calls_in_the_window_have_failed(clock):
    breaker = CircuitBreaker(minimum_calls=4)
    succeed(breaker, 2)
    fail(breaker)
    assert breaker.current_state == "closed"
    with capture_events() as seen:
        fail(breaker)
    assert breaker.current_state == "open"
    assert [(event.name, event.reason) for event in seen] == [("circuit.opened", "failure_rate")]
    refused(breaker)


def test_it_does_not_open_below_the_rate(clock):
    breaker = CircuitBreaker(minimum_calls=4, failure_rate=0.6)
    for _ in range(50):
        succeed(breaker)
        fail(breaker)
    assert breaker.current_state == "closed"


def test_it_does_not_judge_by_too_few_calls(clock):
    breaker = CircuitBreaker(minimum_calls=20)
    fail(breaker, 19)
    assert breaker.current_state == "closed"
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_success_may_complete_the_number_but_only_a_bad_outcome_opens(clock):
    breaker = CircuitBreaker(minimum_calls=4)
    fail(breaker, 3)
    succeed(breaker)
    assert breaker.current_state == "closed"
    fail(breaker)
    assert breaker.current_state == "open"


def test_old_calls_leave_the_window(clock):
    breaker = CircuitBreaker(minimum_calls=4, window=timedelta(seconds=10))
    fail(breaker, 3)
    clock.sleep(10)
    fail(breaker, 3)
    assert breaker.current_state == "closed"
    assert breaker.statistics() == CircuitBreakerStatistics("closed", 3, 3, 0, 0, 0)
    clock.sleep(9.9)
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_window_of_the_last_calls(clock):
    breaker = CircuitBreaker(minimum_calls=3, last=4)
    fail(breaker)
    succeed(breaker, 4)  # the failure is out of the window
    fail(breaker)
    clock.sleep(1e6)  # time has no say
    assert breaker.current_state == "closed"
    fail(breaker)
    assert breaker.current_state == "open"


def test_consecutive_failures(clock):
    breaker = CircuitBreaker(consecutive=3)
    fail(breaker, 2)
    succeed(breaker)
    fail(breaker, 2)
    assert breaker.current_state == "closed"
    with capture_events() as seen:
        fail(breaker)
    assert [event.reason for event in seen] == ["consecutive"]


def test_slow_calls_open_it():
    async def scenario(colour):
        breaker = CircuitBreaker(minimum_calls=4, slow=1.0, slow_rate=0.5, name="b")

        async def take(seconds):
            await colour.sleep(seconds)

        for seconds in (0.99, 0.99, 1.0):
            await colour.call(breaker, take, seconds)
        assert breaker.statistics() == CircuitBreakerStatistics("closed", 3, 0, 1, 0, 0)
        with capture_events(breaker) as seen:
            await colour.call(breaker, take, 5.0)
        assert [event.reason for event in seen] == ["slow_rate"]
        return breaker.current_state

    assert [name for name, _ in run_both(scenario)] == ["circuit.opened"]


def test_a_slow_failure_is_both(clock):
    breaker = CircuitBreaker(minimum_calls=10, slow=1.0)

    def slow_failure():
        clock.sleep(1)
        raise OSError("slow")

    with pytest.raises(OSError, match="slow"):
        breaker.call(slow_failure)
    assert breaker.statistics() == CircuitBreakerStatistics("closed", 1, 1, 1, 0, 0)


def test_without_slow_no_call_is_slow(clock):
    breaker = CircuitBreaker(minimum_calls=1)
    breaker.call(lambda: clock.sleep(1e6))
    assert breaker.statistics().slow == 0


def test_other_errors_show_that_the_dependency_answers(clock):
    breaker = CircuitBreaker(consecutive=2, on=OSError)
    fail(breaker)
    with pytest.raises(KeyError):
        breaker.call({}.__getitem__, "missing")
    fail(breaker)
    assert breaker.current_state == "closed"  # the KeyError was a success between two failures
    fail(breaker)
    assert breaker.current_state == "open"


@pytest.mark.parametrize("on", [(OSError, KeyError), {OSError, KeyError}, lambda error: "breaks" in str(error)])
def test_forms_of_on(clock, on):
    breaker = CircuitBreaker(consecutive=1, on=on)
    with pytest.raises(ZeroDivisionError):
        breaker.call(lambda: 1 / 0)
    assert breaker.current_state == "closed"
    fail(breaker)
    assert breaker.current_state == "open"


def test_a_group_is_a_failure_if_each_error_in_it_is(clock):
    breaker = CircuitBreaker(consecutive=1, on=OSError)

    def group(*errors):
        raise ExceptionGroup("several", errors)

    with pytest.raises(ExceptionGroup):
        breaker.call(group, OSError(), KeyError())
    assert breaker.current_state == "closed"
    with pytest.raises(ExceptionGroup):
        breaker.call(group, OSError(), TimeoutError())
    assert breaker.current_state == "open"


def test_a_failed_result_is_a_failure_and_comes_back_as_it_is(clock):
    breaker = CircuitBreaker(consecutive=2, on=OSError)
    guard = Pipeline(breaker, failed=lambda status: status >= 500)
    assert [guard.call(lambda: 503), guard.call(lambda: 200), guard.call(lambda: 503)] == [503, 200, 503]
    assert breaker.current_state == "closed"
    assert guard.call(lambda: 500) == 500
    assert breaker.current_state == "open"


# -- what counts as nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        Rejected("no", policy="p"),
        BulkheadFull("no", policy="p"),
        RateLimited("no", policy="p", retry_after=1),
        KeyboardInterrupt(),
        SystemExit(),
        GeneratorExit(),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_neither_a_success_nor_a_failure(clock, error):
    breaker = CircuitBreaker(consecutive=2)
    rate = CircuitBreaker(minimum_calls=1)
    fail(breaker)

    def stop():
        raise error

    for policy in (breaker, rate):
        with pytest.raises(type(error)) as caught:
            policy.call(stop)
        assert caught.value is error
    assert breaker.statistics().failures == 1  # no success: the streak goes on
    assert rate.statistics().calls == 0
    fail(breaker)
    assert breaker.current_state == "open"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancellation_counts_as_nothing(backend):
    import anyio

    async def main():
        breaker = CircuitBreaker(minimum_calls=1, slow=0.5)
        with anyio.move_on_after(1):
            await breaker.acall(anyio.sleep, 5)
        return breaker.statistics()

    assert run(main, backend=backend) == CircuitBreakerStatistics("closed", 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("seconds", "state"), [(6, "open"), (4, "closed")])
def test_a_deadline_around_the_breaker_is_a_failure_only_if_the_call_had_half_of_its_time(seconds, state):
    states = []

    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=1, name="b")
        inner = Pipeline(breaker, Timeout(50, name="inner"))

        async def hang():
            await colour.sleep(200)

        async def late():
            await colour.sleep(10 - seconds)
            await colour.call(inner, hang)

        with pytest.raises(TimedOut):
            await colour.call(Timeout(10, name="outer"), late)
        await colour.sleep(1)
        states.append(breaker.current_state)

    with virtual_time() as clock:
        breaker = CircuitBreaker(consecutive=1)
        guard = Pipeline(breaker, Timeout(50))

        def late():
            clock.sleep(10 - seconds)
            guard.call(clock.sleep, 200)

        with pytest.raises(TimedOut):
            Timeout(10).call(late)
        clock.sleep(1)
        states.append(breaker.current_state)
    for backend in ("asyncio", "trio"):
        run(scenario, Colour(backend, None), backend=backend)
    assert states == [state] * 3


def test_a_breaker_in_a_timeout_opens_when_the_dependency_hangs():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=2)
        guard = Pipeline(Timeout(1), breaker)

        async def hang():
            await colour.sleep(200)

        for _ in range(2):
            with pytest.raises(TimedOut):
                await colour.call(guard, hang)
        return breaker.current_state

    for backend in ("asyncio", "trio"):
        assert run(scenario, Colour(backend, None), backend=backend) == "open"


def test_a_timeout_within_the_breaker_is_a_failure():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=1, name="b")
        guard = Pipeline(Timeout(5, name="outer"), breaker, Timeout(1, name="inner"))

        async def hang():
            await colour.sleep(20)

        with pytest.raises(TimedOut) as caught:
            await colour.call(guard, hang)
        assert (caught.value.policy, breaker.current_state) == ("inner", "open")

    assert [name for name, _ in run_both(scenario)] == ["timeout.expired", "circuit.opened"]


def test_a_timeout_error_of_the_function_itself_is_a_failure(clock):
    breaker = CircuitBreaker(consecutive=1)

    def own_timeout():
        raise TimedOut(policy="somebody else's")

    with pytest.raises(TimedOut):
        breaker.call(own_timeout)
    assert breaker.current_state == "open"


# -- what it tells --------------------------------------------------------------------------------------------


def test_the_whole_life_in_both_colours():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=2, probes=2, open_for=5, jitter=0, name="b")
        log = []

        async def outcome(function):
            try:
                log.append((colour.now(), await colour.call(breaker, function), breaker.current_state))
            except (OSError, CircuitOpen) as error:
                log.append((colour.now(), type(error).__name__, breaker.current_state))

        for function, pause in (
            (works, 1),
            (breaks, 1),
            (breaks, 4),
            (works, 1),  # 4 s after the trip
            (works, 1),
            (breaks, 9),  # a bad probe: open for 10 s now
            (works, 1),
            (works, 1),
            (works, 1),
            (works, 1),
        ):
            await outcome(function)
            await colour.sleep(pause)
        return log, breaker.statistics()

    assert run_both(scenario) == [
        ("circuit.opened", 2.0),
        ("circuit.rejected", 6.0),
        ("circuit.half_opened", 7.0),
        ("circuit.opened", 8.0),
        ("circuit.rejected", 17.0),
        ("circuit.half_opened", 18.0),
        ("circuit.closed", 19.0),
    ]


def test_a_plain_success_is_silent(clock):
    breaker = CircuitBreaker()
    with capture_events() as seen:
        succeed(breaker, 100)
        fail(breaker)
    assert seen == []


def test_each_transition_is_told_once_with_its_facts(clock):
    breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=1, name="b")
    with capture_events(breaker) as seen:
        fail(breaker)
        clock.sleep(1)
        refused(breaker)
        clock.sleep(4)
        succeed(breaker)
    assert [event.name for event in seen] == [
        "circuit.opened",
        "circuit.rejected",
        "circuit.half_opened",
        "circuit.closed",
    ]
    opened, rejected, half_opened, closed = seen
    assert (opened.policy, opened.at, opened.reason, opened.open_for) == ("b", 0.0, "consecutive", 5.0)
    assert (rejected.at, rejected.retry_after) == (1.0, 4.0)
    assert half_opened.at == closed.at == 5.0


def test_the_refusal_says_who_why_and_when_to_come_back(clock):
    breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, name="payments")
    fail(breaker)
    clock.sleep(2)
    error = refused(breaker)
    assert str(error) == "payments: the circuit is open; retry after 3 s"
    assert (error.policy, error.reason, error.retry_after) == ("payments", "the circuit is open", 3.0)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.retry_after) == (str(error), 3.0)


def test_coming_back_when_it_says_so_is_admitted(clock):
    breaker = CircuitBreaker(consecutive=1, open_for=5, probes=1)
    fail(breaker)
    clock.sleep(refused(breaker).retry_after)
    succeed(breaker)
    assert breaker.current_state == "closed"


def test_pybreakers_error_catches_the_refusal(clock):
    breaker = CircuitBreaker(consecutive=1)
    fail(breaker)
    with pytest.raises(pybreaker.CircuitBreakerError):
        breaker.call(works)
    assert issubclass(CircuitOpen, Rejected)


def test_statistics(clock):
    breaker = CircuitBreaker(minimum_calls=4, slow=1, open_for=5, jitter=0)
    succeed(breaker, 2)
    breaker.call(clock.sleep, 1)
    assert breaker.statistics() == CircuitBreakerStatistics("closed", 3, 0, 1, 0, 0)
    assert breaker.fail_counter == 0
    fail(breaker, 2)
    assert breaker.fail_counter == 2
    assert breaker.statistics().state == "closed"
    fail(breaker)
    for _ in range(3):
        refused(breaker)
    assert breaker.statistics() == CircuitBreakerStatistics("open", 6, 3, 1, 1, 3)
    with pytest.raises(AttributeError):
        breaker.statistics().calls = 0


# -- by hand --------------------------------------------------------------------------------------------------


def test_isolate_stays_open_until_close(clock):
    breaker = CircuitBreaker(name="b")
    with capture_events() as seen:
        breaker.isolate()
        clock.sleep(1e9)
        error = refused(breaker)
        assert (error.retry_after, str(error)) == (None, "b: the circuit is open")
        breaker.close()
        succeed(breaker)
    assert [event.name for event in seen] == ["circuit.opened", "circuit.rejected", "circuit.closed"]
    assert (seen[0].reason, seen[0].open_for) == ("isolated", None)


def test_force_open_lets_probes_decide(clock):
    breaker = CircuitBreaker(open_for=5, jitter=0, probes=1)
    with capture_events() as seen:
        breaker.force_open()
        assert refused(breaker).retry_after == 5.0
        clock.sleep(5)
        succeed(breaker)
    assert [event.name for event in seen] == [
        "circuit.opened",
        "circuit.rejected",
        "circuit.half_opened",
        "circuit.closed",
    ]
    assert (seen[0].reason, seen[0].open_for) == ("forced", 5.0)


def test_force_open_takes_a_reason(clock):
    breaker = CircuitBreaker()
    with capture_events() as seen:
        breaker.force_open("maintenance")
    assert seen[0].reason == "maintenance"


def test_close_forgets_what_was_counted(clock):
    breaker = CircuitBreaker(minimum_calls=4)
    fail(breaker, 3)
    with capture_events() as seen:
        breaker.close()
    assert seen == []  # it was closed
    fail(breaker, 3)
    assert breaker.current_state == "closed"


# -- open time ------------------------------------------------------------------------------------------------


def open_times(breaker, clock, trips):
    """Return the open times of so many trips, one after the other; each probe fails."""
    with capture_events(breaker) as seen:
        fail(breaker)
        for _ in range(trips - 1):
            clock.sleep(refused(breaker).retry_after)
            fail(breaker)
    return [event.open_for for event in seen if event.name == "circuit.opened"]


def test_the_open_time_doubles_up_to_its_maximum(clock):
    breaker = CircuitBreaker(consecutive=1, open_for=5, max_open_for=60, jitter=0)
    assert open_times(breaker, clock, 7) == pytest.approx([5, 10, 20, 40, 60, 60, 60])


def test_the_open_time_starts_again_after_a_close(clock):
    breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=1)
    assert open_times(breaker, clock, 3) == pytest.approx([5, 10, 20])
    clock.sleep(20)
    succeed(breaker)
    assert open_times(breaker, clock, 2) == pytest.approx([5, 10])


def test_the_open_time_is_jittered(clock):
    times = []
    for _ in range(200):
        times += open_times(CircuitBreaker(consecutive=1, open_for=10, jitter=0.2), clock, 1)
    assert all(8 <= seconds <= 12 for seconds in times)
    assert min(times) < 8.5
    assert max(times) > 11.5
    assert len(set(times)) > 100


def test_a_breaker_that_never_recovers_never_overflows(clock):
    breaker = CircuitBreaker(consecutive=1, open_for=0.001, max_open_for=1, jitter=0)
    assert open_times(breaker, clock, 2_000)[-1] == pytest.approx(1)


# -- no user code under the lock ------------------------------------------------------------------------------


def test_on_may_ask_the_breaker(clock):
    asked = []

    def on(error):
        asked.append((breaker.statistics().state, breaker.idle(0.0)))
        breaker.close()
        return True

    breaker = CircuitBreaker(consecutive=2, on=on)
    fail(breaker, 2)
    assert asked == [("closed", True), ("closed", False)]


def test_a_listener_may_act_on_the_breaker(clock):
    breaker = CircuitBreaker(consecutive=1)
    seen = []

    def listener(event):
        seen.append((event.name, breaker.statistics().state))
        if event.name == "circuit.opened":
            breaker.close()
            assert breaker.call(works) == "works"

    with breaker.listen(listener):
        fail(breaker)
    assert seen == [("circuit.opened", "open"), ("circuit.closed", "closed")]
    succeed(breaker)


# -- the rest -------------------------------------------------------------------------------------------------


def test_the_hooks_work_by_numbers():
    breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=1)
    call = Call(works, (), {})
    assert breaker.admit(call, 100.0) is None
    breaker.settle(call, OSError(), 100.0, 101.0)
    with pytest.raises(CircuitOpen) as caught:
        breaker.admit(Call(works, (), {}), 103.0)
    assert caught.value.retry_after == 3.0
    probe = Call(works, (), {})
    assert breaker.admit(probe, 106.0) is None
    assert breaker._state is State.HALF_OPEN
    breaker.settle(probe, None, 106.0, 107.0)
    assert breaker._state is State.CLOSED


def test_as_a_block():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=1, name="b")

        async def enter(error):
            if colour.name == "sync":
                with breaker:
                    raise error
            async with breaker:
                raise error

        with pytest.raises(OSError, match="block"):
            await enter(OSError("block"))
        with pytest.raises(CircuitOpen):
            await enter(AssertionError("never entered"))
        return breaker.statistics()

    assert [name for name, _ in run_both(scenario)] == ["circuit.opened", "circuit.rejected"]


def test_a_copy_has_the_options_and_a_state_of_its_own(clock):
    breaker = CircuitBreaker(consecutive=1, on=OSError, name="b")
    fail(breaker)
    for twin in (copy.copy(breaker), copy.deepcopy(breaker), pickle.loads(pickle.dumps(breaker)), breaker.fresh()):
        assert repr(twin) == repr(breaker) == "CircuitBreaker(consecutive=1, on=OSError, name='b')"
        succeed(twin)
    refused(breaker)


def test_it_is_idle_when_closed_with_nothing_counted(clock):
    breaker = CircuitBreaker(minimum_calls=2, window=10, probes=1)
    assert breaker.idle(0.0)
    succeed(breaker)
    assert not breaker.idle(9.0)
    assert breaker.idle(10.0)
    breaker.isolate()
    assert not breaker.idle(1e9)
    breaker.close()
    assert breaker.idle(0.0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"failure_rate": 0}, ValueError, "CircuitBreaker: failure_rate=0 is not allowed"),
        ({"failure_rate": 1.1}, ValueError, "failure_rate=1.1"),
        ({"failure_rate": "half"}, TypeError, "failure_rate='half'"),
        ({"minimum_calls": 0}, ValueError, "minimum_calls=0"),
        ({"window": 0}, ValueError, "window=0"),
        ({"window": float("nan")}, ValueError, "window=nan"),
        ({"last": 0}, ValueError, "last=0"),
        ({"last": 5}, ValueError, "minimum_calls=20 is not allowed; give an int up to last=5"),
        ({"slow": 0}, ValueError, "slow=0"),
        ({"slow_rate": -0.1}, ValueError, "slow_rate=-0.1"),
        ({"consecutive": 0}, ValueError, "consecutive=0"),
        ({"consecutive": 2.0}, TypeError, "consecutive=2.0"),
        ({"consecutive": 2, "last": 50}, ValueError, "last=50 is not allowed; give None"),
        ({"consecutive": 2, "slow": 1}, ValueError, "slow=1.0 is not allowed; give None"),
        ({"consecutive": 2, "failure_rate": 0.1}, ValueError, "failure_rate=0.1 is not allowed; give nothing, as"),
        ({"last": 50, "window": 5}, ValueError, "window=5.0 .* counts calls instead of seconds"),
        ({"slow_rate": 0.1}, ValueError, "slow_rate=0.1 .* no call is slow"),
        ({"consecutive": 2, "minimum_calls": 5}, ValueError, "minimum_calls=5 .* no window with consecutive="),
        ({"open_for": 0}, ValueError, "open_for=0"),
        ({"max_open_for": 1}, ValueError, "max_open_for=1.0 is not allowed; give at least open_for=5"),
        ({"jitter": 2}, ValueError, "jitter=2"),
        ({"probes": 0}, ValueError, "probes=0"),
        ({"probe_lease": 0}, ValueError, "probe_lease=0"),
        ({"on": 5}, TypeError, "on=5"),
        ({"on": ()}, ValueError, r"on=\(\)"),
        ({"name": ""}, ValueError, "name=''"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        CircuitBreaker(**options)
