"""Fallback: what to answer when a call has failed.

A fallback is a decision about the product: a default, an older answer, another replica. Keep it simpler than
what it replaces, and watch it: a fallback that is always in use is an outage that nobody sees.
"""

from dataclasses import dataclass
from typing import Any

from resilient import events, options
from resilient.call import AsyncNext, Call, Next
from resilient.component import Component
from resilient.counter import Counter
from resilient.edge import Edge
from resilient.kinds import MISSING, Value


@dataclass(frozen=True, slots=True)
class FallbackStatistics:
    """A snapshot of a `Fallback`.

    Attributes:
        used: How many alternatives were asked.
    """

    used: int


class Fallback(Value):
    """Answer with something else when the call has failed.

    Args:
        *alternatives: What to answer: a value, or a function that is called with the same arguments (sync or,
            for async calls, async). With several, each is tried if the one before it failed; a value never
            fails, so it comes last.
        on: For which errors: exception classes, HTTP status codes and functions of the error. Default
            `Exception`, which includes the refusals of policies further in. Cancellation never leads to a
            fallback.
        name: What errors and events call this policy. Default: its repr.

    Raises:
        Exception: That of the last alternative, with the error before it as `__context__`.

    Emits:
        FallbackUsed.
    """

    def __init__(self, *alternatives: Any, on: "options.Errors" = Exception, name: str | None = None) -> None:
        super().__init__(name=name)
        if not alternatives:
            raise TypeError("Fallback: alternatives=() is not allowed; give a value or a function to fall back to")
        for alternative in alternatives:
            if isinstance(alternative, Component):
                allowed = "a value or a function; guard a function with the policy and give that"
                raise options.refuse("Fallback", "alternatives", alternative, allowed, TypeError)
        for alternative in alternatives[:-1]:
            if not callable(alternative):
                raise options.refuse(
                    "Fallback",
                    "alternatives",
                    alternative,
                    "values only last: nothing after one is ever tried",
                )
        self.alternatives = alternatives
        self.on = options.errors("Fallback", "on", on)
        self.judge_statuses_of(self.on)
        self._matches = options.matcher(self.on)
        self._used = Counter()

    def link(self, nxt: Next, edge: Edge) -> Next:
        for alternative in self.alternatives:
            if options.is_async(alternative):
                raise TypeError(f"Fallback: {alternative!r} is async and cannot answer for a sync function")
            nxt = _Alternative(self, alternative).link(nxt, edge)
        return nxt

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        for alternative in self.alternatives:
            nxt = _Alternative(self, alternative).alink(nxt, edge)
        return nxt

    def recover(self, call: Call, error: Exception, now: float) -> Any:
        """Tell nothing by itself: every alternative is a layer of its own around the one before it."""
        return MISSING

    def answer(self, alternative: Any, call: Call, error: Exception) -> Any:
        """Return what one alternative answers for a failed call, or MISSING if the error is none of ours."""
        if not self._matches(error):
            return MISSING
        self._used.add()
        self.emit(events.FallbackUsed, error=type(error).__name__)
        return call.edge.alternative(alternative, call)

    def statistics(self) -> FallbackStatistics:
        """Return how often a fallback was used."""
        return FallbackStatistics(used=self._used.value)


class _Alternative(Value):
    """One alternative: its own failure is seen by the next one, which is linked around it."""

    def __init__(self, fallback: Fallback, alternative: Any) -> None:
        super().__init__()
        self._fallback = fallback
        self._alternative = alternative

    def recover(self, call: Call, error: Exception, now: float) -> Any:
        return self._fallback.answer(self._alternative, call, error)
