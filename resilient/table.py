"""A bounded table of per-key state that never forgets a limit.

Dropping the least recently used key, as caches do, would hand an exhausted client a fresh limit: it only has
to wait until enough other keys have come by, or to send them itself. This table drops a key only if its state
equals that of a key never seen. If there is no such key, new keys share one entry.
"""

from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

V = TypeVar("V")

_PROBES = 16


class _Overflow:
    def __repr__(self) -> str:
        return "OVERFLOW"


OVERFLOW: Final = _Overflow()
"""The key of the entry that new keys share when the table is full."""


class Table(Generic[V]):
    """State by key, for at most `max_keys` keys and the overflow entry; the caller holds the lock.

    Args:
        max_keys: How many keys are remembered.
    """

    __slots__ = ("_cursor", "_ring", "entries", "max_keys")

    def __init__(self, max_keys: int) -> None:
        self.max_keys = max_keys
        self.entries: dict[Hashable, V] = {}
        # The keys again, in a list, so that a cursor can walk around them while the dict changes. Walking a
        # dict from its front would step over all that was deleted there, again and again.
        self._ring: list[Hashable] = []
        self._cursor = 0

    def add(self, key: Hashable, value: V, idle: Callable[[V], bool]) -> V:
        """Add the state of a new key.

        Args:
            key: The key, which has no entry yet.
            value: Its state.
            idle: Tells whether a state equals that of a key never seen.

        Returns:
            The state to use: `value`, or that of the overflow entry if there is no room.
        """
        place = self.place_for(key, idle)
        return self.entries.setdefault(place, value)

    def place_for(self, key: Hashable, idle: Callable[[V], bool]) -> Hashable:
        """Return the key under which a new key's state has to be kept: itself, or OVERFLOW."""
        ring = self._ring
        if len(ring) < self.max_keys:
            ring.append(key)
            return key
        for _ in range(min(_PROBES, len(ring))):
            self._cursor = (self._cursor + 1) % len(ring)
            candidate = ring[self._cursor]
            if idle(self.entries[candidate]):
                del self.entries[candidate]
                ring[self._cursor] = key
                return key
        return OVERFLOW
