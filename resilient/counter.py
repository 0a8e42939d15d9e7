"""A counter that many threads can add to without a lock."""

from itertools import count


class Counter:
    """Counts calls of `add()`, or of `next(ticks)`: one operation of the interpreter, on all its builds."""

    __slots__ = ("_reads", "add", "ticks")

    def __init__(self) -> None:
        self.ticks = count()
        self._reads = count()
        self.add = self.ticks.__next__

    @property
    def value(self) -> int:
        """How often `add` was called. Reading takes a tick itself, so the ticks of all readings are subtracted."""
        reads = next(self._reads)
        return next(self.ticks) - reads
