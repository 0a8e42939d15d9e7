"""Outliers: find the replicas that fail while others do not, and leave them out for a while.

                  failures in a row, or too many in the window
    IN SERVICE -------------------+--------------------> EJECTED   gets no requests
        ^                         |                       |   ^
        |                         | no room               |   |  fails again when there is room
        |                         +----------------> SPARED   |
        |                                             |   +---+  serves on, but is not healthy
        |       the time is over, or it succeeds      |
        +-------- so often in a row (panic) ----------+

(Envoy's outlier detection, gRPC's proposal A50.) What is easy to get wrong, and how it is done here:

* If many replicas fail at the same time, the cause is rarely the replicas. So only a part of them is ejected at
  once; the others are spared: they serve on, but whoever looks for a healthy replica knows better.
* Each ejection is longer than the last one: 30 s, 60 s, 90 s. For each 30 s that a replica serves without a new
  one, the next is shorter by that much again.
* A result counts only if its request began after the last change: what was under way when a replica was ejected
  does not count against it when it is back, and the window is empty then.
* A replica that is out gets requests only if there is nothing better. They work as health checks: as many
  successes in a row as would have been failures bring it back at once.
* The state ages from the clock readings it is given. There are no timers.
"""

from typing import NamedTuple

from resilient.windows import TimeWindow


class Ejected(NamedTuple):
    """A replica was ejected.

    Attributes:
        number: Which one.
        reason: `consecutive` or `failure_rate`.
        seconds: For how long.
    """

    number: int
    reason: str
    seconds: float


class Returned(NamedTuple):
    """A replica is back in service.

    Attributes:
        number: Which one.
        at: Since when, in seconds of the monotonic clock.
    """

    number: int
    at: float


class _Member:
    """What is known of one replica."""

    __slots__ = ("ejected", "ejections", "failures", "reason", "since", "successes", "until", "window")

    def __init__(self, window: float) -> None:
        self.window = TimeWindow(window)
        self.failures = 0  # in a row, while it is in service
        self.successes = 0  # in a row, while it is out
        self.since = float("-inf")  # of the last change of its state
        self.until: float | None = None  # when it comes back, None if it is in service
        self.ejected = False
        self.ejections = 0
        self.reason = ""


class Outliers:
    """The states of a group of replicas, known by their numbers. Not thread-safe.

    Args:
        size: How many replicas there are.
        consecutive: So many failures in a row make an outlier.
        failure_rate: So does at least this fraction of failures in the window.
        minimum_calls: The rate says nothing about fewer calls than this.
        window: The length of the window in seconds.
        eject_for: How long the first ejection lasts in seconds, and by how much each one is longer than the last.
        max_eject_for: The longest ejection in seconds.
        max_ejected: The largest fraction of the replicas that may be ejected at once, rounded down to replicas.
    """

    def __init__(
        self,
        size: int,
        *,
        consecutive: int,
        failure_rate: float,
        minimum_calls: int,
        window: float,
        eject_for: float,
        max_eject_for: float,
        max_ejected: float,
    ) -> None:
        self._members = [_Member(window) for _ in range(size)]
        self._consecutive = consecutive
        self._failure_rate = failure_rate
        self._minimum_calls = minimum_calls
        self._eject_for = eject_for
        self._max_eject_for = max_eject_for
        self._room = int(size * max_ejected + 1e-9)  # 100 * 0.29 is a little less than 29
        self._out = 0

    @property
    def out(self) -> int:
        """How many replicas are not healthy: ejected or spared."""
        return self._out

    def healthy(self, number: int) -> bool:
        """Tell whether a replica is in service."""
        return self._members[number].until is None

    def ejected_until(self, number: int) -> float | None:
        """Return when a replica comes back that is ejected; None if it is not."""
        member = self._members[number]
        return member.until if member.ejected else None

    def age(self, now: float) -> list[Returned]:
        """Bring back those whose time is over.

        Args:
            now: The time in seconds of the monotonic clock.

        Returns:
            Those that had been ejected.
        """
        if not self._out:
            return []
        returned = []
        for number, member in enumerate(self._members):
            if member.until is not None and now >= member.until:
                returned += self._bring_back(number, member.until)
        return returned

    def record(self, number: int, *, failed: bool, started: float, now: float) -> list[Ejected | Returned]:
        """Take note of how a request ended.

        Args:
            number: The replica that it was sent to.
            failed: Whether the replica failed.
            started: When the request began, in seconds of the monotonic clock.
            now: When it ended.

        Returns:
            What has changed.
        """
        changes: list[Ejected | Returned] = [*self.age(now)]
        member = self._members[number]
        if started < member.since:
            return changes
        if member.until is not None:
            return changes + self._check_health(number, failed=failed, now=now)
        if not failed:
            member.failures = 0
            member.window.success(now)
            return changes
        member.failures += 1
        member.window.record(now, failed=True, slow=False)
        if not self._is_outlier(member, now):
            return changes
        self._put_out(member, now)
        return changes + self._eject(number, now)

    def _is_outlier(self, member: _Member, now: float) -> bool:
        member.reason = "consecutive"
        if member.failures >= self._consecutive:
            return True
        member.reason = "failure_rate"
        counts = member.window.counts(now)
        return counts.calls >= self._minimum_calls and counts.failures >= self._failure_rate * counts.calls

    def _put_out(self, member: _Member, now: float) -> None:
        if member.ejections:
            member.ejections -= min(member.ejections, int((now - member.since) // self._eject_for))
        if member.ejections * self._eject_for < self._max_eject_for:
            member.ejections += 1
        member.since = now
        member.until = now + self._length(member)
        member.successes = 0
        self._out += 1

    def _eject(self, number: int, now: float) -> list[Ejected]:
        if sum(each.ejected for each in self._members) >= self._room:
            return []
        member = self._members[number]
        member.ejected = True
        member.since = now
        length = self._length(member)
        member.until = now + length
        return [Ejected(number, member.reason, length)]

    def _length(self, member: _Member) -> float:
        return min(self._max_eject_for, self._eject_for * member.ejections)

    def _check_health(self, number: int, *, failed: bool, now: float) -> list[Ejected] | list[Returned]:
        member = self._members[number]
        if failed:
            member.successes = 0
            return [] if member.ejected else self._eject(number, now)
        member.successes += 1
        return self._bring_back(number, now) if member.successes >= self._consecutive else []

    def _bring_back(self, number: int, at: float) -> list[Returned]:
        member = self._members[number]
        was_ejected, member.ejected = member.ejected, False
        member.until = None
        member.since = at
        member.failures = 0
        member.window.reset()
        self._out -= 1
        return [Returned(number, at)] if was_ejected else []
