"""Policies that guard a function alone take a shorter way; it has to lead to the same place."""

import threading

import pytest

from resilient import Cache, Fallback, Pipeline, RateLimit, Rejected, Retry, TimedOut, Timeout, runtime
from resilient.call import Call
from resilient.edge import FUNCTION
from resilient.kinds import MISSING, Gate, Race, Value
from resilient.testing import capture_events, flaky, run, run_both, virtual_time
from resilient.ticket import Ticket


class Interrupted:
    """A ticket's wait that ends in Ctrl-C."""

    def __call__(self, ticket):
        raise KeyboardInterrupt


@pytest.fixture
def interrupted():
    with virtual_time():
        previous = runtime.install(runtime.Runtime(now=runtime.now, wait=Interrupted()))
        yield
        runtime.install(previous)


@pytest.mark.parametrize("wrap", [lambda policy: policy, Pipeline], ids=["alone", "in a pipeline"])
def test_a_lone_rate_limit_waits_refuses_and_calls_with_the_arguments(wrap):
    limit = RateLimit("1/s", wait=1)

    @wrap(limit)
    def function(first, *, second):
        return first, second

    with virtual_time() as clock:
        assert function(1, second=2) == (1, 2)
        assert function(3, second=4) == (3, 4)
        assert clock.now() == 1
        slow = wrap(RateLimit("1/3s", wait=1))(lambda: "done")
        assert slow() == "done"
        with pytest.raises(Rejected, match="retry after 3 s"):
            slow()


@pytest.mark.parametrize("policy", [RateLimit("9/s"), Retry(on=OSError)])
def test_a_coroutine_from_a_sync_function_is_refused(policy):
    async def coroutine():
        pass

    @policy
    def looks_sync():
        return coroutine()

    with pytest.raises(TypeError, match="returned a coroutine"):
        looks_sync()


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_while_a_lone_rate_limit_waits_gives_the_turn_back():
    limit = RateLimit("1/s", wait=5)
    guarded = limit(flaky(1).__call__)
    plain = limit(lambda: 1)
    assert plain() == 1
    for function in (plain, guarded):
        with pytest.raises(KeyboardInterrupt):
            function()
    assert limit.admit(None, 1.0) is None


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_while_waiting_for_another_call_leaves_its_flight():
    cache = Cache(5)
    started = []

    def fetch():
        started.append(1)
        if len(started) == 1:
            with pytest.raises(KeyboardInterrupt):
                guarded()  # waits for the flight that it is itself: only an interrupt can end that
        return "result"

    guarded = cache(fetch)
    assert guarded() == "result"
    assert guarded() == "result"
    assert started == [1]


class Turnstile(Gate):
    """Lets everybody wait a second, and counts who is in."""

    def __init__(self):
        super().__init__()
        self.durations = []

    def admit(self, call, now):
        return Ticket(ready_at=now + 1)

    def settle(self, call, error, started, now):
        self.durations.append(now - started)


def test_a_gate_that_lets_calls_wait_measures_them_from_when_they_start():
    async def scenario(colour):
        gate = Turnstile()

        async def takes_two():
            await colour.sleep(2)

        await colour.call(gate, takes_two)
        return gate.durations, colour.now()

    run_both(scenario)
    with virtual_time():
        gate = Turnstile()
        gate.call(int)
        assert gate.durations == [0]


def test_a_value_offers_nothing_unless_it_says_so():
    assert Fallback(1).lookup(Call(int, (), {}), 0.0) is MISSING


class Once(Race):
    """Never starts a second copy."""

    def next_start(self, call, started):
        return None


def test_a_race_whose_wait_ends_a_little_early_looks_at_the_deadline_again():
    times = iter([4.9, 5.0])  # the wait ends too soon, then on time

    with virtual_time() as clock:
        now = 0.0
        ended = threading.Event()

        def wait(ticket):
            nonlocal now
            now = next(times)
            return False

        previous = runtime.install(runtime.Runtime(now=lambda: now, wait=wait, start_thread=clock.start_thread))
        guarded = Pipeline(Timeout(5, interrupt=False), Once())(ended.wait)
        with pytest.raises(TimedOut):
            guarded()
        runtime.install(previous)
        ended.set()
    assert next(times, None) is None


class Known(Value):
    """Knows some answers by heart and learns nothing."""

    def lookup(self, call, now):
        return {"two": 2}.get(call.args[0], MISSING)

    def recover(self, call, error, now):
        return MISSING


def test_a_value_that_stores_nothing():
    async def scenario(colour):
        known = Known()
        return [await colour.call(known, len, word) for word in ("two", "three")]

    run_both(scenario)
    assert Known().call(len, "three") == 5
    assert Known().call(len, "two") == 2


def test_a_lone_rate_limit_whose_number_was_lost_does_not_begin_anew(monkeypatch):
    monkeypatch.setattr("resilient.baton.LOST_AFTER", 0.0)
    limit = RateLimit("5/s")
    with virtual_time() as clock:
        limit._take()  # as if an interrupt had come just after
        with pytest.raises(Rejected) as refused:
            limit(lambda: 1)()
        clock.sleep(refused.value.retry_after)
        assert limit(lambda: 1)() == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_timeout_alone_and_in_a_pipeline(backend):
    async def main():
        for policy in (Timeout(1), Pipeline(Timeout(1))):
            with pytest.raises(TimeoutError):
                await policy.acall(runtime.asleep, 5)
        return runtime.now()

    assert run(main, backend=backend) == 2


class Watching(Gate):
    """Lets every call pass, and notes what it was told at its end."""

    def __init__(self):
        super().__init__()
        self.ended = []

    def admit(self, call, now):
        return None

    def settle(self, call, error, started, now):
        self.ended.append((call, call.attempt, started))


def test_an_abandoned_thread_keeps_a_call_of_its_own():
    with virtual_time() as clock:
        watching = Watching()
        guard = Pipeline(Retry(2, on=TimedOut, wait=0), Timeout(1), watching)
        durations = iter([5, 0.5])
        guard.call(lambda: clock.sleep(next(durations)))
        clock.sleep(10)
        (retried, *second), (abandoned, *first) = watching.ended
    assert retried is not abandoned
    assert second == [2, 1.0]
    assert first == [1, 0.0]  # although the next attempt has begun since


def test_a_deadline_that_two_waits_run_into_is_told_once():
    with virtual_time() as clock, capture_events() as seen:
        cache = Cache(60)
        slow = Pipeline(Timeout(1), cache)

        def fetch():
            clock.sleep(5)

        def impatient():
            with pytest.raises(TimedOut):
                slow.call(fetch)

        clock.run_threads(lambda: cache.call(fetch), impatient)
    assert [event.name for event in seen if event.name == "timeout.expired"] == ["timeout.expired"]


def test_linked_closures_do_not_share_what_the_interpreter_learns():
    chains = [policy.chain(FUNCTION) for policy in (Retry(on=OSError), Retry(on=KeyError))]
    chains += [Pipeline(Retry(on=OSError)).chain(FUNCTION)]
    wrappers = [Pipeline()(lambda: 1), Pipeline()(lambda: 2)]
    for closures in (chains, wrappers):
        assert len({id(closure.__code__) for closure in closures}) == len(closures)
        assert len({closure.__code__.co_code for closure in closures}) == 1
