"""pybreaker's listeners, storages and breakers, at work with `CircuitBreaker`.

pybreaker's own engine holds its lock while the user's function runs, so that all threads take turns, and it
never sees the failures of an `async def`. Its parts are useful all the same: a listener may be in place, a
storage may share the state of several processes, and a breaker may be the one that another part of the program
uses too.
"""

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import pybreaker

from resilient import events, options, runtime
from resilient.call import Call

if TYPE_CHECKING:
    from resilient.policies.circuit_breaker import CircuitBreaker

logger = logging.getLogger("resilient")


class Observer(Protocol):
    """Somebody who wants to know of admissions, outcomes and transitions."""

    def admitting(self, call: Call, now: float) -> None:
        """A call is about to be admitted or refused."""

    def admitted(self, call: Call) -> None:
        """A call was admitted."""

    def ended(self, error: BaseException | None) -> None:
        """An admitted call ended; `error` is None for all that counts as a success."""

    def changed(self, before: str, after: str) -> None:
        """The breaker changed its state."""


@dataclass(frozen=True, slots=True)
class StateView:
    """What pybreaker's listeners look at in a state: its name."""

    name: str


class Listening:
    """Tells pybreaker's listeners; one that raises is logged and disturbs nobody."""

    def __init__(self, breaker: "CircuitBreaker", listeners: Sequence[pybreaker.CircuitBreakerListener]) -> None:
        self._breaker = breaker
        self._listeners = listeners

    def admitting(self, call: Call, now: float) -> None:
        """Nothing to tell yet."""

    def admitted(self, call: Call) -> None:
        self._tell("before_call", call.function, *call.args, **call.kwargs)

    def ended(self, error: BaseException | None) -> None:
        if error is None:
            self._tell("success")
        else:
            self._tell("failure", error)

    def changed(self, before: str, after: str) -> None:
        self._tell("state_change", StateView(before), StateView(after))

    def _tell(self, what: str, *args: Any, **kwargs: Any) -> None:
        for listener in self._listeners:
            try:
                getattr(listener, what)(self._breaker, *args, **kwargs)
            except Exception:
                logger.exception("listener %r failed on %s", listener, what)


class Sharing:
    """Keeps a pybreaker storage and a breaker in step. The storage's own errors never disturb a call."""

    def __init__(self, breaker: "CircuitBreaker", storage: pybreaker.CircuitBreakerStorage) -> None:
        self._breaker = breaker
        self._storage = storage

    def admitting(self, call: Call, now: float) -> None:
        with self._logged():
            stored = self._storage.state
            if stored != self._breaker.current_state:
                until = self._opened_until(now) if stored == pybreaker.STATE_OPEN else None
                self._breaker.adopt(stored, now, until)

    def admitted(self, call: Call) -> None:
        """Nothing to store."""

    def ended(self, error: BaseException | None) -> None:
        with self._logged():
            if error is None:
                if self._storage.counter:
                    self._storage.reset_counter()
                return
            self._storage.increment_counter()
            enough = self._breaker.consecutive
            if enough is not None and self._storage.counter >= enough and self._breaker.current_state == "closed":
                self._breaker.force_open("consecutive")

    def changed(self, before: str, after: str) -> None:
        with self._logged():
            if self._storage.state == after:  # it is where the change came from
                return
            if after == pybreaker.STATE_OPEN:
                self._storage.opened_at = datetime.now(UTC)
            if after == pybreaker.STATE_CLOSED:
                self._storage.reset_counter()
            self._storage.state = after

    def _opened_until(self, now: float) -> float:
        opened_at = self._storage.opened_at
        elapsed = 0.0 if opened_at is None else (datetime.now(UTC) - opened_at).total_seconds()
        return now + max(0.0, self._breaker.open_for - max(0.0, elapsed))

    @contextlib.contextmanager
    def _logged(self) -> Generator[None]:
        try:
            yield
        except Exception:
            logger.exception("the storage %r of %s failed", self._storage.name, self._breaker.label)


def observers(breaker: "CircuitBreaker") -> list[Observer]:
    """Return the observers that the options of a breaker ask for.

    Raises:
        TypeError: An option is not what pybreaker would take.
        ValueError: Options that have no effect on a breaker that was handed in.
    """
    for listener in breaker.listeners:
        if not isinstance(listener, pybreaker.CircuitBreakerListener):
            allowed = "objects of pybreaker.CircuitBreakerListener"
            raise options.refuse("CircuitBreaker", "listeners", listener, allowed, TypeError)
    storage = breaker.storage
    if storage is not None and not isinstance(storage, pybreaker.CircuitBreakerStorage):
        allowed = "a pybreaker.CircuitBreakerStorage"
        raise options.refuse("CircuitBreaker", "storage", storage, allowed, TypeError)
    if breaker.breaker is not None:
        _check_lone(breaker)
    found: list[Observer] = []
    if breaker.listeners:
        found.append(Listening(breaker, breaker.listeners))
    if storage is not None:
        found.append(Sharing(breaker, storage))
    return found


def _check_lone(breaker: "CircuitBreaker") -> None:
    if not isinstance(breaker.breaker, pybreaker.CircuitBreaker):
        allowed = "a pybreaker.CircuitBreaker; all other options go by keyword"
        if inspect.isroutine(breaker.breaker):
            allowed += ". To decorate a function write @CircuitBreaker() with parentheses"
        raise options.refuse("CircuitBreaker", "breaker", breaker.breaker, allowed, TypeError)
    changed = breaker.changed_options() - {"breaker", "probe_lease", "name"}
    if changed:
        option = min(changed)
        allowed = "nothing: the pybreaker.CircuitBreaker that was handed in decides"
        raise options.refuse("CircuitBreaker", option, getattr(breaker, option), allowed)


def attach(breaker: "CircuitBreaker") -> None:
    """Put observers, or a breaker that was handed in, into the path of the calls."""
    if breaker.breaker is not None:
        borrowed = Borrowed(breaker, breaker.breaker)
        breaker.admit = borrowed.admit  # type: ignore[method-assign]
        breaker.settle = borrowed.settle  # type: ignore[method-assign]
    elif breaker._observers:
        observed = Observed(breaker)
        breaker.admit = observed.admit  # type: ignore[method-assign]
        breaker.settle = observed.settle  # type: ignore[method-assign]


class Observed:
    """The hooks of a breaker with observers around them."""

    def __init__(self, breaker: "CircuitBreaker") -> None:
        self._breaker = breaker
        self._admit = breaker.admit
        self._settle = breaker.settle

    def admit(self, call: Call, now: float) -> None:
        for observer in self._breaker._observers:
            observer.admitting(call, now)
        self._admit(call, now)
        for observer in self._breaker._observers:
            observer.admitted(call)

    def settle(self, call: Call, error: BaseException | None, started: float, now: float) -> None:
        late = started < self._breaker._since  # it tells of an earlier state
        failed = None if late else self._breaker.verdict(call, error, started, now)
        if failed is not None:
            for observer in self._breaker._observers:
                observer.ended(error if failed else None)
        self._settle(call, error, started, now)  # a transition is told after the outcome that caused it


def _trial() -> Generator[None]:
    yield


class Borrowed:
    """A pybreaker breaker that decides, without its lock being held while the call runs.

    `call()` of a generator function returns before the generator has begun: pybreaker has then checked its
    state, told its listeners of the call, and released its lock. Finishing the generator later reports a
    success, throwing into it a failure; dropping it unstarted reports nothing, which is right for a call that
    was cancelled. pybreaker would let everybody in while half-open, so one lease at a time is handed out.
    """

    def __init__(self, policy: "CircuitBreaker", breaker: pybreaker.CircuitBreaker) -> None:
        self._policy = policy
        self._breaker = breaker
        # By call and start: a call that was abandoned in its thread may be under way twice.
        self._running: dict[
            tuple[Call, float], tuple[pybreaker.CircuitBreakerState, Generator[Any, Any, Any]]
        ] = {}
        self._probe: tuple[Call, float] | None = None
        self._reporter = _Reporter(policy)
        breaker.add_listener(self._reporter)

    def admit(self, call: Call, now: float) -> None:
        well = self._breaker.current_state == pybreaker.STATE_CLOSED
        if not well:
            with self._policy._lock:
                if self._probe is not None and now < self._probe[1]:
                    retry_after = self._probe[1] - now
                    taken = True
                else:
                    self._probe = (call, now + self._policy.probe_lease)
                    taken = False
            if taken:
                raise self._policy.refusal(retry_after)
        try:
            trial = self._breaker.call(_trial)
        except pybreaker.CircuitBreakerError:
            self._end_probe(call, now)
            raise self._policy.refusal(self._reporter.retry_after(now)) from None
        self._running[call, now] = (self._breaker.state, trial)

    def settle(self, call: Call, error: BaseException | None, started: float, now: float) -> None:
        state, trial = self._running.pop((call, started))
        late = now >= started + self._policy.probe_lease
        fenced = state.name != pybreaker.STATE_CLOSED and (not self._end_probe(call, started) or late)
        failed = None if fenced else self._policy.verdict(call, error, started, now)
        if failed is None or self._breaker.state is not state:
            return
        with contextlib.suppress(StopIteration, pybreaker.CircuitBreakerError):
            next(trial)
            if error is None or not failed:
                next(trial)
            else:
                with contextlib.suppress(type(error)):
                    trial.throw(error)

    def _end_probe(self, call: Call, started: float) -> bool:
        with self._policy._lock:
            mine = self._probe == (call, started + self._policy.probe_lease)
            if mine:
                self._probe = None
            return mine


class _Reporter(pybreaker.CircuitBreakerListener):
    """Turns the transitions of a breaker that was handed in into our events."""

    def __init__(self, policy: "CircuitBreaker") -> None:
        self._policy: Callable[[], CircuitBreaker | None] = weakref.ref(policy)
        self._opened_at: float | None = None
        self._reset_timeout = 0.0

    def state_change(self, cb: pybreaker.CircuitBreaker, old_state: Any, new_state: Any) -> None:
        policy = self._policy()
        if new_state.name == pybreaker.STATE_OPEN:
            self._opened_at = runtime.now()
        if policy is None:
            return
        if new_state.name == pybreaker.STATE_OPEN:
            policy.emit(events.CircuitOpened, reason="pybreaker", open_for=float(cb.reset_timeout))
        elif new_state.name == pybreaker.STATE_HALF_OPEN:
            policy.emit(events.CircuitHalfOpened)
        else:
            policy.emit(events.CircuitClosed)

    def retry_after(self, now: float) -> float:
        """Return the seconds until pybreaker lets a call try again: all of its timeout if that is unknown."""
        policy = self._policy()
        assert policy is not None and policy.breaker is not None  # noqa: S101, PT018 - it is asking
        timeout = float(policy.breaker.reset_timeout)
        return timeout if self._opened_at is None else max(0.0, timeout - (now - self._opened_at))
