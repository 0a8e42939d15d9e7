"""Retry budget: let retries be a fraction of the successes, so that they cannot make an outage worse.

A token bucket for each partition. A success puts in a fraction of a token and a retry takes a whole one, so in
the long run there is one retry for every ten successes; when nothing succeeds any more, retries end after the
cap is used up. A trickle of tokens over time keeps a quiet client from being locked out for ever.

The cap is small on purpose. In a simulated retry storm (a dependency that hangs for 10 s) a cap of 10 recovers
after 42 s, a cap of 100 after 88 s, and "20 % of the requests in flight, at least 3" never does. The idea is
Finagle's `RetryBudget`; the cost of 2 after a timeout follows the AWS SDKs, because a call that timed out may
still be at work on the other side.

Only partitions that have been drawn on are remembered: one that is full again is like one never seen, so it
can be forgotten to make room. If there is no room, new partitions share one.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from resilient import options, runtime
from resilient.call import Call
from resilient.component import Component
from resilient.table import Table

_TOKEN = 1_000_000  # one token in micro-tokens: integers add up exactly


@dataclass(frozen=True, slots=True)
class RetryBudgetStatistics:
    """A snapshot of a `RetryBudget`.

    Attributes:
        partitions: How many partitions have less than the full budget.
        lowest: The fewest tokens that any of them has left; the cap if all are full.
        refused: Retries that were not paid for.
    """

    partitions: int
    lowest: float
    refused: int


class _Purse:
    """The tokens of one partition, in micro-tokens, and the time up to which they have trickled in."""

    __slots__ = ("at", "micros")

    def __init__(self, micros: int, at: float) -> None:
        self.micros = micros
        self.at = at


class RetryBudget(Component):
    """Pay for retries out of successes. Share one budget between all that call the same dependency.

    Args:
        ratio: Tokens that a success puts in. Default 0.1: one retry for ten successes.
        cap: The most tokens that a partition can hold, and what it starts with. Default 10.
        refill: Seconds in which one token comes back by itself. Default 10 s.
        timeout_cost: Tokens that a retry after a timeout takes; others take 1. Default 2.
        key: A function of the call's arguments that returns the partition (hashable). Default None: that of the
            edge, which is the origin of an HTTP request, and one for all calls of functions.
        max_keys: How many partitions that are not full are remembered; more share one. Default 10,000.
        name: What events call this budget. Default: its repr.

    Emits:
        Nothing itself: `Retry` reports `RetryGaveUp` with the reason `budget`.
    """

    def __init__(
        self,
        *,
        ratio: float = 0.1,
        cap: int = 10,
        refill: options.Seconds = 10.0,
        timeout_cost: int = 2,
        key: Callable[..., Hashable] | None = None,
        max_keys: int = 10_000,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.ratio = options.fraction("RetryBudget", "ratio", ratio, zero=True)
        self.cap = options.whole("RetryBudget", "cap", cap)
        self.refill = options.seconds("RetryBudget", "refill", refill)
        self.timeout_cost = options.whole("RetryBudget", "timeout_cost", timeout_cost)
        if timeout_cost > cap:
            raise options.refuse("RetryBudget", "timeout_cost", timeout_cost, f"an int up to cap={cap}")
        self.key = None if key is None else options.function("RetryBudget", "key", key)
        self.max_keys = options.whole("RetryBudget", "max_keys", max_keys)
        self._deposit = round(self.ratio * _TOKEN)
        self._full = cap * _TOKEN
        self._purses: Table[_Purse] = Table(self.max_keys)
        self.drawn_on = self._purses.entries  # empty as long as every partition is full
        self._refused = 0

    def key_of(self, call: Call) -> Hashable:
        """Return the partition that a call belongs to."""
        if self.key is None:
            return call.edge.key(call)
        key: Hashable = self.key(*call.args, **call.kwargs)
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"{self.label}: key= returned {type(key).__name__}, which is not hashable") from None
        return key

    def deposit(self, key: Hashable = None) -> None:
        """Put in what a success is worth.

        Args:
            key: The partition.
        """
        with self._lock:
            purse = self._purses.entries.get(key)
            if purse is not None:
                purse.micros = min(self._full, purse.micros + self._deposit)

    def withdraw(
        self, error: BaseException, now: float, key: Hashable = None, *, timed_out: bool | None = None
    ) -> bool:
        """Take what a retry costs; return False, and take nothing, if there is not enough.

        Args:
            error: Why the retry is needed: a timeout costs more.
            now: The time in seconds of the monotonic clock.
            key: The partition.
            timed_out: Whether the error is a timeout. Default None: if it is a `TimeoutError`.
        """
        if timed_out is None:
            timed_out = isinstance(error, TimeoutError)
        cost = (self.timeout_cost if timed_out else 1) * _TOKEN
        with self._lock:
            purse = self._purses.entries.get(key)
            if purse is None:
                purse = self._purses.add(key, _Purse(self._full, now), lambda purse: self._is_full(purse, now))
            self._trickle(purse, now)
            if purse.micros < cost:
                self._refused += 1
                return False
            purse.micros -= cost
            return True

    def tokens(self, now: float, key: Hashable = None) -> float:
        """Return how many tokens a partition has.

        Args:
            now: The time in seconds of the monotonic clock.
            key: The partition.
        """
        with self._lock:
            purse = self._purses.entries.get(key)
            if purse is None:
                return float(self.cap)
            self._trickle(purse, now)
            return purse.micros / _TOKEN

    def statistics(self) -> RetryBudgetStatistics:
        """Return how much is left and how often it was not enough."""
        now = runtime.now()
        with self._lock:
            for purse in self._purses.entries.values():
                self._trickle(purse, now)
            left = [purse.micros for purse in self._purses.entries.values() if purse.micros < self._full]
            return RetryBudgetStatistics(
                partitions=len(left), lowest=min(left, default=self._full) / _TOKEN, refused=self._refused
            )

    def _is_full(self, purse: _Purse, now: float) -> bool:
        self._trickle(purse, now)
        return purse.micros >= self._full

    def _trickle(self, purse: _Purse, now: float) -> None:
        gained = round((now - purse.at) / self.refill * _TOKEN)
        if gained > 0:
            purse.micros = min(self._full, purse.micros + gained)
            purse.at += gained * self.refill / _TOKEN  # not `now`: what was rounded away would add up
