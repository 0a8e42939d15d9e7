"""A lock for critical sections of a few bytecodes.

A `threading.Lock` in a `with` statement costs as much as a function call with several closures around it. A
deque of one element is as exclusive: `pop` and `append` are single operations of the interpreter, and whoever
has popped the element is alone. Waiting for it is dear, because it polls, so this is only for sections that
nobody stays in: no I/O, no user code.

    try:
        value = baton.take()        # or baton.hold(), where speed does not matter
    except IndexError:
        value = baton.wait()
    try:
        ...
    finally:
        baton.give(value)

What is handed on may be a value of its own: then the baton is the state that it protects, `take` reads it and
`give` writes it.

Unlike a lock it survives an interrupt at the wrong moment. If `KeyboardInterrupt` comes between `take` and
`try`, the baton is lost; the next one who wants it waits for `LOST_AFTER` seconds and then goes on without.
"""

import time
from collections import deque
from typing import Generic, TypeVar

V = TypeVar("V")

LOST_AFTER = 5.0
"""Seconds after which a baton that nobody gives back is taken to be lost in an interrupt."""


class Baton(Generic[V]):
    """Held by one thread at a time.

    Args:
        value: What is handed on from one holder to the next.
        lost: What `wait` returns when the baton was lost, and its value with it.
    """

    __slots__ = ("_lost", "give", "take")

    def __init__(self, value: V, lost: V) -> None:
        place = deque([value], maxlen=1)  # giving it twice leaves one
        self.take = place.pop
        self.give = place.append
        self._lost = lost

    def hold(self) -> V:
        """Take the baton, waiting for it if need be."""
        try:
            return self.take()
        except IndexError:
            return self.wait()

    def wait(self) -> V:
        """Take the baton from somebody who is about to give it back."""
        until = time.monotonic() + LOST_AFTER  # real time, whatever the runtime says: this is about threads
        while time.monotonic() < until:
            try:
                return self.take()
            except IndexError:
                time.sleep(0)
        return self._lost

    def after_fork(self, value: V) -> None:
        """Make a new baton if the old one is in the hands of a thread that the child does not have."""
        try:
            value = self.take()
        except IndexError:
            pass
        self.give(value)
