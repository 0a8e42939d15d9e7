"""Load shedding: refuse some calls at once, so that the others are still answered in time.

A server that takes in more than it can do does not become slow for some: it becomes late for all, until it answers
only those who have left. Two signs tell that there is more to do than can be done, and neither has to be tuned to
a number of calls:

- The *lag* of the event loop, for all that runs in it: see `resilient.loop_lag`.
- The *delay* of calls in the queue in front of this gate. Every queue fills in a burst: that is what it is for.
  It is a *standing* queue if even the shortest wait of a whole interval was too long. Then calls that have waited
  twice as long as they should are shed, until an interval has a short wait again. This is CoDel (RFC 8289) as
  servers use it: Maurer, "Fail at Scale", ACM Queue 13(8), 2015, and `Codel` in Facebook's folly.

Each priority has thresholds of its own: calls that matter less are shed sooner. The waits of each are judged
apart, as a queue in the order of priority stands for the low ones while the high ones pass.

What is shed does not feed the signals: a refusal takes no time of the loop to speak of, and a wait is over before
it is judged.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from resilient import events, loop_lag, options, priority, runtime
from resilient.call import Call
from resilient.errors import Shed
from resilient.kinds import Gate
from resilient.priority import Priority
from resilient.ticket import Ticket, Waited

SCALE: Mapping[Priority, float] = MappingProxyType(
    {Priority.LOW: 0.5, Priority.NORMAL: 1.0, Priority.HIGH: 2.0, Priority.CRITICAL: 4.0}
)
"""What the thresholds are multiplied by."""

_LOWEST = min(SCALE.values())
_TOO_LONG = 2  # times the threshold, as in folly


@dataclass(frozen=True, slots=True)
class LoadShedStatistics:
    """A snapshot of a `LoadShed`.

    Attributes:
        lag: How late the event loop of this thread is, in seconds; 0 if there is none or no call has come lately.
        delay: The shortest wait of the last interval, in seconds, for the priority whose shortest was the longest.
        shed: Calls that were refused.
        reasons: The same by reason, `lag` and `delay`.
        priorities: The same by priority.
    """

    lag: float
    delay: float
    shed: int
    reasons: Mapping[str, int]
    priorities: Mapping[Priority, int]


@dataclass(slots=True)
class _Queue:
    """The waits of one priority.

    Attributes:
        began: When the interval began.
        shortest: The shortest wait in it so far.
        before: The shortest of the interval before.
        standing: Whether that was too long.
    """

    began: float = float("-inf")
    shortest: float = 0.0
    before: float = 0.0
    standing: bool = False


class LoadShed(Gate):
    """Refuse calls while the event loop, or the queue that they come from, is late.

    Put it right behind what makes calls wait: `Pipeline(Bulkhead(100, queue=1000), LoadShed())`.

    Args:
        lag: How many seconds late the event loop may be. Sync code has no event loop, and is not shed for this.
            Default 0.1; None does not look at it.
        delay: How many seconds calls may wait in a queue. If not one wait of a whole interval was so short, those
            that have waited twice as long are refused. Default 0.05; None does not look at it.
        interval: Seconds in which at least one wait is to be shorter than `delay`. Default 0.1.
        name: What errors and events call this policy. Default: its repr.

    These are the thresholds of normal calls. For calls of low priority they are half as large, for high ones
    twice, and for critical ones four times as large: see `resilient.priority`.

    Raises:
        Shed: The event loop is late, or the call has waited too long in a standing queue.
        ValueError: Both `lag` and `delay` are None.

    Emits:
        LoadShedRejected.
    """

    looks_at_calls = False
    __slots__ = ("_at_once", "_lag_from", "_watches_lag")  # read or written by every call

    def __init__(
        self,
        *,
        lag: options.Seconds | None = 0.1,
        delay: options.Seconds | None = 0.05,
        interval: options.Seconds = 0.1,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.lag = None if lag is None else options.seconds("LoadShed", "lag", lag)
        self.delay = None if delay is None else options.seconds("LoadShed", "delay", delay)
        if lag is None and delay is None:
            raise options.refuse(
                "LoadShed", "delay", delay, "at least one of lag= and delay=: nothing would be shed"
            )
        self.interval = options.seconds("LoadShed", "interval", interval)
        self._watches_lag = self.lag is not None
        self._lag_from = _LOWEST * (self.lag or 0.0)
        self._at_once = float("-inf")  # when a call last came that had not waited
        self._queues = {level: _Queue() for level in Priority}
        self._shed: Counter[tuple[str, Priority]] = Counter()

    def admit(self, call: Call, now: float) -> Ticket | None:
        if self._watches_lag:
            probe = loop_lag.here.probe
            probe.asked = True
            tolerated = self._lag_from
            if probe.late > tolerated or now - probe.due > tolerated or probe.clock is not runtime._installed:
                self._judge_lag(now)
        if isinstance(now, Waited) and self.delay is not None:
            self._judge_delay(now, now.seconds, self.delay)
        else:
            self._at_once = now
        return None

    def idle(self, now: float) -> bool:
        return not any(self._lasts(queue, now) for queue in self._queues.values())

    def statistics(self) -> LoadShedStatistics:
        """Return how late the event loop and the queue are, and how many calls were shed why."""
        now = runtime.now()
        with self._lock:
            shed = dict(self._shed)
            delay = max(queue.before if self._lasts(queue, now) else 0.0 for queue in self._queues.values())
        reasons = dict.fromkeys(("lag", "delay"), 0)
        priorities = dict.fromkeys(Priority, 0)
        for (reason, level), number in shed.items():
            reasons[reason] += number
            priorities[level] += number
        return LoadShedStatistics(
            lag=loop_lag.lag(now),
            delay=delay,
            shed=sum(shed.values()),
            reasons=MappingProxyType(reasons),
            priorities=MappingProxyType(priorities),
        )

    def _judge_lag(self, now: float) -> None:
        late = loop_lag.look().lag(now)
        level = priority.current()
        if self.lag is not None and late > self.lag * SCALE[level]:
            raise self._refusal("lag", level, late, f"the event loop is {late:.3g} s late", loop_lag.PERIOD)

    def _judge_delay(self, now: float, waited: float, allowed: float) -> None:
        level = priority.current()
        allowed *= SCALE[level]
        queue = self._queues[level]
        with self._lock:
            age = now - queue.began
            emptied = queue.began <= self._at_once <= now
            if not 0 <= age < self.interval:
                # Calls may come out of the queue less than once in an interval. Who has waited since the last one
                # did knows that the queue was never empty in between.
                unbroken = 0 <= age < self.interval + max(self.interval, waited)
                queue.before = queue.shortest if unbroken and not emptied else 0.0
                queue.standing = queue.before > allowed
                queue.began, queue.shortest = now, waited
            elif waited < queue.shortest:
                queue.shortest = waited
            standing = queue.standing and not queue.began <= self._at_once <= now
        if standing and waited > _TOO_LONG * allowed:
            sentence = f"calls wait in a standing queue, this one for {waited:.3g} s"
            raise self._refusal("delay", level, waited, sentence, self.interval)

    def _lasts(self, queue: _Queue, now: float) -> bool:
        return 0 <= now - queue.began < 2 * self.interval

    def _refusal(self, reason: str, level: Priority, seconds: float, sentence: str, retry_after: float) -> Shed:
        with self._lock:
            self._shed[reason, level] += 1
        self.emit(events.LoadShedRejected, reason=reason, priority=level.name.lower(), seconds=seconds)
        return Shed(sentence, policy=self.label, retry_after=retry_after)
