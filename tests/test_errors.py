import copy
import pickle
from http import HTTPStatus

import pybreaker
import pytest

from resilient import errors
from resilient.errors import (
    BulkheadFull,
    CircuitOpen,
    Draining,
    FailedResponse,
    FailedResult,
    RateLimited,
    Rejected,
    ResilientError,
    Shed,
    ThreadsExhausted,
    TimedOut,
)


class Response:
    """Can be pickled, and compared."""

    def __init__(self, status_code):
        self.status_code = status_code

    def __eq__(self, other):
        return vars(self) == vars(other)

    __hash__ = None


REFUSALS = [Rejected, CircuitOpen, RateLimited, BulkheadFull, Shed, Draining, ThreadsExhausted]
EXAMPLES = [
    *(cls("it is full", policy="orders", retry_after=after) for cls in REFUSALS for after in (None, 2.5)),
    TimedOut(policy="Timeout(2)", seconds=2.0),
    TimedOut(policy="edge"),
    FailedResult({"status": 503}),
    FailedResponse(Response(503)),
]


def test_the_tree():
    assert ResilientError.__bases__ == (Exception,)
    assert Rejected.__bases__ == TimedOut.__bases__[:1] == FailedResult.__bases__ == (ResilientError,)
    assert all(issubclass(cls, Rejected) for cls in REFUSALS)
    assert issubclass(CircuitOpen, pybreaker.CircuitBreakerError)
    assert issubclass(TimedOut, TimeoutError)
    assert not issubclass(TimedOut, Rejected)
    assert FailedResponse.__bases__ == (FailedResult,)


def test_the_tree_is_drawn():
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, ResilientError):
            assert f" {name} " in errors.__doc__, name


def test_messages():
    assert str(Rejected("it is full", policy="orders")) == "orders: it is full"
    assert str(RateLimited("no", policy="p", retry_after=1.23456)) == "p: no; retry after 1.23 s"
    assert str(TimedOut(policy="Timeout(2)", seconds=2.0)) == "Timeout(2): not done after 2 s"
    assert str(TimedOut(policy="edge")) == "edge: the deadline passed"
    assert str(FailedResult(503)) == "the result of type int counts as a failure"
    assert str(FailedResponse(Response(HTTPStatus.BAD_GATEWAY))) == "the response has status 502"


def test_what_they_carry():
    error = BulkheadFull("full", policy="p", retry_after=1.0)
    assert (error.reason, error.policy, error.retry_after) == ("full", "p", 1.0)
    assert Rejected("full", policy="p").retry_after is None
    timed_out = TimedOut(policy="p", seconds=3.0)
    assert (timed_out.policy, timed_out.seconds) == ("p", 3.0)
    assert FailedResult([1]).result == [1]
    response = Response(HTTPStatus.BAD_GATEWAY)
    assert FailedResponse(response).result is response
    assert (FailedResponse(response).status, type(FailedResponse(response).status)) == (502, int)


@pytest.mark.parametrize(
    "error", EXAMPLES, ids=[f"{type(each).__name__}{index}" for index, each in enumerate(EXAMPLES)]
)
@pytest.mark.parametrize(
    "remake",
    [copy.copy, copy.deepcopy, *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(6))],
    ids=["copy", "deepcopy", *(f"pickle{protocol}" for protocol in range(6))],
)
def test_copies(error, remake):
    error.add_note("a note")
    error.extra = 1
    other = remake(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert other.args == error.args
    assert vars(other) == vars(error)


def test_they_are_caught_as_what_they_are():
    with pytest.raises(pybreaker.CircuitBreakerError):
        raise CircuitOpen("open", policy="p")
    with pytest.raises(TimeoutError):
        raise TimedOut(policy="p")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (0.25, "0.25"), (4.2, "4.2"), (59.96, "60"), (3600, "3600"), (86399.7, "86400"), (1e-5, "0")],
)
def test_seconds_are_written_as_people_write_them(seconds, text):
    assert str(Rejected("why", policy="p", retry_after=seconds)) == f"p: why; retry after {text} s"
