"""What a circuit breaker remembers, by numbers."""

import sys
from threading import Barrier, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.windows import Counts, CountWindow, Streak, TimeWindow


def test_a_time_window_counts_calls_failures_and_slow_ones():
    window = TimeWindow(10)
    assert window.counts(0.0) == Counts(0, 0, 0)
    window.success(0.0)
    window.record(0.5, failed=True, slow=False)
    window.record(1.0, failed=False, slow=True)
    window.record(2.0, failed=True, slow=True)
    assert window.counts(2.0) == Counts(4, 2, 2)


def test_a_time_window_drops_slice_by_slice():
    window = TimeWindow(10)
    for second in range(10):
        window.success(float(second))
        window.record(second + 0.5, failed=True, slow=False)
    assert window.counts(9.99) == Counts(20, 10, 0)
    assert window.counts(10.0) == Counts(18, 9, 0)
    assert window.counts(10.99) == Counts(18, 9, 0)
    assert window.counts(14.0) == Counts(10, 5, 0)
    assert window.counts(18.99) == Counts(2, 1, 0)
    assert window.counts(19.0) == Counts(0, 0, 0)


def test_a_long_pause_empties_a_time_window():
    window = TimeWindow(10)
    window.success(0.0)
    window.record(1e9, failed=True, slow=False)
    assert window.counts(1e9) == Counts(1, 1, 0)


def test_a_time_window_works_before_zero():
    window = TimeWindow(10)
    window.record(-95.5, failed=True, slow=False)
    window.success(-90.0)
    assert window.counts(-86.5) == Counts(2, 1, 0)
    assert window.counts(-86.0) == Counts(1, 0, 0)


def test_a_time_window_forgets_when_told_to():
    window = TimeWindow(10)
    window.success(0.0)
    window.record(0.0, failed=True, slow=True)
    window.reset()
    assert window.counts(0.0) == Counts(0, 0, 0)
    window.success(0.0)
    assert window.counts(0.0) == Counts(1, 0, 0)


@settings(deadline=None)
@given(
    st.sampled_from([0.5, 1.0, 30.0]),
    st.lists(
        st.tuples(st.floats(0, 20), st.sampled_from(["success", "fast", "failed", "slow", "both"])), max_size=60
    ),
)
def test_a_time_window_equals_a_list_of_outcomes(seconds, steps):
    window = TimeWindow(seconds)
    length = seconds / 10
    now, log = 0.0, []
    for pause, outcome in steps:
        now += pause * length
        if outcome == "success":
            window.success(now)
        else:
            window.record(now, failed=outcome in ("failed", "both"), slow=outcome in ("slow", "both"))
        log.append((now // length, outcome))
        inside = [kind for number, kind in log if number > now // length - 10]
        failed = sum(kind in ("failed", "both") for kind in inside)
        slow = sum(kind in ("slow", "both") for kind in inside)
        assert window.counts(now) == Counts(len(inside), failed, slow)


def test_a_count_window_keeps_the_last_calls():
    window = CountWindow(3)
    window.record(0.0, failed=True, slow=False)
    window.record(0.0, failed=True, slow=True)
    window.record(0.0, failed=False, slow=True)
    assert window.counts(0.0) == Counts(3, 2, 2)
    window.success(0.0)
    assert window.counts(1e9) == Counts(3, 1, 2)
    window.success(0.0)
    window.success(0.0)
    assert window.counts(0.0) == Counts(3, 0, 0)
    window.reset()
    assert window.counts(0.0) == Counts(0, 0, 0)


def test_a_streak_counts_the_failures_since_the_last_success():
    streak = Streak()
    assert streak.counts(0.0) == Counts(0, 0, 0)
    streak.record(0.0, failed=True, slow=True)
    streak.record(99.0, failed=True, slow=False)
    assert streak.counts(1e9) == Counts(2, 2, 0)
    streak.success(0.0)
    assert streak.counts(0.0) == Counts(0, 0, 0)
    streak.record(0.0, failed=True, slow=False)
    streak.record(0.0, failed=False, slow=False)
    assert streak.counts(0.0) == Counts(0, 0, 0)
    streak.record(0.0, failed=True, slow=False)
    streak.reset()
    assert streak.counts(0.0) == Counts(0, 0, 0)


@pytest.mark.parametrize("window", [TimeWindow(10), CountWindow(100_000)], ids=["time", "count"])
def test_successes_of_many_threads_are_all_counted(window):
    start = Barrier(8)

    def work(number):
        start.wait()
        for turn in range(2_000):
            window.success(turn // 250 + number / 16)  # the slices turn under way, by all threads at once

    threads = [Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert window.counts(8.0) == Counts(16_000, 0, 0)


def test_threads_that_turn_to_a_new_slice_at_the_same_time_get_the_same_one():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            window = TimeWindow(10)
            start = Barrier(8)

            def work(window=window, start=start):
                for second in range(10):
                    start.wait()
                    window.success(float(second))

            threads = [Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert window.counts(9.0) == Counts(80, 0, 0)
    finally:
        sys.setswitchinterval(before)
