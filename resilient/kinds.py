"""The five shapes that a policy can have, each written in both colours, side by side.

A policy is made of pure hooks: numbers in, decisions out. The kinds turn hooks into closures that read the
clock, wait and call on. They are the only place that knows sync from async: a new policy writes hooks only.

| kind  | it decides                               | policies                             |
|-------|------------------------------------------|--------------------------------------|
| Gate  | whether a call may start                 | circuit breaker, rate limit, bulkhead, load shed |
| Loop  | whether a failed call is made again      | retry                                |
| Scope | how long a call may take                 | timeout                              |
| Value | what is returned instead of calling      | cache, fallback                      |
| Race  | when a second copy of the call starts    | hedging                              |

`link` is called once for a pipeline and chooses its closure by what the policy really uses, so that a call
pays for nothing else.
"""

import contextvars
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from inspect import isawaitable
from types import CoroutineType
from typing import Any, Final, NoReturn, TypeVar

from resilient import blocks, deadline, events, runtime, timers, workers
from resilient.call import AsyncNext, Call, Next
from resilient.deadline import Deadline
from resilient.edge import FUNCTION, Edge, refuse_coroutine
from resilient.errors import ThreadsExhausted, TimedOut
from resilient.policy import Policy
from resilient.race import Race as Race  # noqa: PLC0414 - one of the kinds, in a file of its own
from resilient.ticket import Ticket, after_wait


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""What a `Value` hook returns when it has no value to offer."""


_NO_CALL = Call.of_block()

# -- Gate -----------------------------------------------------------------------------------------------------


class Gate(Policy):
    """A policy that lets a call start, lets it wait, or refuses it.

    Attributes:
        free: Whether any call may start now without `admit` being asked, as a look is cheaper than a call. False
            unless the policy says otherwise.
    """

    __slots__ = ("free",)

    times_successes = True
    """Whether `settle` needs to know when a call succeeded. If not, it gets the time at which that call started:
    reading the clock costs as much as a simple policy. When a call failed it always gets to know."""

    looks_at_calls = True
    """Whether the hooks look at the call. If not, a function that has no other guard does without a call."""

    holds = False
    """Whether a call ends for this gate only when its result has been released, which a stream is later than it is
    returned. Such a gate does not look at how long calls took."""

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.free = False

    @abstractmethod
    def admit(self, call: Call, now: float) -> Ticket | None:
        """Return None to let the call start now, a ticket to let it wait, or raise a `Rejected`."""

    def settle(self, call: Call, error: BaseException | None, started: float, now: float) -> None:
        """Take note that an admitted call has ended; called on every way out, cancellation included.

        Args:
            call: The call.
            error: What it raised, or None.
            started: The time that was given to `admit`.
            now: The time now.
        """

    def on_edge(self, edge: Edge) -> Policy:
        """Return what guards the calls that end at this edge: itself, or its partitions."""
        return self

    def leave(self, call: Call, ticket: Ticket) -> BaseException:
        """Give back a place in the queue, or what was granted too late; return the error to raise.

        Called when the holder of the ticket stops waiting: its time is over, or it was cancelled.
        """
        raise NotImplementedError  # only gates that hand out tickets have anything to give back

    def _settles(self) -> bool:
        return type(self).settle is not Gate.settle or "settle" in self.__dict__

    def link(self, nxt: Next, edge: Edge) -> Next:
        chosen = self.on_edge(edge)
        if chosen is not self:
            return chosen.link(nxt, edge)
        admit, settle = self.admit, self.settle
        released, when_released = edge.released, edge.when_released

        def admit_only(call: Call) -> Any:
            ticket = admit(call, call.now)
            if ticket is not None:
                _hold(self, call, ticket)
            return nxt(call)

        def gate(call: Call) -> Any:
            started = call.now
            ticket = None if self.free else admit(call, started)
            if ticket is not None:
                _hold(self, call, ticket)
                started = call.now
            try:
                result = nxt(call)
            except BaseException as error:
                settle(call, error, started, runtime.now())
                raise
            settle(call, None, started, runtime.now())
            return result

        # The same but for one reading of the clock: written twice because that is 2 % of a whole stack.
        def untimed(call: Call) -> Any:
            started = call.now
            ticket = None if self.free else admit(call, started)
            if ticket is not None:
                _hold(self, call, ticket)
                started = call.now
            try:
                result = nxt(call)
            except BaseException as error:
                settle(call, error, started, runtime.now())
                raise
            settle(call, None, started, started)
            return result

        def holding(call: Call) -> Any:
            started = call.now
            ticket = admit(call, started)
            if ticket is not None:
                _hold(self, call, ticket)
                started = call.now
            try:
                result = nxt(call)
                if not released(result):
                    when_released(result, partial(ended, call, started))
                    return result
            except BaseException as error:
                settle(call, error, started, runtime.now())
                raise
            settle(call, None, started, started)
            return result

        def ended(call: Call, started: float, error: BaseException | None) -> None:
            settle(call, error, started, runtime.now())

        if self.holds and edge.streams:
            return covered(holding, nxt)
        return covered((gate if self.times_successes else untimed) if self._settles() else admit_only, nxt)

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        chosen = self.on_edge(edge)
        if chosen is not self:
            return chosen.alink(nxt, edge)
        admit, settle = self.admit, self.settle
        released, when_released = edge.released, edge.when_released

        def admit_only(call: Call) -> Awaitable[Any]:  # a coroutine of its own would cost as much as the gate
            ticket = admit(call, call.now)
            return nxt(call) if ticket is None else wait(call, ticket)

        async def wait(call: Call, ticket: Ticket) -> Any:
            await _ahold(self, call, ticket)
            return await nxt(call)

        async def gate(call: Call) -> Any:
            started = call.now
            ticket = None if self.free else admit(call, started)
            if ticket is not None:
                await _ahold(self, call, ticket)
                started = call.now
            try:
                result = await nxt(call)
            except BaseException as error:
                settle(call, error, started, runtime.now())
                raise
            settle(call, None, started, runtime.now())
            return result

        async def untimed(call: Call) -> Any:
            started = call.now
            ticket = None if self.free else admit(call, started)
            if ticket is not None:
                await _ahold(self, call, ticket)
                started = call.now
            try:
                result = await nxt(call)
            except BaseException as error:
                settle(call, error, started, runtime.now())
                raise
            settle(call, None, started, started)
            return result

        async def holding(call: Call) -> Any:
            started = call.now
            ticket = admit(call, started)
            if ticket is not None:
                await _ahold(self, call, ticket)
                started = call.now
            try:
                result = await nxt(call)
                if not released(result):
                    when_released(result, partial(ended, call, started))
                    return result
            except BaseException as error:
                settle(call, error, started, runtime.now())
                raise
            settle(call, None, started, started)
            return result

        def ended(call: Call, started: float, error: BaseException | None) -> None:
            settle(call, error, started, runtime.now())

        if self.holds and edge.streams:
            return covered(holding, nxt)
        return covered((gate if self.times_successes else untimed) if self._settles() else admit_only, nxt)

    def close_alone(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Guard a function by nothing but this gate, if the gate neither looks at calls nor at how they end."""
        if self.looks_at_calls or self._settles() or type(self).link is not Gate.link:
            return None
        if self.on_edge(FUNCTION) is not self:
            return None
        admit = self.admit

        def guarded(*args: Any, **kwargs: Any) -> Any:
            ticket = admit(_NO_CALL, runtime.now())
            if ticket is not None:
                _hold(self, Call(function, args, kwargs), ticket)
            result = function(*args, **kwargs)
            if result.__class__ is CoroutineType:
                refuse_coroutine(function, result)
            return result

        return guarded

    @contextmanager
    def block(self) -> Iterator[None]:
        call = Call.of_block()
        started = call.now
        ticket = self.admit(call, started)
        if ticket is not None:
            _hold(self, call, ticket)
            started = call.now
        try:
            yield
        except BaseException as error:
            self.settle(call, error, started, runtime.now())
            raise
        self.settle(call, None, started, runtime.now())

    @asynccontextmanager
    async def ablock(self) -> AsyncIterator[None]:
        call = Call.of_block()
        started = call.now
        ticket = self.admit(call, started)
        if ticket is not None:
            await _ahold(self, call, ticket)
            started = call.now
        try:
            yield
        except BaseException as error:
            self.settle(call, error, started, runtime.now())
            raise
        self.settle(call, None, started, runtime.now())


# -- Loop -----------------------------------------------------------------------------------------------------


class Attempts:
    """The failed attempts of one call under one loop: made when the first one fails.

    Attributes:
        call: The call.
        edge: What it ends at.
        started: When its first attempt began.
        number: The number of the attempt that runs or has just failed, from 1.
        state: Whatever the policy wants to remember about this call.
    """

    __slots__ = ("call", "edge", "number", "started", "state")

    def __init__(self, call: Call, edge: Edge, started: float) -> None:
        self.call = call
        self.edge = edge
        self.started = started
        self.number = 1
        self.state: Any = None


class Loop(Policy):
    """A policy that makes a failed call again."""

    @abstractmethod
    def next_delay(self, attempts: Attempts, error: Exception, now: float) -> float | None:
        """Return the seconds to wait before the next attempt, or None to let the error out."""

    def succeeded(self, call: Call) -> None:
        """Take note that a call has succeeded, with its first attempt or a later one."""

    def check_edge(self, edge: Edge) -> None:
        """Raise an error if this loop cannot work on such an edge."""

    def refuse_block(self) -> NoReturn:
        """Say how a block can be made again."""
        raise TypeError(
            f"{type(self).__name__} cannot guard a `with` block, because Python cannot run the block again; write "
            "`for attempt in retry: with attempt: ...` (or `async for`), or decorate a function"
        )

    def _counts_successes(self) -> bool:
        return type(self).succeeded is not Loop.succeeded

    def link(self, nxt: Next, edge: Edge) -> Next:
        self.check_edge(edge)
        next_delay, succeeded, again = self.next_delay, self.succeeded, self._again

        # The retries run outside of the `except` block: each new error would otherwise carry the one before
        # it as its context, and a long series of attempts would hold on to every traceback.
        def loop(call: Call) -> Any:
            started = call.now
            try:
                return nxt(call)
            except Exception as error:
                attempts = Attempts(call, edge, started)
                delay = next_delay(attempts, error, runtime.now())
                if delay is None:
                    raise
                edge.discard(error)
            return again(nxt, attempts, delay)

        def counting(call: Call) -> Any:
            started = call.now
            try:
                result = nxt(call)
            except Exception as error:
                attempts = Attempts(call, edge, started)
                delay = next_delay(attempts, error, runtime.now())
                if delay is None:
                    raise
                edge.discard(error)
            else:
                succeeded(call)
                return result
            result = again(nxt, attempts, delay)
            succeeded(call)
            return result

        return covered(counting if self._counts_successes() else loop, nxt)

    def _again(self, nxt: Next, attempts: Attempts, delay: float) -> Any:
        call, edge = attempts.call, attempts.edge
        while True:
            if delay:
                runtime.sleep(delay)
            attempts.number += 1
            call.attempt = attempts.number
            call.now = runtime.now()
            try:
                return nxt(call)
            except Exception as error:
                wanted = self.next_delay(attempts, error, runtime.now())
                if wanted is None:
                    raise
                edge.discard(error)
                delay = wanted

    def close_alone(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Guard a function by nothing but this loop: then the call is made only when an attempt has failed."""
        if self.judge is not None or self._counts_successes() or type(self).link is not Loop.link:
            return None
        self.check_edge(FUNCTION)
        next_delay, end = self.next_delay, FUNCTION.end()

        def guarded(*args: Any, **kwargs: Any) -> Any:
            started = runtime.now()
            try:
                result = function(*args, **kwargs)
                if result.__class__ is CoroutineType:
                    refuse_coroutine(function, result)
                return result
            except Exception as error:
                attempts = Attempts(Call(function, args, kwargs), FUNCTION, started)
                delay = next_delay(attempts, error, runtime.now())
                if delay is None:
                    raise
            return self._again(end, attempts, delay)

        return guarded

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        self.check_edge(edge)
        next_delay, succeeded = self.next_delay, self.succeeded

        async def again(attempts: Attempts, delay: float) -> Any:
            call = attempts.call
            while True:
                await runtime.asleep(delay)  # also for 0: a loop that never yields could not be cancelled
                attempts.number += 1
                call.attempt = attempts.number
                call.now = runtime.now()
                try:
                    return await nxt(call)
                except Exception as error:
                    wanted = next_delay(attempts, error, runtime.now())
                    if wanted is None:
                        raise
                    await edge.adiscard(error)
                    delay = wanted

        async def loop(call: Call) -> Any:
            started = call.now
            try:
                return await nxt(call)
            except Exception as error:
                attempts = Attempts(call, edge, started)
                delay = next_delay(attempts, error, runtime.now())
                if delay is None:
                    raise
                await edge.adiscard(error)
            return await again(attempts, delay)

        async def counting(call: Call) -> Any:
            started = call.now
            try:
                result = await nxt(call)
            except Exception as error:
                attempts = Attempts(call, edge, started)
                delay = next_delay(attempts, error, runtime.now())
                if delay is None:
                    raise
                await edge.adiscard(error)
            else:
                succeeded(call)
                return result
            result = await again(attempts, delay)
            succeeded(call)
            return result

        return covered(counting if self._counts_successes() else loop, nxt)

    def __iter__(self) -> Iterator[blocks.Attempt]:
        self.check_edge(FUNCTION)
        return blocks.attempts_of(self, Attempts(Call.of_block(), FUNCTION, runtime.now()))

    def __aiter__(self) -> AsyncIterator[blocks.Attempt]:
        self.check_edge(FUNCTION)
        return blocks.AsyncAttempts(self, Attempts(Call.of_block(), FUNCTION, runtime.now()))


# -- Scope ----------------------------------------------------------------------------------------------------


class Scope(Policy):
    """A policy that gives a call a deadline.

    An async call is cancelled when the deadline passes. A sync call runs in a worker thread and is abandoned
    there, unless `interrupt` is False: then the deadline is only published, for code that looks at it.
    """

    interrupt: bool = True
    """Whether the call is stopped at its deadline, or has to look at the deadline by itself."""

    max_abandoned: int = 16
    """How many abandoned threads may still be running before further sync calls are refused."""

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self._queues = timers.TimerQueues()
        self._alarms = timers.TimerQueues()
        self._abandoned = 0

    @abstractmethod
    def limit(self) -> float:
        """Return how many seconds a call may take: always the same number, as the timer queue relies on it."""

    def timed_out(self, *, tell: bool = True) -> TimedOut:
        """Return the error that says that a deadline of this scope has passed, and report it if nobody has yet."""
        seconds = self.limit()
        if tell:
            self.emit(events.TimeoutExpired, seconds=seconds)
        return TimedOut(policy=self.label, seconds=seconds)

    def link(self, nxt: Next, edge: Edge) -> Next:
        # A scope outside of another one does not need a thread of its own: the inner one ends the call at
        # whichever deadline comes first, and all that runs between the two looks at the deadline by itself.
        # An edge that keeps deadlines needs no thread at all.
        if not self.interrupt or edge.keeps_deadlines or getattr(nxt, "interrupts", False):
            seconds, current, new = self.limit(), deadline._current, object.__new__

            # deadline.tighten() and deadline.published(), in place, as this runs for every call.
            def publish(call: Call) -> Any:
                outer, at = current.get(), call.now + seconds
                if outer is None or outer.at > at:
                    mine = new(Deadline)
                    mine.at, mine.scope, mine.outer = at, self, outer
                else:
                    mine = deadline.tighten(self, seconds, call.now)
                token = current.set(mine)
                try:
                    return nxt(call)
                finally:
                    current.reset(token)

            return covered(publish, nxt)

        def hop(call: Call) -> Any:
            until = deadline.tighten(self, self.limit(), call.now)
            self._check_threads()
            context = contextvars.copy_context()
            context.run(deadline._current.set, until)

            # The thread has a call of its own, as it may be at work on it when the next attempt has begun.
            inner = call.copy()
            inner.attempt = call.attempt

            def run() -> Any:
                inner.now = runtime.now()
                return nxt(inner)

            job = workers.Job(run, context, until.at)
            workers.start(job)
            try:
                finished = runtime.wait(job.ticket)
            except BaseException:
                self._abandon(call, job)
                raise
            if not finished:
                self._abandon(call, job)
                raise until.timed_out()
            call.abandoned += inner.abandoned
            return job.outcome()

        hop.interrupts = True  # type: ignore[attr-defined]
        return hop

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        seconds, queues, begin = self.limit(), self._queues, timers.begin
        current, new = deadline._current, object.__new__

        async def publish(call: Call) -> Any:
            outer, at = current.get(), call.now + seconds
            if outer is None or outer.at > at:
                mine = new(Deadline)
                mine.at, mine.scope, mine.outer = at, self, outer
            else:
                mine = deadline.tighten(self, seconds, call.now)
            token = current.set(mine)
            try:
                return await nxt(call)
            finally:
                current.reset(token)

        async def scope(call: Call) -> Any:
            timer = begin(self, seconds, call.now, queues)
            if timer is None:
                return await nxt(call)
            try:
                result = await nxt(call)
            except BaseException as error:
                try:
                    timer.end(error)
                except TimedOut as late:
                    raise edge.own(late, call) from late.__cause__
                raise
            timer.end(None)
            return result

        if not self.interrupt or getattr(nxt, "interrupts", False):  # no timer of its own, for the reason above
            return covered(publish, nxt)
        scope.interrupts = True  # type: ignore[attr-defined]
        return scope

    def block(self) -> AbstractContextManager[None]:
        if self.interrupt:
            raise TypeError(
                f"{type(self).__name__} cannot interrupt a sync `with` block: only a function can run in a "
                "thread of its own. Decorate a function, or give interrupt=False and call "
                "resilient.deadline.check() in the block"
            )
        return self._published_block()

    @contextmanager
    def _published_block(self) -> Iterator[None]:
        call = Call.of_block()
        with deadline.published(deadline.tighten(self, self.limit(), call.now)):
            yield

    @asynccontextmanager
    async def ablock(self) -> AsyncIterator[None]:
        call = Call.of_block()
        if not self.interrupt:
            with deadline.published(deadline.tighten(self, self.limit(), call.now)):
                yield
            return
        timer = timers.begin(self, self.limit(), call.now, self._queues)
        try:
            yield
        except BaseException as error:
            if timer is not None:
                timer.end(error)
            raise
        if timer is not None:
            timer.end(None)

    def _check_threads(self) -> None:
        running = self._abandoned
        if running >= self.max_abandoned:
            self.emit(events.ThreadsRejected, running=running)
            raise ThreadsExhausted(f"{running} abandoned threads are still running", policy=self.label)

    def _abandon(self, call: Call, job: workers.Job) -> None:
        with self._lock:
            self._abandoned += 1
            running = self._abandoned
        call.abandoned += (job,)
        job.when_finished(self._recover_thread)
        self.emit(events.ThreadAbandoned, running=running)

    def _recover_thread(self) -> None:
        with self._lock:
            self._abandoned -= 1

    def after_fork(self) -> None:
        super().after_fork()
        self._queues.after_fork()
        self._alarms.after_fork()
        self._abandoned = 0  # threads do not survive a fork


# -- Value ----------------------------------------------------------------------------------------------------


class Stale:
    """What `Value.lookup` returns to serve an old value while a new one is fetched in the background."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Value(Policy):
    """A policy that answers instead of the call: before it, or when it has failed."""

    def lookup(self, call: Call, now: float) -> Any:
        """Return a value, `Stale(value)`, a ticket of a call that is under way, or MISSING to make the call.

        After MISSING and Stale the call is made and ends in `store`, `recover` or `abandon`. A ticket is
        granted with a value, with an error, or with MISSING: then its holder makes the call after all.
        """
        return MISSING

    def store(self, call: Call, result: Any, now: float) -> None:
        """Take the result of a call that has succeeded."""

    @abstractmethod
    def recover(self, call: Call, error: Exception, now: float) -> Any:
        """Return what to answer for a call that has failed, or MISSING to let the error out.

        In an async chain the answer may be an awaitable.
        """

    def abandon(self, call: Call) -> None:
        """Take note that a call was cancelled."""

    def leave(self, call: Call, ticket: Ticket) -> BaseException:
        """Give back a ticket whose holder stops waiting; return the error to raise."""
        raise NotImplementedError  # only values that hand out tickets have anything to give back

    def refresh_failed(self, call: Call, error: Exception, now: float) -> None:
        """Take note that fetching a new value in the background has failed."""

    def link(self, nxt: Next, edge: Edge) -> Next:
        lookup, store, recover, replaceable = self.lookup, self.store, self.recover, edge.replaceable

        def recovering(call: Call) -> Any:
            try:
                return nxt(call)
            except Exception as error:
                found = recover(call, error, runtime.now()) if replaceable(call) else MISSING
                if found is MISSING:
                    raise
                return found

        def compute(call: Call) -> Any:
            try:
                result = nxt(call)
            except Exception as error:
                found = recover(call, error, runtime.now())  # also to end what was begun for this call
                if found is MISSING or not replaceable(call):
                    raise
                return found
            except BaseException:
                self.abandon(call)
                raise
            store(call, result, runtime.now())
            return result

        def refresh(call: Call) -> None:
            try:
                store(call, nxt(call), runtime.now())
            except Exception as error:
                self.refresh_failed(call, error, runtime.now())
            except BaseException:
                self.abandon(call)
                raise

        def looking(call: Call) -> Any:
            found = lookup(call, call.now)
            kind = found.__class__
            if kind is Ticket:
                _hold(self, call, found)
                found = _outcome(found)
            elif kind is Stale:
                context = _background()
                try:
                    runtime.start_thread(lambda: context.run(refresh, call), "resilient-refresh")
                except RuntimeError as error:  # no more threads: the old value still serves
                    self.refresh_failed(call, error, call.now)
                return found.value
            return compute(call) if found is MISSING else found

        return looking if type(self).lookup is not Value.lookup else recovering

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        lookup, store, recover, replaceable = self.lookup, self.store, self.recover, edge.replaceable

        async def recovering(call: Call) -> Any:
            try:
                return await nxt(call)
            except Exception as error:
                found = recover(call, error, runtime.now()) if replaceable(call) else MISSING
                if found is MISSING:
                    raise
                return await found if isawaitable(found) else found

        async def compute(call: Call) -> Any:
            try:
                result = await nxt(call)
            except Exception as error:
                found = recover(call, error, runtime.now())  # also to end what was begun for this call
                if found is MISSING or not replaceable(call):
                    raise
                return found
            except BaseException:
                self.abandon(call)
                raise
            store(call, result, runtime.now())
            return result

        async def refresh(call: Call) -> None:
            try:
                store(call, await nxt(call), runtime.now())
            except Exception as error:
                self.refresh_failed(call, error, runtime.now())
            except BaseException:
                self.abandon(call)
                raise

        async def looking(call: Call) -> Any:
            found = lookup(call, call.now)
            kind = found.__class__
            if kind is Ticket:
                await _ahold(self, call, found)
                found = _outcome(found)
            elif kind is Stale:
                # asyncio may cancel a task before its first step, and then nothing in `refresh` runs at all.
                runtime.start_task(lambda: refresh(call), _background(), lambda: self.abandon(call))
                return found.value
            return await compute(call) if found is MISSING else found

        return looking if type(self).lookup is not Value.lookup else recovering


# -- helpers --------------------------------------------------------------------------------------------------


def _hold(policy: "Gate | Value", call: Call, ticket: Ticket) -> None:
    """Wait until the ticket is granted; give it back if the wait ends in any other way."""
    wait, limit = _bounded(ticket)
    try:
        granted = runtime.wait(wait)
    except BaseException:
        ticket.cancelled = True
        policy.leave(call, ticket)
        raise
    if not granted:
        error = policy.leave(call, ticket)
        raise error if limit is None else limit.timed_out()
    _went_on(call, ticket)


async def _ahold(policy: "Gate | Value", call: Call, ticket: Ticket) -> None:
    """Do the same in a task."""
    wait, limit = _bounded(ticket)
    try:
        granted = await runtime.await_ticket(wait)
    except BaseException:
        ticket.cancelled = True
        policy.leave(call, ticket)
        raise
    if not granted:
        error = policy.leave(call, ticket)
        raise error if limit is None else limit.timed_out()
    _went_on(call, ticket)


def _went_on(call: Call, ticket: Ticket) -> None:
    """Set the time anew after a wait, and raise the error that the ticket may have been granted with."""
    now = runtime.now()
    # A time that was known beforehand is the pace of a rate limit, and says nothing about how much there is to do.
    call.now = after_wait(call.now, now) if ticket.ready_at is None else now
    _outcome(ticket)


def _bounded(ticket: Ticket) -> tuple[Ticket, Deadline | None]:
    """Return what to wait with, and the deadline if the wait is cut short by it, as the policy has not looked."""
    limit = deadline.current()
    ends = ticket.expires_at if ticket.ready_at is None else ticket.ready_at
    if limit is None or (ends is not None and ends <= limit.at):
        return ticket, None
    if ticket.ready_at is not None:
        return Ticket(expires_at=limit.at), limit
    ticket.expires_at = limit.at
    return ticket, limit


def _outcome(ticket: Ticket) -> Any:
    """Return what a ticket was granted with, or raise the error it was granted with."""
    if ticket.error is not None:
        raise ticket.error
    return ticket.value


C = TypeVar("C", bound=Callable[..., Any])


def covered(closure: C, nxt: Callable[..., Any]) -> C:
    """Pass on that a scope further in ends the call at any deadline."""
    if getattr(nxt, "interrupts", False):
        closure.interrupts = True  # type: ignore[attr-defined]
    return closure


def _background() -> contextvars.Context:
    """Return the context for work that outlives the call: the same, without its deadline."""
    with deadline.detached():
        return contextvars.copy_context()
