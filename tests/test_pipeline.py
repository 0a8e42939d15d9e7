import copy

import pytest

from resilient import (
    Bulkhead,
    CircuitBreaker,
    Fallback,
    Pipeline,
    Policy,
    Rate,
    RateLimit,
    Retry,
    Timeout,
    testing,
)
from resilient.errors import FailedResult
from resilient.kinds import Scope


class Mark(Policy):
    """Writes down when a call goes in and out."""

    def __init__(self, sign, trace, *, name=None):
        super().__init__(name=name)
        self.sign = sign
        self.trace = trace

    def link(self, nxt, edge):
        def mark(call):
            self.trace.append(self.sign)
            try:
                return nxt(call)
            finally:
                self.trace.append(f"/{self.sign}")

        return mark

    def alink(self, nxt, edge):
        async def mark(call):
            self.trace.append(self.sign)
            try:
                return await nxt(call)
            finally:
                self.trace.append(f"/{self.sign}")

        return mark


async def afunction(value):
    return value


def marks():
    trace = []
    return trace, *(Mark(sign, trace) for sign in "abc")


@pytest.mark.parametrize(
    "compose",
    [
        Pipeline,
        lambda a, b, c: a | b | c,
        lambda a, b, c: a | (b | c),
        lambda a, b, c: Pipeline(a) | b | c,
        lambda a, b, c: Pipeline(Pipeline(), a, Pipeline(b, Pipeline(c))),
        lambda a, b, c: Pipeline(a, name="outer") | b | c,
    ],
    ids=["all", "or", "or-right", "one", "nested", "named"],
)
def test_the_first_policy_is_outermost(compose):
    trace, *policies = marks()
    pipeline = compose(*policies)
    assert isinstance(pipeline, Pipeline)
    assert pipeline.call(lambda value: value, 3) == 3
    assert trace == ["a", "b", "c", "/c", "/b", "/a"]
    trace.clear()
    assert testing.run(pipeline.acall, afunction, 4) == 4
    assert trace == ["a", "b", "c", "/c", "/b", "/a"]


def test_or_flattens_what_has_no_options():
    _, a, b, c = marks()
    assert (a | b | c).policies == (a, b, c)
    named = Pipeline(a, b, name="inner")
    assert (named | c).policies == (named, c)
    judging = Pipeline(a, failed=lambda _result: False)
    assert (judging | b).policies == (judging, b)


def test_or_refuses_what_is_no_policy():
    _, a, _, _ = marks()
    for left in (a, Pipeline(a)):
        with pytest.raises(TypeError, match="unsupported operand"):
            left | 3


def test_only_policies():
    with pytest.raises(TypeError, match="Pipeline: 3 is not a policy"):
        Pipeline(3)
    with pytest.raises(TypeError, match=r"write CircuitBreaker\(\) with parentheses"):
        Pipeline(CircuitBreaker)
    with pytest.raises(TypeError, match="Pipeline: failed=3 is not allowed; give a function"):
        Pipeline(failed=3)


def test_an_empty_pipeline_only_calls():
    pipeline = Pipeline()
    assert pipeline.call(divmod, 7, 2) == (3, 1)
    assert testing.run(pipeline.acall, afunction, 5) == 5
    assert pipeline.statistics() == {}
    assert list(pipeline.walk()) == [pipeline]
    with pipeline:
        pass

    @pipeline
    def function():
        return 1

    assert function() == 1


def test_walk_goes_through_everything():
    _, a, b, c = marks()
    inner = Pipeline(b, c)
    outer = Pipeline(a, inner)
    assert list(outer.walk()) == [outer, a, inner, b, c]


def test_a_failed_result_that_nobody_handles_comes_back_as_it_is():
    answers = [503, 503, 200]
    pipeline = Pipeline(Retry(3, on=OSError, wait=1), failed=lambda status: status >= 500)
    with testing.virtual_time() as clock:
        assert pipeline.call(lambda: answers.pop(0)) == 200
        assert clock.now() == 2
        assert pipeline.call(lambda: 503) == 503
        assert clock.now() == 4

    async def down():
        return 503

    assert testing.run(pipeline.acall, down) == 503


def test_policies_see_a_failed_result_as_an_error():
    seen = []
    pipeline = Pipeline(
        Fallback(lambda: "other", on=lambda error: seen.append(error) or True), failed=lambda r: r == 1
    )
    assert pipeline.call(lambda: 1) == "other"
    assert isinstance(seen[0], FailedResult)
    assert seen[0].result == 1
    assert pipeline.call(lambda: 2) == 2


def test_failed_of_an_inner_pipeline_counts_for_all():
    inner = Pipeline(failed=lambda result: result == "bad")
    outer = Pipeline(Fallback("good"), inner)
    assert outer.call(lambda: "bad") == "good"
    assert inner.call(lambda: "bad") == "bad"


def test_an_error_in_failed_is_raised():
    with pytest.raises(ZeroDivisionError):
        Pipeline(failed=lambda _result: 1 / 0).call(lambda: 1)


def test_statistics_by_label():
    shared = Bulkhead(1)
    pipeline = Pipeline(Timeout(2), shared, Bulkhead(1), Bulkhead(2, name="pool"), Pipeline(Bulkhead(1)))
    assert set(pipeline.statistics()) == {"Bulkhead(1)", "Bulkhead(1) #2", "pool", "Bulkhead(1) #3"}
    with shared:
        assert pipeline.statistics()["Bulkhead(1)"].in_use == 1
        assert pipeline.statistics()["Bulkhead(1) #2"].in_use == 0


def test_a_copy_keeps_order_options_and_judge():
    pipeline = Pipeline(Fallback("good"), RateLimit(Rate(5)), failed=is_bad, name="p")
    other = copy.deepcopy(pipeline)
    assert repr(other) == repr(pipeline)
    assert other.call(lambda: "bad") == "good"


def is_bad(result):
    return result == "bad"


def test_policies_of_a_copy():
    policy = Bulkhead(1)
    assert isinstance(policy | Timeout(1), Pipeline)
    assert issubclass(Timeout, Scope)


def test_a_block_enters_in_order_and_leaves_in_reverse():
    outer, inner = Bulkhead(2), Bulkhead(1)
    pipeline = Pipeline(outer, inner)
    with pipeline:
        assert (outer.statistics().in_use, inner.statistics().in_use) == (1, 1)
        with pytest.raises(Exception, match="permits are taken"), pipeline:
            pass
        assert (outer.statistics().in_use, inner.statistics().in_use) == (1, 1)
    assert (outer.statistics().in_use, inner.statistics().in_use) == (0, 0)


def test_a_pipeline_with_a_loop_refuses_a_block_before_it_enters_anything():
    outer = Bulkhead(2)
    pipeline = Pipeline(outer, Retry(on=OSError))
    with pytest.raises(TypeError, match="Retry cannot guard a `with` block"), pipeline:
        pass
    assert outer.statistics().in_use == 0

    async def block():
        async with pipeline:
            pass

    with pytest.raises(TypeError, match="Retry cannot guard a `with` block"):
        testing.run(block)
