"""A counter that many threads can add to without a lock."""

from itertools import count


class Counter:
    """Counts calls of `add`, which is a single operation of the interpreter, also on free-threaded builds."""

    __slots__ = ("_reads", "_ticks", "add")

    def __init__(self) -> None:
        self._ticks = count()
        self._reads = count()
        self.add = self._ticks.__next__

    @property
    def value(self) -> int:
        """How often `add` was called. Reading takes a tick itself, so the ticks of all readings are subtracted."""
        reads = next(self._reads)
        return next(self._ticks) - reads
