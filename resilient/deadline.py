"""The deadline of the running call, visible to everything below it.

One context variable holds the absolute time at which the call has to be done, and who said so. Scopes
(`Timeout`) tighten it and nothing loosens it: retries do not sleep past it, queues do not wait past it, and
an attempt that cannot start before it is not started. Code of your own can ask how much is left:

    deadline.remaining()     # seconds, or None without a deadline
    deadline.check()         # raises TimedOut if it has passed

Background work that outlives the call should not inherit its deadline: start it inside `deadline.detached()`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from typing import TYPE_CHECKING, Any

from resilient import runtime
from resilient.errors import TimedOut

if TYPE_CHECKING:
    from resilient.kinds import Scope


class Deadline:
    """An absolute time, and whose it is.

    Args:
        at: The time in seconds of `runtime.now()`.
        scope: The policy that set it.
        outer: The later deadline around it, or None.

    Attributes:
        published: Whether it is only there to be looked at, and does not end the call by itself.
    """

    __slots__ = ("_told", "at", "cancels", "outer", "scope")

    published = True

    cancels: "tuple[Any, ...]"

    def __init__(self, at: float, scope: "Scope", outer: "Deadline | None" = None) -> None:
        self.at = at
        self.scope = scope
        self.outer = outer

    def due(self) -> "Deadline":
        """Return the outermost deadline that has passed as well, if nobody but this one ends the call for it."""
        deadline, now = self, runtime.now()
        while deadline.outer is not None and deadline.outer.published and deadline.outer.at <= now:
            deadline = deadline.outer
        return deadline

    def disarm(self) -> None:
        """Have nobody be cancelled at this deadline any more: what was to be done by then is done.

        Others that run in a copy of the context may still see it, so it is moved far away too.
        """
        self.at += FAR_AWAY
        for cancel_scope in getattr(self, "cancels", ()):  # trio's; it has no value on asyncio
            cancel_scope.deadline = inf

    def timed_out(self) -> TimedOut:
        """Return the error that names the owner of this deadline, after telling its listeners, but once."""
        told = hasattr(self, "_told")  # it has no value yet: one less to set for every call
        self._told = True
        return self.scope.timed_out(tell=not told)


SOONER = 0.01
"""Seconds before a deadline at which mere waiting ends: a cancellation could not say what it was waiting for."""

FAR_AWAY = 2_000_000.0
"""Seconds; milliseconds of more do not fit into what operating systems take."""

_current: ContextVar[Deadline | None] = ContextVar("resilient.deadline", default=None)


def current() -> Deadline | None:
    """Return the deadline of the running call, or None."""
    return _current.get()


def remaining() -> float | None:
    """Return the seconds that are left (negative once the deadline has passed), or None without a deadline."""
    deadline = _current.get()
    return None if deadline is None else deadline.at - runtime.now()


def check() -> None:
    """Stop here if the deadline has passed: what cooperative code calls between two steps of its work.

    Raises:
        TimedOut: The deadline has passed; the error names the scope that set it.
    """
    deadline = _current.get()
    if deadline is not None and runtime.now() >= deadline.at:
        raise deadline.timed_out()


def waiting_time(left: float) -> float:
    """Return how many of the seconds that are left may be spent on waiting."""
    return left - min(SOONER, left / 4)


@contextmanager
def detached() -> Iterator[None]:
    """Run a block without the deadline of the caller, for starting work that outlives the call."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def tighten(scope: "Scope", seconds: float, now: float) -> Deadline:
    """Return the deadline of a scope that begins now: its own, or the one around it if that ends sooner.

    Raises:
        TimedOut: The deadline around it has passed already.
    """
    outer = _current.get()
    if outer is None or outer.at > now + seconds:
        return Deadline(now + seconds, scope, outer)
    if outer.at <= now:
        raise outer.timed_out()
    return outer


@contextmanager
def published(deadline: Deadline) -> Iterator[None]:
    """Run a block under a deadline that nobody enforces."""
    token = _current.set(deadline)
    try:
        yield
    finally:
        _current.reset(token)


def tightest(own: float | None) -> float | None:
    """Return the earlier of a time of one's own and the deadline of the running call."""
    deadline = _current.get()
    if deadline is None:
        return own
    return deadline.at if own is None else min(own, deadline.at)
