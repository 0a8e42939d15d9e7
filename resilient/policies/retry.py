"""Retry: make a failed call again, after a wait.

The vocabulary is tenacity's: any `wait_*`, `stop_*` and `retry_*` strategy and their combinations mean here
what they mean there, evaluated on tenacity's own `RetryCallState`. That state is built when the first attempt
has failed, so a success never pays for it. The engine is not tenacity's: the original error is raised, not a
`RetryError`; there is always an end; and nothing is shared between concurrent calls.

The default wait is exponential backoff with full jitter: uniform between 0 and 0.1 s, 0.2 s, 0.4 s ... up to
5 s (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): it spreads the retries of many
clients best. Three attempts, because attempts multiply when layers retry: 3 layers of 3 make 27 calls.
"""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import tenacity
from tenacity.retry import retry_base
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from resilient import blocks, deadline, events, options, runtime
from resilient.call import Call
from resilient.counter import Counter
from resilient.edge import Edge
from resilient.errors import FailedResponse, FailedResult, Rejected
from resilient.kinds import Attempts, Loop
from resilient.policies.retry_budget import RetryBudget, RetryBudgetStatistics

Stop: TypeAlias = int | timedelta | stop_base | Callable[[tenacity.RetryCallState], bool]
Wait: TypeAlias = float | timedelta | wait_base | Callable[[tenacity.RetryCallState], float]

_SPREAD, _MOST_SPREAD = 0.1, 1.0
"""A wait that the other side asks for is a floor: who were told the same come back over 10 % more, at most 1 s."""

FULL_JITTER = tenacity.wait_random_exponential(multiplier=0.1, max=5)

_OWNER = tenacity.Retrying()
"""tenacity's strategies never look at the engine that asks them, but the state wants one."""

_EXCEPTION_ONLY = frozenset(
    {
        tenacity.retry_if_exception.__call__,
        tenacity.retry_if_exception_cause_type.__call__,
        type(tenacity.retry_never).__call__,
    }
)
"""Strategies that never call a success a failure, so that successes need not be shown to them."""


@dataclass(frozen=True, slots=True)
class RetryStatistics:
    """A snapshot of a `Retry`.

    Attributes:
        retries: Attempts that were made again.
        gave_up: Calls whose retryable error was raised after all.
        budget: The statistics of its budget, None without one.
    """

    retries: int
    gave_up: int
    budget: RetryBudgetStatistics | None = None


class Retry(Loop):
    """Make a failed call again.

    Never made again: calls that ended in a `BaseException` such as cancellation or `KeyboardInterrupt`; calls
    that their edge says cannot be repeated; calls refused by a policy that does not say when to come back,
    unless `on` names the refusal. A wait that the deadline leaves no room for is not begun: the error is
    raised at once.

    Args:
        stop: When to give up: an int is the greatest number of attempts, a timedelta the time after which
            none is made, else any tenacity `stop_*` or a function of its `RetryCallState`. Default 3 attempts.
        on: Which errors are worth another try: exception classes, HTTP status codes and functions of the error,
            one or several as in `{429, 503, OSError}`, or any tenacity `retry_*`. Required for plain functions;
            the edges of HTTP know their own transient errors and statuses.
        wait: Seconds between attempts as a number or a timedelta, else any tenacity `wait_*` or a function of
            its `RetryCallState`. Default full jitter: uniform in 0..0.1 s, doubling up to 0..5 s.
        max_retry_after: The longest time in seconds that the other side may ask to wait (`Retry-After`, an
            open circuit breaker) before the error is raised instead. Default 60 s.
        budget: A `RetryBudget` that every retry has to be paid from. Default None: no budget.
        name: What errors and events call this policy. Default: its repr.

    Raises:
        Exception: That of the last attempt, itself, with a note such as `3 attempts in 1.42 s`. If the other
            side asked for a wait that does not fit, it has the attribute `retry_after`.

    Emits:
        RetryScheduled, RetryGaveUp.
    """

    def __init__(
        self,
        stop: Stop = 3,
        *,
        on: "options.Errors | retry_base | None" = None,
        wait: Wait = FULL_JITTER,
        max_retry_after: options.Seconds = 60.0,
        budget: RetryBudget | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.stop = stop
        self.on = on
        self.wait = wait
        self.max_retry_after = options.seconds("Retry", "max_retry_after", max_retry_after, zero=True)
        if budget is not None and not isinstance(budget, RetryBudget):
            raise options.refuse("Retry", "budget", budget, "a RetryBudget or None", TypeError)
        self.budget = budget
        self._stops = _stop(stop, decorates=on is None)
        self._waits = _wait(wait)
        self._wants = None if on is None or isinstance(on, retry_base) else options.errors("Retry", "on", on)
        self._matches = None if self._wants is None else options.matcher(self._wants)
        if self._wants is not None:
            self.judge_statuses_of(self._wants)
        elif isinstance(on, retry_base) and _judges_results(on):
            self.judge = self._judge
        self._retries = Counter()
        self._gave_up = Counter()

    def check_edge(self, edge: Edge) -> None:
        if self.on is None and not edge.knows_failures:
            raise TypeError(
                "Retry: on= is required here: only you know which errors of this function are worth another try. "
                "Give exception classes, a function of the error, or a tenacity retry_* strategy"
            )

    def __iter__(self) -> Iterator[blocks.Attempt]:
        self._check_block()
        return super().__iter__()

    def __aiter__(self) -> AsyncIterator[blocks.Attempt]:
        self._check_block()
        return super().__aiter__()

    def _check_block(self) -> None:
        if self.budget is not None and self.budget.key is not None:
            raise TypeError("RetryBudget: key= is a function of the call's arguments, and a block has none")

    def succeeded(self, call: Call) -> None:
        budget = self.budget
        if budget is not None and budget.drawn_on:
            budget.deposit(budget.key_of(call))

    def _counts_successes(self) -> bool:
        return self.budget is not None

    def next_delay(self, attempts: Attempts, error: Exception, now: float) -> float | None:
        if not self._worth_another_try(attempts, error, now):
            return None
        edge = attempts.edge
        if not edge.repeatable(attempts.call, error):
            self._give_up(attempts, error, now, "not_repeatable")
            return None
        delay = self._waits if isinstance(self._waits, float) else self._ask_wait(attempts, error, now)
        asked = edge.retry_after(error)
        if asked is not None and asked > delay:
            limit = deadline.current()
            room = asked if limit is None else max(0.0, limit.at - now - asked) / 2  # so that what fits still fits
            delay = asked + runtime.random(0.0, min(asked * _SPREAD, _MOST_SPREAD, room))
        if self._spent(attempts, error, now, delay):
            self._give_up(attempts, error, now, "attempts")
            return None
        if asked is not None and asked > self.max_retry_after:
            self._give_up(attempts, error, now, "retry_after", asked)
            return None
        limit = deadline.current()
        if limit is not None and now + delay >= limit.at:
            self._give_up(attempts, error, now, "deadline", asked)
            return None
        if self.budget is not None and not self.budget.withdraw(
            error, now, self.budget.key_of(attempts.call), timed_out=edge.timed_out(error)
        ):
            self._give_up(attempts, error, now, "budget")
            return None
        if attempts.state is not None:
            attempts.state.idle_for += delay
            attempts.state.prepare_for_next_attempt()
        self._retries.add()
        self.emit(events.RetryScheduled, attempt=attempts.number, delay=delay, error=type(error).__name__)
        return delay

    def _worth_another_try(self, attempts: Attempts, error: Exception, now: float) -> bool:
        if isinstance(error, tenacity.TryAgain):
            return True
        if isinstance(error, Rejected) and error.retry_after is None and not self._names(error):
            return False
        if isinstance(self.on, retry_base):
            return bool(_settled("on", self.on(self._state(attempts, error, now))))
        if isinstance(error, FailedResult) and not isinstance(error, FailedResponse):
            return True
        if self._matches is None:
            return attempts.edge.transient(error)
        return bool(self._matches(error))

    def _names(self, error: Rejected) -> bool:
        wanted = self._wants if isinstance(self._wants, tuple) else (self._wants,)
        named = [each for each in wanted if isinstance(each, type) and issubclass(each, Rejected)]
        return isinstance(error, tuple(named))

    def _ask_wait(self, attempts: Attempts, error: Exception, now: float) -> float:
        assert not isinstance(self._waits, float)  # noqa: S101 - the caller has looked
        delay = _settled("wait", self._waits(self._state(attempts, error, now)))
        return options.seconds("Retry", "wait", delay or 0.0, zero=True)

    def _spent(self, attempts: Attempts, error: Exception, now: float, delay: float) -> bool:
        if isinstance(self._stops, int):
            return attempts.number >= self._stops
        state = self._state(attempts, error, now)
        state.upcoming_sleep = delay
        return bool(_settled("stop", self._stops(state)))

    def _state(self, attempts: Attempts, error: Exception, now: float) -> tenacity.RetryCallState:
        """Return tenacity's view of this call, brought up to the attempt that has just failed."""
        state: tenacity.RetryCallState | None = attempts.state
        if state is None:
            call = attempts.call
            state = attempts.state = tenacity.RetryCallState(_OWNER, call.function, call.args, call.kwargs)
            state.start_time = attempts.started
        if state.outcome is None:
            if isinstance(error, FailedResult):
                state.set_result(error.result)
            else:
                state.set_exception((type(error), error, error.__traceback__))
            state.outcome_timestamp = now  # tenacity stamps with its own clock
            state.attempt_number = attempts.number
        return state

    def _judge(self, call: Call, result: Any) -> BaseException | None:
        assert isinstance(self.on, retry_base)  # noqa: S101 - __init__ has looked
        state = tenacity.RetryCallState(_OWNER, call.function, call.args, call.kwargs)
        state.attempt_number = call.attempt
        state.set_result(result)
        return FailedResult(result) if _settled("on", self.on(state)) else None

    def _give_up(
        self, attempts: Attempts, error: Exception, now: float, reason: str, asked: float | None = None
    ) -> None:
        elapsed = now - attempts.started
        tries = f"{attempts.number} attempt{'s' if attempts.number > 1 else ''}"
        _note(error, f"{self.label}: ", f"{tries} in {elapsed:.2f} s{_WHY[reason]}")
        if asked is not None:
            _tell_retry_after(error, asked)
        self._gave_up.add()
        self.emit(
            events.RetryGaveUp,
            attempts=attempts.number,
            elapsed=elapsed,
            reason=reason,
            error=type(error).__name__,
        )

    def statistics(self) -> RetryStatistics:
        """Return how often this policy retried and gave up."""
        budget = None if self.budget is None else self.budget.statistics()
        return RetryStatistics(retries=self._retries.value, gave_up=self._gave_up.value, budget=budget)


_WHY = {
    "attempts": "",
    "not_repeatable": "; the call cannot be repeated",
    "retry_after": "; the other side asked for a longer wait than max_retry_after",
    "deadline": "; the next attempt would begin after the deadline",
    "budget": "; the retry budget is used up",
}


def _stop(stop: Any, *, decorates: bool) -> int | Callable[[tenacity.RetryCallState], bool]:
    allowed = "a number of attempts >= 1, a timedelta, a tenacity stop_* strategy or a function of RetryCallState"
    if isinstance(stop, timedelta):
        return tenacity.stop_after_delay(options.seconds("Retry", "stop", stop))
    if isinstance(stop, int) and not isinstance(stop, bool):
        if stop < 1:
            raise options.refuse("Retry", "stop", stop, allowed)
        return stop
    if decorates and inspect.isfunction(stop):
        allowed += ". To decorate a function write @Retry(on=...) with parentheses"
        raise options.refuse("Retry", "stop", stop, allowed, TypeError)
    if not callable(stop) or isinstance(stop, type | retry_base) or options.is_async(stop):
        if isinstance(stop, type | tuple | list | set | frozenset | retry_base):
            allowed += ". Which errors are worth another try goes into on="
        raise options.refuse("Retry", "stop", stop, allowed, TypeError)
    strategy: Callable[[tenacity.RetryCallState], bool] = stop
    return strategy


def _wait(wait: Any) -> float | Callable[[tenacity.RetryCallState], float]:
    if isinstance(wait, timedelta | int | float) and not isinstance(wait, bool):
        return options.seconds("Retry", "wait", wait, zero=True)
    if not callable(wait) or isinstance(wait, type) or options.is_async(wait):
        allowed = (
            "a number of seconds >= 0, a timedelta, a tenacity wait_* strategy or a function of RetryCallState"
        )
        raise options.refuse("Retry", "wait", wait, allowed, TypeError)
    strategy: Callable[[tenacity.RetryCallState], float] = wait
    return strategy


def _judges_results(strategy: Callable[..., bool]) -> bool:
    if isinstance(strategy, tenacity.retry_any | tenacity.retry_all):
        return any(_judges_results(each) for each in strategy.retries)
    return type(strategy).__call__ not in _EXCEPTION_ONLY


def _settled(option: str, answer: Any) -> Any:
    """Return the answer of a strategy, refusing one that would have to be awaited."""
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(f"Retry: {option}= gave an awaitable; policies decide without awaiting, in both colours")
    return answer


def _note(error: Exception, who: str, what: str) -> None:
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list) and notes and str(notes[-1]).startswith(who):
        notes[-1] = who + what  # one error object that is raised again and again would collect notes for ever
        return
    try:
        error.add_note(who + what)
    except (AttributeError, TypeError):  # a frozen exception, or one whose notes are no list: it matters more
        return


def _tell_retry_after(error: Exception, seconds: float) -> None:
    try:
        error.retry_after = seconds  # type: ignore[attr-defined]
    except AttributeError:  # a frozen exception, or a property: the note has said it
        return
