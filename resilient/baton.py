"""A lock for critical sections of a few bytecodes.

A `threading.Lock` in a `with` statement costs as much as a function call with several closures around it. A
deque of one element is as exclusive: `pop` and `append` are single operations of the interpreter, and whoever
has popped the element is alone. Waiting for it is dear, because it polls, so this is only for sections that
nobody stays in: no I/O, no user code.

    with baton: ...                 # where speed does not matter

    try:                            # where it does
        baton.take()
    except IndexError:
        baton.wait()
    try:
        ...
    finally:
        baton.give(None)

Unlike a lock it survives an interrupt at the wrong moment. If `KeyboardInterrupt` comes between `take` and
`try`, the baton is lost; the next one who wants it waits for `LOST_AFTER` seconds and then goes on without.
"""

import time
from collections import deque

LOST_AFTER = 5.0
"""Seconds after which a baton that nobody gives back is taken to be lost in an interrupt."""


class Baton:
    """Held by one thread at a time."""

    __slots__ = ("give", "take")

    def __init__(self) -> None:
        place: deque[None] = deque([None], maxlen=1)  # giving it twice leaves one
        self.take = place.pop
        self.give = place.append

    def wait(self) -> None:
        """Take the baton from somebody who is about to give it back."""
        until = time.monotonic() + LOST_AFTER  # real time, whatever the runtime says: this is about threads
        while time.monotonic() < until:
            try:
                self.take()
            except IndexError:
                time.sleep(0)
            else:
                return

    def __enter__(self) -> None:
        try:
            self.take()
        except IndexError:
            self.wait()

    def __exit__(self, *_: object) -> None:
        self.give(None)
