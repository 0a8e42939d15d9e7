import asyncio
import gc
import inspect
import random
import re
import threading
import traceback
import weakref
from concurrent.futures import CancelledError as FutureCancelled
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import anyio
import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient import (
    Bulkhead,
    BulkheadFull,
    CircuitBreaker,
    CircuitOpen,
    FailedResponse,
    Pipeline,
    RateLimit,
    RateLimited,
    Retry,
    RetryBudget,
    TimedOut,
    Timeout,
)
from resilient.call import Call
from resilient.edge import Edge
from resilient.testing import capture_events, flaky, run, run_both, virtual_time

BACKENDS = ("asyncio", "trio")


async def raised(colour, policy, function, *args):
    """Call, and return the error that comes out."""
    try:
        result = await colour.call(policy, function, *args)
    except Exception as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


def delays_of(retry, function, *, seed=0):
    """The waits of one failing or succeeding sync call, in order."""
    with virtual_time(seed=seed), capture_events(retry) as seen:
        try:
            retry.call(function)
        except Exception:
            pass
    return [event.delay for event in seen if event.name == "retry.scheduled"]


# -- what comes out ---------------------------------------------------------------------------------------------


def test_a_failed_call_is_made_again_until_it_succeeds():
    async def scenario(colour):
        function = flaky(OSError, OSError, "good")
        result = await colour.call(Retry(on=OSError, wait=2), function, 1, key="x")
        return result, function.calls, colour.now()

    def check(outcome):
        assert outcome == ("good", [((1,), {"key": "x"})] * 3, 4.0)

    async def checked(colour):
        check(await scenario(colour))

    assert run_both(checked) == [("retry.scheduled", 0.0), ("retry.scheduled", 2.0)]


def test_the_original_error_comes_out_itself_with_a_note():
    async def scenario(colour):
        retry = Retry(on=OSError, wait=0.75, name="db")
        errors = [OSError("first"), OSError("second"), OSError("third")]
        error = await raised(colour, retry, flaky(*errors))
        assert error is errors[2]
        assert type(error) is OSError
        assert error.args == ("third",)
        assert error.__notes__ == ["db: 3 attempts in 1.50 s"]
        assert error.__context__ is None
        assert error.__cause__ is None
        assert not hasattr(errors[0], "__notes__")

    trace = run_both(scenario)
    assert trace == [("retry.scheduled", 0.0), ("retry.scheduled", 0.75), ("retry.gave_up", 1.5)]


def test_the_note_counts_one_attempt_as_one():
    with virtual_time(), pytest.raises(OSError, match="boom") as caught:
        Retry(1, on=OSError).call(flaky(OSError("boom")))
    assert caught.value.__notes__ == [f"{Retry(1, on=OSError)!r}: 1 attempt in 0.00 s"]


def test_elapsed_counts_the_time_of_the_attempts_too():
    async def scenario(colour):
        async def slow():
            await colour.sleep(3)
            raise OSError

        retry = Retry(2, on=OSError, wait=1)
        with capture_events(retry) as seen:
            error = await raised(colour, retry, slow)
        assert error.__notes__ == [f"{retry.label}: 2 attempts in 7.00 s"]
        assert (seen[-1].attempts, seen[-1].elapsed, seen[-1].reason) == (2, 7.0, "attempts")
        assert seen[-1].error == "OSError"

    run_both(scenario)


def test_an_error_that_takes_no_note_still_comes_out_itself():
    class Closed(Exception):  # a frozen dataclass behaves like this
        def __setattr__(self, name, value):
            raise AttributeError(name)

    class Odd(Exception):
        __notes__ = "no list"

    for error in (Closed("closed"), Odd("odd")):
        with virtual_time(), pytest.raises(type(error)) as caught:
            Retry(2, on=Exception, wait=0).call(flaky(error))
        assert caught.value is error


def test_an_error_object_that_is_raised_again_and_again_has_one_note():
    error = OSError("always the same")
    retry = Retry(2, on=OSError, wait=1, name="r")
    with virtual_time():
        for _ in range(3):
            with pytest.raises(OSError, match="always"):
                retry.call(flaky(error))
    assert error.__notes__ == ["r: 2 attempts in 1.00 s"]


def test_an_error_that_is_not_wanted_comes_out_at_once_and_untouched():
    async def scenario(colour):
        function = flaky(KeyError("no"))
        error = await raised(colour, Retry(on=OSError), function)
        assert type(error) is KeyError
        assert not hasattr(error, "__notes__")
        assert len(function.calls) == 1

    assert run_both(scenario) == []


def test_an_error_that_is_not_wanted_ends_a_series_of_retries():
    async def scenario(colour):
        function = flaky(OSError, KeyError("no"), "never")
        error = await raised(colour, Retry(on=OSError, wait=1), function)
        assert type(error) is KeyError
        assert error.__context__ is None
        assert len(function.calls) == 2

    assert run_both(scenario) == [("retry.scheduled", 0.0)]


@pytest.mark.parametrize("budget", [None, RetryBudget()])
def test_a_decorated_function_is_retried_as_a_called_one(budget):
    errors = [OSError("first"), OSError("second"), KeyError("other")]
    retry = Retry(2, on=OSError, wait=1, name="r", budget=budget)
    outcomes = flaky(errors[0], errors[1], errors[0], "good", errors[2], KeyboardInterrupt)

    @retry
    def function(*args, **kwargs):
        return outcomes(*args, **kwargs)

    with virtual_time() as clock, capture_events(retry) as seen:
        with pytest.raises(OSError, match="second") as caught:
            function(1, key="x")
        assert caught.value is errors[1]
        assert caught.value.__notes__ == ["r: 2 attempts in 1.00 s"]
        assert caught.value.__context__ is None
        assert (outcomes.calls, clock.now()) == ([((1,), {"key": "x"})] * 2, 1)
        assert function() == "good"
        with pytest.raises(KeyError) as other:
            function()
        assert not hasattr(other.value, "__notes__")
        with pytest.raises(KeyboardInterrupt):
            function()
    assert [event.name for event in seen] == ["retry.scheduled", "retry.gave_up", "retry.scheduled"]
    assert (retry.statistics().retries, retry.statistics().gave_up) == (2, 1)


def test_a_success_builds_nothing_of_tenacitys():
    with mock.patch.object(tenacity, "RetryCallState", side_effect=AssertionError):
        assert Retry(on=tenacity.retry_if_exception_type(OSError)).call(lambda: 7) == 7


def test_on_is_required_for_plain_functions():
    retry = Retry()
    for use in (lambda: retry(lambda: 1), lambda: retry.call(len, ""), lambda: iter(retry)):
        with pytest.raises(TypeError, match="Retry: on= is required here"):
            use()

    async def function():
        pass

    with pytest.raises(TypeError, match="on= is required"):
        retry(function)
    with pytest.raises(TypeError, match="on= is required"):
        aiter(retry)


# -- the forms of the options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "on",
    [
        OSError,
        (KeyError, OSError),
        {OSError, KeyError},
        frozenset({OSError}),
        [OSError],
        lambda error: isinstance(error, OSError),
        tenacity.retry_if_exception_type(OSError),
        tenacity.retry_if_exception(lambda error: isinstance(error, OSError)),
        tenacity.retry_if_not_exception_type(ValueError),
        tenacity.retry_if_exception_message(match="again"),
        tenacity.retry_if_exception_type(KeyError) | tenacity.retry_if_exception_type(OSError),
        tenacity.retry_if_exception_type(OSError) & tenacity.retry_if_exception_message(match="again"),
        tenacity.retry_if_exception_type(OSError) | (lambda state: False),
    ],
    ids=repr,
)
def test_on_takes_every_form(on):
    def scenario_of(error):
        async def scenario(colour):
            function = flaky(error, "good")
            try:
                result = await colour.call(Retry(on=on, wait=0), function)
            except ValueError:
                result = "out"
            assert (result, len(function.calls)) == (("good", 2) if isinstance(error, OSError) else ("out", 1))

        return scenario

    run_both(scenario_of(OSError("again")))
    run_both(scenario_of(ValueError("never")))


@pytest.mark.parametrize(
    ("stop", "attempts"),
    [
        (1, 1),
        (4, 4),
        (timedelta(seconds=3), 4),
        (tenacity.stop_after_attempt(2), 2),
        (tenacity.stop_after_delay(2), 3),
        (tenacity.stop_before_delay(2), 2),
        (tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(1), 2),
        (tenacity.stop_after_attempt(3) & tenacity.stop_after_delay(4), 5),
        (lambda state: state.attempt_number >= 6, 6),
    ],
)
def test_stop_takes_every_form(stop, attempts):
    async def scenario(colour):
        function = flaky(OSError)
        await raised(colour, Retry(stop, on=OSError, wait=1), function)
        assert len(function.calls) == attempts
        assert colour.now() == attempts - 1

    run_both(scenario)


def test_stop_when_event_set():
    event = threading.Event()
    function = flaky(OSError)

    def stopping():
        if len(function.calls) == 3:
            event.set()
        function()

    with virtual_time(), pytest.raises(OSError):  # noqa: PT011 - flaky raises a plain one
        Retry(tenacity.stop_when_event_set(event), on=OSError, wait=0).call(stopping)
    assert len(function.calls) == 4


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (0, [0, 0, 0]),
        (2, [2, 2, 2]),
        (0.5, [0.5, 0.5, 0.5]),
        (timedelta(minutes=1), [60, 60, 60]),
        (tenacity.wait_none(), [0, 0, 0]),
        (tenacity.wait_fixed(3), [3, 3, 3]),
        (tenacity.wait_fixed(timedelta(seconds=3)), [3, 3, 3]),
        (tenacity.wait_incrementing(start=1, increment=2), [1, 3, 5]),
        (tenacity.wait_exponential(multiplier=1, max=3), [1, 2, 3]),
        (tenacity.wait_fixed(1) + tenacity.wait_incrementing(start=1, increment=1), [2, 3, 4]),
        (tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(5)), [1, 5, 5]),
        (tenacity.wait_exception(lambda error: len(str(error))), [4, 4, 4]),
        (lambda state: state.attempt_number * 10, [10, 20, 30]),
        (lambda state: timedelta(seconds=state.attempt_number), [1, 2, 3]),
        (lambda state: None, [0, 0, 0]),
        (lambda state: state.idle_for + 1, [1, 2, 4]),
    ],
)
def test_wait_takes_every_form(wait, expected):
    async def scenario(colour):
        retry = Retry(4, on=OSError, wait=wait)
        with capture_events(retry) as seen:
            await raised(colour, retry, flaky(OSError("boom")))
        assert [event.delay for event in seen[:-1]] == expected
        assert [event.attempt for event in seen[:-1]] == [1, 2, 3]
        assert [event.error for event in seen] == ["OSError"] * 4
        assert colour.now() == sum(expected)

    run_both(scenario)


def test_the_default_wait_is_full_jitter():
    caps = [0.1 * 2**number for number in range(6)] + [5.0] * 3
    rows = [delays_of(Retry(10, on=OSError), flaky(OSError), seed=seed) for seed in range(200)]
    for number, cap in enumerate(caps):
        column = [row[number] for row in rows]
        assert all(0 <= delay <= cap for delay in column)
        assert max(column) > 0.9 * cap
        assert min(column) < 0.1 * cap


def test_the_default_is_three_attempts():
    async def scenario(colour):
        function = flaky(OSError)
        await raised(colour, Retry(on=OSError), function)
        assert len(function.calls) == 3

    run_both(scenario)


def test_strategies_see_the_call():
    seen = []

    def wait(state):
        seen.append((state.fn, state.args, state.kwargs, state.attempt_number, state.start_time))
        seen.append((state.outcome.failed, state.seconds_since_start, state.idle_for))
        return 2

    def function(*args, **kwargs):
        raise OSError

    with virtual_time(start=100), pytest.raises(OSError):  # noqa: PT011 - a bare one
        Retry(2, on=OSError, wait=wait).call(function, 1, key="x")
    assert seen == [
        (function, (1,), {"key": "x"}, 1, 100.0),
        (True, 0.0, 0.0),
        (function, (1,), {"key": "x"}, 2, 100.0),
        (True, 2.0, 2.0),
    ]


# -- as tenacity evaluates it -----------------------------------------------------------------------------------


class Transient(Exception):
    pass


class Fatal(Exception):
    pass


small = st.floats(0, 20, allow_nan=False)

waits = st.recursive(
    st.one_of(
        small.map(tenacity.wait_fixed),
        st.just(tenacity.wait_none()),
        st.tuples(small, small).map(lambda pair: tenacity.wait_random(min(pair), max(pair))),
        st.tuples(small, small).map(lambda pair: tenacity.wait_incrementing(pair[0], pair[1], max=30)),
        st.tuples(small, small).map(lambda pair: tenacity.wait_exponential(pair[0], max=pair[1])),
        st.tuples(small, small).map(lambda pair: tenacity.wait_random_exponential(pair[0], max=pair[1])),
        st.tuples(small, small).map(
            lambda pair: tenacity.wait_exponential_jitter(multiplier=pair[0], max=40, jitter=pair[1])
        ),
        st.just(tenacity.wait_exception(lambda error: float(len(str(error))))),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: tenacity.wait_chain(*several)),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: tenacity.wait_combine(*several)),
    ),
    max_leaves=4,
)

stops = st.recursive(
    st.one_of(
        st.integers(1, 8).map(tenacity.stop_after_attempt),
        st.floats(0.1, 60).map(tenacity.stop_after_delay),
        st.floats(0.1, 60).map(tenacity.stop_before_delay),
        st.just(tenacity.stop_never),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
    ),
    max_leaves=4,
).map(lambda stop: stop | tenacity.stop_after_attempt(9))  # so that every history ends

retries = st.recursive(
    st.sampled_from(
        [
            tenacity.retry_if_exception_type(Transient),
            tenacity.retry_if_not_exception_type(Fatal),
            tenacity.retry_unless_exception_type(Fatal),
            tenacity.retry_if_exception(lambda error: "a" in str(error)),
            tenacity.retry_if_exception_cause_type(KeyError),
            tenacity.retry_if_exception_message(match="a"),
            tenacity.retry_if_not_exception_message(match="a"),
            tenacity.retry_if_result(lambda result: result < 2),
            tenacity.retry_if_not_result(lambda result: result > 3),
            tenacity.retry_always,
            tenacity.retry_never,
        ]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: tenacity.retry_any(*several)),
        st.lists(inner, min_size=1, max_size=3).map(lambda several: tenacity.retry_all(*several)),
    ),
    max_leaves=4,
)

outcomes = st.one_of(
    st.integers(0, 5),
    st.builds(Transient, st.sampled_from(["", "a", "abc"])),
    st.builds(Fatal, st.sampled_from(["", "a", "abc"])),
    st.just(tenacity.TryAgain()),
)
histories = st.lists(st.tuples(outcomes, st.floats(0, 5), st.booleans()), min_size=1, max_size=8)


class Script:
    """A function that goes through a history of outcomes, each after some time."""

    def __init__(self, history, clock):
        self.history = history
        self.clock = clock
        self.calls = 0

    def __call__(self):
        outcome, seconds, caused = self.history[min(self.calls, len(self.history) - 1)]
        self.calls += 1
        self.clock.sleep(seconds)
        if isinstance(outcome, Exception):
            again = type(outcome)(*outcome.args)  # a new one each time, with no traceback and no note
            # (tenacity would unpack a TryAgain with a cause; Retry raises what was raised)
            again.__cause__ = KeyError() if caused and not isinstance(again, tenacity.TryAgain) else None
            raise again
        return outcome


def told(error):
    return type(error), error.args, type(error.__cause__)


def by_tenacity(history, stop, wait, retry, seed):
    """What tenacity itself does: the delays, the number of attempts, the time, and how it ends."""
    delays = []
    with (
        virtual_time(seed=seed) as clock,
        mock.patch.object(tenacity, "time", SimpleNamespace(monotonic=clock.now)),
    ):

        def sleep(seconds):
            delays.append(float(seconds))
            clock.sleep(seconds)

        script = Script(history, clock)
        try:
            end = tenacity.Retrying(sleep=sleep, stop=stop, wait=wait, retry=retry, reraise=True)(script)
        except tenacity.RetryError as error:
            end = error.last_attempt.result()  # a result that was to be retried: Retry gives it back
        except Exception as error:
            end = told(error)
        return delays, script.calls, clock.now(), end


def by_us(history, stop, wait, retry, seed, *, decorated=False):
    policy = Retry(stop, on=retry, wait=wait)
    with virtual_time(seed=seed) as clock, capture_events(policy) as seen:
        script = Script(history, clock)

        @policy
        def function():
            return script()

        try:
            end = function() if decorated else policy.call(script)
        except Exception as error:
            end = told(error)
        delays = [event.delay for event in seen if event.name == "retry.scheduled"]
        return delays, script.calls, clock.now(), end


@settings(max_examples=400, deadline=None)
@given(history=histories, stop=stops, wait=waits, retry=retries, seed=st.integers(0, 2**32))
def test_delays_and_end_are_tenacitys(history, stop, wait, retry, seed):
    expected = by_tenacity(history, stop, wait, retry, seed)
    assert by_us(history, stop, wait, retry, seed) == expected
    assert by_us(history, stop, wait, retry, seed, decorated=True) == expected


@settings(max_examples=100, deadline=None)
@given(history=histories, stop=st.integers(1, 9), wait=st.floats(0, 10))
def test_plain_numbers_and_classes_are_tenacitys_simplest_strategies(history, stop, wait):
    expected = by_tenacity(
        history,
        tenacity.stop_after_attempt(stop),
        tenacity.wait_fixed(wait),
        tenacity.retry_if_exception_type(Transient),
        0,
    )
    assert by_us(history, stop, wait, Transient, 0) == expected
    assert by_us(history, stop, timedelta(seconds=wait), (Transient,), 0)[1] == expected[1]


def test_a_plain_function_may_be_part_of_a_combination():
    retry = tenacity.retry_if_exception_type(Transient) | (lambda state: not state.outcome.failed)
    history = [(Transient("a"), 0, False), (1, 0, False)]
    stop = tenacity.stop_after_attempt(3)
    assert by_us(history, stop, tenacity.wait_fixed(1), retry, 0) == ([1.0, 1.0], 3, 2.0, 1)


# -- TryAgain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "on", [KeyError, lambda error: False, tenacity.retry_never, tenacity.retry_if_result(lambda result: False)]
)
def test_try_again_asks_for_another_attempt_whatever_on_says(on):
    async def scenario(colour):
        function = flaky(tenacity.TryAgain, "good")
        assert await colour.call(Retry(on=on, wait=1), function) == "good"
        assert type(await raised(colour, Retry(on=on, wait=1), flaky(tenacity.TryAgain))) is tenacity.TryAgain

    run_both(scenario)


# -- never retried ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize(
    "on",
    [BaseException, lambda error: True, tenacity.retry_always, tenacity.retry_if_exception_type(BaseException)],
)
def test_base_exceptions_pass_through(error, on):
    retry = Retry(on=on, wait=0)
    function = flaky(error)
    with virtual_time(), capture_events() as seen, pytest.raises(error) as caught:
        retry.call(function)
    assert len(function.calls) == 1
    assert not hasattr(caught.value, "__notes__")
    assert seen == []
    assert retry.statistics().retries == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_base_exceptions_pass_through_async_code(backend):
    class Interrupt(BaseException):
        pass

    async def main():
        function = flaky(OSError, Interrupt)
        try:
            await Retry(on=BaseException, wait=1).acall(function.asynchronous)
        except Interrupt as interrupt:
            return len(function.calls), interrupt.__context__
        return None

    assert run(main, backend=backend) == (2, None)


def test_a_cancelled_future_is_an_ordinary_error():
    function = flaky(FutureCancelled, "good")  # not asyncio's: this one is an Exception
    assert issubclass(FutureCancelled, Exception)
    with virtual_time():
        assert Retry(on=FutureCancelled, wait=0).call(function) == "good"


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancellation_ends_an_attempt_and_a_wait(backend):
    async def main():
        began = []

        async def attempt():
            began.append(anyio.current_time())
            if len(began) == 2:
                await anyio.sleep(100)
            raise OSError

        for seconds in (5, 15):  # in the wait after the first attempt; in the second attempt
            began.clear()
            start = anyio.current_time()
            with anyio.move_on_after(seconds) as scope:
                await Retry(on=BaseException, wait=10).acall(attempt)
            assert scope.cancelled_caught
            assert anyio.current_time() - start == pytest.approx(seconds)
            assert len(began) == (1 if seconds == 5 else 2)

    run(main, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_wait_still_lets_others_run(backend):
    async def main():
        attempts = 0

        async def attempt():
            nonlocal attempts
            attempts += 1
            raise OSError  # never awaits anything

        async with anyio.create_task_group() as group:
            group.start_soon(Retry(tenacity.stop_never, on=OSError, wait=0).acall, attempt)
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        return attempts

    assert 1 <= run(main, backend=backend) < 50


def test_refusals_without_a_time_are_permanent():
    async def scenario(colour):
        bulkhead = Bulkhead(1)
        for on in (Exception, lambda error: True, tenacity.retry_always, (OSError, ValueError)):
            attempts = 0

            async def inner():
                nonlocal attempts
                attempts += 1
                return await colour.call(Bulkhead(1), lambda: 1)

            async def outer(retry):
                return await raised(colour, retry | bulkhead, inner)

            async def hold(on=on):
                error = await outer(Retry(on=on, wait=1))
                assert type(error) is BulkheadFull
                assert not hasattr(error, "__notes__")

            await colour.call(bulkhead, hold)
            assert attempts == 0
        assert bulkhead.statistics().rejected == 4

    assert "retry.scheduled" not in [name for name, _ in run_both(scenario)]


def test_refusals_are_retried_if_on_names_them():
    async def scenario(colour):
        for on in (BulkheadFull, (OSError, BulkheadFull)):
            bulkhead = Bulkhead(1)

            async def hold(on=on, bulkhead=bulkhead):
                return await raised(colour, Retry(on=on, wait=1) | bulkhead, lambda: 1)

            assert type(await colour.call(bulkhead, hold)) is BulkheadFull
            assert bulkhead.statistics().rejected == 3

    run_both(scenario)


def test_refusals_that_say_when_to_come_back_are_worth_the_wait():
    async def scenario(colour):
        limit = RateLimit("1/10s")
        pipeline = Pipeline(Retry(on=Exception, wait=1), limit)
        assert await colour.call(pipeline, lambda: "a") == "a"
        assert await colour.call(pipeline, lambda: "b") == "b"
        waited = colour.now()
        assert 10 <= waited <= 11
        error = await raised(colour, Pipeline(Retry(on=OSError), limit), lambda: "c")  # not named
        assert type(error) is RateLimited
        assert colour.now() == waited

    run_both(scenario)


def test_an_isolated_breaker_is_not_asked_again_and_an_open_one_when_it_is_time():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=1)
        pipeline = Pipeline(Retry(2, on=(OSError, CircuitOpen), wait=0), breaker)
        breaker.force_open()
        assert await colour.call(pipeline, lambda: "good") == "good"
        waited = colour.now()
        assert 5 <= waited <= 5.5
        breaker.isolate()
        error = await raised(colour, Pipeline(Retry(on=Exception), breaker), lambda: "good")
        assert type(error) is CircuitOpen
        assert colour.now() == waited

    run_both(scenario)


class Unrepeatable(Edge):
    knows_failures = True

    def transient(self, error):
        return isinstance(error, OSError)

    def repeatable(self, call, error=None):
        return "again" in call.kwargs or isinstance(error, ConnectionRefusedError)


def chained(colour_name, policy, its_edge, function, *args, **kwargs):
    class EdgeCall(Call):
        edge = its_edge

    if colour_name == "sync":
        with virtual_time():
            return policy.chain(its_edge)(EdgeCall(function, args, kwargs))

    async def main():
        return await policy.achain(its_edge)(EdgeCall(function.asynchronous, args, kwargs))

    return run(main, backend=colour_name)


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
def test_an_edge_says_what_is_transient_and_what_may_be_repeated(colour):
    retry = Retry(wait=1)  # no on=: this edge knows
    function = flaky(OSError("once"))
    with capture_events(retry) as seen, pytest.raises(OSError, match="once") as caught:
        chained(colour, retry, Unrepeatable(), function)
    assert len(function.calls) == 1
    assert caught.value.__notes__ == [f"{retry.label}: 1 attempt in 0.00 s; the call cannot be repeated"]
    assert [(event.name, event.reason) for event in seen] == [("retry.gave_up", "not_repeatable")]
    assert chained(colour, retry, Unrepeatable(), flaky(OSError, 7), again=True) == 7
    with pytest.raises(KeyError):
        chained(colour, retry, Unrepeatable(), flaky(KeyError, 7), again=True)


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
def test_how_an_attempt_ended_may_decide_whether_it_is_repeated(colour):
    retry = Retry(4, wait=0)
    refused = ConnectionRefusedError("never got there")
    assert chained(colour, retry, Unrepeatable(), flaky(refused, refused, 7)) == 7
    with pytest.raises(ConnectionResetError) as caught:
        chained(colour, retry, Unrepeatable(), flaky(refused, ConnectionResetError("half way"), 7))
    assert "2 attempts in 0.00 s; the call cannot be repeated" in caught.value.__notes__[0]


@pytest.mark.parametrize("budget", [None, RetryBudget()], ids=["plain", "counting"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_async_chain_waits_until_an_error_is_released(backend, budget):
    times = []

    class Slow(Unrepeatable):
        async def adiscard(self, outcome):
            await anyio.sleep(3)
            times.append((str(outcome), anyio.current_time() - start))

    async def main():
        nonlocal start
        start = anyio.current_time()
        retry = Retry(4, wait=1, budget=budget)
        chain = retry.achain(Slow())
        errors = [OSError(1), OSError(2), OSError(3), KeyError("not ours")]
        with pytest.raises(KeyError):
            await chain(Call(flaky(*errors).asynchronous, (), {"again": True}))
        with pytest.raises(KeyError):
            await chain(Call(flaky(KeyError).asynchronous, (), {"again": True}))

    start = 0.0
    run(main, backend=backend)
    assert times == [("1", 3), ("2", 7), ("3", 11)]


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
@pytest.mark.parametrize("budget", [None, RetryBudget()], ids=["plain", "counting"])
def test_an_edge_releases_the_errors_that_nobody_sees(colour, budget):
    discarded = []

    class Releasing(Unrepeatable):
        def discard(self, outcome):
            discarded.append(outcome)

    errors = [OSError(1), OSError(2), OSError(3)]
    with pytest.raises(OSError, match="3"):
        chained(colour, Retry(wait=0, budget=budget), Releasing(), flaky(*errors), again=True)
    assert discarded == errors[:2]


# -- groups, context, stack -------------------------------------------------------------------------------------


def test_a_group_is_retried_if_each_of_its_errors_is():
    async def scenario(colour):
        for group, attempts in [
            (ExceptionGroup("all", [OSError(), OSError()]), 2),
            (ExceptionGroup("nested", [OSError(), ExceptionGroup("inner", [OSError()])]), 2),
            (ExceptionGroup("mixed", [OSError(), KeyError()]), 1),
            (ExceptionGroup("nested", [ExceptionGroup("inner", [OSError(), KeyError()])]), 1),
        ]:
            function = flaky(group)
            assert await raised(colour, Retry(2, on=OSError, wait=0), function) is group
            assert len(function.calls) == attempts

    run_both(scenario)


def test_a_group_with_a_cancellation_passes_through():
    group = BaseExceptionGroup("both", [OSError(), KeyboardInterrupt()])
    function = flaky(group)
    with virtual_time(), pytest.raises(BaseExceptionGroup) as caught:
        Retry(on=(OSError, BaseExceptionGroup), wait=0).call(function)
    assert caught.value is group
    assert len(function.calls) == 1


def test_errors_do_not_drag_the_earlier_ones_along():
    async def scenario(colour):
        errors = [OSError(number) for number in range(50)]
        last = await raised(colour, Retry(50, on=OSError, wait=0), flaky(*errors))
        assert last is errors[-1]
        assert all(error.__context__ is None and error.__cause__ is None for error in errors)

    run_both(scenario)


def test_errors_of_earlier_attempts_are_let_go():
    class Big(Exception):
        pass

    alive = []

    def function():
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        error = Big()
        references.append(weakref.ref(error))
        raise error

    references = []
    with virtual_time(), pytest.raises(Big):
        Retry(20, on=Big).call(function)
    assert max(alive) <= 1


def test_the_context_of_the_caller_is_kept():
    def caller():
        try:
            raise KeyError("before")
        except KeyError:
            Retry(3, on=OSError, wait=0).call(flaky(OSError("during")))

    with virtual_time(), pytest.raises(OSError, match="during") as caught:
        caller()
    assert type(caught.value.__context__) is KeyError


def depth():
    return len(inspect.stack(0))


def test_ten_thousand_attempts_do_not_grow_the_stack():
    async def scenario(colour):
        depths = set()
        lengths = []

        def fail():
            attempt = len(lengths)
            lengths.append(attempt)
            if attempt % 500 == 1 or attempt == 9_999:
                depths.add(depth())
            raise OSError

        error = await raised(colour, Retry(10_000, on=OSError, wait=0), fail)
        assert len(lengths) == 10_000
        assert len(depths) == 1
        assert len(traceback.extract_tb(error.__traceback__)) < 15
        assert error.__notes__[0].endswith("10000 attempts in 0.00 s")

    run_both(scenario)


def test_ten_thousand_attempts_of_a_block_do_not_grow_the_stack():
    depths = set()
    count = 0

    def attempts():
        nonlocal count
        for attempt in Retry(10_000, on=OSError, wait=0):
            with attempt:
                count += 1
                if count % 500 == 0:
                    depths.add(depth())
                raise OSError("last")

    with virtual_time(), pytest.raises(OSError, match="last"):
        attempts()
    assert (count, len(depths)) == (10_000, 1)


# -- Retry-After, deadline, budget ------------------------------------------------------------------------------


class Asking(Exception):
    """An error that says when to come back."""

    def __init__(self, retry_after):
        super().__init__(retry_after)
        self.retry_after = retry_after


def test_retry_after_is_waited_for_if_it_is_longer():
    async def scenario(colour):
        retry = Retry(5, on=Asking, wait=2)
        asks = [7, 1, timedelta(seconds=50), None]  # an edge reads only numbers here
        with capture_events(retry) as seen:
            assert await colour.call(retry, flaky(*map(Asking, asks), "good")) == "good"
        first, *others = [event.delay for event in seen]
        assert 7 <= first <= 7.7
        assert others == [2, 2, 2]

    run_both(scenario)


@pytest.mark.parametrize(("asked", "most"), [(0.5, 0.05), (7.0, 0.7), (10.0, 1.0), (100.0, 1.0)])
def test_who_was_told_to_come_back_at_the_same_time_does_not_quite(asked, most):
    retry = Retry(2, on=Asking, wait=0, max_retry_after=100)
    spread = [delays_of(retry, flaky(Asking(asked)), seed=seed)[0] - asked for seed in range(200)]
    assert min(spread) >= 0, "what was asked for is a floor"
    assert max(spread) <= most + 1e-9
    assert min(spread) < 0.1 * most
    assert max(spread) > 0.9 * most


def test_a_wait_of_our_own_that_is_as_long_is_taken_as_it_is():
    assert delays_of(Retry(3, on=Asking, wait=7), flaky(Asking(7))) == [7, 7]


def test_a_response_says_when_to_come_back():
    async def scenario(colour):
        busy = SimpleNamespace(status_code=503, headers={"Retry-After": "7"})
        error = OSError("bad status")
        error.response = busy
        for outcome in (busy, error):
            before = colour.now()
            retry = Retry(2, on={503, OSError}, wait=1)
            assert await colour.call(retry, flaky(outcome, "good")) == "good"
            assert 7 <= colour.now() - before <= 7.7
        hours = SimpleNamespace(status_code=503, headers={"Retry-After": "7200"})
        assert await colour.call(retry, flaky(hours, "good")) is hours

    run_both(scenario)


@pytest.mark.parametrize("asked", [float("nan"), -5.0, 0])
def test_a_retry_after_that_means_nothing_is_ignored(asked):
    assert delays_of(Retry(2, on=Asking, wait=2), flaky(Asking(asked))) == [2]


def test_a_retry_after_beyond_the_limit_fails_at_once():
    async def scenario(colour):
        retry = Retry(on=Asking, wait=1, name="r")
        function = flaky(Asking(61.0))
        with capture_events(retry) as seen:
            error = await raised(colour, retry, function)
        assert error.retry_after == 61
        assert error.__notes__ == [
            "r: 1 attempt in 0.00 s; the other side asked for a longer wait than max_retry_after"
        ]
        assert [event.reason for event in seen] == ["retry_after"]
        assert (len(function.calls), colour.now()) == (1, 0)
        assert await colour.call(Retry(on=Asking, max_retry_after=61), flaky(Asking(61), 7)) == 7
        assert await colour.call(Retry(on=Asking, max_retry_after=timedelta(hours=1)), flaky(Asking(61), 7)) == 7
        infinite = await raised(colour, Retry(on=Asking), flaky(Asking(float("inf"))))
        assert infinite.retry_after == float("inf")
        with_none = Retry(2, on=Asking, max_retry_after=0, wait=1)
        assert type(await raised(colour, with_none, flaky(Asking(0.5), 7))) is Asking
        assert await colour.call(with_none, flaky(Asking(0), 7)) == 7

    run_both(scenario)


def test_a_retry_after_that_does_not_fit_the_deadline_fails_at_once():
    async def scenario(colour):
        function = flaky(Asking(10), "late")
        error = await raised(colour, Pipeline(Timeout(10), Retry(on=Asking, name="r")), function)
        assert error.retry_after == 10
        assert error.__notes__ == ["r: 1 attempt in 0.00 s; the next attempt would begin after the deadline"]
        assert colour.now() == 0
        fits = Pipeline(Timeout(10), Retry(on=Asking, wait=0))
        assert await colour.call(fits, flaky(Asking(9), "in time")) == "in time"

    run_both(scenario)


class Saying(Unrepeatable):
    """An edge that knows what the other side asked for, as that of HTTP does."""

    def repeatable(self, call, error=None):
        return True

    def retry_after(self, error):
        return 90.0


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
def test_what_the_edge_knows_of_retry_after_is_put_on_the_error(colour):
    class Sealed(OSError):
        @property
        def retry_after(self):
            return "never"

    with pytest.raises(OSError, match="busy") as caught:
        chained(colour, Retry(), Saying(), flaky(OSError("busy")))
    assert caught.value.retry_after == 90
    with pytest.raises(Sealed) as sealed:  # cannot be told, and comes out all the same
        chained(colour, Retry(), Saying(), flaky(Sealed("busy")))
    assert sealed.value.retry_after == "never"
    assert "longer wait" in sealed.value.__notes__[0]


def test_no_sleep_goes_past_the_deadline():
    async def scenario(colour):
        function = flaky(OSError)
        retry = Retry(10, on=OSError, wait=3)
        with capture_events(retry) as seen:
            error = await raised(colour, Pipeline(Timeout(10), retry), function)
        assert type(error) is OSError  # the error of the last attempt, not a TimedOut
        assert error.__notes__[-1].endswith(
            "4 attempts in 9.00 s; the next attempt would begin after the deadline"
        )
        assert seen[-1].reason == "deadline"
        assert (len(function.calls), colour.now()) == (4, 9)
        assert not hasattr(error, "retry_after")

    run_both(scenario)


def test_a_sleep_that_ends_at_the_deadline_is_one_too_many():
    async def scenario(colour):
        function = flaky(OSError)
        await raised(colour, Pipeline(Timeout(3), Retry(on=OSError, wait=3)), function)
        assert (len(function.calls), colour.now()) == (1, 0)

    run_both(scenario)


def test_a_timeout_of_an_attempt_is_retried_and_that_of_the_whole_is_not():
    async def scenario(colour):
        attempts = []

        async def slow():
            attempts.append(colour.now())
            await colour.sleep(100)

        inner = Timeout(2, name="inner")
        error = await raised(
            colour, Pipeline(Timeout(9, name="outer"), Retry(5, on=TimedOut, wait=1), inner), slow
        )
        assert type(error) is TimedOut
        assert attempts == [0, 3, 6]
        if colour.name == "sync":
            await colour.sleep(200)  # until the threads have ended
        return error.policy

    run_both(scenario)


def test_a_budget_pays_for_retries():
    async def scenario(colour):
        budget = RetryBudget(cap=2, refill=1000, ratio=0.5, timeout_cost=1)
        retry = Retry(5, on=OSError, wait=0, budget=budget, name="r")
        function = flaky(OSError)
        with capture_events(retry) as seen:
            error = await raised(colour, retry, function)
        assert len(function.calls) == 3
        assert error.__notes__ == ["r: 3 attempts in 0.00 s; the retry budget is used up"]
        assert seen[-1].reason == "budget"
        assert budget.statistics().refused == 1
        for _ in range(2):  # one half token each
            assert await colour.call(retry, lambda: "good") == "good"
        assert await colour.call(retry, flaky(OSError, "good")) == "good"
        assert budget.tokens(colour.now()) == 0.5

    run_both(scenario)


def test_a_shared_budget_is_shared():
    with virtual_time():
        budget = RetryBudget(cap=2, timeout_cost=1, refill=1000)
        counts = []
        for _ in range(3):
            function = flaky(OSError)
            with pytest.raises(OSError):  # noqa: PT011 - a bare one
                Retry(2, on=OSError, wait=0, budget=budget).call(function)
            counts.append(len(function.calls))
        assert counts == [2, 2, 1]


def test_a_retry_after_a_timeout_costs_more():
    with virtual_time():
        budget = RetryBudget(cap=3, timeout_cost=2, refill=1000)
        function = flaky(TimeoutError)
        with pytest.raises(TimeoutError):
            Retry(9, on=TimeoutError, wait=0, budget=budget).call(function)
        assert len(function.calls) == 2
        assert budget.tokens(0.0) == 1


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
def test_the_edge_knows_what_a_timeout_is(colour):
    class Impatient(Unrepeatable):
        def timed_out(self, error):
            return "slow" in str(error)

    for error, left in ((OSError("slow"), 1), (OSError("down"), 2), (TimeoutError("own"), 2)):
        budget = RetryBudget(cap=3, timeout_cost=2, refill=1000, ratio=0)
        retry = Retry(2, wait=0, budget=budget)
        assert chained(colour, retry, Impatient(), flaky(error, 7), again=True) == 7
        assert budget.tokens(0.0) == left


def test_a_budget_may_have_a_key():
    async def scenario(colour):
        budget = RetryBudget(cap=1, timeout_cost=1, refill=1000, ratio=1, key=lambda host, **_: host, name="k")
        retry = Retry(9, on=OSError, wait=0, budget=budget)
        counts = []
        for host in ("a", "b", "a"):
            function = flaky(OSError)
            await raised(colour, retry, function, host)
            counts.append(len(function.calls))
        assert counts == [2, 2, 1]
        assert await colour.call(retry, flaky("good"), "a") == "good"
        assert (budget.tokens(0.0, "a"), budget.tokens(0.0, "b"), budget.tokens(0.0)) == (1, 0, 1)

    run_both(scenario)


def test_a_budget_that_is_full_is_not_asked_whose_success_it_is():
    def key(host):
        asked.append(host)
        return host

    asked = []
    budget = RetryBudget(cap=1, timeout_cost=1, refill=1000, ratio=1, key=key)
    retry = Retry(2, on=OSError, wait=0, budget=budget)
    with virtual_time():
        retry.call(flaky("good"), "a")
        assert asked == []
        retry.call(flaky(OSError, "good"), "a")
        assert asked == ["a", "a"]


def test_a_block_has_no_arguments_to_take_the_key_of_a_budget_from():
    retry = Retry(on=OSError, wait=0, budget=RetryBudget(key=lambda host: host))
    message = "RetryBudget: key= is a function of the call's arguments, and a block has none"
    for begin in (iter, aiter):
        with pytest.raises(TypeError, match=message):
            begin(retry)


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
def test_each_partition_of_an_edge_has_its_own_budget(colour):
    class Hosts(Saying):
        def retry_after(self, error):
            return None

        def key(self, call):
            return call.args[0]

    budget = RetryBudget(cap=1, timeout_cost=1, refill=1000, ratio=1)
    retry = Retry(9, wait=0, budget=budget)
    counts = []
    for host in ("a", "b", "a"):
        function = flaky(OSError)
        with pytest.raises(OSError):  # noqa: PT011 - a bare one
            chained(colour, retry, Hosts(), function, host)
        counts.append(len(function.calls))
    assert counts == [2, 2, 1]
    chained(colour, retry, Hosts(), flaky("good"), "a")
    assert (budget.tokens(0.0, "a"), budget.tokens(0.0, "b")) == (1, 0)


# -- responses --------------------------------------------------------------------------------------------------


class Answer:
    def __init__(self, status_code):
        self.status_code = status_code


class StatusError(Exception):
    """As SDKs raise them."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


def test_status_codes_make_responses_failures():
    async def scenario(colour):
        for on in ({429, 503}, (503, OSError), [503]):
            retry = Retry(on=on, wait=1, name="r")
            good, bad = Answer(200), Answer(503)
            function = flaky(bad, good)
            assert await colour.call(retry, function) is good
            assert len(function.calls) == 2
            with capture_events(retry) as seen:
                assert await colour.call(retry, flaky(bad)) is bad, "the last one comes back itself"
            assert [event.error for event in seen] == ["FailedResponse"] * 3
            other = Answer(404)
            function = flaky(other)
            assert await colour.call(retry, function) is other
            assert len(function.calls) == 1

    run_both(scenario)


def test_errors_with_such_a_status_are_wanted_too():
    async def scenario(colour):
        retry = Retry(on={429, 503, OSError}, wait=1)
        assert await colour.call(retry, flaky(StatusError(503), OSError(), "good")) == "good"
        function = flaky(StatusError(404))
        assert type(await raised(colour, retry, function)) is StatusError
        assert len(function.calls) == 1

    run_both(scenario)


def test_a_response_that_somebody_else_calls_a_failure_is_retried_only_if_it_is_wanted():
    async def scenario(colour):
        breaker = CircuitBreaker(on={503})
        for on, attempts in ((OSError, 1), ({500}, 1), ({503}, 3), (lambda error: error.status == 503, 3)):
            function = flaky(Answer(503))
            assert (await colour.call(Pipeline(Retry(on=on, wait=0), breaker), function)).status_code == 503
            assert len(function.calls) == attempts
        strategies = (
            (tenacity.retry_if_exception_type(OSError), 1),
            (tenacity.retry_if_result(lambda answer: answer.status_code == 503), 3),
        )
        for on, attempts in strategies:
            function = flaky(Answer(503))
            assert (await colour.call(Pipeline(Retry(on=on, wait=0), breaker), function)).status_code == 503
            assert len(function.calls) == attempts
        return breaker.statistics().failures

    run_both(scenario)


@pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])
def test_an_edge_that_knows_failures_decides_about_responses(colour):
    class Http(Unrepeatable):
        def failed(self, result):
            return FailedResponse(result) if result.status_code >= 500 else None

        def transient(self, error):
            return error.status == 503

    for retry, status, attempts in (
        (Retry(wait=0), 503, 3),
        (Retry(wait=0), 500, 1),
        (Retry(on={500}, wait=0), 500, 3),
        (Retry(on={500}, wait=0), 503, 1),
        (Retry(on={404}, wait=0), 404, 3),
        (Retry(wait=0), 404, 1),
    ):
        function = flaky(Answer(status))
        assert chained(colour, retry, Http(), function, again=True).status_code == status
        assert len(function.calls) == attempts, (retry, status)


# -- failing results --------------------------------------------------------------------------------------------


def test_a_failing_result_is_retried_and_given_back_unchanged():
    async def scenario(colour):
        for policy in (
            Pipeline(Retry(on=OSError, wait=1), failed=lambda result: result["status"] >= 500),
            Retry(on=tenacity.retry_if_result(lambda result: result["status"] >= 500), wait=1),
            Retry(
                on=tenacity.retry_if_exception_type(OSError)
                | tenacity.retry_if_result(lambda result: result["status"] >= 500),
                wait=1,
            ),
            Retry(on=tenacity.retry_if_not_result(lambda result: result["status"] < 500), wait=1),
        ):
            bad = [{"status": 500}, {"status": 501}, {"status": 502}]
            function = flaky(*bad)
            assert await colour.call(policy, function) is bad[2]
            assert len(function.calls) == 3
            good = {"status": 200}
            assert await colour.call(policy, flaky({"status": 500}, good)) is good

    run_both(scenario)


def test_policies_further_in_see_a_failing_result_as_a_failure():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=3)
        policy = Pipeline(Retry(on=tenacity.retry_if_result(lambda result: result is None), wait=0), breaker)
        assert await colour.call(policy, lambda: None) is None
        assert breaker.current_state == "open"

    run_both(scenario)


def test_a_strategy_for_results_sees_the_attempt_and_the_call():
    states = []

    def wants(state):
        if not state.outcome.failed:
            states.append((state.attempt_number, state.args, state.outcome.result()))
        return False

    class Watching(tenacity.retry_if_result):
        def __call__(self, state):
            return wants(state)

    with virtual_time():
        Retry(on=Watching(bool) | tenacity.retry_if_exception_type(OSError), wait=0).call(flaky(OSError, 7), "x")
    assert states == [(2, ("x",), 7)]


def test_a_result_that_waits_by_the_error_says_that_there_is_none():
    retry = Retry(on=tenacity.retry_if_result(lambda result: True), wait=tenacity.wait_exception(lambda error: 1))
    with virtual_time(), pytest.raises(RuntimeError, match="exception is None"):
        retry.call(lambda: 1)


def test_a_strategy_for_exceptions_only_is_not_asked_about_results():
    on = tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_exception_message(match="x")
    assert Retry(on=on).judge is None
    assert Retry(on=on | tenacity.retry_if_result(bool)).judge is not None
    assert Retry(on=tenacity.retry_never).judge is None
    assert Retry(on=tenacity.retry_unless_exception_type(OSError)).judge is not None


# -- blocks -----------------------------------------------------------------------------------------------------


def test_a_block_is_made_again():
    retry = Retry(on=OSError, wait=2)
    numbers = []
    with virtual_time() as clock:
        for attempt in retry:
            with attempt as entered:
                assert entered is attempt
                numbers.append(attempt.number)
                if attempt.number < 3:
                    raise OSError
        assert clock.now() == 4
    assert numbers == [1, 2, 3]
    assert retry.statistics().retries == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_is_made_again_in_async_code(backend):
    async def main():
        numbers = []
        async for attempt in Retry(on=OSError, wait=2):
            with attempt:
                await anyio.sleep(1)
                numbers.append((attempt.number, anyio.current_time() - start))
                if attempt.number < 3:
                    raise OSError
        return numbers

    async def timed():
        nonlocal start
        start = anyio.current_time()
        return await main()

    start = 0.0
    assert run(timed, backend=backend) == [(1, 1), (2, 4), (3, 7)]


def block_under(retry, errors):
    """Run a block under a retry that raises one error after the other; return how many."""
    count = 0

    def block():
        nonlocal count
        for attempt in retry:
            with attempt:
                count += 1
                raise errors[min(count, len(errors)) - 1]

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - looked at by the caller
        block()
    return caught.value, count


def test_the_last_error_of_a_block_comes_out_itself():
    errors = [OSError(1), OSError(2)]
    with virtual_time():
        error, _ = block_under(Retry(2, on=OSError, wait=1, name="r"), errors)
    assert error is errors[1]
    assert error.__notes__ == ["r: 2 attempts in 1.00 s"]
    assert error.__context__ is None


def test_the_attempts_of_a_block_are_an_iterator():
    attempts = aiter(Retry(on=OSError))
    assert aiter(attempts) is attempts


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_error_of_an_async_block_comes_out_itself(backend):
    async def main():
        count = 0
        try:
            async for attempt in Retry(2, on=OSError, wait=0):
                with attempt:
                    count += 1
                    raise OSError(count)
        except OSError as error:
            return error.args, error.__context__
        return None

    assert run(main, backend=backend) == ((2,), None)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, KeyError])
def test_what_is_not_retried_leaves_a_block_at_once(kind):
    with virtual_time():
        error, count = block_under(Retry(on=(OSError,), wait=1), [kind()])
    assert (type(error), count) == (kind, 1)
    assert not hasattr(error, "__notes__")


def test_a_block_respects_the_deadline():
    with virtual_time() as clock, Timeout(5, interrupt=False):
        error, count = block_under(Retry(9, on=OSError, wait=2), [OSError()])
        assert (count, clock.now()) == (3, 4)
    assert "the next attempt would begin after the deadline" in error.__notes__[0]


def test_a_block_is_paid_from_the_budget():
    with virtual_time() as clock:
        budget = RetryBudget(cap=1, timeout_cost=1, ratio=1, refill=1000)
        retry = Retry(9, on=OSError, wait=0, budget=budget)
        _, count = block_under(retry, [OSError()])
        assert count == 2
        for attempt in retry:
            with attempt:
                pass
        assert budget.tokens(clock.now()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_without_with_attempt_is_told_that_nothing_was_guarded(backend):
    message = r"^fetch guarded nothing in this loop; put the block under `with attempt:`"
    retry = Retry(on=OSError, name="fetch")
    with pytest.raises(RuntimeError, match=message):
        for _ in retry:
            pass

    async def main():
        with pytest.raises(RuntimeError, match=message):
            async for _ in retry:
                pass

    run(main, backend=backend)


def test_a_block_can_be_left_by_break_and_return():
    retry = Retry(on=OSError, wait=0)

    def function():
        for attempt in retry:
            with attempt:
                return attempt.number
        return None

    assert function() == 1
    for attempt in retry:
        with attempt:
            break
    assert attempt.number == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_tasks_that_iterate_over_one_retry_have_their_own_attempts(backend):
    retry = Retry(3, on=OSError, wait=tenacity.wait_incrementing(1, 1))

    async def main():
        numbers = [[] for _ in range(8)]
        failed = []

        async def one(index):
            try:
                async for attempt in retry:
                    with attempt:
                        numbers[index].append(attempt.number)
                        await anyio.sleep(0.1 * index)
                        raise OSError
            except OSError:
                failed.append(index)

        async with anyio.create_task_group() as group:
            for index in range(8):
                group.start_soon(one, index)
        return numbers, sorted(failed)

    assert run(main, backend=backend) == ([[1, 2, 3]] * 8, list(range(8)))


def test_threads_that_iterate_over_one_retry_have_their_own_attempts():
    retry = Retry(3, on=OSError, wait=1)

    def one():
        numbers = []
        try:
            for attempt in retry:
                with attempt:
                    numbers.append(attempt.number)
                    raise OSError
        except OSError:
            return numbers

    with virtual_time() as clock:
        assert clock.run_threads(*[one] * 8) == [[1, 2, 3]] * 8
    assert retry.statistics().retries == 16


def test_concurrent_calls_of_one_retry_have_their_own_attempts():
    async def scenario(colour):
        retry = Retry(3, on=OSError, wait=tenacity.wait_incrementing(1, 1))

        def one(index):
            async def call():
                function = flaky(OSError)
                await colour.sleep(index / 8)
                error = await raised(colour, retry, function)
                return len(function.calls), error.__notes__

            return call

        results = await colour.gather(*map(one, range(8)))
        assert results == [(3, [f"{retry.label}: 3 attempts in 3.00 s"])] * 8

    run_both(scenario)


# -- nesting, statistics, options -------------------------------------------------------------------------------


def test_nested_retries_multiply_and_both_leave_a_note():
    async def scenario(colour):
        function = flaky(OSError)
        outer, inner = Retry(2, on=OSError, wait=0, name="outer"), Retry(3, on=OSError, wait=0, name="inner")
        error = await raised(colour, outer | inner, function)
        assert len(function.calls) == 6
        assert error.__notes__ == ["inner: 3 attempts in 0.00 s", "outer: 2 attempts in 0.00 s"]

    run_both(scenario)


def test_statistics_count_retries_and_calls_given_up():
    async def scenario(colour):
        retry = Retry(on=OSError, wait=0)
        await colour.call(retry, flaky(OSError, "good"))
        await raised(colour, retry, flaky(OSError))
        await raised(colour, retry, flaky(KeyError))
        statistics = retry.statistics()
        assert (statistics.retries, statistics.gave_up) == (3, 1)
        with pytest.raises(AttributeError):
            statistics.retries = 0
        assert retry.fresh().statistics().retries == 0

    run_both(scenario)


def test_randomness_comes_from_the_seeded_module():
    first = delays_of(Retry(5, on=OSError), flaky(OSError), seed=3)
    assert first == delays_of(Retry(5, on=OSError), flaky(OSError), seed=3)
    assert first != delays_of(Retry(5, on=OSError), flaky(OSError), seed=4)
    assert len(set(first)) == 4
    state = random.getstate()
    delays_of(Retry(5, on=OSError), flaky(OSError))
    assert random.getstate() == state


async def an_async_function(state):
    return 1


BAD = [
    ({"stop": 0}, ValueError, "stop=0", "a number of attempts >= 1"),
    ({"stop": -1}, ValueError, "stop=-1", "a number of attempts >= 1"),
    ({"stop": True}, TypeError, "stop=True", "a number of attempts >= 1"),
    ({"stop": 2.5}, TypeError, "stop=2.5", "a number of attempts >= 1"),
    ({"stop": None}, TypeError, "stop=None", "a number of attempts >= 1"),
    ({"stop": "3"}, TypeError, "stop='3'", "a number of attempts >= 1"),
    ({"stop": OSError}, TypeError, "stop=<class 'OSError'>", "Which errors are worth another try goes into on="),
    ({"stop": (OSError, 503)}, TypeError, "stop=(<class 'OSError'>, 503)", "goes into on="),
    ({"stop": tenacity.retry_always}, TypeError, "stop=<tenacity.retry._retry_always", "goes into on="),
    ({"stop": timedelta(0)}, ValueError, "stop=datetime.timedelta(0)", "a number of seconds (or a timedelta) > 0"),
    ({"stop": an_async_function}, TypeError, "stop=<function an_async", "a number of attempts >= 1"),
    ({"wait": -1}, ValueError, "wait=-1", ">= 0"),
    ({"wait": float("nan")}, ValueError, "wait=nan", ">= 0"),
    ({"wait": float("inf")}, ValueError, "wait=inf", ">= 0"),
    ({"wait": timedelta(seconds=-1)}, ValueError, "wait=datetime.timedelta(days=-1", ">= 0"),
    ({"wait": "1"}, TypeError, "wait='1'", "a number of seconds >= 0"),
    ({"wait": True}, TypeError, "wait=True", "a number of seconds >= 0"),
    ({"wait": None}, TypeError, "wait=None", "a number of seconds >= 0"),
    ({"wait": tenacity.wait_fixed}, TypeError, "wait=<class", "a number of seconds >= 0"),
    ({"wait": an_async_function}, TypeError, "wait=<function an_async", "a number of seconds >= 0"),
    ({"on": "OSError"}, TypeError, "on='OSError'", "an exception class"),
    ({"on": int}, TypeError, "on=<class 'int'>", "an exception class"),
    ({"on": ()}, ValueError, "on=()", "an exception class"),
    ({"on": (OSError, 99)}, ValueError, "on=(<class 'OSError'>, 99)", "HTTP status codes (100 to 599)"),
    ({"on": (OSError, "x")}, TypeError, "on=(<class 'OSError'>, 'x')", "an exception class"),
    ({"on": OSError()}, TypeError, "on=OSError()", "an exception class"),
    ({"on": an_async_function}, TypeError, "on=<function an_async", "a sync function"),
    ({"max_retry_after": -1}, ValueError, "max_retry_after=-1", ">= 0"),
    ({"max_retry_after": None}, TypeError, "max_retry_after=None", ">= 0"),
    ({"budget": 10}, TypeError, "budget=10", "a RetryBudget or None"),
    ({"name": 3}, TypeError, "name=3", "a str or None"),
    ({"name": ""}, ValueError, "name=''", "a non-empty str or None"),
]


@pytest.mark.parametrize(("options", "kind", "named", "allowed"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_option_is_named_with_its_value_and_what_is_allowed(options, kind, named, allowed):
    with pytest.raises(kind, match=f"^Retry: {re.escape(named)}.*is not allowed; give .*{re.escape(allowed)}"):
        Retry(**{"on": OSError, **options})


def test_a_strategy_that_answers_badly_says_so():
    with virtual_time():
        with pytest.raises(ValueError, match="Retry: wait=-3 is not allowed"):
            Retry(on=OSError, wait=lambda state: -3).call(flaky(OSError))
        with pytest.raises(TypeError, match="Retry: wait='soon' is not allowed"):
            Retry(on=OSError, wait=lambda state: "soon").call(flaky(OSError))


class Awaited(tenacity.retry_if_exception):
    def __call__(self, state):
        return an_async_function(state)


@pytest.mark.parametrize("option", ["wait", "stop", "on"])
def test_a_strategy_that_would_have_to_be_awaited_is_refused(option):
    def sneaky(state):
        return an_async_function(state)

    retry = Retry(**{"on": OSError, "wait": 0, option: Awaited(bool) if option == "on" else sneaky})
    with virtual_time(), pytest.raises(TypeError, match=f"Retry: {option}= gave an awaitable"):
        retry.call(flaky(OSError))


def test_an_awaitable_of_another_sort_is_refused_too():
    class Future:
        def __await__(self):
            yield

    with virtual_time(), pytest.raises(TypeError, match="wait= gave an awaitable"):
        Retry(on=OSError, wait=lambda state: Future()).call(flaky(OSError))


def test_a_retry_shows_its_options():
    shown = repr(Retry(5, on=(OSError, KeyError), wait=1.5))
    assert "5" in shown
    assert shown.endswith("on=(OSError, KeyError), wait=1.5)")
