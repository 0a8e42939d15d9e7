"""How much a call matters when there is not enough for all: it is refused later, and waits less, than others.

One context variable holds the priority of the running call. It goes wherever the context goes: into the tasks
that a task starts, and into the threads of a sync `Timeout`. Code that knows what a call is worth sets it:

    with priority.of(Priority.CRITICAL):
        health_check()

`Bulkhead` puts calls of a higher priority further ahead in its queue, and `LoadShed` sheds them later. The levels
are what the SRE book calls criticality (chapter 21, "Handling Overload"): few, and the same in the whole system.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum

from resilient import options


class Priority(IntEnum):
    """The level of a call; a higher one comes first."""

    LOW = 1
    """Work that can be done later, or not at all: batch jobs, prefetching, crawlers."""

    NORMAL = 2
    """Everything that nobody has said anything about."""

    HIGH = 3
    """What users notice at once, or what earns the money."""

    CRITICAL = 4
    """What keeps the system alive: health checks, the console of the operators."""


_current: ContextVar[Priority] = ContextVar("resilient.priority", default=Priority.NORMAL)


def current() -> Priority:
    """Return the priority of the running call, `Priority.NORMAL` if nobody has set another one."""
    return _current.get()


@contextmanager
def of(level: Priority) -> Iterator[None]:
    """Run a block, and all that it calls, with another priority.

    Args:
        level: A `Priority`, or its number.

    Returns:
        A context manager; it works as a decorator of sync functions as well.

    Raises:
        TypeError: Not a number.
        ValueError: The number of no priority.
    """
    token = _current.set(checked(level))
    try:
        yield
    finally:
        _current.reset(token)


def checked(level: object) -> Priority:
    """Return the priority that `level` is, or is the number of."""
    names = ", ".join(map(str, (f"Priority.{each.name}" for each in Priority)))
    if isinstance(level, bool) or not isinstance(level, int):
        raise options.refuse("priority.of", "level", level, f"one of {names}", TypeError)
    try:
        return Priority(level)
    except ValueError:
        raise options.refuse("priority.of", "level", level, f"one of {names}") from None
