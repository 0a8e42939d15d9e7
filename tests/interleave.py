"""A seeded interleaver: runs coroutines by hand, in every order that chance comes up with.

There is no event loop. A handful of coroutines is driven by `send` and `throw`; at each await a seeded choice
decides who goes on, and one step in ten cancels somebody instead, wherever he waits. When all sleep, virtual
time jumps. The same seed gives the same run, so a failure is one number.

    def setup(world):                      # makes the coroutines of one run, all on the same fresh state
        world.spawn(caller()); world.spawn(caller())
        return check                       # called when all have ended

    explore(setup, runs=100_000)           # AssertionError: seed 4711: ...
    explore(setup, seeds=[4711])           # the same once more
"""

import contextvars
import gc
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from types import coroutine
from typing import Any

from resilient import runtime
from resilient.ticket import Ticket

_MASK = (1 << 64) - 1
_CANCELLED_ONE_IN = 10


class Task:
    """A coroutine, and how it ended.

    Attributes:
        error: Its `CancelledError`, or None.
        expected: How it may fail otherwise; every other error ends the run.
        cancelled: Called when it was cancelled, even before its first step.
        until: The time at which it wakes by itself, while it sleeps.
        ticket: What it waits for, or None.
    """

    __slots__ = ("cancelled", "coroutine", "error", "expected", "ticket", "until")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], expected: tuple[type[Exception], ...]) -> None:
        self.coroutine = coroutine
        self.expected = expected
        self.error: CancelledError | None = None
        self.cancelled: Callable[[], object] = _nothing
        self.until = 0.0
        self.ticket: Ticket | None = None


class World:
    """The coroutines of one run, and their time.

    Attributes:
        time: Virtual time in seconds.
        tasks: All coroutines of the run.
        running: The one that runs.
        waited: Tickets in the order in which they were waited for.
        woken: Tickets in the order in which they were granted.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self._state = 0
        self.begin(0)

    def begin(self, seed: int) -> None:
        """Start anew, with the choices of another seed."""
        self._state = (seed * 0x9E3779B97F4A7C15 + 0x1234567) & _MASK
        self.tasks: list[Task] = []
        self.ready: list[Task] = []
        self.sleeping: list[Task] = []
        self.running: Any = None
        self.waited: list[Ticket] = []
        self.woken: list[Ticket] = []

    def draw(self, below: int) -> int:
        """Return a number from 0 up to `below`, from the choices of the seed."""
        self._state = state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK
        return (state >> 33) % below

    def spawn(self, coroutine: Coroutine[Any, Any, Any], *expected: type[Exception]) -> Task:
        """Add a coroutine to the run, and say how it may fail."""
        task = Task(coroutine, expected)
        self.tasks.append(task)
        self.ready.append(task)
        return task

    def run(self) -> None:
        """Run all coroutines to their ends, in an order that depends on the seed alone."""
        ready, sleeping = self.ready, self.sleeping
        try:
            while ready or sleeping:
                state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK
                self._state = state
                draw = state >> 33
                cancelled = draw % _CANCELLED_ONE_IN == 0
                draw //= _CANCELLED_ONE_IN
                if cancelled and sleeping and draw % (len(ready) + len(sleeping)) >= len(ready):
                    task = sleeping.pop(draw % len(sleeping))
                elif ready:
                    task = ready.pop(draw % len(ready))
                else:
                    self._jump()
                    continue
                self.running = task
                try:
                    until = task.coroutine.throw(CancelledError()) if cancelled else task.coroutine.send(None)
                except StopIteration:
                    pass
                except CancelledError as error:
                    task.error = error
                    task.cancelled()
                except AssertionError:
                    raise
                except Exception as error:
                    if isinstance(error, task.expected):
                        continue
                    raise AssertionError(f"a coroutine ended with {error!r}") from error
                else:
                    if until is None:
                        ready.append(task)
                    else:
                        task.until = until
                        sleeping.append(task)
        finally:
            for task in ready + sleeping:
                task.coroutine.close()

    def _jump(self) -> None:
        """Let time pass until somebody wakes."""
        first = min(task.until for task in self.sleeping)
        assert first < inf, f"{len(self.sleeping)} of {len(self.tasks)} coroutines wait for ever"
        self.time = max(self.time, first)
        for task in [task for task in self.sleeping if task.until <= first]:
            self.sleeping.remove(task)
            self.ready.append(task)

    def now(self) -> float:
        return self.time

    @coroutine
    def pause(self) -> Iterator[Any]:
        """Let others go on."""
        yield None

    @coroutine
    def asleep(self, seconds: float) -> Iterator[Any]:
        """Suspend the coroutine for so many virtual seconds."""
        yield self.time + seconds

    @coroutine
    def await_ticket(self, ticket: Ticket) -> Iterator[Any]:
        """Suspend the coroutine until the ticket is ready, granted or expired."""
        if ticket.ready_at is not None:
            yield ticket.ready_at
            return True
        task = self.running

        def wake() -> None:
            self.woken.append(ticket)
            if task in self.sleeping:
                self.sleeping.remove(task)
                self.ready.append(task)

        if ticket.attach(wake):
            self.waited.append(ticket)
            task.ticket = ticket
            try:
                yield inf if ticket.expires_at is None else ticket.expires_at
            finally:
                task.ticket = None
        return ticket.granted

    def start_task(
        self,
        function: Callable[[], Coroutine[Any, Any, object]],
        _context: contextvars.Context,
        cancelled: Callable[[], object],
    ) -> None:
        self.spawn(function()).cancelled = cancelled

    def overtaken(self) -> bool:
        """Tell whether anybody waits for a ticket that nobody has granted yet."""
        return any(task.ticket is not None and not task.ticket.granted for task in self.sleeping)


def _nothing() -> None:
    pass


@contextmanager
def _installed(world: World) -> Iterator[None]:
    gc.freeze()  # what was there before need not be looked at again and again
    previous = runtime.install(
        replace(
            runtime.Runtime(),
            now=world.now,
            asleep=world.asleep,
            await_ticket=world.await_ticket,
            start_task=world.start_task,
            random=lambda low, high: low + (high - low) * world.draw(1024) / 1023,
        )
    )
    try:
        yield
    finally:
        runtime.install(previous)
        gc.unfreeze()


def explore(
    setup: Callable[[World], Callable[[], None]], *, runs: int = 100_000, seeds: Iterable[int] | None = None
) -> int:
    """Run a scenario once for each seed.

    Args:
        setup: Spawns the coroutines of a run, on state that does not depend on earlier runs, and returns a
            function that checks what they leave behind.
        runs: How many seeds, from 0.
        seeds: These seeds instead.

    Returns:
        How many runs there were.

    Raises:
        AssertionError: A check failed; the message begins with the seed.
    """
    world = World()
    done = 0
    with _installed(world):
        for done, seed in enumerate(range(runs) if seeds is None else seeds, 1):  # noqa: B007 - the last one counts
            world.begin(seed)
            world.time = 10_000.0 * (seed + 1)  # far from the run before, and the same when run by itself
            try:
                check = setup(world)
                world.run()
                check()
            except AssertionError as error:
                message = f"seed {seed}: {error} (run it again: explore({setup.__qualname__}, seeds=[{seed}]))"
                raise AssertionError(message) from error
    return done
