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
import functools
import heapq
import inspect
import itertools
import random
import selectors
import threading
from collections import deque
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

    Threads take part if they are started through `run_threads`, or by the library (a sync `Timeout`, a
    background refresh). One of them runs at a time, and the next one takes over where it sleeps, waits or
    ends: the same test takes the same steps each time. When all of them sleep or wait, the clock jumps to the
    moment at which the first one wakes.

    Args:
        start: The time at the beginning, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._mock: Any = None  # trio's own virtual clock, while trio runs
        self._changed = threading.Condition()
        self._asleep: list[tuple[float, int, _Turn]] = []
        self._ready: deque[_Turn] = deque()
        self._somebody_runs = True
        self._order = itertools.count()
        self._members = {threading.get_ident()}

    def now(self) -> float:
        """Return the virtual time in seconds."""
        return self._now if self._mock is None else self._now + self._mock.current_time()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for so many virtual seconds."""
        if self._mock is not None:
            self._mock.jump(max(0.0, seconds))
        elif threading.get_ident() not in self._members:
            self._now += max(0.0, seconds)  # a thread that nobody waits for cannot be put in an order
        else:
            self._block(_Turn(), self._now + max(0.0, seconds))

    def wait(self, ticket: Ticket) -> bool:
        """Block the calling thread until the ticket is ready, granted or expired; tell whether it was granted."""
        if ticket.ready_at is not None:
            self.sleep(ticket.ready_at - self.now())
            return True
        if threading.get_ident() not in self._members:
            return runtime.Runtime().wait(ticket)
        turn = _Turn()
        if ticket.attach(lambda: self._wake(turn)):
            self._block(turn, ticket.expires_at)
        return ticket.granted

    def start_thread(self, function: Callable[[], object], name: str) -> None:
        """Run a function in a new thread that takes part in this time."""
        turn = _Turn()
        turn.blocked = True

        def body() -> None:
            with self._changed:
                self._members.add(threading.get_ident())
                self._changed.wait_for(lambda: turn.has_come)
            try:
                function()
            finally:
                with self._changed:
                    self._members.discard(threading.get_ident())
                    self._next()

        threading.Thread(target=body, name=name, daemon=True).start()
        self._wake(turn)

    def run_threads(self, *functions: Callable[[], T]) -> list[T]:
        """Run functions in threads of their own, in turns, and return their results when all have ended.

        Raises:
            BaseException: The first error, in the order of the functions, that one of them raised.
        """
        results: list[Any] = [None] * len(functions)
        errors: dict[int, BaseException] = {}
        ended: list[int] = []
        all_ended = Ticket()

        def run_one(index: int) -> None:
            try:
                results[index] = functions[index]()
            except BaseException as error:
                errors[index] = error
            ended.append(index)
            if len(ended) == len(functions):
                all_ended.grant()

        for index in range(len(functions)):
            self.start_thread(functools.partial(run_one, index), f"virtual-{index}")
        if functions:
            self.wait(all_ended)
        for index in sorted(errors):
            raise errors[index]
        return results

    def _block(self, turn: "_Turn", until: float | None) -> None:
        with self._changed:
            if turn.awake:
                return
            if until is not None:
                heapq.heappush(self._asleep, (until, next(self._order), turn))
            turn.blocked = True
            self._next()
            self._changed.wait_for(lambda: turn.has_come)

    def _wake(self, turn: "_Turn") -> None:
        with self._changed:
            if turn.awake:
                return
            turn.awake = True
            if turn.blocked:
                self._ready.append(turn)
            if not self._somebody_runs:
                self._next()

    def _next(self) -> None:
        """Give the turn to the next thread; the caller holds the condition and has ended its own turn."""
        while not self._ready and self._asleep:
            until, _, turn = heapq.heappop(self._asleep)
            if not turn.awake:
                self._now = max(self._now, until)
                turn.awake = True
                self._ready.append(turn)
        self._somebody_runs = bool(self._ready)
        if self._ready:
            self._ready.popleft().has_come = True
            self._changed.notify_all()


class _Turn:
    """The next turn of a thread that sleeps, waits or has yet to start."""

    __slots__ = ("awake", "blocked", "has_come")

    def __init__(self) -> None:
        self.awake = False  # it no longer waits for anything but its turn
        self.blocked = False
        self.has_come = False


@contextmanager
def virtual_time(start: float = 0.0, *, seed: int = 0) -> Iterator[VirtualTime]:
    """Replace the clock, sleep and randomness of the library for a block of sync code.

    Policies that were made before are affected too. Only the library's own waits become virtual: code of your
    own sleeps by the `sleep` of the object that this returns.

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

            clock._mock = trio.testing.MockClock(autojump_threshold=0)
            return trio.run(function, *args, clock=clock._mock)

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

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await super().shutdown_default_executor()  # without the timer, to which the clock would jump at once


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
        self._recoloured: dict[Callable[..., Any], Callable[..., Any]] = {}

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
        """Return a function in this colour, the same each time; it may only await operations of this object."""
        if inspect.iscoroutinefunction(function) == (self._clock is None):
            return function
        if function not in self._recoloured:
            self._recoloured[function] = _as_sync(function) if self._clock is not None else _as_async(function)
        return self._recoloured[function]

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
