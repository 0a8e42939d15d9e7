import asyncio
import contextvars

import anyio
import pytest

from resilient import (
    Bulkhead,
    BulkheadFull,
    Cache,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Keyed,
    Pipeline,
    RateLimit,
    RateLimited,
    Retry,
    TimedOut,
    Timeout,
    deadline,
    runtime,
)
from resilient.blocks import _entered
from resilient.testing import capture_events, run, virtual_time

BACKENDS = ("asyncio", "trio")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# -- gates ------------------------------------------------------------------------------------------------------


def test_a_bulkhead_guards_a_block():
    bulkhead = Bulkhead(1)
    with bulkhead as entered:
        assert entered is bulkhead
        assert bulkhead.statistics().in_use == 1
        with pytest.raises(BulkheadFull):
            bulkhead.call(lambda: 1)
    assert bulkhead.statistics().in_use == 0
    with pytest.raises(KeyError), bulkhead:
        raise KeyError
    assert bulkhead.statistics().in_use == 0


def test_a_bulkhead_guards_an_async_block(backend):
    async def main():
        bulkhead = Bulkhead(1)
        async with bulkhead as entered:
            assert entered is bulkhead
            assert bulkhead.statistics().in_use == 1
            with pytest.raises(BulkheadFull):
                await bulkhead.acall(anyio.sleep, 0)
        assert bulkhead.statistics().in_use == 0
        with pytest.raises(KeyError):
            async with bulkhead:
                raise KeyError
        assert bulkhead.statistics().in_use == 0

    run(main, backend=backend)


def test_a_block_waits_in_the_queue():
    with virtual_time() as clock:
        bulkhead = Bulkhead(1, queue=1)
        ends = []

        def block():
            with bulkhead:
                clock.sleep(5)
                ends.append(clock.now())

        clock.run_threads(block, block)
        assert ends == [5, 10]
        assert bulkhead.statistics().in_use == 0


def test_an_async_block_waits_in_the_queue(backend):
    async def main():
        bulkhead = Bulkhead(1, queue=1)
        ends = []

        async def block():
            async with bulkhead:
                await anyio.sleep(5)
                ends.append(runtime.now() - start)

        start = runtime.now()
        async with anyio.create_task_group() as group:
            group.start_soon(block)
            group.start_soon(block)
        assert bulkhead.statistics().in_use == 0
        return ends

    assert run(main, backend=backend) == [5, 10]


def test_a_cancelled_block_gives_back_what_it_holds(backend):
    async def main():
        bulkhead = Bulkhead(1, queue=1)

        async def block():
            async with bulkhead:
                await anyio.sleep(100)

        async with anyio.create_task_group() as group:
            group.start_soon(block)
            group.start_soon(block)
            await anyio.sleep(1)
            assert bulkhead.statistics().queued == 1
            group.cancel_scope.cancel()
        return bulkhead.statistics()

    statistics = run(main, backend=backend)
    assert (statistics.in_use, statistics.queued) == (0, 0)


def test_a_breaker_counts_what_happens_in_a_block():
    with virtual_time():
        breaker = CircuitBreaker(consecutive=2)
        with breaker:
            pass
        for error in (KeyError, KeyboardInterrupt, KeyError):  # an interrupt says nothing
            with pytest.raises(error), breaker:
                raise error
        assert breaker.current_state == "open"
        entered = False
        with pytest.raises(CircuitOpen), breaker:
            entered = True
        assert not entered


def test_a_slow_block_is_a_slow_call():
    with virtual_time() as clock:
        breaker = CircuitBreaker(minimum_calls=2, slow=5)
        for _ in range(2):
            with breaker:
                clock.sleep(6)
        assert breaker.statistics().slow == 2 or breaker.current_state == "open"
        assert breaker.current_state == "open"


def test_a_slow_async_block_is_a_slow_call(backend):
    async def main():
        breaker = CircuitBreaker(minimum_calls=2, slow=5)
        for _ in range(2):
            async with breaker:
                await anyio.sleep(6)
        return breaker.current_state

    assert run(main, backend=backend) == "open"


def test_a_rate_limit_guards_blocks():
    with virtual_time() as clock:
        limit = RateLimit("1/10s", wait=10)
        for _ in range(2):
            with limit:
                pass
        assert clock.now() == 10
        strict = RateLimit("1/10s")
        with strict:
            pass
        with pytest.raises(RateLimited), strict:
            pass


def test_a_rate_limit_guards_async_blocks(backend):
    async def main():
        limit = RateLimit("1/10s", wait=10)
        start = runtime.now()
        for _ in range(2):
            async with limit:
                pass
        return runtime.now() - start

    assert run(main, backend=backend) == 10


@pytest.mark.parametrize("options", [{"key": lambda url: url}, {"cost": lambda url: 1}])
def test_a_block_has_no_arguments_to_look_at(options):
    option = next(iter(options))
    message = f"{option}= is a function of the call's arguments, and a block has none"
    with pytest.raises(TypeError, match=message), RateLimit("1/s", **options):
        pass


# -- nesting ----------------------------------------------------------------------------------------------------


def test_the_same_policy_can_be_entered_again():
    bulkhead = Bulkhead(3)
    with bulkhead, bulkhead:
        with bulkhead:
            assert bulkhead.statistics().in_use == 3
            with pytest.raises(BulkheadFull), bulkhead:
                pass
        assert bulkhead.statistics().in_use == 2
    assert bulkhead.statistics().in_use == 0
    assert _entered.get() == ()


def test_the_same_timeout_can_be_entered_again(backend):
    async def main():
        policy = Timeout(5)
        async with policy:
            await anyio.sleep(1)
            async with policy:  # its own deadline would be later than that of the first
                assert deadline.remaining() == pytest.approx(4)
                await anyio.sleep(1)
        with pytest.raises(TimedOut):
            async with policy, policy:
                await anyio.sleep(100)
        assert deadline.current() is None

    run(main, backend=backend)


def test_blocks_may_be_left_in_another_order():
    first, second = Bulkhead(1), Bulkhead(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (first.statistics().in_use, second.statistics().in_use) == (0, 1)
    second.__exit__(None, None, None)
    assert second.statistics().in_use == 0


def test_each_task_has_a_block_of_its_own(backend):
    async def main():
        bulkhead = Bulkhead(5)
        peak = 0

        async def one(seconds):
            nonlocal peak
            async with bulkhead:
                peak = max(peak, bulkhead.statistics().in_use)
                await anyio.sleep(seconds)

        async with bulkhead, anyio.create_task_group() as group:
            for seconds in (3, 1, 2, 4):
                group.start_soon(one, seconds)
        assert bulkhead.statistics().in_use == 0
        return peak

    assert run(main, backend=backend) == 5


def test_each_thread_has_a_block_of_its_own():
    with virtual_time() as clock:
        bulkhead = Bulkhead(4)

        def one(seconds):
            def block():
                with bulkhead:
                    clock.sleep(seconds)
                    return bulkhead.statistics().in_use

            return block

        assert clock.run_threads(*map(one, (4, 1, 3, 2))) == [1, 4, 2, 3]
        assert bulkhead.statistics().in_use == 0


def test_a_block_cannot_be_left_where_it_was_not_entered():
    bulkhead = Bulkhead(1, name="b")
    context = contextvars.copy_context()
    bulkhead.__enter__()
    with pytest.raises(RuntimeError, match="was not entered in this task or thread, so it cannot be left here"):
        context.run(bulkhead.__exit__, None, None, None)
    assert bulkhead.statistics().in_use == 1
    bulkhead.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="was not entered"):
        bulkhead.__exit__(None, None, None)
    assert bulkhead.statistics().in_use == 0


def test_an_async_block_cannot_be_left_in_another_task(backend):
    async def main():
        bulkhead = Bulkhead(1)
        left = anyio.Event()
        messages = []

        async def other():
            await left.wait()
            try:
                await bulkhead.__aexit__(None, None, None)
            except RuntimeError as error:
                messages.append(str(error))

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            await bulkhead.__aenter__()
            left.set()
        assert bulkhead.statistics().in_use == 1
        await bulkhead.__aexit__(None, None, None)
        assert bulkhead.statistics().in_use == 0
        return messages

    (message,) = run(main, backend=backend)
    assert "was not entered in this task or thread" in message


def test_leaving_one_policy_does_not_leave_another():
    first, second = Bulkhead(1), Bulkhead(1)
    with first, pytest.raises(RuntimeError, match="was not entered"):
        second.__exit__(None, None, None)
    assert first.statistics().in_use == 0


# -- pipelines --------------------------------------------------------------------------------------------------


def test_a_pipeline_of_gates_and_scopes_guards_a_block():
    with virtual_time() as clock:
        outer, inner = Bulkhead(1), Bulkhead(1)
        pipeline = Pipeline(outer, Timeout(5, interrupt=False), Pipeline(inner), CircuitBreaker())
        with pipeline as entered:
            assert entered is pipeline
            assert (outer.statistics().in_use, inner.statistics().in_use) == (1, 1)
            assert deadline.remaining() == 5
            clock.sleep(1)
        assert (outer.statistics().in_use, inner.statistics().in_use) == (0, 0)
        assert deadline.current() is None
        with pytest.raises(KeyError), pipeline:
            raise KeyError
        assert (outer.statistics().in_use, inner.statistics().in_use) == (0, 0)


def test_a_pipeline_guards_an_async_block(backend):
    async def main():
        outer, inner = Bulkhead(1), Bulkhead(1)
        pipeline = outer | Timeout(5) | Pipeline(inner)
        async with pipeline as entered:
            assert entered is pipeline
            assert (outer.statistics().in_use, inner.statistics().in_use) == (1, 1)
        with pytest.raises(TimedOut):
            async with pipeline:
                await anyio.sleep(100)
        assert (outer.statistics().in_use, inner.statistics().in_use) == (0, 0)

    run(main, backend=backend)


def test_a_refusal_in_the_middle_of_a_pipeline_gives_back_what_was_taken(backend):
    outer, closed, inner = Bulkhead(1), CircuitBreaker(), Bulkhead(1)
    closed.isolate()
    pipeline = Pipeline(outer, closed, inner)

    async def main():
        with pytest.raises(CircuitOpen):
            async with pipeline:
                raise AssertionError
        assert (outer.statistics().in_use, inner.statistics().in_use) == (0, 0)

    with pytest.raises(CircuitOpen), pipeline:
        raise AssertionError
    assert (outer.statistics().in_use, inner.statistics().in_use) == (0, 0)
    run(main, backend=backend)


def test_an_empty_pipeline_guards_nothing(backend):
    async def main():
        async with Pipeline():
            return 1

    with Pipeline():
        assert run(main, backend=backend) == 1


# -- refused ----------------------------------------------------------------------------------------------------

REFUSED = {
    "cache": lambda: Cache(1),
    "fallback": lambda: Fallback(1),
    "retry": lambda: Retry(on=OSError),
    "keyed": lambda: Keyed(CircuitBreaker),
    "pipeline": lambda: Pipeline(Bulkhead(1), Retry(on=OSError)),
    "nested": lambda: Pipeline(Bulkhead(1), Pipeline(CircuitBreaker(), Cache(1))),
    "named": lambda: Pipeline(Bulkhead(1), Pipeline(Fallback(1), name="inner"), name="outer"),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_may_skip_or_repeat_a_block_is_refused(make, backend):
    policy = make()
    message = r"cannot guard a `with` block.*(decorate|Decorate) a function"

    async def main():
        with pytest.raises(TypeError, match=message):
            async with policy:
                raise AssertionError
        with pytest.raises(TypeError, match=message):
            policy.ablock()

    with pytest.raises(TypeError, match=message), policy:
        raise AssertionError
    with pytest.raises(TypeError, match=message):
        policy.block()
    run(main, backend=backend)
    assert _entered.get() == ()


def test_the_refusal_of_a_retry_says_how_a_block_is_made_again():
    with pytest.raises(TypeError, match=r"`for attempt in retry: with attempt: \.\.\.`"), Retry(on=OSError):
        pass


@pytest.mark.parametrize(
    "refused",
    [
        lambda: Retry(on=OSError),
        lambda: Pipeline(Retry(on=OSError)),
        lambda: Cache(1),
        lambda: Timeout(5),
        lambda: Pipeline(Pipeline(Timeout(5))),
    ],
    ids=range(5),
)
def test_nothing_is_entered_when_a_sync_block_is_refused(refused):
    with virtual_time():
        limit, breaker = RateLimit("1/hour"), CircuitBreaker(consecutive=1)
        with capture_events() as seen, pytest.raises(TypeError), Pipeline(limit, breaker, refused()):
            raise AssertionError
        assert seen == []
        assert breaker.current_state == "closed"
        with limit:  # nothing was taken from it
            pass


@pytest.mark.parametrize(
    "refused", [lambda: Retry(on=OSError), lambda: Pipeline(Retry(on=OSError)), lambda: Fallback(1)], ids=range(3)
)
def test_nothing_is_entered_when_an_async_block_is_refused(refused, backend):
    async def main():
        limit = RateLimit("1/hour")
        with pytest.raises(TypeError):
            async with Pipeline(limit, refused()):
                raise AssertionError
        async with limit:
            return True

    assert run(main, backend=backend)


def test_a_block_does_not_swallow_errors_and_cancellation():
    async def main():
        async with Bulkhead(1):
            await asyncio.sleep(100)

    async def cancelling():
        task = asyncio.create_task(main())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelled()

    assert run(cancelling)
    for error in (StopIteration, GeneratorExit, KeyboardInterrupt):
        with pytest.raises(error), Bulkhead(1):
            raise error
