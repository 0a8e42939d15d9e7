"""The fifth kind of policies: it runs copies of a call beside each other; see `resilient.kinds`."""

import contextvars
from abc import abstractmethod
from functools import partial
from typing import Any

import anyio

from resilient import deadline, events, runtime, workers
from resilient.call import AsyncNext, Call, Next
from resilient.edge import Edge
from resilient.policy import Policy
from resilient.ticket import Ticket


class Race(Policy):
    """A policy that starts the same call again while the first copy still runs; the first result wins.

    Losers are cancelled; in sync code they are abandoned in their threads. If all copies fail, the error of
    the first copy is raised.
    """

    @abstractmethod
    def next_start(self, call: Call, started: int) -> float | None:
        """Return the seconds to wait until another copy starts, or None if `started` copies are enough."""

    def link(self, nxt: Next, edge: Edge) -> Next:
        def start(call: Call) -> workers.Job:
            copy = call.copy()
            job = workers.Job(lambda: nxt(copy), contextvars.copy_context(), None)
            workers.start(job)
            return job

        def decide(call: Call, jobs: list[workers.Job]) -> workers.Job:
            failed = 0
            while True:
                ended = [job for job in jobs if job.finished]
                # A result wins, and so does an interrupt, which is for the caller and not a failure.
                won = next((job for job in ended if not isinstance(job.ticket.error, Exception)), None)
                if won is not None:
                    return won
                delay = self.next_start(call, len(jobs))
                if delay is None and len(ended) == len(jobs):
                    return jobs[0]
                if delay is not None and len(ended) > failed:
                    delay = 0.0  # there is no point in waiting for a copy that has failed
                failed = len(ended)
                ticket = Ticket(expires_at=deadline.tightest(None if delay is None else runtime.now() + delay))
                for job in jobs:
                    if job not in ended:
                        job.when_finished(ticket.grant)
                if delay == 0 or not runtime.wait(ticket):
                    deadline.check()
                    if delay is None:
                        continue  # the clock has not quite come to the deadline
                    jobs.append(start(call))
                    self.emit(events.RaceStarted, copy=len(jobs))

        def race(call: Call) -> Any:
            jobs = [start(call)]
            decided = None
            try:
                decided = decide(call, jobs)
                return decided.outcome()
            finally:
                call.abandoned += tuple(job for job in jobs if not job.finished)
                for job in jobs:
                    if job is not decided:
                        job.when_finished(partial(release, job))

        def release(job: workers.Job) -> None:
            edge.discard(job.ticket.value if job.ticket.error is None else job.ticket.error)

        return race

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        async def race(call: Call) -> Any:
            results: list[Any] = []
            errors: dict[int, Exception] = {}
            started = 0
            ended = anyio.Event()

            async def run(number: int) -> None:
                try:
                    result = await nxt(call.copy())
                except Exception as error:
                    errors[number] = error
                else:
                    results.append(result)
                ended.set()

            try:
                async with anyio.create_task_group() as group:
                    failed = 0
                    while not results:
                        delay = self.next_start(call, started) if started else 0.0
                        if delay is None and len(errors) == started:
                            break
                        if delay is not None and len(errors) > failed:
                            delay = 0.0
                        failed = len(errors)
                        if delay != 0:
                            ended = anyio.Event()
                            with anyio.move_on_after(delay):
                                await ended.wait()
                                continue
                        group.start_soon(run, started)
                        started += 1
                        if started > 1:
                            self.emit(events.RaceStarted, copy=started)
                    group.cancel_scope.cancel()
            except BaseExceptionGroup as group_error:
                if len(group_error.exceptions) == 1:
                    raise group_error.exceptions[0] from None  # an interrupt of a copy, as itself
                raise
            for loser in results[1:] + [error for number, error in errors.items() if results or number]:
                await edge.adiscard(loser)
            if results:
                return results[0]
            raise errors[0]

        return race
