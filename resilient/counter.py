"""A counter that many threads can add to without a lock."""

from itertools import count


class Counter:
    """Counts calls of `add()`, or of `next(ticks)`: one operation of the interpreter, on all its builds."""

    __slots__ = ("add", "ticks")

    def __init__(self) -> None:
        self.ticks = count()
        self.add = self.ticks.__next__

    @property
    def value(self) -> int:
        """How often `add` was called."""
        # Only its repr, `count(3)`, tells where an iterator is without moving it. To move it and to count that as
        # well would be two operations, and wrong by all that other threads read between them.
        return int(repr(self.ticks)[len("count(") : -1])
