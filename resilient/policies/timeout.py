"""Timeout: a call has to be done in so many seconds.

An async call is cancelled at its deadline, exactly as `asyncio.timeout` and trio's cancel scopes do it. A
*sync* function cannot be interrupted from outside in Python. By default it therefore runs in a worker thread,
and at the deadline the caller gets `TimedOut` while the thread is abandoned: it runs on until the function
returns, with all its side effects. How many may do so is bounded.

The deadline is visible to everything below: an inner timeout never exceeds it, retries do not sleep past it,
queues do not wait past it. See `resilient.deadline`.
"""

from resilient import options
from resilient.kinds import Scope


class Timeout(Scope):
    """Give a call so many seconds.

    Args:
        seconds: How long the call may take, as a number > 0 or a timedelta.
        interrupt: True (the default) ends the call at its deadline: an async one by cancellation, a sync one
            by abandoning its thread. False only publishes the deadline, for code that looks at it.
        max_abandoned: How many abandoned threads may still be running before further sync calls are refused.
            Default 16.
        name: What errors and events call this policy. Default: its repr.

    Raises:
        TimedOut: The call was not done in time. It is a `TimeoutError`, and names the outer scope if that
            scope's deadline came first.
        ThreadsExhausted: `max_abandoned` threads of earlier calls are still running.

    Emits:
        TimeoutExpired, ThreadAbandoned, ThreadsRejected.
    """

    def __init__(
        self,
        seconds: options.Seconds,
        *,
        interrupt: bool = True,
        max_abandoned: int = 16,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.seconds = options.seconds("Timeout", "seconds", seconds)
        self.interrupt = options.flag("Timeout", "interrupt", interrupt)
        self.max_abandoned = options.whole("Timeout", "max_abandoned", max_abandoned)

    def limit(self) -> float:
        return self.seconds
