"""SIGTERM, held back from a server until a `Drain` is over.

An app learns of the shutdown too late by itself: servers send `lifespan.shutdown` after the last connection is
closed. So the signal has to be held back, and how it reaches a server differs. What is used here is public:

* uvicorn sets a handler by `signal.signal`. Ours takes its place, and puts it back to deliver the signal.
* hypercorn without worker processes and granian use `loop.add_signal_handler`. On asyncio that is a byte in the
  file of `signal.set_wakeup_fd`, which the event loop reads. A pipe of ours takes the place of that file; the
  loop reads it too, and passes on the other signals. In the end the file is put back, and SIGTERM sent again.
* A worker process of hypercorn gets no signal at all, but looks at an event that its parent sets. There is
  nothing to hold back; the documentation says what to do instead.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from resilient import runtime

if TYPE_CHECKING:
    from resilient.asgi.drain import Drain

_ONE_SIGNAL = 1.0  # seconds
"""SIGTERM so soon after the first is the same one, come by another way: systemd sends it to all processes of a
service at once, and the parent of a worker sends it once more. uvicorn's looks for signals every half second."""


class Hook:
    """Stands before what handles SIGTERM, until that may have it; see `Drain.install`.

    Args:
        drain: What has to end first.
        previous: The handler that is there.
    """

    def __init__(self, drain: "Drain", previous: Callable[..., Any] | int) -> None:
        self._drain = drain
        self._previous = previous
        self._signalled_at: float | None = None
        self._removed = self._drained = False
        self._tap = Tap.of_running_loop()
        signal.signal(signal.SIGTERM, self)

    def __call__(self, _signum: int, _frame: FrameType | None) -> None:
        now = runtime.now()
        if self._signalled_at is None:
            self._signalled_at = now
            try:
                # The main thread may hold any lock just now, that of a listener included.
                runtime.start_thread(self._watch, "resilient-drain")
            except RuntimeError:  # the system has no thread left, or the interpreter is about to end
                self._hand_over()
        elif self._drained or now - self._signalled_at >= _ONE_SIGNAL:
            self._hand_over()

    def _hand_over(self) -> None:
        self.remove()
        signal.raise_signal(signal.SIGTERM)

    def _watch(self) -> None:
        self._drain.begin()
        self._drain.sit_out()
        self._drained = True
        left_to_others = self._previous == signal.SIG_DFL and self._drain._awaited
        if not self._removed and not left_to_others:
            _signal_main_thread()

    @property
    def taps(self) -> bool:
        """Whether it stands before an event loop, and not only before a handler."""
        return self._tap is not None

    def renew(self) -> None:
        """Stand before the event loop again, which may have started anew since."""
        if self._tap is not None:
            self._tap.renew()

    def _put_back(self) -> None:
        is_there = signal.getsignal(signal.SIGTERM) is self
        if is_there:
            signal.signal(signal.SIGTERM, self._previous)

    def remove(self) -> None:
        """Put back what was there."""
        self._removed = True
        self._put_back()
        tap, self._tap = self._tap, None
        if tap is not None:
            tap.remove()

    def forget(self) -> None:
        """Undo it in a forked child, which must not touch the files of its parent's event loop."""
        self._put_back()
        if self._tap is not None:
            self._tap.forget()


def _signal_main_thread() -> None:
    # Sent to a thread, so that the main one wakes up from whatever it waits for. Windows has no such thing.
    send = getattr(signal, "pthread_kill", None)
    if send is None:
        signal.raise_signal(signal.SIGTERM)
    else:
        send(threading.main_thread().ident, signal.SIGTERM)


class Tap:
    """Takes the place of the file by which an asyncio event loop hears of signals, and keeps SIGTERM from it.

    Args:
        loop: The event loop that runs.
        reader: What it reads instead.
        writer: Where signals are written to.
        theirs: Its own file.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, reader: int, writer: int, theirs: int) -> None:
        self._loop = loop
        self._reader = reader
        self._writer = writer
        self._theirs = theirs
        loop.add_reader(reader, self._pass_on)

    @classmethod
    def of_running_loop(cls) -> "Tap | None":
        """Put it there if an asyncio event loop runs here and hears of signals in this way, else return None."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        if not hasattr(signal, "pthread_kill"):
            return None  # Windows, where event loops handle no signals
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        theirs = signal.set_wakeup_fd(writer)
        if theirs == -1:
            signal.set_wakeup_fd(-1)
            os.close(reader)
            os.close(writer)
            return None
        return cls(loop, reader, writer, theirs)

    def renew(self) -> None:
        """Take the place of the file again."""
        theirs = signal.set_wakeup_fd(self._writer)
        if theirs == -1:
            signal.set_wakeup_fd(-1)  # the loop hears of no signals any more
        elif theirs != self._writer:
            self._theirs = theirs

    def _pass_on(self) -> None:
        try:
            others = bytes(number for number in os.read(self._reader, 4096) if number != signal.SIGTERM)
            if others:
                os.write(self._theirs, others)
        except BlockingIOError:  # nothing has come; or the loop has so much to read that it wakes up anyway
            pass

    def remove(self) -> None:
        """Put the file back; what has come meanwhile is passed on."""
        now = -1 if self._loop.is_closed() else self._theirs
        current = signal.set_wakeup_fd(now)
        if current != self._writer:
            signal.set_wakeup_fd(current)  # somebody else's by now
        try:
            # A handler interrupts the loop anywhere, so the loop is asked to forget the pipe when it can.
            self._loop.call_soon_threadsafe(self._take_out)
        except RuntimeError:  # it is closed
            self._close()

    def _take_out(self) -> None:
        self._pass_on()
        self._loop.remove_reader(self._reader)
        self._close()

    def _close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def forget(self) -> None:
        """Let go of the pipe in a forked child, whose parent's event loop is not its own."""
        current = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(-1 if current == self._writer else current)  # from 3.12 on asyncio has reset it
        self._close()
