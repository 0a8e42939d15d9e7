"""The counter that many threads add to without a lock."""

import sys
from threading import Barrier, Thread

import pytest

from resilient.counter import Counter


def test_it_counts_and_reading_does_not_count():
    counter = Counter()
    assert counter.value == 0
    counter.add()
    counter.add()
    assert [counter.value, counter.value, counter.value] == [2, 2, 2]
    counter.add()
    assert counter.value == 3


@pytest.fixture
def impatient():
    """Let threads take turns after each few operations."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_no_addition_of_any_thread_is_lost_while_others_read(impatient):
    counter = Counter()
    start = Barrier(8)
    seen = [[] for _ in range(8)]

    def work(readings):
        start.wait()
        for _ in range(2_000):
            counter.add()
            readings.append(counter.value)

    threads = [Thread(target=work, args=[readings]) for readings in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == 16_000
    assert max(map(max, seen)) == 16_000
    assert all(
        readings == sorted(set(readings)) for readings in seen
    )  # each saw its own additions, and no fewer later
