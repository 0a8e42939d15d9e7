import asyncio
import functools
import re
from types import SimpleNamespace

import anyio
import pytest

from resilient import (
    Bulkhead,
    BulkheadFull,
    CircuitBreaker,
    Fallback,
    Pipeline,
    Retry,
    RetryBudget,
    TimedOut,
    Timeout,
)
from resilient.call import Call
from resilient.kinds import MISSING
from resilient.testing import capture_events, flaky, run, run_both, virtual_time

BACKENDS = ("asyncio", "trio")


async def raised(colour, policy, function, *args):
    """Call, and return the error that comes out."""
    try:
        result = await colour.call(policy, function, *args)
    except Exception as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


def test_a_call_that_succeeds_needs_no_fallback():
    async def scenario(colour):
        replica = flaky("replica")
        policy = Fallback(replica)
        assert await colour.call(policy, lambda: None) is None
        assert replica.calls == []
        assert policy.statistics().used == 0

    assert run_both(scenario) == []


@pytest.mark.parametrize("value", [None, 0, "", "old", [], {"items": []}, float("nan")])
def test_a_value_answers_for_a_failed_call(value):
    async def scenario(colour):
        policy = Fallback(value, name="f")
        assert await colour.call(policy, flaky(OSError)) is value
        assert policy.statistics().used == 1

    assert run_both(scenario) == [("fallback.used", 0.0)]


def test_a_function_is_called_with_the_same_arguments():
    async def scenario(colour):
        replica = flaky("replica")
        assert await colour.call(Fallback(replica), flaky(OSError), 1, key="x") == "replica"
        assert replica.calls == [((1,), {"key": "x"})]

    run_both(scenario)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_async_function_answers_for_an_async_call(backend):
    class Replica:
        async def __call__(self, value):
            await anyio.sleep(1)
            return "object", value

    async def replica(value):
        await anyio.sleep(1)
        return "replica", value

    async def main():
        failing = flaky(OSError).asynchronous
        return [
            await Fallback(replica).acall(failing, 1),
            await Fallback(Replica()).acall(failing, 2),
            await Fallback(functools.partial(replica, 3)).acall(flaky(OSError).asynchronous),
            await Fallback(lambda value: replica(value)).acall(failing, 4),  # noqa: PLW0108 - the lambda hides the colour
            await Fallback(lambda value: value).acall(failing, 5),
        ]

    assert run(main, backend=backend) == [("replica", 1), ("object", 2), ("replica", 3), ("replica", 4), 5]


def test_an_async_function_cannot_answer_for_a_sync_call():
    async def replica():
        return 1

    class Replica:
        async def __call__(self):
            return 1

    for alternative in (replica, functools.partial(replica), Replica()):
        with pytest.raises(TypeError, match=r"^Fallback: .* is async and cannot answer for a sync function"):
            Fallback(alternative)(lambda: 1)
        with pytest.raises(TypeError, match="is async"):
            Pipeline(Timeout(1), Fallback(lambda: 1, alternative)).call(lambda: 1)


def test_each_alternative_is_tried_when_the_one_before_it_failed():
    async def scenario(colour):
        first, second = flaky(KeyError("first")), flaky("second")
        policy = Fallback(first, second, "value", name="f")
        with capture_events(policy) as seen:
            assert await colour.call(policy, flaky(OSError), 7) == "second"
        assert (first.calls, second.calls) == ([((7,), {})], [((7,), {})])
        assert [event.error for event in seen] == ["OSError", "KeyError"]
        assert policy.statistics().used == 2
        assert await colour.call(Fallback(flaky(OSError), flaky(OSError), "value"), flaky(OSError)) == "value"

    run_both(scenario)


def test_the_last_error_carries_the_ones_before_it():
    async def scenario(colour):
        errors = [OSError("call"), KeyError("first"), ValueError("second")]
        error = await raised(colour, Fallback(flaky(errors[1]), flaky(errors[2])), flaky(errors[0]))
        assert error is errors[2]
        assert error.__context__ is errors[1]
        assert error.__context__.__context__ is errors[0]

    run_both(scenario)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_async_alternative_that_fails_carries_the_error_too(backend):
    async def main():
        first, second = OSError("call"), KeyError("late")

        async def replica():
            await anyio.sleep(1)
            raise second

        try:
            await Fallback(replica).acall(flaky(first).asynchronous)
        except KeyError as error:
            return error is second and error.__context__ is first
        return None

    assert run(main, backend=backend)


@pytest.mark.parametrize("on", [OSError, (KeyError, OSError), {OSError}, lambda error: isinstance(error, OSError)])
def test_on_says_for_which_errors(on):
    async def scenario(colour):
        policy = Fallback("value", on=on)
        assert await colour.call(policy, flaky(ConnectionError)) == "value"
        own = ValueError("other")
        assert await raised(colour, policy, flaky(own)) is own
        assert policy.statistics().used == 1

    assert run_both(scenario) == [("fallback.used", 0.0)]


def test_on_is_asked_about_each_error():
    async def scenario(colour):
        own = KeyError("not ours")
        policy = Fallback(flaky(own), "never", on=OSError)
        assert await raised(colour, policy, flaky(OSError)) is own

    run_both(scenario)


def test_a_group_is_answered_if_each_of_its_errors_is():
    async def scenario(colour):
        policy = Fallback("value", on=OSError)
        assert await colour.call(policy, flaky(ExceptionGroup("g", [OSError(), OSError()]))) == "value"
        mixed = ExceptionGroup("g", [OSError(), KeyError()])
        assert await raised(colour, policy, flaky(mixed)) is mixed

    run_both(scenario)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("on", [BaseException, lambda error: True])
def test_interrupts_and_cancellation_never_lead_to_a_fallback(error, on):
    replica = flaky("replica")
    with capture_events() as seen, pytest.raises(error):
        Fallback(replica, on=on).call(flaky(error))
    assert (seen, replica.calls) == ([], [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cancelled_call_has_no_fallback(backend):
    async def main():
        with anyio.move_on_after(1) as scope:
            await Fallback("value", on=BaseException).acall(anyio.sleep, 100)
        return scope.cancelled_caught

    with capture_events() as seen:
        assert run(main, backend=backend)
    assert seen == []


def test_refusals_and_timeouts_of_policies_further_in_are_answered():
    async def scenario(colour):
        breaker = CircuitBreaker(consecutive=1)
        guard = Pipeline(Fallback("value"), breaker)
        assert [await colour.call(guard, flaky(OSError)) for _ in range(2)] == ["value", "value"]
        assert breaker.statistics().rejected == 1

        async def slow():
            await colour.sleep(10)

        assert await colour.call(Fallback("value", on=TimedOut) | Timeout(2), slow) == "value"
        assert colour.now() == 2
        own = await raised(colour, Fallback("value", on=BulkheadFull) | Timeout(2), slow)
        assert type(own) is TimedOut
        if colour.name == "sync":
            await colour.sleep(20)

    run_both(scenario)


def test_a_fallback_inside_of_a_retry_leaves_nothing_to_retry():
    async def scenario(colour):
        function = flaky(OSError)
        assert await colour.call(Retry(on=OSError) | Fallback("value"), function) == "value"
        assert len(function.calls) == 1
        assert await colour.call(Fallback("value") | Retry(on=OSError, wait=0), function) == "value"
        assert len(function.calls) == 4

    run_both(scenario)


def test_a_failing_result_is_answered_too():
    async def scenario(colour):
        guard = Pipeline(Fallback("value"), failed=lambda result: result == "bad")
        assert await colour.call(guard, lambda: "bad") == "value"
        assert await colour.call(guard, lambda: "good") == "good"
        elsewhere = Pipeline(Fallback("value", on=OSError), failed=lambda result: result == "bad")
        assert await colour.call(elsewhere, lambda: "bad") == "bad"

    run_both(scenario)


def test_a_class_is_an_alternative_that_makes_something():
    async def scenario(colour):
        first = await colour.call(Fallback(dict), flaky(OSError))
        assert first == {}
        assert first is not await colour.call(Fallback(dict), flaky(OSError))

    run_both(scenario)


def test_a_fallback_runs_outside_of_the_permit():
    async def scenario(colour):
        bulkhead = Bulkhead(1)

        def replica():
            return bulkhead.statistics().in_use

        assert await colour.call(Fallback(replica) | bulkhead, flaky(OSError)) == 0

    run_both(scenario)


def test_a_guarded_function_may_be_the_fallback_of_another():
    with virtual_time():

        @Fallback("value")
        def replica(key):
            raise KeyError(key)

        @Fallback(replica)
        def primary(key):
            raise OSError

        assert primary("x") == "value"


def test_status_codes_lead_to_a_fallback_too():
    async def scenario(colour):
        policy = Fallback("default", on={503, OSError})
        error = ValueError("bad status")
        error.response = SimpleNamespace(status_code=503)
        good, other = SimpleNamespace(status_code=200), SimpleNamespace(status_code=500)
        for outcome in (SimpleNamespace(status_code=503), error, OSError()):
            assert await colour.call(policy, flaky(outcome)) == "default"
        for outcome in (good, other):
            assert await colour.call(policy, flaky(outcome)) is outcome
        error.response.status_code = 500
        assert await raised(colour, policy, flaky(error)) is error

    assert [name for name, _ in run_both(scenario)] == ["fallback.used"] * 3


def test_a_response_that_is_not_wanted_is_none_of_its_business():
    async def scenario(colour):
        bad = SimpleNamespace(status_code=503)
        guard = Pipeline(Fallback("default", on={500}), Retry(2, on={503}, wait=0))
        assert await colour.call(guard, flaky(bad)) is bad

    run_both(scenario)


def test_options_are_checked():
    with pytest.raises(TypeError, match=r"Fallback: alternatives=\(\) is not allowed; give a value or a function"):
        Fallback()
    with pytest.raises(ValueError, match="Fallback: alternatives='first' is not allowed; give values only last"):
        Fallback("first", len)
    bad_types, bad_values = ("x", int, (OSError, "x")), ((), (OSError, 1))
    for value, kind in [(each, TypeError) for each in bad_types] + [(each, ValueError) for each in bad_values]:
        with pytest.raises(
            kind, match=f"^Fallback: on={re.escape(repr(value))} is not allowed; give an exception"
        ):
            Fallback(1, on=value)
    with pytest.raises(ValueError, match="Fallback: name='' is not allowed"):
        Fallback(1, name="")

    async def decide(error):
        return True

    with pytest.raises(TypeError, match=r"Fallback: on=.*a sync function"):
        Fallback(1, on=decide)


def test_the_answer_can_be_asked_for_by_hand():
    call = Call(len, ("abc",), {})
    assert Fallback(1).recover(call, OSError(), 0.0) is MISSING  # each alternative is a layer of its own
    assert Fallback(max).answer(max, call, OSError()) == "c"
    assert Fallback(max, on=KeyError).answer(max, call, OSError()) is MISSING


def test_a_fallback_shows_its_options_and_can_be_copied():
    policy = Fallback(len, None, on=OSError, name="f")
    assert repr(policy) == "Fallback(len, None, on=OSError, name='f')"
    copy = policy.fresh()
    assert (copy.alternatives, copy.on, copy.name) == ((len, None), OSError, "f")
    with pytest.raises(AttributeError):
        policy.statistics().used = 3


@pytest.mark.parametrize("policy", [Retry(on=OSError), RetryBudget()])
def test_a_policy_is_no_alternative(policy):
    with pytest.raises(TypeError, match=r"Fallback: alternatives=Retry.* give a value or a function; guard"):
        Fallback(policy)
