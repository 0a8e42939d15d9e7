"""Rate limit: let so many calls start in so much time.

A token bucket, kept as one integer for each key. The bucket drips: a call adds `cost` units of debt, and debt
drains at the rate of the limit. A call is admitted if its debt fits into the burst; a refused call changes
nothing, and the time at which it would fit is known exactly. Instead of (debt, time of last change) we store
the single number `drained_at = time * limit + debt`, in units of 1/limit microseconds: the moment at which the
bucket is empty. That is the generic cell rate algorithm (GCRA, ITU-T I.371), exact because it is all integers.

Why not a window: a fixed window admits twice the limit around its edge, and a sliding log costs memory for
every call.
"""

import heapq
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from resilient import deadline, events, options, runtime
from resilient.baton import Baton
from resilient.call import Call, is_block
from resilient.counter import Counter
from resilient.edge import Edge
from resilient.errors import RateLimited
from resilient.kinds import Gate
from resilient.policy import Policy
from resilient.rate import Rate
from resilient.table import OVERFLOW, Table
from resilient.ticket import Ticket

_MICRO = 1_000_000
_SMALL_LIMIT, _SMALL_DEBT = 64, 2**52  # 64 units a microsecond make 2**52 in two years
_VACANT_KEYS = 1_000
_LEARN_AT_MOST = 3_600.0  # s


@dataclass(frozen=True, slots=True)
class RateLimitStatistics:
    """A snapshot of a `RateLimit`.

    Attributes:
        keys: How many keys are remembered.
        rejected: Calls that were refused.
        queued: Calls that had to wait.
    """

    keys: int
    rejected: int
    queued: int


class RateLimit(Gate):
    """Let at most so many calls start in so much time.

    Args:
        rate: How many calls: `"100/minute"`, `"5/10s"` or `Rate(100, per=60)`.
        key: A function of the call's arguments that returns what the limit is counted by (hashable); each key
            has the whole rate for itself. Default None: that of the edge, which is the origin of a request that
            an HTTP client sends, and one limit for all calls elsewhere.
        burst: How many calls may start at once after a quiet time. Default: as many as the rate names.
        wait: How long in seconds a call may wait for its turn, first come, first served, instead of being
            refused. A wait that would end after the deadline is refused at once. Default 0: never wait.
        cost: How much of the limit a call takes: an int, or a function of the call's arguments. Default 1.
        learn: Whether to slow down when responses say that less is left (`RateLimit`, `X-RateLimit-*`, a 429 with
            `Retry-After`), for at most an hour at a time: those of an HTTP client, or whatever a function returns
            that has `status_code` and `headers`. Never speeds up. Default False.
        max_keys: How many keys are remembered, about 90 bytes each. Keys whose limit is untouched are
            forgotten first; if all are in use, new keys share one limit. Default 100,000.
        name: What errors and events call this policy. Default: its repr.

    Raises:
        RateLimited: The limit is used up; `retry_after` says exactly when the call fits.
        ValueError: A `cost` function returned less than 1 or more than the burst.

    Emits:
        RateLimitRejected, RateLimitQueued, PartitionsFull.
    """

    __slots__ = ("_capacity", "_debt", "_drained", "_give", "_limit", "_take", "key")  # read by every call

    def __init__(
        self,
        rate: str | Rate,
        *,
        key: Callable[..., Hashable] | None = None,
        burst: int | None = None,
        wait: options.Seconds = 0.0,
        cost: int | Callable[..., int] = 1,
        learn: bool = False,
        max_keys: int = 100_000,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.rate = Rate.of("RateLimit", rate)
        self.key = None if key is None else options.function("RateLimit", "key", key)
        self.burst = self.rate.limit if burst is None else options.whole("RateLimit", "burst", burst)
        self.wait = options.seconds("RateLimit", "wait", wait, zero=True)
        self.cost = cost if callable(cost) else options.whole("RateLimit", "cost", cost)
        if callable(cost):
            options.function("RateLimit", "cost", cost)
        elif cost > self.burst:
            raise options.refuse("RateLimit", "cost", cost, f"an int up to burst={self.burst}")
        self.learn = options.flag("RateLimit", "learn", learn)
        self.max_keys = options.whole("RateLimit", "max_keys", max_keys)
        common = math.gcd(self.rate.limit, self.rate.micros)  # short integers are faster than long ones
        self._limit = self.rate.limit // common
        self._period = self.rate.micros // common  # the debt of one call: it drains by `limit` each microsecond
        self._capacity = self.burst * self._period
        self._patience = round(self.wait * _MICRO) * self._limit
        self._debt = self.cost * self._period if isinstance(self.cost, int) else 0
        self._table: Table[float] = Table(self.max_keys)
        self._drained = self._table.entries
        self._vacant: dict[Hashable, list[tuple[float, float]]] = {}  # by key: start and debt, earliest first
        # Without a key there is one number, and it is the baton. It is a whole float, which is faster than an int
        # and just as exact, if all that it can become stays below 2**53 for years.
        exact = self._limit <= _SMALL_LIMIT and self._capacity + self._patience < _SMALL_DEBT
        self._lone = self.key is None and self._debt > 0 and exact and not self.learn
        self._baton: Baton[float | None] = Baton(0.0 if self._lone else None, lost=None)
        self._take, self._give = self._baton.take, self._baton.give
        if self._lone:
            self.admit = self._admit_lone  # type: ignore[method-assign]
            self.looks_at_calls = False
        if self.learn:
            self.judge = self._learn
        self._partitions: RateLimit | None = None
        self._rejected = Counter()
        self._queued = Counter()

    def on_edge(self, edge: Edge) -> Policy:
        return self._by_edge() if self.key is None and edge.partitions else self

    def _by_edge(self) -> "RateLimit":
        """Return the limit that is counted by the key of the edge."""
        if self._partitions is None:
            limit = type(self)(**{**self._keywords(), "key": _EDGE, "name": self.label})
            limit._listeners = self._listeners
            with self._lock:
                self._partitions = self._partitions or limit
        return self._partitions

    def _learn(self, call: Call, result: Any) -> None:
        """Take note of what an answer says about the limit of the other side."""
        quota = call.edge.quota(result)
        if quota is None or quota.remaining is None or quota.reset is None:
            return
        limit = self._by_edge() if self.key is None and call.edge.partitions else self
        limit._slow_down(None if limit.key is None else limit._key_of(call), quota.remaining, quota.reset)

    def _slow_down(self, key: Hashable, remaining: int, reset: float) -> None:
        """Leave no more than `remaining` calls, or none until `reset` seconds from now if that is 0."""
        at = int(runtime.now() * _MICRO + 0.5) * self._limit
        wait = 0 if remaining else int(min(reset, _LEARN_AT_MOST) * _MICRO) * self._limit
        owed = at + wait + self._capacity - max(remaining, 1) * self._period
        with self._holding(at):
            place = key if key in self._drained else self._table.place_for(key, lambda other: other <= at)
            if place is not OVERFLOW:  # those who share it are not all to wait for one
                self._drained[place] = max(self._drained.get(place, 0), owed)

    def admit(self, call: Call, now: float) -> Ticket | None:
        key = None if self.key is None else self._key_of(call)
        debt = self._debt or self._debt_of(call)
        at = int(now * _MICRO + 0.5) * self._limit
        drained, take, give = self._drained, self._take, self._give  # calling an attribute is slow in CPython 3.11
        try:
            take()
        except IndexError:
            self._baton.wait()
        try:
            drained_at = drained.get(key)
            if drained_at is not None:
                due = (drained_at if drained_at > at else at) + debt  # noqa: FURB136 - max() costs a call
                if due - at <= self._capacity:
                    drained[key] = due
                    return None
        finally:
            give(None)
        return self._admit_slowly(now, at, key, debt)

    def _admit_lone(self, call: Call, now: float) -> Ticket | None:
        """Admit where there is only one key: the same, on the one number that the baton is."""
        at = (now * _MICRO + 0.5) // 1.0 * self._limit
        take, give = self._take, self._give
        try:
            drained_at = take()
        except IndexError:
            drained_at = self._baton.wait()
        if drained_at is not None:
            due = (drained_at if drained_at > at else at) + self._debt  # noqa: FURB136 - max() costs a call
            if due - at <= self._capacity:
                give(due)
                return None
        give(drained_at)
        return self._admit_slowly(now, at, None, self._debt)

    def _admit_slowly(self, now: float, at: float, key: Hashable, debt: int) -> Ticket | None:
        """Admit a new key, let the call wait, or refuse it."""
        with self._holding(at):
            place = key if key in self._drained else self._table.place_for(key, lambda other: other <= at)
            # A new key takes over the debt of the overflow entry: it may have been one of those who share it.
            owed = max(self._drained.get(place, self._drained.get(OVERFLOW, at)), at)
            turn = self._vacant_turn(place, at, debt) if place in self._vacant else None
            over = (owed + debt - self._capacity if turn is None else turn) - at
            admitted = over <= 0 or (over <= self._patience and self._in_time(at + over))
            self._drained[place] = owed + debt if admitted and turn is None else owed
            if admitted and turn is not None:
                heapq.heappop(self._vacant[place])
        if place is OVERFLOW:
            self.emit(events.PartitionsFull, max_keys=self.max_keys)
        if not admitted:
            self._refuse(now, at + over)
        return None if over <= 0 else self._queue(now, at + over, place, debt)

    @contextmanager
    def _holding(self, at: float) -> Iterator[None]:
        """Hold the baton; what it is without a key is in the table meanwhile.

        If the number was lost in an interrupt, the limit is taken to be used up: it must not begin anew.
        """
        held = self._baton.hold()
        if self._lone:
            self._drained[None] = at + self._capacity if held is None else held
        try:
            yield
        finally:
            self._give(self._drained[None] if self._lone else None)

    def leave(self, call: Call, ticket: Ticket) -> BaseException:
        """Give the reservation back.

        Those who have queued up behind it keep their turns. Its own turn is vacant then, for the next call: at
        the end of a queue that is only shorter, that call would start together with the last one there.
        """
        key, debt, due = ticket.value
        with self._holding(due):
            if self._drained.get(key) == due:
                self._drained[key] -= debt
            else:
                if len(self._vacant) >= _VACANT_KEYS:
                    self._vacant.clear()  # a turn that nobody takes never exceeds the limit
                heapq.heappush(self._vacant.setdefault(key, []), (due - self._capacity, debt))
        return RateLimited("the wait was given up", policy=self.label)

    def _vacant_turn(self, key: Hashable, at: float, debt: float) -> float | None:
        """Return the next turn in the queue that was given back, if a call of this debt can have it."""
        turns = self._vacant[key]
        while turns and turns[0][0] < at:
            heapq.heappop(turns)
        if not turns:
            del self._vacant[key]
            return None
        turn, room = turns[0]
        return turn if debt <= room else None

    def idle(self, now: float) -> bool:
        at = int(now * _MICRO + 0.5) * self._limit
        with self._holding(at):
            return all(drained_at <= at for drained_at in self._drained.values()) and (
                self._partitions is None or self._partitions.idle(now)
            )

    def after_fork(self) -> None:
        super().after_fork()
        self._baton.after_fork(0.0 if self._lone else None)

    def statistics(self) -> RateLimitStatistics:
        """Return how many keys are remembered, and how many calls were refused or had to wait."""
        keys = len(self._drained) - (OVERFLOW in self._drained)
        if self._lone:
            with self._holding(0.0):
                keys = int(self._drained[None] > 0)
        own = RateLimitStatistics(keys=keys, rejected=self._rejected.value, queued=self._queued.value)
        if self._partitions is None:
            return own
        parts = self._partitions.statistics()
        return RateLimitStatistics(
            keys=own.keys + parts.keys, rejected=own.rejected + parts.rejected, queued=own.queued + parts.queued
        )

    def _key_of(self, call: Call) -> Hashable:
        function = self.key
        if function is _EDGE:
            key: Hashable = call.edge.key(call)
        elif call.kwargs or is_block(call):
            key = _ask(function, "key", call)
        else:
            key = function(*call.args)  # type: ignore[misc]  # who asks has seen that there is one
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"{self.label}: key= returned {type(key).__name__}, which is not hashable") from None
        if call.edge.notes_keys:
            call.note_key(self, key)  # type: ignore[attr-defined]
        return key

    def left(self, key: Hashable = None) -> tuple[int, float]:
        """Tell how much of the limit is left.

        Args:
            key: What the limit is counted by, as `key=` returns it; None for a limit without keys.

        Returns:
            How many calls may start now; and in how many seconds there will be more if that is none, else in how
            many the limit will be untouched again.
        """
        at = int(runtime.now() * _MICRO + 0.5) * self._limit
        if self._lone:
            held = self._baton.hold()
            self._give(held)
            drained_at: float | None = at + self._capacity if held is None else held
        else:
            drained_at = self._drained.get(key)
            if drained_at is None and len(self._drained) >= self.max_keys:
                drained_at = self._drained.get(OVERFLOW)
        if drained_at is None or drained_at <= at:
            return self.burst, 0.0
        debt = drained_at - at
        calls = (self._capacity - debt) // self._period
        if calls >= 1:
            return int(calls), debt / self._limit / _MICRO
        return 0, self._seconds(debt + self._period - self._capacity)

    def _debt_of(self, call: Call) -> int:
        cost = _ask(self.cost, "cost", call)
        allowed = f"an int from 1 to burst={self.burst}"
        if isinstance(cost, bool) or not isinstance(cost, int):
            raise TypeError(f"{self.label}: cost= returned {cost!r}; return {allowed}")
        if not 1 <= cost <= self.burst:
            raise ValueError(f"{self.label}: cost= returned {cost!r}; return {allowed}")
        return cost * self._period

    def _seconds(self, due: float) -> float:
        return -(-due // self._limit) / _MICRO

    def _in_time(self, due: float) -> bool:
        limit = deadline.current()
        return limit is None or self._seconds(due) < limit.at

    def _refuse(self, now: float, due: float) -> NoReturn:
        retry_after = self._seconds(due) - now
        self._rejected.add()
        self.emit(events.RateLimitRejected, retry_after=retry_after)
        raise RateLimited(f"more than {self.rate}", policy=self.label, retry_after=retry_after)

    def _queue(self, now: float, due: float, key: Hashable, debt: int) -> Ticket:
        ticket = Ticket(ready_at=self._seconds(due))
        ticket.value = key, debt, due + self._capacity
        self._queued.add()
        self.emit(events.RateLimitQueued, wait=self._seconds(due) - now)
        return ticket


def _EDGE() -> Hashable:  # noqa: N802 - a mark, and a function only because `key` takes one
    """Stand for the key of the edge, see `RateLimit._key_of`."""


def _ask(function: Any, option: str, call: Call) -> Any:
    if is_block(call):
        raise TypeError(f"RateLimit: {option}= is a function of the call's arguments, and a block has none")
    return function(*call.args, **call.kwargs)
