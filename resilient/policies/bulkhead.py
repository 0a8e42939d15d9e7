"""Bulkhead: let so many calls run at the same time.

A dependency that becomes slow collects calls until threads, connections or memory run out, and then everything
is down. The bulkhead keeps the damage in one compartment (Nygard, "Release It!").

Permits lie in a deque: taking one and putting it back are single operations of the interpreter, so a call that
gets one at once takes no lock. Only the queue needs the lock. A permit that comes back goes straight to the
head of the queue, never through the deque, so nobody can overtake.

The queue is in the order of priority, and of arrival within one. As long as all are equal, to join it is to
append. A full queue makes room for a call that matters more: the last in it, the newest of the lowest priority, is
refused.
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass

from resilient import deadline, events, options, runtime
from resilient.call import Call
from resilient.counter import Counter
from resilient.deadline import Deadline
from resilient.errors import BulkheadFull
from resilient.kinds import Gate
from resilient.priority import _current
from resilient.ticket import Ticket


@dataclass(frozen=True, slots=True)
class BulkheadStatistics:
    """A snapshot of a `Bulkhead`.

    Attributes:
        in_use: Permits that are taken.
        queued: Calls that wait for one.
        rejected: Calls that were refused.
    """

    in_use: int
    queued: int
    rejected: int


class Bulkhead(Gate):
    """Let at most `limit` calls run at the same time, in all threads and event loops together.

    Args:
        limit: How many, an int >= 1. There is no default: it depends on what is behind it.
        queue: How many calls may wait for a permit: those of a higher priority first, and within one first come,
            first served. Default 0: refuse at once.
        wait: How long in seconds a call may wait in the queue at most; it never waits past its deadline.
            Default None: up to the deadline, and without end if there is none.
        name: What errors and events call this policy. Default: its repr.

    Raises:
        BulkheadFull: All permits are taken and the queue is full, the wait took too long, or a call of a higher
            priority took the place in the queue.

    Emits:
        BulkheadRejected, BulkheadQueued.
    """

    times_successes = False
    __slots__ = ("_filled_at", "_permits", "_waiting")  # read by every call

    def __init__(
        self, limit: int, *, queue: int = 0, wait: options.Seconds | None = None, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.limit = options.whole("Bulkhead", "limit", limit)
        self.queue = options.whole("Bulkhead", "queue", queue, minimum=0)
        self.wait = None if wait is None else options.seconds("Bulkhead", "wait", wait)
        if wait is not None and not queue:
            allowed = "a queue= of calls that may wait, or None: with queue=0 no call ever waits"
            raise options.refuse("Bulkhead", "wait", wait, allowed)
        self._rejected = Counter()
        self._fill()
        self._filled_at = float("-inf")  # not now: virtual time may begin later, and before this

    def _fill(self) -> None:
        self._permits: deque[None] = deque([None] * self.limit)
        self._waiting: deque[_Place] = deque()
        self._filled_at = runtime.now()

    holds = True

    def admit(self, call: Call, now: float) -> Ticket | None:
        if not self._waiting:
            try:
                self._permits.pop()
            except IndexError:
                pass
            else:
                return None
        return self._queue_up(now)

    def settle(self, call: Call, error: BaseException | None, started: float, now: float) -> None:
        if call.abandoned or self._waiting or started < self._filled_at:
            self._release_after(call, started)
            return
        self._permits.append(None)
        if self._waiting:  # somebody has begun to wait just now, and may have seen no permit
            with self._lock:
                self._hand_out()

    def leave(self, call: Call, ticket: Ticket) -> BaseException:
        with self._lock:
            granted = ticket.granted
            if not granted and ticket in self._waiting:
                self._waiting.remove(ticket)  # type: ignore[arg-type]  # it is there
        if ticket.error is not None:  # displaced just before: there is no permit, and the refusal is counted
            return ticket.error
        if granted:  # just as the caller gave up: the permit goes to the next one
            self._release(self._filled_at)
        if ticket.cancelled:
            return BulkheadFull("the wait was given up", policy=self.label)
        limit: Deadline | None = ticket.value
        if limit is None:
            return self._refusal("waited", "no permit became free in time")
        return self._refusal("deadline", f"no permit became free before the deadline of {limit.scope.label}")

    def idle(self, now: float) -> bool:
        return len(self._permits) == self.limit

    def statistics(self) -> BulkheadStatistics:
        """Return how many permits are taken, and how many calls wait or were refused."""
        return BulkheadStatistics(
            in_use=self.limit - len(self._permits), queued=len(self._waiting), rejected=self._rejected.value
        )

    def after_fork(self) -> None:
        super().after_fork()
        self._fill()  # the calls that held permits or waited for them are not in this process

    def _queue_up(self, now: float) -> Ticket | None:
        expires_at = None if self.wait is None else now + self.wait
        limit = deadline.current()
        if limit is not None:
            soon = now + deadline.waiting_time(limit.at - now)
            if expires_at is None or soon < expires_at:
                expires_at = soon
            else:
                limit = None
        late = limit if limit is not None and limit.at <= now else None
        with self._lock:
            waiting = self._waiting
            ticket = _Place(expires_at=expires_at)
            ticket.value = limit
            ticket.rank = rank = -_current.get()
            if not waiting or waiting[-1].rank <= rank:
                waiting.append(ticket)
                position = len(waiting)
            else:
                position = bisect_right(waiting, rank, key=_rank) + 1
                waiting.insert(position - 1, ticket)
            # A permit may have come back just before the ticket was in the queue. It is looked for even if the
            # queue turns out to be full, because the one who brought it back saw nobody waiting.
            self._hand_out()
            if ticket.granted:
                return None
            full = len(waiting) > self.queue
            displaces = full and late is None and waiting[-1] is not ticket
            if displaces:
                last = waiting.pop()
                last.error = BulkheadFull("a call of a higher priority took the place", policy=self.label)
                last.grant()
            elif full or late is not None:
                waiting.remove(ticket)
        if displaces:
            self._refused("displaced")
        elif full:
            raise self._refusal("full", f"all {self.limit} permits are taken")
        elif late is not None:
            raise self._refusal("deadline", f"the deadline of {late.scope.label} leaves no time to wait")
        self.emit(events.BulkheadQueued, position=position)
        return ticket

    def _release(self, started: float) -> None:
        if started < self._filled_at:
            return  # taken before a fork, in a life in which this permit was another one
        if self._waiting:
            with self._lock:
                if self._hand_over():
                    return
        self._permits.append(None)
        if self._waiting:
            with self._lock:
                self._hand_out()

    def _hand_over(self) -> bool:
        """Give one permit to the head of the queue; False if nobody is left who waits."""
        while self._waiting:
            if self._waiting.popleft().grant():
                return True
        return False

    def _hand_out(self) -> None:
        """Give permits that lie around to those who wait."""
        while self._waiting:
            try:
                self._permits.pop()
            except IndexError:
                return
            if not self._hand_over():
                self._permits.append(None)

    def _release_after(self, call: Call, started: float) -> None:
        """Release once the threads that this call left behind have really ended: they still use the resource."""
        for job in call.abandoned:
            if job.started_at >= started and not job.finished:
                job.when_finished(lambda: self._release_after(call, started))
                return
        self._release(started)

    def _refusal(self, reason: str, sentence: str) -> BulkheadFull:
        self._refused(reason)
        return BulkheadFull(sentence, policy=self.label)

    def _refused(self, reason: str) -> None:
        self._rejected.add()
        self.emit(events.BulkheadRejected, reason=reason)


class _Place(Ticket):
    """A place in the queue.

    Attributes:
        rank: By which the queue is sorted: the smaller, the further ahead.
    """

    __slots__ = ("rank",)

    rank: int


def _rank(place: _Place) -> int:
    return place.rank
