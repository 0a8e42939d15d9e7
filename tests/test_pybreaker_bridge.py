"""pybreaker's listeners, storages and breakers, at work with `CircuitBreaker`."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from threading import Barrier, Thread

import anyio
import pybreaker
import pytest

from resilient import BulkheadFull, CircuitBreaker, CircuitOpen, Pipeline, Retry, TimedOut, Timeout
from resilient.testing import capture_events, run, run_both, virtual_time

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture
def clock():
    with virtual_time() as clock:
        yield clock


def works(*args, **kwargs):
    return "works"


def breaks(*args, **kwargs):
    raise OSError("breaks")


def fail(breaker, times=1):
    for _ in range(times):
        with pytest.raises(OSError, match="breaks"):
            breaker.call(breaks)


class Log(pybreaker.CircuitBreakerListener):
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def before_call(self, cb, func, *args, **kwargs):
        self.told.append(("before_call", getattr(func, "__name__", "?"), args, kwargs))

    def success(self, cb):
        self.told.append(("success", cb.current_state))

    def failure(self, cb, exc):
        self.told.append(("failure", type(exc).__name__))

    def state_change(self, cb, old_state, new_state):
        self.told.append(("state_change", old_state.name, new_state.name))

    def names(self):
        return [entry[0] for entry in self.told]


class Raising(pybreaker.CircuitBreakerListener):
    """Raises whatever it is told."""

    def before_call(self, cb, func, *args, **kwargs):
        raise ZeroDivisionError("before_call")

    def success(self, cb):
        raise ZeroDivisionError("success")

    def failure(self, cb, exc):
        raise ZeroDivisionError("failure")

    def state_change(self, cb, old_state, new_state):
        raise ZeroDivisionError("state_change")


# -- listeners ------------------------------------------------------------------------------------------------


def test_listeners_are_told_in_order():
    async def scenario(colour):
        log = Log()
        breaker = CircuitBreaker(
            consecutive=2, open_for=5, jitter=0, probes=1, on=OSError, listeners=[log], name="b"
        )
        work, fail = colour.function(works), colour.function(breaks)
        assert await colour.call(breaker, work, 1, a=2) == "works"
        for _ in range(2):
            with pytest.raises(OSError, match="breaks"):
                await colour.call(breaker, fail)
        with pytest.raises(CircuitOpen):
            await colour.call(breaker, work)
        await colour.sleep(5)
        await colour.call(breaker, work)
        assert log.told[0][2:] == ((1,), {"a": 2})
        assert log.names() == [
            *("before_call", "success"),
            *("before_call", "failure"),
            *("before_call", "failure", "state_change"),
            "state_change",
            *("before_call", "success", "state_change"),
        ]
        changes = [entry[1:] for entry in log.told if entry[0] == "state_change"]
        assert changes == [("closed", "open"), ("open", "half-open"), ("half-open", "closed")]

    run_both(scenario)


def test_a_failure_is_told_before_the_change_that_it_causes(clock):
    log = Log()
    breaker = CircuitBreaker(consecutive=1, listeners=[log])
    fail(breaker)
    assert log.names() == ["before_call", "failure", "state_change"]


def test_what_counts_as_nothing_is_not_told(clock):
    log = Log()
    breaker = CircuitBreaker(consecutive=1, listeners=[log])
    for error in (KeyboardInterrupt, asyncio.CancelledError, lambda: BulkheadFull("no", policy="b")):

        def stop(error=error):
            raise error()

        with pytest.raises((KeyboardInterrupt, asyncio.CancelledError, BulkheadFull)):
            breaker.call(stop)
    assert log.names() == ["before_call"] * 3


def test_an_error_that_is_no_failure_is_a_success(clock):
    log = Log()
    breaker = CircuitBreaker(consecutive=1, on=OSError, listeners=[log])
    with pytest.raises(KeyError):
        breaker.call({}.__getitem__, "missing")
    assert log.names() == ["before_call", "success"]


def test_changes_by_hand_are_told(clock):
    log = Log()
    breaker = CircuitBreaker(listeners=(log,))
    breaker.isolate()
    breaker.close()
    assert log.told == [("state_change", "closed", "open"), ("state_change", "open", "closed")]


def test_a_listener_that_raises_is_logged_and_disturbs_nobody(clock, caplog):
    log = Log()
    breaker = CircuitBreaker(consecutive=1, listeners=[Raising(), log])
    assert breaker.call(works) == "works"
    fail(breaker)
    assert sorted(log.names()) == ["before_call", "before_call", "failure", "state_change", "success"]
    messages = [record.getMessage() for record in caplog.records if record.name == "resilient"]
    assert sorted(message.rpartition(" ")[2] for message in messages) == sorted(log.names())
    assert all("Raising" in message for message in messages)
    assert all(record.exc_info for record in caplog.records)


def test_a_listener_may_ask_and_act_on_the_breaker(clock):
    class Closing(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            if new_state.name == pybreaker.STATE_OPEN:
                seen.append((cb.current_state, cb.fail_counter, cb.statistics().opened))
                cb.close()

    seen = []
    breaker = CircuitBreaker(consecutive=1, listeners=[Closing()])
    fail(breaker)
    assert breaker.call(works) == "works"
    assert seen == [("open", 1, 1)]


@pytest.mark.parametrize("listeners", ["text", Log(), [print], [object()], [pybreaker.CircuitBreakerListener]])
def test_something_else_as_a_listener(listeners):
    with pytest.raises(TypeError, match=r"listeners=.* is not allowed; give .*pybreaker.CircuitBreakerListener"):
        CircuitBreaker(listeners=listeners)


# -- storages -------------------------------------------------------------------------------------------------


def memory():
    return pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)


def pair(storage, **options):
    options = {"consecutive": 1, "open_for": 5, "jitter": 0, "probes": 1} | options
    return CircuitBreaker(storage=storage, name="one", **options), CircuitBreaker(
        storage=storage, name="two", **options
    )


def test_two_breakers_share_a_state(clock):
    storage = memory()
    one, two = pair(storage)
    fail(one)
    assert storage.state == "open"
    with capture_events() as seen, pytest.raises(CircuitOpen) as caught:
        two.call(works)
    assert caught.value.retry_after == pytest.approx(5, abs=1)
    assert [(event.name, event.policy) for event in seen] == [
        ("circuit.opened", "two"),
        ("circuit.rejected", "two"),
    ]
    assert seen[0].reason == "storage"
    one.close()
    assert storage.state == "closed"
    with capture_events() as seen:
        assert two.call(works) == "works"
    assert [(event.name, event.policy) for event in seen] == [("circuit.closed", "two")]


def test_the_probe_of_one_closes_both(clock):
    storage = memory()
    one, two = pair(storage, probes=2)
    fail(one)
    with pytest.raises(CircuitOpen):
        two.call(works)
    clock.sleep(5)
    one.call(works)
    assert storage.state == one.current_state == "half-open"
    with capture_events() as seen:
        two.call(works)  # a probe as well
    assert [(event.name, event.policy) for event in seen] == [("circuit.half_opened", "two")]
    one.call(works)
    assert storage.state == "closed"
    two.call(works)
    assert two.current_state == "closed"


def test_a_new_breaker_takes_over_an_open_state_with_its_age(clock):
    storage = memory()
    storage.state = "open"
    storage.opened_at = datetime.now(UTC) - timedelta(seconds=3)
    breaker = CircuitBreaker(storage=storage, open_for=5, jitter=0)
    with pytest.raises(CircuitOpen) as caught:
        breaker.call(works)
    assert caught.value.retry_after == pytest.approx(2, abs=1)
    old = memory()
    old.state = "open"
    old.opened_at = datetime.now(UTC) - timedelta(hours=3)
    breaker = CircuitBreaker(storage=old, open_for=5, jitter=0)
    breaker.call(works)  # a probe
    assert breaker.current_state == "half-open"


def test_an_open_state_without_a_time_counts_from_now(clock):
    storage = memory()
    storage.state = "open"
    breaker = CircuitBreaker(storage=storage, open_for=5, jitter=0)
    with pytest.raises(CircuitOpen) as caught:
        breaker.call(works)
    assert caught.value.retry_after == 5.0


def test_a_state_that_it_has_come_to_by_itself_meanwhile_is_not_told_again():
    breaker = CircuitBreaker(storage=memory())
    with capture_events() as seen:
        breaker.adopt("closed", 0.0, None)
    assert seen == []


def test_failures_in_a_row_are_counted_together(clock):
    storage = memory()
    one, two = pair(storage, consecutive=4)
    fail(one, 2)
    fail(two)
    assert storage.counter == 3
    with capture_events() as seen:
        fail(two)
    assert [(event.name, event.policy, event.reason) for event in seen] == [
        ("circuit.opened", "two", "consecutive")
    ]
    with pytest.raises(CircuitOpen):
        one.call(works)


def test_a_success_of_one_ends_the_row_of_both(clock):
    storage = memory()
    one, two = pair(storage, consecutive=3)
    fail(one, 2)
    two.call(works)
    assert storage.counter == 0
    fail(two, 2)
    assert (storage.counter, two.current_state) == (2, "closed")


def test_a_failure_from_before_a_close_does_not_open_it_again(clock):
    storage = memory()
    breaker, _ = pair(storage)

    def slow_failure():
        breaker.force_open()
        clock.sleep(1)
        breaker.close()
        clock.sleep(1)
        raise OSError("late")

    with pytest.raises(OSError, match="late"):
        breaker.call(slow_failure)
    assert (breaker.current_state, storage.state, storage.counter) == ("closed", "closed", 0)


class Broken(pybreaker.CircuitMemoryStorage):
    """A storage whose server is gone."""

    def __init__(self):
        super().__init__(pybreaker.STATE_CLOSED)
        self.gone = True

    @property
    def state(self):
        if getattr(self, "gone", False):
            raise ConnectionError("gone")
        return self._state

    @state.setter
    def state(self, state):
        if getattr(self, "gone", False):
            raise ConnectionError("gone")
        self._state = state

    @property
    def counter(self):
        raise ConnectionError("gone")

    def increment_counter(self):
        raise ConnectionError("gone")


def test_a_storage_that_raises_is_logged_and_disturbs_nobody(clock, caplog):
    breaker = CircuitBreaker(storage=Broken(), consecutive=2, open_for=5, jitter=0, probes=1, name="b")
    assert breaker.call(works) == "works"
    fail(breaker, 2)
    with pytest.raises(CircuitOpen):
        breaker.call(works)
    clock.sleep(5)
    assert breaker.call(works) == "works"
    assert breaker.current_state == "closed"
    assert caplog.records
    assert {record.getMessage() for record in caplog.records} == {"the storage 'memory' of b failed"}
    assert {record.levelno for record in caplog.records} == {logging.ERROR}


@BACKENDS
def test_a_storage_works_for_async_code(backend):
    async def main():
        storage = memory()
        one, two = pair(storage)

        async def abreaks():
            raise OSError("breaks")

        with pytest.raises(OSError, match="breaks"):
            await one.acall(abreaks)
        with pytest.raises(CircuitOpen):
            await two.acall(abreaks)

    run(main, backend=backend)


@pytest.mark.parametrize("storage", ["redis://", pybreaker.CircuitMemoryStorage])
def test_something_else_as_a_storage(storage):
    with pytest.raises(TypeError, match=r"storage=.* is not allowed; give a pybreaker.CircuitBreakerStorage"):
        CircuitBreaker(storage=storage)


# -- a breaker that is handed in ------------------------------------------------------------------------------


def test_it_decides(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=60)
    ours = CircuitBreaker(theirs, name="b")
    assert ours.call(works) == "works"
    fail(ours, 2)
    assert (theirs.fail_counter, ours.fail_counter, ours.current_state) == (2, 2, "closed")
    with capture_events(ours) as seen:
        fail(ours)  # the original error, also on the trip
    assert [(event.name, event.reason, event.open_for) for event in seen] == [
        ("circuit.opened", "pybreaker", 60.0)
    ]
    assert theirs.current_state == ours.current_state == ours.statistics().state == "open"
    clock.sleep(10)
    with pytest.raises(pybreaker.CircuitBreakerError) as caught:
        ours.call(works)
    assert isinstance(caught.value, CircuitOpen)
    assert caught.value.retry_after == 50.0
    assert (ours.statistics().rejected, ours.statistics().failures) == (1, 3)
    assert not ours.idle(0.0)


def test_it_is_shared_with_code_that_calls_it_directly(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=2)
    ours = CircuitBreaker(theirs)
    fail(ours)
    with pytest.raises(pybreaker.CircuitBreakerError):
        theirs.call(breaks)
    with pytest.raises(CircuitOpen):
        ours.call(works)
    theirs.close()
    assert ours.call(works) == "works"


def test_a_success_ends_the_row(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=2)
    ours = CircuitBreaker(theirs)
    for _ in range(5):
        fail(ours)
        ours.call(works)
    assert theirs.current_state == "closed"


def test_what_it_excludes_is_no_failure(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=1, exclude=[KeyError, lambda error: "fine" in str(error)])
    ours = CircuitBreaker(theirs)
    with pytest.raises(KeyError):
        ours.call({}.__getitem__, "missing")
    with pytest.raises(OSError, match="fine"):
        ours.call(lambda: (_ for _ in ()).throw(OSError("fine")))
    assert (theirs.current_state, theirs.fail_counter) == ("closed", 0)


@BACKENDS
def test_async_functions_open_it(backend):
    async def main():
        theirs = pybreaker.CircuitBreaker(fail_max=2)
        ours = CircuitBreaker(theirs)

        @ours
        async def fetch():
            await anyio.sleep(1)
            raise OSError("breaks")

        for _ in range(2):
            with pytest.raises(OSError, match="breaks"):
                await fetch()
        with pytest.raises(CircuitOpen):
            await fetch()
        return theirs.current_state, anyio.current_time()

    assert run(main, backend=backend) == ("open", 2.0)


def test_its_lock_is_not_held_during_the_call():
    theirs = pybreaker.CircuitBreaker()
    ours = CircuitBreaker(theirs)
    together = Barrier(4)
    met = []

    def work():
        together.wait(60)  # ends only if all four are in here at the same time
        met.append(1)

    threads = [Thread(target=lambda: ours.call(work)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [1] * 4


def test_its_listeners_are_told_once_for_each_call(clock):
    log = Log()
    theirs = pybreaker.CircuitBreaker(fail_max=2, reset_timeout=0, listeners=[log])
    ours = CircuitBreaker(theirs)
    ours.call(works)
    assert log.names() == ["before_call", "success"]
    log.told.clear()
    fail(ours, 2)
    assert log.names() == ["before_call", "failure", "before_call", "failure", "state_change"]
    log.told.clear()
    ours.call(works)  # the reset timeout is over at once: a probe
    assert log.names() == ["state_change", "before_call", "state_change", "success"]
    assert [entry[1:] for entry in log.told if entry[0] == "state_change"] == [
        ("open", "half-open"),
        ("half-open", "closed"),
    ]


def half_open(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0)
    ours = CircuitBreaker(theirs, probe_lease=10, name="b")
    theirs.open()
    return theirs, ours


def test_half_open_lets_one_probe_through(clock):
    theirs, ours = half_open(clock)
    inside = []

    def probe():
        for _ in range(3):
            with pytest.raises(CircuitOpen) as caught:
                ours.call(inside.append, 1)
            inside.append((caught.value.retry_after, theirs.current_state))
        return "well"

    with capture_events(ours) as seen:
        assert ours.call(probe) == "well"
    assert inside == [(10.0, "half-open")] * 3
    assert theirs.current_state == "closed"
    assert [event.name for event in seen] == ["circuit.half_opened"] + ["circuit.rejected"] * 3 + [
        "circuit.closed"
    ]


@BACKENDS
def test_50_tasks_run_one_probe(backend):
    async def main():
        theirs, ours = half_open(None)
        ran, refused = [], []

        async def probe():
            ran.append(1)
            await anyio.sleep(1)

        async def caller():
            try:
                await ours.acall(probe)
            except CircuitOpen:
                refused.append(1)

        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(caller)
        return len(ran), len(refused), theirs.current_state

    assert run(main, backend=backend) == (1, 49, "closed")


def test_a_bad_probe_opens_it_again_with_its_own_error(clock):
    theirs, ours = half_open(clock)
    fail(ours)
    assert theirs.current_state == "open"


@pytest.mark.parametrize("threshold", [1, 3])
def test_its_success_threshold_decides_how_many_probes_close_it(clock, threshold):
    theirs = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0, success_threshold=threshold)
    ours = CircuitBreaker(theirs)
    theirs.open()
    for _ in range(threshold):
        assert theirs.current_state != "closed"
        ours.call(works)
    assert theirs.current_state == "closed"


@BACKENDS
def test_cancellation_counts_as_nothing(backend):
    async def main():
        theirs, ours = half_open(None)
        for _ in range(3):
            with anyio.move_on_after(1) as scope:
                await ours.acall(anyio.sleep, 5)
            assert scope.cancelled_caught
            assert (theirs.current_state, theirs.fail_counter) == ("half-open", 0)
        await ours.acall(anyio.sleep, 0.1)
        assert theirs.current_state == "closed"
        with anyio.move_on_after(1):
            await ours.acall(anyio.sleep, 5)
        return theirs.current_state, ours.breaker.fail_counter

    assert run(main, backend=backend) == ("closed", 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), BulkheadFull("no", policy="p")])
def test_interrupts_and_refusals_count_as_nothing(clock, error):
    theirs = pybreaker.CircuitBreaker(fail_max=1)
    ours = CircuitBreaker(theirs)

    def stop():
        raise error

    with pytest.raises(type(error)):
        ours.call(stop)
    assert (theirs.current_state, theirs.fail_counter) == ("closed", 0)


def test_a_hung_probe_frees_its_place_and_comes_too_late(clock):
    theirs, ours = half_open(clock)
    first = Pipeline(Timeout(100), ours)

    def hang():
        clock.sleep(15)
        raise OSError("too late")

    def hung():
        with pytest.raises(OSError, match="too late"):
            first.call(hang)

    def next_one():
        clock.sleep(9)
        with pytest.raises(CircuitOpen) as caught:
            ours.call(works)
        clock.sleep(caught.value.retry_after)
        ours.call(works)
        return clock.now(), theirs.current_state

    assert clock.run_threads(hung, next_one) == [None, (10.0, "closed")]
    assert theirs.current_state == "closed"


def test_a_probe_that_comes_too_late_changes_nothing_while_others_probe(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=0, success_threshold=2)
    ours = CircuitBreaker(theirs, probe_lease=10)
    theirs.open()

    def hang():
        clock.sleep(15)
        raise OSError("too late")

    def hung():
        with pytest.raises(OSError, match="too late"):
            ours.call(hang)
        return theirs.current_state

    def next_one():
        clock.sleep(12)
        ours.call(works)

    assert clock.run_threads(hung, next_one) == ["half-open", None]
    ours.call(works)
    assert theirs.current_state == "closed"


@pytest.mark.parametrize("function", [works, breaks])
def test_a_result_from_before_a_change_changes_nothing(clock, function):
    theirs = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=60)
    ours = CircuitBreaker(theirs)

    def slow():
        theirs.open()
        theirs.close()
        return function()

    try:
        ours.call(slow)
    except OSError:
        pass
    assert theirs.current_state == "closed"

    def tripped():
        theirs.open()
        return "works"

    assert ours.call(tripped) == "works"
    assert theirs.current_state == "open"


def test_a_retry_of_an_abandoned_call_is_a_call_of_its_own(clock):
    """A sync timeout abandons the first attempt in its thread; both attempts are the same call."""
    theirs = pybreaker.CircuitBreaker(fail_max=3)
    guard = Pipeline(Retry(2, on=TimedOut, wait=0), Timeout(1), CircuitBreaker(theirs))
    attempts = []

    def hang_once():
        attempts.append(clock.now())
        if len(attempts) == 1:
            clock.sleep(1.5)
            raise OSError("late")
        clock.sleep(0.75)
        return "well"

    assert guard.call(hang_once) == "well"
    assert attempts == [0.0, 1.0]
    assert theirs.fail_counter == 0


def test_the_retry_of_an_abandoned_call_may_be_the_probe(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=3, reset_timeout=0)
    guard = Pipeline(Retry(2, on=TimedOut, wait=0), Timeout(1), CircuitBreaker(theirs))
    attempts = []

    def hang_once():
        attempts.append(theirs.current_state)
        if len(attempts) == 1:
            theirs.open()
            clock.sleep(1.5)
            raise OSError("late")
        clock.sleep(0.75)
        return "well"

    assert guard.call(hang_once) == "well"
    assert (attempts, theirs.current_state) == (["closed", "half-open"], "closed")


def test_changes_made_elsewhere_are_told_as_events(clock):
    theirs = pybreaker.CircuitBreaker(reset_timeout=30)
    ours = CircuitBreaker(theirs, name="b")
    with capture_events(ours) as seen:
        theirs.open()
        theirs.half_open()
        theirs.close()
    assert [event.name for event in seen] == ["circuit.opened", "circuit.half_opened", "circuit.closed"]
    assert {event.policy for event in seen} == {"b"}


def test_an_open_time_that_began_before_we_looked_is_unknown(clock):
    theirs = pybreaker.CircuitBreaker(reset_timeout=30)
    theirs.open()
    with pytest.raises(CircuitOpen) as caught:
        CircuitBreaker(theirs).call(works)
    assert caught.value.retry_after == 30.0


def test_a_policy_that_is_gone_is_not_told(clock):
    theirs = pybreaker.CircuitBreaker()
    with capture_events() as seen:
        ours = CircuitBreaker(theirs)
        del ours
        import gc

        gc.collect()
        theirs.open()
    assert seen == []


def test_other_options_have_no_effect_and_are_refused():
    theirs = pybreaker.CircuitBreaker()
    for options in (
        {"consecutive": 3},
        {"failure_rate": 0.1},
        {"on": OSError},
        {"open_for": 1},
        {"listeners": [Log()]},
        {"storage": memory()},
        {"slow": 1},
    ):
        (option,) = options
        with pytest.raises(ValueError, match=f"CircuitBreaker: {option}=.* is not allowed; give nothing"):
            CircuitBreaker(theirs, **options)
    CircuitBreaker(theirs, probe_lease=5, name="allowed")


@pytest.mark.parametrize("breaker", [5, "breaker", pybreaker.CircuitBreaker, memory()])
def test_something_else_as_a_breaker(breaker):
    with pytest.raises(TypeError, match=r"breaker=.* is not allowed; give a pybreaker.CircuitBreaker"):
        CircuitBreaker(breaker)


def test_a_function_in_its_place_is_told_about_the_parentheses():
    with pytest.raises(TypeError, match="To decorate a function write @CircuitBreaker"):
        CircuitBreaker(works)


def test_as_a_block(clock):
    theirs = pybreaker.CircuitBreaker(fail_max=1)
    ours = CircuitBreaker(theirs)
    with ours:
        pass
    with pytest.raises(OSError, match="block"), ours:
        raise OSError("block")
    assert theirs.current_state == "open"
    with pytest.raises(CircuitOpen), ours:
        raise AssertionError("never entered")
