import asyncio

import pytest

from resilient import FailedResult, Fallback, Pipeline, RateLimited, Retry, testing
from resilient.call import Call, is_block
from resilient.edge import FUNCTION, Edge, error_of


class Status(Edge):
    """Knows that a number from 500 is a failure."""

    knows_failures = True

    def __init__(self):
        self.discarded = []

    def failed(self, result):
        return FailedResult(result) if result >= 500 else None

    def transient(self, error):
        return super().transient(error) or isinstance(error, ConnectionError)

    def repeatable(self, call):
        return call.args != ("POST",)

    def discard(self, outcome):
        self.discarded.append(outcome)


def test_what_a_plain_function_knows():
    call = Call(print, (), {})
    assert FUNCTION.failed(500) is None
    assert FUNCTION.transient(FailedResult(1))
    assert not FUNCTION.transient(OSError())
    assert FUNCTION.repeatable(call)
    assert FUNCTION.key(call) is None
    assert FUNCTION.discard(1) is None
    assert not FUNCTION.knows_failures


def test_retry_after_of_an_error():
    assert FUNCTION.retry_after(OSError()) is None
    assert FUNCTION.retry_after(RateLimited("no", policy="p", retry_after=2)) == 2.0
    error = OSError()
    error.retry_after = "tomorrow"
    assert FUNCTION.retry_after(error) is None


def test_the_end_makes_the_call():
    def function(*args, **kwargs):
        return args, kwargs

    assert FUNCTION.end()(Call(function, (1,), {"a": 2})) == ((1,), {"a": 2})

    async def afunction(*args):
        return args

    async def main():
        return await FUNCTION.aend()(Call(afunction, (1,), {}))

    assert asyncio.run(main()) == (1,)


def test_a_coroutine_from_a_sync_call_is_refused():
    async def afunction():
        pass

    with pytest.raises(TypeError, match=r"returned a coroutine, which no policy would guard; .* use acall\(\)"):
        Pipeline().call(afunction)


def test_the_first_judge_that_sees_an_error():
    first, second = ValueError(), OSError()
    judges = [
        lambda _call, result: first if result > 2 else None,
        lambda _call, result: second if result > 1 else None,
    ]
    call = Call(print, (), {})
    assert error_of(judges, call, 3) is first
    assert error_of(judges, call, 2) is second
    assert error_of(judges, call, 1) is None
    assert error_of([], call, 1) is None


def scripted(edge, policy, asynchronous, *outcomes):
    flaky = testing.flaky(*outcomes)
    if not asynchronous:
        return lambda *args: policy.chain(edge)(Call(flaky, args, {}))

    async def main(*args):
        return await policy.achain(edge)(Call(flaky.asynchronous, args, {}))

    return lambda *args: testing.run(main, *args)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_edge_that_knows_its_failures(asynchronous):
    edge = Status()
    with testing.virtual_time():
        call = scripted(edge, Retry(3, wait=0), asynchronous, 503, ConnectionError, 200)
        assert call("GET") == 200
        assert [type(each) for each in edge.discarded] == [FailedResult, ConnectionError]
        assert scripted(edge, Retry(3, wait=0), asynchronous, 503, 200)("POST") == 503
        assert scripted(edge, Retry(2, wait=0), asynchronous, 503)("GET") == 503
        assert scripted(edge, Pipeline(Fallback(0)), asynchronous, 503)("GET") == 0
        assert scripted(edge, Pipeline(), asynchronous, 200)("GET") == 200
        with pytest.raises(ZeroDivisionError):
            scripted(edge, Retry(3, wait=0), asynchronous, ZeroDivisionError)("GET")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_pipeline_and_edge_judge_together(asynchronous):
    policy = Pipeline(Fallback("fallback"), failed=lambda result: result == 204)
    for result, expected in ((204, "fallback"), (503, "fallback"), (200, 200)):
        assert scripted(Status(), policy, asynchronous, result)("GET") == expected


def test_blocks():
    assert is_block(Call.of_block())
    assert Call.of_block().function() is None
    assert not is_block(Call(print, (), {}))


def test_a_copy_of_a_call():
    call = Call(print, (1,), {"a": 2})
    call.attempt = 3
    other = call.copy()
    assert (other.function, other.args, other.kwargs, other.attempt) == (print, (1,), {"a": 2}, 1)
