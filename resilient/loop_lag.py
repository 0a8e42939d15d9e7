"""How late the event loop is: the time that whatever is ready has to wait until the loop gets to it.

An event loop that has more to do than it can do, or that somebody blocks, is late for everything. A probe asks the
loop to be called after a short time, sees how much too late that happens, and asks again. What is known is then

    lag = max(how late the last probe came, how long the next one is overdue by now)

The second part tells of a blocked loop at once: the first call after the block sees it, before the probe has run.

There is one probe for each running loop, whoever asks. It begins when a call first asks for it, and ends by
itself when none has asked for a second. It is a loop timer on asyncio and a system task on trio: neither keeps a
loop or a process alive. To find the probe, a thread remembers its last one, as a thread runs one loop at a time.
Whether that loop is still the one that runs is looked at when the probe is late: a loop that has ended soon is.

A loop that stops for a while and then goes on (`run_until_complete` twice) has been late, as far as this can tell.
"""

import asyncio
import contextvars
import threading
import weakref
from typing import Any

from resilient import runtime

PERIOD = 0.02
"""Seconds from one probe to the next."""

IDLE = 1.0
"""Seconds without any question after which the probe of a loop ends."""

_NEVER = float("inf")


class Probe:
    """What is known about the event loop of a thread; this one stands for a thread in which none runs.

    Attributes:
        late: How many seconds too late the last probe came; infinite while nothing is measured.
        due: When the next one is to come.
        asked: Whether somebody has asked since the last one. Whoever reads the fields sets it.
        clock: The runtime whose time this is: `resilient.testing` puts in another one, whose time begins anew.
    """

    __slots__ = ("asked", "clock", "due", "late")

    def __init__(self) -> None:
        self.late = _NEVER
        self.due = 0.0
        self.asked = True
        self.clock: object = None

    def is_of(self, loop: object) -> bool:
        """Tell whether this is the probe of a loop; None is the thread without one."""
        return loop is None

    def reset(self) -> None:
        """Forget what was measured."""
        self.clock = runtime._installed
        self.late, self.due = 0.0, runtime.now() + PERIOD

    def ask(self) -> None:
        """Ask the loop, which is running, to come back after a period."""

    def lag(self, now: float) -> float:
        """Return how late the loop is, in seconds."""
        return max(self.late, now - self.due)


class _LoopProbe(Probe):
    __slots__ = ("_loop", "_quiet_since")

    def __init__(self, loop: Any) -> None:
        super().__init__()
        self._loop = weakref.ref(loop)
        self._quiet_since = 0.0

    def is_of(self, loop: object) -> bool:
        return self._loop() is loop

    def heard(self) -> bool:
        """Take note that the loop has come back; return whether to ask again."""
        now = runtime.now()
        self.late, self.due = max(0.0, now - self.due), now + PERIOD
        if self.asked:
            self.asked, self._quiet_since = False, now
        elif now - self._quiet_since > IDLE:
            self.late = _NEVER  # whoever looks next begins anew
            return False
        return True


class _AsyncioProbe(_LoopProbe):
    __slots__ = ()

    def ask(self) -> None:
        # In a context of its own: a copy of the caller's would keep alive what the caller has in it.
        asyncio.get_running_loop().call_later(PERIOD, self._fire, context=contextvars.Context())

    def _fire(self) -> None:
        if self.heard():
            self.ask()


class _TrioProbe(_LoopProbe):
    __slots__ = ()

    def ask(self) -> None:
        import trio

        trio.lowlevel.spawn_system_task(self._run, name="resilient: lag of the event loop")

    async def _run(self) -> None:
        import trio

        again = True
        while again:
            await trio.sleep(PERIOD)
            again = self.heard()


class _Here(threading.local):
    """The probes of this thread, and the one that was looked at last."""

    def __init__(self) -> None:
        self.probe = Probe()
        self.probes: weakref.WeakKeyDictionary[Any, Probe] = weakref.WeakKeyDictionary()


here = _Here()


def look() -> Probe:
    """Return the probe of the event loop that runs in this thread, after starting it if it does not measure."""
    loop, kind = _running()
    probe = here.probe
    if not probe.is_of(loop):
        known = None if loop is None else here.probes.get(loop)
        if known is not None:
            probe = known
        elif loop is None:
            probe = Probe()
        else:
            probe = here.probes[loop] = kind(loop)
        here.probe = probe
    if probe.late == _NEVER:
        probe.reset()
        probe.ask()
    elif loop is None or probe.clock is not runtime._installed:
        probe.reset()
    return probe


def lag(now: float) -> float:
    """Return how late the event loop is that runs in this thread: 0 if there is none, or nobody measures it."""
    probe = here.probe
    loop, _ = _running()
    measured = probe.late < _NEVER and probe.clock is runtime._installed
    return probe.lag(now) if measured and loop is not None and probe.is_of(loop) else 0.0


def _running() -> tuple[Any, type[_LoopProbe]]:
    """Return the event loop that runs in this thread, if there is one, and the kind of its probe."""
    if runtime.in_trio():
        import trio

        return trio.lowlevel.current_trio_token(), _TrioProbe
    try:
        return asyncio.get_running_loop(), _AsyncioProbe
    except RuntimeError:
        return None, _AsyncioProbe
