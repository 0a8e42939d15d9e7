"""Test code that retries, waits and times out, without waiting.

    with virtual_time() as time:            # sync code: an hour of backoff passes in no time
        client.fetch("/")
        assert time.now() == 3600

    run(main, backend="trio")               # async code, on asyncio or trio, with a virtual clock
    run_both(scenario)                      # one scenario as sync code, on asyncio and on trio: equal traces

`flaky` makes functions that fail as told, `capture_events` collects what policies report. The pytest plugin
offers all of this as fixtures.
"""

import asyncio
import heapq
import inspect
import random
import selectors
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

from resilient import events, runtime
from resilient.events import Event
from resilient.policy import Policy
from resilient.ticket import Ticket

T = TypeVar("T")

Backend = Literal["asyncio", "trio"]

__all__ = ["Colour", "Flaky", "VirtualTime", "capture_events", "flaky", "run", "run_both", "virtual_time"]


class VirtualTime:
    """A clock that stands still while anything runs, and jumps when everything waits.

    Threads take part once they are started through `run_threads` (or by a sync `Timeout`). The clock jumps to
    the next moment at which one of them wakes when all of them sleep or wait.

    Args:
        start: The time at the beginning, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._changed = threading.Condition()
        self._sleepers: list[tuple[float, int, _Sleeper]] = []
        self._order = 0
        self._running = 1  # the thread that made the clock
        self._source: Callable[[], float] | None = None

    def now(self) -> float:
        """Return the virtual time in seconds."""
        return self._now if self._source is None else self._source()

    def advance(self, seconds: float) -> None:
        """Let time pass, as `sleep` does."""
        self.sleep(seconds)

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for so many virtual seconds; other threads wake in their order."""
        self._block(_Sleeper(), self._now + max(0.0, seconds))

    def wait(self, ticket: Ticket) -> bool:
        """Block the calling thread until the ticket is ready, granted or expired; tell whether it was granted."""
        if ticket.ready_at is not None:
            self.sleep(ticket.ready_at - self._now)
            return True
        sleeper = _Sleeper()
        if ticket.attach(lambda: self._wake(sleeper)):
            self._block(sleeper, ticket.expires_at)
        return ticket.granted

    def start_thread(self, function: Callable[[], object], name: str) -> None:
        """Run a function in a new thread that takes part in this time."""

        def body() -> None:
            try:
                function()
            finally:
                with self._changed:
                    self._running -= 1
                    self._jump()

        with self._changed:
            self._running += 1
        threading.Thread(target=body, name=name, daemon=True).start()

    def run_threads(self, *functions: Callable[[], T]) -> list[T]:
        """Run functions in threads of their own, all starting now, and return their results.

        Raises:
            BaseException: The first error, in the order of the functions, that one of them raised.
        """
        results: list[Any] = [None] * len(functions)
        errors: dict[int, BaseException] = {}
        done = Ticket()
        left = len(functions)

        def run_one(index: int) -> None:
            nonlocal left
            try:
                results[index] = functions[index]()
            except BaseException as error:
                errors[index] = error
            with self._changed:
                left -= 1
                last = left == 0
            if last:
                done.grant()

        for index in range(len(functions)):
            self.start_thread(lambda index=index: run_one(index), f"virtual-{index}")  # type: ignore[misc]
        if functions:
            self.wait(done)
        for index in sorted(errors):
            raise errors[index]
        return results

    def _block(self, sleeper: "_Sleeper", until: float | None) -> None:
        with self._changed:
            if sleeper.awake:
                return
            if until is not None:
                self._order += 1
                heapq.heappush(self._sleepers, (until, self._order, sleeper))
            sleeper.blocked = True
            self._running -= 1
            self._jump()
            while not sleeper.awake:
                self._changed.wait()

    def _wake(self, sleeper: "_Sleeper") -> None:
        with self._changed:
            if sleeper.awake:
                return
            sleeper.awake = True
            if sleeper.blocked:
                self._running += 1
            self._changed.notify_all()

    def _jump(self) -> None:
        """Wake the next sleeper if nobody runs; the caller holds the condition."""
        while self._running <= 0 and self._sleepers:
            until, _, sleeper = heapq.heappop(self._sleepers)
            if sleeper.awake:
                continue
            self._now = max(self._now, until)
            sleeper.awake = True
            self._running += 1
            self._changed.notify_all()


class _Sleeper:
    """A thread that sleeps or waits."""

    __slots__ = ("awake", "blocked")

    def __init__(self) -> None:
        self.awake = False
        self.blocked = False


@contextmanager
def virtual_time(start: float = 0.0, *, seed: int = 0) -> Iterator[VirtualTime]:
    """Replace the clock, sleep and randomness of the library for a block of sync code.

    Policies that were made before are affected too. Only the library's own waits become virtual: code of your
    own should sleep by `time.sleep` of the object this returns.

    Args:
        start: The time at the beginning, in seconds. Default 0.
        seed: Seed of all jitter. Default 0.

    Returns:
        A context manager of the `VirtualTime`.
    """
    clock = VirtualTime(start)
    with _installed(clock, seed):
        yield clock


@contextmanager
def _installed(clock: VirtualTime, seed: int) -> Iterator[None]:
    state = random.getstate()  # tenacity's strategies draw from the module, so the module is seeded
    random.seed(seed)
    previous = runtime.install(
        replace(
            runtime.Runtime(),
            now=clock.now,
            sleep=clock.sleep,
            wait=clock.wait,
            start_thread=clock.start_thread,
        )
    )
    try:
        yield
    finally:
        runtime.install(previous)
        random.setstate(state)


def run(
    function: Callable[..., Awaitable[T]],
    *args: Any,
    backend: Backend = "asyncio",
    start: float = 0.0,
    seed: int = 0,
) -> T:
    """Run an async function in an event loop whose clock jumps when all tasks wait.

    Args:
        function: The coroutine function.
        *args: Its arguments.
        backend: `"asyncio"` (the default) or `"trio"`.
        start: The time at the beginning, in seconds. Default 0.
        seed: Seed of all jitter. Default 0.

    Returns:
        What the function returns.

    Raises:
        ValueError: Another backend.
    """
    if backend not in ("asyncio", "trio"):
        raise ValueError(f"run: backend={backend!r} is not allowed; give 'asyncio' or 'trio'")
    clock = VirtualTime(start)
    with _installed(clock, seed):
        if backend == "trio":
            import trio
            import trio.testing

            mock = trio.testing.MockClock(autojump_threshold=0)
            clock._source = lambda: start + mock.current_time()
            return trio.run(function, *args, clock=mock)

        async def main() -> T:
            return await function(*args)

        with asyncio.Runner(loop_factory=lambda: _VirtualLoop(clock)) as runner:
            return runner.run(main())


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting for it."""

    def __init__(self, clock: VirtualTime) -> None:
        self._virtual = clock
        super().__init__(_JumpingSelector(clock))

    def time(self) -> float:
        return self._virtual._now


class _JumpingSelector(selectors.DefaultSelector):
    """Waits for files in no time, and lets virtual time pass instead."""

    def __init__(self, clock: VirtualTime) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # no timer at all: another thread has to wake this loop
            return super().select(None)
        ready = super().select(0)
        if not ready and timeout > 0:
            self._clock._now += timeout
        return ready


class Flaky:
    """A function that fails and succeeds as it is told.

    Attributes:
        calls: The arguments of each call, as pairs of `args` and `kwargs`.
    """

    def __init__(self, outcomes: tuple[Any, ...]) -> None:
        if not outcomes:
            raise ValueError("flaky: outcomes=() is not allowed; give at least one result or exception")
        self._outcomes = outcomes
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return or raise the next outcome; the last one is repeated."""
        index = min(len(self.calls), len(self._outcomes) - 1)
        self.calls.append((args, kwargs))
        outcome = self._outcomes[index]
        if isinstance(outcome, BaseException) or (
            isinstance(outcome, type) and issubclass(outcome, BaseException)
        ):
            raise outcome
        return outcome

    @property
    def asynchronous(self) -> Callable[..., Coroutine[Any, Any, Any]]:
        """The same as a coroutine function, counting in the same `calls`."""

        async def flaky(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return flaky


def flaky(*outcomes: Any) -> Flaky:
    """Make a function with scripted outcomes.

    Args:
        *outcomes: What each call returns, or raises if it is an exception (instance or class). The last one is
            repeated for ever.

    Returns:
        A function that records its `calls`; its attribute `asynchronous` is the async one.

    Raises:
        ValueError: No outcome at all.
    """
    return Flaky(outcomes)


@contextmanager
def capture_events(policy: Policy | None = None) -> Iterator[list[Event]]:
    """Collect the events that are emitted in a block.

    Args:
        policy: Collect only the events of this policy or pipeline. Default None: those of all policies.

    Returns:
        A context manager of the list that the events are added to.
    """
    collected: list[Event] = []
    with policy.listen(collected.append) if policy is not None else events.listen(collected.append):
        yield collected


class Colour:
    """What a scenario of `run_both` works with: the same operations as sync code, on asyncio and on trio.

    Attributes:
        name: `"sync"`, `"asyncio"` or `"trio"`.
    """

    def __init__(self, name: str, clock: VirtualTime | None) -> None:
        self.name = name
        self._clock = clock

    def now(self) -> float:
        """Return the virtual time in seconds."""
        return runtime.now()

    async def sleep(self, seconds: float) -> None:
        """Let so many virtual seconds pass."""
        if self._clock is not None:
            self._clock.sleep(seconds)
        else:
            await runtime.asleep(seconds)

    async def call(self, policy: Policy, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function under a policy, in this colour.

        Args:
            policy: The policy or pipeline.
            function: A sync function, a `flaky` one, or an async function that only awaits operations of this
                object; it is run in the colour of the scenario.
            *args: Its arguments.
            **kwargs: Its keyword arguments.
        """
        if self._clock is not None:
            return policy.call(self.function(function), *args, **kwargs)
        return await policy.acall(self.function(function), *args, **kwargs)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function in this colour; an async one may only await operations of this object."""
        if not inspect.iscoroutinefunction(function):
            return function if self._clock is not None else _as_async(function)
        return _as_sync(function) if self._clock is not None else function

    async def gather(self, *functions: Callable[[], Awaitable[Any]]) -> list[Any]:
        """Run async functions at the same time, in threads or in tasks, and return their results."""
        if self._clock is not None:
            return self._clock.run_threads(*(_as_sync(function) for function in functions))
        import anyio

        results: list[Any] = [None] * len(functions)

        async def run_one(index: int) -> None:
            results[index] = await functions[index]()

        async with anyio.create_task_group() as group:
            for index in range(len(functions)):
                group.start_soon(run_one, index)
        return results


def _as_async(function: Callable[..., Any]) -> Callable[..., Any]:
    async def recoloured(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return recoloured


def _as_sync(function: Callable[..., Any]) -> Callable[..., Any]:
    def recoloured(*args: Any, **kwargs: Any) -> Any:
        return _finish(function(*args, **kwargs))

    return recoloured


def _finish(coroutine: Any) -> Any:
    """Run a coroutine that never really waits, because everything it awaits is sync code in disguise."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise RuntimeError("a scenario may only await the operations of the Colour object it is given")


_SYNC_ONLY = frozenset({events.ThreadAbandoned.name, events.ThreadsRejected.name})
"""Events about the threads of a sync `Timeout`, which no async code has."""


def run_both(scenario: Callable[[Colour], Awaitable[T]], *, seed: int = 0) -> list[tuple[str, float]]:
    """Run one scenario as sync code, on asyncio and on trio, and check that all three see the same.

    The scenario makes its policies itself, so that each run has fresh ones.

    Args:
        scenario: A coroutine function of a `Colour`.
        seed: Seed of all jitter. Default 0.

    Returns:
        The trace: names and times of the events that the scenario caused, without those about threads, which
        only sync code has.

    Raises:
        AssertionError: The colours differ in what the scenario returns, or in their events.
    """
    outcomes: dict[str, tuple[Any, list[tuple[str, float]]]] = {}
    for name in ("sync", "asyncio", "trio"):
        with capture_events() as seen:
            if name == "sync":
                with virtual_time(seed=seed) as clock:
                    result = _finish(scenario(Colour(name, clock)))
            else:
                result = run(scenario, Colour(name, None), backend=name, seed=seed)  # type: ignore[arg-type]
        trace = [(event.name, round(event.at, 6)) for event in seen if event.name not in _SYNC_ONLY]
        outcomes[name] = (result, trace)
    sync = outcomes["sync"]
    for name in ("asyncio", "trio"):
        if outcomes[name] != sync:
            raise AssertionError(f"sync and {name} differ:\n  sync: {sync}\n  {name}: {outcomes[name]}")
    return sync[1]
