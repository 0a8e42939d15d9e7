"""What policies report: frozen records of decisions, and who listens to them.

Events tell of the unhappy path only: a plain success emits nothing. They never hold arguments, results,
keys or messages of errors, because those may be secret; an error appears as the name of its type.

A listener is a plain function of one event. It runs in the thread or task of the call, outside every lock,
and must be quick. If it raises, that is logged and the call goes on.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

logger = logging.getLogger("resilient")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        policy: Label of the policy that reports: its name, or its repr.
        at: When, in seconds of the monotonic clock.
    """

    name: ClassVar[str]
    policy: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(Event):
    """An attempt failed and another one follows after `delay` seconds."""

    name: ClassVar[str] = "retry.scheduled"
    attempt: int
    delay: float
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryGaveUp(Event):
    """A retryable error is raised after all.

    `reason` is one of `attempts`, `deadline`, `retry_after`, `budget`, `not_repeatable`.
    """

    name: ClassVar[str] = "retry.gave_up"
    attempts: int
    elapsed: float
    reason: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutExpired(Event):
    """A call was not done when its deadline of `seconds` passed."""

    name: ClassVar[str] = "timeout.expired"
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadAbandoned(Event):
    """A sync call was left behind in its thread; `running` such threads of this policy are still at work."""

    name: ClassVar[str] = "timeout.thread_abandoned"
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadsRejected(Event):
    """A call was refused because `running` abandoned threads are still at work."""

    name: ClassVar[str] = "timeout.rejected"
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitOpened(Event):
    """The circuit breaker opened for `open_for` seconds (None: until `close()`).

    `reason` is one of `failure_rate`, `slow_rate`, `consecutive`, `probes`, `forced`, `isolated`, `storage`,
    `pybreaker`.
    """

    name: ClassVar[str] = "circuit.opened"
    reason: str
    open_for: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitHalfOpened(Event):
    """The open time is over; probes are let through."""

    name: ClassVar[str] = "circuit.half_opened"


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitClosed(Event):
    """The circuit breaker lets every call through again."""

    name: ClassVar[str] = "circuit.closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitRejected(Event):
    """A call was refused because the circuit is open."""

    name: ClassVar[str] = "circuit.rejected"
    retry_after: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitRejected(Event):
    """A call was refused because the rate is used up."""

    name: ClassVar[str] = "rate_limit.rejected"
    retry_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimitQueued(Event):
    """A call waits `wait` seconds for its turn."""

    name: ClassVar[str] = "rate_limit.queued"
    wait: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadRejected(Event):
    """A call was refused.

    `reason` is `full`, `waited` (too long in the queue), `deadline`, or `displaced` (from the queue, by a call of
    a higher priority).
    """

    name: ClassVar[str] = "bulkhead.rejected"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadQueued(Event):
    """A call waits for a permit, at place `position` (1 is next)."""

    name: ClassVar[str] = "bulkhead.queued"
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadShedRejected(Event):
    """A call of some `priority` (`low`, `normal`, `high`, `critical`) was refused to shed load.

    `reason` is `lag` (the event loop runs `seconds` late) or `delay` (the call has waited `seconds` in a queue
    that does not become empty).
    """

    name: ClassVar[str] = "load_shed.rejected"
    reason: str
    priority: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStaleServed(Event):
    """A value older than its ttl was served.

    `reason` is `error` (the call failed) or `refresh` (a new value is being fetched in the background).
    """

    name: ClassVar[str] = "cache.stale_served"
    age: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRefreshFailed(Event):
    """The background refresh of a stale value failed; the stale value stays."""

    name: ClassVar[str] = "cache.refresh_failed"
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackUsed(Event):
    """A call failed and was answered by a fallback."""

    name: ClassVar[str] = "fallback.used"
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceStarted(Event):
    """Another copy of the call was started, the `copy`-th of it."""

    name: ClassVar[str] = "race.started"
    copy: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionsFull(Event):
    """No partition could be dropped without forgetting a limit, so a new key shares the overflow partition."""

    name: ClassVar[str] = "partitions.full"
    max_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaEjected(Event):
    """A replica fails where others do not, and gets no requests for `eject_for` seconds.

    `reason` is `consecutive` or `failure_rate`.
    """

    name: ClassVar[str] = "replica.ejected"
    replica: str
    reason: str
    eject_for: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReturned(Event):
    """A replica that was ejected gets requests again."""

    name: ClassVar[str] = "replica.returned"
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupsUsed(Event):
    """No primary replica is healthy, so the backups get the requests from now on."""

    name: ClassVar[str] = "backups.used"


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancerPanicked(Event):
    """No replica is healthy, so all of them get requests from now on, ejected or not."""

    name: ClassVar[str] = "balancer.panicked"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainBegan(Event):
    """The process is about to end: not ready from now on, `grace` seconds later no new requests.

    Those in flight, `in_flight` of them now, have `timeout` seconds after that.
    """

    name: ClassVar[str] = "drain.began"
    grace: float
    timeout: float
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainEnded(Event):
    """The process may end, `seconds` after it was told to; `in_flight` requests were not done in time."""

    name: ClassVar[str] = "drain.ended"
    seconds: float
    in_flight: int


Listener = Callable[[Event], object]


class Subscription:
    """What `listen` returns: `close()` it, or use it as a context manager, to stop listening."""

    def __init__(self, close: Callable[[], object]) -> None:
        self._close = close

    def close(self) -> None:
        """Stop listening; closing twice does no harm."""
        self._close()
        self._close = _nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _nothing() -> None:
    pass


class Listeners:
    """An ordered set of listeners, replaced as a whole on each change so that reading it needs no lock."""

    __slots__ = ("current",)

    def __init__(self) -> None:
        self.current: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> Subscription:
        """Add a listener; what is returned takes it away again."""
        if not callable(listener):
            raise TypeError(f"listener={listener!r} must be a function of one event")
        if inspect.iscoroutinefunction(listener) or inspect.iscoroutinefunction(
            getattr(listener, "__call__", None)  # noqa: B004 - callable() cannot see the colour
        ):
            raise TypeError(f"listener={listener!r} must be a sync function: events are never awaited")
        entry = (listener,)
        self.current += entry

        def remove() -> None:
            remaining = list(self.current)
            if listener in remaining:
                remaining.remove(listener)
            self.current = tuple(remaining)

        return Subscription(remove)


everywhere = Listeners()
"""Listeners to the events of every policy of the process."""


def listen(listener: Listener) -> Subscription:
    """Hear the events of every policy in this process.

    Args:
        listener: A sync function of one `Event`.

    Returns:
        A subscription: `close()` it, or use it in a `with` statement, to stop.

    Raises:
        TypeError: The listener is not callable, or is async.
    """
    return everywhere.add(listener)


def deliver(event: Event, listeners: tuple[Listener, ...]) -> None:
    """Hand an event to listeners; one that raises is logged and disturbs nobody."""
    for listener in listeners:
        try:
            listener(event)
        except Exception:
            logger.exception("listener %r failed on %s", listener, event.name)
