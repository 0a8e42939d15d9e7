import contextvars
import gc
import threading
import weakref
from queue import Empty

import pytest

from resilient import runtime, workers


@pytest.fixture(autouse=True)
def no_workers():
    """Start with no idle worker, and leave none of those that waited before in the way."""
    before = list(workers._idle)
    workers._idle.clear()
    yield
    workers._idle.clear()
    workers._idle.extend(before)


def job(function=lambda: None, expires_at=None):
    return workers.Job(function, contextvars.copy_context(), expires_at)


def run(function):
    made = job(function)
    workers.start(made)
    assert runtime.wait(made.ticket)
    return made


def idle_worker():
    """Wait until the worker of the last job has lain down."""
    while not workers._idle:
        threading.Event().wait(0)
    return workers._idle[0]


def test_an_outcome_is_kept():
    assert run(lambda: 3).outcome() == 3
    error = OSError("down")

    def fail():
        raise error

    failed = run(fail)
    with pytest.raises(OSError, match="down") as caught:
        failed.outcome()
    assert caught.value is error
    with pytest.raises(KeyboardInterrupt):
        run(lambda: (_ for _ in ()).throw(KeyboardInterrupt)).outcome()


def test_a_worker_takes_the_next_job():
    first = run(threading.current_thread).outcome()
    idle_worker()
    assert run(threading.current_thread).outcome() is first
    idle_worker()


def test_a_busy_worker_does_not():
    block = threading.Event()
    blocked = job(block.wait)
    workers.start(blocked)
    assert run(threading.current_thread).outcome() is not None
    assert not blocked.finished
    block.set()
    assert runtime.wait(blocked.ticket)
    assert blocked.finished


def test_jobs_see_the_context_they_were_given():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    assert run(variable.get).outcome() == 7


def test_callbacks_when_finished():
    called = []
    made = job()
    made.when_finished(lambda: called.append("waiting"))
    assert called == []
    made.run()
    assert called == ["waiting"]
    made.when_finished(lambda: called.append("late"))
    assert called == ["waiting", "late"]


class Jobs:
    """A queue whose waiting ends as the test says."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)

    def get(self, timeout):
        assert timeout == workers._IDLE_SECONDS
        outcome = self.outcomes.pop(0)
        if outcome is Empty:
            raise Empty
        return outcome


def test_an_idle_worker_ends():
    worker = workers._Worker(job())
    worker._jobs = Jobs(job(), Empty)
    worker.loop()
    assert not workers._idle
    assert worker._jobs.outcomes == []


def test_a_worker_that_is_taken_while_it_ends_stays_for_the_job():
    late = job(lambda: "done")

    class Racing(Jobs):
        def get(self, timeout):
            if self.outcomes[0] is Empty and len(self.outcomes) == 3:
                assert workers._idle.pop() is worker  # somebody takes it just as its time is up
            return super().get(timeout)

    worker = workers._Worker(job())
    worker._jobs = Racing(job(), Empty, late, Empty)
    worker.loop()
    assert late.outcome() == "done"
    assert worker._jobs.outcomes == []


def test_an_idle_worker_keeps_nothing_alive():
    class Result:
        pass

    made = run(Result)
    gone = weakref.ref(made.outcome())
    idle_worker()
    del made
    gc.collect()
    assert gone() is None


def test_an_error_does_not_keep_itself_alive():
    class Loud(Exception):
        pass

    def fail():
        raise Loud

    made = run(fail)
    idle_worker()
    try:
        made.outcome()
    except Loud as error:
        gone = weakref.ref(error)
    del made
    gc.collect()
    assert gone() is None


def test_under_another_runtime_every_job_gets_a_thread_of_that(monkeypatch):
    started = []
    monkeypatch.setattr(runtime, "start_thread", lambda function, name: started.append(name) or function())
    made = job(lambda: 5)
    workers.start(made)
    assert made.outcome() == 5
    assert started == ["resilient-worker"]
