"""Threads that can be abandoned: how a sync call gets a time limit.

A running thread cannot be interrupted from outside. A call with a limit therefore runs in a worker thread
while its caller waits, and is left behind when the time is up. Workers are daemon threads, so an abandoned
one never keeps the interpreter from ending, and a worker whose job ended takes the next one: handing a job to
a waiting thread costs half of starting a new one.
"""

import contextvars
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from resilient import runtime
from resilient.ticket import Ticket

_IDLE_SECONDS = 30.0

_idle: "deque[_Worker]" = deque()


class Job:
    """A function that runs in a worker thread, and what became of it.

    Args:
        function: What to run, without arguments.
        context: The context variables that it sees.
        expires_at: The time (seconds of `runtime.now()`) at which its caller stops waiting.
    """

    def __init__(
        self, function: Callable[[], Any], context: contextvars.Context, expires_at: float | None
    ) -> None:
        self.ticket = Ticket(expires_at=expires_at)
        self.started_at = runtime.now()
        self._function = function
        self._context = context
        self._lock = threading.Lock()
        self._finished = False
        self._callbacks: list[Callable[[], object]] = []

    def run(self) -> None:
        """Run the function and keep its result or its error in the ticket; called in the worker."""
        try:
            self.ticket.value = self._context.run(self._function)
        except BaseException as error:
            self.ticket.error = error
        with self._lock:
            self._finished = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
        self.ticket.grant()

    def when_finished(self, callback: Callable[[], object]) -> None:
        """Call back once the thread has really ended its work: at once if it has already."""
        with self._lock:
            if not self._finished:
                self._callbacks.append(callback)
                return
        callback()

    @property
    def finished(self) -> bool:
        """Whether the function has returned or raised."""
        return self._finished

    def outcome(self) -> Any:
        """Return what the function returned, or raise what it raised."""
        error = self.ticket.error
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # or the error's traceback would keep itself alive through this frame
        return self.ticket.value


class _Worker:
    """A daemon thread that runs one job after the other."""

    def __init__(self, job: Job) -> None:
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self.submit(job)

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def loop(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:  # somebody took this worker just now: its job is on the way
                    continue
                return
            job.run()
            del job  # or an idle worker would keep the last result alive
            _idle.append(self)


def start(job: Job) -> None:
    """Run a job in an idle worker, or in a new one."""
    if runtime.start_thread is not runtime.start_daemon:
        runtime.start_thread(job.run, "resilient-worker")  # virtual time follows every thread from its start
        return
    try:
        _idle.pop().submit(job)
    except IndexError:
        runtime.start_thread(_Worker(job).loop, "resilient-worker")


os.register_at_fork(after_in_child=_idle.clear)  # threads do not survive a fork
