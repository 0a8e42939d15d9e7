"""Circuit breaker: stop calling what fails, and find out when it is well again.

    CLOSED ----- too many failures, or too many slow calls -----> OPEN
       ^                                                         |   ^
       |                                              open time  |   |  too many probes fail:
       |  enough probes succeed                        is over   v   |  the next open time is longer
       +---------------------------------------------------- HALF-OPEN

(Nygard, "Release It!".) What is easy to get wrong, and how it is done here:

* A half-open breaker lets probes through one at a time, however many callers there are. Each probe is a lease
  that expires, so one that hangs or is cancelled cannot keep the breaker half-open for ever.
* A result counts only if its call began after the last change of state: a slow success from before the trip
  does not close the breaker, a slow failure from before does not open it again.
* Refusals of other policies and cancellation say nothing about the dependency, and count as nothing.
* The state ages from the clock readings it is given. There are no timers.
* Open times grow and are jittered: a fleet of clients should not probe in step.
* No code of yours runs under the lock, and the success path takes no lock.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pybreaker

from resilient import deadline, events, options, pybreaker_bridge, runtime
from resilient.call import Call
from resilient.counter import Counter
from resilient.edge import Edge
from resilient.errors import CircuitOpen, FailedResponse, FailedResult, Rejected, TimedOut
from resilient.keyed import Keyed
from resilient.kinds import Gate
from resilient.policy import Policy
from resilient.ticket import Ticket
from resilient.windows import CountWindow, Streak, TimeWindow, Window


class State(Enum):
    """The state of a circuit breaker; the values are pybreaker's names."""

    CLOSED = pybreaker.STATE_CLOSED
    OPEN = pybreaker.STATE_OPEN
    HALF_OPEN = pybreaker.STATE_HALF_OPEN


_CLOCKS_DIFFER = 0.001  # seconds: trio cancels by a clock of its own

# Looking up a member of an enum costs as much as calling a function.
_CLOSED, _OPEN, _HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN
_WORST_FIRST = pybreaker.STATE_OPEN, pybreaker.STATE_HALF_OPEN, pybreaker.STATE_CLOSED


@dataclass(frozen=True, slots=True)
class CircuitBreakerStatistics:
    """A snapshot of a `CircuitBreaker`.

    Attributes:
        state: `closed`, `open` or `half-open`.
        calls: Calls in the window.
        failures: How many of them failed.
        slow: How many of them were slow.
        opened: How often the breaker has opened since it was made.
        rejected: Calls that were refused.
        partitions: The same for each key, if there are keys; the numbers above are then sums, and `state` is the
            worst of theirs. If plain functions or blocks are guarded as well, these are included there.
    """

    state: str
    calls: int
    failures: int
    slow: int
    opened: int
    rejected: int
    partitions: Mapping[Hashable, "CircuitBreakerStatistics"] = field(default_factory=dict)


class CircuitBreaker(Gate):
    """Refuse calls to what has been failing, and probe whether it is well again.

    Args:
        breaker: An existing `pybreaker.CircuitBreaker` that decides instead. All options but `probe_lease`,
            `name` and the listeners of the breaker itself are then its own.
        failure_rate: Open when at least this fraction of the calls in the window failed. Default 0.5.
        minimum_calls: Do not judge by fewer calls than this. Default 20.
        window: The window in seconds, in ten slices. Default 30 s.
        last: Use a window of the last so many calls instead. Default None.
        slow: A call that takes this many seconds or longer is slow. Default None: no call is.
        slow_rate: Open when at least this fraction of the calls in the window was slow. Default 0.5.
        consecutive: Open after so many failures in a row instead of by rate. Default None.
        open_for: Seconds for which the breaker stays open the first time. Default 5 s.
        max_open_for: Each time that the probes fail, the open time doubles, up to this. Default 60 s.
        jitter: Vary each open time by up to this fraction in both directions. Default 0.2.
        probes: How many probes decide, one after the other, when the open time is over. Default 3. They are
            judged by the same rates; with `consecutive`, one that fails is enough to open again.
        probe_lease: A probe that has not ended after so many seconds is given up, and another call may probe.
            Make it longer than the timeout of an attempt. Default 10 s.
        on: Which errors are failures: exception classes, HTTP status codes and functions of the error. All others
            show that the dependency answers, and count as successes. Default `Exception`; on the edges of HTTP
            that leaves out what is not the dependency's fault, such as a 429 or a full connection pool, unless
            its status code or a function names it.
        key: A function of the call's arguments that returns the partition (hashable): each has a breaker of its
            own, see `of`. Default None: that of the edge, which is the origin of an HTTP request, and a single
            breaker for functions and wherever `breaker` or `storage` is given.
        max_keys: How many partitions are remembered; closed and quiet ones are forgotten first. Default 1024.
        listeners: `pybreaker.CircuitBreakerListener` objects to tell.
        storage: A `pybreaker.CircuitBreakerStorage` that shares the state with other breakers. It is asked on
            every call; with `consecutive`, its counter decides.
        name: What errors and events call this policy. Default: its repr.

    Raises:
        CircuitOpen: The breaker is open. It is also a `pybreaker.CircuitBreakerError`; `retry_after` is None
            only after `isolate()`.

    Emits:
        CircuitOpened, CircuitHalfOpened, CircuitClosed, CircuitRejected.
    """

    __slots__ = ("_since", "_slow_from", "_state", "_window")  # read by every call

    def __init__(
        self,
        breaker: pybreaker.CircuitBreaker | None = None,
        *,
        failure_rate: float = 0.5,
        minimum_calls: int = 20,
        window: options.Seconds = 30.0,
        last: int | None = None,
        slow: options.Seconds | None = None,
        slow_rate: float = 0.5,
        consecutive: int | None = None,
        open_for: options.Seconds = 5.0,
        max_open_for: options.Seconds = 60.0,
        jitter: float = 0.2,
        probes: int = 3,
        probe_lease: options.Seconds = 10.0,
        on: "options.Errors" = Exception,
        listeners: Sequence[pybreaker.CircuitBreakerListener] = (),
        storage: pybreaker.CircuitBreakerStorage | None = None,
        key: Callable[..., Hashable] | None = None,
        max_keys: int = 1024,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        me = "CircuitBreaker"
        self.failure_rate = options.fraction(me, "failure_rate", failure_rate)
        self.minimum_calls = options.whole(me, "minimum_calls", minimum_calls)
        self.window = options.seconds(me, "window", window)
        self.last = None if last is None else options.whole(me, "last", last)
        self.slow = None if slow is None else options.seconds(me, "slow", slow)
        self.slow_rate = options.fraction(me, "slow_rate", slow_rate)
        self.consecutive = None if consecutive is None else options.whole(me, "consecutive", consecutive)
        self.open_for = options.seconds(me, "open_for", open_for)
        self.max_open_for = options.seconds(me, "max_open_for", max_open_for)
        self.jitter = options.fraction(me, "jitter", jitter, zero=True)
        self.probes = options.whole(me, "probes", probes)
        self.probe_lease = options.seconds(me, "probe_lease", probe_lease)
        self.on = options.errors(me, "on", on)
        self.judge_statuses_of(self.on)
        if not isinstance(listeners, Sequence) or isinstance(listeners, str | bytes):
            allowed = "a list or tuple of pybreaker.CircuitBreakerListener objects"
            raise options.refuse(me, "listeners", listeners, allowed, TypeError)
        self.listeners = tuple(listeners)
        self.storage = storage
        self.breaker = breaker
        self.key = None if key is None else options.function(me, "key", key)
        self.max_keys = options.whole(me, "max_keys", max_keys)
        self._check_combination()
        self._observers = pybreaker_bridge.observers(self)
        self._names, self._matches = options.naming(self.on), options.matcher(self.on)
        self._decides = options.functions(self.on) == (self.on,)
        self.times_successes = self.slow is not None  # else a success may as well count from when its call began
        self._slow_from = float("inf") if self.slow is None else self.slow
        self._window: Window = self._new_window()
        self._asks = (
            bool(self._observers) or breaker is not None
        )  # then admit has more to do than look at the state
        self._state = _CLOSED
        self.free = not self._asks
        self._since = float("-inf")
        self._until: float | None = None
        self._trips = 0
        self._leases: dict[Call, float] = {}
        self._probed = self._probes_failed = self._probes_slow = 0
        self._opened = 0
        self._rejected = Counter()
        self._whole = breaker is not None or storage is not None
        self._partitions: _Partitions | None = None
        self._used = False  # not only by its partitions
        pybreaker_bridge.attach(self)

    def _check_combination(self) -> None:
        me = "CircuitBreaker"
        if self.max_open_for < self.open_for:
            raise options.refuse(me, "max_open_for", self.max_open_for, f"at least open_for={self.open_for:g}")
        if self.last is not None and self.last < self.minimum_calls:
            raise options.refuse(me, "minimum_calls", self.minimum_calls, f"an int up to last={self.last}")
        if self.consecutive is not None and (self.last is not None or self.slow is not None):
            other = "last" if self.last is not None else "slow"
            raise options.refuse(me, other, getattr(self, other), "None, as there is no window with consecutive=")
        changed = self.changed_options()
        if self.consecutive is not None:
            for option in sorted(changed & {"failure_rate", "minimum_calls", "slow_rate", "window"}):
                allowed = "nothing, as there is no window with consecutive="
                raise options.refuse(me, option, getattr(self, option), allowed)
        if self.last is not None and "window" in changed:
            raise options.refuse(me, "window", self.window, "nothing, as last= counts calls instead of seconds")
        if self.slow is None and "slow_rate" in changed:
            raise options.refuse(me, "slow_rate", self.slow_rate, "nothing without slow=, as no call is slow then")
        if self.key is not None and (self.storage is not None or self.breaker is not None):
            other = "storage=" if self.breaker is None else "an existing breaker"
            raise options.refuse(me, "key", self.key, f"None, as {other} holds a single state")

    def _new_window(self) -> Window:
        if self.consecutive is not None:
            return Streak()
        return TimeWindow(self.window) if self.last is None else CountWindow(self.last)

    # -- partitions ---------------------------------------------------------------------------------------------

    def on_edge(self, edge: Edge) -> Policy:
        if not self._whole and (self.key is not None or edge.partitions):
            partitions = self._by_key()
            partitions.tells = partitions.tells and edge.tells_keys
            return partitions
        self._used = True
        return self

    def block(self) -> Any:
        self._check_block()
        return super().block()

    def ablock(self) -> Any:
        self._check_block()
        return super().ablock()

    def _check_block(self) -> None:
        if self.key is not None and not self._whole:
            raise TypeError("CircuitBreaker: key= is a function of the call's arguments, and a block has none")
        self._used = True

    def of(self, key: Hashable) -> "CircuitBreaker":
        """Return the breaker of a key, such as `"https://example.com"`: to look at it, or to open it.

        That is this breaker itself where there are no partitions, as with `storage`.
        """
        if self._whole:
            return self
        breaker = self._by_key().of(key)
        assert isinstance(breaker, CircuitBreaker)  # noqa: S101 - that is what they are made of
        return breaker

    def _by_key(self) -> "_Partitions":
        if self._partitions is None:
            with self._lock:
                self._partitions = self._partitions or _Partitions(self)
        return self._partitions

    def _members(self) -> "dict[Hashable, CircuitBreaker]":
        return {} if self._partitions is None else self._partitions.policies()  # type: ignore[return-value]

    # -- the state machine: everything that changes the state is below ------------------------------------------

    def admit(self, call: Call, now: float) -> Ticket | None:
        if self._state is _CLOSED:
            return None
        with self._lock:
            half_opened = self._state is _OPEN and self._until is not None and now >= self._until
            if half_opened:
                self._enter(_HALF_OPEN, now)
            refused = self._state is not _CLOSED and not self._lease(call, now)
            retry_after = self._retry_after(now)
        if half_opened:
            self._report(_OPEN, _HALF_OPEN, events.CircuitHalfOpened)
        if refused:
            raise self.refusal(retry_after)
        return None

    def settle(self, call: Call, error: BaseException | None, started: float, now: float) -> None:
        if error is None and self._state is _CLOSED and now - started < self._slow_from:
            if started >= self._since:
                window = self._window
                current = window.current
                if now < current.ends:
                    next(current.ticks)
                else:
                    window.success(now)
            return
        slow = now - started >= self._slow_from
        failed = self.verdict(call, error, started, now)
        neutral = failed is None
        reason = None
        with self._lock:
            before = self._state
            if before is _CLOSED:
                if not neutral and started >= self._since:
                    self._window.record(now, failed=bool(failed), slow=slow)
                    reason = self._verdict(now)
            elif now < started + self.probe_lease and self._leases.pop(call, None) is not None and not neutral:
                self._probed += 1
                self._probes_failed += bool(failed)
                self._probes_slow += slow
                reason = self._verdict_on_probes()
            if reason is not None:
                self._enter(_CLOSED if reason == "well" else _OPEN, now)
            open_for = None if self._until is None else self._until - now
        if reason == "well":
            self._report(before, _CLOSED, events.CircuitClosed)
        elif reason is not None:
            self._report(before, _OPEN, events.CircuitOpened, reason=reason, open_for=open_for)

    def force_open(self, reason: str = "forced") -> None:
        """Open now, as if too many calls had failed: after the open time, probes decide.

        Args:
            reason: What `CircuitOpened` gives as the reason.
        """
        self._move(_OPEN, reason)

    def isolate(self) -> None:
        """Open now and stay open until `close()` is called."""
        self._move(_OPEN, "isolated")

    def close(self) -> None:
        """Close now, and forget what was counted."""
        self._move(_CLOSED, "closed")

    def _move(self, state: State, reason: str) -> None:
        now = runtime.now()
        with self._lock:
            before = self._state
            self._enter(state, now)
            if reason == "isolated":
                self._until = None
            open_for = None if self._until is None else self._until - now
        if state is _OPEN:
            self._report(before, state, events.CircuitOpened, reason=reason, open_for=open_for)
        elif before is not _CLOSED:
            self._report(before, state, events.CircuitClosed)
        for member in self._members().values():  # last: one that is made meanwhile has seen what happened here
            member._move(state, reason)

    def inherit(self, whole: "CircuitBreaker") -> None:
        """Begin as a partition of a breaker, which is isolated if that is; who isolated it has been told."""
        if whole._state is _OPEN and whole._until is None:
            self._enter(_OPEN, runtime.now())
            self._until = None

    def adopt(self, name: str, now: float, until: float | None) -> None:
        """Take over a state that another breaker has put into the shared storage, given by pybreaker's name."""
        state = State(name)
        with self._lock:
            before = self._state
            if before is state:
                return
            self._enter(state, now)
            if state is _OPEN:
                self._until = until
        if state is _OPEN:
            open_for = None if until is None else until - now
            self._report(before, state, events.CircuitOpened, reason="storage", open_for=open_for)
        else:
            self._report(before, state, events.CircuitClosed if state is _CLOSED else events.CircuitHalfOpened)

    def _enter(self, state: State, now: float) -> None:
        self._state = state
        self.free = state is _CLOSED and not self._asks
        self._since = now
        self._leases.clear()
        self._probed = self._probes_failed = self._probes_slow = 0
        if state is _OPEN:
            self._opened += 1
            self._until = now + self._open_time()
            self._trips += 1
        elif state is _CLOSED:
            self._window.reset()
            self._until = None
            self._trips = 0

    def _open_time(self) -> float:
        growing = min(self.open_for * 2.0 ** min(self._trips, 60), self.max_open_for)
        return growing * (1 + runtime.random(-self.jitter, self.jitter))

    def _lease(self, call: Call, now: float) -> bool:
        if self._state is not _HALF_OPEN:
            return False
        for probe, expires_at in list(self._leases.items()):
            if expires_at <= now:
                del self._leases[probe]
        if self._leases:
            return False
        self._leases[call] = now + self.probe_lease
        return True

    def _retry_after(self, now: float) -> float | None:
        if self._state is _HALF_OPEN:
            return max(0.0, min(self._leases.values(), default=now) - now)
        return None if self._until is None else self._until - now

    def _verdict(self, now: float) -> str | None:
        calls, failures, slow = self._window.counts(now)
        if self.consecutive is not None:
            return "consecutive" if failures >= self.consecutive else None
        if calls < self.minimum_calls:
            return None
        if failures >= self.failure_rate * calls and failures:
            return "failure_rate"
        return "slow_rate" if slow and slow >= self.slow_rate * calls else None

    def _verdict_on_probes(self) -> str | None:
        # Bad probes open again as soon as the rest cannot make up for them; there is no need to run the rest.
        failures = 1 if self.consecutive is not None else self.failure_rate * self.probes
        if self._probes_failed and self._probes_failed >= failures:
            return "probes"
        if self._probes_slow and self._probes_slow >= self.slow_rate * self.probes:
            return "probes"
        return "well" if self._probed >= self.probes else None

    @functools.cached_property
    def label(self) -> str:
        """What errors and events call it; the name of a breaker that was handed in serves too."""
        return self.name or (self.breaker and self.breaker.name) or repr(self)

    # -- what others may ask ------------------------------------------------------------------------------------

    def verdict(self, call: Call, error: BaseException | None, started: float, now: float) -> bool | None:
        """Tell whether the end of a call is a failure of the dependency; None if it says nothing about it."""
        if self.says_nothing(error, started, now):
            return None
        if not isinstance(error, Exception):
            return error is not None  # the cancellation by a deadline of ours, see says_nothing
        if self._names(error):
            return True
        if self._decides:
            return False
        if isinstance(error, FailedResult) and not isinstance(error, FailedResponse):
            return True
        return call.edge.blames(error) if self._matches(error) else False

    def says_nothing(self, error: BaseException | None, started: float, now: float) -> bool:
        """Tell whether the end of a call says nothing about the dependency.

        That is so if a policy refused the call, or if it was cancelled. A deadline around the breaker cancels
        too: that says nothing if it left the call less than half of its time, and is a failure if the call had
        most of it, as in `Timeout | CircuitBreaker` when the dependency hangs (in async code: an abandoned thread
        reports only when it ends).
        """
        if isinstance(error, TimedOut) or runtime.is_cancellation(error):
            limit = deadline.current()
            if limit is not None and now >= limit.at - _CLOCKS_DIFFER:
                return now - started < limit.scope.limit() / 2
        return isinstance(error, Rejected) or not isinstance(error, Exception | type(None))

    @property
    def current_state(self) -> str:
        """`closed`, `open` or `half-open`, as pybreaker names them."""
        members = self._members()
        states = {member.current_state for member in members.values()}
        if self._used or not members:
            states.add(self._own_state)
        return next(state for state in _WORST_FIRST if state in states)

    @property
    def _own_state(self) -> str:
        return self._state.value if self.breaker is None else self.breaker.current_state

    @property
    def fail_counter(self) -> int:
        """The failures in the window, for pybreaker's listeners."""
        return self._window.counts(runtime.now()).failures if self.breaker is None else self.breaker.fail_counter

    def idle(self, now: float) -> bool:
        if self.breaker is not None or not all(member.idle(now) for member in self._members().values()):
            return False
        with self._lock:
            return self._state is _CLOSED and not self._window.counts(now).calls

    def statistics(self) -> CircuitBreakerStatistics:
        """Return the state, what is in the window, and how often the breaker opened and refused."""
        partitions = {key: member.statistics() for key, member in self._members().items()}
        parts = list(partitions.values())
        if self._used or not parts:
            parts.append(self._own_statistics())
        return CircuitBreakerStatistics(
            state=self.current_state,
            calls=sum(part.calls for part in parts),
            failures=sum(part.failures for part in parts),
            slow=sum(part.slow for part in parts),
            opened=sum(part.opened for part in parts),
            rejected=sum(part.rejected for part in parts),
            partitions=partitions,
        )

    def _own_statistics(self) -> CircuitBreakerStatistics:
        with self._lock:
            counts = self._window.counts(runtime.now())
        return CircuitBreakerStatistics(
            state=self._own_state,
            calls=counts.calls,
            failures=counts.failures if self.breaker is None else self.breaker.fail_counter,
            slow=counts.slow,
            opened=self._opened,
            rejected=self._rejected.value,
        )

    def refusal(self, retry_after: float | None) -> CircuitOpen:
        """Report a refused call, and return the error for it."""
        self._rejected.add()
        self.emit(events.CircuitRejected, retry_after=retry_after)
        state = "half-open, and its probe is under way" if self._own_state == "half-open" else "open"
        return CircuitOpen(f"the circuit is {state}", policy=self.label, retry_after=retry_after)

    def _report(self, before: State, after: State, event: type[events.Event], **fields: Any) -> None:
        self.emit(event, **fields)
        for observer in self._observers:
            observer.changed(before.value, after.value)


class _Partitions(Keyed):
    """The breakers of one that is partitioned, one for each key."""

    def __init__(self, whole: CircuitBreaker) -> None:
        self._of_whole = whole
        self.tells = whole.key is None  # until an edge comes whose keys are not to be told
        super().__init__(self._make_member, key=whole.key, max_keys=whole.max_keys, name=whole.label)
        self._listeners = whole._listeners

    def _make_member(self) -> CircuitBreaker:
        member = self._of_whole.fresh()
        member._whole = True
        return member

    def _make_for(self, key: Hashable) -> Policy:
        member = self._make_member()
        member._listeners = self._listeners
        # An origin says who is down. A key of the user may be nobody's business.
        member.name = f"{self.label}[{key}]" if self.tells else self.label
        member.inherit(self._of_whole)
        return member
