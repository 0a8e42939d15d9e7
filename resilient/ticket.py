"""A place in a queue: what a policy hands to a caller who has to wait.

The policy decides and never blocks; the caller waits in its own colour (a thread, an asyncio task, a trio
task). The ticket is the one object that both touch, possibly from different threads and event loops.
"""

from collections.abc import Callable
from typing import Any


class Ticket:
    """Wait until a known time, or until somebody calls `grant`.

    Args:
        ready_at: The time (seconds of `runtime.now()`) at which the wait ends by itself, admitted.
        expires_at: The time at which the holder stops waiting for `grant`; None waits without end.

    Attributes:
        granted: Whether `grant` has reached the holder.
        cancelled: Whether the holder stops waiting because it was cancelled, and not because its time is over:
            then nobody is refused, and there is nothing to report.
        value: What the holder gets with the grant, if there is anything to get.
        error: What the holder raises instead of going on, if it is set before the grant.
    """

    __slots__ = ("_wake", "cancelled", "error", "expires_at", "granted", "ready_at", "value")

    def __init__(self, *, ready_at: float | None = None, expires_at: float | None = None) -> None:
        self.ready_at = ready_at
        self.expires_at = expires_at
        self.granted = False
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self._wake: Callable[[], object] | None = None

    def attach(self, wake: Callable[[], object]) -> bool:
        """Say how the holder is woken; return False if there is nothing to wait for any more."""
        # The mirror image of grant(): each writes its own field before it reads the other's, so whatever
        # the interleaving, at least one of the two sees the other.
        self._wake = wake
        return not self.granted

    def grant(self) -> bool:
        """Wake the holder; return False if it can no longer be woken because its event loop has ended."""
        self.granted = True
        wake = self._wake
        if wake is not None:
            try:
                wake()
            except RuntimeError:  # a closed event loop, on asyncio and on trio alike
                self.granted = False
                return False
        return True


class Waited(float):
    """The time at which a call left a queue, which knows how long the call had waited there.

    It is the `now` of the call from then on. So the wait is known to the gates that come next, costs nothing where
    nobody waited, and is forgotten when the call moves on in time: the next attempt is not blamed for it.

    Attributes:
        seconds: How long the call has waited, in all the queues that it went through one after the other.
    """

    __slots__ = ("seconds",)

    seconds: float


def after_wait(before: float, now: float) -> Waited:
    """Return the time `now`, at which a call has waited since `before`."""
    waited = Waited(now)
    waited.seconds = max(0.0, now - before) + (before.seconds if isinstance(before, Waited) else 0.0)
    return waited
