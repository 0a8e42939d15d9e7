"""The deadline that the caller of a request has set for it."""

from typing import Any

from resilient import deadline, events, timers
from resilient.asgi.exchange import AsgiCall, Scope
from resilient.call import AsyncNext
from resilient.deadline import Deadline
from resilient.errors import TimedOut
from resilient.http.deadline_header import DeadlineHeader
from resilient.kinds import Scope as Timed


class _Asked(Deadline):
    """The deadline of one request, which knows how many seconds it gave: each request may have another number."""

    __slots__ = ("seconds",)

    scope: "Incoming"
    seconds: float

    def timed_out(self) -> TimedOut:
        told = hasattr(self, "_told")
        self._told = True
        return self.scope.timed_out(tell=not told, seconds=self.seconds)


class Incoming(Timed):
    """Limits requests by the time that their callers are willing to wait, as they say in a header.

    The time counts from the arrival of the request. A caller can only shorten what is done for it.

    Args:
        header: The name of the header: `"grpc-timeout"`, one that ends in `-ms`, or one in seconds.
        cap: The longest time in seconds that a caller can ask for.
        margin: The seconds by which to be done sooner, for the way back. What cannot be done then is not begun.
    """

    def __init__(self, header: str, *, cap: float = 60.0, margin: float = 0.02) -> None:
        super().__init__(name="deadline of the caller")
        self.header = header
        self.cap = cap
        self.margin = margin
        self._parser = DeadlineHeader.of(header, "ResilienceMiddleware", "deadline_header")
        self._name = self._parser.name.encode("ascii")

    def limit(self) -> float:
        return self.cap

    def timed_out(self, *, tell: bool = True, seconds: float | None = None) -> TimedOut:
        if tell:
            self.emit(events.TimeoutExpired, seconds=self.cap if seconds is None else seconds)
        return TimedOut(policy=self.label)

    def asked(self, scope: Scope) -> float | None:
        """Return how many seconds the caller leaves us; None if it does not say, or nothing that makes sense."""
        values = [value for name, value in scope["headers"] if name == self._name]
        seconds = self._parser.parse(values[0]) if len(values) == 1 else None
        return None if seconds is None else min(seconds, self.cap) - self.margin

    def around(self, chain: AsyncNext) -> AsyncNext:
        """Return a chain that ends at the deadline of the caller.

        It raises TimedOut when that has passed, and at once if there is too little time to begin with.
        """

        async def limited(call: AsgiCall) -> Any:
            seconds = self.asked(call.scope)
            if seconds is None:
                return await chain(call)
            if seconds <= 0:
                raise self.timed_out(seconds=0.0)
            limit = around = call.around
            if around is None or around.at > call.now + seconds:
                limit = _Asked(call.now + seconds, self, around)
                limit.seconds = seconds
            token = deadline._current.set(limit)
            try:
                timer = timers.begin(self, self.cap, call.now, self._queues)
                if timer is None:  # the deadline around this comes first, and ends the call
                    return await chain(call)
                try:
                    result = await chain(call)
                except BaseException as error:
                    timer.end(error)
                    raise
                timer.end(None)
                return result
            finally:
                deadline._current.reset(token)

        return limited  # type: ignore[return-value]
