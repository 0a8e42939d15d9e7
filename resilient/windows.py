"""What a circuit breaker remembers of recent calls.

Three memories with one interface. Successes are recorded without a lock, because they are the common case;
everything else happens under the lock of the breaker.
"""

from collections import deque
from typing import NamedTuple, Protocol

from resilient.counter import Counter


class Counts(NamedTuple):
    """Calls in the window, and how many of them failed or were slow."""

    calls: int
    failures: int
    slow: int


class Window(Protocol):
    """A memory of recent calls.

    Attributes:
        current: Where fast successes are counted by `next(current.ticks)` until the time `current.ends`: a
            shortcut for callers to whom a function call matters.
    """

    current: "Slice"

    def success(self, now: float) -> None:
        """Record a fast success; needs no lock."""

    def record(self, now: float, *, failed: bool, slow: bool) -> None:
        """Record any other outcome."""

    def counts(self, now: float) -> Counts:
        """Return what is in the window."""

    def reset(self) -> None:
        """Forget everything."""


class Slice:
    """The outcomes of one tenth of the window."""

    __slots__ = ("ends", "failures", "others", "slow", "successes", "ticks")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.successes = Counter()
        self.ticks = self.successes.ticks
        self.others = 0
        self.failures = 0
        self.slow = 0


_NEVER = Slice(float("-inf"))


class TimeWindow:
    """The calls of the last so many seconds, in ten slices that are dropped one by one.

    Args:
        seconds: The length of the window. It covers between 9/10 of that and all of it.
    """

    __slots__ = ("_length", "_slices", "current")
    SLICES = 10

    def __init__(self, seconds: float) -> None:
        self._length = seconds / self.SLICES
        self.reset()

    def reset(self) -> None:
        self._slices: dict[int, Slice] = {}
        self.current = _NEVER

    def success(self, now: float) -> None:
        current = self.current
        if now >= current.ends:
            current = self._turn(now)
        next(current.ticks)

    def record(self, now: float, *, failed: bool, slow: bool) -> None:
        current = self.current
        if now >= current.ends:
            current = self._turn(now)
        current.others += 1
        current.failures += failed
        current.slow += slow

    def counts(self, now: float) -> Counts:
        self._turn(now)
        calls = failures = slow = 0
        for each in list(self._slices.values()):
            calls += each.successes.value + each.others
            failures += each.failures
            slow += each.slow
        return Counts(calls, failures, slow)

    def _turn(self, now: float) -> Slice:
        # Runs without the lock too. setdefault is one operation of the interpreter, so all threads that come
        # here at the same time get the same slice; dropping an old slice twice does no harm.
        number = int(now // self._length)
        slices = self._slices
        current = slices.setdefault(number, Slice((number + 1) * self._length))
        for old in list(slices):
            if old <= number - self.SLICES:
                slices.pop(old, None)
        self.current = current
        return current


class CountWindow:
    """The last so many calls.

    Args:
        size: How many.
    """

    _FAILED, _SLOW = 1, 2
    current = _NEVER

    def __init__(self, size: int) -> None:
        self._outcomes: deque[int] = deque(maxlen=size)

    def reset(self) -> None:
        self._outcomes.clear()

    def success(self, now: float) -> None:
        self._outcomes.append(0)

    def record(self, now: float, *, failed: bool, slow: bool) -> None:
        self._outcomes.append(self._FAILED * failed + self._SLOW * slow)

    def counts(self, now: float) -> Counts:
        outcomes = self._outcomes.copy()  # one operation: others append meanwhile
        failures = sum(1 for outcome in outcomes if outcome & self._FAILED)
        slow = sum(1 for outcome in outcomes if outcome & self._SLOW)
        return Counts(len(outcomes), failures, slow)


class Streak:
    """The failures since the last success."""

    current = _NEVER

    def __init__(self) -> None:
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def success(self, now: float) -> None:
        if self._failures:
            self._failures = 0

    def record(self, now: float, *, failed: bool, slow: bool) -> None:
        self._failures = self._failures + 1 if failed else 0

    def counts(self, now: float) -> Counts:
        return Counts(self._failures, self._failures, 0)
