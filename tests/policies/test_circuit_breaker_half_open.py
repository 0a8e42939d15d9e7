"""Probes: how many run at once, what becomes of those that hang, are cancelled or come late."""

from threading import Barrier, Event, Lock, Thread

import anyio
import pytest

from resilient import CircuitBreaker, CircuitOpen, Pipeline, RateLimited, Retry, Timeout
from resilient.call import Call
from resilient.testing import capture_events, run, run_both, virtual_time

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def function():
    """Stand for the guarded function where the hooks are called by numbers."""


class Driver:
    """Calls the hooks of a breaker by numbers."""

    def __init__(self, **options):
        options = {"consecutive": 1, "open_for": 5, "jitter": 0, "max_open_for": 5} | options
        self.breaker = CircuitBreaker(**options)

    def start(self, now):
        call = Call(function, (), {})
        self.breaker.admit(call, now)
        return call, now

    def end(self, started, now, error=None):
        call, at = started
        self.breaker.settle(call, error, at, now)

    def refused(self, now):
        with pytest.raises(CircuitOpen) as caught:
            self.start(now)
        return caught.value.retry_after

    def trip(self, now):
        self.end(self.start(now), now, OSError())
        assert self.state == "open"

    @property
    def state(self):
        return self.breaker.current_state


# -- exactly the permitted probes -----------------------------------------------------------------------------


def test_50_threads_run_exactly_the_permitted_probes():
    with virtual_time() as clock:
        breaker = CircuitBreaker(open_for=5, jitter=0, probes=3)
        breaker.force_open()
        clock.sleep(5)
        ran = []
        for probes in (1, 2, 3):
            assert breaker.current_state != "closed"
            start, all_refused, lock = Barrier(50), Event(), Lock()
            refused = []

            def probe(all_refused=all_refused):
                ran.append(1)
                assert all_refused.wait(60)  # the probe is under way as long as anybody else asks

            def caller(start=start, all_refused=all_refused, lock=lock, refused=refused, probe=probe):
                start.wait()
                try:
                    breaker.call(probe)
                except CircuitOpen as error:
                    with lock:
                        refused.append(error.retry_after)
                        if len(refused) == 49:
                            all_refused.set()

            threads = [Thread(target=caller) for _ in range(50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (len(ran), len(refused)) == (probes, 49)
            assert set(refused) == {10.0}  # the lease of the probe
        assert breaker.current_state == "closed"


def test_50_callers_who_come_back_when_told_run_exactly_the_permitted_probes():
    async def scenario(colour):
        breaker = CircuitBreaker(open_for=5, jitter=0, probes=3, probe_lease=10, name="b")
        breaker.force_open()
        await colour.sleep(5)
        running = most = 0
        before_close = []

        async def probe():
            nonlocal running, most
            running += 1
            if breaker.current_state != "closed":
                before_close.append(colour.now())
                most = max(most, running)
            await colour.sleep(1)
            running -= 1

        async def caller():
            while True:
                try:
                    return await colour.call(breaker, probe)
                except CircuitOpen as refusal:
                    await colour.sleep(refusal.retry_after)

        await colour.gather(*[caller] * 50)
        return before_close, most, breaker.current_state

    async def the_answer(colour):
        before_close, most, state = await scenario(colour)
        assert (len(before_close), most, state) == (3, 1, "closed")

    trace = run_both(the_answer)
    assert [name for name, _ in trace if name != "circuit.rejected"] == [
        "circuit.opened",
        "circuit.half_opened",
        "circuit.closed",
    ]


@BACKENDS
def test_50_tasks_run_exactly_the_permitted_probes(backend):
    async def main():
        breaker = CircuitBreaker(open_for=5, jitter=0, probes=3)
        breaker.force_open()
        await anyio.sleep(5)
        ran, refused = [], []

        async def probe():
            ran.append(1)
            await anyio.sleep(1)

        async def caller():
            try:
                await breaker.acall(probe)
            except CircuitOpen:
                refused.append(1)

        counts = []
        for _ in range(3):
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(caller)
            counts.append((len(ran), len(refused), breaker.current_state))
        return counts

    assert run(main, backend=backend) == [(1, 49, "half-open"), (2, 98, "half-open"), (3, 147, "closed")]


# -- verdicts -------------------------------------------------------------------------------------------------


def test_enough_good_probes_close_it():
    driver = Driver(consecutive=None, minimum_calls=1, probes=3)
    driver.trip(0)
    for now in (5, 6):
        driver.end(driver.start(now), now + 0.5)
        assert driver.state == "half-open"
    driver.end(driver.start(7), 7.5)
    assert driver.state == "closed"


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ("ggg", "closed"),
        ("bgg", "closed"),  # one of three is below the rate
        ("gbg", "closed"),
        ("bb", "open"),
        ("gbb", "open"),
        ("bgb", "open"),
    ],
)
def test_probes_are_judged_by_the_rate(outcomes, state):
    driver = Driver(consecutive=None, minimum_calls=1, probes=3, failure_rate=0.5)
    driver.trip(0)
    for index, outcome in enumerate(outcomes):
        assert driver.state == ("half-open" if index else "open")
        driver.end(driver.start(5 + index), 5.5 + index, OSError() if outcome == "b" else None)
    assert driver.state == state


def test_slow_probes_are_judged_by_their_rate():
    driver = Driver(consecutive=None, minimum_calls=1, probes=2, slow=1, slow_rate=1)
    driver.trip(0)
    driver.end(driver.start(5), 7)
    assert driver.state == "half-open"
    driver.end(driver.start(8), 8.5)
    assert driver.state == "closed"
    driver.trip(20)
    driver.end(driver.start(25), 26)
    driver.end(driver.start(27), 28)
    assert driver.state == "open"


def test_with_consecutive_one_bad_probe_is_enough():
    driver = Driver(consecutive=5, probes=3)
    driver.breaker.force_open()
    driver.breaker._until = 5.0
    driver.end(driver.start(5), 6)
    driver.end(driver.start(6), 7, OSError())
    assert driver.state == "open"


def test_an_error_that_is_no_failure_is_a_good_probe():
    driver = Driver(on=OSError, probes=1)
    driver.trip(0)
    driver.end(driver.start(5), 6, KeyError())
    assert driver.state == "closed"


def test_a_failed_probe_tells_the_reason():
    driver = Driver(probes=1)
    driver.trip(0)
    with capture_events(driver.breaker) as seen:
        driver.end(driver.start(5), 6, OSError())
    assert [event.name for event in seen] == ["circuit.half_opened", "circuit.opened"]
    assert (seen[1].reason, seen[1].open_for) == ("probes", 5.0)


# -- leases ---------------------------------------------------------------------------------------------------


def test_a_hung_probe_frees_its_lease():
    driver = Driver(probes=1, probe_lease=10)
    driver.trip(0)
    driver.start(5)  # and never heard of again
    assert driver.refused(5) == 10.0
    assert driver.refused(14) == 1.0
    driver.end(driver.start(15), 16)
    assert driver.state == "closed"


def test_the_refusal_names_the_probe():
    driver = Driver(name="b")
    driver.trip(0)
    driver.start(5)
    with pytest.raises(
        CircuitOpen, match="b: the circuit is half-open, and its probe is under way; retry after 8 s"
    ):
        driver.start(7)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), GeneratorExit(), RateLimited("no", policy="p")], ids=lambda e: type(e).__name__
)
def test_a_probe_that_says_nothing_neither_closes_nor_wedges(error):
    driver = Driver(probes=1)
    driver.trip(0)
    for now in (5, 6, 7):
        driver.end(driver.start(now), now + 0.5, error)
        assert driver.state == "half-open"
    driver.end(driver.start(8), 9)
    assert driver.state == "closed"


@BACKENDS
def test_a_cancelled_probe_neither_closes_nor_wedges(backend):
    async def main():
        breaker = CircuitBreaker(open_for=5, jitter=0, probes=1)
        breaker.force_open()
        await anyio.sleep(5)
        for _ in range(5):
            with anyio.move_on_after(1) as scope:
                await breaker.acall(anyio.sleep, 3)
            assert scope.cancelled_caught
            assert breaker.current_state == "half-open"
        await breaker.acall(anyio.sleep, 0.1)  # at once: no lease is left behind
        return breaker.current_state

    assert run(main, backend=backend) == "closed"


# -- late results ---------------------------------------------------------------------------------------------


def test_a_slow_success_from_before_the_trip_does_not_close():
    driver = Driver(probes=1)
    early = driver.start(0)
    driver.trip(1)
    driver.end(early, 3)
    assert driver.state == "open"
    early = driver.start(6)  # the probe
    assert driver.state == "half-open"
    driver.end(early, 7)
    assert driver.state == "closed"


def test_a_success_from_before_the_trip_does_not_count_as_a_probe():
    driver = Driver(probes=2)
    early = [driver.start(0) for _ in range(5)]
    driver.trip(1)
    probe = driver.start(6)
    for call in early:
        driver.end(call, 7)
    assert driver.state == "half-open"
    assert driver.refused(7) == 9.0  # the lease is still out
    driver.end(probe, 8)
    driver.end(driver.start(8), 9)
    assert driver.state == "closed"


def test_a_slow_failure_from_before_does_not_open_again():
    driver = Driver(probes=1)
    early = [driver.start(0) for _ in range(3)]
    driver.trip(1)
    driver.end(driver.start(6), 7)
    assert driver.state == "closed"
    for call in early:
        driver.end(call, 8, OSError())
    assert driver.state == "closed"
    assert driver.breaker._window.counts(8).failures == 0


def test_a_failure_from_before_does_not_end_the_probes():
    driver = Driver(probes=1)
    early = driver.start(0)
    driver.trip(1)
    probe = driver.start(6)
    driver.end(early, 7, OSError())
    assert driver.state == "half-open"
    driver.end(probe, 8)
    assert driver.state == "closed"


def test_a_success_from_before_a_close_by_hand_is_not_counted():
    driver = Driver(consecutive=None, minimum_calls=2)
    early = driver.start(0)
    driver.breaker.isolate()
    with virtual_time(5):
        driver.breaker.close()
    driver.end(early, 6)
    assert driver.breaker._window.counts(6).calls == 0


@pytest.mark.parametrize("error", [None, OSError()], ids=["success", "failure"])
def test_the_late_result_of_an_expired_probe_changes_nothing(error):
    driver = Driver(probes=1, probe_lease=10)
    driver.trip(0)
    hung = driver.start(5)
    probe = driver.start(15)
    driver.end(hung, 16, error)
    assert driver.state == "half-open"
    assert driver.refused(16) == 9.0  # the lease of the second probe is still out
    driver.end(probe, 17)
    assert driver.state == "closed"


@pytest.mark.parametrize("error", [None, OSError()], ids=["success", "failure"])
def test_a_probe_that_has_expired_does_not_count_even_if_nobody_came_after_it(error):
    driver = Driver(probes=1, probe_lease=10)
    driver.trip(0)
    hung = driver.start(5)
    driver.end(hung, 15, error)
    assert driver.state == "half-open"
    driver.end(driver.start(15), 16)
    assert driver.state == "closed"


@pytest.mark.parametrize("error", [None, OSError()], ids=["success", "failure"])
def test_a_probe_of_an_earlier_half_open_period_changes_nothing(error):
    driver = Driver(probes=1, probe_lease=10)
    driver.trip(0)
    hung = driver.start(5)
    driver.breaker.force_open()
    driver.breaker._until = 8.0
    probe = driver.start(8)
    driver.end(hung, 9, error)
    assert driver.state == "half-open"
    driver.end(probe, 10)
    assert driver.state == "closed"


def test_a_retry_of_an_abandoned_probe_has_a_lease_of_its_own():
    """A sync timeout abandons the probe in its thread; the retry is the same call, and under way twice."""
    with virtual_time() as clock:
        breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=2, probe_lease=2, name="b")
        guard = Pipeline(Retry(on=Exception, stop=2, wait=2), Timeout(1), breaker)
        breaker.force_open()
        clock.sleep(5)
        seen = []

        def hang_once():
            seen.append(clock.now())
            if len(seen) == 1:
                clock.sleep(3.5)  # ends while the second attempt runs
                return "late"
            clock.sleep(0.75)
            return "in time"

        with capture_events(breaker) as reported:
            assert guard.call(hang_once) == "in time"
        assert seen == [5.0, 8.0]
        assert [event.name for event in reported] == ["circuit.half_opened"]
        assert breaker._probed == 1  # the late one did not count
        breaker.call(function)
        assert breaker.current_state == "closed"


# -- half-opening ---------------------------------------------------------------------------------------------


def test_it_half_opens_once_however_many_come():
    driver = Driver(probes=1)
    driver.trip(0)
    with capture_events(driver.breaker) as seen:
        driver.start(5)
        for _ in range(10):
            driver.refused(5)
    assert [event.name for event in seen] == ["circuit.half_opened"] + ["circuit.rejected"] * 10


def test_it_does_not_half_open_by_itself():
    with virtual_time() as clock:
        breaker = CircuitBreaker()
        breaker.force_open()
        clock.sleep(1e6)
        assert breaker.current_state == "open"
        breaker.call(function)
        assert breaker.current_state == "half-open"


def test_isolating_a_half_open_breaker_forgets_its_probe():
    driver = Driver(probes=1)
    driver.trip(0)
    probe = driver.start(5)
    driver.breaker.isolate()
    driver.end(probe, 6)
    assert driver.state == "open"
    assert driver.refused(1e9) is None
