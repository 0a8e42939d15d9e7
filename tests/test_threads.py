"""Real threads, as many switches as the interpreter makes."""

import asyncio
import sys
import threading

import anyio
import anyio.lowlevel
import pytest
import trio

from resilient import (
    Bulkhead,
    BulkheadFull,
    Cache,
    CircuitBreaker,
    CircuitOpen,
    Keyed,
    Pipeline,
    RateLimit,
    RateLimited,
    Rejected,
    Retry,
    RetryBudget,
    Timeout,
    runtime,
)
from resilient.policies.circuit_breaker import State

THREADS = 8
ROUNDS = 300


@pytest.fixture(autouse=True)
def switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def hammer(function, *, threads=THREADS):
    """Run a function of the thread's number in many threads that begin together; raise what they raise."""
    errors = []
    together = threading.Barrier(threads)

    def body(number):
        together.wait(60)
        try:
            function(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=body, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


class Inside:
    """Counts who is in, without a lock: list operations are atomic."""

    def __init__(self):
        self.members = []
        self.most = 0

    def __enter__(self):
        self.members.append(1)
        self.most = max(self.most, len(self.members))

    def __exit__(self, *_):
        self.members.pop()


def test_the_hammer_finds_a_gate_without_a_limit():
    inside = Inside()

    def work(number):
        for _ in range(ROUNDS):
            with inside:
                pass

    hammer(work)
    with pytest.raises(ZeroDivisionError):
        hammer(lambda number: 1 / number)


@pytest.mark.parametrize(("limit", "queue"), [(1, 0), (3, 0), (3, 8), (1, 8)])
def test_bulkhead(limit, queue):
    policy = Bulkhead(limit, queue=queue)
    inside, refused = Inside(), []

    @policy
    def work():
        with inside:
            assert len(inside.members) <= limit

    def many(number):
        for _ in range(ROUNDS):
            try:
                work()
            except BulkheadFull:
                refused.append(1)

    hammer(many)
    statistics = policy.statistics()
    assert inside.most <= limit
    assert (statistics.in_use, statistics.queued, statistics.rejected) == (0, 0, len(refused))
    assert queue == 0 or not refused, "there was a place for everybody"


def test_rate_limit(monkeypatch):
    monkeypatch.setattr(runtime, "now", lambda: 1000.0)  # no time passes, so exactly the burst may start
    policy = RateLimit("500/hour")
    started, refused = [], []

    @policy
    def work():
        started.append(1)

    def many(number):
        for _ in range(ROUNDS):
            try:
                work()
            except RateLimited:
                refused.append(1)

    hammer(many)
    assert len(started) == 500
    assert len(refused) == THREADS * ROUNDS - 500 == policy.statistics().rejected


def test_rate_limit_with_keys(monkeypatch):
    monkeypatch.setattr(runtime, "now", lambda: 1000.0)
    policy = RateLimit("50/hour", key=lambda key: key, max_keys=4)
    started = []
    work = policy(started.append)

    def many(number):
        for turn in range(ROUNDS):
            try:
                work((number + turn) % 6)
            except RateLimited:
                pass

    hammer(many)
    assert len(started) <= 50 * 5, "four keys and the one that the others share"
    assert policy.statistics().keys == 4


def test_circuit_breaker_at_half_open(monkeypatch):
    for _ in range(30):
        time = 1000.0
        monkeypatch.setattr(runtime, "now", lambda: time)  # noqa: B023
        policy = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=1)
        policy.force_open()
        time = 1005.0
        inside, probes = Inside(), []
        done = threading.Event()

        @policy
        def probe(inside=inside, probes=probes, done=done, policy=policy):
            with inside:
                half_open = policy._state is State.HALF_OPEN
                probes.append(half_open)
                if half_open:
                    assert done.wait(60)

        def one(number, done=done, probe=probe, refused=[]):  # noqa: B006 - shared by the threads of a round
            try:
                probe()
            except CircuitOpen:
                refused.append(1)
                if len(refused) % (THREADS - 1) == 0:
                    done.set()

        refusals = []
        hammer(lambda number, one=one, refusals=refusals: one(number, refused=refusals))
        assert probes == [True]
        assert len(refusals) == THREADS - 1
        assert policy.statistics().state == "closed"


def test_circuit_breaker_counts_every_result(monkeypatch):
    monkeypatch.setattr(runtime, "now", lambda: 1000.0)
    policy = CircuitBreaker(failure_rate=1, minimum_calls=1_000_000, window=30)

    def work(fails):
        if fails:
            raise OSError

    def many(number):
        for turn in range(ROUNDS):
            try:
                policy.call(work, turn % 3 == 0)
            except OSError:
                pass

    hammer(many)
    statistics = policy.statistics()
    assert (statistics.calls, statistics.failures) == (THREADS * ROUNDS, THREADS * ROUNDS // 3)


def test_cache_runs_concurrent_misses_once():
    policy = Cache(3600, key=lambda key: key)
    inside = {turn: Inside() for turn in range(ROUNDS)}
    fetched = []

    @policy
    def fetch(key):
        with inside[key]:
            fetched.append(key)
            return key, object()

    results = [[] for _ in range(THREADS)]

    def many(number):
        results[number] += [fetch(turn) for turn in range(ROUNDS)]

    hammer(many)
    assert sorted(fetched) == list(range(ROUNDS)), "each key was fetched once"
    assert all(each == results[0] for each in results), "everybody got the same objects"
    assert not policy._flights
    assert not policy._led


def test_cache_with_failures_leaves_nobody_waiting():
    policy = Cache(0.000001, key=lambda number: 0)

    @policy
    def fetch(number):
        if number % 2:
            raise OSError
        if number == 4:
            raise KeyboardInterrupt

    def many(number):
        for _ in range(ROUNDS):
            try:
                fetch(number)
            except (OSError, KeyboardInterrupt):
                pass

    hammer(many)
    assert not policy._flights
    assert not policy._led


def test_retry_budget(monkeypatch):
    monkeypatch.setattr(runtime, "now", lambda: 1000.0)
    budget = RetryBudget(cap=100, ratio=0.1)
    policy = Retry(3, on=OSError, wait=0, budget=budget)
    attempts = []

    def work():
        attempts.append(1)
        raise OSError

    def many(number):
        for _ in range(ROUNDS):
            try:
                policy.call(work)
            except OSError:
                pass

    hammer(many)
    assert len(attempts) == THREADS * ROUNDS + 100
    assert budget.tokens(1000.0) == 0


def test_keyed():
    policy = Keyed(lambda: Bulkhead(1, queue=THREADS), key=lambda key: key, max_keys=4)
    inside = {key: Inside() for key in range(4)}

    @policy
    def work(key):
        with inside[key]:
            pass

    def many(number):
        for turn in range(ROUNDS):
            work((number + turn) % 4)

    hammer(many)
    assert [each.most for each in inside.values()] == [1] * 4
    assert [each.in_use for each in policy.statistics().values()] == [0] * 4


# -- one object everywhere ------------------------------------------------------------------------------------

guard = Pipeline(
    Timeout(30),
    Retry(3, on=OSError, wait=0),
    CircuitBreaker(),
    RateLimit("1000000/s"),
    Bulkhead(THREADS, queue=5 * THREADS),
)


@guard
def at_import(value):
    return value


@guard
async def aat_import(value):
    await anyio.lowlevel.checkpoint()
    return value


def test_one_policy_at_import_time_in_loops_and_in_threads():
    assert at_import(1) == 1

    async def several():
        return await asyncio.gather(*(aat_import(value) for value in range(5)))

    for _ in range(3):
        assert asyncio.run(several()) == list(range(5))
        assert trio.run(aat_import, 2) == 2

    def loops_and_calls(number):
        for value in range(5):
            assert at_import(value) == value
            assert asyncio.run(several()) == list(range(5))

    hammer(loops_and_calls, threads=4)
    [bulkhead] = [each for label, each in guard.statistics().items() if label.startswith("Bulkhead")]
    assert (bulkhead.in_use, bulkhead.queued) == (0, 0)


def test_a_queue_across_loops_and_threads():
    policy = Bulkhead(1, queue=THREADS)
    inside = Inside()

    def work():
        with inside:
            assert len(inside.members) == 1

    async def awork():
        with inside:
            await asyncio.sleep(0)
            assert len(inside.members) == 1

    async def many():
        for _ in range(20):
            await policy.acall(awork)

    def either(number):
        if number % 2:
            asyncio.run(many())
        else:
            for _ in range(20):
                policy.call(work)

    hammer(either)
    assert inside.most == 1
    assert policy.statistics().in_use == 0
    assert issubclass(BulkheadFull, Rejected)
