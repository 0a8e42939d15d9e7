"""Policies go on working in a forked child."""

import asyncio
import os
import signal
import threading

import pytest

from resilient import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    Fallback,
    Keyed,
    LoadShed,
    Pipeline,
    RateLimit,
    Retry,
    RetryBudget,
    Timeout,
    workers,
)
from resilient.kinds import Gate

SECONDS = 20  # after which a child that hangs is killed, so that the test fails instead


def in_child(function):
    """Run a function in a forked child; return what it wrote."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            outcome = repr(function())
        except BaseException as error:
            outcome = f"error: {error!r}"
        try:
            os.write(writes, outcome.encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        outcome = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    return outcome


POLICIES = [
    Bulkhead(2, queue=1),
    Cache(60, key=lambda: "key"),
    CircuitBreaker(consecutive=2),
    Fallback("fallback"),
    Keyed(lambda: Bulkhead(1)),
    LoadShed(),
    RateLimit("10/minute", wait=1),
    Retry(2, on=OSError, wait=0, budget=RetryBudget(key=lambda: "key")),
    Timeout(10),
    Pipeline(Timeout(10), Retry(2, on=OSError, wait=0), CircuitBreaker(key=lambda: "key"), Bulkhead(1)),
]


async def awork():
    return "result"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_every_policy_works_in_a_child(policy):
    def use():
        return policy.call(lambda: "result"), asyncio.run(policy.acall(awork))

    assert policy.call(lambda: "result") == "result"
    assert in_child(use) == "('result', 'result')"
    assert policy.call(lambda: "result") == "result"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_locks_that_another_thread_holds_do_not_hang_the_child(policy):
    held, release = threading.Event(), threading.Event()

    def hold():
        locks = [part._lock for part in policy.walk()]
        batons = [(part, part._take()) for part in policy.walk() if isinstance(part, RateLimit)]
        for lock in locks:
            lock.acquire()
        held.set()
        release.wait(SECONDS)
        for lock in locks:
            lock.release()
        for part, number in batons:
            part._give(number)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(SECONDS)

    def use():
        policy.statistics()
        return policy.call(lambda: "result")

    try:
        assert in_child(use) == "'result'"
    finally:
        release.set()
        thread.join()
    assert policy.call(lambda: "result") == "result"


def test_permits_of_the_parents_calls_are_free_in_the_child():
    policy = Bulkhead(1)
    with policy:
        assert in_child(lambda: (policy.statistics().in_use, policy.call(lambda: "in"))) == "(0, 'in')"
        assert policy.statistics().in_use == 1
    assert policy.statistics().in_use == 0


def test_a_call_that_crosses_the_fork_does_not_add_a_permit():
    policy = Bulkhead(1)

    def cross():
        policy.__exit__(None, None, None)
        return policy.statistics().in_use

    policy.__enter__()
    try:
        assert in_child(cross) == "0"
    finally:
        policy.__exit__(None, None, None)


def test_a_leader_in_the_parent_is_not_waited_for_in_the_child():
    policy = Cache(60, key=lambda: "key")
    block, leading = threading.Event(), threading.Event()

    def work():
        if threading.current_thread() is not threading.main_thread():
            leading.set()
            block.wait(SECONDS)
        return "result"

    thread = threading.Thread(target=lambda: policy.call(work))
    thread.start()
    leading.wait(SECONDS)
    try:
        assert in_child(lambda: policy.call(work)) == "'result'"
    finally:
        block.set()
        thread.join()


def test_an_open_breaker_stays_open():
    policy = CircuitBreaker(consecutive=1)
    policy.isolate()
    assert in_child(policy.statistics).startswith("CircuitBreakerStatistics(state='open'")


def test_idle_workers_of_the_parent_are_not_used():
    policy = Timeout(10)
    assert policy.call(lambda: 1) == 1
    assert in_child(lambda: (len(workers._idle), policy.call(lambda: 2))) == "(0, 2)"


def test_a_policy_of_a_user_gets_a_new_lock():
    class Mine(Gate):
        def admit(self, call, now):
            with self._lock:
                return

    policy = Mine()
    with policy._lock:
        assert in_child(lambda: policy.call(lambda: 3)) == "3"


def test_a_child_that_fails_is_seen():
    assert in_child(lambda: 1 / 0) == "error: ZeroDivisionError('division by zero')"
    with pytest.raises(AssertionError, match="status"):
        in_child(lambda: os._exit(3))


def test_the_timers_of_a_timeout_get_a_new_lock():
    timeout = Timeout(10)

    async def answer():
        return "in time"

    with timeout._queues._lock:  # as if another thread were making a queue for its event loop
        assert in_child(lambda: asyncio.run(timeout.acall(answer))) == "'in time'"


def test_one_that_was_refused_does_not_keep_the_others_from_going_on():
    class Refused(Bulkhead):
        def __init__(self):
            kept.append(self)
            super().__init__(0)

    kept = []
    with pytest.raises(ValueError, match="limit=0"):
        Refused()
    later = RateLimit("1/minute")
    with later._lock:
        assert in_child(lambda: later._lock.acquire(blocking=False)) == "True"
