"""Every stateful policy in 10^5 interleavings, with cancellation at any await.

A scenario takes a policy and returns the set-up of one run. The last part breaks policies on purpose and
checks that a few hundred runs find it.
"""

import asyncio
import random
import re
from asyncio import CancelledError

import pytest
from interleave import explore

from resilient import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    Keyed,
    RateLimit,
    Rejected,
    Retry,
    RetryBudget,
    TimedOut,
    Timeout,
    runtime,
    testing,
)
from resilient.call import Call
from resilient.policies.circuit_breaker import State

RUNS = 100_000
FEW = 500


def linked(policy, function):
    """Guard an async function with one frame less than the decorator has."""
    chain = policy.achain_of_functions
    return lambda *args: chain(Call(function, args, {}))


# -- Bulkhead -------------------------------------------------------------------------------------------------


def bulkhead_scenario(policy):
    """Callers of one bulkhead: never over its limit, first come first served, no permit lost."""
    limit = policy.limit

    async def hold(world, inside, busy):
        # until is 0 as long as a coroutine has never slept, so this one came in without waiting
        assert world.running.until or not world.overtaken(), "a newcomer overtook somebody who waits"
        inside[0] += 1
        assert inside[0] <= limit, f"{inside[0]} calls at once, limit {limit}"
        try:
            if busy:
                await world.asleep(1.0)
            else:
                await world.pause()
        finally:
            inside[0] -= 1

    guarded = linked(policy, hold)

    def setup(world):
        inside = [0]

        for index in range(3):
            world.spawn(guarded(world, inside, index & 1), Rejected)

        def check():
            order = [world.waited.index(ticket) for ticket in world.woken]
            assert order == sorted(order), f"permits were granted in the order {order}"
            assert len(policy._permits) == limit, f"{limit - len(policy._permits)} permits are lost"
            assert not policy._waiting, "tickets are left in the queue"

        return check

    return setup


def test_bulkhead():
    assert explore(bulkhead_scenario(Bulkhead(1, queue=2, wait=1.5)), runs=RUNS // 2) == RUNS // 2
    assert explore(bulkhead_scenario(Bulkhead(2, queue=1)), runs=RUNS // 2) == RUNS // 2


# -- CircuitBreaker -------------------------------------------------------------------------------------------


def breaker_options():
    return {"consecutive": 1, "open_for": 5, "max_open_for": 5, "jitter": 0, "probes": 2, "probe_lease": 10}


def half_open_scenario(policy):
    """Callers who come when the open time is over: one probe at a time, as many as permitted, no wedge."""

    async def probe(world, leases, ends, manner):
        mine = (policy._opened, world.time)
        if policy._state is State.HALF_OPEN:
            lively = [lease for lease in leases if lease[0] == mine[0] and lease[1] + 10 > mine[1]]
            assert not lively, "a second probe came in while the lease of the first one lasted"
        leases.append(mine)
        try:
            if manner == 2:
                await world.asleep(15.0)  # longer than its lease
            else:
                await world.pause()
        finally:
            leases.remove(mine)
        ends[manner == 1] += 1
        if manner == 1:
            raise OSError

    guarded = linked(policy, probe)

    def setup(world):
        policy._trips = 0
        policy._enter(State.OPEN, world.time - 5)
        opened = policy._opened
        leases, ends = [], [0, 0]

        async def later(manner):
            await world.asleep(4.0)
            await guarded(world, leases, ends, manner)

        for caller in (guarded(world, leases, ends, world.draw(4)), guarded(world, leases, ends, world.draw(4))):
            world.spawn(caller, Rejected, OSError)
        world.spawn(later(world.draw(4)), Rejected, OSError)

        def check():
            well, ill = ends
            if policy._state is State.CLOSED:
                assert well >= 2, f"{well} good probes closed it"
            if policy._opened > opened:
                assert ill, "it opened again without a failed probe"
            if not well and not ill:
                assert policy._state is not State.CLOSED, "cancelled probes closed it"
                assert policy._opened == opened, "cancelled probes opened it"
            world.time += 20.0
            call = Call(setup, (), {})
            try:
                policy.admit(call, world.time)
            except Rejected:
                raise AssertionError("the breaker is wedged") from None
            policy.settle(call, CancelledError(), world.time, world.time)

        return check

    return setup


def late_results_scenario(policy):
    """Callers who begin before the breaker opens and end after it: their results change nothing."""

    def state():
        return policy._state, policy._opened, policy._probed, policy._window.counts(0.0)

    async def work(world, manner, seconds, seen):
        began = world.time
        await world.asleep(seconds)
        seen[:] = [began < policy._since and policy._state is State.CLOSED, state()]
        if manner:
            raise OSError

    guarded = linked(policy, work)

    def setup(world):
        policy.close()

        async def caller(seconds, calls):
            for _ in range(calls):
                seen = [False, None]
                try:
                    await guarded(world, world.draw(2), seconds, seen)
                except Rejected:
                    await world.asleep(5.0)
                except OSError:
                    pass
                late, before = seen
                assert not late or state() == before, "a late result changed the state"

        world.spawn(caller(1.0, 5))
        world.spawn(caller(9.0, 1))
        world.spawn(caller(12.0, 1))

        def check():
            assert len(policy._leases) <= 1, "more leases than probes may run"

        return check

    return setup


def test_circuit_breaker():
    runs = RUNS * 9 // 10  # the rest goes to results that come late
    assert explore(half_open_scenario(CircuitBreaker(**breaker_options())), runs=runs) == runs
    assert explore(late_results_scenario(CircuitBreaker(**breaker_options())), runs=RUNS - runs) == RUNS - runs


# -- RateLimit ------------------------------------------------------------------------------------------------


def rate_limit_scenario(policy, *, callers=4):
    """Callers who wait for their turn: in no span of time more of them start than the bucket holds."""
    burst, per_second = policy.burst, policy.rate.limit / policy.rate.per

    async def start(world, started):
        started.append(world.time)
        await world.pause()

    guarded = linked(policy, start)

    def setup(world):
        started = []

        async def caller(after):
            if after:
                await world.asleep(after)
            try:
                await guarded(world, started)
            except Rejected as refusal:
                assert refusal.retry_after > 0  # noqa: PT017 - refused or not, both are right

        for index in range(callers):
            world.spawn(caller(index * 0.25))

        def check():
            for first, begin in enumerate(started):
                for number, end in enumerate(started[first:], 1):
                    allowed = burst + per_second * (end - begin) + 1e-6
                    assert number <= allowed, f"{number} calls in {end - begin:g} s, starting at {started}"
            # Who was cancelled has not used anything up for good: all that can be left is the debt of those
            # who started and the reservations that stood between others.
            assert policy.idle(world.time + 4.0 / per_second)

        return check

    return setup


def test_rate_limit():
    assert explore(rate_limit_scenario(RateLimit("1/s", wait=3), callers=3), runs=RUNS // 2) == RUNS // 2
    assert (
        explore(rate_limit_scenario(RateLimit("4/2s", burst=2, wait=0.6), callers=3), runs=RUNS // 2) == RUNS // 2
    )


# -- Cache ----------------------------------------------------------------------------------------------------


def cache_scenario(policy, *, keys=1):
    """Callers who miss the same key: one leads, a cancelled leader hands over, and nobody waits for ever."""

    async def fetch(world, leading, key):
        assert key not in leading, "two callers lead at the same time"
        leading.add(key)
        try:
            manner = world.draw(4)
            if manner == 0:
                await world.asleep(0.5)
            else:
                await world.pause()
            if manner == 1:
                raise OSError
        finally:
            leading.discard(key)
        return key, world.time

    guarded = linked(policy, fetch)

    def setup(world):
        policy.clear()
        leading = set()

        async def caller(key, after):
            if after:
                await world.asleep(after)
            try:
                result, _ = await guarded(world, leading, key)
            except OSError:
                pass
            else:
                assert result == key, "the result of another key"

        for index in range(3):
            world.spawn(caller(index % keys, world.draw(4) // 3 * 1.5))

        def check():
            assert not policy._flights, "a flight is left behind"
            assert not policy._led, "a leader is left behind"

        return check

    return setup


def test_cache():
    key = lambda _world, _leading, key: key  # noqa: E731
    runs = RUNS // 2
    assert explore(cache_scenario(Cache(1, key=key)), runs=runs) == runs
    assert explore(cache_scenario(Cache(1, stale=5, refresh=2, key=key), keys=2), runs=runs) == runs


# -- RetryBudget ----------------------------------------------------------------------------------------------


def budget_scenario(policy, make_budget):
    """Callers who share a budget: it is never overdrawn, and no retry is made that was not paid for."""

    async def work(world, counts, manner):
        counts[0] += 1
        await world.pause()
        if manner == 0 or (manner == 1 and counts[0] < 3):
            raise OSError
        counts[1] += 1

    guarded = linked(policy, work)

    def setup(world):
        budget = policy.budget = make_budget()
        counts = [0, 0]  # attempts, successes
        began = world.time

        for _ in range(2):
            world.spawn(guarded(world, counts, world.draw(3)), OSError)

        def check():
            left = budget.tokens(world.time)
            assert left >= 0, f"{left} tokens"
            retries = max(0, counts[0] - 2)  # at least so many; a caller who was cancelled made fewer attempts
            paid = budget.cap + budget.ratio * counts[1] + (world.time - began) / budget.refill
            assert retries <= paid + 1e-6, f"{retries} retries, {paid} tokens"

        return check

    return setup


def small_budget():
    return RetryBudget(cap=1, timeout_cost=1, ratio=0.5, refill=100)


def test_retry_budget():
    policy = Retry(3, on=OSError, wait=0.5, budget=small_budget())
    assert explore(budget_scenario(policy, small_budget)) == RUNS


# -- Keyed ----------------------------------------------------------------------------------------------------


def keyed_scenario(policy, *, keys):
    """Callers of several keys: each key has its own limit, and all partitions together have theirs."""

    async def hold(world, inside, key):
        inside[key] += 1
        assert inside[key] <= 1 or keys > policy.max_keys, f"{inside[key]} calls of one key"
        assert sum(inside) <= policy.max_keys + 1, f"{sum(inside)} calls in {policy.max_keys + 1} partitions"
        try:
            await world.pause()
        finally:
            inside[key] -= 1

    guarded = linked(policy, hold)

    def setup(world):
        inside = [0] * keys

        async def caller(key):
            await guarded(world, inside, key)  # the partition is chosen here, not when the coroutine is made

        for index in range(3):
            world.spawn(caller(index % keys), Rejected)

        def check():
            partitions = policy._partitions.values()
            assert len(partitions) <= policy.max_keys + 1
            assert all(len(each.policy._permits) == 1 for each in partitions), "a permit is lost"

        return check

    return setup


def one_at_a_time():
    return Bulkhead(1, queue=1)


def test_keyed():
    key = lambda _world, _inside, key: key  # noqa: E731
    runs = RUNS * 4 // 5  # the rest goes to a table that is too small
    assert explore(keyed_scenario(Keyed(one_at_a_time, key=key, max_keys=2), keys=2), runs=runs) == runs
    policy = Keyed(one_at_a_time, key=key, max_keys=1)
    assert explore(keyed_scenario(policy, keys=3), runs=RUNS - runs) == RUNS - runs


# -- Timeout: it cancels asyncio tasks, so it needs a real one --------------------------------------------------


def test_timeout_and_cancellation_from_outside():
    """Two nested timeouts and a cancellation, each at a random time: who came first has its way."""
    choice = random.Random(20)
    outer_ends, inner_ends = Timeout(3), Timeout(2)
    guarded = outer_ends(inner_ends(asyncio.sleep))

    async def one(seconds, cancelled_at):
        began = runtime.now()
        task = asyncio.ensure_future(guarded(seconds))
        asyncio.get_running_loop().call_later(cancelled_at, task.cancel)
        try:
            await task
        except TimedOut:
            ended = "timed out"
        except CancelledError:
            ended = "cancelled"
        else:
            ended = "done"
        return ended, runtime.now() - began, task.cancelling()

    async def main():
        seen = set()
        for _ in range(2_000):
            seconds, cancelled_at = choice.uniform(0, 4), choice.uniform(0, 4)
            ended, elapsed, cancelling = await one(seconds, cancelled_at)
            first = min((seconds, "done"), (2.0, "timed out"), (cancelled_at, "cancelled"))
            assert (elapsed, ended) == (pytest.approx(first[0]), first[1])
            assert cancelling == (ended == "cancelled")
            seen.add(ended)
        assert seen == {"done", "timed out", "cancelled"}
        assert not any(
            queue.pending for policy in (outer_ends, inner_ends) for queue in policy._queues._queues.values()
        )

    testing.run(main)


# -- what the interleaver is worth: broken policies are found -----------------------------------------------------


class LeaksOnCancel(Bulkhead):
    def settle(self, call, error, started, now):
        if not isinstance(error, CancelledError):
            super().settle(call, error, started, now)


class KeepsGrantOfTheGone(Bulkhead):
    def leave(self, call, ticket):
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        return self._refusal("waited", "no permit became free in time")


class LastComeFirstServed(Bulkhead):
    def _hand_over(self):
        self._waiting.reverse()
        return super()._hand_over()


class LooksThenWaitsThenProbes(CircuitBreaker):
    def alink(self, nxt, edge):
        admitted = super().alink(nxt, edge)

        async def gate(call):
            if self._leases:
                raise self.refusal(None)
            await runtime.asleep(0)
            self._leases.clear()  # it has looked
            return await admitted(call)

        return gate


class ForgetsCancelledProbes(CircuitBreaker):
    def settle(self, call, error, started, now):
        if not isinstance(error, CancelledError):
            super().settle(call, error, started, now)

    def _lease(self, call, now):
        if self._leases:  # leases without an end
            return False
        return super()._lease(call, now)


class CountsCancelledProbes(CircuitBreaker):
    def verdict(self, *_):
        return True


class CountsLateResults(CircuitBreaker):
    def settle(self, call, error, started, now):
        super().settle(call, error, float("inf"), now)


class RefundsAcrossTheQueue(RateLimit):
    def leave(self, call, ticket):
        key, debt, due = ticket.value
        with self._holding(due):
            self._drained[key] -= debt
        return Rejected("left", policy="limit")


class CallsUpTooEarly(RateLimit):
    def _queue(self, *args):
        ticket = super()._queue(*args)
        ticket.ready_at -= 0.25
        return ticket


class LosesHandOver(Cache):
    def abandon(self, call):
        with self._lock:
            self._land(call)


class LeadsBesideTheLeader(Cache):
    def abandon(self, call):
        flight = self._led.get(call)
        tickets = [] if flight is None else list(flight.waiting)
        super().abandon(call)
        for ticket, _call in tickets:
            ticket.value = tickets[0][0].value
            ticket.grant()


class Overdraws(RetryBudget):
    def withdraw(self, error, now, key=None, *, timed_out=None):
        super().withdraw(error, now, key, timed_out=timed_out)
        return True


class KeepsNoPartitions(Keyed):
    def _partition(self, key):
        self._partitions.clear()
        return super()._partition(key)


def cached(cls):
    return cls(1, key=lambda _world, _leading, key: key)


BROKEN = {
    "bulkhead leaks on cancel": (
        lambda: bulkhead_scenario(LeaksOnCancel(1, queue=2)),
        "wait for ever|permits are lost",
    ),
    "bulkhead loses a grant": (
        lambda: bulkhead_scenario(KeepsGrantOfTheGone(1, queue=2)),
        "wait for ever|permits are lost",
    ),
    "bulkhead serves the last": (lambda: bulkhead_scenario(LastComeFirstServed(1, queue=2)), "in the order"),
    "probe checks, awaits, acts": (
        lambda: half_open_scenario(LooksThenWaitsThenProbes(**breaker_options())),
        "a second probe",
    ),
    "probe lease stays": (lambda: half_open_scenario(ForgetsCancelledProbes(**breaker_options())), "wedged"),
    "cancelled probe counts": (
        lambda: half_open_scenario(CountsCancelledProbes(**breaker_options())),
        "without a failed|cancelled probes",
    ),
    "late result counts": (lambda: late_results_scenario(CountsLateResults(**breaker_options())), "late result"),
    "refund across the queue": (lambda: rate_limit_scenario(RefundsAcrossTheQueue("1/s", wait=3)), "calls in"),
    "turn comes too early": (lambda: rate_limit_scenario(CallsUpTooEarly("1/s", wait=3)), "calls in"),
    "hand-over lost": (lambda: cache_scenario(cached(LosesHandOver)), "wait for ever"),
    "two leaders": (lambda: cache_scenario(cached(LeadsBesideTheLeader)), "two callers lead|left behind"),
    "budget overdrawn": (
        lambda: budget_scenario(
            Retry(3, on=OSError, wait=0.5), lambda: Overdraws(cap=1, timeout_cost=1, refill=100)
        ),
        "retries",
    ),
    "partitions forgotten": (
        lambda: keyed_scenario(KeepsNoPartitions(one_at_a_time, key=lambda _w, _i, key: key, max_keys=2), keys=2),
        "calls of one key",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_interleaver_finds_what_is_broken(broken):
    scenario, complaint = BROKEN[broken]
    with pytest.raises(AssertionError, match=complaint) as found:
        explore(scenario(), runs=FEW)
    seed = int(re.match(r"seed (\d+): ", str(found.value))[1])
    with pytest.raises(AssertionError, match=complaint) as again:
        explore(scenario(), seeds=[seed])
    assert str(again.value).partition("\n")[0] == str(found.value).partition("\n")[0], (
        "the same seed, the same run"
    )
