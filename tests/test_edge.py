import asyncio
from unittest.mock import Mock

import pytest

from resilient import FailedResponse, FailedResult, Fallback, Pipeline, RateLimited, Retry, TimedOut, testing
from resilient.call import Call, is_block
from resilient.edge import FUNCTION, Edge, error_of
from resilient.http.headers import Quota


class Status(Edge):
    """Knows that a number from 500 is a failure."""

    knows_failures = True

    def __init__(self):
        self.discarded = []

    def failed(self, result):
        return FailedResult(result) if result >= 500 else None

    def transient(self, error):
        return super().transient(error) or isinstance(error, ConnectionError)

    def repeatable(self, call, error=None):
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
    assert FUNCTION.timed_out(TimedOut(policy="p"))
    assert not FUNCTION.timed_out(OSError())
    assert FUNCTION.blames(OSError())
    assert FUNCTION.released("result")
    assert FUNCTION.when_released("result", None) is None
    flags = ("knows_failures", "partitions", "keeps_deadlines", "streams", "judges", "cache")
    assert not any(getattr(FUNCTION, flag) for flag in flags)


def test_a_call_knows_its_edge():
    assert Call(print, (), {}).edge is FUNCTION
    assert Call.of_block().edge is FUNCTION
    assert Call(print, (), {}).copy().edge is FUNCTION


def test_an_async_chain_releases_as_a_sync_one_does_unless_the_edge_says_otherwise():
    edge = Status()

    async def main():
        await edge.adiscard("outcome")

    testing.run(main)
    assert edge.discarded == ["outcome"]


def test_retry_after_of_an_error():
    assert FUNCTION.retry_after(OSError()) is None
    assert FUNCTION.retry_after(RateLimited("no", policy="p", retry_after=2)) == 2.0
    error = OSError()
    error.retry_after = "tomorrow"
    assert FUNCTION.retry_after(error) is None


class Response:
    """Whatever has these two attributes is a response."""

    def __init__(self, status_code=200, headers=()):
        self.status_code = status_code
        self.headers = headers


class StatusError(Exception):
    """As the errors of httpx, requests and of most SDKs."""

    def __init__(self, response):
        super().__init__("bad status")
        self.response = response


HEADERS = {
    "mapping": {"retry-after": "7"},
    "pairs": (("Retry-After", "7"),),
    "bytes": [(b"Retry-After", b"7")],
    "raw": type("Headers", (dict,), {"raw": [(b"Retry-After", b"7")]})(),
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("kind", [FailedResponse, StatusError])
def test_a_response_says_when_to_come_back(kind, headers):
    assert FUNCTION.retry_after(kind(Response(503, headers))) == 7.0
    assert FUNCTION.retry_after(kind(Response(503, {"Other": "7"}))) is None


def test_a_failed_result_that_is_no_response_says_nothing():
    assert FUNCTION.retry_after(FailedResult(Response(503, {"Retry-After": "7"}))) is None


def test_what_the_error_itself_says_comes_first():
    error = StatusError(Response(503, {"Retry-After": "7"}))
    error.retry_after = 3
    assert FUNCTION.retry_after(error) == 3.0
    error.retry_after = "soon"
    assert FUNCTION.retry_after(error) == 7.0


class Half:
    """Has headers and no status."""

    headers = {"Retry-After": "7"}  # noqa: RUF012 - never changed


@pytest.mark.parametrize(
    "response",
    [
        None,
        "text",
        Half(),
        Response(None, {"Retry-After": "7"}),
        Response("503", {"Retry-After": "7"}),
        Response(503, None),
        Mock(status_code=429),
    ],
    ids=["none", "text", "half", "status none", "status text", "headers none", "mock"],
)
def test_what_only_looks_like_a_response_is_none(response):
    """An odd attribute of somebody's error or result must not hide that error or result."""
    assert FUNCTION.retry_after(StatusError(response)) is None
    assert FUNCTION.quota(response) is None


def test_the_quota_of_a_response():
    fields = {"X-RateLimit-Limit": "100", "X-RateLimit-Remaining": "9", "X-RateLimit-Reset": "30"}
    assert FUNCTION.quota(Response(200, fields)) == Quota(100, 9, 30.0)
    assert FUNCTION.quota(Response(200, {})) is None
    assert FUNCTION.quota(Response(200, {"Retry-After": "7"})) is None, "patience, no limit"
    assert FUNCTION.quota(Response(429, {"Retry-After": "7"})) == Quota(None, 0, 7.0)
    assert FUNCTION.quota(Response(429, {"Retry-After": "7", **fields})) == Quota(None, 0, 7.0)
    assert FUNCTION.quota(Response(429, fields)) == Quota(100, 9, 30.0)
    assert FUNCTION.quota(Response(429, {})) is None
    assert FUNCTION.quota(Response(503, {"Retry-After": "7"})) is None, "that may have any reason"


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


def test_every_judge_is_asked_as_some_learn_from_what_they_see():
    class Falsy(Exception):
        def __bool__(self):
            return False

    seen, first = [], Falsy()
    judges = [lambda _call, result: first, lambda _call, result: seen.append(result) or OSError()]
    assert error_of(judges, Call(print, (), {}), 1) is first
    assert seen == [1]


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


class Raising(Status):
    """Raises the errors of failing results itself, as the edges of HTTP do."""

    judges = True

    def end(self):
        def end(call):
            result = call.function(*call.args)
            error = self.failed(result)
            if error is not None:
                raise error
            return result

        return end

    def aend(self):
        async def end(call):
            result = await call.function(*call.args)
            error = self.failed(result)
            if error is not None:
                raise error
            return result

        return end


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_an_edge_that_judges_leaves_it_to_its_caller_to_turn_failures_back(asynchronous):
    edge = Raising()
    edge.failed = counted = testing.flaky(FailedResult(503), None)
    with pytest.raises(FailedResult):
        scripted(edge, Pipeline(), asynchronous, 503)("GET")
    assert scripted(edge, Pipeline(), asynchronous, 200)("GET") == 200
    assert len(counted.calls) == 2, "nobody else asks it"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_judges_see_what_the_edge_calls_a_failure_too(asynchronous):
    seen = []
    policy = Pipeline(failed=seen.append)
    with pytest.raises(FailedResult):
        scripted(Raising(), policy, asynchronous, 503)("GET")
    assert scripted(Raising(), policy, asynchronous, 200)("GET") == 200
    with pytest.raises(OSError):  # noqa: PT011 - a bare one
        scripted(Raising(), policy, asynchronous, OSError)("GET")
    assert seen == [503, 200]


def test_blocks():
    assert is_block(Call.of_block())
    assert Call.of_block().function() is None
    assert not is_block(Call(print, (), {}))


def test_a_copy_of_a_call():
    call = Call(print, (1,), {"a": 2})
    call.attempt = 3
    other = call.copy()
    assert (other.function, other.args, other.kwargs, other.attempt) == (print, (1,), {"a": 2}, 1)
