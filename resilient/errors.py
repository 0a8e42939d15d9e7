"""Every error of the library, in one tree.

```
Exception
└── ResilientError                       everything that this library raises on its own account
    ├── Rejected                         a policy refused to run the call; nothing was executed
    │   ├── CircuitOpen                  the circuit breaker is open (also a pybreaker.CircuitBreakerError)
    │   ├── RateLimited                  the rate limit is used up
    │   ├── BulkheadFull                 all permits are taken and the queue is full, or waiting took too long
    │   ├── Shed                         there is more to do than can be done: the event loop or the queue is late
    │   ├── Draining                     the process is about to end (`resilient.asgi.Drain`)
    │   └── ThreadsExhausted             too many abandoned threads are still running (sync Timeout)
    ├── TimedOut                         a deadline passed (also a TimeoutError)
    └── FailedResult                     a result that counts as a failure, while it travels through the policies
        └── FailedResponse               a response whose status counts as one
```

Errors of your own functions are never wrapped: what a guarded function raises is what its caller sees.
"""

from typing import Any

import pybreaker


class ResilientError(Exception):
    """Base of all errors that come from the library itself."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by state: constructors here take keyword arguments, which the default protocol cannot replay."""
        return _rebuild, (type(self), self.args, self.__dict__)


class Rejected(ResilientError):
    """A policy refused to run the call, and the guarded function was not called.

    Args:
        reason: One sentence saying why.
        policy: The label of the policy that refused (its name, or its repr).
        retry_after: Seconds until a new try can succeed; None if that is unknown, which
            makes the refusal permanent as far as `Retry` is concerned.
    """

    def __init__(self, reason: str, *, policy: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.policy = policy
        self.retry_after = retry_after

    def __str__(self) -> str:
        """Say who refused, why, and when to come back; put together only when it is read."""
        if self.retry_after is None:
            return f"{self.policy}: {self.reason}"
        wait = f"{self.retry_after:.3g}"
        if "e" in wait:  # 3600, not 3.6e+03
            wait = f"{self.retry_after:.0f}"
        return f"{self.policy}: {self.reason}; retry after {wait} s"


class CircuitOpen(Rejected, pybreaker.CircuitBreakerError):
    """The circuit breaker is open, or half-open with all its probes under way."""


class RateLimited(Rejected):
    """The rate limit is used up; `retry_after` says exactly when the next call fits."""


class BulkheadFull(Rejected):
    """All permits of the bulkhead are taken, and there was no place or no time left in its queue."""


class Shed(Rejected):
    """There is more to do than can be done in time, and this call is not the one that matters most."""


class Draining(Rejected):
    """The process is about to end, and takes no new requests."""


class ThreadsExhausted(Rejected):
    """A sync `Timeout` has abandoned as many threads as it may, and they are all still running."""


class TimedOut(ResilientError, TimeoutError):
    """A deadline passed before the call was done.

    Args:
        policy: The label of the scope whose deadline it was; an outer scope's if that ended first.
        seconds: The length of that scope in seconds, None if it was not set by a `Timeout`.
    """

    def __init__(self, *, policy: str, seconds: float | None = None) -> None:
        after = "the deadline passed" if seconds is None else f"not done after {seconds:g} s"
        super().__init__(f"{policy}: {after}")
        self.policy = policy
        self.seconds = seconds


class FailedResult(ResilientError):
    """A result that counts as a failure (`Pipeline(failed=...)`, tenacity's `retry_if_result`).

    Policies and fallbacks see it as an error. If nobody handled it, the outermost pipeline turns it back
    into the result it carries, so callers never meet it.

    Args:
        result: What the guarded function returned.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(f"the result of type {type(result).__name__} counts as a failure")
        self.result = result


class FailedResponse(FailedResult):
    """A response whose status counts as a failure: one that HTTP calls so, or one named by `on=`.

    Args:
        result: The response.
    """

    @property
    def status(self) -> int:
        """The status code."""
        return int(self.result.status_code)

    def __str__(self) -> str:
        return f"the response has status {self.status}"


def _rebuild(cls: type[ResilientError], args: tuple[Any, ...], state: dict[str, Any]) -> ResilientError:
    error: ResilientError = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error
