"""Timeouts for async code.

On asyncio: `asyncio.timeout` schedules and cancels one loop timer per call, which costs more than all other
policies together. All deadlines of one `Timeout` have the same length, so they expire in the order in which
they were set: a FIFO queue and one loop timer, for its head, are enough. A call that ends in time only marks
its entry. Cancellation follows `asyncio.timeout` to the letter: our own request is taken back with
`uncancel()`, and becomes a `TimedOut` only if nobody else asked for cancellation too.

On trio: a cancel scope, which does all of this by itself.
"""

import asyncio
import threading
import weakref
from asyncio import CancelledError, current_task, get_running_loop
from bisect import insort
from collections import deque
from contextvars import Token
from operator import attrgetter
from threading import get_ident
from typing import TYPE_CHECKING, Any, Self

from resilient import runtime
from resilient.deadline import FAR_AWAY, Deadline, _current, tighten
from resilient.errors import TimedOut

if TYPE_CHECKING:
    from resilient.kinds import Scope


_new = object.__new__
_AT = attrgetter("at")


class Timer(Deadline):
    """A deadline at which an asyncio task is cancelled; made by `begin`.

    It is in its queue from the beginning until the call ends or the time is up, whichever comes first.
    """

    __slots__ = ("_cancelling", "pending", "task", "token")

    published = False

    token: "Token[Deadline | None]"

    task: "asyncio.Task[Any] | None"
    pending: "deque[Timer] | None"
    _cancelling: int

    def timed_out(self) -> TimedOut:
        return self.scope.timed_out()

    def disarm(self) -> None:
        if self.pending is not None:  # else it is too late: the task has been cancelled
            self.task = self.pending = None  # it stays queued until others come by, and cancels nobody
            self.at += FAR_AWAY

    def expire(self) -> None:
        """Cancel the task; called by the queue, which has let go of this timer."""
        self.pending = None
        if self.task is not None:
            self.task.cancel()

    def end(self, error: BaseException | None) -> None:
        """End the call; raise TimedOut if `error` is the cancellation that this timer asked for."""
        _current.reset(self.token)
        task = self.task
        self.task = None  # an entry may stay queued behind an older call: it must not keep the task alive
        pending = self.pending
        if pending is not None:
            if pending[-1] is self:
                pending.pop()
            while pending and pending[0].task is None:
                pending.popleft()
        elif task is not None and task.uncancel() <= self._cancelling and isinstance(error, CancelledError):
            raise self.due().timed_out() from error


class TimerQueue:
    """The pending timers of one scope in one event loop, earliest first.

    Args:
        loop: The loop whose tasks are cancelled; only weakly referenced.
    """

    __slots__ = ("armed_for", "knows_thread", "loop", "pending")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self.pending: deque[Timer] = deque()
        self.armed_for: float | None = None  # the time at which the loop is going to look at the head of the queue
        self.knows_thread = hasattr(loop, "_thread_id")  # asyncio's own loops do, uvloop's do not

    def arm(self, loop: asyncio.AbstractEventLoop, at: float, now: float) -> asyncio.TimerHandle:
        """Have the loop look at the head of the queue at this time."""
        self.armed_for = at
        return loop.call_later(max(0.0, at - now), self._fire, loop, at)

    def insert(self, alarm: "Alarm") -> None:
        """Add an alarm; it may come before others, which `begin` knows that its timers do not."""
        pending = alarm.pending = self.pending
        if pending and alarm.at < pending[-1].at:
            insort(pending, alarm, key=_AT)
        else:
            pending.append(alarm)
        loop = self.loop()
        if loop is not None and (self.armed_for is None or alarm.at < self.armed_for):
            self.arm(loop, alarm.at, runtime.now())

    def running_task(self) -> "asyncio.Task[Any] | None":
        """Return the task that runs in this thread if its loop is this one, and if that is quick to see."""
        its_loop = self.loop
        loop = its_loop()
        if loop is None or not self.knows_thread or loop._thread_id != get_ident():  # type: ignore[attr-defined]
            return None
        return current_task(loop)

    def _fire(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if at != self.armed_for:  # it has been armed again since, for an earlier time
            return
        self.armed_for = None
        now = runtime.now()
        pending = self.pending
        while pending:
            head = pending[0]
            if head.task is not None and head.at > now:
                self.arm(loop, head.at, now)
                return
            pending.popleft().expire()


class LoneTimer(Timer):
    """A timer at a deadline that another scope has only published: it is as long as none in the queue of a scope.

    So it has a queue of its own, and the loop timer of that ends with it: there is one for each call.
    """

    __slots__ = ("_handle",)

    def __init__(
        self, limit: Deadline, loop: asyncio.AbstractEventLoop, task: "asyncio.Task[Any]", now: float
    ) -> None:
        super().__init__(limit.at, limit.scope, limit)
        queue = TimerQueue(loop)
        self.task = task
        self.pending = queue.pending
        self.pending.append(self)
        self._cancelling = task.cancelling()
        self._handle = queue.arm(loop, limit.at, now)
        self.token = _current.set(self)

    def disarm(self) -> None:
        super().disarm()
        self._handle.cancel()

    def end(self, error: BaseException | None) -> None:
        self._handle.cancel()
        super().end(error)


class TimerQueues:
    """The timer queues of one scope: one for each event loop it has been used in, as long as that lives."""

    __slots__ = ("_lock", "_queues", "last")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, TimerQueue] = (
            weakref.WeakKeyDictionary()
        )
        self.last: TimerQueue | None = None

    def of(self, loop: asyncio.AbstractEventLoop) -> TimerQueue:
        """Return the queue of this loop, and remember it as the `last` one."""
        with self._lock:
            queue = self._queues.get(loop)
            if queue is None:
                queue = self._queues[loop] = TimerQueue(loop)
        self.last = queue
        return queue

    def after_fork(self) -> None:
        """Make a new lock, as the old one may be held by a thread that the child does not have."""
        self._lock = threading.Lock()


class Alarm(Timer):
    """A deadline for one step after another on asyncio, such as the chunks of a body; each is a `with` block.

    It stays in its queue between the steps, as to queue costs more than all the rest, but cancels only a task that
    is in a step. It is in force there and nowhere else, so it is never the current deadline.

    Attributes:
        cancelled_caught: Whether it has ended the last step.
    """

    __slots__ = ("_asked", "cancelled_caught")

    _asked: bool
    cancelled_caught: bool

    def __init__(self, limit: Deadline) -> None:
        self.at = limit.at
        self.scope = limit.scope
        self.task = self.pending = None

    def __enter__(self) -> Self:
        queue = self.scope._alarms.last
        task = None if queue is None else queue.running_task()
        if queue is None or task is None:
            task = current_task()
            if task is None:
                raise RuntimeError(f"{self.scope!r} limits the time of a task, and there is none")
            queue = self.scope._alarms.of(task.get_loop())
        if self.pending is not queue.pending:
            queue.insert(self)
        self.cancelled_caught = self._asked = False
        self._cancelling = task.cancelling()
        self.task = task
        return self

    def expire(self) -> None:
        self._asked = self.task is not _NOBODY
        super().expire()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        task, self.task = self.task, _NOBODY
        if self._asked and task is not None and task.uncancel() <= self._cancelling:
            self.cancelled_caught = isinstance(error, CancelledError)
            return self.cancelled_caught
        return False

    def disarm(self) -> None:
        """Leave the queue after the last step; one that is under way goes on and keeps its limit."""
        pending = self.pending
        if self.task is _NOBODY and pending is not None:
            self.task = self.pending = None
            if pending[-1] is self:
                pending.pop()
            while pending and pending[0].task is None:
                pending.popleft()


class _Nobody:
    """Who is in a step while nobody is."""

    def cancel(self) -> None:
        """Cancel nobody."""


_NOBODY: Any = _Nobody()


class TrioTimer:
    """A deadline that is a trio cancel scope."""

    def __init__(self, deadline: Deadline) -> None:
        import trio

        self._deadline = deadline
        self._cancel_scope = trio.move_on_after(max(0.0, deadline.at - runtime.now()))
        self._cancel_scope.__enter__()
        deadline.cancels = (*getattr(deadline, "cancels", ()), self._cancel_scope)
        self._token = _current.set(deadline)

    def end(self, error: BaseException | None) -> None:
        """End the call; raise TimedOut if `error` is the cancellation that this scope asked for."""
        _current.reset(self._token)
        trace = None if error is None else error.__traceback__
        self._cancel_scope.__exit__(None if error is None else type(error), error, trace)
        if self._cancel_scope.cancelled_caught:
            raise self._deadline.due().timed_out() from error


def begin(scope: "Scope", seconds: float, now: float, queues: TimerQueues) -> Timer | TrioTimer | None:
    """Start the time limit of a call in the running task, on asyncio or on trio.

    Returns:
        What has to be told the `end` of the call, or None if nothing has to be done because a deadline of
        this same task comes first.

    Raises:
        TimedOut: A deadline around this one has passed already.
        RuntimeError: This is not a task.
    """
    # get_running_loop() of CPython 3.11 asks the kernel for the process id each time, which costs more than all
    # the rest. So look first whether the loop of the last call is the one that runs in this thread.
    queue, loop, task = queues.last, None, None
    if queue is not None:
        its_loop = queue.loop  # a local, because calling an attribute is a slow path of CPython 3.11
        loop = its_loop()
        if loop is not None and queue.knows_thread and loop._thread_id == get_ident():  # type: ignore[attr-defined]
            task = current_task(loop)
    if loop is None or task is None:
        try:
            loop = get_running_loop()
        except RuntimeError:
            return TrioTimer(tighten(scope, seconds, now))
        queue, task = None, current_task(loop)
    if task is None:
        raise RuntimeError(f"{scope!r} limits the time of a task, and there is none")
    at = now + seconds
    around = outer = _current.get()
    if outer is None or outer.at > at:
        outer = None
    elif outer.at <= now:
        raise outer.timed_out()
    elif not isinstance(outer, Timer):
        return LoneTimer(outer, loop, task, now)  # it only publishes: this enforces it on its behalf
    elif outer.task is task:
        return None
    if queue is None:
        queue = queues.of(loop)
    if queue.armed_for is None:
        queue.arm(loop, at, now)
    mine: Timer = _new(Timer)  # filled in here: on CPython 3.11 an __init__ costs as much as a policy
    mine.at = at
    mine.scope = scope
    mine.outer = around
    mine.task = task
    mine.pending = queue.pending
    mine._cancelling = task.cancelling()
    mine.token = _current.set(outer or mine)
    queue.pending.append(mine)
    return mine
