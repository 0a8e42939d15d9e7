"""The counter that many threads add to without a lock."""

from threading import Barrier, Thread

from resilient.counter import Counter


def test_it_counts_and_reading_does_not_count():
    counter = Counter()
    assert counter.value == 0
    counter.add()
    counter.add()
    assert [counter.value, counter.value, counter.value] == [2, 2, 2]
    counter.add()
    assert counter.value == 3


def test_no_addition_of_any_thread_is_lost_while_others_read():
    counter = Counter()
    start = Barrier(8)
    seen = []

    def work():
        start.wait()
        for _ in range(2_000):
            counter.add()
            seen.append(counter.value)

    threads = [Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.value == 16_000
    assert max(seen) <= 16_000 + 8  # a reading may be off by those who read at the same time
